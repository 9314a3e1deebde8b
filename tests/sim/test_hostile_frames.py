"""Every frame of a purchase dropped, doubled, cut short, bent or replaced, in both directions.

Whatever comes: the run ends in bounded time, nothing unexpected is raised, and no ledger differs in
the provider's favour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.errors import ProviderError, StoreError
from p2pflop.node import messages as m
from p2pflop.node.journal import PROVIDER, Batch, Head
from p2pflop.node.memory_market import PRICE_NUSD, sample_file

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LONGEST_S = 3600.0 + 60
"""The provider waits an hour for a countersignature; nobody waits longer."""

Change = Callable[[bytes], list[bytes]]


def record_in(frame: bytes) -> bytes:
    """The signed record that a frame carries, or none."""
    message = m.decode_message(frame, "peer")
    names = ("bid", "fill", "reject", "confirm", "receipt", "commit", "abandon")
    return next((getattr(message, name) for name in names if hasattr(message, name)), b"")


def replaced(make: Callable[[bytes], m.Message]) -> Change:
    """Another kind of message, around the same record where there is one."""
    return lambda frame: [m.encode_message(make(record_in(frame)))]


def dropped(_frame: bytes) -> list[bytes]:
    return []


def doubled(frame: bytes) -> list[bytes]:
    return [frame, frame]


def truncated(frame: bytes) -> list[bytes]:
    return [frame[:-1]]


def emptied(_frame: bytes) -> list[bytes]:
    return [b""]


def bent(frame: bytes) -> list[bytes]:
    """One bit in its middle."""
    place = len(frame) // 2
    return [frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :]]


def bent_at_the_end(frame: bytes) -> list[bytes]:
    return [frame[:-1] + bytes([frame[-1] ^ 0x10])]


def broken(_frame: bytes) -> list[bytes]:
    raise ProviderError("the network is gone")


def with_other_blobs(frame: bytes) -> list[bytes]:
    """Blobs that come along are not what their addresses say."""
    message = m.decode_message(frame, "peer")
    match message:
        case m.Confirmed(record, blobs):
            wrong = tuple((address, data + b"!") for address, data in blobs)
            return [m.encode_message(m.Confirmed(record, wrong))]
        case m.Checkpoint(step, interval, blobs):
            wrong = tuple((address, data + b"!") for address, data in blobs)
            return [m.encode_message(m.Checkpoint(step, interval, wrong))]
        case m.Delivered(record, result, salt, blobs):
            wrong = tuple((address, data + b"!") for address, data in blobs)
            return [m.encode_message(m.Delivered(record, result, salt, wrong))]
    return [frame]


CHANGES: dict[str, Change] = {
    "dropped": dropped,
    "doubled": doubled,
    "truncated": truncated,
    "emptied": emptied,
    "bent": bent,
    "bent at the end": bent_at_the_end,
    "broken": broken,
    "other blobs": with_other_blobs,
    "a heartbeat": replaced(lambda _record: m.Heartbeat()),
    "an offer": replaced(lambda record: m.Offer(record, b"")),
    "a fill": replaced(m.Filled),
    "a refusal": replaced(m.Refused),
    "a confirm": replaced(lambda record: m.Confirmed(record, ())),
    "a receipt": replaced(m.Receipted),
    "a commit": replaced(m.Committed),
    "a countersignature": replaced(m.Countersigned),
    "an abandon": replaced(m.Abandoned),
    "settled": replaced(lambda _record: m.Settled()),
    "rows of nothing": replaced(lambda _record: m.Rows(5, 3, ())),
    "a delivery": replaced(lambda record: m.Delivered(record, b"", bytes(32), ())),
    "a far checkpoint": replaced(lambda _record: m.Checkpoint(2**62, b"", ())),
}


class Nth:
    """Changes the frame of one number and lets the others pass."""

    def __init__(self, number: int, change: Change) -> None:
        self.seen: list[str] = []
        self._number = number
        self._change = change

    def __call__(self, frame: bytes) -> list[bytes]:
        self.seen.append(type(m.decode_message(frame, "peer")).__name__)
        return self._change(frame) if len(self.seen) == self._number else [frame]


async def buy(market: Market, way: str, nth: Nth) -> str:
    """One purchase with a changed frame; how it ended."""
    await market.provider()
    buyer = await market.buyer()
    setattr(buyer, way, nth)
    began_s = trio.current_time()
    run_id = await buyer.submit(sample_file(8), checkpoint_steps=4)
    end = await market.end_of(buyer, run_id)
    assert trio.current_time() - began_s <= LONGEST_S
    await market.settle_down()
    market.check()
    await market.close()
    if end["kind"] == "failed":
        assert end["error"] in ("ProviderError", "MarketError"), end
    return str(end["kind"])


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("way", ["tamper_sent", "tamper_heard"])
async def test_no_frame_does_harm(
    market: Market, autojump_clock: object, caplog: pytest.LogCaptureFixture, way: str, name: str
) -> None:
    whole = Nth(0, dropped)
    assert await buy(market.another(), way, whole) == "result"
    assert len(whole.seen) >= 4
    for number, kind in enumerate(whole.seen, 1):
        caplog.clear()
        try:
            await buy(market.another(), way, Nth(number, CHANGES[name]))
        except Exception as error:
            raise AssertionError(f"{kind} (frame {number}) {name}: {error!r}") from error
        raised = [record.getMessage() for record in caplog.records if record.exc_info]
        assert raised == [], f"{kind} (frame {number}) {name}"


async def test_a_stream_that_says_nothing_is_ended(
    market: Market, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    stream = await buyer.host.open(provider.peer, "/p2pflop/job/1")
    with pytest.raises(ProviderError), trio.fail_after(11):
        await stream.receive()
    assert not any(record.exc_info for record in caplog.records)


async def test_a_provider_that_withholds_a_checkpoint_does_not_keep_its_buyer_busy(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()

    def without(frame: bytes) -> list[bytes]:
        return [] if isinstance(m.decode_message(frame, "peer"), m.Checkpoint) else [frame]

    buyer.tamper_heard = without
    run_id = await buyer.submit(sample_file(8), checkpoint_steps=2)
    end = await market.end_of(buyer, run_id)
    reason = "the provider handed over nothing more of what it billed for 60 s"
    assert end["message"] == reason
    assert [lost["reason"] for lost in buyer.events(run_id, "resubmitted")] == [reason] * 5
    assert trio.current_time() < 6 * 62 + 60
    market.check()


async def test_a_node_that_buys_from_itself_outlives_a_full_disk(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await market.buyer("both", price_nusd=PRICE_NUSD)
    append = node.journal.append

    async def full(head: Head, batch: Batch, **along: Any) -> None:
        if head.side == PROVIDER:
            raise StoreError("the disk is full")
        await append(head, batch, **along)

    monkeypatch.setattr(node.journal, "append", full)
    end = await market.end_of(node, await node.submit(sample_file()))
    assert end["kind"] == "failed"
    assert not node.down.is_set()
