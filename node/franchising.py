"""A node's dealings with registries, put together: what is on disk, neighbours, and watches."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from p2pflop.dht.planes import Stream
from p2pflop.market.book import Book
from p2pflop.node.config import Settings
from p2pflop.node.enrolling import Applicant, Enrolling
from p2pflop.node.franchise import Franchise
from p2pflop.node.franchise_file import FranchiseFile
from p2pflop.node.franchise_service import FranchiseService
from p2pflop.node.franchise_stream import PROTOCOL
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.identity import Identity
from p2pflop.node.network import Network
from p2pflop.node.registry_client import Fetch, HttpFetch
from p2pflop.node.registry_watch import RegistryWatch


@dataclass(frozen=True, slots=True)
class Franchising:
    """A franchise and the file that it came from."""

    franchise: Franchise
    file: FranchiseFile
    identity: Identity
    settings: Settings
    now_ns: Callable[[], int]

    def start(
        self,
        network: Network,
        book: Book,
        nursery: trio.Nursery,
        fetch: Callable[[str], Fetch] = HttpFetch,
    ) -> FranchiseService:
        """Talk with neighbours and ask the registries, in ``nursery``."""
        service = FranchiseService(
            self.franchise, self.file, self.identity, network, book, self.now_ns
        )

        async def answer(stream: Stream) -> None:
            await service.answer(stream)

        def met(peer: str) -> None:
            if self.franchise.is_strict:
                nursery.start_soon(survive, service.on_connect, peer)

        network.handle(PROTOCOL, answer)
        network.on_connect(met)
        network.on_disconnect(service.left)
        for connected in network.peers():
            met(connected.peer)
        if self.franchise.is_strict:
            nursery.start_soon(service.run)
        for issuer, url in self.settings.registries().items():
            watch = self._watch(issuer, fetch(url))
            nursery.start_soon(keep_going, watch.run)
        return service

    def _watch(self, issuer: bytes, fetch: Fetch) -> RegistryWatch:
        settings = self.settings
        applicant = None
        if settings.enroll and not settings.embedded:
            applicant = Applicant(settings.contact, settings.place, settings.agree)
        enrolling = Enrolling(
            self.franchise, issuer, self.identity.account, fetch, applicant, self.now_ns
        )
        return RegistryWatch(self.franchise, issuer, fetch, enrolling, self.now_ns)


@asynccontextmanager
async def open_franchise(
    settings: Settings, identity: Identity, now_ns: Callable[[], int] = time.time_ns
) -> AsyncIterator[Franchising]:
    """What the home knows of the registries that ``settings`` trust, verified again."""
    file = FranchiseFile(Path(settings.home))
    try:
        registries = settings.registries()
        franchise = Franchise(
            registries,
            identity.account.public_key,
            identity.node.public_key,
            now_ns,
            slots=settings.slots,
            network=settings.network,
        )
        kept = file.read(registries)
        if kept:
            await trio.to_thread.run_sync(franchise.restore, kept)
            await file.forget_expired(franchise.roll)
        for key in settings.forgive:
            if bytes.fromhex(key) in registries:
                franchise.forgive(bytes.fromhex(key))
        yield Franchising(franchise, file, identity, settings, now_ns)
    finally:
        await file.aclose()
