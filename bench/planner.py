"""What a central planner would do who knows everything, and whether a place in the network pays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from p2pflop.node.memory_trading import PERIODS, MarketJob, MarketProvider
from p2pflop.units import FLOP_PER_PFLOP


def best_surplus_nusd(jobs: Sequence[MarketJob], providers: Sequence[MarketProvider]) -> float:
    """The most that any assignment of jobs to slots (provider and period) can gain."""
    pflop = np.array([job.flop for job in jobs]) / FLOP_PER_PFLOP
    values = np.array([job.value_nusd for job in jobs], dtype=float)
    costs = np.array([provider.cost_nusd for provider in providers], dtype=float)
    gains = np.maximum(0.0, values[:, None] - pflop[:, None] * costs[None, :])
    slots = np.zeros((len(jobs), PERIODS * len(providers)))
    for number, job in enumerate(jobs):
        for period in range(job.first, job.last + 1):
            slots[number, period * len(providers) : (period + 1) * len(providers)] = gains[number]
    rows, columns = linear_sum_assignment(slots, maximize=True)
    return float(slots[rows, columns].sum())


def place_p_value(providers: Sequence[MarketProvider], seed: int, rounds: int = 5_000) -> float:
    """Of a permutation test: how often chance ties fills to places as much as they are here."""
    fills = np.array([provider.fills for provider in providers], dtype=float)
    places = np.array([provider.place for provider in providers])
    fills -= fills.mean()
    places -= places.mean()
    chance = np.random.default_rng(seed)
    seen = abs(fills @ places)
    drawn = [abs(fills @ chance.permutation(places)) >= seen * (1 - 1e-12) for _ in range(rounds)]
    return float((1 + sum(drawn)) / (1 + rounds))
