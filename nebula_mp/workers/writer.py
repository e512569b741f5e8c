"""Writer i: makes the system calls on what waits in its worker's two rings, whenever nobody else does.

Data flow: reader i -> seal ring -> [workers.writer] -> UDP socket
                    -> open ring -> [workers.writer] -> TUN queue i
Knows when to look at the rings and when to sleep; knows no key and nothing of packets.
Source: docs/architecture.md, "Who drains": the loop is the one that the ring's model proves.

It sleeps until its bell is rung, which it empties before it looks at the rings. A ring whose lease another
process has is that one's affair: it drains it or rings again. So a reader that is stopped while it has the
lease costs nothing but the wait for its successor.
"""

import select
from typing import Final

from nebula_mp import clock
from nebula_mp.datapath.api import Drain
from nebula_mp.newtypes import Seconds
from nebula_mp.shm_ring import Bell
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.workers.parts import WriterParts
from nebula_mp.workers.worker_loop import (
    BELT_MS,
    BOOKS_EVERY,
    CpuMeter,
    FinishSignal,
    GivenUp,
    attach_drains,
    run_worker,
)

_BUDGET: Final = 8
"""Areas taken from one ring before it is the other one's turn."""

_PASSES: Final = SLOTS["mp.passes"]
_REFUSED: Final = SLOTS["mp.lease.refused"]


def main(parts: WriterParts) -> int:
    """Work until SIGUSR2, then send what waits and end; gives the exit code. Raises SystemCallError."""
    return run_worker(parts, lambda finish: _Loop(parts, finish).run())


class _Loop:
    """`run` once."""

    def __init__(self, parts: WriterParts, finish: FinishSignal) -> None:
        self._finish = finish
        self._stats = StatsPage(parts.stats, writable=True)
        self._cpu = CpuMeter(self._stats)
        self._cpu_at = clock.monotonic()
        self._bell = Bell(parts.bell)
        self._drains = attach_drains(parts, parts.tunnels)
        self._given_up = GivenUp(parts.name, self._drains)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._poll.register(finish, select.POLLIN)

    def run(self) -> None:
        """Drain and sleep by turns. Raises OSError, RingError."""
        while not self._finish.told:
            while self._drain_some(_BUDGET) and not self._finish.told:
                pass
            self._cpu.store()
            self._poll.poll(BELT_MS)
            # Whether or not it was rung: before the rings are looked at, never after.
            self._bell.empty()
        # One round is enough: the readers have ended before us.
        self._drain_some(max(drain.areas for drain in self._drains))
        self._cpu.store()

    def _drain_some(self, budget: int) -> bool:
        """Take at most `budget` areas from each ring; whether to come back at once."""
        self._stats.add(_PASSES)
        left = False
        for drain in self._drains:
            left |= self._drain_one(drain, budget)
        now = clock.monotonic()
        if now >= self._cpu_at:
            self._cpu_at = Seconds(now + BOOKS_EVERY)
            self._cpu.store()
            self._given_up.say()
        return left

    def _drain_one(self, drain: Drain, budget: int) -> bool:
        """Whether areas are left that are ours to drain."""
        if not drain.try_take():
            # Somebody has it, or was just looking, and will look again or ring.
            self._stats.add(_REFUSED)
            return False
        drain.drain(budget)
        return drain.drop()
