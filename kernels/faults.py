"""What a signal that ended a lowerer or worker tells of the job that ran in it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final

from p2pflop.errors import JobError, P2PFlopError, ProviderError

_JOB_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}
)
_DIVIDES: Final = {
    int(signal.SIGFPE): "Does it divide an integer by zero? Write (d == 0).where(1, d) for such a "
    "divisor d."
}
REMOTE_HINTS: Final = {
    **_DIVIDES,
    int(signal.SIGILL): "The processor lacks an instruction: another provider may have it.",
}
REMOTE_HINT: Final = "See whether it does so here: job.run_local()."
LOCAL_HINTS: Final = {
    **_DIVIDES,
    int(signal.SIGKILL): "The system does so where memory runs out: make the job's tensors or its "
    "batch smaller, or free some.",
}
LOCAL_HINT: Final = (
    "Find the operation by leaving some out, or try another class: class_name='cpu-llvm'."
)


def signal_error(what: str, number: int, hints: Mapping[int, str], hint: str) -> P2PFlopError:
    """The error to raise when signal ``number`` has ended ``what``.

    A fault of the code that ran is a JobError, anything else a ProviderError. What to do about it
    is in ``hints`` by signal; ``hint`` is for a fault that is not there.
    """
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number in _JOB_SIGNALS:
        return JobError(f"the job's code faulted ({name})", hint=hints.get(number, hint))
    return ProviderError(f"the {what} was killed ({name})", hint=hints.get(number, ""))
