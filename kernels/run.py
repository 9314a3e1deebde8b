"""Running a work from its plans: fixed places, a flat list of calls, nothing left to decide.

A session has one buffer a slot, one scratch area that all plans share (phases run one after the
other, and scratch never outlives its phase), and one a fresh output, and binds every plan to them
once. State is written in place. What memory and a call are is the business of a ``Machine``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.graph import Dtype
from p2pflop.job.meter import init_graphs
from p2pflop.job.shapes import ITEM_BYTES
from p2pflop.job.spec import (
    MODE_TRACE,
    ROLE_SEED,
    ROLE_STEP,
    InitSource,
    Phase,
    Work,
    WorkParam,
    graphs_of,
    is_due,
)
from p2pflop.kernels.cpu import CpuMachine
from p2pflop.kernels.machine import Bound, Shelf
from p2pflop.kernels.plan import Plan

# The first of the two words that tinygrad's random numbers of a device start from: the low 32 bits
# of sha256 of the device's number in four bytes, number 0 (Tensor._next_counter).
SEED_HASH: Final = 0x14B81119


class Session:
    """One work in the memory of a machine, ready to step. Not thread-safe.

    ``plans`` maps the hash of every graph of the work (phases and init graphs) to its plan;
    ``shelf`` may have some of them ready.
    Raises ProtocolError if a plan is malformed or does not fit the work, JobError if memory is
    short. A fault of the compiled code (SIGFPE, SIGSEGV) kills the process.
    """

    def __init__(
        self, work: Work, plans: Mapping[bytes, bytes], shelf: Shelf | None = None
    ) -> None:
        shelf = shelf or Shelf(CpuMachine())
        self._work = work
        ready = shelf.take(graphs_of(work), plans)
        self._slots = [shelf.machine.memory(size_bytes(param)) for param in work.params]
        scratch = shelf.machine.scratch([plan for plan, _ in ready.values()])
        slots = [(memory, 0) for memory in self._slots]
        # Two phases may share a graph, but not the memory of its outputs: so one for each.
        self._phases: list[tuple[Phase, Bound]] = []
        for number, phase in enumerate(work.phases):
            plan, loaded = ready[phase.graph]
            _check_outputs(number, phase, plan)
            self._phases.append((phase, loaded.bind(slots, scratch)))
        self._inits = {
            graph: ready[graph][1].bind(slots, scratch) for graph in sorted(init_graphs(work))
        }
        self._steps = [
            self._slots[slot] for slot, param in enumerate(work.params) if param.role == ROLE_STEP
        ]
        self._ran: list[int] = []
        self._ever: set[int] = set()

    def write(self, slot: int, offset_bytes: int, data: bytes | memoryview) -> None:
        """Put ``data`` into a slot. Raises ProtocolError if it does not fit, JobError for a bool
        that is neither 0 nor 1: it would be read as the compiler likes, and no hash stand for it.
        """
        memory = self._slots[self._known(slot)]
        if offset_bytes < 0 or offset_bytes + len(data) > memory.size_bytes:
            raise ProtocolError(f"{len(data)} bytes at {offset_bytes} do not fit slot {slot}")
        if self._work.params[slot].dtype == Dtype.BOOL and bytes(data).translate(None, b"\0\1"):
            raise JobError(
                f"slot {slot} is of bools, and has bytes other than 0 and 1",
                hint="Write the data anew: numpy.asarray(data) != 0.",
            )
        memory.write(offset_bytes, data)

    def initialise(self) -> None:
        """Set the seed and fill every slot that an init graph gives; then let those graphs go.

        A job that resumes writes its state slots after this.
        """
        words = struct.pack("<2I", SEED_HASH, self._work.seed)
        for slot, param in enumerate(self._work.params):
            if param.role == ROLE_SEED:
                self.write(slot, 0, words[: size_bytes(param)])
        for graph, bound in self._inits.items():
            bound.run()
            for slot, param in enumerate(self._work.params):
                if isinstance(param.source, InitSource) and param.source.graph == graph:
                    self.write(slot, 0, bound.output(param.source.output))
        self._inits = {}

    def step(self, number: int) -> None:
        """Run the phases that are due at step ``number``, counted from the start of the work."""
        word = (number % 2**64).to_bytes(8, "little")
        for memory in self._steps:
            memory.write(0, word[: memory.size_bytes])
        ran = []
        for index, (phase, bound) in enumerate(self._phases):
            if is_due(phase, number):
                bound.run()
                ran.append(index)
        self._ran = ran
        self._ever.update(ran)

    def scalars(self) -> list[tuple[int, int, bytes]]:
        """``(phase, output, value)`` of every traced output of the last step, values in bytes."""
        return [
            (index, output, bytes(self._phases[index][1].output(output)))
            for index in self._ran
            for output, mode in enumerate(self._phases[index][0].modes)
            if mode == MODE_TRACE
        ]

    def should_stop(self, number: int) -> bool:
        """Whether the work's stop output says to end after step ``number``, the last that ran.

        It is looked at where its phase ran: what ran before is forgotten by a run that resumes.
        """
        stop = self._work.stop
        if stop is None or (number + 1) % stop.every or stop.phase not in self._ran:
            return False
        value = self.read_output(stop.phase, stop.output)
        return value is not None and any(value)

    def read(self, slot: int) -> memoryview:
        """The bytes of a slot; they may change with the next step. Raises ProtocolError."""
        memory = self._slots[self._known(slot)]
        return memory.read(0, memory.size_bytes)

    def read_output(self, phase: int, output: int) -> memoryview | None:
        """The last value of a fresh output, or None if its phase has not run yet."""
        if not 0 <= phase < len(self._phases):
            raise ProtocolError(f"there is no phase {phase}")
        if not 0 <= output < len(self._phases[phase][0].modes):
            raise ProtocolError(f"phase {phase} has no output {output}")
        if phase not in self._ever:
            return None
        return self._phases[phase][1].output(output)

    def _known(self, slot: int) -> int:
        if not 0 <= slot < len(self._slots):
            raise ProtocolError(f"there is no slot {slot}")
        return slot

    def close(self) -> None:
        """Let the memory go. Nothing else may be called after it."""
        self._phases, self._steps, self._slots, self._inits = [], [], [], {}


def size_bytes(param: WorkParam) -> int:
    """Bytes of the tensor of ``param``."""
    count = ITEM_BYTES[Dtype(param.dtype)]
    for dim in param.shape:
        count *= dim
    return count


def _check_outputs(number: int, phase: Phase, plan: Plan) -> None:
    if len(plan.outputs) != len(phase.modes):
        raise ProtocolError(
            f"phase {number} keeps {len(phase.modes)} outputs, its plan gives {len(plan.outputs)}"
        )
