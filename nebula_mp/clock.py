"""The only module that reads clocks and entropy.

Data flow: kernel -> [clock] -> workers, cli
Protocol layers get times and random bytes as arguments, so that tests and the simulator can supply them.
Source: clock_gettime(2); sd_notify(3) for the reload time stamp.
"""

import os
import time
from collections.abc import Callable
from typing import Final

from nebula_mp.newtypes import Instant, Seconds

# Readers ask twice in each pass: to call the NewType takes half as long as to read the clock.
_gettime: Callable[[int], Seconds] = time.clock_gettime  # type: ignore[assignment]  # a float of seconds
_BOOTTIME: Final = time.CLOCK_BOOTTIME


def monotonic() -> Seconds:
    """Seconds since boot. CLOCK_BOOTTIME, because a tunnel ages while the machine is suspended too."""
    return _gettime(_BOOTTIME)


def wall_ns() -> int:
    """Unix time in nanoseconds; it may jump either way."""
    return time.time_ns()


def wall_s() -> int:
    """Unix time in whole seconds, as certificates state it."""
    return time.time_ns() // 1_000_000_000


def process_cpu_us() -> int:
    """Microseconds of a core that this process has used."""
    return time.process_time_ns() // 1000


def now() -> Instant:
    """Both clocks, read one after the other."""
    return Instant(monotonic(), time.time_ns())


def entropy(count: int) -> bytes:
    """`count` unpredictable bytes from the kernel."""
    return os.urandom(count)


def service_manager_us() -> int:
    """CLOCK_MONOTONIC in microseconds, the time stamp systemd wants with RELOADING=1."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


class JumpWatch:
    """Notices that the wall clock was set: call `poll(now)` now and then.

    Suspend is no jump, since both clocks count it. Corrections by slewing stay below the limit.
    """

    def __init__(self, now: Instant, limit: Seconds = Seconds(1)) -> None:
        self._offset = now.wall_ns / 1e9 - now.mono
        self._limit = limit

    def poll(self, now: Instant) -> float | None:
        """Seconds by which the wall clock jumped since the last call (negative: back), or None."""
        offset = now.wall_ns / 1e9 - now.mono
        jump = offset - self._offset
        self._offset = offset
        return jump if abs(jump) > self._limit else None
