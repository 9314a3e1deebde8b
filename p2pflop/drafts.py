"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from p2pflop.dht.files import NO_ROOM
from p2pflop.errors import ConfigError, P2PFlopError, StoreFullError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears at ``path`` when the context ends without an error, and is
    on disk then. A symbolic link is followed.

    Raises ConfigError if ``path`` is a folder, a device or in no folder, or may not be written;
    StoreFullError if the disk is full.
    """
    target = _target(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> P2PFlopError:
    """The error to raise for what the disk said."""
    message = f"cannot write {path}: {error.strerror}"
    if error.errno in NO_ROOM:
        return StoreFullError(message, hint="Free space on that disk, or write to another.")
    return ConfigError(message)


def _target(path: Path) -> Path:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", hint=f"Name a file in it, like {path / 'data'}.")
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ConfigError(
            f"{path} is no regular file", hint="Write to standard output: -o - where there is that."
        )
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}", hint="Make it first.")
    return target
