from __future__ import annotations

import hashlib

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.dht.manifest import (
    CHUNK_BYTES,
    MAX_BLOB_BYTES,
    MAX_CACHED_MANIFESTS,
    MAX_CHUNKS,
    Manifest,
    ManifestBuilder,
    ManifestCache,
    address_of,
    chunk_count,
    manifest_of,
    max_manifest_bytes,
)
from p2pflop.errors import ProtocolError
from p2pflop.wire import decode, encode

HASH = b"h" * 32


def _data(size: int) -> bytes:
    return hashlib.shake_128(size.to_bytes(8, "big")).digest(size)


def test_an_address_is_the_hash_of_the_record_that_the_design_gives() -> None:
    data = _data(CHUNK_BYTES + 3)
    chunks = [blake3(data[:CHUNK_BYTES]).digest(), blake3(data[CHUNK_BYTES:]).digest()]
    record = msgspec.msgpack.encode([1, len(data), CHUNK_BYTES, chunks])
    assert encode(manifest_of(data)) == record
    assert address_of(data) == blake3(record).digest() == manifest_of(data).address


def test_the_address_of_nothing_never_changes() -> None:
    assert manifest_of(b"").chunks == ()
    expected = "0d104c20badd76a9f02c00da63280b51191db6b00be63c37e8f3ede99597c6b3"
    assert address_of(b"").hex() == expected


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_chunks_at_the_edges(size: int) -> None:
    data = _data(size)
    manifest = manifest_of(data)
    lengths = [manifest.chunk_length(index) for index in range(len(manifest.chunks))]
    assert sum(lengths) == size
    assert len(lengths) == chunk_count(size)
    assert all(0 < length <= CHUNK_BYTES for length in lengths)
    assert decode(Manifest, encode(manifest)) == manifest
    assert len(encode(manifest)) <= max_manifest_bytes(size)
    for index in (-1, len(lengths)):
        with pytest.raises(IndexError):
            manifest.chunk_length(index)


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES // 2), max_size=4))
def test_the_manifest_does_not_depend_on_how_the_bytes_arrive(sizes: list[int]) -> None:
    data = _data(sum(sizes))
    builder = ManifestBuilder()
    start = 0
    for size in sizes:
        builder.update(memoryview(data)[start : start + size])
        start += size
    assert builder.finish() == manifest_of(bytearray(data))
    assert builder.finish() == manifest_of(data)


def test_a_chunk_is_told_from_what_is_not() -> None:
    data = _data(CHUNK_BYTES + 10)
    manifest = manifest_of(data)
    assert manifest.is_chunk(1, data[CHUNK_BYTES:])
    assert not manifest.is_chunk(0, data[CHUNK_BYTES:])
    assert not manifest.is_chunk(1, data[CHUNK_BYTES:-1])
    assert not manifest.is_chunk(1, data[CHUNK_BYTES:-1] + b"\0")


@pytest.mark.parametrize(
    "fields",
    [
        [2, 0, CHUNK_BYTES, []],
        [1, 0, CHUNK_BYTES, [HASH]],
        [1, 1, CHUNK_BYTES, []],
        [1, 1, CHUNK_BYTES, [HASH, HASH]],
        [1, CHUNK_BYTES + 1, CHUNK_BYTES, [HASH]],
        [1, 1, CHUNK_BYTES // 2, [HASH]],
        [1, 1, 0, [HASH]],
        [1, 1, CHUNK_BYTES, [HASH[:-1]]],
        [1, -1, CHUNK_BYTES, []],
        [1, MAX_BLOB_BYTES + 1, CHUNK_BYTES, []],
        [1, 1, CHUNK_BYTES],
        [1, 1, CHUNK_BYTES, [HASH], 0],
        "manifest",
    ],
)
def test_manifests_that_are_none_are_refused(fields: object) -> None:
    with pytest.raises(ProtocolError):
        decode(Manifest, msgspec.msgpack.encode(fields))


def test_a_second_encoding_of_a_manifest_is_refused() -> None:
    good = encode(manifest_of(b"x"))
    assert good[:3] == b"\x94\x01\x01"
    with pytest.raises(ProtocolError):
        decode(Manifest, b"\x94\x01\xcc\x01" + good[3:])


def test_the_largest_blob_has_a_manifest_and_a_larger_one_has_not() -> None:
    count = chunk_count(MAX_BLOB_BYTES)
    largest = Manifest(1, MAX_BLOB_BYTES, CHUNK_BYTES, (HASH,) * count)
    assert decode(Manifest, encode(largest)) == largest
    with pytest.raises(ValueError, match="over"):
        Manifest(1, MAX_BLOB_BYTES + 1, CHUNK_BYTES, (HASH,) * (count + 1))


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        record = decode(Manifest, data)
    except ProtocolError:
        return
    assert encode(record) == data


def test_the_cache_of_manifests_drops_what_was_not_used_for_longest() -> None:
    cache = ManifestCache()
    keys = [number.to_bytes(32, "big") for number in range(MAX_CACHED_MANIFESTS + 1)]
    for key in keys[:-1]:
        cache.add(key, manifest_of(b""))
    assert cache.get(keys[0]) is not None
    cache.add(keys[-1], manifest_of(b""))
    assert cache.get(keys[0]) is not None
    assert cache.get(keys[1]) is None
    cache.drop(keys[0])
    assert cache.get(keys[0]) is None


def test_the_cache_of_manifests_bounds_their_hashes() -> None:
    cache = ManifestCache()
    half = Manifest(1, MAX_BLOB_BYTES // 2, CHUNK_BYTES, (HASH,) * (MAX_CHUNKS // 2))
    for name in (b"a", b"b", b"b", b"c"):
        cache.add(name, half)
    assert [cache.get(name) is not None for name in (b"a", b"b", b"c")] == [False, True, True]
