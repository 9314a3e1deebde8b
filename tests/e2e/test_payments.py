"""Real nodes: buy until the credit is used up, be refused, pay, be believed, buy again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.cli.main import run
from p2pflop.client import Client
from p2pflop.units import parse_usd
from tests.e2e.test_first_light import counting_job, submit, wait_for_asks

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

ASK_USD = 90_000
STEPS = 40
LONG_STEPS = 6_000
"""More than a worker does before its node hears of them."""


def command(node: Any, capsys: Output, *arguments: str) -> Any:
    """What a command of that node's user says, as JSON."""
    capsys.readouterr()
    assert run([*arguments, "--home", str(node.home), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def buy(node: Any, seed: int) -> str:
    """Buy one job; why the provider refused it, or nothing."""
    bought = submit(counting_job(STEPS, seed), node)
    try:
        bought.result(timeout=60)
    except pf.MarketError:
        [reason] = [e["reason"] for e in bought.events() if e["kind"] == "rejected"]
        return str(reason)
    return ""


def debts(buyer: Any, seller: Any) -> tuple[int, int]:
    """What the buyer says it owes, and what the seller says is due."""
    owing = sum(-balance["due_nusd"] for balance in buyer.get("/v1/ledger")["balances"])
    due = sum(balance["due_nusd"] for balance in seller.get("/v1/ledger")["balances"])
    return owing, due


def by_reference(statement: dict[str, Any]) -> dict[str, int]:
    amounts: dict[str, int] = {}
    for entry in statement["entries"]:
        amounts[entry["reference"]] = amounts.get(entry["reference"], 0) + entry["amount_nusd"]
    return amounts


def test_credit_is_used_up_paid_for_and_grows(
    start_node: StartNode, wait_until: Any, tmp_path: Any, capsys: Output
) -> None:
    cost_nusd = -(-ASK_USD * 10**9 * counting_job(STEPS).cost.flop // 10**15)
    (tmp_path / "seller").mkdir()
    config = f'credit = "{2.5 * cost_nusd / 10**9:.9f}"\n'
    (tmp_path / "seller" / "config.toml").write_text(config)
    seller = start_node("seller", "--ask", str(ASK_USD))
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    account = seller.get("/v1/status")["account"]
    theirs = buyer.get("/v1/status")["account"]

    assert [buy(buyer, 0), buy(buyer, 1)] == ["", ""]
    wait_until(lambda: debts(buyer, seller) == (2 * cost_nusd, 2 * cost_nusd))
    reason = buy(buyer, 2)
    assert reason.startswith("over the credit of $")
    told = re.search(r"pay \$([0-9.,]+)", reason)
    assert told is not None

    paid = command(buyer, capsys, "pay", account[:12], told.group(1), "--yes")
    amount_nusd = parse_usd(told.group(1))
    assert (paid["state"], paid["amount_nusd"]) == ("claimed", amount_nusd)
    [claim] = wait_until(lambda: seller.get("/v1/payments")["payments"])
    assert (claim["id"], claim["account"], claim["state"]) == (paid["id"], theirs, "claimed")
    assert buy(buyer, 3).startswith("over the credit of $"), "claimed is not received"
    command(seller, capsys, "received", claim["id"][:12], "--yes")
    wait_until(lambda: buyer.get("/v1/payments")["payments"][0]["state"] == "acknowledged")
    assert debts(buyer, seller) == (2 * cost_nusd - amount_nusd,) * 2
    assert buy(buyer, 4) == ""
    wait_until(lambda: debts(buyer, seller) == (3 * cost_nusd - amount_nusd,) * 2)

    refused = command(buyer, capsys, "pay", account, "5", "--yes", "--reference", "=1+1")
    wait_until(lambda: len(seller.get("/v1/payments")["payments"]) == 2)
    command(seller, capsys, "refuse", refused["id"], "--reason", "nothing came", "--yes")
    wait_until(lambda: buyer.get("/v1/payments")["payments"][0]["state"] == "refused")
    seller.kill()
    seller = start_node("seller", "--ask", str(ASK_USD), "--connect", buyer.addresses()[0])
    command(seller, capsys, "received", theirs, "0.000000001", "--yes", "--reference", "cash")
    wait_until(lambda: debts(buyer, seller) == (3 * cost_nusd - amount_nusd - 1,) * 2)

    ours = command(buyer, capsys, "statement", account)
    sold = command(seller, capsys, "statement", theirs)
    assert ours["closing_nusd"] == -sold["closing_nusd"] == amount_nusd + 1 - 3 * cost_nusd
    assert by_reference(ours).pop(refused["id"]) == 0
    assert {ref: -nusd for ref, nusd in by_reference(ours).items() if nusd} == by_reference(sold)
    assert ours["head"] == buyer.get("/v1/ledger")["head"]
    assert run(["statement", account, "--csv", "--home", str(buyer.home)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(",closing balance,")
    with Client(seller.home) as client:
        assert {payment["told"] for payment in client.payments()} == {True}


def test_a_window_of_next_to_nothing_has_the_worker_wait_for_each_signature(
    start_node: StartNode, wait_until: Any, tmp_path: Any
) -> None:
    (tmp_path / "seller").mkdir()
    (tmp_path / "seller" / "config.toml").write_text('window = "0.000000001"\ncredit = "1000"\n')
    seller = start_node("seller", "--ask", str(ASK_USD))
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    job = counting_job(LONG_STEPS)
    run_ = submit(job, buyer, checkpoint_steps=0)
    assert run_.result(timeout=60).hash == job.run_local().hash
    receipts = [e["to_step"] for e in run_.events() if e["kind"] == "receipt"]
    assert len(receipts) > 2
    assert receipts[-1] == LONG_STEPS
    wait_until(lambda: len(set(debts(buyer, seller))) == 1)
    assert seller.get("/v1/sales")["sales"] == []
