"""A sweep of ``pf.map`` while everything fails: its user, its node and its providers in one world.

The user's script is the real one, over the node's real API, in virtual time (``tests.lockstep``). A
failure names the seed that replays it.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import struct
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import trio

import p2pflop as pf
from p2pflop import client as client_module
from p2pflop import sweeps
from p2pflop.client import Client
from p2pflop.errors import NodeUnreachableError, StoreError
from p2pflop.job.file import JobFile
from p2pflop.job.spec import Job as JobRecord
from p2pflop.node.memory_world import SELLING_VILLAINS, QuickSession, World, WorldSettings
from p2pflop.outcomes import Outcome
from p2pflop.results import Result
from p2pflop.units import NUSD_PER_USD
from tests.lockstep import PORT, TOKEN, AppLine, Lockstep
from tests.sim.test_packs_memory import RATE, START, job_file

FIXED_SEED = 3
RANDOM_SEED = random.randrange(2**32)  # noqa: S311 - no secret
STEPS, CHECKPOINT_STEPS = 12, 4
RATES = [float(number) for number in (5, 9, 2, 7, 1, 8, 3, 6, 4, 10, 11, 12)]
BEST, GOOD = min(RATES), 3.0
MAX_USD = 0.01
STORMY = WorldSettings(buyers=1, villains=SELLING_VILLAINS, errands=0)
SMALL = WorldSettings(
    providers=2, buyers=1, villains=("quitter", "accuser"), errands=0, storm_s=60.0
)
FAIR = WorldSettings(
    providers=2, buyers=1, villains=(), errands=0, storm_s=1.0, gossip_loss=0, goes_dark=0
)
PAUSE_S = 20.0


class Adding(QuickSession):
    """Computes the job of ``job_file``: adds the rate to the state, and traces its square."""

    def step(self, number: int) -> None:
        [rate] = struct.unpack("<f", self.read(0))
        state = struct.unpack("<2f", self.read(1))
        self._slots[1][:] = struct.pack("<2f", *(value + rate for value in state))
        self._step = self._last[0] = number

    def scalars(self) -> list[tuple[int, int, bytes]]:
        [rate] = struct.unpack("<f", self.read(0))
        return [(0, 0, struct.pack("<f", rate * rate))]

    def read_output(self, phase: int, output: int) -> memoryview | None:
        return memoryview(self.scalars()[0][2] if output == 0 else bytes(self._slots[1]))


def adder() -> pf.Job:
    file = job_file()
    body = file.body
    longer = JobRecord(body.job.work, 0, STEPS)
    body = type(body)(longer, body.work, body.graphs)
    return pf.Job(JobFile(file.version, body, file.labels))


class Shopper:
    """The user, who comes back to the sweep whenever the node has been away."""

    def __init__(
        self,
        client: Client,
        sleep: Callable[[float], None],
        cancel_if: Callable[[Result], bool] | None = None,
    ) -> None:
        self._client = client
        self._sleep = sleep
        self._cancel_if = cancel_if
        self._id = ""
        self.returns = 0
        self.story = ""
        self.outcomes: list[Outcome] = []
        self.hashes: dict[int, str] = {}
        self.best: tuple[float, int] | None = None

    def shop(self) -> None:
        """In a puppet."""
        while not self._has_shopped():
            self.returns += 1
            self._sleep(PAUSE_S)

    def _has_shopped(self) -> bool:
        try:
            sweep = self._begin()
            self._id = sweep.id
            self.outcomes = sweep.outcomes()
            for outcome in self.outcomes:
                if outcome.state == "settled":
                    self._look_at(outcome)
            if self.hashes:
                outcome, result = sweep.best("square")
                self.best = float(result["square"][-1]), outcome.place
        except (NodeUnreachableError, StoreError):
            return False
        return True

    def _begin(self) -> sweeps.Sweep:
        if self._id:
            return pf.attach_sweep(self._id, cancel_if=self._cancel_if, client=self._client)
        for data in (START, RATE):
            self._client.put(data)
        return pf.map(
            adder(),
            [{"rate": rate} for rate in RATES],
            max_usd=MAX_USD,
            deadline="30m",
            under_way=3,
            checkpoint_steps=CHECKPOINT_STEPS,
            cancel_if=self._cancel_if,
            fresh=True,
            pack=False,
            client=self._client,
        )

    def _look_at(self, outcome: Outcome) -> None:
        result = outcome.result()
        result.verify()
        rate = RATES[outcome.place]
        assert list(result["square"]) == [rate * rate] * STEPS
        assert list(result.state["state"]) == [1 + STEPS * rate, 2 + STEPS * rate]
        self.hashes[outcome.place] = result.hash


Shopping = Callable[..., Awaitable[Shopper]]


@pytest.fixture
def shopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shopping:
    """Has a user shop in the world of a seed. For a test with ``autojump_clock``."""

    async def run(
        seed: int,
        settings: WorldSettings,
        hashes: Mapping[int, str] | None = None,
        cancel_if: Callable[[Result], bool] | None = None,
        name: str = "",
    ) -> Shopper:
        name = name or ("fair" if settings is FAIR else "stormy")
        print(f"replay with seed {seed} and {settings}")
        chance = random.Random(seed)  # noqa: S311 - a simulation
        monkeypatch.setattr(secrets, "token_bytes", chance.randbytes)
        monkeypatch.setattr(secrets, "token_hex", lambda count: chance.randbytes(count).hex())
        monkeypatch.setattr(secrets, "SystemRandom", lambda: chance)
        import_module("trio._core._run")._r.seed(seed)
        home = tmp_path / f"user of {name}"
        home.mkdir()
        note = {"url": f"http://127.0.0.1:{PORT}", "pid": os.getpid(), "embedded": False}
        (home / "node.json").write_text(json.dumps(note))
        (home / "token").write_text(TOKEN)
        async with trio.open_nursery() as nursery:
            lockstep = Lockstep(nursery)
            for module in (sweeps, client_module):
                monkeypatch.setattr(module, "time", lockstep)
            monkeypatch.setattr(sweeps, "threading", lockstep)
            world = World(tmp_path / name, nursery, seed, settings, Adding)
            shopper: Shopper

            async def visit() -> None:
                nonlocal shopper
                line = AppLine(lockstep, world.buyers[0])
                shopper = Shopper(Client(home, line=line), lockstep.sleep, cancel_if)
                await lockstep.run(shopper.shop)

            await world.run(visit)
            shopper.story = str(dict(world.storm.counts))
            check(world, shopper, hashes)
            await world.close()
            nursery.cancel_scope.cancel()
        return shopper

    return run


def check(world: World, shopper: Shopper, hashes: Mapping[int, str] | None) -> None:
    """What holds of a sweep whatever happened to it; ``hashes`` are of one to which nothing did."""
    world.check_money()
    buyer, outcomes = world.buyers[0], shopper.outcomes
    told = f"seed {world.seed}: {[(o.place, o.state, str(o.error)) for o in outcomes]}"
    assert [outcome.place for outcome in outcomes] == list(range(len(RATES))), told
    assert hashes is None or shopper.hashes.items() <= hashes.items(), told
    spent_nusd = sum(outcome.cost_nusd for outcome in outcomes)
    assert spent_nusd == world.owing_nusd(buyer) <= MAX_USD * NUSD_PER_USD, told
    for outcome in outcomes:
        assert outcome.state in ("settled", "cancelled", "failed", "not bought"), told
        if outcome.error is not None:
            assert type(outcome.error).__name__ in ("P2PFlopError", "MarketError", "ProviderError")
    if shopper.hashes:
        best = min((RATES[place], place) for place in shopper.hashes)
        assert shopper.best == (best[0] ** 2, best[1]), told


@pytest.mark.parametrize("seed", [FIXED_SEED, RANDOM_SEED], ids=["fixed", "random"])
async def test_a_sweep_comes_to_its_end_whatever_fails(
    shopping: Shopping, autojump_clock: object, seed: int
) -> None:
    fair = await shopping(0, FAIR)
    assert sorted(fair.hashes) == list(range(len(RATES)))
    assert fair.best == (BEST**2, RATES.index(BEST))
    shopper = await shopping(seed, STORMY, fair.hashes)
    assert len(shopper.hashes) > 8 or seed != FIXED_SEED


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1100))
async def test_many_seeds(shopping: Shopping, autojump_clock: object, seed: int) -> None:
    await shopping(seed, STORMY)


def is_good(result: Result) -> bool:
    return bool(result["square"][-1] <= GOOD**2)


@pytest.mark.parametrize("settings", [FAIR, SMALL], ids=["fair", "stormy"])
async def test_a_good_result_ends_the_rest(
    shopping: Shopping, autojump_clock: object, settings: WorldSettings
) -> None:
    shopper = await shopping(FIXED_SEED, settings, cancel_if=is_good)
    assert any(RATES[place] <= GOOD for place in shopper.hashes)
    assert "not bought" in {outcome.state for outcome in shopper.outcomes}


async def test_a_seed_replays_a_sweep(shopping: Shopping, autojump_clock: object) -> None:
    told = []
    for number, seed in enumerate((5, 5, 6)):
        await trio.sleep(-trio.current_time() % 3600)  # the tape goes by hours
        shopper = await shopping(seed, SMALL, name=f"world {number}")
        ends = [(o.state, o.cost_nusd, o.row and o.row.step) for o in shopper.outcomes]
        told.append((shopper.returns, shopper.story, ends))
    assert told[0] == told[1] != told[2]
