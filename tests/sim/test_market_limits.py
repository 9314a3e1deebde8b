"""Limits of what one node buys, refuses and remembers, each at its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from p2pflop.errors import ConfigError
from p2pflop.ids import content_hash
from p2pflop.node import buy, quoting, sell
from p2pflop.node.memory_market import sample_file

if TYPE_CHECKING:
    from tests.sim.conftest import Market


async def test_so_many_runs_are_under_way_and_the_next_waits_for_the_user(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buy, "MAX_RUNS_UNDER_WAY", 2)
    provider, buyer = await market.provider(slots=4), await market.buyer()
    provider.workers.step_s = 1.0
    runs = [await buyer.submit(sample_file(seed=seed)) for seed in range(2)]
    with pytest.raises(ConfigError, match="2 jobs are under way") as told:
        await buyer.submit(sample_file(seed=2))
    assert "cancel" in told.value.hint
    for run_id in runs:
        assert (await market.end_of(buyer, run_id))["kind"] == "result"
    again = await buyer.submit(sample_file(seed=2))
    assert (await market.end_of(buyer, again))["kind"] == "result"


async def test_of_refusals_the_latest_are_remembered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sell, "MAX_REFUSALS_REMEMBERED", 3)
    provider, buyer = await market.provider(level=1), await market.buyer()
    for seed in range(5):
        end = await market.end_of(buyer, await buyer.submit(sample_file(seed=seed)))
        assert end["error"] == "MarketError"
    assert len(provider.seller._refusals) == 3
    assert not provider.seller._sales


async def test_of_quotes_that_were_filled_the_latest_are_remembered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "MAX_FILLED", 3)
    provider = await market.provider()
    ids = [content_hash(b"quote %d" % number) for number in range(5)]
    for quote_id in ids:
        provider.seller.quoting.fill(quote_id)
    filled = [provider.seller.quoting.is_filled(quote_id) for quote_id in ids]
    assert filled == [False, False, True, True, True]
