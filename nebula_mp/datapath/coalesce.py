"""Packets of one flow that follow each other are joined to a superpacket, which the kernel takes as one.

Data flow: opened messages -> [coalesce] -> virtio -> the open ring -> TUN
Knows when several packets mean exactly what one superpacket means; knows nothing of tunnels, and does not ask
whether a packet may pass: all packets of a run are of one flow, so one look-up answers for the run.
Source: RFC 791, RFC 6864 (IP id), RFC 8200, RFC 9293, RFC 768, RFC 3168; Linux net/ipv4/tcp_offload.c and
net/ipv4/udp_offload.c (GRO), of which these rules are a stricter version.

A packet joins the one before it if cutting the superpacket would give both back, but for IP ids that nobody
may use:

- both are whole TCP or UDP packets over IPv4 without options or IPv6 without extension headers, of which the
  IP and UDP lengths are those of the packet, with payload;
- addresses, ports, hop limit, DSCP and ECN, DF, flow label, acknowledgement, window, TCP options are equal;
- TCP has ACK, may have ECE, and no other flag; PSH ends a superpacket;
- TCP sequence numbers follow each other; so do IPv4 ids, unless DF is set;
- all have as much payload as the first, only the last one may have less;
- the checksums of both, of IP and of TCP or UDP, are there and right. The kernel does not check those of a
  superpacket, so joining a damaged packet would hide the damage.

The order of packets never changes, and those that do not join are given as they came.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nebula_mp.datapath.checksums import (
    U16,
    U32,
    Rows,
    are_right,
    plain_sum,
    pseudo_sum,
    row_sums,
    word_sums,
)
from nebula_mp.datapath.segment import (
    IPV4_CHECKSUM_AT,
    IPV4_ID_AT,
    IPV4_LENGTH_AT,
    IPV6_LENGTH_AT,
    PSH,
    TCP_FLAGS_AT,
    TCP_SEQUENCE_AT,
    UDP_LENGTH_AT,
)
from nebula_mp.datapath.virtio import (
    PACKET_BYTES_MAX,
    PLAIN,
    TCP_CHECKSUM_AT,
    TCP_HEADER_BYTES,
    UDP_CHECKSUM_AT,
    UDP_HEADER_BYTES,
    GsoType,
    VirtioHeader,
)
from nebula_mp.newtypes import Buffer
from nebula_mp.wire.ip import IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, TCP, UDP

ALL: Final = frozenset({GsoType.TCP4, GsoType.TCP6, GsoType.UDP})
"""Every kind of superpacket; UDP needs Linux 6.2."""

_PLAIN: Final = PLAIN.encode()
_ACK: Final = 0x10
_ECE: Final = 0x40
_DF: Final = 0x40  # in byte 6 of an IPv4 header
_IPV4_FLAGS_AT: Final = 6
_IPV4_ADDRESSES_AT: Final = 12
_IPV6_ADDRESSES_AT: Final = 8
_NO_BYTES: Final = bytes(2)


class Shape(NamedTuple):
    """Where things are in a packet that could be joined."""

    gso: GsoType
    transport: int  # offset of the transport header
    header_bytes: int
    addresses_at: int
    protocol: int


class Joined(NamedTuple):
    """One thing to write: `packets` from number `first` on, as a superpacket, or one as it came.

    `head` is the virtio header, and for a superpacket its IP and transport headers. Behind it belong as many
    pieces of `piece_bytes` each, the last of `last_bytes`; they lie at `at` and every `stride` behind it.
    """

    first: int
    packets: int
    head: bytes
    at: int
    stride: int
    piece_bytes: int
    last_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole, with its virtio header."""
        return len(self.head) + (self.packets - 1) * self.piece_bytes + self.last_bytes

    def pieces(self, memory: memoryview) -> list[Buffer]:
        """Give what `writev` takes; the payload is not copied."""
        at, stride, size = self.at, self.stride, self.piece_bytes
        last = at + (self.packets - 1) * stride
        pieces: list[Buffer] = [self.head]
        pieces += [memory[start : start + size] for start in range(at, last, stride)]
        pieces.append(memory[last : last + self.last_bytes])
        return pieces

    def write(self, memory: memoryview, out: memoryview) -> int:
        """Copy the whole to the beginning of `out`; gives its bytes."""
        size, at, full = self.piece_bytes, len(self.head), self.packets - 1
        out[:at] = self.head
        if full:
            rows = Rows(out, at, size, full).block(0, size)
            rows[...] = Rows(memory, self.at, self.stride, full).block(0, size)
            at += full * size
        last = self.at + full * self.stride
        end = at + self.last_bytes
        out[at:end] = memory[last : last + self.last_bytes]
        return end


def coalesce(
    memory: memoryview, stride: int, sizes: Sequence[int], kinds: frozenset[GsoType] = ALL
) -> list[Joined]:
    """Join what may be joined of the packets that lie at the beginning of `memory` and every `stride` bytes.

    `sizes`, none above `stride`, are their bytes; nothing that was received needs to make sense. `kinds` are
    the superpackets that the device takes. Every packet is in exactly one result, in order.
    """
    result = []
    first, total = 0, len(sizes)
    while first < total:
        count, shape = 1, None
        if first + 1 < total and sizes[first + 1] <= sizes[first]:
            count, shape = _run(memory, stride, sizes, first, kinds)
        if count == 1 or shape is None:
            result.append(Joined(first, 1, _PLAIN, first * stride, stride, sizes[first], sizes[first]))
        else:
            result.append(_join(Rows(memory, first * stride, stride, count), sizes, first, shape))
        first += count
    return result


def _run(
    memory: memoryview, stride: int, sizes: Sequence[int], first: int, kinds: frozenset[GsoType]
) -> tuple[int, Shape | None]:
    """How many packets from `first` on are one superpacket, and of which shape if it is more than one."""
    at, size = first * stride, sizes[first]
    shape = shape_of(memory[at : at + size])
    if shape is None or shape.gso not in kinds:
        return 1, None
    ports = memory[at + shape.addresses_at : at + shape.transport + 4]
    following = at + stride
    if memory[following + shape.addresses_at : following + shape.transport + 4] != ports:
        return 1, None
    count, last = _equal_sizes(sizes, first, shape.header_bytes)
    headers = Rows(memory, at, stride, count)
    payload = Rows(memory, at + shape.header_bytes, stride, count)
    return joinable(shape, headers, payload, size, last), shape


def _equal_sizes(sizes: Sequence[int], first: int, header_bytes: int) -> tuple[int, int]:
    """How many packets have the size of the first, with a shorter one at the end; and the last one's size."""
    size = sizes[first]
    for number in range(first + 1, len(sizes)):
        if sizes[number] != size:
            if header_bytes < sizes[number] < size:
                return number + 1 - first, sizes[number]
            return number - first, size
    return len(sizes) - first, size


def _join(rows: Rows, sizes: Sequence[int], first: int, shape: Shape) -> Joined:
    """Make one of whole packets."""
    memory, at, stride, count = rows
    header_bytes = shape.header_bytes
    piece, last = sizes[first] - header_bytes, sizes[first + count - 1] - header_bytes
    end = at + (count - 1) * stride
    head = superpacket_head(
        shape,
        memory[at : at + header_bytes],
        memory[end : end + header_bytes],
        segment_bytes=piece,
        payload_bytes=(count - 1) * piece + last,
    )
    return Joined(first, count, head, at + header_bytes, stride, piece, last)


def shape_of(packet: Buffer) -> Shape | None:
    """Where things are in a packet that may be the first of a superpacket; None if it may not be.

    Whether its lengths and checksums are right is left to `joinable`.
    """
    size = len(packet)
    if size < IPV4_HEADER_BYTES + UDP_HEADER_BYTES:
        return None
    match packet[0]:
        case 0x45:
            # Reserved bit, MF and the offset of fragments are 0.
            if packet[_IPV4_FLAGS_AT] & ~_DF or packet[_IPV4_FLAGS_AT + 1]:
                return None
            return _shape(packet, packet[9], IPV4_HEADER_BYTES, GsoType.TCP4, _IPV4_ADDRESSES_AT)
        case first if first >> 4 == 6:
            return _shape(packet, packet[6], IPV6_HEADER_BYTES, GsoType.TCP6, _IPV6_ADDRESSES_AT)
    return None


def _shape(
    packet: Buffer, protocol: int, transport: int, gso_of_tcp: GsoType, addresses_at: int
) -> Shape | None:
    size = len(packet)
    if protocol == TCP and size > transport + TCP_HEADER_BYTES:
        # The four bits behind the offset are reserved, and one of them is accurate ECN's.
        words, reserved = divmod(packet[transport + 12], 16)
        header_bytes = transport + words * 4
        flags = packet[transport + TCP_FLAGS_AT]
        if words >= 5 and not reserved and flags & ~(PSH | _ECE) == _ACK and size > header_bytes:
            return Shape(gso_of_tcp, transport, header_bytes, addresses_at, TCP)
    elif protocol == UDP and size > transport + UDP_HEADER_BYTES:
        at = transport + UDP_CHECKSUM_AT
        if packet[at : at + 2] != _NO_BYTES:
            return Shape(GsoType.UDP, transport, transport + UDP_HEADER_BYTES, addresses_at, UDP)
    return None


def joinable(shape: Shape, headers: Rows, payload: Rows, size: int, last: int) -> int:
    """How many of these packets, from the first one on, are one superpacket; at least 1.

    `shape` is that of the first; `size` are the bytes of each packet, `last` those of the last one. Headers
    and payloads may lie anywhere; of the last payload only what belongs to it is looked at. What is cheap is
    looked at first, and payload only of packets whose headers fit. 17 us for 49 packets of which all join.
    """
    if _all_join(shape, headers, payload, size, last):
        return headers.height
    count = min(headers.height, _fitting(shape.header_bytes, size, last, headers.height))
    if count > 1:
        count = _equal_headers(shape, headers.top(count))
    if count > 1:
        count = _consecutive(shape, headers.top(count), size - shape.header_bytes)
    if count > 1:
        has_last = count == headers.height and last != size
        count = _correct(shape, headers.top(count), payload, size, last if has_last else size)
    return max(count, 1)


def _all_join(shape: Shape, headers: Rows, payload: Rows, size: int, last: int) -> bool:
    """Whether all packets are one superpacket, in as few calls as possible; False where it is not sure.

    It asks what the functions below ask, which also know how many join when not all do.
    """
    memory, offset, stride, count = headers
    transport, header_bytes = shape.transport, shape.header_bytes
    is_tcp, piece = shape.protocol == TCP, size - shape.header_bytes
    if count < 2 or piece * (count - 1) + last > PACKET_BYTES_MAX:
        return False
    block = headers.block(0, header_bytes)
    unequal = block ^ block[0]
    unequal &= _masks(shape, count, last != size)
    if unequal.any():
        return False
    if is_tcp:
        sequences = headers.fields(transport + TCP_SEQUENCE_AT, U32) - _ramp(count, piece)
        if sequences.tobytes() != sequences[:1].tobytes() * count:
            return False
        if memory[offset + transport + TCP_FLAGS_AT] & PSH:
            return False
    elif not headers.fields(transport + UDP_CHECKSUM_AT, U16).all():
        return False
    sums = word_sums(headers, _weights(shape))
    if transport == IPV4_HEADER_BYTES and not _has_df(headers):
        ids = headers.fields(IPV4_ID_AT, U16) - _ramp(count, 1).astype(np.uint16)
        if ids.tobytes() != ids[:1].tobytes() * count:
            return False
    for at, bytes_of_it in ((offset, size), (offset + (count - 1) * stride, last)):
        if not _has_lengths(shape, memory[at : at + header_bytes], bytes_of_it):
            return False
    full = count if last == size else count - 1
    whole = sums[1]
    whole[:full] += row_sums(payload.top(full), 0, piece)
    if full < count:
        at = payload.offset + full * payload.stride
        whole[full] += plain_sum(payload.memory[at : at + last - header_bytes]) + last - size
    whole += size + shape.protocol - transport
    return not (sums % 0xFFFF).any()


def _has_lengths(shape: Shape, header: Buffer, size: int) -> bool:
    """Whether the length fields of one packet are right."""
    if shape.transport == IPV4_HEADER_BYTES:
        right = int.from_bytes(header[IPV4_LENGTH_AT : IPV4_LENGTH_AT + 2], "big") == size
    else:
        right = int.from_bytes(header[IPV6_LENGTH_AT : IPV6_LENGTH_AT + 2], "big") == size - IPV6_HEADER_BYTES
    if shape.protocol == UDP:
        at = shape.transport + UDP_LENGTH_AT
        right = right and int.from_bytes(header[at : at + 2], "big") == size - shape.transport
    return right


@lru_cache(maxsize=64)
def _masks(shape: Shape, count: int, is_last_shorter: bool) -> NDArray[np.uint8]:  # noqa: FBT001 - a cache's key
    """Bits that are equal in all of `count` packets: more than `_mask`, since the last one is known."""
    masks = np.tile(_mask(shape), (count, 1))
    if shape.transport == IPV4_HEADER_BYTES:
        masks[:, IPV4_LENGTH_AT : IPV4_LENGTH_AT + 2] = 0xFF
    else:
        masks[:, IPV6_LENGTH_AT : IPV6_LENGTH_AT + 2] = 0xFF
    if shape.protocol == TCP:
        masks[:-1, shape.transport + TCP_FLAGS_AT] = 0xFF
    else:
        masks[:, shape.transport + UDP_LENGTH_AT : shape.transport + UDP_LENGTH_AT + 2] = 0xFF
    if is_last_shorter:
        masks[-1] = _mask(shape)
    return masks


@lru_cache(maxsize=64)
def _ramp(count: int, step: int) -> NDArray[np.uint32]:
    """0, step, 2 * step, ...; a sum of numbers modulo 2**32."""
    ramp: NDArray[np.uint32] = np.arange(count, dtype=np.uint32) * np.uint32(step)
    return ramp


@lru_cache(maxsize=64)
def _weights(shape: Shape) -> NDArray[np.float64]:
    """For `word_sums` of headers: the IPv4 header, and addresses and transport header."""
    weights = np.zeros((shape.header_bytes // 2, 2))
    if shape.transport == IPV4_HEADER_BYTES:
        weights[: IPV4_HEADER_BYTES // 2, 0] = 1
    weights[shape.addresses_at // 2 :, 1] = 1
    return weights


def _fitting(header_bytes: int, size: int, last: int, count: int) -> int:
    """How many of `count` packets a superpacket holds."""
    room, piece = PACKET_BYTES_MAX - header_bytes, size - header_bytes
    if (count - 1) * piece + last - header_bytes <= room:
        return count
    return min(room // piece, count - 1)


def _leading(good: NDArray[np.bool_]) -> int:
    """How many there are before the first that is not good."""
    worst = int(good.argmin())
    return len(good) if good[worst] else worst


def _equal_headers(shape: Shape, headers: Rows) -> int:
    """How many packets have the first one's header, but for the fields that the mask leaves out."""
    block = headers.block(0, shape.header_bytes)
    unequal = block ^ block[0]
    unequal &= _mask(shape)
    return _leading(~unequal.any(axis=1)) if unequal.any() else headers.height


@lru_cache(maxsize=64)
def _mask(shape: Shape) -> NDArray[np.uint8]:
    """Bits that are equal in all packets of a superpacket."""
    mask = np.full(shape.header_bytes, 0xFF, np.uint8)
    if shape.transport == IPV4_HEADER_BYTES:
        mask[IPV4_LENGTH_AT : IPV4_LENGTH_AT + 2] = 0
        mask[IPV4_ID_AT : IPV4_ID_AT + 2] = 0
        mask[IPV4_CHECKSUM_AT : IPV4_CHECKSUM_AT + 2] = 0
    else:
        mask[IPV6_LENGTH_AT : IPV6_LENGTH_AT + 2] = 0
    transport = mask[shape.transport :]
    if shape.protocol == TCP:
        transport[TCP_SEQUENCE_AT : TCP_SEQUENCE_AT + 4] = 0
        transport[TCP_FLAGS_AT] ^= PSH
        transport[TCP_CHECKSUM_AT : TCP_CHECKSUM_AT + 2] = 0
    else:
        transport[UDP_LENGTH_AT : UDP_LENGTH_AT + 2] = 0
        transport[UDP_CHECKSUM_AT : UDP_CHECKSUM_AT + 2] = 0
    return mask


def _consecutive(shape: Shape, headers: Rows, payload_bytes: int) -> int:
    """How many packets follow each other without a gap, and none of them a PSH."""
    count = headers.height
    numbers = np.arange(count)
    if shape.protocol == TCP:
        sequences = headers.numbers(shape.transport + TCP_SEQUENCE_AT, U32)
        expected = numbers * payload_bytes + sequences[0]
        expected &= 0xFFFF_FFFF
        count = _leading(sequences == expected)
        pushed = headers.fields(shape.transport + TCP_FLAGS_AT, np.uint8)[: count - 1] & PSH
        if pushed.any():
            count = 1 + int(pushed.argmax())
    if shape.transport == IPV4_HEADER_BYTES and not _has_df(headers):
        ids = headers.numbers(IPV4_ID_AT, U16)[:count]
        count = _leading(ids == (numbers[:count] + ids[0] & 0xFFFF))
    return count


def _has_df(headers: Rows) -> bool:
    """Whether the packets, which are equal in that, may not be fragmented: then ids mean nothing."""
    return bool(headers.memory[headers.offset + _IPV4_FLAGS_AT] & _DF)


def _correct(shape: Shape, headers: Rows, payload: Rows, size: int, last: int) -> int:
    """How many packets have the lengths and checksums that they should have."""
    count, transport, header_bytes = headers.height, shape.transport, shape.header_bytes
    full = count if last == size else count - 1
    sizes = np.full(count, size)
    sums = np.empty(count, np.int64)
    sums[:full] = row_sums(payload.top(full), 0, size - header_bytes)
    if full < count:
        sizes[full] = last
        at = payload.offset + full * payload.stride
        sums[full] = plain_sum(payload.memory[at : at + last - header_bytes])
    # Addresses and transport header lie behind each other: the pseudo header needs only protocol and length.
    sums += row_sums(headers, shape.addresses_at, header_bytes - shape.addresses_at)
    sums += sizes
    sums += shape.protocol - transport
    good = are_right(sums)
    if transport == IPV4_HEADER_BYTES:
        good &= headers.fields(IPV4_LENGTH_AT, U16) == sizes
        good &= are_right(row_sums(headers, 0, IPV4_HEADER_BYTES))
    else:
        good &= headers.fields(IPV6_LENGTH_AT, U16) == sizes - IPV6_HEADER_BYTES
    if shape.protocol == UDP:
        good &= headers.fields(transport + UDP_LENGTH_AT, U16) == sizes - transport
        good &= headers.fields(transport + UDP_CHECKSUM_AT, U16) != 0
    return _leading(good)


def superpacket_head(
    shape: Shape, first: Buffer, last: Buffer, *, segment_bytes: int, payload_bytes: int
) -> bytes:
    """Give virtio, IP and transport header of a superpacket, made of the first and last packet's headers."""
    head = bytearray(first)
    transport, at = shape.transport, shape.transport
    size = shape.header_bytes + payload_bytes
    if transport == IPV4_HEADER_BYTES:
        head[IPV4_LENGTH_AT : IPV4_LENGTH_AT + 2] = size.to_bytes(2, "big")
        head[IPV4_CHECKSUM_AT : IPV4_CHECKSUM_AT + 2] = _NO_BYTES
        field = 0xFFFF - plain_sum(head[:IPV4_HEADER_BYTES])
        head[IPV4_CHECKSUM_AT : IPV4_CHECKSUM_AT + 2] = field.to_bytes(2, "big")
    else:
        head[IPV6_LENGTH_AT : IPV6_LENGTH_AT + 2] = (size - IPV6_HEADER_BYTES).to_bytes(2, "big")
    length = size - transport
    if shape.protocol == TCP:
        head[at + TCP_FLAGS_AT] |= last[at + TCP_FLAGS_AT] & PSH
        offset = TCP_CHECKSUM_AT
    else:
        head[at + UDP_LENGTH_AT : at + UDP_LENGTH_AT + 2] = length.to_bytes(2, "big")
        offset = UDP_CHECKSUM_AT
    seed = pseudo_sum(head[shape.addresses_at : transport], shape.protocol, length)
    # Folded without becoming 0: a sum that is congruent to 0 is 65535 for the kernel, as for any adder.
    head[at + offset : at + offset + 2] = (((seed - 1) % 0xFFFF) + 1).to_bytes(2, "big")
    header = VirtioHeader(
        gso=shape.gso,
        needs_checksum=True,
        header_bytes=shape.header_bytes,
        segment_bytes=segment_bytes,
        checksum_start=transport,
        checksum_offset=offset,
    )
    return header.encode() + bytes(head)
