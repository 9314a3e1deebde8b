"""Villains of a ``Mesh``: peers that do what the relay must withstand. For tests and benches.

========== =======================================================================================
equivocator signs two sheets under one number, for one half of its neighbours each
replayer    sends old sheets of others again
forger      sends sheets with wrong signatures, and junk
flooder     signs far more sheets than an account may gossip, at a price of nothing
sybil       brings sheets of many identities that nobody has heard of
garbler     answers comparisons, and spoils its answers
mute        begins and takes comparisons, and never says more
========== =======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2pflop.market.samples import ask, party
from p2pflop.node.memory_mesh import Mesh, MeshPeer, MeshSettings

ACTS_EVERY_S: Final = 0.25
FLOOD: Final = 4
"""Sheets in one act of a flooder: 16 a second, of which an account may gossip 4."""
SYBILS: Final = 40
FIRST_SYBIL: Final = 1_000_000
MAX_REPLAYED: Final = 500
TRADING_S: Final = 20.0
PARTITION_S: Final = 60.0


class Villain:
    """Turns ``peer`` into a villain, which acts until ``until_s``."""

    def __init__(self, peer: MeshPeer, kind: str, until_s: float) -> None:
        self._peer = peer
        self._mesh = peer.mesh
        self._until_s = until_s
        self._heard: list[bytes] = []
        self._acts = 0
        act: Callable[[], None] = getattr(self, f"_act_as_{kind}")
        self._mesh.after(self._mesh.random.uniform(1, 3), self._act, act)

    def _act(self, act: Callable[[], None]) -> None:
        if self._mesh.now_s < self._until_s:
            if self._peer.up:
                act()
                self._acts += 1
            self._mesh.after(ACTS_EVERY_S, self._act, act)

    def _act_as_equivocator(self) -> None:
        if self._acts % 40:
            return
        peer, now_ns = self._peer, self._peer.now_ns()
        links = list(peer.links)
        for price_nusd, half in ((1000, links[::2]), (2000, links[1::2])):
            offer = ask(1, price_nusd, valid_until_ns=now_ns)
            sheet = peer.party.sheet(offer, number=now_ns, now_ns=now_ns)
            peer.gossip(sheet.sealed.wire, half)

    def _act_as_replayer(self) -> None:
        if not self._acts % 20:
            live = self._peer.book.view(self._peer.now_ns()).sheets
            self._heard = [sheet.sealed.wire for sheet in live[:MAX_REPLAYED]]
        for _ in range(4):
            if self._heard:
                self._peer.gossip(self._mesh.random.choice(self._heard), self._peer.links)

    def _act_as_forger(self) -> None:
        wires = [sheet.sealed.wire for sheet in self._peer.book.view(self._peer.now_ns()).sheets]
        forged = bytearray(self._mesh.random.choice(wires))
        forged[self._mesh.random.randrange(len(forged))] ^= 1 << self._mesh.random.randrange(8)
        for wire in (bytes(forged), self._mesh.random.randbytes(200)):
            self._peer.gossip(wire, self._peer.links)

    def _act_as_flooder(self) -> None:
        for _ in range(FLOOD):
            self._peer.issue(1)

    def _act_as_sybil(self) -> None:
        if self._acts < SYBILS:
            now_ns = self._peer.now_ns()
            stranger = party(FIRST_SYBIL + self._peer.number * SYBILS + self._acts)
            sheet = stranger.sheet(ask(1, 1, valid_until_ns=now_ns), now_ns=now_ns)
            self._peer.gossip(sheet.sealed.wire, self._peer.links)

    def _act_as_garbler(self) -> None:
        say = MeshPeer.say

        def garbled(other: MeshPeer, session: int, frames: list[bytes], *, opening: bool) -> None:
            spoilt = [bytearray(frame) for frame in frames]
            for frame in spoilt:
                frame[self._mesh.random.randrange(len(frame))] ^= 255
            say(self._peer, other, session, [bytes(frame) for frame in spoilt], opening=opening)

        self._peer.say = garbled  # type: ignore[method-assign]

    def _act_as_mute(self) -> None:
        self._peer.listen = lambda *_: None  # type: ignore[method-assign]


KINDS: Final = ("equivocator", "replayer", "forger", "flooder", "sybil", "garbler", "mute")


def make_villains(mesh: Mesh, until_s: float) -> None:
    """Turn the peers of ``mesh`` that are not honest into villains, of each kind in turn."""
    for place, peer in enumerate(mesh.peers[len(mesh.honest) :]):
        Villain(peer, KINDS[place % len(KINDS)], until_s)


@dataclass(frozen=True, slots=True)
class Ordeal:
    """What became of a mesh: how long it took until every honest book was the same, in seconds."""

    mesh: Mesh
    after_last_sheet_s: float
    after_partition_s: float


def run_ordeal(
    settings: MeshSettings, seed: int, *, sheets_per_s: float, within_s: float = 10.0
) -> Ordeal:
    """Trade with loss, churn and villains, then through a partition of a minute.

    Raises AssertionError, which names the seed, where books differ for longer than ``within_s``.
    """
    mesh = Mesh(settings, seed)
    make_villains(mesh, TRADING_S)
    mesh.churn(TRADING_S, selling=True)
    mesh.run(TRADING_S / 4)
    mesh.trade(TRADING_S, sheets_per_s)
    mesh.run(TRADING_S)
    mesh.churn(TRADING_S + within_s, selling=False)
    after_last_sheet_s = mesh.converge(within_s)
    mesh.check()
    mesh.partition()
    healed_s = mesh.now_s + PARTITION_S
    mesh.churn(healed_s, selling=True)
    mesh.trade(healed_s, sheets_per_s / 4)
    mesh.run(healed_s)
    mesh.heal()
    mesh.churn(healed_s + within_s, selling=False)
    after_partition_s = mesh.converge(within_s)
    mesh.check()
    return Ordeal(mesh, after_last_sheet_s, after_partition_s)
