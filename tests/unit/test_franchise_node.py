"""A node's half of the franchise: its memory, its share of slots, and how it asks registries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pflop.errors import ConfigError, ProtocolError, ProviderError
from p2pflop.franchise.forks import contradict, make_fork, open_past_head
from p2pflop.franchise.records import DAY_NS
from p2pflop.franchise.samples import GUIDELINES, YEAR_NS, SampleRegistry, key
from p2pflop.market.book import MAX_SHEETS_PER_ACCOUNT
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.node import franchise as module
from p2pflop.node import registry_client, registry_watch
from p2pflop.node.config import load_settings
from p2pflop.node.enrolling import Applicant, Enrolling
from p2pflop.node.franchise import Franchise, is_fault
from p2pflop.node.franchise_file import FranchiseFile
from p2pflop.node.registry_client import HeadReply, HttpFetch, ProofsReply, StandingReply, ask
from p2pflop.node.registry_watch import RegistryWatch
from tests.sample_fetch import SampleFetch

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
    strict.on_news = lambda: told.append(1)
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


# Over HTTP


async def serve(
    nursery: trio.Nursery, respond: Callable[[trio.SocketStream], Awaitable[None]]
) -> str:
    """A port on which every request is answered by ``respond``; its URL."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        with trio.move_on_after(30):
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await respond(stream)
        await stream.aclose()

    listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
    return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"


async def test_an_endless_answer_is_cut_off(nursery: trio.Nursery) -> None:
    async def endless(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(b" " * 65_536)

    fetch = HttpFetch(await serve(nursery, endless))
    with pytest.raises(ProtocolError, match="is over"):
        await fetch("/v1/head")
    nursery.cancel_scope.cancel()


async def test_a_slow_answer_is_given_up(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_client, "REPLY_S", 0.5)

    async def slow(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
        while True:
            await stream.send_all(b" ")
            await trio.sleep(0.1)

    fetch = HttpFetch(await serve(nursery, slow))
    with trio.fail_after(10), pytest.raises(ProviderError, match="did not answer in"):
        await fetch("/v1/head")
    nursery.cancel_scope.cancel()


async def test_a_compressed_bomb_is_cut_off(nursery: trio.Nursery) -> None:
    import gzip

    bomb = gzip.compress(bytes(64 * 1024 * 1024))

    async def bombing(stream: trio.SocketStream) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}\r\n\r\n"
        await stream.send_all(head.encode() + bomb)

    fetch = HttpFetch(await serve(nursery, bombing))
    with pytest.raises(ProtocolError, match="is over"):
        await fetch("/v1/head")
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answer", [b"", b"\0" * 100, b"HTTP/1.1 999\r\n\r\n"])
async def test_what_is_no_http_is_told(nursery: trio.Nursery, answer: bytes) -> None:
    async def respond(stream: trio.SocketStream) -> None:
        await stream.send_all(answer)

    fetch = HttpFetch(await serve(nursery, respond))
    with pytest.raises((ProviderError, ProtocolError, ConfigError)):
        await ask(fetch, HeadReply, "/v1/head")
    nursery.cancel_scope.cancel()


async def test_nobody_there_is_told() -> None:
    with pytest.raises(ProviderError, match="does not answer"):
        await HttpFetch("http://127.0.0.1:1")("/v1/head")


@pytest.mark.parametrize(
    ("status", "data", "error"),
    [
        (404, b"{}", LookupError),
        (400, b'{"error": {"message": "no\\u001b[31m"}}', ConfigError),
        (429, b"", ProviderError),
        (503, b"[]", ProviderError),
        (200, b"[]", ProtocolError),
        (200, b'{"head": "0"}', ProtocolError),
        (200, b'{"head": 5}', ProtocolError),
        (200, b"\xff\xfe", ProtocolError),
    ],
)
async def test_answers_are_what_they_may_be(
    status: int, data: bytes, error: type[Exception]
) -> None:
    async def fetch(path: str, body: bytes | None = None) -> tuple[int, bytes]:
        return status, data

    with pytest.raises(error) as caught:
        await ask(fetch, HeadReply, "/v1/head")
    assert "\x1b" not in str(caught.value)


async def test_too_many_proofs_or_too_long_ones_are_refused() -> None:
    async def answer(data: str, _path: str, body: bytes | None = None) -> tuple[int, bytes]:
        return 200, data.encode()

    many = '{"proofs": [' + ", ".join(['"00"'] * (registry_client.MAX_PAGE + 1)) + '], "last": 1}'
    long = '{"proofs": ["' + "00" * 20_000 + '"], "last": 1}'
    for data in (many, long):
        with pytest.raises(ProtocolError):
            await ask(partial(answer, data), ProofsReply, "/v1/attestations?after=0")


# Watching a registry


def watch(made: Franchise, fetch: SampleFetch, applicant: Applicant | None = None) -> RegistryWatch:
    enrolling = Enrolling(made, fetch.root, ME, fetch, applicant, lambda: NOW_NS)
    return RegistryWatch(made, fetch.root, fetch, enrolling, lambda: NOW_NS)


async def test_a_log_is_read_page_by_page_and_then_only_what_is_new(
    registry: SampleRegistry,
) -> None:
    for number in range(230):
        registry.attest(key(1000 + number).public_key)
    registry.revoke(key(1000).public_key, 1)
    made, fetch = franchise(registry), SampleFetch(registry)
    watching = watch(made, fetch)
    await watching.poll()
    assert sum(1 for _ in made.roll.standings(fetch.root)) == 229
    assert not made.is_attested(key(1000).public_key, NOW_NS)
    asked = len(fetch.asked)
    await watching.poll()
    assert [path.split("?")[0] for path in fetch.asked[asked:]] == [
        "/v1/head",
        f"/v1/attestations/{ME.public_key.hex()}",
    ]
    registry.attest(key(2000).public_key)
    await watching.poll()
    assert made.is_attested(key(2000).public_key, NOW_NS)
    assert any("consistency?first=233&second=234" in path for path in fetch.asked)


async def test_a_page_that_comes_again_is_refused(registry: SampleRegistry) -> None:
    registry.attest(OTHER)

    class Repeating(SampleFetch):
        def _page(self, kind: Any, wanted: Any) -> dict[str, Any]:
            return super()._page(kind, lambda *_: True)

    made = franchise(registry)
    with pytest.raises(ProtocolError, match="the same page again"):
        await watch(made, Repeating(registry)).poll()


async def test_proofs_that_do_not_hold_stop_the_reading(registry: SampleRegistry) -> None:
    registry.attest(OTHER, signer=key(5))
    made = franchise(registry)
    with pytest.raises(ProtocolError, match="does not hold"):
        await watch(made, SampleFetch(registry)).poll()
    assert not made.notes(registry.root.public_key).head


@pytest.mark.parametrize("size", [4, 5])
async def test_two_histories_are_proved_by_their_own_consistency(
    registry: SampleRegistry, size: int
) -> None:
    """Of a log that began with a complete tree, and of one that did not."""
    other = SampleRegistry()
    other.publish(fee_nusd=7)
    for each in (registry, other):
        while len(each.tree) < size:
            each.attest(key(len(each.tree)).public_key)
    made, fetch = franchise(registry), SampleFetch(registry)
    await watch(made, fetch).poll()
    for _ in range(3):
        other.attest(OTHER)
    fetch.registry, fetch.at_ns = other, NOW_NS + 1
    await watch(made, fetch).poll()
    fork = made.roll.fork(fetch.root)
    assert fork is not None
    elsewhere = franchise(registry)
    assert not elsewhere.take_fork(fork), "the evidence convinces anybody"
    assert elsewhere.roll.fork(fetch.root) == fork
    assert not made.is_attested(key(2).public_key, NOW_NS)


def test_evidence_made_of_nothing_is_refused(registry: SampleRegistry) -> None:
    made = franchise(registry)
    head = open_past_head(registry.head(), registry.issuer)
    assert not isinstance(head, Rejected)
    assert not contradict(head.record, head.record)
    assert is_fault(made.take_fork(make_fork(head, head, registry.issuer)))
    assert is_fault(made.take_fork(b"\0" * 20_000))


# Enrolling


class Standing(SampleFetch):
    """Answers as it is told about the account."""

    account: tuple[int, dict[str, Any]] = (404, {})
    enrolment: tuple[int, dict[str, Any]] = (404, {})

    def _answer_one(self, path: list[str], body: bytes | None) -> dict[str, Any] | None:
        if path[0] == "enrolments" and body is not None:
            return super()._answer_one(path, body)
        status, answer = self.account if path[0] == "attestations" else self.enrolment
        return answer if status == 200 else None


@pytest.mark.parametrize(
    ("account", "enrolment", "expected"),
    [
        ({"state": "waiting", "waits_for": "the operator's approval"}, None, "approval"),
        ({"state": "revoked"}, None, "its attestation was revoked: p2pflop registry enroll"),
        (None, {"state": "refused", "reason": "law"}, "it was refused (law): p2pflop registry"),
        ({"state": "enrolled"}, {"state": "enrolled", "missing_nusd": 5 * 10**8}, "pay $0.5"),
        ({"state": "enrolled", "waits_for": "the fee"}, None, "the fee"),
        ({"state": "attested", "proof": "00"}, None, "a proof that holds"),
    ],
)
async def test_what_an_account_waits_for(
    registry: SampleRegistry,
    account: dict[str, Any] | None,
    enrolment: dict[str, Any] | None,
    expected: str,
) -> None:
    made, fetch = franchise(registry), Standing(registry)
    fetch.account = (404, {}) if account is None else (200, account)
    fetch.enrolment = (404, {}) if enrolment is None else (200, enrolment)
    if enrolment is not None:
        made.note(fetch.root, enrolment=b"e" * 32)
    enrolling = Enrolling(
        made, fetch.root, ME, fetch, Applicant("ada", "Kent", GUIDELINES), lambda: NOW_NS
    )
    await enrolling.step()
    assert expected in made.watched[fetch.root].waits_for
    assert enrolling.is_waiting
    assert not fetch.applied, "it does not apply by itself again"


async def test_nobody_applies_without_being_told_to(registry: SampleRegistry) -> None:
    made, fetch = franchise(registry), SampleFetch(registry)
    enrolling = Enrolling(made, fetch.root, ME, fetch, None, lambda: NOW_NS)
    await enrolling.step()
    assert "--enroll" in made.watched[fetch.root].waits_for
    assert not enrolling.is_waiting
    assert not fetch.applied


async def test_standing_replies_are_read() -> None:
    async def fetch(path: str, body: bytes | None = None) -> tuple[int, bytes]:
        return 200, b'{"state": "attested", "serial": 1, "days_left": 3, "proof": null}'

    reply = await ask(fetch, StandingReply, "/v1/attestations/00")
    assert (reply.state, reply.proof) == ("attested", None)


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


# Trouble


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


async def test_a_registry_that_signs_no_new_head_is_told_of(registry: SampleRegistry) -> None:
    now = [NOW_NS]
    made = Franchise({registry.root.public_key: ""}, ME.public_key, NODE, lambda: now[0])
    fetch = SampleFetch(registry)
    enrolling = Enrolling(made, fetch.root, ME, fetch, None, lambda: now[0])
    watching = RegistryWatch(made, fetch.root, fetch, enrolling, lambda: now[0])
    await watching.poll()
    now[0] += registry_watch.STALE_HEAD_NS + 1
    with pytest.raises(ProtocolError, match="1 hours old"):
        await watching.poll()
