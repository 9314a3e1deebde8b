"""The guard around tasks of the main nursery: what a peer makes one raise must not end the node.

A nursery ends with its first exception, and the daemon's holds everything. So whatever is started
there on behalf of peers, or goes on for as long as the node does, is started through here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVarTuple

import trio

RESTART_S: Final = 5.0
"""Between a failure of something that has to go on and its next try."""

Arguments = TypeVarTuple("Arguments")
_log = logging.getLogger(__name__)


async def survive(task: Callable[[*Arguments], Awaitable[object]], *arguments: *Arguments) -> None:
    """Run ``task`` once; log what it raises."""
    try:
        await task(*arguments)
    except Exception:  # noqa: BLE001 - see the head of this module
        _log.exception("%s failed; the node goes on", _name(task))


async def keep_going(
    task: Callable[[*Arguments], Awaitable[object]], *arguments: *Arguments
) -> None:
    """Run ``task``, which never returns, again and again as it fails, ``RESTART_S`` apart."""
    while True:
        await survive(task, *arguments)
        await trio.sleep(RESTART_S)


def _name(task: Callable[..., object]) -> str:
    return getattr(task, "__qualname__", repr(task))
