"""What the journal has of a lease of a session, on either side: the summary of its head.

A session itself is not kept; what its leases owe is. The newest receipt, and the newest that is
countersigned, stand in one record that each commit replaces, so that a lease of days takes no more
room than one of seconds. Whatever is signed is in it before it leaves this node.
"""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec.structs import replace

from p2pflop.market.records import Bid, Fill, Receipt
from p2pflop.node.journal import Journal
from p2pflop.node.messages import Envelope
from p2pflop.wire import Key, Record, Sealed, decode, encode, reopen

SESSION_BUYER: Final = "session-buyer"
SESSION_PROVIDER: Final = "session-provider"


class LeaseState(Record, frozen=True):
    """Envelopes; empty where there is none yet. ``account`` is the other side's."""

    MAX_BYTES: ClassVar[int] = 512 * 1024

    account: Key
    bid: Envelope
    fill: Envelope = b""
    receipt: Envelope = b""
    countersigned: Envelope = b""

    def encode(self) -> bytes:
        """For the head of the lease."""
        return encode(self)

    def signed(self, wire: bytes) -> LeaseState:
        """This, with ``wire`` countersigned."""
        return replace(self, countersigned=wire)

    def open_bid(self, network: str) -> Sealed[Bid]:
        """The bid."""
        return reopen(Bid, self.bid, network)

    def open_fill(self, network: str) -> Sealed[Fill]:
        """The fill, which there must be."""
        return reopen(Fill, self.fill, network)

    def open_receipt(self, network: str) -> Receipt | None:
        """The newest receipt of the provider."""
        return reopen(Receipt, self.receipt, network).record if self.receipt else None

    def signed_receipt(self, network: str) -> Receipt | None:
        """The newest receipt that is countersigned."""
        return reopen(Receipt, self.countersigned, network).record if self.countersigned else None


def lease_state(summary: bytes) -> LeaseState:
    """What a head's summary says. Raises ProtocolError if it is damaged."""
    return decode(LeaseState, summary)


def session_receipts(journal: Journal, network: str) -> list[Receipt]:
    """The countersigned receipts of the newest leases of sessions, on both sides."""
    heads = [*journal.heads(SESSION_BUYER), *journal.heads(SESSION_PROVIDER)]
    signed = (lease_state(head.summary).signed_receipt(network) for head in heads)
    return [receipt for receipt in signed if receipt is not None]
