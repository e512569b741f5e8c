"""The loop of the supervisor: what is called when, on a clock of the test's own where it can be."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from nebula_mp import clock
from nebula_mp.newtypes import Seconds
from nebula_mp.workers.events import Events, Signals
from tests.support.processes import forked

PATIENCE = Seconds(30)


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events(clock.monotonic)
    yield made
    made.close()


def never() -> bool:
    return False


def test_what_is_readable_is_called_until_it_was_read(events: Events) -> None:
    source, sink = os.pipe()
    read: list[bytes] = []
    events.watch(source, lambda: read.append(os.read(source, 1)))
    os.write(sink, b"ab")

    assert events.run_until(lambda: len(read) == 2, PATIENCE)
    assert not events.run_until(never, Seconds(0))

    assert read == [b"a", b"b"]
    for descriptor in (source, sink):
        os.close(descriptor)


def test_who_was_unwatched_in_the_same_round_is_not_called(events: Events) -> None:
    called = []
    pipes = [os.pipe() for _ in range(2)]

    def ready(number: int) -> None:
        called.append(number)
        for source, _ in pipes:
            events.unwatch(source)

    for number, (source, sink) in enumerate(pipes):
        events.watch(source, partial(ready, number))
        os.write(sink, b"x")

    assert events.run_until(lambda: bool(called), PATIENCE)
    assert not events.run_until(lambda: len(called) > 1, Seconds(0.01))
    for pair in pipes:
        for descriptor in pair:
            os.close(descriptor)


def test_timers_come_in_the_order_they_are_due() -> None:
    now = [Seconds(100)]
    events = Events(lambda: now[0])
    called: list[str] = []
    events.after(Seconds(3), lambda: called.append("late"))
    events.after(Seconds(1), lambda: called.append("early"))
    events.after(Seconds(1), lambda: called.append("early, but second"))

    now[0] = Seconds(102)
    assert events.run_until(lambda: len(called) == 2, PATIENCE)
    now[0] = Seconds(103)
    assert events.run_until(lambda: len(called) == 3, PATIENCE)

    assert called == ["early", "early, but second", "late"]
    events.close()


def test_a_timer_may_set_the_next_one(events: Events) -> None:
    calls = []

    def again() -> None:
        calls.append(clock.monotonic())
        events.after(Seconds(0.001), again)

    again()

    assert events.run_until(lambda: len(calls) == 5, PATIENCE)
    assert calls == sorted(calls)


def test_the_limit_ends_the_waiting(events: Events) -> None:
    begun = clock.monotonic()

    assert not events.run_until(never, Seconds(0.02))

    assert clock.monotonic() - begun >= 0.02


def test_what_a_callback_raises_comes_out(events: Events) -> None:
    events.after(Seconds(0), lambda: 1 / 0)  # type: ignore[arg-type]  # it never returns

    with pytest.raises(ZeroDivisionError):
        events.run_until(never, PATIENCE)


def test_what_happened_before_a_limit_counts_even_if_we_slept_through_it() -> None:
    now = [Seconds(100)]
    events = Events(lambda: now[0])
    source, sink = os.pipe()
    os.write(sink, b"a")
    read: list[bytes] = []
    events.watch(source, lambda: read.append(os.read(source, 9)))
    events.after(Seconds(1), lambda: now.__setitem__(0, Seconds(500)))
    now[0] = Seconds(102)

    done = events.run_until(lambda: bool(read), Seconds(30))
    again = events.run_until(lambda: len(read) == 2, Seconds(0))

    assert (done, again, read) == (True, False, [b"a"])
    events.close()
    for descriptor in (source, sink):
        os.close(descriptor)


def test_signals_that_were_blocked_at_our_start_are_heard(events: Events) -> None:
    def main() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
        with Signals((signal.SIGTERM,)) as signals:
            came: list[signal.Signals] = []
            events.watch(signals.fileno(), lambda: came.extend(signals.take()))
            assert events.run_until(lambda: bool(came), PATIENCE)
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    with forked(main) as child:
        assert child.wait() == 0


def test_signals_wake_the_loop_in_their_order_and_do_nothing_else(events: Events) -> None:
    def main() -> None:
        came: list[signal.Signals] = []
        with Signals((signal.SIGTERM, signal.SIGHUP)) as signals:
            events.watch(signals.fileno(), lambda: came.extend(signals.take()))
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
                assert events.run_until(lambda: bool(came), PATIENCE)
            assert events.run_until(lambda: len(came) == 3, PATIENCE)
            assert signals.take() == ()
        assert came == [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with forked(main) as child:  # pytest has handlers of its own
        assert child.wait() == 0
