"""Ring of packet areas in shared memory: one process fills and publishes, one drains and releases.

Data flow: reader: Producer -> [shm_ring] -> Consumer: writer, or the reader itself while it has the lease
           reader: Producer -> [shm_ring] -> Consumer: control (upcalls), another reader (strangers)
Knows areas, entries and who may touch them; knows nothing of what the bytes mean or where they go.
Source: docs/architecture.md, "Who drains"; eventfd(2); the rules in shm.py.

Layout. A ring is two regions, so that each side can map the other's words read-only. One writer each:

    region `ring data`: the producer maps it writable, everybody else read-only
    +0     header        supervisor   parameters: areas, bytes of an area, most entries of an area
    +64    u64 head      producer     areas published since the ring was emptied; only grows
    +4096  area[areas]   producer     while FREE or FILLING; area number n is at n % areas

    area   +0    u64 count            entries
           +8    u64 number           the area's own number, n
           +64   entry[entries_max]   { u32 offset, u32 length, u32 segment, u32 row }
           +..   data                 to the end: 71,616 bytes in 72 KiB with 128 entries

    region `ring state`, one page: whoever may drain maps it writable
    +0     header        supervisor
    +64    u64 tail      consumer     areas released; only grows
    +128   u64 lease     below        who drains, process id | generation << 32; 0 is nobody
    +192   u64 progress  consumer     open ring only: area number << 12 | entries begun

An entry is `length` bytes at `offset` of the area's data. In the seal ring these are datagrams of `segment`
bytes back to back, the last may be shorter, for the tunnel in `row`; `segment` 0 is one datagram. In the open
ring they are what one write to the TUN device takes: a packet or a superpacket, with its virtio header if the
device has one, and `segment` is the number of packets in it, 1 and up. In upcall rings `segment` is the
reason. Whatever is read is copied once, then checked, then used.

The state of an area follows from head and tail, so a death leaves nothing to repair. READY: tail <= n < head.
DRAINING: n == tail, and its consumer is inside a system call. FILLING: n == head, if the producer is at it.
FREE: all others.

    who              from      to        how, and why so
    producer         FREE      FILLING   stores nothing; it saw head - tail < areas
    producer         FILLING   READY     count, number, then one store of head: who sees head sees the rest
    its successor    FILLING   FILLING   starts the area again; what was in it is lost
    consumer         READY     DRAINING  stores nothing; it copies and checks the entries
    consumer         DRAINING  FREE      one store of tail, after the last system call on it returned
    successor, seal  DRAINING  DRAINING  sends all of it again: the peer's replay window drops the copies
    successor, open  DRAINING  DRAINING  goes on behind `progress`: at most one entry lost, none twice
    supervisor       any       FREE      `RingMemory.reset`: a new generation, with nobody attached

    tempting, but no
    READY -> FILLING to drop the oldest  changes bytes that a system call is reading; the newest is dropped
    DRAINING -> FREE before the return   the kernel may still copy while the producer fills
    0xDD written by the consumer         its successor would send it; the producer poisons what came back
    `progress` stored after the call     a death in between delivers the entry twice
    `progress` without the number        is taken for the next area's, and its first entries are skipped
    repairing a contradiction            RingError: the process ends, both are replaced, the ring is emptied

The drain lease says which of two processes is the consumer. Nobody waits for it:

    who              from      to        how, and why so
    reader, writer   0         me        compare and swap: load, compare and store under a record lock, since
                                         Python has no atomic operations; a busy lock counts as taken
    holder           me        0         one store, between two areas, so after its stores of tail
    supervisor       dead      0         `RingMemory.clear_dead`, once wait() or a pidfd has said it is dead

    tempting, but no
    stealing it after a time limit       a stopped holder may be inside a system call: kill, wait, then clear
    clearing it without comparing        the living side may have taken it meanwhile
    taking it after publishing           take it before polling: else the writer, awake once, wins between
                                         publish and take and stays the drainer for seconds

Sleep and wake. A consumer process sleeps on an eventfd, its Bell, and empties it before it looks at its
rings. No wake-up is lost if

- a producer rings at the end of every pass without the lease after which areas wait, published in this pass
  or earlier: the writer may have found the lock busy only because the reader was looking at the lease;
- a reader that drops the lease with areas left rings, and a writer that does so comes back for them;
- the supervisor, having cleared the lease, rings after every death: it may have come between store and ring.

The time limit of a consumer's sleep is a belt. There is no word "I am asleep" that would spare the producer
the call: it would need the store of head to be visible before the load of that word, the one order that
x86-64 does not keep and Python cannot ask for. The call costs 0.15 us for an area of up to 71 KiB and takes
a lock in the kernel, which also makes the stores before it visible.
"""

import contextlib
import errno
import os
import select
import struct
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.newtypes import Buffer
from nebula_mp.shm import GENERATION, PAGE_BYTES, Layout, Mapping, RecordLock, Region, load_word

AREAS = 32
AREA_BYTES = 72 * 1024
ENTRIES_MAX = 128
ROWS = 65_536
"""Tunnel rows: an entry's `row` is below this."""

POISON = 0xDD

DATA = Layout("ring data", b"nmp:data", 1)
STATE = Layout("ring state", b"nmp:stat", 1)

# Word indexes; each on a cache line of its own.
HEAD = 8  # in DATA
TAIL = 8  # in STATE
LEASE = 16
PROGRESS = 24

AREA_HEADER_BYTES = 64
_ENTRY = struct.Struct("<4I")
_ENTRY_BYTES = _ENTRY.size
_COUNT = 0  # word indexes within an area
_NUMBER = 1
_PROGRESS_BITS = 12
_PROGRESS_MASK = (1 << _PROGRESS_BITS) - 1
_AREAS_MAX = 4096

_new_tuple = tuple.__new__


class Entry(NamedTuple):
    """Bytes of an area that belong together; `offset` counts from the area's data."""

    offset: int
    length: int
    segment: int
    row: int


class Recovery(Enum):
    """What a successor of the consumer does with the area it finds half drained."""

    SEND_AGAIN = "send again"  # the receiver recognises copies
    GO_ON_BEHIND = "go on behind"  # nothing is delivered twice, one entry, with all its packets, may be lost


class Geometry(NamedTuple):
    """The ring's sizes, as its header states them."""

    areas: int
    area_bytes: int  # multiple of 64
    entries_max: int

    @property
    def data_offset(self) -> int:
        """Where in an area the data begin."""
        return AREA_HEADER_BYTES + _ENTRY.size * self.entries_max

    @property
    def data_bytes(self) -> int:
        """Room for data in an area."""
        return self.area_bytes - self.data_offset

    @property
    def region_bytes(self) -> int:
        """Size of the data region."""
        return PAGE_BYTES + self.areas * self.area_bytes

    @property
    def is_possible(self) -> bool:
        """Whether a ring of these sizes can exist."""
        return (
            1 <= self.areas <= _AREAS_MAX
            and 1 <= self.entries_max <= _PROGRESS_MASK
            and self.area_bytes % 64 == 0
            and self.data_bytes >= 1
        )


def holder_word(process_id: int, generation: int) -> int:
    """The lease word of a process; `generation` is 1 and up and never used twice by the supervisor."""
    assert 0 < process_id < 1 << 32
    assert 0 < generation < 1 << 32
    return process_id | generation << 32


class RingMemory:
    """A ring as the supervisor holds it: two regions, no mapping. Make it before the fork."""

    def __init__(self, data: Region, state: Region, geometry: Geometry) -> None:
        """Internal: use `create`."""
        self.data = data
        self.state = state
        self.geometry = geometry

    @classmethod
    def create(
        cls,
        name: str,
        *,
        areas: int = AREAS,
        area_bytes: int = AREA_BYTES,
        entries_max: int = ENTRIES_MAX,
    ) -> "RingMemory":
        """Make an empty ring. `name` says in /proc which one, as in `seal/0`. Raises SystemCallError."""
        geometry = Geometry(areas, area_bytes, entries_max)
        assert geometry.is_possible
        with contextlib.ExitStack() as undo:
            data = Region.create(DATA, geometry.region_bytes, geometry, name=name)
            undo.callback(data.close)
            state = Region.create(STATE, PAGE_BYTES, name=name)
            undo.pop_all()
        return cls(data, state, geometry)

    def reset(self) -> None:
        """Empty the ring and give it a new generation, for the successors of a pair that contradicted itself.

        Both processes have ended; one that must live on (control, of an upcall ring) has stopped using its
        Consumer and makes a new one afterwards. A forgotten one raises RingError at its next use.
        """
        generation = self.data.generation + 1
        self.state.renew(generation)
        self.data.renew(generation)

    def clear_dead(self, holder: int) -> bool:
        """Free the lease of a process that has been waited for; True if it had it. Ring the bell afterwards.

        While the lease is not 0 only its holder stores it, so comparing and storing need no lock here.
        """
        if load_word(self.state.descriptor, LEASE) != holder:
            return False
        self.state.store_word(LEASE, 0)
        return True

    def holder(self) -> tuple[int, int] | None:
        """Process id and generation of whoever drains at this moment."""
        word = load_word(self.state.descriptor, LEASE)
        return (word & 0xFFFF_FFFF, word >> 32) if word else None

    def fill(self) -> int:
        """Areas that wait or are being drained, 0 to `areas`; a moment's figure for status output."""
        tail = load_word(self.state.descriptor, TAIL)
        head = load_word(self.data.descriptor, HEAD)
        return min(max(head - tail, 0), self.geometry.areas)

    def close(self) -> None:
        """Close the descriptors."""
        self.data.close()
        self.state.close()


def _geometry(data: Mapping, state: Mapping) -> Geometry:
    """Sizes of the ring, checked. Raises RingError."""
    geometry = Geometry(*data.parameters[:3])
    if not geometry.is_possible or geometry.region_bytes != data.size_bytes:
        raise data.contradiction("geometry", tuple(geometry), f"one that fills {data.size_bytes} bytes")
    if state.size_bytes != PAGE_BYTES:
        raise state.contradiction("size", state.size_bytes, f"{PAGE_BYTES}")
    if state.generation != data.generation:
        raise state.contradiction("generation", state.generation, f"{data.generation} as in the data")
    return geometry


class _End:
    """What both sides know of the ring."""

    def __init__(self, data: Mapping, state: Mapping) -> None:
        self.geometry = _geometry(data, state)
        self._areas, area_bytes, self._entries_max = self.geometry
        self._room = self.geometry.data_bytes
        self._memory, self._words = data, data.words
        self._bytes, self._generation = data.data, data.generation
        # Of each area: the index of its first word, and its bytes for data.
        self._firsts = [(PAGE_BYTES + number * area_bytes) // 8 for number in range(self._areas)]
        ends = range(PAGE_BYTES + area_bytes, self.geometry.region_bytes + 1, area_bytes)
        self._data = [data.data[end - self._room : end] for end in ends]


class Producer(_End):
    """The filling side; one process at a time. `data` is mapped writable, `state` may be read-only.

    Call `try_begin`, fill `data`, describe it with `try_append` (`try_add` does both), then `publish`. Making
    one is also how a successor attaches: it goes on at head. After RingError it may not be used again.
    """

    def __init__(self, data: Mapping, state: Mapping, *, poison: bool = False) -> None:
        """`poison`: overwrite released areas with 0xDD, for tests. Raises RingError."""
        assert data.writable
        super().__init__(data, state)
        self._tail_words = state.words
        self._poison = bytes([POISON]) * self.geometry.area_bytes if poison else b""
        self._head = self._words[HEAD]
        tail = self._tail_words[TAIL]
        self._tail = tail
        self._check_tail(tail)
        # The area being filled:
        self._count = -1  # entries; -1: none is being filled
        self._used = 0  # bytes of data up to the last described one
        self._table = 0  # where in the region its entries begin
        self._filling = self._data[0]
        if poison:
            for number in range(self._head, self._tail + self.geometry.areas):
                self._poison_area(number)

    @property
    def data(self) -> memoryview:
        """Where the area being filled wants its bytes; borrowed until `publish`."""
        assert self._count >= 0, "try_begin first"
        return self._filling

    def try_begin(self) -> bool:
        """Start on the next area; False, and nothing changed, when all are taken.

        Before `publish` it starts the same area again. Raises RingError when tail is impossible or the ring
        was emptied behind our back.
        """
        if self._words[GENERATION] != self._generation:
            self._memory.check_generation()  # called only to raise: every pass comes here
        self._check_tail(self._tail_words[TAIL])
        if self._head - self._tail == self._areas:
            return False
        number = self._head % self._areas
        self._count = 0
        self._used = 0
        self._table = 8 * self._firsts[number] + AREA_HEADER_BYTES
        self._filling = self._data[number]
        return True

    def try_append(self, offset: int, length: int, segment: int = 0, row: int = 0) -> bool:
        """Describe `length` bytes at `offset` of `data`; False, and nothing changed, with a full table."""
        count = self._count
        end = offset + length
        assert count >= 0, "try_begin first"
        assert 0 <= offset < end <= self._room
        if count == self._entries_max:
            return False
        _ENTRY.pack_into(self._bytes, self._table + _ENTRY_BYTES * count, offset, length, segment, row)
        self._count = count + 1
        if end > self._used:  # noqa: PLR1730 - a third of the time of max()
            self._used = end
        return True

    def try_add(self, packet: Buffer, segment: int = 0, row: int = 0) -> bool:
        """Copy `packet` behind what is there; False, and nothing changed, when bytes or table are full."""
        at, end = self._used, self._used + len(packet)
        if end > self._room or not self.try_append(at, len(packet), segment, row):
            return False
        self._filling[at:end] = packet
        return True

    def publish(self) -> None:
        """Hand the area, which has an entry at least, to the consumer. Then drain it or ring."""
        assert self._count > 0, "nothing to publish"
        words, head = self._words, self._head
        base = self._firsts[head % self._areas]
        words[base + _COUNT] = self._count
        words[base + _NUMBER] = head
        self._count = -1
        self._head = head + 1
        # Last: the consumer reads the area as soon as head has passed it. x86-64 keeps stores in order.
        words[HEAD] = head + 1

    def waiting(self) -> int:
        """Areas published and not yet released; above 0 after a pass without the lease: ring the bell.

        Raises RingError when tail is impossible.
        """
        self._check_tail(self._tail_words[TAIL])
        return self._head - self._tail

    def _check_tail(self, tail: int) -> None:
        """Take over the consumer's cursor. Raises RingError unless it lies between our last and head."""
        if not self._tail <= tail <= self._head or self._head - tail > self._areas:
            low = max(self._tail, self._head - self._areas)
            raise self._memory.contradiction("tail", tail, f"{low}..{self._head}")
        if self._poison:
            for number in range(self._tail, tail):
                self._poison_area(number)
        self._tail = tail

    def _poison_area(self, number: int) -> None:
        at = 8 * self._firsts[number % self._areas]
        self._memory.data[at : at + self.geometry.area_bytes] = self._poison


class DrainLease:
    """The right to drain one ring, which a reader and its writer pass to and fro; see the module's text."""

    __slots__ = ("_holder", "_lock", "_state", "_words")

    def __init__(self, state: Mapping, lock: RecordLock, holder: int) -> None:
        """`lock` is the ring's, the same one for both; `holder` is this process's `holder_word`."""
        assert state.writable
        self._state = state
        self._words = state.words
        self._lock = lock
        self._holder = holder

    @property
    def is_mine(self) -> bool:
        """Whether this process drains."""
        return self._words[LEASE] == self._holder

    def try_take(self) -> bool:
        """Become the consumer unless somebody is, or is about to be. Never waits."""
        words = self._words
        if words[LEASE] != 0 or not self._lock.try_take():
            return False
        try:
            if words[LEASE] != 0:
                return False
            words[LEASE] = self._holder
        finally:
            self._lock.drop()
        return True

    def drop(self) -> None:
        """Stop being the consumer. Raises RingError when we were not."""
        self.check()
        self._words[LEASE] = 0

    def check(self) -> None:
        """Raise RingError when the lease is not ours: another process drains too."""
        found = self._words[LEASE]
        if found != self._holder:
            raise self._state.contradiction("lease", f"{found:#x}", f"our own {self._holder:#x}")


class Consumer(_End):
    """The draining side. `state` is mapped writable, `data` may be read-only.

    With a lease, everything below is between `try_take` and `drop`; without one (upcall and stranger rings,
    whose consumer never changes) the process has taken the ring's record lock for good.
    Drain: while `pending()`: for each of `entries()` make the system call; then `release`. Making one is also
    how a successor attaches: it goes on at tail. After RingError it may not be used again.
    """

    def __init__(
        self,
        data: Mapping,
        state: Mapping,
        *,
        lease: DrainLease | None = None,
        recovery: Recovery = Recovery.SEND_AGAIN,
        segments: bool = True,
        rows: int = ROWS,
    ) -> None:
        """`segments`: entries' `segment` is a size, at most `length`; without, the caller checks what it is.

        With `GO_ON_BEHIND` it is a number of packets, 1 and up; each has a byte at least. Raises RingError.
        """
        assert state.writable
        super().__init__(data, state)
        self.resumed = 0
        """Packets in entries that were passed over, since a predecessor had begun them: perhaps lost."""
        self._state_words = state.words
        self._state = state
        self._lease = lease
        self._goes_on = recovery is Recovery.GO_ON_BEHIND
        self._least = 1 if self._goes_on else 0  # packets; none would be missing in the sums of counters
        self._segments = segments
        self._rows = rows
        self._tail = self._head = state.words[TAIL]
        self._returned = -1  # the area whose last entry's call has returned
        self._drains = lease is None
        if self._drains:
            self.pending()

    def try_take(self) -> bool:
        """Become the consumer; False when the other process is. Never waits."""
        if self._lease is not None and not self._lease.try_take():
            return False
        # Loaded after the lease was found free, which its last holder stored after tail.
        self._tail = self._state_words[TAIL]
        self._drains = True
        return True

    def drop(self) -> bool:
        """Let the other process drain, between two areas; True when areas are left: then ring the bell."""
        left = self.pending() > 0
        if self._lease is not None:
            self._drains = False
            self._lease.drop()
        return left

    def pending(self) -> int:
        """Areas that are ready. Raises RingError when head is impossible or the ring was emptied."""
        assert self._drains, "try_take first"
        words, tail = self._words, self._tail
        if words[GENERATION] != self._generation:
            self._memory.check_generation()  # called only to raise: every pass comes here several times
        self._head = head = words[HEAD]
        if not 0 <= head - tail <= self._areas:
            raise self._memory.contradiction("head", head, f"{tail}..{tail + self._areas}")
        return head - tail

    def entries(self) -> Iterator[tuple[Entry, memoryview]]:
        """The entries of the oldest ready area, each with its bytes, borrowed until `release`.

        Ask for the next one when the system call on the last has returned. When the caller stops half-way, a
        new call starts again or goes on, as for a successor. Raises RingError before the first entry when any
        of them is impossible. `pending()` was above 0.
        """
        tail = self._tail
        assert self._drains, "try_take first"
        assert self._head > tail, "pending first"
        entries = self._copy_entries(tail)
        data, goes_on = self._data[tail % self._areas], self._goes_on
        number = 0
        if goes_on and (progress := self._state_words[PROGRESS]) >> _PROGRESS_BITS >= tail:
            number = self._begun(progress, tail, entries)  # only a successor
        for entry in entries[number:] if number else entries:
            offset, length, _, _ = entry
            if goes_on:
                number += 1
                self._state_words[PROGRESS] = tail << _PROGRESS_BITS | number
            yield entry, data[offset : offset + length]
        self._returned = tail

    def release(self) -> None:
        """Give the area back, after `entries` came to its end. Raises RingError when it was not ours."""
        tail = self._tail
        assert self._returned == tail, "a system call on this area has not returned"
        if self._lease is not None:
            self._lease.check()
        if (found := self._words[self._firsts[tail % self._areas] + _NUMBER]) != tail:
            raise self._bad_number(found)
        self._state_words[TAIL] = self._tail = tail + 1

    def _copy_entries(self, tail: int) -> list[Entry]:
        """The area's table, copied once and checked. Raises RingError."""
        words, base = self._words, self._firsts[tail % self._areas]
        if (found := words[base + _NUMBER]) != tail:
            raise self._bad_number(found)
        count = words[base + _COUNT]
        if not 0 < count <= self._entries_max:
            raise self._bad("entries", count, f"1..{self._entries_max}")
        at = 8 * base + AREA_HEADER_BYTES
        if count == 1:  # a lone packet's
            return [self._checked(_ENTRY.unpack_from(self._bytes, at))]
        copy = bytes(self._bytes[at : at + _ENTRY_BYTES * count])
        return list(map(self._checked, _ENTRY.iter_unpack(copy)))

    def _checked(self, fields: tuple[int, int, int, int]) -> Entry:
        offset, length, segment, row = fields
        room = self._room - offset
        if not 0 < length <= room:
            if room <= 0:
                raise self._bad("offset", offset, f"below {self._room}")
            raise self._bad("length", length, f"1..{room} at {offset}")
        if self._segments and not self._least <= segment <= length:
            raise self._bad("segment", segment, f"{self._least}..{length}")
        if row >= self._rows:
            raise self._bad("row", row, f"below {self._rows}")
        return _new_tuple(Entry, fields)  # as in wire.ip

    def _begun(self, progress: int, tail: int, entries: list[Entry]) -> int:
        """How many of these entries a predecessor began; `progress` is not behind. Raises RingError."""
        number, begun = divmod(progress, _PROGRESS_MASK + 1)
        if number > tail or begun > len(entries):
            raise self._state.contradiction("progress", (number, begun), f"at most {(tail, len(entries))}")
        if begun == 0:
            return 0
        self.resumed += entries[begun - 1].segment if self._segments else 1
        return begun

    def _bad_number(self, found: int) -> RingError:
        return self._bad("number", found, f"{self._tail}: it changed hands while it was ours")

    def _bad(self, field: str, value: int, expected: str) -> RingError:
        return self._memory.contradiction(f"area {self._tail}: {field}", value, expected)


class Bell:
    """Wakes one consumer process, whichever of its rings was filled. Make it before the fork."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is the eventfd of `create`."""
        self.descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    @classmethod
    def create(cls) -> "Bell":
        """A bell that has not been rung. Raises SystemCallError."""
        try:
            return cls(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError as error:
            why = errno.errorcode.get(error.errno or 0, str(error))
            raise SystemCallError(f"bell: eventfd refused ({why}): raise LimitNOFILE (ulimit -n)") from None

    def fileno(self) -> int:
        """For an event loop: readable while rung; then call `empty` and look at the rings."""
        return self.descriptor

    def ring(self) -> None:
        """Wake the consumer, now or when it next wants to sleep."""
        try:  # noqa: SIM105 - `suppress` takes longer than the system call
            os.eventfd_write(self.descriptor, 1)
        except BlockingIOError:  # rung 2^64 - 2 times already: it will wake
            pass

    def empty(self) -> None:
        """Forget that it was rung. Before looking at the rings, never after."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def wait(self, limit_ms: int) -> bool:
        """Sleep until it is rung, at most `limit_ms`, and empty it; True if it was. Now look at the rings."""
        assert limit_ms >= 0
        rung = bool(self._poll.poll(limit_ms))
        if rung:
            self.empty()
        return rung

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)
        self.descriptor = -1
