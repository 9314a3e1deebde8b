"""Fills that came to nothing, and who waits for the next one because of them.

A fill holds a slot for two seconds, and a buyer need not confirm it. An account that lets one lapse
waits for its next, longer each time. Accounts cost nothing, so those that have never paid here,
strangers, are counted together, too: by the subnet that their peer is connected from, and all of
them. Where too many of a subnet's fills have lapsed, its strangers wait; where too many of all
strangers' have, all strangers do. So one subnet wastes ``SUBNET_PER_S`` x 2 s of a slot's time in
the long run, strangers half of it, and who has paid here finds a slot in the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from p2pflop.market.rates import Rates, remember
from p2pflop.units import NS_PER_S

FIRST_LAPSE_NS: Final = 4 * NS_PER_S
MAX_LAPSE_NS: Final = 600 * NS_PER_S
MAX_LAPSED: Final = 4096
SUBNET_PER_S, SUBNET_BURST = 1 / 30, 8
STRANGERS_PER_S, STRANGERS_BURST = 1 / 4, 64


class Lapses:
    """Of one provider. A subnet is as ``p2pflop.node.sheets.subnet_of`` tells it, and empty where
    it is not known; None stands for whoever is no stranger."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._subnets = Rates(SUBNET_PER_S, SUBNET_BURST)
        self._strangers = Rates(STRANGERS_PER_S, STRANGERS_BURST)

    def __len__(self) -> int:
        return len(self._accounts)

    def note(self, account: bytes, subnet: str | None, at_ns: int) -> None:
        """A fill came to nothing."""
        lapses, _ = self._accounts.pop(account, (0, 0))
        wait_ns = min(FIRST_LAPSE_NS << min(lapses, 16), MAX_LAPSE_NS)
        remember(self._accounts, account, (lapses + 1, at_ns + wait_ns), MAX_LAPSED)
        if subnet is not None:
            self._subnets.allow(subnet, at_ns / NS_PER_S)
            self._strangers.allow("", at_ns / NS_PER_S)

    def forgive(self, account: bytes) -> None:
        """A job or lease of that account was paid for."""
        self._accounts.pop(account, None)

    def objection(self, account: bytes, subnet: str | None, now_ns: int) -> str:
        """Why the account is to wait, or nothing."""
        if self._accounts.get(account, (0, 0))[1] > now_ns:
            return "your last fill came to nothing"
        if subnet is None:
            return ""
        if self._subnets.left(subnet, now_ns / NS_PER_S) < 1:
            return "too many fills of strangers in your network came to nothing"
        if self._strangers.left("", now_ns / NS_PER_S) < 1:
            return "too many fills of strangers came to nothing"
        return ""
