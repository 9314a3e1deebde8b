"""Asking one registry, again and again: its head, whom it attests, whom it revoked, how we stand.

Nobody waits for this. A registry that does not answer is asked again, at longer and longer
intervals; until attestations expire nothing changes for anybody. What it tells is taken only after
it has shown that its log continues the one that was seen before, here or by peers: if it can not,
and what it shows instead contradicts its own signatures, that is the evidence of two histories.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Final

import trio

from p2pflop.errors import ConfigError, P2PFlopError, ProtocolError
from p2pflop.franchise.forks import contradict, make_fork, open_past_head
from p2pflop.franchise.merkle import roots_by_consistency
from p2pflop.franchise.records import Head
from p2pflop.market.records import Rejected
from p2pflop.node.enrolling import Enrolling
from p2pflop.node.franchise import Franchise, is_fault
from p2pflop.node.printable import printable
from p2pflop.node.registry_client import (
    CertificatesReply,
    ConsistencyReply,
    Fetch,
    HeadReply,
    HeadsReply,
    ProofsReply,
    SummaryReply,
    ask,
)
from p2pflop.units import NS_PER_S, counted
from p2pflop.wire import Sealed

POLL_S: Final = 30.0
WAITING_S: Final = 3.0
"""While the account waits for what the registry decides about it."""
AGAIN_S: Final = 5.0
MAX_AGAIN_S: Final = 300.0
STALE_HEAD_NS: Final = 3_600 * NS_PER_S
"""A registry signs a head every ten minutes: one that shows none so long may hide decisions."""
MAX_PAGES: Final = 1_024
"""Read at one poll."""

_log = logging.getLogger(__name__)


class RegistryWatch:
    """``issuer`` is the root key of a registry that ``franchise`` trusts."""

    def __init__(
        self,
        franchise: Franchise,
        issuer: bytes,
        fetch: Fetch,
        enrolling: Enrolling,
        now_ns: Callable[[], int],
    ) -> None:
        self._franchise = franchise
        self._issuer = issuer
        self._fetch = fetch
        self._enrolling = enrolling
        self._now_ns = now_ns
        self._random = secrets.SystemRandom()
        self._known = False

    async def run(self) -> None:
        """Poll until cancelled."""
        watched, again_s = self._franchise.watched[self._issuer], AGAIN_S
        while True:
            try:
                await self.poll()
            except (P2PFlopError, LookupError) as error:
                trouble = error.message if isinstance(error, P2PFlopError) else f"no {error} there"
                if trouble != watched.trouble:
                    _log.warning("registry %s: %s", self._issuer.hex()[:16], printable(trouble))
                watched.trouble, pause_s = printable(trouble), again_s
                again_s = min(2 * again_s, MAX_AGAIN_S)
            else:
                if watched.trouble:
                    _log.info("registry %s answers again", self._issuer.hex()[:16])
                watched.trouble, again_s = "", AGAIN_S
                pause_s = WAITING_S if self._enrolling.is_waiting else POLL_S
            await trio.sleep(pause_s * (0.75 + self._random.random() / 4))

    async def poll(self) -> None:
        """Ask once for all that is new.

        Raises ProviderError, ProtocolError, ConfigError; LookupError for what is not there.
        """
        if not self._known:
            await self._introduce()
        if self._franchise.roll.fork(self._issuer) is not None:
            await self._learn_certificates()  # One of them may say that its key was stolen.
        if self._franchise.roll.fork(self._issuer) is None:
            await self._follow()
        await self._enrolling.step()
        self._franchise.watched[self._issuer].asked_ns = self._now_ns()
        head = self._open(self._franchise.notes(self._issuer).head)
        if head is not None and head.record.at_ns + STALE_HEAD_NS < self._now_ns():
            hours = counted((self._now_ns() - head.record.at_ns) // STALE_HEAD_NS, "hour")
            raise ProtocolError(
                f"its newest head is {hours} old: it, or this machine's clock, is not well"
            )

    async def _introduce(self) -> None:
        """See that it is the registry that is trusted, of this network."""
        summary = await ask(self._fetch, SummaryReply, "/v1/registry")
        if summary.issuer != self._issuer.hex():
            raise ConfigError(
                f"the registry there has the root key {summary.issuer}, and "
                f"{self._issuer.hex()} is trusted"
            )
        if summary.network != self._franchise.network:
            raise ConfigError(f"the registry is for the network {summary.network!r}")
        self._known = True

    async def _follow(self) -> None:
        franchise, issuer = self._franchise, self._issuer
        told = bytes.fromhex((await ask(self._fetch, HeadReply, "/v1/head")).head)
        if told == franchise.notes(issuer).head and not franchise.unlinked[issuer]:
            return
        await self._learn_certificates()
        reason = franchise.take_head(issuer, told)
        if reason:
            raise ProtocolError(f"the registry tells a head that does not hold: {reason}")
        await self._link(told)
        if franchise.roll.fork(issuer) is not None:
            return
        await self._read_revocations()
        await self._read_attestations()
        # Only now: a poll that was cut off begins again where this one did.
        before, newest = self._open(franchise.notes(issuer).head), self._open(told)
        if newest is not None and (before is None or before.record.size <= newest.record.size):
            franchise.note(issuer, head=told)

    async def _learn_certificates(self) -> None:
        certificates = await ask(self._fetch, CertificatesReply, "/v1/certificates")
        for each in certificates.certificates:
            _check(self._franchise.learn(self._issuer, (bytes.fromhex(each),)))
            await trio.lowlevel.checkpoint()

    # One history

    async def _link(self, told: bytes) -> None:
        """Have the registry show that ``told`` continues every head that was seen before."""
        franchise, issuer = self._franchise, self._issuer
        newest = self._open(told)
        waiting = franchise.unlinked[issuer]
        before = franchise.notes(issuer).head
        for wire in [*([before] if before else []), *waiting]:
            head = self._open(wire)
            if head is None or newest is None:
                waiting.pop(wire, None)
            elif not await self._continues(head, newest):
                return
            elif head.record.size <= newest.record.size:
                waiting.pop(wire, None)

    async def _continues(self, one: Sealed[Head], other: Sealed[Head]) -> bool:
        """Whether the two are of one log; if not, the registry is convicted.

        Raises ProtocolError if neither is shown.
        """
        first, second = sorted((one, other), key=lambda each: each.record.size)
        if first.record.size == second.record.size and first.record.root == second.record.root:
            return True
        if second is one and second.record.at_ns > first.record.at_ns:
            return True  # Signed after what the registry told just now: it is for the next time.
        issuer = self._franchise.roll.issuer(self._issuer)
        if contradict(first.record, second.record):
            return self._convict(make_fork(first, second, issuer))
        query = f"/v1/consistency?first={first.record.size}&second={second.record.size}"
        reply = await ask(self._fetch, ConsistencyReply, query)
        path = tuple(bytes.fromhex(each) for each in reply.path)
        roots = roots_by_consistency(first.record.size, first.record.root, second.record.size, path)
        if roots == (first.record.root, second.record.root):
            return True
        if roots is not None and roots[1] == second.record.root:
            return self._convict(make_fork(first, second, issuer, roots[0], path))
        other_heads = await ask(self._fetch, HeadsReply, f"/v1/heads?from={first.record.size}")
        for wire in other_heads.heads[:1]:
            head = self._open(bytes.fromhex(wire))
            if head is not None and contradict(first.record, head.record):
                pair = sorted((first, head), key=lambda each: each.record.size)
                return self._convict(make_fork(pair[0], pair[1], issuer))
        raise ProtocolError(
            f"the registry does not show that its log of {second.record.size} leaves continues "
            f"that of {first.record.size} leaves which it signed"
        )

    def _convict(self, fork: bytes) -> bool:
        _check(self._franchise.take_fork(fork))
        return False

    def _open(self, wire: bytes) -> Sealed[Head] | None:
        head = open_past_head(wire, self._franchise.roll.issuer(self._issuer))
        return None if isinstance(head, Rejected) else head

    # Whom it attests

    async def _read_attestations(self) -> None:
        for _ in range(MAX_PAGES):
            after = self._franchise.notes(self._issuer).serial
            page = await ask(self._fetch, ProofsReply, f"/v1/attestations?after={after}")
            if not await self._take(page, self._franchise.take, after):
                return
            self._franchise.note(self._issuer, serial=page.last)

    async def _read_revocations(self) -> None:
        for _ in range(MAX_PAGES):
            first = self._franchise.notes(self._issuer).leaf
            page = await ask(self._fetch, ProofsReply, f"/v1/revocations?from={first}")
            if not await self._take(page, self._franchise.take_revocation, first - 1):
                return
            self._franchise.note(self._issuer, leaf=page.last + 1)

    async def _take(self, page: ProofsReply, take: Callable[[bytes], str], before: int) -> bool:
        """Verify a page; whether there was one. Raises ProtocolError for what does not hold."""
        if not page.proofs:
            return False
        if page.last <= before:
            raise ProtocolError("the registry tells the same page again")
        for proof in page.proofs:
            reason = take(bytes.fromhex(proof))
            if is_fault(reason):
                raise ProtocolError(f"the registry tells what does not hold: {reason}")
            await trio.lowlevel.checkpoint()
        return True


def _check(reason: str) -> None:
    if is_fault(reason):
        raise ProtocolError(f"the registry tells what does not hold: {reason}")
