"""The loop's one timer."""

import asyncio

import uvloop

from nebula_mp import clock
from nebula_mp.newtypes import Seconds
from nebula_mp.workers.loop import Alarm, run


def test_the_loop_is_uvloop_and_its_policy_is_left_alone() -> None:
    async def main() -> int:
        return int(isinstance(asyncio.get_running_loop(), uvloop.Loop))

    assert run(main) == 1
    assert not isinstance(asyncio.get_event_loop_policy(), uvloop.EventLoopPolicy)


def rings(*dues: float | None, for_s: float) -> list[float]:
    """When an alarm armed for these times (seconds from the start) rang, until `for_s`."""
    rung: list[float] = []

    async def main() -> int:
        began = clock.monotonic()
        alarm = Alarm(lambda: rung.append(clock.monotonic() - began))
        for due in dues:
            alarm.arm(None if due is None else Seconds(began + due))
        await asyncio.sleep(for_s)
        alarm.cancel()
        await asyncio.sleep(0)
        return 0

    run(main)
    return rung


def test_it_rings_once_when_it_is_due_and_not_before() -> None:
    (at,) = rings(0.05, for_s=0.3)

    assert at >= 0.045  # whole milliseconds of a clock that is read once per round


def test_arming_for_earlier_moves_it_and_for_later_does_not() -> None:
    (earlier,) = rings(0.6, 0.05, for_s=0.4)
    (later,) = rings(0.05, 0.6, for_s=0.4)

    assert 0.045 <= earlier < 0.4
    assert 0.045 <= later < 0.4


def test_what_is_overdue_rings_at_once() -> None:
    assert len(rings(-5, for_s=0.1)) == 1


def test_no_sleep_is_longer_than_a_second_so_that_time_spent_suspended_counts() -> None:
    (at,) = rings(3600, for_s=1.3)

    assert 0.995 <= at < 1.3


def test_a_cancelled_alarm_is_silent() -> None:
    assert rings(0.9, for_s=0.05) == []
