"""A registry behind a real HTTP port, in a thread of its own, for tests that speak to one."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from p2pflop.franchise.enrolments import make_form
from p2pflop.franchise.records import PersonalData, Schedule
from p2pflop.franchise.samples import GUIDELINES, YEAR_NS, key
from p2pflop.keys import PrivateKey
from p2pflop.node.api_server import bind_api, serve_api
from p2pflop.registry.api import create_app
from p2pflop.registry.founding import found_registry
from p2pflop.registry.office import Office, open_office
from p2pflop.registry.schema import FILE_NAME

FEE = 10**9
ROOT = key(900)
CONTACT = "Ada <ada@example.org>"

T = TypeVar("T")


def form(
    account: PrivateKey,
    *,
    contact: str = CONTACT,
    issuer: bytes = ROOT.public_key,
    guidelines: str = GUIDELINES,
) -> bytes:
    """An application of now."""
    personal = PersonalData(1, bytes(32), contact, "Kent")
    return make_form(account, issuer, guidelines, personal, time.time_ns())


class LiveRegistry:
    """Founded in ``folder`` if nothing is there, with a fee of ``fee_nusd`` for a year."""

    def __init__(
        self, folder: Path, *, fee_nusd: int = FEE, root: PrivateKey = ROOT, proxy: bool = False
    ) -> None:
        self.folder = folder
        self._fee_nusd = fee_nusd
        self._root = root
        self._proxy = proxy
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)

    def start(self) -> LiveRegistry:
        """Serve."""
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def stop(self) -> None:
        """End."""
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stopping.set, trio_token=self._token)
            self._thread.join(20)
        assert not self._thread.is_alive()

    def enrol(self, account: PrivateKey, paid_nusd: int = FEE) -> None:
        """An account that is enrolled, and attested if it paid."""

        async def work(office: Office) -> None:
            application = form(account, issuer=office.issuer, guidelines=office.guidelines())
            assert isinstance(await office.apply(application, "test"), bytes)
            await office.approve(account.public_key)
            if paid_nusd:
                await office.receive(account.public_key, paid_nusd, "1")

        self.do(work)

    def do(self, work: Callable[[Office], Awaitable[T]]) -> T:
        """Run async ``work`` where the office is."""
        return trio.from_thread.run(work, self._office, trio_token=self._token)

    async def _main(self) -> None:
        def schedule(issuer: bytes, now_ns: int) -> Schedule:
            return Schedule(1, issuer, 1, self._fee_nusd, YEAR_NS, 8, now_ns, GUIDELINES)

        self._token = trio.lowlevel.current_trio_token()
        self._stopping = trio.Event()
        if not (self.folder / FILE_NAME).exists():
            await found_registry(self.folder, self._root, "main", schedule, time.time_ns)
        listener = bind_api(0)
        async with open_office(self.folder) as office, trio.open_nursery() as nursery:
            self._office = office
            app = create_app(office, behind_proxy=self._proxy)
            await nursery.start(serve_api, app, listener, self._stopping)
            self.url = listener.url
            self._ready.set()
