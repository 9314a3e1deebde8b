"""Purchases between real buyers and sellers joined in memory: how they begin, run and end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest
import trio

from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError, ProviderError
from p2pflop.job.buying import MAX_STALLED
from p2pflop.job.events import State
from p2pflop.job.file import CheckedJob, decode_file, open_job
from p2pflop.market.fills import MAX_BID_AGE_NS
from p2pflop.node import labour, sell
from p2pflop.node import messages as m
from p2pflop.node.execute import MIN_DEAR_FLOP
from p2pflop.node.journal import PROVIDER
from p2pflop.node.letters import DELIVER_WITHIN_NS, JOB_PROTOCOL
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_data, sample_file, unchanged
from p2pflop.node.memory_workers import CountingSession
from p2pflop.node.worker_types import Worker, WorkerLimits
from p2pflop.units import NS_PER_S

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LARGE = 70_000
"""Floats: more bytes than go along with a message."""


class Faulty(CountingSession):
    """Fails in the third step as no worker should."""

    def step(self, number: int) -> None:
        if number == 2:
            raise RuntimeError("a bug, not a P2PFlopError")
        super().step(number)


class Tap:
    """A tamper that only notes the messages that pass, and may run out of them."""

    def __init__(self, until: type[m.Message] | None = None, *, breaks: bool = False) -> None:
        self.seen: list[m.Message] = []
        self.reached = trio.Event()
        self._until = until
        self._breaks = breaks

    def __call__(self, frame: bytes) -> list[bytes]:
        message = m.decode_message(frame, "peer")
        self.seen.append(message)
        if self._until is not None and isinstance(message, self._until):
            self.reached.set()
        if not self.reached.is_set():
            return [frame]
        if self._breaks:
            raise ProviderError("the network is gone")
        return []

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.seen]


def tapped(node: MemoryNode) -> tuple[Tap, Tap]:
    node.tamper_sent, node.tamper_heard = sent, heard = Tap(), Tap()
    return sent, heard


def sales(provider: MemoryNode) -> list[str]:
    return [head.end_state for head in provider.journal.heads(PROVIDER)]


async def test_a_job_is_run_and_both_ledgers_say_what_it_cost(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    sent, heard = tapped(buyer)
    run_id = await buyer.submit(sample_file(120))
    end = await market.end_of(buyer, run_id)
    await market.settle_down()

    assert end["kind"] == "result"
    [filled] = buyer.events(run_id, "filled")
    assert end["cost_nusd"] == filled["quote_nusd"] > 0
    assert market.debts(buyer, provider) == (end["cost_nusd"], end["cost_nusd"])
    assert await buyer.store.get(bytes.fromhex(end["state"]["weights"]["address"])) == bytes(
        [120] * 16
    )
    rows = [row["step"] for event in buyer.events(run_id, "rows") for row in event["rows"]]
    assert rows == list(range(120))
    receipts = buyer.events(run_id, "receipt")
    assert [receipt["to_step"] for receipt in receipts] == [30, 60, 90, 120]
    assert sum(isinstance(message, m.Countersigned) for message in sent.seen) == 4
    assert heard.kinds()[-1] == "Settled"
    assert sales(provider) == ["settled"]
    market.check()


async def test_a_countersignature_is_brought_until_it_is_acknowledged(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    buyer.tamper_sent = Tap(m.Countersigned, breaks=True)
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    await provider.kill()
    await trio.sleep(3600)
    [letter] = buyer.journal.letters()
    assert (letter.job, letter.peer) == (run_id, provider.peer)
    await buyer.kill()
    buyer.tamper_sent = unchanged
    await trio.sleep(DELIVER_WITHIN_NS / NS_PER_S)
    await market.restart(provider)
    await market.restart(buyer)  # tries once more, however late it is
    await trio.sleep(5)
    assert buyer.journal.letters() == []
    assert sum(market.debts(buyer, provider)) > 0
    market.check()


async def test_a_letter_that_nobody_takes_is_kept_until_its_provider_connects(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    buyer.tamper_sent = Tap(m.Countersigned, breaks=True)
    await market.end_of(buyer, await buyer.submit(sample_file()))
    await provider.kill()
    await trio.sleep(DELIVER_WITHIN_NS / NS_PER_S - 3600)
    await trio.sleep(2 * 3600)
    assert buyer.journal.letters()
    await market.restart(provider)
    await trio.sleep(3600)
    assert buyer.journal.letters()  # nobody has told this node that the provider is back
    stream = await provider.host.open(buyer.peer, JOB_PROTOCOL)
    await trio.sleep(5)
    assert buyer.journal.letters() == []
    await stream.aclose()
    market.check()


async def test_of_sales_that_are_over_memory_keeps_the_latest(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sell, "MAX_REMEMBERED", 2)
    provider, buyer = await market.provider(), await market.buyer()
    for _ in range(4):
        await market.end_of(buyer, await buyer.submit(sample_file(1), fresh=True))
    await market.settle_down()
    assert sales(provider) == ["settled"] * 4
    assert len(provider.seller._sales) == len(provider.seller._by_fill) == 2
    market.check()


async def test_small_inputs_come_with_the_confirm_and_nothing_is_fetched(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    sent, _ = tapped(buyer)
    run_id = await buyer.submit(sample_file())
    await market.end_of(buyer, run_id)
    [confirmed] = [message for message in sent.seen if isinstance(message, m.Confirmed)]
    assert dict(confirmed.blobs) == {address_of(data): data for data in sample_data()}
    assert buyer.events(run_id, "fetching") == []
    assert await provider.store.list() == ()


async def test_large_inputs_are_fetched_and_swept_when_the_lease_is_over(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=LARGE)
    sent, heard = tapped(buyer)
    run_id = await buyer.submit(sample_file(2, floats=LARGE))
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result"
    [confirmed] = [message for message in sent.seen if isinstance(message, m.Confirmed)]
    assert confirmed.blobs == ()
    size_bytes = sum(len(data) for data in sample_data(LARGE))
    fetching = [message for message in heard.seen if isinstance(message, m.Fetching)]
    assert fetching[-1] == m.Fetching(size_bytes, size_bytes)
    kept = {info.address: info.owner for info in await provider.store.list()}
    assert set(kept) >= {address_of(data) for data in sample_data(LARGE)}
    assert set(kept.values()) == {buyer.account}
    await trio.sleep(2 * 3600)
    assert await provider.store.list() == ()
    market.check()


async def test_a_refusal_leads_to_the_next_ask_and_leaves_nothing_behind(
    market: Market, autojump_clock: object
) -> None:
    cheap = await market.provider("cheap", level=1)
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file())
    end = await market.end_of(buyer, run_id)
    [rejected] = buyer.events(run_id, "rejected")
    assert (rejected["provider"], end["provider"]) == (cheap.peer, dear.peer)
    assert rejected["reason"] == "the sandbox here is not safe enough"
    assert sales(cheap) == []
    assert cheap.writes == 0
    assert not cheap.seller._sales


async def test_nobody_left_to_ask_is_an_error_of_the_market(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(level=1)
    buyer = await market.buyer()
    end = await market.end_of(buyer, await buyer.submit(sample_file()))
    assert (end["kind"], end["error"]) == ("failed", "MarketError")
    assert "the sandbox here is not safe enough" in end["message"]
    assert market.debts(buyer, provider) == (0, 0)


async def say(buyer: MemoryNode, provider: MemoryNode, message: m.Message) -> m.Message:
    """Say one thing on a stream of its own; the first answer."""
    stream = await buyer.host.open(provider.peer, JOB_PROTOCOL)
    await stream.send(m.encode_message(message))
    try:
        return m.decode_message(await stream.receive(), provider.peer)
    finally:
        await stream.aclose()


async def offer_of(market: Market, provider: MemoryNode, buyer: MemoryNode) -> m.Offer:
    """A good offer that its provider has not seen."""
    buyer.tamper_sent = tap = Tap(m.Offer)
    await buyer.submit(sample_file())
    await tap.reached.wait()
    [offer] = tap.seen
    assert isinstance(offer, m.Offer)
    assert not provider.seller._sales
    return offer


async def test_one_bid_over_two_streams_gets_one_fill(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    offer = await offer_of(market, provider, buyer)
    first = await say(buyer, provider, offer)
    again = await say(buyer, provider, offer)
    assert isinstance(first, m.Filled)
    assert again == first
    assert provider.seller.busy == 1
    await market.settle_down()
    assert sales(provider) == ["released"], "it was never confirmed"


async def test_one_bid_gets_the_same_refusal_byte_for_byte(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(slots=1), await market.buyer()
    offer = await offer_of(market, provider, buyer)
    provider.workers.broken = True
    refused = await say(buyer, provider, offer)
    provider.workers.broken = False
    await trio.sleep(1)
    assert isinstance(refused, m.Refused)
    assert await say(buyer, provider, offer) == refused
    assert provider.journal.heads(PROVIDER) == []


async def test_an_old_bid_is_refused(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    offer = await offer_of(market, provider, buyer)
    await trio.sleep(MAX_BID_AGE_NS / NS_PER_S + 1)
    assert isinstance(await say(buyer, provider, offer), m.Refused)


async def test_two_takers_of_one_slot_get_one_fill(market: Market, autojump_clock: object) -> None:
    provider = await market.provider(slots=1)
    buyers = [await market.buyer(f"buyer-{number}") for number in range(2)]
    runs = [await buyer.submit(sample_file(2000)) for buyer in buyers]
    ends = [await market.end_of(buyer, run) for buyer, run in zip(buyers, runs, strict=True)]
    assert [end["kind"] for end in ends] == ["result", "result"], "one waits for its turn"
    told = [buyer.events(run, "rejected") for buyer, run in zip(buyers, runs, strict=True)]
    assert sorted(bool(refusals) for refusals in told) == [False, True]
    assert {r["reason"] for refusals in told for r in refusals} == {"busy: every slot is taken"}
    await market.settle_down()
    assert sales(provider) == ["settled", "settled"]
    market.check()


HEARD = [m.Filled, m.Heartbeat, m.Rows, m.Checkpoint, m.Receipted, m.Committed, m.Delivered]


@pytest.mark.parametrize("last", [*HEARD, m.Settled], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("breaks", [False, True], ids=["silent", "lost"])
async def test_a_run_outlives_a_provider_that_is_gone_whatever_it_said_last(
    market: Market, autojump_clock: object, last: type[m.Message], breaks: bool
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    buyer.tamper_heard = tap = Tap(last, breaks=breaks)
    run_id = await buyer.submit(sample_file(8), checkpoint_steps=4)
    await tap.reached.wait()
    await trio.sleep(60)
    buyer.tamper_heard = unchanged
    began_s = trio.current_time()
    end = await market.end_of(buyer, run_id)
    assert trio.current_time() - began_s <= 60
    await market.settle_down()
    if last is m.Filled:
        assert (end["kind"], end["error"]) == ("failed", "MarketError"), "nobody has taken it"
    else:
        assert end["kind"] == "result"
        assert market.debts(buyer, provider)[0] == end["cost_nusd"]
    market.check()
    assert provider.seller.busy == 0


@pytest.mark.parametrize("last", [m.Filled, m.Heartbeat, m.Rows, m.Receipted, m.Committed])
async def test_a_broken_stream_costs_nothing_but_time(
    market: Market, autojump_clock: object, last: type[m.Message]
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    tap = Tap(last, breaks=True)

    def once(frame: bytes) -> list[bytes]:
        return [frame] if tap.reached.is_set() else tap(frame)

    buyer.tamper_heard = once
    run_id = await buyer.submit(sample_file(8), checkpoint_steps=4)
    end = await market.end_of(buyer, run_id)
    assert tap.reached.is_set()
    await market.settle_down()
    if last is m.Filled:
        assert end["error"] == "MarketError", "an unconfirmed fill lapses: the next ask is tried"
    else:
        assert end["kind"] == "result"
        assert sales(provider) == ["settled"]
    market.check()


@pytest.mark.parametrize("last", [None, *HEARD])
async def test_a_cancelled_run_ends_at_once_and_frees_the_provider(
    market: Market, autojump_clock: object, last: type[m.Message] | None
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    run_id = ""

    def cancel(frame: bytes) -> list[bytes]:
        if last is not None and isinstance(m.decode_message(frame, "peer"), last):
            buyer.runs.get(run_id).cancel_requested.set()
        return [frame]

    buyer.tamper_heard = cancel
    run_id = await buyer.submit(sample_file(8), checkpoint_steps=4)
    if last is None:
        buyer.runs.get(run_id).cancel_requested.set()
    began_s = trio.current_time()
    end = await market.end_of(buyer, run_id)
    assert end["kind"] in ("cancelled", "result")
    if last is not m.Delivered:
        assert end["kind"] == "cancelled"
    await trio.sleep(5)
    assert provider.seller.busy == 0
    await market.settle_down()
    market.check()
    assert trio.current_time() - began_s < 2 * 3600


async def test_a_buyer_that_never_countersigns_uses_up_the_credit(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(credit_nusd=100, slots=4)
    buyer = await market.buyer()

    def unsigned(frame: bytes) -> list[bytes]:
        return [] if isinstance(m.decode_message(frame, "peer"), m.Countersigned) else [frame]

    buyer.tamper_sent = unsigned
    run_id = await buyer.submit(sample_file(10))
    await market.end_of(buyer, run_id)
    [filled] = buyer.events(run_id, "filled")
    assert 50 < filled["quote_nusd"] <= 100
    await buyer.kill()  # nor does it send letters
    await trio.sleep(3601)
    assert sales(provider) == ["failed"]
    await provider.sell()
    another = await market.buyer("another")
    end = await market.end_of(another, await another.submit(sample_file(10)))
    assert "over the credit of $" in end["message"]
    await trio.sleep(24 * 3600)
    await provider.sell()
    another.meet(provider)
    end = await market.end_of(another, await another.submit(sample_file(10)))
    assert end["kind"] == "result"


async def test_checkpoints_shown_before_a_short_deadline_count_as_unpaid(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()

    def unsigned(frame: bytes) -> list[bytes]:
        return [] if isinstance(m.decode_message(frame, "peer"), m.Countersigned) else [frame]

    buyer.tamper_sent = unsigned
    buyer.tamper_heard = tap = Tap(m.Receipted)
    await buyer.submit(sample_file(10_000), checkpoint_steps=10, deadline_s=1)
    await tap.reached.wait()
    provider.workers.failure = ProviderError("the machine broke")
    await market.settle_down()
    noted = list(provider.seller.allocator._unpaid)
    assert sum(unpaid.amount_nusd for unpaid in noted) > 0
    await provider.kill()
    await market.restart(provider)
    assert list(provider.seller.allocator._unpaid) == noted, "a restart forgets no debt"


async def test_a_bug_in_one_sale_ends_that_sale_only(
    market: Market, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    provider = await market.provider(session=Faulty)
    buyer = await market.buyer()
    end = await market.end_of(buyer, await buyer.submit(sample_file()))
    assert (end["kind"], end["error"]) == ("failed", "ProviderError")
    assert "the node failed" in end["message"]
    assert sales(provider) == ["failed"] * (1 + MAX_STALLED)
    for logged in [record for record in caplog.records if record.exc_info]:
        assert "a bug, not a P2PFlopError" in logged.getMessage()
    await trio.sleep(1)
    end = await market.end_of(buyer, await buyer.submit(sample_file(2)))
    assert end["kind"] == "result", "the seller lives"


async def test_a_lease_that_costs_far_more_than_metered_is_given_back_unpaid(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    steps = 20
    provider.workers.lowered_flop = MIN_DEAR_FLOP // steps
    end = await market.end_of(buyer, await buyer.submit(sample_file(steps)))
    assert end["kind"] == "result", "little is done all the same"
    provider.workers.lowered_flop += 1
    end = await market.end_of(buyer, await buyer.submit(sample_file(steps, seed=1)))
    assert end["error"] == "ProviderError"
    assert "cost: it computes over four times" in end["message"]
    assert sorted(sales(provider)) == ["released"] * (1 + MAX_STALLED) + ["settled"]
    market.check()


async def test_warm_workers_never_cross_accounts(market: Market, autojump_clock: object) -> None:
    provider = await market.provider()
    leased: list[tuple[bytes, object]] = []
    lease = provider.seller.warm.lease

    @asynccontextmanager
    async def noting(account: bytes, limits: WorkerLimits) -> AsyncIterator[Worker]:
        async with lease(account, limits) as worker:
            leased.append((account, worker))
            yield worker

    provider.seller.warm.lease = noting  # type: ignore[method-assign]
    buyers = [await market.buyer("one"), await market.buyer("two")]
    for buyer in (*buyers, *buyers, buyers[1]):
        end = await market.end_of(buyer, await buyer.submit(sample_file(), fresh=True))
        assert end["kind"] == "result"
    users: dict[int, set[bytes]] = {}
    for account, worker in leased:
        users.setdefault(id(worker), set()).add(account)
    assert len(leased) == 5
    assert all(len(accounts) == 1 for accounts in users.values())
    assert len(users) < len(leased), "one lingered"


class Noting(CountingSession):
    """Notes the steps that it runs."""

    steps: ClassVar[list[int]] = []

    def step(self, number: int) -> None:
        self.steps.append(number)
        super().step(number)


def largest_cost(file: bytes) -> int:
    checked = open_job(decode_file(file).body)
    assert isinstance(checked, CheckedJob)
    return max(checked.cost.flop, checked.cost.touched_bytes)


@pytest.mark.parametrize("limit", ["LIGHT_FLOP", "LIGHT_STEPS"])
@pytest.mark.parametrize("is_light", [True, False])
async def test_only_next_to_nothing_is_computed_before_the_confirm(
    market: Market,
    autojump_clock: object,
    monkeypatch: pytest.MonkeyPatch,
    is_light: bool,
    limit: str,
) -> None:
    provider, buyer = await market.provider(session=Noting), await market.buyer()
    job = sample_file(4, born=True)
    needed = {"LIGHT_FLOP": largest_cost(job), "LIGHT_STEPS": 4}[limit]
    monkeypatch.setattr(labour, limit, needed - (not is_light))
    first = await market.end_of(buyer, await buyer.submit(job))
    again = await market.end_of(buyer, await buyer.submit(job, fresh=True))
    assert again["hash"] == first["hash"]
    assert again["cost_nusd"] == first["cost_nusd"]
    await trio.sleep(1)
    owed = market.debts(buyer, provider)

    Noting.steps.clear()
    _, heard = tapped(buyer)
    buyer.tamper_sent = lambda frame: (
        [] if isinstance(m.decode_message(frame, "peer"), m.Confirmed) else [frame]
    )
    end = await market.end_of(buyer, await buyer.submit(job, fresh=True))
    assert end["kind"] == "failed"
    assert set(heard.kinds()) <= {"Filled", "Heartbeat", "Abandoned", "Refused"}, "nothing leaves"
    assert set(Noting.steps) == ({0, 1, 2, 3} if is_light else set())
    await market.settle_down()
    assert market.debts(buyer, provider) == owed
    assert provider.seller.allocator.lapses
    assert provider.seller.busy == 0
    buyer.tamper_sent = unchanged
    assert (await market.end_of(buyer, await buyer.submit(job, fresh=True)))["kind"] == "result"
    await market.settle_down()
    assert not provider.seller.allocator.lapses, "a job that settles forgives them"
    market.check()


async def test_what_is_withdrawn_at_shutdown_is_told(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    buyer.tamper_heard = tap = Tap()
    run_id = await buyer.submit(sample_file(100_000))
    while "Rows" not in tap.kinds():
        await trio.lowlevel.checkpoint()
    await provider.seller.stop()
    again = await market.end_of(buyer, await buyer.submit(sample_file()))
    assert "shutting down" in again["message"]
    [lost] = buyer.events(run_id, "resubmitted")
    assert "shutting down" in lost["reason"]
    assert buyer.runs.get(run_id).card["state"] == "waiting"


async def test_inputs_that_are_not_here_are_an_error_at_once(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.node("buyer")
    with pytest.raises(Exception, match="is not in this node's store"):
        await buyer.submit(sample_file())
    with pytest.raises(ConfigError):
        buyer.runs.get("0" * 12)


async def test_the_provider_that_restarts_serves_a_blob_that_is_hours_old(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=LARGE)
    buyer.tamper_heard = tap = Tap(m.Delivered)
    run_id = await buyer.submit(sample_file(1, floats=LARGE))
    await tap.reached.wait()
    await buyer.kill()
    await provider.kill()
    await trio.sleep(3 * 3600)
    buyer.tamper_heard = Tap()
    await market.restart(provider)
    await market.restart(buyer)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result"
    await market.settle_down()
    market.check()


async def test_the_inputs_of_a_sale_that_a_restart_ends_are_let_go(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=LARGE)
    buyer.tamper_heard = tap = Tap(m.Rows)
    await buyer.submit(sample_file(100, floats=LARGE))
    await tap.reached.wait()
    await provider.kill()
    await market.restart(provider)
    await trio.sleep(1)
    assert sales(provider) == [State.RELEASED]
    assert len(await provider.store.list()) > 0
    await trio.sleep(3 * 3600)
    assert await provider.store.list() == ()
