"""Packets of a u16 length and a sealed body over a socket, which is what noise gives.

Writing never waits: a packet is sealed and handed to the kernel at once, in the task that sends;
only what the kernel does not take is left to a writer task. So a cancelled sender never leaves half
a packet behind, and a small packet costs one system call and no switch of tasks.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from p2pflop.units import KIB

READY_BYTES: Final = 256 * KIB
"""Senders of much wait while more than this is queued for the socket."""

MAX_PACKET_BYTES: Final = 65535
SEAL_BYTES: Final = 16
PACKETS_A_TURN: Final = 256
"""Opened before ``receive`` returns: a peer could fill what it reads with the smallest ones."""
_RECEIVE_BYTES: Final = 128 * KIB


class Violation(Exception):
    """The peer broke the format, its credit or a limit."""


class SealedSocket:
    """Packets over a connected socket, which it takes over. ``seal`` and ``unseal`` keep order."""

    def __init__(
        self,
        sock: socket.socket,
        seal: Callable[[bytes], bytes],
        unseal: Callable[[bytes], bytes],
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._seal = seal
        self._unseal = unseal
        self._queue = bytearray()
        self._inbox = bytearray()
        self._wake = trio.Event()
        self._room = trio.Event()
        self._opened = 0
        self._turn_over = False
        self.closed = False

    @property
    def queued_bytes(self) -> int:
        """What the kernel has not taken yet."""
        return len(self._queue)

    def send(self, data: bytes | bytearray) -> None:
        """Queue ``data`` and give the kernel what it takes now. Nothing happens once closed."""
        if self.closed:
            return
        step = MAX_PACKET_BYTES - SEAL_BYTES
        for start in range(0, len(data), step):
            sealed = self._seal(bytes(data[start : start + step]))
            self._queue += len(sealed).to_bytes(2, "big")
            self._queue += sealed
        self._flush()

    def _flush(self) -> None:
        try:
            del self._queue[: self._socket.send(self._queue)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
        if self._queue:
            self._wake.set()
        self._room.set()

    async def room(self, queued_bytes: int = READY_BYTES) -> None:
        """Return once no more than ``queued_bytes`` are queued, or the socket is closed."""
        while len(self._queue) > queued_bytes and not self.closed:
            if self._room.is_set():
                self._room = trio.Event()
            await self._room.wait()

    async def write_queue(self) -> None:
        """Give the kernel what ``send`` could not, until closed."""
        while not self.closed:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._queue and not self.closed:
                try:
                    await trio.lowlevel.wait_writable(self._socket.fileno())
                except (trio.ClosedResourceError, OSError):
                    self.close()
                self._flush()

    async def receive(self) -> bytes:
        """The contents of the packets that came next; none at the end. Raises Violation."""
        if self._turn_over:
            await trio.lowlevel.checkpoint()
        while not self.closed:
            opened = self._open_packets()
            if opened:
                return opened
            try:
                await trio.lowlevel.wait_readable(self._socket.fileno())
                data = self._socket.recv(_RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                continue
            except (OSError, trio.ClosedResourceError):
                break
            if not data:
                break
            self._inbox += data
        return b""

    def take_count(self) -> int:
        """How many packets were opened since this was last asked."""
        opened, self._opened = self._opened, 0
        return opened

    def _open_packets(self) -> bytes:
        opened: list[bytes] = []
        start, size = 0, len(self._inbox)
        while size - start >= 2 and len(opened) < PACKETS_A_TURN:
            end = start + 2 + int.from_bytes(self._inbox[start : start + 2], "big")
            if end > size:
                break
            content = self._unseal(bytes(self._inbox[start + 2 : end]))
            if not content:
                raise Violation("an empty packet")
            opened.append(content)
            start = end
        del self._inbox[:start]
        self._opened += len(opened)
        self._turn_over = len(opened) == PACKETS_A_TURN
        return b"".join(opened)

    def close(self) -> None:
        """Close at once; waiting tasks wake up."""
        if self.closed:
            return
        self.closed = True
        trio.lowlevel.notify_closing(self._socket.fileno())
        with suppress(OSError):  # the peer may have been first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._queue.clear()
        self._wake.set()
        self._room.set()
