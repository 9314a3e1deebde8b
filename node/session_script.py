"""The script's end of a session: frames from it, and a bounded way back to it.

A script that computes does not read: what it has not read yet of ``Ran`` is told in one, or, if it
is verbose, from when the outbox is full. Only ``Data``, which it waits for, makes whoever brings it
wait, so that a script that asks and does not read gets no further than the window.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

import trio
from msgspec.structs import replace

from p2pflop.job.commands import Data, NodeFrame, Ran, ScriptFrame
from p2pflop.job.meter import MAX_LINE_VALUE
from p2pflop.units import MIB

MAX_OUTBOX_BYTES: Final = 8 * MIB
FRAME_BYTES: Final = 64
"""What a frame counts beside the data in it."""
UNREAD_S: Final = 10.0
"""A script that reads nothing for so long while there is much to read has been stopped; whoever
brings more is not to wait for it."""
MAX_KERNELS: Final = 2**32 - 1


class ScriptLine(Protocol):
    """Frames both ways at once, with one script."""

    async def receive(self) -> ScriptFrame | None:
        """The next one; None if the script is gone. Raises ProtocolError."""

    async def send(self, frame: NodeFrame) -> None:
        """Raises ProviderError if the script is gone."""


class Outbox:
    """What is to be told to a script. ``verbose``: each Ran by itself, as long as there is room."""

    def __init__(self, line: ScriptLine) -> None:
        self.verbose = False
        self._line = line
        self._frames: deque[NodeFrame] = deque()
        self._bytes = 0
        self._closed = False
        self._news = trio.Event()

    def put(self, frame: NodeFrame) -> None:
        """Tell it soon, in order."""
        last = self._frames[-1] if self._frames else None
        apart = self.verbose and self._bytes < MAX_OUTBOX_BYTES
        if isinstance(frame, Ran) and isinstance(last, Ran) and not apart:
            self._frames[-1] = _together(last, frame)
        else:
            self._frames.append(frame)
            self._bytes += _size(frame)
        self._wake()

    async def put_data(self, data: Data) -> bool:
        """Likewise, once there is room; False if there was none within ``UNREAD_S``."""
        with trio.move_on_after(UNREAD_S) as waiting:
            await self.wait_room()
        if waiting.cancelled_caught:
            return False
        self.put(data)
        return True

    async def wait_room(self) -> None:
        """Return once there is room, or nobody reads any more."""
        while self._bytes >= MAX_OUTBOX_BYTES and not self._closed:
            await self._news.wait()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._wake()

    async def run(self) -> None:
        """Tell, until closed. Raises ProviderError if the script is gone."""
        while self._frames or not self._closed:
            if not self._frames:
                await self._news.wait()
                continue
            frame = self._frames.popleft()
            self._bytes -= _size(frame)
            self._wake()
            await self._line.send(frame)

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


def _size(frame: NodeFrame) -> int:
    return FRAME_BYTES + (len(frame.data) if isinstance(frame, Data) else 0)


def _together(first: Ran, second: Ran) -> Ran:
    return replace(
        second,
        kernels=min(MAX_KERNELS, first.kernels + second.kernels),
        flop=min(MAX_LINE_VALUE, first.flop + second.flop),
        touched_bytes=min(MAX_LINE_VALUE, first.touched_bytes + second.touched_bytes),
        busy_ns=min(MAX_LINE_VALUE, first.busy_ns + second.busy_ns),
    )
