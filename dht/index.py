"""The index of a store: which blobs there are, who may read them, and which file holds each.

One row a copy. A row with a bitmap is a partial, of which an owner has at most one a blob; a row
without is whole, and there is at most one of these a blob. Rows name files and files have one
name for life, so a partial becomes whole, a damaged blob becomes a partial and a better copy
replaces a worse one by one change to a row, with nothing to move and no order to get wrong.

Whatever takes a file out of use returns its name in ``Change``; the caller removes it after the
commit. Functions that end in ``_row`` or ``_rows`` run inside the writer's transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pflop.dht.blobs import BlobInfo, check_grants, deleted_meanwhile, not_found
from p2pflop.dht.database import Database
from p2pflop.dht.manifest import Manifest, chunk_count
from p2pflop.errors import StoreError
from p2pflop.wire import decode, encode

FORMAT: Final = 1
SCHEMA: Final = """
CREATE TABLE blobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  address BLOB NOT NULL,
  size_bytes INTEGER NOT NULL,
  public INTEGER NOT NULL,
  owner BLOB NOT NULL,
  created_ns INTEGER NOT NULL,
  file TEXT NOT NULL,
  bitmap BLOB,
  manifest BLOB NOT NULL,
  data BLOB
);
CREATE UNIQUE INDEX whole_blobs ON blobs (address) WHERE bitmap IS NULL;
CREATE UNIQUE INDEX partial_blobs ON blobs (address, owner) WHERE bitmap IS NOT NULL;
CREATE TABLE grants (
  address BLOB NOT NULL,
  reader BLOB NOT NULL,
  PRIMARY KEY (address, reader)
) WITHOUT ROWID
"""

_COLUMNS: Final = "id, address, size_bytes, public, owner, created_ns, file"
_FROM: Final = f"SELECT {_COLUMNS}, bitmap FROM blobs "  # noqa: S608 - no value is ever spliced in
_BY_ID: Final = _FROM + "WHERE id = ?"
_WHOLE: Final = _FROM + "WHERE address = ? AND bitmap IS NULL"
_ALL_WHOLE: Final = _FROM + "WHERE bitmap IS NULL ORDER BY created_ns, id"
_PARTIAL: Final = _FROM + "WHERE address = ? AND owner = ? AND bitmap IS NOT NULL"
_GRANTED: Final = "SELECT 1 FROM grants WHERE address = ? AND reader = ?"


@dataclass(frozen=True, slots=True)
class Row:
    """A copy of a blob. ``file`` is empty if the bytes are in the index."""

    id: int
    info: BlobInfo
    file: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that is on disk, and is to be known from now on."""

    manifest: Manifest
    address: bytes
    public: bool
    owner: bytes
    created_ns: int
    file: str = ""
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What came of a change: the blob, files out of use, and the bytes that these free."""

    info: BlobInfo | None
    unused: tuple[str, ...] = ()
    freed_bytes: int = 0

    @property
    def kept(self) -> BlobInfo:
        """The blob of a change that keeps one."""
        if self.info is None:
            raise AssertionError("a change that keeps a blob names it")
        return self.info


def open_index(path: Path) -> Database:
    """A database for the index of one store and nothing else. Raises StoreError."""
    return Database(path, SCHEMA, FORMAT)


class Index:
    """The rows of one store, in a database that may have other tables beside these."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Look-ups, on the event loop.

    def whole(self, address: bytes) -> Row | None:
        """The whole copy of a blob."""
        return _row(self._database.read(_WHOLE, address))

    def partial(self, address: bytes, owner: bytes) -> tuple[Row, bytes] | None:
        """The partial of ``owner`` and its bitmap."""
        rows = self._database.read(_PARTIAL, address, owner)
        row = _row(rows)
        return None if row is None else (row, rows[0][-1])

    def manifest(self, row: Row) -> Manifest | None:
        """What the blob is made of; None if the row is gone. Raises ProtocolError if damaged."""
        rows = self._database.read("SELECT manifest FROM blobs WHERE id = ?", row.id)
        return decode(Manifest, rows[0][0]) if rows else None

    def data(self, row: Row) -> bytes | None:
        """The bytes of a small blob; None if the row is gone."""
        rows = self._database.read("SELECT data FROM blobs WHERE id = ?", row.id)
        return rows[0][0] if rows else None

    def all_whole(self) -> list[Row]:
        """All whole copies, oldest first."""
        return [_as_row(columns) for columns in self._database.read(_ALL_WHOLE)]

    def is_granted(self, address: bytes, reader: bytes) -> bool:
        """Whether ``reader`` was granted the blob, or is one of its later owners."""
        return bool(self._database.read(_GRANTED, address, reader))

    def count(self) -> tuple[int, int, int]:
        """Whole copies, partials, and the bytes that all of them need."""
        ((rows, whole, size_bytes),) = self._database.read(
            "SELECT count(*), count(*) FILTER (WHERE bitmap IS NULL), total(size_bytes) FROM blobs"
        )
        return whole, rows - whole, int(size_bytes)

    def files(self) -> set[str]:
        """Names of all files in use."""
        return {name for (name,) in self._database.read("SELECT file FROM blobs") if name}

    # Changes. Each is on disk when its method returns.

    async def keep(self, copy: Copy) -> Change:
        """A whole copy, which takes the place of an older one and of its owner's partial."""
        return await self._database.write(lambda connection: keep_row(connection, copy))

    async def own(self, address: bytes, public: bool, owner: bytes) -> Change:
        """One more owner for a whole blob, which needs its partial no more; nothing if there is no
        such blob."""

        def operation(connection: sqlite3.Connection) -> Change:
            info = _own_row(connection, address, public, owner)
            if info is None:
                return Change(None)
            partial = _delete_rows(
                connection,
                "address = ? AND owner = ? AND bitmap IS NOT NULL",
                (address, owner),
            )
            return Change(info, partial.unused, partial.freed_bytes)

        return await self._database.write(operation)

    async def begin(self, copy: Copy) -> tuple[Row, bytes]:
        """The owner's partial and its bitmap: a new one in ``copy.file`` unless there is one."""
        return await self._database.write(lambda connection: _begin_row(connection, copy))

    async def save_bits(self, row: Row, bits: bytes) -> None:
        """Chunks of a partial that are on disk. Raises StoreError if it was deleted."""
        await self._database.write(lambda connection: _save_bits_row(connection, row, bits))

    async def promote(self, row: Row, public: bool) -> Change:
        """A partial that has become whole. Raises StoreError if it is not, or was deleted."""
        return await self._database.write(lambda connection: _promote_row(connection, row, public))

    async def forget_partial(self, row: Row) -> Change:
        """A partial whose file is lost; nothing if it has become whole since it was read."""
        where = "id = ? AND file = ? AND bitmap IS NOT NULL"
        return await self._database.write(
            lambda connection: _delete_rows(connection, where, (row.id, row.file))
        )

    async def demote(self, row: Row, bad_chunk: int | None) -> Change | None:
        """A whole copy that lacks a chunk, or all. None if the row changed since it was read."""
        return await self._database.write(
            lambda connection: _demote_row(connection, row, bad_chunk)
        )

    async def set_public(self, address: bytes, public: bool) -> BlobInfo:
        """Raises BlobNotFoundError."""

        def operation(connection: sqlite3.Connection) -> BlobInfo:
            row = _whole_row(connection, address)
            if row is None:
                raise not_found(address)
            connection.execute("UPDATE blobs SET public = ? WHERE id = ?", (public, row.id))
            return _info(connection, row.id)

        return await self._database.write(operation)

    async def grant(self, address: bytes, reader: bytes) -> None:
        """Raises BlobNotFoundError, StoreError over ``MAX_GRANTS``."""

        def operation(connection: sqlite3.Connection) -> None:
            if _whole_row(connection, address) is None:
                raise not_found(address)
            _grant_row(connection, address, reader)

        await self._database.write(operation)

    async def revoke(self, address: bytes, reader: bytes) -> None:
        """Take a grant back."""
        query = "DELETE FROM grants WHERE address = ? AND reader = ?"
        await self._database.write(lambda connection: connection.execute(query, (address, reader)))

    async def delete(self, address: bytes, owner: bytes | None = None) -> Change:
        """All copies and grants of a blob; with ``owner``, only of a private one of that owner."""

        def operation(connection: sqlite3.Connection) -> Change:
            if owner is not None:
                row = _whole_row(connection, address)
                if row is None or row.info.public or row.info.owner != owner:
                    return Change(None, (), 0)
            connection.execute("DELETE FROM grants WHERE address = ?", (address,))
            return _delete_rows(connection, "address = ?", (address,))

        return await self._database.write(operation)

    async def delete_stale_partials(self, before_ns: int) -> Change:
        """Partials begun before ``before_ns``."""
        return await self._database.write(
            lambda connection: _delete_rows(
                connection, "bitmap IS NOT NULL AND created_ns < ?", (before_ns,)
            )
        )

    async def delete_strangers_partials(
        self, before_ns: int, keep: Collection[bytes]
    ) -> list[Change]:
        """Partials with an owner, begun before ``before_ns``, of addresses not in ``keep``."""

        def operation(connection: sqlite3.Connection) -> list[Change]:
            query = (
                "SELECT id, address FROM blobs"
                " WHERE bitmap IS NOT NULL AND owner != x'' AND created_ns < ?"
            )
            rows = connection.execute(query, (before_ns,)).fetchall()
            return [
                _delete_rows(connection, "id = ?", (number,))
                for number, address in rows
                if address not in keep
            ]

        return await self._database.write(operation)


def bitmap_of(chunks: int, *, without: int | None = None) -> bytes:
    """All bits of ``chunks`` set, but for one."""
    bits = bytearray((chunks + 7) // 8)
    for index in range(chunks):
        if index != without:
            bits[index >> 3] |= 1 << (index & 7)
    return bytes(bits)


def _as_row(columns: tuple[object, ...]) -> Row:
    number, address, size_bytes, public, owner, created_ns, file = columns[:7]
    info = BlobInfo(address, size_bytes, bool(public), owner, created_ns)  # type: ignore[arg-type]
    return Row(number, info, file)  # type: ignore[arg-type]


def _row(rows: list[tuple[object, ...]]) -> Row | None:
    return _as_row(rows[0]) if rows else None


def _whole_row(connection: sqlite3.Connection, address: bytes) -> Row | None:
    return _row(connection.execute(_WHOLE, (address,)).fetchall())


def _info(connection: sqlite3.Connection, number: int) -> BlobInfo:
    return _as_row(connection.execute(_BY_ID, (number,)).fetchone()).info


def _insert_row(connection: sqlite3.Connection, copy: Copy, bitmap: bytes | None) -> int:
    cursor = connection.execute(
        "INSERT INTO blobs (address, size_bytes, public, owner, created_ns, file, bitmap, manifest,"
        " data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            copy.address,
            copy.manifest.size_bytes,
            copy.public,
            copy.owner,
            copy.created_ns,
            copy.file,
            bitmap,
            encode(copy.manifest),
            copy.data,
        ),
    )
    return cursor.lastrowid or 0


def _grant_row(connection: sqlite3.Connection, address: bytes, reader: bytes) -> None:
    query = "SELECT count(*) FROM grants WHERE address = ? AND reader != ?"
    ((count,),) = connection.execute(query, (address, reader))
    check_grants(address, count)
    connection.execute("INSERT OR IGNORE INTO grants VALUES (?, ?)", (address, reader))


def _own_row(
    connection: sqlite3.Connection, address: bytes, public: bool, owner: bytes
) -> BlobInfo | None:
    row = _whole_row(connection, address)
    if row is None:
        return None
    if public:
        connection.execute("UPDATE blobs SET public = 1 WHERE id = ?", (row.id,))
    if owner not in (b"", row.info.owner):
        _grant_row(connection, address, owner)
    if not owner and row.info.owner:
        _grant_row(connection, address, row.info.owner)
        connection.execute("UPDATE blobs SET owner = ? WHERE id = ?", (owner, row.id))
    return _info(connection, row.id)


def _delete_rows(connection: sqlite3.Connection, where: str, values: tuple[object, ...]) -> Change:
    """``where`` is one of this module's own constants."""
    found = connection.execute(
        f"DELETE FROM blobs WHERE {where} RETURNING file, size_bytes",  # noqa: S608
        values,
    ).fetchall()
    return Change(None, tuple(file for file, _ in found), sum(size for _, size in found))


def keep_row(connection: sqlite3.Connection, copy: Copy) -> Change:
    """What ``Index.keep`` does, in the transaction of ``connection``."""
    partial = _delete_rows(
        connection,
        "address = ? AND owner = ? AND bitmap IS NOT NULL",
        (copy.address, copy.owner),
    )
    old = _whole_row(connection, copy.address)
    if old is None:
        number = _insert_row(connection, copy, None)
        return Change(_info(connection, number), partial.unused, partial.freed_bytes)
    connection.execute(
        "UPDATE blobs SET file = ?, data = ?, manifest = ? WHERE id = ?",
        (copy.file, copy.data, encode(copy.manifest), old.id),
    )
    return Change(
        _own_row(connection, copy.address, copy.public, copy.owner),
        (*partial.unused, old.file),
        partial.freed_bytes + old.info.size_bytes,
    )


def _begin_row(connection: sqlite3.Connection, copy: Copy) -> tuple[Row, bytes]:
    key = (copy.address, copy.owner)
    found = connection.execute(_PARTIAL, key).fetchone()
    if found is None:
        _insert_row(connection, copy, bytes((len(copy.manifest.chunks) + 7) // 8))
        found = connection.execute(_PARTIAL, key).fetchone()
    return _as_row(found), found[-1]


def _partial_row(connection: sqlite3.Connection, row: Row) -> tuple[BlobInfo | None, bytes]:
    """A partial's bitmap; or the whole blob that it, or a put by its owner, has become."""
    found = connection.execute(_BY_ID, (row.id,)).fetchone()
    if found is not None and found[-1] is not None:
        return None, found[-1]
    whole = _whole_row(connection, row.info.address)
    if whole is not None:
        owner = row.info.owner
        granted = connection.execute(_GRANTED, (row.info.address, owner)).fetchone() is not None
        if granted or whole.info.public or owner in (b"", whole.info.owner):
            return whole.info, b""
    raise deleted_meanwhile(row.info.address)


def _save_bits_row(connection: sqlite3.Connection, row: Row, bits: bytes) -> None:
    whole, bitmap = _partial_row(connection, row)
    if whole is None:
        joined = bytes(old | new for old, new in zip(bitmap, bits, strict=True))
        connection.execute("UPDATE blobs SET bitmap = ? WHERE id = ?", (joined, row.id))


def _promote_row(connection: sqlite3.Connection, row: Row, public: bool) -> Change:
    whole, bitmap = _partial_row(connection, row)
    if whole is not None:
        return Change(_own_row(connection, whole.address, public, row.info.owner))
    if bitmap != bitmap_of(chunk_count(row.info.size_bytes)):
        raise StoreError(f"chunks of blob {row.info.address.hex()} are still missing")
    old = _whole_row(connection, row.info.address)
    if old is None:
        connection.execute("UPDATE blobs SET bitmap = NULL WHERE id = ?", (row.id,))
        return Change(_own_row(connection, row.info.address, public, row.info.owner))
    connection.execute("DELETE FROM blobs WHERE id = ?", (row.id,))
    connection.execute("UPDATE blobs SET file = ? WHERE id = ?", (row.file, old.id))
    info = _own_row(connection, row.info.address, public, row.info.owner)
    return Change(info, (old.file,), row.info.size_bytes)


def _demote_row(connection: sqlite3.Connection, row: Row, bad_chunk: int | None) -> Change | None:
    current = _whole_row(connection, row.info.address)
    if current is None or (current.id, current.file) != (row.id, row.file):
        return None
    key = (row.info.address, row.info.owner)
    has_partial = connection.execute(_PARTIAL, key).fetchone() is not None
    if not row.file or bad_chunk is None or has_partial:
        return _delete_rows(connection, "id = ?", (row.id,))
    held = bitmap_of(chunk_count(row.info.size_bytes), without=bad_chunk)
    connection.execute("UPDATE blobs SET bitmap = ? WHERE id = ?", (held, row.id))
    return Change(None)
