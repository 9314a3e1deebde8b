"""A ``NodeService`` in memory: its runs follow a script and its store forgets everything.

It is what the API's and the client's tests talk to, and what a front end can be tried against
without a network, a sandbox or a compiler.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import trio

from p2pflop.dht.blobs import BlobInfo, Store, delete_own
from p2pflop.dht.memory import MemoryStore
from p2pflop.errors import BlobNotFoundError, ConfigError, JobError, MarketError
from p2pflop.job.variants import decode_variants
from p2pflop.market.evidence import Evidence
from p2pflop.node.runs import GATHER_S
from p2pflop.node.service import LAST_EVENT_KINDS, Json, SubmitOptions
from p2pflop.node.session_script import ScriptLine
from p2pflop.wire import encode


class MemoryRun:
    """A run whose events come from ``tell``."""

    def __init__(self, run_id: str, body: bytes, options: SubmitOptions) -> None:
        self.id = run_id
        self.body = body
        self.options = options
        self.record = b""
        self.events: list[Json] = []
        self.told = trio.Condition()

    @property
    def has_ended(self) -> bool:
        """Whether the last event has been told."""
        return bool(self.events) and self.events[-1]["kind"] in LAST_EVENT_KINDS

    async def tell(self, kind: str, **fields: object) -> None:
        """Append an event and wake who waits for it."""
        async with self.told:
            seq = len(self.events) + 1
            self.events.append({"seq": seq, "at_ns": seq, "kind": kind, **fields})
            self.told.notify_all()

    def line(self) -> Json:
        """The run as ``jobs`` lists it."""
        kind = self.events[-1]["kind"] if self.events else "new"
        return {"id": self.id, "title": "", "state": kind, "step": 0, "steps": 1} | {
            "end_state": kind if self.has_ended else ""
        }


class MemoryService:
    """See the head of this module. ``elsewhere`` is what peers would have: address to bytes.

    ``script`` is the events of every new run as ``(kind, fields)``; without it a run stands still
    until somebody calls ``runs[id].tell``.
    """

    def __init__(
        self,
        *,
        script: Sequence[tuple[str, Mapping[str, object]]] = (),
        record: bytes = b"",
        elsewhere: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.runs: dict[str, MemoryRun] = {}
        self.connected: list[str] = []
        self._store = MemoryStore()
        self._script = script
        self._record = record
        self._elsewhere = dict(elsewhere or {})
        self.money: dict[bytes, Json] = {}
        self.sold: list[Json] = []
        self.parts: list[Json] = []
        self.traded: list[Json] = []

    @property
    def store(self) -> Store:
        """The blobs, in memory."""
        return self._store

    async def status(self) -> Json:
        """See NodeService."""
        return {"peer": "12D3KooWMemory", "account": "00" * 32, "network": "memory"}

    async def submit(
        self, body: bytes, options: SubmitOptions, inputs: Sequence[bytes] = ()
    ) -> str:
        """Start a run that follows the script. An empty body is no job."""
        if not body:
            raise JobError("the job file is empty")
        for data in inputs:
            await self._store.put(data)
        run = MemoryRun(f"r-{len(self.runs) + 1}", body, options)
        run.record = self._record
        self.runs[run.id] = run
        for kind, fields in self._script:
            await run.tell(kind, **fields)
        return run.id

    async def submit_pack(self, body: bytes, options: SubmitOptions) -> Json:
        """Start a run that follows the script, for all variants."""
        variants = decode_variants(body)
        await self.submit(body, options)
        return {"known": [], "bought": len(variants.values)}

    async def unpack(self, run_id: str) -> list[Json]:
        """Nothing was computed."""
        self._run(run_id)
        return []

    async def quote(self, body: bytes, options: SubmitOptions) -> Json:
        """Nobody sells here."""
        del options
        if not body:
            raise JobError("the job file is empty")
        return {"deals": [], "misses": [{"provider": "12D3KooWMemory", "reason": "sells nothing"}]}

    async def jobs(self, *, parts: bool = False) -> list[Json]:
        """See NodeService."""
        lines = [run.line() for run in reversed(self.runs.values())]
        return [*self.parts, *lines] if parts else lines

    async def sales(self) -> list[Json]:
        """See NodeService."""
        return self.sold

    async def job(self, run_id: str) -> Json:
        """See NodeService."""
        return self._run(run_id).line()

    async def job_file(self, run_id: str) -> bytes:
        """See NodeService."""
        return self._run(run_id).body

    async def result_record(self, run_id: str) -> bytes:
        """See NodeService."""
        run = self._run(run_id)
        if not run.record:
            raise ConfigError(f"run {run_id} has no result yet")
        return run.record

    async def evidence(self, run_id: str) -> bytes:
        """Nothing was decided."""
        self._run(run_id)
        return encode(Evidence(2, "memory", ()))

    async def events(self, run_id: str, after_seq: int) -> AsyncIterator[list[Json]]:
        """See NodeService."""
        run = self._run(run_id)
        seen = after_seq
        while not (run.has_ended and seen >= len(run.events)):
            async with run.told:
                while len(run.events) <= seen:
                    await run.told.wait()
            if not run.has_ended:
                await trio.sleep(GATHER_S)
            events = run.events[seen:]
            seen += len(events)
            yield events

    async def session(self, line: ScriptLine) -> None:
        """Tell whoever wants a session that there is none to be had."""
        await line.receive()
        raise MarketError("the order book is empty")

    async def cancel(self, run_id: str) -> None:
        """See NodeService."""
        run = self._run(run_id)
        if not run.has_ended:
            await run.tell("cancelled")

    async def book(self) -> list[Json]:
        """Empty."""
        return []

    async def wishes(self) -> list[Json]:
        """Nobody's."""
        return []

    async def market(self) -> Json:
        """Nothing is asked, and of trades only the classes are told."""
        named = sorted({trade["class_id"] for trade in self.traded})
        take = {"fills": 0, "paid_nusd": 0, "got_nusd": 0, "take_nusd": 0}
        return {"classes": [{"class_id": each} for each in named], "take": take}

    async def trades(self, since_ns: int) -> list[Json]:
        """Of ``traded``."""
        return [trade for trade in self.traded if trade["hour_ns"] >= since_ns]

    async def trade_events(self, after_seq: int) -> AsyncIterator[list[Json]]:
        """``traded`` as events, then silence."""
        events = [{"seq": seq, "kind": "trade", **t} for seq, t in enumerate(self.traded, 1)]
        yield events[after_seq:]
        await trio.sleep_forever()

    async def peers(self) -> list[Json]:
        """Whoever ``connect`` was asked for."""
        return [{"peer": multiaddr} for multiaddr in self.connected]

    async def ledger(self) -> Json:
        """Nobody owes anything."""
        return {"owed_nusd": 0, "owing_nusd": 0, "balances": [], "entries": [], "entry_count": 0}

    async def statement(self, account: bytes, since_ns: int) -> Json:
        """Nothing was booked."""
        return {
            "account": account.hex(),
            "own_account": "00" * 32,
            "since_ns": since_ns,
            "since": "",
            "opening_nusd": 0,
            "entries": [],
            "closing_nusd": 0,
            "head": "00" * 32,
        }

    async def payments(self) -> list[Json]:
        """See NodeService."""
        return list(self.money.values())

    async def pay(self, payment: bytes, account: bytes, amount_nusd: int, reference: str) -> Json:
        """Nobody is told."""
        return self._note(payment, "paid", account, amount_nusd, reference, "claimed")

    async def receive(
        self, payment: bytes, account: bytes, amount_nusd: int, reference: str
    ) -> Json:
        """Nobody is told."""
        return self._note(payment, "received", account, amount_nusd, reference, "acknowledged")

    async def acknowledge(self, payment: bytes) -> Json:
        """See NodeService."""
        return self._answer(payment, "acknowledged", "")

    async def refuse(self, payment: bytes, reason: str) -> Json:
        """See NodeService."""
        return self._answer(payment, "refused", reason)

    async def connect(self, multiaddr: str) -> Json:
        """See NodeService."""
        self.connected.append(multiaddr)
        return {"peer": multiaddr}

    async def find_blob(self, address: bytes, *, timeout_s: float) -> BlobInfo:
        """See NodeService."""
        info = await self._store.stat(address)
        if info is not None:
            return info
        if address not in self._elsewhere:
            raise BlobNotFoundError(f"no blob {address.hex()} within {timeout_s:.0f} s")
        return await self._store.put(self._elsewhere[address])

    async def set_public(self, address: bytes) -> None:
        """See NodeService."""
        await self._store.set_public(address)

    async def delete_blob(self, address: bytes) -> BlobInfo:
        """See NodeService."""
        return await delete_own(self._store, address)

    async def doctor(self) -> Json:
        """All is well."""
        return {"problems": []}

    def _note(
        self,
        payment: bytes,
        side: str,
        account: bytes,
        amount_nusd: int,
        reference: str,
        state: str,
    ) -> Json:
        told = {
            "id": payment.hex(),
            "side": side,
            "account": account.hex(),
            "amount_nusd": amount_nusd,
            "at_ns": 0,
            "reference": reference,
            "state": state,
            "reason": "",
            "told": False,
            "trouble": "",
        }
        return self.money.setdefault(payment, told)

    def _answer(self, payment: bytes, state: str, reason: str) -> Json:
        if payment not in self.money:
            raise ConfigError(f"nobody has claimed a payment {payment.hex()} here")
        self.money[payment] |= {"state": state, "reason": reason}
        return self.money[payment]

    def _run(self, run_id: str) -> MemoryRun:
        run = self.runs.get(run_id)
        if run is None:
            raise ConfigError(f"no run {run_id!r}", hint="See 'p2pflop jobs'.")
        return run
