"""A superpacket is cut into the packets that the local stack would have sent without offloads.

Data flow: TUN -> virtio -> [segment] -> the area being filled, where it is sealed in place
Knows IP, TCP and UDP headers and where the caller wants the packets; knows nothing of tunnels and seals.
Source: RFC 791, RFC 6864 (IP id), RFC 8200, RFC 9293, RFC 768, RFC 3168 section 6.1.2 (CWR); what of it a
segment gets is what Linux does itself (net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c).

A superpacket of 64 KB becomes 50 packets in a dozen numpy calls: all that differs from packet to packet is a
column of numbers, and the columns of a memory that is filled again and again are kept (`Slots`). `place`
copies the payload, `stamp` writes headers and checksums in front of payload that lies where it belongs, so
that a caller who reads the payload to its place needs only that.
"""

import struct
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nebula_mp.datapath.checksums import (
    U16,
    U32,
    Rows,
    Words,
    plain_sum,
    swapped_fields,
    swapped_sum,
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

_U16: Final = struct.Struct("!H")
_U32: Final = struct.Struct("!I")
_LENGTH_AND_ID: Final = struct.Struct("!HH")
_RISING: Final = np.arange(1 << 17).astype(U16)
"""All ids, twice: those of packets that follow each other."""
_FALLING: Final = (-np.arange(1 << 17) % 0xFFFF).astype(U16)
"""The checksum fields for the sums 0, 1, 2, ..."""


class Layout(NamedTuple):
    """Where the fields of the packets of a superpacket lie; as a rule the same throughout a connection."""

    segment_bytes: int
    header_bytes: int
    transport: int
    is_tcp: bool
    is_ipv4: bool


class Slots:
    """Where packets of one layout lie: at the beginning of a memory, and every `stride` bytes behind it.

    Views of all fields that differ from packet to packet. To be kept for memory that is filled again and
    again: to make them takes 4 us.
    """

    __slots__ = (
        "checksums",
        "headers",
        "ids",
        "ip_checksums",
        "memory",
        "payloads",
        "sequences",
        "steps",
        "stride",
        "whole",
        "words",
    )

    def __init__(self, layout: Layout, memory: memoryview, stride: int) -> None:
        """`stride` is at least the size of a packet."""
        size, header_bytes, transport, is_tcp, is_ipv4 = layout
        payload_bytes = size - header_bytes
        self.memory: Final = memory
        self.stride: Final = stride
        self.whole: Final = max(0, (len(memory) - size) // stride + 1)
        """How many have room; one more may have room for its headers, and be a shorter one."""
        rows = Rows(memory, 0, stride, max(0, (len(memory) - header_bytes) // stride + 1))
        full = rows.top(self.whole)
        # As one item each, which is copied quicker than its bytes.
        self.headers: Final = rows.fields(0, np.dtype((np.void, header_bytes)))
        self.payloads: Final = full.fields(header_bytes, np.dtype((np.void, payload_bytes)))
        self.words: Final = Words(full, transport, size - transport)
        at = transport + (TCP_CHECKSUM_AT if is_tcp else UDP_CHECKSUM_AT)
        self.checksums: Final = rows.fields(at, np.uint16)
        self.ids: Final = rows.fields(IPV4_ID_AT, U16) if is_ipv4 else None
        self.ip_checksums: Final = rows.fields(IPV4_CHECKSUM_AT, U16) if is_ipv4 else None
        self.sequences: Final = rows.fields(transport + TCP_SEQUENCE_AT, U32) if is_tcp else None
        self.steps: Final = np.arange(rows.height, dtype=np.uint32) * np.uint32(payload_bytes)


class Cut:
    """How one superpacket is cut. `place` and `stamp` as many packets at a time as there is room for.

    `count` packets, each of `segment_bytes`, of which `header_bytes` are headers; the last one may be shorter
    (`segment_size`). Made of headers that `VirtioHeader.parse` accepted together with the packet.
    """

    __slots__ = (
        "_checksum_at",
        "_first_flags",
        "_id",
        "_ip_sum",
        "_last_flags",
        "_missing",
        "_seed",
        "_sequence",
        "_template",
        "_transport",
        "count",
        "header_bytes",
        "layout",
        "payload_bytes",
        "segment_bytes",
    )

    def __init__(self, header: VirtioHeader, packet: Buffer, packet_bytes: int | None = None) -> None:
        """`packet` may be only the beginning, with all headers, of a packet of `packet_bytes`."""
        size = len(packet) if packet_bytes is None else packet_bytes
        gso, _, _, header_bytes, wanted, transport, offset = header
        whole = size - header_bytes
        # More than there is would make lengths that no field can hold.
        payload_bytes = min(wanted, whole) or 1
        segment_bytes = header_bytes + payload_bytes
        self.payload_bytes: Final = payload_bytes
        self.header_bytes: Final = header_bytes
        self.segment_bytes: Final = segment_bytes
        self.count: Final = max(1, -(-whole // payload_bytes))
        self._missing: Final = self.count * payload_bytes - whole  # to make the last one a full one
        self._transport: Final = transport
        template = bytearray(packet[:header_bytes])
        is_ipv4, is_tcp = template[0] >> 4 == 4, gso is not GsoType.UDP
        self.layout: Final = Layout(segment_bytes, header_bytes, transport, is_tcp, is_ipv4)
        self._id = self._ip_sum = 0  # of IPv6
        if is_ipv4:
            self._prepare_ipv4(template)
        else:
            _U16.pack_into(template, IPV6_LENGTH_AT, segment_bytes - IPV6_HEADER_BYTES)
        # The field holds the sum of the pseudo header of the superpacket. All but its length stays, and the
        # field is added up with all the rest.
        at = transport + offset
        self._checksum_at: Final = at
        self._seed: Final = (template[at] << 8 | template[at + 1]) - size + segment_bytes
        _U16.pack_into(template, at, self._seed % 0xFFFF)
        self._sequence = self._first_flags = self._last_flags = 0  # of UDP
        if is_tcp:
            self._prepare_tcp(template)
        else:
            _U16.pack_into(template, transport + UDP_LENGTH_AT, UDP_HEADER_BYTES + payload_bytes)
        self._template: Final = template

    def _prepare_ipv4(self, template: bytearray) -> None:
        """Make of it the header of a full segment, without id and checksum."""
        self._id = template[IPV4_ID_AT] << 8 | template[IPV4_ID_AT + 1]
        _LENGTH_AND_ID.pack_into(template, IPV4_LENGTH_AT, self.segment_bytes, 0)
        _U16.pack_into(template, IPV4_CHECKSUM_AT, 0)
        self._ip_sum = plain_sum(template[: self._transport])

    def _prepare_tcp(self, template: bytearray) -> None:
        """Make of it the header of a segment in the middle; its sequence number is written over."""
        (self._sequence,) = _U32.unpack_from(template, self._transport + TCP_SEQUENCE_AT)
        at = self._transport + TCP_FLAGS_AT
        flags = template[at]
        self._first_flags = flags & CWR
        self._last_flags = flags & (FIN | PSH)
        template[at] = flags & ~(CWR | FIN | PSH)

    def segment_size(self, number: int) -> int:
        """Bytes of packet `number`."""
        return self.segment_bytes - (self._missing if number == self.count - 1 else 0)

    def place(self, packet: Buffer, slots: Slots, at: int = 0, first: int = 0, count: int = -1) -> None:
        """Copy the payload of `count` packets, from packet `first` on, to the slots from `at` on.

        -1: all the rest. `slots` are those of this layout.
        """
        count = self._range(first, count)
        full = count - (first + count == self.count and self._missing > 0)
        payload = self.payload_bytes
        begin = self.header_bytes + first * payload
        if full:
            target = slots.payloads[at : at + full]
            target[...] = np.ndarray((full,), target.dtype, packet, begin)
        if full < count:
            begin += full * payload
            to = (at + full) * slots.stride + self.header_bytes
            size = payload - self._missing
            slots.memory[to : to + size] = packet[begin : begin + size]

    def stamp(self, slots: Slots, at: int = 0, first: int = 0, count: int = -1) -> None:
        """Write the headers of packets whose payload was placed, with their checksums; as for `place`.

        Behind a shorter last packet zeros are written, if there is room for a full one.
        """
        count = self._range(first, count)
        end = at + count
        slots.headers[at:end] = np.frombuffer(self._template, slots.headers.dtype)
        if slots.ids is not None and slots.ip_checksums is not None:
            write_ids(slots.ids[at:end], slots.ip_checksums[at:end], self._id + first & 0xFFFF, self._ip_sum)
        if slots.sequences is not None:
            begin = self._sequence + first * self.payload_bytes & 0xFFFF_FFFF
            slots.sequences[at:end] = slots.steps[:count] + np.uint32(begin)
            if first == 0 and self._first_flags:
                slots.memory[at * slots.stride + self._transport + TCP_FLAGS_AT] |= self._first_flags
        if first + count == self.count:
            self._stamp_last(slots, end - 1)
        # Everything is added up where it lies, the header with the seed in it too.
        sums = slots.words.swapped_sums(at, end)
        if len(sums) < count:  # the last one is shorter, and a full one has no room
            begin, size = (end - 1) * slots.stride, self.segment_bytes - self._missing
            last = swapped_sum(slots.memory[begin + self._transport : begin + size])
            sums = np.append(sums, last)
        slots.checksums[at:end] = swapped_fields(sums, is_udp=slots.sequences is None)

    def _range(self, first: int, count: int) -> int:
        """How many packets are meant."""
        count = self.count - first if count < 0 else count
        assert 0 <= first < first + count <= self.count
        return count

    def _stamp_last(self, slots: Slots, number: int) -> None:
        """Make of slot `number`, which has the header of one in the middle, the last one."""
        memory, missing, at = slots.memory, self._missing, number * slots.stride
        transport = at + self._transport
        if self._last_flags:
            memory[transport + TCP_FLAGS_AT] |= self._last_flags
        if not missing:
            return
        if number < slots.whole:  # so that its sum is that of a full one
            end = at + self.segment_bytes
            memory[end - missing : end] = bytes(missing)
        size = self.segment_bytes - missing
        _U16.pack_into(memory, at + self._checksum_at, (self._seed - missing) % 0xFFFF)
        if self.layout.is_ipv4:
            identification = self._id + self.count - 1 & 0xFFFF
            _U16.pack_into(memory, at + IPV4_LENGTH_AT, size)
            field = (missing - self._ip_sum - identification) % 0xFFFF
            _U16.pack_into(memory, at + IPV4_CHECKSUM_AT, field)
        else:
            _U16.pack_into(memory, at + IPV6_LENGTH_AT, size - IPV6_HEADER_BYTES)
        if not self.layout.is_tcp:
            _U16.pack_into(memory, transport + UDP_LENGTH_AT, size - self._transport)


def write_ids(ids: NDArray[Any], checksums: NDArray[Any], first: int, rest_sum: int) -> None:
    """Write the ids of IPv4 packets that follow each other, of which the first has the id `first`.

    `rest_sum` is the sum of a header without id and checksum. From packet to packet ids rise by one, and so
    checksums fall by one: both are copied from tables.
    """
    count, until_wrap = len(ids), 0x10000 - first
    if until_wrap < count:  # after 65535 comes 0, and no step in the checksum
        write_ids(ids[until_wrap:], checksums[until_wrap:], 0, rest_sum)
        count = until_wrap
    ids[:count] = _RISING[first : first + count]
    begin = (rest_sum + first) % 0xFFFF
    checksums[:count] = _FALLING[begin : begin + count]


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
    slots = Slots(cut.layout, out, stride)
    cut.place(packet, slots)
    cut.stamp(slots)
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
