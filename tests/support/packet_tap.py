"""A packet socket that tells superpackets from packets, and cuts those of UDP into their datagrams.

Data flow: any device -> [support.packet_tap] -> support.netns, support.wiretap, support.inspector
A node hands the kernel many datagrams with one call, and on a veth pair they stay together: a packet socket is
shown one packet of 60 KB, and only the virtio header in front of it says where a datagram ends.
Source: packet(7), Linux net/packet/af_packet.c, include/linux/virtio_net.h (which knows UDP since 6.2).
"""

import os
import re
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

ETH_P_ALL = 0x0003
PACKET_HOST = 0
FRAME_BYTES_MAX = 1 << 17
VNET_HEADER_BYTES = 10
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_SO_RCVBUFFORCE = 33
_VNET = struct.Struct("=BBHHHH")  # flags, type, header length, segment size, checksum start and offset
_NEEDS_CSUM = 1
_ECN = 0x80
_UDP_L4 = 5
_IP = (0x0800, 0x86DD)
_LINK_BYTES = {1: 14, 772: 14}  # by type of hardware: Ethernet and loopback; a TUN device has none
_PROTOCOL_UDP = 17
_TELLS_UDP_SINCE = (6, 2)


class Frame(NamedTuple):
    """One IP packet as the kernel has it: of `gso_size` payload bytes each if that is not 0, and then unfinished.

    `is_unfinished`: only the pseudo header is summed yet, in the 16 bits at `checksum_start` + `checksum_offset`.
    """

    packet: bytes
    is_unfinished: bool
    gso_type: int  # as in the virtio header, without the mark for ECN
    gso_size: int
    checksum_start: int
    checksum_offset: int

    @classmethod
    def parse(cls, raw: bytes, link_bytes: int = 0) -> "Frame":
        """Take what a packet socket with virtio headers gave; `link_bytes` belong to the link, before the IP."""
        flags, kind, _, size, start, offset = _VNET.unpack_from(raw)
        packet = raw[VNET_HEADER_BYTES + link_bytes :]
        kind &= ~_ECN
        return cls(packet, bool(flags & _NEEDS_CSUM), kind, size if kind else 0, start - link_bytes, offset)

    def datagrams(self) -> Iterator[bytes]:
        """The packet itself, or one for each datagram of a UDP superpacket; their headers are not made anew."""
        packet, size = self.packet, self.gso_size
        if self.gso_type != _UDP_L4:
            yield packet
            return
        start = udp_payload_at(packet)
        for at in range(start, len(packet), size):
            yield packet[:start] + packet[at : at + size]


def udp_payload_at(packet: bytes) -> int:
    """Where the content of a UDP datagram begins in an IP packet without IPv6 extension headers; 0 if it is none."""
    if packet[0] >> 4 == 4:
        return (packet[0] & 15) * 4 + 8 if packet[9] == _PROTOCOL_UDP else 0
    return 48 if packet[6] == _PROTOCOL_UDP else 0


def tells_udp_superpackets(release: str = "") -> bool:
    """Whether this kernel can describe one to a packet socket; one that cannot loses it."""
    found = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    assert found is not None
    return (int(found[1]), int(found[2])) >= _TELLS_UDP_SINCE


class PacketTap:
    """What comes in by every device of this thread's network, or by one; close it, or use it in a `with`."""

    def __init__(self, *, buffer_bytes: int, device: str = "") -> None:
        protocol = 0 if device else socket.htons(ETH_P_ALL)  # 0: nothing before `bind`
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, protocol)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
        self._socket.setblocking(False)
        if device:
            self._socket.bind((device, ETH_P_ALL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more."""
        self._socket.close()

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def frames(self) -> Iterator[Frame]:
        """Every IP packet that waits, in order."""
        while True:
            try:
                raw, address = self._socket.recvfrom(FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            _, protocol, kind, hardware, _ = address
            if kind == PACKET_HOST and protocol in _IP:
                yield Frame.parse(raw, _LINK_BYTES.get(hardware, 0))

    def missed(self) -> int:
        """Packets since the last call for which there was no room."""
        found: int = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        return found
