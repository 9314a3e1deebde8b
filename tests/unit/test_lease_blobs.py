"""Blobs of leases: whose they are, and until when."""

from __future__ import annotations

from p2pflop.dht.memory import MemoryStore
from p2pflop.node.lease_blobs import LeaseBlobs


async def test_a_blob_is_needed_while_a_lease_of_it_lasts() -> None:
    blobs = LeaseBlobs(MemoryStore(), lambda: 0)
    await blobs.hold(b"first", [b"a", b"b"])
    await blobs.hold(b"second", [b"b"])
    assert [blobs.needs(address) for address in (b"a", b"b", b"c")] == [True, True, False]
    blobs.let_go(b"first")
    assert [blobs.needs(address) for address in (b"a", b"b")] == [False, True]
    blobs.let_go(b"second")
    assert not blobs.needs(b"b")
    await blobs.hold(b"first", [b"a"])
    assert blobs.needs(b"a")
