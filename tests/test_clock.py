"""The clock module reads the clocks it claims to read."""

import time

import pytest

from nebula_mp import clock
from nebula_mp.newtypes import Instant, Seconds


def test_the_monotonic_clock_is_the_one_that_counts_suspend() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)

    read = clock.monotonic()

    assert before <= read <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_the_cpu_clock_is_the_processs_own() -> None:
    before = time.process_time_ns()

    read_us = clock.process_cpu_us()

    assert before // 1000 <= read_us <= time.process_time_ns() // 1000


def test_an_instant_holds_both_clocks_of_one_moment() -> None:
    before = time.time_ns()

    instant = clock.now()

    assert before <= instant.wall_ns <= time.time_ns()
    assert instant.wall_s == instant.wall_ns // 10**9
    assert instant.mono <= clock.monotonic()


def test_entropy_has_the_length_asked_for_and_does_not_repeat() -> None:
    assert len(clock.entropy(17)) == 17
    assert clock.entropy(32) != clock.entropy(32)


def test_the_service_manager_gets_the_clock_it_compares_with() -> None:
    before = time.monotonic_ns() // 1000

    stamp = clock.service_manager_us()

    assert before <= stamp <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("jump_s", [-3600, -2, 2, 86400])
def test_a_wall_clock_that_was_set_is_noticed_once_with_its_size(jump_s: int) -> None:
    watch = clock.JumpWatch(Instant(Seconds(100), 1_000 * 10**9))

    noticed = watch.poll(Instant(Seconds(101), (1_001 + jump_s) * 10**9))

    assert noticed == pytest.approx(jump_s)
    assert watch.poll(Instant(Seconds(102), (1_002 + jump_s) * 10**9)) is None


def test_suspend_and_small_corrections_are_no_jumps() -> None:
    watch = clock.JumpWatch(Instant(Seconds(100), 1_000 * 10**9))

    assert watch.poll(Instant(Seconds(7_300), 8_200 * 10**9)) is None
    assert watch.poll(Instant(Seconds(7_301), 8_201 * 10**9 + 900_000_000)) is None
