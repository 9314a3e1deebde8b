"""Fetching from one store on disk into another, over sockets, with a restart in between."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from p2pflop.dht.fetch import BlobServer, fetch
from p2pflop.dht.manifest import CHUNK_BYTES, address_of
from p2pflop.dht.planes import FrameStream, Stream
from p2pflop.dht.store import FileStore
from p2pflop.errors import ProviderError

SIZE = 40 * CHUNK_BYTES + 11
DATA = hashlib.shake_128(b"sockets").digest(SIZE)


class _Socket:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self, n: int) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


class _CutAfter(_Socket):
    """A connection that breaks when ``room`` bytes have passed."""

    room = 35 * CHUNK_BYTES

    async def read(self, n: int) -> bytes:
        if self.room <= 0:
            raise trio.BrokenResourceError("cut")
        data = await super().read(min(n, self.room))
        self.room -= len(data)
        return data


class _Dialer:
    def __init__(self, ports: dict[str, int], transport: type[_Socket]) -> None:
        self._ports = ports
        self._transport = transport

    async def open(self, peer: str, protocol: str) -> Stream:
        stream = await trio.open_tcp_stream("127.0.0.1", self._ports[peer])
        return FrameStream(self._transport(stream), peer)


async def test_a_cut_fetch_goes_on_after_a_restart(tmp_path: Path) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ports = {"provider": listeners[0].socket.getsockname()[1]}
    async with FileStore(tmp_path / "provider") as provider, trio.open_nursery() as nursery:
        address = (await provider.put(DATA, public=True)).address
        assert address == address_of(DATA)
        server = BlobServer(provider)

        async def handle(stream: trio.SocketStream) -> None:
            try:
                await server.handle(FrameStream(_Socket(stream), "requester"))
            except ProviderError:
                return

        nursery.start_soon(trio.serve_listeners, handle, listeners)
        async with FileStore(tmp_path / "requester") as store:
            with pytest.raises(ProviderError, match="cut"):
                await fetch(store, address, ["provider"], _Dialer(ports, _CutAfter))
            assert await store.stat(address) is None
        done: list[int] = []
        async with FileStore(tmp_path / "requester") as store:
            info = await fetch(
                store,
                address,
                ["provider"],
                _Dialer(ports, _Socket),
                progress=lambda done_bytes, _: done.append(done_bytes),
            )
            assert await store.get(info.address) == DATA
        assert done[0] >= 30 * CHUNK_BYTES
        assert done[-1] == SIZE
        nursery.cancel_scope.cancel()
