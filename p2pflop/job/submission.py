"""What a script submits to its node: a job file, and along with it the small ones of its inputs.

So a job with a few numbers of its own takes one request. What is larger is put into the node's
store first.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, ClassVar, Final

import msgspec

from p2pflop.job.file import FILE_MAGIC, MAX_COMPRESSED_BYTES, CheckedJob
from p2pflop.wire import Record, decode, encode

MAX_INPUTS: Final = 64
MAX_INPUT_BYTES: Final = 4 * 1024
"""Of each: asking whether the node has it already would cost more than sending it."""
SUBMISSION_MAGIC: Final = b"p2ps\x01"

_MAX_FILE_BYTES: Final = len(FILE_MAGIC) + MAX_COMPRESSED_BYTES


class Submission(Record, frozen=True):
    """A job file as ``job.file`` writes it, and inputs of the job, in any order."""

    MAX_BYTES: ClassVar[int] = _MAX_FILE_BYTES + MAX_INPUTS * (MAX_INPUT_BYTES + 3) + 16

    file: Annotated[bytes, msgspec.Meta(max_length=_MAX_FILE_BYTES)]
    inputs: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_INPUT_BYTES)], ...],
        msgspec.Meta(max_length=MAX_INPUTS),
    ] = ()


MAX_SUBMISSION_BYTES: Final = len(SUBMISSION_MAGIC) + Submission.MAX_BYTES


def encode_submission(submission: Submission) -> bytes:
    """As it is sent: without inputs it is the job file alone."""
    if not submission.inputs:
        return submission.file
    return SUBMISSION_MAGIC + encode(submission)


def decode_submission(data: bytes) -> Submission:
    """What ``data`` has; its job file is still to be opened. Raises ProtocolError."""
    if not data.startswith(SUBMISSION_MAGIC):
        return Submission(data)
    return decode(Submission, data[len(SUBMISSION_MAGIC) :])


def go_along(checked: CheckedJob) -> frozenset[bytes]:
    """The addresses of those inputs of a job that are small, as many as there is room for."""
    sources = [source for _, source in checked.named_inputs]
    small = {s.address: None for s in sources if s.size_bytes <= MAX_INPUT_BYTES}
    return frozenset(islice(small, MAX_INPUTS))
