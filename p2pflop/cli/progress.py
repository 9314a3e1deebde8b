"""A run on the terminal: its deals, its progress with loss and accuracy, its result, its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from p2pflop.cli.output import Flags, avoided_line, clean, print_json, short, table_lines
from p2pflop.market.credit import job_risk
from p2pflop.runs import Run, check_event
from p2pflop.units import MAX_NUSD, NS_PER_S, format_duration, format_usd

MAX_SHOWN: Final = 20
PLAIN_EVERY_S: Final = 5.0


def follow(flags: Flags, run: Run) -> None:
    """Show a run up to its end. Raises what it failed with."""
    events = run.events()
    if flags.json:
        for event in events:
            print_json(event)
            check_event(event, run.id)
        return
    with RunView() as view:
        for event in events:
            view.show(event)
            check_event(event, run.id)


class RunView:
    """Turns events into lines, and into a live bar where a person looks at a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, markup=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[values]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("waiting", total=1, values="", unit="")
        self._values: dict[str, float] = {}
        self._last_plain = -math.inf
        self._last_what = ""
        self._last_names: set[str] = set()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event. Kinds of a later version are passed over."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _say(self, text: str) -> None:
        self._console.print(Text(clean(text)), soft_wrap=True)

    def _progress(self, what: str, done: int, total: int, unit: str = "") -> None:
        values = "  ".join(
            f"{clean(name)} {_number(value, 4)}" for name, value in self._values.items()
        )
        self._bar.update(
            self._task,
            description=what,
            completed=done,
            total=max(total, 1),
            unit=unit,
            values=values,
        )
        now = time.monotonic()
        is_news = done == total or what != self._last_what
        if self._bar.disable and (is_news or now - self._last_plain >= PLAIN_EVERY_S):
            self._last_plain, self._last_what = now, what
            self._say(f"{what} {done}/{total} {unit} {values}")

    def _on_ranked(self, event: Mapping[str, Any]) -> None:
        for line in ranked_lines(event):
            self._console.print(Text(line), soft_wrap=True)

    def _on_resting(self, event: Mapping[str, Any]) -> None:
        limit_nusd = int(event["limit_nusd"])
        limit = f"up to {format_usd(limit_nusd)}" if limit_nusd < MAX_NUSD else "any price"
        self._say(
            f"no ask fits now: resting as a wish, at {limit}, until a provider's quote or ask"
        )

    def _on_filled(self, event: Mapping[str, Any]) -> None:
        quote = format_usd(int(event["quote_nusd"]))
        limit_nusd = int(event.get("limit_nusd", 0))
        limit = f", {format_usd(limit_nusd)} if providers fail" if limit_nusd else ""
        self._say(f"bought from {short(event['provider'])} for at most {quote}{limit}")
        if int(event["quote_nusd"]):
            self._say(job_risk(int(event["quote_nusd"]), int(event.get("prepaid_nusd", 0))))

    def _on_rejected(self, event: Mapping[str, Any]) -> None:
        self._say(f"{short(event['provider'])} refused: {clean(event['reason'])}")

    def _on_resubmitted(self, event: Mapping[str, Any]) -> None:
        self._say(resubmitted_line(event))

    def _on_fetching(self, event: Mapping[str, Any]) -> None:
        done, total = int(event["done_bytes"]), int(event["total_bytes"])
        self._progress("provider fetches", done, total, "bytes")

    def _on_lowering(self, event: Mapping[str, Any]) -> None:
        self._progress("lowering", int(event["done"]), int(event["total"]), "kernels")

    def _on_rows(self, event: Mapping[str, Any]) -> None:
        for row in event["rows"]:
            if row["values"].keys() - self._last_names:  # an evaluation among training steps
                self._last_plain = -math.inf
            self._last_names = set(row["values"])
            self._values |= {name: float(value) for name, value in row["values"].items()}

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        self._progress("step", int(event["step"]), int(event["steps"]))

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        self._bar.update(self._task, description=f"step (checkpoint at {int(event['step'])})")

    def _on_receipt(self, event: Mapping[str, Any]) -> None:
        amount = format_usd(int(event["amount_nusd"]))
        provider = f" to {short(event['provider'])}" if "provider" in event else ""
        step = int(event["to_step"])
        self._say(f"receipt {int(event['number'])}: {amount}{provider} up to step {step}")

    def _on_result(self, event: Mapping[str, Any]) -> None:
        self._bar.stop()
        click.echo(clean(event["hash"]))
        fields = [("cost", format_usd(int(event["cost_nusd"])))]
        if earlier := event.get("earlier"):
            fields.append(("bought before", f"run {earlier}; --fresh buys it again"))
        fields += [(name, _number(value, 6)) for name, value in self._values.items()]
        for name, value in fields:
            self._say(f"{name}  {value}")

    def _on_cancelled(self, _event: Mapping[str, Any]) -> None:
        self._say("cancelled")


def resubmitted_line(event: Mapping[str, Any]) -> str:
    """That a provider is lost, and where the run goes on."""
    reason, start = clean(event["reason"]), int(event["from_step"])
    is_gone = reason.startswith(("the provider was lost", "the provider was silent"))
    lost = f"provider {short(event['provider'])} {'vanished' if is_gone else 'failed'}"
    goes_on = f"going on from step {start} at provider {short(event['next'])}"
    waits = f"waiting for an ask that fits, to go on from step {start}"
    return f"{lost} at step {int(event['step'])} ({reason}); {goes_on if event['next'] else waits}"


def ranked_lines(event: Mapping[str, Any]) -> list[str]:
    """The asks that can do it, best first, and why the others cannot."""
    deals, misses = event["deals"], event["misses"]
    rows = [
        (
            short(deal["provider"]),
            format_usd(int(deal["total_nusd"])),
            _time(deal.get("minutes")),
            f"{format_usd(int(deal['price_nusd']))}/PFLOP",
        )
        for deal in deals[:MAX_SHOWN]
    ]
    lines = table_lines(("PROVIDER", "TOTAL", "TIME", "PRICE"), rows)
    if len(deals) > MAX_SHOWN:
        lines.append(f"... and {len(deals) - MAX_SHOWN} more")
    for miss in misses[:MAX_SHOWN]:
        lines.append(f"not {short(miss['provider'])}: {_why_not(miss)}")
    if len(misses) > MAX_SHOWN:
        lines.append(f"... and {len(misses) - MAX_SHOWN} more that cannot")
    return lines


def _why_not(miss: Mapping[str, Any]) -> str:
    if "avoided_until_ns" in miss:
        return avoided_line(int(miss["avoided_until_ns"]), int(miss["failures"]))
    return clean(miss["reason"])


def _number(value: float, digits: int) -> str:
    """As JSON has it, where it is not a number."""
    return "NaN" if math.isnan(value) else f"{value:.{digits}g}"


def _time(minutes: float | None) -> str:
    return "unknown" if minutes is None else format_duration(round(minutes * 60 * NS_PER_S))


@contextmanager
def byte_bar(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar for bytes on a terminal; what it gives takes how many are done so far."""
    console = Console(stderr=True, highlight=False, markup=False)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
