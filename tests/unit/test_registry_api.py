"""What the registry answers over HTTP, and what it does not put up with."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from p2pflop.franchise.issuer import Issuer
from p2pflop.franchise.merkle import is_consistent
from p2pflop.franchise.proofs import Attested, check_attestation, check_proof, check_revocation
from p2pflop.franchise.records import MAX_FORM_BYTES, Head, RefusalReason, RevocationReason
from p2pflop.franchise.samples import key
from p2pflop.market.records import Rejected
from p2pflop.registry import api as module
from p2pflop.registry import log, members
from p2pflop.registry.api import APPLY_BURST, subnet_of
from p2pflop.registry.office import Office
from p2pflop.wire import open_sealed
from tests.serving_registry import FEE, ROOT, LiveRegistry, form

ALICE, BOB = key(1), key(2)
LATER_NS = 2**62
STRANGER = Issuer(ROOT.public_key)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[LiveRegistry]:
    live = LiveRegistry(tmp_path / "registry").start()
    yield live
    live.stop()


@pytest.fixture
def client(registry: LiveRegistry) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=registry.url) as client:
        yield client


def get(client: httpx.Client, path: str) -> Any:
    response = client.get(path)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    return response.json()


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert "Traceback" not in response.text
    return f"{told['kind']}: {told['message']}"


def test_all_that_a_stranger_needs(registry: LiveRegistry, client: httpx.Client) -> None:
    registry.enrol(ALICE)
    told = get(client, "/v1/registry")
    assert told["issuer"] == ROOT.public_key.hex()
    assert told["schedule"]["fee_nusd"] == FEE
    assert told["size"] == 4
    standing = get(client, f"/v1/attestations/{ALICE.public_key.hex()}")
    assert (standing["state"], standing["days_left"]) == ("attested", 364)
    now_ns = open_sealed(Head, bytes.fromhex(told["head"])).record.at_ns
    proof = bytes.fromhex(standing["proof"])
    assert isinstance(check_attestation(proof, STRANGER, now_ns, ALICE.public_key), Attested)
    assert "contact" not in standing
    assert "Ada" not in client.get("/v1/leaves").text


def test_pages(
    registry: LiveRegistry, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PAGE_LEAVES", 3)
    monkeypatch.setattr(log, "PAGE_HEADS", 3)
    monkeypatch.setattr(log, "PAGE_PROOFS", 2)
    for number in range(1, 6):
        registry.enrol(key(number))
    size = get(client, "/v1/registry")["size"]
    assert size == 12
    leaves: list[str] = []
    while page := get(client, f"/v1/leaves?from={len(leaves)}")["leaves"]:
        assert len(page) <= 3
        leaves += page
    assert len(leaves) == size
    assert len(get(client, "/v1/heads?from=0")["heads"]) == 3
    assert get(client, f"/v1/heads?from={size + 1}") == {"heads": []}
    first = get(client, "/v1/attestations")
    assert len(first["proofs"]) == 2
    rest = get(client, f"/v1/attestations?after={first['last'] + 2}")
    assert (len(rest["proofs"]), rest["last"]) == (1, 5)
    assert get(client, "/v1/attestations?after=5") == {"proofs": [], "last": 0}


def test_every_leaf_is_proven(registry: LiveRegistry, client: httpx.Client) -> None:
    registry.enrol(ALICE)
    for number in range(4):
        proof = bytes.fromhex(get(client, f"/v1/proofs/{number}")["proof"])
        assert not isinstance(check_proof(proof, STRANGER, LATER_NS), Rejected)
    assert "no leaf 4" in error(client.get("/v1/proofs/4"), 404)
    heads = [
        open_sealed(Head, bytes.fromhex(each)).record
        for each in get(client, "/v1/heads?from=0")["heads"]
    ]
    assert [head.size for head in heads] == [2, 3, 4]
    path = get(client, "/v1/consistency?first=2&second=4")["path"]
    hashes = [bytes.fromhex(each) for each in path]
    assert is_consistent(2, heads[0].root, 4, heads[2].root, hashes)


def test_a_revocation_is_told_with_its_proof(registry: LiveRegistry, client: httpx.Client) -> None:
    registry.enrol(ALICE)

    async def revoke(office: Office) -> None:
        await office.revoke(ALICE.public_key, RevocationReason.UNPAID)

    registry.do(revoke)
    [proof] = get(client, "/v1/revocations")["proofs"]
    revoked = check_revocation(bytes.fromhex(proof), STRANGER, LATER_NS)
    assert not isinstance(revoked, Rejected)
    assert revoked.revocation.account == ALICE.public_key
    assert get(client, "/v1/attestations")["proofs"] == []
    assert get(client, f"/v1/attestations/{ALICE.public_key.hex()}")["state"] == "revoked"


def test_an_applicant_is_told_what_it_waits_for(
    registry: LiveRegistry, client: httpx.Client
) -> None:
    applied = client.post("/v1/enrolments", content=form(ALICE))
    assert applied.status_code == 202
    told = applied.json()
    assert told["waits_for"] == "the operator's approval"
    way = f"/v1/enrolments/{told['id']}"
    assert get(client, way)["state"] == "waiting"

    async def approve(office: Office) -> None:
        await office.approve(ALICE.public_key)

    async def refuse(office: Office) -> None:
        await office.refuse(BOB.public_key, RefusalReason.GUIDELINES)

    registry.do(approve)
    found = get(client, way)
    assert (found["state"], found["waits_for"], found["missing_nusd"]) == (
        "enrolled",
        "the fee",
        FEE,
    )
    other = client.post("/v1/enrolments", content=form(BOB)).json()["id"]
    registry.do(refuse)
    refused = get(client, f"/v1/enrolments/{other}")
    assert (refused["state"], refused["reason"]) == ("refused", "guidelines")
    assert "no such application" in error(client.get(f"/v1/enrolments/{bytes(32).hex()}"), 404)


class TestHostileInput:
    @pytest.mark.parametrize(
        "path",
        [
            "/v1/leaves?from=-1",
            "/v1/leaves?from=1e3",
            "/v1/leaves?from=9999999999999999999",
            "/v1/leaves?from=٣",
            "/v1/heads?from=1%27%20OR%201=1--",
            "/v1/proofs/0x1",
            "/v1/consistency?first=0&second=2",
            "/v1/consistency?first=2&second=1",
            "/v1/attestations/' OR '1'='1",
            "/v1/attestations/" + "A" * 64,
            "/v1/attestations/" + "a" * 63,
            "/v1/enrolments/<script>alert(1)</script>",
        ],
    )
    def test_of_paths_and_numbers(self, client: httpx.Client, path: str) -> None:
        response = client.get(path)
        assert response.status_code in (400, 404)
        assert response.headers["content-type"] == "application/json"
        assert "error" in response.json()

    def test_of_far_numbers(self, client: httpx.Client) -> None:
        far = "9" * 18
        assert get(client, f"/v1/leaves?from={far}") == {"leaves": []}
        assert get(client, f"/v1/attestations?after={far}")["proofs"] == []
        assert "no leaf" in error(client.get(f"/v1/proofs/{far}"), 404)
        assert "has no" in error(client.get(f"/v1/consistency?first=1&second={far}"), 404)

    @pytest.mark.parametrize(
        ("body", "status", "text"),
        [
            (b"", 400, "enrolment"),
            (b"{}", 400, "enrolment"),
            (b"\x93\x01", 400, "enrolment"),
            (bytes(MAX_FORM_BYTES), 400, "enrolment"),
            (bytes(MAX_FORM_BYTES + 1), 413, "at most 4096 bytes"),
            (b"\x91" * 2000, 400, "enrolment"),
        ],
    )
    def test_of_forms(self, client: httpx.Client, body: bytes, status: int, text: str) -> None:
        assert text in error(client.post("/v1/enrolments", content=body), status)

    def test_sql_and_html_in_names_are_but_text(
        self, registry: LiveRegistry, client: httpx.Client
    ) -> None:
        contact = "'); DROP TABLE members; --<script>alert(1)</script>"
        applied = client.post("/v1/enrolments", content=form(ALICE, contact=contact))
        assert applied.status_code == 202

        async def count(office: Office) -> int:
            return len(office.query("SELECT * FROM requests"))

        assert registry.do(count) == 1
        assert "script" not in client.get(f"/v1/attestations/{ALICE.public_key.hex()}").text

    def test_of_other_methods_and_routes(self, client: httpx.Client) -> None:
        assert error(client.post("/v1/registry"), 405)
        assert error(client.delete("/v1/enrolments"), 405)
        assert error(client.get("/v1/nothing"), 404)
        assert error(client.get("/"), 404)

    def test_a_form_that_never_comes(
        self, registry: LiveRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BODY_S", 0.2)
        port = int(registry.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stream:
            stream.sendall(
                b"POST /v1/enrolments HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nab"
            )
            assert stream.recv(4096).startswith(b"HTTP/1.1 408")


class TestFloods:
    def test_a_network_applies_only_so_often(self, client: httpx.Client) -> None:
        for number in range(1, APPLY_BURST + 1):
            answer = client.post("/v1/enrolments", content=form(key(number)))
            assert answer.status_code == 202
        refused = client.post("/v1/enrolments", content=form(key(99)))
        assert "too many applications" in error(refused, 429)
        assert client.get("/v1/registry").status_code == 200

    def test_a_proxy_tells_the_networks_apart(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "APPLY_BURST", 1)
        live = LiveRegistry(tmp_path / "behind", proxy=True).start()
        try:
            for number in range(1, 4):
                forwarded = {"x-forwarded-for": f"10.9.9.9, 192.0.{number}.1"}
                answer = httpx.post(
                    f"{live.url}/v1/enrolments", content=form(key(number)), headers=forwarded
                )
                assert answer.status_code == 202
            again = {"x-forwarded-for": "1.2.3.4, 192.0.3.77"}
            answer = httpx.post(f"{live.url}/v1/enrolments", content=form(key(9)), headers=again)
            assert error(answer, 429)
        finally:
            live.stop()

    def test_a_full_office(self, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(members, "MAX_WAITING", 1)
        assert client.post("/v1/enrolments", content=form(ALICE)).status_code == 202
        assert "busy:" in error(client.post("/v1/enrolments", content=form(BOB)), 503)

    def test_open_requests_are_bounded(
        self, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_OPEN_REQUESTS", 0)
        assert "too many open requests" in error(client.get("/v1/head"), 503)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1::/48"),
        ("", "unknown"),
        ("a'; --", "unknown"),
    ],
)
def test_addresses_that_are_counted_together(host: str, network: str) -> None:
    assert subnet_of(host) == network
