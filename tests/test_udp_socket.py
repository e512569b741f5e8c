"""The underlay socket: addresses, faults and what is said when it cannot be opened."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from nebula_mp import udp_socket
from nebula_mp.config.model import ListenConfig
from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import UdpAddr
from nebula_mp.udp_socket import (
    DATAGRAM_BYTES_MAX,
    UDP_GRO,
    UDP_SEGMENT,
    SendFault,
    SockAddr,
    UdpSocket,
    from_sockaddr,
    resolve_listen_host,
    to_sockaddr,
)
from tests.support.private_net import private_network


def listen(host: str = "127.0.0.1", port: int = 0, **keys: int) -> ListenConfig:
    return ListenConfig(host=host, port=port, **keys)  # type: ignore[arg-type]


def addr(text: str, port: int = 4242) -> UdpAddr:
    return UdpAddr(ip_address(text), port)


@pytest.fixture
def udp() -> Iterator[UdpSocket]:
    opened = UdpSocket.open(listen())
    yield opened
    opened.close()


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.bind(("127.0.0.1", 0))
        opened.settimeout(5)
        yield opened


def test_datagrams_go_out_and_come_in_with_the_address_they_came_from(
    udp: UdpSocket, peer: socket.socket
) -> None:
    peer.sendto(b"hello", ("127.0.0.1", udp.local.port))
    ((datagram, source),) = udp.receive(10)

    fault = udp.send(b"back", source)

    assert (datagram, source) == (b"hello", addr("127.0.0.1", peer.getsockname()[1]))
    assert fault is None
    assert peer.recvfrom(100) == (b"back", ("127.0.0.1", udp.local.port))


def test_a_budget_bounds_one_batch_and_the_rest_waits(udp: UdpSocket, peer: socket.socket) -> None:
    for number in range(5):
        peer.sendto(bytes([number]), ("127.0.0.1", udp.local.port))

    first = [datagram for datagram, _ in udp.receive(3)]
    second = [datagram for datagram, _ in udp.receive(3)]

    assert first == [b"\0", b"\1", b"\2"]
    assert second == [b"\3", b"\4"]


def test_a_source_seen_before_is_the_same_object_and_the_cache_is_bounded(
    udp: UdpSocket, peer: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp_socket, "_CACHE_ENTRIES_MAX", 2)
    for _ in range(2):
        peer.sendto(b"x", ("127.0.0.1", udp.local.port))
    (_, first), (_, second) = udp.receive(10)
    for _ in range(4):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"x", ("127.0.0.1", udp.local.port))
    list(udp.receive(10))

    assert first is second
    assert len(udp._sources) <= 2


def test_a_datagram_longer_than_any_node_reads_is_dropped_alone_and_counted(
    udp: UdpSocket, peer: socket.socket
) -> None:
    for size in (DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MAX + 1, 20_000, 0):
        peer.sendto(bytes(size), ("127.0.0.1", udp.local.port))

    received = [len(datagram) for datagram, _ in udp.receive(10)]

    assert received == [DATAGRAM_BYTES_MAX, 0]
    assert udp.oversize == 2


def test_a_dual_stack_socket_speaks_ipv4_without_ever_showing_a_mapped_address(peer: socket.socket) -> None:
    dual = UdpSocket.open(listen("::"))
    peer.sendto(b"from four", ("127.0.0.1", dual.local.port))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
        six.bind(("::1", 0))
        six.settimeout(5)
        six.sendto(b"from six", ("::1", dual.local.port))
        sources = dict(dual.receive(10))
        faults = [dual.send(b"back", source) for source in sources.values()]
        answers = {peer.recv(100), six.recv(100)}
        six_port = six.getsockname()[1]
    dual.close()

    assert sources == {
        b"from four": addr("127.0.0.1", peer.getsockname()[1]),
        b"from six": addr("::1", six_port),
    }
    assert faults == [None, None]
    assert answers == {b"back"}


@pytest.mark.parametrize(
    ("sockaddr", "address"),
    [
        pytest.param(("192.0.2.1", 4242), addr("192.0.2.1"), id="ipv4"),
        pytest.param(("::ffff:192.0.2.1", 4242, 0, 0), addr("192.0.2.1"), id="mapped"),
        pytest.param(("2001:db8::1", 4242, 0, 0), addr("2001:db8::1"), id="ipv6"),
        pytest.param(("fe80::1", 4242, 0, 3), addr("fe80::1%3"), id="link-local keeps its scope"),
        pytest.param(("fe80::1%eth0", 4242, 0, 3), addr("fe80::1%3"), id="scope named twice"),
        pytest.param(("2001:db8::1", 4242, 7, 0), addr("2001:db8::1"), id="flow label is no address"),
    ],
)
def test_addresses_of_the_kernel_become_ours(sockaddr: SockAddr, address: UdpAddr) -> None:
    assert from_sockaddr(sockaddr) == address


@pytest.mark.parametrize(
    ("address", "dual", "sockaddr"),
    [
        pytest.param(addr("192.0.2.1"), False, ("192.0.2.1", 4242), id="ipv4 by ipv4"),
        pytest.param(addr("192.0.2.1"), True, ("::ffff:192.0.2.1", 4242, 0, 0), id="ipv4 by dual"),
        pytest.param(addr("2001:db8::1"), True, ("2001:db8::1", 4242, 0, 0), id="ipv6 by dual"),
        pytest.param(addr("fe80::1%3"), True, ("fe80::1", 4242, 0, 3), id="link-local"),
        pytest.param(addr("2001:db8::1"), False, None, id="ipv6 by ipv4"),
    ],
)
def test_our_addresses_become_those_of_the_kernel(
    address: UdpAddr, dual: bool, sockaddr: SockAddr | None
) -> None:
    assert to_sockaddr(address, dual=dual) == sockaddr


class FailingSocket(socket.socket):
    """Raises the given errors, one per send, then sends nothing and is content."""

    def __init__(self, *errors: int) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_DGRAM)
        self.errors = list(errors)
        self.sent = 0

    def sendto(self, *_: object) -> int:
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        self.sent += 1
        return 0


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.ENOBUFS, SendFault.DROPPED),
        (errno.ENOMEM, SendFault.DROPPED),
        (errno.ENETUNREACH, SendFault.UNREACHABLE),
        (errno.EHOSTUNREACH, SendFault.UNREACHABLE),
        (errno.ENETDOWN, SendFault.UNREACHABLE),
        (errno.EADDRNOTAVAIL, SendFault.UNREACHABLE),
        (errno.EAFNOSUPPORT, SendFault.UNREACHABLE),
        (errno.EMSGSIZE, SendFault.TOO_BIG),
        (errno.EPERM, SendFault.REFUSED_LOCALLY),
        (errno.EINVAL, SendFault.OTHER),
        (errno.EACCES, SendFault.OTHER),
    ],
)
def test_each_fault_of_the_network_drops_one_datagram_under_its_own_name(
    number: int, fault: SendFault
) -> None:
    with FailingSocket(number) as failing:
        udp = UdpSocket(failing)

        assert udp.send(b"x", addr("192.0.2.1")) is fault
        assert udp.send(b"x", addr("192.0.2.1")) is None
        assert failing.sent == 1


def test_a_full_buffer_is_waited_for_once_and_then_the_datagram_is_dropped() -> None:
    with FailingSocket(errno.EAGAIN) as short, FailingSocket(errno.EAGAIN, errno.EAGAIN) as long:
        assert UdpSocket(short).send(b"x", addr("192.0.2.1")) is None
        assert UdpSocket(long).send(b"x", addr("192.0.2.1")) is SendFault.DROPPED
        assert (short.sent, long.sent) == (1, 0)


def test_the_error_of_an_earlier_datagram_does_not_cost_this_one() -> None:
    with FailingSocket(errno.ECONNREFUSED) as failing:
        udp = UdpSocket(failing)

        assert udp.send(b"x", addr("192.0.2.1")) is None
        assert (failing.sent, udp.icmp) == (1, 1)


def test_a_socket_that_is_gone_is_no_fault_of_the_network() -> None:
    with FailingSocket(errno.EBADF) as failing, pytest.raises(OSError, match="Bad file descriptor"):
        UdpSocket(failing).send(b"x", addr("192.0.2.1"))


# ---- datagrams that the kernel has joined ----


@pytest.fixture
def joined() -> Iterator[UdpSocket]:
    """A socket that takes batches."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as opened:
        opened.bind(("127.0.0.1", 0))
        opened.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        yield UdpSocket(opened, coalesces=True)


def send_batch(peer: socket.socket, to: UdpSocket, data: bytes, size: int) -> None:
    """Send datagrams of one size, the last may be shorter, which the loopback interface leaves together."""
    note = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))
    peer.sendmsg([data], [note], 0, ("127.0.0.1", to.local.port))


def test_a_batch_is_split_into_the_datagrams_that_were_sent(joined: UdpSocket, peer: socket.socket) -> None:
    data = bytes(range(256)) * 4 + b"end"
    send_batch(peer, joined, data, 100)
    peer.sendto(b"alone", ("127.0.0.1", joined.local.port))
    peer.sendto(b"", ("127.0.0.1", joined.local.port))
    source = addr("127.0.0.1", peer.getsockname()[1])

    received = list(joined.receive(100))

    pieces = [data[at : at + 100] for at in range(0, len(data), 100)]
    assert received == [(each, source) for each in (*pieces, b"alone", b"")]
    assert joined.oversize == 0


def test_a_budget_counts_the_datagrams_of_a_batch_and_never_splits_one(
    joined: UdpSocket, peer: socket.socket
) -> None:
    for _ in range(4):
        send_batch(peer, joined, bytes(1000), 100)

    counts = [len(list(joined.receive(11))) for _ in range(3)]

    assert counts == [20, 20, 0]


def test_a_batch_of_64_kib_is_taken_whole(joined: UdpSocket, peer: socket.socket) -> None:
    send_batch(peer, joined, bytes(65_000), 1300)

    assert [len(datagram) for datagram, _ in joined.receive(64)] == 50 * [1300]


def test_datagrams_of_a_batch_that_are_too_long_are_dropped_and_each_is_counted(
    joined: UdpSocket, peer: socket.socket
) -> None:
    send_batch(peer, joined, bytes(3 * (DATAGRAM_BYTES_MAX + 1)), DATAGRAM_BYTES_MAX + 1)
    peer.sendto(bytes(DATAGRAM_BYTES_MAX + 1), ("127.0.0.1", joined.local.port))
    send_batch(peer, joined, bytes(2 * DATAGRAM_BYTES_MAX), DATAGRAM_BYTES_MAX)

    received = [len(datagram) for datagram, _ in joined.receive(10)]

    assert received == [DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MAX]
    assert joined.oversize == 4


def test_a_batch_that_was_cut_off_is_dropped_and_counted_as_too_long(
    joined: UdpSocket, peer: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp_socket, "_BATCH_BYTES_MAX", 450)
    send_batch(peer, joined, bytes(1000), 100)
    peer.sendto(b"next", ("127.0.0.1", joined.local.port))

    received = [datagram for datagram, _ in joined.receive(10)]

    assert received == [b"next"]
    assert joined.oversize == 5


def test_errors_of_earlier_datagrams_are_counted_where_batches_are_taken_too(joined: UdpSocket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()
    with socket.socket(fileno=os.dup(joined.fileno())) as view:
        view.connect(nobody)  # only then does Linux say what became of a datagram
        view.send(b"x")

    assert list(joined.receive(10)) == []
    assert joined.icmp == 1


def test_this_kernel_cuts_what_is_sent(udp: UdpSocket) -> None:
    assert udp.segmentation_error() is None


def test_a_kernel_that_cannot_cut_is_found_out_without_sending() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:  # knows no option of UDP
        assert UdpSocket(other).segmentation_error() == "ENOPROTOOPT"


def test_ipv6_through_an_ipv4_socket_is_unreachable(udp: UdpSocket) -> None:
    assert udp.send(b"x", addr("2001:db8::1")) is SendFault.UNREACHABLE


def test_a_datagram_too_large_for_udp_is_told_apart(udp: UdpSocket) -> None:
    assert udp.send(bytes(65_536), addr("127.0.0.1", 9)) is SendFault.TOO_BIG


def test_the_descriptor_is_non_blocking_and_closed_on_exec(udp: UdpSocket) -> None:
    assert os.get_blocking(udp.fileno()) is False
    assert os.get_inheritable(udp.fileno()) is False


def test_a_taken_port_is_named_with_the_process_that_holds_it(udp: UdpSocket) -> None:
    with pytest.raises(SystemCallError) as caught:
        UdpSocket.open(listen(port=udp.local.port))

    assert caught.value.exit_code == 1
    assert f"udp 127.0.0.1:{udp.local.port}: the port is taken by " in str(caught.value)
    assert f"(pid {os.getpid()}): stop it, or choose another listen.port" in str(caught.value)


def test_an_address_of_another_machine_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        SystemCallError, match=r"no interface .* has the address 192\.0\.2\.77 .*listen\.host"
    ):
        UdpSocket.open(listen("192.0.2.77"))


def test_a_name_without_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    with pytest.raises(SystemCallError, match=r"listen\.host 'nowhere': Name or service not known"):
        resolve_listen_host("nowhere")


@pytest.mark.parametrize(
    ("text", "address"),
    [("0.0.0.0", "0.0.0.0"), ("::", "::"), ("[::]", "::"), ("[2001:db8::1]", "2001:db8::1")],
)
def test_literals_are_taken_with_and_without_brackets(text: str, address: str) -> None:
    assert resolve_listen_host(text) == ip_address(address)


def test_a_buffer_the_kernel_grants_is_silent_and_one_it_cuts_is_a_warning(
    udp: UdpSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted = udp.configure(listen(read_buffer=50_000, write_buffer=50_000))
    monkeypatch.setattr(udp_socket, "_SO_RCVBUFFORCE", 0x7FFF)  # as if without the capability
    cut = udp.configure(listen(read_buffer=1 << 30))

    assert granted == ()
    assert len(cut) == 1
    assert "listen.read_buffer: the kernel granted" in cut[0]
    assert f"of {1 << 30} bytes" in cut[0]


def test_zero_and_absent_leave_the_buffers_alone(udp: UdpSocket) -> None:
    before = udp._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    assert udp.configure(listen(read_buffer=0)) == ()
    assert udp._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before


def test_what_the_kernel_dropped_for_want_of_room_is_known(udp: UdpSocket, peer: socket.socket) -> None:
    udp._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(50):
        peer.sendto(bytes(1000), ("127.0.0.1", udp.local.port))

    kept = len(list(udp.receive(100)))

    assert kept + udp.kernel_drops() == 50
    assert udp.kernel_drops() > 0


@pytest.mark.e2e
def test_a_mark_is_set_and_going_back_to_zero_clears_it(udp: UdpSocket) -> None:
    udp.configure(listen(so_mark=7))
    marked = udp._socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
    udp.configure(listen())

    assert marked == 7
    assert udp._socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0


@pytest.mark.e2e
def test_a_network_without_routes_drops_datagrams_as_unreachable() -> None:
    with private_network():
        udp = UdpSocket.open(listen("0.0.0.0"))
        fault = udp.send(b"x", addr("192.0.2.1"))
        udp.close()

    assert fault is SendFault.UNREACHABLE
