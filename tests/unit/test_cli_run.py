"""``p2pflop run``: where a script computes, and with what around it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from p2pflop.cli.main import run
from p2pflop.cli.script import imports_p2pflop


def test_run_prepares_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "show.py"
    path.write_text(
        "import os, sys, p2pflop\n"
        "print(os.environ['P2PFLOP_HOME'], os.environ['DEV'][:9], *sys.argv[1:])\n"
        "sys.exit(3)"
    )
    command = [sys.executable, "-m", "p2pflop.cli.main", "run", "--home", str(tmp_path)]
    done = subprocess.run(
        [*command, str(path), "--json", "-x", "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{tmp_path} CPU:CLANG --json -x 7\n"
    assert done.returncode == 3
    assert run(["run", str(tmp_path / "nothing.py")]) == 2


@pytest.mark.parametrize(
    ("text", "is_ours"),
    [
        ("from tinygrad import Tensor", False),
        ("import p2pflop as pf", True),
        ("def main():\n    from p2pflop.sdk import trace", True),
        ("import p2pflops", False),
        ("this is no Python", True),
        ("\0", True),
    ],
)
def test_run_looks_whether_a_script_knows_of_p2pflop(
    tmp_path: Path, text: str, is_ours: bool
) -> None:
    path = tmp_path / "script.py"
    path.write_text(text)
    assert imports_p2pflop(path) is is_ours
