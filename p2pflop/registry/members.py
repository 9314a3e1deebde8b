"""Who asked to be enrolled, who is, and who holds an attestation: steps of a ``Draft``."""

from __future__ import annotations

from typing import Final

from p2pflop.errors import ConfigError, MarketError
from p2pflop.franchise.enrolments import Application, decision_of
from p2pflop.franchise.fees import due_ns, next_period, schedule_at
from p2pflop.franchise.records import (
    DAY_NS,
    MAX_PERIOD_NS,
    MAX_SLOTS,
    MIN_PERIOD_NS,
    Attestation,
    LeafKind,
    RefusalReason,
    Revocation,
    RevocationReason,
    Schedule,
)
from p2pflop.market.records import Rejected
from p2pflop.registry.books import book_fee, credit_nusd
from p2pflop.registry.draft import Draft
from p2pflop.registry.log import Query
from p2pflop.units import format_usd
from p2pflop.wire import encode

MAX_WAITING: Final = 4096
MAX_WAITING_PER_SUBNET: Final = 64
WAITING_FOR_NS: Final = 30 * DAY_NS
MAX_ISSUED_AT_ONCE: Final = 50


def request(draft: Draft, application: Application, subnet: str, salt: bytes) -> Rejected | None:
    """Let an application wait for the operator; None if it does, also if it did already.

    An account's newer application takes the place of its older one.
    """
    account, sealed = application.account, application.enrolment
    if draft.query("SELECT 1 FROM requests WHERE id = ?", sealed.id):
        return None
    if draft.query("SELECT 1 FROM members WHERE id = ?", sealed.id):
        return None
    if draft.query("SELECT 1 FROM refusals WHERE id = ?", sealed.id):
        return None
    if draft.query("SELECT 1 FROM members WHERE account = ? AND NOT is_revoked", account):
        return Rejected("the account is enrolled already")
    older = draft.query("SELECT id, at_ns FROM requests WHERE account = ?", account)
    if older and older[0][1] >= sealed.record.at_ns:
        return Rejected("a newer enrolment of the account waits already")
    full = None if older else _full(draft, subnet)
    if full is not None:
        return full
    for old_id, _ in older:
        draft.connection.execute("DELETE FROM people WHERE id = ?", (old_id,))
    draft.connection.execute(
        "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)",
        (account, sealed.id, sealed.wire, salt, subnet, sealed.record.at_ns, draft.clock_ns),
    )
    draft.connection.execute(
        "INSERT INTO people VALUES (?, ?)", (sealed.id, encode(application.personal))
    )
    return None


def approve(draft: Draft, account: bytes) -> None:
    """Enrol an account, and attest it if nothing has to be paid. Raises ConfigError."""
    found = draft.query("SELECT id, wire, salt FROM requests WHERE account = ?", account)
    if not found:
        if draft.query("SELECT 1 FROM members WHERE account = ? AND NOT is_revoked", account):
            return
        raise _unknown(account)
    enrolment_id, wire, salt = (bytes(value) for value in found[0])
    leaf = draft.append(LeafKind.ENROLMENT, decision_of(enrolment_id, salt))
    before = draft.query("SELECT id, serial FROM members WHERE account = ?", account)
    serial = before[0][1] if before else 0
    for old_id, _ in before:
        draft.connection.execute("DELETE FROM people WHERE id = ?", (old_id,))
    draft.connection.execute(
        "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, 0, ?, 0, 0)",
        (account, enrolment_id, wire, salt, leaf, draft.now_ns, serial),
    )
    draft.connection.execute("DELETE FROM requests WHERE account = ?", (account,))
    issue(draft, account)


def refuse(draft: Draft, account: bytes, reason: RefusalReason) -> None:
    """Refuse an account that waits, and forget its personal data. Raises ConfigError."""
    found = draft.query("SELECT id, salt FROM requests WHERE account = ?", account)
    if not found:
        if draft.query("SELECT 1 FROM refusals WHERE account = ?", account):
            return
        raise _unknown(account)
    enrolment_id, salt = (bytes(value) for value in found[0])
    leaf = draft.append(LeafKind.REFUSAL, decision_of(enrolment_id, salt, reason))
    draft.connection.execute(
        "INSERT INTO refusals VALUES (?, ?, ?, ?, ?, ?)",
        (enrolment_id, account, salt, int(reason), leaf, draft.now_ns),
    )
    draft.connection.execute("DELETE FROM requests WHERE account = ?", (account,))
    draft.connection.execute("DELETE FROM people WHERE id = ?", (enrolment_id,))
    _rewrite_people(draft)


def erase(draft: Draft, account: bytes) -> bool:
    """Forget the contact and place of an account; whether there were any."""
    erased = draft.connection.execute(
        "DELETE FROM people WHERE id IN (SELECT id FROM members WHERE account = ?"
        " UNION SELECT id FROM requests WHERE account = ?)",
        (account, account),
    )
    _rewrite_people(draft)
    return erased.rowcount > 0


def has_old_requests(query: Query, clock_ns: int) -> bool:
    """Whether ``forget_requests`` would drop any."""
    before_ns = clock_ns - WAITING_FOR_NS
    return bool(query("SELECT 1 FROM requests WHERE received_ns < ? LIMIT 1", before_ns))


def forget_requests(draft: Draft) -> int:
    """Drop applications that nobody decided for ``WAITING_FOR_NS``; how many."""
    before_ns = draft.clock_ns - WAITING_FOR_NS
    draft.connection.execute(
        "DELETE FROM people WHERE id IN (SELECT id FROM requests WHERE received_ns < ?)",
        (before_ns,),
    )
    gone = draft.connection.execute("DELETE FROM requests WHERE received_ns < ?", (before_ns,))
    _rewrite_people(draft)
    return gone.rowcount


def issue(draft: Draft, account: bytes) -> Attestation | None:
    """The next attestation of a member, if it is due and paid for; None if it is not."""
    found = draft.query(
        "SELECT until_ns, due_ns FROM members WHERE account = ? AND NOT is_revoked", account
    )
    schedule = schedule_at(draft.schedules(), draft.now_ns)
    if not found or schedule is None:
        return None
    until_ns, due = found[0]
    if due > draft.now_ns or credit_nusd(draft.query, account) < schedule.fee_nusd:
        return None
    return _issue(draft, account, schedule, until_ns)


def issue_all(draft: Draft) -> list[Attestation]:
    """``issue`` for members that are due, up to ``MAX_ISSUED_AT_ONCE`` of them."""
    schedule = schedule_at(draft.schedules(), draft.now_ns)
    if schedule is None:
        return []
    found = draft.query(
        "SELECT account, until_ns FROM members WHERE NOT is_revoked AND due_ns <= ? AND"
        " (SELECT -COALESCE(SUM(amount_nusd), 0) FROM postings"
        "  WHERE postings.account = members.account AND kind = 0) >= ?"
        " LIMIT ?",
        draft.now_ns,
        schedule.fee_nusd,
        MAX_ISSUED_AT_ONCE,
    )
    return [_issue(draft, bytes(account), schedule, until_ns) for account, until_ns in found]


def revoke(draft: Draft, account: bytes, reason: RevocationReason) -> int:
    """Take back all attestations of an account; the highest serial. Raises ConfigError.

    The account is enrolled no more. A later enrolment of it can be approved.
    """
    found = draft.query("SELECT serial, is_revoked FROM members WHERE account = ?", account)
    if not found:
        raise _unknown(account)
    serial, is_revoked = found[0]
    if is_revoked:
        return int(serial)
    if serial:
        record = Revocation(1, draft.issuer, account, serial, reason, draft.now_ns)
        leaf = draft.append(LeafKind.REVOCATION, draft.sign(record))
        draft.connection.execute(
            "INSERT INTO revocations VALUES (?, ?, ?)", (leaf, account, serial)
        )
        draft.connection.execute(
            "UPDATE attestations SET is_revoked = 1 WHERE account = ?", (account,)
        )
    draft.connection.execute(
        "UPDATE members SET is_revoked = 1, until_ns = 0 WHERE account = ?", (account,)
    )
    return int(serial)


def publish(draft: Draft, schedule: Schedule) -> None:
    """Publish a schedule that is signed here. Raises ConfigError if it reaches into the past, or
    has a period, slots or a name that none may have."""
    if schedule.from_ns < draft.now_ns:
        raise ConfigError("a schedule holds from now on or later, never from before")
    try:
        wire = draft.sign(schedule)
    except ValueError as error:
        raise ConfigError(
            f"no schedule can be so: {error}",
            hint=f"A period is {MIN_PERIOD_NS // DAY_NS} to {MAX_PERIOD_NS // DAY_NS} days, the "
            f"slots are 1 to {MAX_SLOTS}, and a version is of letters, digits, dot, _ and -.",
        ) from error
    draft.append(LeafKind.SCHEDULE, wire)
    draft.connection.execute("INSERT INTO schedules VALUES (?, ?)", (schedule.number, wire))


def what_is_due(draft: Draft, account: bytes) -> str:
    """Why ``issue`` gives a member nothing now, in words."""
    schedule = schedule_at(draft.schedules(), draft.now_ns)
    if schedule is None:
        raise MarketError(
            "no schedule of fees holds yet", hint="Publish one: p2pflop registry fee USD."
        )
    credit = credit_nusd(draft.query, account)
    if credit < schedule.fee_nusd:
        missing = format_usd(schedule.fee_nusd - credit)
        return f"{missing} of the fee of {format_usd(schedule.fee_nusd)} is not paid"
    return "it is attested, and the next period is not due yet"


def _issue(draft: Draft, account: bytes, schedule: Schedule, until_ns: int) -> Attestation:
    [(last,)] = draft.query("SELECT COALESCE(MAX(serial), 0) FROM attestations")
    period = next_period(schedule, until_ns, draft.now_ns)
    record = Attestation(
        version=1,
        issuer=draft.issuer,
        network_id=draft.network,
        account=account,
        max_slots=schedule.max_slots,
        valid_from_ns=period.valid_from_ns,
        valid_until_ns=period.valid_until_ns,
        serial=last + 1,
    )
    book_fee(draft.connection, account, schedule.fee_nusd, record.serial, draft.now_ns)
    leaf = draft.append(LeafKind.ATTESTATION, draft.sign(record))
    draft.connection.execute(
        "INSERT INTO attestations VALUES (?, ?, ?, ?, 0)",
        (record.serial, account, leaf, record.valid_until_ns),
    )
    draft.connection.execute(
        "UPDATE members SET serial = ?, until_ns = ?, due_ns = ? WHERE account = ?",
        (
            record.serial,
            record.valid_until_ns,
            due_ns(schedule, record.valid_until_ns),
            account,
        ),
    )
    return record


def _rewrite_people(draft: Draft) -> None:
    """Write the personal data that are left anew, after freeing every page that held some.

    SQLite's ``secure_delete`` overwrites a deleted row and a freed page, but not the copies that
    stay behind in a page whose rows were moved to another.
    """
    left = draft.query("SELECT id, personal FROM people ORDER BY id")
    draft.connection.execute("DELETE FROM people")
    draft.connection.executemany("INSERT INTO people VALUES (?, ?)", left)


def _full(draft: Draft, subnet: str) -> Rejected | None:
    [(waiting,)] = draft.query("SELECT COUNT(*) FROM requests")
    if waiting >= MAX_WAITING:
        return Rejected("busy: too many enrolments wait already")
    [(near,)] = draft.query("SELECT COUNT(*) FROM requests WHERE subnet = ?", subnet)
    if near >= MAX_WAITING_PER_SUBNET:
        return Rejected("busy: too many enrolments from this network wait already")
    return None


def _unknown(account: bytes) -> ConfigError:
    return ConfigError(
        f"no account {account.hex()[:12]} here that this is about",
        hint="See 'p2pflop registry list'.",
    )
