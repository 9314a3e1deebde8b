"""Two books that see the same receipts and payments always agree, and money is conserved."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pflop.ids import content_hash
from p2pflop.market.ledger import Entry, Kind, Ledger, statement
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.market.samples import NOW_NS, RESULT, ROOT, party
from p2pflop.wire import decode, encode

ACCOUNTS = [party(number).account.public_key for number in range(3)]
PAIRS = [(buyer, seller) for buyer in ACCOUNTS for seller in ACCOUNTS]


class LedgerMachine(RuleBasedStateMachine):
    """Three accounts buy from one another and from themselves; receipts come again and late."""

    def __init__(self) -> None:
        super().__init__()
        self.books = {account: Ledger() for account in ACCOUNTS}
        self.stored: dict[bytes, list[Entry]] = {account: [] for account in ACCOUNTS}
        self.fills: list[tuple[bytes, bytes, list[Receipt]]] = []
        self.owed = dict.fromkeys(PAIRS, 0)
        self.paid = dict.fromkeys(PAIRS, 0)
        self.payments = 0
        self.now_ns = NOW_NS

    @rule(pair=st.sampled_from(PAIRS))
    def fill(self, pair: tuple[bytes, bytes]) -> None:
        self.fills.append((*pair, []))

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), more=st.integers(0, 10**12))
    def deliver(self, data: st.DataObject, more: int) -> None:
        index = data.draw(st.integers(0, len(self.fills) - 1))
        buyer, seller, receipts = self.fills[index]
        before = receipts[-1].amount_nusd if receipts else 0
        fill = content_hash(b"fill %d" % index)
        number = len(receipts) + 1
        receipts.append(Receipt(1, fill, number, 0, ZERO_HASH, number, ROOT, RESULT, before + more))
        self.owed[buyer, seller] += more
        self._book(buyer, seller, receipts[-1])

    @precondition(lambda self: any(receipts for _, _, receipts in self.fills))
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        some = [entry for entry in self.fills if entry[2]]
        buyer, seller, receipts = data.draw(st.sampled_from(some))
        heads = {account: book.head for account, book in self.books.items()}
        self._book(buyer, seller, data.draw(st.sampled_from(receipts)))
        assert heads == {account: book.head for account, book in self.books.items()}

    @rule(pair=st.sampled_from(PAIRS), amount=st.integers(1, 10**12))
    def pay(self, pair: tuple[bytes, bytes], amount: int) -> None:
        buyer, seller = pair
        self.payments += 1
        payment = content_hash(b"payment %d" % self.payments)
        for _ in range(2):
            self._keep(buyer, self.books[buyer].book_paid(payment, seller, amount, self.now_ns))
            self._keep(
                seller, self.books[seller].book_received(payment, buyer, amount, self.now_ns)
            )
        self.owed[pair] -= amount
        self.paid[pair] += amount

    @rule(pair=st.sampled_from(PAIRS), amount=st.integers(1, 10**12))
    def pay_in_vain(self, pair: tuple[bytes, bytes], amount: int) -> None:
        """Claimed, refused, taken back; each told twice."""
        buyer, seller = pair
        self.payments += 1
        payment = content_hash(b"payment %d" % self.payments)
        book = self.books[buyer]
        for post in (book.book_paid, book.book_paid, book.book_returned, book.book_returned):
            self._keep(buyer, post(payment, seller, amount, self.now_ns))

    @rule(account=st.sampled_from(ACCOUNTS))
    def restart(self, account: bytes) -> None:
        stored = [decode(Entry, encode(entry)) for entry in self.stored[account]]
        again = Ledger.load(stored)
        assert again.balances() == self.books[account].balances()
        assert again.uncovered_nusd() == self.books[account].uncovered_nusd()
        self.books[account] = again

    def _book(self, buyer: bytes, seller: bytes, receipt: Receipt) -> None:
        self.now_ns += 1
        self._keep(buyer, self.books[buyer].book_delivered(receipt, seller, self.now_ns))
        self._keep(seller, self.books[seller].book_earned(receipt, buyer, self.now_ns))

    def _keep(self, account: bytes, entry: Entry | None) -> None:
        if entry is not None:
            self.stored[account].append(entry)

    @invariant()
    def what_one_owes_is_what_the_other_is_owed(self) -> None:
        for (buyer, seller), owed in self.owed.items():
            payable = self.books[buyer].balance_nusd(seller, Kind.PAYABLE)
            receivable = self.books[seller].balance_nusd(buyer, Kind.RECEIVABLE)
            assert -payable == receivable == owed

    @invariant()
    def every_book_balances(self) -> None:
        for account, book in self.books.items():
            assert sum(book.totals().values()) == 0
            for entry in self.stored[account]:
                assert sum(posting.amount_nusd for posting in entry.postings) == 0
        assert sum(book.totals()[Kind.CASH] for book in self.books.values()) == 0

    @invariant()
    def what_is_uncovered_is_owed_beyond_what_was_paid(self) -> None:
        for seller, book in self.books.items():
            for buyer in ACCOUNTS:
                assert book.received_nusd(buyer) == self.paid[buyer, seller]
                given = max(0, -self.owed[seller, buyer])  # more than was bought from it
                assert book.credit_nusd(buyer) == max(0, self.paid[buyer, seller] - given)
            beyond = (book.due_nusd(buyer) - book.credit_nusd(buyer) for buyer in ACCOUNTS)
            assert book.uncovered_nusd() == sum(max(0, nusd) for nusd in beyond)

    @invariant()
    def statements_end_at_the_balance(self) -> None:
        for account, book in self.books.items():
            for other in ACCOUNTS:
                rows = list(statement(self.stored[account], other))
                assert (rows[-1].owed_nusd if rows else 0) == book.due_nusd(other)


LedgerMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestLedger = LedgerMachine.TestCase
