"""A registry's office in a folder, under a clock that a test sets; who applies there, and how."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from p2pflop.franchise.enrolments import make_form
from p2pflop.franchise.records import PersonalData, Schedule
from p2pflop.franchise.samples import GUIDELINES, YEAR_NS, key
from p2pflop.keys import PrivateKey
from p2pflop.market.samples import NOW_NS
from p2pflop.registry.founding import found_registry
from p2pflop.registry.office import Office, open_office
from p2pflop.registry.schema import FILE_NAME

FEE = 10**9
ROOT = key(900)
ALICE, BOB = key(1), key(2)
CONTACT = "Ada Lovelace <ada@example.org>"


class Clock:
    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns


@asynccontextmanager
async def registry(
    folder: Path, clock: Clock, fee_nusd: int = FEE, network: str = "main"
) -> AsyncIterator[Office]:
    def schedule(issuer: bytes, now_ns: int) -> Schedule:
        return Schedule(1, issuer, 1, fee_nusd, YEAR_NS, 8, now_ns, GUIDELINES)

    if not (folder / FILE_NAME).exists():
        await found_registry(folder, ROOT, network, schedule, clock)
    async with open_office(folder, clock) as office:
        yield office


def form(account: PrivateKey, now_ns: int = NOW_NS, contact: str = CONTACT, salt: int = 0) -> bytes:
    personal = PersonalData(1, salt.to_bytes(32, "big"), contact, "Kent")
    return make_form(account, ROOT.public_key, GUIDELINES, personal, now_ns)


async def enrol(office: Office, account: PrivateKey) -> bytes:
    applied = await office.apply(form(account, office.clock()), "10.0.0.0/24")
    assert isinstance(applied, bytes), applied
    await office.approve(account.public_key)
    return applied
