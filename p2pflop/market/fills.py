"""From a deal to a binding fill, and the records that end one: how each is made and checked.

``check_*`` return the opened record, or ``Rejected`` with a reason that may be told to the other
side. They verify signature, delegation, that the record answers the one before it and is signed by
the right party, and the clock where a time matters. Who signs what::

    buyer's node       bid, confirm, the countersigned receipt
    provider's node    fill or reject, commit, receipt
    either             abandon
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.ids import HASH_BYTES, content_hash
from p2pflop.job.lifecycle import CONFIRM_WITHIN_NS
from p2pflop.job.spec import Job
from p2pflop.keys import PrivateKey, peer_id
from p2pflop.market.limits import Figures, Limit, lease_seconds
from p2pflop.market.ranking import Deal, MissReason, sum_costs, total_nusd
from p2pflop.market.records import (
    FIXED_EXT,
    MAX_COST_LINES,
    ZERO_HASH,
    Abandon,
    Ask,
    Bid,
    Commit,
    Confirm,
    CostLine,
    Fill,
    Reject,
    Rejected,
    Sheet,
    Terms,
    checkpoint_ext,
    fixed_ext,
    session_prices,
    ticket_ext,
    ticket_of,
)
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, check_delegation
from p2pflop.market.wishes import check_ticket
from p2pflop.units import MAX_NUSD, NS_PER_S
from p2pflop.wire import DEFAULT_NETWORK, Ext, Sealed, SignedRecord, reopen, seal

MAX_BID_AGE_NS: Final = 60 * NS_PER_S
SUPERSEDED: Final = "sheet is superseded"
ASK_EXPIRED: Final = str(MissReason.EXPIRED)
SALT_BYTES: Final = 32

S = TypeVar("S", bound=SignedRecord)


@dataclass(frozen=True, slots=True)
class OpenBid:
    """A bid that is for this provider and whose quote is right. ``account`` is the buyer's.

    ``quote_id`` is that of the directed quote that it is on; empty for a bid on a sheet.
    """

    sealed: Sealed[Bid]
    account: bytes
    ask: Ask
    quote_id: bytes = b""

    @property
    def peer(self) -> str:
        """The libp2p id of the buyer's node."""
        return peer_id(self.sealed.signer)

    @property
    def bid(self) -> Bid:
        """The record."""
        return self.sealed.record


def make_bid(
    key: PrivateKey,
    deal: Deal,
    *,
    job: Job,
    meter_id: str,
    costs: Sequence[CostLine],
    terms: Terms,
    nonce: bytes,
    now_ns: int,
    book_digest: bytes,
    mandate_digest: bytes,
    delegation: bytes,
    root_from: bytes = ZERO_HASH,
    checkpoint_s: int = 0,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Bid]:
    """Sign a bid on ``deal``. ``nonce`` must be the one that the deal was ranked with.

    Raises ValueError if the deal's total is not what ``costs`` and ``terms`` amount to.
    """
    quote_nusd = quote(deal.ask, costs, terms)
    if quote_nusd != deal.total_nusd:
        raise ValueError(f"the deal was ranked at {deal.total_nusd} but costs {quote_nusd} nusd")
    bid = Bid(
        version=1,
        provider=deal.node,
        sheet_number=deal.sheet.sheet.number,
        ask=deal.ask.number,
        nonce=nonce,
        class_id=deal.ask.class_id,
        job=job,
        root_from=root_from,
        meter_id=meter_id,
        costs=tuple(costs),
        terms=terms,
        quote_nusd=quote_nusd,
        decided_at_ns=now_ns,
        book_digest=book_digest,
        mandate_digest=mandate_digest,
        delegation=delegation,
        ext=(*charges_ext(deal.ask), *checkpoint_ext(checkpoint_s), *ticket_ext(deal.ticket)),
    )
    return seal(bid, key, network)


def quote(ask: Ask, costs: Sequence[CostLine], terms: Terms) -> int:
    """What a bid with these costs and terms on ``ask`` must say, in nano-dollars."""
    flop, touched_bytes = sum_costs(costs)
    return total_nusd(ask, flop, touched_bytes, terms.moved_bytes)


def check_bid(
    data: bytes,
    *,
    node: bytes,
    sheets: Mapping[int, Sheet],
    now_ns: int,
    network: str = DEFAULT_NETWORK,
) -> OpenBid | Rejected:
    """The provider's check, before it looks at the job.

    ``node`` is the provider's own node key and ``sheets`` its own sheets that it still honours, by
    number; a bid on a quote needs none. That the costs are the job's is for ``check_costs``.
    """
    found = open_bid(data, node=node, sheets=sheets, now_ns=now_ns, network=network)
    if isinstance(found, Rejected):
        return found
    if session_prices(found.bid) is not None:
        return Rejected("a bid for a session, where one for a job is due")
    quote_nusd = quote(found.ask, found.bid.costs, found.bid.terms)
    if quote_nusd != found.bid.quote_nusd or quote_nusd > MAX_NUSD:
        return Rejected(f"the quote should be {quote_nusd} nusd, not {found.bid.quote_nusd}")
    return found


def open_bid(
    data: bytes, *, node: bytes, sheets: Mapping[int, Sheet], now_ns: int, network: str
) -> OpenBid | Rejected:
    """What must hold of any bid, whatever it is for, but that its quote is right: see
    ``check_bid``."""
    sealed = _open(Bid, data, network)
    if isinstance(sealed, Rejected):
        return sealed
    bid = sealed.record
    if bid.provider != node:
        return Rejected("bid is for another provider")
    if not now_ns - MAX_BID_AGE_NS <= bid.decided_at_ns <= now_ns + CLOCK_TOLERANCE_NS:
        return Rejected("bid was not decided just now; check both clocks")
    if bid.terms.deadline_ns <= now_ns:
        return Rejected("deadline has passed")
    account = check_delegation(
        bid.delegation, sealed.signer, bid.decided_at_ns, bid.decided_at_ns, network
    )
    if isinstance(account, Rejected):
        return account
    quote_id = b""
    if ticket_of(bid):
        quoted = check_ticket(sealed, network)
        if isinstance(quoted, Rejected):
            return quoted
        ask, quote_id = quoted.record.ask, quoted.id
    else:
        found = _on_sheet(bid, sheets.get(bid.sheet_number))
        if isinstance(found, Rejected):
            return found
        ask = found
    wrong = _unfit(bid, ask, now_ns)
    return OpenBid(sealed, account, ask, quote_id) if wrong is None else wrong


def _on_sheet(bid: Bid, sheet: Sheet | None) -> Ask | Rejected:
    if sheet is None:
        return Rejected(SUPERSEDED)
    ask = next((ask for ask in sheet.asks if ask.number == bid.ask), None)
    return Rejected("the sheet has no such ask") if ask is None else ask


def _unfit(bid: Bid, ask: Ask, now_ns: int) -> Rejected | None:
    if ask.valid_until_ns <= now_ns:
        return Rejected(ASK_EXPIRED)
    if bid.class_id != ask.class_id:
        return Rejected("the ask is for another class")
    if bid.terms.memory_bytes > ask.memory_bytes:
        return Rejected("the ask has too little memory")
    if tuple(said for said in bid.ext if said[0] == FIXED_EXT) != charges_ext(ask):
        return Rejected("the bid does not name the setup and minimum charge of the ask")
    return None


def charges_ext(ask: Ask) -> Ext:
    """What a bid on ``ask`` says of its fixed charges."""
    return fixed_ext(ask.setup_nusd, ask.min_charge_nusd)


def bid_figures(bid: Bid) -> Figures:
    """What a bid says that limits of its ask are compared with; of a session's its lease alone."""
    lease_s = lease_seconds(bid.decided_at_ns, bid.terms.deadline_ns)
    if session_prices(bid) is not None:
        return {Limit.LEASE: lease_s}
    flop, _ = sum_costs(bid.costs)
    return {Limit.LEASE: lease_s, Limit.FLOP: flop, Limit.MOVED: bid.terms.moved_bytes}


def check_costs(bid: Bid, meter_id: str, metered: Sequence[CostLine]) -> Rejected | None:
    """Whether the bid's cost lines are what the provider's own meter says of the job."""
    if bid.meter_id != meter_id:
        return Rejected(f"meter {bid.meter_id!r} is not this node's {meter_id!r}")
    if len(metered) > MAX_COST_LINES:
        return Rejected(f"the job has over {MAX_COST_LINES} cost lines")
    if tuple(metered) != bid.costs:
        return Rejected("the cost lines are not what the meter says of the job")
    return None


def make_fill(
    key: PrivateKey,
    bid: Sealed[Bid],
    *,
    now_ns: int,
    delegation: bytes,
    lease_until_ns: int | None = None,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Fill]:
    """Accept ``bid``; the lease lasts until the bid's deadline if not longer."""
    deadline_ns = bid.record.terms.deadline_ns
    until_ns = deadline_ns if lease_until_ns is None else max(deadline_ns, lease_until_ns)
    return seal(Fill(1, bid.id, now_ns + CONFIRM_WITHIN_NS, until_ns, delegation), key, network)


def make_reject(
    key: PrivateKey,
    bid_id: bytes,
    reason: str,
    sheet: bytes = b"",
    network: str = DEFAULT_NETWORK,
) -> Sealed[Reject]:
    """Refuse a bid. ``sheet`` is the envelope of the newest sheet."""
    return seal(Reject(1, bid_id, reason[:200], sheet), key, network)


def check_fill(
    data: bytes,
    bid: Sealed[Bid],
    account: bytes,
    now_ns: int,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Fill] | Rejected:
    """The buyer's check. ``account`` is whose ask it was, from the sheet."""
    fill = _open(Fill, data, network)
    if isinstance(fill, Rejected):
        return fill
    if fill.signer != bid.record.provider:
        return Rejected("fill is not by the provider")
    if fill.record.bid != bid.id:
        return Rejected("fill is for another bid")
    found = check_delegation(fill.record.delegation, fill.signer, now_ns, now_ns, network)
    if isinstance(found, Rejected):
        return found
    if found != account:
        return Rejected("fill is for another account than the ask")
    if fill.record.lease_until_ns < bid.record.terms.deadline_ns:
        return Rejected("the lease ends before the deadline")
    if fill.record.confirm_by_ns < now_ns - CLOCK_TOLERANCE_NS:
        return Rejected("fill has lapsed")
    return fill


def check_reject(
    data: bytes, bid: Sealed[Bid], network: str = DEFAULT_NETWORK
) -> Sealed[Reject] | Rejected:
    """The buyer's check that a no is the provider's, and about this bid."""
    reject = _open(Reject, data, network)
    if isinstance(reject, Rejected):
        return reject
    if reject.signer != bid.record.provider or reject.record.bid != bid.id:
        return Rejected("reject is not the provider's answer to this bid")
    return reject


def make_confirm(
    key: PrivateKey, fill: Sealed[Fill], network: str = DEFAULT_NETWORK
) -> Sealed[Confirm]:
    """Make ``fill`` binding."""
    return seal(Confirm(1, fill.id), key, network)


def check_confirm(
    data: bytes, bid: Sealed[Bid], fill: Sealed[Fill], network: str = DEFAULT_NETWORK
) -> Sealed[Confirm] | Rejected:
    """The provider's check. That it came in time is for the lifecycle."""
    confirm = _open(Confirm, data, network)
    if isinstance(confirm, Rejected):
        return confirm
    if confirm.signer != bid.signer or confirm.record.fill != fill.id:
        return Rejected("confirm is not the buyer's word on this fill")
    return confirm


def commitment(provider: bytes, salt: bytes, state_root: bytes, result: bytes) -> bytes:
    """What a commit says. All four have 32 bytes; ``provider`` is the node key."""
    parts = (provider, salt, state_root, result)
    if any(len(part) != HASH_BYTES for part in parts):
        raise ValueError("a commitment is over four values of 32 bytes")
    return content_hash(b"".join(parts))


def make_commit(
    key: PrivateKey,
    fill: Sealed[Fill],
    *,
    salt: bytes,
    state_root: bytes,
    result: bytes,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Commit]:
    """Commit to a result before showing it. ``salt`` is 32 random bytes, told with the result."""
    value = commitment(key.public_key, salt, state_root, result)
    return seal(Commit(1, fill.id, value), key, network)


def check_commit(
    data: bytes, fill: Sealed[Fill], network: str = DEFAULT_NETWORK
) -> Sealed[Commit] | Rejected:
    """The buyer's check."""
    commit = _open(Commit, data, network)
    if isinstance(commit, Rejected):
        return commit
    if commit.signer != fill.signer or commit.record.fill != fill.id:
        return Rejected("commit is not the provider's for this fill")
    return commit


def check_opening(
    commit: Sealed[Commit], salt: bytes, state_root: bytes, result: bytes
) -> Rejected | None:
    """Whether ``salt`` shows that the commit was to this root and result."""
    if len(salt) != SALT_BYTES:
        return Rejected(f"salt has {len(salt)} bytes, not {SALT_BYTES}")
    if commitment(commit.signer, salt, state_root, result) != commit.record.commitment:
        return Rejected("the result is not the one committed to")
    return None


def make_abandon(
    key: PrivateKey,
    fill: Sealed[Fill],
    *,
    from_step: int,
    root: bytes,
    reason: str,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Abandon]:
    """Give the lease up: nothing from ``from_step`` on, where the state is ``root``, is owed."""
    return seal(Abandon(1, fill.id, from_step, root, reason[:200]), key, network)


def check_abandon(
    data: bytes, bid: Sealed[Bid], fill: Sealed[Fill], network: str = DEFAULT_NETWORK
) -> Sealed[Abandon] | Rejected:
    """Either side's check."""
    abandon = _open(Abandon, data, network)
    if isinstance(abandon, Rejected):
        return abandon
    if abandon.signer not in (bid.signer, fill.signer) or abandon.record.fill != fill.id:
        return Rejected("abandon is by no party of this fill")
    job = bid.record.job
    if not job.first_step <= abandon.record.from_step <= job.first_step + job.steps:
        return Rejected("abandon names a step outside the stretch")
    return abandon


def _open(kind: type[S], data: bytes, network: str) -> Sealed[S] | Rejected:
    try:
        return reopen(kind, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
