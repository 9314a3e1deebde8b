"""What a node is told: flags over ``config.toml`` in its home over the defaults."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import platformdirs

from p2pflop.errors import ConfigError
from p2pflop.franchise.records import MAX_PERSONAL_CHARS
from p2pflop.franchise.roll import MAX_ISSUERS
from p2pflop.kernels.classes import CLASS_NAME, chosen_family
from p2pflop.market.limits import MAX_LIMIT, AskLimits, Limit
from p2pflop.node.service import MAX_DEADLINE_S
from p2pflop.units import (
    GIB,
    NS_PER_S,
    format_bytes,
    is_price,
    parse_bytes,
    parse_duration,
    parse_flop,
    parse_usd,
)
from p2pflop.wire import DEFAULT_NETWORK

DEFAULT_HTTP_PORT: Final = 7420
DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/7421",)
LOOPBACK_LISTEN: Final = ("/ip4/127.0.0.1/tcp/0",)
MAX_SLOTS: Final = 64
MAX_CONNECT: Final = 64
CONFIG_NAME: Final = "config.toml"
MIN_MEMORY_BYTES: Final = 256 * 1024**2
LEAST_MAX_LEASE_S: Final = 60
"""What ``max_lease`` may be at least: sessions take no shorter lease."""
_REGISTRY: Final = re.compile(r"([0-9a-f]{64})@(https?://[^\s/@?#]{1,200}(?:/[^\s@?#]{0,200})?)")
_ROOT_KEY: Final = re.compile(r"[0-9a-f]{64}")

_TEXTS: Final = ("listen", "connect", "registry", "forgive")
_NAMES: Final = {"class": "class_name", "open": "is_open"}
_SWITCHES: Final = ("embedded", "log_json", "debug", "is_open", "enroll")
_WORDS: Final = ("agree", "contact", "place")
_AMOUNTS: Final = {
    "ask": "ask_nusd",
    "byte_price": "byte_price_nusd",
    "credit": "credit_nusd",
    "disk": "disk_bytes",
    "memory": "memory_bytes",
    "min_charge": "min_charge_nusd",
    "setup": "setup_nusd",
    "window": "window_nusd",
    "wish_ask": "wish_ask_nusd",
    "max_flop": "max_flop",
    "max_lease": "max_lease_s",
    "max_moved": "max_moved_bytes",
}
"""What ``config.toml`` calls amounts, which people write with units."""
_PARSERS: Final[Mapping[str, Callable[[str], int]]] = {
    "disk": parse_bytes,
    "memory": parse_bytes,
    "max_flop": parse_flop,
    "max_lease": lambda text: parse_duration(text) // NS_PER_S,
    "max_moved": parse_bytes,
}
"""Of those that are no dollars."""
_PRICES: Final = ("ask_nusd", "setup_nusd", "min_charge_nusd", "byte_price_nusd")
_LIMITS: Final = {
    Limit.LEASE: "max_lease_s",
    Limit.FLOP: "max_flop",
    Limit.MOVED: "max_moved_bytes",
    Limit.NODES: "max_nodes",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one node.

    ``ask_nusd`` is nano-dollars per PFLOP, None sells nothing; ``byte_price_nusd`` nano-dollars per
    10^9 moved bytes; ``memory_bytes`` what all running jobs together may use, None for a half of
    the machine's; ``disk_bytes`` what inputs, checkpoints and results of strangers' jobs may take,
    None for a half of what is free; ``class_name`` how it computes (``kernels.classes``);
    ``credit_nusd`` what all unknown buyers together may owe in a day; ``window_nusd`` how far the
    work of a lease runs ahead of what its buyer has countersigned;
    ``wish_ask_nusd`` the price per PFLOP to which quotes go down for buyers' wishes, None for
    ``ask_nusd``. ``max_lease_s``, ``max_flop``, ``max_moved_bytes`` and ``max_nodes`` are limits of
    its ask (``market.limits``), None for none but the network's.

    ``registry`` are those that it trusts, each ``KEY@URL``; with none, or ``is_open``, it deals
    with everybody. With ``enroll`` its account applies to them, by ``contact`` and ``place``, and
    agrees to the version ``agree`` of their guidelines. ``forgive`` are root keys of registries
    that told two histories and are to be trusted again.
    """

    home: Path
    ask_nusd: int | None = None
    listen: tuple[str, ...] = DEFAULT_LISTEN
    http_port: int = DEFAULT_HTTP_PORT
    connect: tuple[str, ...] = ()
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    slots: int = 1
    class_name: str = CLASS_NAME
    network: str = DEFAULT_NETWORK
    embedded: bool = False
    log_json: bool = False
    debug: bool = False
    setup_nusd: int = 0
    min_charge_nusd: int = 0
    byte_price_nusd: int = 0
    credit_nusd: int = 10**9
    wish_ask_nusd: int | None = None
    max_lease_s: int | None = None
    max_flop: int | None = None
    max_moved_bytes: int | None = None
    max_nodes: int | None = None
    window_nusd: int = 10**8
    registry: tuple[str, ...] = ()
    is_open: bool = False
    enroll: bool = False
    agree: str = ""
    contact: str = ""
    place: str = ""
    forgive: tuple[str, ...] = ()

    def registries(self) -> dict[bytes, str]:
        """The URL by the root key of each registry that is trusted. Raises ConfigError."""
        if self.is_open:
            return {}
        return dict(parse_registry(text) for text in self.registry)

    @property
    def limits(self) -> AskLimits:
        """Those of its ask."""
        told = ((limit, getattr(self, name)) for limit, name in _LIMITS.items())
        return tuple((int(limit), most) for limit, most in told if most is not None)

    def resolved_memory_bytes(self) -> int:
        """The memory for jobs in bytes: as set, or a half of this machine's, at most 64 GiB."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return min(machine_memory_bytes() // 2, 64 * GIB)

    def resolved_disk_bytes(self) -> int:
        """The disk for strangers' jobs in bytes: as set, or a half of what is free now."""
        if self.disk_bytes is not None:
            return self.disk_bytes
        return shutil.disk_usage(self.home).free // 2


def parse_registry(text: str) -> tuple[bytes, str]:
    """Root key and URL of ``KEY@URL``. Raises ConfigError."""
    found = _REGISTRY.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text[:120]!r} is not a registry",
            hint="Write it like KEY@https://registry.example.org, with its root key in 64 hex "
            "digits: it is what is trusted, wherever the registry moves.",
        )
    return bytes.fromhex(found[1]), found[2]


@cache
def machine_memory_bytes() -> int:
    """All of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_home() -> Path:
    """``$P2PFLOP_HOME``, or this platform's folder for a user's data."""
    given = os.environ.get("P2PFLOP_HOME")
    return Path(given) if given else Path(platformdirs.user_data_dir("p2pflop", False))


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """Settings from flags, where not None, over ``config.toml`` over the defaults.

    Raises ConfigError that names the file and the key.
    """
    given = Path(overrides.get("home") or default_home())
    try:
        home = given.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"there is no home directory for {given}") from error
    told = {key: value for key, value in overrides.items() if value is not None and key != "home"}
    path = home / CONFIG_NAME
    settings = _with(Settings(home), _read_config(path), f"{path}: ")
    settings = _with(settings, told, "")
    if settings.wish_ask_nusd is not None:
        _check_wish_ask(settings.wish_ask_nusd, settings.ask_nusd)
    return for_its_user(settings) if settings.embedded else settings


def for_its_user(settings: Settings) -> Settings:
    """``settings`` as an embedded node has them: on loopback, for its own user, free of charge."""
    unlimited: dict[str, Any] = dict.fromkeys(_LIMITS.values())
    free: dict[str, Any] = dict.fromkeys(_PRICES, 0)
    return replace(
        settings, embedded=True, listen=LOOPBACK_LISTEN, http_port=0, **free, **unlimited
    )


def _check_wish_ask(wish_ask_nusd: int, ask_nusd: int | None) -> None:
    if ask_nusd is None:
        raise ConfigError("wish_ask without ask", hint="Sell with --ask USD, or leave it out.")
    if wish_ask_nusd > ask_nusd:
        raise ConfigError(
            "wish_ask is over ask", hint="It is the price down to which wishes are answered."
        )


def _with(settings: Settings, changes: Mapping[str, Any], source: str) -> Settings:
    """``settings`` with ``changes``, checked; ``source`` begins the message of a ConfigError."""
    known = {field.name for field in fields(Settings)} - {"home"}
    unknown = sorted(set(changes) - known)
    if unknown:
        renamed = _AMOUNTS | _NAMES
        names = sorted(known - set(renamed.values()) | set(renamed))
        raise ConfigError(
            f"{source}unknown setting {unknown[0]!r}", hint=f"Settings are {', '.join(names)}."
        )
    try:
        changed = replace(settings, **changes)
        _check(changed)
    except ConfigError as error:
        raise ConfigError(source + error.message, hint=error.hint) from error
    return changed


def _read_config(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            hint="Choose another home with --home or P2PFLOP_HOME.",
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    settings: dict[str, Any] = {}
    for key, value in table.items():
        try:
            if key in _AMOUNTS:
                settings[_AMOUNTS[key]] = _PARSERS.get(key, parse_usd)(str(value))
            else:
                name = _NAMES.get(key, key)
                settings[name] = tuple(value) if isinstance(value, list) else value
        except ConfigError as error:
            raise ConfigError(f"{path}: {key}: {error.message}", hint=error.hint) from error
    return settings


def _check(settings: Settings) -> None:
    def require(condition: bool, message: str, hint: str = "") -> None:
        if not condition:
            raise ConfigError(message, hint=hint)

    for name in ("http_port", "slots"):
        value = getattr(settings, name)
        require(isinstance(value, int) and not isinstance(value, bool), f"{name} is not a number")
    for name in _SWITCHES:
        require(isinstance(getattr(settings, name), bool), f"{name} is neither true nor false")
    for name in _TEXTS:
        value = getattr(settings, name)
        texts = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        require(texts, f"{name} is not a list of texts", f'Write it like {name} = ["..."].')
    for name in _WORDS:
        require(isinstance(getattr(settings, name), str), f"{name} is not a text")
    _check_registries(settings)
    _check_limits(settings)
    require(isinstance(settings.network, str), "network is not a text")
    require(isinstance(settings.class_name, str), "class is not a text")
    chosen_family(settings.class_name)
    require(0 <= settings.http_port < 65536, f"no port {settings.http_port}", "Use 0 to 65535.")
    require(1 <= settings.slots <= MAX_SLOTS, f"slots must be 1 to {MAX_SLOTS}")
    require(len(settings.connect) <= MAX_CONNECT, f"at most {MAX_CONNECT} peers to connect to")
    require(
        settings.memory_bytes is None or settings.memory_bytes >= MIN_MEMORY_BYTES,
        f"memory for jobs must be at least {MIN_MEMORY_BYTES // 1024**2} MiB",
    )
    machine_bytes = machine_memory_bytes()
    require(
        settings.memory_bytes is None or settings.memory_bytes <= machine_bytes,
        f"{format_bytes(settings.memory_bytes or 0)} of memory for jobs is more than this machine "
        f"has, {format_bytes(machine_bytes)}",
        "Give less with --memory; without it, it is a half of the machine's.",
    )
    require(
        settings.disk_bytes is None or settings.disk_bytes >= 0,
        "disk for jobs must not be negative",
    )
    require(
        settings.network.isascii()
        and settings.network.replace("-", "").isalnum()
        and len(settings.network) <= 32,
        f"{settings.network[:40]!r} is not a network name",
        "Use up to 32 letters, digits and dashes.",
    )
    for name in (*_PRICES, "wish_ask_nusd"):
        price = getattr(settings, name)
        require(
            price is None or is_price(price),
            f"{name} must have at most three significant digits",
            "Prices on a sheet are rounded so that nobody wins by a billionth.",
        )


def _check_limits(settings: Settings) -> None:
    for name in _LIMITS.values():
        most = getattr(settings, name)
        if most is None:
            continue
        if not isinstance(most, int) or isinstance(most, bool):
            raise ConfigError(f"{name} is not a number")
        if not 1 <= most <= MAX_LIMIT:
            raise ConfigError(f"{name} must be 1 to {MAX_LIMIT}", hint="Leave it out for no limit.")
    lease_s = settings.max_lease_s
    if lease_s is not None and not LEAST_MAX_LEASE_S <= lease_s <= MAX_DEADLINE_S:
        raise ConfigError(
            f"the longest lease must be {LEAST_MAX_LEASE_S} s to {MAX_DEADLINE_S // 86400} days",
            hint="Write it like 6h or 2d: --max-lease 6h.",
        )


def _check_registries(settings: Settings) -> None:
    keys = [key for key, _ in map(parse_registry, settings.registry)]
    if len(keys) > MAX_ISSUERS:
        raise ConfigError(f"at most {MAX_ISSUERS} registries can be trusted")
    if len(set(keys)) < len(keys):
        raise ConfigError("one registry is named twice")
    for key in settings.forgive:
        if _ROOT_KEY.fullmatch(key) is None or bytes.fromhex(key) not in keys:
            raise ConfigError(
                f"{key[:80]!r} is not the root key of a registry that is trusted here",
                hint="Name it with --registry KEY@URL too.",
            )
    if not settings.enroll:
        return
    if not settings.registries():
        raise ConfigError("there is no registry to enrol at", hint="Name it: --registry KEY@URL.")
    if not settings.contact.strip():
        raise ConfigError(
            "an enrolment needs a contact",
            hint="Say how the registry's operator reaches you: --contact you@example.org.",
        )
    for name in ("contact", "place"):
        text = getattr(settings, name)
        if not text.isprintable() or len(text) > MAX_PERSONAL_CHARS:
            raise ConfigError(f"{name} is one line of up to {MAX_PERSONAL_CHARS} characters")
