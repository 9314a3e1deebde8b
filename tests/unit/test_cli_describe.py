"""What a job costs and is made of, as the command line tells it; its quote; a part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2pflop.cli.main import run
from p2pflop.errors import ConfigError
from p2pflop.job.file import decode_file
from p2pflop.kernels import classes
from p2pflop.node.orders import open_order
from p2pflop.node.service import SubmitOptions
from p2pflop.sweeps import MAX_JOBS
from tests.unit.conftest import StartNode

Output = pytest.CaptureFixture[str]

SCRIPT = """
import p2pflop as pf
from tinygrad import Tensor

data = Tensor([1.0, 2.0, 3.0, 4.0]).realize()
weight = Tensor.zeros(4).contiguous()

def train():
    weight.assign(weight * 0.5 + data * Tensor.rand(4))
    return {"loss": weight.sum()}

def look():
    return {"top": weight * 1}

job = pf.trace(train, steps=100, every={10: look}, collect=["top"], title="described")
"""


@pytest.fixture
def traced(tmp_path: Path, capsys: Output) -> dict[str, Any]:
    """What ``trace --json`` told of a job, without a node."""
    source = tmp_path / "train.py"
    source.write_text(SCRIPT)
    assert run(["trace", str(source), "--json", "--home", str(tmp_path / "home")]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_trace_tells_what_a_provider_would_bill(traced: dict[str, Any]) -> None:
    data = Path(traced["path"]).read_bytes()
    order = open_order(data, SubmitOptions(), frozenset(), 0)
    cost = order.checked.cost
    assert traced["bytes"] == len(order.body)
    assert (traced["flop"], traced["touched_bytes"]) == (cost.flop, cost.touched_bytes)
    assert traced["peak_bytes"] == cost.peak_bytes
    assert traced["moved_bytes"] == order.moved_bytes
    assert traced["memory_bytes"] == order.terms.memory_bytes
    lines = {line["phase"]: line for line in traced["cost"]}
    assert {name: line["times"] for name, line in lines.items()} == {
        "train": 100,
        "look": 10,
        "init": 1,
    }
    assert sum(line["flop"] * line["times"] for line in traced["cost"]) == cost.flop
    assert lines["train"]["moved_bytes"] == 0
    assert lines["look"]["moved_bytes"] > 10 * 16, "values and their list"


def test_without_a_node_there_is_no_quote_and_none_is_started(
    traced: dict[str, Any], tmp_path: Path, capsys: Output
) -> None:
    assert traced["quote"] is None
    assert "no node runs there" in traced["quote_reason"]
    assert "\n" not in traced["quote_reason"]
    assert not (tmp_path / "home").exists()
    source = str(tmp_path / "train.py")
    assert run(["trace", source, "--home", str(tmp_path / "home")]) == 0
    text = capsys.readouterr()
    assert text.out == f"{tmp_path / 'train.p2pj'}\n", "a pipe gets the path alone"
    assert "FLOP A RUN" in text.err
    assert "no quote: cannot reach the node" in text.err
    assert not (tmp_path / "home").exists()


def test_a_node_that_runs_is_asked_for_the_quote(
    traced: dict[str, Any], tmp_path: Path, start_node: StartNode, capsys: Output
) -> None:
    start_node()
    source = str(tmp_path / "train.py")
    assert run(["trace", source, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [miss] = told["quote"]["misses"]
    assert "sells nothing" in miss["reason"]
    assert told["quote_reason"] == ""
    assert {name: told[name] for name in ("flop", "cost")} == {
        name: traced[name] for name in ("flop", "cost")
    }
    assert run(["trace", source]) == 0
    assert "sells nothing" in capsys.readouterr().err


def test_show_tells_what_a_job_is_made_of(traced: dict[str, Any], capsys: Output) -> None:
    assert run(["show", traced["path"], "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    for name in ("meter", "flop", "touched_bytes", "peak_bytes", "moved_bytes", "cost"):
        assert about[name] == traced[name]
    train, look = about["phases"]
    assert (train["name"], train["every"], train["times"]) == ("train", 1, 100)
    assert (look["every"], look["outputs"]) == (10, ["top"])
    file = decode_file(Path(traced["path"]).read_bytes())
    assert train["graph"] == about["cost"][0]["graph"]
    assert sum(train["ops"].values()) > 10
    assert train["ops"]["reduce"] == 1
    assert list(train["ops"].values()) == sorted(train["ops"].values(), reverse=True)
    shapes = {tensor["name"]: tensor["shape"] for tensor in about["tensors"]}
    assert shapes.keys() == set(file.labels.params)
    assert shapes["weight"] == [4]
    assert about["class"]["name"] == classes.CLASS_NAME
    assert len(about["class"]["id"]) == 64
    assert run(["show", traced["path"]]) == 0
    text = capsys.readouterr().out
    assert "MOST OF THEM" in text
    assert classes.CLASS_NAME in text


def test_a_machine_of_no_class_still_shows(
    traced: dict[str, Any], capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("no clang beside this Python nor on PATH")

    monkeypatch.setattr(classes, "descriptor", missing)
    assert run(["show", traced["path"], "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["class"], about["class_reason"][:8]) == (None, "no clang")
    assert run(["show", traced["path"]]) == 0
    assert "no clang" in capsys.readouterr().out


def test_submit_goes_on_from_a_step(
    traced: dict[str, Any], start_node: StartNode, capsys: Output
) -> None:
    node = start_node()
    path = traced["path"]
    assert run(["submit", path, "--from-step", "60", "--detach"]) == 0
    (submitted,) = node.service.runs.values()
    whole, rest = decode_file(Path(path).read_bytes()), decode_file(submitted.body)
    assert (rest.body.job.first_step, rest.body.job.steps) == (60, 40)
    assert rest.body.work == whole.body.work
    assert rest.body.state == (), "the node knows it"
    for outside in ("0", "100", "x", str(10**40)):
        assert run(["submit", path, "--from-step", outside, "--detach"]) == ConfigError.exit_code
    assert "step=100 is out of range" in capsys.readouterr().err
    assert len(node.service.runs) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--args", "lr=1", "--under-way", "99"], "under_way=99 is out of range"),
        (["--args", "lr=1", "--under-way", "0"], "under_way=0 is out of range"),
        (["--args", "lr=1"], "the job has no argument 'lr'"),
        (["--args", "lr=" + ",".join(["1"] * (MAX_JOBS + 1))], "no argument 'lr'"),
        (["--feed", "data=x.npy", "--batch", "0"], "batch=0 is out of range"),
    ],
)
def test_arguments_of_a_sweep_that_are_out_of_range_are_faults_of_usage(
    traced: dict[str, Any],
    start_node: StartNode,
    capsys: Output,
    arguments: list[str],
    words: str,
) -> None:
    node = start_node()
    assert run(["sweep", traced["path"], *arguments]) == ConfigError.exit_code
    assert words in capsys.readouterr().err
    assert node.service.runs == {}
