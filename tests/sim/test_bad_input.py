"""What goes wrong with a job's data and with disks: told as what it was, and nothing is lost."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest
import trio
from msgspec.structs import replace

import p2pflop as pf
from p2pflop.dht.manifest import address_of
from p2pflop.errors import JobError, StoreFullError
from p2pflop.job.buying import HOW_TO_CHECK, ONE_OPINION
from p2pflop.job.collection import numbered
from p2pflop.job.file import JobFile, decode_file, encode_file
from p2pflop.job.spec import ROLE_FEED, FeedSource, Work, WorkParam, work_id
from p2pflop.market.evidence import Evidence, replay
from p2pflop.node import messages as m
from p2pflop.node.buy import Buyer
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file, unchanged
from p2pflop.node.memory_workers import CountingSession, MemoryWorker
from p2pflop.node.service import Json
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LARGE = 70_000
"""Floats: its states do not go along with messages."""
STATE_BYTES = 4 * LARGE
STEPS, CHECKPOINT_STEPS = 8, 2
GOOD = re.compile(
    r"The checkpoint after step ([24]) is here: job\.resume\(\1\), "
    r"or p2pflop submit FILE --from-step \1, goes on from there\."
)


class FaultsOnce(CountingSession):
    """Fails after the first checkpoint of the first job that it runs."""

    faulted = False

    def step(self, number: int) -> None:
        if number == CHECKPOINT_STEPS and not FaultsOnce.faulted:
            FaultsOnce.faulted = True
            raise JobError("the job's code faulted (SIGSEGV)")
        super().step(number)


class Quick(CountingSession):
    """Counts in the first byte of a state alone: its states are large."""

    def step(self, number: int) -> None:
        self._slots[0][0] = number + 1
        self._step = number
        self._last = {0: number}


async def buy(market: Market, buyer: MemoryNode, file: bytes, every: int | None = 2) -> Json:
    return await market.end_of(buyer, await buyer.submit(file, checkpoint_steps=every))


async def works(market: Market, provider: MemoryNode, buyer: MemoryNode, floats: int = 4) -> bool:
    """Whether the next job of this buyer comes to its result, and the ledgers are equal then."""
    await provider.sell()
    buyer.meet(provider)
    end = await buy(market, buyer, sample_file(3, floats=floats, seed=99), 0)
    await market.settle_down()
    market.check()
    return bool(end["kind"] == "result")


async def test_after_a_fault_a_run_goes_on_from_its_last_checkpoint(
    market: Market, autojump_clock: object
) -> None:
    FaultsOnce.faulted = False
    provider = await market.provider(session=FaultsOnce)
    buyer = await market.buyer()
    buyer.workers.broken = True  # else it would see that the job does not fault
    file = sample_file(STEPS)
    end = await buy(market, buyer, file)
    assert end["error"] == "JobError"
    doubt = ONE_OPINION.format(provider.account.hex()[:12], HOW_TO_CHECK)
    assert end["message"] == "the job failed: the job's code faulted (SIGSEGV)" + doubt
    assert GOOD.search(end["hint"])
    rest = encode_file(pf.Job(decode_file(file)).resume(2).file)
    end = await buy(market, buyer, rest)
    assert (end["kind"], end["steps_done"]) == ("result", STEPS - 2)
    whole = await buy(market, buyer, sample_file(STEPS, seed=1))
    assert end["state"] == whole["state"]
    assert await works(market, provider, buyer)


class Blames(CountingSession):
    """Says that the job is at fault."""

    def step(self, number: int) -> None:
        raise JobError(f"the job's code faulted in step {number}")


async def test_two_nodes_of_one_account_cannot_blame_a_job(
    market: Market, autojump_clock: object
) -> None:
    for name in ("one", "two"):
        await market.provider(name, account="liar", session=Blames)
    honest = await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(STEPS))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    assert len(buyer.events(run_id, "resubmitted")) == 1, "its other node is not asked"
    assert all(look.is_right for look in replay(decode(Evidence, buyer.buyer.evidence(run_id))))


async def test_two_strangers_cannot_blame_a_job(market: Market, autojump_clock: object) -> None:
    for name in ("one", "two"):
        await market.provider(name, session=Blames)
    honest = await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(STEPS))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)


class BlamesLater(CountingSession):
    """Does its first job, and then says that each job is at fault."""

    done = False

    def step(self, number: int) -> None:
        if BlamesLater.done:
            raise JobError(f"the job's code faulted in step {number}")
        super().step(number)


async def test_a_job_fault_is_believed_of_two_accounts_of_which_one_is_known(
    market: Market, autojump_clock: object
) -> None:
    BlamesLater.done = False
    await market.provider("known", session=BlamesLater)
    for name in ("one", "two"):
        await market.provider(name, price_nusd=2 * PRICE_NUSD, session=Blames)
    buyer = await market.buyer()
    buyer.workers.broken = True
    assert (await buy(market, buyer, sample_file(STEPS, seed=1)))["kind"] == "result"
    BlamesLater.done = True
    run_id = await buyer.submit(sample_file(STEPS))
    end = await market.end_of(buyer, run_id)
    assert end["message"] == "the job failed: the job's code faulted in step 0"
    assert len(buyer.events(run_id, "filled")) == 2


def filled_up(node: MemoryNode) -> None:
    node.store.quota.quota_bytes = node.store.quota.used_bytes


def once_countersigned(act: Callable[[], None]) -> Callable[[bytes], list[bytes]]:
    """A tamper that changes nothing and acts when the first checkpoint has been verified."""

    def look(frame: bytes) -> list[bytes]:
        if isinstance(m.decode_message(frame, "peer"), m.Countersigned):
            act()
        return [frame]

    return look


@pytest.mark.parametrize("who", ["provider", "buyer"])
async def test_a_store_that_fills_up_while_checkpointing(
    market: Market, autojump_clock: object, who: str
) -> None:
    provider = await market.provider(session=Quick)
    buyer = await market.buyer(floats=LARGE)
    if who == "buyer":
        buyer.tamper_sent = once_countersigned(lambda: filled_up(buyer))
    else:
        # Its input and the first checkpoint fit.
        provider.store.quota.quota_bytes = 3 * STATE_BYTES + STATE_BYTES // 2
    end = await buy(market, buyer, sample_file(STEPS, floats=LARGE))
    assert end["kind"] == "failed"
    if who == "buyer":
        assert end["error"] == "StoreFullError"
        assert end["message"].startswith("what was delivered cannot be kept: ")
        assert "p2pflop rm HASH" in end["hint"]
    else:
        assert end["error"] == "ProviderError"
        assert end["message"] == "the provider gave the lease back: the provider's disk is full"
    assert GOOD.search(end["hint"])
    await market.settle_down()
    assert provider.seller.busy == 0, "the provider was told"
    buyer.store.quota.quota_bytes = provider.store.quota.quota_bytes = None
    buyer.tamper_sent = unchanged
    rest = pf.Job(decode_file(sample_file(STEPS, floats=LARGE))).resume(2)
    end = await buy(market, buyer, encode_file(rest.file))
    assert end["kind"] == "result", end
    assert await works(market, provider, buyer, LARGE)


class FullDatabase:
    """A journal and ledger whose disk is full for a while."""

    def __init__(self, database: Any) -> None:
        self.is_full = False
        self._write = database.write
        database.write = self.write

    async def write(self, operation: Callable[[sqlite3.Connection], Any]) -> Any:
        if self.is_full:
            raise StoreFullError("the disk of journal.db is full")
        return await self._write(operation)

    def fill(self) -> None:
        self.is_full = True


async def answer_slowly(_worker: MemoryWorker) -> None:
    """So slowly that one checkpoint is countersigned before the next one is made."""
    await trio.sleep(1)


@pytest.mark.parametrize("who", ["buyer", "provider"])
async def test_a_database_that_is_full_while_checkpointing(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(MemoryWorker, "_answer", answer_slowly)
    provider, buyer = await market.provider(), await market.buyer()
    node = provider if who == "provider" else buyer
    database = FullDatabase(node.journal._database)
    buyer.tamper_sent = once_countersigned(database.fill)
    end = await buy(market, buyer, sample_file(STEPS))
    assert end["kind"] == "failed"
    if who == "buyer":
        assert end["error"] == "StoreFullError"
        assert "the disk of journal.db is full" in end["message"]
    else:
        assert end["message"] == "the deadline passed while waiting"
        lost = buyer.events(buyer.runs.cards()[0]["id"], "resubmitted")[0]
        assert lost["reason"] == "the provider gave the lease back: the provider's disk is full"
    assert GOOD.search(end["hint"])
    database.is_full = False
    await trio.sleep(120)
    assert provider.seller.busy == 0
    await node.kill()
    await market.restart(node)
    assert await works(market, provider, buyer)


@pytest.mark.parametrize("floats", [4, LARGE], ids=["along with it", "fetched"])
async def test_a_checkpoint_that_does_not_verify(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch, floats: int
) -> None:
    monkeypatch.setattr(MemoryWorker, "_answer", answer_slowly)
    provider = await market.provider(session=Quick)
    buyer = await market.buyer(floats=floats)
    is_wrong: list[int] = []
    read_chunk = provider.store.read_chunk

    async def wrong_chunk(address: bytes, index: int) -> bytes:
        data = await read_chunk(address, index)
        return data[:-1] + b"!" if is_wrong else data

    def wrong_inline(frame: bytes) -> list[bytes]:
        message = m.decode_message(frame, "peer")
        if is_wrong and isinstance(message, m.Checkpoint):
            blobs = tuple((address, data[:-1] + b"!") for address, data in message.blobs)
            message = m.Checkpoint(message.step, message.interval, blobs)
        return [m.encode_message(message)]

    monkeypatch.setattr(provider.store, "read_chunk", wrong_chunk)
    buyer.tamper_heard = wrong_inline
    buyer.tamper_sent = once_countersigned(lambda: is_wrong.append(1))
    end = await buy(market, buyer, sample_file(STEPS, floats=floats))
    assert (end["kind"], end["error"]) == ("failed", "ProviderError")
    assert "does not verify" in end["message"]
    assert GOOD.search(end["hint"])
    is_wrong.clear()
    buyer.tamper_sent = buyer.tamper_heard = unchanged
    assert await works(market, provider, buyer, floats)


SHARD_BYTES = 4 * LARGE
SHARDS = [bytes([number]) * SHARD_BYTES for number in range(6)]


def fed_file(last_bytes: int = SHARD_BYTES) -> tuple[bytes, list[bytes]]:
    """The sample job with a feed in the place of its input, and the blobs of the feed.

    The list says of all shards that they have ``SHARD_BYTES``.
    """
    file = decode_file(sample_file(STEPS, floats=LARGE))
    shards = [*SHARDS[:-1], SHARDS[-1][:last_bytes]]
    addresses = [address_of(shard) for shard in shards]
    data = encode(numbered(range(len(shards)), addresses, SHARD_BYTES))
    work = decode(Work, file.body.work)
    params = list(work.params)
    source = FeedSource(address_of(data), len(shards), 1)
    params[1] = WorkParam(params[1].dtype, params[1].shape, ROLE_FEED, source)
    work = Work(work.version, work.phases, tuple(params), work.seed)
    job = replace(file.body.job, work=work_id(work))
    body = replace(file.body, job=job, work=encode(work))
    return encode_file(JobFile(file.version, body, file.labels)), [data, *shards]


async def test_a_shard_that_is_gone_while_the_job_runs(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(session=Quick), await market.buyer(floats=LARGE)
    file, blobs = fed_file()
    for blob in blobs:
        await buyer.store.put(blob)
    gone = address_of(SHARDS[5])
    run_id = await buyer.submit(file, checkpoint_steps=2)
    await buyer.store.delete(gone)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["error"]) == ("failed", "ProviderError")
    assert f"input {gone.hex()[:12]} of the job is not to be had" in end["message"]
    assert GOOD.search(end["hint"])
    await buyer.store.put(SHARDS[5])
    rest = encode_file(pf.Job(decode_file(file)).resume(4).file)
    end = await buy(market, buyer, rest)
    assert end["kind"] == "result", end
    assert await works(market, provider, buyer, LARGE)


async def test_a_shard_of_the_wrong_size(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryWorker, "_answer", answer_slowly)
    provider, buyer = await market.provider(session=Quick), await market.buyer(floats=LARGE)
    file, blobs = fed_file(SHARD_BYTES - 4)
    for blob in blobs:
        await buyer.store.put(blob)
    with pytest.raises(JobError, match="the input in slot 1 is not of the size"):
        await buyer.submit(file)
    monkeypatch.setattr(Buyer, "_check_inputs", AsyncMock())
    end = await buy(market, buyer, file)
    assert (end["kind"], end["error"]) == ("failed", "JobError")
    assert f"of slot 1 is of {SHARD_BYTES - 4} bytes, not of the {SHARD_BYTES}" in end["message"]
    assert GOOD.search(end["hint"])
    assert await works(market, provider, buyer, LARGE)
