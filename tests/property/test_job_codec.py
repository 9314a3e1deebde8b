"""Graphs and job records as bytes: one encoding, and nothing but ProtocolError for the rest."""

from __future__ import annotations

import contextlib
import math
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.errors import ProtocolError
from p2pflop.job.file import (
    FILE_MAGIC,
    JobBody,
    JobFile,
    Labels,
    decode_body,
    decode_file,
    encode_body,
    encode_file,
    open_job,
)
from p2pflop.job.graph import (
    BINARY,
    MOVEMENT,
    NEAR,
    TERNARY,
    Attr,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    decode_graph,
    encode_graph,
)
from p2pflop.job.meter import meter
from p2pflop.job.results import Trace, TraceLog, column_values, decode_trace
from p2pflop.job.spec import (
    BlobSource,
    ClassDescriptor,
    InitSource,
    Job,
    NamedOutput,
    NoSource,
    Phase,
    Result,
    ResultSource,
    Stop,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.job.validate import Checked, Refusal, validate
from p2pflop.wire import decode, encode

ints = st.integers(-(2**63), 2**64 - 1)
floats = st.floats().map(lambda value: math.nan if math.isnan(value) else value)
dims = st.lists(st.integers(0, 5), max_size=4).map(tuple)
hashes = st.binary(min_size=32, max_size=32)
u63 = st.integers(0, 2**63 - 1)
names = st.text(max_size=20)


@st.composite
def attributes(draw: st.DrawFn, op: Op) -> tuple[Attr, ...]:
    small = st.integers(0, 14)
    if op is Op.CONST:
        return draw(small), draw(st.none() | st.booleans() | ints | floats)
    if op is Op.PARAM:
        return (draw(st.integers(0, 3)),)
    if op in (Op.CAST, Op.BITCAST):
        return (draw(small),)
    if op in (Op.REDUCE, Op.IOTA):
        return draw(small), draw(st.integers(-1, 5))
    if op in MOVEMENT:
        return tuple(draw(st.lists(st.integers(-1, 6) | ints, max_size=6)))
    return ()


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph that has an encoding, mostly not a valid one."""
    slots = sorted(draw(st.sets(st.integers(0, 5), max_size=4)))
    params = tuple(GraphParam(slot, draw(st.sampled_from(Dtype)), draw(dims)) for slot in slots)
    lead = draw(st.sampled_from([0, NEAR + 3]))  # so that some references are far
    nodes = [Node(Op.CONST, (5, 0))] * lead
    for index in range(lead, lead + draw(st.integers(1, 12))):
        sources = [Op.PARAM, Op.CONST, Op.IOTA]
        op = draw(st.sampled_from(list(Op) if index else sources))
        count = (
            2 if op in BINARY or op is Op.GATHER else 3 if op in TERNARY or op is Op.ASSIGN else 1
        )
        if op in sources:
            count = 0
        elif op is Op.STACK:
            count = draw(st.integers(0, 4))
        refs = tuple(draw(st.integers(0, index - 1)) for _ in range(count))
        nodes.append(Node(op, draw(attributes(op)), refs))
    node = st.integers(0, len(nodes) - 1)
    fresh = [Output(number) for number in draw(st.lists(node, max_size=3))]
    written = sorted(draw(st.sets(st.integers(0, 5), max_size=3)))
    return Graph(params, tuple(nodes), (*fresh, *(Output(draw(node), slot) for slot in written)))


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        kind = draw(st.sampled_from(["set", "insert", "delete"]))
        if kind == "insert" or at == len(changed):
            changed.insert(at, draw(st.integers(0, 255)))
        elif kind == "set":
            changed[at] = draw(st.integers(0, 255))
        else:
            del changed[at]
    return bytes(changed)


def must_be_its_one_encoding(data: bytes) -> None:
    """Decoding refuses ``data``, or gives a graph whose encoding it is, which can be validated."""
    try:
        graph = decode_graph(data)
    except ProtocolError:
        return
    assert encode_graph(graph) == data
    checked = validate(graph)
    if isinstance(checked, Checked):
        meter(checked)
    else:
        assert checked.reason


@given(graphs())
def test_every_graph_survives_its_encoding(graph: Graph) -> None:
    data = encode_graph(graph)
    again = decode_graph(data)
    assert again == graph
    assert repr(again) == repr(graph)  # -0.0 and 0.0, 1 and 1.0 and True are equal but not the same
    assert isinstance(validate(again), Checked | Refusal)


@given(st.data())
def test_no_second_encoding_of_a_graph_is_accepted(data: st.DataObject) -> None:
    encoded = encode_graph(data.draw(graphs()))
    must_be_its_one_encoding(data.draw(mutations(encoded)))


@given(st.binary(max_size=200))
def test_random_bytes_are_no_graph(data: bytes) -> None:
    must_be_its_one_encoding(data)


sources = st.one_of(
    st.builds(BlobSource, hashes, u63),
    st.builds(InitSource, hashes, st.integers(0, 9)),
    st.builds(ResultSource, hashes, u63, u63, st.integers(0, 9)),
    st.just(NoSource()),
)
works = st.builds(
    Work,
    version=st.just(1),
    phases=st.lists(
        st.builds(
            Phase,
            hashes,
            st.integers(1, 2**40),
            st.integers(0, 2**40),
            st.lists(st.integers(0, 2), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    params=st.lists(
        st.builds(WorkParam, st.integers(0, 12), dims, st.integers(0, 4), sources), max_size=4
    ).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    stop=st.none() | st.builds(Stop, st.integers(0, 3), st.integers(0, 3), st.integers(1, 9)),
)


@st.composite
def files(draw: st.DrawFn) -> JobFile:
    work = draw(works)
    job = Job(work_id(work), draw(u63), draw(st.integers(1, 2**40)))
    encoded = tuple(encode_graph(graph) for graph in draw(st.lists(graphs(), max_size=2)))
    labels = Labels(
        draw(names),
        tuple(draw(names) for _ in work.params),
        tuple(draw(names) for _ in work.phases),
        tuple(tuple(draw(names) for _ in phase.modes) for phase in work.phases),
    )
    return JobFile(1, JobBody(job, encode(work), encoded), labels)


@given(files())
def test_job_files_survive_their_encoding(file: JobFile) -> None:
    assert decode_body(encode_body(file.body)) == file.body
    assert decode_file(encode_file(file)) == file
    assert isinstance(open_job(file.body), Refusal)  # its graphs are not those the work names


@given(st.data())
def test_no_second_encoding_of_a_job_is_accepted(data: st.DataObject) -> None:
    encoded = encode(data.draw(files()).body)
    changed = data.draw(mutations(encoded))
    try:
        body = decode_body(zlib.compress(changed))
    except ProtocolError:
        return
    assert encode(body) == changed
    assert isinstance(open_job(body), Refusal)


texts = st.text(max_size=20)
records = st.one_of(
    works,
    st.builds(Job, hashes, u63, st.integers(1, 2**40)),
    st.builds(ClassDescriptor, texts, texts, texts, texts, texts, texts, texts),
    st.builds(
        Result,
        st.just(1),
        hashes,
        hashes,
        u63,
        u63,
        st.lists(hashes, max_size=3).map(tuple),
        st.lists(
            st.builds(NamedOutput, st.integers(0, 9), st.integers(0, 9), hashes, u63), max_size=3
        ).map(tuple),
        hashes,
        st.lists(hashes, max_size=3).map(tuple),
        hashes,
    ),
)


@given(st.data())
def test_records_have_one_encoding(data: st.DataObject) -> None:
    record = data.draw(records)
    encoded = encode(record)
    assert decode(type(record), encoded) == record
    changed = data.draw(mutations(encoded))
    try:
        other = decode(type(record), changed)
    except ProtocolError:
        return
    assert encode(other) == changed


@given(st.binary(max_size=300))
def test_random_bytes_are_no_job(data: bytes) -> None:
    for decoder in (decode_body, decode_file):
        with pytest.raises(ProtocolError):
            decoder(data)
    with pytest.raises(ProtocolError):
        decode_file(FILE_MAGIC + zlib.compress(data))
    with contextlib.suppress(ProtocolError):
        decode_trace(data)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), floats), max_size=30))
def test_a_trace_gives_back_what_was_logged(rows: list[tuple[int, int, float]]) -> None:
    log = TraceLog()
    expected: dict[tuple[int, int], list[float]] = {}
    for phase, output, value in rows:
        log.append(phase, output, Dtype.FLOAT64, struct.pack("<d", value))
        expected.setdefault((phase, output), []).append(value)
    columns = decode_trace(log.encode())
    found = {(column.phase, column.output): column_values(column) for column in columns}
    assert repr(found) == repr(dict(sorted(expected.items())))


@given(st.data())
def test_no_second_encoding_of_a_trace_is_accepted(data: st.DataObject) -> None:
    log = TraceLog()
    for number in range(data.draw(st.integers(0, 5))):
        log.append(number % 2, number % 3, Dtype.UINT8, bytes([number]))
    changed = data.draw(mutations(log.encode()))
    try:
        columns = decode_trace(changed)
    except ProtocolError:
        return
    assert encode(Trace(1, columns)) == changed
