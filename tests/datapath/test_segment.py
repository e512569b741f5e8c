"""Superpackets cut into packets: against packets built one by one, and against what the kernel itself cuts.

Data flow: a TUN with offloads -> kernel, which forwards -> a TUN without: there it has to cut by itself
"""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.datapath.segment import Cut, Slots, segment
from nebula_mp.datapath.virtio import PLAIN, GsoType, OffloadError, VirtioHeader
from nebula_mp.wire.ip import parse_flow
from tests.datapath.superpackets import A4, B4, TIMESTAMPS, UDP_L4, Plan, plans
from tests.support import packets
from tests.support.offload_tun import EVERYTHING, OffloadTun, forwarding_kernel, offload_tun
from tests.support.packets import ACK, CWR, ECE, FIN, PSH, TCP, UDP
from tests.support.private_net import private_network


def cut(plan: Plan) -> list[bytes]:
    """What the program makes of a superpacket."""
    packet = plan.packet()
    return segment(VirtioHeader.parse(plan.virtio(), packet), packet)


@given(plans())
def test_each_segment_is_the_packet_that_would_have_been_sent_alone(plan: Plan) -> None:
    assert cut(plan) == plan.packets()


@pytest.mark.parametrize("size", [36, 88, 536, 1248])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_the_largest_superpackets_are_cut_at_any_segment_size(protocol: int, version: int, size: int) -> None:
    plan = Plan(version, protocol, random.Random(size).randbytes(65_400), size, flags=ACK | PSH | FIN)

    found = cut(plan)

    assert found == plan.packets()
    assert len(found) == -(-65_400 // size)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("length", [0, 1, 99, 100])
def test_a_superpacket_of_one_segment_is_complete_afterwards(protocol: int, length: int) -> None:
    plan = Plan(4, protocol, bytes(range(length)), 100, flags=ACK | CWR | PSH | FIN)

    assert cut(plan) == plan.packets()
    assert len(cut(plan)) == 1


def test_cwr_is_on_the_first_segment_only_and_psh_and_fin_on_the_last() -> None:
    found = cut(Plan(4, TCP, bytes(400), 100, flags=ACK | ECE | CWR | PSH | FIN))

    assert [packet[33] for packet in found] == [ACK | ECE | CWR, ACK | ECE, ACK | ECE, ACK | ECE | PSH | FIN]


def test_a_udp_checksum_of_zero_is_written_as_all_ones() -> None:
    """Packets that differ in two bytes only, and have every value there: one of them would get a 0."""
    checksums = []
    for first in range(0, 1 << 16, 1 << 14):
        pieces = [number.to_bytes(2, "big") for number in range(first, first + (1 << 14))]
        checksums += [packet[26:28] for packet in cut(Plan(4, UDP, b"".join(pieces), 2))]

    assert set(checksums) == {number.to_bytes(2, "big") for number in range(1, 1 << 16)}


@given(plans(), st.integers(1, 40), st.integers(0, 60), st.binary(min_size=1, max_size=1))
def test_packets_are_placed_and_stamped_in_parts_at_any_stride_and_nothing_else_is_touched(
    plan: Plan, part: int, gap: int, fill: bytes
) -> None:
    packet = plan.packet()
    work = Cut(VirtioHeader.parse(plan.virtio(), packet), packet[: plan.header_bytes], len(packet))
    stride = work.segment_bytes + gap
    expected = plan.packets()

    for first in range(0, work.count, part):
        count = min(part, work.count - first)
        size = (count - 1) * stride + work.segment_size(first + count - 1)
        # Exactly as much memory as the packets need, with a byte on each side that stays.
        memory = bytearray(fill * (size + 2))
        out = memoryview(memory)[1:-1]
        slots = Slots(work.layout, out, stride)
        work.place(packet, slots, 0, first, count)
        work.stamp(slots, 0, first, count)
        wanted = bytearray(fill * len(memory))
        for number in range(count):
            at = 1 + number * stride
            wanted[at : at + len(expected[first + number])] = expected[first + number]
        assert memory == wanted


@given(plans())
def test_payload_that_was_read_to_its_place_needs_only_the_headers(plan: Plan) -> None:
    packet = plan.packet()
    work = Cut(VirtioHeader.parse(plan.virtio(), packet), packet)
    out = bytearray(work.count * work.segment_bytes)
    for number in range(work.count):
        at = number * work.segment_bytes + work.header_bytes
        payload = plan.payload[number * plan.size : (number + 1) * plan.size]
        out[at : at + len(payload)] = payload

    work.stamp(Slots(work.layout, memoryview(out), work.segment_bytes))

    assert bytes(out).startswith(b"".join(plan.packets()))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("length", [0, 1, 2, 1001])
def test_a_single_packet_gets_its_checksum(version: int, protocol: int, length: int) -> None:
    plan = Plan(version, protocol, bytes(range(256)) * 4, 5000)
    plan = replace(plan, payload=plan.payload[:length])
    header = VirtioHeader(
        needs_checksum=True, checksum_start=plan.transport, checksum_offset=6 if protocol == UDP else 16
    )

    assert segment(header, plan.packet()) == plan.packets()


def test_a_single_packet_that_is_complete_stays_as_it_is() -> None:
    damaged = b"\x45" + bytes(50)

    assert segment(PLAIN, damaged) == [damaged]


def test_a_single_udp_packet_never_has_the_checksum_that_means_none() -> None:
    results = set()
    for number in range(1 << 16):
        body = number.to_bytes(2, "big")
        plain = packets.ipv4(A4, B4, UDP, b"\x9c\x40\xc3\x50\x00\x0a\x50\x00" + body)
        header = VirtioHeader(needs_checksum=True, checksum_start=20, checksum_offset=6)
        (done,) = segment(header, plain)
        results.add(done[26:28])

    assert b"\0\0" not in results
    assert len(results) == 0xFFFF


@given(st.randoms(use_true_random=False), plans(size_max=300))
def test_damaged_superpackets_are_cut_or_refused_and_every_segment_can_be_parsed(
    dice: random.Random, plan: Plan
) -> None:
    raw, packet = bytearray(plan.virtio()), bytearray(plan.packet())
    for _ in range(dice.randrange(4)):
        packet[dice.randrange(plan.header_bytes)] = dice.randrange(256)
    raw[4:6] = dice.choice((bytes(raw[4:6]), b"\x01\x00", b"\xff\xff", dice.randbytes(2)))
    del packet[dice.choice((len(packet), dice.randrange(len(packet)))) :]
    try:
        header = VirtioHeader.parse(bytes(raw), bytes(packet))
    except OffloadError:
        return
    if header.gso is GsoType.NONE:
        return

    for each in segment(header, bytes(packet)):
        length = int.from_bytes(each[2:4] if each[0] >> 4 == 4 else each[4:6], "big")
        assert len(each) == length + (0 if each[0] >> 4 == 4 else 40)
        assert parse_flow(each, inbound=False).protocol in (TCP, UDP)


# ---- with real devices ----


@pytest.fixture(scope="module")
def kernel() -> Iterator[tuple[OffloadTun, OffloadTun]]:
    with forwarding_kernel() as devices:
        yield devices


def forwarded(kernel: tuple[OffloadTun, OffloadTun], header: bytes, packet: bytes, count: int) -> list[bytes]:
    """What the kernel makes of a superpacket with one hop more to live."""
    near, far = kernel
    near.send(header + packet)
    frames = far.expect(count)
    assert all(not any(raw) for raw, _ in frames)  # complete: the device has no offload at all
    return [each for _, each in frames]


SHAPES = [
    pytest.param(Plan(4, TCP, bytes(range(256)) * 240, 1248, options=TIMESTAMPS), id="tcp4"),
    pytest.param(Plan(6, TCP, bytes(range(256)) * 240, 1228, options=TIMESTAMPS, flags=ACK | PSH), id="tcp6"),
    pytest.param(
        Plan(4, TCP, bytes(range(251)) * 20, 501, flags=ACK | CWR | ECE | FIN), id="odd sizes, flags"
    ),
    pytest.param(Plan(4, TCP, bytes(5000), 88, sequence=2**32 - 9, identification=65_530), id="wraps"),
    pytest.param(Plan(4, TCP, bytes(5000), 1000, flags_and_offset=0, service=0xBA), id="no DF, DSCP"),
    pytest.param(Plan(4, UDP, bytes(range(256)) * 240, 1272), id="udp4"),
    pytest.param(Plan(6, UDP, bytes(range(251)) * 200, 1001), id="udp6, odd size"),
    pytest.param(Plan(4, UDP, bytes(range(256)) * 4, 512, identification=65_535), id="udp4, equal sizes"),
]


@pytest.mark.e2e
@pytest.mark.parametrize("plan", SHAPES)
def test_segments_are_those_of_the_kernel(kernel: tuple[OffloadTun, OffloadTun], plan: Plan) -> None:
    ours = cut(plan)

    theirs = forwarded(kernel, plan.virtio(), replace(plan, ttl=plan.ttl + 1).packet(), len(ours))

    assert theirs == ours


@pytest.mark.e2e
def test_segments_of_random_superpackets_are_those_of_the_kernel(
    kernel: tuple[OffloadTun, OffloadTun],
) -> None:
    dice = random.Random(5)
    for _ in range(150):
        size = dice.choice((dice.randrange(1, 2000), 36, 536, 1248))
        plan = Plan(
            dice.choice((4, 6)),
            dice.choice((TCP, UDP)),
            dice.randbytes(min(dice.randrange(size + 1, size * 30 + 2), 60_000)),
            size,
            flags=ACK | dice.choice((0, PSH, FIN | PSH, ECE, CWR | ECE)),
            sequence=dice.randrange(2**32),
            identification=dice.randrange(2**16),
            options=dice.choice((b"", TIMESTAMPS)),
            flags_and_offset=dice.choice((0, 0x4000)),
            service=dice.randrange(256),
            ports=(dice.randrange(1024, 65536), dice.randrange(1024, 65536)),
        )
        ours = cut(plan)

        theirs = forwarded(kernel, plan.virtio(), replace(plan, ttl=65).packet(), len(ours))

        assert theirs == ours, plan


@pytest.mark.e2e
def test_superpackets_that_udp_sockets_make_are_cut_into_what_was_sent() -> None:
    with ExitStack() as closing:
        closing.enter_context(private_network())
        tun = closing.enter_context(offload_tun("nmpuso0", ["10.50.1.2/24"], 1300, EVERYTHING))
        sender = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender.setsockopt(socket.IPPROTO_UDP, 103, 1200)  # UDP_SEGMENT
        data = random.Random(2).randbytes(50_000)
        sender.sendto(data, ("10.50.1.9", 4000))
        ((raw, packet),) = tun.expect(1)

        header = VirtioHeader.parse(raw, packet)
        found = segment(header, packet)

    assert header.gso == UDP_L4
    assert b"".join(each[28:] for each in found) == data
    assert {len(each) for each in found[:-1]} == {1228}
    for each in found:
        source, destination = each[12:16], each[16:20]
        assert packets.checksum(each[:20]) == 0
        pseudo = source + destination + b"\0\x11" + (len(each) - 20).to_bytes(2, "big")
        assert packets.checksum(pseudo + each[20:]) == 0
