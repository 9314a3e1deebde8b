"""A node's home: its lock, keys, token, and the note that tells local programs where it listens.

``account.pem`` owns the money and signs a delegation to ``node.pem``, the peer's identity. Both
rest unencrypted with mode 600: a daemon must start without a person. On another box of the account
``delegation.bin`` stands in the place of ``account.pem`` (``delegating.py``).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pflop.dht.files import NO_ROOM
from p2pflop.errors import ConfigError, HomeLockedError, P2PFlopError, StoreFullError
from p2pflop.keys import SEED_BYTES, PrivateKey
from p2pflop.node.delegating import FILE_NAME as DELEGATION
from p2pflop.node.delegating import Delegated, read_delegation
from p2pflop.wire import DEFAULT_NETWORK

TOKEN_BYTES: Final = 32
_TOKEN: Final = re.compile(rb"[A-Za-z0-9_-]{16,}")


@dataclass(frozen=True, slots=True)
class Home:
    """An opened home. Only one process holds one at a time."""

    path: Path
    account: PrivateKey | Delegated
    node: PrivateKey
    token: str

    def write_note(self, url: str, peer: str, *, embedded: bool) -> None:
        """Tell local programs where this node listens (``node.json``)."""
        note = {
            "url": url,
            "pid": os.getpid(),
            "peer": peer,
            "account": self.account.public_key.hex(),
            "embedded": embedded,
        }
        write_private(self.path / "node.json", json.dumps(note, indent=1).encode() + b"\n")


@contextmanager
def open_home(path: Path, network: str = DEFAULT_NETWORK) -> Iterator[Home]:
    """Lock and, at first, furnish a home. Raises ConfigError, HomeLockedError."""
    with held(path):
        home = _furnish(path, network)
        try:
            yield home
        finally:
            with suppress(OSError, ValueError, KeyError, TypeError):
                # The home may have been deleted, and another be there by now.
                if json.loads((path / "node.json").read_bytes())["pid"] == os.getpid():
                    (path / "node.json").unlink()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Lock the folder of a home, made if need be. Raises ConfigError, HomeLockedError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(f"the home {path} is not writable", error) from error
    try:
        _lock(lock, path)
        yield
    finally:
        os.close(lock)


def _furnish(path: Path, network: str) -> Home:
    try:
        # A note that a killed node has left leads to nobody.
        (path / "node.json").unlink(missing_ok=True)
        _make_account(path)
        node = _key(path / "node.pem")
        return Home(path, _account(path, node.public_key, network), node, _token(path))
    except OSError as error:
        raise _unusable(f"the home {path} cannot be used", error) from error


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise HomeLockedError(
            f"another node (process {holder}) already runs on {path}",
            hint="Stop it, or give this one a home of its own with --home.",
        ) from error
    try:
        holder = f"{os.getpid()}\n"
        os.ftruncate(lock, os.pwrite(lock, holder.encode(), 0))
    except OSError as error:
        raise _unusable(f"cannot write {path / 'lock'}", error) from error


def _make_account(path: Path) -> None:
    """At the first start of a home. Raises ConfigError if it had an account and has it no more."""
    if (path / DELEGATION).exists() or (path / "account.pem").exists():
        return
    if (path / "node.pem").exists():
        raise ConfigError(
            f"{path} has a node's key and no account: its account.pem or {DELEGATION} is gone",
            hint="Restore it from a backup; of another box, where the account's key is: p2pflop "
            "delegate FOLDER. If the account is lost, begin another in a new home.",
        )
    _key(path / "account.pem")


def _account(path: Path, node: bytes, network: str) -> PrivateKey | Delegated:
    if not (path / DELEGATION).exists():
        return _key(path / "account.pem")
    if (path / "account.pem").exists():
        raise ConfigError(
            f"{path} has both account.pem and {DELEGATION}",
            hint="A box is of one account: delete the one that is not meant.",
        )
    return read_delegation(path / DELEGATION, node, network, time.time_ns())


def _key(path: Path) -> PrivateKey:
    if not path.exists():
        write_private(path, new_key().to_pem())
    return read_key(path, "Restore it from a backup: it is this node's identity.")


def new_key() -> PrivateKey:
    """A key that nobody else has."""
    return PrivateKey(secrets.token_bytes(SEED_BYTES))


def read_key(path: Path, hint: str) -> PrivateKey:
    """The key in a PEM file. Raises ConfigError, with ``hint`` if the file holds something else."""
    try:
        return PrivateKey.from_pem(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=hint) from error


def _token(home: Path) -> str:
    """The token of local programs. One that is damaged is replaced: nothing depends on it."""
    path = home / "token"
    found = path.read_bytes().strip() if path.exists() else b""
    if not _TOKEN.fullmatch(found):
        found = secrets.token_urlsafe(TOKEN_BYTES).encode()
        write_private(path, found)
    return found.decode("ascii")


def write_private(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step, readable by its owner alone. Raises ConfigError."""
    draft = path.with_name(path.name + ".new")
    try:
        draft.unlink(missing_ok=True)  # it may have been left with another mode
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unusable(f"cannot write {path}", error) from error


def _unusable(what: str, error: OSError) -> P2PFlopError:
    message = f"{what}: {error.strerror}"
    if error.errno in NO_ROOM:
        return StoreFullError(
            message, hint="Free space on it, or choose another home with --home or P2PFLOP_HOME."
        )
    return ConfigError(message, hint="Choose another home with --home or P2PFLOP_HOME.")
