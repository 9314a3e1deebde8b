"""What a provider shows: a tensor that is not of its size leaves nothing behind, open files too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pflop.dht.manifest import CHUNK_BYTES, manifest_of
from p2pflop.dht.store import FileStore
from p2pflop.errors import ProtocolError, StoreError
from p2pflop.job.delivery import WantedBlob
from p2pflop.node import goods as goods_module
from p2pflop.node.goods import Goods

DATA = bytes(2 * CHUNK_BYTES)
MANIFEST = manifest_of(DATA)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
@pytest.mark.parametrize(
    ("bound", "error", "stays"), [(10, ProtocolError, False), (len(DATA), StoreError, True)]
)
async def test_a_fetch_that_failed_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int, error: type, stays: bool
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise StoreError("too large, or the disk is full")

    monkeypatch.setattr(goods_module, "fetch", fail)
    checked: Any = SimpleNamespace(job=SimpleNamespace(first_step=0))
    dialer: Any = None
    async with FileStore(tmp_path) as store:
        async with await store.begin(MANIFEST) as partial:
            await partial.write_chunk(0, DATA[:CHUNK_BYTES])
        goods = Goods(checked, store, dialer, "provider")
        wanted = WantedBlob(MANIFEST.address, bound, exact=True)
        before = open_files()
        for attempt in range(3):
            with pytest.raises(error if attempt == 0 or stays else StoreError):
                await goods._fetch(wanted)
        assert open_files() <= before
        resumed = await store.resume(MANIFEST.address)
        assert (resumed is not None) == stays
        if resumed is not None:
            async with resumed:
                assert resumed.missing() == [(1, 2)]
