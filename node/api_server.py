"""Serving the local API: a bound port first, then hypercorn's connections in the node's nursery.

hypercorn bounds neither how many connections there are nor how long a request's head may take, and
any program on the machine can open some. So its listener is replaced by ours: at most
``MAX_CONNECTIONS``, of which the one that has been idle for longest gives way to a new one, and
``HEAD_S`` from the first byte of a request to the end of its head.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from p2pflop.errors import ConfigError

LOOPBACK: Final = "127.0.0.1"
BACKLOG: Final = 100
KEEP_ALIVE_S: Final = 75
GRACE_S: Final = 3.0
STALLED_MS: Final = 30_000
MAX_CONNECTIONS: Final = 256
HEAD_S: Final = 10.0
"""Far more than a program on the same machine takes to send a request's head."""


@dataclass(frozen=True, slots=True)
class ApiListener:
    """A port that listens already; nobody is answered before ``serve_api``."""

    socket: socket.socket
    port: int
    host: str = LOOPBACK

    @property
    def url(self) -> str:
        """``http://127.0.0.1:<port>``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def bind_api(port: int, host: str = LOOPBACK) -> ApiListener:
    """Listen on ``port`` of an address; 0 takes any free one. Raises ConfigError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Inherited by accepted sockets: hypercorn shields its sends from cancellation, so a client
        # that stopped reading would otherwise hold up the node's end for as long as it likes.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        listener.bind((host, port))
        # Listening now, not only bound: two sockets with SO_REUSEADDR may be bound to one port.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use",
                hint="Another node or program has it. Choose another with --port, or 0 for any.",
            ) from error
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}",
            hint="Choose another with --port, or 0 for any.",
        ) from error
    return ApiListener(listener, listener.getsockname()[1], host)


async def serve_api(
    app: Callable[..., Any],
    listener: ApiListener,
    stopping: trio.Event,
    *,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` until ``stopping`` is set, then let open requests end for ``GRACE_S``."""
    config = Config()
    opened = socket.socket(fileno=listener.socket.detach())
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    logger = logging.getLogger(__name__)
    # "Running on ..." is for the node to say; what hypercorn reports above that is a fault.
    logger.setLevel(max(logging.WARNING, logger.getEffectiveLevel()))
    config.errorlog = logger
    config.accesslog = None
    async with trio.open_nursery() as nursery:
        server = _Server(app, config)
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(opened))]
        accepting = trio.CancelScope()

        async def accept() -> None:
            with accepting:
                await trio.serve_listeners(server.serve, listeners, handler_nursery=nursery)

        nursery.start_soon(accept)
        task_status.started()
        await stopping.wait()
        accepting.cancel()
        await server.context.terminated.set()
        await server.close_idle()
        nursery.cancel_scope.deadline = trio.current_time() + GRACE_S


class _Server:
    """The connections to the API, in the order in which they were last heard of."""

    def __init__(self, app: Callable[..., Any], config: Config) -> None:
        self.context = WorkerContext(None)
        self._app = wrap_app(cast(Any, app), config.wsgi_max_body_size, "asgi")
        self._config = config
        self._connections: dict[_Connection, None] = {}

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection, unless all places are taken by requests under way."""
        if len(self._connections) >= MAX_CONNECTIONS and not await self._make_room():
            return  # trio closes it
        connection = _Connection(self, self._app, self._config, self.context, stream)
        self.touch(connection)
        try:
            await connection.run()
        finally:
            self._connections.pop(connection, None)

    def touch(self, connection: _Connection) -> None:
        """Something whole came or went on ``connection``."""
        self._connections.pop(connection, None)
        self._connections[connection] = None

    async def close_idle(self) -> None:
        """Let every connection go on which no request is under way."""
        for connection in list(self._connections):
            if connection.is_idle:
                with suppress(trio.BusyResourceError):
                    await connection.stream.aclose()

    async def _make_room(self) -> bool:
        for connection in self._connections:
            if connection.is_idle:
                del self._connections[connection]
                with suppress(trio.BusyResourceError):
                    await connection.stream.aclose()
                return True
        return False


class _Connection(TCPServer):
    def __init__(
        self,
        server: _Server,
        app: Any,
        config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), cast(Any, stream))
        self.is_idle = True
        self._server = server
        self._socket = stream.socket
        self._head_until = inf

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self.is_idle = event.idle
            self._head_until = inf
            self._server.touch(self)
        elif isinstance(event, RawData):
            event = RawData(self._send_now(event.data))
            if not event.data:
                return
        await super().protocol_send(event)

    def _send_now(self, data: bytes) -> bytes:
        """What the kernel does not take at once, which is nothing unless the client is slow."""
        try:
            if not self.send_lock.locked():
                data = data[os.write(self._socket.fileno(), data) :]
        except OSError:
            pass  # a full buffer, or a fault that the next who sends is told of
        return data

    async def _read_data(self) -> None:
        """As hypercorn's, with a limit on the time that a request's head takes."""
        data = b"..."
        while data:
            try:
                with trio.fail_at(self._head_until):
                    data = bytes(await self.stream.receive_some(MAX_RECV))
            except (trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError):
                break
            if self.is_idle and self._head_until == inf:
                self._head_until = trio.current_time() + HEAD_S
            await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())
        await self.idle_task.stop()  # it would hold the socket for as long as one may be idle
