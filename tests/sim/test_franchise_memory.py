"""Strict and open nodes in one market: who is ranked, who is told why not, and what takes that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.dht.memory import MemoryStore
from p2pflop.franchise.records import DAY_NS
from p2pflop.franchise.samples import GUIDELINES, SampleRegistry, key
from p2pflop.market.evidence import Evidence, replay
from p2pflop.market.ranking import Miss, MissReason
from p2pflop.market.samples import NOW_NS
from p2pflop.node import franchise_service
from p2pflop.node.memory_market import MemoryNode, now_ns, sample_file
from p2pflop.node.service import SubmitOptions
from p2pflop.wire import decode
from tests.sample_fetch import SampleFetch
from tests.strict_market import (
    POLL_S,
    ROUND_S,
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


async def test_a_better_price_without_an_attestation_does_not_win(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    cheap, dear, buyer = await cheap_dear_buyer(market, fetch)
    ranked = await buyer.buyer.quote(sample_file(), SubmitOptions())
    assert [deal["provider"] for deal in ranked["deals"]] == [dear.peer]
    assert [(miss["provider"], miss["reason"]) for miss in ranked["misses"]] == [
        (cheap.peer, str(MissReason.ATTESTATION))
    ]
    run_id = await buyer.submit(sample_file())
    await market.end_of(buyer, run_id)
    assert buyer.events(run_id, "filled")[-1]["provider"] == dear.peer
    [look] = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    assert look.is_right
    [missed] = [entry for entry in look.ranked if isinstance(entry, Miss)]
    assert (missed.peer, missed.reason) == (cheap.peer, MissReason.ATTESTATION)
    # It is told so by who leaves it out, and what to do by its own node.
    [left_out] = cheap.franchise.report()["left_out_by"]
    assert left_out["peer"] == buyer.peer
    assert "not attested by registry" in left_out["reason"]
    assert not dear.franchise.report()["left_out_by"]
    problems = cheap.franchise.problems(selling=True)
    assert any("start the node with --enroll" in problem for problem in problems)


async def test_who_is_attested_appears_within_seconds_and_wins(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    cheap, _, buyer = await cheap_dear_buyer(market, fetch)
    fetch.registry.attest(cheap.account)
    fetch.down = True
    assert not buyer.franchise.admits(cheap.account, now_ns())
    # Its own node learns it first, brings it to its neighbours, and so does the word of it.
    proof = fetch.registry.prove(len(fetch.registry.leaves) - 1)
    assert not cheap.franchise.take(proof)
    await trio.sleep(3)
    assert buyer.franchise.admits(cheap.account, now_ns())
    assert cheap.peer not in cheap.franchise.left_out_by
    assert await bought_from(market, buyer, seed=1) == cheap.peer


async def test_whoever_sells_nothing_is_told_once(
    market: Market, fetch: SampleFetch, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, franchise_service.__name__)
    one = await market.buyer("one", **trusting(fetch))
    other = await market.buyer("other", **trusting(fetch))
    await meet(one, other)
    await trio.sleep(10 * ROUND_S)
    told = [each.message for each in caplog.records if "leaves the asks here out" in each.message]
    assert len(told) == len(set(told)) == 2


async def test_an_open_node_deals_with_everybody_and_is_told_where_it_is_left_out(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    stranger = await market.provider("stranger")
    opened = await market.buyer("open", **trusting(fetch, is_open=True))
    strict = await market.buyer("strict", **trusting(fetch))
    await meet(opened, stranger)
    await meet(strict, stranger)
    assert not fetch.asked or opened.franchise.report()["registries"] == []
    assert await bought_from(market, opened) == stranger.peer
    assert stranger.franchise.report()["strict"] is False
    assert list(stranger.franchise.left_out_by) == [strict.peer]
    assert stranger.franchise.problems(selling=True)
    strict.host.cut(stranger.peer)
    await trio.sleep(1)
    assert not stranger.franchise.left_out_by


async def test_a_buyer_that_reaches_no_registry_learns_it_from_providers(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    provider = await market.provider(**trusting(fetch))
    fetch.registry.attest(provider.account)
    await trio.sleep(POLL_S)
    alone = SampleFetch(fetch.registry)
    alone.down = True
    buyer = await market.buyer(**trusting(alone))
    await meet(buyer, provider)
    assert buyer.franchise.report()["registries"][0]["trouble"] == "nobody answers"
    assert await bought_from(market, buyer) == provider.peer


async def test_a_third_node_tells_of_a_provider_that_is_not_its_own(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    provider = await market.provider()  # open: it brings nothing itself
    fetch.registry.attest(provider.account)
    informed = await market.buyer("informed", **trusting(fetch))
    alone = SampleFetch(fetch.registry)
    alone.down = True
    buyer = await market.buyer(**trusting(alone))
    await meet(buyer, informed)
    buyer.meet(provider)
    await trio.sleep(POLL_S + ROUND_S)
    assert await bought_from(market, buyer) == provider.peer


async def test_what_is_known_survives_a_restart_without_the_registry(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    _, dear, buyer = await cheap_dear_buyer(market, fetch)
    await trio.sleep(franchise_service.SAVE_S + 1)
    await buyer.kill()
    fetch.down = True
    buyer.store = MemoryStore(clock_ns=now_ns)
    await market.restart(buyer)
    assert buyer.franchise.admits(dear.account, now_ns())
    # Until it expires, and not a moment longer.
    assert buyer.franchise.admits(dear.account, NOW_NS + 365 * DAY_NS - 1)
    assert not buyer.franchise.admits(dear.account, NOW_NS + 365 * DAY_NS)


async def test_who_is_revoked_leaves_every_book_and_is_paid_for_what_runs(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    provider = await market.provider(**trusting(fetch))
    provider.workers.step_s = 2.0
    fetch.registry.attest(provider.account)
    buyer = await market.buyer(**trusting(fetch))
    alone = SampleFetch(fetch.registry)
    alone.down = True
    remote = await market.buyer("remote", **trusting(alone))
    await meet(buyer, provider, remote)
    remote.meet(provider)
    await trio.sleep(POLL_S)
    run_id = await buyer.submit(sample_file(steps=50))
    await trio.sleep(10)
    assert buyer.events(run_id, "filled")
    assert not buyer.runs.get(run_id).over
    fetch.registry.revoke(provider.account, fetch.registry.serial)
    await trio.sleep(60)
    for node in (buyer, remote, provider):
        assert not node.franchise.is_attested(provider.account, now_ns()), node.folder
    for node in (buyer, remote):
        assert not (await node.buyer.quote(sample_file(seed=9), SubmitOptions()))["deals"]
    assert not buyer.runs.get(run_id).over, "the lease runs on"
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    await market.settle_down()
    owing, due = market.debts(buyer, provider)
    assert owing == due > 0
    assert "revoked" in provider.franchise.report()["left_out_by"][0]["reason"]


async def test_expired_attestations_leave_the_book_at_once(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    provider = await market.provider(**trusting(fetch))
    fetch.registry.attest(provider.account, valid_until_ns=NOW_NS + DAY_NS)
    buyer = await market.buyer(**trusting(fetch))
    await meet(buyer, provider)
    await trio.sleep(POLL_S)
    assert buyer.franchise.admits(provider.account, now_ns())
    assert provider.franchise.report()["attestation"]["days_left"] == 0
    assert any("ends in 0 days" in each for each in provider.franchise.problems(selling=True))
    await trio.sleep(86_400)
    assert not buyer.franchise.admits(provider.account, now_ns())
    assert not (await buyer.buyer.quote(sample_file(), SubmitOptions()))["deals"]


async def test_two_registries_that_disagree(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    other_registry = SampleRegistry(700)
    other_registry.publish()
    other = SampleFetch(other_registry)
    provider = await market.provider()
    fetch.registry.attest(provider.account)
    other_registry.attest(provider.account)
    other_registry.revoke(provider.account, other_registry.serial)

    def reach(_url: str) -> SampleFetch:
        return other if _url.endswith("other.test") else fetch

    both = (fetch.address, f"{other.root.hex()}@http://other.test")
    buyer = await market.buyer(registry=both, fetch=reach)
    strict = await market.buyer("strict", registry=both[1:], fetch=reach)
    await meet(buyer, provider)
    await meet(strict, provider)
    await trio.sleep(POLL_S)
    assert buyer.franchise.admits(provider.account, now_ns())
    assert not strict.franchise.admits(provider.account, now_ns())


async def test_a_resting_run_waits_for_the_attested_alone(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    """Neither a better ask nor a quote of who is not attested ends its rest."""
    cheap, dear, buyer = await cheap_dear_buyer(market, fetch)
    told = await buyer.buyer.quote(sample_file(), SubmitOptions())
    between_nusd = told["deals"][0]["total_nusd"] * 3 // 4
    assert told["misses"][0]["total_nusd"] < between_nusd
    run_id = await buyer.submit(sample_file(), max_nusd=between_nusd, rest=True)
    await trio.sleep(5)
    for seller in (cheap, dear):
        seller.meet(buyer)
    await trio.sleep(120)
    assert not buyer.events(run_id, "filled")
    assert not buyer.runs.get(run_id).over
    fetch.registry.attest(cheap.account)
    await trio.sleep(POLL_S)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    assert buyer.events(run_id, "filled")[-1]["provider"] == cheap.peer


# Slots


async def test_slots_count_over_all_nodes_of_an_account(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    boxes = [
        await market.provider(f"box {n}", account="chain", slots=4, **trusting(fetch))
        for n in range(3)
    ]
    fetch.registry.attest(boxes[0].account, max_slots=6)
    buyer = await market.buyer(**trusting(fetch))
    await meet(buyer, *boxes)
    for box in boxes:
        await meet(box, *(other for other in boxes if other is not box))
    await trio.sleep(POLL_S + ROUND_S)

    def allowances() -> list[int]:
        found = [box.seller.allocator.allowance for box in boxes]
        return [allowance() for allowance in found if allowance is not None]

    assert sorted(allowances()) == [1, 1, 4]
    assert len(buyer.sheets.book.sellers_of(boxes[0].account, now_ns())) == 3
    fetch.registry.attest(boxes[0].account, max_slots=2)
    await trio.sleep(POLL_S + ROUND_S)
    buyer.sheets.book.expire(now_ns())
    assert len(buyer.sheets.book.sellers_of(boxes[0].account, now_ns())) == 2
    assert sorted(allowances()) == [0, 1, 1]
    idle = next(box for box, slots in zip(boxes, allowances(), strict=True) if not slots)
    assert idle.identity.node.public_key not in buyer.sheets.book.sellers_of(idle.account, now_ns())
    runs = [await buyer.submit(sample_file(seed=seed)) for seed in range(4)]
    ends = [await market.end_of(buyer, run_id) for run_id in runs]
    assert {end["kind"] for end in ends} == {"result"}
    told = {e["provider"] for run_id in runs for e in buyer.events(run_id, "filled")}
    assert idle.peer not in told


async def test_who_promised_more_slots_than_are_attested_refuses(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    provider = await market.provider(slots=4, **trusting(fetch))
    provider.workers.step_s = 1.0
    fetch.registry.attest(provider.account, max_slots=1)
    opened = await market.buyer()
    await meet(opened, provider)
    await trio.sleep(POLL_S)
    opened.meet(provider)
    runs = [await opened.submit(sample_file(seed=seed)) for seed in range(2)]
    await trio.sleep(5)
    assert provider.seller.busy == 1
    reasons = {e["reason"] for run_id in runs for e in opened.events(run_id, "rejected")}
    assert any("attested for" in reason for reason in reasons)
    for run_id in runs:
        assert (await market.end_of(opened, run_id))["kind"] == "result"


# Two histories


async def forked(
    market: Market, fetch: SampleFetch
) -> tuple[SampleFetch, MemoryNode, MemoryNode, MemoryNode]:
    """A registry that shows one log to ``one``, another to ``two``; ``provider`` is in both."""
    hidden = SampleRegistry()
    hidden.publish()
    hidden.attest(key(66).public_key)
    other = SampleFetch(hidden)
    provider = await market.provider()
    for registry in (fetch.registry, hidden):
        registry.attest(provider.account)
    one = await market.buyer("one", **trusting(fetch))
    two = await market.buyer("two", **trusting(other))
    one.meet(provider)
    two.meet(provider)
    await trio.sleep(POLL_S)
    for node in (one, two):
        assert node.franchise.admits(provider.account, now_ns())
    return other, one, two, provider


async def test_a_registry_with_two_histories_is_caught_by_neighbours(
    market: Market,
    fetch: SampleFetch,
    autojump_clock: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, one, two, provider = await forked(market, fetch)
    third = await market.buyer("third", **trusting(fetch))
    await meet(one, two, third)
    with caplog.at_level(logging.ERROR):
        await trio.sleep(2 * POLL_S + ROUND_S)
    for node in (one, two, third):
        assert node.franchise.roll.fork(fetch.root) is not None, node.folder
        assert not node.franchise.admits(provider.account, now_ns())
        report = node.franchise.report()["registries"][0]
        assert report["trusted"] is False
        assert report["fork"]
    assert "told two histories" in caplog.text
    assert one.franchise.forks()[0].hex() in caplog.text
    # Over a restart too, until the user says otherwise; and no old evidence convicts again.
    await trio.sleep(franchise_service.SAVE_S + 1)
    await one.kill()
    await market.restart(one)
    assert not one.franchise.admits(provider.account, now_ns())
    one.franchise.forgive(fetch.root)
    assert one.franchise.admits(provider.account, now_ns())
    await meet(one, two)
    await trio.sleep(3 * ROUND_S)
    assert one.franchise.admits(provider.account, now_ns())


async def test_a_rewritten_log_is_caught_by_who_saw_it_before(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    registry = fetch.registry
    for number in range(5):
        registry.attest(key(number + 1).public_key)
    node = await market.buyer(**trusting(fetch))
    await trio.sleep(POLL_S)
    rewritten = SampleRegistry()
    rewritten.publish()
    for number in range(9):
        rewritten.attest(key(number + 40).public_key)
    fetch.registry = rewritten
    fetch.at_ns = now_ns()
    await trio.sleep(POLL_S)
    assert node.franchise.roll.fork(fetch.root) is not None


async def test_a_registry_that_hides_how_its_log_grew_is_not_followed(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    fetch.registry.attest(key(1).public_key)
    node = await market.buyer(**trusting(fetch))
    await trio.sleep(POLL_S)
    rewritten = SampleRegistry()
    rewritten.publish()
    rewritten.publish()
    rewritten.attest(key(2).public_key)
    rewritten.attest(key(3).public_key)

    class Hiding(SampleFetch):
        def _answer(self, path: str, body: bytes | None) -> dict[str, Any] | None:
            if "/consistency" in path:
                return {"path": []}
            return {"heads": []} if "/heads" in path else super()._answer(path, body)

    hiding = Hiding(rewritten)
    hiding.at_ns = now_ns()
    node.registries.franchise.watched[fetch.root].trouble = ""
    await node.kill()
    node.fetch = hiding.open
    await market.restart(node)
    await trio.sleep(POLL_S)
    assert "does not show" in node.franchise.watched[fetch.root].trouble
    assert not node.franchise.is_attested(key(3).public_key, now_ns())


# Enrolment


async def test_a_node_enrols_and_tells_what_it_waits_for(
    market: Market, fetch: SampleFetch, autojump_clock: object
) -> None:
    def waits_for(node: MemoryNode) -> str:
        return node.franchise.watched[fetch.root].waits_for

    asked = {"enroll": True, "contact": "ada@example.org"}
    hasty = await market.provider("hasty", **trusting(fetch, **asked, agree="1999"))
    node = await market.provider(**trusting(fetch, **asked, agree=GUIDELINES))
    await trio.sleep(5)
    assert f"--agree {GUIDELINES}" in waits_for(hasty)
    assert waits_for(node) == "the operator's approval"
    assert set(fetch.applied.values()) == {node.account}
    fetch.enrolled.add(node.account.hex())
    await trio.sleep(5)
    assert "pay $1" in waits_for(node)
    assert node.account.hex()[:12] in waits_for(node)
    assert any("pay $1" in each for each in node.franchise.problems(selling=True))
    fetch.registry.attest(node.account)
    await trio.sleep(5)
    assert not waits_for(node)
    report = node.franchise.report()["attestation"]
    assert (report["days_left"], report["max_slots"]) == (364, 8)
    assert len(fetch.applied) == 1
    await node.kill()
    await market.restart(node)
    await trio.sleep(5)
    assert len(fetch.applied) == 1, "it applies once"
