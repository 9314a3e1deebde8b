"""What an applicant told about itself: where it is shown, and that erasing leaves nothing of it."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from p2pflop.errors import StoreError
from p2pflop.franchise.records import RefusalReason, RevocationReason
from p2pflop.franchise.samples import key
from p2pflop.registry.schema import FILE_NAME
from p2pflop.registry.views import member_view, person
from tests.offices import ALICE, BOB, CONTACT, Clock, enrol, form, registry


@pytest.fixture
def clock() -> Clock:
    return Clock()


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def test_personal_data_are_erased_from_the_disk(tmp_path: Path, clock: Clock) -> None:
    async with registry(tmp_path, clock) as office:
        await enrol(office, ALICE)
        await office.apply(form(BOB, contact="Bob Unlucky"), "a")
        found = person(office.query, ALICE.public_key)
        assert found is not None
        assert found.contact == CONTACT
        assert await office.erase(ALICE.public_key)
        await office.refuse(BOB.public_key, RefusalReason.UNREACHABLE)
        assert person(office.query, ALICE.public_key) is None
        view = member_view(office, ALICE.public_key)
        assert view is not None
        assert view["state"] == "enrolled"
    on_disk = everything_in(tmp_path)
    assert b"Lovelace" not in on_disk
    assert b"Unlucky" not in on_disk


async def test_no_page_keeps_a_copy_of_what_was_erased(tmp_path: Path, clock: Clock) -> None:
    random = Random(3)  # noqa: S311 - a seed
    accounts = [key(number) for number in range(1, 61)]
    async with registry(tmp_path, clock) as office:
        for number, account in enumerate(accounts):
            contact = f"Applicant{number:02d} " + "x" * random.randrange(150)
            await office.apply(form(account, contact=contact), str(number))
        random.shuffle(accounts)
        for account in accounts[:40]:
            await office.erase(account.public_key)
        told = [person(office.query, account.public_key) for account in accounts[40:]]
        on_disk = everything_in(tmp_path)
    kept = {each.contact[:11].encode() for each in told if each is not None}
    assert len(kept) == 20
    assert set(re.findall(rb"Applicant\d\d", on_disk)) == kept


async def test_a_reader_that_holds_up_an_erasure_is_told_of(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pflop.registry.office.BUSY_TIMEOUT_S", 0.01)
    async with registry(tmp_path, clock) as office:
        await enrol(office, ALICE)
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM people").fetchall()
            with pytest.raises(StoreError, match="another program reads"):
                await office.erase(ALICE.public_key)
        assert not await office.erase(ALICE.public_key)
        assert b"Lovelace" not in everything_in(tmp_path)


async def test_who_applies_again_is_shown_with_its_newest_contact(
    tmp_path: Path, clock: Clock
) -> None:
    async with registry(tmp_path, clock, fee_nusd=0) as office:
        for number in range(8):
            account = key(10 + number)
            await enrol(office, account)
            await office.revoke(account.public_key, RevocationReason.OWN_WISH)
            await office.apply(form(account, clock.now_ns + 1, "Ada King", number), "a")
            told = person(office.query, account.public_key)
            assert told is not None
            assert told.contact == "Ada King"
