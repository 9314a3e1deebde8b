"""The registry's commands as an operator and an applicant type them."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from p2pflop.cli.main import cli, run
from p2pflop.cli.registry import DECISIONS, OURS, UPKEEP, registry_command
from p2pflop.cli.registry_members import REFUSALS, REVOCATIONS
from p2pflop.cli.registry_words import date
from p2pflop.errors import ConfigError, VerificationError
from p2pflop.franchise.records import RefusalReason, RevocationReason
from p2pflop.franchise.samples import key
from p2pflop.node.home import read_key, write_private
from p2pflop.registry.audit import Memory, recall, remember
from p2pflop.registry.backup import check_file
from tests.serving_registry import LiveRegistry

Output = pytest.CaptureFixture[str]
Call = Callable[..., Any]


class Operator:
    """Commands in the home of a test."""

    def __init__(self, folder: Path, capsys: Output) -> None:
        self.home = folder / "home"
        self.root = folder / "usb" / "root.pem"
        self._capsys = capsys

    def __call__(self, *arguments: str, fails: int = 0) -> Any:
        """The JSON that a command prints, or the error's."""
        self._capsys.readouterr()
        code = run(["registry", *arguments, "--json", "--home", str(self.home)])
        out, err = self._capsys.readouterr()
        assert code == fails, err
        if fails:
            assert "Traceback" not in err
            return json.loads(err.splitlines()[-1])["error"]
        return json.loads(out)

    def text(self, *arguments: str, code: int = 0) -> str:
        """What a command prints for people."""
        self._capsys.readouterr()
        assert run(["registry", *arguments, "--home", str(self.home)]) == code
        out, err = self._capsys.readouterr()
        return out + err


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


@pytest.fixture
def operator(tmp_path: Path, capsys: Output) -> Operator:
    return Operator(tmp_path, capsys)


@pytest.fixture
def founded(operator: Operator) -> Operator:
    operator("init", "--root-key", str(operator.root), "--fee", "10")
    return operator


@pytest.fixture
def live(founded: Operator) -> Iterator[LiveRegistry]:
    registry = LiveRegistry(founded.home / "registry").start()
    yield registry
    registry.stop()


def apply(operator: Operator, url: str, *rest: str, seed: int = 1) -> Any:
    """With the account of a home of its own."""
    home = operator.home.with_name(f"franchise{seed}")
    home.mkdir(exist_ok=True)
    write_private(home / "account.pem", key(seed).to_pem())
    applicant = Operator(operator.home.parent, operator._capsys)
    applicant.home = home
    return applicant("enroll", url, *rest)


class TestFounding:
    def test_the_root_key_is_elsewhere_and_never_needed(self, founded: Operator) -> None:
        assert founded.root.stat().st_mode & 0o777 == 0o600
        issuer = read_key(founded.root, "").public_key.hex()
        founded.root.unlink()
        assert founded("fee")[0]["fee_nusd"] == 10 * 10**9
        [certificate, schedule] = founded("log")
        assert (certificate["kind"], schedule["kind"]) == ("certificate", "schedule")
        assert issuer not in str([path.name for path in founded.home.rglob("*")])

    def test_what_is_refused(self, operator: Operator, founded: Operator) -> None:
        assert "needs a root key" in operator("init", fails=2)["message"]
        again = operator("init", "--root-key", str(operator.root), fails=2)
        assert "already" in again["message"]
        inside = operator("init", "--root-key", str(operator.home / "registry" / "r"), fails=2)
        assert "own folder" in inside["message"]
        operator.home = operator.home.with_name("other")
        for option, value in (
            ("--fee", "-1"),
            ("--fee", "1e30"),
            ("--period", "1s"),
            ("--period", f"{10**40}d"),
            ("--slots", "0"),
            ("--slots", str(10**40)),
            ("--guidelines", ""),
            ("--network", "a/b"),
        ):
            error = operator("init", "--root-key", str(operator.root), option, value, fails=2)
            assert error["kind"] == "ConfigError"

    @pytest.mark.parametrize("name", [*OURS, *DECISIONS, *UPKEEP])
    def test_every_command_has_its_help(self, operator: Operator, name: str) -> None:
        text = operator.text(name, "--help")
        assert "Examples:" in text
        assert f"p2pflop registry {name}" in text
        for option in ("--json", "--home", "--debug"):
            assert option in text

    def test_every_command_is_listed(self) -> None:
        context = cli.make_context("p2pflop", ["registry"])
        assert registry_command.list_commands(context) == [*OURS, *DECISIONS, *UPKEEP]
        assert list(REFUSALS) == [each.name.lower() for each in RefusalReason]
        assert list(REVOCATIONS) == [each.name.lower() for each in RevocationReason]

    def test_without_a_registry(self, operator: Operator) -> None:
        for name in ("list", "attest", "log", "export", "serve"):
            error = operator(name, fails=2)
            assert "there is no registry" in error["message"]
            assert "registry init" in error["hint"]


class TestDecisions:
    def test_from_application_to_revocation(
        self, founded: Operator, live: LiveRegistry, tmp_path: Path
    ) -> None:
        account = key(1).public_key.hex()
        applied = apply(founded, live.url, "--contact", "ada@example.org", "--yes")
        assert (applied["state"], applied["waits_for"]) == ("waiting", "the operator's approval")
        assert [row["state"] for row in founded("list", "--waiting")] == ["waiting"]
        assert "ada@example.org" in founded.text("show", account[:8])
        assert founded("approve", account[:8], "--yes")["state"] == "enrolled"
        assert apply(founded, live.url)["waits_for"] == "the fee"
        assert founded("attest", account) == []
        paid = ("paid", account[:10], "10", "--reference", "bank 1", "--yes")
        assert founded(*paid)["state"] == "attested"
        assert founded(*paid)["booked"] is False
        assert apply(founded, live.url)["state"] == "attested"
        other = founded(*paid[:2], "11", *paid[3:], fails=2)
        assert "another amount" in other["message"]
        assert "365" in founded.text("list") or "364" in founded.text("list")
        assert founded("erase", account, "--yes")["erased"] is True
        assert "ada@example.org" not in founded.text("show", account)
        returned = founded("returned", account, "--reference", "bank 1", "--yes")
        assert returned["booked_nusd"] == 10 * 10**9
        assert returned["missing_nusd"] == 20 * 10**9
        revoked = founded("revoke", account, "--reason", "unpaid", "--yes")
        assert revoked["state"] == "revoked"
        kinds = [row["kind"] for row in founded("log")]
        assert kinds[2:] == ["enrolment", "attestation", "revocation"]
        assert "unpaid" in founded.text("log")
        books = founded.text("export")
        assert books.count("\n") == 4
        founded.text("export", "--out", str(tmp_path / "books.csv"))
        assert (tmp_path / "books.csv").read_text().count("\n") == 4
        assert [row["amount_nusd"] for row in founded("export", "--account", account[:8])] == [
            10**10,
            -(10**10),
            -(10**10),
        ]

    def test_refused(self, founded: Operator, live: LiveRegistry) -> None:
        apply(founded, live.url, "--contact", "bob", "--yes", seed=2)
        account = key(2).public_key.hex()
        founded("refuse", account, "--reason", "flood", "--yes")
        assert founded("list") == []
        assert founded("log")[-1]["what"].endswith(": flood")

    def test_nothing_is_done_without_a_yes(self, founded: Operator, live: LiveRegistry) -> None:
        apply(founded, live.url, "--contact", "bob", "--yes", seed=2)
        account = key(2).public_key.hex()
        for arguments in (
            ("approve", account),
            ("refuse", account, "--reason", "law"),
            ("fee", "5"),
            ("erase", account),
        ):
            assert "not confirmed" in founded(*arguments, fails=2)["message"]
        assert len(founded("log")) == 2

    def test_who_is_not_known(self, founded: Operator) -> None:
        for name in ("zz", "12345678", "1234567", "' OR 1=1"):
            assert founded("show", name, fails=2)["kind"] == "ConfigError"

    def test_fees(self, founded: Operator) -> None:
        founded("fee", "12.50", "--slots", "128", "--from", "2099-01-01", "--yes")
        first, second = founded("fee")
        assert (first["max_slots"], second["max_slots"]) == (64, 128)
        assert second["period_ns"] == first["period_ns"]
        assert "$12.50" in founded.text("fee")
        error = founded("fee", "1", "--from", "2020-01-01", "--yes", fails=2)
        assert "from before" in error["message"]
        for option, value in (("--slots", "65537"), ("--period", f"{10**40}d")):
            error = founded("fee", "1", option, value, "--yes", fails=2)
            assert "no schedule can be so" in error["message"]
            assert "slots are 1 to 65536" in error["hint"]
        assert founded("log", "--from", str(10**40), fails=2)["kind"] == "ConfigError"
        assert len(founded("fee")) == 2

    def test_control_characters_of_an_applicant_reach_no_terminal(
        self, founded: Operator, live: LiveRegistry
    ) -> None:
        with pytest.raises(AssertionError, match="printable"):
            apply(founded, live.url, "--contact", "\x1b[2Jada", "--yes")


class TestApplying:
    def test_what_is_refused(
        self, operator: Operator, founded: Operator, live: LiveRegistry
    ) -> None:
        assert "no account" in operator("enroll", live.url, fails=2)["message"]
        write_private(operator.home / "account.pem", key(1).to_pem())
        assert "reach you" in operator("enroll", live.url, fails=2)["message"]
        error = operator("enroll", live.url, "--contact", "a", fails=2)
        assert "not confirmed" in error["message"]
        wrong = f"{bytes(32).hex()}@{live.url}"
        error = operator("enroll", wrong, "--contact", "a", "--yes", fails=2)
        assert "not the one that was given" in error["message"]
        error = operator("enroll", "http://127.0.0.1:9", "--contact", "a", fails=4)
        assert "does not answer" in error["message"]


class TestKeys:
    def test_in_one_step(self, founded: Operator) -> None:
        root = str(founded.root)
        assert founded("certify", "--root-key", root)["installed"] is True
        assert founded("log")[-1]["what"].startswith("online key 2 until")
        assert "root key" in founded("certify", fails=2)["message"]

    def test_in_three_steps(self, founded: Operator, tmp_path: Path) -> None:
        asked, signed = str(tmp_path / "asked"), str(tmp_path / "signed")
        founded("certify", "--request", asked, "--withdraw", "--yes")
        error = founded("certify", "--sign", asked, "--root-key", str(founded.root), fails=2)
        assert "not confirmed" in error["message"]
        sign = ("certify", "--sign", asked, "--root-key", str(founded.root), "--yes")
        assert "--out" in founded(*sign, fails=2)["message"]
        founded(*sign, "--out", signed)
        assert founded("certify", "--install", signed)["installed"] is True
        assert founded("log")[-1]["what"].endswith("withdrawn")
        founded("fee", "3", "--yes")

    def test_what_is_refused(self, founded: Operator, tmp_path: Path) -> None:
        asked = str(tmp_path / "asked")
        both = founded("certify", "--request", asked, "--install", asked, fails=2)
        assert "choose one" in both["message"]
        (tmp_path / "junk").write_bytes(b"junk")
        (tmp_path / "huge").write_bytes(bytes(70_000))
        for name, code in (("junk", 2), ("huge", 2), ("none", 2)):
            founded("certify", "--install", str(tmp_path / name), fails=code)
        founded("certify", "--sign", str(tmp_path / "junk"), fails=11)
        write_private(tmp_path / "other.pem", key(3).to_pem())
        error = founded("certify", "--root-key", str(tmp_path / "other.pem"), fails=2)
        assert "another registry" in error["message"]


class TestVerify:
    def test_an_honest_log(self, founded: Operator, live: LiveRegistry) -> None:
        issuer = read_key(founded.root, "").public_key.hex()
        told = founded("verify", f"{issuer}@{live.url}")
        assert (told["leaves"], told["certificate"], told["schedule"]) == (2, 1, 1)
        text = founded.text("verify", live.url)
        assert "a remembered head of 2 leaves" in text
        assert "one history" in text
        assert "compare it" in text
        error = founded("verify", live.url, "--key", bytes(32).hex(), fails=10)
        assert "not the one" in error["message"]

    def test_a_forked_one_is_proven(
        self, founded: Operator, live: LiveRegistry, tmp_path: Path
    ) -> None:
        """A backup from before is put back, and goes on as if nothing had been."""
        issuer = read_key(founded.root, "").public_key
        apply(founded, live.url, "--contact", "ada", "--yes")
        live.stop()
        folder = founded.home / "registry"
        founded("backup", str(tmp_path / "old.db"))
        account = key(1).public_key.hex()
        founded("approve", account, "--yes")
        founded("paid", account, "10", "--reference", "1", "--yes")
        again = LiveRegistry(folder).start()
        assert founded("verify", again.url)["leaves"] == 4
        again.stop()
        for path in folder.glob("registry.db*"):
            path.unlink()
        founded("restore", str(tmp_path / "old.db"))
        founded("refuse", account, "--reason", "law", "--yes")
        for fee in ("1", "2", "3"):
            founded("fee", fee, "--yes")
        forked = LiveRegistry(folder).start()
        error = founded("verify", forked.url, fails=10)
        assert "two histories" in error["message"]
        assert error["kind"] == VerificationError.__name__
        text = founded.text("verify", forked.url, "--evidence", str(tmp_path / "p"), code=10)
        assert (tmp_path / "p").read_bytes().hex() in text
        assert founded("verify", forked.url, "--forget")["leaves"] == 6
        forked.stop()
        memory = recall(founded.home, issuer)
        assert memory is not None
        founded("certify", "--withdraw", "--yes", "--root-key", str(founded.root))
        healed = LiveRegistry(folder).start()
        remember(founded.home, issuer, Memory(memory.head, memory.certificates))
        error = founded("verify", healed.url, fails=10)
        assert "two histories" in error["message"]
        healed.stop()

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ("UPDATE leaves SET body = zeroblob(200) WHERE number = 1", "leaf 1"),
            ("DELETE FROM leaves WHERE number = 3", "hides leaf 3 of 4"),
            ("DELETE FROM heads WHERE size > 2", "has signed a log of 4"),
        ],
    )
    def test_a_log_that_was_edited_or_cut_on_the_disk(
        self, founded: Operator, change: str, text: str
    ) -> None:
        folder = founded.home / "registry"
        for fee in ("5", "6"):
            founded("fee", fee, "--yes")
        whole = LiveRegistry(folder).start()
        assert founded("verify", whole.url)["leaves"] == 4
        whole.stop()
        with closing(sqlite3.connect(folder / "registry.db")) as database, database:
            assert database.execute(change).rowcount
        edited = LiveRegistry(folder).start()
        error = founded("verify", edited.url, fails=10)
        edited.stop()
        assert text in error["message"]
        founded("backup", str(founded.home / "copy.db"), fails=10)

    def test_withdrawing_at_once_after_a_restore_heals(
        self, founded: Operator, tmp_path: Path
    ) -> None:
        folder = founded.home / "registry"
        founded("backup", str(tmp_path / "old.db"))
        founded("fee", "5", "--yes")
        first = LiveRegistry(folder).start()
        founded("verify", first.url)
        first.stop()
        for path in folder.glob("registry.db*"):
            path.unlink()
        founded("restore", str(tmp_path / "old.db"))
        founded("certify", "--withdraw", "--yes", "--root-key", str(founded.root))
        healed = LiveRegistry(folder).start()
        told = founded("verify", healed.url)
        healed.stop()
        assert "withdrawn" in told["compared"]


class TestBackup:
    def test_while_it_is_served(
        self, founded: Operator, live: LiveRegistry, tmp_path: Path
    ) -> None:
        live.enrol(key(1), 10**10)
        target = tmp_path / "copy.db"
        assert founded("backup", str(target)) == {"file": str(target), "leaves": 4, "entries": 2}
        assert target.stat().st_mode & 0o777 == 0o600
        assert check_file(target).leaves == 4
        assert "there already" in founded("backup", str(target), fails=2)["message"]
        assert "there is a registry" in founded("restore", str(target), fails=2)["message"]
        assert not list(tmp_path.glob("*.part"))

    def test_of_a_file_that_lost_its_name(self, founded: Operator, tmp_path: Path) -> None:
        with closing(sqlite3.connect(founded.home / "registry" / "registry.db")) as database:
            database.execute("DELETE FROM facts")
            database.commit()
        error = founded("backup", str(tmp_path / "copy.db"), fails=10)
        assert "does not say which registry it is" in error["message"]
        assert not list(tmp_path.glob("copy*"))

    def test_elsewhere(self, founded: Operator, live: LiveRegistry, tmp_path: Path) -> None:
        live.enrol(key(1), 10**10)
        founded("backup", str(tmp_path / "copy.db"))
        before = founded("list")
        founded.home = tmp_path / "new"
        assert founded("restore", str(tmp_path / "copy.db"))["leaves"] == 4
        assert [row["account"] for row in founded("list")] == [row["account"] for row in before]
        error = founded("fee", "3", "--yes", fails=2)
        assert "online key of this registry is not here" in error["message"]
        founded("certify", "--root-key", str(founded.root))
        founded("fee", "3", "--yes")

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ("UPDATE leaves SET body = x'00' WHERE number = 1", 10),
            ("DELETE FROM leaves WHERE number = 1", 10),
            ("UPDATE nodes SET hash = zeroblob(32) WHERE level = 0 AND number = 1", 10),
            ("DELETE FROM heads", 10),
            ("UPDATE heads SET wire = x'00'", 10),
            ("PRAGMA user_version = 9", 2),
        ],
    )
    def test_of_something_that_does_not_hold(
        self, founded: Operator, tmp_path: Path, change: str, code: int
    ) -> None:
        copy = tmp_path / "copy.db"
        founded("backup", str(copy))
        with closing(sqlite3.connect(copy)) as connection:
            connection.execute(change)
            connection.commit()
        founded.home = tmp_path / "new"
        founded("restore", str(copy), fails=code)
        assert not (founded.home / "registry" / "registry.db").exists()

    def test_of_what_is_no_database(self, founded: Operator, tmp_path: Path) -> None:
        founded.home = tmp_path / "new"
        (tmp_path / "text").write_text("no database at all, but rather long" * 40)
        error = founded("restore", str(tmp_path / "text"), fails=2)
        assert "not a registry's database" in error["message"]
        assert "no file" in founded("restore", str(tmp_path / "none"), fails=2)["message"]


def test_dates() -> None:
    assert date(0) == ""
    assert date(1_800_000_000 * 10**9) == "2027-01-15 08:00:00"
    assert date(2**63 - 1) == "2262-04-11 23:47:16"


def test_errors_are_config_errors(founded: Operator) -> None:
    assert founded("paid", "aa" * 32, "x", "--reference", "1", fails=2)["kind"] == (
        ConfigError.__name__
    )
