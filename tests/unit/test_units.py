"""Money, sizes, FLOP and time, as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.errors import ConfigError
from p2pflop.units import (
    MAX_NUSD,
    counted,
    format_bytes,
    format_duration,
    format_flop,
    format_usd,
    is_price,
    parse_bytes,
    parse_duration,
    parse_usd,
    round_price,
)


@pytest.mark.parametrize(
    ("text", "nusd"),
    [("0.05", 50_000_000), ("$1", 10**9), ("5e-2", 50_000_000), (" 0 ", 0), ("0.000000001", 1)],
)
def test_dollars_are_read_exactly(text: str, nusd: int) -> None:
    assert parse_usd(text) == nusd


@pytest.mark.parametrize("text", ["", "-1", "abc", "nan", "inf", "1e-10", "1e30", "$", "1,000"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_usd(text)


@pytest.mark.parametrize(
    ("text", "words"), [("-1", "zero or more"), ("1e-10", "whole number"), ("1e30", "up to \\$")]
)
def test_what_is_wrong_with_an_amount_is_told(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_usd(text)


@pytest.mark.parametrize(
    ("nusd", "text"),
    [(0, "$0.00"), (1_250_000_000, "$1.25"), (3100, "$0.0000031"), (-(10**9), "-$1.00")],
)
def test_dollars_are_written_exactly(nusd: int, text: str) -> None:
    assert format_usd(nusd) == text


@given(st.integers(0, MAX_NUSD))
def test_written_dollars_read_back(nusd: int) -> None:
    assert parse_usd(format_usd(nusd).replace(",", "")) == nusd


@pytest.mark.parametrize(
    ("nusd", "price"),
    [(0, 0), (999, 999), (1000, 1000), (1234, 1230), (1235, 1240), (9999, 10000), (99950, 100000)],
)
def test_prices_have_three_significant_digits(nusd: int, price: int) -> None:
    assert round_price(nusd) == price
    assert is_price(price)


@given(st.integers(0, MAX_NUSD))
def test_rounding_a_price_changes_under_half_a_percent_and_only_once(nusd: int) -> None:
    price = round_price(nusd)
    assert abs(price - nusd) * 200 <= nusd
    assert round_price(price) == price
    assert is_price(nusd) == (price == nusd)


def test_a_negative_number_is_no_price() -> None:
    assert not is_price(-5)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("10kB", 10_000),
        ("64MiB", 64 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "ten", "1 XB", "1.2.3k"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (9_700, "9.7 kB"), (1_204_000_000, "1.2 GB")]
)
def test_sizes_are_written_short(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 2**80))
def test_any_number_of_flop_can_be_written(flop: int) -> None:
    assert "FLOP" in format_flop(flop)


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [("90", 90 * 10**9), ("500ms", 5 * 10**8), ("2m", 120 * 10**9), ("1.5h", 5400 * 10**9)],
)
def test_durations_are_read(text: str, duration_ns: int) -> None:
    assert parse_duration(text) == duration_ns


@pytest.mark.parametrize("text", ["", "-1", "soon", "1 week"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [
        (3_200_000, "3.2 ms"),
        (12_500_000_000, "12.5 s"),
        (200 * 10**9, "3 min 20 s"),
        (7500 * 10**9, "2 h 5 min"),
    ],
)
def test_durations_are_written_short(duration_ns: int, text: str) -> None:
    assert format_duration(duration_ns) == text


def test_one_is_told_as_one() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [counted(n, "leaf", "leaves") for n in (1, 3)] == ["1 leaf", "3 leaves"]
