"""Money on the command line: questions before anything is booked, tables, statements, risk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from p2pflop.cli.main import run
from p2pflop.cli.progress import RunView
from p2pflop.cli.statement import csv_of, decimal, parse_date, safe_cell
from p2pflop.cli.submit import print_quote
from p2pflop.client import Client
from p2pflop.errors import ConfigError
from p2pflop.market.credit import job_risk, ledger_risk, to_pay_nusd

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

ACCOUNT, OTHER = "ab" * 32, "cd" * 32
STATEMENT: dict[str, Any] = {
    "account": ACCOUNT,
    "own_account": OTHER,
    "since_ns": 0,
    "since": "2026-11-01T00:00:00Z",
    "opening_nusd": -5,
    "entries": [
        {
            "at_ns": 0,
            "at": "2026-11-02T00:00:00Z",
            "memo": '=HYPERLINK("http://evil","x")',
            "reference": "ef" * 32,
            "number": 3,
            "amount_nusd": -1_500_000_000,
            "balance_nusd": -1_500_000_005,
        }
    ],
    "closing_nusd": -1_500_000_005,
    "head": "12" * 32,
}


def answers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def owing(monkeypatch: pytest.MonkeyPatch, due_nusd: int) -> None:
    balance = {"account": ACCOUNT, "due_nusd": due_nusd, "received_nusd": 7 * 10**9}
    owed_nusd, owing_nusd = max(0, due_nusd), max(0, -due_nusd)
    ledger = {"owed_nusd": owed_nusd, "owing_nusd": owing_nusd, "balances": [balance]}
    ledger |= {"entries": [], "entry_count": 0}
    monkeypatch.setattr(Client, "ledger", lambda _: ledger)


def booked(node: Any) -> list[dict[str, Any]]:
    return list(node.service.money.values())


class TestPay:
    def test_nothing_is_booked_without_a_yes(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = start_node()
        for text in ("", "n\n", "\n"):
            answers(monkeypatch, text)
            assert run(["pay", ACCOUNT, "1.50"]) == 2
            told = capsys.readouterr()
            assert "Have you paid $1.50 to this account?" in told.err
            assert "not confirmed: nothing was booked" in told.err
            assert "--yes" in told.err
            assert told.out == ""
        assert booked(node) == []

    def test_what_is_owed_before_and_after_is_shown(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = start_node()
        owing(monkeypatch, -2 * 10**9)
        answers(monkeypatch, "y\n")
        assert run(["pay", ACCOUNT[:8], "1.50", "--reference", "invoice 7"]) == 0
        told = capsys.readouterr()
        assert f"account  {ACCOUNT}" in told.err
        assert "you owe  $2.00\n" in told.err
        assert "after it $0.50\n" in told.err
        assert "prepayment" not in told.err
        [payment] = booked(node)
        assert (payment["account"], payment["amount_nusd"]) == (ACCOUNT, 1_500_000_000)
        assert payment["reference"] == "invoice 7"
        assert told.out == payment["id"] + "\n"

    def test_more_than_is_owed_says_that_it_is_a_prepayment(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        owing(monkeypatch, -(10**9))
        answers(monkeypatch, "y\n")
        assert run(["pay", ACCOUNT, "1.50"]) == 0
        told = capsys.readouterr().err
        assert "That is $0.50 more than you owe: a prepayment." in told
        assert "after it $0.00 ($0.50 paid ahead)" in told

    def test_two_payments_are_two(self, start_node: StartNode) -> None:
        node = start_node()
        for _ in range(2):
            assert run(["pay", ACCOUNT, "1", "--yes", "--json"]) == 0
        assert len({payment["id"] for payment in booked(node)}) == 2

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([ACCOUNT, "0"], "a payment of nothing"),
            ([ACCOUNT, "-1"], "No such option"),
            ([ACCOUNT, "much"], "not an amount"),
            (["ab", "1"], "at least 8"),
            (["\x1b[2J", "1"], "is no account"),
            (["abababab", "1"], "none is named abababab"),
            ([ACCOUNT.upper(), "1"], "is no account"),
            ([ACCOUNT + "ab", "1"], "is no account"),
        ],
    )
    def test_what_is_no_account_or_amount_is_told(
        self, start_node: StartNode, capsys: Output, arguments: list[str], words: str
    ) -> None:
        node = start_node()
        assert run(["pay", *arguments, "--yes"]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert "\x1b[2J" not in told
        assert booked(node) == []

    def test_digits_of_two_accounts_name_neither(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        balances = [{"account": ACCOUNT[:-1] + end, "due_nusd": 0} for end in "01"]
        monkeypatch.setattr(Client, "ledger", lambda _: {"balances": balances})
        assert run(["pay", ACCOUNT[:12], "1", "--yes"]) == 2
        assert "2 are named" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["12D3KooWabcdefghij", "..abcdefghij"])
    def test_a_provider_is_named_as_the_book_and_a_refusal_name_it(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        node = start_node()
        asks = [
            {"provider": "12D3KooWabcdefghij", "account": ACCOUNT},
            {"provider": "12D3KooWzzzzzzzzzz", "account": OTHER},
        ]
        monkeypatch.setattr(Client, "book", lambda _: asks)
        assert run(["pay", name, "1", "--yes"]) == 0
        assert f"account  {ACCOUNT}" in capsys.readouterr().err
        assert [payment["account"] for payment in booked(node)] == [ACCOUNT]
        for nobody in ("..", "..j", "..bbbbbbbbbb", "12D3KooW"):
            assert run(["pay", nobody, "1", "--yes"]) == 2
            assert "none is named" in capsys.readouterr().err


class TestPayments:
    def test_a_claim_is_acknowledged_or_refused_by_its_first_digits(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = start_node()
        for amount in ("1", "2"):
            assert run(["received", ACCOUNT, amount, "--yes"]) == 0
        first, second = booked(node)
        for payment in (first, second):
            payment |= {"state": "claimed", "reference": "by \x1b[2Jbank"}
        answers(monkeypatch, "n\n")
        assert run(["received", first["id"][:12]]) == 2
        assert first["state"] == "claimed"
        answers(monkeypatch, "y\n")
        assert run(["received", first["id"][:12]]) == 0
        assert run(["refuse", second["id"][:12], "--reason", "no", "--yes"]) == 0
        assert (first["state"], second["state"]) == ("acknowledged", "refused")
        assert run(["received", "12345678"]) == 2
        assert run(["received", first["id"], "--reference", "x"]) == 2
        capsys.readouterr()
        assert run(["payments"]) == 0
        told = capsys.readouterr().out
        assert "acknowledged" in told
        assert "refused: no; not told yet (under way)" in told
        assert "\x1b" not in told

    def test_the_ledger_shows_claims_and_who_holds_the_risk(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        assert run(["pay", ACCOUNT, "3", "--yes"]) == 0
        owing(monkeypatch, 5)
        capsys.readouterr()
        assert run(["ledger"]) == 0
        told = capsys.readouterr().out
        assert "at risk: you, for the $0.000000005 that others owe you" in told
        assert "HAS PAID US" in told
        assert "$7.00" in told
        assert "claimed; not told yet" in told

    def test_the_ledger_says_that_it_lists_the_newest_entries(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        posting = {"account": ACCOUNT, "kind": "payable", "amount_nusd": -5}
        entry = {"at_ns": 0, "memo": "work delivered", "postings": [posting]}
        for count, is_told in ((1, False), (201, True)):
            ledger = {"owed_nusd": 0, "owing_nusd": 5, "entries": [entry], "entry_count": count}
            monkeypatch.setattr(Client, "ledger", lambda _, ledger=ledger: ledger)
            assert run(["ledger"]) == 0
            assert ("the newest 1 of 201 entries" in capsys.readouterr().err) is is_told


class TestStatement:
    def test_text_csv_and_json_say_the_same(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        asked: list[tuple[bytes, int]] = []

        def statement(_: Client, account: bytes, since_ns: int) -> dict[str, Any]:
            asked.append((account, since_ns))
            return STATEMENT

        monkeypatch.setattr(Client, "statement", statement)
        for form in ([], ["--csv"], ["--json"]):
            assert run(["statement", ACCOUNT, "--since", "2026-11-01", *form]) == 0
            told = capsys.readouterr().out
            assert "1.500000005" in told or "-1500000005" in told
            assert STATEMENT["head"] in told
        assert asked == [(bytes.fromhex(ACCOUNT), 1_793_491_200 * 10**9)] * 3
        assert run(["statement", ACCOUNT, "--csv", "--json"]) == 2

    def test_an_account_without_entries_has_a_statement_too(
        self, start_node: StartNode, capsys: Output
    ) -> None:
        start_node()
        assert run(["statement", ACCOUNT]) == 0
        assert "No entries." in capsys.readouterr().out
        assert run(["statement", ACCOUNT, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["closing_nusd"] == 0

    def test_csv_has_numbers_and_no_formulas(self) -> None:
        rows = list(csv.reader(io.StringIO(csv_of(STATEMENT))))
        assert rows[0] == ["time", "memo", "reference", "number", "amount_usd", "balance_usd"]
        assert rows[1][-1] == "-0.000000005"
        assert rows[2][1] == '\'=HYPERLINK("http://evil","x")'
        assert rows[2][-2:] == ["-1.500000000", "-1.500000005"]
        assert rows[3][1:3] == ["closing balance", STATEMENT["head"]]

    @pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\n@"])
    def test_a_text_that_a_spreadsheet_would_compute_is_quoted(self, start: str) -> None:
        cell = safe_cell(f"{start}1+1")
        assert cell[0] == "'"
        assert cell.isprintable()
        assert safe_cell("work delivered") == "work delivered"

    @pytest.mark.parametrize(
        ("nusd", "text"),
        [(0, "0.000000000"), (-1, "-0.000000001"), (1_234_567_890_123, "1234.567890123")],
    )
    def test_amounts_are_exact_decimals(self, nusd: int, text: str) -> None:
        assert decimal(nusd) == text

    @pytest.mark.parametrize(
        ("text", "since_s"),
        [
            ("1970-01-02", 86400),
            ("1970-01-02T00:00:01", 86401),
            ("1970-01-02T01:00+01:00", 86400),
            ("1970-01-02T00:00:00Z", 86400),
        ],
    )
    def test_dates_are_utc_unless_they_say_otherwise(self, text: str, since_s: int) -> None:
        assert parse_date(text) == since_s * 10**9

    @pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "2026-02-30", "\x1b[2J"])
    def test_what_is_no_date_is_told(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is not a date"):
            parse_date(text)

    @pytest.mark.parametrize("text", ["0001-01-01", "1969-12-31", "2117-01-01", "9999-12-31"])
    def test_what_no_node_can_be_asked_is_told_before_it_is(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is not from 1970 to 2115"):
            parse_date(text)


class TestRisk:
    def test_of_a_job_it_is_one_sentence(self) -> None:
        assert job_risk(400_000) == (
            "at risk: the provider until you countersign, up to $0.0004; "
            "you, one checkpoint interval"
        )
        assert job_risk(1, 5 * 10**9).endswith(
            "you, one checkpoint interval and the $5.00 that you have paid ahead"
        )
        assert "$1.00 that others owe you" in ledger_risk(10**9, 2 * 10**9)
        assert "$2.00 that you owe" in ledger_risk(10**9, 2 * 10**9)

    def test_it_is_told_with_the_fill(self) -> None:
        sheet = io.StringIO()
        view = RunView(Console(file=sheet, width=200))
        view.show({"kind": "filled", "provider": "p", "quote_nusd": 400_000, "prepaid_nusd": 10**9})
        assert job_risk(400_000, 10**9) in sheet.getvalue()

    def test_of_a_quote_it_is_the_best_deals(
        self, start_node: StartNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        owing(monkeypatch, 10**9)
        deal = {"provider": "p", "account": ACCOUNT, "total_nusd": 400_000, "price_nusd": 1}
        dearer = deal | {"account": OTHER, "total_nusd": 500_000}
        print_quote(Client(), {"deals": [deal, dearer], "misses": []})
        assert capsys.readouterr().out.splitlines()[-1] == job_risk(400_000, 10**9)
        for deals in ([deal | {"total_nusd": 0}], []):
            print_quote(Client(), {"deals": deals, "misses": []})
            assert "at risk" not in capsys.readouterr().out

    @pytest.mark.parametrize(("uncovered", "amount"), [(-5, 0), (0, 0), (1, 1), (2, 1), (3, 2)])
    def test_what_is_to_be_paid_counts_twice_and_is_rounded_up(
        self, uncovered: int, amount: int
    ) -> None:
        assert to_pay_nusd(uncovered) == amount
        assert to_pay_nusd(uncovered + 7, free_nusd=7) == amount
        assert to_pay_nusd(uncovered, free_nusd=-7) == amount
