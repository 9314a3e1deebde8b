"""Own trades that a crash has lost between the settlement and the tape: told again at the start.

The journal has all that a trade says. It is made for the hour of the settlement, so that a tape has
it once: told again, it is the same trade.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from p2pflop.errors import P2PFlopError
from p2pflop.job.lifecycle import Edge
from p2pflop.market.receipts import delivered_flop
from p2pflop.market.records import Bid, Fill, Receipt
from p2pflop.market.tape import HOUR_NS, MAX_TRADES_AN_ACCOUNT, hour_of
from p2pflop.market.tape_relay import GOSSIPED_HOURS
from p2pflop.node.driver import LIFE_ROW
from p2pflop.node.journal import PROVIDER, Journal
from p2pflop.node.sale_rows import SaleRow, first_row
from p2pflop.node.tape import TapeService
from p2pflop.wire import reopen

MAX_RETOLD: Final = GOSSIPED_HOURS * MAX_TRADES_AN_ACCOUNT
"""No tape would take more of one account."""

_log = logging.getLogger(__name__)


def tell_again(journal: Journal, tape: TapeService, network: str, now_ns: int) -> None:
    """Tell the trades of sales that settled in the hours that are gossiped, as far as ``tape`` does
    not have them."""
    since_ns = (hour_of(now_ns) - GOSSIPED_HOURS + 1) * HOUR_NS
    kind = LIFE_ROW + Edge.SETTLE
    for job, at_ns in journal.with_row(PROVIDER, kind, since_ns, MAX_RETOLD):
        try:
            _tell(journal, tape, network, job, at_ns)
        except (P2PFlopError, msgspec.DecodeError) as error:
            _log.error("the trade of sale %s is not told: %s", job[:12], error)


def _tell(journal: Journal, tape: TapeService, network: str, job: str, at_ns: int) -> None:
    rows = journal.rows(job)
    bid = reopen(Bid, first_row(rows, SaleRow.BID), network).record
    fill, *_ = _parts(first_row(rows, LIFE_ROW + Edge.GRANT))
    countersigned, *_ = _parts(first_row(rows, LIFE_ROW + Edge.SETTLE))
    tape.settled(
        fill_id=reopen(Fill, fill, network).id,
        class_id=bid.class_id,
        price_nusd=int.from_bytes(first_row(rows, SaleRow.PRICE), "big"),
        flop=delivered_flop(bid, reopen(Receipt, countersigned, network).record.amount_nusd),
        buyer=first_row(rows, SaleRow.ACCOUNT),
        at_ns=at_ns,
    )


def _parts(body: bytes) -> tuple[bytes, ...]:
    return msgspec.msgpack.decode(body, type=tuple[bytes, ...])
