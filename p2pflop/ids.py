"""Content hashes: BLAKE3-256, written as 64 lower-case hex digits.

``p2pflop://<hex>``, ``http://host:port/blob/<hex>`` and the bare digits all name one blob.
"""

from __future__ import annotations

import re

from blake3 import blake3

from p2pflop.errors import ConfigError

HASH_BYTES = 32
_ADDRESS = re.compile(r"(?:p2pflop://|https?://[^/\s]+/blob/)?([0-9a-f]{64})/?")


def content_hash(data: bytes | bytearray | memoryview) -> bytes:
    """The BLAKE3 hash of ``data``: 32 bytes."""
    return blake3(data).digest()


def parse_hash(text: str) -> bytes:
    """The 32 bytes named by ``text``: hex digits, a ``p2pflop://`` address or a blob URL.

    Raises ConfigError.
    """
    found = _ADDRESS.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"{text[:80]!r} is not a blob address",
            hint="Give 64 lower-case hex digits, p2pflop://<hash> or http://host:port/blob/<hash>.",
        )
    return bytes.fromhex(found.group(1))


def blob_url(address: bytes) -> str:
    """``p2pflop://<hex>``."""
    return f"p2pflop://{address.hex()}"
