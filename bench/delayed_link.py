"""A TCP link to a peer that is slower than loopback, and counts what passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

CHUNK_BYTES = 64 * 1024


@dataclass
class Link:
    """Where to connect to, how long a byte takes each way, and how many passed."""

    port: int = 0
    delay_s: float = 0.0
    there_bytes: int = 0
    back_bytes: int = 0


@contextmanager
def delayed_link(port: int) -> Iterator[Link]:
    """Listen on a free port for connections to ``port``; ``delay_s`` may be set at any time."""
    link, ready = Link(), threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                back_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:  # who listened there was killed
                writer.close()
                return
            with suppress(asyncio.CancelledError):
                await asyncio.gather(
                    _pump(link, reader, there_writer, there=True),
                    _pump(link, back_reader, writer, there=False),
                    return_exceptions=True,
                )

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        link.port = server.sockets[0].getsockname()[1]
        ready.set()
        await server.serve_forever()

    def run() -> None:
        task = loop.create_task(serve())
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield link
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(5)


async def _pump(
    link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, there: bool
) -> None:
    """Pass bytes on, each ``delay_s`` after it came, in their order."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    clock = asyncio.get_running_loop().time

    async def deliver() -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - clock()))
            writer.write(data)
            await writer.drain()
            if not data:
                return

    delivering = asyncio.create_task(deliver())
    try:
        while data := await reader.read(CHUNK_BYTES):
            if there:
                link.there_bytes += len(data)
            else:
                link.back_bytes += len(data)
            queue.put_nowait((clock() + link.delay_s, data))
    finally:
        queue.put_nowait((0.0, b""))
        await delivering
        writer.close()
