"""The window of a lease: when a receipt is wanted, when there is no room, which jobs have one."""

from __future__ import annotations

import trio

from p2pflop.market.samples import STEPS, WORK, ask, bid, deals, party
from p2pflop.node.window import COUNTERSIGN_WITHIN_S, Window, window_of


async def never() -> None:
    raise AssertionError("nobody gives up")


def test_half_of_it_wants_a_receipt_and_all_of_it_must_wait() -> None:
    window = Window(10, lambda step: step, never)
    assert not window.wants_receipt(5)
    assert window.wants_receipt(6)
    assert not window.is_full(10)
    assert window.is_full(11)
    window.note_signed(6)
    assert not window.wants_receipt(11)
    assert window.is_full(17)


async def test_who_waits_goes_on_with_news(autojump_clock: object) -> None:
    window = Window(10, lambda step: step, never)
    news = window.news
    async with trio.open_nursery() as nursery:
        nursery.start_soon(window.wait, news)
        await trio.sleep(COUNTERSIGN_WITHIN_S / 2)
        assert window.is_standing
        window.note_signed(3)
    assert not window.is_standing
    await window.wait(news)  # what came before the wait counts


async def test_without_news_the_lease_is_given_up(autojump_clock: object) -> None:
    given_up: list[float] = []
    scope = trio.CancelScope()

    async def give_up() -> None:
        given_up.append(trio.current_time())
        scope.cancel()

    window = Window(10, lambda step: step, give_up)
    began = trio.current_time()
    with scope:
        await window.wait(window.news)
        raise AssertionError("it goes on without a countersignature")
    assert given_up == [began + COUNTERSIGN_WITHIN_S]
    assert not window.is_standing


def test_only_a_lease_that_can_run_ahead_has_one() -> None:
    bought = bid(party(0), deals(party(1).sheet(ask()))[0]).record
    window = window_of(bought, WORK, bought.quote_nusd - 1, never)
    assert window is not None
    assert window.unsigned_nusd(bought.job.first_step) == 0
    assert window.unsigned_nusd(bought.job.first_step + STEPS) == bought.quote_nusd
    assert window_of(bought, WORK, bought.quote_nusd, never) is None
    assert window_of(bought, WORK, None, never) is None
