from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert.encrypted_key import Argon2Parameters, decrypt, encrypt
from nebula_mp.errors import CertError
from nebula_mp.wire import nebula_pb2 as pb
from tests.cert.helpers import entropy

CHEAP = Argon2Parameters(memory_kib=8, iterations=1, parallelism=1)
ENVELOPE = encrypt(b"k" * 64, b"open sesame", CHEAP, entropy("envelope"))


def changed(**argon2: object) -> bytes:
    message = pb.RawNebulaEncryptedData.FromString(ENVELOPE)
    for name, value in argon2.items():
        setattr(message.EncryptionMetadata.Argon2Parameters, name, value)
    return message.SerializeToString()


def without(field: str) -> bytes:
    message = pb.RawNebulaEncryptedData.FromString(ENVELOPE)
    message.EncryptionMetadata.ClearField(field)
    return message.SerializeToString()


def test_a_key_is_decrypted_with_the_passphrase_it_was_encrypted_with() -> None:
    assert decrypt(ENVELOPE, b"open sesame") == b"k" * 64
    assert b"k" * 64 not in ENVELOPE


@pytest.mark.parametrize("passphrase", [b"", b"open sesam", b"open sesame\n"])
def test_a_wrong_passphrase_is_told_from_nothing_else(passphrase: bytes) -> None:
    with pytest.raises(CertError, match=r"^invalid passphrase or corrupt private key$"):
        decrypt(ENVELOPE, passphrase)


def test_salt_and_nonce_are_fresh_entropy() -> None:
    drawn: list[bytes] = []

    def watched(count: int) -> bytes:
        drawn.append(entropy(str(len(drawn)))(count))
        return drawn[-1]

    envelope = pb.RawNebulaEncryptedData.FromString(encrypt(b"k" * 32, b"p", CHEAP, watched))

    salt, nonce = drawn
    assert (len(salt), len(nonce)) == (32, 12)
    assert envelope.EncryptionMetadata.Argon2Parameters.salt == salt
    assert envelope.Ciphertext[:12] == nonce


def test_the_work_is_that_of_nebula_cert_unless_asked_for_otherwise() -> None:
    assert Argon2Parameters() == Argon2Parameters(memory_kib=2 * 1024 * 1024, iterations=1, parallelism=4)


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        pytest.param(b"\xff", "not a protobuf message", id="no protobuf"),
        pytest.param(b"", "does not say how", id="empty"),
        pytest.param(without("Argon2Parameters"), "does not say how", id="no argon2"),
        pytest.param(
            without("EncryptionAlgorithm"), "unsupported encryption algorithm: $", id="no algorithm"
        ),
        pytest.param(changed(version=18), "incompatible Argon2 version: 18", id="version"),
        pytest.param(changed(salt=b"s" * 15), "salt must be at least 16 bytes, got 15", id="short salt"),
        pytest.param(changed(memory=0), "memory must be 1 to 4294967295, got 0", id="no memory"),
        pytest.param(changed(iterations=0), "iterations must be 1 to 4294967295, got 0", id="no iterations"),
        pytest.param(changed(parallelism=256), "parallelism must be 1 to 255, got 256", id="256 lanes"),
        pytest.param(changed(parallelism=2), "8 KiB for each of the 2 lanes, got 8 KiB", id="little memory"),
    ],
)
def test_envelopes_that_cannot_be_opened_are_refused_with_the_reason(envelope: bytes, reason: str) -> None:
    with pytest.raises(CertError, match=reason):
        decrypt(envelope, b"open sesame")


def test_an_envelope_without_a_key_is_refused() -> None:
    message = pb.RawNebulaEncryptedData.FromString(ENVELOPE)
    message.Ciphertext = message.Ciphertext[:12]

    with pytest.raises(CertError, match="shorter than its nonce"):
        decrypt(message.SerializeToString(), b"open sesame")


def test_more_memory_than_the_machine_has_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_parameters: object) -> None:
        raise MemoryError

    monkeypatch.setattr("nebula_mp.cert.encrypted_key.Argon2id", refuse)

    with pytest.raises(CertError, match="needs 4194303 MiB of memory"):
        decrypt(changed(memory=2**32 - 1), b"open sesame")


@given(st.binary(max_size=100))
def test_any_bytes_raise_cert_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CertError):
        decrypt(data, b"open sesame")


@given(st.integers(0, len(ENVELOPE) - 1), st.integers(0, 7))
def test_an_envelope_changed_anywhere_gives_the_key_or_cert_error(at: int, bit: int) -> None:
    raw = bytearray(ENVELOPE)
    raw[at] ^= 1 << bit
    argon2 = _argon2(bytes(raw))
    if argon2 is None or argon2.memory > 64 or argon2.iterations > 64:
        return  # a bit of the work itself: correct, and too slow to try here

    with suppress(CertError):
        assert decrypt(bytes(raw), b"open sesame") == b"k" * 64


def _argon2(raw: bytes) -> pb.RawNebulaArgon2Parameters | None:
    try:
        return pb.RawNebulaEncryptedData.FromString(raw).EncryptionMetadata.Argon2Parameters
    except DecodeError:
        return None
