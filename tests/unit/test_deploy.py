"""What ``deploy/`` offers: a unit that systemd takes, and settings that nodes have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from p2pflop.cli.main import cli
from p2pflop.node.config import load_settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "p2pflop.service"
REGISTRY_UNIT = ROOT / "deploy" / "p2pflop-registry.service"
UNITS = [UNIT, REGISTRY_UNIT]
CONFIG = ROOT / "deploy" / "config.toml"
CONTAINER = ROOT / "deploy" / "Containerfile"
INSTALLED = "/opt/p2pflop/bin/p2pflop"


def directives(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_the_unit_runs_a_command_that_there_is(path: Path) -> None:
    unit = directives(path.read_text())
    program, *command = unit["ExecStart"].split()
    assert program == INSTALLED
    assert CliRunner().invoke(cli, [*command, "--help"]).exit_code == 0
    assert unit["Environment"] == f"P2PFLOP_HOME=/var/lib/{unit['StateDirectory']}"


def test_only_the_node_is_told_to_stop_and_has_time_for_it() -> None:
    unit = directives(UNIT.read_text())
    assert unit["KillMode"] == "mixed"
    assert int(unit["TimeoutStopSec"]) >= 30
    forbidden = {"RestrictNamespaces", "MemoryDenyWriteExecute", "SystemCallFilter"}
    assert not forbidden & set(unit), "the sandbox of jobs would not work"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, path: Path) -> None:
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace(INSTALLED, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if path.name in line]
    assert complaints == []


def test_the_settings_are_those_of_a_node(tmp_path: Path) -> None:
    """As they are, and with what a franchise is to fill in."""
    target = tmp_path / "config.toml"
    target.write_text(CONFIG.read_text())
    settings = load_settings({"home": str(tmp_path)})
    assert settings.ask_nusd == 2_000_000
    assert not settings.registry
    filled = re.sub(r"^# (\w+ = )", r"\1", CONFIG.read_text(), flags=re.MULTILINE)
    target.write_text(filled.replace("KEY@", f"{'ab' * 32}@"))
    settings = load_settings({"home": str(tmp_path)})
    assert list(settings.registries().values()) == ["https://registry.example.org"]
    assert (settings.enroll, settings.agree, settings.contact) == (True, "1", "ada@example.org")


def test_the_container_is_told_options_that_there_are() -> None:
    told = set(
        re.findall(r"--[a-z]+", CONTAINER.read_text().split("p2pflop node")[1].split("exec")[0])
    )
    node = cli.get_command(click.Context(cli), "node")
    assert node is not None
    assert told <= {option for param in node.params for option in param.opts}
    assert {"--registry", "--enroll", "--agree", "--contact"} <= told


def test_the_container_runs_the_same_command_as_its_own_user() -> None:
    text = CONTAINER.read_text()
    assert re.search(r"^USER p2pflop$", text, re.MULTILINE)
    assert 'ENTRYPOINT ["p2pflop"]\nCMD ["node"]' in text
    assert "STOPSIGNAL SIGTERM" in text
