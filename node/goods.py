"""What a provider shows of one purchase, and whether it is what was bought.

Everything here comes from a stranger. Told rows must be of this job, each later than the one
before, so that no more can come than the job has. Blobs that came along are kept in memory, within
the limits of a message, until a receipt that the lifecycle accepted is about them; only then do
they reach the store, and only those that the receipt's checkpoint or result names. The small ones
are ``staged``, for the commit that books the receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

import trio
from msgspec.structs import replace as replace_fields

from p2pflop.dht.blobs import MAX_GET_BYTES, SMALL_BYTES, BlobInfo, Store
from p2pflop.dht.fetch import fetch
from p2pflop.dht.manifest import CHUNK_BYTES, address_of
from p2pflop.dht.planes import Dialer
from p2pflop.errors import (
    BlobNotFoundError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    VerificationError,
)
from p2pflop.job.buying import MAX_UNSIGNED_RECEIPTS
from p2pflop.job.delivery import (
    WantedBlob,
    check_collected,
    check_result,
    check_trace,
    output_dtype,
    wanted_result,
)
from p2pflop.job.file import CheckedJob
from p2pflop.job.results import Scalar, result_hash, scalar
from p2pflop.job.spec import MODE_COLLECT, MODE_TRACE, NamedOutput, Result, is_due
from p2pflop.job.validate import Refusal
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.node import messages as m
from p2pflop.node.service import Json
from p2pflop.wire import decode

MAX_PARALLEL_FETCHES: Final = 4
MOVED_BYTES: Final = CHUNK_BYTES
"""So much that was fetched and verified counts as progress of a delivery."""
MAX_KEPT_CHECKPOINTS: Final = MAX_UNSIGNED_RECEIPTS

ToldValue = tuple[int, int, int, Scalar]
"""Step, phase, output, and the value."""


class Goods:
    """What provider ``peer`` has shown so far. Methods raise ProtocolError for what is wrong."""

    def __init__(
        self,
        checked: CheckedJob,
        store: Store,
        dialer: Dialer,
        peer: str = "",
        on_moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.peer = peer
        self.result: Result | None = None
        self.staged = store.stage(())
        self._small: dict[bytes, bytes] = {}
        self._checked = checked
        self._store = store
        self._dialer = dialer
        self._on_moved = on_moved
        self._moved_bytes = 0
        self._checking = trio.CancelScope()
        self._intervals: dict[int, tuple[Result, Sequence[tuple[bytes, bytes]]]] = {}
        self._inline: dict[bytes, bytes] = {}
        self._last_row = (checked.job.first_step, -1, -1)
        self._told_to = checked.job.first_step
        self._progress: dict[int, int] = {}

    def leave(self) -> int:
        """Fetch no more; the step up to which rows have come."""
        self._checking.cancel()
        return self._told_to

    def is_progress(self, message: m.Message) -> bool:
        """Whether it tells of more than was told before, and not of the same again."""
        match message:
            case m.Fetching(done_bytes, _):
                measure = (0, done_bytes)
            case m.Lowering(done, _):
                measure = (1, done)
            case m.Rows():
                measure = (2, message.last_step)
            case m.Checkpoint(step, _, _):
                measure = (3, step)
            case _:
                return True  # the result, with the last receipt
        further = measure[1] > self._progress.get(measure[0], -1)
        self._progress[measure[0]] = max(measure[1], self._progress.get(measure[0], -1))
        return further

    def note_rows(self, message: m.Rows) -> list[ToldValue]:
        """The values told, as numbers."""
        job, phases = self._checked.job, self._checked.work.phases
        end = job.first_step + job.steps
        if not self._told_to - 1 <= message.first_step <= message.last_step < end:
            raise ProtocolError("it told of steps that are not next")
        told: list[ToldValue] = []
        for step, phase, output, value in message.values:
            key = (step, phase, output)
            if key <= self._last_row or not message.first_step <= step <= message.last_step:
                raise ProtocolError("it told a value twice, or out of order")
            if (
                phase >= len(phases)
                or output >= len(phases[phase].modes)
                or phases[phase].modes[output] != MODE_TRACE
                or not is_due(phases[phase], step)
            ):
                raise ProtocolError("it told a value that the job does not have")
            self._last_row = key
            told.append((*key, scalar(output_dtype(self._checked, phase, output), value)))
        self._told_to = message.last_step + 1
        return told

    def note_checkpoint(self, message: m.Checkpoint) -> None:
        """Keep what a checkpoint names, until it is billed."""
        job, interval = self._checked.job, decode(Result, message.interval)
        if not job.first_step <= interval.first_step < message.step < job.first_step + job.steps:
            raise ProtocolError("it told of a checkpoint outside the job")
        if interval.first_step + interval.steps_done != message.step:
            raise ProtocolError("it told of a checkpoint after other steps than it has")
        named = {blob.address for blob in wanted_result(self._checked, interval)}
        check_inline(f"the checkpoint after step {message.step}", message.blobs, named)
        self._intervals[message.step] = (interval, message.blobs)
        if len(self._intervals) > MAX_KEPT_CHECKPOINTS:
            del self._intervals[min(self._intervals)]

    def note_result(self, data: bytes, blobs: Sequence[tuple[bytes, bytes]]) -> bool:
        """Keep an encoded result and what came along; False if it is known already."""
        result, known = decode(Result, data), False
        if self.result is not None:
            if result != self.result:
                raise ProtocolError("it delivered a second result")
            known = True
        check_inline("the result", blobs, {b.address for b in wanted_result(self._checked, result)})
        # Of one that the journal remembers, what came along is lost and comes again.
        self.result, self._inline = result, dict(blobs)
        return not known

    def recall_result(self, data: bytes) -> None:
        """A result that was journalled before a restart."""
        self.result = decode(Result, data)

    async def check(self, receipt: Receipt, class_id: bytes) -> Result:
        """Fetch and check all that ``receipt`` is about; then it is durable, or ``staged``.

        Gives the result of the steps since the receipt before it, or, if it is the last one, of all
        steps of the stretch.

        Raises ProtocolError if it is not what was bought, ProviderError or BlobNotFoundError if it
        could not be had now, StoreError if it cannot be kept.
        """
        with trio.CancelScope() as self._checking:
            return await self._check(receipt, class_id)
        raise ProviderError("its provider was given up")

    async def _check(self, receipt: Receipt, class_id: bytes) -> Result:
        if receipt.result != ZERO_HASH:
            return await self._check_last(receipt, class_id)
        interval, blobs = self._intervals.get(receipt.to_step, (None, ()))
        if interval is None:
            raise ProviderError("the checkpoint itself has not come yet")
        if interval.state_root != receipt.root_to or interval.first_step != receipt.from_step:
            raise ProtocolError("the receipt is for another checkpoint")
        await self._check_delivery(interval, interval.steps_done, class_id, blobs)
        self._intervals = {s: kept for s, kept in self._intervals.items() if s > receipt.to_step}
        return interval

    async def _check_last(self, receipt: Receipt, class_id: bytes) -> Result:
        result = self.result
        if result is None:
            raise ProviderError("the result itself has not come yet")
        if result_hash(result) != receipt.result:
            raise ProtocolError("the receipt is for another result")
        done_to = result.first_step + result.steps_done
        if (result.state_root, done_to) != (receipt.root_to, receipt.to_step):
            raise ProtocolError("the receipt is for another state")
        blobs, self._inline = tuple(self._inline.items()), {}
        await self._check_delivery(result, self._checked.job.steps, class_id, blobs)
        return result

    async def _check_delivery(
        self,
        result: Result,
        steps: int,
        class_id: bytes,
        blobs: Sequence[tuple[bytes, bytes]],
    ) -> None:
        """``result`` has to be one of the ``steps`` steps from its first one on."""
        job = replace_fields(self._checked.job, first_step=result.first_step, steps=steps)
        part = replace(self._checked, job=job)
        refusal = check_result(part, class_id, result)
        if refusal is not None:
            raise ProtocolError(refusal.reason)
        self._small = {address: data for address, data in blobs if len(data) <= SMALL_BYTES}
        for address, data in blobs:
            if address not in self._small:
                await self._store.put(data)
        await self._fetch_all(wanted_result(part, result))
        for output in result.outputs:
            if part.work.phases[output.phase].modes[output.output] == MODE_COLLECT:
                await self._check_collected(part, result.steps_done, output)
        refusal = check_trace(part, result.steps_done, await self.read(result.trace))
        if refusal is not None:
            raise ProtocolError(refusal.reason)
        self.staged = self._store.stage(tuple(self._small.values()))

    async def read(self, address: bytes, max_bytes: int = MAX_GET_BYTES) -> bytes:
        """A blob that was delivered, though it be only staged. Raises as ``Store.get``."""
        data = self._small.get(address)
        return await self._store.get(address, max_bytes) if data is None else data

    async def _check_collected(
        self, part: CheckedJob, steps_done: int, output: NamedOutput
    ) -> None:
        data = await self.read(output.address, output.size_bytes)
        wanted = check_collected(part, steps_done, output, data)
        if isinstance(wanted, Refusal):
            raise ProtocolError(wanted.reason)
        await self._fetch_all(wanted)

    async def _fetch_all(self, wanted: Sequence[WantedBlob]) -> None:
        """Have all of these in the store that did not come along."""
        absent = []
        for blob in {blob.address: blob for blob in wanted}.values():
            if blob.address in self._small:
                _check_size(blob, len(self._small[blob.address]))
            elif not await self._has(blob):
                absent.append(blob)
        if not absent:
            return
        limiter = trio.CapacityLimiter(MAX_PARALLEL_FETCHES)
        failures: list[P2PFlopError] = []

        async def one(blob: WantedBlob) -> None:
            async with limiter:
                if not failures:
                    try:
                        await self._fetch(blob)
                    except P2PFlopError as error:
                        failures.append(error)

        async with trio.open_nursery() as nursery:
            for blob in absent:
                nursery.start_soon(one, blob)
        if failures:
            raise failures[0]

    async def _has(self, blob: WantedBlob) -> bool:
        """Whether it is here, and this node's own."""
        held = await self._store.stat(blob.address)
        if held is None:
            return False
        if held.owner:
            # Here for a stranger's lease: from now on it is this node's own and stays.
            partial = await self._store.begin(await self._store.manifest(blob.address))
            async with partial:
                held = await partial.finish()
        _check_size(blob, held.size_bytes)
        return True

    def _meter(self) -> Callable[[int, int], None]:
        """Counts what one fetch brings; its first report is of what an earlier one has left."""
        here_bytes: int | None = None

        def note(done_bytes: int, _total_bytes: int) -> None:
            nonlocal here_bytes
            self._moved_bytes += 0 if here_bytes is None else done_bytes - here_bytes
            here_bytes = done_bytes
            if self._moved_bytes >= MOVED_BYTES:
                self._moved_bytes = 0
                self._on_moved()

        return note

    async def _fetch(self, blob: WantedBlob) -> None:
        _check_size(blob, (await self._fetch_new(blob)).size_bytes)

    async def _fetch_new(self, blob: WantedBlob) -> BlobInfo:
        store, bound = self._store, blob.size_bytes
        wrong: list[str] = []

        def note(_peer: str, error: P2PFlopError) -> None:
            if isinstance(error, VerificationError):
                wrong.append(error.message)

        try:
            return await fetch(
                store,
                blob.address,
                [self.peer],
                self._dialer,
                max_bytes=bound,
                progress=self._meter(),
                on_fault=note,
            )
        except (BlobNotFoundError, ProviderError) as error:
            if wrong:
                raise ProtocolError(f"it does not verify: {wrong[0]}") from error
            raise
        except StoreError:
            # Its disk, or the provider's manifest? What was begun tells.
            begun = await store.resume(blob.address)
            if begun is None:
                raise
            async with begun:
                is_too_large = begun.manifest.size_bytes > bound
            if not is_too_large:
                raise
            await store.delete(blob.address)
            raise ProtocolError("a delivered tensor is not of its size") from None


def _check_size(blob: WantedBlob, size_bytes: int) -> None:
    if size_bytes > blob.size_bytes or (blob.exact and size_bytes < blob.size_bytes):
        raise ProtocolError("a delivered tensor is not of its size")


def by_step(told: Iterable[ToldValue], names: Sequence[Sequence[str]]) -> list[Json]:
    """Told values as clients see them, by the name of their output."""
    rows: dict[int, dict[str, Scalar]] = {}
    for step, phase, output, value in told:
        rows.setdefault(step, {})[names[phase][output]] = value
    return [{"step": step, "values": values} for step, values in rows.items()]


def check_inline(what: str, blobs: Sequence[tuple[bytes, bytes]], named: set[bytes]) -> None:
    """Raises ProtocolError unless what came along is named, and is what its address says."""
    for address, data in blobs:
        if address not in named:
            raise ProtocolError(f"with {what} a blob came along that nothing names")
        if address_of(data) != address:
            address_hex = address.hex()
            raise ProtocolError(
                f"{what} does not verify: {address_hex} is not the address of its bytes"
            )
