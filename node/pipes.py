"""Frames over pipes and control sockets in trio: the node's side of ``kernels.frames``."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec
import trio

from p2pflop.dht.turns import Turn
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


def shared_memory(size_bytes: int) -> int:
    """A descriptor of that many zero bytes, to be mapped by another process."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("p2pflop")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size_bytes)
    return descriptor


class FramePipe:
    """Messages over two descriptors, which it owns. Several tasks may send, one may receive."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._reader = _Reader(read_fd)
        self._write_fd = write_fd
        os.set_blocking(write_fd, False)
        self._sending = Turn()

    async def send(self, message: Message) -> None:
        """Write one message. Raises EndOfPipe."""
        async with self._sending:
            view = memoryview(pack(message))
            while view:
                view = view[await self._write_some(view) :]

    async def send_parts(self, data: bytes) -> None:
        """Write ``data`` as parts. Raises EndOfPipe."""
        for part in parts(data):
            await self.send(part)

    async def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        """Read one message. Raises EndOfPipe, ProtocolError."""
        await trio.lowlevel.checkpoint()  # whoever floods this end must not keep others waiting
        size = body_bytes(bytes(await self._reader.take(HEADER_BYTES)), MAX_FRAME_BYTES)
        return unpack(decoder, await self._reader.take(size))

    async def _write_some(self, view: memoryview) -> int:
        try:
            return os.write(self._write_fd, view)
        except BlockingIOError:
            await _wait(trio.lowlevel.wait_writable, self._write_fd)
            return 0
        except OSError as error:
            raise EndOfPipe from error

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._write_fd = _close(self._write_fd)


class _Reader:
    """A descriptor read into one buffer that lasts: a new megabyte for each frame costs as much
    in page faults as everything else about it."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._buffer = memoryview(bytearray(HEADER_BYTES + MAX_FRAME_BYTES))
        self._start = self._end = 0

    async def take(self, size: int) -> memoryview:
        """The next ``size`` bytes, valid until the next call. Raises EndOfPipe."""
        if self._start + size > len(self._buffer):
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while self._end - self._start < size:
            await self._read_some()
        taken = self._buffer[self._start : self._start + size]
        self._start += size
        return taken

    async def _read_some(self) -> None:
        try:
            count = os.readv(self._descriptor, [self._buffer[self._end :]])
        except BlockingIOError:
            await _wait(trio.lowlevel.wait_readable, self._descriptor)
            return
        except OSError as error:
            raise EndOfPipe from error
        if count == 0:
            raise EndOfPipe
        self._end += count

    def close(self) -> None:
        self._descriptor = _close(self._descriptor)


async def _wait(until: Callable[[int], Awaitable[None]], descriptor: int) -> None:
    try:
        await until(descriptor)
    except trio.ClosedResourceError as error:
        raise EndOfPipe from error


def _close(descriptor: int) -> int:
    """Close it if it is open, wake whoever waits for it, and give the number of no descriptor."""
    if descriptor >= 0:
        trio.lowlevel.notify_closing(descriptor)
        os.close(descriptor)
    return -1


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
        self._sending = Turn()

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message with descriptors. Raises EndOfPipe."""
        data = pack(message)
        rights = array.array("i", descriptors).tobytes()
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
