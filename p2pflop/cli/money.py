"""``p2pflop pay``, ``payments``, ``received`` and ``refuse``."""

from __future__ import annotations

from typing import Any

import click

from p2pflop.cli.accounts import confirm, due_from, find_account, find_payment
from p2pflop.cli.output import Flags, clean, common_options, print_json, print_table, say, short
from p2pflop.errors import ConfigError
from p2pflop.units import format_usd, parse_usd

YES = click.option("--yes", is_flag=True, help="Do not ask.")
REFERENCE = click.option(
    "--reference", metavar="TEXT", default="", help="What both sides will read beside it."
)


@click.command("pay")
@click.argument("account")
@click.argument("usd")
@REFERENCE
@YES
@common_options
@click.pass_obj
def pay_command(flags: Flags, account: str, usd: str, reference: str, yes: bool) -> None:
    """Book money that you have paid, and tell who got it.

    It moves no money: pay first, by bank, cash or whatever the two of you agree on. ACCOUNT is 64
    hex digits, or the first eight or more of an account that this node knows, or a provider as
    'p2pflop book' names it. The node brings the claim to a node of that account until it is noted
    there, over restarts too. A payment beyond the debt is a prepayment.

    \b
    Examples:
      p2pflop pay 3b6a27bcceb6 12.50 --reference "invoice 7"
      p2pflop pay 3b6a27bcceb6 12.50 --yes --json
    """
    client = flags.client(start=True)
    found, amount_nusd = find_account(client, account), _amount(usd)
    owing_nusd = -due_from(client, found)
    if not flags.json or not yes:
        say(f"account  {found.hex()}")
        say(f"you owe  {format_usd(max(0, owing_nusd))}{_ahead(-owing_nusd)}")
        after_nusd = owing_nusd - amount_nusd
        say(f"after it {format_usd(max(0, after_nusd))}{_ahead(-after_nusd)}")
    question = f"Have you paid {format_usd(amount_nusd)} to this account?"
    if amount_nusd > max(0, owing_nusd):
        ahead = format_usd(amount_nusd - max(0, owing_nusd))
        question = f"That is {ahead} more than you owe: a prepayment. {question}"
    confirm(question, yes=yes)
    _tell(flags, client.pay(found, amount_nusd, reference))


@click.command("payments")
@common_options
@click.pass_obj
def payments_command(flags: Flags) -> None:
    """List payments both ways.

    Claims that wait for your answer come first, of accounts that owe you something before others.

    \b
    Examples:
      p2pflop payments
      p2pflop payments --json | jq '.[] | select(.state == "claimed")'
    """
    payments = flags.client(start=True).payments()
    if flags.json:
        print_json(payments)
        return
    print_payments(payments, "No payments yet: p2pflop pay ACCOUNT USD")


@click.command("received")
@click.argument("what", metavar="ID|ACCOUNT")
@click.argument("usd", required=False)
@REFERENCE
@YES
@common_options
@click.pass_obj
def received_command(flags: Flags, what: str, usd: str | None, reference: str, yes: bool) -> None:
    """Acknowledge money that you have received.

    ID is that of a claim that 'p2pflop payments' shows. With USD it is an ACCOUNT, whose money came
    without a claim. Both are booked here and told to the node that paid. It cannot be undone.

    \b
    Examples:
      p2pflop received 5705a365685c
      p2pflop received 3b6a27bcceb6 12.50 --reference "cash on Monday"
    """
    client = flags.client(start=True)
    if usd is None:
        if reference:
            raise ConfigError("the reference of a claim is the claim's own")
        payment = find_payment(client, what)
        _show(payment)
        amount = format_usd(int(payment["amount_nusd"]))
        confirm(f"Have you received {amount} from this account?", yes=yes)
        _tell(flags, client.acknowledge(bytes.fromhex(payment["id"])))
        return
    found, amount_nusd = find_account(client, what), _amount(usd)
    say(f"account   {found.hex()}")
    say(f"owes you  {format_usd(due_from(client, found))}")
    confirm(f"Have you received {format_usd(amount_nusd)} from this account?", yes=yes)
    _tell(flags, client.receive(found, amount_nusd, reference))


@click.command("refuse")
@click.argument("payment", metavar="ID")
@click.option("--reason", metavar="TEXT", default="", help="What the other side will read.")
@YES
@common_options
@click.pass_obj
def refuse_command(flags: Flags, payment: str, reason: str, yes: bool) -> None:
    """Refuse a claim: the money did not come.

    The other side takes its booking back, and owes what it owed before. It cannot be undone; if the
    money comes after all: p2pflop received ACCOUNT USD.

    \b
    Examples:
      p2pflop refuse 5705a365685c --reason "nothing on the account by Friday"
    """
    client = flags.client(start=True)
    found = find_payment(client, payment)
    _show(found)
    confirm("Say that this money did not come?", yes=yes)
    _tell(flags, client.refuse(bytes.fromhex(found["id"]), reason))


def print_payments(payments: list[dict[str, Any]], empty: str) -> None:
    """A table of payments as the node lists them."""
    rows = (
        (
            payment["id"][:12],
            "to" if payment["side"] == "paid" else "from",
            short(payment["account"]),
            format_usd(int(payment["amount_nusd"])),
            state_of(payment),
            payment["reference"],
        )
        for payment in payments
    )
    print_table(("ID", "", "ACCOUNT", "AMOUNT", "STATE", "REFERENCE"), rows, empty)


def state_of(payment: dict[str, Any]) -> str:
    """How a payment stands, in words."""
    state = str(payment["state"])
    if state == "claimed" and payment["side"] == "received":
        state = "claimed, waits for you"
    if payment["reason"]:
        state += f": {payment['reason']}"
    if not payment["told"]:
        state += f"; not told yet ({payment['trouble'] or 'under way'})"
    return state


def _show(payment: dict[str, Any]) -> None:
    say(f"account   {clean(payment['account'])}")
    say(f"claims    {format_usd(int(payment['amount_nusd']))} {clean(payment['reference'])}")


def _tell(flags: Flags, payment: dict[str, Any]) -> None:
    if flags.json:
        print_json(payment)
    else:
        click.echo(payment["id"])
        say(state_of(payment))


def _amount(text: str) -> int:
    amount_nusd = parse_usd(text)
    if amount_nusd == 0:
        raise ConfigError("a payment of nothing")
    return amount_nusd


def _ahead(due_nusd: int) -> str:
    return f" ({format_usd(due_nusd)} paid ahead)" if due_nusd > 0 else ""
