"""Control as one more that fills stranger rings."""

from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from nebula_mp import shm_stats
from nebula_mp.control.early import BYTES_EACH, DATAGRAMS_EACH, OVERHEAD_BYTES
from nebula_mp.datapath.api import (
    DATAGRAM_BYTES_MAX,
    HANDOVER_AREAS,
    UPCALL_AREA_BYTES,
    UPCALL_ENTRIES,
    Drop,
    RingFds,
    UpcallLimits,
    parse_record,
)
from nebula_mp.errors import RingError
from nebula_mp.newtypes import Seconds, UdpAddr
from nebula_mp.shm_ring import Bell, Consumer, RingMemory
from nebula_mp.shm_stats import StatsPage
from nebula_mp.workers.handover import Handover
from tests.support import rings

SOURCES = [UdpAddr(ip_address("192.0.2.7"), 4242), UdpAddr(ip_address("fe80::1%3"), 4243)]
NOW = Seconds(12.5)


class Readers:
    """Two readers, the rings that control fills for them, and control's end."""

    def __init__(self, closing: ExitStack) -> None:
        self.memories = [
            RingMemory.create(
                f"stranger/control/{owner}",
                areas=HANDOVER_AREAS,
                area_bytes=UPCALL_AREA_BYTES,
                entries_max=UPCALL_ENTRIES,
            )
            for owner in range(2)
        ]
        self.bells = [Bell.create() for _ in range(2)]
        page = shm_stats.create_page("control")
        self.page = StatsPage(page.descriptor, writable=True)
        closing.callback(page.close)
        for memory in self.memories:
            closing.callback(memory.close)
        for bell in self.bells:
            closing.callback(bell.close)
        fds = [RingFds(memory.data.descriptor, memory.state.read_only) for memory in self.memories]
        self.control = Handover(fds, [bell.descriptor for bell in self.bells], self.page)
        for owner in range(2):
            self.control.attach(owner)

    def consumer(self, owner: int) -> Consumer:
        return rings.consume(self.memories[owner], segments=False)

    def take(self, owner: int) -> list[tuple[int, UdpAddr | None, bytes]]:
        """What a reader finds: when it was handed over, where it came from, the datagram."""
        found = []
        ring = self.consumer(owner)
        while ring.pending():
            for _, data in ring.entries():
                at_ms, _, source, _, _, datagram = parse_record(bytes(data))
                found.append((at_ms, source, datagram))
            ring.release()
        return found

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.page.snapshot().items() if count}


@pytest.fixture
def readers() -> Iterator[Readers]:
    with ExitStack() as closing:
        yield Readers(closing)


def test_a_reader_gets_what_is_its_own_in_order_and_is_woken_once_it_is_there(readers: Readers) -> None:
    for number in range(100):
        readers.control.push(1, b"%d" % number, SOURCES[number % 2], NOW)
    before = [bell.wait(0) for bell in readers.bells]
    readers.control.flush()

    assert before == [False, False]
    assert [bell.wait(0) for bell in readers.bells] == [False, True]
    assert readers.take(0) == []
    assert readers.take(1) == [(12_500, SOURCES[number % 2], b"%d" % number) for number in range(100)]
    assert readers.counts == {"mp.strangers": 100}


def test_nobody_is_woken_for_nothing(readers: Readers) -> None:
    readers.control.push(0, b"x", SOURCES[0], NOW)
    readers.control.flush()
    readers.bells[0].empty()

    readers.control.flush()

    assert not readers.bells[0].wait(0)


@pytest.mark.parametrize("size", [16, 100, 1440, 7863, 7865, DATAGRAM_BYTES_MAX])
def test_a_ring_takes_at_once_all_that_is_kept_for_a_handshake(readers: Readers, size: int) -> None:
    count = min(DATAGRAMS_EACH, BYTES_EACH // (size + OVERHEAD_BYTES))

    for _ in range(count):
        readers.control.push(0, bytes(size), SOURCES[0], NOW)
    readers.control.flush()

    assert readers.counts == {"mp.strangers": count}
    assert len(readers.take(0)) == count


def test_a_reader_sends_up_at_once_as_many_as_are_kept_for_a_handshake() -> None:
    rate, burst = UpcallLimits().unknown

    assert burst == DATAGRAMS_EACH
    assert rate == 200, "what a flood may take of control's time"


def test_what_a_full_ring_does_not_take_is_counted(readers: Readers) -> None:
    for _ in range(HANDOVER_AREAS + 3):
        readers.control.push(0, bytes(DATAGRAM_BYTES_MAX), SOURCES[0], NOW)
    readers.control.push(1, b"another's", SOURCES[0], NOW)
    readers.control.flush()

    assert len(readers.take(0)) == HANDOVER_AREAS
    assert len(readers.take(1)) == 1
    assert readers.counts == {"mp.strangers": HANDOVER_AREAS + 1, Drop.STRANGER_RING_FULL: 3}


def test_a_ring_that_was_emptied_is_left_alone_until_it_is_attached_to_again(readers: Readers) -> None:
    readers.memories[0].reset()

    with pytest.raises(RingError):
        readers.control.push(0, b"to a ring that is no more", SOURCES[0], NOW)
    readers.control.push(0, b"to nobody", SOURCES[0], NOW)
    readers.control.push(1, b"goes on", SOURCES[0], NOW)
    readers.control.flush()
    readers.control.attach(0)
    readers.control.push(0, b"to the new one", SOURCES[0], NOW)
    readers.control.flush()

    assert [datagram for _, _, datagram in readers.take(0)] == [b"to the new one"]
    assert [datagram for _, _, datagram in readers.take(1)] == [b"goes on"]
    assert readers.counts == {"mp.strangers": 2, Drop.STRANGER_RING_FULL: 2}


def test_a_successor_goes_on_behind_what_its_predecessor_published(readers: Readers) -> None:
    readers.control.push(0, b"published", SOURCES[0], NOW)
    readers.control.flush()
    readers.control.push(0, b"lost with it", SOURCES[0], NOW)

    readers.control.attach(0)
    readers.control.push(0, b"of the successor", SOURCES[0], NOW)
    readers.control.flush()

    assert [datagram for _, _, datagram in readers.take(0)] == [b"published", b"of the successor"]
