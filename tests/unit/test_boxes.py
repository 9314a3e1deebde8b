"""One account over many boxes: what a box gets, how long it serves, and what it cannot do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from p2pflop.cli.main import run
from p2pflop.errors import ConfigError
from p2pflop.franchise.samples import key
from p2pflop.keys import PrivateKey
from p2pflop.market.sheets import check_delegation, make_delegation
from p2pflop.node.boxes import MAX_BOX_NS, furnish_box
from p2pflop.node.delegating import FILE_NAME, LAST_NS, Delegated, read_delegation
from p2pflop.node.enrolling import Applicant, Enrolling
from p2pflop.node.franchise import Franchise
from p2pflop.node.home import open_home
from p2pflop.node.identity import Identity
from p2pflop.node.main import _end_with_delegation
from p2pflop.units import NS_PER_S
from tests.strict_market import sample_fetch

HOUR_NS = 3600 * NS_PER_S
DAY_NS = 24 * HOUR_NS
ACCOUNT = key(5)
NOW_NS = time.time_ns()


def test_a_box_is_of_the_account_and_has_not_its_key(tmp_path: Path) -> None:
    node = furnish_box(tmp_path / "box", ACCOUNT, "main", NOW_NS, NOW_NS + DAY_NS)
    with open_home(tmp_path / "box") as home:
        assert not isinstance(home.account, PrivateKey)
        assert home.account.public_key == ACCOUNT.public_key
        identity = Identity(home.account, home.node, "main")
        wire = identity.delegation(NOW_NS)
        assert check_delegation(wire, node, NOW_NS, NOW_NS + HOUR_NS) == ACCOUNT.public_key
    assert {path.name for path in (tmp_path / "box").iterdir()} == {
        "delegation.bin",
        "node.pem",
        "lock",
        "token",
    }
    assert ((tmp_path / "box" / "node.pem").stat().st_mode & 0o777) == 0o600


def test_a_renewal_leaves_the_box_its_key(tmp_path: Path) -> None:
    first = furnish_box(tmp_path, ACCOUNT, "main", NOW_NS, NOW_NS + 2 * HOUR_NS)
    assert furnish_box(tmp_path, ACCOUNT, "main", NOW_NS, NOW_NS + DAY_NS) == first
    found = read_delegation(tmp_path / FILE_NAME, first, "main", NOW_NS)
    assert found.left_ns(NOW_NS) == DAY_NS - LAST_NS


@pytest.mark.parametrize("time_ns", [0, LAST_NS, MAX_BOX_NS + 1])
def test_times_that_are_not_signed_for(tmp_path: Path, time_ns: int) -> None:
    with pytest.raises(ConfigError, match="more than an hour"):
        furnish_box(tmp_path / "box", ACCOUNT, "main", NOW_NS, NOW_NS + time_ns)
    assert not (tmp_path / "box").exists()


def test_the_home_of_an_account_is_no_box(tmp_path: Path) -> None:
    with open_home(tmp_path):
        pass
    with pytest.raises(ConfigError, match="account of its own"):
        furnish_box(tmp_path, ACCOUNT, "main", NOW_NS, NOW_NS + DAY_NS)
    (tmp_path / FILE_NAME).write_bytes(b"")
    with pytest.raises(ConfigError, match="has both"), open_home(tmp_path):
        pytest.fail("it was opened")


@pytest.mark.parametrize(
    ("node", "network", "from_ns", "until_ns", "text"),
    [
        (6, "main", -DAY_NS, LAST_NS - 1, "does not cover the time"),
        (6, "main", HOUR_NS, DAY_NS, "does not cover the time"),
        (7, "main", -DAY_NS, DAY_NS, "names another node"),
        (6, "test", -DAY_NS, DAY_NS, "delegation"),
    ],
)
def test_what_does_not_serve(
    tmp_path: Path, node: int, network: str, from_ns: int, until_ns: int, text: str
) -> None:
    wire = make_delegation(
        ACCOUNT, key(node).public_key, NOW_NS + from_ns, NOW_NS + until_ns, network
    )
    (tmp_path / FILE_NAME).write_bytes(wire)
    with pytest.raises(ConfigError, match=text) as caught:
        read_delegation(tmp_path / FILE_NAME, key(6).public_key, "main", NOW_NS)
    assert "p2pflop delegate" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"x" * 100_000])
def test_bytes_that_are_no_delegation(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(ConfigError, match="does not serve"):
        read_delegation(tmp_path / FILE_NAME, key(6).public_key, "main", NOW_NS)


async def test_a_box_cannot_enrol_its_account() -> None:
    fetch = sample_fetch()
    account = Delegated(ACCOUNT.public_key, b"", NOW_NS + DAY_NS)
    issuer = fetch.root
    franchise = Franchise({issuer: "http://r"}, account.public_key, bytes(32), lambda: NOW_NS)
    applicant = Applicant("ada", "", "1")
    enrolling = Enrolling(
        franchise, issuer, account, fetch.open("http://r"), applicant, lambda: NOW_NS
    )
    await enrolling.step()
    assert "the account's key" in franchise.watched[issuer].waits_for


async def test_a_node_stops_in_order_before_its_delegation_ends(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = trio.current_time()
    monkeypatch.setattr(
        time, "time_ns", lambda: NOW_NS + int((trio.current_time() - began) * NS_PER_S)
    )
    stop = trio.Event()
    account = Delegated(ACCOUNT.public_key, b"", NOW_NS + 3 * HOUR_NS)
    await _end_with_delegation(account, stop)
    assert stop.is_set()
    assert 0 <= trio.current_time() - began - 2 * 3600 < 61


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, box = tmp_path / "home", tmp_path / "box"
    command = ["delegate", str(box), "--home", str(home)]
    assert run(command) == 2
    assert "account.pem" in capsys.readouterr().err
    with open_home(home) as opened:
        account = opened.account.public_key
    assert run([*command, "--for", "30d", "--json"]) == 0
    with open_home(box) as opened:
        assert opened.account.public_key == account
    assert run([*command, "--for", "9999d"]) == 2
    assert "at most 366 days" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["account.pem", FILE_NAME])
def test_a_home_that_lost_its_account_makes_no_other(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    with open_home(home):
        pass
    if name == FILE_NAME:
        assert run(["delegate", str(tmp_path / "box"), "--home", str(home)]) == 0
        home = tmp_path / "box"
    (home / name).unlink()
    with pytest.raises(ConfigError, match="has a node's key and no account"), open_home(home):
        pass
    assert not (home / "account.pem").exists()


def test_a_first_start_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    with open_home(tmp_path) as opened:
        account = opened.account.public_key
    (tmp_path / "node.pem").unlink()
    with open_home(tmp_path) as opened:
        assert opened.account.public_key == account
