"""How fast the store takes and gives a large blob, and small ones, beside the bare disk.

    python bench/store.py [--mebibytes 256] [--folder DIR]

Prints one JSON object. The peer of ``put`` is writing the same bytes to a file, with fdatasync and
a SHA-256; the peer of ``fetch`` is ``put`` on the same disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from p2pflop.dht.fetch import fetch, serve
from p2pflop.dht.manifest import CHUNK_BYTES, manifest_of
from p2pflop.dht.planes import FrameStream, Stream
from p2pflop.dht.store import FileStore

SMALL_PUTS = 100


class Socket:
    """A trio socket as a ByteStream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self, n: int) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


class Loopback:
    """A Dialer to one server on a port of this machine."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self, peer: str, protocol: str) -> Stream:  # noqa: ARG002
        return FrameStream(Socket(await trio.open_tcp_stream("127.0.0.1", self._port)), peer)


def write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        for start in range(0, len(data), CHUNK_BYTES):
            file.write(data[start : start + CHUNK_BYTES])
        file.flush()
        os.fdatasync(file.fileno())


async def megabytes_per_s(size: int, action: Callable[[], Awaitable[object]]) -> float:
    os.sync()
    start = time.perf_counter()
    await action()
    return round(size / (time.perf_counter() - start) / 1e6, 1)


async def measure(folder: Path, size: int) -> dict[str, object]:
    data = os.urandom(size)
    result: dict[str, object] = {"unit": "MB/s", "blob_bytes": size}

    async def plain() -> None:
        write_file(folder / "plain", data)

    async def hash_only() -> None:
        hashlib.sha256(data).digest()

    async with FileStore(folder / "store") as store:
        result["put"] = await megabytes_per_s(size, lambda: store.put(data, public=True))
        result["peer: write + fdatasync"] = await megabytes_per_s(size, plain)
        result["peer: sha256"] = await megabytes_per_s(size, hash_only)
        address = manifest_of(data).address
        result["get, warm"] = await megabytes_per_s(size, lambda: store.get(address))
        await store.delete(address)

        async def stream() -> None:
            async with store.writer(public=True) as writer:
                for start in range(0, size, CHUNK_BYTES):
                    await writer.write(data[start : start + CHUNK_BYTES])
                await writer.finish()

        result["put by a writer"] = await megabytes_per_s(size, stream)
        result["put again"] = await megabytes_per_s(size, lambda: store.put(data))
        times_ms = []
        for number in range(SMALL_PUTS):
            start = time.perf_counter()
            await store.put(number.to_bytes(1024, "big"))
            times_ms.append((time.perf_counter() - start) * 1e3)
        result["put of 1 KiB, p50 ms"] = round(statistics.median(times_ms), 3)
        result["fetch over loopback to disk"] = await fetch_rate(folder, store, address, size)
    return result


async def fetch_rate(folder: Path, store: FileStore, address: bytes, size: int) -> float:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listeners[0].socket.getsockname()[1]

    async def handle(stream: trio.SocketStream) -> None:
        await serve(FrameStream(Socket(stream), "requester"), store)

    async with (
        trio.open_nursery() as nursery,
        FileStore(folder / "other") as other,
    ):
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        rate = await megabytes_per_s(
            size, lambda: fetch(other, address, ["provider"], Loopback(port))
        )
        nursery.cancel_scope.cancel()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = options.mebibytes * 1024 * 1024
        print(json.dumps(trio.run(measure, Path(folder), size), indent=1))


if __name__ == "__main__":
    main()
