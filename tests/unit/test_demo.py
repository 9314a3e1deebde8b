"""The demo around its nodes: fresh homes, early words about a script, and what Ctrl-C leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.cli import demo, demo_nodes
from p2pflop.cli.demo_nodes import DemoNode, freshen
from p2pflop.cli.main import run
from p2pflop.client import Client
from p2pflop.errors import ConfigError, HomeLockedError, VerificationError
from p2pflop.node.home import held

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]


def test_a_demo_keeps_nothing_but_the_plans(tmp_path: Path) -> None:
    home = tmp_path / "buyer"
    freshen(home)
    (home / "demo.log").write_text("started")
    for name in ("plans/ab", "store/blobs/cd", "journal.db", "account.pem"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    (home / "link").symlink_to(tmp_path)
    freshen(home)
    left = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert left == {"plans/ab", "lock", "demo.log"}
    assert tmp_path.exists()


def test_a_home_that_is_not_a_demos_is_never_emptied(tmp_path: Path, capsys: Output) -> None:
    key = tmp_path / "fair" / "account.pem"
    key.parent.mkdir()
    key.write_text("money")
    script = tmp_path / "job.py"
    script.write_text("def make_job(seed): ...\ndef evaluate(weights): ...\n")
    assert run(["demo", "--script", str(script), "--home", str(tmp_path)]) == 2
    assert "not of a demo" in capsys.readouterr().err
    assert key.read_text() == "money"


def test_a_home_in_use_is_told_as_such(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(HomeLockedError, match="already runs"):
        freshen(tmp_path)


def test_a_nodes_error_is_the_demos(tmp_path: Path) -> None:
    told = '{"error": {"kind": "HomeLockedError", "message": "in use", "hint": "stop it"}}'
    with (tmp_path / "demo.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; print({told!r}); sys.exit(3)"], stdout=log
        )
    process.wait()
    with pytest.raises(HomeLockedError, match=r"^in use") as caught:
        demo_nodes._wait_ready(DemoNode("fair", tmp_path, process))
    assert caught.value.hint == "stop it"


@pytest.mark.parametrize(
    ("program", "words"),
    [("def evaluate(weights): ...", "has no make_job()"), ("def make_job(", "is not a Python")],
)
def test_a_script_that_offers_nothing_is_not_run(
    tmp_path: Path, capsys: Output, program: str, words: str
) -> None:
    script, trace = tmp_path / "job.py", tmp_path / "ran"
    script.write_text(f"open({str(trace)!r}, 'w')\n{program}\n")
    with pytest.raises(ConfigError):
        demo._load(script)
    assert run(["demo", "--script", str(script), "--home", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not trace.exists()


def test_ctrl_c_gives_the_run_up_and_says_so(
    start_node: StartNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    node = start_node(script=[("state", {"state": "running"})])
    run_id = Client().submit(b"job")

    def stand_in(folder: Path) -> Any:
        demo._follow(pf.attach(run_id), demo._Victim({}), as_json=False)

    monkeypatch.setattr(demo, "open_market", stand_in)
    script = tmp_path / "job.py"
    script.write_text("def make_job(seed): ...\ndef evaluate(weights): ...\n")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert run(["demo", "--script", str(script)]) == 130
    finally:
        signal.signal(signal.SIGALRM, before)
    text = capsys.readouterr().err
    assert "four nodes have ended" in text
    assert "p2pflop watch" not in text
    assert node.service.runs[run_id].events[-1]["kind"] == "cancelled"


class EndlessJob:
    """Its local run ends only if its caller no longer wants it."""

    ended = False

    def run_local(self, on_row: Callable[..., None], _on_lowering: object) -> Any:
        try:
            while True:
                on_row(None)
                time.sleep(0.001)
        finally:
            self.ended = True


def test_the_local_run_ends_with_the_demo() -> None:
    job = EndlessJob()
    with pytest.raises(ConfigError), demo._Local(job):  # type: ignore[arg-type]
        raise ConfigError("something else went wrong")
    assert job.ended


@pytest.mark.parametrize(("bought", "differs"), [("ab", False), ("cd", True)])
def test_another_hash_is_told(bought: str, differs: bool) -> None:
    job = SimpleNamespace(run_local=lambda *_: SimpleNamespace(hash="ab"))
    with demo._Local(job) as local:  # type: ignore[arg-type]
        if differs:
            with pytest.raises(VerificationError, match="the local run gave ab"):
                local.compare(bought)
        else:
            assert local.compare(bought) == "ab"


def test_a_local_run_that_fails_is_told() -> None:
    def fail(*_: object) -> None:
        raise ConfigError("no clang")

    with (
        demo._Local(SimpleNamespace(run_local=fail)) as local,  # type: ignore[arg-type]
        pytest.raises(ConfigError, match="no clang"),
    ):
        local.compare("ab")
