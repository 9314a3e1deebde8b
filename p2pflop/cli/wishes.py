"""The wishes of the order book, as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from p2pflop.cli.output import Flags, print_json, print_table, short
from p2pflop.kernels.classes import name_of
from p2pflop.market.wishes import ANY_PRICE_NUSD
from p2pflop.units import format_flop, format_usd


def print_wishes(flags: Flags, levels: Iterable[Mapping[str, Any]]) -> None:
    """How many buyers would pay up to which price a PFLOP, and for how much work in all."""
    if flags.json:
        print_json(list(levels))
        return
    print_table(
        ("WISHES", "UP TO/PFLOP", "SIZE", "UP TO, IN ALL", "CLASS"),
        (
            (
                _count(level),
                _limit(int(level["price_nusd"])),
                format_flop(int(level["flop"])),
                _limit(int(level["limit_nusd"])),
                _class(str(level["class_id"])),
            )
            for level in levels
        ),
        "Nobody wishes for anything now.",
    )


def _class(class_id: str) -> str:
    return (name_of(bytes.fromhex(class_id)) or short(class_id)) if class_id else "any"


def _limit(nusd: int) -> str:
    return format_usd(nusd) if nusd < ANY_PRICE_NUSD else "any"


def _count(level: Mapping[str, Any]) -> str:
    own = f" ({level['own']} of this node)" if level["own"] else ""
    return f"{level['wishes']}{own}"
