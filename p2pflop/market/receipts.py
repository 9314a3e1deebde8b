"""Receipts: what has been delivered under a fill, and what is therefore owed.

Receipts of a fill are numbered from 1. Each covers the stretch from where the one before it ended
(the first from the job's first step and the bid's ``root_from``), and its amount is the sum for
all steps so far, so that the latest countersigned one is the whole truth. The amount follows from
the bid alone and both sides compute it::

    amount = floor(metered x delivered / total)

``total`` is the metered FLOP of the bought stretch, ``delivered`` that of the phases which were due
in the steps done; init graphs count with the first step. If the meter counts no FLOP at all,
touched bytes take its place, and if none of those, steps. ``metered`` is the quote without the
setup that the bid names, and nothing if the quote is the ask's minimum charge: a provider may be
lost, or leave, at any checkpoint, and the rest is then bought elsewhere, with another setup. One
that does the whole stretch, or that the buyer's own will stops, by the work's ``stop`` output or a
cancel, has setup and minimum charge whole::

    closing amount = max(min_charge, setup + floor((quote - setup) x delivered / total))

It is at least the amount and at most the quote, and zero before the first step. The last receipt is
for it: of a complete stretch that is exactly the quote. A buyer that cancels once it has
countersigned owes it for what it has countersigned: it signs a **closing** receipt by itself, which
covers no step. If nothing was countersigned, a cancel costs nothing.

The last receipt names the result. A buyer countersigns by putting the identical body into an
envelope of its own, once it holds and has verified what the receipt is about.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.job.spec import InitSource, Work, times_due
from p2pflop.keys import PrivateKey
from p2pflop.market.records import (
    ZERO_HASH,
    Bid,
    CostLine,
    Fill,
    Receipt,
    Rejected,
    fixed_charges,
)
from p2pflop.wire import DEFAULT_NETWORK, Sealed, reopen, seal


def amount_nusd(bid: Bid, work: Work, steps_done: int) -> int:
    """What is owed after ``steps_done`` of the job's steps. Raises ValueError outside the job."""
    setup_nusd, min_charge_nusd = fixed_charges(bid)
    metered_nusd = bid.quote_nusd - setup_nusd if bid.quote_nusd > min_charge_nusd else 0
    return _share(bid, work, steps_done, metered_nusd)


def closing_nusd(bid: Bid, work: Work, steps_done: int) -> int:
    """What is owed if the buyer's own will ends the stretch there. Raises ValueError likewise."""
    setup_nusd, min_charge_nusd = fixed_charges(bid)
    metered_nusd = _share(bid, work, steps_done, bid.quote_nusd - setup_nusd)
    return max(min_charge_nusd, setup_nusd + metered_nusd) if steps_done else 0


def begun_nusd(bid: Bid, work: Work, steps_shown: int, under_way_nusd: int | None) -> int:
    """What work counts for that the buyer breaks off: the setup from the confirm on, all steps that
    it was shown, and of the one under way ``under_way_nusd`` at most, 0 if none is and None if all
    of it counts. Raises ValueError likewise."""
    setup_nusd, _ = fixed_charges(bid)
    shown_nusd = max(setup_nusd, closing_nusd(bid, work, steps_shown))
    if under_way_nusd == 0 or steps_shown == bid.job.steps:
        return shown_nusd
    begun = max(shown_nusd, closing_nusd(bid, work, steps_shown + 1))
    return begun if under_way_nusd is None else min(begun, shown_nusd + under_way_nusd)


def _share(bid: Bid, work: Work, steps_done: int, of_nusd: int) -> int:
    if not 0 <= steps_done <= bid.job.steps:
        raise ValueError(f"{steps_done} of {bid.job.steps} steps")
    if steps_done == bid.job.steps:
        return of_nusd
    times = _times_run(bid, work, steps_done)
    measures: tuple[Callable[[CostLine], int], ...] = (
        lambda line: line.flop,
        lambda line: line.touched_bytes,
    )
    for measure in measures:
        total = sum(measure(line) * line.times for line in bid.costs)
        if total:
            by_graph = {line.graph: measure(line) for line in bid.costs}
            delivered = sum(by_graph[graph] * times.get(graph, 0) for graph in by_graph)
            return min(of_nusd, of_nusd * delivered // total)
    return of_nusd * steps_done // bid.job.steps


def delivered_flop(bid: Bid, amount_nusd: int) -> int:
    """The metered FLOP that were delivered for so much of the quote; all, if it is free."""
    flop = sum(line.flop * line.times for line in bid.costs)
    return flop * amount_nusd // bid.quote_nusd if bid.quote_nusd else flop


def make_receipt(
    key: PrivateKey,
    fill: Sealed[Fill],
    bid: Bid,
    work: Work,
    previous: Receipt | None,
    *,
    to_step: int,
    root_to: bytes,
    result: bytes = ZERO_HASH,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Receipt]:
    """The receipt after ``previous``; the last one names ``result``. Raises ValueError."""
    receipt = Receipt(
        version=1,
        fill=fill.id,
        number=1 if previous is None else previous.number + 1,
        from_step=bid.job.first_step if previous is None else previous.to_step,
        root_from=bid.root_from if previous is None else previous.root_to,
        to_step=to_step,
        root_to=root_to,
        result=result,
        amount_nusd=_due_nusd(bid, work, to_step, result),
    )
    wrong = check_rules(receipt, fill, bid, work, previous)
    if wrong is not None:
        raise ValueError(f"receipt: {wrong.reason}")
    return seal(receipt, key, network)


def check_receipt(
    data: bytes,
    fill: Sealed[Fill],
    bid: Bid,
    work: Work,
    previous: Receipt | None,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Receipt] | Rejected:
    """The buyer's check. ``previous`` is the last one accepted, countersigned or not."""
    try:
        sealed = reopen(Receipt, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    if sealed.signer != fill.signer:
        return Rejected("receipt is not by the provider")
    return check_rules(sealed.record, fill, bid, work, previous) or sealed


def check_rules(
    receipt: Receipt, fill: Sealed[Fill], bid: Bid, work: Work, previous: Receipt | None
) -> Rejected | None:
    """What must hold of a receipt, whoever signed it."""
    last_step = bid.job.first_step + bid.job.steps
    if receipt.fill != fill.id:
        return Rejected("receipt is for another fill")
    if previous is not None and previous.result != ZERO_HASH:
        return Rejected("receipt comes after the last one")
    start = (
        (1, bid.job.first_step, bid.root_from)
        if previous is None
        else (previous.number + 1, previous.to_step, previous.root_to)
    )
    if (receipt.number, receipt.from_step, receipt.root_from) != start:
        return Rejected("receipt does not continue the one before it")
    if not receipt.from_step <= receipt.to_step <= last_step:
        return Rejected("receipt covers steps outside the stretch")
    if receipt.result == ZERO_HASH:
        if receipt.to_step == receipt.from_step:
            return Rejected("receipt covers no step")
    elif receipt.to_step < last_step and work.stop is None:
        return Rejected("receipt is the last but steps are missing")
    elif receipt.to_step == receipt.from_step and receipt.root_to != receipt.root_from:
        return Rejected("receipt changes the state without a step")
    due = _due_nusd(bid, work, receipt.to_step, receipt.result)
    if receipt.amount_nusd != due:
        return Rejected(f"receipt should be for {due} nusd, not {receipt.amount_nusd}")
    return None


def countersign(
    key: PrivateKey, receipt: Sealed[Receipt], network: str = DEFAULT_NETWORK
) -> Sealed[Receipt]:
    """The buyer's own envelope around the same body: from now on the amount is owed."""
    return seal(receipt.record, key, network)


def check_countersigned(
    data: bytes, receipt: Receipt, buyer: bytes, network: str = DEFAULT_NETWORK
) -> Sealed[Receipt] | Rejected:
    """The provider's check. ``buyer`` is the node key that signed the bid."""
    try:
        sealed = reopen(Receipt, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    if sealed.signer != buyer:
        return Rejected("receipt is not countersigned by the buyer")
    if sealed.record != receipt:
        return Rejected("countersigned receipt is not the one that was sent")
    return sealed


def close(
    key: PrivateKey,
    last: Receipt,
    bid: Bid,
    work: Work,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Receipt] | None:
    """The closing receipt of a buyer that cancels; None if no more than ``last`` is owed, which is
    the one that it countersigned last."""
    closing = _closing(last, bid, work)
    return seal(closing, key, network) if closing.amount_nusd > last.amount_nusd else None


def check_closing(
    data: bytes, last: Receipt, bid: Sealed[Bid], work: Work, network: str = DEFAULT_NETWORK
) -> Sealed[Receipt] | Rejected:
    """The provider's check. ``last`` is the receipt of its own that comes before it."""
    try:
        sealed = reopen(Receipt, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    if sealed.signer != bid.signer:
        return Rejected("closing receipt is not by the buyer")
    if last.result != ZERO_HASH or sealed.record != _closing(last, bid.record, work):
        return Rejected("closing receipt is not what is owed")
    return sealed


def _closing(last: Receipt, bid: Bid, work: Work) -> Receipt:
    return replace(
        last,
        number=last.number + 1,
        from_step=last.to_step,
        root_from=last.root_to,
        amount_nusd=closing_nusd(bid, work, last.to_step - bid.job.first_step),
    )


def _due_nusd(bid: Bid, work: Work, to_step: int, result: bytes) -> int:
    steps_done = to_step - bid.job.first_step
    due = amount_nusd if result == ZERO_HASH else closing_nusd
    return due(bid, work, steps_done)


def _times_run(bid: Bid, work: Work, steps_done: int) -> dict[bytes, int]:
    times: dict[bytes, int] = {}
    for phase in work.phases:
        due = times_due(phase, bid.job.first_step, steps_done)
        times[phase.graph] = times.get(phase.graph, 0) + due
    if bid.job.first_step == 0 and steps_done > 0:
        born = {param.source.graph for param in work.params if isinstance(param.source, InitSource)}
        for graph in born:
            times[graph] = times.get(graph, 0) + 1
    return times
