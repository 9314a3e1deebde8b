"""In which classes a job may be computed, and that the first fill decides it."""

from __future__ import annotations

import pytest
import trio

from p2pflop.errors import ConfigError, JobError
from p2pflop.job.spec import ClassDescriptor, class_id
from p2pflop.node import messages as m
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from tests.sim.conftest import Market
from tests.sim.test_purchase_memory import Tap

OTHER = ClassDescriptor("other", "none", "none", "none", "", "0", "")
OTHER_ID = class_id(OTHER)


async def both(market: Market) -> tuple[MemoryNode, MemoryNode, MemoryNode]:
    """A provider of the buyer's class, a cheaper one of another, and the buyer."""
    own = await market.provider("own")
    other = await market.provider("other", descriptor=OTHER, price_nusd=PRICE_NUSD // 2)
    return own, other, await market.buyer()


@pytest.mark.parametrize(
    ("named", "wanted"),
    [((), "own"), (("any",), "other"), ((OTHER_ID.hex(),), "other")],
)
async def test_the_best_ask_of_the_named_classes_wins(
    market: Market, autojump_clock: object, named: tuple[str, ...], wanted: str
) -> None:
    own, other, buyer = await both(market)
    run_id = await buyer.submit(sample_file(120), classes=named)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    await market.settle_down()
    sold = {"own": len(own.seller._sales), "other": len(other.seller._sales)}
    assert sold == {"own": 0, "other": 0} | {wanted: 1}
    market.check()


async def test_the_first_fill_fixes_the_class(market: Market, autojump_clock: object) -> None:
    own, other, buyer = await both(market)
    buyer.tamper_heard = tap = Tap(m.Rows)
    run_id = await buyer.submit(sample_file(1000), classes=("any",), deadline_s=600)
    await tap.reached.wait()
    await other.kill()
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["message"]) == ("failed", "the deadline passed while waiting")
    assert len(own.seller._sales) == 0
    first, *later = buyer.events(run_id, "ranked")
    assert {deal["provider"] for deal in first["deals"]} == {own.peer, other.peer}
    assert not any(own.peer == deal["provider"] for each in later for deal in each["deals"])


async def test_a_restart_remembers_the_class(market: Market, autojump_clock: object) -> None:
    own, other, buyer = await both(market)
    buyer.tamper_heard = tap = Tap(m.Rows)
    run_id = await buyer.submit(sample_file(1000), classes=("any",))
    await tap.reached.wait()
    await other.kill()
    await buyer.kill()
    buyer.tamper_heard = Tap()
    await market.restart(buyer)
    assert (await market.end_of(buyer, run_id))["kind"] == "failed"
    assert len(own.seller._sales) == 0


async def test_a_stretch_goes_on_in_the_class_of_its_state(
    market: Market, autojump_clock: object
) -> None:
    own, other, buyer = await both(market)
    run_id = await buyer.submit(sample_file(120), classes=("any",))
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    later = sample_file(10, first_step=120)
    with pytest.raises(JobError, match="known in another class only") as told:
        await buyer.submit(later)
    assert told.value.message.endswith(OTHER_ID.hex())
    assert f"p2pflop submit --class {OTHER_ID.hex()}" in told.value.hint
    with pytest.raises(JobError, match="not known to this node"):
        await buyer.submit(sample_file(10, first_step=119), classes=("any",))
    more = await buyer.submit(later, classes=("any",))
    assert (await market.end_of(buyer, more))["kind"] == "result"
    assert len(own.seller._sales) == 0
    await market.settle_down()
    assert len(other.seller._sales) == 2
    market.check()


async def test_what_failed_in_another_class_says_how_to_go_on_in_it(
    market: Market, autojump_clock: object
) -> None:
    own, other, buyer = await both(market)
    other.workers.step_s = 1.0
    run_id = await buyer.submit(sample_file(100), classes=("any",), checkpoint_steps=10)
    await trio.sleep(35)
    assert buyer.events(run_id, "receipt")
    await other.kill()
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "failed"
    assert f"--class {OTHER_ID.hex()}, goes on from there" in end["hint"]
    assert len(own.seller._sales) == 0


async def test_a_stretch_that_failed_before_its_first_checkpoint_names_where_it_began(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    assert (await market.end_of(buyer, await buyer.submit(sample_file(20))))["kind"] == "result"
    provider.workers.step_s = 1.0
    run_id = await buyer.submit(sample_file(100, first_step=20), checkpoint_steps=0)
    await trio.sleep(5)
    await provider.kill()
    end = await market.end_of(buyer, run_id)
    assert "The checkpoint after step 20 is here: job.resume(20)" in end["hint"]


async def test_any_class_is_named_alone(market: Market, autojump_clock: object) -> None:
    buyer = await market.buyer()
    with pytest.raises(ConfigError, match="any class and others"):
        await buyer.submit(sample_file(1), classes=("any", OTHER_ID.hex()))


async def test_an_unknown_class_is_refused(market: Market, autojump_clock: object) -> None:
    buyer = await market.buyer()
    with pytest.raises(ConfigError, match="no class 'fast'"):
        await buyer.submit(sample_file(1), classes=("fast",))
    with pytest.raises(ConfigError, match="PYTHON is an emulator"):
        await buyer.submit(sample_file(1), classes=("PYTHON",))
