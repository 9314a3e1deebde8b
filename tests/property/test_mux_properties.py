"""Whatever frames a peer sends, the muxer goes on or closes; whatever is written is read."""

from __future__ import annotations

import socket

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflop.node.mux import HEADER, WINDOW_BYTES, Mux, MuxStream, StreamBroken
from p2pflop.node.sealed_socket import SealedSocket

LIMIT_S = 10.0

numbers = st.sampled_from([0, 1, 2, 3, 4, 5, 2**32 - 1])
lengths = st.sampled_from([0, 1, 5, WINDOW_BYTES, WINDOW_BYTES + 1, 2**32 - 1])


def frame(kind: int, flags: int, number: int, length: int, body: bytes) -> bytes:
    return HEADER.pack(0, kind, flags, number, length if kind else len(body)) + (
        b"" if kind else body
    )


frames = st.builds(
    frame, st.integers(0, 3), st.integers(0, 15), numbers, lengths, st.binary(max_size=300)
)
attacks = st.lists(st.one_of(frames, st.binary(max_size=40)), max_size=30)


def plain(sock: socket.socket) -> SealedSocket:
    return SealedSocket(sock, lambda data: data, lambda data: data)


async def use(stream: MuxStream) -> None:
    """What a handler does: read a little, answer, finish."""
    try:
        await stream.read(10)
        await stream.write(b"answer")
        await stream.close()
    except StreamBroken:
        return


@settings(max_examples=150)
@given(attacks)
def test_any_frames_are_borne_or_cut_off(attack: list[bytes]) -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                mux = Mux(
                    plain(here),
                    initiator=False,
                    on_stream=lambda stream: nursery.start_soon(use, stream),
                )
                mux.open()
                nursery.start_soon(mux.run)
                peer = plain(there)
                for data in attack:
                    peer.send(data)
                await trio.testing.wait_all_tasks_blocked()
                peer.close()
                while not mux.why_closed:
                    await trio.testing.wait_all_tasks_blocked(0.001)
                # Every stream was broken, so every handler has ended: the nursery closes.

    trio.run(run)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 3 * WINDOW_BYTES), min_size=1, max_size=4),
    st.integers(1, 200_000),
)
def test_what_is_written_is_read(sizes: list[int], step: int) -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        offered, streams = trio.open_memory_channel[MuxStream](1)
        left = Mux(plain(here), initiator=True, on_stream=lambda stream: None)
        right = Mux(plain(there), initiator=False, on_stream=offered.send_nowait)
        pieces = [bytes([index + 1]) * size for index, size in enumerate(sizes)]

        async def write() -> None:
            stream = left.open()
            for piece in pieces:
                await stream.write(piece)
            stream.close_write()

        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.run)
                nursery.start_soon(right.run)
                nursery.start_soon(write)
                stream = await streams.receive()
                got = bytearray()
                while data := await stream.read(max(step, sum(sizes) // 500)):
                    got += data
                assert got == b"".join(pieces)
                nursery.cancel_scope.cancel()

    trio.run(run)
