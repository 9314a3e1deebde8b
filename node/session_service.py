"""The buying side of sessions: which ask each next lease is bought on, and all sessions under way.

A lease's quote is a slice of the session's cap: enough for what is to be done again and for a
while of work beyond, never more than is left, so that a session takes no stranger's whole credit.
One that is used up is doubled in place, unless another provider is cheaper by now, or the provider
will not: then the session moves.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import trio

from p2pflop.errors import (
    ConfigError,
    MarketError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    VerificationError,
)
from p2pflop.ids import HASH_BYTES
from p2pflop.job.commands import Leased, Open
from p2pflop.job.meter import METER_ID
from p2pflop.job.session import Mark, OpenGraph
from p2pflop.kernels.classes import chosen_family, name_of
from p2pflop.keys import peer_id
from p2pflop.market.fills import SUPERSEDED
from p2pflop.market.limits import AskLimits, Limit
from p2pflop.market.ranking import Accounts, Deal, Miss, MissReason, Need, Policy
from p2pflop.market.records import Ask, Bid, Terms, session_prices
from p2pflop.market.sessions import expected_nusd, make_session_bid, rank_session
from p2pflop.market.views import BookView
from p2pflop.node.buy import ANY_CLASS, Buyer
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.guard import survive
from p2pflop.node.handing_over import HAND_OVER_S
from p2pflop.node.journal import SESSION, JobRows, Journal
from p2pflop.node.lease_blobs import LeaseBlobs
from p2pflop.node.orders import Ranking
from p2pflop.node.printable import printable
from p2pflop.node.service import Json
from p2pflop.node.session_buying import AnyLease, Session
from p2pflop.node.session_graphs import Graphs
from p2pflop.node.session_hints import no_lease, refused_everywhere, unknown_class
from p2pflop.node.session_lease import CommandFault, HandedOver
from p2pflop.node.session_local import LocalLease
from p2pflop.node.session_messages import WINDOW_BYTES, WINDOW_COMMANDS
from p2pflop.node.session_purchase import RemoteLease, open_lease
from p2pflop.node.session_script import ScriptLine
from p2pflop.node.session_state import SESSION_BUYER, lease_state
from p2pflop.node.session_story import SessionLook, run_id
from p2pflop.node.worker_types import Workers
from p2pflop.units import NS_PER_S
from p2pflop.wire import Sealed

MAX_SESSIONS: Final = 16
"""Of this node's user at once."""
OPEN_S: Final = 10.0
"""For a script to say what it wants."""
LEASE_S: Final = 24 * 3600
SLICE_NUSD: Final = 50_000_000
RETRY_S: Final = 1.0
AHEAD: Final = 2
"""A quote is so many times what is to be done again, or what was used up."""
NONE_SHOWN: Final[Mapping[bytes, int]] = MappingProxyType({})

_log = logging.getLogger(__name__)


class _NoLease(NamedTuple):
    """``is_final``: to wait does not help."""

    why: MarketError
    is_final: bool = False


@dataclass(slots=True)
class SessionBuyer:
    """Every session of this node's user. ``base`` is what it shares with purchases of jobs."""

    base: Buyer
    journal: Journal
    workers: Workers
    graphs: Graphs
    blobs: LeaseBlobs
    _sessions: dict[bytes, Session] = field(default_factory=dict)
    _stopping: bool = False
    _ended: trio.Event = field(default_factory=trio.Event)

    async def serve(self, line: ScriptLine) -> None:
        """One script, from its Open to the end. Raises ConfigError, ProtocolError, and
        ProviderError if it is gone."""
        wish = None
        with trio.move_on_after(OPEN_S):
            wish = await line.receive()
        if not isinstance(wish, Open):
            raise ProtocolError("a session begins with an Open")
        session = Session(self, secrets.token_bytes(HASH_BYTES), line, wish)
        if self._stopping:
            session.refuse(_shutting_down())
        elif len(self._sessions) >= MAX_SESSIONS:
            hint = "Wait for one to end, or end it."
            session.refuse(ConfigError(f"{MAX_SESSIONS} sessions are under way", hint=hint))
        else:
            self._sessions[session.id] = session
        try:
            await session.run()
        finally:
            self._sessions.pop(session.id, None)
            self.blobs.let_go(session.id)
            self._ended.set()
            self._ended = trio.Event()

    async def stop(self) -> None:
        """End every session, its lease in order and paid, within ``HAND_OVER_S``."""
        self._stopping = True
        for session in self._sessions.values():
            session.stop(_shutting_down())
        with trio.move_on_after(HAND_OVER_S):
            while self._sessions:
                await self._ended.wait()

    def cards(self) -> list[Json]:
        """Sessions under way, oldest first, as ``NodeService.jobs`` has them, up to date."""
        return [session.story.refresh() for session in self._sessions.values()]

    def lends(self, address: bytes, reader: bytes) -> bool:
        """Whether ``reader``, a provider's node, may read a blob that its session loads."""
        return any(
            isinstance(session.lease, RemoteLease)
            and session.lease.bid.record.provider == reader
            and session.log.needs(address)
            for session in self._sessions.values()
        )

    def needs(self, address: bytes) -> bool:
        """Whether a session would miss that blob."""
        return any(session.log.needs(address) for session in self._sessions.values())

    def is_own(self, account: bytes) -> bool:
        """Whether that account is this node's own."""
        return account == self.base.identity.account.public_key

    async def open_graph(self, data: bytes) -> OpenGraph:
        """See ``Graphs.open``."""
        return await self.graphs.open(data, self.graphs.user)

    async def forget(self, session: Session, addresses: set[bytes]) -> None:
        """Delete blobs that were put for a snapshot and that nobody else holds."""
        try:
            await self.blobs.drop(session.id, addresses)
        except StoreError as error:
            _log.warning("an old snapshot is still here: %s", error)

    def resume(self) -> None:
        """Bring what earlier processes signed to the providers that may not know of it."""
        self.base.nursery.start_soon(survive, self._close_all)

    # Leases

    async def lease(self, session: Session) -> AnyLease:
        """The next lease of a session. Raises MarketError if there is none in time, ConfigError
        for a class that there is not, and CommandFault if nobody is left to check one."""
        wish = session.wish
        classes = frozenset({session.class_id})
        if not session.class_id:
            classes = await self._classes(wish.class_name)
        until = trio.current_time() + wish.wait_s
        is_told = False
        while not session.is_gone:
            found = await self._try_all(session, classes)
            if isinstance(found, RemoteLease):
                return await self._tell(session, found)
            if session.faulted:
                raise next(iter(session.faulted.values()))
            if found.is_final:
                raise found.why
            left_s = until - trio.current_time()
            if left_s <= 0:
                if wish.local and self.workers.class_id in (classes or {self.workers.class_id}):
                    return await self._tell(session, self._local(session))
                raise found.why
            await session.story.became("waiting")
            if not is_told:
                is_told = True
                session.note(f"{found.why.message}; waiting for up to {wish.wait_s} s")
            await trio.sleep(min(RETRY_S, left_s))
        raise ProviderError("the script is gone")

    async def _classes(self, name: str) -> frozenset[bytes]:
        """What ``CLOUD_CLASS`` stands for. Raises ConfigError."""
        try:
            return await self.base.classes_named((name,) if name else ())
        except ConfigError as error:
            raise unknown_class(error) from error

    async def lost(self, session: Session, lease: AnyLease, failure: P2PFlopError) -> None:
        """A lease has ended before its time."""
        if isinstance(lease, RemoteLease):
            provider = lease.bid.record.provider
            await session.story.lost(provider, printable(failure))
        session.note(f"the provider is lost: {printable(failure)}; going on elsewhere")
        if not isinstance(lease, RemoteLease) or isinstance(failure, CommandFault):
            return
        experience = self.base.experience
        is_failure = not isinstance(failure, HandedOver)
        note = experience.note_failure if is_failure else experience.note_excused
        note(lease.account, self.base.now_ns())

    async def _try_all(
        self,
        session: Session,
        classes: frozenset[bytes],
        tried: frozenset[bytes] = frozenset(),
        shown: Mapping[bytes, int] = NONE_SHOWN,
        reason: str = "",
    ) -> RemoteLease | _NoLease:
        """Bid to one provider after the other, best first; why there is no lease, if so. Raises
        StoreError.

        Of the nodes that were ``tried``, the last of which refused for ``reason``, none is asked
        again, but once each that showed a newer sheet and is no dearer by it than the deal that it
        refused (``shown``).
        """
        again, left_nusd = session.again(), session.left_nusd
        ranking = self._look(session, classes, again, left_nusd)
        why = None if ranking.deals else no_lease(ranking.ranked, session.wish, left_nusd)
        terms = self._terms(session, self.base.now_ns())
        look = SessionLook(ranking, again, terms, session.known())
        await session.story.looked(look, "" if why is None else why.message, continues=bool(shown))
        if why is not None:
            is_final = any(miss.reason is MissReason.BUDGET for miss in ranking.misses)
            return _NoLease(why, is_final)
        for deal in ranking.deals:
            dearer = deal.total_nusd > shown.get(deal.node, deal.total_nusd)
            if deal.node in tried or dearer:
                continue
            bid = self._bid(session, ranking, deal, self._quote(session, deal.ask, again))
            reject = None
            try:
                more = partial(self._more, session, deal)
                limits = deal.sheet.limits_of(deal.ask)
                outstanding = session.outstanding()
                answer = await open_lease(self, bid, deal.account, outstanding, more, limits)
            except (ProviderError, ProtocolError, VerificationError) as error:
                self.base.experience.note_failure(deal.account, self.base.now_ns())
                reason = printable(error)
            else:
                if isinstance(answer, RemoteLease):
                    answer.on_receipt = session.story.signed
                    await session.story.filled(bid, answer.fill, deal.account)
                    return answer
                reject, reason = answer, printable(answer.record.reason)
            await session.story.refused(bid, reject, reason)
            if reason == SUPERSEDED and deal.node not in shown:
                newer = {**shown, deal.node: deal.total_nusd}
                return await self._try_all(session, classes, tried, newer, reason)
            tried |= {deal.node}
        return _NoLease(refused_everywhere(reason, session.wish))

    def _look(
        self, session: Session, classes: frozenset[bytes], again: Mark, left_nusd: int
    ) -> Ranking:
        """One look at the book, for what is to be done ``again`` and more."""

        def ranked(
            view: BookView, nonce: bytes, policy: Policy, admitted: Accounts
        ) -> list[Deal | Miss]:
            terms = self._terms(session, view.at_ns)
            need = Need(
                class_ids=classes or frozenset(view.by_price),
                flop=again.flop,
                touched_bytes=again.touched_bytes,
                moved_bytes=again.moved_bytes,
                memory_bytes=terms.memory_bytes,
                deadline_ns=terms.deadline_ns,
                max_nusd=left_nusd,
                nonce=nonce,
                known=session.known(),
            )
            return rank_session(view.sheets, need, again, policy, view.at_ns, admitted)

        return self.base.look(ranked, classes, left_nusd, excluded=tuple(session.faulted))

    def _quote(self, session: Session, ask: Ask, again: Mark) -> int:
        """What the next lease may bill on ``ask``."""
        needed_nusd = expected_nusd(ask, _reserved_bytes(session), again)
        return min(session.left_nusd, max(SLICE_NUSD, session.spent_nusd, AHEAD * needed_nusd))

    def _more(self, session: Session, deal: Deal, bid: Bid) -> int:
        """What a lease on ``deal`` may come to in place of its quote, unless another provider is
        cheaper by now."""
        left_nusd = session.wish.cap_nusd - session.totals.cost_nusd
        again = self._look(session, frozenset({session.class_id}), Mark(), left_nusd).deals
        best_nusd = min((each.total_nusd for each in again), default=deal.total_nusd)
        if best_nusd < deal.total_nusd - deal.ask.setup_nusd:
            return 0
        return min(left_nusd, AHEAD * bid.quote_nusd)

    def _terms(self, session: Session, now_ns: int, limits: AskLimits = ()) -> Terms:
        """Of a lease that begins now, on an ask with these limits."""
        lease_s = min(LEASE_S, dict(limits).get(Limit.LEASE, LEASE_S))
        return Terms(
            memory_bytes=_reserved_bytes(session),
            moved_bytes=session.wish.memory_bytes,
            checkpoint_steps=0,
            deadline_ns=now_ns + lease_s * NS_PER_S,
        )

    def _bid(self, session: Session, looked: Ranking, deal: Deal, quote_nusd: int) -> Sealed[Bid]:
        identity, now_ns = self.base.identity, self.base.now_ns()
        limits = deal.sheet.limits_of(deal.ask)
        return make_session_bid(
            identity.node,
            deal,
            session_id=session.id,
            meter_id=METER_ID,
            terms=self._terms(session, now_ns, limits),
            quote_nusd=quote_nusd,
            nonce=looked.nonce,
            now_ns=now_ns,
            book_digest=looked.view.digest,
            mandate_digest=looked.mandate.digest(),
            delegation=identity.delegation(now_ns),
            network=identity.network,
        )

    def _local(self, session: Session) -> LocalLease:
        memory_bytes = session.wish.memory_bytes
        outstanding = session.outstanding()
        return LocalLease(self.workers, self.base.store, self.open_graph, memory_bytes, outstanding)

    async def _tell(self, session: Session, lease: AnyLease) -> AnyLease:
        """Who runs it from now on."""
        own = self.base.identity.account.public_key
        account, price_nusd, class_id = own, 0, self.workers.class_id
        if isinstance(lease, RemoteLease):
            account, class_id = lease.account, lease.bid.record.class_id
            prices = session_prices(lease.bid.record)
            price_nusd = 0 if prices is None else prices.price_nusd
        session.class_id, session.provider = class_id, account.hex()
        name = await self._class_name(session, class_id)
        session.outbox.put(
            Leased(
                account.hex(),
                name,
                _device(name),
                price_nusd,
                session.wish.cap_nusd,
                WINDOW_COMMANDS,
                WINDOW_BYTES,
            )
        )
        return lease

    async def _class_name(self, session: Session, class_id: bytes) -> str:
        """What the person calls a class, or its id where it has no name here."""
        if class_id == self.workers.class_id:
            return self.workers.descriptor.name
        wanted = session.wish.class_name
        if wanted not in (ANY_CLASS, class_id.hex()):
            return wanted
        # Asks compilers for their versions, the first time.
        return await trio.to_thread.run_sync(name_of, class_id) or class_id.hex()[:12]

    async def _close_all(self) -> None:
        network = self.base.identity.network
        for head in self.journal.unfinished(SESSION_BUYER):
            state = lease_state(head.summary)
            rows = JobRows(self.journal, head, self.base.now_ns)
            provider = state.open_bid(network).record.provider
            letter = rows.add_letter(peer_id(provider), state.countersigned)
            rows.set_head(summary=head.summary, end_state="failed")
            await rows.flush()
            self.base.nursery.start_soon(survive, self.base.letters.deliver, letter)
        await self._end_stories()

    async def _end_stories(self) -> None:
        """A session does not outlive its node; what its leases have cost is known from these."""
        network, runs = self.base.identity.network, self.base.runs
        left = runs.unfinished(SESSION)
        owed_nusd: Counter[str] = Counter()
        for head in self.journal.heads(SESSION_BUYER) if left else ():
            state = lease_state(head.summary)
            signed = state.signed_receipt(network)
            if signed is not None:
                owed_nusd[run_id(state.open_bid(network).record.job.work)] += signed.amount_nusd
        for head in left:
            run = runs.get(head.job)
            run.card["cost_nusd"] = max(run.card["cost_nusd"], owed_nusd[run.id])
            await runs.fail(run, ProviderError("the node of the session has ended"))


def _reserved_bytes(session: Session) -> int:
    """The memory that a lease of it reserves."""
    return session.wish.memory_bytes + WORKER_BASE_BYTES


def _shutting_down() -> ProviderError:
    return ProviderError("the node is shutting down", hint="Start it again.")


def _device(class_name: str) -> str:
    """What ``DEV`` is set to for a class; empty if it is not known here."""
    try:
        return chosen_family(class_name).device
    except ConfigError:
        return ""
