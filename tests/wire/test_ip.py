"""Inner packets become flow keys, or a WireError."""

import random
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.errors import TruncatedError, UnknownTypeError, WireError
from nebula_mp.newtypes import IPAddress
from nebula_mp.wire import ip
from nebula_mp.wire.ip import FlowKey, destination, internet_checksum, parse_flow, upper_protocol
from tests.support import packets
from tests.support.vectors import load

A4, B4 = ip_address("10.1.0.1"), ip_address("10.1.0.2")
A6, B6 = ip_address("fd00::1"), ip_address("fd00::2")
VALID = packets.raw_packets(A4, B4, 1, 200) + packets.raw_packets(A6, B6, 1, 200, unclassified=True)
WALKS = [pytest.param(case, id=case["name"]) for case in load("reject") if "v6" in case]


def udp_in(version: int, *, payload: bytes = b"data") -> bytes:
    source, to = (A4, B4) if version == 4 else (A6, B6)
    return packets.ip(source, to, packets.UDP, packets.udp(source, to, 1000, 53, payload))


def behind(next_header: int, chain: bytes) -> bytes:
    return packets.ipv6(A6, B6, next_header, chain)


@pytest.mark.parametrize("case", WALKS)
def test_the_ipv6_header_walk_ends_where_nebulas_does(case: dict[str, object]) -> None:
    packet = bytes.fromhex(str(case["packet"]))
    expected = case["v6"]
    assert isinstance(expected, dict)

    protocol, offset, fragment = upper_protocol(packet)

    assert expected["error"] == "<nil>"
    assert (protocol, offset, fragment) == (
        expected["protocol"],
        expected["offset"],
        expected["non_first_fragment"],
    )
    assert parse_flow(packet, inbound=True)[4:] == (protocol, fragment)


@pytest.mark.parametrize(
    ("packet", "ports", "protocol"),
    [
        pytest.param(udp_in(4), (1000, 53), 17, id="udp over ipv4"),
        pytest.param(udp_in(6), (1000, 53), 17, id="udp over ipv6"),
        pytest.param(
            packets.ipv4(A4, B4, 6, packets.tcp(A4, B4, 5, 6), options=b"\x07\x07\x04" + bytes(4)),
            (5, 6),
            6,
            id="tcp behind ipv4 options",
        ),
        pytest.param(
            packets.ipv4(A4, B4, 132, packets.sctp(7, 8, 0, b"")), (7, 8), 132, id="sctp over ipv4 has ports"
        ),
        pytest.param(
            packets.ipv4(A4, B4, 50, packets.esp(0x00010002, 0, b"")),
            (1, 2),
            50,
            id="any protocol over ipv4 has",
        ),
        pytest.param(behind(132, packets.sctp(7, 8, 0, b"")), (0, 0), 132, id="sctp over ipv6 has no ports"),
        pytest.param(behind(59, b""), (0, 0), 59, id="no next header"),
        pytest.param(behind(50, b""), (0, 0), 50, id="an upper header may be cut short if nothing is read"),
        pytest.param(
            packets.ipv4(A4, B4, 17, packets.udp(A4, B4, 1, 2), flags_and_offset=0x2000),
            (1, 2),
            17,
            id="a first fragment has ports",
        ),
        pytest.param(
            behind(
                44, packets.fragment_header(17, 0, packets.udp(A6, B6, 1, 2), more=True, identification=9)
            ),
            (1, 2),
            17,
            id="a first ipv6 fragment has ports",
        ),
        pytest.param(
            behind(
                0,
                packets.options_header(
                    43,
                    b"",
                    packets.routing_header(
                        60,
                        4,
                        bytes(12),
                        packets.options_header(
                            51, b"", packets.authentication(6, 1, 1, bytes(12), packets.tcp(A6, B6, 3, 4))
                        ),
                    ),
                ),
            ),
            (3, 4),
            6,
            id="tcp behind four extension headers",
        ),
    ],
)
def test_ports_are_local_first_whichever_way_the_packet_goes(
    packet: bytes, ports: tuple[int, int], protocol: int
) -> None:
    source, to = (A4, B4) if packet[0] >> 4 == 4 else (A6, B6)

    outbound = parse_flow(packet, inbound=False)
    inbound = parse_flow(packet, inbound=True)

    assert outbound == FlowKey(source.packed, to.packed, *ports, protocol, fragment=False)
    assert inbound == FlowKey(to.packed, source.packed, *ports[::-1], protocol, fragment=False)
    assert type(outbound) is FlowKey


@pytest.mark.parametrize(("here", "there"), [(A4, B4), (A6, B6)])
def test_an_echo_request_and_its_reply_have_one_key(here: IPAddress, there: IPAddress) -> None:
    request = packets.echo(here, there, 0x1234, 1)
    reply = packets.echo(there, here, 0x1234, 1, reply=True)

    key = parse_flow(request, inbound=False)

    assert key == parse_flow(reply, inbound=True)
    assert (key.local_port, key.remote_port) == (0, 0x1234)


def test_every_icmp_type_over_ipv4_has_an_identifier_but_over_ipv6_only_echo() -> None:
    body = b"\x12\x34" + bytes(34)

    four = parse_flow(packets.ipv4(A4, B4, 1, packets.icmp(3, 1, body)), inbound=True)
    six = parse_flow(behind(58, packets.icmpv6(A6, B6, 1, 1, body)), inbound=True)

    assert (four.local_port, four.remote_port) == (0, 0x1234)
    assert (six.local_port, six.remote_port) == (0, 0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_a_later_fragment_has_no_ports_whatever_its_size(version: int, last: bool) -> None:
    source, to = (A4, B4) if version == 4 else (A6, B6)
    cut = packets.ipv4_fragments if version == 4 else packets.ipv6_fragments
    made = cut(source, to, packets.UDP, packets.udp(source, to, 9, 9, bytes(41)), 24, identification=1)

    packet = made[-1 if last else 1]

    for inbound in (False, True):
        key = parse_flow(packet, inbound=inbound)
        assert key[2:] == (0, 0, packets.UDP, True)
    empty = packet[: 20 if version == 4 else 48]
    assert parse_flow(empty, inbound=True).fragment


def test_the_protocol_of_a_later_ipv6_fragment_is_the_one_its_header_names() -> None:
    chain = packets.fragment_header(60, 8, b"", more=False, identification=1)

    assert parse_flow(behind(44, chain), inbound=True)[4:] == (60, True)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(udp_in(4)[:19], id="ipv4 header cut"),
        pytest.param(udp_in(4)[:23], id="ipv4 ports cut"),
        pytest.param(packets.ipv4(A4, B4, 1, packets.icmp(8, 0, b"\x01")), id="icmp identifier cut"),
        pytest.param(b"\x46" + udp_in(4, payload=b"")[1:24], id="ipv4 options cover the ports"),
        pytest.param(b"\x4f" + udp_in(4, payload=b"")[1:], id="ipv4 options beyond the end"),
        pytest.param(udp_in(6)[:39], id="ipv6 header cut"),
        pytest.param(udp_in(6)[:43], id="ipv6 ports cut"),
        pytest.param(behind(58, b"\x80\x00\x00\x00\x01"), id="echo identifier cut"),
        pytest.param(behind(58, b"\x01\x00\x00"), id="icmpv6 cut"),
        pytest.param(behind(58, b""), id="icmpv6 missing"),
        pytest.param(behind(0, b"\x11"), id="hop-by-hop header cut"),
        pytest.param(behind(51, b""), id="authentication header missing"),
        pytest.param(behind(51, b"\x11"), id="authentication header cut"),
        pytest.param(behind(44, bytes(7)), id="fragment header cut"),
        pytest.param(behind(44, b"\x11\x00\x00\x08\x00\x00\x00"), id="later fragment's header cut"),
        pytest.param(behind(60, b"\x32\x01" + bytes(6)), id="extension header longer than the packet"),
        pytest.param(behind(51, b"\x3b\xff" + bytes(6)), id="authentication header longer than the packet"),
    ],
)
def test_a_packet_that_ends_too_early_is_truncated(packet: bytes) -> None:
    for inbound in (False, True):
        with pytest.raises(TruncatedError):
            parse_flow(packet, inbound=inbound)


@pytest.mark.parametrize("version", [0, 1, 3, 5, 7, 15])
def test_another_ip_version_is_not_known(version: int) -> None:
    packet = bytes([version << 4 | 5]) + bytes(63)

    with pytest.raises(UnknownTypeError, match=f"version {version} "):
        parse_flow(packet, inbound=True)
    with pytest.raises(UnknownTypeError, match=f"version {version} "):
        destination(packet)


@pytest.mark.parametrize("words", range(5))
def test_an_ipv4_header_below_20_bytes_is_refused(words: int) -> None:
    packet = bytes([0x40 | words]) + udp_in(4)[1:]

    with pytest.raises(WireError, match="header length"):
        parse_flow(packet, inbound=True)


def test_eight_extension_headers_are_walked_and_nine_are_refused() -> None:
    chain = packets.udp(A6, B6, 1, 2)
    protocol = packets.UDP
    for _ in range(8):
        chain = packets.options_header(protocol, b"", chain)
        protocol = packets.DESTINATION_OPTIONS

    assert parse_flow(behind(protocol, chain), inbound=False)[2:5] == (1, 2, packets.UDP)
    with pytest.raises(WireError, match="more than 8"):
        parse_flow(behind(protocol, packets.options_header(protocol, b"", chain)), inbound=False)


@pytest.mark.parametrize("packet", VALID)
def test_the_fast_path_agrees_with_the_whole_parser(packet: bytes) -> None:
    whole = ip._parse_ipv4 if packet[0] >> 4 == 4 else ip._parse_ipv6

    for inbound in (False, True):
        assert parse_flow(packet, inbound=inbound) == whole(packet, inbound=inbound)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_buffer_gives_the_same_key_and_nothing_of_it_is_borrowed(
    kind: type[bytearray] | type[memoryview],
) -> None:
    for packet in VALID:
        key = parse_flow(kind(packet), inbound=True)

        assert key == parse_flow(packet, inbound=True)
        assert (type(key.local), type(key.remote)) == (bytes, bytes)
        assert type(destination(kind(packet))) is bytes


def test_the_destination_is_the_remote_address_of_an_outbound_packet() -> None:
    for packet in VALID:
        assert destination(packet) == parse_flow(packet, inbound=False).remote


def test_the_fixed_header_alone_has_a_destination() -> None:
    assert destination(udp_in(4)[:20]) == B4.packed
    assert destination(udp_in(6)[:40]) == B6.packed


@pytest.mark.parametrize("packet", [b"", b"\x45", udp_in(4)[:19], udp_in(6)[:39], b"\x60"])
def test_the_destination_needs_the_fixed_header(packet: bytes) -> None:
    with pytest.raises(TruncatedError):
        destination(packet)


@given(st.binary(max_size=120), st.sampled_from([None, 0x45, 0x46, 0x4F, 0x60]), st.booleans())
def test_any_bytes_are_a_flow_or_a_wire_error(data: bytes, first: int | None, inbound: bool) -> None:
    packet = data if first is None else bytes([first]) + data
    try:
        key = parse_flow(packet, inbound=inbound)
    except WireError:
        return
    assert len(key.local) == len(key.remote) == (4 if packet[0] >> 4 == 4 else 16)
    assert 0 <= key.local_port <= 65535
    assert 0 <= key.remote_port <= 65535
    assert not key.fragment or key.local_port == key.remote_port == 0


@given(st.randoms(use_true_random=False))
def test_a_damaged_packet_is_a_flow_or_a_wire_error(dice: random.Random) -> None:
    packet = bytearray(dice.choice(VALID))
    for _ in range(dice.randrange(4)):
        packet[dice.randrange(min(len(packet), 80))] = dice.randrange(256)
    del packet[dice.randrange(len(packet) + 1) :]
    for inbound in (False, True):
        try:
            key = parse_flow(packet, inbound=inbound)
        except WireError:
            continue
        assert key.remote == bytes(packet[12:16] if inbound else packet[16:20]) or packet[0] >> 4 == 6


@given(st.binary(max_size=70))
def test_the_checksum_is_that_of_adding_the_words(data: bytes) -> None:
    assert internet_checksum(data) == packets.checksum(data)


@given(st.integers(0, 40), st.sampled_from([b"\x00", b"\xff"]))
def test_the_checksum_tells_the_two_zeros_apart(count: int, value: bytes) -> None:
    assert internet_checksum(value * count) == packets.checksum(value * count)
