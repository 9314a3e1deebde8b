"""The graph codec at its edges: floats, references, sizes, and what has no encoding."""

from __future__ import annotations

import math
import struct

import msgspec
import pytest

from p2pflop.errors import JobError, ProtocolError
from p2pflop.ids import content_hash
from p2pflop.job.graph import (
    NEAR,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    decode_graph,
    encode_graph,
    graph_hash,
)
from p2pflop.job.limits import (
    MAX_GRAPH_ATTRS,
    MAX_GRAPH_NODES,
    MAX_GRAPH_PARAMS,
    MAX_GRAPH_REFS,
    MAX_TENSOR_RANK,
    Limits,
)

FLOAT32 = int(Dtype.FLOAT32)
NEGATED = Graph(
    (GraphParam(0, Dtype.FLOAT32, (4,)),),
    (Node(Op.PARAM, (0,)), Node(Op.NEG, (), (0,))),
    (Output(1), Output(1, 0)),
)


def constant(value: object, dtype: int = FLOAT32) -> Graph:
    return Graph((), (Node(Op.CONST, (dtype, value)),), (Output(0),))  # type: ignore[arg-type]


def wire(graph: Graph = NEGATED) -> list[object]:
    """The columns of an encoded graph: version, params, ops, refs, attrs, fresh, written."""
    columns = msgspec.msgpack.decode(encode_graph(graph))
    assert isinstance(columns, list)
    return columns


def refuse(columns: list[object], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode_graph(msgspec.msgpack.encode(columns))


def test_the_format_is_frozen() -> None:
    data = encode_graph(NEGATED)
    assert data.hex() == "9701919300 0b9104 c4020019 9101 9100 9101 91920000".replace(" ", "")
    assert graph_hash(data) == content_hash(data)


def test_numbers_of_operations_and_dtypes_are_frozen() -> None:
    assert (Op.PARAM, Op.GATHER, Op.EXP2, Op.ADD, Op.POW, Op.WHERE) == (0, 14, 20, 30, 48, 60)
    assert (Dtype.BOOL, Dtype.FLOAT32, Dtype.WEAKFLOAT) == (0, 11, 14)


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.5])
def test_float_constants_survive(value: float) -> None:
    found = decode_graph(encode_graph(constant(value))).nodes[0].attrs[1]
    assert isinstance(found, float)
    assert struct.pack("<d", found) == struct.pack("<d", value)


@pytest.mark.parametrize("bits", [0x7FF8000000000001, 0xFFF8000000000000, 0x7FF0000000000001])
def test_a_nan_has_one_bit_pattern(bits: int) -> None:
    plain = encode_graph(constant(math.nan))
    other = plain.replace(struct.pack(">d", math.nan), bits.to_bytes(8, "big"))
    assert other != plain
    with pytest.raises(ProtocolError, match="one encoding"):
        decode_graph(other)


def test_any_nan_is_encoded_the_one_way() -> None:
    odd = struct.unpack("<d", (0xFFF8000000000007).to_bytes(8, "little"))[0]
    assert encode_graph(constant(odd)) == encode_graph(constant(math.nan))


def test_equal_numbers_of_other_types_are_other_graphs() -> None:
    encodings = {encode_graph(constant(value)) for value in (1, 1.0, True, 0.0, -0.0, 0, False)}
    assert len(encodings) == 7


@pytest.mark.parametrize("value", [-(2**63), 2**64 - 1, None, False])
def test_the_widest_constants_survive(value: int | None) -> None:
    assert decode_graph(encode_graph(constant(value))) == constant(value)


@pytest.mark.parametrize(
    ("graph", "match"),
    [
        (constant(2**64), "serialize ints"),
        (constant("text"), "type str"),
        (Graph((), (Node(Op.NEG, (), (0,)),), ()), "does not point back"),
        (Graph((), (Node(Op.NEG, (), (-1,)),), ()), "does not point back"),
        (Graph((), (Node(Op.NEG),), ()), "takes 1 references"),
        (Graph((), (Node(Op.IOTA, (5,)),), ()), "takes 2 attributes"),
        (Graph((), (Node(Op.IOTA, (5, True)),), ()), "integer was expected"),
        (Graph((), (Node(Op.IOTA, (5, 1.0)),), ()), "integer was expected"),
        (Graph((), (Node(Op.IOTA, (5, 1)),), (Output(1),)), "refers to node 1"),
        (Graph((), (Node(Op.IOTA, (5, 1)),), (Output(0, 0), Output(0))), "fresh output stands"),
        (Graph((), (Node(Op.IOTA, (5, 1)),), (Output(0, 1), Output(0, 1))), "slots must rise"),
        (Graph((GraphParam(1, Dtype.BOOL, ()), GraphParam(0, Dtype.BOOL, ())), (), ()), "rise"),
    ],
)
def test_a_graph_without_an_encoding_is_the_jobs_fault(graph: Graph, match: str) -> None:
    with pytest.raises(JobError, match=match):
        encode_graph(graph)


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        (0, 2, "valid graph"),
        (2, b"\x00\xff", "operation 255 is unknown"),
        (2, b"\x00", "left over"),
        (3, [0], "references end too early"),
        (3, [0, 1], "reference 1 does not point back"),
        (3, [0, 0], "one encoding"),
        (3, [2], "reference -1 does not point back"),
        (3, [-1], "to no far node"),
        (3, [], "references end too early"),
        (3, [1, 1], "1 references are left over"),
        (4, [], "attributes end too early"),
        (4, [0, 0], "1 attributes are left over"),
        (4, [True], "integer was expected"),
        (5, [2], "refers to node 2"),
        (5, [-1], "refers to node -1"),
        (6, [[0, 1]], "refers to node 2"),
        (6, [[MAX_GRAPH_PARAMS, 0]], "valid graph"),
        (1, [[0, 15, [4]]], "valid graph"),
        (1, [[0, 11, [-1]]], "valid graph"),
    ],
)
def test_columns_that_do_not_fit_are_refused(column: int, value: object, match: str) -> None:
    columns = wire()
    columns[column] = value
    refuse(columns, match)


def far_graph() -> Graph:
    """Nodes 0 and 1, then enough others, then references to both at several distances."""
    fill = [Node(Op.CONST, (5, number)) for number in range(NEAR)]
    far = [
        Node(Op.ADD, (), (1, 2)),
        Node(Op.ADD, (), (0, 1)),
        Node(Op.ADD, (), (0, NEAR + 1)),
        Node(Op.ADD, (), (1, 0)),
    ]
    nodes = (Node(Op.CONST, (5, 7)), Node(Op.CONST, (5, 8)), *fill, *far)
    return Graph((), nodes, (Output(len(nodes) - 1),))


def test_far_references_repeat() -> None:
    graph = far_graph()
    assert wire(graph)[3] == [0, 1, NEAR, 0, -1, -1, -2, 3, -1, -2]
    assert decode_graph(encode_graph(graph)) == graph


@pytest.mark.parametrize(
    "changed",
    [
        [NEAR + 1, NEAR, 0, -1, -1, -2, 3, -1, -2],  # a far node by its distance
        [0, 1, 0, 1, 0, -2, -1, -3, 3, -1, -3],  # a near node as a far one
        [0, 1, NEAR, 0, -1, 0, 1, -2, 3, -1, -2],  # a known far node as a new one
        [0, 1, NEAR, 0, -1, -1, -2, 3, -1, -3],  # one that is not known
    ],
)
def test_references_have_one_form(changed: list[int]) -> None:
    columns = wire(far_graph())
    columns[3] = changed
    refuse(columns, "one encoding|no far node|does not point back")


def test_a_slot_past_the_last_is_refused() -> None:
    columns = wire()
    columns[6] = [[MAX_GRAPH_PARAMS - 1, 0]]
    assert decode_graph(msgspec.msgpack.encode(columns)).outputs[-1].slot == MAX_GRAPH_PARAMS - 1
    columns[6] = [[MAX_GRAPH_PARAMS - 1, 0], [0, 0]]
    refuse(columns, "over the limit")


def test_a_count_must_fit_its_column() -> None:
    reshaped = Graph((), (Node(Op.CONST, (5, 1)), Node(Op.RESHAPE, (1, 1), (0,))), (Output(1),))
    columns = wire(reshaped)
    for count in (-1, 3, 2**63):
        columns[4] = [5, 1, count, 1, 1]
        refuse(columns, "attributes")
    stacked = Graph((), (Node(Op.CONST, (5, 1)), Node(Op.STACK, (), (0, 0))), (Output(1),))
    columns = wire(stacked)
    columns[3] = [3, 1, 1]
    refuse(columns, "references end too early")


def test_an_integer_in_a_longer_form_is_refused() -> None:
    data = encode_graph(constant(1, 5))
    assert data.count(b"\x05\x01") == 1
    with pytest.raises(ProtocolError, match="one encoding"):
        decode_graph(data.replace(b"\x05\x01", b"\x05\xcc\x01"))


def test_limits_hold_at_their_edge() -> None:
    data = encode_graph(NEGATED)
    assert decode_graph(data, Limits(graph_bytes=len(data), nodes=2)) == NEGATED
    with pytest.raises(ProtocolError, match="bytes is over"):
        decode_graph(data, Limits(graph_bytes=len(data) - 1))
    with pytest.raises(ProtocolError, match="2 nodes is over"):
        decode_graph(data, Limits(nodes=1))


@pytest.mark.parametrize(
    ("column", "header"),
    [
        (1, MAX_GRAPH_PARAMS + 1),
        (3, MAX_GRAPH_REFS + 1),
        (4, MAX_GRAPH_ATTRS + 1),
        (3, 2**32 - 1),
        (4, 2**32 - 1),
    ],
)
def test_a_claimed_length_is_refused_before_anything_is_built(column: int, header: int) -> None:
    parts = [msgspec.msgpack.encode(part) for part in wire()]
    parts[column] = b"\xdd" + header.to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="valid graph"):
        decode_graph(b"\x97" + b"".join(parts))


def test_static_bounds_hold_at_their_edge() -> None:
    columns = wire()
    columns[1] = [[0, 11, [1] * MAX_TENSOR_RANK]]
    decode_graph(msgspec.msgpack.encode(columns))
    columns[1] = [[0, 11, [1] * (MAX_TENSOR_RANK + 1)]]
    refuse(columns, "valid graph")
    columns = wire()
    columns[2] = bytes(MAX_GRAPH_NODES + 1)
    refuse(columns, "valid graph")


def test_deep_nesting_is_refused() -> None:
    for depth in (10, 5000, 100_000):
        with pytest.raises(ProtocolError):
            decode_graph(b"\x97\x01" + b"\x91" * depth)
