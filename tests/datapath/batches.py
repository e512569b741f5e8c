"""Batches as Linux joins them, put before an opener, and what it published, cut again.

Data flow: tests -> [batches] -> datapath.opening -> open ring -> [batches] -> tests
"""

import errno
import os
import select
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import pytest

from nebula_mp.config.model import Offloads
from nebula_mp.datapath.api import DATAGRAM_BYTES_MAX, Reader
from nebula_mp.datapath.python import PythonReader
from nebula_mp.datapath.segment import segment
from nebula_mp.datapath.virtio import HEADER_BYTES, VirtioHeader
from nebula_mp.newtypes import TunnelIndex
from tests.datapath.sites import INDEX_NEAR, Site, connect, message
from tests.datapath.superpackets import A4, A6, Plan
from tests.support import native_calls

ALL = Offloads()
SOURCE = ("10.77.0.9", 4242)
SOL_UDP, GRO = 17, 104


class Batch(NamedTuple):
    """Datagrams of one size, the last perhaps shorter, from one sender."""

    datagrams: list[bytes]
    source: tuple[str, int] = SOURCE
    cut: bool = False  # MSG_TRUNC


class Inlet:
    """In place of a socket: gives whole batches with UDP_GRO, else one datagram after the other."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = list(batches)

    def recvmsg_into(self, buffers: list[memoryview], space: int, _: int) -> tuple[int, Any, int, Any]:
        assert space >= socket.CMSG_SPACE(4)
        batch = self._next()
        (into,) = buffers
        whole = b"".join(batch.datagrams)
        into[: len(whole)] = whole
        size = len(batch.datagrams[0])
        assert all(len(each) == size for each in batch.datagrams[:-1])
        assert len(batch.datagrams[-1]) <= size
        control = [(SOL_UDP, GRO, size.to_bytes(4, "little"))] if len(batch.datagrams) > 1 else []
        return len(whole), control, socket.MSG_TRUNC if batch.cut else 0, batch.source

    def recvfrom_into(self, into: memoryview, _: int, __: int) -> tuple[int, Any]:
        batch = self._next()
        if len(batch.datagrams) > 1:
            self.batches.insert(0, batch._replace(datagrams=batch.datagrams[1:]))
        size = min(len(batch.datagrams[0]), len(into))
        into[:size] = batch.datagrams[0][:size]
        return size, batch.source

    def receive(self, _: int, message: native_calls.Message) -> int:
        """As either of the two above, for the native kernel: it has room for no more without UDP_GRO."""
        batch = self._next()
        datagrams = batch.datagrams
        joined = message.room_bytes > DATAGRAM_BYTES_MAX + 1
        if not joined and len(datagrams) > 1:
            self.batches.insert(0, batch._replace(datagrams=datagrams[1:]))
            datagrams = datagrams[:1]
        step = len(datagrams[0]) if len(datagrams) > 1 else None
        return message.fill(b"".join(datagrams), batch.source, step=step, is_cut=batch.cut and joined)

    def poll(self, limit_ms: int) -> list[tuple[int, int]]:
        assert limit_ms == 0
        return [(0, select.POLLIN)] if self.batches else []

    def poll_native(self, _descriptor: int, _events: int, limit_ms: int) -> int:
        return len(self.poll(limit_ms))

    def _next(self) -> Batch:
        if not self.batches:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return self.batches.pop(0)


def feed(reader: Reader, *batches: Batch, budget: int = 100_000) -> int:
    """Let a reader poll until all was taken; gives how many datagrams."""
    inlet = Inlet(batches)
    if not isinstance(reader, PythonReader):
        with pytest.MonkeyPatch.context() as feeding:
            native_calls.hook(feeding, recvmsg=inlet.receive, poll=inlet.poll_native)
            return reader.opener.poll(budget)
    reader.opener._socket = cast("socket.socket", inlet)
    reader.opener._queue = cast("select.poll", inlet)
    return reader.opener.poll(budget)


class Written(NamedTuple):
    """An entry of the open ring, and the packets it means."""

    packets: list[bytes]
    row: int


def take(site: Site, offloads: Offloads, worker: int = 0) -> list[Written]:
    """Empty an open ring."""
    ring = site.open_ring(worker)
    found = []
    while ring.pending():
        for entry, data in ring.entries():
            if offloads.tun_header:
                packet = bytes(data[HEADER_BYTES:])
                header = VirtioHeader.parse(bytes(data[:HEADER_BYTES]), packet)
                packets = segment(header, packet)
            else:
                packets = [bytes(data)]
            assert entry.segment == len(packets)
            found.append(Written(packets, entry.row))
        ring.release()
    return found


def packets_of(written: list[Written]) -> list[bytes]:
    """Everything, one after the other."""
    return [packet for each in written for packet in each.packets]


def sealed(
    packets: Iterable[bytes], counter: int = 3, index: TunnelIndex = INDEX_NEAR, **how: Any
) -> list[bytes]:
    """Seal packets with consecutive counters."""
    return [message(number, packet, index=index, **how) for number, packet in enumerate(packets, counter)]


def site_of(offloads: Offloads = ALL, *allowed: Plan, workers: int = 1, **how: Any) -> Site:
    """Make a site whose peer may send from A4 and A6, with the flows of these plans admitted."""
    site = Site(workers=workers, offloads=offloads, **how)
    connect(site)
    site.update(sources=frozenset({A4.packed, A6.packed}))
    for plan in allowed:
        site.allow(plan.one(0), inbound=True)
    return site
