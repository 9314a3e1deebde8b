"""multistream-select 1.0: how both ends of a new stream agree on its protocol.

The one that opens proposes, the other echoes or answers ``na``. The proposal travels with the
first bytes of the conversation, and the echo with the first answer, so a protocol that a connection
is known to answer costs neither a round trip nor a packet; the echo is checked when that answer is
read. Protocols of libp2p's own, which other implementations speak, get theirs at once.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.node.mux import MuxStream

MAX_LINE_BYTES: Final = 1024
_VERSION: Final = "/multistream/1.0.0"


def encode_line(text: str) -> bytes:
    """A line as it travels: its length as a varint, its bytes, a newline."""
    body = text.encode() + b"\n"
    if len(body) > MAX_LINE_BYTES:
        raise ValueError(f"a protocol name of {len(body)} bytes")
    if len(body) < 128:
        return bytes([len(body)]) + body
    return bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) + body


async def _read_line(stream: MuxStream) -> str:
    length = shift = 0
    while True:
        byte = (await _read_exactly(stream, 1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
        if shift > 14:
            raise ProtocolError("a protocol name without end")
    if not 0 < length <= MAX_LINE_BYTES:
        raise ProtocolError(f"a protocol name of {length} bytes")
    line = await _read_exactly(stream, length)
    try:
        return line.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ProtocolError("a protocol name that is not text") from error


async def _read_exactly(stream: MuxStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.read(size - len(data))
        if not part:
            raise ProtocolError("the peer opened a stream and said nothing")
        data += part
    return data


async def answer(
    stream: MuxStream, known: Container[str], own: Container[str] = frozenset()
) -> str | None:
    """Agree, as the one who did not open ``stream``, on one of the ``known`` protocols.

    Who has gone on to speak one of our ``own`` does not wait for the echo. None if another one was
    proposed, which the peer was then told. Raises ProtocolError or ProviderError.
    """
    if await _read_line(stream) != _VERSION:
        raise ProtocolError("the peer does not speak multistream-select")
    greeting = encode_line(_VERSION)
    if not stream.buffered_bytes:  # some wait for the greeting before they propose
        await stream.write(greeting)
        greeting = b""
    proposed = await _read_line(stream)
    if proposed in known:
        echo = greeting + encode_line(proposed)
        if proposed in own and stream.buffered_bytes:
            stream.write_soon(echo, before_waiting=False)
        else:
            await stream.write(echo)
        return proposed
    await stream.write(greeting + encode_line("na"))
    return None


class ProposedStream:
    """A ByteStream that begins by proposing a protocol. See ``p2pflop.dht.planes``."""

    def __init__(self, stream: MuxStream, peer: str, protocol: str) -> None:
        self._stream = stream
        self._peer = peer
        self._protocol = protocol
        self._proposal = encode_line(_VERSION) + encode_line(protocol)
        self._echo = b""
        stream.write_soon(self._proposal, before_waiting=True)

    async def confirm(self) -> None:
        """Wait until the peer has agreed. Raises ProviderError if it does not."""
        while len(self._echo) < len(self._proposal):
            part = await self._stream.read(len(self._proposal) - len(self._echo))
            self._echo += part
            if not part or not self._proposal.startswith(self._echo):
                self._stream.reset()
                raise ProviderError(f"{self._peer} does not answer {self._protocol}")

    async def read(self, n: int) -> bytes:
        if len(self._echo) < len(self._proposal):
            await self.confirm()
        return await self._stream.read(n)

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()
