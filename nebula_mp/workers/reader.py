"""Reader i: reads TUN queue i and UDP socket i, seals and opens into its rings, and often drains them itself.

Data flow: TUN queue i -> [workers.reader] -> seal ring -> UDP, by this process or writer i
           UDP socket i, other readers' strangers -> [workers.reader] -> open ring -> TUN, by either
           what the tables do not answer -> upcall ring -> control
Knows when to look at what, and who drains; decides nothing about packets: that is the datapath's.
Source: docs/architecture.md, "Who drains": the pass is the one that the ring's model proves.

What a pass does, and why in that order: `datapath.passes`. A direction in which nothing has come is left
alone: what waits in its ring was rung for when it was filled.
"""

import os
import select
from typing import Final

from nebula_mp import clock
from nebula_mp.config.model import DrainMode
from nebula_mp.datapath import kernels
from nebula_mp.datapath.api import FORWARDED, HOLDING, MORE
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
_SWITCHES: Final = SLOTS["mp.drain.switches"]

# Places among the sources. The last tells us to finish, by a signal that ends the sleep.
_TUN: Final = 1
_UDP: Final = 2
_BELL: Final = 4
_INBOUND: Final = _UDP | _BELL
_ALL: Final = 15


def main(parts: ReaderParts) -> int:
    """Work until SIGUSR2; gives the exit code. Raises SystemCallError."""
    return run_worker(parts, lambda finish: _Loop(parts, finish).run())


class _Loop:
    """`run` once."""

    def __init__(self, parts: ReaderParts, finish: FinishSignal) -> None:
        self._finish = finish
        self._stats = StatsPage(parts.stats, writable=True)
        self._bell = Bell(parts.bell)
        _become_consumer(parts)
        kernel = kernels.get(parts.kernel)
        self._reader = kernel.reader(
            parts.tun,
            parts.udp,
            parts.memory,
            overlay=parts.overlay,
            clock=clock.monotonic,
            limits=parts.limits,
            offloads=parts.offloads,
            poison=parts.poison,
        )
        seal, opened = attach_drains(parts, parts.memory.tunnels)
        self._given_up = GivenUp(parts.name, (seal, opened))
        writer = Bell(parts.writer_bell)
        self._out = self._reader.outbound(seal, writer)
        self._into = self._reader.inbound(opened, writer)
        self._drainer = _Drainer(parts, self._stats)
        self._due_at = self._sweep_at = clock.monotonic()
        self._sources = kernel.sources((parts.tun, parts.udp, parts.bell, finish.fileno()))

    def run(self) -> None:
        """Work and sleep by turns. Raises OSError, RingError."""
        # All in one place, and in names of its own: with single packets this loop is what a packet costs.
        wait, send, receive, add = self._sources.wait, self._out.work, self._into.work, self._stats.add
        finish, drainer, monotonic = self._finish, self._drainer, clock.monotonic
        out = into = 1  # a predecessor may have emptied the bell, or left areas
        holding = more = 0
        while True:
            add(_PASSES)
            if out:
                holding = send(BUDGET, drainer.drains) & HOLDING
            if into:
                passed = receive(BUDGET, drainer.drains)
                more = passed & MORE
                if passed & FORWARDED:
                    holding = send(0, drainer.drains) & HOLDING
            now = monotonic()
            if now >= self._due_at:
                self._handle_time(now)
            if finish.told:
                break
            if holding or more:
                # What holds packets reads none: the queue would only keep us awake. Where a pass left
                # something the queue and the socket wake us again by themselves; strangers do not.
                found = wait(0 if more else HOLDING_MS, _ALL & ~_TUN if holding else _ALL)
            else:
                found = wait(BELT_MS, _ALL) or _ALL
            if found & _BELL:
                self._bell.empty()  # before the rings are looked at, never after
            # Whatever it is: an error or a hang-up shows in the call that reads.
            out, into = found & _TUN | holding, found & _INBOUND | more
        while holding:  # packets that nobody else could get at
            select.select([], [], [], HOLDING_MS / 1000)
            holding = send(0, drainer.drains) & HOLDING
        drainer.store_cpu()

    def _handle_time(self, now: Seconds) -> None:
        """Do what has to be done from time to time."""
        self._drainer.handle_time(now)
        self._given_up.say()
        if now >= self._sweep_at:
            self._sweep_at = Seconds(now + _SWEEP_EVERY)
            self._reader.sweep()
        self._due_at = Seconds(now + BOOKS_EVERY)


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
