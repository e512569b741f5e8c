"""The consumer's side: what waits in a ring is sent or written, as much as one system call takes at a time.

Data flow: seal ring -> [UdpDrain] -> UDP socket;  open ring -> [TunDrain] -> TUN queue
Knows which fault of a call leads to what; knows no keys, and looks inside a packet only to cut it.
Source: udp(7), ip(7), Linux net/ipv4/udp.c (`udp_send_skb`), Documentation/networking/tuntap.rst;
docs/architecture.md, "Who drains".

What is sent or written lies in the ring area until the call on it has returned: no call keeps a reference to
the bytes it was given. The area is released after the last of its calls.

A train is several datagrams of one length, the last may be shorter, that one call sends (UDP_SEGMENT). It
goes as a whole or not at all. A train that the kernel refuses as a train goes datagram by datagram:

| refusal          | meaning                                                | from then on                   |
|------------------|--------------------------------------------------------|--------------------------------|
| EMSGSIZE, EINVAL | a datagram is larger than the path's MTU; alone, it is | such trains to this target go  |
|                  | sent in fragments. EINVAL before Linux 6.14            | singly for a while             |
| EINVAL           | more datagrams than this kernel cuts: 64 before Linux  | shorter trains                 |
|                  | 6.9, and one less where it counts the header in        |                                |
| EIO, EOPNOTSUPP  | the device calculates no checksums (before Linux 6.11),| no trains (`mp.udp.gso_off`)   |
|                  | or IPsec is on the path                                |                                |

Unless each datagram is refused alone as well: then the fault was not the train's, and nothing is learned.

A superpacket that the TUN device refuses is cut, and its packets are written one by one. After three in a
row whose packets were taken, none is tried as a whole any more. No kernel that was tried refuses one for what
it is; a device that is down refuses the packets as well, and then nothing is learned.
"""

import errno
import os
import select
import socket
import struct
import weakref
from typing import Final

from nebula_mp.config.model import Offloads
from nebula_mp.datapath.api import Drop
from nebula_mp.datapath.filling import Drops
from nebula_mp.datapath.segment import segment
from nebula_mp.datapath.sockaddr import SockAddr, Targets
from nebula_mp.datapath.virtio import (
    HEADER_BYTES,
    PLAIN,
    OffloadError,
    VirtioHeader,
    encoded_header_bytes,
)
from nebula_mp.newtypes import Buffer, UdpAddr
from nebula_mp.shm_ring import Consumer
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_tunnels import UnderlayView

REFUSALS_MAX: Final = 3
"""So many superpackets in a row that were refused, and their packets not, end the trying."""

_PLAIN: Final = PLAIN.encode()

UDP_WAIT_MS: Final = 1
TUN_WAIT_MS: Final = 10

LOST: Final = frozenset({errno.EBADF, errno.ENOTSOCK, errno.EFAULT, errno.EBADFD})
"""Faults that no network and no packet can cause: the descriptor, or the device behind it, is gone."""

ICMP: Final = frozenset({errno.ECONNREFUSED, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET})
"""Answers to an earlier datagram that the kernel reports at a later call."""

TRAIN_BYTES_IPV4: Final = 65_507
"""The most that a train may have: a UDP datagram of IPv4. 4-in-6 is IPv4: one byte more is EMSGSIZE."""

TRAIN_BYTES_IPV6: Final = 65_487
"""20 bytes less, so that the whole is below 64 KiB with the larger header too, which is what devices take."""

TRAIN_LENGTHS: Final = (128, 127, 64, 63)
"""Datagrams of a train that a kernel may have as its limit; any takes the last."""

SINGLE_ENTRIES: Final = 256
"""Entries that go singly before a train is tried again where one was too large for the path.

Counted, not timed, as the drain knows no clock: so the vain tries cost a fixed share of the work, however
much or little is sent, and a path that became wider is noticed after 256 entries. It has to be forgotten some
time: paths and the addresses of peers change, and nothing tells us.
"""

_NARROW_MAX: Final = 4096
_UDP_SEGMENT: Final = 103
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_U16: Final = struct.Struct("=H")

_TOO_LARGE: Final = frozenset({errno.EMSGSIZE, errno.EINVAL})
_UNABLE: Final = frozenset({errno.EIO, errno.EOPNOTSUPP})

_UDP_FAULTS: Final = {
    errno.EAGAIN: Drop.UDP_FULL,
    errno.ENOBUFS: Drop.UDP_FULL,
    errno.ENOMEM: Drop.UDP_FULL,
    errno.ENETUNREACH: Drop.UDP_UNREACHABLE,
    errno.EHOSTUNREACH: Drop.UDP_UNREACHABLE,
    errno.ENETDOWN: Drop.UDP_UNREACHABLE,
    errno.EADDRNOTAVAIL: Drop.UDP_UNREACHABLE,
    errno.EAFNOSUPPORT: Drop.UDP_UNREACHABLE,
    errno.EMSGSIZE: Drop.UDP_TOO_BIG,
    errno.EPERM: Drop.UDP_REFUSED_LOCALLY,
}
_NO_MEMORY: Final = frozenset({errno.ENOBUFS, errno.ENOMEM})

_TUN_PACKETS: Final = SLOTS["mp.tun.tx.packets"]
_TUN_AGAIN: Final = SLOTS["mp.tun.again"]
_TUN_SPLIT: Final = SLOTS["mp.tun.split"]
_UDP_PACKETS: Final = SLOTS["mp.udp.tx.packets"]
_UDP_TRAINS_OFF: Final = SLOTS["mp.udp.gso_off"]
_ICMP_SEEN: Final = SLOTS["mp.rx.icmp"]
_RESUMED: Final = SLOTS["mp.ring.resumed"]


def borrow_socket(owner: object, descriptor: int) -> socket.socket:
    """Use a descriptor as a socket for as long as `owner` lives, and leave it open afterwards."""
    borrowed = socket.socket(fileno=descriptor)
    weakref.finalize(owner, borrowed.detach)
    return borrowed


class _Room:
    """Waits until a descriptor takes more; after one wait in vain no more until `patient` is set again."""

    def __init__(self, descriptor: int, limit_ms: int) -> None:
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._limit_ms = limit_ms
        self.patient = True

    def wait(self) -> bool:
        if self.patient:
            self.patient = bool(self._poll.poll(self._limit_ms))
        return self.patient


class Trains:
    """How much of an entry one call may carry; learns it from what the kernel refuses."""

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._datagrams_max = TRAIN_LENGTHS[0]
        # Targets with a narrow path: the shortest datagram that was too long, and entries left to go singly.
        self._narrow: dict[SockAddr, tuple[int, int]] = {}
        self._step = 0
        self._control: list[tuple[int, int, bytes]] = []

    def room(self, step: int, target: SockAddr, limit: int) -> int:
        """Bytes that a call may carry of an entry of datagrams of `step` bytes; `step`: each has its own.

        `limit` is one of `TRAIN_BYTES_*`. Ask once for each entry.
        """
        if not self._on:
            return step
        narrow = self._narrow.get(target) if self._narrow else None
        if narrow is not None and step >= narrow[0]:
            if narrow[1] > 0:
                self._narrow[target] = (narrow[0], narrow[1] - 1)
                return step
            del self._narrow[target]
        return max(step, min(limit, self._datagrams_max * step))

    def control(self, step: int) -> list[tuple[int, int, bytes]]:
        """The control message that has the kernel cut at every `step` bytes; made anew when that changes."""
        if step != self._step:
            self._step = step
            self._control = [(socket.SOL_UDP, _UDP_SEGMENT, _U16.pack(step))]
        return self._control

    def learn(self, number: int, step: int, datagrams: int, target: SockAddr) -> bool:
        """A train was refused with error `number` and its datagrams were not; True if it was the last one."""
        if number in _UNABLE:
            self._on = False
        elif number == errno.EINVAL and datagrams > TRAIN_LENGTHS[-1]:
            self._datagrams_max = max(each for each in TRAIN_LENGTHS if each < datagrams)
        else:
            if len(self._narrow) >= _NARROW_MAX:
                self._narrow.clear()
            self._narrow[target] = (step, SINGLE_ENTRIES)
        return not self._on


# The address of a tunnel as it was last seen, how the kernel spells it, and TRAIN_BYTES_*.
_Way = tuple[UdpAddr | None, SockAddr | None, int]


class _Leased:
    """What the two drains have in common: the ring, whose lease they may have."""

    def __init__(self, ring: Consumer) -> None:
        self.given_up: str | None = None
        self._ring = ring
        # As they are: a call more for each of them would be one for each pass.
        self.try_take = ring.try_take
        self.pending = ring.pending
        self.drop = ring.drop

    @property
    def areas(self) -> int:
        """As `Drain.areas`."""
        return self._ring.geometry.areas


class UdpDrain(_Leased):
    """A `datapath.api.Drain` of a seal ring."""

    def __init__(
        self, ring: Consumer, udp_fd: int, underlay: UnderlayView, stats: StatsPage, offloads: Offloads
    ) -> None:
        super().__init__(ring)
        self._socket = borrow_socket(self, udp_fd)
        self._targets = Targets(dual=self._socket.family == socket.AF_INET6)
        self._room = _Room(udp_fd, UDP_WAIT_MS)
        self._ways: dict[int, _Way] = {}
        self._trains = Trains(on=offloads.udp_segment)
        self._underlay = underlay
        self._stats = stats
        self._drops = Drops(stats)

    def drain(self, budget: int) -> int:
        """As `Drain.drain`."""
        ring = self._ring
        self._room.patient = True
        areas = 0
        while areas < budget and ring.pending():
            for (_, length, segment_bytes, row), data in ring.entries():
                # Asked when it is sent, so that a peer that moved meanwhile gets it at its new address.
                address = self._underlay.get(row)
                # The view gives the same object until the address changes: to compare is to hash in Python.
                known = self._ways.get(row)
                if known is None or known[0] is not address:
                    known = self._find_way(row, address)
                _, target, limit = known
                step = segment_bytes or length
                if target is None:
                    self._drops.count(Drop.UDP_UNREACHABLE, -(-length // step))
                elif step == length:
                    self._send(data, target)
                else:
                    self._send_many(data, step, target, limit)
            ring.release()
            areas += 1
        return areas

    def _find_way(self, row: int, address: UdpAddr | None) -> _Way:
        """Where and in what trains the datagrams of a tunnel go; a ring names as many rows as there are."""
        target = None if address is None else self._targets.get(address)
        is_ipv4 = address is not None and address.ip.version == 4
        found = self._ways[row] = address, target, TRAIN_BYTES_IPV4 if is_ipv4 else TRAIN_BYTES_IPV6
        return found

    def _send_many(self, data: memoryview, step: int, target: SockAddr, limit: int) -> None:
        room = self._trains.room(step, target, limit)
        at, end = 0, len(data)
        while at < end:
            left = end - at
            size = left if left <= room else room - room % step
            part = data[at : at + size]
            at += size
            if size <= step:
                self._send(part, target)
            elif not self._try_train(part, step, target):
                room = self._trains.room(step, target, limit)

    def _try_train(self, train: memoryview, step: int, target: SockAddr) -> bool:
        """Send it; False: datagram by datagram, since the kernel refused it as a train."""
        number = self._call(train, target, self._trains.control(step))
        datagrams = -(-len(train) // step)
        if number not in _TOO_LARGE and number not in _UNABLE:
            self._count(number, len(train), datagrams)
            return True
        sent = [self._send(train[at : at + step], target) for at in range(0, len(train), step)]
        if any(sent) and self._trains.learn(number, step, datagrams, target):
            self._stats.add(_UDP_TRAINS_OFF)
            self.given_up = "udp_segment"
        return False

    def _send(self, datagram: memoryview, target: SockAddr) -> bool:
        number = self._call(datagram, target, None)
        if number == 0:
            self._stats.add_traffic(_UDP_PACKETS, 1, len(datagram))
            return True
        self._count(number, len(datagram), 1)
        return False

    def _count(self, number: int, size_bytes: int, datagrams: int) -> None:
        if number == 0:
            self._stats.add_traffic(_UDP_PACKETS, datagrams, size_bytes)
        else:
            self._drops.count(_UDP_FAULTS.get(number, Drop.UDP_OTHER), datagrams)

    def _call(self, data: memoryview, target: SockAddr, control: list[tuple[int, int, bytes]] | None) -> int:
        """The error number of why it was not sent, or 0. Raises OSError when the socket is lost."""
        for last in (False, True):
            try:
                if control is None:
                    self._socket.sendto(data, _DONTWAIT, target)
                else:
                    self._socket.sendmsg((data,), control, _DONTWAIT, target)
            except BlockingIOError:
                if last or not self._room.wait():
                    break
            except OSError as error:
                if error.errno in LOST:
                    raise
                if error.errno not in ICMP or last:
                    return error.errno or errno.EPROTO
                self._stats.add(_ICMP_SEEN)
            else:
                return 0
        return errno.EAGAIN


class TunDrain(_Leased):
    """A `datapath.api.Drain` of an open ring, whose consumer goes on behind the entry in progress."""

    def __init__(self, ring: Consumer, tun_fd: int, stats: StatsPage, offloads: Offloads) -> None:
        super().__init__(ring)
        self._descriptor = tun_fd
        self._room = _Room(tun_fd, TUN_WAIT_MS)
        self._header_bytes = HEADER_BYTES if offloads.tun_header else 0
        self._resumed = 0
        self._refused = 0  # superpackets, one after the other, whose parts were taken
        self._stats = stats
        self._drops = Drops(stats)

    def drain(self, budget: int) -> int:
        """As `Drain.drain`."""
        ring = self._ring
        self._room.patient = True
        areas = 0
        while areas < budget and ring.pending():
            # Each entry is noted as begun before its turn comes, and so is never written twice.
            for (_, _, packets, _), data in ring.entries():
                self._write(data, packets)
            if ring.resumed != self._resumed:
                self._count_resumed(ring.resumed)
            ring.release()
            areas += 1
        return areas

    def _write(self, data: memoryview, packets: int) -> None:
        cut = packets > 1 and self._refused >= REFUSALS_MAX
        fault = Drop.TUN_REFUSED if cut else self._try_write(data)
        if fault is None:
            if packets == 1:
                self._stats.add_traffic(_TUN_PACKETS, 1, len(data) - self._header_bytes)
            else:
                self._count(data, packets)
                self._refused = 0
        elif fault is Drop.TUN_REFUSED and packets > 1:
            self._write_parts(data, packets)
        else:
            self._drops.count(fault, packets)

    def _write_parts(self, data: memoryview, packets: int) -> None:
        """Write the packets of a superpacket that the device does not take, one by one."""
        packet = data[self._header_bytes :]
        try:
            parts = segment(VirtioHeader.parse(data[: self._header_bytes], packet), packet)
        except OffloadError:
            parts = []
        if len(parts) != packets:  # no producer of ours made it
            self._drops.count(Drop.TUN_REFUSED, packets)
            return
        taken = False
        for part in parts:
            single = memoryview(_PLAIN + part)
            fault = self._try_write(single)
            if fault is None:
                self._count(single, 1)
                taken = True
            else:
                self._drops.count(fault)
        # Where the parts are refused as well, as by a device that is down, it was not for their being joined.
        if taken:
            self._stats.add(_TUN_SPLIT)
            self._refused += self._refused < REFUSALS_MAX
            if self._refused == REFUSALS_MAX:
                self.given_up = "tso and uso towards the local stack"

    def _count(self, data: memoryview, packets: int) -> None:
        """Count what was written, as if each of its packets had gone alone, with headers of its own."""
        size_bytes = len(data) - self._header_bytes
        if packets > 1 and self._header_bytes:
            size_bytes += (packets - 1) * encoded_header_bytes(data)
        self._stats.add_traffic(_TUN_PACKETS, packets, size_bytes)

    def _count_resumed(self, resumed: int) -> None:
        """Count the packets that a predecessor had begun: whether they were written nobody knows."""
        self._stats.add(_RESUMED, resumed - self._resumed)
        self._resumed = resumed

    def _try_write(self, packet: Buffer) -> Drop | None:
        """Why it was not written. Raises OSError when the device is lost."""
        for last in (False, True):
            try:
                written = os.write(self._descriptor, packet)
            except BlockingIOError:
                self._stats.add(_TUN_AGAIN)
                if last or not self._room.wait():
                    return Drop.TUN_FULL
            except OSError as error:
                if error.errno in LOST:
                    raise
                return Drop.TUN_NO_MEMORY if error.errno in _NO_MEMORY else Drop.TUN_REFUSED
            else:
                # The device takes a packet whole or not at all.
                return None if written == len(packet) else Drop.TUN_REFUSED
        return Drop.TUN_FULL
