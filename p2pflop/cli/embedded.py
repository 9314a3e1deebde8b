"""Taking a home over from the embedded node that the last command has left there.

An embedded node stays for a minute after its last client. Whoever wants to run a node of their own
on that home need not wait: an idle one is ended, as Ctrl-C would end it.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from p2pflop.client import Client
from p2pflop.embedded import NodeNote, read_note
from p2pflop.errors import HomeLockedError, P2PFlopError
from p2pflop.node.home import held

SETTLE_S: Final = 5.0
"""For a job that has just ended: its lease is given back a moment later."""
END_S: Final = 15.0
POLL_S: Final = 0.05


def end_embedded(home: Path) -> bool:
    """End the embedded node of ``home`` if one runs there and is idle; whether it was ended.

    Raises HomeLockedError if it is busy, or does not end within ``END_S``. A node that its owner
    has started is left alone.
    """
    note = _embedded_note(home)
    if note is None:
        return False
    with Client(home) as client:
        try:
            _wait_until_idle(client, home)
        except HomeLockedError:
            raise
        except P2PFlopError:
            # Whatever has this process id, it does not answer as the node: the lock will tell.
            return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(note.pid, signal.SIGINT)
    deadline = time.monotonic() + END_S
    while True:
        try:
            # The lock, not the process id: a process that nobody waits for keeps its id.
            with held(home):
                return True
        except HomeLockedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _embedded_note(home: Path) -> NodeNote | None:
    with suppress(P2PFlopError):
        note = read_note(home)
        if note is not None and note.embedded and note.is_alive:
            return note
    return None


def _wait_until_idle(client: Client, home: Path) -> None:
    deadline = time.monotonic() + SETTLE_S
    while True:
        under_way: list[dict[str, Any]] = [job for job in client.jobs() if not job["end_state"]]
        if under_way:
            run_id = under_way[0]["id"]
            raise HomeLockedError(
                f"the embedded node of {home} runs job {run_id}",
                hint=f"Wait for its end ('p2pflop watch {run_id}'), or end it: "
                f"'p2pflop cancel {run_id}'.",
            )
        if not client.status().get("leases"):
            return
        if time.monotonic() > deadline:
            raise HomeLockedError(
                f"the embedded node of {home} still has a lease", hint="Try again in a moment."
            )
        time.sleep(POLL_S)
