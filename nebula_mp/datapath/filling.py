"""The producer's side of every ring of a reader: the area being filled, upcalls, and strangers.

Data flow: datapath.python -> [Filler] -> seal ring | open ring
           datapath.python -> [Upcalls] -> upcall ring -> control
           datapath.python -> [Strangers] -> stranger ring -> the reader that owns the tunnel
Knows where in an area there is room, and how much of control's time a tunnel may take; knows nothing of keys
and of what a packet means. Never waits: without room it says so, and the packet is counted.
"""

from collections.abc import Mapping
from typing import Final

from nebula_mp.datapath.api import (
    RECORD_BYTES,
    Arrival,
    Drop,
    UpcallLimits,
    UpcallReason,
    encode_plain_record,
    encode_record,
)
from nebula_mp.newtypes import Buffer
from nebula_mp.shm_relays import RelayRow
from nebula_mp.shm_ring import Bell, Producer
from nebula_mp.shm_stats import SLOTS, StatsPage

DROP_SLOTS: Final = {reason: SLOTS[reason.value] for reason in Drop}
_UPCALLS: Final = SLOTS["mp.upcalls"]
_STRANGERS: Final = SLOTS["mp.strangers"]
_BUCKETS_MAX: Final = 4096
_NOWHERE: Final = memoryview(b"")


class Drops:
    """Counts each packet that goes no further."""

    def __init__(self, stats: StatsPage) -> None:
        self._stats = stats

    def count(self, reason: Drop, packets: int = 1) -> None:
        """Count packets under their one reason."""
        self._stats.add(DROP_SLOTS[reason], packets)


class Filler:
    """A producer that begins an area when there is something for it, and publishes it when it is full.

    `try_room`, then fill `data` from `at` on, then `describe`; `flush` at the end of a pass. `room_bytes` and
    `entries_max` are what an empty area takes.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self.areas: Final = producer.geometry.areas
        self.room_bytes: Final = producer.geometry.data_bytes
        self.entries_max: Final = producer.geometry.entries_max
        self.at = 0
        """Where the next bytes of the area belong."""
        self.data = _NOWHERE
        """The area being filled; borrowed until the next call of anything but `describe`."""
        self._entries = -1  # -1: no area is being filled

    def fits(self, size_bytes: int, entries: int = 1) -> bool:
        """Whether so much fits the area being filled, beside what is described there."""
        return (
            self._entries >= 0
            and self.at + size_bytes <= self.room_bytes
            and self._entries + entries <= self.entries_max
        )

    def try_room(self, size_bytes: int, entries: int = 1, align: int = 1) -> bool:
        """Have room for so much, if need be in the next area; False, and nothing is begun, with a full ring.

        It must fit an empty area. `at` is then a multiple of `align`. Raises RingError.
        """
        assert size_bytes <= self.room_bytes
        assert entries <= self.entries_max
        if self._entries >= 0:
            gap = -self.at % align
            if self.fits(gap + size_bytes, entries):
                self.at += gap
                return True
            self.flush()
        if self._entries < 0:
            if not self._producer.try_begin():
                return False
            self.data = self._producer.data
            self._entries = 0
            self.at = 0
        return True

    def describe(self, length: int, segment: int = 0, row: int = 0) -> None:
        """Make an entry of `length` bytes from `at` on, for which `try_room` made room."""
        appended = self._producer.try_append(self.at, length, segment, row)
        assert appended
        self._entries += 1
        self.at += length

    def flush(self) -> bool:
        """Publish the area if it has an entry; True if it had."""
        if self._entries <= 0:
            return False
        self._producer.publish()
        self.data = _NOWHERE
        self._entries = -1
        return True

    def waiting(self) -> int:
        """Areas that were published and not released. Raises RingError."""
        return self._producer.waiting()


class _Buckets:
    """Token buckets by number: `rate` a second, `burst` at once."""

    def __init__(self, limit: tuple[int, int]) -> None:
        self._rate, self._burst = limit
        self._buckets: dict[int, tuple[float, int]] = {}  # tokens, and when they were counted

    def try_take(self, number: int, now_ms: int) -> bool:
        tokens, at_ms = self._buckets.get(number, (float(self._burst), now_ms))
        tokens = min(self._burst, tokens + (now_ms - at_ms) * self._rate / 1000)
        allowed = tokens >= 1
        if len(self._buckets) >= _BUCKETS_MAX and number not in self._buckets:
            self._forget_full(now_ms)
        self._buckets[number] = (tokens - 1 if allowed else tokens, now_ms)
        return allowed

    def _forget_full(self, now_ms: int) -> None:
        """A bucket that is full again says nothing; at most 65,536 tunnels can have one that is not."""
        self._buckets = {
            number: (tokens, at_ms)
            for number, (tokens, at_ms) in self._buckets.items()
            if tokens + (now_ms - at_ms) * self._rate / 1000 < self._burst
        }


class Upcalls:
    """What goes up to control. `push` while working, `flush` at the end of a pass."""

    def __init__(
        self, producer: Producer, bell: Bell, stats: StatsPage, drops: Drops, limits: UpcallLimits
    ) -> None:
        self._filler = Filler(producer)
        self._bell = bell
        self._stats = stats
        self._drops = drops
        self._per_tunnel = _Buckets(limits.per_tunnel)
        self._moved = _Buckets(limits.moved)
        self._others = {
            UpcallReason.NEW_FLOW_OUT: _Buckets(limits.plain),
            UpcallReason.NO_TUNNEL: _Buckets(limits.plain),
            UpcallReason.DATAGRAM: _Buckets(limits.datagrams),
            UpcallReason.UNKNOWN_INDEX: _Buckets(limits.unknown),
            UpcallReason.RELAYED: _Buckets(limits.relayed),
        }
        self._put_any = False

    def plain(self, reason: UpcallReason, packet: Buffer, now_ms: int) -> None:
        """Hand over a packet of the local stack's, or count why not."""
        if not self._others[reason].try_take(0, now_ms):
            self._drops.count(Drop.UPCALL_LIMITED)
        else:
            self._push(reason, 0, encode_plain_record(now_ms), packet)

    def raw(self, reason: UpcallReason, arrival: Arrival, datagram: Buffer) -> None:
        """Hand over a datagram as it came, or count why not."""
        if not self._others[reason].try_take(0, arrival.at_ms):
            unknown = reason is UpcallReason.UNKNOWN_INDEX
            self._drops.count(Drop.UNKNOWN_INDEX if unknown else Drop.UPCALL_LIMITED)
        else:
            self._push(reason, 0, encode_record(arrival, 0), datagram)

    def relayed(self, arrival: Arrival, path: RelayRow, datagram: Buffer) -> None:
        """Hand over a datagram that came in a frame of this path, or count why not."""
        if not self._others[UpcallReason.RELAYED].try_take(path.carrier & 0xFFFF, arrival.at_ms):
            self._drops.count(Drop.UPCALL_LIMITED)
        else:
            self._push(UpcallReason.RELAYED, 0, encode_record(arrival, path.local_index), datagram)

    def opened(self, reason: UpcallReason, arrival: Arrival, local_index: int, packet: Buffer) -> None:
        """Hand over the content of an authentic message, or count why not."""
        row = local_index & 0xFFFF
        if not self._per_tunnel.try_take(row, arrival.at_ms):
            self._drops.count(Drop.UPCALL_LIMITED)
        else:
            self._push(reason, row, encode_record(arrival, local_index), packet)

    def moved(self, arrival: Arrival, local_index: int) -> None:
        """Say that a packet came from elsewhere; only a notice, which may get lost and is not counted."""
        row = local_index & 0xFFFF
        if self._moved.try_take(row, arrival.at_ms) and self._filler.try_room(RECORD_BYTES):
            self._put(UpcallReason.MOVED, row, encode_record(arrival, local_index), b"")

    def flush(self) -> None:
        """Publish, and wake control if anything was."""
        if self._put_any:
            self._put_any = False
            self._filler.flush()
            self._bell.ring()

    def _push(self, reason: UpcallReason, row: int, record: bytes, packet: Buffer) -> None:
        size_bytes = RECORD_BYTES + len(packet)
        if size_bytes > self._filler.room_bytes:
            self._drops.count(Drop.OVERSIZE)
        elif not self._filler.try_room(size_bytes):
            self._drops.count(Drop.UPCALL_RING_FULL)
        else:
            self._put(reason, row, record, packet)
            self._stats.add(_UPCALLS)

    def _put(self, reason: UpcallReason, row: int, record: bytes, packet: Buffer) -> None:
        _put(self._filler, record, packet, reason, row)
        # Should `try_room` publish this area in the middle of a pass, control is still woken at its end.
        self._put_any = True


class Strangers:
    """Datagrams that another reader has to judge, since it owns their tunnel's window."""

    def __init__(
        self, rings: Mapping[int, Producer], bells: Mapping[int, Bell], stats: StatsPage, drops: Drops
    ) -> None:
        assert rings.keys() == bells.keys()
        self._fillers = {owner: Filler(producer) for owner, producer in rings.items()}
        self._bells = bells
        self._touched: set[int] = set()
        self._stats = stats
        self._drops = drops

    def push(self, owner: int, arrival: Arrival, datagram: Buffer, path: int = 0) -> None:
        """Hand a datagram, perhaps out of a frame of `path`, to its tunnel's reader, or count why not."""
        filler = self._fillers.get(owner)
        size_bytes = RECORD_BYTES + len(datagram)
        if filler is None or not filler.try_room(size_bytes):
            self._drops.count(Drop.STRANGER_RING_FULL)
            return
        _put(filler, encode_record(arrival, path), datagram, 0, 0)
        self._stats.add(_STRANGERS)
        self._touched.add(owner)

    def flush(self) -> None:
        """Publish, and wake the owners."""
        if self._touched:
            for owner in self._touched:
                self._fillers[owner].flush()
                self._bells[owner].ring()
            self._touched.clear()


def _put(filler: Filler, record: bytes, packet: Buffer, segment: int, row: int) -> None:
    data, at = filler.data, filler.at
    middle = at + len(record)
    end = middle + len(packet)
    data[at:middle] = record
    data[middle:end] = packet
    filler.describe(end - at, segment, row)
