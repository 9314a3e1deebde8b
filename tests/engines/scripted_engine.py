"""An engine whose sessions count, or misbehave in the way that the work's seed asks for.

The zygote loads it instead of tinygrad: it starts in a tenth of a second, and no graph could be
made to do most of this.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping

import msgspec

from p2pflop.errors import JobError
from p2pflop.job.commands import Place
from p2pflop.job.session import OpenGraph
from p2pflop.job.spec import Work
from p2pflop.kernels.engine import Compiler
from p2pflop.kernels.frames import (
    OUT_OF_MEMORY_CODE,
    Done,
    Obeyed,
    Part,
    Paused,
    Progress,
    Progressed,
    Ready,
)
from p2pflop.node.memory_sessions import DigestWorkspace
from p2pflop.node.memory_workers import CountingSession
from p2pflop.units import MIB

escapes = importlib.import_module("escapes")  # a neighbour on the path, not in a package

AT_STEP = 3
(
    HONEST,
    SEGFAULT,
    DIVIDE_BY_ZERO,
    SPIN,
    EAT_ALL_MEMORY,
    EAT_RESIDENT_MEMORY,
    HIDE_MEMORY,
    SLEEP,
    EXIT,
    RAISE,
    GARBAGE,
    HUGE_FRAME,
    WRONG_STEP,
    SKIP_ROWS,
    UNTRACED_ROW,
    EARLY_PAUSE,
    WRONG_REPORT,
    WRONG_SIZE,
    ESCAPE,
    SLOW,
    EXIT_WITHOUT_MEMORY,
    ILLEGAL_INSTRUCTION,
    UNASKED_DATA,
    UNASKED_OBEYED,
) = range(24)
SLOW_STEP_SECONDS = 0.02
SPACE_BYTES = 64 * MIB
PLAN_OF = b"plan of "


def _to_node(data: bytes) -> None:
    """Write to every descriptor that is open for it: one is the pipe to the node."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, data)
        except OSError:
            continue


def _frame(message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    _to_node(struct.pack(">I", len(body)) + body)


def _run_code(code: bytes) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection)
    page.write(code)
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def _spin() -> None:
    while True:
        pass


def _eat(limit_bytes: int) -> None:
    kept = []
    while limit_bytes > 0:
        kept.append(b"\1" * (8 * MIB))
        limit_bytes -= 8 * MIB
    time.sleep(60)


class ScriptedSession(CountingSession):
    """Counts until ``AT_STEP``, then does what the seed says."""

    def __init__(self, work: Work, plans: Mapping[bytes, bytes]) -> None:
        super().__init__(work, plans)
        self._deed = work.seed
        self._outcomes = b""

    def step(self, number: int) -> None:
        super().step(number)
        if self._deed == SLOW:
            time.sleep(SLOW_STEP_SECONDS)
        if number == AT_STEP and self._deed in _DEEDS:
            _DEEDS[self._deed]()
        if number == AT_STEP and self._deed == ESCAPE:
            self._outcomes = json.dumps(escapes.outcomes()).encode()

    def read(self, slot: int) -> memoryview:
        view = super().read(slot)
        return view[:-1] if self._deed == WRONG_SIZE else view

    def read_output(self, phase: int, output: int) -> memoryview | None:
        if self._deed == ESCAPE:
            return memoryview(self._outcomes)
        return super().read_output(phase, output)


_DEEDS: dict[int, Callable[[], object]] = {
    SEGFAULT: lambda: ctypes.string_at(0),
    # xor ecx,ecx; xor edx,edx; xor eax,eax; idiv ecx
    DIVIDE_BY_ZERO: lambda: _run_code(bytes.fromhex("31c931d231c0f7f9c3")),
    ILLEGAL_INSTRUCTION: lambda: _run_code(bytes.fromhex("0f0b")),
    SPIN: _spin,
    EAT_ALL_MEMORY: lambda: _eat(2**40),
    EAT_RESIDENT_MEMORY: lambda: _eat(300 * MIB),
    HIDE_MEMORY: lambda: mmap.mmap(-1, 4096),
    SLEEP: lambda: time.sleep(60),
    EXIT: lambda: os._exit(3),
    EXIT_WITHOUT_MEMORY: lambda: os._exit(OUT_OF_MEMORY_CODE),
    RAISE: lambda: os.environ["NOTHING"],
    GARBAGE: lambda: _to_node(b"\0\0\0\4\xc1\xc1\xc1\xc1"),
    HUGE_FRAME: lambda: _to_node(b"\xff\xff\xff\xff"),
    WRONG_STEP: lambda: _frame(Progressed(100, 101, ())),
    SKIP_ROWS: lambda: _frame(Progressed(0, 3, ())),
    UNTRACED_ROW: lambda: _frame(Progressed(0, 0, ((0, 7, 0, b"1234"),))),
    EARLY_PAUSE: lambda: _frame(Paused(2, True, False)),
    WRONG_REPORT: lambda: _frame(Done()),
    UNASKED_DATA: lambda: _frame(Part(b"1", True)),
    UNASKED_OBEYED: lambda: _frame(Obeyed(0, 0, 0, 0)),
}


class ScriptedWorkspace(DigestWorkspace):
    """Does what is at the first place of a binding, four bytes, before it is run."""

    def __init__(self) -> None:
        super().__init__(SPACE_BYTES)
        self._deed = HONEST

    def define(self, graph: bytes, plan: bytes) -> None:
        super().define(graph, plan.removeprefix(PLAN_OF))

    def run(self, graph: OpenGraph, places: tuple[Place, ...]) -> None:
        self._deed = int.from_bytes(self.read(places[0], 4), "little")
        if self._deed in _DEEDS:
            _DEEDS[self._deed]()
        super().run(graph, places)

    def read(self, place: Place, size_bytes: int) -> bytes:
        data = super().read(place, size_bytes)
        return data[:-1] if self._deed == WRONG_SIZE else data


def _misbehave(graph: bytes) -> None:
    if graph == b"fail":
        raise JobError("told to fail")
    if graph == b"die":
        ctypes.string_at(0)
    if graph == b"babble":
        _frame(Ready())
    if graph == b"spin":
        _spin()
    if graph == b"eat":
        _eat(2**40)
    if graph == b"chatter":
        for done in range(10):
            _frame(Progress(done, 10))
    if graph.startswith(b"slow"):
        time.sleep(0.3)


class ScriptedEngine:
    """Lowers ``b"fail"`` to a JobError, dies of ``b"die"``, is slow with ``b"slow..."``.

    The plan of ``b"who..."`` is its process; after ``b"turn"`` every other plan is ``b"evil"``, and
    after ``b"sick"`` every other graph fails.
    """

    def __init__(self) -> None:
        self._compiler: Compiler | None = None
        self._mood = b""

    def use_compiler(self, client: Compiler) -> None:
        self._compiler = client

    lockable = True

    def open(self) -> None:
        """See Engine. Never called."""

    def warm(self) -> str:
        if os.environ.get("SCRIPT_FAILS_TO_START"):
            raise RuntimeError("told not to start")
        return "scripted"

    def lower(self, graph: bytes, progress: Callable[[int, int], None]) -> bytes:
        if graph.startswith(b"who") or self._mood:
            return self._answer_in_mood()
        if graph in (b"turn", b"sick"):
            self._mood = graph
        _misbehave(graph)
        progress(1, 2)
        if graph.startswith(b"C:") and self._compiler is not None:
            return self._compiler.compile(graph[2:].decode())
        progress(2, 2)
        return PLAN_OF + graph

    def _answer_in_mood(self) -> bytes:
        if self._mood == b"sick":
            raise JobError("still sick")
        return b"evil" if self._mood else str(os.getpid()).encode()

    def session(self, work: Work, plans: Mapping[bytes, bytes]) -> ScriptedSession:
        return ScriptedSession(work, plans)

    def workspace(self) -> ScriptedWorkspace:
        return ScriptedWorkspace()


def create() -> ScriptedEngine:
    return ScriptedEngine()
