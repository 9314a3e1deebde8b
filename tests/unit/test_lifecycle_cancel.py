"""What a buyer that cancels owes, and what becomes of its provider."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from p2pflop.errors import ProtocolError
from p2pflop.job.events import Cancel, Checkpointed, Persist, Received, Send, State
from p2pflop.job.lifecycle import Edge
from p2pflop.market.records import Receipt
from p2pflop.market.samples import NOW_NS, ROOT, STEPS
from p2pflop.wire import open_sealed, seal
from tests.unit.test_lifecycle_states import HALF, SHOPPER, Pair, pair, verified


def half_signed(both: Pair) -> None:
    both.to_buyer(both.provider.on(Checkpointed(STEPS // 2, HALF), NOW_NS))
    both.to_provider(both.buyer.on(verified(both.buyer, 1), NOW_NS))


def test_a_cancel_signs_the_setup_and_the_provider_takes_just_that() -> None:
    both = pair(State.RUNNING, setup_nusd=10**6)
    half_signed(both)
    more = both.provider.on(Checkpointed(STEPS // 2 + 1, ROOT), NOW_NS)
    closing, abandon = [a for a in both.buyer.on(Cancel(), NOW_NS) if isinstance(a, Send)]
    assert (closing.kind, abandon.kind) == ("countersign", "abandon")
    record = open_sealed(Receipt, closing.wire).record
    assert (record.number, record.from_step, record.to_step) == (2, STEPS // 2, STEPS // 2)
    assert both.buyer.side.countersigned == closing.wire

    before = both.provider.side.countersigned
    cheaper = seal(replace(record, amount_nusd=record.amount_nusd - 1), SHOPPER.node)
    for wrong in (cheaper, seal(record, both.seller.node)):
        with pytest.raises(ProtocolError):
            both.provider.on(Received(wrong.wire), NOW_NS)
    stray = seal(replace(record, number=7), SHOPPER.node)
    assert both.provider.on(Received(stray.wire), NOW_NS) == []
    assert both.provider.side.countersigned == before
    both.to_provider([closing, abandon])
    assert both.provider.side.countersigned == closing.wire
    assert both.provider.side.unsigned == {}, "what was billed meanwhile is void"
    assert more
    assert both.provider.state is State.RELEASED
    assert both.provider.on(Received(closing.wire), NOW_NS) == [], "a letter brings it again"


def test_a_cancel_owes_nothing_more_without_a_setup_or_a_signature() -> None:
    for signs, charges in ((True, {}), (False, {"setup_nusd": 10**6})):
        both = pair(State.RUNNING, **charges)
        if signs:
            half_signed(both)
        sent = [a for a in both.buyer.on(Cancel(), NOW_NS) if isinstance(a, Send)]
        assert [a.kind for a in sent] == ["abandon"]


def test_a_cancel_is_resumed_with_what_it_signed() -> None:
    both = pair(State.RUNNING, setup_nusd=10**6)
    half_signed(both)
    rows = [a for a in both.buyer.on(Cancel(), NOW_NS) if isinstance(a, Persist)]
    [closing] = [row for row in rows if row.kind == Edge.CANCEL]
    again = pair(State.RUNNING, setup_nusd=10**6).buyer
    again.side.apply(Edge.CANCEL, tuple(msgspec.msgpack.decode(closing.body)))
    assert again.side.countersigned == both.buyer.side.countersigned


def test_cancelling_fences_and_releases_the_provider() -> None:
    for state in (State.BIDDING, State.CONFIRMING, State.RUNNING, State.VERIFYING):
        both = pair(state)
        actions = both.buyer.on(Cancel(), NOW_NS)
        assert both.buyer.state is State.CANCELLED
        if state is not State.BIDDING:
            both.to_provider(actions)
            assert both.provider.ended
            assert both.buyer.on(Cancel(), NOW_NS) == []
