"""The power goes at every write of either side, before it or after it; then the node restarts.

Whatever was lost: the run comes to an end, both ledgers say the same, and nothing is in one twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.spec import ROLE_STATE, Result
from p2pflop.node.memory_market import MemoryNode, sample_file
from p2pflop.node.memory_workers import CountingSession
from p2pflop.node.service import Json
from p2pflop.wire import decode

if TYPE_CHECKING:
    from tests.sim.conftest import Market

NEXT = bytes((byte + 1) % 256 for byte in range(256))
SHORT_S, LONG_S = 0.5, 2 * 3600.0
"""How long a node is down: within, and beyond, the patience of the other."""


class QuickSession(CountingSession):
    """The same values, without a loop over each byte."""

    def step(self, number: int) -> None:
        for param, memory in zip(self._work.params, self._slots, strict=True):
            if param.role == ROLE_STATE:
                memory[:] = memory.translate(NEXT)
        self._step = number
        self._last = dict.fromkeys(range(len(self._work.phases)), number)


@dataclass(frozen=True)
class Purchase:
    """A job and how it is bought. The blobs of a large one do not go along with messages."""

    steps: int
    checkpoint_steps: int
    floats: int
    light: bool = False
    """Begun before it is confirmed."""


SMALL = Purchase(steps=12, checkpoint_steps=4, floats=4)
LARGE = Purchase(steps=3, checkpoint_steps=1, floats=70_000)
LIGHT = Purchase(steps=12, checkpoint_steps=4, floats=4, light=True)


@dataclass(frozen=True)
class Cut:
    """Who loses power, at which write, on which side of it, and for how long."""

    victim: str
    at: int
    before: bool
    down_s: float


async def buy(market: Market, purchase: Purchase, cut: Cut | None = None) -> tuple[int, int, Json]:
    """One purchase with a power cut; the writes of buyer and provider, and how it ended."""
    provider = await market.provider(session=QuickSession)
    buyer = await market.buyer(floats=purchase.floats)
    if purchase.light:
        provider.seller.warm.lingers = lambda *_: True  # type: ignore[method-assign]
    victim = {"buyer": buyer, "provider": provider}[cut.victim] if cut else buyer

    async def submit() -> None:
        file = sample_file(purchase.steps, floats=purchase.floats, born=purchase.light)
        await buyer.submit(file, checkpoint_steps=purchase.checkpoint_steps)

    if cut is not None:
        victim.cut_at, victim.cut_before = cut.at, cut.before
    market.nursery.start_soon(submit)
    if cut is not None:
        with trio.fail_after(60):
            await victim.down.wait()
        await trio.sleep(cut.down_s)
        await market.restart(victim)
    else:
        await trio.sleep(1)
    if not buyer.runs.cards():
        # Nothing of it was on disk, and nobody had been told that it was.
        assert cut == Cut("buyer", 1, True, cut.down_s if cut else 0)
        market.nursery.start_soon(submit)
        await trio.sleep(1)
    [card] = buyer.runs.cards()
    end = await market.end_of(buyer, card["id"])
    await market.settle_down()
    check(market, buyer, provider, end)
    if end["kind"] == "result":
        await check_goods(buyer, card["id"])
    await market.close()
    return buyer.writes, provider.writes, end


def check(market: Market, buyer: MemoryNode, provider: MemoryNode, end: Json) -> None:
    market.check()
    owing, due = market.debts(buyer, provider)
    if end["kind"] == "result":
        assert owing == due == end["cost_nusd"]
    else:
        assert end["error"] in ("ProviderError", "MarketError"), end
    for node in (buyer, provider):
        entries = node.ledger_book.report()["entries"]
        booked = [(entry["reference"], entry["number"]) for entry in entries]
        assert len(set(booked)) == len(booked), "a receipt is booked twice"
        total = sum(max(posting["amount_nusd"], 0) for e in entries for posting in e["postings"])
        assert total == owing


async def check_goods(buyer: MemoryNode, run_id: str) -> None:
    """What is countersigned is here: nobody pays for blobs that a power cut took."""
    result = decode(Result, buyer.buyer.result_record(run_id))
    named = [result.trace, *result.state, *(output.address for output in result.outputs)]
    for address in named:
        assert await buyer.store.stat(address) is not None, address.hex()


@pytest.mark.parametrize(
    ("purchase", "down_s"),
    [
        pytest.param(SMALL, SHORT_S, id="small-short"),
        pytest.param(SMALL, LONG_S, id="small-long", marks=pytest.mark.slow),
        pytest.param(LIGHT, SHORT_S, id="light-short"),
        pytest.param(LIGHT, LONG_S, id="light-long", marks=pytest.mark.slow),
        pytest.param(LARGE, SHORT_S, id="large-short"),
        pytest.param(LARGE, LONG_S, id="large-long", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("victim", ["buyer", "provider"])
async def test_a_power_cut_at_any_write_ends_with_equal_ledgers(
    market: Market, autojump_clock: object, victim: str, purchase: Purchase, down_s: float
) -> None:
    buyers, providers, end = await buy(market.another(), purchase)
    assert end["kind"] == "result"
    writes = buyers if victim == "buyer" else providers
    assert writes >= 4
    for at in range(1, writes + 1):
        for before in (True, False):
            cut = Cut(victim, at, before, down_s)
            try:
                _, _, end = await buy(market.another(), purchase, cut)
            except Exception as error:
                raise AssertionError(f"{cut}: {error!r}") from error
            if victim == "buyer" and down_s == SHORT_S:
                assert end["kind"] == "result", f"{cut}: a buyer that comes back loses nothing"


@pytest.mark.parametrize("victim", ["buyer", "provider"])
async def test_a_second_cut_while_it_recovers_changes_nothing(
    market: Market, autojump_clock: object, victim: str
) -> None:
    buyers, providers, _ = await buy(market.another(), SMALL)
    for at in range(2, (buyers if victim == "buyer" else providers) + 1):
        apart = market.another(seed=at)
        provider, buyer = await apart.provider(), await apart.buyer()
        node = buyer if victim == "buyer" else provider
        node.cut_at = at
        apart.nursery.start_soon(buyer.submit, sample_file(120))
        await node.down.wait()
        await apart.restart(node)
        node.cut_at = node.writes + 1
        with trio.move_on_after(60):
            await node.down.wait()
            await apart.restart(node)
        node.cut_at = None
        [card] = buyer.runs.cards()
        end = await apart.end_of(buyer, card["id"])
        await apart.settle_down()
        check(apart, buyer, provider, end)
        await apart.close()
