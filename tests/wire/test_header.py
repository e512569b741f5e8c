import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nebula_mp.errors import TruncatedError, UnknownTypeError, WireError
from nebula_mp.newtypes import Counter, TunnelIndex
from nebula_mp.wire.header import HEADER_BYTES, SUBTYPES, Header, MessageType
from tests.support import vectors
from tests.support.vectors import Vector

# The table of docs/wire-format.md, written a second time.
PAIRS = {(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (4, 1), (5, 0), (6, 0)}

headers = st.sampled_from(sorted(PAIRS)).flatmap(
    lambda pair: st.builds(
        Header,
        st.just(MessageType(pair[0])),
        st.just(pair[1]),
        st.integers(0, 2**32 - 1).map(TunnelIndex),
        st.integers(0, 2**64 - 1).map(Counter),
    )
)


@pytest.mark.parametrize("handshake", vectors.load("handshake"), ids=lambda each: each["name"])
def test_headers_of_real_packets_are_read_and_written_byte_for_byte(handshake: Vector) -> None:
    for packet in handshake["packets"]:
        raw = bytes.fromhex(packet["packet"])

        header = Header.parse(raw)

        assert header == Header(
            MessageType(packet["type"]),
            packet["subtype"],
            TunnelIndex(packet["remote_index"]),
            Counter(int(packet["counter"])),
        )
        assert header.encode() == raw[:HEADER_BYTES]


@pytest.mark.parametrize("handshake", vectors.load("handshake"), ids=lambda each: each["name"])
def test_message_1_has_index_0_and_counter_1_and_message_2_the_initiators_index_and_counter_2(
    handshake: Vector,
) -> None:
    initiator_index = TunnelIndex(handshake["initiator"]["local_index"])

    first = Header.parse(bytes.fromhex(handshake["message1"]))
    second = Header.parse(bytes.fromhex(handshake["message2"]))

    assert first == Header(MessageType.HANDSHAKE, 0, TunnelIndex(0), Counter(1))
    assert second == Header(MessageType.HANDSHAKE, 0, initiator_index, Counter(2))


@pytest.mark.parametrize("handshake", vectors.load("handshake"), ids=lambda each: each["name"])
def test_a_recv_error_is_a_bare_header_with_the_unknown_index_and_counter_0(handshake: Vector) -> None:
    index = TunnelIndex(handshake["responder"]["local_index"])

    raw = Header(MessageType.RECV_ERROR, 0, index, Counter(0)).encode()

    assert raw == bytes.fromhex(handshake["recv_error"])
    assert Header.parse(raw) == Header(MessageType.RECV_ERROR, 0, index, Counter(0))


def test_the_layout_is_big_endian_with_version_and_type_in_one_byte() -> None:
    raw = bytes.fromhex("14 01 0000 01020304 05060708090a0b0c")

    assert Header.parse(raw) == Header(
        MessageType.TEST, 1, TunnelIndex(0x01020304), Counter(0x05060708090A0B0C)
    )


def test_exactly_the_listed_types_and_subtypes_of_version_1_are_known() -> None:
    accepted = set()
    for first in range(256):
        for subtype in range(256):
            try:
                header = Header.parse(bytes([first, subtype]) + bytes(14))
            except UnknownTypeError:
                continue
            accepted.add((first >> 4, int(header.type), header.subtype))

    assert accepted == {(1, *pair) for pair in PAIRS}
    assert {(int(kind), each) for kind, subtypes in SUBTYPES.items() for each in subtypes} == PAIRS


@pytest.mark.parametrize(
    ("packet", "error", "text"),
    [
        pytest.param(b"", TruncatedError, "need 16 bytes, got 0", id="empty"),
        pytest.param(b"\x01", TruncatedError, "got 1", id="hole punch"),
        pytest.param(b"\x11" + bytes(14), TruncatedError, "got 15", id="one byte short"),
        pytest.param(b"\x01" + bytes(15), UnknownTypeError, "version 0 type 1 subtype 0", id="version 0"),
        pytest.param(b"\x21" + bytes(15), UnknownTypeError, "version 2 type 1 subtype 0", id="version 2"),
        pytest.param(b"\x17" + bytes(15), UnknownTypeError, "version 1 type 7 subtype 0", id="type 7"),
        pytest.param(b"\x10\x01" + bytes(14), UnknownTypeError, "type 0 subtype 1", id="handshake xx"),
        pytest.param(b"\x11\x02" + bytes(14), UnknownTypeError, "type 1 subtype 2", id="message subtype 2"),
    ],
)
def test_other_packets_are_refused_and_the_error_says_why(
    packet: bytes, error: type[WireError], text: str
) -> None:
    with pytest.raises(error, match=text):
        Header.parse(packet)


@given(headers, st.binary(max_size=40))
def test_what_was_encoded_is_parsed_again_whatever_follows_it(header: Header, body: bytes) -> None:
    raw = header.encode()

    assert len(raw) == HEADER_BYTES
    assert Header.parse(raw + body) == header
    assert Header.parse(memoryview(bytearray(raw + body))) == header


@given(headers, st.integers(0, 0xFFFF))
def test_reserved_bytes_are_ignored(header: Header, reserved: int) -> None:
    raw = header.encode()

    assert raw[2:4] == b"\0\0"
    assert Header.parse(raw[:2] + struct.pack("!H", reserved) + raw[4:]) == header


@given(st.binary(max_size=64))
@example(b"\xff" * 16)
def test_any_bytes_parse_or_raise_a_wire_error(packet: bytes) -> None:
    try:
        header = Header.parse(packet)
    except WireError:
        return

    assert header.encode()[:2] == packet[:2]
    assert header.encode()[4:] == packet[4:16]
