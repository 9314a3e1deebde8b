"""A run on the terminal: ``watch``, ``cancel``, ``jobs``, and what a view of it tells."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console

from p2pflop.cli.main import run
from p2pflop.cli.progress import RunView
from p2pflop.cli.sessions import spent
from p2pflop.client import Client
from p2pflop.node.memory_service import MemoryRun
from p2pflop.units import MAX_NUSD

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

PEER, OTHER_PEER = "anyone", "someone"
DEAL = {"provider": PEER, "account": "aa", "total_nusd": 10**6, "minutes": 0.5, "price_nusd": 5}
RANKED = {"deals": [DEAL], "misses": [{"provider": "12D3KooWddd", "reason": "lacks memory"}]}
STORY: list[tuple[str, dict[str, Any]]] = [
    ("ranked", RANKED),
    ("filled", {"provider": PEER, "quote_nusd": 1_000_000}),
    ("progress", {"step": 2, "steps": 2}),
    ("receipt", {"number": 1, "amount_nusd": 900_000, "to_step": 2}),
]


def shown(events: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    console = Console(file=(sheet := io.StringIO()), width=200)
    with RunView(console) as view:
        for kind, fields in events:
            view.show({"kind": kind, **fields})
    return sheet.getvalue()


def test_cancel_tells_the_cost_and_what_was_delivered(
    start_node: StartNode, capsys: Output
) -> None:
    start_node(script=STORY)
    run_id = Client().submit(b"job")
    assert run(["cancel", run_id]) == 0
    told = capsys.readouterr().err
    assert f"{run_id} is cancelled" in told
    assert "cost $0.0009: what was delivered, up to step 2" in told
    assert run(["cancel", run_id, "--json"]) == 0  # it stays as it is
    about = json.loads(capsys.readouterr().out)
    assert (about["id"], about["final"]) == (run_id, True)
    assert (about["cost_nusd"], about["delivered_to_step"]) == (900_000, 2)


def test_cancel_says_how_to_go_on_and_that_nothing_was_delivered(
    start_node: StartNode, capsys: Output
) -> None:
    start_node(script=[("cancelled", {"cost_nusd": 0, "hint": "go on with --from-step 4"})])
    assert run(["cancel", Client().submit(b"job")]) == 0
    told = capsys.readouterr().err
    assert "nothing was delivered" in told
    assert "go on with --from-step 4" in told


def test_cancel_of_a_run_that_does_not_end_tells_the_cost_so_far(
    start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pflop.cli.runs.CANCEL_WITHIN_S", 0.2)
    monkeypatch.setattr(Client, "cancel", lambda *_: {})
    start_node(script=STORY)
    assert run(["cancel", Client().submit(b"job")]) == 0
    told = capsys.readouterr().err
    assert "is being cancelled" in told
    assert "cost so far $0.0009" in told


def test_jobs_counts_the_steps_of_the_work(
    start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_node()
    card = {"id": "ab" * 6, "state": "running", "step": 7, "first_step": 5, "steps": 5}
    monkeypatch.setattr(Client, "jobs", lambda _, **__: [card])
    assert run(["jobs"]) == 0
    assert "7/10" in capsys.readouterr().out


def test_jobs_of_a_pack_are_listed_on_request_with_their_pack(
    start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node()
    pack = {"id": "ab" * 6, "state": "settled", "step": 4, "steps": 4, "cost_nusd": 5}
    pack |= {"title": "2 of rates"}
    part = pack | {"id": "cd" * 6, "cost_nusd": 2, "title": "rates", "pack": "ab" * 6}
    node.service.parts = [part]
    monkeypatch.setattr(MemoryRun, "line", lambda _: pack)
    Client().submit(b"job")
    assert run(["jobs"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ID", "ab" * 6]
    assert run(["jobs", "--all"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"$0.000000002  rates, bought in {'ab' * 6}")
    assert second.endswith("$0.000000005  2 of rates")
    assert run(["jobs", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [part, pack]


def test_what_comes_round_after_round_is_told_once() -> None:
    ranked: dict[str, Any] = RANKED
    refused = {"provider": PEER, "reason": "busy"}
    rests = {"limit_nusd": 10**6, "deadline_ns": 1}
    rounds = [("ranked", ranked), ("rejected", refused), ("resting", rests)]
    text = shown(rounds * 5)
    assert text.count("lacks memory") == text.count("PROVIDER") == 1
    assert text.count("refused: busy") == text.count("resting as a wish") == 1
    other = {"provider": "12D3KooWccc", "reason": "too slow"}
    more = ranked | {"misses": [*ranked["misses"], other]}
    text = shown([*rounds, ("ranked", more), ("rejected", refused | {"reason": "full"})])
    assert text.count("lacks memory") == text.count("too slow") == 1
    assert text.count("refused:") == 2
    dearer = ranked | {"deals": [ranked["deals"][0] | {"total_nusd": 2_000_000}]}
    assert shown([*rounds, ("ranked", dearer)]).count("PROVIDER") == 2


@pytest.mark.parametrize(
    ("reason", "did"),
    [
        ("the provider was lost: nobody answers", "vanished"),
        ("the provider was silent for 30 s", "vanished"),
        ("the provider gave the lease back: pre-empted: it is shutting down", "left"),
        ("the provider gave the lease back: cost: too dear", "failed"),
        ("wrong delivery: no such blob", "failed"),
    ],
)
def test_a_resubmission_says_what_the_provider_did(reason: str, did: str) -> None:
    event = {"provider": PEER, "reason": reason, "step": 3, "from_step": 2, "next": OTHER_PEER}
    assert f"{did} at step 3 ({reason}); going on from step 2" in shown([("resubmitted", event)])


def test_after_a_resubmission_the_steps_go_on_and_name_the_new_provider() -> None:
    lost = {"provider": PEER, "reason": "the provider was lost: x", "step": 3, "from_step": 2}
    lines = shown(
        [
            ("filled", {"provider": PEER, "quote_nusd": 5}),
            ("rows", {"rows": [{"step": 2, "values": {"loss": 2.25}}]}),
            ("progress", {"step": 3, "steps": 9}),
            ("resubmitted", lost | {"next": OTHER_PEER}),
            ("filled", {"provider": OTHER_PEER, "quote_nusd": 5, "first_step": 2}),
            ("lowering", {"done": 1, "total": 4, "graph": "ab"}),
            ("progress", {"step": 4, "steps": 9}),
        ]
    ).splitlines()
    assert "step 3/9 loss 2.25" in lines
    assert any("failed" in line or "vanished at step 3" in line for line in lines)
    assert f"the provider changed: {OTHER_PEER} instead of {PEER}" in lines
    assert "lowering 1/4 kernels" in lines
    assert f"step 4/9 at {OTHER_PEER} loss 2.25" in lines


def test_it_is_said_when_a_job_is_tried_out_here() -> None:
    told = shown([("state", {"state": "running"}), ("state", {"state": "checking"})])
    assert "trying the job out here" in told
    assert len(told.splitlines()) == 1


def test_a_run_is_told_as_it_comes() -> None:
    told = shown(STORY)
    for words in (
        "$0.001",
        "30.0 s",
        "lacks memory",
        "for at most $0.001",
        "receipt 1: $0.0009 up to step 2",
    ):
        assert words in told, words


def test_watch_begins_with_what_is_known() -> None:
    console = Console(file=(sheet := io.StringIO()), width=200)
    card = {"id": "ab" * 6, "state": "running", "provider": PEER}
    with RunView(console) as view:
        view.begin(card | {"step": 57, "first_step": 10, "steps": 90})
        view.show({"kind": "progress", "at_ns": 1, "step": 11, "steps": 100})
        view.show({"kind": "ranked", "at_ns": 1, **RANKED})
        view.show({"kind": "filled", "at_ns": 1, "provider": PEER, "quote_nusd": 5})
        receipt = {"kind": "receipt", "amount_nusd": 5, "to_step": 50}
        view.show({"at_ns": 1, "number": 1, **receipt})
        view.show({"at_ns": 2**62, "number": 2, **receipt})
        view.show({"kind": "progress", "at_ns": 2**62, "step": 58, "steps": 100})
    told = sheet.getvalue()
    assert told.startswith(f"run {'ab' * 6}: running, step 57/100, at {PEER}")
    assert "11/100" not in told
    assert "bought from" not in told
    assert "PROVIDER" not in told
    assert "receipt 1" not in told
    assert "receipt 2" in told
    assert "step 58/100" in told


SESSION = {
    "id": "cd" * 6,
    "kind": "session",
    "title": "train.py",
    "state": "leased",
    "end_state": "",
    "provider": PEER,
    "account": "ab" * 32,
    "class_id": "cd" * 32,
    "class_name": "",
    "cost_nusd": 2_000_000,
    "max_nusd": 100_000_000,
    "submitted_ns": 10**18,
    "step": 40,
    "commands": 42,
    "flop": 10**12,
}


def test_jobs_and_show_tell_of_a_session_its_script_and_cost(
    start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_node()
    monkeypatch.setattr(Client, "jobs", lambda _, **__: [SESSION])
    monkeypatch.setattr(Client, "job", lambda *_: SESSION)
    assert run(["jobs"]) == 0
    [_, line] = capsys.readouterr().out.splitlines()
    assert line.split() == [
        *("cd" * 6, "leased", "40", "$0.002", "of", "$0.10"),
        *("train.py", "(CLOUD),", "at", "anyone"),
    ]
    assert run(["show", "cd" * 6]) == 0
    told = capsys.readouterr().out
    for words in ("train.py", "$0.002 of $0.10", "40 of 42 obeyed", "1 TFLOP", "2001-09-"):
        assert words in told


@pytest.mark.parametrize(
    ("max_nusd", "words"), [(MAX_NUSD, "no limit"), (MAX_NUSD - 1, "$4,611,686,018.427387903")]
)
def test_show_tells_money_in_dollars_and_where_there_is_no_limit(
    start_node: StartNode,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
    max_nusd: int,
    words: str,
) -> None:
    start_node()
    card = {"id": "ab" * 6, "state": "running", "max_nusd": max_nusd, "cost_nusd": 2_000_000}
    monkeypatch.setattr(Client, "job", lambda *_: card)
    assert run(["show", "ab" * 6]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["max_usd", words] in lines
    assert ["cost_usd", "$0.002"] in lines
    assert run(["show", "ab" * 6, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == card


def test_no_limit_is_told_as_one_wherever_a_run_tells_its_own() -> None:
    filled = {"provider": PEER, "quote_nusd": 5, "limit_nusd": MAX_NUSD}
    rests = {"limit_nusd": MAX_NUSD, "deadline_ns": 1}
    told = shown([("filled", filled), ("resting", rests)])
    assert "no limit if providers fail" in told
    assert "any price" in told
    assert spent(SESSION | {"max_nusd": MAX_NUSD}) == "$0.002 of no limit"


def test_cancel_of_a_session_tells_what_it_has_cost_of_its_limit(
    start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_node(script=[("cancelled", {"cost_nusd": 2_000_000, "hint": ""})])
    run_id = Client().submit(b"job")
    monkeypatch.setattr(Client, "job", lambda *_: SESSION | {"state": "cancelled"})
    assert run(["cancel", run_id]) == 0
    told = capsys.readouterr().err
    assert f"{run_id} is cancelled, after 40 commands" in told
    assert "cost $0.002 of $0.10" in told


def test_a_view_of_a_session_tells_its_pauses_and_its_end() -> None:
    told = shown([("state", {"state": "idle"}), ("closed", {"cost_nusd": 3_000_000})])
    assert "given back" in told
    assert "closed  $0.003 in all" in told
