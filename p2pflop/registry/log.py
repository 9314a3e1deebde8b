"""The public log on disk: leaves, and of the tree the hash of every complete subtree.

All of it is written in the transaction that decides something, and so is the signed head. So a
head that anybody has seen covers only what is on disk, and nothing has to be rebuilt at a start.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from p2pflop.franchise.merkle import (
    EMPTY_ROOT,
    completed,
    consistency_path,
    inclusion_path,
    leaf_hash,
    root_hash,
)
from p2pflop.franchise.records import Attestation, Head, LeafKind, Proof
from p2pflop.wire import Envelope, encode

PAGE_LEAVES: Final = 500
PAGE_HEADS: Final = 500
PAGE_PROOFS: Final = 25

Query = Callable[..., list[tuple[Any, ...]]]
"""``Database.read``, or the same over a connection: a statement and its values give rows."""

_SIGNED: Final = (LeafKind.ATTESTATION, LeafKind.REVOCATION, LeafKind.SCHEDULE)


def query_of(connection: sqlite3.Connection) -> Query:
    """``Query`` inside a transaction."""

    def query(statement: str, *values: object) -> list[tuple[Any, ...]]:
        return connection.execute(statement, values).fetchall()

    return query


def log_size(query: Query) -> int:
    """How many leaves there are."""
    [(size,)] = query("SELECT COALESCE(MAX(number) + 1, 0) FROM leaves")
    return int(size)


def log_root(query: Query, size: int) -> bytes:
    """The root of the first ``size`` leaves."""
    return root_hash(size, partial(_node, query)) if size else EMPTY_ROOT


def append_leaf(connection: sqlite3.Connection, leaf: bytes) -> int:
    """Append an encoded leaf; its number."""
    query = query_of(connection)
    number = log_size(query)
    connection.execute("INSERT INTO leaves VALUES (?, ?)", (number, leaf))
    nodes = completed(number, leaf_hash(leaf), partial(_node, query))
    connection.executemany("INSERT INTO nodes VALUES (?, ?, ?)", nodes)
    return number


def newest_head(query: Query) -> bytes | None:
    """The head of the whole log."""
    found = query("SELECT wire FROM heads ORDER BY size DESC LIMIT 1")
    return bytes(found[0][0]) if found else None


def head_time(query: Query) -> int:
    """When that was signed, in nanoseconds of Unix time; 0 before the first."""
    found = query("SELECT at_ns FROM heads ORDER BY size DESC LIMIT 1")
    return int(found[0][0]) if found else 0


def leaves_from(query: Query, first: int) -> list[bytes]:
    """A page of leaves, of those that the newest head covers."""
    found = query(
        "SELECT body FROM leaves WHERE number >= ? AND number < (SELECT MAX(size) FROM heads)"
        " ORDER BY number LIMIT ?",
        first,
        PAGE_LEAVES,
    )
    return [bytes(body) for (body,) in found]


def heads_from(query: Query, size: int) -> list[bytes]:
    """A page of heads, from that size on."""
    found = query("SELECT wire FROM heads WHERE size >= ? ORDER BY size LIMIT ?", size, PAGE_HEADS)
    return [bytes(wire) for (wire,) in found]


def consistency(query: Query, first: int, second: int) -> list[bytes]:
    """The proof that the first ``first`` leaves begin the first ``second``. Raises ValueError."""
    return consistency_path(first, second, partial(_node, query))


class Prover:
    """Proofs under the newest head. Those of one page share most of their hashes: each is read
    once."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._nodes: dict[tuple[int, int], bytes] = {}
        self._certificates: dict[bytes, bytes] = {}
        self._head = newest_head(query) or b""
        self._signer, self._size = b"", 0
        if self._head:
            envelope = msgspec.msgpack.decode(self._head, type=Envelope)
            self._signer = envelope.public_key
            self._size = msgspec.msgpack.decode(envelope.body, type=Head).size

    def prove(self, index: int) -> bytes | None:
        """The encoded ``Proof`` of a leaf; None if the log has no such leaf."""
        if not 0 <= index < self._size:
            return None
        [(leaf,)] = self._query("SELECT body FROM leaves WHERE number = ?", index)
        proof = Proof(
            version=1,
            leaf=bytes(leaf),
            index=index,
            path=tuple(inclusion_path(index, self._size, self._node)),
            head=self._head,
            certificates=self._certificates_for(bytes(leaf)),
        )
        return encode(proof)

    def _certificates_for(self, leaf: bytes) -> tuple[bytes, ...]:
        """The newest certificate of whoever signed the head, and of whoever signed the leaf."""
        keys = [self._signer]
        _, kind, _, body = msgspec.msgpack.decode(leaf)
        if kind in _SIGNED:
            signer = msgspec.msgpack.decode(body, type=Envelope).public_key
            keys += [signer] if signer != self._signer else []
        return tuple(self._certificate(key) for key in keys)

    def _certificate(self, key: bytes) -> bytes:
        if key not in self._certificates:
            [(wire,)] = self._query(
                "SELECT wire FROM certificates WHERE online_key = ? ORDER BY number DESC LIMIT 1",
                key,
            )
            self._certificates[key] = bytes(wire)
        return self._certificates[key]

    def _node(self, level: int, number: int) -> bytes:
        known = self._nodes.get((level, number))
        if known is None:
            known = self._nodes[level, number] = _node(self._query, level, number)
        return known


def prove(query: Query, index: int) -> bytes | None:
    """See ``Prover.prove``."""
    return Prover(query).prove(index)


def attestation_of(leaf: bytes) -> Attestation:
    """The record inside of a leaf that is known to hold one."""
    body = msgspec.msgpack.decode(leaf)[3]
    envelope = msgspec.msgpack.decode(body, type=Envelope)
    return msgspec.msgpack.decode(envelope.body, type=Attestation)


def _node(query: Query, level: int, number: int) -> bytes:
    [(digest,)] = query("SELECT hash FROM nodes WHERE level = ? AND number = ?", level, number)
    return bytes(digest)
