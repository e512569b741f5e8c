import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.crypto.aead import TAG_BYTES, Aead
from nebula_mp.errors import AuthError
from nebula_mp.newtypes import Cipher
from tests.support import vectors
from tests.support.vectors import Vector

KEY = bytes(range(32))
HANDSHAKES = vectors.load("handshake")

ciphers = st.sampled_from(Cipher)
counters = st.integers(0, 2**64 - 1)


def aead_of(handshake: Vector, direction: str) -> Aead:
    return Aead(Cipher(handshake["cipher_config"]), bytes.fromhex(handshake[f"key_{direction}"]))


@pytest.mark.parametrize("handshake", HANDSHAKES, ids=lambda each: each["name"])
def test_data_packets_of_nebula_are_sealed_and_opened_byte_for_byte(handshake: Vector) -> None:
    assert len(handshake["packets"]) == 9
    for vector in handshake["packets"]:
        aead = aead_of(handshake, vector["direction"])
        counter = int(vector["counter"])
        packet, plaintext = bytes.fromhex(vector["packet"]), bytes.fromhex(vector["plaintext"])

        assert packet[:16] + aead.seal(counter, packet[:16], plaintext) == packet
        assert aead.open(counter, packet[:16], packet[16:]) == plaintext


@pytest.mark.parametrize("handshake", HANDSHAKES, ids=lambda each: each["name"])
def test_a_relay_frame_carries_its_inner_packet_as_associated_data_and_only_a_tag(handshake: Vector) -> None:
    vector = handshake["relay_frame"]
    aead = aead_of(handshake, vector["direction"])
    counter = int(vector["counter"])
    frame = bytes.fromhex(vector["packet"])
    covered, tag = frame[:-TAG_BYTES], frame[-TAG_BYTES:]

    assert covered[16:] == bytes.fromhex(vector["inner_packet"])
    assert aead.seal(counter, covered, b"") == tag
    assert aead.open(counter, covered, tag) == b""


@pytest.mark.parametrize(
    ("cipher", "primitive", "nonce"),
    [
        pytest.param(Cipher.AES, AESGCM, "00000000 0102030405060708", id="aes: big-endian"),
        pytest.param(
            Cipher.CHACHAPOLY, ChaCha20Poly1305, "00000000 0807060504030201", id="chachapoly: little-endian"
        ),
    ],
)
def test_the_nonce_is_four_zero_bytes_and_the_counter_in_the_order_of_the_cipher(
    cipher: Cipher, primitive: type[AESGCM | ChaCha20Poly1305], nonce: str
) -> None:
    sealed = Aead(cipher, KEY).seal(0x0102030405060708, b"ad", b"text")

    assert sealed == primitive(KEY).encrypt(bytes.fromhex(nonce), b"text", b"ad")


@given(ciphers, counters, st.binary(max_size=40), st.binary(max_size=80))
def test_what_was_sealed_is_opened_again_from_any_kind_of_buffer(
    cipher: Cipher, counter: int, associated_data: bytes, plaintext: bytes
) -> None:
    aead = Aead(cipher, memoryview(KEY))

    sealed = aead.seal(counter, memoryview(associated_data), bytearray(plaintext))

    assert len(sealed) == len(plaintext) + TAG_BYTES
    assert aead.open(counter, bytearray(associated_data), memoryview(sealed)) == plaintext


@given(ciphers, st.data())
def test_one_changed_bit_anywhere_is_noticed(cipher: Cipher, data: st.DataObject) -> None:
    associated_data, plaintext = (
        data.draw(st.binary(min_size=1, max_size=20)),
        data.draw(st.binary(max_size=20)),
    )
    sealed = Aead(cipher, KEY).seal(7, associated_data, plaintext)
    whole = bytearray(associated_data + sealed)
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8

    with pytest.raises(AuthError, match="packet 7"):
        Aead(cipher, KEY).open(7, whole[: len(associated_data)], whole[len(associated_data) :])


@given(ciphers, counters, counters)
def test_another_counter_or_another_key_does_not_open(cipher: Cipher, counter: int, other: int) -> None:
    sealed = Aead(cipher, KEY).seal(counter, b"", b"text")

    if other != counter:
        with pytest.raises(AuthError):
            Aead(cipher, KEY).open(other, b"", sealed)
    with pytest.raises(AuthError):
        Aead(cipher, KEY[::-1]).open(counter, b"", sealed)


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("size", [0, 1, TAG_BYTES - 1, TAG_BYTES])
def test_bytes_too_short_for_a_tag_and_tags_of_nothing_are_refused(cipher: Cipher, size: int) -> None:
    with pytest.raises(AuthError):
        Aead(cipher, KEY).open(3, b"", bytes(size))


@given(ciphers, counters, st.binary(max_size=40), st.binary(max_size=80), st.integers(0, 9))
def test_sealing_and_opening_into_a_buffer_gives_the_same_bytes_and_touches_no_others(
    cipher: Cipher, counter: int, associated_data: bytes, plaintext: bytes, offset: int
) -> None:
    aead = Aead(cipher, KEY)
    expected = aead.seal(counter, associated_data, plaintext)
    sealed, opened = bytearray(b"\xdd" * 120), bytearray(b"\xdd" * 120)
    at = slice(offset, offset + len(expected))

    aead.seal_into(counter, associated_data, plaintext, memoryview(sealed)[at])
    end = offset + len(plaintext)
    aead.open_into(counter, associated_data, memoryview(sealed)[at], memoryview(opened)[offset:end])

    assert bytes(sealed) == b"\xdd" * offset + expected + b"\xdd" * (120 - at.stop)
    assert bytes(opened) == b"\xdd" * offset + plaintext + b"\xdd" * (120 - end)


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("size", [0, 1, 64])
def test_a_buffer_that_something_forged_was_opened_into_holds_only_zeros(cipher: Cipher, size: int) -> None:
    aead = Aead(cipher, KEY)
    forged = bytearray(aead.seal(5, b"ad", bytes(range(1, size + 1))))
    forged[-1] ^= 1
    out = bytearray(b"\xdd" * size)

    with pytest.raises(AuthError, match="packet 5"):
        aead.open_into(5, b"ad", forged, memoryview(out))

    assert bytes(out) == bytes(size)


@given(ciphers, counters, st.integers(0, 9100) | st.integers(0, 65_600), st.integers(0, 40))
def test_sealing_in_place_gives_the_same_bytes_as_sealing_elsewhere(
    cipher: Cipher, counter: int, size: int, offset: int
) -> None:
    aead, plaintext = Aead(cipher, KEY), (bytes(range(251)) * 262)[:size]
    memory = memoryview(bytearray(b"\xdd" * offset + plaintext + b"\xdd" * 40))

    aead.seal_into(
        counter, b"header", memory[offset : offset + size], memory[offset : offset + size + TAG_BYTES]
    )

    expected = aead.seal(counter, b"header", plaintext)
    assert memory == b"\xdd" * offset + expected + b"\xdd" * 24


@pytest.mark.parametrize("cipher", Cipher)
def test_every_size_up_to_2000_bytes_is_sealed_in_place_as_elsewhere(cipher: Cipher) -> None:
    """Every number of blocks and every rest, as the vector code of the library treats them apart."""
    aead, plaintext = Aead(cipher, KEY), (bytes(range(251)) * 8)[:2000]
    for size in range(2001):
        memory = memoryview(bytearray(plaintext[:size] + bytes(TAG_BYTES)))

        aead.seal_into(size, b"", memory[:size], memory)

        assert memory == aead.seal(size, b"", plaintext[:size])


@given(ciphers, st.integers(0, 2**64 - 1 - 20), st.lists(st.binary(max_size=60), max_size=20), st.booleans())
def test_many_are_sealed_as_each_of_them_alone_with_the_counters_that_follow(
    cipher: Cipher,
    first: int,
    plaintexts: list[bytes],
    in_place: bool,
) -> None:
    aead = Aead(cipher, KEY)
    outs = [memoryview(bytearray(plaintext + bytes(TAG_BYTES))) for plaintext in plaintexts]
    headers = [bytes([number]) for number in range(len(plaintexts))]

    sources = [out[:-TAG_BYTES] for out in outs] if in_place else plaintexts
    aead.seal_each(first, headers, sources, outs)

    assert outs == [aead.seal(first + at, headers[at], each) for at, each in enumerate(plaintexts)]


def overlapping(
    cipher: Cipher, count: int, size: int, step: int, keep: int
) -> tuple[list[bytes], list[bytes], bytearray, list[memoryview], list[memoryview]]:
    """Packets from counter 7 on: plain, sealed, the memory for them, where in it each belongs, what to keep."""
    aead = Aead(cipher, KEY)
    plain = [bytes((number * 7 + each) % 256 for each in range(size)) for number in range(count)]
    sealed = [aead.seal(7 + number, b"%d" % number, each) for number, each in enumerate(plain)]
    memory = bytearray(b"\xdd" * (count * step + size))
    view = memoryview(memory)
    outs = [view[number * step : number * step + size] for number in range(count)]
    return plain, sealed, memory, outs, [out[:keep] for out in outs]


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("step", [30, 40, 50])
def test_packets_opened_over_each_other_leave_what_was_to_be_kept(cipher: Cipher, step: int) -> None:
    plain, sealed, memory, outs, kept = overlapping(cipher, 5, 40, step, 10)
    data = [b"%d" % number for number in range(5)]

    # From the last to the first: so each overwrites the head of the one behind it.
    found = Aead(cipher, KEY).open_each_into(
        range(11, 6, -1), data[::-1], sealed[::-1], outs[::-1], kept[::-1]
    )

    assert found == [each[:10] for each in plain[::-1]]
    assert bytes(outs[0]) == plain[0]
    assert bytes(memory[5 * step :]) == (plain[4][5 * step - 4 * step :] + b"\xdd" * 40)[:40]


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("forged", range(4))
def test_of_packets_opened_together_the_forged_one_becomes_zeros_and_none_behind_it_is_opened(
    cipher: Cipher, forged: int
) -> None:
    plain, sealed, memory, outs, kept = overlapping(cipher, 4, 40, 40, 10)
    sealed[forged] = sealed[forged][:-1] + bytes([sealed[forged][-1] ^ 1])

    with pytest.raises(AuthError, match=f"packet {forged} of a batch"):
        Aead(cipher, KEY).open_each_into(range(7, 11), [b"0", b"1", b"2", b"3"], sealed, outs, kept)

    untouched = b"\xdd" * (40 * (3 - forged) + 40)
    assert bytes(memory) == b"".join(plain[:forged]) + bytes(40) + untouched
