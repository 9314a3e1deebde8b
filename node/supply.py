"""What a lease needs of its buyer: inputs, and the collections that tell which they are."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.fetch import fetch, held_for
from p2pflop.dht.planes import Dialer
from p2pflop.errors import BlobNotFoundError, JobError, ProviderError
from p2pflop.job.file import CheckedJob
from p2pflop.job.spec import BlobSource
from p2pflop.job.validate import Refusal
from p2pflop.node.feeding import Hold
from p2pflop.units import KIB

INPUT_S: Final = 30.0
MIN_INPUT_BYTES_PER_S: Final = 256 * KIB
"""An input that comes slower ends the lease: nobody holds a slot with inputs that never come."""

PROGRESS_BYTES: Final = 256 * KIB

OnFetching = Callable[[int, int], Awaitable[None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Supply:
    """Blobs from the node ``peer`` of a buyer, kept under its account ``owner``."""

    store: Store
    dialer: Dialer
    peer: str
    owner: bytes
    hold: Hold

    async def resolve(self, checked: CheckedJob) -> CheckedJob:
        """``checked`` with the blobs known that its collections name.

        Raises JobError, ProviderError, StoreError.
        """
        collections = {}
        for address, size_bytes in checked.collections.items():
            await self.bring(address, size_bytes)
            collections[address] = await self.store.get(address, size_bytes)
        resolved = checked.resolve(collections)
        if isinstance(resolved, Refusal):
            raise JobError(f"the job is not valid: {resolved.reason}")
        await self.hold([source.address for source in resolved.members])
        return resolved

    async def fetch_all(
        self, inputs: Sequence[BlobSource], at_hand: Mapping[bytes, bytes], told: OnFetching
    ) -> None:
        """Have all of these here that are not ``at_hand``. Raises ProviderError, StoreError."""
        missing = [
            source
            for source in inputs
            if source.address not in at_hand
            and await held_for(self.store, source.address, self.owner) is None
        ]
        total = sum(source.size_bytes for source in missing)
        done = last = 0
        for source in missing:
            await self.bring(source.address, source.size_bytes)
            done += source.size_bytes
            if done - last >= PROGRESS_BYTES or done == total:
                last = done
                await told(done, total)

    async def bring(self, address: bytes, max_bytes: int) -> None:
        """Have a blob here. Raises ProviderError if it comes too slow or not at all."""
        limit_s = INPUT_S + max_bytes / MIN_INPUT_BYTES_PER_S
        what = f"input {address.hex()[:12]} of the job"
        try:
            with trio.fail_after(limit_s):
                await fetch(
                    self.store,
                    address,
                    [self.peer],
                    self.dialer,
                    max_bytes=max_bytes,
                    owner=self.owner,
                )
        except trio.TooSlowError as error:
            raise ProviderError(f"{what} did not come within {limit_s:.0f} s") from error
        except (BlobNotFoundError, ProviderError) as error:
            _log.info("%s: %s", what, error)
            raise ProviderError(f"{what} is not to be had whole from the buyer's node") from error
