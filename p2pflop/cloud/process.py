"""The one session of this process: opened at the first operation, closed at exit."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from p2pflop.cloud.blobs import NodeBlobs
from p2pflop.cloud.link import HttpLink, Link, find_node
from p2pflop.cloud.memory import SessionMemory
from p2pflop.cloud.session import CLOSE_S, ScriptSession, closing_line
from p2pflop.cloud.settings import CloudSettings, read_settings
from p2pflop.errors import P2PFlopError
from p2pflop.job.commands import Ran
from p2pflop.node.config import default_home

BlobPutter = Callable[[memoryview], bytes]
"""Keeps bytes at the node; their address."""
Connect = Callable[[], tuple[Link, BlobPutter]]


@dataclass(frozen=True, slots=True)
class Cloud:
    """A session with all that a device needs of it."""

    settings: CloudSettings
    session: ScriptSession
    memory: SessionMemory
    put_blob: BlobPutter


_cloud: Cloud | None = None
LOCK: Final = threading.RLock()
"""Of whoever makes graphs, numbers commands or says what they name. Threads have one session, and
msgspec crashes where two of them are the first to decode a type."""


os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def say(text: str) -> None:
    """A line for the person, never on standard output."""
    with suppress(OSError, ValueError):  # nobody may be there to read it
        print(f"p2pflop: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _connect() -> tuple[Link, BlobPutter]:
    note = find_node(default_home())
    blobs = NodeBlobs(note)
    os.register_at_fork(after_in_child=blobs.leave)
    return HttpLink(note), blobs.put


def is_open() -> bool:
    """Whether there is a session in this process."""
    return _cloud is not None


def the_cloud(
    on_ran: Callable[[Ran], None], *, verbose: bool = False, connect: Connect = _connect
) -> Cloud:
    """This process's session, opened now if it is not. Raises P2PFlopError."""
    global _cloud
    if _cloud is not None:
        return _cloud
    with LOCK:
        if _cloud is not None:
            return _cloud
        settings = read_settings(os.environ)
        link, put_blob = connect()
        session = ScriptSession(
            link,
            settings,
            (lambda _: None) if settings.quiet else say,
            on_ran,
            verbose=verbose,
        )
        session.open()
        memory = SessionMemory(session, settings.memory_bytes)
        _cloud = Cloud(settings, session, memory, put_blob)
        os.register_at_fork(after_in_child=session.leave)
    return _cloud


def farewell() -> None:
    """Close the session, and say what it was. A fault that nobody has seen yet ends the script with
    an exit code of its own."""
    cloud = _cloud
    if cloud is None:
        return
    seen = cloud.session.failure
    # A thread that is left behind may have it, and wait for an answer.
    LOCK.acquire(timeout=CLOSE_S)
    try:
        closed = cloud.session.close()
        failure = cloud.session.failure
    except KeyboardInterrupt:
        return
    except P2PFlopError as error:
        closed, failure = None, error
    if closed is not None and not cloud.settings.quiet:
        say(closing_line(closed))
    if failure is not None and seen is None:
        _end_with(failure)


def _end_with(error: P2PFlopError) -> None:
    notes = getattr(error, "__notes__", [])
    say("\n".join([f"{type(error).__name__}: {error.message}", *notes]))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    # The interpreter has no way left to hear of it: what was to run after this is not ours to run.
    os._exit(error.exit_code)
