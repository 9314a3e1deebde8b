"""Real nodes, real jobs: bought, run, verified and paid for; and what happens when one dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from tinygrad import Tensor, dtypes

import p2pflop as pf
from p2pflop.client import Client

StartNode = Callable[..., Any]
LONG_STEPS = 2_000_000


def counting_job(
    steps: int, seed: int = 0, *, look_every: int = 10, collect: Sequence[str] = ()
) -> pf.Job:
    """A state that halves and grows, dropout and all: small, but with everything a job can have."""
    data = Tensor([1.0, 2.0, 3.0, 4.0]).realize()
    weight = Tensor.zeros(4, dtype=dtypes.float32).contiguous()

    def step() -> dict[str, Tensor]:
        weight.assign(weight * 0.5 + data * Tensor.rand(4))
        return {"total": weight.sum()}

    def look() -> dict[str, Tensor]:
        return {"top": weight.max()}

    return pf.trace(
        step, steps=steps, every={look_every: look}, seed=seed, collect=collect, title="counting"
    )


def submit(job: pf.Job, node: Any, **options: Any) -> pf.Run:
    return pf.submit(job, client=Client(node.home), **options)


def first_events(run: pf.Run, state: str) -> list[dict[str, Any]]:
    """The refusals of a run until it is in ``state``."""
    found = []
    for event in run.events():
        if event["kind"] == "rejected":
            found.append(event)
        if event["kind"] == "state" and event["state"] == state:
            return found
    raise AssertionError(f"it was never {state}")


def wait_for_asks(node: Any, count: int, wait_until: Any) -> None:
    wait_until(lambda: len(node.get("/v1/book")["book"]) == count)


def test_a_job_is_bought_run_verified_and_owed_for(start_node: StartNode, wait_until: Any) -> None:
    seller = start_node("seller", "--ask", "90000")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    job = counting_job(steps=40, seed=7)
    run = submit(job, buyer)
    rows = list(run)
    result = run.result(timeout=60)

    assert [row.step for row in rows] == list(range(40))
    assert [row.step for row in rows if "top" in row] == [9, 19, 29, 39]
    result.verify()
    local = job.run_local()
    assert local.hash == result.hash
    assert list(result["total"]) == list(local["total"])

    events = list(run.events())
    told = [event["state"] for event in events if event["kind"] == "state"]
    assert told[:2] == ["bidding", "confirming"]
    assert "running" in told
    [filled] = [event for event in events if event["kind"] == "filled"]
    cost = events[-1]["cost_nusd"]
    assert 0 < cost == filled["quote_nusd"]
    wait_until(lambda: seller.get("/v1/ledger")["owed_nusd"] == cost)
    theirs, ours = seller.get("/v1/ledger"), buyer.get("/v1/ledger")
    assert ours["owing_nusd"] == theirs["owed_nusd"] == cost
    assert [b["account"] for b in ours["balances"]] == [seller.note["account"]]
    assert [b["due_nusd"] for b in theirs["balances"]] == [cost]

    address = next(iter(events[-1]["state"].values()))["address"]
    blob = httpx.get(f"{buyer.url}/blob/{address}")
    assert blob.status_code == 200
    assert len(blob.content) > 0


def test_a_longer_job_pays_for_the_new_stretch_alone(
    start_node: StartNode, wait_until: Any
) -> None:
    seller = start_node("seller", "--ask", "90000")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    job = counting_job(steps=40, seed=3)
    unknown = job.extend(20)
    with pytest.raises(pf.JobError, match="after step 40 of this work is not known"):
        submit(unknown, buyer)
    first = submit(job, buyer).result(timeout=60)
    run = submit(unknown, buyer)
    rows = list(run)
    second = run.result(timeout=60)
    assert [row.step for row in rows] == list(range(40, 60))
    second.verify()
    whole = counting_job(steps=60, seed=3).run_local()
    assert second.record.state == whole.record.state
    assert [*first["total"], *second["total"]] == list(whole["total"])
    assert second.steps_of("top") == [49, 59]
    assert second.cost_nusd < first.cost_nusd
    assert job.extend(20, first).run_local().hash == second.hash


def test_the_cheapest_that_can_wins_and_losers_are_told_why(
    start_node: StartNode, wait_until: Any
) -> None:
    small = start_node("small", "--ask", "1", "--memory", "256MiB")
    address = small.addresses()[0]
    dear = start_node("dear", "--ask", "90000", "--connect", address)
    fair = start_node("fair", "--ask", "40000", "--connect", address)
    wait_for_asks(fair, 3, wait_until)
    run = submit(counting_job(steps=3), fair)
    run.result(timeout=60)
    ranked = next(event for event in run.events() if event["kind"] == "ranked")
    peers = {name: node.note["peer"] for name, node in (("dear", dear), ("small", small))}
    assert [deal["provider"] for deal in ranked["deals"]] == [fair.note["peer"], peers["dear"]]
    assert [(miss["provider"], miss["reason"]) for miss in ranked["misses"]] == [
        (peers["small"], "too little memory")
    ]


def test_over_the_budget_nothing_is_bought(start_node: StartNode) -> None:
    node = start_node("node", "--ask", "90000")
    run = submit(counting_job(steps=3), node, max_usd="0.000000001")
    with pytest.raises(pf.MarketError, match="over the budget"):
        run.result(timeout=30)
    assert node.get("/v1/ledger")["owing_nusd"] == 0


def test_without_another_provider_a_run_waits_until_its_deadline(
    start_node: StartNode, wait_until: Any
) -> None:
    seller = start_node("seller", "--ask", "0.01")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    run = submit(counting_job(steps=LONG_STEPS), buyer, deadline=12)
    for row in run:
        if row.step > 50:
            break
    seller.kill()
    with pytest.raises(pf.MarketError, match="the deadline passed while"):
        run.result(timeout=60)
    lost = next(event for event in run.events() if event["kind"] == "resubmitted")
    assert "the provider was lost" in lost["reason"]
    assert run.status == "failed"
    assert buyer.get(f"/v1/jobs/{run.id}")["end_state"] == "failed"


def test_a_provider_killed_after_a_checkpoint_starts_again_and_is_paid_for_it(
    start_node: StartNode, wait_until: Any
) -> None:
    seller = start_node("seller", "--ask", "100")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    weight = Tensor.zeros(20_000, dtype=dtypes.float32).contiguous()

    def step() -> dict[str, Tensor]:
        weight.assign(weight * 0.5 + Tensor.rand(20_000))
        return {"total": weight.sum()}

    job = pf.trace(step, steps=LONG_STEPS)
    run = submit(job, buyer, checkpoint_steps=LONG_STEPS // 1000, max_usd=10**9)
    for event in run.events():
        if event["kind"] == "receipt":
            break
    seller.kill()
    run.cancel()
    wait_until(lambda: run.status == "cancelled")
    again = start_node("seller", "--ask", "100", "--connect", buyer.addresses()[0])
    owing = buyer.get("/v1/ledger")["owing_nusd"]
    assert owing > 0
    wait_until(lambda: again.get("/v1/ledger")["owed_nusd"] == owing)
    assert again.get("/v1/status")["leases"] == 0


def test_a_buyer_killed_and_restarted_finishes_its_job(
    start_node: StartNode, wait_until: Any
) -> None:
    seller = start_node("seller", "--ask", "90000")
    address = seller.addresses()[0]
    buyer = start_node("buyer", "--connect", address)
    wait_for_asks(buyer, 1, wait_until)
    job = counting_job(steps=60_000)
    run = submit(job, buyer)
    rows = iter(run)
    told = [next(rows)]
    buyer.kill()
    again = start_node("buyer", "--connect", address)
    told += rows
    result = run.result(timeout=90)
    result.verify()
    by_step = {row.step: row for row in told}
    assert sorted(by_step) == list(range(60_000)), "those that were lost came from the trace"
    assert [by_step[step].total for step in range(60_000)] == list(result["total"])
    assert [step for step in sorted(by_step) if "top" in by_step[step]] == result.steps_of("top")
    cost = again.get("/v1/ledger")["owing_nusd"]
    assert cost > 0
    wait_until(lambda: seller.get("/v1/ledger")["owed_nusd"] == cost)


def test_a_cancelled_job_frees_the_provider(start_node: StartNode, wait_until: Any) -> None:
    seller = start_node("seller", "--ask", "0.01")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    run = submit(counting_job(steps=LONG_STEPS), buyer)
    next(iter(run))
    run.cancel()
    wait_until(lambda: run.status == "cancelled")
    wait_until(lambda: seller.get("/v1/status")["leases"] == 0)
    submit(counting_job(steps=3), buyer).result(timeout=60).verify()


def test_two_takers_of_one_slot_get_one_fill(start_node: StartNode, wait_until: Any) -> None:
    node = start_node("node", "--ask", "0.01", "--slots", "1")
    first = submit(counting_job(steps=LONG_STEPS), node)
    next(iter(first))
    second = submit(counting_job(steps=3), node)
    wait_until(lambda: second.status == "waiting")
    refused = [event["reason"] for event in first_events(second, "waiting")]
    assert refused == ["busy: every slot is taken"]
    first.cancel()
    wait_until(lambda: first.status == "cancelled")
    second.result(timeout=30).verify()
    third = submit(counting_job(steps=LONG_STEPS), node)
    next(iter(third))
    impatient = submit(counting_job(steps=3), node, deadline=2, fresh=True)
    with pytest.raises(pf.MarketError, match="the deadline passed while waiting"):
        impatient.result(timeout=30)
    third.cancel()


def test_a_public_blob_is_found_from_the_far_end_of_a_line(
    start_node: StartNode, wait_until: Any
) -> None:
    middle = start_node("middle")
    address = middle.addresses()[0]
    left = start_node("left", "--connect", address)
    right = start_node("right", "--connect", address)
    data = bytes(range(256)) * 9000
    hidden = Client(left.home).put(b"private")
    public = Client(left.home).put(data, public=True)
    wait_until(lambda: len(middle.get("/v1/peers")["peers"]) == 2)

    def got() -> bool:
        answer = httpx.get(url, headers=user, timeout=60)
        return answer.status_code == 200 and answer.content == data

    url = f"{right.url}/blob/{public.address.hex()}"
    user = {"authorization": f"Bearer {(right.home / 'token').read_text()}"}
    assert httpx.get(url, timeout=60).status_code == 404, "nobody but its user makes a node fetch"
    assert right.get("/v1/blobs")["blobs"] == []
    wait_until(got, timeout_s=60)
    assert httpx.get(url, timeout=60).content == data, "what is here needs no token"
    elsewhere = f"{right.url}/blob/{hidden.address.hex()}"
    assert httpx.get(elsewhere, headers=user, timeout=60).status_code == 404


def test_ctrl_c_on_a_busy_provider_ends_it_in_order(start_node: StartNode, wait_until: Any) -> None:
    seller = start_node("seller", "--ask", "0.01")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    run = submit(counting_job(steps=LONG_STEPS), buyer)
    next(iter(run))
    stopper = threading.Thread(target=seller.stop)
    stopper.start()
    lost = next(event for event in run.events() if event["kind"] == "resubmitted")
    assert "shutting down" in lost["reason"]
    stopper.join()
    assert seller.process.returncode == 0
    wait_until(lambda: buyer.get("/v1/book")["book"] == [])
