"""Frames over pipes and control sockets in trio: the node's side of ``kernels.frames``."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, TypeVar

import msgspec
import trio

from p2pflop.kernels.frames import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    FrameBuffer,
    Message,
    Notice,
    body_bytes,
    notice,
    pack,
    parts,
    unpack,
)
from p2pflop.units import MIB

PIPE_BYTES: Final = MIB
READ_BYTES: Final = 256 * 1024
END_SECONDS: Final = 5.0

T = TypeVar("T")


class EndOfPipe(Exception):
    """The other end is closed. Never leaves ``node``."""


def pipe() -> tuple[int, int]:
    """A pipe ``(read, write)`` with room for a large frame where the system grants it."""
    read, write = os.pipe()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # over the user's quota: a smaller pipe works as well
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read, write


class FramePipe:
    """Messages over two descriptors, which it owns. Several tasks may send, one may receive."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._reader = trio.lowlevel.FdStream(read_fd)
        self._writer = trio.lowlevel.FdStream(write_fd)
        self._sending = trio.Lock()
        self._pending = bytearray()

    async def send(self, message: Message) -> None:
        """Write one message. Raises EndOfPipe."""
        async with self._sending:
            try:
                await self._writer.send_all(pack(message))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise EndOfPipe from error

    async def send_parts(self, data: bytes) -> None:
        """Write ``data`` as parts. Raises EndOfPipe."""
        for part in parts(data):
            await self.send(part)

    async def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        """Read one message. Raises EndOfPipe, ProtocolError."""
        await self._fill(HEADER_BYTES)
        end = HEADER_BYTES + body_bytes(self._pending[:HEADER_BYTES], MAX_FRAME_BYTES)
        await self._fill(end)
        with memoryview(self._pending) as view:
            message = unpack(decoder, view[HEADER_BYTES:end])
        del self._pending[:end]
        return message

    async def _fill(self, size: int) -> None:
        while len(self._pending) < size:
            try:
                data = await self._reader.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise EndOfPipe from error
            if not data:
                raise EndOfPipe
            self._pending += data

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()


class ControlledProcess:
    """A helper process of the node, spoken to over a control socket that ends it when closed.

    It gets a session of its own, so that Ctrl-C in the node's terminal leaves the decision to the
    node, and an environment without the node's variables.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [sys.executable, "-P", "-m", command[0], str(theirs.fileno())]
            # Our own modules with our own arguments.
            self._process = subprocess.Popen(  # noqa: S603
                [*arguments, *command[1:]],
                pass_fds=(theirs.fileno(), *descriptors),
                env=dict(environment),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._socket = trio.socket.from_stdlib_socket(ours)
        self._sending = trio.Lock()

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message with descriptors. Raises EndOfPipe."""
        data = pack(message)
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        async with self._sending:
            try:
                sent = await self._socket.sendmsg([data], ancillary)
                while sent < len(data):
                    sent += await self._socket.send(data[sent:])
            except OSError as error:
                raise EndOfPipe from error

    async def notices(self) -> AsyncIterator[Notice]:
        """What the process tells, until it ends. Raises ProtocolError."""
        frames = FrameBuffer(MAX_CONTROL_BYTES)
        while True:
            try:
                data = await self._socket.recv(MAX_CONTROL_BYTES)
            except OSError:
                return
            if not data:
                return
            for body in frames.feed(data):
                yield unpack(notice, body)

    async def aclose(self) -> None:
        """Close the socket and wait for the process, at most ``END_SECONDS`` before killing it."""
        self._socket.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._wait)

    def _wait(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
