"""Whose blobs are whose: naming a blob in a job gives no right to it, having it oneself does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from p2pflop.dht.fetch import fetch
from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError
from p2pflop.node.dialing import NodeDialer
from p2pflop.node.memory_market import MemoryNode, sample_data, sample_file

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LARGE = 70_000
"""Floats: more bytes than go along with a message."""
STATE, WEIGHTS = sample_data(LARGE)


async def steal(market: Market, thief: MemoryNode, provider: MemoryNode) -> bytes:
    """Fetch the weights from the provider."""
    dialer = NodeDialer(thief.host, market.nursery)
    await fetch(thief.store, address_of(WEIGHTS), [provider.peer], dialer)
    return await thief.store.get(address_of(WEIGHTS))


@pytest.mark.parametrize("owner", [b"another account", b""])
async def test_naming_anothers_weights_gives_no_right_to_them(
    market: Market, autojump_clock: object, owner: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, thief = await market.provider(), await market.node("thief")
    await provider.store.put(WEIGHTS, owner=owner)
    await thief.store.put(STATE)

    async def believe(*_: Any) -> None:
        """As a node that was changed to buy what it lacks inputs for."""

    monkeypatch.setattr(type(thief.buyer), "_check_input", believe)
    run_id = await thief.submit(sample_file(20, floats=LARGE))
    end = await market.end_of(thief, run_id)
    assert [event["provider"] for event in thief.events(run_id, "filled")] != []
    assert end["kind"] == "failed"
    with pytest.raises(BlobNotFoundError):
        await steal(market, thief, provider)


async def test_a_buyer_reads_what_its_own_account_brought(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=LARGE)
    run_id = await buyer.submit(sample_file(20, floats=LARGE))
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    await buyer.store.delete(address_of(WEIGHTS))
    assert await steal(market, buyer, provider) == WEIGHTS


async def test_what_is_here_for_a_stranger_stays_if_it_is_bought_with(
    market: Market, autojump_clock: object
) -> None:
    """Else the stranger's lease would end, and with it the input of a run that goes on."""
    await market.provider()
    buyer = await market.node("buyer")
    for data in (STATE, WEIGHTS):
        await buyer.store.put(data, owner=b"another account")
    run_id = await buyer.submit(sample_file(20, floats=LARGE))
    info = await buyer.store.stat(address_of(WEIGHTS))
    assert info is not None
    assert info.owner == b""
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
