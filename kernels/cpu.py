"""Plans in this process: kernels linked into executable memory, a step a loop over bound C calls.

Addresses are bound to each call once, so that nothing is left to decide: no scheduling, no
compiling, no file, no tinygrad graph.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Final, cast

from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.runtime.support.elf import jit_loader

from p2pflop.errors import ProtocolError
from p2pflop.kernels.machine import (
    Calls,
    Memory,
    Slice,
    no_memory,
    output_region,
    slot_slice,
)
from p2pflop.kernels.plan import SCRATCH, THREAD, Kernel, Plan, Region, align, scratch_bytes

KERNEL_ALIGN_BYTES: Final = 64
_Scalar = int | ctypes.c_uint64


class CpuMemory:
    """Zeroed pages. An empty tensor gets one byte."""

    def __init__(self, size_bytes: int, *, executable: bool = False) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if executable:
            protection |= mmap.PROT_EXEC
        try:
            self._pages = mmap.mmap(
                -1, max(size_bytes, 1), mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE, protection
            )
        except (OSError, OverflowError) as error:
            raise no_memory(size_bytes, error) from error
        self._view = memoryview(self._pages)[:size_bytes]
        self.size_bytes = size_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """See Memory."""
        self._view[offset_bytes : offset_bytes + len(data)] = data

    def read(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """See Memory. Not a copy."""
        return self._view[offset_bytes : offset_bytes + size_bytes]


class CpuMachine:
    """See Machine. With ``assembled`` kernels are machine code as it is, without a linker."""

    def __init__(self, *, assembled: bool = False) -> None:
        self._assembled = assembled

    def memory(self, size_bytes: int) -> CpuMemory:
        """See Machine."""
        return CpuMemory(size_bytes)

    def scratch(self, plans: Sequence[Plan]) -> CpuMemory:
        """See Machine. All share one area."""
        return CpuMemory(max(scratch_bytes(plan) for plan in plans))

    def load(self, plan: Plan) -> _Loaded:
        """See Machine."""
        return _Loaded(plan, _as_it_is if self._assembled else _linked)


class _Loaded:
    """Kernels in executable memory, and each call as a function and what it takes of which buffer.

    A region that several calls take is one number, so that a binding makes it once.
    """

    def __init__(self, plan: Plan, image: Callable[[Kernel, int], bytes]) -> None:
        self._buffers = plan.buffers
        self._outputs = plan.outputs
        functions, self._code = _link(plan.kernels, image)
        regions: dict[tuple[int, int], int] = {}
        self._variables = len(plan.ranges)
        # A function, the regions that it takes, and the scalars: a Variable's number or a thread's.
        self._calls: list[tuple[Callable[..., None], tuple[int, ...], list[_Scalar]]] = []
        for call in plan.calls:
            if call.grid:
                raise ProtocolError("the plan is for another kind of device")
            taken = tuple(
                regions.setdefault((region.buffer, region.offset_bytes), len(regions))
                for region in call.regions
            )
            function = functions[call.kernel]
            for thread in range(call.threads):
                scalars: list[_Scalar] = [
                    ctypes.c_uint64(thread) if scalar == THREAD else scalar
                    for scalar in plan.kernels[call.kernel].scalars
                ]
                self._calls.append((function, taken, scalars))
        self._regions = tuple(regions)

    def bind(self, slots: Sequence[Slice], scratch: Memory) -> _Bound:
        """See Loaded."""
        held = cast(Sequence[tuple[CpuMemory, int]], slots)
        shared = cast(CpuMemory, scratch)
        memories: list[CpuMemory] = []
        addresses: list[int] = []
        used = 0
        for buffer in self._buffers:
            memory, offset_bytes = shared, used
            if buffer.slot == SCRATCH:
                used += align(buffer.size_bytes)
            elif buffer.slot >= 0:
                memory, offset_bytes = slot_slice(held, buffer.slot, buffer.size_bytes)
            else:
                memory, offset_bytes = CpuMemory(buffer.size_bytes), 0
            memories.append(memory)
            addresses.append(memory.address + offset_bytes)
        if used > shared.size_bytes:
            raise ProtocolError(f"plan takes {used} bytes of scratch for {shared.size_bytes}")
        pointers = [ctypes.c_uint64(addresses[buffer] + at) for buffer, at in self._regions]
        variables = [ctypes.c_uint64() for _ in range(self._variables)]
        calls: Calls = [
            functools.partial(
                function,
                *[pointers[number] for number in taken],
                *[variables[each] if isinstance(each, int) else each for each in scalars],
            )
            for function, taken, scalars in self._calls
        ]
        return _Bound(calls, self._outputs, memories, variables, self)


class _Bound:
    """See machine.Bound. It keeps the memory that its calls point into, and their code."""

    def __init__(
        self,
        calls: Calls,
        outputs: Sequence[Region],
        memories: list[CpuMemory],
        variables: Sequence[ctypes.c_uint64],
        loaded: _Loaded,
    ) -> None:
        self._calls = calls
        self._variables = variables
        self._outputs = outputs
        self._memories = memories
        self._loaded = loaded

    def run(self, values: Sequence[int] = ()) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.value = value
        for call in self._calls:
            call()

    def output(self, number: int) -> memoryview:
        region = output_region(self._outputs, number)
        return self._memories[region.buffer].read(region.offset_bytes, region.size_bytes)


def _link(
    kernels: Sequence[Kernel], image: Callable[[Kernel, int], bytes]
) -> tuple[list[Callable[..., None]], CpuMemory]:
    """The kernels as functions, and the memory that they lie in."""
    code = CpuMemory(sum(_code_bytes(kernel) for kernel in kernels), executable=True)
    functions: list[Callable[..., None]] = []
    offset = 0
    for kernel in kernels:
        address = code.address + offset
        linked = image(kernel, address)
        if len(linked) > _code_bytes(kernel):
            raise ProtocolError(f"kernel {kernel.name[:80]} is larger than its object file")
        code.write(offset, linked)
        functions.append(ctypes.CFUNCTYPE(None)(address))
        offset += _code_bytes(kernel)
    return functions, code


def _as_it_is(kernel: Kernel, _address: int) -> bytes:
    return kernel.binary


def _linked(kernel: Kernel, address: int) -> bytes:
    try:
        libraries = [CPUProgram.libm, CPUProgram.rt_lib]
        return bytes(jit_loader(kernel.binary, base=address, link_libs=libraries))
    # The loader parses by hand: any malformed object ends in one of many exceptions.
    except Exception as error:
        raise ProtocolError(f"kernel {kernel.name[:80]} does not link: {error}") from error


def _code_bytes(kernel: Kernel) -> int:
    # The linked image is sections of the object file without its headers and tables.
    return -(-len(kernel.binary) // KERNEL_ALIGN_BYTES) * KERNEL_ALIGN_BYTES
