"""Job files, numbers, names and arrays that were made to do harm: one clear error each."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.cli.main import run
from p2pflop.errors import ConfigError, JobError, ProtocolError
from p2pflop.job.file import FILE_MAGIC, JobFile, decode_file, encode_file
from p2pflop.job.spec import BlobSource, Work, WorkParam, work_id
from p2pflop.node.memory_market import sample_file
from p2pflop.node.orders import open_order
from p2pflop.node.service import SubmitOptions
from p2pflop.wire import decode, encode

Output = pytest.CaptureFixture[str]
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e../../etc/passwd\0\n"
BASE = decode_file(sample_file())
PLAIN: Any = msgspec.msgpack.decode(encode(BASE))
"""The same as nested lists: title, params, phases and outputs are in [2]; job, work in [1]."""


def packed(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return FILE_MAGIC + zlib.compress(data)


def changed(change: Callable[[Any], None]) -> bytes:
    """The sample file with something else in it, encoded without a check."""
    value = copy.deepcopy(PLAIN)
    change(value)
    return packed(value)


def with_param(**fields: Any) -> bytes:
    """The sample file, its state of another kind."""
    work = decode(Work, BASE.body.work)
    first = work.params[0]
    params = (WorkParam(**{name: getattr(first, name) for name in FIELDS} | fields),)
    work = Work(1, work.phases, (*params, *work.params[1:]), 0)
    body = replace(BASE.body, job=replace(BASE.body.job, work=work_id(work)), work=encode(work))
    return encode_file(JobFile(1, body, BASE.labels))


FIELDS = ("dtype", "shape", "role", "source")


def set_job(place: int, number: int) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        value[1][0][place] = number

    return change


def set_body(place: int, data: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        value[1][place] = data

    return change


def set_label(place: int, labels: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        value[2][place] = labels

    return change


def many_params() -> bytes:
    work = msgspec.msgpack.decode(PLAIN[1][1])
    work[2] = [work[2][0]] * 100_000
    return changed(set_body(1, msgspec.msgpack.encode(work)))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no more than its magic": lambda: FILE_MAGIC,
    "noise": lambda: FILE_MAGIC + bytes(range(256)) * 20,
    "a bomb": lambda: packed(bytes(2**27)),
    "a bomb in a bomb": lambda: packed(zlib.compress(bytes(2**27))),
    "bytes after its end": lambda: sample_file() + b"more",
    "lists in lists": lambda: packed(b"\x91" * 1_000_000 + b"\x90"),
    "a list that claims 2**32": lambda: packed(b"\xdd\xff\xff\xff\xff"),
    "bytes that claim 2**32": lambda: packed(b"\x93\x01\x94\xc6\xff\xff\xff\xff"),
    "a million small numbers": lambda: packed([1] * 1_000_000),
    "a map": lambda: packed({"version": 1}),
    "another version": lambda: packed([2, *PLAIN[1:]]),
    "a negative step": lambda: changed(set_job(1, -1)),
    "a first step of 2**63": lambda: changed(set_job(1, 2**63)),
    "2**63 steps": lambda: changed(set_job(2, 2**63)),
    "no steps": lambda: changed(set_job(2, 0)),
    "2**40 traced steps": lambda: changed(set_job(2, 2**40)),
    "no work": lambda: changed(set_body(1, b"")),
    "a work of noise": lambda: changed(set_body(1, b"\xc1" * 100)),
    "a deep graph": lambda: changed(set_body(2, [b"\x91" * 200_000])),
    "no graphs": lambda: changed(set_body(2, [])),
    "the same graph 64 times": lambda: changed(set_body(2, PLAIN[1][2] * 64)),
    "10**5 params": many_params,
    "10**5 labels": lambda: changed(set_label(1, ["p"] * 100_000)),
    "a title of 10**6": lambda: changed(set_label(0, "x" * 10**6)),
    "labels of nothing": lambda: changed(set_label(1, [])),
    "a dimension of 2**40": lambda: with_param(shape=(2**40,)),
    "a product of 2**320": lambda: with_param(shape=(2**40,) * 8),
    "a blob of 2**62 bytes": lambda: with_param(source=BlobSource(b"a" * 32, 2**62)),
    "a role that is none": lambda: with_param(role=4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_job_file_is_one_error(name: str, tmp_path: Path, capsys: Output) -> None:
    data = HOSTILE[name]()
    with pytest.raises((JobError, ProtocolError)):  # as a node opens it
        open_order(data, SubmitOptions(), frozenset(), 0)
    path = tmp_path / "hostile.p2pj"
    path.write_bytes(data)
    assert run(["show", str(path)]) == 5
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err.startswith("error: ")
    assert "Traceback" not in text.err
    assert len(text.err) < 1000


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path, capsys: Output) -> None:
    labels = replace(
        BASE.labels,
        title=EVIL,
        params=(EVIL, EVIL, EVIL),
        phases=(EVIL,),
        outputs=((EVIL, EVIL),),
    )
    path = tmp_path / "evil.p2pj"
    path.write_bytes(encode_file(replace(BASE, labels=labels)))
    for flags in ([], ["--json"]):
        assert run(["show", str(path), *flags]) == 0
        shown = capsys.readouterr().out
        assert all(char.isprintable() for char in shown.replace("\n", "")), flags
    assert [file.name for file in tmp_path.iterdir()] == ["evil.p2pj"]


def step() -> dict[str, Tensor]:
    return {"t": Tensor.rand(4).sum()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (2**63, 1.5, float("nan"), "3", None)),
        pytest.param("steps", 10**5000, id="steps-of 5000 digits"),
        *(("seed", value) for value in (0.5, -1, 2**32, "x")),
        *(("every", value) for value in (0, -1, "x", 2**63)),
        ("stop", 2**63),
    ],
)
def test_a_number_that_is_none_is_out_of_range(name: str, value: Any) -> None:
    options: dict[str, Any] = {"steps": 3, name: value}
    if name == "every":
        options["every"] = {value: step}
    if name == "stop":
        options["stop"] = ("t", value)
    with pytest.raises(JobError, match=f"^{name}=.* is out of range") as caught:
        pf.trace(step, **options)
    assert "whole number" in caught.value.hint
    assert len(caught.value.message) < 100


def test_numpys_whole_numbers_are_numbers() -> None:
    steps: Any = np.int64(3)
    assert pf.trace(step, steps=steps).file == pf.trace(step, steps=3).file


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-45])
def test_arguments_may_be_any_float(value: float) -> None:
    def scaled(rate: Tensor) -> dict[str, Tensor]:
        return {"t": rate * 2}

    job = pf.trace(scaled, steps=1, args={"rate": value})
    again = pf.trace(scaled, steps=1, args={"rate": 0.5}).with_args(rate=value)
    assert job.file == again.file
    for wrong in (10**5000, 2**40, "x", None):
        with pytest.raises(JobError, match="rate"):
            pf.trace(scaled, steps=1, args={"rate": wrong})  # type: ignore[dict-item]
        if wrong != 2**40:
            with pytest.raises(pf.ConfigError, match="does not fit argument 'rate'"):
                job.with_args(rate=wrong)  # type: ignore[arg-type]


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    job = pf.trace(lambda: {"\ud800t": Tensor.rand(4).sum()}, steps=1, title="\ud800 title")
    assert job.file.labels.title == "? title"
    assert job.file.labels.outputs == (("?t",),)
    assert decode_file(encode_file(job.file)) == job.file


def test_more_tensors_than_a_job_may_have() -> None:
    states = [Tensor.zeros(1).contiguous() for _ in range(4097)]

    def grow() -> dict[str, Tensor]:
        for state in states:
            state.assign(state + 1)
        return {}

    with pytest.raises(JobError, match="more than 4096 tensors"):
        pf.trace(grow, steps=1)


def npy(shape: str, descr: str = "'<f4'", data: bytes = bytes(64)) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


ARRAYS = {
    "negative": npy("(-1, 4)"),
    "2**62 rows": npy(f"({2**62}, 4)"),
    "cut short": npy("(17, 1)"),
    "objects": npy("(4,)", "'|O'", b"\x80\x04N."),
    "text": npy("(4,)", "'<U4'"),
    "complex": npy("(4,)", "'<c8'"),
    "a record": npy("(4,)", "[('a', '<f4')]"),
    "nothing": npy("(0, 4)"),
    "a program": npy("().__class__"),
    "brackets": npy("(" * 5000),
    "a header of 2 GiB": b"\x93NUMPY\x02\x00\x00\x00\x00\x80{",
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_hostile_array_is_no_feed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.npy"
    path.write_bytes(ARRAYS[name])
    with pytest.raises(pf.ConfigError) as caught:
        pf.feed(path)
    assert len(caught.value.message) < 400


def test_shards_are_held_for_a_number_of_steps() -> None:
    with pytest.raises(pf.ConfigError, match="out of range"):
        pf.feed(np.zeros((4, 2), np.float32), batch=2, steps=2**70)


def test_a_tensor_larger_than_this_machine_is_not_read(tmp_path: Path) -> None:
    size_bytes = 2**43
    entry = {"dtype": "U8", "shape": [size_bytes // 2**3, 8], "data_offsets": [0, size_bytes]}
    header = msgspec.json.encode({"a": entry})
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size_bytes)
        except OSError:
            pytest.skip("no sparse files of that size here")
    weight = pf.load_safetensors(path)["a"]
    with pytest.raises(pf.ConfigError, match="larger than this machine's memory"):
        pf.trace(lambda: {"t": weight.max()}, steps=1)


def test_a_script_that_exits_is_told(tmp_path: Path, capsys: Output) -> None:
    script = tmp_path / "exits.py"
    script.write_text("import sys\nsys.exit(7)\n")
    assert run(["trace", str(script)]) == 5
    assert "ended itself: sys.exit(7)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"deadline_s": 60.0}, {"max_nusd": "1"}, {"checkpoint_s": True}]
)
def test_options_of_the_wrong_kind_are_told_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a whole number") as told:
        SubmitOptions(**options)
    assert "=60" in told.value.hint
