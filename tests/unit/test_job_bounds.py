"""What is bounded in jobs, sessions, and what is read of files, at each limit."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from p2pflop.dht import database as database_module
from p2pflop.dht.database import Database
from p2pflop.dht.memory import MemoryStore
from p2pflop.errors import ConfigError, JobError, ProtocolError, StoreError
from p2pflop.job import safetensors, session
from p2pflop.job.commands import (
    MAX_BATCH_COMMANDS,
    MAX_DATA_BYTES,
    MAX_SCRIPT_TEXT,
    MAX_WRITE_BYTES,
    NOBODY,
    Allocate,
    Batch,
    Bind,
    Data,
    Define,
    Failed,
    Free,
    NodeFrame,
    Note,
    ScriptFrame,
    Write,
    decode_frame,
    encode_frame,
)
from p2pflop.job.file import MAX_BODY_GRAPHS, JobBody, Labels
from p2pflop.job.graph import graph_hash
from p2pflop.job.session import SessionTable, open_graph
from p2pflop.job.spec import (
    MAX_PARAMS,
    MAX_PHASE_OUTPUTS,
    MAX_PHASES,
    MODE_LAST,
    ROLE_STATE,
    Job,
    NoSource,
    Phase,
    Work,
    WorkParam,
)
from p2pflop.job.variants import MAX_VALUE_BYTES, Variants
from p2pflop.wire import Record, decode, encode
from tests.session_scripts import FLOATS, sample_graph
from tests.sim.test_packs_memory import job_file

ZERO = bytes(32)
SIZE = 4 * FLOATS
GRAPHS = [sample_graph(times=times) for times in (1, 2, 3)]
PARAM = WorkParam(0, (), ROLE_STATE, NoSource())


def work(phases: int = 1, params: int = 0, outputs: int = 0) -> Work:
    phase = Phase(ZERO, 1, 0, (MODE_LAST,) * outputs)
    return Work(1, (phase,) * phases, (PARAM,) * params, 0)


def body(graphs: int) -> JobBody:
    return JobBody(Job(ZERO, 0, 1), b"", (b"",) * graphs)


def labels(**counts: int) -> Labels:
    return Labels(
        "",
        ("",) * counts.get("params", 0),
        ("",) * counts.get("phases", 0),
        (("",) * counts.get("outputs", 0),),
    )


def variants(value_bytes: int) -> Variants:
    return Variants(1, job_file(), 1, (0,), ("ab" * 6,), ((bytes(value_bytes),),))


@pytest.mark.parametrize(
    ("most", "over"),
    [
        (work(phases=MAX_PHASES), work(phases=MAX_PHASES + 1)),
        (work(params=MAX_PARAMS), work(params=MAX_PARAMS + 1)),
        (work(outputs=MAX_PHASE_OUTPUTS), work(outputs=MAX_PHASE_OUTPUTS + 1)),
        (body(MAX_BODY_GRAPHS), body(MAX_BODY_GRAPHS + 1)),
        (labels(params=MAX_PARAMS), labels(params=MAX_PARAMS + 1)),
        (labels(phases=MAX_PHASES), labels(phases=MAX_PHASES + 1)),
        (labels(outputs=MAX_PHASE_OUTPUTS), labels(outputs=MAX_PHASE_OUTPUTS + 1)),
        (variants(MAX_VALUE_BYTES), variants(MAX_VALUE_BYTES + 1)),
    ],
)
def test_what_a_job_is_made_of_is_bounded(most: Record, over: Record) -> None:
    assert decode(type(most), encode(most)) == most
    with pytest.raises(ProtocolError, match="length"):
        decode(type(over), encode(over))


@pytest.mark.parametrize(
    ("kind", "most", "over"),
    [
        (
            ScriptFrame,
            Batch(0, (Free(0),) * MAX_BATCH_COMMANDS),
            Batch(0, (Free(0),) * (MAX_BATCH_COMMANDS + 1)),
        ),
        (
            ScriptFrame,
            Batch(0, (Write(0, 0, bytes(MAX_WRITE_BYTES)),)),
            Batch(0, (Write(0, 0, bytes(MAX_WRITE_BYTES + 1)),)),
        ),
        (
            NodeFrame,
            Data(0, bytes(MAX_DATA_BYTES), True),
            Data(0, bytes(MAX_DATA_BYTES + 1), True),
        ),
        (NodeFrame, Note("x" * MAX_SCRIPT_TEXT), Note("x" * (MAX_SCRIPT_TEXT + 1))),
        (
            NodeFrame,
            Failed(NOBODY, True, "x" * MAX_SCRIPT_TEXT, ""),
            Failed(NOBODY, True, "", "x" * (MAX_SCRIPT_TEXT + 1)),
        ),
    ],
)
def test_frames_of_a_session_are_bounded(kind: Any, most: Any, over: Any) -> None:
    assert decode_frame(kind, encode_frame(most)) == most
    with pytest.raises(ProtocolError, match="length"):
        decode_frame(kind, msgspec.msgpack.encode(over))


def begun(graphs: int = 0) -> SessionTable:
    table = SessionTable(2 * SIZE)
    for buffer in (0, 1):
        table.apply(Allocate(buffer, SIZE))
    for graph in GRAPHS[:graphs]:
        table.apply(Define(graph), open_graph(graph))
    return table


def binding(number: int) -> Bind:
    return Bind(number, graph_hash(GRAPHS[0]), ((0, 0), (1, 0)))


def test_graphs_of_a_session_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "MAX_SESSION_GRAPHS", 2)
        table = begun(graphs=2)
        with pytest.raises(JobError, match="over 2 graphs"):
            table.apply(Define(GRAPHS[2]), open_graph(GRAPHS[2]))
        table.apply(Define(GRAPHS[0]), open_graph(GRAPHS[0]))  # it is there already
    most = len(GRAPHS[0]) + len(GRAPHS[1])
    monkeypatch.setattr(session, "MAX_SESSION_GRAPH_BYTES", most)
    table = begun(graphs=2)
    with pytest.raises(JobError, match=f"graphs of over {most} bytes"):
        table.apply(Define(GRAPHS[2]), open_graph(GRAPHS[2]))


def test_bindings_of_a_session_and_their_places_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "MAX_BINDINGS", 2)
        table = begun(graphs=1)
        for number in (0, 1, 1):  # the last takes the place of the one before
            table.apply(binding(number))
        with pytest.raises(JobError, match="over 2 bindings"):
            table.apply(binding(2))
    monkeypatch.setattr(session, "MAX_PLACES", 5)
    table = begun(graphs=1)
    for number in (0, 1, 0):
        table.apply(binding(number))
    with pytest.raises(JobError, match="over 5 places"):
        table.apply(binding(2))
    table.apply(Free(0))  # and all bindings that name it
    table.apply(Allocate(0, SIZE))
    for number in (2, 3):
        table.apply(binding(number))


def test_a_file_of_weights_names_a_bounded_number_of_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)

    def read(count: int) -> int:
        entries = {
            f"t{number}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
            for number in range(count)
        }
        header = json.dumps(entries).encode()
        size_bytes = safetensors.LENGTH_BYTES + len(header) + count
        return len(safetensors.parse_header(header, size_bytes, "weights"))

    assert read(3) == 3
    with pytest.raises(ConfigError, match="names 4 tensors, over 3"):
        read(4)


async def test_a_blob_is_read_whole_up_to_what_the_reader_takes() -> None:
    store = MemoryStore()
    info = await store.put(bytes(100))
    assert await store.get(info.address, 100) == bytes(100)
    with pytest.raises(StoreError):
        await store.get(info.address, 99)


async def test_a_commit_is_of_a_bounded_number_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "MAX_GROUP", 3)
    sizes: list[int] = []
    commit, all_wait = Database._commit, threading.Event()

    def counted(self: Database, requests: list[Any]) -> None:
        assert all_wait.wait(5)
        sizes.append(len(requests))
        commit(self, requests)

    monkeypatch.setattr(Database, "_commit", counted)
    database = Database(tmp_path / "rows.db", "CREATE TABLE rows (number INTEGER)", 1)

    async def add(number: int) -> None:
        def change(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO rows VALUES (?)", (number,))

        await database.write(change)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(add, number)
        await trio.testing.wait_all_tasks_blocked()
        all_wait.set()
    assert (sum(sizes), max(sizes)) == (20, 3)
    assert database.read("SELECT COUNT(*) FROM rows") == [(20,)]
    await database.aclose()
