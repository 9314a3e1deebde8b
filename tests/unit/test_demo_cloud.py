"""The end of the demo, without nodes: what it takes for a success, and what it leaves behind."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pflop import client
from p2pflop.cli import demo_cloud
from p2pflop.errors import P2PFlopError, VerificationError

LINES = "".join(f"print({number}, flush=True)\n" for number in range(6))
CLOUD = "import os, sys\ncloud = os.environ.get('CLOUD')\n"


class StandIn:
    """A provider that can be killed, and the buyer's client that says which one runs."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        nodes = [
            SimpleNamespace(
                name=name, account=name, kill=lambda name=name: self.killed.append(name)
            )
            for name in ("fair", "dear")
        ]
        self.market: Any = SimpleNamespace(
            buyer=SimpleNamespace(home=Path("home")), providers=nodes
        )

    def status(self) -> dict[str, Any]:
        return {"sessions": [{"account": "dear" if self.killed else "fair"}]}

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture
def market(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(client, "Client", lambda _home: stand_in)
    return stand_in


def script_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_both_print_the_same(
    market: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "if cloud: print('p2pflop: a note', file=sys.stderr)\n"
    told = demo_cloud.run_plain_script(script_of(tmp_path, CLOUD + note + LINES), market.market)
    assert told == {"lines": list("012345"), "killed": "fair", "provider": "dear"}
    assert market.killed == ["fair"]
    assert "p2pflop: a note" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (LINES + "print('cloud' if cloud else 'local')", VerificationError, "printed"),
        ("print(1)", VerificationError, "was over before"),
        (LINES + "sys.exit('no provider') if cloud else None", P2PFlopError, "no provider"),
    ],
)
def test_what_went_wrong_is_told(
    market: StandIn, tmp_path: Path, text: str, error: type[P2PFlopError], words: str
) -> None:
    with pytest.raises(error, match=words):
        demo_cloud.run_plain_script(script_of(tmp_path, CLOUD + text), market.market)


def test_its_scripts_end_with_it(
    market: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"

    def interrupt(*_: object) -> None:
        while not pids.exists() or pids.read_text().count(" ") < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_cloud, "_watch", interrupt)
    wait = f"import os, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        demo_cloud.run_plain_script(script_of(tmp_path, wait), market.market)
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_settings_of_the_person_do_not_reach_the_scripts(
    market: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_QUIET", "1")
    text = CLOUD + LINES + "print('CLOUD_QUIET' in os.environ)"
    told = demo_cloud.run_plain_script(script_of(tmp_path, text), market.market)
    assert told["lines"][-1] == "False"
