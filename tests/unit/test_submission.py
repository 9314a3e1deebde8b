"""A submission is a job file, and what goes along with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from p2pflop.dht.blobs import SMALL_BYTES
from p2pflop.dht.manifest import address_of
from p2pflop.errors import ProtocolError
from p2pflop.job.file import CheckedJob, decode_file, open_job
from p2pflop.job.spec import BlobSource
from p2pflop.job.submission import (
    MAX_INPUT_BYTES,
    MAX_INPUTS,
    MAX_SUBMISSION_BYTES,
    SUBMISSION_MAGIC,
    Submission,
    decode_submission,
    encode_submission,
    go_along,
)
from p2pflop.job.validate import Refusal
from p2pflop.node.memory_market import sample_data, sample_file
from p2pflop.wire import encode


def small(floats: int) -> frozenset[bytes]:
    """What goes along with a job of two inputs of so many floats."""
    checked = open_job(decode_file(sample_file(floats=floats)).body)
    assert not isinstance(checked, Refusal)
    return go_along(checked)


def test_what_goes_along_comes_back() -> None:
    whole = Submission(b"file", (b"", b"one", bytes(MAX_INPUT_BYTES)))
    assert decode_submission(encode_submission(whole)) == whole


def test_without_inputs_it_is_the_job_file() -> None:
    assert encode_submission(Submission(b"file")) == b"file"
    assert decode_submission(b"file") == Submission(b"file")


def test_what_is_no_submission_is_refused() -> None:
    most = (bytes(MAX_INPUT_BYTES),) * MAX_INPUTS
    whole = encode_submission(Submission(b"file", most))
    assert len(whole) < MAX_SUBMISSION_BYTES
    assert decode_submission(whole).inputs == most
    for hostile in (
        SUBMISSION_MAGIC,
        whole[:-1],
        whole + b"\0",
        SUBMISSION_MAGIC + encode(Submission(b"file", (*most, b""))),
        SUBMISSION_MAGIC + encode(Submission(b"file", (bytes(MAX_INPUT_BYTES + 1),))),
        SUBMISSION_MAGIC + b"\xc1" * 100,
        SUBMISSION_MAGIC + bytes(MAX_SUBMISSION_BYTES),
    ):
        with pytest.raises(ProtocolError):
            decode_submission(hostile)


def test_small_inputs_go_along() -> None:
    most = MAX_INPUT_BYTES // 4
    assert small(most) == set(map(address_of, sample_data(most)))
    assert small(most + 1) == set()
    assert MAX_INPUT_BYTES <= SMALL_BYTES, "a store keeps them in its index"


def test_no_more_go_along_than_there_is_room_for() -> None:
    sources = [BlobSource(bytes([number % 251]) * 32, 8) for number in range(2 * MAX_INPUTS)]
    inputs = tuple((slot, source) for slot, source in enumerate([sources[0], *sources]))
    job = cast("CheckedJob", SimpleNamespace(named_inputs=inputs))
    assert go_along(job) == {source.address for source in sources[:MAX_INPUTS]}
