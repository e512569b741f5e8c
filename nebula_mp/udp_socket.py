"""The underlay socket: one non-blocking UDP socket, IPv4 or dual-stack IPv6.

Data flow: UDP :4242 -> [udp_socket] -> workers.control -> [udp_socket] -> UDP
Makes system calls and names their faults; which fault leads to what is decided by the caller.
Knows nothing of what is inside a datagram.
Source: udp(7) on UDP_SEGMENT and UDP_GRO, ipv6(7), socket(7); Nebula's `listen` keys.
"""

import errno
import ipaddress
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from enum import StrEnum

import psutil

from nebula_mp.config.model import ListenConfig
from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import IPAddress, UdpAddr

DATAGRAM_BYTES_MAX = 9001
"""The largest datagram a Nebula node reads; a longer one is dropped."""

UDP_SEGMENT = 103
UDP_GRO = 104

_BATCH_BYTES_MAX = 1 << 16  # what the kernel joins at most; what does not fit would be lost
_SIZE = struct.Struct("=i")  # of each datagram of a batch
_CONTROL_BYTES = socket.CMSG_SPACE(_SIZE.size)
_CACHE_ENTRIES_MAX = 4096
_SEND_WAIT_MS = 1
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")  # rmem_alloc, rcvbuf, wmem_alloc, sndbuf, fwd_alloc, ..., backlog, drops

SockAddr = tuple[str, int] | tuple[str, int, int, int]


class SendFault(StrEnum):
    """Why a datagram was not sent; the value is the name of its counter."""

    DROPPED = "udp.tx.dropped"  # no room within a millisecond, or no memory
    UNREACHABLE = "mp.udp.drop.unreachable"  # no route, link down, or a family this socket cannot send
    TOO_BIG = "mp.udp.drop.toobig"
    REFUSED_LOCALLY = "mp.udp.drop.eperm"  # a local firewall said no
    OTHER = "mp.udp.drop.other"


_FAULTS = {
    errno.ENOBUFS: SendFault.DROPPED,
    errno.ENOMEM: SendFault.DROPPED,
    errno.ENETUNREACH: SendFault.UNREACHABLE,
    errno.EHOSTUNREACH: SendFault.UNREACHABLE,
    errno.ENETDOWN: SendFault.UNREACHABLE,
    errno.EADDRNOTAVAIL: SendFault.UNREACHABLE,
    errno.EAFNOSUPPORT: SendFault.UNREACHABLE,
    errno.EMSGSIZE: SendFault.TOO_BIG,
    errno.EPERM: SendFault.REFUSED_LOCALLY,
}
_OURS = frozenset({errno.EBADF, errno.ENOTSOCK, errno.EFAULT})
"""Faults no network can cause: the socket itself is lost."""

_ICMP = frozenset({errno.ECONNREFUSED, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET})
"""Answers to an earlier datagram that the kernel reports at a later call."""


class UdpSocket:
    """`open`, then `receive` when readable and `send` at any time; `close` ends it.

    `receive` and `send` do not raise for anything that a network or a peer can cause. An OSError that
    they do raise means that the socket is gone.
    """

    def __init__(self, sock: socket.socket, *, coalesces: bool = False) -> None:
        """`coalesces` says whether UDP_GRO is on, which not every kernel that has it can be asked."""
        self._socket = sock
        self._coalesces = coalesces
        self._dual = sock.family == socket.AF_INET6
        self._sources: dict[SockAddr, UdpAddr] = {}
        self._targets: dict[UdpAddr, SockAddr] = {}
        self._last_to: UdpAddr | None = None
        self._last_target: SockAddr | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLOUT)
        self.oversize = 0  # datagrams dropped because they were longer than DATAGRAM_BYTES_MAX
        self.icmp = 0  # errors of earlier datagrams that the kernel reported

    @classmethod
    def open(cls, config: ListenConfig) -> "UdpSocket":
        """Bind to `listen.host` and `listen.port`.

        Raises SystemCallError that names the address, the reason and what to do.
        """
        host = resolve_listen_host(config.host)
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise _open_error(host, config.port, error) from None
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(_bind_address(host, config.port))
        except OSError as error:
            sock.close()
            raise _open_error(host, config.port, error) from None
        return cls(sock)

    def fileno(self) -> int:
        """Give the descriptor, which this object owns."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; may be called again."""
        self._socket.close()

    @property
    def local(self) -> UdpAddr:
        """The bound address with the port the kernel chose."""
        name = self._socket.getsockname()
        return UdpAddr(ipaddress.ip_address(name[0].partition("%")[0]), name[1])

    def configure(self, config: ListenConfig) -> tuple[str, ...]:
        """Apply buffers and mark, at start and at a reload. Returns warnings, one line each.

        Raises SystemCallError (exit 4) when the mark is refused; buffers are then untouched.
        """
        try:
            mark = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
            if config.so_mark != mark:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, config.so_mark)
        except OSError as error:
            raise SystemCallError(
                f"listen.so_mark {config.so_mark}: refused ({_name(error)}):"
                " grant CAP_NET_ADMIN, or remove the key",
                exit_code=4 if error.errno == errno.EPERM else 1,
            ) from None
        warnings = []
        for key, size, force, plain in (
            ("listen.read_buffer", config.read_buffer, _SO_RCVBUFFORCE, socket.SO_RCVBUF),
            ("listen.write_buffer", config.write_buffer, _SO_SNDBUFFORCE, socket.SO_SNDBUF),
        ):
            if size:
                granted = self._set_buffer(size, force, plain)
                if granted < size:
                    warnings.append(
                        f"{key}: the kernel granted {granted} of {size} bytes; raise net.core.rmem_max and"
                        " net.core.wmem_max, or grant CAP_NET_ADMIN"
                    )
        return tuple(warnings)

    def _set_buffer(self, size: int, force: int, plain: int) -> int:
        """Give the size that was granted, in bytes as asked for (the kernel states twice that)."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, size)
        except OSError:
            self._socket.setsockopt(socket.SOL_SOCKET, plain, size)
        return self._socket.getsockopt(socket.SOL_SOCKET, plain) // 2

    def kernel_drops(self) -> int:
        """Datagrams the kernel dropped because the receive buffer was full, since the socket was opened."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        return int(_MEMINFO.unpack(raw)[8]) if len(raw) == _MEMINFO.size else 0

    def receive(self, budget: int) -> Iterator[tuple[bytes, UdpAddr]]:
        """At most `budget` datagrams, until the socket is empty; more if the last come as one batch.

        Dropped ones (too long) count against the budget, so a flood of them cannot hold the loop.
        """
        return self._receive_batches(budget) if self._coalesces else self._receive_singles(budget)

    def _receive_singles(self, budget: int) -> Iterator[tuple[bytes, UdpAddr]]:
        """One system call for each."""
        for _ in range(budget):
            try:
                datagram, source = self._socket.recvfrom(DATAGRAM_BYTES_MAX + 1)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OURS:
                    raise
                self.icmp += 1
                continue
            if len(datagram) > DATAGRAM_BYTES_MAX:
                self.oversize += 1
                continue
            address = self._sources.get(source)
            yield datagram, address if address is not None else self._learn_source(source)

    def _receive_batches(self, budget: int) -> Iterator[tuple[bytes, UdpAddr]]:
        """One system call for all that the kernel has joined: of one size, but the last may be shorter."""
        batch = memoryview(bytearray(_BATCH_BYTES_MAX))
        while budget > 0:
            try:
                length, notes, flags, source = self._socket.recvmsg_into([batch], _CONTROL_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OURS:
                    raise
                self.icmp += 1
                budget -= 1
                continue
            size = _datagram_size(notes, length)
            starts = range(0, max(1, length), size)
            budget -= len(starts)
            if flags & socket.MSG_TRUNC or size > DATAGRAM_BYTES_MAX:
                self.oversize += len(starts)
                continue
            address = self._sources.get(source)
            if address is None:
                address = self._learn_source(source)
            for start in starts:
                yield bytes(batch[start : min(start + size, length)]), address

    def segmentation_error(self) -> str | None:
        """Why the kernel does not cut what is sent into datagrams (UDP_SEGMENT); None if it does."""
        try:
            self._socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
        except OSError as error:
            return _name(error)
        return None

    def send(self, datagram: bytes, to: UdpAddr) -> SendFault | None:
        """Send one datagram; None, or why it was dropped. Waits at most 1 ms for room in the buffer."""
        target = self._last_target
        if to is not self._last_to:  # mostly the same peer's again, and to hash an address takes 0.16 us
            target = self._targets.get(to) or self._learn_target(to)
            self._last_to, self._last_target = to, target
        if target is None:
            return SendFault.UNREACHABLE
        for last in (False, True):
            try:
                self._socket.sendto(datagram, target)
            except BlockingIOError:
                if last or not self._poll.poll(_SEND_WAIT_MS):
                    return SendFault.DROPPED
            except OSError as error:
                if error.errno in _OURS:
                    raise
                if error.errno not in _ICMP or last:
                    return _FAULTS.get(error.errno or 0, SendFault.OTHER)
                self.icmp += 1
            else:
                return None
        return SendFault.DROPPED

    def _learn_source(self, source: SockAddr) -> UdpAddr:
        """Strangers choose the keys of this cache, so it is emptied when it is full."""
        if len(self._sources) >= _CACHE_ENTRIES_MAX:
            self._sources.clear()
        address = self._sources[source] = from_sockaddr(source)
        return address

    def _learn_target(self, to: UdpAddr) -> SockAddr | None:
        target = to_sockaddr(to, dual=self._dual)
        if target is not None:
            if len(self._targets) >= _CACHE_ENTRIES_MAX:
                self._targets.clear()
            self._targets[to] = target
        return target


def _datagram_size(notes: Sequence[tuple[int, int, bytes]], length: int) -> int:
    """The size of each datagram of what was received but the last: all of it where nothing was joined."""
    for level, kind, data in notes:
        if level == socket.IPPROTO_UDP and kind == UDP_GRO and len(data) == _SIZE.size:
            return max(1, int(_SIZE.unpack(data)[0]))
    return max(1, length)


def from_sockaddr(source: SockAddr) -> UdpAddr:
    """Our form of an address the kernel gave: 4-in-6 becomes IPv4, a link-local one keeps its scope."""
    ip = ipaddress.ip_address(source[0].partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return UdpAddr(ip.ipv4_mapped, source[1])
        if ip.is_link_local and len(source) == 4 and source[3]:
            return UdpAddr(ipaddress.IPv6Address(f"{ip}%{source[3]}"), source[1])
    return UdpAddr(ip, source[1])


def to_sockaddr(to: UdpAddr, *, dual: bool) -> SockAddr | None:
    """Spell an address for the kernel, for a dual-stack or an IPv4 socket; None if that cannot send to it."""
    ip = to.ip
    if isinstance(ip, ipaddress.IPv4Address):
        return (f"::ffff:{ip}", to.port, 0, 0) if dual else (str(ip), to.port)
    if not dual:
        return None
    text, _, scope = str(ip).partition("%")
    return text, to.port, 0, int(scope) if scope.isdecimal() else 0


def resolve_listen_host(host: str) -> IPAddress:
    """`listen.host`: a literal, `[::]`, or a name whose first address is taken.

    Raises SystemCallError when a name has no address.
    """
    literal = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return ipaddress.ip_address(literal)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise SystemCallError(
            f"listen.host {host!r}: {error.strerror or error}: use an address of this machine, 0.0.0.0 or ::"
        ) from None
    return from_sockaddr((str(found[0][4][0]), 0)).ip


def _bind_address(host: IPAddress, port: int) -> SockAddr:
    text, _, scope = str(host).partition("%")
    if host.version == 4:
        return text, port
    return text, port, 0, socket.if_nametoindex(scope) if scope and not scope.isdecimal() else int(scope or 0)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def _open_error(host: IPAddress, port: int, error: OSError) -> SystemCallError:
    where = f"udp {UdpAddr(host, port)}"
    if error.errno == errno.EADDRINUSE:
        return SystemCallError(
            f"{where}: the port is taken by {port_holder(port) or 'another process'}:"
            " stop it, or choose another listen.port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return SystemCallError(
            f"{where}: no interface of this machine has the address {host} (EADDRNOTAVAIL):"
            " correct listen.host, or use 0.0.0.0 or :: for every address"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return SystemCallError(
            f"{where}: the port may not be bound ({_name(error)}):"
            " run as root, grant CAP_NET_BIND_SERVICE, or choose a listen.port above 1023",
            exit_code=4,
        )
    if error.errno == errno.EAFNOSUPPORT:
        return SystemCallError(
            f"{where}: the kernel has no IPv6 (EAFNOSUPPORT): set listen.host to 0.0.0.0, or enable IPv6"
        )
    return SystemCallError(f"{where}: cannot be opened ({_name(error)}: {error.strerror})")


def port_holder(port: int) -> str | None:
    """`name (pid n)` of a process with a UDP socket on `port`, if /proc shows it to us."""
    try:
        pids = sorted(
            {
                entry.pid
                for entry in psutil.net_connections(kind="udp")
                if entry.pid is not None and entry.laddr and entry.laddr[1] == port
            }
        )
        return f"{_process_name(pids[0])} (pid {pids[0]})" if pids else None
    except (psutil.Error, OSError):
        return None


def _process_name(pid: int) -> str:
    process = psutil.Process(pid)
    title = process.cmdline()
    return title[0] if title and title[0].startswith("nebula-mp") else process.name()
