"""Faults of a job in a real worker, from the buyer's side: what it is told, and what is left.

Provider and buyer are joined in memory; the worker is a process of its own, as a provider has it.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pflop.job.buying import FAULTS_HERE
from p2pflop.node import execute
from p2pflop.node.memory_host import MemoryNetwork
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_data, sample_file
from p2pflop.node.service import Json
from p2pflop.node.workers import WorkerPool

ENGINES = Path(__file__).parents[1] / "engines"
sys.path.insert(0, str(ENGINES))
script = importlib.import_module("scripted_engine")
END_S = 30.0
STEPS, CHECKPOINT_STEPS = 8, 2


class Pool(WorkerPool):
    """Its plans are no plans, so nothing is known of their cost."""

    def flop_of(self, plan: bytes) -> int:
        del plan
        return 0


@asynccontextmanager
async def market(folder: Path) -> AsyncIterator[MemoryNode]:
    """The buyer of a provider whose workers do what a job's seed says."""
    pool = Pool(folder / "plans", engine="scripted_engine", variables={"PYTHONPATH": str(ENGINES)})
    network = MemoryNetwork()
    provider = MemoryNode(network, folder / "provider", price_nusd=PRICE_NUSD)
    buyer = MemoryNode(network, folder / "buyer")
    for node in (provider, buyer):
        node.workers = pool  # type: ignore[assignment]
    try:
        async with trio.open_nursery() as nursery:
            await pool.start(nursery)
            for node in (provider, buyer):
                await node.start(nursery)
            for data in sample_data():
                await buyer.store.put(data)
            buyer.meet(provider)
            yield buyer
            for node in (provider, buyer):
                await node.kill()
            nursery.cancel_scope.cancel()
    finally:
        await pool.aclose()


async def buy(buyer: MemoryNode, deed: int, **options: Any) -> Json:
    with trio.fail_after(END_S):
        return await buyer.end_of(await buyer.submit(sample_file(STEPS, seed=deed), **options))


FAULTS = {
    "EAT_ALL_MEMORY": r"memory.* Make its tensors or its batch smaller\.",
    "EAT_RESIDENT_MEMORY": r"memory.* Make its tensors or its batch smaller\.",
    "SEGFAULT": r"the job's code faulted \(SIGSEGV\)\. .*job\.run_local",
    "DIVIDE_BY_ZERO": r"the job's code faulted \(SIGFPE\)\. Does it divide an integer by zero\?",
    "ILLEGAL_INSTRUCTION": r"the job's code faulted \(SIGILL\)\. The processor lacks",
    "SPIN": r"a step took longer than 2 s\. Have it do less at a time\.",
}


@pytest.mark.parametrize("deed", FAULTS)
async def test_a_fault_names_itself_and_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    monkeypatch.setattr(execute, "MAX_STEP_SECONDS", 1.0)
    async with market(tmp_path) as buyer:
        end = await buy(buyer, getattr(script, deed), checkpoint_steps=CHECKPOINT_STEPS)
        assert (end["kind"], end["error"]) == ("failed", "JobError")
        assert re.search("^the job failed: .*" + FAULTS[deed], end["message"])
        assert end["message"].endswith(FAULTS_HERE), "it was tried out in the buyer's sandbox"
        assert "The checkpoint after step 2 is here: job.resume(2)" in end["hint"]
        assert (await buy(buyer, script.HONEST))["kind"] == "result", "the provider lives on"
