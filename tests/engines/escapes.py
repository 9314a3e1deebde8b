"""Ways out of the sandbox, each tried for real: run alone it locks a fork of itself and tries all.

``python escapes.py [DENIED_CALL...]`` first refuses itself those calls, as a container would, then
prints a JSON object: the probed level, and what came of each attempt.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import mmap
import os
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from p2pflop.kernels import lockdown, syscalls
from p2pflop.units import GIB

ALLOWED = "ALLOWED"
X86_64 = {
    "ptrace": 101, "process_vm_readv": 310, "pidfd_open": 434, "prlimit64": 302, "mount": 165,
    "io_uring_setup": 425, "bpf": 321, "keyctl": 250, "userfaultfd": 323, "perf_event_open": 298,
    "setuid": 105, "shmget": 29, "eventfd2": 290, "tgkill": 234, "open_tree": 428, "unshare": 272,
    "clone": 56, "landlock_create_ruleset": 444, "seccomp": 317, "prctl": 157, "ioctl": 16,
    "open": 2, "creat": 85, "truncate": 76, "personality": 135, "acct": 163, "syslog": 103,
    "rt_sigqueueinfo": 129, "sched_setaffinity": 203, "setns": 308, "pidfd_getfd": 438,
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> int:
    """A system call by number. Raises OSError."""
    result: int = _libc.syscall(X86_64[name], *(ctypes.c_long(value) for value in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attempts() -> dict[str, Callable[[], object]]:
    """What a hostile worker would try. Each must raise OSError or RuntimeError."""
    parent, one = os.getppid(), ctypes.addressof(ctypes.c_long(0))
    tries: dict[str, Callable[[], object]] = {
        "read passwd": Path("/etc/passwd").read_bytes,
        "read parent's environment": Path(f"/proc/{parent}/environ").read_bytes,
        "list root": lambda: list(Path("/").iterdir()),
        "list home": lambda: list(Path("/root").iterdir()),
        "write a file": lambda: Path("/tmp/p2pflop-escape").write_bytes(b"x"),
        "append to a library": lambda: os.open(os.__file__, os.O_WRONLY | os.O_APPEND),
        "make a folder": lambda: Path("/tmp/p2pflop-escape").mkdir(),
        "symlink": lambda: Path("/tmp/p2pflop-escape").symlink_to("/etc"),
        "hard link": lambda: Path("/tmp/p2pflop-escape").hardlink_to("/etc/passwd"),
        "unlink": lambda: Path("/tmp").rmdir(),
        "chmod": lambda: Path("/tmp").chmod(0o1777),
        "chown": lambda: os.chown("/tmp", 0, 0),
        "truncate": lambda: os.truncate("/dev/null", 0),
        "internet socket": lambda: socket.socket(socket.AF_INET),
        "unix socket": lambda: socket.socket(socket.AF_UNIX),
        "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "socket pair": socket.socketpair,
        "pipe": os.pipe,
        "fork": os.fork,
        "vfork and exec": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "thread": lambda: threading.Thread(target=int).start(),
        "memfd": lambda: os.memfd_create("x"),
        "shared memory": lambda: mmap.mmap(-1, 4096),
        "kill parent": lambda: os.kill(parent, 0),
        "kill all": lambda: os.kill(-1, 0),
        "raise memory limit": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        "raise file size": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
        "chroot": lambda: os.chroot("/"),
        "nice": lambda: os.nice(-5),
    }
    if syscalls.machine() == "x86_64":
        raw: dict[str, tuple[int, ...]] = {
            "ptrace": (16, parent, 0, 0),
            "process_vm_readv": (parent, one, 1, one, 1, 0),
            "pidfd_open": (parent, 0),
            "pidfd_getfd": (0, 0, 0),
            "prlimit64": (parent, resource.RLIMIT_NOFILE, 0, one),
            "mount": (0, 0, 0, 0, 0),
            "io_uring_setup": (8, one),
            "bpf": (0, one, 8),
            "keyctl": (0, 0),
            "userfaultfd": (1,),
            "perf_event_open": (one, 0, -1, -1, 0),
            "setuid": (0,),
            "shmget": (0, 4096, 0o1600),
            "eventfd2": (0, 0),
            "tgkill": (parent, parent, 0),
            "open_tree": (0, 0, 0),
            "unshare": (0x10000000,),
            "setns": (0, 0),
            "clone": (0x10000000 | 17, 0, 0, 0, 0),
            "landlock_create_ruleset": (0, 0, 1),
            "seccomp": (0, 0, 0),
            "prctl": (1, 0, 0, 0, 0),
            "ioctl": (0, 0x5412, one),
            "personality": (0xFFFFFFFF,),
            "acct": (0,),
            "syslog": (3, 0, 0),
            "rt_sigqueueinfo": (parent, 0, one),
            "sched_setaffinity": (0, 8, one),
        }
        for name, arguments in raw.items():
            tries[f"syscall {name}"] = functools.partial(call, name, *arguments)
    tries["exec"] = lambda: os.execv("/bin/true", ["true"])  # noqa: S606
    return tries


def outcomes() -> dict[str, str]:
    """For each attempt the kind of refusal, or ``ALLOWED``."""
    found: dict[str, str] = {}
    for name, attempt in attempts().items():
        try:
            attempt()
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno or 0, str(error))
        except (RuntimeError, ValueError) as error:
            found[name] = type(error).__name__
        else:
            found[name] = ALLOWED
    return found


def deny(names: list[str]) -> None:
    """Refuse these calls to this process and its children, as a container's profile does."""
    program = [struct.pack("<HBBI", 0x20, 0, 0, 0)]
    for name in names:
        program.append(struct.pack("<HBBI", 0x15, 0, 1, X86_64[name]))
        program.append(struct.pack("<HBBI", 0x06, 0, 0, 0x00050000 | errno.EPERM))
    program.append(struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    )
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.syscall(317, 1, 0, header):
        raise OSError(ctypes.get_errno(), "cannot refuse itself calls")


def main(denied: list[str]) -> None:
    if denied:
        deny(denied)
    mechanisms = lockdown.probe()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lockdown.only_descriptors([send])
            lockdown.lock(lockdown.Allowance(GIB, 10, syscalls.COMPUTE), mechanisms)
            os.write(send, json.dumps(outcomes()).encode())
        except (OSError, RuntimeError) as error:
            os.write(send, json.dumps({"lock": repr(error)}).encode())
        finally:
            os._exit(0)
    os.close(send)
    told = b""
    while data := os.read(receive, 65536):
        told += data
    os.waitpid(child, 0)
    notes = list(mechanisms.notes)
    print(json.dumps({"level": mechanisms.level, "notes": notes, "outcomes": json.loads(told)}))


if __name__ == "__main__":
    main(sys.argv[1:])
