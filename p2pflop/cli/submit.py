"""``p2pflop submit`` and ``show``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pflop.cli import sessions
from p2pflop.cli.output import Flags, clean, common_options, print_fields, print_json, say
from p2pflop.errors import ConfigError
from p2pflop.units import counted, format_bytes, format_flop, format_limit

if TYPE_CHECKING:
    from p2pflop.client import Client
    from p2pflop.sdk import Job


@click.command("submit")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--max-usd", metavar="USD", help="The most that it may cost.")
@click.option("--deadline", metavar="TIME", help="How long it may take, like 90s or 2h.")
@click.option(
    "--checkpoint-steps",
    type=click.IntRange(min=0),
    metavar="N",
    help="State every N steps; 0: none.",
)
@click.option(
    "--checkpoint-every",
    metavar="TIME",
    help="State after so long without, 30s or more; default 10m, 0: never.",
)
@click.option(
    "--class",
    "classes",
    metavar="NAME",
    multiple=True,
    help="Compute in this class, or any; repeatable.",
)
@click.option(
    "--from-step",
    type=click.IntRange(min=1),
    metavar="N",
    help="Go on from a checkpoint after N steps.",
)
@click.option("--fresh", is_flag=True, help="Buy it even if it was bought before.")
@click.option("--rest", is_flag=True, help="Where no ask fits, wait as a wish for a quote.")
@click.option("--detach", is_flag=True, help="Print the run's id and leave it.")
@click.option("--quote", is_flag=True, help="Show the ranked asks and buy nothing.")
@common_options
@click.pass_obj
def submit_command(
    flags: Flags,
    file: Path,
    arguments: tuple[str, ...],
    max_usd: str | None,
    deadline: str | None,
    checkpoint_steps: int | None,
    checkpoint_every: str | None,
    classes: tuple[str, ...],
    from_step: int | None,
    fresh: bool,
    rest: bool,
    detach: bool,
    quote: bool,
) -> None:
    """Buy a job's run and follow it to its result.

    FILE is a .p2pj file, or a script that offers its job as make_job() or job (see 'p2pflop trace
    --help'), with ARGUMENTS as its sys.argv. The result's hash goes to standard output. Ctrl-C
    leaves the run alone. With --json every event is a line of JSON, the last one the result.

    \b
    Examples:
      p2pflop submit digits.p2pj --max-usd 0.05
      p2pflop submit examples/digits.py --deadline 10m
      p2pflop submit digits.p2pj --quote
      p2pflop submit digits.p2pj --max-usd 0.01 --deadline 8h --rest
      p2pflop submit digits.p2pj --from-step 500
      p2pflop submit digits.p2pj --json | jq -r 'select(.kind == "result") | .hash'
    """
    from p2pflop.cli.progress import follow
    from p2pflop.job.file import encode_file
    from p2pflop.sdk import submit, submit_options

    options = submit_options(max_usd, deadline, checkpoint_steps, checkpoint_every, classes)
    job = open_file(file, arguments)
    if from_step is not None:
        job = job.resume(from_step)
    client = flags.client(start=True)
    if not flags.json:
        say(_told(job))
    if quote:
        ranking = client.quote(encode_file(job.file), options)
        if flags.json:
            print_json(ranking)
        else:
            print_quote(client, ranking)
        return
    run = submit(
        job,
        max_usd=max_usd,
        deadline=deadline,
        checkpoint_steps=checkpoint_steps,
        checkpoint_every=checkpoint_every,
        classes=classes,
        fresh=fresh,
        rest=rest,
        client=client,
    )
    if detach:
        if flags.json:
            print_json({"id": run.id})
        else:
            click.echo(run.id)
        return
    follow(flags, run)


@click.command("show")
@click.argument("what", metavar="FILE|ID")
@common_options
@click.pass_obj
def show_command(flags: Flags, what: str) -> None:
    """Show a job file or a run.

    \b
    Examples:
      p2pflop show digits.p2pj
      p2pflop show examples/digits.py
      p2pflop show 5705a365685c --json
    """
    path = Path(what)
    if path.suffix in (".p2pj", ".py") or path.is_file():
        from p2pflop.cli.describe import describe, job_lines

        about = describe(open_file(path))
        if flags.json:
            print_json(about)
        for line in [] if flags.json else job_lines(about):
            click.echo(line)
        return
    run = flags.client(start=True).job(what)
    if flags.json:
        print_json(run)
    elif sessions.is_session(run):
        print_fields(sessions.fields(run))
    else:
        print_fields(_fields(run))


def _fields(run: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """All that is known of a run, but for what has parts; money in dollars."""
    for name, value in run.items():
        if name.endswith("_nusd"):
            yield name.removesuffix("_nusd") + "_usd", format_limit(int(value))
        elif not isinstance(value, dict | list):
            yield name, value


def _told(job: Job) -> str:
    """A job in one line."""
    return (
        f"{clean(job.file.labels.title)}: {job.size_bytes:,} bytes, {counted(job.steps, 'step')}, "
        f"{format_flop(job.cost.flop)}, touches {format_bytes(job.cost.touched_bytes)}"
    )


def print_quote(client: Client, ranking: Mapping[str, Any]) -> None:
    """The ranked asks, and who would hold the risk of the best."""
    from p2pflop.cli.accounts import due_from
    from p2pflop.cli.progress import ranked_lines
    from p2pflop.market.credit import job_risk

    for line in ranked_lines(ranking):
        click.echo(line)
    best = next(iter(ranking["deals"]), None)
    if best is not None and best["total_nusd"]:
        due_nusd = due_from(client, bytes.fromhex(best["account"]))
        click.echo(job_risk(int(best["total_nusd"]), due_nusd))


def open_file(path: Path, arguments: tuple[str, ...] = ()) -> Job:
    """The job of a ``.p2pj`` file or a script. Raises ConfigError, JobError."""
    if path.suffix == ".py":
        from p2pflop.cli.script import job_from_script

        return job_from_script(path, arguments)
    if arguments:
        raise ConfigError(f"a job file takes no arguments, and {path} is one")
    from p2pflop.sdk import load

    return load(path)
