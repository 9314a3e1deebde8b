"""The limits of an ask: what its provider does not take, though the network would. Pure.

A limit is an id and the most that is taken, an ask's limits are pairs of these, ids rising. They
travel in critical extension ``LIMITS_EXT`` of the sheet, by the numbers of its asks, so that an ask
without any costs no byte. A job that exceeds one does not go to that ask: the buyer says so before
it bids, and the provider whatever the buyer says. Each id is critical: an ask with a limit that
this version does not know does for no job.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, ClassVar, Final, NamedTuple

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.market.records import LIMITS_EXT, MAX_SHEET_ORDERS, Rejected, Sheet
from p2pflop.units import NS_PER_S, counted, format_bytes, format_duration, format_flop
from p2pflop.wire import MAX_EXT_BYTES, U32, Ext, Record, decode, encode

MAX_ASK_LIMITS: Final = 8
MAX_LIMIT: Final = 2**63 - 1


class Limit(IntEnum):
    """What can be limited, by its id.

    ``LEASE`` is in seconds, from the time at which a bid was decided to its deadline; ``FLOP`` the
    metered work of a job; ``MOVED`` the bytes that its quote bills as moved; ``NODES`` those of all
    its graphs, which are lowered before anything is paid. Of a session's lease they are what its
    commands add up to.
    """

    LEASE = 1
    FLOP = 2
    MOVED = 3
    NODES = 4

    @property
    def label(self) -> str:
        """Its name where programs read it, with the unit."""
        return _LABELS[self]


_LABELS: Final = {
    Limit.LEASE: "lease_s",
    Limit.FLOP: "flop",
    Limit.MOVED: "moved_bytes",
    Limit.NODES: "nodes",
}
_SUBJECTS: Final = {
    Limit.LEASE: "a lease of",
    Limit.FLOP: "work of",
    Limit.MOVED: "moving",
    Limit.NODES: "lowering",
}
_KNOWN: Final = frozenset(Limit)

AskLimits = tuple[tuple[int, int], ...]
"""Ids and the most that is taken, ids rising."""
Figures = Mapping[int, int]
"""What is known of a job, by the id of the limit that it is compared with."""
SheetLimits = Mapping[int, AskLimits]
"""By the number of the ask; of those alone that have any."""
NO_LIMITS: Final[SheetLimits] = MappingProxyType({})

Known = tuple[tuple[int, int], ...]
"""Figures as pairs, for what is compared or kept."""

LimitId = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
Most = Annotated[int, msgspec.Meta(ge=1, le=MAX_LIMIT)]


class LimitedAsk(Record, frozen=True):
    """The limits of the ask of that number."""

    ask: U32
    limits: Annotated[
        tuple[tuple[LimitId, Most], ...], msgspec.Meta(min_length=1, max_length=MAX_ASK_LIMITS)
    ]


class LimitedAsks(Record, frozen=True):
    """What ``LIMITS_EXT`` holds: the asks of a sheet that have limits, numbers rising."""

    MAX_BYTES: ClassVar[int] = MAX_EXT_BYTES

    asks: Annotated[tuple[LimitedAsk, ...], msgspec.Meta(min_length=1, max_length=MAX_SHEET_ORDERS)]


class Over(NamedTuple):
    """A limit that is exceeded: by ``figure``, where ``most`` is taken."""

    limit: int
    figure: int
    most: int

    @property
    def label(self) -> str:
        """The limit's name, or its number where this version does not know it."""
        return limit_label(self.limit)

    @property
    def told(self) -> str:
        """In words, for both sides."""
        if self.limit not in _KNOWN:
            return f"the ask has limit {self.limit}, which this version does not know"
        limit = Limit(self.limit)
        figure, most = _measure(limit, self.figure), _measure(limit, self.most)
        if figure == most:  # alike when rounded
            figure, most = str(self.figure), str(self.most)
        return f"{_SUBJECTS[limit]} {figure} is over the ask's {most}"


def limit_label(limit: int) -> str:
    """The name of a limit where programs read it, or its number."""
    return Limit(limit).label if limit in _KNOWN else str(limit)


def limit_words(limits: AskLimits) -> str:
    """What an ask does not take more of, in short: ``1 h 0 min, 5 GB moved``; empty for none."""
    return ", ".join(_short(limit, most) for limit, most in limits)


def label_words(labelled: Mapping[str, int]) -> str:
    """``limit_words`` of limits by their labels, as programs read them."""
    by_label = {limit.label: limit for limit in Limit}
    return ", ".join(
        _short(by_label[label], most) if label in by_label else f"limit {label}"
        for label, most in labelled.items()
    )


def _short(limit: int, most: int) -> str:
    if limit not in _KNOWN:
        return f"limit {limit}"
    moved = " moved" if limit == Limit.MOVED else ""
    return _measure(Limit(limit), most) + moved


def _measure(limit: Limit, value: int) -> str:
    if limit is Limit.LEASE:
        return format_duration(value * NS_PER_S)
    if limit is Limit.FLOP:
        return format_flop(value)
    return format_bytes(value) if limit is Limit.MOVED else counted(value, "node")


def exceeded(limits: AskLimits, figures: Figures) -> Over | None:
    """The first limit that ``figures`` exceed, or that is not known here; None if there is none.

    What there is no figure of is not judged.
    """
    for limit, most in limits:
        figure = figures.get(limit, 0)
        if figure > most or limit not in _KNOWN:
            return Over(limit, figure, most)
    return None


def lease_seconds(from_ns: int, until_ns: int) -> int:
    """The figure of a lease between these times: a second that has begun counts."""
    return -(-(until_ns - from_ns) // NS_PER_S)


def limits_ext(limits: SheetLimits) -> Ext:
    """What a sheet says of the limits of its asks, by their numbers; none where there are none."""
    asks = tuple(LimitedAsk(number, each) for number, each in sorted(limits.items()) if each)
    return ((LIMITS_EXT, encode(LimitedAsks(asks))),) if asks else ()


def read_limits(sheet: Sheet) -> SheetLimits | Rejected:
    """The limits of a sheet's asks, checked; from anywhere."""
    said = dict(sheet.ext).get(LIMITS_EXT)
    if said is None:
        return NO_LIMITS
    try:
        asks = decode(LimitedAsks, said).asks
    except ProtocolError as error:
        return Rejected(f"limits: {error.message}")
    numbers = [limited.ask for limited in asks]
    ids = [[limit for limit, _ in limited.limits] for limited in asks]
    if any(later <= earlier for each in (numbers, *ids) for earlier, later in pairwise(each)):
        return Rejected("limits: ids or numbers of asks do not rise")
    if not {ask.number for ask in sheet.asks}.issuperset(numbers):
        return Rejected("limits: of an ask that the sheet does not have")
    return {limited.ask: limited.limits for limited in asks}
