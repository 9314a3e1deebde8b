"""A script of a session for tests: the frames that tinygrad's device would send, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from p2pflop.dht.manifest import address_of
from p2pflop.errors import ProviderError
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Batch,
    Bind,
    Close,
    Closed,
    Data,
    Define,
    Failed,
    Leased,
    Load,
    NodeFrame,
    Note,
    Open,
    Ran,
    Read,
    Run,
    ScriptFrame,
    Write,
)
from p2pflop.job.graph import (
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    encode_graph,
    graph_hash,
)
from p2pflop.node.session_messages import Assembler, SessionMessage
from p2pflop.units import MIB

FLOATS = 64
CAP_NUSD = 10**9


def sample_graph(floats: int = FLOATS, *, times: int = 1) -> bytes:
    """A session's graph: slot 0 += slot 1, ``times`` over."""
    nodes = [Node(Op.PARAM, (0,)), Node(Op.PARAM, (1,))]
    for _ in range(times):
        nodes.append(Node(Op.ADD, (), (0 if len(nodes) == 2 else len(nodes) - 1, 1)))
    nodes.append(Node(Op.ASSIGN, (), (0, 0, len(nodes) - 1)))
    params = tuple(GraphParam(slot, Dtype.FLOAT32, (floats,)) for slot in (0, 1))
    return encode_graph(Graph(params, tuple(nodes), (Output(len(nodes) - 1, 0),)))


def opening(**changes: object) -> Open:
    """What a script wants."""
    wish = {
        "version": 1,
        "class_name": "",
        "memory_bytes": 64 * MIB,
        "cap_nusd": CAP_NUSD,
        "wait_s": 0,
        "local": False,
        "verbose": False,
    }
    return Open(**{**wish, **changes})  # type: ignore[arg-type]


def beginning(floats: int = FLOATS, *, large: bytes = b"") -> list[AnyCommand]:
    """Two buffers, filled, and a binding; with ``large`` the first one is loaded."""
    graph = sample_graph(floats)
    size = 4 * floats
    first: AnyCommand = Write(0, 0, bytes(range(256))[: min(256, size)])
    if large:
        first = Load(0, 0, address_of(large), len(large))
    return [
        Allocate(0, size),
        Allocate(1, size),
        first,
        Write(1, 0, b"\1\2\3\4" * min(floats, 1000)),
        Define(graph),
        Bind(0, graph_hash(graph), ((0, 0), (1, 0))),
    ]


@dataclass
class Script:
    """``session_script.ScriptLine``, and what a script does with it. Reads are answered in full."""

    frames: list[NodeFrame] = field(default_factory=list)
    answers: dict[int, bytes] = field(default_factory=dict)
    sent: int = 0
    ran_to: int = 0
    gone: bool = False
    stopped: bool = False

    def __post_init__(self) -> None:
        self._put, self._take = trio.open_memory_channel[ScriptFrame](10_000)
        self._news = trio.Event()
        self._continued = trio.Event()
        self._partial = b""

    async def receive(self) -> ScriptFrame | None:
        """See ScriptLine."""
        try:
            return await self._take.receive()
        except trio.EndOfChannel:
            return None

    async def send(self, frame: NodeFrame) -> None:
        """See ScriptLine."""
        await trio.lowlevel.checkpoint()
        while self.stopped and not self.gone:
            await self._continued.wait()
        if self.gone:
            raise ProviderError("the script is gone")
        self.frames.append(frame)
        if isinstance(frame, Data):
            self._partial += frame.data
            if frame.last:
                assert frame.number not in self.answers
                self.answers[frame.number], self._partial = self._partial, b""
        elif isinstance(frame, Ran):
            assert frame.upto >= self.ran_to
            self.ran_to = frame.upto
        self._news.set()
        self._news = trio.Event()

    def say(self, frame: ScriptFrame) -> None:
        """Send a frame to the node."""
        self._put.send_nowait(frame)

    def give(self, commands: Sequence[AnyCommand]) -> int:
        """Send commands; the number of the last one."""
        self.say(Batch(self.sent, tuple(commands)))
        self.sent += len(commands)
        return self.sent - 1

    def leave(self) -> None:
        """Be gone, without a word."""
        self.gone = True
        self._continued.set()
        self._put.close()

    def stop(self) -> None:
        """Read nothing, as a script at Ctrl-Z."""
        self.stopped, self._continued = True, trio.Event()

    def go_on(self) -> None:
        """Read again."""
        self.stopped = False
        self._continued.set()

    async def read(self, buffer: int, size_bytes: int) -> bytes:
        """The bytes of a buffer."""
        number = self.give([Read(buffer, 0, size_bytes)])
        while number not in self.answers:
            assert not self.of(Failed), self.of(Failed)
            await self._news.wait()
        return self.answers[number]

    async def until(self, kind: type[NodeFrame]) -> NodeFrame:
        """The first frame of that kind."""
        while not self.of(kind):
            await self._news.wait()
        return self.of(kind)[0]

    async def begun(self) -> None:
        """Return once there is a lease, or will be none."""
        while not self.of(Leased) and not self.of(Failed):
            await self._news.wait()

    async def heard(self) -> None:
        """Return once the node says anything more."""
        await self._news.wait()

    async def until_note(self) -> None:
        """Return once the person was told something."""
        while not self.notes:
            await self._news.wait()

    async def obeyed(self) -> None:
        """Return once all that was sent is."""
        while self.ran_to < self.sent:
            assert not self.of(Failed), self.of(Failed)
            await self._news.wait()

    async def close(self) -> Closed:
        """End it in order."""
        self.say(Close())
        closed = await self.until(Closed)
        assert isinstance(closed, Closed)
        return closed

    def of(self, kind: type[NodeFrame]) -> list[NodeFrame]:
        """What the node has sent of a kind."""
        return [frame for frame in self.frames if isinstance(frame, kind)]

    @property
    def leases(self) -> list[Leased]:
        """Who ran it, one after the other."""
        return [frame for frame in self.frames if isinstance(frame, Leased)]

    @property
    def notes(self) -> list[str]:
        """What the person was told."""
        return [frame.text for frame in self.frames if isinstance(frame, Note)]


def steps(count: int) -> list[AnyCommand]:
    """So many runs."""
    return [Run(0)] * count


def decoded(frame: bytes) -> SessionMessage | None:
    """What a frame of a session's stream says, as far as it says it alone."""
    return Assembler("peer").take(frame)
