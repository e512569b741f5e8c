"""Deadlines by key: each key has at most one, the earliest are handed out first.

Data flow: control.* -> [control.timers] -> Controller.next_timeout
"""

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from nebula_mp.newtypes import Seconds

Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    """A heap whose stale entries are skipped: `arm` and `cancel` never search it."""

    __slots__ = ("_deadlines", "_heap", "_serial")

    def __init__(self) -> None:
        self._deadlines: dict[Key, tuple[Seconds, int]] = {}
        self._heap: list[tuple[Seconds, int, Key]] = []
        self._serial = 0  # keeps equal deadlines in the order they were armed, and keys uncompared

    def __len__(self) -> int:
        return len(self._deadlines)

    def arm(self, key: Key, at: Seconds) -> None:
        """Set the deadline of `key`, replacing an earlier one."""
        self._serial += 1
        self._deadlines[key] = (at, self._serial)
        heapq.heappush(self._heap, (at, self._serial, key))
        if len(self._heap) > 64 + 4 * len(self._deadlines):
            self._heap = [(at, serial, key) for key, (at, serial) in self._deadlines.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Key) -> None:
        """Forget the deadline of `key`, if it has one."""
        self._deadlines.pop(key, None)

    def next(self) -> Seconds | None:
        """Give the earliest deadline."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: Seconds) -> Iterator[Key]:
        """Hand out each key whose deadline has come, and forget that deadline.

        Keys armed during the iteration are handed out too if they are due: arm them later than `now`.
        """
        while True:
            self._drop_stale()
            if not self._heap or self._heap[0][0] > now:
                return
            _, _, key = heapq.heappop(self._heap)
            del self._deadlines[key]
            yield key

    def _drop_stale(self) -> None:
        while self._heap:
            at, serial, key = self._heap[0]
            if self._deadlines.get(key) == (at, serial):
                return
            heapq.heappop(self._heap)
