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

from p2pflop.cli import sessions
from p2pflop.cli.output import Flags, avoided_line, clean, print_json, short, table_lines
from p2pflop.job.events import State
from p2pflop.market.credit import job_risk
from p2pflop.node.service import LAST_EVENT_KINDS
from p2pflop.runs import Run, check_event
from p2pflop.units import MAX_NUSD, NS_PER_S, format_duration, format_limit, format_usd

MAX_SHOWN: Final = 20
PLAIN_EVERY_S: Final = 5.0
PASSING: Final = frozenset({"fetching", "lowering", "progress", "checkpoint"})
"""Kinds that tell how things stand when they come, and nothing later on."""


def follow(flags: Flags, run: Run, card: Mapping[str, Any] | None = None) -> None:
    """Show a run up to its end. Raises what it failed with.

    ``card``: how the run stands, where it is not new.
    """
    events = run.events()
    if flags.json:
        for event in events:
            print_json(event)
            check_event(event, run.id)
        return
    with RunView() as view:
        if card is not None:
            view.begin(card)
        for event in events:
            view.show(event)
            check_event(event, run.id)


class RunView:
    """Turns events into lines, and into a live bar where a person looks at a terminal.

    What comes again, round after round, is told once: the asks, and who refused and why.
    """

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
        self._begun_ns = 0
        self._deals: list[str] = []
        self._misses: set[str] = set()
        self._refused: dict[str, str] = {}
        self._rests = ""
        self._provider = ""
        self._place = ""
        self._is_muted = False

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

    def begin(self, card: Mapping[str, Any]) -> None:
        """Come to a run that is on its way: say how it stands; what it has told up to now, but for
        its end, is no news."""
        self._begun_ns = time.time_ns()
        place = f", at {short(card['provider'])}" if card.get("provider") else ""
        step, end = int(card.get("step", 0)), end_step(card)
        how_far = f"step {step}/{end}"
        if sessions.is_session(card):
            how_far = f"{sessions.place(card)}, {sessions.spent(card)}"
        self._say(f"run {card['id']}: {card['state']}, {how_far}{place}")
        self._bar.update(self._task, description="step", completed=step, total=max(end, 1))

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event. Kinds of a later version are passed over; of old ones only what stays is
        remembered."""
        is_old = event.get("at_ns", self._begun_ns) < self._begun_ns
        if is_old and event["kind"] in PASSING:
            return
        self._is_muted = is_old and event["kind"] not in LAST_EVENT_KINDS
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _say(self, text: str) -> None:
        self._print(clean(text))

    def _print(self, line: str) -> None:
        if not self._is_muted:
            self._console.print(Text(line), soft_wrap=True)

    def _progress(self, what: str, done: int, total: int, unit: str = "", values: str = "") -> None:
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
            self._say(" ".join(filter(None, (what, f"{done}/{total}", unit, values))))

    def _on_ranked(self, event: Mapping[str, Any]) -> None:
        deals, misses = deal_lines(event), miss_lines(event)
        news = [line for line in misses if line not in self._misses]
        for line in [*(deals if deals != self._deals else []), *news]:
            self._print(line)
        self._deals, self._misses = deals, set(misses)

    def _on_resting(self, event: Mapping[str, Any]) -> None:
        limit_nusd = int(event["limit_nusd"])
        limit = f"up to {format_usd(limit_nusd)}" if limit_nusd < MAX_NUSD else "any price"
        if limit != self._rests:
            self._rests = limit
            self._say(
                f"no ask fits now: resting as a wish, at {limit}, until a provider's quote or ask"
            )

    def _on_filled(self, event: Mapping[str, Any]) -> None:
        quote, provider = format_usd(int(event["quote_nusd"])), short(event["provider"])
        if self._provider not in ("", provider):
            self._say(f"the provider changed: {provider} instead of {self._provider}")
            self._place = f"at {provider}"
        self._provider, self._rests, self._last_what = provider, "", ""
        self._refused.clear()
        limit_nusd = int(event.get("limit_nusd", 0))
        limit = f", {format_limit(limit_nusd)} if providers fail" if limit_nusd else ""
        self._say(f"bought from {provider} for at most {quote}{limit}")
        if int(event["quote_nusd"]):
            self._say(job_risk(int(event["quote_nusd"]), int(event.get("prepaid_nusd", 0))))

    def _on_rejected(self, event: Mapping[str, Any]) -> None:
        provider, reason = short(event["provider"]), clean(event["reason"])
        if self._refused.get(provider) != reason:
            self._refused[provider] = reason
            self._say(f"{provider} refused: {reason}")

    def _on_resubmitted(self, event: Mapping[str, Any]) -> None:
        self._say(resubmitted_line(event))
        if event.get("at_ns", self._begun_ns) >= self._begun_ns:
            self._bar.update(self._task, description="waiting", completed=int(event["from_step"]))

    def _on_state(self, event: Mapping[str, Any]) -> None:
        if event["state"] == State.CHECKING:
            self._say("so they say: trying the job out here, up to the next checkpoint")
        elif event["state"] == sessions.IDLE:
            self._say("idle: the lease is given back until the script goes on")

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
        values = "  ".join(
            f"{clean(name)} {_number(value, 4)}" for name, value in self._values.items()
        )
        self._progress("step", int(event["step"]), int(event["steps"]), self._place, values)

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

    def _on_closed(self, event: Mapping[str, Any]) -> None:
        self._bar.stop()
        self._say(f"closed  {format_usd(int(event['cost_nusd']))} in all")

    def _on_cancelled(self, event: Mapping[str, Any]) -> None:
        self._say("cancelled")
        self._say_cost(event)

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self._say_cost(event)

    def _say_cost(self, event: Mapping[str, Any]) -> None:
        """What a run without a result has cost all the same."""
        if cost_nusd := int(event.get("cost_nusd", 0)):
            self._bar.stop()
            self._say(f"cost  {format_usd(cost_nusd)}, for what was delivered")


def resubmitted_line(event: Mapping[str, Any]) -> str:
    """That a provider is lost, and where the run goes on."""
    reason, start = clean(event["reason"]), int(event["from_step"])
    did = "failed"
    if reason.startswith(("the provider was lost", "the provider was silent")):
        did = "vanished"
    elif reason.startswith("the provider gave the lease back: pre-empted: "):
        did = "left"
    lost = f"provider {short(event['provider'])} {did}"
    goes_on = f"going on from step {start} at provider {short(event['next'])}"
    waits = f"waiting for an ask that fits, to go on from step {start}"
    return f"{lost} at step {int(event['step'])} ({reason}); {goes_on if event['next'] else waits}"


def ranked_lines(event: Mapping[str, Any]) -> list[str]:
    """The asks that can do it, best first, and why the others cannot."""
    return deal_lines(event) + miss_lines(event)


def deal_lines(event: Mapping[str, Any]) -> list[str]:
    """The asks that can do it, best first."""
    deals = event["deals"]
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
    return lines


def miss_lines(event: Mapping[str, Any]) -> list[str]:
    """Why the other asks cannot."""
    misses = event["misses"]
    lines = [f"not {short(miss['provider'])}: {_why_not(miss)}" for miss in misses[:MAX_SHOWN]]
    if len(misses) > MAX_SHOWN:
        lines.append(f"... and {len(misses) - MAX_SHOWN} more that cannot")
    return lines


def end_step(card: Mapping[str, Any]) -> int:
    """The step that a run ends with; it may begin after the first."""
    return int(card.get("first_step", 0)) + int(card.get("steps", 0))


def _why_not(miss: Mapping[str, Any]) -> str:
    if "avoided_until_ns" in miss:
        return avoided_line(int(miss["avoided_until_ns"]), int(miss["failures"]))
    return clean(miss.get("told", miss["reason"]))


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
