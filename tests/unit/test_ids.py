"""Content hashes and the three ways to write a blob's address."""

from __future__ import annotations

import pytest

from p2pflop.errors import ConfigError
from p2pflop.ids import HASH_BYTES, blob_url, content_hash, parse_hash


def test_the_hash_is_blake3() -> None:
    # The empty input's hash, from the BLAKE3 test vectors.
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert content_hash(b"").hex() == empty
    assert len(content_hash(b"x")) == HASH_BYTES


def test_equal_bytes_have_equal_hashes_whatever_holds_them() -> None:
    assert (
        content_hash(b"abc") == content_hash(bytearray(b"abc")) == content_hash(memoryview(b"abc"))
    )


def test_every_way_to_write_an_address_names_the_same_blob() -> None:
    address = content_hash(b"blob")
    digits = address.hex()
    for text in (
        digits,
        f" {digits}\n",
        blob_url(address),
        f"http://127.0.0.1:7420/blob/{digits}",
        f"https://example.org/blob/{digits}/",
    ):
        assert parse_hash(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab",
        "g" * 64,
        "A" * 64,
        "a" * 65,
        "ftp://host/blob/" + "a" * 64,
        "http://host/other/" + "a" * 64,
        "http://host/blob/" + "a" * 64 + "/../x",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_hash(text)
