"""Trades on their way between nodes: what is taken and passed on, and how a tape is filled up.

Sans-IO, as ``relay``, whose neighbours, subnets and faults it shares: who is shunned for bad sheets
is shunned here, and the other way round.

**Gossip.** A trade is looked at in the order of a sheet: what ``gate`` looks at, signatures and
rules (wrong ones are the forwarder's fault), the hour, the account's quota, the tape. It is passed
on if it is new on the tape. Gossip takes trades of the last ``GOSSIPED_HOURS``; older ones are
replays, or come by comparing.

**Comparing.** A node pulls what it lacks, in one stream with strict turns::

    dialler                                    listener
    TapeOutline                             ->
                                            <- TapeListing
    TapeWant                                ->
                                            <- TapeParcel...

An outline has a hash of each hour's ids; the listing the ids of the hours that differ, both as far
as ``SHORT_ID_BYTES``. An empty want ends it. Every node does so with each new
neighbour and with a random one every ``COMPARE_TAPES_S``.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.ids import content_hash
from p2pflop.market.gate import Gate, Outcome, Verdict
from p2pflop.market.rates import Rates, remember
from p2pflop.market.records import MAX_TRADE_BYTES, Rejected
from p2pflop.market.relay import Relay
from p2pflop.market.tape import (
    KEPT_HOURS,
    MAX_TRADES,
    MAX_TRADES_AN_ACCOUNT,
    OpenTrade,
    Tape,
    check_hour,
    hour_of,
    open_trade,
)
from p2pflop.units import KIB, NS_PER_S
from p2pflop.wire import MAX_ENVELOPE_OVERHEAD_BYTES, U32, Record, decode, encode

MAX_TRADE_WIRE_BYTES: Final = MAX_TRADE_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES
FORWARDER_PER_S: Final = 20.0
FORWARDER_BURST: Final = 200
SUBNET_PER_S: Final = 80.0
SUBNET_BURST: Final = 800
ACCOUNT_PER_S: Final = 0.1
ACCOUNT_BURST: Final = 2 * MAX_TRADES_AN_ACCOUNT
"""An hour's worth may come late, and the next hour's after it."""
ANSWERED_PER_S: Final = 0.2
ANSWERED_BURST: Final = 4
"""Comparisons that one peer may begin; each may cost a tape's worth of trades."""
GOSSIPED_HOURS: Final = 2
MAX_SEEN: Final = 8_192
MAX_TURNED_AWAY: Final = 8_192
MAX_REFUSED_TRADES: Final = 512
"""In one comparison: checked, but with no place here. More are not looked at."""
COMPARE_TAPES_S: Final = 15.0
SHORT_ID_BYTES: Final = 16
MAX_TRADES_A_FRAME: Final = 64
MAX_NAMED_HOURS: Final = KEPT_HOURS + 1
"""Clocks differ: one side may be an hour ahead."""

# Not inside the classes: msgspec evaluates their annotations at the first use, not now.
_ShortHash = Annotated[bytes, msgspec.Meta(min_length=SHORT_ID_BYTES, max_length=SHORT_ID_BYTES)]
_Ids = Annotated[bytes, msgspec.Meta(max_length=MAX_TRADES * SHORT_ID_BYTES)]
_Wire = Annotated[bytes, msgspec.Meta(max_length=MAX_TRADE_WIRE_BYTES)]
_Wires = Annotated[tuple[_Wire, ...], msgspec.Meta(max_length=MAX_TRADES_A_FRAME)]


class HourHash(Record, frozen=True):
    """The first ``SHORT_ID_BYTES`` of the hash over the ids of one hour, rising."""

    hour: U32
    hash: _ShortHash


_Hours = Annotated[tuple[HourHash, ...], msgspec.Meta(max_length=MAX_NAMED_HOURS)]


class TapeOutline(Record, frozen=True):
    """Every hour with a trade, rising."""

    hours: _Hours


class TapeListing(Record, frozen=True):
    """Ids of the hours that differ, joined, each as far as ``SHORT_ID_BYTES``."""

    MAX_BYTES: ClassVar[int] = MAX_TRADES * SHORT_ID_BYTES + KIB

    ids: _Ids


class TapeWant(Record, frozen=True):
    """Those of them that the dialler would like to have."""

    MAX_BYTES: ClassVar[int] = MAX_TRADES * SHORT_ID_BYTES + KIB

    ids: _Ids


class TapeParcel(Record, frozen=True):
    """Envelopes of trades."""

    MAX_BYTES: ClassVar[int] = MAX_TRADES_A_FRAME * (MAX_TRADE_WIRE_BYTES + 8) + KIB

    trades: _Wires
    last: bool


OpenedTrade = OpenTrade | Rejected


class TapeRelay:
    """The trades of a node's neighbours on their way onto ``tape`` and on. ``peers`` knows them."""

    def __init__(self, tape: Tape, peers: Relay) -> None:
        self.tape = tape
        self.peers = peers
        self.counts: Counter[Outcome] = Counter()
        self.gate = Gate(
            peers,
            forwarders=Rates(FORWARDER_PER_S, FORWARDER_BURST),
            subnets=Rates(SUBNET_PER_S, SUBNET_BURST),
            answered=Rates(ANSWERED_PER_S, ANSWERED_BURST),
            max_bytes=MAX_TRADE_WIRE_BYTES,
            max_seen=MAX_SEEN,
        )
        self._accounts = Rates(ACCOUNT_PER_S, ACCOUNT_BURST)
        self._turned_away: OrderedDict[bytes, None] = OrderedDict()

    def take(self, wire: bytes, forwarder: str, now_ns: int) -> Verdict:
        """Judge a gossiped trade. Costs at most two signature checks."""
        verdict = self._take(wire, forwarder, now_ns)
        self.counts[verdict.outcome] += 1
        return verdict

    def enter(self, opened: OpenedTrade, source: str, now_ns: int) -> Verdict:
        """Judge a trade that came by comparing; its signatures were checked already."""
        verdict = self._enter(opened, source, now_ns)
        self.counts[verdict.outcome] += 1
        return verdict

    def wants(self, short_id: bytes) -> bool:
        """Whether to ask for a trade that is not here: not if it found no place before.

        What a tape has refused it would refuse again.
        """
        return short_id not in self._turned_away

    def _take(self, wire: bytes, forwarder: str, now_ns: int) -> Verdict:
        refusal = self.gate.refusal(wire, forwarder, now_ns)
        if refusal is not None:
            return refusal
        opened = open_trade(wire, self.peers.network)
        if isinstance(opened, OpenTrade):
            wrong = check_hour(opened, now_ns, GOSSIPED_HOURS)
            if wrong is not None:
                return Verdict(Outcome.CLOCK, wrong.reason)
            if not self._accounts.allow(opened.account.hex(), now_ns / NS_PER_S):
                return Verdict(Outcome.ACCOUNT)
        verdict = self._enter(opened, forwarder, now_ns)
        self.gate.judged(wire)
        return verdict

    def _enter(self, opened: OpenedTrade, source: str, now_ns: int) -> Verdict:
        if isinstance(opened, Rejected):
            self.peers.fault(source, now_ns)
            return Verdict(Outcome.BAD, opened.reason)
        wrong = check_hour(opened, now_ns)
        added = self.tape.add(opened, now_ns) if wrong is None else wrong
        if isinstance(added, Rejected):
            if opened.trade.hour > hour_of(now_ns):
                return Verdict(Outcome.CLOCK, added.reason)  # its time may come
            short_id = opened.sealed.id[:SHORT_ID_BYTES]
            remember(self._turned_away, short_id, None, MAX_TURNED_AWAY)
            return Verdict(Outcome.TAPE if wrong is None else Outcome.CLOCK, added.reason)
        return Verdict(Outcome.NEW, trade=opened) if added else Verdict(Outcome.KNOWN)


@dataclass(frozen=True, slots=True)
class OpenParcel:
    """A parcel whose trades were opened, signatures and all."""

    trades: tuple[OpenedTrade, ...]
    last: bool


def read_parcel(frame: bytes, network: str) -> OpenParcel:
    """Open a parcel. Raises ProtocolError. Touches no state: may be called in a thread."""
    parcel = decode(TapeParcel, frame)
    return OpenParcel(tuple(open_trade(wire, network) for wire in parcel.trades), parcel.last)


class Pull:
    """The dialler's side of a comparison with ``peer``: ``outline``, ``want``, then ``receive``
    until ``done``."""

    def __init__(self, relay: TapeRelay, peer: str) -> None:
        self.done = False
        self.new: list[OpenTrade] = []
        self._relay = relay
        self._peer = peer
        self._due: set[bytes] = set()
        self._refused = 0

    def outline(self, now_ns: int) -> bytes:
        """The first frame."""
        return encode(outline_of(self._relay.tape.ids(now_ns)))

    def want(self, frame: bytes, now_ns: int) -> bytes:
        """The answer to a listing; an empty want ends it. Raises ProtocolError."""
        listed = _split(decode(TapeListing, frame).ids)
        ids = self._relay.tape.ids(now_ns).values()
        here = {each[:SHORT_ID_BYTES] for of_hour in ids for each in of_hour}
        wanted = [
            each for each in dict.fromkeys(listed) if each not in here and self._relay.wants(each)
        ]
        self._due = set(wanted)
        self.done = not wanted
        return encode(TapeWant(b"".join(wanted)))

    def receive(self, parcel: OpenParcel, now_ns: int) -> None:
        """Take in a parcel. Raises ProtocolError."""
        if not parcel.trades and not parcel.last:
            raise ProtocolError(f"{self._peer} sends empty parcels", peer=self._peer)
        for opened in parcel.trades:
            if isinstance(opened, OpenTrade):
                short_id = opened.sealed.id[:SHORT_ID_BYTES]
                if short_id not in self._due:
                    raise ProtocolError(
                        f"{self._peer} sends trades that nobody asked for", peer=self._peer
                    )
                self._due.discard(short_id)
            verdict = self._relay.enter(opened, self._peer, now_ns)
            if verdict.trade is not None:
                self.new.append(verdict.trade)
            self._refused += verdict.outcome in (Outcome.TAPE, Outcome.CLOCK)
        if self._relay.peers.is_shunned(self._peer, now_ns):
            raise ProtocolError(f"{self._peer} sends bad trades", peer=self._peer)
        self.done = parcel.last or self._refused > MAX_REFUSED_TRADES


def listing_for(tape: Tape, frame: bytes, now_ns: int) -> bytes:
    """The listener's answer to an outline. Raises ProtocolError."""
    theirs = {each.hour: each.hash for each in decode(TapeOutline, frame).hours}
    ids = tape.ids(now_ns)
    ours = {each.hour: each.hash for each in outline_of(ids).hours}
    differing = sorted(hour for hour in ours if ours[hour] != theirs.get(hour))
    listed = (each[:SHORT_ID_BYTES] for hour in differing for each in ids[hour])
    return encode(TapeListing(b"".join(listed)))


def parcels_for(tape: Tape, frame: bytes, now_ns: int) -> Iterator[bytes]:
    """The listener's answer to a want: what of it is still here. Nothing to an empty one.

    Raises ProtocolError.
    """
    wanted = set(_split(decode(TapeWant, frame).ids))
    if not wanted:
        return
    found = [
        trade.sealed.wire
        for trade in tape.trades(now_ns)
        if trade.sealed.id[:SHORT_ID_BYTES] in wanted
    ]
    for start in range(0, max(1, len(found)), MAX_TRADES_A_FRAME):
        few = tuple(found[start : start + MAX_TRADES_A_FRAME])
        yield encode(TapeParcel(few, start + MAX_TRADES_A_FRAME >= len(found)))


def outline_of(ids: Mapping[int, Sequence[bytes]]) -> TapeOutline:
    """The outline of a tape with these ids in each hour."""
    return TapeOutline(
        tuple(
            HourHash(hour, content_hash(b"".join(found))[:SHORT_ID_BYTES])
            for hour, found in sorted(ids.items())
        )
    )


def _split(joined: bytes) -> list[bytes]:
    if len(joined) % SHORT_ID_BYTES:
        raise ProtocolError("a list of trades ends in the middle of an id")
    return [joined[at : at + SHORT_ID_BYTES] for at in range(0, len(joined), SHORT_ID_BYTES)]
