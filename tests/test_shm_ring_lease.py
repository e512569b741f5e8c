import errno
import os
import select
import signal
import time
from collections.abc import Iterator

import pytest

from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.shm import PAGE_BYTES, U64_MAX, LockFile, Mapping, RecordLock, Region, load_word
from nebula_mp.shm_ring import (
    LEASE,
    STATE,
    TAIL,
    Bell,
    DrainLease,
    RingMemory,
    holder_word,
)
from tests.support.processes import Forked, Keep, eventually, forked
from tests.support.rings import READER, WRITER, consume, drain, drain_all, patch, produce, publish, small_ring


@pytest.fixture
def keep() -> Iterator[Keep]:
    with Keep() as keeper:
        yield keeper


@pytest.fixture
def memory(keep: Keep) -> RingMemory:
    return keep(small_ring())


@pytest.fixture
def locks(keep: Keep) -> LockFile:
    return keep(LockFile.create())


@pytest.fixture
def bell(keep: Keep) -> Bell:
    return keep(Bell.create())


# The drain lease.


def test_only_one_of_two_processes_is_the_consumer(memory: RingMemory, locks: LockFile) -> None:
    reader = consume(memory, lock=locks.lock(0), holder=READER)
    writer = consume(memory, lock=locks.lock(0), holder=WRITER)

    assert writer.try_take()
    assert memory.holder() == (1002, 2)
    assert not reader.try_take()
    assert not writer.drop()
    assert memory.holder() is None
    assert reader.try_take()
    assert memory.holder() == (1001, 1)


def test_who_takes_the_lease_goes_on_where_the_other_stopped(memory: RingMemory, locks: LockFile) -> None:
    producer = produce(memory)
    reader = consume(memory, lock=locks.lock(0), holder=READER)
    writer = consume(memory, lock=locks.lock(0), holder=WRITER)
    for number in range(3):
        publish(producer, b"%d" % number)

    came_out = []
    for consumer in (reader, writer, reader):
        assert consumer.try_take()
        consumer.pending()
        came_out += drain(consumer)
        left = consumer.drop()

    assert came_out == [b"0", b"1", b"2"]
    assert not left


def test_dropping_says_whether_areas_are_left_for_the_other(memory: RingMemory, locks: LockFile) -> None:
    producer, consumer = produce(memory), consume(memory, lock=locks.lock(0))
    consumer.try_take()
    publish(producer, b"x")

    assert consumer.drop()


def test_without_the_lease_nothing_can_be_drained(memory: RingMemory, locks: LockFile) -> None:
    publish(produce(memory), b"x")
    consumer = consume(memory, lock=locks.lock(0))

    for use in (consumer.pending, consumer.drop, lambda: next(consumer.entries())):
        with pytest.raises(AssertionError):
            use()
    assert consumer.try_take()
    assert consumer.pending()
    consumer.drop()
    with pytest.raises(AssertionError):
        consumer.pending()
    with pytest.raises(AssertionError, match="try_take first"):
        next(consumer.entries())


@pytest.mark.parametrize("word", [0, READER])
def test_a_holder_whose_lease_was_taken_away_notices_before_it_releases_or_drops(
    memory: RingMemory, locks: LockFile, word: int
) -> None:
    publish(produce(memory), b"x")
    consumer = consume(memory, lock=locks.lock(0))
    assert consumer.try_take()
    assert consumer.pending()
    assert [*consumer.entries()]
    patch(memory, "lease", word)

    for use in (consumer.release, consumer.drop):
        with pytest.raises(RingError, match=f"lease is {word:#x}, expected our own {WRITER:#x}"):
            use()

    assert load_word(memory.state.descriptor, TAIL) == 0
    assert load_word(memory.state.descriptor, LEASE) == word


def test_a_busy_lock_counts_as_taken(memory: RingMemory, locks: LockFile) -> None:
    consumer = consume(memory, lock=locks.lock(0))
    ready, tell = os.pipe()

    def inside_compare_and_swap() -> None:
        assert locks.lock(0).try_take()
        os.write(tell, b"x")
        signal.pause()

    with forked(inside_compare_and_swap) as other:
        os.read(ready, 1)
        other.stop()
        assert not consumer.try_take()
        other.kill()
        assert consumer.try_take()
    os.close(ready)
    os.close(tell)


def test_a_lease_that_was_taken_between_glance_and_lock_is_not_taken_again(
    memory: RingMemory, locks: LockFile
) -> None:
    class SlowLock(RecordLock):
        def try_take(self) -> bool:
            patch(memory, "lease", READER)
            return super().try_take()

    state = Mapping(memory.state.descriptor, STATE, writable=True)
    lease = DrainLease(state, SlowLock(locks.descriptor, 0), WRITER)

    assert not lease.try_take()
    assert memory.holder() == (1001, 1)
    assert not lease.is_mine
    with forked(lambda: os._exit(not locks.lock(0).try_take())) as other:
        assert other.wait() == 0, "the lock was not given back"


def test_the_supervisor_clears_the_lease_of_the_dead_and_of_nobody_else(
    memory: RingMemory, locks: LockFile
) -> None:
    def hold_for_ever() -> None:
        consumer = consume(memory, lock=locks.lock(0), holder=holder_word(os.getpid(), 5))
        assert consumer.try_take()
        signal.pause()

    publish(produce(memory), b"x")
    writer = consume(memory, lock=locks.lock(0))
    with forked(hold_for_ever) as reader:
        assert eventually(lambda: memory.holder() == (reader.pid, 5))
        assert not memory.clear_dead(WRITER)
        assert not memory.clear_dead(holder_word(reader.pid, 4))
        assert not memory.clear_dead(holder_word(reader.pid + 1, 5))
        assert not writer.try_take()
        reader.kill()
        assert not writer.try_take()

        assert memory.clear_dead(holder_word(reader.pid, 5))

        assert not memory.clear_dead(holder_word(reader.pid, 5))
    assert writer.try_take()
    assert drain_all(writer) == [[b"x"]]


@pytest.mark.parametrize(("process_id", "generation"), [(0, 1), (1 << 32, 1), (1, 0), (1, 1 << 32)])
def test_a_holders_word_has_room_for_a_process_id_and_a_generation_that_are_not_0(
    process_id: int, generation: int
) -> None:
    with pytest.raises(AssertionError):
        holder_word(process_id, generation)


def test_of_many_takers_at_once_never_two_have_the_lease(
    memory: RingMemory, locks: LockFile, keep: Keep
) -> None:
    """Three processes take and drop as fast as they can; what is under the lease is a load and a store."""
    owner, total = 100, 101
    board = keep(Region.create(STATE, PAGE_BYTES))

    def contend(generation: int) -> None:
        state = Mapping(memory.state.descriptor, STATE, writable=True)
        lease = DrainLease(state, locks.lock(0), holder_word(os.getpid(), generation))
        words = Mapping(board.descriptor, STATE, writable=True).words
        mine = 0
        while mine < 1500:
            if lease.try_take():
                assert words[owner] == 0
                words[owner] = generation
                words[total] += 1
                assert words[owner] == generation
                words[owner] = 0
                lease.drop()
                mine += 1

    children = [Forked(lambda generation=generation: contend(generation)) for generation in (1, 2, 3)]  # type: ignore[misc]

    assert [child.wait() for child in children] == [0, 0, 0]
    assert load_word(board.descriptor, total) == 4500


# The bell.


def test_a_bell_that_was_rung_before_is_heard_once(bell: Bell) -> None:
    bell.ring()
    bell.ring()

    assert [bell.wait(0), bell.wait(0)] == [True, False]


def test_an_emptied_bell_is_silent_and_may_be_emptied_again(bell: Bell) -> None:
    bell.ring()
    bell.empty()
    bell.empty()

    assert not bell.wait(0)


def test_a_sleep_has_a_limit(bell: Bell) -> None:
    start = time.monotonic()

    assert not bell.wait(20)

    assert 0.015 < time.monotonic() - start < 5


def test_a_bell_wakes_another_process_at_once(bell: Bell) -> None:
    start = time.monotonic()
    with forked(lambda: os._exit(not bell.wait(20_000))) as sleeper:
        time.sleep(0.02)
        bell.ring()
        assert sleeper.wait() == 0
    assert time.monotonic() - start < 10


def test_ringing_never_blocks(bell: Bell) -> None:
    os.eventfd_write(bell.descriptor, U64_MAX - 1)

    bell.ring()

    assert bell.wait(0)


def test_an_event_loop_may_watch_the_bell(bell: Bell) -> None:
    assert not select.select([bell], [], [], 0)[0]
    bell.ring()
    assert select.select([bell], [], [], 0)[0]


def test_a_sleep_without_a_limit_is_refused(bell: Bell) -> None:
    bell.ring()

    with pytest.raises(AssertionError):
        bell.wait(-1)


def test_a_closed_bell_gives_its_descriptor_back() -> None:
    bell = Bell.create()
    descriptor = bell.fileno()

    bell.close()

    assert bell.descriptor == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_bell_that_cannot_be_made_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "eventfd", refuse)

    with pytest.raises(SystemCallError, match=r"bell: eventfd refused \(EMFILE\): raise LimitNOFILE"):
        Bell.create()
