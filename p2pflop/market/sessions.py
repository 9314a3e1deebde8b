"""Bids for sessions, and the receipts that bill them.

A session is bought by the bid of a job that nobody knows beforehand: critical extension
``SESSION_EXT`` says so and repeats the prices of the ask. It has no cost lines; its ``quote_nusd``
is the most that the lease may bill. Its job is a stretch of as many commands as a lease may have,
of a work that is the session's own random id.

Receipts are numbered and cumulative as those of jobs are. ``from_step`` and ``to_step`` count
commands, ``root_from`` and ``root_to`` are the hash chain over them (``job.session``), and the
amount is what they add up to by the ask's prices, as in a quote, from the first command on::

    work = max(flop, flop_per_byte x touched_bytes)
           + LOWERING_FLOP_PER_NODE x lowered_nodes
           + max(1, flop_per_byte) x memory_bytes x (5 + held_seconds)
    amount = setup + ceil(price x work / 10^15) + ceil(moved_bytes x byte_price / 10^9)
    closing amount = max(min_charge, amount)

So who has graphs lowered and runs none, or has the memory stand idle, pays for that: what the bid
reserves counts as touched once a second, in the first five seconds of each lease whatever it does,
later for as long as Holds say: while the worker waits for commands, and while what it computes
counts next to nothing, see ``worked_s``.

The closing receipt, which names the chain as its result, is made out where the buyer's own will
ends the lease. A provider that leaves has what was countersigned. Neither is ever above the quote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.job.patience import LEAST_WORK_PER_S
from p2pflop.job.session import Mark
from p2pflop.job.spec import Job
from p2pflop.keys import PrivateKey
from p2pflop.market.fills import OpenBid, charges_ext, open_bid
from p2pflop.market.limits import Figures, Limit
from p2pflop.market.ranking import (
    BYTES_PER_GB,
    NOBODY,
    Accounts,
    Deal,
    Miss,
    MissReason,
    Need,
    Policy,
    rank,
    total_nusd,
)
from p2pflop.market.records import (
    SESSION_EXT,
    ZERO_HASH,
    Ask,
    Bid,
    Fill,
    Receipt,
    Rejected,
    Sheet,
    Terms,
    fixed_charges,
    session_ext,
    session_prices,
    ticket_ext,
)
from p2pflop.market.sheets import OpenSheet
from p2pflop.units import FLOP_PER_PFLOP, MAX_NUSD
from p2pflop.wire import DEFAULT_NETWORK, Sealed, reopen, seal

MAX_LEASE_COMMANDS: Final = 2**40

NOMINAL_FLOP: Final = 10**14
NOMINAL_TOUCHED_BYTES: Final = 10**12
NOMINAL_MOVED_BYTES: Final = 10**9
"""What asks are ranked by for a session, of which nobody knows what it will cost."""

LOWERING_FLOP_PER_NODE: Final = 25_000_000
"""What a node of a graph that is defined counts: lowering takes 5 ms of a core for it, in which
the core does so many FLOP for others."""
HELD_FLOP_PER_BYTE: Final = 1
"""What a reserved byte counts for each second in which the lease stands, where the ask has no price
for touched bytes."""
LEAST_FLOP_PER_S: Final = LEAST_WORK_PER_S
"""A lease whose worker does not count so many FLOP while it computes stands as well: a graph that
only copies counts none, where bytes have no price."""
MIN_LEASE_S: Final = 60
"""A session takes any lease that is no shorter: it goes on with another one after it."""
FIRST_HELD_SECONDS: Final = 5
"""What every lease is held for: a slot is not to be had for less."""


def rank_session(
    sheets: Iterable[OpenSheet],
    need: Need,
    again: Mark,
    policy: Policy,
    now_ns: int,
    attested: Accounts = NOBODY,
) -> list[Deal | Miss]:
    """Every ask for a lease of a session: deals by what a nominal session costs, then the others.

    An ask on which what has to be done ``again``, before the session can go on, costs more than the
    need's ``max_nusd`` is over the budget. Limits of asks are compared with what the need knows,
    else with that.
    """
    nominal = replace(
        need,
        flop=NOMINAL_FLOP,
        touched_bytes=NOMINAL_TOUCHED_BYTES,
        moved_bytes=NOMINAL_MOVED_BYTES,
        max_nusd=MAX_NUSD,
        known=((Limit.LEASE, MIN_LEASE_S), *mark_figures(again).items(), *need.known),
    )
    within: list[Deal | Miss] = []
    over: list[Deal | Miss] = []
    for entry in rank(sheets, nominal, policy, now_ns, attested):
        due_nusd = expected_nusd(entry.ask, need.memory_bytes, again)
        if isinstance(entry, Deal) and due_nusd > need.max_nusd:
            over.append(Miss(entry.sheet, entry.ask, MissReason.BUDGET, due_nusd, need))
        else:
            within.append(entry)
    return within + over


def mark_figures(mark: Mark) -> Figures:
    """What limits of an ask are compared with, of the commands of a lease up to ``mark``."""
    return {
        Limit.FLOP: mark.flop,
        Limit.MOVED: mark.moved_bytes,
        Limit.NODES: mark.lowered_nodes,
    }


def make_session_bid(
    key: PrivateKey,
    deal: Deal,
    *,
    session_id: bytes,
    meter_id: str,
    terms: Terms,
    quote_nusd: int,
    nonce: bytes,
    now_ns: int,
    book_digest: bytes,
    mandate_digest: bytes,
    delegation: bytes,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Bid]:
    """Sign a bid for a lease of the session ``session_id`` on ``deal``, for ``quote_nusd`` at most.

    ``nonce`` must be the one that the deal was ranked with.
    """
    ext = (*charges_ext(deal.ask), *ticket_ext(deal.ticket), *session_ext(deal.ask))
    bid = Bid(
        version=1,
        provider=deal.node,
        sheet_number=deal.sheet.sheet.number,
        ask=deal.ask.number,
        nonce=nonce,
        class_id=deal.ask.class_id,
        job=Job(session_id, 0, MAX_LEASE_COMMANDS),
        root_from=ZERO_HASH,
        meter_id=meter_id,
        costs=(),
        terms=terms,
        quote_nusd=quote_nusd,
        decided_at_ns=now_ns,
        book_digest=book_digest,
        mandate_digest=mandate_digest,
        delegation=delegation,
        ext=ext,
    )
    return seal(bid, key, network)


def check_session_bid(
    data: bytes,
    *,
    node: bytes,
    sheets: Mapping[int, Sheet],
    meter_id: str,
    now_ns: int,
    network: str = DEFAULT_NETWORK,
) -> OpenBid | Rejected:
    """The provider's check of all that a session's bid says. See ``fills.check_bid``."""
    found = open_bid(data, node=node, sheets=sheets, now_ns=now_ns, network=network)
    if isinstance(found, Rejected):
        return found
    bid = found.bid
    if session_prices(bid) is None:
        return Rejected("a bid for a job, where one for a session is due")
    reasons = (
        (
            tuple(said for said in bid.ext if said[0] == SESSION_EXT) != session_ext(found.ask),
            "the bid does not name the prices of the ask",
        ),
        (bid.meter_id != meter_id, f"meter {bid.meter_id!r} is not this node's {meter_id!r}"),
        (bool(bid.costs), "a session has no cost lines"),
        (
            (bid.job.first_step, bid.job.steps, bid.root_from)
            != (0, MAX_LEASE_COMMANDS, ZERO_HASH),
            "a session's lease begins with command 0",
        ),
        (bid.quote_nusd > MAX_NUSD, f"a quote of {bid.quote_nusd} nusd"),
        (
            full_nusd(bid, Mark(count=1)) > bid.quote_nusd,
            "the quote does not cover a lease's least",
        ),
    )
    return next((Rejected(reason) for holds, reason in reasons if holds), found)


def metered_nusd(bid: Bid, mark: Mark) -> int:
    """What the commands up to ``mark`` come to by the prices that the bid names, and setup."""
    prices = session_prices(bid)
    if prices is None:
        raise ValueError("a bid for a job")
    if not mark.count:
        return 0
    setup_nusd, _ = fixed_charges(bid)
    flop = max(mark.flop, prices.flop_per_byte * mark.touched_bytes)
    flop += _aside_flop(prices.flop_per_byte, bid.terms.memory_bytes, mark)
    compute_nusd = -(-prices.price_nusd * flop // FLOP_PER_PFLOP)
    moved_nusd = -(-prices.byte_price_nusd * mark.moved_bytes // BYTES_PER_GB)
    return setup_nusd + compute_nusd + moved_nusd


def worked_s(bid: Bid, mark: Mark) -> float:
    """How many seconds of computing and lowering what ``mark`` adds up to pays for by itself, by
    the prices that the bid names."""
    prices = session_prices(bid)
    flop_per_byte = 0 if prices is None else prices.flop_per_byte
    flop = max(mark.flop, flop_per_byte * mark.touched_bytes)
    return (flop + LOWERING_FLOP_PER_NODE * mark.lowered_nodes) / LEAST_FLOP_PER_S


def _aside_flop(flop_per_byte: int, memory_bytes: int, mark: Mark) -> int:
    """What a lease counts beside its runs."""
    seconds = FIRST_HELD_SECONDS + mark.held_seconds
    held_flop = max(HELD_FLOP_PER_BYTE, flop_per_byte) * memory_bytes * seconds
    return held_flop + LOWERING_FLOP_PER_NODE * mark.lowered_nodes


def expected_nusd(ask: Ask, memory_bytes: int, mark: Mark) -> int:
    """What a lease on ``ask`` of so much memory comes to that does what ``mark`` adds up to."""
    work = max(mark.flop, ask.flop_per_byte * mark.touched_bytes)
    work += _aside_flop(ask.flop_per_byte, memory_bytes, mark)
    return total_nusd(ask, work, 0, mark.moved_bytes)


def full_nusd(bid: Bid, mark: Mark) -> int:
    """What a lease that the buyer ends after ``mark`` comes to: not less than the minimum charge.

    A buyer sends no command with which this is over the quote.
    """
    if not mark.count:
        return 0
    _, min_charge_nusd = fixed_charges(bid)
    return max(min_charge_nusd, metered_nusd(bid, mark))


def due_receipt(
    fill: bytes, bid: Bid, previous: Receipt | None, mark: Mark, *, closing: bool
) -> Receipt:
    """The receipt after ``previous`` under the fill of that id, up to ``mark``: what both sides
    must find. ``closing`` has the minimum charge, and ends the lease."""
    amount_nusd = (full_nusd if closing else metered_nusd)(bid, mark)
    return Receipt(
        version=1,
        fill=fill,
        number=1 if previous is None else previous.number + 1,
        from_step=0 if previous is None else previous.to_step,
        root_from=bid.root_from if previous is None else previous.root_to,
        to_step=mark.count,
        root_to=mark.chain,
        result=mark.chain if closing else ZERO_HASH,
        amount_nusd=min(bid.quote_nusd, amount_nusd),
    )


def check_session_receipt(
    data: bytes,
    fill: Sealed[Fill],
    bid: Bid,
    previous: Receipt | None,
    marks: Mapping[int, Mark],
    network: str = DEFAULT_NETWORK,
) -> Sealed[Receipt] | Rejected:
    """The buyer's check. ``marks`` are those that have been obeyed, by their ``count``."""
    try:
        sealed = reopen(Receipt, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    if sealed.signer != fill.signer:
        return Rejected("receipt is not by the provider")
    if previous is not None and previous.result != ZERO_HASH:
        return Rejected("receipt comes after the last one")
    receipt = sealed.record
    mark = marks.get(receipt.to_step)
    if mark is None or (previous is not None and mark.count < previous.to_step):
        return Rejected(f"receipt is for {receipt.to_step} commands, which are not just obeyed")
    closing = receipt.result != ZERO_HASH
    due = due_receipt(fill.id, bid, previous, mark, closing=closing)
    if receipt != due:
        return Rejected(f"receipt should be {due.amount_nusd} nusd, not {receipt.amount_nusd}")
    if not closing and receipt.to_step == receipt.from_step:
        return Rejected("receipt covers no command")
    return sealed
