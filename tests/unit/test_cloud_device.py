"""Device CLOUD as a script sees it, with a twin of a node in this process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, Variable, dtypes
from tinygrad.device import BufferSpec, Device
from tinygrad.function import function
from tinygrad.helpers import DEBUG, Context, GlobalCounters
from tinygrad.nn.state import safe_load, safe_save
from tinygrad.uop.ops import KernelInfo, UOp

from p2pflop.cloud import process
from p2pflop.cloud.device import cloud
from p2pflop.cloud.session import ScriptSession
from p2pflop.errors import JobError
from tests.cloud_twin import Twin, TwinLink, shared_twin

CLOUD = f"CLOUD;{os.environ['DEV']}"


@pytest.fixture(autouse=True)
def twin() -> Iterator[Twin]:
    """The twin, with CLOUD as the default device."""
    with Context(DEV=CLOUD):
        yield shared_twin()


def session() -> ScriptSession:
    return cloud().session


def realized(*numbers: float) -> Tensor:
    return Tensor(list(numbers)).realize()


def test_what_is_on_no_device_is_computed_in_the_cloud(twin: Twin) -> None:
    tensor = Tensor.arange(4) * 2
    flop, reads = twin.table.flop, twin.reads
    assert tensor.tolist() == [0, 2, 4, 6]
    assert twin.table.flop > flop
    assert twin.reads == reads + 1
    assert (Tensor.ones(2) + 1).numpy().tolist() == [2, 2]
    assert Tensor(3).item() == 3


def test_one_read_back_is_one_exchange(twin: Twin) -> None:
    tensor = realized(1.0, 2.0)
    session().synchronize()
    batches, reads = twin.batches, twin.reads
    for _ in range(5):
        tensor = tensor * 2
    assert tensor.tolist() == [32, 64]
    assert twin.reads == reads + 1
    assert twin.batches <= batches + 2


def test_what_is_large_goes_as_a_blob(twin: Twin) -> None:
    numbers = np.arange(20_000, dtype=np.float32)
    before = twin.table.moved_bytes
    tensor = Tensor(numbers).realize()
    session().synchronize()
    assert numbers.tobytes() in twin.blobs.values()
    assert twin.table.moved_bytes == before + numbers.nbytes
    assert (tensor.numpy() == numbers).all()


def test_a_loop_without_a_jit_comes_to_say_few_things() -> None:
    weight = realized(1.0, 2.0, 3.0)
    spoken = []
    for _ in range(6):
        session().synchronize()
        before = session().count
        weight.assign(weight * 2 + 1).realize()
        (weight + 1).sum().realize()
        spoken.append(session().count - before)
    assert spoken[-1] == 2, "two runs of known bindings, in buffers that were used before"


def test_a_replayed_step_is_one_run() -> None:
    weight, rate = realized(1.0, 2.0), realized(0.5)

    @TinyJit
    def step(x: Tensor) -> Tensor:
        weight.assign(weight - rate * x).realize()
        return (weight * 2).sum().realize()

    inputs = [realized(float(n), 1.0) for n in range(3)]
    found = []
    for number in range(12):
        session().synchronize()
        before, sent = session().count, session().sent_bytes
        out = step(inputs[number % 3])
        found.append(session().count - before)
        session().synchronize()
        assert number < 6 or session().sent_bytes - sent < 60
        assert out.item() is not None
    assert found[-3:] == [2, 2, 2], "a run for each realize of the step"
    native = np.array([1.0, 2.0], np.float32)
    for number in range(12):
        native = native - np.float32(0.5) * np.array([number % 3, 1.0], np.float32)
    assert weight.tolist() == native.tolist()


def test_the_output_of_a_jit_may_be_its_next_input() -> None:
    @TinyJit
    def rotate(x: Tensor) -> Tensor:
        return (x.flip(0) + 1).realize()

    x = realized(1.0, 2.0)
    expected = np.array([1.0, 2.0])
    for _ in range(7):
        x, expected = rotate(x), expected[::-1] + 1
        assert x.tolist() == expected.tolist()


def test_a_jit_takes_views() -> None:
    @TinyJit
    def double(x: Tensor) -> Tensor:
        return (x * 2).realize()

    for first in range(6):
        rows = Tensor([[0, 0], [first, first + 1]]).realize()
        assert double(rows[1]).tolist() == [2 * first, 2 * first + 2]


def test_a_jit_takes_variables() -> None:
    table = Tensor(list(range(10))).realize()

    @TinyJit
    def pick(place: Variable) -> Tensor:
        return (table.shrink(((place, place + 1),)) + 1).realize()

    for number in (1, 3, 4, 2, 3):
        assert pick(Variable("place", 0, 9).bind(number)).item() == number + 1


def test_intermediates_of_a_jit_can_be_freed() -> None:
    state = realized(0.0, 0.0)

    @TinyJit
    def step() -> Tensor:
        state.assign(state + 1).realize()
        middle = (state * 3).realize()
        return (middle - state).realize()

    for _ in range(4):
        step()
    captured = step.captured
    assert captured is not None
    captured.free_intermediates()
    assert step().tolist() == [10, 10]
    assert state.tolist() == [5, 5]


def test_devices_are_one_session() -> None:
    first, second = realized(1.0, 2.0), Tensor([3.0, 4.0], device="CLOUD:1").realize()
    moved = second.to("CLOUD")
    assert (first + moved).tolist() == [4, 6]
    assert (first.to("CLOUD:1") * second).tolist() == [3, 8]
    assert moved.device == "CLOUD"
    with pytest.raises(RuntimeError, match="must be on the same device"):
        (first + second).realize()


def test_values_go_to_and_fro() -> None:
    x = Tensor([1.0, 2.0, 3.0])
    there = (x * 2).to("CPU") + Tensor([1.0, 1.0, 1.0], device="CPU")
    back = there.to("CLOUD") * x
    assert Tensor.stack(back, back + 1).tolist() == [[3, 10, 21], [4, 11, 22]]
    assert (Tensor([1, 2], device="CPU") * 2).to("CLOUD").tolist() == [2, 4]


def test_a_lazy_tensor_keeps_the_old_value_of_what_is_assigned() -> None:
    x = realized(1.0, 1.0)
    y = x + 1
    x.assign(Tensor(np.array([5, 6], np.float32)))
    Tensor.realize(y, x)
    assert (y.tolist(), x.tolist()) == ([2, 2], [5, 6])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safe_save({"a": Tensor([1.0, 2.0]) * 2, "b": Tensor([[3]])}, str(path))
    loaded = safe_load(str(path))
    assert (loaded["a"].to(None) + 1).tolist() == [3, 5]
    assert loaded["b"].to("CLOUD").tolist() == [[3]]
    (tmp_path / "bytes").write_bytes(bytes(range(8)))
    assert Tensor(tmp_path / "bytes")[2:4].to(None).tolist() == [2, 3]
    Tensor([7, 8]).to(f"disk:{tmp_path / 'out'}").realize()
    assert np.fromfile(tmp_path / "out", np.int32).tolist() == [7, 8]


@function
def _affine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b + 1


@function(precompile=True)
def _precompiled(a: Tensor, b: Tensor) -> Tensor:
    return a @ b + 2


def test_functions_are_put_in_where_they_are_called() -> None:
    a, b = Tensor.ones(2, 3).contiguous().realize(), Tensor.ones(3, 2).contiguous().realize()
    assert _affine(a, b).tolist() == [[4, 4], [4, 4]]
    assert _precompiled(a, b).tolist() == [[5, 5], [5, 5]]
    y = a + 1
    y.callify()
    assert y.tolist() == [[2, 2, 2], [2, 2, 2]]


def test_shifts_by_numbers_that_are_not_known() -> None:
    assert (Tensor([1, 2]) << Tensor([1, 2])).tolist() == [2, 8]


def _own_kernel(out: UOp, x: UOp) -> UOp:
    i = UOp.range(4, 0)
    return out[i].store(x[i] * 2).end(i).sink(arg=KernelInfo(name="own"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda x: Tensor.custom_kernel(Tensor.empty(4), x, fxn=_own_kernel)[0], "custom kernel"),
        (lambda x: x.shard(("CLOUD", "CLOUD:1"), 0) + 1, "sharded over several devices"),
        (lambda x: x.cast(dtypes.fp8e4m3), "fp8e4m3 cannot travel"),
        (lambda x: _chain(x, 600), "a chain of more than"),
    ],
)
def test_what_cannot_be_is_an_error_where_it_is_realized(
    make: object, told: str, twin: Twin
) -> None:
    assert callable(make)
    x = realized(1.0, 2.0, 3.0, 4.0)
    session().synchronize()
    before = session().count
    with pytest.raises(JobError, match=told) as caught:
        make(x).realize()
    assert caught.value.hint
    assert caught.traceback[0].path == Path(__file__)
    assert session().count == before, "nothing of it was sent"
    assert (x + 1).tolist() == [2, 3, 4, 5], "the session goes on"


def _chain(x: Tensor, length: int) -> Tensor:
    for number in range(length):
        x = x * (1 + number % 3) if number % 2 else x.maximum(number)
    return x


def test_too_much_memory_is_an_error_of_tinygrads_kind() -> None:
    with pytest.raises(MemoryError, match="set CLOUD_MEMORY to more"):
        Tensor.ones(3 * 2**30, dtype=dtypes.uint8).contiguous().realize()


def test_memory_is_used_again_before_it_is_said_to_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = cloud().memory
    monkeypatch.setattr(memory, "_limit_bytes", memory.held_bytes + 3_000_000)
    for size in range(1, 6):
        (Tensor.arange(250_000 * size // 3).contiguous() + 1).realize()
    assert memory.held_bytes <= memory._limit_bytes


def test_counters_are_the_providers() -> None:
    x = Tensor.ones(8, 8).contiguous().realize()
    session().synchronize()
    GlobalCounters.reset()
    (x @ x).realize()
    session().synchronize()
    assert GlobalCounters.kernel_count == 1
    assert GlobalCounters.global_ops >= 2 * 8 * 8 * 8 - 8 * 8
    assert GlobalCounters.global_mem >= 2 * 8 * 8 * 4
    assert 0 < GlobalCounters.time_sum_s < 10
    before = GlobalCounters.mem_used
    kept = Tensor.ones(100, dtype=dtypes.uint8).contiguous().realize()
    assert GlobalCounters.mem_used - before >= 100
    assert kept.device == "CLOUD"


def test_debug_prints_a_line_a_graph(capsys: pytest.CaptureFixture[str]) -> None:
    x = realized(1.0, 2.0)
    with Context(DEBUG=2):
        assert DEBUG.value == 2
        (x + 1).realize()
    lines = [line for line in capsys.readouterr().out.splitlines() if "graph of" in line]
    assert len(lines) == 1
    assert "*** CLOUD" in lines[0]
    assert "graph of 1 kernels" in lines[0]


def test_synchronizing_waits_for_all_that_was_asked() -> None:
    (realized(1.0) + 1).realize()
    Device["CLOUD"].synchronize()
    assert session()._window.covered == session().count
    assert process.is_open()


def test_threads_that_begin_together_have_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_cloud", None)
    links: list[TwinLink] = []

    def connect() -> tuple[TwinLink, process.BlobPutter]:
        links.append(TwinLink())
        time.sleep(0.05)  # the others come meanwhile
        return links[-1], links[-1].put_blob

    def begin(_: int) -> process.Cloud:
        return process.the_cloud(lambda _: None, connect=connect)

    with ThreadPoolExecutor(4) as pool:
        clouds = list(pool.map(begin, range(4)))
    assert len(links) == 1
    assert all(each is clouds[0] for each in clouds)


def test_threads_give_whole_commands_one_after_the_other(twin: Twin) -> None:
    """Each copies its own bytes to and fro; a command of another's in between would be seen."""
    allocator = Device["CLOUD"].allocator
    before = sys.getswitchinterval()

    def work(number: int) -> None:
        for step in range(40):
            data = bytes([number, step]) * (8 + step)
            first, second = (allocator.alloc(len(data), BufferSpec()) for _ in range(2))
            allocator._copyin(first, memoryview(data))
            allocator._transfer(second, first, len(data))
            found = bytearray(len(data))
            allocator._copyout(memoryview(found), second)
            assert found == data
            for region in (first, second):
                allocator.free(region, len(data), BufferSpec(nolru=step % 2 == 0))

    count = twin.table.count
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert twin.table.count >= count + 8 * 40 * 3
