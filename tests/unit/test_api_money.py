"""Routes about money: what they take, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from p2pflop.client import Client
from tests.serving import error_of, serving
from tests.unit.conftest import StartNode

ID, ACCOUNT = "ab" * 32, "cd" * 32
PAYMENT: dict[str, Any] = {
    "payment": ID,
    "account": ACCOUNT,
    "amount_nusd": 5,
    "reference": "invoice 7",
}


async def test_a_payment_is_booked_once_however_often_it_is_asked_for() -> None:
    async with serving() as server:
        for _ in range(2):
            answer = await server.client.post("/v1/payments", json=PAYMENT)
            assert answer.status_code == 201
            assert answer.json()["state"] == "claimed"
        listed = (await server.get("/v1/payments")).json()
        assert listed["total"] == 1
        assert listed["payments"][0]["id"] == ID
        answered = await server.client.post(f"/v1/payments/{ID}/received")
        assert answered.json()["state"] == "acknowledged"
        refused = await server.client.post(f"/v1/payments/{ID}/refused", json={"reason": "no"})
        assert refused.json()["reason"] == "no"
        unclaimed = await server.client.post(
            "/v1/payments/received", json=PAYMENT | {"payment": "ef" * 32}
        )
        assert (unclaimed.status_code, unclaimed.json()["side"]) == (201, "received")


@pytest.mark.parametrize(
    "changed",
    [
        {"payment": None},
        {"payment": "ab"},
        {"payment": "AB" * 32},
        {"payment": "ab" * 31 + " a"},
        {"payment": 5},
        {"account": "x" * 64},
        {"account": ["cd" * 32]},
        {"amount_nusd": "5"},
        {"amount_nusd": 5.0},
        {"amount_nusd": True},
        {"amount_nusd": None},
        {"reference": 7},
    ],
)
async def test_what_is_no_payment_is_refused(changed: dict[str, Any]) -> None:
    async with serving() as server:
        for path in ("/v1/payments", "/v1/payments/received"):
            answer = await server.client.post(path, json=PAYMENT | changed)
            assert answer.status_code == 400
            assert error_of(answer)["exit_code"] == 2
        assert server.service.money == {}


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"{", b'"' + b"x" * 300 + b'"'])
async def test_what_is_no_object_is_refused(body: bytes) -> None:
    async with serving() as server:
        answer = await server.client.post("/v1/payments", content=body)
        assert answer.status_code in (400, 413)


async def test_ids_and_times_in_paths_are_checked() -> None:
    async with serving() as server:
        for path in ("/v1/payments/ab/received", f"/v1/payments/{'0' * 63}g/received"):
            assert (await server.client.post(path)).status_code == 400
        unknown = await server.client.post(f"/v1/payments/{ID}/received")
        assert unknown.status_code == 400
        statement = f"/v1/statement/{ACCOUNT}"
        assert (await server.get(f"{statement}?since_ns=5")).json()["since_ns"] == 5
        for path in (f"{statement}?since_ns=-1", f"{statement}?since_ns=x", "/v1/statement/ab"):
            assert (await server.get(path)).status_code == 400


def test_the_client_has_a_method_for_each(start_node: StartNode) -> None:
    start_node()
    with Client() as client:
        account = bytes.fromhex(ACCOUNT)
        paid = client.pay(account, 5, "invoice 7", payment=bytes.fromhex(ID))
        assert client.pay(account, 5, "invoice 7", payment=bytes.fromhex(ID)) == paid
        assert client.receive(account, 6)["id"] != paid["id"]
        assert [payment["amount_nusd"] for payment in client.payments()] == [5, 6]
        assert client.acknowledge(bytes.fromhex(ID))["state"] == "acknowledged"
        assert client.refuse(bytes.fromhex(ID), "no")["reason"] == "no"
        assert client.statement(account, 7)["since_ns"] == 7
