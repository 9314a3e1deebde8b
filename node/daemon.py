"""The node as its own user sees it: one object that puts the rooms together.

``Daemon`` is what the HTTP API asks (``NodeService``). It owns nothing that computes: runs are the
buyer's, leases the seller's, sheets the sheet service's, blobs the store's.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final

import trio

from p2pflop.dht.announce import Announcer
from p2pflop.dht.blobs import BlobInfo, Store, delete_own
from p2pflop.dht.fetch import fetch
from p2pflop.errors import BlobNotFoundError, ProviderError, StoreError
from p2pflop.franchise.records import DAY_NS
from p2pflop.job.meter import METER_ID
from p2pflop.market.limits import limit_label
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.market.views import BookView
from p2pflop.market.wishes import depth
from p2pflop.node.buy import Buyer
from p2pflop.node.config import Settings
from p2pflop.node.delegating import AGAIN, Delegated
from p2pflop.node.dialing import NodeDialer
from p2pflop.node.franchise import WARN_DAYS, Franchise
from p2pflop.node.home import Home
from p2pflop.node.identity import Identity
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.market_view import classes, countersigned, describe_take
from p2pflop.node.network import Network
from p2pflop.node.packs import Packs
from p2pflop.node.payments import Payments
from p2pflop.node.runs import Runs
from p2pflop.node.sell import Seller
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.session_graphs import Graphs
from p2pflop.node.session_script import ScriptLine
from p2pflop.node.session_sell import SessionSeller
from p2pflop.node.session_service import SessionBuyer
from p2pflop.node.session_state import session_receipts
from p2pflop.node.sheets import SheetService
from p2pflop.node.statements import make_statement
from p2pflop.node.tape import TapeService
from p2pflop.node.worker_types import Workers
from p2pflop.units import MIB, counted

SAFE_LEVEL: Final = 2
ASK_NEIGHBOURS: Final = 8
WARN_NS: Final = WARN_DAYS * DAY_NS


@dataclass(slots=True)
class Daemon:
    """Everything that a running node consists of."""

    settings: Settings
    home: Home
    identity: Identity
    url: str
    store: Store
    network: Network
    dialer: NodeDialer
    announcer: Announcer
    workers: Workers
    sheets: SheetService
    tape: TapeService
    runs: Runs
    ledger_book: LedgerBook
    buyer: Buyer
    seller: Seller
    money: Payments
    franchise: Franchise
    packs: Packs = field(init=False)
    sessions: SessionBuyer = field(init=False)
    session_sales: SessionSeller = field(init=False)

    def __post_init__(self) -> None:
        self.packs = Packs(self.buyer)
        graphs = Graphs()
        seller = self.seller
        self.sessions = SessionBuyer(self.buyer, seller.journal, self.workers, graphs, seller.blobs)
        self.session_sales = SessionSeller(self.seller, graphs)

    async def status(self) -> Json:
        """See NodeService."""
        return {
            "version": version("p2pflop"),
            "url": self.url,
            "home": str(self.home.path),
            "network": self.settings.network,
            "peer": self.network.peer,
            "account": self.identity.account.public_key.hex(),
            "addresses": list(self.network.addresses),
            "peers": len(self.network.peers()),
            "embedded": self.settings.embedded,
            "ask_nusd": self.settings.ask_nusd,
            "memory_bytes": self.settings.resolved_memory_bytes(),
            "slots": self.settings.slots,
            "leases": self.seller.busy,
            "class_id": self.workers.class_id.hex(),
            "sandbox_level": self.workers.level,
            "selling": self.sheets.selling,
            "sessions": self.sessions.cards(),
            "franchise": self.franchise.report(),
            "uptime_ns": time.monotonic_ns() - self.seller.started_ns,
        }

    async def submit(
        self, body: bytes, options: SubmitOptions, inputs: Sequence[bytes] = ()
    ) -> str:
        """See NodeService."""
        return await self.buyer.submit(body, options, inputs)

    async def submit_pack(self, body: bytes, options: SubmitOptions) -> Json:
        """See NodeService."""
        return await self.packs.submit(body, options)

    async def unpack(self, run_id: str) -> list[Json]:
        """See NodeService."""
        return await self.packs.unpack(run_id)

    async def quote(self, body: bytes, options: SubmitOptions) -> Json:
        """See NodeService."""
        return await self.buyer.quote(body, options)

    async def jobs(self, *, parts: bool = False) -> list[Json]:
        """See NodeService."""
        self.sessions.cards()
        return self.runs.cards(parts=parts)

    async def sales(self) -> list[Json]:
        """See NodeService."""
        return [*self.seller.cards(), *self.session_sales.cards()]

    async def session(self, line: ScriptLine) -> None:
        """See NodeService."""
        await self.sessions.serve(line)

    async def job(self, run_id: str) -> Json:
        """See NodeService."""
        self.sessions.cards()
        return self.runs.get(run_id).card

    async def job_file(self, run_id: str) -> bytes:
        """See NodeService."""
        return self.buyer.job_file(run_id)

    async def result_record(self, run_id: str) -> bytes:
        """See NodeService."""
        return self.buyer.result_record(run_id)

    async def evidence(self, run_id: str) -> bytes:
        """See NodeService."""
        return self.buyer.evidence(run_id)

    def events(self, run_id: str, after_seq: int) -> AsyncIterator[list[Json]]:
        """See NodeService."""
        return self.runs.follow(run_id, after_seq)

    async def cancel(self, run_id: str) -> None:
        """See NodeService."""
        self.runs.get(run_id).cancel_requested.set()

    async def book(self) -> list[Json]:
        """See NodeService. Cheapest price first; a strict node leaves out who is not attested."""
        now_ns = time.time_ns()
        admitted = self.franchise.admitted(now_ns)
        asks = [
            {
                "provider": sheet.peer,
                "account": sheet.account.hex(),
                "own": sheet.node == self.identity.node.public_key,
                "ask": ask.number,
                "sheet": sheet.sheet.number,
                "class_id": ask.class_id.hex(),
                "price_nusd": ask.price_nusd,
                "setup_nusd": ask.setup_nusd,
                "min_charge_nusd": ask.min_charge_nusd,
                "byte_price_nusd": ask.byte_price_nusd,
                "memory_bytes": ask.memory_bytes,
                "flop_per_s": ask.flop_per_s,
                "limits": {limit_label(n): most for n, most in sheet.limits_of(ask)},
                "valid_until_ns": ask.valid_until_ns,
            }
            for sheet in self.sheets.view(now_ns).sheets
            if sheet.account in admitted
            for ask in sheet.sheet.asks
        ]
        return sorted(asks, key=lambda ask: (ask["price_nusd"], ask["provider"]))

    async def wishes(self) -> list[Json]:
        """See NodeService. Highest limit first in each class."""
        now_ns = time.time_ns()
        newest = self.sheets.newest
        own = {
            (level.class_id, level.price_nusd): level.wishes
            for level in depth([] if newest is None else [newest], now_ns)
        }
        return [
            {
                "class_id": "" if level.class_id == ZERO_HASH else level.class_id.hex(),
                "price_nusd": level.price_nusd,
                "wishes": level.wishes,
                "own": own.get((level.class_id, level.price_nusd), 0),
                "flop": level.flop,
                "limit_nusd": level.limit_nusd,
            }
            for level in depth(self.sheets.book.view(now_ns).sheets, now_ns)
        ]

    async def market(self) -> Json:
        """See NodeService."""
        now_ns = time.time_ns()
        view = self.sheets.book.view(now_ns)
        if self.franchise.is_strict:
            admitted = self.franchise.admitted(now_ns)
            view = BookView(tuple(s for s in view.sheets if s.account in admitted), now_ns)
        shown = classes(view, self.tape.tape.trades(now_ns), now_ns)
        return {"classes": shown, "take": await self._take()}

    async def trades(self, since_ns: int) -> list[Json]:
        """See NodeService."""
        return self.tape.listed(since_ns)

    def trade_events(self, after_seq: int) -> AsyncIterator[list[Json]]:
        """See NodeService."""
        return self.tape.follow(after_seq)

    async def _take(self) -> Json:
        journal, network = self.seller.journal, self.identity.network

        def receipts() -> list[Receipt]:
            return [*countersigned(journal), *session_receipts(journal, network)]

        return describe_take(await self.ledger_book.take(receipts))

    async def peers(self) -> list[Json]:
        """See NodeService."""
        return [
            {
                "peer": peer.peer,
                "addresses": list(peer.addresses),
                "inbound": peer.inbound,
                "rtt_ns": peer.rtt_ns,
            }
            for peer in self.network.peers()
        ]

    async def ledger(self) -> Json:
        """See NodeService."""
        return {**self.ledger_book.report(), "take": await self._take()}

    async def statement(self, account: bytes, since_ns: int) -> Json:
        """See NodeService."""
        own = self.identity.account.public_key
        return await make_statement(self.ledger_book, own, account, since_ns)

    async def payments(self) -> list[Json]:
        """See NodeService."""
        return self.money.listed()

    async def pay(self, payment: bytes, account: bytes, amount_nusd: int, reference: str) -> Json:
        """See NodeService."""
        return await self.money.pay(payment, account, amount_nusd, reference)

    async def receive(
        self, payment: bytes, account: bytes, amount_nusd: int, reference: str
    ) -> Json:
        """See NodeService."""
        return await self.money.receive(payment, account, amount_nusd, reference)

    async def acknowledge(self, payment: bytes) -> Json:
        """See NodeService."""
        return await self.money.acknowledge(payment)

    async def refuse(self, payment: bytes, reason: str) -> Json:
        """See NodeService."""
        return await self.money.refuse(payment, reason)

    async def connect(self, multiaddr: str) -> Json:
        """See NodeService."""
        return {"peer": await self.network.connect(multiaddr)}

    async def find_blob(self, address: bytes, *, timeout_s: float) -> BlobInfo:
        """See NodeService. What the DHT says first, then the neighbours, in case they know."""
        info = await self.store.stat(address)
        if info is not None:
            return info
        with trio.move_on_after(timeout_s):
            try:
                located = await self.announcer.locate(address)
            except ProviderError:
                located = []
            neighbours = [peer.peer for peer in self.network.peers()[:ASK_NEIGHBOURS]]
            sources = [
                peer for peer in dict.fromkeys(located + neighbours) if peer != self.network.peer
            ]
            if sources:
                return await fetch(self.store, address, sources, self.dialer)
            raise BlobNotFoundError(
                f"no blob {address.hex()} here, and no peer to ask",
                hint="Connect to a peer: p2pflop node --connect MULTIADDR.",
            )
        raise BlobNotFoundError(
            f"blob {address.hex()} was not found within {timeout_s:.0f} s",
            hint="Is it public (p2pflop put --public), and the node that has it running?",
        )

    def allowance(self) -> int:
        """How many leases this node may run at once, by what its account is attested for."""
        account = self.identity.account.public_key
        return self.franchise.own_slots(self.sheets.book.sellers_of(account, time.time_ns()))

    async def may_read(self, address: bytes, reader: bytes) -> bool:
        """Whether the peer with that key may have a blob: public, granted, or of a lease of its."""
        return (
            self.buyer.lends(address, reader)
            or self.sessions.lends(address, reader)
            or await self.seller.shows(address, reader)
            or await self.store.may_read(address, reader)
        )

    async def set_public(self, address: bytes) -> None:
        """See NodeService."""
        await self.store.set_public(address)
        self.announcer.announce(address)

    async def delete_blob(self, address: bytes) -> BlobInfo:
        """See NodeService."""
        if self.seller.blobs.needs(address):
            raise StoreError(
                f"a job that runs here needs blob {address.hex()}",
                hint="Try again when it is over.",
            )
        if self.sessions.needs(address):
            raise StoreError(
                f"a session under way needs blob {address.hex()}",
                hint="Try again when its script has ended.",
            )
        run = self.buyer.needed_by(address)
        if run:
            raise StoreError(
                f"run {run} needs blob {address.hex()} as an input",
                hint=f"Try again when it is over, or end it: p2pflop cancel {run}.",
            )
        return await delete_own(self.store, address)

    async def doctor(self) -> Json:
        """See NodeService."""
        pool = self.workers.statistics()
        free_bytes = shutil.disk_usage(self.home.path).free
        problems = [
            problem
            for problem, holds in (
                (
                    f"sandbox level {pool.level} is below {SAFE_LEVEL}: no strangers' jobs",
                    pool.level < SAFE_LEVEL,
                ),
                ("the workers crashed too often; asks are withdrawn", pool.broken),
                (
                    "no peers: nobody can buy from or sell to this node",
                    not self.network.peers() and not self.settings.embedded,
                ),
                (f"only {free_bytes // MIB} MiB free in the home", free_bytes < 512 * MIB),
            )
            if holds
        ]
        problems += self.franchise.problems(selling=self.sheets.selling)
        account = self.identity.account
        if isinstance(account, Delegated) and account.left_ns(time.time_ns()) < WARN_NS:
            days = account.left_ns(time.time_ns()) // DAY_NS
            problems.append(f"the account trusts this box for {counted(days, 'more day')}. {AGAIN}")
        return {
            "problems": problems,
            "home": str(self.home.path),
            "url": self.url,
            "addresses": list(self.network.addresses),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": {name: version(name) for name in ("p2pflop", "tinygrad", "libp2p", "trio")},
            "class": {
                "id": self.workers.class_id.hex(),
                **{
                    field: getattr(self.workers.descriptor, field)
                    for field in self.workers.descriptor.__struct_fields__
                },
            },
            "meter": METER_ID,
            "sandbox": {"level": pool.level, "notes": list(pool.notes)},
            "workers": {
                "plans_lowered": pool.plans_lowered,
                "plans_reused": pool.plans_reused,
                "crashes": pool.crashes,
            },
            "free_bytes": free_bytes,
        }
