"""The arguments of ``p2pflop sweep``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from p2pflop.cli import main
from p2pflop.cli.sweep import combinations, find_sweep, read_feeds, read_map
from p2pflop.client import BlobStat, Client
from p2pflop.errors import ConfigError
from p2pflop.outcomes import Outcome, SweepProgress
from p2pflop.sweep_plan import SweepPlan


def test_values_between_commas_are_combined() -> None:
    assert combinations(["lr=1e-3,1e-2"]) == [{"lr": 0.001}, {"lr": 0.01}]
    assert combinations(["lr=0.5", "n=1,2"]) == [{"lr": 0.5, "n": 1}, {"lr": 0.5, "n": 2}]


@pytest.mark.parametrize("grid", [[], ["lr"], ["lr="], ["lr=1,,2"], ["lr=a"], ["lr=1", "lr=2"]])
def test_what_is_no_list_of_numbers_is_told(grid: list[str]) -> None:
    with pytest.raises(ConfigError):
        combinations(grid)


def test_a_file_has_a_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text('[{"lr": 0.1}, {"lr": 2}]')
    assert read_map(path, []) == [{"lr": 0.1}, {"lr": 2}]
    with pytest.raises(ConfigError, match="together"):
        read_map(path, ["lr=1"])
    for text in ("", "{}", "[1]", '[{"lr": "1"}]', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_map(path, [])
    with pytest.raises(ConfigError, match="cannot read"):
        read_map(tmp_path / "none.json", [])


def test_feeds_are_named(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.ones((4, 2), np.float32))
    files = f"{tmp_path}/*.npy"
    whole, cut = (read_feeds([f"x={files}"], batch)["x"] for batch in (None, 6))
    assert (whole.shape, cut.shape) == ((4, 2), (6, 2))
    for wrong in (["x"], ["=a.npy"], ["x="], [f"x={files}"] * 2, [f"x={tmp_path}/none*.npy"]):
        with pytest.raises(ConfigError):
            read_feeds(wrong, None)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x.p2pj", "--attach", "00"],
        ["--attach", "00", "--args", "lr=1"],
        ["--attach", "00", "--feed", "x=a.npy"],
    ],
)
def test_a_job_or_a_sweep_has_to_be_named(arguments: list[str]) -> None:
    assert main.run(["sweep", *arguments]) == ConfigError.exit_code


def test_a_sweep_is_named_by_some_of_its_digits() -> None:
    plan = SweepPlan("", "", [], None, None, None, None, [], False, 8).encode()
    blobs = {bytes.fromhex(digits * 8): plan for digits in ("9a6c0001", "9a6c0002", "beef0003")}
    blobs[bytes.fromhex("beef0004" * 8)] = b"no sweep"
    kept = [BlobStat(address, 1, public=False) for address in blobs]
    client = cast("Client", SimpleNamespace(blobs=lambda: kept, get=blobs.__getitem__))
    assert find_sweep(client, "beef") == "beef0003" * 8  # the other one is no sweep
    assert find_sweep(client, "0002") == "9a6c0002" * 8
    for whole in ("ab" * 32, "p2pflop://" + "ab" * 32, "no digits"):
        assert find_sweep(client, whole) == whole
    for text, said in (("9a6c", "2 are"), ("0004", "none is"), ("f00d", "none is")):
        with pytest.raises(ConfigError, match=said):
            find_sweep(client, text)


def test_what_a_sweep_has_cost_stands_below_its_table(
    start_node: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_node()

    class Bought(list[Outcome]):
        id = "ab" * 32

        def outcomes(self) -> list[Outcome]:
            return self

        def progress(self) -> SweepProgress:
            return SweepProgress(2, 2, 1, 0, 0, 7)

    failed = Outcome(1, {"lr": 2.0}, "failed", 4, error=ConfigError("no ask"))
    sweep = Bought([Outcome(0, {"lr": 1.0}, "settled", 3), failed])
    monkeypatch.setattr("p2pflop.cli.submit.open_file", lambda _: None)
    monkeypatch.setattr("p2pflop.sweeps.map", lambda *_, **__: sweep)
    assert main.run(["sweep", "x.p2pj", "--args", "lr=1,2"]) == 1
    told = capsys.readouterr()
    assert "no ask" in told.out
    assert "cost  $0.000000007 in all" in told.err
