"""Two histories: what convicts a registry that shows one log here and another there.

Heads ``first`` and ``second``, both signed by keys of one registry, cannot both be true if

- they are of one size and name different roots;
- ``second`` was made later and is the smaller: an append-only log does not shrink;
- ``path`` proves that the log of ``second`` began, at the size of ``first``, with another root.

The last needs nothing but ``second`` and hashes: a consistency proof from the root that the
second history has at that size, ``root_then``, is one that the signer of ``second`` cannot deny.
A head by a withdrawn key convicts nobody if its log is larger than what the withdrawing certificate
states: whoever stole the key may have signed it.
"""

from __future__ import annotations

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.franchise.issuer import Issuer
from p2pflop.franchise.merkle import is_consistent
from p2pflop.franchise.records import MAX_CERTIFICATES_A_FORK, Certificate, Fork, Head
from p2pflop.market.records import ZERO_HASH, Rejected
from p2pflop.wire import Sealed, decode, encode, open_sealed


def contradict(first: Head, second: Head) -> bool:
    """Whether two heads of one registry contradict each other as they stand."""
    if first.size == second.size:
        return first.root != second.root
    earlier, later = (first, second) if first.size < second.size else (second, first)
    return earlier.at_ns > later.at_ns


def make_fork(
    first: Sealed[Head],
    second: Sealed[Head],
    issuer: Issuer,
    root_then: bytes = ZERO_HASH,
    path: tuple[bytes, ...] = (),
) -> bytes:
    """The evidence, encoded. ``first`` is the head of the smaller log, if they differ in size."""
    signers = {first.signer, second.signer}
    certificates = [
        certificate.wire
        for _, certificate in sorted(issuer.certificates.items(), reverse=True)
        if certificate.record.online_key in signers or certificate.record.withdraws
    ]
    told = tuple(certificates[:MAX_CERTIFICATES_A_FORK])
    return encode(Fork(1, first.wire, second.wire, root_then, path, told))


def check_fork(data: bytes, issuer: Issuer) -> tuple[Head, Head] | Rejected:
    """The two heads, if they convict ``issuer``."""
    try:
        fork = decode(Fork, data)
    except ProtocolError as error:
        return Rejected(error.message)
    learned = issuer.learn_all(fork.certificates)
    if isinstance(learned, Rejected):
        return learned
    heads = []
    for wire in (fork.first, fork.second):
        head = open_past_head(wire, learned)
        if isinstance(head, Rejected):
            return head
        heads.append(head.record)
    first, second = heads
    if contradict(first, second):
        return first, second
    leads = is_consistent(first.size, fork.root_then, second.size, second.root, fork.path)
    if leads and fork.root_then != first.root:
        return first, second
    return Rejected("the two heads do not contradict each other")


def open_past_head(data: bytes, issuer: Issuer) -> Sealed[Head] | Rejected:
    """A head that ``issuer`` answers for, whatever it said later."""
    try:
        head = open_sealed(Head, data, issuer.network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(f"head: {error.message}")
    certificate = issuer.certificate_of(head.signer)
    if head.record.issuer != issuer.key or certificate is None:
        return Rejected("head is not by this registry")
    if not certificate.valid_from_ns <= head.record.at_ns < certificate.valid_until_ns:
        return Rejected("head is signed with a key that was not certified at that time")
    withdrawing = _withdrawing(issuer, certificate)
    if withdrawing is not None and head.record.size > withdrawing.log_size:
        return Rejected("head is signed with a key that was withdrawn")
    return head


def _withdrawing(issuer: Issuer, certificate: Certificate) -> Certificate | None:
    numbers = [
        number
        for number, later in issuer.certificates.items()
        if number > certificate.number and later.record.withdraws
    ]
    return issuer.certificates[min(numbers)].record if numbers else None
