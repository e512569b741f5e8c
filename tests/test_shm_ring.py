import contextlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.shm import PAGE_BYTES, U64_MAX, LockFile, Mapping, Region, load_word
from nebula_mp.shm_ring import (
    AREA_BYTES,
    AREAS,
    DATA,
    ENTRIES_MAX,
    HEAD,
    LEASE,
    POISON,
    PROGRESS,
    STATE,
    TAIL,
    Consumer,
    DrainLease,
    Entry,
    Geometry,
    Producer,
    Recovery,
    RingMemory,
)
from tests.support.processes import Keep
from tests.support.rings import (
    SMALL,
    WRITER,
    consume,
    drain,
    drain_all,
    patch,
    produce,
    publish,
    small_ring,
)


@pytest.fixture
def keep() -> Iterator[Keep]:
    with Keep() as keeper:
        yield keeper


@pytest.fixture
def memory(keep: Keep) -> RingMemory:
    return keep(small_ring())


# Layout.


def test_a_ring_has_32_areas_of_72_kib_with_128_entries_and_71616_bytes_of_data(keep: Keep) -> None:
    memory = keep(RingMemory.create("seal/0"))
    geometry = produce(memory).geometry

    assert geometry == Geometry(32, 72 * 1024, 128) == Geometry(AREAS, AREA_BYTES, ENTRIES_MAX)
    assert (geometry.data_offset, geometry.data_bytes) == (2112, 71_616)
    assert memory.data.size_bytes == geometry.region_bytes == 4096 + 32 * 72 * 1024
    assert memory.state.size_bytes == 4096


def test_cursors_lie_in_different_regions_and_words_of_one_region_on_different_cache_lines() -> None:
    assert HEAD * 8 == TAIL * 8 == 64
    assert [8 * index for index in (TAIL, LEASE, PROGRESS)] == [64, 128, 192]


def test_a_published_area_looks_in_memory_as_the_layout_says(memory: RingMemory) -> None:
    producer = produce(memory)
    publish(producer, b"first")
    publish(producer, b"packet", b"next")

    area = os.pread(memory.data.descriptor, 512, PAGE_BYTES + 512)

    assert load_word(memory.data.descriptor, HEAD) == 2
    assert struct.unpack_from("<2Q", area) == (2, 1)
    assert struct.unpack_from("<4I4I", area, 64) == (0, 6, 1, 7, 6, 4, 1, 7)
    assert area[192:202] == b"packetnext"


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(Geometry(0, 512, 8), id="no area"),
        pytest.param(Geometry(4097, 512, 8), id="too many areas"),
        pytest.param(Geometry(4, 500, 8), id="area not of whole cache lines"),
        pytest.param(Geometry(4, 512, 0), id="no entry"),
        pytest.param(Geometry(4, 512, 28), id="no room for data"),
        pytest.param(Geometry(4, 1 << 20, 4096), id="more entries than progress can count"),
    ],
)
def test_impossible_sizes_are_refused_by_who_makes_and_by_who_attaches(
    geometry: Geometry, keep: Keep
) -> None:
    with pytest.raises(AssertionError):
        small_ring(geometry)
    data = keep(Region.create(DATA, max(geometry.region_bytes, PAGE_BYTES), geometry))
    state = keep(Region.create(STATE, PAGE_BYTES))

    with pytest.raises(RingError, match="geometry is"):
        Consumer(
            Mapping(data.read_only, DATA, writable=False), Mapping(state.descriptor, STATE, writable=True)
        )


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(Geometry(1, 128, 3), id="one area of 16 bytes"),
        pytest.param(Geometry(4096, 128, 1), id="most areas"),
        pytest.param(Geometry(1, 64 * 1025, 4095), id="most entries"),
    ],
)
def test_the_smallest_and_largest_sizes_are_possible(geometry: Geometry, keep: Keep) -> None:
    memory = keep(small_ring(geometry))
    producer, consumer = produce(memory), consume(memory)

    assert publish(producer, bytes(geometry.data_bytes))
    assert drain_all(consumer) == [[bytes(geometry.data_bytes)]]


@pytest.mark.parametrize(
    ("data_bytes", "state_bytes", "generation", "text"),
    [
        (
            SMALL.region_bytes + 512,
            PAGE_BYTES,
            1,
            r"'ring data': geometry is \(4, 512, 8\), expected one that",
        ),
        (SMALL.region_bytes, 2 * PAGE_BYTES, 1, "'ring state': size is 8192, expected 4096"),
        (SMALL.region_bytes, PAGE_BYTES, 2, "'ring state': generation is 2, expected 1 as in the data"),
    ],
)
def test_two_regions_that_do_not_belong_together_are_refused(
    data_bytes: int, state_bytes: int, generation: int, text: str, keep: Keep
) -> None:
    data = keep(Region.create(DATA, data_bytes, SMALL))
    state = keep(Region.create(STATE, state_bytes, generation=generation))

    with pytest.raises(RingError, match=text):
        Producer(
            Mapping(data.descriptor, DATA, writable=True), Mapping(state.read_only, STATE, writable=False)
        )


# Filling and draining.


def test_what_is_published_comes_out_in_order_with_its_bytes(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)

    publish(producer, b"a", b"bc")
    publish(producer, b"def")

    assert consumer.pending() == 2
    assert [(entry, bytes(data)) for entry, data in consumer.entries()] == [
        (Entry(0, 1, 1, 7), b"a"),
        (Entry(1, 2, 1, 7), b"bc"),
    ]
    consumer.release()
    assert drain(consumer) == [b"def"]
    assert consumer.pending() == 0


def test_nothing_is_seen_before_it_is_published(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)

    assert producer.try_begin()
    assert producer.try_add(b"packet")

    assert (consumer.pending(), producer.waiting(), memory.fill()) == (0, 0, 0)


def test_a_full_ring_refuses_and_nothing_in_it_changes(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    for number in range(4):
        assert publish(producer, b"%d" % number)
    before = os.pread(memory.data.descriptor, SMALL.region_bytes, 0)

    assert not producer.try_begin()

    assert os.pread(memory.data.descriptor, SMALL.region_bytes, 0) == before
    assert (consumer.pending(), producer.waiting(), memory.fill()) == (4, 4, 4)
    assert drain(consumer) == [b"0"]
    assert publish(producer, b"4")
    assert not producer.try_begin()
    assert drain_all(consumer) == [[b"1"], [b"2"], [b"3"], [b"4"]]


def test_an_area_that_is_being_drained_is_not_free(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    for number in range(4):
        publish(producer, b"%d" % number)
    assert consumer.pending()
    entries = consumer.entries()
    _, borrowed = next(entries)

    assert not producer.try_begin()
    assert next(entries, None) is None
    assert not producer.try_begin()
    consumer.release()

    assert producer.try_begin()
    assert bytes(borrowed) == b"0"


def test_beginning_again_before_publishing_starts_the_area_anew(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    assert producer.try_begin()
    assert producer.try_add(b"thrown away")

    publish(producer, b"kept")

    assert drain_all(consumer) == [[b"kept"]]


def test_a_full_table_and_full_data_refuse_and_keep_what_is_there(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)

    assert producer.try_begin()
    assert [producer.try_add(b"x") for _ in range(9)] == [True] * 8 + [False]
    assert not producer.try_append(100, 1)
    producer.publish()
    assert producer.try_begin()
    assert producer.try_add(bytes(319))
    assert not producer.try_add(b"xy")
    assert producer.try_add(b"x")
    assert not producer.try_add(b"y")
    producer.publish()

    assert drain_all(consumer) == [[b"x"] * 8, [bytes(319), b"x"]]


def test_a_producer_may_lay_out_the_data_itself(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    assert producer.try_begin()
    assert len(producer.data) == 320

    producer.data[20:30] = b"0123456789"
    assert producer.try_append(24, 6, segment=2, row=65_535)
    assert producer.try_append(20, 4)
    assert producer.try_add(b"behind")
    producer.publish()

    assert consumer.pending()
    assert [(entry, bytes(data)) for entry, data in consumer.entries()] == [
        (Entry(24, 6, 2, 65_535), b"456789"),
        (Entry(20, 4, 0, 0), b"0123"),
        (Entry(30, 6, 0, 0), b"behind"),
    ]


@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda producer, _: producer.publish(), id="publish without begin"),
        pytest.param(lambda producer, _: producer.try_begin() and producer.publish(), id="publish nothing"),
        pytest.param(lambda producer, _: publish(producer, b"a") and producer.publish(), id="publish twice"),
        pytest.param(lambda producer, _: producer.data, id="data without begin"),
        pytest.param(lambda producer, _: producer.try_append(0, 1), id="append without begin"),
        pytest.param(
            lambda producer, _: producer.try_begin() and producer.try_append(0, 0), id="empty entry"
        ),
        pytest.param(
            lambda producer, _: producer.try_begin() and producer.try_append(1, 320),
            id="entry beyond the area",
        ),
        pytest.param(
            lambda producer, _: producer.try_begin() and producer.try_append(-1, 2),
            id="entry before the area",
        ),
        pytest.param(lambda _, consumer: next(consumer.entries()), id="entries without pending"),
        pytest.param(lambda _, consumer: consumer.release(), id="release of nothing"),
        pytest.param(
            lambda producer, consumer: (
                publish(producer, b"a", b"b"),
                consumer.pending(),
                next(consumer.entries()),
                consumer.release(),
            ),
            id="release before the last call returned",
        ),
    ],
)
def test_misuse_by_our_own_code_is_an_assertion(
    memory: RingMemory, misuse: Callable[[Producer, Consumer], object]
) -> None:
    with pytest.raises(AssertionError):
        misuse(produce(memory), consume(memory))


def test_each_side_needs_its_own_words_writable(memory: RingMemory, keep: Keep) -> None:
    lock = keep(LockFile.create()).lock(0)
    data = Mapping(memory.data.read_only, DATA, writable=False)
    state = Mapping(memory.state.read_only, STATE, writable=False)

    for attach in (
        lambda: Producer(data, state),
        lambda: Consumer(data, state),
        lambda: DrainLease(state, lock, WRITER),
    ):
        with pytest.raises(AssertionError):
            attach()


def test_a_consumer_without_a_lease_may_take_and_drop_like_one_with(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    publish(producer, b"x")

    assert consumer.try_take()
    assert consumer.drop()
    assert drain_all(consumer) == [[b"x"]]
    assert not consumer.drop()
    assert memory.holder() is None


def test_a_producer_cannot_store_the_consumers_words_nor_a_consumer_the_producers(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)

    with pytest.raises(TypeError, match="read-only"):
        producer._tail_words[TAIL] = 1
    with pytest.raises(TypeError, match="read-only"):
        consumer._words[HEAD] = 1
    publish(producer, b"packet")
    assert consumer.pending()
    assert next(consumer.entries())[1].readonly


# Against a deque.


@st.composite
def histories(draw: st.DrawFn) -> tuple[Geometry, list[list[bytes] | str]]:
    geometry = Geometry(draw(st.integers(1, 5)), draw(st.sampled_from([192, 512])), draw(st.integers(1, 7)))
    packets = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=9)
    step = st.one_of(packets, st.sampled_from(["drain", "drain", "producer", "consumer", "half"]))
    return geometry, draw(st.lists(step, max_size=40))


@pytest.mark.parametrize("recovery", Recovery)
@given(history=histories(), poison=st.booleans())
def test_any_history_of_filling_draining_and_successors_is_that_of_a_bounded_deque(
    recovery: Recovery, history: tuple[Geometry, list[list[bytes] | str]], poison: bool
) -> None:
    geometry, steps = history
    oracle: deque[list[bytes]] = deque()
    with contextlib.closing(small_ring(geometry)) as memory:
        producer, consumer = produce(memory, poison=poison), consume(memory, recovery)
        for step in steps:
            match step:
                case "producer":
                    producer.try_begin()
                    producer = produce(memory, poison=poison)
                case "consumer":
                    consumer = consume(memory, recovery)
                case "drain" if oracle:
                    assert consumer.pending()
                    assert drain(consumer) == oracle.popleft()
                case "half" if oracle:
                    # A successor finds an area of which its first entry was begun.
                    assert consumer.pending()
                    assert bytes(next(consumer.entries())[1]) == oracle[0][0]
                    consumer = consume(memory, recovery)
                    if recovery is Recovery.GO_ON_BEHIND:
                        del oracle[0][0]
                        assert consumer.pending()
                        assert drain(consumer) == oracle.popleft()
                        assert consumer.resumed == 1
                case list(packets):
                    begun = producer.try_begin()
                    assert begun == (len(oracle) < geometry.areas)
                    if begun:
                        taken = [packet for packet in packets if producer.try_add(packet, 1)]
                        room = geometry.data_bytes
                        kept: list[bytes] = []
                        for packet in packets:
                            if len(packet) <= room and len(kept) < geometry.entries_max:
                                kept.append(packet)
                                room -= len(packet)
                        assert taken == kept
                        if taken:
                            producer.publish()
                            oracle.append(taken)
            assert consumer.pending() == producer.waiting() == memory.fill() == len(oracle)


# Successors and deaths.


def test_a_successor_of_the_producer_starts_the_half_filled_area_again(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    publish(producer, b"published")
    producer.try_begin()
    producer.try_add(b"lost")

    successor = produce(memory)
    publish(successor, b"new")

    assert drain_all(consumer) == [[b"published"], [b"new"]]


def test_a_successor_on_the_seal_ring_sends_the_whole_area_again(memory: RingMemory) -> None:
    publish(produce(memory), b"a", b"b", b"c")
    consumer = consume(memory, Recovery.SEND_AGAIN)
    assert consumer.pending()
    entries = consumer.entries()
    assert [bytes(next(entries)[1]) for _ in range(3)] == [b"a", b"b", b"c"]

    successor = consume(memory, Recovery.SEND_AGAIN)

    assert drain_all(successor) == [[b"a", b"b", b"c"]]
    assert successor.resumed == 0


def test_progress_is_neither_stored_nor_looked_at_on_the_seal_ring(memory: RingMemory) -> None:
    publish(produce(memory), b"a", b"b")
    drained = consume(memory, Recovery.SEND_AGAIN)
    drained.pending()
    assert len([*drained.entries()]) == 2
    assert load_word(memory.state.descriptor, PROGRESS) == 0
    patch(memory, "progress", 1)

    assert drain_all(consume(memory, Recovery.SEND_AGAIN)) == [[b"a", b"b"]]


@pytest.mark.parametrize("begun", [0, 1, 2, 3])
def test_a_successor_on_the_open_ring_goes_on_behind_the_entry_that_was_begun(
    memory: RingMemory, begun: int
) -> None:
    producer = produce(memory)
    publish(producer, b"a", b"b", b"c")
    publish(producer, b"d")
    consumer = consume(memory, Recovery.GO_ON_BEHIND)
    assert consumer.pending()
    entries = consumer.entries()
    for _ in range(begun):
        next(entries)

    successor = consume(memory, Recovery.GO_ON_BEHIND)

    assert drain_all(successor) == [[b"a", b"b", b"c"][begun:], [b"d"]]
    assert successor.resumed == (begun > 0)


@pytest.mark.parametrize("begun", [1, 2])
def test_a_successor_on_the_open_ring_counts_the_packets_of_the_entry_it_passes_over(
    memory: RingMemory, begun: int
) -> None:
    producer = produce(memory)
    assert producer.try_begin()
    assert producer.try_add(b"a superpacket", segment=5)
    assert producer.try_add(b"another one", segment=7)
    producer.publish()
    consumer = consume(memory, Recovery.GO_ON_BEHIND)
    assert consumer.pending()
    entries = consumer.entries()
    for _ in range(begun):
        next(entries)

    successor = consume(memory, Recovery.GO_ON_BEHIND)

    assert drain_all(successor) == [[b"a superpacket", b"another one"][begun:]]
    assert successor.resumed == (5, 7)[begun - 1]


def test_a_released_area_leaves_no_trace_in_the_progress_of_the_next_one(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory, Recovery.GO_ON_BEHIND)
    publish(producer, b"a", b"b")
    drain_all(consumer)
    publish(producer, b"c", b"d")

    successor = consume(memory, Recovery.GO_ON_BEHIND)

    assert drain_all(successor) == [[b"c", b"d"]]
    assert successor.resumed == 0


# Contradictions.


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("head", 5, "head is 5, expected 0..4"),
        ("head", U64_MAX, f"head is {U64_MAX}, expected 0..4"),
        ("count", 0, "area 0: entries is 0, expected 1..8"),
        ("count", 9, "area 0: entries is 9, expected 1..8"),
        ("count", U64_MAX, f"area 0: entries is {U64_MAX}, expected 1..8"),
        ("number", 4, "area 0: number is 4, expected 0"),
        ("offset", 320, "area 0: offset is 320, expected below 320"),
        ("offset", 2**32 - 1, "area 0: offset is 4294967295, expected below 320"),
        ("offset", 312, "area 0: length is 9, expected 1..8 at 312"),
        ("length", 0, "area 0: length is 0, expected 1..320 at 0"),
        ("length", 321, "area 0: length is 321, expected 1..320 at 0"),
        ("length", 2**32 - 1, "area 0: length is 4294967295, expected 1..320 at 0"),
        ("segment", 0, "area 0: segment is 0, expected 1..9"),
        ("segment", 10, "area 0: segment is 10, expected 1..9"),
        ("row", 100, "area 0: row is 100, expected below 100"),
        ("progress", 0 << 12 | 3, r"progress is \(0, 3\), expected at most \(0, 2\)"),
        ("progress", 1 << 12, r"progress is \(1, 0\), expected at most \(0, 2\)"),
        ("data generation", 2, "generation is 2, expected 1"),
    ],
)
def test_a_consumer_refuses_every_impossible_number_and_delivers_nothing_of_its_area(
    memory: RingMemory, name: str, value: int, text: str
) -> None:
    publish(produce(memory), b"9 letters", b"more")
    consumer = consume(memory, Recovery.GO_ON_BEHIND, rows=100)
    patch(memory, name, value)

    with pytest.raises(RingError, match=f"shared memory 'ring .*': {text}"):
        assert consumer.pending() and not [*consumer.entries()]  # noqa: PT018


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", 4),
        ("count", 1),
        ("offset", 311),
        ("length", 320),
        ("segment", 9),
        ("row", 99),
        ("progress", 0 << 12 | 2),
    ],
)
def test_the_largest_possible_numbers_are_taken(memory: RingMemory, name: str, value: int) -> None:
    publish(produce(memory), b"9 letters", b"more")
    consumer = consume(memory, Recovery.GO_ON_BEHIND, rows=100)
    patch(memory, name, value)

    assert consumer.pending()
    assert drain(consumer) is not None


def test_in_a_ring_without_segments_the_third_number_is_anything(memory: RingMemory) -> None:
    publish(produce(memory), b"upcall")
    patch(memory, "segment", 2**32 - 1)

    consumer = consume(memory, segments=False)

    assert consumer.pending()
    assert next(consumer.entries())[0] == Entry(0, 6, 2**32 - 1, 7)


@pytest.mark.parametrize(
    ("published", "drained", "tail"),
    [
        pytest.param(2, 0, 3, id="beyond head"),
        pytest.param(2, 2, 1, id="backwards"),
        pytest.param(4, 2, U64_MAX, id="absurd"),
    ],
)
def test_a_producer_refuses_an_impossible_tail(
    memory: RingMemory, published: int, drained: int, tail: int
) -> None:
    producer, consumer = produce(memory), consume(memory)
    for _ in range(published):
        publish(producer, b"x")
    for _ in range(drained):
        consumer.pending()
        drain(consumer)
    assert producer.waiting() == published - drained
    patch(memory, "tail", tail)

    with pytest.raises(RingError, match=f"tail is {tail}, expected {drained}..{published}"):
        producer.try_begin()


def test_a_successor_refuses_cursors_that_are_too_far_apart(memory: RingMemory) -> None:
    patch(memory, "head", 5)

    with pytest.raises(RingError, match=r"tail is 0, expected 1\.\.5"):
        produce(memory)
    with pytest.raises(RingError, match=r"head is 5, expected 0\.\.4"):
        consume(memory)


def test_an_area_that_changes_while_it_is_borrowed_is_noticed(memory: RingMemory) -> None:
    publish(produce(memory), b"packet")
    consumer = consume(memory)
    assert consumer.pending()
    assert [*consumer.entries()]
    patch(memory, "number", 4)

    with pytest.raises(RingError, match="area 0: number is 4"):
        consumer.release()

    assert load_word(memory.state.descriptor, TAIL) == 0


@given(
    scribbles=st.lists(st.tuples(st.integers(0, 4096 + 2048 + 4096 - 8), st.binary(min_size=1, max_size=8)))
)
def test_whatever_is_scribbled_over_a_ring_comes_out_as_entries_within_it_or_as_ring_error(
    scribbles: list[tuple[int, bytes]],
) -> None:
    with contextlib.closing(small_ring()) as memory:
        producer, consumer = produce(memory), consume(memory, Recovery.GO_ON_BEHIND)
        for _ in range(4):
            publish(producer, b"some", b"packets")
        for offset, patched in scribbles:
            if offset < SMALL.region_bytes:
                os.pwrite(memory.data.descriptor, patched[: SMALL.region_bytes - offset], offset)
            else:
                os.pwrite(memory.state.descriptor, patched, offset - SMALL.region_bytes)
        with contextlib.suppress(RingError):
            for _ in range(consumer.pending()):
                for entry, data in consumer.entries():
                    assert 0 < entry.length == len(data)
                    assert entry.offset + entry.length <= SMALL.data_bytes
                    assert entry.row < 65_536
                consumer.release()
        with contextlib.suppress(RingError):
            publish(producer, b"x")
        for attach in (produce, consume):
            with contextlib.suppress(RingError):
                attach(memory)


def test_a_reset_ring_is_empty_and_of_a_new_generation_and_old_users_notice(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory, Recovery.GO_ON_BEHIND)
    for _ in range(3):
        publish(producer, b"a", b"b")
    drain(consumer) if consumer.pending() else None
    patch(memory, "lease", WRITER)
    os.pwrite(memory.data.descriptor, bytes(64), 0)  # even a header is restored

    memory.reset()

    assert (memory.fill(), memory.holder()) == (0, None)
    for use in (producer.try_begin, consumer.pending):
        with pytest.raises(RingError, match="generation is 2, expected 1"):
            use()
    successor, other = produce(memory), consume(memory, Recovery.GO_ON_BEHIND)
    publish(successor, b"c", b"d")
    assert drain_all(other) == [[b"c", b"d"]]
    assert other.resumed == 0


# Poison.


def area_bytes(memory: RingMemory, area: int) -> bytes:
    return os.pread(memory.data.descriptor, SMALL.area_bytes, PAGE_BYTES + area * SMALL.area_bytes)


POISONED = bytes([POISON]) * SMALL.area_bytes


def test_with_poison_a_released_area_is_overwritten_before_it_is_used_again_and_no_other_is(
    memory: RingMemory,
) -> None:
    producer, consumer = produce(memory, poison=True), consume(memory)
    for number in range(3):
        publish(producer, b"%d" % number)
    kept = [area_bytes(memory, area) for area in (1, 2)]
    assert consumer.pending()
    (_, borrowed), *_ = consumer.entries()
    assert bytes(borrowed) == b"0"

    producer.waiting()
    assert bytes(borrowed) == b"0"
    consumer.release()
    producer.waiting()

    assert bytes(borrowed) == bytes([POISON])
    assert [area_bytes(memory, area) == POISONED for area in range(4)] == [True, False, False, True]
    assert [area_bytes(memory, area) for area in (1, 2)] == kept
    assert drain_all(consumer) == [[b"1"], [b"2"]]


def test_a_successor_poisons_what_is_free_and_only_that(memory: RingMemory) -> None:
    producer = produce(memory)
    publish(producer, b"0")
    publish(producer, b"1")
    consumer = consume(memory)
    consumer.pending()
    drain(consumer)

    produce(memory, poison=True)

    assert [area_bytes(memory, area) == POISONED for area in range(4)] == [True, False, True, True]
    assert drain_all(consumer) == [[b"1"]]


def test_without_poison_a_released_area_keeps_its_bytes(memory: RingMemory) -> None:
    producer, consumer = produce(memory), consume(memory)
    publish(producer, b"0")
    before = area_bytes(memory, 0)

    drain_all(consumer)
    producer.waiting()

    assert area_bytes(memory, 0) == before


# Upkeep.


def test_closing_a_ring_gives_its_descriptors_back_and_a_failed_one_leaves_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def descriptors() -> int:
        return sum(1 for number in range(1024) if exists(number))

    before = descriptors()
    memory = small_ring()
    assert descriptors() == before + 4
    memory.close()
    assert descriptors() == before

    create = Region.create

    def only_data(layout: object, *rest: object, **named: object) -> Region:
        if layout is STATE:
            raise SystemCallError("no memory")
        return create(layout, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Region, "create", only_data)
    with pytest.raises(SystemCallError):
        small_ring()
    assert descriptors() == before


def exists(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_a_rings_regions_are_told_apart_by_name(memory: RingMemory) -> None:
    links = [Path(f"/proc/self/fd/{region.read_only}").readlink() for region in (memory.data, memory.state)]

    assert [str(link) for link in links] == [
        "/memfd:nebula-mp:ring data seal/0 (deleted)",
        "/memfd:nebula-mp:ring state seal/0 (deleted)",
    ]
