"""Feeds: tensors that hold one shard of a data set after the other.

``feed`` gives a tensor of the shape of one shard. Outside a job it holds the first shard, so that a
program can be tried out as it is; ``trace`` knows it again and lets the shards travel as blobs of
their own, read from their files only when they are sent.
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

from tinygrad import Tensor

from p2pflop.errors import ConfigError, JobError
from p2pflop.job.collection import MAX_COLLECTION_ENTRIES
from p2pflop.job.counts import whole_number
from p2pflop.job.spec import MAX_STEPS

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

_HINT: Final = "Give numpy arrays or .npy files of one dtype and shape, or batch= to cut rows."


@dataclass(frozen=True, slots=True)
class Feed:
    """``read(n)`` gives the bytes of shard ``n`` of ``shards``; each is for ``steps`` steps.

    ``files(n)`` is where they lie, for messages; empty for memory.
    """

    read: Callable[[int], bytes]
    files: Callable[[int], str]
    shards: int
    steps: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """Rows of one array, then of the next; with ``...`` for rows, a whole array."""

    parts: tuple[tuple[Array, slice | EllipsisType], ...]

    def array(self) -> Array:
        """What is in it. Raises JobError if its file became shorter."""
        import numpy as np

        pieces = [_intact(array)[rows] for array, rows in self.parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def files(self) -> str:
        """The names of its files."""
        names = [getattr(array, "filename", None) for array, _ in self.parts]
        return " and ".join(str(name) for name in names if name is not None)


# By identity, since tensors compare element by element; an entry goes with its tensor.
_feeds: dict[int, Feed] = {}


def feed(data: Any, *, batch: int | None = None, steps: int = 1, drop_last: bool = False) -> Tensor:
    """A tensor that is another shard of ``data`` every ``steps`` steps of a job, over and over.

    ``data`` is a numpy array, the path of a ``.npy`` file or a pattern (``"data/*.npy"``, sorted),
    or a sequence of those. With ``batch`` their rows, one array after the other, are cut into
    shards of that many; else each array is a shard. Raises ConfigError for what does not fit
    together, and for rows left over unless ``drop_last``.
    """
    steps = _count("steps", steps)
    batch = None if batch is None else _count("batch", batch)
    arrays = [_open(item) for item in _items(data)]
    kinds = {(array.dtype.str, array.shape[1:] if batch else array.shape) for array in arrays}
    if len(kinds) != 1:
        told = ", ".join(f"{kind} {shape}" for kind, shape in sorted(kinds)[:3]) or "nothing"
        raise ConfigError(f"a feed is of one kind, not of {told}", hint=_HINT)
    shards = _whole(arrays) if batch is None else _cut(arrays, batch, drop_last)
    if not 1 <= len(shards) <= MAX_COLLECTION_ENTRIES:
        raise ConfigError(
            f"{len(shards)} shards; a feed has 1 to {MAX_COLLECTION_ENTRIES}",
            hint="Give batch=, or another one: so many rows make a shard.",
        )
    first = _copy(shards[0].array())
    if 0 in first.shape:
        raise ConfigError(f"shards of shape {first.shape} hold nothing", hint=_HINT)
    try:
        tensor = Tensor(first)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ConfigError(f"tensors of {first.dtype} do not exist", hint=_HINT) from error
    _feeds[id(tensor)] = Feed(
        lambda number: _bytes(shards[number].array()),
        lambda number: shards[number].files(),
        len(shards),
        steps,
    )
    finalize(tensor, _feeds.pop, id(tensor))
    return tensor


def feed_of(tensor: Tensor) -> Feed | None:
    """What ``feed`` made ``tensor`` of, or None if it did not."""
    return _feeds.get(id(tensor))


def _count(name: str, value: object) -> int:
    return whole_number(name, value, MAX_STEPS - 1, fault=ConfigError)


def _items(data: Any) -> Sequence[Any]:
    if not isinstance(data, (str, Path)):
        is_several = isinstance(data, Iterable) and not isinstance(data, Mapping)
        return list(data) if is_several and not hasattr(data, "dtype") else [data]
    if not glob.has_magic(str(data)):
        return [data]
    paths = sorted(glob.glob(str(data)))  # noqa: PTH207 - the pattern may be absolute
    if not paths:
        raise ConfigError(f"no file matches {data}", hint="Name .npy files, like 'data/*.npy'.")
    return paths


def _open(item: Any) -> Array:
    import numpy as np

    if isinstance(item, np.ndarray):
        return item
    if not isinstance(item, (str, Path)):
        raise ConfigError(f"data of type {type(item).__name__} makes no feed", hint=_HINT)
    try:
        found = np.load(item, mmap_mode="r", allow_pickle=False)
    # Its parser of headers raises whatever Python's own does: TokenError, SyntaxError and more.
    except Exception as error:
        raise ConfigError(
            f"cannot read {item} as an .npy file: {_why(item, error)}", hint=_HINT
        ) from error
    if not isinstance(found, np.ndarray):
        raise ConfigError(f"{item} holds several arrays", hint="Save each as an .npy file.")
    return found


def _why(item: str | Path, error: Exception) -> str:
    """What numpy means, in words that are of use here."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    with suppress(OSError):
        if not Path(item).read_bytes()[:6].startswith(b"\x93NUMPY"):
            return "it is not one"
    return "it is damaged, cut off, or holds Python objects"


def _intact(array: Array) -> Array:
    """``array``, unless its file has become shorter: to read it then would kill this process.

    Raises JobError.
    """
    import numpy as np

    if isinstance(array, np.memmap) and array.filename is not None:
        with suppress(FileNotFoundError):  # it is gone by name only
            if Path(array.filename).stat().st_size < array.offset + array.nbytes:
                raise JobError(
                    f"{array.filename} has become shorter since it was opened",
                    hint="Leave a feed's files alone until the job is over, or trace it again.",
                )
    return array


def _whole(arrays: list[Array]) -> list[_Shard]:
    return [_Shard(((array, ...),)) for array in arrays]


def _cut(arrays: list[Array], batch: int, drop_last: bool) -> list[_Shard]:
    if any(not array.shape for array in arrays):
        raise ConfigError("numbers have no rows to cut", hint=_HINT)
    ends = list(accumulate(len(array) for array in arrays))
    if ends[-1] % batch and not drop_last:
        raise ConfigError(
            f"{ends[-1]} rows are not a multiple of {batch}: {ends[-1] % batch} are left over",
            hint="Pad the data, or leave them out with drop_last=True.",
        )

    def shard(start: int) -> _Shard:
        parts, end = [], start + batch
        number = bisect_right(ends, start)
        while start < end:
            begun = ends[number] - len(arrays[number])
            parts.append((arrays[number], slice(start - begun, end - begun)))
            start, number = ends[number], number + 1
        return _Shard(tuple(parts))

    return [shard(start) for start in range(0, ends[-1] // batch * batch, batch)]


def _copy(array: Array) -> Array:
    import numpy as np

    return np.array(array, array.dtype.newbyteorder("="))


def _bytes(array: Array) -> bytes:
    import numpy as np

    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
