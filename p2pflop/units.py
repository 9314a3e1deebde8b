"""Money, sizes, FLOP and time as people write them; integers inside.

Money is integer nano-dollars (``_nusd``), prices nano-dollars per PFLOP, sizes bytes, time
nanoseconds (``_ns``). Nothing here rounds in anybody's favour without saying so.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Final

from p2pflop.errors import ConfigError

NUSD_PER_USD: Final = 10**9
FLOP_PER_PFLOP: Final = 10**15
NS_PER_S: Final = 10**9
KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
MAX_NUSD: Final = 2**62
"""The largest amount; as a limit it is none."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_FLOP = re.compile(
    r"(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)\s*([kmgtpe]?)(?:flops?)?", re.IGNORECASE
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?")
_SECONDS: Final = {
    "ms": "0.001",
    "s": "1",
    "": "1",
    "m": "60",
    "min": "60",
    "h": "3600",
    "d": "86400",
}


def parse_usd(text: str) -> int:
    """Nano-dollars from ``0.05``, ``$0.05`` or ``5e-2``. Raises ConfigError."""
    try:
        nusd = Decimal(text.strip().removeprefix("$")) * NUSD_PER_USD
        exact = int(nusd)
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{text[:40]!r} is not an amount of dollars", hint="Write it like 0.05 or $0.05."
        ) from error
    if nusd < 0:
        raise ConfigError(f"{text[:40]!r} is negative, and amounts and prices are zero or more")
    if exact != nusd or exact > MAX_NUSD:
        limit = format_usd(MAX_NUSD)
        raise ConfigError(
            f"{text[:40]!r} is not a whole number of nano-dollars up to {limit}",
            hint="Give at most nine digits after the point.",
        )
    return exact


def format_usd(nusd: int) -> str:
    """``$1.25``, ``$0.0000031``: exact, at least two decimals."""
    sign = "-" if nusd < 0 else ""
    whole, part = divmod(abs(nusd), NUSD_PER_USD)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{decimals}"


def format_limit(nusd: int) -> str:
    """The most that something may cost, as ``format_usd``; ``no limit`` from ``MAX_NUSD`` on."""
    return format_usd(nusd) if nusd < MAX_NUSD else "no limit"


def round_price(nusd: int) -> int:
    """``nusd`` to three significant digits, halves up: the form of every price on a sheet."""
    digits = len(str(nusd))
    if digits <= 3:
        return nusd
    unit = int(10 ** (digits - 3))
    return (nusd + unit // 2) // unit * unit


def is_price(nusd: int) -> bool:
    """Whether ``nusd`` has at most three significant digits."""
    return nusd >= 0 and round_price(nusd) == nusd


def parse_bytes(text: str) -> int:
    """Bytes from ``512``, ``10kB``, ``1.5GiB`` (k is 1000, Ki is 1024). Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text[:40]!r} is not a size", hint="Write it like 512, 64MiB or 1.5GB.")
    number, prefix, binary = found.groups()
    exponent = " kmgt".index(prefix.lower()) if prefix else 0
    return int(Decimal(number) * Decimal(1024 if binary else 1000) ** exponent)


def format_bytes(size_bytes: int) -> str:
    """``512 B``, ``9.7 kB``, ``1.20 GB``: decimal prefixes, three significant digits."""
    return _scaled(size_bytes, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def counted(number: int, one: str, many: str = "") -> str:
    """``1 file``, ``2 files``; ``many`` where that is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def format_flop(flop: int) -> str:
    """``1.23 GFLOP``; past exa in powers of ten."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
    return _scaled(flop, units) if flop < 10**21 else f"{flop:.2e} FLOP"


def parse_flop(text: str) -> int:
    """FLOP from ``35G``, ``1.5e13``, ``80 TFLOP``. Raises ConfigError."""
    found = _FLOP.fullmatch(text.strip())
    if found is None:
        hint = "Write it like 35G, 80T or 1.5e13."
        raise ConfigError(f"{text[:40]!r} is not a number of FLOP", hint=hint)
    number, prefix = found.groups()
    return int(Decimal(number) * 1000 ** "_kmgtpe".index((prefix or "_").lower()))


def parse_duration(text: str) -> int:
    """Nanoseconds from ``90``, ``500ms``, ``2m``, ``1.5h``, ``1d``. Raises ConfigError."""
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ConfigError(f"{text[:40]!r} is not a duration", hint="Write it like 90s, 5m or 2h.")
    return int(Decimal(found.group(1)) * Decimal(_SECONDS[found.group(2) or ""]) * NS_PER_S)


def format_duration(duration_ns: int) -> str:
    """``3.2 ms``, ``12.5 s``, ``3 min 20 s``, ``2 h 5 min``."""
    seconds = duration_ns / NS_PER_S
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _scaled(value: int, units: tuple[str, ...]) -> str:
    if value < 1000:
        return f"{value} {units[0]}"
    power = min((len(str(value)) - 1) // 3, len(units) - 1)
    scaled = value / 1000**power
    return f"{scaled:.3g} {units[power]}" if scaled < 1000 else f"{scaled:.0f} {units[power]}"
