"""Whatever bytes a peer sends about registries: a reason comes back, and nobody is attested."""

from __future__ import annotations

from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflop.errors import ProtocolError
from p2pflop.franchise.forks import make_fork, open_past_head
from p2pflop.franchise.records import Fork
from p2pflop.franchise.samples import SampleRegistry, key
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS
from p2pflop.node.franchise import Franchise
from p2pflop.node.franchise_stream import Told
from p2pflop.wire import decode, encode

ALICE, BOB = key(1).public_key, key(2).public_key


def _registry() -> SampleRegistry:
    registry = SampleRegistry()
    registry.publish()
    return registry


REGISTRY: Final = _registry()
ISSUER: Final = REGISTRY.root.public_key
ATTESTATION: Final = REGISTRY.prove(REGISTRY.attest(ALICE))
REVOCATION: Final = REGISTRY.prove(REGISTRY.revoke(BOB, 1))
HEAD: Final = REGISTRY.head()


def _fork() -> bytes:
    other = _registry()
    while len(other.tree) < len(REGISTRY.tree):
        other.attest(BOB)
    first, second = (open_past_head(head, REGISTRY.issuer) for head in (HEAD, other.head()))
    assert not isinstance(first, Rejected)
    assert not isinstance(second, Rejected)
    return make_fork(first, second, REGISTRY.issuer)


FORK: Final = _fork()


def strict() -> Franchise:
    return Franchise({ISSUER: ""}, key(3).public_key, key(4).public_key, lambda: NOW_NS)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """Something true with some bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from([ATTESTATION, REVOCATION, HEAD, FORK])))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 2)):
            case 0:
                data[place] ^= draw(st.integers(1, 255))
            case 1:
                del data[place : place + draw(st.integers(1, 40))]
            case _:
                data[place:place] = draw(st.binary(min_size=1, max_size=40))
        if not data:
            return b""
    return bytes(data)


def test_the_true_ones_are_taken() -> None:
    made = strict()
    assert made.take(ATTESTATION) == ""
    assert made.take_revocation(REVOCATION) == ""
    assert made.take_peers_head(HEAD) == ""
    assert made.take_fork(FORK) == ""


@settings(max_examples=200, deadline=None)
@given(st.one_of(edited(), st.binary(max_size=2_000)))
def test_no_other_bytes_change_anything(data: bytes) -> None:
    if data in (ATTESTATION, REVOCATION, HEAD, FORK):
        return
    made = strict()
    for take in (made.take, made.take_revocation, made.take_peers_head):
        assert take(data)
    if not made.take_fork(data):
        # What is said beside two heads that contradict each other may be anything.
        fork, true = decode(Fork, data), decode(Fork, FORK)
        assert (fork.first, fork.second) == (true.first, true.second)
        return
    assert not made.roll.is_attested(ALICE, NOW_NS)
    assert made.roll.taken(ISSUER, BOB) is None
    assert made.roll.fork(ISSUER) is None
    assert made.news() == ([], [])
    assert not made.changes


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2_000))
def test_what_is_told_is_read_in_one_way_or_refused(data: bytes) -> None:
    try:
        told = decode(Told, data)
    except ProtocolError:
        return
    assert encode(told) == data
