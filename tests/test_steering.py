"""Real sockets: which member of a group gets a datagram, while all readers live and when one is given up."""

import errno
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from nebula_mp.config.model import ListenConfig
from nebula_mp.demo.netns import Lab
from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import TunnelIndex
from nebula_mp.steering import CONTROL, SteeringGroup, member_for, owner_of, probe_steering, steering_program
from nebula_mp.udp_socket import UdpSocket
from nebula_mp.wire.header import MessageType
from tests.support.netns import PREFIX, entered

LOOPBACK = ListenConfig(host="127.0.0.1")
SO_ATTACH_REUSEPORT_CBPF = 51
UDP_SEGMENT = 103
UDP_GRO = 104
FOR_CONTROL = [MessageType.HANDSHAKE, MessageType.RECV_ERROR]
DATA = [kind for kind in MessageType if kind not in FOR_CONTROL]


@contextmanager
def group(
    readers: int, config: ListenConfig = LOOPBACK, *, coalesce: bool = False
) -> Iterator[SteeringGroup]:
    opened, warnings = SteeringGroup.open(config, readers, coalesce=coalesce)
    try:
        assert warnings == ()
        assert opened.is_steered
        yield opened
    finally:
        opened.close()


def packet(kind: MessageType, index: int, size: int = 16) -> bytes:
    return struct.pack("!BBHIQ", 0x10 | kind, 0, 0, index, 7).ljust(size, b"\0")


def senders(count: int, target: SteeringGroup) -> list[socket.socket]:
    """Sockets with a source port each, connected to the group."""
    opened = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    for sender in opened:
        sender.connect(("127.0.0.1", target.control.local.port))
    return opened


def taken(target: SteeringGroup) -> list[list[bytes]]:
    """What waits at each member, in order."""
    return [[datagram for datagram, _ in member.receive(100_000)] for member in target.members]


def taken_after(target: SteeringGroup, send: Callable[[], object]) -> list[list[bytes]]:
    send()
    return taken(target)


def close(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        each.close()


@pytest.mark.parametrize(
    ("datagram", "member"),
    [
        pytest.param(b"", 0, id="empty"),
        pytest.param(b"\x01", 0, id="hole punch"),
        pytest.param(packet(MessageType.MESSAGE, 1)[:7], 0, id="one byte too short for an index"),
        pytest.param(packet(MessageType.MESSAGE, 1)[:8], 2, id="just an index"),
        pytest.param(packet(MessageType.HANDSHAKE, 1), 0, id="handshake"),
        pytest.param(packet(MessageType.RECV_ERROR, 1), 0, id="recv_error"),
        *(pytest.param(packet(kind, 4), 2, id=kind.name.lower()) for kind in DATA),
        pytest.param(packet(MessageType.MESSAGE, 2**32 - 1), 1, id="largest index"),
        pytest.param(b"\xf1" + packet(MessageType.MESSAGE, 2)[1:], 3, id="version that does not exist"),
        pytest.param(b"\x1f" + packet(MessageType.MESSAGE, 2)[1:], 3, id="type that does not exist"),
    ],
)
def test_the_member_follows_from_type_and_index(datagram: bytes, member: int) -> None:
    assert member_for(datagram, owners=[0, 1, 2]) == member

    with group(3) as target, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(datagram, ("127.0.0.1", target.control.local.port))

        assert [len(datagrams) for datagrams in taken(target)] == [number == member for number in range(4)]


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_every_datagram_of_64_ports_and_1000_indexes_reaches_the_owner_of_its_index(readers: int) -> None:
    generator = random.Random(readers)
    counts = Counter[int]()
    with group(readers) as target:
        sources = senders(64, target)
        for source in sources:
            indexes = [generator.randrange(2**32) for _ in range(1000)]
            for start in range(0, 1000, 100):
                for index in indexes[start : start + 100]:
                    source.send(packet(generator.choice(DATA), index))
                for member, datagrams in enumerate(taken(target)):
                    found = {1 + int.from_bytes(datagram[4:8], "big") % readers for datagram in datagrams}
                    assert found <= {member}
                    counts[member] += len(datagrams)
        close(sources)

    assert counts[CONTROL] == 0
    assert counts.total() == 64_000
    assert min(counts[1 + number] for number in range(readers)) > 60_000 // readers


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_handshakes_and_recv_errors_of_64_ports_reach_control_whatever_their_index(readers: int) -> None:
    with group(readers) as target:
        sources = senders(64, target)
        for number, source in enumerate(sources):
            source.send(packet(MessageType.HANDSHAKE, number * 0x01010101))
            source.send(packet(MessageType.RECV_ERROR, number * 0x01010101))
        close(sources)

        assert [len(datagrams) for datagrams in taken(target)] == [128, *[0] * readers]


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 300])
def test_the_kernel_runs_the_program_as_its_python_says_for_any_bytes_and_any_owners(readers: int) -> None:
    generator = random.Random(readers)
    with group(readers) as target:
        (source,) = senders(1, target)
        for _ in range(20):
            target.steer([generator.randrange(readers) for _ in range(readers)])
            expected: list[list[bytes]] = [[] for _ in target.members]
            for _ in range(20):
                datagram = generator.randbytes(generator.randrange(24))
                source.send(datagram)
                expected[member_for(datagram, target.owners)].append(datagram)

            assert taken(target) == expected
        close([source])


def test_an_owner_is_found_without_a_datagram() -> None:
    assert [owner_of(TunnelIndex(index), [0, 2, 2]) for index in (3, 4, 0xFFFFFFFF)] == [0, 2, 0]


def test_a_program_of_first_owners_has_ten_instructions_whatever_their_number() -> None:
    assert {len(steering_program(range(readers))) for readers in (1, 2, 64)} == {10 * 8}


def test_a_given_up_readers_share_moves_and_the_others_stay() -> None:
    indexes = range(0xABCD0000, 0xABCD0000 + 200)
    with group(4) as target:
        sources = senders(4, target)

        def send() -> None:
            for number, index in enumerate(indexes):
                sources[number % 4].send(packet(MessageType.MESSAGE, index))

        before = taken_after(target, send)
        target.hand_over(given_up=1, to=3)
        after = taken_after(target, send)
        target.hand_over(given_up=3, to=0)  # and with it what it had taken over
        later = taken_after(target, send)
        owners = target.owners
        target.steer(range(4))
        again = taken_after(target, send)
        close(sources)

    assert [len(datagrams) for datagrams in before] == [0, 50, 50, 50, 50]
    assert [len(datagrams) for datagrams in after] == [0, 50, 0, 50, 100]
    assert (after[1], after[3]) == (before[1], before[3])
    assert sorted(after[4]) == sorted(before[2] + before[4])
    assert [len(datagrams) for datagrams in later] == [0, 150, 0, 50, 0]
    assert owners == (0, 0, 2, 0)
    assert again == before


def test_handshakes_still_reach_control_after_a_share_has_moved() -> None:
    with group(2) as target:
        target.hand_over(given_up=1, to=0)
        sources = senders(8, target)
        for index, source in enumerate(sources):
            source.send(packet(MessageType.HANDSHAKE, index))
        close(sources)

        assert [len(datagrams) for datagrams in taken(target)] == [8, 0, 0]


def test_what_waits_at_a_given_up_reader_stays_there() -> None:
    with group(2) as target:
        (source,) = senders(1, target)
        source.send(packet(MessageType.MESSAGE, 1))
        target.hand_over(given_up=1, to=0)
        source.send(packet(MessageType.MESSAGE, 1, size=17))
        close([source])

        assert [[len(datagram) for datagram in datagrams] for datagrams in taken(target)] == [[], [17], [16]]


def test_both_ip_versions_are_steered_alike() -> None:
    with group(2, ListenConfig(host="::")) as target:
        port = target.control.local.port
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family, socket.SOCK_DGRAM) as source:
                for index in range(10):
                    source.sendto(packet(MessageType.MESSAGE, index), (address, port))
                source.sendto(packet(MessageType.HANDSHAKE, 1), (address, port))

        assert [len(datagrams) for datagrams in taken(target)] == [2, 10, 10]


@pytest.mark.e2e
def test_both_ip_versions_are_steered_where_sockets_of_ipv6_take_no_ipv4_by_default() -> None:
    with Lab(f"{PREFIX}-{os.getpid()}") as lab:
        space = lab.namespace("v")
        space.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/bindv6only")
        with entered(space), group(2, ListenConfig(host="::")) as target:
            (source,) = senders(1, target)
            for index in range(10):
                source.send(packet(MessageType.MESSAGE, index))
            close([source])

            assert [len(datagrams) for datagrams in taken(target)] == [0, 5, 5]


def test_every_member_can_answer_from_the_one_address() -> None:
    with group(2) as target, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        (to,) = [UdpSocket(peer).local]
        for member in target.members:
            assert member.send(b"answer", to) is None

        assert {peer.recvfrom(100)[1] for _ in target.members} == {("127.0.0.1", target.control.local.port)}


def test_members_are_closed_on_exec_and_do_not_block() -> None:
    with group(2) as target:
        for member in target.members:
            assert not os.get_inheritable(member.fileno())
            assert not os.get_blocking(member.fileno())


def test_a_second_instance_on_the_same_port_is_refused() -> None:
    with group(2) as target:
        port = target.control.local.port

        with pytest.raises(
            SystemCallError, match=rf"udp 127\.0\.0\.1:{port}: the port is taken by .*listen\.port"
        ):
            SteeringGroup.open(ListenConfig(host="127.0.0.1", port=port), 2, coalesce=False)


def test_the_group_of_another_program_is_not_joined() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))

        with pytest.raises(SystemCallError, match="the port is taken"):
            SteeringGroup.open(ListenConfig(host="127.0.0.1", port=other.getsockname()[1]), 2, coalesce=False)


def test_a_program_that_joins_the_group_gets_nothing() -> None:
    with group(2) as target, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", target.control.local.port))
        sources = senders(64, target)
        for index, source in enumerate(sources):
            source.send(packet(MessageType.MESSAGE, index))
            source.send(packet(MessageType.HANDSHAKE, 0))
        close(sources)

        assert [len(datagrams) for datagrams in taken(target)] == [64, 32, 32]


Options = Callable[[socket.socket, int, int, object], None]
plain_setsockopt: Callable[..., None] = socket.socket.setsockopt


def with_option(monkeypatch: pytest.MonkeyPatch, option: int, instead: Options) -> None:
    """Let a kernel that differs answer to one socket option."""

    def setsockopt(self: socket.socket, level: int, name: int, value: object) -> None:
        (instead if name == option else plain_setsockopt)(self, level, name, value)

    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)


def refuse(_self: socket.socket, _level: int, _name: int, _value: object) -> None:
    raise OSError(errno.ENOPROTOOPT, "Protocol not available")


def ignore(_self: socket.socket, _level: int, _name: int, _value: object) -> None:
    """Accept the option and do nothing."""


@pytest.mark.parametrize(
    ("option", "instead", "reason"),
    [
        pytest.param(SO_ATTACH_REUSEPORT_CBPF, refuse, "(ENOPROTOOPT)", id="no programs"),
        pytest.param(
            SO_ATTACH_REUSEPORT_CBPF, ignore, "accepted but is not obeyed", id="programs are ignored"
        ),
        pytest.param(socket.SO_REUSEPORT, refuse, "(ENOPROTOOPT)", id="no groups"),
    ],
)
def test_one_reader_gets_everything_where_the_kernel_cannot_steer(
    monkeypatch: pytest.MonkeyPatch, option: int, instead: Options, reason: str
) -> None:
    with_option(monkeypatch, option, instead)
    target, warnings = SteeringGroup.open(LOOPBACK, 4, coalesce=False)
    sources = senders(16, target)
    for index, source in enumerate(sources):
        source.send(packet(MessageType.MESSAGE, index))
        source.send(packet(MessageType.HANDSHAKE, index))
    close(sources)
    received = taken(target)
    target.close()

    (warning,) = warnings
    assert (target.is_steered, target.readers, len(target.members)) == (False, 1, 1)
    assert target.control is target.reader(0)
    assert len(received[0]) == 32
    assert "one reader serves all of them" in warning
    assert reason in warning


def test_the_port_of_the_fallback_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with_option(monkeypatch, SO_ATTACH_REUSEPORT_CBPF, refuse)
    target, _ = SteeringGroup.open(LOOPBACK, 4, coalesce=False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

        with pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", target.control.local.port))
    target.close()


def test_this_kernel_steers() -> None:
    assert probe_steering() is None


def test_a_refused_change_of_owners_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with group(2) as target:
        with monkeypatch.context() as patch:
            with_option(patch, SO_ATTACH_REUSEPORT_CBPF, refuse)
            with pytest.raises(
                SystemCallError, match=r"another steering of the readers was refused \(ENOPROTOOPT\)"
            ):
                target.hand_over(given_up=1, to=0)
        (source,) = senders(1, target)
        source.send(packet(MessageType.MESSAGE, 1))
        close([source])

        assert target.owners == (0, 1)
        assert [len(datagrams) for datagrams in taken(target)] == [0, 0, 1]


@contextmanager
def raw_members(target: SteeringGroup) -> Iterator[list[socket.socket]]:
    views = [socket.socket(fileno=socket.dup(member.fileno())) for member in target.members]
    try:
        yield views
    finally:
        close(views)


def batches(member: socket.socket) -> Iterator[tuple[int, int]]:
    """For each receive: source port, and how many datagrams it brought."""
    while True:
        try:
            data, ancillary, _, source = member.recvmsg(65535, 64)
        except BlockingIOError:
            return
        sizes = [
            struct.unpack("=i", value)[0]
            for level, kind, value in ancillary
            if (level, kind) == (17, UDP_GRO)
        ]
        yield source[1], -(-len(data) // (sizes[0] if sizes else max(len(data), 1)))


def send_batch(source: socket.socket, index: int, count: int, to: tuple[str, int]) -> None:
    """Send `count` datagrams in one call, which the kernel may keep together."""
    data = packet(MessageType.MESSAGE, index, size=500) * count
    source.sendmsg([data], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 500))], 0, to)


def test_a_coalesced_batch_reaches_the_owner_in_one_piece() -> None:
    with group(2, coalesce=True) as target, raw_members(target) as members:
        assert target.coalesces
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
            send_batch(source, index=1, count=10, to=("127.0.0.1", target.control.local.port))

            assert [[size for _, size in batches(member)] for member in members] == [[], [], [10]]


@pytest.mark.parametrize("refusing", [0, 1, 2])
def test_coalescing_is_on_at_all_members_or_at_none(monkeypatch: pytest.MonkeyPatch, refusing: int) -> None:
    asked = []

    def refuse_one(self: socket.socket, level: int, name: int, value: object) -> None:
        asked.append(value)
        if len(asked) == 1 + refusing:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        plain_setsockopt(self, level, name, value)

    with_option(monkeypatch, UDP_GRO, refuse_one)
    target, warnings = SteeringGroup.open(LOOPBACK, 2, coalesce=True)
    with raw_members(target) as members:
        states = [member.getsockopt(socket.IPPROTO_UDP, UDP_GRO) for member in members]
    target.close()

    assert (target.is_steered, target.coalesces, states) == (True, False, [0, 0, 0])
    (warning,) = warnings
    assert warning == (
        "udp: the kernel does not coalesce datagrams (ENOPROTOOPT): each costs a call of its own, and TCP about"
        " three times the CPU; UDP_GRO needs Linux 5.0"
    )


@pytest.mark.e2e
def test_packets_of_every_source_port_are_coalesced_because_every_member_asks_for_it() -> None:
    with Lab(f"{PREFIX}-{os.getpid()}") as lab:
        near, far = lab.namespace("n"), lab.namespace("f")
        # With IPv6 addresses the laboratory waits until the link carries packets.
        lab.join(near, far, ["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"])
        # veth would hand a batch over whole; now single packets arrive, and the receiver's GRO joins them.
        near.run("ethtool", "-K", "eth0", "tso", "off", "tx-udp-segmentation", "off")
        far.run("ethtool", "-K", "eth0", "gro", "on")
        with entered(near):
            sources = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(32)]
        with entered(far):
            target, warnings = SteeringGroup.open(ListenConfig(host="192.0.2.2"), 2, coalesce=True)

        def largest_batches() -> list[int]:
            """For each source port, the most datagrams that one receive brought."""
            largest = Counter[int]()
            for source in sources:
                for _ in range(3):
                    send_batch(source, index=1, count=20, to=("192.0.2.2", target.control.local.port))
                    time.sleep(0.001)
                for port, size in batches(members[2]):
                    largest[port] = max(largest[port], size)
            return sorted(largest.values())

        with raw_members(target) as members:
            with_all = largest_batches()
            members[CONTROL].setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
            without_control = largest_batches()
        target.close()
        close(sources)

    assert warnings == ()
    assert target.control is not target.reader(1)
    assert (len(with_all), len(without_control)) == (32, 32)
    assert min(with_all) > 1
    assert min(without_control) == 1  # had one been forgotten, some ports would be received one by one
