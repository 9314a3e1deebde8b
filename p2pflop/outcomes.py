"""How the jobs of a sweep end, and what they have cost until then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from p2pflop.errors import P2PFlopError
from p2pflop.node.service import LAST_EVENT_KINDS
from p2pflop.runs import Row, Run
from p2pflop.sdk import Number

if TYPE_CHECKING:
    from p2pflop.results import Result


@dataclass(frozen=True)
class Outcome:
    """How one job of a sweep has ended, as a future of ``concurrent.futures`` tells it.

    ``place`` is its number in the arguments, from 0; ``state`` is ``settled``, ``failed``,
    ``cancelled`` or, of one that was never submitted, ``not bought``. ``row`` is the last row that
    it told; ``earlier`` the id of the run whose result it has, if it was bought before; ``pack``
    that of the run in which it was bought together with others.
    """

    place: int
    args: Mapping[str, Number]
    state: str
    cost_nusd: int = 0
    run: Run | None = None
    row: Row | None = None
    earlier: str = ""
    pack: str = ""
    error: P2PFlopError | None = field(default=None, repr=False)

    def result(self) -> Result:
        """Its result. Raises what the job failed with."""
        if self.error is not None or self.run is None:
            raise self.error or P2PFlopError("the job was not bought")
        return self.run.result()

    def exception(self) -> P2PFlopError | None:
        """What it failed with, or None."""
        return self.error


@dataclass(frozen=True)
class SweepProgress:
    """How far a sweep is: numbers of jobs, of which ``done`` have ended, ``failed`` of them without
    a result."""

    jobs: int
    done: int
    failed: int
    under_way: int
    waiting: int
    spent_nusd: int


class Costs:
    """What a run owes, from its events: receipts are cumulative under each fill."""

    def __init__(self) -> None:
        self._before_nusd = 0
        self._now_nusd = 0

    @property
    def nusd(self) -> int:
        """All fills together."""
        return self._before_nusd + self._now_nusd

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take an event into account."""
        if event["kind"] == "filled":
            self._before_nusd, self._now_nusd = self.nusd, 0
        elif event["kind"] == "receipt":
            self._now_nusd = max(self._now_nusd, int(event["amount_nusd"]))
        elif event["kind"] in LAST_EVENT_KINDS:  # a cancel may owe more than the receipts
            self._before_nusd, self._now_nusd = max(self.nusd, int(event.get("cost_nusd", 0))), 0
