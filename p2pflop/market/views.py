"""What a book shows at a moment, and the index that makes the next moment cheap.

A buyer ranks and commits to a ``BookView``: the live sheets, nodes rising. Its **buckets** are 256
hashes, one for each first byte of a node key, over (node, number as 8 bytes big-endian, id) of the
sheets there; its **digest** is the hash of the buckets. So two books that differ in one sheet find
out where by comparing 8 KiB, and a new sheet costs the hash of its bucket, not of the book.

``Shelf`` keeps the live sheets in that order, and the asks of each class by price. A view takes
copies of what changed since the view before and shares the rest with it: nothing that a view holds
is ever changed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from p2pflop.ids import content_hash
from p2pflop.market.records import Ask
from p2pflop.market.sheets import OpenSheet

BUCKETS: Final = 256
BUCKET_HASH_BYTES: Final = 16
"""What an outline has of each."""
MIN_REBUILT: Final = 64
"""Up to so many changes between two views are made one by one."""

PricedAsk = tuple[int, bytes, int, OpenSheet, Ask]
"""Price, node, ask number: on a shelf no two are equal, so sorting never compares the rest."""


@dataclass(frozen=True)
class BookView:
    """The live sheets of a book at a moment, nodes rising. Replaying a decision needs no more.

    ``shelf`` has the index of just these sheets, if somebody keeps one.
    """

    sheets: tuple[OpenSheet, ...]
    at_ns: int
    shelf: ShelfIndex | None = field(default=None, repr=False, compare=False)

    @cached_property
    def index(self) -> ShelfIndex:
        """The buckets, and the asks of each class, cheapest price per PFLOP first."""
        return index_of(self.sheets) if self.shelf is None else self.shelf

    @property
    def has_limits(self) -> bool:
        """Whether any ask has a limit of its own."""
        return any(sheet.limits for sheet in self.sheets)

    @property
    def buckets(self) -> tuple[bytes, ...]:
        """See the head of this module."""
        return self.index.buckets

    @property
    def digest(self) -> bytes:
        """The hash of the buckets: names exactly these sheets."""
        return content_hash(b"".join(self.index.buckets))

    @cached_property
    def outline(self) -> bytes:
        """The first ``BUCKET_HASH_BYTES`` of each bucket's hash, in order."""
        return b"".join(digest[:BUCKET_HASH_BYTES] for digest in self.index.buckets)

    def bucket(self, number: int) -> tuple[OpenSheet, ...]:
        """The sheets of a bucket, nodes rising."""
        first = bisect_left(self.sheets, number, key=_bucket_of_sheet)
        return self.sheets[first : bisect_left(self.sheets, number + 1, key=_bucket_of_sheet)]

    @property
    def by_price(self) -> Mapping[bytes, list[PricedAsk]]:
        """The asks of each class, cheapest price per PFLOP first."""
        return self.index.by_price


@dataclass(frozen=True, slots=True)
class ShelfIndex:
    """Two ways into the sheets of a view. Not to be changed."""

    buckets: tuple[bytes, ...]
    by_price: Mapping[bytes, list[PricedAsk]]


def bucket_of(node: bytes) -> int:
    """Where a node belongs."""
    return node[0]


def _bucket_of_sheet(sheet: OpenSheet) -> int:
    return bucket_of(sheet.node)


def bucket_hash(sheets: Iterable[OpenSheet]) -> bytes:
    """The hash of one bucket, from its sheets, nodes rising."""
    return content_hash(
        b"".join(
            sheet.sealed.signer + sheet.sealed.record.number.to_bytes(8, "big") + sheet.sealed.id
            for sheet in sheets
        )
    )


def index_of(sheets: Iterable[OpenSheet]) -> ShelfIndex:
    """The index of exactly these sheets, nodes rising; also of ones that no book would hold."""
    buckets: list[list[OpenSheet]] = [[] for _ in range(BUCKETS)]
    by_price: dict[bytes, list[PricedAsk]] = {}
    for sheet in sheets:
        buckets[bucket_of(sheet.node)].append(sheet)
        for ask in sheet.sheet.asks:
            by_price.setdefault(ask.class_id, []).append(_priced(sheet, ask))
    for asks in by_price.values():
        asks.sort(key=lambda each: each[:3])
    return ShelfIndex(tuple(map(bucket_hash, buckets)), by_price)


_EMPTY_BUCKET: Final = bucket_hash(())


class Shelf:
    """Live sheets in order. ``put`` and ``drop`` only note what changed; ``view`` sorts it in."""

    def __init__(self) -> None:
        self._changed: dict[bytes, OpenSheet | None] = {}
        self._nodes: list[bytes] = []
        self._sheets: list[OpenSheet] = []
        self._by_price: dict[bytes, list[PricedAsk]] = {}
        self._buckets = [_EMPTY_BUCKET] * BUCKETS
        self._expiries: list[tuple[int, bytes]] = []
        self._view = BookView((), 0, ShelfIndex(tuple(self._buckets), {}))

    def put(self, sheet: OpenSheet) -> None:
        """Show ``sheet`` until it expires, instead of another one of its node."""
        self._changed[sheet.sealed.signer] = sheet

    def drop(self, node: bytes) -> None:
        """Show nothing of this node."""
        self._changed[node] = None

    @property
    def at_ns(self) -> int:
        """The time of the newest view. What had expired by then is not kept for an earlier one."""
        return self._view.at_ns

    def view(self, now_ns: int) -> BookView:
        """The sheets that are live at ``now_ns``, which is not before ``at_ns``."""
        while self._expiries and self._expiries[0][0] <= now_ns:
            node = heapq.heappop(self._expiries)[1]
            if node not in self._changed and self._is_expired(node, now_ns):
                self._changed[node] = None
        for node, sheet in self._changed.items():
            if sheet is not None and sheet.sealed.record.expires_ns <= now_ns:
                self._changed[node] = None
        if self._changed:
            index = self.index()
            self._view = BookView(tuple(self._sheets), now_ns, index)
        return self._view

    def index(self) -> ShelfIndex:
        """Sort in what changed, and give the index of all."""
        self._by_price = dict(self._by_price)
        owned: set[bytes] = set()
        many = len(self._changed) > max(MIN_REBUILT, len(self._nodes) // 8)
        touched = {bucket_of(node) for node in self._changed}
        if many:
            self._rebuild()
        else:
            for node, sheet in self._changed.items():
                self._replace(node, sheet, owned)
        self._changed.clear()
        for bucket in touched:
            first = bisect_left(self._nodes, bytes([bucket]))
            last = bisect_left(self._nodes, bytes([bucket + 1])) if bucket < BUCKETS - 1 else None
            self._buckets[bucket] = bucket_hash(self._sheets[first:last])
        if len(self._expiries) > 2 * len(self._nodes) + MIN_REBUILT:
            self._expiries = [(s.sealed.record.expires_ns, s.sealed.signer) for s in self._sheets]
            heapq.heapify(self._expiries)
        return ShelfIndex(tuple(self._buckets), self._by_price)

    def _is_expired(self, node: bytes, now_ns: int) -> bool:
        place = bisect_left(self._nodes, node)
        if place == len(self._nodes) or self._nodes[place] != node:
            return False
        return self._sheets[place].sealed.record.expires_ns <= now_ns

    def _replace(self, node: bytes, sheet: OpenSheet | None, owned: set[bytes]) -> None:
        place = bisect_left(self._nodes, node)
        if place < len(self._nodes) and self._nodes[place] == node:
            for ask in self._sheets[place].sheet.asks:
                asks = self._own(ask.class_id, owned)
                del asks[bisect_left(asks, (ask.price_nusd, node, ask.number))]
                if not asks:
                    del self._by_price[ask.class_id]
            del self._nodes[place], self._sheets[place]
        if sheet is not None:
            self._nodes.insert(place, node)
            self._sheets.insert(place, sheet)
            heapq.heappush(self._expiries, (sheet.sealed.record.expires_ns, node))
            for ask in sheet.sealed.record.asks:
                insort(self._own(ask.class_id, owned), _priced(sheet, ask))

    def _own(self, class_id: bytes, owned: set[bytes]) -> list[PricedAsk]:
        """The list of a class that no view has yet."""
        if class_id not in owned:
            owned.add(class_id)
            self._by_price[class_id] = list(self._by_price.get(class_id, ()))
        return self._by_price.setdefault(class_id, [])

    def _rebuild(self) -> None:
        shown = dict(zip(self._nodes, self._sheets, strict=True))
        for node, sheet in self._changed.items():
            if sheet is None:
                shown.pop(node, None)
            else:
                shown[node] = sheet
        self._nodes = sorted(shown)
        self._sheets = [shown[node] for node in self._nodes]
        self._by_price = {}
        for sheet in self._sheets:
            for ask in sheet.sealed.record.asks:
                self._by_price.setdefault(ask.class_id, []).append(_priced(sheet, ask))
        for asks in self._by_price.values():
            asks.sort()
        self._expiries = [(s.sealed.record.expires_ns, s.sealed.signer) for s in self._sheets]
        heapq.heapify(self._expiries)


def _priced(sheet: OpenSheet, ask: Ask) -> PricedAsk:
    return ask.price_nusd, sheet.sealed.signer, ask.number, sheet, ask
