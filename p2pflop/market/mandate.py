"""What a buyer decides by: its policy, and the bounds of the purchase. A bid commits to it."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from p2pflop.ids import content_hash
from p2pflop.market.ranking import Policy
from p2pflop.wire import U63, Hash, Record, encode

MAX_CLASSES: Final = 64
SALT_BYTES: Final = 16


class Mandate(Record, frozen=True):
    """``policy`` is canonical, ``max_nusd`` the budget, ``class_ids`` rise; none are any class.

    The ``salt`` is random, and secret until the buyer shows the evidence: without it a provider
    would find the budget by trying what has the digest.
    """

    policy: Policy
    max_nusd: U63
    class_ids: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_CLASSES)]
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]

    def digest(self) -> bytes:
        """What a bid commits to: the hash of the encoding."""
        return content_hash(encode(self))
