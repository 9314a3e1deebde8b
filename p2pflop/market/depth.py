"""How deep the book is: what is asked at or below each price, added up.

Slots are not in gossip, so depth counts asks and the accounts behind them, not PFLOP. An ask says
nothing of how much may be bought on it: the fill tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from p2pflop.market.views import BookView

MAX_LEVELS: Final = 32


@dataclass(frozen=True, slots=True)
class Level:
    """How many asks there are at ``price_nusd`` a PFLOP or less, and of how many accounts."""

    price_nusd: int
    asks: int
    accounts: int


@dataclass(frozen=True, slots=True)
class Depth:
    """The asks of one class. ``levels`` are the ``MAX_LEVELS`` lowest prices, rising; ``total`` is
    the level of all."""

    levels: tuple[Level, ...]
    total: Level


def depths(view: BookView, now_ns: int) -> Mapping[bytes, Depth]:
    """The depth of every class in which something is asked at ``now_ns``."""
    found = {}
    for class_id, asks in view.by_price.items():
        accounts: set[bytes] = set()
        levels: dict[int, Level] = {}
        count = 0
        for price_nusd, _, _, sheet, ask in asks:
            if ask.valid_until_ns > now_ns and sheet.sheet.expires_ns > now_ns:
                count += 1
                accounts.add(sheet.account)
                levels[price_nusd] = Level(price_nusd, count, len(accounts))
        if levels:
            rising = tuple(levels.values())
            found[class_id] = Depth(rising[:MAX_LEVELS], rising[-1])
    return found
