"""The Merkle tree of an append-only log: RFC 6962, section 2, with the checks of RFC 9162, 2.1.

::

    hash of a leaf       SHA-256(0x00 || leaf)
    hash of two subtrees SHA-256(0x01 || left || right)
    root of nothing      SHA-256("")

A tree of n leaves is split at the largest power of two below n. So every **complete** subtree,
named by its level (2**level leaves) and its number from the left, once it is there never changes
again; root and proofs of a tree of any size are put together from at most two of them a level.
Whoever keeps a tree keeps those, and hands them out by ``Node``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final

DIGEST_BYTES: Final = 32
MAX_LEVELS: Final = 63
EMPTY_ROOT: Final = sha256(b"").digest()

Node = Callable[[int, int], bytes]
"""The hash of the complete subtree ``(level, number)``."""


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of a leaf's bytes."""
    return sha256(b"\0" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees side by side."""
    return sha256(b"\1" + left + right).digest()


def completed(size: int, leaf: bytes, node: Node) -> list[tuple[int, int, bytes]]:
    """The subtrees ``(level, number, hash)`` that a leaf completes in a tree of ``size`` leaves.

    ``leaf`` is the leaf's hash; the subtree of it alone comes first.
    """
    level, number, digest = 0, size, leaf
    found = [(level, number, digest)]
    while number % 2:
        digest = node_hash(node(level, number - 1), digest)
        level, number = level + 1, number // 2
        found.append((level, number, digest))
    return found


def root_hash(size: int, node: Node) -> bytes:
    """The root of the first ``size`` leaves."""
    return _range_hash(0, size, node) if size else EMPTY_ROOT


def inclusion_path(index: int, size: int, node: Node) -> list[bytes]:
    """RFC 6962's PATH(index, D[size]), from the leaf up. Raises ValueError for no such leaf."""
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    start, end = 0, size
    siblings = []
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            siblings.append((middle, end))
            end = middle
        else:
            siblings.append((start, middle))
            start = middle
    return [_range_hash(left, right, node) for left, right in reversed(siblings)]


def consistency_path(first: int, second: int, node: Node) -> list[bytes]:
    """RFC 6962's PROOF(first, D[second]). Raises ValueError if ``first`` is not within it."""
    if not 0 < first <= second:
        raise ValueError(f"no tree of {first} leaves is the beginning of one of {second}")
    start, end = 0, second
    is_whole = True
    ranges = []
    while first != end:
        middle = start + _split(end - start)
        if first <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start, is_whole = middle, False
    if not is_whole:
        ranges.append((start, end))
    return [_range_hash(left, right, node) for left, right in reversed(ranges)]


def root_by_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that ``path`` leads to from a leaf's hash (RFC 9162, 2.1.3.2); None if none."""
    if not 0 <= index < size:
        return None
    number, last, digest = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return None
        if number % 2 or number == last:
            digest = sha256(b"\1" + sibling + digest).digest()
            while not number % 2 and number:
                number, last = number // 2, last // 2
        else:
            digest = sha256(b"\1" + digest + sibling).digest()
        number, last = number // 2, last // 2
    return None if last else digest


def is_consistent(
    first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]
) -> bool:
    """Whether ``path`` proves that the second tree begins with the first (RFC 9162, 2.1.4.2)."""
    return roots_by_consistency(first, first_root, second, path) == (first_root, second_root)


def roots_by_consistency(
    first: int, first_root: bytes, second: int, path: Sequence[bytes]
) -> tuple[bytes, bytes] | None:
    """The roots of both trees that ``path`` leads to; None if it is not one.

    ``first_root`` stands in for what a path leaves out: all of the first tree, if that is complete.
    """
    if not 0 < first <= second:
        return None
    if first == second:
        return None if path else (first_root, first_root)
    hashes = list(path)
    if first & (first - 1) == 0:
        hashes.insert(0, first_root)
    if not hashes:
        return None
    number, last = first - 1, second - 1
    while number % 2:
        number, last = number // 2, last // 2
    old = new = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            return None
        if number % 2 or number == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not number % 2 and number:
                number, last = number // 2, last // 2
        else:
            new = node_hash(new, sibling)
        number, last = number // 2, last // 2
    return (old, new) if last == 0 else None


class MemoryTree:
    """A whole tree in memory, 64 bytes a leaf: for auditors and tests."""

    def __init__(self) -> None:
        self._levels: list[bytearray] = []

    def __len__(self) -> int:
        return len(self._levels[0]) // DIGEST_BYTES if self._levels else 0

    def append(self, leaf: bytes) -> None:
        """Add a leaf by its hash."""
        for level, _, digest in completed(len(self), leaf, self.node):
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += digest

    def node(self, level: int, number: int) -> bytes:
        """See ``Node``."""
        return bytes(self._levels[level][number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES])

    def nodes(self) -> list[int]:
        """How many complete subtrees there are of each level, from the leaves up."""
        return [len(level) // DIGEST_BYTES for level in self._levels]

    def root(self, size: int | None = None) -> bytes:
        """The root of the first ``size`` leaves, of all if not given."""
        return root_hash(len(self) if size is None else size, self.node)


def _split(width: int) -> int:
    """The largest power of two below ``width``, which is at least 2."""
    return 1 << (width - 1).bit_length() - 1


def _range_hash(start: int, end: int, node: Node) -> bytes:
    """The hash over leaves ``start`` to ``end``; ``start`` is where such a subtree may begin."""
    width = end - start
    if width & (width - 1) == 0:
        level = width.bit_length() - 1
        return node(level, start >> level)
    middle = start + _split(width)
    return node_hash(_range_hash(start, middle, node), _range_hash(middle, end, node))
