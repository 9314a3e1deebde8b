"""The tape: what was traded lately, at which price. Public, and told by the sellers alone.

A **trade** is the word of a seller's node about a settled fill: class, price per PFLOP, size to one
digit, hour. Nothing in it names buyer or job, and what a sale to its own account was is not told.
It is a **claim**: nobody can check it, and identities are free. What a reader may rely on is only
that no account counts for more than one:

- An account has at most ``MAX_TRADES_AN_ACCOUNT`` trades in an hour.
- Of an hour the tape keeps ``MAX_TRADES_AN_HOUR``, and each account's first before anybody's
  second; in all ``MAX_TRADES``, of the newest hours first, and none older than ``KEPT_HOURS``.
- The **last price** of a class is a median over accounts, see ``last_price``.

What is kept does not depend on the order in which trades came. Within an account the order is that
of a hash, keyed with this tape's own secret, so that nobody can search for a trade that stays. Of
two trades of an account about one fill in one hour the one with the lower id stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from blake3 import blake3

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey, peer_id
from p2pflop.market.records import Rejected, Trade
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, check_delegation
from p2pflop.units import NS_PER_S, is_price
from p2pflop.wire import DEFAULT_NETWORK, Sealed, open_sealed, seal

HOUR_NS: Final = 3600 * NS_PER_S
FLOP_PER_GFLOP: Final = 10**9
MAX_TRADE_GFLOP: Final = 9 * 10**18
KEPT_HOURS: Final = 72
DAY_HOURS: Final = 24
MAX_TRADES_AN_ACCOUNT: Final = 32
"""In one hour; more are not told, so that the volume of a busy account is understated."""
MAX_TRADES_AN_HOUR: Final = 1_024
MAX_TRADES: Final = 8_192
LAST_PRICE_ACCOUNTS: Final = 5
SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class OpenTrade:
    """A trade whose signature, delegation and rules were checked. ``account`` is the seller's."""

    sealed: Sealed[Trade]
    account: bytes

    @property
    def trade(self) -> Trade:
        """The record."""
        return self.sealed.record

    @property
    def peer(self) -> str:
        """The libp2p id of the node that signed it."""
        return peer_id(self.sealed.signer)


@dataclass(frozen=True, slots=True)
class TapeDump:
    """A tape at rest: envelopes."""

    trades: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What the tape says of a class, all by the word of sellers.

    ``last_nusd`` is a ``last_price``, the others are over the trades of the day up to the hour
    asked for: lowest and highest price, GFLOP in that hour and in the day, trades, accounts.
    """

    class_id: bytes
    last_nusd: int | None
    low_nusd: int | None
    high_nusd: int | None
    hour_gflop: int
    day_gflop: int
    day_trades: int
    day_accounts: int


def hour_of(now_ns: int) -> int:
    """The hour of a Unix time, counted from 1970."""
    return now_ns // HOUR_NS


def fill_digest(fill_id: bytes) -> bytes:
    """What a trade calls its fill: both parties know which one is meant, and nobody else."""
    return content_hash(b"trade" + fill_id)


def round_gflop(flop: int) -> int:
    """GFLOP to one significant digit, halves up, at least 1: a size that gives no job away."""
    gflop = max(1, (flop + FLOP_PER_GFLOP // 2) // FLOP_PER_GFLOP)
    unit: int = 10 ** (len(str(gflop)) - 1)
    return min((gflop + unit // 2) // unit * unit, MAX_TRADE_GFLOP)


def make_trade(
    key: PrivateKey,
    *,
    fill_id: bytes,
    class_id: bytes,
    price_nusd: int,
    flop: int,
    now_ns: int,
    delegation: bytes,
    network: str = DEFAULT_NETWORK,
) -> OpenTrade:
    """Sign a trade that ``open_trade`` accepts. Raises ValueError if it would not."""
    trade = Trade(
        version=1,
        fill_digest=fill_digest(fill_id),
        class_id=class_id,
        price_nusd=price_nusd,
        gflop_rounded=round_gflop(flop),
        hour=hour_of(now_ns),
        delegation=delegation,
    )
    sealed = seal(trade, key, network)
    account = _check_rules(sealed, network)
    if isinstance(account, Rejected):
        raise ValueError(f"trade: {account.reason}")
    return OpenTrade(sealed, account)


def open_trade(data: bytes, network: str = DEFAULT_NETWORK) -> OpenTrade | Rejected:
    """Open a trade from anywhere, whenever it was. At most two signature checks, no state."""
    try:
        sealed = open_sealed(Trade, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    account = _check_rules(sealed, network)
    return account if isinstance(account, Rejected) else OpenTrade(sealed, account)


def check_hour(trade: OpenTrade, now_ns: int, kept_hours: int = KEPT_HOURS) -> Rejected | None:
    """Why a trade is not for now."""
    if trade.trade.hour > hour_of(now_ns + CLOCK_TOLERANCE_NS):
        return Rejected("trade is from the future")
    if trade.trade.hour <= hour_of(now_ns) - kept_hours:
        return Rejected(f"trade is over {kept_hours} hours old")
    return None


def _check_rules(sealed: Sealed[Trade], network: str) -> bytes | Rejected:
    trade = sealed.record
    if not is_price(trade.price_nusd):
        return Rejected("trade has a price of over three significant digits")
    if round_gflop(trade.gflop_rounded * FLOP_PER_GFLOP) != trade.gflop_rounded:
        return Rejected("trade has a size of over one digit")
    # Delegations last for days: one that covers the fill covers the end of its hour.
    end_ns = (trade.hour + 1) * HOUR_NS - 1
    return check_delegation(trade.delegation, sealed.signer, end_ns, end_ns, network)


@dataclass(frozen=True, slots=True)
class _Row:
    place: bytes
    trade: OpenTrade


Rank = tuple[int, bytes]
"""Of an account's rows the n-th has n and its place. The highest of an hour goes first."""


class _Hour:
    """The trades of one hour, by account."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: dict[bytes, list[_Row]] = {}

    def add(self, place: bytes, trade: OpenTrade) -> bool | Rejected:
        rows = self.rows.get(trade.account, [])
        at = bisect_left(rows, place, key=lambda row: row.place)
        if at < len(rows) and rows[at].place == place:
            kept = rows[at].trade.sealed.id
            if trade.sealed.id > kept:
                return Rejected("another trade about that fill is on the tape")
            rows[at] = _Row(place, trade)
            return trade.sealed.id != kept
        if at >= MAX_TRADES_AN_ACCOUNT:
            return Rejected("the account has enough trades in that hour")
        rows.insert(at, _Row(place, trade))
        self.rows[trade.account] = rows
        self.count += 1
        if len(rows) > MAX_TRADES_AN_ACCOUNT:
            self._pop(trade.account)
        return True

    def pop(self) -> OpenTrade:
        """Take out the row of the highest rank."""
        ranks = ((len(rows), rows[-1].place, account) for account, rows in self.rows.items())
        return self._pop(max(ranks)[2])

    def _pop(self, account: bytes) -> OpenTrade:
        rows = self.rows[account]
        last = rows.pop()
        if not rows:
            del self.rows[account]
        self.count -= 1
        return last.trade

    def trades(self) -> Iterator[OpenTrade]:
        return (row.trade for row in chain.from_iterable(self.rows.values()))


class Tape:
    """The trades of the last ``KEPT_HOURS``. ``secret`` is 32 random bytes of this node."""

    def __init__(self, secret: bytes, network: str = DEFAULT_NETWORK) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a tape's secret has {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._network = network
        self._hours: dict[int, _Hour] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, trade: OpenTrade, now_ns: int) -> bool | Rejected:
        """Whether the trade is on the tape now and was not before; or why it is not."""
        wrong = check_hour(trade, now_ns)
        if wrong is not None:
            return wrong
        self.expire(now_ns)
        number = trade.trade.hour
        hour = self._hours.setdefault(number, _Hour())
        before = hour.count
        added = hour.add(self._place(trade), trade)
        dropped = hour.pop() if hour.count > MAX_TRADES_AN_HOUR else None
        self._count += hour.count - before
        if self._count > MAX_TRADES:
            dropped = self._hours[min(self._hours)].pop()
            self._count -= 1
        self._hours = {each: kept for each, kept in self._hours.items() if kept.count}
        return Rejected("there is no room for that hour") if dropped is trade else added

    def expire(self, now_ns: int) -> None:
        """Forget what is too old."""
        oldest = hour_of(now_ns) - KEPT_HOURS
        for number in [number for number in self._hours if number <= oldest]:
            self._count -= self._hours.pop(number).count

    def trades(self, now_ns: int) -> list[OpenTrade]:
        """All that is kept, newest hours first, by id within an hour."""
        self.expire(now_ns)
        found = chain.from_iterable(hour.trades() for hour in self._hours.values())
        return sorted(found, key=lambda each: (-each.trade.hour, each.sealed.id))

    def ids(self, now_ns: int) -> dict[int, list[bytes]]:
        """The ids of each hour, rising."""
        self.expire(now_ns)
        return {
            number: sorted(trade.sealed.id for trade in hour.trades())
            for number, hour in self._hours.items()
        }

    def dump(self) -> TapeDump:
        """What ``load`` brings back."""
        wires = (trade.sealed.wire for hour in self._hours.values() for trade in hour.trades())
        return TapeDump(tuple(sorted(wires)))

    def load(self, dump: TapeDump, now_ns: int) -> None:
        """Add what was saved, checked as if peers had brought it."""
        for wire in dump.trades[:MAX_TRADES]:
            opened = open_trade(wire, self._network)
            if isinstance(opened, OpenTrade):
                self.add(opened, now_ns)

    def _place(self, trade: OpenTrade) -> bytes:
        named = trade.account + trade.trade.fill_digest
        return blake3(named, key=self._secret).digest()


def last_price(trades: Iterable[OpenTrade]) -> int | None:
    """The last price of the trades of one class, in nano-dollars per PFLOP; None without any.

    Of each account the median of its newest hour; of those the median over the accounts that traded
    last: hour by hour back until there are ``LAST_PRICE_ACCOUNTS``. Medians of an even number are
    the lower one, so that a last price is a price that somebody told.
    """
    newest: dict[bytes, int] = {}
    prices: dict[bytes, list[int]] = {}
    for each in sorted(trades, key=lambda each: -each.trade.hour):
        if newest.setdefault(each.account, each.trade.hour) == each.trade.hour:
            prices.setdefault(each.account, []).append(each.trade.price_nusd)
    if not newest:
        return None
    hours = sorted(newest.values(), reverse=True)
    oldest = hours[min(LAST_PRICE_ACCOUNTS, len(hours)) - 1]
    return _median([_median(prices[who]) for who, hour in newest.items() if hour >= oldest])


def figures(trades: Iterable[OpenTrade], hour: int) -> list[Figures]:
    """The figures of every class with a trade, as of ``hour``; classes rising."""
    by_class: dict[bytes, list[OpenTrade]] = {}
    for each in trades:
        by_class.setdefault(each.trade.class_id, []).append(each)
    return [_figures(class_id, found, hour) for class_id, found in sorted(by_class.items())]


def _figures(class_id: bytes, trades: Sequence[OpenTrade], hour: int) -> Figures:
    day = [each for each in trades if each.trade.hour > hour - DAY_HOURS]
    prices = [each.trade.price_nusd for each in day]
    return Figures(
        class_id=class_id,
        last_nusd=last_price(trades),
        low_nusd=min(prices, default=None),
        high_nusd=max(prices, default=None),
        hour_gflop=_gflop(each for each in day if each.trade.hour >= hour),
        day_gflop=_gflop(day),
        day_trades=len(day),
        day_accounts=len({each.account for each in day}),
    )


def _gflop(trades: Iterable[OpenTrade]) -> int:
    return sum(each.trade.gflop_rounded for each in trades)


def _median(prices: list[int]) -> int:
    return sorted(prices)[(len(prices) - 1) // 2]
