"""The node that a client starts for itself when none is running.

It is the same program as ``p2pflop node``, on loopback and on a free port, detached from the
terminal. It sells nothing, runs jobs in its own sandbox at price 0, and ends itself a minute after
its last client has gone and no job is unfinished. What it writes goes to ``embedded.log`` in the
home; if it does not come up, the end of that is the error that the user sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from p2pflop.errors import ConfigError, HomeLockedError, P2PFlopError, StoreFullError
from p2pflop.replies import error_from

START_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.02
LOG_NAME: Final = "embedded.log"
MAX_ERROR_CHARS: Final = 2000
MAX_NOTE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class NodeNote:
    """Where the node of a home listens: its ``node.json`` and token."""

    url: str
    pid: int
    embedded: bool
    token: str

    @property
    def is_alive(self) -> bool:
        """Whether a process with the noted id exists; a killed node leaves its note behind."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def read_note(home: Path) -> NodeNote | None:
    """The note in ``home``, or None where no node has left one. Raises ConfigError."""
    try:
        with (home / "node.json").open("rb") as file:
            note = json.loads(file.read(MAX_NOTE_BYTES))
        token = (home / "token").read_text("ascii").strip()
        url = str(note["url"])
        if not (urlsplit(url).hostname and urlsplit(url).port):
            raise ValueError(f"{url!r} is not where a node listens")
        return NodeNote(url, int(note["pid"]), bool(note.get("embedded", False)), token)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"cannot read how to reach the node of {home}: {reason}",
            hint="Is it your home? Choose another with --home or P2PFLOP_HOME.",
        ) from error


def start_embedded(home: Path, timeout_s: float = START_TIMEOUT_S) -> NodeNote:
    """Start a node for ``home`` and wait until it has left its note.

    Raises the error that the node ended with, or ConfigError after ``timeout_s``.
    """
    log_path = home / LOG_NAME
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  this program itself, no shell
                node_command(home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                start_new_session=True,
            )
    except OSError as error:
        raise ConfigError(
            f"cannot start a node in {home}: {error.strerror}",
            hint="Choose another home with --home or P2PFLOP_HOME.",
        ) from error
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        code = process.poll()
        # Another client may have been quicker to start one: then that one holds the home.
        is_other = code == HomeLockedError.exit_code
        if code is not None and not is_other:
            raise failure_of("embedded node", code, log_path)
        note = read_note(home)
        if note is not None and (note.pid == process.pid or (is_other and note.is_alive)):
            return note
        time.sleep(POLL_S)
    if process.poll() is not None:
        raise failure_of("embedded node", process.returncode, log_path)
    process.terminate()
    process.wait()
    raise ConfigError(
        f"the node of {home} was not ready after {timeout_s:.0f} s", hint=f"See {log_path}."
    )


def node_command(home: Path) -> list[str]:
    """The command line of an embedded node."""
    program = [sys.executable, "-m", "p2pflop.cli.main"]
    return [*program, "node", "--embedded", "--json", "--home", str(home.absolute())]


def failure_of(name: str, code: int, log_path: Path) -> P2PFlopError:
    """The error that a node, started with ``--json``, has ended with: the last line of its log."""
    text = log_path.read_text("utf-8", "replace").strip()[-MAX_ERROR_CHARS:]
    last = text.rpartition("\n")[2]
    try:
        told = json.loads(last)["error"]
        return error_from(str(told["kind"]), str(told["message"]), str(told["hint"]))
    except (ValueError, KeyError, TypeError):
        if code == StoreFullError.exit_code:  # nor was there room for its last line
            return StoreFullError(
                f"the {name} did not start: the disk of {log_path.parent} is full",
                hint="Free space on it, or choose another home with --home or P2PFLOP_HOME.",
            )
        return ConfigError(
            f"the {name} did not start (exit code {code}): {last or 'it said nothing'}",
            hint=f"Its log is {log_path}; 'p2pflop doctor' checks this machine.",
        )
