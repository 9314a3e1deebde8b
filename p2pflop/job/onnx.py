"""What an ONNX file is made of, looked through before tinygrad's parser may have it.

An ONNX file is a protobuf message, a model, with a graph in it, with tensors and nodes in that.
tinygrad's parser believes every length that it reads, and opens whatever file a tensor says that
its bytes are in. So here the same messages are walked first: each must end inside the one around
it, graphs in graphs are bounded, and the files outside are told, to be looked at by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

from p2pflop.errors import JobError

MAX_ONNX_DEPTH: Final = 8
"""Graphs inside of nodes of graphs."""
MAX_ONNX_VALUES: Final = 2**15
"""Tensors, nodes and their outputs: tinygrad takes half a millisecond for each."""
MAX_EXTERNAL_TEXT_BYTES: Final = 4096
_MAX_VARINT_BYTES: Final = 10

# Numbers of fields, as onnx.proto has them.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_TENSOR = 1, 5
_NODE_OUTPUT, _NODE_ATTRIBUTE = 2, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 6
_TENSOR_OUTSIDE, _TENSOR_PLACE = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_IS_OUTSIDE = 1

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Bytes of a tensor in a file beside the model's; to its end without ``size_bytes``."""

    location: str
    start: int
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    wire: int
    start: int
    stop: int
    value: int


def check_onnx(data: bytes | memoryview, what: str) -> list[ExternalData]:
    """Walk the model in ``data``; where the bytes are that it has elsewhere.

    Raises JobError naming ``what`` if it is cut short or not made as a model is.
    """
    try:
        fields = list(_fields(data, 0, len(data)))
        graphs = [field for field in fields if field.number == _MODEL_GRAPH]
        opsets = [field for field in fields if field.number == _MODEL_OPSET]
        if len(graphs) != 1 or not opsets:
            raise ValueError(f"it has {len(graphs)} graphs and {len(opsets)} sets of operators")
        return list(_walk_graph(data, graphs[0], MAX_ONNX_DEPTH, count(1)))
    except ValueError as error:
        raise JobError(
            f"{what} is not a whole ONNX model: {error}",
            hint="Fetch it again, or export it again from the program that made it.",
        ) from error


def _walk_graph(
    data: bytes | memoryview, graph: _Field, depth: int, values: Iterator[int]
) -> Iterator[ExternalData]:
    if depth == 0:
        raise ValueError(f"its graphs are over {MAX_ONNX_DEPTH} deep")
    for field in _inside(data, graph):
        if field.number == _GRAPH_TENSOR:
            _count(values)
            yield from _walk_tensor(data, field)
        elif field.number == _GRAPH_NODE:
            _count(values)
            for inner in _inside(data, field):
                if inner.number == _NODE_OUTPUT:
                    _count(values)
                elif inner.number == _NODE_ATTRIBUTE:
                    yield from _walk_attribute(data, inner, depth, values)


def _walk_attribute(
    data: bytes | memoryview, attribute: _Field, depth: int, values: Iterator[int]
) -> Iterator[ExternalData]:
    for field in _inside(data, attribute):
        if field.number == _ATTRIBUTE_TENSOR:
            yield from _walk_tensor(data, field)
        elif field.number == _ATTRIBUTE_GRAPH:
            yield from _walk_graph(data, field, depth - 1, values)


def _count(values: Iterator[int]) -> None:
    if next(values) > MAX_ONNX_VALUES:
        raise ValueError(f"over {MAX_ONNX_VALUES} tensors, nodes and outputs of nodes")


def _walk_tensor(data: bytes | memoryview, tensor: _Field) -> Iterator[ExternalData]:
    told: dict[str, str] = {}
    is_outside = False
    for field in _inside(data, tensor):
        if field.number == _TENSOR_PLACE:
            is_outside = field.value == _IS_OUTSIDE
        elif field.number == _TENSOR_OUTSIDE:
            entry = {inner.number: _text(data, inner) for inner in _inside(data, field)}
            told[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
    if not is_outside and not told:
        return
    size_bytes = _number(told["length"]) if "length" in told else None
    yield ExternalData(told.get("location", ""), _number(told.get("offset", "0")), size_bytes)


def _inside(data: bytes | memoryview, field: _Field) -> Iterator[_Field]:
    if field.wire != _DELIMITED:
        raise ValueError(f"field {field.number} at byte {field.start} is not a message")
    return _fields(data, field.start, field.stop)


def _fields(data: bytes | memoryview, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire, value, start = tag >> 3, tag & 7, 0, at
        if wire == _VARINT:
            value, at = _varint(data, at, end)
        elif wire == _DELIMITED:
            length, start = _varint(data, at, end)
            at = start + length
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"there is no field of type {wire}, as at byte {start}")
        if at > end:
            raise ValueError(f"it is cut short: field {number} would end at byte {at} of {end}")
        yield _Field(number, wire, start, at, value)


def _varint(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        if at >= end:
            raise ValueError(f"it is cut short at byte {end}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            return value, at
    raise ValueError(f"a number before byte {at} has no end")


def _text(data: bytes | memoryview, field: _Field) -> str:
    if field.wire != _DELIMITED or field.stop - field.start > MAX_EXTERNAL_TEXT_BYTES:
        raise ValueError(f"field {field.number} at byte {field.start} is no short text")
    return bytes(data[field.start : field.stop]).decode()


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise ValueError(f"{text[:40]!r} is not a number of bytes")
    return int(text)
