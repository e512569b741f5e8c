"""What one call gives of the UDP socket: a datagram, or several of one sender's that the kernel has joined.

Data flow: UDP socket -> [Batch] -> datapath.opening
Knows where in the batch a datagram lies and which of them could be opened together; knows nothing of tunnels
and keys, and judges nothing.
Source: udp(7); Linux include/uapi/linux/udp.h and net/ipv4/udp_offload.c (UDP_GRO).

All datagrams of a batch have the same size, only the last one may be shorter. Views of them are made once for
each size and used again, since a slice of a memoryview costs as much as a tenth of opening it.
"""

import socket
from itertools import pairwise
from typing import Final

import numpy as np

from nebula_mp.datapath.sockaddr import SockAddr
from nebula_mp.wire.header import HEADER_BYTES

BATCH_BYTES_MAX: Final = 65_536
UDP_GRO: Final = 104
"""Socket option and control message of level IPPROTO_UDP; the message is an int, the size of a datagram."""

_SPACE: Final = socket.CMSG_SPACE(4)
_SIZES_MAX: Final = 32


class Views:
    """Headers and sealed rests of the first datagrams of a batch with datagrams of one size."""

    __slots__ = ("_memory", "_stride", "headers", "sealed")

    def __init__(self, memory: memoryview, stride: int) -> None:
        self._memory = memory
        self._stride = stride
        self.headers: list[memoryview] = []
        self.sealed: list[memoryview] = []

    def extend(self, count: int) -> None:
        """Have views of so many datagrams."""
        memory, stride = self._memory, self._stride
        for at in range(len(self.headers) * stride, count * stride, stride):
            self.headers.append(memory[at : at + HEADER_BYTES])
            self.sealed.append(memory[at + HEADER_BYTES : at + stride])


class Batch:
    """The last datagrams received: `count` of `stride` bytes each, back to back, the last of `last_bytes`.

    `receive` fills it again; every view of it is borrowed until then.
    """

    def __init__(self, *, joined: bool, room_bytes: int) -> None:
        """`joined`: the socket has UDP_GRO. Otherwise a datagram of `room_bytes` or more is cut there."""
        self._joined = joined
        self._memory = memoryview(bytearray(BATCH_BYTES_MAX if joined else room_bytes))
        self._views: dict[int, Views] = {}
        self._ramp = np.zeros((0, 2), np.uint64)
        self.size_bytes = self.stride = self.count = self.last_bytes = 0
        self.is_cut = False
        """Whether there was more than fits."""

    def receive(self, source: socket.socket) -> SockAddr:
        """Take what comes next; gives where it came from. Raises OSError, BlockingIOError."""
        if not self._joined:
            size, address = source.recvfrom_into(self._memory, 0, socket.MSG_DONTWAIT)
            self._describe(size, size, cut=size == len(self._memory))
            return address  # type: ignore[no-any-return]  # typeshed: any kind of socket
        size, control, flags, address = source.recvmsg_into([self._memory], _SPACE, socket.MSG_DONTWAIT)
        stride = size
        for level, kind, data in control:
            if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                stride = int.from_bytes(data[:4], "little")
        self._describe(size, stride, cut=bool(flags & socket.MSG_TRUNC))
        return address  # type: ignore[no-any-return]  # as above

    def _describe(self, size: int, stride: int, *, cut: bool) -> None:
        self.size_bytes, self.is_cut = size, cut
        if not 0 < stride < size:
            self.stride = self.last_bytes = size
            self.count = 1
        else:
            self.stride = stride
            self.count = -(-size // stride)
            self.last_bytes = size - (self.count - 1) * stride

    def datagram(self, number: int) -> memoryview:
        """One of them, whole."""
        at = number * self.stride
        return self._memory[at : min(at + self.stride, self.size_bytes)]

    def bytes_of(self, number: int) -> int:
        """Size of one of them."""
        return self.last_bytes if number == self.count - 1 else self.stride

    def views(self, count: int) -> Views:
        """At least `count` datagrams, as if all had `stride` bytes."""
        views = self._views.get(self.stride)
        if views is None:
            if len(self._views) >= _SIZES_MAX:
                self._views.clear()
            views = self._views[self.stride] = Views(self._memory, self.stride)
        if len(views.headers) < count:
            views.extend(count)
        return views

    def runs(self) -> list[tuple[int, int]]:
        """Which datagrams, from one to before another, follow each other with the same first 8 bytes.

        Those too short to have a header are left out at the end. 3 us when there is one run.
        """
        count = self.count if self.last_bytes >= HEADER_BYTES else self.count - 1
        if self.stride < HEADER_BYTES or count < 1:
            return []
        if len(self._ramp) < count:
            self._ramp = np.zeros((count, 2), np.uint64)
            self._ramp[:, 1] = np.arange(count)
        headers = np.ndarray((count, 2), ">u8", self._memory, 0, (self.stride, 8))
        # Without its number in the batch, the counter of all datagrams of a run is the same.
        common = headers - self._ramp[:count]
        whole = common.tobytes()
        if whole == whole[:HEADER_BYTES] * count:
            return [(0, count)]
        changes = (common[1:] != common[:-1]).any(axis=1).nonzero()[0] + 1
        return list(pairwise([0, *changes.tolist(), count]))
