from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.crypto.dh import P256_ORDER, PUBLIC_KEY_BYTES, PrivateKey
from nebula_mp.errors import AuthError, CertError
from nebula_mp.newtypes import Curve, Entropy
from tests.support import vectors
from tests.support.vectors import Vector

P25519 = 2**255 - 19

# RFC 7748 section 6.1, and the first P-256 case of NIST's CAVP vectors for ECC CDH (SP 800-56A).
KNOWN = [
    pytest.param(
        Curve.CURVE25519,
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        id="RFC 7748",
    ),
    pytest.param(
        Curve.P256,
        "7d7dc5f71eb29ddaf80d6214632eeae03d9058af1fb6d22ed80badb62bc1a534",
        "04"
        "700c48f77f56584c5cc632ca65640db91b6bacce3a4df6b42ce7cc838833d287"
        "db71e509e3fd9b060ddb20ba5c51dcc5948d46fbf640dfe0441782cab85fa4ac",
        "46fc62106420ff012e54a434fbdd2d25ccc5852060561e68040dd7778997bd7b",
        id="NIST CAVP",
    ),
]


def entropy_of(*values: bytes) -> Entropy:
    left: Iterator[bytes] = iter(values)

    def entropy(count: int) -> bytes:
        value = next(left)
        assert len(value) == count
        return value

    return entropy


@pytest.mark.parametrize(("curve", "private", "peer", "secret"), KNOWN)
def test_published_shared_secrets_come_out(curve: Curve, private: str, peer: str, secret: str) -> None:
    key = PrivateKey.from_bytes(curve, bytes.fromhex(private))

    assert key.exchange(bytes.fromhex(peer)).hex() == secret


@pytest.mark.parametrize("side", ["initiator", "responder"])
@pytest.mark.parametrize("handshake", vectors.load("handshake"), ids=lambda each: each["name"])
def test_public_keys_of_nebula_follow_from_its_private_keys(handshake: Vector, side: str) -> None:
    curve = Curve[handshake["curve"]]
    for kind in ("static", "ephemeral"):
        raw = bytes.fromhex(handshake[side][f"{kind}_private"])

        assert PrivateKey.from_bytes(curve, raw).public_key.hex() == handshake[side][f"{kind}_public"]
        assert (
            PrivateKey.generate(curve, entropy_of(raw)).public_key.hex() == handshake[side][f"{kind}_public"]
        )
        assert PrivateKey.from_bytes(curve, raw).to_bytes() == raw


@pytest.mark.parametrize("curve", Curve)
@settings(max_examples=20)
@given(one=st.binary(min_size=32, max_size=32), two=st.binary(min_size=32, max_size=32))
def test_both_sides_get_the_same_secret(curve: Curve, one: bytes, two: bytes) -> None:
    fallback = bytes(31) + b"\x05"
    a, b = (PrivateKey.generate(curve, entropy_of(raw, fallback)) for raw in (one, two))

    secret = a.exchange(b.public_key)

    assert len(secret) == 32
    assert secret == b.exchange(a.public_key)
    assert len(a.public_key) == PUBLIC_KEY_BYTES[curve]
    assert a.curve is curve


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(0, id="zero"),
        pytest.param(1, id="one"),
        pytest.param(P25519 - 1, id="p - 1"),
        pytest.param(P25519, id="p, which is zero again"),
        pytest.param(P25519 + 1, id="p + 1, which is one again"),
        pytest.param(
            325606250916557431795983626356110631294008115727848805560023387167927233504, id="order 8"
        ),
        pytest.param(
            39382357235489614581723060781553021112529911719440698176882885853963445705823, id="order 8 too"
        ),
        pytest.param(2**255, id="zero with the ignored top bit"),
    ],
)
def test_x25519_points_of_low_order_are_refused(point: int) -> None:
    key = PrivateKey.generate(Curve.CURVE25519, entropy_of(bytes(range(32))))

    with pytest.raises(AuthError, match="low order"):
        key.exchange(point.to_bytes(32, "little"))


GOOD_POINT = PrivateKey.from_bytes(Curve.P256, bytes(31) + b"\x07").public_key


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0", id="infinity"),
        pytest.param(bytes(65), id="zeros"),
        pytest.param(b"\x04" + bytes(64), id="zero coordinates"),
        pytest.param(GOOD_POINT[:64] + bytes([GOOD_POINT[64] ^ 1]), id="off the curve"),
        pytest.param(bytes([2 + (GOOD_POINT[64] & 1)]) + GOOD_POINT[1:33], id="compressed"),
        pytest.param(bytes([6 + (GOOD_POINT[64] & 1)]) + GOOD_POINT[1:], id="hybrid"),
        pytest.param(GOOD_POINT[1:], id="without its first byte"),
        pytest.param(GOOD_POINT + b"\0", id="one byte more"),
        pytest.param(b"\x04" + b"\xff" * 64, id="coordinates above the prime"),
    ],
)
def test_p256_takes_only_uncompressed_points_of_the_curve(point: bytes) -> None:
    key = PrivateKey.from_bytes(Curve.P256, bytes(31) + b"\x05")

    key.exchange(GOOD_POINT)
    with pytest.raises(AuthError):
        key.exchange(point)


@pytest.mark.parametrize("size", [0, 31, 33, 65])
def test_x25519_takes_only_32_bytes(size: int) -> None:
    key = PrivateKey.generate(Curve.CURVE25519, entropy_of(bytes(range(32))))

    with pytest.raises(AuthError, match=f"got {size}"):
        key.exchange(b"\x09" + bytes(size - 1) if size else b"")


@pytest.mark.parametrize(
    ("curve", "raw", "text"),
    [
        pytest.param(Curve.CURVE25519, bytes(31), "32 bytes, got 31", id="short X25519"),
        pytest.param(Curve.CURVE25519, bytes(64), "32 bytes, got 64", id="an Ed25519 key"),
        pytest.param(Curve.P256, bytes(33), "32 bytes, got 33", id="long P256"),
        pytest.param(Curve.P256, bytes(32), "zero or not below", id="P256 zero"),
        pytest.param(Curve.P256, P256_ORDER.to_bytes(32), "zero or not below", id="P256 order"),
        pytest.param(Curve.P256, b"\xff" * 32, "zero or not below", id="P256 too large"),
    ],
)
def test_a_stored_key_that_is_none_is_refused_with_the_reason(curve: Curve, raw: bytes, text: str) -> None:
    with pytest.raises(CertError, match=text):
        PrivateKey.from_bytes(curve, raw)


@pytest.mark.parametrize("scalar", [1, P256_ORDER - 1])
def test_the_smallest_and_the_largest_p256_scalar_are_keys(scalar: int) -> None:
    raw = scalar.to_bytes(32)

    assert PrivateKey.from_bytes(Curve.P256, raw).to_bytes() == raw


def test_a_p256_key_is_drawn_again_when_the_first_draw_is_out_of_range() -> None:
    entropy = entropy_of(bytes(32), b"\xff" * 32, P256_ORDER.to_bytes(32), bytes(31) + b"\x07")

    assert PrivateKey.generate(Curve.P256, entropy).public_key == GOOD_POINT


def test_a_broken_entropy_source_does_not_hang_the_program() -> None:
    with pytest.raises(RuntimeError, match="entropy source"):
        PrivateKey.generate(Curve.P256, bytes)


@pytest.mark.parametrize("curve", Curve)
def test_a_repr_shows_the_public_key_and_never_the_private_one(curve: Curve) -> None:
    secret = bytes(range(1, 33))
    key = PrivateKey.from_bytes(curve, secret)

    assert key.public_key.hex() in repr(key)
    assert secret.hex() not in repr(key)
    assert not hasattr(key, "__dict__")
