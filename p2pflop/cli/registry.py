"""``p2pflop registry``: the group, and what keeps a registry up; decisions are elsewhere."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from p2pflop.cli.accounts import confirm
from p2pflop.cli.output import (
    Flags,
    common_options,
    print_fields,
    print_json,
    print_table,
    say,
)
from p2pflop.cli.registry_words import date, folder_of_flags, home_of, run_office
from p2pflop.cli.tied import end_with_parent
from p2pflop.errors import ConfigError, VerificationError
from p2pflop.units import counted, parse_duration, parse_usd

if TYPE_CHECKING:
    from p2pflop.franchise.records import CertificateRequest, Schedule
    from p2pflop.registry.audit import Forked, Report
    from p2pflop.registry.office import Office

DEFAULT_PORT: Final = 7430
DEFAULT_PERIOD: Final = "365d"
DEFAULT_SLOTS: Final = 64
DEFAULT_GUIDELINES: Final = "1"
YES: Final = click.option("--yes", is_flag=True, help="Do not ask.")
ROOT_KEY: Final = click.option(
    "--root-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file of the root key; keep it where no network is.",
)
OURS: Final = ("init", "serve", "certify")
DECISIONS: Final = (
    "enroll",
    "list",
    "show",
    "approve",
    "refuse",
    "erase",
    "fee",
    "paid",
    "returned",
    "attest",
    "revoke",
    "export",
)
UPKEEP: Final = ("log", "backup", "restore", "verify")
FILE: Final = click.Path(path_type=Path, dir_okay=False)


class RegistryGroup(click.Group):
    """Finds the commands that are in ``registry_members`` when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """In the order of a registry's life."""
        return [*OURS, *DECISIONS, *UPKEEP]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Ours, or one of ``registry_members``."""
        if cmd_name not in DECISIONS:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module("p2pflop.cli.registry_members")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


@click.group("registry", cls=RegistryGroup)
@common_options
def registry_command() -> None:
    """Run a registry of franchises, enrol at one, or check one.

    A registry attests one thing: that an account has paid its franchise fee until a date. It is
    in the folder 'registry' of the home. See docs/registry.md.

    \b
    Examples:
      p2pflop registry init --root-key /media/usb/root.pem --fee 10
      p2pflop registry serve
      p2pflop registry list
      p2pflop registry verify https://registry.example.org
    """


@registry_command.command("init")
@ROOT_KEY
@click.option("--network", default="main", metavar="NAME", help="The network [default: main].")
@click.option("--fee", default="0", metavar="USD", help="The flat fee of a period [default: 0].")
@click.option("--period", default=DEFAULT_PERIOD, metavar="TIME", help="A period [default: 365d].")
@click.option("--slots", default=DEFAULT_SLOTS, help="Slots of an account [default: 64].")
@click.option(
    "--guidelines", default=DEFAULT_GUIDELINES, metavar="NAME", help="Their version [default: 1]."
)
@common_options
@click.pass_obj
def init_command(
    flags: Flags,
    root_key: Path | None,
    network: str,
    fee: str,
    period: str,
    slots: int,
    guidelines: str,
) -> None:
    """Make a registry: its keys, its log, and its first schedule of fees.

    The root key is made if its file is not there. It is the name of the registry for ever: copy it
    to two places without a network, and take it from this machine. Nothing but 'certify' needs it.

    \b
    Examples:
      p2pflop registry init --root-key /media/usb/root.pem
      p2pflop registry init --root-key root.pem --fee 10 --period 365d --slots 64
    """
    import trio

    from p2pflop.franchise.records import Schedule
    from p2pflop.registry.founding import found_registry
    from p2pflop.registry.home import make_root

    if root_key is None:
        raise ConfigError(
            "a registry needs a root key", hint="Name its file: --root-key /media/usb/root.pem."
        )
    folder = folder_of_flags(flags)
    if root_key.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            "the root key may not be in the registry's own folder",
            hint="Whoever gets into the service would have it. Keep it somewhere else.",
        )
    fee_nusd, period_ns = parse_usd(fee), parse_duration(period)

    def first(issuer: bytes, now_ns: int) -> Schedule:
        return Schedule(1, issuer, 1, fee_nusd, period_ns, slots, now_ns, guidelines)

    root = make_root(root_key)
    trio.run(found_registry, folder, root, network, first, time.time_ns)
    key = root.public_key.hex()
    if flags.json:
        print_json({"issuer": key, "network": network, "folder": str(folder)})
        return
    print_fields((("registry", key), ("network", network), ("folder", folder)))
    say(f"Keep two copies of {root_key} where no network is, and none here.")
    say("Serve it: p2pflop registry serve")


@registry_command.command("serve")
@click.option("--host", default="127.0.0.1", metavar="IP", help="Listen here [default: 127.0.0.1].")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    help="HTTP port [default: 7430; 0: any].",
)
@click.option("--behind-proxy", is_flag=True, help="Count applicants by the last X-Forwarded-For.")
@click.option("--tied", is_flag=True, hidden=True)
@common_options
@click.pass_obj
def serve_command(flags: Flags, host: str, port: int, behind_proxy: bool, tied: bool) -> None:
    """Answer over HTTP, and renew what is paid for.

    It needs the online key and never the root key. Put a web server with TLS before it. The other
    commands can be given while it runs.

    \b
    Examples:
      p2pflop registry serve
      p2pflop registry serve --host 127.0.0.1 --port 7430 --behind-proxy
    """
    import ipaddress
    import logging

    from p2pflop.registry.home import require
    from p2pflop.registry.service import run_service

    if tied:
        end_with_parent()
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(f"{host[:80]!r} is not an IP address") from error
    folder = folder_of_flags(flags)
    require(folder)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def started(key: str, url: str) -> None:
        if flags.json:
            print_json({"issuer": key, "url": url})
        else:
            click.echo(f"registry {key}@{url}")

    run_service(folder, host, port, behind_proxy=behind_proxy, started=started)


@registry_command.command("certify")
@ROOT_KEY
@click.option("--request", type=FILE, help="Write what the root key has to sign to this file.")
@click.option("--sign", type=FILE, help="Sign a request, where the root key is.")
@click.option("--out", type=FILE, help="Write the certificate to this file.")
@click.option("--install", type=FILE, help="Take up a certificate.")
@click.option("--withdraw", is_flag=True, help="Give up the online keys before: lost or stolen.")
@YES
@common_options
@click.pass_obj
def certify_command(
    flags: Flags,
    root_key: Path | None,
    request: Path | None,
    sign: Path | None,
    out: Path | None,
    install: Path | None,
    withdraw: bool,
    yes: bool,
) -> None:
    """Certify a new online key for 90 days.

    In one step where the root key is at hand, else in three: --request here, --sign where the root
    key is, --install here. With --withdraw all heads that the online keys before have signed stop
    counting; nodes then fetch their attestations anew. Stop the service before that.

    \b
    Examples:
      p2pflop registry certify --root-key /media/usb/root.pem
      p2pflop registry certify --request request.bin
      p2pflop registry certify --sign request.bin --root-key root.pem --out certificate.bin
      p2pflop registry certify --install certificate.bin
    """
    from p2pflop.cli.registry_words import read_bounded
    from p2pflop.franchise.records import CertificateRequest
    from p2pflop.node.home import write_private
    from p2pflop.wire import decode, encode

    if [request, sign, install].count(None) < 2:
        raise ConfigError("choose one of --request, --sign and --install")
    if withdraw and not install and not sign:
        confirm("Give up every online key before, and all heads by them?", yes=yes)
    if sign is not None:
        asked = decode(CertificateRequest, read_bounded(sign))
        wire = _sign(asked, root_key, yes=yes)
        if out is None:
            raise ConfigError("name the certificate's file with --out")
        write_private(out, wire)
        _told(flags, certificate=str(out))
        return

    async def work(office: Office) -> bytes:
        if install is not None:
            return (await office.install_certificate(read_bounded(install))).wire
        asked = office.request_certificate(withdraws=withdraw)
        if request is not None:
            write_private(request, encode(asked))
            return b""
        return (await office.install_certificate(_sign(asked, root_key, yes=True))).wire

    wire = run_office(flags, work)
    if wire:
        _told(flags, installed=True)
    else:
        _told(flags, request=str(request))


@registry_command.command("log")
@click.option(
    "--from",
    "first",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="The first leaf [default: 0].",
)
@click.option("--limit", type=click.IntRange(1, 500), default=100, help="Leaves [default: 100].")
@common_options
@click.pass_obj
def log_command(flags: Flags, first: int, limit: int) -> None:
    """List the leaves of this registry's public log.

    \b
    Examples:
      p2pflop registry log
      p2pflop registry log --from 100 --limit 50 --json
    """
    from p2pflop.cli.registry_words import leaf_row
    from p2pflop.registry.log import leaves_from

    async def read(office: Office) -> list[bytes]:
        return leaves_from(office.query, first)[:limit]

    leaves = run_office(flags, read)
    rows = [leaf_row(first + place, leaf) for place, leaf in enumerate(leaves)]
    if flags.json:
        print_json(rows)
        return
    table = ((row["number"], date(row["at_ns"]), row["kind"], row["what"]) for row in rows)
    print_table(("LEAF", "TIME", "KIND", "WHAT"), table, "No leaves from there on.")


@registry_command.command("backup")
@click.argument("file", type=FILE)
@common_options
@click.pass_obj
def backup_command(flags: Flags, file: Path) -> None:
    """Copy the registry to a new file, and check the copy.

    It can be served meanwhile. Keys are not in it. It has contacts and places: keep it private.

    \b
    Examples:
      p2pflop registry backup /backups/registry-2026-11-26.db
    """
    from p2pflop.registry.backup import back_up
    from p2pflop.registry.home import require

    folder = folder_of_flags(flags)
    require(folder)
    contents = back_up(folder, file)
    _told(flags, file=str(file), leaves=contents.leaves, entries=contents.entries)


@registry_command.command("restore")
@click.argument("file", type=FILE)
@common_options
@click.pass_obj
def restore_command(flags: Flags, file: Path) -> None:
    """Put a backup where no registry is, after checking all of it.

    If anything was decided after the backup was made, certify a new online key with --withdraw
    before you serve: else those who saw it will prove that there are two histories.

    \b
    Examples:
      p2pflop registry restore /backups/registry-2026-11-26.db
    """
    from p2pflop.registry.backup import restore

    contents = restore(file, folder_of_flags(flags))
    _told(flags, leaves=contents.leaves, entries=contents.entries, at=date(contents.head_at_ns))
    say("If it is not the newest state: p2pflop registry certify --withdraw --root-key FILE")


@registry_command.command("verify")
@click.argument("address", metavar="[KEY@]URL")
@click.option("--key", metavar="HEX", help="The root key that it must have.")
@click.option("--forget", is_flag=True, help="Compare with nothing, and remember nothing.")
@click.option("--evidence", type=FILE, help="Write the proof of a fork to this file.")
@common_options
@click.pass_obj
def verify_command(
    flags: Flags, address: str, key: str | None, forget: bool, evidence: Path | None
) -> None:
    """Check the whole log of a registry from outside.

    Every leaf and every head is read and checked, and its newest head compared with the one that
    this home remembers. Two histories are proven by the registry's own signatures.

    \b
    Examples:
      p2pflop registry verify https://registry.example.org
      p2pflop registry verify http://127.0.0.1:7430 --key 3b6a27bc...
    """
    from p2pflop.ids import parse_hash
    from p2pflop.node.home import write_private
    from p2pflop.registry.audit import Forked, HttpSource, audit, parse_address

    in_address, url = parse_address(address)
    wanted = parse_hash(key) if key else in_address
    home = None if forget else home_of(flags)
    found = audit(HttpSource(url), wanted, home, time.time_ns())
    if isinstance(found, Forked):
        if evidence is not None:
            write_private(evidence, found.evidence)
        _print_fork(flags, found)
        raise VerificationError(
            f"registry {found.issuer.hex()[:12]} has shown two histories of its log",
            hint="Show the proof to others, and do not trust this registry.",
        )
    _print_report(flags, found, is_known=wanted is not None)


def _sign(asked: CertificateRequest, root_key: Path | None, *, yes: bool) -> bytes:
    from p2pflop.franchise.issuer import sign_certificate
    from p2pflop.franchise.records import DAY_NS
    from p2pflop.registry.certifying import CERTIFICATE_DAYS
    from p2pflop.registry.home import read_root

    if root_key is None:
        raise ConfigError("only the root key can sign a certificate", hint="Name it: --root-key.")
    if asked.withdraws:
        say("This gives up every online key before, and all heads by them.")
    say(f"certificate {asked.number} for the online key {asked.online_key.hex()[:16]}")
    confirm("Sign it with the root key?", yes=yes)
    now_ns = time.time_ns()
    try:
        signed = sign_certificate(
            read_root(root_key), asked, now_ns, now_ns + CERTIFICATE_DAYS * DAY_NS
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return signed.wire


def _told(flags: Flags, **fields: object) -> None:
    if flags.json:
        print_json(fields)
    else:
        print_fields(fields.items())


def _print_report(flags: Flags, report: Report, *, is_known: bool) -> None:
    head = report.head.record
    told = {
        "issuer": report.issuer.hex(),
        "network": report.network,
        "leaves": head.size,
        "heads": report.heads,
        **report.counts,
        "root": head.root.hex(),
        "at": date(head.at_ns),
        "compared": report.compared,
    }
    if flags.json:
        print_json(told)
        return
    print_fields(told.items())
    say("The log is one history, and what it says is fair to all.")
    if not is_known:
        say("The root key was taken as it was told: compare it with what you know it to be.")


def _print_fork(flags: Flags, forked: Forked) -> None:
    told = {
        "fork": True,
        "issuer": forked.issuer.hex(),
        "heads": [
            {"size": head.size, "root": head.root.hex(), "at": date(head.at_ns)}
            for head in (forked.first, forked.second)
        ],
        "evidence": forked.evidence.hex(),
    }
    if flags.json:
        print_json(told)
        return
    for head in (forked.first, forked.second):
        click.echo(
            f"signed {date(head.at_ns)}: {counted(head.size, 'leaf', 'leaves')}, "
            f"root {head.root.hex()}"
        )
    click.echo(f"proof {forked.evidence.hex()}")
