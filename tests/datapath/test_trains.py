"""Trains: many datagrams with one call, cut by the real kernel; and what becomes of a train that it refuses."""

import errno
import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, ip_address
from typing import Any, cast

import pytest
from pyroute2 import IPRoute

from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.datapath.api import Drain, Drop
from nebula_mp.datapath.drains import (
    SINGLE_ENTRIES,
    TRAIN_BYTES_IPV4,
    TRAIN_BYTES_IPV6,
    TRAIN_LENGTHS,
    Trains,
    UdpDrain,
)
from nebula_mp.newtypes import UdpAddr
from tests.datapath.sites import INDEX_NEAR, Site, drained
from tests.support import native, native_calls, rings
from tests.support.native import python_only
from tests.support.offload_tun import NOTHING, OffloadTun, offload_tun
from tests.support.private_net import private_network

pytestmark = pytest.mark.usefixtures("kernel")

ROW = INDEX_NEAR & 0xFFFF
STEP = 1332
_UDP_SEGMENT, _UDP_GRO = 103, 104
_SO_RCVBUFFORCE = 33


class Line:
    """One drain that sends trains, the socket it sends with and the one it sends to; `calls` are its calls."""

    def __init__(self, site: Site, source: socket.socket, sink: socket.socket, to: UdpAddr) -> None:
        self.site = site
        self.source = source
        self.sink = sink
        self.calls: list[tuple[str, int]] = []
        self.refuse: Callable[[int, int, Any], int] = lambda _size, _step, _target: 0
        """Error number for a call with so many bytes of datagrams of `step`, 0 without trains; 0: none."""
        site.update(underlay=to)
        site.offloads = Offloads(tso=False, uso=False)
        self._producer = rings.produce(site.seal[0])
        self.drain = self._attach()

    def _attach(self) -> Drain:
        drain = self.site.kernel.drain_udp(
            self.site.seal_end(),
            self.source.fileno(),
            tunnels=self.site.tables.tunnels.read_only,
            stats=self.site.pages[1].descriptor,
            offloads=self.site.offloads,
        )
        if isinstance(drain, UdpDrain):
            self._real = drain._socket
            drain._socket = cast("socket.socket", self)
        return drain

    def watch_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be asked before each call of the native kernel's."""

        def sendto(_: int, data: memoryview, target: Any) -> None:
            self.calls.append(("sendto", len(data)))
            self._throw(len(data), 0, target)

        def sendmsg(_: int, data: memoryview, step: int, target: Any) -> None:
            self.calls.append(("sendmsg", len(data)))
            self._throw(len(data), step, target)

        native_calls.hook(monkeypatch, sendto=sendto, sendmsg=sendmsg)

    def send_singly(self) -> None:
        """Have a drain from now on to which UDP_SEGMENT was not granted."""
        self.site.offloads = NO_OFFLOADS
        self.drain = self._attach()

    def succeed(self) -> None:
        """Have a successor drain what is left."""
        self.drain = self._attach()
        assert self.drain.drain(1) == 1

    def push(self, *entries: bytes, step: int = STEP) -> None:
        """Drain one area with these entries of datagrams of `step` bytes."""
        self.calls.clear()
        assert self._producer.try_begin()
        for each in entries:
            assert self._producer.try_add(each, min(step, len(each)), ROW)
        self._producer.publish()
        assert self.drain.drain(1) == 1

    def send(self, *entries: bytes, step: int = STEP) -> list[bytes]:
        """Do as `push`; gives what arrived."""
        self.push(*entries, step=step)
        return drained([self.sink])

    # What the drain in Python sees as its socket.

    def sendto(self, data: memoryview, flags: int, target: Any) -> int:
        self.calls.append(("sendto", len(data)))
        self._throw(len(data), 0, target)
        return self._real.sendto(data, flags, target)

    def sendmsg(self, buffers: Any, control: Any, flags: int, target: Any) -> int:
        ((level, kind, value),) = control
        assert (level, kind) == (17, _UDP_SEGMENT)
        (size,) = (len(each) for each in buffers)
        self.calls.append(("sendmsg", size))
        self._throw(size, struct.unpack("=H", value)[0], target)
        return self._real.sendmsg(buffers, control, flags, target)

    def _throw(self, size: int, step: int, target: Any) -> None:
        number = self.refuse(size, step, target)
        if number:
            raise OSError(number, "injected")


FAMILIES = {
    "IPv4": (socket.AF_INET, "127.0.0.1"),
    "IPv6": (socket.AF_INET6, "::1"),
    "4-in-6": (socket.AF_INET6, "127.0.0.1"),
}


def bound(family: socket.AddressFamily, host: str) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 20)
    made.bind((host, 0))
    return made


MakeLine = Callable[[socket.socket, socket.socket, UdpAddr], Line]


@pytest.fixture
def make_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> MakeLine:
    """Make a line of the site, of its source, its sink, and the address of that."""

    def make(source: socket.socket, sink: socket.socket, to: UdpAddr) -> Line:
        line = Line(site, source, sink, to)
        if native.is_native():
            line.watch_native(monkeypatch)
        return line

    return make


def lay(make_line: MakeLine, family: socket.AddressFamily, host: str) -> Iterator[Line]:
    here = "::" if family == socket.AF_INET6 else host
    there = socket.AF_INET6 if ":" in host else socket.AF_INET
    with bound(family, here) as source, bound(there, host) as sink:
        yield make_line(source, sink, UdpAddr(ip_address(host), sink.getsockname()[1]))


@pytest.fixture
def line(make_line: MakeLine) -> Iterator[Line]:
    yield from lay(make_line, *FAMILIES["IPv4"])


@pytest.fixture(params=FAMILIES)
def any_line(make_line: MakeLine, request: pytest.FixtureRequest) -> Iterator[Line]:
    yield from lay(make_line, *FAMILIES[request.param])


def entry(datagrams: int, step: int = STEP, last: int = 0) -> bytes:
    """So many datagrams of `step` bytes, and one of `last`."""
    return random.Random(datagrams).randbytes(datagrams * step + last)


def cut(data: bytes, step: int = STEP) -> list[bytes]:
    return [data[at : at + step] for at in range(0, len(data), step)]


def test_a_train_of_50_datagrams_is_one_call_and_arrives_as_50_equal_datagrams(any_line: Line) -> None:
    train = entry(50, 1300)

    assert any_line.send(train, step=1300) == cut(train, 1300)

    assert any_line.calls == [("sendmsg", 65_000)]
    stats = any_line.site.stats()
    assert (stats["mp.udp.tx.packets"], stats["mp.udp.tx.bytes"]) == (50, 65_000)


def test_the_last_datagram_of_a_train_may_be_shorter_and_a_lone_one_is_no_train(line: Line) -> None:
    entries = [entry(3, last=1), entry(1), entry(0, last=700), entry(1, last=1331)]

    assert line.send(*entries) == [datagram for each in entries for datagram in cut(each)]

    assert line.calls == [
        ("sendmsg", 3 * STEP + 1),
        ("sendto", STEP),
        ("sendto", 700),
        ("sendmsg", STEP + 1331),
    ]


def test_without_the_offload_every_datagram_has_its_call(line: Line) -> None:
    line.send_singly()
    train = entry(20, last=5)

    assert line.send(train) == cut(train)

    assert line.calls == [("sendto", STEP)] * 20 + [("sendto", 5)]


def test_a_receiver_with_udp_gro_gets_the_train_as_one_batch(line: Line) -> None:
    line.sink.setsockopt(socket.SOL_UDP, _UDP_GRO, 1)
    train = entry(49, last=100)

    line.push(train)
    data, control, flags, _ = line.sink.recvmsg(65_536, 64)

    assert data == train
    assert not flags & socket.MSG_TRUNC
    assert control == [(socket.SOL_UDP, _UDP_GRO, struct.pack("=i", STEP))]


def test_a_train_has_as_many_bytes_as_the_kernel_takes_and_not_one_more(any_line: Line) -> None:
    """What the limits are is the kernel's to say; it is asked, too."""
    is_ipv6 = any_line.sink.family == socket.AF_INET6
    limit = TRAIN_BYTES_IPV6 if is_ipv6 else TRAIN_BYTES_IPV4
    for extra, sizes in ((0, [limit]), (1, [limit // 1300 * 1300, limit % 1300 + 1])):
        train = entry(0, last=limit + extra)

        assert any_line.send(train, step=1300) == cut(train, 1300)

        assert [size for _, size in any_line.calls] == sizes
    assert any_line.site.drops() == {}
    if not is_ipv6:
        control = [(socket.SOL_UDP, _UDP_SEGMENT, struct.pack("=H", 1300))]
        host, port = any_line.sink.getsockname()
        to = (f"::ffff:{host}", port) if any_line.source.family == socket.AF_INET6 else (host, port)
        with pytest.raises(OSError, match="long") as refused:
            any_line.source.sendmsg([bytes(limit + 1)], control, 0, to)
        assert refused.value.errno == errno.EMSGSIZE


def test_a_datagram_larger_than_half_a_train_goes_alone(line: Line) -> None:
    data = entry(1, step=40_000, last=20_000)

    assert line.send(data, step=40_000) == cut(data, 40_000)

    assert line.calls == [("sendmsg", 60_000)]
    for size in (65_507, 65_520):
        line.send(entry(1, step=size, last=50), step=size)
        assert line.calls == [("sendto", size), ("sendto", 50)]
    assert line.site.drops() == {Drop.UDP_TOO_BIG: 1}


def test_a_train_has_128_datagrams_at_most(line: Line) -> None:
    for datagrams, sizes in ((128, [12_800]), (129, [12_800, 100]), (257, [12_800, 12_800, 100])):
        train = entry(datagrams, 100)

        assert line.send(train, step=100) == cut(train, 100)

        assert [size for _, size in line.calls] == sizes
    assert line.site.drops() == {}


@pytest.mark.parametrize("limit", TRAIN_LENGTHS)
def test_a_kernel_that_cuts_fewer_datagrams_is_given_fewer(line: Line, limit: int) -> None:
    line.refuse = lambda size, step, _: errno.EINVAL if step and size > limit * step else 0
    train = entry(300, 100, last=7)
    for _ in range(4):
        assert line.send(train, step=100) == cut(train, 100)

    full = [("sendmsg", 100 * limit)] * (300 // limit)
    assert line.calls[: len(full)] == full
    assert sum(size for _, size in line.calls) == 30_007
    assert line.site.drops() == {}


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.EINVAL])
def test_a_train_too_large_for_the_path_goes_singly_and_so_do_such_trains_for_a_while(
    line: Line, number: int
) -> None:
    line.refuse = lambda _, step, __: number if step > 1200 else 0
    large, small = entry(10), entry(10, 1200)

    assert line.send(large, large) == cut(large) * 2
    assert line.calls == [("sendmsg", 10 * STEP)] + [("sendto", STEP)] * 20
    for _ in range(3):
        assert line.send(small, step=1200) == cut(small, 1200)
        assert line.calls == [("sendmsg", 12_000)]
    line.refuse = lambda *_: 0
    singly = 0
    while line.send(large) and line.calls != [("sendmsg", 10 * STEP)]:
        assert line.calls == [("sendto", STEP)] * 10
        singly += 1

    assert SINGLE_ENTRIES - 3 < singly < SINGLE_ENTRIES
    assert line.site.drops() == {}
    assert line.site.stats()["mp.udp.gso_off"] == 0


def test_a_narrow_path_to_one_target_is_none_to_another(line: Line) -> None:
    narrow = line.sink.getsockname()
    line.refuse = lambda _, step, target: errno.EMSGSIZE if step and target == narrow else 0
    train = entry(5)
    assert line.send(train) == cut(train)

    with bound(socket.AF_INET, "127.0.0.1") as other:
        line.site.update(underlay=UdpAddr(IPv4Address("127.0.0.1"), other.getsockname()[1]))
        assert line.send(train) == []
        assert drained([other]) == cut(train)

    assert line.calls == [("sendmsg", 5 * STEP)]


@python_only
def test_what_is_known_of_targets_is_bounded() -> None:
    trains = Trains(on=True)
    for port in range(10_000):
        trains.learn(errno.EMSGSIZE, STEP, 2, ("192.0.2.1", port))

    known = sum(trains.room(STEP, ("192.0.2.1", port), 65_507) == STEP for port in range(10_000))

    assert 0 < known <= 4096


@pytest.mark.parametrize("number", [errno.EIO, errno.EOPNOTSUPP])
def test_where_the_device_cannot_cut_all_goes_singly_from_then_on(line: Line, number: int) -> None:
    line.refuse = lambda _, step, __: number if step else 0
    train = entry(10)

    assert line.send(train, train) == cut(train) * 2
    assert line.send(train) == cut(train)

    assert line.calls == [("sendto", STEP)] * 10
    assert line.site.stats()["mp.udp.gso_off"] == 1
    assert line.drain.given_up == "udp_segment"
    assert line.site.stats()["mp.udp.tx.packets"] == 30
    assert line.site.drops() == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP])
def test_what_is_refused_singly_as_well_says_nothing_against_trains(line: Line, number: int) -> None:
    """EINVAL, for one, is what any datagram to port 0 gets."""
    line.refuse = lambda *_: number
    train = entry(10)
    assert line.send(train) == []
    reason = Drop.UDP_TOO_BIG if number == errno.EMSGSIZE else Drop.UDP_OTHER
    assert line.site.drops() == {reason: 10}

    line.refuse = lambda *_: 0
    assert line.send(train) == cut(train)

    assert line.calls == [("sendmsg", 10 * STEP)]


def test_a_train_to_port_0_is_dropped_and_others_go_on_as_trains(line: Line) -> None:
    """By the kernel itself."""
    train, there = entry(100, 300), line.site.fields.underlay
    line.site.update(underlay=UdpAddr(IPv4Address("127.0.0.1"), 0))
    assert line.send(train, step=300) == []
    assert line.site.drops() == {Drop.UDP_OTHER: 100}

    line.site.update(underlay=there)
    assert line.send(train, step=300) == cut(train, 300)

    assert line.calls == [("sendmsg", 30_000)]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOBUFS, Drop.UDP_FULL),
        (errno.ENOMEM, Drop.UDP_FULL),
        (errno.ENETUNREACH, Drop.UDP_UNREACHABLE),
        (errno.EHOSTUNREACH, Drop.UDP_UNREACHABLE),
        (errno.ENETDOWN, Drop.UDP_UNREACHABLE),
        (errno.EPERM, Drop.UDP_REFUSED_LOCALLY),
        (errno.EACCES, Drop.UDP_OTHER),
    ],
)
def test_the_datagrams_of_a_train_that_is_refused_are_all_counted(
    line: Line, number: int, reason: Drop
) -> None:
    line.refuse = lambda _, step, __: number if step else 0
    first, second = entry(10, last=3), entry(1)

    assert line.send(first, second) == [second]

    assert line.site.drops() == {reason: 11}
    assert line.calls == [("sendmsg", 10 * STEP + 3), ("sendto", STEP)]


@pytest.mark.parametrize("change", [None, UdpAddr(ip_address("2001:db8::1"), 4242)])
def test_the_datagrams_of_a_train_to_nowhere_are_all_counted(line: Line, change: UdpAddr | None) -> None:
    line.site.update(underlay=change)

    assert line.send(entry(10, last=3)) == []

    assert line.site.drops() == {Drop.UDP_UNREACHABLE: 11}


def test_the_answer_to_an_earlier_datagram_costs_a_train_nothing(line: Line) -> None:
    fates = iter([errno.ECONNREFUSED, 0])
    line.refuse = lambda *_: next(fates)
    train = entry(10)

    assert line.send(train) == cut(train)

    assert line.calls == [("sendmsg", 10 * STEP)] * 2
    assert line.site.stats()["mp.rx.icmp"] == 1


def test_a_lost_socket_raises_in_the_middle_of_a_train_and_its_successor_sends_the_area_again(
    line: Line,
) -> None:
    fates = iter([0, errno.EBADF])
    line.refuse = lambda *_: next(fates)
    train = entry(53)
    with pytest.raises(OSError) as lost:
        line.push(train)
    assert lost.value.errno == errno.EBADF
    assert drained([line.sink]) == cut(train)[:49]

    line.refuse = lambda *_: 0
    line.succeed()

    assert drained([line.sink]) == cut(train)
    assert line.site.stats()["mp.udp.tx.packets"] == 49 + 53


@contextmanager
def on_the_wire(make_line: MakeLine, mtu: int) -> Iterator[tuple[Line, OffloadTun]]:
    """A target that no host has, behind a device with this MTU."""
    with (
        private_network(),
        offload_tun("nmptrain0", ["10.60.0.1/24"], mtu, NOTHING) as wire,
        bound(socket.AF_INET, "10.60.0.1") as source,
    ):
        yield make_line(source, source, UdpAddr(IPv4Address("10.60.0.2"), 4242)), wire


def reassembled(fragments: list[bytes]) -> list[bytes]:
    """The datagrams whose IPv4 fragments, in order, these are."""
    payloads: dict[bytes, bytes] = {}
    for each in fragments:
        place = int.from_bytes(each[6:8], "big") & 0x1FFF
        payload = payloads.setdefault(each[4:6], b"")
        assert len(payload) == 8 * place
        payloads[each[4:6]] = payload + each[20:]
    return [payload[8:] for payload in payloads.values()]


@pytest.mark.e2e
def test_on_a_link_with_a_smaller_mtu_the_datagrams_of_a_train_arrive_in_fragments(
    site: Site, make_line: MakeLine
) -> None:
    with on_the_wire(make_line, 1300) as (line, wire):
        train = entry(20, last=9)

        line.push(train)
        frames = [packet for _, packet in wire.expect(41)]

        assert all(len(frame) <= 1300 for frame in frames)
        assert reassembled(frames) == cut(train)
        assert line.calls == [("sendmsg", len(train))] + [("sendto", STEP)] * 20 + [("sendto", 9)]
        assert site.drops() == {}
        assert site.stats()["mp.udp.tx.packets"] == 21


@pytest.mark.e2e
def test_a_train_for_which_the_socket_has_no_room_is_dropped_as_all_its_datagrams(
    site: Site, make_line: MakeLine
) -> None:
    """The first one waits for the address of a neighbour that does not exist."""
    with private_network(), IPRoute() as routes:
        routes.link("add", ifname="nmptrain1", kind="veth", peer="nmptrain2")
        for name in ("nmptrain1", "nmptrain2"):
            routes.link("set", index=routes.link_lookup(ifname=name)[0], state="up")
        routes.addr("add", index=routes.link_lookup(ifname="nmptrain1")[0], address="10.60.0.1", prefixlen=24)
        with bound(socket.AF_INET, "10.60.0.1") as source:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            line = make_line(source, source, UdpAddr(IPv4Address("10.60.0.2"), 4242))

            line.push(entry(16), entry(16), entry(16))

    assert line.calls == [("sendmsg", 16 * STEP)] * 3
    assert site.drops() == {Drop.UDP_FULL: 32}
    assert site.stats()["mp.udp.tx.packets"] == 16
