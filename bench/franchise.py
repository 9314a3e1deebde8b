"""What the franchise costs a node: 10,000 proofs read from disk and verified at its start, a check
from what is known, and a strict ranking of 10,000 asks beside an open one.

The proofs are as a registry's pages tell them, a hundred under one head, and each is verified anew:
its head's signature, the way to the head, its own signature and its certificates'.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from p2pflop.franchise.merkle import inclusion_path
from p2pflop.franchise.records import Proof
from p2pflop.franchise.samples import SampleRegistry, key
from p2pflop.market.book import Book
from p2pflop.market.ranking import Policy, rank
from p2pflop.market.samples import NOW_NS, ask, need, party
from p2pflop.node.franchise import Franchise
from p2pflop.node.franchise_file import Changes, FranchiseFile
from p2pflop.wire import encode

ACCOUNTS = 10_000
PAGE = 100
CHECKS = 200_000
ROUNDS = 5


def proofs_of(registry: SampleRegistry, accounts: list[bytes]) -> list[bytes]:
    numbers = [registry.attest(account) for account in accounts]
    certificates = tuple(each.wire for each in registry.certificates)
    size, proofs = len(registry.tree), []
    for place, number in enumerate(numbers):
        if place % PAGE == 0:
            head = registry.head(at_ns=NOW_NS + place)
        path = tuple(inclusion_path(number, size, registry.tree.node))
        proofs.append(encode(Proof(1, registry.leaves[number], number, path, head, certificates)))
    return proofs


def franchise_of(registry: SampleRegistry) -> Franchise:
    issuer = registry.root.public_key
    return Franchise({issuer: ""}, key(1).public_key, key(2).public_key, lambda: NOW_NS)


async def restored(registry: SampleRegistry, changes: Changes) -> tuple[Franchise, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = FranchiseFile(Path(folder))
        await file.save(changes)
        found = franchise_of(registry)
        start = time.perf_counter()
        kept = file.read(found.roll.issuers)
        await trio.to_thread.run_sync(found.restore, kept)
        await file.forget_expired(found.roll)
        took_s = time.perf_counter() - start
        await file.aclose()
    return found, took_s


def check_us(made: Franchise, accounts: list[bytes]) -> float:
    start = time.process_time()
    for number in range(CHECKS):
        made.admits(accounts[number % len(accounts)], NOW_NS)
    return (time.process_time() - start) / CHECKS * 1e6


def ranking_ms(made: Franchise, book: Book, policy: Policy) -> float:
    view, wanted = book.view(NOW_NS), need()
    took = []
    for _ in range(ROUNDS):
        start = time.process_time()
        rank(view.sheets, wanted, policy, NOW_NS, made.admitted(NOW_NS))
        took.append(time.process_time() - start)
    return statistics.median(took) * 1e3


def main() -> None:
    registry = SampleRegistry()
    registry.publish()
    sellers = [party(number) for number in range(ACCOUNTS)]
    accounts = [seller.account.public_key for seller in sellers]
    changes = Changes()
    for account, proof in zip(accounts, proofs_of(registry, accounts), strict=True):
        changes.proofs[registry.root.public_key, False, account] = proof
    made, start_s = trio.run(restored, registry, changes)
    held = sum(made.is_attested(account, NOW_NS) for account in accounts)
    assert held == ACCOUNTS, held
    book = Book(bytes(32), is_attested=made.is_attested, max_nodes=made.max_nodes)
    for seller in sellers:
        book.apply(seller.sheet(ask()), NOW_NS)
    start = time.process_time()
    book.expire(NOW_NS)
    regroup_ms = (time.process_time() - start) * 1e3
    figures: dict[str, Any] = {
        f"{ACCOUNTS} attestations read from disk and verified, s": round(start_s, 2),
        "check of an account, us": round(check_us(made, accounts), 2),
        f"{ACCOUNTS} asks ranked: open, ms": round(ranking_ms(made, book, Policy()), 1),
        f"{ACCOUNTS} asks ranked: strict, ms": round(
            ranking_ms(made, book, Policy(attested_only=True)), 1
        ),
        f"book of {ACCOUNTS} accounts looked through again, ms": round(regroup_ms, 1),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
