"""What nodes tell each other about registries (``/p2pflop/<network>/franchise/1``).

::

    dialler                 listener
    Told           ->
                   <-       Told, with proofs for accounts that were ``wanted``

Everything in it is proved by signatures but for ``standing``, which is only for the reader's eyes,
and ``slots``, which counts only between nodes of one account.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.franchise.records import MAX_FORK_BYTES, MAX_PROOF_BYTES, MAX_RECORD_BYTES
from p2pflop.franchise.roll import MAX_ISSUERS
from p2pflop.units import KIB
from p2pflop.wire import MAX_ENVELOPE_OVERHEAD_BYTES, U32, Key, Record, Text

PROTOCOL: Final = "/p2pflop/franchise/1"
MAX_TOLD_BYTES: Final = 256 * KIB
MAX_TOLD_ATTESTATIONS: Final = 64
MAX_TOLD_REVOCATIONS: Final = 32
MAX_TOLD_FORKS: Final = 4
MAX_WANTED: Final = 64
MAX_DELEGATION_BYTES: Final = 512

_Wire = Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES)]
_Proof = Annotated[bytes, msgspec.Meta(max_length=MAX_PROOF_BYTES)]
_Fork = Annotated[bytes, msgspec.Meta(max_length=MAX_FORK_BYTES)]


class Told(Record, frozen=True, tag=0):
    """What one node knows that may be news to the other.

    ``delegation`` says whose node it is, ``slots`` how many jobs it would run at once; it trusts
    the registries ``trusts``, none if it is open. ``standing`` is why it leaves the other's asks
    out; empty if it does not. ``wanted`` are accounts of which it would like a proof.
    """

    MAX_BYTES: ClassVar[int] = MAX_TOLD_BYTES

    version: Literal[1]
    delegation: Annotated[bytes, msgspec.Meta(max_length=MAX_DELEGATION_BYTES)]
    slots: U32
    trusts: Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_ISSUERS)]
    standing: Text
    heads: Annotated[tuple[_Wire, ...], msgspec.Meta(max_length=MAX_ISSUERS)]
    attestations: Annotated[tuple[_Proof, ...], msgspec.Meta(max_length=MAX_TOLD_ATTESTATIONS)]
    revocations: Annotated[tuple[_Proof, ...], msgspec.Meta(max_length=MAX_TOLD_REVOCATIONS)]
    forks: Annotated[tuple[_Fork, ...], msgspec.Meta(max_length=MAX_TOLD_FORKS)]
    wanted: Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_WANTED)]
