"""What is free, and for whom: each objection at its limit, and what each end of a sale frees."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from p2pflop.ids import content_hash
from p2pflop.job.file import CheckedJob, decode_file, open_job
from p2pflop.job.meter import METER_ID
from p2pflop.market.fills import OpenBid
from p2pflop.market.ledger import Ledger
from p2pflop.market.records import ZERO_HASH, Bid, Receipt
from p2pflop.market.samples import NOW_NS, TERMS, ask, bid, deals, party
from p2pflop.node.allocator import (
    MAX_LEASE_NS,
    MAX_OPEN_SALES,
    MAX_OPEN_SALES_PER_ACCOUNT,
    Allocator,
)
from p2pflop.node.config import Settings
from p2pflop.node.execute import memory_bytes
from p2pflop.node.journal import UNPAID_FOR_NS, Unpaid
from p2pflop.node.lapses import (
    FIRST_LAPSE_NS,
    MAX_LAPSE_NS,
    STRANGERS_BURST,
    STRANGERS_PER_S,
    SUBNET_BURST,
    SUBNET_PER_S,
)
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.memory_market import sample_file
from p2pflop.node.memory_workers import MemoryWorkerPool
from p2pflop.node.orders import MAX_CHECKPOINTS, cost_lines, moved_bytes
from p2pflop.units import NS_PER_S, format_usd, parse_usd
from p2pflop.wire import Sealed

OWN = party(0)
[DEAL] = deals(OWN.sheet(ask()))
SAMPLE = bid(party(1), DEAL)
QUOTE = SAMPLE.record.quote_nusd
MEMORY = TERMS.memory_bytes


@dataclass
class Taken:
    """A sale, as far as it takes room."""

    bid: Sealed[Bid]
    account: bytes
    signed_nusd: int = 0

    @property
    def quote_nusd(self) -> int:
        return self.bid.record.quote_nusd


def open_bid(number: int, account: bytes = b"", **terms: Any) -> OpenBid:
    """The sample bid under an id of its own."""
    record = msgspec.structs.replace(
        SAMPLE.record, terms=msgspec.structs.replace(TERMS, **terms) if terms else TERMS
    )
    sealed = replace(SAMPLE, record=record, id=content_hash(b"bid %d" % number))
    return OpenBid(sealed, account or content_hash(b"account %d" % number), DEAL.ask)


def taken(number: int, account: bytes = b"", signed_nusd: int = 0) -> Taken:
    opened = open_bid(number, account)
    return Taken(opened.sealed, opened.account, signed_nusd)


def unpaid(amount_nusd: int, account: bytes = b"somebody") -> Unpaid:
    return Unpaid(content_hash(account), NOW_NS, amount_nusd)


def book(accounts: dict[bytes, tuple[int, int]]) -> Ledger:
    """A ledger in which each account was delivered so much and has paid so much."""
    ledger = Ledger()
    for name, (delivered_nusd, paid_nusd) in accounts.items():
        account = content_hash(name)
        receipt = Receipt(1, account, 1, 0, ZERO_HASH, 1, ZERO_HASH, ZERO_HASH, delivered_nusd)
        ledger.book_earned(receipt, account, NOW_NS)
        if paid_nusd:
            ledger.book_received(account, account, paid_nusd, NOW_NS)
    return ledger


def allocator(
    ledger: Ledger | None = None, level: int = 3, disk_bytes: int = 10**18, **settings: Any
) -> Allocator:
    """With room for everything that ``settings`` do not limit."""
    roomy = {"slots": 10**6, "memory_bytes": 10**6 * MEMORY, "credit_nusd": 10**18}
    return Allocator(
        OWN.account.public_key,
        Settings(Path("home"), **{**roomy, **settings}),
        MemoryWorkerPool(level=level),
        cast(LedgerBook, ledger or Ledger()),
        disk_bytes=disk_bytes,
    )


def test_disk_is_given_for_all_that_open_sales_may_move() -> None:
    made = allocator(disk_bytes=3 * TERMS.moved_bytes)
    first, second = taken(1), taken(2)
    made.take(first)
    made.take(second)
    assert made.objection(open_bid(3), NOW_NS) == ""
    made.take(taken(3))
    assert made.objection(open_bid(4), NOW_NS) == "busy: too little disk is free"
    assert made.objection(open_bid(4, OWN.account.public_key), NOW_NS) == "", "the user's own"
    made.free(first)
    assert made.objection(open_bid(4), NOW_NS) != "", "its result is still to be fetched"
    made.close(first)
    assert made.objection(open_bid(4), NOW_NS) == ""


def test_who_lets_fills_lapse_waits_longer_each_time() -> None:
    made, now_ns = allocator(), NOW_NS
    for lapses in range(12):
        assert made.objection(open_bid(1), now_ns) == ""
        made.note_lapse(taken(1), now_ns)
        wait_ns = min(FIRST_LAPSE_NS << lapses, MAX_LAPSE_NS)
        reason = made.objection(open_bid(1), now_ns + wait_ns - 1)
        assert reason == "busy: your last fill came to nothing"
        assert made.objection(open_bid(2), now_ns) == "", "others do not"
        now_ns += wait_ns
    made.note_lapse(taken(3, OWN.account.public_key), now_ns)
    assert made.objection(open_bid(3, OWN.account.public_key), now_ns) == ""


def test_a_settled_job_forgives_fills_that_lapsed() -> None:
    """Whoever cancels much and buys much is no squatter."""
    made, account = allocator(), content_hash(b"account 1")
    for _ in range(12):
        made.note_lapse(taken(1), NOW_NS)
    made.note_settled(account)
    assert made.objection(open_bid(1), NOW_NS) == ""
    made.note_lapse(taken(1), NOW_NS)
    assert made.objection(open_bid(1), NOW_NS + FIRST_LAPSE_NS) == ""


def lapse(made: Allocator, number: int, now_ns: int) -> None:
    """A stranger has a fill, and lets it lapse."""
    claim = taken(number)
    made.take(claim)
    made.note_lapse(claim, now_ns)
    made.close(claim)


def test_free_identities_of_one_subnet_let_so_many_fills_lapse() -> None:
    """Hundreds of strangers with one connection: others, and who has paid here, find a slot."""
    payer = content_hash(b"payer")
    made, subnet = allocator(book({b"payer": (10, 10)})), "192.0.2.0/24"
    made.subnet_of = lambda _: subnet
    for number in range(SUBNET_BURST):
        assert made.objection(open_bid(number), NOW_NS) == ""
        lapse(made, number, NOW_NS)
    refusal = "busy: too many fills of strangers in your network came to nothing"
    assert made.objection(open_bid(100), NOW_NS) == refusal
    assert made.objection(open_bid(100, payer), NOW_NS) == ""
    assert made.objection(open_bid(100, OWN.account.public_key), NOW_NS) == ""
    later_ns = NOW_NS + round(NS_PER_S / SUBNET_PER_S) + 1
    assert made.objection(open_bid(100), later_ns - NS_PER_S) == refusal
    assert made.objection(open_bid(100), later_ns) == ""
    subnet = "198.51.100.0/24"
    assert made.objection(open_bid(100), NOW_NS) == "", "elsewhere nobody did it"


def test_a_fill_counts_for_where_it_was_taken_from() -> None:
    """Whoever has gone when it lapses is not counted among those whose subnet is unknown."""
    made, subnet = allocator(), "192.0.2.0/24"
    made.subnet_of = lambda _: subnet
    claims = [taken(number) for number in range(SUBNET_BURST)]
    for claim in claims:
        made.take(claim)
    subnet = ""
    for claim in claims:
        made.note_lapse(claim, NOW_NS)
        made.close(claim)
    assert made.objection(open_bid(100), NOW_NS) == ""
    subnet = "192.0.2.0/24"
    assert made.objection(open_bid(100), NOW_NS) != ""


def test_free_identities_of_all_subnets_let_so_many_fills_lapse() -> None:
    """A slot that is held for two seconds each time is free for who has paid half of the time."""
    payer = content_hash(b"payer")
    made = allocator(book({b"payer": (10, 10)}))
    subnets = iter(range(10**6))
    made.subnet_of = lambda _: str(next(subnets))
    now_ns, held_ns = NOW_NS, 0
    for number in range(2_000):
        if made.objection(open_bid(number), now_ns):
            assert made.objection(open_bid(number, payer), now_ns) == ""
            now_ns += NS_PER_S // 10
            continue
        held_ns += 2 * NS_PER_S
        now_ns += 2 * NS_PER_S
        lapse(made, number, now_ns)
    passed_ns = now_ns - NOW_NS
    most = STRANGERS_BURST + 1 + STRANGERS_PER_S * passed_ns / NS_PER_S
    assert held_ns <= most * 2 * NS_PER_S < passed_ns * 0.9


def test_a_slot_is_given_once() -> None:
    made = allocator(slots=2)
    made.take(taken(1))
    assert made.objection(open_bid(3), NOW_NS) == ""
    made.take(taken(2))
    assert made.objection(open_bid(3), NOW_NS) == "busy: every slot is taken"
    assert made.busy == 2


def test_memory_is_given_up_to_its_last_byte() -> None:
    made = allocator(memory_bytes=2 * MEMORY)
    made.take(taken(1))
    assert made.objection(open_bid(2), NOW_NS) == ""
    reason = made.objection(open_bid(2, memory_bytes=MEMORY + 1), NOW_NS)
    assert reason == "busy: too little memory is free"


def test_the_credit_counts_what_is_owed_running_and_unpaid() -> None:
    made = allocator(book({b"debtor": (5, 0)}), credit_nusd=5 + 7 + (QUOTE - 3) + QUOTE)
    made.take(taken(1, signed_nusd=3))
    assert made.note_unpaid(unpaid(7))
    assert made.objection(open_bid(2), NOW_NS) == ""
    made.note_unpaid(unpaid(1))
    assert made.objection(open_bid(2), NOW_NS).startswith("over the credit of $")


def test_the_own_account_needs_no_credit_and_uses_none() -> None:
    own = OWN.account.public_key
    made = allocator(credit_nusd=QUOTE)
    made.take(taken(1, own))
    assert not made.note_unpaid(Unpaid(own, NOW_NS, 10**18))
    assert made.objection(open_bid(2), NOW_NS) == ""
    made.take(taken(2))
    assert made.objection(open_bid(3), NOW_NS) != ""
    assert made.objection(open_bid(3, own), NOW_NS) == ""


def test_what_was_not_paid_is_forgotten_after_a_day() -> None:
    made = allocator(credit_nusd=QUOTE)
    made.note_unpaid(unpaid(1))
    assert made.objection(open_bid(1), NOW_NS + UNPAID_FOR_NS) != ""
    assert made.objection(open_bid(1), NOW_NS + UNPAID_FOR_NS + 1) == ""


def test_strangers_debts_do_not_end_sales_to_a_buyer_that_has_paid() -> None:
    ledger = book({b"stranger": (QUOTE, 0), b"payer": (QUOTE, QUOTE)})
    made, payer = allocator(ledger, credit_nusd=QUOTE), content_hash(b"payer")
    assert made.objection(open_bid(1), NOW_NS).startswith("over the credit of $")
    assert made.objection(open_bid(1, payer), NOW_NS) == ""
    made.take(taken(1, payer))
    assert made.objection(open_bid(2, payer), NOW_NS).startswith("over your credit of $")


def test_beyond_its_own_limit_a_payer_may_use_the_pool_too() -> None:
    payer = content_hash(b"payer")
    made = allocator(book({b"payer": (QUOTE, QUOTE)}), credit_nusd=QUOTE)
    made.take(taken(1, payer))
    assert made.objection(open_bid(2, payer), NOW_NS) == ""
    made.take(taken(2, payer))
    assert made.objection(open_bid(3, payer), NOW_NS) != ""
    assert made.objection(open_bid(3), NOW_NS) != "", "the pool is one"


def test_many_accounts_that_paid_next_to_nothing_have_next_to_nothing() -> None:
    accounts = {b"account %d" % number: (1, 1) for number in range(50)}
    made = allocator(book(accounts), credit_nusd=2 * QUOTE)
    filled = 0
    for number in range(50):
        account = content_hash(b"account %d" % number)
        if not made.objection(open_bid(number, account), NOW_NS):
            made.take(taken(number, account))
            filled += 1
    assert filled == 2


@pytest.mark.parametrize("others_nusd", [0, 5, QUOTE // 2, QUOTE])
@pytest.mark.parametrize("pool_nusd", [0, QUOTE // 2])
def test_the_refusal_tells_what_to_pay_and_that_is_just_enough(
    pool_nusd: int, others_nusd: int
) -> None:
    """Exactly: one nano-dollar less is too little, whatever the pool has left."""
    for ahead_nusd in (0, 1):
        ledger = book({b"buyer": (10 * QUOTE, 3 * QUOTE), b"others": (others_nusd, 0)})
        buyer = content_hash(b"buyer")
        made = allocator(ledger, credit_nusd=pool_nusd)
        reason = made.objection(open_bid(1, buyer), NOW_NS)
        told = re.search(r"pay \$([0-9.,]+) to go on", reason)
        assert told is not None, reason
        amount_nusd = parse_usd(told.group(1).replace(",", ""))
        ledger.book_received(ZERO_HASH, buyer, amount_nusd - ahead_nusd, NOW_NS)
        assert bool(made.objection(open_bid(1, buyer), NOW_NS)) == bool(ahead_nusd)


def test_a_prepayment_is_money_already_there() -> None:
    made = allocator(credit_nusd=0)
    buyer = content_hash(b"buyer")
    reason = made.objection(open_bid(1, buyer), NOW_NS)
    assert f"pay {format_usd(-(-QUOTE // 2))} to have a limit of your own" in reason
    made = allocator(book({b"buyer": (0, QUOTE)}), credit_nusd=0)
    made.take(taken(1, buyer))
    assert made.objection(open_bid(2, buyer), NOW_NS) == "", "what is there, and as much on credit"
    made.take(taken(2, buyer))
    assert made.objection(open_bid(3, buyer), NOW_NS) != ""


def test_nothing_unpaid_is_not_noted() -> None:
    made = allocator(credit_nusd=QUOTE)
    assert not made.note_unpaid(unpaid(0))
    assert not made.note_unpaid(unpaid(-5))
    assert made.objection(open_bid(1), NOW_NS) == ""


def test_a_deadline_may_be_thirty_days_away() -> None:
    made = allocator()
    far_ns = NOW_NS + MAX_LEASE_NS
    assert made.objection(open_bid(1, deadline_ns=far_ns), NOW_NS) == ""
    reason = made.objection(open_bid(1, deadline_ns=far_ns + 1), NOW_NS)
    assert reason == "the deadline is over 30 days away"


def test_one_account_may_have_so_many_open_sales() -> None:
    made, one = allocator(), content_hash(b"one")
    for number in range(MAX_OPEN_SALES_PER_ACCOUNT):
        assert made.objection(open_bid(number, one), NOW_NS) == ""
        made.take(taken(number, one), capacity=False)
    reason = made.objection(open_bid(10**6, one), NOW_NS)
    assert reason == "busy: too many jobs wait for a countersignature"
    assert made.objection(open_bid(10**6), NOW_NS) == "", "others are not held up"


def test_all_accounts_together_may_have_so_many_open_sales() -> None:
    made = allocator()
    for number in range(MAX_OPEN_SALES):
        made.take(taken(number), capacity=False)
        if number == MAX_OPEN_SALES - 2:
            assert made.objection(open_bid(10**6), NOW_NS) == ""
    reason = made.objection(open_bid(10**6), NOW_NS)
    assert reason == "busy: too many jobs wait for a countersignature"


def test_a_weak_sandbox_runs_only_the_own_accounts_jobs() -> None:
    made = allocator(level=1)
    assert made.objection(open_bid(1), NOW_NS) == "the sandbox here is not safe enough"
    assert made.objection(open_bid(1, OWN.account.public_key), NOW_NS) == ""
    assert allocator(level=2).objection(open_bid(1), NOW_NS) == ""


def test_broken_workers_run_nobodys_jobs() -> None:
    made = allocator()
    assert isinstance(made.workers, MemoryWorkerPool)
    made.workers.broken = True
    reason = made.objection(open_bid(1, OWN.account.public_key), NOW_NS)
    assert reason == "the provider's workers are broken"


def test_a_window_is_never_wider_than_the_credit() -> None:
    payer, unknown = content_hash(b"payer"), content_hash(b"unknown")
    made = allocator(book({b"payer": (0, 30)}), credit_nusd=10, window_nusd=25)
    assert made.window_nusd(unknown) == 10
    assert made.window_nusd(payer) == 25
    assert allocator(book({b"payer": (0, 30)}), credit_nusd=0).window_nusd(payer) == 30
    assert made.window_nusd(made.own_account) is None


def test_capacity_ends_with_the_worker_and_credit_with_the_sale() -> None:
    made, sale = allocator(slots=1, credit_nusd=QUOTE), taken(1)
    made.take(sale)
    made.free(sale)
    assert made.busy == 0
    assert "over the credit" in made.objection(open_bid(2), NOW_NS)
    made.close(sale)
    assert made.objection(open_bid(2), NOW_NS) == ""


def test_closing_a_sale_frees_its_capacity_too() -> None:
    made, sale = allocator(slots=1), taken(1)
    made.take(sale)
    made.close(sale)
    made.close(sale)
    assert made.busy == 0
    assert made.held() == []


def _job(steps: int = 20) -> tuple[CheckedJob, Bid]:
    """A job and the bid that fits it exactly."""
    checked = open_job(decode_file(sample_file(steps)).body)
    assert isinstance(checked, CheckedJob)
    terms = msgspec.structs.replace(
        TERMS,
        memory_bytes=memory_bytes(checked),
        moved_bytes=moved_bytes(checked, 5),
        checkpoint_steps=5,
    )
    record = msgspec.structs.replace(
        SAMPLE.record, meter_id=METER_ID, costs=cost_lines(checked), job=checked.job, terms=terms
    )
    return checked, record


def test_a_bid_that_fits_its_job_meets_no_objection() -> None:
    checked, record = _job()
    assert allocator().objection_to_job(record, checked) == ""


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"meter_id": "other"}, "meter 'other' is not this node's"),
        ({"costs": ()}, "the cost lines are not what the meter says"),
        ({"job": SAMPLE.record.job}, "the bid is for another job than the one sent"),
    ],
)
def test_a_bid_for_something_else_is_not_taken(changed: dict[str, Any], reason: str) -> None:
    checked, record = _job()
    wrong = msgspec.structs.replace(record, **changed)
    assert allocator().objection_to_job(wrong, checked).startswith(reason)


def test_terms_below_what_the_job_needs_are_not_taken() -> None:
    checked, record = _job()
    terms = record.terms
    for changed, reason in (
        ({"memory_bytes": terms.memory_bytes - 1}, f"needs {terms.memory_bytes} bytes of memory"),
        ({"moved_bytes": terms.moved_bytes - 1}, f"the job moves {terms.moved_bytes} bytes"),
    ):
        less = msgspec.structs.replace(record, terms=msgspec.structs.replace(terms, **changed))
        assert reason in allocator().objection_to_job(less, checked)


def test_a_job_may_have_a_thousand_checkpoints() -> None:
    for steps, reason in (
        (MAX_CHECKPOINTS + 1, ""),
        (MAX_CHECKPOINTS + 2, f"over {MAX_CHECKPOINTS} checkpoints"),
    ):
        checked, record = _job(steps)
        terms = msgspec.structs.replace(
            record.terms, checkpoint_steps=1, moved_bytes=moved_bytes(checked, 1)
        )
        often = msgspec.structs.replace(record, terms=terms)
        assert allocator().objection_to_job(often, checked) == reason
