"""A registry that is killed with -9 between any two steps loses nothing and does nothing twice."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from p2pflop.dht.database import Database
from p2pflop.franchise.enrolments import make_form
from p2pflop.franchise.issuer import sign_certificate
from p2pflop.franchise.records import (
    DAY_NS,
    PersonalData,
    RefusalReason,
    RevocationReason,
    Schedule,
)
from p2pflop.franchise.samples import GUIDELINES, YEAR_NS, key
from p2pflop.market.samples import NOW_NS
from p2pflop.registry.backup import back_up
from p2pflop.registry.books import credit_nusd
from p2pflop.registry.founding import found_registry
from p2pflop.registry.log import leaves_from
from p2pflop.registry.office import open_office
from p2pflop.registry.schema import FILE_NAME
from p2pflop.registry.views import member_view, members_view

ROOT, ALICE, BOB, CAROL = key(900), key(1), key(2), key(3)
FEE = 10**9
SHORT_STRIDE = 23
REGISTRY = (sys.executable, "-m", "p2pflop.cli.main", "registry")


def clock() -> int:
    return NOW_NS


async def decide(folder: Path) -> None:
    """Everything that a registry decides, as an operator does it again after a crash."""

    def schedule(issuer: bytes, now_ns: int) -> Schedule:
        return Schedule(1, issuer, 1, FEE, YEAR_NS, 8, now_ns, GUIDELINES)

    if not (folder / FILE_NAME).exists() or not is_founded(folder):
        await found_registry(folder, ROOT, "main", schedule, clock)
    async with open_office(folder, clock) as office:
        for account in (ALICE, BOB, CAROL):
            personal = PersonalData(1, bytes(32), "ada", "Kent")
            form = make_form(account, ROOT.public_key, GUIDELINES, personal, NOW_NS)
            await office.apply(form, "a")
        await office.approve(ALICE.public_key)
        await office.refuse(BOB.public_key, RefusalReason.LAW)
        carol = member_view(office, CAROL.public_key)
        if carol is None or carol["state"] != "revoked":
            await office.approve(CAROL.public_key)
        await office.receive(ALICE.public_key, 3 * FEE, "bank 1")
        await office.receive(CAROL.public_key, FEE, "bank 2")
        if len(office.known_issuer().certificates) < 2:
            asked = office.request_certificate(withdraws=False)
            signed = sign_certificate(ROOT, asked, NOW_NS, NOW_NS + 90 * DAY_NS)
            await office.install_certificate(signed.wire)
        await office.give_back(CAROL.public_key, "bank 2")
        await office.revoke(CAROL.public_key, RevocationReason.UNPAID)
        if len(office.schedules()) < 2:
            await office.publish(2 * FEE, YEAR_NS, 8, GUIDELINES)
        await office.erase(ALICE.public_key)


def is_founded(folder: Path) -> bool:
    connection = sqlite3.connect(folder / FILE_NAME)
    try:
        return bool(connection.execute("SELECT 1 FROM facts").fetchall())
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()


def state_of(folder: Path) -> dict[str, Any]:
    """What must be the same however often the registry was killed on the way there."""

    async def read() -> dict[str, Any]:
        async with open_office(folder, clock) as office:
            views = members_view(office)
            return {
                "members": [{k: v for k, v in view.items() if k != "id"} for view in views],
                "credit": [credit_nusd(office.query, each.public_key) for each in (ALICE, CAROL)],
                "kinds": sorted(leaf[2] for leaf in leaves_from(office.query, 0)),
            }

    return trio.run(read)


def run_killed_at(folder: Path, statement: int) -> bool:
    """``decide`` in a process that kills itself before that statement; whether it came so far."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    seen = 0
    connect = Database._connect

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen > statement:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced(self: Database, schema: str, version: int) -> Any:
        connection = connect(self, schema, version)
        connection.set_trace_callback(count)
        return connection

    Database._connect = traced  # type: ignore[method-assign]
    trio.run(decide, folder)
    os._exit(0)


def kill_everywhere(path: Path, stride: int) -> int:
    """Kill at every ``stride``-th statement, look, finish, compare; how many kills there were."""
    trio.run(decide, path / "whole")
    whole = state_of(path / "whole")
    for kills, statement in enumerate(range(0, 100_000, stride)):
        folder = path / "killed"
        killed = run_killed_at(folder, statement)
        if (folder / FILE_NAME).exists() and is_founded(folder):
            back_up(folder, path / "copy.db")
            (path / "copy.db").unlink()
        trio.run(decide, folder)
        assert state_of(folder) == whole, f"killed before statement {statement}"
        shutil.rmtree(folder)
        if not killed:
            return kills
    raise AssertionError("it never came to its end")


def in_a_process(path: Path, stride: int) -> int:
    """Of its own, since it forks; how many kills there were."""
    done = subprocess.run(
        [sys.executable, __file__, str(path), str(stride)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_between_steps(tmp_path: Path) -> None:
    assert in_a_process(tmp_path, SHORT_STRIDE) >= 8


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_between_any_two_steps(tmp_path: Path) -> None:
    assert in_a_process(tmp_path, 1) >= 200


@contextmanager
def served(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A real ``p2pflop registry serve`` and its URL; it is killed with -9 at the end."""
    process = subprocess.Popen(
        [*REGISTRY, "serve", "--port", "0", "--json", "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def command(home: Path, *arguments: str, code: int = 0) -> Any:
    """A command of the operator's, in a process of its own."""
    done = subprocess.run(
        [*REGISTRY, *arguments, "--home", str(home), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else None


def test_a_served_registry_that_is_killed_has_all_that_it_acknowledged(tmp_path: Path) -> None:
    home, root = tmp_path / "home", tmp_path / "root.pem"
    issuer = bytes.fromhex(command(home, "init", "--root-key", str(root))["issuer"])
    acknowledged = []
    for round_ in range(3):
        with served(home) as (_, url):
            for number in range(4):
                account = key(100 * round_ + number + 1)
                personal = PersonalData(1, secrets.token_bytes(32), "ada", "")
                form = make_form(account, issuer, "1", personal, time.time_ns())
                assert httpx.post(f"{url}/v1/enrolments", content=form).status_code == 202
                acknowledged.append(account.public_key.hex())
    assert sorted(row["account"] for row in command(home, "list")) == sorted(acknowledged)


def test_one_franchise_from_application_to_attestation(tmp_path: Path) -> None:
    """With real processes: the operator's commands are given beside the service."""
    home, root, franchise = tmp_path / "home", tmp_path / "root.pem", tmp_path / "franchise"
    franchise.mkdir()
    (franchise / "account.pem").write_bytes(ALICE.to_pem())
    issuer = command(home, "init", "--root-key", str(root), "--fee", "10")["issuer"]
    root.unlink()
    account = ALICE.public_key.hex()
    with served(home) as (process, url):
        address = f"{issuer}@{url}"
        applied = command(franchise, "enroll", address, "--contact", "ada", "--yes")
        assert applied["state"] == "waiting"
        command(home, "approve", account, "--yes")
        assert command(franchise, "enroll", address)["waits_for"] == "the fee"
        assert command(franchise, "verify", address)["attestation"] == 0
        command(home, "paid", account, "10", "--reference", "1", "--yes")
        assert command(franchise, "enroll", address)["state"] == "attested"
        assert command(franchise, "verify", address)["attestation"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    command(franchise, "verify", address, code=4)


def main(path: str, stride: str) -> None:
    print(kill_everywhere(Path(path), int(stride)))


if __name__ == "__main__":
    main(*sys.argv[1:])
