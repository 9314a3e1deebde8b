"""The order book: the latest sheet of every node, within bounds that nobody can buy or search for.

Theory of operation
-------------------
One entry a node. A higher number replaces a lower one; two bodies under one number are
**equivocation**: both go, the pair of envelopes is kept as proof, and numbers up to that one stay
refused. An entry is kept after its sheet has expired for as long as an older, longer-lived sheet of
the same node could be replayed.

Space goes by identity, never by price. Attested accounts come first; strangers share what is left,
at most ``max_strangers``. Each account may fill ``max_per_account`` places, and no more than
``max_nodes`` says: as many nodes as it is attested slots. Where too many compete,
those with the lowest hash of (account, node) stay, keyed with this book's own secret, so that
nobody can search for an identity that always wins, and each stranger's chance is the same.

Identities are free, so chances alone would give the book to whoever makes the most of them:

- The node's **own** sheet always has its place.
- **Known** strangers keep theirs: those for whom ``is_known`` speaks (connected, bought from), and
  those whose sheets have been here for ``KNOWN_AFTER_NS``, first come first kept. They may fill
  ``max_known`` places; the rest is for newcomers, who compete by hash.
- A **source**, the peer that brings sheets, may bring ``max_per_source`` nodes that are new to the
  book within ``SOURCE_WINDOW_NS``; what it renews does not count.

``view(now_ns)`` is what a buyer ranks and commits to: its digest names exactly its sheets.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.market.records import MAX_SHEET_LIFETIME_NS, Rejected, Sheet
from p2pflop.market.sheets import OpenSheet, open_sheet
from p2pflop.market.views import BookView, Shelf
from p2pflop.units import NS_PER_S
from p2pflop.wire import DEFAULT_NETWORK, Sealed, open_sealed

MAX_SHEETS: Final = 16_384
MAX_STRANGERS: Final = 4_096
MAX_SHEETS_PER_ACCOUNT: Final = 64
MAX_PROOFS: Final = 256
SECRET_BYTES: Final = 32
MAX_KNOWN: Final = 3_072
KNOWN_AFTER_NS: Final = 900 * NS_PER_S
MAX_NEW_PER_SOURCE: Final = 1_024
SOURCE_WINDOW_NS: Final = 3_600 * NS_PER_S
"""As long as a sheet lives: what a source brought is gone when it may bring as much again."""
MAX_SOURCES: Final = 4_096
"""Remembered; more than can be connected within a window of ordinary life."""

Place = tuple[bytes, bytes]
"""The keyed hash that orders a group, and the node."""

IsAttested = Callable[[bytes, int], bool]
MaxNodes = Callable[[bytes, int], int]
IsKnown = Callable[[OpenSheet], bool]


@dataclass(frozen=True, slots=True)
class Applied:
    """The sheet is in the book. ``changed`` is False if it already was."""

    changed: bool


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two envelopes in which one node signed different sheets under one number.

    Either could be replayed until ``until_ns``.
    """

    node: bytes
    number: int
    first: bytes
    second: bytes
    until_ns: int


@dataclass(frozen=True, slots=True)
class Dump:
    """A book at rest: envelopes of sheets, pairs of envelopes that prove equivocation."""

    sheets: tuple[bytes, ...]
    proofs: tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class _Entry:
    sheet: OpenSheet
    place: Place
    group: list[Place]
    since_ns: int


def nobody(_account: bytes, _now_ns: int) -> bool:
    """No account is attested."""
    return False


def nobody_known(_sheet: OpenSheet) -> bool:
    """No node is known but by how long its sheets have been here."""
    return False


def as_many_as_fit(_account: bytes, _now_ns: int) -> int:
    """The number of an account's nodes is not limited further."""
    return MAX_SHEETS_PER_ACCOUNT


class Book:
    """``secret`` is 32 random bytes of this node; ``own`` is its key, if it has sheets of its own.

    ``is_attested(account, now_ns)`` and ``is_known(sheet)`` rank space; ``max_nodes(account,
    now_ns)`` is how many nodes of an account have a place.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        network: str = DEFAULT_NETWORK,
        own: bytes = b"",
        is_attested: IsAttested = nobody,
        is_known: IsKnown = nobody_known,
        max_nodes: MaxNodes = as_many_as_fit,
        max_sheets: int = MAX_SHEETS,
        max_strangers: int = MAX_STRANGERS,
        max_known: int = MAX_KNOWN,
        max_per_account: int = MAX_SHEETS_PER_ACCOUNT,
        max_per_source: int = MAX_NEW_PER_SOURCE,
    ) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a book's secret has {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._network = network
        self._own = own
        self._is_attested = is_attested
        self._is_known = is_known
        self._max_nodes = max_nodes
        self._max_sheets = max_sheets
        self._max_strangers = max_strangers
        self._max_known = min(max_known, max_strangers)
        self._max_per_account = max_per_account
        self._max_per_source = max_per_source
        self._entries: dict[bytes, _Entry] = {}
        self._attested: list[Place] = []
        self._known: list[Place] = []
        self._new: list[Place] = []
        self._ours: list[Place] = []
        self._accounts: dict[bytes, list[Place]] = {}
        self._sources: dict[str, tuple[int, int]] = {}
        self._proofs: dict[bytes, Equivocation] = {}
        self._shelf = Shelf()

    def __len__(self) -> int:
        return len(self._entries)

    def apply(
        self, sheet: OpenSheet, now_ns: int, source: str = ""
    ) -> Applied | Equivocation | Rejected:
        """Take in a checked sheet. An Equivocation is new proof, to be passed on.

        ``source`` is the peer that brought it; without one, how many are new is not limited.
        """
        if sheet.sheet.expires_ns <= now_ns:
            return Rejected("sheet has expired")
        return self._take(sheet, now_ns, source)

    def apply_equivocation(
        self, found: Equivocation, now_ns: int
    ) -> Equivocation | Applied | Rejected:
        """Take in a proof that was opened. Applied means that the node was known for it."""
        if found.until_ns <= now_ns:
            return Rejected("equivocation: long expired")
        proof = self._proofs.get(found.node)
        if proof is not None and proof.number >= found.number:
            return Applied(changed=False)
        known = self._entries.get(found.node)
        if known is not None and known.sheet.sheet.number <= found.number:
            self._remove(found.node)
        self._keep_proof(found)
        return found

    def expire(self, now_ns: int) -> None:
        """Forget what no replay can bring back, and see again who is attested or known."""
        for node, entry in list(self._entries.items()):
            if _kept_until_ns(entry.sheet.sheet) <= now_ns:
                self._remove(node)
        # The longest here first: places for the known are theirs.
        for entry in sorted(self._entries.values(), key=lambda entry: entry.since_ns):
            if self._entries.get(entry.sheet.node) is entry:
                self._regroup(entry, now_ns)
        for account in [account for account, places in self._accounts.items() if len(places) > 1]:
            self._trim(account, now_ns)
        for source, (_, since_ns) in list(self._sources.items()):
            if since_ns + SOURCE_WINDOW_NS <= now_ns:
                del self._sources[source]
        for proof in self.proofs():
            if proof.until_ns <= now_ns:
                del self._proofs[proof.node]

    def get(self, node: bytes, now_ns: int) -> OpenSheet | None:
        """The live sheet of a node."""
        entry = self._entries.get(node)
        if entry is None or entry.sheet.sheet.expires_ns <= now_ns:
            return None
        return entry.sheet

    def nodes_of(self, account: bytes) -> list[bytes]:
        """The nodes of an account that have a place here."""
        return [node for _, node in self._accounts.get(account, ())]

    def sellers_of(self, account: bytes, now_ns: int) -> list[bytes]:
        """Those of them that offer something now."""
        return [node for node in self.nodes_of(account) if self._sells(node, now_ns)]

    def view(self, now_ns: int) -> BookView:
        """The live sheets, nodes rising, fixed: later changes of the book do not show in it."""
        if now_ns < self._shelf.at_ns:  # the clock went back, and some sheets live again
            self._shelf = Shelf()
            for entry in self._entries.values():
                self._shelf.put(entry.sheet)
        return self._shelf.view(now_ns)

    def digest(self, now_ns: int) -> bytes:
        """The digest of ``view(now_ns)``: what a bid commits to."""
        return self.view(now_ns).digest

    def proofs(self) -> tuple[Equivocation, ...]:
        """The kept equivocations, at most ``MAX_PROOFS``, oldest first."""
        return tuple(self._proofs.values())

    def lacks(self, node: bytes, number: int, sheet_id: bytes) -> bool:
        """Whether that sheet, which a peer says it has, is worth asking for."""
        proof = self._proofs.get(node)
        if proof is not None and number <= proof.number:
            return False
        known = self._entries.get(node)
        if known is None:
            return True
        held = known.sheet.sealed
        return (held.record.number, held.id) != (number, sheet_id) and held.record.number <= number

    def last_number(self, node: bytes) -> int:
        """The number of the newest sheet of ``node`` that is remembered, expired or not; or 0."""
        entry = self._entries.get(node)
        return 0 if entry is None else entry.sheet.sheet.number

    def convicted(self) -> dict[bytes, int]:
        """Nodes of which a proof is kept, and the number up to which their sheets are refused."""
        return {node: proof.number for node, proof in self._proofs.items()}

    def proof(self, node: bytes) -> Equivocation | None:
        """The kept proof against a node."""
        return self._proofs.get(node)

    def dump(self) -> Dump:
        """All that a restart must not forget, expired sheets that guard against replay too."""
        return Dump(
            tuple(entry.sheet.sealed.wire for entry in self._entries.values()),
            tuple((proof.first, proof.second) for proof in self.proofs()),
        )

    def load(self, dump: Dump, now_ns: int) -> None:
        """Take in a dump, checking everything in it; what does not check is left out."""
        for first, second in dump.proofs:
            proof = open_equivocation(first, second, self._network)
            if isinstance(proof, Equivocation):
                self.apply_equivocation(proof, now_ns)
        for wire in dump.sheets:
            sheet = open_sheet(wire, self._network)
            if isinstance(sheet, OpenSheet) and _kept_until_ns(sheet.sheet) > now_ns:
                self._take(sheet, now_ns, "")

    def _take(
        self, sheet: OpenSheet, now_ns: int, source: str
    ) -> Applied | Equivocation | Rejected:
        record, node = sheet.sheet, sheet.node
        proof = self._proofs.get(node)
        if proof is not None and record.number <= proof.number:
            return Rejected("node has equivocated about this number or a later one")
        known = self._entries.get(node)
        if known is not None:
            if known.sheet.sealed.id == sheet.sealed.id:
                return Applied(changed=False)
            if known.sheet.sheet.number > record.number:
                return Rejected(f"sheet {record.number} is older than {known.sheet.sheet.number}")
            if known.sheet.sheet.number == record.number:
                return self._convict(known.sheet, sheet)
        elif source and not self._may_bring(source, sheet, now_ns):
            return Rejected("its source has brought too many new nodes")
        return self._place(sheet, now_ns, now_ns if known is None else known.since_ns)

    def _may_bring(self, source: str, sheet: OpenSheet, now_ns: int) -> bool:
        """Whether ``source`` may bring one more node; if so, it is counted."""
        if self._is_known(sheet) or self._is_attested(sheet.account, now_ns):
            return True
        count, since_ns = self._sources.pop(source, (0, now_ns))
        if since_ns + SOURCE_WINDOW_NS <= now_ns:
            count, since_ns = 0, now_ns
        allowed = count < self._max_per_source
        self._sources[source] = (count + allowed, since_ns)
        if len(self._sources) > MAX_SOURCES:
            del self._sources[next(iter(self._sources))]
        return allowed

    def _place(self, sheet: OpenSheet, now_ns: int, since_ns: int) -> Applied | Rejected:
        node, account = sheet.node, sheet.account
        before = self._entries.get(node)
        was_known = before is not None and before.group is self._known
        self._remove(node)
        key = blake3(account + node, key=self._secret).digest()
        entry = _Entry(sheet, (key, node), self._new, since_ns)
        entry.group = self._known if was_known else self._group(entry, now_ns)
        self._entries[node] = entry
        self._shelf.put(sheet)
        insort(entry.group, entry.place)
        insort(self._accounts.setdefault(account, []), entry.place)
        self._make_space(account, now_ns)
        if node not in self._entries:
            return Rejected("the book has no space for this account")
        return Applied(changed=True)

    def _regroup(self, entry: _Entry, now_ns: int) -> None:
        group = self._group(entry, now_ns)
        if group is not entry.group:
            del entry.group[bisect_left(entry.group, entry.place)]
            entry.group = group
            insort(group, entry.place)
            self._make_space(entry.sheet.account, now_ns)

    def _group(self, entry: _Entry, now_ns: int) -> list[Place]:
        """Where an entry belongs now. Makes room among the known for whom ``is_known`` speaks."""
        if entry.sheet.node == self._own:
            return self._ours
        if self._is_attested(entry.sheet.account, now_ns):
            return self._attested
        room = self._max_known - len(self._known) + (entry.group is self._known)
        if self._is_known(entry.sheet):
            return self._known if room > 0 or self._displace() else self._new
        is_old = now_ns - entry.since_ns >= KNOWN_AFTER_NS
        return self._known if is_old and room > 0 else self._new

    def _displace(self) -> bool:
        """Turn the shortest here of the known, of whom nobody speaks, into a newcomer."""
        found = [self._entries[node] for _, node in self._known]
        found = [entry for entry in found if not self._is_known(entry.sheet)]
        if not found:
            return False
        last = max(found, key=lambda entry: (entry.since_ns, entry.place))
        del self._known[bisect_left(self._known, last.place)]
        last.group = self._new
        insort(self._new, last.place)
        return True

    def _make_space(self, account: bytes, now_ns: int) -> None:
        self._trim(account, now_ns)
        if len(self._known) + len(self._new) > self._max_strangers:
            self._remove((self._new or self._known)[-1][1])
        if len(self._entries) > self._max_sheets + len(self._ours):
            self._remove((self._new or self._known or self._attested)[-1][1])

    def _trim(self, account: bytes, now_ns: int) -> None:
        """Drop nodes of an account that have no place here, this node itself never.

        Of those that sell, the first ``max_nodes`` by their keys stay, in every book the same: they
        are all the account's own, and its slots go by the same order.
        """
        places = self._accounts[account]
        if len(places) > self._max_per_account:
            self._remove(next(node for _, node in reversed(places) if node != self._own))
        most = self._max_nodes(account, now_ns)
        if len(places) <= most:
            return
        selling = self.sellers_of(account, now_ns)
        selling.sort(key=lambda node: (node != self._own, node))
        for node in selling[max(most, selling[:1] == [self._own]) :]:
            self._remove(node)

    def _sells(self, node: bytes, now_ns: int) -> bool:
        sheet = self.get(node, now_ns)
        return sheet is not None and bool(sheet.sheet.asks)

    def _remove(self, node: bytes) -> None:
        entry = self._entries.pop(node, None)
        if entry is None:
            return
        self._shelf.drop(node)
        places = self._accounts[entry.sheet.account]
        for group in (entry.group, places):
            del group[bisect_left(group, entry.place)]
        if not places:
            del self._accounts[entry.sheet.account]

    def _convict(self, known: OpenSheet, other: OpenSheet) -> Equivocation:
        self._remove(known.node)
        proof = _equivocation(known.sealed, other.sealed)
        self._keep_proof(proof)
        return proof

    def _keep_proof(self, proof: Equivocation) -> None:
        self._proofs.pop(proof.node, None)
        while len(self._proofs) >= MAX_PROOFS:
            del self._proofs[next(iter(self._proofs))]
        self._proofs[proof.node] = proof


def open_equivocation(first: bytes, second: bytes, network: str) -> Equivocation | Rejected:
    """Check a proof from elsewhere, but for the clock. Costs two signature checks, no state."""
    try:
        one, other = (open_sealed(Sheet, data, network) for data in (first, second))
    except (ProtocolError, VerificationError) as error:
        return Rejected(f"equivocation: {error.message}")
    if one.signer != other.signer or one.record.number != other.record.number:
        return Rejected("equivocation: not one node and one number")
    if one.id == other.id:
        return Rejected("equivocation: both sheets are the same")
    return _equivocation(one, other)


def _equivocation(one: Sealed[Sheet], other: Sealed[Sheet]) -> Equivocation:
    until_ns = max(_kept_until_ns(one.record), _kept_until_ns(other.record))
    return Equivocation(one.signer, one.record.number, one.wire, other.wire, until_ns)


def _kept_until_ns(sheet: Sheet) -> int:
    # A sheet issued before this one may live an hour from then; this entry is what outranks it.
    return sheet.issued_ns + MAX_SHEET_LIFETIME_NS
