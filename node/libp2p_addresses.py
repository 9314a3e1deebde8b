"""Multiaddrs: which can be listened on, which can be dialled, and whom they name."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pflop.errors import ConfigError
from p2pflop.keys import public_key_of

MAX_ADDRESSES_PER_PEER: Final = 8
_NAMED: Final = ("dns", "dns4", "dns6")
_NUMBERED: Final = ("ip4", "ip6")

_log = logging.getLogger(__name__)


def listen_address(text: str) -> Multiaddr:
    """An address to listen on. Raises ConfigError."""
    address = _parse(text)
    names = [protocol.name for protocol in address.protocols()]
    if names not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise ConfigError(
            f"cannot listen on {text!r}",
            hint="Give an address like /ip4/0.0.0.0/tcp/7421.",
        )
    return address


def concrete_addresses(listened: Sequence[Multiaddr]) -> list[Multiaddr]:
    """Addresses to tell others: in place of all interfaces (0.0.0.0), each; loopback last."""
    found = {
        str(concrete): concrete for address in listened for concrete in _each_interface(address)
    }
    return sorted(found.values(), key=lambda a: "/127." in str(a) or "/ip6/::1/" in str(a))


def _each_interface(address: Multiaddr) -> list[Multiaddr]:
    if "/ip4/0.0.0.0/" in str(address) or "/ip6/::/" in str(address):
        return [a for a in expand_wildcard_address(address) if "/fe80:" not in str(a).lower()]
    return [address]


def check_port_free(address: Multiaddr) -> None:
    """Raises ConfigError if ``address`` cannot be listened on.

    libp2p shares ports with whoever lets it, so two nodes would take each other's peers.
    """
    family, name = (socket.AF_INET, "ip4") if "/ip4/" in str(address) else (socket.AF_INET6, "ip6")
    port = int(address.value_for_protocol("tcp"))
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.value_for_protocol(name), port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror}",
                hint="Another program has the port, or the address is not this machine's. "
                "Choose another one, or /tcp/0 for any free port.",
            ) from error


def _parse(text: str) -> Multiaddr:
    try:
        return Multiaddr(text)
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(
            f"{text[:200]!r} is not a multiaddr",
            hint="Give an address like /ip4/203.0.113.7/tcp/7421/p2p/<peer id>.",
        ) from error


def peer_of(address: str) -> str:
    """The peer that a dialable multiaddr names. Raises ConfigError."""
    parsed = _parse(address)
    names = [protocol.name for protocol in parsed.protocols()]
    if names[1:] != ["tcp", "p2p"] or names[0] not in (*_NAMED, *_NUMBERED):
        raise ConfigError(
            f"{address[:200]!r} does not name a peer that can be dialled",
            hint="Give an address like /ip4/203.0.113.7/tcp/7421/p2p/<peer id>.",
        )
    peer = str(parsed.value_for_protocol("p2p"))
    public_key_of(peer)
    return peer


def texts(addresses: Iterable[object]) -> tuple[str, ...]:
    """Multiaddrs that others gave, as text.

    Made from bytes, a multiaddr is parsed only when it is printed, and raises then: such are left
    out. ``Exception``, since the parsers of its parts raise what they like.
    """
    kept: list[str] = []
    for address in addresses:
        try:
            kept.append(str(address))
        except Exception:  # noqa: BLE001 - see above
            _log.debug("left out an address that cannot be parsed")
    return tuple(kept)


def dialable(peer: str, addresses: Iterable[str]) -> tuple[str, ...]:
    """Those of the ``addresses`` that others give for ``peer`` that can be dialled.

    Names are left out: a stranger may not make this node look things up.
    """
    kept: list[str] = []
    for text in addresses:
        address = text if text.endswith(f"/p2p/{peer}") else f"{text}/p2p/{peer}"
        try:
            if peer_of(address) == peer and address.startswith(("/ip4/", "/ip6/")):
                kept.append(address)
        except ConfigError:
            continue
    return tuple(kept[:MAX_ADDRESSES_PER_PEER])
