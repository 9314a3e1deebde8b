"""Many jobs under one budget: what ``pf.map`` gives.

A sweep is a blob in the node's store, which says what is to be bought, and one run for each of its
jobs, whose ids follow from the blob. So a script that dies leaves everything behind that another
needs to go on: ``attach_sweep`` computes the same ids, asks the node how those runs stand, and buys
what nobody has submitted yet. Submitting under an id is idempotent, so nothing is bought twice.

The budget is held here. A run is submitted with a limit of its own, which counts as spent until the
run is over and what it has cost is known. The limits of the runs under way and the costs of those
that are over never exceed the budget. A job that does not fit waits until a run comes in cheaper
than its limit. When none is under way any more, it is submitted with what is left, and the node
tells why that buys nothing.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from p2pflop.client import Client
from p2pflop.errors import ConfigError, MarketError, NodeUnreachableError, P2PFlopError
from p2pflop.ids import content_hash, parse_hash
from p2pflop.job.counts import whole_number
from p2pflop.job.file import decode_file, encode_file
from p2pflop.job.submission import MAX_INPUTS
from p2pflop.job.variants import encode_variants
from p2pflop.node.service import LAST_EVENT_KINDS, Json, SubmitOptions
from p2pflop.outcomes import Costs, Outcome, SweepProgress
from p2pflop.packs import room_for, variants_of
from p2pflop.runs import Row, Run, check_event
from p2pflop.sdk import Job, Number, Usd, put_inputs, submit_options
from p2pflop.shards import jobs_of, with_data
from p2pflop.standing import Unit, card_of, recall
from p2pflop.sweep_plan import SweepPlan
from p2pflop.units import NS_PER_S, counted

if TYPE_CHECKING:
    from p2pflop.results import Result

MAX_JOBS: Final = 10_000
"""In one sweep."""
MAX_UNDER_WAY: Final = 32
"""Runs of one sweep at once; the node has room for ``MAX_RUNS_UNDER_WAY``."""
DEFAULT_UNDER_WAY: Final = 8
QUOTE_FOR_S: Final = 10.0
"""How long a price is good for dividing the budget."""
CANCEL_WITHIN_S: Final = 30.0
RUN_ID_DIGITS: Final = 12


class Sweep:
    """Many runs of one job, bought in the background under one budget.

    Iterating gives an ``Outcome`` for each job, in the order of the arguments, or as they come with
    ``ordered=False``; a job that failed is one of them and raises nothing. Ctrl-C in the loop
    cancels the runs under way and buys no more; what is done stays.
    """

    def __init__(
        self,
        sweep_id: str,
        plan: SweepPlan,
        job: Job,
        client: Client,
        *,
        ordered: bool = True,
        cancel_if: Callable[[Result], bool] | None = None,
        prune_if: Callable[[Row], bool] | None = None,
    ) -> None:
        self.id = sweep_id
        self._plan = plan
        self._job = job
        self._client = client
        self._ordered = ordered
        self._cancel_if = cancel_if
        self._prune_if = prune_if
        self._changed = threading.Condition()
        self._todo: deque[Unit] = deque(
            tuple(range(first, min(first + plan.room, len(plan.args))))
            for first in range(0, len(plan.args), plan.room)
        )
        self._limits: dict[Unit, int] = {}
        self._ended: dict[Unit, Json] = {}
        self._spent_nusd = 0
        self._outcomes: dict[int, Outcome] = {}
        self._arrived: list[int] = []
        self._pricing = threading.Lock()
        self._price_nusd: int | None = None
        self._priced_at = -math.inf
        self._stopped = ""
        self._fault: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._at_work = 0

    def __repr__(self) -> str:
        return f"Sweep({self.id[:12]!r}, {counted(len(self), 'job')})"

    def __len__(self) -> int:
        return len(self._plan.args)

    def __iter__(self) -> Iterator[Outcome]:
        for number in range(len(self)):
            yield self._wait(number)

    def run_id(self, place: int) -> str:
        """The id of the run of the job at ``place``, whether it has been submitted or not."""
        return content_hash(f"{self.id} {place}".encode()).hex()[:RUN_ID_DIGITS]

    def outcomes(self) -> list[Outcome]:
        """Wait for all; the outcomes in the order of the arguments."""
        for number in range(len(self)):
            self._wait(number)
        return [self._outcomes[place] for place in range(len(self))]

    def results(self) -> list[Result]:
        """Wait for all; the results in the order of the arguments. Raises the first failure."""
        outcomes = self.outcomes()
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [outcome.result() for outcome in outcomes]

    def best(
        self, name: str, choose: Callable[[Sequence[float]], float] = min
    ) -> tuple[Outcome, Result]:
        """Wait for all; the one whose last value of output ``name`` is chosen by ``min`` or
        ``max``, and its result. NaN never is. Raises P2PFlopError if no job has a value."""
        found: dict[float, tuple[Outcome, Result]] = {}
        for outcome in self.outcomes():
            if outcome.state != "settled":
                continue
            result = outcome.result()
            if name not in result:
                continue
            values = result[name].reshape(-1)
            if len(values) and not math.isnan(value := float(values[-1])):
                found.setdefault(value, (outcome, result))
        if not found:
            raise P2PFlopError(f"no job of this sweep has a value of {name!r}")
        return found[choose(list(found))]

    def progress(self) -> SweepProgress:
        """How far it is now."""
        with self._changed:
            failed = sum(outcome.error is not None for outcome in self._outcomes.values())
            done, under_way = len(self._outcomes), sum(len(unit) for unit in self._limits)
            waiting, spent_nusd = len(self) - done - under_way, self._spent_nusd
            for unit, card in self._ended.items():  # told by the node, and not looked at yet
                done, under_way = done + len(unit), under_way - len(unit)
                failed += len(unit) * (card["end_state"] != "settled")
                spent_nusd += int(card.get("cost_nusd", 0))
            return SweepProgress(len(self), done, failed, under_way, waiting, spent_nusd)

    def cancel(self) -> None:
        """Cancel what is under way and buy no more. What was delivered until then is owed."""
        self._stop("the sweep was cancelled")
        ends_at = time.monotonic() + CANCEL_WITHIN_S
        for thread in list(self._threads):
            thread.join(max(0.0, ends_at - time.monotonic()))

    # Inside

    def start(self, *, known: bool = False) -> Self:
        """Begin to buy; ``known`` asks the node first which runs there are already."""
        if known:
            standing = recall(self._client, self._todo, self._unit_id)
            self._todo = deque([*standing.found, *standing.fresh])
            self._limits, self._ended = standing.limits, standing.ended
            self._spent_nusd = standing.spent_nusd
        with self._changed:
            self._hire()
        return self

    def _hire(self) -> None:
        """Under the lock: have a thread for each unit that waits, ``under_way`` at most."""
        for _ in range(min(self._plan.under_way - self._at_work, len(self._todo))):
            thread = threading.Thread(target=self._work, daemon=True, name=f"sweep {self.id[:12]}")
            self._threads.append(thread)
            self._at_work += 1
            thread.start()

    def _unit_id(self, unit: Unit) -> str:
        """The id of the run of a job, or of the pack of several."""
        if len(unit) == 1:
            return self.run_id(unit[0])
        name = f"{self.id} {unit[0]}-{unit[-1]}"
        return content_hash(name.encode()).hex()[:RUN_ID_DIGITS]

    def _wait(self, number: int) -> Outcome:
        """The outcome that an iteration gives as its ``number``-th."""
        try:
            with self._changed:
                while True:
                    if self._fault is not None:
                        raise self._fault
                    if self._ordered and number in self._outcomes:
                        return self._outcomes[number]
                    if not self._ordered and number < len(self._arrived):
                        return self._outcomes[self._arrived[number]]
                    self._changed.wait()
        except KeyboardInterrupt as interrupt:
            self.cancel()
            interrupt.add_note(self._how_to_go_on())
            raise

    def _how_to_go_on(self) -> str:
        """What there is to do after Ctrl-C. A run that is cancelled stays so: pruned ones are, too,
        and must not come back."""
        free = "" if self._plan.fresh else ": what is done answers at once and costs nothing"
        return (
            "What is done stays, and what was under way is cancelled for good. What was not "
            f"submitted yet is bought by: p2pflop sweep --attach {self.id[:12]}, or "
            f"pf.attach_sweep({self.id!r}). To buy the cancelled ones as well, start the sweep "
            f"again{free}."
        )

    def _stop(self, reason: str) -> None:
        with self._changed:
            self._stopped = self._stopped or reason
            under_way = list(self._limits)
            self._changed.notify_all()
        with self._client.another() as client:
            for unit in under_way:
                with suppress(P2PFlopError):  # not submitted yet: whoever does so cancels it
                    client.cancel(self._unit_id(unit))

    def _work(self) -> None:
        """One thread: one run at a time."""
        with self._client.another() as client:
            try:
                while (claimed := self._claim(client)) is not None:
                    unit, limit_nusd = claimed
                    if len(unit) == 1:
                        outcomes = [self._buy(client, unit[0], limit_nusd)]
                    else:
                        outcomes = self._buy_pack(client, unit, limit_nusd)
                    self._settle(unit, outcomes)
                    self._look_at(client, outcomes)
            except BaseException as fault:  # noqa: BLE001 - raised where the user waits
                with self._changed:
                    self._fault = self._fault or fault
                self._stop("the sweep failed")

    def _look_at(self, client: Client, outcomes: Sequence[Outcome]) -> None:
        """Let ``cancel_if`` see what has come."""
        if self._cancel_if is None:
            return
        for outcome in outcomes:
            if outcome.state == "settled" and not self._stopped:
                # The outcome's own client may be another thread's by now.
                run = Run(self.run_id(outcome.place), client)
                if self._cancel_if(run.result()):
                    self._stop("cancel_if ended the sweep")

    def _claim(self, client: Client) -> tuple[Unit, int | None] | None:
        """The next job, or pack of several, and its limit, once the budget has room for it; None if
        there is none."""
        while True:
            price_nusd = self._price(client)
            with self._changed:
                if not self._todo:
                    self._at_work -= 1
                    return None
                unit = self._todo[0]
                known = unit in self._limits
                if self._stopped and not known:
                    self._give_up_rest()
                    continue
                limit_nusd = self._limits[unit] if known else self._limit(unit, price_nusd)
                if known or limit_nusd is not None or self._plan.max_nusd is None:
                    self._todo.popleft()
                    self._limits[unit] = limit_nusd or 0
                    return unit, limit_nusd
                if len(unit) > 1:
                    self._split(unit)  # what does not fit together may fit one by one
                else:
                    self._changed.wait(QUOTE_FOR_S)

    def _limit(self, unit: Unit, price_nusd: int | None) -> int | None:
        """What the next job may cost: an even share of what is left, or the price if that is more.

        A pack is to cost no more than its jobs would one by one. None if it has to wait. With
        nothing under way it gets all that is left.
        """
        if self._plan.max_nusd is None:
            return None
        left_nusd = max(0, self._plan.max_nusd - self._spent_nusd - sum(self._limits.values()))
        jobs = sum(len(each) for each in self._todo)
        wanted_nusd = max(left_nusd * len(unit) // jobs, (price_nusd or 0) * len(unit))
        if wanted_nusd <= left_nusd:
            return wanted_nusd
        return None if self._limits or len(unit) > 1 else left_nusd

    def _split(self, unit: Unit) -> None:
        """Under the lock: have the jobs of the pack at the front, or of one that was, bought one by
        one."""
        if self._todo and self._todo[0] == unit:
            self._todo.popleft()
        self._todo.extendleft((place,) for place in reversed(unit))
        self._hire()

    def _price(self, client: Client) -> int | None:
        """What the best deal for one of the jobs asks now; they all cost the same."""
        if self._plan.max_nusd is None:
            return None
        with self._pricing:  # Whoever comes meanwhile waits for the price, too.
            if time.monotonic() - self._priced_at >= QUOTE_FOR_S:
                options = SubmitOptions(classes=tuple(self._plan.classes))
                deals = client.quote(encode_file(self._job.file), options)["deals"]
                self._price_nusd = int(deals[0]["total_nusd"]) if deals else None
                self._priced_at = time.monotonic()
            return self._price_nusd

    def _give_up_rest(self) -> None:
        """Under the lock: nobody is going to buy these."""
        error = MarketError(f"not bought: {self._stopped}", hint="Attach the sweep again to go on.")
        for unit in self._todo:
            for place in unit if unit not in self._limits else ():
                self._add(Outcome(place, self._plan.args[place], "not bought", error=error))
        self._todo.clear()

    def _settle(self, unit: Unit, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self._limits.pop(unit, None)
            self._ended.pop(unit, None)
            for outcome in outcomes:
                self._spent_nusd += outcome.cost_nusd
                self._add(outcome)
            self._changed.notify_all()  # there may be room in the budget

    def _add(self, outcome: Outcome) -> None:
        """Under the lock."""
        self._outcomes[outcome.place] = outcome
        self._arrived.append(outcome.place)
        self._changed.notify_all()

    def _buy(self, client: Client, place: int, limit_nusd: int | None) -> Outcome:
        """Submit one job, unless its run is there already, and follow it to its end."""
        plan, run = self._plan, Run(self.run_id(place), self._client)
        args = plan.args[place]
        try:
            events = self._submit(client, place, limit_nusd)
        except NodeUnreachableError:
            raise
        except P2PFlopError as error:
            return Outcome(place, args, "not bought", error=error)
        if self._stopped:
            client.cancel(run.id)
        row: Row | None = None
        costs = Costs()
        for event in events:
            costs.hear(event)
            if event["kind"] == "rows" and event["rows"]:
                rows = [Row(told["step"], told["values"]) for told in event["rows"]]
                row = rows[-1]
                if self._prune_if is not None and any(self._prune_if(each) for each in rows):
                    client.cancel(run.id)
            try:
                check_event(event, run.id)
            except P2PFlopError as error:
                state = str(event["kind"])
                return Outcome(place, args, state, costs.nusd, run, row, error=error)
            if event["kind"] == "result":
                # What was told while a node restarted is lost; the result has it.
                end = self._job.file.body.job.first_step + int(event.get("steps_done", 0))
                if row is not None and row.step + 1 < end:
                    row = Row(*Run(run.id, client).result().last_row())
                earlier, pack = str(event.get("earlier", "")), str(event.get("pack", ""))
                cost_nusd = int(event["cost_nusd"])
                return Outcome(place, args, "settled", cost_nusd, run, row, earlier, pack)
        raise P2PFlopError(f"run {run.id} ended without a result")

    def _buy_pack(self, client: Client, unit: Unit, limit_nusd: int | None) -> list[Outcome]:
        """Buy several jobs as one. If that fails they are to be bought one by one: no outcome.

        Raises P2PFlopError for a pack that cannot be followed to its end: what it costs is not
        known."""
        plan, pack_id = self._plan, self._unit_id(unit)
        args = [plan.args[place] for place in unit]
        run_ids = [self.run_id(place) for place in unit]
        rows: dict[str, Row] = {}
        cards: list[Json] = []
        costs, ended, is_there = Costs(), "", False
        try:
            options = self._options(client, pack_id, limit_nusd)
            variants = variants_of(self._job, args, run_ids, plan.room, client)
            if options is not None:
                cards, bought = client.submit_pack(encode_variants(variants), options)
            is_there = options is None or bought > 0
            if is_there:
                if self._stopped:
                    client.cancel(pack_id)
                rest = [run_id for run_id in run_ids if run_id not in {c["id"] for c in cards}]
                for event in client.events(pack_id):
                    costs.hear(event)
                    ended = str(event["kind"])
                    if ended == "rows":
                        rows |= self._rows_of(event, rest)
                    check_event(event, pack_id)
                cards += client.unpack(pack_id)
        except NodeUnreachableError:
            raise
        except P2PFlopError as error:
            if is_there and ended not in LAST_EVENT_KINDS:
                raise
            return self._broken_pack(unit, costs.nusd, error, ended)
        places = dict(zip(run_ids, unit, strict=True))
        return [self._outcome(places[card["id"]], card, rows) for card in cards]

    def _rows_of(self, event: Json, run_ids: Sequence[str]) -> dict[str, Row]:
        """The last row of each job in some rows of its pack."""
        steps = self._job.steps
        return {
            run_ids[row["step"] // steps]: Row(row["step"] % steps, row["values"])
            for row in event["rows"]
        }

    def _broken_pack(
        self, unit: Unit, cost_nusd: int, error: P2PFlopError, ended: str
    ) -> list[Outcome]:
        """``ended``: with which event; one with a result is paid for, and only to be had again."""
        with self._changed:
            self._spent_nusd += cost_nusd
            self._limits.pop(unit, None)  # that cost was within it
            if ended not in ("cancelled", "result") and not self._stopped:
                self._split(unit)
                return []
        args, state = self._plan.args, "failed" if ended == "result" else "cancelled"
        return [Outcome(place, args[place], state, error=error) for place in unit]

    def _outcome(self, place: int, card: Json, rows: Mapping[str, Row]) -> Outcome:
        run = Run(str(card["id"]), self._client)
        return Outcome(
            place,
            self._plan.args[place],
            str(card["end_state"]),
            int(card["cost_nusd"]),
            run,
            rows.get(run.id),
            str(card.get("earlier", "")),
            str(card.get("pack", "")),
        )

    def _options(self, client: Client, run_id: str, limit_nusd: int | None) -> SubmitOptions | None:
        """Those of a run. None if it is there and its deadline has passed; MarketError if it is
        not there."""
        plan, deadline_s = self._plan, None
        if plan.deadline_ns is not None:
            deadline_s = math.ceil((plan.deadline_ns - time.time_ns()) / NS_PER_S)
            if deadline_s < 1:
                if card_of(client, run_id) is not None:
                    return None
                raise MarketError("not bought: the sweep's deadline has passed")
        return SubmitOptions(
            max_nusd=limit_nusd,
            deadline_s=deadline_s,
            checkpoint_steps=plan.checkpoint_steps,
            checkpoint_s=plan.checkpoint_s,
            classes=tuple(plan.classes),
            fresh=plan.fresh,
            rest=plan.rest,
            run_id=run_id,
        )

    def _submit(self, client: Client, place: int, limit_nusd: int | None) -> Iterator[Json]:
        plan, run_id = self._plan, self.run_id(place)
        options = self._options(client, run_id, limit_nusd)
        if options is None:
            return client.events(run_id)
        job = with_data(self._job, plan.data[place]) if plan.data else self._job
        job = job.with_args(**plan.args[place])
        own = [data for address, data in job.inputs.items() if address not in self._job.inputs]
        for data in own[MAX_INPUTS:]:
            client.put(data)
        body, few = encode_file(job.file), own[:MAX_INPUTS]
        return client.submit_and_follow(body, options, inputs=few)[1]


def map(  # noqa: A001 - the word of Python and of all that run many jobs
    job: Job,
    args: Sequence[Mapping[str, Number]] | None = None,
    *,
    feed: object = None,
    max_usd: Usd | None = None,
    deadline: str | float | None = None,
    ordered: bool = True,
    under_way: int = DEFAULT_UNDER_WAY,
    cancel_if: Callable[[Result], bool] | None = None,
    prune_if: Callable[[Row], bool] | None = None,
    checkpoint_steps: int | None = None,
    checkpoint_every: str | float | None = None,
    classes: Sequence[str] = (),
    fresh: bool = False,
    rest: bool = False,
    pack: bool = True,
    client: Client | None = None,
) -> Sweep:
    """Buy a run of ``job`` for each of ``args`` (see ``Job.with_args``), ``under_way`` at once.

    ``feed`` is for a run for each shard of what ``pf.feed`` gives or takes: the only feed of the
    job, or by the names of inputs and feeds, ``{"x": "data/*.npy"}``. With both, one takes
    ``args[n]`` and shard n.

    They share one graph and plan, and one budget: ``max_usd`` is the most that all of them may
    cost together, ``deadline`` how long they may take together. ``cancel_if`` is told each result
    and ends the rest when it is true; ``prune_if`` is told each row and ends that run alone (a run
    that changed its provider may tell rows twice). Both are called from threads of the sweep. The
    other options are those of ``submit``, for each run; one that rests keeps its share of the
    budget.

    Jobs so small that a purchase would take longer than they do are bought many at a time, as one
    job; their results are the same as if each had been bought alone. ``pack=False`` buys each
    alone, and so does ``prune_if``.

    It returns at once, and the sweep goes on in the background; see ``Sweep``. Raises ConfigError,
    also for arguments that the job does not have, and what ``submit`` raises for its inputs.
    """
    client = client or Client(start=True)
    whole_number("under_way", under_way, MAX_UNDER_WAY, fault=ConfigError)
    options = submit_options(
        max_usd, deadline, checkpoint_steps, checkpoint_every, classes, fresh, rest
    )
    variants, data = jobs_of(job, args, feed, MAX_JOBS, client)
    job = with_data(job, data[0]) if data else job
    put_inputs(job, client)
    room = room_for(job, variants) if pack and prune_if is None and not data else 1
    plan = SweepPlan(
        secrets.token_hex(16),
        client.put(encode_file(job.file)).address.hex(),
        variants,
        options.max_nusd,
        None if options.deadline_s is None else time.time_ns() + options.deadline_s * NS_PER_S,
        options.checkpoint_steps,
        options.checkpoint_s,
        list(options.classes),
        fresh,
        under_way,
        room,
        data,
        rest,
    )
    sweep_id = client.put(plan.encode()).address.hex()
    sweep = Sweep(
        sweep_id, plan, job, client, ordered=ordered, cancel_if=cancel_if, prune_if=prune_if
    )
    return sweep.start()


def attach_sweep(
    sweep_id: str,
    *,
    ordered: bool = True,
    cancel_if: Callable[[Result], bool] | None = None,
    prune_if: Callable[[Row], bool] | None = None,
    client: Client | None = None,
) -> Sweep:
    """The sweep of that id, from this process or any before it, and go on with it.

    What has ended is not bought again, cancelled runs included; what is under way is followed; what
    was never submitted is bought under the same budget and deadline. One process at a time should
    do so. Raises BlobNotFoundError if the node does not know it, ConfigError if it is no sweep.
    """
    client = client or Client(start=True)
    plan = SweepPlan.decode(client.get(parse_hash(sweep_id)))
    job = Job(decode_file(client.get(parse_hash(plan.job))))
    sweep = Sweep(
        sweep_id, plan, job, client, ordered=ordered, cancel_if=cancel_if, prune_if=prune_if
    )
    return sweep.start(known=True)
