"""Every honest book becomes the same, whatever the network and villains do: by the real relay.

200 peers; every tenth checks all signatures itself, the others share what was checked once in this
process (``memory_mesh.open_once``). A failure names the seed that replays it.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from p2pflop.market.gate import Outcome
from p2pflop.market.relay import MAX_FAULTS
from p2pflop.node.memory_mesh import Mesh, MeshPeer, MeshSettings
from p2pflop.node.memory_villains import KINDS, Villain, run_ordeal

PEERS = 200
FIXED_SEED = 4
WITHIN_S = 5.0
"""Half of what is promised for 1,000 peers."""
RANDOM_SEED = random.randrange(2**32)  # noqa: S311 - no secret
SMALL = MeshSettings(peers=24, villains=1, churn_per_minute=0)


@pytest.mark.parametrize("seed", [FIXED_SEED, RANDOM_SEED], ids=["fixed", "random"])
def test_books_converge_through_loss_churn_villains_and_a_partition(seed: int) -> None:
    print(f"replay with seed {seed}")
    settings = MeshSettings(peers=PEERS, villains=len(KINDS))
    mesh = run_ordeal(settings, seed, sheets_per_s=2, within_s=WITHIN_S).mesh
    outcomes: Counter[Outcome] = Counter()
    for peer in mesh.honest:
        outcomes.update(peer.relay.counts)
    met = {Outcome.NEW, Outcome.PROOF, Outcome.BAD, Outcome.LATER, Outcome.SHUNNED, Outcome.BOOK}
    assert met <= set(outcomes), "the villains have not done their worst"
    equivocators = {peer.node for peer in mesh.peers[-len(KINDS) :: len(KINDS)]}
    for peer in mesh.honest:
        assert not peer.up or equivocators == set(peer.book.convicted())


def run_small(seed: int, settings: MeshSettings = SMALL) -> Mesh:
    mesh = Mesh(settings, seed)
    for kind in KINDS:
        Villain(mesh.peers[-1], kind, 5.0)
    mesh.run(8.0)
    return mesh


def test_a_seed_replays_a_run_to_the_byte() -> None:
    assert run_small(1).trace == run_small(1).trace != run_small(2).trace


def test_a_failure_names_its_seed() -> None:
    mesh = Mesh(MeshSettings(peers=6, loss=1.0), 77)
    mesh.run(5.0)
    with pytest.raises(AssertionError, match="replay with seed 77"):
        mesh.converge(1.0)


def sole_villain(kind: str) -> tuple[Mesh, MeshPeer]:
    mesh = Mesh(SMALL, 3)
    villain = mesh.peers[-1]
    Villain(villain, kind, 12.0)
    mesh.run(12.0)
    mesh.converge(10.0)
    mesh.check()
    return mesh, villain


@pytest.mark.parametrize("kind", KINDS)
def test_one_villain_alone_keeps_no_book_from_being_whole(kind: str) -> None:
    mesh, villain = sole_villain(kind)
    neighbours = [peer for peer in mesh.honest if villain.number in peer.links]
    scores = [peer.relay.score(villain.name, peer.now_ns()) for peer in neighbours]
    if kind in ("forger", "garbler"):
        assert min(scores) < MAX_FAULTS
    else:
        assert set(scores) == {MAX_FAULTS}, "nothing of this can be told from a busy honest peer"


def test_a_peer_that_lost_everything_is_whole_again_at_once() -> None:
    mesh = Mesh(SMALL, 5)
    mesh.run(10.0)
    mesh.converge(10.0)
    peer = mesh.honest[0]
    peer.crash()
    peer._saved = type(peer._saved)((), ())
    peer.start(selling=False)
    assert len(peer.book) == 0
    mesh.run(mesh.now_s + 4.0)
    assert not mesh.differing()


def test_a_restart_keeps_what_was_saved() -> None:
    mesh = Mesh(SMALL, 6)
    mesh.run(25.0)
    peer = mesh.honest[0]
    peer.crash()
    mesh.settings = MeshSettings(peers=24, loss=1.0)
    peer.start(selling=False)
    assert len(peer.book) > 20
