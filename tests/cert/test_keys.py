from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import codec, keys
from nebula_mp.cert.encrypted_key import Argon2Parameters
from nebula_mp.cert.pem import Banner, encode_block
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.errors import CertError
from nebula_mp.newtypes import Curve
from tests.cert.helpers import entropy, make_ca
from tests.support import vectors
from tests.support.vectors import Vector

FILES = vectors.DIRECTORY / "certs"
VECTORS = vectors.load("certs")
ENCRYPTED = {each["file"] for each in VECTORS["encrypted_ca_keys"]}
PAIRS = [each for each in VECTORS["certs"] if each.get("key_file") and each["key_file"] not in ENCRYPTED]
CHEAP = Argon2Parameters(memory_kib=8, iterations=1, parallelism=1)


def never_asked() -> bytes:
    raise AssertionError("asked for a passphrase")


def read(name: str) -> str:
    return (FILES / name).read_text()


@pytest.mark.parametrize("vector", PAIRS, ids=lambda each: each["file"])
def test_every_private_key_made_by_nebula_belongs_to_its_certificate_and_is_written_alike(
    vector: Vector,
) -> None:
    text = read(vector["key_file"])

    if vector["is_ca"]:
        signing_key = keys.parse_signing_key(text, "f", never_asked)
        curve, public_key = signing_key.curve, signing_key.public_key
        written = keys.encode_signing_key(signing_key)
    else:
        private_key = keys.parse_private_key(text, "f")
        curve, public_key = private_key.curve, private_key.public_key
        written = keys.encode_private_key(private_key)

    assert curve is Curve[vector["curve"]]
    assert public_key.hex() == vector["public_key"]
    assert written == text


@pytest.mark.parametrize("vector", VECTORS["encrypted_ca_keys"], ids=lambda each: each["file"])
def test_every_encrypted_key_made_by_nebula_is_decrypted_and_belongs_to_its_ca(vector: Vector) -> None:
    key = keys.parse_signing_key(read(vector["file"]), "f", vector["passphrase"].encode)

    [(_, ca)] = codec.parse_pem(read(vector["cert"]), "f")
    assert key.to_bytes().hex() == vector["decrypted_private_key"]
    assert key.curve is Curve[vector["curve"]]
    assert key.public_key == ca.public_key


@pytest.mark.parametrize(
    "stem", ["keygen-25519", "keygen-P256", "keygen161-25519", "host-dual-25519", "host-dual-P256"]
)
def test_every_public_key_made_by_nebula_is_that_of_its_private_key(stem: str) -> None:
    private_key = keys.parse_private_key(read(f"{stem}.key"), "f")

    assert keys.parse_public_key(read(f"{stem}.pub"), "f") == (private_key.curve, private_key.public_key)
    assert keys.encode_public_key(private_key) == read(f"{stem}.pub")


def test_no_key_file_of_the_vectors_is_left_out() -> None:
    used = {each["key_file"] for each in PAIRS} | ENCRYPTED
    used |= {f"{stem}.key" for stem in ("keygen-25519", "keygen-P256", "keygen161-25519")}

    assert {path.name for path in FILES.glob("*.key")} == used


@pytest.mark.parametrize("curve", Curve)
def test_a_ca_key_is_read_back_whether_encrypted_or_not(curve: Curve) -> None:
    key = SigningKey.generate(curve, entropy("key"))

    plain = keys.parse_signing_key(keys.encode_signing_key(key), "f", never_asked)
    text = keys.encrypt_signing_key(key, b"open sesame", CHEAP, entropy("salt"))
    decrypted = keys.parse_signing_key(text, "f", lambda: b"open sesame")

    assert plain.to_bytes() == decrypted.to_bytes() == key.to_bytes()
    assert "ENCRYPTED" in text


def test_a_wrong_passphrase_names_the_file() -> None:
    text = read("ca-enc-25519-v2.key")

    with pytest.raises(CertError, match=r"^ca.key: block 1 \(line 1\): invalid passphrase or corrupt"):
        keys.parse_signing_key(text, "ca.key", lambda: b"wrong")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(make_ca().pem, "a certificate (NEBULA CERTIFICATE V2), where a host's private key is expected; are the certificate and the key swapped?", id="certificate"),
        pytest.param(read("keygen-P256.pub"), "use the .key file made together with it", id="public key"),
        pytest.param(read("ca-P256-v1.key"), "the CA's key stays with the CA", id="key of a CA"),
        pytest.param(read("ca-enc-P256-v2.key"), "a CA's encrypted private key", id="encrypted key of a CA"),
        pytest.param(encode_block(Banner.X25519_PRIVATE, bytes(31)), "is 32 bytes, got 31", id="short"),
        pytest.param(encode_block(Banner.P256_PRIVATE, bytes(32)), "is zero", id="no scalar of the curve"),
    ],
)  # fmt: skip
def test_what_is_no_private_key_of_a_host_is_refused_with_the_likely_fix(text: str, reason: str) -> None:
    with pytest.raises(CertError) as caught:
        keys.parse_private_key(text, "host.key")

    assert str(caught.value).startswith("host.key: block 1 (line 1)")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(read("keygen-P256.key"), "where a host's public key is expected", id="private key"),
        pytest.param(encode_block(Banner.X25519_PUBLIC, bytes(33)), "are 32 bytes, got 33", id="long"),
        pytest.param(
            encode_block(Banner.P256_PUBLIC, bytes(33)), "are 65 bytes, got 33", id="compressed point"
        ),
    ],
)
def test_what_is_no_public_key_of_a_host_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CertError, match=reason):
        keys.parse_public_key(text, "f")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(read("keygen-25519.key"), "where a CA's private key is expected", id="key of a host"),
        pytest.param(encode_block(Banner.ED25519_PRIVATE, bytes(32)), "64 bytes, got 32", id="seed only"),
        pytest.param(encode_block(Banner.ED25519_PRIVATE, bytes(64)), "two halves", id="halves of two keys"),
        pytest.param(
            encode_block(Banner.ECDSA_P256_PRIVATE, b"\xff" * 32), "below the order", id="no scalar"
        ),
    ],
)
def test_what_is_no_private_key_of_a_ca_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CertError, match=reason):
        keys.parse_signing_key(text, "f", never_asked)


@given(
    st.text()
    | st.tuples(st.sampled_from(Banner), st.binary(max_size=70)).map(lambda args: encode_block(*args))
)
def test_any_text_is_a_key_or_raises_cert_error(text: str) -> None:
    with suppress(CertError):
        assert isinstance(keys.parse_private_key(text, "f"), PrivateKey)
    with suppress(CertError):
        assert keys.parse_public_key(text, "f")
    with suppress(CertError):
        assert isinstance(keys.parse_signing_key(text, "f", lambda: b"p"), SigningKey)
