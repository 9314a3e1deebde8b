"""Collections: one encoding, names that are safe, entries that go by number."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.errors import ProtocolError
from p2pflop.job.collection import (
    MAX_COLLECTION_ENTRIES,
    Collection,
    CollectionEntry,
    collection_of,
    numbered,
    numbered_bytes,
)
from p2pflop.wire import decode, encode

HASH = b"h" * 32


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        record = decode(Collection, data)
    except ProtocolError:
        return
    assert encode(record) == data


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
@pytest.mark.parametrize("size_bytes", [0, 127, 128, 2**16, 2**40])
def test_the_size_of_a_numbered_collection_is_known_before_its_blobs(
    count: int, size_bytes: int
) -> None:
    collection = numbered(range(5, 5 + count), [HASH] * count, size_bytes)
    assert len(encode(collection)) == numbered_bytes(count, size_bytes)


def test_a_collection_is_sorted_and_comes_back() -> None:
    collection = collection_of({"b/w": (HASH, 5), "a": (HASH, 2), "ä": (HASH, 1)})
    assert [entry.name for entry in collection.entries] == ["a", "b/w", "ä"]
    assert collection.size_bytes == 8
    assert decode(Collection, encode(collection)) == collection
    assert collection_of({}).size_bytes == 0


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a\\b", "a\0b", "a\nb", "x" * 201]
)
def test_names_that_could_leave_a_folder_are_refused(name: str) -> None:
    fields = [1, [[name, HASH, 1]]]
    with pytest.raises(ProtocolError):
        decode(Collection, msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"]])
def test_names_that_do_not_rise_are_refused(names: list[str]) -> None:
    with pytest.raises(ProtocolError):
        decode(Collection, msgspec.msgpack.encode([1, [[name, HASH, 1] for name in names]]))


def test_the_most_entries_of_a_collection() -> None:
    blobs = {f"{number:06}": (HASH, 1) for number in range(MAX_COLLECTION_ENTRIES)}
    assert len(decode(Collection, encode(collection_of(blobs))).entries) == MAX_COLLECTION_ENTRIES
    with pytest.raises(ValueError, match="most"):
        collection_of({**blobs, "one more": (HASH, 1)})
    entries = tuple(CollectionEntry(name, HASH, 1) for name in [*sorted(blobs), "one more"])
    with pytest.raises(ProtocolError):
        decode(Collection, encode(Collection(1, entries)))
