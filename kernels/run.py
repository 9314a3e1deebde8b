"""Running a work from its plans: fixed addresses, a flat list of calls, nothing left to decide.

A session maps one buffer a slot, one scratch area that all plans share (phases run one after the
other, and scratch never outlives its phase), and one a fresh output. It links every kernel into
executable memory and binds the addresses to each call once, so that a step is a loop over bound C
calls: no scheduling, no compiling, no file, no tinygrad graph. State is written in place.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable, Mapping
from typing import Final

from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.runtime.support.elf import jit_loader

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.graph import Dtype
from p2pflop.job.shapes import ITEM_BYTES
from p2pflop.job.spec import (
    MODE_TRACE,
    ROLE_SEED,
    ROLE_STEP,
    InitSource,
    Phase,
    Work,
    WorkParam,
    is_due,
)
from p2pflop.kernels.plan import SCRATCH, Kernel, Plan, Region, align, decode_plan, scratch_bytes

# The first of the two words that tinygrad's random numbers of a device start from: the low 32 bits
# of sha256 of the device's number in four bytes, number 0 (Tensor._next_counter).
SEED_HASH: Final = 0x14B81119
KERNEL_ALIGN_BYTES: Final = 64


class Session:
    """One work in memory, ready to step. Not thread-safe.

    ``plans`` maps the hash of every graph of the work (phases and init graphs) to its plan.
    Raises ProtocolError if a plan is malformed or does not fit the work, JobError if memory is
    short. A fault of the compiled code (SIGFPE, SIGSEGV) kills the process.
    """

    def __init__(self, work: Work, plans: Mapping[bytes, bytes]) -> None:
        self._work = work
        inits = {
            param.source.graph for param in work.params if isinstance(param.source, InitSource)
        }
        decoded: dict[bytes, Plan] = {}
        for graph in sorted({phase.graph for phase in work.phases} | inits):
            if graph not in plans:
                raise ProtocolError(f"no plan for graph {graph.hex()}")
            decoded[graph] = decode_plan(plans[graph])
        self._slots = [_Memory(size_bytes(param)) for param in work.params]
        scratch = _Memory(max(scratch_bytes(plan) for plan in decoded.values()))
        # Two phases may share a graph, but not the memory of its outputs: so one for each.
        self._phases = [
            _load_phase(number, phase, _Loaded(decoded[phase.graph], self._slots, scratch))
            for number, phase in enumerate(work.phases)
        ]
        self._inits = {
            graph: _Loaded(decoded[graph], self._slots, scratch) for graph in sorted(inits)
        }
        self._steps = [
            self._slots[slot] for slot, param in enumerate(work.params) if param.role == ROLE_STEP
        ]
        self._ran: list[int] = []
        self._ever: set[int] = set()

    def write(self, slot: int, offset_bytes: int, data: bytes | memoryview) -> None:
        """Put ``data`` into a slot. Raises ProtocolError if it does not fit."""
        view = self.read(slot)
        if offset_bytes < 0 or offset_bytes + len(data) > len(view):
            raise ProtocolError(f"{len(data)} bytes at {offset_bytes} do not fit slot {slot}")
        view[offset_bytes : offset_bytes + len(data)] = data

    def initialise(self) -> None:
        """Set the seed and fill every slot that an init graph gives; then let those graphs go.

        A job that resumes writes its state slots after this.
        """
        words = struct.pack("<2I", SEED_HASH, self._work.seed)
        for slot, param in enumerate(self._work.params):
            if param.role == ROLE_SEED:
                self.write(slot, 0, words[: size_bytes(param)])
        for graph, loaded in self._inits.items():
            loaded.run()
            for slot, param in enumerate(self._work.params):
                if isinstance(param.source, InitSource) and param.source.graph == graph:
                    self.write(slot, 0, loaded.output(param.source.output))
        self._inits = {}

    def step(self, number: int) -> None:
        """Run the phases that are due at step ``number``, counted from the start of the work."""
        word = (number % 2**64).to_bytes(8, "little")
        for memory in self._steps:
            size = min(len(word), len(memory.view))
            memory.view[:size] = word[:size]
        ran = []
        for index, (phase, loaded) in enumerate(self._phases):
            if is_due(phase, number):
                loaded.run()
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
        """Whether the work's stop output, looked at after step ``number``, says to end."""
        stop = self._work.stop
        if stop is None or (number + 1) % stop.every or stop.phase not in self._ever:
            return False
        value = self.read_output(stop.phase, stop.output)
        return value is not None and any(value)

    def read(self, slot: int) -> memoryview:
        """The memory of a slot; it changes with the next step. Raises ProtocolError."""
        if not 0 <= slot < len(self._slots):
            raise ProtocolError(f"there is no slot {slot}")
        return self._slots[slot].view

    def read_output(self, phase: int, output: int) -> memoryview | None:
        """The last value of a fresh output, or None if its phase has not run yet."""
        if not 0 <= phase < len(self._phases):
            raise ProtocolError(f"there is no phase {phase}")
        if not 0 <= output < len(self._phases[phase][0].modes):
            raise ProtocolError(f"phase {phase} has no output {output}")
        if phase not in self._ever:
            return None
        return self._phases[phase][1].output(output)

    def close(self) -> None:
        """Let the memory go. Nothing else may be called after it."""
        self._phases, self._steps, self._slots, self._inits = [], [], [], {}


def size_bytes(param: WorkParam) -> int:
    """Bytes of the tensor of ``param``."""
    count = ITEM_BYTES[Dtype(param.dtype)]
    for dim in param.shape:
        count *= dim
    return count


class _Memory:
    """Zeroed pages that live as long as the object. An empty tensor gets one byte."""

    def __init__(self, size_bytes: int, *, executable: bool = False) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if executable:
            protection |= mmap.PROT_EXEC
        try:
            self._pages = mmap.mmap(
                -1, max(size_bytes, 1), mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE, protection
            )
        except (OSError, OverflowError) as error:
            raise JobError(
                f"no memory for a buffer of {size_bytes} bytes: {error}",
                hint="Ask for a provider with more memory, or make the tensors smaller.",
            ) from error
        self.view = memoryview(self._pages)[:size_bytes]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))


class _Loaded:
    """A plan with its kernels linked and its calls bound to addresses."""

    def __init__(self, plan: Plan, slots: list[_Memory], scratch: _Memory) -> None:
        self._keep: list[_Memory] = [scratch]
        self._addresses: list[int] = []
        self._memories: list[_Memory] = []
        used = 0
        for buffer in plan.buffers:
            memory, address = scratch, scratch.address + used
            if buffer.slot == SCRATCH:
                used += align(buffer.size_bytes)
            elif buffer.slot >= 0:
                memory, address = _slot_memory(slots, buffer.slot, buffer.size_bytes)
            else:
                memory = _Memory(buffer.size_bytes)
                address = memory.address
            self._memories.append(memory)
            self._addresses.append(address)
        self.outputs = plan.outputs
        self._calls = self._bind(plan)

    def run(self) -> None:
        for call in self._calls:
            call()

    def output(self, number: int) -> memoryview:
        if number >= len(self.outputs):
            raise ProtocolError(f"plan has no output {number}")
        region = self.outputs[number]
        view = self._memories[region.buffer].view
        return view[region.offset_bytes : region.offset_bytes + region.size_bytes]

    def _bind(self, plan: Plan) -> list[Callable[[], None]]:
        functions = self._link(plan.kernels)
        calls: list[Callable[[], None]] = []
        for call in plan.calls:
            arguments = [ctypes.c_uint64(self._address(region)) for region in call.regions]
            function = functions[call.kernel]
            if not plan.kernels[call.kernel].threaded:
                calls.append(functools.partial(function, *arguments))
                continue
            calls.extend(
                functools.partial(function, *arguments, ctypes.c_uint64(thread))
                for thread in range(call.threads)
            )
        return calls

    def _address(self, region: Region) -> int:
        return self._addresses[region.buffer] + region.offset_bytes

    def _link(self, kernels: tuple[Kernel, ...]) -> list[Callable[..., None]]:
        room = sum(_code_bytes(kernel) for kernel in kernels)
        code = _Memory(room, executable=True)
        self._keep.append(code)
        functions: list[Callable[..., None]] = []
        offset = 0
        for kernel in kernels:
            address = code.address + offset
            try:
                image = jit_loader(
                    kernel.binary, base=address, link_libs=[CPUProgram.libm, CPUProgram.rt_lib]
                )
            # The loader parses by hand: any malformed object ends in one of many exceptions.
            except Exception as error:
                raise ProtocolError(f"kernel {kernel.name[:80]} does not link: {error}") from error
            if len(image) > _code_bytes(kernel):
                raise ProtocolError(f"kernel {kernel.name[:80]} is larger than its object file")
            code.view[offset : offset + len(image)] = image
            functions.append(ctypes.CFUNCTYPE(None)(address))
            offset += _code_bytes(kernel)
        return functions


def _load_phase(number: int, phase: Phase, loaded: _Loaded) -> tuple[Phase, _Loaded]:
    if len(loaded.outputs) != len(phase.modes):
        raise ProtocolError(
            f"phase {number} keeps {len(phase.modes)} outputs, its plan gives {len(loaded.outputs)}"
        )
    return phase, loaded


def _code_bytes(kernel: Kernel) -> int:
    # The linked image is sections of the object file without its headers and tables.
    return -(-len(kernel.binary) // KERNEL_ALIGN_BYTES) * KERNEL_ALIGN_BYTES


def _slot_memory(slots: list[_Memory], slot: int, size_bytes: int) -> tuple[_Memory, int]:
    if slot >= len(slots):
        raise ProtocolError(f"plan names slot {slot}, the work has {len(slots)}")
    memory = slots[slot]
    if len(memory.view) != size_bytes:
        raise ProtocolError(
            f"plan takes slot {slot} for {size_bytes} bytes, the work has {len(memory.view)}"
        )
    return memory, memory.address
