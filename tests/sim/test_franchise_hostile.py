"""What peers and registries can say to a strict node without harm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.dht.planes import Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.franchise.records import DAY_NS
from p2pflop.franchise.samples import SampleRegistry, key
from p2pflop.market.samples import NOW_NS
from p2pflop.node import franchise_service, registry_watch
from p2pflop.node.franchise_service import MAX_FAULTS
from p2pflop.node.franchise_stream import PROTOCOL, Told
from p2pflop.node.memory_market import MemoryNode, now_ns
from p2pflop.wire import encode
from tests.sample_fetch import SampleFetch
from tests.strict_market import (
    POLL_S,
    bought_from,
    cheap_dear_buyer,
    meet,
    sample_fetch,
    trusting,
)

if TYPE_CHECKING:
    from tests.sim.conftest import Market


@pytest.fixture
def fetch() -> SampleFetch:
    return sample_fetch()


def told(**changes: Any) -> Told:
    fields: dict[str, Any] = {
        "version": 1,
        "delegation": b"",
        "slots": 1,
        "trusts": (),
        "standing": "",
        "heads": (),
        "attestations": (),
        "revocations": (),
        "forks": (),
        "wanted": (),
        **changes,
    }
    return Told(**fields)


async def say(villain: MemoryNode, victim: MemoryNode, frame: bytes) -> bytes:
    """What the victim answers."""
    stream: Stream = await villain.host.open(victim.peer, PROTOCOL)
    try:
        await stream.send(frame)
        return await stream.receive()
    finally:
        await stream.aclose()


@pytest.mark.parametrize(
    "case", ["forged", "signed by a stranger", "another network", "cut", "noise", "fork"]
)
async def test_lies_from_peers_are_refused_and_shunned(
    market: Market, fetch: SampleFetch, autojump_clock: object, case: str
) -> None:
    victim = await market.buyer(**trusting(fetch))
    villain = await market.provider("villain")
    await trio.sleep(POLL_S)
    fetch.down = True
    registry, account = fetch.registry, villain.account
    lies: dict[str, Any] = {
        "forged": lambda: {"attestations": (_edited(registry, account),)},
        "signed by a stranger": lambda: {
            "attestations": (registry.prove(registry.attest(account, signer=key(5))),)
        },
        "another network": lambda: {
            "attestations": (registry.prove(registry.attest(account, network_id="other")),)
        },
        "cut": lambda: {"attestations": (registry.prove(registry.attest(account))[:-1],)},
        "noise": lambda: {"revocations": (b"\xff" * 100,)},
        "fork": lambda: {"forks": (b"\x96" * 100,)},
    }
    frame = encode(told(**lies[case]()))
    await meet(villain, victim)
    for _ in range(MAX_FAULTS):
        with pytest.raises(ProviderError):
            await say(villain, victim, frame)
        await trio.sleep(2)
    assert victim.registries.is_shunned(villain.peer)
    assert not victim.franchise.is_attested(account, now_ns())
    good = encode(told(attestations=(registry.prove(registry.attest(account)),)))
    with pytest.raises(ProviderError):
        await say(villain, victim, good)
    await trio.sleep(franchise_service.FORGIVEN_S * 2)
    await say(villain, victim, good)
    assert victim.franchise.is_attested(account, now_ns())


def _edited(registry: SampleRegistry, account: bytes) -> bytes:
    """Somebody else's attestation with another account in its place."""
    other = key(50).public_key
    return registry.prove(registry.attest(other)).replace(other, account)


async def test_what_an_honest_but_late_peer_tells_is_no_fault(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    victim = await market.buyer(**trusting(fetch))
    late = await market.provider("late")
    registry = fetch.registry
    stranger = SampleRegistry(700)
    frames = [
        registry.prove(registry.attest(late.account, valid_until_ns=NOW_NS + 1)),
        registry.prove(registry.attest(late.account, valid_from_ns=NOW_NS + 9 * DAY_NS)),
        stranger.prove(stranger.attest(late.account)),
    ]
    await meet(late, victim)
    for _ in range(2 * MAX_FAULTS):
        await say(late, victim, encode(told(attestations=tuple(frames))))
        await trio.sleep(3)
    assert not victim.registries.is_shunned(late.peer)
    assert not victim.franchise.is_attested(late.account, now_ns())


async def test_floods_of_talk_are_turned_away(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    victim, villain = await market.buyer(**trusting(fetch)), await market.provider("villain")
    await meet(villain, victim)
    await trio.sleep(60)
    answered = 0
    for _ in range(10 * franchise_service.TALKS_BURST):
        try:
            await say(villain, victim, encode(told()))
            answered += 1
        except (ProviderError, ProtocolError):
            pass
    assert answered <= franchise_service.TALKS_BURST + 1
    with pytest.raises(ProviderError):
        await say(villain, victim, bytes(300_000))


async def test_a_silent_peer_is_given_up(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    victim, villain = await market.buyer(**trusting(fetch)), await market.provider("villain")
    await meet(villain, victim)
    stream = await villain.host.open(victim.peer, PROTOCOL)
    with trio.fail_after(franchise_service.TALK_S + 5), pytest.raises(ProviderError):
        await stream.receive()


@pytest.mark.parametrize(
    "spoilt",
    [
        (200, b""),
        (200, b"[" * 100_000),
        (200, b'{"head": "zz"}'),
        (200, b'{"issuer": 1}'),
        (500, b"<html>"),
        (302, b""),
        (200, b'{"proofs": ["00"], "last": 5, "head": "00", "certificates": []}'),
    ],
)
async def test_a_registry_that_answers_with_garbage_harms_nobody(
    market: Market, fetch: SampleFetch, autojump_clock: object, spoilt: tuple[int, bytes]
) -> None:
    _, dear, buyer = await cheap_dear_buyer(market, fetch)
    fetch.spoilt = spoilt
    await trio.sleep(900)
    assert buyer.franchise.watched[fetch.root].trouble
    asked = fetch.asked.count("/v1/head")
    await trio.sleep(900)
    most = 900 / (0.75 * registry_watch.MAX_AGAIN_S) + 1
    assert fetch.asked.count("/v1/head") - asked <= 3 * most
    assert await bought_from(market, buyer) == dear.peer
    fetch.spoilt = None
    await trio.sleep(registry_watch.MAX_AGAIN_S + 1)
    assert not buyer.franchise.watched[fetch.root].trouble


async def test_a_registry_with_another_key_is_not_listened_to(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    other = SampleFetch(SampleRegistry(700))
    node = await market.buyer(registry=(other.address,), fetch=fetch.open)
    await trio.sleep(POLL_S)
    assert "has the root key" in node.franchise.watched[other.root].trouble
    assert set(fetch.asked) == {"/v1/registry"}


async def test_a_registry_of_another_network_is_not_listened_to(
    market: Market, autojump_clock: object
) -> None:
    registry = SampleRegistry(network="other")
    registry.publish()
    other = SampleFetch(registry)
    node = await market.buyer(**trusting(other))
    await trio.sleep(POLL_S)
    assert "for the network 'other'" in node.franchise.watched[other.root].trouble
    assert set(other.asked) == {"/v1/registry"}
