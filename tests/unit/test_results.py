"""Jobs and results in a user's hands: files, arguments, names, and what verification catches."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError, ConfigError, JobError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.job import submission
from p2pflop.job.file import JobBody, JobFile, Labels, decode_file, encode_file
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph
from p2pflop.job.results import TraceLog, build_result, result_hash
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_INPUT,
    ROLE_STATE,
    BlobSource,
    Job,
    NamedOutput,
    Phase,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.line import Answer, HttpLine, Request
from p2pflop.results import Result, _array
from p2pflop.wire import encode

STEPS = 4
START = struct.pack("<2f", 1, 2)
RATE = struct.pack("<f", 0.5)
F32 = int(Dtype.FLOAT32)


def doubling_job() -> pf.Job:
    """Each step doubles the state ``net.w`` and traces its sum; ``last`` is the state, every 2."""
    params = (GraphParam(0, Dtype.FLOAT32, (2,)), GraphParam(1, Dtype.FLOAT32, ()))
    nodes = (
        Node(Op.PARAM, (0,)),
        Node(Op.ADD, (), (0, 0)),
        Node(Op.REDUCE, (0, 1), (1,)),
        Node(Op.PARAM, (1,)),
        Node(Op.MUL, (), (2, 3)),
    )
    train = encode_graph(Graph(params, nodes, (Output(4), Output(1, 0))))
    look = encode_graph(Graph(params[:1], (*nodes[:1], Node(Op.NEG, (), (0,))), (Output(1),)))
    work = Work(
        1,
        (
            Phase(content_hash(train), 1, 0, (MODE_TRACE,)),
            Phase(content_hash(look), 2, 0, (MODE_LAST,)),
        ),
        (
            WorkParam(F32, (2,), ROLE_STATE, BlobSource(address_of(START), 8)),
            WorkParam(F32, (), ROLE_INPUT, BlobSource(address_of(RATE), 4)),
        ),
        0,
    )
    body = JobBody(Job(work_id(work), 0, STEPS), encode(work), (train, look))
    labels = Labels("doubling", ("net.w", "rate"), ("train", "look"), (("sum",), ("last",)))
    return pf.Job(JobFile(1, body, labels), {address_of(data): data for data in (START, RATE)})


def doubling_result(job: pf.Job) -> tuple[bytes, dict[bytes, bytes]]:
    """The encoded record of the job's result and its blobs, computed by hand."""
    log = TraceLog()
    for step in range(STEPS):
        log.append(0, 0, Dtype.FLOAT32, struct.pack("<f", 3 * 2**step))
    trace, state = log.encode(), struct.pack("<2f", 16, 32)
    last = struct.pack("<2f", -16, -32)
    opened = job.checked
    record = build_result(
        opened.work,
        opened.job,
        class_id=bytes(32),
        steps_done=STEPS,
        outputs=[NamedOutput(1, 0, address_of(last), len(last))],
        trace=address_of(trace),
        state=[address_of(state)],
    )
    return encode(record), {address_of(blob): blob for blob in (trace, state, last)}


@pytest.fixture
def job() -> pf.Job:
    return doubling_job()


@pytest.fixture
def result(job: pf.Job) -> Result:
    record, blobs = doubling_result(job)
    return Result.opened(
        record,
        job.file,
        blobs.__getitem__,
        result_hash=content_hash(record).hex(),
        cost_nusd=1_500_000_000,
    )


class TestJob:
    def test_it_tells_its_size_and_cost(self, job: pf.Job) -> None:
        assert job.size_bytes == len(job.bytes) < 1000
        assert job.steps == STEPS
        assert job.cost.flop == 4 * (2 + 2 + 1) + 2 * 2
        assert repr(job).startswith("Job('doubling', 4 steps, ")

    def test_save_and_load_keep_everything(self, job: pf.Job, tmp_path: Path) -> None:
        path = job.save(tmp_path / "job.p2pj")
        again = pf.load(path)
        assert again.file == job.file
        assert dict(again.inputs) == dict(job.inputs)
        assert set(again.inputs.values()) == {START, RATE}

    def test_a_file_without_its_inputs_names_what_lacks(self, job: pf.Job, tmp_path: Path) -> None:
        bare = pf.Job(job.file).save(tmp_path / "job.p2pj")
        with pytest.raises(BlobNotFoundError, match=r"'net\.w'.*p2pflop://") as caught:
            pf.load(bare).run_local()
        assert ".inputs" in caught.value.hint

    @pytest.mark.parametrize("cut", [0, 3, 100, -1])
    def test_a_truncated_file_is_one_clear_error(
        self, job: pf.Job, tmp_path: Path, cut: int
    ) -> None:
        path = tmp_path / "job.p2pj"
        path.write_bytes(encode_file(job.file)[:cut])
        with pytest.raises(JobError, match=r"job\.p2pj") as caught:
            pf.load(path)
        assert caught.value.hint

    def test_files_that_cannot_be_read_or_written(self, job: pf.Job, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot read") as caught:
            pf.load(tmp_path / "nothing.p2pj")
        assert "p2pflop trace" in caught.value.hint
        with pytest.raises(ConfigError, match="cannot write"):
            job.save(tmp_path / "nowhere" / "job.p2pj")

    def test_with_args_changes_the_work_and_no_graph(self, job: pf.Job) -> None:
        faster = job.with_args(rate=2)
        assert faster.file.body.graphs == job.file.body.graphs
        assert faster.checked.work_id != job.checked.work_id
        assert struct.pack("<f", 2) in faster.inputs.values()
        assert faster.with_args(rate=0.5).file == job.file

    @pytest.mark.parametrize(("name", "value"), [("speed", 1), ("net.w", 1), ("rate", "fast")])
    def test_with_args_refuses_what_is_no_argument(
        self, job: pf.Job, name: str, value: Any
    ) -> None:
        with pytest.raises(ConfigError, match=name):
            job.with_args(**{name: value})


class TestResult:
    def test_values_by_name(self, result: Result) -> None:
        assert list(result) == ["sum", "last"]
        np.testing.assert_array_equal(result["sum"], [3, 6, 12, 24])
        np.testing.assert_array_equal(result["last"], [-16, -32])
        assert result.steps_of("sum") == [0, 1, 2, 3]
        assert result.last_row() == (3, {"sum": 24})
        assert result.address("last") == address_of(struct.pack("<2f", -16, -32)).hex()
        assert (result.steps, result.cost_usd) == (STEPS, 1.5)
        for look in (
            result.__getitem__,
            result.address,
            result.steps_of,
            lambda name: list(result.collected(name)),
        ):
            with pytest.raises(KeyError, match="'loss' is not an output; there are sum, last"):
                look("loss")
        with pytest.raises(KeyError, match="kept in the trace"):
            result.address("sum")

    def test_state_by_name_and_by_part(self, result: Result) -> None:
        assert list(result.state) == ["net.w"]
        np.testing.assert_array_equal(result.state["net.w"], [16, 32])
        np.testing.assert_array_equal(result.state["net"]["w"], [16, 32])
        assert repr(result.state) == "State(net.w: float32[2])"
        assert len(result.state.address("net.w")) == 64
        for look in (result.state.__getitem__, result.state.address):
            with pytest.raises(KeyError, match=r"no state 'opt'; there are net\.w"):
                look("opt")

    def test_the_hash_is_the_records(self, job: pf.Job, result: Result) -> None:
        assert result.hash == result_hash(result.record).hex()
        record, blobs = doubling_result(job)
        with pytest.raises(VerificationError, match="the record's hash"):
            Result.opened(record, job.file, blobs.__getitem__, result_hash="00" * 32, cost_nusd=0)

    def test_a_result_of_another_job_is_refused(self, job: pf.Job) -> None:
        record, blobs = doubling_result(job)
        other = job.with_args(rate=1).file
        with pytest.raises(VerificationError, match="its work"):
            Result.opened(
                record,
                other,
                blobs.__getitem__,
                result_hash=content_hash(record).hex(),
                cost_nusd=0,
            )

    def test_verify_fetches_and_hashes_every_blob(self, job: pf.Job) -> None:
        record, blobs = doubling_result(job)
        text = content_hash(record).hex()
        for address in blobs:
            changed = {**blobs, address: blobs[address] + b"!"}
            bad = Result.opened(
                record, job.file, changed.__getitem__, result_hash=text, cost_nusd=0
            )
            with pytest.raises(VerificationError, match=address.hex()):
                bad.verify()
        good = Result.opened(record, job.file, blobs.__getitem__, result_hash=text, cost_nusd=0)
        good.verify()

    def test_every_dtype_becomes_numpy(self) -> None:
        assert _array(b"\x80\x3f", Dtype.BFLOAT16, (1,)).tolist() == [1.0]
        for dtype in Dtype:
            if dtype < Dtype.WEAKINT:
                assert _array(b"", dtype, (0, 3)).shape == (0, 3)
        with pytest.raises(VerificationError, match="3 bytes are not FLOAT32"):
            _array(b"abc", Dtype.FLOAT32, (1,))


class TestSubmit:
    def test_submit_uploads_what_lacks_and_result_reads_it_back(
        self, job: pf.Job, start_node: Callable[..., Any]
    ) -> None:
        record, blobs = doubling_result(job)
        last = ("result", {"hash": content_hash(record).hex(), "cost_nusd": 7})
        node = start_node(script=[last], record=record)
        client = Client()
        for blob in (*blobs.values(), RATE):
            client.put(blob)
        kept = len(client.blobs())
        run = pf.submit(job, max_usd="0.05", deadline="2m", client=client)
        assert len(client.blobs()) == kept + 1
        assert not any(blob.public for blob in client.blobs())
        submitted = node.service.runs[run.id]
        assert decode_file(submitted.body) == job.file
        assert submitted.options.max_nusd == 50_000_000
        assert submitted.options.deadline_s == 120
        result = run.result(timeout=10)
        assert result.cost_nusd == 7
        np.testing.assert_array_equal(result["sum"], [3, 6, 12, 24])
        result.verify()
        assert pf.attach(run.id).result(10).hash == result.hash

    def test_small_inputs_go_along_and_others_are_put_first(
        self, job: pf.Job, start_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = start_node()
        asked: list[str] = []

        class CountingLine(HttpLine):
            def ask(self, request: Request) -> Answer:
                asked.append(f"{request.method} {request.path}")
                return super().ask(request)

        client = Client(line=CountingLine)
        pf.submit(job, client=client)
        assert asked == ["POST /v1/jobs"]
        monkeypatch.setattr(submission, "MAX_INPUT_BYTES", len(RATE))
        asked.clear()
        pf.submit(job, client=client)
        large = f"/blob/{address_of(START).hex()}"
        assert asked == [f"HEAD {large}", "POST /v1/jobs"]
        client.delete(address_of(START))
        asked.clear()
        pf.submit(job, client=client)
        assert asked == [f"HEAD {large}", "PUT /blob", "POST /v1/jobs"]
        assert len(node.service.runs) == 3
        assert {blob.address for blob in client.blobs()} == {address_of(START), address_of(RATE)}

    def test_quote(self, job: pf.Job, start_node: Callable[..., Any]) -> None:
        start_node()
        assert job.quote(max_usd=1)["misses"][0]["reason"] == "sells nothing"

    @pytest.mark.parametrize(
        ("max_usd", "deadline"), [("much", None), (-1, None), (None, "soon"), (None, 0)]
    )
    def test_bad_options_are_told_before_anything_is_sent(
        self, job: pf.Job, start_node: Callable[..., Any], max_usd: Any, deadline: Any
    ) -> None:
        node = start_node()
        with pytest.raises(ConfigError):
            pf.submit(job, max_usd=max_usd, deadline=deadline)
        assert not node.service.runs
        assert not Client().blobs()

    def test_a_deadline_is_never_shortened(
        self, job: pf.Job, start_node: Callable[..., Any]
    ) -> None:
        node = start_node()
        run = pf.submit(job, deadline="1.2s")
        assert node.service.runs[run.id].options.deadline_s == 2
        with pytest.raises(ConfigError, match="a deadline of 0s leaves no time"):
            pf.submit(job, deadline="0s")
        with pytest.raises(ConfigError, match="a deadline of 31d is too long") as caught:
            pf.submit(job, deadline="31d")
        assert "30 days" in caught.value.hint

    def test_what_is_no_job_is_told_with_what_makes_one(self) -> None:
        with pytest.raises(ConfigError, match=r"takes a Job, not 'job\.p2pj'") as caught:
            pf.submit("job.p2pj")  # type: ignore[arg-type]
        assert "pf.load" in caught.value.hint

    def test_an_input_that_nobody_has_is_told_before_anything_is_sent(
        self, job: pf.Job, start_node: Callable[..., Any], tmp_path: Path
    ) -> None:
        node = start_node()
        path = job.save(tmp_path / "job.p2pj")
        folder = tmp_path / "job.p2pj.inputs"
        start = folder / address_of(START).hex()
        start.write_bytes(b"other bytes")
        with pytest.raises(VerificationError, match=r"'net\.w' is damaged") as damaged:
            pf.submit(pf.load(path))
        assert str(start) in damaged.value.message
        start.unlink()
        with pytest.raises(BlobNotFoundError, match=r"input 'net\.w'") as missing:
            pf.submit(pf.load(path))
        assert str(folder) in missing.value.hint
        assert not node.service.runs
        assert not Client().blobs()
        Client().put(START)
        pf.submit(pf.load(path))
        assert len(node.service.runs) == 1

    def test_a_file_that_changes_after_it_was_loaded_is_not_bought(
        self, job: pf.Job, start_node: Callable[..., Any], tmp_path: Path
    ) -> None:
        node = start_node()
        loaded = pf.load(job.save(tmp_path / "job.p2pj"))
        start = tmp_path / "job.p2pj.inputs" / address_of(START).hex()
        start.write_bytes(b"other bytes")
        for use in (pf.submit, pf.Job.run_local):
            with pytest.raises(VerificationError, match="since the job was loaded") as told:
                use(loaded)
            assert told.value.message.startswith(f"{start} has changed")
        start.unlink()
        with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
            pf.submit(loaded)
        assert not node.service.runs


class TestStateAsWeights:
    def test_a_state_is_the_weights_of_another_job_by_address_alone(self, result: Result) -> None:
        asked: list[bytes] = []

        def fetch(address: bytes) -> bytes:
            asked.append(address)
            return result.blob(address)

        counted = Result(result.record, result._file, fetch, 0)
        weights = counted.state["net"].tensors()
        another = pf.trace(lambda: {"y": weights["w"] + 1}, steps=1)
        address = bytes.fromhex(result.state.address("net.w"))
        assert another.checked.inputs == ((0, BlobSource(address, 8)),)
        assert list(another.inputs) == [address]
        assert asked == []
        assert np.array_equal(another.run_local()["y"], [17, 33])
        assert np.array_equal(weights["w"].numpy(), [16, 32])
        assert set(asked) == {address}

    def test_it_is_saved_as_safetensors(self, result: Result, tmp_path: Path) -> None:
        path = result.state.save(tmp_path / "net.safetensors")
        assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
        assert np.array_equal(pf.load_safetensors(path)["net.w"].numpy(), [16, 32])
        assert list(result.state["net"].tensors()) == ["w"]
        with pytest.raises(ConfigError, match="there is no folder"):
            result.state.save(tmp_path / "none" / "net.safetensors")

    def test_a_blob_of_another_size_is_refused(self, result: Result, tmp_path: Path) -> None:
        lying = Result(result.record, result._file, lambda _: bytes(7), 0)
        with pytest.raises(VerificationError, match=r"has 7 bytes, not the 8 of FLOAT32 \(2,\)"):
            lying.state.save(tmp_path / "net.safetensors")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(VerificationError, match="has 7 bytes"):
            lying.state.tensors()["net.w"].numpy()
