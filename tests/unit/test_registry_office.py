"""What the registry decides: enrolments, money, attestations, keys; and what it must not forget."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pflop.cli.registry_members import csv_of
from p2pflop.errors import ConfigError, VerificationError
from p2pflop.franchise.issuer import Issuer, sign_certificate
from p2pflop.franchise.merkle import MemoryTree, leaf_hash
from p2pflop.franchise.proofs import Attested, check_attestation, check_proof
from p2pflop.franchise.records import (
    DAY_NS,
    LeafKind,
    PersonalData,
    RefusalReason,
    RevocationReason,
    Schedule,
)
from p2pflop.franchise.roll import Roll, Taken
from p2pflop.franchise.samples import GUIDELINES, YEAR_NS, key
from p2pflop.keys import PrivateKey
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.registry import members
from p2pflop.registry.backup import back_up, restore
from p2pflop.registry.books import check_books, credit_nusd, lines
from p2pflop.registry.founding import found_registry
from p2pflop.registry.log import (
    attestation_of,
    leaves_from,
    log_root,
    log_size,
    newest_head,
    prove,
)
from p2pflop.registry.office import HEAD_EVERY_NS, Office, open_office
from p2pflop.registry.schema import FILE_NAME
from p2pflop.registry.service import keep_once
from p2pflop.registry.views import member_view, members_view
from p2pflop.wire import encode
from tests.offices import ALICE, BOB, FEE, ROOT, Clock, enrol, form, registry


def standing(office: Office, account: PrivateKey) -> str:
    view = member_view(office, account.public_key)
    return "unknown" if view is None else str(view["state"])


def check_log(office: Office) -> None:
    """The tree on disk is that of the leaves, and every leaf has a proof."""
    tree = MemoryTree()
    size = log_size(office.query)
    leaves: list[bytes] = []
    while page := leaves_from(office.query, len(leaves)):
        leaves += page
    assert len(leaves) == size
    for leaf in leaves:
        tree.append(leaf_hash(leaf))
    assert tree.root() == log_root(office.query, size)
    for number in range(size):
        proof = prove(office.query, number)
        assert proof is not None
        stranger = Issuer(office.issuer, office.network)
        assert not isinstance(check_proof(proof, stranger, office.clock()), Rejected)
    assert prove(office.query, size) is None


def attested(office: Office, account: PrivateKey) -> Attested | Rejected:
    found = office.query(
        "SELECT leaf FROM attestations WHERE account = ? ORDER BY serial DESC LIMIT 1",
        account.public_key,
    )
    proof = prove(office.query, found[0][0])
    assert proof is not None
    return check_attestation(proof, Issuer(ROOT.public_key), office.clock(), account.public_key)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_from_application_to_attestation(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        applied = await office.apply(form(ALICE), "10.0.0.0/24")
        assert isinstance(applied, bytes)
        assert standing(office, ALICE) == "waiting"
        await office.approve(ALICE.public_key)
        assert standing(office, ALICE) == "enrolled"
        issued, why = await office.attest(ALICE.public_key)
        assert issued is None
        assert why == "$1.00 of the fee of $1.00 is not paid"
        is_new, issued = await office.receive(ALICE.public_key, FEE, "bank 1")
        assert is_new
        assert issued is not None
        assert standing(office, ALICE) == "attested"
        good = attested(office, ALICE)
        assert isinstance(good, Attested)
        assert good.attestation.valid_until_ns == NOW_NS + YEAR_NS
        assert credit_nusd(office.query, ALICE.public_key) == 0
        check_log(office)
        assert check_books(office.query) == 2


async def test_whatever_is_done_twice_is_done_once(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        first = await office.apply(form(ALICE), "a")
        size = log_size(office.query)
        assert await office.apply(form(ALICE), "a") == first
        await office.approve(ALICE.public_key)
        assert await office.apply(form(ALICE), "a") == first
        await office.approve(ALICE.public_key)
        assert log_size(office.query) == size + 1
        await office.receive(ALICE.public_key, FEE, "bank 1")
        size = log_size(office.query)
        assert await office.receive(ALICE.public_key, FEE, "bank 1") == (False, None)
        with pytest.raises(ConfigError, match=r"another amount: \$1\.00"):
            await office.receive(ALICE.public_key, 2 * FEE, "bank 1")
        assert (await office.attest(ALICE.public_key))[0] is None
        await office.revoke(ALICE.public_key, RevocationReason.OWN_WISH)
        assert await office.revoke(ALICE.public_key, RevocationReason.OWN_WISH) == 1
        assert log_size(office.query) == size + 1
        assert await office.give_back(ALICE.public_key, "bank 1") == FEE
        assert await office.give_back(ALICE.public_key, "bank 1") == 0
        assert check_books(office.query) == 3
        await office.apply(form(BOB), "a")
        await office.refuse(BOB.public_key, RefusalReason.LAW)
        size = log_size(office.query)
        await office.refuse(BOB.public_key, RefusalReason.LAW)
        assert log_size(office.query) == size


async def test_a_fee_of_nothing_attests_at_once_and_for_ever(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock, fee_nusd=0) as office:
        await enrol(office, ALICE)
        assert standing(office, ALICE) == "attested"
        for _ in range(40):
            clock.now_ns += 80 * DAY_NS
            await renew_certificate(office)
            await office.keep()
            assert standing(office, ALICE) == "attested"
        assert check_books(office.query) == 0
        check_log(office)


async def renew_certificate(office: Office, *, withdraws: bool = False) -> None:
    asked = office.request_certificate(withdraws=withdraws)
    signed = sign_certificate(ROOT, asked, office.clock(), office.clock() + 90 * DAY_NS)
    await office.install_certificate(signed.wire)


async def test_renewed_from_what_is_paid_ahead_before_it_ends(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        await enrol(office, ALICE)
        await office.receive(ALICE.public_key, 2 * FEE, "two years")
        assert credit_nusd(office.query, ALICE.public_key) == FEE
        assert await office.keep() == 0
        clock.now_ns += YEAR_NS - 14 * DAY_NS - 1
        await renew_certificate(office)
        assert await office.keep() == 0
        clock.now_ns += 1
        assert await office.keep() == 1
        good = attested(office, ALICE)
        assert isinstance(good, Attested)
        assert good.attestation.valid_until_ns == NOW_NS + 2 * YEAR_NS
        assert good.attestation.serial == 2
        clock.now_ns = NOW_NS + 2 * YEAR_NS
        await renew_certificate(office)
        assert await office.keep() == 0
        view = member_view(office, ALICE.public_key)
        assert view is not None
        assert (view["state"], view["missing_nusd"], view["days_left"]) == ("enrolled", FEE, 0)


async def test_a_dearer_schedule_holds_for_later_periods(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        await enrol(office, ALICE)
        await office.receive(ALICE.public_key, FEE, "1")
        with pytest.raises(ConfigError, match="never from before"):
            await office.publish(2 * FEE, YEAR_NS, 16, "2026-2", NOW_NS - 1)
        with pytest.raises(ConfigError, match="no schedule can be so"):
            await office.publish(2 * FEE, YEAR_NS, 0, "2026-2")
        await office.publish(2 * FEE, YEAR_NS, 16, "2026-2", NOW_NS + DAY_NS)
        assert office.guidelines() == GUIDELINES
        clock.now_ns += DAY_NS
        assert office.guidelines() == "2026-2"
        assert "other guidelines" in str(await office.apply(form(BOB, clock.now_ns), "a"))
        clock.now_ns = NOW_NS + YEAR_NS - DAY_NS
        await renew_certificate(office)
        await office.receive(ALICE.public_key, FEE, "2")
        assert (await office.attest(ALICE.public_key))[1].startswith("$1.00 of the fee of $2.00")
        await office.receive(ALICE.public_key, FEE, "3")
        good = attested(office, ALICE)
        assert isinstance(good, Attested)
        assert good.attestation.max_slots == 16
        check_log(office)


async def test_revoked_and_enrolled_again(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        await enrol(office, ALICE)
        await office.receive(ALICE.public_key, 3 * FEE, "1")
        roll = Roll([ROOT.public_key])
        [(old,)] = office.query("SELECT leaf FROM attestations")
        before = prove(office.query, old)
        assert before is not None
        roll.admit(before, NOW_NS)
        assert await office.revoke(ALICE.public_key, RevocationReason.GUIDELINES) == 1
        assert standing(office, ALICE) == "revoked"
        assert await office.keep() == 0
        with pytest.raises(ConfigError, match="not enrolled"):
            await office.attest(ALICE.public_key)
        [(leaf,)] = office.query("SELECT leaf FROM revocations")
        told = prove(office.query, leaf)
        assert told is not None
        taken = roll.revoke(told, NOW_NS)
        assert isinstance(taken, Taken)
        assert taken.account == ALICE.public_key
        assert not roll.is_attested(ALICE.public_key, NOW_NS)
        clock.now_ns += 10**9
        await enrol(office, ALICE)
        assert standing(office, ALICE) == "attested"
        again = prove(office.query, log_size(office.query) - 1)
        assert again is not None
        roll.admit(again, clock.now_ns)
        assert roll.is_attested(ALICE.public_key, clock.now_ns)
        check_log(office)
        check_books(office.query)


async def test_accounts_that_nobody_knows(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        stranger = bytes(32)
        size = log_size(office.query)
        with pytest.raises(ConfigError, match="no account 000000000000"):
            await office.approve(stranger)
        with pytest.raises(ConfigError, match="no account"):
            await office.refuse(stranger, RefusalReason.LAW)
        with pytest.raises(ConfigError, match="no account"):
            await office.revoke(stranger, RevocationReason.UNPAID)
        with pytest.raises(ConfigError, match="not enrolled"):
            await office.receive(stranger, FEE, "1")
        assert not await office.erase(stranger)
        assert log_size(office.query) == size
        assert members_view(office) == []


async def test_what_the_log_tells_of_an_applicant(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        await enrol(office, ALICE)
        [leaf] = leaves_from(office.query, 2)
        assert leaf[2] == LeafKind.ENROLMENT
        assert ALICE.public_key not in leaf
        assert b"Ada" not in leaf


class TestFloods:
    async def test_a_full_office(
        self, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(members, "MAX_WAITING", 3)
        monkeypatch.setattr(members, "MAX_WAITING_PER_SUBNET", 2)
        async with registry(tmp_path, clock) as office:
            for number in (1, 2):
                assert isinstance(await office.apply(form(key(number)), "a"), bytes)
            refused = await office.apply(form(key(3)), "a")
            assert refused == Rejected("busy: too many enrolments from this network wait already")
            assert isinstance(await office.apply(form(key(4)), "b"), bytes)
            refused = await office.apply(form(key(5)), "c")
            assert refused == Rejected("busy: too many enrolments wait already")
            later = form(key(1), NOW_NS + 1, contact="a newer one")
            assert isinstance(await office.apply(later, "c"), bytes)
            assert len(members_view(office)) == 3
            clock.now_ns += members.WAITING_FOR_NS
            await office.keep()
            assert len(members_view(office)) == 3
            clock.now_ns += 1
            await office.keep()
            assert members_view(office) == []
            assert office.query("SELECT * FROM people") == []

    async def test_an_older_application_replaces_no_newer_one(
        self, tmp_path: Path, clock: Clock
    ) -> None:
        async with registry(tmp_path, clock) as office:
            await office.apply(form(ALICE, NOW_NS, salt=1), "a")
            refused = await office.apply(form(ALICE, NOW_NS - 1, salt=2), "a")
            assert "newer enrolment" in str(refused)
            assert len(office.query("SELECT * FROM people")) == 1

    async def test_many_are_attested_in_bounded_steps(
        self, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(members, "MAX_ISSUED_AT_ONCE", 2)
        async with registry(tmp_path, clock, fee_nusd=0) as office:
            for number in range(1, 6):
                await enrol(office, key(number))
            clock.now_ns += 80 * DAY_NS
            for _ in range(4):
                await renew_certificate(office)
                clock.now_ns += 80 * DAY_NS
            await renew_certificate(office)
            assert len(await office.attest_due()) == 2
            assert await office.keep() == 3


class TestKeys:
    async def test_without_a_certificate_for_now_nothing_is_signed(
        self, tmp_path: Path, clock: Clock
    ) -> None:
        async with registry(tmp_path, clock) as office:
            await office.apply(form(ALICE), "a")
            clock.now_ns += 90 * DAY_NS
            with pytest.raises(ConfigError, match="not for now") as raised:
                await office.approve(ALICE.public_key)
            assert "certify" in raised.value.hint
            assert standing(office, ALICE) == "waiting"
            head = newest_head(office.query)
            await renew_certificate(office)
            await office.approve(ALICE.public_key)
            assert newest_head(office.query) != head

    async def test_a_clock_that_went_back(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path, clock) as office:
            clock.now_ns -= 20 * 10**9
            await enrol(office, ALICE)
            check_log(office)
            clock.now_ns -= 20 * 10**9
            await office.apply(form(BOB, clock.now_ns), "a")
            with pytest.raises(ConfigError, match="clock is behind"):
                await office.approve(BOB.public_key)

    async def test_the_online_key_is_lost(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path, clock, fee_nusd=0) as office:
            await enrol(office, ALICE)
            (tmp_path / "online.pem").unlink()
            await office.apply(form(BOB), "a")
            with pytest.raises(ConfigError, match="online key of this registry is not here"):
                await office.approve(BOB.public_key)
            await renew_certificate(office)
            await office.approve(BOB.public_key)
            check_log(office)

    async def test_the_online_key_is_stolen(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path, clock, fee_nusd=0) as office:
            await enrol(office, ALICE)
            before = newest_head(office.query)
            assert before is not None
            asked = office.request_certificate(withdraws=True)
            signed = sign_certificate(ROOT, asked, NOW_NS, NOW_NS + 90 * DAY_NS)
            await enrol(office, BOB)
            with pytest.raises(ConfigError, match="not what it was"):
                await office.install_certificate(signed.wire)
            await renew_certificate(office, withdraws=True)
            known = office.known_issuer()
            assert "withdrawn" in str(known.check_head(before, NOW_NS))
            assert isinstance(attested(office, ALICE), Attested)
            check_log(office)

    async def test_certificates_of_others(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path / "a", clock) as office:
            asked = office.request_certificate(withdraws=False)
            with pytest.raises(ValueError, match="another registry"):
                sign_certificate(key(5), asked, NOW_NS, NOW_NS + DAY_NS)
            signed = sign_certificate(ROOT, asked, NOW_NS, NOW_NS + DAY_NS)
            async with registry(tmp_path / "b", clock) as other:
                with pytest.raises(ConfigError, match="does not follow"):
                    await other.install_certificate(signed.wire)
            with pytest.raises(ConfigError, match="certificate"):
                await office.install_certificate(b"nonsense")
            first = await office.install_certificate(signed.wire)
            assert await office.install_certificate(signed.wire) == first

    @pytest.mark.parametrize("is_renamed", [True, False])
    async def test_a_crash_before_the_key_file_is_renamed(
        self, tmp_path: Path, clock: Clock, is_renamed: bool
    ) -> None:
        async with registry(tmp_path, clock) as office:
            old = (tmp_path / "online.pem").read_bytes()
            await renew_certificate(office)
            if not is_renamed:
                (tmp_path / "online.pem").rename(tmp_path / "next.pem")
                (tmp_path / "online.pem").write_bytes(old)
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            assert not (tmp_path / "next.pem").exists()
            await renew_certificate(office)
            check_log(office)


async def test_a_head_is_freshened(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        head = newest_head(office.query)
        clock.now_ns += HEAD_EVERY_NS - 1
        await office.keep()
        assert newest_head(office.query) == head
        clock.now_ns += 1
        await office.keep()
        assert newest_head(office.query) != head
        assert len(office.query("SELECT * FROM heads")) == 1


async def test_two_processes_decide_side_by_side(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock, fee_nusd=0) as office, open_office(tmp_path, clock) as two:
        for number in range(1, 9):
            await enrol((office, two)[number % 2], key(number))
        check_log(office)
        serials = [
            attestation_of(leaf).serial
            for leaf in leaves_from(two.query, 0)
            if leaf[2] == LeafKind.ATTESTATION
        ]
        assert serials == list(range(1, 9))


class TestBooks:
    async def test_a_table_for_an_accountant(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            await office.receive(ALICE.public_key, 1_500_000_000_000, '=HYPERLINK("http://evil")')
            table = csv_of(list(lines(office.query)))
            header, paid, fee = table.splitlines()
            assert header == "time,account,what,amount_usd,credit_usd"
            assert ',"paid: =HYPERLINK(""http://evil"")",1500.000000000,' in paid
            assert fee.endswith(",fee of attestation 1,-1.000000000,1499.000000000")
            assert csv_of(list(lines(office.query, BOB.public_key))).splitlines() == [header]

    @pytest.mark.parametrize("reference", ["", "  ", "a\nb", "\x1b[2J", "x" * 101])
    async def test_references(self, tmp_path: Path, clock: Clock, reference: str) -> None:
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            with pytest.raises(ConfigError, match="printable"):
                await office.receive(ALICE.public_key, FEE, reference)

    @pytest.mark.parametrize("amount", [0, -1, 10**15 + 1])
    async def test_amounts(self, tmp_path: Path, clock: Clock, amount: int) -> None:
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            with pytest.raises(ConfigError, match="payment"):
                await office.receive(ALICE.public_key, amount, "1")

    async def test_a_payment_that_never_was_is_not_returned(
        self, tmp_path: Path, clock: Clock
    ) -> None:
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            with pytest.raises(ConfigError, match="no payment"):
                await office.give_back(ALICE.public_key, "1'; DROP TABLE entries; --")
            assert check_books(office.query) == 0

    async def test_books_that_were_changed(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            await office.receive(ALICE.public_key, FEE, "1")
            office.query("UPDATE postings SET amount_nusd = amount_nusd - 1 WHERE kind = 0")
            with pytest.raises(VerificationError, match="balances"):
                check_books(office.query)
            office.query("UPDATE entries SET body = ? WHERE seq = 2", b"x")
            with pytest.raises(VerificationError, match="entry 2"):
                check_books(office.query)


class TestService:
    """What the service does by itself every few seconds."""

    async def test_attests_who_has_paid(self, tmp_path: Path, clock: Clock) -> None:
        async with registry(tmp_path, clock) as office:
            await enrol(office, ALICE)
            await office.receive(ALICE.public_key, 2 * FEE, "1")
            clock.now_ns += YEAR_NS - DAY_NS
            await renew_certificate(office)
            assert await keep_once(office) == ""
            assert credit_nusd(office.query, ALICE.public_key) == 0
            assert standing(office, ALICE) == "attested"

    async def test_warns_before_its_certificate_ends_and_goes_on_after(
        self, tmp_path: Path, clock: Clock
    ) -> None:
        async with registry(tmp_path, clock, fee_nusd=0) as office:
            await enrol(office, ALICE)
            assert await keep_once(office) == ""
            clock.now_ns += 70 * DAY_NS
            assert "ends in 20 days: p2pflop registry certify" in await keep_once(office)
            clock.now_ns += 20 * DAY_NS
            assert "certificate of the online key is not for now" in await keep_once(office)
            assert log_size(office.query) == 4


async def test_founded_once(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        assert office.network == "main"

    def schedule(issuer: bytes, now_ns: int) -> Schedule:
        return Schedule(1, issuer, 1, FEE, YEAR_NS, 8, now_ns, GUIDELINES)

    with pytest.raises(ConfigError, match="already"):
        await found_registry(tmp_path, ROOT, "main", schedule, clock)
    with pytest.raises(ConfigError, match="name of a network"):
        await found_registry(tmp_path / "b", ROOT, "a b/../c", schedule, clock)
    with pytest.raises(ConfigError, match="no registry"):
        async with open_office(tmp_path / "nowhere", clock):
            pass


def test_forms_are_small() -> None:
    assert len(form(ALICE, contact="a" * 400)) < 2048
    assert len(encode(PersonalData(1, bytes(32), "a", "b"))) < 100


async def test_a_clock_that_was_ahead_is_healed_by_a_backup(tmp_path: Path, clock: Clock) -> None:
    folder, copy = tmp_path / "registry", tmp_path / "copy.db"
    async with registry(folder, clock) as office:
        await enrol(office, ALICE)
        back_up(folder, copy)
        clock.now_ns += 60 * DAY_NS
        await office.keep()
        clock.now_ns -= 60 * DAY_NS
        with pytest.raises(ConfigError, match="clock is behind"):
            await office.receive(ALICE.public_key, FEE, "1")
    for path in folder.glob(f"{FILE_NAME}*"):
        path.unlink()
    restore(copy, folder)
    async with registry(folder, clock) as office:
        asked = office.request_certificate(withdraws=True)
        signed = sign_certificate(ROOT, asked, clock.now_ns, clock.now_ns + 90 * DAY_NS)
        await office.install_certificate(signed.wire)
        await office.receive(ALICE.public_key, FEE, "1")
        assert standing(office, ALICE) == "attested"
        check_log(office)
