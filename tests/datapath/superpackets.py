"""Superpackets as the kernel makes them, and their packets cut in the plainest way, for tests.

Data flow: [superpackets] -> tests of datapath.segment, datapath.coalesce
`Plan` says what is in one; `frame` builds the superpacket, `packets` each packet by itself, with the builders
of tests.support.packets, which share no code with the program.
"""

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from hypothesis import strategies as st

from nebula_mp.newtypes import IPAddress
from tests.support import packets
from tests.support.packets import ACK, CWR, ECE, FIN, PSH, TCP, UDP

A4, B4 = IPv4Address("10.50.1.2"), IPv4Address("10.50.2.2")
A6, B6 = IPv6Address("fd00:50:1::2"), IPv6Address("fd00:50:2::2")
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(range(8))
TCP4, TCP6, UDP_L4 = 1, 4, 5


@dataclass(frozen=True, slots=True)
class Plan:
    """A superpacket: `payload` in pieces of `size`."""

    version: int
    protocol: int
    payload: bytes
    size: int
    flags: int = ACK
    sequence: int = 1000
    identification: int = 7
    options: bytes = b""  # of TCP
    ip_options: bytes = b""  # of IPv4
    flags_and_offset: int = 0x4000  # DF
    service: int = 0
    ttl: int = 64
    ports: tuple[int, int] = (40000, 50000)
    acknowledgement: int = 77
    window: int = 500
    extensions: bytes = b""  # the body of a destination options header

    @property
    def ends(self) -> tuple[IPAddress, IPAddress]:
        return (A4, B4) if self.version == 4 else (A6, B6)

    @property
    def gso(self) -> int:
        return UDP_L4 if self.protocol == UDP else TCP4 if self.version == 4 else TCP6

    @property
    def transport(self) -> int:
        return 20 + len(self.ip_options) if self.version == 4 else 40 + self._extension_bytes

    @property
    def header_bytes(self) -> int:
        return self.transport + (8 if self.protocol == UDP else 20 + len(self.options))

    @property
    def _extension_bytes(self) -> int:
        return len(packets.options_header(0, self.extensions, b"")) if self.extensions else 0

    def virtio(self, hdr_len: int | None = None) -> bytes:
        offset = 6 if self.protocol == UDP else 16
        kind = self.gso | (0x80 if self.flags & CWR and self.protocol == TCP else 0)
        length = self.header_bytes if hdr_len is None else hdr_len
        return struct.pack("=BBHHHH", 1, kind, length, self.size, self.transport, offset)

    def packet(self) -> bytes:
        """The superpacket itself; its checksum field holds the sum of the pseudo header."""
        whole = bytearray(self._packet(self.payload, self.flags, 0))
        at = self.transport + (6 if self.protocol == UDP else 16)
        addresses = b"".join(each.packed for each in self.ends)
        pseudo = addresses + struct.pack("!II", self.protocol, len(whole) - self.transport)
        whole[at : at + 2] = (packets.checksum(pseudo) ^ 0xFFFF).to_bytes(2, "big")
        return bytes(whole)

    def packets(self) -> list[bytes]:
        """What it means, packet by packet."""
        return [self.one(number) for number in range(self.count)]

    @property
    def count(self) -> int:
        return max(1, -(-len(self.payload) // self.size))

    def one(self, number: int) -> bytes:
        """Packet `number` alone."""
        flags = self.flags
        if number != 0:
            flags &= ~CWR
        if number != self.count - 1:
            flags &= ~(PSH | FIN)
        return self._packet(self.payload[number * self.size : (number + 1) * self.size], flags, number)

    def _packet(self, payload: bytes, flags: int, number: int) -> bytes:
        source, destination = self.ends
        if self.protocol == UDP:
            segment = packets.udp(source, destination, *self.ports, payload)
        else:
            segment = packets.tcp(
                source,
                destination,
                *self.ports,
                payload,
                flags=flags,
                sequence=(self.sequence + number * self.size) % 2**32,
                acknowledgement=self.acknowledgement,
                window=self.window,
                options=self.options,
            )
        if self.version == 4:
            return packets.ipv4(
                source,
                destination,
                self.protocol,
                segment,
                options=self.ip_options,
                identification=(self.identification + number) % 2**16,
                service=self.service,
                flags_and_offset=self.flags_and_offset,
                ttl=self.ttl,
            )
        protocol = self.protocol
        if self.extensions:
            protocol, segment = (
                packets.DESTINATION_OPTIONS,
                packets.options_header(protocol, self.extensions, segment),
            )
        return packets.ipv6(
            source,
            destination,
            protocol,
            segment,
            traffic_class=self.service,
            flow_label=0xABCDE,
            hop_limit=self.ttl,
        )


@st.composite
def plans(draw: st.DrawFn, *, joinable: bool = False, size_max: int = 1400) -> Plan:
    """Any superpacket, or only those whose packets `coalesce` joins again to just this one."""
    version, protocol = draw(st.sampled_from([4, 6])), draw(st.sampled_from([TCP, UDP]))
    size = draw(st.integers(1, size_max) | st.sampled_from([36, 88, 536, 1248]))
    count = draw(st.integers(2 if joinable else 1, 50))
    last = draw(st.integers(1, size))
    length = min((count - 1) * size + last, 64_000)
    payload = draw(st.binary(min_size=8, max_size=64)) * (length // 8 + 1)
    plan = Plan(
        version=version,
        protocol=protocol,
        payload=payload[:length] if not draw(st.booleans()) else bytes(length),
        size=size,
        flags=draw(st.sampled_from([ACK, ACK | PSH, ACK | ECE])),
        sequence=draw(st.integers(0, 2**32 - 1) | st.integers(2**32 - 3000, 2**32 - 1)),
        identification=draw(st.integers(0, 2**16 - 1) | st.integers(2**16 - 20, 2**16 - 1)),
        options=draw(st.sampled_from([b"", TIMESTAMPS, TIMESTAMPS * 3 + bytes(4)])),
        flags_and_offset=draw(st.sampled_from([0, 0x4000])),
        service=draw(st.integers(0, 255)),
        ttl=draw(st.integers(2, 255)),
        acknowledgement=draw(st.integers(0, 2**32 - 1)),
        window=draw(st.integers(0, 2**16 - 1)),
    )
    if joinable:
        return plan
    return replace(
        plan,
        flags=draw(st.sampled_from([ACK, ACK | PSH, ACK | FIN | PSH, ACK | CWR | ECE, ACK | CWR | FIN])),
        ip_options=draw(st.sampled_from([b"", b"\x94\x04\x00\x00"])),
        extensions=draw(st.sampled_from([b"", b"", b"\x1e\x02ab"])) if version == 6 else b"",
    )
