"""What a node is told, and what it refuses to be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pflop.embedded import read_note
from p2pflop.errors import ConfigError
from p2pflop.node import config
from p2pflop.node.config import load_settings
from p2pflop.units import GIB


def test_more_memory_than_the_machine_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "machine_memory_bytes", lambda: 24 * GIB)
    assert load_settings({"home": tmp_path}).resolved_memory_bytes() == 12 * GIB
    whole = load_settings({"home": tmp_path, "memory_bytes": 24 * GIB})
    assert whole.resolved_memory_bytes() == 24 * GIB
    with pytest.raises(ConfigError, match=r"1\.1 TB of memory .* this machine has, 25\.8 GB"):
        load_settings({"home": tmp_path, "memory_bytes": 1024 * GIB})
    (tmp_path / "config.toml").write_text('memory = "1TiB"')
    with pytest.raises(ConfigError, match=r"config\.toml: 1\.1 TB"):
        load_settings({"home": tmp_path})


def test_a_home_below_a_file_is_told_in_words(tmp_path: Path) -> None:
    home = tmp_path / "file" / "sub"
    home.parent.write_bytes(b"")
    for look in (lambda: load_settings({"home": home}), lambda: read_note(home)):
        with pytest.raises(ConfigError, match=r"Not a directory$|Not a directory\n") as caught:
            look()
        assert "Errno" not in caught.value.message
        assert "--home" in caught.value.hint


def test_an_emulator_is_no_class_for_a_node(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PYTHON::sm_80 is an emulator"):
        load_settings({"home": tmp_path, "class_name": "PYTHON::sm_80"})


def test_wishes_are_answered_down_to_a_price_below_the_ask(tmp_path: Path) -> None:
    told = {"home": tmp_path, "ask_nusd": 50, "wish_ask_nusd": 30}
    assert load_settings(told).wish_ask_nusd == 30
    (tmp_path / "config.toml").write_text('wish_ask = "0.00000001"\n')
    assert load_settings({"home": tmp_path, "ask_nusd": 50}).wish_ask_nusd == 10
    with pytest.raises(ConfigError, match="wish_ask without ask"):
        load_settings({"home": tmp_path})
    with pytest.raises(ConfigError, match="wish_ask is over ask"):
        load_settings(told | {"ask_nusd": 29})
    with pytest.raises(ConfigError, match="three significant digits"):
        load_settings(told | {"ask_nusd": 10**6, "wish_ask_nusd": 1234})
