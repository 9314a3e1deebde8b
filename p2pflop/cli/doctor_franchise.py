"""``p2pflop doctor --franchise``: the guidelines that a program can check, one finding each.

They are those of docs/franchise.md; what a program cannot check stands there, too.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from p2pflop.cli.doctor import SAFE_LEVEL, Finding
from p2pflop.errors import P2PFlopError
from p2pflop.units import GIB, NS_PER_S, counted, format_bytes

if TYPE_CHECKING:
    from p2pflop.client import Client

MIN_DAYS: Final = 14
MAX_CLOCK_S: Final = 5
MIN_FREE_BYTES: Final = 10 * GIB
MIN_MEMORY_BYTES: Final = GIB
MAX_CLAIM_NS: Final = 7 * 24 * 3600 * NS_PER_S
ANSWER_S: Final = 10.0
PRIVATE: Final = ("account.pem", "node.pem", "delegation.bin", "token")
_IP: Final = re.compile(r"/ip[46]/([^/]+)/")


def guidelines(client: Client) -> list[Finding]:
    """How the node of that home keeps each of them; one finding alone if no node runs."""
    try:
        status, told = client.status(), client.doctor()
        peers, payments = client.peers(), client.payments()
    except P2PFlopError as error:
        return [_found("node", [error.message], "", error.hint or "Start it: p2pflop node.")]
    franchise = status.get("franchise") or {}
    registries = [each for each in franchise.get("registries", ()) if each.get("url")]
    return [
        _attestation(franchise, registries),
        _registries(registries),
        _found(
            "sale",
            [] if status.get("selling") else ["the node sells nothing"],
            "the node sells",
            "Start it with --ask USD; p2pflop quote tells what a PFLOP costs you.",
        ),
        _sandbox(status),
        _network(status, peers),
        _clock(registries),
        _keys(client.home),
        _room(told, status),
        _books(franchise),
        _claims(payments),
    ]


def _found(name: str, faults: list[str], value: str, hint: str) -> Finding:
    return Finding(f"guideline {name}", not faults, "; ".join(faults) or value, hint)


def _attestation(franchise: dict[str, Any], registries: list[dict[str, Any]]) -> Finding:
    attestation = franchise.get("attestation")
    hint = "Pay the next fee to the registry's operator; p2pflop registry enroll tells which."
    if not registries:
        fault = "the node trusts no registry"
        return _found("attestation", [fault], "", "Start it with --registry KEY@URL --enroll.")
    if attestation is None:
        waits = [f"it waits for {each['waits_for']}" for each in registries if each["waits_for"]]
        return _found("attestation", ["the account is not attested", *waits], "", hint)
    days, slots = int(attestation["days_left"]), attestation["max_slots"]
    value = f"{counted(days, 'day')} left, {counted(slots, 'slot')}"
    faults = [f"only {value}"] if days < MIN_DAYS else []
    return _found("attestation", faults, value, hint)


def _registries(registries: list[dict[str, Any]]) -> Finding:
    faults = []
    for each in registries:
        name = f"registry {str(each['issuer'])[:16]}"
        if not each["trusted"]:
            faults.append(f"{name} told two histories")
        elif each["trouble"]:
            faults.append(f"{name}: {each['trouble']}")
    return _found(
        "registry",
        faults,
        f"{len(registries)} answer",
        "Until attestations expire nothing changes; ask its operator.",
    )


def _sandbox(status: dict[str, Any]) -> Finding:
    level = int(status.get("sandbox_level", 0))
    faults = [f"level {level}: strangers' jobs are refused"] if level < SAFE_LEVEL else []
    return _found("sandbox", faults, f"level {level}", "Use Linux 5.13+ with user namespaces.")


def _network(status: dict[str, Any], peers: list[dict[str, Any]]) -> Finding:
    addresses = [str(each) for each in status.get("addresses", ())]
    faults = []
    if not any(_is_outside(address) for address in addresses):
        faults.append("it listens on this machine alone")
    if not any(peer.get("inbound") for peer in peers):
        faults.append(f"no peer of {len(peers)} has dialled it")
    return _found(
        "network",
        faults,
        f"{counted(len(peers), 'peer')}, some of which have dialled it",
        "Open TCP port 7421 in the firewall and forward it; --listen says where it listens.",
    )


def _is_outside(address: str) -> bool:
    found = _IP.match(address)
    try:
        return found is not None and not ipaddress.ip_address(found[1]).is_loopback
    except ValueError:
        return False


def _clock(registries: list[dict[str, Any]]) -> Finding:
    offsets = [offset for each in registries for offset in _offsets(str(each["url"]))]
    if not offsets:
        return _found("clock", [], "no registry answers to compare with", "")
    offset_s = min(offsets, key=abs)
    value = f"{abs(offset_s):.0f} s {'ahead of' if offset_s > 0 else 'behind'} a registry's"
    faults = [value] if abs(offset_s) > MAX_CLOCK_S else []
    return _found("clock", faults, value, "Have it set by NTP: timedatectl set-ntp true.")


def _offsets(url: str) -> Iterator[float]:
    """How many seconds the clock here is ahead of a registry's, if it answers."""
    before = time.time()
    try:
        answer = httpx.get(f"{url}/v1/head", timeout=ANSWER_S, trust_env=False)
        moment = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (httpx.HTTPError, KeyError, ValueError, TypeError):
        return
    # It is told in whole seconds, from some time between the request and its answer.
    yield (before + time.time()) / 2 - (moment + 0.5)


def _keys(home: Path) -> Finding:
    faults = []
    for name in (".", *PRIVATE):
        path = home / name
        if path.exists() and path.stat().st_mode & 0o077:
            faults.append(f"others can read {path}")
    return _found("keys", faults, "of this user alone", f"chmod -R go= {home}")


def _room(told: dict[str, Any], status: dict[str, Any]) -> Finding:
    free, memory = int(told.get("free_bytes", 0)), int(status.get("memory_bytes", 0))
    faults = []
    if free < MIN_FREE_BYTES:
        faults.append(f"only {format_bytes(free)} of disk are free")
    if memory < MIN_MEMORY_BYTES:
        faults.append(f"only {format_bytes(memory)} of memory are for jobs")
    value = f"{format_bytes(free)} of disk, {format_bytes(memory)} of memory"
    hint = f"At least {format_bytes(MIN_FREE_BYTES)} and {format_bytes(MIN_MEMORY_BYTES)}."
    return _found("room", faults, value, hint)


def _books(franchise: dict[str, Any]) -> Finding:
    left_out = franchise.get("left_out_by", ())
    faults = [f"{each['peer']} leaves its asks out: {each['reason']}" for each in left_out[:3]]
    value = "no strict peer leaves its asks out"
    return _found("books", faults, value, "Enrol where the registries that they trust are.")


def _claims(payments: list[dict[str, Any]]) -> Finding:
    now_ns = time.time_ns()
    old = [
        str(payment["id"])[:12]
        for payment in payments
        if payment["side"] == "received"
        and payment["state"] == "claimed"
        and int(payment["at_ns"]) + MAX_CLAIM_NS < now_ns
    ]
    faults = [f"unanswered for a week: {', '.join(old[:3])}"] if old else []
    hint = "Look whether the money came, then p2pflop received ID or p2pflop refuse ID."
    return _found("payments", faults, "every claim was answered within a week", hint)
