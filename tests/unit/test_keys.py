"""Keys: the vectors of RFC 8032, what strict verification refuses, peer ids, PEM."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from p2pflop.errors import ConfigError, VerificationError
from p2pflop.keys import PrivateKey, peer_id, public_key_of, verify_signature

ORDER = 2**252 + 27742317777372353535851937790883648493

# RFC 8032, 7.1, tests 1 and 2: seed, public key, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b"
        "46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11"
        "d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
]

# The eight points of small order, canonical encodings.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), VECTORS)
def test_the_vectors_of_rfc_8032(seed: str, public: str, message: str, signature: str) -> None:
    key = PrivateKey(bytes.fromhex(seed))
    assert key.public_key.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    verify_signature(key.public_key, bytes.fromhex(message), bytes.fromhex(signature))


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_key_for_which_any_message_verifies_is_refused(point: str) -> None:
    key = bytes.fromhex(point)
    for signature in (key + bytes(32), bytes.fromhex(SMALL_ORDER[0]) + bytes(32)):
        with pytest.raises(VerificationError):
            verify_signature(key, b"anything", signature)


def test_a_second_form_of_a_signature_is_refused() -> None:
    key = PrivateKey(b"k" * 32)
    signature = key.sign(b"message")
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    with pytest.raises(VerificationError):
        verify_signature(key.public_key, b"message", signature[:32] + scalar.to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_keys_and_signatures_of_a_wrong_length_are_refused(length: int) -> None:
    key = PrivateKey(b"k" * 32)
    with pytest.raises(VerificationError):
        verify_signature(bytes(length), b"m", key.sign(b"m"))
    if length != 64:
        with pytest.raises(VerificationError):
            verify_signature(key.public_key, b"m", bytes(length))
        with pytest.raises((ValueError, TypeError)):
            PrivateKey(bytes(length)) if length != 32 else None


def test_a_peer_id_holds_its_key() -> None:
    key = PrivateKey(bytes.fromhex(VECTORS[0][0]))
    peer = peer_id(key.public_key)
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == key.public_key


@pytest.mark.parametrize(
    "text", ["", "12D3KooW", "not a peer", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8w", "0OIl"]
)
def test_what_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        public_key_of(text)


def test_a_key_rests_as_pem_and_comes_back() -> None:
    key = PrivateKey(b"k" * 32)
    assert PrivateKey.from_pem(key.to_pem()).public_key == key.public_key
    assert b"PRIVATE KEY" in key.to_pem()


def test_another_kind_of_pem_is_refused() -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for bad in (pem, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(ConfigError):
            PrivateKey.from_pem(bad)


def test_the_text_of_a_key_does_not_show_it() -> None:
    key = PrivateKey(b"secret-seed-of-exactly-32-bytes!")
    assert key.seed.hex() not in repr(key)
    assert "secret" not in repr(key)
