"""Scripts that know nothing of p2pflop, run natively and with CLOUD=1: equal to the last bit.

The node is a twin that obeys by tinygrad itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from p2pflop.errors import JobError
from tests.cloud_server import twin_server

FOLDER = Path(__file__).parents[1] / "cloud_scripts"
SCRIPTS = ("digits_mlp", "conv_train", "transformer", "rnn", "jit_variable", "kv_cache")
PROGRAM = (sys.executable, "-m", "p2pflop.cli.main")
AT_EVERY_CHANGE = ("digits_mlp", "jit_variable")


def run_script(path: Path, home: Path | None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script in this class; in the cloud by the node of ``home``, if one is given."""
    environment = {**os.environ, **variables}
    if home is not None:
        del environment["DEV"]
        environment |= {"CLOUD": "1", "P2PFLOP_HOME": str(home)} | variables
    return subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=110
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in AT_EVERY_CHANGE else [pytest.mark.slow])
        for name in SCRIPTS
    ],
)
def test_equal_to_the_last_bit(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.py"
    native = run_script(path, None)
    assert native.returncode == 0, native.stderr
    with twin_server() as server:
        cloud = run_script(path, server.home(tmp_path / "home"))
    assert cloud.returncode == 0, cloud.stderr
    assert cloud.stdout == native.stdout
    assert native.stdout.count("\n") > 4
    first, last = cloud.stderr.splitlines()
    assert re.fullmatch(r"p2pflop: abab\S+ computes in cpu for \$0.05 a PFLOP, at most .*", first)
    assert re.fullmatch(r"p2pflop: \S+ PFLOP at .*/s, .* moved, \$\S+", last)
    [twin] = server.twins
    assert twin.table.flop > 0


def test_threads_share_a_session(tmp_path: Path) -> None:
    """Natively one does it all: tinygrad's own schedules are not for several."""
    native = run_script(FOLDER / "threads.py", None, WORKERS="1")
    assert native.returncode == 0, native.stderr
    with twin_server() as server:
        home = server.home(tmp_path / "home")
        cloud = run_script(FOLDER / "threads.py", home, WORKERS="8")
    assert cloud.returncode == 0, cloud.stderr
    assert cloud.stdout == native.stdout
    assert len(server.twins) == 1


def test_one_lowering_serves_all_tokens(tmp_path: Path) -> None:
    lowered = []
    for tokens in ("5", "20"):
        with twin_server() as server:
            done = run_script(FOLDER / "kv_cache.py", server.home(tmp_path / tokens), TOKENS=tokens)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == int(tokens)
        [twin] = server.twins
        lowered.append(len(twin.table.graphs))
    assert lowered[0] == lowered[1]


def test_a_fault_that_nobody_saw_ends_the_script_with_its_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tinygrad import Tensor\n"
        "x = Tensor([1, 2, 3]).realize()\n"
        "print('here')\n"
        "(x + 1).realize()\n"
    )
    with twin_server(fail_at=4, fails_late=True) as server:
        done = run_script(script, server.home(tmp_path / "home"))
    assert done.returncode == JobError.exit_code
    assert done.stdout == "here\n"
    assert "p2pflop: JobError: it fell over" in done.stderr
    assert "Try again." in done.stderr
    assert f'File "{script}", line 4' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_that_is_seen_keeps_the_users_traceback(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tinygrad import Tensor\n"
        "x = Tensor([1, 2, 3]).realize()\n"
        "y = (x + 1).realize()\n"
        "print(y.tolist())\n"
    )
    with twin_server(fail_at=4) as server:
        done = run_script(script, server.home(tmp_path / "home"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert f'It was asked for here:\n  File "{script}", line 3, in <module>' in done.stderr
    assert f'Traceback (most recent call last):\n  File "{script}", line' in done.stderr
    assert "JobError: it fell over" in done.stderr
    assert done.stderr.count("it fell over") == 1


def test_ctrl_c_and_forks(tmp_path: Path) -> None:
    """Ctrl-C in a read-back is an ordinary exception; a child may do all but use its parent's."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, threading, time\n"
        "from tinygrad import Tensor\n"
        "x = Tensor([1, 2, 3]).realize()\n"
        "x.tolist()\n"
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Timer(0.3, interrupt).start()\n"
        "try:\n"
        "    for _ in range(10**6): (x + 1).tolist()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
        "print((x * 2).tolist(), flush=True)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try: (x * 3).tolist()\n"
        "    except Exception as error: print(error, flush=True)\n"
        "    raise SystemExit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "print((x * 4).tolist())\n"
    )
    with twin_server() as server:
        done = run_script(script, server.home(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "interrupted",
        "[2, 4, 6]",
        "a forked process cannot use the CLOUD session of its parent",
        "7",
        "[4, 8, 12]",
    ]
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("quiet", ["0", "1"])
def test_it_is_quiet_on_request(quiet: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from tinygrad import Tensor\nprint((Tensor([1]) + 1).item())\n")
    with twin_server() as server:
        home = server.home(tmp_path / "home")
        done = run_script(script, home, CLOUD_QUIET=quiet, CLOUD_MAX_USD="0.5")
    assert (done.returncode, done.stdout) == (0, "2\n")
    assert ("at most $0.50" in done.stderr) == (quiet == "0")
    assert bool(done.stderr) == (quiet == "0")


def test_no_node_and_a_bad_setting_are_told_with_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from tinygrad import Tensor\nprint((Tensor([1]) + 1).item())\n")
    with twin_server() as server:
        home = server.home(tmp_path / "home")
        done = run_script(script, home, CLOUD_MAX_USD="much")
        assert done.returncode == 1
        assert "CLOUD_MAX_USD: 'much' is not an amount of dollars" in done.stderr
    done = run_script(script, home)  # its note is there, and nobody listens
    assert done.returncode == 1
    assert "lost the node at http://127.0.0.1" in done.stderr
    assert f'File "{script}", line 2, in <module>' in done.stderr


def test_p2pflop_run_and_a_program_by_its_module(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom tinygrad import Device, Tensor\n"
        "print(__name__, sys.argv, Device.DEFAULT, (Tensor([1]) + 1).item())\n"
    )
    told = f"__main__ [{str(script)!r}, '--fast', '3'] CLOUD 2\n"
    with twin_server() as server:
        home = server.home(tmp_path / "home")
        environment = {name: value for name, value in os.environ.items() if name != "DEV"}
        environment["P2PFLOP_HOME"] = str(home)
        for options, variables in (([], {}), (["--cloud"], {"CLOUD": "0"}), ([], {"CLOUD": "1"})):
            done = subprocess.run(
                [*PROGRAM, "run", *options, str(script), "--fast", "3"],
                env=environment | variables,
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stdout) == (0, told), done.stderr
