"""What this node's runs wish for, and the quotes that come in answer.

A run that finds no deal, and may rest, has a wish in the node's sheet until it is filled or over;
one for each class that it may be computed in. At most ``MAX_WISHES`` are on the sheet, of the runs
that rest longest; the others rest all the same and are next. One that was filled stays for a random
part of ``WITHDRAW_WITHIN_S``: else it would go just as a trade of its class and size appears on the
tape, and tell whose that is. A wish lives in memory: after a
restart the journal brings the run back, and the run its wish, under a new commitment.

A quote is checked (``p2pflop.market.wishes``), kept until it expires, and wakes its run, which
ranks it with the asks of the book. So does a book in which a deal for a run has turned up. Who did
not keep a quote is heard no more for ``DISTRUST_NS``. To be woken costs a ranking and some rows of
the journal, and prices cost nothing to change: after ``WAKES_BURST`` times a run is woken
``WAKES_PER_S`` at most, all runs together ``ALL_WAKES_PER_S``, and what came meanwhile is ranked
with the next.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Final

import trio
from msgspec.structs import replace

from p2pflop.dht.planes import Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.ranking import Policy, Quoted, best
from p2pflop.market.rates import Rates, remember
from p2pflop.market.records import NONCE_BYTES, ZERO_HASH, Rejected, Wish
from p2pflop.market.wishes import (
    MAX_SIZE,
    NO_SUCH_WISH,
    SALT_BYTES,
    OpenQuote,
    check_quote,
    commit_to,
    commitment_of,
    make_wish,
    ticket,
)
from p2pflop.node import quote_stream
from p2pflop.node.franchise import Franchise
from p2pflop.node.guard import survive
from p2pflop.node.identity import Identity
from p2pflop.node.orders import Order
from p2pflop.node.quote_stream import Declined, Noted
from p2pflop.node.sheets import SheetService
from p2pflop.units import NS_PER_S
from p2pflop.wire import encode

MAX_WISHES: Final = 16
FIRST_NUMBER: Final = 1_000
"""Of a wish; asks of the same sheet have lower ones."""
PUBLISH_S: Final = 0.5
"""Wishes that come or go together are one sheet."""
WITHDRAW_WITHIN_S: Final = 60.0
LOOK_EVERY_S: Final = 1.0
LOOK_SHARE: Final = 5
"""Looking for deals takes a fifth of the event loop at most, whatever the book is full of."""
MIN_PAUSE_S: Final = 0.01
MAX_SEEN: Final = 64
WAKES_PER_S, WAKES_BURST = 0.1, 16
ALL_WAKES_PER_S, ALL_WAKES_BURST = 2.0, 64

MAX_STREAMS: Final = 32
MAX_STREAMS_PER_PEER: Final = 2
PEER_PER_S, PEER_BURST = 1.0, 16
ALL_PER_S, ALL_BURST = 32.0, 128
MAX_QUOTES: Final = 16
MAX_QUOTES_PER_ACCOUNT: Final = 2
MAX_SPENT: Final = 1_024
DISTRUST_NS: Final = 600 * NS_PER_S
MAX_DISTRUSTED: Final = 1_024


_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Resting:
    """A run that rests: its wishes and their salts by commitment, and its quotes by id."""

    order: Order
    classes: frozenset[bytes]
    wishes: dict[bytes, Wish] = field(default_factory=dict)
    salts: dict[bytes, bytes] = field(default_factory=dict)
    quotes: dict[bytes, OpenQuote] = field(default_factory=dict)
    has_news: bool = False
    is_called: bool = False
    seen: set[tuple[bytes, int]] = field(default_factory=set)

    def ticket(self, quote: OpenQuote) -> bytes:
        """What a bid on ``quote`` shows."""
        return ticket(self.salts[quote.sealed.record.commitment], quote.sealed)

    def drop_expired(self, now_ns: int) -> None:
        """Forget quotes that bind nobody any more."""
        live = {key: quote for key, quote in self.quotes.items() if _lives(quote, now_ns)}
        self.quotes = live


class Wishes:
    """The resting runs of one node. ``wake(run_id)`` lets one rank again, if it waits; ``random()``
    gives numbers in [0, 1), by which wishes that were filled are withdrawn."""

    def __init__(
        self,
        identity: Identity,
        sheets: SheetService,
        nursery: trio.Nursery,
        now_ns: Callable[[], int],
        wake: Callable[[str], None],
        franchise: Franchise,
        random: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._sheets = sheets
        self._nursery = nursery
        self._now_ns = now_ns
        self._wake = wake
        self._franchise = franchise
        self._random = random
        self._resting: dict[str, _Resting] = {}
        self._filled: dict[bytes, Wish] = {}
        self._next_number = FIRST_NUMBER
        self._publishing = False
        self._looking = self._has_changed = False
        self._streams: Counter[str] = Counter()
        self._peers = Rates(PEER_PER_S, PEER_BURST)
        self._all = Rates(ALL_PER_S, ALL_BURST)
        self._wakes = Rates(WAKES_PER_S, WAKES_BURST)
        self._all_wakes = Rates(ALL_WAKES_PER_S, ALL_WAKES_BURST)
        self._spent: OrderedDict[bytes, None] = OrderedDict()
        self._distrusted: OrderedDict[bytes, int] = OrderedDict()
        sheets.wish(self.on_sheet)
        sheets.on_news(self._note_news)
        franchise.on_news.append(self._note_news)

    def rest(self, run_id: str, order: Order, classes: frozenset[bytes]) -> bool:
        """Have a wish for ``order``, which may be computed in ``classes`` (none: in any); whether
        that is new."""
        known = self._resting.get(run_id)
        if known is not None and (known.order, known.classes) == (order, classes):
            return False
        made = _Resting(order, classes)
        for class_id in sorted(classes) or [ZERO_HASH]:
            self._add_wish(made, class_id)
        self._resting[run_id] = made
        self._publish_soon()
        return True

    def fill(self, run_id: str) -> None:
        """Somebody has filled the run: it wishes for no quotes, and its wish goes some time."""
        resting = self._resting.pop(run_id, None)
        if resting is not None:
            self._filled |= resting.wishes
            self._nursery.start_soon(survive, self._withdraw_later, resting.wishes)

    def withdraw(self, run_id: str) -> None:
        """The run is over."""
        if self._resting.pop(run_id, None) is not None:
            self._publish_soon()

    def on_sheet(self, until_ns: int) -> tuple[Wish, ...]:
        """The wishes for a sheet that lives until then."""
        live = chain.from_iterable(resting.wishes.values() for resting in self._resting.values())
        every = chain(live, self._filled.values())
        return tuple(
            replace(wish, valid_until_ns=min(wish.valid_until_ns, until_ns))
            for wish in islice(every, MAX_WISHES)
        )

    def quoted(self, run_id: str) -> list[Quoted]:
        """What is quoted to a run now, to be ranked with the book."""
        resting = self._resting.get(run_id)
        if resting is None:
            return []
        now_ns = self._now_ns()
        resting.drop_expired(now_ns)
        resting.has_news = False
        found = []
        for quote in resting.quotes.values():
            sheet = self._sheets.book.get(quote.sealed.signer, now_ns)
            if sheet is not None:
                found.append(Quoted(sheet, quote.ask, resting.ticket(quote)))
        return found

    def call_if_news(self, run_id: str) -> None:
        """Have the run rank again if a quote has come since ``quoted`` was asked."""
        resting = self._resting.get(run_id)
        if resting is not None and resting.has_news:
            self._call(run_id, resting)

    def spend(self, shown: bytes, *, kept: bool) -> None:
        """A bid that showed this ticket came to nothing. ``kept``: not by the provider's fault."""
        for resting in self._resting.values():
            for key, quote in list(resting.quotes.items()):
                if resting.ticket(quote) == shown:
                    del resting.quotes[key]
                    remember(self._spent, key, None, MAX_SPENT)
                    if not kept:
                        until_ns = self._now_ns() + DISTRUST_NS
                        remember(self._distrusted, quote.sheet.account, until_ns, MAX_DISTRUSTED)

    async def handle(self, stream: Stream) -> None:
        """Answer one quote. Raises ProtocolError, ProviderError for what the peer did."""
        peer, streams = stream.peer, self._streams
        if streams.total() >= MAX_STREAMS or streams[peer] >= MAX_STREAMS_PER_PEER:
            raise ProviderError("too many quotes at once")
        streams[peer] += 1
        try:
            answer = self._hear(await quote_stream.hear(stream), peer)
            with trio.move_on_after(quote_stream.QUOTE_S):
                await stream.send(encode(answer))
        finally:
            streams[peer] -= 1
            if not streams[peer]:
                del streams[peer]

    def _hear(self, word: quote_stream.Quoted, peer: str) -> Noted | Declined:
        now_ns = self._now_ns()
        now_s = now_ns / NS_PER_S
        if not self._peers.allow(peer, now_s):
            return Declined("too many quotes of yours")
        if not self._resting:
            return Declined("nothing is wished for here")
        known = self._known()
        claimed = commitment_of(word.quote)
        if claimed not in known:
            return Declined("that is not a valid quote" if claimed is None else NO_SUCH_WISH)
        if not self._all.allow("", now_s):
            return Declined(quote_stream.TOO_MANY)
        self._sheets.take(word.sheet, peer)
        found = check_quote(
            word.quote,
            buyer=self._identity.node.public_key,
            wishes=known,
            sheet_of=lambda node: self._sheets.book.get(node, now_ns),
            now_ns=now_ns,
            network=self._identity.network,
        )
        if isinstance(found, Rejected):
            return Declined(found.reason)
        if found.sheet.peer != peer:
            raise ProtocolError("a quote that another peer signed", peer=peer)
        return self._keep(found, now_ns)

    def _known(self) -> dict[bytes, Wish]:
        """Every wish by its commitment, on the sheet or not yet."""
        every = chain.from_iterable(resting.wishes.items() for resting in self._resting.values())
        return dict(every)

    def _keep(self, quote: OpenQuote, now_ns: int) -> Noted | Declined:
        key, commitment = quote.sealed.id, quote.sealed.record.commitment
        run_id, resting = next(
            (run_id, each) for run_id, each in self._resting.items() if commitment in each.wishes
        )
        resting.drop_expired(now_ns)
        if key in resting.quotes or key in self._spent:
            return Declined("the quote is known already")
        if self._distrusted.get(quote.sheet.account, 0) > now_ns:
            return Declined("a quote of yours was not kept; come back later")
        theirs = [q for q in resting.quotes.values() if q.sheet.account == quote.sheet.account]
        if len(theirs) >= MAX_QUOTES_PER_ACCOUNT:
            return Declined("quotes of yours are here already")
        if len(resting.quotes) >= MAX_QUOTES:
            worst = max(resting.quotes, key=lambda each: resting.quotes[each].total_nusd)
            if resting.quotes[worst].total_nusd <= quote.total_nusd:
                return Declined("better quotes are here already")
            del resting.quotes[worst]
        resting.quotes[key] = quote
        resting.has_news = True
        self._call(run_id, resting)
        return Noted()

    def _add_wish(self, resting: _Resting, class_id: bytes) -> None:
        order, salt = resting.order, secrets.token_bytes(SALT_BYTES)
        cost, commitment = order.checked.cost, commit_to(salt, order.checked.job)
        try:
            wish = make_wish(
                self._next_number,
                class_id,
                limit_nusd=order.max_nusd,
                flop=cost.flop,
                touched_bytes=cost.touched_bytes,
                moved_bytes=order.moved_bytes,
                memory_bytes=order.terms.memory_bytes,
                commitment=commitment,
                valid_until_ns=order.deadline_ns,
            )
        except ValueError:
            _log.info("a job over %d FLOP or bytes rests without a wish", MAX_SIZE)
            return
        self._next_number += 1
        resting.wishes[commitment], resting.salts[commitment] = wish, salt

    async def _withdraw_later(self, wishes: dict[bytes, Wish]) -> None:
        await trio.sleep(self._random() * WITHDRAW_WITHIN_S)
        for commitment in wishes:
            del self._filled[commitment]
        self._publish_soon()

    def _publish_soon(self) -> None:
        if not self._publishing:
            self._publishing = True
            self._nursery.start_soon(survive, self._publish)

    async def _publish(self) -> None:
        await trio.sleep(PUBLISH_S)
        self._publishing = False
        await self._sheets.issue()

    def _note_news(self) -> None:
        self._has_changed = True
        if self._resting and not self._looking:
            self._looking = True
            self._nursery.start_soon(survive, self._look)

    async def _look(self) -> None:
        """Wake the runs for which the book has a best deal that it did not have before."""
        try:
            while self._resting and self._has_changed:
                self._has_changed = False
                for run_id in list(self._resting):
                    began_s = time.perf_counter()
                    self._look_for(run_id)
                    took_s = time.perf_counter() - began_s
                    await trio.sleep(max(MIN_PAUSE_S, (LOOK_SHARE - 1) * took_s))
                await trio.sleep(LOOK_EVERY_S)
        finally:
            self._looking = False

    def _look_for(self, run_id: str) -> None:
        resting, now_ns = self._resting.get(run_id), self._now_ns()
        if resting is None:
            return
        view = self._sheets.view(now_ns)
        need = resting.order.need(resting.classes or frozenset(view.by_price), bytes(NONCE_BYTES))
        policy = Policy(attested_only=self._franchise.is_strict)
        deal = best(view, need, policy, now_ns, self._franchise.admitted(now_ns))
        if deal is not None and (deal.node, deal.total_nusd) not in resting.seen:
            if len(resting.seen) >= MAX_SEEN:
                resting.seen.clear()
            resting.seen.add((deal.node, deal.total_nusd))
            self._call(run_id, resting)

    def _call(self, run_id: str, resting: _Resting) -> None:
        """Wake a run as soon as it may be."""
        if not resting.is_called:
            resting.is_called = True
            self._nursery.start_soon(survive, self._wake_when_due, run_id, resting)

    async def _wake_when_due(self, run_id: str, resting: _Resting) -> None:
        while self._resting.get(run_id) is resting:
            now_s = self._now_ns() / NS_PER_S
            wait_s = max(self._wakes.wait_s(run_id, now_s), self._all_wakes.wait_s("", now_s))
            if not wait_s:
                resting.is_called = False
                self._wakes.allow(run_id, now_s)
                self._all_wakes.allow("", now_s)
                self._wake(run_id)
                return
            await trio.sleep(max(MIN_PAUSE_S, wait_s))


def _lives(quote: OpenQuote, now_ns: int) -> bool:
    return quote.ask.valid_until_ns > now_ns
