"""The first test franchise, all real processes: a registry, three franchises, and buyers.

Ada has paid and runs two boxes under one account, the second without the account's key. Bob has
paid, and is dear. Eve is the cheapest, and has not paid.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.cli.main import run
from tests.e2e.test_first_light import counting_job, submit
from tests.e2e.test_strict_market import (
    Registry,
    account_of,
    asks,
    founded,
    franchise,
    left_out_by,
    misses,
    provider_of,
    waits_for,
)

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]
EVE, ADA, BOB = "10000", "40000", "90000"
LONG_STEPS = 400_000


class Franchises:
    """Who takes part. ``trusted`` are the flags of a buyer, ``enrol`` those of a franchise."""

    def __init__(self, start_node: StartNode, registry: Registry, folder: Path) -> None:
        self._start = start_node
        self.registry = registry
        self._folder = folder
        self.trusted = ("--registry", f"{registry.key}@{registry.url}")
        enrol = (*self.trusted, "--enroll", "--agree", "1", "--contact")
        self.ada = start_node("ada", "--ask", ADA, "--slots", "2", *enrol, "ada@example.org")
        self.known = ("--connect", self.ada.addresses()[0])
        self.box2 = self._second_box()
        self.eve = start_node("eve", "--ask", EVE, *enrol, "eve@example.org", *self.known)
        for node in (self.ada, self.eve):
            node.home.chmod(0o700)

    def _second_box(self) -> Any:
        home = str(self._folder / "ada")
        assert run(["delegate", str(self._folder / "box2"), "--for", "1d", "--home", home]) == 0
        return self._start("box2", "--ask", ADA, "--slots", "2", *self.trusted, *self.known)

    def add_bob(self) -> Any:
        enrol = (*self.trusted, "--enroll", "--agree", "1", "--contact", "bob@example.org")
        return self._start("bob", "--ask", BOB, *enrol, *self.known)

    def add_buyer(self, name: str) -> Any:
        return self._start(name, *self.trusted, *self.known)

    @property
    def boxes(self) -> set[str]:
        return {self.ada.note["peer"], self.box2.note["peer"]}


@pytest.fixture
def registry(tmp_path: Path, capsys: Output) -> Iterator[Registry]:
    made = Registry(founded(tmp_path, capsys), capsys)
    yield made
    made.stop()


@pytest.fixture
def franchises(
    start_node: StartNode, wait_until: Any, registry: Registry, tmp_path: Path
) -> Franchises:
    """Ada is attested, Eve is enrolled."""
    made = Franchises(start_node, registry, tmp_path)
    for node in (made.ada, made.eve):
        wait_until(lambda node=node: waits_for(node) == "the operator's approval")
    registry.attest(account_of(made.ada), "ada 1")
    registry.operator("approve", account_of(made.eve), "--yes")
    return made


def verify(registry: Registry) -> dict[str, Any]:
    """What ``p2pflop registry verify`` says of the whole log."""
    found: dict[str, Any] = registry.operator("verify", f"{registry.key}@{registry.url}")
    return found


def dues(node: Any) -> int:
    """What all accounts together owe, by that node's ledger."""
    return sum(balance["due_nusd"] for balance in node.get("/v1/ledger")["balances"])


def running(bought: pf.Run) -> str:
    """Wait until it computes; where."""
    provider = ""
    for event in bought.events():
        if event["kind"] == "filled":
            provider = str(event["provider"])
        if event["kind"] == "state" and event["state"] == "running":
            return provider
    raise AssertionError("it never ran")


def broken_guidelines(node: Any, capsys: Output) -> set[str]:
    """What ``p2pflop doctor --franchise`` complains of."""
    capsys.readouterr()
    run(["doctor", "--franchise", "--json", "--home", str(node.home)])
    found = json.loads(capsys.readouterr().out)
    names = {each["name"] for each in found if not each["ok"]}
    return {name.removeprefix("guideline ") for name in names if name.startswith("guideline ")}


def statement(node: Any, account: str, capsys: Output) -> list[list[str]]:
    """What an accountant gets."""
    capsys.readouterr()
    assert run(["statement", account, "--csv", "--home", str(node.home)]) == 0
    return list(csv.reader(io.StringIO(capsys.readouterr().out)))


def test_two_boxes_of_one_account_sell_and_who_has_not_paid_does_not(
    franchises: Franchises, wait_until: Any, capsys: Output
) -> None:
    """The short form."""
    eve, registry = franchises.eve, franchises.registry
    buyer = franchises.add_buyer("buyer")
    wait_until(lambda: asks(buyer) == franchises.boxes)
    wait_until(lambda: "pay $1" in waits_for(eve))
    assert misses(buyer)[eve.note["peer"]] == "account is not attested"
    wait_until(lambda: "not attested" in left_out_by(eve).get(buyer.note["peer"], ""))
    assert {provider_of(buyer, seed) for seed in range(2)} <= franchises.boxes
    assert account_of(franchises.box2) == account_of(franchises.ada)
    assert not (franchises.box2.home / "account.pem").exists()

    assert broken_guidelines(franchises.ada, capsys) == {"network"}  # loopback reaches nobody
    assert broken_guidelines(eve, capsys) == {"attestation", "books", "network"}

    wait_until(lambda: dues(buyer) == -dues(franchises.ada) - dues(franchises.box2) < 0)
    header, *entries = statement(buyer, account_of(franchises.ada), capsys)
    assert len(entries) >= 2
    assert "amount_usd" in header

    registry.operator("paid", account_of(eve), "1", "--reference", "eve 1", "--yes")
    wait_until(lambda: eve.note["peer"] in asks(buyer), 10)
    assert provider_of(buyer, 3) == eve.note["peer"]
    told = verify(registry)
    assert (told["enrolment"], told["attestation"]) == (2, 2)
    registry.stop()
    assert provider_of(buyer, 4) == eve.note["peer"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_first_franchise(franchises: Franchises, wait_until: Any, capsys: Output) -> None:
    """All of it: slots over boxes, two buyers, revocation, running leases, a registry that ends."""
    registry, eve, boxes = franchises.registry, franchises.eve, franchises.boxes
    bob = franchises.add_bob()
    buyers = [franchises.add_buyer(f"buyer {number}") for number in range(2)]
    wait_until(lambda: waits_for(bob) == "the operator's approval")
    registry.attest(account_of(bob), "bob 1")
    attested = {*boxes, bob.note["peer"]}
    for buyer in buyers:
        wait_until(lambda buyer=buyer: asks(buyer) == attested)
    wait_until(lambda: franchise(franchises.box2)["attestation"])

    # Two slots are attested: one for each box, though each would have two. The third is Bob's.
    wait_until(lambda: slots_are_shared(franchises))
    jobs = [
        submit(counting_job(LONG_STEPS, seed), buyers[seed % 2], checkpoint_steps=LONG_STEPS // 4)
        for seed in range(3)
    ]
    assert {running(bought) for bought in jobs} == attested

    # Ada is revoked while her boxes compute: she leaves the books, and is paid for what she began.
    registry.operator("revoke", account_of(franchises.ada), "--reason", "own_wish", "--yes")
    for buyer in buyers:
        wait_until(lambda buyer=buyer: asks(buyer) == {bob.note["peer"]}, 60)
    assert all(job.status == "running" for job in jobs), "they were to be under way yet"
    for box in (franchises.ada, franchises.box2):
        wait_until(
            lambda box=box: any("was revoked" in reason for reason in left_out_by(box).values()), 60
        )
    for bought in jobs:
        bought.result(timeout=120).verify()
        assert not [event for event in bought.events() if event["kind"] == "resubmitted"]
    sellers = [franchises.ada, franchises.box2, bob]
    wait_until(lambda: sum(map(dues, buyers)) == -sum(map(dues, sellers)) < 0)
    assert all(dues(seller) > 0 for seller in sellers)

    registry.operator("paid", account_of(eve), "1", "--reference", "eve 1", "--yes")
    for buyer in buyers:
        wait_until(lambda buyer=buyer: asks(buyer) == {bob.note["peer"], eve.note["peer"]}, 10)
    told = verify(registry)
    assert (told["attestation"], told["revocation"]) == (3, 1)
    registry.stop()
    assert [provider_of(buyer, 10 + place) for place, buyer in enumerate(buyers)] == [
        eve.note["peer"]
    ] * 2


def slots_are_shared(franchises: Franchises) -> bool:
    """Whether the boxes know of each other's asks, and so how many leases each may give."""
    peers = franchises.boxes
    return all(peers <= asks(box) for box in (franchises.ada, franchises.box2))
