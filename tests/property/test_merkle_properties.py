"""Every proof of every tree verifies, and nothing else does."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from p2pflop.franchise.merkle import (
    EMPTY_ROOT,
    MemoryTree,
    consistency_path,
    inclusion_path,
    is_consistent,
    leaf_hash,
    root_by_inclusion,
)

SIZES = st.integers(1, 300)


def leaf(number: int, seed: int = 0) -> bytes:
    return leaf_hash(b"%d/%d" % (seed, number))


def tree_of(size: int, seed: int = 0, changed: int = -1) -> MemoryTree:
    tree = MemoryTree()
    for number in range(size):
        tree.append(leaf(number, seed + 1 if number == changed else seed))
    return tree


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word by word, over hashes of leaves."""
    if not leaves:
        return EMPTY_ROOT
    if len(leaves) == 1:
        return leaves[0]
    middle = 1
    while middle * 2 < len(leaves):
        middle *= 2
    parts = by_definition(leaves[:middle]) + by_definition(leaves[middle:])
    return sha256(b"\1" + parts).digest()


@given(SIZES)
def test_the_root_is_that_of_the_definition(size: int) -> None:
    assert tree_of(size).root() == by_definition([leaf(number) for number in range(size)])


@given(SIZES, st.data())
def test_inclusion_holds_for_one_leaf_at_one_place(size: int, data: st.DataObject) -> None:
    tree = tree_of(size)
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_path(index, size, tree.node)
    assert len(path) <= (size - 1).bit_length()
    assert root_by_inclusion(leaf(index), index, size, path) == tree.root()
    assert root_by_inclusion(leaf(index, 7), index, size, path) != tree.root()
    other = data.draw(st.integers(0, size - 1).filter(lambda each: each != index or size == 1))
    if other != index:
        assert root_by_inclusion(leaf(index), other, size, path) != tree.root()
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        wrong = [*path[:at], bytes(32), *path[at + 1 :]]
        assert root_by_inclusion(leaf(index), index, size, wrong) != tree.root()
        assert root_by_inclusion(leaf(index), index, size, path[:-1]) != tree.root()
    assert root_by_inclusion(leaf(index), index, size, [*path, bytes(32)]) != tree.root()


@given(SIZES, SIZES, st.data())
def test_consistency_holds_for_no_other_history(a: int, b: int, data: st.DataObject) -> None:
    first, second = sorted((a, b))
    tree = tree_of(second)
    path = consistency_path(first, second, tree.node)
    old, new = tree.root(first), tree.root()
    assert is_consistent(first, old, second, new, path)
    forged = tree_of(first, changed=data.draw(st.integers(0, first - 1))).root()
    assert not is_consistent(first, forged, second, new, path)
    assert not is_consistent(first, old, second, new, [*path, bytes(32)])
    if path:
        assert not is_consistent(first, old, second, new, path[:-1])
        at = data.draw(st.integers(0, len(path) - 1))
        wrong = [*path[:at], bytes(32), *path[at + 1 :]]
        assert not is_consistent(first, old, second, new, wrong)


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.lists(st.binary(min_size=32, max_size=32), max_size=64),
)
def test_made_up_proofs_are_refused_and_end(first: int, second: int, path: list[bytes]) -> None:
    assert not is_consistent(first, bytes(32), second, bytes([1]) * 32, path)
    assert root_by_inclusion(bytes(32), first, second, path) != EMPTY_ROOT
