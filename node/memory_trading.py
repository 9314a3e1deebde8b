"""A market of made-up costs, values and deadlines, traded by the production book and ranking.

For tests and benches: how much of what could be gained is gained, when nobody plans for all. Time
goes in periods. A provider has one slot a period and a cost for each PFLOP; a job has a size, a
value to its buyer, and periods in which it may run. A buyer takes the deal that ``ranking`` gives,
and goes on to the next where the slot is taken: it sees the book as it was one fill ago.

A provider asks its cost for a PFLOP, and a **rent** for the slot as ``setup_nusd``: more where the
slot was taken early, less for as long as it stays free. That sends large jobs to cheap machines and
small ones to others, which a price for a PFLOP alone cannot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pflop.ids import content_hash
from p2pflop.market.book import Book
from p2pflop.market.ranking import Deal, Need, Policy, best, rank
from p2pflop.market.samples import CLASS_ID, NOW_NS, Party, ask, party
from p2pflop.market.views import BookView
from p2pflop.units import FLOP_PER_PFLOP, NS_PER_S, round_price

PERIODS: Final = 6
TICKS: Final = 10
TICK_NS: Final = 60 * NS_PER_S
NUSD: Final = 10**6
"""The median cost of a PFLOP."""
RENT_STEP: Final = NUSD // 50
RENT_RISE: Final = 5 * RENT_STEP

Choose = Callable[[BookView, Need, int], Deal | None]


@dataclass(frozen=True, slots=True)
class MarketJob:
    """``first`` and ``last`` are the periods in which it may run."""

    flop: int
    value_nusd: int
    first: int
    last: int


@dataclass(slots=True)
class MarketProvider:
    """``place`` is where in the network it is, from 0 to 1: its sheets arrive in that order."""

    party: Party
    cost_nusd: int
    place: float
    rent_nusd: int
    next_rent_nusd: int = 0
    is_free: bool = True
    number: int = 0
    fills: int = 0


@dataclass(slots=True)
class Trading:
    """What came of it. ``prices_nusd`` are paid totals for a PFLOP, setup included."""

    surplus_nusd: int = 0
    filled: int = 0
    attempts: list[int] = field(default_factory=list)
    waited_periods: list[int] = field(default_factory=list)
    prices_nusd: list[float] = field(default_factory=list)


def choose_best(view: BookView, need: Need, now_ns: int) -> Deal | None:
    """The production ranking."""
    return best(view, need, Policy(), now_ns)


def make_providers(count: int, chance: random.Random) -> list[MarketProvider]:
    """Costs are lognormal with two digits, so that many tie; rents begin at what is saved."""
    costs = [round(chance.lognormvariate(0, 0.5), 1) or 0.1 for _ in range(count)]
    level = sorted(costs)[count * 4 // 5]
    rents = [int(max(0.0, level - cost) * NUSD) // RENT_STEP * RENT_STEP for cost in costs]
    return [
        MarketProvider(party(number), round(cost * NUSD), chance.random(), rent)
        for number, (cost, rent) in enumerate(zip(costs, rents, strict=True))
    ]


def make_jobs(count: int, chance: random.Random) -> list[MarketJob]:
    """Sizes around a PFLOP; values around 2.7 times what that costs at the median."""
    jobs = []
    for _ in range(count):
        size = chance.lognormvariate(0, 0.5)
        first = chance.randrange(PERIODS)
        value = size * chance.lognormvariate(1, 0.6)
        last = min(PERIODS - 1, first + chance.randrange(3))
        jobs.append(MarketJob(int(size * FLOP_PER_PFLOP), int(value * NUSD), first, last))
    return jobs


def surplus_nusd(job: MarketJob, provider: MarketProvider) -> int:
    """What the world gains if that provider does that job."""
    return job.value_nusd - provider.cost_nusd * job.flop // FLOP_PER_PFLOP


class TradingFloor:
    """All of a market. ``choose`` is the ranking that buyers use."""

    def __init__(
        self,
        providers: Sequence[MarketProvider],
        jobs: Sequence[MarketJob],
        chance: random.Random,
        choose: Choose = choose_best,
    ) -> None:
        self._providers = sorted(providers, key=lambda provider: provider.place)
        self._by_node = {each.party.node.public_key: each for each in providers}
        self._jobs = jobs
        self._chance = chance
        self._choose = choose
        self._book = Book(bytes(32))
        self._now_ns = NOW_NS
        self._seen = self._book.view(NOW_NS)
        self._traded = Trading()

    def run(self) -> Trading:
        """Trade through all periods."""
        waiting = dict.fromkeys(range(len(self._jobs)))
        for period in range(PERIODS):
            for provider in self._providers:
                provider.is_free = True
            alive = [n for n in waiting if self._jobs[n].first <= period <= self._jobs[n].last]
            self._chance.shuffle(alive)
            for tick in range(TICKS):
                self._publish_all()
                for number in alive[tick::TICKS]:
                    if self._buy(number, period, tick):
                        del waiting[number]
                self._lower_rents()
                self._now_ns += TICK_NS
            for provider in self._providers:
                if not provider.is_free:
                    provider.rent_nusd = provider.next_rent_nusd
        return self._traded

    def _publish(self, provider: MarketProvider) -> None:
        offers = []
        if provider.is_free:
            until_ns = self._now_ns + 2 * TICK_NS
            setup_nusd = round_price(provider.rent_nusd)
            offers.append(
                ask(1, provider.cost_nusd, setup_nusd=setup_nusd, valid_until_ns=until_ns)
            )
        provider.number += 1
        sheet = provider.party.sheet(*offers, number=provider.number, now_ns=self._now_ns)
        self._book.apply(sheet, self._now_ns)

    def _publish_all(self) -> None:
        for provider in self._providers:
            if provider.is_free:
                self._publish(provider)
        self._seen = self._book.view(self._now_ns)

    def _buy(self, number: int, period: int, tick: int) -> bool:
        job = self._jobs[number]
        need = Need(
            class_ids=frozenset({CLASS_ID}),
            flop=job.flop,
            touched_bytes=0,
            moved_bytes=0,
            memory_bytes=0,
            deadline_ns=self._now_ns + (job.last - period + 1) * TICKS * TICK_NS,
            max_nusd=job.value_nusd,
            nonce=content_hash(b"nonce %d %d" % (number, period))[:16],
        )
        deal = self._choose(self._seen, need, self._now_ns)
        deals = [] if deal is None else [deal]
        attempt = 0
        while attempt < len(deals):
            provider = self._by_node[deals[attempt].node]
            attempt += 1
            if provider.is_free:
                self._fill(job, provider, deals[attempt - 1], tick)
                self._traded.attempts.append(attempt)
                self._traded.waited_periods.append(period - job.first)
                return True
            if attempt == 1:
                ranked = rank(self._seen.sheets, need, Policy(), self._now_ns)
                others = (each for each in ranked if isinstance(each, Deal))
                deals += [each for each in others if each.node != deals[0].node]
        return False

    def _fill(self, job: MarketJob, provider: MarketProvider, deal: Deal, tick: int) -> None:
        provider.is_free = False
        provider.fills += 1
        rise_nusd = RENT_RISE * (TICKS - tick) // TICKS // RENT_STEP * RENT_STEP
        provider.next_rent_nusd = provider.rent_nusd + rise_nusd
        self._seen = self._book.view(self._now_ns)
        self._publish(provider)
        self._traded.filled += 1
        self._traded.surplus_nusd += surplus_nusd(job, provider)
        self._traded.prices_nusd.append(deal.total_nusd * FLOP_PER_PFLOP / job.flop)

    def _lower_rents(self) -> None:
        for provider in self._providers:
            if provider.is_free:
                provider.rent_nusd = max(0, provider.rent_nusd - RENT_STEP)
