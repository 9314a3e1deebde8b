"""What a purchase was billed for: fetched, checked, and told to the buyer's lifecycle.

Receipts are taken oldest first. What cannot be fetched yet is tried again, ever more rarely, for as
long as the lifecycle waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from p2pflop.errors import (
    BlobNotFoundError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    VerificationError,
)
from p2pflop.job.buying import Buying
from p2pflop.job.events import Cancel, Fetched, Refuted, Unreachable, Verified
from p2pflop.job.lifecycle import Lifecycle
from p2pflop.job.spec import Result
from p2pflop.market.records import ZERO_HASH, Bid, Receipt
from p2pflop.node.driver import Driver
from p2pflop.node.goods import Goods
from p2pflop.node.printable import printable
from p2pflop.node.returning import LAST_VERIFY_S
from p2pflop.node.runs import Run
from p2pflop.node.stretches import last_state
from p2pflop.wire import reopen

if TYPE_CHECKING:
    from p2pflop.node.buy import Buyer

RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 15.0

_log = logging.getLogger(__name__)


class Verifier:
    """The deliveries of one run. ``fail`` is told of a disk on which they cannot be kept.

    ``goods`` are of the provider that has the lease; ``part`` is what the receipt is about that is
    countersigned now.
    """

    def __init__(
        self,
        buyer: Buyer,
        run: Run,
        lifecycle: Lifecycle[Buying],
        driver: Driver,
        fail: Callable[[P2PFlopError], None],
    ) -> None:
        self.goods: Goods | None = None
        self.part: Result | None = None
        self._buyer = buyer
        self._run = run
        self._lifecycle = lifecycle
        self._driver = driver
        self._fail = fail
        self._gone = ""
        self._due = trio.Event()
        self._looked = trio.Event()

    def begin(self, goods: Goods) -> None:
        """Another provider has the lease."""
        self.goods, self._gone = goods, ""

    def look(self) -> None:
        """A receipt waits."""
        self._due.set()

    def lose(self, why: str) -> None:
        """The provider is gone: what cannot be fetched now never will be."""
        self._gone = why
        self._due.set()

    async def run(self) -> None:
        """Verify what is billed as it comes, until cancelled."""
        while True:
            await self._due.wait()
            self._due = trio.Event()
            wait_s = RETRY_S
            while not await self._verify_waiting(first=wait_s == RETRY_S):
                self._looked.set()
                if self._gone:
                    await self._driver.on(Unreachable(self._gone))
                with trio.move_on_after(wait_s):
                    await self._due.wait()
                self._due = trio.Event()
                wait_s = min(2 * wait_s, MAX_RETRY_S)
            self._looked.set()

    async def moved(self) -> None:
        """Some bytes have come."""
        await self._driver.hear(Fetched())

    async def verify_the_last(self) -> None:
        """A checkpoint that came before the provider gave up is not to be lost."""
        with trio.move_on_after(LAST_VERIFY_S):
            while self._lifecycle.side.unsigned and not self._lifecycle.ended:
                self._looked = trio.Event()
                await self._looked.wait()

    async def _verify_waiting(self, *, first: bool) -> bool:
        """Fetch and check what the receipts that wait are about. False: not all."""
        goods, side, network = self.goods, self._lifecycle.side, self._buyer.identity.network
        for number, wire in sorted(side.unsigned.items()):
            receipt = reopen(Receipt, wire, network).record
            if goods is None or self._lifecycle.ended:
                return True
            try:
                part = await goods.check(receipt, reopen(Bid, side.bid, network).record.class_id)
            except (ProtocolError, VerificationError) as error:
                await self._driver.on(Refuted(printable(error.message), wire))
                return True
            except (ProviderError, BlobNotFoundError) as error:
                if first:
                    _log.info("job %s: delivery not fetched yet: %s", self._run.id, error)
                return False
            except StoreError as error:
                message = f"what was delivered cannot be kept: {error.message}"
                self._fail(type(error)(message, hint=error.hint))
                await self._driver.on(Cancel("the buyer's disk failed, or is full"))
                return True
            if self._run.over:
                return True
            if side.unsigned.get(number) != wire:
                continue  # it was of a provider that was given up meanwhile
            await self._accept(number, wire, receipt, part, goods.peer)
        return True

    async def _accept(
        self, number: int, wire: bytes, receipt: Receipt, part: Result, peer: str
    ) -> None:
        runs, run = self._buyer.runs, self._run
        run.rows.add_state(last_state(part))
        if receipt.result == ZERO_HASH:
            root = receipt.root_to.hex()
            fields: dict[str, Any] = {"step": receipt.to_step, "state_root": root}
            await runs.emit(run, "checkpoint", **fields)
        fields = {"number": number, "amount_nusd": receipt.amount_nusd, "provider": peer}
        await runs.emit(run, "receipt", to_step=receipt.to_step, **fields)
        self.part = part
        await self._driver.on(Verified(number, wire))
        self.part = None
