"""One stream of a purchase: what is said on it is heard, however it ends."""

from __future__ import annotations

import pytest
import trio

from p2pflop.errors import ProviderError
from p2pflop.node import conversation as conversation_module
from p2pflop.node import messages as m
from p2pflop.node.conversation import Conversation


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
