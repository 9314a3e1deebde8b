"""Safetensors files: what headers say, and that nothing is used of a file that is not whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor, dtypes, nn

import p2pflop as pf
from p2pflop.errors import ConfigError
from p2pflop.job.graph import Dtype
from p2pflop.job.safetensors import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSOR_NAME,
    format_header,
    header_bytes,
    parse_header,
)
from p2pflop.job.spec import MAX_RANK

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def parse(data: bytes) -> Mapping[str, Any]:
    length = header_bytes(data[:LENGTH_BYTES], len(data), "it")
    return parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), "it")


def test_tinygrads_own_files_are_understood(tmp_path: Path) -> None:
    tensors = {
        "weight": Tensor(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "half": Tensor([1.0, 2.0]).cast(dtypes.float16).realize(),
        "wide": Tensor([1.5]).cast(dtypes.bfloat16).realize(),
        "flag": Tensor([True]).realize(),
        "count": Tensor([7], dtype=dtypes.int64).reshape(()).realize(),
    }
    path = tmp_path / "net.safetensors"
    nn.state.safe_save(tensors, str(path), {"made": "here"})
    data = path.read_bytes()
    places = parse(data)
    assert {name: (place.dtype, place.shape) for name, place in places.items()} == {
        "weight": (Dtype.FLOAT32, (2, 3)),
        "half": (Dtype.FLOAT16, (2,)),
        "wide": (Dtype.BFLOAT16, (1,)),
        "flag": (Dtype.BOOL, (1,)),
        "count": (Dtype.INT64, ()),
    }
    for name, place in places.items():
        held = data[place.start : place.start + place.size_bytes]
        assert held == bytes(
            tensors[name].contiguous().realize().uop.base.buffer.as_memoryview()
        ), name


def test_headers_written_here_are_read_by_tinygrad(tmp_path: Path) -> None:
    values = {"a": np.arange(3, dtype="<i4"), "net.b": np.ones((2, 2), "<f4")}
    header = format_header({"a": (Dtype.INT32, (3,)), "net.b": (Dtype.FLOAT32, (2, 2))})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + b"".join(value.tobytes() for value in values.values()))
    for name, tensor in nn.state.safe_load(path).items():
        assert np.array_equal(tensor.to("CPU").numpy(), values[name])


BAD = {
    "dtype, shape and data_offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "exactly dtype": {"a": ENTRY | {"more": 1}},
    "not have exactly": {"a": [1]},
    "has dtype 'F8_E4M3', which jobs do not have": {"a": ENTRY | {"dtype": "F8_E4M3"}},
    "has dtype 7": {"a": ENTRY | {"dtype": 7}},
    r"has dtype \['F32'\]": {"a": ENTRY | {"dtype": ["F32"]}},
    r"shape of 'a' is \[2.0\]": {"a": ENTRY | {"shape": [2.0]}},
    r"shape of 'a' is \[True\]": {"a": ENTRY | {"shape": [True]}},
    r"shape of 'a' is \[-2\]": {"a": ENTRY | {"shape": [-2]}},
    "shape of 'a' is 2": {"a": ENTRY | {"shape": 2}},
    r"shape of 'a' is \[1, 1": {"a": ENTRY | {"shape": [1] * MAX_RANK + [2]}},
    f"shape of 'a' is .{2**41}": {"a": ENTRY | {"shape": [2**41]}},
    r"data_offsets of 'a' are \[8, 0\]": {"a": ENTRY | {"data_offsets": [8, 0]}},
    r"data_offsets of 'a' are \[0\]": {"a": ENTRY | {"data_offsets": [0]}},
    r"data_offsets of 'a' are \[-8, 0\]": {"a": ENTRY | {"data_offsets": [-8, 0]}},
    "'a' has 8 bytes; F32 .3. are 12": {"a": ENTRY | {"shape": [3]}},
    "leave a gap": {"a": ENTRY | {"data_offsets": [4, 12]}},
    "overlap": {"a": ENTRY, "b": ENTRY | {"shape": [1], "data_offsets": [4, 8]}},
    "the tensor before it overlap": {"a": ENTRY, "b": ENTRY},
    "cut short: 78 bytes of 86": {"a": ENTRY | {"shape": [4], "data_offsets": [0, 16]}},
    "8 bytes after its last tensor belong to none": {},
    "4 bytes after its last tensor": {"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}},
    "'' is not the name": {"": ENTRY},
    r"'\\x1b\[2J' is not the name": {"\x1b[2J": ENTRY},
    "x' is not the name": {"x" * (MAX_TENSOR_NAME + 1): ENTRY},
    "__metadata__ is not an object of strings": {"__metadata__": {"a": 1}, "a": ENTRY},
    "__metadata__ is not an": {"__metadata__": "text", "a": ENTRY},
    "it does not begin with {": b"[1, 2]",
    "not begin with": b' {"a": 1}',
    "not a JSON object": b'{"a": ',
    "'utf-8' codec": b'{"\xff": 1}',
    "a name comes twice": b'{"a": 1, "a": 2}',
    "maximum recursion|too deep|recursion": b'{"a":' + b"[" * 100_000,
    "Exceeds the limit": b'{"a":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_header_that_does_not_fit_its_file_is_refused(reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse(file_of(BAD[reason]))
    assert caught.value.hint


def test_a_length_out_of_bounds_is_refused_before_anything_is_read() -> None:
    for length, reason in (
        (0, "would have 0 bytes"),
        (MAX_HEADER_BYTES + 1, "would have"),
        (2**64 - 1, "would have"),
        (100, "cut short inside the header"),
    ):
        with pytest.raises(ConfigError, match=reason):
            header_bytes(length.to_bytes(8, "little"), 107, "it")
    assert header_bytes((99).to_bytes(8, "little"), 107, "it") == 99
    with pytest.raises(ConfigError, match="cut short"):
        header_bytes(bytes(7), 7, "it")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = file_of({"a": ENTRY})
    assert list(parse(whole)) == ["a"]
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="whole safetensors file"):
            pf.load_safetensors(path)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_give_tensors_or_one_error(noise: bytes, at: int) -> None:
    whole = bytearray(file_of({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)))
    whole[at : at + len(noise)] = noise
    try:
        places = parse(bytes(whole))
    except ConfigError:
        return
    end = max((place.start + place.size_bytes for place in places.values()), default=0)
    assert end in (0, len(whole))


def test_a_tensor_of_nothing_is_allowed() -> None:
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    assert parse(file_of({"a": ENTRY, "e": empty}))["e"].size_bytes == 0
