"""A session as a run of this node: what ``jobs`` lists of it, what it tells, and the evidence.

It is the run of a script: nothing resumes it after a restart, and of its events only the last is
kept. Each lease was chosen by a look at the book, and the newest of these looks stay in the journal
with the bids that followed, so that anybody can rank them again (``market.evidence``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from p2pflop.errors import P2PFlopError, StoreError
from p2pflop.job.session import Mark
from p2pflop.keys import peer_id
from p2pflop.market.evidence import MAX_LOOKS, Again, Attempt
from p2pflop.market.limits import Known
from p2pflop.market.records import Bid, Fill, Receipt, Reject, Terms
from p2pflop.node.evidence import ATTEMPT_ROW, LOOK_ROWS, LOST_ROW, MAX_REASON_CHARS, keep_look
from p2pflop.node.journal import SESSION
from p2pflop.node.orders import Ranking
from p2pflop.node.printable import printable
from p2pflop.node.runs import Run, Runs
from p2pflop.node.service import Json
from p2pflop.wire import Sealed, encode

if TYPE_CHECKING:
    from p2pflop.node.session_buying import Session

MAX_TITLE_CHARS: Final = 80


@dataclass(frozen=True, slots=True)
class SessionLook:
    """One look at the book, for what is to be done again."""

    ranking: Ranking
    again: Mark
    terms: Terms
    known: Known


class SessionStory:
    """Of one session. ``run`` is its place among the runs of this node."""

    def __init__(self, runs: Runs, session: Session) -> None:
        wish = session.wish
        card: Json = {
            "kind": "session",
            "title": printable(wish.script, MAX_TITLE_CHARS),
            "class_name": wish.class_name,
            "class_id": "",
            "provider": "",
            "account": "",
            "max_nusd": wish.cap_nusd,
            "cost_nusd": 0,
        }
        self.run: Run = runs.create(card, run_id(session.id), side=SESSION)
        self._runs = runs
        self._session = session
        self._looks = 0
        self._last_why = ""

    def refresh(self) -> Json:
        """The card, as things stand."""
        session = self._session
        table, totals = session.table, session.totals
        self.run.card |= {
            "step": session.ran_to,
            "commands": table.count,
            "memory_bytes": table.held_bytes,
            "flop": table.flop,
            "moved_bytes": table.moved_bytes,
            "busy_ns": totals.busy_ns,
            "cost_nusd": session.spent_nusd,
        }
        return self.run.card

    async def became(self, state: str) -> None:
        """``leased``, ``idle`` or ``waiting``."""
        if self.run.card["state"] != state:
            await self._runs.emit(self.run, "state", state=state)

    async def looked(self, look: SessionLook, why: str, *, continues: bool) -> None:
        """A look at the book. ``why`` there is no deal, if so: it is kept once, however often the
        session looks again meanwhile. ``continues``: who was asked after the one before is not
        asked again. Raises StoreError."""
        if why and why == self._last_why:
            return
        self._last_why = why
        if self._looks == MAX_LOOKS:
            self._looks = 0
            self.run.rows.forget(*LOOK_ROWS)
            await self.run.rows.flush()
        self._looks += 1
        again = look.again
        session = Again(
            look.ranking.nonce,
            again.flop,
            again.touched_bytes,
            again.moved_bytes,
            again.lowered_nodes,
            again.held_seconds,
            look.terms,
        )
        keep_look(
            self.run.rows,
            look.ranking,
            continues=continues,
            known=look.known,
            session=session,
        )

    async def refused(self, bid: Sealed[Bid], reject: Sealed[Reject] | None, reason: str) -> None:
        """Nothing came of a bid."""
        self._tried(bid, b"", b"" if reject is None else reject.wire, reason)
        provider = peer_id(bid.record.provider)
        await self._runs.emit(self.run, "rejected", provider=provider, reason=reason)

    async def filled(self, bid: Sealed[Bid], fill: Sealed[Fill], account: bytes) -> None:
        """A bid was filled."""
        self._tried(bid, fill.wire, b"", "")
        provider = peer_id(bid.record.provider)
        self.refresh()
        self.run.card |= {
            "provider": provider,
            "account": account.hex(),
            "class_id": bid.record.class_id.hex(),
        }
        quote_nusd = bid.record.quote_nusd
        told = {"provider": provider, "quote_nusd": quote_nusd, "first_step": self._session.ran_to}
        await self._runs.emit(self.run, "filled", prepaid_nusd=0, **told)
        await self.became("leased")

    async def keep(self) -> None:
        """Have it on disk that there is a session, and why its lease is where it is. Raises
        StoreError."""
        self._runs.keep_card(self.run)
        await self.run.rows.flush()

    async def signed(self, provider: bytes, receipt: Receipt) -> None:
        """A receipt is countersigned."""
        told = {"number": receipt.number, "amount_nusd": receipt.amount_nusd}
        told |= {"to_step": receipt.to_step}
        await self._runs.emit(self.run, "receipt", provider=peer_id(provider), **told)

    async def lost(self, provider: bytes, reason: str) -> None:
        """A lease has ended before its time."""
        self.run.rows.add(LOST_ROW, reason[:MAX_REASON_CHARS].encode())
        step, from_step = self._session.ran_to, self._session.log.first
        told = {"reason": reason, "step": step, "from_step": from_step, "next": ""}
        await self._runs.emit(self.run, "resubmitted", provider=peer_id(provider), **told)

    async def end(self, failure: P2PFlopError | None) -> None:
        """The script is done, or ``failure`` has ended it. Never raises."""
        card = self.refresh()
        if failure is not None and not self._session.is_cancelled:
            await self._runs.fail(self.run, failure)
            return
        names = ("cost_nusd", "flop", "moved_bytes", "busy_ns")
        kind, told = "closed", {name: card[name] for name in names}
        if self._session.is_cancelled:
            kind, told = "cancelled", {"cost_nusd": card["cost_nusd"], "hint": ""}
        try:
            await self._runs.emit(self.run, kind, **told)
        except StoreError as fault:
            await self._runs.fail(self.run, fault)

    def _tried(self, bid: Sealed[Bid], fill: bytes, reject: bytes, reason: str) -> None:
        attempt = Attempt(bid.wire, fill, reject, reason[:MAX_REASON_CHARS])
        self.run.rows.add(ATTEMPT_ROW, encode(attempt))


def run_id(session_id: bytes) -> str:
    """The id under which a session is listed."""
    return session_id.hex()[:12]
