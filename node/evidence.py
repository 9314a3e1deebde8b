"""What the journal keeps of a run's looks at the book, and the evidence made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Annotated, Final

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.ids import HASH_BYTES
from p2pflop.market.evidence import (
    MAX_ATTEMPTS,
    MAX_LOOKS,
    MAX_SHEETS,
    Again,
    Attempt,
    Avoided,
    Evidence,
    Look,
    Wanted,
)
from p2pflop.market.limits import MAX_LIMIT, Known
from p2pflop.market.mandate import Mandate
from p2pflop.market.records import Bid, Fill
from p2pflop.market.sheets import OpenSheet
from p2pflop.node.driver import LIFE_ROW
from p2pflop.node.journal import JobRows, Row
from p2pflop.node.orders import Ranking
from p2pflop.units import MIB
from p2pflop.wire import U63, Record, decode, encode, envelope_kind

LOOK_ROW: Final = "look/2"
"""Those of the first kind had no mandate, and are passed over."""
ATTESTED_ROW: Final = "attested"
"""The accounts of the look before that a strict buyer held to be attested, one after the other."""
WANTED_ROW: Final = "wanted"
"""What the look before was for, if it found nobody to bid to."""
AVOIDED_ROW: Final = "avoided"
"""Whom the policy of the look before excludes, one after the other."""
SESSION_ROW: Final = "session"
"""What a session had to do again, of the look before, and that it was for a session."""
ATTEMPT_ROW: Final = "attempt"
"""A bid of a session and what came of it, of the look before."""
LOST_ROW: Final = "lost"
"""What ended the lease of the attempt before, in words."""
KNOWN_ROW: Final = "known"
"""What the limits of asks were compared with, of the look before, if any has one."""
LOOK_ROWS: Final = (
    *(LOOK_ROW, ATTESTED_ROW, WANTED_ROW, AVOIDED_ROW, KNOWN_ROW),
    *(SESSION_ROW, ATTEMPT_ROW, LOST_ROW),
)
REJECT_ROW: Final = "reject"
MAX_REASON_CHARS: Final = 200
MAX_SHOWN_BYTES: Final = 48 * MIB
"""Of sheets and answers in one evidence; policies and figures have the rest of its size."""

JoinedIds = Annotated[bytes, msgspec.Meta(max_length=MAX_SHEETS * HASH_BYTES)]


class LookRow(Record, frozen=True):
    """A look whose sheets are named by their ids."""

    at_ns: U63
    continues: bool
    mandate: Mandate
    whole: bool
    sheets: JoinedIds


@dataclass(slots=True)
class _Tried:
    """An attempt as it comes together."""

    bid: bytes
    fill: bytes = b""
    reject: bytes = b""
    reason: str = ""


@dataclass(slots=True)
class _Looked:
    """A look as it comes together."""

    row: LookRow
    attested: bytes = b""
    wanted: tuple[Wanted, ...] = ()
    avoided: tuple[Avoided, ...] = ()
    session: tuple[Again, ...] = ()
    known: Known = ()
    tried: list[_Tried] = field(default_factory=list)


def keep_look(
    rows: JobRows,
    ranking: Ranking,
    *,
    continues: bool,
    known: Known = (),
    wanted: Wanted | None = None,
    session: Again | None = None,
) -> None:
    """Add a look to the rows of its run: the sheets of a large book as far as the best go.

    ``known`` are the figures that the need had for limits, ``wanted`` is what it was for, if no bid
    will say it; ``session`` what a session has to do again, if it is for one."""
    sheets: Sequence[OpenSheet] = ranking.view.sheets
    whole = len(sheets) <= MAX_SHEETS
    if not whole:
        best: dict[bytes, OpenSheet] = {}
        for entry in ranking.ranked:
            best.setdefault(entry.sheet.node, entry.sheet)
            if len(best) == MAX_SHEETS:
                break
        sheets = list(best.values())
    rows.add_sheets([(sheet.sealed.id, sheet.sealed.wire) for sheet in sheets])
    look = LookRow(
        at_ns=ranking.view.at_ns,
        continues=continues,
        mandate=ranking.mandate,
        whole=whole,
        sheets=b"".join(sheet.sealed.id for sheet in sheets),
    )
    rows.add(LOOK_ROW, encode(look))
    if ranking.mandate.policy.attested_only:
        accounts = sorted({sheet.account for sheet in sheets})
        attested = [each for each in accounts if each in ranking.admitted]
        rows.add(ATTESTED_ROW, b"".join(attested))
    if wanted is not None:
        rows.add(WANTED_ROW, encode(wanted))
    if session is not None:
        rows.add(SESSION_ROW, encode(session))
    if any(sheet.limits for sheet in sheets):
        told = tuple((limit, min(figure, MAX_LIMIT)) for limit, figure in known)
        rows.add(KNOWN_ROW, msgspec.msgpack.encode(told))
    if ranking.avoided:
        rows.add(AVOIDED_ROW, msgspec.msgpack.encode(ranking.avoided))


def evidence_of(
    rows: Sequence[Row], sheet: Callable[[bytes], bytes | None], network: str
) -> Evidence:
    """The evidence of a run. ``sheet`` gives an envelope by its id, None if it is kept no more."""
    looks: list[_Looked] = []
    for row in rows:
        if row.kind == LOOK_ROW:
            looks.append(_Looked(decode(LookRow, row.body)))
        elif row.kind == ATTESTED_ROW and looks:
            looks[-1].attested = row.body
        elif row.kind == WANTED_ROW and looks:
            looks[-1].wanted = (decode(Wanted, row.body),)
        elif row.kind == AVOIDED_ROW and looks:
            looks[-1].avoided = msgspec.msgpack.decode(row.body, type=tuple[Avoided, ...])
        elif row.kind == KNOWN_ROW and looks:
            looks[-1].known = msgspec.msgpack.decode(row.body, type=Known)
        elif row.kind == SESSION_ROW and looks:
            looks[-1].session = (decode(Again, row.body),)
        elif looks:
            _take(row, looks)
    kept = cache(sheet)
    newest = [_look(looked, kept) for looked in looks[-MAX_LOOKS:]]
    return Evidence(version=2, network=network, looks=tuple(_newest(newest, len(looks))))


def _newest(looks: Sequence[Look], count: int) -> Sequence[Look]:
    """Those of the newest of ``count`` looks to be shown: where not all can be, from the beginning
    of a round on, if one is."""
    first, left_bytes = len(looks), MAX_SHOWN_BYTES
    while first and (left_bytes := left_bytes - _size_bytes(looks[first - 1])) >= 0:
        first -= 1
    shown = looks[min(first, len(looks) - 1) :] if looks else looks
    if len(shown) == count:
        return shown
    begins = [place for place, look in enumerate(shown) if not look.continues]
    return shown[begins[0] :] if begins else shown


def _size_bytes(look: Look) -> int:
    """What of a look can be large."""
    tried = (wire for each in look.attempts for wire in (each.bid, each.fill, each.reject))
    return sum(map(len, chain(look.sheets, tried)))


def _look(looked: _Looked, sheet: Callable[[bytes], bytes | None]) -> Look:
    kept = looked.row
    ids = _split(kept.sheets)
    wires = [wire for wire in map(sheet, ids) if wire is not None]
    return Look(
        at_ns=kept.at_ns,
        continues=kept.continues,
        mandate=kept.mandate,
        whole=kept.whole and len(wires) == len(ids),
        sheets=tuple(wires),
        attested=tuple(_split(looked.attested)),
        attempts=tuple(
            Attempt(each.bid, each.fill, each.reject, each.reason)
            for each in looked.tried[:MAX_ATTEMPTS]
        ),
        wanted=looked.wanted,
        avoided=looked.avoided,
        session=looked.session,
        known=looked.known,
    )


def _split(joined: bytes) -> list[bytes]:
    return [joined[place : place + HASH_BYTES] for place in range(0, len(joined), HASH_BYTES)]


def _take(row: Row, looks: Sequence[_Looked]) -> None:
    """What a row of the lifecycle, a reject, or one of a session says of the attempts.

    Why the last one came to nothing is told with what follows, which may be in another look.
    """
    last = next((looked.tried[-1] for looked in reversed(looks) if looked.tried), None)
    if row.kind == ATTEMPT_ROW:
        attempt = decode(Attempt, row.body)
        looks[-1].tried.append(_Tried(attempt.bid, attempt.fill, attempt.reject, attempt.reason))
    if row.kind == LOST_ROW and last is not None:
        last.reason = last.reason or row.body.decode()
    if row.kind == REJECT_ROW and last is not None:
        last.reject = row.body
    if not row.kind.startswith(LIFE_ROW):
        return
    parts = msgspec.msgpack.decode(row.body, type=tuple[bytes, ...])
    kinds = [_kind(part) for part in parts]
    if last is not None and len(parts) == 3 and not kinds[0]:
        last.reason = last.reason or parts[0].decode()[:MAX_REASON_CHARS]
    for part, kind in zip(parts, kinds, strict=True):
        if kind == Bid.KIND:
            looks[-1].tried.append(_Tried(part))
        elif kind == Fill.KIND and last is not None:
            last.fill = part


def _kind(part: bytes) -> str:
    try:
        return envelope_kind(part)
    except ProtocolError:
        return ""
