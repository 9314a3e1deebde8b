"""What a node knows of registries, at rest: proofs, certificates, heads, evidence, its enrolments.

All of it but the enrolments could be asked for again, and is verified again when it is read, as if
peers had brought it: a restart while a registry is down must not make its accounts strangers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from p2pflop.dht.database import Database
from p2pflop.franchise.roll import Roll
from p2pflop.market.records import Rejected

FILE_NAME: Final = "franchise.db"
_FORMAT: Final = 1
_SCHEMA: Final = """
CREATE TABLE proofs (
    issuer BLOB NOT NULL, is_revocation INTEGER NOT NULL, account BLOB NOT NULL,
    proof BLOB NOT NULL, PRIMARY KEY (issuer, is_revocation, account)
);
CREATE TABLE certificates (issuer BLOB NOT NULL, wire BLOB NOT NULL, PRIMARY KEY (issuer, wire));
CREATE TABLE registries (
    issuer BLOB PRIMARY KEY, head BLOB NOT NULL, serial INTEGER NOT NULL, leaf INTEGER NOT NULL,
    enrolment BLOB NOT NULL, fork BLOB NOT NULL, forgiven_ns INTEGER NOT NULL
)
"""


@dataclass(slots=True)
class Notes:
    """What is remembered of one registry beside its proofs.

    ``head`` is the newest that was shown to continue those before; all attestations up to
    ``serial`` and revocations before ``leaf`` have been read. ``enrolment`` is the id of the last
    application, ``fork`` the evidence that convicts, each empty if there is none.
    """

    head: bytes = b""
    serial: int = 0
    leaf: int = 0
    enrolment: bytes = b""
    fork: bytes = b""
    forgiven_ns: int = -1


@dataclass(slots=True)
class Changes:
    """What is not on disk yet."""

    proofs: dict[tuple[bytes, bool, bytes], bytes] = field(default_factory=dict)
    certificates: set[tuple[bytes, bytes]] = field(default_factory=set)
    notes: dict[bytes, Notes] = field(default_factory=dict)

    def followed_by(self, later: Changes) -> Changes:
        """Both, the later ones over these."""
        return Changes(
            self.proofs | later.proofs,
            self.certificates | later.certificates,
            self.notes | later.notes,
        )

    def __bool__(self) -> bool:
        return bool(self.proofs or self.certificates or self.notes)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is on disk of one registry."""

    issuer: bytes
    notes: Notes
    certificates: list[bytes]
    revocations: list[bytes]
    attestations: list[bytes]

    def restore(self, roll: Roll, now_ns: int) -> Notes:
        """Put it into ``roll``. What does not hold, or has expired, is left out."""
        notes = self.notes
        for wire in self.certificates:
            roll.learn(self.issuer, (wire,))
        if notes.forgiven_ns >= 0:
            roll.forgive(self.issuer, notes.forgiven_ns)
        for proof in self.revocations:
            roll.revoke(proof, now_ns)
        for proof in self.attestations:
            roll.admit(proof, now_ns)
        if notes.head:
            roll.remember(self.issuer, notes.head, now_ns)
        if notes.fork and isinstance(roll.convict(notes.fork), Rejected):
            notes.fork = roll.fork(self.issuer) or b""
        return notes


class FranchiseFile:
    """Of one node's home. Raises StoreError."""

    def __init__(self, folder: Path) -> None:
        self._database = Database(folder / FILE_NAME, _SCHEMA, _FORMAT)

    async def aclose(self) -> None:
        """Close the file."""
        await self._database.aclose()

    def read(self, issuers: Iterable[bytes]) -> list[Kept]:
        """All that is kept of these registries."""
        return [self._kept(issuer) for issuer in issuers]

    async def save(self, changes: Changes) -> None:
        """Write all of ``changes`` in one transaction."""
        proofs = [(*key, proof) for key, proof in changes.proofs.items()]
        certificates = sorted(changes.certificates)
        registries = [
            (issuer, n.head, n.serial, n.leaf, n.enrolment, n.fork, n.forgiven_ns)
            for issuer, n in changes.notes.items()
        ]

        def write(connection: sqlite3.Connection) -> None:
            put = "INSERT OR REPLACE INTO"
            connection.executemany(f"{put} proofs VALUES (?, ?, ?, ?)", proofs)
            connection.executemany(f"{put} certificates VALUES (?, ?)", certificates)
            connection.executemany(f"{put} registries VALUES (?, ?, ?, ?, ?, ?, ?)", registries)

        await self._database.write(write)

    async def forget_expired(self, roll: Roll) -> int:
        """Drop attestations that ``roll`` holds no more; how many."""
        kept = {(key, each.account) for key in roll.issuers for each in roll.standings(key)}
        found = self._read("SELECT issuer, account FROM proofs WHERE is_revocation = 0")
        gone = [pair for pair in found if pair[0] in roll.issuers and pair not in kept]
        drop = "DELETE FROM proofs WHERE is_revocation = 0 AND issuer = ? AND account = ?"
        if gone:
            await self._database.write(lambda connection: connection.executemany(drop, gone))
        return len(gone)

    def _kept(self, issuer: bytes) -> Kept:
        proofs = "SELECT proof FROM proofs WHERE issuer = ? AND is_revocation = ?"
        notes = self._read(
            "SELECT head, serial, leaf, enrolment, fork, forgiven_ns FROM registries"
            " WHERE issuer = ?",
            issuer,
        )
        certificates = self._read("SELECT wire FROM certificates WHERE issuer = ?", issuer)
        return Kept(
            issuer,
            Notes(*notes[0]) if notes else Notes(),
            [wire for (wire,) in certificates],
            [proof for (proof,) in self._read(proofs, issuer, 1)],
            [proof for (proof,) in self._read(proofs, issuer, 0)],
        )

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self._database.read(query, *values)
