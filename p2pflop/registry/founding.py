"""How a registry begins: a root key, an online key, their certificate, and the first schedule."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from p2pflop.dht.database import Database
from p2pflop.errors import ConfigError
from p2pflop.franchise.enrolments import is_name
from p2pflop.franchise.issuer import sign_certificate
from p2pflop.franchise.records import DAY_NS, Schedule
from p2pflop.keys import PrivateKey
from p2pflop.node.home import new_key, read_key, write_private
from p2pflop.registry.certifying import CERTIFICATE_DAYS, install, request_certificate
from p2pflop.registry.draft import Draft
from p2pflop.registry.home import LOST_KEY, ONLINE
from p2pflop.registry.log import query_of
from p2pflop.registry.members import publish
from p2pflop.registry.schema import FILE_NAME, FORMAT, SCHEMA


async def found_registry(
    folder: Path,
    root: PrivateKey,
    network: str,
    schedule: Callable[[bytes, int], Schedule],
    clock: Callable[[], int],
) -> None:
    """Make a registry in ``folder``. ``schedule(issuer, now_ns)`` is its first schedule of fees.

    All of it is one transaction: one that was cut off is begun again. Raises ConfigError if a
    registry is there, or ``network`` or the schedule is not what one can be.
    """
    check_network(network)
    online = _furnish(folder)
    if online.public_key == root.public_key:
        raise ConfigError("the root key and the online key are the same")
    database = Database(folder / FILE_NAME, SCHEMA, FORMAT)

    def found(connection: sqlite3.Connection) -> None:
        if query_of(connection)("SELECT 1 FROM facts"):
            raise ConfigError(
                f"there is a registry in {folder} already", hint="Name another home with --home."
            )
        facts = [("issuer", root.public_key), ("network", network.encode())]
        connection.executemany("INSERT INTO facts VALUES (?, ?)", facts)
        draft = Draft(connection, online, clock())
        request = request_certificate(
            draft.query, root.public_key, network, online.public_key, withdraws=False
        )
        until_ns = draft.now_ns + CERTIFICATE_DAYS * DAY_NS
        install(draft, sign_certificate(root, request, draft.now_ns, until_ns).wire)
        publish(draft, schedule(root.public_key, draft.now_ns))
        draft.finish()

    try:
        await database.write(found)
    finally:
        await database.aclose()


def _furnish(folder: Path) -> PrivateKey:
    """Make the folder and the online key, unless they are there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
    if not (folder / ONLINE).exists():
        write_private(folder / ONLINE, new_key().to_pem())
    return read_key(folder / ONLINE, LOST_KEY)


def check_network(network: str) -> None:
    """Raises ConfigError for what is no name of a network."""
    if not is_name(network):
        raise ConfigError(
            f"{network[:80]!r} is not the name of a network",
            hint="Letters, digits, dots, dashes and underscores, up to 64 of them.",
        )
