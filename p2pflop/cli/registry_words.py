"""What the registry's commands share: where it is, how leaves and times are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from p2pflop.cli.output import Flags
from p2pflop.errors import ConfigError
from p2pflop.units import NS_PER_S, counted

if TYPE_CHECKING:
    from p2pflop.registry.office import Office

MAX_FILE_BYTES: Final = 64 * 1024

T = TypeVar("T")


def home_of(flags: Flags) -> Path:
    """The home that was chosen."""
    from p2pflop.node.config import default_home

    return flags.home or default_home()


def folder_of_flags(flags: Flags) -> Path:
    """The folder of the registry in the chosen home."""
    from p2pflop.registry.home import folder_of

    return folder_of(home_of(flags))


def run_office(flags: Flags, work: Callable[[Office], Awaitable[T]]) -> T:
    """Open the registry and do ``work``. Raises ConfigError if there is none."""
    import trio

    from p2pflop.registry.office import open_office

    async def main() -> T:
        async with open_office(folder_of_flags(flags)) as office:
            return await work(office)

    return trio.run(main)


def date(at_ns: int) -> str:
    """``2026-11-26 03:58:41`` in UTC; nothing for 0, and a far time as nanoseconds."""
    if not at_ns:
        return ""
    try:
        moment = datetime.fromtimestamp(at_ns // NS_PER_S, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{at_ns} ns"
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def read_bounded(path: Path) -> bytes:
    """A small file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is over {MAX_FILE_BYTES} bytes")
    return data


def leaf_row(number: int, data: bytes) -> dict[str, Any]:
    """A leaf of our own log, in words."""
    from p2pflop.franchise.records import (
        Attestation,
        Certificate,
        Decision,
        Leaf,
        LeafKind,
        RefusalReason,
        Revocation,
        RevocationReason,
        Schedule,
    )
    from p2pflop.registry.draft import record_of
    from p2pflop.units import format_usd
    from p2pflop.wire import decode

    leaf = decode(Leaf, data)
    what: str
    match leaf.kind:
        case LeafKind.CERTIFICATE:
            certificate = record_of(Certificate, leaf.body)
            what = f"online key {certificate.number} until {date(certificate.valid_until_ns)}"
            what += ", the ones before withdrawn" if certificate.withdraws else ""
        case LeafKind.SCHEDULE:
            schedule = record_of(Schedule, leaf.body)
            fee, slots = format_usd(schedule.fee_nusd), schedule.max_slots
            what = f"{fee} for {counted(slots, 'slot')} from {date(schedule.from_ns)}"
        case LeafKind.ATTESTATION:
            attestation = record_of(Attestation, leaf.body)
            until = date(attestation.valid_until_ns)
            what = f"{attestation.serial}: {attestation.account.hex()} until {until}"
        case LeafKind.REVOCATION:
            revocation = record_of(Revocation, leaf.body)
            reason = RevocationReason(revocation.reason).name.lower()
            what = f"{revocation.account.hex()} up to {revocation.serial}: {reason}"
        case _:
            decision = decode(Decision, leaf.body)
            what = decision.digest.hex()
            if leaf.kind == LeafKind.REFUSAL:
                what += f": {RefusalReason(decision.reason).name.lower()}"
    return {"number": number, "at_ns": leaf.at_ns, "kind": leaf.kind.name.lower(), "what": what}
