"""Messages of session streams and frames of scripts: what is cut, put together and refused."""

from __future__ import annotations

import msgspec
import pytest

from p2pflop.errors import ProtocolError
from p2pflop.job.commands import MAX_FRAME_BYTES, Batch, Define, Ran
from p2pflop.node import messages as m
from p2pflop.node.session_messages import (
    PART_BYTES,
    Assembler,
    Leaving,
    Part,
    SessionMessage,
    encode_parts,
)


def assembled(frames: list[bytes]) -> list[SessionMessage | None]:
    assembler = Assembler("peer")
    return [assembler.take(frame) for frame in frames]


@pytest.mark.parametrize("size", [10, PART_BYTES - 100, PART_BYTES, 3 * PART_BYTES + 7])
def test_a_message_comes_whole_however_long(size: int) -> None:
    message = Batch(3, (Define(b"g" * size),))
    frames = encode_parts(message)
    assert all(len(frame) <= PART_BYTES + 16 for frame in frames)
    *before, last = assembled(frames)
    assert before == [None] * (len(frames) - 1)
    assert last == message


def encoded(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [encoded(Ran(1, 1, 1, 1, 1))[:-1]],
        [encoded(m.Fetching(1, 2))],
        [encoded(Part(b"", False))],
        [encoded(Part(b"x", False)), encoded(Leaving("no"))],
        [encoded(Part(encoded(Part(b"x", True)), True))],
        [encoded(Part(b"x" * PART_BYTES, False))] * (MAX_FRAME_BYTES // PART_BYTES + 1),
        [encoded(Batch(0, ()))[:1] + b"\xff" * 9],
    ],
)
def test_what_is_no_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        assembled(frames)
