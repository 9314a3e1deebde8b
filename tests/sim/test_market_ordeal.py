"""A whole market while everything fails at once: many nodes, villains, power cuts, partitions.

What happens and what must hold in the end is in ``memory_world``. A failure names the seed that
replays it: ``World`` is all chance there is, and with a seed everything comes in the same order.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path

import pytest
import trio

from p2pflop.node.memory_world import ERRANDS, World, WorldSettings, unbroken_hashes

FIXED_SEED = 1
RANDOM_SEED = random.randrange(2**32)  # noqa: S311 - no secret
HOUR_S = 3600.0
SMALL = WorldSettings(providers=2, buyers=1, villains=("quitter",), storm_s=60.0)

Ordeal = Callable[..., Awaitable[World]]


@pytest.fixture
def ordeal(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Ordeal:
    """Runs the world of a seed to its end, without the check. For a test with autojump_clock."""

    async def run(
        seed: int, settings: WorldSettings, name: str = "world", world: type[World] = World
    ) -> World:
        print(f"replay with seed {seed} and {settings}")
        chance = random.Random(seed)  # noqa: S311 - a simulation
        monkeypatch.setattr(secrets, "token_bytes", chance.randbytes)
        monkeypatch.setattr(secrets, "token_hex", lambda count: chance.randbytes(count).hex())
        monkeypatch.setattr(secrets, "SystemRandom", lambda: chance)
        import_module("trio._core._run")._r.seed(seed)
        made = world(tmp_path / name, nursery, seed, settings)
        await made.run()
        print(made.story())
        return made

    return run


async def survive(ordeal: Ordeal, tmp_path: Path, nursery: trio.Nursery, seed: int) -> World:
    world = await ordeal(seed, WorldSettings())
    world.check(await unbroken_hashes(tmp_path / "fair", nursery))
    await world.close()
    return world


@pytest.mark.parametrize("seed", [FIXED_SEED, RANDOM_SEED], ids=["fixed", "random"])
async def test_every_run_ends_and_ledgers_agree_whatever_fails(
    ordeal: Ordeal, autojump_clock: object, tmp_path: Path, nursery: trio.Nursery, seed: int
) -> None:
    world = await survive(ordeal, tmp_path, nursery, seed)
    counts = world.storm.counts
    assert min(counts["went dark"], counts["partitions"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1100))
async def test_many_seeds(
    ordeal: Ordeal, autojump_clock: object, tmp_path: Path, nursery: trio.Nursery, seed: int
) -> None:
    await survive(ordeal, tmp_path, nursery, seed)


async def test_a_seed_replays_a_world(ordeal: Ordeal, autojump_clock: object) -> None:
    stories = []
    for number, seed in enumerate((5, 5, 6)):
        await trio.sleep(-trio.current_time() % HOUR_S)  # the tape goes by hours
        world = await ordeal(seed, SMALL, f"world-{number}")
        stories.append(world.story())
        await world.close()
    assert stories[0] == stories[1] != stories[2]


async def test_a_failure_names_its_seed(ordeal: Ordeal, autojump_clock: object) -> None:
    world = await ordeal(7, SMALL)
    [bought] = world.bought.values()
    assert "result" in {each.end["kind"] for each in bought}
    with pytest.raises(AssertionError, match=r"another hash.*replay with seed 7"):
        world.check(dict.fromkeys(ERRANDS, "another"))
    await world.close()
