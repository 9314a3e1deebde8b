"""Text from peers, made safe for logs and terminals.

A peer that could put a newline or an escape sequence into a log line would forge lines, or drive
the terminal of whoever reads them.
"""

from __future__ import annotations

import logging
from typing import Final

MAX_PRINTED: Final = 500
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def printable(text: object, limit: int = MAX_PRINTED) -> str:
    """``text`` in one line without control characters, at most ``limit`` characters of it."""
    found = str(text)
    cut = found[:limit]
    line = "".join(
        char if char.isprintable() else " " if char.isspace() else _REPLACEMENT for char in cut
    )
    return line if len(found) <= limit else line[:-1] + "\N{HORIZONTAL ELLIPSIS}"


class OneLineFormatter(logging.Formatter):
    """A formatter whose messages keep to one line; tracebacks, which are the node's own, do not."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line for ``record``, whatever its arguments hold."""
        record.message = printable(record.message, MAX_PRINTED * 4)
        return super().formatMessage(record)
