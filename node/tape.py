"""This node's tape: what it sold itself, what others say they sold, and who wants to hear of it.

A sale that settled is told once, by gossip; what gossip lost is pulled by whoever lacks it. What is
taken, passed on and pulled is decided in ``p2pflop.market.tape_relay``; here are the streams and
the clock. A seller tells at most one trade every ``TELL_S``, so that a burst of small jobs does not
take the gossip from others' sheets.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

import trio

from p2pflop.dht.planes import Stream
from p2pflop.errors import ProviderError
from p2pflop.market.records import Rejected
from p2pflop.market.relay import Relay
from p2pflop.market.tape import (
    HOUR_NS,
    MAX_TRADES_AN_ACCOUNT,
    OpenTrade,
    Tape,
    hour_of,
    make_trade,
)
from p2pflop.market.tape_relay import (
    COMPARE_TAPES_S,
    Pull,
    TapeRelay,
    listing_for,
    parcels_for,
    read_parcel,
)
from p2pflop.node.comparing import Comparisons, hear
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.identity import Identity
from p2pflop.node.printable import printable
from p2pflop.node.service import Json
from p2pflop.node.sheets import Gossip

PROTOCOL: Final = "/p2pflop/trades/1"
TOPIC: Final = "/p2pflop/trades/1"
TELL_S: Final = 1.0
MAX_UNTOLD: Final = MAX_TRADES_AN_ACCOUNT
"""Settled and not told yet: no tape would take more of one account in an hour."""
MAX_EXCHANGES: Final = 8
"""Answered at once, one of each peer: each may cost a tape's worth of bytes."""
MAX_LIVE_TRADES: Final = 1_024
"""The newest, for those who follow the tape and were away for a moment."""

_log = logging.getLogger(__name__)


class TapeService:
    """The tape, what this node tells for it, and its conversations about it."""

    def __init__(
        self,
        identity: Identity,
        tape: Tape,
        peers: Relay,
        host: Gossip,
        now_ns: Callable[[], int],
    ) -> None:
        self.tape = tape
        self.relay = TapeRelay(tape, peers)
        self._identity = identity
        self._host = host
        self._now_ns = now_ns
        self._untold, self._due = trio.open_memory_channel[bytes](MAX_UNTOLD)
        self.comparisons = Comparisons(
            "tapes",
            PROTOCOL,
            host,
            self.relay.gate,
            now_ns,
            dial=self._pull,
            reply=self._give,
            most=MAX_EXCHANGES,
        )
        self._live: deque[tuple[int, OpenTrade]] = deque(maxlen=MAX_LIVE_TRADES)
        # In milliseconds of the day: over restarts it rises, and nobody's "after" is of the future.
        self._seq = now_ns() // 10**6
        self._news = trio.Event()

    def settled(
        self,
        *,
        fill_id: bytes,
        class_id: bytes,
        price_nusd: int,
        flop: int,
        buyer: bytes,
        at_ns: int | None = None,
    ) -> None:
        """Tell of a sale to account ``buyer`` that has settled, now or at ``at_ns``, unless that is
        this node's own or told already."""
        if buyer == self._identity.account.public_key:
            return
        now_ns = self._now_ns()
        settled_ns = now_ns if at_ns is None else at_ns
        try:
            trade = make_trade(
                self._identity.node,
                fill_id=fill_id,
                class_id=class_id,
                price_nusd=price_nusd,
                flop=flop,
                now_ns=settled_ns,
                delegation=self._identity.delegation(settled_ns),
                network=self._identity.network,
            )
        except ValueError as error:  # of a box whose delegation is newer than the sale, or ends
            _log.info("a trade of this node is not told: %s", error)
            return
        added = self.tape.add(trade, now_ns)
        if isinstance(added, Rejected):
            _log.debug("a trade of this node is not told: %s", added.reason)
        if added is not True:
            return
        self._note([trade])
        try:
            self._untold.send_nowait(trade.sealed.wire)
        except trio.WouldBlock:
            _log.debug("a trade of this node is not told: too many wait")

    def take(self, wire: bytes, source: str) -> bool:
        """Judge a trade that peer ``source`` brought; whether it is worth passing on."""
        verdict = self.relay.take(wire, source, self._now_ns())
        if verdict.reason:
            _log.debug("trade from %s: %s", source, printable(verdict.reason))
        if verdict.trade is not None:
            self._note([verdict.trade])
        return verdict.outcome.is_passed_on

    def listed(self, since_ns: int = 0) -> list[Json]:
        """The trades from the hour of ``since_ns`` on, newest hour first."""
        trades = self.tape.trades(self._now_ns())
        return [self._tell(each) for each in trades if each.trade.hour >= hour_of(since_ns)]

    async def follow(self, after_seq: int) -> AsyncIterator[list[Json]]:
        """What came after ``after_seq``, as far as it is still live, and then what comes."""
        seen = after_seq
        while True:
            news = self._news
            found = [(seq, trade) for seq, trade in self._live if seq > seen]
            if found:
                seen = found[-1][0]
                yield [{"seq": seq, "kind": "trade", **self._tell(trade)} for seq, trade in found]
            else:
                await news.wait()

    async def run(self) -> None:
        """Tell and compare, until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in (self._publish_in_turn, self._compare_in_turn):
                nursery.start_soon(keep_going, task)

    async def _pull(self, stream: Stream) -> int:
        pull = Pull(self.relay, stream.peer)
        try:
            await stream.send(pull.outline(self._now_ns()))
            await stream.send(pull.want(await hear(stream), self._now_ns()))
            while not pull.done:
                frame, network = await hear(stream), self._identity.network
                parcel = await trio.to_thread.run_sync(read_parcel, frame, network)
                pull.receive(parcel, self._now_ns())
        finally:
            self._note(pull.new)
        return len(pull.new)

    async def _give(self, stream: Stream) -> None:
        await stream.send(listing_for(self.tape, await hear(stream), self._now_ns()))
        for frame in parcels_for(self.tape, await hear(stream), self._now_ns()):
            await stream.send(frame)

    async def _publish_in_turn(self) -> None:
        async for wire in self._due:
            try:
                await self._host.publish(TOPIC, wire)
            except ProviderError as error:
                _log.info("trade not gossiped, who compares later will have it: %s", error)
            await trio.sleep(TELL_S)

    async def _compare_in_turn(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(COMPARE_TAPES_S)
                self.tape.expire(self._now_ns())
                for peer in self.relay.peers.sample(1, self._now_ns()):
                    nursery.start_soon(survive, self.comparisons.compare_quietly, peer)

    def _note(self, trades: Iterable[OpenTrade]) -> None:
        """These are new on the tape."""
        for trade in trades:
            self._seq += 1
            self._live.append((self._seq, trade))
            news, self._news = self._news, trio.Event()
            news.set()

    def _tell(self, trade: OpenTrade) -> Json:
        record = trade.trade
        return {
            "id": trade.sealed.id.hex(),
            "provider": trade.peer,
            "account": trade.account.hex(),
            "own": trade.account == self._identity.account.public_key,
            "class_id": record.class_id.hex(),
            "price_nusd": record.price_nusd,
            "gflop": record.gflop_rounded,
            "hour_ns": record.hour * HOUR_NS,
        }
