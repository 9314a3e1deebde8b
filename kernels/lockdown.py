"""What a process of ours gives up before it touches a stranger's graph, plan or C source.

A worker runs hostile native code: whatever the process may do, the job may do. So between fork and
the first hostile byte it calls ``lock``, which takes away, in this order:

1. **namespaces**: a user, a network (no interface up) and an IPC namespace of its own;
2. **limits**: address space, CPU seconds, no file growth, few descriptors, no core;
3. **Landlock**: read the interpreter and its libraries, nothing else; no TCP, no signals outside;
4. **capabilities**, which root or a fresh user namespace would leave it;
5. **seccomp**: an allow-list (``syscalls``) without exec, fork, sockets, kill, ptrace or memfd.

Each binds the calling thread only, hence the one-thread check. The order matters: unshare is
itself refused by seccomp, and Landlock's path descriptors need file access. Memory is also watched
from outside by RSS (``resident_bytes``), since the address space limit is the looser of the two.

Kernels differ, and containers forbid some of this. ``probe`` forks a child for each mechanism and
looks whether it **bites**; the answer is a level:

===== ==============================================
3     namespaces, Landlock, seccomp and limits
2     seccomp and one of namespaces or Landlock
1     limits, and the memory watchdog on Linux
===== ==============================================

Without Landlock a worker may open no file at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import socket
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import p2pflop
from p2pflop.kernels import syscalls
from p2pflop.kernels.syscalls import Rule
from p2pflop.units import MIB

ADDRESS_SPACE_SLACK_BYTES: Final = 512 * MIB
MAX_MEMORY_BYTES: Final = 2**60
MAX_DESCRIPTORS: Final = 64
OOM_SCORE: Final = 800
CPU_GRACE_SECONDS: Final = 2

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_NAMESPACES = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
_LINUX = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """What bites here. ``notes`` says why something does not."""

    namespaces: bool = False
    landlock: bool = False
    seccomp: bool = False
    notes: tuple[str, ...] = ()

    @property
    def level(self) -> int:
        """3, 2 or 1, as in the table at the head of this module."""
        if not self.seccomp or not (self.namespaces or self.landlock):
            return 1
        return 3 if self.namespaces and self.landlock else 2


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a locked process keeps. ``execute`` are files that it may start, ``read`` paths that it
    may read beside ``readable_paths``."""

    memory_bytes: int
    cpu_seconds: int
    calls: Mapping[str, Rule | None]
    execute: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


def lock(allowance: Allowance, mechanisms: Mechanisms) -> None:
    """Give up all but ``allowance``, for good. Raises OSError, or RuntimeError if threaded."""
    if thread_count() > 1:
        raise RuntimeError(f"{thread_count()} threads: a lock binds only the thread that takes it")
    if mechanisms.namespaces:
        _unshare()
    set_limits(allowance.memory_bytes, allowance.cpu_seconds)
    if not _LINUX:
        return
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if mechanisms.landlock:
        _landlock((*readable_paths(), *allowance.read), allowance.execute)
    if mechanisms.seccomp:
        _drop_capabilities()
        calls = dict(allowance.calls)
        if not mechanisms.landlock and not allowance.execute:
            del calls["openat"]
        _seccomp(calls)


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that forked this process ends. Exits if it already has."""
    if _LINUX:
        _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def die_first() -> None:
    """Ask the kernel to pick this process, not the node, when the machine runs out of memory."""
    with contextlib.suppress(OSError):  # not Linux, or /proc is read-only
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def only_descriptors(keep: Iterable[int]) -> None:
    """Close every descriptor but ``keep``, and point 0, 1 and 2 at /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    start = 3
    for descriptor in sorted(keep):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def set_limits(memory_bytes: int, cpu_seconds: int) -> None:
    """Set the resource limits; memory is the job's budget, without the process's own needs."""
    limits = {
        resource.RLIMIT_AS: (min(memory_bytes, MAX_MEMORY_BYTES) + ADDRESS_SPACE_SLACK_BYTES,) * 2,
        # The soft limit ends the process by SIGXCPU, which tells this death from a plain kill.
        resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + CPU_GRACE_SECONDS),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_NOFILE: (MAX_DESCRIPTORS,) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
    }
    for kind, wanted in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        bounded = ceiling != resource.RLIM_INFINITY
        soft, hard = (min(value, ceiling) if bounded else value for value in wanted)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):  # macOS refuses to bound the address space
            if _LINUX:
                raise


def thread_count() -> int:
    """How many threads this process has; 1 where that cannot be told."""
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return 1


def resident_bytes(pid: int) -> int:
    """Physical memory of process ``pid``, shared pages included; 0 if it is gone or not told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def readable_paths() -> tuple[str, ...]:
    """The interpreter, its libraries, this package and the loader's files."""
    package = Path(p2pflop.__file__).parent
    known = sysconfig.get_paths()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    paths: list[str | Path] = [known[kind] for kind in kinds]
    paths += [Path(path) for path in sys.path if path]
    paths += [Path(sys.base_prefix, "lib"), Path(sys.prefix, "lib")]
    paths += [package, package / "job", package / "kernels"]
    paths += ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64"]
    paths += ["/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu"]
    paths += ["/dev/null", "/dev/urandom"]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths if Path(path).exists()))


def loaders() -> tuple[str, ...]:
    """The dynamic loaders of this system: to start a program takes the right to execute them."""
    found = [*Path("/lib64").glob("ld-*"), *Path("/lib").glob("ld-*")]
    return tuple(os.path.realpath(path) for path in found)


def probe() -> Mechanisms:
    """Which mechanisms bite, each tried in a forked child (8 ms). Call it with one thread only."""
    if not _LINUX:
        return Mechanisms(notes=(f"{sys.platform}: resource limits only",))
    if syscalls.machine() not in syscalls.TABLES:
        return Mechanisms(notes=(f"no table of system calls for {syscalls.machine()}",))
    results = {
        "namespaces": _try_in_child(_namespaces_bite),
        "landlock": _try_in_child(_landlock_bites),
        "seccomp": _try_in_child(_seccomp_bites),
    }
    notes = tuple(f"{name}: {why}" for name, why in results.items() if why)
    if not resident_bytes(os.getpid()):
        notes += ("memory watchdog: /proc does not tell",)
    return Mechanisms(**{name: not why for name, why in results.items()}, notes=notes)


def _try_in_child(attempt: Callable[[], str]) -> str:
    """What ``attempt`` answers in a forked child: empty if the mechanism bites, else why not."""
    receive, send = os.pipe()
    gc.disable()
    child = os.fork()
    if child == 0:
        answer = "the child died"
        try:
            answer = attempt()
        except OSError as error:
            answer = error.strerror or str(error)
        finally:
            os.write(send, b"=" + answer.encode()[:200])
            os._exit(0)
    gc.enable()
    os.close(send)
    answer = os.read(receive, 256).decode()
    os.close(receive)
    os.waitpid(child, 0)
    return answer[1:] if answer else "the child died"


def _namespaces_bite() -> str:
    _unshare()
    with socket.socket() as probe_socket:
        outcome = probe_socket.connect_ex(("127.0.0.1", 9))
    return "" if outcome == errno.ENETUNREACH else "loopback is still reachable"


def _landlock_bites() -> str:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _landlock((), ())
    try:
        list(Path("/").iterdir())
    except PermissionError:
        return ""
    return "not enforced"


def _seccomp_bites() -> str:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _seccomp(syscalls.COMPUTE)
    try:
        socket.socket().close()
    except PermissionError:
        return ""
    return "not enforced"


# --- The mechanisms, by ctypes -------------------------------------------------------------------

_library = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *arguments: Any) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_library.syscall(ctypes.c_long(number), *wide))


def _prctl(option: int, value: int) -> None:
    _checked(_library.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3))


def _unshare() -> None:
    _checked(_library.unshare(_NAMESPACES))


def _drop_capabilities() -> None:
    """Drop all: a namespace's own root could still raise limits or set up interfaces."""
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _syscall(_number("capset"), ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_RULE_PATH_BENEATH = 1


def _landlock(readable: Iterable[str], executable: Iterable[str]) -> None:
    version = _syscall(syscalls.LANDLOCK_CREATE_RULESET, None, 0, 1)
    handled = (1 << 13) - 1  # every file right of version 1
    for since, right in ((2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL_DEVICE)):
        handled |= right if version >= since else 0
    network = 3 if version >= 4 else 0  # bind and connect TCP
    scope = 3 if version >= 6 else 0  # abstract Unix sockets, signals
    attributes = struct.pack("<QQQ", handled, network, scope)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _syscall(syscalls.LANDLOCK_CREATE_RULESET, ctypes.c_char_p(attributes), size, 0)
    rights = dict.fromkeys(readable, _READ_FILE | _READ_DIR)
    rights |= dict.fromkeys(executable, _READ_FILE | _EXECUTE)
    for path, right in rights.items():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = right if Path(path).is_dir() else right & ~_READ_DIR
        beneath = ctypes.c_char_p(struct.pack("<Qi", allowed, descriptor))
        _syscall(syscalls.LANDLOCK_ADD_RULE, rules, _RULE_PATH_BENEATH, beneath, 0)
        os.close(descriptor)
    _syscall(syscalls.LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _number(name: str) -> int:
    return syscalls.TABLES[syscalls.machine()][name]


_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32_BIT = 0x40000000


def filter_program(calls: Mapping[str, Rule | None], machine: str) -> bytes:
    """The BPF program that allows ``calls`` and answers EPERM to all else.

    A foreign architecture or x32 call kills. ``clone3`` answers ENOSYS, so that glibc falls back to
    ``clone``, whose flags a filter can see.
    """
    table = syscalls.TABLES[machine]

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    program = [
        instruction(_LOAD, 4),
        instruction(_EQUAL, syscalls.AUDIT_ARCH[machine], 1, 0),
        instruction(_RETURN, _KILL),
        instruction(_LOAD, 0),
        instruction(_AT_LEAST, _X32_BIT, 0, 1),
        instruction(_RETURN, _KILL),
        instruction(_EQUAL, table["clone3"], 0, 1),
        instruction(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for name, rule in calls.items():
        if name not in table:
            continue
        if rule is None:
            program += [instruction(_EQUAL, table[name], 0, 1), instruction(_RETURN, _ALLOW)]
            continue
        program += [
            instruction(_EQUAL, table[name], 0, 5),
            instruction(_LOAD, 16 + 8 * rule.index),
            instruction(_AND, rule.mask),
            instruction(_EQUAL, rule.value, 0, 1),
            instruction(_RETURN, _ALLOW),
            instruction(_RETURN, _ERRNO | errno.EPERM),
        ]
    program.append(instruction(_RETURN, _ERRNO | errno.EPERM))
    return b"".join(program)


def _seccomp(calls: Mapping[str, Rule | None]) -> None:
    program = filter_program(calls, syscalls.machine())
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    set_mode_filter, every_thread = 1, 1
    _syscall(_number("seccomp"), set_mode_filter, every_thread, ctypes.c_char_p(header))
