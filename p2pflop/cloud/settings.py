"""What a ``CLOUD`` session is told by environment variables, and their defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from p2pflop.errors import ConfigError
from p2pflop.units import GIB, NS_PER_S, NUSD_PER_USD, parse_bytes, parse_duration, parse_usd

SWITCH: Final = "CLOUD"
DEFAULT_MAX_NUSD: Final = NUSD_PER_USD // 10
DEFAULT_MEMORY_BYTES: Final = 2 * GIB
DEFAULT_WAIT_S: Final = 60
MAX_MEMORY_BYTES: Final = 2**50
MAX_WAIT_S: Final = 30 * 24 * 3600
MAX_CLASS_CHARS: Final = 100
FALLBACK_LOCAL: Final = "local"
_OFF: Final = ("", "0")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CloudSettings:
    """What a script wants of its session.

    ``class_name`` is as ``p2pflop submit --class`` takes it; empty is the node's own. ``debug``
    prints the ``DEV=`` that gives equal bytes here.
    """

    max_nusd: int = DEFAULT_MAX_NUSD
    class_name: str = ""
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    wait_s: int = DEFAULT_WAIT_S
    fallback: bool = False
    sync: bool = False
    quiet: bool = False
    debug: bool = False


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Whether ``CLOUD`` is set, and not to 0."""
    return environ.get(SWITCH, "") not in _OFF


def read_settings(environ: Mapping[str, str]) -> CloudSettings:
    """The settings in ``environ``. Raises ConfigError that names the variable."""
    return CloudSettings(
        max_nusd=_value(environ, "CLOUD_MAX_USD", parse_usd, DEFAULT_MAX_NUSD),
        class_name=_value(environ, "CLOUD_CLASS", _class_name, ""),
        memory_bytes=_value(environ, "CLOUD_MEMORY", _memory, DEFAULT_MEMORY_BYTES),
        wait_s=_value(environ, "CLOUD_WAIT", _wait, DEFAULT_WAIT_S),
        fallback=_value(environ, "CLOUD_FALLBACK", _fallback, False),
        sync=_switch(environ, "CLOUD_SYNC"),
        quiet=_switch(environ, "CLOUD_QUIET"),
        debug=_switch(environ, "CLOUD_DEBUG") or environ.get("DEBUG", "") not in _OFF,
    )


def _value(environ: Mapping[str, str], name: str, parse: Callable[[str], T], default: T) -> T:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.message}", hint=error.hint) from error


def _switch(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(name, "").strip()
    if text not in (*_OFF, "1"):
        raise ConfigError(f"{name}: {text[:40]!r} is neither 0 nor 1")
    return text == "1"


def _class_name(text: str) -> str:
    if len(text) > MAX_CLASS_CHARS or not text.isprintable():
        raise ConfigError(f"{text[:40]!r} is not a class", hint="See 'p2pflop book' for classes.")
    return text


def _memory(text: str) -> int:
    size_bytes = parse_bytes(text)
    if not 0 < size_bytes <= MAX_MEMORY_BYTES:
        raise ConfigError(f"{text[:40]!r} is out of range", hint="Write it like 512MiB or 8GiB.")
    return size_bytes


def _wait(text: str) -> int:
    wait_s = -(-parse_duration(text) // NS_PER_S)
    if wait_s > MAX_WAIT_S:
        raise ConfigError(f"{text[:40]!r} is longer than 30 days")
    return wait_s


def _fallback(text: str) -> bool:
    if text != FALLBACK_LOCAL:
        raise ConfigError(
            f"{text[:40]!r} is nothing to fall back on", hint="Write CLOUD_FALLBACK=local."
        )
    return True
