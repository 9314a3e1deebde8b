"""A synchronous client of the local node's HTTP API.

It finds the node through its home. A request that could not be delivered, because the node was
restarted or has gone, is tried once more at the address that the home tells then; with
``start=True`` an embedded node is started where none runs. An error of the node is raised here as
the same class of ``p2pflop.errors``.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from p2pflop.dht.manifest import CHUNK_BYTES, ManifestBuilder, address_of
from p2pflop.drafts import whole_file
from p2pflop.embedded import NodeNote, read_note, start_embedded
from p2pflop.errors import (
    NodeUnreachableError,
    ProtocolError,
    StoreError,
    VerificationError,
)
from p2pflop.ids import HASH_BYTES
from p2pflop.job.submission import Submission, encode_submission
from p2pflop.line import (
    Answer,
    Body,
    HttpLine,
    Line,
    LineError,
    NobodyThereError,
    Params,
    Request,
    SilenceError,
)
from p2pflop.node.config import default_home
from p2pflop.node.service import LAST_EVENT_KINDS, Json, SubmitOptions, check_run_id
from p2pflop.replies import error_of, lines, not_a_node, raise_for, read, whole_bytes
from p2pflop.uploads import Content, reader

MAX_RECONNECTS: Final = 8
FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class BlobStat:
    """A blob that the node keeps."""

    address: bytes
    size_bytes: int
    public: bool


class Client:
    """The node of one home, spoken to in blocking calls. Safe to keep; close it, or use ``with``.

    ``home`` is ``P2PFLOP_HOME`` or the user's data folder unless given. ``line`` makes what asks
    the node of a note.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        start: bool = False,
        line: Callable[[NodeNote], Line] = HttpLine,
    ) -> None:
        self.home = Path(home).expanduser() if home is not None else default_home()
        self._start = start
        self._make_line = line
        self._note: NodeNote | None = None
        self._line: Line | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def another(self) -> Client:
        """A client of the same node, for another thread."""
        return Client(self.home, start=self._start, line=self._make_line)

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        if self._line is not None:
            self._line.close()
            self._line = None

    # What the node knows

    def status(self) -> Json:
        """Peer, account, address and version of the node."""
        return self._json("GET", "/v1/status")

    def doctor(self) -> Json:
        """The node's own view of its health."""
        return self._json("GET", "/v1/doctor")

    def book(self) -> list[Json]:
        """The asks that the node knows."""
        return self._list("book")

    def wishes(self) -> list[Json]:
        """The wishes of buyers that the node knows, by class and limit."""
        return self._list("wishes")

    def market(self) -> Json:
        """``classes``: depth, last price and volume of each; and the ``take`` rate."""
        return self._json("GET", "/v1/market")

    def trades(self, since_ns: int = 0) -> list[Json]:
        """The tape from the hour of ``since_ns`` (Unix time) on, newest hour first."""
        params = {"since_ns": str(since_ns)}
        trades: list[Json] = self._json("GET", "/v1/trades", params=params)["trades"]
        return trades

    def trade_events(self, after: int = 0) -> Iterator[Json]:
        """Trades as they come to the tape, without end; first the latest after number ``after``.

        A lost connection is taken up again, ``MAX_RECONNECTS`` times in a row; then
        NodeUnreachableError.
        """
        failures = 0
        while True:
            try:
                for event in self._event_stream(
                    "GET", "/v1/trades/events", params={"after": str(after)}
                ):
                    failures, after = 0, int(event["seq"])
                    yield event
                reason = "it ended the connection"
            except (LineError, NodeUnreachableError) as error:
                reason = str(error)
            failures += 1
            if failures > MAX_RECONNECTS:
                raise self._unreachable(f"lost it while following its tape: {reason}")
            _pause(failures)

    def peers(self) -> list[Json]:
        """The peers that the node is connected to."""
        return self._list("peers")

    def ledger(self) -> Json:
        """Who owes whom."""
        return self._json("GET", "/v1/ledger")

    def statement(self, account: bytes, since_ns: int = 0) -> Json:
        """Every entry with ``account`` since then (Unix time), with opening and closing balance."""
        params = {"since_ns": str(since_ns)}
        return self._json("GET", f"/v1/statement/{account.hex()}", params=params)

    def payments(self) -> list[Json]:
        """Payments both ways; claims that wait for an answer here first."""
        return self._list("payments")

    def pay(
        self, account: bytes, amount_nusd: int, reference: str = "", *, payment: bytes = b""
    ) -> Json:
        """Book money given to ``account``, and claim it. Moves no money.

        Every call is another payment, but with the same ``payment``, an id of 32 random bytes.
        """
        return self._pay("/v1/payments", account, amount_nusd, reference, payment)

    def receive(
        self, account: bytes, amount_nusd: int, reference: str = "", *, payment: bytes = b""
    ) -> Json:
        """Book and acknowledge money got that nobody has claimed; ``payment`` as in ``pay``."""
        return self._pay("/v1/payments/received", account, amount_nusd, reference, payment)

    def acknowledge(self, payment: bytes) -> Json:
        """Book and acknowledge the money that a claim is about."""
        return self._json("POST", f"/v1/payments/{payment.hex()}/received")

    def refuse(self, payment: bytes, reason: str) -> Json:
        """Say that the money that a claim is about has not come."""
        content = json.dumps({"reason": reason}).encode()
        return self._json("POST", f"/v1/payments/{payment.hex()}/refused", content=content)

    def connect(self, multiaddr: str) -> Json:
        """Let the node dial a peer."""
        content = json.dumps({"multiaddr": multiaddr}).encode()
        return self._json("POST", "/v1/connect", content=content)

    # Runs

    def submit(self, body: bytes, options: SubmitOptions | None = None) -> str:
        """Submit an encoded job file; the id of its run."""
        reply = self._json("POST", "/v1/jobs", content=body, params=_params(options))
        return str(reply["id"])

    def submit_and_follow(
        self,
        body: bytes,
        options: SubmitOptions | None = None,
        *,
        inputs: Sequence[bytes] = (),
        wait_s: float | None = None,
    ) -> tuple[str, Iterator[Json]]:
        """Submit an encoded job file; the id of its run, and its events as ``events`` gives them.

        ``inputs`` of the job go along: such as ``job.submission.go_along`` names. It takes one
        exchange with the node where ``put``, ``submit`` and ``events`` take three. The events
        hold its connection, for ``wait_s`` at most, and let go of it when nobody has them any more.
        """
        stream = self._event_stream(
            *("POST", "/v1/jobs"),
            content=encode_submission(Submission(body, tuple(inputs))),
            params={**_params(options), **_wait(wait_s)},
            headers={"accept": "text/event-stream"},
        )
        opening = next(stream, {})
        if "id" not in opening:
            raise ProtocolError(
                "the node did not tell which run it has started",
                hint="Is it of another version? See 'p2pflop jobs'.",
            )
        run_id = check_run_id(str(opening["id"]))
        return run_id, self._follow(run_id, stream)

    def submit_pack(self, body: bytes, options: SubmitOptions) -> tuple[list[Json], int]:
        """Submit encoded ``Variants`` as one run: those that are known, and how many are not.

        If all are known there is no run.
        """
        reply = self._json("POST", "/v1/packs", content=body, params=_params(options))
        return list(reply["known"]), int(reply["bought"])

    def unpack(self, run_id: str) -> list[Json]:
        """The runs of the variants of a pack that has settled."""
        path = f"/v1/packs/{check_run_id(run_id)}/unpack"
        jobs: list[Json] = self._json("POST", path)["jobs"]
        return jobs

    def quote(self, body: bytes, options: SubmitOptions | None = None) -> Json:
        """``deals`` and ``misses`` that a submission would choose from."""
        return self._json("POST", "/v1/quote", content=body, params=_params(options))

    def jobs(self, *, parts: bool = False) -> list[Json]:
        """The runs of the node, newest first; with ``parts`` also those that were bought in a
        ``pack``, whose cost is a part of that of the run which it names."""
        return self._list("jobs?parts=1" if parts else "jobs")

    def sales(self) -> list[Json]:
        """What runs at the node for others, oldest first; ``paused`` waits for a signature."""
        return self._list("sales")

    def job(self, run_id: str) -> Json:
        """One run."""
        return self._json("GET", _run_path(run_id))

    def job_file(self, run_id: str) -> bytes:
        """The job file of a run, encoded."""
        return self._octets(_run_path(run_id, "/file"))

    def result_record(self, run_id: str) -> bytes:
        """The encoded ``Result`` of a run that has ended well."""
        return self._octets(_run_path(run_id, "/record"))

    def evidence(self, run_id: str) -> bytes:
        """The encoded ``Evidence`` of how a run's providers were chosen."""
        return self._octets(_run_path(run_id, "/evidence"))

    def cancel(self, run_id: str) -> Json:
        """Give a run up; how it stands then."""
        return self._json("POST", _run_path(run_id, "/cancel"))

    def events(
        self, run_id: str, after: int = 0, *, timeout_s: float | None = None
    ) -> Iterator[Json]:
        """The events of a run after number ``after``, as they come, up to its last one.

        A lost connection is taken up again after the last event seen, ``MAX_RECONNECTS`` times in
        a row; then NodeUnreachableError. TimeoutError after ``timeout_s``.
        """
        return self._follow(run_id, after=after, timeout_s=timeout_s)

    def _follow(
        self,
        run_id: str,
        stream: Iterator[Json] | None = None,
        *,
        after: int = 0,
        timeout_s: float | None = None,
    ) -> Iterator[Json]:
        """See ``events``. ``stream`` has the first of them, and may end before the run."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        failures, over = 0, False
        while True:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(f"run {run_id} did not end in {timeout_s} s; it goes on")
            asked = stream is None
            try:
                for event in stream or self._events_after(run_id, after, left_s):
                    failures = 0
                    after = int(event["seq"])
                    over = event["kind"] in LAST_EVENT_KINDS
                    yield event
                if over:
                    return  # the answer is read to its end, so the connection serves again
                stream = None
                if not asked or (deadline is not None and time.monotonic() >= deadline):
                    continue
                reason = "it ended the connection"
            except (LineError, NodeUnreachableError) as error:
                if over:
                    return
                stream, reason = None, str(error)
            failures += 1
            if failures > MAX_RECONNECTS:
                raise NodeUnreachableError(
                    f"lost the node while following run {run_id}: {reason}",
                    hint="The run is in its journal and goes on when the node runs again: "
                    f"start it, then 'p2pflop watch {run_id}'.",
                )
            _pause(failures)

    # Blobs

    def has(self, address: bytes) -> bool:
        """Whether the node itself keeps the blob."""
        with self._exchange("HEAD", f"/blob/{address.hex()}") as answer:
            if answer.status == HTTPStatus.NOT_FOUND:
                return False
            raise_for(answer)
            return True

    def blobs(self) -> list[BlobStat]:
        """The blobs that the node keeps."""
        return [_blob(item) for item in self._list("blobs")]

    def delete(self, address: bytes) -> BlobStat:
        """Let the node forget a blob of its own; what it was."""
        return _blob(self._json("DELETE", f"/blob/{address.hex()}"))

    def put(
        self, data: Content, *, public: bool = False, progress: Callable[[int], None] | None = None
    ) -> BlobStat:
        """Keep ``data``, or the contents of the file at a path, in the node's store."""
        params = {"public": "1" if public else "0"}
        content = reader(data, progress)
        return _blob(self._json("PUT", "/blob", content=content, params=params))

    def get(self, address: bytes, *, timeout_s: float | None = None) -> bytes:
        """The bytes of a blob, from this node or through it from others, verified here again."""
        data = b"".join(self._blob_stream(address, timeout_s))
        if address_of(data) != address:
            raise VerificationError(f"the node sent other bytes than blob {address.hex()}")
        return data

    def read_range(self, address: bytes, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes ``[start, stop)`` of a blob, as far as it has them, and its whole size.

        The node has verified them, they are not verified here again. Raises StoreError if the blob
        has none of them.
        """
        wanted = {"range": f"bytes={start}-{stop - 1}"}
        with self._exchange("GET", f"/blob/{address.hex()}", headers=wanted) as answer:
            size_bytes = whole_bytes(answer, start)
            return b"".join(self._pieces(answer, address)), size_bytes

    def download(
        self,
        address: bytes,
        out: Path,
        *,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Write a blob to ``out``, which appears only when it is whole and verified; its size.

        Raises as ``drafts.whole_file``, beside what ``get`` raises.
        """
        builder = ManifestBuilder()
        with whole_file(out) as file:
            for piece in self._blob_stream(address, timeout_s):
                builder.update(piece)
                file.write(piece)
                if progress is not None:
                    progress(builder.size_bytes)
            if builder.finish().address != address:
                raise VerificationError(f"the node sent other bytes than blob {address.hex()}")
        return builder.size_bytes

    # The line to the node

    def _json(self, method: str, path: str, **extra: Any) -> Json:
        with self._exchange(method, path, **extra) as answer:
            raise_for(answer)
            try:
                reply = json.loads(read(answer))
            except ValueError as error:
                raise not_a_node(answer) from error
        if not isinstance(reply, dict):
            raise not_a_node(answer)
        return reply

    def _pay(
        self, path: str, account: bytes, amount_nusd: int, reference: str, payment: bytes
    ) -> Json:
        command = {
            "payment": (payment or secrets.token_bytes(HASH_BYTES)).hex(),
            "account": account.hex(),
            "amount_nusd": amount_nusd,
            "reference": reference,
        }
        return self._json("POST", path, content=json.dumps(command).encode())

    def _list(self, name: str) -> list[Json]:
        items: list[Json] = self._json("GET", f"/v1/{name}")[name.partition("?")[0]]
        return items

    def _octets(self, path: str) -> bytes:
        with self._exchange("GET", path) as answer:
            raise_for(answer)
            return read(answer)

    def _blob_stream(self, address: bytes, timeout_s: float | None) -> Iterator[bytes]:
        params = {} if timeout_s is None else {"timeout_s": str(int(timeout_s))}
        with self._exchange("GET", f"/blob/{address.hex()}", params=params) as answer:
            raise_for(answer)
            yield from self._pieces(answer, address)

    @staticmethod
    def _pieces(answer: Answer, address: bytes) -> Iterator[bytes]:
        try:
            yield from answer.pieces(CHUNK_BYTES)
        except LineError as error:
            raise StoreError(
                f"the download of {address.hex()} broke off: {error}",
                hint="Try again; if it stays so, the node's log tells more.",
            ) from error

    def _events_after(self, run_id: str, after: int, wait_s: float | None) -> Iterator[Json]:
        params = {"after": str(after), **_wait(wait_s)}
        return self._event_stream("GET", _run_path(run_id, "/events"), params=params)

    def _event_stream(self, method: str, path: str, **extra: Any) -> Iterator[Json]:
        with self._exchange(method, path, **extra) as answer:
            raise_for(answer)
            name, data = "", ""
            for line in lines(answer):
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    data = value
                elif not line and data:
                    event = json.loads(data)
                    if name == "error":
                        raise error_of(event, answer)
                    yield event
                    name, data = "", ""

    @contextmanager
    def _exchange(
        self,
        method: str,
        path: str,
        *,
        content: Body | None = None,
        params: Params | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[Answer]:
        """One request, its answer's body still to be read."""
        request = Request(method, path, params or {}, headers or {}, content)
        refused = ""
        answer: Answer | None = None
        try:
            answer = self._to_node().ask(request)
        except LineError as error:
            if isinstance(error, NobodyThereError):
                refused = str(error)
            # It may have been acted upon: only what changes nothing is asked again.
            elif not request.may_be_repeated or isinstance(error, SilenceError):
                raise self._unreachable(str(error)) from None
        if answer is None:
            answer = self._ask_again(self._to_node(refused=refused), request)
        try:
            yield answer
        except LineError as error:
            raise self._unreachable(f"lost it in the middle of an answer: {error}") from None
        finally:
            answer.close()

    def _ask_again(self, line: Line, request: Request) -> Answer:
        try:
            return line.ask(request)
        except LineError as error:
            raise self._unreachable(str(error)) from None

    def _to_node(self, *, refused: str = "") -> Line:
        """The line to the node as its home tells; started if that is wanted.

        ``refused`` is why nobody answered where the home told before.
        """
        if self._line is not None and not refused:
            return self._line
        self.close()
        note = read_note(self.home)
        if note is None or not note.is_alive or (refused and note == self._note):
            # A node that its owner started is its owner's to start again.
            is_owned = self._note is not None and not self._note.embedded
            if not self._start or is_owned:
                raise self._unreachable(refused or "no node runs there")
            note = start_embedded(self.home)
        self._note = note
        self._line = self._make_line(note)
        return self._line

    def _unreachable(self, reason: str) -> NodeUnreachableError:
        return NodeUnreachableError(
            f"cannot reach the node of {self.home}: {reason}",
            hint="Start one with 'p2pflop node', or name its home with --home or P2PFLOP_HOME.",
        )


def _pause(failures: int) -> None:
    """Longer after each failure in a row."""
    time.sleep(min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)))


def _run_path(run_id: str, part: str = "") -> str:
    return f"/v1/jobs/{check_run_id(run_id)}{part}"


def _wait(wait_s: float | None) -> dict[str, str]:
    return {} if wait_s is None else {"wait_ms": str(int(wait_s * 1000) + 1)}


def _params(options: SubmitOptions | None) -> Params:
    fields = asdict(options) if options is not None else {}
    classes = list(fields.pop("classes", ()))
    switches = {name: "1" for name in ("fresh", "rest") if fields.pop(name, False)}
    run_id = fields.pop("run_id", None)
    given = {name: str(value) for name, value in fields.items() if value is not None}
    return {**given, **switches, **({"id": run_id} if run_id else {}), "class": classes}


def _blob(item: Json) -> BlobStat:
    return BlobStat(bytes.fromhex(item["address"]), int(item["size_bytes"]), bool(item["public"]))
