"""A pass over one direction of a reader, and what the reader sleeps on.

Data flow: workers.reader -> [Half] -> sealing | opening -> ring -> drains
           kernel -> [Sources] -> workers.reader
Knows when to take the lease and when to ring; does not know who is to drain.
Source: docs/architecture.md, "Who drains": the pass is the one that the ring's model proves; poll(2).

Order of a pass, and why:

- The lease is taken before anything is read. Taken afterwards, a writer that is awake for once would win it
  between publish and take, again and again, and stay the drainer for seconds.
- A ring is drained before it is filled too: in a full ring whose writer is gone nobody else would make room.
- The bell is rung after every pass without the lease after which areas wait, even if this pass published
  none: the writer may have come, and found the lock busy only because of us.
- Whoever is not to drain looks first whether the ring is three quarters full, and then empties a quarter, if
  the writer does not have the lease: so it has lost its processor, or has not got one yet. A burst of single
  packets, an area each, fills a ring in the time in which Linux wakes a process on a busy machine.
- Nothing here waits for room. What a full ring does not take is dropped and counted.
"""

import select
from collections.abc import Callable, Sequence
from typing import Final

from nebula_mp.datapath.api import MORE, SOURCES_MAX, Drain
from nebula_mp.shm_ring import Bell
from nebula_mp.shm_stats import SLOTS, StatsPage

_REFUSED: Final = SLOTS["mp.lease.refused"]


class Half:
    """A `datapath.api.Half`."""

    def __init__(
        self,
        fill: Callable[[int], int],
        waiting: Callable[[], int],
        flags: Callable[[], int],
        *,
        drain: Drain,
        writer: Bell,
        stats: StatsPage,
    ) -> None:
        """The first three are of a Sealer or an Opener, whose ring `drain` empties; `flags` has no MORE."""
        self._fill = fill
        self._waiting = waiting
        self._flags = flags
        self._drain = drain
        self._areas = drain.areas
        self._quarter = max(1, drain.areas // 4)
        self._writer = writer
        self._stats = stats

    def work(self, budget: int, drains: bool) -> int:  # noqa: FBT001 - called for each packet that comes alone
        """As `Half.work`."""
        drain = self._drain
        if drains and drain.try_take():
            if drain.pending():  # seldom
                drain.drain(self._areas)
            taken = self._fill(budget)
            drain.drain(self._areas)
            left = drain.drop()
        else:
            if drains:
                self._stats.add(_REFUSED)
            elif self._waiting() >= self._areas - self._quarter and drain.try_take():
                drain.drain(self._quarter)
                drain.drop()  # whoever is to drain what is left is rung below
            taken = self._fill(budget)
            left = self._waiting() > 0
        if left:
            self._writer.ring()
        return (MORE if taken >= budget else 0) | self._flags()


class Sources:
    """A `datapath.api.Sources`."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        assert len(set(descriptors)) == len(descriptors) <= SOURCES_MAX
        self._bits = {descriptor: 1 << place for place, descriptor in enumerate(descriptors)}
        self._heeded = 0
        self._poll = select.poll()
        for descriptor in descriptors:
            self._poll.register(descriptor, 0)

    def wait(self, limit_ms: int, heeded: int) -> int:
        """As `Sources.wait`."""
        if heeded != self._heeded:
            for descriptor, bit in self._bits.items():
                self._poll.modify(descriptor, select.POLLIN if heeded & bit else 0)
            self._heeded = heeded
        found = 0
        for descriptor, _ in self._poll.poll(limit_ms):
            found |= self._bits[descriptor]
        return found
