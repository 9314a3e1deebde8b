"""What a proof proves: that a leaf stands in a registry's log, and an account is attested.

``check_proof`` verifies the head, the way to it and the certificates; ``check_attestation`` and
``check_revocation`` what is in the leaf. All say in words what is wrong, and none keeps a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.franchise.issuer import Issuer, open_leaf
from p2pflop.franchise.merkle import leaf_hash, root_by_inclusion
from p2pflop.franchise.records import (
    Attestation,
    Head,
    Leaf,
    LeafKind,
    Proof,
    Revocation,
)
from p2pflop.market.records import Rejected
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import Envelope, Sealed, decode

EXPIRED: Final = "attestation has expired"
NOT_YET: Final = "attestation is not valid yet"


@dataclass(frozen=True, slots=True)
class Included:
    """A leaf that stands in the log. ``issuer`` knows the proof's certificates too."""

    leaf: Leaf
    index: int
    head: Sealed[Head]
    issuer: Issuer


@dataclass(frozen=True, slots=True)
class Attested:
    """An attestation that counts, but for the clock and later revocations."""

    attestation: Attestation
    included: Included


@dataclass(frozen=True, slots=True)
class Revoked:
    """A revocation that counts."""

    revocation: Revocation
    included: Included


def check_proof(data: bytes, issuer: Issuer, now_ns: int) -> Included | Rejected:
    """A proof of any leaf."""
    try:
        proof = decode(Proof, data)
    except ProtocolError as error:
        return Rejected(error.message)
    learned = issuer.learn_all(proof.certificates)
    if isinstance(learned, Rejected):
        return learned
    head = learned.check_head(proof.head, now_ns)
    if isinstance(head, Rejected):
        return head
    leaf = open_leaf(proof.leaf)
    if isinstance(leaf, Rejected):
        return leaf
    found = root_by_inclusion(leaf_hash(proof.leaf), proof.index, head.record.size, proof.path)
    if found != head.record.root:
        return Rejected("the proof does not lead to the head: the leaf is not in the log")
    return Included(leaf, proof.index, head, learned)


def check_attestation(
    data: bytes, issuer: Issuer, now_ns: int, account: bytes | None = None
) -> Attested | Rejected:
    """The proof of an attestation of ``account``, of any if not given, that holds at ``now_ns``."""
    included = check_proof(data, issuer, now_ns)
    if isinstance(included, Rejected):
        return included
    if included.leaf.kind != LeafKind.ATTESTATION:
        return Rejected("the leaf is not an attestation")
    sealed = included.issuer.open_signed(Attestation, included.leaf.body)
    if isinstance(sealed, Rejected):
        return _other_network(included.leaf.body, issuer.network) or sealed
    attestation = sealed.record
    if attestation.network_id != issuer.network:
        return _foreign(attestation.network_id)
    if attestation.issuer != issuer.key:
        return Rejected("attestation names another registry")
    if account is not None and attestation.account != account:
        return Rejected("attestation is of another account")
    if attestation.valid_until_ns <= attestation.valid_from_ns:
        return Rejected("attestation ends before it begins")
    if now_ns >= attestation.valid_until_ns:
        return Rejected(EXPIRED)
    if attestation.valid_from_ns > now_ns + CLOCK_TOLERANCE_NS:
        return Rejected(NOT_YET)
    return Attested(attestation, included)


def check_revocation(data: bytes, issuer: Issuer, now_ns: int) -> Revoked | Rejected:
    """The proof of a revocation."""
    included = check_proof(data, issuer, now_ns)
    if isinstance(included, Rejected):
        return included
    if included.leaf.kind != LeafKind.REVOCATION:
        return Rejected("the leaf is not a revocation")
    sealed = included.issuer.open_signed(Revocation, included.leaf.body)
    if isinstance(sealed, Rejected):
        return sealed
    if sealed.record.issuer != issuer.key:
        return Rejected("revocation names another registry")
    return Revoked(sealed.record, included)


def _other_network(body: bytes, network: str) -> Rejected | None:
    """Why a signature did not hold, if it is that the attestation is for another network."""
    try:
        envelope = msgspec.msgpack.decode(body, type=Envelope)
        named = decode(Attestation, envelope.body).network_id
    except (ProtocolError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return _foreign(named) if named != network else None


def _foreign(network: str) -> Rejected:
    return Rejected(f"attestation is for the network {network!r}")
