"""What becomes a feed, and what is refused before anything is traced."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.errors import ConfigError, JobError
from p2pflop.ids import content_hash
from p2pflop.job.collection import MAX_COLLECTION_ENTRIES
from p2pflop.job.spec import ROLE_FEED, FeedSource, Work
from p2pflop.kernels import feeds
from p2pflop.kernels.feeds import feed, feed_of
from p2pflop.kernels.trace import trace
from p2pflop.wire import decode

ROWS = np.arange(24, dtype=np.int16).reshape(12, 2)


def shards(data: Any, **options: Any) -> list[bytes]:
    tensor = feed(data, **options)
    found = feed_of(tensor)
    assert found is not None
    assert tensor.numpy().tobytes() == found.read(0), "outside a job it is the first shard"
    return [found.read(number) for number in range(found.shards)]


def test_rows_are_cut_into_shards() -> None:
    assert shards(ROWS, batch=4) == [ROWS[i : i + 4].tobytes() for i in (0, 4, 8)]
    assert shards(list(np.split(ROWS, [1, 9])), batch=4) == shards(ROWS, batch=4)
    assert shards(ROWS, batch=5, drop_last=True) == [ROWS[:5].tobytes(), ROWS[5:10].tobytes()]


def test_without_a_batch_each_array_is_a_shard() -> None:
    assert shards(ROWS) == [ROWS.tobytes()]
    assert shards([ROWS[:3], ROWS[3:6]]) == [ROWS[:3].tobytes(), ROWS[3:6].tobytes()]


def test_the_other_byte_order_and_strides_become_ours() -> None:
    assert shards(ROWS.astype(">i2").astype("<i2").T) == [np.ascontiguousarray(ROWS.T).tobytes()]


def test_an_entry_goes_with_its_tensor() -> None:
    gc.collect()
    before = len(feeds._feeds)
    tensor = feed(ROWS)
    assert len(feeds._feeds) == before + 1
    del tensor
    gc.collect()
    assert len(feeds._feeds) == before


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (ROWS, {"batch": 5}, "12 rows are not a multiple of 5: 2 are left over"),
        (ROWS, {"batch": 0}, "batch=0"),
        (ROWS, {"steps": 0}, "steps=0"),
        ([ROWS, ROWS[:3]], {}, "of one kind, not of"),
        ([ROWS, ROWS.astype(np.int32)], {"batch": 4}, "of one kind"),
        ([], {}, "not of nothing"),
        ("nothing/*.npy", {}, "no file matches"),
        ("nothing.npy", {}, "cannot read nothing.npy"),
        (ROWS, {"batch": 2.5}, "batch=2.5"),
        (ROWS, {"steps": "4"}, "steps='4'"),
        (3, {}, "data of type int makes no feed"),
        (None, {}, "data of type NoneType"),
        ({"rows": ROWS}, {}, "data of type dict"),
        ([3], {}, "data of type int"),
        (np.int32(3), {"batch": 1}, "data of type int32"),
        (np.zeros(()), {"batch": 1}, "no rows to cut"),
        (np.zeros((2, 0)), {}, "hold nothing"),
        (np.zeros(MAX_COLLECTION_ENTRIES + 1), {"batch": 1}, "65537 shards; a feed has 1 to"),
        (np.array(["a"]), {}, "do not exist"),
    ],
)
def test_what_does_not_fit_is_refused(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        feed(data, **options)
    assert caught.value.hint or message.startswith("cannot read")


def test_a_file_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot read"):
        feed(tmp_path / "evil.npy")


def test_a_feed_is_traced_as_one_even_after_it_was_used() -> None:
    rows = feed(ROWS, batch=4, steps=7)
    scaled = rows * 2
    rows.realize()
    traced = trace(lambda: {"sum": (rows + scaled).sum()}, steps=2, address_of=content_hash)
    work = decode(Work, traced.body.work)
    (param,) = (param for param in work.params if param.role == ROLE_FEED)
    assert isinstance(param.source, FeedSource)
    assert (param.source.shards, param.source.steps) == (3, 7)
    assert len(traced.blobs) == 4


def test_a_feed_cannot_be_assigned_to() -> None:
    rows = feed(ROWS, batch=4)

    def step() -> None:
        rows.assign(rows + 1)

    with pytest.raises(JobError, match="the feed rows is assigned to"):
        trace(step, steps=2, address_of=content_hash)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_file_that_became_shorter_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, batch: int | None
) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(2**16, dtype=np.float32).reshape(16, -1))
    rows = pf.feed(path, batch=batch)

    def step() -> dict[str, Tensor]:
        return {"sum": rows.sum()}

    job = pf.trace(step, steps=1)
    os.truncate(path, 4096)
    with pytest.raises(JobError, match="has become shorter"):
        job.run_local()


def test_a_file_that_changed_after_tracing_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(3)]
    for path in paths:
        np.save(path, ROWS)
    rows = pf.feed([str(path) for path in paths], batch=18)
    job = pf.trace(lambda: {"sum": rows.sum()}, steps=2)
    np.save(paths[1], ROWS + 1)
    with pytest.raises(JobError, match="has changed since the job was traced with it") as told:
        job.run_local()
    assert told.value.message.startswith(f"{paths[0]} and {paths[1]} has")


def test_an_array_that_changed_after_tracing_is_noticed() -> None:
    data = ROWS.copy()
    rows = pf.feed(data, batch=4)
    job = pf.trace(lambda: {"sum": rows.sum()}, steps=2)
    data += 1
    with pytest.raises(JobError, match=r"^data of 16 bytes has changed"):
        job.run_local()


def test_a_feed_of_another_byte_order_is_the_same_in_and_outside_of_a_job() -> None:
    rows = feed(np.arange(8, dtype=">f4"), batch=2)
    assert rows.numpy().tolist() == [0, 1]
    job = pf.trace(lambda: {"sum": rows.sum()}, steps=4)
    assert job.run_local()["sum"].tolist() == [1, 5, 9, 13]


def test_files_that_are_no_arrays_are_told_in_plain_words(tmp_path: Path) -> None:
    junk, cut, whole = tmp_path / "junk.npy", tmp_path / "cut.npy", tmp_path / "whole.npy"
    junk.write_bytes(b"nothing of the kind")
    np.save(whole, np.arange(1000.0))
    cut.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"junk\.npy as an \.npy file: it is not one"):
        feed(junk)
    with pytest.raises(ConfigError, match="it is damaged, cut off, or holds Python objects"):
        feed(cut)


def test_bools_of_other_bytes_than_0_and_1_are_refused() -> None:
    mask = feed([np.array([1, 2, 0, 255], np.uint8).view(np.bool_)])
    job = pf.trace(lambda: {"sum": mask.where(1, 0).sum()}, steps=1)
    with pytest.raises(JobError, match="is of bools, and has bytes other than 0 and 1"):
        job.run_local()
