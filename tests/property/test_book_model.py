"""The book against a model that remembers everything it was ever told."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pflop.market.book import Applied, Book, Equivocation
from p2pflop.market.records import MAX_SHEET_LIFETIME_NS, Rejected
from p2pflop.market.samples import NOW_NS, ask, party
from p2pflop.market.sheets import OpenSheet, check_sheet
from p2pflop.units import NS_PER_S

NODES = [party(number, account=number // 2) for number in range(6)]
MAX_STRANGERS = 4


class BookMachine(RuleBasedStateMachine):
    """Roomy and tight books get the same sheets; the roomy one must equal the model."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = NOW_NS
        self.roomy = Book(bytes(32))
        self.tight = Book(bytes(32), max_strangers=MAX_STRANGERS, max_per_account=1)
        self.seen: dict[tuple[bytes, int], dict[bytes, OpenSheet]] = {}
        self.sheets: list[OpenSheet] = []

    @rule(
        node=st.sampled_from(NODES),
        number=st.integers(1, 3),
        body=st.integers(1, 2),
        lifetime_s=st.sampled_from([30, 1800, 3600]),
    )
    def publish(self, node: object, number: int, body: int, lifetime_s: int) -> None:
        maker = next(party for party in NODES if party is node)
        sheet = maker.sheet(
            ask(body, valid_until_ns=self.now_ns + NS_PER_S),
            number=number,
            now_ns=self.now_ns,
            lifetime_ns=lifetime_s * NS_PER_S,
        )
        self.sheets.append(sheet)
        self._apply(sheet)

    @precondition(lambda self: self.sheets)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """Gossip brings anything again; nodes check the time before they apply."""
        sheet = data.draw(st.sampled_from(self.sheets))
        if isinstance(check_sheet(sheet.sealed.wire, "main", self.now_ns), OpenSheet):
            self._apply(sheet)

    @rule(seconds=st.sampled_from([1, 31, 1801, 3601]))
    def wait(self, seconds: int) -> None:
        self.now_ns += seconds * NS_PER_S
        for book in (self.roomy, self.tight):
            book.expire(self.now_ns)

    @rule()
    def restart(self) -> None:
        again = Book(bytes(32))
        again.load(self.roomy.dump(), self.now_ns)
        assert again.digest(self.now_ns) == self.roomy.digest(self.now_ns)

    def _apply(self, sheet: OpenSheet) -> None:
        outcome = self.roomy.apply(sheet, self.now_ns)
        assert isinstance(outcome, Applied | Equivocation | Rejected)
        self.tight.apply(sheet, self.now_ns)
        bodies = self.seen.setdefault((sheet.node, sheet.sheet.number), {})
        bodies[sheet.sealed.id] = sheet

    @invariant()
    def the_latest_number_shows_unless_equivocated(self) -> None:
        live = {sheet.node: sheet for sheet in self.roomy.view(self.now_ns).sheets}
        convicted = {proof.node: proof.number for proof in self.roomy.proofs()}
        for node in {node for node, _ in self.seen}:
            shown = live.get(node)
            if shown is None:
                continue
            assert shown.sheet.expires_ns > self.now_ns
            assert shown.sheet.number > convicted.get(node, 0)
            unexpired = [
                sheet
                for (other, _), bodies in self.seen.items()
                if other == node
                for sheet in bodies.values()
                if sheet.sheet.issued_ns + MAX_SHEET_LIFETIME_NS > self.now_ns
            ]
            assert shown.sheet.number == max(sheet.sheet.number for sheet in unexpired)

    @invariant()
    def proofs_hold(self) -> None:
        for proof in self.roomy.proofs():
            fresh = Book(bytes(32))
            found = fresh.apply_equivocation(proof.first, proof.second, self.now_ns)
            assert isinstance(found, Equivocation | Rejected)
            assert len(self.seen[proof.node, proof.number]) > 1

    @invariant()
    def the_tight_book_stays_tight(self) -> None:
        assert len(self.tight) <= MAX_STRANGERS
        accounts = [sheet.account for sheet in self.tight.view(self.now_ns).sheets]
        assert len(accounts) == len(set(accounts))

    @invariant()
    def every_view_is_sorted_and_its_digest_tells_views_apart(self) -> None:
        view = self.roomy.view(self.now_ns)
        nodes = [sheet.node for sheet in view.sheets]
        assert nodes == sorted(set(nodes))
        assert (view.digest == Book(bytes(32)).digest(self.now_ns)) == (not nodes)


BookMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
TestBook = BookMachine.TestCase
