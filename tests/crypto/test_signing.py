import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.crypto.dh import P256_ORDER
from nebula_mp.crypto.signing import SIGNING_KEY_BYTES, SigningKey, verify, with_low_s, with_other_s
from nebula_mp.errors import AuthError, CertError
from nebula_mp.newtypes import Curve

# RFC 8032 section 7.1, test 2.
ED25519_SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
ED25519_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
ED25519_MESSAGE = b"\x72"
ED25519_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)

# RFC 6979 section A.2.5, SHA-256, message "sample"; its s lies in the upper half.
P256_PRIVATE = bytes.fromhex("C9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721")
P256_PUBLIC = bytes.fromhex(
    "04"
    "60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6"
    "7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299"
)
P256_R = 0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716
P256_HIGH_S = 0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8
HIGH = encode_dss_signature(P256_R, P256_HIGH_S)
LOW = encode_dss_signature(P256_R, P256_ORDER - P256_HIGH_S)

KEYS = {
    Curve.CURVE25519: SigningKey.from_bytes(Curve.CURVE25519, ED25519_SEED + ED25519_PUBLIC),
    Curve.P256: SigningKey.from_bytes(Curve.P256, P256_PRIVATE),
}


def test_ed25519_signs_as_the_rfc_does() -> None:
    key = KEYS[Curve.CURVE25519]

    assert key.public_key == ED25519_PUBLIC
    assert key.sign(ED25519_MESSAGE) == ED25519_SIGNATURE
    verify(Curve.CURVE25519, ED25519_PUBLIC, ED25519_SIGNATURE, ED25519_MESSAGE)


def test_p256_signs_as_the_rfc_does_but_with_s_in_the_lower_half() -> None:
    key = KEYS[Curve.P256]

    assert key.public_key == P256_PUBLIC
    assert key.sign(b"sample") == LOW


@pytest.mark.parametrize("signature", [pytest.param(LOW, id="low s"), pytest.param(HIGH, id="high s")])
def test_both_forms_of_a_p256_signature_verify(signature: bytes) -> None:
    verify(Curve.P256, P256_PUBLIC, signature, memoryview(b"sample"))


def test_the_two_forms_of_a_p256_signature_lead_to_each_other() -> None:
    assert with_other_s(LOW) == HIGH
    assert with_other_s(HIGH) == LOW
    assert with_low_s(HIGH) == with_low_s(LOW) == LOW


@pytest.mark.parametrize("curve", Curve)
@settings(max_examples=25)
@given(message=st.binary(max_size=200), data=st.data())
def test_a_signature_verifies_until_one_bit_of_it_or_of_the_message_changes(
    curve: Curve, message: bytes, data: st.DataObject
) -> None:
    key = KEYS[curve]
    signature = key.sign(message)
    verify(curve, key.public_key, signature, message)
    if curve is Curve.P256:
        assert decode_dss_signature(signature)[1] <= P256_ORDER // 2
    whole = bytearray(signature + message)
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8

    with pytest.raises(AuthError, match="does not fit"):
        verify(curve, key.public_key, bytes(whole[: len(signature)]), whole[len(signature) :])


@pytest.mark.parametrize("curve", Curve)
@given(signature=st.binary(max_size=80))
def test_bytes_that_are_no_signature_are_refused(curve: Curve, signature: bytes) -> None:
    with pytest.raises(AuthError):
        verify(curve, KEYS[curve].public_key, signature, b"message")


@pytest.mark.parametrize(
    "signature",
    [
        pytest.param(b"", id="empty"),
        pytest.param(LOW[:-1], id="cut short"),
        pytest.param(LOW + b"\0", id="one byte more"),
        pytest.param(encode_dss_signature(P256_R, 0), id="s is zero"),
        pytest.param(encode_dss_signature(0, P256_HIGH_S), id="r is zero"),
        pytest.param(encode_dss_signature(P256_R, P256_ORDER), id="s is the order"),
        pytest.param(bytes.fromhex("30060201010201ff"), id="s is negative"),
        pytest.param(encode_dss_signature(P256_ORDER, 1), id="r is the order"),
    ],
)
def test_the_other_form_exists_only_of_a_possible_signature(signature: bytes) -> None:
    for change in (with_other_s, with_low_s):
        with pytest.raises(AuthError):
            change(signature)
    with pytest.raises(AuthError):
        verify(Curve.P256, P256_PUBLIC, signature, b"sample")


@pytest.mark.parametrize(
    ("curve", "public_key"),
    [
        pytest.param(Curve.CURVE25519, P256_PUBLIC, id="a P256 key for Ed25519"),
        pytest.param(Curve.CURVE25519, b"", id="no key"),
        pytest.param(Curve.P256, ED25519_PUBLIC, id="an Ed25519 key for P256"),
        pytest.param(Curve.P256, b"\x04" + bytes(64), id="a point off the curve"),
        pytest.param(Curve.CURVE25519, ED25519_SEED, id="another key"),
    ],
)
def test_a_key_that_does_not_belong_to_the_signature_is_refused(curve: Curve, public_key: bytes) -> None:
    signature = ED25519_SIGNATURE if curve is Curve.CURVE25519 else LOW

    with pytest.raises(AuthError):
        verify(curve, public_key, signature, ED25519_MESSAGE if curve is Curve.CURVE25519 else b"sample")


@pytest.mark.parametrize("curve", Curve)
def test_keys_are_generated_from_entropy_and_stored_and_loaded_again(curve: Curve) -> None:
    seed = bytes(range(1, 33))

    key = SigningKey.generate(curve, lambda count: seed[:count])

    assert len(key.to_bytes()) == SIGNING_KEY_BYTES[curve]
    assert key.to_bytes() == (seed if curve is Curve.P256 else seed + key.public_key)
    again = SigningKey.from_bytes(curve, key.to_bytes())
    assert again.public_key == key.public_key
    assert again.curve is key.curve is curve
    assert again.sign(b"message") == key.sign(b"message")


@pytest.mark.parametrize(
    ("curve", "raw", "text"),
    [
        pytest.param(Curve.CURVE25519, ED25519_SEED, "64 bytes, got 32", id="seed alone"),
        pytest.param(Curve.CURVE25519, ED25519_SEED + bytes(32), "do not belong together", id="mixed halves"),
        pytest.param(Curve.P256, P256_PRIVATE + b"\0", "32 bytes, got 33", id="P256 too long"),
        pytest.param(Curve.P256, bytes(32), "zero or not below", id="P256 zero"),
    ],
)
def test_a_stored_key_that_is_none_is_refused_with_the_reason(curve: Curve, raw: bytes, text: str) -> None:
    with pytest.raises(CertError, match=text):
        SigningKey.from_bytes(curve, raw)


@pytest.mark.parametrize("curve", Curve)
def test_a_repr_shows_the_public_key_and_never_the_private_one(curve: Curve) -> None:
    key = KEYS[curve]

    assert key.public_key.hex() in repr(key)
    assert key.to_bytes()[:32].hex() not in repr(key)
