"""docs/franchise.md, read from top to bottom: its commands are given, and do what it says.

What stands for something of the reader's own (a key, a URL, an account, a folder) is replaced by
what there is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pflop.cli.main import run
from p2pflop.client import Client
from tests.e2e.test_first_light import counting_job, submit
from tests.e2e.test_strict_market import Registry, account_of, asks, franchise, waits_for
from tests.tidy.test_documents import ROOT, shell_commands

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]
PAGE = ROOT / "docs" / "franchise.md"
ACCOUNT, CLAIM = "3b6a27bcceb6", "5705a365685c"
ASK = "90000"


class Page:
    """The commands that are still to be given. ``here`` says what stands for what."""

    def __init__(self, capsys: Output) -> None:
        self.left = [words[1:] for words in shell_commands(PAGE) if words[0].endswith("p2pflop")]
        self.here: dict[str, str] = {}
        self._capsys = capsys

    def take(self, *beginning: str) -> list[str]:
        """The next command that begins so, as it is given here."""
        for place, words in enumerate(self.left):
            if words[: len(beginning)] == list(beginning):
                del self.left[place]
                return [self._replaced(word) for word in words]
        raise AssertionError(f"the page has no other command {beginning}")

    def _replaced(self, word: str) -> str:
        for told, here in self.here.items():
            word = word.replace(told, here)
        return word

    def give(self, *beginning: str, home: Path, more: tuple[str, ...] = (), code: int = 0) -> str:
        """Give that command in ``home``; what it prints."""
        self._capsys.readouterr()
        assert run([*self.take(*beginning), *more, "--home", str(home)]) == code
        return self._capsys.readouterr().out


def test_the_page_is_true(
    start_node: StartNode,
    wait_until: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    monkeypatch.chdir(tmp_path)
    page, office = Page(capsys), tmp_path / "office"
    page.here = {"/media/usb": str(tmp_path), "/backups": str(tmp_path)}
    page.give("registry", "init", home=office)
    page.take("registry", "serve")
    registry = Registry(office, capsys)
    try:
        page.here["KEY@https://registry.example.org"] = f"{registry.key}@{registry.url}"
        assert "p2pflop node --ask" in _told(page, capsys, "quote", home=tmp_path / "none")
        page.give("doctor", home=tmp_path / "none")

        # Enrol and pay.
        flags = page.take("node", "--ask")[3:]
        box = start_node("box", "--ask", ASK, *flags)
        page.here[ACCOUNT] = account_of(box)
        wait_until(lambda: waits_for(box) == "the operator's approval")
        assert account_of(box) in page.give("registry", "list", home=office, more=("--json",))
        page.give("registry", "approve", home=office, more=("--yes",))
        wait_until(lambda: "pay $10" in waits_for(box))
        page.give("registry", "paid", home=office, more=("--yes",))
        wait_until(lambda: franchise(box)["attestation"], 10)
        assert page.give("registry", "enroll", home=box.home) == "attested, 364 days left\n"
        assert "attestation" in page.give("registry", "verify", home=box.home)
        wait_until(lambda: re.search(r"attested for 36\d more days", box.log.read_text()))

        # Guidelines, and another box.
        assert "guideline attestation" in page.give("doctor", home=box.home, code=2)
        page.give("delegate", "box2", home=box.home)
        page.give("delegate", "box3", home=box.home)
        words = page.take("node", "--home", "box2")
        known = ("--connect", box.addresses()[0])
        other = start_node("box2", *words[words.index("--slots") :], *known, "--ask", ASK)
        wait_until(lambda: franchise(other)["attestation"])
        assert account_of(other) == account_of(box)

        # First income.
        buyer = start_node("buyer", "--registry", f"{registry.key}@{registry.url}", *known)
        wait_until(lambda: len(asks(buyer)) == 2)
        submit(counting_job(20), buyer).result(timeout=60)
        seller = wait_until(lambda: next((n for n in (box, other) if owed(n)), None))
        page.give("quote", home=seller.home)
        page.give("book", home=seller.home)
        page.give("trades", home=seller.home)
        page.give("jobs", home=seller.home)
        page.here[ACCOUNT] = account_of(buyer)
        assert account_of(buyer)[:8] in page.give("ledger", home=seller.home)
        due = owed(seller)
        paid = ["pay", account_of(box), f"{due / 10**9:.9f}", "--yes", "--home", str(buyer.home)]
        assert run(paid) == 0
        page.here[CLAIM] = wait_until(lambda: claim_of(seller) or claim_of(box))[:12]
        holder = seller if claim_of(seller) else box
        page.give("payments", home=holder.home)
        page.give("received", home=holder.home, more=("--yes",))
        wait_until(lambda: owed(box) + owed(other) == 0)
        page.give("ledger", home=seller.home)
        assert "amount_usd" in page.give("statement", home=seller.home)

        # The registry's own side.
        assert "amount_usd" in page.give("registry", "export", home=office)
        page.give("registry", "backup", home=office)
    finally:
        registry.stop()
    assert page.left == []


def _told(page: Page, capsys: Output, *beginning: str, home: Path) -> str:
    """What a command says to people, on either stream."""
    capsys.readouterr()
    assert run([*page.take(*beginning), "--home", str(home)]) == 0
    told = capsys.readouterr()
    return told.out + told.err


def owed(node: Any) -> int:
    """What all buyers owe, in nano-dollars, by the ledger of that node."""
    return sum(balance["due_nusd"] for balance in node.get("/v1/ledger")["balances"])


def claim_of(node: Any) -> str:
    """The id of a payment that waits for an answer there."""
    with Client(node.home) as client:
        found = [p["id"] for p in client.payments() if p["state"] == "claimed"]
    return str(found[0]) if found else ""
