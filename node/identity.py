"""Who this node is in signed records: its keys, its network, and the account's delegation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from p2pflop.keys import PrivateKey, peer_id
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, make_delegation
from p2pflop.node.delegating import Delegated
from p2pflop.units import NS_PER_S

DELEGATION_NS: Final = 7 * 24 * 3600 * NS_PER_S
RENEW_NS: Final = DELEGATION_NS // 2


@dataclass(slots=True)
class Identity:
    """The account's delegation to the node is renewed long before it ends, if its key is here."""

    account: PrivateKey | Delegated
    node: PrivateKey
    network: str
    _delegation: bytes = b""
    _from_ns: int = field(default=0)
    _renew_at_ns: int = field(default=0)

    @property
    def peer(self) -> str:
        """The libp2p id of the node."""
        return peer_id(self.node.public_key)

    def delegation(self, now_ns: int) -> bytes:
        """An envelope that covers at least the next ``RENEW_NS``; of a box, what is left.

        ``now_ns`` may be a moment in the past, of something that is told late.
        """
        if isinstance(self.account, Delegated):
            return self.account.wire
        if not self._from_ns <= now_ns < self._renew_at_ns:
            self._from_ns, self._renew_at_ns = now_ns - 2 * CLOCK_TOLERANCE_NS, now_ns + RENEW_NS
            until_ns = now_ns + DELEGATION_NS
            self._delegation = make_delegation(
                self.account, self.node.public_key, self._from_ns, until_ns, self.network
            )
        return self._delegation
