"""Paying and being paid: the words of this account about money, kept, brought and heard.

Each word is signed, booked and put on disk in one commit (``payment_book``), then brought to a node
of the other account until that has noted it, over restarts too, however long that takes: a day's
patience would be too short for money. Pauses between attempts grow, and end when such a node
connects. The words are ``p2pflop.market.payments``, the stream is ``payment_stream``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import trio

from p2pflop.dht.database import Operation
from p2pflop.dht.planes import Dialer, Stream
from p2pflop.errors import ConfigError, ProtocolError, ProviderError, StoreError
from p2pflop.keys import peer_id
from p2pflop.market.payments import (
    MAX_PAYMENT_NUSD,
    MAX_TEXT_CHARS,
    OpenPayment,
    P,
    PaymentAck,
    PaymentClaim,
    PaymentRefusal,
    check_payment,
    is_plain,
    make_payment,
)
from p2pflop.market.records import Rejected
from p2pflop.node import payment_stream as stream_words
from p2pflop.node.guard import survive
from p2pflop.node.identity import Identity
from p2pflop.node.ledger_book import LedgerBook, Write
from p2pflop.node.payment_book import Payment, PaymentBook, Side, State
from p2pflop.node.payment_stream import Acknowledged, Answer, Claimed, Declined, Noted, Refused
from p2pflop.node.printable import printable
from p2pflop.node.service import Json
from p2pflop.units import NS_PER_S, NUSD_PER_USD, format_usd
from p2pflop.wire import encode

MAX_CLAIMS: Final = 1024
"""That wait here for an answer."""
MAX_STRANGERS_CLAIMS: Final = 256
"""Of these, by accounts that owe nothing: the rest is for those that do."""
MAX_CLAIMS_PER_ACCOUNT: Final = 16
MAX_UNASKED_A_DAY: Final = 32
"""Acks of one account without a claim that are booked here."""
MAX_UNASKED_AHEAD_NUSD: Final = 10 * NUSD_PER_USD
"""How much of what such acks say may have been paid ahead, beyond what is owed to the account."""
MAX_UNTOLD: Final = 256
"""Words under way to others; more are not said."""
MAX_STREAMS: Final = 32
"""On which peers are heard at once."""
MAX_STREAMS_PER_PEER: Final = 4
MAX_NODES_TRIED: Final = 8
AGAIN_S: Final = 1.0
MAX_AGAIN_S: Final = 300.0
DAY_NS: Final = 24 * 3600 * NS_PER_S

_log = logging.getLogger(__name__)


class Payments:
    """All payments of this node's account, both ways.

    ``nodes_of`` gives the nodes of an account that the order book knows now, by their keys.
    """

    def __init__(
        self,
        identity: Identity,
        book: PaymentBook,
        ledger_book: LedgerBook,
        dialer: Dialer,
        nodes_of: Callable[[bytes], Iterable[bytes]],
        nursery: trio.Nursery,
        now_ns: Callable[[], int],
    ) -> None:
        self._identity = identity
        self._book = book
        self._ledger_book = ledger_book
        self._dialer = dialer
        self._nodes_of = nodes_of
        self._nursery = nursery
        self._now_ns = now_ns
        self._lock = trio.Lock()
        self._streams: Counter[str] = Counter()
        self._under_way: set[bytes] = set()
        self._troubles: dict[bytes, str] = {}
        self._peers: dict[bytes, frozenset[str]] = {}
        self._met: dict[bytes, trio.Event] = {}

    def resume(self) -> None:
        """Bring what a restart found."""
        for payment in self._book.untold():
            self._bring(payment)

    def met(self, peer: str) -> None:
        """A peer has connected: what is for it is brought at once. What is for nobody known yet
        is tried soon, since its sheet may follow."""
        for payment, met in self._met.items():
            peers = self._peers.get(payment)
            if not peers or peer in peers:
                met.set()

    def listed(self) -> list[Json]:
        """Payments both ways: claims that wait here, by those who owe something first, then the
        others, newest first."""
        payments = self._book.listed()
        waiting = [payment for payment in payments if _waits(payment)]
        waiting.sort(key=lambda payment: self._ledger_book.due_nusd(payment.account) <= 0)
        return [self._describe(payment) for payment in waiting + payments[len(waiting) :]]

    # What this account says

    async def pay(self, payment: bytes, account: bytes, amount_nusd: int, reference: str) -> Json:
        """Book money given to ``account`` and claim it. The same ``payment`` again does nothing.

        Raises ConfigError for what is no payment, or another one under the same id; StoreError.
        """
        self._check(account, amount_nusd, reference)
        async with self._lock:
            known = self._book.get(payment)
            if known is None:
                self._check_room()
                known = self._say(
                    PaymentClaim,
                    self._new(payment, Side.PAID, account, amount_nusd, reference),
                    reference,
                )
                await self._book_paid(known)
                self._bring(known)
            elif not known.is_same(Side.PAID, account, amount_nusd):
                raise ConfigError(f"payment {payment.hex()} is another one")
            return self._describe(known)

    async def receive(
        self, payment: bytes, account: bytes, amount_nusd: int, reference: str
    ) -> Json:
        """Book and acknowledge money from ``account`` that it has not claimed; else as above."""
        self._check(account, amount_nusd, reference)
        async with self._lock:
            known = self._book.get(payment)
            if known is None:
                known = await self._acknowledge(
                    self._new(payment, Side.RECEIVED, account, amount_nusd, reference)
                )
            elif not known.is_same(Side.RECEIVED, account, amount_nusd):
                raise ConfigError(f"payment {payment.hex()} is another one")
            return self._describe(known)

    async def acknowledge(self, payment: bytes) -> Json:
        """Book and acknowledge what was claimed here. Raises ConfigError if it was refused."""
        async with self._lock:
            known = self._received(payment)
            if known.state is State.REFUSED:
                raise ConfigError(
                    f"payment {payment.hex()} was refused",
                    hint="If the money came after all: p2pflop received ACCOUNT USD.",
                )
            if known.state is State.CLAIMED:
                known = await self._acknowledge(known)
            return self._describe(known)

    async def refuse(self, payment: bytes, reason: str) -> Json:
        """Say that what was claimed here did not come. Raises ConfigError if it is acknowledged."""
        self._check_text(reason)
        async with self._lock:
            known = self._received(payment)
            if known.state is State.ACKNOWLEDGED:
                raise ConfigError(f"payment {payment.hex()} was acknowledged, and stays so")
            if known.state is State.CLAIMED:
                self._check_room()
                refused = replace(known, state=State.REFUSED, reason=reason)
                known = self._say(PaymentRefusal, refused, reason)
                await self._book.put(known)
                self._bring(known)
            return self._describe(known)

    async def _acknowledge(self, payment: Payment) -> Payment:
        self._check_room()
        acknowledged = replace(payment, state=State.ACKNOWLEDGED)
        known = self._say(PaymentAck, acknowledged, payment.reference)
        await self._ledger_book.received(
            known.id,
            known.account,
            known.amount_nusd,
            self._now_ns(),
            known.reference,
            self._write(known),
        )
        self._bring(known)
        return known

    def _say(self, kind: type[P], payment: Payment, text: str) -> Payment:
        at_ns = self._now_ns()
        wire = make_payment(
            kind,
            self._identity.node,
            payment=payment.id,
            other=payment.account,
            amount_nusd=payment.amount_nusd,
            at_ns=at_ns,
            text=text,
            delegation=self._identity.delegation(at_ns),
            network=self._identity.network,
        )
        return replace(payment, said=wire, told=False)

    def _received(self, payment: bytes) -> Payment:
        known = self._book.get(payment)
        if known is None or known.side is not Side.RECEIVED:
            raise ConfigError(
                f"nobody has claimed a payment {payment.hex()} here",
                hint="See 'p2pflop payments'. Without a claim: p2pflop received ACCOUNT USD.",
            )
        return known

    def _check(self, account: bytes, amount_nusd: int, reference: str) -> None:
        if account == self._identity.account.public_key:
            raise ConfigError("that is this node's own account, and nobody owes himself")
        if not 0 < amount_nusd <= MAX_PAYMENT_NUSD:
            raise ConfigError(
                f"a payment is of more than $0.00 and at most {format_usd(MAX_PAYMENT_NUSD)}"
            )
        self._check_text(reference)

    def _check_text(self, text: str) -> None:
        if not is_plain(text):
            raise ConfigError(
                f"a text about a payment is one line of at most {MAX_TEXT_CHARS} characters"
            )

    def _check_room(self) -> None:
        if len(self._under_way) >= MAX_UNTOLD:
            raise ConfigError(
                f"{MAX_UNTOLD} payments wait for their other side to be told",
                hint="See 'p2pflop payments' for those that do not answer.",
            )

    # What others say

    async def handle(self, stream: Stream) -> None:
        """Answer one stream. Raises ProtocolError, ProviderError for what the peer did."""
        peer, streams = stream.peer, self._streams
        if streams.total() >= MAX_STREAMS or streams[peer] >= MAX_STREAMS_PER_PEER:
            raise ProviderError("too many words about payments at once")
        streams[peer] += 1
        try:
            word = await stream_words.hear(stream)
            answer = await self._hear(word, peer)
            with trio.move_on_after(stream_words.WORD_S):
                await stream.send(encode(answer))
        finally:
            streams[peer] -= 1
            if not streams[peer]:
                del streams[peer]

    async def _hear(self, word: stream_words.Word, peer: str) -> Answer:
        if isinstance(word, Claimed):
            claim = self._open(PaymentClaim, word.claim, peer)
            return claim if isinstance(claim, Declined) else await self._hear_claim(claim)
        if isinstance(word, Acknowledged):
            ack = self._open(PaymentAck, word.ack, peer)
            return ack if isinstance(ack, Declined) else await self._hear_ack(ack)
        refusal = self._open(PaymentRefusal, word.refusal, peer)
        return refusal if isinstance(refusal, Declined) else await self._hear_refusal(refusal)

    def _open(self, kind: type[P], wire: bytes, peer: str) -> OpenPayment[P] | Declined:
        opened = check_payment(
            kind,
            wire,
            own=self._identity.account.public_key,
            now_ns=self._now_ns(),
            network=self._identity.network,
        )
        if isinstance(opened, Rejected):
            return Declined(opened.reason[:MAX_TEXT_CHARS])
        if peer_id(opened.sealed.signer) != peer:
            raise ProtocolError("a word about a payment that another peer signed", peer=peer)
        return opened

    async def _hear_claim(self, claim: OpenPayment[PaymentClaim]) -> Answer:
        record = claim.record
        async with self._lock:
            known = self._book.get(record.payment)
            if known is not None:
                same = known.is_same(Side.RECEIVED, claim.account, record.amount_nusd)
                return Noted() if same else Declined("another payment has that id")
            objection = self._objection_to_claim(claim.account)
            if objection:
                return Declined(objection)
            payment = self._new(
                record.payment, Side.RECEIVED, claim.account, record.amount_nusd, record.reference
            )
            await self._book.put(
                replace(payment, node=claim.sealed.signer, heard=claim.sealed.wire)
            )
        _log.info(
            "account %s says that it has paid %s: p2pflop payments",
            claim.account.hex()[:12],
            format_usd(record.amount_nusd),
        )
        return Noted()

    def _objection_to_claim(self, account: bytes) -> str:
        waiting = self._book.waiting()
        owes = self._ledger_book.due_nusd
        strangers = sum(count for other, count in waiting.items() if owes(other) <= 0)
        if waiting.get(account, 0) >= MAX_CLAIMS_PER_ACCOUNT:
            return f"{MAX_CLAIMS_PER_ACCOUNT} claims of your account wait already"
        if sum(waiting.values()) >= MAX_CLAIMS:
            return "too many claims wait already"
        if owes(account) <= 0 and strangers >= MAX_STRANGERS_CLAIMS:
            return "too many claims of accounts that owe nothing wait already"
        return ""

    async def _hear_ack(self, ack: OpenPayment[PaymentAck]) -> Answer:
        record = ack.record
        async with self._lock:
            known = self._book.get(record.payment)
            if known is None:
                return await self._hear_unasked(ack)
            if not known.is_same(Side.PAID, ack.account, record.amount_nusd):
                return Declined("another payment has that id")
            if known.state is State.REFUSED:
                return Declined("you have refused that payment")
            if known.state is State.CLAIMED:
                await self._book.put(_answered(known, ack, State.ACKNOWLEDGED))
            return Noted()

    async def _hear_unasked(self, ack: OpenPayment[PaymentAck]) -> Answer:
        """An ack without a claim lessens what is owed here, so it is believed of who was owed; of
        what it says beyond the debt, next to nothing: it would be money that nobody here paid."""
        record, account = ack.record, ack.account
        if not self._ledger_book.has_traded_with(account):
            return Declined("nothing was ever owed to your account here")
        since_ns = self._now_ns() - DAY_NS
        if self._book.count_unasked(account, since_ns) >= MAX_UNASKED_A_DAY:
            return Declined(f"{MAX_UNASKED_A_DAY} payments that nobody claimed in a day")
        ahead_nusd = self._ledger_book.due_nusd(account) + record.amount_nusd
        if ahead_nusd > MAX_UNASKED_AHEAD_NUSD:
            return Declined("more than is owed to your account here; it has to be claimed first")
        payment = self._new(
            record.payment, Side.PAID, account, record.amount_nusd, record.reference
        )
        await self._book_paid(_answered(payment, ack, State.ACKNOWLEDGED))
        return Noted()

    async def _hear_refusal(self, refusal: OpenPayment[PaymentRefusal]) -> Answer:
        record = refusal.record
        async with self._lock:
            known = self._book.get(record.payment)
            if known is None:
                return Declined("no such payment is known here")
            if not known.is_same(Side.PAID, refusal.account, record.amount_nusd):
                return Declined("another payment has that id")
            if known.state is State.ACKNOWLEDGED:
                return Declined("you have acknowledged that payment")
            if known.state is State.CLAIMED:
                refused = replace(_answered(known, refusal, State.REFUSED), reason=record.reason)
                await self._ledger_book.returned(
                    known.id,
                    known.account,
                    known.amount_nusd,
                    self._now_ns(),
                    record.reason,
                    self._write(refused),
                )
        return Noted()

    # Bringing

    def _bring(self, payment: Payment) -> None:
        if payment.id not in self._under_way:
            self._under_way.add(payment.id)
            self._nursery.start_soon(survive, self._deliver, payment.id)

    async def _deliver(self, payment: bytes) -> None:
        wait_s = AGAIN_S
        try:
            while True:
                met = self._met[payment] = trio.Event()
                trouble = await self._try(payment)
                if not trouble:
                    return
                if self._troubles.get(payment) != trouble:
                    _log.info("payment %s is not told yet: %s", payment.hex()[:12], trouble)
                self._troubles[payment] = trouble
                await trio.sleep(AGAIN_S)  # at least: whoever comes and goes costs no more
                with trio.move_on_after(wait_s - AGAIN_S):
                    await met.wait()
                wait_s = AGAIN_S if met.is_set() else min(2 * wait_s, MAX_AGAIN_S)
        finally:
            self._under_way.discard(payment)
            self._met.pop(payment, None)
            self._peers.pop(payment, None)
            self._troubles.pop(payment, None)

    async def _try(self, payment: bytes) -> str:
        """Bring the latest word of this node; why that failed, or nothing."""
        trouble = "no node of that account is known"
        try:
            known = self._book.get(payment)
            if known is None or known.told:
                return ""
            candidates = self._candidates(known)
            self._peers[payment] = frozenset(peer_id(node) for node in candidates)
            for node in candidates:
                trouble = await self._tell(payment, node)
                pinned = self._book.get(payment)
                if not trouble or (pinned is not None and pinned.node):
                    break
        except StoreError as error:
            return error.message
        return trouble

    async def _tell(self, payment: bytes, node: bytes) -> str:
        peer = peer_id(node)
        with trio.move_on_after(stream_words.WORD_S):
            try:
                stream = await self._dialer.open(peer, stream_words.PROTOCOL)
                try:
                    word = _word(await self._pin(payment, node))
                    answer = await stream_words.ask(stream, word)
                finally:
                    await stream_words.close(stream)
            except (ProviderError, ProtocolError) as error:
                return printable(error)
            if isinstance(answer, Declined):
                return f"{peer} does not note it: {printable(answer.reason)}"
            await self._note_told(payment)
            return ""
        return f"{peer} did not answer in {stream_words.WORD_S:.0f} s"

    def _candidates(self, payment: Payment) -> list[bytes]:
        """Where the word may go. Once one node has heard it, to no other: each has its own book."""
        if payment.node:
            return [payment.node]
        account = payment.account
        known = self._ledger_book.nodes_of(account) + self._book.nodes_of(account)
        present = list(self._nodes_of(account))
        first = [node for node in known if node in present]
        return list(dict.fromkeys(first + known + present))[:MAX_NODES_TRIED]

    async def _pin(self, payment: bytes, node: bytes) -> Payment:
        """Remember where the word goes, before it does."""
        async with self._lock:
            known = self._book.get(payment)
            if known is None:
                raise StoreError(f"payment {payment.hex()} is gone")
            if not known.node:
                known = replace(known, node=node)
                await self._book.put(known)
            return known

    async def _note_told(self, payment: bytes) -> None:
        """Also of a claim that was answered before the note that it had arrived."""
        async with self._lock:
            known = self._book.get(payment)
            if known is not None and not known.told:
                await self._book.put(replace(known, told=True))

    def _new(
        self, payment: bytes, side: Side, account: bytes, amount_nusd: int, reference: str
    ) -> Payment:
        at_ns = self._now_ns()
        return Payment(payment, side, account, amount_nusd, at_ns, reference, State.CLAIMED)

    async def _book_paid(self, payment: Payment) -> None:
        await self._ledger_book.paid(
            payment.id,
            payment.account,
            payment.amount_nusd,
            payment.at_ns,
            payment.reference,
            self._write(payment),
        )

    def _write(self, payment: Payment) -> Write:
        async def write(entry: Operation | None) -> None:
            await self._book.put(payment, entry)

        return write

    def _describe(self, payment: Payment) -> Json:
        return {
            "id": payment.id.hex(),
            "side": payment.side.value,
            "account": payment.account.hex(),
            "amount_nusd": payment.amount_nusd,
            "at_ns": payment.at_ns,
            "reference": payment.reference,
            "state": payment.state.value,
            "reason": payment.reason,
            "told": payment.told,
            "trouble": "" if payment.told else self._troubles.get(payment.id, ""),
            "said": payment.said.hex(),
            "heard": payment.heard.hex(),
        }


def _waits(payment: Payment) -> bool:
    return payment.state is State.CLAIMED and payment.side is Side.RECEIVED


def _word(payment: Payment) -> stream_words.Word:
    if payment.state is State.CLAIMED:
        return Claimed(payment.said)
    return (Acknowledged if payment.state is State.ACKNOWLEDGED else Refused)(payment.said)


def _answered(
    payment: Payment, answer: OpenPayment[PaymentAck] | OpenPayment[PaymentRefusal], state: State
) -> Payment:
    """A claim that was answered has arrived, whether or not that was told."""
    return replace(
        payment, state=state, told=True, node=answer.sealed.signer, heard=answer.sealed.wire
    )
