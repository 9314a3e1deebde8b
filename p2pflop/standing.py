"""How a sweep stands at the node: what a process needs to know that goes on with one.

A **unit** is what is bought as one: a job, or a pack of several. A pack that failed, or for which
there was no room in the budget, was bought job by job, so that these have runs of their own beside
or instead of its own. All of them count against the budget: what has settled, and packs that have
failed, with what they cost; the others with their limits, until it is known what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pflop.client import Client
from p2pflop.errors import ConfigError, NodeUnreachableError

if TYPE_CHECKING:
    from p2pflop.node.service import Json

Unit = tuple[int, ...]
"""The places of jobs that are bought as one; mostly there is but one."""


@dataclass
class Standing:
    """Of all units of a sweep: ``found`` are those of which there is a run, with the ``limits``
    that they count with, ``fresh`` those that nobody has submitted. ``ended`` has the lines of the
    runs that are over; ``spent_nusd`` is what failed packs have cost."""

    found: list[Unit] = field(default_factory=list)
    fresh: list[Unit] = field(default_factory=list)
    limits: dict[Unit, int] = field(default_factory=dict)
    ended: dict[Unit, Json] = field(default_factory=dict)
    spent_nusd: int = 0

    def add(self, unit: Unit, card: Json | None) -> None:
        """Take a unit in; ``card`` is the line of its run, None if there is none."""
        if card is None:
            self.fresh.append(unit)
            return
        self.found.append(unit)
        cost_nusd = card["cost_nusd"] if card["end_state"] == "settled" else card["max_nusd"]
        self.limits[unit] = int(cost_nusd)
        if card["end_state"]:
            self.ended[unit] = card


def recall(client: Client, units: Iterable[Unit], run_id: Callable[[Unit], str]) -> Standing:
    """Ask the node for the runs of ``units``; a pack that was split is there as its jobs."""
    standing = Standing()
    for unit in units:
        card = card_of(client, run_id(unit))
        has_failed = card is not None and card["end_state"] == "failed"
        alone: dict[Unit, Json | None] = {}
        if len(unit) > 1 and (card is None or has_failed):
            alone = {(place,): card_of(client, run_id((place,))) for place in unit}
        if card is not None and has_failed and alone:
            standing.spent_nusd += int(card.get("cost_nusd", 0))
        # What was bought before is answered even if its pack was never submitted.
        elif all(each is None or each.get("earlier") for each in alone.values()):
            alone = {unit: card}
        for each, its_card in alone.items():
            standing.add(each, its_card)
    return standing


def card_of(client: Client, run_id: str) -> Json | None:
    """How a run stands; None if nobody has submitted it."""
    try:
        return client.job(run_id)
    except NodeUnreachableError:
        raise
    except ConfigError:
        return None
