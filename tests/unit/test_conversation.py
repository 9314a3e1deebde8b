"""One stream of a purchase: what is said on it is heard, however it ends."""

from __future__ import annotations

import pytest
import trio

from p2pflop.errors import ProviderError
from p2pflop.node import conversation as conversation_module
from p2pflop.node import messages as m
from p2pflop.node.conversation import HEARTBEAT_S, MAX_MISSED_BEATS, MAX_OUTBOX, Conversation
from p2pflop.node.returning import MAX_RETURNS, RETURN_WITHIN_S, STEADY_S, Returns


class ClosedByItsPeer:
    """A stream whose peer has said its last words and closed it: they are still to be read."""

    peer = "12D3KooWPeer"

    def __init__(self, *words: m.Message) -> None:
        self._frames = [m.encode_message(word) for word in words]
        self.refused = 0

    async def send(self, *frames: bytes) -> None:
        del frames
        self.refused += 1
        raise ProviderError("the peer reset the stream")

    async def receive(self, max_bytes: int = 0) -> bytes:
        del max_bytes
        await trio.lowlevel.checkpoint()
        if not self._frames:
            raise ProviderError("the peer reset the stream")
        return self._frames.pop(0)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_the_last_words_of_a_peer_that_takes_no_more_are_heard(
    autojump_clock: object,
) -> None:
    stream = ClosedByItsPeer(m.Heartbeat(), m.Heartbeat(), m.Settled())
    conversation = Conversation(stream, speaks=True)
    heard: list[m.Message] = []

    async def on_message(message: m.Message) -> None:
        conversation.tell(m.Heartbeat())
        await trio.sleep(0.1)
        heard.append(message)

    with trio.fail_after(5):
        assert await conversation.run(on_message) == "the peer reset the stream"
    assert heard == [m.Heartbeat(), m.Heartbeat(), m.Settled()]
    assert stream.refused == 1
    assert not conversation.at_fault


class Listener:
    """A stream that notes what is sent together, and ends when it has been closed."""

    peer = "12D3KooWPeer"

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._closed = trio.Event()

    async def send(self, *frames: bytes) -> None:
        self.sent.append(len(frames))

    async def receive(self, max_bytes: int = 0) -> bytes:
        del max_bytes
        await self._closed.wait()
        raise ProviderError("the end")

    async def aclose(self) -> None:
        self._closed.set()


async def test_what_waits_goes_out_together_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    word = m.Heartbeat()
    monkeypatch.setattr(conversation_module, "TOGETHER_BYTES", 3 * len(m.encode_message(word)))
    stream = Listener()
    conversation = Conversation(stream)
    for _ in range(7):
        conversation.tell(word)
    conversation.finish()

    async def on_message(message: m.Message) -> None:
        del message

    with trio.fail_after(5):
        await conversation.run(on_message)
    assert stream.sent == [3, 3, 1]


class Deaf:
    """A stream whose peer takes nothing and says nothing."""

    peer = "12D3KooWPeer"

    async def send(self, *frames: bytes) -> None:
        del frames
        await trio.sleep_forever()

    async def receive(self, max_bytes: int = 0) -> bytes:
        del max_bytes
        await trio.sleep_forever()
        return b""

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def nothing(_: m.Message) -> None:
    await trio.lowlevel.checkpoint()


async def test_so_much_waits_for_a_peer_that_does_not_read(autojump_clock: object) -> None:
    conversation = Conversation(Deaf())
    for _ in range(MAX_OUTBOX):
        conversation.tell(m.Settled())
    conversation.offer(m.Heartbeat())
    assert conversation._waits == MAX_OUTBOX, "what is outdated soon is not kept"
    conversation.tell(m.Settled())
    with trio.fail_after(5):
        assert "does not read" in await conversation.run(nothing)


async def test_a_peer_that_has_begun_to_speak_misses_so_many_beats(autojump_clock: object) -> None:
    conversation = Conversation(Deaf(), speaks=True)
    began_s = trio.current_time()
    await conversation.run(nothing)
    assert conversation.fell_silent
    assert trio.current_time() - began_s == pytest.approx(MAX_MISSED_BEATS * HEARTBEAT_S)


async def test_a_broken_stream_is_followed_by_so_many_others(autojump_clock: object) -> None:
    returns, pauses = Returns(), 0
    returns.broke(0.0, fell_silent=False)
    while returns.next_pause_s() is not None:
        pauses += 1
    assert pauses == MAX_RETURNS
    returns.broke(STEADY_S + 1, fell_silent=False)
    assert returns.next_pause_s() is not None, "one that was steady forgives those before it"
    await trio.sleep(RETURN_WITHIN_S)
    assert returns.next_pause_s() is None
