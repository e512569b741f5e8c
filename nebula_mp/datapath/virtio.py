"""The header that stands in front of a packet of a TUN device with offloads.

Data flow: TUN -> [virtio] -> datapath.segment;  datapath.coalesce -> [virtio] -> TUN
Knows which headers fit which packets; knows nothing of how packets are cut or joined.
Source: Virtual I/O Device 1.3 section 5.1.6 (struct virtio_net_hdr, without num_buffers, in the byte order of
the machine); Linux include/linux/virtio_net.h and drivers/net/tun.c, which read more into it than that text.

The kernel fills it in, but not from its own knowledge alone: a packet that is only forwarded may bring what
another machine, a guest or a card driver said of it. So everything is compared with the packet itself, and
`hdr_len`, which the specification calls a hint and which is wrong for forwarded packets, is never believed:
`header_bytes` is calculated, in both directions.

In the other direction the kernel believes us. A type without F_NEEDS_CSUM, or with a wrong start of the
checksum, is accepted and corrupts packets without a word; so what `encode` writes is complete.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from nebula_mp.errors import WireError
from nebula_mp.newtypes import Buffer
from nebula_mp.wire.ip import (
    DESTINATION_OPTIONS,
    EXTENSION_HEADERS_MAX,
    HOP_BY_HOP,
    IPV4_HEADER_BYTES,
    IPV6_HEADER_BYTES,
    ROUTING,
    TCP,
    UDP,
)

HEADER_BYTES: Final = 10
TCP_CHECKSUM_AT: Final = 16
"""`checksum_offset` of TCP."""
UDP_CHECKSUM_AT: Final = 6
UDP_HEADER_BYTES: Final = 8
TCP_HEADER_BYTES: Final = 20
PACKET_BYTES_MAX: Final = 0xFFFF
"""Of an IPv4 packet; an IPv6 one may be longer by its fixed header."""

_LAYOUT: Final = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_HDR_LEN: Final = struct.Struct("=2xH")
_NEEDS_CSUM: Final = 1
_DATA_VALID: Final = 2  # the kernel verified the checksum; it is right, so there is nothing to do
_ECN: Final = 0x80
_MORE_AND_OFFSET: Final = 0x3FFF
_U16: Final = struct.Struct("!H")
_EXTENSIONS: Final = frozenset({HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS})
_NOTHING: Final = bytes(HEADER_BYTES)


class OffloadError(WireError):
    """The header before a packet is not one of ours, or contradicts its packet. Drop and count."""


class GsoType(IntEnum):
    """How a packet is to be cut; the values are those of the header. UFO (3) is never asked for."""

    NONE = 0
    TCP4 = 1
    TCP6 = 4
    UDP = 5


_KNOWN: Final = {int(kind): kind for kind in GsoType}


class VirtioHeader(NamedTuple):
    """What the header says of its packet; made by `parse`, it fits that packet.

    `gso` other than NONE is a superpacket: its payload is that of several packets with `segment_bytes` each
    (the last one may have less), behind `header_bytes` of IP and transport header. Then, or if
    `needs_checksum`, the checksum is to be completed: it goes to `checksum_offset` behind `checksum_start`,
    over all from there on; its field holds the sum of the pseudo header. All others are 0.
    """

    gso: GsoType = GsoType.NONE
    has_cwr: bool = False  # ECN: the first segment has CWR
    needs_checksum: bool = False
    header_bytes: int = 0
    segment_bytes: int = 0
    checksum_start: int = 0
    checksum_offset: int = 0

    @classmethod
    def parse(cls, header: Buffer, packet: Buffer, packet_bytes: int | None = None) -> "VirtioHeader":
        """Read 10 bytes, and compare them with the packet they stand before.

        `packet` may be only the beginning of a packet of `packet_bytes`; then all its IP and transport
        headers must be there. Raises OffloadError, and nothing else, whatever the bytes are.
        """
        if header == _NOTHING:
            return PLAIN
        if len(header) != HEADER_BYTES:
            raise OffloadError(f"offload header: {len(header)} bytes instead of {HEADER_BYTES}")
        size = len(packet) if packet_bytes is None else packet_bytes
        flags, kind, _, segment_bytes, start, offset = _LAYOUT.unpack(header)
        if flags & ~(_NEEDS_CSUM | _DATA_VALID):
            raise OffloadError(f"offload header: flags {flags:#x} are not known")
        gso = _KNOWN.get(kind & ~_ECN)
        has_cwr = kind >= _ECN
        if gso is None or (has_cwr and gso not in _TCP):
            raise OffloadError(f"offload header: gso_type {kind:#x} is not known")
        if not flags & _NEEDS_CSUM:
            if gso is not GsoType.NONE:
                raise OffloadError(f"offload header: gso_type {kind:#x} without a checksum to complete")
            return PLAIN
        if gso is GsoType.NONE:
            _check_checksum(start, offset, size)
            return cls(gso, False, True, 0, 0, start, offset)  # noqa: FBT003  # by name costs twice the time
        if segment_bytes == 0:
            raise OffloadError(f"offload header: gso_type {kind:#x} with gso_size 0")
        header_bytes = _check_superpacket(gso, start, offset, packet, size)
        return cls(gso, has_cwr, True, header_bytes, segment_bytes, start, offset)  # noqa: FBT003  # as above

    def encode(self) -> bytes:
        """Spell the 10 bytes."""
        return _LAYOUT.pack(
            self.needs_checksum * _NEEDS_CSUM,
            self.gso | self.has_cwr * _ECN,
            self.header_bytes,
            self.segment_bytes,
            self.checksum_start,
            self.checksum_offset,
        )


def encoded_header_bytes(header: Buffer) -> int:
    """The IP and transport header bytes that `encode` wrote; only for a header of our own."""
    found: int = _HDR_LEN.unpack_from(header)[0]
    return found


PLAIN: Final = VirtioHeader()
"""A packet that is complete as it is."""

_TCP: Final = frozenset({GsoType.TCP4, GsoType.TCP6})


def _check_checksum(start: int, offset: int, size: int) -> None:
    """Check that the field lies behind a fixed IP header, and in the packet."""
    if start < IPV4_HEADER_BYTES or start + offset + 2 > size:
        raise OffloadError(f"offload header: checksum at {start} + {offset} of a packet of {size} bytes")


def _check_superpacket(gso: GsoType, start: int, offset: int, packet: Buffer, size: int) -> int:
    """Check that type and checksum fit the packet; gives the bytes of its headers."""
    version = packet[0] >> 4 if len(packet) else 0
    if version == 4 and gso is not GsoType.TCP6:
        protocol, transport, size_max = *_ipv4_transport(packet), PACKET_BYTES_MAX
    elif version == 6 and gso is not GsoType.TCP4:
        protocol, transport, size_max = *_ipv6_transport(packet), PACKET_BYTES_MAX + IPV6_HEADER_BYTES
    else:
        raise OffloadError(f"offload header: {gso.name} before a packet of IP version {version}")
    expected = (UDP, UDP_CHECKSUM_AT) if gso is GsoType.UDP else (TCP, TCP_CHECKSUM_AT)
    if (protocol, offset, transport) != (*expected, start):
        raise OffloadError(
            f"offload header: {gso.name} with checksum at {start} + {offset} before protocol {protocol}"
            f" at {transport}"
        )
    header_bytes = transport + _transport_bytes(protocol, packet, transport)
    if header_bytes > min(len(packet), size):
        raise OffloadError(f"offload header: {gso.name} with {header_bytes} header bytes, of {size} in all")
    if size > size_max:
        raise OffloadError(f"offload header: {gso.name} of {size} bytes")
    return header_bytes


def _ipv4_transport(packet: Buffer) -> tuple[int, int]:
    """Give protocol and offset of the transport header."""
    if len(packet) < IPV4_HEADER_BYTES:
        raise OffloadError(f"superpacket: {len(packet)} bytes are less than an IPv4 header")
    transport = (packet[0] & 0x0F) * 4
    if transport < IPV4_HEADER_BYTES:
        raise OffloadError(f"superpacket: IPv4 header length {transport} is below {IPV4_HEADER_BYTES}")
    if _U16.unpack_from(packet, 6)[0] & _MORE_AND_OFFSET:
        raise OffloadError("superpacket: it is a fragment")
    return packet[9], transport


def _ipv6_transport(packet: Buffer) -> tuple[int, int]:
    """Do as `_ipv4_transport`. Headers that make of the rest something else, such as fragments, are none."""
    if len(packet) < IPV6_HEADER_BYTES:
        raise OffloadError(f"superpacket: {len(packet)} bytes are less than an IPv6 header")
    protocol, transport = packet[6], IPV6_HEADER_BYTES
    for _ in range(EXTENSION_HEADERS_MAX):
        if protocol not in _EXTENSIONS or transport + 2 > len(packet):
            break
        protocol, transport = packet[transport], transport + (packet[transport + 1] + 1) * 8
    return protocol, transport


def _transport_bytes(protocol: int, packet: Buffer, transport: int) -> int:
    """Bytes of a UDP header, or of a TCP header with its options."""
    if protocol == UDP:
        return UDP_HEADER_BYTES
    if transport + TCP_HEADER_BYTES > len(packet):
        raise OffloadError(f"superpacket: {len(packet)} bytes end before the TCP header at {transport} does")
    size = (packet[transport + 12] >> 4) * 4
    if size < TCP_HEADER_BYTES:
        raise OffloadError(f"superpacket: TCP header length {size} is below {TCP_HEADER_BYTES}")
    return size
