"""A market in memory: nodes that really buy and sell, without sockets. For tests and benches.

Each ``MemoryNode`` is made of the real parts (``Buyer``, ``Seller``, ``SheetService``, journal,
ledger) on SQLite files in a folder, a ``MemoryStore`` and a ``Tape`` that outlive restarts, a host
of one ``MemoryNetwork`` and scripted workers. Time is trio's, so that a mock clock moves all of it.

A node can lose power at any write to its journal or ledger (``cut_at``): nothing that comes after
that write happens, and with ``cut_before`` the write itself does not either. A ``tamper`` sees each
frame of a job or payment stream that it opened and may change, add or drop some; the ``answered``
ones see those of job streams that others opened. With ``gossips`` sheets travel as in a daemon, and
not by ``meet``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from p2pflop.dht.fetch import BlobServer
from p2pflop.dht.manifest import address_of
from p2pflop.dht.memory import MemoryStore
from p2pflop.dht.planes import MAX_FRAME_BYTES, Stream
from p2pflop.dht.transfer import BLOB_PROTOCOL
from p2pflop.errors import ProviderError
from p2pflop.ids import content_hash
from p2pflop.job.collection import collection_of
from p2pflop.job.file import JobBody, JobFile, Labels, encode_file
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.job.spec import (
    MODE_COLLECT,
    MODE_LAST,
    MODE_TRACE,
    ROLE_INPUT,
    ROLE_STATE,
    ROLE_STEP,
    BlobSource,
    ClassDescriptor,
    InitSource,
    Job,
    MemberSource,
    NoSource,
    Phase,
    Stop,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.keys import PrivateKey, public_key_of
from p2pflop.market.book import Book
from p2pflop.market.records import Ask
from p2pflop.market.sheets import OpenSheet, make_ask
from p2pflop.market.tape import Tape
from p2pflop.node import sheets as sheets_module
from p2pflop.node import tape as tape_module
from p2pflop.node.books import open_books
from p2pflop.node.buy import Buyer
from p2pflop.node.config import Settings, for_its_user
from p2pflop.node.dialing import NodeDialer
from p2pflop.node.franchising import Franchising, open_franchise
from p2pflop.node.guard import survive
from p2pflop.node.identity import Identity
from p2pflop.node.journal import Journal
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.letters import JOB_PROTOCOL, Letters
from p2pflop.node.memory_host import MemoryHost, MemoryNetwork
from p2pflop.node.memory_workers import MEMORY_CLASS, CountingSession, MemoryWorkerPool
from p2pflop.node.network import HostConfig
from p2pflop.node.payment_book import PaymentBook
from p2pflop.node.payment_stream import PROTOCOL as PAYMENT_PROTOCOL
from p2pflop.node.payments import Payments
from p2pflop.node.quote_stream import PROTOCOL as QUOTE_PROTOCOL
from p2pflop.node.registry_client import Fetch, HttpFetch
from p2pflop.node.runs import Runs
from p2pflop.node.sell import Seller
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.session_graphs import Graphs
from p2pflop.node.session_messages import SESSION_PROTOCOL
from p2pflop.node.session_sell import SessionSeller
from p2pflop.node.session_service import SessionBuyer
from p2pflop.node.sheets import SheetService
from p2pflop.node.tape import TapeService
from p2pflop.node.warm import WarmWorkers
from p2pflop.units import GIB, NS_PER_S
from p2pflop.wire import encode

EPOCH_NS: Final = 1_800_000_000 * NS_PER_S
PRICE_NUSD: Final = 10**15
"""High enough for a job of a few FLOP to cost something."""

MAX_GOSSIP_WAITING: Final = 64
TAMPERED: Final = frozenset({JOB_PROTOCOL, PAYMENT_PROTOCOL, SESSION_PROTOCOL})

Tamper = Callable[[bytes], list[bytes]]
"""What becomes of a frame. May raise ProviderError: the stream breaks."""


class PowerCutError(BaseException):
    """The node is gone, in the middle of whatever it did. Nobody catches this."""


def now_ns() -> int:
    """The time of day, by trio's clock."""
    return EPOCH_NS + int(trio.current_time() * NS_PER_S)


def unchanged(frame: bytes) -> list[bytes]:
    """The Tamper that lets everything pass."""
    return [frame]


class MemoryNode:
    """A node. ``start`` and ``kill`` as often as wanted; files, store and keys stay."""

    def __init__(
        self,
        network: MemoryNetwork,
        folder: Path,
        *,
        price_nusd: int | None = None,
        session: Callable[..., Any] | None = None,
        level: int = 3,
        descriptor: ClassDescriptor = MEMORY_CLASS,
        account: str = "",
        fetch: Callable[[str], Fetch] = HttpFetch,
        gossips: bool = False,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.store = MemoryStore(clock_ns=now_ns)
        self.kept_tape = Tape(bytes(32))
        self.settings = Settings(
            folder, ask_nusd=price_nusd, **{"memory_bytes": 4 * GIB, **settings}
        )
        self._embedded = False
        seed = folder.name.encode()
        self.identity = Identity(
            PrivateKey(content_hash(b"account " + (account or folder.name).encode())),
            PrivateKey(content_hash(b"node " + seed)),
            "main",
        )
        self.workers = MemoryWorkerPool(
            session or CountingSession, level=level, descriptor=descriptor
        )
        self.fetch = fetch
        self.tamper_sent: Tamper = unchanged
        self.tamper_heard: Tamper = unchanged
        self.tamper_answered_sent: Tamper = unchanged
        self.tamper_answered_heard: Tamper = unchanged
        self.writes = 0
        self.cut_at: int | None = None
        self.cut_before = False
        self._cut = False
        self.down = trio.Event()
        self._network = network
        self._gossips = gossips
        self.gossiping = trio.CancelScope()
        self._scope = trio.CancelScope()

    @property
    def peer(self) -> str:
        """Its peer id."""
        return self.identity.peer

    @property
    def account(self) -> bytes:
        """The public key of its account."""
        return self.identity.account.public_key

    @property
    def _in_force(self) -> Settings:
        """Those with which it runs."""
        return for_its_user(self.settings) if self._embedded else self.settings

    @property
    def is_dying(self) -> bool:
        """Whether its power is cut, or it is killed: it says nothing more."""
        return self._cut or self._scope.cancel_called

    async def start(self, nursery: trio.Nursery, *, embedded: bool = False) -> MemoryNode:
        """Run, in ``nursery``, until ``kill`` or a power cut; ``embedded``: for its user."""
        self._embedded = embedded
        await nursery.start(self._run)
        return self

    async def kill(self) -> None:
        """End at once, without a word to anybody; as far as asyncio of one process can."""
        self._scope.cancel()
        await self.down.wait()

    def cut_power(self) -> None:
        """End at once, in the middle of whatever it does."""
        self._cut = True
        self._scope.cancel()

    async def submit(self, file: bytes, inputs: Sequence[bytes] = (), /, **options: Any) -> str:
        """Buy; the run's id. ``inputs`` go along with the job."""
        return await self.buyer.submit(file, SubmitOptions(**options), inputs)

    async def end_of(self, run_id: str) -> Json:
        """The last event of a run."""
        async for events in self.runs.follow(run_id, 0):
            last = events[-1]
        return last

    def events(self, run_id: str, kind: str = "") -> list[Json]:
        """What a run has told so far."""
        return [e for e in self.runs.get(run_id).events if not kind or e["kind"] == kind]

    def meet(self, *others: MemoryNode) -> None:
        """Learn the sheets of others, as by gossip."""
        for other in others:
            newest = other.sheets.newest
            if newest is not None:
                self.sheets.take(newest.sealed.wire, "")

    async def sell(self) -> OpenSheet:
        """Publish the sheet."""
        settings = self._in_force
        return await self.sheets.offer(
            self._asks, (), limits=settings.limits, is_private=settings.embedded
        )

    async def _run(self, task_status: Any) -> None:
        self.down = trio.Event()
        self._cut = False
        self._scope = trio.CancelScope()
        try:
            with self._scope:
                async with self._open():
                    task_status.started()
                    await trio.sleep_forever()
        except* PowerCutError:
            pass
        finally:
            self.down.set()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            books = open_books(self.folder)
            stack.push_async_callback(books.aclose)
            setattr(books, "write", self._wired(books.write))  # noqa: B010 - a test's wire-tap
            self.journal = Journal(books)
            self.ledger_book = LedgerBook(books, self.account)
            self.payment_book = PaymentBook(books)
            franchising = await stack.enter_async_context(
                open_franchise(self._in_force, self.identity, now_ns)
            )
            config = HostConfig(self.identity.node.seed)
            self.host = await stack.enter_async_context(self._network.open_host(config))
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            self._assemble(self.host, nursery, franchising)
            self._open_sessions()
            stack.push_async_callback(self.registries.save)
            await self._listen(nursery)
            if self._gossips:
                await self._gossip(nursery)
            self.seller.resume()
            self.buyer.resume()
            self.sessions.resume()
            self.session_sales.resume()
            self.money.resume()
            if self._in_force.ask_nusd is None:
                await self.sheets.offer_nothing()
            else:
                await self.sell()
            yield

    def _wired(self, write: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wired(operation: Callable[[Any], Any]) -> Any:
            self.writes += 1
            cut = self.writes == self.cut_at
            self._cut |= cut and self.cut_before
            if self._cut:
                raise PowerCutError
            done = await write(operation)
            self._cut |= cut
            if self._cut:
                raise PowerCutError
            return done

        return wired

    def _assemble(self, host: MemoryHost, nursery: trio.Nursery, franchising: Franchising) -> None:
        self.dialer = dialer = NodeDialer(host, nursery)
        self.franchise = franchise = franchising.franchise
        book = Book(bytes(32), is_attested=franchise.is_attested, max_nodes=franchise.max_nodes)
        self.registries = franchising.start(host, book, nursery, self.fetch)
        self.sheets = SheetService(self.identity, book, host, now_ns)
        self.tape = TapeService(self.identity, self.kept_tape, self.sheets.relay, host, now_ns)
        self.runs = Runs(self.journal, now_ns)
        letters = Letters(self.journal, dialer, nursery, now_ns)
        host.on_connect(letters.met)
        self.buyer = Buyer(
            identity=self.identity,
            store=self.store,
            dialer=_TamperedDialer(dialer, self),
            sheets=self.sheets,
            runs=self.runs,
            ledger_book=self.ledger_book,
            letters=letters,
            franchise=franchise,
            workers=self.workers,
            memory_bytes=self._in_force.resolved_memory_bytes(),
            nursery=nursery,
            now_ns=now_ns,
        )
        self.seller = Seller(
            identity=self.identity,
            settings=self._in_force,
            store=self.store,
            dialer=dialer,
            sheets=self.sheets,
            workers=self.workers,
            warm=WarmWorkers(self.workers, nursery),
            journal=self.journal,
            ledger_book=self.ledger_book,
            tape=self.tape,
            nursery=nursery,
            now_ns=now_ns,
        )

        self.seller.allocator.on_free.append(self.buyer.waiting.room_freed)
        self.seller.allocator.allowance = lambda: franchise.own_slots(
            book.sellers_of(self.account, now_ns())
        )
        self.money = Payments(
            self.identity,
            self.payment_book,
            self.ledger_book,
            _TamperedDialer(dialer, self),
            self.sheets.nodes_of,
            nursery,
            now_ns,
        )
        host.on_connect(self.money.met)

        async def authorise(peer: str, _token: bytes, address: bytes) -> bool:
            reader = public_key_of(peer)
            return (
                self.buyer.lends(address, reader)
                or self.sessions.lends(address, reader)
                or await self.seller.shows(address, reader)
                or await self.store.may_read(address, reader)
            )

        dialer.handle(BLOB_PROTOCOL, BlobServer(self.store, authorise).handle)
        dialer.handle(JOB_PROTOCOL, self._answer_job)
        dialer.handle(sheets_module.PROTOCOL, self.sheets.comparisons.answer)
        dialer.handle(tape_module.PROTOCOL, self.tape.comparisons.answer)
        dialer.handle(PAYMENT_PROTOCOL, self.money.handle)
        dialer.handle(QUOTE_PROTOCOL, self.buyer.wishes.handle)

    def _open_sessions(self) -> None:
        graphs = Graphs()
        self.sessions = SessionBuyer(
            self.buyer, self.journal, self.workers, graphs, self.seller.blobs
        )
        self.session_sales = SessionSeller(self.seller, graphs)
        self.dialer.handle(SESSION_PROTOCOL, self._answer_session)

    async def _answer_job(self, stream: Stream) -> None:
        await self.seller.handle(
            _TamperedStream(
                stream, lambda: self.tamper_answered_sent, lambda: self.tamper_answered_heard
            )
        )

    async def _answer_session(self, stream: Stream) -> None:
        await self.session_sales.handle(
            _TamperedStream(
                stream, lambda: self.tamper_answered_sent, lambda: self.tamper_answered_heard
            )
        )

    async def _listen(self, nursery: trio.Nursery) -> None:
        """To the gossip of trades."""
        nursery.start_soon(self.tape.run)
        await self._subscribe(nursery, tape_module.TOPIC, self.tape.take)

    async def _gossip(self, nursery: trio.Nursery) -> None:
        """Join the gossip about sheets, until ``gossiping`` is cancelled."""
        self.gossiping = trio.CancelScope()
        await self._subscribe(nursery, sheets_module.TOPIC, self.sheets.take)

        def met(peer: str) -> None:
            self.sheets.met(peer, ())
            nursery.start_soon(survive, self.sheets.comparisons.compare_quietly, peer)

        self.host.on_connect(met)
        self.host.on_disconnect(self.sheets.left)

        async def keep_alike() -> None:
            with self.gossiping:
                await self.sheets.run()

        nursery.start_soon(keep_alike)

    async def _subscribe(
        self, nursery: trio.Nursery, topic: str, take: Callable[[bytes, str], bool]
    ) -> None:
        sink, source = trio.open_memory_channel[tuple[str, bytes]](MAX_GOSSIP_WAITING)

        async def drain() -> None:
            async for _ in source:
                pass

        nursery.start_soon(drain)
        await self.host.subscribe(topic, lambda _, data, peer: take(data, peer), sink)

    def _asks(self, until_ns: int) -> tuple[Ask, ...]:
        settings = self._in_force
        ask = make_ask(
            0,
            self.workers.class_id,
            settings.ask_nusd or 0,
            until_ns,
            memory_bytes=settings.resolved_memory_bytes(),
            flop_per_s=10**9,
            setup_nusd=settings.setup_nusd,
            min_charge_nusd=settings.min_charge_nusd,
            byte_price_nusd=settings.byte_price_nusd,
        )
        return (ask,)


class _TamperedDialer:
    """Job and payment streams that this node opens, as its tampers leave them."""

    def __init__(self, inner: NodeDialer, node: MemoryNode) -> None:
        self._inner = inner
        self._node = node

    async def open(self, peer: str, protocol: str) -> Stream:
        stream = await self._inner.open(peer, protocol)
        if protocol not in TAMPERED:
            return stream
        node = self._node
        return _TamperedStream(stream, lambda: node.tamper_sent, lambda: node.tamper_heard)


class _TamperedStream:
    def __init__(
        self, inner: Stream, sent: Callable[[], Tamper], heard: Callable[[], Tamper]
    ) -> None:
        self.peer = inner.peer
        self._inner = inner
        self._tamper_sent = sent
        self._tamper_heard = heard
        self._heard: list[bytes] = []

    async def send(self, *frames: bytes) -> None:
        for frame in frames:
            await self._inner.send(*await self._tampered(self._tamper_sent(), frame))

    async def receive(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        while not self._heard:
            frame = await self._inner.receive(max_bytes)
            self._heard += await self._tampered(self._tamper_heard(), frame)
        return self._heard.pop(0)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _tampered(self, tamper: Tamper, frame: bytes) -> list[bytes]:
        try:
            return tamper(frame)
        except ProviderError:
            await self._inner.aclose()
            raise


def sample_data(floats: int = 4) -> tuple[bytes, bytes]:
    """The inputs of ``sample_file``: the first state, and what is added to it."""
    return bytes(4 * floats), bytes(range(256))[: 4 * floats].ljust(4 * floats, b"\7")


def sample_collection(floats: int = 4) -> bytes:
    """The blobs of ``sample_file`` as a collection."""
    blobs = enumerate(sample_data(floats))
    return encode(collection_of({f"{n}": (address_of(data), len(data)) for n, data in blobs}))


def sample_file(
    steps: int = 20,
    *,
    floats: int = 4,
    seed: int = 0,
    first_step: int = 0,
    members: bool = False,
    stop_every: int = 0,
    collects: bool = False,
    born: bool = False,
) -> bytes:
    """A job file with a state, an input, a traced scalar and a last output.

    If it is ``born``, state and input come of an init graph, not of blobs.

    With ``stop_every`` that is a traced flag to stop by, which memory's workers do the first time
    that it is looked at.
    With ``members`` state and input are entries of ``sample_collection``; if it ``collects``, every
    value of the output is kept, not the last alone.
    """
    step = int(Dtype.INT32)
    graph = encode_graph(
        Graph(
            (
                GraphParam(0, Dtype.FLOAT32, (floats,)),
                GraphParam(1, Dtype.FLOAT32, (floats,)),
                GraphParam(2, Dtype.INT32, ()),
            ),
            (
                Node(Op.PARAM, (0,)),
                Node(Op.PARAM, (1,)),
                Node(Op.ADD, (), (0, 1)),
                Node(Op.PARAM, (2,)),
                Node(Op.ADD, (), (3, 3)),
                Node(Op.CAST, (int(Dtype.INT64),), (4,)),
                *([Node(Op.CMPNE, (), (3, 3))] if stop_every else []),
            ),
            (Output(4), Output(6 if stop_every else 5), Output(2, 0)),
        )
    )
    blobs = [BlobSource(address_of(data), len(data)) for data in sample_data(floats)]
    collection = sample_collection(floats)
    entries = [MemberSource(address_of(collection), len(collection), entry) for entry in (0, 1)]
    sources: Sequence[BlobSource | MemberSource | InitSource] = entries if members else blobs
    iota = Node(Op.IOTA, (int(Dtype.INT32), floats))
    birth = encode_graph(
        Graph((), (iota, Node(Op.CAST, (int(Dtype.FLOAT32),), (0,))), (Output(1), Output(1)))
    )
    if born:
        sources = [InitSource(graph_hash(birth), output) for output in (0, 1)]
    kept = MODE_TRACE if stop_every else MODE_COLLECT if collects else MODE_LAST
    work = Work(
        version=1,
        phases=(Phase(graph_hash(graph), 1, 0, (MODE_TRACE, kept)),),
        params=(
            WorkParam(int(Dtype.FLOAT32), (floats,), ROLE_STATE, sources[0]),
            WorkParam(int(Dtype.FLOAT32), (floats,), ROLE_INPUT, sources[1]),
            WorkParam(step, (), ROLE_STEP, NoSource()),
        ),
        seed=seed,
        stop=Stop(0, 1, stop_every) if stop_every else None,
    )
    graphs = (graph, birth) if born else (graph,)
    body = JobBody(Job(work_id(work), first_step, steps), encode(work), graphs)
    labels = Labels("sample", ("weights", "data", "step"), ("train",), (("loss", "last"),))
    return encode_file(JobFile(1, body, labels))
