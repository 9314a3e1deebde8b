"""Works against their graphs, and jobs as files: what opens, and every way not to."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace as replace_graph
from typing import Any

import msgspec
import pytest

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job import file as file_module
from p2pflop.job.file import (
    MAX_COMPRESSED_BYTES,
    MAX_INFLATED_BYTES,
    CheckedJob,
    JobBody,
    JobFile,
    Labels,
    decode_body,
    decode_file,
    encode_body,
    encode_file,
    open_job,
)
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.job.limits import Limits
from p2pflop.job.meter import meter
from p2pflop.job.spec import (
    MODE_COLLECT,
    MODE_LAST,
    MODE_TRACE,
    ROLE_FEED,
    ROLE_INPUT,
    ROLE_SEED,
    ROLE_STATE,
    ROLE_STEP,
    BlobSource,
    InitSource,
    Job,
    NoSource,
    Phase,
    ResultSource,
    Stop,
    Work,
    WorkParam,
    state_root,
    work_id,
)
from p2pflop.job.validate import Refusal
from p2pflop.wire import encode

FLOAT32, UINT32, INT32 = int(Dtype.FLOAT32), int(Dtype.UINT32), int(Dtype.INT32)
SEED, WEIGHTS, DATA, STEP = range(4)

STEP_GRAPH = Graph(
    (
        GraphParam(WEIGHTS, Dtype.FLOAT32, (4,)),
        GraphParam(DATA, Dtype.FLOAT32, (4,)),
        GraphParam(STEP, Dtype.INT32, ()),
    ),
    (
        Node(Op.PARAM, (WEIGHTS,)),
        Node(Op.PARAM, (DATA,)),
        Node(Op.ADD, (), (0, 1)),
        Node(Op.REDUCE, (0, 1), (2,)),
        Node(Op.PARAM, (STEP,)),
        Node(Op.CONST, (int(Dtype.WEAKINT), 50)),
        Node(Op.CMPLT, (), (5, 4)),
    ),
    (Output(3), Output(2), Output(6), Output(2, WEIGHTS)),
)
INIT_GRAPH = Graph(
    (GraphParam(SEED, Dtype.UINT32, (2,)),),
    (
        Node(Op.PARAM, (SEED,)),
        Node(Op.CAST, (FLOAT32,), (0,)),
        Node(Op.STACK, (), (1, 1)),
        Node(Op.RESHAPE, (4,), (2,)),
    ),
    (Output(3),),
)


def work_of(step: Graph = STEP_GRAPH, init: Graph = INIT_GRAPH) -> Work:
    return Work(
        version=1,
        phases=(Phase(name(step), 1, 0, (MODE_TRACE, MODE_LAST, MODE_TRACE)),),
        params=(
            WorkParam(UINT32, (2,), ROLE_SEED, NoSource()),
            WorkParam(FLOAT32, (4,), ROLE_STATE, InitSource(name(init), 0)),
            WorkParam(FLOAT32, (4,), ROLE_INPUT, BlobSource(b"d" * 32, 16)),
            WorkParam(INT32, (), ROLE_STEP, NoSource()),
        ),
        seed=7,
        stop=Stop(0, 2, 10),
    )


def name(graph: Graph) -> bytes:
    return graph_hash(encode_graph(graph))


def body_of(
    work: Work,
    *graphs: Graph,
    first_step: int = 0,
    steps: int = 100,
    of: Work | None = None,
    state: tuple[bytes, ...] = (),
) -> JobBody:
    job = Job(work_id(of or work), first_step, steps)
    encoded = tuple(encode_graph(graph) for graph in graphs or (STEP_GRAPH, INIT_GRAPH))
    return JobBody(job, encode(work), encoded, state)


def labels() -> Labels:
    return Labels("demo", ("seed", "weights", "data", "step"), ("train",), (("loss", "w", "end"),))


def opened(body: JobBody, limits: Limits | None = None) -> CheckedJob:
    found = open_job(body, limits or Limits())
    assert isinstance(found, CheckedJob), found
    return found


def refused(body: JobBody, match: str, limits: Limits | None = None) -> None:
    found = open_job(body, limits or Limits())
    assert isinstance(found, Refusal)
    assert match in found.reason


def test_a_stretch_starts_from_a_state_or_does_not_say_yet() -> None:
    work, begun = work_of(), (b"s" * 32,)
    whole = opened(body_of(work))
    assert whole.starts
    assert whole.root_from == bytes(32)
    assert whole.inputs == ((DATA, BlobSource(b"d" * 32, 16)),)
    unsaid = opened(body_of(work, first_step=5))
    assert not unsaid.starts
    said = opened(body_of(work, first_step=5, state=begun))
    assert said.starts
    assert said.root_from == state_root(begun)
    assert said.inputs == (
        (WEIGHTS, BlobSource(b"s" * 32, 16)),
        (DATA, BlobSource(b"d" * 32, 16)),
    )
    refused(body_of(work, state=begun), "1 tensors to start from, the job has 0")
    refused(body_of(work, first_step=5, state=begun * 2), "2 tensors to start from")


def test_a_job_opens_with_everything_a_provider_needs() -> None:
    work = work_of()
    checked = opened(decode_body(encode_body(body_of(work))))
    assert checked.work == work
    assert checked.work_id == work_id(work)
    assert list(checked.graphs) == [name(STEP_GRAPH), name(INIT_GRAPH)]
    once = {graph: meter(each) for graph, each in checked.graphs.items()}
    flops = 100 * once[name(STEP_GRAPH)].flop + once[name(INIT_GRAPH)].flop
    assert checked.cost.flop == flops


def param(slot: int, **changes: Any) -> Callable[[Work], Work]:
    def change(work: Work) -> Work:
        params = list(work.params)
        params[slot] = msgspec.structs.replace(params[slot], **changes)
        return msgspec.structs.replace(work, params=tuple(params))

    return change


def phase(**changes: Any) -> Callable[[Work], Work]:
    def change(work: Work) -> Work:
        changed = msgspec.structs.replace(work.phases[0], **changes)
        return msgspec.structs.replace(work, phases=(changed,))

    return change


def stop(*fields: int) -> Callable[[Work], Work]:
    return lambda work: msgspec.structs.replace(work, stop=Stop(*fields))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (param(WEIGHTS, shape=(5,)), "otherwise than the work"),
        (param(WEIGHTS, dtype=INT32), "otherwise than the work"),
        (param(WEIGHTS, role=ROLE_INPUT), "which is not state"),
        (param(DATA, source=NoSource()), "nothing gives it a value"),
        (param(DATA, source=ResultSource(b"w" * 32, 0, 1, 0)), "unresolved"),
        (param(WEIGHTS, source=InitSource(name(INIT_GRAPH), 1)), "no such output"),
        (param(DATA, source=InitSource(name(STEP_GRAPH), 0)), "which is no seed"),
        (param(DATA, source=BlobSource(b"d" * 32, 15)), "blob of another size"),
        (param(DATA, shape=(0,)), "out of range"),
        (param(DATA, role=ROLE_FEED), "a feed and its shards go together"),
        (param(STEP, source=BlobSource(b"d" * 32, 4)), "the run itself supplies it"),
        (param(STEP, dtype=FLOAT32), "a step is one"),
        (param(STEP, shape=(2,)), "a step is one"),
        (param(SEED, shape=()), "a seed is two"),
        (param(SEED, dtype=INT32), "a seed is two"),
        (phase(modes=(MODE_LAST, MODE_LAST)), "2 modes for 3 outputs"),
        (phase(modes=(MODE_LAST, MODE_TRACE, MODE_LAST)), "traced output 1 is not 0-d"),
        (stop(1, 0, 1), "no phase 1"),
        (stop(0, 3, 1), "no output 3"),
        (stop(0, 0, 1), "not a 0-d bool"),
        (stop(0, 1, 1), "not a 0-d bool"),
        (phase(modes=(MODE_TRACE, MODE_LAST, MODE_LAST)), "is not traced"),
    ],
)
def test_a_work_that_does_not_fit_its_graphs(change: Callable[[Work], Work], match: str) -> None:
    refused(body_of(change(work_of())), match)


def test_every_mode_is_taken() -> None:
    opened(body_of(phase(modes=(MODE_COLLECT, MODE_COLLECT, MODE_TRACE))(work_of())))


def test_an_init_graph_reads_only_the_seed_and_writes_nothing() -> None:
    reads_data = Graph(
        (GraphParam(DATA, Dtype.FLOAT32, (4,)),), (Node(Op.PARAM, (DATA,)),), (Output(0),)
    )
    refused(body_of(work_of(init=reads_data), STEP_GRAPH, reads_data), "which is no seed")
    writes = Graph(INIT_GRAPH.params, INIT_GRAPH.nodes, (Output(3), Output(0, SEED)))
    refused(body_of(work_of(init=writes), STEP_GRAPH, writes), "writes a slot")
    other = replace_graph(INIT_GRAPH, outputs=(Output(2),))
    refused(body_of(work_of(init=other), STEP_GRAPH, other), "another dtype or shape")


def test_a_graph_may_not_see_slots_that_the_work_lacks() -> None:
    work = work_of()
    short = msgspec.structs.replace(work, params=work.params[:STEP])
    refused(body_of(short), "the work has no slot 3")


def test_graphs_are_exactly_those_of_the_work_in_order() -> None:
    work = work_of()
    refused(body_of(work, STEP_GRAPH), "not those of its work")
    refused(body_of(work, INIT_GRAPH, STEP_GRAPH), "not those of its work")
    refused(body_of(work, STEP_GRAPH, INIT_GRAPH, INIT_GRAPH), "not those of its work")
    opened(body_of(work), Limits(graphs=2))
    refused(body_of(work), "2 graphs are over", Limits(graphs=1))


def test_a_small_graph_is_looked_at_once_for_all_works_that_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, shared = work_of(), name(STEP_GRAPH)
    other, size = msgspec.structs.replace(one, seed=8), len(encode_graph(STEP_GRAPH))
    monkeypatch.setattr(file_module, "MAX_KNOWN_GRAPH_BYTES", size)
    known = opened(body_of(one))
    assert opened(body_of(other)).graphs[shared] is known.graphs[shared]
    assert opened(body_of(other)).cost == known.cost
    monkeypatch.setattr(file_module, "MAX_KNOWN_GRAPH_BYTES", size - 1)
    assert opened(body_of(other)).graphs[shared] is not known.graphs[shared]
    assert opened(body_of(other)).graphs[shared] == known.graphs[shared]


def test_an_invalid_graph_is_named() -> None:
    bad = replace_graph(INIT_GRAPH, outputs=())
    refused(body_of(work_of(init=bad), STEP_GRAPH, bad), f"graph {name(bad).hex()[:12]}: 0 outputs")


def test_a_job_is_a_stretch_of_its_own_work() -> None:
    work = work_of()
    other = msgspec.structs.replace(work, seed=8)
    refused(body_of(work, of=other), "for another work")


def test_steps_fit_the_step_slot() -> None:
    opened(body_of(work_of(), first_step=2**31 - 100))
    refused(body_of(work_of(), first_step=2**31 - 99), "cannot hold step 2147483648")


def test_the_trace_limit_at_its_edge() -> None:
    opened(body_of(work_of(), steps=20), Limits(trace_bytes=100))
    refused(body_of(work_of(), steps=21), "trace of 105 bytes", Limits(trace_bytes=100))


def test_the_limit_on_all_nodes_at_its_edge() -> None:
    nodes = len(STEP_GRAPH.nodes) + len(INIT_GRAPH.nodes)
    opened(body_of(work_of()), Limits(job_nodes=nodes))
    refused(body_of(work_of()), "nodes in all graphs", Limits(job_nodes=nodes - 1))


def test_works_and_graphs_in_other_encodings_are_refused() -> None:
    body = body_of(work_of())
    long_work = body.work[:-5] + b"\xcc" + body.work[-5:]  # the seed in two bytes
    refused(JobBody(body.job, long_work, body.graphs), "one encoding")
    work = work_of()
    phases = (msgspec.structs.replace(work.phases[0], graph=graph_hash(b"")), *work.phases[1:])
    work = msgspec.structs.replace(work, phases=phases)
    refused(JobBody(body.job, encode(work), (b"", *body.graphs[1:])), "not a valid graph")


def test_files_carry_names() -> None:
    file = JobFile(1, body_of(work_of()), labels())
    data = encode_file(file)
    assert decode_file(data) == file
    assert len(data) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"params": ("seed",)},
        {"phases": ()},
        {"outputs": ()},
        {"outputs": (("loss",),)},
    ],
)
def test_names_must_fit_the_work(changes: dict[str, Any]) -> None:
    file = JobFile(1, body_of(work_of()), msgspec.structs.replace(labels(), **changes))
    with pytest.raises(ProtocolError, match="do not fit its work"):
        decode_file(encode_file(file))


def test_names_are_no_part_of_what_is_computed() -> None:
    renamed = msgspec.structs.replace(labels(), title="other")
    files = [JobFile(1, body_of(work_of()), each) for each in (labels(), renamed)]
    assert files[0].body == files[1].body


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_files_cut_short_are_refused(cut: int) -> None:
    data = encode_file(JobFile(1, body_of(work_of()), labels()))
    with pytest.raises(ProtocolError):
        decode_file(data[:cut])
    with pytest.raises(ProtocolError, match="after its end"):
        decode_file(data + b"\0")


def test_a_zlib_bomb_is_inflated_to_the_limit_only() -> None:
    bomb = zlib.compress(bytes(MAX_INFLATED_BYTES + 1), 9)
    assert len(bomb) < MAX_INFLATED_BYTES // 500
    with pytest.raises(ProtocolError, match="bytes inflated"):
        decode_body(bomb)
    with pytest.raises(ProtocolError, match="JobBody"):
        decode_body(zlib.compress(bytes(MAX_INFLATED_BYTES), 9))


def test_compressed_size_is_limited() -> None:
    with pytest.raises(ProtocolError, match="zlib stream"):
        decode_body(bytes(MAX_COMPRESSED_BYTES))
    with pytest.raises(ProtocolError, match="is over"):
        decode_body(bytes(MAX_COMPRESSED_BYTES + 1))


def test_what_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of(work_of())
    monkeypatch.setattr(file_module, "MAX_INFLATED_BYTES", len(encode(body)))
    encode_body(body)
    monkeypatch.setattr(file_module, "MAX_INFLATED_BYTES", len(encode(body)) - 1)
    with pytest.raises(JobError, match="too large"):
        encode_body(body)
