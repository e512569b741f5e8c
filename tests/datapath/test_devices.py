"""Real TUN queues and UDP sockets: two hosts, each with a network of its own, and what devices refuse.

Data flow: near stack -> TUN -> near site -> UDP -> far site -> TUN -> far stack, and back
"""

import errno
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address, ip_interface
from pathlib import Path
from typing import NamedTuple

import pytest
from pyroute2 import IPRoute

from nebula_mp import netlink
from nebula_mp.config.model import Offloads, TunConfig
from nebula_mp.datapath.api import Drop
from nebula_mp.ioctl_tun import TunDevice
from nebula_mp.newtypes import IPAddress, UdpAddr
from nebula_mp.wire.ip import TCP, UDP, FlowKey
from tests.datapath.sites import FAR, NEAR, TIMEOUT_MS, Site, connect, deliver, message, packet
from tests.datapath.superpackets import Plan
from tests.support import rings
from tests.support.offload_tun import EVERYTHING, NOTHING, OffloadTun, offload_tun
from tests.support.packets import ACK, SYN
from tests.support.private_net import private_network

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("kernel")]

NAME = "nmpdp0"
PATIENCE_S = 10.0


class Host:
    """A site, made in the underlay, and its device and sockets, made in a network of its own."""

    def __init__(self, address: IPAddress, closing: ExitStack) -> None:
        self.address = str(address)
        self.site = Site()
        closing.callback(self.site.close)
        self._closing = closing

    def move_in(self) -> None:
        """Make the device and the sockets of the local stack, in the network this thread is in."""
        self.device, _ = TunDevice.open(TunConfig(dev=NAME))
        self._closing.callback(self.device.close)
        netlink.configure(NAME, [ip_interface(f"{self.address}/16")], 1300)
        self.site.tun_fd = self.device.fileno()
        self.udp = self._socket(socket.SOCK_DGRAM)
        self.tcp = self._socket(socket.SOCK_STREAM)

    def _socket(self, kind: socket.SocketKind) -> socket.socket:
        made = self._closing.enter_context(socket.socket(socket.AF_INET, kind))
        made.bind((self.address, 5000))
        made.setblocking(False)
        return made

    def allow(self, other: "Host", protocol: int) -> None:
        """Let control admit port 5000 to port 5000."""
        local, remote = (IPv4Address(each.address).packed for each in (self, other))
        flow = FlowKey(local, remote, 5000, 5000, protocol, fragment=False)
        self.site.flows.allow(flow, self.site.peer, TIMEOUT_MS, 1_000_000)

    def attach(self) -> None:
        self._reader = self.site.reader()

    def work(self) -> None:
        """One pass of everything."""
        self._reader.sealer.poll(64)
        self._reader.opener.poll(64)
        self.site.send()
        self.site.write()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with ExitStack() as closing:
        closing.enter_context(private_network())
        near, far = Host(NEAR, closing), Host(FAR, closing)
        connect(near.site, far.site.address())
        connect(far.site, near.site.address(), mirrored=True)
        for host, other in ((near, far), (far, near)):
            closing.enter_context(private_network())
            host.move_in()
            host.allow(other, TCP)
            host.allow(other, UDP)
            host.attach()
        yield near, far


def work_until(hosts: tuple[Host, Host], done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, [host.site.stats() for host in hosts]
        for host in hosts:
            host.work()


def test_datagrams_of_a_real_stack_arrive_both_ways(hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    sent = [random.Random(size).randbytes(size) for size in (0, 1, 100, 1272, 1000, 7)]
    for sender, receiver in ((near, far), (far, near)):
        got: list[bytes] = []
        for each in sent:
            sender.udp.sendto(each, (receiver.address, 5000))

        def done(receiver: Host = receiver, got: list[bytes] = got) -> bool:
            with suppress(BlockingIOError):
                got.append(receiver.udp.recv(2000))
            return len(got) == len(sent)

        work_until(hosts, done)
        assert got == sent
    for host in hosts:
        assert host.site.drops() == {}
        assert host.site.upcalls() == []
        host.site.check_ledger()


def test_a_tcp_transfer_of_a_real_stack_is_complete_and_correct(hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    data = random.Random(1).randbytes(500_000)
    far.tcp.listen(1)
    assert near.tcp.connect_ex((far.address, 5000)) == errno.EINPROGRESS
    accepted: list[socket.socket] = []
    sent = 0
    got = bytearray()

    def done() -> bool:
        nonlocal sent
        with suppress(BlockingIOError):
            if not accepted:
                accepted.append(far.tcp.accept()[0])
                accepted[0].setblocking(False)
            got.extend(accepted[0].recv(1 << 16))
        with suppress(BlockingIOError):
            sent += near.tcp.send(data[sent : sent + (1 << 16)])
        return len(got) == len(data)

    try:
        work_until(hosts, done)
    finally:
        for each in accepted:
            each.close()

    assert bytes(got) == data
    for host in hosts:
        assert host.site.drops() == {}
        host.site.check_ledger()


@pytest.fixture
def host() -> Iterator[Host]:
    """One host whose peer is a socket; all in one network."""
    with ExitStack() as closing:
        closing.enter_context(private_network())
        made = Host(NEAR, closing)
        connect(made.site)
        made.move_in()
        made.attach()
        yield made


def test_a_device_that_is_down_refuses_packets_and_takes_them_when_it_is_up_again(host: Host) -> None:
    back = packet(1, back=True)
    host.site.allow(back, inbound=True)
    with IPRoute() as routes:
        (index,) = routes.link_lookup(ifname=NAME)
        for counter, state in ((3, "down"), (4, "up")):
            routes.link("set", index=index, state=state)
            deliver(host.site, message(counter, back))
            host.work()

    assert host.site.drops() == {Drop.TUN_REFUSED: 1}
    assert host.site.stats()["mp.tun.tx.packets"] == 1
    host.site.check_ledger()


def test_a_deleted_device_raises_in_both_directions(host: Host) -> None:
    back = packet(1, back=True)
    host.site.allow(back, inbound=True)
    deliver(host.site, message(3, back))
    host._reader.opener.poll(10)
    with IPRoute() as routes:
        (index,) = routes.link_lookup(ifname=NAME)
        routes.link("del", index=index)

    with pytest.raises(OSError, match=r"descriptor|address") as reading:
        host._reader.sealer.poll(10)
    with pytest.raises(OSError, match=r"descriptor|address") as writing:
        host.site.write()

    assert {reading.value.errno, writing.value.errno} <= {errno.EBADFD, errno.EFAULT}


@pytest.mark.parametrize(
    ("size", "where", "reason"),
    [
        pytest.param(40, "192.0.2.1", Drop.UDP_UNREACHABLE, id="no route"),
        pytest.param(65_470, "127.0.0.1", Drop.UDP_TOO_BIG, id="larger than UDP"),
    ],
)
def test_what_the_kernel_refuses_to_send_is_counted(host: Host, size: int, where: str, reason: Drop) -> None:
    out = packet(1, size)
    host.site.update(underlay=UdpAddr(IPv4Address(where), 4242))
    host.site.allow(out)
    host.site.tun_fd = host.site.tun.fileno()  # whose packets may have any size
    host.attach()
    host.site.inside.send(out)

    host.work()

    assert host.site.drops() == {reason: 1}
    host.site.check_ledger()


# Superpackets, written to a device of which each packet has a virtio header.


class Stack(NamedTuple):
    """A local stack, `tun` its device, and the site whose open ring is drained into it."""

    site: Site
    tun: OffloadTun

    def write(self, plan: Plan) -> None:
        """Publish and drain a superpacket, or the one packet that it is."""
        producer = rings.produce(self.site.opened[0], poison=True)
        assert producer.try_begin()
        single = plan.count == 1
        frame = bytes(10) + plan.one(0) if single else plan.virtio() + plan.packet()
        assert producer.try_add(frame, plan.count)
        producer.publish()
        assert self.site.write() == 1

    def listen(self, version: int, kind: socket.SocketKind) -> socket.socket:
        """Make a socket where the plans' packets go."""
        family, host = ((socket.AF_INET, "10.50.2.2"), (socket.AF_INET6, "fd00:50:2::2"))[version == 6]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        made.settimeout(PATIENCE_S)
        made.bind((host, 50_000))
        return made


@contextmanager
def stack_with(offloads: int) -> Iterator[Stack]:
    """A device with these offloads, in a network that has the addresses of the plans."""
    with ExitStack() as closing:
        closing.enter_context(private_network())
        addresses = ["10.50.2.2/16", "fd00:50:2::2/32"]
        tun = closing.enter_context(offload_tun("nmpsuper0", addresses, 1300, offloads))
        site = Site(offloads=Offloads(udp_segment=False, udp_gro=False))
        closing.callback(site.close)
        site.tun_fd = tun.fileno()
        yield Stack(site, tun)


def checksum_errors() -> int:
    """As the stack of this thread's network counts them, of TCP and UDP."""
    lines = [line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()]
    found = sum(
        int(value)
        for names, values in zip(lines[::2], lines[1::2], strict=True)
        for name, value in zip(names, values, strict=True)
        if name == "InCsumErrors"
    )
    six = dict(line.split() for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines())
    return found + int(six["Udp6InCsumErrors"])


every_offload = pytest.mark.parametrize("offloads", [EVERYTHING, NOTHING], ids=["asked for", "not asked for"])
every_version = pytest.mark.parametrize("version", [4, 6])


@every_offload
@every_version
def test_a_udp_superpacket_arrives_as_its_datagrams_whatever_the_device_was_asked_for(
    version: int, offloads: int
) -> None:
    payload = random.Random(version).randbytes(30_000)
    plan = Plan(version, UDP, payload, 1200 - 7)
    with stack_with(offloads) as stack, stack.listen(version, socket.SOCK_DGRAM) as sink:
        stack.write(plan)
        arrived = [sink.recv(2000) for _ in range(plan.count)]

        assert arrived == [payload[at : at + plan.size] for at in range(0, len(payload), plan.size)]
        assert stack.site.drops() == {}
        assert stack.site.stats()["mp.tun.tx.packets"] == plan.count == 26
        assert stack.site.stats()["mp.tun.tx.bytes"] == sum(map(len, plan.packets()))
        assert checksum_errors() == 0


@every_offload
@every_version
def test_tcp_superpackets_arrive_as_one_stream_whatever_the_device_was_asked_for(
    version: int, offloads: int
) -> None:
    payload = random.Random(version).randbytes(30_000)
    with stack_with(offloads) as stack, stack.listen(version, socket.SOCK_STREAM) as listener:
        listener.listen(1)
        opening = Plan(version, TCP, b"", 1200, flags=SYN, acknowledgement=0, window=65_535)
        stack.write(opening)
        ((_, answer),) = stack.tun.expect(1)
        theirs = int.from_bytes(answer[opening.transport + 4 : opening.transport + 8], "big")
        data = replace(
            opening,
            flags=ACK,
            payload=payload[:20_000],
            sequence=opening.sequence + 1,
            acknowledgement=theirs + 1,
        )
        stack.write(data)
        accepted, _ = listener.accept()
        with accepted:
            stack.write(replace(data, payload=payload[20_000:], sequence=data.sequence + 20_000))
            accepted.settimeout(PATIENCE_S)
            arrived = bytearray()
            while len(arrived) < len(payload):
                arrived += accepted.recv(65_536)

        assert arrived == payload
        assert stack.site.drops() == {}
        assert stack.site.stats()["mp.tun.tx.packets"] == 1 + 17 + 9
        assert checksum_errors() == 0


def test_a_superpacket_for_a_device_that_is_down_is_counted_as_its_packets() -> None:
    plan = Plan(4, UDP, bytes(30_000), 1200)
    with stack_with(EVERYTHING) as stack, IPRoute() as routes:
        (index,) = routes.link_lookup(ifname="nmpsuper0")
        for state in ("down", "up"):
            routes.link("set", index=index, state=state)
            stack.write(plan)

        assert stack.site.drops() == {Drop.TUN_REFUSED: 25}
        assert stack.site.stats()["mp.tun.tx.packets"] == 25


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(bytes(10), id="no packet"),
        pytest.param(b"\x01\x07" + bytes(8) + bytes(60), id="unknown kind"),
        pytest.param(Plan(4, UDP, bytes(3000), 1200).virtio()[:4] + bytes(6) + bytes(60), id="no size"),
        pytest.param(bytes(10) + b"\x00" * 40, id="neither IPv4 nor IPv6"),
    ],
)
def test_a_contradictory_superpacket_costs_itself_and_nothing_else(frame: bytes) -> None:
    plan = Plan(4, UDP, bytes(30_000), 1200)
    with stack_with(EVERYTHING) as stack:
        producer = rings.produce(stack.site.opened[0])
        assert producer.try_begin()
        assert producer.try_add(frame, 3)
        assert producer.try_add(plan.virtio() + plan.packet(), plan.count)
        producer.publish()
        stack.site.write()

        assert stack.site.drops() == {Drop.TUN_REFUSED: 3}
        assert stack.site.stats()["mp.tun.tx.packets"] == 25
