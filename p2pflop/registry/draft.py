"""One decision of the registry, in one transaction: what changes, its leaves, and the new head.

A draft is made inside the database's writer and either all of it is on disk or nothing. The head
that it signs at its end covers its leaves, so nothing is decided that the public log does not show.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from p2pflop.errors import ConfigError
from p2pflop.franchise.issuer import encode_leaf
from p2pflop.franchise.records import Certificate, Head, LeafKind, Schedule
from p2pflop.keys import PrivateKey
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.registry.home import LOST_KEY, load_online
from p2pflop.registry.log import append_leaf, head_time, log_root, log_size, query_of
from p2pflop.wire import Envelope, SignedRecord, seal

RENEW_CERTIFICATE: Final = (
    "Certify the next online key with the root key: p2pflop registry certify."
)

S = TypeVar("S", bound=SignedRecord)


def record_of(kind: type[S], wire: bytes) -> S:
    """What is inside an envelope that was checked when it was stored."""
    envelope = msgspec.msgpack.decode(wire, type=Envelope)
    return msgspec.msgpack.decode(envelope.body, type=kind)


class Draft:
    """``now_ns`` never goes back behind what the log has already."""

    def __init__(self, connection: sqlite3.Connection, online: PrivateKey | None, clock_ns: int):
        self.connection = connection
        self.query = query_of(connection)
        facts = {name: bytes(value) for name, value in self.query("SELECT * FROM facts")}
        self.issuer = facts["issuer"]
        self.network = facts["network"].decode()
        self.clock_ns = clock_ns
        self.now_ns = max(clock_ns, head_time(self.query))
        self._online = online
        self._size = log_size(self.query)
        self._may_sign = False

    def load_key(self, folder: Path) -> None:
        """Sign with the key in ``folder`` that is certified now, if it is there."""
        found = self.query("SELECT online_key FROM certificates ORDER BY number DESC LIMIT 1")
        self._online = load_online(folder, bytes(found[0][0])) if found else None

    def sign(self, record: SignedRecord) -> bytes:
        """An envelope by the online key. Raises ConfigError if that is not certified for now."""
        if self._online is None:
            raise ConfigError("the online key of this registry is not here", hint=LOST_KEY)
        if not self._may_sign:
            self._check_certificate(self._online.public_key)
            self._may_sign = True
        return seal(record, self._online, self.network).wire

    def append(self, kind: LeafKind, body: bytes) -> int:
        """Append a leaf; its number."""
        return append_leaf(self.connection, encode_leaf(kind, self.now_ns, body))

    def schedules(self) -> list[Schedule]:
        """Every schedule that was ever published."""
        found = self.query("SELECT wire FROM schedules ORDER BY number")
        return [record_of(Schedule, bytes(wire)) for (wire,) in found]

    def finish(self) -> None:
        """Sign the head, if there are new leaves."""
        if log_size(self.query) != self._size:
            self.sign_head()

    def sign_head(self) -> None:
        """A head of the whole log, now; it takes the place of an older one of the same size."""
        size = log_size(self.query)
        head = Head(1, self.issuer, size, log_root(self.query, size), self.now_ns)
        self.connection.execute(
            "INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (size, self.now_ns, self.sign(head))
        )

    def _check_certificate(self, online_key: bytes) -> None:
        found = self.query("SELECT wire FROM certificates ORDER BY number DESC LIMIT 1")
        certificate = record_of(Certificate, bytes(found[0][0]))
        if certificate.online_key != online_key:
            raise ConfigError(
                "the online key of this registry is not the one that was certified last",
                hint=RENEW_CERTIFICATE,
            )
        if self.now_ns > self.clock_ns + CLOCK_TOLERANCE_NS:
            raise ConfigError(
                "the clock is behind the registry's own log",
                hint="Set the clock. If it was ahead before, wait until it is there again.",
            )
        if not certificate.valid_from_ns <= self.now_ns < certificate.valid_until_ns:
            raise ConfigError(
                "the certificate of the online key is not for now", hint=RENEW_CERTIFICATE
            )
