"""What the zygote needs of a tensor library: lower a graph, run a plan, and be warm beforehand.

The engine is named on the zygote's command line as a module with a ``create`` function, so that a
test can put in one that misbehaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from p2pflop.job.commands import WorkedCommand
from p2pflop.job.spec import Work

DEFAULT_ENGINE = "p2pflop.kernels.tinygrad_engine"


class WorkSession(Protocol):
    """One work in memory; see ``run.Session`` for what each method promises."""

    def write(self, slot: int, offset_bytes: int, data: bytes | memoryview) -> None: ...

    def initialise(self) -> None: ...

    def step(self, number: int) -> None: ...

    def scalars(self) -> list[tuple[int, int, bytes]]: ...

    def should_stop(self, number: int) -> bool: ...

    def read(self, slot: int) -> memoryview: ...

    def read_output(self, phase: int, output: int) -> memoryview | None: ...


class Workspace(Protocol):
    """The memory of a session; see ``workspace.MachineWorkspace`` for what each method promises."""

    kernels: int
    flop: int
    touched_bytes: int

    def define(self, graph: bytes, plan: bytes) -> None: ...

    def put(self, buffer: int, offset_bytes: int, data: bytes | memoryview) -> None: ...

    def obey(self, command: WorkedCommand) -> memoryview | None: ...


class Compiler(Protocol):
    """What turns the source of a kernel into code."""

    def compile(self, source: str) -> bytes:
        """The object file of C ``source``. Raises JobError, ProviderError."""


class Engine(Protocol):
    """A tensor library behind the sandbox."""

    def use_compiler(self, client: Compiler) -> None:
        """Compile by asking ``client`` from now on."""

    @property
    def lockable(self) -> bool:
        """Whether a child can be locked. If not, it must open a driver that needs what a lock takes
        away: then only limits bind it, and only jobs of the node's own account may run in it.
        """
        ...

    def open(self) -> None:
        """In a child that is not locked: open what a fork would not survive."""

    def warm(self) -> str:
        """Import and try out all that a locked child will need, which can read hardly any file.

        Returns what a plan depends on beside graph and class: versions, the processor.
        """

    def lower(self, graph: bytes, progress: Callable[[int, int], None]) -> bytes:
        """The plan of an encoded graph. Raises JobError."""

    def session(self, work: Work, plans: Mapping[bytes, bytes]) -> WorkSession:
        """``work`` in memory. Raises JobError, ProtocolError."""

    def workspace(self) -> Workspace:
        """Memory for a session that runs graphs as they come."""
