"""Being enrolled: this node's account asks a registry, waits for its decision, and says so.

Anybody who has an account's key may apply; the node does it if it was told to, and agrees to the
guidelines only if it was told to agree to that version of them. After a refusal it does not ask
again by itself.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.franchise.enrolments import make_form
from p2pflop.franchise.records import PersonalData
from p2pflop.ids import HASH_BYTES
from p2pflop.keys import PrivateKey
from p2pflop.node.delegating import Delegated
from p2pflop.node.franchise import Franchise, is_fault
from p2pflop.node.printable import printable
from p2pflop.node.registry_client import (
    EnrolmentReply,
    Fetch,
    ScheduleReply,
    StandingReply,
    SummaryReply,
    ask,
)
from p2pflop.units import format_usd

REFERENCE_CHARS: Final = 12
ATTESTED: Final = "attested"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Applicant:
    """What an application says. ``agrees`` is the version of the guidelines."""

    contact: str
    place: str
    agrees: str


class Enrolling:
    """How ``account`` stands with the registry ``issuer``. Without ``applicant`` it only looks."""

    def __init__(
        self,
        franchise: Franchise,
        issuer: bytes,
        account: PrivateKey | Delegated,
        fetch: Fetch,
        applicant: Applicant | None,
        now_ns: Callable[[], int],
    ) -> None:
        self._franchise = franchise
        self._issuer = issuer
        self._account = account
        self._fetch = fetch
        self._applicant = applicant
        self._now_ns = now_ns

    @property
    def is_waiting(self) -> bool:
        """Whether the registry is to decide something soon that this node asked for."""
        return self._applicant is not None and bool(self._waits_for)

    @property
    def reference(self) -> str:
        """What a payment of the fee is to be marked with: the beginning of the account's key."""
        return self._account.public_key.hex()[:REFERENCE_CHARS]

    async def step(self) -> None:
        """Ask how the account stands; apply if it is to. Raises as ``ask`` does."""
        waits_for = await self._look()
        if waits_for != self._waits_for:
            name = self._issuer.hex()[:16]
            if waits_for and self._applicant is not None:
                _log.info("registry %s: this account waits for %s", name, waits_for)
            elif not waits_for:
                _log.info("registry %s attests this account", name)
        self._franchise.watched[self._issuer].waits_for = waits_for

    @property
    def _waits_for(self) -> str:
        return self._franchise.watched[self._issuer].waits_for

    async def _look(self) -> str:
        """What the account waits for; empty if it is attested."""
        try:
            standing = await ask(
                self._fetch, StandingReply, f"/v1/attestations/{self._account.public_key.hex()}"
            )
        except LookupError:
            return await self._apply()
        if standing.state == ATTESTED and standing.proof is not None:
            reason = self._franchise.take(bytes.fromhex(standing.proof))
            if is_fault(reason):
                return f"a proof that holds: {printable(reason)}"
            now_ns = self._now_ns()
            held = self._franchise.roll.standing_by(self._issuer, self._account.public_key)
            return "" if held is not None and held.holds(now_ns) else "its time to begin"
        if standing.state == "revoked":
            return f"another enrolment, its attestation was revoked: {self._by_hand()}"
        return await self._details() or printable(standing.waits_for)

    async def _details(self) -> str:
        """What an application is told that strangers are not."""
        enrolment = self._franchise.notes(self._issuer).enrolment
        if not enrolment:
            return ""
        try:
            told = await ask(self._fetch, EnrolmentReply, f"/v1/enrolments/{enrolment.hex()}")
        except LookupError:
            return ""
        if told.state == "refused":
            return (
                f"another enrolment, it was refused ({printable(told.reason)}): {self._by_hand()}"
            )
        if told.missing_nusd:
            amount = format_usd(told.missing_nusd)
            return f"the fee: pay {amount} to its operator with the reference {self.reference}"
        return printable(told.waits_for)

    async def _apply(self) -> str:
        refused = await self._details()
        if refused:
            return refused
        if isinstance(self._account, Delegated):
            return "an enrolment, for which the node that has the account's key can ask"
        if self._applicant is None:
            return "an enrolment: start the node with --enroll"
        schedule = (await ask(self._fetch, SummaryReply, "/v1/registry")).schedule
        if schedule is None:
            return "its first schedule of fees"
        if schedule.guidelines != self._applicant.agrees:
            version = printable(schedule.guidelines)
            return f"your word that you agree to its guidelines {version}: --agree {version}"
        return await self._send(schedule, self._applicant, self._account)

    async def _send(
        self, schedule: ScheduleReply, applicant: Applicant, account: PrivateKey
    ) -> str:
        personal = PersonalData(
            1, secrets.token_bytes(HASH_BYTES), applicant.contact, applicant.place
        )
        try:
            form = make_form(
                account,
                self._issuer,
                schedule.guidelines,
                personal,
                self._now_ns(),
                self._franchise.network,
            )
        except ValueError as error:
            raise ConfigError(f"this cannot be applied with: {error}") from error
        told = await ask(self._fetch, EnrolmentReply, "/v1/enrolments", form)
        if told.id is not None:
            self._franchise.note(self._issuer, enrolment=bytes.fromhex(told.id))
        fee = format_usd(schedule.fee_nusd)
        _log.info("applied to the registry %s, whose fee is %s", self._issuer.hex()[:16], fee)
        return printable(told.waits_for)

    def _by_hand(self) -> str:
        url = self._franchise.watched[self._issuer].url
        return f"p2pflop registry enroll {self._issuer.hex()}@{url}"
