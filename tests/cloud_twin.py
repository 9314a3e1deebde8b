"""A node's end of a session without a node: it obeys commands in this process.

``Twin`` is the machine; ``TwinLink`` joins it to a script in one process, ``serve`` by a socket.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from tinygrad.helpers import Context

from p2pflop.cloud.counters import count
from p2pflop.cloud.process import the_cloud
from p2pflop.dht.manifest import address_of
from p2pflop.errors import JobError, P2PFlopError
from p2pflop.job.commands import (
    AnyCommand,
    Batch,
    Close,
    Closed,
    Failed,
    Frame,
    Leased,
    Open,
    Read,
    ScriptFrame,
    decode_frame,
    encode_frame,
)
from p2pflop.job.session import SessionTable
from p2pflop.kernels.session_local import LocalSession
from p2pflop.kernels.tinygrad_engine import TinygradEngine

PRICE_NUSD = 50_000_000
WINDOW = 4096, 2**22
ENGINE = TinygradEngine("CPU")
"""Of the class that this process is in."""


def script_frame(encoded: bytes) -> Frame:
    """What a script said."""
    frame: Frame = decode_frame(cast(type[Frame], ScriptFrame), encoded)
    return frame


@dataclass
class Twin:
    """Answers frames with frames, each of which is given to ``say``, encoded.

    Command ``fail_at`` is the end of the session; that is told at once or, ``fails_late``, when the
    script says that it is done.
    """

    say: Callable[[bytes], None]
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    fail_at: int | None = None
    fails_late: bool = False
    fault: Failed | None = None
    session: LocalSession = field(init=False)
    batches: int = 0
    reads: int = 0

    @property
    def table(self) -> SessionTable:
        """What the commands so far add up to."""
        return self.session.table

    def hear(self, encoded: bytes) -> None:
        """Take a frame of the script's."""
        match script_frame(encoded):
            case Open() as opened:
                self.session = LocalSession(ENGINE, opened.memory_bytes, self.blobs.__getitem__)
                terms = "CPU", PRICE_NUSD, opened.cap_nusd
                self.answer(Leased("ab" * 32, opened.class_name or "cpu", *terms, *WINDOW))
            case Batch(first, commands) if self.fault is None:
                self.batches += 1
                self.reads += sum(isinstance(command, Read) for command in commands)
                assert first == self.table.count
                self._obey(commands)
            case Close():
                if self.fault is not None and self.fails_late:
                    self.answer(self.fault)
                self._close()

    def answer(self, frame: Frame) -> None:
        """Say a frame."""
        self.say(encode_frame(frame))

    def _close(self) -> None:
        self.answer(Closed(self.table.flop, self.table.moved_bytes, 123, 10**9))

    def _obey(self, commands: tuple[AnyCommand, ...]) -> None:
        stop = None if self.fail_at is None else max(0, self.fail_at - self.table.count)
        try:
            # It computes in the process of the script here, which may be capturing or printing.
            with Context(CAPTURING=0, DEBUG=0, BEAM=0, DEV=os.environ["DEV"]):
                for answer in self.session.obey(commands[:stop]):
                    self.answer(answer)
            if stop is not None and stop < len(commands):
                raise JobError("it fell over", hint="Try again.")
        except P2PFlopError as error:
            self.fault = Failed(self.table.count, True, str(error), error.hint)
            if not self.fails_late:
                self.answer(self.fault)
                self._close()


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
