"""Weights from a file that the node keeps: its header by ranges, its tensors when needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.dht.manifest import CHUNK_BYTES, address_of
from p2pflop.errors import BlobNotFoundError, ConfigError, ProtocolError, StoreError
from p2pflop.job.graph import Dtype
from p2pflop.job.safetensors import format_header
from tests.lines import answering

StartNode = Callable[..., Any]

LARGE = np.arange(CHUNK_BYTES // 4 + 7, dtype=np.float32)
SMALL = np.array([[1.0, 2.0]], np.float16)


def file_bytes() -> bytes:
    header = format_header(
        {"large": (Dtype.FLOAT32, LARGE.shape), "small": (Dtype.FLOAT16, SMALL.shape)}
    )
    return header + LARGE.tobytes() + SMALL.tobytes()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that clients ask for."""
    found = []
    read_range = Client.read_range

    def spy(client: Client, address: bytes, start: int, stop: int) -> tuple[bytes, int]:
        found.append((start, stop))
        return read_range(client, address, start, stop)

    monkeypatch.setattr(Client, "read_range", spy)
    return found


def test_a_file_in_the_node_is_read_by_ranges(
    start_node: StartNode, asked: list[tuple[int, int]]
) -> None:
    start_node()
    whole = file_bytes()
    address = pf.put(whole)
    net = pf.load_safetensors(address)
    data_start = len(whole) - LARGE.nbytes - SMALL.nbytes
    assert asked == [(0, 8), (8, data_start)]
    job = pf.trace(lambda: {"y": net["small"] * 2}, steps=1)
    assert asked[2:] == [(len(whole) - SMALL.nbytes, len(whole))]
    assert list(job.inputs) == [address_of(SMALL.tobytes())]
    assert np.array_equal(job.run_local()["y"], SMALL * 2)
    again = pf.load_safetensors(f"p2pflop://{address}")
    assert np.array_equal(again["large"].numpy(), LARGE)


def test_a_blob_that_is_no_such_file_is_one_error(start_node: StartNode) -> None:
    start_node()
    for data in (b"", b"short", file_bytes()[:-1], bytes(100)):
        with pytest.raises(ConfigError, match=r"(whole safetensors file|cannot read blob)") as told:
            pf.load_safetensors(pf.put(data))
        assert address_of(data).hex() in told.value.message
    with pytest.raises(BlobNotFoundError):
        pf.load_safetensors("ab" * 32)


def test_ranges_of_blobs(start_node: StartNode) -> None:
    start_node()
    data = bytes(range(200)) * 6000
    address = bytes.fromhex(pf.put(data))
    with Client() as client:
        for start, stop in ((0, 1), (5, CHUNK_BYTES + 5), (0, len(data)), (len(data) - 1, 10**9)):
            assert client.read_range(address, start, stop) == (data[start:stop], len(data))
        with pytest.raises(StoreError, match=f"has {len(data)} bytes, none from {len(data)} on"):
            client.read_range(address, len(data), len(data) + 1)
        with pytest.raises(BlobNotFoundError):
            client.read_range(bytes(32), 0, 1)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (206, {"content-range": "bytes 4-7/100"}),
        (206, {"content-range": "bytes 0-7/" + "9" * 30}),
        (206, {}),
        (200, {}),
        (200, {"content-length": "4"}),
        (416, {}),
    ],
)
def test_answers_that_are_not_the_range_are_refused(
    home: Path, status: int, headers: dict[str, str]
) -> None:
    client = Client(home, line=answering(status, b"evil", headers))
    with pytest.raises(ProtocolError, match="did not answer as a node does"):
        client.read_range(bytes(32), 8, 12)
