"""Models that others made: weights from safetensors files, programs from ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from p2pflop.client import Client
from p2pflop.errors import BlobNotFoundError, ConfigError, StoreError
from p2pflop.ids import blob_url, parse_hash
from p2pflop.job.safetensors import LENGTH_BYTES, TensorPlace, header_bytes, parse_header
from p2pflop.sdk import Job, trace

if TYPE_CHECKING:
    from p2pflop.kernels.weights import Stored

_HINT: Final = "Give the path of a .safetensors file, or the address of one that the node keeps."


def load_safetensors(source: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name, lazily: only its header is read now.

    ``source`` is a path, or the address of a blob (``pf.put`` gives one). The tensors are ordinary
    ones of tinygrad, for ``nn.state.load_state_dict`` or as they are. Each travels as a blob of its
    own; its bytes are read when a job is traced, for their address, and when it is sent, one tensor
    at a time. A program that computes here with a tensor reads it then.
    Raises ConfigError if the file is not a whole and sound safetensors file, BlobNotFoundError.
    """
    from p2pflop.kernels.weights import file_span

    path = Path(source)
    if isinstance(source, Path) or path.is_file():
        read, what = partial(_read_file, path), str(path)
        span: Callable[[int, int], Stored] = partial(file_span, path)
    else:
        try:
            address = parse_hash(source)
        except ConfigError:
            raise ConfigError(f"{source} is neither a file nor a blob", hint=_HINT) from None
        client = Client(start=True)
        read, what = partial(client.read_range, address), f"blob {blob_url(address)}"
        span = partial(_blob_span, client, address)
    return _tensors(read, span, what)


def trace_onnx(
    path: str | Path,
    *,
    inputs: Mapping[str, Any],
    outputs: Sequence[str] | None = None,
    steps: int | None = None,
    title: str = "",
) -> Job:
    """The job of running an ONNX model: its weights are blobs, its inputs feeds or fixed.

    ``inputs`` has a feed, an array or a tensor for each of its inputs, of exactly the dtype and the
    sizes that the model fixes. Without ``steps`` it is one pass: a step for each shard of the
    longest feed. Of more than one step every value of each output is kept (``result.collected``).
    ``outputs`` names those that are wanted; all of them without it.

    Raises JobError for a file that is not a sound model or that tinygrad cannot run.
    """
    from p2pflop.kernels.onnx import load_onnx

    source = Path(path)
    names = None if outputs is None else list(outputs)
    step, found, one_pass = load_onnx(source, inputs, names)
    count = one_pass if steps is None else steps
    collect = found if count > 1 else ()
    return trace(step, steps=count, collect=collect, title=title or source.stem)


def _tensors(
    read: Callable[[int, int], tuple[bytes, int]], span: Callable[[int, int], Stored], what: str
) -> dict[str, Any]:
    from p2pflop.kernels.weights import lazy_tensor

    try:
        head, size_bytes = read(0, LENGTH_BYTES)
        length = header_bytes(head, size_bytes, what)
        header, _ = read(LENGTH_BYTES, LENGTH_BYTES + length)
    except BlobNotFoundError:
        raise
    except StoreError as error:
        raise ConfigError(f"cannot read {what}: {error.message}", hint=error.hint) from error
    places = parse_header(header, size_bytes, what)

    def tensor(place: TensorPlace) -> Any:
        return lazy_tensor(span(place.start, place.size_bytes), place.dtype, place.shape)

    return {name: tensor(place) for name, place in places.items()}


def _read_file(path: Path, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes of a file, and its size."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(start)
            return file.read(stop - start), size_bytes
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=_HINT) from error


def _blob_span(client: Client, address: bytes, start: int, size_bytes: int) -> Stored:
    from p2pflop.kernels.weights import Stored

    def read() -> bytes:
        data, _ = client.read_range(address, start, start + size_bytes)
        if len(data) != size_bytes:
            raise StoreError(f"the node sent {len(data)} of {size_bytes} bytes of a tensor")
        return data

    return Stored(read, size_bytes)
