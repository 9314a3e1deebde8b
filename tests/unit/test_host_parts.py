"""Rates and protocol negotiation, by themselves."""

from __future__ import annotations

import pytest
import trio

from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.market.rates import MAX_BUCKETS, Rates, SharedRates
from p2pflop.node import multistream
from p2pflop.node.mux import MuxStream

NAME = "/p2pflop/main/job/1"
GREETING = b"\x13/multistream/1.0.0\n"
ECHO = GREETING + multistream.encode_line(NAME)


def test_a_burst_then_a_rate() -> None:
    rates = Rates(per_s=2.0, burst=3)
    assert [rates.allow("a", 10.0) for _ in range(4)] == [True, True, True, False]
    assert rates.allow("b", 10.0)
    assert rates.wait_s("a", 10.0) == pytest.approx(0.5)
    assert not rates.allow("a", 10.4)
    assert rates.allow("a", 10.5)
    assert not rates.allow("a", 10.5)


def test_a_rest_gives_no_more_than_the_burst() -> None:
    rates = Rates(per_s=2.0, burst=3)
    rates.allow("a", 0.0)
    assert [rates.allow("a", 1000.0) for _ in range(4)] == [True, True, True, False]


def test_rates_remember_a_bounded_number() -> None:
    rates = Rates(per_s=1.0, burst=1)
    for number in range(MAX_BUCKETS + 1):
        rates.allow(str(number), 0.0)
    assert len(rates) == MAX_BUCKETS
    assert rates.allow("0", 0.0)  # forgotten, so it starts afresh
    assert not rates.allow(str(MAX_BUCKETS), 0.0)


def test_a_flood_over_many_links_leaves_an_honest_one_its_own_share() -> None:
    shared = SharedRates(Rates(per_s=0.25, burst=1), Rates(per_s=10.0, burst=20))
    links, seconds = 40, 100
    flooded = honest = 0
    for tick in range(seconds * 4):
        now_s = tick / 4
        flooded += sum(
            shared.allow(f"link {number}", "sheets", now_s) for number in range(links) for _ in "ab"
        )
        if tick % 16 == 15:  # every four seconds, when the common share is used up
            honest += shared.allow("honest", "sheets", now_s)
    assert honest == seconds // 4
    assert flooded <= links * (1 + seconds * 0.25) + 20 + seconds * 10
    assert shared.allow("link 0", "trades", seconds), "what is common for one topic is its own"


class FakeStream:
    """Gives ``incoming`` in pieces of ``step`` bytes and keeps what is written."""

    def __init__(self, incoming: bytes, step: int = 1000) -> None:
        self.incoming = incoming
        self.written = b""
        self.soon = b""
        self.was_reset = False
        self._step = step

    @property
    def buffered_bytes(self) -> int:
        return len(self.incoming)

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        size = min(n, self._step)
        part, self.incoming = self.incoming[:size], self.incoming[size:]
        return part

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written += self.soon + data
        self.soon = b""

    def write_soon(self, data: bytes, *, before_waiting: bool) -> None:
        self.soon = data
        self.sends_before_waiting = before_waiting

    def reset(self) -> None:
        self.was_reset = True

    async def close(self) -> None:
        await self.write(b"")


def as_stream(fake: FakeStream) -> MuxStream:
    return fake  # type: ignore[return-value]


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_answering_a_known_protocol(step: int) -> None:
    fake = FakeStream(GREETING + multistream.encode_line(NAME) + b"data", step)
    assert await multistream.answer(as_stream(fake), {NAME}) == NAME
    assert fake.written == GREETING + multistream.encode_line(NAME)
    assert fake.incoming == b"data"


@pytest.mark.parametrize(("data", "soon"), [(b"", b""), (b"data", ECHO)])
async def test_who_speaks_on_gets_the_echo_with_the_first_answer(data: bytes, soon: bytes) -> None:
    fake = FakeStream(GREETING + multistream.encode_line(NAME) + data)
    assert await multistream.answer(as_stream(fake), {NAME}, {NAME}) == NAME
    assert fake.soon == soon
    await fake.write(b"answer")
    assert fake.written == ECHO + b"answer"
    assert not soon or not fake.sends_before_waiting


async def test_answering_an_unknown_protocol() -> None:
    fake = FakeStream(GREETING + multistream.encode_line("/other"))
    assert await multistream.answer(as_stream(fake), {NAME}) is None
    assert fake.written == GREETING + b"\x03na\n"


async def test_one_who_waits_for_the_greeting_gets_it() -> None:
    fake = FakeStream(GREETING)
    with pytest.raises(ProtocolError):
        await multistream.answer(as_stream(fake), {NAME})
    assert fake.written == GREETING


@pytest.mark.parametrize(
    "incoming",
    [
        b"",
        b"\x05/mult",
        b"\x04GET\n",
        b"\xff\xff\xff\xff\x7f",
        b"\x00",
        GREETING + b"\x03\xff\xfe\n",
        GREETING + b"\x81\x08" + b"x" * 1025,
        GREETING + b"\x80",
    ],
)
async def test_nonsense_is_a_protocol_error(incoming: bytes) -> None:
    with pytest.raises(ProtocolError):
        await multistream.answer(as_stream(FakeStream(incoming)), {NAME})


def test_the_length_of_a_name() -> None:
    assert multistream.encode_line("x" * 126) == b"\x7f" + b"x" * 126 + b"\n"
    assert multistream.encode_line("x" * 127) == b"\x80\x01" + b"x" * 127 + b"\n"
    assert len(multistream.encode_line("x" * (multistream.MAX_LINE_BYTES - 1))) == 1026
    with pytest.raises(ValueError, match="bytes"):
        multistream.encode_line("x" * multistream.MAX_LINE_BYTES)


@pytest.mark.parametrize("step", [1, 13, 1000])
async def test_a_proposal_travels_with_the_first_bytes(step: int) -> None:
    proposal = GREETING + multistream.encode_line(NAME)
    fake = FakeStream(proposal + b"answer", step)
    proposed = multistream.ProposedStream(as_stream(fake), "peer", NAME)
    assert fake.sends_before_waiting
    await proposed.write(b"ask")
    assert fake.written == proposal + b"ask"
    got = b""
    while len(got) < 6:
        got += await proposed.read(100)
    assert got == b"answer"


async def test_a_proposal_without_data_is_still_made() -> None:
    fake = FakeStream(b"")
    await multistream.ProposedStream(as_stream(fake), "peer", NAME).close()
    assert fake.written == GREETING + multistream.encode_line(NAME)


@pytest.mark.parametrize("reply", [GREETING + b"\x03na\n", b"", b"nonsense", GREETING])
async def test_a_refused_proposal_is_a_provider_error(reply: bytes) -> None:
    fake = FakeStream(reply)
    proposed = multistream.ProposedStream(as_stream(fake), "peer", NAME)
    with pytest.raises(ProviderError, match="does not answer"):
        await proposed.read(1)
    assert fake.was_reset
