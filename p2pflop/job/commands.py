"""What a session is made of: the commands of a tinygrad program, and what is said around them.

A **session** is a lease that runs graphs as they come, not a work that is known beforehand. Its
memory is a table of numbered buffers; a command allocates, fills, runs, reads or frees. Commands
are numbered from 0 in the order in which they are given, and obeyed in that order: equal commands
give equal bytes within a class, so that the log of them, or a snapshot and the rest of the log, is
all that another provider needs to go on. Only ``Read`` is answered.

A graph of a session may assign to its params (``graph.Op.ASSIGN``) and has no fresh outputs: what
it computes goes into places that a ``Bind`` names, one for each of its params in their order. A
``Run`` names the binding alone, so that a step that is replayed costs a few bytes.

Between a script and its node, and between nodes, frames of these travel: see ``Frame``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, TypeVar

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.job.limits import MAX_GRAPH_BYTES, MAX_GRAPH_PARAMS
from p2pflop.wire import U32, U63, Hash, Record, Text

MAX_WRITE_BYTES: Final = 64 * 1024
"""Of data inside a command; what is larger is a blob, and a ``Load`` names it."""
MAX_BATCH_COMMANDS: Final = 4096
MAX_FRAME_BYTES: Final = MAX_GRAPH_BYTES + 1024 * 1024
MAX_DATA_BYTES: Final = 1024 * 1024
MAX_SCRIPT_TEXT: Final = 2000

Place = tuple[U32, U63]
"""A buffer, and how many bytes into it."""


class Command(Record, frozen=True):
    """Base of the commands."""

    MAX_BYTES: ClassVar[int] = MAX_FRAME_BYTES


class Allocate(Command, frozen=True, tag=0):
    """Buffer ``buffer``, which is free, has ``size_bytes`` of zeros from now on."""

    buffer: U32
    size_bytes: U63


class Free(Command, frozen=True, tag=1):
    """Let a buffer and all bindings that name it go."""

    buffer: U32


class Write(Command, frozen=True, tag=2):
    """Put ``data`` into a buffer."""

    buffer: U32
    offset_bytes: U63
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_WRITE_BYTES)]


class Load(Command, frozen=True, tag=3):
    """Put the blob at ``address``, which has ``size_bytes``, into a buffer."""

    buffer: U32
    offset_bytes: U63
    address: Hash
    size_bytes: U63


class Define(Command, frozen=True, tag=4):
    """Have a graph; its hash names it in ``Bind``."""

    graph: Annotated[bytes, msgspec.Meta(max_length=MAX_GRAPH_BYTES)]


class Bind(Command, frozen=True, tag=5):
    """Binding ``binding``, whatever it was before, is that graph with its params at ``places``."""

    binding: U32
    graph: Hash
    places: Annotated[tuple[Place, ...], msgspec.Meta(max_length=MAX_GRAPH_PARAMS)]


class Run(Command, frozen=True, tag=6):
    """Run a binding once."""

    binding: U32


class Copy(Command, frozen=True, tag=7):
    """Copy ``size_bytes`` from one place to another; the two do not overlap."""

    target: Place
    source: Place
    size_bytes: U63


class Read(Command, frozen=True, tag=8):
    """Send those bytes back."""

    buffer: U32
    offset_bytes: U63
    size_bytes: U63


class Hold(Command, frozen=True, tag=9):
    """Nothing: the lease stood for ``seconds`` without anything to do, and this is paid for.

    The buyer's node says it, never a script: what is built anew elsewhere has stood for no time.
    """

    seconds: U32


AnyCommand = Allocate | Free | Write | Load | Define | Bind | Run | Copy | Read | Hold


class Frame(Record, frozen=True):
    """Base of what travels between a script, its node and its provider.

    ::

        script or buyer                        node or provider
        Open                             ->
                                         <-    Leased
        Batch*                           ->
                                         <-    Ran* Data* Note*
        Close                            ->
                                         <-    Closed

    Batches are sent on without waiting for an answer, but not more than the ``window`` of
    ``Leased`` commands or bytes ahead of the last ``Ran``. ``Failed`` may come in place of
    anything; after it only ``Closed``.
    """

    MAX_BYTES: ClassVar[int] = MAX_FRAME_BYTES


class Open(Frame, frozen=True, tag=32):
    """A script wants a session.

    ``class_name`` is as ``submit --class`` takes it; ``cap_nusd`` the most that it may cost in all;
    ``wait_s`` how long it waits where nobody offers; ``local`` says that it then goes on in the
    sandbox of this node; ``verbose`` that each run is to be told by a ``Ran`` of its own;
    ``script`` is how the node lists it.
    """

    version: Literal[1]
    class_name: Text
    memory_bytes: U63
    cap_nusd: U63
    wait_s: U32
    local: bool
    verbose: bool
    script: Text = ""


class Batch(Frame, frozen=True, tag=33):
    """Commands ``first`` and following."""

    first: U63
    commands: Annotated[tuple[AnyCommand, ...], msgspec.Meta(max_length=MAX_BATCH_COMMANDS)]


class Close(Frame, frozen=True, tag=34):
    """Nothing more will come."""


class Leased(Frame, frozen=True, tag=48):
    """Who runs it from now on, on what terms. ``window_bytes`` and ``window_commands`` bound what
    may be under way. ``provider`` is an account in hex, ``dev`` the ``DEV=`` of equal bytes."""

    provider: Text
    class_name: Text
    dev: Text
    price_nusd: U63
    cap_nusd: U63
    window_commands: U32
    window_bytes: U32


class Ran(Frame, frozen=True, tag=49):
    """All commands before ``upto`` are obeyed; what those since the last ``Ran`` took."""

    upto: U63
    kernels: U32
    flop: U63
    touched_bytes: U63
    busy_ns: U63


class Data(Frame, frozen=True, tag=50):
    """The next bytes of the answer to command ``number``, a ``Read``; ``last`` ends it."""

    number: U63
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_DATA_BYTES)]
    last: bool


class Note(Frame, frozen=True, tag=51):
    """A line for the person: another provider, a wait."""

    text: Annotated[str, msgspec.Meta(max_length=MAX_SCRIPT_TEXT)]


class Failed(Frame, frozen=True, tag=52):
    """The session is over, by ``number`` if a command is to blame (else 2**63 - 1).

    ``job``: by the program's own fault. ``hint`` says what to do.
    """

    number: U63
    job: bool
    text: Annotated[str, msgspec.Meta(max_length=MAX_SCRIPT_TEXT)]
    hint: Annotated[str, msgspec.Meta(max_length=MAX_SCRIPT_TEXT)]


class Closed(Frame, frozen=True, tag=53):
    """What it was in all, over every provider."""

    flop: U63
    moved_bytes: U63
    cost_nusd: U63
    busy_ns: U63


NOBODY: Final = 2**63 - 1
"""``Failed.number`` where no command is to blame."""

ScriptFrame = Open | Batch | Close
NodeFrame = Leased | Ran | Data | Note | Failed | Closed

F = TypeVar("F")


def encode_frame(frame: Frame) -> bytes:
    """``frame`` as bytes, without a length."""
    return msgspec.msgpack.encode(frame)


def decode_frame(kind: type[F], data: bytes | memoryview) -> F:
    """A frame of ``kind``, a union. Raises ProtocolError."""
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(data)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid frame: {str(error)[:200]}") from error
