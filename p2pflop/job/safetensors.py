"""The head of a safetensors file: which tensors it holds, and where.

A file is the length of its header in eight bytes, the header, and the tensors' bytes one after the
other. The header is a JSON object of names to ``{"dtype", "shape", "data_offsets"}``, perhaps
padded with spaces, and may have strings under ``__metadata__``. Files come from anywhere, so
nothing is used before all of it was checked: every byte after the header belongs to exactly one
tensor, whose size follows from its dtype and shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from p2pflop.errors import ConfigError
from p2pflop.job.graph import Dtype
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import MAX_RANK
from p2pflop.units import MIB

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 16 * MIB
MAX_TENSORS: Final = 2**16
MAX_TENSOR_NAME: Final = 512
MAX_DIM: Final = 2**40
_METADATA: Final = "__metadata__"
_FIELDS: Final = {"dtype", "shape", "data_offsets"}

_DTYPES: Final = {
    "BOOL": Dtype.BOOL,
    "I8": Dtype.INT8,
    "U8": Dtype.UINT8,
    "I16": Dtype.INT16,
    "U16": Dtype.UINT16,
    "I32": Dtype.INT32,
    "U32": Dtype.UINT32,
    "I64": Dtype.INT64,
    "U64": Dtype.UINT64,
    "F16": Dtype.FLOAT16,
    "BF16": Dtype.BFLOAT16,
    "F32": Dtype.FLOAT32,
    "F64": Dtype.FLOAT64,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """``size_bytes`` from byte ``start`` of a file: a tensor, row-major, little-endian."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def header_bytes(head: bytes, file_bytes: int, what: str) -> int:
    """The length of the header, as the first eight bytes tell it. Raises ConfigError."""
    if len(head) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise _unfit(what, "it is cut short")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _unfit(what, f"its header would have {length} bytes, not 2 to {MAX_HEADER_BYTES}")
    if length > file_bytes - LENGTH_BYTES:
        raise _unfit(what, "it is cut short inside the header")
    return length


def parse_header(header: bytes, file_bytes: int, what: str) -> dict[str, TensorPlace]:
    """The tensors of a file of ``file_bytes`` by name, in the order of their bytes.

    Raises ConfigError naming ``what`` unless header and file agree in everything.
    """
    try:
        if header[:1] != b"{":
            raise ValueError("it does not begin with {")
        entries = json.loads(header.decode(), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        raise _unfit(what, f"its header is not a JSON object: {str(error)[:120]}") from error
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _unfit(what, f"{_METADATA} is not an object of strings")
    if len(entries) > MAX_TENSORS:
        raise _unfit(what, f"it names {len(entries)} tensors, over {MAX_TENSORS}")
    data_start = LENGTH_BYTES + len(header)
    places = {name: _place(name, entry, data_start, what) for name, entry in entries.items()}
    ordered = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].size_bytes)))
    end = data_start
    for name, place in ordered.items():
        if place.start != end:
            found = "overlap" if place.start < end else "leave a gap"
            raise _unfit(what, f"the bytes of {name!r} and of the tensor before it {found}")
        end += place.size_bytes
    if end > file_bytes:
        raise _unfit(what, f"it is cut short: {file_bytes} bytes of {end}")
    if end < file_bytes:
        raise _unfit(what, f"{file_bytes - end} bytes after its last tensor belong to none")
    return ordered


def format_header(tensors: Mapping[str, tuple[Dtype, tuple[int, ...]]]) -> bytes:
    """What a file begins with in which the bytes of ``tensors`` follow in this order.

    Raises ConfigError for a name that ``parse_header`` would refuse.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        _check_name(name, "the file")
        start, end = end, end + stored_bytes(dtype, shape)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padded so that the tensors' bytes are aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _place(name: str, entry: Any, data_start: int, what: str) -> TensorPlace:
    _check_name(name, what)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _unfit(what, f"{name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConfigError(
            f"{what}: {name!r} has dtype {dtype!r:.40}, which jobs do not have",
            hint=f"Save it as one of {', '.join(_DTYPES)}; BF16 holds what F8 holds.",
        )
    if not _are_numbers(shape, MAX_DIM) or len(shape) > MAX_RANK:
        raise _unfit(what, f"the shape of {name!r} is {str(shape)[:80]}")
    if not _are_numbers(offsets, 2**63 - 1) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _unfit(what, f"the data_offsets of {name!r} are {str(offsets)[:80]}")
    start, end = offsets
    wanted = stored_bytes(_DTYPES[dtype], tuple(shape))
    if end - start != wanted:
        raise _unfit(what, f"{name!r} has {end - start} bytes; {dtype} {shape} are {wanted}")
    return TensorPlace(_DTYPES[dtype], tuple(shape), data_start + start, wanted)


def _check_name(name: str, what: str) -> None:
    if not 1 <= len(name) <= MAX_TENSOR_NAME or not name.isprintable():
        raise _unfit(what, f"{name[:80]!r} is not the name of a tensor")


def _are_numbers(value: Any, highest: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= highest for n in value)


def _unfit(what: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{what} is not a whole safetensors file: {reason}",
        hint="Fetch it again, or save it again from the program that made it.",
    )
