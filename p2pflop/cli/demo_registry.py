"""The registry of the demo: a real one in a process of its own, and what its operator decides."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from p2pflop.errors import P2PFlopError, VerificationError
from p2pflop.units import NS_PER_S

FEE_NUSD: Final = NS_PER_S
PERIOD_NS: Final = 365 * 24 * 3600 * NS_PER_S
GUIDELINES: Final = "1"
SLOTS: Final = 8
APPLIED_S: Final = 30.0
POLL_S: Final = 0.05
STOP_S: Final = 10.0


class DemoRegistry:
    """Its home is the folder of ``log``. ``address`` is ``KEY@URL`` once it was started."""

    def __init__(self, log: Path) -> None:
        self.address = ""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _folder(self) -> Path:
        from p2pflop.registry.home import folder_of

        return folder_of(self._log.parent)

    def start(self, timeout_s: float) -> str:
        """Found it and serve it; its address. Raises P2PFlopError if it does not come up."""
        import trio

        from p2pflop.embedded import failure_of
        from p2pflop.franchise.records import Schedule
        from p2pflop.registry.founding import found_registry
        from p2pflop.registry.home import make_root

        def schedule(issuer: bytes, now_ns: int) -> Schedule:
            return Schedule(1, issuer, 1, FEE_NUSD, PERIOD_NS, SLOTS, now_ns, GUIDELINES)

        root = make_root(self._log.parent / "root.pem")
        trio.run(found_registry, self._folder, root, "main", schedule, time.time_ns)
        told = self._log.with_suffix(".json")
        process = self._serve(told)
        deadline = time.monotonic() + timeout_s
        while not (line := told.read_bytes()).endswith(b"\n"):
            code = process.poll()
            if code is not None or time.monotonic() > deadline:
                raise failure_of("the registry", code or 0, self._log)
            time.sleep(POLL_S)
        started = json.loads(line)
        self.address = f"{started['issuer']}@{started['url']}"
        return self.address

    def _serve(self, told: Path) -> subprocess.Popen[bytes]:
        home = str(self._log.parent.absolute())
        command = [sys.executable, "-m", "p2pflop.cli.main", "registry", "serve", "--home", home]
        command += ["--json", "--tied", "--port", "0"]
        with told.open("wb") as out, self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True
            )
        return self._process

    def enrol(self, accounts: Mapping[str, bool]) -> None:
        """Wait until these accounts have applied, and enrol them; True: and book their fee.

        Raises P2PFlopError if one does not apply.
        """
        import trio

        trio.run(self._enrol, accounts)

    async def _enrol(self, accounts: Mapping[str, bool]) -> None:
        import trio

        from p2pflop.registry.office import open_office
        from p2pflop.registry.views import member_view

        async with open_office(self._folder) as office:
            for text, has_paid in accounts.items():
                account = bytes.fromhex(text)
                deadline = trio.current_time() + APPLIED_S
                while member_view(office, account) is None:
                    if trio.current_time() > deadline:
                        raise P2PFlopError(f"account {text[:12]} did not apply to the registry")
                    await trio.sleep(POLL_S)
                await office.approve(account)
                if has_paid:
                    await office.receive(account, FEE_NUSD, text)

    def book_fee(self, text: str) -> None:
        """What the operator does when the fee of an account has come."""
        import trio

        from p2pflop.registry.office import open_office

        async def book() -> None:
            async with open_office(self._folder) as office:
                await office.receive(bytes.fromhex(text), FEE_NUSD, text)

        trio.run(book)

    def verify(self) -> int:
        """Check its whole log from outside; the number of leaves. Raises VerificationError."""
        from p2pflop.registry.audit import Forked, HttpSource, audit, parse_address

        key, url = parse_address(self.address)
        found = audit(HttpSource(url), key, self._log.parent, time.time_ns())
        if isinstance(found, Forked):
            raise VerificationError("the registry has shown two histories of its log")
        return found.head.record.size

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()
