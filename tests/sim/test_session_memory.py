"""Sessions between real buyers and sellers joined in memory: how they begin, run, move and end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.commands import Allocate, Failed, Free, Ran, Read, Run, Write
from p2pflop.node import session_buying
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from tests.session_scripts import FLOATS, Script, beginning, opening, steps

if TYPE_CHECKING:
    from tests.sim.conftest import Market

SIZE = 4 * FLOATS


async def begin(market: Market, buyer: MemoryNode, script: Script, **wish: object) -> None:
    script.say(opening(**wish))
    market.nursery.start_soon(buyer.sessions.serve, script)
    await script.begun()


async def reference(market: Market, runs: int) -> bytes:
    """What a session of so many runs gives, on a market of its own."""
    other = market.another()
    await other.provider()
    buyer = await other.buyer()
    script = Script()
    await begin(other, buyer, script)
    script.give([*beginning(), *steps(runs)])
    data = await script.read(0, SIZE)
    await script.close()
    await other.close()
    return data



async def test_a_session_runs_reads_and_pays(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(market, buyer, script)
    script.give([*beginning(), *steps(3)])
    data = await script.read(0, SIZE)
    assert len(data) == SIZE
    assert data != bytes(SIZE)
    assert script.leases[0].provider == provider.account.hex()
    closed = await script.close()
    assert closed.cost_nusd > 0
    assert closed.flop == 3 * FLOATS
    await market.settle_down()
    assert market.debts(buyer, provider) == (closed.cost_nusd, closed.cost_nusd)
    market.check()


async def test_equal_commands_give_equal_bytes(market: Market, autojump_clock: object) -> None:
    assert await reference(market, 5) == await reference(market, 5)
    assert await reference(market, 5) != await reference(market, 6)
