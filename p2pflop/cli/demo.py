"""``p2pflop demo``: the whole market on one machine, with real nodes and real data.

A registry and four node processes on loopback, a buyer and three providers. The cheapest of these
has not paid its franchise fee and is in nobody's book. A digit classifier is traced and bought; its
provider is killed with -9 after the first checkpoint, and the run goes on at the next best. The
cheapest pays, appears, and wins the next job. The registry is stopped, and twelve learning rates
of that job are bought under one budget, over whoever has room. All ledgers have to agree. The
result is fetched by its hash over plain HTTP, evaluated, and compared with the same job run
locally, without a market and without a break. At last a script that knows nothing of p2pflop runs
under CLOUD=1, and its provider, too, is killed. Nothing is shown that was not just measured.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Self

import click

from p2pflop.cli.demo_cloud import PLAIN, run_plain_script
from p2pflop.cli.demo_nodes import DemoNode, Market, open_market
from p2pflop.cli.output import Flags, common_options, print_json, say, short
from p2pflop.errors import ConfigError, P2PFlopError, VerificationError
from p2pflop.units import counted, format_bytes, format_flop, format_usd

if TYPE_CHECKING:
    from p2pflop.results import Result
    from p2pflop.runs import Run
    from p2pflop.sdk import Job

SCRIPT: Final = Path("examples") / "digits.py"
SWEEP: Final = Path("examples") / "sweep.py"
HOME: Final = Path(".demo")
BOOK_S: Final = 30.0
LOCAL_STOP_S: Final = 5.0
POLL_S: Final = 0.05
MIN_ACCURACY: Final = 0.95
OFFERED: Final = ("make_job", "evaluate")
"""What a script must define: the job for a seed, and the accuracy of weights by name."""
SWEPT: Final = ("make_job",)


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

    All deal only with accounts that a registry attests; one of the three that sell pays its fee
    late. At the end a plain tinygrad script runs on them, too, by CLOUD=1. Everything lives in the
    folder .demo of the current directory (or --home). Each demo begins afresh, that is, with new
    accounts and empty ledgers, and keeps only plan caches, so that a second run skips lowering.
    Nothing leaves this machine.

    \b
    Examples:
      p2pflop demo              from a clone of the repository
      p2pflop demo --seed 1     the same weights every time
    """
    program = _load(script)
    home = Path(flags.home) if flags.home else HOME
    seed = secrets.randbelow(2**32) if seed is None else seed
    began = time.monotonic()
    try:
        with open_market(home) as market:
            sweep = _load(script.with_name(SWEEP.name), SWEPT)
            plain = _found(script.parent / PLAIN)
            report = _trade(program, sweep, seed, market, as_json=flags.json)
            report["plain"] = run_plain_script(plain, market)
    except KeyboardInterrupt:
        # Not the run's own interrupt: that one tells how to come back to a run that goes on.
        stopped = KeyboardInterrupt()
        stopped.add_note(
            "The demo was stopped: its run is given up, its registry and four nodes have ended."
        )
        raise stopped from None
    report["seconds"] = round(time.monotonic() - began, 1)
    if flags.json:
        print_json(report)
    else:
        say(f"\nAll of it took {report['seconds']} s; the registry and the four nodes have ended.")
        say("Until the next demo their homes keep what they have. This looks into the buyer's:")
        say(f"  {_program()} get {report['weights']} --home {market.buyer.home} -o weights.bin")
    return 0


def _trade(
    program: ModuleType, swept: ModuleType, seed: int, market: Market, *, as_json: bool
) -> dict[str, Any]:
    import p2pflop as pf
    from p2pflop.client import Client

    with Client(market.buyer.home) as client:
        names = _wait_for_book(client, market)
        left_out = _show_left_out(client, market.unpaid)
        job = program.make_job(seed=seed)
        _describe(job, seed)
        run = pf.submit(job, max_usd="0.01", fresh=True, client=client)
        with _Local(job) as local:
            victim = _Victim(names)
            result, result_event = _follow(run, victim, as_json=as_json)
            winner = names[result_event["provider"]]
            say(f"\n'{winner.name}' has finished what '{victim.name}' had begun.")
            appeared_s = _pay(client, market, meanwhile=victim.start_again)
            sold = _sell_next(swept.make_job(), client, market, names)
            for name, earned_nusd in _sweep(swept, client, names).items():
                sold[name] = sold.get(name, 0) + earned_nusd
            paid = {*sold, victim.name, winner.name}
            owed = [each for each in market.providers if each.name in paid]
            ledgers = _show_ledgers(client, owed, result.cost_nusd + sum(sold.values()))
            accuracy, example = _fetch_and_evaluate(program, client, result_event)
            local_hash = local.compare(result.hash)
    return {
        "hash": result.hash,
        "local_hash": local_hash,
        "accuracy": accuracy,
        "weights": example,
        "killed": victim.name,
        "provider": winner.name,
        "left_out": left_out,
        "appeared_s": appeared_s,
        "sold_nusd": sold,
        "job_bytes": job.size_bytes,
        **ledgers,
    }


def _describe(job: Job, seed: int) -> None:
    cost = job.cost
    say(
        f"\n{job.file.labels.title}: {format_bytes(job.size_bytes)} of graphs, "
        f"{counted(job.steps, 'step')}, {format_flop(cost.flop)}, "
        f"touches {format_bytes(cost.touched_bytes)}, seed {seed}"
    )
    say("Beside it the same job runs here, without a market, to compare.\n")


class _Local:
    """The job, run on this machine beside the one that is bought, and not beyond the demo."""

    def __init__(self, job: Job) -> None:
        self._hash = ""
        self._error: P2PFlopError | None = None
        self._job = job
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(LOCAL_STOP_S)

    def _run(self) -> None:
        try:
            self._hash = self._job.run_local(self._go_on, self._go_on).hash
        except P2PFlopError as error:
            self._error = error

    def _go_on(self, *_: object) -> None:
        if self._stopping.is_set():
            raise P2PFlopError("the demo was stopped")

    def compare(self, bought: str) -> str:
        """The hash of the local run. Raises VerificationError if it is not that of the other."""
        say("\nWaiting for the job that was run here, without a market and without a break...")
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._hash != bought:
            raise VerificationError(f"the local run gave {self._hash}, the provider {bought}")
        say(f"Same hash: {self._hash}")
        return self._hash


class _Victim:
    """The provider that is killed, in the middle of the work, once it has been paid for a part."""

    def __init__(self, names: dict[str, DemoNode]) -> None:
        self._names = names
        self._node: DemoNode | None = None

    @property
    def name(self) -> str:
        """Of its node. Raises VerificationError if nobody had to be killed."""
        if self._node is None:
            raise VerificationError("the job was over before its first checkpoint")
        return self._node.name

    def look(self, event: dict[str, Any]) -> None:
        """Kill it, if it is time."""
        if event["kind"] == "receipt" and self._node is None:
            self._node = self._names[event["provider"]]
            self._node.kill()
            say(f"'{self.name}' is killed now, with kill -9.")

    def start_again(self) -> None:
        """Have it back, so that the ledgers can be compared."""
        if self._node is None or self._node.process.poll() is None:
            return
        say(f"'{self.name}' is started again, to look into its ledger.")
        self._node.start_again()


def _follow(run: Run, victim: _Victim, *, as_json: bool) -> tuple[Result, dict[str, Any]]:
    """Show a run up to its result, which comes with the event that told it."""
    from p2pflop.cli.progress import RunView

    last: dict[str, Any] = {}
    try:
        with RunView() as view:
            for last in run.events():
                if not as_json:
                    view.show(last)
                victim.look(last)
        return run.result(), last
    except KeyboardInterrupt:
        # Its nodes are about to end: nobody could come back to it.
        with suppress(P2PFlopError, KeyboardInterrupt):
            run.cancel()
        raise


def _sweep(program: ModuleType, client: Any, names: dict[str, DemoNode]) -> dict[str, int]:
    """Buy the same job at many learning rates; what each provider has earned, in nano-dollars."""
    import p2pflop as pf

    job, args = program.make_job(), [{"lr": rate} for rate in program.RATES]
    say(f"\n{len(args)} learning rates of a smaller job, under one budget, two at once:")
    sweep = pf.map(job, args, max_usd="0.01", under_way=2, fresh=True, client=client)
    sold: dict[str, int] = {}
    try:
        for outcome in sweep:
            result, run = outcome.result(), outcome.run
            if run is None:
                raise VerificationError("a job that was bought has no run")
            name = names[client.job(run.id)["provider"]].name
            sold[name] = sold.get(name, 0) + result.cost_nusd
            accuracy = result["acc"][-1]
            say(f"  lr {outcome.args['lr']:<6}  acc {accuracy:.3f}  at '{name}'")
    except BaseException:
        sweep.cancel()
        raise
    best, result = sweep.best("acc", max)
    say(f"Best: lr {best.args['lr']}, accuracy {result['acc'][-1]:.3f}.\n")
    return sold


def _wait_for_book(client: Any, market: Market) -> dict[str, DemoNode]:
    """Have all pay but one, and wait until each book shows who has; who is who by peer id."""
    from p2pflop.client import Client

    market.everybody_pays_but_one()
    names = {str(note["peer"]): node for node in market.providers if (note := node.note())}
    shown = {peer for peer, node in names.items() if node is not market.unpaid}
    for node in (market.buyer, *market.providers):
        own = {peer for peer, each in names.items() if each is node}
        with Client(node.home) as theirs:
            _wait_for_sellers(theirs, shown | own)
    say(f"Every book shows the sheets of the {len(shown)} who have:")
    for ask in client.book():
        node = names[ask["provider"]]
        price, memory = format_usd(ask["price_nusd"]), format_bytes(ask["memory_bytes"])
        say(f"  {node.name}  {short(ask['provider'])}  {price} a PFLOP, {memory} of memory")
    return names


def _wait_for_sellers(client: Any, expected: set[str]) -> None:
    _until(lambda: _sellers(client) == expected, "a book does not show whom it should")


def _sellers(client: Any) -> set[str]:
    return {str(ask["provider"]) for ask in client.book()}


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait until ``condition`` holds. Raises P2PFlopError."""
    deadline = time.monotonic() + BOOK_S
    while not condition():
        if time.monotonic() > deadline:
            raise P2PFlopError(f"{otherwise} after {BOOK_S:.0f} s")
        time.sleep(POLL_S)


def _show_left_out(client: Any, unpaid: DemoNode) -> str:
    """Say what the provider that has not paid was told; the buyer's reason."""
    from p2pflop.client import Client

    buyer = client.status()["peer"]

    def told() -> tuple[str, str]:
        franchise = theirs.status()["franchise"]
        reasons = {each["peer"]: each["reason"] for each in franchise["left_out_by"]}
        return reasons.get(buyer, ""), franchise["registries"][0]["waits_for"]

    with Client(unpaid.home) as theirs:
        _until(lambda: all(told()) and "pay" in told()[1], f"'{unpaid.name}' is not told why")
        reason, waits_for = told()
        [ask] = [ask for ask in theirs.book() if ask["own"]]
    say(f"'{unpaid.name}' asks for {format_usd(ask['price_nusd'])}, the best price, in vain:")
    say(f"  the buyer tells it: {reason}")
    say(f"  its own node tells it: it waits for {waits_for}")
    return reason


def _pay(client: Any, market: Market, *, meanwhile: Callable[[], None]) -> float:
    """The fee comes; after how many seconds the buyer's book shows who paid it."""
    unpaid = market.unpaid
    peer = (unpaid.note() or {})["peer"]
    market.registry.book_fee(unpaid.account)
    paid_at = time.monotonic()
    say(f"\n'{unpaid.name}' pays its fee now.")
    meanwhile()
    _until(lambda: peer in _sellers(client), f"'{unpaid.name}' has paid, and is not in the book")
    seconds = time.monotonic() - paid_at
    say(f"It is in the buyer's book, {seconds:.1f} s later at most.")
    return round(seconds, 1)


def _sell_next(job: Job, client: Any, market: Market, names: dict[str, DemoNode]) -> dict[str, int]:
    """Buy a job of whoever is best now, then stop the registry; what was earned."""
    import p2pflop as pf

    run = pf.submit(job, max_usd="0.01", fresh=True, client=client)
    result = run.result()
    winner = names[client.job(run.id)["provider"]]
    say(f"The next job is bought from '{winner.name}', for {format_usd(result.cost_nusd)}.")
    if winner is not market.unpaid:
        raise VerificationError("the best price has not won, though its fee is paid")
    leaves = counted(market.registry.verify(), "leaf", "leaves")
    say(f"The registry's log, checked from outside: {leaves}, one history.")
    market.registry.stop()
    say("The registry is stopped now. The market goes on.")
    return {winner.name: result.cost_nusd}


def _show_ledgers(client: Any, paid: list[DemoNode], cost_nusd: int) -> dict[str, Any]:
    """The same amounts in all books: what the buyer owes is what each provider is owed, and all of
    it together is what the run has cost."""
    owed = {node.name: _show_ledger(client, node) for node in paid}
    if sum(owed.values()) != cost_nusd:
        raise VerificationError(f"{owed} are owed, but the run has cost {cost_nusd} nano-dollars")
    return {"owed_nusd": cost_nusd, "owed": owed}


def _show_ledger(client: Any, node: DemoNode) -> int:
    """What both books say that a provider is owed, in nano-dollars."""
    from p2pflop.client import Client

    with Client(node.home) as theirs:
        account = str((node.note() or {})["account"])
        deadline = time.monotonic() + BOOK_S
        while True:
            owing = -_due(client.ledger(), account)
            due = _due(theirs.ledger(), str(client.status()["account"]))
            if due == owing:
                break
            if time.monotonic() > deadline:
                raise VerificationError(f"the ledgers differ: {owing} and {due} nano-dollars")
            time.sleep(POLL_S)
    say(f"Buyer's ledger: owes {node.name} {format_usd(owing)}.")
    say(f"{node.name}'s ledger: is owed {format_usd(due)} by the buyer.")
    return due


def _due(ledger: dict[str, Any], account: str) -> int:
    return next((int(b["due_nusd"]) for b in ledger["balances"] if b["account"] == account), 0)


def _fetch_and_evaluate(
    program: ModuleType, client: Any, event: dict[str, Any]
) -> tuple[float, str]:
    """Get the weights by hash with plain HTTP, and evaluate them on held-out digits.

    The accuracy, and the address of one tensor of the weights.
    """
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
    example = str(event["state"][next(iter(weights))]["address"])
    say(f"\nFetched {len(weights)} tensors ({format_bytes(total)}) by hash, e.g.")
    say(f"  GET {url}/blob/{example}")
    accuracy = float(program.evaluate(weights))
    say(f"Accuracy on held-out digits: {accuracy:.1%}")
    if accuracy < MIN_ACCURACY:
        raise VerificationError(f"the weights reach only {accuracy:.1%}")
    return accuracy, example


def _program() -> str:
    """How this very program is called from here."""
    return "p2pflop" if shutil.which("p2pflop") else sys.argv[0]


def _found(script: Path) -> Path:
    if not script.is_file():
        raise ConfigError(
            f"there is no {script} here", hint="Run it from a clone of the repository."
        )
    return script


def _load(script: Path, offered: Sequence[str] = OFFERED) -> ModuleType:
    for name in _missing_names(_found(script), offered):
        raise ConfigError(f"{script} has no {name}()", hint=f"See how {SCRIPT} does it.")
    os.environ.setdefault("DEV", "CPU")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{script} is not a Python program")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _missing_names(script: Path, offered: Sequence[str]) -> list[str]:
    """Which of ``offered`` a script does not define, without running it."""
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{script} is not a Python program: {error}") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return [name for name in offered if name not in defined]
