"""A registry in memory that signs whatever it is told to. For tests and benches."""

from __future__ import annotations

from typing import Any, Final

from p2pflop.franchise.issuer import Issuer, encode_leaf, sign_certificate
from p2pflop.franchise.merkle import MemoryTree, consistency_path, inclusion_path, leaf_hash
from p2pflop.franchise.records import (
    DAY_NS,
    Attestation,
    Certificate,
    CertificateRequest,
    Head,
    LeafKind,
    Proof,
    Revocation,
    RevocationReason,
    Schedule,
)
from p2pflop.keys import PrivateKey
from p2pflop.market.records import ZERO_HASH, Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.units import NUSD_PER_USD
from p2pflop.wire import DEFAULT_NETWORK, Sealed, encode, seal

YEAR_NS: Final = 365 * DAY_NS
SLOTS: Final = 8
GUIDELINES: Final = "2026-1"


def key(number: int) -> PrivateKey:
    """Some key."""
    return PrivateKey(number.to_bytes(32, "big"))


class SampleRegistry:
    """Its log is what was appended, its times are given or ``NOW_NS``."""

    def __init__(self, number: int = 900, network: str = DEFAULT_NETWORK) -> None:
        self.root = key(number)
        self.online = key(number + 1)
        self.network = network
        self.tree = MemoryTree()
        self.leaves: list[bytes] = []
        self.certificates: list[Sealed[Certificate]] = []
        self.serial = 0
        self.certify(self.online)

    @property
    def issuer(self) -> Issuer:
        """The root key and all certificates."""
        learned = Issuer(self.root.public_key, self.network).learn_all(
            tuple(certificate.wire for certificate in self.certificates)
        )
        if isinstance(learned, Rejected):
            raise ValueError(learned.reason)
        return learned

    def certify(
        self, online: PrivateKey, *, from_ns: int = NOW_NS - DAY_NS, withdraws: bool = False
    ) -> Sealed[Certificate]:
        """Certify the next online key for 90 days, and use it."""
        self.online = online
        size = len(self.tree)
        request = CertificateRequest(
            version=1,
            issuer=self.root.public_key,
            network_id=self.network,
            number=len(self.certificates) + 1,
            online_key=online.public_key,
            previous=self.certificates[-1].id if self.certificates else ZERO_HASH,
            log_size=size,
            log_root=self.tree.root() if size else ZERO_HASH,
            withdraws=withdraws,
        )
        certificate = sign_certificate(self.root, request, from_ns, from_ns + 90 * DAY_NS)
        self.certificates.append(certificate)
        self.append(LeafKind.CERTIFICATE, certificate.wire)
        return certificate

    def append(self, kind: LeafKind, body: bytes, at_ns: int = NOW_NS) -> int:
        """Append a leaf; its index."""
        leaf = encode_leaf(kind, at_ns, body)
        self.leaves.append(leaf)
        self.tree.append(leaf_hash(leaf))
        return len(self.leaves) - 1

    def publish(self, **changes: Any) -> int:
        """Append a schedule: $1 a year for 8 slots unless ``changes`` say otherwise."""
        fields: dict[str, Any] = {
            "version": 1,
            "issuer": self.root.public_key,
            "number": 1,
            "fee_nusd": NUSD_PER_USD,
            "period_ns": YEAR_NS,
            "max_slots": SLOTS,
            "from_ns": NOW_NS,
            "guidelines": GUIDELINES,
            **changes,
        }
        return self.append(LeafKind.SCHEDULE, self._signed(Schedule(**fields)))

    def attest(self, account: bytes, signer: PrivateKey | None = None, **changes: Any) -> int:
        """Append an attestation for a year."""
        self.serial += 1
        fields: dict[str, Any] = {
            "version": 1,
            "issuer": self.root.public_key,
            "network_id": self.network,
            "account": account,
            "max_slots": SLOTS,
            "valid_from_ns": NOW_NS,
            "valid_until_ns": NOW_NS + YEAR_NS,
            "serial": self.serial,
            **changes,
        }
        return self.append(LeafKind.ATTESTATION, self._signed(Attestation(**fields), signer))

    def revoke(self, account: bytes, serial: int) -> int:
        """Append a revocation."""
        record = Revocation(
            1, self.root.public_key, account, serial, RevocationReason.UNPAID, NOW_NS
        )
        return self.append(LeafKind.REVOCATION, self._signed(record))

    def head(self, size: int | None = None, at_ns: int = NOW_NS) -> bytes:
        """A signed head."""
        size = len(self.tree) if size is None else size
        return self._signed(Head(1, self.root.public_key, size, self.tree.root(size), at_ns))

    def prove(self, index: int, head: bytes | None = None, **changes: Any) -> bytes:
        """The proof of a leaf, under the head of all leaves."""
        fields: dict[str, Any] = {
            "version": 1,
            "leaf": self.leaves[index],
            "index": index,
            "path": tuple(inclusion_path(index, len(self.tree), self.tree.node)),
            "head": head or self.head(),
            "certificates": tuple(each.wire for each in self.certificates[-2:]),
            **changes,
        }
        return encode(Proof(**fields))

    def consistency(self, first: int) -> tuple[bytes, ...]:
        """That the log began with its first leaves."""
        return tuple(consistency_path(first, len(self.tree), self.tree.node))

    def _signed(self, record: Any, signer: PrivateKey | None = None) -> bytes:
        return seal(record, signer or self.online, self.network).wire
