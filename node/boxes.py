"""The homes of an account's other boxes: made, and renewed, where the account's key is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.keys import PrivateKey
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, make_delegation
from p2pflop.node.delegating import FILE_NAME, LAST_NS
from p2pflop.node.home import new_key, read_key, write_private
from p2pflop.units import NS_PER_S

MAX_BOX_NS: Final = 366 * 24 * 3600 * NS_PER_S
"""The longest delegation of a box: it cannot be taken back."""


def furnish_box(
    folder: Path, account: PrivateKey, network: str, now_ns: int, until_ns: int
) -> bytes:
    """Make the home of another box of ``account``, or renew its delegation; the box's public key.

    Raises ConfigError if the folder has an account of its own, or the time is not one to sign for.
    """
    if not LAST_NS < until_ns - now_ns <= MAX_BOX_NS:
        raise ConfigError("a box is trusted for more than an hour and at most 366 days")
    if (folder / "account.pem").exists():
        raise ConfigError(
            f"{folder} has an account of its own",
            hint="Name a new folder: it becomes the home of the other box.",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
    key_path = folder / "node.pem"
    if not key_path.exists():
        write_private(key_path, new_key().to_pem())
    node = read_key(key_path, "Name another folder.").public_key
    from_ns = now_ns - 2 * CLOCK_TOLERANCE_NS
    write_private(folder / FILE_NAME, make_delegation(account, node, from_ns, until_ns, network))
    return node
