"""A sweep over two real providers, and one whose script was killed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.errors import P2PFlopError
from p2pflop.job.file import encode_file

StartNode = Callable[..., Any]
JOBS = 12
ROOT = Path(__file__).parents[2]


def square_job() -> pf.Job:
    """Goes down the slope of ``weight ** 2``, starting at 1."""
    weight = Tensor.ones(1).contiguous()

    def step(lr: Tensor) -> dict[str, Tensor]:
        weight.assign(weight - lr * 2 * weight)
        return {"loss": (weight * weight).sum()}

    return pf.trace(step, steps=5, args={"lr": 0.0}, title="square")


@pytest.fixture
def buyer(start_node: StartNode, wait_until: Any) -> Client:
    sellers = [start_node(name, "--ask", "90000") for name in ("ann", "ben")]
    flags = [text for seller in sellers for text in ("--connect", seller.addresses()[0])]
    node = start_node("buyer", *flags)
    wait_until(lambda: len(node.get("/v1/book")["book"]) == len(sellers))
    return Client(node.home)


def providers(client: Client, sweep: pf.Sweep) -> set[str]:
    """Who was paid for the sweep's runs."""
    return {
        event["provider"]
        for place in range(len(sweep))
        for event in client.events(sweep.run_id(place))
        if event["kind"] == "receipt"
    }


def test_twelve_jobs_over_two_providers_under_one_budget(buyer: Client) -> None:
    job = square_job()
    args = [{"lr": number / 10} for number in range(JOBS)]
    quote = int(buyer.quote(encode_file(job.file))["deals"][0]["total_nusd"])
    budget_usd = f"{(JOBS * quote) / 1e9:.9f}"
    sweep = pf.map(job, args, max_usd=budget_usd, under_way=4, pack=False, client=buyer)
    outcomes = list(sweep)
    assert [outcome.state for outcome in outcomes] == ["settled"] * JOBS
    for outcome, given in zip(outcomes, args, strict=True):
        expected = (1 - 2 * given["lr"]) ** 10
        assert outcome.result()["loss"][-1] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(P2PFlopError, match="has a value of 'lost'"):
        sweep.best("lost")
    best, result = sweep.best("loss", min)
    assert best.args == {"lr": 0.5}
    assert result["loss"][-1] == pytest.approx(0, abs=1e-9)
    assert len(providers(buyer, sweep)) == 2
    spent_nusd = sum(outcome.cost_nusd for outcome in outcomes)
    assert sweep.progress().spent_nusd == spent_nusd <= JOBS * quote
    assert spent_nusd == buyer.ledger()["owing_nusd"]

    packed = pf.map(job, args, fresh=True, client=buyer)
    for outcome, alone in zip(packed, outcomes, strict=True):
        assert outcome.result().hash == alone.result().hash
        assert outcome.row == alone.row
        outcome.result().verify()
    [pack] = {outcome.pack for outcome in packed}
    assert pf.Run(pack, buyer).result().cost_nusd == packed.progress().spent_nusd
    assert buyer.ledger()["owing_nusd"] == spent_nusd + packed.progress().spent_nusd
    assert buyer.evidence(packed.run_id(3)) == buyer.evidence(pack)
    spent_nusd += packed.progress().spent_nusd

    attached = pf.attach_sweep(sweep.id, client=Client(buyer.home))
    assert [outcome.cost_nusd for outcome in attached] == [each.cost_nusd for each in outcomes]
    again = pf.map(job, args, max_usd=0, client=buyer)
    for outcome, old in zip(again, outcomes, strict=True):
        assert (outcome.cost_nusd, outcome.earlier) == (0, packed.run_id(old.place))
        assert outcome.result().hash == old.result().hash
    assert spent_nusd == buyer.ledger()["owing_nusd"]


def test_the_tutorials_sweeps_are_bought_as_they_are_shown(
    buyer: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over arguments, attached again, and over data: each block, and what it prints."""
    page = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    section = page.split("## 9. Many runs at once")[1].split("\n## ")[0]
    blocks = re.findall(r"```(python|text)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text"] * 3
    monkeypatch.setenv("P2PFLOP_HOME", str(buyer.home))
    program = "".join(body for kind, body in blocks if kind == "python")
    # Its functions are looked up in their module, so they need one with a file.
    monkeypatch.syspath_prepend(str(buyer.home))
    (buyer.home / "many_runs.py").write_text(program, "utf-8")
    capsys.readouterr()
    many_runs = importlib.import_module("many_runs")
    printed = capsys.readouterr().out
    sys.modules.pop("many_runs")
    assert printed == "".join(body for kind, body in blocks if kind == "text")
    assert {outcome.pack == "" for outcome in many_runs.sweep} == {False}
    assert buyer.ledger()["owing_nusd"] > 0
