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
from p2pflop.job.spec import Result
from p2pflop.node import goods as goods_module
from p2pflop.node import messages as m
from p2pflop.node.goods import Goods
from p2pflop.wire import encode

ZERO = bytes(32)
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


def test_of_checkpoints_that_wait_for_their_bill_the_newest_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(goods_module, "MAX_KEPT_CHECKPOINTS", 2)
    monkeypatch.setattr(goods_module, "wanted_result", lambda *_: [])
    checked: Any = SimpleNamespace(job=SimpleNamespace(first_step=0, steps=100))
    store: Any = SimpleNamespace(stage=lambda _: None)
    dialer: Any = None
    goods = Goods(checked, store, dialer, "provider")
    for step in (10, 20, 30):
        result = Result(1, ZERO, ZERO, 0, step, (), (), ZERO, (), ZERO)
        goods.note_checkpoint(m.Checkpoint(step, encode(result), ()))
    assert list(goods._intervals) == [20, 30]
