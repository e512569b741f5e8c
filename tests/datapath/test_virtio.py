"""The header of superpackets: what fits its packet is understood, everything else is one kind of error."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.datapath.virtio import HEADER_BYTES, PLAIN, GsoType, OffloadError, VirtioHeader
from tests.datapath.superpackets import A4, A6, B4, B6, TIMESTAMPS, Plan, plans
from tests.support import packets
from tests.support.packets import ACK, CWR, TCP, UDP

LAYOUT = struct.Struct("=BBHHHH")
TCP4 = Plan(4, TCP, bytes(5000), 1248, options=TIMESTAMPS)
TCP6 = Plan(6, TCP, bytes(5000), 1228, options=TIMESTAMPS)
UDP4 = Plan(4, UDP, bytes(5000), 1200)
UDP6 = Plan(6, UDP, bytes(5000), 1200)


def header(
    *, flags: int = 1, kind: int = 1, hdr_len: int = 52, size: int = 1248, start: int = 20, offset: int = 16
) -> bytes:
    """By default that of `TCP4`."""
    return LAYOUT.pack(flags, kind, hdr_len, size, start, offset)


@given(plans())
def test_the_header_of_a_superpacket_is_understood_and_spelled_the_same(plan: Plan) -> None:
    raw = plan.virtio()

    found = VirtioHeader.parse(raw, plan.packet())

    assert found == (
        plan.gso,
        bool(raw[1] & 0x80),
        True,
        plan.header_bytes,
        plan.size,
        *LAYOUT.unpack(raw)[4:],
    )
    assert found.encode() == raw


@given(plans(), st.integers(0, 65535))
def test_the_kernels_word_on_the_length_of_headers_is_not_believed(plan: Plan, hdr_len: int) -> None:
    found = VirtioHeader.parse(plan.virtio(hdr_len), plan.packet())

    assert found.header_bytes == plan.header_bytes


@given(plans(), st.data())
def test_the_headers_are_all_that_must_be_there_in_one_piece(plan: Plan, data: st.DataObject) -> None:
    packet = plan.packet()
    size = data.draw(st.integers(0, plan.header_bytes - 1))
    with pytest.raises(OffloadError):
        VirtioHeader.parse(plan.virtio(), packet[:size], len(packet))

    beginning = VirtioHeader.parse(plan.virtio(), packet[: plan.header_bytes], len(packet))

    assert beginning == VirtioHeader.parse(plan.virtio(), memoryview(packet))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(bytes(10), id="nothing to do"),
        pytest.param(header(flags=2, kind=0, size=7), id="checksum verified by the kernel"),
        pytest.param(header(flags=0, kind=0), id="fields without a meaning"),
    ],
)
def test_a_packet_that_is_complete_is_plain(raw: bytes) -> None:
    assert VirtioHeader.parse(raw, TCP4.packet()) is PLAIN
    assert VirtioHeader.parse(raw, b"") is PLAIN
    assert PLAIN.encode() == bytes(HEADER_BYTES)


@pytest.mark.parametrize("flags", [1, 3])
def test_a_single_packet_may_need_its_checksum(flags: int) -> None:
    found = VirtioHeader.parse(header(flags=flags, kind=0, hdr_len=9, size=9), TCP4.packet())

    assert found == (GsoType.NONE, False, True, 0, 0, 20, 16)
    assert found.encode() == header(kind=0, hdr_len=0, size=0)


FRAGMENT = packets.ipv4(A4, B4, TCP, packets.tcp(A4, B4, 1, 2, bytes(3000)), flags_and_offset=0x2000)
SHORT_IHL = b"\x44" + TCP4.packet()[1:]
SHORT_TCP = bytes(TCP4.packet()[:32]) + b"\x40" + bytes(TCP4.packet()[33:])
LONG_TCP = packets.ipv4(A4, B4, TCP, packets.tcp(A4, B4, 1, 2)[:12] + b"\xf0" + bytes(8))
IPV6_FRAGMENT = packets.ipv6(
    A6,
    B6,
    packets.FRAGMENT,
    packets.fragment_header(TCP, 0, packets.tcp(A6, B6, 1, 2, bytes(3000)), more=True, identification=1),
)
ENDLESS = packets.ipv6(A6, B6, 60, b"\x3c\x00" + bytes(6) + (b"\x3c\x00" + bytes(6)) * 30)


@pytest.mark.parametrize(
    ("raw", "packet"),
    [
        pytest.param(b"", TCP4.packet(), id="no header"),
        pytest.param(header()[:9], TCP4.packet(), id="header cut short"),
        pytest.param(header() + b"\0", TCP4.packet(), id="header too long"),
        pytest.param(header(flags=5), TCP4.packet(), id="flag of another kind of device"),
        pytest.param(header(flags=0x81), TCP4.packet(), id="unknown flag"),
        pytest.param(header(flags=0), TCP4.packet(), id="superpacket without a checksum to complete"),
        pytest.param(header(flags=2), TCP4.packet(), id="superpacket with a complete checksum"),
        pytest.param(header(kind=2), TCP4.packet(), id="type 2"),
        pytest.param(header(kind=3), UDP4.packet(), id="UFO"),
        pytest.param(header(kind=0x80), TCP4.packet(), id="ECN of nothing"),
        pytest.param(header(kind=0x85, offset=6), UDP4.packet(), id="ECN of UDP"),
        pytest.param(header(size=0), TCP4.packet(), id="segments of no size"),
        pytest.param(header(), b"", id="no packet"),
        pytest.param(header(), TCP6.packet(), id="TCP4 before IPv6"),
        pytest.param(header(kind=4, start=40), TCP4.packet(), id="TCP6 before IPv4"),
        pytest.param(header(), UDP4.packet(), id="TCP before UDP"),
        pytest.param(header(kind=5), TCP4.packet(), id="UDP before TCP"),
        pytest.param(header(kind=5, offset=6), b"\x75" + UDP4.packet()[1:], id="version 7"),
        pytest.param(header(start=24), TCP4.packet(), id="checksum from another place"),
        pytest.param(header(start=0xFFFF), TCP4.packet(), id="checksum from outside"),
        pytest.param(header(offset=6), TCP4.packet(), id="checksum to another place"),
        pytest.param(header(offset=0xFFFF), TCP4.packet(), id="checksum to outside"),
        pytest.param(header(kind=0, start=0xFFFF), TCP4.packet(), id="single: checksum from outside"),
        pytest.param(header(kind=0, start=40, offset=0), TCP4.packet()[:41], id="single: half a field"),
        pytest.param(header(kind=0, start=0), TCP4.packet(), id="single: checksum over the IP header"),
        pytest.param(header(start=16), SHORT_IHL, id="IPv4 header too short"),
        pytest.param(header(), SHORT_TCP, id="TCP header too short"),
        pytest.param(header(), LONG_TCP, id="TCP header longer than the packet"),
        pytest.param(header(), FRAGMENT, id="fragment"),
        pytest.param(header(kind=4, start=48), IPV6_FRAGMENT, id="IPv6 fragment"),
        pytest.param(header(kind=4, start=40 + 8 * 31), ENDLESS, id="endless chain of headers"),
        pytest.param(header(), TCP4.packet() + bytes(61_000), id="longer than IPv4 can say"),
    ],
)
def test_what_is_unknown_or_contradicts_the_packet_is_refused(raw: bytes, packet: bytes) -> None:
    with pytest.raises(OffloadError):
        VirtioHeader.parse(raw, packet)


def test_an_ipv6_packet_may_be_longer_than_an_ipv4_one_by_its_header() -> None:
    plan = Plan(6, TCP, bytes(0xFFFF - 20), 1000)

    assert len(plan.packet()) == 0xFFFF + 40
    assert VirtioHeader.parse(plan.virtio(), plan.packet()).gso is GsoType.TCP6
    with pytest.raises(OffloadError):
        VirtioHeader.parse(plan.virtio(), plan.packet() + b"\0")


def test_any_header_before_any_packet_is_consistent_or_an_offload_error() -> None:
    dice = random.Random(1)
    plans_ = [TCP4, TCP6, UDP4, UDP6, Plan(4, TCP, bytes(90), 30, flags=ACK | CWR)]
    plans_.append(Plan(6, UDP, bytes(90), 30, extensions=b"\x1e\x02ab"))
    good = [(plan.virtio(), plan.packet()[:300]) for plan in plans_]
    refused, kinds = 0, set()
    for _ in range(60_000):
        raw, packet = map(bytearray, dice.choice(good))
        raw[dice.randrange(10)] = dice.choice((0, 1, 4, 5, 6, 16, 20, 40, 255, dice.randrange(256)))
        for _ in range(dice.randrange(3)):
            packet[dice.randrange(60)] = dice.randrange(256)
        if dice.random() < 0.2:
            del packet[dice.randrange(len(packet)) :]
        try:
            found = VirtioHeader.parse(raw, packet)
        except OffloadError:
            refused += 1
            continue
        kinds.add(found.gso)
        assert 0 <= found.header_bytes <= len(packet)
        assert (found.gso is GsoType.NONE) == (found.segment_bytes == 0) == (found.header_bytes == 0)
        if found.needs_checksum:
            assert found.checksum_start + found.checksum_offset + 2 <= len(packet)
        assert VirtioHeader.parse(found.encode(), packet) == found
    assert 10_000 < refused < 50_000
    assert kinds == set(GsoType)
