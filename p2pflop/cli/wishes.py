"""The wishes of the order book, as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from p2pflop.cli.output import Flags, print_json, short, table_lines
from p2pflop.kernels.classes import name_of
from p2pflop.market.wishes import ANY_PRICE_NUSD
from p2pflop.units import format_flop, format_usd


def print_wishes(flags: Flags, levels: Sequence[Mapping[str, Any]]) -> None:
    """How many buyers would pay up to which price a PFLOP, and for how much work in all."""
    if flags.json:
        print_json(levels)
    for line in [] if flags.json else wish_lines(levels) or ["Nobody wishes for anything now."]:
        click.echo(line)


def wish_lines(levels: Iterable[Mapping[str, Any]]) -> list[str]:
    """The table of them; nothing if there are none."""
    header = ("WISHES", "UP TO/PFLOP", "SIZE", "UP TO, IN ALL", "CLASS")
    rows = (
        (
            _count(level),
            _limit(int(level["price_nusd"])),
            format_flop(int(level["flop"])),
            _limit(int(level["limit_nusd"])),
            _class(str(level["class_id"])),
        )
        for level in levels
    )
    return table_lines(header, rows)


def _class(class_id: str) -> str:
    return (name_of(bytes.fromhex(class_id)) or short(class_id)) if class_id else "any"


def _limit(nusd: int) -> str:
    return format_usd(nusd) if nusd < ANY_PRICE_NUSD else "any"


def _count(level: Mapping[str, Any]) -> str:
    own = f" ({level['own']} of this node)" if level["own"] else ""
    return f"{level['wishes']}{own}"
