"""The client, the embedded node's start, and what the SDK does with both."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import p2pflop as pf
from p2pflop import client as client_module
from p2pflop import embedded
from p2pflop.client import Client
from p2pflop.dht.manifest import CHUNK_BYTES, address_of
from p2pflop.embedded import read_note, start_embedded
from p2pflop.errors import (
    BlobNotFoundError,
    ConfigError,
    HomeLockedError,
    JobError,
    NodeUnreachableError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    StoreFullError,
    VerificationError,
)
from p2pflop.line import MAX_IDLE, Answer, HttpLine, LineError, Request
from p2pflop.replies import error_from
from p2pflop.runs import Row, Run
from tests.lines import Canned, CannedLine, answering

StartNode = Callable[..., Any]

ROWS = [
    ("state", {"state": "running"}),
    ("rows", {"rows": [{"step": 0, "values": {"loss": 2.5}}]}),
    ("rows", {"rows": [{"step": 1, "values": {"loss": float("nan"), "acc": 0.5}}]}),
]


class TestImport:
    def test_importing_p2pflop_imports_nothing_heavy(self) -> None:
        program = "import p2pflop, sys; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        loaded = set(done.stdout.split())
        assert not loaded & {"httpx", "trio", "tinygrad", "numpy", "libp2p", "rich", "msgspec"}

    def test_the_client_needs_neither_trio_nor_tinygrad(self) -> None:
        program = "import p2pflop, sys; p2pflop.submit; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert not set(done.stdout.split()) & {"trio", "tinygrad", "numpy", "libp2p"}

    def test_every_name_is_there(self) -> None:
        for name in pf.__all__:
            assert getattr(pf, name) is not None
        assert set(dir(pf)) == set(pf.__all__)
        with pytest.raises(AttributeError, match="no attribute 'tarce'"):
            _ = pf.tarce


class TestBlobs:
    @pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
    def test_put_and_get(self, start_node: StartNode, tmp_path: Path, size: int) -> None:
        start_node()
        data = os.urandom(size)
        address = pf.put(data)
        assert address == address_of(data).hex()
        assert pf.get(address) == data
        (tmp_path / "deep").mkdir()
        path = pf.get(f"p2pflop://{address}", tmp_path / "deep" / "out")
        assert isinstance(path, Path)
        assert path.read_bytes() == data
        assert [item.name for item in path.parent.iterdir()] == ["out"]

    def test_put_of_a_file(self, start_node: StartNode, tmp_path: Path) -> None:
        start_node()
        path = tmp_path / "data"
        path.write_bytes(b"x" * (CHUNK_BYTES + 1))
        address = pf.put(path, public=True)
        with Client() as client:
            blobs = client.blobs()
            assert [(blob.address.hex(), blob.public) for blob in blobs] == [(address, True)]
            assert client.has(bytes.fromhex(address))
            assert not client.has(bytes(32))
        with pytest.raises(ConfigError, match="is not a file"):
            pf.put(tmp_path / "nothing")

    def test_an_unknown_blob_is_the_class_that_the_node_raised(
        self, start_node: StartNode, tmp_path: Path
    ) -> None:
        start_node()
        with pytest.raises(BlobNotFoundError, match="ab" * 32):
            pf.get("ab" * 32)
        with pytest.raises(BlobNotFoundError):
            pf.get("ab" * 32, tmp_path / "out")
        assert list(tmp_path.glob("**/*out*")) == []

    def test_other_bytes_than_asked_for_are_refused(self, home: Path, tmp_path: Path) -> None:
        client = Client(home, line=answering(200, b"evil"))
        with pytest.raises(VerificationError):
            client.get(bytes(32))
        with pytest.raises(VerificationError):
            client.download(bytes(32), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_folder_is_no_file_to_write(self, start_node: StartNode, tmp_path: Path) -> None:
        start_node()
        with pytest.raises(ConfigError, match="is a folder") as caught:
            pf.get(pf.put(b"data"), tmp_path)
        assert str(tmp_path / "data") in caught.value.hint

    def test_a_folder_that_cannot_be_written_is_told(
        self, start_node: StartNode, tmp_path: Path
    ) -> None:
        start_node()
        address = pf.put(b"data")
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ConfigError, match="there is no folder"):
            pf.get(address, tmp_path / "file" / "out")

    def test_a_full_disk_has_an_error_of_its_own(
        self, start_node: StartNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_node()
        address = pf.put(b"data")

        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("p2pflop.drafts.os.fsync", fail)
            with pytest.raises(StoreFullError, match=r"cannot write .*out: No space"):
                pf.get(address, tmp_path / "out")


class TestErrors:
    def test_no_node_is_told_with_what_to_do(self) -> None:
        with pytest.raises(NodeUnreachableError, match="no node runs there") as caught:
            Client().status()
        assert "p2pflop node" in caught.value.hint

    def test_a_note_of_a_dead_process_is_no_node(self, home: Path) -> None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        (home / "node.json").write_text(f'{{"url": "http://127.0.0.1:9", "pid": {dead.pid}}}')
        with pytest.raises(NodeUnreachableError):
            Client(home).status()

    def test_a_refused_connection_is_an_unreachable_node(self, home: Path) -> None:
        with pytest.raises(NodeUnreachableError, match="refused") as caught:
            Client(home).status()
        text = "".join(traceback.format_exception(caught.value))
        assert text.count("Traceback") == 1
        assert text.rstrip().endswith(caught.value.hint)

    @pytest.mark.parametrize("run_id", ["", "a/b", "../status", "x" * 65])
    def test_what_cannot_be_a_runs_id_is_not_asked_for(
        self, start_node: StartNode, run_id: str
    ) -> None:
        start_node()
        client = Client()
        for ask in (client.job, client.cancel, client.result_record, pf.attach):
            with pytest.raises(ConfigError, match="is not the id of a run"):
                ask(run_id)
        with pytest.raises(ConfigError, match="is not the id of a run"):
            next(client.events(run_id))

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', '{"url": "x", "pid": "y"}'])
    def test_a_broken_note_is_told(self, home: Path, text: str) -> None:
        (home / "node.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot read how to reach the node"):
            Client(home).status()

    def test_another_program_on_the_port_is_told(self, home: Path) -> None:
        for content in (b"<html>", b"[]", b"{}"):
            client = Client(home, line=answering(404, content))
            with pytest.raises(ProtocolError, match="did not answer as a node"):
                client.status()

    def test_the_token_goes_to_the_node_alone(self, home: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        away = b"HTTP/1.1 307 \r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n"
        heard: list[bytes] = []

        def listen() -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(10_000))
                connection.sendall(away)
                heard.append(connection.recv(10_000))

        with socket.create_server(("127.0.0.1", 0)) as listener:
            note = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "pid": os.getpid()}
            (home / "node.json").write_text(json.dumps(note))
            thread = threading.Thread(target=listen)
            thread.start()
            with Client(home) as client, pytest.raises(P2PFlopError, match="HTTP 307"):
                client.status()
            thread.join()
        assert heard[0].startswith(b"GET /v1/status HTTP/1.1\r\n")
        assert b"authorization: Bearer t0ken\r\n" in heard[0]
        assert heard[1] == b""

    def test_a_node_that_dies_in_the_middle_of_an_answer_is_one_that_is_gone(
        self, home: Path
    ) -> None:
        def broken() -> Iterator[bytes]:
            yield b"{"
            raise LineError("connection reset")

        client = Client(home, line=CannedLine(lambda request: Canned(request, 200, broken())))
        with pytest.raises(NodeUnreachableError, match="in the middle of an answer"):
            client.status()
        with pytest.raises(NodeUnreachableError, match="in the middle of an answer"):
            client.submit_and_follow(b"job")

    def test_replies_are_bounded(self, home: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("p2pflop.replies.MAX_REPLY_BYTES", 100)
        client = Client(home, line=answering(200, b" " * 101))
        with pytest.raises(ProtocolError, match="over 100 bytes"):
            client.status()

    def test_classes_survive_the_way(self) -> None:
        assert type(error_from("ProviderError", "m", "h")) is ProviderError
        assert error_from("ProviderError", "m", "do this").__notes__ == ["do this"]
        assert not hasattr(error_from("ProviderError", "m", ""), "__notes__")
        error = error_from("os", "m", "h")
        assert (type(error), error.message, error.hint) == (P2PFlopError, "m", "h")


@pytest.fixture
def connections(monkeypatch: Any) -> list[socket.socket]:
    """Those that clients have opened."""
    opened: list[socket.socket] = []
    create = socket.create_connection

    def open_one(*given: Any) -> socket.socket:
        opened.append(create(*given))
        return opened[-1]

    monkeypatch.setattr("p2pflop.line.socket.create_connection", open_one)
    return opened


class TestRun:
    def test_rows_then_result_event(self, start_node: StartNode) -> None:
        start_node(script=[*ROWS, ("failed", {"error": "JobError", "message": "m", "hint": "h"})])
        run = pf.attach(Client().submit(b"job"))
        rows: list[Row] = []
        with pytest.raises(JobError, match="m") as caught:
            rows.extend(run)
        assert caught.value.hint == "h"
        assert [row.step for row in rows] == [0, 1]
        assert rows[0]["loss"] == rows[0].loss == 2.5
        assert rows[1].loss != rows[1].loss
        assert dict(rows[0]) == {"step": 0, "loss": 2.5}
        assert repr(rows[1]) == "Row(step=1, loss=nan, acc=0.5)"
        with pytest.raises(AttributeError, match="step, loss, no 'acc'"):
            _ = rows[0].acc

    def test_a_run_followed_to_its_end_leaves_its_connection_to_the_next(
        self, start_node: StartNode, connections: list[socket.socket]
    ) -> None:
        start_node(script=[("cancelled", {})])
        with Client() as client:
            client.status()
            for _ in range(3):
                run_id = client.submit(b"job")
                assert [event["kind"] for event in client.events(run_id)] == ["cancelled"]
        assert len(connections) == 1

    def test_a_submission_and_its_events_are_one_exchange(
        self, start_node: StartNode, monkeypatch: Any
    ) -> None:
        start_node(script=[("cancelled", {})])
        asked: list[str] = []

        class Watched(HttpLine):
            def ask(self, request: Request) -> Answer:
                asked.append(request.method)
                return super().ask(request)

        with Client(line=Watched) as client:
            run_id, events = client.submit_and_follow(b"job")
            assert [event["kind"] for event in events] == ["cancelled"]
            assert asked == ["POST"]
            assert client.job(run_id)["state"] == "cancelled"

    def test_events_that_end_before_their_run_are_asked_for(self, start_node: StartNode) -> None:
        node = start_node(script=ROWS)
        with Client() as client:
            run_id, events = client.submit_and_follow(b"job", wait_s=0.05)
            seen = [next(events)["seq"] for _ in range(3)]
            time.sleep(0.1)
            node.tell(run_id, "cancelled")
            began = time.monotonic()
            assert [*seen, *(event["seq"] for event in events)] == [1, 2, 3, 4]
            assert time.monotonic() - began < client_module.FIRST_PAUSE_S

    def test_events_outlive_the_node_that_took_the_submission(
        self, start_node: StartNode, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
        first = start_node(script=ROWS)
        run_id, events = Client().submit_and_follow(b"job")
        first.stop()
        start_node(service=first.service).tell(run_id, "cancelled")
        assert [event["seq"] for event in events] == [1, 2, 3, 4]

    @pytest.mark.parametrize("read", [0, 1])
    def test_events_that_nobody_has_any_more_hold_no_connection(
        self, start_node: StartNode, connections: list[socket.socket], read: int
    ) -> None:
        start_node(script=ROWS)
        with Client() as client:
            for _ in range(2 * MAX_IDLE):
                _, events = client.submit_and_follow(b"job")
                for _ in range(read):
                    next(events)
                del events
        assert len(connections) == 2 * MAX_IDLE
        assert all(connection.fileno() == -1 for connection in connections)

    def test_a_program_that_brings_no_run_is_no_node(self, home: Path) -> None:
        client = Client(line=answering(200, b"hello"))
        with pytest.raises(ProtocolError, match="did not tell which run"):
            client.submit_and_follow(b"job")

    def test_what_a_submission_brings_is_heard_once(self, start_node: StartNode) -> None:
        start_node(script=[*ROWS, ("cancelled", {})])
        client = Client()
        run_id, events = client.submit_and_follow(b"job")
        run = Run(run_id, client, events)
        assert [event["seq"] for event in run.events(after=3)] == [4]
        for _ in range(2):
            assert [event["seq"] for event in run.events()] == [1, 2, 3, 4]
        with pytest.raises(P2PFlopError, match="was cancelled"):
            run.result()

    def test_status_and_cancel(self, start_node: StartNode) -> None:
        start_node()
        run = pf.attach(Client().submit(b"job"))
        assert run.status == "new"
        run.cancel()
        assert run.status == "cancelled"
        with pytest.raises(P2PFlopError, match="was cancelled"):
            run.result()
        with pytest.raises(ConfigError, match="no run 'r-9'"):
            pf.attach("r-9")

    def test_result_waits_no_longer_than_asked(self, start_node: StartNode) -> None:
        start_node()
        run = pf.attach(Client().submit(b"job"))
        with pytest.raises(TimeoutError, match="goes on"):
            run.result(timeout=0.2)

    def test_iteration_survives_a_restart_of_the_node(
        self, start_node: StartNode, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
        first = start_node(script=ROWS)
        run = pf.attach(Client().submit(b"job"))
        events = run.events()
        seen = [next(events)["seq"] for _ in range(3)]
        first.stop()
        second = start_node(service=first.service)
        second.tell(run.id, "cancelled")
        seen += [event["seq"] for event in events]
        assert seen == [1, 2, 3, 4]

    def test_a_node_that_stays_away_is_told_in_the_end(
        self, start_node: StartNode, monkeypatch: Any
    ) -> None:
        pauses: list[float] = []
        monkeypatch.setattr("p2pflop.client.time.sleep", pauses.append)
        node = start_node(script=ROWS)
        run = pf.attach(Client().submit(b"job"))
        events = run.events()
        next(events)
        node.stop()
        with pytest.raises(NodeUnreachableError, match="lost the node") as caught:
            list(events)
        assert run.id in caught.value.hint
        assert len(pauses) == client_module.MAX_RECONNECTS

    def test_ctrl_c_says_how_to_come_back(self, start_node: StartNode) -> None:
        start_node()
        run = pf.attach(Client().submit(b"job"))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                list(run)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert f"pf.attach('{run.id}')" in caught.value.__notes__[0]
        assert run.status == "new"


class TestEmbedded:
    @pytest.fixture
    def fake(self, monkeypatch: Any, tmp_path: Path) -> Callable[[str], Path]:
        """Makes ``program`` the embedded node; ``home`` is its argument. Gives the home."""

        def install(program: str) -> Path:
            source = textwrap.dedent(program)
            command = [sys.executable, "-c", source]
            monkeypatch.setattr(embedded, "node_command", lambda home: [*command, str(home)])
            return tmp_path / "fresh"

        return install

    def test_it_is_ready_when_its_note_is_there(self, fake: Callable[[str], Path]) -> None:
        home = fake(
            """
            import json, os, pathlib, sys
            home = pathlib.Path(sys.argv[1])
            (home / "token").write_text("abc")
            (home / "n").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": os.getpid()}))
            (home / "n").replace(home / "node.json")
            sys.stdin.read()
            import signal
            signal.pause()
            """
        )
        note = start_embedded(home)
        try:
            assert (note.url, note.token) == ("http://127.0.0.1:9", "abc")
            assert os.getsid(note.pid) == note.pid
        finally:
            os.kill(note.pid, signal.SIGKILL)
            os.waitpid(note.pid, 0)

    def test_its_error_is_raised_as_its_own(self, fake: Callable[[str], Path]) -> None:
        home = fake(
            """
            import sys
            print('{"level": "info"}', file=sys.stderr)
            print('{"error": {"kind": "StoreError", "message": "full", "hint": "free"}}',
                  file=sys.stderr)
            sys.exit(8)
            """
        )
        with pytest.raises(StoreError, match="full") as caught:
            start_embedded(home)
        assert caught.value.hint == "free"

    @pytest.mark.parametrize("words", ["boom", ""])
    def test_whatever_else_it_says_is_shown(self, fake: Callable[[str], Path], words: str) -> None:
        home = fake(f"import sys; sys.exit({words!r})" if words else "import sys; sys.exit(7)")
        with pytest.raises(ConfigError, match=words or "said nothing") as caught:
            start_embedded(home)
        assert embedded.LOG_NAME in caught.value.hint

    def test_who_comes_second_uses_the_first_ones_node(self, fake: Callable[[str], Path]) -> None:
        home = fake(
            f"""
            import json, pathlib, sys
            home = pathlib.Path(sys.argv[1])
            (home / "token").write_text("abc")
            note = {{"url": "http://127.0.0.1:9", "pid": {os.getpid()}}}
            (home / "node.json").write_text(json.dumps(note))
            sys.exit({HomeLockedError.exit_code})
            """
        )
        assert start_embedded(home).pid == os.getpid()

    def test_one_that_hangs_is_ended(self, fake: Callable[[str], Path]) -> None:
        home = fake(
            """
            import os, pathlib, sys, time
            pathlib.Path(sys.argv[1], "pid").write_text(str(os.getpid()))
            time.sleep(60)
            """
        )
        with pytest.raises(ConfigError, match="was not ready after"):
            start_embedded(home, timeout_s=0.5)
        pid = int((home / "pid").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_a_home_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ConfigError, match="cannot start a node"):
            start_embedded(tmp_path / "file" / "home")

    def test_an_owned_node_that_died_is_not_replaced(
        self, start_node: StartNode, monkeypatch: Any
    ) -> None:
        def forbidden(home: Path) -> None:
            raise AssertionError("started one")

        monkeypatch.setattr(client_module, "start_embedded", forbidden)
        node = start_node()
        client = Client(start=True)
        client.status()
        node.stop()
        with pytest.raises(NodeUnreachableError):
            client.status()

    def test_one_that_has_ended_is_started_again(
        self, start_node: StartNode, monkeypatch: Any
    ) -> None:
        node = start_node(embedded=True)
        client = Client(start=True)
        client.status()
        node.stop()

        def again(home: Path) -> Any:
            start_node(service=node.service, embedded=True)
            return read_note(home)

        monkeypatch.setattr(client_module, "start_embedded", again)
        assert client.status()["network"] == "memory"
