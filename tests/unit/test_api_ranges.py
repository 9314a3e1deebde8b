"""Range headers: what counts, and what is passed over."""

from __future__ import annotations

from p2pflop.node.api_streams import parse_range


def test_range_headers_that_count_for_nothing() -> None:
    for header in (
        "",
        "bytes=",
        "bytes=-",
        "items=1-2",
        "bytes=1-2,4-5",
        "bytes=5-2",
        "x" * 99,
    ):
        assert parse_range(header, 10) == (0, 10), header
    assert parse_range("bytes=10-", 10) is None
    assert parse_range("bytes=-0", 10) is None
    assert parse_range("bytes=0-", 0) is None
