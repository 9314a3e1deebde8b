"""Whose streams are served when peers open more than there is room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from p2pflop.node import inbound as inbound_module
from p2pflop.node.inbound import Inbound, Place


@dataclass(eq=False)
class FakeStream:
    received_bytes: int = 0
    buffered_bytes: int = 0
    why: str = ""

    def reset(self, why: str) -> None:
        self.why = why


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MAX_INBOUND_STREAMS": 12,
        "RESERVED_STREAMS": 2,
        "MAX_INBOUND_STREAMS_PER_ADDRESS": 8,
        "MAX_INBOUND_STREAMS_PER_PEER": 4,
    }.items():
        monkeypatch.setattr(inbound_module, name, value)


def take(inbound: Inbound, peer: str, address: str = "here", *, speaks: bool = False) -> Any:
    stream: Any = FakeStream()
    place = inbound.take(peer, address, stream)
    if place is not None and speaks:
        place.agreed()
        stream.received_bytes = 1
    return place


def fill(inbound: Inbound, address: str, *peers: str, speaks: bool = False) -> list[Place]:
    return [take(inbound, peer, address, speaks=speaks) for peer in peers for _ in range(4)]


async def test_a_peer_has_a_bounded_number() -> None:
    inbound = Inbound()
    places = fill(inbound, "here", "a")
    assert take(inbound, "a") is None
    inbound.give_back(places[0])
    inbound.give_back(places[0])
    assert take(inbound, "a") is not None
    assert len(inbound) == 4


async def test_the_oldest_silent_stream_of_who_has_many_gives_way() -> None:
    inbound = Inbound()
    places = fill(inbound, "here", "a", "b")
    assert take(inbound, "c") is not None
    evicted = [place for place in places if place.scope.cancel_called]
    assert evicted == places[:1]
    assert evicted[0].stream.why  # type: ignore[attr-defined]
    assert len(inbound) == 8


async def test_who_has_said_something_stays() -> None:
    inbound = Inbound()
    places = fill(inbound, "here", "a", "b", speaks=True)
    assert take(inbound, "c") is not None, "its first stream has a reserve"
    assert take(inbound, "c") is None
    assert not any(place.scope.cancel_called for place in places)


async def test_one_address_leaves_room_to_others() -> None:
    inbound = Inbound()
    fill(inbound, "here", "a", "b", speaks=True)
    assert [bool(take(inbound, "c", "there", speaks=True)) for _ in range(3)] == [True, True, False]


async def test_the_reserve_ends_too() -> None:
    inbound = Inbound()
    fill(inbound, "here", "a", "b", speaks=True)
    taken = [take(inbound, f"peer {number}", "there", speaks=True) for number in range(6)]
    assert [place is not None for place in taken] == [True] * 4 + [False] * 2
    assert len(inbound) == 12


async def test_silent_until_something_comes_after_the_protocol() -> None:
    stream: Any = FakeStream()
    place = Inbound().take("a", "here", stream)
    assert place is not None
    stream.received_bytes = 30
    assert place.is_silent, "it still proposes"
    stream.received_bytes, stream.buffered_bytes = 40, 5
    place.agreed()
    assert not place.is_silent, "it has said five bytes with the proposal"
