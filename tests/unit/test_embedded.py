"""How a client starts a node for itself, and how that node makes way for its owner's."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from p2pflop.cli import embedded as taking_over
from p2pflop.cli.embedded import end_embedded
from p2pflop.client import Client
from p2pflop.embedded import failure_of, node_command, start_embedded
from p2pflop.errors import ConfigError, HomeLockedError, StoreFullError
from p2pflop.node.config import load_settings
from p2pflop.node.home import held
from p2pflop.node.main import _announce_start

StartNode = Callable[..., Any]


def test_a_relative_home_is_the_callers_not_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The node runs in its home, where a relative path would mean another folder.
    monkeypatch.chdir(tmp_path)
    assert node_command(Path("home"))[-2:] == ["--home", str(tmp_path / "home")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embedded": True}, "embedded, for programs of its own user alone"),
        ({"ask_nusd": 50_000_000}, r"selling at \$0.05 a PFLOP"),
        (
            {"ask_nusd": 50_000_000, "max_lease_s": 3600, "max_nodes": 9},
            r"selling at \$0.05 a PFLOP, jobs up to 1 h 0 min, 9 nodes, sandbox",
        ),
        ({}, "selling nothing"),
    ],
)
def test_a_log_says_what_the_node_is_for(
    settings: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = MagicMock(settings=load_settings({"home": tmp_path, **settings}))
    daemon.workers.level = 3
    with caplog.at_level(logging.INFO):
        _announce_start(daemon)
    assert re.search(words, caplog.text)
    assert ("selling at" in caplog.text) == ("ask_nusd" in settings)


def test_a_home_on_a_full_disk_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFullError, match=r"^cannot write .*lock: No space left") as caught:
        held(tmp_path).__enter__()
    assert "Free space" in caught.value.hint


def test_a_node_that_had_no_room_for_its_last_words_is_told_as_such(tmp_path: Path) -> None:
    log = tmp_path / "embedded.log"
    log.touch()
    error = failure_of("embedded node", StoreFullError.exit_code, log)
    assert isinstance(error, StoreFullError)
    assert str(tmp_path) in error.message
    assert "Free space" in error.hint
    assert isinstance(failure_of("embedded node", 1, log), ConfigError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = node_command(tmp_path / "file" / "home")
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=full, check=False, timeout=60)
    assert ended.returncode == ConfigError.exit_code


class TestMakingWay:
    @pytest.fixture
    def home(self) -> Path:
        return Path(os.environ["P2PFLOP_HOME"])

    @pytest.fixture
    def lock(self, home: Path) -> Iterator[ExitStack]:
        """The home is locked until this is closed."""
        with ExitStack() as lock:
            lock.enter_context(held(home))
            yield lock

    @pytest.fixture
    def signals(self, lock: ExitStack, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The signals that the node got; SIGINT ends it, which frees the lock."""
        seen: list[int] = []

        def kill(pid: int, number: int) -> None:
            assert pid == os.getpid()
            if number:
                seen.append(number)
                lock.close()

        monkeypatch.setattr(os, "kill", kill)
        return seen

    def test_an_idle_one_is_ended(
        self, start_node: StartNode, home: Path, signals: list[int]
    ) -> None:
        start_node(embedded=True, script=[("cancelled", {})])
        Client().submit(b"a job that is over")
        assert end_embedded(home)
        assert signals == [signal.SIGINT]

    def test_a_busy_one_goes_on_and_is_told(
        self, start_node: StartNode, home: Path, signals: list[int]
    ) -> None:
        start_node(embedded=True)
        run_id = Client().submit(b"job")
        with pytest.raises(HomeLockedError, match=f"runs job {run_id}") as caught:
            end_embedded(home)
        assert f"p2pflop cancel {run_id}" in caught.value.hint
        assert signals == []

    def test_one_that_does_not_end_is_told(
        self,
        start_node: StartNode,
        home: Path,
        signals: list[int],
        lock: ExitStack,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(taking_over, "END_S", 0.1)
        monkeypatch.setattr(lock, "close", lambda: None)
        start_node(embedded=True)
        with pytest.raises(HomeLockedError, match="already runs"):
            end_embedded(home)

    def test_its_owners_node_is_left_alone(
        self, start_node: StartNode, home: Path, signals: list[int]
    ) -> None:
        assert not end_embedded(home)
        start_node()
        assert not end_embedded(home)
        assert signals == []

    def test_a_note_that_leads_elsewhere_ends_nobody(self, home: Path, signals: list[int]) -> None:
        (home / "token").write_text("t0ken")
        note = {"url": "http://127.0.0.1:9", "pid": os.getpid(), "embedded": True}
        (home / "node.json").write_text(json.dumps(note))
        assert not end_embedded(home)
        assert signals == []


def test_a_node_that_holds_the_home_and_is_not_to_be_found_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = '{"error": {"kind": "HomeLockedError", "message": "another node", "hint": ""}}'
    command = ["sh", "-c", f"echo '{words}'; exit {HomeLockedError.exit_code}"]
    monkeypatch.setattr("p2pflop.embedded.node_command", lambda _: command)
    with pytest.raises(HomeLockedError, match="another node"):
        start_embedded(tmp_path, timeout_s=0.5)
