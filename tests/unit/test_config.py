"""What a node is told, and what it refuses to be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pflop.embedded import read_note
from p2pflop.errors import ConfigError
from p2pflop.market.limits import MAX_LIMIT, Limit
from p2pflop.market.sessions import MIN_LEASE_S
from p2pflop.node import config
from p2pflop.node.config import LEAST_MAX_LEASE_S, load_settings
from p2pflop.node.service import MAX_DEADLINE_S
from p2pflop.node.session_purchase import LEAVE_S
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


LIMITS = {
    "max_lease_s": 6 * 3600,
    "max_flop": 5 * 10**17,
    "max_moved_bytes": 20 * 10**9,
    "max_nodes": 20_000,
}


def test_limits_of_the_ask_from_flags_and_from_the_file(tmp_path: Path) -> None:
    assert load_settings({"home": tmp_path}).limits == ()
    settings = load_settings({"home": tmp_path, **LIMITS})
    assert settings.limits == tuple(zip(Limit, LIMITS.values(), strict=True))
    (tmp_path / "config.toml").write_text(
        'max_lease = "6h"\nmax_flop = "500P"\nmax_moved = "20GB"\nmax_nodes = 20000\n'
    )
    assert load_settings({"home": tmp_path}) == settings
    (tmp_path / "config.toml").write_text('max_lease = "soon"')
    with pytest.raises(ConfigError, match=r"config\.toml: max_lease: 'soon' is not a duration"):
        load_settings({"home": tmp_path})


def test_an_embedded_node_has_no_limits_for_its_own_user(tmp_path: Path) -> None:
    assert load_settings({"home": tmp_path, "embedded": True, **LIMITS}).limits == ()


def test_an_embedded_node_charges_its_own_user_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('ask = "0.05"\nsetup = "0.01"\nmin_charge = "0.02"\n')
    sells = load_settings({"home": tmp_path})
    assert (sells.ask_nusd, sells.setup_nusd, sells.min_charge_nusd) == (
        5 * 10**7,
        10**7,
        2 * 10**7,
    )
    free = load_settings({"home": tmp_path, "embedded": True})
    assert (free.ask_nusd, free.setup_nusd, free.min_charge_nusd) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("max_lease_s", LEAST_MAX_LEASE_S, MAX_DEADLINE_S),
        ("max_flop", 1, MAX_LIMIT),
        ("max_moved_bytes", 1, MAX_LIMIT),
        ("max_nodes", 1, MAX_LIMIT),
    ],
)
def test_a_limit_has_bounds(tmp_path: Path, name: str, least: int, most: int) -> None:
    for value in (least, most):
        assert load_settings({"home": tmp_path, name: value}).limits[0][1] == value
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError, match=r"must be (1|60 s) to"):
            load_settings({"home": tmp_path, name: value})
    for wrong in (True, "5", 5.5):
        with pytest.raises(ConfigError, match="is not a number"):
            load_settings({"home": tmp_path, name: wrong})


def test_a_session_takes_what_the_shortest_longest_lease_is() -> None:
    assert MIN_LEASE_S == LEAST_MAX_LEASE_S > LEAVE_S
