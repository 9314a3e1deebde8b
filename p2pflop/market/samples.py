"""A small market made from numbers: parties, sheets, one purchasable job. For tests and benches."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Final

from p2pflop.ids import content_hash
from p2pflop.job.spec import Job, NoSource, Phase, Work, WorkParam, work_id
from p2pflop.keys import PrivateKey
from p2pflop.market.book import Book
from p2pflop.market.desk import BuyerDesk, ProviderDesk
from p2pflop.market.evidence import Attempt, Look
from p2pflop.market.fills import make_bid
from p2pflop.market.mandate import SALT_BYTES, Mandate
from p2pflop.market.ranking import Deal, Need, Policy, rank, sum_costs
from p2pflop.market.records import Ask, Bid, CostLine, Terms
from p2pflop.market.sessions import make_session_bid
from p2pflop.market.sheets import OpenSheet, make_ask, make_delegation, make_sheet
from p2pflop.market.views import BookView
from p2pflop.units import NS_PER_S
from p2pflop.wire import DEFAULT_NETWORK, Sealed

NOW_NS: Final = 1_800_000_000 * NS_PER_S
DEADLINE_NS: Final = NOW_NS + 900 * NS_PER_S
ASK_LIFE_NS: Final = 1800 * NS_PER_S
CLASS_ID: Final = content_hash(b"class")
TRAIN: Final = content_hash(b"train graph")
TEST: Final = content_hash(b"test graph")
ROOT: Final = content_hash(b"state root")
RESULT: Final = content_hash(b"result")
SALT: Final = content_hash(b"salt")
NONCE: Final = bytes(range(16))
METER_ID: Final = "sample"
STEPS: Final = 100
TEST_EVERY: Final = 10

WORK: Final = Work(
    version=1,
    phases=(Phase(TRAIN, 1, 0, (1,)), Phase(TEST, TEST_EVERY, 0, (0,))),
    params=(WorkParam(11, (4,), 3, NoSource()),),
    seed=7,
)
JOB: Final = Job(work_id(WORK), 0, STEPS)
COSTS: Final = (
    CostLine(TRAIN, 3 * 10**12, 10**9, STEPS),
    CostLine(TEST, 5 * 10**12, 10**9, STEPS // TEST_EVERY),
)
TERMS: Final = Terms(
    memory_bytes=2**30, moved_bytes=10**6, checkpoint_steps=10, deadline_ns=DEADLINE_NS
)
MANDATE: Final = Mandate(Policy(), 10**9, (CLASS_ID,), bytes(SALT_BYTES))


@dataclass(frozen=True)
class Party:
    """An account with one node."""

    account: PrivateKey
    node: PrivateKey
    delegation: bytes

    def sheet(self, *asks: Ask, now_ns: int = NOW_NS, number: int = 1, **rest: Any) -> OpenSheet:
        """Its sheet with these asks."""
        return make_sheet(
            self.node, number=number, now_ns=now_ns, delegation=self.delegation, asks=asks, **rest
        )


def party(number: int, account: int | None = None, network: str = DEFAULT_NETWORK) -> Party:
    """Node ``number`` of account ``account``, by default one of its own."""
    owner = PrivateKey(content_hash(b"account %d" % (number if account is None else account)))
    node = PrivateKey(content_hash(b"node %d" % number))
    until_ns = NOW_NS + 10**6 * NS_PER_S
    delegation = make_delegation(
        owner, node.public_key, NOW_NS - 10**6 * NS_PER_S, until_ns, network
    )
    return Party(owner, node, delegation)


def ask(number: int = 1, price_nusd: int = 10**6, **rest: Any) -> Ask:
    """An ask that does for the sample job, at a dollar-thousandth per PFLOP."""
    values: dict[str, Any] = {
        "class_id": CLASS_ID,
        "valid_until_ns": NOW_NS + ASK_LIFE_NS,
        "memory_bytes": 2**33,
        "flop_per_s": 10**12,
        **rest,
    }
    return make_ask(number, values.pop("class_id"), price_nusd, **values)


def need(**rest: Any) -> Need:
    """What the sample job needs."""
    flop, touched_bytes = sum_costs(COSTS)
    values: dict[str, Any] = {
        "class_ids": frozenset({CLASS_ID}),
        "flop": flop,
        "touched_bytes": touched_bytes,
        "moved_bytes": TERMS.moved_bytes,
        "memory_bytes": TERMS.memory_bytes,
        "deadline_ns": DEADLINE_NS,
        "max_nusd": 10**9,
        "nonce": NONCE,
        **rest,
    }
    return Need(**values)


def bid(buyer: Party, deal: Deal, now_ns: int = NOW_NS, **rest: Any) -> Sealed[Bid]:
    """``buyer``'s bid for the sample job on ``deal``."""
    values: dict[str, Any] = {
        "job": JOB,
        "meter_id": METER_ID,
        "costs": COSTS,
        "terms": TERMS,
        "nonce": NONCE,
        "now_ns": now_ns,
        "book_digest": ROOT,
        "mandate_digest": MANDATE.digest(),
        "delegation": buyer.delegation,
        **rest,
    }
    return make_bid(buyer.node, deal, **values)


def session_bid(buyer: Party, deal: Deal, **rest: Any) -> Sealed[Bid]:
    """``buyer``'s bid for a lease of a session on ``deal``, for a dollar at most."""
    values: dict[str, Any] = {
        "session_id": ROOT,
        "meter_id": METER_ID,
        "terms": TERMS,
        "quote_nusd": 10**9,
        "nonce": NONCE,
        "now_ns": NOW_NS,
        "book_digest": ROOT,
        "mandate_digest": MANDATE.digest(),
        "delegation": buyer.delegation,
        **rest,
    }
    return make_session_bid(buyer.node, deal, **values)


def deals(*sheets: OpenSheet, now_ns: int = NOW_NS) -> list[Deal]:
    """The deals for the sample job, best first."""
    return [deal for deal in rank(sheets, need(), Policy(), now_ns) if isinstance(deal, Deal)]


def book(*sheets: OpenSheet, now_ns: int = NOW_NS) -> Book:
    """A book that holds these sheets."""
    made = Book(bytes(32))
    for sheet in sheets:
        made.apply(sheet, now_ns)
    return made


def look(view: BookView, made: Sealed[Bid]) -> Look:
    """The evidence of a look at a whole book, and of the one bid that followed from it."""
    return Look(
        at_ns=NOW_NS,
        continues=False,
        mandate=MANDATE,
        whole=True,
        sheets=tuple(sheet.sealed.wire for sheet in view.sheets),
        attested=(),
        attempts=(Attempt(made.wire, b"", b"", ""),),
    )


def buyer_desk(
    buyer: Party, found: list[Deal], known: Container[bytes] = frozenset(), *, tries: bool = False
) -> BuyerDesk:
    """A desk that tries ``found`` in order; the accounts ``known`` have delivered before. If it
    ``tries``, the buyer's own sandbox can run what it buys."""
    accounts = {deal.node: deal.account for deal in found}
    return BuyerDesk(
        buyer.node,
        WORK,
        bid_on=lambda attempt, now_ns: (
            bid(buyer, found[attempt], now_ns) if attempt < len(found) else None
        ),
        account_of=accounts.get,
        own_account=buyer.account.public_key,
        knows=known.__contains__,
        may_try=lambda _: tries,
    )


def provider_desk(provider: Party) -> ProviderDesk:
    """A desk for the sample job."""
    return ProviderDesk(provider.node, WORK, delegation=provider.delegation)
