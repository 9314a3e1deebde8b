"""What the node and its workers say to each other, and the frames that carry it.

A frame is a u32 (big-endian) length and that many bytes: one message, a msgpack array that starts
with the message's number. Both ends decode into bounded, typed structs; the node treats every
frame from a worker as a stranger's. Larger things (graphs, plans, tensors) go as ``Part`` after
``Part``, the last one marked.

To a lowerer::

    node                                    lowerer
                                    <-      Ready
    Lower, Part(graph)...           ->      (as often as wanted)
                                    <-      Progress*, Part(plan)...  or  Fault

To a worker, one exchange at a time; only ``Stand`` and ``Stop`` may come during a run::

    node                                    worker
                                    <-      Ready
    Load(work, plans)               ->
    LoadPlan(graph), Part...        ->      (once a plan that the last Load had not)
    Initialise                      ->
                                    <-      Done
    Write(slot, offset, data)       ->      (not answered)
    Run(first_step, steps, every)   ->
                                    <-      Progressed* Paused
    Continue  or  anything else     ->      (while paused)
    Read(slots) or ReadOutput       ->
                                    <-      Part...
    Stand                           ->      (running: Paused comes soon; else nothing)
    Stop                            ->      (running: Paused comes soon; paused: the run is over)

To the worker of a session (``job.commands``), which is sent on without waiting::

    node                                    worker
    OpenSession                     ->
    LoadPlan(graph), Part...        ->      (not answered; as often as wanted from here on)
    Put(buffer, offset, data)       ->      (not answered)
    Obey(commands, last)            ->
                                    <-      (Part... for each Read)... then Obeyed after the last

A ``Fault`` may come in place of any answer, and is the last frame. The zygote and the compile
helper are spoken to over socket pairs with ``Request`` and ``Notice``; a ``Fork`` brings its pipe
ends along as descriptors.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from typing import Annotated, Any, Final, TypeVar

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.job import commands
from p2pflop.job.commands import MAX_BATCH_COMMANDS
from p2pflop.units import KIB, MIB

PART_BYTES: Final = MIB
MAX_FRAME_BYTES: Final = MIB + 64 * KIB
MAX_CONTROL_BYTES: Final = 16 * KIB
MAX_ROW_VALUES: Final = 1024
MAX_SCALAR_BYTES: Final = 8
MAX_TEXT: Final = 500
MAX_WORK_BYTES: Final = MIB
MAX_GRAPH_BYTES: Final = 4 * MIB
MAX_PLANS: Final = 4096
MAX_PLANS_BYTES: Final = 512 * MIB
"""Of all plans in one worker."""
MAX_READ_SLOTS: Final = 4096
MAX_PROGRESS: Final = 2**31 - 1
HEADER_BYTES: Final = 4

_U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Data = Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
_Step = Annotated[int, msgspec.Meta(ge=0, le=2**62)]

SessionCommand = (
    commands.Allocate
    | commands.Free
    | commands.Write
    | commands.Bind
    | commands.Run
    | commands.Copy
    | commands.Read
)
"""All but Define and Load, which reach a worker as LoadPlan and Put."""


class Message(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of everything that travels in a frame."""


class Part(Message, frozen=True, tag=0):
    """The next bytes of what the exchange is about; ``last`` ends it."""

    data: _Data
    last: bool


# --- Node to lowerer and worker ------------------------------------------------------------------


class Lower(Message, frozen=True, tag=1):
    """Lower the graph whose bytes follow as parts."""


class Load(Message, frozen=True, tag=2):
    """An encoded ``Work``; ``plans`` LoadPlans with their parts follow. Not answered.

    Of the plans that the worker holds, those that this work does not name go.
    """

    work: Annotated[bytes, msgspec.Meta(max_length=MAX_WORK_BYTES)]
    plans: Annotated[int, msgspec.Meta(ge=0, le=MAX_PLANS)]


class LoadPlan(Message, frozen=True, tag=3):
    """The plan of ``graph`` follows as parts."""

    graph: _Hash


class Write(Message, frozen=True, tag=4):
    """Put ``data`` at ``offset_bytes`` of a slot."""

    slot: _U32
    offset_bytes: _U63
    data: _Data


class Initialise(Message, frozen=True, tag=5):
    """Set the seed, run the init graphs."""


class Run(Message, frozen=True, tag=6):
    """Run steps, pausing where ``step % pause_every == 0`` (0: never), where the work stands still
    (``spec.stands_still``) and at the end."""

    first_step: _Step
    steps: _Step
    pause_every: _Step


class Continue(Message, frozen=True, tag=7):
    """Go on after a pause."""


class Stop(Message, frozen=True, tag=8):
    """Finish the current step, then pause for good. It ends a run that stands still without an
    answer, and is ignored where there is no run."""


class Read(Message, frozen=True, tag=9):
    """Send the bytes of these slots, one after the other."""

    slots: Annotated[tuple[_U32, ...], msgspec.Meta(max_length=MAX_READ_SLOTS)]


class ReadOutput(Message, frozen=True, tag=10):
    """Send the last value of a fresh output; empty if it has none yet."""

    phase: _U32
    output: _U32


class Stand(Message, frozen=True, tag=11):
    """Finish the current step, then pause. Ignored where nothing runs."""


class OpenSession(Message, frozen=True, tag=12):
    """Begin a session, without buffers and graphs."""


class Put(Message, frozen=True, tag=13):
    """Put ``data`` at ``offset_bytes`` of a session's buffer."""

    buffer: _U32
    offset_bytes: _U63
    data: _Data


class Obey(Message, frozen=True, tag=14):
    """Obey these commands of a session; after the ``last`` ones of a batch say Obeyed."""

    commands: Annotated[tuple[SessionCommand, ...], msgspec.Meta(max_length=MAX_BATCH_COMMANDS)]
    last: bool


LowererCommand = Lower | Part
WorkerCommand = (
    Load
    | LoadPlan
    | Part
    | Write
    | Initialise
    | Run
    | Continue
    | Stop
    | Stand
    | Read
    | ReadOutput
    | OpenSession
    | Put
    | Obey
)

# --- Lowerer and worker to node ------------------------------------------------------------------


class Ready(Message, frozen=True, tag=32):
    """Locked, and waiting."""


class Done(Message, frozen=True, tag=33):
    """What was asked is done."""


class Progress(Message, frozen=True, tag=34):
    """``done`` of ``total`` kernels are lowered."""

    done: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROGRESS)]
    total: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROGRESS)]


Scalar = tuple[_Step, _U32, _U32, Annotated[bytes, msgspec.Meta(max_length=MAX_SCALAR_BYTES)]]


class Progressed(Message, frozen=True, tag=35):
    """Steps ``first_step`` to ``last_step`` ran, and the traced scalars of them in order.

    One step's scalars may be spread over several messages: all but the last of them repeat the
    step as both first and last.
    """

    first_step: _Step
    last_step: _Step
    values: Annotated[tuple[Scalar, ...], msgspec.Meta(max_length=MAX_ROW_VALUES)]


class Paused(Message, frozen=True, tag=36):
    """Standing still before ``step``. ``ended``: nothing more of this run will come.

    ``condition``: the work's own stop output said so.
    """

    step: _Step
    ended: bool
    condition: bool


class Obeyed(Message, frozen=True, tag=38):
    """A batch is obeyed; what the runs in it took, recomputation included."""

    kernels: _U32
    flop: _U63
    touched_bytes: _U63
    busy_ns: _U63


class Fault(Message, frozen=True, tag=37):
    """It cannot go on. ``job``: by the job's own fault, not by this machine's."""

    job: bool
    text: _Text


LowererReport = Ready | Progress | Part | Fault
WorkerReport = Ready | Done | Progressed | Paused | Part | Obeyed | Fault

# --- Node with zygote and compile helper ---------------------------------------------------------

LOWERER: Final = 0
WORKER: Final = 1
# How a child exits that has not even the memory left to say so.
OUT_OF_MEMORY_CODE: Final = 12


class Fork(Message, frozen=True, tag=64):
    """Fork a locked child on the descriptors that come along: to read, to write, and for a lowerer
    two more to ask the compile helper and to hear from it, for a worker one to share its mark
    (``session_serving``)."""

    number: _U32
    kind: Annotated[int, msgspec.Meta(ge=LOWERER, le=WORKER)]
    memory_bytes: _U63
    cpu_seconds: _U32


class Kill(Message, frozen=True, tag=65):
    """Kill child ``number``, if it still runs."""

    number: _U32


class Serve(Message, frozen=True, tag=66):
    """Compile what comes on the two descriptors that come along."""


Request = Fork | Kill | Serve


class Started(Message, frozen=True, tag=80):
    """The zygote or helper is warm and listens. ``level`` and ``notes``: see ``lockdown``.

    ``version`` names what a plan depends on beside graph and class.
    """

    level: Annotated[int, msgspec.Meta(ge=0, le=3)]
    notes: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=8)]
    version: _Text


class Forked(Message, frozen=True, tag=81):
    """Child ``number`` is process ``pid``."""

    number: _U32
    pid: _U32


class Exited(Message, frozen=True, tag=82):
    """Child ``number`` has ended: by ``signal``, or with ``code`` when that is 0.

    ``out_of_memory``: killed by the watchdog.
    """

    number: _U32
    code: Annotated[int, msgspec.Meta(ge=0, le=255)]
    signal: Annotated[int, msgspec.Meta(ge=0, le=128)]
    out_of_memory: bool


class Failed(Message, frozen=True, tag=83):
    """The zygote or helper cannot start or go on, and ends."""

    text: _Text


Notice = Started | Forked | Exited | Failed

lowerer_command = msgspec.msgpack.Decoder(LowererCommand)
worker_command = msgspec.msgpack.Decoder(WorkerCommand)
lowerer_report = msgspec.msgpack.Decoder(LowererReport)
worker_report = msgspec.msgpack.Decoder(WorkerReport)
request = msgspec.msgpack.Decoder(Request)
notice = msgspec.msgpack.Decoder(Notice)

T = TypeVar("T")


_encoder = msgspec.msgpack.Encoder()


def pack(message: Message) -> bytearray:
    """``message`` in its frame."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    struct.pack_into(">I", frame, 0, len(frame) - HEADER_BYTES)
    return frame


def unpack(decoder: msgspec.msgpack.Decoder[T], body: bytes | bytearray | memoryview) -> T:
    """The message in the body of a frame. Raises ProtocolError."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid message: {str(error)[:200]}") from error


def body_bytes(header: bytes | bytearray, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """The length that a frame's header announces. Raises ProtocolError over ``max_bytes``."""
    size = int.from_bytes(header, "big")
    if size > max_bytes:
        raise ProtocolError(f"frame of {size} bytes is over the limit of {max_bytes}")
    return size


def parts(*pieces: bytes | memoryview) -> Iterator[Part]:
    """``pieces``, joined, as parts; if there is nothing, a single empty part.

    Small pieces share a part; what is larger than a part is not copied.
    """
    whole = sum(len(piece) for piece in pieces)
    told, pending = 0, bytearray()
    for piece in pieces:
        view: Any = memoryview(piece)
        while len(view):
            taken = view[: PART_BYTES - len(pending)]
            view = view[len(taken) :]
            data: Any = taken if not pending and len(taken) == PART_BYTES else None
            if data is None:
                pending += taken
                if len(pending) < PART_BYTES and told + len(pending) < whole:
                    continue
                data, pending = bytes(pending), bytearray()
            told += len(data)
            yield Part(data, told == whole)
    if not whole:
        yield Part(b"", True)


def text(value: object) -> str:
    """``value`` as a text that fits a message and is fit for a terminal."""
    clean = "".join(c if c.isprintable() else " " for c in str(value)[: 4 * MAX_TEXT])
    return " ".join(clean.split())[:MAX_TEXT]


class FrameBuffer:
    """Frames cut out of a byte stream that arrives in any pieces."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pending = bytearray()

    def feed(self, data: bytes | bytearray) -> Iterator[bytes]:
        """The bodies of all frames that ``data`` completes. Raises ProtocolError."""
        self._pending += data
        while len(self._pending) >= HEADER_BYTES:
            end = HEADER_BYTES + body_bytes(self._pending[:HEADER_BYTES], self._max_bytes)
            if len(self._pending) < end:
                return
            body = bytes(self._pending[HEADER_BYTES:end])
            del self._pending[:end]
            yield body


class BlockingPipe:
    """Frames over two blocking descriptors: the side of a child process."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._poll = select.poll()
        self._poll.register(read_fd, select.POLLIN)

    def send(self, message: Message) -> None:
        """Write one message. Raises OSError if nobody reads."""
        self._write(pack(message))

    def send_body(self, body: bytes) -> None:
        """Write one frame with ``body``. Raises OSError if nobody reads."""
        self._write(struct.pack(">I", len(body)) + body)

    def _write(self, frame: bytes | bytearray) -> None:
        view = memoryview(frame)
        while view:
            view = view[os.write(self._write_fd, view) :]

    def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        """Read one message. Raises EOFError at the end, ProtocolError."""
        return unpack(decoder, self.receive_body(MAX_FRAME_BYTES))

    def receive_body(self, max_bytes: int) -> bytearray:
        """Read the body of one frame. Raises EOFError at the end, ProtocolError."""
        return self._exactly(body_bytes(self._exactly(HEADER_BYTES), max_bytes))

    def receive_parts(self, decoder: msgspec.msgpack.Decoder[Any], max_bytes: int) -> bytes:
        """Read parts up to the last. Raises EOFError, ProtocolError."""
        received = bytearray()
        while True:
            part = self.receive(decoder)
            if not isinstance(part, Part):
                raise ProtocolError(f"expected a part, got {type(part).__name__}")
            received += part.data
            if len(received) > max_bytes:
                raise ProtocolError(f"more than {max_bytes} bytes in parts")
            if part.last:
                return bytes(received)

    def waiting(self) -> bool:
        """Whether something can be read at once: a frame, or the end."""
        return bool(self._poll.poll(0))

    def _exactly(self, size: int) -> bytearray:
        received = bytearray(size)
        view = memoryview(received)
        while view:
            count = os.readv(self._read_fd, [view])
            if count == 0:
                raise EOFError
            view = view[count:]
        return received
