"""What this node has bought before: the same work, class and stretch is never bought twice.

The journal knows each settled run by what it computed. Its result answers another submission at
once and for nothing, as long as the record and every blob that it names are still in the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pflop.dht.blobs import Store
from p2pflop.errors import ConfigError, StoreError
from p2pflop.job.collection import Collection
from p2pflop.job.results import result_hash
from p2pflop.job.spec import MODE_COLLECT, Result, Work
from p2pflop.node.orders import Order
from p2pflop.node.outcomes import describe_result
from p2pflop.node.runs import Run, Runs
from p2pflop.node.service import Json
from p2pflop.node.stretches import RESULT_ROW, WHOLE_ROW
from p2pflop.wire import decode


@dataclass(frozen=True, slots=True)
class Earlier:
    """The result of a run that is over. ``record`` is its encoded Result."""

    run_id: str
    class_id: bytes
    provider: str
    record: bytes


async def find_earlier(order: Order, own_class: bytes, runs: Runs, store: Store) -> Earlier | None:
    """The result of an earlier run of what ``order`` asks for, if it is all still here.

    Of several classes that would do, ``own_class`` comes first. ``order`` knows its start.
    """
    job = order.checked.job
    known = runs.results(job.work, job.first_step, job.steps, order.checked.root_from)
    for found in sorted(known, key=lambda each: (each.class_id != own_class, each.class_id)):
        if order.classes and found.class_id not in order.classes:
            continue
        try:
            run = runs.get(found.job)
            record = result_record(runs, run.id)
            if await _is_whole(decode(Result, record), order.checked.work, store):
                provider = str(run.events[-1].get("provider", ""))
                return Earlier(run.id, found.class_id, provider, record)
        except (ConfigError, StoreError):
            continue  # It cannot answer; it is bought.
    return None


async def answer(run: Run, order: Order, earlier: Earlier, runs: Runs) -> None:
    """End a run with the result of an earlier one, at no cost. Raises StoreError."""
    result = decode(Result, earlier.record)
    run.card |= {
        "hash": result_hash(result).hex(),
        "cost_nusd": 0,
        "class_id": earlier.class_id.hex(),
        "step": result.first_step + result.steps_done,
        "earlier": earlier.run_id,
    }
    run.rows.add(RESULT_ROW, earlier.record)
    told: Json = describe_result(order, result, 0)
    told |= {"provider": earlier.provider, "earlier": earlier.run_id}
    await runs.emit(run, "result", **told)


def result_record(runs: Runs, run_id: str) -> bytes:
    """The encoded Result of a run that has settled. Raises ConfigError before."""
    run = runs.get(run_id)
    if run.is_session:
        raise ConfigError(
            f"{run_id} is the session of a script, and has no result",
            hint=f"See p2pflop show {run_id}.",
        )
    rows = [row for row in runs.rows(run.id) if row.kind in (RESULT_ROW, WHOLE_ROW)]
    if not rows or run.card["end_state"] != "settled":
        raise ConfigError(
            f"job {run_id} has no result: it is {run.card['state']}",
            hint=f"See p2pflop watch {run_id}.",
        )
    return rows[-1].body


async def _is_whole(record: Result, work: Work, store: Store) -> bool:
    if not await _are_kept((record.trace, *record.state), store):
        return False
    for named in record.outputs:
        if not await _are_kept((named.address,), store):
            return False
        if work.phases[named.phase].modes[named.output] == MODE_COLLECT:
            info = await store.stat(named.address)
            size_bytes = 0 if info is None else info.size_bytes
            entries = decode(Collection, await store.get(named.address, size_bytes)).entries
            if not await _are_kept((entry.address for entry in entries), store):
                return False
    return True


async def _are_kept(addresses: Iterable[bytes], store: Store) -> bool:
    """Whether the store has them as this node's own: a stranger's go an hour after its lease."""
    for address in addresses:
        info = await store.stat(address)
        if info is None or info.owner:
            return False
    return True
