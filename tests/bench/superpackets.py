"""How fast superpackets are cut and joined: `python -m tests.bench.superpackets`, on one core.

Prints for each shape microseconds of CPU a superpacket and Gbit/s of payload, the median of many short rounds
and the best one, which a busy machine disturbs least; nothing is sealed and no system call made. What is expected for 64 KB at MTU 1300: 6 us to add up
50 payloads, 20 numpy calls of 0.6 us each way, and 3 us for every copy of the whole.
"""

import random
import statistics
import time
import timeit
from collections.abc import Callable

import numpy as np

from nebula_mp.datapath.coalesce import coalesce
from nebula_mp.datapath.segment import Cut, Slots
from nebula_mp.datapath.virtio import VirtioHeader
from tests.datapath.superpackets import TIMESTAMPS, Plan
from tests.support.packets import TCP, UDP

ROUNDS, CALLS = 150, 40
OVERHEAD_BYTES = 32
PAYLOAD_BYTES = 65_000
SHAPES = {
    "tcp4 1300": Plan(4, TCP, b"", 1248, options=TIMESTAMPS),
    "tcp6 1300": Plan(6, TCP, b"", 1228, options=TIMESTAMPS),
    "udp4 1300": Plan(4, UDP, b"", 1272),
    "udp6 1300": Plan(6, UDP, b"", 1252),
    "tcp4 588": Plan(4, TCP, b"", 536, options=TIMESTAMPS),
    "tcp4 1301, odd": Plan(4, TCP, b"", 1249, options=TIMESTAMPS),
}


class Bench:
    """One superpacket, and its packets where they would be sealed and where they were opened."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.raw, self.packet = plan.virtio(), memoryview(plan.packet())
        self.stride = plan.header_bytes + plan.size + OVERHEAD_BYTES
        self.area = memoryview(bytearray(self.stride * plan.count + OVERHEAD_BYTES))
        self.out = memoryview(bytearray(1 << 17))
        self.slots: Slots | None = None
        each = plan.packets()
        self.sizes = [len(one) for one in each]
        self.opened = memoryview(bytearray(self.stride * plan.count))
        for number, one in enumerate(each):
            self.opened[number * self.stride : number * self.stride + len(one)] = one

    def cut(self) -> None:
        """Parse the header, copy the payload to its places, write headers and checksums."""
        work = Cut(VirtioHeader.parse(self.raw, self.packet), self.packet)
        work.place(self.packet, self._slots(work))
        work.stamp(self._slots(work))

    def stamp(self) -> None:
        """Do the same without the copy, as after a read to the right places."""
        work = Cut(VirtioHeader.parse(self.raw, self.packet), self.packet)
        work.stamp(self._slots(work))

    def _slots(self, work: Cut) -> Slots:
        """Keep them, as the data path does."""
        if self.slots is None:
            self.slots = Slots(work.layout, self.area[16:], self.stride)
        return self.slots

    def join(self) -> None:
        """Judge all packets, and copy the superpacket to where it would be written from."""
        (part,) = coalesce(self.opened, self.stride, self.sizes)
        part.write(self.opened, self.out)

    def judge(self) -> None:
        """Do the same without the copy, as before a `writev`."""
        (part,) = coalesce(self.opened, self.stride, self.sizes)
        part.pieces(self.opened)


def measure(work: Callable[[], None]) -> list[float]:
    """Microseconds a call, of each round."""
    work()
    return [
        each / CALLS * 1e6
        for each in timeit.repeat(work, timer=time.process_time, number=CALLS, repeat=ROUNDS)
    ]


def main() -> None:
    payload = random.Random(1).randbytes(PAYLOAD_BYTES)
    print(f"numpy {np.__version__}, {PAYLOAD_BYTES} bytes of payload")
    print(f"{'shape':16}{'packets':>8}  {'step':8}{'us':>8}{'best us':>9}{'Gbit/s':>8}{'best':>8}")
    for name, shape in SHAPES.items():
        plan = Plan(shape.version, shape.protocol, payload, shape.size, options=shape.options)
        bench = Bench(plan)
        for work in (bench.cut, bench.stamp, bench.join, bench.judge):
            samples = measure(work)
            median, best = statistics.median(samples), min(samples)
            rate, best_rate = (PAYLOAD_BYTES * 8 / 1000 / each for each in (median, best))
            step = work.__name__
            print(
                f"{name:16}{plan.count:8}  {step:8}{median:8.1f}{best:9.1f}{rate:8.1f}{best_rate:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
