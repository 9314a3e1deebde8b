"""``p2pflop jobs``, ``watch`` and ``cancel``."""

from __future__ import annotations

import click

from p2pflop.cli.output import Flags, clean, common_options, print_json, print_table, say
from p2pflop.units import format_usd

PAUSED = "paused: waiting for the buyer's signature"


@click.command("jobs")
@click.option("--sold", is_flag=True, help="What runs here for others.")
@common_options
@click.pass_obj
def jobs_command(flags: Flags, sold: bool) -> None:
    """List the runs of this node.

    Newest first. With --sold what runs here for others, oldest first.

    \b
    Examples:
      p2pflop jobs
      p2pflop jobs --sold
      p2pflop jobs --json | jq -r '.[] | select(.state == "settled") | .id'
    """
    if sold:
        _tell_sales(flags)
        return
    jobs = flags.client(start=True).jobs()
    if flags.json:
        print_json(jobs)
        return
    rows = (
        (
            job.get("id", ""),
            job.get("state", ""),
            f"{job.get('step', 0)}/{job.get('steps', 0)}",
            job.get("title", ""),
        )
        for job in jobs
    )
    print_table(("ID", "STATE", "STEP", "TITLE"), rows, "No runs yet: p2pflop submit FILE")


def _tell_sales(flags: Flags) -> None:
    sales = flags.client(start=True).sales()
    if flags.json:
        print_json(sales)
        return
    rows = (
        (
            sale["id"][:12],
            sale["account"][:12],
            f"{sale['step']}/{sale['end_step']}",
            f"{format_usd(sale['signed_nusd'])} of {format_usd(sale['quote_nusd'])}",
            PAUSED if sale["paused"] else sale["state"],
        )
        for sale in sales
    )
    print_table(("BID", "BUYER", "STEP", "SIGNED", "STATE"), rows, "Nothing runs here for others.")


@click.command("watch")
@click.argument("run_id", metavar="ID")
@common_options
@click.pass_obj
def watch_command(flags: Flags, run_id: str) -> None:
    """Follow a run from its first event.

    Ctrl-C leaves the run alone. With --json every event is a line of JSON.

    \b
    Examples:
      p2pflop watch 5705a365685c
      p2pflop watch 5705a365685c --json | jq -c 'select(.kind == "rows") | .rows[]'
    """
    from p2pflop.cli.progress import follow
    from p2pflop.runs import Run

    follow(flags, Run(run_id, flags.client(start=True)))


@click.command("cancel")
@click.argument("run_id", metavar="ID")
@common_options
@click.pass_obj
def cancel_command(flags: Flags, run_id: str) -> None:
    """Give a run up.

    What was delivered until then is owed; a run that has ended stays as it is.

    \b
    Examples:
      p2pflop cancel 5705a365685c
    """
    job = flags.client(start=True).cancel(run_id)
    if flags.json:
        print_json(job)
    else:
        say(f"{clean(run_id)} is {clean(job.get('state', 'cancelled'))}")
