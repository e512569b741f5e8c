"""A TUN device with any offloads, of which each packet is read and written with its virtio header.

Data flow: tests of superpackets -> [support.offload_tun] -> /dev/net/tun, in the network of this thread
Source: Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h.
"""

import fcntl
import os
import select
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_interface
from pathlib import Path

from nebula_mp import netlink
from nebula_mp.datapath.virtio import HEADER_BYTES
from nebula_mp.ioctl_tun import TunDevice
from tests.support.private_net import private_network

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_RTF_LOCAL = 0x8000_0000
_IFF_VNET_HDR = 0x4000
_CSUM, _TSO4, _TSO6, _ECN, _USO = 0x01, 0x02, 0x04, 0x08, 0x60
EVERYTHING = _CSUM | _TSO4 | _TSO6 | _ECN | _USO
NOTHING = 0
PATIENCE_S = 10.0


class OffloadTun:
    """`send` and `receive` are the far end of the wire; the kernel of this network is the near one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """For `select`, and for a drain that writes here; borrowed."""
        return self._descriptor

    def send(self, frame: bytes) -> None:
        """Give the kernel one frame: virtio header and packet. Raises OSError."""
        assert os.write(self._descriptor, frame) == len(frame)

    def receive(self) -> tuple[bytes, bytes] | None:
        """Take virtio header and packet, if one waits."""
        try:
            frame = os.read(self._descriptor, 1 << 17)
        except BlockingIOError:
            return None
        return frame[:HEADER_BYTES], frame[HEADER_BYTES:]

    def expect(self, count: int) -> list[tuple[bytes, bytes]]:
        """Wait for so many frames that are neither ICMPv6 nor IGMP, which the kernel sends on its own."""
        end = time.monotonic() + PATIENCE_S
        frames: list[tuple[bytes, bytes]] = []
        while len(frames) < count:
            assert time.monotonic() < end, f"{len(frames)} of {count} packets after {PATIENCE_S} s"
            select.select([self._descriptor], [], [], 1.0)
            frame = self.receive()
            if frame is not None and not is_noise(frame[1]):
                frames.append(frame)
        return frames


def is_noise(packet: bytes) -> bool:
    """Whether the kernel sends it without being asked: group membership and router solicitation."""
    return packet[9] == 2 if packet[0] >> 4 == 4 else packet[6] in (0, 58)


@contextmanager
def offload_tun(name: str, addresses: list[str], mtu: int, offloads: int) -> Iterator[OffloadTun]:
    """Make the device in the network of this thread, up, with addresses such as `10.0.0.1/24`."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, offloads)
        TunDevice(descriptor, name).set_mtu(mtu)
        netlink.configure(name, [ip_interface(each) for each in addresses], mtu)
        _await_addresses(addresses)
        yield OffloadTun(descriptor)
    finally:
        os.close(descriptor)


def _await_addresses(addresses: list[str]) -> None:
    """Wait until IPv6 addresses are in use: the kernel makes their local routes some time after it took them."""
    local = {ip_interface(each).ip for each in addresses if ":" in each}
    wanted = {address.packed.hex() for address in local}
    end = time.monotonic() + PATIENCE_S
    while not wanted <= set(_local_routes()):
        assert time.monotonic() < end, f"{local}: no route after {PATIENCE_S} s"
        time.sleep(0.01)


def _local_routes() -> Iterator[str]:
    for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines():
        destination, bits, *_, flags, device = line.split()
        if bits == "80" and int(flags, 16) & _RTF_LOCAL and device != "lo":
            yield destination


@contextmanager
def forwarding_kernel() -> Iterator[tuple[OffloadTun, OffloadTun]]:
    """A network whose kernel forwards from a device with all offloads to one without, where it has to cut.

    10.50.1.0/24 and fd00:50:1::/64 are behind the first, 10.50.2.0/24 and fd00:50:2::/64 behind the second.
    """
    with private_network():
        _route_between_devices()
        near = offload_tun("nmpfwd0", ["10.50.1.1/24", "fd00:50:1::1/64"], 9000, EVERYTHING)
        far = offload_tun("nmpfwd1", ["10.50.2.1/24", "fd00:50:2::1/64"], 9000, NOTHING)
        with near as first, far as second:
            yield first, second


def _route_between_devices() -> None:
    """Let the network of this thread forward packets of both versions."""
    for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path(f"/proc/sys/net/{key}").write_text("1")
    for device in ("all", "default"):
        Path(f"/proc/sys/net/ipv4/conf/{device}/rp_filter").write_text("0")
