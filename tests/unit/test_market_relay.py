"""What is passed on and why not: quotas, faults, clocks; with whom books are compared."""

from __future__ import annotations

import pytest

from p2pflop.market import relay as relay_module
from p2pflop.market.book import (
    MAX_PROOFS,
    MAX_SHEETS,
    MAX_SHEETS_PER_ACCOUNT,
    Book,
    Equivocation,
)
from p2pflop.market.gate import Outcome
from p2pflop.market.records import MAX_SHEET_LIFETIME_NS
from p2pflop.market.relay import (
    ACCOUNT_BURST,
    ACCOUNT_PER_S,
    COMPARE_S,
    COMPARE_SOON_S,
    COMPARED_AT_ONCE,
    FORGIVEN_S,
    FORWARDER_BURST,
    FORWARDER_PER_S,
    MAX_FAULTS,
    MAX_SHEET_WIRE_BYTES,
    OVERTAKEN_S,
    PASSED_ON_BURST,
    PROOFS_PER_S,
    SUBNET_BURST,
    Relay,
)
from p2pflop.market.samples import NOW_NS, ask, book, party
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.units import NS_PER_S

SELLER = party(1)


@pytest.fixture
def relay() -> Relay:
    return Relay(book(), lambda: 0.5)


def take(relay: Relay, wire: bytes, forwarder: str = "peer", now_ns: int = NOW_NS) -> Outcome:
    return relay.take(wire, forwarder, now_ns).outcome


def wire(number: int = 1, node: int = 1) -> bytes:
    return party(node).sheet(ask(), number=number).sealed.wire


def test_news_is_passed_on_once(relay: Relay) -> None:
    assert take(relay, wire()) is Outcome.NEW
    assert take(relay, wire()) is Outcome.KNOWN
    assert take(relay, wire(), "another") is Outcome.KNOWN
    assert [Outcome.NEW.is_passed_on, Outcome.KNOWN.is_passed_on] == [True, False]
    assert relay.counts == {Outcome.NEW: 1, Outcome.KNOWN: 2}


def test_an_old_sheet_goes_no_further(relay: Relay) -> None:
    take(relay, wire(number=2))
    assert take(relay, wire(number=1)) is Outcome.BOOK


def test_both_sheets_of_an_equivocation_are_passed_on_but_no_third(relay: Relay) -> None:
    sheets = [SELLER.sheet(ask(number)).sealed.wire for number in (1, 2, 3)]
    outcomes = [take(relay, each) for each in sheets]
    assert outcomes == [Outcome.NEW, Outcome.PROOF, Outcome.BOOK]
    assert [each.is_passed_on for each in outcomes] == [True, True, False]


def test_what_is_wrong_is_its_forwarders_fault_until_it_is_shunned(relay: Relay) -> None:
    for number in range(MAX_FAULTS):
        assert relay.score("peer", NOW_NS) == MAX_FAULTS - number
        assert take(relay, b"junk %d" % number) is Outcome.BAD
    assert relay.is_shunned("peer", NOW_NS)
    assert take(relay, wire()) is Outcome.SHUNNED
    assert not relay.gate.may_compare("peer", NOW_NS)
    assert take(relay, wire(), "another") is Outcome.NEW
    later_ns = NOW_NS + int(FORGIVEN_S * NS_PER_S)
    assert take(relay, wire(node=2), "peer", later_ns) is Outcome.NEW


def test_an_oversized_sheet_is_not_looked_into(relay: Relay) -> None:
    assert take(relay, bytes(MAX_SHEET_WIRE_BYTES + 1)) is Outcome.BAD
    assert relay.score("peer", NOW_NS) == MAX_FAULTS - 1


def test_clocks_are_nobodys_fault_and_what_is_early_may_come_again(relay: Relay) -> None:
    early_ns = NOW_NS - CLOCK_TOLERANCE_NS - 1
    assert take(relay, wire(), now_ns=early_ns) is Outcome.CLOCK
    assert take(relay, wire(), now_ns=early_ns + 1) is Outcome.NEW
    assert take(relay, wire(node=2), now_ns=NOW_NS + MAX_SHEET_LIFETIME_NS) is Outcome.CLOCK
    assert relay.score("peer", NOW_NS) == MAX_FAULTS


def test_a_forwarder_costs_a_bounded_number_of_checks(relay: Relay) -> None:
    number = 0
    while take(relay, wire(number := number + 1, node=number)) is Outcome.NEW:
        pass
    assert number == FORWARDER_BURST + 1
    assert take(relay, wire(1)) is Outcome.KNOWN, "what is known costs nothing"
    assert take(relay, wire(number, node=number), "another") is Outcome.NEW
    assert relay.score("peer", NOW_NS) == MAX_FAULTS, "to be busy is no fault"


def test_a_subnet_shares_a_quota(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "FORWARDER_BURST", 10**6)
    relay = Relay(book(), lambda: 0.5)
    for peer, subnet in (("a", "192.0.2.0/24"), ("b", "192.0.2.0/24"), ("c", "198.51.100.0/24")):
        relay.connected(peer, subnet)
    number = 0
    while take(relay, wire(number := number + 1, node=number), "ab"[number % 2]) is Outcome.NEW:
        pass
    assert number == SUBNET_BURST + 1
    assert take(relay, wire(number, node=number), "c") is Outcome.NEW


def test_an_account_gossips_a_bounded_number_of_sheets(relay: Relay) -> None:
    for number in range(1, ACCOUNT_BURST + 1):
        assert take(relay, wire(number)) is Outcome.NEW
    for over in (number + 1, number + 2):
        assert take(relay, wire(over)) is Outcome.LATER
        assert not Outcome.LATER.is_passed_on
    assert take(relay, wire(over), "another") is Outcome.KNOWN
    assert relay.book.last_number(SELLER.node.public_key) == over, "it is taken nevertheless"
    assert relay.to_pass_on(NOW_NS) == []
    later_ns = NOW_NS + int(NS_PER_S / ACCOUNT_PER_S)
    assert relay.to_pass_on(later_ns) == [wire(over)], "the newest alone"
    assert relay.to_pass_on(later_ns + NS_PER_S) == []
    assert ACCOUNT_BURST >= MAX_SHEETS_PER_ACCOUNT


def test_what_one_peer_may_not_bring_another_may() -> None:
    relay = Relay(Book(bytes(32), max_per_source=2), lambda: 0.5)
    wires = [wire(node=number) for number in range(4)]
    outcomes = [take(relay, each, "forwarder") for each in wires]
    assert outcomes == [Outcome.NEW, Outcome.NEW, Outcome.BOOK, Outcome.BOOK]
    assert take(relay, wires[2], "another") is Outcome.NEW


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_SEEN", "MAX_TURNED_AWAY", "MAX_NEIGHBOURS", "MAX_LATER"):
        monkeypatch.setattr(relay_module, name, 3)
    relay = Relay(book(), lambda: 0.5)
    for number in range(1, 9):
        take(relay, wire(node=number))
        relay.connected(f"peer {number}", "")
        sheet = party(number).sheet(lifetime_ns=1)
        assert relay.enter(sheet, "peer", NOW_NS + 1).outcome is Outcome.CLOCK
        assert relay.enter(party(100 + number).sheet(), "peer", NOW_NS).outcome is Outcome.NEW
    kept = relay.gate, relay._turned_away, relay.neighbours, relay._later
    assert [len(each) for each in kept] == [3] * 4


def test_books_are_compared_with_three_neighbours_in_turn(relay: Relay) -> None:
    for number in range(8):
        relay.connected(str(number), "")
    first = relay.due(NOW_NS)
    assert len(set(first)) == COMPARED_AT_ONCE == 3
    assert relay.due(NOW_NS + NS_PER_S) == ()
    assert len(relay.due(NOW_NS + int(COMPARE_S * NS_PER_S))) == 3
    for number in range(7):
        relay.disconnected(str(number))
    assert relay.due(NOW_NS + int(2 * COMPARE_S * NS_PER_S)) == ("7",)


def test_every_neighbour_has_its_turn() -> None:
    numbers = iter(range(10**6))
    relay = Relay(book(), lambda: (next(numbers) * 0.618034) % 1)
    for number in range(20):
        relay.connected(str(number), "")
    met: set[str] = set()
    for turn in range(60):
        met.update(relay.due(NOW_NS + int(turn * COMPARE_S * NS_PER_S)))
    assert len(met) == 20


def test_nobody_compares_with_the_shunned(relay: Relay) -> None:
    relay.connected("peer", "")
    for _ in range(MAX_FAULTS):
        relay.fault("peer", NOW_NS)
    assert relay.due(NOW_NS) == ()


def test_what_replays_is_not_its_accounts_doing(relay: Relay) -> None:
    take(relay, wire(number=1000))
    for number in range(1, ACCOUNT_BURST + 2):
        assert take(relay, wire(number)) is Outcome.BOOK
    assert take(relay, wire(number=1001)) is Outcome.NEW


def test_what_comparing_brings_is_gossiped_unless_gossip_was_only_slower(relay: Relay) -> None:
    ripe_ns = NOW_NS + int(OVERTAKEN_S * NS_PER_S)
    for node in (1, 2):
        sheet = party(node).sheet(ask())
        assert relay.enter(sheet, "peer", NOW_NS).outcome is Outcome.NEW
    assert relay.to_pass_on(ripe_ns - 1) == []
    assert take(relay, party(1).sheet(ask()).sealed.wire) is Outcome.NEW, "it is passed on now"
    assert relay.to_pass_on(ripe_ns) == [party(2).sheet(ask()).sealed.wire]
    assert relay.to_pass_on(ripe_ns + NS_PER_S) == []
    assert take(relay, party(2).sheet(ask()).sealed.wire) is Outcome.KNOWN, "it was passed on"


def test_much_news_at_once_goes_on_by_comparing(relay: Relay) -> None:
    relay.connected("peer", "")
    relay.due(NOW_NS)
    for node in range(PASSED_ON_BURST + 1):
        relay.enter(party(node).sheet(ask()), "peer", NOW_NS)
    ripe_ns = NOW_NS + int(OVERTAKEN_S * NS_PER_S)
    assert len(relay.to_pass_on(ripe_ns)) == PASSED_ON_BURST
    assert relay.to_pass_on(ripe_ns + NS_PER_S) == []
    assert relay.due(ripe_ns + int(COMPARE_SOON_S * NS_PER_S)) == ("peer",)


def test_what_is_gone_is_not_passed_on(relay: Relay) -> None:
    assert relay.enter(SELLER.sheet(ask(1)), "peer", NOW_NS).outcome is Outcome.NEW
    assert relay.enter(SELLER.sheet(ask(2)), "peer", NOW_NS).outcome is Outcome.PROOF
    assert relay.to_pass_on(NOW_NS + NS_PER_S) == []
    assert not relay._later


def test_a_new_proof_is_handed_on_soon(relay: Relay) -> None:
    relay.connected("peer", "")
    relay.due(NOW_NS)
    proof = book(SELLER.sheet(ask(1))).apply(SELLER.sheet(ask(2)), NOW_NS)
    assert isinstance(proof, Equivocation)
    assert relay.enter_proof(proof, "peer", NOW_NS)
    assert not relay.enter_proof(proof, "peer", NOW_NS)
    assert relay.due(NOW_NS + int(COMPARE_SOON_S * NS_PER_S)) == ("peer",)
    assert relay.score("peer", NOW_NS) == MAX_FAULTS


def test_by_comparing_a_neighbour_brings_a_book_and_then_no_more_than_by_gossip() -> None:
    """Else whoever has many identities would renew all their sheets at each comparison."""
    relay = Relay(book(), lambda: 0.0)
    nodes = [number.to_bytes(32, "big") for number in range(MAX_SHEETS)]
    assert relay.sheets_to_ask(list(nodes), "peer", NOW_NS) == tuple(nodes)
    assert relay.sheets_to_ask(list(nodes), "peer", NOW_NS) == ()
    later_ns = NOW_NS + 2 * NS_PER_S
    asked = relay.sheets_to_ask(list(nodes), "peer", later_ns)
    assert len(set(asked)) == 2 * FORWARDER_PER_S
    assert relay.sheets_to_ask(list(nodes), "other", later_ns) == tuple(nodes)


def test_which_of_too_many_are_asked_for_is_left_to_chance() -> None:
    """Whoever lists first, or has the lowest key, gains nothing by it."""
    drawn = set()
    for chance in (0.0, 0.3, 0.6, 0.9):
        relay = Relay(book(), lambda chance=chance: chance)  # type: ignore[misc]
        nodes = [number.to_bytes(32, "big") for number in range(MAX_SHEETS)]
        relay.sheets_to_ask(list(nodes), "peer", NOW_NS)
        drawn.add(relay.sheets_to_ask(nodes, "peer", NOW_NS + NS_PER_S)[0])
    assert len(drawn) == 4


def test_by_comparing_a_neighbour_brings_a_bounded_number_of_proofs(relay: Relay) -> None:
    nodes = [number.to_bytes(32, "big") for number in range(MAX_PROOFS + 1)]
    assert len(relay.proofs_to_ask(list(nodes), "peer", NOW_NS)) == MAX_PROOFS
    assert relay.proofs_to_ask(list(nodes), "peer", NOW_NS) == ()
    later_ns = NOW_NS + int(8 * NS_PER_S)
    assert len(relay.proofs_to_ask(list(nodes), "peer", later_ns)) == 8 * PROOFS_PER_S
