"""What nodes say to each other about payments (``/p2pflop/<network>/payment/1``).

::

    dialler                                   listener
    Claimed | Acknowledged | Refused   ->
                                       <-     Noted, once it is on disk, or Declined(reason)

One word and one answer, then the end. The word may come again, over another stream and after any
restart; it is noted again, and booked once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import msgspec
import trio

from p2pflop.dht.planes import Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.payments import MAX_RECORD_BYTES
from p2pflop.wire import MAX_ENVELOPE_OVERHEAD_BYTES, Record, Text, encode

PROTOCOL: Final = "/p2pflop/payment/1"
WORD_S: Final = 10.0
"""For a stream, from its opening to its answer."""

CLOSE_S: Final = 2.0
MAX_WIRE_BYTES: Final = MAX_RECORD_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES
MAX_WORD_BYTES: Final = MAX_WIRE_BYTES + 16

_Wire = Annotated[bytes, msgspec.Meta(max_length=MAX_WIRE_BYTES)]


class Claimed(Record, frozen=True, tag=0):
    """A payment-claim."""

    MAX_BYTES: ClassVar[int] = MAX_WORD_BYTES

    claim: _Wire


class Acknowledged(Record, frozen=True, tag=1):
    """A payment-ack."""

    MAX_BYTES: ClassVar[int] = MAX_WORD_BYTES

    ack: _Wire


class Refused(Record, frozen=True, tag=2):
    """A payment-refusal."""

    MAX_BYTES: ClassVar[int] = MAX_WORD_BYTES

    refusal: _Wire


class Noted(Record, frozen=True, tag=3):
    """It is on disk here, from now on or since long."""


class Declined(Record, frozen=True, tag=4):
    """It is not noted, and why."""

    reason: Text


Word = Claimed | Acknowledged | Refused
Answer = Noted | Declined
Message = Word | Answer


def decode_word(frame: bytes, peer: str) -> Word:
    """What a peer says. Raises ProtocolError."""
    message = _decode(frame, peer)
    if isinstance(message, Noted | Declined):
        raise ProtocolError("an answer to nothing", peer=peer)
    return message


def decode_answer(frame: bytes, peer: str) -> Answer:
    """What a peer answers. Raises ProtocolError."""
    message = _decode(frame, peer)
    if not isinstance(message, Noted | Declined):
        raise ProtocolError("no answer to what was said", peer=peer)
    return message


async def ask(stream: Stream, word: Word) -> Answer:
    """Say ``word`` and hear the answer. Raises ProviderError, ProtocolError."""
    await stream.send(encode(word))
    return decode_answer(await stream.receive(MAX_WORD_BYTES), stream.peer)


async def close(stream: Stream) -> None:
    """End ``stream``, even if this task is cancelled."""
    with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
        await stream.aclose()


async def hear(stream: Stream) -> Word:
    """The one word of a stream. Raises ProviderError, ProtocolError."""
    with trio.move_on_after(WORD_S):
        return decode_word(await stream.receive(MAX_WORD_BYTES), stream.peer)
    raise ProviderError(f"{stream.peer} said nothing in {WORD_S:.0f} s")


def _decode(frame: bytes, peer: str) -> Message:
    try:
        if len(frame) > MAX_WORD_BYTES:
            raise msgspec.DecodeError(f"{len(frame)} bytes are too many")
        message: Message = msgspec.msgpack.decode(frame, type=Message)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        text = f"not a word about a payment: {str(error)[:200]}"
        raise ProtocolError(text, peer=peer) from error
    if encode(message) != frame:
        raise ProtocolError("a word about a payment is not in its one encoding", peer=peer)
    return message
