"""What is said to a provider outside a conversation: one thing, on a stream of its own."""

from __future__ import annotations

import logging
from typing import Final

import msgspec
import trio

from p2pflop.dht.planes import Dialer
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.node import messages as m
from p2pflop.node.printable import printable

JOB_PROTOCOL: Final = "/p2pflop/job/1"
LETTER_ROW: Final = "letter"
FAREWELL_S: Final = 3.0
WORD_S: Final = 10.0
MAX_WORDS_HEARD: Final = 64

_log = logging.getLogger(__name__)


class Letter(msgspec.Struct, array_like=True, frozen=True):
    """The newest countersignature of a run that is over, for a provider that has not acknowledged
    it: what is signed is owed, however the run ended."""

    peer: str
    wire: bytes


async def leave_word(dialer: Dialer, peer: str, message: m.Message) -> bool:
    """Say one thing on a stream of its own; whether it was answered with ``Settled``."""
    with trio.move_on_after(WORD_S):
        try:
            stream = await dialer.open(peer, JOB_PROTOCOL)
            try:
                await stream.send(m.encode_message(message))
                for _ in range(MAX_WORDS_HEARD):
                    if isinstance(m.decode_message(await stream.receive(), peer), m.Settled):
                        return True
            finally:
                with trio.CancelScope(deadline=trio.current_time() + FAREWELL_S, shield=True):
                    await stream.aclose()
        except (ProviderError, ProtocolError) as error:
            _log.debug("%s was not told: %s", peer, printable(error))
    return False
