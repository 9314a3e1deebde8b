"""What a user holds after submitting: a run, its rows, and its result."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from p2pflop.errors import P2PFlopError
from p2pflop.replies import error_from

if TYPE_CHECKING:
    from p2pflop.client import Client
    from p2pflop.results import Result


class Row(Mapping[str, float]):
    """The scalars of one step: ``row.loss``, ``row["loss"]``, ``row.step`` counted from 0."""

    __slots__ = ("_values",)

    def __init__(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = {name: float(value) for name, value in values.items()}
        self._values: dict[str, float] = {"step": step} | scalars | {"step": step}

    def __getattr__(self, name: str) -> float:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"this row has {', '.join(self._values)}, no {name!r}") from None

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        values = (
            f"{name}={value:.4g}" if name != "step" else f"step={value}"
            for name, value in self._values.items()
        )
        return f"Row({', '.join(values)})"


class Run:
    """One submission, which lives in the node: this object may go and be attached again.

    Iterating gives its rows from the first on, as they come, and raises the error that the run
    failed with. Those of a step come again if another provider computes it again. Rows that the
    node does not tell (it was restarted, has told too many since, or had the result before) come
    last, from the result's trace; a run that fails has none. Ctrl-C leaves the loop and not the
    run.
    """

    def __init__(
        self, run_id: str, client: Client, events: Iterator[dict[str, Any]] | None = None
    ) -> None:
        """``events`` come from the submission itself, for whoever asks first for all of them."""
        self.id = run_id
        self._client = client
        self._events = events
        self._result: Result | None = None

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    @property
    def status(self) -> str:
        """The run's state as the node tells it now."""
        return str(self._client.job(self.id)["state"])

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Everything that happens to the run after event number ``after``, up to its end.

        The kinds are listed in ``p2pflop.node.service``.
        """
        try:
            yield from self._following() if after == 0 else self._client.events(self.id, after)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(self.detached_hint)
            raise

    def _following(self) -> Iterator[dict[str, Any]]:
        events, self._events = self._events, None
        return self._client.events(self.id) if events is None else events

    @property
    def detached_hint(self) -> str:
        """How to come back to the run, or end it."""
        return (
            f"The run goes on. Come back with pf.attach({self.id!r}) or "
            f"'p2pflop watch {self.id}', end it with 'p2pflop cancel {self.id}'."
        )

    def __iter__(self) -> Iterator[Row]:
        told = array("q")  # steps, rising
        for event in self.events():
            if event["kind"] == "filled":
                # What a provider has told beyond its last checkpoint may be wrong.
                del told[bisect_left(told, event.get("first_step", 0)) :]
            if event["kind"] == "rows":
                for row in event["rows"]:
                    # A stream that was opened again tells some steps twice.
                    if not told or row["step"] > told[-1]:
                        told.append(row["step"])
                        yield Row(row["step"], row["values"])
            check_event(event, self.id)
            if event["kind"] == "result":
                for step, values in self._opened(event).rows(besides=told):
                    yield Row(step, values)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end. Raises what the run failed with, TimeoutError after ``timeout`` s."""
        if self._result is not None:
            return self._result
        events = self._client.events(self.id, timeout_s=timeout)
        try:
            for event in self._following() if timeout is None else events:
                check_event(event, self.id)
                if event["kind"] == "result":
                    return self._opened(event)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(self.detached_hint)
            raise
        raise P2PFlopError(f"run {self.id} ended without a result")

    def _opened(self, event: Mapping[str, Any]) -> Result:
        from p2pflop.job.file import decode_file
        from p2pflop.results import Result

        if self._result is None:
            self._result = Result.opened(
                self._client.result_record(self.id),
                decode_file(self._client.job_file(self.id)),
                self._client.get,
                result_hash=str(event["hash"]),
                cost_nusd=int(event["cost_nusd"]),
            )
        return self._result

    def cancel(self) -> None:
        """Give the run up. What was delivered until then is owed."""
        self._client.cancel(self.id)


def check_event(event: Mapping[str, Any], run_id: str) -> None:
    """Raises the error that a ``failed`` or ``cancelled`` event tells of."""
    if event["kind"] == "failed":
        raise error_from(str(event["error"]), str(event["message"]), str(event.get("hint", "")))
    if event["kind"] == "cancelled":
        raise P2PFlopError(f"run {run_id} was cancelled", hint=str(event.get("hint", "")))
