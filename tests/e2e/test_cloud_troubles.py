"""What a plain script is told when something is not as it should be, through real nodes.

Each time: what was printed before stays, the traceback leads to the script's own line, one line
says what is wrong, the next what to change, and the exit code is not zero.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pflop.client import Client
from p2pflop.market.evidence import Evidence, replay
from p2pflop.wire import decode
from tests.e2e.conftest import StartNode, start_node, wait_until
from tests.e2e.test_first_light import wait_for_asks

ADD = "print((x + 1).tolist())"
CHAIN = "for _ in range(600): x = (x + 1).sin()\nprint(x.tolist())"
LARGE = "Tensor.ones(1024, 1024).contiguous().realize()"
KERNEL = """
from tinygrad.uop.ops import KernelInfo, UOp
def own(C, A):
    i = UOp.range(3, 0)
    return C[i].store(A[i] + 1).end(i).sink(arg=KernelInfo(name="own"))
print(Tensor.empty(3).custom_kernel(x, fxn=own)[0].tolist())
"""
BEGIN = "from tinygrad import Tensor\nx = Tensor([1.0, 2, 3])\nprint('begun', flush=True)\n"
END_S = 30.0


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Of buyers: one that knows nobody, and one with a seller that does not give much credit."""
    folder = tmp_path_factory.mktemp("market")
    starting = start_node.__wrapped__(folder)  # type: ignore[attr-defined]
    start: StartNode = next(starting)
    (folder / "seller").mkdir()
    (folder / "seller" / "config.toml").write_text('credit = "0.04"\n')
    seller, alone = start("seller", "--ask", "50"), start("alone")
    buyer = start("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    yield {"alone": alone.home, "buyer": buyer.home}
    next(starting, None)


def start_script(path: Path, home: Path, text: str, **variables: str) -> subprocess.Popen[str]:
    path.write_text(text)
    bare = {name: value for name, value in os.environ.items() if name != "DEV"}
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=bare
        | {"CLOUD": "1", "P2PFLOP_HOME": str(home), "CLOUD_WAIT": "0s", "CLOUD_MAX_USD": "0.03"}
        | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("buyer", "program", "variables", "fault", "remedy"),
    [
        ("alone", ADD, {}, "the order book is empty", "Connect to a peer that sells"),
        ("buyer", ADD, {"CLOUD_MAX_USD": "0.000000001"}, "are left", "CLOUD_MAX_USD to more"),
        ("buyer", ADD, {"CLOUD_MAX_USD": "much"}, "'much' is not an amount", "CLOUD_MAX_USD"),
        ("buyer", ADD, {"CLOUD_CLASS": "best"}, "there is no class 'best'", "CLOUD_CLASS=any"),
        ("buyer", ADD, {"CLOUD_CLASS": "CUDA"}, "device CUDA does not work", "CLOUD_CLASS=any"),
        ("buyer", ADD, {"CLOUD_CLASS": "cpu-llvm"}, "1 x wrong class", "CLOUD_CLASS=any"),
        ("buyer", ADD, {"CLOUD_MEMORY": "4TiB"}, "too little memory", "set CLOUD_MEMORY="),
        ("buyer", LARGE, {"CLOUD_MEMORY": "1MiB"}, "session's", "set CLOUD_MEMORY to more"),
        ("buyer", ADD, {"CLOUD_MAX_USD": "1"}, "over the credit of $0.04", "pay $0."),
        ("buyer", CHAIN, {}, "a chain of more than 512 nodes", "Realize it in parts"),
        ("buyer", KERNEL, {}, "a custom kernel", "ordinary tensor operations"),
    ],
    ids=[
        "no asks", "cap too low", "bad setting", "no class", "no device", "no seller of a class",
        "no such memory", "over its memory", "no credit", "graph over limits", "custom kernel",
    ],
)  # fmt: skip
def test_a_trouble_is_told_with_its_remedy(
    homes: dict[str, Path],
    tmp_path: Path,
    buyer: str,
    program: str,
    variables: dict[str, str],
    fault: str,
    remedy: str,
) -> None:
    path = tmp_path / "script.py"
    process = start_script(path, homes[buyer], BEGIN + program, **variables)
    out, err = process.communicate(timeout=END_S)
    assert process.returncode == 1
    assert out == "begun\n"
    lines = [line for line in err.splitlines() if not line.startswith("p2pflop: ")]
    told = [number for number, line in enumerate(lines) if fault in line]
    assert told, err
    assert remedy in "".join(lines[told[-1] : told[-1] + 2])
    assert told[-1] >= len(lines) - 2, "it is the last that is said"
    assert err.count(lines[told[-1]]) == 1, "it is said once"
    assert f'File "{path}", line ' in err


def test_ctrl_c_in_a_read_back_ends_a_script_that_does_not_catch_it(
    homes: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever it waits for: the lease ends, the bill is told, and nothing hangs."""
    forever = "while True: x = (x + 1).contiguous(); x.tolist(); print('read', flush=True)"
    process = start_script(tmp_path / "script.py", homes["buyer"], BEGIN + forever)
    assert process.stdout is not None
    while process.stdout.readline() != "read\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=END_S)
    assert time.monotonic() - began < 10
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in err
    assert "moved, $" in err.splitlines()[-1]
    with Client(homes["buyer"]) as client:
        wait_until(lambda: client.status()["sessions"] == [])


def test_a_session_is_listed_and_its_cancel_ends_the_script(
    homes: dict[str, Path], tmp_path: Path
) -> None:
    forever = "while True: x = (x + 1).contiguous(); x.tolist(); print('read', flush=True)"
    process = start_script(tmp_path / "forever.py", homes["buyer"], BEGIN + forever)
    assert process.stdout is not None
    while process.stdout.readline() != "read\n":
        assert process.poll() is None
    with Client(homes["buyer"]) as client:
        [card] = [job for job in client.jobs() if not job["end_state"]]
        assert (card["kind"], card["title"]) == ("session", "forever.py")
        assert (card["state"], card["max_nusd"]) == ("leased", 30_000_000)
        client.cancel(card["id"])
        _, err = process.communicate(timeout=END_S)
        assert process.returncode == 1
        assert "the session was cancelled with 'p2pflop cancel'" in err
        wait_until(lambda: client.job(card["id"])["state"] == "cancelled")
        [look] = replay(decode(Evidence, client.evidence(card["id"])))
    assert look.is_right
    assert look.bids[-1].filled


@pytest.mark.parametrize("end", ["", "raise SystemExit(7)", "raise ValueError('mine')"])
def test_a_script_ends_as_it_would_without_the_cloud(
    homes: dict[str, Path], tmp_path: Path, end: str
) -> None:
    """With work under way that nobody reads, its exit code is its own, and it does not wait."""
    busy = "for _ in range(200): x = (x + 1).contiguous().realize()\n"
    process = start_script(tmp_path / "script.py", homes["buyer"], BEGIN + busy + end)
    _, err = process.communicate(timeout=END_S)
    assert process.returncode == {"": 0, "raise SystemExit(7)": 7}.get(end, 1), err
    assert ("ValueError: mine" in err) == ("mine" in end)
    assert "moved, $" in err
