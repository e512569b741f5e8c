"""The event loop of a worker: uvloop, one timer, and signals.

Data flow: kernel -> [workers.loop] -> the worker's callbacks
Knows nothing of packets; what a wake-up does is the worker's affair.
Source: asyncio.Runner; uvloop. uvloop.install() is not used, since it breaks pyroute2 in the whole process.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import uvloop

from nebula_mp import clock
from nebula_mp.config.model import LogLevel
from nebula_mp.newtypes import Seconds
from nebula_mp.workers import logs

BATCH = 64
"""Packets taken from one descriptor per wake-up, so that none of the others starves."""

_SLEEP_MAX = Seconds(1.0)
"""The loop's own clock stands still while the machine is suspended, so no sleep is longer than this."""

_ROUNDING = 0.0005  # uvloop sleeps whole milliseconds and would wake up a little early, for nothing


def run(main: Callable[[], Coroutine[None, None, int]]) -> int:
    """Run `main` on a new uvloop until it returns an exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def end_on_error(loop: asyncio.AbstractEventLoop, who: str, end: Callable[[], None]) -> None:
    """Have `end` called when our own code fails in a callback: a successor starts from a known state."""

    def handle(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, BaseException):
            logs.write(LogLevel.WARN, "event loop", {"error": context.get("message", "")})
            return
        logs.LOGGER.error("unexpected error in %s", who, exc_info=error)
        end()

    loop.set_exception_handler(handle)


class Alarm:
    """One timer: `arm` it after every batch; `fire` is called at the time armed for or a little earlier.

    Arming for a later time than before does nothing, since waking up early is cheaper than moving a
    timer for every batch. It fires at least once a second.
    """

    def __init__(self, fire: Callable[[], None]) -> None:
        self._fire = fire
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._at = Seconds(0)

    def arm(self, due: Seconds | None) -> None:
        """Fire at `due` on the clock of clock.monotonic."""
        if self._handle is not None and due is not None and self._at <= due:
            return
        now = clock.monotonic()
        at = Seconds(now + _SLEEP_MAX) if due is None else min(due, Seconds(now + _SLEEP_MAX))
        if self._handle is not None:
            if self._at <= at:
                return
            self._handle.cancel()
        self._at = at
        self._handle = self._loop.call_later(max(0.0, at - now) + _ROUNDING, self._ring)

    def cancel(self) -> None:
        """Never fire again unless armed again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        self._fire()
