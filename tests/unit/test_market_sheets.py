"""Which sheets are accepted, and which account stands behind them."""

from __future__ import annotations

import pytest

from p2pflop.market.records import (
    MAX_SHEET_BYTES,
    MAX_SHEET_LIFETIME_NS,
    MAX_SHEET_ORDERS,
    Ask,
    Rejected,
    Sheet,
    Wish,
)
from p2pflop.market.samples import ASK_LIFE_NS, CLASS_ID, NOW_NS, ROOT, ask, party
from p2pflop.market.sheets import (
    CLOCK_TOLERANCE_NS,
    OpenSheet,
    check_delegation,
    check_sheet,
    make_delegation,
)
from p2pflop.wire import seal

SELLER = party(1)
UNTIL_NS = NOW_NS + MAX_SHEET_LIFETIME_NS


def reason(data: bytes, now_ns: int = NOW_NS) -> str:
    checked = check_sheet(data, "main", now_ns)
    assert isinstance(checked, Rejected)
    return checked.reason


def signed(**changes: object) -> bytes:
    """A sheet that nothing but the signature vouches for."""
    values: dict[str, object] = {
        "version": 1,
        "number": 1,
        "issued_ns": NOW_NS,
        "expires_ns": UNTIL_NS,
        "delegation": SELLER.delegation,
        "addresses": (),
        "asks": (ask(),),
        "wishes": (),
        **changes,
    }
    return seal(Sheet(**values), SELLER.node).wire  # type: ignore[arg-type]


def changed(**values: object) -> Ask:
    fields = {name: getattr(ask(), name) for name in Ask.__struct_fields__}
    return Ask(**{**fields, **values})


def wish(number: int = 9, **values: int) -> Wish:
    sizes = values.get("size", 1), 1, 1, 1
    limit_nusd, until_ns = values.get("limit", 10), values.get("until", UNTIL_NS)
    return Wish(number, CLASS_ID, limit_nusd, *sizes, ROOT, until_ns)


def test_a_sheet_opens_with_its_account_and_peer() -> None:
    sheet = SELLER.sheet(ask(1), ask(2), addresses=["/ip4/127.0.0.1/tcp/4001"])
    opened = check_sheet(sheet.sealed.wire, "main", NOW_NS)
    assert opened == sheet
    assert isinstance(opened, OpenSheet)
    assert opened.account == SELLER.account.public_key
    assert opened.node == SELLER.node.public_key
    assert opened.peer.startswith("12D3KooW")


def test_another_network_refuses_it() -> None:
    assert isinstance(check_sheet(SELLER.sheet(ask()).sealed.wire, "test", NOW_NS), Rejected)


def test_prices_are_rounded_when_an_ask_is_made() -> None:
    made = ask(1, 1_234_567, setup_nusd=9_999)
    assert (made.price_nusd, made.setup_nusd) == (1_230_000, 10_000)


@pytest.mark.parametrize(
    "field", ["price_nusd", "setup_nusd", "min_charge_nusd", "byte_price_nusd"]
)
def test_four_digits_are_refused_in_every_price(field: str) -> None:
    assert "three significant digits" in reason(signed(asks=(changed(**{field: 1234}),)))


def test_the_clock_may_be_off_by_the_tolerance_and_no_more() -> None:
    wire = signed()
    assert isinstance(check_sheet(wire, "main", NOW_NS - CLOCK_TOLERANCE_NS), OpenSheet)
    assert "future" in reason(wire, NOW_NS - CLOCK_TOLERANCE_NS - 1)


def test_a_sheet_lives_until_it_expires() -> None:
    wire = signed()
    assert isinstance(check_sheet(wire, "main", UNTIL_NS - 1), OpenSheet)
    assert "expired" in reason(wire, UNTIL_NS)


def test_a_sheet_lives_for_an_hour_at_most() -> None:
    assert isinstance(check_sheet(signed(expires_ns=UNTIL_NS), "main", NOW_NS), OpenSheet)
    assert "hour" in reason(signed(expires_ns=UNTIL_NS + 1))
    assert "hour" in reason(signed(issued_ns=UNTIL_NS, expires_ns=UNTIL_NS), UNTIL_NS - 1)


def test_a_sheet_has_up_to_its_limit_of_orders_of_both_kinds() -> None:
    asks = tuple(ask(number) for number in range(MAX_SHEET_ORDERS - 1))
    full = signed(asks=asks, wishes=(wish(100),))
    assert isinstance(check_sheet(full, "main", NOW_NS), OpenSheet)
    assert "orders" in reason(signed(asks=asks, wishes=(wish(100), wish(101))))


def test_a_sheet_over_its_size_is_not_even_signed() -> None:
    addresses = tuple("a" * 200 for _ in range(8))
    asks = tuple(
        changed(
            number=2**32 - 1 - number,
            memory_bytes=2**62,
            flop_per_byte=2**62,
            flop_per_s=2**62,
        )
        for number in range(MAX_SHEET_ORDERS)
    )
    assert len(signed(asks=asks, addresses=addresses)) < MAX_SHEET_BYTES
    with pytest.raises(ValueError, match="over its limit"):
        signed(
            ext=((2, b"a" * 1024),),
            asks=asks,
            wishes=tuple(wish(n) for n in range(32)),
            addresses=addresses,
        )


def test_orders_have_numbers_of_their_own() -> None:
    assert "alike" in reason(signed(asks=(ask(1), ask(1))))
    assert "alike" in reason(signed(asks=(ask(1),), wishes=(wish(1),)))


def test_orders_do_not_outlive_their_sheet() -> None:
    assert isinstance(
        check_sheet(signed(asks=(ask(valid_until_ns=UNTIL_NS),)), "main", NOW_NS), OpenSheet
    )
    assert "outlives" in reason(signed(asks=(ask(valid_until_ns=UNTIL_NS + 1),)))
    assert "firm" in reason(signed(asks=(ask(firm_until_ns=NOW_NS + ASK_LIFE_NS + 1),)))
    assert "outlives" in reason(signed(wishes=(wish(until=UNTIL_NS + 1),)))
    assert "digits" in reason(signed(wishes=(wish(limit=1234),)))
    assert "digits" in reason(signed(wishes=(wish(size=1234),)))


@pytest.mark.parametrize("address", ["/ip4/1.2.3.4/\x00", "/ip4/\n", "/dns/é", "\x7f"])
def test_addresses_are_printable_ascii(address: str) -> None:
    assert "address" in reason(signed(addresses=(address,)))


def test_a_node_without_a_delegation_to_it_is_refused() -> None:
    assert "another node" in reason(signed(delegation=party(2).delegation))
    assert "delegation" in reason(signed(delegation=b""))
    forged = bytearray(SELLER.delegation)
    forged[-1] ^= 1
    assert "delegation" in reason(signed(delegation=bytes(forged)))


def test_a_delegation_covers_the_whole_life_of_the_sheet() -> None:
    def delegated(from_ns: int, until_ns: int) -> bytes:
        return signed(
            delegation=make_delegation(SELLER.account, SELLER.node.public_key, from_ns, until_ns)
        )

    assert isinstance(check_sheet(delegated(NOW_NS, UNTIL_NS), "main", NOW_NS), OpenSheet)
    assert "cover" in reason(delegated(NOW_NS + 1, UNTIL_NS))
    assert "cover" in reason(delegated(NOW_NS, UNTIL_NS - 1))


def test_a_node_cannot_delegate_for_an_account_that_is_not_its_own() -> None:
    """What is signed decides who answers: a self-made delegation names its maker as account."""
    data = make_delegation(SELLER.node, SELLER.node.public_key, 0, 10)
    assert check_delegation(data, SELLER.node.public_key, 0, 10) == SELLER.node.public_key
    assert check_delegation(data, SELLER.node.public_key, 0, 10) != SELLER.account.public_key


def test_a_maker_hears_why_its_sheet_would_be_refused() -> None:
    with pytest.raises(ValueError, match="alike"):
        SELLER.sheet(ask(1), ask(1))
    with pytest.raises(ValueError, match="hour"):
        SELLER.sheet(ask(1), lifetime_ns=MAX_SHEET_LIFETIME_NS + 1)
