"""The power goes between any two messages of a purchase, at either end or at both.

``test_power_cuts`` cuts at every write; what is on disk is then the same for several messages in a
row, but what the other side has heard is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.node.memory_market import MemoryNode, sample_file
from tests.sim.test_power_cuts import LARGE, SMALL, Purchase, QuickSession, check, check_goods

if TYPE_CHECKING:
    from p2pflop.node.service import Json
    from tests.sim.conftest import Market

BOTH = ("buyer", "provider")
DOWN_S = 0.5


@dataclass
class Wire:
    """Counts what buyer and provider say to each other, and cuts their power at a message.

    With ``arrives`` the message is heard before that, by whoever is still up; else it is lost.
    """

    victims: list[MemoryNode]
    cut_at: int = 0
    arrives: bool = False
    said: int = 0

    def passing(self, frame: bytes) -> list[bytes]:
        self.said += 1
        if self.said == self.cut_at:
            for victim in self.victims:
                victim.cut_power()
        return [frame] if self.said != self.cut_at or self.arrives else []


async def buy(
    market: Market, purchase: Purchase, names: tuple[str, ...], cut_at: int, *, arrives: bool
) -> tuple[int, Json]:
    """One purchase whose power is cut at a message; how many there were, and how it ended."""
    provider = await market.provider(session=QuickSession)
    buyer = await market.buyer(floats=purchase.floats)
    nodes = {"buyer": buyer, "provider": provider}
    wire = Wire([nodes[name] for name in names], cut_at, arrives)
    buyer.tamper_sent = buyer.tamper_heard = wire.passing

    async def submit() -> None:
        file = sample_file(purchase.steps, floats=purchase.floats)
        await buyer.submit(file, checkpoint_steps=purchase.checkpoint_steps)

    market.nursery.start_soon(submit)
    if cut_at:
        with trio.fail_after(60):
            for victim in wire.victims:
                await victim.down.wait()
        await trio.sleep(DOWN_S)
        for victim in wire.victims:
            await market.restart(victim)
    else:
        await trio.sleep(DOWN_S)
    if not buyer.runs.cards():
        # A bid leaves before its run is on disk; then nobody has been told of the run.
        assert (wire.cut_at, buyer in wire.victims) == (1, True)
        market.nursery.start_soon(submit)
        await trio.sleep(DOWN_S)
    [run_id] = [card["id"] for card in buyer.runs.cards()]
    end = await market.end_of(buyer, run_id)
    await market.settle_down()
    check(market, buyer, provider, end)
    if end["kind"] == "result":
        await check_goods(buyer, run_id)
    await market.close()
    return wire.said, end


@pytest.mark.parametrize(
    "purchase",
    [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="large", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("names", [BOTH[:1], BOTH[1:], BOTH], ids="-".join)
async def test_a_power_cut_between_any_two_messages_ends_with_equal_ledgers(
    market: Market, autojump_clock: object, names: tuple[str, ...], purchase: Purchase
) -> None:
    messages, end = await buy(market.another(), purchase, names, 0, arrives=False)
    assert end["kind"] == "result"
    assert messages >= 10
    for cut_at in range(1, messages + 1):
        for arrives in (False, True):
            try:
                _, end = await buy(market.another(), purchase, names, cut_at, arrives=arrives)
            except Exception as error:
                where = f"{names} at message {cut_at} of {messages}, arrives: {arrives}"
                raise AssertionError(f"{where}: {error!r}") from error
            assert end["kind"] == "result" or "provider" in names, end
