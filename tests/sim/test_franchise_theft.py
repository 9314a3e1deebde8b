"""A registry's online key is stolen: what the thief can do, and how all is well again."""

from __future__ import annotations

import pytest
import trio

from p2pflop.franchise.samples import SampleRegistry, key
from p2pflop.market.samples import NOW_NS
from p2pflop.node.memory_market import MemoryNode, now_ns
from tests.sample_fetch import SampleFetch
from tests.sim.conftest import Market
from tests.strict_market import POLL_S, ROUND_S, bought_from, meet, sample_fetch, trusting

THIEF = key(66).public_key


@pytest.fixture
def fetch() -> SampleFetch:
    return sample_fetch()


def history_of_a_thief(registry: SampleRegistry) -> SampleRegistry:
    """The log as it was when the key was stolen, to be continued by the thief."""
    stolen = SampleRegistry()
    stolen.publish()
    assert stolen.online.public_key == registry.online.public_key
    return stolen


async def strict_market(market: Market, fetch: SampleFetch) -> tuple[MemoryNode, MemoryNode]:
    provider = await market.provider(**trusting(fetch))
    fetch.registry.attest(provider.account)
    buyer = await market.buyer(**trusting(fetch))
    await meet(buyer, provider)
    await trio.sleep(POLL_S)
    assert buyer.franchise.admits(provider.account, now_ns())
    return provider, buyer


async def test_what_a_thief_signed_is_gone_once_its_key_is_withdrawn(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    """It attests itself, and takes back what others are attested up to any number."""
    provider, buyer = await strict_market(market, fetch)
    thief = history_of_a_thief(fetch.registry)
    thief.attest(provider.account)
    forged = thief.prove(thief.attest(THIEF))
    buyer.franchise.roll.forgive(fetch.root, NOW_NS - 1)  # As if it knew no head to compare with.
    assert not buyer.franchise.take(forged)
    revocation = thief.prove(thief.revoke(provider.account, 2**40))
    assert not buyer.franchise.take_revocation(revocation)
    assert buyer.franchise.admits(THIEF, now_ns())
    assert not buyer.franchise.admits(provider.account, now_ns())

    fetch.registry.certify(key(555), withdraws=True)
    fetch.at_ns = now_ns()
    await trio.sleep(60)
    assert not buyer.franchise.admits(THIEF, now_ns())
    assert buyer.franchise.admits(provider.account, now_ns()), "what is honest was read anew"
    assert await bought_from(market, buyer) == provider.peer
    # Nor does it come back from disk, or from who has not heard.
    await trio.sleep(10)
    await buyer.kill()
    await market.restart(buyer)
    assert "withdrawn" in buyer.franchise.take(forged)
    assert "withdrawn" in buyer.franchise.take_revocation(revocation)
    assert buyer.franchise.admits(provider.account, now_ns())


async def test_a_history_no_longer_than_the_honest_one_convicts_until_the_user_forgives(
    market: Market, fetch: SampleFetch, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    provider, buyer = await strict_market(market, fetch)
    thief = history_of_a_thief(fetch.registry)
    thief.attest(THIEF)
    buyer.franchise.take(thief.prove(2))
    assert buyer.franchise.roll.fork(fetch.root) is not None
    await trio.sleep(2 * ROUND_S)
    for node in (buyer, provider):
        assert not node.franchise.report()["registries"][0]["trusted"], "evidence is passed on"
    assert not buyer.franchise.admits(provider.account, now_ns())

    # The root key may not take back what the registry signed itself, and nobody can tell apart.
    fetch.registry.certify(key(555), withdraws=True)
    fetch.at_ns = now_ns()
    await trio.sleep(60)
    assert buyer.franchise.roll.fork(fetch.root) is not None
    assert "told two histories" in caplog.text
    assert "--forgive" in caplog.text
    buyer.franchise.forgive(fetch.root)
    await trio.sleep(2 * ROUND_S)
    assert not provider.franchise.report()["registries"][0]["trusted"]
    assert buyer.franchise.roll.fork(fetch.root) is None, "what peers tell convicts no more"
    assert buyer.franchise.admits(provider.account, now_ns())
    assert not buyer.franchise.admits(THIEF, now_ns())
    assert await bought_from(market, buyer) == provider.peer


async def test_a_longer_history_convicts_until_the_key_is_withdrawn(
    market: Market, fetch: SampleFetch, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    provider, buyer = await strict_market(market, fetch)
    thief = history_of_a_thief(fetch.registry)
    for number in range(5):
        thief.attest(key(60 + number).public_key)
    fetch.registry.attest(key(5).public_key)
    fetch.at_ns = now_ns()
    await trio.sleep(POLL_S)
    head = thief.head(at_ns=NOW_NS + 1)
    buyer.franchise.take_peers_head(head)
    await trio.sleep(2 * ROUND_S)
    for node in (buyer, provider):
        assert not node.franchise.report()["registries"][0]["trusted"]
    fetch.registry.certify(key(555), withdraws=True)
    fetch.at_ns = now_ns()
    await trio.sleep(3 * POLL_S)
    for node in (buyer, provider):
        assert node.franchise.report()["registries"][0]["trusted"]
        assert node.franchise.admits(provider.account, now_ns())
    assert "a thief told the second history" in caplog.text
    assert await bought_from(market, buyer) == provider.peer
    await trio.sleep(10)
    await buyer.kill()
    await market.restart(buyer)
    assert buyer.franchise.roll.fork(fetch.root) is None
