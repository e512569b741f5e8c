import operator
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nebula_mp.crypto.replay import ReplayWindow, state_bytes
from nebula_mp.errors import ReplayError
from tests.support import vectors
from tests.support.vectors import Vector
from tests.support.watched import Countdown, KilledError, nothing, watch

MAX = 2**64 - 1
WIDTHS = [8, 16, 128, 8192]


class Oracle:
    """The same window as a plain set of all counters ever seen."""

    def __init__(self, width: int) -> None:
        self.width, self.current, self.seen = width, 0, {0}

    def accepts(self, counter: int) -> bool:
        return counter not in self.seen and counter > self.current - self.width

    def update(self, counter: int) -> None:
        self.seen.add(counter)
        self.current = max(self.current, counter)


def is_fresh(window: ReplayWindow, counter: int) -> bool:
    try:
        window.check(counter)
    except ReplayError:
        return False
    return True


def update(window: ReplayWindow, counter: int) -> bool:
    try:
        window.update(counter)
    except ReplayError:
        return False
    return True


@pytest.mark.parametrize("trace", vectors.load("replay"), ids=range(4))
def test_recorded_traces_are_accepted_and_refused_as_nebula_does(trace: Vector) -> None:
    assert trace["start"] == "counters 1 and 2 already marked"
    window = ReplayWindow.after_handshake(trace["window"])

    for number, step in enumerate(trace["steps"]):
        counter = int(step["counter"])

        assert is_fresh(window, counter) is step["accepted"], f"step {number}: check {counter}"
        assert update(window, counter) is step["accepted"], f"step {number}: update {counter}"


def test_a_new_window_refuses_counter_0_and_one_after_a_handshake_1_and_2_as_well() -> None:
    new, started = ReplayWindow(), ReplayWindow.after_handshake()

    assert [is_fresh(new, counter) for counter in range(4)] == [False, True, True, True]
    assert [is_fresh(started, counter) for counter in range(4)] == [False, False, False, True]
    assert (new.current, started.current) == (0, 2)


@st.composite
def walks(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Counters near the highest one so far, near both ends of the window, and far ahead."""
    width = draw(st.sampled_from(WIDTHS))
    places = [0, -2 * width, -width, width, 2 * width, 3 * width, 2**32, 2**63]
    jump = st.one_of(
        st.integers(-width, width),
        st.builds(operator.add, st.sampled_from(places), st.integers(-3, 3)),
    )
    current = 0
    counters = []
    for each in draw(st.lists(jump, max_size=60)):
        counter = min(max(current + each, 0), MAX)
        counters.append(counter)
        current = max(current, counter)
    return width, counters


@given(walks())
@example((8192, [0, 1, 8191, 8192, 8193, 1, 2, MAX, MAX, MAX - 8191, MAX - 8192, 0]))
@example((8192, [1, 8192, 16383, 24576, 32768, 16385, 24577, 32767, 24576]))
@example((8, [7, 8, 15, 16, 1, 9, 24, 17, 16, 40, 33, 32]))
def test_any_walk_is_accepted_and_refused_as_by_a_set_of_all_counters(walk: tuple[int, list[int]]) -> None:
    width, counters = walk
    window, oracle = ReplayWindow(width), Oracle(width)

    for counter in counters:
        expected = oracle.accepts(counter)
        assert is_fresh(window, counter) is expected, counter
        assert update(window, counter) is expected, counter
        if expected:
            oracle.update(counter)
        assert window.current == oracle.current
    low = max(oracle.current - 2 * min(width, 64) - 2, 0)
    for counter in {
        *range(low, oracle.current + 4),
        *range(max(oracle.current - width - 3, 0), oracle.current - width + 4),
    }:
        assert is_fresh(window, counter) is oracle.accepts(counter), counter


@pytest.mark.parametrize("start", [*range(40), 1000, 1001, 1007, 1008])
def test_after_every_jump_from_every_place_in_the_ring_each_counter_is_as_in_the_set(start: int) -> None:
    width = 16
    for jump in range(1, 5 * width):
        window, oracle = ReplayWindow(width), Oracle(width)
        # Everything received so far, so that a bit the jump forgets to clear shows.
        for counter in [*range(1, start + 1), start + jump]:
            window.update(counter)
            oracle.update(counter)

        for counter in range(start + jump + 2):
            assert is_fresh(window, counter) is oracle.accepts(counter), (start, jump, counter)


@pytest.mark.parametrize("jump", [8191, 8192, 8193, 16383, 16384, 16385])
@pytest.mark.parametrize("start", [2, 8191, 8192, 8193, 100_001])
def test_jumps_of_about_the_size_of_the_window_leave_exactly_the_window_open(start: int, jump: int) -> None:
    window = ReplayWindow()
    for counter in range(max(start - 9000, 1), start + 1):
        window.update(counter)

    window.update(start + jump)

    top, limit = start + jump, start + jump - 8192
    assert not is_fresh(window, top)
    assert is_fresh(window, top + 1)
    assert is_fresh(window, top - 1)
    assert not is_fresh(window, limit - 1)
    assert not is_fresh(window, limit)
    assert is_fresh(window, limit + 1) is (limit + 1 > start)


def test_the_largest_counter_is_accepted_once() -> None:
    window = ReplayWindow()

    window.update(MAX)

    assert not is_fresh(window, MAX)
    assert [is_fresh(window, MAX - back) for back in (1, 8191, 8192)] == [True, True, False]


@pytest.mark.parametrize(
    ("counter", "text"),
    [
        pytest.param(20_000, "received before", id="the highest"),
        pytest.param(19_999, "received before", id="within the window"),
        pytest.param(11_808, "behind the window, which ends at 20000", id="just behind it"),
    ],
)
def test_a_refused_counter_changes_nothing_and_the_error_says_which_rule_it_broke(
    counter: int, text: str
) -> None:
    window = ReplayWindow()
    window.update(20_000)
    window.update(19_999)

    for ask in (window.check, window.update, window.update):
        with pytest.raises(ReplayError, match=text):
            ask(counter)

    assert window.current == 20_000
    assert is_fresh(window, 11_809)
    assert is_fresh(window, 20_001)


def test_a_check_marks_nothing() -> None:
    window = ReplayWindow()

    window.check(5)
    window.check(5)
    window.update(5)

    assert not is_fresh(window, 5)
    assert is_fresh(window, 4)


def shared_window(width: int) -> tuple[memoryview, ReplayWindow]:
    state = memoryview(bytearray(state_bytes(width)))
    window = ReplayWindow.over(state, width)
    window.restart()
    return state, window


@given(walks())
def test_a_window_that_another_process_goes_on_with_is_the_same_window(walk: tuple[int, list[int]]) -> None:
    width, counters = walk
    state, _ = shared_window(width)
    alone = ReplayWindow.after_handshake(width)

    for counter in counters:
        successor = ReplayWindow.over(state, width)
        assert is_fresh(successor, counter) is is_fresh(alone, counter), counter
        assert update(successor, counter) is update(alone, counter), counter
        assert successor.current == alone.current


def test_a_window_that_is_begun_again_is_as_after_a_handshake() -> None:
    _, window = shared_window(16)
    for counter in (3, 40, 41, 100):
        window.update(counter)

    window.restart()

    assert window.current == 2
    assert [is_fresh(window, counter) for counter in range(120)] == [False] * 3 + [True] * 117


# Jumps within a byte, to the next, over a part of the ring, over its end, past the window and past the ring.
@pytest.mark.parametrize("jump", [-9, -1, 1, 5, 8, 15, 16, 17, 24, 31, 32, 33, 500])
@pytest.mark.parametrize("start", [12, 13, 23, 31, 32, 100])
def test_a_window_whose_process_is_killed_at_any_store_accepts_no_counter_again(
    start: int, jump: int
) -> None:
    width, at, killed = 16, 0, True
    while killed:
        state, window = shared_window(width)
        received = {0, 1, 2, *(each for each in range(3, start + 1) if each != start - 9)}
        for counter in sorted(received - {0, 1, 2}):
            window.update(counter)
        watch(window, "_current _bits", load=nothing, store=Countdown(at))
        try:
            update(window, start + jump)
            killed = False
        except KilledError:
            pass

        successor = ReplayWindow.over(state, width)

        assert not any(is_fresh(successor, counter) for counter in received), at
        assert is_fresh(successor, successor.current + 1)
        at += 1
    assert at > 1 or jump == -1  # which stores nothing: it was received before


@given(walks(), st.lists(st.integers(1, 8192), min_size=60, max_size=60))
@example((8192, [16_370, 16_370, 3]), [100] * 60)
@example((8, [13, 16, 20]), [8] * 60)
def test_a_range_is_accepted_as_its_counters_one_by_one_and_refused_as_a_whole(
    walk: tuple[int, list[int]], lengths: list[int]
) -> None:
    width, firsts = walk
    ranges, single = shared_window(width)[1], shared_window(width)[1]

    for first, length in zip(firsts, lengths, strict=False):
        count = min(length % (width + 1) or 1, MAX + 1 - first)
        members = range(first, first + count)
        expected = all(is_fresh(single, counter) for counter in members)
        before = bytes(ranges._bits), ranges.current

        for ask in (ranges.check_range, ranges.update_range):
            if expected:
                ask(first, count)
            else:
                with pytest.raises(ReplayError):
                    ask(first, count)
                assert (bytes(ranges._bits), ranges.current) == before
        if expected:
            for counter in members:
                single.update(counter)

        assert ranges.current == single.current
        assert bytes(ranges._bits) == bytes(single._bits)


@pytest.mark.parametrize("count", [1, 2, 9, 16])
@pytest.mark.parametrize("jump", [-9, 1, 5, 8, 15, 16, 17, 31, 33, 500])
@pytest.mark.parametrize("start", [12, 23, 31, 100])
def test_a_window_whose_process_is_killed_in_a_range_accepts_no_earlier_counter_again(
    start: int, jump: int, count: int
) -> None:
    width, at, killed = 16, 0, True
    while killed:
        state, window = shared_window(width)
        received = {0, 1, 2, *(each for each in range(3, start + 1) if each != start - 9)}
        for counter in sorted(received - {0, 1, 2}):
            window.update(counter)
        watch(window, "_current _bits", load=nothing, store=Countdown(at))
        try:
            with suppress(ReplayError):
                window.update_range(start + jump, count)
            killed = False
        except KilledError:
            pass

        successor = ReplayWindow.over(state, width)

        assert not any(is_fresh(successor, counter) for counter in received), at
        assert is_fresh(successor, successor.current + 1)
        at += 1
    assert at > 1 or jump < 0  # which stores nothing: some of it was received before
