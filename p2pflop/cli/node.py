"""``p2pflop node``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import click

from p2pflop.cli.output import Flags, common_options
from p2pflop.cli.tied import end_with_parent
from p2pflop.errors import ConfigError
from p2pflop.units import NS_PER_S, parse_bytes, parse_duration, parse_flop, parse_usd

_PARSERS: Final[Mapping[str, Callable[[str], int]]] = {
    "ask_nusd": parse_usd,
    "wish_ask_nusd": parse_usd,
    "memory_bytes": parse_bytes,
    "disk_bytes": parse_bytes,
    "max_lease_s": lambda text: parse_duration(text) // NS_PER_S,
    "max_flop": parse_flop,
    "max_moved_bytes": parse_bytes,
}
"""Of the settings that people write with units."""


@click.command("node")
@click.option(
    "--ask", "ask_nusd", metavar="USD", help="Sell compute at this price a PFLOP; else do not sell."
)
@click.option(
    "--wish-ask",
    "wish_ask_nusd",
    metavar="USD",
    help="Answer wishes of buyers down to this price [default: --ask].",
)
@click.option("--listen", metavar="MULTIADDR", multiple=True, help="Listen here; repeatable.")
@click.option(
    "--port", "http_port", type=click.IntRange(0, 65535), help="HTTP port [default: 7420; 0: any]."
)
@click.option("--connect", metavar="MULTIADDR", multiple=True, help="Dial this peer; repeatable.")
@click.option(
    "--memory",
    "memory_bytes",
    metavar="SIZE",
    help="Memory for jobs [default: half of the machine's].",
)
@click.option(
    "--disk",
    "disk_bytes",
    metavar="SIZE",
    help="Disk for others' jobs [default: half of what is free].",
)
@click.option(
    "--max-lease",
    "max_lease_s",
    metavar="TIME",
    help="Take no job with a deadline later than this.",
)
@click.option("--max-flop", "max_flop", metavar="FLOP", help="Take no job of more work, like 100P.")
@click.option(
    "--max-moved", "max_moved_bytes", metavar="SIZE", help="Take no job that moves more bytes."
)
@click.option("--max-nodes", type=click.IntRange(1), help="Take no job with larger graphs.")
@click.option("--slots", type=click.IntRange(1), help="Jobs at once [default: 1].")
@click.option(
    "--class",
    "class_name",
    metavar="NAME",
    help="How to compute, of those that p2pflop doctor lists [default: cpu-clang-nofma].",
)
@click.option("--network", metavar="NAME", help="Network to take part in [default: main].")
@click.option(
    "--registry",
    metavar="KEY@URL",
    multiple=True,
    help="Deal only with accounts that this registry attests; repeatable.",
)
@click.option("--open", "is_open", is_flag=True, help="Deal with everybody [without --registry].")
@click.option("--enroll", is_flag=True, help="Apply to these registries, and wait.")
@click.option("--agree", metavar="VERSION", help="Agree to this version of their guidelines.")
@click.option("--contact", metavar="TEXT", help="How a registry's operator reaches you.")
@click.option("--place", metavar="TEXT", help="Where the machines are.")
@click.option(
    "--forgive",
    metavar="KEY",
    multiple=True,
    help="Trust a registry again that told two histories.",
)
@click.option("--embedded", is_flag=True, hidden=True)
@click.option("--tied", is_flag=True, hidden=True)
@common_options
@click.pass_obj
def node_command(flags: Flags, /, *, tied: bool, registry: tuple[str, ...], **given: Any) -> int:
    """Run a node: buy, and with --ask sell, compute.

    What is not given here is taken from config.toml in the home. With --json the log is JSON lines.
    The embedded node that an earlier command may have left in the home makes way if it is idle.

    \b
    Examples:
      p2pflop node                           take part, sell nothing
      p2pflop node --ask 0.05                sell at $0.05 a PFLOP (10^15 FLOP)
      p2pflop node --ask 0.02 --memory 8GiB --slots 2
      p2pflop node --ask 0.02 --max-lease 6h --max-moved 20GB
      p2pflop node --ask 0.02 --registry KEY@URL --enroll --agree 1 --contact ada@example.org
      p2pflop node --home /tmp/n2 --port 0 --connect /ip4/10.0.0.7/tcp/7421/p2p/12D3Koo...
    """
    from p2pflop.node.config import load_settings
    from p2pflop.node.main import run_node

    if tied:
        end_with_parent()
    overrides = {name: _setting(name, value) for name, value in given.items()}
    overrides |= {
        "home": flags.home,
        "registry": registry or None,
        "is_open": _is_open(given["is_open"], registry),
        "log_json": flags.json or None,
        "debug": flags.debug or None,
    }
    settings = load_settings(overrides)
    if not settings.embedded:
        from p2pflop.cli.embedded import end_embedded

        end_embedded(settings.home)
    return run_node(settings)


def _setting(name: str, value: Any) -> Any:
    """What an option sets; None if it was not given. Raises ConfigError."""
    if value is None or value is False or value == ():
        return None
    return _PARSERS[name](value) if name in _PARSERS else value


def _is_open(is_open: bool, registry: tuple[str, ...]) -> bool | None:
    """What ``--open`` sets; None if it was not given. Raises ConfigError."""
    if is_open and registry:
        raise ConfigError("a node is --open, or deals with whom a --registry attests: choose one")
    return is_open or None
