"""Inputs that are entries of a collection: one address in the job, however many tensors."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError, JobError
from p2pflop.ids import content_hash
from p2pflop.job.collection import MAX_COLLECTION_ENTRIES, Collection, collection_of
from p2pflop.job.file import CheckedJob, open_job
from p2pflop.job.spec import ROLE_INPUT, ROLE_STEP, MemberSource, Work, WorkParam, work_id
from p2pflop.job.validate import Refusal
from p2pflop.kernels.trace import MIN_MEMBERS
from p2pflop.wire import decode, encode


def job_of(count: int) -> pf.Job:
    rng = np.random.default_rng(0)
    rows = [Tensor(rng.standard_normal(4 + number).astype(np.float32)) for number in range(count)]

    def step(scale: Tensor) -> dict[str, Tensor]:
        return {"sum": sum((row.sum() for row in rows), Tensor(0.0)) * scale}

    return pf.trace(step, steps=2, args={"scale": 2.0})


def altered(job: pf.Job, source: MemberSource, role: int = ROLE_INPUT) -> CheckedJob | Refusal:
    """The job as a provider opens it, with another source for the first member."""
    body, checked = job.file.body, job.checked
    slot = checked.member_slots[0][0]
    params = list(checked.work.params)
    params[slot] = WorkParam(params[slot].dtype, params[slot].shape, role, source)
    work = msgspec.structs.replace(checked.work, params=tuple(params))
    named = msgspec.structs.replace(body.job, work=work_id(work))
    return open_job(msgspec.structs.replace(body, job=named, work=encode(work)))


def test_many_blobs_cost_one_address() -> None:
    few, many = job_of(MIN_MEMBERS - 1), job_of(4 * MIN_MEMBERS)
    assert not few.checked.member_slots
    assert len(few.checked.named_inputs) == MIN_MEMBERS
    assert len(many.checked.member_slots) == 4 * MIN_MEMBERS
    [argument] = many.checked.named_inputs
    assert argument[1].size_bytes == 4
    assert many.checked.is_resolved
    assert many.size_bytes < few.size_bytes + 16 * 3 * MIN_MEMBERS
    assert len(many.inputs) == 1 + 4 * MIN_MEMBERS + 1


def test_it_computes_what_it_would_with_blobs() -> None:
    job = job_of(MIN_MEMBERS)
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(4 + number).astype(np.float32) for number in range(MIN_MEMBERS)]
    rows_sum = sum(float(row.sum()) for row in rows)
    result = job.run_local()
    assert result["sum"] == pytest.approx(2 * rows_sum, rel=1e-4)
    assert job.with_args(scale=3.0).run_local()["sum"] == pytest.approx(3 * rows_sum, rel=1e-4)


def test_the_bill_counts_members_and_their_collection_known_or_not() -> None:
    checked = job_of(MIN_MEMBERS).checked
    [collection_bytes] = checked.collections.values()
    data_bytes = sum(4 * (4 + number) for number in range(MIN_MEMBERS)) + 4
    assert checked.input_bytes == data_bytes + collection_bytes
    unknown = open_job(job_of(MIN_MEMBERS).file.body)
    assert isinstance(unknown, CheckedJob)
    assert not unknown.is_resolved
    assert unknown.input_bytes == checked.input_bytes
    assert unknown.input_slots == checked.input_slots


def test_a_collection_or_a_member_that_is_not_at_hand_is_named() -> None:
    job = job_of(MIN_MEMBERS)
    [collection] = job.checked.collections
    member = job.checked.members[3].address
    for missing in (collection, member):
        inputs = {address: job.inputs[address] for address in job.inputs if address != missing}
        bare = pf.Job(job.file, inputs)
        with pytest.raises(BlobNotFoundError, match=missing.hex()):
            bare.run_local()


def test_only_inputs_and_state_may_be_members() -> None:
    job = job_of(MIN_MEMBERS)
    source = job.checked.member_slots[0][1]
    refused = altered(job, source, ROLE_STEP)
    assert isinstance(refused, Refusal)
    assert isinstance(altered(job, source), CheckedJob)


@pytest.mark.parametrize(
    "values", [{"entry": MAX_COLLECTION_ENTRIES}, {"entry": -1}, {"collection_bytes": 0},
               {"collection_bytes": Collection.MAX_BYTES + 1}]
)  # fmt: skip
def test_numbers_out_of_range_do_not_decode(values: dict[str, int]) -> None:
    job = job_of(MIN_MEMBERS)
    source = msgspec.structs.replace(job.checked.member_slots[0][1], **values)
    assert isinstance(altered(job, source), Refusal)


def test_a_collection_that_does_not_fit_is_refused() -> None:
    job = job_of(MIN_MEMBERS)
    checked = open_job(job.file.body)
    assert isinstance(checked, CheckedJob)
    [address] = checked.collections
    entries = decode(Collection, job.inputs[address]).entries
    blobs = {entry.name: (entry.address, entry.size_bytes) for entry in entries}
    short = dict(list(blobs.items())[:-1])
    larger = blobs | {entries[2].name: (entries[2].address, entries[2].size_bytes + 4)}
    for data, why in (
        (b"", "a collection of inputs"),
        (b"\xc1", "a collection of inputs"),
        (encode(collection_of(short)), f"has no entry {MIN_MEMBERS - 1}"),
        (encode(collection_of(larger)), "entry 2 of its collection is of 28 bytes, not of 24"),
    ):
        refusal = checked.resolve({address: data})
        assert isinstance(refusal, Refusal)
        assert why in refusal.reason
    inputs = {each: job.inputs[each] for each in job.inputs}
    lying = pf.Job(job.file, inputs | {address: encode(collection_of(short))})
    with pytest.raises(JobError, match="no entry"):
        lying.run_local()


def test_a_source_has_one_encoding() -> None:
    source = MemberSource(content_hash(b"x"), 100, 7)
    work = decode(Work, job_of(MIN_MEMBERS).file.body.work)
    param = msgspec.structs.replace(work.params[0], source=source)
    again = decode(Work, encode(msgspec.structs.replace(work, params=(param,))))
    assert again.params[0].source == source
    assert address_of(encode(work)) != address_of(encode(again))
