"""Feeds and collected outputs: shards in, values out, the same through nodes as here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tinygrad import Tensor, dtypes

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.job.file import encode_file

ROWS = np.arange(36, dtype=np.float32).reshape(12, 3)


def fed_job(steps: int, data: Any = ROWS, *, batch: int | None = 4, hold: int = 2) -> pf.Job:
    """Adds up a feed in a state, and gives back what it saw: all of it, and of every third step."""
    rows = pf.feed(data, batch=batch, steps=hold)
    total = Tensor.zeros(3, dtype=dtypes.float32).contiguous()

    def step() -> dict[str, Tensor]:
        total.assign(total + rows.sum(0))
        return {"seen": rows + 0.5, "total": total.sum()}

    def look() -> dict[str, Tensor]:
        return {"sum": total * 1}

    return pf.trace(step, steps=steps, every={3: look}, collect=["seen", "sum"], title="fed")


def expected(steps: int, hold: int = 2) -> np.ndarray[Any, Any]:
    return np.stack([ROWS.reshape(3, 4, 3)[step // hold % 3] for step in range(steps)])


def test_shards_come_in_turn_and_every_value_is_kept() -> None:
    seen = expected(10)
    result = fed_job(10).run_local()
    result.verify()
    assert np.array_equal(result["seen"], seen + 0.5)
    assert result.steps_of("seen") == list(range(10))
    sums = np.cumsum(seen.sum(1), 0)
    assert np.array_equal(result["sum"], sums[[2, 5, 8]])
    assert result.steps_of("sum") == [2, 5, 8]
    assert np.array_equal(result["total"], sums.sum(1))
    assert [value.shape for value in result.collected("sum")] == [(3,)] * 3


def test_files_are_cut_across_their_ends_and_read_when_needed(tmp_path: Path) -> None:
    for number, part in enumerate(np.split(ROWS, [5, 6])):
        np.save(tmp_path / f"part{number}.npy", part)
    job = fed_job(4, str(tmp_path / "*.npy"))
    assert job.file.body == fed_job(4).file.body
    assert np.array_equal(job.run_local()["seen"], expected(4) + 0.5)
    again = pf.load(job.save(tmp_path / "fed.p2pj"))
    assert again.run_local().hash == job.run_local().hash


def test_nodes_bring_shards_and_values(start_node: Any, wait_until: Any) -> None:
    seller = start_node("seller", "--ask", "90000")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_until(lambda: len(buyer.get("/v1/book")["book"]) == 1)
    job = fed_job(10)
    client = Client(buyer.home)
    run = pf.submit(job, client=client)
    assert [row.step for row in run] == list(range(10))
    result = run.result(timeout=60)
    result.verify()
    local = job.run_local()
    assert result.hash == local.hash
    assert np.array_equal(result["seen"], expected(10) + 0.5)
    # Both hold only what the stretch needs: here all three shards and their list.
    assert {info.address for info in client.blobs()} >= set(job.inputs)

    longer = job.extend(3)
    second = pf.submit(longer, client=client).result(timeout=60)
    assert np.array_equal(second["seen"], expected(13)[10:] + 0.5)
    assert second.steps_of("sum") == [11]

    shard = next(iter(job.inputs)).hex()
    assert httpx.get(f"{seller.url}/blob/{shard}", timeout=60).status_code == 200, "own user"


@pytest.mark.parametrize("missing", ["collection", "shard"])
def test_a_feed_that_is_not_in_the_store_is_told_at_once(start_node: Any, missing: str) -> None:
    node = start_node("node", "--ask", "90000")
    client = Client(node.home)
    job = fed_job(10)
    ((_, source),) = job.checked.feeds
    kept = [a for a in job.inputs if (a == source.collection) is (missing == "shard")]
    for address in kept:
        client.put(job.inputs[address])
    with pytest.raises(pf.BlobNotFoundError, match="the input 'rows'"):
        client.submit(encode_file(job.file))


def test_what_a_run_elsewhere_needs_is_not_deleted(start_node: Any, wait_until: Any) -> None:
    seller = start_node("seller", "--ask", "90000")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_until(lambda: len(buyer.get("/v1/book")["book"]) == 1)
    client = Client(buyer.home)
    rows = pf.feed(ROWS, batch=4)
    job = pf.trace(lambda: {"sum": rows.sum()}, steps=1_000_000)
    run = pf.submit(job, client=client)
    wait_until(lambda: run.status == "running")
    for address in job.inputs:
        with pytest.raises(pf.StoreError, match=f"run {run.id} needs blob {address.hex()}"):
            client.delete(address)
    run.cancel()
    wait_until(lambda: run.status == "cancelled")
    for address in job.inputs:
        client.delete(address)
        assert not client.has(address)
