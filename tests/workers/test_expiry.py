"""When the operator hears that our certificate ends."""

from nebula_mp.config.model import LogLevel
from nebula_mp.workers.expiry import ExpiryWatch

DAY = 86_400
END = 1_000 * DAY


def test_thirty_seven_and_one_day_before_and_at_the_end_and_never_twice() -> None:
    watch = ExpiryWatch("host", END)
    said = {}

    for half_day in range(-80, 4):
        event = watch.poll(END + half_day * DAY // 2 + 1)
        if event is not None:
            said[half_day / 2] = (event.level, event.message)

    soon = (LogLevel.WARN, "own certificate expires soon")
    assert said == {-30.0: soon, -7.0: soon, -1.0: soon, 0.0: (LogLevel.ERROR, "own certificate expired")}


def test_a_gateway_started_late_hears_the_nearest_notice_only() -> None:
    watch = ExpiryWatch("host", END)

    first = watch.poll(END - 3 * DAY)

    assert first is not None
    assert first.fields == {"certName": "host", "notAfter": END, "daysLeft": 3}
    assert watch.poll(END - 2 * DAY) is None


def test_a_clock_set_back_repeats_nothing() -> None:
    watch = ExpiryWatch("host", END)
    watch.poll(END + 1)

    assert watch.poll(END - 5 * DAY) is None
