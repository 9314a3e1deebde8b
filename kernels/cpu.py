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
from p2pflop.kernels.machine import Calls, Memory, no_memory, output_region, slot_memory
from p2pflop.kernels.plan import SCRATCH, Kernel, Plan, Region, align, scratch_bytes

KERNEL_ALIGN_BYTES: Final = 64


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

    def bind(self, plan: Plan, slots: Sequence[Memory], scratch: Memory) -> _Bound:
        """See Machine."""
        held = cast(Sequence[CpuMemory], slots)
        image = _as_it_is if self._assembled else _linked
        return _Bound(plan, held, cast(CpuMemory, scratch), image)


class _Bound:
    def __init__(
        self,
        plan: Plan,
        slots: Sequence[CpuMemory],
        scratch: CpuMemory,
        image: Callable[[Kernel, int], bytes],
    ) -> None:
        self._image = image
        self._keep: list[CpuMemory] = [scratch]
        self._addresses: list[int] = []
        self._memories: list[CpuMemory] = []
        used = 0
        for buffer in plan.buffers:
            memory, address = scratch, scratch.address + used
            if buffer.slot == SCRATCH:
                used += align(buffer.size_bytes)
            else:
                memory = (
                    slot_memory(slots, buffer.slot, buffer.size_bytes)
                    if buffer.slot >= 0
                    else CpuMemory(buffer.size_bytes)
                )
                address = memory.address
            self._memories.append(memory)
            self._addresses.append(address)
        self._outputs = plan.outputs
        self._calls = self._bind(plan)

    def run(self) -> None:
        for call in self._calls:
            call()

    def output(self, number: int) -> memoryview:
        region = output_region(self._outputs, number)
        return self._memories[region.buffer].read(region.offset_bytes, region.size_bytes)

    def _bind(self, plan: Plan) -> Calls:
        functions = self._link(plan.kernels)
        calls: Calls = []
        for call in plan.calls:
            if call.grid:
                raise ProtocolError("the plan is for another kind of device")
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
        code = CpuMemory(room, executable=True)
        self._keep.append(code)
        functions: list[Callable[..., None]] = []
        offset = 0
        for kernel in kernels:
            address = code.address + offset
            image = self._image(kernel, address)
            if len(image) > _code_bytes(kernel):
                raise ProtocolError(f"kernel {kernel.name[:80]} is larger than its object file")
            code.write(offset, image)
            functions.append(ctypes.CFUNCTYPE(None)(address))
            offset += _code_bytes(kernel)
        return functions


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
