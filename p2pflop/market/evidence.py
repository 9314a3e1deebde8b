"""Evidence of a decision: all that is needed to see again that the best deal was taken.

A buyer keeps, of each look at the book, the sheets that it had, its mandate and its bids with what
came of them. ``replay`` ranks those sheets anew by the public rule and compares: bids commit to the
book and the mandate by their digests, sheets and bids are signed, so that neither can be made up
afterwards. A bid is right if every better deal was asked before and did not fill. A directed quote
is no part of the book: the bid on it shows it, and it has to be better than all that the book had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.job.session import Mark
from p2pflop.market.fills import SUPERSEDED
from p2pflop.market.limits import MAX_ASK_LIMITS, Known, Limit
from p2pflop.market.mandate import Mandate
from p2pflop.market.ranking import (
    MAX_POLICY_ACCOUNTS,
    Accounts,
    Deal,
    Miss,
    Need,
    Quoted,
    rank,
    sum_costs,
)
from p2pflop.market.records import (
    MAX_COST_LINES,
    MAX_SHEET_BYTES,
    Ask,
    Bid,
    CostLine,
    Fill,
    Nonce,
    Reject,
    Rejected,
    Terms,
    session_ext,
    session_prices,
    ticket_of,
)
from p2pflop.market.sessions import rank_session
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, OpenSheet, open_sheet
from p2pflop.market.views import BookView
from p2pflop.market.wishes import check_ticket
from p2pflop.wire import U32, U63, Key, Record, Sealed, Text, open_sealed

MAX_SHEETS: Final = 256
"""Kept of one look; of a larger book the best."""
MAX_ATTEMPTS: Final = 256
MAX_LOOKS: Final = 64
MAX_RECORD_BYTES: Final = 64 * 1024
_SAID_BY_A_BID: Final = (Limit.LEASE, Limit.FLOP, Limit.MOVED)
"""Limits whose figures follow from the bid for a job."""

Envelope = Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
SheetEnvelope = Annotated[bytes, msgspec.Meta(max_length=MAX_SHEET_BYTES + 512)]


class Attempt(Record, frozen=True):
    """One bid, and what came of it: a fill, or a reject, or neither and a reason in words."""

    bid: Envelope
    fill: Envelope
    reject: Envelope
    reason: Text


class Wanted(Record, frozen=True):
    """What was to be bought, where no bid says it."""

    nonce: Nonce
    costs: Annotated[tuple[CostLine, ...], msgspec.Meta(max_length=MAX_COST_LINES)]
    terms: Terms


class Again(Record, frozen=True):
    """What a session has to do again on its next lease, before it can go on (``session.Mark``)."""

    nonce: Nonce
    flop: U63
    touched_bytes: U63
    moved_bytes: U63
    lowered_nodes: U63
    held_seconds: U63
    terms: Terms


class Avoided(Record, frozen=True):
    """An account that the policy excludes until then, because it failed so often in a row."""

    account: Key
    failures: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    until_ns: U63


class Look(Record, frozen=True):
    """One look at the book, by a mandate. ``whole``: nothing was left out.

    ``continues``: who was asked after the look before is not asked again, unless it showed a newer
    sheet with its refusal. ``attested``: the accounts among these that the buyer held to be so, if
    its policy is to deal with no others. ``wanted``: of a look that led to no bid, nothing or one.
    ``avoided`` is the buyer's own word. ``session``: of a look for a lease of a session, what has
    to be done again first, for the budget at most; asks are ranked by ``sessions.rank_session``.
    ``known``: what their limits were compared with beside what a bid says, by the limit's id, if
    any has one. It is the buyer's own word, too, and counts for nothing where a job's bid says it.
    """

    at_ns: U63
    continues: bool
    mandate: Mandate
    whole: bool
    sheets: Annotated[tuple[SheetEnvelope, ...], msgspec.Meta(max_length=MAX_SHEETS)]
    attested: Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_SHEETS)]
    attempts: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=MAX_ATTEMPTS)]
    wanted: Annotated[tuple[Wanted, ...], msgspec.Meta(max_length=1)] = ()
    avoided: Annotated[tuple[Avoided, ...], msgspec.Meta(max_length=MAX_POLICY_ACCOUNTS)] = ()
    session: Annotated[tuple[Again, ...], msgspec.Meta(max_length=1)] = ()
    known: Annotated[tuple[tuple[U32, U63], ...], msgspec.Meta(max_length=MAX_ASK_LIMITS)] = ()


class Evidence(Record, frozen=True):
    """Every look of one run, oldest first."""

    MAX_BYTES: ClassVar[int] = 64 * 1024 * 1024

    version: Literal[2]
    network: Text
    looks: Annotated[tuple[Look, ...], msgspec.Meta(max_length=MAX_LOOKS)]


class Verdict(StrEnum):
    """What a replay says of a bid."""

    BEST = "the best deal"
    NEXT = "the best deal of those not asked before"
    UNPROVEN = "the best of the sheets that were kept; the book was larger"
    WORSE = "a better deal was not asked"
    UNKNOWN_ASK = "the ask was not in the book"
    OTHER_BOOK = "the bid commits to another book"
    OTHER_MANDATE = "the bid commits to another policy, budget or classes"
    OTHER_QUOTE = "the quote is not what the ask says"
    OTHER_TIME = "the look at the book is not of the time of the bid"
    FORGED = "a record is not signed as it should be"

    @property
    def is_right(self) -> bool:
        """Whether the rule was kept, as far as can be seen."""
        return self in (Verdict.BEST, Verdict.NEXT, Verdict.UNPROVEN)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A bid and the verdict. ``place`` is that of its ask among the deals, from 0; -1: none.

    ``is_bait``: its provider no longer stood by an ask that was firm, which sheet and reject prove.
    """

    bid: Bid | None
    verdict: Verdict
    place: int
    filled: bool
    reason: str
    is_bait: bool = False


@dataclass(frozen=True, slots=True)
class Replay:
    """A look, ranked again for the first bid in it, or for what was wanted where none was made.

    ``avoided`` tells of accounts that its policy excludes.
    """

    ranked: list[Deal | Miss]
    bids: list[Replayed]
    avoided: dict[bytes, Avoided]

    @property
    def is_right(self) -> bool:
        """Whether each bid was."""
        return all(replayed.verdict.is_right for replayed in self.bids)


def replay(evidence: Evidence) -> list[Replay]:
    """Rank the sheets of each look again and judge its bids, one after the other."""
    tried: set[bytes] = set()
    replays = []
    for look in evidence.looks:
        if not look.continues:
            tried.clear()
        replays.append(_replay_look(look, evidence.network, tried))
    return replays


def _replay_look(look: Look, network: str, tried: set[bytes]) -> Replay:
    try:
        sheets = [_open_sheet(wire, network) for wire in look.sheets]
    except (ProtocolError, VerificationError):
        forged = [Replayed(None, Verdict.FORGED, -1, False, a.reason) for a in look.attempts]
        return Replay([], forged, {})
    view = BookView(tuple(sorted(sheets, key=lambda sheet: sheet.node)), look.at_ns)
    attested = frozenset(look.attested)
    opened = [_open_attempt(attempt, network) for attempt in look.attempts]
    quoted = _quoted(view, [bid for bid in opened if bid is not None], network)
    first: list[Deal | Miss] = []
    unbid: list[Wanted | Again] = [*look.wanted, *look.session]
    for wanted in unbid:
        first = _rank(look, view, wanted, attested)
    bids: list[Replayed] = []
    for number, (attempt, bid) in enumerate(zip(look.attempts, opened, strict=True)):
        if bid is None:
            bids.append(Replayed(None, Verdict.FORGED, -1, False, attempt.reason))
            continue
        ranked = _rank(look, view, bid.record, attested, quoted)
        first = ranked if number == 0 else first
        deals = [entry for entry in ranked if isinstance(entry, Deal)]
        verdict, place = _judge(look, view, bid.record, deals, tried, is_first=number == 0)
        is_bait = place >= 0 and _is_bait(attempt, deals[place].ask, bid.record, network)
        filled = bool(attempt.fill)
        bids.append(Replayed(bid.record, verdict, place, filled, attempt.reason, is_bait))
        tried.add(bid.record.provider)
    return Replay(first, bids, {each.account: each for each in look.avoided})


def _open_sheet(wire: bytes, network: str) -> OpenSheet:
    checked = open_sheet(wire, network)
    if isinstance(checked, Rejected):
        raise VerificationError(checked.reason)
    return checked


def _open_attempt(attempt: Attempt, network: str) -> Sealed[Bid] | None:
    """The bid of an attempt, or None if a record in it is not signed as it should be."""
    try:
        bid = open_sealed(Bid, attempt.bid, network)
        _check_answers(attempt, bid, network)
    except (ProtocolError, VerificationError):
        return None
    is_forged = ticket_of(bid.record) and isinstance(check_ticket(bid, network), Rejected)
    return None if is_forged else bid


def _quoted(view: BookView, bids: Sequence[Sealed[Bid]], network: str) -> list[Quoted]:
    """The quotes that these bids show, once each, of nodes whose sheet was in the book."""
    sheets = {sheet.node: sheet for sheet in view.sheets}
    found = {}
    for bid in bids:
        quote = check_ticket(bid, network)
        if isinstance(quote, Sealed) and quote.signer in sheets:
            ticket = ticket_of(bid.record)
            found[ticket] = Quoted(sheets[quote.signer], quote.record.ask, ticket)
    return list(found.values())


def _check_answers(attempt: Attempt, bid: Sealed[Bid], network: str) -> None:
    """Raises VerificationError unless fill and reject are the provider's own about this bid."""
    answers: list[Sealed[Fill] | Sealed[Reject]] = []
    if attempt.fill:
        answers.append(open_sealed(Fill, attempt.fill, network))
    if attempt.reject:
        answers.append(open_sealed(Reject, attempt.reject, network))
    for answer in answers:
        if answer.signer != bid.record.provider or answer.record.bid != bid.id:
            raise VerificationError("an answer to another bid")


def _is_bait(attempt: Attempt, ask: Ask, bid: Bid, network: str) -> bool:
    """Whether ``ask`` was refused because it is on offer no more, though it was firm."""
    if not attempt.reject or ask.firm_until_ns <= bid.decided_at_ns:
        return False
    return open_sealed(Reject, attempt.reject, network).record.reason == SUPERSEDED


def _rank(
    look: Look,
    view: BookView,
    bid: Bid | Wanted | Again,
    attested: Accounts,
    quoted: Sequence[Quoted] = (),
) -> list[Deal | Miss]:
    """The book for what ``bid`` says, and a session's for what it has to do again."""
    for again in look.session:
        mark = Mark(
            count=1,
            flop=again.flop,
            touched_bytes=again.touched_bytes,
            moved_bytes=again.moved_bytes,
            lowered_nodes=again.lowered_nodes,
            held_seconds=again.held_seconds,
        )
        need = _need(look, view, bid, (mark.flop, mark.touched_bytes))
        return rank_session(view.sheets, need, mark, look.mandate.policy, look.at_ns, attested)
    costs = () if isinstance(bid, Again) else bid.costs
    need = _need(look, view, bid, sum_costs(costs))
    return rank(view.sheets, need, look.mandate.policy, look.at_ns, attested, quoted)


def _need(look: Look, view: BookView, bid: Bid | Wanted | Again, work: tuple[int, int]) -> Need:
    """``work`` is in FLOP and touched bytes."""
    known = look.known if look.session else _beside(look.known)
    every = {ask.class_id for sheet in view.sheets for ask in sheet.sheet.asks}
    return Need(
        class_ids=frozenset(look.mandate.class_ids or every),
        flop=work[0],
        touched_bytes=work[1],
        moved_bytes=bid.terms.moved_bytes,
        memory_bytes=bid.terms.memory_bytes,
        deadline_ns=bid.terms.deadline_ns,
        max_nusd=look.mandate.max_nusd,
        nonce=bid.nonce,
        known=known,
    )


def _beside(known: Known) -> Known:
    """What of the buyer's own word about limits does not follow from the bid of a job."""
    return tuple(each for each in known if each[0] not in _SAID_BY_A_BID)


def _is_quoted(look: Look, deal: Deal, bid: Bid) -> bool:
    """Whether the quote is what the ask says; a session's is a part of what is left for it."""
    if session_prices(bid) is None or not look.session:
        return deal.total_nusd == bid.quote_nusd
    return bid.quote_nusd <= look.mandate.max_nusd and set(session_ext(deal.ask)) <= set(bid.ext)


def _judge(
    look: Look,
    view: BookView,
    bid: Bid,
    deals: Sequence[Deal],
    tried: set[bytes],
    *,
    is_first: bool,
) -> tuple[Verdict, int]:
    """The verdict on a bid, the first one of its look or not, and the place of its ask."""
    found = [
        place
        for place, deal in enumerate(deals)
        if (deal.node, deal.sheet.sheet.number, deal.ask.number, deal.ticket)
        == (bid.provider, bid.sheet_number, bid.ask, ticket_of(bid))
    ]
    place = found[0] if found else -1
    # By a later clock a better ask would look as if it had expired; by an earlier one, as if the
    # job's lease were over its limit. What is bid later in a look follows from answers.
    waited_ns = bid.decided_at_ns - look.at_ns
    is_at_once = is_first and not look.session
    if waited_ns < -CLOCK_TOLERANCE_NS or (is_at_once and waited_ns > CLOCK_TOLERANCE_NS):
        return Verdict.OTHER_TIME, place
    if look.whole and bid.book_digest != view.digest:
        return Verdict.OTHER_BOOK, place
    if bid.mandate_digest != look.mandate.digest():
        return Verdict.OTHER_MANDATE, place
    if not found:
        return Verdict.UNKNOWN_ASK, place
    if not _is_quoted(look, deals[place], bid):
        return Verdict.OTHER_QUOTE, place
    untried = [deal for deal in deals[:place] if deal.node not in tried]
    if untried:
        return Verdict.WORSE, place
    if not look.whole:
        return Verdict.UNPROVEN, place
    return (Verdict.NEXT if place else Verdict.BEST), place
