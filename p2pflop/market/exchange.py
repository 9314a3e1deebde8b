"""How two nodes make their books whole: one says what it holds, each asks for what it lacks.

Sans-IO, as ``relay``: an ``Exchange`` is one side of one comparison; it is given what the other
side sent and gives the frames to send. Turns are strict, so neither side ever sends while the other
does, and neither can be blocked by the other::

    dialler                                    listener
    Outline                                 ->
                                            <- Outline, and if they differ: Listing...
    Listing..., Want                        ->
                                            <- Want, Parcel...   (what the dialler wants)
    Parcel...   (what the listener wants)   ->

An **Outline** has a hash of each bucket of the book and one of the proofs. Equal ones end it: two
books that are alike cost one round trip and 8 KiB. A **Listing** names (node, number, id) of every
sheet in the buckets that differ, and who is convicted of equivocation if that differs. A **Want**
names what of this the other side would like to have, and a **Parcel** brings it.

A peer that says more than there can be, sends what nobody asked for, or sends what is wrong is at
fault (``relay``). One with more sheets than there is room for is heard no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Annotated, ClassVar, Final

import msgspec

from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.market.book import MAX_PROOFS, MAX_SHEETS, open_equivocation
from p2pflop.market.gate import Outcome
from p2pflop.market.relay import MAX_SHEET_WIRE_BYTES, OpenedProof, OpenedSheet, Opener, Relay
from p2pflop.market.sheets import open_sheet
from p2pflop.market.views import BUCKET_HASH_BYTES, BUCKETS, BookView
from p2pflop.units import KIB, MIB
from p2pflop.wire import U63, Hash, Key, Record, decode, encode

OUTLINE_BYTES: Final = BUCKETS * BUCKET_HASH_BYTES
_BUCKETS: Final = Struct(f"{BUCKET_HASH_BYTES}s")
MAX_SUMMARIES_A_PAGE: Final = 8_192
MAX_SHEETS_A_FRAME: Final = 64
MAX_PROOFS_A_FRAME: Final = 16
MAX_REFUSED_SHEETS: Final = 1_024
"""In one exchange: checked, but the book has no place for them. More are not looked at."""

# Not inside the classes: msgspec evaluates their annotations at the first use, not now.
_Wire = Annotated[bytes, msgspec.Meta(max_length=MAX_SHEET_WIRE_BYTES)]
_Wires = Annotated[tuple[_Wire, ...], msgspec.Meta(max_length=MAX_SHEETS_A_FRAME)]
_WirePairs = Annotated[tuple[tuple[_Wire, _Wire], ...], msgspec.Meta(max_length=MAX_PROOFS_A_FRAME)]
_Wanted = Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_SHEETS)]
_Accused = Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_PROOFS)]


class Outline(Record, frozen=True):
    """The first ``BUCKET_HASH_BYTES`` of each bucket's hash, and the hash of the convictions."""

    buckets: Annotated[bytes, msgspec.Meta(min_length=OUTLINE_BYTES, max_length=OUTLINE_BYTES)]
    proofs: Hash


class Summary(Record, frozen=True):
    """Which sheet of a node a book holds."""

    node: Key
    number: U63
    id: Hash


class Conviction(Record, frozen=True):
    """Up to which number a book refuses the sheets of a node that has equivocated."""

    node: Key
    number: U63


_Summaries = Annotated[tuple[Summary, ...], msgspec.Meta(max_length=MAX_SUMMARIES_A_PAGE)]
_Convictions = Annotated[tuple[Conviction, ...], msgspec.Meta(max_length=MAX_PROOFS)]


class Listing(Record, frozen=True):
    """A page of what a book holds where outlines differ, nodes rising. One page fits a frame."""

    MAX_BYTES: ClassVar[int] = MIB

    entries: _Summaries
    convictions: _Convictions
    last: bool


class Want(Record, frozen=True):
    """The nodes of which this side would like the sheet, and the proof."""

    MAX_BYTES: ClassVar[int] = MIB

    sheets: _Wanted
    proofs: _Accused


class Parcel(Record, frozen=True):
    """Envelopes of sheets, and pairs of them that prove an equivocation."""

    MAX_BYTES: ClassVar[int] = (
        MAX_SHEETS_A_FRAME * (MAX_SHEET_WIRE_BYTES + 8)
        + MAX_PROOFS_A_FRAME * 2 * (MAX_SHEET_WIRE_BYTES + 8)
        + KIB
    )

    sheets: _Wires
    proofs: _WirePairs
    last: bool


@dataclass(frozen=True, slots=True)
class OpenParcel:
    """A parcel whose sheets and proofs were opened, signatures and all."""

    sheets: tuple[OpenedSheet, ...]
    proofs: tuple[OpenedProof, ...]
    last: bool


Message = Outline | Listing | Want | OpenParcel


def read(kind: type[Record], frame: bytes, network: str, opener: Opener = open_sheet) -> Message:
    """Open a frame. Raises ProtocolError.

    Touches no state and costs up to two signature checks a sheet or proof: may be called in a
    thread.
    """
    message = decode(kind, frame)
    if isinstance(message, Parcel):
        opened = tuple(opener(wire, network) for wire in message.sheets)
        proofs = tuple(open_equivocation(*pair, network) for pair in message.proofs)
        return OpenParcel(opened, proofs, message.last)
    if isinstance(message, Outline | Listing | Want):
        return message
    raise TypeError(f"{kind.__name__} is not part of an exchange")


class Exchange:
    """One side of a comparison with ``peer``.

    ``expects`` is the kind of the next frame from the other side; ``done`` ends the conversation
    once the frames that were given have been sent. The book may change meanwhile: what was gone
    when it was asked for is not sent.
    """

    def __init__(self, relay: Relay, peer: str, *, dialling: bool) -> None:
        self.expects: type[Record] = Outline
        self.done = False
        self.news = 0
        self._relay = relay
        self._peer = peer
        self._dialling = dialling
        self._ours: Outline | None = None
        self._view = BookView((), 0)
        self._differing: tuple[int, ...] = ()
        self._proofs_differ = False
        self._entries: list[Summary] = []
        self._convictions: list[Conviction] = []
        self._wanted: Want | None = None
        self._due_sheets = self._due_proofs = self._refused = 0

    def start(self, now_ns: int) -> Iterator[bytes]:
        """The first frames, at the dialler."""
        if self._dialling:
            yield encode(self._outline(now_ns))

    def receive(self, message: Message, now_ns: int) -> Iterator[bytes]:
        """What to send now. Raises ProtocolError, and ProviderError if there is no room for more.

        Everything that is given must be taken, also if it is nothing.
        """
        if isinstance(message, Outline):
            yield from self._on_outline(message, now_ns)
        elif isinstance(message, Listing):
            yield from self._on_listing(message, now_ns)
        elif isinstance(message, Want):
            yield from self._on_want(message, now_ns)
        else:
            yield from self._on_parcel(message, now_ns)

    def _outline(self, now_ns: int) -> Outline:
        book = self._relay.book
        self._view = book.view(now_ns)
        self._ours = Outline(self._view.outline, proofs_hash(book.convicted()))
        return self._ours

    def _on_outline(self, theirs: Outline, now_ns: int) -> Iterator[bytes]:
        ours = self._ours
        if ours is None:
            ours = self._outline(now_ns)
            yield encode(ours)
        if ours == theirs:
            self.done = True
            return
        pairs = zip(*(_BUCKETS.iter_unpack(o.buckets) for o in (ours, theirs)), strict=True)
        self._differing = tuple(number for number, (one, other) in enumerate(pairs) if one != other)
        self._proofs_differ = ours.proofs != theirs.proofs
        self.expects = Listing
        if not self._dialling:
            yield from self._listing()

    def _on_listing(self, page: Listing, now_ns: int) -> Iterator[bytes]:
        self._entries += page.entries
        self._convictions += page.convictions
        if len(self._entries) > MAX_SHEETS or len(self._convictions) > MAX_PROOFS:
            raise ProtocolError(f"{self._peer} says that it has too many sheets", peer=self._peer)
        if page.last:
            self.expects = Want
            if self._dialling:
                yield from self._listing()
                yield encode(self._want(now_ns))

    def _on_want(self, wanted: Want, now_ns: int) -> Iterator[bytes]:
        self.expects = Parcel
        if self._dialling:
            self._wanted = wanted
            return
        yield encode(self._want(now_ns))
        yield from self._pack(wanted, now_ns)

    def _on_parcel(self, parcel: OpenParcel, now_ns: int) -> Iterator[bytes]:
        self._due_sheets -= len(parcel.sheets)
        self._due_proofs -= len(parcel.proofs)
        is_empty = not parcel.sheets and not parcel.proofs
        if min(self._due_sheets, self._due_proofs) < 0 or (is_empty and not parcel.last):
            raise ProtocolError(f"{self._peer} sends what nobody asked for", peer=self._peer)
        for opened in parcel.sheets:
            outcome = self._relay.enter(opened, self._peer, now_ns).outcome
            self.news += outcome.is_passed_on
            self._refused += outcome in (Outcome.BOOK, Outcome.CLOCK)
        for proof in parcel.proofs:
            self.news += self._relay.enter_proof(proof, self._peer, now_ns)
        if self._relay.is_shunned(self._peer, now_ns):
            raise ProtocolError(f"{self._peer} sends bad sheets", peer=self._peer)
        if self._refused > MAX_REFUSED_SHEETS:
            raise ProviderError(f"{self._peer} has more sheets than there is room for")
        if parcel.last:
            self.done = True
            if self._wanted is not None:
                yield from self._pack(self._wanted, now_ns)

    def _listing(self) -> Iterator[bytes]:
        entries = [
            Summary(sheet.node, sheet.sheet.number, sheet.sealed.id)
            for bucket in self._differing
            for sheet in self._view.bucket(bucket)
        ]
        convicted = self._relay.book.convicted() if self._proofs_differ else {}
        convictions = tuple(Conviction(*each) for each in sorted(convicted.items()))
        for start in range(0, max(1, len(entries)), MAX_SUMMARIES_A_PAGE):
            page = tuple(entries[start : start + MAX_SUMMARIES_A_PAGE])
            last = start + MAX_SUMMARIES_A_PAGE >= len(entries)
            yield encode(Listing(page, convictions if last else (), last))

    def _want(self, now_ns: int) -> Want:
        relay, convicted = self._relay, self._relay.book.convicted()
        accused = [
            each.node for each in self._convictions if each.number > convicted.get(each.node, -1)
        ]
        apart = set(accused)
        newer = [
            entry.node
            for entry in self._entries
            if entry.node not in apart
            and relay.wants(entry.node, entry.number, entry.id, self._peer, now_ns)
        ]
        sheets = relay.sheets_to_ask(newer, self._peer, now_ns)
        proofs = relay.proofs_to_ask(accused, self._peer, now_ns)
        self._due_sheets, self._due_proofs = len(sheets), len(proofs)
        return Want(sheets, proofs)

    def _pack(self, wanted: Want, now_ns: int) -> Iterator[bytes]:
        """Parcels of what is still here, each filled up to its limits."""
        book = self._relay.book
        found = (book.proof(node) for node in wanted.proofs)
        proofs = [(proof.first, proof.second) for proof in found if proof is not None]
        live = (book.get(node, now_ns) for node in wanted.sheets)
        sheets = [sheet.sealed.wire for sheet in live if sheet is not None]
        frames = max(
            1, -(-len(sheets) // MAX_SHEETS_A_FRAME), -(-len(proofs) // MAX_PROOFS_A_FRAME)
        )
        for number in range(frames):
            yield encode(
                Parcel(
                    _slice(sheets, number, MAX_SHEETS_A_FRAME),
                    _slice(proofs, number, MAX_PROOFS_A_FRAME),
                    number == frames - 1,
                )
            )


def proofs_hash(convicted: dict[bytes, int]) -> bytes:
    """BLAKE3 over (node, number as 8 bytes big-endian) of each conviction, nodes rising."""
    return content_hash(
        b"".join(node + number.to_bytes(8, "big") for node, number in sorted(convicted.items()))
    )


def _slice(items: Sequence, number: int, size: int) -> tuple:  # type: ignore[type-arg]
    return tuple(items[number * size : (number + 1) * size])
