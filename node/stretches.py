"""The stretches of one run: what earlier providers have delivered, and the order for the rest.

A run whose provider is lost goes on at another one. What counts as delivered is what was paid for:
the intervals up to each countersigned checkpoint, which are journalled together with the
countersignature. The rest of the job is an order of its own, that begins with the state after the
last of them and may cost what is left of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from msgspec.structs import replace as replace_fields

from p2pflop.dht.blobs import Store
from p2pflop.errors import StoreError
from p2pflop.job.buying import Buying
from p2pflop.job.file import CheckedJob, encode_body
from p2pflop.job.joining import (
    follow_one_another,
    join_collections,
    join_traces,
    outputs_by_place,
)
from p2pflop.job.lifecycle import Edge
from p2pflop.job.meter import meter_job
from p2pflop.job.results import build_result
from p2pflop.job.spec import MODE_COLLECT, BlobSource, NamedOutput, Result
from p2pflop.market.records import Receipt
from p2pflop.node.driver import LIFE_ROW
from p2pflop.node.goods import Goods
from p2pflop.node.journal import JobRows, KnownState, Row
from p2pflop.node.orders import Order
from p2pflop.node.printable import printable
from p2pflop.node.service import Json
from p2pflop.units import MAX_NUSD, NUSD_PER_USD
from p2pflop.wire import decode, encode, reopen

INTERVAL_ROW: Final = "interval"
RESULT_ROW: Final = "result"
"""Of one stretch."""
WHOLE_ROW: Final = "whole"
"""The result of all stretches of a run that had more than one."""
LIMIT_ROW: Final = "limit"
UNSTATED_LIMIT_TIMES: Final = 4
LEAST_UNSTATED_LIMIT_NUSD: Final = NUSD_PER_USD // 100
"""A cent."""
BROKEN_OFF: Final = frozenset(
    LIFE_ROW + edge for edge in (Edge.NEXT, Edge.WAIT, Edge.RESUBMIT, Edge.DOUBT)
)


@dataclass(frozen=True, slots=True)
class Loss:
    """A provider that had a lease and did not do the job; ``step`` is how far its rows went,
    ``from_step`` where the run goes on."""

    provider: str
    reason: str
    step: int
    from_step: int

    def told(self, next_provider: str) -> Json:
        """The fields of its event. No next provider yet: the run waits."""
        return {
            "provider": self.provider,
            "reason": printable(self.reason),
            "step": self.step,
            "from_step": self.from_step,
            "next": next_provider,
        }


class Stretches:
    """Of ``whole``, the order of the run. ``now`` is the order of the stretch under way."""

    def __init__(self, whole: Order, rows: JobRows) -> None:
        self.whole = whole
        self.now = whole
        self._rows = rows
        self._intervals: list[Result] = []
        self._loss: Loss | None = None

    @property
    def done_to(self) -> int:
        """The step up to which everything is here and paid for."""
        if not self._intervals:
            return self.whole.checked.job.first_step
        return _end(self._intervals[-1])

    def fix_limit(self, quote_nusd: int) -> None:
        """Somebody has filled for so much. Where the buyer has set no limit, the whole run may cost
        four times that, or a cent: providers that fail must not lead it to others at any price."""
        if self.whole.max_nusd == MAX_NUSD:
            limit_nusd = max(UNSTATED_LIMIT_TIMES * quote_nusd, LEAST_UNSTATED_LIMIT_NUSD)
            self.whole = replace(self.whole, max_nusd=limit_nusd)
            self._rows.add(LIMIT_ROW, limit_nusd.to_bytes(8, "big"))

    def add(self, interval: Result) -> None:
        """Take in an interval that is here and verified, together with its countersignature."""
        self._intervals.append(interval)
        self._rows.add(INTERVAL_ROW, encode(interval))

    def lose(self, provider: str, reason: str, told_to: int) -> None:
        """A provider that had a lease is given up; its rows went up to the step ``told_to``."""
        self._loss = Loss(provider, reason, max(told_to, self.done_to), self.done_to)

    def tell_loss(self, next_provider: str) -> Json | None:
        """The fields of an event, once for each loss. No next provider: the run waits."""
        loss, self._loss = self._loss, None
        return None if loss is None else loss.told(next_provider)

    def recall(self, rows: Sequence[Row]) -> bytes:
        """Take in what earlier processes have journalled; the result of the stretch under way,
        encoded, if there is one already, else nothing."""
        step, result = self.done_to, b""
        for row in rows:
            if row.kind == INTERVAL_ROW:
                self._intervals.append(decode(Result, row.body))
            elif row.kind == RESULT_ROW:
                result = row.body
            elif row.kind == LIMIT_ROW:
                self.whole = replace(self.whole, max_nusd=int.from_bytes(row.body, "big"))
            elif row.kind in BROKEN_OFF:
                step, result = self.done_to, b""
        self.begin(step, 0)
        return result

    def begin(self, step: int, owed_nusd: int) -> Order:
        """The order for the steps from ``step`` on, where an interval ends, within a budget that
        ``owed_nusd`` is gone from. It is under way from now on."""
        whole = self.whole
        self.now = replace(
            whole if step == whole.checked.job.first_step else self._from(step),
            max_nusd=max(0, whole.max_nusd - owed_nusd),
        )
        return self.now

    async def join(self, goods: Goods, store: Store) -> Result:
        """The result of the whole, ``goods`` being those of the stretch under way. It is journalled
        with the next rows, unless it is the same.

        Raises StoreError if it cannot be kept, or if something is missing.
        """
        last = goods.result
        if last is None:
            raise StoreError("the journal has no result for a job that is settled")
        parts = [part for part in self._intervals if part.first_step < last.first_step] + [last]
        first_step = self.whole.checked.job.first_step
        if parts[0].first_step != first_step or not follow_one_another(parts):
            raise StoreError("the journal does not have what came out of all stretches")
        if len(parts) == 1:
            return last
        work, job = self.whole.checked.work, self.whole.checked.job
        trace = await store.put(join_traces([await goods.read(part.trace) for part in parts]))
        outputs = []
        for (phase, output), found in outputs_by_place(parts).items():
            newest = found[-1]
            if work.phases[phase].modes[output] == MODE_COLLECT:
                lists = [await goods.read(each.address, each.size_bytes) for each in found]
                kept = await store.put(join_collections(lists))
                newest = NamedOutput(phase, output, kept.address, kept.size_bytes)
            outputs.append(newest)
        whole = build_result(
            work,
            job,
            class_id=last.class_id,
            steps_done=_end(last) - first_step,
            outputs=outputs,
            trace=trace.address,
            state=last.state,
        )
        self._rows.add(WHOLE_ROW, encode(whole))
        return whole

    def _from(self, step: int) -> Order:
        whole, checked = self.whole, self.whole.checked
        state = next(part.state for part in self._intervals if _end(part) == step)
        steps = checked.job.first_step + checked.job.steps - step
        job = replace_fields(checked.job, first_step=step, steps=steps)
        body = replace_fields(whole.file.body, job=job, state=state)
        cost = meter_job(checked.work, job, checked.graphs)
        rest = replace(checked, job=job, state=state, cost=cost, members=())
        return replace(
            whole,
            file=replace_fields(whole.file, body=body),
            checked=replace(rest, members=_members(checked, rest)),
            body=encode_body(body),
        )


def owed_nusd(side: Buying, network: str) -> int:
    """What all stretches of a run have cost so far: their last receipts that are countersigned."""
    signed = [*side.delivered, *([side.countersigned] if side.countersigned else [])]
    return sum(reopen(Receipt, wire, network).record.amount_nusd for wire in signed)


def last_state(part: Result) -> KnownState:
    """For the journal, so that a later stretch of this work can start from it."""
    return KnownState(part.work, part.class_id, _end(part), b"".join(part.state))


def _members(checked: CheckedJob, rest: CheckedJob) -> tuple[BlobSource, ...]:
    """The members of the slots that ``rest`` does not fill from its state."""
    slots = [slot for slot, _ in checked.member_slots]
    known = dict(zip(slots, checked.members, strict=True))
    return tuple(known[slot] for slot, _ in rest.member_slots)


def _end(part: Result) -> int:
    return part.first_step + part.steps_done
