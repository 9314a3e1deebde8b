"""What a provider says to a buyer whose wish it would do (``/p2pflop/<network>/quote/1``).

::

    dialler (provider)               listener (buyer)
    Quoted(quote, sheet)      ->
                              <-     Noted, or Declined(reason)

One quote and one answer, then the end. Noted promises nothing: only the buyer's bid buys.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import msgspec
import trio

from p2pflop.dht.planes import Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.records import MAX_QUOTE_BYTES
from p2pflop.market.relay import MAX_SHEET_WIRE_BYTES
from p2pflop.wire import MAX_ENVELOPE_OVERHEAD_BYTES, Record, Text, encode

PROTOCOL: Final = "/p2pflop/quote/1"
QUOTE_S: Final = 10.0
"""For a stream, from its opening to its answer."""

MAX_QUOTE_WIRE_BYTES: Final = MAX_QUOTE_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES
MAX_WORD_BYTES: Final = MAX_QUOTE_WIRE_BYTES + MAX_SHEET_WIRE_BYTES + 16

_Quote = Annotated[bytes, msgspec.Meta(max_length=MAX_QUOTE_WIRE_BYTES)]
_Sheet = Annotated[bytes, msgspec.Meta(max_length=MAX_SHEET_WIRE_BYTES)]


class Quoted(Record, frozen=True, tag=0):
    """A quote, and the newest sheet of the node that signed it."""

    MAX_BYTES: ClassVar[int] = MAX_WORD_BYTES

    quote: _Quote
    sheet: _Sheet


class Noted(Record, frozen=True, tag=1):
    """The quote is ranked with the asks of the book, until it expires."""


class Declined(Record, frozen=True, tag=2):
    """It is not, and why."""

    reason: Text


Message = Quoted | Noted | Declined


def decode_message(frame: bytes, peer: str) -> Message:
    """One frame of the stream. Raises ProtocolError."""
    try:
        if len(frame) > MAX_WORD_BYTES:
            raise msgspec.DecodeError(f"{len(frame)} bytes are too many")
        message: Message = msgspec.msgpack.decode(frame, type=Message)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a word about a quote: {str(error)[:200]}", peer=peer) from error
    if encode(message) != frame:
        raise ProtocolError("a word about a quote is not in its one encoding", peer=peer)
    return message


async def tell(stream: Stream, word: Quoted) -> Noted | Declined:
    """Say ``word`` and hear the answer. Raises ProviderError, ProtocolError."""
    await stream.send(encode(word))
    answer = decode_message(await stream.receive(MAX_WORD_BYTES), stream.peer)
    if isinstance(answer, Quoted):
        raise ProtocolError("a quote in answer to a quote", peer=stream.peer)
    return answer


async def hear(stream: Stream) -> Quoted:
    """The one quote of a stream. Raises ProviderError, ProtocolError."""
    with trio.move_on_after(QUOTE_S):
        word = decode_message(await stream.receive(MAX_WORD_BYTES), stream.peer)
        if not isinstance(word, Quoted):
            raise ProtocolError("an answer to nothing", peer=stream.peer)
        return word
    raise ProviderError(f"{stream.peer} said nothing in {QUOTE_S:.0f} s")
