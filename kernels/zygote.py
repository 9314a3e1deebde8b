"""The zygote: a warm process that does nothing but fork, lock and watch.

The engine (tinygrad) takes half a second to import and open; a fork of a process that has done so
takes milliseconds. The zygote holds one thread, no tensor and no key, and never touches a
stranger's byte: graphs and plans go past it, from the node straight into a forked child.

A child is a **lowerer** or a **worker**. It closes what is not its own, asks to die with the
zygote, locks itself (``lockdown``) and only then reads its first frame. The zygote polls each
child's resident memory every ``WATCH_INTERVAL_MS`` and kills the one that is over its budget; it
reaps every child and tells the node how it ended. When the node closes the control socket, or dies,
the zygote kills all children and ends.
"""

from __future__ import annotations

import gc
import importlib
import mmap
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Final

from p2pflop.errors import ProtocolError
from p2pflop.kernels import lockdown, lowerer, syscalls, worker
from p2pflop.kernels.compiler import CompileClient
from p2pflop.kernels.engine import Engine
from p2pflop.kernels.frames import (
    LOWERER,
    MAX_CONTROL_BYTES,
    OUT_OF_MEMORY_CODE,
    WORKER,
    BlockingPipe,
    Exited,
    Failed,
    Fork,
    Forked,
    FrameBuffer,
    Kill,
    Message,
    Started,
    pack,
    request,
    text,
    unpack,
)
from p2pflop.kernels.lockdown import Allowance, Mechanisms
from p2pflop.kernels.session_serving import MARK
from p2pflop.units import MIB

WATCH_INTERVAL_MS: Final = 20
# A fork shares the zygote's pages, which count as resident; this is for what it copies of them.
WATCH_SLACK_BYTES: Final = 64 * MIB
MAX_CHILDREN: Final = 256
WORKER_DESCRIPTORS: Final = 3
LOWERER_DESCRIPTORS: Final = 4
_FAILED_FORK: Final = 255
NO_LOCK: Final = Mechanisms(notes=("a device's driver needs what a lock takes away",))


@dataclass(slots=True)
class _Child:
    number: int
    pid: int
    pidfd: int
    limit_bytes: int
    out_of_memory: bool = False


class Zygote:
    """The loop of a warm process over the node's control socket."""

    def __init__(self, control: socket.socket, engine: Engine, mechanisms: Mechanisms) -> None:
        self._control = control
        self._engine = engine
        self._mechanisms = mechanisms
        self._frames = FrameBuffer(MAX_CONTROL_BYTES)
        self._descriptors: list[int] = []
        self._children: dict[int, _Child] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._own_bytes = lockdown.resident_bytes(os.getpid())

    def run(self) -> None:
        """Fork on request until the node leaves; then no child is left."""
        listening = True
        while listening:
            ready = self._poll.poll(WATCH_INTERVAL_MS if self._children else None)
            if any(descriptor == self._control.fileno() for descriptor, _ in ready):
                listening = self._listen()
            self._watch()
            self._reap()
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        for child in self._children.values():
            os.waitpid(child.pid, 0)

    def _tell(self, message: Message) -> None:
        self._control.sendall(pack(message))

    def _listen(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MAX_CONTROL_BYTES, 64)
        except ConnectionError:
            return False
        self._descriptors += descriptors
        for body in self._frames.feed(data):
            message = unpack(request, body)
            if isinstance(message, Fork):
                self._fork(message)
            elif isinstance(message, Kill):
                self._kill(message.number)
            else:
                raise ProtocolError(f"a zygote cannot {type(message).__name__}")
        return bool(data)

    def _kill(self, number: int) -> None:
        child = self._children.get(number)
        if child is not None:
            os.kill(child.pid, signal.SIGKILL)

    def _fork(self, message: Fork) -> None:
        count = LOWERER_DESCRIPTORS if message.kind == LOWERER else WORKER_DESCRIPTORS
        own, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        parent = os.getpid()
        try:
            if len(self._children) >= MAX_CHILDREN or lockdown.thread_count() > 1:
                raise OSError("too many children, or a thread was started")
            pid = os.fork()
        except OSError:
            self._tell(Exited(message.number, _FAILED_FORK, 0, False))
        else:
            if pid == 0:
                self._become_child(message, own, parent)
            pidfd = os.pidfd_open(pid) if sys.platform == "linux" else -1
            if pidfd >= 0:
                self._poll.register(pidfd, select.POLLIN)
            limit = self._own_bytes + message.memory_bytes + WATCH_SLACK_BYTES
            self._children[message.number] = _Child(message.number, pid, pidfd, limit)
            self._tell(Forked(message.number, pid))
        for descriptor in own:
            os.close(descriptor)

    def _become_child(self, message: Fork, own: list[int], parent: int) -> None:
        """The rest of a child's life; does not return."""
        code = 1
        try:
            is_worker = message.kind == WORKER
            mark = mmap.mmap(own.pop(), MARK.size) if is_worker else bytearray()
            lockdown.only_descriptors(own)  # so nothing that could grow is left of the mark
            lockdown.die_with_parent(parent)
            lockdown.die_first()
            calls = syscalls.COMPUTE
            memory_bytes = message.memory_bytes
            if not self._engine.lockable:
                memory_bytes = lockdown.MAX_MEMORY_BYTES  # drivers map more than there is
                self._engine.open()
            allowance = Allowance(memory_bytes, message.cpu_seconds, calls)
            lockdown.lock(allowance, self._mechanisms)
            if not is_worker:
                self._engine.use_compiler(CompileClient(*own[2:]))
                lowerer.serve(BlockingPipe(*own[:2]), self._engine)
            else:
                worker.serve(BlockingPipe(*own), self._engine, memoryview(mark))
            code = 0
        except MemoryError:
            code = OUT_OF_MEMORY_CODE
        except (EOFError, OSError):
            pass  # the node let go of the pipe; the exit code tells the rest
        finally:
            os._exit(code)

    def _watch(self) -> None:
        for child in self._children.values():
            if not child.out_of_memory and lockdown.resident_bytes(child.pid) > child.limit_bytes:
                child.out_of_memory = True
                os.kill(child.pid, signal.SIGKILL)

    def _reap(self) -> None:
        for child in tuple(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            del self._children[child.number]
            if child.pidfd >= 0:
                self._poll.unregister(child.pidfd)
                os.close(child.pidfd)
            ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            code = 0 if ended_by else os.WEXITSTATUS(status)
            self._tell(Exited(child.number, code, ended_by, child.out_of_memory))


def main(command: list[str]) -> None:
    """``python -m p2pflop.kernels.zygote CONTROL_FD COMPILE_READ_FD COMPILE_WRITE_FD ENGINE``.

    The class's environment must be set. The compile pipe is for warming up and is closed after it.
    """
    control = socket.socket(fileno=int(command[0]))
    compile_pipe = [int(command[1]), int(command[2])]
    try:
        _live(control, compile_pipe, command[3])
    # Standard error goes nowhere: the node must hear why, whatever it is.
    except Exception as error:
        control.sendall(pack(Failed(text(repr(error)))))
        raise


def _live(control: socket.socket, compile_pipe: list[int], engine_name: str) -> None:
    engine: Engine = importlib.import_module(engine_name).create()
    mechanisms = lockdown.probe() if engine.lockable else NO_LOCK
    engine.use_compiler(CompileClient(*compile_pipe))
    version = engine.warm()
    for descriptor in compile_pipe:
        os.close(descriptor)
    gc.collect()
    gc.freeze()
    zygote = Zygote(control, engine, mechanisms)
    control.sendall(pack(Started(mechanisms.level, mechanisms.notes, text(version))))
    zygote.run()


if __name__ == "__main__":
    main(sys.argv[1:])
