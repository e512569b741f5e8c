"""Whole IP packets, with correct lengths and checksums, for tests.

Data flow: [support.packets] -> tests/wire, tests/firewall, tests/sim, tests/e2e
Each builder gives the bytes of one header and what is behind it, so that they nest:
`ipv4(a, b, UDP, udp(a, b, 1, 2, b"data"))`. Takes its checksums from its own code, not from the program.
Source: RFC 791, 792, 768, 9293, 8200, 4443, 4302, 4303, 2784, 2890, 9260.
"""

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import islice

from nebula_mp.newtypes import IPAddress

HOP_BY_HOP = 0
ICMP = 1
IP_IN_IP = 4
TCP = 6
UDP = 17
IPV6_IN_IP = 41
ROUTING = 43
FRAGMENT = 44
GRE = 47
ESP = 50
AH = 51
ICMPV6 = 58
NO_NEXT_HEADER = 59
DESTINATION_OPTIONS = 60
SCTP = 132

ECHO_REQUEST, ECHO_REPLY = 8, 0
ECHO_REQUEST_V6, ECHO_REPLY_V6 = 128, 129

MTU_BYTES = 1300
"""The overlay's default; no packet of `raw_packets` is larger."""

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))


def checksum(data: bytes) -> int:
    """RFC 1071, by adding the words one after the other."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data + bytes(len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit (RFC 9260 appendix A)."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def ipv4(
    source: IPAddress,
    destination: IPAddress,
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    identification: int = 1,
    service: int = 0,
    flags_and_offset: int = 0,
    ttl: int = 64,
) -> bytes:
    """`options` are padded to 4 bytes; `flags_and_offset` is the 16-bit field with DF, MF and the offset."""
    options += bytes(-len(options) % 4)
    header_bytes = 20 + len(options)
    header = bytearray(
        struct.pack(
            "!BBHHHBBH4s4s",
            0x40 | header_bytes // 4,
            service,
            header_bytes + len(payload),
            identification,
            flags_and_offset,
            ttl,
            protocol,
            0,
            source.packed,
            destination.packed,
        )
        + options
    )
    header[10:12] = struct.pack("!H", checksum(bytes(header)))
    return bytes(header) + payload


def ipv6(
    source: IPAddress,
    destination: IPAddress,
    next_header: int,
    payload: bytes,
    *,
    traffic_class: int = 0,
    flow_label: int = 0,
    hop_limit: int = 64,
) -> bytes:
    """`payload` begins with the first extension header, if there is one."""
    first = 6 << 28 | traffic_class << 20 | flow_label
    return (
        struct.pack(
            "!IHBB16s16s",
            first,
            len(payload),
            next_header,
            hop_limit,
            source.packed,
            destination.packed,
        )
        + payload
    )


def ip(source: IPAddress, destination: IPAddress, protocol: int, payload: bytes) -> bytes:
    """A plain packet of the addresses' own version."""
    build = ipv4 if source.version == 4 else ipv6
    return build(source, destination, protocol, payload)


def _with_checksum(
    source: IPAddress, destination: IPAddress, protocol: int, segment: bytes, at: int
) -> bytes:
    """Fill the zero checksum field at offset `at`, with the pseudo header of either IP version."""
    addresses = source.packed + destination.packed
    pseudo = addresses + struct.pack("!II" if source.version == 6 else "!HH", protocol, len(segment))
    return segment[:at] + struct.pack("!H", checksum(pseudo + segment)) + segment[at + 2 :]


def tcp(
    source: IPAddress,
    destination: IPAddress,
    source_port: int,
    destination_port: int,
    payload: bytes = b"",
    *,
    flags: int = ACK,
    sequence: int = 0,
    acknowledgement: int = 0,
    window: int = 64240,
    urgent: int = 0,
    options: bytes = b"",
) -> bytes:
    """`options` are padded to 4 bytes."""
    options += bytes(-len(options) % 4)
    header = struct.pack(
        "!HHIIBBHHH",
        source_port,
        destination_port,
        sequence,
        acknowledgement,
        (20 + len(options)) // 4 << 4,
        flags,
        window,
        0,
        urgent,
    )
    return _with_checksum(source, destination, TCP, header + options + payload, 16)


def udp(
    source: IPAddress,
    destination: IPAddress,
    source_port: int,
    destination_port: int,
    payload: bytes = b"",
    *,
    with_checksum: bool = True,
) -> bytes:
    """Only IPv4 may do without the checksum."""
    segment = struct.pack("!HHHH", source_port, destination_port, 8 + len(payload), 0) + payload
    if not with_checksum:
        return segment
    filled = _with_checksum(source, destination, UDP, segment, 6)
    return filled if filled[6:8] != bytes(2) else filled[:6] + b"\xff\xff" + filled[8:]


def icmp(kind: int, code: int, body: bytes) -> bytes:
    """`body` is all that follows the checksum: for echo identifier, sequence number and data."""
    message = struct.pack("!BBH", kind, code, 0) + body
    return message[:2] + struct.pack("!H", checksum(message)) + body


def icmpv6(source: IPAddress, destination: IPAddress, kind: int, code: int, body: bytes) -> bytes:
    """As `icmp`, with the pseudo header."""
    return _with_checksum(source, destination, ICMPV6, struct.pack("!BBH", kind, code, 0) + body, 2)


def echo(
    source: IPAddress,
    destination: IPAddress,
    identifier: int,
    sequence: int,
    payload: bytes = b"",
    *,
    reply: bool = False,
) -> bytes:
    """A whole ping packet of the addresses' own version."""
    body = struct.pack("!HH", identifier, sequence) + payload
    if source.version == 4:
        return ipv4(source, destination, ICMP, icmp(ECHO_REPLY if reply else ECHO_REQUEST, 0, body))
    kind = ECHO_REPLY_V6 if reply else ECHO_REQUEST_V6
    return ipv6(source, destination, ICMPV6, icmpv6(source, destination, kind, 0, body))


def sctp(source_port: int, destination_port: int, tag: int, chunks: bytes) -> bytes:
    """`chunks` are whole and padded; the checksum is CRC-32C, sent with the low byte first."""
    header = struct.pack("!HHI", source_port, destination_port, tag)
    return header + struct.pack("<I", crc32c(header + bytes(4) + chunks)) + chunks


def sctp_chunk(kind: int, flags: int, body: bytes) -> bytes:
    """One chunk, padded to 4 bytes, which its length does not count."""
    return struct.pack("!BBH", kind, flags, 4 + len(body)) + body + bytes(-len(body) % 4)


def gre(
    protocol: int,
    payload: bytes,
    *,
    key: int | None = None,
    sequence: int | None = None,
    with_checksum: bool = False,
) -> bytes:
    """`protocol` is an EtherType."""
    flags = with_checksum << 15 | (key is not None) << 13 | (sequence is not None) << 12
    header = struct.pack("!HH", flags, protocol)
    tail = b"".join(struct.pack("!I", field) for field in (key, sequence) if field is not None)
    if not with_checksum:
        return header + tail + payload
    whole = header + bytes(4) + tail + payload
    return whole[:4] + struct.pack("!H", checksum(whole)) + whole[6:]


def esp(spi: int, sequence: int, ciphertext: bytes) -> bytes:
    """RFC 4303, with `ciphertext` that nobody can open."""
    return struct.pack("!II", spi, sequence) + ciphertext


def authentication(next_header: int, spi: int, sequence: int, check_value: bytes, payload: bytes) -> bytes:
    """An AH; `check_value` is a multiple of 4 bytes (IPv4) or such that the whole is one of 8 (IPv6)."""
    assert len(check_value) % 4 == 0
    words = 3 + len(check_value) // 4
    return struct.pack("!BBHII", next_header, words - 2, 0, spi, sequence) + check_value + payload


def options_header(next_header: int, options: bytes, payload: bytes) -> bytes:
    """A hop-by-hop or destination options header; `options` are padded with PadN to 8 bytes."""
    missing = -(2 + len(options)) % 8
    padding = b"" if not missing else b"\x00" if missing == 1 else struct.pack("!BB", 1, missing - 2)
    body = options + padding + bytes(max(0, missing - 2))
    return struct.pack("!BB", next_header, (2 + len(body)) // 8 - 1) + body + payload


def routing_header(next_header: int, kind: int, body: bytes, payload: bytes) -> bytes:
    """A routing header with no segments left; `body` is 4 bytes, or more by multiples of 8."""
    assert len(body) % 8 == 4
    return struct.pack("!BBBB", next_header, (4 + len(body)) // 8 - 1, kind, 0) + body + payload


def fragment_header(
    next_header: int, offset: int, payload: bytes, *, more: bool, identification: int
) -> bytes:
    """`offset` in bytes, a multiple of 8."""
    return struct.pack("!BBHI", next_header, 0, offset | more, identification) + payload


def ipv4_fragments(
    source: IPAddress,
    destination: IPAddress,
    protocol: int,
    payload: bytes,
    size: int,
    *,
    identification: int,
) -> list[bytes]:
    """Cut `payload` into packets with `size` bytes of it in each, a multiple of 8."""
    return [
        ipv4(
            source,
            destination,
            protocol,
            payload[at : at + size],
            identification=identification,
            flags_and_offset=(at + size < len(payload)) << 13 | at // 8,
        )
        for at in range(0, len(payload), size)
    ]


def ipv6_fragments(
    source: IPAddress,
    destination: IPAddress,
    protocol: int,
    payload: bytes,
    size: int,
    *,
    identification: int,
) -> list[bytes]:
    """As `ipv4_fragments`, with a fragment header in each."""
    return [
        ipv6(
            source,
            destination,
            FRAGMENT,
            fragment_header(
                protocol,
                at,
                payload[at : at + size],
                more=at + size < len(payload),
                identification=identification,
            ),
        )
        for at in range(0, len(payload), size)
    ]


def raw_packets(
    source: IPAddress, destination: IPAddress, seed: int, count: int, *, unclassified: bool = False
) -> list[bytes]:
    """Give `count` different packets of many protocols, options, flags and sizes; the same for the same seed.

    A raw socket or a TUN device carries each unchanged: identification is not 0, TTL is above 1, none is
    larger than MTU_BYTES, lengths and checksums are right. All protocols occur once before any is repeated.
    Nebula up to 1.11.0 drops IPv6 packets of protocols that it does not know, such as SCTP and GRE; they
    are among them only if `unclassified` is set.
    """
    assert source.version == destination.version
    dice = random.Random(seed)
    make = _Maker(source, destination, dice)
    kinds: list[Callable[[], Iterator[bytes]]] = [make.tcp, make.udp, make.echo, make.icmp_error, make.esp]
    kinds += [make.authenticated, make.fragments]
    if source.version == 4:
        kinds += [make.udp_without_checksum, make.options]
    else:
        kinds += [make.extensions, make.no_next_header]
    if source.version == 4 or unclassified:
        kinds += [make.sctp, make.gre, make.tunnelled, make.any_protocol]
    return list(islice(_each_once(kinds, dice), count))


def _each_once(kinds: Sequence[Callable[[], Iterator[bytes]]], dice: random.Random) -> Iterator[bytes]:
    """Yield different packets for ever, kind by kind in changing order."""
    seen: set[bytes] = set()
    while True:
        for kind in dice.sample(kinds, len(kinds)):
            for packet in kind():
                if packet not in seen:
                    seen.add(packet)
                    yield packet


class _Maker:
    """One method for each kind of packet; all random choices come from one generator."""

    def __init__(self, source: IPAddress, destination: IPAddress, dice: random.Random) -> None:
        self._source = source
        self._destination = destination
        self._dice = dice

    def tcp(self) -> Iterator[bytes]:
        options = b"".join(
            self._dice.sample(
                [
                    b"\x02\x04\x05\xb4",  # maximum segment size
                    b"\x01",
                    b"\x03\x03\x07",  # window scale
                    b"\x04\x02",  # selective acknowledgement permitted
                    b"\x08\x0a" + self._dice.randbytes(8),  # timestamps
                    b"\xfd\x08" + self._dice.randbytes(6),  # experimental
                ],
                self._dice.randrange(6),
            )
        )
        segment = tcp(
            self._source,
            self._destination,
            self._port(),
            self._port(),
            self._payload(),
            flags=self._dice.randrange(256),
            sequence=self._u32(),
            acknowledgement=self._u32(),
            window=self._dice.randrange(1 << 16),
            urgent=self._dice.randrange(1 << 16),
            options=options,
        )
        yield self._packet(TCP, segment)

    def udp(self) -> Iterator[bytes]:
        yield self._packet(UDP, self._datagram(self._payload()))

    def udp_without_checksum(self) -> Iterator[bytes]:
        datagram = udp(
            self._source, self._destination, self._port(), self._port(), self._payload(), with_checksum=False
        )
        yield self._packet(UDP, datagram)

    def echo(self) -> Iterator[bytes]:
        request, reply = (8, 0) if self._source.version == 4 else (128, 129)
        yield self._icmp(self._dice.choice((request, reply)), 0, self._dice.randbytes(4) + self._payload())

    def icmp_error(self) -> Iterator[bytes]:
        """Unreachable, too big, time exceeded, parameter problem, about a packet of ours the other way."""
        about = ip(
            self._destination,
            self._source,
            UDP,
            udp(self._destination, self._source, self._port(), self._port(), self._dice.randbytes(32)),
        )
        kind = self._dice.choice((3, 11, 12) if self._source.version == 4 else (1, 2, 3, 4))
        yield self._icmp(kind, self._dice.randrange(2), struct.pack("!I", MTU_BYTES * (kind == 2)) + about)

    def esp(self) -> Iterator[bytes]:
        yield self._packet(ESP, esp(self._u32(), self._u32(), self._dice.randbytes(8) + self._payload()))

    def authenticated(self) -> Iterator[bytes]:
        check_value = self._dice.randbytes(12)
        datagram = self._datagram(self._payload())
        yield self._packet(AH, authentication(UDP, self._u32(), self._u32(), check_value, datagram))

    def fragments(self) -> Iterator[bytes]:
        """All fragments of one datagram, the last ones first now and then."""
        size = 8 * self._dice.randrange(1, 150)
        pieces = self._dice.randrange(2, 6)
        data = self._dice.randbytes(max(0, size * (pieces - 1) - 8 + self._dice.randrange(1, size + 1)))
        protocol, payload = self._dice.choice(
            (
                (UDP, self._datagram(data)),
                (TCP, tcp(self._source, self._destination, self._port(), self._port(), data)),
            )
        )
        cut = ipv4_fragments if self._source.version == 4 else ipv6_fragments
        packets = cut(
            self._source,
            self._destination,
            protocol,
            payload,
            size,
            identification=self._identification(),
        )
        yield from self._dice.choice((packets, packets[::-1]))

    def options(self) -> Iterator[bytes]:
        """IPv4 options: record route, time stamps, router alert, security, stream, source routes, padding."""
        addresses = bytes(4) * self._dice.randrange(1, 4)
        options = self._dice.choice(
            (
                b"\x07" + bytes((3 + len(addresses), 4)) + addresses,
                b"\x44\x0c\x05\x00" + bytes(8),
                b"\x94\x04\x00\x00",
                b"\x82\x0b" + self._dice.randbytes(9),
                b"\x88\x04" + self._dice.randbytes(2),
                b"\x83\x07\x08" + self._destination.packed,
                b"\x89\x07\x08" + self._destination.packed,
                b"\x01" * self._dice.randrange(1, 41),
                b"\x9e\x28" + self._dice.randbytes(38),
            )
        )
        yield self._packet(UDP, self._datagram(self._payload()), options=options)

    def extensions(self) -> Iterator[bytes]:
        """IPv6 extension headers, up to five, in the order of RFC 8200 section 4.1."""
        protocol, payload = self._dice.choice(
            (
                (UDP, self._datagram(self._dice.randbytes(self._dice.randrange(600)))),
                (TCP, tcp(self._source, self._destination, self._port(), self._port())),
                (ICMPV6, icmpv6(self._source, self._destination, 128, 0, self._dice.randbytes(20))),
            )
        )
        chosen = self._dice.sample(range(5), self._dice.randrange(1, 6))
        for header in sorted(chosen, reverse=True):  # the last one is built first
            match header:
                case 4:
                    padding = b"\x1e" + bytes((12,)) + self._dice.randbytes(12)
                    protocol, payload = DESTINATION_OPTIONS, options_header(protocol, padding, payload)
                case 3:
                    check_value = self._dice.randbytes(12)
                    payload = authentication(protocol, self._u32(), self._u32(), check_value, payload)
                    protocol = AH
                case 2:
                    atomic = self._u32()
                    payload = fragment_header(protocol, 0, payload, more=False, identification=atomic)
                    protocol = FRAGMENT
                case 1:
                    protocol, payload = ROUTING, routing_header(protocol, 4, bytes(4), payload)
                case 0:
                    options = self._dice.choice((b"", b"\x05\x02\x00\x00", b"\x1e\x02ab"))
                    protocol, payload = HOP_BY_HOP, options_header(protocol, options, payload)
        yield self._packet(protocol, payload)

    def no_next_header(self) -> Iterator[bytes]:
        yield self._packet(NO_NEXT_HEADER, self._payload())

    def sctp(self) -> Iterator[bytes]:
        data = struct.pack("!IHHI", self._u32(), 1, 2, 0) + self._dice.randbytes(
            self._dice.randrange(1, 1000)
        )
        chunks = sctp_chunk(0, 3, data) + sctp_chunk(3, 0, self._dice.randbytes(12))
        yield self._packet(SCTP, sctp(self._port(), self._port(), self._u32(), chunks))

    def gre(self) -> Iterator[bytes]:
        inner = ipv4(IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"), UDP, self._dice.randbytes(80))
        yield self._packet(
            GRE,
            gre(
                0x0800,
                inner,
                key=self._dice.choice((None, self._u32())),
                sequence=self._dice.choice((None, self._u32())),
                with_checksum=self._dice.random() < 0.5,
            ),
        )

    def tunnelled(self) -> Iterator[bytes]:
        """An IP packet directly in an IP packet, of both versions."""
        four, also_four = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
        six, also_six = IPv6Address("2001:db8::1"), IPv6Address("2001:db8::2")
        yield self._packet(IP_IN_IP, ipv4(four, also_four, UDP, udp(four, also_four, 1, 2, self._payload())))
        yield self._packet(IPV6_IN_IP, ipv6(six, also_six, UDP, udp(six, also_six, 1, 2, self._payload())))

    def any_protocol(self) -> Iterator[bytes]:
        """Protocols whose payload nobody looks into: DCCP, RSVP, OSPF, PIM, VRRP, L2TP, experiments, ..."""
        protocol = self._dice.choice((3, 8, 9, 33, 46, 89, 94, 103, 108, 112, 115, 136, 137, 142, 252, 253))
        yield self._packet(protocol, self._dice.randbytes(4) + self._payload())

    def _packet(self, protocol: int, payload: bytes, *, options: bytes = b"") -> bytes:
        """Wrap `payload`, which is cut when the whole would be too large, in a header with random fields."""
        if self._source.version == 4:
            packet = ipv4(
                self._source,
                self._destination,
                protocol,
                payload,
                options=options,
                identification=self._identification(),
                service=self._dice.randrange(256),
                flags_and_offset=self._dice.choice((0, 1 << 14)),
                ttl=self._dice.randrange(2, 256),
            )
        else:
            packet = ipv6(
                self._source,
                self._destination,
                protocol,
                payload,
                traffic_class=self._dice.randrange(256),
                flow_label=self._dice.randrange(1 << 20),
                hop_limit=self._dice.randrange(2, 256),
            )
        assert len(packet) <= MTU_BYTES
        return packet

    def _icmp(self, kind: int, code: int, body: bytes) -> bytes:
        if self._source.version == 4:
            return self._packet(ICMP, icmp(kind, code, body))
        return self._packet(ICMPV6, icmpv6(self._source, self._destination, kind, code, body))

    def _datagram(self, payload: bytes) -> bytes:
        return udp(self._source, self._destination, self._port(), self._port(), payload)

    def _payload(self) -> bytes:
        """Sizes on and around the borders as often as any others; the longest fits behind all headers."""
        sizes = (0, 1, 2, 3, 64, 512, 1000, 1160, self._dice.randrange(1160))
        return self._dice.randbytes(self._dice.choice(sizes))

    def _port(self) -> int:
        return self._dice.choice((1, 53, 80, 443, 4242, 65535, self._dice.randrange(1, 1 << 16)))

    def _identification(self) -> int:
        return self._dice.randrange(1, 1 << 16)

    def _u32(self) -> int:
        return self._dice.randrange(1 << 32)
