"""The consumer's side: what waits in a ring is sent or written, one system call for each packet.

Data flow: seal ring -> [UdpDrain] -> UDP socket;  open ring -> [TunDrain] -> TUN queue
Knows which fault of a call leads to what; knows no keys and never looks inside a packet.
Source: udp(7), ip(7), Linux Documentation/networking/tuntap.rst; docs/architecture.md, "The ring".

A packet lies in the ring area until the call on it has returned: neither call keeps a reference to the bytes
it was given. The area is released after the last of its calls.
"""

import errno
import os
import select
import socket
import weakref
from typing import Final

from nebula_mp.datapath.api import Drop
from nebula_mp.datapath.filling import Drops
from nebula_mp.datapath.sockaddr import SockAddr, Targets
from nebula_mp.newtypes import Buffer
from nebula_mp.shm_ring import Consumer
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_tunnels import UnderlayView

UDP_WAIT_MS: Final = 1
TUN_WAIT_MS: Final = 10

LOST: Final = frozenset({errno.EBADF, errno.ENOTSOCK, errno.EFAULT, errno.EBADFD})
"""Faults that no network and no packet can cause: the descriptor, or the device behind it, is gone."""

ICMP: Final = frozenset({errno.ECONNREFUSED, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET})
"""Answers to an earlier datagram that the kernel reports at a later call."""

_UDP_FAULTS: Final = {
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
_TUN_BYTES: Final = SLOTS["mp.tun.tx.bytes"]
_TUN_AGAIN: Final = SLOTS["mp.tun.again"]
_UDP_PACKETS: Final = SLOTS["mp.udp.tx.packets"]
_UDP_BYTES: Final = SLOTS["mp.udp.tx.bytes"]
_ICMP_SEEN: Final = SLOTS["mp.rx.icmp"]
_RESUMED: Final = SLOTS["mp.ring.resumed"]


def borrow_socket(owner: object, descriptor: int) -> socket.socket:
    """Use a descriptor as a socket for as long as `owner` lives, and leave it open afterwards."""
    borrowed = socket.socket(fileno=descriptor)
    weakref.finalize(owner, borrowed.detach)
    return borrowed


class _Room:
    """Waits until a descriptor takes more; after one wait in vain no more until `renew`."""

    def __init__(self, descriptor: int, limit_ms: int) -> None:
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._limit_ms = limit_ms
        self._patient = True

    def renew(self) -> None:
        self._patient = True

    def wait(self) -> bool:
        if self._patient:
            self._patient = bool(self._poll.poll(self._limit_ms))
        return self._patient


class UdpDrain:
    """A `datapath.api.Drain` of a seal ring."""

    def __init__(self, ring: Consumer, udp_fd: int, underlay: UnderlayView, stats: StatsPage) -> None:
        self.ring = ring
        self._socket = borrow_socket(self, udp_fd)
        self._targets = Targets(dual=self._socket.family == socket.AF_INET6)
        self._room = _Room(udp_fd, UDP_WAIT_MS)
        self._underlay = underlay
        self._stats = stats
        self._drops = Drops(stats)

    def drain(self, budget: int) -> int:
        """As `Drain.drain`."""
        self._room.renew()
        areas = 0
        while areas < budget and self.ring.pending():
            for entry, data in self.ring.entries():
                # Asked when it is sent, so that a peer that moved meanwhile gets it at its new address.
                address = self._underlay.get(entry.row)
                target = None if address is None else self._targets.get(address)
                step = entry.segment or entry.length
                for at in range(0, entry.length, step):
                    self._send(data[at : at + step], target)
            self.ring.release()
            areas += 1
        return areas

    def _send(self, datagram: Buffer, target: SockAddr | None) -> None:
        fault = Drop.UDP_UNREACHABLE if target is None else self._try_send(datagram, target)
        if fault is None:
            self._stats.add(_UDP_PACKETS)
            self._stats.add(_UDP_BYTES, len(datagram))
        else:
            self._drops.count(fault)

    def _try_send(self, datagram: Buffer, target: SockAddr) -> Drop | None:
        """Why it was not sent. Raises OSError when the socket is lost."""
        for last in (False, True):
            try:
                self._socket.sendto(datagram, socket.MSG_DONTWAIT, target)
            except BlockingIOError:
                if last or not self._room.wait():
                    return Drop.UDP_FULL
            except OSError as error:
                if error.errno in LOST:
                    raise
                if error.errno not in ICMP or last:
                    return _UDP_FAULTS.get(error.errno or 0, Drop.UDP_OTHER)
                self._stats.add(_ICMP_SEEN)
            else:
                return None
        return Drop.UDP_FULL


class TunDrain:
    """A `datapath.api.Drain` of an open ring, whose consumer goes on behind the entry in progress."""

    def __init__(self, ring: Consumer, tun_fd: int, stats: StatsPage) -> None:
        self.ring = ring
        self._descriptor = tun_fd
        self._room = _Room(tun_fd, TUN_WAIT_MS)
        self._resumed = 0
        self._stats = stats
        self._drops = Drops(stats)

    def drain(self, budget: int) -> int:
        """As `Drain.drain`."""
        self._room.renew()
        areas = 0
        while areas < budget and self.ring.pending():
            # Each entry is noted as begun before its turn comes, and so is never written twice.
            for _, data in self.ring.entries():
                fault = self._try_write(data)
                if fault is None:
                    self._stats.add(_TUN_PACKETS)
                    self._stats.add(_TUN_BYTES, len(data))
                else:
                    self._drops.count(fault)
            self._count_resumed()
            self.ring.release()
            areas += 1
        return areas

    def _count_resumed(self) -> None:
        """Count the entries that a predecessor had begun: whether they were written nobody knows."""
        if self.ring.resumed != self._resumed:
            self._stats.add(_RESUMED, self.ring.resumed - self._resumed)
            self._resumed = self.ring.resumed

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
