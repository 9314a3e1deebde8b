"""ONNX models as functions that can be traced, by tinygrad's own runner.

tinygrad runs a model's nodes one after the other, each building lazy tensors. Weights stay where
they are, as views of the file, and so travel as blobs of exactly their bytes. Sizes that nodes need
as numbers (the shape of a Reshape) must be known while tracing; the runner keeps each that it has
worked out. So the model is run once before it is traced, with inputs that may not be read: what
depends on weights and shapes alone is computed then, and a model whose sizes depend on the values
of its inputs is told apart from one that can travel. That run is on tinygrad's emulator, so that no
compiler is needed where a model is traced.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from tinygrad import Context, Device, Tensor
from tinygrad.nn.onnx import OnnxRunner, required_input_python_consts

from p2pflop.errors import ConfigError, JobError, P2PFlopError
from p2pflop.job.onnx import ExternalData, check_onnx
from p2pflop.kernels.dialect import OUR_DTYPES
from p2pflop.kernels.feeds import feed_of
from p2pflop.kernels.weights import Stored, lazy_tensor

MAX_ONNX_SIZES: Final = 2**16
"""Numbers that a node may need while it is traced, such as the axes of a shape."""

_EMULATOR: Final = "PYTHON"

Tensors = Mapping[str, Tensor]


def load_onnx(
    path: Path, inputs: Mapping[str, Any], outputs: list[str] | None
) -> tuple[Callable[[], dict[str, Tensor]], list[str], int]:
    """A function for ``trace`` that runs the model; its outputs; the steps of one pass.

    ``inputs`` are feeds, tensors, or what tensors are made of. One pass is a step for each shard of
    the longest feed. Raises JobError for a file that is not a sound model, for one that cannot be
    traced, and for inputs and outputs that are not the model's; ConfigError if it cannot be read.
    """
    _check_file(path)
    with _one_error(path), Context(DEV=_EMULATOR):
        runner = _Runner(path)
    names = list(runner.graph_outputs)
    wanted = names if outputs is None else outputs
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise JobError(f"{unknown[0]!r} is not an output of {path}", hint=f"It has {names}.")
    inputs = _inputs(path, runner, inputs)
    model = {name: value for name, value in runner.graph_values.items() if name}
    run = partial(_run, path, runner, wanted)
    with Context(DEV=_EMULATOR):
        run(model, {name: _unreadable(name, tensor) for name, tensor in inputs.items()})
    runner.to(Device.DEFAULT)
    model = {name: runner.graph_values[name] for name in model}

    def step() -> dict[str, Tensor]:
        return run(model, inputs)

    step.__name__ = path.stem
    feeds = [feed for feed in map(feed_of, inputs.values()) if feed is not None]
    return step, wanted, max((feed.shards * feed.steps for feed in feeds), default=1)


class _Runner(OnnxRunner):  # type: ignore[misc]
    """tinygrad's, with a bound on the numbers that a node may want at once."""

    def _get_python_const(self, name: str, op: str, idx: int) -> Any:
        value = self.graph_values[name]
        is_number = idx in required_input_python_consts.get(op, ())
        if is_number and isinstance(value, Tensor) and value.numel() > MAX_ONNX_SIZES:
            raise JobError(f"a {op} wants {value.numel()} sizes, over {MAX_ONNX_SIZES}")
        return super()._get_python_const(name, op, idx)


def _run(
    path: Path, runner: _Runner, wanted: list[str], model: Tensors, inputs: Tensors
) -> dict[str, Tensor]:
    # Without what a run before has left in it.
    runner.graph_values = {"": None, **model}
    runner.variable_dims = {}
    with _one_error(path):
        found = runner(dict(inputs))
        for name in wanted:
            if not isinstance(found[name], Tensor):
                raise JobError(f"output {name!r} of {path} is not a tensor")
            _ = found[name].shape  # now, because shapes that do not fit are only told then
    return {name: found[name] for name in wanted}


def _inputs(path: Path, runner: _Runner, given: Mapping[str, Any]) -> dict[str, Tensor]:
    specs = runner.graph_inputs
    if given.keys() != specs.keys():
        raise JobError(
            f"{path} takes {', '.join(specs) or 'nothing'}, "
            f"inputs gives {', '.join(given) or 'nothing'}",
            hint="Give each input a feed, an array or a tensor, and no other.",
        )
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        with _one_error(path):
            value = given[name]
            tensor = value if isinstance(value, Tensor) else Tensor(value)
            # A size that the model leaves open without a name is any size.
            shape = tuple(dim or f"{name}.{axis}" for axis, dim in enumerate(spec.shape))
            runner.graph_inputs[name] = replace(spec, shape=shape)
        sizes = [(had, want) for had, want in zip(tensor.shape, shape, strict=False)]
        is_fit = len(shape) == len(tensor.shape) and not spec.is_sequence
        if not is_fit or any(isinstance(want, int) and had != want for had, want in sizes):
            raise JobError(
                f"input {name!r} of {path} is {list(shape)}, not {list(tensor.shape)}",
                hint="The model fixes these sizes; cut feeds into batches of that many rows.",
            )
        if tensor.dtype != spec.dtype:
            raise JobError(
                f"input {name!r} of {path} is {spec.dtype}, not {tensor.dtype}",
                hint="Convert the arrays: array.astype(...).",
            )
        tensors[name] = tensor
    return tensors


def _unreadable(name: str, tensor: Tensor) -> Tensor:
    def refuse() -> bytes:
        raise JobError(
            f"the model's sizes depend on the values of input {name!r}",
            hint="Export it with fixed sizes: only what does not depend on data can be traced.",
        )

    dtype = OUR_DTYPES.get(tensor.dtype)
    if dtype is None or 0 in tensor.shape:
        raise JobError(f"input {name!r} is {tensor.dtype} {tensor.shape}, which jobs do not have")
    return lazy_tensor(Stored(refuse, tensor.nbytes()), dtype, tensor.shape)


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise JobError(f"{path} is not a whole ONNX model: it is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with mapped, memoryview(mapped) as view:
                outside = check_onnx(view, str(path))
        for place in outside:
            _check_outside(path, place)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _check_outside(path: Path, place: ExternalData) -> None:
    """A stranger's model must not make a blob of any file of this machine."""
    folder = path.parent.resolve()
    location = Path(place.location)
    is_plain = place.location.isprintable() and "\\" not in place.location
    target = (folder / location).resolve()
    if not is_plain or location.is_absolute() or not target.is_relative_to(folder):
        raise JobError(
            f"{path} takes weights from {place.location[:80]!r}, outside of its folder",
            hint="Take only models whose files of weights lie beside them.",
        )
    if not target.is_file():
        raise JobError(f"{path} takes weights from {place.location[:80]!r}, which is not there")
    file_bytes = target.stat().st_size
    size_bytes = place.size_bytes or 0
    if place.start + size_bytes > file_bytes:
        raise JobError(f"{target} is cut short: {file_bytes} of {place.start + size_bytes} bytes")


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Whatever tinygrad says of a model that it cannot take."""
    try:
        yield
    except P2PFlopError:
        raise
    except Exception as error:
        raise JobError(
            f"{path} is not a model that tinygrad can run: "
            f"{type(error).__name__}: {str(error)[:200]}",
            hint="Other operators or versions of them may do; its exporter can check the file.",
        ) from error
