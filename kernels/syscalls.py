"""Linux system calls by name: their numbers on x86-64 and aarch64, and who may make which.

A call that an architecture lacks (aarch64 has no ``open``, only ``openat``) is left out of its
table; what is left out of a list is refused. ``Rule`` narrows an allowed call to some argument
values: it may be made if ``argument & mask == value``. Only the low 32 bits of an argument are
looked at, which is where all flags below live.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Final

AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@dataclass(frozen=True, slots=True)
class Rule:
    """Allow a call only if ``argument[index] & mask == value``."""

    index: int
    mask: int
    value: int


_X86_64: Final = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect":
    10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "socket":
    41, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "uname":
    63, "fcntl": 72, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrusage": 98,
    "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "sigaltstack": 131, "prctl": 157, "arch_prctl": 158, "gettid": 186, "futex":
    202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "clock_gettime":
    228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "waitid": 247,
    "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270,
    "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293, "getrandom": 318,
    "membarrier": 324, "statx": 332, "rseq": 334, "clone3": 435, "close_range": 436,
    "faccessat2": 439, "capset": 126, "seccomp": 317,
}  # fmt: skip
_AARCH64: Final = {
    "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect":
    226, "munmap": 215, "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn":
    139, "pread64": 67, "readv": 65, "writev": 66, "sched_yield": 124, "mremap": 216, "madvise":
    233, "dup": 23, "nanosleep": 101, "getpid": 172, "socket": 198, "clone": 220, "execve": 221,
    "exit": 93, "wait4": 260, "uname": 160, "fcntl": 25, "getcwd": 17, "gettimeofday": 169,
    "getrusage": 165, "sysinfo": 179, "times": 153, "getuid": 174, "getgid": 176, "geteuid":
    175, "getegid": 177, "getppid": 173, "sigaltstack": 132, "prctl": 167, "gettid": 178,
    "futex": 98, "sched_getaffinity": 123, "getdents64": 61, "set_tid_address": 96,
    "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "exit_group": 94,
    "waitid": 95, "openat": 56, "newfstatat": 79, "readlinkat": 78, "faccessat": 48, "pselect6":
    72, "ppoll": 73, "set_robust_list": 99, "dup3": 24, "pipe2": 59, "getrandom": 278,
    "membarrier": 283, "statx": 291, "rseq": 293, "clone3": 435, "close_range": 436,
    "faccessat2": 439, "capset": 91, "seccomp": 277,
}  # fmt: skip
TABLES: Final = {"x86_64": _X86_64, "aarch64": _AARCH64}

# One number everywhere: they came after the architectures agreed on one table.
LANDLOCK_CREATE_RULESET: Final = 444
LANDLOCK_ADD_RULE: Final = 445
LANDLOCK_RESTRICT_SELF: Final = 446

# Every CLONE_NEW* flag, CLONE_PTRACE and CLONE_UNTRACED: a process, but no namespace.
_CLONE_NAMESPACES: Final = 0x7E020000 | 0x00800000 | 0x00002000 | 0x00000080
_MAP_SHARED: Final = 1
_PR_SET_PDEATHSIG: Final = 1
_OPEN_TO_WRITE: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Shared memory outlives its mapping until the last page of it is unmapped, and counts neither in
# the process's size nor in its RSS: 1 GiB can be hidden behind one page. So private mappings only,
# and no memfd. Opening to write is refused even where Landlock is absent.
READ_ONLY_OPEN: Final = Rule(2, _OPEN_TO_WRITE, 0)
PRIVATE_MAP: Final = Rule(3, _MAP_SHARED, 0)

# What a worker or a lowerer may do: compute, and read and write the pipes that it was born with.
_COMPUTE_FREELY: Final = """
    read write close fstat poll ppoll lseek mprotect munmap brk mremap madvise rt_sigaction
    rt_sigprocmask rt_sigreturn sigaltstack pread64 readv writev sched_yield nanosleep
    clock_nanosleep clock_gettime clock_getres gettimeofday getrusage times getpid getppid gettid
    getuid geteuid getgid getegid uname futex sched_getaffinity exit exit_group getrandom
    membarrier rseq set_robust_list newfstatat statx access faccessat faccessat2 readlink
    readlinkat getcwd getdents64
"""
COMPUTE: Final[dict[str, Rule | None]] = {
    **dict.fromkeys(_COMPUTE_FREELY.split()),
    "openat": READ_ONLY_OPEN,
    "mmap": PRIVATE_MAP,
}

# A compile server besides forks, executes (Landlock: clang alone) and waits.
_COMPILE_FREELY: Final = """
    execve wait4 waitid pipe2 dup dup2 dup3 fcntl close_range set_tid_address arch_prctl sysinfo
    select pselect6 fork vfork
"""
COMPILE: Final[dict[str, Rule | None]] = {
    **COMPUTE,
    **dict.fromkeys(_COMPILE_FREELY.split()),
    "clone": Rule(0, _CLONE_NAMESPACES, 0),
    "prctl": Rule(0, 0xFFFFFFFF, _PR_SET_PDEATHSIG),
}


def machine() -> str:
    """``x86_64``, ``aarch64`` or another name, as Linux calls it."""
    return platform.machine()
