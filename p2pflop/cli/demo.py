"""``p2pflop demo``: the whole market on one machine, with real nodes and real data.

Four node processes on loopback, a buyer and three providers, one of them too small for the job. A
digit classifier is traced, bought, trained, fetched by its hash over plain HTTP, evaluated, and run
again locally to compare the hash. Nothing is shown that was not just measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import click

from p2pflop.cli.output import Flags, common_options, print_json, say, short
from p2pflop.errors import ConfigError, P2PFlopError, VerificationError
from p2pflop.units import format_bytes, format_flop, format_usd

SCRIPT: Final = Path("examples") / "digits.py"
HOME: Final = Path(".demo")
START_S: Final = 90.0
BOOK_S: Final = 30.0
STOP_S: Final = 10.0
POLL_S: Final = 0.05
MIN_ACCURACY: Final = 0.95
PROVIDERS: Final = {
    "tiny": ("--ask", "0.01", "--memory", "256MiB"),
    "fair": ("--ask", "0.04"),
    "dear": ("--ask", "0.12"),
}


@click.command("demo")
@click.option(
    "--script",
    type=click.Path(path_type=Path),
    default=SCRIPT,
    show_default=True,
    help="The program to trace.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed [default: a fresh one].")
@common_options
@click.pass_obj
def demo_command(flags: Flags, script: Path, seed: int | None) -> int:
    """Train a digit classifier between four nodes on this machine.

    The nodes live in the folder .demo of the current directory (or --home), which keeps their plan
    caches, so that a second run skips lowering. Nothing leaves this machine.

    \b
    Examples:
      p2pflop demo              from a clone of the repository
      p2pflop demo --seed 1     the same weights every time
    """
    program = _load(script)
    home = Path(flags.home) if flags.home else HOME
    seed = secrets.randbelow(2**32) if seed is None else seed
    began = time.monotonic()
    with _four_nodes(home.absolute()) as (buyer, providers):
        report = _trade(program, seed, buyer, providers, as_json=flags.json)
    report["seconds"] = round(time.monotonic() - began, 1)
    if flags.json:
        print_json(report)
    else:
        say(f"\nAll of it took {report['seconds']} s; the four nodes have ended.")
    return 0


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    home: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        return self.home / "demo.log"

    def note(self) -> dict[str, Any] | None:
        """Where it listens, once it does."""
        with contextlib.suppress(OSError, ValueError):
            note: dict[str, Any] = json.loads((self.home / "node.json").read_text())
            if note["pid"] == self.process.pid:
                return note
        return None


def _trade(
    program: ModuleType, seed: int, buyer: _Node, providers: list[_Node], *, as_json: bool
) -> dict[str, Any]:
    import p2pflop as pf
    from p2pflop.cli.progress import RunView
    from p2pflop.client import Client

    with Client(buyer.home) as client:
        names = _wait_for_book(client, providers)
        job = program.make_job(seed=seed)
        cost = job.cost
        say(
            f"\n{job.file.labels.title}: {format_bytes(job.size_bytes)} of graphs, "
            f"{job.steps} steps, {format_flop(cost.flop)}, "
            f"touches {format_bytes(cost.touched_bytes)}, seed {seed}\n"
        )
        run = pf.submit(job, max_usd="0.01", client=client)
        result_event: dict[str, Any] = {}
        with RunView() as view:
            for event in run.events():
                if not as_json:
                    view.show(event)
                if event["kind"] == "result":
                    result_event = event
        result = run.result()
        winner = names[result_event["provider"]]
        say(f"\nThe cheapest that can, '{winner.name}', has run it.")
        ledgers = _show_ledgers(client, winner)
        accuracy = _fetch_and_evaluate(program, client, result_event)
        say("\nRunning the same job here, without a market, to compare...")
        local = job.run_local()
        if local.hash != result.hash:
            raise VerificationError(f"the local run gave {local.hash}, the provider {result.hash}")
        say(f"Same hash: {local.hash}")
        return {
            "hash": result.hash,
            "local_hash": local.hash,
            "accuracy": accuracy,
            "provider": winner.name,
            "job_bytes": job.size_bytes,
            **ledgers,
        }


def _wait_for_book(client: Any, providers: list[_Node]) -> dict[str, _Node]:
    """Wait until every node's book shows every provider; who is who by peer id."""
    from p2pflop.client import Client

    names = {str(note["peer"]): node for node in providers if (note := node.note())}
    clients = [client, *(Client(node.home) for node in providers)]
    deadline = time.monotonic() + BOOK_S
    for each in clients:
        while {ask["provider"] for ask in each.book()} != set(names):
            if time.monotonic() > deadline:
                raise P2PFlopError(f"not every book shows three sheets after {BOOK_S:.0f} s")
            time.sleep(POLL_S)
    for each in clients[1:]:
        each.close()
    say("Every book shows three sheets:")
    for ask in client.book():
        node = names[ask["provider"]]
        price, memory = format_usd(ask["price_nusd"]), format_bytes(ask["memory_bytes"])
        say(f"  {node.name}  {short(ask['provider'])}  {price} a PFLOP, {memory} of memory")
    return names


def _show_ledgers(client: Any, winner: _Node) -> dict[str, Any]:
    """The same amount in both books: what the buyer owes is what the provider is owed."""
    from p2pflop.client import Client

    with Client(winner.home) as theirs:
        note = winner.note() or {}
        ours_owed = _due(client.ledger(), str(note["account"]))
        deadline = time.monotonic() + BOOK_S
        while (due := _due(theirs.ledger(), str(client.status()["account"]))) != -ours_owed:
            if time.monotonic() > deadline:
                raise VerificationError(f"the ledgers differ: {-ours_owed} and {due} nano-dollars")
            time.sleep(POLL_S)
    say(f"Buyer's ledger: owes {winner.name} {format_usd(-ours_owed)} (over all runs so far).")
    say(f"{winner.name}'s ledger: is owed {format_usd(due)} by the buyer.")
    return {"owed_nusd": due}


def _due(ledger: dict[str, Any], account: str) -> int:
    return next((int(b["due_nusd"]) for b in ledger["balances"] if b["account"] == account), 0)


def _fetch_and_evaluate(program: ModuleType, client: Any, event: dict[str, Any]) -> float:
    """Get the weights by hash with plain HTTP, and evaluate them on held-out digits."""
    import httpx
    import numpy as np

    url = str(client.status()["url"])
    weights = {}
    total = 0
    for name, tensor in event["state"].items():
        if not name.startswith("net."):
            continue
        answer = httpx.get(f"{url}/blob/{tensor['address']}", timeout=60)
        answer.raise_for_status()
        total += len(answer.content)
        weights[name] = np.frombuffer(answer.content, tensor["dtype"]).reshape(tensor["shape"])
    example = event["state"][next(iter(weights))]["address"]
    say(f"\nFetched {len(weights)} tensors ({format_bytes(total)}) by hash, e.g.")
    say(f"  curl {url}/blob/{example}")
    accuracy = float(program.evaluate(weights))
    say(f"Accuracy on held-out digits: {accuracy:.1%}")
    if accuracy < MIN_ACCURACY:
        raise VerificationError(f"the weights reach only {accuracy:.1%}")
    return accuracy


@contextlib.contextmanager
def _four_nodes(home: Path) -> Iterator[tuple[_Node, list[_Node]]]:
    """Start a buyer, then three providers that know the buyer; end them, whatever happens."""
    nodes: list[_Node] = []
    with _sigterm_as_interrupt():
        try:
            say("Starting four nodes on loopback...")
            buyer = _start(nodes, home / "buyer", "buyer", ())
            address = str(_wait_ready(buyer)["address"])
            for name, flags in PROVIDERS.items():
                _start(nodes, home / name, name, (*flags, "--connect", address))
            for node in nodes[1:]:
                _wait_ready(node)
            yield buyer, nodes[1:]
        finally:
            _stop(nodes)


def _start(nodes: list[_Node], home: Path, name: str, flags: tuple[str, ...]) -> _Node:
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "p2pflop.cli.main", "node", "--home", str(home)]
    command += ["--port", "0", "--listen", "/ip4/127.0.0.1/tcp/0", *flags]
    with (home / "demo.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches this program alone, which then ends all in order.
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    node = _Node(name, home, process)
    nodes.append(node)
    return node


def _wait_ready(node: _Node) -> dict[str, Any]:
    """The note of a node that answers, with the address that others connect to."""
    from p2pflop.client import Client

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if node.process.poll() is not None:
            raise ConfigError(
                f"the node '{node.name}' ended: {node.log.read_text(errors='replace')[-1000:]}",
                hint=f"Its log is {node.log}.",
            )
        if (note := node.note()) is not None:
            with Client(node.home) as client:
                return note | {"address": client.status()["addresses"][0]}
        time.sleep(POLL_S)
    raise ConfigError(f"'{node.name}' did not start in {START_S:.0f} s; see {node.log}")


def _stop(nodes: list[_Node]) -> None:
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


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _load(script: Path) -> ModuleType:
    if not script.is_file():
        raise ConfigError(
            f"there is no {script} here", hint="Run it from a clone of the repository."
        )
    os.environ.setdefault("DEV", "CPU")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{script} is not a Python program")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("make_job", "evaluate"):
        if not hasattr(module, name):
            raise ConfigError(f"{script} has no {name}()")
    return module
