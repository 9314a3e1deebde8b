"""Packs between nodes in memory: what is known is not bought, and nothing is lost by a crash."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec
import pytest

from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError
from p2pflop.job.file import JobBody, JobFile, Labels, encode_file
from p2pflop.job.graph import (
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    encode_graph,
    graph_hash,
)
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_INPUT,
    ROLE_STATE,
    BlobSource,
    Job,
    Phase,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.job.variants import Variants, encode_variants, variant
from p2pflop.node.packs import Packs
from p2pflop.node.service import SubmitOptions

if TYPE_CHECKING:
    from p2pflop.node.memory_market import MemoryNode
    from tests.sim.conftest import Market

PACK = "0123456789ab"
START = struct.pack("<2f", 1, 2)
RATE = struct.pack("<f", 0.5)
COUNT = 5


def rate(number: int) -> bytes:
    return struct.pack("<f", float(number))


def job_file() -> JobFile:
    """Adds its argument to its state, of two floats."""
    float32 = Dtype.FLOAT32
    graph = Graph(
        (GraphParam(0, float32, ()), GraphParam(1, float32, (2,))),
        (
            Node(Op.PARAM, (0,)),
            Node(Op.PARAM, (1,)),
            Node(Op.ADD, (), (1, 0)),
            Node(Op.MUL, (), (0, 0)),
        ),
        (Output(3), Output(2), Output(2, 1)),
    )
    data = encode_graph(graph)
    params = (
        WorkParam(int(float32), (), ROLE_INPUT, BlobSource(address_of(RATE), len(RATE))),
        WorkParam(int(float32), (2,), ROLE_STATE, BlobSource(address_of(START), len(START))),
    )
    work = Work(1, (Phase(graph_hash(data), 1, 0, (MODE_TRACE, MODE_LAST)),), params, 0)
    body = JobBody(Job(work_id(work), 0, 3), msgspec.msgpack.encode(work), (data,))
    labels = Labels("adder", ("rate", "state"), ("step",), (("square", "sum"),))
    return JobFile(1, body, labels)


def variants(count: int = COUNT, first: int = 0) -> Variants:
    numbers = range(first, first + count)
    ids = tuple(f"{number:012x}" for number in numbers)
    return Variants(1, job_file(), 8, (0,), ids, tuple((rate(number),) for number in numbers))


async def ready(buyer: MemoryNode) -> Packs:
    await buyer.store.put(START)
    return Packs(buyer.buyer)


async def submit(packs: Packs, made: Variants, run_id: str = PACK, *, fresh: bool = False) -> int:
    options = SubmitOptions(run_id=run_id, fresh=fresh)
    told = await packs.submit(encode_variants(made), options)
    assert len(told["known"]) + told["bought"] == len(made.values)
    return int(told["bought"])


async def test_a_pack_is_one_run_and_its_variants_are_runs_after_it(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    packs = await ready(buyer)
    assert await submit(packs, variants()) == COUNT
    with pytest.raises(ConfigError, match="has no result"):
        await packs.unpack(PACK)
    end = await market.end_of(buyer, PACK)
    assert len(buyer.runs.cards()) == 1
    cards = await packs.unpack(PACK)
    assert [card["id"] for card in cards] == list(variants().run_ids)
    assert {card["end_state"] for card in cards} == {"settled"}
    assert sum(card["cost_nusd"] for card in cards) == end["cost_nusd"] > 0
    await market.settle_down()
    assert market.debts(buyer, provider) == (end["cost_nusd"],) * 2
    for place, card in enumerate(cards):
        file = variant(variants(), place, address_of)
        assert buyer.buyer.job_file(card["id"]) == encode_file(file)
        assert card["work"] == file.body.job.work.hex()
        assert (card["pack"], card["steps"], card["step"]) == (PACK, 3, 3)
        [told] = buyer.events(card["id"])
        assert (told["kind"], told["hash"], told["provider"]) == (
            "result",
            card["hash"],
            end["provider"],
        )
        for address in (told["trace"], told["outputs"]["sum"], told["state"]["state"]["address"]):
            assert await buyer.store.stat(bytes.fromhex(address)) is not None
    assert await packs.unpack(PACK) == cards
    [listed] = buyer.runs.cards()
    assert (listed["id"], listed["cost_nusd"]) == (PACK, end["cost_nusd"])
    everything = {card["id"]: card for card in buyer.runs.cards(parts=True)}
    assert everything.keys() == {PACK, *variants().run_ids}
    assert [everything[card["id"]] for card in cards] == cards
    assert buyer.runs.unfinished() == []


async def test_what_was_bought_before_is_left_out(market: Market, autojump_clock: object) -> None:
    _, buyer = await market.provider(), await market.buyer()
    packs = await ready(buyer)
    await submit(packs, variants(2))
    await market.end_of(buyer, PACK)
    old = await packs.unpack(PACK)
    others = msgspec.structs.replace(
        variants(4), run_ids=tuple(f"{number:012x}" for number in range(16, 20))
    )
    assert await submit(packs, others, "ba9876543210") == 2
    await market.end_of(buyer, "ba9876543210")
    new = await packs.unpack("ba9876543210")
    assert [card["id"] for card in new] == list(others.run_ids[2:])
    for run_id, card in zip(others.run_ids, old, strict=False):
        known = buyer.runs.get(run_id).card
        assert (known["earlier"], known["cost_nusd"]) == (card["id"], 0)
        assert known["hash"] == card["hash"]
    assert await submit(packs, others, "ba9876543210") == 0
    assert await submit(packs, variants(2, first=64), "ba9876543219") == 2
    again = msgspec.structs.replace(variants(2), run_ids=("aaaaaaaaaaaa", "bbbbbbbbbbbb"))
    assert await submit(packs, again, "ba9876543218", fresh=True) == 2


async def test_a_variant_answers_a_job_bought_alone(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    packs = await ready(buyer)
    await submit(packs, variants())
    await market.end_of(buyer, PACK)
    cards = await packs.unpack(PACK)
    await provider.kill()
    await buyer.store.put(rate(3))
    run_id = await buyer.submit(encode_file(variant(variants(), 3, address_of)))
    end = await market.end_of(buyer, run_id)
    assert (end["earlier"], end["hash"]) == (cards[3]["id"], cards[3]["hash"])


async def test_a_restart_forgets_no_pack(market: Market, autojump_clock: object) -> None:
    _, buyer = await market.provider(), await market.buyer()
    packs = await ready(buyer)
    await submit(packs, variants())
    await buyer.kill()
    await market.restart(buyer)
    assert await submit(Packs(buyer.buyer), variants()) == COUNT
    end = await market.end_of(buyer, PACK)
    await buyer.kill()
    await market.restart(buyer)
    cards = await Packs(buyer.buyer).unpack(PACK)
    assert sum(card["cost_nusd"] for card in cards) == end["cost_nusd"]
    await buyer.kill()
    await market.restart(buyer)
    assert await Packs(buyer.buyer).unpack(PACK) == cards
    assert await submit(Packs(buyer.buyer), variants()) == 0


async def test_what_is_no_pack_is_told(market: Market, autojump_clock: object) -> None:
    _, buyer = await market.provider(), await market.buyer()
    packs = await ready(buyer)
    with pytest.raises(ConfigError, match="a pack needs an id"):
        await packs.submit(encode_variants(variants()), SubmitOptions())
    await buyer.store.put(RATE)
    run_id = await buyer.submit(encode_file(job_file()))
    await market.end_of(buyer, run_id)
    with pytest.raises(ConfigError, match="is no pack"):
        await packs.unpack(run_id)
    with pytest.raises(ConfigError, match="no id of a job"):
        await submit(packs, msgspec.structs.replace(variants(1), run_ids=("../x",)))
