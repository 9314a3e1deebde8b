"""Enrolment: an account asks a registry to be enrolled, and agrees to its guidelines.

The account signs a hash of the personal data, not the data: so they can be erased while what was
signed stays whole. The log has of an enrolment only the hash of its id with a salt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.franchise.records import (
    Decision,
    Enrolment,
    EnrolmentForm,
    Name,
    PersonalData,
    RefusalReason,
)
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey
from p2pflop.market.records import Rejected
from p2pflop.units import NS_PER_S
from p2pflop.wire import DEFAULT_NETWORK, Sealed, decode, encode, open_sealed, seal

ENROLMENT_WINDOW_NS: Final = 3600 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Application:
    """A form whose signature and personal data were checked. ``account`` is who signed it."""

    enrolment: Sealed[Enrolment]
    personal: PersonalData

    @property
    def account(self) -> bytes:
        """The public key of the account."""
        return self.enrolment.signer


def make_form(
    account: PrivateKey,
    issuer: bytes,
    guidelines: str,
    personal: PersonalData,
    now_ns: int,
    network: str = DEFAULT_NETWORK,
) -> bytes:
    """The form, encoded. Raises ValueError if ``check_form`` would not take it."""
    enrolment = Enrolment(1, issuer, guidelines, now_ns, content_hash(encode(personal)))
    form = encode(EnrolmentForm(1, seal(enrolment, account, network).wire, personal))
    checked = check_form(form, issuer, guidelines, now_ns, network)
    if isinstance(checked, Rejected):
        raise ValueError(checked.reason)
    return form


def check_form(
    data: bytes, issuer: bytes, guidelines: str, now_ns: int, network: str = DEFAULT_NETWORK
) -> Application | Rejected:
    """A form for ``issuer`` that agrees to the guidelines in force, made about now."""
    try:
        form = decode(EnrolmentForm, data)
        enrolment = open_sealed(Enrolment, form.enrolment, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(f"enrolment: {error.message}")
    record = enrolment.record
    if record.issuer != issuer:
        return Rejected("enrolment is for another registry")
    if record.guidelines != guidelines:
        return Rejected(f"enrolment agrees to other guidelines than those in force: {guidelines}")
    if abs(record.at_ns - now_ns) > ENROLMENT_WINDOW_NS:
        return Rejected("enrolment was not made within the hour: see that the clock is right")
    if record.personal != content_hash(encode(form.personal)):
        return Rejected("enrolment was signed with other personal data")
    if not all(is_plain(text) for text in (form.personal.contact, form.personal.place)):
        return Rejected("contact and place must be printable text on one line")
    if not form.personal.contact.strip():
        return Rejected("enrolment tells no contact")
    return Application(enrolment, form.personal)


def is_name(value: object) -> bool:
    """Whether something may be the name of a network or of a version of guidelines."""
    try:
        msgspec.convert(value, type=Name)
    except msgspec.ValidationError:
        return False
    return True


def is_plain(text: str) -> bool:
    """Whether a text is one line that a terminal or a table can show as it is."""
    return text.isprintable()


def decision_of(enrolment_id: bytes, salt: bytes, reason: RefusalReason | None = None) -> bytes:
    """The body of the leaf that tells how an enrolment was decided; None is yes."""
    return encode(Decision(1, content_hash(salt + enrolment_id), reason or RefusalReason(0)))
