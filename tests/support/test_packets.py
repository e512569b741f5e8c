"""The packets that other tests send are what they claim to be."""

import struct
from ipaddress import ip_address

import pytest

from nebula_mp.newtypes import IPAddress
from tests.support import packets
from tests.support.packets import AH, FRAGMENT, HOP_BY_HOP, IP_IN_IP, IPV6_IN_IP, NO_NEXT_HEADER
from tests.support.vectors import load

V4 = ip_address("10.1.0.1"), ip_address("10.1.0.2")
V6 = ip_address("fd00::1"), ip_address("fd00::2")
FAMILIES = pytest.mark.parametrize("pair", [pytest.param(V4, id="ipv4"), pytest.param(V6, id="ipv6")])


def test_the_checksums_are_those_of_the_rfcs() -> None:
    assert packets.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert packets.crc32c(b"123456789") == 0xE3069283


def vector(name: str) -> tuple[bytes, bytes]:
    (case,) = [case for case in load("reject") if case["name"] == name]
    return bytes.fromhex(case["packet"]), bytes.fromhex(case["reject"])


def test_packets_are_byte_for_byte_those_of_nebula() -> None:
    here, there = ip_address("10.42.0.2"), ip_address("10.42.0.1")
    here6, there6 = ip_address("fd00:42::2"), ip_address("fd00:42::1")
    denied, unreachable = vector("ipv4 udp")
    _, reset = vector("ipv4 tcp ack data")
    denied6, unreachable6 = vector("ipv6 udp")

    icmp = packets.icmp(3, 13, bytes(4) + denied[:28])
    tcp = packets.tcp(here, there, 80, 12345, sequence=1000, flags=packets.RST, window=0)
    icmpv6 = packets.icmpv6(here6, there6, 1, 1, bytes(4) + denied6)

    assert packets.ipv4(here, there, packets.ICMP, icmp, identification=0) == unreachable
    assert packets.ipv4(here, there, packets.TCP, tcp, identification=0) == reset
    assert packets.ipv6(here6, there6, packets.ICMPV6, icmpv6) == unreachable6


@FAMILIES
@pytest.mark.parametrize("seed", range(5))
def test_raw_packets_are_different_deterministic_and_fit_the_mtu(
    pair: tuple[IPAddress, IPAddress], seed: int
) -> None:
    made = packets.raw_packets(*pair, seed, 400, unclassified=True)

    assert len(set(made)) == 400
    assert made == packets.raw_packets(*pair, seed, 400, unclassified=True)
    assert made != packets.raw_packets(*pair, seed + 1, 400, unclassified=True)
    assert max(map(len, made)) > 1200
    assert all(len(packet) <= packets.MTU_BYTES for packet in made)


@FAMILIES
@pytest.mark.parametrize("seed", range(5))
def test_raw_packets_have_right_lengths_checksums_and_a_ttl(
    pair: tuple[IPAddress, IPAddress], seed: int
) -> None:
    for packet in packets.raw_packets(*pair, seed, 400, unclassified=True):
        if packet[0] >> 4 == 4:
            total, identification = struct.unpack_from("!HH", packet, 2)
            header_bytes = (packet[0] & 15) * 4
            assert total == len(packet)
            assert identification != 0
            assert packet[8] > 1
            assert packets.checksum(packet[:header_bytes]) == 0
            protocol, payload, addresses = packet[9], packet[header_bytes:], packet[12:20]
            if int.from_bytes(packet[6:8], "big") & 0x3FFF:
                continue  # a fragment has no checksum of its own
        else:
            assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
            assert packet[7] > 1
            protocol, payload, addresses = packet[6], packet[40:], packet[8:40]
        assert addresses == pair[0].packed + pair[1].packed
        match protocol:
            case packets.TCP | packets.UDP | packets.ICMPV6:
                if protocol == packets.UDP and payload[6:8] == bytes(2):
                    continue
                pseudo = addresses + struct.pack("!II", len(payload), protocol)
                assert packets.checksum(pseudo + payload) == 0
            case packets.ICMP:
                assert packets.checksum(payload) == 0
            case packets.SCTP:
                unsummed = payload[:8] + bytes(4) + payload[12:]
                assert struct.unpack_from("<I", payload, 8)[0] == packets.crc32c(unsummed)
            case packets.GRE if payload[0] & 0x80:
                assert packets.checksum(payload) == 0


def test_raw_packets_are_of_many_kinds() -> None:
    four = packets.raw_packets(*V4, 1, 400)
    six = packets.raw_packets(*V6, 1, 400, unclassified=True)
    safe = packets.raw_packets(*V6, 1, 400)

    protocols = {packet[9] for packet in four}
    assert protocols >= {packets.ICMP, packets.TCP, packets.UDP, packets.SCTP, packets.GRE, packets.ESP, AH}
    assert protocols >= {IP_IN_IP, IPV6_IN_IP}
    assert len(protocols) > 15
    assert len({packet[20] for packet in four if packet[0] != 0x45}) > 5  # IP options
    assert any(packet[6] & 0x20 for packet in four)
    assert any(int.from_bytes(packet[6:8], "big") & 0x1FFF for packet in four)
    tcp = [packet for packet in four if packet[0] == 0x45 and packet[9] == packets.TCP and len(packet) > 33]
    assert len({packet[33] for packet in tcp}) > 10  # flags
    next_headers = {packet[6] for packet in six}
    assert next_headers >= {HOP_BY_HOP, FRAGMENT, packets.ROUTING, packets.DESTINATION_OPTIONS, AH}
    assert next_headers >= {packets.SCTP, packets.GRE, NO_NEXT_HEADER, packets.ESP, packets.ICMPV6}
    assert not {packet[6] for packet in safe} & {packets.SCTP, packets.GRE, IP_IN_IP, IPV6_IN_IP}


@pytest.mark.parametrize("cut", [packets.ipv4_fragments, packets.ipv6_fragments])
def test_fragments_hold_the_whole_payload_once(cut: object) -> None:
    payload = bytes(range(250)) * 4
    pair = V4 if cut is packets.ipv4_fragments else V6
    assert callable(cut)

    made = cut(*pair, packets.UDP, payload, 256, identification=7)

    header_bytes = 20 if pair is V4 else 48
    assert b"".join(packet[header_bytes:] for packet in made) == payload
    if pair is V4:
        fields = [int.from_bytes(packet[6:8], "big") for packet in made]
        assert fields == [0x2000, 0x2000 | 32, 0x2000 | 64, 96]
    else:
        fields = [int.from_bytes(packet[42:44], "big") for packet in made]
        assert fields == [1, 257, 513, 768]
