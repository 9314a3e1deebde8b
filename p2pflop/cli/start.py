"""The console script: Ctrl-C ends it quietly from its first moment on.

Importing the command line takes a while, and Python would answer Ctrl-C in it with the traceback of
an import. Until there is somebody to handle it, the signal does what it does to any other program.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Import the command line, and run it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where it is ignored, as for a job behind '&'
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from p2pflop.cli import main as command_line

    signal.signal(signal.SIGINT, handler)
    command_line.main()
