"""What is bounded in the market's records and memories, at each limit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from msgspec.structs import replace

from p2pflop.errors import ProtocolError
from p2pflop.ids import content_hash
from p2pflop.market import desk as desk_module
from p2pflop.market.evidence import (
    MAX_ATTEMPTS,
    MAX_LOOKS,
    MAX_RECORD_BYTES,
    Attempt,
    Evidence,
    Look,
)
from p2pflop.market.fills import check_costs
from p2pflop.market.ledger import MAX_POSTINGS, Entry, Kind, Posting
from p2pflop.market.mandate import MAX_CLASSES, SALT_BYTES
from p2pflop.market.payments import MAX_TEXT_CHARS, is_plain
from p2pflop.market.ranking import MAX_EXPERIENCE, MAX_POLICY_ACCOUNTS, Policy
from p2pflop.market.ranking import Experience as Audited
from p2pflop.market.rates import remember
from p2pflop.market.records import MAX_COST_LINES, ZERO_HASH, Rejected
from p2pflop.market.samples import MANDATE, NOW_NS, ask, bid, deals, party
from p2pflop.node import experience as experience_module
from p2pflop.node import lapses as lapses_module
from p2pflop.node.experience import MAX_PAUSE_NS, Experience
from p2pflop.node.lapses import Lapses
from p2pflop.wire import Record, decode, encode

KEYS = [content_hash(b"account %d" % number) for number in range(300)]
[DEAL] = deals(party(1).sheet(ask()))


def looks(count: int = 1, **fields: Any) -> Evidence:
    look = Look(0, False, MANDATE, True, (), (), ())
    return Evidence(2, "main", (replace(look, **fields),) * count)


def entry(postings: int) -> Entry:
    each = Posting(ZERO_HASH, Kind.CASH, 0)
    return Entry(1, ZERO_HASH, 0, "", ZERO_HASH, 0, (each,) * postings, ZERO_HASH)


def attempts(count: int, bid_bytes: int = 0) -> tuple[Attempt, ...]:
    return (Attempt(bytes(bid_bytes), b"", b"", ""),) * count


@pytest.mark.parametrize(
    ("most", "over"),
    [
        (
            Policy(excluded=tuple(sorted(KEYS[:MAX_POLICY_ACCOUNTS]))),
            Policy(excluded=(KEYS[0],) * (MAX_POLICY_ACCOUNTS + 1)),
        ),
        (
            Policy(experience=(Audited(KEYS[0], KEYS[1], 1),) * MAX_EXPERIENCE),
            Policy(experience=(Audited(KEYS[0], KEYS[1], 1),) * (MAX_EXPERIENCE + 1)),
        ),
        (looks(MAX_LOOKS), looks(MAX_LOOKS + 1)),
        (
            replace(MANDATE, class_ids=tuple(KEYS[:MAX_CLASSES])),
            replace(MANDATE, class_ids=tuple(KEYS[: MAX_CLASSES + 1])),
        ),
        (replace(MANDATE, salt=b"s" * SALT_BYTES), replace(MANDATE, salt=b"s" * (SALT_BYTES + 1))),
        (looks(attempts=attempts(MAX_ATTEMPTS)), looks(attempts=attempts(MAX_ATTEMPTS + 1))),
        (
            looks(attempts=attempts(1, MAX_RECORD_BYTES)),
            looks(attempts=attempts(1, MAX_RECORD_BYTES + 1)),
        ),
        (entry(MAX_POSTINGS), entry(MAX_POSTINGS + 1)),
    ],
    ids=["excluded", "experience", "looks", "classes", "salt", "attempts", "envelope", "postings"],
)
def test_records_are_read_up_to_their_limits(most: Record, over: Record) -> None:
    assert decode(type(most), encode(most)) == most
    with pytest.raises(ProtocolError):
        decode(type(over), encode(over))


def test_a_job_has_so_many_cost_lines() -> None:
    bought = bid(party(0), DEAL).record
    line = bought.costs[0]
    most = replace(bought, costs=(line,) * MAX_COST_LINES)
    assert check_costs(most, bought.meter_id, most.costs) is None
    refused = check_costs(bought, bought.meter_id, (line,) * (MAX_COST_LINES + 1))
    assert isinstance(refused, Rejected)
    assert f"over {MAX_COST_LINES}" in refused.reason


def test_a_text_about_a_payment_is_short() -> None:
    assert is_plain("x" * MAX_TEXT_CHARS)
    assert not is_plain("x" * (MAX_TEXT_CHARS + 1))


def test_of_what_is_remembered_the_oldest_goes() -> None:
    kept: OrderedDict[int, None] = OrderedDict()
    for number in range(5):
        remember(kept, number, None, 3)
    assert list(kept) == [2, 3, 4]


def test_so_many_that_failed_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experience_module, "MAX_FAILED", 3)
    made = Experience(b"own")
    for key in KEYS[:5]:
        made.note_failure(key, NOW_NS)
    assert set(made.avoided(NOW_NS)) == set(KEYS[2:5])
    for key in KEYS[:5]:
        made.note_excused(key, NOW_NS)
    assert len(made._excused) == 3


def test_a_pause_ends_however_often_an_account_failed() -> None:
    made = Experience(b"own")
    for _ in range(100):
        made.note_failure(KEYS[0], NOW_NS)
    [avoided] = made.pauses(NOW_NS)
    assert avoided.until_ns == NOW_NS + MAX_PAUSE_NS
    assert made.pauses(NOW_NS + MAX_PAUSE_NS) == ()


def test_so_many_that_let_fills_lapse_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapses_module, "MAX_LAPSED", 3)
    made = Lapses()
    for key in KEYS[:5]:
        made.note(key, None, NOW_NS)
    assert [bool(made.objection(key, None, NOW_NS)) for key in KEYS[:5]] == [False] * 2 + [True] * 3


def test_a_desk_keeps_so_many_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_KEPT_RECORDS", 3)
    records = desk_module._Records("main")
    made = [bid(party(number), DEAL) for number in range(5)]
    for each in made:
        records.keep(each)
    assert list(records._kept) == [each.wire for each in made[2:]]
