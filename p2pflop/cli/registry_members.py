"""The registry's decisions: who is enrolled, who has paid, who is attested; and how to apply."""

from __future__ import annotations

import csv
import io
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from p2pflop.cli.accounts import confirm, find_among, is_whole
from p2pflop.cli.output import (
    Flags,
    clean,
    common_options,
    print_fields,
    print_json,
    print_table,
    say,
    short,
)
from p2pflop.cli.registry_words import date, home_of, run_office
from p2pflop.cli.statement import decimal, parse_date, safe_cell
from p2pflop.errors import ConfigError
from p2pflop.ids import HASH_BYTES
from p2pflop.units import NS_PER_S, format_usd, parse_duration, parse_usd

if TYPE_CHECKING:
    from p2pflop.franchise.records import Attestation
    from p2pflop.registry.books import Line
    from p2pflop.registry.office import Office

YES: Final = click.option("--yes", is_flag=True, help="Do not ask.")
DAY_NS: Final = 24 * 3600 * NS_PER_S
REFUSALS: Final = ("unreachable", "guidelines", "own_wish", "law", "flood")
REVOCATIONS: Final = ("unpaid", "key_lost", "own_wish", "guidelines", "issued_in_error")


@click.command("enroll")
@click.argument("address", metavar="[KEY@]URL")
@click.option("--contact", metavar="TEXT", help="How the operator reaches you.")
@click.option("--place", metavar="TEXT", default="", help="Where the machines are.")
@YES
@common_options
@click.pass_obj
def enroll_command(flags: Flags, address: str, contact: str | None, place: str, yes: bool) -> None:
    """Apply to a registry with the account of this home.

    The request is signed by the account and agrees to the registry's guidelines. Contact and place
    are kept apart from it and erased on request. Given again, it tells how the application stands.

    \b
    Examples:
      p2pflop registry enroll https://registry.example.org --contact ada@example.org
      p2pflop registry enroll KEY@https://registry.example.org --contact ada@example.org --yes
    """
    from p2pflop.franchise.enrolments import make_form
    from p2pflop.franchise.records import PersonalData
    from p2pflop.node.home import read_key
    from p2pflop.registry.audit import HttpSource, parse_address

    wanted, url = parse_address(address)
    path = home_of(flags) / "account.pem"
    if not path.exists():
        raise ConfigError(
            f"there is no account in {home_of(flags)}",
            hint="A node makes one at its first start; that of a box made by p2pflop delegate is "
            "where it was made.",
        )
    account = read_key(path, "Restore it from a backup.")
    source = HttpSource(url)
    issuer, network, guidelines = _terms(source.get("/v1/registry"), wanted)
    known = _known(source, account.public_key)
    if known is None or known["state"] == "revoked":
        if contact is None:
            raise ConfigError("the operator must be able to reach you", hint="Give --contact TEXT.")
        say(f"registry  {issuer.hex()}")
        say(f"account   {account.public_key.hex()}")
        confirm(f"Agree to its guidelines, version {guidelines!r}?", yes=yes)
        personal = PersonalData(1, secrets.token_bytes(HASH_BYTES), contact, place)
        try:
            form = make_form(account, issuer, guidelines, personal, time.time_ns(), network)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        known = source.post("/v1/enrolments", form)
    names = ("state", "waits_for", "until_ns", "days_left", "id")
    told = {name: known[name] for name in names if name in known}
    if flags.json:
        print_json(told)
        return
    waits_for = f", waits for {told['waits_for']}" if told.get("waits_for") else ""
    days = f", {told['days_left']} days left" if told["state"] == "attested" else ""
    click.echo(clean(f"{told['state']}{waits_for}{days}"))


@click.command("approve")
@click.argument("account")
@YES
@common_options
@click.pass_obj
def approve_command(flags: Flags, account: str, yes: bool) -> None:
    """Enrol an account that waits.

    \b
    Examples:
      p2pflop registry approve 3b6a27bcceb6
    """

    async def approve(office: Office, found: bytes) -> dict[str, Any]:
        await office.approve(found)
        return {}

    _decide(flags, account, "Enrol this account?", approve, yes=yes)


@click.command("refuse")
@click.argument("account")
@click.option("--reason", type=click.Choice(REFUSALS), required=True, help="It is public.")
@YES
@common_options
@click.pass_obj
def refuse_command(flags: Flags, account: str, reason: str, yes: bool) -> None:
    """Refuse an account that waits, and erase what it told about itself.

    \b
    Examples:
      p2pflop registry refuse 3b6a27bcceb6 --reason unreachable
    """
    from p2pflop.franchise.records import RefusalReason

    async def refuse(office: Office, found: bytes) -> dict[str, Any]:
        await office.refuse(found, RefusalReason[reason.upper()])
        return {"state": "refused"}

    _decide(flags, account, f"Refuse this account ({reason})?", refuse, yes=yes)


@click.command("erase")
@click.argument("account")
@YES
@common_options
@click.pass_obj
def erase_command(flags: Flags, account: str, yes: bool) -> None:
    """Erase the contact and place of an account; it stays enrolled.

    Backups that were made before have them still.

    \b
    Examples:
      p2pflop registry erase 3b6a27bcceb6
    """

    async def work(office: Office) -> dict[str, Any]:
        found = _find(office, account)
        confirm("Erase contact and place of this account?", yes=yes)
        return {"account": found.hex(), "erased": await office.erase(found)}

    _tell(flags, run_office(flags, work))


@click.command("fee")
@click.argument("usd", required=False)
@click.option("--period", metavar="TIME", help="A period [default: as before].")
@click.option("--slots", type=click.IntRange(1), help="Slots of an account [default: as before].")
@click.option("--guidelines", metavar="NAME", help="Their version [default: as before].")
@click.option("--from", "start", metavar="DATE", help="From then on [default: now]; UTC.")
@YES
@common_options
@click.pass_obj
def fee_command(
    flags: Flags,
    usd: str | None,
    period: str | None,
    slots: int | None,
    guidelines: str | None,
    start: str | None,
    yes: bool,
) -> None:
    """Show the schedules of fees, or publish the next one.

    A schedule is flat, the same for all, and holds for periods that begin later: what is attested
    stays so until its end.

    \b
    Examples:
      p2pflop registry fee
      p2pflop registry fee 12.50 --from 2027-01-01
    """

    async def show(office: Office) -> list[dict[str, Any]]:
        from p2pflop.registry.views import schedule_view

        return [schedule_view(schedule) for schedule, _ in office.schedules()]

    async def publish(office: Office) -> list[dict[str, Any]]:
        last = office.schedules()[-1][0]
        fee_nusd = last.fee_nusd if usd is None else parse_usd(usd)
        confirm(f"Publish a fee of {format_usd(fee_nusd)}?", yes=yes)
        await office.publish(
            fee_nusd,
            last.period_ns if period is None else parse_duration(period),
            last.max_slots if slots is None else slots,
            last.guidelines if guidelines is None else guidelines,
            None if start is None else parse_date(start),
        )
        return await show(office)

    is_new = any(each is not None for each in (usd, period, slots, guidelines, start))
    rows = run_office(flags, publish if is_new else show)
    if flags.json:
        print_json(rows)
        return
    table = (
        (
            row["number"],
            date(row["from_ns"]),
            format_usd(row["fee_nusd"]),
            f"{row['period_ns'] / DAY_NS:g} d",
            row["max_slots"],
            row["guidelines"],
        )
        for row in rows
    )
    print_table(("NUMBER", "FROM", "FEE", "PERIOD", "SLOTS", "GUIDELINES"), table, "None.")


@click.command("paid")
@click.argument("account")
@click.argument("usd")
@click.option("--reference", metavar="TEXT", required=True, help="What tells this payment apart.")
@YES
@common_options
@click.pass_obj
def paid_command(flags: Flags, account: str, usd: str, reference: str, yes: bool) -> None:
    """Book money that came from an account; it is attested if that pays its fee.

    It moves no money. A reference is booked once, so the command can be given again.

    \b
    Examples:
      p2pflop registry paid 3b6a27bcceb6 10 --reference "bank 2026-11-26 no 17"
    """
    amount_nusd = parse_usd(usd)

    async def receive(office: Office, found: bytes) -> dict[str, Any]:
        is_new, issued = await office.receive(found, amount_nusd, reference)
        return {"booked": is_new, "attested": _serial(issued)}

    question = f"Has {format_usd(amount_nusd)} come from this account?"
    _decide(flags, account, question, receive, yes=yes)


@click.command("returned")
@click.argument("account")
@click.option("--reference", metavar="TEXT", required=True, help="That of the payment.")
@YES
@common_options
@click.pass_obj
def returned_command(flags: Flags, account: str, reference: str, yes: bool) -> None:
    """Book that a payment was returned or refunded.

    It revokes nothing: see 'p2pflop registry revoke ACCOUNT --reason unpaid'.

    \b
    Examples:
      p2pflop registry returned 3b6a27bcceb6 --reference "bank 2026-11-26 no 17"
    """

    async def work(office: Office) -> dict[str, Any]:
        found = _find(office, account)
        confirm(f"Was the payment {reference!r} returned?", yes=yes)
        amount_nusd = await office.give_back(found, reference)
        return _standing(office, found) | {"booked_nusd": amount_nusd}

    _tell(flags, run_office(flags, work))


@click.command("attest")
@click.argument("account", required=False)
@common_options
@click.pass_obj
def attest_command(flags: Flags, account: str | None) -> None:
    """Attest whoever is enrolled, has paid and is due; the service does it by itself.

    \b
    Examples:
      p2pflop registry attest
      p2pflop registry attest 3b6a27bcceb6
    """

    async def one(office: Office) -> list[Attestation]:
        issued, why = await office.attest(_find(office, account or ""))
        if issued is None:
            say(why)
        return [] if issued is None else [issued]

    async def all_due(office: Office) -> list[Attestation]:
        found: list[Attestation] = []
        while step := await office.attest_due():
            found += step
        return found

    issued = run_office(flags, all_due if account is None else one)
    rows: list[dict[str, Any]] = [
        {"serial": each.serial, "account": each.account.hex(), "until_ns": each.valid_until_ns}
        for each in issued
    ]
    if flags.json:
        print_json(rows)
        return
    table = ((row["serial"], short(row["account"]), date(row["until_ns"])) for row in rows)
    print_table(("SERIAL", "ACCOUNT", "UNTIL"), table, "Nothing was issued.")


@click.command("revoke")
@click.argument("account")
@click.option("--reason", type=click.Choice(REVOCATIONS), required=True, help="It is public.")
@YES
@common_options
@click.pass_obj
def revoke_command(flags: Flags, account: str, reason: str, yes: bool) -> None:
    """Take back what an account was attested. It cannot be undone; it may enrol again.

    \b
    Examples:
      p2pflop registry revoke 3b6a27bcceb6 --reason unpaid
    """
    from p2pflop.franchise.records import RevocationReason

    async def revoke(office: Office, found: bytes) -> dict[str, Any]:
        await office.revoke(found, RevocationReason[reason.upper()])
        return {}

    _decide(flags, account, f"Revoke this account ({reason})?", revoke, yes=yes)


@click.command("list")
@click.option("--waiting", is_flag=True, help="Only those that wait for you.")
@common_options
@click.pass_obj
def list_command(flags: Flags, waiting: bool) -> None:
    """List the accounts: those that wait, then those that are enrolled.

    \b
    Examples:
      p2pflop registry list
      p2pflop registry list --waiting --json
    """

    async def read(office: Office) -> list[dict[str, Any]]:
        from p2pflop.registry.views import members_view

        return members_view(office)

    rows = [row for row in run_office(flags, read) if not waiting or row["state"] == "waiting"]
    if flags.json:
        print_json(rows)
        return
    table = (
        (
            row["account"][:16],
            row["state"],
            date(row.get("until_ns", 0)),
            row.get("days_left", ""),
            format_usd(row.get("credit_nusd", 0)),
            format_usd(row.get("missing_nusd", 0)),
        )
        for row in rows
    )
    header = ("ACCOUNT", "STATE", "UNTIL", "DAYS", "CREDIT", "MISSING")
    print_table(header, table, "Nobody has applied yet.")


@click.command("show")
@click.argument("account")
@common_options
@click.pass_obj
def show_command(flags: Flags, account: str) -> None:
    """Show an account: how it stands, and what it told about itself.

    \b
    Examples:
      p2pflop registry show 3b6a27bcceb6
    """

    async def read(office: Office) -> dict[str, Any]:
        from p2pflop.registry.views import person

        found = _find(office, account)
        told = person(office.query, found)
        who = {"contact": told.contact, "place": told.place} if told is not None else {}
        return _standing(office, found) | who

    _tell(flags, run_office(flags, read))


@click.command("export")
@click.option("--account", metavar="ACCOUNT", help="Of this one alone.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@common_options
@click.pass_obj
def export_command(flags: Flags, account: str | None, out: Path | None) -> None:
    """Print the books as CSV: payments, fees, and the credit after each.

    \b
    Examples:
      p2pflop registry export > books.csv
      p2pflop registry export --account 3b6a27bcceb6 --out ada.csv
    """
    from p2pflop.node.home import write_private
    from p2pflop.registry.books import check_books, lines

    async def read(office: Office) -> list[Line]:
        check_books(office.query)
        found = None if account is None else _find(office, account)
        return list(lines(office.query, found))

    rows = run_office(flags, read)
    if flags.json:
        names = ("at_ns", "memo", "amount_nusd", "credit_nusd")
        print_json(
            [
                {"account": row.account.hex(), **{name: getattr(row, name) for name in names}}
                for row in rows
            ]
        )
        return
    table = csv_of(rows)
    if out is None:
        click.echo(table, nl=False)
    else:
        write_private(out, table.encode())


def csv_of(rows: list[Line]) -> str:
    """The books for an accountant, in RFC 4180's form; amounts in dollars, times in UTC."""
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(("time", "account", "what", "amount_usd", "credit_usd"))
    for row in rows:
        amounts = (decimal(row.amount_nusd), decimal(row.credit_nusd))
        writer.writerow((date(row.at_ns), row.account.hex(), safe_cell(row.memo), *amounts))
    return sheet.getvalue()


def _terms(told: dict[str, Any], wanted: bytes | None) -> tuple[bytes, str, str]:
    """Issuer, network and guidelines of a registry. Raises ConfigError."""
    from p2pflop.franchise.enrolments import is_name

    schedule = told.get("schedule")
    issuer, network = told.get("issuer"), told.get("network")
    guidelines = schedule.get("guidelines") if isinstance(schedule, dict) else None
    if not (isinstance(issuer, str) and is_whole(issuer)):
        raise ConfigError("what answers there is no registry")
    if not (is_name(network) and is_name(guidelines)):
        raise ConfigError("the registry takes no applications now")
    key = bytes.fromhex(issuer)
    if wanted is not None and key != wanted:
        raise ConfigError(f"the registry's root key is {issuer}, not the one that was given")
    return key, str(network), str(guidelines)


def _known(source: Any, account: bytes) -> dict[str, Any] | None:
    """What the registry says of the account; None if it does not know it."""
    try:
        found: dict[str, Any] = source.get(f"/v1/attestations/{account.hex()}")
    except ConfigError:
        return None
    return found if isinstance(found.get("state"), str) else None


def _find(office: Office, text: str) -> bytes:
    """The account of 64 digits, or the one here that begins so. Raises ConfigError."""
    if is_whole(text):
        return bytes.fromhex(text)
    rows = office.query("SELECT account FROM requests UNION SELECT account FROM members")
    known = (bytes(account).hex() for (account,) in rows)
    return find_among(text, known, "account", "See 'p2pflop registry list'.")


def _asked(office: Office, text: str, question: str, *, yes: bool) -> bytes:
    """The account that a decision is about, once the operator has seen it and agreed."""
    from p2pflop.registry.views import person

    account = _find(office, text)
    told = person(office.query, account)
    say(f"account  {account.hex()}")
    if told is not None:
        say(f"contact  {told.contact}")
        say(f"place    {told.place}")
    confirm(question, yes=yes)
    return account


def _decide(
    flags: Flags,
    account: str,
    question: str,
    decide: Callable[[Office, bytes], Awaitable[dict[str, Any]]],
    *,
    yes: bool,
) -> None:
    """Decide about an account once the operator agrees; tell how it stands then, and what more
    ``decide`` says."""

    async def work(office: Office) -> dict[str, Any]:
        found = _asked(office, account, question, yes=yes)
        more = await decide(office, found)
        return _standing(office, found) | more

    _tell(flags, run_office(flags, work))


def _standing(office: Office, account: bytes) -> dict[str, Any]:
    from p2pflop.registry.views import member_view

    return member_view(office, account) or {"account": account.hex(), "state": "unknown"}


def _serial(issued: Attestation | None) -> int:
    return 0 if issued is None else issued.serial


def _tell(flags: Flags, told: dict[str, Any]) -> None:
    if flags.json:
        print_json(told)
        return
    fields = []
    for name, value in told.items():
        if name.endswith("_ns"):
            fields.append((name.removesuffix("_ns"), date(value)))
        elif name.endswith("_nusd"):
            fields.append((name.removesuffix("_nusd"), format_usd(value)))
        elif value not in ("", None):
            fields.append((name, value))
    print_fields(fields)
