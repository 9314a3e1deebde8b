"""The market of the demo: a registry and nodes, begun afresh, and ended with it whatever ends it.

Their homes keep nothing from one demo to the next but the plan caches: with journals and ledgers of
earlier demos, of which some were broken off, the books of two nodes could not be compared.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from p2pflop.cli.demo_registry import FEE_NUSD, GUIDELINES, DemoRegistry
from p2pflop.cli.output import say
from p2pflop.errors import ConfigError
from p2pflop.units import format_usd

START_S: Final = 90.0
STOP_S: Final = 10.0
POLL_S: Final = 0.05
LOG_NAME: Final = "demo.log"
KEPT: Final = frozenset({"plans", "lock", LOG_NAME})
UNPAID: Final = "cheap"
"""Which of the providers does not pay its fee before it is told to."""
PROVIDERS: Final = {UNPAID: "0.01", "fair": "0.04", "dear": "0.12"}
"""What they ask for a PFLOP, in dollars."""
ENROL: Final = ("--enroll", "--agree", GUIDELINES, "--contact", "demo@localhost")


@dataclass(slots=True)
class DemoNode:
    """A node in a process of its own."""

    name: str
    home: Path
    process: subprocess.Popen[bytes]
    command: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """What it says."""
        return self.home / LOG_NAME

    @property
    def account(self) -> str:
        """The account that it is a node of."""
        return str((self.note() or {})["account"])

    def kill(self) -> None:
        """End it with -9, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """Start it anew on its home, once it has ended; return when it answers."""
        self.process = _open(self.command, self.log)
        _wait_ready(self)

    def note(self) -> dict[str, Any] | None:
        """Where it listens, once it does."""
        with suppress(OSError, ValueError):
            note: dict[str, Any] = json.loads((self.home / "node.json").read_text())
            if note["pid"] == self.process.pid:
                return note
        return None


@dataclass(frozen=True, slots=True)
class Market:
    """Everybody who takes part in the demo."""

    registry: DemoRegistry
    buyer: DemoNode
    providers: list[DemoNode]

    @property
    def unpaid(self) -> DemoNode:
        """The provider that begins without an attestation."""
        return next(node for node in self.providers if node.name == UNPAID)

    def everybody_pays_but_one(self) -> None:
        """Wait for the applications, enrol all, and book the fees of all but one."""
        self.registry.enrol({node.account: node.name != UNPAID for node in self.providers})


@contextmanager
def open_market(folder: Path) -> Iterator[Market]:
    """Start a registry, a buyer that trusts it, then three providers that know the buyer and apply
    to the registry; end them, whatever happens.

    Raises HomeLockedError if a node runs on one of their homes, ConfigError if a home is not a
    demo's, and the error that a node ended with.
    """
    nodes: list[DemoNode] = []
    with _signals_as_interrupt():
        for name in ("registry", "buyer", *PROVIDERS):
            freshen(folder / name)
        registry = DemoRegistry(folder / "registry" / LOG_NAME)
        try:
            say("Starting a registry and four nodes on loopback...")
            trusted = ("--registry", registry.start(START_S))
            buyer = _start(nodes, folder / "buyer", "buyer", trusted)
            address = str(_wait_ready(buyer)["address"])
            for name, usd in PROVIDERS.items():
                flags = (*trusted, *ENROL, "--ask", usd, "--connect", address)
                _start(nodes, folder / name, name, flags)
            for node in nodes[1:]:
                _wait_ready(node)
            say(f"The fee is {format_usd(FEE_NUSD)}; all deal only with who has paid it.")
            yield Market(registry, buyer, nodes[1:])
        finally:
            try:
                _stop(nodes)
            finally:
                registry.stop()


def freshen(home: Path) -> None:
    """Make an empty home, but for the plan cache that an earlier demo has left there.

    Raises HomeLockedError if a node runs there, ConfigError if it is not a home of a demo.
    """
    from p2pflop.cli.embedded import end_embedded
    from p2pflop.node.home import held

    end_embedded(home)
    with held(home):
        old = [path for path in home.iterdir() if path.name not in KEPT]
        if old and not (home / LOG_NAME).exists():
            raise ConfigError(
                f"{home} is not of a demo, which would delete its account and its data",
                hint="Choose another folder for the demo with --home.",
            )
        try:
            for path in old:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise ConfigError(f"cannot delete what is in {home}: {error.strerror}") from error


def _start(nodes: list[DemoNode], home: Path, name: str, flags: tuple[str, ...]) -> DemoNode:
    command = [sys.executable, "-m", "p2pflop.cli.main", "node", "--home", str(home.absolute())]
    command += ["--json", "--tied", "--port", "0", "--listen", "/ip4/127.0.0.1/tcp/0", *flags]
    node = DemoNode(name, home, _open(command, home / LOG_NAME), tuple(command))
    nodes.append(node)
    return node


def _open(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        # A session of its own: Ctrl-C reaches this program alone, which then ends all in order.
        return subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )


def _wait_ready(node: DemoNode) -> dict[str, Any]:
    """The note of a node that answers, with the address that others connect to."""
    from p2pflop.client import Client
    from p2pflop.embedded import failure_of

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        code = node.process.poll()
        if code is not None:
            raise failure_of(f"node '{node.name}'", code, node.log)
        if (note := node.note()) is not None:
            with Client(node.home) as client:
                return note | {"address": client.status()["addresses"][0]}
        time.sleep(POLL_S)
    raise ConfigError(f"'{node.name}' did not start in {START_S:.0f} s; see {node.log}")


def _stop(nodes: list[DemoNode]) -> None:
    for node in nodes:
        if node.process.poll() is None:
            node.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_S
    for node in nodes:
        try:
            node.process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            node.process.kill()
            node.process.wait()


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that was closed, do what Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
