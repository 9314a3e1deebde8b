"""A loss that is not a number is a value like any other: it ends no run, and is shown as such."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from tinygrad import dtypes

import p2pflop as pf
from p2pflop.cli.main import run as p2pflop
from p2pflop.client import Client

LOGS = [math.nan, math.nan, -math.inf, 0.0]


def test_nan_travels_to_rows_result_terminal_and_json(
    start_node: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    node = start_node("node", "--ask", "90000")
    job = pf.trace(lambda: {"loss": (pf.step - 2).cast(dtypes.float32).log()}, steps=2)
    longer = pf.trace(lambda: {"loss": (pf.step - 2).cast(dtypes.float32).log()}, steps=4)
    client = Client(node.home)
    run = pf.submit(longer, client=client)
    rows = list(run)
    assert np.array_equal([row.loss for row in rows], LOGS, equal_nan=True)
    assert repr(rows[0]) == "Row(step=0, loss=nan)"
    result = run.result(timeout=60)
    assert np.array_equal(result["loss"], np.array(LOGS, np.float32), equal_nan=True)
    result.verify()
    assert longer.run_local().hash == result.hash

    home = ["--home", str(node.home)]
    assert p2pflop(["watch", run.id, "--json", *home]) == 0
    events = [
        json.loads(line, parse_constant=pytest.fail)
        for line in capsys.readouterr().out.splitlines()
    ]
    told = [row for event in events if event["kind"] == "rows" for row in event["rows"]]
    values = [row["values"]["loss"] for row in told]
    assert values == ["NaN", "NaN", "-Infinity", 0.0]
    last = pf.submit(job, client=client)
    last.result(timeout=60)
    assert p2pflop(["watch", last.id, *home]) == 0
    assert "loss  NaN" in capsys.readouterr().err
