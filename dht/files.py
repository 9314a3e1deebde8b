"""The files of a store: blocking calls, for worker threads.

A file is named by random digits, so nothing that a peer says is ever part of a path, and the name
never changes: what a file is, whole or partial, only the index says. A file that no row of the
index names is left over from a crash and is swept at the next start.

Nothing here is durable before ``sync``: it flushes the data and, once, the folder's entry.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from p2pflop.dht.manifest import CHUNK_BYTES, Buffer, Manifest
from p2pflop.errors import StoreError, StoreFullError, VerificationError

NAME_BYTES: Final = 16

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync.
FREE_SPACE: Final = "Free space on it, or delete blobs that are not needed: p2pflop rm HASH."
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedChunk(Exception):
    """A chunk on disk is not what it was. ``index`` is None if the file itself is gone."""

    def __init__(self, index: int | None) -> None:
        super().__init__(index)
        self.index = index


class DataFile:
    """One open file of a store."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Open file ``name``, or create one of size 0. Raises OSError."""
        self.name = name or secrets.token_hex(NAME_BYTES)
        self._folder = folder
        self._is_new = name is None
        flags = os.O_RDWR | os.O_CLOEXEC
        if self._is_new:
            flags |= os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(folder / self.name, flags, 0o600)

    def resize(self, size_bytes: int) -> None:
        """Make the file ``size_bytes`` long; what is not written takes no space."""
        os.ftruncate(self._descriptor, size_bytes)

    def write(self, data: Buffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)

    def sync(self) -> None:
        """Return when all that was written is on disk, and so is the file's name."""
        _sync_data(self._descriptor)
        if self._is_new:
            folder = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._is_new = False

    def close(self) -> None:
        """Close it; twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_new(folder: Path, data: Buffer) -> str:
    """The name of a new file that holds ``data``, on disk. Raises OSError and leaves no file."""
    file = DataFile(folder)
    try:
        file.write(data, 0)
        file.sync()
    except OSError:
        remove(folder, [file.name])
        raise
    finally:
        file.close()
    return file.name


def read_chunks(folder: Path, name: str, manifest: Manifest, first: int, end: int) -> bytes:
    """Chunks ``first`` to ``end`` of a blob, verified. Raises DamagedChunk."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DamagedChunk(None) from error
    try:
        data = _read(descriptor, manifest, first, end)
    finally:
        os.close(descriptor)
    with memoryview(data) as view:
        for index in range(first, end):
            start = (index - first) * CHUNK_BYTES
            chunk = view[start : start + manifest.chunk_length(index)]
            if not manifest.is_chunk(index, chunk):
                raise DamagedChunk(index)
    return data


def verify(folder: Path, name: str, manifest: Manifest) -> None:
    """Read a whole blob and check it. Raises DamagedChunk at the first chunk that is bad."""
    for index in range(len(manifest.chunks)):
        read_chunks(folder, name, manifest, index, index + 1)


def _read(descriptor: int, manifest: Manifest, first: int, end: int) -> bytes:
    """The bytes of some chunks in one piece: joining chunks would cost more than hashing them."""
    start = first * CHUNK_BYTES
    size = min(end * CHUNK_BYTES, manifest.size_bytes) - start
    data = b""
    while len(data) < size:
        try:
            more = os.pread(descriptor, size - len(data), start + len(data))
        except OSError:
            break  # The chunk that cannot be read is found when all are checked.
        if not more:
            break
        data = data + more if data else more
    return data


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files. One that cannot be removed now is swept at the next start."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def sweep(folder: Path, named: set[str]) -> int:
    """Remove every file that is not in ``named``; how many there were."""
    left_over = [path.name for path in folder.iterdir() if path.name not in named]
    remove(folder, left_over)
    return len(left_over)


class Reserve:
    """Room on the disk that is kept for deleting: even that needs some, for the database's log."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def take(self) -> None:
        """Take the room, if there is as much."""
        try:
            if not self._path.exists() or self._path.stat().st_size < self._size_bytes:
                self._path.write_bytes(bytes(self._size_bytes))
        except OSError:
            self.give()

    def give(self) -> bool:
        """Give it back to the disk; whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True


def disk_error(error: OSError, path: Path) -> StoreError:
    """What to tell a user about ``error`` from the store at ``path``."""
    reason = error.strerror or error
    if error.errno in NO_ROOM:
        return StoreFullError(f"the disk of the store at {path} is full: {reason}", hint=FREE_SPACE)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "See that this user may write to the folder and that the disk is not read-only."
    else:
        hint = "The disk may be failing: look at the system's log."
    return StoreError(f"the store at {path} failed: {reason}", hint=hint)


def damage_error(address: bytes, damage: DamagedChunk) -> VerificationError:
    """What to tell a user about ``damage`` to a blob."""
    part = "its bytes" if damage.index is None else f"chunk {damage.index}"
    return VerificationError(
        f"blob {address.hex()} is damaged on disk: {part} cannot be read back",
        hint="Fetch it or put it again; if this repeats, the disk is failing.",
    )


def lock(path: Path) -> int:
    """A descriptor that holds the store until it is closed. Raises StoreError if another does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreError(
            f"another process has the store at {path.parent} open",
            hint="Talk to the running node, or stop it first.",
        ) from error
    return descriptor


def open_existing(folder: Path, name: str) -> DataFile:
    """File ``name``. Raises DamagedChunk if there is none."""
    try:
        return DataFile(folder, name)
    except FileNotFoundError as error:
        raise DamagedChunk(None) from error


def new_sparse(folder: Path, size_bytes: int) -> DataFile:
    """A new file of ``size_bytes`` that takes no space yet, its name on disk. Raises OSError."""
    file = DataFile(folder)
    try:
        file.resize(size_bytes)
        file.sync()
    except OSError:
        file.close()
        remove(folder, [file.name])
        raise
    return file
