"""How a client starts a node for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pflop.embedded import node_command


def test_a_relative_home_is_the_callers_not_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The node runs in its home, where a relative path would mean another folder.
    monkeypatch.chdir(tmp_path)
    assert node_command(Path("home"))[-2:] == ["--home", str(tmp_path / "home")]
