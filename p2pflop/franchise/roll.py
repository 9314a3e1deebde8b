"""The roll: which accounts the registries that a node trusts attest, now.

A node trusts none, one or several registries. An account is attested if one of them says so; what
another has revoked, or never knew, takes nothing from that. Of one registry's attestations of an
account the highest serial counts, if no revocation covers it. Proofs are verified when they come
in; ``is_attested`` is a look-up. A ranking asks about each of its asks, and looks in the set of all
that are ``attested``, which is kept until something is told, begins or ends.

Heads are remembered: the newest of each registry. Two that contradict each other are evidence
(``forks``), which **convicts** their registry: nothing that it says counts any more, until
somebody forgives it. Evidence of which a head is older than that counts no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.franchise.forks import check_fork, contradict, make_fork
from p2pflop.franchise.issuer import FUTURE, WITHDRAWN, Issuer
from p2pflop.franchise.proofs import (
    EXPIRED,
    NOT_YET,
    Included,
    check_attestation,
    check_revocation,
)
from p2pflop.franchise.records import Fork, Head, Proof
from p2pflop.market.records import Rejected
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import DEFAULT_NETWORK, Sealed, decode, reopen

MAX_ISSUERS: Final = 16
MAX_ACCOUNTS: Final = 65_536
"""Of one registry, that are held, and likewise those that it revoked."""
FOREVER_NS: Final = 2**63

CONVICTED: Final = "the registry told two histories, and is not trusted any more"
FORGIVEN: Final = "the registry was forgiven this"
KNOWN: Final = "it is known already"
OLDER: Final = "attestation is older than the one that is known"
REVOKED: Final = "attestation was revoked"
UNTRUSTED: Final = "the registry is not trusted here"
FULL: Final = "too many accounts of one registry are held already"
HONEST: Final = frozenset(
    {
        CONVICTED,
        FORGIVEN,
        KNOWN,
        OLDER,
        REVOKED,
        UNTRUSTED,
        FULL,
        EXPIRED,
        NOT_YET,
        FUTURE,
        WITHDRAWN,
    }
)
"""Why something may be refused that was right for whoever tells it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What one registry says of an account. Times are nanoseconds of Unix time."""

    issuer: bytes
    account: bytes
    serial: int
    max_slots: int
    valid_from_ns: int
    valid_until_ns: int
    head_signer: bytes
    proof: bytes

    def holds(self, now_ns: int) -> bool:
        """Whether it is for now; a registry's clock may be a little ahead."""
        return self.valid_from_ns - CLOCK_TOLERANCE_NS <= now_ns < self.valid_until_ns


@dataclass(frozen=True, slots=True)
class Taken:
    """What one registry has taken back of an account: attestations up to ``serial``."""

    issuer: bytes
    account: bytes
    serial: int
    head_signer: bytes
    proof: bytes


@dataclass(slots=True)
class _Register:
    issuer: Issuer
    standings: dict[bytes, Standing] = field(default_factory=dict)
    revoked: dict[bytes, Taken] = field(default_factory=dict)
    head: Sealed[Head] | None = None
    fork: bytes | None = None
    forgiven_ns: int = -1

    def revoked_serial(self, account: bytes) -> int:
        taken = self.revoked.get(account)
        return 0 if taken is None else taken.serial


@dataclass(frozen=True, slots=True)
class _Moment:
    """The ``accounts`` that are attested from ``since_ns`` until ``until_ns``, in which nothing
    begins or ends."""

    accounts: frozenset[bytes]
    since_ns: int
    until_ns: int


_NEVER: Final = _Moment(frozenset(), 0, 0)


class Roll:
    """``issuers`` are the root keys of the registries that this node trusts."""

    def __init__(self, issuers: Iterable[bytes], network: str = DEFAULT_NETWORK) -> None:
        self._network = network
        self._registers = {key: _Register(Issuer(key, network)) for key in issuers}
        if len(self._registers) > MAX_ISSUERS:
            raise ValueError(f"over {MAX_ISSUERS} registries")
        self._moment = _NEVER

    def is_attested(self, account: bytes, now_ns: int) -> bool:
        """Whether any trusted registry attests the account at that time."""
        for register in self._registers.values():
            standing = register.standings.get(account)
            if standing is not None and standing.holds(now_ns) and register.fork is None:
                return True
        return False

    def attested(self, now_ns: int) -> frozenset[bytes]:
        """All accounts that any trusted registry attests at that time."""
        if not self._moment.since_ns <= now_ns < self._moment.until_ns:
            self._moment = self._moment_at(now_ns)
        return self._moment.accounts

    def standing(self, account: bytes, now_ns: int) -> Standing | None:
        """Of what holds for the account now, that which allows most, then longest."""
        registers = self._registers.values()
        found = [each.standings.get(account) for each in registers if each.fork is None]
        return max(
            (each for each in found if each is not None and each.holds(now_ns)),
            key=lambda standing: (standing.max_slots, standing.valid_until_ns),
            default=None,
        )

    @property
    def issuers(self) -> tuple[bytes, ...]:
        """The root keys of the trusted registries, convicted ones too."""
        return tuple(self._registers)

    def standings(self, key: bytes) -> Iterator[Standing]:
        """What is held of one registry, valid now or not."""
        return iter(self._registers[key].standings.values())

    def standing_by(self, key: bytes, account: bytes) -> Standing | None:
        """What is held of one registry about an account, valid now or not."""
        return self._registers[key].standings.get(account)

    def taken(self, key: bytes, account: bytes) -> Taken | None:
        """What that registry has taken back of an account."""
        return self._registers[key].revoked.get(account)

    def issuer(self, key: bytes) -> Issuer:
        """A trusted registry with the certificates known of it. Raises KeyError if it is not."""
        return self._registers[key].issuer

    def head(self, key: bytes) -> Sealed[Head] | None:
        """The head of the largest log that was seen of that registry."""
        return self._registers[key].head

    def fork(self, key: bytes) -> bytes | None:
        """Evidence (an encoded ``Fork``) that the registry told two histories; None if none."""
        return self._registers[key].fork

    def admit(self, proof: bytes, now_ns: int) -> Standing | Rejected:
        """Take up the proof of an attestation, from anywhere.

        An older serial than that which is known is refused, and so is one that was revoked. Of
        two proofs of one attestation the first is kept.
        """
        register = self._register_of(proof)
        if isinstance(register, Rejected):
            return register
        attested = check_attestation(proof, register.issuer, now_ns)
        if isinstance(attested, Rejected):
            return attested
        self._learn(register, attested.included)
        record = attested.attestation
        if register.fork is not None:
            return Rejected(CONVICTED)
        if record.serial <= register.revoked_serial(record.account):
            return Rejected(REVOKED)
        known = register.standings.get(record.account)
        if known is not None and record.serial < known.serial:
            return Rejected(OLDER)
        if known is not None and record.serial == known.serial:
            return known
        if known is None and len(register.standings) >= MAX_ACCOUNTS:
            return Rejected(FULL)
        standing = Standing(
            issuer=record.issuer,
            account=record.account,
            serial=record.serial,
            max_slots=record.max_slots,
            valid_from_ns=record.valid_from_ns,
            valid_until_ns=record.valid_until_ns,
            head_signer=attested.included.head.signer,
            proof=proof,
        )
        register.standings[record.account] = standing
        self._moment = _NEVER
        return standing

    def revoke(self, proof: bytes, now_ns: int) -> Taken | Rejected:
        """Take up the proof of a revocation; one that says nothing new is refused."""
        register = self._register_of(proof)
        if isinstance(register, Rejected):
            return register
        revoked = check_revocation(proof, register.issuer, now_ns)
        if isinstance(revoked, Rejected):
            return revoked
        self._learn(register, revoked.included)
        record = revoked.revocation
        if register.fork is not None:
            return Rejected(CONVICTED)
        if record.serial <= register.revoked_serial(record.account):
            return Rejected(KNOWN)
        if record.account not in register.revoked and len(register.revoked) >= MAX_ACCOUNTS:
            return Rejected(FULL)
        signer = revoked.included.head.signer
        taken = Taken(record.issuer, record.account, record.serial, signer, proof)
        register.revoked[record.account] = taken
        known = register.standings.get(record.account)
        if known is not None and known.serial <= record.serial:
            del register.standings[record.account]
            self._moment = _NEVER
        return taken

    def convict(self, fork: bytes) -> bytes | Rejected:
        """Take up evidence (an encoded ``Fork``) from anywhere; the key of the registry."""
        try:
            head = reopen(Head, decode(Fork, fork).first, self._network)
        except (ProtocolError, VerificationError) as error:
            return Rejected(f"evidence: {error.message}")
        register = self._registers.get(head.record.issuer)
        if register is None:
            return Rejected(UNTRUSTED)
        if register.fork is not None:
            return Rejected(KNOWN)
        heads = check_fork(fork, register.issuer)
        if isinstance(heads, Rejected):
            return heads
        if min(each.at_ns for each in heads) <= register.forgiven_ns:
            return Rejected(FORGIVEN)
        register.fork, self._moment = fork, _NEVER
        return register.issuer.key

    def forgive(self, key: bytes, now_ns: int) -> None:
        """Trust a registry again from now on, whatever heads it signed before."""
        register = self._registers[key]
        register.forgiven_ns = now_ns
        register.fork = register.head = None
        self._moment = _NEVER

    def learn(self, key: bytes, certificates: tuple[bytes, ...]) -> Rejected | None:
        """Take up certificates of a registry; None if they are good."""
        register = self._registers.get(key)
        if register is None:
            return Rejected(UNTRUSTED)
        learned = register.issuer.learn_all(certificates)
        if isinstance(learned, Rejected):
            return learned
        self._update(register, learned)
        return None

    def remember(self, key: bytes, head: bytes, now_ns: int) -> Rejected | None:
        """Compare a head with what is remembered; None if it is good."""
        register = self._registers.get(key)
        if register is None:
            return Rejected(UNTRUSTED)
        checked = register.issuer.check_head(head, now_ns)
        if isinstance(checked, Rejected):
            return checked
        self._see(register, checked)
        return None

    def expire(self, now_ns: int) -> list[bytes]:
        """Forget what has expired; the accounts."""
        gone = []
        for register in self._registers.values():
            over = [
                account
                for account, standing in register.standings.items()
                if standing.valid_until_ns <= now_ns
            ]
            for account in over:
                del register.standings[account]
            gone += over
        return gone

    def _moment_at(self, now_ns: int) -> _Moment:
        accounts, until_ns = set(), FOREVER_NS
        for register in self._registers.values():
            if register.fork is not None:
                continue
            for account, standing in register.standings.items():
                begins_ns = standing.valid_from_ns - CLOCK_TOLERANCE_NS
                ends_ns = standing.valid_until_ns
                if begins_ns <= now_ns < ends_ns:
                    accounts.add(account)
                    until_ns = min(until_ns, ends_ns)
                elif now_ns < begins_ns:
                    until_ns = min(until_ns, begins_ns)
        return _Moment(frozenset(accounts), now_ns, until_ns)

    def _register_of(self, proof: bytes) -> _Register | Rejected:
        try:
            head = reopen(Head, decode(Proof, proof).head, self._network)
        except (ProtocolError, VerificationError) as error:
            return Rejected(f"proof: {error.message}")
        register = self._registers.get(head.record.issuer)
        return Rejected(UNTRUSTED) if register is None else register

    def _learn(self, register: _Register, included: Included) -> None:
        self._update(register, included.issuer)
        self._see(register, included.head)

    def _update(self, register: _Register, issuer: Issuer) -> None:
        if issuer is register.issuer:
            return
        register.issuer, self._moment = issuer, _NEVER
        register.standings = {
            account: standing
            for account, standing in register.standings.items()
            if _is_good(issuer, standing.head_signer)
        }
        register.revoked = {
            account: taken
            for account, taken in register.revoked.items()
            if _is_good(issuer, taken.head_signer)
        }
        if register.head is not None and not _is_good(issuer, register.head.signer):
            register.head = None
        # The root key says that a thief may have signed it: it convicts those who come later
        # no more, so it must not convict those who saw it before.
        if register.fork is not None and isinstance(check_fork(register.fork, issuer), Rejected):
            register.fork = None

    def _see(self, register: _Register, head: Sealed[Head]) -> None:
        if head.record.at_ns <= register.forgiven_ns:
            return
        known = register.head
        if known is None or known.id == head.id:
            register.head = head
            return
        if register.fork is None and contradict(known.record, head.record):
            first, second = sorted((known, head), key=lambda each: each.record.size)
            register.fork = make_fork(first, second, register.issuer)
            self._moment = _NEVER
        if (head.record.size, head.record.at_ns) > (known.record.size, known.record.at_ns):
            register.head = head


def _is_good(issuer: Issuer, online_key: bytes) -> bool:
    """Whether heads by that key count yet."""
    certificate = issuer.certificate_of(online_key)
    return certificate is not None and not issuer.is_withdrawn(certificate)
