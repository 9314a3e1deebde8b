"""Strangers' blobs stay while a lease needs them and an hour longer; everything else is let be."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import trio

from p2pflop.dht.memory import MemoryStore
from p2pflop.errors import StoreError
from p2pflop.node.lease_blobs import GRACE_NS, SWEEP_S, LeaseBlobs
from p2pflop.units import NS_PER_S

STRANGER, OTHER = b"s" * 32, b"o" * 32
LEASE, NEXT_LEASE = b"lease", b"next lease"


@dataclass
class World:
    """A store, who holds what, and the time."""

    now_ns: int = 10**18
    store: MemoryStore = field(init=False)
    blobs: LeaseBlobs = field(init=False)

    def __post_init__(self) -> None:
        self.store = MemoryStore(clock_ns=lambda: self.now_ns)
        self.restart()

    def restart(self) -> None:
        self.blobs = LeaseBlobs(self.store, lambda: self.now_ns)

    async def put(self, data: bytes, owner: bytes = STRANGER, *, public: bool = False) -> bytes:
        return (await self.store.put(data, owner=owner, public=public)).address

    async def has(self, address: bytes) -> bool:
        return await self.store.stat(address) is not None


@pytest.fixture
def world() -> World:
    return World()


async def test_a_held_blob_stays_however_long_the_lease_lasts(world: World) -> None:
    address = await world.put(b"input")
    await world.blobs.hold(LEASE, [address])
    world.now_ns += 100 * GRACE_NS
    assert await world.blobs.sweep() == 0
    assert await world.has(address)


async def test_it_stays_an_hour_longer_than_the_lease(world: World) -> None:
    address = await world.put(b"input")
    await world.blobs.hold(LEASE, [address])
    world.now_ns += GRACE_NS
    world.blobs.let_go(LEASE)
    world.now_ns += GRACE_NS - 1
    assert await world.blobs.sweep() == 0
    world.now_ns += 1
    assert await world.blobs.sweep() == 1
    assert not await world.has(address)


async def test_letting_go_twice_does_not_begin_the_hour_again(world: World) -> None:
    address = await world.put(b"input")
    await world.blobs.hold(LEASE, [address])
    world.blobs.let_go(LEASE)
    world.now_ns += GRACE_NS
    world.blobs.let_go(LEASE)
    assert await world.blobs.sweep() == 1
    assert not await world.has(address)


async def test_a_lease_that_holds_again_is_not_over(world: World) -> None:
    address = await world.put(b"input")
    await world.blobs.hold(LEASE, [address])
    world.blobs.let_go(LEASE)
    await world.blobs.hold(LEASE, [])
    world.now_ns += 2 * GRACE_NS
    assert await world.blobs.sweep() == 0


async def test_only_strangers_private_blobs_that_nobody_holds_are_deleted(world: World) -> None:
    own = await world.put(b"own", b"")
    public = await world.put(b"public", public=True)
    held = await world.put(b"held", OTHER)
    gone = await world.put(b"gone")
    await world.blobs.hold(LEASE, [held])
    world.now_ns += GRACE_NS
    assert await world.blobs.sweep() == 1
    assert [await world.has(a) for a in (own, public, held, gone)] == [True, True, True, False]


async def test_a_blob_of_two_leases_stays_for_the_longer_one(world: World) -> None:
    address = await world.put(b"shared")
    await world.blobs.hold(LEASE, [address])
    await world.blobs.hold(NEXT_LEASE, [address])
    world.blobs.let_go(LEASE)
    world.now_ns += 2 * GRACE_NS
    assert await world.blobs.sweep() == 0
    world.blobs.let_go(NEXT_LEASE)
    world.now_ns += GRACE_NS
    assert await world.blobs.sweep() == 1


async def test_what_the_nodes_own_user_puts_is_rescued(world: World) -> None:
    address = await world.put(b"wanted by both")
    await world.put(b"wanted by both", b"")
    world.now_ns += 2 * GRACE_NS
    assert await world.blobs.sweep() == 0
    assert await world.has(address)


async def test_after_a_restart_a_blob_is_as_old_as_it_is(world: World) -> None:
    old = await world.put(b"old")
    await world.blobs.hold(LEASE, [old])
    world.now_ns += GRACE_NS // 2
    young = await world.put(b"young")
    world.restart()
    assert await world.blobs.sweep() == 0
    world.now_ns += GRACE_NS // 2
    assert await world.blobs.sweep() == 1
    assert await world.has(young)
    assert not await world.has(old)


async def test_it_sweeps_now_and_then_even_after_the_store_has_failed(
    world: World, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[float] = []

    async def sweep(_self: LeaseBlobs) -> int:
        swept.append(trio.current_time())
        raise StoreError("the disk is away")

    monkeypatch.setattr(LeaseBlobs, "sweep", sweep)
    with trio.move_on_after(2.5 * SWEEP_S):
        await world.blobs.run()
    gaps = [later - before for before, later in pairwise(swept)]
    assert gaps == [pytest.approx(SWEEP_S)] * 2
    assert GRACE_NS >= SWEEP_S * NS_PER_S


async def test_a_blob_is_needed_while_a_lease_of_it_lasts() -> None:
    blobs = LeaseBlobs(MemoryStore(), lambda: 0)
    await blobs.hold(b"first", [b"a", b"b"])
    await blobs.hold(b"second", [b"b"])
    assert [blobs.needs(address) for address in (b"a", b"b", b"c")] == [True, True, False]
    blobs.let_go(b"first")
    assert [blobs.needs(address) for address in (b"a", b"b")] == [False, True]
    blobs.let_go(b"second")
    assert not blobs.needs(b"b")
    await blobs.hold(b"first", [b"a"])
    assert blobs.needs(b"a")


async def test_what_a_lease_drops_goes_at_once_unless_somebody_needs_it(world: World) -> None:
    old, shared, public, own = [
        await world.put(b"old"),
        await world.put(b"shared"),
        await world.put(b"public", public=True),
        await world.put(b"own", b""),
    ]
    await world.blobs.hold(LEASE, [old, shared, public, own])
    await world.blobs.hold(NEXT_LEASE, [shared])
    await world.blobs.drop(LEASE, [old, shared, public, own, b"?" * 32])
    assert [await world.has(address) for address in (old, shared, public, own)] == [
        False,
        True,
        True,
        True,
    ]
    assert not world.blobs.holds(LEASE, old)
    await world.blobs.drop(NEXT_LEASE, [shared])
    assert not await world.has(shared)
