"""The script's end of a session, against a node that says what the test tells it to."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import pytest

from p2pflop.cloud import session as module
from p2pflop.cloud.link import Frames, framed
from p2pflop.cloud.session import (
    BATCH_BYTES,
    BATCH_COMMANDS,
    ScriptSession,
    closing_line,
    script_name,
)
from p2pflop.cloud.settings import CloudSettings
from p2pflop.cloud.stacks import Stack, user_stack
from p2pflop.errors import JobError, NodeUnreachableError, ProtocolError, ProviderError
from p2pflop.job.commands import (
    NOBODY,
    Allocate,
    Batch,
    Close,
    Closed,
    Data,
    Failed,
    Frame,
    Free,
    Leased,
    Note,
    Open,
    Ran,
    Read,
    Run,
    Write,
    encode_frame,
)
from tests.cloud_twin import script_frame

T = TypeVar("T", bound=Frame)
LEASED = Leased("ab" * 32, "cpu-clang-nofma", "CPU:CLANG", 50_000_000, 10**8, 1000, 10**6)
CLOSED = Closed(3 * 10**12, 2_500_000, 150_000, 10**9)


class FakeNode:
    """A link whose answers are made by ``react``, or raised by it."""

    def __init__(self, react: Callable[[Frame], list[Frame]] | None = None) -> None:
        self.heard: list[Frame] = []
        self.answers: deque[bytes] = deque()
        self.react = react or obey
        self.interrupts = 0
        self.left = False

    def say(self, *frames: Frame) -> None:
        self.answers.extend(map(encode_frame, frames))

    def send(self, frame: bytes) -> None:
        self.heard.append(script_frame(frame))
        self.say(*self.react(self.heard[-1]))

    def receive(self, wait_s: float | None = 0) -> list[bytes]:
        if wait_s != 0 and self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        if not self.answers and wait_s is None:
            raise NodeUnreachableError("lost the node")
        came = list(self.answers)
        self.answers.clear()
        return came

    @property
    def pending_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def leave(self) -> None:
        self.left = True

    def all(self, kind: type[T]) -> list[T]:
        return [frame for frame in self.heard if isinstance(frame, kind)]


def obey(frame: Frame) -> list[Frame]:
    """A node for which all goes well."""
    match frame:
        case Open():
            return [LEASED]
        case Batch(first, commands):
            reads = [
                Data(first + place, bytes(command.size_bytes), True)
                for place, command in enumerate(commands)
                if isinstance(command, Read)
            ]
            return [*reads, Ran(first + len(commands), 1, 2, 3, 4)]
        case _:
            return [CLOSED]


class Script:
    """A session and what it has told."""

    def __init__(self, node: FakeNode, settings: CloudSettings | None = None) -> None:
        self.told: list[str] = []
        self.ran: list[Ran] = []
        self.session = ScriptSession(
            node, settings or CloudSettings(), self.told.append, self.ran.append
        )
        self.session.open()


def test_it_opens_with_its_settings_and_says_the_terms() -> None:
    node = FakeNode()
    script = Script(node, CloudSettings(7, "any", 10**6, 5, fallback=True))
    assert node.heard == [Open(1, "any", 10**6, 7, 5, True, False, script_name())]
    [line] = script.told
    assert line == (
        "abababababab computes in cpu-clang-nofma for $0.05 a PFLOP, at most $0.10 in all "
        "(CLOUD_MAX_USD)"
    )


def test_the_equal_device_is_told_on_request() -> None:
    script = Script(FakeNode(), CloudSettings(debug=True))
    assert script.told[1] == "equal bytes here with DEV=CPU:CLANG"


def test_commands_are_numbered_and_gathered() -> None:
    node = FakeNode()
    script = Script(node)
    for buffer in range(BATCH_COMMANDS + 3):
        script.session.give(Allocate(buffer, 1))
    assert [(b.first, len(b.commands)) for b in node.all(Batch)] == [(0, BATCH_COMMANDS)]
    script.session.flush()
    assert [(b.first, len(b.commands)) for b in node.all(Batch)][1:] == [(BATCH_COMMANDS, 3)]


def test_large_writes_go_at_once() -> None:
    node = FakeNode()
    script = Script(node)
    script.session.give(Write(0, 0, bytes(BATCH_BYTES)))
    assert len(node.all(Batch)) == 1


def test_runs_in_quick_succession_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(module, "time", clock)
    node = FakeNode()
    script = Script(node)
    script.session.run(Run(0))
    assert len(node.all(Batch)) == 1, "after a pause a run goes at once"
    for _ in range(5):
        script.session.run(Run(0))
    assert len(node.all(Batch)) == 1
    now[0] += 1
    script.session.run(Run(0))
    assert len(node.all(Batch)[1].commands) == 6


def test_a_read_is_answered_in_pieces_and_costs_one_exchange() -> None:
    def react(frame: Frame) -> list[Frame]:
        if isinstance(frame, Batch):
            return [Data(1, b"ab", False), Data(1, b"cd", True)]
        return obey(frame)

    node = FakeNode(react)
    script = Script(node)
    script.session.give(Allocate(0, 4))
    assert script.session.read(Read(0, 0, 4)) == b"abcd"
    assert len(node.all(Batch)) == 1


def test_an_answer_of_another_size_is_not_taken() -> None:
    node = FakeNode(lambda f: [Data(0, b"ab", True)] if isinstance(f, Batch) else obey(f))
    with pytest.raises(ProtocolError, match="sent 2 of 4 bytes"):
        Script(node).session.read(Read(0, 0, 4))


def test_it_keeps_to_the_window_of_commands() -> None:
    terms = Leased("ab" * 32, "cpu", "CPU", 1, 1, 4, 10**6)
    pending: list[Frame] = []

    def react(frame: Frame) -> list[Frame]:
        if isinstance(frame, Batch):
            assert frame.first + len(frame.commands) - covered[0] <= 4
            pending.append(Ran(frame.first + len(frame.commands), 1, 1, 1, 1))
            return []
        return [terms] if isinstance(frame, Open) else obey(frame)

    covered = [0]
    node = FakeNode(react)
    script = Script(node)
    receive = node.receive

    def later(wait_s: float | None = 0) -> list[bytes]:
        if wait_s is None and pending:
            ran = pending.pop(0)
            assert isinstance(ran, Ran)
            covered[0] = ran.upto
            node.say(ran)
        return receive(wait_s)

    node.receive = later  # type: ignore[method-assign]
    for _ in range(20):
        script.session.run(Run(0))
        script.session.flush()
    script.session.synchronize()
    assert script.session.count == 20
    assert sum(ran.kernels for ran in script.ran) == len(node.all(Batch)) < 21


def test_a_batch_that_is_larger_than_the_window_goes_alone() -> None:
    terms = Leased("ab" * 32, "cpu", "CPU", 1, 1, 2, 10)
    node = FakeNode(lambda f: [terms] if isinstance(f, Open) else obey(f))
    script = Script(node)
    script.session.give(Write(0, 0, bytes(BATCH_BYTES)))
    script.session.give(Write(0, 0, bytes(BATCH_BYTES)))
    assert [b.first for b in node.all(Batch)] == [0, 1]


def test_sync_waits_for_each_run() -> None:
    node = FakeNode()
    script = Script(node, CloudSettings(sync=True))
    for number in range(3):
        script.session.run(Run(0))
        assert script.ran[-1].upto == number + 1


def test_notes_are_told_when_they_come() -> None:
    node = FakeNode()
    script = Script(node)
    node.say(Note("another provider"), LEASED)
    script.session.flush()
    assert script.told[1:] == ["another provider"]


def _ask(script: Script) -> int:
    script.session.run(Run(5))
    return sys._getframe().f_lineno - 1


@pytest.mark.parametrize(("is_job", "kind"), [(True, JobError), (False, ProviderError)])
def test_a_later_fault_has_the_lines_that_asked(is_job: bool, kind: type[Exception]) -> None:
    node = FakeNode(lambda f: [] if isinstance(f, Batch) else obey(f))
    script = Script(node)
    line = _ask(script)
    script.session.run(Run(6))
    node.say(Failed(0, is_job, "SIGFPE in a kernel", "Mind the zeros."), CLOSED)
    for _ in range(2):  # the second time as well as the first
        with pytest.raises(kind) as caught:
            script.session.flush()
        notes = "\n".join(caught.value.__notes__)
        assert str(caught.value) == "SIGFPE in a kernel"
        assert "Mind the zeros." in notes
        assert f'{__file__}", line {line}, in _ask' in notes
        assert "script.session.run(Run(5))" in notes
    assert script.session.close() == CLOSED


def test_a_fault_of_nobody_names_no_line() -> None:
    node = FakeNode(lambda f: [Failed(NOBODY, False, "no asks", "")])
    with pytest.raises(ProviderError, match="no asks") as caught:
        Script(node)
    assert not hasattr(caught.value, "__notes__")


def test_ctrl_c_in_a_read_leaves_the_session_usable() -> None:
    answers: list[Frame] = []

    def react(frame: Frame) -> list[Frame]:
        if isinstance(frame, Batch):
            answers.extend(obey(frame))
            return []
        return obey(frame)

    node = FakeNode(react)
    script = Script(node)
    node.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        script.session.read(Read(0, 0, 3))
    node.say(*answers)  # comes late, and nobody wants it any more
    node.react = obey
    assert script.session.read(Read(0, 0, 2)) == bytes(2)
    assert [b.first for b in node.all(Batch)] == [0, 1]


def test_a_forked_child_cannot_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    script = Script(node)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(JobError, match="forked process") as caught:
        script.session.give(Allocate(0, 1))
    assert "spawn" in caught.value.hint
    assert script.session.close() is None
    assert len(node.heard) == 1


def test_it_ends_with_one_line() -> None:
    node = FakeNode()
    script = Script(node)
    script.session.give(Allocate(0, 1))
    assert script.session.close() == CLOSED
    assert [type(frame) for frame in node.heard] == [Open, Batch, Close]
    assert closing_line(CLOSED) == "0.003 PFLOP at 3 TFLOP/s, 2.5 MB moved, $0.00015"
    with pytest.raises(ProviderError, match="is over"):
        script.session.give(Allocate(1, 1))


def test_it_does_not_wait_at_its_end_for_a_node_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.01)
    node = FakeNode(lambda f: obey(f) if isinstance(f, Open) else [])
    assert Script(node).session.close() is None


def test_frames_in_any_pieces() -> None:
    stream = framed(b"one") + framed(b"") + framed(b"three")
    for size in (1, 2, 5, 100):
        frames = Frames()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [f for piece in pieces for f in frames.feed(piece)] == [b"one", b"", b"three"]


def test_a_frame_over_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="over"):
        Frames().feed(b"\xff\xff\xff\xff")


def test_what_is_collected_meanwhile_takes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    script = Script(node)
    freed = iter(range(1000))

    def collecting() -> Stack:
        for _ in range(BATCH_COMMANDS // 2 + 1):
            script.session.give(Free(next(freed)))
        return user_stack()

    script.session.give(Allocate(0, 8))
    monkeypatch.setattr(module, "user_stack", collecting)
    for _ in range(2):
        assert script.session.read(Read(0, 0, 8)) == bytes(8)
    script.session.run(Run(0), wait=True)
    batches = node.all(Batch)
    sent = [command for batch in batches for command in batch.commands]
    assert [batch.first for batch in batches] == [
        sum(len(before.commands) for before in batches[:place]) for place in range(len(batches))
    ]
    assert [c.buffer for c in sent if isinstance(c, Free)] == list(range(len(sent) - 4))
    assert [type(c) for c in sent if not isinstance(c, Free)] == [Allocate, Read, Read, Run]
