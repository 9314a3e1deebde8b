"""What is sent to the node in pieces, so that a file of any size needs no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from p2pflop.dht.manifest import CHUNK_BYTES
from p2pflop.errors import StoreError

Content = bytes | bytearray | memoryview | Path


def reader(
    data: Content, progress: Callable[[int], None] | None = None
) -> Callable[[], Iterator[bytes]]:
    """Gives the pieces of ``data`` from the start each time it is called.

    ``progress`` is told how many bytes were asked for so far. Raises StoreError if a file cannot be
    read.
    """

    def read() -> Iterator[bytes]:
        done_bytes = 0
        for piece in _file(data) if isinstance(data, Path) else _buffer(data):
            yield piece
            done_bytes += len(piece)
            if progress is not None:
                progress(done_bytes)

    return read


def _file(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _buffer(data: bytes | bytearray | memoryview) -> Iterator[bytes]:
    view = memoryview(data).cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])
