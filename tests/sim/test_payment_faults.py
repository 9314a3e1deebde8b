"""Payments when the power goes at any write, and when frames on their stream are not what was sent.

Whatever comes: no amount is lost or booked twice, and in the end both books say the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
import pytest
import trio

from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError, StoreError
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey
from p2pflop.market.payments import (
    MAX_PAYMENT_NUSD,
    PaymentAck,
    PaymentClaim,
    PaymentRefusal,
    make_payment,
)
from p2pflop.node import payment_stream as words
from p2pflop.node.memory_market import MemoryNode, PowerCutError, now_ns, sample_file
from p2pflop.node.payments import MAX_AGAIN_S
from p2pflop.wire import Envelope, encode, signed_bytes

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LONG_S = 2 * MAX_AGAIN_S
ID = content_hash(b"payment")

Deed = Callable[[MemoryNode], Awaitable[object]]


async def indebted(market: Market) -> tuple[MemoryNode, MemoryNode, int]:
    """Provider, buyer and what is owed after one purchase."""
    provider, buyer = await market.provider(), await market.buyer()
    await market.end_of(buyer, await buyer.submit(sample_file(3)))
    await trio.sleep(5)
    return provider, buyer, provider.ledger_book.due_nusd(buyer.account)


async def persist(market: Market, node: MemoryNode, deed: Deed) -> None:
    """What a person does: again when the power is back, until it is done."""
    for _ in range(3):
        if node.down.is_set():
            await market.restart(node)
        try:
            await deed(node)
        except PowerCutError:
            await node.kill()
        else:
            return
    raise AssertionError("it is never done")


async def power_up(market: Market) -> None:
    """Everybody runs, and has had the time to tell all."""
    await trio.sleep(5)
    for node in market.nodes:
        if node.down.is_set():
            await market.restart(node)
    await trio.sleep(LONG_S)


async def settle(market: Market, way: str, victim: str, at: int, *, before: bool) -> int:
    """One debt paid in a ``way``, the power gone at one write; how many writes there were."""
    provider, buyer, due = await indebted(market)
    node = {"buyer": buyer, "provider": provider}[victim]
    node.cut_at, node.cut_before = node.writes + at, before
    written = node.writes

    async def pay(node: MemoryNode) -> None:
        await node.money.pay(ID, provider.account, due, "invoice")

    async def receive(node: MemoryNode) -> None:
        await node.money.receive(ID, buyer.account, due, "cash")

    async def acknowledge(node: MemoryNode) -> None:
        await node.money.acknowledge(ID)

    async def refuse(node: MemoryNode) -> None:
        await node.money.refuse(ID, "no")

    if way == "unasked":
        await persist(market, provider, receive)
    else:
        await persist(market, buyer, pay)
        await power_up(market)
        await persist(market, provider, acknowledge if way == "acknowledged" else refuse)
    await power_up(market)
    state = "refused" if way == "refused" else "acknowledged"
    for each in (buyer, provider):
        [payment] = each.money.listed()
        assert (payment["state"], payment["told"]) == (state, True)
    assert node.cut_at is None or at > node.writes, "the power was never gone"
    left = due if way == "refused" else 0
    assert market.debts(buyer, provider) == (left, left)
    memos = sorted(entry["memo"] for entry in buyer.ledger_book.report()["entries"])
    mine = {"acknowledged": ["paid: invoice"], "unasked": ["paid: cash"]}.get(
        way, ["paid: invoice", "refused: no"]
    )
    assert memos == sorted([*mine, "work delivered"])
    market.check()
    writes = node.writes - written
    await market.close()
    return writes


@pytest.mark.parametrize("victim", ["buyer", "provider"])
@pytest.mark.parametrize("way", ["acknowledged", "refused", "unasked"])
async def test_a_power_cut_at_any_write_loses_and_doubles_nothing(
    market: Market, autojump_clock: object, way: str, victim: str
) -> None:
    writes = await settle(market.another(), way, victim, 10**6, before=False)
    assert writes >= (1 if (victim, way) == ("buyer", "unasked") else 2)
    for at in range(1, writes + 1):
        for before in (True, False):
            try:
                await settle(market.another(), way, victim, at, before=before)
            except Exception as error:
                raise AssertionError(f"write {at}, before {before}: {error!r}") from error


# Frames


def bent(frame: bytes) -> list[bytes]:
    place = len(frame) // 2
    return [frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :]]


def broken(_frame: bytes) -> list[bytes]:
    raise ProviderError("the network is gone")


CHANGES: dict[str, Callable[[bytes], list[bytes]]] = {
    "dropped": lambda _: [],
    "doubled": lambda frame: [frame, frame],
    "cut short": lambda frame: [frame[:-1]],
    "longer": lambda frame: [frame + b"\0"],
    "emptied": lambda _: [b""],
    "bent": bent,
    "broken": broken,
    "huge": lambda _: [bytes(words.MAX_WORD_BYTES + 1)],
    "deep": lambda _: [b"\x91" * 2000],
    "an answer": lambda _: [encode(words.Noted())],
    "a declined one": lambda _: [encode(words.Declined("no\x1b[2J" + "x" * 190))],
    "another kind": lambda frame: [b"\x92\x01" + frame[2:]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("heard", [False, True], ids=["sent", "heard"])
async def test_a_frame_that_is_not_what_was_sent_changes_nothing_in_the_end(
    market: Market, autojump_clock: object, change: Callable[[bytes], list[bytes]], heard: bool
) -> None:
    """Of the claim and of its answer, each by whoever brings it."""
    provider, buyer, due = await indebted(market)
    for node in (buyer, provider):
        setattr(node, "tamper_heard" if heard else "tamper_sent", change)
    await buyer.money.pay(ID, provider.account, due, "")
    await trio.sleep(60)
    for payment in buyer.money.listed():
        assert "\x1b" not in payment["trouble"]
    buyer.tamper_sent = buyer.tamper_heard = lambda frame: [frame]
    await trio.sleep(LONG_S)
    await provider.money.acknowledge(ID)
    await trio.sleep(60)
    provider.tamper_sent = provider.tamper_heard = lambda frame: [frame]
    await trio.sleep(LONG_S)
    for node in (buyer, provider):
        [payment] = node.money.listed()
        assert (payment["state"], payment["told"]) == ("acknowledged", True)
    assert market.debts(buyer, provider) == (0, 0)
    market.check()


def claim(by: MemoryNode, to: bytes, **changed: object) -> bytes:
    """A claim that is right but for what is ``changed``; a broken rule is signed all the same."""
    at_ns = now_ns()
    record = PaymentClaim(1, ID, to, 5, at_ns, "text", by.identity.delegation(at_ns))
    return sealed(msgspec.structs.replace(record, **changed), by.identity.node)


def sealed(record: PaymentClaim | PaymentAck, key: PrivateKey) -> bytes:
    body = encode(record)
    message = signed_bytes("main", record.KIND, key.public_key, body)
    return encode(Envelope(record.KIND, key.public_key, body, key.sign(message)))


async def say(node: MemoryNode, peer: str, word: words.Word) -> words.Answer:
    stream = await node.host.open(peer, words.PROTOCOL)
    try:
        return await words.ask(stream, word)
    finally:
        await stream.aclose()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"creditor": bytes(32)}, "another account"),
        ({"amount_nusd": 0}, "not a valid"),
        ({"amount_nusd": -5}, "not a valid"),
        ({"amount_nusd": MAX_PAYMENT_NUSD + 1}, "not a valid"),
        ({"reference": "two\nlines"}, "not printable"),
        ({"reference": "\N{RIGHT-TO-LEFT OVERRIDE}"}, "not printable"),
        ({"reference": "x" * 201}, "not a valid"),
        ({"at_ns": 2**62}, "from the future"),
        ({"at_ns": 1}, "delegation does not cover the time"),
        ({"delegation": b""}, "delegation"),
        ({"version": 2}, "not a valid"),
        ({"ext": ((1, b""),)}, "critical ext"),
    ],
)
async def test_a_claim_that_breaks_a_rule_is_declined_with_the_rule(
    market: Market, autojump_clock: object, changed: dict[str, object], reason: str
) -> None:
    provider, buyer, _ = await indebted(market)
    wire = claim(buyer, provider.account, **changed)
    answer = await say(buyer, provider.peer, words.Claimed(wire))
    assert isinstance(answer, words.Declined)
    assert reason in answer.reason
    assert provider.money.listed() == []


async def test_one_peer_does_not_speak_for_another(market: Market, autojump_clock: object) -> None:
    provider, buyer, _ = await indebted(market)
    thief = await market.node("thief")
    wire = claim(buyer, provider.account)
    with pytest.raises(P2PFlopError):
        await say(thief, provider.peer, words.Claimed(wire))
    stolen = claim(thief, provider.account, delegation=buyer.identity.delegation(now_ns()))
    answer = await say(thief, provider.peer, words.Claimed(stolen))
    assert answer == words.Declined("delegation names another node")
    assert provider.money.listed() == []


async def test_what_contradicts_the_book_is_declined(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await buyer.money.pay(ID, provider.account, due, "")
    await trio.sleep(5)
    other = claim(buyer, provider.account, amount_nusd=due + 1)
    twice = await say(buyer, provider.peer, words.Claimed(other))
    assert twice == words.Declined("another payment has that id")

    def ack(amount_nusd: int, kind: type[PaymentAck] = PaymentAck) -> words.Acknowledged:
        at_ns = now_ns()
        return words.Acknowledged(
            make_payment(
                kind,
                provider.identity.node,
                payment=ID,
                other=buyer.account,
                amount_nusd=amount_nusd,
                at_ns=at_ns,
                text="",
                delegation=provider.identity.delegation(at_ns),
            )
        )

    for amount_nusd in (due - 1, due + 1):
        answer = await say(provider, buyer.peer, ack(amount_nusd))
        assert answer == words.Declined("another payment has that id")
    assert market.debts(buyer, provider) == (0, due)
    for _ in range(2):
        assert await say(provider, buyer.peer, ack(due)) == words.Noted()
    answer = await say(provider, buyer.peer, ack(due - 1))
    assert answer == words.Declined("another payment has that id")
    await provider.money.acknowledge(ID)
    await trio.sleep(5)
    market.check()


async def test_a_refusal_stands_as_it_was_first_told(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await buyer.money.pay(ID, provider.account, due, "")
    await trio.sleep(5)
    at_ns = now_ns()
    for reason in ("the first", "another"):
        refusal = make_payment(
            PaymentRefusal,
            provider.identity.node,
            payment=ID,
            other=buyer.account,
            amount_nusd=due,
            at_ns=at_ns,
            text=reason,
            delegation=provider.identity.delegation(at_ns),
        )
        assert await say(provider, buyer.peer, words.Refused(refusal)) == words.Noted()
        assert buyer.money.listed()[0]["reason"] == "the first"
    assert market.debts(buyer, provider) == (due, due)


async def test_an_answer_shows_that_the_claim_has_arrived(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    buyer.tamper_heard = lambda _: []
    await buyer.money.pay(ID, provider.account, due, "")
    await trio.sleep(60)
    assert not buyer.money.listed()[0]["told"]
    await provider.money.acknowledge(ID)
    await trio.sleep(LONG_S)
    [payment] = buyer.money.listed()
    assert (payment["state"], payment["told"], payment["trouble"]) == ("acknowledged", True, "")
    market.check()


async def test_a_claim_goes_to_one_node_of_an_account_alone(
    market: Market, autojump_clock: object
) -> None:
    """Each node has a book of its own: two that acknowledge it would both have the money."""
    nodes = [await market.provider(name, account="provider") for name in ("one", "two")]
    buyer = await market.buyer()
    buyer.tamper_heard = lambda _: []
    await buyer.money.pay(ID, nodes[0].account, 5, "ahead")
    await trio.sleep(LONG_S)
    assert sorted(len(node.money.listed()) for node in nodes) == [0, 1]
    buyer.tamper_heard = lambda frame: [frame]
    await trio.sleep(LONG_S)
    assert buyer.money.listed()[0]["told"]
    assert sorted(len(node.money.listed()) for node in nodes) == [0, 1]


async def test_a_node_that_is_away_gives_way_to_another_of_its_account(
    market: Market, autojump_clock: object
) -> None:
    nodes = [await market.provider(name, account="provider") for name in ("one", "two")]
    buyer = await market.buyer()
    await nodes[0].kill()
    await buyer.money.pay(ID, nodes[0].account, 5, "ahead")
    await trio.sleep(LONG_S)
    assert buyer.money.listed()[0]["told"]
    assert len(nodes[1].money.listed()) == 1


async def test_a_disk_that_fails_for_a_while_only_delays(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, due = await indebted(market)
    await provider.kill()
    await buyer.money.pay(ID, provider.account, due, "")

    async def full(*_: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(buyer.payment_book, "put", full)
        await market.restart(provider)
        await trio.sleep(LONG_S)
        assert buyer.money.listed()[0]["trouble"] == "the disk is full"
    await trio.sleep(LONG_S)
    assert buyer.money.listed()[0]["told"]


async def test_a_silent_peer_is_not_waited_for(market: Market, autojump_clock: object) -> None:
    provider, buyer, _ = await indebted(market)
    stream = await buyer.host.open(provider.peer, words.PROTOCOL)
    with trio.fail_after(words.WORD_S + 5), pytest.raises(P2PFlopError):
        await stream.receive()
    await stream.aclose()


def test_words_and_answers_are_told_apart() -> None:
    with pytest.raises(ProtocolError, match="an answer to nothing"):
        words.decode_word(encode(words.Noted()), "peer")
    with pytest.raises(ProtocolError, match="no answer"):
        words.decode_answer(encode(words.Claimed(b"")), "peer")
    with pytest.raises(ProtocolError, match="one encoding"):
        words.decode_answer(b"\xdc\x00\x01\x03", "peer")
