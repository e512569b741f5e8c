from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.crypto.dh import PUBLIC_KEY_BYTES, PrivateKey
from nebula_mp.errors import AuthError, HandshakeError, TruncatedError, WireError
from nebula_mp.newtypes import Cipher, Curve, Entropy
from nebula_mp.noise.ix import MESSAGE_MAX_BYTES, IxInitiator, IxResponder, protocol_name
from tests.support import vectors
from tests.support.vectors import Vector

HANDSHAKES = vectors.load("handshake")
SUITES = [(curve, cipher) for curve in Curve for cipher in Cipher]


def once(raw: bytes) -> Entropy:
    """Entropy that can be read once, for one ephemeral key."""
    left = [raw]

    def entropy(count: int) -> bytes:
        assert count == len(raw)
        return left.pop()

    return entropy


class Pair(NamedTuple):
    initiator: IxInitiator
    responder: IxResponder


def pair_of(vector: Vector) -> Pair:
    curve, cipher = Curve[vector["curve"]], Cipher(vector["cipher_config"])
    sides = []
    for side in ("initiator", "responder"):
        static, ephemeral = (
            bytes.fromhex(vector[side][f"{kind}_private"]) for kind in ("static", "ephemeral")
        )
        sides.append((curve, cipher, PrivateKey.from_bytes(curve, static), once(ephemeral)))
    return Pair(IxInitiator(*sides[0]), IxResponder(*sides[1]))


def fresh_pair(curve: Curve, cipher: Cipher) -> Pair:
    keys = [bytes([fill]) * 32 for fill in (1, 2, 3, 4)]
    return Pair(
        IxInitiator(curve, cipher, PrivateKey.from_bytes(curve, keys[0]), once(keys[1])),
        IxResponder(curve, cipher, PrivateKey.from_bytes(curve, keys[2]), once(keys[3])),
    )


@pytest.mark.parametrize("vector", HANDSHAKES, ids=lambda each: each["name"])
def test_the_initiator_writes_message_1_and_reads_message_2_of_nebula(vector: Vector) -> None:
    initiator = pair_of(vector).initiator

    message_1 = initiator.write_message_1(bytes.fromhex(vector["payload1"]["raw"]))
    assert message_1.hex() == vector["message1"][32:]
    assert initiator.handshake_hash.hex() == vector["hash_after_message1"]

    payload, remote_static, keys = initiator.read_message_2(bytes.fromhex(vector["message2"])[16:])
    assert payload.hex() == vector["payload2"]["raw"]
    assert remote_static.hex() == vector["responder"]["static_public"]
    assert keys.initiator_to_responder.hex() == vector["key_i2r"]
    assert keys.responder_to_initiator.hex() == vector["key_r2i"]
    assert keys.handshake_hash.hex() == vector["handshake_hash"]


@pytest.mark.parametrize("vector", HANDSHAKES, ids=lambda each: each["name"])
def test_the_responder_reads_message_1_and_writes_message_2_of_nebula(vector: Vector) -> None:
    responder = pair_of(vector).responder

    payload, remote_static = responder.read_message_1(bytes.fromhex(vector["message1"])[16:])
    assert payload.hex() == vector["payload1"]["raw"]
    assert remote_static.hex() == vector["initiator"]["static_public"]
    assert responder.handshake_hash.hex() == vector["hash_after_message1"]

    message_2, keys = responder.write_message_2(bytes.fromhex(vector["payload2"]["raw"]))
    assert message_2.hex() == vector["message2"][32:]
    assert keys.initiator_to_responder.hex() == vector["key_i2r"]
    assert keys.responder_to_initiator.hex() == vector["key_r2i"]
    assert keys.handshake_hash.hex() == vector["handshake_hash"]


@pytest.mark.parametrize("vector", HANDSHAKES, ids=lambda each: each["name"])
def test_the_protocol_name_holds_no_psk(vector: Vector) -> None:
    name = protocol_name(Curve[vector["curve"]], Cipher(vector["cipher_config"]))

    assert name == vector["noise_protocol_name"]


@pytest.mark.parametrize(("curve", "cipher"), SUITES)
@settings(max_examples=10)
@given(payload_1=st.binary(max_size=300), payload_2=st.binary(max_size=300))
def test_both_sides_agree_on_payloads_keys_and_hash(
    curve: Curve, cipher: Cipher, payload_1: bytes, payload_2: bytes
) -> None:
    initiator, responder = fresh_pair(curve, cipher)
    size = PUBLIC_KEY_BYTES[curve]

    message_1 = initiator.write_message_1(payload_1)
    assert responder.read_message_1(message_1)[0] == payload_1
    message_2, responder_keys = responder.write_message_2(payload_2)
    read, _, initiator_keys = initiator.read_message_2(message_2)

    assert read == payload_2
    assert initiator_keys == responder_keys
    assert initiator_keys.initiator_to_responder != initiator_keys.responder_to_initiator
    assert len(message_1) == 2 * size + len(payload_1)
    assert len(message_2) == size + size + 16 + len(payload_2) + 16


@pytest.mark.parametrize(("curve", "cipher"), SUITES)
def test_after_any_number_of_forged_answers_the_real_one_is_still_read(curve: Curve, cipher: Cipher) -> None:
    initiator, responder = fresh_pair(curve, cipher)
    responder.read_message_1(initiator.write_message_1(b"hello"))
    message_2, keys = responder.write_message_2(b"welcome")
    size = PUBLIC_KEY_BYTES[curve]
    before = initiator.handshake_hash
    parts: dict[str, int] = {
        "ephemeral": size // 2,
        "static": size + 5,
        "tag of static": 2 * size + 3,
        "payload": 2 * size + 16 + 2,
        "tag of payload": len(message_2) - 1,
    }

    for position in parts.values():
        forged = bytearray(message_2)
        forged[position] ^= 1
        with pytest.raises(AuthError):
            initiator.read_message_2(bytes(forged))
        assert initiator.handshake_hash == before
    for cut in (0, 1, size, 2 * size + 16, 2 * size + 31, len(message_2) - 1):
        with pytest.raises(AuthError):
            initiator.read_message_2(message_2[:cut])
    with pytest.raises(AuthError):
        initiator.read_message_2(message_2 + b"\0")

    assert initiator.read_message_2(message_2)[2] == keys
    assert initiator.read_message_2(message_2)[2] == keys


BAD_KEYS: list[tuple[Curve, Callable[[], bytes], str]] = [
    (Curve.CURVE25519, lambda: bytes(32), "zeros"),
    (Curve.CURVE25519, lambda: b"\x01" + bytes(31), "low order"),
    (Curve.P256, lambda: bytes(65), "zeros"),
    (Curve.P256, lambda: b"\x04" + bytes(64), "off the curve"),
    (Curve.P256, lambda: b"\x04" + b"\xff" * 64, "out of range"),
]


@pytest.mark.parametrize(
    ("curve", "key"), [pytest.param(c, k(), id=f"{c.name} {what}") for c, k, what in BAD_KEYS]
)
@pytest.mark.parametrize("which", ["ephemeral", "static"])
def test_an_initiators_bad_public_key_ends_the_attempt(curve: Curve, key: bytes, which: str) -> None:
    initiator, responder = fresh_pair(curve, Cipher.AES)
    message_1 = initiator.write_message_1(b"hello")
    size = len(key)
    bad = key + message_1[size:] if which == "ephemeral" else message_1[:size] + key + message_1[2 * size :]

    responder.read_message_1(bad)

    with pytest.raises(AuthError):
        responder.write_message_2(b"welcome")


@pytest.mark.parametrize(
    ("curve", "key"), [pytest.param(c, k(), id=f"{c.name} {what}") for c, k, what in BAD_KEYS]
)
def test_a_responders_bad_ephemeral_key_is_refused(curve: Curve, key: bytes) -> None:
    initiator, responder = fresh_pair(curve, Cipher.AES)
    responder.read_message_1(initiator.write_message_1(b"hello"))
    message_2, _ = responder.write_message_2(b"welcome")

    with pytest.raises(AuthError):
        initiator.read_message_2(key + message_2[len(key) :])


@pytest.mark.parametrize(("curve", "cipher"), SUITES)
def test_reading_message_1_does_no_diffie_hellman_and_draws_no_entropy(
    curve: Curve, cipher: Cipher, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_1 = fresh_pair(curve, cipher).initiator.write_message_1(b"hello")
    responder = IxResponder(curve, cipher, PrivateKey.from_bytes(curve, b"\x03" * 32), once(b""))

    def refuse(self: PrivateKey, peer_public: bytes) -> bytes:
        raise AssertionError("Diffie-Hellman for a stranger")

    monkeypatch.setattr(PrivateKey, "exchange", refuse)

    assert responder.read_message_1(message_1)[0] == b"hello"


@pytest.mark.parametrize("curve", Curve)
def test_message_1_must_hold_two_keys_and_a_short_one_changes_nothing(curve: Curve) -> None:
    initiator, responder = fresh_pair(curve, Cipher.AES)
    size = 2 * PUBLIC_KEY_BYTES[curve]
    message_1 = initiator.write_message_1(b"")
    before = responder.handshake_hash

    with pytest.raises(TruncatedError, match=f"need {size} bytes, got {size - 1}"):
        responder.read_message_1(message_1[:-1])

    assert responder.handshake_hash == before
    assert responder.read_message_1(message_1)[0] == b""


def test_messages_may_be_65535_bytes_and_no_longer() -> None:
    largest = MESSAGE_MAX_BYTES - 2 * 32
    initiator, responder = fresh_pair(Curve.CURVE25519, Cipher.AES)

    message_1 = initiator.write_message_1(bytes(largest))

    assert len(message_1) == MESSAGE_MAX_BYTES
    with pytest.raises(AuthError, match="65536 bytes"):
        responder.read_message_1(message_1 + b"\0")
    responder.read_message_1(message_1)
    message_2, _ = responder.write_message_2(bytes(largest - 32))
    assert len(message_2) == MESSAGE_MAX_BYTES
    assert initiator.read_message_2(message_2)[0] == bytes(largest - 32)
    with pytest.raises(AuthError, match="65536 bytes"):
        initiator.read_message_2(message_2 + b"\0")

    initiator, responder = fresh_pair(Curve.CURVE25519, Cipher.AES)
    with pytest.raises(HandshakeError, match="65536 bytes"):
        initiator.write_message_1(bytes(largest + 1))
    responder.read_message_1(message_1)
    with pytest.raises(HandshakeError, match="65536 bytes"):
        responder.write_message_2(bytes(largest - 31))


def test_sides_with_different_ciphers_do_not_come_together() -> None:
    initiator = fresh_pair(Curve.CURVE25519, Cipher.AES).initiator
    responder = fresh_pair(Curve.CURVE25519, Cipher.CHACHAPOLY).responder
    responder.read_message_1(initiator.write_message_1(b"hello"))

    with pytest.raises(AuthError):
        initiator.read_message_2(responder.write_message_2(b"welcome")[0])


@pytest.mark.parametrize("curve", Curve)
@settings(max_examples=50)
@given(message=st.binary(max_size=400))
def test_any_bytes_are_read_or_raise_a_wire_error(curve: Curve, message: bytes) -> None:
    initiator, responder = fresh_pair(curve, Cipher.AES)
    initiator.write_message_1(b"hello")

    with pytest.raises(AuthError):
        initiator.read_message_2(message)
    try:
        responder.read_message_1(message)
        responder.write_message_2(b"welcome")
    except WireError:
        pass


def test_a_repr_of_keys_hides_them() -> None:
    initiator, responder = fresh_pair(Curve.CURVE25519, Cipher.AES)
    responder.read_message_1(initiator.write_message_1(b""))
    _, keys = responder.write_message_2(b"")

    assert "initiator_to_responder" not in repr(keys)
    assert repr(keys.initiator_to_responder) not in repr(keys)
    assert repr(keys.handshake_hash) in repr(keys)
