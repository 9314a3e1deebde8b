"""What of this node is free, and for whom: slots, memory, and credit.

A sale holds **capacity** from its fill until its worker has ended, and **credit** until it is
over: a buyer that never countersigns keeps no slot, but what was begun unpaid counts for a day
as if it owed it. Credit is by account (``p2pflop.market.credit``): what one owes may be as much as
it has paid in all, and beyond that all share one pool. There is no waiting list: whoever comes
first gets the slot, everybody else at once a no, which says whether to come back.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from p2pflop.job.buying import BUSY_PREFIX
from p2pflop.job.file import CheckedJob
from p2pflop.job.meter import METER_ID
from p2pflop.keys import peer_id
from p2pflop.market.credit import credit_reason
from p2pflop.market.fills import OpenBid, bid_figures, check_costs
from p2pflop.market.limits import Limit, exceeded
from p2pflop.market.records import Bid, Terms
from p2pflop.node.config import Settings
from p2pflop.node.execute import memory_bytes, unsupported
from p2pflop.node.journal import MAX_UNPAID, UNPAID_FOR_NS, Unpaid
from p2pflop.node.lapses import Lapses
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.orders import MAX_CHECKPOINTS, checkpoints, cost_lines, moved_bytes
from p2pflop.node.worker_types import Workers
from p2pflop.units import NS_PER_S
from p2pflop.wire import Sealed

SAFE_LEVEL: Final = 2
SELLS_NOTHING: Final = "the provider sells nothing now"
MAX_OPEN_SALES: Final = 1024
MAX_OPEN_SALES_PER_ACCOUNT: Final = 64
MAX_LEASE_NS: Final = 30 * 24 * 3600 * NS_PER_S


class Claim(Protocol):
    """A sale, as far as it takes room."""

    @property
    def bid(self) -> Sealed[Bid]:
        """What was asked for."""

    @property
    def account(self) -> bytes:
        """The buyer's."""

    @property
    def quote_nusd(self) -> int:
        """The most that it may come to."""

    @property
    def signed_nusd(self) -> int:
        """How much of the quote is countersigned, and so in the ledger."""


@dataclass(slots=True)
class Allocator:
    """All that is taken. Only one task decides at a time, so that a slot is given once.

    ``allowance()`` is how many leases the account's attestation leaves to this node; ``flop_per_s``
    is how fast this node says that it is, or has been if that is more, 0 if nothing is known.
    ``subnet_of(peer)`` is where a peer is connected from, empty if that is not known.
    """

    own_account: bytes
    settings: Settings
    workers: Workers
    ledger_book: LedgerBook
    disk_bytes: int
    _held: dict[bytes, Claim] = field(default_factory=dict)
    _open: dict[bytes, Claim] = field(default_factory=dict)
    on_free: list[Callable[[], None]] = field(default_factory=list)
    allowance: Callable[[], int] | None = None
    flop_per_s: int = 0
    subnet_of: Callable[[str], str] | None = None
    lapses: Lapses = field(default_factory=Lapses)
    _subnets: dict[bytes, str | None] = field(default_factory=dict)
    _unpaid: deque[Unpaid] = field(default_factory=lambda: deque(maxlen=MAX_UNPAID))

    @property
    def busy(self) -> int:
        """Leases that hold capacity."""
        return len(self._held)

    def held(self) -> list[Claim]:
        """Who holds capacity."""
        return list(self._held.values())

    def take(self, claim: Claim, *, capacity: bool = True) -> None:
        """From a fill on."""
        self._open[claim.bid.id] = claim
        self._subnets[claim.bid.id] = self._subnet(claim.account, peer_id(claim.bid.signer))
        if capacity:
            self._held[claim.bid.id] = claim

    def free(self, claim: Claim) -> None:
        """The worker has ended."""
        if self._held.pop(claim.bid.id, None) is not None:
            for told in self.on_free:
                told()

    def close(self, claim: Claim) -> None:
        """The sale is over."""
        self.free(claim)
        self._open.pop(claim.bid.id, None)
        self._subnets.pop(claim.bid.id, None)

    def note_lapse(self, claim: Claim, at_ns: int) -> None:
        """A fill of which its buyer made nothing; before ``close``."""
        if claim.account != self.own_account:
            self.lapses.note(claim.account, self._subnets.get(claim.bid.id), at_ns)

    def note_speed(self, flop_per_s: int) -> None:
        """This node says on an ask that it is so fast, or has been in a lease."""
        self.flop_per_s = max(self.flop_per_s, flop_per_s)

    def note_settled(self, account: bytes) -> None:
        """A job or lease was paid for: what lapsed before, say by a cancel, is forgiven."""
        self.lapses.forgive(account)

    def note_unpaid(self, unpaid: Unpaid) -> bool:
        """Work that was begun and never countersigned; whether that counts."""
        counts = unpaid.amount_nusd > 0 and unpaid.account != self.own_account
        if counts:
            self._unpaid.append(unpaid)
        return counts

    def replace_unpaid(self, old: Unpaid, new: Unpaid) -> None:
        """Some of it was countersigned after all."""
        if old in self._unpaid:
            self._unpaid[self._unpaid.index(old)] = new

    def serves(self, account: bytes) -> bool:
        """Whether that account may buy here: an embedded node is for its own user."""
        return account == self.own_account or not self.settings.embedded

    def window_nusd(self, account: bytes) -> int | None:
        """How far a lease of that account may run ahead of what is countersigned: never by more
        than its credit, the pool included. None is no limit, for this node's own."""
        if account == self.own_account:
            return None
        credit_nusd = self.settings.credit_nusd + self.ledger_book.credit_nusd(account)
        return min(self.settings.window_nusd, credit_nusd)

    def objection(self, bid: OpenBid, now_ns: int) -> str:
        """Why this bid is not taken, whatever its job is, or nothing. Costs no time."""
        over = exceeded(self.settings.limits, bid_figures(bid.bid))
        if over is not None:
            return over.told
        subnet = self._subnet(bid.account, bid.peer)
        return self.objection_to(bid.account, bid.bid.terms, bid.bid.quote_nusd, now_ns, subnet)

    def objection_to_more(self, account: bytes, more_nusd: int, now_ns: int) -> str:
        """Why a lease of ``account`` may not come to so much more, or nothing."""
        if account == self.own_account:
            return ""
        return self._credit_objection(account, more_nusd, now_ns)

    def objection_to(
        self,
        account: bytes,
        terms: Terms,
        quote_nusd: int,
        now_ns: int,
        subnet: str | None = None,
    ) -> str:
        """Why no job on these terms is taken from ``account``, or nothing. ``subnet`` is that of a
        stranger."""
        own = account == self.own_account
        theirs = sum(claim.account == account for claim in self._open.values())
        held_bytes = sum(claim.bid.record.terms.memory_bytes for claim in self._held.values())
        moved_bytes = sum(claim.bid.record.terms.moved_bytes for claim in self._open.values())
        over_credit = "" if own else self._credit_objection(account, quote_nusd, now_ns)
        lapsed = self.lapses.objection(account, subnet, now_ns)
        reasons = (
            (not self.serves(account), SELLS_NOTHING),
            (self.workers.broken, "the provider's workers are broken"),
            (self.workers.level < SAFE_LEVEL and not own, "the sandbox here is not safe enough"),
            (
                terms.deadline_ns > now_ns + MAX_LEASE_NS,
                f"the deadline is over {MAX_LEASE_NS // (24 * 3600 * NS_PER_S)} days away",
            ),
            (len(self._held) >= self.settings.slots, BUSY_PREFIX + "every slot is taken"),
            (
                self.allowance is not None and len(self._held) >= self.allowance(),
                BUSY_PREFIX + "every slot that the account is attested for is taken",
            ),
            (
                held_bytes + terms.memory_bytes > self.settings.resolved_memory_bytes(),
                BUSY_PREFIX + "too little memory is free",
            ),
            (
                not own and moved_bytes + terms.moved_bytes > self.disk_bytes,
                BUSY_PREFIX + "too little disk is free",
            ),
            (bool(lapsed), BUSY_PREFIX + lapsed),
            (bool(over_credit), over_credit),
            (
                len(self._open) >= MAX_OPEN_SALES or theirs >= MAX_OPEN_SALES_PER_ACCOUNT,
                BUSY_PREFIX + "too many jobs wait for a countersignature",
            ),
        )
        return next((reason for holds, reason in reasons if holds), "")

    def objection_to_job(self, bid: Bid, checked: CheckedJob) -> str:
        """Why this job is not run under this bid, or nothing."""
        wrong = check_costs(bid, METER_ID, cost_lines(checked))
        if wrong is not None:
            return wrong.reason
        over = exceeded(self.settings.limits, {Limit.NODES: checked.nodes})
        if over is not None:
            return over.told
        needed_bytes, terms = memory_bytes(checked), bid.terms
        moved = moved_bytes(checked, terms.checkpoint_steps)
        reasons = (
            (bid.job != checked.job, "the bid is for another job than the one sent"),
            (bid.root_from != checked.root_from, "the bid starts from another state"),
            (not checked.starts, "the job does not say from which state it starts"),
            (bool(why := unsupported(checked)), why),
            (terms.memory_bytes < needed_bytes, f"the job needs {needed_bytes} bytes of memory"),
            (
                checkpoints(checked.job, terms.checkpoint_steps) > MAX_CHECKPOINTS,
                f"over {MAX_CHECKPOINTS} checkpoints",
            ),
            (terms.moved_bytes < moved, f"the job moves {moved} bytes"),
        )
        return next((reason for holds, reason in reasons if holds), "")

    def _subnet(self, account: bytes, peer: str) -> str | None:
        """Where a stranger is connected from; None for who is none."""
        if account == self.own_account or self.ledger_book.received_nusd(account) > 0:
            return None
        return "" if self.subnet_of is None else self.subnet_of(peer)

    def _credit_objection(self, account: bytes, quote_nusd: int, now_ns: int) -> str:
        """Why this buyer may not owe what its bid would cost, or nothing."""
        ledger, pool_nusd = self.ledger_book, self.settings.credit_nusd
        pending = self._pending(now_ns)
        uncovered = ledger.uncovered_nusd(account) + pending[account] + quote_nusd
        if uncovered <= 0:
            return ""
        pending[account] += quote_nusd
        taken_nusd = ledger.uncovered_nusd()
        for debtor, amount_nusd in pending.items():
            booked_nusd = ledger.uncovered_nusd(debtor)
            taken_nusd += max(0, booked_nusd + amount_nusd) - max(0, booked_nusd)
        if taken_nusd <= pool_nusd:
            return ""
        free_nusd = pool_nusd - (taken_nusd - uncovered)
        return credit_reason(uncovered, ledger.credit_nusd(account), pool_nusd, free_nusd)

    def _pending(self, now_ns: int) -> Counter[bytes]:
        """By account, what is not in the ledger: open sales, and what was begun unpaid."""
        while self._unpaid and self._unpaid[0].at_ns < now_ns - UNPAID_FOR_NS:
            self._unpaid.popleft()
        pending: Counter[bytes] = Counter()
        for claim in self._open.values():
            if claim.account != self.own_account:
                pending[claim.account] += claim.quote_nusd - claim.signed_nusd
        for unpaid in self._unpaid:
            pending[unpaid.account] += unpaid.amount_nusd
        return pending
