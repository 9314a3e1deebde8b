"""Who waits for room at a provider, and whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import trio
import trio.testing

from p2pflop.node.memory_market import sample_file
from p2pflop.node.orders import Order, open_order
from p2pflop.node.service import SubmitOptions
from p2pflop.node.waiting_room import FULL_S, QUEUE_S, WaitingRoom

HERE, THERE = frozenset({bytes(32)}), frozenset({bytes([1] * 32)})


def order(steps: int = 10, max_nusd: int = 1000, classes: frozenset[bytes] = HERE) -> Order:
    opened = open_order(sample_file(steps), SubmitOptions(), classes, now_ns=0)
    return replace(opened, max_nusd=max_nusd)


@dataclass
class Waiter:
    wants_room_for: Order | None = None
    woken: int = 0

    async def try_again(self) -> None:
        self.woken += 1
        await trio.lowlevel.checkpoint()


async def test_who_has_waited_longest_is_woken_first_and_once(nursery: trio.Nursery) -> None:
    room, waiters = WaitingRoom(nursery), [Waiter() for _ in range(3)]
    room.room_freed()
    for number, waiter in enumerate(waiters):
        room.enter(str(number), waiter)
    room.leave("1")
    room.wake("1")
    woken = []
    for _ in range(3):
        room.room_freed()
        await trio.testing.wait_all_tasks_blocked()
        woken.append([waiter.woken for waiter in waiters])
    assert woken == [[1, 0, 0], [1, 0, 1], [1, 0, 1]]


async def test_who_says_that_it_has_no_room_is_full_for_a_while_or_until_a_run_ends_there(
    nursery: trio.Nursery, autojump_clock: object
) -> None:
    room = WaitingRoom(nursery)
    room.note_full(b"one")
    room.note_full(b"two")
    room.room_freed()
    assert room.full == {b"one", b"two"}
    room.room_freed(b"one")
    assert room.full == {b"two"}
    await trio.sleep(FULL_S)
    assert room.full == frozenset()


@pytest.mark.parametrize(
    ("wanted", "is_hopeless"),
    [
        (order(), True),
        (order(steps=11), True),
        (order(max_nusd=999), True),
        (order(steps=9), False),
        (order(max_nusd=1001), False),
        (order(classes=THERE), False),
        (order(classes=frozenset()), False),
    ],
)
async def test_who_wants_no_less_than_who_waits_has_no_hope(
    nursery: trio.Nursery, wanted: Order, is_hopeless: bool
) -> None:
    room, waiter = WaitingRoom(nursery), Waiter()
    assert not room.is_hopeless(wanted)
    room.enter("rests", waiter)
    assert not room.is_hopeless(wanted), "that one does not wait for a slot"
    waiter.wants_room_for = order()
    assert room.is_hopeless(wanted) == is_hopeless
    room.leave("rests")
    assert not room.is_hopeless(wanted)


async def test_newcomers_queue_behind_who_waits(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    room, first, turns = WaitingRoom(nursery), Waiter(order()), list[str]()

    async def come(name: str) -> None:
        await room.queue(name, order())
        turns.append(name)

    room.enter("first", first)
    for name in ("second", "third"):
        nursery.start_soon(come, name)
        await trio.testing.wait_all_tasks_blocked()
    assert not turns
    for _ in range(2):
        room.room_freed()
        await trio.testing.wait_all_tasks_blocked()
    assert (first.woken, turns) == (1, ["second"])
    began = trio.current_time()
    await trio.sleep(2 * QUEUE_S)
    assert turns == ["second", "third"], "after a while it asks for itself"
    assert trio.current_time() - began == 2 * QUEUE_S
    assert not room.is_hopeless(order()), "nobody waits any more"
