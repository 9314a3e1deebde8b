"""tinygrad behind the sandbox: lowering, running, and what must be in place before a lock."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from tinygrad import Device
from tinygrad.renderer.isa.x86 import X86Renderer
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

from p2pflop.errors import JobError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.job.graph import (
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    decode_graph,
    encode_graph,
    graph_hash,
)
from p2pflop.job.spec import MODE_LAST, ROLE_STATE, NoSource, Phase, Work, WorkParam
from p2pflop.job.validate import Refusal, validate
from p2pflop.kernels import compiler
from p2pflop.kernels.cpu import CpuMachine
from p2pflop.kernels.device import DeviceMachine
from p2pflop.kernels.engine import Compiler
from p2pflop.kernels.lower import CPU, lower
from p2pflop.kernels.machine import Machine, Shelf
from p2pflop.kernels.plan import PLAN_VERSION
from p2pflop.kernels.run import Session
from p2pflop.kernels.workspace import MachineWorkspace


class TinygradEngine:
    """``engine.Engine`` by a device of tinygrad: if none is given, the one that ``DEV`` names."""

    def __init__(self, device: str | None = None) -> None:
        self._device = device or Device.DEFAULT
        self._shelf: Shelf | None = None

    def use_compiler(self, client: Compiler) -> None:
        """Replace tinygrad's call of clang, for this process."""
        expected = compiler.arguments(os.environ["DEV"])

        def compile_by_helper(self: ClangCompiler, source: str) -> bytes:
            own = (f"--target={self.arch}-none-unknown-elf", *self.args)
            if expected[-len(own) - 3 : -3] != own:
                raise ProviderError(f"tinygrad would compile with {own}, the helper does not")
            return client.compile(source)

        ClangCompiler.compile = compile_by_helper

    @property
    def lockable(self) -> bool:
        """See Engine: all that computes on the processor is."""
        return bool(self._device == CPU)

    def open(self) -> None:
        """See Engine."""
        _ = Device[self._device].renderer

    def warm(self) -> str:
        """See Engine. Raises JobError."""
        if self.lockable:
            self.rehearse()  # a driver that is open here would not survive the forks
        version = importlib.metadata.version("p2pflop")
        return f"p2pflop {version}, plan {PLAN_VERSION}, processor {_processor().hex()}"

    def rehearse(self) -> None:
        """Lower and run a small graph of many kinds of operations. Raises JobError."""
        graph = encode_graph(_rehearsal())
        plan = self.lower(graph, lambda _done, _total: None)
        session = self.session(_rehearsal_work(graph), {graph_hash(graph): plan})
        session.initialise()
        session.step(0)
        session.scalars()

    def lower(self, graph: bytes, progress: Callable[[int, int], None]) -> bytes:
        """The plan of an encoded graph. Raises JobError."""
        checked = validate(decode_graph(graph), assigns=True)
        if isinstance(checked, Refusal):
            raise JobError(f"invalid graph: {checked.reason}")
        return lower(checked, progress, self._device)

    def session(self, work: Work, plans: Mapping[bytes, bytes]) -> Session:
        """``work`` in memory. Raises JobError, ProtocolError."""
        if self._shelf is None:
            self._shelf = Shelf(self._machine())
        return Session(work, plans, self._shelf)

    def workspace(self) -> MachineWorkspace:
        """See Engine."""
        return MachineWorkspace(self._machine())

    def _machine(self) -> Machine:
        if self._device != CPU:
            return DeviceMachine(self._device)
        return CpuMachine(assembled=isinstance(Device[CPU].renderer, X86Renderer))


def create() -> TinygradEngine:
    """The zygote's way in."""
    return TinygradEngine()


def _processor() -> bytes:
    """A hash of what clang's ``native`` looks at: machine code in a plan may need all of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return content_hash(platform.processor().encode())[:8]
    told = {line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))}
    return content_hash("\n".join(sorted(told)).encode())[:8]


def _rehearsal() -> Graph:
    """Rows picked by index, a random number, a product, a sine, a sum: most paths of a lowering."""
    nodes = (
        Node(Op.PARAM, (0,)),
        Node(Op.IOTA, (Dtype.INT32, 4)),
        Node(Op.GATHER, (), (0, 1)),
        Node(Op.CONST, (Dtype.FLOAT32, 0.5)),
        Node(Op.MUL, (), (2, 3)),
        Node(Op.SIN, (), (4,)),
        Node(Op.EXP2, (), (5,)),
        Node(Op.REDUCE, (0, 1), (6,)),
        Node(Op.CAST, (Dtype.FLOAT16,), (7,)),
        Node(Op.CONST, (Dtype.UINT64, 7)),
        Node(Op.THREEFRY, (), (9, 9)),
        Node(Op.CAST, (Dtype.FLOAT32,), (10,)),
        Node(Op.ADD, (), (6, 11)),
    )
    return Graph((GraphParam(0, Dtype.FLOAT32, (4, 4)),), nodes, (Output(8), Output(12, 0)))


def _rehearsal_work(graph: bytes) -> Work:
    phase = Phase(graph_hash(graph), 1, 0, (MODE_LAST,))
    state = WorkParam(int(Dtype.FLOAT32), (4, 4), ROLE_STATE, NoSource())
    return Work(1, (phase,), (state,), 0)
