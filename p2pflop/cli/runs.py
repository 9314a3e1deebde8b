"""``p2pflop jobs``, ``watch`` and ``cancel``."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click

from p2pflop.cli import sessions
from p2pflop.cli.output import Flags, clean, common_options, print_json, print_table, say
from p2pflop.node.service import LAST_EVENT_KINDS
from p2pflop.units import format_usd

if TYPE_CHECKING:
    from p2pflop.client import Client

CANCEL_WITHIN_S: Final = 15.0
PAUSED = "paused: waiting for the buyer's signature"


@click.command("jobs")
@click.option("--sold", is_flag=True, help="What runs here for others.")
@click.option("--all", "parts", is_flag=True, help="Each job of a pack, too.")
@common_options
@click.pass_obj
def jobs_command(flags: Flags, sold: bool, parts: bool) -> None:
    """List the runs of this node.

    Jobs, and sessions of scripts, whose steps are commands; newest first. Small jobs of a sweep
    that were bought together are one run, a pack; --all lists them beside it, each with its share
    of the cost. With --sold what runs here for others, oldest first.

    \b
    Examples:
      p2pflop jobs
      p2pflop jobs --all
      p2pflop jobs --sold
      p2pflop jobs --json | jq -r '.[] | select(.state == "settled") | .id'
    """
    if sold:
        _tell_sales(flags)
        return
    jobs = flags.client(start=True).jobs(parts=parts)
    if flags.json:
        print_json(jobs)
        return
    print_table(
        ("ID", "STATE", "STEP", "COST", "TITLE"),
        map(_row, jobs),
        "No runs yet: p2pflop submit FILE, or CLOUD=1 python SCRIPT",
    )


def _row(job: dict[str, Any]) -> tuple[str, str, str, str, str]:
    from p2pflop.cli.progress import end_step

    who = job.get("id", ""), job.get("state", "")
    if sessions.is_session(job):
        return *who, str(job.get("step", 0)), sessions.spent(job), sessions.title(job)
    cost = format_usd(job["cost_nusd"]) if "cost_nusd" in job else ""
    title = job.get("title", "") + (f", bought in {job['pack']}" if "pack" in job else "")
    return *who, f"{job.get('step', 0)}/{end_step(job)}", cost, title


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
    """Follow a run: how it stands, and what comes from now on.

    Ctrl-C leaves the run alone. With --json every event is a line of JSON, from the first on.

    \b
    Examples:
      p2pflop watch 5705a365685c
      p2pflop watch 5705a365685c --json | jq -c 'select(.kind == "rows") | .rows[]'
    """
    from p2pflop.cli.progress import follow
    from p2pflop.runs import Run

    client = flags.client(start=True)
    follow(flags, Run(run_id, client), client.job(run_id))


@click.command("cancel")
@click.argument("run_id", metavar="ID")
@common_options
@click.pass_obj
def cancel_command(flags: Flags, run_id: str) -> None:
    """Give a run up, and tell what it has cost.

    What was delivered until then is owed; a run that has ended stays as it is. The script of a
    session ends with an error.

    \b
    Examples:
      p2pflop cancel 5705a365685c
      p2pflop cancel 5705a365685c --json | jq .cost_nusd
    """
    client = flags.client(start=True)
    client.cancel(run_id)
    end = _await_end(client, run_id)
    job = client.job(run_id)
    if flags.json:
        print_json(job | end)
        return
    from p2pflop.cli.progress import end_step

    place = f"at step {job.get('step', 0)} of {end_step(job)}"
    if sessions.is_session(job):
        place = sessions.place(job)
    if not end["final"]:
        say(f"{clean(run_id)} is being cancelled, {place}: see 'p2pflop watch {clean(run_id)}'")
    else:
        say(f"{clean(run_id)} is {clean(job.get('state', 'cancelled'))}, {place}")
    cost = format_usd(end["cost_nusd"])
    if sessions.is_session(job):
        say(f"cost {'' if end['final'] else 'so far '}{sessions.spent(job)}")
        return
    to_step = end["delivered_to_step"]
    delivered = f"what was delivered, up to step {to_step}" if to_step else "nothing was delivered"
    say(f"cost {'' if end['final'] else 'so far '}{cost}: {delivered}")
    if end["hint"]:
        say(clean(end["hint"]))


def _await_end(client: Client, run_id: str) -> dict[str, Any]:
    """What a run has cost and delivered at its end, or after ``CANCEL_WITHIN_S`` so far."""
    from p2pflop.outcomes import Costs

    costs, to_step, hint, final = Costs(), 0, "", False
    with suppress(TimeoutError):
        for event in client.events(run_id, timeout_s=CANCEL_WITHIN_S):
            costs.hear(event)
            if event["kind"] == "receipt":
                to_step = max(to_step, int(event["to_step"]))
            final = event["kind"] in LAST_EVENT_KINDS
            hint = str(event.get("hint", "")) if final else ""
    told = {"cost_nusd": costs.nusd, "delivered_to_step": to_step}
    return told | {"final": final, "hint": hint}
