"""Envelopes and records: one encoding, bounded, strictly signed."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import pytest

from p2pflop.errors import P2PFlopError, ProtocolError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey
from p2pflop.wire import (
    MAX_ENVELOPE_OVERHEAD_BYTES,
    MAX_EXT_BYTES,
    U63,
    Envelope,
    Ext,
    Record,
    SignedRecord,
    Text,
    decode,
    encode,
    envelope_kind,
    open_sealed,
    seal,
    signed_bytes,
)

KEY = PrivateKey(b"k" * 32)


class Point(Record, frozen=True):
    MAX_BYTES: ClassVar[int] = 64

    x: U63
    label: Text = ""


class Note(SignedRecord, frozen=True):
    KIND: ClassVar[str] = "note"
    KNOWN_EXT: ClassVar[frozenset[int]] = frozenset({3})
    MAX_BYTES: ClassVar[int] = 2048

    text: bytes
    ext: Ext = ()


class Other(SignedRecord, frozen=True):
    KIND: ClassVar[str] = "other"

    text: bytes
    ext: Ext = ()


def test_a_record_reads_back() -> None:
    assert decode(Point, encode(Point(5, "a"))) == Point(5, "a")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "nothing"),
        (b"\x92\xcc\x05\xa0", "a longer way to write 5"),
        (b"\x91\x05", "a missing default"),
        (b"\x93\x05\xa0\x05", "a field too many"),
        (b"\x92\x05\xa0\xc0", "bytes after the end"),
        (b"\x92\xff\xa0", "a negative number"),
        (b"\x92\xcf" + b"\xff" * 8 + b"\xa0", "a number of 64 bits"),
        (b"\x92\xcb\x40\x14\x00\x00\x00\x00\x00\x00\xa0", "a float that is whole"),
        (b"\x92\xc3\xa0", "a bool for a number"),
        (b"\x92\x05\xa1\xff", "bad UTF-8"),
        (b"\x82\xa1x\x05\xa5label\xa0", "a map"),
        (b"\x91" * 5000, "deep nesting"),
    ],
)
def test_only_the_one_encoding_is_accepted(data: bytes, what: str) -> None:
    with pytest.raises(ProtocolError):
        decode(Point, data)


def test_a_record_may_be_as_long_as_its_limit_and_no_longer() -> None:
    overhead = len(encode(Point(5, "a" * 40))) - 40
    exact = encode(Point(5, "a" * (Point.MAX_BYTES - overhead)))
    assert len(exact) == Point.MAX_BYTES
    assert decode(Point, exact).x == 5
    with pytest.raises(ProtocolError, match="over its limit"):
        decode(Point, encode(Point(5, "a" * (Point.MAX_BYTES - overhead + 1))))


def test_a_sealed_record_opens_with_the_same_id() -> None:
    sealed = seal(Note(b"hello"), KEY)
    opened = open_sealed(Note, sealed.wire)
    assert opened == sealed
    assert opened.signer == KEY.public_key
    body = encode(Note(b"hello"))
    assert opened.id == content_hash(signed_bytes("main", "note", KEY.public_key, body))


def test_another_network_does_not_accept_it() -> None:
    with pytest.raises(VerificationError):
        open_sealed(Note, seal(Note(b"hello"), KEY, "main").wire, "test")


def test_a_record_is_not_taken_for_another_kind() -> None:
    wire = seal(Note(b"hello"), KEY).wire
    with pytest.raises(ProtocolError, match="expected a other"):
        open_sealed(Other, wire)
    envelope = msgspec.msgpack.decode(wire, type=Envelope)
    renamed = encode(msgspec.structs.replace(envelope, kind="other"))
    with pytest.raises(VerificationError):
        open_sealed(Other, renamed)


def test_another_signer_makes_another_id() -> None:
    other = PrivateKey(b"o" * 32)
    assert seal(Note(b"x"), KEY).id != seal(Note(b"x"), other).id


def test_any_flipped_bit_is_refused() -> None:
    wire = seal(Note(b"hello"), KEY).wire
    for bit in range(len(wire) * 8):
        bad = bytearray(wire)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ProtocolError, VerificationError)):
            open_sealed(Note, bytes(bad))


def test_ext_ids_rise_and_even_strangers_are_let_through() -> None:
    fine = Note(b"", ((2, b"a"), (3, b"b"), (4, b"")))
    assert open_sealed(Note, seal(fine, KEY).wire).record == fine
    for ext in [((2, b""), (2, b"")), ((4, b""), (2, b""))]:
        with pytest.raises(ValueError, match="rise"):
            seal(Note(b"", ext), KEY)


def test_an_unknown_critical_ext_is_refused_on_arrival() -> None:
    class Newer(SignedRecord, frozen=True):
        KIND: ClassVar[str] = "note"
        KNOWN_EXT: ClassVar[frozenset[int]] = frozenset({5})

        text: bytes
        ext: Ext = ()

    wire = seal(Newer(b"", ((5, b"must be understood"),)), KEY).wire
    with pytest.raises(ProtocolError, match="critical ext 5"):
        open_sealed(Note, wire)


def test_ext_may_fill_its_limit_and_no_more() -> None:
    seal(Note(b"", ((2, b"a" * MAX_EXT_BYTES),)), KEY)
    with pytest.raises(ValueError, match="ext is over"):
        seal(Note(b"", ((2, b"a" * (MAX_EXT_BYTES + 1)),)), KEY)


def test_what_nobody_would_accept_is_not_signed() -> None:
    with pytest.raises(ValueError, match="over its limit"):
        seal(Note(b"a" * (Note.MAX_BYTES + 1)), KEY)


def test_an_integer_that_no_record_has_is_not_signed() -> None:
    class Count(SignedRecord, frozen=True):
        KIND: ClassVar[str] = "count"

        number: U63
        ext: Ext = ()

    assert seal(Count(2**63 - 1), KEY).record.number == 2**63 - 1
    for beyond in (2**63, 2**64, 10**40, -1):
        with pytest.raises(ValueError, match="Count"):
            seal(Count(beyond), KEY)


def test_an_envelope_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="over its limit"):
        open_sealed(Note, bytes(Note.MAX_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES + 1))


def test_the_largest_record_fits_its_envelope() -> None:
    overhead = len(encode(Note(b"a" * 1000))) - 1000
    sealed = seal(Note(b"a" * (Note.MAX_BYTES - overhead)), KEY)
    assert open_sealed(Note, sealed.wire) == sealed


def test_the_kind_of_an_envelope_can_be_read_without_trust() -> None:
    assert envelope_kind(seal(Note(b""), KEY).wire) == "note"
    with pytest.raises(P2PFlopError):
        envelope_kind(b"\xc1")
