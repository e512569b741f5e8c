"""Real TUN queues and UDP sockets: two hosts, each with a network of its own, and what devices refuse.

Data flow: near stack -> TUN -> near site -> UDP -> far site -> TUN -> far stack, and back
"""

import errno
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address, ip_interface

import pytest
from pyroute2 import IPRoute

from nebula_mp import netlink
from nebula_mp.config.model import TunConfig
from nebula_mp.datapath.api import Drop
from nebula_mp.ioctl_tun import TunDevice
from nebula_mp.newtypes import IPAddress, UdpAddr
from nebula_mp.wire.ip import TCP, UDP, FlowKey
from tests.datapath.sites import FAR, NEAR, TIMEOUT_MS, Site, connect, deliver, message, packet
from tests.support.private_net import private_network

pytestmark = pytest.mark.e2e

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
