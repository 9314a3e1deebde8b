"""``p2pflop registry serve``: the public answers, and what has to be done every few seconds.

It may be killed at any moment, and run beside the operator's commands: all that matters is in
transactions of the database. What it cannot do (a full disk, a certificate that has ended) is told
in the log and tried again; the public part goes on.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from p2pflop.errors import P2PFlopError
from p2pflop.franchise.records import DAY_NS
from p2pflop.node.api_server import ApiListener, bind_api, serve_api
from p2pflop.registry.api import create_app
from p2pflop.registry.office import Office, open_office
from p2pflop.units import counted

KEEP_EVERY_S: Final = 5.0
WARN_BEFORE_NS: Final = 21 * DAY_NS
SAID_EVERY_S: Final = 3600.0

_log = logging.getLogger(__name__)


def run_service(
    folder: Path, host: str, port: int, *, behind_proxy: bool, started: Callable[[str, str], None]
) -> None:
    """Serve until Ctrl-C or SIGTERM. ``started`` is called with the issuer's key and the URL."""
    trio.run(_run, folder, bind_api(port, host), behind_proxy, started)


async def _run(
    folder: Path, listener: ApiListener, behind_proxy: bool, started: Callable[[str, str], None]
) -> None:
    stopping = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_office(folder) as office, trio.open_nursery() as nursery:
            app = create_app(office, behind_proxy=behind_proxy)
            await nursery.start(serve_api, app, listener, stopping)
            nursery.start_soon(keep_office, office, stopping)
            started(office.issuer.hex(), listener.url)
            async for _ in signals:
                break
            stopping.set()
            nursery.cancel_scope.deadline = trio.current_time() + 2 * KEEP_EVERY_S


async def keep_office(office: Office, stopping: trio.Event) -> None:
    """``keep_once`` every few seconds until ``stopping``; what is wrong is said once an hour."""
    said_at = -SAID_EVERY_S
    while not stopping.is_set():
        trouble = await keep_once(office)
        if trouble and trio.current_time() >= said_at + SAID_EVERY_S:
            _log.warning("%s", trouble)
            said_at = trio.current_time()
        with trio.move_on_after(KEEP_EVERY_S):
            await stopping.wait()


async def keep_once(office: Office) -> str:
    """Renew attestations and freshen the head; what the operator should know, or nothing."""
    try:
        issued = await office.keep()
        if issued:
            _log.info("issued %d attestations", issued)
        return _warning(office.certificate().record.valid_until_ns - office.clock())
    except P2PFlopError as error:
        return f"{error.message}. {error.hint}"


def _warning(left_ns: int) -> str:
    if left_ns >= WARN_BEFORE_NS:
        return ""
    return (
        f"the certificate of the online key ends in {counted(left_ns // DAY_NS, 'day')}: "
        "p2pflop registry certify"
    )
