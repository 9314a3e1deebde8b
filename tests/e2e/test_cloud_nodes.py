"""Scripts that know nothing of p2pflop, with CLOUD=1 through two real nodes and a real sandbox."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_cloud_scripts import FOLDER, SCRIPTS, run_script
from tests.e2e.test_first_light import wait_for_asks

StartNode = Callable[..., Any]
AT_EVERY_CHANGE = ("jit_variable",)
PRICE = "50"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in AT_EVERY_CHANGE else [pytest.mark.slow])
        for name in SCRIPTS
    ],
)
def test_equal_to_the_last_bit(name: str, start_node: StartNode, wait_until: Any) -> None:
    native = run_script(FOLDER / f"{name}.py", None)
    assert native.returncode == 0, native.stderr
    seller = start_node("seller", "--ask", PRICE)
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    cloud = run_script(FOLDER / f"{name}.py", buyer.home)
    assert cloud.returncode == 0, cloud.stderr
    assert cloud.stdout == native.stdout
    first, last = cloud.stderr.splitlines()
    assert seller.get("/v1/status")["account"][:12] in first
    assert "moved, $" in last


@pytest.mark.slow
def test_a_provider_killed_on_the_way_changes_no_digit(
    start_node: StartNode, wait_until: Any, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    text = (FOLDER / "digits_mlp.py").read_text()
    path = repr(str(FOLDER.parents[1] / "examples" / "data" / "digits.csv.gz"))
    head, tail = text.split("DATA = ", 1)
    script.write_text(f"{head}DATA = {path}\n{tail.split(chr(10), 1)[1]}".replace("60", "400"))
    native = run_script(script, None)
    assert native.returncode == 0, native.stderr
    buyer = start_node("buyer")
    address = buyer.addresses()[0]
    sellers = [
        start_node(f"seller-{n}", "--ask", str(40 + n), "--connect", address) for n in range(2)
    ]
    wait_for_asks(buyer, 2, wait_until)
    environment = {name: value for name, value in os.environ.items() if name != "DEV"}
    process = subprocess.Popen(
        [sys.executable, "-u", str(script)],
        env=environment | {"CLOUD": "1", "P2PFLOP_HOME": str(buyer.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    busy = [node for node in sellers if node.get("/v1/status")["leases"]]
    assert len(busy) == 1
    busy[0].kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert first + out == native.stdout
    assert len(err.splitlines()) > 2, "it was told of another provider"
