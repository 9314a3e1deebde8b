"""Jobs of a sweep that differ in their data: which are made, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError, P2PFlopError
from p2pflop.job.spec import BlobSource, Work
from p2pflop.shards import jobs_of, with_data
from p2pflop.wire import decode

ROWS = np.arange(24, dtype=np.float32).reshape(12, 2)
MOST = 100


class Blobs:
    """As much of a client as shards need."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    def put(self, data: bytes) -> Any:
        address = address_of(data)
        self.held[address] = data
        return type("Info", (), {"address": address})


def made(job: pf.Job, feed: object, args: Any = None) -> tuple[Any, Any, Blobs]:
    blobs = Blobs()
    found = jobs_of(job, args, feed, MOST, cast(Client, blobs))
    return (*found, blobs)


def fed_job(rows: Tensor) -> pf.Job:
    scale = Tensor([1.0, 2.0]).realize()

    def step(by: Tensor) -> dict[str, Tensor]:
        return {"total": (rows * scale * by).sum()}

    return pf.trace(step, steps=1, args={"by": 1.0})


def test_a_run_for_each_shard_of_the_jobs_own_feed() -> None:
    rows = pf.feed(ROWS, batch=4)
    job = fed_job(rows)
    args, data, blobs = made(job, rows)
    assert args == [{}, {}, {}]
    assert [list(each) for each in data] == [["rows"]] * 3
    for number, each in enumerate(data):
        one = with_data(job, each)
        shard = ROWS[4 * number : 4 * number + 4].tobytes()
        sources = [param.source for param in decode(Work, one.file.body.work).params]
        assert BlobSource(address_of(shard), len(shard)) in sources
        assert one.file.body.graphs == job.file.body.graphs, "one graph, and so one plan"
        assert one.cost.flop == job.cost.flop
        whole = pf.Job(one.file, {**job.inputs, **blobs.held})
        assert whole.run_local()["total"][0] == (ROWS[4 * number : 4 * number + 4] * [1, 2]).sum()


def test_inputs_are_named_and_arguments_go_along() -> None:
    rows = Tensor(ROWS[:4]).realize()
    job = fed_job(rows)
    args = [{"by": np.float32(2)}, {"by": 3}]
    told, data, _ = made(job, {"rows": [ROWS[:4], ROWS[4:8]], "scale": [ROWS[0], ROWS[1]]}, args)
    assert told == [{"by": 2.0}, {"by": 3}]
    assert [set(each) for each in data] == [{"rows", "scale"}] * 2
    assert with_data(job, data[0]).with_args(**told[0]).checked


WRONG: dict[str, Callable[[], object]] = {
    "the job has 0 feeds": lambda: pf.feed(ROWS, batch=4),
    "no input 'none' to feed": lambda: {"none": ROWS},
    "no input 'by' to feed": lambda: {"by": ROWS},
    "a shard of 'rows' is float .3, 2.": lambda: {"rows": pf.feed(ROWS, batch=3)},
    "a shard of 'rows' is int .4, 2.": lambda: {"rows": pf.feed(ROWS.astype(np.int32), batch=4)},
    "pf.feed did not make": lambda: {"rows": Tensor(ROWS[:4])},
    "rows has 3, scale has 2": lambda: {"rows": pf.feed(ROWS, batch=4), "scale": list(ROWS[:2])},
    "not: none": dict,
    "makes no feed": lambda: {"rows": 5},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_feeds_no_job_is_told_before_anything_is_put(message: str) -> None:
    job = fed_job(Tensor(ROWS[:4]).realize())
    blobs = Blobs()
    with pytest.raises(ConfigError, match=message):
        jobs_of(job, None, WRONG[message](), MOST, cast(Client, blobs))
    assert blobs.held == {}


def test_numbers_of_jobs_are_checked_before_anything_is_put() -> None:
    job, blobs = fed_job(Tensor(ROWS[:4]).realize()), Blobs()
    client, rows = cast(Client, blobs), {"rows": pf.feed(ROWS, batch=4)}
    with pytest.raises(ConfigError, match="2 arguments for 3 shards"):
        jobs_of(job, [{"by": 1}, {"by": 2}], rows, MOST, client)
    with pytest.raises(P2PFlopError, match="jobs in a sweep=3"):
        jobs_of(job, None, rows, 2, client)
    with pytest.raises(P2PFlopError, match="a sweep of no jobs"):
        jobs_of(job, [], None, MOST, client)
    with pytest.raises(ConfigError, match="which jobs"):
        jobs_of(job, None, None, MOST, client)
    for odd in (5, "lr", {"by": 1}, [1, 2]):
        with pytest.raises(ConfigError, match="not a list of arguments by name"):
            jobs_of(job, cast(Any, odd), None, MOST, client)
    with pytest.raises(ConfigError, match="has the data that led to it"):
        with_data(job.extend(2), {"rows": "ab" * 32})
    assert blobs.held == {}
