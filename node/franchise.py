"""Which accounts this node deals with, by the registries that it trusts.

A node that trusts none is **open**: whoever sells may be bought from. One that trusts some is
**strict**: only asks of accounts that one of them attests, and those of its own account, are
ranked. Whatever a registry or a peer tells goes through here, where it is verified, remembered, and
noted as news for the neighbours; ``registry_watch`` asks the registries, ``franchise_service`` the
neighbours. Nothing here waits.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.franchise.records import DAY_NS, Head
from p2pflop.franchise.roll import HONEST, KNOWN, UNTRUSTED, Roll, Standing, Taken
from p2pflop.ids import content_hash
from p2pflop.market.book import MAX_SHEETS_PER_ACCOUNT
from p2pflop.market.ranking import Accounts
from p2pflop.market.records import Rejected
from p2pflop.node.config import MAX_SLOTS
from p2pflop.node.franchise_file import Changes, Kept, Notes
from p2pflop.node.service import Json
from p2pflop.units import NS_PER_S, counted
from p2pflop.wire import DEFAULT_NETWORK, reopen

MAX_NEWS: Final = 32
NEWS_NS: Final = 120 * NS_PER_S
"""For so long neighbours are told what was new here; who missed it asks."""
MAX_JUDGED: Final = 4096
MAX_BOXES: Final = 256
"""Other nodes of this account of which is known how many slots they have."""
BOX_NS: Final = 300 * NS_PER_S
MAX_REASONS: Final = 3
MAX_UNLINKED: Final = 8
"""Heads of one registry, told by peers, that are still to be compared with its log."""
WARN_DAYS: Final = 14

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class News:
    """A proof, or evidence of two histories, that was new here at ``at_ns``."""

    at_ns: int
    is_revocation: bool
    proof: bytes


@dataclass(slots=True)
class Watched:
    """How asking one registry goes, for people: what is wrong, and what the account waits for."""

    url: str
    trouble: str = ""
    waits_for: str = "the registry's first answer"
    asked_ns: int = 0


class _Everybody:
    def __contains__(self, _account: bytes, /) -> bool:
        return True


EVERYBODY: Final[Accounts] = _Everybody()


class Franchise:
    """``registries`` gives the URL by the root key of each registry that is trusted.

    ``account`` is this node's own, which is admitted here whatever others think of it.
    """

    def __init__(
        self,
        registries: dict[bytes, str],
        account: bytes,
        node: bytes,
        now_ns: Callable[[], int],
        *,
        slots: int = 1,
        network: str = DEFAULT_NETWORK,
    ) -> None:
        self.roll = Roll(registries, network)
        self.watched = {key: Watched(url) for key, url in registries.items()}
        self.account = account
        self.network = network
        self.slots = slots
        self.changes = Changes()
        self.left_out_by: dict[str, str] = {}
        self.on_news: list[Callable[[], None]] = []
        self.unlinked: dict[bytes, OrderedDict[bytes, None]] = {
            k: OrderedDict() for k in registries
        }
        self._node = node
        self._now_ns = now_ns
        self._notes = {key: Notes() for key in registries}
        self._news: deque[News] = deque(maxlen=MAX_NEWS)
        self._judged: OrderedDict[bytes, None] = OrderedDict()
        self._boxes: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._said: set[bytes] = set()
        self._issuers = {key: self.roll.issuer(key) for key in registries}

    @property
    def is_strict(self) -> bool:
        """Whether only attested accounts are dealt with."""
        return bool(self._notes)

    # What the market asks

    def is_attested(self, account: bytes, now_ns: int) -> bool:
        """Whether a trusted registry attests ``account``. A look-up."""
        return self.roll.is_attested(account, now_ns)

    def admits(self, account: bytes, now_ns: int) -> bool:
        """Whether asks of ``account`` are ranked here. A look-up."""
        return not self._notes or account == self.account or self.roll.is_attested(account, now_ns)

    def admitted(self, now_ns: int) -> Accounts:
        """The accounts whose asks are ranked here: for one ranking, which asks about each ask."""
        if not self._notes:
            return EVERYBODY
        attested = self.roll.attested(now_ns)
        return attested if self.account in attested else attested | {self.account}

    def max_nodes(self, account: bytes, now_ns: int) -> int:
        """How many nodes of ``account`` may have a place in the book: each has a slot at least."""
        standing = self.roll.standing(account, now_ns) if self._notes else None
        return MAX_SHEETS_PER_ACCOUNT if standing is None else standing.max_slots

    def own_slots(self, others: Iterable[bytes] = ()) -> int:
        """How many leases this node may run at once.

        What its account is attested for is shared among its nodes: one slot each in the order of
        their keys, then, in the same order, what each wants more. ``others`` are nodes of the
        account that are known to sell; how many slots those want that have not said so is taken to
        be one. Without an attestation nothing is limited, since nothing was promised.
        """
        now_ns = self._now_ns()
        standing = self.roll.standing(self.account, now_ns)
        if standing is None:
            return self.slots
        wanted = dict.fromkeys(others, 1)
        wanted |= {k: n for k, (n, at_ns) in self._boxes.items() if at_ns + BOX_NS > now_ns}
        wanted[self._node] = self.slots
        left = max(0, standing.max_slots - len(wanted))
        for place, node in enumerate(sorted(wanted)):
            more = min(left, wanted[node] - 1)
            if node == self._node:
                return 1 + more if place < standing.max_slots else 0
            left -= more
        return self.slots

    def note_box(self, node: bytes, slots: int) -> None:
        """Another node of this account says how many slots it wants."""
        self._boxes.pop(node, None)
        self._boxes[node] = (min(max(slots, 1), MAX_SLOTS), self._now_ns())
        if len(self._boxes) > MAX_BOXES:
            self._boxes.popitem(last=False)

    # What is told

    def take(self, proof: bytes) -> str:
        """Take up the proof of an attestation; empty, or why not."""
        key = content_hash(proof)
        if key in self._judged:
            return KNOWN
        taken = self.roll.admit(proof, self._now_ns())
        if isinstance(taken, Standing) and taken.proof != proof:
            return KNOWN
        return self._noted(key, taken)

    def take_revocation(self, proof: bytes) -> str:
        """Take up the proof of a revocation; empty, or why not."""
        key = content_hash(proof)
        if key in self._judged:
            return KNOWN
        return self._noted(key, self.roll.revoke(proof, self._now_ns()))

    def take_head(self, issuer: bytes, head: bytes) -> str:
        """Compare a registry's head with what is remembered; empty, or why it does not hold."""
        refused = self.roll.remember(issuer, head, self._now_ns())
        if refused is not None:
            return refused.reason
        self._see_forks()
        return ""

    def take_peers_head(self, head: bytes) -> str:
        """``take_head`` from a peer: its registry is to show that its log continues it."""
        try:
            opened = reopen(Head, head, self.network)
        except (ProtocolError, VerificationError) as error:
            return f"head: {error.message}"
        issuer = opened.record.issuer
        if issuer not in self._notes or not self.roll.issuer(issuer).certificate_of(opened.signer):
            return UNTRUSTED  # Its key may be certified, and this node not know it yet.
        reason = self.take_head(issuer, head)
        if not reason and head != self._notes[issuer].head:
            waiting = self.unlinked[issuer]
            waiting[head] = None
            if len(waiting) > MAX_UNLINKED:
                waiting.popitem(last=False)
        return reason

    def take_fork(self, fork: bytes) -> str:
        """Take up evidence of two histories; empty, or why not."""
        key = content_hash(fork)
        if key in self._judged:
            return KNOWN
        convicted = self.roll.convict(fork)
        if isinstance(convicted, Rejected):
            return convicted.reason
        self._judged[key] = None
        self._see_forks()
        return ""

    def learn(self, issuer: bytes, certificates: tuple[bytes, ...]) -> str:
        """Take up certificates; empty, or why not."""
        refused = self.roll.learn(issuer, certificates)
        if refused is not None:
            return refused.reason
        self._keep_certificates(issuer)
        self._see_withdrawals()
        return ""

    def forgive(self, issuer: bytes) -> None:
        """The user trusts a registry again."""
        now_ns = self._now_ns()
        self.roll.forgive(issuer, now_ns)
        self.unlinked[issuer].clear()
        self._said.discard(issuer)
        self.note(issuer, fork=b"", head=b"", forgiven_ns=now_ns)

    # What is remembered

    def restore(self, kept: Iterable[Kept]) -> None:
        """What was on disk. Takes 0.2 ms of CPU a proof; nobody else may use this meanwhile."""
        for each in kept:
            self._notes[each.issuer] = each.restore(self.roll, self._now_ns())
            self._issuers[each.issuer] = self.roll.issuer(each.issuer)
        self._see_forks()

    def notes(self, issuer: bytes) -> Notes:
        """What is remembered of a registry. Change it by ``note``."""
        return self._notes[issuer]

    def note(self, issuer: bytes, **fields: bytes | int) -> None:
        """Remember something of a registry."""
        for name, value in fields.items():
            setattr(self._notes[issuer], name, value)
        self.changes.notes[issuer] = self._notes[issuer]

    def take_changes(self) -> Changes:
        """What is to be written to disk, once."""
        changes, self.changes = self.changes, Changes()
        return changes

    def keep_changes(self, changes: Changes) -> None:
        """They could not be written, and are to be with what came since."""
        self.changes = changes.followed_by(self.changes)

    # What is told on

    def proofs_for(self, accounts: Iterable[bytes]) -> list[bytes]:
        """The proofs of what holds for these accounts now, of each trusted registry."""
        now_ns = self._now_ns()
        found = []
        for account in accounts:
            for issuer in self.roll.issuers:
                standing = self.roll.standing_by(issuer, account)
                if standing is not None and standing.holds(now_ns) and not self.roll.fork(issuer):
                    found.append(standing.proof)
        return found

    def news(self) -> tuple[list[bytes], list[bytes]]:
        """Proofs of attestations and of revocations that were new here a moment ago."""
        fresh = [each for each in self._news if each.at_ns + NEWS_NS > self._now_ns()]
        return (
            [each.proof for each in fresh if not each.is_revocation],
            [each.proof for each in fresh if each.is_revocation],
        )

    def forks(self) -> list[bytes]:
        """Evidence against registries that were trusted."""
        found = (self.roll.fork(issuer) for issuer in self.roll.issuers)
        return [fork for fork in found if fork is not None]

    def heads(self) -> list[bytes]:
        """The newest head of each registry."""
        found = (self.roll.head(issuer) for issuer in self.roll.issuers)
        return [head.wire for head in found if head is not None]

    def days_left(self) -> int | None:
        """Whole days until this account's attestation ends; None if it is not attested."""
        now_ns = self._now_ns()
        standing = self.roll.standing(self.account, now_ns)
        return None if standing is None else _days(standing, now_ns)

    def expire(self) -> None:
        """Forget what has expired."""
        self.roll.expire(self._now_ns())

    def standing_of(self, account: bytes) -> str:
        """Why asks of ``account`` are left out here; empty if they are not."""
        now_ns = self._now_ns()
        if self.admits(account, now_ns):
            return ""
        reasons = [self._why_not(issuer, account) for issuer in self.roll.issuers]
        return "; ".join(reasons[:MAX_REASONS])

    def _why_not(self, issuer: bytes, account: bytes) -> str:
        name = f"registry {issuer.hex()[:16]}"
        standing = self.roll.standing_by(issuer, account)
        if self.roll.fork(issuer) is not None:
            return f"{name} told two histories and counts no more"
        if standing is not None:
            has_begun = standing.valid_from_ns <= self._now_ns()
            return f"the attestation by {name} " + (
                "has expired" if has_begun else "is not valid yet"
            )
        if self.roll.taken(issuer, account) is not None:
            return f"the attestation by {name} was revoked"
        return f"the account is not attested by {name}"

    # What people are told

    def describe(self) -> str:
        """Whom this node deals with, in a line."""
        trusted = [key.hex()[:16] for key in self.roll.issuers if self.roll.fork(key) is None]
        if not self.is_strict:
            return "open: deals with everybody"
        names = ", ".join(trusted) or "none: each told two histories"
        return f"strict: deals only with accounts that a registry attests, of these: {names}"

    def report(self) -> Json:
        """How this node stands with its registries, for ``status``."""
        now_ns = self._now_ns()
        standing = self.roll.standing(self.account, now_ns)
        return {
            "strict": self.is_strict,
            "attestation": None if standing is None else _told(standing, now_ns),
            "registries": [
                {
                    "issuer": issuer.hex(),
                    "url": watched.url,
                    "trusted": self.roll.fork(issuer) is None,
                    "accounts": sum(
                        1 for each in self.roll.standings(issuer) if each.holds(now_ns)
                    ),
                    "trouble": watched.trouble,
                    "waits_for": watched.waits_for,
                    "asked_ns": watched.asked_ns,
                    "fork": (self.roll.fork(issuer) or b"").hex(),
                }
                for issuer, watched in self.watched.items()
            ],
            "left_out_by": [{"peer": p, "reason": r} for p, r in self.left_out_by.items()],
        }

    def problems(self, *, selling: bool) -> list[str]:
        """What is wrong, for ``doctor``."""
        now_ns = self._now_ns()
        found = []
        for issuer, watched in self.watched.items():
            name = issuer.hex()[:16]
            if self.roll.fork(issuer) is not None:
                found.append(_accusation(issuer))
            elif watched.trouble:
                found.append(f"registry {name}: {watched.trouble}")
        standing = self.roll.standing(self.account, now_ns)
        if standing is not None and _days(standing, now_ns) < WARN_DAYS:
            days = _days(standing, now_ns)
            found.append(
                f"the attestation of this account ends in {counted(days, 'day')}: pay the next fee"
            )
        elif standing is None and selling and self.is_strict:
            found += [
                f"registry {issuer.hex()[:16]} does not attest this account: it waits for "
                f"{watched.waits_for}"
                for issuer, watched in self.watched.items()
                if watched.waits_for
            ]
        if selling and self.left_out_by:
            reason = next(iter(self.left_out_by.values()))
            peers = counted(len(self.left_out_by), "peer")
            found.append(f"the asks here are left out by {peers}: {reason}")
        return found

    def _noted(self, key: bytes, taken: Standing | Taken | Rejected) -> str:
        self._see_withdrawals()
        if isinstance(taken, Rejected):
            return taken.reason
        self._judged[key] = None
        if len(self._judged) > MAX_JUDGED:
            self._judged.popitem(last=False)
        is_revocation = isinstance(taken, Taken)
        self.changes.proofs[taken.issuer, is_revocation, taken.account] = taken.proof
        self._keep_certificates(taken.issuer)
        self._news.append(News(self._now_ns(), is_revocation, taken.proof))
        self._tell()
        self._see_forks()
        return ""

    def _tell(self) -> None:
        for told in self.on_news:
            told()

    def _keep_certificates(self, issuer: bytes) -> None:
        certificates = self.roll.issuer(issuer).certificates.values()
        self.changes.certificates |= {(issuer, each.wire) for each in certificates}

    def _see_withdrawals(self) -> None:
        """Read all anew of a registry that gave up its online keys: what they signed is gone."""
        for issuer, before in self._issuers.items():
            known = self.roll.issuer(issuer)
            if known is before:
                continue
            self._issuers[issuer] = known
            self._keep_certificates(issuer)
            if known.withdrawals() <= before.withdrawals():
                continue
            name = issuer.hex()[:16]
            _log.warning("registry %s gave up its online keys; its proofs are read anew", name)
            self.unlinked[issuer].clear()
            self.note(issuer, serial=0, leaf=0)
            if self._notes[issuer].fork and self.roll.fork(issuer) is None:
                self._said.discard(issuer)
                self.note(issuer, fork=b"")
                _log.warning("registry %s says that a thief told the second history", name)
            self._tell()

    def _see_forks(self) -> None:
        """Say of each registry that it is convicted, once."""
        for issuer in self.roll.issuers:
            fork = self.roll.fork(issuer)
            if fork is None or issuer in self._said:
                continue
            self._said.add(issuer)
            if self._notes[issuer].fork != fork:
                self.note(issuer, fork=fork)
            _log.error("%s", _accusation(issuer))
            _log.error("the proof, for anybody to check: %s", fork.hex())
            self._tell()


def is_fault(reason: str) -> bool:
    """Whether only a liar, or who did not check, tells what is refused for this ``reason``."""
    return bool(reason) and reason not in HONEST


def _told(standing: Standing, now_ns: int) -> Json:
    return {
        "issuer": standing.issuer.hex(),
        "serial": standing.serial,
        "max_slots": standing.max_slots,
        "valid_until_ns": standing.valid_until_ns,
        "days_left": _days(standing, now_ns),
    }


def _days(standing: Standing, now_ns: int) -> int:
    return (standing.valid_until_ns - now_ns) // DAY_NS


def _accusation(issuer: bytes) -> str:
    return (
        f"the registry {issuer.hex()} told two histories and is not trusted any more; "
        f"to trust it all the same: p2pflop node --forgive {issuer.hex()}"
    )
