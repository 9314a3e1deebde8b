"""``p2pflop book``, ``peers`` and ``ledger``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from p2pflop.cli.money import print_payments
from p2pflop.cli.output import (
    Flags,
    common_options,
    local_time,
    print_fields,
    print_json,
    print_table,
    say,
    short,
)
from p2pflop.cli.tape import (
    ask_lines,
    class_lines,
    depth_lines,
    take_line,
    watch_book,
)
from p2pflop.cli.wishes import print_wishes, wish_lines
from p2pflop.market.credit import ledger_risk
from p2pflop.units import format_duration, format_usd

if TYPE_CHECKING:
    from p2pflop.client import Client


@click.command("book")
@click.option("--classes", is_flag=True, help="Show the depth of each class, not each ask.")
@click.option("--wishes", is_flag=True, help="Show the wishes of buyers alone.")
@click.option("--watch", is_flag=True, help="Go on showing what changes, until Ctrl-C.")
@common_options
@click.pass_obj
def book_command(flags: Flags, classes: bool, wishes: bool, watch: bool) -> None:
    """Show the order book.

    Every ask that this node knows, cheapest first; prices are dollars a PFLOP. Below, of each class
    the last price, the lowest and highest price and the volume of the tape, and how much is asked;
    the take rate; and what buyers wish for, if anything. With --watch a terminal shows all of it
    anew every two seconds; into a pipe, or with --json, goes a line for each ask new or gone.

    \b
    Examples:
      p2pflop book
      p2pflop book --classes
      p2pflop book --wishes
      p2pflop book --watch
      p2pflop book --json | jq '.[0]'
    """
    client = flags.client()
    if watch:
        watch_book(flags, client, lambda: _book_lines(client, classes=classes))
    elif wishes:
        print_wishes(flags, client.wishes())
    elif flags.json:
        print_json(client.market() if classes else client.book())
    else:
        for line in _book_lines(client, classes=classes):
            click.echo(line)
        if client.status().get("franchise", {}).get("strict"):
            say("This node is strict: asks of who is not attested are left out.")


def _book_lines(client: Client, *, classes: bool) -> list[str]:
    asks = [] if classes else sorted(client.book(), key=lambda ask: int(ask["price_nusd"]))
    market = client.market()
    lines = class_lines(market)
    if classes:
        lines += depth_lines(market)
    else:
        empty = "No asks known yet: 'p2pflop peers' shows whether anybody is connected."
        lines = [*(ask_lines(asks) or [empty]), "", *lines]
    wished = wish_lines(client.wishes())
    return [*lines, "", take_line(market["take"]), *(["", *wished] if wished else [])]


@click.command("peers")
@common_options
@click.pass_obj
def peers_command(flags: Flags) -> None:
    """List the connected peers.

    \b
    Examples:
      p2pflop peers
      p2pflop peers --json | jq length
    """
    peers = flags.client().peers()
    if flags.json:
        print_json(peers)
        return
    rows = (
        (
            peer["peer"],
            ", ".join(peer.get("addresses", ())),
            "inbound" if peer.get("inbound") else "outbound",
            format_duration(int(peer["rtt_ns"])) if peer.get("rtt_ns") is not None else "",
        )
        for peer in peers
    )
    print_table(
        ("PEER", "ADDRESS", "DIALLED", "RTT"),
        rows,
        "Not connected to anybody: p2pflop node --connect MULTIADDR",
    )


@click.command("ledger")
@common_options
@click.pass_obj
def ledger_command(flags: Flags) -> None:
    """Show who owes whom.

    Balances are of all entries, of which the newest 200 are listed; 'p2pflop statement' has those
    of one account.

    \b
    Examples:
      p2pflop ledger
      p2pflop ledger --json
    """
    client = flags.client(start=True)
    ledger = client.ledger()
    if flags.json:
        print_json(ledger)
        return
    owed_nusd, owing_nusd = int(ledger["owed_nusd"]), int(ledger["owing_nusd"])
    print_fields(
        [
            ("owed to this account", format_usd(owed_nusd)),
            ("owed by this account", format_usd(owing_nusd)),
            ("earned", format_usd(int(ledger.get("earned_nusd", 0)))),
            ("spent", format_usd(int(ledger.get("spent_nusd", 0)))),
        ]
    )
    click.echo(ledger_risk(owed_nusd, owing_nusd))
    if "take" in ledger:
        click.echo(take_line(ledger["take"]))
    balances = [
        (
            short(balance["account"]),
            format_usd(int(balance["due_nusd"])),
            format_usd(int(balance.get("received_nusd", 0))),
        )
        for balance in ledger.get("balances", ())
    ]
    if balances:
        click.echo()
        print_table(("ACCOUNT", "OWES US", "HAS PAID US"), balances, "")
    waiting = [payment for payment in client.payments() if payment["state"] == "claimed"]
    if waiting:
        click.echo()
        print_payments(waiting, "")
    click.echo()
    print_table(
        ("TIME", "ACCOUNT", "KIND", "AMOUNT", "MEMO"),
        (line for entry in ledger.get("entries", ()) for line in _entry_lines(entry)),
        "No entries yet: nothing was bought or sold.",
    )
    listed, count = len(ledger.get("entries", ())), int(ledger.get("entry_count", 0))
    if count > listed:
        say(
            f"the newest {listed} of {count} entries; all of one account: p2pflop statement ACCOUNT"
        )


def _entry_lines(entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line a posting; time and memo stand on the first."""
    head, memo = local_time(int(entry["at_ns"])), str(entry["memo"])
    for posting in entry["postings"]:
        amount = format_usd(int(posting["amount_nusd"]))
        yield head, short(posting["account"]), str(posting["kind"]), amount, memo
        head, memo = "", ""
