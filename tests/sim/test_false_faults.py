"""Providers that say that a job faults: the buyer's own sandbox tells whether it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import trio

from p2pflop.errors import JobError, ProviderError
from p2pflop.job.buying import FAULTS_HERE, HOW_TO_CHECK, MAX_STRANGERS
from p2pflop.job.events import State
from p2pflop.job.spec import Work
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns, sample_file
from p2pflop.node.memory_workers import CountingSession
from p2pflop.node.service import Json
from p2pflop.node.trying import TRY_S
from tests.sim.test_bad_input import LARGE, Quick, fed_file

if TYPE_CHECKING:
    from tests.sim.conftest import Market

STEPS, CHECKPOINT_STEPS = 8, 2


def faults_at(step: int) -> type[CountingSession]:
    """A session that says in that step that the job is at fault."""

    class Faults(CountingSession):
        def step(self, number: int) -> None:
            if number >= step:
                raise JobError(f"the job's code faulted in step {number}")
            super().step(number)

    return Faults


class Steps(CountingSession):
    """Notes which steps it did, and from what state."""

    done: list[int] = []  # noqa: RUF012 - shared with the test
    began: list[int] = []  # noqa: RUF012 - likewise

    def __init__(self, work: Work, plans: Mapping[bytes, bytes]) -> None:
        super().__init__(work, plans)
        self._is_new = True

    def step(self, number: int) -> None:
        if self._is_new:
            Steps.began.append(self.read(0)[0])
            self._is_new = False
        Steps.done.append(number)
        super().step(number)


async def liars_and_one(
    market: Market, liars: int, lies: Callable[..., CountingSession], **of_buyer: Any
) -> tuple[list[MemoryNode], MemoryNode, MemoryNode]:
    """Strangers that lie, a dearer provider that does not, and a buyer that meets them all."""
    lying = [await market.provider(f"liar {n}", session=lies) for n in range(liars)]
    honest = await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    return lying, honest, await market.buyer(**of_buyer)


async def tried(buyer: MemoryNode, run_id: str) -> None:
    """Until a run is tried out."""
    with trio.fail_after(60):
        async for events in buyer.runs.follow(run_id, 0):
            if any(event.get("state") == State.CHECKING for event in events):
                return


async def end_of(market: Market, buyer: MemoryNode) -> tuple[str, Json]:
    run_id = await buyer.submit(sample_file(STEPS), checkpoint_steps=CHECKPOINT_STEPS)
    return run_id, await market.end_of(buyer, run_id)


async def test_any_number_of_strangers_cannot_end_a_job_that_does_not_fault(
    market: Market, autojump_clock: object
) -> None:
    liars, honest, buyer = await liars_and_one(market, MAX_STRANGERS + 2, faults_at(0))
    run_id, end = await end_of(market, buyer)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    states = [event["state"] for event in buyer.events(run_id, "state")]
    assert states.count(State.CHECKING) == 1
    avoided = set(buyer.buyer.experience.avoided(now_ns()))
    assert avoided == {liar.account for liar in liars}

    # The next job goes to the honest one at once.
    again = await buyer.submit(sample_file(STEPS, seed=1))
    assert (await market.end_of(buyer, again))["provider"] == honest.peer
    assert len(buyer.events(again, "filled")) == 1
    await market.settle_down()
    market.check()


async def test_a_job_that_faults_here_too_ends_with_the_fault(
    market: Market, autojump_clock: object
) -> None:
    faulty = faults_at(3)
    sellers = [await market.provider(f"seller {n}", session=faulty) for n in range(5)]
    buyer = await market.buyer(session=faulty)
    run_id, end = await end_of(market, buyer)
    assert (end["kind"], end["error"]) == ("failed", "JobError")
    assert end["message"] == "the job failed: the job's code faulted in step 3" + FAULTS_HERE
    assert len(buyer.events(run_id, "filled")) == 2
    assert len(sellers) > 2
    assert "job.resume(2)" in end["hint"]


async def test_the_only_provider_is_not_simply_believed(
    market: Market, autojump_clock: object
) -> None:
    liar = await market.provider("liar", session=faults_at(0))
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(STEPS))
    with trio.move_on_after(10):
        await buyer.end_of(run_id)
    honest = await market.provider("honest", price_nusd=3 * PRICE_NUSD)
    buyer.meet(honest)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    assert liar.account in buyer.buyer.experience.avoided(now_ns())


async def test_it_runs_from_the_newest_checkpoint_to_the_next(
    market: Market, autojump_clock: object
) -> None:
    Steps.done, Steps.began = [], []
    _, honest, buyer = await liars_and_one(market, 2, faults_at(4), session=Steps)
    _, end = await end_of(market, buyer)
    assert end["provider"] == honest.peer
    first = buyer.store  # the state after four steps had come and was verified
    assert await first.get(bytes.fromhex(end["state"]["weights"]["address"])) == bytes([8] * 16)
    assert Steps.done == [4, 5]
    assert Steps.began == [4]


async def test_a_trial_that_takes_too_long_leaves_it_open(
    market: Market, autojump_clock: object
) -> None:
    _, honest, buyer = await liars_and_one(market, 2, faults_at(0))
    buyer.workers.step_s = 10 * TRY_S
    began_s = trio.current_time()
    _, end = await end_of(market, buyer)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    assert TRY_S <= trio.current_time() - began_s < 2 * TRY_S


async def test_without_a_sandbox_of_its_class_it_is_told_whose_word_it_is(
    market: Market, autojump_clock: object
) -> None:
    liars = [await market.provider(f"liar {n}", session=faults_at(0)) for n in range(MAX_STRANGERS)]
    buyer = await market.buyer()
    buyer.workers.broken = True
    _, end = await end_of(market, buyer)
    assert end["error"] == "JobError"
    for liar in liars:
        assert liar.account.hex()[:12] in end["message"]
    assert HOW_TO_CHECK in end["message"]


async def test_a_sandbox_that_fails_leaves_it_open(market: Market, autojump_clock: object) -> None:
    _, honest, buyer = await liars_and_one(market, 2, faults_at(0))
    buyer.workers.failure = ProviderError("the sandbox is lost")
    _, end = await end_of(market, buyer)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)


async def test_a_job_larger_than_this_node_is_not_tried_out(
    market: Market, autojump_clock: object
) -> None:
    _, honest, buyer = await liars_and_one(market, 2, faults_at(0), memory_bytes=2**20)
    run_id, end = await end_of(market, buyer)
    assert end["provider"] == honest.peer
    assert State.CHECKING not in [event["state"] for event in buyer.events(run_id, "state")]


async def test_a_buyer_that_dies_while_it_tries_begins_anew(
    market: Market, autojump_clock: object
) -> None:
    _, honest, buyer = await liars_and_one(market, 2, faults_at(0))
    buyer.workers.step_s = 5.0
    run_id = await buyer.submit(sample_file(STEPS), checkpoint_steps=CHECKPOINT_STEPS)
    await tried(buyer, run_id)
    await buyer.kill()
    await market.restart(buyer)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    await market.settle_down()
    market.check()


async def test_a_user_may_cancel_while_it_is_tried(market: Market, autojump_clock: object) -> None:
    _, _, buyer = await liars_and_one(market, 2, faults_at(0))
    buyer.workers.step_s = TRY_S / 4
    run_id = await buyer.submit(sample_file(STEPS))
    await tried(buyer, run_id)
    buyer.runs.get(run_id).cancel_requested.set()
    with trio.fail_after(5):
        assert (await buyer.end_of(run_id))["kind"] == "cancelled"
        await trio.sleep(1)
    assert buyer.workers.statistics().workers == 0


async def test_a_job_with_feeds_is_tried_out_too(market: Market, autojump_clock: object) -> None:
    class FaultsLater(Quick):
        def step(self, number: int) -> None:
            if number == 4:
                raise JobError("the job's code faulted")
            super().step(number)

    for number in range(2):
        await market.provider(f"liar {number}", session=FaultsLater)
    honest = await market.provider("honest", price_nusd=2 * PRICE_NUSD, session=Quick)
    buyer = await market.buyer(floats=LARGE, session=Quick)
    file, blobs = fed_file()
    for blob in blobs:
        await buyer.store.put(blob)
    run_id = await buyer.submit(file, checkpoint_steps=CHECKPOINT_STEPS)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    states = [event["state"] for event in buyer.events(run_id, "state")]
    assert states.count(State.CHECKING) == 1
