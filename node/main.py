"""``p2pflop node``: everything started in order, kept running, and stopped in order.

Start: the home is locked, keys are read, SQLite recovers, the zygote warms up, HTTP and
libp2p listen, unfinished jobs are taken up, the sheet is published. Stop, on Ctrl-C or SIGTERM:
bids are refused, asks withdrawn, leases handed over (``handing_over.py``), sessions of this node's
user ended and paid for, conversations ended, helpers ended; a second Ctrl-C ends it at once. A node
that was killed finds all of it in its journal.
"""

from __future__ import annotations

import gc
import json
import logging
import resource
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Protocol, TypeVar

import trio

from p2pflop.dht.announce import Announcer
from p2pflop.dht.fetch import BlobServer
from p2pflop.dht.store import FileStore
from p2pflop.dht.transfer import BLOB_PROTOCOL
from p2pflop.errors import ConfigError, first_error
from p2pflop.keys import public_key_of
from p2pflop.market.book import SECRET_BYTES, Book, Dump
from p2pflop.market.limits import limit_words
from p2pflop.market.records import Ask
from p2pflop.market.sheets import make_ask
from p2pflop.market.tape import SECRET_BYTES as TAPE_SECRET_BYTES
from p2pflop.market.tape import Tape, TapeDump
from p2pflop.node import sheets as sheets_module
from p2pflop.node import tape as tape_module
from p2pflop.node.acquaintances import Acquaintances
from p2pflop.node.api import create_app
from p2pflop.node.api_guard import Activity
from p2pflop.node.api_server import bind_api, serve_api
from p2pflop.node.books import open_books
from p2pflop.node.buy import Buyer
from p2pflop.node.config import Settings
from p2pflop.node.daemon import Daemon
from p2pflop.node.delegating import AGAIN, Delegated
from p2pflop.node.dialing import NodeDialer
from p2pflop.node.franchise import Franchise
from p2pflop.node.franchising import open_franchise
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.handing_over import HAND_OVER_S
from p2pflop.node.home import Home, open_home
from p2pflop.node.identity import Identity
from p2pflop.node.journal import Journal
from p2pflop.node.kept_file import Kept, KeptFile
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.letters import JOB_PROTOCOL, Letters
from p2pflop.node.network import HostConfig, Network
from p2pflop.node.payment_book import PaymentBook
from p2pflop.node.payment_stream import PROTOCOL as PAYMENT_PROTOCOL
from p2pflop.node.payments import Payments
from p2pflop.node.quote_stream import PROTOCOL as QUOTE_PROTOCOL
from p2pflop.node.runs import Runs
from p2pflop.node.sell import Seller
from p2pflop.node.session_messages import SESSION_PROTOCOL
from p2pflop.node.sheets import SheetService
from p2pflop.node.tape import TapeService
from p2pflop.node.warm import WarmWorkers
from p2pflop.node.worker_types import Workers
from p2pflop.node.workers import WorkerPool
from p2pflop.units import NS_PER_S, format_usd

EMBEDDED_IDLE_S: Final = 60.0
WITHDRAW_S: Final = 2.0
STOP_S: Final = 5.0
LOOK_S: Final = 60.0
CLAIMED_FLOP_PER_S: Final = 5 * 10**9
"""What an ask says of its speed before anything was measured. It ranks nothing."""

MAX_GOSSIP_WAITING: Final = 64
MAX_OPEN_FILES: Final = 65_536

_log = logging.getLogger("p2pflop.node")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


D = TypeVar("D")
_ClosableT = TypeVar("_ClosableT", bound=_Closable)


def run_node(settings: Settings) -> int:
    """Run a node until it is told to stop; its exit code. Raises P2PFlopError if it cannot."""
    _set_up_logging(settings)
    _allow_open_files()
    with open_home(settings.home, settings.network) as home:
        try:
            trio.run(_run, settings, home)
        except BaseExceptionGroup as group:
            # Every nursery on the way wraps what passes; what a person is told is the cause.
            raise first_error(group) from (group if settings.debug else None)
    return 0


async def _run(settings: Settings, home: Home) -> None:
    async with trio.open_nursery() as outer:
        stop = trio.Event()
        outer.start_soon(_listen_to_signals, stop, outer.cancel_scope)
        async with _started(settings, home, stop) as daemon:
            _announce_start(daemon)
            if isinstance(home.account, Delegated):
                outer.start_soon(_end_with_delegation, home.account, stop)
            await stop.wait()
            await _give_back(daemon)
        outer.cancel_scope.cancel()


async def _end_with_delegation(account: Delegated, stop: trio.Event) -> None:
    """Stop in order while what the account has signed for this box still serves."""
    while not stop.is_set():
        left_ns = account.left_ns(time.time_ns())
        if left_ns <= 0:
            _log.error("the account trusts this box no longer. %s", AGAIN)
            stop.set()
        with trio.move_on_after(min(left_ns / NS_PER_S, LOOK_S)):
            await stop.wait()


async def _give_back(daemon: Daemon) -> None:
    """Sell no more, let buyers have what was computed for them, and sign for what others did."""
    leases = f"leases under way: {daemon.seller.busy}"
    _log.info("stopping; %s; Ctrl-C again ends at once", leases)

    async def withdraw() -> None:
        with trio.move_on_after(WITHDRAW_S):
            await daemon.sheets.withdraw()

    with trio.move_on_after(HAND_OVER_S + STOP_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(withdraw)
            nursery.start_soon(daemon.seller.stop)
            nursery.start_soon(daemon.sessions.stop)
            await daemon.session_sales.stop()


@asynccontextmanager
async def _started(settings: Settings, home: Home, stop: trio.Event) -> AsyncIterator[Daemon]:
    """The running node. What was opened last is closed first."""
    identity = Identity(home.account, home.node, settings.network)
    async with AsyncExitStack() as stack:
        books = await _closing(stack, open_books(home.path))
        store = await stack.enter_async_context(FileStore(home.path / "store", books))
        journal = Journal(books)
        ledger_book = LedgerBook(books, home.account.public_key)
        payment_book = PaymentBook(books)
        listener = bind_api(settings.http_port)
        stack.callback(listener.socket.close)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        workers = WorkerPool(
            home.path / "plans", on_broken=stop.set, class_name=settings.class_name
        )
        await workers.start(nursery)
        await _closing(stack, workers)
        franchising = await stack.enter_async_context(open_franchise(settings, identity))
        network = await stack.enter_async_context(_open_network(settings, home))
        known = Acquaintances(ledger_book)
        book = _make_book(settings, identity, known, franchising.franchise)
        tape = Tape(secrets.token_bytes(TAPE_SECRET_BYTES), settings.network)
        await _keep(KeptFile(home.path / "book", Dump), book, stack, nursery)
        await _keep(KeptFile(home.path / "tape", TapeDump), tape, stack, nursery)
        daemon = _assemble(
            settings,
            home,
            identity,
            listener.url,
            store,
            journal,
            ledger_book,
            payment_book,
            network,
            workers,
            _open_sheets(identity, book, network, known),
            tape,
            franchising.franchise,
            nursery,
        )
        await _serve(daemon, nursery)
        service = franchising.start(network, book, nursery)
        stack.push_async_callback(survive, service.save)
        activity, ending = Activity(), trio.Event()
        app = create_app(daemon, home.token, port=listener.port, activity=activity, stopping=ending)
        await nursery.start(serve_api, app, listener, ending)
        stack.callback(ending.set)
        daemon.seller.resume()
        daemon.buyer.resume()
        daemon.sessions.resume()
        daemon.session_sales.resume()
        daemon.money.resume()
        await _sell(daemon)
        if settings.embedded:
            nursery.start_soon(_end_when_idle, daemon, activity, stop)
        _spare_the_collector()
        home.write_note(listener.url, network.peer, embedded=settings.embedded)
        yield daemon


@asynccontextmanager
async def _open_network(settings: Settings, home: Home) -> AsyncIterator[Network]:
    # Importing libp2p takes over a second: only now, while the zygote warms up beside it.
    from p2pflop.node.host import open_host

    config = HostConfig(
        home.node.seed, settings.listen, settings.network, bootstrap=settings.connect
    )
    async with open_host(config) as host:
        yield host


def _make_book(
    settings: Settings, identity: Identity, known: Acquaintances, franchise: Franchise
) -> Book:
    return Book(
        secrets.token_bytes(SECRET_BYTES),
        network=settings.network,
        own=identity.node.public_key,
        is_attested=franchise.is_attested,
        is_known=known.is_known,
        max_nodes=franchise.max_nodes,
    )


async def _keep(
    file: KeptFile[D], kept: Kept[D], stack: AsyncExitStack, nursery: trio.Nursery
) -> None:
    """Load what was saved; save it from time to time, and at the end."""
    await file.load(kept, time.time_ns())
    stack.push_async_callback(file.save, kept)
    nursery.start_soon(keep_going, file.keep, kept)


def _open_sheets(
    identity: Identity, book: Book, network: Network, known: Acquaintances
) -> SheetService:
    """The sheets, and all who keep count of peers told who is there, comes and goes."""
    sheets = SheetService(identity, book, network, time.time_ns, addresses=network.addresses)
    network.on_connect(known.met)
    network.on_disconnect(known.left)
    network.on_disconnect(sheets.left)
    for connected in network.peers():
        known.met(connected.peer)
        sheets.met(connected.peer, connected.addresses)
    return sheets


def _assemble(
    settings: Settings,
    home: Home,
    identity: Identity,
    url: str,
    store: FileStore,
    journal: Journal,
    ledger_book: LedgerBook,
    payment_book: PaymentBook,
    network: Network,
    workers: Workers,
    sheets: SheetService,
    tape: Tape,
    franchise: Franchise,
    nursery: trio.Nursery,
) -> Daemon:
    dialer = NodeDialer(network, nursery)
    tapes = TapeService(identity, tape, sheets.relay, network, time.time_ns)
    runs = Runs(journal)
    buyer = Buyer(
        identity=identity,
        store=store,
        dialer=dialer,
        sheets=sheets,
        runs=runs,
        ledger_book=ledger_book,
        letters=Letters(journal, dialer, nursery, time.time_ns),
        franchise=franchise,
        workers=workers,
        memory_bytes=settings.resolved_memory_bytes(),
        nursery=nursery,
        now_ns=time.time_ns,
    )
    seller = Seller(
        identity=identity,
        settings=settings,
        store=store,
        dialer=dialer,
        sheets=sheets,
        workers=workers,
        warm=WarmWorkers(workers, nursery),
        journal=journal,
        ledger_book=ledger_book,
        tape=tapes,
        nursery=nursery,
        now_ns=time.time_ns,
    )
    seller.allocator.on_free.append(buyer.waiting.room_freed)
    money = Payments(
        identity, payment_book, ledger_book, dialer, sheets.nodes_of, nursery, time.time_ns
    )
    return Daemon(
        settings,
        home,
        identity,
        url,
        store,
        network,
        dialer,
        Announcer(store, network),
        workers,
        sheets,
        tapes,
        runs,
        ledger_book,
        buyer,
        seller,
        money,
        franchise,
    )


async def _serve(daemon: Daemon, nursery: trio.Nursery) -> None:
    """Answer peers, and keep the book."""

    async def authorise(peer: str, token: bytes, address: bytes) -> bool:
        del token  # What may be read depends on the peer, whose key the connection has proven.
        try:
            reader = public_key_of(peer)
        except ConfigError:
            return False  # Its key is not Ed25519: no lease is with it.
        return await daemon.may_read(address, reader)

    daemon.seller.allocator.allowance = daemon.allowance
    blobs = BlobServer(daemon.store, authorise)
    daemon.dialer.handle(BLOB_PROTOCOL, blobs.handle)
    daemon.dialer.handle(JOB_PROTOCOL, daemon.seller.handle)
    daemon.dialer.handle(SESSION_PROTOCOL, daemon.session_sales.handle)
    daemon.dialer.handle(sheets_module.PROTOCOL, daemon.sheets.comparisons.answer)
    daemon.dialer.handle(tape_module.PROTOCOL, daemon.tape.comparisons.answer)
    daemon.dialer.handle(PAYMENT_PROTOCOL, daemon.money.handle)
    daemon.dialer.handle(QUOTE_PROTOCOL, daemon.buyer.wishes.handle)
    sink, source = trio.open_memory_channel[tuple[str, bytes]](MAX_GOSSIP_WAITING)
    nursery.start_soon(_drain, source)
    await daemon.network.subscribe(
        sheets_module.TOPIC, lambda _, data, source: daemon.sheets.take(data, source), sink
    )
    await daemon.network.subscribe(
        tape_module.TOPIC, lambda _, data, source: daemon.tape.take(data, source), sink.clone()
    )
    daemon.network.on_connect(daemon.buyer.letters.met)
    daemon.network.on_connect(daemon.money.met)

    def met(peer: str) -> None:
        connected = (each.addresses for each in daemon.network.peers() if each.peer == peer)
        daemon.sheets.met(peer, next(connected, ()))
        nursery.start_soon(survive, daemon.sheets.comparisons.compare_quietly, peer)
        nursery.start_soon(survive, daemon.tape.comparisons.compare_quietly, peer)

    daemon.network.on_connect(met)
    nursery.start_soon(daemon.sheets.run)
    nursery.start_soon(daemon.tape.run)
    nursery.start_soon(keep_going, daemon.announcer.run)


async def _drain(source: trio.MemoryReceiveChannel[tuple[str, bytes]]) -> None:
    # The validators have put each sheet and trade in its place; this keeps the channel empty.
    async for _ in source:
        pass


async def _sell(daemon: Daemon) -> None:
    settings = daemon.settings
    if settings.ask_nusd is None:
        await daemon.sheets.offer_nothing()
        return
    price_nusd = settings.ask_nusd

    def asks(until_ns: int) -> Sequence[Ask]:
        ask = make_ask(
            0,
            daemon.workers.class_id,
            price_nusd,
            until_ns,
            memory_bytes=settings.resolved_memory_bytes(),
            flop_per_s=CLAIMED_FLOP_PER_S,
            setup_nusd=settings.setup_nusd,
            min_charge_nusd=settings.min_charge_nusd,
            byte_price_nusd=settings.byte_price_nusd,
        )
        return (ask,)

    await daemon.sheets.offer(
        asks, daemon.network.addresses, limits=settings.limits, is_private=settings.embedded
    )


def _announce_start(daemon: Daemon) -> None:
    settings = daemon.settings
    selling = "selling nothing"
    if settings.embedded:
        selling = "embedded, for programs of its own user alone"
    elif settings.ask_nusd is not None:
        selling = f"selling at {format_usd(settings.ask_nusd)} a PFLOP"
        if settings.limits:
            selling += f", jobs up to {limit_words(settings.limits)}"
    _log.info("node %s, %s, sandbox level %d", daemon.network.peer, selling, daemon.workers.level)
    _log.info("%s", daemon.franchise.describe())
    _log.info("local programs: %s", daemon.url)
    for address in daemon.network.addresses:
        _log.info("peers: --connect %s", address)


async def _end_when_idle(daemon: Daemon, activity: Activity, stop: trio.Event) -> None:
    """An embedded node goes when nobody needs it."""
    while True:
        await trio.sleep(1)
        busy = daemon.runs.under_way() or daemon.seller.busy or daemon.sessions.cards()
        if not busy and activity.idle_s() >= EMBEDDED_IDLE_S:
            stop.set()
            return


async def _listen_to_signals(stop: trio.Event, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if stop.is_set():
                scope.cancel()
            stop.set()


async def _closing(stack: AsyncExitStack, thing: _ClosableT) -> _ClosableT:
    stack.push_async_callback(thing.aclose)
    return thing


def _allow_open_files() -> None:
    """Raise the soft limit on open files, often 1,024, to the hard one: peers and blobs need some.

    Not beyond ``MAX_OPEN_FILES``: where there is no limit, some programs close each in turn.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _spare_the_collector() -> None:
    """What was imported lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def _set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.log_json else _PLAIN)
    logging.basicConfig(
        level=logging.DEBUG if settings.debug else logging.INFO, handlers=[handler], force=True
    )
    if not settings.debug:
        for name in ("libp2p", "multiaddr", "hypercorn", "httpx", "p2pflop.libp2p"):
            logging.getLogger(name).setLevel(logging.ERROR)


_PLAIN: Final = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry)
