"""Serving the local API: a bound port first, then hypercorn's trio worker in the node's nursery."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from p2pflop.errors import ConfigError

LOOPBACK: Final = "127.0.0.1"
BACKLOG: Final = 100
KEEP_ALIVE_S: Final = 75
GRACE_S: Final = 3.0
STALLED_MS: Final = 30_000


@dataclass(frozen=True, slots=True)
class ApiListener:
    """A loopback port that listens already; nobody is answered before ``serve_api``."""

    socket: socket.socket
    port: int

    @property
    def url(self) -> str:
        """``http://127.0.0.1:<port>``."""
        return f"http://{LOOPBACK}:{self.port}"


def bind_api(port: int) -> ApiListener:
    """Listen on ``127.0.0.1:port``; 0 takes any free one. Raises ConfigError if it is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Inherited by accepted sockets: hypercorn shields its sends from cancellation, so a client
        # that stopped reading would otherwise hold up the node's end for as long as it likes.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        listener.bind((LOOPBACK, port))
        # Listening now, not only bound: two sockets with SO_REUSEADDR may be bound to one port.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {LOOPBACK} is in use",
                hint="Another node or program has it. Choose another with --port, or 0 for any.",
            ) from error
        raise ConfigError(
            f"cannot listen on port {port} of {LOOPBACK}: {error.strerror}",
            hint="Choose another with --port, or 0 for any.",
        ) from error
    return ApiListener(listener, listener.getsockname()[1])


async def serve_api(
    app: Callable[..., Any],
    listener: ApiListener,
    stopping: trio.Event,
    *,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` until ``stopping`` is set, then let open requests end for ``GRACE_S``."""
    config = Config()
    config.bind = [f"fd://{listener.socket.detach()}"]
    config.backlog = BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    logger = logging.getLogger(__name__)
    # "Running on ..." is for the node to say; what hypercorn reports above that is a fault.
    logger.setLevel(max(logging.WARNING, logger.getEffectiveLevel()))
    config.errorlog = logger
    config.accesslog = None
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, app, config, stopping)
        task_status.started()


async def _serve(
    app: Callable[..., Any],
    config: Config,
    stopping: trio.Event,
    *,
    task_status: Any,
) -> None:
    await serve(
        cast(Any, app),
        config,
        shutdown_trigger=stopping.wait,
        mode="asgi",
        task_status=task_status,
    )
