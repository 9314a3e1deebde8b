"""Markets in memory whose every run is the same: virtual time, one thread, tasks in a fixed order.

With an autojump clock, time would pass while a thread works, however short. So here commits and
other work for threads are done on the event loop, between two checkpoints.
"""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import trio
from trio.testing import MockClock

from p2pflop.dht.database import Database
from p2pflop.errors import StoreError
from p2pflop.market import sessions
from p2pflop.market.ledger import Kind
from p2pflop.node.journal import PROVIDER
from p2pflop.node.memory_host import MemoryNetwork
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_data
from p2pflop.node.sale import Sale
from p2pflop.node.service import Json

END_S = 26 * 3600.0
"""Virtual: past the default deadline, and all that may follow it."""
LETTERS_S = 900.0
"""Virtual: past every pause between two attempts to deliver a letter."""
SEED = 0

T = TypeVar("T")


class Market:
    """Nodes of one network, and what must hold between them at every write."""

    newest: ClassVar[Market | None] = None

    def __init__(self, folder: Path, nursery: trio.Nursery, seed: int = SEED) -> None:
        self.nursery = nursery
        self.nodes: list[MemoryNode] = []
        self._folder = folder
        self._network = MemoryNetwork()
        self._others = 0
        self._breaches: list[str] = []
        Market.newest = self
        importlib.import_module("trio._core._run")._r.seed(seed)

    async def node(self, name: str, *, price_nusd: int | None = None, **more: Any) -> MemoryNode:
        """A node that runs; with a price, one that sells. It knows who sells already."""
        node = MemoryNode(self._network, self._folder / name, price_nusd=price_nusd, **more)
        await node.start(self.nursery)
        node.meet(*self.nodes)
        self.nodes.append(node)
        return node

    async def provider(self, name: str = "provider", **more: Any) -> MemoryNode:
        """A node that sells."""
        return await self.node(name, **{"price_nusd": PRICE_NUSD, **more})

    async def buyer(self, name: str = "buyer", *, floats: int = 4, **more: Any) -> MemoryNode:
        """A node that has the inputs of ``sample_file``."""
        node = await self.node(name, **more)
        for data in sample_data(floats):
            await node.store.put(data)
        return node

    async def restart(self, node: MemoryNode) -> None:
        """Start a node that is down; everybody learns the newest sheets."""
        node.cut_at = None
        await node.start(self.nursery)
        for other in self.nodes:
            other.meet(*(seller for seller in self.nodes if seller is not other))

    async def end_of(self, node: MemoryNode, run_id: str) -> Json:
        """How a run ends; it has to, in bounded virtual time."""
        with trio.fail_after(END_S):
            return await node.end_of(run_id)

    async def settle_down(self) -> None:
        """Wait until every sale is over and late letters have come."""
        for _ in range(int(END_S // LETTERS_S)):
            await trio.sleep(LETTERS_S)
            if not any(node.journal.unfinished(PROVIDER) for node in self.nodes):
                break
        assert not any(node.seller.busy for node in self.nodes)

    def watch(self) -> None:
        """Note it if anybody's book has more earned than the other's book has spent."""
        for provider in self.nodes:
            for buyer in self.nodes:
                theirs, ours = provider.ledger_book._ledger, buyer.ledger_book._ledger
                earned = -theirs.balance_nusd(buyer.account, Kind.REVENUE)
                spent = ours.balance_nusd(provider.account, Kind.EXPENSE)
                if earned > spent:
                    self._breaches.append(f"{provider.folder.name} claims {earned}, not {spent}")

    def check(self) -> None:
        """Nobody has ever claimed too much, and by now nobody claims too little."""
        self.watch()
        assert not self._breaches
        for provider in self.nodes:
            for buyer in self.nodes:
                owing, due = self.debts(buyer, provider)
                assert owing == due

    def debts(self, buyer: MemoryNode, provider: MemoryNode) -> tuple[int, int]:
        """What the buyer says it owes, and what the provider says is due."""
        owing = -buyer.ledger_book.due_nusd(provider.account)
        return owing, provider.ledger_book.due_nusd(buyer.account)

    def another(self, seed: int = SEED) -> Market:
        """A market apart, for the next run of a loop."""
        self._others += 1
        return Market(self._folder / f"market-{self._others}", self.nursery, seed)

    async def close(self) -> None:
        """End every node."""
        for node in self.nodes:
            if not node.down.is_set():
                await node.kill()


def only_sale(provider: MemoryNode) -> Sale:
    """The one that a provider knows of."""
    [sale] = provider.seller._sales.values()
    return sale


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def write(self: Database, operation: Callable[[sqlite3.Connection], T]) -> T:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise StoreError(f"{self.path} is closed")
        connection = self._connection
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = operation(connection)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        if Market.newest is not None:
            Market.newest.watch()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    async def run_here(work: Callable[..., T], *args: Any, **_options: Any) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        result = work(*args)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    monkeypatch.setattr(Market, "newest", None)
    monkeypatch.setattr(Database, "write", write)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)


@pytest.fixture(autouse=True)
def _runs_alone_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the prices of these markets, where each FLOP is seen, what else a lease of a session bills
    would be all that is: a test that is about it sets it."""
    monkeypatch.setattr(sessions, "LOWERING_FLOP_PER_NODE", 0)
    monkeypatch.setattr(sessions, "HELD_FLOP_PER_BYTE", 0)


@pytest.fixture
async def market(tmp_path: Path, nursery: trio.Nursery) -> Market:
    """A market, for a test that asks for ``autojump_clock`` too."""
    assert isinstance(trio.lowlevel.current_clock(), MockClock), "the test needs autojump_clock"
    return Market(tmp_path, nursery)
