"""Accounts and payments as people name them: in full, or by enough of their first digits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import click

from p2pflop.errors import ConfigError
from p2pflop.ids import HASH_BYTES

if TYPE_CHECKING:
    from p2pflop.client import Client

MIN_DIGITS: Final = 8
_PEER: Final = "12D3KooW"
_SHORT_PEER: Final = ".."
_DIGITS: Final = re.compile(rf"[0-9a-f]{{{MIN_DIGITS},{2 * HASH_BYTES}}}")


def find_account(client: Client, text: str) -> bytes:
    """The account of 64 hex digits, the one that the node knows which begins so, or a provider's.

    A provider is named by its peer id or the end of it, as ``p2pflop book`` shows it. Raises
    ConfigError if nobody is named so, or several are.
    """
    if is_whole(text):
        return bytes.fromhex(text)
    if text.startswith((_SHORT_PEER, _PEER)):
        end = text.removeprefix(_SHORT_PEER)
        asks = client.book() if len(end) >= MIN_DIGITS else []
        sellers = {ask["account"] for ask in asks if ask["provider"].endswith(end)}
        return _only(text, sellers, "provider", "See 'p2pflop book'.")
    known = [balance["account"] for balance in client.ledger().get("balances", ())]
    known += [ask["account"] for ask in client.book()]
    known += [payment["account"] for payment in client.payments()]
    return find_among(
        text,
        known,
        "account",
        "See 'p2pflop ledger --json', or name a provider as 'p2pflop book' does: ..1B4naAgDVV.",
    )


def is_peer(peer: str, text: str) -> bool:
    """Whether a person who wrote ``text``, a peer id or the end of one, means ``peer``."""
    return peer.endswith(text.removeprefix(_SHORT_PEER))


def find_payment(client: Client, text: str) -> dict[str, Any]:
    """The payment of that id, or the one whose id begins so. Raises ConfigError."""
    payments = {payment["id"]: payment for payment in client.payments()}
    return payments[find_among(text, payments, "payment", "See 'p2pflop payments'.").hex()]


def due_from(client: Client, account: bytes) -> int:
    """What that account owes this one, in nano-dollars; below zero, this one owes it."""
    balances = client.ledger().get("balances", ())
    found = [b["due_nusd"] for b in balances if b["account"] == account.hex()]
    return int(found[0]) if found else 0


def is_whole(text: str) -> bool:
    """Whether ``text`` is an account or an id in full."""
    return len(text) == 2 * HASH_BYTES and _DIGITS.fullmatch(text) is not None


def confirm(question: str, *, yes: bool) -> None:
    """Ask a person. Raises ConfigError for any answer but yes, and where nobody is there to ask."""
    if yes:
        return
    try:
        if click.confirm(question, err=True):
            return
    except click.Abort:
        click.echo(err=True)
    raise ConfigError("not confirmed: nothing was booked", hint="Without a question: --yes.")


def find_among(text: str, known: Iterable[str], what: str, hint: str) -> bytes:
    """The one of ``known`` that begins with ``text``. Raises ConfigError, which says ``what``."""
    if _DIGITS.fullmatch(text) is None:
        raise ConfigError(
            f"{text[:80]!r} is no {what}: {2 * HASH_BYTES} hex digits, or at least {MIN_DIGITS} "
            "of the first",
            hint=hint,
        )
    return _only(text, {each for each in known if each.startswith(text)}, what, hint)


def _only(text: str, found: set[str], what: str, hint: str) -> bytes:
    if len(found) != 1:
        several = f"{len(found)} are" if found else "none is"
        raise ConfigError(f"of the {what}s known here {several} named {text[:80]}", hint=hint)
    return bytes.fromhex(found.pop())
