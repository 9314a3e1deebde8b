"""The local HTTP API over a service in memory, through a real server on a free port."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from p2pflop.dht.manifest import CHUNK_BYTES, address_of
from p2pflop.errors import ConfigError, StoreError, VerificationError
from p2pflop.node import api_server
from p2pflop.node.api_guard import Activity, dump_json
from p2pflop.node.api_server import bind_api
from p2pflop.node.memory_service import MemoryService
from tests.serving import LIMITS, TOKEN, Server, error_of, serving, submit


async def raw(port: int, request: bytes) -> bytes:
    """The answer to bytes that no HTTP client would send."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        answer = b""
        with trio.fail_after(5):
            async for piece in stream:
                answer += piece
    return answer


class TestConnections:
    HALF = b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1"

    async def test_half_a_head_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api_server, "HEAD_S", 0.2)
        async with serving() as server:
            with trio.fail_after(5):
                assert await raw(server.port, self.HALF) == b""

    async def test_bytes_that_trickle_in_do_not_prolong_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_server, "HEAD_S", 0.3)
        async with (
            serving() as server,
            await trio.open_tcp_stream("127.0.0.1", server.port) as stream,
        ):

            async def trickle() -> None:
                while True:
                    await stream.send_all(b"G")
                    await trio.sleep(0.05)

            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await trickle()

    async def test_a_node_that_ends_waits_for_no_idle_connection(self) -> None:
        async with serving() as server:
            run = await submit(server)
            await server.client.post(f"/v1/jobs/{run}/cancel")
            await server.get(f"/v1/jobs/{run}/events")
            with trio.fail_after(api_server.GRACE_S / 2):
                server.stopping.set()
                await server.ended.wait()

    async def test_idle_connections_give_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api_server, "MAX_CONNECTIONS", 4)
        async with serving() as server, AsyncExitStack() as stack:
            held = []
            for _ in range(10):
                stream = await trio.open_tcp_stream("127.0.0.1", server.port)
                held.append(await stack.enter_async_context(stream))
                await stream.send_all(self.HALF)
            for _ in range(3):
                assert (await server.get("/v1/status")).status_code == 200
            with trio.fail_after(5):
                assert await held[0].receive_some() == b""


class TestGate:
    async def test_everything_but_blobs_needs_the_token(self) -> None:
        async with serving() as server:
            blob = await server.service.store.put(b"open")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as anyone:
                assert (await anyone.get(f"/blob/{blob.address.hex()}")).content == b"open"
                assert (await anyone.head(f"/blob/{blob.address.hex()}")).status_code == 200
                for path in ("/v1/status", "/v1/jobs", "/v1/blobs", "/nothing"):
                    assert (await anyone.get(path)).status_code == 401, path
                refused = await anyone.put("/blob", content=b"x")
                assert refused.status_code == 401
                assert "token" in error_of(refused)["hint"]
            assert len(await server.service.store.list()) == 1

    @pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", "Bearer é"])
    async def test_a_wrong_token_is_refused(self, value: str) -> None:
        async with serving() as server:
            headers = {b"authorization": value.encode()}
            response = await server.client.get("/v1/status", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"

    async def test_a_rebound_name_is_refused(self) -> None:
        async with serving() as server:
            for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1:1", "127.0.0.1"):
                assert (await server.get("/v1/status", host=host)).status_code == 421, host
            for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
                host = f"{name}:{server.port}"
                assert (await server.get("/v1/status", host=host)).status_code == 200, host

    async def test_pages_of_other_origins_are_refused(self) -> None:
        async with serving() as server:
            ours = f"http://127.0.0.1:{server.port}"
            assert (await server.get("/v1/status", origin=ours)).status_code == 200
            for origin in ("https://evil.example", "null", f"http://localhost:{server.port}"):
                assert (await server.get("/v1/status", origin=origin)).status_code == 403, origin
            blob = f"/blob/{(await server.service.store.put(b'x')).address.hex()}"
            crossing = {"sec_fetch_site": "cross-site"}
            assert (await server.get(blob, **crossing, sec_fetch_dest="image")).status_code == 403
            followed = await server.get(blob, **crossing, sec_fetch_dest="document")
            assert followed.status_code == 200

    async def test_answers_carry_the_browser_headers(self) -> None:
        async with serving() as server:
            for path in ("/v1/status", f"/blob/{'00' * 32}"):
                headers = (await server.get(path)).headers
                assert headers["x-content-type-options"] == "nosniff"
                assert "default-src 'none'" in headers["content-security-policy"]
                assert "set-cookie" not in headers

    async def test_other_protocols_are_refused(self) -> None:
        async with serving() as server:
            host = f"Host: 127.0.0.1:{server.port}\r\n".encode()
            upgrade = b"GET /v1/status HTTP/1.1\r\n" + host
            upgrade += b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            upgrade += (
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            )
            assert b" 403 " in (await raw(server.port, upgrade + b"\r\n")).split(b"\r\n")[0]
            assert (await raw(server.port, b"\x00\x01nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400")

    async def test_more_open_requests_than_the_limit_are_turned_away(self) -> None:
        async with serving() as server:
            run = await submit(server)
            async with trio.open_nursery() as nursery:
                half = LIMITS.max_open_requests // 2
                await _open_streams(server, run, nursery, half, total=half)
                assert (await server.get("/v1/status")).status_code == 200
                assert (await _anyones_get(server)).status_code == 503
                await _open_streams(server, run, nursery, half, total=2 * half)
                assert (await server.get("/v1/status")).status_code == 503
                await server.service.runs[run].tell("cancelled")
            assert (await server.get("/v1/status")).status_code == 200

    async def test_activity_counts_who_is_here(
        self, autojump_clock: trio.testing.MockClock
    ) -> None:
        activity = Activity()
        assert activity.idle_s() == 0
        await trio.sleep(5)
        assert activity.idle_s() == 5
        activity.enter()
        await trio.sleep(5)
        assert activity.idle_s() == 0
        activity.leave()
        await trio.sleep(2)
        assert activity.idle_s() == 2


async def _open_streams(
    server: Server, run: str, nursery: trio.Nursery, more: int, *, total: int
) -> None:
    for _ in range(more):
        nursery.start_soon(_hold, server, run)
    await _until(lambda: server.activity.open_requests == total)


async def _anyones_get(server: Server) -> httpx.Response:
    """A blob asked for without the token."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as anyone:
        return await anyone.get(f"/blob/{'00' * 32}")


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  the server tells nobody of an end
            await trio.sleep(0.001)


async def _hold(server: Server, run: str) -> None:
    async with server.client.stream("GET", f"/v1/jobs/{run}/events") as response:
        async for _ in response.aiter_raw():
            pass


class TestBlobs:
    async def test_put_then_get_gives_the_bytes(self) -> None:
        data = bytes(range(256)) * 9000
        async with serving() as server:
            put = await server.client.put("/blob", content=data)
            assert put.status_code == 201
            told = put.json()
            assert told == {
                "address": address_of(data).hex(),
                "size_bytes": len(data),
                "public": False,
            }
            got = await server.get(f"/blob/{told['address']}")
            assert got.content == data
            assert got.headers["etag"] == f'"{told["address"]}"'
            assert got.headers["content-type"] == "application/octet-stream"
            assert got.headers["content-length"] == str(len(data))
            listed = (await server.get("/v1/blobs")).json()
            assert listed == {"blobs": [told], "total": 1}
            assert (await server.get(f"/v1/blobs/{told['address']}")).json() == told

    async def test_public_put_makes_the_blob_public(self) -> None:
        async with serving() as server:
            put = await server.client.put("/blob?public=1", content=b"for all")
            assert put.json()["public"] is True
            assert (await server.client.put("/blob?public=yes", content=b"")).status_code == 400

    async def test_deleting_is_for_the_user_and_for_own_blobs(self) -> None:
        async with serving() as server:
            store = server.service.store
            own = await store.put(b"own", public=True)
            lent = await store.put(b"a buyer's", owner=b"buyer")
            path = f"/blob/{own.address.hex()}"
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as anyone:
                assert (await anyone.delete(path)).status_code == 401
            refused = await server.client.delete(f"/blob/{lent.address.hex()}")
            assert error_of(refused)["kind"] == "StoreError"
            assert await store.list() == (own, lent)
            gone = await server.client.delete(path)
            assert gone.json() == {"address": own.address.hex(), "size_bytes": 3, "public": True}
            assert await store.list() == (lent,)
            assert error_of(await server.client.delete(path))["kind"] == "BlobNotFoundError"

    async def test_an_empty_blob_is_a_blob(self) -> None:
        async with serving() as server:
            address = (await server.client.put("/blob", content=b"")).json()["address"]
            got = await server.get(f"/blob/{address}")
            assert (got.status_code, got.content) == (200, b"")

    @pytest.mark.parametrize(
        ("wanted", "start", "stop"),
        [
            ("bytes=0-0", 0, 1),
            (f"bytes={CHUNK_BYTES - 1}-{CHUNK_BYTES}", CHUNK_BYTES - 1, CHUNK_BYTES + 1),
            ("bytes=1500000-", 1_500_000, 2_000_000),
            ("bytes=-7", 1_999_993, 2_000_000),
            ("bytes=1999999-99999999", 1_999_999, 2_000_000),
        ],
    )
    async def test_ranges(self, wanted: str, start: int, stop: int) -> None:
        data = bytes(index * 7 % 251 for index in range(2_000_000))
        async with serving() as server:
            blob = await server.service.store.put(data)
            got = await server.get(f"/blob/{blob.address.hex()}", range=wanted)
            assert got.status_code == 206
            assert got.content == data[start:stop]
            assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"

    async def test_a_range_outside_is_refused(self) -> None:
        async with serving() as server:
            blob = await server.service.store.put(b"short")
            got = await server.get(f"/blob/{blob.address.hex()}", range="bytes=5-")
            assert (got.status_code, got.headers["content-range"]) == (416, "bytes */5")

    async def test_a_known_etag_saves_the_body(self) -> None:
        async with serving() as server:
            address = (await server.service.store.put(b"data")).address.hex()
            got = await server.get(f"/blob/{address}", if_none_match=f'"{address}"')
            assert (got.status_code, got.content) == (304, b"")
            other = await server.get(f"/blob/{address}", range="bytes=0-0", if_range='"other"')
            assert (other.status_code, other.content) == (200, b"data")

    async def test_head_tells_only_of_this_node(self) -> None:
        far = b"only elsewhere"
        service = MemoryService(elsewhere={address_of(far): far})
        async with serving(service) as server:
            path = f"/blob/{address_of(far).hex()}"
            assert (await server.client.head(path)).status_code == 404
            assert (await server.get(path)).content == far
            head = await server.client.head(path)
            assert (head.status_code, head.headers["content-length"]) == (200, str(len(far)))

    async def test_only_the_nodes_user_makes_it_fetch(self) -> None:
        far = b"only elsewhere"
        service = MemoryService(elsewhere={address_of(far): far})
        async with serving(service) as server:
            path = f"/blob/{address_of(far).hex()}"
            link = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as anyone:
                refused = await anyone.get(path, headers=link)
                assert refused.status_code == 404
                assert "p2pflop get" in error_of(refused)["hint"]
                assert not await service.store.list()
                assert (await server.get(path)).content == far
                assert (await anyone.get(path)).content == far

    async def test_unknown_and_misnamed_blobs(self) -> None:
        async with serving() as server:
            missing = await server.get(f"/blob/{'ab' * 32}?timeout_s=1")
            assert missing.status_code == 404
            assert error_of(missing)["kind"] == "BlobNotFoundError"
            assert error_of(missing)["exit_code"] == 9
            assert error_of(await server.get("/blob/zz"))["kind"] == "ConfigError"

    async def test_a_blob_over_the_limit_leaves_nothing(self) -> None:
        async with serving() as server:
            fits = await server.client.put("/blob", content=bytes(LIMITS.max_blob_bytes))
            assert fits.status_code == 201
            declared = await server.client.put("/blob", content=bytes(LIMITS.max_blob_bytes + 1))
            assert declared.status_code == 413

            async def chunked() -> AsyncIterator[bytes]:
                for _ in range(4):
                    yield b"x" * CHUNK_BYTES

            streamed = await server.client.put("/blob", content=chunked())
            assert streamed.status_code == 413
            assert error_of(streamed)["kind"] == "StoreError"
            assert len(await server.service.store.list()) == 1

    async def test_an_upload_that_breaks_off_leaves_nothing(self) -> None:
        async with serving() as server:
            head = f"PUT /blob HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            head += f"Authorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n"
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                await stream.send_all(head.encode() + b"half")
            await _until(lambda: not server.activity.open_requests)
            assert (await server.get("/v1/blobs")).json()["blobs"] == []

    async def test_a_damaged_chunk_ends_the_download_short(self, monkeypatch: Any) -> None:
        async with serving() as server:
            blob = await server.service.store.put(bytes(3 * CHUNK_BYTES))
            read_chunk = server.service.store.read_chunk

            async def damaged(address: bytes, index: int) -> bytes:
                if index == bad:
                    raise VerificationError("chunk does not match")
                return await read_chunk(address, index)

            monkeypatch.setattr(server.service.store, "read_chunk", damaged)
            bad = 0
            told = await server.get(f"/blob/{blob.address.hex()}")
            assert error_of(told)["kind"] == "VerificationError"
            bad = 2
            with pytest.raises(httpx.RemoteProtocolError):
                await server.get(f"/blob/{blob.address.hex()}")

    async def test_a_client_that_leaves_stops_the_reading(self, monkeypatch: Any) -> None:
        async with serving() as server:
            blob = await server.service.store.put(bytes(CHUNK_BYTES))
            reads = 0

            async def endless(address: bytes, index: int) -> bytes:
                nonlocal reads
                reads += 1
                await trio.lowlevel.checkpoint()
                return bytes(CHUNK_BYTES)

            class Huge:
                size_bytes = 10**6 * CHUNK_BYTES

            async def find(address: bytes, *, timeout_s: float) -> Huge:
                return Huge()

            monkeypatch.setattr(server.service.store, "read_chunk", endless)
            monkeypatch.setattr(server.service, "find_blob", find)
            async with server.client.stream("GET", f"/blob/{blob.address.hex()}") as response:
                await anext(response.aiter_raw())
            await _until(lambda: not server.activity.open_requests)
            assert reads < 1000


class TestNode:
    async def test_reports(self) -> None:
        async with serving() as server:
            assert (await server.get("/v1/status")).json()["network"] == "memory"
            assert (await server.get("/v1/book")).json() == {"book": [], "total": 0}
            assert (await server.get("/v1/ledger")).json()["owed_nusd"] == 0
            assert (await server.get("/v1/doctor")).json() == {"problems": []}

    async def test_connect_takes_one_address(self) -> None:
        async with serving() as server:
            reply = await server.client.post("/v1/connect", json={"multiaddr": "/ip4/1.2.3.4"})
            assert reply.json() == {"peer": "/ip4/1.2.3.4"}
            assert (await server.get("/v1/peers")).json()["peers"] == [{"peer": "/ip4/1.2.3.4"}]
            for body in (b"", b"[]", b"{}", b'{"multiaddr":1}', b"[" * 199):
                reply = await server.client.post("/v1/connect", content=body)
                assert reply.status_code == 400, body
            assert (await server.client.post("/v1/connect", content=b" " * 201)).status_code == 413

    async def test_wrong_ways_are_json_too(self) -> None:
        async with serving() as server:
            assert error_of(await server.get("/v2/status"))["kind"] == "ConfigError"
            assert (await server.client.delete("/v1/status")).status_code == 405

    async def test_a_fault_of_the_node_is_told_without_its_inside(self, monkeypatch: Any) -> None:
        async with serving() as server:

            async def broken(run_id: str) -> None:
                raise RuntimeError("secret detail")

            monkeypatch.setattr(server.service, "job", broken)
            reply = await server.get("/v1/jobs/r-1")
            assert reply.status_code == 500
            assert error_of(reply)["kind"] == "P2PFlopError"
            assert "secret detail" not in reply.text

    async def test_an_error_of_the_store_keeps_its_class(self, monkeypatch: Any) -> None:
        async with serving() as server:

            async def full() -> None:
                raise StoreError("the disk is full", hint="Free some space.")

            monkeypatch.setattr(server.service.store, "list", full)
            reply = await server.get("/v1/blobs")
            assert error_of(reply) == {
                "kind": "StoreError",
                "message": "the disk is full",
                "hint": "Free some space.",
                "exit_code": 8,
            }

    def test_a_port_in_use_is_told_before_anything_starts(self) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(ConfigError, match=f"port {port} .* is in use") as caught:
                bind_api(port)
        assert "--port" in caught.value.hint

    def test_json_has_no_bare_nan(self) -> None:
        values = {"a": [float("inf"), 1.5], "b": (float("-inf"),)}
        assert json.loads(dump_json(values)) == {"a": ["Infinity", 1.5], "b": ["-Infinity"]}
