"""The registry with 20,000 accounts: how fast it answers, starts again, and is verified.

Reads go to a real ``p2pflop registry serve`` over loopback, one client after another with a bare
Starlette "hello" on the same server, in interleaved rounds. ``--accounts N`` sets how many there
are.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from p2pflop.franchise.enrolments import check_form, make_form
from p2pflop.franchise.proofs import check_proof
from p2pflop.franchise.records import PersonalData, Schedule
from p2pflop.franchise.roll import Roll, Standing
from p2pflop.franchise.samples import YEAR_NS, key
from p2pflop.keys import PrivateKey
from p2pflop.market.records import Rejected
from p2pflop.registry import members
from p2pflop.registry.api import create_app
from p2pflop.registry.audit import HttpSource, Report, audit
from p2pflop.registry.draft import Draft
from p2pflop.registry.founding import found_registry
from p2pflop.registry.home import folder_of
from p2pflop.registry.log import Prover
from p2pflop.registry.office import Office, open_office

ROOT = key(900)
ROUNDS = 20
REQUESTS_A_ROUND = 100
REQUESTS_A_ROUTE = 200
VERIFIED = 10_000
LOOKED_UP = 200_000
ROUTES = (
    "registry",
    "certificates",
    "schedules",
    "head",
    "heads?from={}",
    "leaves?from={}",
    "proofs/{}",
    "consistency?first={}&second={}",
    "attestations?after={}",
    "attestations/{account}",
    "revocations?from={}",
)

HELLO = """
import sys, trio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from p2pflop.node.api_server import bind_api, serve_api

async def hello(request):
    return PlainTextResponse("hello")

listener = bind_api(0)
print(listener.url, flush=True)
trio.run(serve_api, Starlette(routes=[Route("/", hello)]), listener, trio.Event())
"""


def account_of(number: int) -> PrivateKey:
    return key(10_000 + number)


async def furnish(home: Path, accounts: int) -> None:
    """A registry without a fee where so many accounts are enrolled and attested."""

    def schedule(issuer: bytes, now_ns: int) -> Schedule:
        return Schedule(1, issuer, 1, 0, YEAR_NS, 64, now_ns, "1")

    await found_registry(folder_of(home), ROOT, "main", schedule, time.time_ns)
    async with open_office(folder_of(home)) as office:
        for first in range(0, accounts, 500):

            def enrol(draft: Draft, first: int = first) -> None:
                for number in range(first, min(first + 500, accounts)):
                    account = account_of(number)
                    personal = PersonalData(1, bytes(32), "a@example.org", "")
                    form = make_form(account, ROOT.public_key, "1", personal, draft.now_ns)
                    checked = check_form(form, ROOT.public_key, "1", draft.now_ns)
                    assert not isinstance(checked, Rejected)
                    members.request(draft, checked, str(number), bytes(32))
                    members.approve(draft, account.public_key)
                    draft.sign_head()

            await office._write(enrol)


@contextmanager
def started(command: list[str]) -> Iterator[tuple[int, str, float]]:
    """A server, its URL, and the seconds from its start to its first line."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        url = json.loads(line)["url"] if line.startswith("{") else line
        yield process.pid, url, time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def serve(home: Path) -> list[str]:
    program = [sys.executable, "-m", "p2pflop.cli.main", "registry", "serve"]
    return [*program, "--port", "0", "--json", "--home", str(home)]


def per_second(client: httpx.Client, path: str, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        assert client.get(path).status_code == 200
    return count / (time.perf_counter() - began)


def compare_reads(registry: str, hello: str, accounts: int) -> dict[str, Any]:
    """Requests a second of both in turns, and the ratio of the medians."""
    rates: dict[str, list[float]] = {"hello": [], "attestation": [], "head": []}
    with httpx.Client(base_url=registry) as ours, httpx.Client(base_url=hello) as bare:
        for round_ in range(ROUNDS):
            account = account_of(round_ * 997 % accounts).public_key.hex()
            rates["hello"].append(per_second(bare, "/", REQUESTS_A_ROUND))
            way = f"/v1/attestations/{account}"
            rates["attestation"].append(per_second(ours, way, REQUESTS_A_ROUND))
            rates["head"].append(per_second(ours, "/v1/head", REQUESTS_A_ROUND))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "per_s": {name: round(rate) for name, rate in medians.items()},
        "of_hello": {
            name: round(medians[name] / medians["hello"], 2) for name in ("attestation", "head")
        },
    }


def slowest_ms(url: str, hello: str, accounts: int) -> dict[str, dict[str, float]]:
    """The median and the slowest of many requests of every kind, and of the bare "hello"."""
    found = {}
    with httpx.Client(timeout=30) as client:
        for name in ("hello", *ROUTES):
            samples = []
            for each in range(REQUESTS_A_ROUTE):
                number = 1 + each * 97 % (accounts - 1)
                account = account_of(number).public_key.hex()
                began = time.perf_counter()
                path = f"{url}/v1/{name.format(number, accounts, account=account)}"
                answer = client.get(hello if name == "hello" else path)
                samples.append(1000 * (time.perf_counter() - began))
                assert answer.status_code == 200, answer.text
            found[name] = {
                "p50": round(statistics.median(samples), 2),
                "p99": round(sorted(samples)[int(0.99 * len(samples))], 2),
                "max": round(max(samples), 2),
            }
    return found


async def slowest_cpu_ms(home: Path, accounts: int) -> dict[str, float]:
    """The processor's time for the slowest of many requests, in one process without a network."""
    found = {}
    async with open_office(folder_of(home)) as office:
        transport = httpx.ASGITransport(create_app(office))
        async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
            for name in ROUTES:
                samples = []
                for each in range(REQUESTS_A_ROUTE):
                    number = 1 + each * 97 % (accounts - 1)
                    account = account_of(number).public_key.hex()
                    path = f"/v1/{name.format(number, accounts, account=account)}"
                    began = time.thread_time()
                    answer = await client.get(path)
                    samples.append(1000 * (time.thread_time() - began))
                    assert answer.status_code == 200, answer.text
                found[name] = round(max(samples), 2)
    return found


async def all_proofs(home: Path, count: int) -> list[bytes]:
    async with open_office(folder_of(home)) as office:
        return _proofs(office, count)


def _proofs(office: Office, count: int) -> list[bytes]:
    found = office.query("SELECT leaf FROM attestations ORDER BY serial LIMIT ?", count)
    prover = Prover(office.query)
    return [proof for (leaf,) in found if (proof := prover.prove(leaf)) is not None]


def verification(home: Path) -> dict[str, Any]:
    """What a node does with proofs: many at its start, one look-up for every ask."""
    proofs = trio.run(all_proofs, home, VERIFIED)
    roll = Roll([ROOT.public_key])
    now_ns = time.time_ns()
    began, began_cpu = time.perf_counter(), time.process_time()
    for proof in proofs:
        assert isinstance(roll.admit(proof, now_ns), Standing)
    admitted_s, admitted_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    accounts = [account_of(number).public_key for number in range(len(proofs))]
    began = time.perf_counter()
    for number in range(LOOKED_UP):
        assert roll.is_attested(accounts[number % len(accounts)], now_ns)
    looked_up_s = time.perf_counter() - began
    issuer = roll.issuer(ROOT.public_key)
    assert issuer is not None
    began = time.perf_counter()
    for proof in proofs[:1000]:
        assert not isinstance(check_proof(proof, issuer, now_ns), Rejected)
    return {
        "proofs": len(proofs),
        "proof_bytes": len(proofs[0]),
        "verified_s": round(admitted_s, 2),
        "verified_cpu_s": round(admitted_cpu_s, 2),
        "inclusion_alone_us": round(1000 * (time.perf_counter() - began), 1),
        "check_from_cache_us": round(10**6 * looked_up_s / LOOKED_UP, 2),
    }


def cpu_s(pid: int) -> float:
    """What a process has used of the processor, which other programs do not change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accounts", type=int, default=20_000)
    accounts = parser.parse_args().accounts
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        began = time.perf_counter()
        trio.run(furnish, home, accounts)
        furnished_s = time.perf_counter() - began
        restarts = []
        for _ in range(5):
            with started(serve(home)) as (pid, url, restarted_s):
                assert httpx.get(f"{url}/v1/head").status_code == 200
                restarts.append(restarted_s)
                restart_cpu_s = cpu_s(pid)
        with (
            started(serve(home)) as (pid, url, _),
            started([sys.executable, "-c", HELLO]) as (_, hello, _),
        ):
            reads = compare_reads(url, hello, accounts)
            slowest = slowest_ms(url, hello, accounts)
            began = time.perf_counter()
            report = audit(HttpSource(url), ROOT.public_key, None, time.time_ns())
            audited_s = time.perf_counter() - began
            assert isinstance(report, Report)
            resident = resident_mib(pid)
        told = {
            "accounts": accounts,
            "leaves": report.head.record.size,
            "heads": report.heads,
            "enrolled_and_attested_per_s": round(accounts / furnished_s),
            "reads": reads,
            "request_ms": slowest,
            "slowest_ms": max(slowest[name]["max"] for name in ROUTES),
            "slowest_cpu_ms": trio.run(slowest_cpu_ms, home, accounts),
            "restart_s": {
                "median": round(statistics.median(restarts), 2),
                "min": round(min(restarts), 2),
                "cpu": round(restart_cpu_s, 2),
            },
            "load": [round(each, 1) for each in os.getloadavg()],
            "resident_mib": resident,
            "file_mib": round((folder_of(home) / "registry.db").stat().st_size / 2**20, 1),
            "audit_s": round(audited_s, 1),
            "node": verification(home),
            "sqlite": sqlite3.sqlite_version,
        }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
