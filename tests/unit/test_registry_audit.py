"""Checked from outside: honest logs pass, and whatever was rewritten is caught and proven."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from p2pflop.errors import ConfigError, ProtocolError, VerificationError
from p2pflop.franchise.auditor import Auditor
from p2pflop.franchise.enrolments import decision_of
from p2pflop.franchise.forks import check_fork
from p2pflop.franchise.issuer import Issuer, encode_leaf
from p2pflop.franchise.records import DAY_NS, LeafKind, RefusalReason
from p2pflop.franchise.samples import YEAR_NS, SampleRegistry, key
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.registry import audit as module
from p2pflop.registry.audit import (
    MAX_REPLY_BYTES,
    Forked,
    HttpSource,
    Memory,
    Report,
    audit,
    parse_address,
    recall,
    remember,
)

ALICE, BOB = key(1).public_key, key(2).public_key
Json = dict[str, Any]


class Shown:
    """What a registry shows; ``replies`` take the place of honest ones."""

    def __init__(self, registry: SampleRegistry, replies: Json | None = None) -> None:
        self.registry = registry
        self.heads = [registry.head(size) for size in range(1, len(registry.leaves) + 1)]
        self.replies = replies or {}

    def get(self, path: str) -> Json:
        name, _, query = path.removeprefix("/v1/").partition("?from=")
        if name in self.replies:
            reply: Json = self.replies[name]
            return reply
        first = int(query or "0")
        registry = self.registry
        told: dict[str, Json] = {
            "registry": {"issuer": registry.root.public_key.hex(), "network": registry.network},
            "certificates": {"certificates": [each.wire.hex() for each in registry.certificates]},
            "head": {"head": self.heads[-1].hex()},
            "heads": {"heads": [each.hex() for each in self.heads[max(0, first - 1) :][:3]]},
            "leaves": {"leaves": [leaf.hex() for leaf in registry.leaves[first : first + 3]]},
        }
        return told[name]


@pytest.fixture
def registry() -> SampleRegistry:
    registry = SampleRegistry()
    registry.publish()
    for number in range(1, 6):
        enrolment = decision_of(bytes([number]) * 32, bytes(32))
        registry.append(LeafKind.ENROLMENT, enrolment)
        registry.attest(key(number).public_key)
    registry.append(LeafKind.REFUSAL, decision_of(bytes(32), bytes([9]) * 32, RefusalReason.LAW))
    registry.revoke(key(5).public_key, 5)
    return registry


def check(shown: Shown, home: Path | None = None, key: bytes | None = None) -> Report | Forked:
    return audit(shown, key, home, NOW_NS)


def convicts(forked: Report | Forked, registry: SampleRegistry) -> None:
    assert isinstance(forked, Forked)
    evidence = check_fork(forked.evidence, Issuer(registry.root.public_key))
    assert not isinstance(evidence, Rejected)


class TestHonest:
    def test_all_is_counted(self, registry: SampleRegistry, tmp_path: Path) -> None:
        report = check(Shown(registry), tmp_path, registry.root.public_key)
        assert isinstance(report, Report)
        assert report.head.record.size == 14
        assert report.heads == 14
        assert report.counts == {
            "certificate": 1,
            "schedule": 1,
            "enrolment": 5,
            "refusal": 1,
            "attestation": 5,
            "revocation": 1,
        }
        assert "first look" in report.compared

    def test_growth_is_no_fork(self, registry: SampleRegistry, tmp_path: Path) -> None:
        check(Shown(registry), tmp_path)
        registry.certify(key(555))
        registry.attest(key(6).public_key)
        report = check(Shown(registry), tmp_path)
        assert isinstance(report, Report)
        assert report.compared == "a remembered head of 14 leaves"

    def test_a_withdrawn_keys_head_is_no_evidence(
        self, registry: SampleRegistry, tmp_path: Path
    ) -> None:
        thief = SampleRegistry()
        thief.publish()
        for number in range(1, 30):
            thief.attest(key(number).public_key)
        assert isinstance(check(Shown(thief), tmp_path), Report)
        registry.certify(key(555), withdraws=True)
        for number in range(40, 70):
            registry.attest(key(number).public_key)
        shown = Shown(registry)
        shown.heads = shown.heads[14:]
        report = check(shown, tmp_path)
        assert isinstance(report, Report)
        assert "withdrawn" in report.compared


class TestForks:
    def test_history_that_was_rewritten(self, registry: SampleRegistry, tmp_path: Path) -> None:
        check(Shown(registry), tmp_path)
        other = SampleRegistry()
        other.publish()
        for number in range(10, 40):
            other.attest(key(number).public_key)
        convicts(check(Shown(other), tmp_path), registry)

    def test_history_of_the_same_length(self, registry: SampleRegistry, tmp_path: Path) -> None:
        check(Shown(registry), tmp_path)
        other = SampleRegistry()
        other.publish()
        for number in range(10, 22):
            other.attest(key(number).public_key)
        convicts(check(Shown(other), tmp_path), registry)

    def test_history_that_was_cut(self, registry: SampleRegistry, tmp_path: Path) -> None:
        check(Shown(registry), tmp_path)
        short = SampleRegistry()
        short.publish()
        shown = Shown(short)
        shown.heads[-1] = short.head(at_ns=NOW_NS + 1)
        convicts(check(shown, tmp_path), registry)

    def test_an_older_state_of_one_history_proves_nothing_and_does_not_pass(
        self, registry: SampleRegistry, tmp_path: Path
    ) -> None:
        shown = Shown(registry)
        size = len(registry.tree)
        registry.attest(key(50).public_key)
        assert isinstance(check(Shown(registry), tmp_path), Report)
        for _ in range(2):
            with pytest.raises(VerificationError, match=f"shows {size} leaves, and has signed"):
                check(shown, tmp_path)

    def test_heads_that_it_shows_itself(self, registry: SampleRegistry) -> None:
        other = SampleRegistry()
        other.publish()
        other.attest(BOB)
        shown = Shown(registry)
        shown.heads[2] = other.head()
        convicts(check(shown), registry)


def as_leaves(*leaves: bytes) -> Json:
    return {"leaves": [leaf.hex() for leaf in leaves]}


class TestLies:
    @pytest.mark.parametrize(
        ("replies", "text"),
        [
            ({"registry": {}}, "issuer"),
            ({"registry": {"issuer": "00", "network": "main"}}, "no root key"),
            ({"registry": {"issuer": 7, "network": "main"}}, "issuer"),
            ({"registry": {"issuer": ALICE.hex(), "network": "../x"}}, "no network"),
            ({"registry": {"issuer": ALICE.hex(), "network": "main"}}, "not by the root key"),
            ({"certificates": {"certificates": "x"}}, "certificates"),
            ({"certificates": {"certificates": ["00"] * 1025}}, "certificates"),
            ({"certificates": {"certificates": []}}, "not by this registry"),
            ({"head": {}}, "head"),
            ({"head": {"head": "zz"}}, "not hex"),
            ({"head": {"head": "00" * 5000}}, "head is none"),
            ({"leaves": {"leaves": []}}, "hides leaf 0 of 14"),
            ({"leaves": {"leaves": [1]}}, "leaves"),
            ({"leaves": {"leaves": ["00"] * 1025}}, "leaves"),
            ({"leaves": as_leaves(b"x")}, "leaf 0 of the registry's log"),
            ({"heads": {"heads": ["00"]}}, "a head of the registry"),
        ],
    )
    def test_in_replies(self, registry: SampleRegistry, replies: Json, text: str) -> None:
        with pytest.raises((ProtocolError, VerificationError), match=text):
            check(Shown(registry, replies))

    def test_another_key_than_was_asked_for(self, registry: SampleRegistry) -> None:
        with pytest.raises(VerificationError, match="not the one that was asked for"):
            check(Shown(registry), key=BOB)

    def test_a_leaf_that_was_changed(self, registry: SampleRegistry) -> None:
        shown = Shown(registry)
        other = encode_leaf(LeafKind.ENROLMENT, NOW_NS, decision_of(bytes(32), bytes([77]) * 32))
        registry.leaves[4] = other
        with pytest.raises(VerificationError, match="not those that its head is about"):
            check(shown)

    def test_heads_without_an_end(self, registry: SampleRegistry) -> None:
        shown = Shown(registry)
        shown.replies["heads"] = {"heads": [shown.heads[3].hex()]}
        with pytest.raises(ProtocolError, match="not in order"):
            check(shown)

    def test_a_log_over_the_limit(
        self, registry: SampleRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_AUDITED_LEAVES", 13)
        with pytest.raises(ProtocolError, match="over 13"):
            check(Shown(registry))


def taken(registry: SampleRegistry) -> str:
    auditor = Auditor(registry.root.public_key)
    for leaf in registry.leaves[:-1]:
        auditor.take(leaf)
    with pytest.raises(VerificationError) as raised:
        auditor.take(registry.leaves[-1])
    return raised.value.message


class TestUnfairness:
    """What a registry could sign and an auditor does not let pass; the last leaf is at fault."""

    @pytest.mark.parametrize(
        ("act", "text"),
        [
            (lambda r: r.attest(ALICE, max_slots=9), "other slots or time"),
            (lambda r: r.attest(BOB, valid_until_ns=NOW_NS + 9**19), "other slots or time"),
            (lambda r: r.attest(key(6).public_key, valid_until_ns=NOW_NS + 1), "slots or time"),
            (lambda r: r.attest(ALICE, valid_until_ns=NOW_NS + 2 * YEAR_NS), "slots or time"),
            (lambda r: r.attest(ALICE, serial=7), "attestation 7 follows attestation 5"),
            (lambda r: r.attest(ALICE, serial=5), "attestation 5 follows attestation 5"),
            (lambda r: r.attest(ALICE, network_id="test"), "for the network 'test'"),
            (lambda r: r.attest(ALICE, issuer=BOB), "names another registry"),
            (lambda r: r.attest(ALICE, signer=key(4)), "not by this registry"),
            (lambda r: r.revoke(ALICE, 2), "not the account's newest"),
            (lambda r: r.revoke(key(77).public_key, 1), "not the account's newest"),
            (lambda r: r.publish(number=3), "does not follow"),
            (lambda r: r.publish(number=2, from_ns=NOW_NS - 1), "into the past"),
            (
                lambda r: r.append(LeafKind.ENROLMENT, decision_of(bytes([1]) * 32, bytes(32))),
                "decided before",
            ),
            (
                lambda r: r.append(
                    LeafKind.ENROLMENT, decision_of(bytes(32), bytes(32), RefusalReason.LAW)
                ),
                "an enrolment has no reason",
            ),
            (lambda r: r.append(LeafKind.REFUSAL, b"x"), "Decision"),
            (lambda r: r.append(LeafKind.CERTIFICATE, b"x"), "certificate"),
            (lambda r: r.append(LeafKind.CERTIFICATE, r.certificates[0].wire), "does not follow"),
            (
                lambda r: r.append(LeafKind.REFUSAL, decision_of(bytes(9), bytes(9)), NOW_NS - 1),
                "older than the one before",
            ),
        ],
    )
    def test_is_named(
        self, registry: SampleRegistry, act: Callable[[SampleRegistry], object], text: str
    ) -> None:
        act(registry)
        assert text in taken(registry)
        assert f"leaf {len(registry.leaves) - 1} of" in taken(registry)

    def test_a_key_that_another_has_followed(self, registry: SampleRegistry) -> None:
        old = registry.online
        registry.certify(key(555))
        registry.attest(ALICE, signer=old)
        assert "another has followed" in taken(registry)

    def test_a_key_whose_time_is_over(self, registry: SampleRegistry) -> None:
        registry.append(LeafKind.ENROLMENT, decision_of(bytes(8), bytes(8)), NOW_NS + 89 * DAY_NS)
        number = registry.attest(BOB, valid_from_ns=NOW_NS + 88 * DAY_NS)
        registry.leaves[number] = encode_leaf(
            LeafKind.ATTESTATION, NOW_NS + 89 * DAY_NS, _body(registry.leaves[number])
        )
        assert "not certified then" in taken(registry)


def _body(leaf: bytes) -> bytes:
    body: bytes = msgspec.msgpack.decode(leaf)[3]
    return body


class Liar(BaseHTTPRequestHandler):
    """Answers every path with what it is named after."""

    def do_GET(self) -> None:
        answers = {
            "/endless": (200, b"[" * (MAX_REPLY_BYTES + 1)),
            "/text": (200, b"<html>"),
            "/list": (200, b"[]"),
            "/deep": (200, b"[" * 100_000),
            "/moved": (302, b"{}"),
            "/fault": (500, b'{"error": {"message": "\\u001b[2J" }}'),
            "/odd": (400, b'{"error": 7}'),
        }
        status, body = answers[self.path]
        self.send_response(status)
        self.send_header("location", "file:///etc/passwd")
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


class TestReplies:
    @pytest.mark.parametrize(
        ("path", "kind", "text"),
        [
            ("/endless", ProtocolError, "over its limit"),
            ("/text", ProtocolError, "not JSON"),
            ("/deep", ProtocolError, "not JSON"),
            ("/list", ProtocolError, "no JSON object"),
            ("/fault", ConfigError, "the registry says"),
            ("/odd", ConfigError, "the registry says: 400"),
            ("/moved", ConfigError, "the registry says: 302"),
        ],
    )
    def test_that_are_none(self, path: str, kind: type[Exception], text: str) -> None:
        with HTTPServer(("127.0.0.1", 0), Liar) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            with pytest.raises(kind, match=text):
                HttpSource(f"http://127.0.0.1:{server.server_port}").get(path)
            thread.join()


class TestMemory:
    def test_written_and_read(self, tmp_path: Path) -> None:
        assert recall(tmp_path, ALICE) is None
        memory = Memory(b"head", (b"one", b"two"))
        remember(tmp_path, ALICE, memory)
        assert recall(tmp_path, ALICE) == memory
        assert recall(tmp_path, BOB) is None

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"head": 1, "certificates": []}'])
    def test_damaged(self, tmp_path: Path, text: str) -> None:
        remember(tmp_path, ALICE, Memory(b"", ()))
        (tmp_path / "registries" / f"{ALICE.hex()}.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            recall(tmp_path, ALICE)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://a:1", (None, "http://a:1")),
        ("https://a.example/reg", (None, "https://a.example/reg")),
        (f"{ALICE.hex()}@https://a", (ALICE, "https://a")),
    ],
)
def test_addresses(text: str, found: tuple[bytes | None, str]) -> None:
    assert parse_address(text) == found


@pytest.mark.parametrize(
    "text", ["", "a", "ftp://a", "file:///etc/passwd", "ab@http://a", "http://a b", "http://u:p@a"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="address of a registry"):
        parse_address(text)
