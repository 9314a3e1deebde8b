"""Scripts that know nothing of p2pflop, run natively and with CLOUD=1: equal to the last bit.

The node is a twin that obeys by tinygrad itself; ``SCRIPTS`` against real nodes are elsewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud_server import twin_server

FOLDER = Path(__file__).parents[1] / "cloud_scripts"
SCRIPTS = ("digits_mlp", "conv_train", "transformer", "rnn", "jit_variable")
AT_EVERY_CHANGE = ("digits_mlp", "jit_variable")


def run_script(path: Path, home: Path | None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script in this class; in the cloud by the node of ``home``, if one is given."""
    environment = {**os.environ, **variables}
    if home is not None:
        del environment["DEV"]
        environment |= {"CLOUD": "1", "P2PFLOP_HOME": str(home)} | variables
    return subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in AT_EVERY_CHANGE else [pytest.mark.slow])
        for name in SCRIPTS
    ],
)
def test_equal_to_the_last_bit(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.py"
    native = run_script(path, None)
    assert native.returncode == 0, native.stderr
    with twin_server() as server:
        cloud = run_script(path, server.home(tmp_path / "home"))
    assert cloud.returncode == 0, cloud.stderr
    assert cloud.stdout == native.stdout
    assert native.stdout.count("\n") > 4
    first, last = cloud.stderr.splitlines()
    assert re.fullmatch(r"p2pflop: abab\S+ computes in cpu for \$0.05 a PFLOP, at most .*", first)
    assert re.fullmatch(r"p2pflop: \S+ PFLOP at .*/s, .* moved, \$\S+", last)
    [twin] = server.twins
    assert twin.table.flop > 0
