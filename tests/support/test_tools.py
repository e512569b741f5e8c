"""The tools of the end-to-end tests, each shown to find what it is there to find."""

import os
import random
import socket
import struct
from collections import Counter as Counts
from ipaddress import IPv4Address, IPv6Address

import pytest

from nebula_mp.newtypes import Counter, IPAddress, TunnelIndex
from nebula_mp.wire.header import Header, MessageType
from tests.support import packets
from tests.support.counters import KernelCounters
from tests.support.datagrams import Sequence
from tests.support.inspector import Inspected, Verdicts
from tests.support.lossy import Faults, Way
from tests.support.memory import scan
from tests.support.nodes import Process
from tests.support.packet_tap import Frame, tells_udp_superpackets, udp_payload_at
from tests.support.processes import forked
from tests.support.udp_batches import receive, receive_batches, send_in_batches
from tests.support.wiretap import Report, Watch

LEFT, RIGHT = IPv4Address("10.99.1.2"), IPv4Address("10.99.2.2")


def sequence(*arrived: int, sent: int = 10) -> Sequence:
    """`sent` datagrams, one each 50 ms."""
    return Sequence("flow", [0.05 * number for number in range(sent)], list(arrived))


def test_a_datagram_behind_a_later_one_is_late_and_one_of_the_beginning_is_not_judged() -> None:
    assert sequence(*range(10)).late(after_s=0.1) == []
    assert sequence(0, 1, 2, 3, 5, 4, 6, 7, 9, 8).late(after_s=0.1) == [4, 8]
    assert sequence(2, 1, 0, 3, 4, 5).late(after_s=0.1) == []
    assert sequence(5, 3, 4).late(after_s=0.1) == [3, 4]


def test_lost_and_repeated_datagrams_are_told_apart() -> None:
    found = sequence(0, 1, 1, 3, 3, 3, 4, sent=6)

    assert (found.lost, found.twice) == ([2, 5], [1, 3, 3])
    assert found.late(after_s=0) == []


def sealed(counter: int, content: bytes, kind: MessageType = MessageType.MESSAGE, index: int = 7) -> bytes:
    datagram = Header(kind, 0, TunnelIndex(index), Counter(counter)).encode() + content
    return packets.ipv4(LEFT, RIGHT, packets.UDP, packets.udp(LEFT, RIGHT, 4242, 4242, datagram))


def watched(*seen: bytes) -> Report:
    watch = Watch()
    for packet in seen:
        watch.handle(packet)
    return Report(**watch.fields(missed=0))


def test_a_counter_used_for_two_contents_is_a_clash_and_the_same_bytes_again_are_none() -> None:
    report = watched(
        sealed(3, b"one"), sealed(4, b"one"), sealed(3, b"one"), sealed(4, b"two"), sealed(5, b"")
    )

    assert report.clashes == {str(LEFT): [[7, 4]]}
    assert report.resent == {str(LEFT): 1}
    assert report.sealed == {str(LEFT): 3}


def superpacket(datagrams: list[bytes], size: int) -> bytes:
    """As a packet socket shows datagrams that were sent with one call."""
    packet = packets.ipv4(LEFT, RIGHT, packets.UDP, packets.udp(LEFT, RIGHT, 4242, 4242, b"".join(datagrams)))
    return struct.pack("=BBHHHH", 1, 5, 28, size, 20, 6) + packet


def test_datagrams_that_were_sent_with_one_call_are_seen_one_by_one() -> None:
    sent = [
        Header(MessageType.MESSAGE, 0, TunnelIndex(7), Counter(n)).encode() + bytes(100) for n in range(5)
    ]
    sent[-1] = sent[-1][:40]

    cut = list(Frame.parse(superpacket(sent, 116)).datagrams())

    assert [packet[28:] for packet in cut] == sent
    assert watched(*cut).sealed == {str(LEFT): 5}


def test_a_packet_that_is_no_superpacket_of_udp_is_left_whole() -> None:
    whole = sealed(3, bytes(3000))
    tcp = packets.ipv4(LEFT, RIGHT, packets.TCP, packets.tcp(LEFT, RIGHT, 1, 2, bytes(3000)))

    assert list(Frame.parse(bytes(10) + whole).datagrams()) == [whole]
    found = Frame.parse(struct.pack("=BBHHHH", 1, 0x81, 40, 1200, 20, 16) + tcp)
    assert list(found.datagrams()) == [tcp]
    assert (found.gso_type, found.gso_size, found.is_unfinished) == (1, 1200, True)


@pytest.mark.parametrize(
    ("release", "tells"), [("4.19.0-27-amd64", False), ("6.1.0", False), ("6.2.0-rc1", True), ("10.0", True)]
)
def test_kernels_are_told_apart_that_can_show_a_superpacket_of_udp(release: str, tells: bool) -> None:
    assert tells_udp_superpackets(release) is tells


def test_counters_are_compared_within_one_tunnel_only_and_not_in_handshakes() -> None:
    report = watched(
        sealed(3, b"one"),
        sealed(3, b"two", index=8),
        sealed(1, b"stage 1", MessageType.HANDSHAKE, index=0),
        sealed(1, b"another stage 1", MessageType.HANDSHAKE, index=0),
        b"\x45" + bytes(30),
    )

    assert (report.clashes, report.resent) == ({}, {})
    assert report.datagrams == {str(LEFT): {"MESSAGE": 2, "HANDSHAKE": 2}}


def test_a_secret_in_a_childs_memory_is_found_and_one_that_is_not_there_is_not() -> None:
    secret, other = bytearray(os.urandom(32)), os.urandom(32)
    read_ready, ready = os.pipe()
    silence, never_written = os.pipe()

    def hold() -> None:
        held = bytes(secret)
        os.write(ready, b"x")
        os.read(silence, 1)
        assert held

    with forked(hold) as child:
        os.read(read_ready, 1)
        found = scan(child.pid, {"secret": bytes(secret), "reversed": bytes(reversed(other))})
    for descriptor in (read_ready, ready, silence, never_written):
        os.close(descriptor)

    assert {find.what for find in found.finds} == {"secret"}
    assert found.unread == []
    assert found.scanned_bytes > 1_000_000


def test_a_process_is_named_as_in_the_log() -> None:
    row = {
        "role": "reader",
        "worker": 1,
        "pid": 5,
        "core": 0,
        "cpu_s": 0.1,
        "state": "running",
        "restarts": 0,
    }
    row |= {"uptime_s": 1.0, "packets_in": 0, "packets_out": 0, "ring_fill": 0}

    assert Process.parse(row).name == "reader/1"
    assert Process.parse({**row, "role": "control", "worker": None}).name == "control"


def numbered(count: int) -> list[memoryview]:
    return [memoryview(bytes([number])) for number in range(count)]


def passed_on(way: Way, datagrams: list[memoryview]) -> list[int]:
    """The numbers that go on, those included that are held back to the end."""
    onward = [each[0] for datagram in datagrams for each in way.handle([datagram], now=0.0)]
    return onward + [each[0] for each in way.handle([], now=1.0)]


def test_on_a_wire_without_faults_everything_passes_in_order() -> None:
    assert passed_on(Way(random.Random(1)), numbered(200)) == list(range(200))


@pytest.mark.parametrize(
    "faults", [Faults(lost=0.1), Faults(twice=0.1), Faults(late=0.1), Faults(0.1, 0.1, 0.1)]
)
def test_what_goes_on_is_what_came_without_the_lost_and_with_the_repeated(faults: Faults) -> None:
    way = Way(random.Random(1), faults)

    onward = passed_on(way, numbered(250))

    passed, counts = way.passed, Counts(onward)
    assert (passed.came, len(onward)) == (250, passed.went_on)
    assert 250 - len(counts) == passed.lost
    assert sum(amount - 1 for amount in counts.values()) == passed.twice
    assert (onward == sorted(onward)) is (faults == Faults(lost=0.1))
    assert all(
        (fate > 0) is (chance > 0)
        for fate, chance in (
            (passed.lost, faults.lost),
            (passed.twice, faults.twice),
            (passed.late, faults.late),
        )
    )
    assert way.next_s is None


def test_nothing_is_held_back_for_long_though_nothing_follows() -> None:
    way = Way(random.Random(1), Faults(late=1.0))

    assert [bytes(each) for each in way.handle(numbered(1), now=5.0)] == []
    assert way.next_s is not None
    assert [bytes(each) for each in way.handle([], now=way.next_s)] == [b"\0"]


@pytest.mark.parametrize(
    "sizes", [[5], [0, 0], [5, 5, 5, 3, 5], [3, 5, 5], [5] * 200, [1200] * 60, [5, 0, 5, 4, 4]]
)
def test_datagrams_sent_together_arrive_as_they_were(sizes: list[int]) -> None:
    datagrams = [memoryview(os.urandom(size)) for size in sizes]
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target,
    ):
        target.bind(("127.0.0.1", 0))
        target.settimeout(10)
        source.connect(target.getsockname())
        receive_batches(target)
        memory = memoryview(bytearray(1 << 16))
        arrived: list[bytes] = []

        send_in_batches(source, datagrams)
        while len(arrived) < len(sizes):
            arrived += [bytes(each) for each in receive(target, memory)]

    assert arrived == datagrams


def inspected(*frames: Frame) -> Inspected:
    verdicts = Verdicts()
    for frame in frames:
        verdicts.handle(frame)
    return verdicts.found


def unfinished(left: IPAddress, right: IPAddress, protocol: int, content: bytes, size: int) -> Frame:
    """A superpacket as it should be: its checksum field holds the sum of the pseudo header."""
    at, kind = (16, {4: 1, 6: 4}[left.version]) if protocol == packets.TCP else (6, 5)
    start = 20 if left.version == 4 else 40
    pseudo = left.packed + right.packed + struct.pack("!II", protocol, len(content))
    seed = packets.checksum(pseudo) ^ 0xFFFF
    content = content[:at] + struct.pack("!H", seed) + content[at + 2 :]
    return Frame(packets.ip(left, right, protocol, content), True, kind, size, start, at)


ENDS: list[tuple[IPAddress, IPAddress]] = [(LEFT, RIGHT), (IPv6Address("fd42::1"), IPv6Address("fd42::2"))]


@pytest.mark.parametrize("ends", ENDS)
def test_the_inspector_finds_nothing_wrong_with_correct_packets(ends: tuple[IPAddress, IPAddress]) -> None:
    raw = packets.raw_packets(*ends, seed=3, count=300)
    whole = [each for each in raw if not _is_udp_without_checksum(each)]
    tcp = unfinished(*ends, packets.TCP, packets.tcp(*ends, 1, 2, bytes(3000)), 1200)
    udp = unfinished(*ends, packets.UDP, packets.udp(*ends, 1, 2, bytes(3600)), 1200)

    found = inspected(*(Frame(each, False, 0, 0, 0, 0) for each in whole), tcp, udp)

    family = ends[0].version
    assert (found.wrong_count, found.wrong) == (0, [])
    assert found.verified == len(whole) + 3 + 3
    assert found.superpackets == {f"tcp{family}": 1, f"udp{family}": 1}
    assert min(found.packets[f"{name}{family}"] for name in ("tcp", "udp", "icmp")) > 3


def _is_udp_without_checksum(packet: bytes) -> bool:
    """IPv4 allows it; the stacks that the inspector listens to always send one."""
    start = udp_payload_at(packet)
    return start > 0 and packet[start - 2 : start] == bytes(2)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("protocol", [packets.TCP, packets.UDP, packets.ICMP])
def test_the_inspector_finds_any_changed_bit_of_a_packet(
    ends: tuple[IPAddress, IPAddress], protocol: int
) -> None:
    content = {
        packets.TCP: packets.tcp(*ends, 1, 2, b"content"),
        packets.UDP: packets.udp(*ends, 1, 2, b"content"),
        packets.ICMP: packets.echo(*ends, 1, 2, b"content")[20 if ends[0].version == 4 else 40 :],
    }[protocol]
    number = packets.ICMPV6 if protocol == packets.ICMP and ends[0].version == 6 else protocol
    whole = packets.ip(*ends, number, content)
    start = len(whole) - len(content)

    changed = [
        Frame(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :], False, 0, 0, 0, 0)
        for at in range(start, len(whole))
        for bit in range(8)
    ]

    assert inspected(Frame(whole, False, 0, 0, 0, 0)).wrong == []
    assert inspected(*changed).wrong_count == len(changed)


@pytest.mark.parametrize("ends", ENDS)
def test_the_inspector_finds_a_superpacket_that_does_not_say_what_it_is(
    ends: tuple[IPAddress, IPAddress],
) -> None:
    right = unfinished(*ends, packets.TCP, packets.tcp(*ends, 1, 2, bytes(3000)), 1200)
    start = right.checksum_start
    wrong = [
        right._replace(is_unfinished=False),
        right._replace(gso_type=5),
        right._replace(checksum_start=start + 4),
        right._replace(checksum_offset=6),
        right._replace(packet=right.packet[: start + 16] + b"\1\2" + right.packet[start + 18 :]),
        right._replace(packet=right.packet[:-1]),
        right._replace(gso_type=0, gso_size=0),
    ]

    assert inspected(right).wrong == []
    assert [inspected(each).wrong_count for each in wrong] == [1] * len(wrong)


def test_the_counters_of_a_site_name_what_is_wrong_and_not_what_had_no_room() -> None:
    before = KernelCounters({"UdpInErrors": 1, "UdpRcvbufErrors": 1, "TcpInSegs": 10, "TcpInCsumErrors": 0})
    full = KernelCounters({"UdpInErrors": 4, "UdpRcvbufErrors": 4, "TcpInSegs": 30, "TcpInCsumErrors": 0})
    wrong = KernelCounters({"UdpInErrors": 6, "UdpRcvbufErrors": 4, "TcpInSegs": 31, "TcpInCsumErrors": 1})

    assert full.since(before).wrong() == {}
    assert wrong.since(before).wrong() == {"UdpInErrors": 2, "TcpInCsumErrors": 1}
    assert wrong.since(before).tcp_segments == 21
