"""``p2pflop statement``: text for people, CSV for spreadsheets, JSON for programs."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from typing import Any, Final

import click

from p2pflop.cli.accounts import find_account
from p2pflop.cli.output import Flags, clean, common_options, print_fields, print_json, print_table
from p2pflop.errors import ConfigError
from p2pflop.units import NS_PER_S, NUSD_PER_USD, format_usd

COLUMNS: Final = ("time", "memo", "reference", "number", "amount_usd", "balance_usd")
MAX_SINCE_NS: Final = 2**62
"""Early in 2116: times on the wire go no further."""
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


@click.command("statement")
@click.argument("account")
@click.option("--since", metavar="DATE", help="From then on: 2026-11-01, or with a time; UTC.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--text", "as_text", is_flag=True, help="Print a table, as without it.")
@common_options
@click.pass_obj
def statement_command(
    flags: Flags, account: str, since: str | None, as_csv: bool, as_text: bool
) -> None:
    """Show every entry with one account.

    An amount is what the entry changed in what ACCOUNT owes you; below zero, you owe. The other
    side's statement has the same amounts with the other sign. Times are in UTC.

    \b
    Examples:
      p2pflop statement 3b6a27bcceb6
      p2pflop statement 3b6a27bcceb6 --since 2026-11-01 --csv > november.csv
    """
    if flags.json + as_csv + as_text > 1:
        raise ConfigError("--csv, --json and --text are three forms: choose one")
    since_ns = 0 if since is None else parse_date(since)
    client = flags.client(start=True)
    statement = client.statement(find_account(client, account), since_ns)
    if flags.json:
        print_json(statement)
    elif as_csv:
        click.echo(csv_of(statement), nl=False)
    else:
        _print(statement)


def parse_date(text: str) -> int:
    """Unix nanoseconds of an ISO 8601 date or time; UTC unless it says otherwise.

    Raises ConfigError.
    """
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        since_ns = int(moment.timestamp()) * NS_PER_S
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{text[:40]!r} is not a date", hint="Write it like 2026-11-01 or 2026-11-01T12:00."
        ) from error
    if not 0 <= since_ns <= MAX_SINCE_NS:
        raise ConfigError(f"{text[:40]!r} is not from 1970 to 2115")
    return since_ns


def csv_of(statement: dict[str, Any]) -> str:
    """A line for each entry between the opening and the closing balance, in RFC 4180's form.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(COLUMNS)
    opening, closing = statement["opening_nusd"], statement["closing_nusd"]
    writer.writerow([statement["since"], "opening balance", "", "", "", decimal(opening)])
    for entry in statement["entries"]:
        writer.writerow(
            [
                entry["at"],
                safe_cell(entry["memo"]),
                entry["reference"],
                entry["number"] or "",
                decimal(entry["amount_nusd"]),
                decimal(entry["balance_nusd"]),
            ]
        )
    writer.writerow(["", "closing balance", statement["head"], "", "", decimal(closing)])
    return sheet.getvalue()


def safe_cell(text: str) -> str:
    """``text`` as a cell that no spreadsheet computes."""
    plain = clean(text)
    return f"'{plain}" if text.startswith(_FORMULA) or plain.startswith(_FORMULA) else plain


def decimal(nusd: int) -> str:
    """Dollars with all nine decimals, and nothing else: a number in any spreadsheet."""
    whole, part = divmod(abs(nusd), NUSD_PER_USD)
    return f"{'-' if nusd < 0 else ''}{whole}.{part:09d}"


def _print(statement: dict[str, Any]) -> None:
    print_fields(
        [
            ("account", statement["account"]),
            ("this account", statement["own_account"]),
            ("opening balance", _balance(statement, "opening_nusd")),
        ]
    )
    click.echo()
    print_table(
        ("TIME", "AMOUNT", "BALANCE", "REFERENCE", "MEMO"),
        (
            (
                entry["at"],
                format_usd(int(entry["amount_nusd"])),
                format_usd(int(entry["balance_nusd"])),
                entry["reference"][:12],
                entry["memo"],
            )
            for entry in statement["entries"]
        ),
        "No entries.",
    )
    click.echo()
    print_fields(
        [
            ("closing balance", _balance(statement, "closing_nusd")),
            ("ledger's head", statement["head"]),
        ]
    )


def _balance(statement: dict[str, Any], name: str) -> str:
    return format_usd(int(statement[name]))
