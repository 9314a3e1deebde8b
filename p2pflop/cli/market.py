"""``p2pflop book``, ``peers`` and ``ledger``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from p2pflop.cli.money import print_payments
from p2pflop.cli.output import Flags, common_options, print_fields, print_json, print_table, short
from p2pflop.cli.wishes import print_wishes
from p2pflop.kernels.classes import name_of
from p2pflop.market.credit import ledger_risk
from p2pflop.units import format_bytes, format_duration, format_flop, format_usd


@click.command("book")
@click.option("--wishes", is_flag=True, help="Show the wishes of buyers alone.")
@common_options
@click.pass_obj
def book_command(flags: Flags, wishes: bool) -> None:
    """Show the order book.

    Every ask that this node knows, cheapest first; prices are dollars a PFLOP. Then what buyers
    wish for, if anything: how many would pay up to which price. With --json only one of the two.

    \b
    Examples:
      p2pflop book
      p2pflop book --wishes
      p2pflop book --json | jq '.[0]'
    """
    client = flags.client()
    if wishes:
        print_wishes(flags, client.wishes())
        return
    asks = client.book()
    if flags.json:
        print_json(asks)
        return
    rows = (
        (
            f"{short(ask['provider'])}{' (this node)' if ask.get('own') else ''}",
            format_usd(int(ask["price_nusd"])),
            format_bytes(int(ask["memory_bytes"])),
            f"{format_flop(int(ask.get('flop_per_s', 0)))}/s",
            name_of(bytes.fromhex(ask["class_id"])) or short(ask["class_id"]),
        )
        for ask in sorted(asks, key=lambda ask: int(ask["price_nusd"]))
    )
    print_table(
        ("PROVIDER", "PRICE/PFLOP", "MEMORY", "CLAIMED SPEED", "CLASS"),
        rows,
        "No asks known yet: 'p2pflop peers' shows whether anybody is connected.",
    )
    if wished := client.wishes():
        click.echo()
        print_wishes(flags, wished)


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
    print_fields(
        [
            ("owed to this account", format_usd(int(ledger["owed_nusd"]))),
            ("owed by this account", format_usd(int(ledger["owing_nusd"]))),
            ("earned", format_usd(int(ledger.get("earned_nusd", 0)))),
            ("spent", format_usd(int(ledger.get("spent_nusd", 0)))),
        ]
    )
    click.echo(ledger_risk(*at_risk(ledger.get("balances", ()))))
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


def at_risk(balances: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """What others owe this account, and what it owes, each over those whose balance is so."""
    due = [int(balance["due_nusd"]) for balance in balances]
    return sum(max(0, nusd) for nusd in due), sum(max(0, -nusd) for nusd in due)


def _entry_lines(entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line a posting; time and memo stand on the first."""
    head, memo = _time(int(entry["at_ns"])), str(entry["memo"])
    for posting in entry["postings"]:
        amount = format_usd(int(posting["amount_nusd"]))
        yield head, short(posting["account"]), str(posting["kind"]), amount, memo
        head, memo = "", ""


def _time(at_ns: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(at_ns / 10**9).astimezone().strftime("%Y-%m-%d %H:%M:%S")
