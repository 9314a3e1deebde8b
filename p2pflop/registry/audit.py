"""``p2pflop registry verify``: all that a registry shows, checked from outside, and remembered.

Every leaf is read and every head, in bounded replies; all roots are computed here. The newest head
is remembered in the home of whoever asks, so that a registry which rewrites its log afterwards is
caught by its own signatures: the evidence (``franchise.forks``) can be handed to anybody.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from p2pflop.errors import (
    ConfigError,
    NodeUnreachableError,
    ProtocolError,
    VerificationError,
)
from p2pflop.franchise.auditor import Auditor
from p2pflop.franchise.enrolments import is_name
from p2pflop.franchise.forks import contradict, make_fork, open_past_head
from p2pflop.franchise.issuer import MAX_CERTIFICATES, Issuer
from p2pflop.franchise.merkle import consistency_path
from p2pflop.franchise.records import MAX_LEAF_BYTES, MAX_RECORD_BYTES, Head, LeafKind
from p2pflop.ids import HASH_BYTES
from p2pflop.market.records import Rejected
from p2pflop.node.home import write_private
from p2pflop.units import counted
from p2pflop.wire import Sealed

MAX_REPLY_BYTES: Final = 4 * 1024 * 1024
MAX_PAGE: Final = 1000
MAX_AUDITED_LEAVES: Final = 4 * 1024 * 1024
TIMEOUT_S: Final = 20.0
REMEMBERED: Final = "registries"
_ADDRESS: Final = re.compile(r"(?:([0-9a-f]{64})@)?(https?://[^\s/@]+(?:/[^\s@]*)?)")

Json = dict[str, Any]


class Source(Protocol):
    """Where a registry answers."""

    def get(self, path: str) -> Json:
        """The JSON object at ``path``. Raises NodeUnreachableError, ProtocolError."""
        ...


class HttpSource:
    """A registry at a URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)

    def get(self, path: str) -> Json:
        """See ``Source``."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: bytes) -> Json:
        """Send ``body``; the JSON object that is answered. Raises ConfigError if it is refused."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: bytes | None) -> Json:
        try:
            with self._client.stream(method, self._url + path, content=body) as response:
                data = bytearray()
                for part in response.iter_bytes(65536):
                    data += part
                    if len(data) > MAX_REPLY_BYTES:
                        raise ProtocolError(f"{path} of the registry is over its limit")
                status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NodeUnreachableError(
                f"the registry at {self._url} does not answer: {error}",
                hint="See that the URL is right and the registry runs; attestations hold without.",
            ) from error
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{path} of the registry is not JSON") from error
        if not isinstance(found, dict):
            raise ProtocolError(f"{path} of the registry is no JSON object")
        if status >= 300:
            told = found.get("error")
            what = told.get("message") if isinstance(told, dict) else None
            raise ConfigError(f"the registry says: {str(what or status)[:300]}")
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """An honest log, as far as can be seen. ``compared`` tells with which remembered head."""

    issuer: bytes
    network: str
    head: Sealed[Head]
    certificates: tuple[bytes, ...]
    counts: dict[str, int]
    heads: int
    compared: str


@dataclass(frozen=True, slots=True)
class Forked:
    """Two histories: ``evidence`` is an encoded ``Fork``."""

    issuer: bytes
    first: Head
    second: Head
    evidence: bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of a registry."""

    head: bytes
    certificates: tuple[bytes, ...]


def parse_address(text: str) -> tuple[bytes | None, str]:
    """Key and URL of ``KEY@URL`` or ``URL``. Raises ConfigError."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text[:120]!r} is not the address of a registry",
            hint="Write it like https://registry.example.org, or with its root key KEY@https://...",
        )
    key, url = found.groups()
    return (bytes.fromhex(key) if key else None), url


def audit(source: Source, key: bytes | None, home: Path | None, now_ns: int) -> Report | Forked:
    """Read and check everything. ``home`` is where heads are remembered, None for nowhere.

    Raises VerificationError for a log that is not what a log may be, ProtocolError for replies
    that are none, NodeUnreachableError.
    """
    issuer = _issuer(source, key)
    head = issuer.check_head(_one(source.get("/v1/head"), "head", MAX_RECORD_BYTES), now_ns)
    if isinstance(head, Rejected):
        raise VerificationError(f"the registry's newest head does not hold: {head.reason}")
    memory = None if home is None else recall(home, issuer.key)
    remembered, compared = _remembered(memory, issuer)
    if remembered is not None and contradict(remembered.record, head.record):
        return _forked(issuer, remembered, head)
    if remembered is not None and remembered.record.size > head.record.size:
        raise VerificationError(
            f"the registry shows {counted(head.record.size, 'leaf', 'leaves')}, and has signed "
            f"a log of {remembered.record.size}: it hides the rest, or lost it",
            hint="Ask its operator. After a backup was restored: p2pflop registry certify "
            "--withdraw.",
        )
    auditor = _read_leaves(source, issuer, head.record.size)
    if auditor.tree.root() != head.record.root:
        raise VerificationError("the registry's leaves are not those that its head is about")
    if not issuer.certificates.keys() <= auditor.issuer.certificates.keys():
        raise VerificationError("the registry uses a certificate that is not in its log")
    if auditor.last_ns > head.record.at_ns:
        raise VerificationError("the registry's head is older than its last leaf")
    heads = [*_read_heads(source, issuer), *([remembered] if remembered else [])]
    for each in heads:
        fork = _compare(issuer, auditor, each, head)
        if fork is not None:
            return fork
    report = Report(
        issuer=issuer.key,
        network=issuer.network,
        head=head,
        certificates=tuple(each.wire for each in issuer.certificates.values()),
        counts={kind.name.lower(): auditor.counts[kind] for kind in LeafKind},
        heads=len(heads),
        compared=compared,
    )
    if home is not None:
        remember(home, issuer.key, Memory(head.wire, report.certificates))
    return report


def recall(home: Path, issuer: bytes) -> Memory | None:
    """What is remembered of a registry. Raises ConfigError if the file is damaged."""
    path = _memory_file(home, issuer)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        certificates = tuple(bytes.fromhex(each) for each in found["certificates"])
        return Memory(bytes.fromhex(found["head"]), certificates)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}",
            hint="It remembers a registry's last head: without it nothing can be compared.",
        ) from error


def remember(home: Path, issuer: bytes, memory: Memory) -> None:
    """Write down the newest head of a registry. Raises ConfigError."""
    path = _memory_file(home, issuer)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = {
        "head": memory.head.hex(),
        "certificates": [each.hex() for each in memory.certificates],
    }
    write_private(path, json.dumps(told, indent=1).encode() + b"\n")


def _memory_file(home: Path, issuer: bytes) -> Path:
    return home / REMEMBERED / f"{issuer.hex()}.json"


def _issuer(source: Source, key: bytes | None) -> Issuer:
    told = source.get("/v1/registry")
    found = _bytes(told.get("issuer"), "issuer", HASH_BYTES)
    if len(found) != HASH_BYTES:
        raise ProtocolError("the registry tells no root key")
    network = told.get("network")
    if not isinstance(network, str) or not is_name(network):
        raise ProtocolError("the registry tells no network")
    if key is not None and found != key:
        raise VerificationError(
            f"the registry's root key is {found.hex()}, not the one that was asked for"
        )
    wires = _list(source.get("/v1/certificates"), "certificates", MAX_RECORD_BYTES)
    if len(wires) > MAX_CERTIFICATES:
        raise ProtocolError(f"the registry tells over {MAX_CERTIFICATES} certificates")
    learned = Issuer(found, network).learn_all(tuple(wires))
    if isinstance(learned, Rejected):
        raise VerificationError(f"the registry's certificates do not hold: {learned.reason}")
    return learned


def _remembered(memory: Memory | None, issuer: Issuer) -> tuple[Sealed[Head] | None, str]:
    if memory is None:
        return None, "nothing was remembered: this is the first look"
    learned = issuer.learn_all(memory.certificates)
    if isinstance(learned, Rejected):
        raise VerificationError(
            f"the registry's certificates contradict those that were remembered: {learned.reason}"
        )
    head = open_past_head(memory.head, learned)
    if isinstance(head, Rejected):
        return None, f"the remembered head does not count: {head.reason}"
    return head, f"a remembered head of {counted(head.record.size, 'leaf', 'leaves')}"


def _read_leaves(source: Source, issuer: Issuer, size: int) -> Auditor:
    if size > MAX_AUDITED_LEAVES:
        raise ProtocolError(f"a log of {size} leaves is over {MAX_AUDITED_LEAVES}")
    auditor = Auditor(issuer.key, issuer.network)
    while len(auditor.tree) < size:
        first = len(auditor.tree)
        page = _list(source.get(f"/v1/leaves?from={first}"), "leaves", MAX_LEAF_BYTES)
        if not page:
            raise VerificationError(f"the registry hides leaf {first} of {size}")
        for leaf in page[: size - first]:
            auditor.take(leaf)
    return auditor


def _read_heads(source: Source, issuer: Issuer) -> list[Sealed[Head]]:
    heads: list[Sealed[Head]] = []
    while len(heads) <= MAX_AUDITED_LEAVES:
        first = heads[-1].record.size + 1 if heads else 0
        page = _list(source.get(f"/v1/heads?from={first}"), "heads", MAX_RECORD_BYTES + 256)
        for wire in page:
            head = open_past_head(wire, issuer)
            if isinstance(head, Rejected):
                raise VerificationError(f"a head of the registry does not hold: {head.reason}")
            if head.record.size < first:
                raise ProtocolError("the registry's heads are not in order")
            first = head.record.size + 1
            heads.append(head)
        if not page:
            break
    return heads


def _compare(
    issuer: Issuer, auditor: Auditor, head: Sealed[Head], newest: Sealed[Head]
) -> Forked | None:
    """The evidence, if ``head`` is not of the history that ``newest`` is of."""
    size = head.record.size
    if contradict(head.record, newest.record):
        return _forked(issuer, head, newest)
    if size > newest.record.size:
        return None  # It was signed since.
    root_then = auditor.tree.root(size)
    if root_then == head.record.root:
        return None
    path = tuple(consistency_path(size, newest.record.size, auditor.tree.node))
    return _forked(issuer, head, newest, root_then, path)


def _forked(
    issuer: Issuer,
    one: Sealed[Head],
    other: Sealed[Head],
    root_then: bytes = bytes(HASH_BYTES),
    path: tuple[bytes, ...] = (),
) -> Forked:
    first, second = sorted((one, other), key=lambda each: each.record.size)
    evidence = make_fork(first, second, issuer, root_then, path)
    return Forked(issuer.key, first.record, second.record, evidence)


def _list(reply: Json, name: str, max_bytes: int) -> list[bytes]:
    found = reply.get(name)
    if not isinstance(found, list) or len(found) > max(MAX_PAGE, MAX_CERTIFICATES):
        raise ProtocolError(f"the registry tells no {name}")
    return [_bytes(each, name, max_bytes) for each in found]


def _one(reply: Json, name: str, max_bytes: int) -> bytes:
    return _bytes(reply.get(name), name, max_bytes + 256)


def _bytes(value: object, name: str, max_bytes: int) -> bytes:
    if not isinstance(value, str) or len(value) > 2 * (max_bytes + 256):
        raise ProtocolError(f"the registry's {name} is none")
    try:
        return bytes.fromhex(value)
    except ValueError as error:
        raise ProtocolError(f"the registry's {name} is not hex digits") from error
