"""What an ONNX file is made of, looked through before tinygrad's parser may have it.

An ONNX file is a protobuf message, a model, with a graph in it, with tensors and nodes in that.
tinygrad's parser believes every length that it reads, and opens whatever file a tensor says that
its bytes are in. So here the same messages are walked first: each must end inside the one around
it, graphs in graphs are bounded, and the files outside are told, to be looked at by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from p2pflop.errors import JobError

MAX_ONNX_DEPTH: Final = 8
"""Graphs inside of nodes of graphs."""
MAX_ONNX_VALUES: Final = 2**15
"""Tensors, nodes and their outputs: tinygrad takes half a millisecond for each."""
MAX_ONNX_FIELDS: Final = 2**21
"""Of all messages that are walked, and bytes of integers that stand one after the other in a field:
some microseconds each."""
MAX_EXTERNAL_TEXT_BYTES: Final = 4096
_MAX_VARINT_BYTES: Final = 10

# Numbers of fields, as onnx.proto has them.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_TENSOR = 1, 5
_NODE_OUTPUT, _NODE_ATTRIBUTE = 2, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 6
_TENSOR_OUTSIDE, _TENSOR_PLACE = 13, 14
_TENSOR_INTEGERS = (1, 5, 7, 11)
_ATTRIBUTE_INTEGERS = (8,)
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
    walk = _Walk(data)
    try:
        fields = walk.fields(0, len(data))
        known = [field for field in fields if field.number in (_MODEL_GRAPH, _MODEL_OPSET)]
        graphs = [field for field in known if field.number == _MODEL_GRAPH]
        if len(graphs) != 1 or len(known) == 1:
            opsets = len(known) - len(graphs)
            raise ValueError(f"it has {len(graphs)} graphs and {opsets} sets of operators")
        return list(walk.graph(graphs[0], MAX_ONNX_DEPTH))
    except ValueError as error:
        raise JobError(
            f"{what} is not a whole ONNX model: {error}",
            hint="Fetch it again, or export it again from the program that made it.",
        ) from error


class _Walk:
    """One look through a file. Methods raise ValueError for what is not as it should be."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self._seen_fields = 0
        self._seen_values = 0

    def graph(self, graph: _Field, depth: int) -> Iterator[ExternalData]:
        if depth == 0:
            raise ValueError(f"its graphs are over {MAX_ONNX_DEPTH} deep")
        for field in self._inside(graph):
            if field.number == _GRAPH_TENSOR:
                self._count_value()
                yield from self._tensor(field)
            elif field.number == _GRAPH_NODE:
                self._count_value()
                for inner in self._inside(field):
                    if inner.number == _NODE_OUTPUT:
                        self._count_value()
                    elif inner.number == _NODE_ATTRIBUTE:
                        yield from self._attribute(inner, depth)

    def _attribute(self, attribute: _Field, depth: int) -> Iterator[ExternalData]:
        for field in self._inside(attribute):
            self._count_integers(field, _ATTRIBUTE_INTEGERS)
            if field.number == _ATTRIBUTE_TENSOR:
                yield from self._tensor(field)
            elif field.number == _ATTRIBUTE_GRAPH:
                yield from self.graph(field, depth - 1)

    def _tensor(self, tensor: _Field) -> Iterator[ExternalData]:
        told: dict[str, str] = {}
        is_outside = False
        for field in self._inside(tensor):
            self._count_integers(field, _TENSOR_INTEGERS)
            if field.number == _TENSOR_PLACE:
                is_outside = field.value == _IS_OUTSIDE
            elif field.number == _TENSOR_OUTSIDE:
                entry = {inner.number: self._text(inner) for inner in self._inside(field)}
                told[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
        if not is_outside and not told:
            return
        size_bytes = _number(told["length"]) if "length" in told else None
        yield ExternalData(told.get("location", ""), _number(told.get("offset", "0")), size_bytes)

    def _count_value(self) -> None:
        self._seen_values += 1
        if self._seen_values > MAX_ONNX_VALUES:
            raise ValueError(f"over {MAX_ONNX_VALUES} tensors, nodes and outputs of nodes")

    def _count_integers(self, field: _Field, numbers: tuple[int, ...]) -> None:
        if field.number in numbers and field.wire == _DELIMITED:
            self._count_fields(field.stop - field.start)

    def _count_fields(self, more: int) -> None:
        self._seen_fields += more
        if self._seen_fields > MAX_ONNX_FIELDS:
            raise ValueError(f"over {MAX_ONNX_FIELDS} fields and bytes of integers")

    def _inside(self, field: _Field) -> Iterator[_Field]:
        if field.wire != _DELIMITED:
            raise ValueError(f"field {field.number} at byte {field.start} is not a message")
        return self.fields(field.start, field.stop)

    def fields(self, at: int, end: int) -> Iterator[_Field]:
        data = self._data
        while at < end:
            self._count_fields(1)
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

    def _text(self, field: _Field) -> str:
        if field.wire != _DELIMITED or field.stop - field.start > MAX_EXTERNAL_TEXT_BYTES:
            raise ValueError(f"field {field.number} at byte {field.start} is no short text")
        return bytes(self._data[field.start : field.stop]).decode()


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


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise ValueError(f"{text[:40]!r} is not a number of bytes")
    return int(text)
