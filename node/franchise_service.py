"""Neighbours tell each other who is attested: when they meet, in turn, and soon after news.

A node brings the proofs of its own account, so that a buyer which can reach no registry knows a
provider as soon as it meets it, and asks for those of accounts in its book of which it has none.
What comes is verified, one proof at a time, and bounded: by a frame's size, by how often a peer may
come, and by how much of what it tells may be wrong before nothing of it is looked at for a while.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

import trio

from p2pflop.dht.planes import Stream
from p2pflop.errors import ConfigError, P2PFlopError, ProtocolError, ProviderError, StoreError
from p2pflop.keys import public_key_of
from p2pflop.market.book import Book
from p2pflop.market.rates import Rates
from p2pflop.market.records import Rejected
from p2pflop.market.sheets import check_delegation
from p2pflop.node.franchise import WARN_DAYS, Franchise, is_fault
from p2pflop.node.franchise_file import FranchiseFile
from p2pflop.node.franchise_stream import (
    MAX_TOLD_ATTESTATIONS,
    MAX_TOLD_BYTES,
    MAX_TOLD_FORKS,
    MAX_TOLD_REVOCATIONS,
    MAX_WANTED,
    PROTOCOL,
    Told,
)
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.identity import Identity
from p2pflop.node.printable import printable
from p2pflop.node.sheets import Gossip
from p2pflop.units import KIB, NS_PER_S, counted
from p2pflop.wire import decode, encode

TALK_S: Final = 10.0
CLOSE_S: Final = 2.0
ROUND_S: Final = 20.0
SOON_S: Final = 1.0
SAVE_S: Final = 5.0
TOLD_AT_ONCE: Final = 3
OWN_NODES_AT_ONCE: Final = 4
MAX_TALKS: Final = 16
"""Answered at once."""
TALKS_PER_S: Final = 0.5
TALKS_BURST: Final = 8
"""That one peer may begin."""
MAX_FAULTS: Final = 8
FORGIVEN_S: Final = 60.0
MAX_ATTESTATIONS_BYTES: Final = 96 * KIB
MAX_REVOCATIONS_BYTES: Final = 48 * KIB
"""In one message; what is left of ``MAX_TOLD_BYTES`` is for evidence, heads and keys."""
MAX_LEFT_OUT: Final = 256

_log = logging.getLogger(__name__)


class FranchiseService:
    """The conversations about registries, and the file that remembers them.

    ``book`` says who sells, and so whose proofs are wanted.
    """

    def __init__(
        self,
        franchise: Franchise,
        file: FranchiseFile,
        identity: Identity,
        host: Gossip,
        book: Book,
        now_ns: Callable[[], int],
    ) -> None:
        self.franchise = franchise
        self._file = file
        self._identity = identity
        self._host = host
        self._book = book
        self._now_ns = now_ns
        self._rates = Rates(TALKS_PER_S, TALKS_BURST)
        self._faults = Rates(1 / FORGIVEN_S, MAX_FAULTS)
        self._talks = 0
        self._said_days: int | None = None
        self._accounts: dict[str, bytes] = {}  # What a connected peer proved: it may sell nothing.
        self._random = secrets.SystemRandom()
        self._news = trio.Event()
        franchise.on_news.append(self._hurry)

    async def run(self) -> None:
        """Tell neighbours and write to disk, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, self._tell_in_turn)
            nursery.start_soon(keep_going, self._keep)

    async def save(self) -> None:
        """Write what is new to disk. Raises StoreError: then it is written with what follows."""
        changes = self.franchise.take_changes()
        if not changes:
            return
        try:
            await self._file.save(changes)
        except StoreError:
            self.franchise.keep_changes(changes)
            raise

    async def on_connect(self, peer: str) -> None:
        """Tell a peer that is new here; never raises for what the peer does."""
        await self._tell_quietly(peer)

    def left(self, peer: str) -> None:
        """It is connected no more: what it thinks of this account is of no use."""
        self.franchise.left_out_by.pop(peer, None)
        self._accounts.pop(peer, None)

    async def tell(self, peer: str) -> None:
        """One conversation, as the dialler. Raises ProviderError, ProtocolError."""
        with trio.move_on_after(TALK_S):
            stream = await self._host.open(peer, PROTOCOL)
            try:
                await stream.send(encode(self._told_to(peer)))
                await self._hear(stream, answering=False)
                return
            finally:
                with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
                    await stream.aclose()
        raise ProviderError(f"{peer} took over {TALK_S:.0f} s")

    async def answer(self, stream: Stream) -> None:
        """The listener's side. Raises ProviderError, ProtocolError."""
        now_s = self._now_ns() / NS_PER_S
        if self._talks >= MAX_TALKS or not self._rates.allow(stream.peer, now_s):
            raise ProviderError("too many conversations about registries")
        self._talks += 1
        try:
            with trio.move_on_after(TALK_S):
                await self._hear(stream, answering=True)
                return
        finally:
            self._talks -= 1
        raise ProviderError(f"{stream.peer} took over {TALK_S:.0f} s")

    def is_shunned(self, peer: str) -> bool:
        """Whether nothing that ``peer`` tells is looked at."""
        return self._faults.left(peer, self._now_ns() / NS_PER_S) < 1

    # What is said

    def _told_to(self, peer: str, account: bytes = b"", wanted: Sequence[bytes] = ()) -> Told:
        franchise = self.franchise
        news, revocations = franchise.news()
        own = franchise.proofs_for([franchise.account])
        proofs = list(dict.fromkeys([*own, *franchise.proofs_for(wanted), *reversed(news)]))
        return Told(
            version=1,
            delegation=self._identity.delegation(self._now_ns()),
            slots=franchise.slots,
            trusts=franchise.roll.issuers,
            standing=self._standing_of(peer, account),
            heads=tuple(franchise.heads()),
            attestations=tuple(_fitting(proofs[:MAX_TOLD_ATTESTATIONS], MAX_ATTESTATIONS_BYTES)),
            revocations=tuple(_fitting(revocations[-MAX_TOLD_REVOCATIONS:], MAX_REVOCATIONS_BYTES)),
            forks=tuple(franchise.forks()[:MAX_TOLD_FORKS]),
            wanted=tuple(self._wanted()),
        )

    def _standing_of(self, peer: str, account: bytes) -> str:
        """Why asks of that peer are left out here, if it has any or says whose node it is."""
        with suppress(ConfigError):
            sheet = self._book.get(public_key_of(peer), self._now_ns())
            account = account or (b"" if sheet is None else sheet.account)
        account = account or self._accounts.get(peer, b"")
        return self.franchise.standing_of(account) if account else ""

    def _wanted(self) -> list[bytes]:
        """Some accounts that sell and are not known to be attested."""
        if not self.franchise.is_strict:
            return []
        now_ns = self._now_ns()
        accounts = {sheet.account for sheet in self._book.view(now_ns).sheets}
        unknown = [each for each in sorted(accounts) if not self.franchise.admits(each, now_ns)]
        return self._random.sample(unknown, min(MAX_WANTED, len(unknown)))

    # What is heard

    async def _hear(self, stream: Stream, *, answering: bool) -> None:
        if self.is_shunned(stream.peer):
            raise ProviderError(f"{stream.peer} has told too much that is wrong")
        try:
            told = decode(Told, await stream.receive(MAX_TOLD_BYTES))
        except ProtocolError as error:
            self._fault(stream.peer)
            raise ProtocolError(error.message, peer=stream.peer) from error
        account = self._account_of(stream.peer, told)
        if account and (stream.peer in self._accounts or len(self._accounts) < MAX_LEFT_OUT):
            self._accounts[stream.peer] = account
        self._note_standing(stream.peer, told)
        await self._take(stream.peer, told)
        if answering:
            await stream.send(encode(self._told_to(stream.peer, account, told.wanted)))

    def _account_of(self, peer: str, told: Told) -> bytes:
        """Whose node ``peer`` is; empty if it does not prove it."""
        now_ns = self._now_ns()
        with suppress(ConfigError):
            node = public_key_of(peer)
            account = check_delegation(
                told.delegation, node, now_ns, now_ns, self._identity.network
            )
            if not isinstance(account, Rejected):
                if account == self.franchise.account and node != self._identity.node.public_key:
                    self.franchise.note_box(node, told.slots)
                return account
        return b""

    def _note_standing(self, peer: str, told: Told) -> None:
        left_out = self.franchise.left_out_by
        reason = printable(told.standing)
        if not reason:
            left_out.pop(peer, None)
        elif len(left_out) < MAX_LEFT_OUT or peer in left_out:
            if left_out.get(peer) != reason:
                _log.info("%s leaves the asks here out: %s", peer, reason)
            left_out[peer] = reason

    async def _take(self, peer: str, told: Told) -> None:
        """Verify what is told, stopping at the first thing that nobody honest tells."""
        franchise = self.franchise
        if not franchise.is_strict:
            return
        steps: list[tuple[Callable[[bytes], str], tuple[bytes, ...]]] = [
            (franchise.take_fork, told.forks),
            (franchise.take_revocation, told.revocations),
            (franchise.take, told.attestations),
            (franchise.take_peers_head, told.heads),
        ]
        for take, proofs in steps:
            for proof in proofs:
                reason = take(proof)
                if is_fault(reason):
                    self._fault(peer)
                    raise ProtocolError(f"what it tells is wrong: {printable(reason)}", peer=peer)
                await trio.lowlevel.checkpoint()

    def _fault(self, peer: str) -> None:
        self._faults.allow(peer, self._now_ns() / NS_PER_S)

    # In turn

    def say_days_left(self) -> None:
        """Say in the log for how long this account is attested, when that has changed: daily."""
        days, said = self.franchise.days_left(), self._said_days
        self._said_days = days
        if days == said:
            return
        if days is None:
            _log.warning("this account is attested no more: strict nodes leave its asks out")
        else:
            level = logging.WARNING if days < WARN_DAYS else logging.INFO
            _log.log(level, "this account is attested for %s", counted(days, "more day"))

    def _hurry(self) -> None:
        self._news.set()

    async def _tell_in_turn(self) -> None:
        while True:
            self._news = trio.Event()
            with trio.move_on_after(ROUND_S * (0.75 + self._random.random() / 4)):
                await self._news.wait()
                await trio.sleep(SOON_S)
            self.franchise.expire()
            self.say_days_left()
            if self.franchise.is_strict:
                async with trio.open_nursery() as nursery:
                    for peer in self._chosen():
                        nursery.start_soon(survive, self._tell_quietly, peer)

    def _chosen(self) -> set[str]:
        """Some neighbours, and some nodes of this account, connected or not."""
        own = self._identity.node.public_key
        connected = [each.peer for each in self._host.peers()]
        boxes = [
            sheet.peer
            for sheet in self._book.view(self._now_ns()).sheets
            if sheet.account == self.franchise.account and sheet.node != own
        ]
        chosen = self._random.sample(connected, min(TOLD_AT_ONCE, len(connected)))
        chosen += self._random.sample(boxes, min(OWN_NODES_AT_ONCE, len(boxes)))
        return set(chosen)

    async def _tell_quietly(self, peer: str) -> None:
        if self.is_shunned(peer):
            return
        try:
            await self.tell(peer)
        except P2PFlopError as error:
            _log.info("registries not talked about with %s: %s", peer, printable(error))

    async def _keep(self) -> None:
        while True:
            await trio.sleep(SAVE_S)
            await self.save()


def _fitting(proofs: Iterable[bytes], room_bytes: int) -> list[bytes]:
    """As many as there is room for."""
    fitting = []
    for proof in proofs:
        room_bytes -= len(proof)
        if room_bytes >= 0:
            fitting.append(proof)
    return fitting
