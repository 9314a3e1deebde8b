"""The crew of a worker pool: one zygote, one compile helper, and the children they fork for us.

A child is made by handing pipe ends to both as descriptors. Children end with the zygote, and the
zygote with the node; when either helper ends, for whatever reason, the crew is lost as a whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Final

import trio

from p2pflop.errors import ConfigError, JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.kernels.faults import REMOTE_HINT, REMOTE_HINTS, signal_error
from p2pflop.kernels.frames import (
    LOWERER,
    OUT_OF_MEMORY_CODE,
    Exited,
    Failed,
    Fault,
    Fork,
    Forked,
    Kill,
    Ready,
    Serve,
    Started,
    text,
    worker_report,
)
from p2pflop.kernels.session_serving import MARK
from p2pflop.node.pipes import ControlledProcess, EndOfPipe, FramePipe, pipe, shared_memory

START_SECONDS: Final = 60.0
READY_SECONDS: Final = 20.0
END_SECONDS: Final = 5.0
MAX_CPU_SECONDS: Final = 2**31 - 1
MAX_LAST_FRAMES: Final = 64

SMALLER: Final = "Make its tensors or its batch smaller."


class Child:
    """A lowerer or worker as the node sees it: a pipe, and at some point an end."""

    def __init__(self, number: int, frames: FramePipe, mark: int) -> None:
        self.number = number
        self.pipe = frames
        self.pid = 0
        self.ended = trio.Event()
        self.exit: Exited | None = None
        self._mark = mark
        self._reached = 0

    def reached(self) -> int:
        """The command of its session that it is at, or was: a stranger's word (``MARK``)."""
        if self._mark >= 0:
            (self._reached,) = MARK.unpack(os.pread(self._mark, MARK.size, 0))
        return self._reached

    def close(self) -> None:
        """Let go of pipe and mark."""
        self.reached()
        self.pipe.close()
        if self._mark >= 0:
            os.close(self._mark)
        self._mark = -1

    async def cause_of_death(self, what: str) -> P2PFlopError:
        """Why the pipe has closed, in an error to raise: its last words, else how it ended."""
        with trio.move_on_after(END_SECONDS):
            fault = await self._last_words()
            if fault is not None:
                return fault_error(fault)
            await self.ended.wait()
        if self.exit is None:
            return ProviderError(f"the {what} was lost with the sandbox it ran in")
        if self.exit.out_of_memory:
            return JobError("the job used more memory than it was metered for", hint=SMALLER)
        if self.exit.code == OUT_OF_MEMORY_CODE:
            return JobError(f"the {what} ran out of memory", hint=SMALLER)
        ended_by = self.exit.signal
        if ended_by == signal.SIGXCPU:
            return JobError(f"the {what} used up its CPU time", hint="Have fewer steps in a job.")
        if ended_by:
            return signal_error(what, ended_by, REMOTE_HINTS, REMOTE_HINT)
        return ProviderError(f"the {what} ended by itself with code {self.exit.code}")

    async def _last_words(self) -> Fault | None:
        try:
            for _ in range(MAX_LAST_FRAMES):
                report = await self.pipe.receive(worker_report)
                if isinstance(report, Fault):
                    return report
        except (EndOfPipe, ProtocolError):
            pass
        return None


def fault_error(fault: Fault) -> P2PFlopError:
    """The error that a child's last words stand for; they are a stranger's words."""
    return (JobError if fault.job else ProviderError)(text(fault.text))


class Crew:
    """Zygote and compile helper, started together. ``serve`` must run for the rest to work."""

    def __init__(self, environment: Mapping[str, str], engine: str) -> None:
        self._helper = ControlledProcess(["p2pflop.kernels.compiler"], environment, [])
        zygote_read, helper_write = os.pipe()
        helper_read, zygote_write = os.pipe()
        self._warm_up = [helper_read, helper_write]
        try:
            arguments = [str(zygote_read), str(zygote_write), engine]
            self._zygote = ControlledProcess(
                ["p2pflop.kernels.zygote", *arguments], environment, [zygote_read, zygote_write]
            )
        finally:
            _close(zygote_read, zygote_write)
        self._children: dict[int, Child] = {}
        self._numbers = count(1)
        self._started: dict[str, Started] = {}
        self.ready = trio.Event()
        self.lost = trio.Event()
        self.failure = ""

    @property
    def started(self) -> Started:
        """What the zygote told when it was warm."""
        return self._started["zygote"]

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Zygote, compile helper, then the children."""
        children = tuple(child.pid for child in self._children.values() if child.pid)
        return (self._zygote.pid, self._helper.pid, *children)

    async def serve(self) -> None:
        """Listen to both until one of them ends; then every child counts as lost."""
        try:
            try:
                await self._helper.send(Serve(), self._warm_up)
            finally:
                _close(*self._warm_up)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, "zygote", self._zygote, nursery.cancel_scope)
                nursery.start_soon(self._listen, "helper", self._helper, nursery.cancel_scope)
        except EndOfPipe:
            pass
        finally:
            self.lost.set()
            for child in self._children.values():
                child.ended.set()

    async def aclose(self) -> None:
        """End both processes; they end their children."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._zygote.aclose)
            nursery.start_soon(self._helper.aclose)

    async def wait_ready(self) -> None:
        """Wait until both are warm. Raises ConfigError if they cannot be."""
        if self.ready.is_set():
            return
        with trio.move_on_after(START_SECONDS):
            async with trio.open_nursery() as nursery:
                for event in (self.ready, self.lost):
                    nursery.start_soon(_wait_then_cancel, event, nursery.cancel_scope)
        if not self.ready.is_set():
            raise self.error()

    def error(self) -> ConfigError:
        """Why this crew is not there, as far as it told."""
        why = self.failure or "its processes did not start"
        return ConfigError(
            f"no sandbox for jobs: {why}", hint="`p2pflop doctor` says what is missing."
        )

    @asynccontextmanager
    async def child(self, kind: int, memory_bytes: int, cpu_seconds: int) -> AsyncIterator[Child]:
        """A fresh locked child, killed at the end of the context. Raises ProviderError."""
        theirs: list[int] = []
        child: Child | None = None
        try:
            try:
                child = await self._fork(kind, memory_bytes, cpu_seconds, theirs)
                with trio.fail_after(READY_SECONDS):
                    if not isinstance(await child.pipe.receive(worker_report), Ready):
                        raise ProviderError("a worker spoke before it was locked")
            except (EndOfPipe, OSError, ProtocolError, trio.TooSlowError) as error:
                raise ProviderError("no worker could be started") from error
            yield child
        finally:
            _close(*theirs)
            if child is not None:
                await self.end(child)

    async def _fork(
        self, kind: int, memory_bytes: int, cpu_seconds: int, theirs: list[int]
    ) -> Child:
        """Ask for a child. ``theirs`` receives the descriptors to close here."""
        if self.lost.is_set():
            raise EndOfPipe
        its_read, our_write = pipe()
        our_read, its_write = pipe()
        theirs += [its_read, its_write]
        mark = shared_memory(MARK.size)
        child = Child(next(self._numbers), FramePipe(our_read, our_write), mark)
        self._children[child.number] = child
        descriptors = [its_read, its_write]
        try:
            if kind == LOWERER:
                compile_read, helper_write = os.pipe()
                helper_read, compile_write = os.pipe()
                theirs += [compile_read, helper_write, helper_read, compile_write]
                await self._helper.send(Serve(), [helper_read, helper_write])
                descriptors += [compile_read, compile_write]
            else:
                descriptors.append(mark)
            limits = memory_bytes, min(cpu_seconds, MAX_CPU_SECONDS)
            await self._zygote.send(Fork(child.number, kind, *limits), descriptors)
        except BaseException:
            child.close()
            del self._children[child.number]
            raise
        _close(*theirs)
        theirs.clear()
        return child

    async def end(self, child: Child) -> None:
        """Kill a child and wait until it is gone."""
        child.close()
        with trio.CancelScope(shield=True), trio.move_on_after(END_SECONDS):
            if not child.ended.is_set():
                try:
                    await self._zygote.send(Kill(child.number))
                    await child.ended.wait()
                except EndOfPipe:
                    pass  # the zygote is gone, and its children with it
        if child.ended.is_set():
            self._children.pop(child.number, None)

    async def _listen(self, name: str, process: ControlledProcess, scope: trio.CancelScope) -> None:
        try:
            async for notice in process.notices():
                match notice:
                    case Started():
                        self._started[name] = notice
                        if len(self._started) == 2:
                            self.ready.set()
                    case Failed():
                        self.failure = text(notice.text)
                    case Forked() if notice.number in self._children:
                        self._children[notice.number].pid = notice.pid
                    case Exited() if notice.number in self._children:
                        child = self._children.pop(notice.number)
                        child.exit = notice
                        child.ended.set()
        except ProtocolError as error:
            self.failure = error.message
        scope.cancel()


async def _wait_then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
