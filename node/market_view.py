"""The market as this node's user sees it: the asks and trades of each class, and the take rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from p2pflop.job.lifecycle import Edge
from p2pflop.market.depth import Depth, Level, depths
from p2pflop.market.records import Receipt
from p2pflop.market.take import Take
from p2pflop.market.tape import Figures, OpenTrade, figures, hour_of
from p2pflop.market.views import BookView
from p2pflop.node.driver import LIFE_ROW
from p2pflop.node.journal import Journal
from p2pflop.node.service import Json
from p2pflop.wire import Envelope, decode, envelope_kind

MAX_JOBS: Final = 1_000
"""Of both sides, the newest, over which the take rate is reckoned."""

COUNTERSIGNED_ROWS: Final = tuple(
    LIFE_ROW + edge for edge in (Edge.COUNTERSIGN, Edge.VERIFIED, Edge.SETTLE)
)
"""They begin with the receipt."""
CLOSING_ROWS: Final = (LIFE_ROW + Edge.CANCEL, LIFE_ROW + Edge.CLOSED)
"""They end with the closing receipt, or with nothing."""


def classes(view: BookView, trades: Iterable[OpenTrade], now_ns: int) -> list[Json]:
    """Every class that is asked for or was traded, by id, as JSON."""
    asked = depths(view, now_ns)
    traded = {each.class_id: each for each in figures(trades, hour_of(now_ns))}
    return [
        {"class_id": class_id.hex(), **_asks(asked, class_id), **_trades(traded.get(class_id))}
        for class_id in sorted(asked.keys() | traded.keys())
    ]


def countersigned(journal: Journal) -> list[Receipt]:
    """The receipts that both sides have signed, of the newest ``MAX_JOBS`` jobs."""
    wires = [
        *(_parts(body)[0] for body in journal.bodies(COUNTERSIGNED_ROWS, MAX_JOBS)),
        *filter(None, (_parts(body)[-1] for body in journal.bodies(CLOSING_ROWS, MAX_JOBS))),
    ]
    return [
        decode(Receipt, decode(Envelope, wire).body)
        for wire in wires
        if envelope_kind(wire) == Receipt.KIND
    ]


def _parts(body: bytes) -> tuple[bytes, ...]:
    return msgspec.msgpack.decode(body, type=tuple[bytes, ...])


def describe_take(take: Take) -> Json:
    """As JSON."""
    return {
        "fills": take.fills,
        "paid_nusd": take.paid_nusd,
        "got_nusd": take.got_nusd,
        "take_nusd": take.take_nusd,
    }


def _asks(asked: Mapping[bytes, Depth], class_id: bytes) -> Json:
    depth = asked.get(class_id)
    levels = () if depth is None else depth.levels
    total = Level(0, 0, 0) if depth is None else depth.total
    return {
        "asks": total.asks,
        "accounts": total.accounts,
        "depth": [
            {"price_nusd": each.price_nusd, "asks": each.asks, "accounts": each.accounts}
            for each in levels
        ],
    }


def _trades(traded: Figures | None) -> Json:
    return {
        "last_nusd": traded and traded.last_nusd,
        "low_nusd": traded and traded.low_nusd,
        "high_nusd": traded and traded.high_nusd,
        "hour_gflop": traded.hour_gflop if traded else 0,
        "day_gflop": traded.day_gflop if traded else 0,
        "day_trades": traded.day_trades if traded else 0,
        "day_accounts": traded.day_accounts if traded else 0,
    }
