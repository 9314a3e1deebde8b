"""Every signed record of the market: reads back, has one encoding, and no mutation of it passes."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.job.spec import Job
from p2pflop.keys import PrivateKey
from p2pflop.market import payments, records
from p2pflop.market.fills import check_bid, check_fill
from p2pflop.market.ledger import Entry
from p2pflop.market.ranking import Policy
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS, ask, bid, deals, party
from p2pflop.market.sheets import OpenSheet, check_sheet
from p2pflop.wire import Envelope, Record, SignedRecord, decode, encode, open_sealed, seal

U63 = st.integers(0, 2**63 - 1)
U32 = st.integers(0, 2**32 - 1)
HASH = st.binary(min_size=32, max_size=32)
NONCE = st.binary(min_size=16, max_size=16)
TEXT = st.text(max_size=200)
AMOUNT = st.integers(1, payments.MAX_PAYMENT_NUSD)
VERSION = st.just(1)
DELEGATION = st.binary(max_size=records.MAX_DELEGATION_BYTES)
EXT = st.dictionaries(
    st.integers(0, 2**31 - 1).map(lambda n: 2 * n), st.binary(max_size=64), max_size=4
).map(lambda ext: tuple(sorted(ext.items())))
KEYS = st.integers(0, 255).map(lambda n: PrivateKey(bytes([n]) * 32))

ASKS = st.builds(records.Ask, U32, HASH, U63, U63, U63, U63, U63, U63, U63, U63, U63)
WISHES = st.builds(records.Wish, U32, HASH, U63, U63, U63, U63, U63, HASH, U63)
JOBS = st.builds(Job, HASH, U63, st.integers(1, 2**40))
COSTS = st.builds(records.CostLine, HASH, U63, U63, U63)
TERMS = st.builds(records.Terms, U63, U63, U63, U63)

SIGNED: st.SearchStrategy[SignedRecord] = st.one_of(
    st.builds(records.Delegation, VERSION, HASH, U63, U63, EXT),
    st.builds(
        records.Sheet,
        VERSION,
        U63,
        U63,
        U63,
        DELEGATION,
        st.lists(TEXT, max_size=4).map(tuple),
        st.lists(ASKS, max_size=4).map(tuple),
        st.lists(WISHES, max_size=4).map(tuple),
        EXT,
    ),
    st.builds(
        records.Bid,
        VERSION,
        HASH,
        U63,
        U32,
        NONCE,
        HASH,
        JOBS,
        HASH,
        TEXT,
        st.lists(COSTS, max_size=4).map(tuple),
        TERMS,
        U63,
        U63,
        HASH,
        HASH,
        DELEGATION,
        EXT,
    ),
    st.builds(records.Quote, VERSION, HASH, HASH, ASKS, U63, NONCE, EXT.map(lambda ext: ext[:1])),
    st.builds(records.Fill, VERSION, HASH, U63, U63, DELEGATION, EXT),
    st.builds(records.Reject, VERSION, HASH, TEXT, st.binary(max_size=300), EXT),
    st.builds(records.Confirm, VERSION, HASH, EXT),
    st.builds(records.Commit, VERSION, HASH, HASH, EXT),
    st.builds(records.Receipt, VERSION, HASH, U32, U63, HASH, U63, HASH, HASH, U63, EXT),
    st.builds(records.Abandon, VERSION, HASH, U63, HASH, TEXT, EXT),
    st.builds(records.Trade, VERSION, HASH, HASH, U63, U63, U32, DELEGATION, EXT),
    *(
        st.builds(kind, VERSION, HASH, HASH, AMOUNT, U63, TEXT, DELEGATION, EXT)
        for kind in (payments.PaymentClaim, payments.PaymentAck, payments.PaymentRefusal)
    ),
)
KINDS: list[type[SignedRecord]] = [
    records.Delegation,
    records.Sheet,
    records.Bid,
    records.Quote,
    records.Fill,
    records.Reject,
    records.Confirm,
    records.Commit,
    records.Receipt,
    records.Abandon,
    records.Trade,
    payments.PaymentClaim,
    payments.PaymentAck,
    payments.PaymentRefusal,
]
UNSIGNED: list[type[Record]] = [Policy, Entry, Envelope, records.Ask, Job]
SELLER, BUYER = party(2), party(1)
SHEET = SELLER.sheet(ask(), addresses=["/ip4/127.0.0.1/tcp/1"])
BID = bid(BUYER, deals(SHEET)[0])


@given(SIGNED, KEYS)
def test_a_signed_record_reads_back_and_names_its_signer(
    record: SignedRecord, key: PrivateKey
) -> None:
    sealed = seal(record, key)
    opened = open_sealed(type(record), sealed.wire)
    assert opened == sealed
    assert opened.signer == key.public_key
    assert encode(opened.record) == encode(record)


@given(SIGNED, KEYS, st.data())
def test_a_mutated_envelope_never_opens(record: SignedRecord, key: PrivateKey, data: Any) -> None:
    wire = seal(record, key).wire
    mutant = bytearray(wire)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                mutant[at] = data.draw(st.integers(0, 255))
            case 1:
                del mutant[at]
            case _:
                mutant.insert(at, data.draw(st.integers(0, 255)))
        if not mutant:
            break
    if bytes(mutant) == wire:
        return
    with pytest.raises((ProtocolError, VerificationError)):
        open_sealed(type(record), bytes(mutant))


@given(SIGNED, st.sampled_from(KINDS))
def test_a_record_opens_as_its_own_kind_only(
    record: SignedRecord, kind: type[SignedRecord]
) -> None:
    wire = seal(record, BUYER.node).wire
    if kind is type(record):
        open_sealed(kind, wire)
    else:
        with pytest.raises(ProtocolError):
            open_sealed(kind, wire)


@given(SIGNED, st.data())
def test_a_second_encoding_of_a_signed_body_is_refused(record: SignedRecord, data: Any) -> None:
    """Even signed by its owner: two encodings of one value would have two ids."""
    body = encode(record)
    values = msgspec.msgpack.decode(body)
    other = data.draw(
        st.sampled_from(
            [
                b"\xdc" + len(values).to_bytes(2, "big") + body[1:]
                if body[0] & 0xF0 == 0x90
                else body + b"\0",
                body + b"\xc0",
                body[:1] + b"\xcc\x01" + body[2:],
                msgspec.msgpack.encode(values[:-1]),
                msgspec.msgpack.encode([*values, 0]),
            ]
        )
    )
    with pytest.raises(ProtocolError):
        decode(type(record), other)


@given(st.sampled_from([*KINDS, *UNSIGNED]), st.binary(max_size=400))
def test_any_bytes_are_refused_with_a_reason_or_are_the_one_encoding(
    kind: type[Record], data: bytes
) -> None:
    with contextlib.suppress(ProtocolError):
        assert encode(decode(kind, data)) == data


@given(
    st.sampled_from([*KINDS, *UNSIGNED]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.binary(max_size=40)
        | TEXT,
        lambda inner: st.lists(inner, max_size=18) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=30,
    ),
)
def test_any_value_is_refused_with_a_reason_or_is_the_one_encoding(
    kind: type[Record], value: Any
) -> None:
    data = msgspec.msgpack.encode(value)
    with contextlib.suppress(ProtocolError):
        assert encode(decode(kind, data)) == data


@given(st.data())
@settings(max_examples=300)
def test_no_mutation_of_a_sheet_bid_or_fill_is_accepted(data: Any) -> None:
    wire = data.draw(st.sampled_from([SHEET.sealed.wire, BID.wire]))
    at = data.draw(st.integers(0, len(wire) - 1))
    mutant = bytearray(wire)
    mutant[at] ^= data.draw(st.integers(1, 255))
    spoiled = bytes(mutant)
    assert isinstance(check_sheet(spoiled, "main", NOW_NS), Rejected)
    assert isinstance(
        check_bid(spoiled, node=SELLER.node.public_key, sheets={1: SHEET.sheet}, now_ns=NOW_NS),
        Rejected,
    )
    assert isinstance(check_fill(spoiled, BID, SELLER.account.public_key, NOW_NS), Rejected)


@given(
    st.lists(ASKS, max_size=40).map(tuple),
    st.integers(-5, 2 * records.MAX_SHEET_LIFETIME_NS),
    st.integers(0, 3),
)
def test_a_sheet_that_passes_keeps_every_rule(
    asks: tuple[records.Ask, ...], lifetime_ns: int, who: int
) -> None:
    sheet = records.Sheet(
        version=1,
        number=1,
        issued_ns=NOW_NS,
        expires_ns=NOW_NS + max(0, lifetime_ns),
        delegation=party(who).delegation,
        addresses=(),
        asks=asks,
        wishes=(),
    )
    if len(asks) > records.MAX_SHEET_ORDERS:
        with pytest.raises(ValueError, match="not a valid Sheet"):
            seal(sheet, SELLER.node)
        return
    checked = check_sheet(seal(sheet, SELLER.node).wire, "main", NOW_NS)
    if isinstance(checked, OpenSheet):
        assert who == 2
        assert 0 < lifetime_ns <= records.MAX_SHEET_LIFETIME_NS
        assert len({made.number for made in asks}) == len(asks)
        assert all(made.valid_until_ns <= sheet.expires_ns for made in asks)
