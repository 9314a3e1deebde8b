"""Ranking: which ask is the best deal for a need. Pure, public and replayable.

Among the asks that satisfy a need and the buyer's stated policy the lowest total wins; equal totals
go by BLAKE3(bid nonce || account), then, within one account, by node key and ask number. Neither
the order in which sheets arrived nor any name or place enters. Claims (``flop_per_s``) rank
nothing: only the buyer's own audited experience, stated in the policy, may call a provider slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, groupby
from operator import attrgetter
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec

from p2pflop.errors import MarketError
from p2pflop.ids import content_hash
from p2pflop.keys import peer_id
from p2pflop.market.limits import Figures, Known, Limit, Over, exceeded, lease_seconds
from p2pflop.market.records import Ask, CostLine
from p2pflop.market.sheets import OpenSheet
from p2pflop.market.views import BookView
from p2pflop.units import FLOP_PER_PFLOP, MAX_NUSD, NS_PER_S, format_bytes, format_usd
from p2pflop.wire import U63, Hash, Key, Record

BYTES_PER_GB: Final = 10**9
MAX_POLICY_ACCOUNTS: Final = 256
MAX_EXPERIENCE: Final = 256

PolicyAccounts = Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_POLICY_ACCOUNTS)]


class Accounts(Protocol):
    """Some accounts: a set of them, or whoever can tell which they are."""

    def __contains__(self, account: bytes, /) -> bool: ...


NOBODY: Final[Accounts] = frozenset()


class Experience(Record, frozen=True):
    """The speed at which an account ran this buyer's audited jobs of a class."""

    account: Key
    class_id: Hash
    flop_per_s: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class Policy(Record, frozen=True):
    """What a buyer allows. ``only`` empty means any account; ``max_price_nusd`` 0, any price."""

    version: Literal[1] = 1
    excluded: PolicyAccounts = ()
    only: PolicyAccounts = ()
    attested_only: bool = False
    max_price_nusd: U63 = 0
    experience: Annotated[tuple[Experience, ...], msgspec.Meta(max_length=MAX_EXPERIENCE)] = ()

    def canonical(self) -> Policy:
        """The same policy with its lists sorted and without repeats."""
        return Policy(
            version=1,
            excluded=tuple(sorted(set(self.excluded))),
            only=tuple(sorted(set(self.only))),
            attested_only=self.attested_only,
            max_price_nusd=self.max_price_nusd,
            experience=tuple(
                sorted(set(self.experience), key=lambda e: (e.account, e.class_id, e.flop_per_s))
            ),
        )


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be bought. ``flop`` and ``touched_bytes`` are metered totals of the stretch.

    ``moved_bytes`` are manifest sizes of inputs and outputs, ``nonce`` that of the bid to be made,
    ``own_node`` the buyer's own node key (it does not buy from itself), ``max_nusd`` the budget.
    ``known`` has figures for the limits of asks, by limit: those that do not follow from the rest,
    or other ones.
    """

    class_ids: frozenset[bytes]
    flop: int
    touched_bytes: int
    moved_bytes: int
    memory_bytes: int
    deadline_ns: int
    max_nusd: int
    nonce: bytes
    own_node: bytes = b""
    known: Known = ()

    def figures(self, now_ns: int) -> Figures:
        """What the limits of asks are compared with, for a lease that begins now."""
        lease_s = lease_seconds(now_ns, self.deadline_ns)
        return {
            Limit.LEASE: lease_s,
            Limit.FLOP: self.flop,
            Limit.MOVED: self.moved_bytes,
            **dict(self.known),
        }


class MissReason(StrEnum):
    """Why an ask does not do. The further down, the nearer it comes to what is needed."""

    OWN_NODE = "own node"
    CLASS = "wrong class"
    MEMORY = "too little memory"
    EXPIRED = "ask has expired"
    DEADLINE = "deadline has passed"
    POLICY = "excluded by policy"
    ATTESTATION = "account is not attested"
    PRICE = "over the price limit"
    LIMIT = "over a limit of the ask"
    BUDGET = "over the budget"
    SLOW = "too slow for the deadline, by own experience"


_TOTAL: Final = attrgetter("total_nusd")
_LIMIT_ADVICE: Final[Mapping[int, str]] = {
    Limit.LEASE: "give the job an earlier deadline",
    Limit.FLOP: "buy fewer steps, and the rest after them",
    Limit.MOVED: "have fewer checkpoints, or smaller inputs and outputs",
    Limit.NODES: "make the graphs smaller",
}
_ADVICE: Final = {
    MissReason.CLASS: "They compute other bytes than the class that was asked for, by default this "
    "machine's own: connect to more peers, or allow any class.",
    MissReason.EXPIRED: "Newer sheets come within minutes: try again.",
    MissReason.DEADLINE: "Give the job a later deadline.",
    MissReason.OWN_NODE: "Connect to a peer that sells.",
    MissReason.POLICY: "Connect to more peers, or relax the policy on accounts.",
    MissReason.ATTESTATION: "Connect to more peers, trust another registry, or buy from everybody: "
    "p2pflop node --open.",
    MissReason.PRICE: "Raise the policy's price limit, or wait for a cheaper ask.",
    MissReason.SLOW: "Give the job a later deadline, or connect to more peers.",
}


class Quoted(NamedTuple):
    """An ask that one provider has quoted to this buyer alone, and the newest sheet of its node.

    ``ticket`` is what a bid on it shows (``p2pflop.market.wishes``).
    """

    sheet: OpenSheet
    ask: Ask
    ticket: bytes


class Deal(msgspec.Struct, frozen=True, gc=False):
    """An ask that does for ``need``. ``total_nusd`` is the quote, what it would cost.

    ``ticket`` is what a bid on a directed quote shows; empty for an ask of the sheet.
    """

    sheet: OpenSheet
    ask: Ask
    total_nusd: int
    need: Need
    ticket: bytes = b""

    @property
    def node(self) -> bytes:
        """The provider's node key."""
        return self.sheet.node

    @property
    def peer(self) -> str:
        """The libp2p id of the provider's node."""
        return peer_id(self.sheet.node)

    @property
    def account(self) -> bytes:
        """The provider's account key."""
        return self.sheet.account

    @property
    def claimed_ns(self) -> int | None:
        """How long the job takes at the speed that the ask claims; None if it claims none."""
        if self.ask.flop_per_s == 0:
            return None
        return -(-self.need.flop * NS_PER_S // self.ask.flop_per_s)


class Miss(msgspec.Struct, frozen=True, gc=False):
    """An ask that does not do for ``need``. ``total_nusd`` is what it would have cost, ``over`` the
    limit of the ask that the job exceeds, if that is the reason."""

    sheet: OpenSheet
    ask: Ask
    reason: MissReason
    total_nusd: int
    need: Need
    over: Over | None = None

    @property
    def told(self) -> str:
        """The reason, with the limit and both figures if it is one."""
        return str(self.reason) if self.over is None else f"{self.reason}: {self.over.told}"

    @property
    def node(self) -> bytes:
        """The provider's node key."""
        return self.sheet.node

    @property
    def peer(self) -> str:
        """The libp2p id of the provider's node."""
        return peer_id(self.sheet.node)

    @property
    def account(self) -> bytes:
        """The provider's account key."""
        return self.sheet.account


def total_nusd(ask: Ask, flop: int, touched_bytes: int, moved_bytes: int) -> int:
    """The quote: what the job costs on ``ask``, exactly, before anything runs.

    The price is per PFLOP, or per byte touched where memory is the bottleneck; bytes moved between
    the nodes have their own.
    """
    # Asked for each of ten thousand asks: calls, even of max(), would be a tenth of a ranking.
    counted_flop = ask.flop_per_byte * touched_bytes
    if counted_flop < flop:
        counted_flop = flop
    compute_nusd = -(-ask.price_nusd * counted_flop // FLOP_PER_PFLOP)
    moved_nusd = -(-ask.byte_price_nusd * moved_bytes // BYTES_PER_GB)
    total = ask.setup_nusd + compute_nusd + moved_nusd
    if total < ask.min_charge_nusd:
        return ask.min_charge_nusd
    return total


def sum_costs(costs: Iterable[CostLine]) -> tuple[int, int]:
    """The FLOP and the touched bytes of a whole stretch."""
    flop = touched_bytes = 0
    for line in costs:
        flop += line.flop * line.times
        touched_bytes += line.touched_bytes * line.times
    return flop, touched_bytes


def rank(
    sheets: Iterable[OpenSheet],
    need: Need,
    policy: Policy,
    now_ns: int,
    attested: Accounts = NOBODY,
    quoted: Iterable[Quoted] = (),
) -> list[Deal | Miss]:
    """Every ask: deals first, best first, then a Miss with its reason for each of the others.

    ``attested`` are the accounts that are at ``now_ns``. What was ``quoted`` is ranked among the
    asks of the sheets, by the same rule.
    """
    judge = _judge(need, policy, now_ns, attested)
    flop, touched_bytes, moved_bytes = need.flop, need.touched_bytes, need.moved_bytes
    deals: list[Deal] = []
    misses: list[Deal | Miss] = []
    on_sheets = ((sheet, ask, b"") for sheet in sheets for ask in sheet.sealed.record.asks)
    for sheet, ask, ticket in chain(on_sheets, quoted):
        total = total_nusd(ask, flop, touched_bytes, moved_bytes)
        reason = judge(sheet, ask, total)
        if reason is None:
            deals.append(Deal(sheet, ask, total, need, ticket))
        elif reason is MissReason.LIMIT:
            over = _over(sheet, ask, need, now_ns)
            misses.append(Miss(sheet, ask, reason, total, need, over))
        else:
            misses.append(Miss(sheet, ask, reason, total, need))
    deals.sort(key=_TOTAL)
    ranked: list[Deal | Miss] = []
    for _, group in groupby(deals, key=_TOTAL):
        tied = list(group)
        if len(tied) > 1:
            tied.sort(key=lambda deal: (*tie_key(need.nonce, deal.sheet, deal.ask), deal.ticket))
        ranked += tied
    misses.sort(key=lambda miss: (miss.total_nusd, miss.sheet.sealed.signer, miss.ask.number))
    return ranked + misses


def best(
    view: BookView,
    need: Need,
    policy: Policy,
    now_ns: int,
    attested: Accounts = NOBODY,
) -> Deal | None:
    """The first deal that ``rank`` gives, without ranking the rest.

    Asks are visited by price per PFLOP; since the price part alone is a lower bound of the total,
    the visit ends where that bound exceeds the best total found.
    """
    judge = _judge(need, policy, now_ns, attested)
    found: Deal | None = None
    for class_id in need.class_ids:
        for price_nusd, _, _, sheet, ask in view.by_price.get(class_id, ()):
            bound = -(-price_nusd * need.flop // FLOP_PER_PFLOP)
            if bound > (need.max_nusd if found is None else found.total_nusd):
                break
            total = total_nusd(ask, need.flop, need.touched_bytes, need.moved_bytes)
            if found is not None and (
                total > found.total_nusd
                or (
                    total == found.total_nusd
                    and tie_key(need.nonce, sheet, ask)
                    > tie_key(need.nonce, found.sheet, found.ask)
                )
            ):
                continue
            if judge(sheet, ask, total) is None:
                found = Deal(sheet, ask, total, need)
    return found


def tie_key(nonce: bytes, sheet: OpenSheet, ask: Ask) -> tuple[bytes, bytes, int]:
    """Orders equal totals: a draw among accounts that nobody can steer, then node and number."""
    return content_hash(nonce + sheet.account), sheet.sealed.signer, ask.number


def no_deal(ranked: Iterable[Deal | Miss]) -> MarketError:
    """Why nothing was bought, in words: the asks that come nearest first, and what to do then.

    What keeps out the ask that would almost do is the job's obstacle, however many others there are
    that would not do at all.
    """
    by_reason = by_nearness(ranked)
    if not by_reason:
        return MarketError(
            "the order book is empty", hint="Connect to a peer that sells, or wait for its sheet."
        )
    listed = ", ".join(f"{len(misses)} x {reason}" for reason, misses in by_reason.items())
    hint = _advice(*next(iter(by_reason.items())))
    return MarketError(f"no ask satisfies the job: {listed}", hint=hint)


def by_nearness(ranked: Iterable[Deal | Miss]) -> dict[MissReason, list[Miss]]:
    """The misses by their reason, those that come nearest first."""
    found: dict[MissReason, list[Miss]] = {}
    for miss in ranked:
        if isinstance(miss, Miss):
            found.setdefault(miss.reason, []).append(miss)
    return {reason: found[reason] for reason in reversed(MissReason) if reason in found}


def _advice(reason: MissReason, misses: list[Miss]) -> str:
    if reason is MissReason.BUDGET:
        cheapest = format_usd(min(MAX_NUSD, *(miss.total_nusd for miss in misses)))
        return f"The cheapest ask over the budget would cost {cheapest}."
    if reason is MissReason.MEMORY:
        return _advice_on_memory(misses)
    if reason is MissReason.LIMIT:
        return _advice_on_limits(misses)
    if reason is MissReason.CLASS and not any(_has_memory(miss) for miss in misses):
        return f"{_ADVICE[reason]} Nor have they the memory. {_advice_on_memory(misses)}"
    return _ADVICE[reason]


def _has_memory(miss: Miss) -> bool:
    return miss.ask.memory_bytes >= miss.need.memory_bytes


def _advice_on_memory(misses: list[Miss]) -> str:
    needed = format_bytes(misses[0].need.memory_bytes)
    largest = format_bytes(max(miss.ask.memory_bytes for miss in misses))
    return (
        f"The job needs {needed}, and the largest ask has {largest}: make the job smaller, or "
        "connect to a peer with more."
    )


def _advice_on_limits(misses: list[Miss]) -> str:
    """For each limit that is exceeded, how far and what to do, by the ask that takes the most."""
    found: dict[int, Over] = {}
    for over in (miss.over for miss in misses if miss.over is not None):
        if over.limit not in found or over.most > found[over.limit].most:
            found[over.limit] = over
    return " ".join(
        f"{over.told[0].upper()}{over.told[1:]}: {_LIMIT_ADVICE.get(limit, 'update p2pflop')}."
        for limit, over in sorted(found.items())
    )


def _over(sheet: OpenSheet, ask: Ask, need: Need, now_ns: int) -> Over | None:
    return exceeded(sheet.limits_of(ask), need.figures(now_ns))


_Judge = Callable[[OpenSheet, Ask, int], MissReason | None]
"""Why an ask of a total does not do, or None if it does. The first reason that holds is given."""


def _judge(need: Need, policy: Policy, now_ns: int, attested: Accounts) -> _Judge:
    """The judge of one ranking: it is asked ten thousand times, so all that can be is looked up
    here."""
    class_ids, memory_bytes, own_node = need.class_ids, need.memory_bytes, need.own_node
    max_nusd = min(need.max_nusd, MAX_NUSD)
    is_late = need.deadline_ns <= now_ns
    is_choosy = policy != Policy(experience=policy.experience)
    barred = _barring(policy, attested)
    slow = _too_slow(need, policy, now_ns)
    figures = need.figures(now_ns)

    def judge(sheet: OpenSheet, ask: Ask, total: int) -> MissReason | None:
        if ask.class_id not in class_ids:
            return MissReason.CLASS
        if ask.memory_bytes < memory_bytes:
            return MissReason.MEMORY
        sealed = sheet.sealed
        if ask.valid_until_ns <= now_ns or sealed.record.expires_ns <= now_ns:
            return MissReason.EXPIRED
        if is_late:
            return MissReason.DEADLINE
        if own_node and sealed.signer == own_node:
            return MissReason.OWN_NODE
        if is_choosy and (reason := barred(sheet.account, ask.price_nusd)) is not None:
            return reason
        if sheet.limits and exceeded(sheet.limits_of(ask), figures) is not None:
            return MissReason.LIMIT
        if total > max_nusd:
            return MissReason.BUDGET
        return MissReason.SLOW if slow and (sheet.account, ask.class_id) in slow else None

    return judge


def _barring(policy: Policy, attested: Accounts) -> Callable[[bytes, int], MissReason | None]:
    """Why the policy does not allow an account or a price, or None if it does."""
    excluded, only = frozenset(policy.excluded), frozenset(policy.only)
    attested_only, max_price_nusd = policy.attested_only, policy.max_price_nusd

    def barred(account: bytes, price_nusd: int) -> MissReason | None:
        if account in excluded or (only and account not in only):
            return MissReason.POLICY
        if attested_only and account not in attested:
            return MissReason.ATTESTATION
        if max_price_nusd and price_nusd > max_price_nusd:
            return MissReason.PRICE
        return None

    return barred


def _too_slow(need: Need, policy: Policy, now_ns: int) -> frozenset[tuple[bytes, bytes]]:
    """The accounts, each with a class, that the buyer's own experience, at its worst, has too slow
    for the deadline."""
    left_ns = need.deadline_ns - now_ns
    return frozenset(
        (entry.account, entry.class_id)
        for entry in policy.experience
        if need.flop * NS_PER_S > entry.flop_per_s * left_ns
    )
