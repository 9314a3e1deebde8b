"""The buying side of sessions: which ask each next lease is bought on, and all sessions under way.

A lease's quote is a slice of the session's cap: enough for what is to be done again and for a
while of work beyond, never more than is left, so that a session takes no stranger's whole credit.
Each is as large as all before it together.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

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
from p2pflop.job.session import OpenGraph
from p2pflop.kernels.classes import chosen_family
from p2pflop.keys import peer_id
from p2pflop.market.fills import SUPERSEDED
from p2pflop.market.ranking import (
    MAX_POLICY_ACCOUNTS,
    Deal,
    Miss,
    Need,
    Policy,
    no_deal,
    rank,
)
from p2pflop.market.records import NONCE_BYTES, Ask, Bid, Terms, session_prices
from p2pflop.market.sessions import (
    NOMINAL_FLOP,
    NOMINAL_MOVED_BYTES,
    NOMINAL_TOUCHED_BYTES,
    expected_nusd,
    make_session_bid,
)
from p2pflop.market.views import BookView
from p2pflop.node.buy import Buyer
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.guard import survive
from p2pflop.node.handing_over import HAND_OVER_S
from p2pflop.node.journal import JobRows, Journal
from p2pflop.node.lease_blobs import LeaseBlobs
from p2pflop.node.printable import printable
from p2pflop.node.service import Json
from p2pflop.node.session_buying import AnyLease, Session
from p2pflop.node.session_graphs import Graphs
from p2pflop.node.session_lease import CommandFault, HandedOver
from p2pflop.node.session_local import LocalLease
from p2pflop.node.session_messages import WINDOW_BYTES, WINDOW_COMMANDS
from p2pflop.node.session_purchase import RemoteLease, open_lease
from p2pflop.node.session_script import ScriptLine
from p2pflop.node.session_state import SESSION_BUYER, lease_state
from p2pflop.node.worker_types import Workers
from p2pflop.units import MAX_NUSD, NS_PER_S, format_usd
from p2pflop.wire import Sealed

MAX_SESSIONS: Final = 16
"""Of this node's user at once."""
OPEN_S: Final = 10.0
"""For a script to say what it wants."""
LEASE_S: Final = 24 * 3600
SLICE_NUSD: Final = 50_000_000
RETRY_S: Final = 1.0
AHEAD: Final = 2
NONE_SHOWN: Final[Mapping[bytes, int]] = MappingProxyType({})
"""A quote is so many times what is to be done again."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Looked:
    """One look at the book for a session."""

    nonce: bytes
    view: BookView
    policy: Policy
    ranked: list[Deal | Miss]

    @property
    def deals(self) -> list[Deal]:
        return [entry for entry in self.ranked if isinstance(entry, Deal)]


class _CapError(MarketError):
    """No ask can be paid for: to wait does not help."""


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
        self._sessions[session.id] = session
        try:
            await session.run()
        finally:
            del self._sessions[session.id]
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
        """Sessions under way, oldest first, as JSON. See ``NodeService.sessions``."""
        return [
            {
                "id": session.id.hex()[:12],
                "class_id": session.class_id.hex(),
                "provider": session.provider,
                "commands": session.table.count,
                "memory_bytes": session.table.held_bytes,
                "spent_nusd": session.spent_nusd,
                "cap_nusd": session.wish.cap_nusd,
            }
            for session in self._sessions.values()
        ]

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
            classes = await self.base.classes_named((wish.class_name,) if wish.class_name else ())
        until = trio.current_time() + wish.wait_s
        is_told = False
        while not session.is_gone:
            found = await self._try_all(session, classes)
            if isinstance(found, RemoteLease):
                return self._tell(session, found)
            if session.faulted:
                raise next(iter(session.faulted.values()))
            if isinstance(found, _CapError):
                raise found
            left_s = until - trio.current_time()
            if left_s <= 0:
                if wish.local and self.workers.class_id in (classes or {self.workers.class_id}):
                    return self._tell(session, self._local(session))
                raise found
            if not is_told:
                is_told = True
                session.note(f"{found.message}; waiting for up to {wish.wait_s} s")
            await trio.sleep(min(RETRY_S, left_s))
        raise ProviderError("the script is gone")

    def lost(self, session: Session, lease: AnyLease, failure: P2PFlopError) -> None:
        """A lease has ended before its time."""
        session.note(f"the provider is lost: {printable(failure)}; going on elsewhere")
        if not isinstance(lease, RemoteLease) or isinstance(failure, CommandFault):
            return
        experience = self.base.experience
        is_failure = not isinstance(failure, HandedOver)
        note = experience.note_failure if is_failure else experience.note_handed_over
        note(lease.account, self.base.now_ns())

    async def _try_all(
        self,
        session: Session,
        classes: frozenset[bytes],
        tried: frozenset[bytes] = frozenset(),
        shown: Mapping[bytes, int] = NONE_SHOWN,
    ) -> RemoteLease | MarketError:
        """Bid to one provider after the other, best first; why there is no lease, if so.

        Of the nodes that were ``tried`` none is asked again, but once each that showed a newer
        sheet and is no dearer by it than the deal that it refused (``shown``).
        """
        looked = self._look(session, classes)
        quotes = [(deal, self._quote(session, deal.ask)) for deal in looked.deals]
        why = no_deal(looked.ranked)
        if quotes and all(quote_nusd is None for _, quote_nusd in quotes):
            left = format_usd(session.wish.cap_nusd - session.spent_nusd)
            text = f"the {left} that are left of the session's limit do not reach"
            why = _CapError(text, hint="Raise CLOUD_MAX_USD.")
        for deal, quote_nusd in quotes:
            dearer = deal.total_nusd > shown.get(deal.node, deal.total_nusd)
            if quote_nusd is None or deal.node in tried or dearer:
                continue
            bid = self._bid(session, looked, deal, quote_nusd)
            try:
                lease = await open_lease(self, bid, deal.account, session.outstanding())
            except (ProviderError, ProtocolError, VerificationError) as error:
                self.base.experience.note_failure(deal.account, self.base.now_ns())
                reason = printable(error)
            else:
                if isinstance(lease, RemoteLease):
                    return lease
                reason = printable(lease.reason)
                if lease.reason == SUPERSEDED and deal.node not in shown:
                    newer = {**shown, deal.node: deal.total_nusd}
                    return await self._try_all(session, classes, tried, newer)
            tried |= {deal.node}
            text = f"no provider takes the session; the last one says: {reason}"
            why = MarketError(text, hint="Set CLOUD_WAIT to more, or CLOUD_FALLBACK=local.")
        return why

    def _look(self, session: Session, classes: frozenset[bytes]) -> _Looked:
        base = self.base
        now_ns = base.now_ns()
        view = base.sheets.book.view(now_ns)
        nonce = secrets.token_bytes(NONCE_BYTES)
        need = Need(
            class_ids=classes or frozenset(view.by_price),
            flop=NOMINAL_FLOP,
            touched_bytes=NOMINAL_TOUCHED_BYTES,
            moved_bytes=NOMINAL_MOVED_BYTES,
            memory_bytes=session.wish.memory_bytes + WORKER_BASE_BYTES,
            deadline_ns=now_ns + LEASE_S * NS_PER_S,
            max_nusd=MAX_NUSD,
            nonce=nonce,
        )
        faulted = tuple(session.faulted)
        admits, is_strict = base.franchise.admits, base.franchise.is_strict
        for avoided in (base.experience.avoided(now_ns), ()):
            excluded = tuple(sorted({*avoided, *faulted}))[:MAX_POLICY_ACCOUNTS]
            policy = Policy(excluded=excluded, attested_only=is_strict)
            ranked = rank(view.sheets, need, policy, now_ns, admits)
            if any(isinstance(entry, Deal) for entry in ranked):
                break
        return _Looked(nonce, view, policy, ranked)

    def _quote(self, session: Session, ask: Ask) -> int | None:
        """What the next lease may bill on ``ask``; None if what is left does not reach."""
        memory_bytes = session.wish.memory_bytes + WORKER_BASE_BYTES
        needed_nusd = expected_nusd(ask, memory_bytes, session.again())
        spent_nusd = session.spent_nusd
        left_nusd = session.wish.cap_nusd - spent_nusd
        if needed_nusd > left_nusd:
            return None
        return min(left_nusd, max(SLICE_NUSD, spent_nusd, AHEAD * needed_nusd))

    def _bid(self, session: Session, looked: _Looked, deal: Deal, quote_nusd: int) -> Sealed[Bid]:
        identity, now_ns = self.base.identity, self.base.now_ns()
        memory_bytes = session.wish.memory_bytes
        return make_session_bid(
            identity.node,
            deal,
            session_id=session.id,
            meter_id=METER_ID,
            terms=Terms(
                memory_bytes=memory_bytes + WORKER_BASE_BYTES,
                moved_bytes=memory_bytes,
                checkpoint_steps=0,
                deadline_ns=now_ns + LEASE_S * NS_PER_S,
            ),
            quote_nusd=quote_nusd,
            nonce=looked.nonce,
            now_ns=now_ns,
            book_digest=looked.view.digest,
            policy_digest=looked.policy.digest(),
            delegation=identity.delegation(now_ns),
            network=identity.network,
        )

    def _local(self, session: Session) -> LocalLease:
        memory_bytes = session.wish.memory_bytes
        outstanding = session.outstanding()
        return LocalLease(self.workers, self.base.store, self.open_graph, memory_bytes, outstanding)

    def _tell(self, session: Session, lease: AnyLease) -> AnyLease:
        """Who runs it from now on."""
        own = self.base.identity.account.public_key
        account, price_nusd, class_id = own, 0, self.workers.class_id
        if isinstance(lease, RemoteLease):
            account, class_id = lease.account, lease.bid.record.class_id
            prices = session_prices(lease.bid.record)
            price_nusd = 0 if prices is None else prices.price_nusd
        session.class_id, session.provider = class_id, account.hex()
        is_ours = class_id == self.workers.class_id
        name = self.workers.descriptor.name if is_ours else session.wish.class_name
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

    async def _close_all(self) -> None:
        for head in self.journal.unfinished(SESSION_BUYER):
            state = lease_state(head.summary)
            rows = JobRows(self.journal, head, self.base.now_ns)
            provider = state.open_bid(self.base.identity.network).record.provider
            letter = rows.add_letter(peer_id(provider), state.countersigned)
            rows.set_head(summary=head.summary, end_state="failed")
            await rows.flush()
            self.base.nursery.start_soon(survive, self.base.letters.deliver, letter)


def _shutting_down() -> ProviderError:
    return ProviderError("the node is shutting down", hint="Start it again.")


def _device(class_name: str) -> str:
    """What ``DEV`` is set to for a class; empty if it is not known here."""
    try:
        return chosen_family(class_name).device
    except ConfigError:
        return ""
