"""Answering others' wishes: which of them this node's asks cross, and quotes to their buyers.

The node looks at the wishes of its book when the book or its own sheet has changed, when a slot
frees, and every ``LOOK_AGAIN_S``; at most once a second. It quotes only what it would fill now:
with room, sandbox and the buyer's credit as for a bid. A quote binds the price until it expires,
reserves no slot, and is filled once: which ones are, the journal tells after a restart.
``MAX_QUOTES_OUT`` quotes are out at a time, to no account more than ``MAX_QUOTES_OUT_PER_ACCOUNT``,
and not all of them to strangers, whose accounts cost nothing: those that have never paid here. A
look is at ``MAX_WISHES_A_LOOK`` wishes at most and goes on where the last one ended, so that
nobody's come first. A wish that was answered is answered again when that quote has expired, or for
less.
"""

from __future__ import annotations

import logging
import secrets
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

import trio

from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.records import NONCE_BYTES, Ask, Bid, Quote, Rejected, Terms, Wish
from p2pflop.market.sheets import OpenSheet
from p2pflop.market.wishes import check_ticket, make_quote, offer_to, wish_total_nusd
from p2pflop.node import quote_stream
from p2pflop.node.guard import survive
from p2pflop.node.payment_stream import close
from p2pflop.node.printable import printable
from p2pflop.wire import Sealed

if TYPE_CHECKING:
    from p2pflop.node.sell import Seller

LOOK_EVERY_S: Final = 1.0
LOOK_AGAIN_S: Final = 10.0
MAX_QUOTES_OUT: Final = 64
MAX_QUOTES_OUT_TO_STRANGERS: Final = 48
MAX_QUOTES_OUT_PER_ACCOUNT: Final = 8
MAX_WISHES_A_LOOK: Final = 1_024
MAX_ANSWERED: Final = 1_024
MAX_FILLED: Final = 4_096
"""Of quotes, remembered; more than can be filled before they expire."""

_log = logging.getLogger(__name__)


class Quoting:
    """The quotes of one provider."""

    def __init__(self, seller: Seller) -> None:
        self._seller = seller
        self._news = trio.Event()
        self._last = self._last_quoted = b""
        self._out: dict[bytes, tuple[bytes, int]] = {}
        self._answered: OrderedDict[tuple[bytes, bytes], tuple[int, int]] = OrderedDict()
        self._filled: OrderedDict[bytes, None] = OrderedDict()
        seller.sheets.on_news(self.look_soon)
        seller.allocator.on_free.append(self._note_room)

    def recall(self, bids: Iterable[Sealed[Bid]]) -> None:
        """What was granted before a restart: quotes on which there has been a fill."""
        for bid in bids:
            quote = check_ticket(bid, self._seller.identity.network)
            if not isinstance(quote, Rejected):
                self.fill(quote.id)

    def look_soon(self) -> None:
        """The book or the own sheet has changed."""
        self._news.set()

    def is_filled(self, quote_id: bytes) -> bool:
        """Whether there has been a fill on that quote."""
        return quote_id in self._filled

    def fill(self, quote_id: bytes) -> None:
        """A bid on that quote was granted."""
        self._out.pop(quote_id, None)
        self._filled[quote_id] = None
        if len(self._filled) > MAX_FILLED:
            self._filled.popitem(last=False)

    async def run(self) -> None:
        """Look and quote, until cancelled."""
        while True:
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._news.wait()
            self._news = trio.Event()
            self._look()
            await trio.sleep(LOOK_EVERY_S)

    def _note_room(self) -> None:
        """Who was refused for want of a slot may be quoted to again."""
        self._answered.clear()
        self._news.set()

    def _look(self) -> None:
        seller, now_ns = self._seller, self._seller.now_ns()
        self._out = {key: out for key, out in self._out.items() if out[1] > now_ns}
        newest = seller.sheets.newest
        if newest is None or not newest.sheet.asks or seller.stopping:
            return
        sheets = seller.sheets.book.view(now_ns).sheets
        start = bisect_right(sheets, self._last, key=lambda sheet: sheet.node)
        looked = 0
        for sheet in chain(islice(sheets, start, None), islice(sheets, start)):
            if sheet.node == newest.node or not sheet.sheet.wishes:
                continue
            if looked >= MAX_WISHES_A_LOOK:
                self._news.set()
                return
            for wish in sheet.sheet.wishes:
                if len(self._out) >= MAX_QUOTES_OUT:
                    return
                self._consider(wish, sheet, newest, now_ns)
            looked += len(sheet.sheet.wishes)
            self._last = sheet.node
        # All were looked at: whoever got nothing comes first when there is room again.
        self._last = self._last_quoted

    def _consider(self, wish: Wish, sheet: OpenSheet, newest: OpenSheet, now_ns: int) -> None:
        """Quote to one wish, unless something speaks against it."""
        seller, account = self._seller, sheet.account
        live = (ask for ask in newest.sheet.asks if ask.valid_until_ns > now_ns)
        offer = offer_to(live, wish, seller.settings.wish_ask_nusd, newest.limits)
        if offer is None or wish.valid_until_ns <= now_ns or not self._has_quota(account):
            return
        total_nusd = wish_total_nusd(offer, wish)
        last_nusd, until_ns = self._answered.get((sheet.node, wish.commitment), (0, 0))
        if until_ns > now_ns and last_nusd <= total_nusd:
            return
        terms = Terms(wish.memory_bytes, wish.moved_bytes, 0, wish.valid_until_ns)
        if seller.allocator.objection_to(account, terms, total_nusd, now_ns):
            return
        self._quote(wish, sheet, offer, newest, total_nusd)
        self._last_quoted = sheet.node

    def _has_quota(self, account: bytes) -> bool:
        """Whether one more quote may go out to ``account``."""
        accounts = [out[0] for out in self._out.values()]
        if accounts.count(account) >= MAX_QUOTES_OUT_PER_ACCOUNT:
            return False
        strangers = sum(map(self._is_stranger, accounts))
        return strangers < MAX_QUOTES_OUT_TO_STRANGERS or not self._is_stranger(account)

    def _is_stranger(self, account: bytes) -> bool:
        is_own = account == self._seller.identity.account.public_key
        return not is_own and self._seller.ledger_book.received_nusd(account) <= 0

    def _quote(
        self, wish: Wish, sheet: OpenSheet, offer: Ask, newest: OpenSheet, total_nusd: int
    ) -> None:
        seller = self._seller
        quote = make_quote(
            seller.identity.node,
            sheet.node,
            wish,
            offer,
            nonce=secrets.token_bytes(NONCE_BYTES),
            now_ns=seller.now_ns(),
            network=seller.identity.network,
        )
        until_ns = quote.record.ask.valid_until_ns
        self._out[quote.id] = (sheet.account, until_ns)
        self._answered[sheet.node, wish.commitment] = (total_nusd, until_ns)
        if len(self._answered) > MAX_ANSWERED:
            self._answered.popitem(last=False)
        seller.nursery.start_soon(survive, self._send, sheet.node, sheet.peer, quote, newest)

    async def _send(self, node: bytes, peer: str, quote: Sealed[Quote], newest: OpenSheet) -> None:
        word = quote_stream.Quoted(quote.wire, newest.sealed.wire)
        with trio.move_on_after(quote_stream.QUOTE_S):
            try:
                stream = await self._seller.dialer.open(peer, quote_stream.PROTOCOL)
                try:
                    answer = await quote_stream.tell(stream, word)
                finally:
                    await close(stream)
            except (ProviderError, ProtocolError) as error:
                _log.info("%s did not hear a quote: %s", peer, printable(error))
                return
            if isinstance(answer, quote_stream.Declined):
                if answer.reason == quote_stream.TOO_MANY:
                    self._answered.pop((node, quote.record.commitment), None)
                _log.info("%s declined a quote: %s", peer, printable(answer.reason))
