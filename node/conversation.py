"""One job stream: messages out through a bounded outbox, messages in to a handler, heartbeats.

Nobody who has something to say waits for the peer: ``tell`` puts it into the outbox. A peer that
does not read until the outbox is full has its stream cut, as one that has gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from p2pflop.dht.planes import EndOfStream, Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.node.messages import Heartbeat, Message, decode_message, encode_message

MAX_OUTBOX: Final = 256
HEARTBEAT_S: Final = 5.0
SEND_S: Final = 30.0
LINGER_S: Final = 2.0

OnMessage = Callable[[Message], Awaitable[None]]


class Conversation:
    """A stream and its outbox. Lives while ``run`` runs."""

    def __init__(self, stream: Stream) -> None:
        self.peer = stream.peer
        self.over = trio.Event()
        self._stream = stream
        self._outbox, self._waiting = trio.open_memory_channel[Message](MAX_OUTBOX)
        self._scope = trio.CancelScope()
        self._why = ""

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
        if self._waiting.statistics().current_buffer_used < MAX_OUTBOX // 2:
            self.tell(message)

    def finish(self) -> None:
        """Send what waits, then end the stream."""
        self._outbox.close()

    def cut(self, why: str) -> None:
        """End at once."""
        self._why = self._why or why
        self._scope.cancel()

    async def run(self, on_message: OnMessage) -> str:
        """Talk until either side ends it or breaks it; why it ended, in words."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._beat)
                await self._read(on_message)
                nursery.cancel_scope.cancel()
        with trio.CancelScope(deadline=trio.current_time() + LINGER_S, shield=True):
            await self._stream.aclose()
        self.over.set()
        return self._why or "the conversation is over"

    async def _read(self, on_message: OnMessage) -> None:
        while True:
            try:
                frame = await self._stream.receive()
                message = decode_message(frame, self.peer)
            except EndOfStream:
                self._why = self._why or f"{self.peer} ended the stream"
                return
            except (ProviderError, ProtocolError) as error:
                self._why = self._why or error.message
                return
            await on_message(message)

    async def _write(self) -> None:
        async for message in self._waiting:
            try:
                with trio.fail_after(SEND_S):
                    await self._stream.send(encode_message(message))
            except trio.TooSlowError:
                self.cut(f"{self.peer} took nothing for {SEND_S:.0f} s")
            except ProviderError as error:
                self.cut(error.message)
        await self._stream.aclose()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(HEARTBEAT_S)
            self.offer(Heartbeat())
