"""Plans on disk: one file a key, its hash in front, the least recently used thrown away first.

A plan is machine code that will run in a worker, so a file that does not match its hash (a torn
write, a bad disk) is deleted and the graph lowered again. Files are written beside their name,
synced and renamed: a crash leaves an old plan, a new plan or none.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Final

import trio

from p2pflop.ids import HASH_BYTES, content_hash
from p2pflop.units import GIB, MIB

MAX_DISK_BYTES: Final = 2 * GIB
MAX_MEMORY_BYTES: Final = 32 * MIB
_SUFFIX: Final = ".plan"


class PlanCache:
    """Plans by key, in memory and in ``folder``; sizes bound both. One process owns the folder."""

    def __init__(
        self,
        folder: Path,
        *,
        disk_bytes: int = MAX_DISK_BYTES,
        memory_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._memory_bytes = memory_bytes
        self._recent: OrderedDict[bytes, bytes] = OrderedDict()
        self._recent_bytes = 0
        self._disk = trio.Lock()

    async def get(self, key: bytes) -> bytes | None:
        """The plan of ``key``, or None."""
        plan = self.recent(key)
        if plan is None:
            # No wait for what is being written: a file is there whole, or not.
            plan = await trio.to_thread.run_sync(self._read, key)
            if plan is not None:
                self._remember(key, plan)
        return plan

    def recent(self, key: bytes) -> bytes | None:
        """The plan of ``key`` if it is in memory."""
        plan = self._recent.get(key)
        if plan is not None:
            self._recent.move_to_end(key)
        return plan

    async def put(self, key: bytes, plan: bytes) -> None:
        """Keep a plan durably. A full or broken disk costs only the next lowering."""
        self._remember(key, plan)
        async with self._disk:
            with contextlib.suppress(OSError):
                await trio.to_thread.run_sync(self._write, key, plan)

    def _remember(self, key: bytes, plan: bytes) -> None:
        self._recent_bytes += len(plan) - len(self._recent.pop(key, b""))
        self._recent[key] = plan
        while self._recent_bytes > self._memory_bytes:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= len(oldest)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{_SUFFIX}"

    def _read(self, key: bytes) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            if content_hash(data[HASH_BYTES:]) == data[:HASH_BYTES]:
                os.utime(path)
                return data[HASH_BYTES:]
            path.unlink()
        except OSError:
            pass  # absent, or not to be read: both mean lowering again
        return None

    def _write(self, key: bytes, plan: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content_hash(plan))
                file.write(plan)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._path(key))
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        self._trim()

    def _trim(self) -> None:
        found = [(path, path.stat()) for path in self._folder.iterdir() if path.is_file()]
        total = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self._disk_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
