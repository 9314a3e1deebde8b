"""A job on this machine without a node: a real process, a real compiler."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.dht.manifest import address_of
from p2pflop.errors import ConfigError, JobError, ProviderError
from p2pflop.job.blobs import LazyBlobs
from p2pflop.job.file import JobFile
from p2pflop.job.results import Scalar, column_values, decode_trace, result_hash
from p2pflop.job.spec import class_id, state_root
from p2pflop.kernels import classes
from p2pflop.kernels.classes import descriptor
from p2pflop.kernels.local import ORPHANED_CODE, PART_BYTES, run_local
from p2pflop.kernels.trace import Traced, trace

NUMBERS = np.array([1.0, 2.0, 4.0], np.float32)


def traced(steps: int = 4) -> Traced:
    numbers, total = Tensor(NUMBERS), Tensor.zeros(3)

    def add() -> dict[str, Tensor]:
        total.assign(total + numbers + Tensor.rand(3))
        return {"sum": total.sum()}

    def look() -> dict[str, Tensor]:
        return {"largest": total.max(), "total": total * 2}

    Tensor.manual_seed(0)
    return trace(add, steps=steps, every={2: look}, seed=3, address_of=address_of)


def file_of(job: Traced) -> JobFile:
    return JobFile(1, job.body, job.labels)


def test_a_local_run_gives_rows_state_outputs_and_the_same_hash_again() -> None:
    job = traced()
    rows: list[tuple[int, dict[str, Scalar]]] = []
    lowered: list[tuple[int, int]] = []
    result, blobs = run_local(
        file_of(job),
        job.blobs,
        address_of,
        lambda step, values: rows.append((step, dict(values))),
        lambda done, total: lowered.append((done, total)),
    )
    assert [(step, sorted(values)) for step, values in rows] == [
        (0, ["sum"]),
        (1, ["largest", "sum"]),
        (2, ["sum"]),
        (3, ["largest", "sum"]),
    ]
    assert lowered
    assert lowered[-1][0] == lowered[-1][1]
    assert result.class_id == class_id(descriptor())
    assert result.steps_done == 4
    assert result.state_root == state_root(result.state)
    assert {result.trace, *result.state, *(out.address for out in result.outputs)} == set(blobs)
    assert all(address_of(data) == address for address, data in blobs.items())
    sums, _ = decode_trace(blobs[result.trace])
    assert column_values(sums) == [values["sum"] for _, values in rows]
    slots = [n for n in job.labels.params if n in ("random.counter", "total")]
    total = np.frombuffer(blobs[result.state[slots.index("total")]], np.float32)
    assert np.all(total > 4 * NUMBERS)
    assert np.all(total < 4 * NUMBERS + 4)
    (doubled,) = result.outputs
    assert np.array_equal(np.frombuffer(blobs[doubled.address], np.float32), 2 * total)
    again, _ = run_local(file_of(job), job.blobs, address_of)
    assert result_hash(again) == result_hash(result)


def short_job(steps: int, enough: float = 100.0) -> pf.Job:
    numbers, total = Tensor(NUMBERS), Tensor.zeros(3)

    def add() -> dict[str, Tensor]:
        total.assign(total * 0.5 + numbers * Tensor.rand(3))
        return {"sum": total.sum(), "done": total.sum() > enough}

    Tensor.manual_seed(0)
    return pf.trace(add, steps=steps, seed=3, stop="done")


def test_stretches_one_after_the_other_give_what_one_run_gives() -> None:
    whole = short_job(9).run_local()
    job = short_job(4)
    first = job.run_local()
    second = job.extend(5, first).run_local()
    assert second.record.state == whole.record.state
    assert [*first["sum"], *second["sum"]] == list(whole["sum"])
    with pytest.raises(JobError, match="after step 4 is not at hand"):
        job.extend(5).run_local()
    with pytest.raises(JobError, match="not of this job"):
        job.extend(5, second)
    with pytest.raises(JobError, match="steps=0"):
        job.extend(0, first)


def test_a_job_ends_at_the_first_step_that_says_so() -> None:
    result = short_job(1000, 9.0).run_local()
    assert result.steps < 1000
    done = list(result["done"])
    assert done == [False] * (result.steps - 1) + [True]
    again = short_job(result.steps, 9.0).run_local()
    assert again.record.state == result.record.state


def test_a_tensor_larger_than_a_message_part_comes_back_whole() -> None:
    large = Tensor.zeros(PART_BYTES // 4 + 3)

    def fill() -> None:
        large.assign(large + Tensor.arange(PART_BYTES // 4 + 3))

    job = trace(fill, steps=1, address_of=address_of)
    result, blobs = run_local(file_of(job), {}, address_of)
    data = np.frombuffer(blobs[result.state[0]], np.float32)
    assert np.array_equal(data, np.arange(PART_BYTES // 4 + 3, dtype=np.float32))


def test_a_missing_input_is_told_before_anything_runs() -> None:
    job = traced()
    with pytest.raises(JobError, match="not given"):
        run_local(file_of(job), {}, address_of)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that local runs start."""
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr("p2pflop.kernels.local.subprocess.Popen", Noted)
    return started


def test_an_error_in_the_callers_function_ends_the_process(
    started: list[subprocess.Popen[bytes]],
) -> None:
    job = traced(steps=10**6)

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_local(file_of(job), job.blobs, address_of, fail)
    process = started[-1]
    assert process.returncode is not None


def test_a_faulty_kernel_kills_the_process_and_not_the_caller() -> None:
    numerator = Tensor(np.array([7], np.int32))
    zero = Tensor(np.array([0], np.int32))
    job = trace(
        lambda: {"quotient": numerator.div(zero, rounding_mode="trunc").sum()},
        steps=1,
        address_of=address_of,
    )
    with pytest.raises(JobError, match=r"the job's code faulted \(SIGFPE\)") as told:
        run_local(file_of(job), job.blobs, address_of)
    assert "divide an integer by zero" in told.value.hint


def test_a_process_that_the_system_kills_says_so(
    started: list[subprocess.Popen[bytes]],
) -> None:
    job = traced(steps=10**6)

    def kill(*_: object) -> None:
        started[-1].kill()

    with pytest.raises(ProviderError, match=r"the local process was killed \(SIGKILL\)") as told:
        run_local(file_of(job), job.blobs, address_of, kill)
    assert "memory runs out" in told.value.hint


def test_an_input_that_cannot_be_read_is_its_own_error_and_no_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = traced()

    def fail() -> bytes:
        raise JobError("the disk is gone")

    blobs = LazyBlobs(dict.fromkeys(job.blobs, fail))
    with pytest.raises(JobError, match="the disk is gone"):
        run_local(file_of(job), blobs, address_of)
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_the_child_without_a_word(
    started: list[subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    job = traced(steps=10**6)

    def interrupt(*_: object) -> None:
        started[-1].send_signal(signal.SIGINT)

    with pytest.raises(ProviderError, match=f"ended with code {ORPHANED_CODE}"):
        run_local(file_of(job), job.blobs, address_of, interrupt)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("sent", [b"", b"\x05\0\0\0\0\0\0\0abc"])
def test_a_child_whose_parent_has_gone_ends_without_a_word(sent: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "p2pflop.kernels.local"],
        input=sent,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (ORPHANED_CODE, b"", b"")


def test_what_the_compiler_remarks_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = tmp_path / "clang"
    loud.write_text(f'#!/bin/sh\necho "warning: told" >&2\nexec {classes.clang()} "$@"\n')
    loud.chmod(0o755)
    monkeypatch.setattr(classes, "clang", lambda: str(loud))
    values = Tensor([1, 2, 3]).realize()

    def step() -> dict[str, Tensor]:
        return {"sum": values.sum()}

    assert pf.trace(step, steps=1).run_local()["sum"].shape == (1,)
    assert capfd.readouterr().err == ""


def test_an_emulator_is_refused() -> None:
    job = traced()
    with pytest.raises(ConfigError, match="PYTHON is an emulator") as told:
        run_local(file_of(job), job.blobs, address_of, class_name="PYTHON")
    assert "cpu-llvm" in told.value.hint


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digits_example_is_a_job_of_a_few_kilobytes(digits: ModuleType) -> None:
    job = digits.make_job()
    assert job.steps == digits.STEPS
    assert job.size_bytes <= 5_000
    assert sum(len(data) for data in job.inputs.values()) == 1_797 * 65


def test_the_digits_example_needs_no_compiler_where_it_is_traced(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", "import digits; print(digits.make_job().size_bytes)"],
        cwd=Path(__file__).resolve().parents[2] / "examples",
        env={"CC": "/bin/false", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.stdout, outcome.stderr
    assert int(outcome.stdout) <= 5_000


@pytest.mark.slow
def test_the_digits_example_learns(digits: ModuleType) -> None:
    result = digits.make_job(steps=400).run_local()
    assert digits.evaluate(result.state) >= 0.95


@pytest.mark.slow
def test_the_readme_fetches_a_blob_that_the_digits_example_gives(digits: ModuleType) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    (address,) = re.findall(r"curl --fail \S+/blob/(\w{64})", readme)
    state = digits.make_job().run_local().state
    assert state.address(digits.WEIGHT) == address
