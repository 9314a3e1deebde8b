"""What the market costs one core: ranking, the book, signatures, and a node that follows it all.

The node that is measured is a real process, with two more that follow as its neighbours; in this
process, 16 libp2p hosts publish ``--rate`` sheets a second among them, over loopback. Its share of
a core is that of its main process, libp2p included, beside the same before anybody publishes.
All times are of the processor, as machines are shared.

Signature checks stand beside those of ``cryptography`` (OpenSSL), which are not strict. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from p2pflop.client import Client
from p2pflop.keys import verify_signature
from p2pflop.market.book import Book
from p2pflop.market.ranking import Policy, best, rank
from p2pflop.market.records import Ask
from p2pflop.market.samples import NOW_NS, Party, ask, need, party
from p2pflop.market.sheets import OpenSheet, make_delegation, make_sheet, open_sheet
from p2pflop.node.network import HostConfig
from p2pflop.node.sheets import TOPIC
from p2pflop.units import MIB, NS_PER_S

ASKS = 10_000
BOOK_ASKS = 100_000
PUBLISHERS = 16
SETTLE_S = 6.0


def fastest_ms(once: Callable[[], Any], runs: int) -> float:
    """Of ``runs`` calls: whoever else uses the machine's caches only adds to it."""
    samples = []
    for _ in range(runs):
        began = time.process_time()
        once()
        samples.append((time.process_time() - began) * 1e3)
    return round(min(samples), 3)


def make_sheets(count: int, asks: int, chance: random.Random) -> list[OpenSheet]:
    """``count`` sheets of ``asks`` each, with setup fees, so that price alone does not decide."""

    def offer(number: int) -> Ask:
        fee_nusd = chance.randrange(10**6)
        return ask(number, chance.randrange(1, 10**7), setup_nusd=fee_nusd)

    return [party(node).sheet(*map(offer, range(asks))) for node in range(count)]


def roomy_book() -> Book:
    """One without the bounds that a node has."""
    return Book(bytes(32), max_sheets=10**6, max_strangers=10**6)


def from_the_wire(sheets: list[OpenSheet]) -> list[OpenSheet]:
    """The same as they come from peers."""
    opened = [open_sheet(bytes(bytearray(sheet.sealed.wire)), "main") for sheet in sheets]
    return [sheet for sheet in opened if isinstance(sheet, OpenSheet)]


def ranking(chance: random.Random) -> dict[str, Any]:
    """One ask a sheet: the most sheets, so the slowest. Each time one sheet is new.

    All are attested, as ``Franchise.admitted`` tells it (``franchise.py`` has the whole way).
    """
    sheets = from_the_wire(make_sheets(ASKS, 1, chance))
    book = roomy_book()
    for sheet in sheets:
        book.apply(sheet, NOW_NS)
    book.view(NOW_NS)
    newer = iter([party(n).sheet(ask(1, 10**6), number=2) for n in range(200)])

    def best_after_a_change() -> None:
        book.apply(next(newer), NOW_NS)
        assert best(book.view(NOW_NS), need(), Policy(), NOW_NS) is not None

    view, strict = book.view(NOW_NS), Policy(attested_only=True)
    attested = frozenset(bytes(bytearray(sheet.account)) for sheet in view.sheets)
    return {
        "asks": ASKS,
        "best_after_a_new_sheet_ms": fastest_ms(best_after_a_change, 200),
        "best_ms": fastest_ms(lambda: best(view, need(), Policy(), NOW_NS), 200),
        "best_promise_ms": 2,
        "rank_ms": fastest_ms(lambda: rank(view.sheets, need(), Policy(), NOW_NS), 60),
        "rank_strict_ms": fastest_ms(
            lambda: rank(view.sheets, need(), strict, NOW_NS, attested), 60
        ),
        "rank_none_fits_ms": fastest_ms(
            lambda: rank(view.sheets, need(max_nusd=0), Policy(), NOW_NS), 60
        ),
        "rank_promise_ms": 30,
    }


def space(chance: random.Random) -> dict[str, Any]:
    """A book of ``BOOK_ASKS`` with its view, as it is when the sheets come from the wire."""
    report: dict[str, Any] = {"promise_mib": 200}
    for asks in (8, 32):
        wires = [sheet.sealed.wire for sheet in make_sheets(BOOK_ASKS // asks, asks, chance)]
        tracemalloc.start()
        book = roomy_book()
        for wire in wires:
            opened = open_sheet(bytes(bytearray(wire)), "main")
            assert isinstance(opened, OpenSheet)
            book.apply(opened, NOW_NS)
        assert book.view(NOW_NS).by_price
        report[f"of_{asks}_asks_a_sheet_mib"] = round(tracemalloc.get_traced_memory()[0] / MIB, 1)
        tracemalloc.stop()
    return report


def applying(chance: random.Random) -> dict[str, Any]:
    """Checked sheets into a book, then a view of it."""
    report: dict[str, Any] = {"promise": 100_000}
    for asks in (1, 8, 32):
        sheets = make_sheets(16_384 // asks, asks, chance)
        best_s = float("inf")
        for _ in range(3):
            book, began = roomy_book(), time.process_time()
            for sheet in sheets:
                book.apply(sheet, NOW_NS)
            book.view(NOW_NS)
            best_s = min(best_s, time.process_time() - began)
        report[f"entries_per_s_of_{asks}_a_sheet"] = round(len(sheets) * asks / best_s)
    return report


def signatures(chance: random.Random) -> dict[str, Any]:
    """Checks a second on one core: ours alone, whole sheets, and OpenSSL's."""
    sheets = make_sheets(2_000, 1, chance)
    keys = [party(node).node for node in range(2_000)]
    signed = [(key.public_key, b"message %d" % n) for n, key in enumerate(keys)]
    triples = [(*each, key.sign(each[1])) for each, key in zip(signed, keys, strict=True)]

    def per_s(check: Callable[[], Any]) -> int:
        began = time.process_time()
        check()
        return round(2_000 / (time.process_time() - began))

    def openssl() -> None:
        for key, message, signature in triples:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, message)

    def strict() -> None:
        for key, message, signature in triples:
            verify_signature(key, message, signature)

    ours, theirs = zip(*((per_s(strict), per_s(openssl)) for _ in range(5)), strict=True)
    return {
        "checks_per_s": statistics.median(ours),
        "promise": 7_000,
        "openssl_per_s": statistics.median(theirs),
        "sheets_opened_per_s": per_s(lambda: [open_sheet(s.sealed.wire, "main") for s in sheets]),
    }


@contextmanager
def nodes(folder: Path, count: int) -> Iterator[list[tuple[int, str, Client]]]:
    """Real nodes, each connected to the first: process, address, client."""
    started: list[tuple[int, str, Client]] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            home = folder / str(number)
            command = [sys.executable, "-m", "p2pflop.cli.main", "node", "--home", str(home)]
            command += ["--port", "0", "--listen", "/ip4/127.0.0.1/tcp/0"]
            command += ["--connect", started[0][1]] if started else []
            processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            while not (home / "node.json").exists():
                if processes[-1].poll() is not None:
                    raise SystemExit(f"node {number} did not start")
                time.sleep(0.05)
            client = Client(home)
            started.append((processes[-1].pid, client.status()["addresses"][0], client))
        yield started
    finally:
        for _, _, client in started:
            client.close()
        for process in processes:
            process.terminate()
            process.wait()


def cpu_s(pid: int) -> float:
    """What a process has used of a core so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def publish(addresses: list[str], pid: int, rate: float, seconds: float) -> dict[str, Any]:
    """Publish from hosts of this process; what ``pid`` uses before and meanwhile."""
    from p2pflop.node.host import open_host

    now_ns = time.time_ns()
    sellers = []
    for number in range(PUBLISHERS):
        made = party(number)
        node = made.node.public_key
        delegation = make_delegation(made.account, node, now_ns - NS_PER_S, now_ns + 10**14)
        sellers.append(Party(made.account, made.node, delegation))
    async with AsyncExitStack() as stack:
        hosts = []
        for number, seller in enumerate(sellers):
            bootstrap = (addresses[0], addresses[1 + number % (len(addresses) - 1)])
            config = HostConfig(seller.node.seed, bootstrap=bootstrap)
            hosts.append(await stack.enter_async_context(open_host(config)))
        await trio.sleep(SETTLE_S)
        before_s, began = cpu_s(pid), trio.current_time()
        await trio.sleep(seconds / 2)
        idle = (cpu_s(pid) - before_s) / (trio.current_time() - began)
        before_s, began, sent = cpu_s(pid), trio.current_time(), 0
        while trio.current_time() < began + seconds:
            seller, host = sellers[sent % PUBLISHERS], hosts[sent % PUBLISHERS]
            now_ns = time.time_ns()
            offer = ask(1, 1_000 + sent % 100, valid_until_ns=now_ns)
            sheet = make_sheet(
                seller.node,
                number=now_ns,
                now_ns=now_ns,
                delegation=seller.delegation,
                asks=[offer],
            )
            await host.publish(TOPIC, sheet.sealed.wire)
            sent += 1
            await trio.sleep_until(began + sent / rate)
        used = (cpu_s(pid) - before_s) / (trio.current_time() - began)
    return {"sent": sent, "per_s": round(sent / seconds, 1), "idle_core": idle, "core": used}


def following(rate: float, seconds: float) -> dict[str, Any]:
    """A node that follows ``rate`` sheets a second, and passes them on to two neighbours."""
    with tempfile.TemporaryDirectory() as folder, nodes(Path(folder), 3) as started:
        addresses = [address for _, address, _ in started]
        report = trio.run(publish, addresses, started[0][0], rate, seconds)
        time.sleep(1)
        books = [
            {each["provider"]: each["sheet"] for each in client.book()} for *_, client in started
        ]
    return {
        "sheets_per_s": report["per_s"],
        "core": round(report["core"], 3),
        "core_before": round(report["idle_core"], 3),
        "promise_core": 0.4,
        "books_alike_1_s_later": all(book == books[0] for book in books),
        "providers_seen": len(books[0]),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--alone", action="store_true", help="leave out the real nodes")
    given = parser.parse_args()
    chance = random.Random(1)  # noqa: S311 - a bench
    report: dict[str, Any] = {
        "bench": "market",
        "ranking": ranking(chance),
        "book_mib": space(chance),
        "applied": applying(chance),
        "signatures": signatures(chance),
    }
    if not given.alone:
        report["following"] = following(given.rate, given.seconds)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
