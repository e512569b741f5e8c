"""A superpacket is cut into the packets that the local stack would have sent without offloads.

Data flow: TUN -> virtio -> [segment] -> the area being filled, where it is sealed in place
Knows IP, TCP and UDP headers and where the caller wants the packets; knows nothing of tunnels and seals.
Source: RFC 791, RFC 6864 (IP id), RFC 8200, RFC 9293, RFC 768, RFC 3168 section 6.1.2 (CWR); what of it a
segment gets is what Linux does itself (net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c).

A superpacket of 64 KB becomes 50 packets in about 20 numpy calls: all that differs from packet to packet is a
column of numbers. `place` copies the payload, `stamp` writes headers and checksums in front of payload that
lies where it belongs, so that a caller who reads the payload to its place needs only that.
"""

from typing import Final

import numpy as np

from nebula_mp.datapath.checksums import (
    U16,
    U32,
    Numbers,
    Rows,
    checksum_fields,
    plain_sum,
    row_sums,
    udp_checksum_fields,
)
from nebula_mp.datapath.virtio import (
    TCP_CHECKSUM_AT,
    UDP_CHECKSUM_AT,
    UDP_HEADER_BYTES,
    GsoType,
    VirtioHeader,
)
from nebula_mp.newtypes import Buffer
from nebula_mp.wire.ip import IPV6_HEADER_BYTES

IPV4_LENGTH_AT: Final = 2
IPV4_ID_AT: Final = 4
IPV4_CHECKSUM_AT: Final = 10
IPV6_LENGTH_AT: Final = 4
TCP_SEQUENCE_AT: Final = 4
TCP_FLAGS_AT: Final = 13
UDP_LENGTH_AT: Final = 4
FIN: Final = 0x01
PSH: Final = 0x08
CWR: Final = 0x80

_U16_ZERO: Final = bytes(2)


class Cut:
    """How one superpacket is cut. `place` and `stamp` as many packets at a time as there is room for.

    `count` packets, each of `segment_bytes`, of which `header_bytes` are headers; the last one may be shorter
    (`segment_size`). Made of headers that `VirtioHeader.parse` accepted together with the packet.
    """

    __slots__ = (
        "_first_flags",
        "_id",
        "_ip_sum",
        "_is_tcp",
        "_last_flags",
        "_missing",
        "_sequence",
        "_template",
        "_transport",
        "_transport_sum",
        "count",
        "header_bytes",
        "payload_bytes",
        "segment_bytes",
    )

    def __init__(self, header: VirtioHeader, packet: Buffer, packet_bytes: int | None = None) -> None:
        """`packet` may be only the beginning, with all headers, of a packet of `packet_bytes`."""
        size = len(packet) if packet_bytes is None else packet_bytes
        self.header_bytes: Final = header.header_bytes
        whole = size - header.header_bytes
        # More than there is would make lengths that no field can hold.
        self.payload_bytes: Final = min(header.segment_bytes, whole) or 1
        self.segment_bytes: Final = self.header_bytes + self.payload_bytes
        self.count: Final = max(1, -(-whole // self.payload_bytes))
        self._missing: Final = self.count * self.payload_bytes - whole  # to make the last one a full one
        self._is_tcp: Final = header.gso is not GsoType.UDP
        self._transport: Final = header.checksum_start
        template = bytearray(packet[: self.header_bytes])
        self._id = self._ip_sum = -1  # of IPv6
        if template[0] >> 4 == 4:
            self._prepare_ipv4(template)
        else:
            length = self.segment_bytes - IPV6_HEADER_BYTES
            template[IPV6_LENGTH_AT : IPV6_LENGTH_AT + 2] = length.to_bytes(2, "big")
        # The field holds the sum of the pseudo header of the superpacket. All but its length stays.
        at = self._transport + header.checksum_offset
        seed = (template[at] << 8 | template[at + 1]) - size + self.segment_bytes
        template[at : at + 2] = _U16_ZERO
        self._sequence = self._first_flags = self._last_flags = 0  # of UDP
        if self._is_tcp:
            self._prepare_tcp(template)
        else:
            length = UDP_HEADER_BYTES + self.payload_bytes
            template[self._transport + UDP_LENGTH_AT : at] = length.to_bytes(2, "big")
        self._transport_sum: Final = seed + plain_sum(template[self._transport :])
        self._template: Final = np.frombuffer(template, np.uint8)

    def _prepare_ipv4(self, template: bytearray) -> None:
        """Make of it the header of a full segment, without id and checksum."""
        self._id = template[IPV4_ID_AT] << 8 | template[IPV4_ID_AT + 1]
        template[IPV4_LENGTH_AT : IPV4_LENGTH_AT + 2] = self.segment_bytes.to_bytes(2, "big")
        template[IPV4_ID_AT : IPV4_ID_AT + 2] = _U16_ZERO
        template[IPV4_CHECKSUM_AT : IPV4_CHECKSUM_AT + 2] = _U16_ZERO
        self._ip_sum = plain_sum(template[: self._transport])

    def _prepare_tcp(self, template: bytearray) -> None:
        """Make of it the header of a segment in the middle, without sequence number."""
        at = self._transport + TCP_SEQUENCE_AT
        self._sequence = int.from_bytes(template[at : at + 4], "big")
        template[at : at + 4] = bytes(4)
        flags = template[self._transport + TCP_FLAGS_AT]
        self._first_flags = flags & CWR
        self._last_flags = flags & (FIN | PSH)
        template[self._transport + TCP_FLAGS_AT] = flags & ~(CWR | FIN | PSH)

    def segment_size(self, number: int) -> int:
        """Bytes of packet `number`."""
        return self.segment_bytes - (self._missing if number == self.count - 1 else 0)

    def place(self, packet: Buffer, out: memoryview, stride: int, first: int = 0, count: int = -1) -> None:
        """Copy the payload of `count` packets to where it belongs, from packet `first` on; -1: all the rest.

        They begin at `out` and every `stride` bytes, at least `segment_bytes`, behind it.
        """
        count, full = self._range(first, count)
        payload, header = self.payload_bytes, self.header_bytes
        at = header + first * payload
        if full:
            source = Rows(packet, at, payload, full).block(0, payload)
            Rows(out, header, stride, full).block(0, payload)[...] = source
        if full < count:
            at, to = at + full * payload, header + full * stride
            size = payload - self._missing
            out[to : to + size] = packet[at : at + size]

    def stamp(self, out: memoryview, stride: int, first: int = 0, count: int = -1) -> None:
        """Write the headers of packets whose payload was placed, with their checksums; as for `place`."""
        count, full = self._range(first, count)
        rows = Rows(out, 0, stride, count)
        rows.block(0, self.header_bytes)[...] = self._template
        numbers = np.arange(first, first + count)
        sums = np.empty(count, np.int64)
        sums[:full] = row_sums(Rows(out, self.header_bytes, stride, full), 0, self.payload_bytes)
        if full < count:
            at = self.header_bytes + full * stride
            sums[full] = plain_sum(out[at : at + self.payload_bytes - self._missing])
        sums += self._transport_sum
        has_last = first + count == self.count
        if self._is_tcp:
            self._stamp_tcp(rows, numbers, sums, has_first=first == 0, has_last=has_last)
        else:
            self._stamp_udp(rows, sums, has_last=has_last)
        if self._ip_sum >= 0:
            self._stamp_ipv4(rows, numbers, has_last=has_last)
        elif has_last and self._missing:
            _subtract(out, (count - 1) * stride + IPV6_LENGTH_AT, self._missing)

    def _range(self, first: int, count: int) -> tuple[int, int]:
        """How many packets are meant, and how many of them are full ones."""
        count = self.count - first if count < 0 else count
        assert 0 <= first < first + count <= self.count
        return count, count - (first + count == self.count and self._missing > 0)

    def _stamp_ipv4(self, rows: Rows, numbers: Numbers, *, has_last: bool) -> None:
        ids = numbers + self._id & 0xFFFF
        rows.fields(IPV4_ID_AT, U16)[...] = ids
        ids += self._ip_sum
        if has_last and self._missing:
            ids[-1] -= self._missing
            _subtract(rows.memory, (rows.height - 1) * rows.stride + IPV4_LENGTH_AT, self._missing)
        rows.fields(IPV4_CHECKSUM_AT, U16)[...] = checksum_fields(ids)

    def _stamp_tcp(
        self, rows: Rows, numbers: Numbers, sums: Numbers, *, has_first: bool, has_last: bool
    ) -> None:
        at = self._transport
        sequences = numbers * self.payload_bytes
        sequences += self._sequence
        sequences &= 0xFFFF_FFFF
        rows.fields(at + TCP_SEQUENCE_AT, U32)[...] = sequences
        sums += sequences
        if has_first and self._first_flags:
            _add_flags(rows.memory, at + TCP_FLAGS_AT, self._first_flags)
            sums[0] += self._first_flags
        if has_last:
            _add_flags(rows.memory, (rows.height - 1) * rows.stride + at + TCP_FLAGS_AT, self._last_flags)
            sums[-1] += self._last_flags - self._missing
        rows.fields(at + TCP_CHECKSUM_AT, U16)[...] = checksum_fields(sums)

    def _stamp_udp(self, rows: Rows, sums: Numbers, *, has_last: bool) -> None:
        at = self._transport
        if has_last and self._missing:
            sums[-1] -= 2 * self._missing  # in the header and in the pseudo header
            _subtract(rows.memory, (rows.height - 1) * rows.stride + at + UDP_LENGTH_AT, self._missing)
        rows.fields(at + UDP_CHECKSUM_AT, U16)[...] = udp_checksum_fields(sums)


def segment(header: VirtioHeader, packet: Buffer) -> list[bytes]:
    """Give the packets of a superpacket, or the one packet with its checksum completed.

    For a few of them; the data path has its own places for packets, and uses `Cut` and `complete`.
    """
    if header.gso is GsoType.NONE:
        single = bytearray(packet)
        complete(header, memoryview(single))
        return [bytes(single)]
    cut = Cut(header, packet)
    stride = cut.segment_bytes
    out = memoryview(bytearray(cut.count * stride))
    cut.place(packet, out, stride)
    cut.stamp(out, stride)
    return [
        bytes(out[number * stride : number * stride + cut.segment_size(number)])
        for number in range(cut.count)
    ]


def complete(header: VirtioHeader, packet: memoryview) -> None:
    """Write the checksum of a packet that is no superpacket, if it needs one.

    The protocol is not known here, so 0 is written as 0xFFFF, as Linux does: UDP must, others may.
    """
    if header.needs_checksum:
        start = header.checksum_start
        at = start + header.checksum_offset
        field = 0xFFFF - plain_sum(packet[start:])
        packet[at : at + 2] = field.to_bytes(2, "big")


def _add_flags(memory: Buffer, at: int, flags: int) -> None:
    """Set bits of one byte."""
    assert not isinstance(memory, bytes)
    memory[at] |= flags


def _subtract(memory: Buffer, at: int, amount: int) -> None:
    """Make a 16-bit field smaller by so much."""
    assert not isinstance(memory, bytes)
    value = (memory[at] << 8 | memory[at + 1]) - amount
    memory[at : at + 2] = value.to_bytes(2, "big")
