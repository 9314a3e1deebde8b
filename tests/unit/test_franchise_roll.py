"""Which accounts a node holds to be attested, whatever it is told in which order."""

from __future__ import annotations

import pytest

from p2pflop.franchise import roll as module
from p2pflop.franchise.forks import check_fork, make_fork
from p2pflop.franchise.issuer import Issuer
from p2pflop.franchise.records import DAY_NS, Head
from p2pflop.franchise.roll import MAX_ISSUERS, Roll, Standing, Taken
from p2pflop.franchise.samples import YEAR_NS, SampleRegistry, key
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import Sealed

ALICE, BOB = key(1).public_key, key(2).public_key


@pytest.fixture
def registry() -> SampleRegistry:
    registry = SampleRegistry()
    registry.publish()
    return registry


@pytest.fixture
def roll(registry: SampleRegistry) -> Roll:
    return Roll([registry.root.public_key])


def reason(checked: object) -> str:
    assert isinstance(checked, Rejected), checked
    return checked.reason


def test_attested_until_the_end(registry: SampleRegistry, roll: Roll) -> None:
    assert not roll.is_attested(ALICE, NOW_NS)
    assert isinstance(roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS), Standing)
    assert roll.is_attested(ALICE, NOW_NS)
    assert not roll.is_attested(BOB, NOW_NS)
    assert roll.is_attested(ALICE, NOW_NS + YEAR_NS - 1)
    assert not roll.is_attested(ALICE, NOW_NS + YEAR_NS)
    assert roll.standing(ALICE, NOW_NS + YEAR_NS) is None
    assert roll.expire(NOW_NS + YEAR_NS - 1) == []
    assert roll.expire(NOW_NS + YEAR_NS) == [ALICE]


def told(roll: Roll, now_ns: int = NOW_NS) -> frozenset[bytes]:
    """Who is attested, in the set that a ranking looks in; one by one it is the same."""
    found = roll.attested(now_ns)
    assert found == {each for each in (ALICE, BOB) if roll.is_attested(each, now_ns)}
    return found


def test_the_set_of_the_attested_keeps_up_with_all_that_is_told(
    registry: SampleRegistry, roll: Roll
) -> None:
    """Asked after each step, so that what it kept from before would show."""
    issuer, numbers = registry.root.public_key, {}
    assert told(roll) == frozenset()
    for count, account in enumerate((ALICE, BOB), 1):
        numbers[account] = registry.attest(account)
        roll.admit(registry.prove(numbers[account]), NOW_NS)
        assert len(told(roll)) == count
    roll.revoke(registry.prove(registry.revoke(BOB, registry.serial)), NOW_NS)
    assert told(roll) == {ALICE}
    twin = SampleRegistry()
    twin.publish()
    twin.attest(BOB)
    registry.attest(key(3).public_key)
    roll.remember(issuer, twin.head(at_ns=NOW_NS + 1), NOW_NS)
    roll.remember(issuer, registry.head(at_ns=NOW_NS + 2), NOW_NS)
    assert told(roll) == frozenset(), "it told two histories"
    roll.forgive(issuer, NOW_NS + 3)
    assert told(roll) == {ALICE}
    roll.learn(issuer, (registry.certify(key(777), withdraws=True).wire,))
    assert told(roll) == frozenset(), "the key that attested it was withdrawn"


def test_the_set_of_the_attested_keeps_time(registry: SampleRegistry, roll: Roll) -> None:
    later_ns, ends_ns = NOW_NS + DAY_NS, NOW_NS + YEAR_NS
    roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS)
    roll.admit(registry.prove(registry.attest(BOB, valid_from_ns=later_ns)), later_ns)
    begins_ns = later_ns - CLOCK_TOLERANCE_NS
    for now_ns in (NOW_NS, begins_ns - 1, begins_ns, ends_ns - 1, ends_ns, begins_ns - 1, NOW_NS):
        expected = {ALICE} if now_ns < ends_ns else set()
        assert told(roll, now_ns) == expected | ({BOB} if begins_ns <= now_ns < ends_ns else set())
    assert roll.attested(NOW_NS) is roll.attested(NOW_NS + 1), "made anew only when it changes"


def test_nobody_is_trusted_by_default(registry: SampleRegistry) -> None:
    bare = Roll([])
    assert "not trusted" in reason(bare.admit(registry.prove(registry.attest(ALICE)), NOW_NS))
    assert not bare.is_attested(ALICE, NOW_NS)


def test_a_replayed_older_one_changes_nothing(registry: SampleRegistry, roll: Roll) -> None:
    old = registry.prove(registry.attest(ALICE))
    new = registry.prove(registry.attest(ALICE, max_slots=2))
    roll.admit(new, NOW_NS)
    assert "older" in reason(roll.admit(old, NOW_NS))
    standing = roll.standing(ALICE, NOW_NS)
    assert standing is not None
    assert standing.max_slots == 2
    assert isinstance(roll.admit(new, NOW_NS), Standing)


@pytest.mark.parametrize("is_first", [True, False])
def test_revoked_in_either_order(registry: SampleRegistry, roll: Roll, is_first: bool) -> None:
    attestation = registry.prove(registry.attest(ALICE))
    revocation = registry.prove(registry.revoke(ALICE, registry.serial))
    if is_first:
        taken = roll.revoke(revocation, NOW_NS)
        assert isinstance(taken, Taken)
        assert (taken.account, taken.serial) == (ALICE, registry.serial)
        assert reason(roll.admit(attestation, NOW_NS)) == "attestation was revoked"
    else:
        roll.admit(attestation, NOW_NS)
        roll.revoke(revocation, NOW_NS)
    assert not roll.is_attested(ALICE, NOW_NS)
    roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS)
    assert roll.is_attested(ALICE, NOW_NS)
    roll.revoke(revocation, NOW_NS)
    assert roll.is_attested(ALICE, NOW_NS)


def test_two_registries_that_disagree(registry: SampleRegistry) -> None:
    other = SampleRegistry(300)
    roll = Roll([registry.root.public_key, other.root.public_key])
    roll.admit(registry.prove(registry.attest(ALICE, max_slots=2)), NOW_NS)
    roll.admit(other.prove(other.attest(ALICE, max_slots=9)), NOW_NS)
    standing = roll.standing(ALICE, NOW_NS)
    assert standing is not None
    assert standing.max_slots == 9
    roll.revoke(other.prove(other.revoke(ALICE, 1)), NOW_NS)
    assert roll.is_attested(ALICE, NOW_NS)
    standing = roll.standing(ALICE, NOW_NS)
    assert standing is not None
    assert standing.max_slots == 2
    roll.revoke(registry.prove(registry.revoke(ALICE, 1)), NOW_NS)
    assert not roll.is_attested(ALICE, NOW_NS)


def test_a_withdrawn_key_takes_its_standings_with_it(registry: SampleRegistry, roll: Roll) -> None:
    number = registry.attest(ALICE)
    roll.admit(registry.prove(number), NOW_NS)
    certificate = registry.certify(key(777), withdraws=True)
    assert roll.learn(registry.root.public_key, (certificate.wire,)) is None
    assert not roll.is_attested(ALICE, NOW_NS)
    assert roll.head(registry.root.public_key) is None
    roll.admit(registry.prove(number), NOW_NS)
    assert roll.is_attested(ALICE, NOW_NS)


def test_an_ordinary_rotation_takes_nothing(registry: SampleRegistry, roll: Roll) -> None:
    roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS)
    certificate = registry.certify(key(777))
    assert roll.learn(registry.root.public_key, (certificate.wire,)) is None
    assert roll.is_attested(ALICE, NOW_NS)
    assert "not trusted" in reason(roll.learn(BOB, ()))
    assert "certificate" in reason(roll.learn(registry.root.public_key, (b"x",)))


def test_two_histories_are_caught_and_proven(registry: SampleRegistry, roll: Roll) -> None:
    issuer = registry.root.public_key
    other = SampleRegistry()
    other.publish()
    registry.attest(ALICE)
    other.attest(BOB)
    assert roll.remember(issuer, registry.head(), NOW_NS) == Rejected(
        "head is not by this registry"
    )
    assert roll.learn(issuer, (registry.certificates[0].wire,)) is None
    assert roll.remember(issuer, registry.head(), NOW_NS) is None
    assert roll.fork(issuer) is None
    assert roll.remember(issuer, other.head(), NOW_NS) is None
    fork = roll.fork(issuer)
    assert fork is not None
    assert not isinstance(check_fork(fork, Issuer(issuer)), Rejected)


def test_older_heads_of_one_history_convict_nobody(registry: SampleRegistry, roll: Roll) -> None:
    issuer = registry.root.public_key
    registry.attest(ALICE)
    assert roll.learn(issuer, (registry.certificates[0].wire,)) is None
    for head in (registry.head(), registry.head(2, NOW_NS - 1), registry.head(at_ns=NOW_NS + 5)):
        assert roll.remember(issuer, head, NOW_NS) is None
    assert roll.fork(issuer) is None
    newest = roll.head(issuer)
    assert newest is not None
    assert (newest.record.size, newest.record.at_ns) == (3, NOW_NS + 5)
    assert "not trusted" in reason(roll.remember(BOB, registry.head(), NOW_NS))
    assert "head" in reason(roll.remember(issuer, b"", NOW_NS))


def test_bounded(registry: SampleRegistry, roll: Roll, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 1)
    roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS)
    assert "too many accounts" in reason(roll.admit(registry.prove(registry.attest(BOB)), NOW_NS))
    assert isinstance(roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS), Standing)
    roll.revoke(registry.prove(registry.revoke(BOB, 1)), NOW_NS)
    refused = roll.revoke(registry.prove(registry.revoke(ALICE, 1)), NOW_NS)
    assert "too many accounts" in reason(refused)
    with pytest.raises(ValueError, match="over 16"):
        Roll([key(number).public_key for number in range(MAX_ISSUERS + 1)])


def test_not_yet_valid_does_not_hide_what_holds(registry: SampleRegistry, roll: Roll) -> None:
    roll.admit(registry.prove(registry.attest(ALICE)), NOW_NS)
    early = registry.prove(registry.attest(ALICE, valid_from_ns=NOW_NS + DAY_NS))
    assert "not valid yet" in reason(roll.admit(early, NOW_NS))
    assert roll.is_attested(ALICE, NOW_NS)


def fork_of(registry: SampleRegistry) -> bytes:
    """Evidence: two heads of one size with two roots."""
    other = SampleRegistry()
    other.publish(fee_nusd=5)
    made = Roll([registry.root.public_key])
    assert made.remember(registry.root.public_key, registry.head(), NOW_NS) is not None
    assert made.learn(registry.root.public_key, (registry.certificates[0].wire,)) is None
    for head in (registry.head(), other.head()):
        assert made.remember(registry.root.public_key, head, NOW_NS) is None
    fork = made.fork(registry.root.public_key)
    assert fork is not None
    return fork


def test_evidence_from_elsewhere_convicts_and_can_be_forgiven(
    registry: SampleRegistry, roll: Roll
) -> None:
    fork, issuer = fork_of(registry), registry.root.public_key
    proof = registry.prove(registry.attest(ALICE))
    assert isinstance(roll.admit(proof, NOW_NS), Standing)
    assert roll.convict(fork) == issuer
    assert roll.fork(issuer) == fork
    assert not roll.is_attested(ALICE, NOW_NS)
    assert roll.standing(ALICE, NOW_NS) is None
    assert "two histories" in reason(roll.admit(proof, NOW_NS))
    assert "known already" in reason(roll.convict(fork))
    roll.forgive(issuer, NOW_NS)
    assert roll.is_attested(ALICE, NOW_NS)
    assert "forgiven" in reason(roll.convict(fork))
    assert isinstance(roll.admit(proof, NOW_NS), Standing), "its head is older than that"
    assert roll.head(issuer) is None


def test_evidence_against_strangers_and_forged_evidence_is_refused(
    registry: SampleRegistry, roll: Roll
) -> None:
    fork = fork_of(registry)
    assert "not trusted" in reason(Roll([]).convict(fork))
    assert "evidence" in reason(roll.convict(fork[:-1]))
    head = roll_head(roll, registry)
    same = make_fork(head, head, registry.issuer)
    assert "do not contradict" in reason(roll.convict(same))
    assert roll.fork(registry.root.public_key) is None


def roll_head(roll: Roll, registry: SampleRegistry) -> Sealed[Head]:
    roll.admit(registry.prove(registry.attest(BOB)), NOW_NS)
    head = roll.head(registry.root.public_key)
    assert head is not None
    return head
