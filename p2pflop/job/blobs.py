"""Blobs that are at hand without being in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

Read = Callable[[], bytes]


class LazyBlobs(Mapping[bytes, bytes]):
    """The bytes of blobs by address, each read anew whenever it is asked for."""

    def __init__(self, readers: Mapping[bytes, Read]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, address: bytes) -> bytes:
        return self._readers[address]()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, address: object) -> bool:
        return address in self._readers
