"""Accounts that say about payments whatever might pay them: what they change is nothing of others'.

Each word is a valid record of the villain's own, or one of somebody else's that it has heard. Any
failure names the seed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

from p2pflop.errors import P2PFlopError
from p2pflop.ids import content_hash
from p2pflop.market.payments import (
    MAX_PAYMENT_NUSD,
    PaymentAck,
    PaymentClaim,
    PaymentRefusal,
    make_payment,
)
from p2pflop.node import payment_stream as words
from p2pflop.node.memory_market import MemoryNode, now_ns, sample_file
from p2pflop.node.payments import MAX_CLAIMS_PER_ACCOUNT, MAX_UNASKED_A_DAY
from tests.sim.test_payment_faults import LONG_S, say

if TYPE_CHECKING:
    from tests.sim.conftest import Market

WORDS = 300
P = TypeVar("P", PaymentClaim, PaymentAck, PaymentRefusal)
Heard = list[tuple[str, words.Word]]


class Villain:
    """A node whose words about payments are made up, replayed, or for others."""

    def __init__(self, node: MemoryNode, ids: list[bytes], seed: int) -> None:
        self.node = node
        self._random = random.Random(seed)  # noqa: S311 - not for secrets
        self._ids = ids
        self.noted = 0

    async def act(self, victims: list[MemoryNode], owed_nusd: int, heard: Heard) -> None:
        """One word to one of the victims, which may be refused or cut, and no more."""
        draw = self._random
        victim, others = draw.choice(victims), [*(v.account for v in victims), bytes(32)]
        word = self._word(draw.choice([victim.account, *others]), owed_nusd)
        if heard and draw.random() < 0.3:
            _, word = draw.choice(heard)
        try:
            answer = await say(self.node, victim.peer, word)
        except P2PFlopError:
            return
        self.noted += isinstance(answer, words.Noted)
        heard.append((self.node.peer, word))

    def _word(self, other: bytes, owed_nusd: int) -> words.Word:
        draw = self._random
        amounts = [1, owed_nusd, owed_nusd + 1, 10**6 * owed_nusd, MAX_PAYMENT_NUSD]
        spoken = {
            "payment": draw.choice([*self._ids, draw.randbytes(32)]),
            "other": other,
            "amount_nusd": draw.choice(amounts),
        }
        kind = draw.randrange(3)
        if kind == 0:
            return words.Claimed(self._say(PaymentClaim, spoken))
        if kind == 1:
            return words.Acknowledged(self._say(PaymentAck, spoken))
        return words.Refused(self._say(PaymentRefusal, spoken))

    def _say(self, kind: type[P], spoken: dict[str, Any]) -> bytes:
        at_ns, identity = now_ns(), self.node.identity
        delegation = identity.delegation(at_ns)
        return make_payment(
            kind, identity.node, at_ns=at_ns, text="", delegation=delegation, **spoken
        )


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_villains_change_nothing_between_others_and_gain_nothing(
    market: Market, autojump_clock: object, seed: int
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    nodes = [await market.buyer("debtor"), await market.node("stranger")]
    paid, ids = content_hash(b"paid"), [content_hash(b"%d" % number) for number in range(4)]
    villains = [Villain(node, ids, seed + place) for place, node in enumerate(nodes)]
    for number, each in enumerate((buyer, nodes[0])):
        await market.end_of(each, await each.submit(sample_file(3, seed=number)))
    await trio.sleep(5)
    due_nusd = [market.debts(each, provider)[1] for each in (buyer, nodes[0])]
    assert min(due_nusd) > 0
    heard: Heard = []
    for number in range(WORDS):
        if number == WORDS // 3:
            await buyer.money.pay(paid, provider.account, due_nusd[0], "")
            ids.append(paid)  # nobody can guess it before
            await trio.sleep(LONG_S)
        if number == 2 * WORDS // 3:
            await provider.money.acknowledge(paid)
            await trio.sleep(LONG_S)
        villain = villains[number % len(villains)]
        await villain.act([provider, buyer], due_nusd[1], heard)
        await trio.sleep(1)
    assert market.debts(buyer, provider) == (0, 0), seed
    owing_nusd = market.debts(nodes[0], provider)[1]
    assert owing_nusd >= due_nusd[1], f"seed {seed}: it may say that it got money, and owes that"
    assert provider.ledger_book.credit_nusd(nodes[0].account) == 0, seed
    for villain in villains:
        assert villain.noted, "some are words that anybody may say"
        for victim in (provider, buyer):
            claims = [
                p for p in victim.money.listed() if p["account"] == villain.node.account.hex()
            ]
            assert len(claims) <= MAX_CLAIMS_PER_ACCOUNT + MAX_UNASKED_A_DAY, seed
    await market.settle_down()
    for node in (provider, buyer):
        await node.kill()
        await market.restart(node)
    assert market.debts(buyer, provider) == (0, 0), seed
    assert market.debts(nodes[0], provider)[1] == owing_nusd, seed
