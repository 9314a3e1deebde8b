"""The lock bites: every way out is tried for real, and every mechanism's absence is noticed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pflop.errors import JobError, ProtocolError
from p2pflop.kernels import classes, compiler, lockdown, syscalls
from p2pflop.kernels.compiler import CompileClient

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="tries x86-64 Linux's calls"
)

ESCAPES = Path(__file__).parents[1] / "engines" / "escapes.py"
REFUSALS = {"EPERM", "EACCES", "ENOSYS", "RuntimeError", "ValueError"}


def try_escapes(*denied: str) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, "-P", ESCAPES, *denied], capture_output=True, timeout=60, check=True
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


@functools.cache
def here() -> dict[str, Any]:
    """What this machine has: a container may refuse a mechanism itself."""
    return try_escapes()


def test_no_way_out_is_open() -> None:
    found = here()
    assert found["level"] >= 2, found["notes"]
    assert len(found["outcomes"]) > 50
    assert {name: why for name, why in found["outcomes"].items() if why not in REFUSALS} == {}


@pytest.mark.parametrize("missing", ["unshare", "landlock_create_ruleset"])
def test_without_one_mechanism_it_is_level_two_and_still_shut(missing: str) -> None:
    if here()["level"] < 3:
        pytest.skip("this machine lacks a mechanism already")
    found = try_escapes(missing)
    assert found["level"] == 2
    assert "Operation not permitted" in found["notes"][0]
    assert {name: why for name, why in found["outcomes"].items() if why not in REFUSALS} == {}


def test_without_both_it_is_level_one() -> None:
    assert try_escapes("unshare", "landlock_create_ruleset")["level"] == 1


def test_levels() -> None:
    level = {
        (n, land, s): lockdown.Mechanisms(n, land, s).level
        for n in (False, True)
        for land in (False, True)
        for s in (False, True)
    }
    assert level[True, True, True] == 3
    assert level[False, True, True] == level[True, False, True] == 2
    assert level[False, False, True] == level[True, True, False] == 1


def test_a_lock_is_refused_to_a_process_with_threads() -> None:
    code = (
        "import threading, time; from p2pflop.kernels import lockdown, syscalls\n"
        "threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
        "lockdown.lock(lockdown.Allowance(1, 1, syscalls.COMPUTE), lockdown.Mechanisms())\n"
    )
    told = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, timeout=30, check=False
    )
    assert b"RuntimeError: 2 threads" in told.stderr


@pytest.mark.parametrize("machine", sorted(syscalls.TABLES))
@pytest.mark.parametrize("calls", [syscalls.COMPUTE, syscalls.COMPILE])
def test_filters_fit_the_kernels_limits(machine: str, calls: dict[str, Any]) -> None:
    program = lockdown.filter_program(calls, machine)
    assert len(program) % 8 == 0
    assert len(program) // 8 <= 4096


def test_a_worker_may_make_no_call_that_leads_out() -> None:
    out = {"execve", "fork", "vfork", "clone", "socket", "kill", "prctl", "ioctl", "pipe2", "dup"}
    assert not out & set(syscalls.COMPUTE)


def test_the_package_imports_where_there_is_no_table() -> None:
    code = (
        "import sys; sys.platform = 'darwin'\n"
        "from p2pflop.kernels import lockdown, frames, compiler, zygote, worker\n"
        "print(lockdown.probe().level)\n"
    )
    told = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, timeout=30, check=True
    )
    assert told.stdout == b"1\n"


class TestCompileServer:
    @pytest.fixture
    def client(self) -> Any:
        """A client whose server runs in a process of its own, locked."""
        to_server, to_server_write = os.pipe()
        from_server, from_server_write = os.pipe()
        code = (
            "import os, sys; from p2pflop.kernels import compiler, lockdown\n"
            "fds = [int(each) for each in sys.argv[1:]]\n"
            "arguments = compiler.arguments(os.environ['DEV'])\n"
            "clang = compiler.Clang(os.path.realpath(os.environ['CC']), arguments)\n"
            "compiler.serve(clang, fds, lockdown.probe(), os.getppid())\n"
        )
        ends = [to_server, from_server_write]
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", code, *map(str, ends)],
            pass_fds=ends,
            env={**os.environ, **classes.environment()},
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        yield CompileClient(from_server, to_server_write)
        os.close(to_server_write)
        os.close(from_server)
        server.wait(30)

    def test_compiles_one_source_after_another(self, client: CompileClient) -> None:
        objects = [client.compile(f"int f(int x) {{ return x + {i}; }}") for i in (1, 1, 2)]
        assert all(each[:4] == b"\x7fELF" for each in objects)
        assert objects[0] == objects[1] != objects[2]

    def test_tells_what_is_wrong_with_a_source(self, client: CompileClient) -> None:
        with pytest.raises(JobError, match="undeclared"):
            client.compile("int f() { return nothing; }")
        assert client.compile("int f() { return 1; }")[:4] == b"\x7fELF"

    @pytest.mark.parametrize(
        "source",
        ['#include "/etc/passwd"\n', 'const char x[] = {\n#embed "/etc/passwd"\n};'],
    )
    def test_clang_can_read_nothing_but_libraries(self, client: CompileClient, source: str) -> None:
        if any("landlock" in note for note in here()["notes"]):
            pytest.skip("no Landlock here")
        with pytest.raises(JobError, match=r"(?i)permission|not permitted|not found"):
            client.compile(source)
        with pytest.raises(JobError):
            client.compile('__asm__(".incbin \\"/etc/passwd\\"");')

    def test_it_can_start_nothing_but_clang_and_write_nothing(self) -> None:
        code = (
            "import os, subprocess; from p2pflop.kernels import lockdown, syscalls\n"
            "clang = os.path.realpath(os.environ['CC'])\n"
            "may = lockdown.Allowance(2**30, 10, syscalls.COMPILE, lockdown.loaders() + (clang,))\n"
            "lockdown.lock(may, lockdown.probe())\n"
            "print(subprocess.run([clang, '--version'], stdout=subprocess.PIPE).returncode)\n"
            "for attempt in (lambda: subprocess.run(['/bin/true']), lambda: open('/tmp/x', 'w'),\n"
            "                lambda: os.kill(1, 0), lambda: os.memfd_create('x')):\n"
            "    try: print('ALLOWED', attempt())\n"
            "    except OSError as error: print('refused')\n"
        )
        told = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            env={**os.environ, **classes.environment()},
            timeout=30,
            check=True,
        )
        assert told.stdout.split() == [b"0", b"refused", b"refused", b"refused", b"refused"]

    def test_a_source_over_the_limit_is_refused(self, client: CompileClient) -> None:
        with pytest.raises(JobError, match="over"):
            client.compile(" " * (compiler.MAX_SOURCE_BYTES + 1))
        padded = "int x;".ljust(compiler.MAX_SOURCE_BYTES)
        assert client.compile(padded)[:4] == b"\x7fELF"

    def test_an_object_over_the_limit_is_refused(self, client: CompileClient) -> None:
        size = compiler.MAX_OBJECT_BYTES
        with pytest.raises(JobError, match="too large"):
            client.compile(f"char x[{size}] = {{1}};")
        assert client.compile("int y;")[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    "device",
    ["CPU:CLANG:x86_64,native,-fma", "CPU:CLANG:x86_64,x86-64-v3", "CPU:CLANG:arm64,native"],
)
def test_the_arguments_are_tinygrads_own(device: str) -> None:
    from tinygrad.runtime.support.compiler_cpu import ClangCompiler

    arch = device.split(":")[2].split(",")
    own = ClangCompiler(arch)
    target = f"--target={own.arch}-none-unknown-elf"
    fixed = "-c -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib -fno-ident"
    assert " ".join(compiler.arguments(device)) == " ".join([fixed, target, *own.args, "- -o -"])


@pytest.mark.parametrize(
    "device", ["", "CPU", "CPU:CLANG:x86_64,native -o /tmp/x", "CPU:CLANG:x86_64,native,-fma;ls"]
)
def test_a_device_that_could_smuggle_arguments_is_refused(device: str) -> None:
    with pytest.raises(ProtocolError):
        compiler.arguments(device)
