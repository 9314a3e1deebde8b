"""Evidence that was doctored as no node makes it: see ``sim/test_evidence_memory.py``, too."""

from __future__ import annotations

from msgspec.structs import replace

from p2pflop.ids import content_hash
from p2pflop.market.evidence import Attempt, Evidence, Look, Verdict, replay
from p2pflop.market.limits import MAX_LIMIT, Limit, lease_seconds
from p2pflop.market.records import MAX_SHEET_BYTES
from p2pflop.market.samples import (
    ASK_LIFE_NS,
    MANDATE,
    NOW_NS,
    TERMS,
    ask,
    bid,
    book,
    deals,
    look,
    party,
)
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.node.evidence import LOOK_ROW, LookRow, evidence_of
from p2pflop.node.journal import Row
from p2pflop.units import NS_PER_S
from p2pflop.wire import decode, encode


def verdict(seen: Look) -> Verdict:
    [told] = replay(Evidence(2, "main", (seen,)))
    return told.bids[0].verdict


def test_no_later_clock_hides_a_better_ask() -> None:
    """The book that a bid commits to has asks that expire, and a replay must not say that they had.

    The look's time is the buyer's own word, the bid's is signed, and checked by who filled it.
    """
    cheap = party(1).sheet(ask(price_nusd=10**6, valid_until_ns=NOW_NS + 300 * NS_PER_S))
    dear = party(2).sheet(ask(price_nusd=2 * 10**6, valid_until_ns=NOW_NS + ASK_LIFE_NS))
    _, second = deals(cheap, dear)
    view = book(cheap, dear).view(NOW_NS)
    worse = bid(party(0), second, book_digest=view.digest)
    seen = look(view, worse)
    assert verdict(seen) is Verdict.WORSE
    assert verdict(replace(seen, at_ns=NOW_NS + CLOCK_TOLERANCE_NS)) is Verdict.WORSE
    assert verdict(replace(seen, at_ns=NOW_NS + 301 * NS_PER_S)) is Verdict.OTHER_TIME
    assert verdict(replace(seen, at_ns=NOW_NS - CLOCK_TOLERANCE_NS)) is Verdict.WORSE
    assert verdict(replace(seen, at_ns=NOW_NS - ASK_LIFE_NS)) is Verdict.OTHER_TIME


def test_no_earlier_clock_makes_the_lease_too_long_for_a_better_ask() -> None:
    """Nor does a figure of the buyer's own that the bid says already; a bid that follows from the
    answer to another may come much later than the look."""
    lease_s = lease_seconds(NOW_NS, TERMS.deadline_ns)
    limited = party(1).sheet(ask(price_nusd=10**6), limits={1: ((Limit.LEASE, lease_s),)})
    dear = party(2).sheet(ask(price_nusd=2 * 10**6))
    [first, second] = deals(limited, dear)
    view = book(limited, dear).view(NOW_NS)
    worse = bid(party(0), second, book_digest=view.digest)
    seen = look(view, worse)
    assert verdict(seen) is Verdict.WORSE
    assert verdict(replace(seen, at_ns=NOW_NS - 31 * NS_PER_S)) is Verdict.OTHER_TIME
    for limit in (Limit.LEASE, Limit.FLOP, Limit.MOVED):
        assert verdict(replace(seen, known=((limit, MAX_LIMIT),))) is Verdict.WORSE
    asked = bid(party(0), first, book_digest=view.digest)
    later = bid(party(0), second, NOW_NS + 600 * NS_PER_S, book_digest=view.digest)
    attempts = tuple(Attempt(each.wire, b"", b"", "") for each in (asked, later))
    [told] = replay(Evidence(2, "main", (replace(seen, attempts=attempts),)))
    assert [each.verdict for each in told.bids] == [Verdict.BEST, Verdict.NEXT]


def test_the_nodes_of_a_job_are_the_buyers_own_word() -> None:
    limited = party(1).sheet(ask(price_nusd=10**6), limits={1: ((Limit.NODES, 10),)})
    dear = party(2).sheet(ask(price_nusd=2 * 10**6))
    [_, second] = deals(limited, dear)
    view = book(limited, dear).view(NOW_NS)
    seen = look(view, bid(party(0), second, book_digest=view.digest))
    assert verdict(replace(seen, known=((Limit.NODES, 11),))) is Verdict.BEST
    assert verdict(replace(seen, known=((Limit.NODES, 10),))) is Verdict.WORSE


def test_evidence_of_a_book_full_of_large_sheets_can_be_read() -> None:
    """Sheets are as large as their signers like, and a run that waits has seen many of them."""
    ids = b"".join(content_hash(bytes([number])) for number in range(256))
    looks = [LookRow(at, at % 2 == 1, MANDATE, True, ids) for at in range(64)]
    rows = [Row(look.at_ns, look.at_ns, LOOK_ROW, encode(look)) for look in looks]
    large = bytes(MAX_SHEET_BYTES)
    made = evidence_of(rows, lambda _: large, "main")
    times = [look.at_ns for look in made.looks]
    assert times == list(range(times[0], 64))
    assert 20 <= len(times) < 32
    assert not made.looks[0].continues
    data = encode(made)
    assert len(data) <= Evidence.MAX_BYTES
    assert len(decode(Evidence, data).looks) == len(times)
    assert len(evidence_of(rows, lambda _: large[:1000], "main").looks) == 64
    assert evidence_of([], lambda _: None, "main").looks == ()
