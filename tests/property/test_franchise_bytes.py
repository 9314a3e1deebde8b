"""Any bytes are refused in words, and so are good ones that were changed."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.errors import VerificationError
from p2pflop.franchise.auditor import Auditor
from p2pflop.franchise.enrolments import check_form, make_form
from p2pflop.franchise.forks import check_fork
from p2pflop.franchise.issuer import Issuer
from p2pflop.franchise.proofs import check_attestation, check_revocation
from p2pflop.franchise.records import PersonalData
from p2pflop.franchise.roll import Roll
from p2pflop.franchise.samples import GUIDELINES, SampleRegistry, key
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS

ALICE = key(1)


@cache
def registry() -> SampleRegistry:
    registry = SampleRegistry()
    registry.publish()
    registry.attest(ALICE.public_key)
    registry.revoke(ALICE.public_key, 1)
    return registry


@cache
def proof() -> bytes:
    return registry().prove(2)


@cache
def form() -> bytes:
    personal = PersonalData(1, bytes(32), "ada", "Kent")
    return make_form(ALICE, registry().root.public_key, GUIDELINES, personal, NOW_NS)


def mutated(good: bytes, place: int, flip: int, cut: int) -> bytes:
    data = bytearray(good)
    data[place % len(data)] ^= flip
    return bytes(data[: len(data) - cut])


@given(st.binary(max_size=300))
def test_of_any_bytes(data: bytes) -> None:
    issuer = registry().issuer
    assert isinstance(check_attestation(data, issuer, NOW_NS), Rejected)
    assert isinstance(check_revocation(data, issuer, NOW_NS), Rejected)
    assert isinstance(check_fork(data, issuer), Rejected)
    assert isinstance(check_form(data, issuer.key, GUIDELINES, NOW_NS), Rejected)
    assert isinstance(issuer.learn(data), Rejected)
    assert isinstance(issuer.check_head(data, NOW_NS), Rejected)
    roll = Roll([issuer.key])
    assert isinstance(roll.admit(data, NOW_NS), Rejected)
    assert isinstance(roll.remember(issuer.key, data, NOW_NS), Rejected)
    with pytest.raises(VerificationError, match="leaf 0 of the registry's log"):
        Auditor(issuer.key).take(data)


@given(st.integers(0, 10_000), st.integers(1, 255), st.integers(0, 3))
def test_of_good_ones_that_were_changed(place: int, flip: int, cut: int) -> None:
    stranger = Issuer(registry().root.public_key)
    changed = mutated(proof(), place, flip, cut)
    assert isinstance(check_attestation(changed, stranger, NOW_NS), Rejected)
    changed = mutated(form(), place, flip, cut)
    assert isinstance(check_form(changed, stranger.key, GUIDELINES, NOW_NS), Rejected)
