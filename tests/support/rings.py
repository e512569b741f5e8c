"""Small rings, both their sides, and packets that can be told apart."""

import os
import random
import struct

from nebula_mp.shm import PAGE_BYTES, Mapping, RecordLock
from nebula_mp.shm_ring import (
    DATA,
    HEAD,
    LEASE,
    PROGRESS,
    STATE,
    TAIL,
    Consumer,
    DrainLease,
    Geometry,
    Producer,
    Recovery,
    RingMemory,
    holder_word,
)

# A ring of four areas of 512 bytes: 192 for header and table, 320 for data.
SMALL = Geometry(areas=4, area_bytes=512, entries_max=8)
READER = holder_word(1001, 1)
WRITER = holder_word(1002, 2)


def small_ring(geometry: Geometry = SMALL) -> RingMemory:
    return RingMemory.create("seal/0", **geometry._asdict())


def produce(memory: RingMemory, *, poison: bool = False) -> Producer:
    """As a reader attaches that does not drain: the consumer's words are read-only to it."""
    data = Mapping(memory.data.descriptor, DATA, writable=True)
    return Producer(data, Mapping(memory.state.read_only, STATE, writable=False), poison=poison)


def consume(
    memory: RingMemory,
    recovery: Recovery = Recovery.SEND_AGAIN,
    *,
    lock: RecordLock | None = None,
    holder: int = WRITER,
    segments: bool = True,
    rows: int = 65_536,
) -> Consumer:
    """As a writer attaches: everything of the producer's is read-only to it."""
    data = Mapping(memory.data.read_only, DATA, writable=False)
    state = Mapping(memory.state.descriptor, STATE, writable=True)
    lease = DrainLease(state, lock, holder) if lock else None
    return Consumer(data, state, lease=lease, recovery=recovery, segments=segments, rows=rows)


def publish(producer: Producer, *packets: bytes) -> bool:
    if not producer.try_begin():
        return False
    assert all(producer.try_add(packet, segment=1, row=7) for packet in packets)
    producer.publish()
    return True


def drain(consumer: Consumer) -> list[bytes]:
    """One area."""
    packets = [bytes(data) for _, data in consumer.entries()]
    consumer.release()
    return packets


def drain_all(consumer: Consumer) -> list[list[bytes]]:
    return [drain(consumer) for _ in range(consumer.pending())]


def entries_of(area: int) -> int:
    return 1 + area % 4


def packet_of(area: int, entry: int) -> bytes:
    """Bytes that only this entry has, of a length that varies."""
    number = 8 * area + entry
    return struct.pack("<Q", number) + random.Random(number).randbytes(number % 53)


def number_of(packet: bytes) -> int:
    """Which entry it is; the bytes are checked."""
    number: int = struct.unpack_from("<Q", packet)[0]
    assert packet == packet_of(number // 8, number % 8)
    return number


def numbers_below(area: int) -> list[int]:
    return [8 * number + entry for number in range(area) for entry in range(entries_of(number))]


def check_delivered(delivered: list[int], areas: int, recovery: Recovery, deaths: int) -> None:
    """All that was published came out in order; what a death may cost is the recovery's."""
    expected = numbers_below(areas)
    if recovery is Recovery.GO_ON_BEHIND:
        assert delivered == sorted(set(delivered)), "out of order, or twice"
        missing = set(expected) - set(delivered)
        assert len(missing) <= deaths, missing
        assert set(delivered) <= set(expected)
        return
    fresh: list[int] = []
    again = 0
    for number in delivered:
        if fresh and number <= fresh[-1]:
            assert number // 8 == fresh[-1] // 8, "an area came again that had been released"
            again += number % 8 == 0
        else:
            fresh.append(number)
    assert fresh == expected
    assert again <= deaths


def patch(memory: RingMemory, name: str, value: int) -> None:
    """Overwrite one number, as a process gone mad could."""
    words = {
        "head": (memory.data, 8 * HEAD),
        "tail": (memory.state, 8 * TAIL),
        "lease": (memory.state, 8 * LEASE),
        "progress": (memory.state, 8 * PROGRESS),
        "count": (memory.data, PAGE_BYTES),
        "number": (memory.data, PAGE_BYTES + 8),
        "data generation": (memory.data, 16),
    }
    if name in words:
        region, offset = words[name]
        os.pwrite(region.descriptor, struct.pack("<Q", value), offset)
        return
    offset = PAGE_BYTES + 64 + 4 * ["offset", "length", "segment", "row"].index(name)
    os.pwrite(memory.data.descriptor, struct.pack("<I", value), offset)
