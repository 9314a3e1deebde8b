"""Offered jobs are looked at for a bounded share of a node's time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest
import trio
import trio.testing

from p2pflop.errors import ProtocolError
from p2pflop.job.file import CheckedJob, JobBody, decode_file, encode_body, open_job
from p2pflop.market.records import Bid, CostLine, Rejected
from p2pflop.market.samples import ask, bid, deals, party
from p2pflop.node import opening
from p2pflop.node.memory_market import sample_file
from p2pflop.node.opening import (
    MAX_PENALTIES,
    MAX_WAITING_BODIES,
    PENALTY_NS,
    SMALL_BODY_BYTES,
    Opener,
    open_known,
)
from p2pflop.node.orders import cost_lines

BODY: JobBody = decode_file(sample_file()).body
DATA = encode_body(BODY)
LARGE = bytes(SMALL_BODY_BYTES + 1)


def bid_for(body: JobBody, *costs: CostLine) -> Bid:
    opened = open_job(body)
    assert isinstance(opened, CheckedJob)
    (deal,) = deals(party(1).sheet(ask()))
    record = bid(party(0), deal, 0).record
    return msgspec.structs.replace(record, job=body.job, costs=costs or cost_lines(opened))


BID = bid_for(BODY)


class Clock:
    now_ns = 10**18


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opener(clock: Clock) -> Opener:
    return Opener(lambda: clock.now_ns)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Opening a body waits until the gate is set."""
    gate = threading.Event()

    def slow(_bid: Bid, data: bytes) -> Rejected:
        if len(data) > SMALL_BODY_BYTES:
            gate.wait(10)
        return Rejected("not what the bid said")

    monkeypatch.setattr(opening, "_open", slow)
    yield gate
    gate.set()


async def test_a_job_is_opened_if_it_is_the_bids(opener: Opener) -> None:
    opened = await opener.open(BID, DATA, "peer")
    assert not isinstance(opened, Rejected)
    assert opened[0] == BODY
    assert open_known(DATA)[0] == BODY


async def test_another_job_is_told_without_looking_at_it(opener: Opener) -> None:
    other = decode_file(sample_file(steps=21)).body
    found = await opener.open(BID, encode_body(other), "peer")
    assert isinstance(found, Rejected)
    assert "another job" in found.reason
    line = msgspec.structs.replace(BID.costs[0], graph=b"g" * 32)
    found = await opener.open(bid_for(BODY, line), DATA, "peer")
    assert isinstance(found, Rejected)
    assert "another job" in found.reason


async def test_bytes_that_are_no_job_are_the_peers_fault(opener: Opener) -> None:
    with pytest.raises(ProtocolError):
        await opener.open(BID, b"not a body", "peer")
    with pytest.raises(ProtocolError):
        await opener.open(BID, LARGE, "peer")
    with pytest.raises(ProtocolError):
        open_known(DATA[:-1])


async def test_one_body_a_peer_and_few_in_all(opener: Opener, gate: threading.Event) -> None:
    found: dict[str, object] = {}

    async def offer(peer: str) -> None:
        found[peer] = await opener.open(BID, LARGE, peer)

    async with trio.open_nursery() as nursery:
        for number in range(MAX_WAITING_BODIES):
            nursery.start_soon(offer, f"peer {number}")
        await trio.testing.wait_all_tasks_blocked()
        again = await opener.open(BID, LARGE, "peer 0")
        assert again == Rejected("busy: another job of yours is being looked at")
        late = await opener.open(BID, LARGE, "late")
        assert late == Rejected("busy: too many jobs wait to be looked at")
        small = await opener.open(BID, DATA[:SMALL_BODY_BYTES], "small")
        assert isinstance(small, Rejected), "small ones do not wait"
        gate.set()
    assert len(found) == MAX_WAITING_BODIES


async def test_who_wasted_a_look_is_not_listened_to_for_a_while(
    opener: Opener, clock: Clock, gate: threading.Event
) -> None:
    gate.set()
    assert await opener.open(BID, LARGE, "peer") == Rejected("not what the bid said")
    refused = await opener.open(BID, LARGE, "peer")
    assert isinstance(refused, Rejected)
    assert "come back later" in refused.reason
    assert await opener.open(BID, LARGE, "other") == Rejected("not what the bid said")
    clock.now_ns += PENALTY_NS
    assert await opener.open(BID, LARGE, "peer") == Rejected("not what the bid said")


def test_penalties_are_bounded(opener: Opener) -> None:
    for number in range(MAX_PENALTIES + 5):
        opener.penalise(str(number))
    assert len(opener._penalties) == MAX_PENALTIES
    assert "0" not in opener._penalties
