"""``p2pflop delegate``: one account over many boxes, its key on one of them."""

from __future__ import annotations

import time
from pathlib import Path

import click

from p2pflop.cli.output import Flags, common_options, print_json, say
from p2pflop.cli.registry_words import date, home_of
from p2pflop.errors import ConfigError
from p2pflop.units import parse_duration


@click.command("delegate")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--for", "time_", default="90d", metavar="TIME", help="How long [default: 90d].")
@click.option("--network", default="main", metavar="NAME", help="The network [default: main].")
@common_options
@click.pass_obj
def delegate_command(flags: Flags, folder: Path, time_: str, network: str) -> None:
    """Make the home of another box of this account.

    The box gets a key of its own, and what the account signs for it: it sells, buys and is
    attested as this account, and cannot do so for longer than that. It does not get the account's
    key. Copy FOLDER to the box and start it there. Given again, it renews what was signed: copy
    delegation.bin alone then, and start the node again.

    \b
    Examples:
      p2pflop delegate box2                  then, on the box: p2pflop node --home box2
      p2pflop delegate box2 --for 30d
    """
    from p2pflop.keys import peer_id
    from p2pflop.node.boxes import furnish_box
    from p2pflop.node.delegating import FILE_NAME
    from p2pflop.node.home import read_key

    home = home_of(flags)
    if not (home / "account.pem").exists():
        raise ConfigError(
            f"there is no account's key in {home}",
            hint="Do it in the home that has account.pem; a node makes one at its first start.",
        )
    account = read_key(home / "account.pem", "Restore it from a backup.")
    now_ns = time.time_ns()
    until_ns = now_ns + parse_duration(time_)
    node = furnish_box(folder, account, network, now_ns, until_ns)
    if flags.json:
        told = {"account": account.public_key.hex(), "peer": peer_id(node), "until_ns": until_ns}
        print_json({"folder": str(folder), **told})
        return
    say(f"{folder} is the home of {peer_id(node)}, a box of {account.public_key.hex()[:12]}")
    say(f"until {date(until_ns)}. Copy it there; after a renewal {FILE_NAME} alone.")
