"""Backup and restore: the database in one file, checked before it is believed.

Keys are not in it. The online key needs no backup, since the root key certifies another; the root
key must have one of its own. A backup is of the moment at which it is made: what is decided later
is in no copy, and a registry that goes on from an older one shows another history than it did. So
after such a loss a certificate that withdraws the keys before says so in public: ``certifying``.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pflop.errors import ConfigError, StoreError, VerificationError
from p2pflop.franchise.auditor import Auditor
from p2pflop.franchise.merkle import MemoryTree
from p2pflop.market.records import Rejected
from p2pflop.registry.books import check_books
from p2pflop.registry.log import PAGE_LEAVES, Query, newest_head
from p2pflop.registry.schema import FILE_NAME, FORMAT


@dataclass(frozen=True, slots=True)
class Contents:
    """What a database holds that was checked."""

    issuer: bytes
    network: str
    leaves: int
    entries: int
    head_at_ns: int


def back_up(folder: Path, target: Path) -> Contents:
    """Copy the database of a registry, served or not, to a new file. Raises ConfigError, and
    VerificationError if what was copied does not hold."""
    if target.exists():
        raise ConfigError(f"{target} is there already", hint="Name a new file for every backup.")
    draft = target.with_name(target.name + ".part")
    try:
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with closing(_open(folder / FILE_NAME)) as source, closing(sqlite3.connect(draft)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        contents = check_file(draft)
        _settle(draft, target)
    except sqlite3.Error as error:
        raise StoreError(f"the backup to {target} failed: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    return contents


def restore(backup: Path, folder: Path) -> Contents:
    """Put a backup where no registry is. Raises ConfigError, VerificationError."""
    target = folder / FILE_NAME
    if target.exists():
        raise ConfigError(
            f"there is a registry in {folder}",
            hint="Stop it and move its registry.db, -wal and -shm away first; keep them.",
        )
    contents = check_file(backup)
    draft = target.with_name(target.name + ".part")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(backup.read_bytes())
        for name in (f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"):
            (folder / name).unlink(missing_ok=True)
        _settle(draft, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    return contents


def check_file(path: Path) -> Contents:
    """Check a database that nobody writes: pages, every leaf, the head, the books.

    Raises ConfigError if it is none, VerificationError if it does not hold.
    """
    with closing(_open(path)) as connection:

        def query(statement: str, *values: object) -> list[tuple[Any, ...]]:
            return connection.execute(statement, values).fetchall()

        try:
            return _check(query, path)
        except sqlite3.Error as error:
            raise VerificationError(f"{path} is damaged: {error}") from error


def _check(query: Query, path: Path) -> Contents:
    [(version,)] = query("PRAGMA user_version")
    if version != FORMAT:
        raise ConfigError(f"{path} is not a registry's database of this version")
    if query("PRAGMA integrity_check") != [("ok",)]:
        raise VerificationError(f"{path} is damaged")
    facts = {name: bytes(value) for name, value in query("SELECT * FROM facts")}
    if not {"issuer", "network"} <= facts.keys():
        raise VerificationError(f"{path} does not say which registry it is")
    auditor = Auditor(facts["issuer"], facts["network"].decode())
    while page := query(
        "SELECT body FROM leaves WHERE number >= ? ORDER BY number LIMIT ?",
        *(len(auditor.tree), PAGE_LEAVES),
    ):
        for (leaf,) in page:
            auditor.take(bytes(leaf))
    wire = newest_head(query)
    head = auditor.issuer.check_head(wire or b"", 2**63 - 1)
    if isinstance(head, Rejected):
        raise VerificationError(f"{path}: {head.reason}")
    size = len(auditor.tree)
    if (head.record.size, head.record.root) != (size, auditor.tree.root()):
        raise VerificationError(f"{path}: the leaves are not those that the head is about")
    _check_nodes(query, auditor.tree, path)
    return Contents(
        issuer=facts["issuer"],
        network=facts["network"].decode(),
        leaves=size,
        entries=check_books(query),
        head_at_ns=head.record.at_ns,
    )


def _check_nodes(query: Query, tree: MemoryTree, path: Path) -> None:
    """The tree on disk is that of the leaves."""
    for level, count in enumerate(tree.nodes()):
        found = query("SELECT hash FROM nodes WHERE level = ? ORDER BY number", level)
        if [bytes(digest) for (digest,) in found] != [
            tree.node(level, number) for number in range(count)
        ]:
            raise VerificationError(f"{path}: the tree is not that of the leaves")


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise ConfigError(f"{path} is not a registry's database: {error}") from error
    return connection


def _settle(draft: Path, target: Path) -> None:
    """Give a finished draft its name, on disk."""
    for path, flags in ((draft, os.O_RDWR), (draft.parent, os.O_RDONLY)):
        if path == draft.parent:
            draft.replace(target)
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
