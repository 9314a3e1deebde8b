"""What the journal has of a sale beside the rows of its lifecycle."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from p2pflop.errors import StoreError
from p2pflop.job.spec import Result
from p2pflop.node.journal import Row
from p2pflop.wire import decode


class SaleRow(StrEnum):
    """Rows of a sale beside those of its lifecycle."""

    BID = "bid"
    ACCOUNT = "account"
    BODY = "body"
    PRICE = "price"
    RESULT = "result"
    INTERVAL = "interval"


class Delivery(msgspec.Struct, array_like=True, frozen=True):
    """What a result names, as the journal keeps it."""

    result: bytes
    blobs: tuple[tuple[bytes, bytes], ...]


def named(result: bytes) -> list[bytes]:
    """The addresses in an encoded Result."""
    record = decode(Result, result)
    return [*(output.address for output in record.outputs), record.trace, *record.state]


def first_row(rows: list[Row], kind: str) -> bytes:
    """The body of the first row of a kind. Raises StoreError."""
    for row in rows:
        if row.kind == kind:
            return row.body
    raise StoreError(f"the journal has no {kind} row for this sale")
