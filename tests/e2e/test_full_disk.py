"""A disk that takes no more in the middle of a job, of a real node on either side."""

from __future__ import annotations

import re
import resource
from typing import Any

import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.units import MIB

FLOATS = MIB // 2
STEPS, CHECKPOINT_STEPS = 6000, 300
NO_LIMIT = resource.RLIM_INFINITY


def growing_job(steps: int) -> pf.Job:
    weight = Tensor.zeros(FLOATS).contiguous()

    def step() -> dict[str, Tensor]:
        weight.assign(weight + 1)
        return {"first": weight[0]}

    return pf.trace(step, steps=steps)


def allow_files_up_to(node: Any, size_bytes: int) -> None:
    """As for a disk that is full, a write of a blob or of a database fails in the middle."""
    resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (size_bytes, NO_LIMIT))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process")
@pytest.mark.parametrize("who", ["provider", "buyer"])
def test_a_job_outlives_the_disk_of_its_nodes(start_node: Any, wait_until: Any, who: str) -> None:
    provider = start_node("provider", "--ask", "90000")
    buyer = start_node("buyer", "--connect", provider.addresses()[0])
    wait_until(lambda: len(buyer.get("/v1/book")["book"]) == 1)
    client = Client(buyer.home)
    job = growing_job(STEPS)
    run = pf.submit(job, client=client, checkpoint_steps=CHECKPOINT_STEPS)
    full = {"provider": provider, "buyer": buyer}[who]
    next(event for event in run.events() if event["kind"] == "receipt")
    allow_files_up_to(full, MIB)
    error_type = pf.ProviderError if who == "provider" else pf.StoreError
    with pytest.raises(error_type) as caught:
        run.result(timeout=120)
    allow_files_up_to(full, NO_LIMIT)
    expected = "the provider's disk" if who == "provider" else "cannot be kept|journal.db"
    assert re.search(expected, caught.value.message)
    [step] = re.findall(r"job\.resume\((\d+)\)", caught.value.hint)
    assert int(step) % CHECKPOINT_STEPS == 0

    rest = job.resume(int(step))
    result = pf.submit(rest, client=client, checkpoint_steps=0).result(timeout=120)
    assert result["first"][-1] == STEPS
    assert result.steps == STEPS - int(step)
