"""What ``deploy/`` offers: a unit that systemd takes, and settings that nodes have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from p2pflop.cli.main import cli

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "p2pflop.service"
CONTAINER = ROOT / "deploy" / "Containerfile"
INSTALLED = "/opt/p2pflop/bin/p2pflop"


def directives(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_runs_a_command_that_there_is() -> None:
    unit = directives(UNIT.read_text())
    path, *command = unit["ExecStart"].split()
    assert path == INSTALLED
    assert CliRunner().invoke(cli, [*command, "--help"]).exit_code == 0
    assert unit["Environment"] == f"P2PFLOP_HOME=/var/lib/{unit['StateDirectory']}"


def test_only_the_node_is_told_to_stop_and_has_time_for_it() -> None:
    unit = directives(UNIT.read_text())
    assert unit["KillMode"] == "mixed"
    assert int(unit["TimeoutStopSec"]) >= 30
    forbidden = {"RestrictNamespaces", "MemoryDenyWriteExecute", "SystemCallFilter"}
    assert not forbidden & set(unit), "the sandbox of jobs would not work"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(INSTALLED, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert complaints == []


def test_the_container_runs_the_same_command_as_its_own_user() -> None:
    text = CONTAINER.read_text()
    assert re.search(r"^USER p2pflop$", text, re.MULTILINE)
    assert 'ENTRYPOINT ["p2pflop"]\nCMD ["node"]' in text
    assert "STOPSIGNAL SIGTERM" in text
