"""Packs of a sweep that are split, in one process or in several: the budget holds all the same."""

from __future__ import annotations

import json
import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.dht.manifest import address_of
from p2pflop.errors import NodeUnreachableError, StoreError
from p2pflop.job.file import decode_file
from p2pflop.job.spec import ROLE_INPUT, BlobSource, Work
from p2pflop.job.submission import decode_submission
from p2pflop.job.variants import decode_variants
from p2pflop.line import Request
from p2pflop.node.service import Json
from p2pflop.standing import Standing, Unit, recall
from p2pflop.wire import decode
from tests.lines import Canned, content_of
from tests.unit.test_sweeps import connect as connect
from tests.unit.test_sweeps import error, reply, sse, states

ROOM = 4
PRICE_NUSD = 10
COST_NUSD = 5
WAIT_S = 20.0

Deed = Callable[[list[float]], str]
Connect = Callable[[Any], Client]


@dataclass
class Bought:
    """A run at the node: ``limit`` counts until it has an ``end``, ``cost`` from then on."""

    numbers: list[float]
    run_ids: list[str]
    limit: int
    end: str = ""
    cost: int = 0

    @property
    def committed(self) -> int:
        return self.cost if self.end else self.limit

    def card(self, run_id: str) -> Json:
        ends = {"result": "settled"}
        card = {"id": run_id, "max_nusd": self.limit, "end_state": ends.get(self.end, self.end)}
        return card | ({"cost_nusd": self.cost} if self.end else {})


class PackingNode:
    """Answers as a node does. ``deed`` says of the numbers of a run how it ends: ``result``,
    ``failed``, or ``dies``: then nobody answers until it is back."""

    def __init__(self, deed: Deed) -> None:
        self.deed = deed
        self.bought: dict[str, Bought] = {}
        self.parts: dict[str, Json] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.most_committed = 0
        self.is_dead = False
        self.is_damaged = False
        self.lock = threading.Lock()

    def answer(self, request: Request) -> Canned:
        if self.is_dead:
            raise NodeUnreachableError("nobody answers")
        method, path = request.method, request.path
        if path.startswith("/blob"):
            return self._blob(request)
        if path == "/v1/quote":
            return reply(request, {"deals": [{"total_nusd": PRICE_NUSD}], "misses": []})
        if path == "/v1/packs":
            return self._submit_pack(request)
        if (method, path) == ("POST", "/v1/jobs"):
            return self._submit(request)
        run_id, _, part = path.rpartition("s/")[2].partition("/")
        if run_id in self.parts and not part:
            return reply(request, self.parts[run_id])
        if run_id not in self.bought:
            return error(request, "ConfigError", f"there is no job {run_id}")
        if part == "events":
            return Canned(request, 200, self._events(run_id))
        if part == "unpack":
            return self._unpack(request, run_id)
        return reply(request, self.bought[run_id].card(run_id))

    def _blob(self, request: Request) -> Canned:
        if request.method == "PUT":
            content = content_of(request)
            self.blobs[address := address_of(content)] = content
            told = {"address": address.hex(), "size_bytes": len(content), "public": False}
            return reply(request, told, 201)
        data = self.blobs.get(bytes.fromhex(request.path.rpartition("/")[2]))
        if data is None:
            return error(request, "BlobNotFoundError", "no such blob", 404)
        return Canned(request, 200, [b"" if request.method == "HEAD" else data])

    def _buy(self, request: Request, numbers: list[float], run_ids: list[str]) -> str:
        params = {name: str(value) for name, value in request.params.items()}
        run_id = params["id"]
        with self.lock:
            if run_id not in self.bought:
                self.bought[run_id] = Bought(numbers, run_ids, int(params["max_nusd"]))
            committed = sum(each.committed for each in self.bought.values())
            self.most_committed = max(self.most_committed, committed)
        return run_id

    def _submit(self, request: Request) -> Canned:
        submission = decode_submission(content_of(request))
        self.blobs |= {address_of(data): data for data in submission.inputs}
        work = decode(Work, decode_file(submission.file).body.work)
        [source] = [param.source for param in work.params if param.role == ROLE_INPUT]
        assert isinstance(source, BlobSource)
        [number] = struct.unpack("<f", self.blobs[source.address])
        run_id = self._buy(request, [number], [])
        opening = f"data: {json.dumps({'id': run_id})}\n\n".encode()
        return Canned(request, 200, [opening, *self._events(run_id)])

    def _submit_pack(self, request: Request) -> Canned:
        variants = decode_variants(content_of(request))
        known = [self.parts[run_id] for run_id in variants.run_ids if run_id in self.parts]
        known += [self.bought[r].card(r) for r in variants.run_ids if r in self.bought]
        if len(known) < len(variants.run_ids):
            numbers = [struct.unpack("<f", value)[0] for [value] in variants.values]
            self._buy(request, numbers, list(variants.run_ids))
        told = {"known": known, "bought": len(variants.run_ids) - len(known)}
        return reply(request, told, 201)

    def _unpack(self, request: Request, run_id: str) -> Canned:
        if self.is_damaged:
            return error(request, "StoreError", "a blob is damaged", 500)
        pack = self.bought[run_id]
        share = pack.cost // len(pack.run_ids)
        for each in pack.run_ids:
            card = {"id": each, "end_state": "settled", "cost_nusd": share, "pack": run_id}
            self.parts[each] = card
        return reply(request, {"jobs": [self.parts[each] for each in pack.run_ids]})

    def _events(self, run_id: str) -> list[bytes]:
        bought = self.bought[run_id]
        deed = bought.end or self.deed(bought.numbers)
        if deed == "dies":
            self.is_dead = True
        if self.is_dead:
            raise NodeUnreachableError("nobody answers")
        with self.lock:
            bought.end, bought.cost = deed, COST_NUSD * len(bought.numbers)
        told: Json = {"kind": bought.end, "seq": 1, "cost_nusd": bought.cost}
        if bought.end == "failed":
            told |= {"error": "ProviderError", "message": "it was lost", "hint": ""}
        return [sse(told)]


@pytest.fixture(autouse=True)
def _packs_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pflop.sweeps.room_for", lambda *_: ROOM)


@pytest.fixture(scope="module")
def job() -> pf.Job:
    return pf.trace(lambda lr: {"loss": lr * 2}, steps=1, args={"lr": 0.0})


def bought(
    job: pf.Job, client: Client, jobs: int, budget_nusd: int, under_way: int = 1
) -> pf.Sweep:
    rates = [{"lr": float(number)} for number in range(jobs)]
    usd = f"{budget_nusd / 1e9:.9f}"
    return pf.map(job, rates, max_usd=usd, under_way=under_way, client=client)


def test_a_pack_is_bought_as_one_and_its_jobs_have_their_shares(
    job: pf.Job, connect: Connect
) -> None:
    node = PackingNode(lambda _: "result")
    sweep = bought(job, connect(node), 8, 100)
    outcomes = sweep.outcomes()
    assert [outcome.cost_nusd for outcome in outcomes] == [COST_NUSD] * 8
    assert len(node.bought) == 2
    assert sweep.progress().spent_nusd == 8 * COST_NUSD
    again = pf.attach_sweep(sweep.id, client=connect(node))
    assert [each.pack for each in again.outcomes()] == [each.pack for each in outcomes]
    assert again.progress() == sweep.progress()
    assert len(node.bought) == 2


def test_a_pack_that_failed_has_cost_what_it_has_and_its_jobs_the_rest(
    job: pf.Job, connect: Connect
) -> None:
    node = PackingNode(lambda numbers: "failed" if len(numbers) > 1 else "result")
    budget = 4 * COST_NUSD + 3 * PRICE_NUSD
    sweep = bought(job, connect(node), 4, budget)
    assert states(sweep.outcomes()) == ["settled"] * 4
    assert node.most_committed <= budget
    assert sweep.progress().spent_nusd == 4 * COST_NUSD + 4 * COST_NUSD
    again = pf.attach_sweep(sweep.id, client=connect(node))
    again.outcomes()
    assert again.progress() == sweep.progress()
    assert len(node.bought) == 1 + 4


def test_the_jobs_of_a_split_pack_are_bought_as_many_at_once_as_others(
    job: pf.Job, connect: Connect
) -> None:
    together = threading.Barrier(ROOM, timeout=WAIT_S)

    def deed(numbers: list[float]) -> str:
        if len(numbers) > 1:
            return "failed"
        together.wait()
        return "result"

    sweep = bought(job, connect(PackingNode(deed)), ROOM, 1000, under_way=ROOM)
    assert states(sweep.outcomes()) == ["settled"] * ROOM


def test_who_attaches_counts_the_jobs_of_a_split_pack_with_their_own_limits(
    job: pf.Job, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of a pack's jobs may be more, together, than the pack's own: others came in
    cheaper meanwhile."""

    begun: queue.SimpleQueue[pf.Sweep] = queue.SimpleQueue()

    def deed(numbers: list[float]) -> str:
        is_first_pack, is_last = numbers[0] == 0 and len(numbers) > 1, numbers == [1.0]
        if not is_first_pack and not is_last:
            return "result"
        sweep = begun.get(timeout=WAIT_S)
        begun.put(sweep)
        before = 8 if is_first_pack else 11
        with sweep._changed:
            assert sweep._changed.wait_for(lambda: len(sweep._outcomes) == before, WAIT_S)
        return "failed" if is_first_pack else "dies"

    node = PackingNode(deed)
    budget = 1200
    first = bought(job, connect(node), 12, budget, under_way=3)
    begun.put(first)
    with pytest.raises(NodeUnreachableError):
        first.outcomes()
    node.is_dead, node.deed = False, lambda _: "result"
    [left] = [each for each in node.bought.values() if not each.end]
    assert left.numbers == [1.0]
    assert left.limit > 2 * budget // 12, "more than its share at first"
    with monkeypatch.context() as patch:
        patch.setattr(pf.Sweep, "_work", lambda _: None)
        attached = pf.attach_sweep(first.id, client=connect(node))
    settled = 11 * COST_NUSD
    assert sum(attached._limits.values()) == settled + left.limit
    assert attached._spent_nusd == 4 * COST_NUSD, "what the pack has cost"
    again = pf.attach_sweep(first.id, client=connect(node))
    assert states(again.outcomes()) == ["settled"] * 12
    assert node.most_committed <= budget
    assert again.progress().spent_nusd == sum(each.cost for each in node.bought.values())


def test_who_attaches_finds_the_jobs_of_a_pack_that_never_fitted(
    job: pf.Job, connect: Connect
) -> None:
    node = PackingNode(lambda numbers: "dies" if numbers == [1.0] else "result")
    budget = 4 * PRICE_NUSD - 1
    first = bought(job, connect(node), 4, budget)
    with pytest.raises(NodeUnreachableError):
        first.outcomes()
    assert len(node.bought) == 2
    node.is_dead, node.deed = False, lambda _: "result"
    again = pf.attach_sweep(first.id, client=connect(node))
    assert states(again.outcomes()) == ["settled"] * 4
    assert node.most_committed <= budget
    assert all(len(each.numbers) == 1 for each in node.bought.values())


def test_a_settled_pack_that_cannot_be_unpacked_is_not_bought_again(
    job: pf.Job, connect: Connect
) -> None:
    node = PackingNode(lambda _: "result")
    node.is_damaged = True
    sweep = bought(job, connect(node), 4, 100)
    outcomes = sweep.outcomes()
    assert states(outcomes) == ["failed"] * 4
    assert isinstance(outcomes[0].exception(), StoreError)
    assert sweep.progress().spent_nusd == 4 * COST_NUSD
    node.is_damaged = False
    again = pf.attach_sweep(sweep.id, client=connect(node))
    assert states(again.outcomes()) == ["settled"] * 4
    assert len(node.bought) == 1


PACK: Unit = (0, 1)


@pytest.mark.parametrize(
    ("cards", "found", "fresh", "limits", "spent_nusd"),
    [
        ({}, [], [PACK], {}, 0),
        ({PACK: ("", 9, None)}, [PACK], [], {PACK: 9}, 0),
        ({PACK: ("settled", 9, 4)}, [PACK], [], {PACK: 4}, 0),
        ({PACK: ("cancelled", 9, 4)}, [PACK], [], {PACK: 9}, 0),
        ({PACK: ("failed", 9, 4)}, [], [(0,), (1,)], {}, 4),
        ({PACK: ("failed", 9, None), (1,): ("", 7, None)}, [(1,)], [(0,)], {(1,): 7}, 0),
        ({(0,): ("settled", 9, 3)}, [(0,)], [(1,)], {(0,): 3}, 0),
        ({(0,): ("failed", 9, 3)}, [(0,)], [(1,)], {(0,): 9}, 0),
        ({(0,): ("earlier", 9, 0)}, [], [PACK], {}, 0),
    ],
)
def test_what_counts_against_the_budget_of_a_sweep_that_was_left(
    cards: dict[Unit, tuple[str, int, int | None]],
    found: list[Unit],
    fresh: list[Unit],
    limits: dict[Unit, int],
    spent_nusd: int,
    connect: Connect,
) -> None:
    def answer(request: Request) -> Canned:
        unit = tuple(map(int, request.path.rpartition("/")[2].split("-")))
        if unit not in cards:
            return error(request, "ConfigError", "there is no such job")
        end, limit, cost = cards[unit]
        card = {"end_state": "settled" if end == "earlier" else end, "max_nusd": limit}
        card |= {} if cost is None else {"cost_nusd": cost}
        return reply(request, card | ({"earlier": "ab" * 6} if end == "earlier" else {}))

    class Node:
        def __init__(self) -> None:
            self.answer = answer

    standing = recall(connect(Node()), [PACK], lambda unit: "-".join(map(str, unit)))
    ended = standing.ended
    assert standing == Standing(found, fresh, limits, ended, spent_nusd)
    assert ended.keys() == {unit for unit in found if cards[unit][0]}
