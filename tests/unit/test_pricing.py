"""What a PFLOP costs who computes it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.cli import quote as quote_module
from p2pflop.cli.main import run
from p2pflop.errors import ConfigError
from p2pflop.market.pricing import Machine, cost_price
from p2pflop.units import NS_PER_S, is_price, parse_flop

YEAR_NS = 365 * 86400 * NS_PER_S


def test_power_and_hardware_are_what_they_are_by_hand() -> None:
    # 40 TFLOP/s: a PFLOP takes 25 s, at 360 W 2.5 Wh, at $0.40 a kWh a tenth of a cent;
    # $1,576.80 over a year sold half of the time are $0.0001 a second.
    machine = Machine(360, 400_000_000, 1_576_800_000_000, YEAR_NS, 50, 40 * 10**12)
    cost = cost_price(machine)
    assert (cost.power_nusd, cost.hardware_nusd) == (1_000_000, 2_500_000)
    assert cost.total_nusd == cost.ask_nusd == 3_500_000


@given(
    st.builds(
        Machine,
        watts=st.integers(0, 10**6),
        power_nusd=st.integers(0, 10**10),
        hardware_nusd=st.integers(0, 10**16),
        life_ns=st.integers(1, 100 * YEAR_NS),
        busy_percent=st.integers(1, 100),
        flop_per_s=st.integers(1, 10**18),
    )
)
def test_an_ask_covers_its_cost_and_hardly_more(machine: Machine) -> None:
    cost = cost_price(machine)
    assert is_price(cost.ask_nusd)
    assert cost.total_nusd <= cost.ask_nusd
    assert 100 * cost.ask_nusd <= 101 * cost.total_nusd
    earned = cost.hardware_nusd * machine.life_ns * machine.busy_percent * machine.flop_per_s
    assert earned >= machine.hardware_nusd * 10**15 * NS_PER_S * 100


@pytest.mark.parametrize(
    "machine",
    [
        Machine(1, 1, 1, 0, 50, 1),
        Machine(1, 1, 1, 1, 0, 1),
        Machine(1, 1, 1, 1, 101, 1),
        Machine(1, 1, 1, 1, 50, 0),
    ],
)
def test_what_is_no_machine_is_refused(machine: Machine) -> None:
    with pytest.raises(ConfigError):
        cost_price(machine)


@pytest.mark.parametrize(
    ("text", "flop"),
    [
        ("35G", 35 * 10**9),
        ("1.5e13", 15 * 10**12),
        ("80 TFLOP", 80 * 10**12),
        ("7", 7),
        ("2k", 2000),
    ],
)
def test_rates_are_read(text: str, flop: int) -> None:
    assert parse_flop(text) == flop


@pytest.mark.parametrize("text", ["", "-1", "G", "1e999", "1x", "nan", "9" * 40])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of FLOP"):
        parse_flop(text)


ARGUMENTS = ["quote", "--power-price", "0.40", "--watts", "360", "--hardware-cost", "1576.80"]
ARGUMENTS += ["--life", "365d", "--json"]


def test_the_command_tells_cost_and_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--flop-rate", "40T"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ask_nusd"] == told["cost_nusd"] == 3_500_000
    assert (told["asks"], told["cheaper_asks"]) == (0, 0)
    assert run([*ARGUMENTS[:-1], "--flop-rate", "40T"]) == 0
    assert "p2pflop node --ask 0.0035" in capsys.readouterr().err


def test_without_a_rate_it_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quote_module, "MEASURED_STEPS", 3)
    monkeypatch.setattr(quote_module, "MATRIX", 64)
    assert run(ARGUMENTS) == 0
    assert 10**6 < json.loads(capsys.readouterr().out)["flop_per_s"] < 10**13
