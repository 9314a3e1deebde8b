"""Ed25519 keys: nodes, accounts, and the delegation by which an account owns a node.

Verification is strict (PyNaCl/libsodium: canonical encodings, no small-order keys), because a
key for which any message verifies would let one peer sign for everybody. Keys rest on disk as
PKCS#8 PEM, which every other tool can read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import base58
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.exceptions import BadSignatureError
from nacl.exceptions import ValueError as NaclValueError
from nacl.signing import SigningKey, VerifyKey

from p2pflop.errors import ConfigError, VerificationError

SEED_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
KNOWN_PEERS: Final = 4096
"""Of so many the id is remembered: base58 is slow, and a purchase names its peer ten times."""

_PEER_ID_PREFIX: Final = bytes.fromhex(
    "002408011220"
)  # identity multihash of a protobuf Ed25519 key


class PrivateKey:
    """An Ed25519 key made from a 32-byte seed."""

    __slots__ = ("_key", "public_key", "seed")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self.seed = seed
        self._key = SigningKey(seed)
        self.public_key = bytes(self._key.verify_key)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of ``message``."""
        return self._key.sign(message).signature

    def to_pem(self) -> bytes:
        """Unencrypted PKCS#8 PEM."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @classmethod
    def from_pem(cls, pem: bytes) -> PrivateKey:
        """Raises ConfigError if ``pem`` is not an unencrypted Ed25519 key."""
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"not a private key in PEM form: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError("the key is not an Ed25519 key")
        return cls(key.private_bytes_raw())

    def __repr__(self) -> str:
        return f"PrivateKey({peer_id(self.public_key)})"


def verify_signature(public_key: bytes, message: bytes, signature: bytes) -> None:
    """Raises VerificationError unless ``signature`` is by ``public_key`` over ``message``."""
    try:
        VerifyKey(public_key).verify(message, signature)
    except (BadSignatureError, NaclValueError, ValueError) as error:
        raise VerificationError(f"bad signature for {public_key.hex()[:16]}") from error


@lru_cache(maxsize=KNOWN_PEERS)
def peer_id(public_key: bytes) -> str:
    """The libp2p peer id (base58) of an Ed25519 public key."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


def public_key_of(peer: str) -> bytes:
    """The Ed25519 public key inside a libp2p peer id. Raises ConfigError."""
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise ConfigError(f"{peer[:80]!r} is not a peer id") from error
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        raise ConfigError(f"{peer[:80]!r} is not the id of an Ed25519 peer")
    return raw[len(_PEER_ID_PREFIX) :]
