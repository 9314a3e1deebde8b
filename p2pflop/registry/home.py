"""The registry's folder: its database and its online key. The root key is never in it.

``online.pem`` signs; ``next.pem`` is there while the next one waits for its certificate. Which of
the two counts is what the newest certificate says, so a crash between the certificate and the
renaming of the file loses nothing.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.keys import PrivateKey
from p2pflop.node.home import new_key, read_key, write_private
from p2pflop.registry.schema import FILE_NAME

FOLDER: Final = "registry"
ONLINE: Final = "online.pem"
NEXT: Final = "next.pem"
LOST_KEY: Final = (
    "If it is lost, certify a new one: p2pflop registry certify --withdraw --root-key FILE."
)


def folder_of(home: Path) -> Path:
    """Where a registry lives in a home."""
    return home / FOLDER


def require(folder: Path) -> Path:
    """The database in ``folder``. Raises ConfigError if there is no registry."""
    database = folder / FILE_NAME
    if not database.exists():
        raise ConfigError(
            f"there is no registry in {folder}",
            hint="Make one with p2pflop registry init, or name its home with --home.",
        )
    return database


def load_online(folder: Path, public_key: bytes) -> PrivateKey | None:
    """The online key that is certified; None if it is not here. Raises ConfigError."""
    for name in (ONLINE, NEXT):
        path = folder / name
        if path.exists() and (key := read_key(path, LOST_KEY)).public_key == public_key:
            if name == NEXT:
                with suppress(OSError):
                    path.replace(folder / ONLINE)
            return key
    return None


def next_online(folder: Path) -> PrivateKey:
    """The key that waits for its certificate; a new one if none does. Raises ConfigError."""
    path = folder / NEXT
    if not path.exists():
        write_private(path, new_key().to_pem())
    return read_key(path, "Delete it, and ask for a certificate again.")


def make_root(path: Path) -> PrivateKey:
    """The root key in a file of its own, made if there is none. Raises ConfigError."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, new_key().to_pem())
    return read_root(path)


def read_root(path: Path) -> PrivateKey:
    """The root key. Raises ConfigError."""
    return read_key(path, "It must be the PEM file that p2pflop registry init wrote.")
