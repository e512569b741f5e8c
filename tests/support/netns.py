"""Two sites, the wire between them, and a stranger's view of that wire.

Data flow: tests/e2e -> [support.netns] -> nebula_mp.demo.netns -> `ip` -> kernel
The wire is a router in a third namespace: it sees every datagram, may stop forwarding, and may send
datagrams of its own under any source address. Knows nothing of Nebula.
Source: ip-netns(8), packet(7), raw(7), RFC 768, RFC 791.
"""

import contextlib
import ctypes
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from nebula_mp.demo import netns
from nebula_mp.newtypes import IPAddress, UdpAddr
from tests.support.packet_tap import PacketTap, tells_udp_superpackets, udp_payload_at

PREFIX = "nmpe"
_CLONE_NEWNET = 0x40000000
_BUFFER_BYTES = 16 << 20
_KEPT_BYTES = 2048
_PROTOCOL_UDP = 17
_LIBC = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


@contextlib.contextmanager
def entered(space: netns.Namespace) -> Iterator[None]:
    """Move this thread into `space` for the block; sockets opened inside stay there for good.

    Start no threads and no processes inside the block: they would stay there as well.
    """
    with (
        open("/proc/thread-self/ns/net", "rb") as home,  # noqa: PTH123 - only its descriptor is used
        open(f"/run/netns/{space.name}", "rb") as there,  # noqa: PTH123
    ):
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "setns")


def sweep_stale() -> None:
    """Remove the namespaces of test runs that were killed before they could; they name their process."""
    for path in Path("/run/netns").glob(f"{PREFIX}-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(Exception):  # another worker may be removing it too
                netns.run(["ip", "netns", "del", path.name])


def wait_until(condition: Callable[[], T | None], what: str, *, within_s: float, every_s: float = 0.02) -> T:
    """Return the first truthy value of `condition`; AssertionError naming `what` after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)
    return value


class Datagram(NamedTuple):
    """One UDP datagram as it left a site; `at` is monotonic seconds, `payload` at most 2 KiB of it."""

    at: float
    source: UdpAddr
    destination: UdpAddr
    payload: bytes


class Site:
    """One end: a namespace with one underlay device, and its addresses by IP version."""

    def __init__(self, name: str, number: int, space: netns.Namespace) -> None:
        self.name = name
        self.space = space
        self.device = f"wan-{name}"
        self._number = number
        self._host = 2
        self.addresses: dict[int, IPAddress] = {4: self._address(4), 6: self._address(6)}

    def _address(self, family: int) -> IPAddress:
        text = f"10.99.{self._number}.{self._host}" if family == 4 else f"fd99:{self._number}::{self._host}"
        return ip_address(text)

    def gateway(self, family: int) -> IPAddress:
        """Address of the wire's router on this side."""
        return ip_address(f"10.99.{self._number}.1" if family == 4 else f"fd99:{self._number}::1")

    def interface(self, family: int) -> str:
        """Address and prefix length, as `ip address add` takes them."""
        return f"{self.addresses[family]}/{24 if family == 4 else 64}"

    def move(self) -> None:
        """Give the underlay device new addresses and take the old ones away, as a change of network does."""
        old = [self.interface(family) for family in (4, 6)]
        self._host += 1
        self.addresses = {4: self._address(4), 6: self._address(6)}
        for family in (4, 6):
            extra = ["nodad"] if family == 6 else []
            self.ip("address", "add", self.interface(family), "dev", self.device, *extra)
        for interface in old:
            self.ip("address", "del", interface, "dev", self.device)
        for family in (4, 6):
            self.ip(f"-{family}", "route", "replace", "default", "via", str(self.gateway(family)))

    def ip(self, *argv: str) -> str:
        """Run `ip` inside."""
        return netns.run(["ip", "-n", self.space.name, *argv])

    def has_device(self, device: str) -> bool:
        """Whether a network device of that name exists here."""
        return f" {device}: " in self.ip("-o", "link", "show").replace("@", ": ")

    def state(self) -> str:
        """Addresses and routes, for the report of a failed test."""
        parts = [self.ip("-br", "address"), self.ip("route"), self.ip("-6", "route")]
        return f"site {self.name}\n" + "".join(parts)


class Wire:
    """Three namespaces: sites `a` and `b`, and the router between them; a context manager."""

    def __init__(self) -> None:
        self._lab = netns.Lab(f"{PREFIX}-{os.getpid()}")
        try:
            self._build()
        except BaseException:
            self._lab.close()
            raise

    def _build(self) -> None:
        self.router = self._lab.namespace("w")
        self.a = Site("a", 1, self._lab.namespace("a"))
        self.b = Site("b", 2, self._lab.namespace("b"))
        for site in (self.a, self.b):
            here = [site.interface(4), site.interface(6)]
            there = [f"{site.gateway(4)}/24", f"{site.gateway(6)}/64"]
            self._lab.join(site.space, self.router, here, there, device=site.device)
            site.space.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/promote_secondaries")
            for family in (4, 6):
                site.ip(f"-{family}", "route", "add", "default", "via", str(site.gateway(family)))
            if not tells_udp_superpackets():
                # Datagrams sent together are parted before the wire: nobody there could tell where each ends.
                site.ip("link", "set", "dev", site.device, "gso_max_segs", "1")
        self.forward(on=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process in the three namespaces and remove them; may be called again."""
        self._lab.close()

    def forward(self, *, on: bool) -> None:
        """Let datagrams pass between the sites, or lose every one of them."""
        value = "1" if on else "0"
        keys = "/proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"
        self.router.run("sh", "-c", f"for key in {keys}; do echo {value} > $key; done")

    def record(self) -> "Recorder":
        """Start to record what the sites send; use as a context manager or call `close`."""
        return Recorder(self.router)

    def forger(self) -> "Forger":
        """A sender of UDP datagrams under any IPv4 source address."""
        return Forger(self.router)


class Recorder:
    """Every UDP datagram the sites send, in order, until `close`. Only the first 2 KiB of each is kept."""

    def __init__(self, router: netns.Namespace) -> None:
        self.datagrams: list[Datagram] = []
        # One socket for all devices: two could be read in an order in which nothing was sent.
        with entered(router):
            self._tap = PacketTap(buffer_bytes=_BUFFER_BYTES)
        self._wake, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what was recorded stays available. May be called again."""
        if self._thread.is_alive():
            self._stop.send(b"x")
            self._thread.join()
            for each in (self._tap, self._wake, self._stop):
                each.close()

    def sent_by(self, site: Site, *, since: int = 0) -> list[Datagram]:
        """What left that site's current addresses, from index `since` of `datagrams` on."""
        own = set(site.addresses.values())
        return [datagram for datagram in self.datagrams[since:] if datagram.source.ip in own]

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._tap.fileno(), self._wake.fileno()], [], [])
            self._drain()
            if self._wake.fileno() in ready:
                return

    def _drain(self) -> None:
        for frame in self._tap.frames():
            at = time.monotonic()
            for packet in frame.datagrams():
                if (found := _parse_udp(packet[:_KEPT_BYTES])) is not None:
                    self.datagrams.append(Datagram(at, *found))


def _parse_udp(packet: bytes) -> tuple[UdpAddr, UdpAddr, bytes] | None:
    if not (start := udp_payload_at(packet)):
        return None
    addresses: tuple[IPAddress, IPAddress]
    if packet[0] >> 4 == 4:
        addresses = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    else:
        addresses = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    source, destination = map(UdpAddr, addresses, struct.unpack_from("!HH", packet, start - 8))
    return source, destination, packet[start:]


class Forger:
    """Sends IPv4 UDP datagrams from the wire's namespace with a source of the caller's choice."""

    def __init__(self, router: netns.Namespace) -> None:
        with entered(router):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def send(self, payload: bytes, source: UdpAddr, destination: UdpAddr) -> None:
        """Send one datagram; a zero checksum says that there is none (RFC 768)."""
        udp = struct.pack("!HHHH", source.port, destination.port, 8 + len(payload), 0) + payload
        # The kernel fills in the total length, the identification and the header checksum (raw(7)).
        header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, _PROTOCOL_UDP, 0)
        packet = header + source.ip.packed + destination.ip.packed + udp
        self._socket.sendto(packet, (str(destination.ip), 0))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
