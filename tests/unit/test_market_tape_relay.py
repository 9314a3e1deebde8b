"""Trades between nodes: what is passed on and why not, and how a tape is filled up."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pflop.errors import ProtocolError
from p2pflop.ids import content_hash
from p2pflop.market import tape as tape_module
from p2pflop.market import tape_relay as relay_module
from p2pflop.market.gate import Outcome
from p2pflop.market.relay import MAX_FAULTS, Relay
from p2pflop.market.samples import CLASS_ID, NOW_NS, Party, book, party
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.market.tape import (
    HOUR_NS,
    KEPT_HOURS,
    MAX_TRADES_AN_ACCOUNT,
    OpenTrade,
    Tape,
    hour_of,
    make_trade,
)
from p2pflop.market.tape_relay import (
    ACCOUNT_BURST,
    ANSWERED_BURST,
    FORWARDER_BURST,
    GOSSIPED_HOURS,
    MAX_NAMED_HOURS,
    MAX_TRADE_WIRE_BYTES,
    MAX_TRADES_A_FRAME,
    SHORT_ID_BYTES,
    SUBNET_BURST,
    HourHash,
    Pull,
    TapeListing,
    TapeOutline,
    TapeParcel,
    TapeRelay,
    TapeWant,
    listing_for,
    outline_of,
    parcels_for,
    read_parcel,
)
from p2pflop.wire import encode, seal

SELLER = party(1)


def trade(number: int = 1, seller: Party = SELLER, hours_ago: int = 0) -> OpenTrade:
    return make_trade(
        seller.node,
        fill_id=b"fill %d" % number,
        class_id=CLASS_ID,
        price_nusd=10**6,
        flop=10**12,
        now_ns=NOW_NS - hours_ago * HOUR_NS,
        delegation=seller.delegation,
    )


def new_relay() -> TapeRelay:
    return TapeRelay(Tape(bytes(32)), Relay(book(), lambda: 0.5))


@pytest.fixture
def relay() -> TapeRelay:
    return new_relay()


def take(
    relay: TapeRelay, each: OpenTrade | bytes, forwarder: str = "peer", now_ns: int = NOW_NS
) -> Outcome:
    wire = each if isinstance(each, bytes) else each.sealed.wire
    return relay.take(wire, forwarder, now_ns).outcome


def test_news_is_passed_on_once(relay: TapeRelay) -> None:
    assert take(relay, trade()) is Outcome.NEW
    assert take(relay, trade(), "another") is Outcome.KNOWN
    assert [Outcome.NEW.is_passed_on, Outcome.KNOWN.is_passed_on] == [True, False]
    assert relay.counts == {Outcome.NEW: 1, Outcome.KNOWN: 1}
    assert relay.tape.trades(NOW_NS) == [trade()]


def test_what_a_restart_already_has_goes_no_further(relay: TapeRelay) -> None:
    relay.tape.add(trade(), NOW_NS)
    assert take(relay, trade()) is Outcome.KNOWN


def test_what_is_wrong_is_its_forwarders_fault_for_sheets_too(relay: TapeRelay) -> None:
    unsigned = seal(replace(trade().trade, delegation=b""), SELLER.node).wire
    verdict = relay.take(unsigned, "peer", NOW_NS)
    assert (verdict.outcome, verdict.reason[:11]) == (Outcome.BAD, "delegation:")
    assert take(relay, bytes(MAX_TRADE_WIRE_BYTES + 1)) is Outcome.BAD
    for number in range(MAX_FAULTS - 2):
        assert not relay.peers.is_shunned("peer", NOW_NS)
        assert take(relay, b"junk %d" % number) is Outcome.BAD
    assert relay.peers.is_shunned("peer", NOW_NS)
    assert take(relay, trade()) is Outcome.SHUNNED
    assert not relay.gate.may_compare("peer", NOW_NS)
    assert take(relay, trade(), "another") is Outcome.NEW


def test_gossip_takes_no_replays_of_old_hours_and_nothing_early(relay: TapeRelay) -> None:
    old = trade(hours_ago=GOSSIPED_HOURS)
    assert take(relay, old) is Outcome.CLOCK
    assert relay.enter(old, "peer", NOW_NS).outcome is Outcome.NEW, "comparing brings it"
    assert take(relay, trade(2, hours_ago=GOSSIPED_HOURS - 1)) is Outcome.NEW
    early = trade(3, hours_ago=-1)
    start_ns = early.trade.hour * HOUR_NS - CLOCK_TOLERANCE_NS
    assert take(relay, early, now_ns=start_ns - 1) is Outcome.CLOCK
    assert relay.enter(early, "peer", start_ns - 1).outcome is Outcome.CLOCK
    assert relay.wants(early.sealed.id[:SHORT_ID_BYTES])
    assert take(relay, early, now_ns=start_ns) is Outcome.NEW
    ancient = trade(4, hours_ago=KEPT_HOURS)
    assert relay.enter(ancient, "peer", NOW_NS).outcome is Outcome.CLOCK
    assert not relay.wants(ancient.sealed.id[:SHORT_ID_BYTES])
    assert relay.peers.score("peer", NOW_NS) == MAX_FAULTS, "clocks are nobody's fault"


def test_a_forwarder_costs_a_bounded_number_of_checks(relay: TapeRelay) -> None:
    number = 0
    while take(relay, trade(1, party(number := number + 1))) is Outcome.NEW:
        pass
    assert number == FORWARDER_BURST + 1
    assert take(relay, trade(1, party(1))) is Outcome.KNOWN, "what is known costs nothing"
    assert take(relay, trade(1, party(number)), "another") is Outcome.NEW


def test_a_subnet_shares_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "FORWARDER_BURST", 10**6)
    relay = new_relay()
    for peer, subnet in (("a", "192.0.2.0/24"), ("b", "192.0.2.0/24"), ("c", "198.51.100.0/24")):
        relay.peers.connected(peer, subnet)
    number = 0
    while take(relay, trade(1, party(number := number + 1)), "ab"[number % 2]) is Outcome.NEW:
        pass
    assert number == SUBNET_BURST + 1
    assert take(relay, trade(1, party(number)), "c") is Outcome.NEW


def test_a_flood_of_one_account_stays_within_its_limits(relay: TapeRelay) -> None:
    outcomes = [take(relay, trade(n), f"peer {n}") for n in range(ACCOUNT_BURST + 5)]
    assert outcomes[ACCOUNT_BURST:] == [Outcome.ACCOUNT] * 5
    assert outcomes.count(Outcome.TAPE) + outcomes.count(Outcome.NEW) == ACCOUNT_BURST
    assert len(relay.tape) == MAX_TRADES_AN_ACCOUNT
    assert take(relay, trade(1, party(2))) is Outcome.NEW, "others are not kept out"


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_SEEN", 3)
    monkeypatch.setattr(relay_module, "MAX_TURNED_AWAY", 3)
    relay = new_relay()
    for number in range(8):
        take(relay, trade(1, party(number)))
        relay.enter(trade(number, hours_ago=KEPT_HOURS), "peer", NOW_NS)
    assert len(relay.gate) == len(relay._turned_away) == 3


def test_comparisons_that_one_peer_begins_are_counted(relay: TapeRelay) -> None:
    answers = [relay.gate.may_compare("peer", NOW_NS) for _ in range(ANSWERED_BURST + 1)]
    assert answers == [True] * ANSWERED_BURST + [False]
    assert relay.gate.may_compare("another", NOW_NS)


# Comparing


def holding(*trades: OpenTrade) -> TapeRelay:
    relay = new_relay()
    for each in trades:
        relay.tape.add(each, NOW_NS)
    return relay


def pull(here: TapeRelay, there: TapeRelay, now_ns: int = NOW_NS) -> list[OpenTrade]:
    """What was new here."""
    each = Pull(here, "there")
    want = each.want(listing_for(there.tape, each.outline(now_ns), now_ns), now_ns)
    for frame in parcels_for(there.tape, want, now_ns):
        assert not each.done
        each.receive(read_parcel(frame, "main"), now_ns)
    assert each.done
    return each.new


def test_a_tape_pulls_what_it_lacks_and_no_more() -> None:
    many = [trade(n, party(n), hours_ago=n % 3) for n in range(2 * MAX_TRADES_A_FRAME + 3)]
    here, there = holding(trade(1), many[0]), holding(*many)
    assert set(pull(here, there)) == set(many[1:])
    assert pull(here, there) == []
    assert pull(there, here) == [trade(1)]
    assert here.tape.ids(NOW_NS) == there.tape.ids(NOW_NS)
    empty = new_relay()
    assert pull(empty, new_relay()) == []
    assert len(pull(empty, here)) == len(here.tape)


def test_hours_that_are_alike_are_not_listed() -> None:
    both, more = trade(1, hours_ago=1), trade(2)
    frame = listing_for(holding(both, more).tape, Pull(holding(both), "").outline(NOW_NS), NOW_NS)
    assert frame == encode(TapeListing(more.sealed.id[:SHORT_ID_BYTES]))


def full(there: TapeRelay, monkeypatch: pytest.MonkeyPatch) -> TapeRelay:
    """A tape with room for one trade of an account, and in it the one that stays."""
    monkeypatch.setattr(tape_module, "MAX_TRADES_AN_ACCOUNT", 1)
    return holding(*there.tape.trades(NOW_NS))


def test_what_found_no_place_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    there = holding(*(trade(n) for n in range(8)))
    here = full(there, monkeypatch)
    assert pull(here, there) == []
    assert here.counts == {Outcome.TAPE: 7}
    assert pull(here, there) == []
    assert here.counts == {Outcome.TAPE: 7}


def test_who_has_more_than_there_is_room_for_is_heard_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = holding(*(trade(n) for n in range(8)))
    here = full(there, monkeypatch)
    for most, done in ((7, False), (6, True)):
        monkeypatch.setattr(relay_module, "MAX_REFUSED_TRADES", most)
        each = started(here, there)
        unfinished = encode(TapeParcel(there.tape.dump().trades, last=False))
        each._due |= {t.sealed.id[:SHORT_ID_BYTES] for t in there.tape.trades(NOW_NS)}
        each.receive(read_parcel(unfinished, "main"), NOW_NS)
        assert each.done is done
        here._turned_away.clear()


def started(here: TapeRelay, there: TapeRelay) -> Pull:
    each = Pull(here, "there")
    each.want(listing_for(there.tape, each.outline(NOW_NS), NOW_NS), NOW_NS)
    assert not each.done
    return each


def test_what_nobody_asked_for_ends_it() -> None:
    each = started(new_relay(), holding(trade(1)))
    unasked = encode(TapeParcel((trade(2).sealed.wire,), last=True))
    with pytest.raises(ProtocolError, match="nobody asked"):
        each.receive(read_parcel(unasked, "main"), NOW_NS)
    each = started(new_relay(), holding(trade(1)))
    twice = encode(TapeParcel((trade(1).sealed.wire,) * 2, last=True))
    with pytest.raises(ProtocolError, match="nobody asked"):
        each.receive(read_parcel(twice, "main"), NOW_NS)
    with pytest.raises(ProtocolError, match="empty parcels"):
        each.receive(read_parcel(encode(TapeParcel((), last=False)), "main"), NOW_NS)


def test_bad_trades_are_its_fault_until_it_is_heard_no_further() -> None:
    here = new_relay()
    each = started(here, holding(trade(1)))
    junk = tuple(b"junk %d" % n for n in range(MAX_FAULTS))
    with pytest.raises(ProtocolError, match="bad trades"):
        each.receive(read_parcel(encode(TapeParcel(junk, last=False)), "main"), NOW_NS)
    assert here.peers.is_shunned("there", NOW_NS)


@pytest.mark.parametrize("junk", [b"", b"junk", encode(TapeListing(b"")), bytes(10**6)])
def test_frames_are_checked(junk: bytes) -> None:
    here = holding(trade(1))
    with pytest.raises(ProtocolError):
        listing_for(here.tape, junk if junk != encode(TapeListing(b"")) else b"\x91\x91", NOW_NS)
    with pytest.raises(ProtocolError):
        Pull(here, "").want(junk + b"\0", NOW_NS)
    with pytest.raises(ProtocolError):
        list(parcels_for(here.tape, junk + b"\0", NOW_NS))
    with pytest.raises(ProtocolError):
        read_parcel(junk, "main")


def test_lists_are_bounded_and_of_whole_ids() -> None:
    here = holding(trade(1))
    half = encode(TapeListing(bytes(SHORT_ID_BYTES + 1)))
    with pytest.raises(ProtocolError, match="middle of an id"):
        Pull(here, "").want(half, NOW_NS)
    with pytest.raises(ProtocolError, match="middle of an id"):
        list(parcels_for(here.tape, encode(TapeWant(bytes(3))), NOW_NS))
    long = bytes(tape_module.MAX_TRADES * SHORT_ID_BYTES)
    assert Pull(here, "").want(encode(TapeListing(long)), NOW_NS)
    with pytest.raises(ProtocolError):
        Pull(here, "").want(encode(TapeListing(long + bytes(SHORT_ID_BYTES))), NOW_NS)
    hours = tuple(HourHash(hour, bytes(SHORT_ID_BYTES)) for hour in range(MAX_NAMED_HOURS))
    assert listing_for(here.tape, encode(TapeOutline(hours)), NOW_NS)
    with pytest.raises(ProtocolError):
        listing_for(here.tape, encode(TapeOutline((*hours, hours[0]))), NOW_NS)
    many = (b"",) * MAX_TRADES_A_FRAME
    assert read_parcel(encode(TapeParcel(many, last=True)), "main").last
    with pytest.raises(ProtocolError):
        read_parcel(encode(TapeParcel((*many, b""), last=True)), "main")


def test_an_outline_is_of_ids_rising() -> None:
    first, second = sorted((trade(1), trade(2)), key=lambda each: each.sealed.id)
    outline = outline_of(holding(second, first).tape.ids(NOW_NS))
    joined = first.sealed.id + second.sealed.id
    hashed = content_hash(joined)[:SHORT_ID_BYTES]
    assert outline == TapeOutline((HourHash(hour_of(NOW_NS), hashed),))
