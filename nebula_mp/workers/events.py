"""The supervisor's event loop: descriptors, timers and signals, one after the other on the one thread.

Data flow: kernel -> [workers.events] -> supervisor's callbacks
Not asyncio: a fork copies this process as it is, and this loop has nothing in it that a copy could disturb;
and it may be run again inside a callback's caller, so that a course of steps reads from top to bottom.
Source: epoll(7), signal(7), signal.set_wakeup_fd.
"""

import contextlib
import heapq
import itertools
import os
import selectors
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Self

from nebula_mp.newtypes import Seconds

_READ_BYTES = 256

Call = Callable[[], None]


class Events:
    """`watch` and `after` at any time; `run_until` lets things happen, and raises what a callback raises."""

    def __init__(self, clock: Callable[[], Seconds]) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[Seconds, int, Call]] = []
        self._order = itertools.count()

    def watch(self, descriptor: int, ready: Call) -> None:
        """Call `ready` whenever the descriptor is readable. `unwatch` it before it is closed."""
        self._selector.register(descriptor, selectors.EVENT_READ, ready)

    def unwatch(self, descriptor: int) -> None:
        """Look at it no more."""
        self._selector.unregister(descriptor)

    def after(self, delay: Seconds, call: Call) -> None:
        """Call once when `delay` is over, if the loop runs then."""
        heapq.heappush(self._timers, (Seconds(self._clock() + delay), next(self._order), call))

    def run_until(self, done: Callable[[], bool], limit: Seconds | None = None) -> bool:
        """Let things happen until `done()`; False when it is not after `limit`.

        What has happened by then counts, even if this process slept through the limit.
        """
        end = None if limit is None else Seconds(self._clock() + limit)
        while not done():
            now = self._clock()
            is_over = end is not None and now >= end
            if self._timers and self._timers[0][0] <= now and not is_over:
                heapq.heappop(self._timers)[2]()
                continue
            dues = [due for due in (end, self._timers[0][0] if self._timers else None) if due is not None]
            for key, _ in self._selector.select(max(min(dues) - now, 0) if dues else None):
                # One that an earlier callback of this round unwatched has nothing to say any more.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            if is_over:
                return done()
        return True

    def close(self) -> None:
        """Forget everything; watched descriptors stay open."""
        self._selector.close()
        self._timers.clear()


class Signals:
    """Inside `with`: these signals make `fileno()` readable and do nothing else; `take` says which came.

    Whoever started us may have left them blocked.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = tuple(numbers)
        self._undo = contextlib.ExitStack()
        self._source = -1

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._source)
            undo.callback(os.close, sink)
            before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before)
            for number in self._numbers:
                undo.callback(signal.signal, number, signal.signal(number, _ignore))
            mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._source

    def take(self) -> tuple[signal.Signals, ...]:
        """Give the signals that have come, in their order."""
        try:
            came = os.read(self._source, _READ_BYTES)
        except BlockingIOError:
            return ()
        return tuple(signal.Signals(number) for number in came if number in self._numbers)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: a handler must be there for the wake-up to be written."""
