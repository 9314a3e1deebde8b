"""A node's half of the franchise: its memory, its share of slots, its settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from p2pflop.errors import ConfigError
from p2pflop.franchise.records import DAY_NS
from p2pflop.franchise.samples import YEAR_NS, SampleRegistry, key
from p2pflop.market.book import MAX_SHEETS_PER_ACCOUNT
from p2pflop.market.samples import NOW_NS
from p2pflop.node import franchise as module
from p2pflop.node.config import load_settings
from p2pflop.node.franchise import Franchise, is_fault
from p2pflop.node.franchise_file import FranchiseFile
from p2pflop.node.franchise_service import FranchiseService

ME, OTHER = key(1), key(2).public_key
NODE = key(11).public_key


@pytest.fixture
def registry() -> SampleRegistry:
    made = SampleRegistry()
    made.publish()
    return made


def franchise(registry: SampleRegistry | None, **more: Any) -> Franchise:
    registries = {} if registry is None else {registry.root.public_key: "http://registry.test"}
    return Franchise(registries, ME.public_key, NODE, lambda: NOW_NS, **more)


def attest(registry: SampleRegistry, account: bytes = ME.public_key, **changes: Any) -> bytes:
    return registry.prove(registry.attest(account, **changes))


# Whom it deals with


def test_open_admits_everybody_and_strict_its_own_and_the_attested(
    registry: SampleRegistry,
) -> None:
    opened, strict = franchise(None), franchise(registry)
    assert opened.admits(OTHER, NOW_NS)
    assert not opened.is_strict
    assert not opened.is_attested(OTHER, NOW_NS), "space in the book goes by attestations alone"
    assert strict.admits(ME.public_key, NOW_NS)
    assert not strict.admits(OTHER, NOW_NS)
    assert not strict.take(attest(registry, OTHER))
    assert strict.admits(OTHER, NOW_NS)
    assert not strict.admits(OTHER, NOW_NS + YEAR_NS)
    for each in (ME.public_key, OTHER, bytes(32)):
        assert each in opened.admitted(NOW_NS)
        for now_ns in (NOW_NS, NOW_NS + YEAR_NS):
            assert (each in strict.admitted(now_ns)) == strict.admits(each, now_ns)


def test_why_an_account_is_left_out(registry: SampleRegistry) -> None:
    strict = franchise(registry)
    assert "is not attested by registry 7f59" in strict.standing_of(OTHER)
    strict.take(attest(registry, OTHER))
    assert not strict.standing_of(OTHER)
    strict.take_revocation(registry.prove(registry.revoke(OTHER, registry.serial)))
    assert "was revoked" in strict.standing_of(OTHER)
    assert len(strict.standing_of(OTHER)) <= 200


def test_the_same_attestation_under_another_head_is_no_news(registry: SampleRegistry) -> None:
    strict = franchise(registry)
    told: list[int] = []
    strict.on_news.append(lambda: told.append(1))
    first = attest(registry, OTHER)
    registry.attest(key(3).public_key)
    again = registry.prove(2)
    assert again != first
    assert strict.take(first) == ""
    assert "known" in strict.take(again)
    assert "known" in strict.take(first)
    assert len(told) == 1
    assert strict.news() == ([first], [])


def test_news_grows_old_and_is_bounded(
    registry: SampleRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [NOW_NS]
    strict = Franchise({registry.root.public_key: ""}, ME.public_key, NODE, lambda: now[0])
    for number in range(module.MAX_NEWS + 5):
        strict.take(attest(registry, key(100 + number).public_key))
    assert len(strict.news()[0]) == module.MAX_NEWS
    now[0] += module.NEWS_NS
    assert strict.news() == ([], [])


def test_what_is_a_fault_and_what_is_only_late(registry: SampleRegistry) -> None:
    strict = franchise(registry)
    stranger = SampleRegistry(700)
    late = [
        attest(registry, valid_from_ns=NOW_NS - DAY_NS, valid_until_ns=NOW_NS),
        attest(registry, valid_from_ns=NOW_NS + DAY_NS),
        attest(stranger),
    ]
    lies = [
        attest(registry, signer=key(5)),
        attest(registry, network_id="other"),
        attest(registry)[:-1],
        attest(registry).replace(ME.public_key, OTHER),
        b"",
    ]
    assert not any(is_fault(strict.take(proof)) for proof in late)
    assert all(is_fault(strict.take(proof)) for proof in lies)
    assert not is_fault(strict.take_peers_head(stranger.head()))
    assert is_fault(strict.take_peers_head(registry.head()[:-1]))


# Slots


@pytest.mark.parametrize(
    ("attested", "wanted", "others", "expected"),
    [
        (8, 3, [], 3),
        (2, 3, [], 2),
        (8, 8, [(1, 0)], 7),  # another node that has not said how many takes one
        (8, 8, [(1, 8)], 1),  # its key comes first, and it takes what is left
        (8, 8, [(99, 8)], 7),
        (1, 4, [(1, 1)], 0),
        (1, 4, [(99, 1)], 1),
    ],
)
def test_slots_are_shared_by_an_accounts_nodes(
    registry: SampleRegistry,
    attested: int,
    wanted: int,
    others: list[tuple[int, int]],
    expected: int,
) -> None:
    strict = franchise(registry, slots=wanted)
    assert strict.own_slots() == wanted, "without an attestation nothing was promised"
    strict.take(attest(registry, max_slots=attested))
    keys = []
    for number, slots in others:
        node = number.to_bytes(1, "big") * 32
        assert (node < NODE) == (number == 1)
        if slots:
            strict.note_box(node, slots)
        else:
            keys.append(node)
    assert strict.own_slots(keys) == expected


def test_shares_never_exceed_what_is_attested(registry: SampleRegistry) -> None:
    nodes = [bytes([n]) * 32 for n in range(1, 6)]
    wants = [4, 1, 9, 64, 2]
    for attested in (1, 3, 5, 7, 20, 100):
        proof = attest(registry, max_slots=attested)
        shares = []
        for node, slots in zip(nodes, wants, strict=True):
            strict = Franchise(
                {registry.root.public_key: ""}, ME.public_key, node, lambda: NOW_NS, slots=slots
            )
            strict.take(proof)
            for other, others in zip(nodes, wants, strict=True):
                if other != node:
                    strict.note_box(other, others)
            shares.append(strict.own_slots())
        assert sum(shares) == min(attested, sum(wants))


def test_places_in_the_book(registry: SampleRegistry) -> None:
    strict = franchise(registry)
    assert franchise(None).max_nodes(ME.public_key, NOW_NS) == MAX_SHEETS_PER_ACCOUNT
    assert strict.max_nodes(OTHER, NOW_NS) == MAX_SHEETS_PER_ACCOUNT
    strict.take(attest(registry, OTHER, max_slots=3))
    assert strict.max_nodes(OTHER, NOW_NS) == 3
    for number in range(module.MAX_BOXES + 1):
        strict.note_box(number.to_bytes(32, "big"), 1)
    assert len(strict._boxes) == module.MAX_BOXES


# On disk


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[FranchiseFile]:
    file = FranchiseFile(folder)
    try:
        yield file
    finally:
        await file.aclose()


async def test_everything_comes_back_from_disk(registry: SampleRegistry, tmp_path: Path) -> None:
    strict, issuer = franchise(registry), registry.root.public_key
    strict.take(attest(registry, OTHER))
    strict.take(attest(registry, key(3).public_key, valid_until_ns=NOW_NS + 5))
    strict.take_revocation(registry.prove(registry.revoke(key(4).public_key, 9)))
    strict.note(issuer, serial=7, leaf=8, enrolment=b"e" * 32, head=registry.head())
    async with opened(tmp_path) as file:
        await file.save(strict.take_changes())
    assert not strict.changes
    again = Franchise({issuer: ""}, ME.public_key, NODE, lambda: NOW_NS + 5)
    async with opened(tmp_path) as file:
        kept = file.read([issuer])
        again.restore(kept)
        assert await file.forget_expired(again.roll) == 1
        [rest] = file.read([issuer])
        assert len(rest.attestations) == 1
    assert again.is_attested(OTHER, NOW_NS)
    assert again.roll.taken(issuer, key(4).public_key) is not None
    notes = again.notes(issuer)
    assert (notes.serial, notes.leaf, notes.enrolment) == (7, 8, b"e" * 32)
    assert "revoked" in again.take(attest(registry, key(4).public_key, serial=9))


async def test_what_was_edited_on_disk_is_left_out(
    registry: SampleRegistry, tmp_path: Path
) -> None:
    strict, issuer = franchise(registry), registry.root.public_key
    strict.take(attest(registry, ME.public_key))
    changes = strict.take_changes()
    [(name, proof)] = changes.proofs.items()
    changes.proofs[name] = proof.replace(ME.public_key, OTHER)
    async with opened(tmp_path) as file:
        await file.save(changes)
        again = franchise(registry)
        again.restore(file.read([issuer]))
    assert not again.is_attested(OTHER, NOW_NS)
    assert not again.is_attested(ME.public_key, NOW_NS)


async def test_a_withdrawn_key_stays_withdrawn_over_a_restart(
    registry: SampleRegistry, tmp_path: Path
) -> None:
    strict, issuer = franchise(registry), registry.root.public_key
    stolen = attest(registry, OTHER)
    assert not strict.take(stolen)
    registry.certify(key(555), withdraws=True)
    assert not strict.learn(issuer, (registry.certificates[-1].wire,))
    assert not strict.is_attested(OTHER, NOW_NS)
    async with opened(tmp_path) as file:
        await file.save(strict.take_changes())
        again = franchise(registry)
        again.restore(file.read([issuer]))
    assert not again.is_attested(OTHER, NOW_NS)
    assert "withdrawn" in again.take(stolen)


# Settings

ADDRESS = f"{'ab' * 32}@https://registry.example.org"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"registry": ("https://registry.example.org",)}, "is not a registry"),
        ({"registry": (f"{'ab' * 31}@https://x.org",)}, "is not a registry"),
        ({"registry": (f"{'ab' * 32}@ftp://x.org",)}, "is not a registry"),
        ({"registry": (f"{'ab' * 32}@https://user:pw@x.org",)}, "is not a registry"),
        ({"registry": (ADDRESS, ADDRESS)}, "named twice"),
        ({"registry": tuple(f"{n:064x}@http://x.org" for n in range(17))}, "at most 16"),
        ({"enroll": True, "contact": "ada"}, "no registry to enrol at"),
        ({"enroll": True, "contact": "a", "registry": (ADDRESS,), "is_open": True}, "no registry"),
        ({"enroll": True, "registry": (ADDRESS,)}, "needs a contact"),
        ({"enroll": True, "registry": (ADDRESS,), "contact": "a\nb"}, "one line"),
        ({"enroll": True, "registry": (ADDRESS,), "contact": "a" * 401}, "one line"),
        ({"registry": (ADDRESS,), "forgive": ("cd" * 32,)}, "not the root key"),
        ({"registry": (ADDRESS,), "forgive": ("zz",)}, "not the root key"),
    ],
)
def test_bad_settings_are_told(tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_settings({"home": tmp_path, **given})


def test_settings_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'registry = ["{ADDRESS}"]\ncontact = "ada"\n')
    settings = load_settings({"home": tmp_path, "enroll": True, "agree": "1"})
    assert settings.registries() == {b"\xab" * 32: "https://registry.example.org"}
    assert load_settings({"home": tmp_path, "is_open": True}).registries() == {}
    (tmp_path / "config.toml").write_text(f'registry = ["{ADDRESS}"]\nopen = true\n')
    assert load_settings({"home": tmp_path}).registries() == {}


def test_a_head_by_a_key_that_is_not_known_yet_is_no_fault(registry: SampleRegistry) -> None:
    stranger = franchise(registry)
    assert not is_fault(stranger.take_peers_head(registry.head()))
    assert stranger.roll.head(registry.root.public_key) is None


async def test_what_could_not_be_written_is_written_later(
    registry: SampleRegistry, tmp_path: Path
) -> None:
    made, issuer = franchise(registry), registry.root.public_key
    made.take(attest(registry, OTHER))
    lost = made.take_changes()
    made.keep_changes(lost)
    made.note(issuer, serial=5)
    async with opened(tmp_path) as file:
        await file.save(made.take_changes())
        [kept] = file.read([issuer])
    assert (len(kept.attestations), kept.notes.serial) == (1, 5)


def test_the_days_that_are_left_are_logged_once_a_day(
    registry: SampleRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    now_ns = NOW_NS
    registries = {registry.root.public_key: "http://registry.test"}
    strict = Franchise(registries, ME.public_key, NODE, lambda: now_ns)
    service = FranchiseService(strict, *[MagicMock() for _ in range(5)])
    service.say_days_left()
    assert not caplog.records
    strict.take(attest(registry, valid_until_ns=NOW_NS + 14 * DAY_NS))
    with caplog.at_level("INFO"):
        for hours in (0, 1, 13, 24 * 14):
            now_ns = NOW_NS + hours * DAY_NS // 24
            service.say_days_left()
            service.say_days_left()
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [
        ("INFO", "this account is attested for 14 more days"),
        ("WARNING", "this account is attested for 13 more days"),
        ("WARNING", "this account is attested no more: strict nodes leave its asks out"),
    ]
