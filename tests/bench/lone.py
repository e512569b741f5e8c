"""What a pass of a reader costs that moves one packet: `python -m tests.bench.lone`, on one core.

Prints microseconds of CPU from before the sleep to after the pass, the median of many and the best one, which
a busy machine disturbs least: a TCP acknowledgement read from the TUN queue, sealed and sent (`out`), or
received, opened and written (`in`), with all offloads and the reader draining, as behind every superpacket of
a bulk transfer. A socket pair stands in for the TUN queue. `calls` makes the same system calls and nothing
else. Beside them: 1 us to seal or open, and about 100 calls of Python functions, of which none takes 1 us.
"""

import argparse
import cProfile
import fcntl
import os
import pstats
import select
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from nebula_mp import clock
from nebula_mp.config.model import Offloads
from nebula_mp.workers import reader
from nebula_mp.workers.worker_loop import BELT_MS, FinishSignal
from tests.datapath.sites import FAR, NEAR, connect, message
from tests.datapath.superpackets import TIMESTAMPS
from tests.support.packets import TCP, ip, tcp
from tests.workers.rig import Rig

PASSES = 4000
PLAIN = bytes(10)
PARTIAL = b"\x01\x00\x00\x00\x00\x00\x14\x00\x10\x00"  # a checksum to complete, as the local stack leaves it

Feed = Callable[[int], None]
Work = Callable[[], None]


def samples(feed: Feed, work: Work, take: Work, passes: int = PASSES) -> list[float]:
    """Microseconds of each call of `work`; `feed` is given numbers that only grow."""
    found = []
    for number in range(passes):
        feed(number)
        begun = time.process_time_ns()
        work()
        found.append((time.process_time_ns() - begun) / 1000)
        take()
    return found[passes // 10 :]


class Bench:
    """A reader in this process."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        site = rig.site
        connect(site)
        self.out = ip(NEAR, FAR, TCP, tcp(NEAR, FAR, 5000, 53, options=TIMESTAMPS))
        self.back = ip(FAR, NEAR, TCP, tcp(FAR, NEAR, 53, 5000, options=TIMESTAMPS))
        rig.site.now = clock.monotonic()
        site.allow(self.out)
        site.allow(self.back, inbound=True)
        parts = replace(rig.reader_parts(), start=1, offloads=Offloads())
        self.loop = reader._Loop(parts, FinishSignal())
        self.buffer = bytearray(70_000)
        self.counter = 3

    def feed_out(self, number: int) -> None:
        """Let the local stack send."""
        del number
        self.rig.stacks[0].send(PARTIAL + self.out)

    def feed_in(self, number: int) -> None:
        """Let the far host send."""
        del number
        self.rig.site.far.sendto(message(self.counter, self.back), self.rig.site.udp[0].getsockname())
        self.counter += 1

    def work(self) -> None:
        """Sleep and pass once, without what the loop does beside: flags, counting, the clock."""
        self.work_at(self.loop._sources.wait(BELT_MS, reader._ALL))

    def work_at(self, found: int) -> None:
        """Pass over the directions in which something has come."""
        if found & reader._TUN:
            self.loop._out.work(reader.BUDGET, True)
        if found & reader._INBOUND:
            self.loop._into.work(reader.BUDGET, True)

    def sent(self) -> None:
        """Take what was sent."""
        self.rig.site.far.recv_into(self.buffer)

    def written(self) -> None:
        """Take what was written."""
        self.rig.stacks[0].recv_into(self.buffer)


class Calls:
    """The system calls of a pass alone."""

    def __init__(self, bench: Bench) -> None:
        rig = bench.rig
        self.tun, self.udp = rig.queues[0].fileno(), rig.site.udp[0]
        self.locks = rig.ring_locks.descriptor
        self.far = rig.site.far.getsockname()
        self.header, self.room = bytearray(10), memoryview(bytearray(70_000))
        self.poll = select.poll()
        for each in (self.tun, self.udp.fileno()):
            self.poll.register(each, select.POLLIN)
        self.sealed, self.opened = bytes(len(bench.out) + 32), PLAIN + bench.back

    def out(self) -> None:
        """Of a pass out."""
        self._begin(0)
        os.readv(self.tun, (self.header, self.room))
        self.poll.poll(0)
        self._lock(2)
        self.udp.sendto(self.sealed, socket.MSG_DONTWAIT, self.far)

    def into(self) -> None:
        """Of a pass in."""
        self._begin(1)
        self.udp.recvmsg_into((self.room,), 24, socket.MSG_DONTWAIT)
        self.poll.poll(0)
        os.write(self.tun, self.opened)

    def _begin(self, lock: int) -> None:
        self.poll.poll(500)
        self._lock(lock)

    def _lock(self, lock: int) -> None:
        fcntl.lockf(self.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, lock)
        fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, lock)


def report(name: str, found: list[float]) -> None:
    print(f"{name:12}{statistics.median(found):8.1f}{min(found):9.1f}", flush=True)


def profile(feed: Feed, work: Work, take: Work) -> None:
    """Show where the calls go; what they cost is distorted."""
    profiler = cProfile.Profile()
    for number in range(PASSES):
        feed(number)
        profiler.enable()
        work()
        profiler.disable()
        take()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=("out", "in"))
    chosen = parser.parse_args().profile
    with Rig(poison=False, areas=32) as rig:
        bench = Bench(rig)
        calls = Calls(bench)
        bench.work_at(reader._ALL)
        ways = {"out": (bench.feed_out, bench.sent), "in": (bench.feed_in, bench.written)}
        if chosen:
            feed, take = ways[chosen]
            profile(feed, bench.work, take)
            return
        print(f"{'pass':12}{'us':>8}{'best us':>9}")
        for name, alone in (("out", calls.out), ("in", calls.into)):
            feed, take = ways[name]
            report(name, samples(feed, bench.work, take))
            report(f"{name} calls", samples(feed, alone, take))


if __name__ == "__main__":
    main()
