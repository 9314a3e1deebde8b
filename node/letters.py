"""What is said to a provider outside a conversation: on a stream of its own.

A **letter** is what a stretch that is over owes its provider: the last countersignature. It is in
the journal from the moment it is signed until the provider has acknowledged it. It is brought again
and again for a day, and after that whenever the provider connects, or this node starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from p2pflop.dht.planes import Dialer
from p2pflop.errors import ProtocolError, ProviderError, StoreError
from p2pflop.node import messages as m
from p2pflop.node.guard import survive
from p2pflop.node.journal import Journal, Letter
from p2pflop.node.printable import printable
from p2pflop.node.session_messages import SESSION_PROTOCOL
from p2pflop.units import NS_PER_S

JOB_PROTOCOL: Final = "/p2pflop/job/1"
SESSION_PREFIX: Final = "session/"
"""Before the names of letters about leases of sessions, which go over their protocol."""
FAREWELL_S: Final = 3.0
WORD_S: Final = 10.0
MAX_WORDS_HEARD: Final = 64
DELIVER_WITHIN_NS: Final = 24 * 3600 * NS_PER_S
DELIVER_AGAIN_S: Final = 1.0
MAX_DELIVER_AGAIN_S: Final = 300.0
GATHER_S: Final = 1.0
"""Acknowledgements are written together: one that a crash takes back costs a letter more."""

_log = logging.getLogger(__name__)


class Letters:
    """The letters of one node that are under way."""

    def __init__(
        self, journal: Journal, dialer: Dialer, nursery: trio.Nursery, now_ns: Callable[[], int]
    ) -> None:
        self._journal = journal
        self._dialer = dialer
        self._nursery = nursery
        self._now_ns = now_ns
        self._acknowledged: list[str] = []
        self._under_way: set[str] = set()
        self._left: set[str] = set()

    def resume(self) -> None:
        """Bring what a restart found."""
        for letter in self._journal.letters():
            self._nursery.start_soon(survive, self.deliver, letter)

    def met(self, peer: str) -> None:
        """A peer has connected: it may be one that was away for too long."""
        if peer in self._left:
            self._left.discard(peer)
            for letter in self._journal.letters():
                if letter.peer == peer:
                    self._nursery.start_soon(survive, self.deliver, letter)

    def acknowledge(self, job: str) -> None:
        """The provider has what it needs: its letter is of no more use."""
        self._acknowledged.append(job)
        if len(self._acknowledged) == 1:
            self._nursery.start_soon(survive, self._write)

    async def deliver(self, letter: Letter, after: trio.Event | None = None) -> None:
        """Bring a countersignature to a provider that is away, for as long as a day.

        The ledger here says already that the money is owed; this makes the provider's say so.
        ``after`` is the end of what is being said to that provider: another stream would cut it.
        """
        if letter.job in self._under_way:
            return
        self._under_way.add(letter.job)
        if after is not None:
            await after.wait()
        wait_s = DELIVER_AGAIN_S
        try:
            protocol = JOB_PROTOCOL
            if letter.job.startswith(SESSION_PREFIX):
                protocol = SESSION_PROTOCOL
            word = m.Countersigned(letter.wire)
            while not await leave_word(self._dialer, letter.peer, word, protocol):
                if self._now_ns() > letter.at_ns + DELIVER_WITHIN_NS:
                    _log.warning("%s has not acknowledged what is owed to it", letter.peer)
                    self._left.add(letter.peer)
                    return
                await trio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_DELIVER_AGAIN_S)
            self.acknowledge(letter.job)
        finally:
            self._under_way.discard(letter.job)

    async def _write(self) -> None:
        await trio.sleep(GATHER_S)
        jobs, self._acknowledged = self._acknowledged, []
        try:
            await self._journal.forget_letters(jobs)
        except StoreError as error:
            _log.error("acknowledgements are not on disk, and will be asked for again: %s", error)


async def leave_word(
    dialer: Dialer, peer: str, message: m.Message, protocol: str = JOB_PROTOCOL
) -> bool:
    """Say one thing on a stream of its own; whether it was answered with ``Settled``."""
    with trio.move_on_after(WORD_S):
        try:
            stream = await dialer.open(peer, protocol)
            try:
                await stream.send(m.encode_message(message))
                for _ in range(MAX_WORDS_HEARD):
                    if isinstance(m.decode_message(await stream.receive(), peer), m.Settled):
                        return True
            finally:
                with trio.CancelScope(deadline=trio.current_time() + FAREWELL_S, shield=True):
                    await stream.aclose()
        except (ProviderError, ProtocolError) as error:
            _log.debug("%s was not told: %s", peer, printable(error))
    return False
