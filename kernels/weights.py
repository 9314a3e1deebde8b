"""Tensors whose bytes lie elsewhere until they are needed: in a file, in the node, in a result.

``lazy_tensor`` gives an ordinary realized tensor of tinygrad, with one difference: its buffer gets
its memory, and its bytes are read, when a kernel first needs them. A traced job does not need them
at all: the tensor travels as a blob of its own, read once for its address, unless that is known,
and once more when it is sent. So a model larger than memory can be traced.

tinygrad's own DISK tensors (``nn.state.safe_load``, ``Tensor(pathlib.Path(...))``) are views of a
file. ``DiskLeaves`` finds such views in a graph and puts lazy tensors of exactly their bytes there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tinygrad import Device, Tensor
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops, UOp, buffers

from p2pflop.errors import ConfigError, JobError
from p2pflop.job.blobs import Read
from p2pflop.job.graph import Dtype
from p2pflop.kernels.dialect import DTYPES

_DISK: Final = "DISK:"
_VIEWS: Final = (
    Ops.RESHAPE,
    Ops.SHRINK,
    Ops.BITCAST,
    Ops.COPY,
    Ops.CONTIGUOUS,
    Ops.DETACH,
)


@dataclass(frozen=True, slots=True)
class Stored:
    """``size_bytes`` that ``read`` gives whenever it is asked; ``address`` of them, if known.

    ``files`` is where they lie, for messages; empty for memory.
    """

    read: Read
    size_bytes: int
    address: bytes | None = None
    files: str = ""

    def read_as(self, address: bytes, address_of: Callable[[bytes], bytes]) -> bytes:
        """The bytes again. Raises JobError if they are not those of ``address`` any more."""
        data = self.read()
        if address_of(data) != address:
            raise JobError(
                f"{self.files or f'data of {len(data)} bytes'} has changed since the job was "
                "traced with it",
                hint="Leave data alone until the job was submitted; trace it again.",
            )
        return data


class _LazyBuffer(Buffer):  # type: ignore[misc]
    """A buffer that counts as realized and reads what is in it when it gets its memory."""

    def __init__(self, device: str, size: int, dtype: DType, stored: Stored) -> None:
        self.stored = stored
        super().__init__(device, size, dtype)

    @property
    def is_loaded(self) -> bool:
        """Whether its memory is there; then that holds what it is, which may have changed."""
        return self.device in self._bufs

    def is_allocated(self) -> bool:
        return True

    def allocate(self, opaque: Any = None, external_ptr: int | None = None) -> Buffer:
        data = bytearray(self.stored.read())
        super().allocate(opaque, external_ptr)
        self.copy_from(Buffer("PYTHON", self.size, self.dtype, opaque=memoryview(data)))
        return self

    def as_memoryview(self, *args: Any, **options: Any) -> memoryview:
        self.ensure_allocated()
        view: memoryview = super().as_memoryview(*args, **options)
        return view


def lazy_tensor(stored: Stored, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of what is stored: row-major, little-endian."""
    theirs = DTYPES[dtype]
    if 0 in shape:
        return Tensor.empty(*shape, dtype=theirs)
    return Tensor(_lazy_buffer(stored, theirs).reshape(shape))


def stored_in(buffer: UOp) -> Stored | None:
    """Where the content of a BUFFER node lies, if it was not brought into memory yet."""
    found = buffers.get(buffer)
    return found.stored if isinstance(found, _LazyBuffer) and not found.is_loaded else None


def file_span(path: Path, start: int, size_bytes: int) -> Stored:
    """Bytes of a file. Reading them raises ConfigError if they are not there."""

    def read() -> bytes:
        if size_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise ConfigError(
                f"a tensor of {size_bytes} bytes in {path} is larger than this machine's memory",
                hint="Split it into several: tensors are read one at a time.",
            )
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(size_bytes)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != size_bytes:
            raise ConfigError(f"{path} has become shorter since it was opened")
        return data

    return Stored(read, size_bytes, files=str(path))


def is_disk(buffer: UOp) -> bool:
    """Whether a BUFFER node is a file."""
    return isinstance(buffer.device, str) and buffer.device.startswith(_DISK)


def is_disk_view(uop: UOp) -> bool:
    """Whether ``uop`` is bytes of a file that lie side by side, perhaps on the way to a device."""
    return _disk_span(uop) is not None


@dataclass(slots=True)
class DiskLeaves:
    """One lazy buffer for all views of the same bytes of a file."""

    _leaves: dict[tuple[str, int, int, DType], UOp] = field(default_factory=dict)

    def leaf(self, uop: UOp) -> UOp | None:
        """The buffer of what ``uop`` views, or None if that is not bytes of a file side by side."""
        span = _disk_span(uop)
        if span is None:
            return None
        key = (*span, uop.dtype)
        if key not in self._leaves:
            path, start, size_bytes = span
            self._leaves[key] = _lazy_buffer(file_span(Path(path), start, size_bytes), uop.dtype)
        return self._leaves[key]

    def lift(self, uops: Sequence[UOp]) -> list[UOp]:
        """``uops`` with each view of a file as a buffer of its own, the largest views first."""
        sink = UOp.sink(*uops)
        nodes = sink.toposort()
        if not any(node.op is Ops.BUFFER and is_disk(node) for node in nodes):
            return list(uops)
        leaves = ((node, self.leaf(node)) for node in nodes)
        found = {node: leaf.reshape(node.shape) for node, leaf in leaves if leaf is not None}
        return list(sink.substitute(found).src)


def _lazy_buffer(stored: Stored, dtype: DType) -> UOp:
    size = stored.size_bytes // dtype.itemsize
    node = UOp.new_buffer(Device.DEFAULT, size, dtype)
    buffers[node] = _LazyBuffer(Device.DEFAULT, size, dtype, stored).ref(1)
    return node


def _disk_span(uop: UOp) -> tuple[str, int, int] | None:
    """Path, first byte and number of bytes of a view of a file."""
    node, start = uop, 0
    while node.op in _VIEWS:
        if node.op is Ops.SHRINK:
            skipped = _skipped(node)
            if skipped is None:
                return None
            start += skipped * node.dtype.itemsize
        node = node.src[0]
    if node.op is not Ops.BUFFER or not is_disk(node):
        return None
    if not all(isinstance(dim, int) for dim in uop.shape) or 0 in uop.shape:
        return None
    return node.device.removeprefix(_DISK), start, uop.numel() * uop.dtype.itemsize


def _skipped(shrink: UOp) -> int | None:
    """How many elements lie before those that are kept, or None if these are not side by side."""
    offset, stride, is_whole = 0, 1, True
    full = shrink.src[0].shape
    for (begin, size), dim in zip(reversed(shrink.marg), reversed(full), strict=True):
        if not isinstance(begin, int) or not isinstance(size, int):
            return None
        if not is_whole and size != 1:
            return None
        is_whole = is_whole and size == dim
        offset += begin * stride
        stride *= dim
    return offset
