"""Who is found to be stuck, on a clock that is a number."""

from nebula_mp.newtypes import Seconds
from nebula_mp.workers.watch import INTERVAL, LOOKS, LOOKS_AT_START, Watch


class Looking:
    """A watch that is asked on time, of one process, number 1."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.watch.handle_start(1, 7)
        self.now = Seconds(5)

    def look(self, passes: int, start: int = 1, *, late_s: float = 0) -> bool:
        """Whether it is stuck."""
        self.now = Seconds(self.now + INTERVAL + late_s)
        return self.watch.look(self.now, {start: passes}) == (start,)


def moving() -> Looking:
    """One whose process has made a pass since it was first seen."""
    looking = Looking()
    assert not looking.look(7)
    assert not looking.look(8)
    return looking


def test_a_count_that_stands_still_for_two_seconds_is_stuck() -> None:
    looking = moving()

    found = [looking.look(8) for _ in range(LOOKS + 1)]

    assert found == [False] * LOOKS + [True]
    assert not looking.look(8)  # it was said, and is dying
    assert LOOKS * INTERVAL == 2


def test_any_pass_begins_the_time_anew() -> None:
    looking = moving()

    found = [looking.look(8 + number // LOOKS) for number in range(10 * LOOKS)]

    assert not any(found)


def test_looks_that_come_late_prove_nothing() -> None:
    looking = moving()

    found = [looking.look(8, late_s=3600) for _ in range(100)]

    assert not any(found)
    assert not looking.look(8)


def test_the_first_pass_may_take_longer() -> None:
    looking = Looking()
    assert not looking.look(7)

    found = [looking.look(7) for _ in range(LOOKS_AT_START + 1)]

    assert found == [False] * LOOKS_AT_START + [True]


def test_a_successor_is_not_blamed_for_the_time_of_its_predecessor() -> None:
    looking = moving()
    for _ in range(LOOKS):
        assert not looking.look(8)

    looking.watch.handle_start(2, 8)
    assert not looking.look(8, start=2)
    assert not looking.look(8, start=2)


def test_each_is_judged_by_itself() -> None:
    watch = Watch()
    for start in (1, 2):
        watch.handle_start(start, 0)
    found = [
        watch.look(Seconds(number * INTERVAL), {1: min(number, 1), 2: number}) for number in range(LOOKS + 3)
    ]

    assert found == [()] * (LOOKS + 2) + [(1,)]
