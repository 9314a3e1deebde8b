"""An unmodified script whose providers are killed with -9, at random moments: the same digits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pflop.kernels.classes import environment
from tests.e2e.test_first_light import wait_for_asks

StartNode = Callable[..., Any]
SCRIPT = Path(__file__).parents[2] / "examples" / "plain" / "digits.py"
LAST_LINE = 7
"""A kill after a later one may find the script at its end: it prints eleven."""
GAP_S = 0.1
"""About what lies between two lines of a warm run."""
NOTE = "p2pflop: "


class Market:
    """A buyer and two providers, who are told apart by their accounts."""

    def __init__(self, start_node: StartNode, wait_until: Any) -> None:
        self._start_node = start_node
        self._wait_until = wait_until
        self.buyer = start_node("buyer")
        self._address = self.buyer.addresses()[0]
        self.sellers = [self._start(number) for number in range(2)]
        self.accounts = [node.get("/v1/status")["account"] for node in self.sellers]
        wait_for_asks(self.buyer, 2, wait_until)

    def _start(self, number: int) -> Any:
        ask = str(40 + number)
        return self._start_node(f"seller-{number}", "--ask", ask, "--connect", self._address)

    def run(self, after_line: int, delay_s: float) -> str:
        """What the script prints if its provider is killed so long after that line of it; 0 is the
        note that tells of the lease."""
        bare = {name: value for name, value in os.environ.items() if name != "DEV"}
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env=bare | {"CLOUD": "1", "P2PFLOP_HOME": str(self.buyer.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(1 + after_line)]
        time.sleep(delay_s)
        [card] = self.buyer.get("/v1/status")["sessions"]
        victim = self.accounts.index(card["account"])
        self.sellers[victim].kill()
        said += process.stdout.readlines()
        assert process.wait(60) == 0, said
        notes = [line for line in said if line.startswith(NOTE)]
        assert "the provider is lost" in "".join(notes), said
        self.sellers[victim] = self._start(victim)
        wait_for_asks(self.buyer, 2, self._wait_until)
        return "".join(line for line in said if not line.startswith(NOTE))

    def owed(self, account: str, node: Any) -> int:
        """How far a node's ledger is from zero with an account."""
        balances = node.get("/v1/ledger")["balances"]
        return sum(abs(each["due_nusd"]) for each in balances if each["account"] == account)

    def ledgers_agree(self) -> bool:
        """Whether buyer and sellers say the same, and that something is owed."""
        own = self.buyer.get("/v1/status")["account"]
        ours = [self.owed(account, self.buyer) for account in self.accounts]
        theirs = [self.owed(own, node) for node in self.sellers]
        return ours == theirs and sum(ours) > 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("moments", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_at_a_random_moment_changes_no_digit(
    start_node: StartNode, wait_until: Any, moments: int
) -> None:
    native = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env=os.environ | environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        market = Market(start_node, wait_until)
        expected = native.communicate(timeout=100)[0]
    finally:
        native.kill()
        native.communicate()
    assert native.returncode == 0
    assert len(expected.splitlines()) == LAST_LINE + 4
    rng = random.Random(6)  # noqa: S311
    for _ in range(moments):
        line, delay_s = rng.randint(0, LAST_LINE), rng.uniform(0, GAP_S)
        assert market.run(line, delay_s) == expected, f"{delay_s} s after line {line}"
    wait_until(market.ledgers_agree)
