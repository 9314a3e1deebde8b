"""Who is served when more ask than there are slots."""

from __future__ import annotations

import pytest

from p2pflop.dht import slots as slots_module
from p2pflop.dht.slots import GRACE_S, MIN_BYTES_PER_S, Slot, Slots


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "MAX_STREAMS", 6)
    monkeypatch.setattr(slots_module, "MAX_PUBLIC_STREAMS", 4)


def take(slots: Slots, peer: str, now_s: float = 0.0, *, private: bool = False) -> Slot:
    slot = slots.take(peer, private=private, now_s=now_s)
    assert slot is not None
    return slot


async def test_public_readers_leave_some_to_private_ones() -> None:
    slots = Slots()
    for number in range(4):
        take(slots, f"reader {number}")
    assert slots.take("another", private=False, now_s=1.0) is None
    for number in range(2):
        take(slots, f"lessee {number}", private=True)
    assert len(slots) == 6


async def test_a_private_reader_takes_the_slot_of_the_slowest_public_one() -> None:
    slots = Slots()
    public = [take(slots, f"reader {number}") for number in range(4)]
    for number, slot in enumerate(public):
        slot.sent_bytes = 10**9 * (number + 1)
    for number in range(3):
        take(slots, f"lessee {number}", 5.0, private=True)
    assert [slot.scope.cancel_called for slot in public] == [True, False, False, False]
    assert len(slots) == 6


async def test_a_peer_with_many_gives_way_to_one_with_few() -> None:
    slots = Slots()
    held = [take(slots, "hoarder") for _ in range(4)]
    held[2].sent_bytes = -1
    take(slots, "reader")
    assert [slot.scope.cancel_called for slot in held] == [False, False, True, False]
    take(slots, "reader")
    assert slots.take("reader", private=False, now_s=1.0) is None, "two each is fair"


async def test_private_readers_share_among_themselves() -> None:
    slots = Slots()
    held = [take(slots, "hoarder", private=True) for _ in range(6)]
    take(slots, "lessee", private=True)
    assert sum(slot.scope.cancel_called for slot in held) == 1
    assert slots.take("reader", private=False, now_s=0.0) is None


@pytest.mark.parametrize(("bytes_per_s", "stays"), [(MIN_BYTES_PER_S, True), (1, False)])
async def test_who_takes_nothing_loses_its_slot_after_a_while(
    bytes_per_s: int, stays: bool
) -> None:
    slots = Slots()
    held = [take(slots, f"reader {number}") for number in range(4)]
    assert slots.take("another", private=False, now_s=GRACE_S) is None
    for slot in held:
        slot.sent_bytes = int(bytes_per_s * (GRACE_S + 1))
    assert (slots.take("another", private=False, now_s=GRACE_S + 1) is None) == stays


async def test_a_slot_given_back_is_free() -> None:
    slots = Slots()
    held = [take(slots, f"reader {number}") for number in range(4)]
    slots.give_back(held[0])
    slots.give_back(held[0])
    take(slots, "another")
    assert not any(slot.scope.cancel_called for slot in held)
