"""``p2pflop sweep``: many runs of one job, under one budget."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from p2pflop.cli.output import Flags, clean, common_options, print_json, print_table, say
from p2pflop.errors import ConfigError
from p2pflop.units import counted, format_usd

if TYPE_CHECKING:
    from p2pflop.client import Client
    from p2pflop.outcomes import Outcome
    from p2pflop.sweeps import Sweep

MAX_MAP_BYTES: Final = 16 * 1024 * 1024
_DIGITS: Final = re.compile("[0-9a-f]{4,63}")


@click.command("sweep")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--args",
    "grid",
    metavar="NAME=VALUES",
    multiple=True,
    help="Values of an argument, like lr=1e-3,1e-2; of several, every combination.",
)
@click.option(
    "--map",
    "file_of_args",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Arguments: JSON.",
)
@click.option(
    "--feed",
    "feeds",
    metavar="NAME=FILES",
    multiple=True,
    help="Another input for each run, like x=data/*.npy; repeatable.",
)
@click.option(
    "--batch",
    type=int,
    metavar="ROWS",
    help="Cut --feed into runs of so many rows; else a run for each file.",
)
@click.option("--max-usd", metavar="USD", help="The most that all of it may cost.")
@click.option("--deadline", metavar="TIME", help="How long all of it may take, like 90s or 2h.")
@click.option("--under-way", type=int, metavar="N", help="Runs at once; default 8.")
@click.option("--fresh", is_flag=True, help="Buy even what was bought before.")
@click.option("--rest", is_flag=True, help="Where no ask fits, a run waits as a wish for a quote.")
@click.option("--no-pack", is_flag=True, help="Buy each job alone, however small.")
@click.option(
    "--attach", metavar="ID", help="Go on with that sweep; 4 digits of its start or end will do."
)
@common_options
@click.pass_obj
def sweep_command(
    flags: Flags,
    file: Path | None,
    grid: tuple[str, ...],
    file_of_args: Path | None,
    feeds: tuple[str, ...],
    batch: int | None,
    max_usd: str | None,
    deadline: str | None,
    under_way: int | None,
    fresh: bool,
    rest: bool,
    no_pack: bool,
    attach: str | None,
) -> int:
    """Buy many runs of a job with other arguments, under one budget.

    FILE is a .p2pj file or a script (see 'p2pflop submit'); its job was traced with args=, or has
    inputs, of which --feed takes another for each run. The file of --map has a list of objects like
    {"lr": 0.001}; with --feed as many. Runs that fail are in the table, and make the
    exit code 1. Ctrl-C cancels what is under way, for good; --attach goes on with what was not
    submitted. To buy the cancelled ones, too, give the same command again: what is done answers at
    once and costs nothing. With --json every outcome is a line of JSON, the last line how it all
    ended.

    \b
    Examples:
      p2pflop sweep digits.p2pj --args lr=1e-3,3e-3,1e-2 --max-usd 0.05
      p2pflop sweep digits.p2pj --map rates.json --json
      p2pflop sweep embed.p2pj --feed 'pixels=data/*.npy' --batch 64
    """
    from p2pflop import sweeps
    from p2pflop.cli.submit import open_file

    if attach is not None:
        if file is not None or grid or file_of_args is not None or feeds:
            raise ConfigError("--attach takes no file and no arguments: the sweep has its own")
        client = flags.client(start=True)
        sweep = sweeps.attach_sweep(find_sweep(client, attach), ordered=False, client=client)
    elif file is None:
        raise ConfigError("which job?", hint="Name a .p2pj file or a script, or --attach a sweep.")
    else:
        sweep = sweeps.map(
            open_file(file),
            _arguments(grid, file_of_args, feeds),
            feed=read_feeds(feeds, batch) if feeds else None,
            max_usd=max_usd,
            deadline=deadline,
            ordered=False,
            under_way=sweeps.DEFAULT_UNDER_WAY if under_way is None else under_way,
            fresh=fresh,
            rest=rest,
            pack=not no_pack,
            client=flags.client(start=True),
        )
    return _follow(flags, sweep)


def find_sweep(client: Client, text: str) -> str:
    """The id of the sweep that ``text`` names: whole, or the first or last digits of one that the
    node has. Raises ConfigError."""
    if _DIGITS.fullmatch(text) is None:
        return text
    from p2pflop.sweep_plan import SweepPlan

    found = []
    for blob in client.blobs():
        address = blob.address.hex()
        if address.startswith(text) or address.endswith(text):
            with suppress(ConfigError):
                SweepPlan.decode(client.get(blob.address))
                found.append(address)
    if len(found) != 1:
        several = f"{len(found)} are" if found else "none is"
        raise ConfigError(
            f"of the sweeps known here {several} named {text}",
            hint="A sweep prints its id of 64 digits when it begins: give more of them.",
        )
    return found[0]


def _arguments(
    grid: Sequence[str], file_of_args: Path | None, feeds: Sequence[str]
) -> list[dict[str, float]] | None:
    """Of each run; None if runs differ in what feeds them alone."""
    if file_of_args is not None:
        return read_map(file_of_args, grid)
    return None if feeds and not grid else combinations(grid)


def read_feeds(feeds: Sequence[str], batch: int | None) -> dict[str, Any]:
    """The feeds in texts like ``x=data/*.npy``. Raises ConfigError."""
    from p2pflop.sdk import feed

    named: dict[str, Any] = {}
    for text in feeds:
        name, equals, files = text.partition("=")
        if not (name and equals and files):
            raise ConfigError(f"{text[:80]!r} is not like x=data/*.npy")
        if name in named:
            raise ConfigError(f"--feed {name} is given twice")
        named[name] = feed(files, batch=batch)
    return named


def _follow(flags: Flags, sweep: Sweep) -> int:
    """Show outcomes as they come, and all of them in a table; the exit code."""
    if not flags.json:
        say(f"sweep {sweep.id}: {counted(len(sweep), 'job')}")
    for outcome in sweep:
        progress = sweep.progress()
        if flags.json:
            print_json(_described(outcome))
        else:
            spent = format_usd(progress.spent_nusd)
            say(f"{progress.done}/{progress.jobs}  {_named(outcome)}  {outcome.state}  {spent}")
    progress = sweep.progress()
    if flags.json:
        print_json({"kind": "sweep", "id": sweep.id, **asdict(progress)})
        return int(progress.failed > 0)
    print_table(
        ("ARGUMENTS", "STATE", "RUN", "COST", "LAST"),
        (
            (
                _named(outcome),
                outcome.state,
                "" if outcome.run is None else outcome.run.id,
                format_usd(outcome.cost_nusd),
                _last(outcome),
            )
            for outcome in sweep.outcomes()
        ),
        "no jobs",
    )
    say(f"cost  {format_usd(progress.spent_nusd)} in all")
    return int(progress.failed > 0)


def _described(outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": "outcome",
        "place": outcome.place,
        "args": dict(outcome.args),
        "state": outcome.state,
        "cost_nusd": outcome.cost_nusd,
        "run": "" if outcome.run is None else outcome.run.id,
        "earlier": outcome.earlier,
        "pack": outcome.pack,
        "row": None if outcome.row is None else dict(outcome.row),
        "error": "" if outcome.error is None else outcome.error.message,
    }


def _named(outcome: Outcome) -> str:
    named = " ".join(f"{clean(name)}={value:g}" for name, value in outcome.args.items())
    return named or f"shard {outcome.place}"


def _last(outcome: Outcome) -> str:
    """The last row, or what went wrong."""
    if outcome.error is not None:
        return clean(outcome.error.message)
    if outcome.row is None:
        return f"bought before, run {clean(outcome.earlier)}" if outcome.earlier else ""
    return " ".join(f"{clean(name)}={value:.4g}" for name, value in outcome.row.items())


def combinations(grid: Sequence[str]) -> list[dict[str, float]]:
    """Every combination of the values in texts like ``lr=1e-3,1e-2``. Raises ConfigError."""
    axes: dict[str, list[float]] = {}
    for text in grid:
        name, _, values = text.partition("=")
        if name in axes:
            raise ConfigError(f"--args {name} is given twice")
        try:
            axes[name] = [_number(value) for value in values.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"{text[:80]!r} is not like lr=1e-3,1e-2", hint="Give numbers between commas."
            ) from error
    if not axes:
        raise ConfigError("which arguments?", hint="Give --args lr=1e-3,1e-2, or --map FILE.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_map(path: Path, grid: Sequence[str]) -> list[dict[str, float]]:
    """The list of arguments in a JSON file. Raises ConfigError."""
    if grid:
        raise ConfigError("--map and --args together", hint="Give one of them.")
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_MAP_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON") from error
    is_list = isinstance(found, list) and all(isinstance(each, dict) for each in found)
    if not is_list or not all(isinstance(v, int | float) for each in found for v in each.values()):
        raise ConfigError(f'{path} is not a list like [{{"lr": 0.001}}, {{"lr": 0.01}}]')
    return list(found)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
