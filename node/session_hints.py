"""Why a script gets no lease, and which of its settings to change: one line each.

What a job would do differently is worded in ``market.ranking``; a script has environment variables.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from p2pflop.errors import ConfigError, MarketError
from p2pflop.job.commands import Open
from p2pflop.market.credit import is_over_credit
from p2pflop.market.ranking import Deal, Miss, MissReason, by_nearness
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.units import MIB, format_bytes, format_usd

WAIT: Final = "set CLOUD_WAIT to more, or CLOUD_FALLBACK=local to compute here"
_ANY_CLASS: Final = (
    "Set CLOUD_CLASS=any to compute in whatever class is cheapest, or to an id that "
    "'p2pflop book' lists."
)
_ADVICE: Final = {
    MissReason.CLASS: _ANY_CLASS,
    MissReason.EXPIRED: "Newer sheets come within minutes: set CLOUD_WAIT to more.",
    MissReason.POLICY: f"They have failed lately: {WAIT}.",
    MissReason.ATTESTATION: "Connect to more peers, trust another registry, or buy from everybody: "
    "p2pflop node --open.",
}


def no_lease(ranked: Iterable[Deal | Miss], wish: Open, left_nusd: int) -> MarketError:
    """Why no ask does for a session, of whose limit so much is left."""
    found = by_nearness(ranked)
    if not found:
        return MarketError("the order book is empty", hint=f"Connect to a peer that sells: {WAIT}.")
    nearest, misses = next(iter(found.items()))
    if nearest is MissReason.BUDGET:
        return over_cap(left_nusd, min(miss.total_nusd for miss in misses))
    listed = ", ".join(f"{len(misses)} x {reason}" for reason, misses in found.items())
    hint = _ADVICE.get(nearest, f"Connect to more peers: {WAIT}.")
    if nearest is MissReason.LIMIT:
        hint = f"{'; '.join(sorted({each.told for each in misses}))}. {hint}"
    everybody = [miss for each in found.values() for miss in each]
    if nearest is MissReason.MEMORY or not any(map(_has_memory, everybody)):
        hint = _advice_on_memory(misses, wish)
        if nearest is MissReason.CLASS:
            hint = f"{_ANY_CLASS} {hint}"
    return MarketError(f"no ask does for the session: {listed}", hint=hint)


def over_cap(left_nusd: int, needed_nusd: int) -> MarketError:
    """What is left of the limit does not reach."""
    return MarketError(
        f"{format_usd(left_nusd)} are left of the session's limit, and to go on takes "
        f"{format_usd(needed_nusd)} at least",
        hint="Set CLOUD_MAX_USD to more.",
    )


def refused_everywhere(reason: str, wish: Open) -> MarketError:
    """All that were asked have said no, the last one for ``reason``."""
    hint = f"{WAIT[0].upper()}{WAIT[1:]}."
    if is_over_credit(reason):
        hint = (
            "See 'p2pflop ledger' for what you owe, pay some of it, or set CLOUD_MAX_USD to less."
        )
    elif "memory" in reason:
        wanted = format_bytes(wish.memory_bytes)
        hint = f"Set CLOUD_MEMORY to less than {wanted}, or CLOUD_WAIT to more."
    return MarketError(f"no provider takes the session; the last one says: {reason}", hint=hint)


def unknown_class(error: ConfigError) -> ConfigError:
    """What is wrong with ``CLOUD_CLASS``."""
    return ConfigError(f"CLOUD_CLASS: {error.message}", hint=_ANY_CLASS)


def _has_memory(miss: Miss) -> bool:
    return miss.ask.memory_bytes >= miss.need.memory_bytes


def _advice_on_memory(misses: list[Miss], wish: Open) -> str:
    largest = max(miss.ask.memory_bytes for miss in misses) - WORKER_BASE_BYTES
    if largest < MIB:
        return "None of them has room for a session: connect to a peer with more memory."
    return (
        f"The session asks for {format_bytes(wish.memory_bytes)}: set "
        f"CLOUD_MEMORY={largest // MIB}MiB, the most that there is, or less."
    )
