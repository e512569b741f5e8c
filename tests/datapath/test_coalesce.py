"""Packets joined to superpackets: what may be joined, what may not, and that nobody can tell afterwards.

Data flow: packets -> coalesce -> a TUN with offloads -> kernel
"""

import hashlib
import random
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.datapath.checksums import Rows
from nebula_mp.datapath.coalesce import ALL, Joined, coalesce, joinable, shape_of, superpacket_head
from nebula_mp.datapath.segment import segment
from nebula_mp.datapath.virtio import HEADER_BYTES, GsoType, VirtioHeader
from tests.datapath.superpackets import A4, B4, B6, TIMESTAMPS, Plan, plans
from tests.support import packets
from tests.support.offload_tun import EVERYTHING, OffloadTun, forwarding_kernel, is_noise, offload_tun
from tests.support.packets import ACK, CWR, ECE, FIN, PSH, RST, SYN, TCP, UDP, URG
from tests.support.private_net import private_network

TCP4 = Plan(4, TCP, bytes(range(250)) * 20, 1000, options=TIMESTAMPS, flags_and_offset=0)
TCP6 = Plan(6, TCP, bytes(range(250)) * 20, 1000, options=TIMESTAMPS)
UDP4 = Plan(4, UDP, bytes(range(250)) * 20, 1000, flags_and_offset=0)
UDP6 = Plan(6, UDP, bytes(range(250)) * 20, 1000)
ALL_PLANS = [
    pytest.param(TCP4, id="tcp4"),
    pytest.param(TCP6, id="tcp6"),
    pytest.param(UDP4, id="udp4"),
    pytest.param(UDP6, id="udp6"),
]


def laid_out(each: Sequence[bytes], gap: int = 0) -> tuple[memoryview, int]:
    """Packets in memory at one stride, with rubbish between them."""
    stride = max(1, *map(len, each)) + gap
    memory = bytearray(b"\xaa" * (stride * len(each)))
    for number, packet in enumerate(each):
        memory[number * stride : number * stride + len(packet)] = packet
    return memoryview(memory)[: (len(each) - 1) * stride + len(each[-1])], stride


def joined(each: Sequence[bytes], kinds: frozenset[GsoType] = ALL) -> tuple[list[Joined], list[bytes]]:
    """What packets become: in parts, and as the frames that the kernel gets."""
    memory, stride = laid_out(each)
    result = coalesce(memory, stride, [len(packet) for packet in each], kinds)
    frames = [b"".join(part.pieces(memory)) for part in result]
    for part, frame in zip(result, frames, strict=True):
        out = bytearray(part.size_bytes)
        assert part.write(memory, memoryview(out)) == len(frame)
        assert out == frame
    return result, frames


def groups(each: Sequence[bytes], kinds: frozenset[GsoType] = ALL) -> list[int]:
    """How many packets each part has."""
    parts, _ = joined(each, kinds)
    assert [part.first for part in parts] == [sum(x.packets for x in parts[:n]) for n in range(len(parts))]
    return [part.packets for part in parts]


def taken_apart(frames: Sequence[bytes]) -> list[bytes]:
    """The packets that the kernel would see."""
    result = []
    for frame in frames:
        packet = frame[HEADER_BYTES:]
        header = VirtioHeader.parse(frame[:HEADER_BYTES], packet)
        result += segment(header, packet)
    return result


# ---- what is joined ----


@given(plans(joinable=True), st.integers(0, 40))
def test_to_cut_a_superpacket_and_to_join_its_packets_changes_nothing(plan: Plan, gap: int) -> None:
    packet = plan.packet()
    each = segment(VirtioHeader.parse(plan.virtio(), packet), packet)
    memory, stride = laid_out(each, gap)

    parts = coalesce(memory, stride, [len(one) for one in each])

    assert [part.packets for part in parts] == [plan.count]
    whole = plan.virtio() + packet if plan.count > 1 else bytes(HEADER_BYTES) + each[0]
    assert b"".join(parts[0].pieces(memory)) == whole


@given(st.lists(plans(size_max=100), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_to_join_packets_and_to_cut_them_changes_nothing_however_they_are_damaged(
    several: list[Plan], dice: random.Random
) -> None:
    """Without DF, so that ids have to be right; with it they mean nothing, and may change."""
    each = [packet for plan in several for packet in replace(plan, flags_and_offset=0).packets()][:60]
    for _ in range(dice.randrange(4)):
        number = dice.randrange(len(each))
        packet = bytearray(each[number])
        match dice.randrange(5):
            case 0:
                packet[dice.randrange(len(packet))] ^= 1 << dice.randrange(8)
            case 1:
                packet[dice.randrange(min(len(packet), 60))] = dice.randrange(256)
            case 2:
                del packet[dice.randrange(len(packet)) :]
            case 3:
                packet += dice.randbytes(dice.randrange(1, 9))
            case 4:
                each.insert(dice.randrange(len(each)), bytes(packet))
        each[number] = bytes(packet)
    if packets_with_df(each):
        return

    _, frames = joined(each)

    assert taken_apart(frames) == each


def packets_with_df(each: Sequence[bytes]) -> bool:
    return any(len(packet) > 6 and packet[0] >> 4 == 4 and packet[6] & 0x40 for packet in each)


def test_it_was_worth_it_in_most_of_those_cases() -> None:
    plan = Plan(4, TCP, bytes(60_000), 1248, options=TIMESTAMPS)

    assert groups(plan.packets()) == [plan.count]


def test_ids_of_packets_that_must_not_be_fragmented_mean_nothing() -> None:
    plan = replace(TCP4, flags_and_offset=0x4000)
    each = [replace(plan, identification=(7919 * number) % 65536).one(number) for number in range(5)]

    parts, frames = joined(each)

    assert [part.packets for part in parts] == [5]
    found = taken_apart(frames)
    assert [packet[20:] for packet in found] == [packet[20:] for packet in each]
    assert all(packets.checksum(packet[:20]) == 0 for packet in found)


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_a_shorter_packet_ends_a_superpacket_and_a_longer_one_begins_the_next(plan: Plan) -> None:
    short = replace(plan, payload=plan.payload[:2500])  # 1000, 1000, 500
    following = replace(
        plan,
        payload=plan.payload[:1800],  # 900, 900
        size=900,
        sequence=plan.sequence + 2500,
        identification=plan.identification + 3,
    )

    assert groups(short.packets() + following.packets()) == [3, 2]
    assert groups([*following.packets(), *short.packets()]) == [2, 3]


@pytest.mark.parametrize("plan", [ALL_PLANS[0], ALL_PLANS[1]])
def test_a_push_ends_a_superpacket_which_then_has_it(plan: Plan) -> None:
    pushed = replace(plan, flags=ACK | PSH, payload=plan.payload[:3000]).packets()
    following = [plan.one(3), plan.one(4)]

    parts, frames = joined(pushed + following)

    assert [part.packets for part in parts] == [3, 2]
    flags_at = HEADER_BYTES + plan.transport + 13
    assert [frame[flags_at] for frame in frames] == [ACK | PSH, ACK]


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_a_superpacket_is_no_longer_than_its_length_fields_can_say(plan: Plan) -> None:
    long = replace(plan, payload=bytes(200_000), size=1000)
    most = (65_535 - plan.header_bytes) // 1000

    parts, frames = joined(long.packets())

    assert [part.packets for part in parts] == [most, most, most, 200 - 3 * most]
    assert max(map(len, frames)) <= 65_535 + HEADER_BYTES
    assert taken_apart(frames) == long.packets()


def test_the_last_packet_may_fill_a_superpacket_to_its_last_byte() -> None:
    room = 65_535 - TCP4.header_bytes
    exact = replace(TCP4, payload=bytes(room), size=1000)

    parts, frames = joined(exact.packets())

    assert [part.packets for part in parts] == [exact.count]
    assert len(frames[0]) == 65_535 + HEADER_BYTES
    assert groups(replace(exact, payload=bytes(room + 1)).packets()) == [exact.count - 1, 1]


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_only_what_the_device_takes_is_joined(plan: Plan) -> None:
    kind = GsoType(plan.gso)

    assert groups(plan.packets(), frozenset({kind})) == [5]
    assert groups(plan.packets(), ALL - {kind}) == [1, 1, 1, 1, 1]


def test_packets_of_several_flows_keep_their_order() -> None:
    acknowledgement = packets.ipv4(A4, B4, TCP, packets.tcp(A4, B4, 1, 2, options=TIMESTAMPS))
    other = replace(TCP4, ports=(1, 2))
    each = [*TCP4.packets(), acknowledgement, *other.packets(), *UDP4.packets(), *TCP6.packets()]

    assert groups(each) == [5, 1, 5, 5, 5]
    alternating = [one for pair in zip(TCP4.packets(), other.packets(), strict=True) for one in pair]
    assert groups(alternating) == [1] * 10
    for mixture in (each, alternating):
        assert taken_apart(joined(mixture)[1]) == mixture


def test_nothing_and_one_packet_are_given_as_they_came() -> None:
    assert coalesce(memoryview(b""), 1, []) == []
    for one in (b"", b"\x45", bytes(2000), TCP4.one(0)):
        parts, frames = joined([one])
        assert [part.packets for part in parts] == [1]
        assert frames == [bytes(HEADER_BYTES) + one]


# ---- what is not ----


@dataclass(frozen=True)
class Change:
    """How the third of five packets differs, and which packets then are joined."""

    of: Callable[[Plan], bytes]
    plans: tuple[Plan, ...] = (TCP4, TCP6, UDP4, UDP6)
    left: tuple[int, ...] = (2, 1, 2)


def field(**changes: object) -> Callable[[Plan], bytes]:
    return lambda plan: replace(plan, **changes).one(2)  # type: ignore[arg-type]  # names of fields of Plan


def byte(at: int, value: int, *, behind: str = "") -> Callable[[Plan], bytes]:
    """Change bits of one byte, and nothing else: then checksums are wrong."""

    def change(plan: Plan) -> bytes:
        packet = bytearray(plan.one(2))
        packet[at + {"": 0, "transport": plan.transport, "payload": plan.header_bytes}[behind]] ^= value
        return bytes(packet)

    return change


def repaired(change: Callable[[Plan], bytes]) -> Callable[[Plan], bytes]:
    """Do the same, and make checksums right afterwards."""

    def repair(plan: Plan) -> bytes:
        packet = bytearray(change(plan))
        if plan.version == 4:
            packet[10:12] = bytes(2)
            packet[10:12] = packets.checksum(bytes(packet[:20])).to_bytes(2, "big")
        at = plan.transport + (16 if plan.protocol == TCP else 6)
        packet[at : at + 2] = bytes(2)
        addresses = bytes(packet[12:20] if plan.version == 4 else packet[8:40])
        pseudo = (
            addresses + plan.protocol.to_bytes(4, "big") + (len(packet) - plan.transport).to_bytes(4, "big")
        )
        value = packets.checksum(pseudo + bytes(packet[plan.transport :]))
        packet[at : at + 2] = value.to_bytes(2, "big")
        return bytes(packet)

    return repair


def without_checksum(plan: Plan) -> bytes:
    packet = plan.one(2)
    at = plan.transport + 6
    return packet[:at] + bytes(2) + packet[at + 2 :]


def without_payload(plan: Plan) -> bytes:
    return repaired(lambda plan: replace(plan, payload=b"").one(0))(plan)


TCPS, UDPS = (TCP4, TCP6), (UDP4, UDP6)
CHANGES = {
    "port": Change(field(ports=(40000, 50001))),
    "hop limit": Change(field(ttl=63)),
    "DSCP": Change(field(service=0x88)),
    "ECN: ECT to CE": Change(field(service=3)),
    "id repeated": Change(field(identification=6), (TCP4, UDP4)),
    "id jumps": Change(field(identification=8), (TCP4, UDP4)),
    "DF": Change(field(flags_and_offset=0x4000), (TCP4, UDP4)),
    "MF": Change(field(flags_and_offset=0x2000), (TCP4, UDP4)),
    "later fragment": Change(field(flags_and_offset=0x0005), (TCP4, UDP4)),
    "reserved IP flag": Change(field(flags_and_offset=0x8000), (TCP4, UDP4)),
    "IP options": Change(field(ip_options=b"\x94\x04\0\0"), (TCP4, UDP4), (2, 1, 2)),
    "extension header": Change(field(extensions=b"\x1e\x02ab"), (TCP6, UDP6)),
    "flow label": Change(byte(3, 1), (TCP6, UDP6)),
    "address": Change(repaired(byte(15, 1))),
    "acknowledgement": Change(field(acknowledgement=78), TCPS),
    "window": Change(field(window=501), TCPS),
    "time stamp": Change(field(options=TIMESTAMPS[:-1] + b"\xff"), TCPS),
    "other options": Change(field(options=b"\x01\x01\x05\x0a" + bytes(8)), TCPS),
    "fewer options": Change(field(options=b""), TCPS),
    "gap": Change(field(sequence=1001), TCPS),
    "sent again": Change(field(sequence=0), TCPS),
    "ECE": Change(field(flags=ACK | ECE), TCPS),
    "no ACK": Change(field(flags=0), TCPS),
    "urgent pointer": Change(repaired(byte(18, 1, behind="transport")), TCPS),
    "reserved TCP bits": Change(repaired(byte(12, 1, behind="transport")), TCPS),
    "TCP header length": Change(repaired(byte(12, 0xF0, behind="transport")), TCPS),
    "TCP header too short": Change(repaired(byte(12, 0xC0, behind="transport")), TCPS),
    "IP checksum": Change(byte(10, 1), (TCP4, UDP4)),
    "TCP checksum": Change(byte(16, 1, behind="transport"), TCPS),
    "UDP checksum": Change(byte(6, 1, behind="transport"), UDPS),
    "no UDP checksum": Change(without_checksum, UDPS),
    "damaged payload": Change(byte(500, 1, behind="payload")),
    "IP length too small": Change(repaired(byte(3, 8)), (TCP4, UDP4)),
    "IPv6 length too small": Change(repaired(byte(5, 8)), (TCP6, UDP6)),
    "UDP length too small": Change(repaired(byte(5, 8, behind="transport")), UDPS),
    "another protocol": Change(repaired(byte(9, 1)), (TCP4, UDP4)),
    "another next header": Change(repaired(byte(6, 1)), (TCP6, UDP6)),
    "another version": Change(byte(0, 0x10)),
    "no payload": Change(without_payload),
    "nothing but a byte": Change(lambda plan: plan.one(2)[:1]),
    "trailing bytes": Change(lambda plan: plan.one(2) + b"\0\0"),
    "cut short": Change(lambda plan: plan.one(2)[:-2]),
}
for _flag, _name in ((FIN, "FIN"), (SYN, "SYN"), (RST, "RST"), (URG, "URG"), (CWR, "CWR")):
    CHANGES[_name] = Change(repaired(byte(13, _flag, behind="transport")), TCPS)


@pytest.mark.parametrize(
    ("change", "plan"),
    [
        pytest.param(change, plan, id=f"{name}, {GsoType(plan.gso).name}/{plan.version}")
        for name, change in CHANGES.items()
        for plan in change.plans
    ],
)
def test_a_packet_that_differs_stays_alone_and_as_it_is(change: Change, plan: Plan) -> None:
    each = plan.packets()
    changed = change.of(plan)
    assert changed != each[2]
    each[2] = changed

    parts, frames = joined(each)

    assert tuple(part.packets for part in parts) == change.left
    assert frames[1] == bytes(HEADER_BYTES) + changed


@pytest.mark.parametrize("plan", ALL_PLANS)
@pytest.mark.parametrize("number", range(5))
def test_a_damaged_packet_is_found_wherever_it_stands(plan: Plan, number: int) -> None:
    each = plan.packets()
    each[number] = each[number][:-1] + bytes([each[number][-1] ^ 1])

    expected = [count for count in (number, 1, 4 - number) if count]

    assert groups(each) == expected


@pytest.mark.parametrize("flags", [0, SYN, ACK | SYN, ACK | URG, ACK | RST, ACK | FIN, ACK | CWR])
def test_equal_packets_with_such_flags_are_not_joined(flags: int) -> None:
    each = [repaired_flags(TCP4.one(number), flags) for number in range(5)]

    assert groups(each) == [1] * 5


def repaired_flags(packet: bytes, flags: int) -> bytes:
    plan = replace(TCP4, flags=flags)
    return repaired(lambda _: packet[:33] + bytes([flags]) + packet[34:])(plan)


def test_udp_packets_without_checksum_are_not_joined() -> None:
    each = [
        packets.ipv4(
            A4, B4, UDP, packets.udp(A4, B4, 1, 2, bytes(100), with_checksum=False), identification=number
        )
        for number in range(4)
    ]

    assert groups(each) == [1] * 4


# ---- the parts, for payload that lies in one piece ----


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_headers_may_lie_apart_from_payload_that_is_in_one_piece(plan: Plan) -> None:
    plan = replace(plan, payload=plan.payload[:4700])
    each = plan.packets()
    shape = shape_of(each[0])
    assert shape is not None
    size, last = len(each[0]), len(each[-1])
    headers = Rows(b"".join(one[: plan.header_bytes] for one in each), 0, plan.header_bytes, 5)
    payload = Rows(plan.payload, 0, plan.size, 5)

    count = joinable(shape, headers, payload, size, last)
    head = superpacket_head(
        shape,
        each[0][: plan.header_bytes],
        each[-1][: plan.header_bytes],
        segment_bytes=plan.size,
        payload_bytes=4700,
    )

    assert count == 5
    assert head + plan.payload == plan.virtio() + plan.packet()


# ---- with real devices ----


@pytest.fixture(scope="module")
def kernel() -> Iterator[tuple[OffloadTun, OffloadTun]]:
    with forwarding_kernel() as devices:
        yield devices


@pytest.mark.e2e
@pytest.mark.parametrize("plan", ALL_PLANS)
@pytest.mark.parametrize("size", [36, 501, 1248])
def test_the_kernel_cuts_a_joined_superpacket_into_the_packets_it_was_made_of(
    kernel: tuple[OffloadTun, OffloadTun], plan: Plan, size: int
) -> None:
    near, far = kernel
    dice = random.Random(size)
    plan = replace(plan, payload=dice.randbytes(min(64_000, 40 * size + 7)), size=size, flags=ACK | PSH)
    parts, (frame,) = joined(replace(plan, ttl=65).packets())
    assert parts[0].packets == plan.count

    near.send(frame)

    assert [packet for _, packet in far.expect(plan.count)] == plan.packets()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("here", "family"),
    [
        pytest.param(str(B4), socket.AF_INET, id="IPv4"),
        pytest.param(str(B6), socket.AF_INET6, id="IPv6"),
    ],
)
def test_a_joined_superpacket_reaches_a_udp_socket_as_the_datagrams_it_was_made_of(
    here: str, family: int
) -> None:
    plan = replace(UDP4 if family == socket.AF_INET else UDP6, payload=random.Random(3).randbytes(30_500))
    _, (frame,) = joined(plan.packets())
    with ExitStack() as closing:
        closing.enter_context(private_network())
        prefix = "/16" if family == socket.AF_INET else "/32"
        tun = closing.enter_context(offload_tun("nmpudp0", [here + prefix], 1300, EVERYTHING))
        receiver = closing.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        receiver.bind((here, plan.ports[1]))
        receiver.settimeout(10)

        for _ in range(20):  # a device that has just come up may lose what it is given
            tun.send(frame)
            if select.select([receiver], [], [], 1.0)[0]:
                break
        got = [receiver.recv(65_535) for _ in range(plan.count)]

    assert got == [plan.payload[at : at + plan.size] for at in range(0, 30_500, plan.size)]


class Wire:
    """Two networks, each behind a device, and between them all that a tunnel does to packets but sealing."""

    def __init__(self, near: OffloadTun, far: OffloadTun) -> None:
        self._ways = [(near, far), (far, near)]
        self.superpackets = self.joined = 0

    def carry(self) -> bool:
        """Move what waits; False if nothing did."""
        moved = False
        for source, target in self._ways:
            waiting: list[bytes] = []
            while len(waiting) < 100 and (frame := source.receive()) is not None:
                if not is_noise(frame[1]):
                    header = VirtioHeader.parse(*frame)
                    self.superpackets += header.gso is not GsoType.NONE
                    waiting += segment(header, frame[1])
            if waiting:
                moved = True
                parts, frames = joined(waiting)
                self.joined += sum(part.packets > 1 for part in parts)
                for each in frames:
                    target.send(each)
        return moved


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("family", "near", "far"),
    [
        pytest.param(socket.AF_INET, "10.50.1.2", "10.50.2.2", id="IPv4"),
        pytest.param(socket.AF_INET6, "fd00:50:1::2", "fd00:50:2::2", id="IPv6"),
    ],
)
def test_a_tcp_transfer_that_is_cut_and_joined_arrives_without_a_wrong_checksum(
    family: int, near: str, far: str
) -> None:
    data = random.Random(4).randbytes(3_000_000)
    prefix = "/16" if family == socket.AF_INET else "/32"
    with ExitStack() as closing:
        ends = []
        for number, address in enumerate((near, far)):
            closing.enter_context(private_network())
            name = f"nmptcp{number}"
            tun = closing.enter_context(offload_tun(name, [address + prefix], 1300, EVERYTHING))
            end = closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
            end.bind((address, 5000))
            ends.append((tun, end))
        (near_tun, client), (far_tun, server) = ends
        wire = Wire(near_tun, far_tun)
        server.listen(1)
        server.setblocking(False)
        client.setblocking(False)
        with suppress(BlockingIOError):
            client.connect((far, 5000))

        got = _transferred(wire, client, server, data)
        in_errors = _tcp_in_errors()

    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert in_errors == 0
    assert wire.superpackets > 50
    assert wire.joined > 50


def _transferred(wire: Wire, client: socket.socket, server: socket.socket, data: bytes) -> bytearray:
    """Send until all of it was received."""
    end = time.monotonic() + 30
    got = bytearray()
    sent = 0
    accepted = None
    while len(got) < len(data):
        assert time.monotonic() < end, f"{len(got)} of {len(data)} bytes"
        with suppress(BlockingIOError):
            sent += client.send(data[sent : sent + (1 << 18)])
        with suppress(BlockingIOError):
            if accepted is None:
                accepted = server.accept()[0]
                accepted.setblocking(False)
            got += accepted.recv(1 << 20)
        if not wire.carry():
            select.select([], [], [], 0.001)
    assert accepted is not None
    accepted.close()
    return got


def _tcp_in_errors() -> int:
    """Segments that this thread's network found wrong."""
    names, values = (
        line.split()
        for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    )
    found = dict(zip(names, values, strict=True))
    return int(found["InErrs"]) + int(found["InCsumErrors"])
