"""What a worker may say next during a run.

Which values are traced at which step follows from the work alone, so a worker has no freedom here:
each report must hold exactly the scalars of exactly the steps that come next. A report may cover
any number of steps, so nothing here may take time or memory by the number of steps it claims.
"""

from __future__ import annotations

from p2pflop.errors import ProtocolError
from p2pflop.job.spec import MODE_TRACE, Work, is_due, stands_still, times_due
from p2pflop.kernels import frames
from p2pflop.kernels.frames import MAX_ROW_VALUES
from p2pflop.node.worker_types import Paused, Rows


class RowCheck:
    """The rows and pauses that a run of ``work`` must bring, one after the other."""

    def __init__(self, work: Work, first_step: int, steps: int) -> None:
        self._work = work
        self._step = first_step
        self._end = first_step + steps
        self._told = 0
        self._last: tuple[int, int, int] | None = None
        self._traced = [
            (phase, sum(mode == MODE_TRACE for mode in phase.modes)) for phase in work.phases
        ]

    def rows(self, report: frames.Progressed) -> Rows:
        """The rows of a report. Raises ProtocolError unless they are exactly the next ones."""
        first, last, values = report.first_step, report.last_step, report.values
        if not (first == self._step <= last < self._end):
            raise ProtocolError(f"steps {first} to {last} where {self._step} was next")
        for step, phase, output, _ in values:
            key = (step, phase, output)
            if not first <= step <= last or (self._last is not None and key <= self._last):
                raise ProtocolError(f"row {key} out of order")
            self._check_traced(step, phase, output)
            self._last = key
        missing = self._count(first, last) - self._told - len(values)
        if missing < 0:
            raise ProtocolError("more rows than are due")
        if missing and (first != last or len(values) != MAX_ROW_VALUES):
            raise ProtocolError(f"{missing} rows are missing")
        self._told = self._told + len(values) if missing else 0
        self._step = last if missing else last + 1
        return Rows(first, last, values)

    def pause(
        self, report: frames.Paused, pause_every: int, stopping: bool, *, asked: bool = False
    ) -> Paused:
        """A report's pause. Raises ProtocolError if none is due there, or was ``asked`` for."""
        step, stop = report.step, self._work.stop
        condition = report.condition and stop is not None and step % stop.every == 0
        at_end = step == self._end or stopping or condition
        boundary = asked or (pause_every > 0 and step % pause_every == 0)
        boundary = boundary or stands_still(self._work, step)
        if step != self._step or self._told or not (at_end if report.ended else boundary):
            raise ProtocolError(f"a pause at step {step} where {self._step} was next")
        return Paused(step, report.ended or stopping, condition)

    def _check_traced(self, step: int, phase: int, output: int) -> None:
        phases = self._work.phases
        known = phase < len(phases) and output < len(phases[phase].modes)
        if not known or phases[phase].modes[output] != MODE_TRACE:
            raise ProtocolError(f"row of phase {phase}, output {output}, which is not traced")
        if not is_due(phases[phase], step):
            raise ProtocolError(f"row of phase {phase}, which is not due at step {step}")

    def _count(self, first: int, last: int) -> int:
        steps = last - first + 1
        return sum(times_due(phase, first, steps) * traced for phase, traced in self._traced)
