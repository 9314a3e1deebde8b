"""The registry's office: every decision, and everything that it tells.

Several processes may have the same registry open: the service, and the operator's commands beside
it. Each decision is one transaction of SQLite's, which has one writer at a time, and no process
remembers what another could change: there is nothing to tell each other.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Final, TypeVar

import trio

from p2pflop.dht.database import BUSY_TIMEOUT_S, Database
from p2pflop.errors import ConfigError, StoreError, VerificationError
from p2pflop.franchise.enrolments import check_form
from p2pflop.franchise.fees import schedule_at
from p2pflop.franchise.issuer import Issuer
from p2pflop.franchise.records import (
    Attestation,
    Certificate,
    CertificateRequest,
    RefusalReason,
    RevocationReason,
    Schedule,
)
from p2pflop.ids import HASH_BYTES
from p2pflop.keys import PrivateKey
from p2pflop.market.records import Rejected
from p2pflop.registry import members
from p2pflop.registry.books import book_payment, book_return
from p2pflop.registry.certifying import install, newest_certificate, request_certificate
from p2pflop.registry.draft import Draft, record_of
from p2pflop.registry.home import load_online, next_online, require
from p2pflop.registry.log import Query, head_time
from p2pflop.registry.schema import FORMAT, SCHEMA
from p2pflop.units import NS_PER_S
from p2pflop.wire import Sealed

HEAD_EVERY_NS: Final = 600 * NS_PER_S
"""The service signs a head at least so often: who is shown only an older one can tell."""

T = TypeVar("T")


class Office:
    """``clock`` gives nanoseconds of Unix time. Every method raises StoreError if the disk fails,
    ConfigError for what the operator did wrong."""

    def __init__(self, folder: Path, database: Database, clock: Callable[[], int]) -> None:
        self.folder = folder
        self.clock = clock
        self._database = database
        facts = {name: bytes(value) for name, value in self.query("SELECT * FROM facts")}
        if "issuer" not in facts:
            raise ConfigError(
                f"the registry in {folder} was not made to its end",
                hint="Make it again: p2pflop registry init.",
            )
        self.issuer = facts["issuer"]
        self.network = facts["network"].decode()

    @property
    def query(self) -> Query:
        """Short look-ups, of what is on disk."""
        return self._database.read

    # What is known

    def certificate(self) -> Sealed[Certificate]:
        """The newest one."""
        found = newest_certificate(self.query, self.issuer, self.network)
        if found is None:
            raise VerificationError("this registry has no certificate")
        return found

    def known_issuer(self) -> Issuer:
        """This registry as others know it, with all certificates."""
        wires = self.query("SELECT wire FROM certificates ORDER BY number")
        known = Issuer(self.issuer, self.network).learn_all(tuple(bytes(wire) for (wire,) in wires))
        if isinstance(known, Rejected):
            raise VerificationError(f"the certificates here do not hold: {known.reason}")
        return known

    def schedules(self) -> list[tuple[Schedule, bytes]]:
        """Every schedule with its envelope, the first one first."""
        found = self.query("SELECT wire FROM schedules ORDER BY number")
        return [(record_of(Schedule, bytes(wire)), bytes(wire)) for (wire,) in found]

    def schedule(self) -> Schedule | None:
        """What holds now, by the clock or by the log, if that is ahead."""
        now_ns = max(self.clock(), head_time(self.query))
        return schedule_at((schedule for schedule, _ in self.schedules()), now_ns)

    def guidelines(self) -> str:
        """The version of the guidelines that applicants agree to now."""
        schedule = self.schedule()
        if schedule is None:
            raise ConfigError("this registry has no schedule of fees yet")
        return schedule.guidelines

    # Enrolment

    async def apply(self, form: bytes, subnet: str) -> bytes | Rejected:
        """Take an application from anywhere; its id. The same one again changes nothing."""
        checked = check_form(form, self.issuer, self.guidelines(), self.clock(), self.network)
        if isinstance(checked, Rejected):
            return checked
        salt = secrets.token_bytes(HASH_BYTES)
        refused = await self._write(
            lambda draft: members.request(draft, checked, subnet, salt), signs=False
        )
        return refused or checked.enrolment.id

    async def approve(self, account: bytes) -> None:
        """Enrol an account that waits; a second time it changes nothing."""
        await self._write(lambda draft: members.approve(draft, account))

    async def refuse(self, account: bytes, reason: RefusalReason) -> None:
        """Refuse an account that waits, and erase its personal data."""
        await self._write(lambda draft: members.refuse(draft, account, reason))
        await self._scrub()

    async def erase(self, account: bytes) -> bool:
        """Erase contact and place of an account, on disk too; whether there were any."""
        erased = await self._write(lambda draft: members.erase(draft, account), signs=False)
        await self._scrub()
        return erased

    # Fees and attestations

    async def publish(
        self,
        fee_nusd: int,
        period_ns: int,
        max_slots: int,
        guidelines: str,
        from_ns: int | None = None,
    ) -> Schedule:
        """The next schedule of fees, from now on if ``from_ns`` does not say later."""

        def operation(draft: Draft) -> Schedule:
            known = draft.schedules()
            schedule = Schedule(
                version=1,
                issuer=draft.issuer,
                number=known[-1].number + 1 if known else 1,
                fee_nusd=fee_nusd,
                period_ns=period_ns,
                max_slots=max_slots,
                from_ns=draft.now_ns if from_ns is None else from_ns,
                guidelines=guidelines,
            )
            members.publish(draft, schedule)
            return schedule

        return await self._write(operation)

    async def receive(
        self, account: bytes, amount_nusd: int, reference: str
    ) -> tuple[bool, Attestation | None]:
        """Book money that came: whether it is new, and the attestation that it brought.

        A reference is booked once, so that a command that was cut off can be given again.
        """

        def operation(draft: Draft) -> tuple[bool, Attestation | None]:
            if not draft.query("SELECT 1 FROM members WHERE account = ?", account):
                raise ConfigError(
                    f"account {account.hex()[:12]} is not enrolled here",
                    hint="Approve it first: p2pflop registry approve ACCOUNT.",
                )
            is_new = book_payment(draft.connection, account, amount_nusd, reference, draft.now_ns)
            return is_new, members.issue(draft, account)

        return await self._write(operation)

    async def give_back(self, account: bytes, reference: str) -> int:
        """Book that a payment was returned; its amount, 0 if that is booked already."""
        return await self._write(
            lambda draft: book_return(draft.connection, account, reference, draft.now_ns)
        )

    async def attest(self, account: bytes) -> tuple[Attestation | None, str]:
        """Attest a member if it is due and paid; else None, and why."""

        def operation(draft: Draft) -> tuple[Attestation | None, str]:
            if not draft.query(
                "SELECT 1 FROM members WHERE account = ? AND NOT is_revoked", account
            ):
                raise ConfigError(f"account {account.hex()[:12]} is not enrolled here")
            issued = members.issue(draft, account)
            return issued, "" if issued else members.what_is_due(draft, account)

        return await self._write(operation)

    async def attest_due(self) -> list[Attestation]:
        """Attest members that are due and have paid, in bounded steps; those of this step."""
        return await self._write(members.issue_all)

    async def revoke(self, account: bytes, reason: RevocationReason) -> int:
        """Take back what an account was attested; the highest serial, 0 if there was none."""
        return await self._write(lambda draft: members.revoke(draft, account, reason))

    # Keys and upkeep

    def request_certificate(self, *, withdraws: bool) -> CertificateRequest:
        """What to have signed by the root key; makes the next online key if there is none."""
        load_online(self.folder, self.certificate().record.online_key)
        key = next_online(self.folder)
        return request_certificate(
            self.query, self.issuer, self.network, key.public_key, withdraws=withdraws
        )

    async def install_certificate(self, wire: bytes) -> Sealed[Certificate]:
        """Take up a certificate, and from now on sign with its key."""

        def operation(draft: Draft) -> Sealed[Certificate]:
            return install(draft, wire)

        known = self.certificate()
        if known.wire == wire:
            return known
        installed = await self._write(operation, online=next_online(self.folder))
        load_online(self.folder, installed.record.online_key)
        return installed

    async def keep(self) -> int:
        """What the service does every few seconds: renew, freshen the head, forget old requests.

        Returns how many attestations it issued.
        """
        issued = 0
        while step := await self.attest_due():
            issued += len(step)
        forgotten = 0
        if members.has_old_requests(self.query, self.clock()):
            forgotten = await self._write(members.forget_requests, signs=False)
        if forgotten:
            await self._scrub()
        if self.clock() - head_time(self.query) >= HEAD_EVERY_NS:
            await self._write(Draft.sign_head)
        return issued

    async def _write(
        self,
        operation: Callable[[Draft], T],
        *,
        signs: bool = True,
        online: PrivateKey | None = None,
    ) -> T:
        """One decision. ``signs`` loads the key that is certified now, unless one is given."""

        def run(connection: sqlite3.Connection) -> T:
            draft = Draft(connection, online, self.clock())
            if signs and online is None:
                draft.load_key(self.folder)
            result = operation(draft)
            draft.finish()
            return result

        return await self._database.write(run)

    async def _scrub(self) -> None:
        """Make what was erased unreadable in the write-ahead log too (``secure_delete`` is on)."""
        if not await trio.to_thread.run_sync(_empty_log, self._database.path):
            raise StoreError(
                "what was erased is in the write-ahead log yet: another program reads the registry",
                hint="Let it end (a backup, an sqlite3 shell), and give the command again.",
            )


def _empty_log(path: Path) -> bool:
    """Whether nothing is left in the write-ahead log."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)) as connection:
        [(is_busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not is_busy


@asynccontextmanager
async def open_office(
    folder: Path, clock: Callable[[], int] = time.time_ns
) -> AsyncIterator[Office]:
    """The registry in ``folder``. Raises ConfigError if there is none."""
    database = Database(require(folder), SCHEMA, FORMAT)
    try:
        await database.write(lambda connection: connection.execute("PRAGMA secure_delete = ON"))
        yield Office(folder, database, clock)
    finally:
        await database.aclose()
