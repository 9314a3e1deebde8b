"""A node's end of a session without a node: it obeys commands by tinygrad on the CPU.

``Twin`` is the machine; ``TwinLink`` joins it to a script in one process, ``serve`` by a socket.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from tinygrad import Tensor
from tinygrad.device import Buffer
from tinygrad.dtype import dtypes
from tinygrad.engine.realize import compile_linear, link_linear, run_linear
from tinygrad.helpers import Context
from tinygrad.uop.ops import UOp

from p2pflop.cloud.counters import count
from p2pflop.cloud.process import the_cloud
from p2pflop.dht.manifest import address_of
from p2pflop.errors import JobError, P2PFlopError
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Batch,
    Bind,
    Close,
    Closed,
    Copy,
    Data,
    Define,
    Failed,
    Frame,
    Free,
    Leased,
    Load,
    Open,
    Ran,
    Read,
    Run,
    ScriptFrame,
    Write,
    decode_frame,
    encode_frame,
)
from p2pflop.job.graph import Dtype, Op, decode_graph
from p2pflop.job.session import SessionTable, open_graph
from p2pflop.kernels.dialect import DTYPES
from p2pflop.kernels.lower import _build_node

PRICE_NUSD = 50_000_000


def script_frame(encoded: bytes) -> Frame:
    """What a script said."""
    frame: Frame = decode_frame(cast(type[Frame], ScriptFrame), encoded)
    return frame


@dataclass
class Twin:
    """Answers frames with frames. ``say`` gets every encoded answer."""

    say: Callable[[bytes], None]
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    window_commands: int = 4096
    window_bytes: int = 2**22
    fail_at: int | None = None
    fails_late: bool = False
    fault: Failed | None = None
    table: SessionTable = field(default_factory=lambda: SessionTable(0))
    batches: int = 0
    reads: int = 0
    received_bytes: int = 0
    buffers: dict[int, Buffer] = field(default_factory=dict)
    linears: dict[int, UOp] = field(default_factory=dict)

    def hear(self, encoded: bytes) -> None:
        """Take a frame of the script's."""
        self.received_bytes += len(encoded)
        match script_frame(encoded):
            case Open() as opened:
                self.table.memory_bytes = opened.memory_bytes
                terms = "CPU", PRICE_NUSD, opened.cap_nusd
                window = self.window_commands, self.window_bytes
                self.answer(Leased("ab" * 32, opened.class_name or "cpu", *terms, *window))
            case Batch(first, commands) if self.fault is None:
                self.batches += 1
                assert first == self.table.count
                self._obey(commands)
            case Close():
                if self.fault is not None and self.fails_late:
                    self.answer(self.fault)
                self.answer(Closed(self.table.flop, self.table.moved_bytes, 123, 10**9))

    def answer(self, frame: Frame) -> None:
        """Say a frame."""
        self.say(encode_frame(frame))

    def _obey(self, commands: tuple[AnyCommand, ...]) -> None:
        for command in commands:
            number, flop, touched = self.table.count, self.table.flop, self.table.touched_bytes
            try:
                if number == self.fail_at:
                    raise JobError("it fell over", hint="Try again.")
                opened = open_graph(command.graph) if isinstance(command, Define) else None
                self.table.apply(command, opened)
                with Context(CAPTURING=0, DEBUG=0, BEAM=0):
                    kernels = self._do(command, number)
            except P2PFlopError as error:
                self.fault = Failed(number, True, str(error), error.hint)
                if not self.fails_late:
                    self.answer(self.fault)
                    self.answer(Closed(self.table.flop, self.table.moved_bytes, 123, 10**9))
                return
            if isinstance(command, Run):
                flop, touched = self.table.flop - flop, self.table.touched_bytes - touched
                self.answer(Ran(number + 1, kernels, flop, touched, 1000))
        self.answer(Ran(self.table.count, 0, 0, 0, 0))

    def _do(self, command: AnyCommand, number: int) -> int:
        match command:
            case Allocate(buffer, size):
                self.buffers[buffer] = Buffer("CPU", size, dtypes.uint8).allocate()
                self._bytes(buffer, 0, size)[:] = 0
            case Free(buffer):
                del self.buffers[buffer]
            case Write(buffer, at, data):
                self._bytes(buffer, at, len(data))[:] = np.frombuffer(data, np.uint8)
            case Load(buffer, at, address, size):
                assert address_of(self.blobs[address]) == address
                self._bytes(buffer, at, size)[:] = np.frombuffer(self.blobs[address], np.uint8)
            case Copy((target, at), (source, start), size):
                self._bytes(target, at, size)[:] = self._bytes(source, start, size)
            case Read(buffer, at, size):
                self.reads += 1
                data = self._bytes(buffer, at, size).tobytes()
                for start in range(0, size, 2**20):
                    piece = data[start : start + 2**20]
                    self.answer(Data(number, piece, start + 2**20 >= size))
            case Bind(binding, _, places):
                self.linears[binding] = self._linear(binding, places)
            case Run(binding):
                linear = self.linears[binding]
                run_linear(linear, jit=True, update_stats=False)
                return len(linear.src)
        return 0

    def _bytes(self, buffer: int, at: int, size: int) -> np.ndarray:
        return np.frombuffer(self.buffers[buffer]._buf.cpu_view().mv, np.uint8)[at : at + size]

    def _linear(self, binding: int, places: tuple[tuple[int, int], ...]) -> UOp:
        graph = decode_graph(self.table.bindings[binding].graph.encoded)
        params: dict[int, UOp] = {}
        for param, (number, at) in zip(graph.params, places, strict=True):
            dtype, base = DTYPES[Dtype(param.dtype)], self.buffers[number]
            size = int(np.prod(param.shape))
            view = Buffer("CPU", size, dtype, base=base, offset=at).ensure_allocated()
            params[param.slot] = UOp.from_buffer(view).reshape(param.shape)
        nodes: list[UOp] = []
        for node in graph.nodes:
            if node.op is Op.ASSIGN:
                tensor, view, value = (nodes[ref] for ref in node.refs)
                nodes.append(tensor.after(view.store(value)))
            else:
                nodes.append(_build_node(node, nodes, params))
        roots = [Tensor(nodes[output.node]) for output in graph.outputs]
        linear, variables = Tensor.linear_with_vars(*roots)
        assert not variables
        return link_linear(compile_linear(linear))


class TwinLink:
    """``p2pflop.cloud.link.Link`` to a twin in this process. It does what it is asked at once."""

    def __init__(self) -> None:
        self.twin = Twin(self._hear)
        self._came: list[bytes] = []

    def _hear(self, frame: bytes) -> None:
        self._came.append(frame)

    def put_blob(self, data: memoryview) -> bytes:
        """Keep a blob for a Load."""
        address = address_of(bytes(data))
        self.twin.blobs[address] = bytes(data)
        return address

    def send(self, frame: bytes) -> None:
        """See Link."""
        self.twin.hear(frame)

    def receive(self, wait_s: float | None = 0) -> list[bytes]:
        """See Link."""
        came, self._came = self._came, []
        assert came or wait_s is not None, "waiting for nothing"
        return came

    @property
    def pending_bytes(self) -> int:
        """See Link."""
        return 0

    def close(self) -> None:
        """See Link."""

    def leave(self) -> None:
        """See Link."""


_links: list[TwinLink] = []


def shared_twin() -> Twin:
    """The twin at the other end of this process's session: a process has one for all its life."""
    if not _links:
        _links.append(TwinLink())
        link = _links[0]
        os.environ["CLOUD_QUIET"] = "1"
        the_cloud(count, connect=lambda: (link, link.put_blob))
        del os.environ["CLOUD_QUIET"]
    return _links[0].twin
