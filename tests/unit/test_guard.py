"""What a task of the main nursery raises does not end the node."""

from __future__ import annotations

import logging

import pytest
import trio

from p2pflop.node.guard import RESTART_S, keep_going, survive


async def fail(text: str) -> None:
    await trio.lowlevel.checkpoint()
    raise ValueError(text)


async def test_a_failure_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(survive, fail, "unparsable")
    assert "fail failed" in caplog.text
    assert "unparsable" in caplog.text


async def test_cancellation_passes(autojump_clock: object) -> None:
    with trio.move_on_after(1) as scope:
        await survive(trio.sleep_forever)
    assert scope.cancelled_caught


async def test_what_must_go_on_is_started_again(autojump_clock: object) -> None:
    began_at: list[float] = []

    async def task() -> None:
        began_at.append(trio.current_time())
        await fail("again")

    with trio.move_on_after(2.5 * RESTART_S):
        await keep_going(task)
    assert [at - began_at[0] for at in began_at] == [0, RESTART_S, 2 * RESTART_S]
