"""Sweeps against a scripted node: budget, order, failures, cancelling, attaching again."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop import sdk, sweeps
from p2pflop.client import Client
from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError, ConfigError, JobError, MarketError
from p2pflop.job.submission import decode_submission
from p2pflop.line import Request
from p2pflop.outcomes import Costs, Outcome
from p2pflop.runs import Run
from p2pflop.sweep_plan import SweepPlan
from tests.lines import Canned, CannedLine, content_of

PRICE_NUSD = 100
WAIT_S = 20.0

Deed = Callable[[float], str]


class ScriptedNode:
    """Answers as a node does. ``deed`` says of each job's argument how its run ends: ``result``,
    ``failed`` or ``hold``, until it is cancelled."""

    def __init__(self, deed: Deed = lambda _: "result", cost_nusd: int = PRICE_NUSD) -> None:
        self.deed = deed
        self.cost_nusd = cost_nusd
        self.steps_done = 1
        self.blobs: dict[bytes, bytes] = {}
        self.resting: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.limits: dict[str, int | None] = {}
        self.ends: dict[str, str] = {}
        self.order: list[float] = []
        self.most_committed = 0
        self.most_under_way = 0
        self.changed = threading.Condition()

    def answer(self, request: Request) -> Canned:
        method, path = request.method, request.path
        if path.startswith("/blob"):
            return self._blob(request)
        if path == "/v1/quote":
            return reply(request, {"deals": [{"total_nusd": PRICE_NUSD}], "misses": []})
        if (method, path) == ("POST", "/v1/jobs"):
            return self._submit(request)
        run_id, _, part = path.removeprefix("/v1/jobs/").partition("/")
        if run_id not in self.files:
            return error(request, "ConfigError", f"there is no job {run_id}")
        if part == "events":
            return self._events(request, run_id)
        if part == "cancel":
            with self.changed:
                self.ends.setdefault(run_id, "cancelled")
                self.changed.notify_all()
        settled = {"result": "settled"}
        end = settled.get(self.ends.get(run_id, ""), self.ends.get(run_id, ""))
        limit, cost = self.limits[run_id] or 0, {"cost_nusd": self.cost_nusd}
        return reply(
            request, {"end_state": end, "max_nusd": limit, **(cost if end == "settled" else {})}
        )

    def _blob(self, request: Request) -> Canned:
        if request.method == "PUT":
            content = content_of(request)
            address = address_of(content)
            self.blobs[address] = content
            told = {"address": address.hex(), "size_bytes": len(content), "public": False}
            return reply(request, told, 201)
        data = self.blobs.get(bytes.fromhex(request.path.rpartition("/")[2]))
        if data is None:
            return error(request, "BlobNotFoundError", "no such blob", 404)
        return Canned(request, 200, [b"" if request.method == "HEAD" else data])

    def _submit(self, request: Request) -> Canned:
        params = {name: str(value) for name, value in request.params.items()}
        run_id, limit = params["id"], params.get("max_nusd")
        submission = decode_submission(content_of(request))
        with self.changed:
            self.blobs |= {address_of(data): data for data in submission.inputs}
            if run_id not in self.files:
                self.files[run_id] = submission.file
                self.resting[run_id] = params.get("rest") == "1"
                self.limits[run_id] = None if limit is None else int(limit)
                if limit is not None and int(limit) < PRICE_NUSD:
                    self.ends[run_id] = "too dear"
                open_runs = [run for run in self.files if run not in self.ends]
                spent = sum(end == "result" for end in self.ends.values()) * self.cost_nusd
                committed = spent + sum(self.limits[run] or 0 for run in open_runs)
                self.most_committed = max(self.most_committed, committed)
                self.most_under_way = max(self.most_under_way, len(open_runs))
        opening = json.dumps({"id": run_id})
        return self._events(request, run_id, f"data: {opening}\n\n".encode())

    def argument(self, run_id: str) -> float:
        """The number that a run was submitted with."""
        import struct

        from p2pflop.job.file import decode_file
        from p2pflop.job.spec import ROLE_INPUT, BlobSource, Work
        from p2pflop.wire import decode

        work = decode(Work, decode_file(self.files[run_id]).body.work)
        [source] = [param.source for param in work.params if param.role == ROLE_INPUT]
        assert isinstance(source, BlobSource)
        number: float = struct.unpack("<f", self.blobs[source.address])[0]
        return number

    def _events(self, request: Request, run_id: str, opening: bytes = b"") -> Canned:
        number = self.argument(run_id)
        with self.changed:
            deed = self.ends.get(run_id) or self.deed(number)
        row: dict[str, Any] = {"kind": "rows", "rows": [{"step": 0, "values": {"loss": number}}]}
        first = [row]

        def tell() -> Any:
            yield opening
            for event in first:
                yield sse({"seq": 1, **event})
            with self.changed:
                while deed == "hold" and run_id not in self.ends:
                    assert self.changed.wait(WAIT_S)
                end = self.ends.setdefault(run_id, deed)
                self.order.append(number)
                self.changed.notify_all()
            yield sse({"seq": 2, **self._last(end)})

        return Canned(request, 200, tell())

    def _last(self, end: str) -> dict[str, Any]:
        match end:
            case "result":
                told = {"hash": "ab" * 32, "cost_nusd": self.cost_nusd}
                return {"kind": "result", "steps_done": self.steps_done, **told}
            case "cancelled":
                return {"kind": "cancelled"}
            case "too dear":
                told = {"error": "MarketError", "message": "over the budget"}
                return {"kind": "failed", "hint": "", **told}
            case _:
                told = {"error": "JobError", "message": "it divides by zero"}
                return {"kind": "failed", "hint": "", **told}


def reply(request: Request, fields: dict[str, Any], status: int = 200) -> Canned:
    return Canned(request, status, [json.dumps(fields).encode()])


def error(request: Request, kind: str, message: str, status: int = 400) -> Canned:
    return reply(request, {"error": {"kind": kind, "message": message, "hint": ""}}, status)


def sse(event: dict[str, Any]) -> bytes:
    return f"event: {event['kind']}\ndata: {json.dumps(event)}\n\n".encode()


@pytest.fixture(scope="module")
def job() -> pf.Job:
    def step(lr: Tensor) -> dict[str, Tensor]:
        return {"loss": lr * Tensor.rand(2**22).sum()}  # too much to be packed

    return pf.trace(step, steps=1, args={"lr": 0.0})


@pytest.fixture
def connect(tmp_path: Path) -> Callable[[ScriptedNode], Client]:
    note = {"url": "http://127.0.0.1:9", "pid": os.getpid(), "embedded": False}
    (tmp_path / "node.json").write_text(json.dumps(note))
    (tmp_path / "token").write_text("t0ken")
    return lambda node: Client(tmp_path, line=CannedLine(node.answer))


Connect = Callable[[ScriptedNode], Client]


def rates(count: int) -> list[dict[str, float]]:
    return [{"lr": float(number)} for number in range(count)]


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def test_outcomes_come_in_the_order_of_the_arguments(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode()
    sweep = pf.map(job, rates(20), under_way=3, client=connect(node))
    assert [outcome.args["lr"] for outcome in sweep] == list(range(20))
    assert [outcome.place for outcome in sweep] == list(range(20))
    assert 1 <= node.most_under_way <= 3
    progress = sweep.progress()
    assert (progress.done, progress.failed, progress.under_way, progress.waiting) == (20, 0, 0, 0)
    assert progress.spent_nusd == 20 * PRICE_NUSD


def test_a_row_that_was_lost_with_a_node_is_read_from_the_result(
    job: pf.Job, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ScriptedNode()
    found = SimpleNamespace(last_row=lambda: (2, {"loss": 0.5}))
    monkeypatch.setattr(Run, "result", lambda _: found)
    [told] = pf.map(job, rates(1), client=connect(node))
    assert told.row is not None
    assert told.row.step == 0, "it was the last"
    node.steps_done = 3
    [lost] = pf.map(job, rates(1), client=connect(node))
    assert lost.row is not None
    assert dict(lost.row) == {"step": 2, "loss": 0.5}


def test_unordered_they_come_as_they_end(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode(lambda number: "hold" if number == 0 else "result")
    sweep = pf.map(job, rates(4), ordered=False, under_way=2, client=connect(node))
    found = iter(sweep)
    assert {next(found).place for _ in range(3)} == {1, 2, 3}
    sweep.cancel()
    assert (last := next(found)).place == 0
    assert last.state == "cancelled"


def test_a_thousand_jobs_keep_a_bounded_number_under_way(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode()
    sweep = pf.map(job, rates(1000), under_way=sweeps.MAX_UNDER_WAY, client=connect(node))
    assert states(sweep.outcomes()) == ["settled"] * 1000
    assert node.most_under_way <= sweeps.MAX_UNDER_WAY


def test_a_failure_is_an_outcome_and_the_others_go_on(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode(lambda number: "failed" if number == 1 else "result")
    sweep = pf.map(job, rates(3), client=connect(node))
    outcomes = list(sweep)
    assert states(outcomes) == ["settled", "failed", "settled"]
    assert isinstance(outcomes[1].exception(), JobError)
    with pytest.raises(JobError, match="divides by zero"):
        outcomes[1].result()
    with pytest.raises(JobError, match="divides by zero"):
        sweep.results()
    assert outcomes[0].exception() is None
    assert sweep.progress().failed == 1


@pytest.mark.parametrize("under_way", [1, 4, 16])
def test_bought_and_under_way_never_exceed_the_budget(
    job: pf.Job, connect: Connect, under_way: int
) -> None:
    node = ScriptedNode()
    budget = 5 * PRICE_NUSD + PRICE_NUSD // 2
    sweep = pf.map(
        job,
        rates(12),
        max_usd=f"{budget / 1e9:.9f}",
        under_way=under_way,
        client=connect(node),
    )
    outcomes = sweep.outcomes()
    assert states(outcomes).count("settled") == 5
    assert node.most_committed <= budget
    assert sweep.progress().spent_nusd == 5 * PRICE_NUSD
    for outcome in outcomes:
        if outcome.state == "failed":
            assert isinstance(outcome.error, MarketError)


def test_what_comes_in_cheaper_leaves_room_for_the_rest(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode(cost_nusd=PRICE_NUSD // 4)
    sweep = pf.map(
        job, rates(9), max_usd=f"{3 * PRICE_NUSD / 1e9:.9f}", under_way=9, client=connect(node)
    )
    assert states(sweep.outcomes()) == ["settled"] * 9
    assert node.most_committed <= 3 * PRICE_NUSD
    assert node.most_under_way <= 3


def test_prune_if_ends_one_run(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode(lambda number: "hold" if number == 2 else "result")
    sweep = pf.map(job, rates(4), prune_if=lambda row: row.loss == 2, client=connect(node))
    outcomes = sweep.outcomes()
    assert states(outcomes) == ["settled", "settled", "cancelled", "settled"]
    assert outcomes[2].row is not None
    assert outcomes[2].row.loss == 2


def test_cancel_if_ends_the_rest(
    job: pf.Job, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pf.Run, "result", lambda run: run.id)
    node = ScriptedNode(lambda number: "hold" if number == 0 else "result")
    client = connect(node)
    sweep = pf.map(job, rates(50), under_way=2, cancel_if=lambda _: True, client=client)
    outcomes = sweep.outcomes()
    assert states(outcomes).count("settled") <= 2
    assert outcomes[0].state == "cancelled"
    assert states(outcomes).count("not bought") >= 47
    assert "cancel_if ended the sweep" in str(outcomes[-1].error)


def test_a_fault_in_the_users_function_is_raised_where_the_user_waits(
    job: pf.Job, connect: Connect
) -> None:
    def broken(row: pf.Row) -> bool:
        raise ZeroDivisionError(row.step)

    sweep = pf.map(job, rates(3), prune_if=broken, client=connect(ScriptedNode()))
    with pytest.raises(ZeroDivisionError):
        sweep.outcomes()


def test_ctrl_c_cancels_what_runs_and_leaves_what_is_done(
    job: pf.Job, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ScriptedNode(lambda number: "hold" if number >= 2 else "result")
    sweep = pf.map(job, rates(9), under_way=3, client=connect(node))
    found = iter(sweep)
    assert states([next(found), next(found)]) == ["settled"] * 2

    def interrupted(_timeout: float | None = None) -> bool:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep._changed, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        next(found)
    [note] = interrupt.value.__notes__
    assert sweep.id in note
    assert "hold" not in node.ends.values()
    assert {"settled", "cancelled", "not bought"} == set(states(sweep.outcomes()))
    # The note says what each way to go on does.
    assert "What was not submitted yet is bought by: p2pflop sweep --attach" in note
    node.deed = lambda _: "result"
    attached = states(pf.attach_sweep(sweep.id, client=connect(node)).outcomes())
    assert {"settled", "cancelled"} == set(attached), "cancelled for good"
    assert "To buy the cancelled ones as well, start the sweep again" in note
    again = pf.map(job, rates(9), under_way=3, client=connect(node))
    assert set(states(again.outcomes())) == {"settled"}


def test_it_can_be_attached_to_again_and_buys_nothing_twice(job: pf.Job, connect: Connect) -> None:
    node = ScriptedNode(lambda number: "hold" if number >= 3 else "result")
    first = pf.map(
        job, rates(6), max_usd=f"{6 * PRICE_NUSD / 1e9:.9f}", under_way=1, client=connect(node)
    )
    assert states([outcome for _, outcome in zip(range(3), first, strict=False)]) == ["settled"] * 3
    first.cancel()
    node.deed = lambda _: "result"
    again = pf.attach_sweep(first.id, client=connect(node))
    outcomes = again.outcomes()
    assert states(outcomes)[:3] == ["settled"] * 3
    assert states(outcomes).count("cancelled") <= 1
    assert set(states(outcomes)[4:]) == {"settled"}
    assert len(node.files) == 6
    assert node.most_committed <= 6 * PRICE_NUSD
    assert [outcome.args["lr"] for outcome in outcomes] == list(range(6))


def test_attach_knows_a_sweep_from_a_run_by_its_id(
    job: pf.Job, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ScriptedNode()
    monkeypatch.setattr(sdk, "Client", lambda **_: connect(node))
    sweep = pf.map(job, rates(3), client=connect(node))
    assert states(sweep.outcomes()) == ["settled"] * 3
    again = pf.attach(sweep.id)
    assert isinstance(again, pf.Sweep)
    assert states(again.outcomes()) == ["settled"] * 3
    run = pf.attach(sweep.run_id(1))
    assert isinstance(run, pf.Run)
    assert run.id == sweep.run_id(1)
    with pytest.raises(BlobNotFoundError):
        pf.attach("ab" * 32)
    for unknown in ("ab" * 6, "", "ab" * 33):
        with pytest.raises(ConfigError):
            pf.attach(unknown)
    assert len(node.files) == 3


@pytest.mark.parametrize("rest", [False, True])
def test_the_runs_of_a_sweep_rest_if_it_says_so_after_a_restart_too(
    job: pf.Job, connect: Connect, rest: bool
) -> None:
    node = ScriptedNode()
    sweep = pf.map(job, rates(2), rest=rest, client=connect(node))
    assert states(sweep.outcomes()) == ["settled"] * 2
    assert list(node.resting.values()) == [rest] * 2
    plan = node.blobs[bytes.fromhex(sweep.id)]
    assert SweepPlan.decode(plan).rest is rest
    old = {key: value for key, value in json.loads(plan).items() if key != "rest"}
    assert SweepPlan.decode(json.dumps(old).encode()).rest is False


def test_its_progress_begins_with_what_the_node_knows(
    job: pf.Job, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ScriptedNode(lambda number: "failed" if number == 2 else "result")
    sweep = pf.map(job, rates(3), client=connect(node))
    sweep.outcomes()
    with monkeypatch.context() as patch:
        patch.setattr(pf.Sweep, "_work", lambda _: None)
        before = pf.attach_sweep(sweep.id, client=connect(node)).progress()
    again = pf.attach_sweep(sweep.id, client=connect(node))
    again.outcomes()
    assert before == again.progress() == sweep.progress()
    assert (before.done, before.failed, before.under_way) == (3, 1, 0)
    assert before.spent_nusd == 2 * node.cost_nusd


def test_wrong_arguments_and_ids_are_told_before_anything_is_bought(
    job: pf.Job, connect: Connect
) -> None:
    node = ScriptedNode()
    client = connect(node)
    with pytest.raises(ConfigError, match="no argument 'wd'"):
        pf.map(job, [{"wd": 1.0}], client=client)
    with pytest.raises(ConfigError, match="does not fit argument 'lr'"):
        pf.map(job, [{"lr": 10**50}], client=client)
    with pytest.raises(ConfigError, match="the list of arguments is empty"):
        pf.map(job, [], client=client)
    with pytest.raises(ConfigError, match="jobs in a sweep"):
        pf.map(job, [{"lr": 1.0}] * (sweeps.MAX_JOBS + 1), client=client)
    with pytest.raises(ConfigError, match="under_way"):
        pf.map(job, rates(1), under_way=sweeps.MAX_UNDER_WAY + 1, client=client)
    assert node.files == {}
    for blob in (b"", b"[]", b"{}", b'{"sweep": 2}', b'{"sweep": 1, "evil": 1}', b"[" * 9999):
        with pytest.raises(ConfigError, match="not a sweep"):
            SweepPlan.decode(blob)


def test_receipts_are_cumulative_under_each_fill() -> None:
    costs = Costs()
    for kind, amount in (
        ("filled", 0),
        ("receipt", 5),
        ("receipt", 9),
        ("filled", 0),
        ("receipt", 4),
    ):
        costs.hear({"kind": kind, "amount_nusd": amount})
    assert costs.nusd == 13
    costs.hear({"kind": "cancelled", "cost_nusd": 20})
    assert costs.nusd == 20, "a cancel owes the setup whole"
