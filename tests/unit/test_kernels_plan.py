"""Plans: one encoding, and every number in them fits."""

from __future__ import annotations

import msgspec
import pytest

from p2pflop.errors import ProtocolError
from p2pflop.job.limits import MAX_VARIABLES
from p2pflop.job.symbolic import Range
from p2pflop.kernels.plan import (
    FRESH,
    MAX_ARGUMENTS,
    MAX_BUFFER_BYTES,
    MAX_BUFFERS,
    MAX_CALLS,
    MAX_KERNEL_BYTES,
    MAX_KERNELS,
    MAX_THREADS,
    SCRATCH,
    SCRATCH_ALIGN_BYTES,
    THREAD,
    Call,
    Kernel,
    Plan,
    PlanBuffer,
    Region,
    decode_plan,
    encode_plan,
    scratch_bytes,
)
from p2pflop.wire import encode

KERNEL = Kernel("add", b"\x7fELF", 2)
BUFFERS = (PlanBuffer(3, 64), PlanBuffer(SCRATCH, 100), PlanBuffer(FRESH, 4))
CALL = Call(0, (Region(2, 0, 4), Region(0, 60, 4)), 1)
PLAN = Plan(5, (KERNEL,), BUFFERS, (CALL,), (Region(2, 0, 4),), 10, 20)


def replaced(**changes: object) -> bytes:
    return encode(msgspec.structs.replace(PLAN, **changes))


def test_a_plan_survives_its_encoding() -> None:
    assert decode_plan(encode_plan(PLAN)) == PLAN


def test_scratch_is_rounded_up_and_counts_nothing_else() -> None:
    assert scratch_bytes(PLAN) == SCRATCH_ALIGN_BYTES


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\xc1",
        encode(PLAN)[:-1],
        encode(PLAN) + b"\0",
        replaced(version=1),
        replaced(calls=(Call(1, CALL.regions, 1),)),
        replaced(calls=(Call(0, CALL.regions[:1], 1),)),
        replaced(calls=(Call(0, CALL.regions, 2),)),
        replaced(calls=(Call(0, (Region(2, 0, 4), Region(3, 0, 4)), 1),)),
        replaced(calls=(Call(0, (Region(2, 0, 4), Region(0, 61, 4)), 1),)),
        replaced(calls=(Call(0, (Region(2, 0, 4), Region(0, 2**62, 4)), 1),)),
        replaced(calls=(Call(0, (Region(2, 0, 4), Region(0, 0, 0)), 1),)),
        replaced(outputs=(Region(2, 1, 4),)),
        replaced(outputs=(Region(1, 0, 4),)),
        replaced(buffers=(*BUFFERS, PlanBuffer(3, 64))),
        replaced(buffers=(PlanBuffer(-3, 64), *BUFFERS[1:])),
        replaced(buffers=(PlanBuffer(3, MAX_BUFFER_BYTES + 1), *BUFFERS[1:])),
        replaced(kernels=(Kernel("add", b"", 2),)),
        replaced(kernels=(Kernel("add", b"\x7fELF", 2, (0,)),)),
        replaced(kernels=(Kernel("add", b"\x7fELF", 2, (1,)),), ranges=(Range(0, 7),)),
        replaced(kernels=(Kernel("add", b"\x7fELF", 2, (THREAD - 1,)),), ranges=(Range(0, 7),)),
        replaced(ranges=(Range(0, 7),) * (MAX_VARIABLES + 1)),
        replaced(kernels=(Kernel("add", b"\x7fELF", MAX_ARGUMENTS + 1),)),
    ],
)
def test_a_hostile_plan_is_refused(hostile: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_plan(hostile)


def test_a_kernel_takes_variables_of_its_plan_and_a_thread() -> None:
    kernel = Kernel("add", b"\x7fELF", 2, (1, THREAD, 0))
    plan = decode_plan(replaced(kernels=(kernel,), ranges=(Range(0, 7), Range(2, 3))))
    assert plan.kernels[0].threaded
    assert not KERNEL.threaded


def test_threads_up_to_the_limit_are_taken_by_a_threaded_kernel() -> None:
    kernels = (Kernel("add", b"\x7fELF", 2, (THREAD,)),)

    def with_threads(threads: int) -> bytes:
        return replaced(kernels=kernels, calls=(Call(0, CALL.regions, threads),))

    assert decode_plan(with_threads(MAX_THREADS)).calls[0].threads == MAX_THREADS
    with pytest.raises(ProtocolError):
        decode_plan(with_threads(MAX_THREADS + 1))


def test_a_buffer_may_be_as_large_as_the_limit() -> None:
    buffers = (PlanBuffer(3, MAX_BUFFER_BYTES), *BUFFERS[1:])
    assert decode_plan(replaced(buffers=buffers)).buffers[0].size_bytes == MAX_BUFFER_BYTES


def test_each_list_may_be_as_long_as_its_limit() -> None:
    longest = {
        "kernels": (KERNEL,) * MAX_KERNELS,
        "buffers": BUFFERS + (PlanBuffer(SCRATCH, 1),) * (MAX_BUFFERS - len(BUFFERS)),
        "calls": (CALL,) * MAX_CALLS,
        "outputs": PLAN.outputs * MAX_BUFFERS,
    }
    for name, values in longest.items():
        assert decode_plan(replaced(**{name: values}))
        with pytest.raises(ProtocolError):
            decode_plan(replaced(**{name: (*values, values[-1])}))


def test_a_kernel_may_be_as_large_as_the_limit() -> None:
    for size, fits in ((MAX_KERNEL_BYTES, True), (MAX_KERNEL_BYTES + 1, False)):
        data = replaced(kernels=(Kernel("add", bytes(size), 2),))
        if fits:
            assert decode_plan(data)
        else:
            with pytest.raises(ProtocolError):
                decode_plan(data)
