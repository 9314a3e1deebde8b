"""A turn is alone, in order, and costs no round of the event loop when it is free."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pflop.dht.turns import Turn


async def test_a_free_turn_is_given_at_once() -> None:
    turn, others = Turn(), trio.Event()
    async with trio.open_nursery() as nursery:

        async def note() -> None:
            others.set()

        nursery.start_soon(note)
        for _ in range(10):
            async with turn:
                assert not others.is_set()
    assert others.is_set()


async def test_those_who_wait_come_in_order_and_alone() -> None:
    turn = Turn()
    story: list[str] = []

    async def work(name: str) -> None:
        async with turn:
            story.append(f"{name} begins")
            await trio.testing.wait_all_tasks_blocked()
            story.append(f"{name} ends")

    async with trio.open_nursery() as nursery:
        for name in ("first", "second", "third"):
            nursery.start_soon(work, name)
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert story == [
        f"{name} {what}" for name in ("first", "second", "third") for what in ("begins", "ends")
    ]


async def test_a_cancelled_task_does_not_take_its_turn() -> None:
    turn = Turn()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with turn:
            pytest.fail("it was cancelled")
    assert scope.cancelled_caught
    async with turn:
        pass


async def test_one_that_is_cancelled_while_it_waits_is_passed_over() -> None:
    turn, entered = Turn(), trio.Event()

    async def wait_in_vain(scope: trio.CancelScope) -> None:
        with scope:
            async with turn:
                pytest.fail("it was cancelled")

    async def wait() -> None:
        async with turn:
            entered.set()

    async with trio.open_nursery() as nursery, turn:
        scope = trio.CancelScope()
        nursery.start_soon(wait_in_vain, scope)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not entered.is_set()
    assert scope.cancelled_caught
    assert entered.is_set()


async def test_an_error_gives_the_turn_back() -> None:
    turn = Turn()
    with pytest.raises(ValueError, match="inside"):
        async with turn:
            raise ValueError("inside")
    async with turn:
        pass
