"""Conversations in which two nodes compare what they hold of one kind: sheets, or trades.

One stream a comparison. Here is what bounds them: how long one and each silence in it may take, how
many are answered at once, one of each peer, and that no two go to the same peer at once. A peer
that says what is wrong is at fault. What is said is up to ``dial`` and ``reply``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from p2pflop.dht.planes import Dialer, Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.gate import Gate
from p2pflop.node.printable import printable

EXCHANGE_S: Final = 20.0
SILENCE_S: Final = 4.0
"""Longer than a book's signatures take: a stalled stream must not hold up the next comparison."""
CLOSE_S: Final = 2.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Comparisons:
    """The comparisons of ``what`` ("books"), begun here or by neighbours, over ``protocol``.

    ``dial(stream)`` is the dialler's side and says how much was new, ``reply(stream)`` the
    listener's, of which ``most`` are had at once. ``gate`` says who may begin one.
    """

    def __init__(
        self,
        what: str,
        protocol: str,
        host: Dialer,
        gate: Gate,
        now_ns: Callable[[], int],
        *,
        dial: Callable[[Stream], Awaitable[int]],
        reply: Callable[[Stream], Awaitable[object]],
        most: int,
    ) -> None:
        self._what = what
        self._protocol = protocol
        self._host = host
        self._gate = gate
        self._now_ns = now_ns
        self._dial = dial
        self._reply = reply
        self._most = most
        self._answering: set[str] = set()
        self._comparing: set[str] = set()

    async def compare(self, peer: str) -> int:
        """One comparison, as the dialler; how much was new here.

        Raises ProviderError, ProtocolError.
        """
        with trio.move_on_after(EXCHANGE_S):
            stream = await self._host.open(peer, self._protocol)
            try:
                return await self._judged(self._dial, stream)
            finally:
                with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
                    await stream.aclose()
        raise self._too_slow(peer)

    async def answer(self, stream: Stream) -> None:
        """The listener's side. Raises ProviderError, ProtocolError."""
        peer = stream.peer
        is_busy = peer in self._answering or len(self._answering) >= self._most
        if is_busy or not self._gate.may_compare(peer, self._now_ns()):
            raise ProviderError(f"too many comparisons of {self._what}")
        self._answering.add(peer)
        try:
            with trio.move_on_after(EXCHANGE_S):
                await self._judged(self._reply, stream)
                return
        finally:
            self._answering.discard(peer)
        raise self._too_slow(peer)

    async def compare_quietly(self, peer: str) -> None:
        """``compare``, unless that is under way; never raises for what the peer does."""
        if peer in self._comparing or self._gate.peers.is_shunned(peer, self._now_ns()):
            return
        self._comparing.add(peer)
        try:
            await self.compare(peer)
        except (ProviderError, ProtocolError) as error:
            _log.info("%s not compared with %s: %s", self._what, peer, printable(error))
        finally:
            self._comparing.discard(peer)

    async def _judged(self, converse: Callable[[Stream], Awaitable[T]], stream: Stream) -> T:
        try:
            return await converse(stream)
        except ProtocolError:
            self._gate.peers.fault(stream.peer, self._now_ns())
            raise

    def _too_slow(self, peer: str) -> ProviderError:
        return ProviderError(f"{peer} took over {EXCHANGE_S:.0f} s to compare {self._what}")


async def hear(stream: Stream) -> bytes:
    """The next frame. Raises ProviderError if none comes in ``SILENCE_S``."""
    with trio.move_on_after(SILENCE_S):
        return await stream.receive()
    raise ProviderError(f"{stream.peer} said nothing for {SILENCE_S:.0f} s while comparing")
