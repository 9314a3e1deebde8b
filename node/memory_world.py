"""A whole market in memory, in bad weather: nodes that buy and sell while everything fails.

For tests and benches. A ``World`` has ``MemoryNode``s, that is the production book, relay, ranking,
both lifecycles, receipts and ledger, on one virtual network and trio's virtual clock. Frames take
time; streams go dark in the middle of a conversation; gossip is lost; the network splits; the power
of honest nodes goes at some write to their journal, before it or after it, at times of two at once;
and some nodes are villains:

=========== ====================================================================================
mute        an ask of a low price; answers nothing
fake        fills, and then says nothing more than that it is alive
quitter     falls silent after its first checkpoint, and does not hear that it was abandoned
garbler     its checkpoints and results are not what they are said to be
greedy      its receipts are for twice the amount
equivocator signs two sheets under one number, again and again
accuser     says of each job that it faults
unsigning   a buyer that never countersigns
vanishing   a buyer that is gone for good with its first result
=========== ====================================================================================

All chance comes from the seed. ``run`` ends with fair weather, in which whatever is still open has
to come to its end; then ``check`` says what must hold. Its AssertionError names the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from p2pflop.errors import JobError, P2PFlopError
from p2pflop.job.spec import ROLE_STATE
from p2pflop.market.records import Receipt
from p2pflop.market.sheets import make_sheet
from p2pflop.node import messages as m
from p2pflop.node import sheets as sheets_module
from p2pflop.node.journal import PROVIDER
from p2pflop.node.memory_host import MemoryNetwork
from p2pflop.node.memory_market import (
    PRICE_NUSD,
    MemoryNode,
    Tamper,
    now_ns,
    sample_data,
    sample_file,
)
from p2pflop.node.memory_workers import CountingSession
from p2pflop.node.service import LAST_EVENT_KINDS, Json
from p2pflop.units import NS_PER_S
from p2pflop.wire import open_sealed, seal

SELLING_VILLAINS: Final = (
    *("mute", "fake", "quitter", "garbler", "greedy", "equivocator"),
    "accuser",
)
BUYING_VILLAINS: Final = ("unsigning", "vanishing")
UNPAID_VILLAINS: Final = frozenset({"mute", "fake", "garbler", "greedy", "accuser"})
"""Those that never deliver what verifies."""
LINKS: Final = 3
START_S: Final = 5.0
FAIR_S: Final = 60.0
"""Of fair weather with gossip, before nothing but what was begun goes on."""
END_S: Final = 3 * 3600.0
"""Virtual: past every deadline here, and the hour for which a provider waits for a signature."""
DEADLINES_S: Final = (300, 1800)
DOWN_S: Final = (0.5, 5.0, 40.0, 400.0)
NEXT: Final = bytes((byte + 1) % 256 for byte in range(256))
SMALL_FLOATS, LARGE_FLOATS = 4, 70_000
"""The blobs of a large job do not go along with messages."""


class QuickSession(CountingSession):
    """The same values, without a loop over each byte."""

    def step(self, number: int) -> None:
        """See CountingSession."""
        for param, memory in zip(self._work.params, self._slots, strict=True):
            if param.role == ROLE_STATE:
                memory[:] = memory.translate(NEXT)
        self._step = number
        self._last = dict.fromkeys(range(len(self._work.phases)), number)


class AccusingSession(QuickSession):
    """Says that the job is at fault."""

    def step(self, number: int) -> None:
        """See CountingSession."""
        raise JobError(f"the job's code faulted in step {number}")


@dataclass(frozen=True, slots=True)
class Errand:
    """A job that is bought in a world."""

    steps: int
    checkpoint_steps: int
    floats: int
    seed: int

    @property
    def file(self) -> bytes:
        """The job file."""
        return sample_file(self.steps, floats=self.floats, seed=self.seed)


ERRANDS: Final = (
    Errand(12, 4, SMALL_FLOATS, 1),
    Errand(40, 5, SMALL_FLOATS, 2),
    Errand(25, 0, SMALL_FLOATS, 3),
    Errand(9, 3, LARGE_FLOATS, 4),
)


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """Who is there, for how long things go wrong, and how often. Times are in seconds."""

    providers: int = 3
    buyers: int = 2
    villains: tuple[str, ...] = (*SELLING_VILLAINS, *BUYING_VILLAINS)
    errands: int = 3
    storm_s: float = 150.0
    delay_s: tuple[float, float] = (0.005, 0.1)
    goes_dark: float = 0.004
    gossip_loss: float = 0.05
    crash_every_s: float = 25.0
    partition_s: tuple[float, float] = (5.0, 40.0)


class Storm:
    """The weather of a world, while ``rages``."""

    def __init__(self, settings: WorldSettings, chance: random.Random) -> None:
        self.rages = True
        self.sides: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._chance = chance

    def reaches(self, one: str, other: str) -> bool:
        """See Weather."""
        return self.sides.get(one, 0) == self.sides.get(other, 0)

    def gossips(self, source: str, target: str) -> bool:
        """See Weather."""
        lost = self.rages and self._chance.random() < self._settings.gossip_loss
        return self.reaches(source, target) and not lost

    async def carries(self, source: str, target: str) -> bool:
        """See Weather."""
        self.counts["frames"] += 1
        await trio.sleep(self._chance.uniform(*self._settings.delay_s))
        is_lost = self.rages and self._chance.random() < self._settings.goes_dark
        self.counts["went dark"] += is_lost
        return self.reaches(source, target) and not is_lost


@dataclass
class Bought:
    """A submission of an honest buyer."""

    errand: Errand
    run_id: str
    max_nusd: int | None
    is_cancelled: bool = False
    end: Json = field(default_factory=dict)


class World:
    """A market of its own in ``folder``, with tasks in ``nursery``. ``session`` is what honest
    workers compute."""

    def __init__(
        self,
        folder: Path,
        nursery: trio.Nursery,
        seed: int,
        settings: WorldSettings,
        session: Callable[..., CountingSession] = QuickSession,
    ) -> None:
        self.seed = seed
        self.session = session
        self.settings = settings
        self.random = random.Random(seed)  # noqa: S311 - a simulation
        self.storm = Storm(settings, self.random)
        self.bought: dict[str, list[Bought]] = {}
        self.providers: list[MemoryNode] = []
        self.buyers: list[MemoryNode] = []
        self.villains: dict[str, MemoryNode] = {}
        self._folder = folder
        self._nursery = nursery
        self._storming: trio.Nursery
        self._network = MemoryNetwork(self.storm)
        self._began_ns = 0

    @property
    def honest(self) -> list[MemoryNode]:
        """Nodes that keep to the rules."""
        return self.providers + self.buyers

    @property
    def nodes(self) -> list[MemoryNode]:
        """Everybody."""
        return [*self.honest, *self.villains.values()]

    def failure(self, what: str) -> AssertionError:
        """An error that says how to see it again."""
        return AssertionError(f"{what}; replay with seed {self.seed} and {self.settings}")

    def settings_of(self, _price_nusd: int | None) -> dict[str, Any]:
        """What a node that asks this price is set to beside it, in a world that has more in it."""
        return {}

    def options(self) -> dict[str, Any]:
        """More of a submission, likewise."""
        return {}

    async def run(self, visit: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint) -> None:
        """Everything, to the end, and with it what ``visit`` does from the beginning on. Raises
        AssertionError."""
        self._began_ns = now_ns()
        await self._populate()
        async with trio.open_nursery() as visiting:
            visiting.start_soon(visit)
            await self._rage()
            await self._clear_up()
        await self._finish()

    async def _rage(self) -> None:
        async with trio.open_nursery() as nursery:
            self._storming = nursery
            for buyer in self.buyers:
                nursery.start_soon(self._shop, buyer)
            for kind in self.villains:
                if kind in BUYING_VILLAINS:
                    nursery.start_soon(self._shop_badly, self.villains[kind])
            if "equivocator" in self.villains:
                nursery.start_soon(self._equivocate, self.villains["equivocator"])
            nursery.start_soon(self._crash)
            nursery.start_soon(self._split)
            await trio.sleep(self.settings.storm_s)
            nursery.cancel_scope.cancel()

    # The storm

    async def _populate(self) -> None:
        for number in range(self.settings.providers):
            price_nusd = PRICE_NUSD * self.random.randrange(10, 20)
            self.providers.append(await self._open(f"provider-{number}", price_nusd))
        for number in range(self.settings.buyers):
            self.buyers.append(await self._open(f"buyer-{number}"))
        for kind in self.settings.villains:
            price_nusd = PRICE_NUSD * self.random.randrange(5, 15)
            is_seller = kind in SELLING_VILLAINS
            session = AccusingSession if kind == "accuser" else self.session
            node = await self._open(kind, price_nusd if is_seller else None, session)
            self.villains[kind] = node
            self._corrupt(node, kind)
        self._connect()
        await trio.sleep(START_S)

    async def _open(
        self,
        name: str,
        price_nusd: int | None = None,
        session: Callable[..., CountingSession] | None = None,
    ) -> MemoryNode:
        node = MemoryNode(
            self._network,
            self._folder / name,
            price_nusd=price_nusd,
            session=session or self.session,
            gossips=True,
            **self.settings_of(price_nusd),
        )
        node.workers.step_s = self.random.choice((0.02, 0.2, 1.0))
        await node.start(self._nursery)
        for floats in (SMALL_FLOATS, LARGE_FLOATS):
            for data in sample_data(floats):
                await node.store.put(data)
        return node

    def _connect(self) -> None:
        """Give everybody who is up a few neighbours."""
        up = [node for node in self.nodes if not node.down.is_set()]
        for node in up:
            for other in self.random.sample(up, min(LINKS, len(up))):
                if other is not node and self.storm.reaches(node.peer, other.peer):
                    node.host.link(other.host)

    async def _shop(self, buyer: MemoryNode) -> None:
        bought = self.bought.setdefault(buyer.peer, [])
        for _ in range(self.settings.errands):
            await trio.sleep(self.random.uniform(0, self.settings.storm_s / self.settings.errands))
            errand = self.random.choice(ERRANDS)
            max_nusd = self.random.choice((None, 10**12, 10**9, 1000))
            if buyer.down.is_set():
                continue
            run_id = f"{self.random.randrange(16**12):012x}"
            bought.append(Bought(errand, run_id, max_nusd))
            self._storming.start_soon(self._submit, buyer, bought[-1])

    async def _submit(self, buyer: MemoryNode, bought: Bought) -> None:
        # A node that loses power meanwhile never answers; the user asks again under the same id.
        await buyer.submit(
            bought.errand.file,
            run_id=bought.run_id,
            max_nusd=bought.max_nusd,
            deadline_s=self.random.choice(DEADLINES_S),
            checkpoint_steps=bought.errand.checkpoint_steps,
            fresh=True,
            **self.options(),
        )

    async def _crash(self) -> None:
        """Cut the power of honest nodes at writes that are about to come."""
        while True:
            await trio.sleep(self.random.expovariate(1 / self.settings.crash_every_s))
            for victim in self.random.sample(self.honest, self.random.choice((1, 1, 1, 2))):
                if not victim.down.is_set() and victim.cut_at is None:
                    victim.cut_at = victim.writes + self.random.randint(1, 12)
                    victim.cut_before = self.random.random() < 0.5
                    self._storming.start_soon(self._restore, victim, self.random.choice(DOWN_S))

    async def _restore(self, victim: MemoryNode, down_s: float) -> None:
        await victim.down.wait()
        self.storm.counts["power cuts"] += 1
        await trio.sleep(down_s)
        await self._start(victim)

    async def _start(self, node: MemoryNode) -> None:
        if node.down.is_set():
            node.cut_at = None
            await node.start(self._nursery)
            self._connect()

    async def _split(self) -> None:
        while True:
            await trio.sleep(self.random.uniform(*self.settings.partition_s))
            self.storm.sides = {node.peer: self.random.randrange(2) for node in self.nodes}
            self.storm.counts["partitions"] += 1
            for node in self.nodes:
                if not node.down.is_set():
                    for peer in [p for p in node.host.links if self._is_cut(node, p)]:
                        node.host.cut(peer)
            await trio.sleep(self.random.uniform(*self.settings.partition_s))
            self.storm.sides = {}
            self._connect()

    def _is_cut(self, node: MemoryNode, peer: str) -> bool:
        return not self.storm.reaches(node.peer, peer)

    # Villains

    def _corrupt(self, node: MemoryNode, kind: str) -> None:
        if kind == "mute":
            node.tamper_answered_sent = lambda _frame: []
        elif kind == "fake":
            node.tamper_answered_sent = _only(m.Filled, m.Refused, m.Heartbeat)
        elif kind == "quitter":
            node.tamper_answered_sent = _until_second(m.Checkpoint)
            node.tamper_answered_heard = _without(m.Abandoned)
        elif kind == "garbler":
            node.tamper_answered_sent = _with_other_blobs
        elif kind == "greedy":
            node.tamper_answered_sent = lambda frame: _doubled_amount(frame, node)
        elif kind == "unsigning":
            node.tamper_sent = _without(m.Countersigned)
        elif kind == "vanishing":
            node.tamper_heard = self._gone_with(node, m.Delivered)

    def _gone_with(self, node: MemoryNode, kind: type[m.Message]) -> Tamper:
        def tamper(frame: bytes) -> list[bytes]:
            if isinstance(m.decode_message(frame, ""), kind):
                self._nursery.start_soon(node.kill)
                return []
            return [frame]

        return tamper

    async def _shop_badly(self, villain: MemoryNode) -> None:
        while True:
            await trio.sleep(self.random.uniform(1, 30))
            if not villain.down.is_set():
                errand = self.random.choice(ERRANDS)
                with suppress(P2PFlopError):
                    await villain.submit(errand.file, fresh=True, deadline_s=DEADLINES_S[0])

    async def _equivocate(self, villain: MemoryNode) -> None:
        while True:
            await trio.sleep(self.random.uniform(5, 40))
            identity = villain.identity
            newest = await villain.sell()
            other = make_sheet(
                identity.node,
                number=newest.sheet.number,
                now_ns=now_ns(),
                delegation=identity.delegation(now_ns()),
                asks=(),
                network=identity.network,
            )
            await villain.host.publish(sheets_module.TOPIC, other.sealed.wire)

    # The end

    async def _clear_up(self) -> None:
        """Fair weather: everybody is back, but who has vanished for good."""
        self.storm.rages = False
        self.storm.sides = {}
        for node in self.honest:
            if node.cut_at is not None and not node.down.is_set():
                node.cut_at = None
            await self._start(node)
        self._connect()
        for buyer in self.buyers:
            for bought in self.bought[buyer.peer]:
                if not await buyer.runs.knows(bought.run_id):
                    await self._submit(buyer, bought)
        for _ in range(6):
            await trio.sleep(FAIR_S / 6)
            self._connect()
        for node in self.nodes:
            node.gossiping.cancel()

    async def _finish(self) -> None:
        for buyer in self.buyers:
            for bought in self.bought[buyer.peer]:
                with trio.move_on_after(END_S):
                    bought.end = await buyer.end_of(bought.run_id)
                if not bought.end:
                    card = buyer.runs.get(bought.run_id).card
                    raise self.failure(f"run {bought.run_id} has no end: {card}")
        for _ in range(12):
            await trio.sleep(END_S / 4)
            self._connect()
            if not any(node.journal.unfinished(PROVIDER) for node in self.providers):
                break

    async def close(self) -> None:
        """End every node."""
        for node in self.nodes:
            if not node.down.is_set():
                await node.kill()

    @property
    def losses(self) -> list[str]:
        """Why honest buyers have given providers up."""
        return [
            event["reason"]
            for buyer in self.buyers
            for bought in self.bought[buyer.peer]
            for event in buyer.events(bought.run_id, "resubmitted")
        ]

    def story(self) -> str:
        """What became of it, for who reads why a check has failed."""
        lines = [str(dict(self.storm.counts))]
        for buyer in self.buyers:
            for bought in self.bought[buyer.peer]:
                told = [bought.end.get(key) for key in ("kind", "cost_nusd", "hash", "message")]
                after_s = (bought.end.get("at_ns", 0) - self._began_ns) / NS_PER_S
                lines.append(f"{buyer.folder.name} {bought.errand} {told} after {after_s:.6f} s")
        return "\n".join((*lines, *self.losses))

    def check(self, hashes: Mapping[Errand, str]) -> None:
        """What must hold at the end; ``hashes`` are of unbroken runs. Raises AssertionError."""
        for provider in self.providers:
            if provider.seller.busy or provider.journal.unfinished(PROVIDER):
                raise self.failure(f"{provider.folder.name} has a sale without an end")
        for buyer in self.buyers:
            self._check_runs(buyer, hashes)
            self._check_costs(buyer)
        self.check_money()

    def check_money(self) -> None:
        """What must hold of all books at the end. Raises AssertionError."""
        for buyer in self.buyers:
            self._check_debts(buyer)
        for node in self.honest:
            booked = [(e["reference"], e["number"]) for e in node.ledger_book.report()["entries"]]
            if len(set(booked)) != len(booked):
                raise self.failure(f"{node.folder.name} has booked something twice")

    def _check_runs(self, buyer: MemoryNode, hashes: Mapping[Errand, str]) -> None:
        for bought in self.bought[buyer.peer]:
            end, name = bought.end, f"run {bought.run_id} of {buyer.folder.name}"
            if end["kind"] not in LAST_EVENT_KINDS:
                raise self.failure(f"{name} ended with {end}")
            if end["kind"] == "result":
                if end["hash"] != hashes[bought.errand]:
                    raise self.failure(f"{name} has another hash than the unbroken run")
                if bought.max_nusd is not None and end["cost_nusd"] > bought.max_nusd:
                    raise self.failure(f"{name} cost more than its limit")
            elif bought.is_cancelled and end["kind"] == "cancelled":
                continue
            elif end.get("error") not in ("ProviderError", "MarketError"):
                raise self.failure(f"{name} failed by no fault of others: {end}")

    def _check_debts(self, buyer: MemoryNode) -> None:
        for provider in self.nodes:
            owed = -buyer.ledger_book.due_nusd(provider.account)
            names = f"{buyer.folder.name} owes {provider.folder.name} {owed}"
            kind = provider.folder.name
            if kind in UNPAID_VILLAINS and owed:
                raise self.failure(f"{names}, who never delivered anything")
            if provider in self.honest and owed != provider.ledger_book.due_nusd(buyer.account):
                due = provider.ledger_book.due_nusd(buyer.account)
                raise self.failure(f"{names}, who books {due}")
        spent, owing_nusd = buyer.ledger_book.report()["entries"], self.owing_nusd(buyer)
        booked = sum(max(p["amount_nusd"], 0) for e in spent for p in e["postings"])
        if booked != owing_nusd:
            raise self.failure(f"{buyer.folder.name} booked {booked}, owes {owing_nusd}")

    def owing_nusd(self, buyer: MemoryNode) -> int:
        """What it owes to everybody."""
        return sum(-buyer.ledger_book.due_nusd(node.account) for node in self.nodes)

    def _check_costs(self, buyer: MemoryNode) -> None:
        owing_nusd = self.owing_nusd(buyer)
        costs = [b.end["cost_nusd"] for b in self.bought[buyer.peer] if b.end["kind"] == "result"]
        whole = len(costs) == len(self.bought[buyer.peer])
        if sum(costs) > owing_nusd or (whole and sum(costs) != owing_nusd):
            raise self.failure(f"{buyer.folder.name} owes {owing_nusd}, its results cost {costs}")


def _only(*kinds: type[m.Message]) -> Tamper:
    return lambda frame: [frame] if isinstance(m.decode_message(frame, ""), kinds) else []


def _without(kind: type[m.Message]) -> Tamper:
    return lambda frame: [] if isinstance(m.decode_message(frame, ""), kind) else [frame]


def _until_second(kind: type[m.Message]) -> Tamper:
    """Lets one of that kind pass, and of what comes after it heartbeats alone."""
    seen: list[bytes] = []

    def tamper(frame: bytes) -> list[bytes]:
        message = m.decode_message(frame, "")
        if isinstance(message, m.Filled):
            seen.clear()
        if isinstance(message, kind):
            seen.append(frame)
        return [] if len(seen) > 1 and not isinstance(message, m.Heartbeat) else [frame]

    return tamper


def _with_other_blobs(frame: bytes) -> list[bytes]:
    message = m.decode_message(frame, "")
    if isinstance(message, m.Checkpoint):
        wrong = tuple((address, data + b"!") for address, data in message.blobs)
        return [m.encode_message(m.Checkpoint(message.step, message.interval, wrong))]
    if isinstance(message, m.Delivered):
        wrong = tuple((address, data + b"!") for address, data in message.blobs)
        return [m.encode_message(m.Delivered(message.receipt, message.result, message.salt, wrong))]
    return [frame]


def _doubled_amount(frame: bytes, node: MemoryNode) -> list[bytes]:
    message = m.decode_message(frame, "")
    if isinstance(message, m.Receipted | m.Delivered):
        fields = open_sealed(Receipt, message.receipt, node.identity.network).record
        values = {name: getattr(fields, name) for name in Receipt.__struct_fields__}
        values["amount_nusd"] *= 2
        wire = seal(Receipt(**values), node.identity.node, node.identity.network).wire
        if isinstance(message, m.Receipted):
            return [m.encode_message(m.Receipted(wire))]
        return [m.encode_message(m.Delivered(wire, message.result, message.salt, message.blobs))]
    return [frame]


async def unbroken_hashes(folder: Path, nursery: trio.Nursery) -> dict[Errand, str]:
    """The result hash of each errand, where nothing goes wrong."""
    fair = WorldSettings(providers=1, buyers=1, villains=(), gossip_loss=0, goes_dark=0)
    world = World(folder, nursery, 0, fair)
    await world._populate()
    buyer, hashes = world.buyers[0], {}
    for errand in ERRANDS:
        run_id = await buyer.submit(errand.file, checkpoint_steps=errand.checkpoint_steps)
        hashes[errand] = str((await buyer.end_of(run_id))["hash"])
    await world.close()
    return hashes
