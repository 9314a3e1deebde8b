"""What buyer and provider say on a job stream (``/p2pflop/<network>/job/1``), frame by frame.

::

    buyer                                   provider
    Offer(bid, job)                  ->
                                     <-     Filled(fill)  or  Refused(reject), and the end
    Confirmed(confirm, small inputs) ->
                                     <-     Fetching* Lowering* Rows* Checkpoint* Heartbeat*
                                     <-     Receipted(receipt)* after each checkpoint
    Countersigned(receipt)           ->     once the buyer has verified every chunk of it
                                     <-     Committed(commit)
                                     <-     Delivered(receipt, result, salt, small blobs)
    Countersigned(receipt)           ->     once every output is verified and durable
                                     <-     Settled, and the end

``Abandoned`` may come from either side at any time; heartbeats from both. A buyer whose stream
broke opens another and begins it with what it said last: ``Confirmed``, ``Countersigned`` or
``Abandoned``. Blobs that are not small travel over the blob protocol, on streams of their own.
Inputs are shown to nobody but the provider that has signed a fill.
Signed records are opaque bytes here; ``p2pflop.market`` knows them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.units import KIB
from p2pflop.wire import U32, U63, Hash, Record

MAX_INLINE_BYTES: Final = 256 * KIB
MAX_INLINE_BLOBS: Final = 128
MAX_BODY_BYTES: Final = 512 * KIB
MAX_RECORD_BYTES: Final = 64 * KIB
MAX_RESULT_BYTES: Final = 512 * KIB
MAX_ROWS: Final = 4096

Envelope = Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
InlineBlobs = Annotated[
    tuple[tuple[Hash, Annotated[bytes, msgspec.Meta(max_length=MAX_INLINE_BYTES)]], ...],
    msgspec.Meta(max_length=MAX_INLINE_BLOBS),
]
ScalarBytes = Annotated[bytes, msgspec.Meta(max_length=8)]


class Offer(Record, frozen=True, tag=0):
    """A directed bid with the job (an encoded JobBody)."""

    bid: Envelope
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_BODY_BYTES)]


class Filled(Record, frozen=True, tag=1):
    """The provider's fill."""

    fill: Envelope


class Refused(Record, frozen=True, tag=2):
    """The provider's reject."""

    reject: Envelope


class Confirmed(Record, frozen=True, tag=3):
    """The buyer's confirm, and the inputs that are small."""

    confirm: Envelope
    blobs: InlineBlobs


class Fetching(Record, frozen=True, tag=4):
    """The provider holds ``done_bytes`` of ``total_bytes`` of the inputs."""

    done_bytes: U63
    total_bytes: U63


class Lowering(Record, frozen=True, tag=5):
    """Kernels lowered, over all graphs of the job. ``total`` grows as graphs are scheduled."""

    done: U32
    total: U32


class Rows(Record, frozen=True, tag=6):
    """Steps ``first_step`` to ``last_step`` are done; their traced values (step, phase, output)."""

    first_step: U63
    last_step: U63
    values: Annotated[
        tuple[tuple[U63, U32, U32, ScalarBytes], ...], msgspec.Meta(max_length=MAX_ROWS)
    ]


class Checkpoint(Record, frozen=True, tag=7):
    """What there is after ``step`` steps: the Result, encoded, of the steps since the checkpoint
    before it, with the state as it is now. Small blobs of it are in ``blobs``."""

    MAX_BYTES: ClassVar[int] = MAX_INLINE_BYTES + MAX_RESULT_BYTES + 64 * (MAX_INLINE_BLOBS + 1)

    step: U63
    interval: Annotated[bytes, msgspec.Meta(max_length=MAX_RESULT_BYTES)]
    blobs: InlineBlobs


class Receipted(Record, frozen=True, tag=8):
    """The provider's receipt up to the checkpoint that it told of before."""

    receipt: Envelope


class Committed(Record, frozen=True, tag=9):
    """The provider's commit, before any result byte."""

    commit: Envelope


class Delivered(Record, frozen=True, tag=10):
    """Receipt, result record, the salt that opens the commit, and the blobs that are small."""

    receipt: Envelope
    result: Annotated[bytes, msgspec.Meta(max_length=MAX_RESULT_BYTES)]
    salt: Hash
    blobs: InlineBlobs


class Countersigned(Record, frozen=True, tag=11):
    """The buyer's envelope around the same receipt."""

    receipt: Envelope


class Settled(Record, frozen=True, tag=12):
    """The provider's ledger has the countersigned receipt."""


class Heartbeat(Record, frozen=True, tag=13):
    """I am alive. Says nothing about work or money."""


class Abandoned(Record, frozen=True, tag=14):
    """The sender's abandon record."""

    abandon: Envelope


Message = (
    Offer
    | Filled
    | Refused
    | Confirmed
    | Fetching
    | Lowering
    | Rows
    | Checkpoint
    | Receipted
    | Committed
    | Delivered
    | Countersigned
    | Settled
    | Heartbeat
    | Abandoned
)
_DECODER: Final = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """One frame."""
    return msgspec.msgpack.encode(message)


def decode_message(frame: bytes, peer: str) -> Message:
    """Raises ProtocolError, naming ``peer``, for anything but a message within its limits."""
    try:
        message: Message = _DECODER.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{peer} sent a bad message: {str(error)[:200]}", peer=peer) from error
    return message
