"""What buyer and provider say on a session's stream (``/p2pflop/session/1``), frame by frame.

::

    buyer                                   provider
    Wanted(bid)                      ->
                                     <-     Filled(fill)  or  Refused(reject), and the end
    Confirmed(confirm)               ->     within 2 s
    Batch(commands)*                 ->     within the window, without waiting
                                     <-     Data* as Reads are obeyed, Ran once a Batch is
                                     <-     Stood(seconds) where there is nothing to do; a Hold in
                                            a Batch pays for it
    Raise(quote)                     ->     where the next command would be over the quote
                                     <-     Raised(quote), as before if the credit does not reach
                                     <-     Receipted(receipt) now and then, one at a time
    Countersigned(receipt)           ->     if this end's table says the same
    Close                            ->
                                     <-     Receipted(closing receipt)
    Countersigned(receipt)           ->
                                     <-     Settled, and the end

Heartbeats come from both. A provider that ends the lease by itself sends the last Receipted, then
Leaving, or Failed where a command is to blame; the buyer still countersigns. A buyer whose stream
broke brings its last Countersigned on a stream of its own, and hears Settled.

A message that is too long for a frame comes in ``Part`` messages. Commands are numbered from 0 in
each lease. ``Ran.upto`` is always the end of a Batch, and so are the receipts.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.job.commands import MAX_FRAME_BYTES, Batch, Close, Data, Failed, Ran
from p2pflop.node.messages import (
    Confirmed,
    Countersigned,
    Envelope,
    Filled,
    Heartbeat,
    Receipted,
    Refused,
    Settled,
)
from p2pflop.units import MIB
from p2pflop.wire import U32, U63, Record, Text

SESSION_PROTOCOL: Final = "/p2pflop/session/1"
PART_BYTES: Final = MIB
WINDOW_COMMANDS: Final = 16_384
WINDOW_BYTES: Final = 32 * MIB
"""Of Batches, encoded, that are not yet obeyed. Of one Batch more there may be any number."""


class Wanted(Record, frozen=True, tag=15):
    """A directed bid for a lease of a session."""

    bid: Envelope


class Leaving(Record, frozen=True, tag=16):
    """The provider ends the lease; nothing beyond the last Ran was obeyed."""

    reason: Text


class Stood(Record, frozen=True, tag=18):
    """So many seconds of the lease, in all, the provider had nothing to compute or to lower, or
    what counts next to nothing: those that every lease pays for left out."""

    seconds: U32


class Raise(Record, frozen=True, tag=19):
    """The lease is to be for ``quote_nusd`` at most; the bid is what it is but for that. Nothing is
    owed by it: that is what receipts are for, which both sign."""

    quote_nusd: U63


class Raised(Record, frozen=True, tag=20):
    """What the quote is now."""

    quote_nusd: U63


class Part(Record, frozen=True, tag=17):
    """The next bytes of one long message; ``last`` ends it."""

    data: Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)]
    last: bool


SessionMessage = (
    Wanted
    | Filled
    | Refused
    | Confirmed
    | Batch
    | Ran
    | Data
    | Stood
    | Raise
    | Raised
    | Receipted
    | Countersigned
    | Close
    | Settled
    | Leaving
    | Failed
    | Heartbeat
)
AnyFrame = SessionMessage | Part
_DECODER: Final = msgspec.msgpack.Decoder(AnyFrame)


def encode_parts(message: SessionMessage) -> list[bytes]:
    """The frames of a message: one, or as many as its length asks for."""
    data = msgspec.msgpack.encode(message)
    if len(data) <= PART_BYTES:
        return [data]
    starts = range(0, len(data), PART_BYTES)
    return [
        msgspec.msgpack.encode(Part(data[start : start + PART_BYTES], start == starts[-1]))
        for start in starts
    ]


class Assembler:
    """Makes messages of frames. ``take`` raises ProtocolError, naming ``peer``."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._parts = bytearray()

    def take(self, frame: bytes) -> SessionMessage | None:
        """The message that ``frame`` is or ends, or None."""
        found = self._decode(frame)
        if not isinstance(found, Part):
            if self._parts:
                raise ProtocolError(f"{self._peer} broke off a long message", peer=self._peer)
            return found
        self._parts += found.data
        if not found.data or len(self._parts) > MAX_FRAME_BYTES:
            raise ProtocolError(f"{self._peer} sent too long a message", peer=self._peer)
        if not found.last:
            return None
        whole = self._decode(bytes(self._parts))
        self._parts = bytearray()
        if isinstance(whole, Part):
            raise ProtocolError(f"{self._peer} sent a part of a part", peer=self._peer)
        return whole

    def _decode(self, data: bytes) -> AnyFrame:
        try:
            found: AnyFrame = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(
                f"{self._peer} sent a bad message: {str(error)[:200]}", peer=self._peer
            ) from error
        return found
