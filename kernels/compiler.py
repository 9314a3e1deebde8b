"""The compile helper: the one process of a node that may start clang.

A lowerer turns a stranger's graph into C and may neither fork nor exec, so it asks here over a pipe
pair. For each pair the helper forks a server, which locks itself (``lockdown``: clang is the only
file that it may execute, nothing is writable, no network) and compiles one source after another
until its pipe closes; so several lowerers compile at once, and a fault in one server harms one.

Source text is all that a lowerer can choose. Every argument of clang is fixed by ``arguments``:
arguments from a lowerer would be an injection (``-o``, ``-fplugin``). Size of source and object and
the time of a run are limited. A request is one frame with the source; the answer one frame, a
status byte and the object or clang's words.

Nothing here imports tinygrad; ``arguments`` repeats its ``ClangCompiler`` to the letter, and a
test compares the two.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pflop.errors import JobError, ProtocolError, ProviderError
from p2pflop.kernels import lockdown, syscalls
from p2pflop.kernels.frames import (
    MAX_CONTROL_BYTES,
    BlockingPipe,
    Failed,
    FrameBuffer,
    Serve,
    Started,
    pack,
    request,
    text,
    unpack,
)
from p2pflop.kernels.lockdown import Allowance, Mechanisms
from p2pflop.units import GIB, MIB

MAX_SOURCE_BYTES: Final = 2 * MIB
MAX_OBJECT_BYTES: Final = 16 * MIB
MAX_COMPLAINT_BYTES: Final = 16 * 1024
MAX_CLANG_SECONDS: Final = 60
MAX_SERVER_CPU_SECONDS: Final = 900
MAX_SERVERS: Final = 16
COMPILER_MEMORY_BYTES: Final = 2 * GIB

_COMPILED, _REFUSED = 0, 1
_CHUNK_BYTES: Final = 64 * 1024
# Whatever renders a job's kernels, tinygrad has clang compile four small programs of its own.
_DEVICE = re.compile(r"CPU:(?:CLANG|LLVM|X86):(x86_64|arm64),([a-z0-9-]+)((?:,[+-]?[a-z0-9.]+)*)")


_MACHINES: Final = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}


def arguments(device: str) -> tuple[str, ...]:
    """clang's arguments for tinygrad's device string, such as ``CPU:CLANG:x86_64,native,-fma``.

    Raises ProtocolError.
    """
    if device and device.split(":", 1)[0] != "CPU":
        # Another device: whoever opens the CPU beside it, for copies, gets tinygrad's default.
        device = f"CPU:CLANG:{_MACHINES.get(platform.machine().lower(), '')},native"
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise ProtocolError(f"no compiler arguments for device {device[:80]!r}")
    arch, processor, rest = found.groups()
    features = [feature for feature in rest.split(",") if feature]
    if arch == "x86_64":
        machine = [f"-march={processor}"]
        machine += [f"-mno{name}" if name.startswith("-") else f"-m{name}" for name in features]
    else:
        names = [f"no{name[1:]}" if name.startswith("-") else name for name in features]
        machine = ["-ffixed-x18", "-mcpu=" + "+".join([processor, *names])]
    fixed = "-c -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib -fno-ident"
    return (*fixed.split(), f"--target={arch}-none-unknown-elf", *machine, "-", "-o", "-")


class CompileClient:
    """The lowerer's side of a pipe pair to the helper."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._pipe = BlockingPipe(read_fd, write_fd)

    def compile(self, source: str) -> bytes:
        """The object file of C ``source``. Raises JobError, or ProviderError if the helper died."""
        body = source.encode()
        if len(body) > MAX_SOURCE_BYTES:
            raise JobError(f"a kernel's source of {len(body)} bytes is over {MAX_SOURCE_BYTES}")
        try:
            self._pipe.send_body(body)
            answer = self._pipe.receive_body(1 + MAX_OBJECT_BYTES)
        except (OSError, EOFError) as error:
            raise ProviderError("the compile helper is gone") from error
        if not answer or answer[0] != _COMPILED:
            complaint = text(answer[1:].decode(errors="replace"))
            raise JobError(f"a kernel of this graph does not compile: {complaint}")
        return bytes(answer[1:])


@dataclass(frozen=True, slots=True)
class Clang:
    path: str
    arguments: tuple[str, ...]


class _Run:
    """One run of clang: source in, object and complaint out, all three bounded."""

    def __init__(self, clang: Clang, source: bytes) -> None:
        self.late = False
        self.status = -1
        stdin, self._to_clang = os.pipe()
        self._from_clang, stdout = os.pipe()
        self._complaints, stderr = os.pipe()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                lockdown.die_with_parent(parent)
                for target, descriptor in enumerate((stdin, stdout, stderr)):
                    os.dup2(descriptor, target)
                # The path is ours, the arguments are fixed, the environment is empty.
                os.execve(clang.path, [clang.path, *clang.arguments], {})  # noqa: S606
            finally:
                os._exit(127)
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        # Not os.set_blocking, which is an ioctl, and those are all refused.
        fcntl.fcntl(self._to_clang, fcntl.F_SETFL, os.O_WRONLY | os.O_NONBLOCK)
        self._received = {self._from_clang: bytearray(), self._complaints: bytearray()}
        self._exchange(source)
        if not self.late:
            self.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def answer(self) -> bytes:
        """The frame's body for the lowerer."""
        compiled = bytes(self._received[self._from_clang])
        complaint = bytes(self._received[self._complaints]) or f"status {self.status}".encode()
        if self.late:
            complaint = b"clang took too long"
        elif len(compiled) > MAX_OBJECT_BYTES:
            complaint = b"the object file is too large"
        elif self.status == 0:
            return bytes([_COMPILED]) + compiled
        return bytes([_REFUSED]) + complaint

    def _exchange(self, source: bytes) -> None:
        limits = {
            self._from_clang: MAX_OBJECT_BYTES + 1,
            self._complaints: MAX_COMPLAINT_BYTES,
        }
        poll = select.poll()
        poll.register(self._to_clang, select.POLLOUT)
        for descriptor in limits:
            poll.register(descriptor, select.POLLIN)
        rest = memoryview(source)
        unfinished = {self._to_clang, *limits}
        deadline = time.monotonic() + MAX_CLANG_SECONDS
        while unfinished:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                self.late = True
                return
            for descriptor, _ in ready:
                if descriptor == self._to_clang:
                    with contextlib.suppress(BlockingIOError):
                        rest = self._feed(rest)
                    finished = not rest
                else:
                    data = os.read(descriptor, _CHUNK_BYTES)
                    received = self._received[descriptor]
                    received += data[: limits[descriptor] - len(received)]
                    finished = not data
                if finished:
                    poll.unregister(descriptor)
                    unfinished.remove(descriptor)
                    os.close(descriptor)

    def _feed(self, rest: memoryview) -> memoryview:
        try:
            return rest[os.write(self._to_clang, rest) :]
        except BrokenPipeError:
            return rest[len(rest) :]


def serve(clang: Clang, descriptors: list[int], mechanisms: Mechanisms, parent: int) -> None:
    """A server's life: lock, then compile until the pipe closes."""
    lockdown.die_with_parent(parent)
    lockdown.only_descriptors(descriptors)
    lockdown.lock(
        Allowance(
            memory_bytes=COMPILER_MEMORY_BYTES,
            cpu_seconds=MAX_SERVER_CPU_SECONDS,
            calls=syscalls.COMPILE,
            execute=(clang.path, *lockdown.loaders()),
            read=(str(Path(clang.path).parent.parent / "lib"),),
        ),
        mechanisms,
    )
    pipe = BlockingPipe(*descriptors)
    late = False
    while not late:
        run = _Run(clang, bytes(pipe.receive_body(MAX_SOURCE_BYTES)))
        pipe.send_body(run.answer())
        late = run.late  # then this process ends, and its stuck clang with it


class Helper:
    """The helper's own loop: a server for each pair of descriptors that comes in."""

    def __init__(self, control: socket.socket, clang: Clang, mechanisms: Mechanisms) -> None:
        self._control = control
        self._clang = clang
        self._mechanisms = mechanisms
        self._servers: set[int] = set()

    def run(self) -> None:
        """Serve until the node closes the control socket, then end every server."""
        started = Started(self._mechanisms.level, self._mechanisms.notes, "")
        self._control.sendall(pack(started))
        signal.signal(signal.SIGCHLD, lambda *_: self._reap())
        frames = FrameBuffer(MAX_CONTROL_BYTES)
        descriptors: list[int] = []
        while True:
            data, received, _, _ = socket.recv_fds(self._control, MAX_CONTROL_BYTES, 8)
            if not data:
                break
            descriptors += received
            for body in frames.feed(data):
                if not isinstance(unpack(request, body), Serve):
                    raise ProtocolError("the compile helper only serves")
                pair, descriptors = descriptors[:2], descriptors[2:]
                self._start(pair)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for server in self._servers:
            os.kill(server, 9)

    def _start(self, pair: list[int]) -> None:
        if len(self._servers) < MAX_SERVERS:
            parent = os.getpid()
            server = os.fork()
            if server == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    serve(self._clang, pair, self._mechanisms, parent)
                finally:
                    os._exit(0)
            self._servers.add(server)
            self._reap()  # its signal may have come before it was known
        for descriptor in pair:
            os.close(descriptor)

    def _reap(self) -> None:
        """Called for a signal too, and so perhaps within itself."""
        for server in tuple(self._servers):
            with suppress(ChildProcessError):
                if not os.waitpid(server, os.WNOHANG)[0]:
                    continue
            self._servers.discard(server)


class OwnClang:
    """What a ``CompileClient`` gives, from a clang that this process starts itself."""

    def __init__(self) -> None:
        """Of this process's environment. Raises ProtocolError."""
        self._command = [os.environ["CC"], *arguments(os.environ["DEV"])]

    def compile(self, source: str) -> bytes:
        """The object file of C ``source``; what clang has to remark is no concern of the user's.

        Raises JobError.
        """
        done = subprocess.run(  # noqa: S603  fixed arguments, no shell
            self._command, input=source.encode(), capture_output=True, check=False
        )
        if done.returncode:
            complaint = text(done.stderr.decode(errors="replace"))
            raise JobError(f"a kernel of this graph does not compile: {complaint}")
        return done.stdout


def main(command: list[str]) -> None:
    """``python -m p2pflop.kernels.compiler CONTROL_FD``, with ``CC`` and ``DEV`` set."""
    control = socket.socket(fileno=int(command[0]))
    try:
        clang = Clang(os.path.realpath(os.environ["CC"]), arguments(os.environ["DEV"]))
        mechanisms = lockdown.probe()
        gc.collect()
        gc.freeze()
        Helper(control, clang, mechanisms).run()
    # Standard error goes nowhere: the node must hear why, whatever it is.
    except Exception as error:
        control.sendall(pack(Failed(text(repr(error)))))
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
