"""Frames between node and workers: bounded, typed, cut out of any pieces."""

from __future__ import annotations

import os

import msgspec
import pytest

from p2pflop.errors import ProtocolError
from p2pflop.kernels import frames
from p2pflop.kernels.frames import (
    MAX_FRAME_BYTES,
    MAX_ROW_VALUES,
    MAX_SCALAR_BYTES,
    MAX_TEXT,
    PART_BYTES,
    BlockingPipe,
    Fault,
    FrameBuffer,
    Part,
    Progressed,
    Ready,
    Run,
    Write,
    pack,
    parts,
    text,
    unpack,
    worker_command,
    worker_report,
)


def body(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize(
    "message",
    [
        Ready(),
        Fault(True, "out of memory"),
        Progressed(3, 4, ((3, 0, 0, b"1234"),)),
        Part(b"x" * PART_BYTES, True),
    ],
)
def test_a_message_survives_its_frame(message: frames.Message) -> None:
    buffer = FrameBuffer(MAX_FRAME_BYTES)
    framed = pack(message)
    found = [each for i in range(0, len(framed), 777) for each in buffer.feed(framed[i : i + 777])]
    assert [unpack(worker_report, each) for each in found] == [message]


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\xc1",
        b"\x90",
        body(Run(0, 1, 0)),  # a command is no report
        body(Part(b"x" * (PART_BYTES + 1), True)),
        body(Fault(False, "x" * (MAX_TEXT + 1))),
        body(Progressed(0, 0, ((0, 0, 0, b"x" * (MAX_SCALAR_BYTES + 1)),))),
        body(Progressed(0, 0, ((0, 0, 0, b""),) * (MAX_ROW_VALUES + 1))),
        body(Progressed(-1, 0, ())),
        body(Progressed(0, 2**62 + 1, ())),
        msgspec.msgpack.encode([32, 1]),
        msgspec.msgpack.encode([10**6]),
        b"\x91" * 5000,
    ],
)
def test_what_is_over_a_limit_or_of_another_type_is_refused(hostile: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(worker_report, hostile)


def test_the_edge_of_each_limit_is_accepted() -> None:
    full = Progressed(0, 2**62, ((0, 0, 0, b"x" * MAX_SCALAR_BYTES),) * MAX_ROW_VALUES)
    assert unpack(worker_report, body(full)) == full
    assert len(body(full)) <= MAX_FRAME_BYTES
    part = Part(b"x" * PART_BYTES, False)
    assert unpack(worker_report, body(part)) == part
    write = Write(2**32 - 1, 2**63 - 1, b"x" * PART_BYTES)
    assert unpack(worker_command, body(write)) == write
    assert len(body(write)) <= MAX_FRAME_BYTES


def test_a_frame_over_the_limit_is_refused_by_its_header() -> None:
    header = (MAX_FRAME_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="over the limit"):
        list(FrameBuffer(MAX_FRAME_BYTES).feed(header))


def test_several_frames_in_one_piece_come_out_in_order() -> None:
    several = pack(Ready()) + pack(Fault(False, "a")) + pack(Ready())[:3]
    bodies = list(FrameBuffer(100).feed(several))
    assert [unpack(worker_report, each) for each in bodies] == [Ready(), Fault(False, "a")]


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_parts_join_to_what_was_cut(size: int) -> None:
    data = os.urandom(size)
    cut = list(parts(data))
    assert b"".join(bytes(part.data) for part in cut) == data
    assert [part.last for part in cut] == [False] * (len(cut) - 1) + [True]


def test_text_is_short_and_fit_for_a_terminal() -> None:
    assert text("a\x1b[31m\nb\0c") == "a [31m b c"
    assert len(text("x" * 10_000)) == MAX_TEXT


class TestBlockingPipe:
    @pytest.fixture
    def ends(self) -> tuple[BlockingPipe, int]:
        read, write = os.pipe()
        return BlockingPipe(read, write), write

    def test_reads_parts_up_to_the_limit(self, ends: tuple[BlockingPipe, int]) -> None:
        pipe, _ = ends
        pipe.send(Part(b"ab", False))
        pipe.send(Part(b"c", True))
        assert pipe.receive_parts(worker_command, 3) == b"abc"
        pipe.send(Part(b"abcd", True))
        with pytest.raises(ProtocolError, match="more than 3 bytes"):
            pipe.receive_parts(worker_command, 3)

    def test_knows_whether_something_waits(self, ends: tuple[BlockingPipe, int]) -> None:
        pipe, _ = ends
        assert not pipe.waiting()
        pipe.send(Ready())
        assert pipe.waiting()

    def test_tells_the_end(self, ends: tuple[BlockingPipe, int]) -> None:
        pipe, write = ends
        os.write(write, b"\0\0")
        os.close(write)
        with pytest.raises(EOFError):
            pipe.receive(worker_command)
