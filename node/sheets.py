"""This node's sheets and everybody's book, kept alike by gossip and by comparing books.

A new sheet is gossiped once; each node checks it and passes it on only if it changed its book. What
gossip lost is mended by comparing: on every new connection, and with one neighbour in turn every
``COMPARE_S``, the two books exchange summaries and then what each lacks::

    dialler                          listener
    Summaries...               ->
                               <-    Summaries..., Sheets(what the dialler lacks)...
    Sheets(what the other lacks)... ->
                               <-    (end)

Sheets are sent in any order, so that where one side stops listening, other ones are next the next
time. Who brings more nodes that are new here than the book takes from one peer is heard no further.

Own sheets live for an hour and are issued anew every ``REISSUE_S``, so that a node that vanished
leaves the book by itself.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Protocol

import msgspec
import trio

from p2pflop.dht.planes import Dialer, Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.book import (
    MAX_SHEETS,
    Applied,
    Book,
    Equivocation,
    Summaries,
    Summary,
)
from p2pflop.market.records import MAX_SHEET_BYTES, Ask, Rejected, Sheet
from p2pflop.market.sheets import OpenSheet, check_sheet, make_sheet
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.identity import Identity
from p2pflop.node.printable import printable
from p2pflop.units import KIB
from p2pflop.wire import MAX_ENVELOPE_OVERHEAD_BYTES, Record, decode, encode

PROTOCOL: Final = "/p2pflop/sheets/1"
TOPIC: Final = "/p2pflop/sheets/1"
REISSUE_S: Final = 900.0
EXPIRE_S: Final = 10.0
COMPARE_S: Final = 30.0
EXCHANGE_S: Final = 20.0
CLOSE_S: Final = 2.0
MAX_TOLD_OF_WITHDRAWAL: Final = 16
HONOURED_SHEETS: Final = 4
"""Superseded own sheets on which bids that were under way are still taken."""
MAX_SHEETS_A_FRAME: Final = 64
MAX_FRAMES_AN_EXCHANGE: Final = 512
MAX_REFUSED_SHEETS: Final = 1_024
"""In one exchange: checked, but the book has no place for them. More are not looked at."""
MAX_BAD_SHEETS: Final = 64
"""In one exchange; honest books differ by clocks, and a sheet may expire on its way."""
MAX_EXCHANGES: Final = 16
"""Answered at once, one of each peer: each may cost a book's worth of bytes."""
MAX_SHEET_WIRE_BYTES: Final = MAX_SHEET_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES

_log = logging.getLogger(__name__)
_Wire = Annotated[bytes, msgspec.Meta(max_length=MAX_SHEET_WIRE_BYTES)]


class Sheets(Record, frozen=True):
    """Envelopes of sheets; ``last`` ends the series."""

    MAX_BYTES = MAX_SHEETS_A_FRAME * (MAX_SHEET_WIRE_BYTES + 8) + KIB

    wires: Annotated[tuple[_Wire, ...], msgspec.Meta(max_length=MAX_SHEETS_A_FRAME)]
    last: bool


class Gossip(Dialer, Protocol):
    """What this service needs of the host."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip ``data``."""

    def peers(self) -> list[Any]:
        """Who is connected."""


class SheetService:
    """The book, the node's own sheet in it, and its conversations about sheets."""

    def __init__(
        self, identity: Identity, book: Book, host: Gossip, now_ns: Callable[[], int]
    ) -> None:
        self.book = book
        self._identity = identity
        self._host = host
        self._now_ns = now_ns
        self._asks: Callable[[int], Sequence[Ask]] | None = None
        self._addresses: tuple[str, ...] = ()
        self._gossip = True
        self._last_number = 0
        self._own: dict[int, OpenSheet] = {}
        self._answering: set[str] = set()
        self._comparing: set[str] = set()

    @property
    def selling(self) -> bool:
        """Whether the node offers anything now."""
        return self._asks is not None

    @property
    def newest(self) -> OpenSheet | None:
        """The node's own newest sheet."""
        return self._own[self._last_number] if self._own else None

    def nodes_of(self, account: bytes) -> list[bytes]:
        """The keys of nodes of that account in the book now."""
        sheets = self.book.view(self._now_ns()).sheets
        return [sheet.node for sheet in sheets if sheet.account == account]

    def honoured(self) -> dict[int, Sheet]:
        """Own sheets by number on which a bid is still taken."""
        return {number: sheet.sheet for number, sheet in self._own.items()}

    async def offer(
        self,
        asks: Callable[[int], Sequence[Ask]],
        addresses: Sequence[str],
        *,
        gossip: bool = True,
    ) -> OpenSheet:
        """Sell on these asks from now on: ``asks(until_ns)`` gives them for a new sheet.

        Without ``gossip`` they are for this node itself.
        """
        self._asks = asks
        self._gossip = gossip
        self._addresses = tuple(addresses)
        return await self.issue()

    async def withdraw(self) -> None:
        """Take every order back: an empty sheet under a higher number, told to the neighbours.

        Gossip is too slow for a node that is about to go, so books are compared as well.
        """
        if self._asks is None:
            return
        self._asks = None
        await self.issue()
        async with trio.open_nursery() as nursery:
            for peer in self._host.peers()[:MAX_TOLD_OF_WITHDRAWAL]:
                nursery.start_soon(survive, self._compare_quietly, peer.peer)

    async def issue(self) -> OpenSheet:
        """Sign a new sheet, put it into the book and gossip it."""
        now_ns = self._now_ns()
        lifetime_ns = int(4 * REISSUE_S) * 10**9
        number = max(now_ns, self._last_number + 1)
        sheet = make_sheet(
            self._identity.node,
            number=number,
            now_ns=now_ns,
            delegation=self._identity.delegation(now_ns),
            asks=() if self._asks is None else self._asks(now_ns + lifetime_ns),
            addresses=self._addresses,
            lifetime_ns=lifetime_ns,
            network=self._identity.network,
        )
        if self._asks is None:
            self._own.clear()
        self._own[number] = sheet
        self._last_number = number
        while len(self._own) > HONOURED_SHEETS:
            del self._own[min(self._own)]
        self.book.apply(sheet, now_ns)
        await self._publish(sheet.sealed.wire)
        return sheet

    def take(self, wire: bytes, source: str) -> bool:
        """Check a sheet that peer ``source`` brought and put it into the book.

        Gives whether it is worth passing on.
        """
        sheet = self._check(wire)
        if sheet is None:
            return False
        outcome = self._apply(sheet, source)
        return isinstance(outcome, Equivocation) or outcome == Applied(changed=True)

    def _check(self, wire: bytes) -> OpenSheet | None:
        sheet = check_sheet(wire, self._identity.network, self._now_ns())
        if isinstance(sheet, Rejected):
            _log.debug("sheet refused: %s", printable(sheet.reason))
            return None
        return sheet

    def _apply(self, sheet: OpenSheet, source: str) -> Applied | Equivocation | Rejected:
        outcome = self.book.apply(sheet, self._now_ns(), source)
        if isinstance(outcome, Equivocation):
            _log.warning("%s signed two sheets under one number; both are dropped", sheet.peer)
        return outcome

    async def run(self) -> None:
        """Reissue, expire and compare, until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in (self._reissue, self._expire, self._compare_in_turn):
                nursery.start_soon(keep_going, task)

    async def compare(self, peer: str) -> None:
        """Make both books whole, as the dialler. Raises ProviderError, ProtocolError."""
        with trio.move_on_after(EXCHANGE_S) as scope:
            stream = await self._host.open(peer, PROTOCOL)
            try:
                await self._send_summaries(stream)
                theirs = await _receive_summaries(stream)
                await self._receive_sheets(stream)
                await self._send_sheets(stream, theirs)
            finally:
                with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
                    await stream.aclose()
        if scope.cancelled_caught:
            raise ProviderError(f"{peer} took over {EXCHANGE_S:.0f} s to compare books")

    async def answer(self, stream: Stream) -> None:
        """The listener's side of ``compare``. Raises ProviderError, ProtocolError."""
        peer = stream.peer
        if peer in self._answering or len(self._answering) >= MAX_EXCHANGES:
            raise ProviderError("too many comparisons of books at once")
        self._answering.add(peer)
        try:
            with trio.move_on_after(EXCHANGE_S) as scope:
                theirs = await _receive_summaries(stream)
                await self._send_summaries(stream)
                await self._send_sheets(stream, theirs)
                await self._receive_sheets(stream)
        finally:
            self._answering.discard(peer)
        if scope.cancelled_caught:
            raise ProviderError(f"{peer} took over {EXCHANGE_S:.0f} s to compare books")

    async def _send_summaries(self, stream: Stream) -> None:
        for page in self.book.summaries(self._now_ns()):
            await stream.send(encode(page))

    async def _send_sheets(self, stream: Stream, theirs: Sequence[Summary]) -> None:
        now_ns = self._now_ns()
        held = {entry.node: entry for entry in theirs}
        wires = [
            sheet.sealed.wire
            for sheet in self.book.view(now_ns).sheets
            if (entry := held.get(sheet.node)) is None
            or entry.number < sheet.sheet.number
            or (entry.number == sheet.sheet.number and entry.id != sheet.sealed.id)
        ]
        secrets.SystemRandom().shuffle(wires)
        for start in range(0, len(wires), MAX_SHEETS_A_FRAME):
            batch = tuple(wires[start : start + MAX_SHEETS_A_FRAME])
            await stream.send(encode(Sheets(batch, last=False)))
        await stream.send(encode(Sheets((), last=True)))

    async def _receive_sheets(self, stream: Stream) -> None:
        bad = refused = 0
        for _ in range(MAX_FRAMES_AN_EXCHANGE):
            series = decode(Sheets, await stream.receive())
            for wire in series.wires:
                sheet = self._check(wire)
                if sheet is not None:
                    outcome = self._apply(sheet, stream.peer)
                    refused += isinstance(outcome, Rejected)
                    if refused > MAX_REFUSED_SHEETS:
                        raise ProviderError(f"{stream.peer} has more sheets than there is room for")
                elif (bad := bad + 1) > MAX_BAD_SHEETS:
                    raise ProtocolError(f"{stream.peer} sends bad sheets", peer=stream.peer)
                await trio.lowlevel.checkpoint()
            if series.last:
                return
        raise ProtocolError(f"{stream.peer} sends sheets without end", peer=stream.peer)

    async def _publish(self, wire: bytes) -> None:
        if not self._gossip:
            return
        try:
            await self._host.publish(TOPIC, wire)
        except ProviderError as error:
            _log.info("sheet not gossiped, books compared later will have it: %s", error)

    async def _reissue(self) -> None:
        while True:
            await trio.sleep(REISSUE_S)
            if self._asks is not None:
                await self.issue()

    async def _expire(self) -> None:
        while True:
            await trio.sleep(EXPIRE_S)
            self.book.expire(self._now_ns())

    async def _compare_in_turn(self) -> None:
        while True:
            await trio.sleep(COMPARE_S)
            peers = self._host.peers()
            if peers:
                await self._compare_quietly(secrets.choice(peers).peer)

    async def _compare_quietly(self, peer: str) -> None:
        if peer in self._comparing:
            return
        self._comparing.add(peer)
        try:
            await self.compare(peer)
        except (ProviderError, ProtocolError) as error:
            _log.info("books not compared with %s: %s", peer, printable(error))
        finally:
            self._comparing.discard(peer)

    async def on_connect(self, peer: str) -> None:
        """Compare books with a peer that is new here; never raises for what the peer does."""
        await self._compare_quietly(peer)


async def _receive_summaries(stream: Stream) -> list[Summary]:
    entries: list[Summary] = []
    while len(entries) <= MAX_SHEETS:
        page = decode(Summaries, await stream.receive())
        entries += page.entries
        if page.last:
            return entries
        await trio.lowlevel.checkpoint()
    raise ProtocolError(f"{stream.peer} says that it has too many sheets", peer=stream.peer)
