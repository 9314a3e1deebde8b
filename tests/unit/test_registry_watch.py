"""How a node asks registries, what it makes of their answers, and how it enrols."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio

from p2pflop.errors import ConfigError, ProtocolError, ProviderError
from p2pflop.franchise.forks import contradict, make_fork, open_past_head
from p2pflop.franchise.samples import GUIDELINES, SampleRegistry, key
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.node import registry_client, registry_watch
from p2pflop.node.enrolling import Applicant, Enrolling
from p2pflop.node.franchise import Franchise, is_fault
from p2pflop.node.registry_client import HeadReply, HttpFetch, ProofsReply, StandingReply, ask
from p2pflop.node.registry_watch import RegistryWatch
from p2pflop.units import NS_PER_S
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


async def test_a_registry_that_signs_no_new_head_is_told_of(registry: SampleRegistry) -> None:
    now = [NOW_NS]
    made = Franchise({registry.root.public_key: ""}, ME.public_key, NODE, lambda: now[0])
    fetch = SampleFetch(registry)
    enrolling = Enrolling(made, fetch.root, ME, fetch, None, lambda: now[0])
    watching = RegistryWatch(made, fetch.root, fetch, enrolling, lambda: now[0])
    await watching.poll()
    now[0] += registry_watch.STALE_HEAD_NS + 1
    with pytest.raises(ProtocolError, match="1 hour old"):
        await watching.poll()


@pytest.mark.parametrize("behind_s", [20, 3600])
async def test_a_clock_that_is_behind(registry: SampleRegistry, behind_s: int) -> None:
    """Within the tolerance nothing happens; beyond it the node says so, and blames no peer."""
    now_ns = NOW_NS - behind_s * NS_PER_S
    made = Franchise({registry.root.public_key: ""}, ME.public_key, NODE, lambda: now_ns)
    fetch = SampleFetch(registry)
    proof = attest(registry, OTHER)
    enrolling = Enrolling(made, fetch.root, ME, fetch, None, lambda: now_ns)
    watching = RegistryWatch(made, fetch.root, fetch, enrolling, lambda: now_ns)
    if behind_s < 30:
        await watching.poll()
        assert made.roll.standing_by(fetch.root, OTHER) is not None
        assert made.is_attested(OTHER, now_ns)
    else:
        with pytest.raises(ProtocolError, match="from the future"):
            await watching.poll()
        assert not is_fault(made.take(proof))
        assert not is_fault(made.take_peers_head(registry.head()))
        assert not made.is_attested(OTHER, now_ns)
