"""Checkpoints by the clock, and what becomes of those that the buyer has."""

from __future__ import annotations

import pytest
import trio

from p2pflop.dht.blobs import BlobWriter
from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError, StoreError
from p2pflop.node import messages as m
from p2pflop.node.memory_market import sample_file
from tests.sim.conftest import Market
from tests.sim.test_purchase_memory import LARGE


def steps_told(events: list[dict[str, int]]) -> list[int]:
    return [event["step"] for event in events]


async def test_a_job_of_long_steps_has_a_checkpoint_as_often_as_it_was_told(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.step_s = 1.0
    run_id = await buyer.submit(sample_file(99), checkpoint_s=30)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    steps = steps_told(buyer.events(run_id, "checkpoint"))
    assert len(steps) == 3
    gaps = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert all(30 <= gap <= 33 for gap in gaps), steps
    await market.settle_down()
    market.check()


async def test_a_checkpoint_by_steps_puts_the_clock_back(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.step_s = 1.0
    run_id = await buyer.submit(sample_file(99), checkpoint_steps=25, checkpoint_s=30)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    assert steps_told(buyer.events(run_id, "checkpoint")) == [25, 50, 75]


async def test_none_comes_by_the_clock_while_the_buyer_lags_behind(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.step_s = 1.0

    def silent(frame: bytes) -> list[bytes]:
        return [] if isinstance(m.decode_message(frame, ""), m.Countersigned) else [frame]

    buyer.tamper_sent = silent
    run_id = await buyer.submit(sample_file(200), checkpoint_steps=0, checkpoint_s=30)
    with trio.move_on_after(190):
        await market.end_of(buyer, run_id)
    assert len(steps_told(buyer.events(run_id, "checkpoint"))) == 1


async def test_one_that_was_not_wanted_is_tried_again_soon(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.step_s = 1.0
    held: list[bytes] = []

    def late(frame: bytes) -> list[bytes]:
        """The first countersignature comes 40 s after its checkpoint, with a heartbeat."""
        if isinstance(m.decode_message(frame, ""), m.Countersigned) and not late_since:
            late_since.append(trio.current_time())
            held.append(frame)
            return []
        if held and trio.current_time() > late_since[0] + 40:
            return [held.pop(), frame]
        return [frame]

    late_since: list[float] = []
    buyer.tamper_sent = late
    run_id = await buyer.submit(sample_file(200), checkpoint_steps=0, checkpoint_s=30)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    steps = steps_told(buyer.events(run_id, "checkpoint"))
    assert 30 <= steps[0] <= 33
    assert 70 <= steps[1] <= 85, "some seconds after the countersignature"
    assert len(steps) >= 5


async def test_the_states_that_the_buyer_has_make_room_at_the_provider(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=LARGE)
    provider.workers.step_s = 1.0
    run_id = await buyer.submit(sample_file(120, floats=LARGE), checkpoint_steps=10)
    committed = trio.Event()

    def watch(frame: bytes) -> list[bytes]:
        if isinstance(m.decode_message(frame, ""), m.Committed):
            committed.set()
        return [frame]

    buyer.tamper_heard = watch
    await committed.wait()
    kept = {info.address for info in await provider.store.list()}
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result"
    states = {address_of(bytes([step]) * 4 * LARGE) for step in range(10, 120, 10)}
    assert len(states) == 11
    assert len(kept & states) <= 1, "only the newest may still be on its way"
    assert {info.address for info in await buyer.store.list()} >= states
    await market.settle_down()
    market.check()


async def test_a_disk_that_fails_while_a_checkpoint_is_kept_fails_the_lease_not_the_node(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=LARGE)
    writer = provider.store.writer

    def full(*, owner: bytes = b"", public: bool = False) -> BlobWriter:
        if owner:
            raise StoreError("no space left on device")
        return writer(owner=owner, public=public)

    monkeypatch.setattr(provider.store, "writer", full)
    run_id = await buyer.submit(sample_file(100, floats=LARGE), checkpoint_steps=10)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "failed"
    assert "the provider's disk failed" in end["message"]
    monkeypatch.undo()
    again = await buyer.submit(sample_file(3, floats=LARGE))
    assert (await market.end_of(buyer, again))["kind"] == "result"


async def test_a_clock_that_is_too_fast_is_refused(market: Market, autojump_clock: object) -> None:
    buyer = await market.buyer()
    with pytest.raises(ConfigError, match="every 29 s"):
        await buyer.submit(sample_file(1), checkpoint_s=29)
