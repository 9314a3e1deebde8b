"""Blocking code in a simulation: its threads run one at a time, between two moments of the clock.

What a user's script calls (``pf.map``, ``Client``) blocks and has threads of its own. Here each of
them is a **puppet**: a thread that runs only while the event loop stands still, up to where it
would block; then it says what it waits for, and a task of the loop does that, in virtual time. So
there is one order of everything, and a seed replays it. ``Lockstep`` stands in for the modules
``threading`` and ``time``, ``AppLine`` for the line to a node, whose API is the real one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, cast

import trio

from p2pflop.embedded import NodeNote
from p2pflop.errors import StoreError
from p2pflop.line import PIECE_BYTES, Answer, LineError, NobodyThereError, Request
from p2pflop.node.api import create_app
from p2pflop.node.daemon import Daemon
from p2pflop.node.memory_market import EPOCH_NS, MemoryNode, PowerCutError
from p2pflop.units import NS_PER_S
from tests.lines import content_of

T = TypeVar("T")
STUCK_S: Final = 60.0
"""Of real time: a puppet that does not come to a halt would stop the world."""
PORT: Final = 9
TOKEN: Final = "t0ken"


class UnwoundError(BaseException):
    """The simulation is over: a puppet ends where it waits."""


class Lockstep:
    """The puppets of one simulation, and what their code takes for ``threading`` and ``time``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.wakes: list[trio.Event] = []
        self._births: list[Puppet[None]] = []
        self._local = threading.local()
        self._clock = trio.lowlevel.current_clock()

    async def run(self, work: Callable[[], T]) -> T:
        """Run blocking code as a puppet of its own."""
        return await Puppet(self, work).live()

    def enter(self, puppet: Puppet[Any]) -> None:
        """Called in a puppet's thread."""
        self._local.puppet = puppet

    @property
    def puppet(self) -> Puppet[Any] | None:
        """Whose thread this is."""
        return getattr(self._local, "puppet", None)

    def park(self, wait: Callable[[], Awaitable[T]]) -> T:
        """In a puppet: have the loop await ``wait()``; its value, or what it raised."""
        puppet = self.puppet
        assert puppet is not None, "only a puppet waits"
        return cast(T, puppet.park(wait))

    def settle(self) -> None:
        """Called in the loop when a puppet has come to a halt: wake and start whom it named."""
        wakes, self.wakes = self.wakes, []
        births, self._births = self._births, []
        for event in wakes:
            event.set()
        for puppet in births:
            self.nursery.start_soon(puppet.live)

    def born(self, puppet: Puppet[None]) -> None:
        """A thread of a puppet was started."""
        self._births.append(puppet)

    # As ``threading`` and ``time``

    def Thread(self, *, target: Callable[[], None], **_: object) -> LockstepThread:  # noqa: N802
        """See threading."""
        return LockstepThread(self, target)

    def Condition(self) -> LockstepCondition:  # noqa: N802 - likewise
        """See threading."""
        return LockstepCondition(self)

    def Lock(self) -> LockstepLock:  # noqa: N802 - likewise
        """See threading."""
        return LockstepLock(self)

    def monotonic(self) -> float:
        """See time."""
        return self._clock.current_time()

    def time_ns(self) -> int:
        """See time."""
        return EPOCH_NS + int(self._clock.current_time() * NS_PER_S)

    def sleep(self, seconds: float) -> None:
        """See time."""
        self.park(partial(trio.sleep, seconds))


class Puppet(Generic[T]):
    """One thread."""

    def __init__(self, lockstep: Lockstep, work: Callable[[], T]) -> None:
        self.ended = trio.Event()
        self._lockstep = lockstep
        self._work = work
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._wait: Callable[[], Awaitable[Any]] | None = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._result: T | None = None
        self._fault: BaseException | None = None
        self._unwinding = False

    async def live(self) -> T:
        """Its task in the loop: does what it waits for, until it ends."""
        thread = threading.Thread(target=self._main, daemon=True)
        thread.start()
        try:
            while self._step():
                assert self._wait is not None
                self._answer = self._error = None
                try:
                    self._answer = await self._wait()
                except Exception as error:  # noqa: BLE001 - it is the puppet's to handle
                    self._error = error
        except BaseException:
            self._unwinding, self._error = True, UnwoundError()
            self._step()
            raise
        finally:
            thread.join(STUCK_S)
            self.ended.set()
        if self._fault is not None:
            raise self._fault
        return cast(T, self._result)

    def park(self, wait: Callable[[], Awaitable[Any]]) -> Any:
        """In its own thread."""
        if self._unwinding:
            raise UnwoundError
        self._wait = wait
        self._halted.release()
        self._go.acquire()
        if self._error is not None:
            raise self._error
        return self._answer

    def _step(self) -> bool:
        """In the loop: let it run up to where it waits; whether it goes on after that."""
        self._wait = None
        self._go.release()
        assert self._halted.acquire(timeout=STUCK_S), "a puppet hangs"
        self._lockstep.settle()
        return self._wait is not None

    def _main(self) -> None:
        self._go.acquire()
        self._lockstep.enter(self)
        try:
            self._result = self._work()
        except UnwoundError:
            pass
        except BaseException as fault:  # noqa: BLE001 - raised in the loop
            self._fault = fault
        self._wait = None
        self._halted.release()


class LockstepThread:
    """A ``threading.Thread`` that is a puppet."""

    def __init__(self, lockstep: Lockstep, target: Callable[[], None]) -> None:
        self._lockstep = lockstep
        self._puppet = Puppet(lockstep, target)

    def start(self) -> None:
        """See threading."""
        self._lockstep.born(self._puppet)

    def join(self, timeout: float | None = None) -> None:
        """See threading."""

        async def wait() -> None:
            with trio.move_on_after(math.inf if timeout is None else timeout):
                await self._puppet.ended.wait()

        self._lockstep.park(wait)


class LockstepCondition:
    """A ``threading.Condition``: nobody else runs meanwhile, so it locks nothing."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._waiting: list[trio.Event] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def wait(self, timeout: float | None = None) -> None:
        """See threading."""
        event = trio.Event()
        self._waiting.append(event)

        async def wait() -> None:
            with trio.move_on_after(math.inf if timeout is None else timeout):
                await event.wait()

        self._lockstep.park(wait)

    def notify_all(self) -> None:
        """See threading."""
        self._lockstep.wakes += self._waiting
        self._waiting.clear()


class LockstepLock(LockstepCondition):
    """A ``threading.Lock`` that is held while its puppet waits for something else."""

    _is_held = False

    def __enter__(self) -> None:
        while self._is_held:
            self.wait()
        self._is_held = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_held = False
        self.notify_all()


class AppLine:
    """Requests of puppets to the API of ``node``; refused while it is down, broken off when it
    dies."""

    def __init__(self, lockstep: Lockstep, node: MemoryNode) -> None:
        self._lockstep = lockstep
        self._node = node

    def __call__(self, _: NodeNote) -> AppLine:
        """The line to the node of a note."""
        return self

    def ask(self, request: Request) -> Answer:
        """See Line."""
        exchange = self._lockstep.park(lambda: self._begin(request, content_of(request)))
        return _AppAnswer(self._lockstep, exchange)

    def close(self) -> None:
        """See Line."""

    async def _begin(self, request: Request, content: bytes) -> _Exchange:
        if self._node.down.is_set():
            raise NobodyThereError("nobody listens there")
        exchange = _Exchange(self._node, request, content)
        self._lockstep.nursery.start_soon(exchange.run)
        await exchange.begun.wait()
        if not exchange.status:
            raise LineError("the node is gone")
        return exchange


class _Exchange:
    """One request, answered by the API's application."""

    def __init__(self, node: MemoryNode, request: Request, content: bytes) -> None:
        self.begun = trio.Event()
        self.request = request
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_broken = True
        self.scope = trio.CancelScope()
        self._node = node
        self._content: bytes | None = content
        self._put, self._take = trio.open_memory_channel[bytes](math.inf)

    async def run(self) -> None:
        """Until the answer is whole, nobody wants it any more, or the node is down."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, self._node.down)
                    app = create_app(_service(self._node), TOKEN, PORT)
                    await app(self._asked(), self._receive, self._send)
                    nursery.cancel_scope.cancel()
        except* (PowerCutError, StoreError):
            assert self._node.is_dying, "else the API tells the error"
        finally:
            self._put.close()
            self.begun.set()

    async def next(self) -> bytes | None:
        """Some of the body, or None at its end. Raises LineError if it broke off."""
        try:
            return await self._take.receive()
        except trio.EndOfChannel:
            if self.is_broken:
                raise LineError("the node is gone") from None
            return None

    async def _watch(self, down: trio.Event) -> None:
        await down.wait()
        self.scope.cancel()

    def _asked(self) -> dict[str, Any]:
        path, _, query = self.request.target.encode().partition(b"?")
        headers = {"host": f"127.0.0.1:{PORT}", "authorization": f"Bearer {TOKEN}"}
        headers |= self.request.headers
        if self._content is not None:
            headers["content-length"] = str(len(self._content))
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.request.method,
            "path": path.decode(),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "server": ("127.0.0.1", PORT),
            "client": ("127.0.0.1", 1),
        }

    async def _receive(self) -> dict[str, Any]:
        if self._content is None:
            await trio.sleep_forever()
        content, self._content = self._content, None
        return {"type": "http.request", "body": content, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self._node.is_dying:
            await trio.sleep_forever()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            self.begun.set()
            return
        if body := message.get("body", b""):
            self._put.send_nowait(body)
        self.is_broken = message.get("more_body", False)
        await trio.lowlevel.checkpoint()


class _AppAnswer:
    url = f"http://127.0.0.1:{PORT}/"

    def __init__(self, lockstep: Lockstep, exchange: _Exchange) -> None:
        self.request = exchange.request
        self.status = exchange.status
        self._lockstep = lockstep
        self._exchange = exchange

    def header(self, name: str) -> str:
        return self._exchange.headers.get(name, "")

    def pieces(self, size_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        while (part := self._lockstep.park(self._exchange.next)) is not None:
            for start in range(0, len(part), size_bytes):
                yield part[start : start + size_bytes]

    def close(self) -> None:
        if self._lockstep.puppet is None:
            return  # collected as garbage: the exchange ends by itself

        async def end() -> None:
            self._exchange.scope.cancel()
            await trio.lowlevel.checkpoint()

        self._lockstep.park(end)


def _service(node: MemoryNode) -> Daemon:
    """The node as its API sees it; of what that needs, all that a buyer's requests use."""
    nothing = cast(Any, None)
    return Daemon(
        settings=node.settings,
        home=nothing,
        identity=node.identity,
        url="",
        store=node.store,
        network=cast(Any, node.host),
        dialer=node.dialer,
        announcer=nothing,
        workers=node.workers,
        sheets=node.sheets,
        tape=node.tape,
        runs=node.runs,
        ledger_book=node.ledger_book,
        buyer=node.buyer,
        seller=node.seller,
        money=node.money,
        franchise=node.franchise,
    )
