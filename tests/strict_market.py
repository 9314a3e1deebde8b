"""What tests of strict nodes in memory share: a registry, trust in it, and who buys of whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from p2pflop.franchise.samples import SampleRegistry
from p2pflop.node import franchise_service, registry_watch
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from tests.sample_fetch import SampleFetch

if TYPE_CHECKING:
    from tests.sim.conftest import Market

POLL_S = registry_watch.POLL_S + 1
ROUND_S = franchise_service.ROUND_S + franchise_service.SOON_S + 1


def sample_fetch() -> SampleFetch:
    """A registry with a head."""
    registry = SampleRegistry()
    registry.publish()
    return SampleFetch(registry)


def trusting(fetch: SampleFetch, **more: Any) -> dict[str, Any]:
    """How a node is made strict."""
    return {"registry": (fetch.address,), "fetch": fetch.open, **more}


async def meet(one: MemoryNode, *others: MemoryNode) -> None:
    """Connected, with each other's sheets."""
    for other in others:
        await one.host.connect(other.host.addresses[0])
        one.meet(other)
        other.meet(one)
    await trio.sleep(1)


async def bought_from(market: Market, buyer: MemoryNode, seed: int = 0) -> str:
    """Buy something new; the provider that filled."""
    run_id = await buyer.submit(sample_file(seed=seed))
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result", end
    return str(buyer.events(run_id, "filled")[-1]["provider"])


async def cheap_dear_buyer(
    market: Market, fetch: SampleFetch
) -> tuple[MemoryNode, MemoryNode, MemoryNode]:
    """Two providers, of which the dear one is attested, and a strict buyer."""
    cheap = await market.provider("cheap", **trusting(fetch))
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD, **trusting(fetch))
    fetch.registry.attest(dear.account)
    buyer = await market.buyer(**trusting(fetch))
    await meet(buyer, cheap, dear)
    await trio.sleep(POLL_S)
    return cheap, dear, buyer
