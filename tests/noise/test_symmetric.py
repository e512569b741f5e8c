import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.crypto.aead import Aead
from nebula_mp.errors import AuthError
from nebula_mp.newtypes import Cipher
from nebula_mp.noise.symmetric import SymmetricState

NAME = "Noise_IX_25519_AESGCM_SHA256"


def hkdf_as_noise_spells_it(chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes]:
    """Section 4.3 of the Noise document, word for word."""
    temp_key = hmac.digest(chaining_key, input_key_material, "sha256")
    output_1 = hmac.digest(temp_key, b"\x01", "sha256")
    return output_1, hmac.digest(temp_key, output_1 + b"\x02", "sha256")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(NAME, NAME.encode() + bytes(4), id="28 bytes: padded"),
        pytest.param("n" * 32, b"n" * 32, id="32 bytes: as it is"),
        pytest.param("n" * 33, hashlib.sha256(b"n" * 33).digest(), id="33 bytes: hashed"),
    ],
)
def test_the_protocol_name_is_padded_up_to_32_bytes_and_hashed_beyond(name: str, expected: bytes) -> None:
    assert SymmetricState(name, Cipher.AES).handshake_hash == expected


@given(st.binary(max_size=80))
def test_keys_are_derived_as_the_noise_document_spells_it(secret: bytes) -> None:
    state = SymmetricState(NAME, Cipher.AES)
    chaining_key, key = hkdf_as_noise_spells_it(NAME.encode() + bytes(4), secret)

    state.mix_key(secret)

    assert state.split() == hkdf_as_noise_spells_it(chaining_key, b"")
    assert state.encrypt_and_hash(b"text") == Aead(Cipher.AES, key).seal(0, NAME.encode() + bytes(4), b"text")


def test_without_a_key_payloads_stay_in_clear_but_are_hashed() -> None:
    state = SymmetricState(NAME, Cipher.AES)
    before = state.handshake_hash

    assert state.encrypt_and_hash(b"text") == b"text"
    assert state.handshake_hash == hashlib.sha256(before + b"text").digest()


@pytest.mark.parametrize("cipher", Cipher)
def test_the_nonce_counts_messages_and_starts_again_with_each_key(cipher: Cipher) -> None:
    writer, reader = SymmetricState(NAME, cipher), SymmetricState(NAME, cipher)

    for secret in (b"one", b"two"):
        writer.mix_key(secret)
        reader.mix_key(secret)
        for text in (b"first", b"second", b""):
            assert reader.decrypt_and_hash(writer.encrypt_and_hash(text)) == text

    assert writer.handshake_hash == reader.handshake_hash
    assert writer.split() == reader.split()


def test_a_ciphertext_that_does_not_fit_changes_nothing() -> None:
    writer, reader = SymmetricState(NAME, Cipher.AES), SymmetricState(NAME, Cipher.AES)
    writer.mix_key(b"secret")
    reader.mix_key(b"secret")
    before = reader.handshake_hash
    sealed = writer.encrypt_and_hash(b"text")

    with pytest.raises(AuthError):
        reader.decrypt_and_hash(sealed[:-1])

    assert reader.handshake_hash == before
    assert reader.decrypt_and_hash(sealed) == b"text"


def test_a_copy_goes_its_own_way() -> None:
    state = SymmetricState(NAME, Cipher.AES)
    state.mix_key(b"secret")
    copy = state.copy()
    before = (state.handshake_hash, state.split())

    copy.encrypt_and_hash(b"text")
    copy.mix_key(b"more")

    assert (state.handshake_hash, state.split()) == before
    assert copy.split() != state.split()
