"""Trades, depth, the take rate and the watches on the command line."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pflop.cli import tape as tape_cli
from p2pflop.cli.main import run
from p2pflop.cli.tape import ask_changes, depth_lines, take_line
from p2pflop.client import Client
from p2pflop.job.spec import class_id
from p2pflop.kernels.classes import CLASS_NAME, descriptor

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

PEER = "12D3KooWabcdefghijklmnop"
OTHER_CLASS = "ab" * 32
HOUR_NS = 3600 * 10**9
NOON_NS = 500_004 * HOUR_NS
"""2027-01-15, 12:00 UTC."""


def trade(number: int, **changes: Any) -> dict[str, Any]:
    told = {
        "id": f"{number:064x}",
        "provider": PEER,
        "account": "cd" * 32,
        "own": False,
        "class_id": OTHER_CLASS,
        "price_nusd": 5 * 10**7,
        "gflop": 700,
        "hour_ns": NOON_NS - number * HOUR_NS,
    }
    return told | changes


def ask(number: int, **changes: Any) -> dict[str, Any]:
    told = {
        "provider": PEER,
        "own": False,
        "ask": number,
        "sheet": 1,
        "price_nusd": 5 * 10**7,
        "memory_bytes": 2**30,
        "class_id": OTHER_CLASS,
        "flop_per_s": 10**10,
    }
    return told | changes


@pytest.fixture
def node(start_node: StartNode) -> Any:
    live = start_node()
    own = class_id(descriptor(CLASS_NAME)).hex()
    live.service.traded = [trade(0), trade(1, own=True), trade(30, class_id=own)]
    return live


class TestTrades:
    def test_each_has_hour_seller_price_size_and_class(self, node: Any, capsys: Output) -> None:
        assert run(["trades"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["HOUR", "(UTC)", "SELLER", "PRICE/PFLOP", "SIZE", "CLASS"]
        told = ("2027-01-15", "12h", "..ghijklmnop", "$0.05", "700", "GFLOP", "abababababab")
        assert tuple(lines[1].split()) == told
        assert "(this node)" in lines[2]
        assert lines[3].endswith(CLASS_NAME)

    def test_json_is_what_the_node_told(self, node: Any, capsys: Output) -> None:
        assert run(["trades", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == node.service.traded

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            (["--class", OTHER_CLASS[:8]], [0, 1]),
            (["--class", OTHER_CLASS], [0, 1]),
            (["--class", CLASS_NAME], [30]),
            (["--since", "2027-01-15T11:00"], [0, 1]),
            (["--since", "2027-01-15T12:00", "--class", CLASS_NAME], []),
        ],
    )
    def test_some_are_chosen_by_class_and_date(
        self, node: Any, capsys: Output, options: list[str], found: list[int]
    ) -> None:
        assert run(["trades", "--json", *options]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [int(each["id"], 16) for each in told] == found

    @pytest.mark.parametrize(
        "options", [["--class", "nonsense"], ["--class", "abc"], ["--since", "soon"]]
    )
    def test_bad_options_are_one_clear_error(
        self, node: Any, capsys: Output, options: list[str]
    ) -> None:
        assert run(["trades", *options]) == 2
        told = capsys.readouterr().err
        assert told.count("error:") == 1
        assert options[1] in told

    def test_an_empty_tape_says_so(self, start_node: StartNode, capsys: Output) -> None:
        start_node()
        assert run(["trades"]) == 0
        assert "No trades known" in capsys.readouterr().out

    def test_no_node_is_said(self, home: Path, capsys: Output) -> None:
        assert run(["trades"]) == 4
        assert "p2pflop node" in capsys.readouterr().err

    def test_watching_goes_on_with_what_is_new(
        self, node: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def events(_: Client) -> Iterator[dict[str, Any]]:
            yield {"seq": 1, "kind": "trade", **trade(1)}
            yield {"seq": 2, "kind": "trade", **trade(77)}
            yield {"seq": 3, "kind": "trade", **trade(78, class_id="ef" * 32)}
            yield {"seq": 3, "kind": "trade", **trade(77)}
            raise KeyboardInterrupt

        monkeypatch.setattr(Client, "trade_events", events)
        assert run(["trades", "--watch", "--json", "--class", OTHER_CLASS]) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [int(each["id"], 16) for each in told] == [1, 0, 77]
        assert run(["trades", "--watch"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 5

    def test_events_come_from_the_node(self, node: Any) -> None:
        events = Client().trade_events(after=1)
        assert [next(events)["seq"] for _ in range(2)] == [2, 3]


MARKET = {
    "classes": [
        {
            "class_id": OTHER_CLASS,
            "asks": 3,
            "accounts": 2,
            "depth": [
                {"price_nusd": 10**7, "asks": 1, "accounts": 1},
                {"price_nusd": 2 * 10**7, "asks": 2, "accounts": 2},
            ],
            "last_nusd": 15 * 10**6,
            "low_nusd": 10**7,
            "high_nusd": None,
            "hour_gflop": 9,
            "day_gflop": 2_000,
            "day_trades": 4,
            "day_accounts": 3,
        }
    ],
    "take": {"fills": 2, "paid_nusd": 157, "got_nusd": 157, "take_nusd": 0},
}


class TestBook:
    @pytest.fixture(autouse=True)
    def _market(self, start_node: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
        start_node()
        monkeypatch.setattr(Client, "market", lambda _: MARKET)

    def test_classes_have_price_volume_and_depth(self, capsys: Output) -> None:
        assert run(["book"]) == 0
        text = capsys.readouterr().out
        assert "No asks known yet" in text
        [line] = [line for line in text.splitlines() if line.startswith("abababababab")]
        assert re.split("  +", line)[1:] == [
            "$0.015",
            "$0.01",
            "9 GFLOP",
            "2 TFLOP",
            "4 of 3",
            "3 of 2",
        ]
        assert "take rate: $0.00 (0 %) of $0.000000157" in text

    def test_depth_is_shown_price_by_price(self, capsys: Output) -> None:
        assert run(["book", "--classes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        at = lines.index("depth of abababababab")
        assert [line.split() for line in lines[at + 2 : at + 4]] == [
            ["$0.01", "1", "1"],
            ["$0.02", "2", "2"],
        ]
        assert lines[at + 4] == "... and 1 ask above"
        assert run(["book", "--classes", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == MARKET

    def test_a_class_that_nobody_asks_for_has_no_depth(self) -> None:
        assert depth_lines({"classes": [{"class_id": OTHER_CLASS}]})[-1] == "nothing asked"

    def test_the_ledger_shows_the_take_rate_too(
        self, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = {"owed_nusd": 0, "owing_nusd": 0, "take": MARKET["take"]}
        monkeypatch.setattr(Client, "ledger", lambda _: ledger)
        assert run(["ledger"]) == 0
        assert "take rate: $0.00 (0 %)" in capsys.readouterr().out

    def test_a_take_that_is_not_zero_would_be_seen(self) -> None:
        taken = {"fills": 1, "paid_nusd": 10**9, "got_nusd": 95 * 10**7, "take_nusd": 5 * 10**7}
        assert take_line(taken).startswith("take rate: $0.05 (5 %) of $1.00 ")
        none = {"fills": 0, "paid_nusd": 0, "got_nusd": 0, "take_nusd": 0}
        assert "(none paid)" in take_line(none)


class TestWatchingTheBook:
    def test_only_what_changes_is_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tape_cli, "WATCH_S", 0)
        books = iter(
            [
                [ask(1), ask(2)],
                [ask(1, sheet=2), ask(2, sheet=2)],
                [ask(1), ask(2, price_nusd=1)],
                [ask(1)],
            ]
        )
        changes = ask_changes(lambda: next(books))
        told = []
        for _ in range(5):
            change, each = next(changes)
            told.append((change, each["ask"], each["price_nusd"]))
        dear = 5 * 10**7
        assert told == [
            ("new", 1, dear),
            ("new", 2, dear),
            ("gone", 2, dear),
            ("new", 2, 1),
            ("gone", 2, 1),
        ]

    def test_json_lines_name_the_change(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sleep = time.sleep

        def interrupt(seconds: float) -> None:
            if seconds == tape_cli.WATCH_S:  # others wait for a compiler's version
                raise KeyboardInterrupt
            sleep(seconds)

        start_node()
        monkeypatch.setattr(Client, "book", lambda _: [ask(1)])
        monkeypatch.setattr(time, "sleep", interrupt)
        assert run(["book", "--watch", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"change": "new", **ask(1)}
        assert run(["book", "--watch"]) == 0
        assert capsys.readouterr().out.split()[:2] == ["new", "..ghijklmnop"]

    @pytest.mark.parametrize("command", [["book", "--watch"], ["trades", "--watch"]])
    def test_ctrl_c_on_a_terminal_ends_it_well(self, node: Any, command: list[str]) -> None:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "p2pflop.cli.main", *command],
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        )
        os.close(theirs)
        shown = b""
        awaited = b"take rate" if command[0] == "book" else b"12h"
        kill = threading.Timer(60, process.kill)
        kill.start()
        try:
            while awaited not in shown:
                shown += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, shown
        finally:
            kill.cancel()
            process.kill()
            process.wait()
            os.close(ours)
        assert b"Traceback" not in shown


def test_explaining_what_was_not_bought_here_says_who_has_the_evidence(
    start_node: StartNode, capsys: Output
) -> None:
    start_node()
    assert run(["explain", "0123456789ab"]) == 2
    assert "asks the buyer for a file" in capsys.readouterr().err
