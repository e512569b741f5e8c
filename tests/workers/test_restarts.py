"""When who is started again: at once, later, never; on a clock that is a number."""

import pytest

from nebula_mp.newtypes import Seconds
from nebula_mp.workers.restarts import (
    DEATHS_MAX,
    LOST_AFTER,
    PAUSE_MAX,
    WINDOW,
    Again,
    Decision,
    GiveUp,
    Lost,
    Restarts,
)


class Story:
    """One process that dies again and again, and what was decided each time."""

    def __init__(self, *, can_be_spared: bool = False, is_vital: bool = True) -> None:
        self._restarts = Restarts()
        self._can_be_spared = can_be_spared
        self._is_vital = is_vital
        self.now = Seconds(1000)
        self._restarts.started("reader/0", self.now)

    def live(self, seconds: float) -> Decision:
        """Let it live for so long and die; it is started as decided."""
        self.now = Seconds(self.now + seconds)
        decision = self._restarts.ended(
            "reader/0", self.now, can_be_spared=self._can_be_spared, is_vital=self._is_vital
        )
        if isinstance(decision, Again):
            self.now = Seconds(self.now + decision.pause)
            self._restarts.started("reader/0", self.now)
        return decision


def test_the_first_deaths_are_answered_at_once() -> None:
    story = Story()

    assert [story.live(0.01) for _ in range(DEATHS_MAX - 1)] == [Again()] * (DEATHS_MAX - 1)


def test_a_worker_that_dies_five_times_in_ten_seconds_is_given_up_while_another_is_left() -> None:
    story = Story(can_be_spared=True)

    assert [story.live(0.01) for _ in range(DEATHS_MAX)] == [*[Again()] * (DEATHS_MAX - 1), GiveUp()]


def test_five_deaths_in_more_than_ten_seconds_are_no_reason() -> None:
    story = Story(can_be_spared=True)

    assert {story.live(WINDOW / (DEATHS_MAX - 1)) for _ in range(50)} == {Again()}


def test_whoever_cannot_be_spared_waits_twice_as_long_each_time_and_no_longer_than_the_limit() -> None:
    story = Story(is_vital=False)
    for _ in range(DEATHS_MAX - 1):
        story.live(0)

    first, *others = (story.live(0) for _ in range(8))

    assert first == Again(Seconds(0.1), keeps_failing=True)
    assert others == [Again(Seconds(pause)) for pause in (0.2, 0.4, 0.8, 1.6, 3.2, PAUSE_MAX, PAUSE_MAX)]


def test_a_good_run_ends_the_pauses() -> None:
    story = Story()
    for _ in range(DEATHS_MAX + 3):
        story.live(0)

    assert story.live(WINDOW) == Again()
    assert [story.live(0) for _ in range(DEATHS_MAX - 1)][-1] == Again(Seconds(0.1), keeps_failing=True)


def test_a_run_that_is_a_little_too_short_does_not_end_them() -> None:
    story = Story()
    for _ in range(DEATHS_MAX):
        story.live(0)

    assert story.live(WINDOW - 0.1) == Again(Seconds(0.2))


def test_half_a_minute_of_failing_is_the_end_of_what_is_vital() -> None:
    story = Story()
    for _ in range(DEATHS_MAX):
        decision = story.live(0)
    failing_since = story.now

    while isinstance(decision, Again):
        decision = story.live(0)

    assert decision == Lost()
    assert LOST_AFTER <= story.now - failing_since < LOST_AFTER + PAUSE_MAX


def test_services_are_started_for_ever() -> None:
    story = Story(is_vital=False)

    assert [story.live(0) for _ in range(100)][-1] == Again(PAUSE_MAX)


@pytest.mark.parametrize("other", ["writer/0", "reader/1"])
def test_the_deaths_of_others_do_not_count(other: str) -> None:
    restarts = Restarts()
    restarts.started("reader/0", Seconds(0))
    restarts.started(other, Seconds(0))

    for _ in range(DEATHS_MAX - 1):
        assert restarts.ended(other, Seconds(1), can_be_spared=True, is_vital=True) == Again()

    assert restarts.ended("reader/0", Seconds(1), can_be_spared=True, is_vital=True) == Again()
