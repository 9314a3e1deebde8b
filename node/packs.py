"""Packs: many small jobs bought as one (``p2pflop.job.packing``), and given back as many.

A pack is a run like any other. Its variants become runs of their own when it has settled: with
their own jobs and results, their share of its cost, and no purchase but the pack's. What this node
has bought before is left out of the pack and answered at once. A pack that is over a limit of each
ask that would do is not bought: its variants alone may be within.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError
from p2pflop.job.file import JobFile, encode_file
from p2pflop.job.packing import Packing, Unpacked
from p2pflop.job.results import result_hash
from p2pflop.job.spec import Result, Work
from p2pflop.job.variants import Variants, decode_variants, encode_variants, variant
from p2pflop.market.ranking import no_deal
from p2pflop.node.earlier import answer, find_earlier
from p2pflop.node.journal import BUYER, PART
from p2pflop.node.orders import Order, open_order, order_card
from p2pflop.node.outcomes import describe_result
from p2pflop.node.runs import Run, Runs
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.stretches import RESULT_ROW
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    from p2pflop.node.buy import Buyer

PACK_ROW: Final = "pack"


class Packs:
    """The packs of a node's own user."""

    def __init__(self, buyer: Buyer) -> None:
        self._buyer = buyer
        self._unpacking = trio.Lock()

    async def submit(self, body: bytes, options: SubmitOptions) -> Json:
        """Buy variants together: ``known``, the cards of those that are here already, and
        ``bought``, how many the pack has. Its run has the id of the options.

        A submission with the id of a pack that there is changes nothing. Raises JobError,
        ProtocolError, ConfigError, MarketError if they are over a limit of each ask only together,
        and what a submission of the job alone raises.
        """
        if options.run_id is None:
            raise ConfigError("a pack needs an id", hint="Give it 12 hex digits: id=.")
        variants = await trio.to_thread.run_sync(decode_variants, body)
        order = await self._order(variants.file, options)
        known: list[Json] = []
        rest: list[int] = []
        for place, run_id in enumerate(variants.run_ids):
            card = await self._known(_variant_order(order, variants, place), run_id, options)
            known += [card] if card is not None else []
            rest += [] if card is not None else [place]
        if not rest:
            return {"known": known, "bought": 0}
        if not await self._buyer.runs.knows(options.run_id):
            await self._buy(_chosen(variants, rest), options)
        return {"known": known, "bought": len(rest)}

    async def unpack(self, run_id: str) -> list[Json]:
        """The cards of a settled pack's variants, each a run from now on. Raises ConfigError."""
        variants = self._variants(run_id)
        record = self._buyer.result_record(run_id)
        async with self._unpacking:
            packing = await trio.to_thread.run_sync(Packing, variants, address_of)
            result = decode(Result, record)
            tables = {a: await self._buyer.store.get(a) for a in packing.names(result)}

            def unpack() -> list[Unpacked]:
                return list(packing.unpack(result, tables.__getitem__))

            unpacked = await trio.to_thread.run_sync(unpack)
            order = await self._order(variants.file, SubmitOptions())
            pack = self._buyer.runs.get(run_id)
            async with trio.open_nursery() as nursery:
                shares = _shares(pack.card["cost_nusd"], len(unpacked))
                for own_id, each, cost_nusd in zip(variants.run_ids, unpacked, shares, strict=True):
                    nursery.start_soon(self._keep, pack, own_id, order, each, cost_nusd)
        return [self._buyer.runs.get(own_id).card for own_id in variants.run_ids]

    async def _order(self, file: JobFile, options: SubmitOptions) -> Order:
        classes = await self._buyer.classes_named(options.classes)
        open_it = partial(open_order, encode_file(file), options, classes, self._buyer.now_ns())
        return await trio.to_thread.run_sync(open_it)

    async def _known(self, order: Order, run_id: str, options: SubmitOptions) -> Json | None:
        """The card of a variant that is here already, or None."""
        buyer = self._buyer
        if await buyer.runs.knows(run_id):
            return buyer.runs.get(run_id).card
        if options.fresh:
            return None
        earlier = await find_earlier(order, buyer.class_id, buyer.runs, buyer.store)
        if earlier is None:
            return None
        run = self._begin(run_id, order)
        await answer(run, order, earlier, buyer.runs)
        return run.card

    async def _buy(self, variants: Variants, options: SubmitOptions) -> None:
        """Raises MarketError if it is too large for who would take its variants."""
        packing = await trio.to_thread.run_sync(Packing, variants, address_of)
        if self._buyer.sheets.view(self._buyer.now_ns()).has_limits:
            order = await self._order(packing.file, options)
            ranking = self._buyer.rank(order, order.classes)
            if ranking.is_over_limits:
                raise no_deal(ranking.ranked)
        rows = [(PACK_ROW, encode_variants(variants))]
        inputs = tuple(packing.blobs.values())
        await self._buyer.submit(encode_file(packing.file), options, inputs, rows)

    async def _keep(
        self, pack: Run, run_id: str, order: Order, unpacked: Unpacked, cost_nusd: int
    ) -> None:
        """Make a run of a variant, unless it is one."""
        runs, store = self._buyer.runs, self._buyer.store
        if await runs.knows(run_id):
            return
        async with trio.open_nursery() as nursery:
            for data in unpacked.blobs.values():
                nursery.start_soon(store.put, data)
        order, result = _of(order, unpacked.file), unpacked.result
        run = self._begin(run_id, order, PART)
        run.card |= {
            "hash": result_hash(result).hex(),
            "cost_nusd": cost_nusd,
            "class_id": result.class_id.hex(),
            "step": result.steps_done,
            "pack": pack.id,
        }
        run.rows.add(RESULT_ROW, encode(result))
        told: Json = describe_result(order, result, cost_nusd)
        provider = pack.events[-1].get("provider", "")
        await runs.emit(run, "result", **told, provider=provider, pack=pack.id)

    def _begin(self, run_id: str, order: Order, side: str = BUYER) -> Run:
        run = self._buyer.runs.create(order_card(order), run_id, side=side)
        self._buyer.add_job(run, order, encode_file(order.file))
        return run

    def _variants(self, run_id: str) -> Variants:
        for row in self._buyer.runs.rows(self._buyer.runs.get(run_id).id):
            if row.kind == PACK_ROW:
                return decode_variants(row.body)
        raise ConfigError(f"job {run_id} is no pack")


def is_pack(runs: Runs, run_id: str) -> bool:
    """Whether the run of that id, if it is on disk, is a pack's."""
    return any(row.kind == PACK_ROW for row in runs.rows(run_id))


def _chosen(variants: Variants, places: list[int]) -> Variants:
    return msgspec.structs.replace(
        variants,
        run_ids=tuple(variants.run_ids[place] for place in places),
        values=tuple(variants.values[place] for place in places),
    )


def _variant_order(order: Order, variants: Variants, place: int) -> Order:
    return _of(order, variant(variants, place, address_of))


def _of(order: Order, file: JobFile) -> Order:
    """The order of a variant: its costs and all bounds are those of the job."""
    work = decode(Work, file.body.work)
    checked = replace(order.checked, job=file.body.job, work=work, work_id=file.body.job.work)
    return replace(order, file=file, checked=checked)


def _shares(total_nusd: int, count: int) -> list[int]:
    """What each of ``count`` variants has cost; the first ones pay what does not divide."""
    share, rest = divmod(total_nusd, count)
    return [share + (place < rest) for place in range(count)]
