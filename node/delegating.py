"""A box that has not its account's key: what the account has signed for it, for a time.

The home of such a box has ``node.pem`` and ``delegation.bin`` and no ``account.pem``. Whoever
steals the box can act for the account until the delegation ends, and never own it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.market.records import MAX_DELEGATION_BYTES, Delegation, Rejected
from p2pflop.market.sheets import check_delegation
from p2pflop.units import NS_PER_S
from p2pflop.wire import reopen

FILE_NAME: Final = "delegation.bin"
LAST_NS: Final = 3600 * NS_PER_S
"""So long before its end a delegation serves no more: sheets live up to an hour."""
AGAIN: Final = "Where the account's key is: p2pflop delegate FOLDER; copy its delegation.bin here."


@dataclass(frozen=True, slots=True)
class Delegated:
    """An account whose key is elsewhere. ``wire`` is what it signed for this node."""

    public_key: bytes
    wire: bytes
    valid_until_ns: int

    def left_ns(self, now_ns: int) -> int:
        """For how long it serves yet."""
        return self.valid_until_ns - LAST_NS - now_ns


def read_delegation(path: Path, node: bytes, network: str, now_ns: int) -> Delegated:
    """What an account signed for the key ``node``. Raises ConfigError if it does not serve now."""
    try:
        with path.open("rb") as file:
            wire = file.read(MAX_DELEGATION_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    account = check_delegation(wire, node, now_ns, now_ns + LAST_NS, network)
    if isinstance(account, Rejected):
        raise ConfigError(f"{path} does not serve: {account.reason}", hint=AGAIN)
    return Delegated(account, wire, reopen(Delegation, wire, network).record.valid_until_ns)
