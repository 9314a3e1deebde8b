"""A small market without a planner gains nearly what a planner would, and no place in it pays."""

from __future__ import annotations

import random

import pytest
from planner import best_surplus_nusd, place_p_value

from p2pflop.market.ranking import Deal, Need, total_nusd
from p2pflop.market.views import BookView
from p2pflop.node.memory_trading import (
    PERIODS,
    Choose,
    MarketProvider,
    Trading,
    TradingFloor,
    choose_best,
    make_jobs,
    make_providers,
)

SEED = 7
PROVIDERS, JOBS = 60, 300


def trade(
    seed: int = SEED, choose: Choose = choose_best
) -> tuple[list[MarketProvider], Trading, float]:
    chance = random.Random(seed)  # noqa: S311 - a simulation
    providers, jobs = make_providers(PROVIDERS, chance), make_jobs(JOBS, chance)
    traded = TradingFloor(providers, jobs, chance, choose).run()
    return providers, traded, traded.surplus_nusd / best_surplus_nusd(jobs, providers)


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_the_surplus_is_nearly_a_planners(seed: int) -> None:
    providers, traded, share = trade(seed)
    assert 0.95 <= share <= 1
    assert traded.filled == sum(provider.fills for provider in providers)
    assert all(provider.fills <= PERIODS for provider in providers)
    assert sum(traded.attempts) / traded.filled < 1.5


def test_a_place_in_the_network_does_not_pay() -> None:
    providers, _, _ = trade()
    assert place_p_value(providers, SEED) > 0.01


def test_the_test_of_places_would_notice_a_ranking_that_prefers_some() -> None:
    """Whatever it asks within the budget, the nearest provider gets the job."""

    def nearest(view: BookView, need: Need, now_ns: int) -> Deal | None:
        deals = []
        for sheet in view.sheets:
            for ask in sheet.sheet.asks:
                total = total_nusd(ask, need.flop, 0, 0)
                if total <= need.max_nusd:
                    deals.append((places[sheet.node], Deal(sheet, ask, total, need)))
        return min(deals, key=lambda each: each[0])[1] if deals else None

    chance = random.Random(SEED)  # noqa: S311 - a simulation
    places = {each.party.node.public_key: each.place for each in make_providers(PROVIDERS, chance)}
    providers, _, share = trade(choose=nearest)
    assert place_p_value(providers, SEED) < 0.01
    assert share < 0.95


def test_a_run_is_replayed_by_its_seed() -> None:
    assert trade()[1] == trade()[1]
