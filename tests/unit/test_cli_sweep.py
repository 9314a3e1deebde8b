"""The arguments of ``p2pflop sweep``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2pflop.cli import main
from p2pflop.cli.sweep import combinations, read_feeds, read_map
from p2pflop.errors import ConfigError


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
