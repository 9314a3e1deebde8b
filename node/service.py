"""What the HTTP API asks of the node behind it, and the words in which the two speak.

``NodeService`` is the seam: ``node.main`` implements it for real, a test in memory. Everything that
crosses it towards the client is JSON in Python: dicts, lists, strings, numbers, None; hashes and
addresses as 64 hex digits, money as integer nano-dollars, times as integer nanoseconds.

A **run** is one submission of a job file to this node, or the **session** of one script: then its
``kind`` is ``session``, and a step is a command. It tells its story as **events**: dicts with
``seq`` (from 1, rising by one), ``at_ns`` (Unix time), ``kind``, and by kind:

=============== ===================================================================================
kind            fields
=============== ===================================================================================
``state``       ``state``: the buyer's lifecycle state; of a session ``leased``, ``idle`` after a
                pause in which it gave its lease back, ``waiting`` for a provider
``ranked``      ``deals``: ``[{provider, account, total_nusd, minutes, price_nusd}]`` best first,
                ``misses``: ``[{provider, reason}]``; of an account that is avoided because it
                failed also ``avoided_until_ns`` and ``failures``; over a limit of its ask also
                ``told`` in words and ``over``: ``{limit, job, ask}``
``resting``     ``limit_nusd``: the most that the wish would pay, ``deadline_ns``: until when
``filled``      ``provider``, ``quote_nusd``, ``first_step``: where its stretch begins,
                ``prepaid_nusd``: what is paid ahead to its account
``rejected``    ``provider``, ``reason`` (a peer's own words: clean them before a terminal)
``resubmitted`` ``provider``: the one that is lost, ``reason``, ``step``: how far its rows went,
                ``from_step``: where the run goes on, ``next``: the provider that is asked now, or
                nothing while the run waits
``fetching``    ``done_bytes``, ``total_bytes``
``lowering``    ``done``, ``total``, ``graph``
``rows``        ``rows``: ``[{step, values: {name: number}}]``, steps rising
``progress``    ``step``, ``steps``: the one that the run ends with
``checkpoint``  ``step``, ``state_root``
``receipt``     ``number``, ``amount_nusd``, ``to_step``, ``provider``
``result``      ``hash``: of the record, ``cost_nusd``, ``earlier``: the run whose result it is, if
                it was bought before; last
``failed``      ``error``: the name of the error's class, ``message``, ``hint``, ``cost_nusd``: what
                was delivered until then; last
``closed``      ``cost_nusd``, ``flop``, ``moved_bytes``, ``busy_ns``: a session whose script is
                done; last
``cancelled``   ``cost_nusd``, ``hint``: how to go on from the last checkpoint; last
=============== ===================================================================================
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from p2pflop.errors import ConfigError

if TYPE_CHECKING:  # the client needs this module, and must not wait for trio
    from p2pflop.dht.blobs import BlobInfo, Store
    from p2pflop.node.session_script import ScriptLine

DEFAULT_FIND_TIMEOUT_S: Final = 30.0
MAX_FIND_TIMEOUT_S: Final = 600.0
MAX_DEADLINE_S: Final = 30 * 24 * 3600
LAST_EVENT_KINDS: Final = frozenset({"result", "failed", "cancelled", "closed"})

Json = dict[str, Any]

_RUN_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")


MAX_CLASSES: Final = 16
"""That one submission may name."""


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What a purchase may cost and how long it may take; None leaves it to the node's policy.

    ``checkpoint_steps`` is how many steps lie between two checkpoints, ``checkpoint_s`` after how
    many seconds without one there should be another (0: never). ``classes`` names the
    classes that it may be computed in: ids in hex, names of this machine's, or ``any`` alone; none
    are this node's own. ``fresh`` buys even what has been bought before. ``rest`` waits, as a wish
    in the order book, where no ask fits.
    ``run_id`` (12 hex digits) makes a submission safe to repeat: if that run exists, it is the one.
    """

    max_nusd: int | None = None
    deadline_s: int | None = None
    checkpoint_steps: int | None = None
    checkpoint_s: int | None = None
    classes: tuple[str, ...] = ()
    fresh: bool = False
    rest: bool = False
    run_id: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that are not whole."""
        for name in ("max_nusd", "deadline_s", "checkpoint_steps", "checkpoint_s"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(
                    f"{name}={value!r:.40} is not a whole number", hint=f"Use int: {name}=60."
                )


class NodeService(Protocol):
    """The node as its own user sees it. A run that is not known raises ConfigError."""

    @property
    def store(self) -> Store:
        """The blobs of this node."""

    async def status(self) -> Json:
        """Who and where this node is: ``peer``, ``account``, ``url``, ``version``, and more."""

    async def submit(
        self, body: bytes, options: SubmitOptions, inputs: Sequence[bytes] = ()
    ) -> str:
        """Journal a job file and start its run; the run's id. ``inputs`` of the job are kept with
        it. Raises JobError, MarketError, StoreError."""

    async def submit_pack(self, body: bytes, options: SubmitOptions) -> Json:
        """Buy variants of a job as one run (``p2pflop.job.variants``), whose id is the options'.

        ``known``: the lines of those that are here already; ``bought``: how many are not. Raises
        JobError, ProtocolError, ConfigError, MarketError.
        """

    async def unpack(self, run_id: str) -> list[Json]:
        """The lines of the variants of a pack that has settled, from now on runs of their own."""

    async def quote(self, body: bytes, options: SubmitOptions) -> Json:
        """What ``submit`` would choose from: ``deals`` and ``misses`` as in a ``ranked`` event."""

    async def jobs(self, *, parts: bool = False) -> list[Json]:
        """One line a run, newest first: ``id``, ``title``, ``state``, ``step``, ``steps``...
        ``cost_nusd`` is what it owes so far, or in the end, from its first receipt on.

        With ``parts`` also the jobs that were bought in a ``pack``, which is named by its id and
        has cost what they have together.

        Of a session ``kind``, which script it is of (``title``), ``provider``, ``account``,
        ``class_id``, ``cost_nusd`` of ``max_nusd``, ``commands``, of which ``step`` are obeyed,
        ``memory_bytes``, ``flop``, ``moved_bytes``, ``busy_ns``, ``submitted_ns``, ``ended_ns``.
        """

    async def sales(self) -> list[Json]:
        """What runs here for others: ``id`` of the bid, ``account``, ``state``, ``step`` of
        ``end_step``, ``signed_nusd`` of ``quote_nusd``.

        ``paused``: the work waits for the buyer to countersign what was delivered.
        """

    async def job(self, run_id: str) -> Json:
        """The line of ``jobs`` for one run, and all that is known beyond."""

    async def job_file(self, run_id: str) -> bytes:
        """The encoded job file that was submitted."""

    async def result_record(self, run_id: str) -> bytes:
        """The encoded ``Result``, whose hash is the result hash. Raises ConfigError before it."""

    async def evidence(self, run_id: str) -> bytes:
        """The encoded ``Evidence`` of how a run's providers were chosen."""

    def events(self, run_id: str, after_seq: int) -> AsyncIterator[list[Json]]:
        """The events after ``after_seq``, waiting for new ones; ends after the last kind.

        Those that are to be told together come together.
        """

    async def session(self, line: ScriptLine) -> None:
        """Serve the session of one script, to its end. Raises ConfigError, ProtocolError for what
        is no beginning of one, ProviderError if the script is gone."""

    async def cancel(self, run_id: str) -> None:
        """Give the run up. One that has ended stays as it is."""

    async def book(self) -> list[Json]:
        """The asks that this node knows."""

    async def wishes(self) -> list[Json]:
        """The wishes that this node knows, by class and limit; of its own it says so."""

    async def market(self) -> Json:
        """``classes``: of each the ``depth`` of its asks, ``last_nusd``, ``low_nusd``,
        ``high_nusd``, ``hour_gflop``, ``day_gflop`` and more of the tape; and ``take``, of the
        newest purchases and sales: ``fills``, ``paid_nusd``, ``got_nusd``, ``take_nusd``."""

    async def trades(self, since_ns: int) -> list[Json]:
        """The tape from the hour of that time on, newest hour first: ``id``, ``provider``,
        ``account``, ``own``, ``class_id``, ``price_nusd``, ``gflop``, ``hour_ns``."""

    def trade_events(self, after_seq: int) -> AsyncIterator[list[Json]]:
        """Trades as they come to the tape, as events of kind ``trade``; first those that came
        lately, after number ``after_seq``."""

    async def peers(self) -> list[Json]:
        """The peers that this node is connected to."""

    async def ledger(self) -> Json:
        """Who owes whom, the newest postings, and ``take`` as in ``market``."""

    async def statement(self, account: bytes, since_ns: int) -> Json:
        """All entries with an account from that time on, with balances. See ``node.statements``."""

    async def payments(self) -> list[Json]:
        """Payments both ways: ``id``, ``side``, ``account``, ``amount_nusd``, ``state`` ...

        ``side`` is ``paid`` or ``received``, ``state`` ``claimed``, ``acknowledged`` or
        ``refused``; ``told`` is whether the other side's node knows, ``trouble`` why not yet.
        """

    async def pay(self, payment: bytes, account: bytes, amount_nusd: int, reference: str) -> Json:
        """Book money given to an account and claim it; the payment. Raises ConfigError."""

    async def receive(
        self, payment: bytes, account: bytes, amount_nusd: int, reference: str
    ) -> Json:
        """Book and acknowledge money got that nobody has claimed; the payment."""

    async def acknowledge(self, payment: bytes) -> Json:
        """Book and acknowledge what was claimed here; the payment. Raises ConfigError."""

    async def refuse(self, payment: bytes, reason: str) -> Json:
        """Say that what was claimed here did not come; the payment. Raises ConfigError."""

    async def connect(self, multiaddr: str) -> Json:
        """Dial a peer; ``{"peer": id}``. Raises ConfigError, ProviderError."""

    async def find_blob(self, address: bytes, *, timeout_s: float) -> BlobInfo:
        """Have the blob in ``store``: from here, else from peers. Raises BlobNotFoundError."""

    async def set_public(self, address: bytes) -> None:
        """Announce and serve a blob of this node to anyone. Raises BlobNotFoundError."""

    async def delete_blob(self, address: bytes) -> BlobInfo:
        """Forget a blob of this node's own, public or not; what it was.

        Raises BlobNotFoundError; StoreError if it is a stranger's, or a job that
        runs here or a run under way needs it.
        """

    async def doctor(self) -> Json:
        """Versions, compiler, sandbox level, class, ports, and whatever is wrong with them."""


def check_run_id(text: str) -> str:
    """``text`` if it may be the id of a run. Raises ConfigError."""
    if _RUN_ID.fullmatch(text) is None:
        raise ConfigError(f"{text[:80]!r} is not the id of a run", hint="See 'p2pflop jobs'.")
    return text
