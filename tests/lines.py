"""Lines to nodes that are not there, for tests of what speaks to a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from p2pflop.embedded import NodeNote
from p2pflop.line import PIECE_BYTES, Request


@dataclass
class Canned:
    """An answer: ``body`` in the pieces in which it comes."""

    request: Request
    status: int = 200
    body: Iterable[bytes] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    url: str = "http://127.0.0.1:9/"

    def header(self, name: str) -> str:
        """See Answer."""
        return self.headers.get(name, "")

    def pieces(self, size_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """See Answer."""
        for piece in self.body:
            for start in range(0, len(piece), size_bytes):
                yield piece[start : start + size_bytes]

    def close(self) -> None:
        """See Answer."""


class CannedLine:
    """A line on which ``answer`` answers, as a client makes it of a note."""

    def __init__(self, answer: Callable[[Request], Canned]) -> None:
        self._answer = answer

    def __call__(self, _: NodeNote) -> CannedLine:
        """The line to the node of a note."""
        return self

    def ask(self, request: Request) -> Canned:
        """See Line."""
        return self._answer(request)

    def close(self) -> None:
        """See Line."""


def answering(status: int, content: bytes, headers: Mapping[str, str] | None = None) -> CannedLine:
    """A line on which every request gets this answer."""
    return CannedLine(lambda request: Canned(request, status, [content], headers or {}))


def content_of(request: Request) -> bytes:
    """The whole body of a request."""
    content = request.content
    return b"".join(content()) if callable(content) else bytes(content or b"")
