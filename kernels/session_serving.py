"""A session inside a worker: batches of commands obeyed against a workspace, answers sent back.

Before each command its place among all that came here goes into the **mark**: eight bytes of memory
shared with the node, which looks there for what ended this process.
"""

from __future__ import annotations

import struct
import time
from typing import Final

from p2pflop.kernels.engine import Workspace
from p2pflop.kernels.frames import BlockingPipe, Obey, Obeyed, parts

MARK: Final = struct.Struct("<Q")
"""The place, from 0, of the command that is being obeyed."""


class ServedSession:
    """``mark`` is writable memory of ``MARK.size`` bytes."""

    def __init__(self, pipe: BlockingPipe, workspace: Workspace, mark: memoryview) -> None:
        self.workspace = workspace
        self._pipe = pipe
        self._mark = mark
        self._count = 0
        self._busy_ns = 0
        self._told = (0, 0, 0)

    def obey(self, message: Obey) -> None:
        """Obey commands; after the last ones of a batch tell what it took."""
        space, start_ns = self.workspace, time.monotonic_ns()
        for command in message.commands:
            MARK.pack_into(self._mark, 0, self._count)
            self._count += 1
            answer = space.obey(command)
            if answer is not None:
                self._busy_ns += time.monotonic_ns() - start_ns
                for part in parts(answer):
                    self._pipe.send(part)
                start_ns = time.monotonic_ns()
        self._busy_ns += time.monotonic_ns() - start_ns
        if message.last:
            self._tell()

    def _tell(self) -> None:
        space = self.workspace
        now = space.kernels, space.flop, space.touched_bytes
        kernels, flop, touched_bytes = (n - old for n, old in zip(now, self._told, strict=True))
        self._pipe.send(Obeyed(kernels, flop, touched_bytes, self._busy_ns))
        self._told, self._busy_ns = now, 0
