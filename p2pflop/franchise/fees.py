"""The flat fee: which schedule holds, what the next period is, and who is due when.

A period is charged when its attestation is issued, from money that was paid before; nothing is
charged for a time without an attestation. A renewal is issued in the last quarter of a period, at
most ``RENEW_BEFORE_NS`` before its end, and adds a whole period to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2pflop.franchise.records import DAY_NS, Attestation, Schedule
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS

RENEW_BEFORE_NS: Final = 14 * DAY_NS


@dataclass(frozen=True, slots=True)
class Period:
    """What one fee buys."""

    schedule: Schedule
    valid_from_ns: int
    valid_until_ns: int


def schedule_at(schedules: Iterable[Schedule], at_ns: int) -> Schedule | None:
    """Of those that hold by ``at_ns`` the one with the highest number."""
    held = [schedule for schedule in schedules if schedule.from_ns <= at_ns]
    return max(held, key=lambda schedule: schedule.number, default=None)


def next_period(schedule: Schedule, until_ns: int, now_ns: int) -> Period:
    """The period after ``until_ns``, the end of the one before, or 0; paid for at ``now_ns``."""
    start_ns = max(until_ns, now_ns)
    return Period(schedule, now_ns - 2 * CLOCK_TOLERANCE_NS, start_ns + schedule.period_ns)


def due_ns(schedule: Schedule, until_ns: int) -> int:
    """From when on the next period may be issued; ``until_ns`` is the end of the last, or 0."""
    return max(0, until_ns - min(RENEW_BEFORE_NS, schedule.period_ns // 4))


def is_in_time(
    schedule: Schedule, until_ns: int, due: int, attestation: Attestation, at_ns: int
) -> bool:
    """Whether ``attestation``, issued at ``at_ns``, is what the schedule gives everybody.

    ``until_ns`` and ``due`` are when the period before ended and the next could be issued, or 0.
    This makes it public if one account were given more or less than others, or given it earlier.
    """
    period = next_period(schedule, until_ns, at_ns)
    return (
        attestation.max_slots == schedule.max_slots
        and attestation.valid_from_ns <= at_ns
        and attestation.valid_until_ns == period.valid_until_ns
        and due <= at_ns
    )
