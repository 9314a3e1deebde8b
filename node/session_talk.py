"""One session stream: messages both ways, each sender at the pace of its receiver, heartbeats.

``say`` waits for room, so what is under way is bounded by the stream and one message more; nobody
is cut off for being slow to read, only for taking nothing for ``STUCK_S``. A peer of which nothing
comes for ``MAX_MISSED_BEATS`` heartbeats is dead; the beats that count are those of this node while
it listens, so that a pause of its own is not the peer's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from p2pflop.dht.planes import EndOfStream, Stream
from p2pflop.dht.turns import Turn
from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError, first_error
from p2pflop.node.messages import Heartbeat
from p2pflop.node.rates import Pace
from p2pflop.node.session_messages import Assembler, SessionMessage, encode_parts

HEARTBEAT_S: Final = 1.0
MAX_MISSED_BEATS: Final = 4
STUCK_S: Final = 30.0
LINGER_S: Final = 2.0
READ_RATE: Final = 4000.0
READ_BURST: Final = 16_000.0
"""Frames a second; who sends faster waits, so that a flood costs a bounded share of the time."""

OnMessage = Callable[[SessionMessage], Awaitable[None]]


class SessionTalk:
    """A stream. ``run`` reads it until it breaks or ends, and always raises then."""

    def __init__(self, stream: Stream) -> None:
        self.peer = stream.peer
        self._stream = stream
        self._assembler = Assembler(stream.peer)
        self._sending = Turn()
        self._listens = self._heard = self._spoke = False

    async def say(self, message: SessionMessage) -> None:
        """Send, once there is room. Raises ProviderError."""
        frames = encode_parts(message)
        try:
            with trio.fail_after(STUCK_S):
                async with self._sending:
                    for frame in frames:
                        await self._stream.send(frame)
        except trio.TooSlowError as error:
            raise ProviderError(f"{self.peer} took nothing for {STUCK_S:.0f} s") from error
        self._spoke = True

    async def hear(self) -> SessionMessage:
        """The next message, heartbeats excepted. Raises ProviderError, ProtocolError."""
        while True:
            self._listens = True
            frame = await self._stream.receive()
            self._listens, self._heard = False, True
            message = self._assembler.take(frame)
            if message is not None and not isinstance(message, Heartbeat):
                return message

    async def run(self, on_message: OnMessage) -> NoReturn:
        """Hear and beat, for good. Raises ProviderError (EndOfStream at the orderly end),
        ProtocolError, and what ``on_message`` raises."""
        failure: P2PFlopError
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat)
                await self._read(on_message)
        except* P2PFlopError as group:
            failure = first_error(group)
        raise failure

    async def aclose(self) -> None:
        """Finish: what was said arrives."""
        with trio.CancelScope(deadline=trio.current_time() + LINGER_S, shield=True):
            await self._stream.aclose()

    async def part(self) -> None:
        """Finish, and wait a moment for the other end to do the same."""
        await self.aclose()
        with trio.move_on_after(LINGER_S):
            try:
                while True:
                    await self._stream.receive()
            except (EndOfStream, ProviderError, ProtocolError):
                return

    async def _read(self, on_message: OnMessage) -> NoReturn:
        pace = Pace(READ_RATE, READ_BURST, trio.current_time())
        while True:
            await on_message(await self.hear())
            rest_s = pace.spend(1, trio.current_time())
            if rest_s:
                await trio.sleep(rest_s)

    async def _beat(self) -> None:
        missed = 0
        while missed < MAX_MISSED_BEATS:
            await trio.sleep(HEARTBEAT_S)
            missed = missed + 1 if self._listens and not self._heard else 0
            spoke, self._heard, self._spoke = self._spoke, False, False
            if not spoke:
                await self.say(Heartbeat())
        raise ProviderError(f"nothing came from {self.peer} for {missed * HEARTBEAT_S:.0f} s")
