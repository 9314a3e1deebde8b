"""A store on disk against a dict, through any sequence of calls and restarts."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pflop.dht.blobs import SMALL_BYTES
from p2pflop.dht.manifest import CHUNK_BYTES, address_of, manifest_of
from p2pflop.dht.store import FileStore
from p2pflop.errors import BlobNotFoundError

SIZES = (0, 7, SMALL_BYTES, SMALL_BYTES + 1, 2 * CHUNK_BYTES + 3)
DATA = [hashlib.shake_128(b"%d" % size).digest(size) for size in SIZES]
OWNERS = [b"", b"a" * 32, b"b" * 32]

which = st.integers(0, len(SIZES) - 1)
owners = st.sampled_from(OWNERS)


@dataclass
class _Expected:
    owner: bytes
    public: bool
    readers: set[bytes] = field(default_factory=set)


class StoreMachine(RuleBasedStateMachine):
    """Each rule runs in an event loop of its own on a store that is opened and closed for it, or
    kept open: what is on disk between rules is all there is."""

    @initialize()
    def start(self) -> None:
        self.home = tempfile.TemporaryDirectory()
        self.blobs: dict[int, _Expected] = {}
        self.partials: dict[tuple[int, bytes], set[int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.home.cleanup()

    def run_in_store(self, action: Callable[[FileStore], Awaitable[None]]) -> None:
        async def main() -> None:
            async with FileStore(Path(self.home.name)) as store:
                await action(store)

        trio.run(main)

    def expect(self, number: int, public: bool, owner: bytes) -> None:
        known = self.blobs.get(number)
        if known is None:
            self.blobs[number] = _Expected(owner, public)
        else:
            known.public |= public
            if owner not in (b"", known.owner):
                known.readers.add(owner)
            if not owner and known.owner:
                known.readers.add(known.owner)
                known.owner = b""
        self.partials.pop((number, owner), None)

    def may_use(self, number: int, owner: bytes) -> bool:
        known = self.blobs.get(number)
        return known is not None and (
            known.public or owner in (b"", known.owner) or owner in known.readers
        )

    @rule(number=which, public=st.booleans(), owner=owners)
    def put(self, number: int, public: bool, owner: bytes) -> None:
        async def action(store: FileStore) -> None:
            info = await store.put(DATA[number], public=public, owner=owner)
            assert info.address == address_of(DATA[number])

        self.run_in_store(action)
        self.expect(number, public, owner)

    @rule(number=which, public=st.booleans(), owner=owners, piece=st.integers(1, 2**20))
    def stream(self, number: int, public: bool, owner: bytes, piece: int) -> None:
        piece = max(piece, len(DATA[number]) // 50)

        async def action(store: FileStore) -> None:
            async with store.writer(public=public, owner=owner) as writer:
                for start in range(0, len(DATA[number]), piece):
                    await writer.write(DATA[number][start : start + piece])
                await writer.finish()

        self.run_in_store(action)
        self.expect(number, public, owner)

    @rule(number=which, owner=owners, chunks=st.sets(st.integers(0, 2)), finish=st.booleans())
    def fetch(self, number: int, owner: bytes, chunks: set[int], finish: bool) -> None:
        manifest = manifest_of(DATA[number])
        total = set(range(len(manifest.chunks)))
        key = (number, owner)

        async def action(store: FileStore) -> None:
            async with await store.begin(manifest, owner=owner) as partial:
                missing = {i for first, end in partial.missing() for i in range(first, end)}
                if self.may_use(number, owner):
                    assert missing == set()
                    return
                assert missing == total - self.partials.get(key, set())
                held = total - missing
                for index in total if finish else chunks & total:
                    start = index * CHUNK_BYTES
                    await partial.write_chunk(index, DATA[number][start : start + CHUNK_BYTES])
                    held.add(index)
                if finish:
                    await partial.finish()
                    self.expect(number, False, owner)
                elif len(DATA[number]) > SMALL_BYTES:
                    self.partials[key] = held

        self.run_in_store(action)

    @rule(number=which)
    def delete(self, number: int) -> None:
        async def action(store: FileStore) -> None:
            there = number in self.blobs or any(key[0] == number for key in self.partials)
            assert await store.delete(address_of(DATA[number])) is there

        self.run_in_store(action)
        self.blobs.pop(number, None)
        self.partials = {key: held for key, held in self.partials.items() if key[0] != number}

    @rule(number=which, public=st.booleans())
    def publish(self, number: int, public: bool) -> None:
        async def action(store: FileStore) -> None:
            if number in self.blobs:
                await store.set_public(address_of(DATA[number]), public)
                self.blobs[number].public = public
            else:
                with pytest.raises(BlobNotFoundError):
                    await store.set_public(address_of(DATA[number]), public)

        self.run_in_store(action)

    @rule(number=which, reader=st.sampled_from(OWNERS[1:]), take_back=st.booleans())
    def grant(self, number: int, reader: bytes, take_back: bool) -> None:
        async def action(store: FileStore) -> None:
            known = self.blobs.get(number)
            address = address_of(DATA[number])
            if take_back:
                await store.revoke(address, reader)
                if known is not None:
                    known.readers.discard(reader)
            elif known is not None:
                await store.grant(address, reader)
                known.readers.add(reader)

        self.run_in_store(action)

    @rule(number=which)
    def read(self, number: int) -> None:
        async def action(store: FileStore) -> None:
            address = address_of(DATA[number])
            if number in self.blobs:
                assert await store.get(address) == DATA[number]
                return
            with pytest.raises(BlobNotFoundError):
                await store.get(address)

        self.run_in_store(action)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "home"):
            return

        async def action(store: FileStore) -> None:
            infos = {info.address: info for info in await store.list()}
            assert set(infos) == {address_of(DATA[number]) for number in self.blobs}
            for number, known in self.blobs.items():
                info = infos[address_of(DATA[number])]
                assert (info.owner, info.public) == (known.owner, known.public)
                assert await store.may_read(info.address, b"") is known.public
                for reader in OWNERS[1:]:
                    expected = self.may_use(number, reader)
                    assert await store.may_read(info.address, reader) is expected
            sizes = [SIZES[number] for number in self.blobs]
            sizes += [SIZES[number] for number, _ in self.partials]
            statistics = store.statistics()
            assert statistics.used_bytes == sum(sizes)
            assert statistics.partials == len(self.partials)
            large = [size for size in sizes if size > SMALL_BYTES]
            assert len(list(store.folder.iterdir())) == len(large)

        self.run_in_store(action)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
