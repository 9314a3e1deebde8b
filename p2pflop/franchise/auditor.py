"""What anybody can check of a registry's log: that it is one history, and fair to all.

The leaves are given in order. Of each the auditor checks that it is what a leaf of its kind may be
and signed by the key that was certified then; of all together that attestations are numbered
without a gap, so that none is given in secret, and give everybody the slots and the time that the
published schedule says, when it says so: whoever was given more, or less, would be seen here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.franchise.fees import due_ns, is_in_time, schedule_at
from p2pflop.franchise.issuer import Issuer, check_certificate, open_leaf
from p2pflop.franchise.merkle import MemoryTree, leaf_hash
from p2pflop.franchise.records import (
    Attestation,
    Certificate,
    Decision,
    Leaf,
    LeafKind,
    RefusalReason,
    Revocation,
    Schedule,
)
from p2pflop.market.records import ZERO_HASH, Rejected
from p2pflop.wire import DEFAULT_NETWORK, Sealed, SignedRecord, decode


class Auditor:
    """``issuer`` is a root key. Every method raises VerificationError, which names the leaf."""

    def __init__(self, issuer: bytes, network: str = DEFAULT_NETWORK) -> None:
        self.tree = MemoryTree()
        self.counts: Counter[LeafKind] = Counter()
        self.issuer = Issuer(issuer, network)
        self._certificate: Sealed[Certificate] | None = None
        self._schedules: list[Schedule] = []
        self._serial = 0
        self._serials: dict[bytes, int] = {}
        self._until_ns: dict[bytes, int] = {}
        self._due_ns: dict[bytes, int] = {}
        self._decisions: set[bytes] = set()
        self.last_ns = 0

    def take(self, data: bytes) -> None:
        """Check the next leaf."""
        leaf = open_leaf(data)
        if isinstance(leaf, Rejected):
            self._fail(leaf.reason)
        if leaf.at_ns < self.last_ns:
            self._fail("it is older than the one before it")
        check = {
            LeafKind.CERTIFICATE: self._take_certificate,
            LeafKind.SCHEDULE: self._take_schedule,
            LeafKind.ENROLMENT: self._take_decision,
            LeafKind.REFUSAL: self._take_decision,
            LeafKind.ATTESTATION: self._take_attestation,
            LeafKind.REVOCATION: self._take_revocation,
        }[leaf.kind]
        check(leaf)
        self.last_ns = leaf.at_ns
        self.counts[leaf.kind] += 1
        self.tree.append(leaf_hash(data))

    def _take_certificate(self, leaf: Leaf) -> None:
        checked = check_certificate(leaf.body, self.issuer.key, self.issuer.network)
        if isinstance(checked, Rejected):
            self._fail(checked.reason)
        certificate, known = checked.record, self._certificate
        expected = (1, ZERO_HASH) if known is None else (known.record.number + 1, known.id)
        if (certificate.number, certificate.previous) != expected:
            self._fail("the certificate does not follow the one before it")
        size = certificate.log_size
        if size > len(self.tree) or (certificate.withdraws and size != len(self.tree)):
            self._fail("the certificate states a log of another size")
        if certificate.log_root != (self.tree.root(size) if size else ZERO_HASH):
            self._fail("the certificate states a log with another root")
        learned = self.issuer.learn(leaf.body)
        if isinstance(learned, Rejected):
            self._fail(learned.reason)
        self.issuer, self._certificate = learned, checked

    def _take_schedule(self, leaf: Leaf) -> None:
        schedule = self._open(Schedule, leaf)
        self._check_issuer(schedule.issuer)
        if schedule.number != len(self._schedules) + 1:
            self._fail("the schedule does not follow the one before it")
        if schedule.from_ns < leaf.at_ns:
            self._fail("the schedule reaches into the past")
        self._schedules.append(schedule)

    def _take_decision(self, leaf: Leaf) -> None:
        try:
            decision = decode(Decision, leaf.body)
        except ProtocolError as error:
            self._fail(error.message)
        if leaf.kind == LeafKind.ENROLMENT and decision.reason != RefusalReason(0):
            self._fail("an enrolment has no reason")
        if decision.digest in self._decisions:
            self._fail("it was decided before")
        self._decisions.add(decision.digest)

    def _take_attestation(self, leaf: Leaf) -> None:
        attestation = self._open(Attestation, leaf)
        self._check_issuer(attestation.issuer)
        if attestation.network_id != self.issuer.network:
            self._fail(f"the attestation is for the network {attestation.network_id!r}")
        if attestation.serial != self._serial + 1:
            self._fail(f"attestation {attestation.serial} follows attestation {self._serial}")
        schedule = schedule_at(self._schedules, leaf.at_ns)
        account = attestation.account
        until_ns, due = self._until_ns.get(account, 0), self._due_ns.get(account, 0)
        if schedule is None or not is_in_time(schedule, until_ns, due, attestation, leaf.at_ns):
            self._fail("the attestation gives other slots or time than the schedule does")
        self._serial = attestation.serial
        self._serials[account] = attestation.serial
        self._until_ns[account] = attestation.valid_until_ns
        self._due_ns[account] = due_ns(schedule, attestation.valid_until_ns)

    def _take_revocation(self, leaf: Leaf) -> None:
        revocation = self._open(Revocation, leaf)
        self._check_issuer(revocation.issuer)
        if self._serials.get(revocation.account) != revocation.serial:
            self._fail("the revocation is of an attestation that is not the account's newest")
        self._until_ns.pop(revocation.account, None)
        self._due_ns.pop(revocation.account, None)

    def _open(self, kind: type[SignedRecord], leaf: Leaf) -> Any:
        sealed = self.issuer.open_signed(kind, leaf.body)
        if isinstance(sealed, Rejected):
            self._fail(sealed.reason)
        certificate = self._certificate
        if certificate is None or certificate.record.online_key != sealed.signer:
            self._fail(f"the {kind.KIND} is signed with a key that another has followed")
        valid = certificate.record
        if not valid.valid_from_ns <= leaf.at_ns < valid.valid_until_ns:
            self._fail(f"the {kind.KIND} is signed with a key that was not certified then")
        return sealed.record

    def _check_issuer(self, named: bytes) -> None:
        if named != self.issuer.key:
            self._fail("it names another registry")

    def _fail(self, what: str) -> NoReturn:
        raise VerificationError(f"leaf {len(self.tree)} of the registry's log: {what}")
