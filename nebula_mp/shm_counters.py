"""Numbers of a tunnel that only grow: send counter, replay window, packets and bytes.

Data flow: datapath (sealing) -> [SendCounters] -> memory;  datapath (opening) -> [ReceiveWindows] -> memory
           datapath -> [Traffic] -> memory -> [TrafficTotals] -> control
Knows that a row of the tunnel table is used by one tunnel after another, told apart by generation; knows
nothing of keys and packets, and of rings only how far each was sent. Offsets and rights: shm_table.
Source: docs/architecture.md, "Shared memory".

Who writes which word, and what is left when the writer is killed there:

| word               | writer                                  | killed before or after the store         |
|--------------------|-----------------------------------------|------------------------------------------|
| send: counter      | any sealer that has the row's lock      | nothing, or a gap that nobody ever uses  |
| send: generation,  | control, in this order, before the row  | the successor opens the row once more,   |
| sealers, counter   | is published and without the lock       | with the next generation                 |
| send: sealers      | any sealer that has the lock            | no matter: it only makes others look     |
| span: the row      | its worker, with the lock               | the batch counts as in flight until the  |
|                    |                                         | successor attaches                       |
| span: touched      | its worker, with the lock, before a row | no matter                                |
| window: state      | the reader that owns the tunnel         | see crypto.replay                        |
| window: generation | the same, after the state               | the next use starts the window again     |
| traffic: the row   | its worker, generation last             | the counts of a batch are lost           |

Control stores without the lock so that it never waits for a sealer that was stopped. A sealer that was past
its check of the generation then stores the former tunnel's counter over the new one's: a gap, since others
were kept out by its lock; what it got itself is for the former tunnel's key, where it is unused.

Not allowed, though tempting: to seal first and reserve later, or to give back what was not used (a successor
would use a counter twice); to give a window an earlier generation (all it has seen would be forgotten); to
let one process use the locks and another one atomic instructions on the same counters.

**Span.** Released peers accept only 1024 counters behind the newest, and a ring can hold more. One worker
sends in the order in which it sealed, so only another one's batches matter: a batch is not to end more than
SPAN_MAX above the oldest counter that another worker has sealed and not yet sent. So each worker publishes,
for each tunnel, that counter and the area of its ring with which the last of them goes; they are in flight
until the ring's consumer has released that area, which others see without its help. Counter and span are kept
under one lock: else a sealer could stand between taking a counter and saying so, while others overtake it.
A worker that is the only one overtakes nobody, and publishes nothing.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, NamedTuple, Self

from nebula_mp.crypto.replay import ReplayWindow, state_bytes
from nebula_mp.newtypes import Counter
from nebula_mp.shm import LockFile, Mapping, RecordLock
from nebula_mp.shm_ring import STATE, TAIL
from nebula_mp.shm_table import (
    LIVE,
    ROWS_AT,
    ROWS_AT_WORD,
    ROWS_MAX,
    SEND,
    SEND_ROW,
    SPAN,
    SPAN_ROW,
    TOUCHED,
    TRAFFIC_ROW,
    WINDOW_ROW,
    WORKERS_MAX,
    row_count,
)
from nebula_mp.wire.header import COUNTER_LIMIT, STAGE_2_COUNTER

SPAN_MAX: Final = 512

_SEND_WORDS: Final = SEND_ROW.size // 8
_COUNTER: Final = SEND_ROW.word("counter")
_SEND_GENERATION: Final = SEND_ROW.word("generation")
_SEALERS: Final = SEND_ROW.word("sealers")

_SPAN_WORDS: Final = SPAN_ROW.size // 8
_SPAN_GENERATION: Final = SPAN_ROW.word("generation")
_FIRST: Final = SPAN_ROW.word("first")
_UNTIL: Final = SPAN_ROW.word("until")

_WINDOW_WORDS: Final = WINDOW_ROW.size // 8
_WINDOW_GENERATION: Final = WINDOW_ROW.word("generation")
_WINDOW_AT: Final = WINDOW_ROW.fields["current"].offset

_TRAFFIC_WORDS: Final = TRAFFIC_ROW.size // 8
_TRAFFIC_GENERATION: Final = TRAFFIC_ROW.word("generation")
_PACKETS_IN, _BYTES_IN, _LAST_IN, _PACKETS_OUT, _BYTES_OUT, _LAST_OUT = (
    TRAFFIC_ROW.word(name)
    for name in ("packets_in", "bytes_in", "last_in_ms", "packets_out", "bytes_out", "last_out_ms")
)

_U64: Final = 2**64 - 1
_FLIGHTS_MAX: Final = 1024
_TRIES: Final = 50

assert _WINDOW_AT + state_bytes() == WINDOW_ROW.size


class Refusal(Enum):
    """Why there is no counter."""

    GONE = "gone"  # the row holds a later tunnel, or none any more
    EXHAUSTED = "exhausted"  # the counter has reached its end: only a handshake helps
    SPAN = "span"  # another worker is too far behind: leave the packets where they are for at most 1 ms
    BUSY = "busy"  # another process kept the lock for about 50 us: it was stopped or lost its core; later


class _Flight:
    """What this worker has sealed for one tunnel and perhaps not sent."""

    __slots__ = ("batches", "generation")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.batches: deque[tuple[int, int]] = deque()  # (area, its first counter), oldest first


class SendCounters:
    """Counters for whoever seals, each given out once, whatever dies.

    `worker` is the number of the worker that this process seals for; None for control, which sends at once
    what it seals. `spans` are the regions of all workers; only the own one is writable. `released(worker)`
    gives the number of areas that worker's seal ring has released since it was made. `published`, for a
    worker, is the number it has published: whatever its predecessor sealed for a later area is lost.
    """

    def __init__(
        self,
        send: Mapping,
        locks: LockFile,
        spans: Sequence[Mapping],
        worker: int | None,
        released: Callable[[int], int],
        *,
        published: int = 0,
    ) -> None:
        assert send.writable
        assert 0 < len(spans) <= WORKERS_MAX
        self.beyond_span = 0
        """Batches that were given counters although they end beyond the span; only grows."""
        self._rows = row_count(send, SEND_ROW, ROWS_MAX)
        self._send = send
        self._words = send.words
        self._file = locks
        self._locks: dict[int, RecordLock] = {}
        self._spans = tuple(spans)
        self._released = released
        self._worker = worker
        self._bit = 0 if worker is None else 1 << worker
        self._cells: memoryview | None = None
        self._flights: dict[int, _Flight] = {}
        for span in spans:
            if row_count(span, SPAN_ROW, ROWS_MAX) != self._rows:
                raise span.contradiction("number of rows", span.parameters[0], str(self._rows))
        # To say what is in flight takes a third of `reserve`.
        if worker is not None and len(spans) > 1:
            assert spans[worker].writable
            self._cells = spans[worker].words
            self._forget_unpublished(published)

    @classmethod
    def attach(
        cls,
        send: int,
        spans: Sequence[int],
        seal_states: Sequence[int],
        locks: int,
        *,
        worker: int | None = None,
        published: int = 0,
    ) -> Self:
        """Make one over descriptors; `seal_states` are the states of all workers' seal rings.

        Only `send` and the own span are writable. They are borrowed, but `locks` must stay open (see
        `shm.LockFile`). Raises RingError, SystemCallError.
        """
        states = [
            Mapping(each, STATE, writable=False, name=f"seal/{number}")
            for number, each in enumerate(seal_states)
        ]
        return cls(
            Mapping(send, SEND, writable=True),
            LockFile(locks),
            [
                Mapping(each, SPAN, writable=number == worker, name=str(number))
                for number, each in enumerate(spans)
            ],
            worker,
            lambda worker: states[worker].words[TAIL],
            published=published,
        )

    def open(self, row: int, generation: int) -> None:
        """Control only: start the counter of a new tunnel, before its row can be read."""
        word = ROWS_AT_WORD + row * _SEND_WORDS
        # In this order: `reserve` loads counter and sealers first and the generation afterwards.
        self._words[word + _SEND_GENERATION] = generation
        self._words[word + _SEALERS] = 0
        self._words[word + _COUNTER] = STAGE_2_COUNTER

    def close(self, row: int) -> None:
        """Control only: nothing more is sealed for the tunnel of this row."""
        self._words[ROWS_AT_WORD + row * _SEND_WORDS + _SEND_GENERATION] = 0

    def reserve(
        self, row: int, generation: int, count: int, area: int | None = None, *, regardless: bool = False
    ) -> Counter | Refusal:
        """Take `count` counters for the tunnel in `row`; gives the first. Call this before sealing with any.

        `area` is the number of the ring area the batch goes into, never lower than in the call before; None
        when it is sent at once. `regardless` of the span: after 1 ms of refusals for that reason.
        """
        assert count > 0
        lock = self._locks.get(row) or self._make_lock(row)
        if not lock.try_take() and not _try_again(lock):
            return Refusal.BUSY
        try:
            words = self._words
            word = ROWS_AT_WORD + row * _SEND_WORDS
            last = words[word + _COUNTER]
            sealers = words[word + _SEALERS]
            # After both: control stores the three in the other order and without the lock, so counter and
            # sealers belong to this generation, or to none that was ever read.
            if words[word + _SEND_GENERATION] != generation:
                return Refusal.GONE
            if last + count >= COUNTER_LIMIT:
                return Refusal.EXHAUSTED
            others = sealers & ~self._bit
            if others and self._is_beyond(row, generation, last + count, others):
                if not regardless:
                    return Refusal.SPAN
                self.beyond_span += 1
            if self._cells is not None and area is not None:
                self._publish(self._cells, row, generation, last + 1, area)
                if sealers == others:
                    words[word + _SEALERS] = sealers | self._bit
            # Last: who dies before this has told of counters that others will have, which does no harm.
            words[word + _COUNTER] = last + count
        finally:
            lock.drop()
        first: Counter = last + 1  # type: ignore[assignment]  # as in shm_peers
        return first

    def may_take(self, row: int, generation: int, count: int) -> bool:
        """Whether `reserve` would not refuse a batch of this size for its span: a guess, without the lock."""
        word = ROWS_AT_WORD + row * _SEND_WORDS
        others = self._words[word + _SEALERS] & ~self._bit
        return not others or not self._is_beyond(
            row, generation, self._words[word + _COUNTER] + count, others
        )

    def last(self, row: int, generation: int) -> Counter | None:
        """The last counter given out, for status and for when to shake hands again; None if gone."""
        word = ROWS_AT_WORD + row * _SEND_WORDS
        counter = Counter(self._words[word + _COUNTER])
        return counter if self._words[word + _SEND_GENERATION] == generation else None

    def _make_lock(self, row: int) -> RecordLock:
        assert 0 <= row < self._rows
        lock = self._locks[row] = self._file.lock(row)
        return lock

    def _is_beyond(self, row: int, generation: int, end: int, others: int) -> bool:
        """Whether a batch up to counter `end` overtakes what one of the `others` (bits) has not sent."""
        cell = ROWS_AT_WORD + row * _SPAN_WORDS
        while others:
            worker = (others & -others).bit_length() - 1
            others &= others - 1
            if worker >= len(self._spans):
                raise self._send.contradiction("sealer", worker, f"less than {len(self._spans)}")
            words = self._spans[worker].words
            if (
                words[cell + _SPAN_GENERATION] == generation
                and end > words[cell + _FIRST] + SPAN_MAX
                and words[LIVE]
                and words[cell + _UNTIL] > self._released(worker)
            ):
                return True
        return False

    def _publish(self, cells: memoryview, row: int, generation: int, first: int, area: int) -> None:
        """State the oldest counter of this tunnel that is in flight once this batch is sealed."""
        assert self._worker is not None
        cell = ROWS_AT_WORD + row * _SPAN_WORDS
        released = self._released(self._worker)
        flight = self._flights.get(row)
        if flight is None or flight.generation != generation:
            if len(self._flights) >= _FLIGHTS_MAX:
                self._flights.clear()  # what is published stays, and is adopted as a predecessor's would be
            flight = self._flights[row] = _Flight(generation)
            if cells[cell + _SPAN_GENERATION] == generation and cells[cell + _UNTIL] > released:
                # A predecessor's, of which only the oldest counter and the last area are known.
                flight.batches.append((cells[cell + _UNTIL] - 1, cells[cell + _FIRST]))
        batches = flight.batches
        while batches and batches[0][0] < released:
            batches.popleft()
        if not batches or batches[-1][0] != area:
            batches.append((area, first))
        if cells[TOUCHED] <= row:
            cells[TOUCHED] = row + 1
        if cells[cell + _SPAN_GENERATION] != generation:
            cells[cell + _UNTIL] = 0
            cells[cell + _SPAN_GENERATION] = generation
        cells[cell + _FIRST] = batches[0][1]
        cells[cell + _UNTIL] = area + 1

    def _forget_unpublished(self, published: int) -> None:
        """No batch of a predecessor can be in an area that it did not publish."""
        assert self._cells is not None
        cells = self._cells
        if cells[TOUCHED] > self._rows:
            raise self._send.contradiction("rows touched", cells[TOUCHED], f"at most {self._rows}")
        for cell in range(ROWS_AT_WORD, ROWS_AT_WORD + cells[TOUCHED] * _SPAN_WORDS, _SPAN_WORDS):
            cells[cell + _UNTIL] = min(cells[cell + _UNTIL], published)


def _try_again(lock: RecordLock) -> bool:
    for _ in range(_TRIES - 1):
        os.sched_yield()
        if lock.try_take():
            return True
    return False


class ReceiveWindows:
    """The replay windows, for the reader that owns the tunnels it asks for."""

    def __init__(self, windows: Mapping) -> None:
        assert windows.writable
        self._rows = row_count(windows, WINDOW_ROW, ROWS_MAX)
        self._data = windows.data
        self._words = windows.words
        self._windows: dict[int, ReplayWindow] = {}

    def get(self, row: int, generation: int) -> ReplayWindow | None:
        """The window of this tunnel, begun on first use; None when the row holds a later tunnel."""
        window = self._windows.get(row)
        if window is None:
            assert 0 <= row < self._rows
            at = ROWS_AT + row * WINDOW_ROW.size
            window = ReplayWindow.over(self._data[at + _WINDOW_AT : at + WINDOW_ROW.size])
            self._windows[row] = window
        word = ROWS_AT_WORD + row * _WINDOW_WORDS + _WINDOW_GENERATION
        begun = self._words[word]
        if begun != generation:
            if begun > generation:
                return None
            window.restart()
            self._words[word] = generation
        return window


class TunnelTraffic(NamedTuple):
    """What passed through a tunnel; times are of the monotonic clock in milliseconds, 0 for never."""

    packets_in: int
    bytes_in: int
    last_in_ms: int
    packets_out: int
    bytes_out: int
    last_out_ms: int


class Traffic:
    """One sealer's share of what passes through each tunnel; nobody else writes it."""

    def __init__(self, traffic: Mapping) -> None:
        assert traffic.writable
        self._rows = row_count(traffic, TRAFFIC_ROW, ROWS_MAX)
        self._words = traffic.words

    def received(self, row: int, generation: int, packets: int, size_bytes: int, now_ms: int) -> None:
        """Count packets that were opened."""
        self._add(row, generation, packets, size_bytes, now_ms, first=_PACKETS_IN)

    def sent(self, row: int, generation: int, packets: int, size_bytes: int, now_ms: int) -> None:
        """Count packets that were sealed."""
        self._add(row, generation, packets, size_bytes, now_ms, first=_PACKETS_OUT)

    def _add(
        self, row: int, generation: int, packets: int, size_bytes: int, now_ms: int, *, first: int
    ) -> None:
        assert 0 <= row < self._rows
        words = self._words
        cell = ROWS_AT_WORD + row * _TRAFFIC_WORDS
        if words[cell + _TRAFFIC_GENERATION] != generation:
            self._begin(cell, generation)
        cell += first
        words[cell] = words[cell] + packets & _U64
        words[cell + 1] = words[cell + 1] + size_bytes & _U64
        words[cell + 2] = now_ms

    def _begin(self, cell: int, generation: int) -> None:
        words = self._words
        words[cell + _TRAFFIC_GENERATION] = 0  # nobody sums a cell that is half cleared
        for word in range(cell + _TRAFFIC_GENERATION + 1, cell + _TRAFFIC_WORDS):
            words[word] = 0
        words[cell + _TRAFFIC_GENERATION] = generation


class TrafficTotals:
    """All sealers' shares together, for anyone who may read them."""

    def __init__(self, traffic: Sequence[Mapping]) -> None:
        self._rows = min(row_count(each, TRAFFIC_ROW, ROWS_MAX) for each in traffic)
        self._words = tuple(each.words for each in traffic)

    def get(self, row: int, generation: int) -> TunnelTraffic:
        """What passed through this tunnel; counts of a batch in hand may be in part."""
        assert 0 <= row < self._rows
        total = [0] * len(TunnelTraffic._fields)
        cell = ROWS_AT_WORD + row * _TRAFFIC_WORDS
        for words in self._words:
            # The generation before and after: its worker may begin with the row's next tunnel meanwhile.
            if words[cell + _TRAFFIC_GENERATION] != generation:
                continue
            share = words[cell + _PACKETS_IN : cell + _LAST_OUT + 1].tolist()
            if words[cell + _TRAFFIC_GENERATION] != generation:
                continue
            for number, value in enumerate(share):
                is_time = number % 3 == 2
                total[number] = max(total[number], value) if is_time else total[number] + value
        return TunnelTraffic(*total)
