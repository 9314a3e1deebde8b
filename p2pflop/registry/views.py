"""What the registry tells, as JSON: bytes in hex, money in nano-dollars, times in nanoseconds.

Nothing that an applicant wrote is in it but for ``person``, which only the operator is shown.
"""

from __future__ import annotations

from typing import Any

from p2pflop.franchise.records import (
    DAY_NS,
    Certificate,
    PersonalData,
    RefusalReason,
    RevocationReason,
    Schedule,
)
from p2pflop.registry import log
from p2pflop.registry.books import credit_nusd
from p2pflop.registry.log import Query
from p2pflop.registry.office import Office
from p2pflop.wire import decode

Json = dict[str, Any]


def summary(office: Office) -> Json:
    """Everything that a stranger needs to begin with."""
    query = office.query
    schedule = office.schedule()
    certificate = office.certificate()
    return {
        "issuer": office.issuer.hex(),
        "network": office.network,
        "size": log.log_size(query),
        "schedule": None if schedule is None else schedule_view(schedule),
        "certificate": certificate_view(certificate.record),
        "head": (log.newest_head(query) or b"").hex(),
        "refusal_reasons": _names(RefusalReason),
        "revocation_reasons": _names(RevocationReason),
    }


def schedule_view(schedule: Schedule) -> Json:
    """A schedule of fees."""
    return {
        "number": schedule.number,
        "fee_nusd": schedule.fee_nusd,
        "period_ns": schedule.period_ns,
        "max_slots": schedule.max_slots,
        "from_ns": schedule.from_ns,
        "guidelines": schedule.guidelines,
    }


def certificate_view(certificate: Certificate) -> Json:
    """A certificate of the online key."""
    return {
        "number": certificate.number,
        "online_key": certificate.online_key.hex(),
        "valid_from_ns": certificate.valid_from_ns,
        "valid_until_ns": certificate.valid_until_ns,
        "withdraws": certificate.withdraws,
    }


def enrolment_view(office: Office, enrolment_id: bytes) -> Json | None:
    """How an application stands, for whoever knows its id; None if it is not known."""
    query = office.query
    if query("SELECT 1 FROM requests WHERE id = ?", enrolment_id):
        return {"state": "waiting", "waits_for": "the operator's approval"}
    refused = query("SELECT salt, reason, leaf FROM refusals WHERE id = ?", enrolment_id)
    if refused:
        [(salt, reason, leaf)] = refused
        name = RefusalReason(reason).name.lower()
        return {"state": "refused", "reason": name, "leaf": leaf, "salt": bytes(salt).hex()}
    found = query("SELECT account, salt, leaf FROM members WHERE id = ?", enrolment_id)
    if not found:
        return None
    [(account, salt, leaf)] = found
    standing = member_view(office, bytes(account)) or {}
    return {**standing, "leaf": leaf, "salt": bytes(salt).hex()}


def member_view(office: Office, account: bytes) -> Json | None:
    """How an account stands; None if it is not known here."""
    return _account(office, account, office.schedule())


def members_view(office: Office) -> list[Json]:
    """All accounts: those that wait first, then the members."""
    query = office.query
    accounts = [bytes(each) for (each,) in query("SELECT account FROM requests ORDER BY at_ns")]
    accounts += [bytes(each) for (each,) in query("SELECT account FROM members ORDER BY since_ns")]
    schedule = office.schedule()
    views = (_account(office, account, schedule) for account in dict.fromkeys(accounts))
    return [view for view in views if view is not None]


def person(query: Query, account: bytes) -> PersonalData | None:
    """Contact and place of an account, as it told them last, unless they were erased."""
    found = query(
        "SELECT personal FROM people JOIN (SELECT id, 0 AS place FROM requests WHERE account = ?"
        " UNION ALL SELECT id, 1 FROM members WHERE account = ?) USING (id) ORDER BY place LIMIT 1",
        account,
        account,
    )
    return decode(PersonalData, bytes(found[0][0])) if found else None


def _account(office: Office, account: bytes, schedule: Schedule | None) -> Json | None:
    query = office.query
    waiting = query("SELECT id, received_ns FROM requests WHERE account = ?", account)
    if waiting:
        [(enrolment_id, received_ns)] = waiting
        return {
            "account": account.hex(),
            "state": "waiting",
            "id": bytes(enrolment_id).hex(),
            "received_ns": received_ns,
            "waits_for": "the operator's approval",
        }
    found = query(
        "SELECT id, is_revoked, serial, until_ns, due_ns FROM members WHERE account = ?", account
    )
    return _member(office, account, schedule, *found[0]) if found else None


def _member(
    office: Office,
    account: bytes,
    schedule: Schedule | None,
    enrolment_id: bytes,
    is_revoked: int,
    serial: int,
    until_ns: int,
    due_ns: int,
) -> Json:
    now_ns = office.clock()
    credit = credit_nusd(office.query, account)
    fee_nusd = 0 if schedule is None else schedule.fee_nusd
    is_attested = not is_revoked and until_ns > now_ns
    missing_nusd = 0 if is_revoked else max(0, fee_nusd - credit)
    waits_for = ""
    if not is_revoked and not is_attested:
        waits_for = "the fee" if missing_nusd else "the registry's next attestation"
    return {
        "account": account.hex(),
        "state": "revoked" if is_revoked else "attested" if is_attested else "enrolled",
        "id": bytes(enrolment_id).hex(),
        "serial": serial,
        "until_ns": until_ns,
        "days_left": max(0, until_ns - now_ns) // DAY_NS,
        "due_ns": due_ns,
        "credit_nusd": credit,
        "missing_nusd": missing_nusd,
        "waits_for": waits_for,
    }


def _names(kind: type[RefusalReason] | type[RevocationReason]) -> list[str]:
    return [each.name.lower() for each in kind]
