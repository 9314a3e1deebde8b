"""What proves that an account is attested, and every way in which it may not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from p2pflop.franchise.enrolments import ENROLMENT_WINDOW_NS, check_form, decision_of, make_form
from p2pflop.franchise.fees import RENEW_BEFORE_NS, due_ns, is_in_time, next_period, schedule_at
from p2pflop.franchise.forks import check_fork, make_fork
from p2pflop.franchise.issuer import MAX_CERTIFICATES, Issuer, sign_certificate
from p2pflop.franchise.proofs import Attested, check_attestation, check_proof, check_revocation
from p2pflop.franchise.records import (
    DAY_NS,
    MAX_CERTIFICATE_NS,
    MAX_PERSONAL_CHARS,
    MAX_PROOF_BYTES,
    MAX_SLOTS,
    Attestation,
    CertificateRequest,
    Head,
    LeafKind,
    PersonalData,
    Proof,
    Schedule,
)
from p2pflop.franchise.samples import GUIDELINES, YEAR_NS, SampleRegistry, key
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey
from p2pflop.market.records import ZERO_HASH, Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import Sealed, decode, encode, open_sealed

ALICE, BOB = key(1).public_key, key(2).public_key


@pytest.fixture
def registry() -> SampleRegistry:
    registry = SampleRegistry()
    registry.publish()
    for number in range(10, 15):
        registry.attest(key(number).public_key)
    return registry


def reason(checked: object) -> str:
    assert isinstance(checked, Rejected), checked
    return checked.reason


def told(registry: SampleRegistry, proof: bytes, **rest: Any) -> str:
    return reason(check_attestation(proof, registry.issuer, rest.pop("now_ns", NOW_NS), **rest))


class TestAttestations:
    def test_a_good_one_is_verified_with_the_root_key_alone(self, registry: SampleRegistry) -> None:
        proof = registry.prove(registry.attest(ALICE))
        stranger = Issuer(registry.root.public_key)
        attested = check_attestation(proof, stranger, NOW_NS, ALICE)
        assert isinstance(attested, Attested)
        assert attested.attestation.account == ALICE
        assert attested.attestation.max_slots == 8

    def test_it_holds_from_its_first_to_before_its_last_moment(
        self, registry: SampleRegistry
    ) -> None:
        proof = registry.prove(registry.attest(ALICE, valid_from_ns=NOW_NS + DAY_NS))
        early = NOW_NS + DAY_NS - CLOCK_TOLERANCE_NS
        assert told(registry, proof, now_ns=early - 1) == "attestation is not valid yet"
        for now_ns in (early, NOW_NS + YEAR_NS - 1):
            assert isinstance(check_attestation(proof, registry.issuer, now_ns), Attested)
        late = NOW_NS + YEAR_NS
        assert told(registry, proof, now_ns=late) == "attestation has expired"

    def test_one_that_is_in_no_log_counts_for_nothing(self, registry: SampleRegistry) -> None:
        secret = SampleRegistry()
        secret.publish()
        proof = secret.prove(secret.attest(ALICE))
        graft = msgspec.structs.replace(decode(Proof, proof), head=registry.head())
        assert "not in the log" in told(registry, encode(graft))

    @pytest.mark.parametrize("place", range(4))
    def test_a_changed_byte_anywhere(self, registry: SampleRegistry, place: int) -> None:
        proof = registry.prove(registry.attest(ALICE))
        changed = bytearray(proof)
        for offset in range(place, len(proof), 4):
            changed[offset] ^= 1
            assert isinstance(check_attestation(bytes(changed), registry.issuer, NOW_NS), Rejected)
            changed[offset] ^= 1

    def test_of_another_account(self, registry: SampleRegistry) -> None:
        proof = registry.prove(registry.attest(ALICE))
        assert told(registry, proof, account=BOB) == "attestation is of another account"

    def test_of_another_network(self) -> None:
        there = SampleRegistry(network="test")
        proof = there.prove(there.attest(ALICE))
        here = Issuer(there.root.public_key, "main")
        assert "certificate" in reason(check_attestation(proof, here, NOW_NS))
        mixed = SampleRegistry()
        number = mixed.append(
            LeafKind.ATTESTATION, decode_leaf_body(there.leaves[there.attest(ALICE)])
        )
        assert told(mixed, mixed.prove(number)) == "attestation is for the network 'test'"
        number = mixed.attest(ALICE, network_id="test")
        assert told(mixed, mixed.prove(number)) == "attestation is for the network 'test'"

    def test_signed_by_somebody_else(self, registry: SampleRegistry) -> None:
        number = registry.attest(ALICE, signer=key(666))
        assert told(registry, registry.prove(number)) == "attestation is not by this registry"
        number = registry.attest(ALICE, issuer=BOB)
        assert told(registry, registry.prove(number)) == "attestation names another registry"

    def test_of_a_registry_that_is_not_trusted(self, registry: SampleRegistry) -> None:
        other = SampleRegistry(300)
        proof = other.prove(other.attest(ALICE))
        assert "not by the root key" in told(registry, proof)
        bare = other.prove(1 if other.publish() else 0, certificates=())
        assert told(registry, bare) == "head is not by this registry"

    def test_a_leaf_of_another_kind(self, registry: SampleRegistry) -> None:
        assert told(registry, registry.prove(1)) == "the leaf is not an attestation"
        revocation = check_revocation(registry.prove(1), registry.issuer, NOW_NS)
        assert reason(revocation) == "the leaf is not a revocation"

    def test_an_empty_time(self, registry: SampleRegistry) -> None:
        number = registry.attest(ALICE, valid_until_ns=NOW_NS)
        assert told(registry, registry.prove(number)) == "attestation ends before it begins"

    def test_too_many_bytes(self, registry: SampleRegistry) -> None:
        assert "over its limit" in told(registry, bytes(MAX_PROOF_BYTES + 1))
        with pytest.raises(ValueError, match="65536"):
            registry.attest(ALICE, max_slots=MAX_SLOTS + 1)


class TestHeads:
    def test_from_the_future(self, registry: SampleRegistry) -> None:
        head = registry.head(at_ns=NOW_NS + CLOCK_TOLERANCE_NS + 1)
        assert reason(registry.issuer.check_head(head, NOW_NS)) == "head is from the future"
        assert isinstance(registry.issuer.check_head(head, NOW_NS + 1), Sealed)

    def test_outside_of_what_is_certified(self, registry: SampleRegistry) -> None:
        for at_ns in (NOW_NS - DAY_NS - 1, NOW_NS + 89 * DAY_NS):
            head = registry.head(at_ns=at_ns)
            assert "not certified at that time" in reason(registry.issuer.check_head(head, at_ns))

    def test_an_old_one_counts_though_its_certificate_has_ended(
        self, registry: SampleRegistry
    ) -> None:
        proof = registry.prove(registry.attest(ALICE))
        much_later = NOW_NS + YEAR_NS - 1
        assert isinstance(check_attestation(proof, registry.issuer, much_later), Attested)


class TestRotation:
    def test_attestations_outlive_the_key_that_signed_them(self, registry: SampleRegistry) -> None:
        number = registry.attest(ALICE)
        registry.certify(key(777))
        stranger = Issuer(registry.root.public_key)
        assert isinstance(check_attestation(registry.prove(number), stranger, NOW_NS), Attested)

    def test_after_a_theft_only_the_new_keys_heads_count(self, registry: SampleRegistry) -> None:
        stolen = registry.online
        number = registry.attest(ALICE)
        old_head = registry.head()
        old_proof = registry.prove(number)
        registry.certify(key(777), withdraws=True)
        issuer = registry.issuer
        assert "withdrawn" in reason(issuer.check_head(old_head, NOW_NS))
        assert "withdrawn" in reason(check_attestation(old_proof, issuer, NOW_NS))
        assert isinstance(check_attestation(registry.prove(number), issuer, NOW_NS), Attested)
        thief = SampleRegistry()
        thief.online = stolen
        forged = thief.prove(thief.attest(BOB))
        assert "withdrawn" in reason(check_attestation(forged, issuer, NOW_NS))

    def test_what_no_certificate_may_be(self, registry: SampleRegistry) -> None:
        root, online = registry.root, registry.online.public_key
        asked = CertificateRequest(
            1, root.public_key, "main", 1, online, ZERO_HASH, 0, ZERO_HASH, False
        )
        sign_certificate(root, asked, NOW_NS, NOW_NS + MAX_CERTIFICATE_NS)
        for until_ns in (NOW_NS, NOW_NS + MAX_CERTIFICATE_NS + 1):
            with pytest.raises(ValueError, match="up to 90 days"):
                sign_certificate(root, asked, NOW_NS, until_ns)
        for changes, text in (
            ({"online_key": root.public_key}, "the root key the online key"),
            ({"number": 2}, "no previous one"),
            ({"issuer": ALICE}, "another registry"),
        ):
            wrong = msgspec.structs.replace(asked, **changes)
            with pytest.raises(ValueError, match=text):
                sign_certificate(root, wrong, NOW_NS, NOW_NS + DAY_NS)

    def test_two_of_one_number(self, registry: SampleRegistry) -> None:
        root = registry.root
        asked = CertificateRequest(
            1, root.public_key, "main", 1, ALICE, ZERO_HASH, 0, ZERO_HASH, False
        )
        twin = sign_certificate(root, asked, NOW_NS, NOW_NS + DAY_NS)
        assert reason(registry.issuer.learn(twin.wire)) == "two certificates numbered 1"

    def test_bounded(self, registry: SampleRegistry) -> None:
        first = registry.certificates[0]
        full = Issuer(
            registry.root.public_key,
            certificates=dict.fromkeys(range(2, MAX_CERTIFICATES + 2), first),
        )
        assert "over 1024" in reason(full.learn(first.wire))


class TestRevocations:
    def test_proven_like_attestations(self, registry: SampleRegistry) -> None:
        revoked = check_revocation(registry.prove(registry.revoke(ALICE, 3)), registry.issuer, 1)
        assert reason(revoked) == "head is from the future"
        revoked = check_revocation(
            registry.prove(registry.revoke(ALICE, 3)), registry.issuer, NOW_NS
        )
        assert not isinstance(revoked, Rejected)
        assert (revoked.revocation.account, revoked.revocation.serial) == (ALICE, 3)


class TestForks:
    def heads(self, registry: SampleRegistry, *wires: bytes) -> list[Sealed[Head]]:
        return [open_sealed(Head, wire) for wire in wires]

    def test_two_roots_for_one_size(self, registry: SampleRegistry) -> None:
        other = SampleRegistry()
        while len(other.leaves) < len(registry.leaves):
            other.attest(BOB)
        first, second = self.heads(registry, registry.head(), other.head())
        found = check_fork(
            make_fork(first, second, registry.issuer), Issuer(registry.root.public_key)
        )
        assert found == (first.record, second.record)

    def test_a_log_that_shrank(self, registry: SampleRegistry) -> None:
        small = registry.head(3, NOW_NS + 1)
        first, second = self.heads(registry, small, registry.head())
        assert not isinstance(
            check_fork(make_fork(first, second, registry.issuer), registry.issuer), Rejected
        )

    def test_a_rewritten_history_is_proven_by_the_second_one(
        self, registry: SampleRegistry
    ) -> None:
        remembered = registry.head(5)
        rewritten = SampleRegistry()
        for _ in range(30):
            rewritten.attest(BOB)
        first, second = self.heads(registry, remembered, rewritten.head())
        evidence = make_fork(
            first, second, registry.issuer, rewritten.tree.root(5), rewritten.consistency(5)
        )
        assert not isinstance(check_fork(evidence, Issuer(registry.root.public_key)), Rejected)

    def test_honest_heads_convict_nobody(self, registry: SampleRegistry) -> None:
        first, second = self.heads(registry, registry.head(5), registry.head())
        for root_then, path in (
            (registry.tree.root(5), registry.consistency(5)),
            (bytes(32), registry.consistency(5)),
            (bytes(32), ()),
        ):
            evidence = make_fork(first, second, registry.issuer, root_then, path)
            assert "do not contradict" in reason(check_fork(evidence, registry.issuer))

    def test_a_thiefs_head_convicts_nobody(self, registry: SampleRegistry) -> None:
        thief = SampleRegistry()
        for _ in range(50):
            thief.attest(BOB)
        forged = thief.head()
        registry.certify(key(777), withdraws=True)
        for _ in range(60):
            registry.attest(ALICE)
        first, second = self.heads(registry, forged, registry.head(len(thief.leaves)))
        evidence = make_fork(first, second, registry.issuer)
        assert "withdrawn" in reason(check_fork(evidence, registry.issuer))


class TestFees:
    def schedule(self, number: int, from_ns: int, period_ns: int = YEAR_NS) -> Schedule:
        return Schedule(1, ALICE, number, 10**9, period_ns, 8, from_ns, GUIDELINES)

    def test_the_highest_number_that_holds(self) -> None:
        schedules = [self.schedule(number, NOW_NS + number * DAY_NS) for number in (2, 1, 3)]
        assert schedule_at(schedules, NOW_NS) is None
        for days, number in ((1, 1), (2, 2), (9, 3)):
            found = schedule_at(schedules, NOW_NS + days * DAY_NS)
            assert found is not None
            assert found.number == number

    def test_periods_join_and_no_gap_is_charged(self) -> None:
        schedule = self.schedule(1, 0)
        first = next_period(schedule, 0, NOW_NS)
        assert first.valid_until_ns == NOW_NS + YEAR_NS
        renewed = next_period(schedule, first.valid_until_ns, NOW_NS + YEAR_NS - DAY_NS)
        assert renewed.valid_until_ns == NOW_NS + 2 * YEAR_NS
        late = next_period(schedule, first.valid_until_ns, NOW_NS + YEAR_NS + 30 * DAY_NS)
        assert late.valid_until_ns == NOW_NS + 2 * YEAR_NS + 30 * DAY_NS

    def test_due_before_the_end(self) -> None:
        assert due_ns(self.schedule(1, 0), 0) == 0
        assert due_ns(self.schedule(1, 0), NOW_NS) == NOW_NS - RENEW_BEFORE_NS
        assert due_ns(self.schedule(1, 0, 4 * DAY_NS), NOW_NS) == NOW_NS - DAY_NS

    def test_nobody_gets_more_than_others(self) -> None:
        schedule = self.schedule(1, 0)
        fair = Attestation(1, BOB, "main", ALICE, 8, NOW_NS, NOW_NS + YEAR_NS, 1)
        assert is_in_time(schedule, 0, 0, fair, NOW_NS)
        for unfair in (
            msgspec.structs.replace(fair, max_slots=9),
            msgspec.structs.replace(fair, valid_until_ns=fair.valid_until_ns + 1),
            msgspec.structs.replace(fair, valid_until_ns=fair.valid_until_ns - 1),
            msgspec.structs.replace(fair, valid_from_ns=NOW_NS + 1),
        ):
            assert not is_in_time(schedule, 0, 0, unfair, NOW_NS)

    def test_nobody_is_renewed_earlier_than_others(self) -> None:
        schedule = self.schedule(1, 0)
        until_ns = NOW_NS + YEAR_NS
        due = due_ns(schedule, until_ns)
        renewed = Attestation(1, BOB, "main", ALICE, 8, NOW_NS, until_ns + YEAR_NS, 2)
        assert is_in_time(schedule, until_ns, due, renewed, due)
        assert not is_in_time(schedule, until_ns, due, renewed, due - 1)


class TestEnrolments:
    issuer = key(900).public_key
    personal = PersonalData(1, bytes(32), "Ada, ada@example.org", "a shed in Kent")
    account = PrivateKey(bytes([7]) * 32)

    def form(self, **changes: Any) -> bytes:
        personal = msgspec.structs.replace(self.personal, **changes)
        return make_form(self.account, self.issuer, GUIDELINES, personal, NOW_NS)

    def test_good(self) -> None:
        application = check_form(self.form(), self.issuer, GUIDELINES, NOW_NS)
        assert not isinstance(application, Rejected)
        assert application.account == self.account.public_key
        assert application.personal == self.personal

    @pytest.mark.parametrize(
        ("issuer", "guidelines", "shift_ns", "network", "text"),
        [
            (bytes(32), GUIDELINES, 0, "main", "another registry"),
            (issuer, "2027-1", 0, "main", "other guidelines"),
            (issuer, GUIDELINES, ENROLMENT_WINDOW_NS + 1, "main", "within the hour"),
            (issuer, GUIDELINES, -ENROLMENT_WINDOW_NS - 1, "main", "within the hour"),
            (issuer, GUIDELINES, 0, "test", "bad signature"),
        ],
    )
    def test_for_something_else(
        self, issuer: bytes, guidelines: str, shift_ns: int, network: str, text: str
    ) -> None:
        checked = check_form(self.form(), issuer, guidelines, NOW_NS + shift_ns, network)
        assert text in reason(checked)

    @pytest.mark.parametrize(
        ("contact", "text"),
        [
            ("", "no contact"),
            ("  ", "no contact"),
            ("ada\nbob", "printable"),
            ("\x1b[2J", "printable"),
            ("\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe", "printable"),
            ("a" * (MAX_PERSONAL_CHARS + 1), "EnrolmentForm"),
        ],
    )
    def test_texts(self, contact: str, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            self.form(contact=contact)

    def test_other_personal_data_than_was_signed(self) -> None:
        good = self.form()
        other = good.replace(b"a shed in Kent", b"a ship in Kent")
        checked = check_form(other, self.issuer, GUIDELINES, NOW_NS)
        assert "other personal data" in reason(checked)

    def test_the_log_tells_nothing_without_the_salt(self) -> None:
        enrolment = content_hash(b"enrolment")
        salted = decision_of(enrolment, bytes([1]) * 32)
        assert salted != decision_of(enrolment, bytes([2]) * 32)
        assert content_hash(bytes([1]) * 32 + enrolment) in salted


def decode_leaf_body(leaf: bytes) -> bytes:
    body: bytes = msgspec.msgpack.decode(leaf)[3]
    return body


def test_a_proof_of_anything(registry: SampleRegistry) -> None:
    for index in range(len(registry.leaves)):
        included = check_proof(registry.prove(index), registry.issuer, NOW_NS)
        assert not isinstance(included, Rejected)
        assert included.index == index
