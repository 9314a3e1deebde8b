"""Collections: names to blobs, in one canonical record that is itself stored as a blob.

A folder, a state dict, the shards of a feed, the values that an output took step by step. What goes
by number is named by ``number_name``, so that the order of names is that of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.ids import HASH_BYTES
from p2pflop.units import MIB
from p2pflop.wire import U63, Hash, Record, Text, encode

COLLECTION_VERSION: Final = 1
MAX_COLLECTION_ENTRIES: Final = 2**16
_NUMBER_DIGITS: Final = 19


class CollectionEntry(Record, frozen=True):
    """One named blob. Names are relative slash paths, so that they are safe to show and to join."""

    name: Text
    address: Hash
    size_bytes: U63

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in self.name:
            raise ValueError(f"{self.name[:80]!r} is not a relative path")
        if not self.name.isprintable():
            raise ValueError(f"{self.name[:80]!r} is not printable")


class Collection(Record, frozen=True):
    """Names to blobs, sorted by name, no name twice."""

    MAX_BYTES: ClassVar[int] = 16 * MIB

    version: Literal[1]
    entries: Annotated[tuple[CollectionEntry, ...], msgspec.Meta(max_length=MAX_COLLECTION_ENTRIES)]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if any(later <= earlier for earlier, later in pairwise(names)):
            raise ValueError("names of a collection do not rise")

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs named here."""
        return sum(entry.size_bytes for entry in self.entries)


def collection_of(blobs: Mapping[str, tuple[bytes, int]]) -> Collection:
    """The collection of ``{name: (address, size_bytes)}``. Raises ValueError for an unfit name."""
    entries = tuple(CollectionEntry(name, *blobs[name]) for name in sorted(blobs))
    if len(entries) > MAX_COLLECTION_ENTRIES:
        raise ValueError(f"a collection has at most {MAX_COLLECTION_ENTRIES} entries")
    return Collection(COLLECTION_VERSION, entries)


def number_name(number: int) -> str:
    """What entry ``number`` is called where entries go by number: 19 digits."""
    return f"{number:0{_NUMBER_DIGITS}d}"


def numbered(numbers: Iterable[int], addresses: Iterable[bytes], size_bytes: int) -> Collection:
    """The collection of blobs of one size that go by ``numbers``, which rise."""
    return Collection(
        COLLECTION_VERSION,
        tuple(
            CollectionEntry(number_name(number), address, size_bytes)
            for number, address in zip(numbers, addresses, strict=True)
        ),
    )


def numbered_bytes(count: int, size_bytes: int) -> int:
    """The size of the encoding of a ``numbered`` collection of ``count`` blobs."""
    zeros = bytes(HASH_BYTES)
    none = len(encode(Collection(COLLECTION_VERSION, ())))
    one = len(encode(CollectionEntry(number_name(0), zeros, size_bytes)))
    # A msgpack array says its length in one byte up to 15, in three up to 65,535, then in five.
    head = 0 if count < 16 else 2 if count < 2**16 else 4
    return none + head + count * one
