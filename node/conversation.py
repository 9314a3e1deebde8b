"""One job stream: messages out through a bounded outbox, messages in to a handler, heartbeats.

Nobody who has something to say waits for the peer: ``tell`` puts it into the outbox. A peer that
does not read until the outbox is full has its stream cut, as one that has gone. So has a peer, once
it has begun to speak, of which nothing comes for ``MAX_MISSED_BEATS`` heartbeats; the beats that
count are those of this node while it listens, so that a pause of its own is not the peer's. A peer
that sends faster than ``READ_RATE`` waits, so that a flood costs a bounded share of this node's
time.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from p2pflop.dht.planes import EndOfStream, Stream
from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError, first_error
from p2pflop.node.messages import Heartbeat, Message, decode_message, encode_message
from p2pflop.units import KIB

MAX_OUTBOX: Final = 256
HEARTBEAT_S: Final = 1.0
MAX_MISSED_BEATS: Final = 4
SEND_S: Final = 30.0
TOGETHER_BYTES: Final = 16 * KIB
"""What waits goes out together, until it is so much."""

LINGER_S: Final = 2.0
READ_RATE: Final = 1000.0
READ_BURST: Final = 2000.0

OnMessage = Callable[[Message], Awaitable[None]]


class Conversation:
    """A stream and its outbox. Lives while ``run`` runs.

    ``at_fault``: it ended because of what the peer sent, so that another stream would not help.
    ``fell_silent``: nothing came any more. A peer that ``speaks`` has to from the beginning.
    """

    def __init__(self, stream: Stream, *, speaks: bool = False) -> None:
        self.peer = stream.peer
        self.over = trio.Event()
        self._stream = stream
        self._outbox, self._waiting = trio.open_memory_channel[Message](MAX_OUTBOX)
        self._scope = trio.CancelScope()
        self._why = ""
        self._tokens = READ_BURST
        self._counted_at = trio.current_time()
        self._speaks = speaks
        self._listens = self._heard = False
        self.at_fault = self.fell_silent = False

    def tell(self, message: Message) -> None:
        """Send soon, in order. Does nothing once the conversation is over."""
        try:
            self._outbox.send_nowait(message)
        except trio.WouldBlock:
            self.cut(f"{self.peer} does not read what it is sent")
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            return

    def offer(self, message: Message) -> None:
        """Send if there is room: for what is outdated by what comes next."""
        if self._waits < MAX_OUTBOX // 2:
            self.tell(message)

    @property
    def _waits(self) -> int:
        return self._waiting.statistics().current_buffer_used

    def finish(self) -> None:
        """Send what waits, then end the stream."""
        self._outbox.close()

    def cut(self, why: str, *, at_fault: bool = False) -> None:
        """End at once."""
        self._end(why, at_fault)
        self._scope.cancel()

    async def run(self, on_message: OnMessage) -> str:
        """Talk until either side ends it or breaks it; why it ended, in words.

        Raises what ``on_message`` raises, if that is a P2PFlopError as it is and not in a group.
        """
        failure: P2PFlopError | None = None
        try:
            with self._scope:
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._read, on_message, nursery.cancel_scope)
                        nursery.start_soon(self._beat)
                        await self._write()  # what waits leaves before anything else is done
                except* P2PFlopError as group:
                    failure = first_error(group)
        finally:
            self._outbox.close()
            with trio.CancelScope(deadline=trio.current_time() + LINGER_S, shield=True):
                await self._stream.aclose()
            self.over.set()
        if failure is not None:
            raise failure
        return self._why or "the conversation is over"

    def _end(self, why: str, at_fault: bool = False) -> None:
        if not self._why:
            self._why, self.at_fault = why, at_fault

    async def _read(self, on_message: OnMessage, scope: trio.CancelScope) -> None:
        while (message := await self._next()) is not None:
            await self._pace()
            await on_message(message)
        scope.cancel()

    async def _next(self) -> Message | None:
        """What the peer says next; None if nothing more comes, or nothing that makes sense."""
        try:
            self._listens = True
            frame = await self._stream.receive()
            self._listens, self._heard = False, True
            return decode_message(frame, self.peer)
        except EndOfStream:
            self._end(f"{self.peer} ended the stream")
        except ProviderError as error:
            self._end(error.message)
        except ProtocolError as error:
            self._end(error.message, at_fault=True)
        return None

    async def _pace(self) -> None:
        now = trio.current_time()
        earned = (now - self._counted_at) * READ_RATE
        self._tokens = min(READ_BURST, self._tokens + earned) - 1
        self._counted_at = now
        if self._tokens < 0:
            await trio.sleep(-self._tokens / READ_RATE)

    async def _write(self) -> None:
        with trio.CancelScope() as sending, suppress(trio.EndOfChannel):
            while True:
                message = (
                    self._waiting.receive_nowait() if self._waits else await self._waiting.receive()
                )
                frames = [encode_message(message)]
                while self._waits and sum(map(len, frames)) < TOGETHER_BYTES:
                    frames.append(encode_message(self._waiting.receive_nowait()))
                sending.deadline = trio.current_time() + SEND_S
                try:
                    await self._stream.send(*frames)
                except ProviderError as error:
                    # What the peer said before it closed the stream is still to be read.
                    self._end(error.message)
                    await trio.sleep(LINGER_S)
                    self.cut(error.message)
                sending.deadline = math.inf
        if sending.cancelled_caught:
            self.cut(f"{self.peer} took nothing for {SEND_S:.0f} s")
        await self._stream.aclose()
        await trio.sleep(LINGER_S)
        self.cut(f"{self.peer} did not end the stream")

    async def _beat(self) -> None:
        missed = 0
        while missed < MAX_MISSED_BEATS:
            self._heard = False
            await trio.sleep(HEARTBEAT_S)
            self.offer(Heartbeat())
            self._speaks = self._speaks or self._heard
            missed = missed + 1 if self._speaks and self._listens and not self._heard else 0
        self.fell_silent = True
        self.cut(f"nothing came from {self.peer} for {missed * HEARTBEAT_S:.0f} s")
