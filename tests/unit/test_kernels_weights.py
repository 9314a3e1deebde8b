"""Weights that are read when they are needed: by a kernel here, for an address, or to be sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes, nn

import p2pflop as pf
from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError, JobError
from p2pflop.job.graph import Dtype
from p2pflop.job.spec import ROLE_INPUT, ROLE_STATE, BlobSource
from p2pflop.kernels.weights import Stored, lazy_tensor

Array = np.ndarray[Any, Any]
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


class Shelf:
    """Bytes that are counted when they are taken."""

    def __init__(self, array: Array, *, named: bool = False) -> None:
        self.taken = 0
        self.data = array.tobytes()
        address = address_of(self.data) if named else None
        stored = Stored(self.take, len(self.data), address)
        self.tensor = lazy_tensor(stored, Dtype.FLOAT32, array.shape)

    def take(self) -> bytes:
        self.taken += 1
        return self.data


def sources(job: pf.Job) -> dict[str, Any]:
    return {
        name: param.source
        for name, param in zip(job.file.labels.params, job.checked.work.params, strict=True)
    }


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda t: t.numpy(), VALUES),
        (lambda t: (t * 2).numpy(), VALUES * 2),
        (lambda t: t[1:, 1].numpy(), VALUES[1:, 1]),
        (lambda t: np.array(t.to("PYTHON").tolist()), VALUES),
        (lambda t: t.assign(t + 1).numpy(), VALUES + 1),
        (lambda t: np.array(t.tolist()), VALUES),
    ],
)
def test_a_program_here_sees_an_ordinary_tensor(
    use: Callable[[Tensor], Array], expected: Array
) -> None:
    shelf = Shelf(VALUES)
    shelf.tensor.realize()
    assert shelf.taken == 0, "there is nothing to compute yet"
    assert np.array_equal(use(shelf.tensor), expected)
    assert shelf.taken == 1


def test_loading_a_model_reads_nothing_and_tracing_reads_once() -> None:
    weight, bias = Shelf(VALUES), Shelf(np.ones(3, np.float32))
    layer = nn.Linear(4, 3)
    loaded = {"weight": weight.tensor, "bias": bias.tensor}
    nn.state.load_state_dict(layer, loaded, verbose=False)
    assert (weight.taken, bias.taken) == (0, 0)
    x = Tensor(np.ones((1, 4), np.float32)).realize()
    job = pf.trace(lambda: {"y": layer(x)}, steps=1)
    assert (weight.taken, bias.taken) == (1, 1)
    assert sources(job)["layer.weight"] == BlobSource(address_of(VALUES.tobytes()), 48)
    assert job.inputs[address_of(VALUES.tobytes())] == VALUES.tobytes()
    assert weight.taken == 2
    assert np.allclose(job.run_local()["y"], VALUES.sum(1) + 1)


def test_what_has_an_address_is_not_read_at_all() -> None:
    shelf = Shelf(VALUES, named=True)
    job = pf.trace(lambda: {"y": shelf.tensor.sum(0)}, steps=1)
    assert shelf.taken == 0
    assert [p.role for p in job.checked.work.params] == [ROLE_INPUT]
    assert list(job.inputs) == [address_of(VALUES.tobytes())]


def test_what_is_assigned_to_is_state_that_starts_there() -> None:
    shelf = Shelf(VALUES)
    weight = shelf.tensor

    def step() -> dict[str, Tensor]:
        weight.assign(weight + 1)
        return {"sum": weight.sum()}

    job = pf.trace(step, steps=3)
    assert [param.role for param in job.checked.work.params] == [ROLE_STATE]
    result = job.run_local()
    assert np.array_equal(result.state["weight"], VALUES + 3)
    assert np.array_equal(weight.numpy(), VALUES)


def test_what_was_changed_here_travels_as_it_is_now() -> None:
    shelf = Shelf(VALUES)
    shelf.tensor.assign(shelf.tensor * 3).realize()
    job = pf.trace(lambda: {"y": shelf.tensor + 0.5}, steps=1)
    assert list(job.inputs) == [address_of((VALUES * 3).tobytes())]


def test_bytes_that_change_after_tracing_are_noticed() -> None:
    shelf = Shelf(VALUES)
    job = pf.trace(lambda: {"y": shelf.tensor + 0.5}, steps=1)
    shelf.data = bytes(48)
    with pytest.raises(JobError, match="has changed since the job was traced with it"):
        job.run_local()


# Files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {
        "table": Tensor(VALUES),
        "half": Tensor(VALUES + 100).cast(dtypes.float16),
        "wide": Tensor(VALUES - 100).cast(dtypes.bfloat16),
        "ids": Tensor(np.arange(5, dtype=np.int64)),
    }
    found = tmp_path / "net.safetensors"
    nn.state.safe_save({name: tensor.realize() for name, tensor in tensors.items()}, str(found))
    return found


def test_each_tensor_of_a_file_travels_by_itself(path: Path) -> None:
    path.chmod(0o400)
    net = pf.load_safetensors(path)
    assert {name: (t.dtype, t.shape) for name, t in net.items()} == {
        "table": (dtypes.float32, (3, 4)),
        "half": (dtypes.float16, (3, 4)),
        "wide": (dtypes.bfloat16, (3, 4)),
        "ids": (dtypes.int64, (5,)),
    }

    def look() -> dict[str, Tensor]:
        return {"sum": net["table"] + net["half"].float() + net["wide"].float()}

    job = pf.trace(look, steps=1)
    assert sorted(sources(job)) == ["net.half", "net.table", "net.wide"]
    assert {source.size_bytes for source in sources(job).values()} == {48, 24}
    assert np.array_equal(job.run_local()["sum"], VALUES * 3)
    assert np.array_equal(net["ids"].numpy(), np.arange(5))


def test_a_file_that_goes_away_is_one_error(path: Path) -> None:
    net = pf.load_safetensors(str(path))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="has become shorter"):
        pf.trace(lambda: {"y": net["ids"] + net["table"].sum().cast(dtypes.int64)}, steps=1)
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        net["table"].numpy()
    with pytest.raises(ConfigError, match="neither a file nor a blob"):
        pf.load_safetensors(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        pf.load_safetensors(path)


# tinygrad's own tensors on disk


def as_loaded(table: Tensor) -> Tensor:
    return table.to("CPU")


@pytest.mark.parametrize(
    ("make", "use", "travels"),
    [
        (as_loaded, lambda t: t + 0, VALUES),
        (lambda table: table, lambda t: t.to("CPU") + 0, VALUES),
        (lambda table: table[1:].to("CPU"), lambda t: t + 0, VALUES[1:]),
        (lambda table: table[1, 1:3], lambda t: t.to("CPU") + 0, VALUES[1, 1:3]),
        (lambda table: table.to("CPU").T.half(), lambda t: t + 0, VALUES),
        (as_loaded, lambda t: t[:2] + t[1:], VALUES),
    ],
)
def test_views_of_a_file_travel_as_the_slices_that_they_are(
    path: Path, make: Callable[[Tensor], Tensor], use: Callable[[Tensor], Tensor], travels: Array
) -> None:
    tensor = make(nn.state.safe_load(path)["table"])
    job = pf.trace(lambda: {"y": use(tensor)}, steps=1)
    assert list(job.inputs) == [address_of(travels.tobytes())]
    assert job.run_local()["y"].shape == use(tensor).shape
    assert np.array_equal(job.run_local()["y"], use(make(Tensor(VALUES))).numpy())


def test_columns_of_a_file_are_cut_where_the_job_runs(path: Path) -> None:
    table = nn.state.safe_load(path)["table"]
    column = table[:, 1:3].to("CPU")
    job = pf.trace(lambda: {"y": column + 0}, steps=1)
    assert list(job.inputs) == [address_of(VALUES.tobytes())]
    assert np.array_equal(job.run_local()["y"], VALUES[:, 1:3])


@pytest.mark.parametrize("realize", [True, False])
def test_a_model_loaded_by_tinygrad_can_be_trained_further(tmp_path: Path, realize: bool) -> None:
    saved = tmp_path / "layer.safetensors"
    start = {"weight": Tensor(VALUES), "bias": Tensor(np.ones(3, np.float32))}
    nn.state.safe_save(start, str(saved))
    layer = nn.Linear(4, 3)
    loaded = nn.state.safe_load(saved)
    nn.state.load_state_dict(layer, loaded, verbose=False, realize=realize)
    opt = nn.optim.SGD([layer.weight, layer.bias], lr=0.5)
    x = Tensor(np.ones((1, 4), np.float32)).realize()

    def step() -> dict[str, Tensor]:
        opt.zero_grad()
        loss = layer(x).sum().backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    result = pf.trace(step, steps=2).run_local()
    assert np.array_equal(result.state["layer.weight"], VALUES - 1)
    assert np.array_equal(result.state["layer.bias"], np.zeros(3))
