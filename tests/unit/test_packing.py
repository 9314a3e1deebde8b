"""Packs: many small jobs as one, whose results are those of the jobs alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.dht.manifest import address_of
from p2pflop.errors import JobError, ProtocolError
from p2pflop.job import variants as variants_module
from p2pflop.job.file import JobFile, decode_file, encode_file
from p2pflop.job.packing import Packing
from p2pflop.job.results import result_hash
from p2pflop.job.spec import Work
from p2pflop.job.variants import (
    KEPT_BYTES,
    MAX_VARIANTS,
    SMALL_WORK,
    Variants,
    capacity,
    decode_variants,
    encode_variants,
    obstacle,
    variant,
)
from p2pflop.sdk import Job
from p2pflop.wire import decode, encode


def full_job(steps: int = 4) -> pf.Job:
    """Everything that a pack has to carry over: states born and from blobs, the step, dropout,
    traced and last outputs, two phases."""
    weight = Tensor.zeros(4).contiguous()
    moving = Tensor([1.0, 2.0, 3.0]).realize()
    born = Tensor.rand(3)

    def step(rate: Tensor, count: Tensor) -> dict[str, Tensor]:
        weight.assign(weight + rate * Tensor.rand(4) * pf.step)
        moving.assign(moving * rate)
        born.assign(born + moving + count)
        return {"total": weight.sum(), "doubled": weight * 2}

    def look(rate: Tensor, count: Tensor) -> dict[str, Tensor]:
        return {"ratio": 1 / rate, "top": weight.max() + count, "sum": moving + born}

    args: dict[str, float | int] = {"rate": 0.5, "count": 1}
    return pf.trace(step, steps=steps, every={2: look}, args=args, title="full")


def variants(
    job: pf.Job, given: Sequence[tuple[float, int]], room: int = 4, **changes: Any
) -> Variants:
    labels = job.file.labels.params
    storage = {labels.index("rate"): "<f", labels.index("count"): "<i"}
    slots = tuple(sorted(storage))

    def values(rate: float, count: int) -> tuple[bytes, ...]:
        of_slot = dict(zip(storage, (rate, count), strict=True))
        return tuple(struct.pack(storage[slot], of_slot[slot]) for slot in slots)

    ids = tuple(f"{number:012x}" for number in range(len(given)))
    made = Variants(1, job.file, room, slots, ids, tuple(values(*each) for each in given))
    return msgspec.structs.replace(made, **changes)


@pytest.fixture(scope="module")
def job() -> pf.Job:
    return full_job()


def test_each_variant_has_the_hash_of_its_job_alone(job: pf.Job) -> None:
    given = [(0.5, 1), (-0.0, 7), (float("inf"), -3)]
    packing = Packing(variants(job, given), address_of)
    result = Job(packing.file, {**job.inputs, **packing.blobs}).run_local()
    assert set(packing.names(result.record)) <= {result.record.trace, *result.record.state}
    found = list(packing.unpack(result.record, result.blob))
    assert len(found) == len(given)
    for (rate, count), unpacked in zip(given, found, strict=True):
        alone = job.with_args(rate=rate, count=count)
        assert unpacked.file == alone.file
        assert result_hash(unpacked.result).hex() == alone.run_local().hash
        record = unpacked.result
        named = {record.trace, *record.state, *(output.address for output in record.outputs)}
        assert named == set(unpacked.blobs)
        assert all(address_of(data) == address for address, data in unpacked.blobs.items())


def test_a_variant_is_the_job_with_those_arguments(job: pf.Job) -> None:
    made = variants(job, [(0.25, 2), (0.5, 1)])
    assert variant(made, 0, address_of) == job.with_args(rate=0.25, count=2).file
    assert variant(made, 1, address_of) == job.file


def test_packs_of_all_sizes_share_their_graphs(job: pf.Job) -> None:
    packs = [
        Packing(variants(job, [(0.5, number) for number in range(count)]), address_of).file
        for count in (1, 3, 4)
    ]
    assert len({pack.body.graphs for pack in packs}) == 1
    assert [pack.body.job.steps for pack in packs] == [4, 12, 16]


def test_a_pack_costs_little_more_than_its_jobs(job: pf.Job) -> None:
    packing = Packing(variants(job, [(0.5, 1)] * 4, run_ids=tuple("abcd")), address_of)
    checked = Job(packing.file).checked
    assert job.cost.flop * 4 < checked.cost.flop < job.cost.flop * 4.5


def test_the_names_of_rows_stay(job: pf.Job) -> None:
    labels = Packing(variants(job, [(0.5, 1)]), address_of).file.labels
    assert labels.outputs[:2] == (("total",), ("ratio", "top"))
    assert labels.title == "1 of full"
    assert decode_file(encode_file(JobFile(1, job.file.body, job.file.labels))) == job.file


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (
            "goes on from a state",
            lambda work, job: (work, msgspec.structs.replace(job, first_step=1)),
        ),
        ("last step is not one", lambda work, job: (work, msgspec.structs.replace(job, steps=3))),
    ],
)
def test_what_cannot_be_packed_is_told(job: pf.Job, reason: str, change: object) -> None:
    checked = job.checked
    work, record = change(checked.work, checked.job)  # type: ignore[operator]
    changed = type(checked)(
        record, work, checked.work_id, checked.graphs, checked.cost, checked.state
    )
    assert reason in obstacle(changed)
    assert capacity(changed) == 1


def test_jobs_that_stop_collect_or_are_fed_are_bought_alone() -> None:
    def stops(rate: Tensor) -> dict[str, Tensor]:
        return {"done": rate > 1, "loss": rate * 2}

    def fed(rate: Tensor) -> dict[str, Tensor]:
        return {"loss": (shards * rate).sum()}

    shards = pf.feed(np.array([[1, 2], [3, 4]], np.float32), batch=1)
    args = {"rate": 0.5}
    for made, reason in [
        (pf.trace(stops, steps=2, args=args, stop="done"), "ends by an output"),
        (pf.trace(stops, steps=2, args=args, collect=["loss"]), "collects"),
        (pf.trace(fed, steps=2, args=args), "is fed"),
    ]:
        assert reason in obstacle(made.checked)
        assert capacity(made.checked) == 1


def test_only_small_jobs_are_worth_packing() -> None:
    def sized(elements: int, kept: int) -> pf.Job:
        state = Tensor.zeros(kept).contiguous()

        def step(rate: Tensor) -> dict[str, Tensor]:
            state.assign(state + rate)
            return {"loss": rate * Tensor.rand(elements).sum()}

        return pf.trace(step, steps=1, args={"rate": 0.5})

    assert capacity(sized(4, 4).checked) == MAX_VARIANTS
    large = sized(2**21, 4)
    assert large.cost.flop > SMALL_WORK
    assert capacity(large.checked) == 1
    some = sized(4, 1000)  # with the generator's counter, some bytes over 4,000
    assert capacity(some.checked) == 16 <= KEPT_BYTES // 4000
    assert capacity(sized(4, 1024).checked) == 8
    assert capacity(sized(4, KEPT_BYTES // 4 + 1).checked) == 1
    middle = sized(2**18, 4)
    found = capacity(middle.checked)
    assert 1 < found < MAX_VARIANTS
    assert found & (found - 1) == 0
    assert found * middle.cost.flop <= variants_module.PACK_WORK


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slots": (1, 0)}, "do not rise"),
        ({"slots": (0, 4095)}, "no slot 4095"),
        ({"run_ids": ("one", "one")}, "an id of its own"),
        ({"run_ids": ("one",)}, "an id of its own"),
        ({"room": 1}, "2 variants for a pack of 1"),
        ({"room": 3}, "for a pack of 3"),
        ({"values": ((b"1234",), (b"1234",))}, "variant 0 are not those"),
        ({"values": ((b"1234", b"12345"), (b"1234", b"1234"))}, "variant 0 are not those"),
    ],
)
def test_variants_that_do_not_fit_are_refused(
    job: pf.Job, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(JobError, match=reason):
        Packing(variants(job, [(0.5, 1), (0.5, 2)], **changes), address_of)


def test_only_arguments_vary(job: pf.Job) -> None:
    state = next(slot for slot, param in enumerate(job.checked.work.params) if param.role == 1)
    made = variants(job, [(0.5, 1)], slots=(state,), values=((b"1234",),))
    with pytest.raises(JobError, match="is not an argument"):
        Packing(made, address_of)


def test_a_result_of_something_else_is_refused(job: pf.Job) -> None:
    small = full_job(steps=2)
    packing = Packing(variants(small, [(0.5, 1)], room=1), address_of)
    with pytest.raises(ProtocolError, match="not of this pack"):
        packing.names(small.run_local().record)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_variants(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_variants(data)


def test_variants_are_read_as_they_were_written(job: pf.Job) -> None:
    made = variants(job, [(0.5, 1), (1.5, 2)])
    assert decode_variants(encode_variants(made)) == made
    assert decode(Work, made.file.body.work) == job.checked.work
    many = variants(job, [(0.5, 1)] * (MAX_VARIANTS + 1))
    with pytest.raises(ProtocolError):
        decode(Variants, encode(many))
