"""``p2pflop jobs``, ``watch`` and ``cancel``."""

from __future__ import annotations

import click

from p2pflop.cli.output import Flags, clean, common_options, print_json, print_table, say


@click.command("jobs")
@common_options
@click.pass_obj
def jobs_command(flags: Flags) -> None:
    """List the runs of this node.

    Newest first.

    \b
    Examples:
      p2pflop jobs
      p2pflop jobs --json | jq -r '.[] | select(.state == "settled") | .id'
    """
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

    follow(flags, flags.client(start=True), run_id)


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
