"""This node's sheets and everybody's book, kept alike by gossip and by comparing books.

A new sheet is gossiped once; each node passes it on only if it changed its book, at once or within
a second. What gossip lost is mended by comparing books: on every new connection, and with a few
neighbours in turn. What is taken, passed on and compared when is decided in
``p2pflop.market.relay``, how two books compare in ``p2pflop.market.exchange``; here are the streams
and the clock. The signatures of a long parcel are checked in a thread, a frame at a time. Those of
a gossiped sheet take 0.1 ms and are checked where it arrives, as gossip waits for the verdict;
quotas bound how often.

Own sheets live for an hour and are issued anew every ``REISSUE_S``, so that a node that vanished
leaves the book by itself.

The asks of an embedded node are **private**: on sheets of their own, which are never in the book
that others are told of. ``view`` is the book with them, by which this node decides.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_network
from typing import Any, Final, Protocol

import trio

from p2pflop.dht.planes import Dialer, Stream
from p2pflop.errors import ProviderError
from p2pflop.keys import peer_id
from p2pflop.market.book import Book
from p2pflop.market.exchange import Exchange, Message, read
from p2pflop.market.gate import Outcome
from p2pflop.market.limits import AskLimits
from p2pflop.market.records import Ask, Sheet, Wish
from p2pflop.market.relay import PASS_ON_S, Relay
from p2pflop.market.sheets import OpenSheet, make_sheet
from p2pflop.market.views import BookView, index_of
from p2pflop.node.comparing import Comparisons, hear
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.identity import Identity
from p2pflop.node.printable import printable
from p2pflop.units import KIB
from p2pflop.wire import Record

PROTOCOL: Final = "/p2pflop/sheets/2"
TOPIC: Final = "/p2pflop/sheets/1"
REISSUE_S: Final = 900.0
EXPIRE_S: Final = 10.0
MAX_TOLD_OF_WITHDRAWAL: Final = 16
HONOURED_SHEETS: Final = 8
"""Own sheets on which bids that were under way are still taken: some seconds' worth, as wishes come
and go."""
MAX_EXCHANGES: Final = 16
"""Answered at once, one of each peer: each may cost a book's worth of bytes."""
LONG_FRAME_BYTES: Final = 8 * KIB
"""From here on the thread costs less than the wait for its signatures."""

_log = logging.getLogger(__name__)


class Gossip(Dialer, Protocol):
    """What this service needs of the host."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip ``data``."""

    def peers(self) -> list[Any]:
        """Who is connected."""


class SheetService:
    """The book, the node's own sheet in it, and its conversations about sheets.

    ``addresses`` are told on the sheet.
    """

    def __init__(
        self,
        identity: Identity,
        book: Book,
        host: Gossip,
        now_ns: Callable[[], int],
        *,
        addresses: Sequence[str] = (),
    ) -> None:
        self.book = book
        self.relay = Relay(book, secrets.SystemRandom().random, identity.network)
        self._identity = identity
        self._host = host
        self._now_ns = now_ns
        self._asks: Callable[[int], Sequence[Ask]] | None = None
        self._private_asks: Callable[[int], Sequence[Ask]] | None = None
        self._offers_nothing = False
        self._limits: AskLimits = ()
        self._wishes: Callable[[int], Sequence[Wish]] = lambda _: ()
        self._on_news: list[Callable[[], None]] = []
        self._addresses = tuple(addresses)
        self._last_number = book.last_number(identity.node.public_key)
        self._own: dict[int, OpenSheet] = {}
        self._private: dict[int, OpenSheet] = {}
        self._seen: tuple[BookView, BookView] | None = None
        self.comparisons = Comparisons(
            "books",
            PROTOCOL,
            host,
            self.relay.gate,
            now_ns,
            dial=lambda stream: self._converse(stream, dialling=True),
            reply=lambda stream: self._converse(stream, dialling=False),
            most=MAX_EXCHANGES,
        )

    @property
    def selling(self) -> bool:
        """Whether the node offers anything to others now."""
        return self._asks is not None

    @property
    def newest(self) -> OpenSheet | None:
        """The newest of the node's own sheets that others are told of."""
        return self._own[max(self._own)] if self._own else None

    @property
    def newest_wire(self) -> bytes:
        """Its envelope, to be shown with a refusal; empty if there is none."""
        return b"" if self.newest is None else self.newest.sealed.wire

    def wish(self, wishes: Callable[[int], Sequence[Wish]]) -> None:
        """Take the wishes on each new sheet from ``wishes(until_ns)``."""
        self._wishes = wishes

    def on_news(self, told: Callable[[], None]) -> None:
        """Call ``told()`` whenever the book may have changed, the own sheet too."""
        self._on_news.append(told)

    def nodes_of(self, account: bytes) -> list[bytes]:
        """The keys of nodes of that account in the book now."""
        sheets = self.book.view(self._now_ns()).sheets
        return [sheet.node for sheet in sheets if sheet.account == account]

    def honoured(self) -> dict[int, Sheet]:
        """Own sheets by number on which a bid is still taken."""
        own = self._own | self._private
        return {number: sheet.sheet for number, sheet in own.items()}

    def view(self, now_ns: int) -> BookView:
        """The book as this node decides by it: with its private asks, if it has any."""
        told = self.book.view(now_ns)
        if not self._private:
            return told
        if self._seen is None or self._seen[0] is not told:
            private = self._private[max(self._private)]
            others = [sheet for sheet in told.sheets if sheet.node != private.node]
            sheets = tuple(sorted([*others, private], key=lambda sheet: sheet.node))
            self._seen = told, BookView(sheets, told.at_ns, index_of(sheets))
        return self._seen[1]

    async def offer(
        self,
        asks: Callable[[int], Sequence[Ask]],
        addresses: Sequence[str],
        *,
        limits: AskLimits = (),
        is_private: bool = False,
    ) -> OpenSheet:
        """Sell on these asks from now on: ``asks(until_ns)`` gives them for a new sheet, and
        ``limits`` are those of each.

        Private ones are for this node itself: nobody is told.
        """
        self._limits = limits
        self._addresses = tuple(addresses)
        if not is_private:
            self._asks = asks
            return await self.issue()
        self._private_asks = asks
        await self.offer_nothing()
        return self._issue_privately(asks)

    async def offer_nothing(self) -> None:
        """Sell nothing to others: take back what they were offered before a crash, as soon as this
        book or a neighbour's shows it."""
        self._offers_nothing = True
        await self._take_back()

    async def withdraw(self) -> None:
        """Take every order back: an empty sheet under a higher number, told to the neighbours.

        Gossip is too slow for a node that is about to go, so books are compared as well.
        """
        newest = self.newest
        self._asks = self._private_asks = None
        self._wishes = lambda _: ()
        self._private.clear()
        if newest is None or not _has_orders(newest):
            return
        await self.issue()
        async with trio.open_nursery() as nursery:
            for peer in self._host.peers()[:MAX_TOLD_OF_WITHDRAWAL]:
                nursery.start_soon(survive, self.comparisons.compare_quietly, peer.peer)

    async def issue(self) -> OpenSheet:
        """Sign a new sheet, put it into the book and gossip it."""
        now_ns = self._now_ns()
        sheet = self._sign(self._asks, self._wishes, now_ns)
        if self._asks is None:
            self._own.clear()
        _keep(self._own, sheet)
        self.book.apply(sheet, now_ns)
        self._tell_news()
        await self._publish(sheet.sealed.wire)
        return sheet

    def _issue_privately(self, asks: Callable[[int], Sequence[Ask]]) -> OpenSheet:
        sheet = self._sign(asks, lambda _: (), self._now_ns())
        _keep(self._private, sheet)
        self._seen = None
        self._tell_news()
        return sheet

    def _sign(
        self,
        asks: Callable[[int], Sequence[Ask]] | None,
        wishes: Callable[[int], Sequence[Wish]],
        now_ns: int,
    ) -> OpenSheet:
        lifetime_ns = int(4 * REISSUE_S) * 10**9
        offered = () if asks is None else asks(now_ns + lifetime_ns)
        self._last_number = max(now_ns, self._last_number + 1)
        return make_sheet(
            self._identity.node,
            number=self._last_number,
            now_ns=now_ns,
            delegation=self._identity.delegation(now_ns),
            asks=offered,
            wishes=wishes(now_ns + lifetime_ns),
            addresses=self._addresses,
            limits={ask.number: self._limits for ask in offered},
            lifetime_ns=lifetime_ns,
            network=self._identity.network,
        )

    def take(self, wire: bytes, source: str) -> bool:
        """Judge a sheet that peer ``source`` brought; whether it is worth passing on."""
        verdict = self.relay.take(wire, source, self._now_ns())
        if verdict.reason:
            _log.debug("sheet from %s: %s", source, printable(verdict.reason))
        if verdict.outcome is Outcome.PROOF:
            _log.warning("a node signed two sheets under one number; both are dropped")
        if verdict.outcome.is_passed_on:
            self._tell_news()
        return verdict.outcome.is_passed_on

    def learn(self, wire: bytes, node: bytes, than: int) -> bool:
        """Take the sheet that ``node`` showed with a refusal, as any that comes by gossip; whether
        the book has one of that node now whose number is above ``than``."""
        if wire:
            self.take(wire, peer_id(node))
        known = self.book.get(node, self._now_ns())
        return known is not None and known.sheet.number > than

    def met(self, peer: str, addresses: Sequence[str]) -> None:
        """A peer has connected from one of ``addresses``."""
        self.relay.connected(peer, subnet_of(addresses))

    def left(self, peer: str) -> None:
        """It is connected no more."""
        self.relay.disconnected(peer)

    async def run(self) -> None:
        """Reissue, expire, pass on and compare, until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in (self._reissue, self._expire, self._mend):
                nursery.start_soon(keep_going, task)

    async def _converse(self, stream: Stream, *, dialling: bool) -> int:
        exchange = Exchange(self.relay, stream.peer, dialling=dialling)
        try:
            for frame in exchange.start(self._now_ns()):
                await stream.send(frame)
            while not exchange.done:
                message = await self._read(exchange.expects, await hear(stream))
                for frame in exchange.receive(message, self._now_ns()):
                    await stream.send(frame)
        finally:
            if exchange.news:
                self._tell_news()
        return exchange.news

    async def _read(self, kind: type[Record], frame: bytes) -> Message:
        if len(frame) < LONG_FRAME_BYTES:
            await trio.lowlevel.checkpoint()
            return read(kind, frame, self._identity.network)
        return await trio.to_thread.run_sync(read, kind, frame, self._identity.network)

    def _tell_news(self) -> None:
        for told in self._on_news:
            told()

    async def _publish(self, wire: bytes) -> None:
        try:
            await self._host.publish(TOPIC, wire)
        except ProviderError as error:
            _log.info("sheet not gossiped, books compared later will have it: %s", error)

    async def _reissue(self) -> None:
        while True:
            await trio.sleep(REISSUE_S)
            newest = self.newest
            if newest is not None and _has_orders(newest):
                await self.issue()
            if self._private_asks is not None:
                self._issue_privately(self._private_asks)

    async def _expire(self) -> None:
        while True:
            await trio.sleep(EXPIRE_S)
            self.book.expire(self._now_ns())

    async def _take_back(self) -> None:
        known = self.book.get(self._identity.node.public_key, self._now_ns())
        if known is None or known.sheet.number in self._own or not known.sheet.asks:
            return
        _log.info("what this node offered before it was killed is taken back")
        self._last_number = max(self._last_number, known.sheet.number)
        await self.issue()

    async def _mend(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(PASS_ON_S)
                if self._offers_nothing:
                    await self._take_back()
                for wire in self.relay.to_pass_on(self._now_ns()):
                    await self._publish(wire)
                for peer in self.relay.due(self._now_ns()):
                    nursery.start_soon(survive, self.comparisons.compare_quietly, peer)


def _has_orders(sheet: OpenSheet) -> bool:
    return bool(sheet.sheet.asks or sheet.sheet.wishes)


def _keep(sheets: dict[int, OpenSheet], sheet: OpenSheet) -> None:
    sheets[sheet.sheet.number] = sheet
    while len(sheets) > HONOURED_SHEETS:
        del sheets[min(sheets)]


def subnet_of(addresses: Sequence[str]) -> str:
    """What of its addresses (multiaddrs) a peer shares a quota by: IPv4 /24, IPv6 /48."""
    for address in addresses:
        _, protocol, host, *_ = (*address.split("/"), "", "")
        if protocol in ("ip4", "ip6"):
            with suppress(ValueError):
                prefix = 24 if protocol == "ip4" else 48
                return str(ip_network(f"{host}/{prefix}", strict=False))
    return ""
