"""Wishes: bids that rest in their buyer's sheet, and the directed quotes that answer them. Pure.

A buyer whom no ask suits publishes a **wish**: class, sizes, and the most that it would pay. It
never tells the job: sizes are rounded, and the ``commitment`` is the hash of a salt and the job.
A provider's ask **crosses** a wish if it is of its class, has the memory, its quote by the public
rule is within the wish's limit, and the wish within the ask's limits. Sizes are rounded up and the
limit down, so what crosses the wish is within the budget of the job behind it, too.

The provider answers with a **quote**, for that wish alone and for up to ``MAX_QUOTE_LIFETIME_NS``.
It binds the provider's price and nothing of the buyer's: only the buyer fills. It ranks the quote
among the asks of the book and, if it is the best, bids on it as on any ask, showing a **ticket**:
the salt and the quote. The salt opens the commitment, so that a quote buys no other job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.job.spec import Job
from p2pflop.keys import PrivateKey
from p2pflop.market.limits import NO_LIMITS, AskLimits, Figures, Limit, SheetLimits, exceeded
from p2pflop.market.ranking import total_nusd
from p2pflop.market.records import ZERO_HASH, Ask, Bid, Quote, Rejected, Wish, ticket_of
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, OpenSheet
from p2pflop.units import FLOP_PER_PFLOP, NS_PER_S, is_price, round_price
from p2pflop.wire import DEFAULT_NETWORK, Envelope, Sealed, decode, encode, reopen, seal

NO_SUCH_WISH: Final = "there is no such wish, or no more"
WISH_DIGITS: Final = 3
DEPTH_DIGITS: Final = 2
SALT_BYTES: Final = 32
MAX_SIZE: Final = 9 * 10**18
"""Of a wish, in FLOP or bytes. Larger jobs rest without one."""
ANY_PRICE_NUSD: Final = 461 * 10**16
"""The limit of a wish whose job has none: ``MAX_NUSD``, rounded down."""
MAX_QUOTE_LIFETIME_NS: Final = 60 * NS_PER_S


@dataclass(frozen=True, slots=True)
class OpenQuote:
    """A quote that answers a wish of this buyer's; ``sheet`` is the newest one of its provider."""

    sealed: Sealed[Quote]
    sheet: OpenSheet
    total_nusd: int

    @property
    def ask(self) -> Ask:
        """What is offered."""
        return self.sealed.record.ask


@dataclass(frozen=True, slots=True)
class Level:
    """Wishes of one class with about the same limit: what a book shows of them.

    ``price_nusd`` is the limit in nano-dollars per PFLOP, of two significant digits, or
    ``ANY_PRICE_NUSD``; ``flop`` the sum of their sizes, ``limit_nusd`` of their limits.
    """

    class_id: bytes
    price_nusd: int
    wishes: int
    flop: int
    limit_nusd: int


def commit_to(salt: bytes, job: Job) -> bytes:
    """The commitment of a wish: the hash of ``"wish"``, 32 random bytes and the encoded job."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"salt has {len(salt)} bytes, not {SALT_BYTES}")
    return content_hash(b"wish" + salt + encode(job))


def make_wish(
    number: int,
    class_id: bytes,
    *,
    limit_nusd: int,
    flop: int,
    touched_bytes: int,
    moved_bytes: int,
    memory_bytes: int,
    commitment: bytes,
    valid_until_ns: int,
) -> Wish:
    """A wish with its sizes rounded up and its limit down. ``class_id`` ``ZERO_HASH`` is any.

    Raises ValueError if a size is over ``MAX_SIZE``.
    """
    if max(flop, touched_bytes, moved_bytes, memory_bytes) > MAX_SIZE:
        raise ValueError(f"a wish has sizes of up to {MAX_SIZE}")
    return Wish(
        number=number,
        class_id=class_id,
        limit_nusd=_round_down(limit_nusd, WISH_DIGITS),
        flop=_round_up(flop),
        touched_bytes=_round_up(touched_bytes),
        moved_bytes=_round_up(moved_bytes),
        memory_bytes=_round_up(memory_bytes),
        commitment=commitment,
        valid_until_ns=valid_until_ns,
    )


def wish_total_nusd(ask: Ask, wish: Wish) -> int:
    """What a wish of just these sizes would cost on ``ask``."""
    return total_nusd(ask, wish.flop, wish.touched_bytes, wish.moved_bytes)


def wish_figures(wish: Wish) -> Figures:
    """What the limits of asks are compared with, as far as a wish tells it."""
    return {Limit.FLOP: wish.flop, Limit.MOVED: wish.moved_bytes}


def crosses(ask: Ask, wish: Wish, limits: AskLimits = ()) -> bool:
    """Whether ``ask`` does for ``wish``: class, memory, limits, and the quote within the wish's."""
    return (
        wish.class_id in (ask.class_id, ZERO_HASH)
        and ask.memory_bytes >= wish.memory_bytes
        and wish_total_nusd(ask, wish) <= wish.limit_nusd
        and exceeded(limits, wish_figures(wish)) is None
    )


def offer_to(
    asks: Iterable[Ask],
    wish: Wish,
    max_price_nusd: int | None = None,
    limits: SheetLimits = NO_LIMITS,
) -> Ask | None:
    """The cheapest of a provider's own asks for ``wish``, or None if none crosses it.

    ``max_price_nusd`` is the price per PFLOP to which the provider goes down for wishes; None if it
    stays at its asks. ``limits`` are those of its sheet.
    """
    found: Ask | None = None
    for public in asks:
        ask = public
        if max_price_nusd is not None and max_price_nusd < public.price_nusd:
            ask = replace(public, price_nusd=round_price(max_price_nusd))
        if crosses(ask, wish, limits.get(ask.number, ())) and (
            found is None or wish_total_nusd(ask, wish) < wish_total_nusd(found, wish)
        ):
            found = ask
    return found


def make_quote(
    key: PrivateKey,
    buyer: bytes,
    wish: Wish,
    ask: Ask,
    *,
    nonce: bytes,
    now_ns: int,
    lifetime_ns: int = MAX_QUOTE_LIFETIME_NS,
    network: str = DEFAULT_NETWORK,
) -> Sealed[Quote]:
    """Offer ``ask`` for one wish of the node ``buyer``, as long as the ask and the wish last."""
    until_ns = min(now_ns + lifetime_ns, ask.valid_until_ns, wish.valid_until_ns)
    firm = replace(ask, valid_until_ns=until_ns, firm_until_ns=until_ns)
    return seal(Quote(1, buyer, wish.commitment, firm, now_ns, nonce), key, network)


def commitment_of(data: bytes) -> bytes | None:
    """The wish that a quote claims to answer; nothing is verified. None if it is no quote."""
    try:
        return decode(Quote, decode(Envelope, data).body).commitment
    except ProtocolError:
        return None


def check_quote(
    data: bytes,
    *,
    buyer: bytes,
    wishes: Mapping[bytes, Wish],
    sheet_of: Callable[[bytes], OpenSheet | None],
    now_ns: int,
    network: str = DEFAULT_NETWORK,
) -> OpenQuote | Rejected:
    """The buyer's check. ``wishes`` are its own by commitment; ``sheet_of`` looks into its book."""
    quote = _open(data, network)
    if isinstance(quote, Rejected):
        return quote
    record, ask = quote.record, quote.record.ask
    if record.buyer != buyer:
        return Rejected("quote is for another buyer")
    wish = wishes.get(record.commitment)
    if wish is None:
        return Rejected(NO_SUCH_WISH)
    wrong = _mistimed(record, now_ns)
    if wrong:
        return Rejected(wrong)
    sheet = sheet_of(quote.signer)
    if sheet is None:
        return Rejected("the book has no sheet of the quote's node")
    public = next((each for each in sheet.sheet.asks if each.number == ask.number), None)
    if public is None or public.class_id != ask.class_id:
        return Rejected("the quote is on an ask that its node's sheet does not have")
    prices = (ask.price_nusd, ask.setup_nusd, ask.min_charge_nusd, ask.byte_price_nusd)
    if not all(is_price(price) for price in prices):
        return Rejected("the quote has a price of over three significant digits")
    if not crosses(ask, wish, sheet.limits_of(ask)):
        return Rejected("the quote does not cross the wish")
    total = wish_total_nusd(ask, wish)
    if total > wish_total_nusd(public, wish):
        return Rejected("the quote is dearer than its node's own sheet")
    return OpenQuote(quote, sheet, total)


def ticket(salt: bytes, quote: Sealed[Quote]) -> bytes:
    """What a bid on ``quote`` shows: the salt of the wish, and the quote."""
    return salt + quote.wire


def check_ticket(bid: Sealed[Bid], network: str = DEFAULT_NETWORK) -> Sealed[Quote] | Rejected:
    """The quote that ``bid`` shows: its provider's, for its buyer, on its ask and for its job."""
    shown = ticket_of(bid.record)
    salt, wire = shown[:SALT_BYTES], shown[SALT_BYTES:]
    if not wire:
        return Rejected("the bid shows no quote")
    quote = _open(wire, network)
    if isinstance(quote, Rejected):
        return quote
    record = quote.record
    if quote.signer != bid.record.provider:
        return Rejected("the quote is another provider's")
    if record.buyer != bid.signer:
        return Rejected("the quote is for another buyer")
    if record.ask.number != bid.record.ask:
        return Rejected("the quote is on another ask")
    if record.commitment != commit_to(salt, bid.record.job):
        return Rejected("the quote is for another job")
    return quote


def depth(sheets: Iterable[OpenSheet], now_ns: int) -> list[Level]:
    """The live wishes of ``sheets`` by class and limit per PFLOP, highest first in each class."""
    levels: dict[tuple[bytes, int], list[Wish]] = {}
    for sheet in sheets:
        for wish in sheet.sheet.wishes:
            if wish.valid_until_ns > now_ns:
                levels.setdefault((wish.class_id, _limit_price(wish)), []).append(wish)
    return [
        Level(
            class_id,
            price,
            len(wishes),
            sum(wish.flop for wish in wishes),
            sum(wish.limit_nusd for wish in wishes),
        )
        for (class_id, price), wishes in sorted(
            levels.items(), key=lambda level: (level[0][0], -level[0][1])
        )
    ]


def _limit_price(wish: Wish) -> int:
    price_nusd = wish.limit_nusd * FLOP_PER_PFLOP // max(1, wish.flop)
    return min(ANY_PRICE_NUSD, _round_down(price_nusd, DEPTH_DIGITS))


def _mistimed(quote: Quote, now_ns: int) -> str:
    until_ns = quote.ask.valid_until_ns
    if quote.ask.firm_until_ns != until_ns:
        return "the quote is not firm until it expires"
    if quote.issued_ns > now_ns + CLOCK_TOLERANCE_NS:
        return "quote is from the future"
    if until_ns > quote.issued_ns + MAX_QUOTE_LIFETIME_NS:
        return f"a quote lives for up to {MAX_QUOTE_LIFETIME_NS // NS_PER_S} s"
    return "quote has expired" if until_ns <= now_ns else ""


def _open(data: bytes, network: str) -> Sealed[Quote] | Rejected:
    try:
        return reopen(Quote, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)


def _unit(number: int, digits: int) -> int:
    return int(10 ** max(0, len(str(number)) - digits))


def _round_down(number: int, digits: int) -> int:
    unit = _unit(number, digits)
    return number // unit * unit


def _round_up(number: int) -> int:
    unit = _unit(number, WISH_DIGITS)
    return -(-number // unit) * unit
