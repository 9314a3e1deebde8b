"""The registry's records, in wire order.

A registry is known by its **root key**, which signs nothing but certificates and may rest where no
network is. A **certificate** names the online key that signs all else for at most 90 days:
schedules of fees, attestations, revocations, and **heads**, each the size and root of a public
append-only log. Whatever the registry decides is a **leaf** of that log. An attestation or a
revocation counts only with a **proof**: its leaf, the way from it to a head, and the head.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, ClassVar, Final

import msgspec

from p2pflop.franchise.merkle import MAX_LEVELS
from p2pflop.market.records import Version
from p2pflop.units import KIB, MAX_NUSD, NS_PER_S
from p2pflop.wire import U63, Ext, Hash, Key, Record, SignedRecord

DAY_NS: Final = 24 * 3600 * NS_PER_S
MAX_CERTIFICATE_NS: Final = 90 * DAY_NS
MIN_PERIOD_NS: Final = DAY_NS
MAX_PERIOD_NS: Final = 10 * 366 * DAY_NS
MAX_SLOTS: Final = 65_536
MAX_PERSONAL_CHARS: Final = 400
MAX_FORM_BYTES: Final = 4 * KIB
MAX_LEAF_BYTES: Final = 2 * KIB
MAX_PROOF_BYTES: Final = 12 * KIB
MAX_FORK_BYTES: Final = 16 * KIB
MAX_CERTIFICATES_A_PROOF: Final = 2
MAX_CERTIFICATES_A_FORK: Final = 8
MAX_RECORD_BYTES: Final = 1400

Slots = Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)]
Serial = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Number = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
Fee = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUSD)]
Period = Annotated[int, msgspec.Meta(ge=MIN_PERIOD_NS, le=MAX_PERIOD_NS)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+\Z")]
Personal = Annotated[str, msgspec.Meta(max_length=MAX_PERSONAL_CHARS)]
Path = Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_LEVELS + 1)]
Wire = Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES + 256)]


class RevocationReason(IntEnum):
    """Why an attestation may be taken back; there is no other reason."""

    UNPAID = 0
    KEY_LOST = 1
    OWN_WISH = 2
    GUIDELINES = 3
    ISSUED_IN_ERROR = 4


class RefusalReason(IntEnum):
    """Why an enrolment may be refused; there is no other reason."""

    UNREACHABLE = 0
    GUIDELINES = 1
    OWN_WISH = 2
    LAW = 3
    FLOOD = 4


class LeafKind(IntEnum):
    """What the body of a leaf is."""

    CERTIFICATE = 0
    SCHEDULE = 1
    ENROLMENT = 2
    REFUSAL = 3
    ATTESTATION = 4
    REVOCATION = 5


class Certificate(SignedRecord, frozen=True):
    """By the root key: ``online_key`` signs for this registry between the two times.

    ``number`` is one more than that of ``previous``, the id of the certificate before, or 1 and
    ``ZERO_HASH``. ``log_size`` and ``log_root`` are the log as it was when this was made. With
    ``withdraws`` the keys before are given up, as after a theft: none of their heads counts.
    """

    KIND: ClassVar[str] = "registry-certificate"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    number: Number
    online_key: Key
    valid_from_ns: U63
    valid_until_ns: U63
    previous: Hash
    log_size: U63
    log_root: Hash
    withdraws: bool
    ext: Ext = ()


class CertificateRequest(Record, frozen=True):
    """What an online machine hands to whoever holds the root key: all but the times."""

    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    issuer: Key
    network_id: Name
    number: Number
    online_key: Key
    previous: Hash
    log_size: U63
    log_root: Hash
    withdraws: bool


class Head(SignedRecord, frozen=True):
    """The log of ``issuer`` (a root key) has ``size`` leaves at ``at_ns``, and this root."""

    KIND: ClassVar[str] = "log-head"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    issuer: Key
    size: Serial
    root: Hash
    at_ns: U63
    ext: Ext = ()


class Schedule(SignedRecord, frozen=True):
    """What an attestation costs, for everybody alike: ``fee_nusd`` for ``period_ns``.

    It holds from ``from_ns`` on, until one with a higher number does. ``max_slots`` is what an
    account may offer at once over all of its nodes; ``guidelines`` names the version of the rules.
    """

    KIND: ClassVar[str] = "fee-schedule"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    issuer: Key
    number: Number
    fee_nusd: Fee
    period_ns: Period
    max_slots: Slots
    from_ns: U63
    guidelines: Name
    ext: Ext = ()


class Attestation(SignedRecord, frozen=True):
    """``account`` has paid its franchise fee. Of an account's the highest serial counts."""

    KIND: ClassVar[str] = "attestation"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    issuer: Key
    network_id: Name
    account: Key
    max_slots: Slots
    valid_from_ns: U63
    valid_until_ns: U63
    serial: Serial
    ext: Ext = ()


class Revocation(SignedRecord, frozen=True):
    """No attestation of ``account`` up to ``serial`` counts any more."""

    KIND: ClassVar[str] = "revocation"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    issuer: Key
    account: Key
    serial: Serial
    reason: RevocationReason
    at_ns: U63
    ext: Ext = ()


class Enrolment(SignedRecord, frozen=True):
    """By an account: it asks ``issuer`` to be enrolled and agrees to ``guidelines``.

    ``personal`` is the hash of a ``PersonalData`` that travels beside it and can be erased alone.
    """

    KIND: ClassVar[str] = "enrolment"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    issuer: Key
    guidelines: Name
    at_ns: U63
    personal: Hash
    ext: Ext = ()


class PersonalData(Record, frozen=True):
    """How to reach a person, and where the machines are. ``salt`` keeps its hash from guessing."""

    version: Version
    salt: Hash
    contact: Personal
    place: Personal


class EnrolmentForm(Record, frozen=True):
    """What an applicant sends: an ``Enrolment`` in its envelope, and the personal data."""

    MAX_BYTES: ClassVar[int] = MAX_FORM_BYTES

    version: Version
    enrolment: Wire
    personal: PersonalData


class Decision(Record, frozen=True):
    """The body of an ENROLMENT or REFUSAL leaf: ``digest`` is BLAKE3(salt || enrolment's id).

    The salt is told to the applicant alone. ``reason`` is 0 of an enrolment.
    """

    version: Version
    digest: Hash
    reason: RefusalReason


class Leaf(Record, frozen=True):
    """A line of the log: an envelope, or an encoded ``Decision``, by ``kind``."""

    MAX_BYTES: ClassVar[int] = MAX_LEAF_BYTES

    version: Version
    kind: LeafKind
    at_ns: U63
    body: Wire


class Proof(Record, frozen=True):
    """That ``leaf``, encoded, is number ``index`` of the log that ``head`` names.

    ``certificates`` are those of the keys that signed the head and what is in the leaf.
    """

    MAX_BYTES: ClassVar[int] = MAX_PROOF_BYTES

    version: Version
    leaf: Annotated[bytes, msgspec.Meta(max_length=MAX_LEAF_BYTES)]
    index: U63
    path: Path
    head: Wire
    certificates: Annotated[tuple[Wire, ...], msgspec.Meta(max_length=MAX_CERTIFICATES_A_PROOF)]


class Fork(Record, frozen=True):
    """Two heads of one registry that cannot both be true: see ``forks.check_fork``."""

    MAX_BYTES: ClassVar[int] = MAX_FORK_BYTES

    version: Version
    first: Wire
    second: Wire
    root_then: Hash
    path: Path
    certificates: Annotated[tuple[Wire, ...], msgspec.Meta(max_length=MAX_CERTIFICATES_A_FORK)]
