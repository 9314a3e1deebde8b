"""The book against a model that remembers everything it was ever told."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pflop.market.book import Applied, Book, Equivocation, open_equivocation
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
            assert open_equivocation(proof.first, proof.second, "main") == proof
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


class CrowdMachine(RuleBasedStateMachine):
    """A tight book among strangers, its own node and friends; time goes by."""

    OWN, FRIENDS = party(100), [party(101), party(102)]

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = NOW_NS
        self.number = 0
        self.friends = {friend.node.public_key for friend in self.FRIENDS}
        self.published: dict[bytes, OpenSheet] = {}
        self.book = Book(
            bytes(32),
            own=self.OWN.node.public_key,
            is_known=lambda sheet: sheet.node in self.friends,
            max_strangers=MAX_STRANGERS,
            max_known=3,
            max_per_source=5,
        )

    @rule(member=st.sampled_from([0, 1, 2]))
    def publish(self, member: int) -> None:
        """Its own sheet, or that of a friend, always goes in."""
        maker = (self.OWN, *self.FRIENDS)[member]
        self.number += 1
        sheet = maker.sheet(
            ask(valid_until_ns=self.now_ns + NS_PER_S), number=self.number, now_ns=self.now_ns
        )
        assert self.book.apply(sheet, self.now_ns, "anybody") == Applied(changed=True)
        self.published[sheet.node] = sheet

    @rule(first=st.integers(0, 40), count=st.integers(1, 12), source=st.sampled_from("ab"))
    def flood(self, first: int, count: int, source: str) -> None:
        before = {sheet.node for sheet in self.book.view(self.now_ns).sheets}
        new = 0
        for number in range(first, first + count):
            self.number += 1
            sheet = party(number).sheet(number=self.number, now_ns=self.now_ns)
            outcome = self.book.apply(sheet, self.now_ns, source)
            new += outcome == Applied(changed=True) and sheet.node not in before
        assert new <= 5

    @rule(seconds=st.sampled_from([1, 901, 1801]))
    def wait(self, seconds: int) -> None:
        self.now_ns += seconds * NS_PER_S
        self.book.expire(self.now_ns)

    @invariant()
    def own_and_friends_have_their_places(self) -> None:
        for node, sheet in self.published.items():
            if sheet.sheet.expires_ns > self.now_ns:
                assert self.book.get(node, self.now_ns) == sheet

    @invariant()
    def the_book_stays_tight(self) -> None:
        assert len(self.book) <= MAX_STRANGERS + 1
        assert len(self.book._known) <= 3
        groups = [self.book._ours, self.book._attested, self.book._known, self.book._new]
        assert sum(map(len, groups)) == len(self.book)
        assert all(group == sorted(group) for group in groups)


CrowdMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestCrowd = CrowdMachine.TestCase
