"""How the session of a script is told beside jobs: by its commands and its cost, for it has no
steps that are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from p2pflop.cli.output import clean, local_time, short
from p2pflop.units import format_bytes, format_duration, format_flop, format_limit, format_usd

IDLE: Final = "idle"
"""The state of one whose lease is given back for a while."""


def is_session(card: Mapping[str, Any]) -> bool:
    """Whether a run is the session of a script."""
    return bool(card.get("kind") == "session")


def spent(card: Mapping[str, Any]) -> str:
    """What it has cost, and may."""
    return f"{format_usd(int(card['cost_nusd']))} of {format_limit(int(card['max_nusd']))}"


def place(card: Mapping[str, Any]) -> str:
    """How far it is."""
    return f"after {card.get('step', 0)} commands"


def title(card: Mapping[str, Any]) -> str:
    """Which script it is of, and where it computes."""
    name = clean(card["title"]) or "a script"
    if card["end_state"] or not card["provider"]:
        return f"{name} (CLOUD)"
    return f"{name} (CLOUD), at {short(card['provider'])}"


def fields(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All that is known of it."""
    yield "id", card["id"]
    yield "script", card["title"] or "unknown"
    yield "state", card["state"]
    yield "since", local_time(card["submitted_ns"])
    if "ended_ns" in card:
        yield "until", local_time(card["ended_ns"])
    yield "provider", card["provider"] or "none yet"
    yield "account", card["account"] or "none yet"
    yield "class", card["class_id"] or card["class_name"] or "this node's own"
    yield "cost", spent(card)
    yield "commands", f"{card.get('step', 0)} of {card.get('commands', 0)} obeyed"
    yield "memory", format_bytes(card.get("memory_bytes", 0))
    yield "counted", format_flop(card.get("flop", 0))
    yield "moved", format_bytes(card.get("moved_bytes", 0))
    yield "busy", format_duration(card.get("busy_ns", 0))
