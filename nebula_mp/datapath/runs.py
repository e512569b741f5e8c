"""Packets for one peer that are given their counters at once, and how they are sealed into an area.

Data flow: datapath.sealing -> [runs] -> the area being filled of the seal ring
Knows where in an area each datagram lies and that its entry is cut every `segment` bytes; knows nothing of
tables, and takes no counters itself.
Source: docs/wire-format.md for the header; docs/architecture.md, "Who drains".

A plain packet is sealed from where it was read into its place. A superpacket is copied and cut to its places
first, 16 bytes of header and 16 of tag apart, and each packet is sealed where it lies:

    area   | header | packet 0      | tag | header | packet 1      | tag | ... | header | shorter | tag |
           |<------------- stride ------->|<------------- stride ------->|

Places of one stride begin at multiples of it, so that an area has the same ones each time it is filled, and
their views can be kept: to make three for each packet takes 0.25 us, sealing itself 0.6 us for 1300 bytes.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nebula_mp.crypto.aead import TAG_BYTES, Aead
from nebula_mp.datapath.filling import Filler
from nebula_mp.datapath.segment import Cut, Layout, Slots, segment
from nebula_mp.datapath.virtio import VirtioHeader
from nebula_mp.newtypes import Buffer
from nebula_mp.shm_counters import SPAN_MAX
from nebula_mp.shm_table import PeerRef
from nebula_mp.wire.header import HEADER_BYTES, MESSAGE_IP, VERSION, MessageType

OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES

PACKETS_MAX: Final = SPAN_MAX // 2
"""Of a run. Of two workers that send to one peer each may then be one run behind the other."""

PLACES_MAX: Final = 8192
"""So many places are kept, with 0.6 KB each; 32 areas with packets of 1300 bytes have 1,700."""

_LAYOUTS_MAX: Final = 8  # of one stride in one area, with 2 KB each
_HEADER: Final = struct.Struct("!IIQ")
_FIRST_WORD: Final = (VERSION << 4 | MessageType.MESSAGE) << 24 | MESSAGE_IP << 16
_COUNTER_AT: Final = 8
_FIRST_HALF: Final = _FIRST_WORD << 32
"""What stands in front of the counter, but for the remote index."""
_U64: Final = np.dtype(">u8")


class _Grid:
    """The places of one stride in one area, as far as they were used."""

    __slots__ = ("_area", "_slots", "_stride", "counters", "first_halves", "headers", "outs", "plaintexts")

    def __init__(self, area: memoryview, stride: int) -> None:
        self._area = area
        self._stride = stride
        self._slots: dict[Layout, Slots] = {}
        count = (len(area) - HEADER_BYTES) // stride + 1  # the last one may have room for a shorter packet
        # Of the headers: all but the counters, and the counters.
        self.first_halves: NDArray[np.uint64] = np.ndarray((count,), _U64, area, 0, (stride,))
        self.counters: NDArray[np.uint64] = np.ndarray((count,), _U64, area, _COUNTER_AT, (stride,))
        self.headers: list[memoryview] = []
        self.plaintexts: list[memoryview] = []
        self.outs: list[memoryview] = []

    def extend(self, count: int) -> None:
        """Have views of so many places."""
        area, stride = self._area, self._stride
        for start in range(len(self.headers) * stride, count * stride, stride):
            middle, end = start + HEADER_BYTES, start + stride
            self.headers.append(area[start:middle])
            self.plaintexts.append(area[middle : end - TAG_BYTES])
            self.outs.append(area[middle:end])

    def slots(self, layout: Layout) -> Slots:
        """Where the packets of this layout lie."""
        slots = self._slots.get(layout)
        if slots is None:
            if len(self._slots) >= _LAYOUTS_MAX:
                self._slots.clear()
            slots = self._slots[layout] = Slots(layout, self._area[HEADER_BYTES:], self._stride)
        return slots


class Places:
    """Where packets of superpackets lie in the areas of a seal ring.

    Views outlive the area they were made for, which is the producer's again when they are used again.
    """

    def __init__(self, filler: Filler, area: Callable[[], int]) -> None:
        """`area` gives the number of the area being filled."""
        self._filler = filler
        self._area = area
        self._grids: dict[tuple[int, int], _Grid] = {}
        self._places = 0

    def get(self, stride: int, count: int) -> _Grid:
        """Give at least the first `count` places of the area being filled."""
        key = (self._area() % self._filler.areas, stride)
        grid = self._grids.get(key)
        missing = count if grid is None else count - len(grid.headers)
        if missing > 0:
            if self._places + missing > PLACES_MAX:
                self._grids.clear()
                self._places, missing, grid = 0, count, None
            if grid is None:
                grid = self._grids[key] = _Grid(self._filler.data, stride)
            grid.extend(count)
            self._places += missing
        assert grid is not None
        return grid


class Target(NamedTuple):
    """The tunnel a run is sealed for."""

    aead: Aead
    remote_index: int
    row: int


class PlainRun:
    """Plain packets, in the order in which they came.

    Those of equal size that follow each other, and one shorter one behind them, become one entry.
    """

    __slots__ = ("_batches", "count", "peer", "size_bytes")

    align: Final = 1

    def __init__(self, peer: PeerRef, first: memoryview) -> None:
        """`first` is borrowed until it is sealed, as are all packets."""
        self.peer: Final = peer
        self.count = 1
        self.size_bytes = len(first) + OVERHEAD_BYTES
        """Once they are sealed."""
        self._batches = [[first]]

    @property
    def entries(self) -> int:
        """How many entries they become."""
        return len(self._batches)

    def append(self, packet: memoryview) -> None:
        """Add a packet."""
        self.count += 1
        size = len(packet)
        self.size_bytes += size + OVERHEAD_BYTES
        batch = self._batches[-1]
        if len(batch[-1]) == len(batch[0]) >= size:
            batch.append(packet)
        else:
            self._batches.append([packet])

    def packets(self) -> Iterator[Buffer]:
        """Each packet by itself."""
        for batch in self._batches:
            yield from batch

    def seal(self, filler: Filler, places: Places, target: Target, first: int) -> None:
        """Seal them with the counters from `first` on, to where `filler.try_room` has made room."""
        del places  # as many as there are sizes: to find them would cost more than to make a view
        data, pack, seal_into = filler.data, _HEADER.pack, target.aead.seal_into
        _, remote_index, row = target
        counter = first
        for batch in self._batches:
            start = end = filler.at
            for packet in batch:
                header = pack(_FIRST_WORD, remote_index, counter)
                middle = end + HEADER_BYTES
                data[end:middle] = header
                end = middle + len(packet) + TAG_BYTES
                seal_into(counter, header, packet, data[middle:end])
                counter += 1
            filler.describe(end - start, len(batch[0]) + OVERHEAD_BYTES, row)


class Superpacket:
    """A superpacket as it was read, and how it is to be cut."""

    __slots__ = ("cut", "header", "packet", "stride")

    def __init__(self, header: VirtioHeader, packet: memoryview) -> None:
        """`packet` is borrowed until it is sealed."""
        self.header: Final = header
        self.packet: Final = packet
        self.cut: Final = Cut(header, packet)
        self.stride: Final = self.cut.segment_bytes + OVERHEAD_BYTES
        """From one datagram to the next."""

    def packets(self) -> list[bytes]:
        """Each of its packets by itself."""
        return segment(self.header, self.packet)


class SuperRun:
    """Packets `first` to `first + count` of a superpacket, which fit one area and become one entry."""

    __slots__ = ("_first", "_superpacket", "align", "count", "peer", "size_bytes")

    entries: Final = 1

    def __init__(self, peer: PeerRef, superpacket: Superpacket, first: int, count: int) -> None:
        self.peer: Final = peer
        self.count: Final = count
        self.align: Final = superpacket.stride
        last = superpacket.cut.segment_size(first + count - 1) + OVERHEAD_BYTES
        self.size_bytes: Final = (count - 1) * self.align + last
        self._superpacket = superpacket
        self._first = first

    @classmethod
    def divide(cls, peer: PeerRef, superpacket: Superpacket, room_bytes: int) -> "list[SuperRun]":
        """Give the runs of a superpacket of which each fits an area with room for `room_bytes`."""
        cut, stride = superpacket.cut, superpacket.stride
        most, left = min(room_bytes // stride, PACKETS_MAX), cut.count
        # The last packet may be so short that one more fits than otherwise.
        if (
            left <= PACKETS_MAX
            and (left - 1) * stride + cut.segment_size(left - 1) + OVERHEAD_BYTES <= room_bytes
        ):
            return [cls(peer, superpacket, 0, left)]
        return [cls(peer, superpacket, first, min(most, left - first)) for first in range(0, left, most)]

    def packets(self) -> list[bytes]:
        """Each packet by itself."""
        return self._superpacket.packets()[self._first : self._first + self.count]

    def seal(self, filler: Filler, places: Places, target: Target, first: int) -> None:
        """Do as `PlainRun.seal`; the room begins at a multiple of `align`."""
        count, stride, at = self.count, self.align, filler.at
        cut, packet = self._superpacket.cut, self._superpacket.packet
        begin = at // stride
        end = begin + count
        grid = places.get(stride, end)
        slots = grid.slots(cut.layout)
        cut.place(packet, slots, begin, self._first, count)
        cut.stamp(slots, begin, self._first, count)
        grid.first_halves[begin:end] = _FIRST_HALF | target.remote_index
        grid.counters[begin:end] = np.arange(first, first + count, dtype=np.uint64)
        headers, plaintexts, outs = grid.headers[begin:end], grid.plaintexts[begin:end], grid.outs[begin:end]
        if self.size_bytes < count * stride:
            middle, last_end = at + (count - 1) * stride + HEADER_BYTES, at + self.size_bytes
            plaintexts[-1] = filler.data[middle : last_end - TAG_BYTES]
            outs[-1] = filler.data[middle:last_end]
        target.aead.seal_each(first, headers, plaintexts, outs)
        filler.describe(self.size_bytes, min(stride, self.size_bytes), target.row)


Run: TypeAlias = PlainRun | SuperRun
