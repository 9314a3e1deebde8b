"""The deals of one run: the book ranked, round after round, and the bids that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from p2pflop.job.buying import BUSY_PREFIX, PASSED_PREFIX
from p2pflop.job.lifecycle import Edge
from p2pflop.job.meter import METER_ID
from p2pflop.market.desk import BuyerDesk
from p2pflop.market.evidence import MAX_LOOKS, Wanted
from p2pflop.market.fills import ASK_EXPIRED, SUPERSEDED, make_bid
from p2pflop.market.ranking import Deal
from p2pflop.market.records import Bid, Reject
from p2pflop.node.driver import LIFE_ROW
from p2pflop.node.evidence import LOOK_ROW, LOOK_ROWS, REJECT_ROW, keep_look
from p2pflop.node.guard import survive
from p2pflop.node.journal import JobRows, Row
from p2pflop.node.orders import Order, Ranking
from p2pflop.node.service import Json
from p2pflop.wire import Sealed, reopen

if TYPE_CHECKING:
    from p2pflop.node.buy import Buyer
    from p2pflop.node.purchase import Purchase

DEAL_ROW: Final = "deal"
CLASS_ROW: Final = "class"
KEY_BYTES: Final = 32
ASKED_A_LOOK: Final = 128
"""Bids on the deals of one look at the book; then it is looked at anew, and goes on with others."""
SILENT_BEFORE_KNOWN: Final = 8
"""So many in a round do not answer, and accounts that have delivered before are asked next."""
FIRST_WORD_S: Final = 2.0
"""So long a stranger has for its answer if there is another to ask, and the next ones half of it
each time, down to ``LEAST_WORD_S``; or as long as it took to reach it, which is a few round trips
where an answer is one."""
LEAST_WORD_S: Final = 0.5
NEVER_AGAIN: Final = -1
"""No deal is as cheap."""
NEW_ROUNDS: Final = frozenset(LIFE_ROW + e for e in (Edge.WAIT, Edge.RESUBMIT, Edge.DOUBT))
"""Rows of a lifecycle after which the book is ranked anew and everybody may be asked again."""


class Bidding:
    """Bids by the number of the attempt, which rises over all rounds of a run."""

    def __init__(self, buyer: Buyer, run_id: str, order: Order, rows: JobRows) -> None:
        self._buyer = buyer
        self._run_id = run_id
        self._order = order
        self._rows = rows
        self._ranking: Ranking | None = None
        self._deals: list[Deal] = []
        self._first_attempt = 0
        self._looks = 0
        self._accounts: dict[bytes, bytes] = {}
        self._tried: set[bytes] = set()
        self._passed: set[bytes] = set()
        self._refused_nusd: dict[bytes, int] = {}
        self._classes = order.classes
        self._is_unfilled = True
        self._refusal = ""
        self._silent = 0
        self._has_asked_known = self._is_among_known = self._has_spared = False

    def desk(self) -> BuyerDesk:
        """The desk of a purchase by these deals."""
        identity = self._buyer.identity
        return BuyerDesk(
            identity.node,
            self._order.checked.work,
            bid_on=self.bid_on,
            account_of=self.account_of,
            own_account=identity.account.public_key,
            knows=self._buyer.ledger_book.has_bought_from,
            may_try=self._buyer.may_try,
            network=identity.network,
        )

    def fix_class(self, class_id: bytes) -> None:
        """Somebody has filled in that class: whoever else runs the job does it in the same."""
        self._is_unfilled = False
        self._buyer.wishes.fill(self._run_id)
        if self._classes != {class_id}:
            self._classes = frozenset({class_id})
            self._rows.add(CLASS_ROW, class_id)
            self._deals = [
                deal
                for deal in self._deals
                if deal.node in self._tried or deal.ask.class_id == class_id
            ]

    async def forget_looks(self) -> None:
        """Before a round: of a run that waits long, keep no more looks than evidence can show.
        Raises StoreError."""
        if self._looks >= MAX_LOOKS:
            self._looks = 0
            run = self._buyer.runs.get(self._run_id)
            await self._buyer.runs.forget_rounds(run, *LOOK_ROWS, REJECT_ROW)

    def rank(self, attempt: int, order: Order) -> Ranking:
        """Begin a round for ``order``, which is the run's or for what is left of it, with the book
        as it is now; its best deal is for ``attempt``."""
        self._order = order
        self._is_unfilled = True
        self._forget_tried()
        self._silent, self._has_asked_known = 0, False
        return self._look(attempt, continues=False)

    def bid_on(self, attempt: int, now_ns: int) -> Sealed[Bid] | None:
        """The bid on the deal to try as number ``attempt``, or None if there is none left."""
        self._give_up(attempt - 1)
        ranking = self._ranking_for(attempt)
        if attempt - self._first_attempt >= len(self._deals):
            return None
        deal = self._deals[attempt - self._first_attempt]
        self._accounts[deal.node] = deal.account
        self._note_tried(deal.node)
        self._rows.add(DEAL_ROW, deal.node + deal.account)
        identity, checked = self._buyer.identity, self._order.checked
        return make_bid(
            identity.node,
            deal,
            job=checked.job,
            root_from=checked.root_from,
            meter_id=METER_ID,
            costs=self._order.costs,
            terms=self._order.terms,
            checkpoint_s=self._order.checkpoint_s,
            nonce=ranking.nonce,
            now_ns=now_ns,
            book_digest=ranking.view.digest,
            mandate_digest=ranking.mandate.digest(),
            delegation=identity.delegation(now_ns),
            network=identity.network,
        )

    def refused(self, bid: Bid, reason: str, wire: bytes) -> None:
        """The provider that was bid to last has said no, by the reject ``wire``.

        If that is because its sheet is another now, the reject brings it: it enters the book as any
        that comes by gossip, the book is looked at again at once, and its provider may be asked
        again, once a round, if it is no dearer now: else a low ask would buy the last word, after
        a look at all others.
        """
        self._refusal = reason
        node = bid.provider
        if reason.startswith(BUSY_PREFIX):
            self._buyer.waiting.note_full(self._accounts[node])
        if reason != SUPERSEDED or node in self._refused_nusd:
            return
        shown = reopen(Reject, wire, self._buyer.identity.network).record.sheet
        if self._buyer.sheets.learn(shown, node, bid.sheet_number):
            self._refused_nusd[node] = bid.quote_nusd
            self._ranking = None

    def wait(self, purchase: Purchase) -> None:
        """Nobody takes the job now: wait, and rest as a wish if the order says so."""
        self._buyer.waiting.enter(self._run_id, purchase)
        if self._order.rests and self._is_unfilled:
            if self._buyer.wishes.rest(self._run_id, self._order, self._classes):
                self._buyer.nursery.start_soon(survive, self._tell_resting)
            self._buyer.wishes.call_if_news(self._run_id)

    async def _tell_resting(self) -> None:
        run, order = self._buyer.runs.get(self._run_id), self._order
        if not run.over:
            told = {"limit_nusd": order.max_nusd, "deadline_ns": order.deadline_ns}
            await self._buyer.runs.emit(run, "resting", **told)

    def end(self) -> None:
        """The run is over: it waits and wishes no more."""
        self._buyer.waiting.leave(self._run_id)
        self._buyer.wishes.withdraw(self._run_id)

    def _give_up(self, attempt: int) -> None:
        """What was bid on as number ``attempt``, if anything, came to nothing."""
        place, refusal, self._refusal = attempt - self._first_attempt, self._refusal, ""
        self._silent += place >= 0 and not refusal
        if self._is_unfilled and 0 <= place < len(self._deals) and self._deals[place].ticket:
            # A slot was not promised, and clocks differ.
            is_kept = refusal == ASK_EXPIRED or refusal.startswith(BUSY_PREFIX)
            self._buyer.wishes.spend(self._deals[place].ticket, kept=is_kept)

    def account_of(self, node: bytes) -> bytes | None:
        """The account of a provider that was bid to, by its node's key."""
        return self._accounts.get(node)

    def patience_s(self, attempt: int, opening_s: float) -> float | None:
        """How long to wait for the answer of the provider that was bid to as number ``attempt``
        and took ``opening_s`` to reach; None for as long as anybody may take.

        Asks behind which nobody is cost nothing, and each would cost the job as long as that. Who
        has delivered here or has quoted is waited for, and so is whoever is left when all have been
        asked: nobody is passed over twice.
        """
        place = attempt - self._first_attempt
        if not 0 <= place < len(self._deals) - 1:
            return None
        deal, own_account = self._deals[place], self._buyer.identity.account.public_key
        known = deal.account == own_account or self._buyer.ledger_book.has_bought_from(deal.account)
        if known or deal.ticket or deal.account in self._passed:
            return None
        return max(FIRST_WORD_S * 0.5 ** len(self._passed), LEAST_WORD_S, opening_s)

    def note_unanswered(self, node: bytes, reason: str, at_ns: int) -> None:
        """A provider said neither yes nor no: not to be asked again for a while, unless it was
        passed over, and that for the first time."""
        account, experience = self._accounts.get(node), self._buyer.experience
        if account is not None and PASSED_PREFIX in reason:
            self._passed.add(account)
            experience.note_excused(account, at_ns)
        elif account is not None:
            experience.note_failure(account, at_ns)

    def describe(self, bid: Bid) -> Json:
        """What is told of a bid that was filled, and what is paid ahead to its provider."""
        due_nusd = self._buyer.ledger_book.due_nusd(self._accounts.get(bid.provider, b""))
        return {
            "quote_nusd": bid.quote_nusd,
            "first_step": bid.job.first_step,
            "prepaid_nusd": max(0, due_nusd),
        }

    def recall(self, rows: Sequence[Row], order: Order) -> None:
        """Take in what earlier processes have journalled; ``order`` was under way at last."""
        self._order = order
        for row in rows:
            if row.kind == DEAL_ROW:
                node = row.body[:KEY_BYTES]
                self._accounts[node] = row.body[KEY_BYTES:]
                self._note_tried(node)
            elif row.kind == CLASS_ROW:
                self._classes = frozenset({row.body})
            elif row.kind == LOOK_ROW:
                self._looks += 1
            elif row.kind in NEW_ROUNDS:
                self._forget_tried()
                self._is_unfilled = row.kind == LIFE_ROW + Edge.WAIT

    def _forget_tried(self) -> None:
        self._tried.clear()
        self._refused_nusd.clear()

    def _note_tried(self, node: bytes) -> None:
        if node in self._tried:
            self._refused_nusd[node] = NEVER_AGAIN
        self._tried.add(node)

    def _may_ask(self, deal: Deal) -> bool:
        """Nobody twice in a round, but whoever has shown a newer sheet that is no dearer."""
        limit_nusd = self._refused_nusd.get(deal.node, NEVER_AGAIN)
        return deal.node not in self._tried or deal.total_nusd <= limit_nusd

    def _to_ask(self, deals: Sequence[Deal]) -> list[Deal]:
        """Of each node that may be asked the best ask, and each of its quotes: silence and refusals
        are a node's, and it may have as many asks as a sheet holds."""
        found: dict[tuple[bytes, bytes], Deal] = {}
        for deal in deals:
            if self._may_ask(deal):
                found.setdefault((deal.node, deal.ticket), deal)
        return list(found.values())

    def _ranking_for(self, attempt: int) -> Ranking:
        """The look by which number ``attempt`` is bid: a new one where the last has led nowhere.

        Asks behind which nobody is cost nothing, so that a book can be full of them. Whoever has
        bought before has its own experience, and limits its policy to it once.
        """
        if self._silent >= SILENT_BEFORE_KNOWN and not self._has_asked_known:
            self._has_asked_known = True
            if known := self._known():
                return self._look(attempt, continues=True, only=known)
        is_partial = self._is_among_known or self._has_spared
        most = len(self._deals) if is_partial else ASKED_A_LOOK
        if self._ranking is None or attempt - self._first_attempt >= most:
            return self._look(attempt, continues=True)
        return self._ranking

    def _known(self) -> list[bytes]:
        """Accounts with a deal in the last look that have delivered before, not asked yet."""
        has_bought_from = self._buyer.ledger_book.has_bought_from
        untried = {deal.account for deal in self._deals if self._may_ask(deal)}
        return sorted(account for account in untried if has_bought_from(account))

    def _full_among_equals(self, ranking: Ranking) -> list[bytes]:
        """Of the best deals, which are equally good, the accounts that had no room just now, unless
        all are: the draw would have half of the runs of a sweep ask in vain. Who is left out is
        asked last."""
        deals = self._to_ask(ranking.deals)
        best = {deal.account for deal in deals if deal.total_nusd == deals[0].total_nusd}
        full = best & self._buyer.waiting.full
        return sorted(full) if full != best else []

    def _look(self, attempt: int, *, continues: bool, only: Sequence[bytes] = ()) -> Ranking:
        """Rank; the deals are those from ``attempt`` on that may be asked in this round.

        A restart looks anew: what was ranked before it is not kept.
        """
        self._is_among_known = bool(only)
        order = self._order
        quoted = self._buyer.wishes.quoted(self._run_id)
        ranking = self._buyer.rank(order, self._classes, quoted, only=only)
        full = self._full_among_equals(ranking)
        if full:
            ranking = self._buyer.rank(order, self._classes, quoted, only=only, excluded=full)
        self._ranking, self._has_spared = ranking, bool(full)
        self._deals = self._to_ask(ranking.deals)
        keep_look(
            self._rows,
            ranking,
            continues=continues,
            known=order.known,
            wanted=None if self._deals else Wanted(ranking.nonce, order.costs, order.terms),
        )
        self._first_attempt = attempt
        self._looks += 1
        return ranking
