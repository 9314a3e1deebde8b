"""Storms in which everything is used at once: fixed charges, limits, windows, small credit, wishes
and quotes, runs that rest and are cancelled, and payments both ways that cross.

What happens beside is in ``memory_world``. A failure names the seed that replays it.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pflop.errors import P2PFlopError
from p2pflop.market.ledger import Kind
from p2pflop.node.memory_market import MemoryNode, PowerCutError
from p2pflop.node.memory_world import Bought, World, WorldSettings, unbroken_hashes
from p2pflop.node.service import Json
from tests.sim.test_market_ordeal import Ordeal, ordeal

__all__ = ["ordeal"]

SEED = 7
SMALL = WorldSettings(
    providers=2, buyers=2, villains=("mute", "quitter", "unsigning"), errands=5, storm_s=120.0
)
LARGE = WorldSettings(errands=5, storm_s=200.0)
WORDS_S = 400.0
"""Virtual: past the longest pause between two attempts to bring a word about a payment."""


class BusyWorld(World):
    """A world whose providers have charges and limits, and whose users rest, cancel and pay."""

    def settings_of(self, price_nusd: int | None) -> dict[str, Any]:
        """See World."""
        if price_nusd is None:
            return {}
        chosen: dict[str, tuple[int | None, ...]] = {
            "setup_nusd": (0, 0, 3, 50),
            "min_charge_nusd": (0, 0, 40, 400),
            "byte_price_nusd": (0, 10**6),
            "slots": (1, 2),
            "window_nusd": (10**8, 10**8, 20),
            "credit_nusd": (10**9, 10**4),
            "max_lease_s": (None, 400),
            "max_moved_bytes": (None, 10**6),
            "wish_ask_nusd": (None, price_nusd // 2),
        }
        return {name: self.random.choice(values) for name, values in chosen.items()}

    def options(self) -> dict[str, Any]:
        """See World."""
        return {"rest": self.random.random() < 0.5}

    async def _submit(self, buyer: MemoryNode, bought: Bought) -> None:
        if self.storm.rages and self.random.random() < 0.25:
            self._storming.start_soon(self._cancel, buyer, bought)
        await super()._submit(buyer, bought)

    async def _cancel(self, buyer: MemoryNode, bought: Bought) -> None:
        await trio.sleep(self.random.uniform(0, 60))
        if not buyer.down.is_set() and await buyer.runs.knows(bought.run_id):
            bought.is_cancelled = True
            buyer.runs.get(bought.run_id).cancel_requested.set()

    async def _rage(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pay_now_and_then)
            await super()._rage()
            nursery.cancel_scope.cancel()

    async def _pay_now_and_then(self) -> None:
        while True:
            await trio.sleep(self.random.uniform(1, 10))
            buyer, provider = self.random.choice(self.buyers), self.random.choice(self.providers)
            if buyer.down.is_set() or provider.down.is_set():
                continue
            act = self.random.choice((self._claim, self._claim, self._answer, self._answer_unasked))
            try:
                with suppress(P2PFlopError), trio.move_on_after(5):
                    await act(buyer, provider)
            except PowerCutError:  # in this task, which is none of the node's
                for node in (buyer, provider):
                    if node.is_dying:
                        node.cut_power()

    async def _claim(self, buyer: MemoryNode, provider: MemoryNode) -> None:
        amount_nusd = self.random.choice((1, 10, 100, 1000))
        await buyer.money.pay(self.random.randbytes(32), provider.account, amount_nusd, "paid")
        self.storm.counts["claims"] += 1

    async def _answer(self, _buyer: MemoryNode, provider: MemoryNode) -> None:
        for payment in _waiting(provider)[:1]:
            came = self.random.random() < 0.6
            say = provider.money.acknowledge if came else partial(provider.money.refuse, reason="")
            await say(bytes.fromhex(payment["id"]))
            self.storm.counts["acks" if came else "refusals"] += 1

    async def _answer_unasked(self, buyer: MemoryNode, provider: MemoryNode) -> None:
        """Only between those that know each other: others do not believe it."""
        books = ((buyer, provider), (provider, buyer))
        if all(one.ledger_book.has_traded_with(other.account) for one, other in books):
            await provider.money.receive(self.random.randbytes(32), buyer.account, 5, "cash")

    async def _finish(self) -> None:
        """Every claim is answered, and every word arrives."""
        await super()._finish()
        for _ in range(20):
            self._connect()
            for provider in self.providers:
                for payment in _waiting(provider):
                    await provider.money.acknowledge(bytes.fromhex(payment["id"]))
            await trio.sleep(WORDS_S)
            open_still = [p for node in self.honest for p in node.money.listed() if not _is_over(p)]
            if not open_still:
                return
        raise self.failure(f"payments without an end: {open_still}")

    def check_money(self) -> None:
        """See World."""
        for buyer in self.buyers:
            for provider in self.providers:
                owed, due = _changes(buyer, provider), _changes(provider, buyer)
                if owed != {reference: -nusd for reference, nusd in due.items()}:
                    names = f"{buyer.folder.name} and {provider.folder.name}"
                    raise self.failure(f"{names} do not agree: {owed}, {due}")
        for node in self.honest:
            if sum(node.ledger_book._ledger.totals().values()):
                raise self.failure(f"the ledger of {node.folder.name} does not sum to zero")

    def _check_costs(self, buyer: MemoryNode) -> None:
        costs = [bought.end.get("cost_nusd", 0) for bought in self.bought[buyer.peer]]
        spent_nusd = buyer.ledger_book._ledger.totals()[Kind.EXPENSE]
        if sum(costs) != spent_nusd:
            raise self.failure(f"{buyer.folder.name} spent {spent_nusd}, its runs cost {costs}")
        for bought, cost_nusd in zip(self.bought[buyer.peer], costs, strict=True):
            if bought.max_nusd is not None and cost_nusd > bought.max_nusd:
                raise self.failure(f"run {bought.run_id} cost more than its limit")


def _waiting(node: MemoryNode) -> list[Json]:
    """Claims that wait for its answer."""
    return [p for p in node.money.listed() if (p["side"], p["state"]) == ("received", "claimed")]


def _is_over(payment: Json) -> bool:
    return bool(payment["told"]) and payment["state"] != "claimed"


def _changes(node: MemoryNode, other: MemoryNode) -> dict[bytes, int]:
    """What each fill and payment has changed in what ``other`` owes ``node``."""
    changes: Counter[bytes] = Counter()
    for entry in node.ledger_book._entries(10**6):
        for posting in entry.postings:
            is_owed = posting.kind in (Kind.RECEIVABLE, Kind.PAYABLE)
            if posting.counterparty == other.account and is_owed:
                changes[entry.reference] += posting.amount_nusd
    return {reference: nusd for reference, nusd in changes.items() if nusd}


async def survive(
    ordeal: Ordeal, tmp_path: Path, nursery: trio.Nursery, seed: int, settings: WorldSettings
) -> World:
    world = await ordeal(seed, settings, world=BusyWorld)
    world.check(await unbroken_hashes(tmp_path / "fair", nursery))
    await world.close()
    return world


async def test_all_at_once(
    ordeal: Ordeal, autojump_clock: object, tmp_path: Path, nursery: trio.Nursery
) -> None:
    world = await survive(ordeal, tmp_path, nursery, SEED, SMALL)
    assert min(world.storm.counts[each] for each in ("claims", "power cuts", "went dark")) > 0
    assert any(bought.is_cancelled for each in world.bought.values() for bought in each)


@pytest.mark.slow
@pytest.mark.parametrize("seed", random.Random(1).sample(range(2**32), 20))  # noqa: S311 - no secret
async def test_many_seeds_of_all_at_once(
    ordeal: Ordeal, autojump_clock: object, tmp_path: Path, nursery: trio.Nursery, seed: int
) -> None:
    await survive(ordeal, tmp_path, nursery, seed, LARGE)
