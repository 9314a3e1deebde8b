"""What a node has to tell a script that does not read: bounded, and nothing of it lost."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pflop.job.commands import Data, NodeFrame, Note, Ran, ScriptFrame
from p2pflop.node import session_script
from p2pflop.node.session_script import FRAME_BYTES, Outbox


class SlowLine:
    """A script that reads when it is let."""

    def __init__(self) -> None:
        self.reads = trio.Event()
        self.told: list[NodeFrame] = []

    async def receive(self) -> ScriptFrame | None:
        """It says nothing."""
        await trio.sleep_forever()
        return None

    async def send(self, frame: NodeFrame) -> None:
        """See ScriptLine."""
        await self.reads.wait()
        self.told.append(frame)


@pytest.fixture(autouse=True)
def _room_for_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_script, "MAX_OUTBOX_BYTES", 10 * FRAME_BYTES)


def ran(upto: int) -> Ran:
    return Ran(upto, 1, 2, 3, 4)


@pytest.mark.parametrize(("verbose", "frames"), [(True, 10), (False, 1)])
async def test_runs_that_nobody_reads_take_bounded_room_and_add_up(
    *, verbose: bool, frames: int
) -> None:
    line = SlowLine()
    outbox = Outbox(line)
    outbox.verbose = verbose
    for upto in range(1, 1001):
        outbox.put(ran(upto))
    line.reads.set()
    outbox.close()
    await outbox.run()
    told = [frame for frame in line.told if isinstance(frame, Ran)]
    assert len(told) == frames
    assert (told[-1].upto, sum(each.flop for each in told)) == (1000, 2000)


async def test_who_reads_is_told_of_each_run(nursery: trio.Nursery) -> None:
    line = SlowLine()
    line.reads.set()
    outbox = Outbox(line)
    outbox.verbose = True
    nursery.start_soon(outbox.run)
    for upto in range(1, 101):
        outbox.put(ran(upto))
        await trio.testing.wait_all_tasks_blocked()
    assert line.told == [ran(upto) for upto in range(1, 101)]


@pytest.mark.parametrize("data", [b"", b"x", bytes(FRAME_BYTES)])
async def test_answers_that_nobody_reads_make_their_bringer_wait(
    nursery: trio.Nursery, data: bytes
) -> None:
    line = SlowLine()
    outbox = Outbox(line)
    nursery.start_soon(outbox.run)
    brought = 0

    async def bring() -> None:
        nonlocal brought
        for number in range(100):
            await outbox.put_data(Data(number, data, True))
            outbox.put(ran(number + 1))
            brought += 1

    nursery.start_soon(bring)
    await trio.testing.wait_all_tasks_blocked()
    assert 0 < brought <= 10
    line.reads.set()
    await trio.testing.wait_all_tasks_blocked()
    assert brought == 100
    outbox.put(Note("the end"))
    await trio.testing.wait_all_tasks_blocked()
    assert [f.number for f in line.told if isinstance(f, Data)] == list(range(100))
    assert line.told[-1] == Note("the end")
