"""Numbers as a user gives them: steps, seeds, arguments."""

from __future__ import annotations

import operator
from typing import Final

from p2pflop.errors import JobError, P2PFlopError

_SHOWN_BITS: Final = 128


def shown(value: object) -> str:
    """What somebody gave for a number, short: of too many digits Python gives no text at all."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.40}"


def whole_number(
    name: str,
    value: object,
    highest: int,
    lowest: int = 1,
    fault: type[P2PFlopError] = JobError,
) -> int:
    """``value`` as an int, numpy's too. Raises ``fault`` unless it is whole and in range."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = lowest - 1
    if not lowest <= number <= highest:
        raise fault(
            f"{name}={shown(value)} is out of range",
            hint=f"Use a whole number from {lowest} to {highest}.",
        )
    return number
