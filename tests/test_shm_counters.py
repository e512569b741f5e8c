import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.errors import ReplayError, RingError
from nebula_mp.shm import LockFile
from nebula_mp.shm_counters import (
    SPAN_MAX,
    ReceiveWindows,
    Refusal,
    SendCounters,
    Traffic,
    TrafficTotals,
    TunnelTraffic,
)
from nebula_mp.shm_table import SEND, SPAN, TRAFFIC, WINDOWS, Tables
from nebula_mp.wire.header import COUNTER_LIMIT
from tests.support.forked import Child, children, shared_words, until
from tests.support.tables import ROWS, control_counters, read_only, small, writable
from tests.support.watched import Countdown, KilledError, Watched, nothing, watch

ROW = 5


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = small(3)
    yield tables
    tables.close()


class Rings:
    """How many areas of each worker's seal ring were published and released."""

    def __init__(self, workers: int = 3) -> None:
        self.published, self.released = [0] * workers, [0] * workers


def sealer(tables: Tables, worker: int, rings: Rings) -> SendCounters:
    spans = [
        writable(span, SPAN) if number == worker else read_only(span, SPAN)
        for number, span in enumerate(tables.spans)
    ]
    return SendCounters(
        writable(tables.send, SEND),
        tables.locks,
        spans,
        worker,
        lambda worker: rings.released[worker],
        published=rings.published[worker],
    )


def control(tables: Tables, rings: Rings) -> SendCounters:
    spans = [read_only(span, SPAN) for span in tables.spans]
    return SendCounters(
        writable(tables.send, SEND), tables.locks, spans, None, lambda worker: rings.released[worker]
    )


# ---- one after the other


def test_counters_go_on_behind_the_handshakes_whoever_takes_them(tables: Tables) -> None:
    rings = Rings()
    first, second, by_control = sealer(tables, 0, rings), sealer(tables, 1, rings), control(tables, rings)
    by_control.open(ROW, 1)

    taken = [
        first.reserve(ROW, 1, 50, 0),
        second.reserve(ROW, 1, 1, 0),
        by_control.reserve(ROW, 1, 1),
        first.reserve(ROW, 1, 2, 0),
        second.reserve(ROW, 1, 1, 0),
    ]

    assert taken == [3, 53, 54, 55, 57]
    assert by_control.last(ROW, 1) == 57
    assert by_control.last(ROW, 2) is None


def test_each_row_has_a_counter_of_its_own(tables: Tables) -> None:
    counters = control_counters(tables)
    for row in range(ROWS):
        counters.open(row, 1)
        assert counters.reserve(row, 1, row + 1) == 3

    assert [counters.last(row, 1) for row in range(ROWS)] == [3 + row for row in range(ROWS)]


@pytest.mark.parametrize(
    ("last", "count", "allowed"),
    [
        pytest.param(COUNTER_LIMIT - 2, 1, True, id="the last there is"),
        pytest.param(COUNTER_LIMIT - 1, 1, False, id="the limit"),
        pytest.param(COUNTER_LIMIT - 53, 52, True, id="a batch up to the limit"),
        pytest.param(COUNTER_LIMIT - 52, 52, False, id="a batch onto the limit"),
        pytest.param(2**64 - 1, 52, False, id="beyond what a u64 holds"),
    ],
)
def test_no_counter_at_or_beyond_the_limit_is_given_out(
    tables: Tables, last: int, count: int, allowed: bool
) -> None:
    counters = control_counters(tables)
    counters.open(ROW, 1)
    writable(tables.send, SEND).words[512 + ROW * 8] = last

    taken = counters.reserve(ROW, 1, count)

    assert taken == (last + 1 if allowed else Refusal.EXHAUSTED)
    assert counters.last(ROW, 1) == (last + count if allowed else last)


def test_a_lock_that_another_process_keeps_is_not_waited_for_and_ends_with_that_process(
    tables: Tables,
) -> None:
    counters, told = control_counters(tables), shared_words(1)
    counters.open(ROW, 1)

    def keep_the_lock() -> None:
        assert tables.locks.lock(ROW).try_take()
        told[0] = 1
        signal.pause()

    with children(keep_the_lock) as running:
        while not told[0]:
            time.sleep(0.001)
        begun = time.monotonic()
        refused = [counters.reserve(ROW, 1, 1) for _ in range(10)]
        took = time.monotonic() - begun
        counters.open(ROW + 1, 1)
        elsewhere = counters.reserve(ROW + 1, 1, 1)
        running.pop().kill()

        assert counters.reserve(ROW, 1, 1) == 3
    assert refused == [Refusal.BUSY] * 10
    assert took < 5  # as long as the lock is kept, if it waited
    assert elsewhere == 3


def test_the_lock_is_given_back_whatever_the_answer(tables: Tables) -> None:
    rings = Rings()
    slow, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)

    answers = [slow.reserve(ROW, 1, 1, 0), fast.reserve(ROW, 1, 1000, 0), fast.reserve(ROW, 2, 1, 0)]

    def take_the_lock() -> None:
        assert tables.locks.lock(ROW).try_take()

    Child(take_the_lock).wait()
    assert answers == [3, Refusal.SPAN, Refusal.GONE]


# ---- the span


def test_a_batch_may_end_512_above_what_another_worker_has_not_sent_and_no_further(tables: Tables) -> None:
    rings = Rings()
    slow, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    assert slow.reserve(ROW, 1, 10, 0) == 3

    assert fast.reserve(ROW, 1, SPAN_MAX - 9, 0) == 13  # ends at 515
    assert not fast.may_take(ROW, 1, 1)
    assert fast.reserve(ROW, 1, 1, 0) is Refusal.SPAN
    assert fast.beyond_span == 0

    rings.published[0] = rings.released[0] = 1
    assert fast.may_take(ROW, 1, 400)
    assert fast.reserve(ROW, 1, 400, 0) == 516


def test_a_single_worker_has_nobody_to_tell_what_it_has_in_flight() -> None:
    alone, rings = small(1), Rings(1)
    by_control = control(alone, rings)
    by_control.open(ROW, 1)

    assert sealer(alone, 0, rings).reserve(ROW, 1, SPAN_MAX, 0) == 3
    assert by_control.reserve(ROW, 1, SPAN_MAX) == 3 + SPAN_MAX  # though nothing has left the ring
    alone.close()


def test_a_worker_may_run_ahead_of_itself_and_of_workers_that_seal_for_other_tunnels(tables: Tables) -> None:
    rings = Rings()
    one, other = sealer(tables, 0, rings), sealer(tables, 1, rings)
    one.open(ROW, 1)
    one.open(ROW + 1, 1)
    assert other.reserve(ROW + 1, 1, 10, 0) == 3

    taken = [one.reserve(ROW, 1, 400, area) for area in range(10)]

    assert taken == [3 + 400 * area for area in range(10)]


def test_the_packets_of_a_worker_that_was_given_up_hold_nobody_back(tables: Tables) -> None:
    rings = Rings()
    lost, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    lost.reserve(ROW, 1, 1, 0)
    assert fast.reserve(ROW, 1, 1000, 0) is Refusal.SPAN

    tables.set_live(0, live=False)

    assert fast.reserve(ROW, 1, 1000, 0) == 4
    assert fast.beyond_span == 0


def test_after_a_millisecond_a_batch_goes_on_regardless_and_is_counted(tables: Tables) -> None:
    rings = Rings()
    slow, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    slow.reserve(ROW, 1, 1, 0)

    taken = fast.reserve(ROW, 1, 1000, 0, regardless=True)
    rings.published[0] = rings.released[0] = 1
    within = fast.reserve(ROW, 1, 10, 0, regardless=True)

    assert (taken, within) == (4, 1004)
    assert fast.beyond_span == 1


def test_controls_own_messages_keep_the_span_too(tables: Tables) -> None:
    rings = Rings()
    only, by_control = sealer(tables, 0, rings), control(tables, rings)
    by_control.open(ROW, 1)
    for area in range(20):
        only.reserve(ROW, 1, 50, area)

    assert by_control.reserve(ROW, 1, 1) is Refusal.SPAN

    rings.published[0] = rings.released[0] = 20
    assert by_control.reserve(ROW, 1, 1) == 1003


def test_what_a_former_tunnel_of_the_row_still_has_in_the_ring_holds_nobody_back(tables: Tables) -> None:
    rings = Rings()
    slow, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    slow.reserve(ROW, 1, 1, 0)

    fast.open(ROW, 2)

    assert fast.reserve(ROW, 2, 1000, 0) == 3


@pytest.mark.parametrize("restarted", [False, True])
def test_what_a_former_tunnel_of_the_row_still_has_in_the_ring_does_not_hide_what_comes_after(
    tables: Tables, restarted: bool
) -> None:
    rings = Rings()
    slow, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    fast.reserve(ROW, 1, 2000, 0)
    assert slow.reserve(ROW, 1, 1, 0, regardless=True) == 2003
    rings.published[0] = 1
    if restarted:
        slow = sealer(tables, 0, rings)

    fast.open(ROW, 2)
    assert slow.reserve(ROW, 2, 1, 1) == 3

    assert fast.reserve(ROW, 2, SPAN_MAX + 1, 1) is Refusal.SPAN


def test_many_batches_in_one_area_are_remembered_as_one(tables: Tables) -> None:
    worker = sealer(tables, 0, Rings())
    worker.open(ROW, 1)

    for _ in range(100):
        worker.reserve(ROW, 1, 1, 0)

    assert list(worker._flights[ROW].batches) == [(0, 3)]


def test_the_oldest_unsent_counter_follows_the_ring_without_the_worker(tables: Tables) -> None:
    rings = Rings()
    slow, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    for area in range(3):
        slow.reserve(ROW, 1, 100, area)  # 3, 103, 203
    rings.published[0] = rings.released[0] = 2

    # What slow published is from when it sealed last, so fast has to take 3 for its oldest ...
    assert fast.reserve(ROW, 1, SPAN_MAX - 298, 0) is Refusal.SPAN
    # ... until slow seals again, when it is 203.
    slow.reserve(ROW, 1, 100, 3)
    assert fast.reserve(ROW, 1, SPAN_MAX - 198, 0) is Refusal.SPAN
    assert fast.reserve(ROW, 1, SPAN_MAX - 199, 0) == 403
    rings.published[0] = rings.released[0] = 4
    assert fast.reserve(ROW, 1, 1000, 1) == 716


def test_a_successor_counts_what_its_predecessor_published_and_forgets_the_rest(tables: Tables) -> None:
    rings = Rings()
    doomed, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    doomed.reserve(ROW, 1, 10, 0)  # 3, published
    rings.published[0] = 1
    doomed.reserve(ROW, 1, 10, 1)  # 13, lost with it
    del doomed

    successor = sealer(tables, 0, rings)
    assert fast.reserve(ROW, 1, SPAN_MAX, 0) is Refusal.SPAN
    assert successor.reserve(ROW, 1, 10, 1) == 23
    assert fast.reserve(ROW, 1, SPAN_MAX - 28, 0) is Refusal.SPAN  # would end at 516
    rings.released[0] = 1  # now only what the successor sealed is in flight, but it has to say so
    rings.published[0] = 2
    successor.reserve(ROW, 1, 10, 2)
    assert fast.reserve(ROW, 1, SPAN_MAX - 19, 0) == 43
    assert fast.reserve(ROW, 1, 1, 0) is Refusal.SPAN


def test_a_batch_lost_with_a_worker_that_has_nothing_more_to_send_holds_nobody_back(tables: Tables) -> None:
    rings = Rings()
    doomed, fast = sealer(tables, 0, rings), sealer(tables, 1, rings)
    fast.open(ROW, 1)
    doomed.reserve(ROW, 1, 10, 0)
    del doomed
    assert fast.reserve(ROW, 1, 1000, 0) is Refusal.SPAN

    sealer(tables, 0, rings)

    assert fast.reserve(ROW, 1, 1000, 0) == 13


def test_a_worker_that_sealed_for_very_many_tunnels_remembers_only_those_in_flight() -> None:
    tables, rings = small(2, rows=3000), Rings(2)
    worker = sealer(tables, 0, rings)
    for row in range(3000):
        worker.open(row, 1)
        worker.reserve(row, 1, 1, row)
        rings.published[0] = rings.released[0] = row

    assert len(worker._flights) <= 1024
    other = sealer(tables, 1, rings)
    assert other.reserve(2999, 1, 1000, 0) is Refusal.SPAN
    assert other.reserve(2000, 1, 1000, 0) == 4
    tables.close()


def test_a_sealer_that_does_not_exist_is_a_contradiction(tables: Tables) -> None:
    counters = control_counters(tables)
    counters.open(ROW, 1)
    writable(tables.send, SEND).words[512 + ROW * 8 + 2] = 1 << 40

    with pytest.raises(RingError, match="sealer is 40, expected less than 3"):
        counters.reserve(ROW, 1, 1)
    assert control_counters(tables).last(ROW, 1) == 2


def test_a_span_that_says_it_has_more_rows_than_there_are_is_a_contradiction(tables: Tables) -> None:
    writable(tables.spans[0], SPAN).words[9] = ROWS + 1

    with pytest.raises(RingError, match="rows touched is 9"):
        sealer(tables, 0, Rings())


# ---- at any moment


def test_a_sealer_killed_at_any_store_leaves_a_gap_at_most_and_never_lowers_its_guard() -> None:
    at, killed = 0, True
    while killed:
        tables, rings = small(2), Rings(2)
        doomed, other = sealer(tables, 0, rings), sealer(tables, 1, rings)
        doomed.open(ROW, 4)
        doomed.reserve(ROW, 4, 7, 0)  # of a former tunnel
        doomed.open(ROW, 5)
        taken = [(3, 10)]
        assert doomed.reserve(ROW, 5, 10, 0) == 3
        rings.published[0] = 1
        watch(doomed, "_words _cells", load=nothing, store=Countdown(at))
        try:
            first = doomed.reserve(ROW, 5, 5, 1)
            killed = False
        except KilledError:
            pass
        else:
            assert not isinstance(first, Refusal)
            taken.append((first, 5))

        # Between the death and its successor, and after: 3..12 are in the ring, not sent.
        assert other.reserve(ROW, 5, SPAN_MAX, 0) is Refusal.SPAN
        successor = sealer(tables, 0, rings)
        assert other.reserve(ROW, 5, SPAN_MAX, 0) is Refusal.SPAN
        for counters, count, area in ((successor, 4, 1), (other, 6, 0), (successor, 1, 1)):
            first = counters.reserve(ROW, 5, count, area)
            assert not isinstance(first, Refusal)
            taken.append((first, count))
        assert other.reserve(ROW, 5, SPAN_MAX, 0) is Refusal.SPAN
        every = [counter for first, count in taken for counter in range(first, first + count)]
        assert len(set(every)) == len(every)
        rings.published[0] = rings.released[0] = 2
        assert not isinstance(other.reserve(ROW, 5, SPAN_MAX, 0), Refusal)
        tables.close()
        at += 1
    assert at > 3


def test_a_sealer_killed_at_any_store_of_a_tunnels_first_batch_does_not_hide_its_successors() -> None:
    at, killed = 0, True
    while killed:
        tables, rings = small(2), Rings(2)
        doomed, other = sealer(tables, 0, rings), sealer(tables, 1, rings)
        doomed.open(ROW, 4)
        control(tables, rings).reserve(ROW, 4, 2000)
        assert doomed.reserve(ROW, 4, 7, 0) == 2003
        rings.published[0] = 1
        doomed.open(ROW, 5)
        watch(doomed, "_words _cells", load=nothing, store=Countdown(at))
        try:
            doomed.reserve(ROW, 5, 10, 1)
            killed = False
        except KilledError:
            pass

        successor = sealer(tables, 0, rings)
        first = successor.reserve(ROW, 5, 1, 1)

        assert first == (3 if killed else 13)
        assert other.reserve(ROW, 5, SPAN_MAX + 1, 0) is Refusal.SPAN
        tables.close()
        at += 1
    assert at > 4


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_tunnel_replaced_at_any_moment_of_a_reservation_shares_no_counter_with_its_successor(
    kind: str,
) -> None:
    at, reached = 0, True
    results = set()
    while reached:
        tables, rings = small(2), Rings(2)
        slow, by_control = sealer(tables, 0, rings), control(tables, rings)
        by_control.open(ROW, 1)
        assert slow.reserve(ROW, 1, 10, 0) == 3

        def replace(by_control: SendCounters = by_control) -> None:
            by_control.close(ROW)
            by_control.open(ROW, 2)

        moment = Countdown(at, replace)
        hooks: dict[str, Callable[[], None]] = {"load": nothing, "store": nothing, kind: moment}
        watch(slow, "_words _cells", **hooks)

        got = slow.reserve(ROW, 1, 10, 0)

        reached = moment.reached
        assert got in (13, Refusal.GONE), at  # never a counter of the new tunnel under the old one's key
        results.add(got)
        assert slow.reserve(ROW, 1, 1, 0) is Refusal.GONE or not reached
        if reached:
            new = by_control.reserve(ROW, 2, 1)
            assert not isinstance(new, Refusal)
            assert new >= 3
            assert by_control.reserve(ROW, 2, 1) == new + 1
            # What the sealer may have told of its batch belongs to the former tunnel.
            assert by_control.reserve(ROW, 2, 1000) == new + 2
        tables.close()
        at += 1
    assert 13 in results
    assert at > 3


def test_a_tunnel_replaced_at_any_moment_of_a_reservation_lets_no_batch_pass_its_span() -> None:
    at, reached = 0, True
    while reached:
        tables, rings = small(2), Rings(2)
        slow, fast, by_control = sealer(tables, 0, rings), sealer(tables, 1, rings), control(tables, rings)
        by_control.open(ROW, 1)
        assert slow.reserve(ROW, 1, 1, 0) == 3  # in flight from here on

        def replace(by_control: SendCounters = by_control) -> None:
            by_control.close(ROW)
            by_control.open(ROW, 2)

        moment = Countdown(at, replace)
        watch(fast, "_words _cells", load=moment, store=nothing)

        assert fast.reserve(ROW, 1, SPAN_MAX + 1, 0) in (Refusal.SPAN, Refusal.GONE), at

        reached = moment.reached
        tables.close()
        at += 1
    assert at > 3


def test_between_any_two_stores_of_a_new_tunnels_start_the_former_one_gets_no_counter_again() -> None:
    at, reached = 0, True
    while reached:
        tables, rings = small(2), Rings(2)
        slow, by_control = sealer(tables, 0, rings), control(tables, rings)
        by_control.open(ROW, 1)
        assert slow.reserve(ROW, 1, 10, 0) == 3
        got: list[int | Refusal] = []
        moment = Countdown(at, lambda got=got, slow=slow: got.append(slow.reserve(ROW, 1, 1, 0)))  # type: ignore[misc]
        watch(by_control, "_words", load=nothing, store=moment)

        by_control.open(ROW, 2)

        reached = moment.reached
        assert got in ([], [13], [Refusal.GONE])
        assert slow.reserve(ROW, 1, 1, 0) is Refusal.GONE
        assert by_control.reserve(ROW, 2, 1) == 3
        tables.close()
        at += 1
    assert at > 3


@dataclass
class Batch:
    worker: int
    generation: int
    first: int
    count: int
    counted: bool

    @property
    def end(self) -> int:
        return self.first + self.count - 1


@dataclass
class Wire:
    """What the peer receives, and what it would say to that."""

    taken: set[tuple[int, int]] = field(default_factory=set)
    newest: dict[tuple[int, int], int] = field(default_factory=dict)  # by generation and worker

    def take(self, batch: Batch) -> None:
        every = {(batch.generation, counter) for counter in range(batch.first, batch.end + 1)}
        assert not every & self.taken, f"counter used twice: {batch}"
        self.taken |= every

    def send(self, batch: Batch) -> None:
        for (generation, worker), newest in self.newest.items():
            if generation == batch.generation and worker != batch.worker:
                assert newest <= batch.first + SPAN_MAX, f"{batch} comes after {newest} of {worker}"
        if not batch.counted:
            place = batch.generation, batch.worker
            self.newest[place] = max(self.newest.get(place, 0), batch.end)


class Simulation:
    """Workers with their rings, control, and a peer; any of them may do something next."""

    def __init__(self, workers: int) -> None:
        self.tables, self.rings, self.wire = small(workers), Rings(workers), Wire()
        self.sealers = [sealer(self.tables, worker, self.rings) for worker in range(workers)]
        self.control = control(self.tables, self.rings)
        self.areas: list[dict[int, list[Batch]]] = [{} for _ in range(workers)]
        self.generation = 1
        self.control.open(ROW, 1)

    def unsent(self, worker: int) -> bool:
        """Whether this worker may have something in flight; after a death any published area counts."""
        return bool(self.areas[worker])

    def seal(self, worker: int, count: int, *, regardless: bool = False, kill_at: int | None = None) -> None:
        counters, area = self.sealers[worker], self.rings.published[worker]
        if kill_at is not None:
            words = "_words _cells" if len(self.sealers) > 1 else "_words"  # a single one publishes nothing
            watch(counters, words, load=nothing, store=Countdown(kill_at))
        beyond = counters.beyond_span
        try:
            first = counters.reserve(ROW, self.generation, count, area, regardless=regardless)
        except KilledError:
            self.restart(worker)
            return
        if isinstance(first, Refusal):
            assert first is Refusal.SPAN
            others = [each for each in range(len(self.sealers)) if each != worker]
            assert any(self.unsent(each) for each in others), "held back for nothing"
        else:
            batch = Batch(worker, self.generation, first, count, counters.beyond_span > beyond)
            self.wire.take(batch)
            self.areas[worker].setdefault(area, []).append(batch)
        if kill_at is not None:
            self.restart(worker)

    def restart(self, worker: int) -> None:
        self.areas[worker].pop(self.rings.published[worker], None)
        self.sealers[worker] = sealer(self.tables, worker, self.rings)

    def publish(self, worker: int) -> None:
        self.areas[worker].setdefault(self.rings.published[worker], [])
        self.rings.published[worker] += 1

    def send(self, worker: int) -> None:
        released = self.rings.released[worker]
        if released < self.rings.published[worker]:
            for batch in self.areas[worker].pop(released):
                self.wire.send(batch)
            self.rings.released[worker] += 1

    def send_from_control(self, count: int) -> None:
        first = self.control.reserve(ROW, self.generation, count)
        if not isinstance(first, Refusal):
            batch = Batch(-1, self.generation, first, count, counted=False)
            self.wire.take(batch)
            self.wire.send(batch)

    def reopen(self) -> None:
        self.control.close(ROW)
        self.generation += 1
        self.control.open(ROW, self.generation)

    def do(self, action: str, worker: int, count: int, kill_at: int) -> None:
        match action:
            case "seal":
                self.seal(worker, count)
            case "regardless":
                self.seal(worker, count, regardless=True)
            case "killed":
                self.seal(worker, count, kill_at=kill_at)
            case "publish":
                self.publish(worker)
            case "send":
                self.send(worker)
            case "restart":
                self.restart(worker)
            case "control":
                self.send_from_control(count)
            case "reopen":
                self.reopen()


ACTIONS = (
    ["seal"] * 6 + ["publish"] * 3 + ["send"] * 3 + ["killed", "regardless", "restart", "control", "reopen"]
)


@settings(max_examples=400)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(
            st.sampled_from(ACTIONS),
            st.integers(0, 2),
            st.sampled_from([1, 2, 50, 128, 255, 256, 400, 511, 512, 513]),
            st.integers(0, 8),
        ),
        max_size=60,
    ),
)
def test_in_any_order_of_events_no_counter_is_used_twice_and_none_comes_512_behind_another_workers(
    workers: int, walk: list[tuple[str, int, int, int]]
) -> None:
    simulation = Simulation(workers)
    try:
        for action, worker, count, kill_at in walk:
            simulation.do(action, worker % workers, count, kill_at)
    finally:
        simulation.tables.close()


# ---- with real processes

WORKERS = 3
AREAS = 32
LOG = 400_000
# A worker's words: areas published, areas released, then three for each area: generation, first, count with
# bit 32 for a batch that was counted as beyond the span.
HEAD, TAIL, SLOTS = 0, 1, 2
RING_WORDS = SLOTS + 3 * AREAS
COUNTED = 1 << 32


def test_sealers_killed_at_random_use_no_counter_twice_and_keep_the_span() -> None:
    """Three processes seal for one tunnel and send, each in its order; a fourth replaces the tunnel."""
    tables = small(WORKERS)
    rings = shared_words(WORKERS * RING_WORDS)
    generation = shared_words(1)
    # Everything sealed and everything sent, in order; the first word of a log says how many.
    taken = [shared_words(1 + 3 * LOG) for _ in range(WORKERS)]
    wire = shared_words(1 + 5 * LOG)
    turns = LockFile.create()

    def worker_process(worker: int) -> None:
        choose = random.Random(time.monotonic_ns())
        base = worker * RING_WORDS
        counters = SendCounters(
            writable(tables.send, SEND),
            tables.locks,
            [
                writable(span, SPAN) if number == worker else read_only(span, SPAN)
                for number, span in enumerate(tables.spans)
            ],
            worker,
            lambda other: rings[other * RING_WORDS + TAIL],
            published=rings[base + HEAD],
        )
        turn, refused_since = turns.lock(0), None
        while True:
            head, tail = rings[base + HEAD], rings[base + TAIL]
            if head - tail < AREAS and choose.random() < 0.7:
                now, count = generation[0], choose.choice([1, 1, 30, 52])
                regardless = refused_since is not None and time.monotonic() - refused_since > 0.003
                beyond = counters.beyond_span
                first = counters.reserve(ROW, now, count, head, regardless=regardless)
                if isinstance(first, Refusal):
                    if first is Refusal.SPAN:
                        refused_since = refused_since or time.monotonic()
                    continue_sending = head > tail
                else:
                    refused_since, continue_sending = None, False
                    counted = COUNTED if counters.beyond_span > beyond else 0
                    append(taken[worker], now, first, count)
                    slot = base + SLOTS + head % AREAS * 3
                    rings[slot], rings[slot + 1], rings[slot + 2] = now, first, count | counted
                    rings[base + HEAD] = head + 1
                if not continue_sending:
                    continue
            for area in range(tail, min(head, tail + choose.randrange(1, 6))):
                slot = base + SLOTS + area % AREAS * 3
                with turn.hold():
                    append(wire, rings[slot], rings[slot + 1], rings[slot + 2], worker, area)
                rings[base + TAIL] = area + 1

    def control_process() -> None:
        counters = control_counters(tables)
        while True:
            time.sleep(0.2)
            counters.close(ROW)
            counters.open(ROW, generation[0] + 1)
            generation[0] += 1

    control_counters(tables).open(ROW, 1)
    generation[0] = 1
    kills, choose = 0, random.Random(1)
    with children(
        *(partial(worker_process, worker) for worker in range(WORKERS)), control_process
    ) as running:
        for _ in until(4):
            time.sleep(choose.random() * 0.01)
            victim = choose.randrange(WORKERS)
            running[victim].kill()
            running[victim] = running[victim].next()
            kills += 1
    tables.close()

    every = sorted((now, first, count) for log in taken for now, first, count in entries(log, 3))
    for (now, first, count), (later, following, _) in pairwise(every):
        assert now < later or first + count <= following, "counter used twice"
    sent: dict[tuple[int, int], int] = {}  # by generation and worker: the newest counter on the wire
    seen: dict[tuple[int, int], tuple[int, ...]] = {}  # what an area was sent with
    counted = 0
    for now, first, length, worker, area in entries(wire, 5):
        count = length & ~COUNTED
        # A successor sends the area its predecessor was at once more: the same bytes.
        again = seen.setdefault((worker, area), (now, first, length)) == (now, first, length)
        assert again, "an area was sent with other content"
        for (generation_, other), newest in sent.items():
            if generation_ == now and other != worker:
                assert newest <= first + SPAN_MAX
        if length & COUNTED:
            counted += 1
        else:
            sent[now, worker] = max(sent.get((now, worker), 0), first + count - 1)
    assert kills > 20
    assert len(sent) > 3 * WORKERS, "the tunnel was not replaced often enough"
    assert sum(1 for _ in entries(wire, 5)) > 5000
    print(f"{kills} kills, {len(every)} batches sealed, {wire[0]} sent, {counted} beyond the span")


def append(log: memoryview, *values: int) -> None:
    count = log[0]
    at = 1 + count * len(values)
    for number, value in enumerate(values):
        log[at + number] = value
    log[0] = count + 1  # last: who is killed before has written nothing


def entries(log: memoryview, width: int) -> Iterator[list[int]]:
    for number in range(log[0]):
        yield log[1 + number * width : 1 + (number + 1) * width].tolist()


# ---- windows


def is_fresh(windows: ReceiveWindows, generation: int, counter: int) -> bool:
    window = windows.get(ROW, generation)
    assert window is not None
    try:
        window.update(counter)
    except ReplayError:
        return False
    return True


def test_the_next_owner_of_a_tunnel_goes_on_with_its_window(tables: Tables) -> None:
    former = ReceiveWindows(writable(tables.windows, WINDOWS))
    assert [is_fresh(former, 1, counter) for counter in (1, 2, 3, 700, 3)] == [
        False,
        False,
        True,
        True,
        False,
    ]

    successor = ReceiveWindows(writable(tables.windows, WINDOWS))

    assert [is_fresh(successor, 1, counter) for counter in (3, 700, 4, 4)] == [False, False, True, False]


def test_each_tunnel_of_a_row_begins_a_window_and_an_earlier_one_gets_none(tables: Tables) -> None:
    windows = ReceiveWindows(writable(tables.windows, WINDOWS))
    assert is_fresh(windows, 1, 20_000)

    assert [is_fresh(windows, 2, counter) for counter in (0, 1, 2, 3, 20_000, 3)] == [False] * 3 + [
        True
    ] * 2 + [False]
    assert windows.get(ROW, 1) is None
    assert not is_fresh(windows, 2, 20_000)


def test_an_owner_killed_while_it_begins_a_window_leaves_one_that_is_begun_once_more() -> None:
    at, killed = 0, True
    while killed:
        tables = small()
        windows = ReceiveWindows(writable(tables.windows, WINDOWS))
        for counter in (*range(3, 40), 9000):
            assert is_fresh(windows, 1, counter)
        window = windows.get(ROW, 1)
        assert window is not None
        death = Countdown(at)
        watch(windows, "_words", load=nothing, store=death)
        watch(window, "_current _bits", load=nothing, store=death)
        try:
            windows.get(ROW, 2)
            killed = False
        except KilledError:
            pass

        successor = ReceiveWindows(writable(tables.windows, WINDOWS))

        assert [is_fresh(successor, 2, counter) for counter in (0, 1, 2, 3, 9000, 3)] == (
            [False] * 3 + [True] * 2 + [False]
        )
        assert successor.get(ROW, 1) is None
        tables.close()
        at += 1
    assert at > 3


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 12_000), st.booleans()), max_size=60
    )
)
def test_any_walk_of_tunnels_and_counters_is_accepted_as_by_sets(
    walk: list[tuple[int, int, int, bool]],
) -> None:
    tables = small()
    windows = ReceiveWindows(writable(tables.windows, WINDOWS))
    seen: dict[int, tuple[int, set[int]]] = {}
    for row, generation, counter, restarts in walk:
        if restarts:
            windows = ReceiveWindows(writable(tables.windows, WINDOWS))
        latest, received = seen.get(row, (0, set()))
        if generation + 1 > latest:
            latest, received = generation + 1, {0, 1, 2}
            seen[row] = latest, received
        window = windows.get(row, generation + 1)
        assert (window is None) is (generation + 1 < latest)
        if window is not None:
            expected = counter not in received and counter > max(received) - 8192
            try:
                window.update(counter)
                accepted = True
            except ReplayError:
                accepted = False
            assert accepted is expected
            if accepted:
                received.add(counter)
    tables.close()


# ---- traffic


def test_traffic_of_a_tunnel_is_the_sum_of_what_all_sealers_counted(tables: Tables) -> None:
    shares = [Traffic(writable(each, TRAFFIC)) for each in tables.traffic]
    totals = TrafficTotals([read_only(each, TRAFFIC) for each in tables.traffic])

    shares[0].sent(ROW, 1, 10, 1000, 5_000)
    shares[3].sent(ROW, 1, 1, 100, 4_000)
    shares[1].received(ROW, 1, 2, 200, 6_000)
    shares[1].received(ROW, 1, 3, 300, 7_000)
    shares[1].received(ROW + 1, 1, 99, 99, 99)

    assert totals.get(ROW, 1) == TunnelTraffic(5, 500, 7_000, 11, 1100, 5_000)
    assert totals.get(ROW, 2) == TunnelTraffic(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("at", range(9))
def test_what_a_sealer_killed_at_any_store_leaves_is_never_counted_for_the_next_tunnel(at: int) -> None:
    tables = small(1)
    share, other = (Traffic(writable(each, TRAFFIC)) for each in tables.traffic)
    totals = TrafficTotals([read_only(each, TRAFFIC) for each in tables.traffic])
    share.sent(ROW, 1, 10, 1000, 5_000)
    share.received(ROW, 1, 20, 2000, 6_000)
    other.sent(ROW, 2, 1, 100, 7_000)
    death = Countdown(at)
    watch(share, "_words", load=nothing, store=death)

    with pytest.raises(KilledError):
        share.sent(ROW, 2, 5, 500, 8_000)

    seen = totals.get(ROW, 2)
    assert seen[:3] == (0, 0, 0)
    assert (seen.packets_out, seen.bytes_out) in {(1, 100), (6, 100), (6, 600)}
    Traffic(writable(tables.traffic[0], TRAFFIC)).sent(ROW, 2, 5, 500, 9_000)
    again = totals.get(ROW, 2)
    assert again[:3] == (0, 0, 0)
    assert again.last_out_ms == 9_000
    assert again.packets_out - seen.packets_out == 5
    tables.close()


def test_between_any_two_stores_of_a_sealer_a_former_tunnel_is_counted_whole_or_not_at_all() -> None:
    at, reached = 0, True
    while reached:
        tables = small(1)
        share, other = (Traffic(writable(each, TRAFFIC)) for each in tables.traffic)
        totals = TrafficTotals([read_only(each, TRAFFIC) for each in tables.traffic])
        share.sent(ROW, 1, 10, 1000, 5_000)
        share.received(ROW, 1, 20, 2000, 6_000)
        other.sent(ROW, 1, 1, 1, 1)
        seen: list[TunnelTraffic] = []
        moment = Countdown(at, lambda seen=seen, totals=totals: seen.append(totals.get(ROW, 1)))  # type: ignore[misc]
        watch(share, "_words", load=nothing, store=moment)

        share.sent(ROW, 2, 5, 500, 7_000)

        reached = moment.reached
        assert {*seen} <= {TunnelTraffic(20, 2000, 6000, 11, 1001, 5000), TunnelTraffic(0, 0, 0, 1, 1, 1)}
        tables.close()
        at += 1
    assert at > 8


@pytest.mark.parametrize("asked", [1, 2])
def test_between_any_two_loads_of_a_sum_a_sealer_may_go_on_to_the_next_tunnel(asked: int) -> None:
    at, reached = 0, True
    while reached:
        tables = small(1)
        share, other = (Traffic(writable(each, TRAFFIC)) for each in tables.traffic)
        totals = TrafficTotals([read_only(each, TRAFFIC) for each in tables.traffic])
        share.sent(ROW, 1, 10, 1000, 5_000)
        other.sent(ROW, 1, 1, 1, 1)
        moment = Countdown(at, partial(share.received, ROW, 2, 5, 500, 7_000))
        views = [Watched(words, load=moment, store=nothing) for words in totals._words]
        totals._words = tuple(views)  # type: ignore[arg-type]

        seen = totals.get(ROW, asked)

        reached = moment.reached
        assert (
            seen
            in {
                1: {TunnelTraffic(0, 0, 0, 11, 1001, 5000), TunnelTraffic(0, 0, 0, 1, 1, 1)},
                2: {TunnelTraffic(0, 0, 0, 0, 0, 0), TunnelTraffic(5, 500, 7000, 0, 0, 0)},
            }[asked]
        )
        tables.close()
        at += 1
    assert at > 2


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # sealer
            st.booleans(),
            st.integers(0, 1),  # row
            st.integers(0, 3),  # how much newer the tunnel is
            st.integers(1, 100),
        ),
        max_size=40,
    )
)
def test_any_walk_of_counts_sums_up_as_in_a_dictionary(walk: list[tuple[int, bool, int, int, int]]) -> None:
    tables = small(2)
    shares = [Traffic(writable(each, TRAFFIC)) for each in tables.traffic]
    totals = TrafficTotals([read_only(each, TRAFFIC) for each in tables.traffic])
    generations = [1, 1]
    model: dict[tuple[int, int], list[int]] = {}
    for now, (sealer_, inbound, row, newer, packets) in enumerate(walk):
        if newer == 3:
            generations[row] += 1
        add = shares[sealer_].received if inbound else shares[sealer_].sent
        add(row, generations[row], packets, packets * 10, now)
        sums = model.setdefault((row, generations[row]), [0] * 6)
        at = 0 if inbound else 3
        sums[at] += packets
        sums[at + 1] += packets * 10
        sums[at + 2] = now
        assert totals.get(row, generations[row]) == tuple(sums)
    tables.close()
