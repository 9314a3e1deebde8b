"""Every error that p2pflop raises, and the exit code that the command line gives for it.

::

    P2PFlopError                      exit 1   anything below
    ├── ConfigError                   exit 2   a setting, a flag, a file or this machine is not fit
    │   ├── HomeLockedError           exit 3   another node already runs on this home
    │   └── NodeUnreachableError      exit 4   no node answers at the address in question
    ├── JobError                      exit 5   the job's own fault: invalid, too large, faulted
    ├── ProviderError                 exit 6   not the job's fault: vanished, refused; try again
    ├── MarketError                   exit 7   no ask satisfies the job, or the budget does not
    ├── StoreError                    exit 8   the blob store cannot keep or find something
    │   ├── BlobNotFoundError         exit 9   no such blob here, nor where it was looked for
    │   └── StoreFullError            exit 12  no room is left on its disk, or in its quota
    ├── VerificationError             exit 10  a hash or a signature does not match its bytes
    └── ProtocolError                 exit 11  a peer sent what the protocol does not allow

``TraceWarning`` is a warning, given by ``trace`` for what is allowed and looks like a mistake.

Expected outcomes are values (``Rejected``, ``Refusal``, ``Miss``), not exceptions. A message says
what happened and to what; ``hint`` says what to do next, and is a note of the exception, so that
a traceback shows it too.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


class P2PFlopError(Exception):
    """The root. ``hint`` is one sentence that tells a user what to do, or empty."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(hint)


class ConfigError(P2PFlopError):
    """A setting, a flag, a file or this machine is not fit for what was asked."""

    exit_code = 2


class HomeLockedError(ConfigError):
    """Another node already runs on this home."""

    exit_code = 3


class NodeUnreachableError(ConfigError):
    """No node answers at the address in question."""

    exit_code = 4


class JobError(P2PFlopError):
    """The job's own fault: it is invalid, too large, ran out of memory or faulted. Not retried."""

    exit_code = 5


class ProviderError(P2PFlopError):
    """Not the job's fault: a provider vanished, refused, or broke a limit. Another may do it."""

    exit_code = 6


class MarketError(P2PFlopError):
    """No ask satisfies the job, or the budget does not reach."""

    exit_code = 7


class StoreError(P2PFlopError):
    """The blob store cannot keep, read or find something."""

    exit_code = 8


class BlobNotFoundError(StoreError):
    """No such blob here, nor where it was looked for."""

    exit_code = 9


class StoreFullError(StoreError):
    """No room is left: its disk is full, or its quota is reached."""

    exit_code = 12


class VerificationError(P2PFlopError):
    """A hash or a signature does not match the bytes that it is about."""

    exit_code = 10


class ProtocolError(P2PFlopError):
    """A peer sent what the protocol does not allow. ``peer`` is its id where one is known."""

    exit_code = 11

    def __init__(self, message: str, *, hint: str = "", peer: str = "") -> None:
        super().__init__(message, hint=hint)
        self.peer = peer


class TraceWarning(UserWarning):
    """What a traced function does may not mean what its author thinks; it names the line."""


def first_error(group: BaseExceptionGroup[ErrorT]) -> ErrorT:
    """The first error inside a group, however deep."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error
