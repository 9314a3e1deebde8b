"""What a run gives step by step, from some step on: traced values, and those that are collected."""

from __future__ import annotations

from p2pflop.job.collection import numbered
from p2pflop.job.delivery import output_bytes, output_dtype
from p2pflop.job.file import CheckedJob
from p2pflop.job.results import TraceLog
from p2pflop.job.spec import MODE_COLLECT, MODE_TRACE, Job, times_due
from p2pflop.wire import encode


class Gathering:
    """The values of the steps from ``first_step`` on."""

    def __init__(self, checked: CheckedJob, first_step: int) -> None:
        self.first_step = first_step
        self._checked = checked
        self._trace = TraceLog()
        self._collected: dict[tuple[int, int], dict[int, bytes]] = {}

    def note(self, phase: int, output: int, value: bytes) -> None:
        """The next value of a traced output, in storage form. Raises ProtocolError."""
        self._trace.append(phase, output, output_dtype(self._checked, phase, output), value)

    def collect(self, phase: int, output: int, step: int, address: bytes) -> None:
        """What a collected output gave at a step, by its address."""
        self._collected.setdefault((phase, output), {})[step] = address

    def has(self, phase: int, output: int, step: int) -> bool:
        """Whether that value was collected."""
        return step in self._collected.get((phase, output), {})

    def job(self, end: int) -> Job:
        """The stretch up to the step ``end``."""
        return Job(self._checked.job.work, self.first_step, end - self.first_step)

    def trace(self) -> bytes:
        """The trace blob of all values so far."""
        return self._trace.encode()

    def outputs(self, end: int) -> dict[tuple[int, int], bytes | None]:
        """The outputs, by phase and place, that a result up to the step ``end`` names: a collected
        one with the bytes of its collection, one of which the last value counts with None."""
        found: dict[tuple[int, int], bytes | None] = {}
        for number, phase in enumerate(self._checked.work.phases):
            if not times_due(phase, self.first_step, end - self.first_step):
                continue
            for output, mode in enumerate(phase.modes):
                if mode != MODE_TRACE:
                    is_list = mode == MODE_COLLECT
                    found[number, output] = self._collection(number, output) if is_list else None
        return found

    def _collection(self, phase: int, output: int) -> bytes:
        values = self._collected.get((phase, output), {})
        size_bytes = output_bytes(self._checked, phase, output)
        return encode(numbered(sorted(values), [values[s] for s in sorted(values)], size_bytes))
