"""Evidence that was doctored as no node makes it: see ``sim/test_evidence_memory.py``, too."""

from __future__ import annotations

from msgspec.structs import replace

from p2pflop.market.evidence import Evidence, Look, Verdict, replay
from p2pflop.market.samples import ASK_LIFE_NS, NOW_NS, ask, bid, book, deals, look, party
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.units import NS_PER_S


def verdict(seen: Look) -> Verdict:
    [told] = replay(Evidence(1, "main", (seen,)))
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
    assert verdict(replace(seen, at_ns=NOW_NS - ASK_LIFE_NS)) is Verdict.WORSE
