"""The tutorial's purchase between real nodes: what it prints is what the commands print."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pflop.cli.main import run

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
OF_THE_MOMENT = ("step", "lowering", "loss", "acc")
"""What is printed every few seconds, and values that depend on the class."""
ONES_OWN = (
    (r"\.\.\w{10}", "PEER"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"),
    (r"\b[0-9a-f]{64}\b", "HASH"),
    (r"\b[0-9a-f]{12}\b", "ID"),
    (r"\b[\d.]+ (GB|GFLOP/s|ms|s)\b", "SIZE"),
    (r"\b[\d,]+ bytes\b", "BYTES"),
    (r" +", " "),
)
"""Names, times, and the sizes of a machine; and the widths of columns that go with them."""


def shown(heading: str) -> list[list[str]]:
    """The lines of each block of output under a heading of the tutorial."""
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    return [plain(block) for block in re.findall(r"```text\n(.*?)```", section, re.DOTALL)]


def plain(text: str) -> list[str]:
    for pattern, name in ONES_OWN:
        text = re.sub(pattern, name, text)
    lines = [line.strip() for line in text.splitlines()]
    return sorted(line for line in lines if line and not line.startswith(OF_THE_MOMENT))


def test_the_tutorial_prints_what_the_commands_print(
    start_node: StartNode,
    wait_until: Any,
    tmp_path: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seller = start_node("seller", "--ask", "0.05", "--class", "cpu-clang-nofma")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_until(lambda: buyer.get("/v1/book")["book"])
    monkeypatch.setenv("P2PFLOP_HOME", str(buyer.home))
    job = str(tmp_path / "first.p2pj")
    assert run(["trace", str(ROOT / "examples" / "first.py"), "-o", job]) == 0

    def printed(*command: str) -> list[str]:
        capsys.readouterr()
        assert run(command) == 0
        told = capsys.readouterr()
        return plain(told.out + told.err)

    assert printed("show", job) == shown("3. Look at the job before it runs")[0]
    _, book, quote, purchase = shown("6. Buy it from a provider")
    assert printed("book") == book
    assert printed("submit", job, "--quote") == quote
    assert printed("submit", job, "--max-usd", "0.01") == purchase
    wait_until(lambda: seller.get("/v1/ledger")["owed_nusd"] == 4)
    bought, sold = shown("7. Who owes whom")
    assert printed("ledger") == bought
    assert printed("ledger", "--home", str(seller.home)) == sold
