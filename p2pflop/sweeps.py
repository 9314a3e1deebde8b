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

import json
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from p2pflop.client import Client
from p2pflop.errors import ConfigError, MarketError, NodeUnreachableError, P2PFlopError
from p2pflop.ids import content_hash, parse_hash
from p2pflop.job.counts import whole_number
from p2pflop.job.file import decode_file, encode_file
from p2pflop.node.service import SubmitOptions
from p2pflop.runs import Row, Run, check_event
from p2pflop.sdk import Job, Number, Usd, put_inputs, submit_options
from p2pflop.units import NS_PER_S

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
SWEEP_VERSION: Final = 1


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is to buy, as the node keeps it in a blob of JSON.

    ``job`` is the address of the job file, ``args`` the arguments of each of its variants.
    """

    nonce: str
    job: str
    args: list[dict[str, Number]]
    max_nusd: int | None
    deadline_ns: int | None
    checkpoint_steps: int | None
    checkpoint_s: int | None
    classes: list[str]
    fresh: bool
    under_way: int

    def encode(self) -> bytes:
        """The blob."""
        return json.dumps({"sweep": SWEEP_VERSION, **asdict(self)}).encode()

    @classmethod
    def decode(cls, blob: bytes) -> Self:
        """The plan in a blob. Raises ConfigError if there is none."""
        try:
            fields = json.loads(blob)
            if fields.pop("sweep") != SWEEP_VERSION:
                raise ValueError
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError("that blob is not a sweep", hint="Give the id of a sweep.") from error


@dataclass(frozen=True)
class Outcome:
    """How one job of a sweep has ended, as a future of ``concurrent.futures`` tells it.

    ``place`` is its number in the arguments, from 0; ``state`` is ``settled``, ``failed``,
    ``cancelled`` or, of one that was never submitted, ``not bought``. ``row`` is the last row that
    it told; ``earlier`` the id of the run whose result it has, if it was bought before.
    """

    place: int
    args: Mapping[str, Number]
    state: str
    cost_nusd: int = 0
    run: Run | None = None
    row: Row | None = None
    earlier: str = ""
    error: P2PFlopError | None = field(default=None, repr=False)

    def result(self) -> Result:
        """Its result. Raises what the job failed with."""
        if self.error is not None or self.run is None:
            raise self.error or P2PFlopError("the job was not bought")
        return self.run.result()

    def exception(self) -> P2PFlopError | None:
        """What it failed with, or None."""
        return self.error


@dataclass(frozen=True)
class SweepProgress:
    """How far a sweep is: numbers of jobs, of which ``done`` have ended, ``failed`` of them without
    a result."""

    jobs: int
    done: int
    failed: int
    under_way: int
    waiting: int
    spent_nusd: int


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
        self._todo: deque[int] = deque(range(len(plan.args)))
        self._limits: dict[int, int] = {}
        self._spent_nusd = 0
        self._outcomes: dict[int, Outcome] = {}
        self._arrived: list[int] = []
        self._pricing = threading.Lock()
        self._price_nusd: int | None = None
        self._priced_at = -math.inf
        self._stopped = ""
        self._fault: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"Sweep({self.id[:12]!r}, {len(self)} jobs)"

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
            done = len(self._outcomes)
            under_way, waiting = len(self._limits), len(self) - done - len(self._limits)
            return SweepProgress(len(self), done, failed, under_way, waiting, self._spent_nusd)

    def cancel(self) -> None:
        """Cancel what is under way and buy no more. What was delivered until then is owed."""
        self._stop("the sweep was cancelled")
        ends_at = time.monotonic() + CANCEL_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, ends_at - time.monotonic()))

    # Inside

    def start(self, *, known: bool = False) -> Self:
        """Begin to buy; ``known`` asks the node first which runs there are already."""
        if known:
            self._recall()
        for _ in range(min(self._plan.under_way, len(self))):
            thread = threading.Thread(target=self._work, daemon=True, name=f"sweep {self.id[:12]}")
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()
        return self

    def _recall(self) -> None:
        """Runs that there are come first, and what they may cost is not free for others."""
        found: list[int] = []
        for place in range(len(self)):
            try:
                card = self._client.job(self.run_id(place))
            except NodeUnreachableError:
                raise
            except ConfigError:
                continue  # nobody has submitted it
            found.append(place)
            cost_nusd = card["cost_nusd"] if card["end_state"] == "settled" else card["max_nusd"]
            self._limits[place] = int(cost_nusd)
        fresh = [place for place in self._todo if place not in self._limits]
        self._todo = deque([*found, *fresh])

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
            interrupt.add_note(
                f"What is done stays: pf.attach_sweep({self.id!r}) has it, and buys the rest."
            )
            raise

    def _stop(self, reason: str) -> None:
        with self._changed:
            self._stopped = self._stopped or reason
            under_way = list(self._limits)
            self._changed.notify_all()
        with self._client.another() as client:
            for place in under_way:
                with suppress(P2PFlopError):  # not submitted yet: whoever does so cancels it
                    client.cancel(self.run_id(place))

    def _work(self) -> None:
        """One thread: one run at a time."""
        with self._client.another() as client:
            try:
                while (claimed := self._claim(client)) is not None:
                    place, limit_nusd = claimed
                    outcome = self._buy(client, place, limit_nusd)
                    self._settle(outcome)
                    if self._cancel_if is not None and outcome.state == "settled":
                        # The outcome's own client may be another thread's by now.
                        run = Run(self.run_id(place), client)
                        if not self._stopped and self._cancel_if(run.result()):
                            self._stop("cancel_if ended the sweep")
            except BaseException as fault:  # noqa: BLE001 - raised where the user waits
                with self._changed:
                    self._fault = self._fault or fault
                self._stop("the sweep failed")

    def _claim(self, client: Client) -> tuple[int, int | None] | None:
        """The next job and its limit, once the budget has room for it; None if there is none."""
        while True:
            price_nusd = self._price(client)
            with self._changed:
                if not self._todo:
                    return None
                place = self._todo[0]
                known = place in self._limits
                if self._stopped and not known:
                    self._give_up_rest()
                    continue
                limit_nusd = self._limits[place] if known else self._limit(price_nusd)
                if known or limit_nusd is not None or self._plan.max_nusd is None:
                    self._todo.popleft()
                    self._limits[place] = limit_nusd or 0
                    return place, limit_nusd
                self._changed.wait(QUOTE_FOR_S)

    def _limit(self, price_nusd: int | None) -> int | None:
        """What the next job may cost: an even share of what is left, or the price if that is more.

        None if it has to wait. With nothing under way it gets all that is left.
        """
        if self._plan.max_nusd is None:
            return None
        left_nusd = max(0, self._plan.max_nusd - self._spent_nusd - sum(self._limits.values()))
        wanted_nusd = max(left_nusd // len(self._todo), price_nusd or 0)
        if wanted_nusd <= left_nusd:
            return wanted_nusd
        return None if self._limits else left_nusd

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
        for place in self._todo:
            if place not in self._limits:
                outcome = Outcome(place, self._plan.args[place], "not bought", error=error)
                self._add(outcome)
        self._todo.clear()

    def _settle(self, outcome: Outcome) -> None:
        with self._changed:
            self._limits.pop(outcome.place, None)
            self._spent_nusd += outcome.cost_nusd
            self._add(outcome)

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
            self._submit(client, place, limit_nusd)
        except NodeUnreachableError:
            raise
        except P2PFlopError as error:
            return Outcome(place, args, "not bought", error=error)
        if self._stopped:
            client.cancel(run.id)
        row: Row | None = None
        costs = Costs()
        for event in client.events(run.id):
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
                earlier = str(event.get("earlier", ""))
                cost_nusd = int(event["cost_nusd"])
                return Outcome(place, args, "settled", cost_nusd, run, row, earlier)
        raise P2PFlopError(f"run {run.id} ended without a result")

    def _submit(self, client: Client, place: int, limit_nusd: int | None) -> None:
        plan, run_id = self._plan, self.run_id(place)
        deadline_s = None
        if plan.deadline_ns is not None:
            deadline_s = math.ceil((plan.deadline_ns - time.time_ns()) / NS_PER_S)
            if deadline_s < 1:
                if _is_there(client, run_id):
                    return
                raise MarketError("not bought: the sweep's deadline has passed")
        job = self._job.with_args(**plan.args[place])
        for address, data in job.inputs.items():
            if address not in self._job.inputs:
                client.put(data)
        options = SubmitOptions(
            max_nusd=limit_nusd,
            deadline_s=deadline_s,
            checkpoint_steps=plan.checkpoint_steps,
            checkpoint_s=plan.checkpoint_s,
            classes=tuple(plan.classes),
            fresh=plan.fresh,
            run_id=run_id,
        )
        client.submit(encode_file(job.file), options)


class Costs:
    """What a run owes, from its events: receipts are cumulative under each fill."""

    def __init__(self) -> None:
        self._before_nusd = 0
        self._now_nusd = 0

    @property
    def nusd(self) -> int:
        """All fills together."""
        return self._before_nusd + self._now_nusd

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take an event into account."""
        if event["kind"] == "filled":
            self._before_nusd, self._now_nusd = self.nusd, 0
        elif event["kind"] == "receipt":
            self._now_nusd = max(self._now_nusd, int(event["amount_nusd"]))


def map(  # noqa: A001 - the word of Python and of all that run many jobs
    job: Job,
    args: Sequence[Mapping[str, Number]],
    *,
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
    client: Client | None = None,
) -> Sweep:
    """Buy a run of ``job`` for each of ``args`` (see ``Job.with_args``), ``under_way`` at once.

    They share one graph and plan, and one budget: ``max_usd`` is the most that all of them may
    cost together, ``deadline`` how long they may take together. ``cancel_if`` is told each result
    and ends the rest when it is true; ``prune_if`` is told each row and ends that run alone (a run
    that changed its provider may tell rows twice). Both are called from threads of the sweep. The
    other options are those of ``submit``, for each run.

    It returns at once, and the sweep goes on in the background; see ``Sweep``. Raises ConfigError,
    JobError for arguments that the job does not have, and what ``submit`` raises for its inputs.
    """
    whole_number("jobs in a sweep", len(args), MAX_JOBS)
    whole_number("under_way", under_way, MAX_UNDER_WAY)
    options = submit_options(max_usd, deadline, checkpoint_steps, checkpoint_every, classes, fresh)
    variants = [{name: _plain(value) for name, value in each.items()} for each in args]
    for each in variants:
        job.with_args(**each)
    client = client or Client(start=True)
    put_inputs(job, client)
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


def _plain(value: Any) -> Number:
    """A number of Python's own; numpy's scalars are none."""
    number: Number = value.item() if hasattr(value, "item") else value
    return number


def _is_there(client: Client, run_id: str) -> bool:
    try:
        client.job(run_id)
    except NodeUnreachableError:
        raise
    except ConfigError:
        return False
    return True
