"""Reader i: reads TUN queue i and UDP socket i, seals and opens into its rings, and often drains them itself.

Data flow: TUN queue i -> [workers.reader] -> seal ring -> UDP, by this process or writer i
           UDP socket i, other readers' strangers -> [workers.reader] -> open ring -> TUN, by either
           what the tables do not answer -> upcall ring -> control
Knows when to look at what, and who drains; decides nothing about packets: that is the datapath's.
Source: docs/architecture.md, "The ring": the pass is the one that the ring's model proves.

Order of a pass, and why:

- The lease is taken before anything is read. Taken afterwards, a writer that is awake for once would win it
  between publish and take, again and again, and stay the drainer for seconds.
- A ring is drained before it is filled too: in a full ring whose writer is gone nobody else would make room.
- The bell is rung after every pass without the lease after which areas wait, even if this pass published
  none: the writer may have come, and found the lock busy only because of us.
- Nothing here waits for room. What a full ring does not take is dropped and counted.
- A direction in which nothing has come is left alone: what waits in its ring was rung for when it was filled.
"""

import os
import select
from collections.abc import Callable
from typing import Final

from nebula_mp import clock
from nebula_mp.config.model import DrainMode
from nebula_mp.datapath import kernels
from nebula_mp.datapath.api import Drain
from nebula_mp.errors import RingError
from nebula_mp.newtypes import Seconds
from nebula_mp.shm import LockFile
from nebula_mp.shm_ring import Bell
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.workers.drain_mode import AutoDrain, Senses, is_tried
from nebula_mp.workers.parts import ReaderParts, stranger_lock
from nebula_mp.workers.worker_loop import (
    BELT_MS,
    BOOKS_EVERY,
    CpuMeter,
    FinishSignal,
    GivenUp,
    attach_drains,
    run_worker,
)

BUDGET: Final = 64
"""Packets taken from one direction before it is the other one's turn."""

HOLDING_MS: Final = 1
"""The sleep while the sealer holds packets back."""

_SWEEP_EVERY: Final = Seconds(1)
_SCHEDSTAT_BYTES_MAX: Final = 128
_PASSES: Final = SLOTS["mp.passes"]
_REFUSED: Final = SLOTS["mp.lease.refused"]
_SWITCHES: Final = SLOTS["mp.drain.switches"]


def main(parts: ReaderParts) -> int:
    """Work until SIGUSR2; gives the exit code. Raises SystemCallError."""
    return run_worker(parts, lambda finish: _Loop(parts, finish).run())


class _Half:
    """One direction: the part that fills a ring, and the end from which the same ring is drained."""

    def __init__(
        self,
        fill: Callable[[int], int],
        waiting: Callable[[], int],
        drain: Drain,
        writer_bell: Bell,
        stats: StatsPage,
    ) -> None:
        self._fill = fill
        self._waiting = waiting
        self._drain = drain
        self._areas = drain.areas
        self._bell = writer_bell
        self._stats = stats
        self.more = False
        """Whether the last pass ended with its budget: perhaps it left something that does not wake us."""

    def work(self, budget: int, *, drains: bool) -> None:
        """One pass. Raises OSError, RingError."""
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
            taken = self._fill(budget)
            left = self._waiting() > 0
        self.more = taken >= budget
        if left:
            self._bell.ring()


class _Loop:
    """`run` once."""

    def __init__(self, parts: ReaderParts, finish: FinishSignal) -> None:
        self._finish = finish
        self._finish_fd = finish.fileno()
        self._tun = parts.tun
        self._stats = StatsPage(parts.stats, writable=True)
        self._bell = Bell(parts.bell)
        _become_consumer(parts)
        self._reader = kernels.get(parts.kernel).reader(
            parts.tun,
            parts.udp,
            parts.memory,
            overlay=parts.overlay,
            clock=clock.monotonic,
            limits=parts.limits,
            offloads=parts.offloads,
            poison=parts.poison,
        )
        self._sealer = sealer = self._reader.sealer
        opener = self._reader.opener
        seal, opened = attach_drains(parts, parts.memory.tunnels)
        self._given_up = GivenUp(parts.name, (seal, opened))
        bell = Bell(parts.writer_bell)
        self._out = _Half(sealer.poll, sealer.waiting, seal, bell, self._stats)
        self._into = _Half(opener.poll, opener.waiting, opened, bell, self._stats)
        self._drainer = _Drainer(parts, self._stats)
        self._books_at = self._sweep_at = clock.monotonic()
        self._poll = select.poll()
        for source in (parts.tun, parts.udp, self._bell, finish):
            self._poll.register(source, select.POLLIN)
        self._tun_is_watched = True

    def run(self) -> None:
        """Work and sleep by turns. Raises OSError, RingError."""
        self._pass(out=True, into=True)  # a predecessor may have emptied the bell, or left areas
        while not self._finish.told:
            out, into = self._wait()
            self._pass(out=out, into=into)
        while self._sealer.is_holding:  # packets that nobody else could get at
            select.select([], [], [], HOLDING_MS / 1000)
            self._out.work(0, drains=self._drainer.drains)
        self._drainer.store_cpu()

    def _wait(self) -> tuple[bool, bool]:
        """Sleep until there is something to do in a direction: out, in."""
        holding = self._sealer.is_holding
        if holding is self._tun_is_watched:
            # What holds packets reads none: the queue would only keep us awake.
            self._poll.modify(self._tun, 0 if holding else select.POLLIN)
            self._tun_is_watched = not holding
        limit_ms = 0 if self._into.more else HOLDING_MS if holding else BELT_MS
        found = self._poll.poll(limit_ms)
        if not found and limit_ms == BELT_MS:
            return True, True
        out, into = holding, self._into.more  # the queue wakes us again by itself, strangers do not
        for descriptor, _ in found:
            # Whatever it is: an error or a hang-up shows in the call that reads.
            if descriptor == self._tun:
                out = True
            elif descriptor == self._bell.descriptor:
                self._bell.empty()  # before the rings are looked at, never after
                into = True
            elif descriptor != self._finish_fd:
                into = True
        return out, into

    def _pass(self, *, out: bool, into: bool) -> None:
        self._stats.add(_PASSES)
        drains = self._drainer.drains
        if out:
            self._out.work(BUDGET, drains=drains)
        if into:
            self._into.work(BUDGET, drains=drains)
        now = clock.monotonic()
        if now >= self._books_at:
            self._books_at = Seconds(now + BOOKS_EVERY)
            self._drainer.handle_time(now)
            self._given_up.say()
        if now >= self._sweep_at:
            self._sweep_at = Seconds(now + _SWEEP_EVERY)
            self._reader.sweep()


class _Drainer:
    """Who drains: as configured, or as trials show. Reads clocks and pages for `AutoDrain`."""

    def __init__(self, parts: ReaderParts, stats: StatsPage) -> None:
        self.drains = parts.drain is not DrainMode.WRITER
        self._stats = stats
        self._cpu = CpuMeter(stats)
        self._writer = StatsPage(parts.writer_stats, writable=False)
        self._schedstat = parts.schedstat
        self._auto: AutoDrain | None = None
        if is_tried(parts.drain, cpus=parts.cpus, has_delay=parts.schedstat >= 0):
            self._auto = AutoDrain(self._senses(clock.monotonic()))

    def handle_time(self, now: Seconds) -> None:
        """Look at the time that has passed; changes `drains`."""
        if self._auto is None:
            self._cpu.store()
        elif self._auto.due(now):
            drains = self._auto.handle_window(self._senses(now)) is not DrainMode.WRITER
            if drains is not self.drains:
                self._stats.add(_SWITCHES)
                self.drains = drains

    def store_cpu(self) -> None:
        """State what this process has used."""
        self._cpu.store()

    def _senses(self, now: Seconds) -> Senses:
        own, writer = self._stats.snapshot(), self._writer.snapshot()
        moved = sum(page["mp.udp.tx.bytes"] + page["mp.tun.tx.bytes"] for page in (own, writer))
        # "run_ns delay_ns slices"
        delay_ns = int(os.pread(self._schedstat, _SCHEDSTAT_BYTES_MAX, 0).split()[1])
        return Senses(
            at=now,
            own_cpu=Seconds(self._cpu.store() / 1e6),
            own_delay=Seconds(delay_ns / 1e9),
            writer_cpu=Seconds(writer["mp.cpu.us"] / 1e6),
            moved_bytes=moved,
        )


def _become_consumer(parts: ReaderParts) -> None:
    """Take the locks of the rings that other readers fill for us, for good. Raises RingError."""
    locks = LockFile(parts.ring_locks)
    for source in parts.memory.strangers_in:
        # Free by now: the kernel dropped it when our predecessor died, before it could be waited for.
        if not locks.lock(stranger_lock(source, parts.number)).try_take():
            ring = f"stranger ring from {source} to {parts.number}"
            raise RingError(ring, "consumer", "another process", f"{parts.name} alone")
