"""Orders: a job file with the bounds of its purchase, and the ranking of the book for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from msgspec.structs import replace as replace_fields

from p2pflop.errors import ConfigError, JobError
from p2pflop.job.collection import numbered_bytes
from p2pflop.job.delivery import output_bytes
from p2pflop.job.file import CheckedJob, JobFile, decode_file, encode_body, open_job
from p2pflop.job.graph import Dtype
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import MODE_COLLECT, ROLE_STATE, Job, shards_of, times_due
from p2pflop.job.validate import Refusal
from p2pflop.market.evidence import Avoided
from p2pflop.market.limits import Known, Limit
from p2pflop.market.mandate import Mandate
from p2pflop.market.ranking import Accounts, Deal, Miss, MissReason, Need
from p2pflop.market.records import MIN_CHECKPOINT_SECONDS, CostLine, Terms
from p2pflop.market.views import BookView
from p2pflop.node.execute import memory_bytes, unsupported
from p2pflop.node.messages import MAX_BODY_BYTES
from p2pflop.node.service import MAX_DEADLINE_S, Json, SubmitOptions
from p2pflop.units import MAX_NUSD, NS_PER_S

DEFAULT_DEADLINE_S: Final = 24 * 3600
DEFAULT_CHECKPOINTS: Final = 4
DEFAULT_CHECKPOINT_S: Final = 600
MIN_CHECKPOINT_STEPS: Final = 100
MAX_RANKED_TOLD: Final = 32
MAX_CLASSES_TOLD: Final = 3
MAX_CHECKPOINTS: Final = 1000
"""Of one job, each the size of its state."""


@dataclass(frozen=True)
class Order:
    """A submission, decoded and checked: what is to be bought, and within which bounds.

    ``classes`` are those that it may be computed in; empty for any. One that ``rests`` waits for a
    quote where no ask fits.
    """

    file: JobFile
    checked: CheckedJob
    body: bytes
    max_nusd: int
    deadline_ns: int
    checkpoint_steps: int
    checkpoint_s: int
    classes: frozenset[bytes]
    rests: bool = False

    def need(self, class_ids: frozenset[bytes], nonce: bytes) -> Need:
        """What is to be bought, in one of these classes; ``nonce`` will be the bid's."""
        return Need(
            class_ids=class_ids,
            flop=self.checked.cost.flop,
            touched_bytes=self.checked.cost.touched_bytes,
            moved_bytes=self.moved_bytes,
            memory_bytes=self.terms.memory_bytes,
            deadline_ns=self.deadline_ns,
            max_nusd=self.max_nusd,
            nonce=nonce,
            known=self.known,
        )

    def wants_as_much_as(self, other: Order) -> bool:
        """Whether nobody takes this who would not take ``other`` too."""
        mine, theirs = self.checked.cost, other.checked.cost
        return (
            self.classes == other.classes
            and self.max_nusd <= other.max_nusd
            and mine.flop >= theirs.flop
            and mine.touched_bytes >= theirs.touched_bytes
            and self.terms.memory_bytes >= other.terms.memory_bytes
            and self.moved_bytes >= other.moved_bytes
        )

    @property
    def known(self) -> Known:
        """What limits of asks are compared with that a bid does not say."""
        return ((Limit.NODES, self.checked.nodes),)

    @property
    def costs(self) -> tuple[CostLine, ...]:
        """The metered cost as a bid states it."""
        return cost_lines(self.checked)

    @cached_property
    def moved_bytes(self) -> int:
        """See ``moved_bytes``."""
        return moved_bytes(self.checked, self.checkpoint_steps)

    @cached_property
    def terms(self) -> Terms:
        """What a bid asks of the lease."""
        return Terms(
            memory_bytes=memory_bytes(self.checked),
            moved_bytes=self.moved_bytes,
            checkpoint_steps=self.checkpoint_steps,
            deadline_ns=self.deadline_ns,
        )


@dataclass(frozen=True, slots=True)
class Ranking:
    """One look at the book for one order. ``nonce`` breaks its ties and goes into the bid.

    ``admitted`` are whom a strict node holds to be attested, ``avoided`` whom its policy excludes.
    """

    nonce: bytes
    view: BookView
    mandate: Mandate
    ranked: list[Deal | Miss]
    admitted: Accounts
    avoided: tuple[Avoided, ...] = ()

    @property
    def deals(self) -> list[Deal]:
        """What can be bought, best first."""
        return [entry for entry in self.ranked if isinstance(entry, Deal)]

    @property
    def is_over_limits(self) -> bool:
        """Whether nothing can be bought, and some of it only for a limit of its ask."""
        over = any(miss.reason is MissReason.LIMIT for miss in self.misses)
        return over and not self.deals

    @property
    def misses(self) -> list[Miss]:
        """What cannot."""
        return [entry for entry in self.ranked if isinstance(entry, Miss)]


def checkpoints(job: Job, checkpoint_steps: int) -> int:
    """How many checkpoints a job has before its end, if they lie so many steps apart."""
    if not checkpoint_steps:
        return 0
    last = job.first_step + job.steps - 1
    return last // checkpoint_steps - job.first_step // checkpoint_steps


def moved_bytes(checked: CheckedJob, checkpoint_steps: int) -> int:
    """What a purchase moves and a quote bills: inputs, and the state as often as delivered."""
    state = sum(
        stored_bytes(Dtype(param.dtype), param.shape)
        for param in checked.work.params
        if param.role == ROLE_STATE
    )
    deliveries = 1 + checkpoints(checked.job, checkpoint_steps)
    kept = sum(collected_bytes(checked, phase) for phase in range(len(checked.work.phases)))
    return checked.input_bytes + _fed_bytes(checked) + kept + state * deliveries


def _fed_bytes(checked: CheckedJob) -> int:
    """Each shard that is needed once, and the list of all."""
    job, moved = checked.job, 0
    for slot, source in checked.feeds:
        size_bytes = checked.slot_bytes(slot)
        moved += numbered_bytes(source.shards, size_bytes)
        moved += size_bytes * len(shards_of(source, job.first_step, job.steps))
    return moved


def collected_bytes(checked: CheckedJob, number: int) -> int:
    """The values that a job collects of the outputs of one phase, and the lists of them."""
    phase, moved = checked.work.phases[number], 0
    times = times_due(phase, checked.job.first_step, checked.job.steps)
    for output, mode in enumerate(phase.modes):
        if mode == MODE_COLLECT and times:
            size_bytes = output_bytes(checked, number, output)
            moved += numbered_bytes(times, size_bytes) + times * size_bytes
    return moved


def cost_lines(checked: CheckedJob) -> tuple[CostLine, ...]:
    """The metered cost of a job as bids state it."""
    lines = checked.cost.lines
    return tuple(CostLine(c.graph, c.flop, c.touched_bytes, c.times) for c in lines)


def open_order(
    data: bytes,
    options: SubmitOptions,
    classes: frozenset[bytes],
    now_ns: int,
    deadline_ns: int | None = None,
) -> Order:
    """Decode and check a job file. Raises ProtocolError, JobError. Takes CPU time.

    ``classes`` are what the options' stand for.

    An order whose job does not say from which state it starts is not complete: ``starting_from``.
    """
    file = decode_file(data)
    checked = open_job(file.body)
    if isinstance(checked, Refusal):
        raise JobError(f"the job is not valid: {checked.reason}")
    reason = unsupported(checked)
    if reason:
        raise JobError(reason)
    body = encode_body(file.body)
    if len(body) > MAX_BODY_BYTES:
        raise JobError(f"the job of {len(body)} bytes is over {MAX_BODY_BYTES}")
    if deadline_ns is None:
        deadline_s = DEFAULT_DEADLINE_S if options.deadline_s is None else options.deadline_s
        if not 0 < deadline_s <= MAX_DEADLINE_S:
            raise ConfigError(
                f"a deadline of {deadline_s} s", hint=f"Use 1 s to {MAX_DEADLINE_S // 86400} days."
            )
        deadline_ns = now_ns + deadline_s * NS_PER_S
    every = checkpoint_steps(checked.job, options.checkpoint_steps)
    if every < 0 or checkpoints(checked.job, every) > MAX_CHECKPOINTS:
        raise ConfigError(
            f"{every} steps between checkpoints are over {MAX_CHECKPOINTS} checkpoints",
            hint="Have fewer checkpoints, or none with 0.",
        )
    return Order(
        file,
        checked,
        body,
        MAX_NUSD if options.max_nusd is None else options.max_nusd,
        deadline_ns,
        every,
        _checkpoint_s(options.checkpoint_s),
        classes,
        options.rest,
    )


def starting_from(
    order: Order, states: Mapping[bytes, tuple[bytes, ...]], own_class: bytes
) -> Order:
    """``order`` with the state that its job starts from, and in its class from then on.

    ``states`` has what is known of it, by class; ``own_class`` is chosen first. Raises JobError if
    there is none in a class that the order may be computed in.
    """
    known = [name for name in sorted(states) if not order.classes or name in order.classes]
    if not known:
        raise _unknown_start(order.checked.job.first_step, sorted(states))
    chosen = own_class if own_class in known else known[0]
    state = states[chosen]
    body = replace_fields(order.file.body, state=state)
    return replace(
        order,
        file=replace_fields(order.file, body=body),
        checked=replace(order.checked, state=state),
        body=encode_body(body),
        classes=frozenset({chosen}),
    )


def _unknown_start(step: int, elsewhere: Sequence[bytes]) -> JobError:
    """``elsewhere`` are the classes in which the state is known that were not asked for."""
    if not elsewhere:
        return JobError(
            f"the state after step {step} of this work is not known to this node",
            hint="Run the steps before it here first, or say it: job.extend(steps, result).",
        )
    told = " and ".join(name.hex() for name in elsewhere[:MAX_CLASSES_TOLD])
    name = elsewhere[0].hex()
    return JobError(
        f"the state after step {step} of this work is known in another class only: {told}",
        hint=f"Go on in that class: p2pflop submit --class {name}, or classes=[{name!r}].",
    )


def describe_ranking(ranking: Ranking) -> Json:
    """Deals and misses as clients see them, the best ``MAX_RANKED_TOLD`` of each."""
    avoided = {each.account: each for each in ranking.avoided}
    misses = [entry for entry in ranking.ranked if isinstance(entry, Miss)]
    return {
        "deals": [describe_deal(deal) for deal in ranking.deals[:MAX_RANKED_TOLD]],
        "misses": [
            describe_miss(miss, avoided.get(miss.account)) for miss in misses[:MAX_RANKED_TOLD]
        ],
        "asks": len(ranking.ranked),
    }


def describe_deal(deal: Deal) -> Json:
    """A deal as clients see it; ``minutes`` at the speed that the provider claims."""
    return {
        "provider": deal.peer,
        "account": deal.account.hex(),
        "total_nusd": deal.total_nusd,
        "price_nusd": deal.ask.price_nusd,
        "minutes": None if deal.claimed_ns is None else deal.claimed_ns / (60 * NS_PER_S),
    }


def describe_miss(miss: Miss, avoided: Avoided | None) -> Json:
    """A miss as clients see it; of one that is ``avoided`` also why, and until when; of one over a
    limit of its ask also which, and by how much."""
    told: Json = {
        "provider": miss.peer,
        "account": miss.account.hex(),
        "reason": str(miss.reason),
        "total_nusd": miss.total_nusd,
        "price_nusd": miss.ask.price_nusd,
    }
    if miss.over is not None:
        over = {"limit": miss.over.label, "job": miss.over.figure, "ask": miss.over.most}
        told |= {"told": miss.told, "over": over}
    if avoided is not None and miss.reason is MissReason.POLICY:
        told |= {"avoided_until_ns": avoided.until_ns, "failures": avoided.failures}
    return told


def describe_order(order: Order) -> Json:
    """What a job asks for, as clients see it."""
    cost = order.checked.cost
    return {
        "flop": cost.flop,
        "touched_bytes": cost.touched_bytes,
        "memory_bytes": order.terms.memory_bytes,
        "moved_bytes": order.moved_bytes,
    }


def order_card(order: Order) -> Json:
    """How a run of this order is listed."""
    return {
        "title": order.file.labels.title,
        "work": order.checked.work_id.hex(),
        "first_step": order.checked.job.first_step,
        "step": order.checked.job.first_step,
        "steps": order.checked.job.steps,
        "root_from": order.checked.root_from.hex(),
        "body_bytes": len(order.body),
        "max_nusd": order.max_nusd,
        "deadline_ns": order.deadline_ns,
        **describe_order(order),
    }


def _checkpoint_s(wanted: int | None) -> int:
    """After how many seconds without a checkpoint there should be one."""
    if wanted and not MIN_CHECKPOINT_SECONDS <= wanted <= MAX_DEADLINE_S:
        raise ConfigError(
            f"a checkpoint every {wanted} s",
            hint=f"Use {MIN_CHECKPOINT_SECONDS} s or more, or 0 for none.",
        )
    return DEFAULT_CHECKPOINT_S if wanted is None else wanted


def checkpoint_steps(job: Job, wanted: int | None) -> int:
    """How many steps lie between checkpoints: as wanted, else a quarter, for jobs that are long."""
    if wanted is not None:
        return wanted
    return -(-job.steps // DEFAULT_CHECKPOINTS) if job.steps >= MIN_CHECKPOINT_STEPS else 0
