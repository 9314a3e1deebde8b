"""A ``SampleRegistry`` behind the seam by which a node asks one: no port, no process."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from p2pflop.errors import ProviderError
from p2pflop.franchise.enrolments import check_form
from p2pflop.franchise.issuer import open_leaf
from p2pflop.franchise.merkle import consistency_path
from p2pflop.franchise.records import Attestation, LeafKind, Revocation
from p2pflop.franchise.samples import GUIDELINES, SampleRegistry
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.wire import open_sealed

PAGE = 100


class SampleFetch:
    """Answers as the real service does. ``down`` does not answer, ``spoilt`` answers just that."""

    def __init__(self, registry: SampleRegistry) -> None:
        self.registry = registry
        self.down = False
        self.spoilt: tuple[int, bytes] | None = None
        self.asked: list[str] = []
        self.at_ns = NOW_NS
        self.applied: dict[str, bytes] = {}
        self.enrolled: set[str] = set()
        self.fee_nusd = 10**9

    @property
    def root(self) -> bytes:
        """The root key."""
        return self.registry.root.public_key

    @property
    def address(self) -> str:
        """As ``--registry`` takes it."""
        return f"{self.root.hex()}@http://registry.test"

    def open(self, _url: str) -> SampleFetch:
        """What a node is given to reach it."""
        return self

    def head(self) -> bytes:
        """The newest head."""
        return self.registry.head(at_ns=self.at_ns)

    async def __call__(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        self.asked.append(path)
        if self.down:
            raise ProviderError("nobody answers")
        if self.spoilt is not None:
            return self.spoilt
        found = self._answer(path, body)
        return (404, b"{}") if found is None else (200, json.dumps(found).encode())

    def _answer(self, path: str, body: bytes | None) -> dict[str, Any] | None:
        url = urlsplit(path)
        query = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
        registry = self.registry
        match url.path.split("/")[2:]:
            case ["registry"]:
                schedule = {"fee_nusd": self.fee_nusd, "guidelines": GUIDELINES}
                named = {"issuer": self.root.hex(), "network": registry.network}
                return {**named, "schedule": schedule}
            case ["certificates"]:
                return {"certificates": [each.wire.hex() for each in registry.certificates]}
            case ["head"]:
                return {"head": self.head().hex()}
            case ["heads"]:
                sizes = range(max(1, query["from"]), len(registry.tree) + 1)
                return {"heads": [registry.head(n, self.at_ns).hex() for n in sizes][:PAGE]}
            case ["consistency"]:
                if query["second"] > len(registry.tree):
                    return None
                path_ = consistency_path(query["first"], query["second"], registry.tree.node)
                return {"path": [each.hex() for each in path_]}
            case ["attestations"]:
                return self._page(LeafKind.ATTESTATION, lambda n, s: s > query["after"])
            case ["revocations"]:
                return self._page(LeafKind.REVOCATION, lambda n, s: n >= query["from"])
        return self._answer_one(url.path.split("/")[2:], body)

    def _answer_one(self, path: list[str], body: bytes | None) -> dict[str, Any] | None:
        """About one account."""
        match path:
            case ["attestations", account]:
                return self._standing(account)
            case ["enrolments"] if body is not None:
                return self._apply(body)
            case ["enrolments", name] if name in self.applied:
                return {**self._view(self.applied[name]), "id": None}
        return None

    def _page(self, kind: LeafKind, wanted: Any) -> dict[str, Any]:
        found = []
        for number in range(len(self.registry.leaves)):
            serial = self._serial(number, kind)
            if serial and wanted(number, serial):
                found.append((number, serial))
        page = found[:PAGE]
        proofs = [self.registry.prove(number, self.head()).hex() for number, _ in page]
        last = page[-1][0 if kind is LeafKind.REVOCATION else 1] if page else 0
        return {"proofs": proofs, "last": last}

    def _serial(self, number: int, kind: LeafKind) -> int:
        leaf = open_leaf(self.registry.leaves[number])
        assert not isinstance(leaf, Rejected)
        if leaf.kind != kind:
            return 0
        record = Attestation if kind is LeafKind.ATTESTATION else Revocation
        return open_sealed(record, leaf.body, self.registry.network).record.serial  # type: ignore[attr-defined, no-any-return]

    def _standing(self, account: str) -> dict[str, Any] | None:
        key = bytes.fromhex(account)
        serials = {
            serial: number
            for number in range(len(self.registry.leaves))
            if (serial := self._serial(number, LeafKind.ATTESTATION))
            and self._account(number) == key
        }
        if serials:
            proof = self.registry.prove(serials[max(serials)], self.head())
            return {"state": "attested", "waits_for": "", "proof": proof.hex()}
        return self._view(key) if key in self.applied.values() else None

    def _account(self, number: int) -> bytes:
        leaf = open_leaf(self.registry.leaves[number])
        assert not isinstance(leaf, Rejected)
        return open_sealed(Attestation, leaf.body, self.registry.network).record.account

    def _view(self, account: bytes) -> dict[str, Any]:
        if account.hex() not in self.enrolled:
            return {"state": "waiting", "waits_for": "the operator's approval", "proof": None}
        return {
            "state": "enrolled",
            "waits_for": "the fee",
            "missing_nusd": self.fee_nusd,
            "proof": None,
        }

    def _apply(self, form: bytes) -> dict[str, Any]:
        checked = check_form(form, self.root, GUIDELINES, NOW_NS, self.registry.network)
        assert not isinstance(checked, Rejected), checked
        name = checked.enrolment.id.hex()
        self.applied[name] = checked.account
        return {**self._view(checked.account), "id": name}
