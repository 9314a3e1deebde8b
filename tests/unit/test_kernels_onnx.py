"""ONNX models: traced by tinygrad's runner, checked before it has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import p2pflop as pf
from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError, JobError
from p2pflop.job.onnx import MAX_ONNX_DEPTH, MAX_ONNX_VALUES, check_onnx

Array = np.ndarray[Any, Any]

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)
WEIGHT = np.linspace(-2, 3, 12, dtype=np.float32).reshape(4, 3)
BIAS = np.array([0.5, -0.5, 0.25], np.float32)


def write(
    path: Path,
    nodes: Sequence[Any],
    weights: Mapping[str, Array],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    outputs: Sequence[str] = ("y",),
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """``y = relu(x @ weight + bias)`` for any number of rows; ``sum`` of it."""
    nodes = [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
        helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0),
    ]
    inputs = {"x": (TensorProto.FLOAT, ("rows", 4))}
    weights = {"weight": WEIGHT, "bias": BIAS}
    return write(tmp_path / "linear.onnx", nodes, weights, inputs, ("y", "sum"))


def expected(x: Array) -> Array:
    found: Array = np.maximum(x @ WEIGHT + BIAS, 0)
    return found


def test_a_model_is_a_job_of_its_weights(linear: Path) -> None:
    job = pf.trace_onnx(linear, inputs={"x": X})
    assert job.file.labels.title == "linear"
    assert set(job.file.labels.params) == {"inputs.x", "model.weight", "model.bias"}
    assert set(job.inputs) == {address_of(a.tobytes()) for a in (X, WEIGHT, BIAS)}
    result = job.run_local()
    assert np.allclose(result["y"], expected(X), atol=1e-6)
    assert np.allclose(result["sum"], expected(X).sum(), atol=1e-4)
    only = pf.trace_onnx(str(linear), inputs={"x": X}, outputs=["y"], title="mine")
    assert (only.file.labels.title, only.file.labels.outputs) == ("mine", (("y",),))


def test_feeds_go_in_and_every_value_comes_out(linear: Path) -> None:
    job = pf.trace_onnx(linear, inputs={"x": pf.feed(X, batch=2)})
    assert job.steps == 3
    result = job.run_local()
    assert np.allclose(result["y"].reshape(6, 3), expected(X), atol=1e-6)
    assert result["sum"].shape == (3,)
    assert pf.trace_onnx(linear, inputs={"x": pf.feed(X, batch=2)}, steps=7).steps == 7


def test_sizes_that_follow_from_shapes_are_worked_out(tmp_path: Path) -> None:
    """As PyTorch exports ``table[ids].reshape(len(ids), -1)``."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Shape", ["rows"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["count"]),
        helper.make_node("Unsqueeze", ["count", "axis"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["rows", "wanted"], ["y"]),
    ]
    table = np.arange(40, dtype=np.float32).reshape(10, 2, 2)
    weights: dict[str, Array] = {
        "table": table,
        "zero": np.array(0, np.int64),
        "axis": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
    }
    inputs = {"ids": (TensorProto.INT64, (None,))}
    path = write(tmp_path / "lookup.onnx", nodes, weights, inputs)
    ids = np.array([7, 0, 9], np.int64)
    job = pf.trace_onnx(path, inputs={"ids": ids})
    assert np.array_equal(job.run_local()["y"], table[ids].reshape(3, 4))


def test_a_size_that_depends_on_data_cannot_be_traced(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "sizes"], ["y"])]
    inputs = {"x": (TensorProto.FLOAT, (6, 4)), "sizes": (TensorProto.INT64, (2,))}
    path = write(tmp_path / "reshape.onnx", nodes, {}, inputs)
    with pytest.raises(JobError, match="sizes depend on the values of input 'sizes'"):
        pf.trace_onnx(path, inputs={"x": X, "sizes": np.array([4, 6], np.int64)})


def test_inputs_and_outputs_must_be_the_models(linear: Path) -> None:
    for inputs, reason in (
        ({}, "takes x, inputs gives nothing"),
        ({"x": X, "z": X}, "takes x, inputs gives x, z"),
        ({"x": X[:, :3]}, r"input 'x' of .* is \['rows', 4\], not \[6, 3\]"),
        ({"x": X[0]}, r"not \[4\]"),
        ({"x": X.astype(np.float64)}, "is dtypes.float, not dtypes.double"),
        ({"x": object()}, "not a model that tinygrad can run|cannot"),
    ):
        with pytest.raises(JobError, match=reason):
            pf.trace_onnx(linear, inputs=inputs)
    with pytest.raises(JobError, match=r"'z' is not an output of .*linear\.onnx"):
        pf.trace_onnx(linear, inputs={"x": X}, outputs=["z"])


# Files


def test_every_cut_of_a_model_is_one_error(linear: Path) -> None:
    whole = linear.read_bytes()
    check_onnx(whole, "it")
    for size in range(len(whole)):
        linear.write_bytes(whole[:size])
        with pytest.raises(JobError, match="not a whole ONNX model"):
            pf.trace_onnx(linear, inputs={"x": X})
    with pytest.raises(ConfigError, match="cannot read"):
        pf.trace_onnx(linear.with_name("none.onnx"), inputs={})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_model_is_a_job_or_one_error(linear: Path, data: st.DataObject) -> None:
    whole = bytearray(linear.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at : at + 1] = data.draw(st.binary(max_size=3))
    path = linear.with_name("changed.onnx")
    path.write_bytes(bytes(whole))
    with suppress(JobError):
        pf.trace_onnx(path, inputs={"x": X})


@given(st.binary(max_size=300))
def test_any_bytes_are_walked_or_refused(noise: bytes) -> None:
    with suppress(JobError):
        check_onnx(noise, "it")


def test_unknown_operators_are_one_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"])]
    path = write(tmp_path / "odd.onnx", nodes, {}, {"x": (TensorProto.FLOAT, (6, 4))})
    with pytest.raises(JobError, match="Frobnicate"):
        pf.trace_onnx(path, inputs={"x": X})


def test_graphs_in_graphs_are_bounded() -> None:
    def nested(depth: int) -> bytes:
        graph = helper.make_graph([], "g", [], [])
        for _ in range(depth):
            node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
            graph = helper.make_graph([node], "g", [], [])
        return bytes(helper.make_model(graph).SerializeToString())

    assert check_onnx(nested(MAX_ONNX_DEPTH - 1), "it") == []
    with pytest.raises(JobError, match="deep"):
        check_onnx(nested(MAX_ONNX_DEPTH), "it")


def outside(path: Path, location: str, **more: str) -> Path:
    """The linear model, its weight in another file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    changed = path.with_name("outside.onnx")
    changed.write_bytes(model.SerializeToString())
    return changed


def test_weights_beside_the_model_are_taken(linear: Path) -> None:
    linear.with_name("weights.bin").write_bytes(b"pad" + WEIGHT.tobytes())
    path = outside(linear, "weights.bin", offset="3", length=str(WEIGHT.nbytes))
    job = pf.trace_onnx(path, inputs={"x": X})
    assert address_of(WEIGHT.tobytes()) in job.inputs
    assert np.allclose(job.run_local()["y"], expected(X), atol=1e-6)


def test_no_other_file_of_this_machine_is_touched(linear: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    for location, more, reason in (
        ("/etc/hostname", {}, "outside of its folder"),
        ("../../etc/hostname", {}, "outside of its folder"),
        ("link", {}, "outside of its folder"),
        ("a\\b", {}, "outside of its folder"),
        ("none.bin", {}, "which is not there"),
        ("", {}, "which is not there"),
        ("linear.onnx", {"offset": "-1"}, "not a number of bytes"),
        ("linear.onnx", {"length": "10000000"}, "is cut short"),
        ("linear.onnx", {"offset": "9" * 30}, "not a number of bytes"),
    ):
        with pytest.raises(JobError, match=reason):
            pf.trace_onnx(outside(linear, location, **more), inputs={"x": X})
    assert not (tmp_path / "none.bin").exists()


def test_values_of_a_model_are_bounded() -> None:
    def wide(outputs: int) -> bytes:
        names = [f"o{number}" for number in range(outputs)]
        graph = helper.make_graph([helper.make_node("Split", ["x"], names)], "g", [], [])
        return bytes(helper.make_model(graph).SerializeToString())

    assert check_onnx(wide(MAX_ONNX_VALUES - 1), "it") == []
    with pytest.raises(JobError, match=f"over {MAX_ONNX_VALUES} tensors, nodes"):
        check_onnx(wide(MAX_ONNX_VALUES), "it")


def test_fields_of_a_model_are_bounded(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = linear.read_bytes()
    monkeypatch.setattr("p2pflop.job.onnx.MAX_ONNX_FIELDS", 100)
    assert check_onnx(whole, "it") == []
    with pytest.raises(JobError, match="over 100 fields"):
        check_onnx(whole + b"\x08\x00" * 100, "it")


@pytest.mark.parametrize("field", ["dims", "int32_data", "int64_data", "uint64_data", "ints"])
def test_integers_of_a_model_are_bounded(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [], [], [TensorProto(name="w")])
    many: list[int] = [1] * 200
    if field == "ints":
        node = helper.make_node("Relu", ["x"], ["y"], ints=many)
        graph = helper.make_graph([node], "g", [], [])
    else:
        getattr(graph.initializer[0], field).extend(many)
    data = bytes(helper.make_model(graph).SerializeToString())
    assert check_onnx(data, "it") == []
    monkeypatch.setattr("p2pflop.job.onnx.MAX_ONNX_FIELDS", 190)
    with pytest.raises(JobError, match="over 190 fields and bytes of integers"):
        check_onnx(data, "it")


def test_shapes_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[0, 2**62])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    path = write(tmp_path / "odd.onnx", [node], {}, {"x": (TensorProto.FLOAT, (6, 4))})
    model = onnx.load(path)
    model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(JobError, match="not a model that tinygrad can run"):
        pf.trace_onnx(path, inputs={"x": X})
