"""How fast packets and superpackets are sealed: `python -m tests.bench.sealing`, on one core.

Prints for each shape microseconds of CPU a packet, the median of many short rounds and the best one, which a
busy machine disturbs least: of a whole `poll`, of the AEAD's call alone, and of the rest. What `readv` costs
is not in it: the packet is copied once instead. What is expected at MTU 1300: 0.63 us for the call, of which
AES itself needs 0.12, and 15 us to cut a superpacket of 52 packets, 6 us of them to add up its payload.
"""

import errno
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import TAG_BYTES, Aead
from nebula_mp.datapath.api import Sealer
from nebula_mp.datapath.python import PythonKernel
from nebula_mp.newtypes import Cipher
from nebula_mp.shm_ring import AREAS
from nebula_mp.wire.header import HEADER_BYTES
from tests.datapath.sites import KEY_OUT, OVERLAY, Site, connect
from tests.datapath.superpackets import TIMESTAMPS, Plan
from tests.support.packets import TCP, UDP

ROUNDS: Final = 150
POLLS: Final = 16
PLAIN_PACKETS: Final = 48

Reads = list[tuple[bytes, bytes]]
"""What a poll reads: offload header and packet."""


def superpacket(plan: Plan) -> Reads:
    """One of the largest."""
    size_max = 65_535 - plan.header_bytes
    full = Plan(plan.version, plan.protocol, bytes(range(256)) * 256, plan.size, options=plan.options)
    cut = Plan(full.version, full.protocol, full.payload[:size_max], full.size, options=full.options)
    return [(cut.virtio(), cut.packet())]


def plain(size: int) -> Reads:
    """Packets of `size` bytes, one by one."""
    one = Plan(4, UDP, bytes(size - 28), size)
    return [(bytes(10), one.one(0))] * PLAIN_PACKETS


SHAPES: Final[dict[str, Callable[[], Reads]]] = {
    "superpacket tcp4, 1300": lambda: superpacket(Plan(4, TCP, b"", 1248, options=TIMESTAMPS)),
    "superpacket tcp6, 1300": lambda: superpacket(Plan(6, TCP, b"", 1228, options=TIMESTAMPS)),
    "superpacket udp4, 1300": lambda: superpacket(Plan(4, UDP, b"", 1272)),
    "superpacket tcp4, 588": lambda: superpacket(Plan(4, TCP, b"", 536, options=TIMESTAMPS)),
    "superpacket tcp4, 88": lambda: superpacket(Plan(4, TCP, b"", 36, options=TIMESTAMPS)),
    "plain, 1300": lambda: plain(1300),
    "plain, 88": lambda: plain(88),
}


class Device:
    """Stands in for `os.readv` on a TUN queue."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._left: Iterator[tuple[bytes, bytes]] = iter(())

    def fill(self) -> None:
        """Have everything there once more."""
        self._left = iter(self._reads)

    def readv(self, descriptor: int, buffers: Any, /) -> int:
        """Give the next one; `buffers` are writable, for the header and for the packet."""
        del descriptor
        found = next(self._left, None)
        if found is None:
            raise BlockingIOError(errno.EAGAIN, "empty")
        header, packet = found
        buffers[0][:] = header
        buffers[1][: len(packet)] = packet
        return len(header) + len(packet)


def sealer_of(site: Site) -> Sealer:
    """Attach as a reader does, without poison."""
    return (
        PythonKernel()
        .reader(
            site.tun_fd,
            site.udp[0].fileno(),
            site.memory(),
            overlay=OVERLAY,
            clock=site.clock,
            limits=site.limits,
            offloads=Offloads(),
        )
        .sealer
    )


def polls(reads: Reads) -> tuple[int, list[float]]:
    """How many packets a poll reads, and microseconds of CPU a packet, of each round."""
    device = Device(reads)
    with closing(Site(areas=AREAS, offloads=Offloads())) as site:
        connect(site)
        site.allow(reads[0][1])
        sealer, ring = sealer_of(site), site.seal_ring()
        real, os.readv = os.readv, device.readv
        try:
            samples, packets = [], 0
            for _ in range(ROUNDS):
                spent = packets = 0
                for _ in range(POLLS):
                    device.fill()
                    start = time.process_time_ns()
                    packets += sealer.poll(1000)
                    spent += time.process_time_ns() - start
                    while ring.pending():
                        for _ in ring.entries():
                            pass
                        ring.release()
                samples.append(spent / packets / 1000)
        finally:
            os.readv = real
        assert site.drops() == {}
    return packets // POLLS, samples


def calls(size: int, count: int) -> list[float]:
    """Microseconds of CPU of sealing alone, for packets of `size` bytes, a packet and of each round."""
    stride = HEADER_BYTES + size + TAG_BYTES
    area = memoryview(bytearray(stride * count))
    starts = range(0, stride * count, stride)
    headers = [area[at : at + HEADER_BYTES] for at in starts]
    plaintexts = [area[at + HEADER_BYTES : at + HEADER_BYTES + size] for at in starts]
    outs = [area[at + HEADER_BYTES : at + stride] for at in starts]
    aead, samples = Aead(Cipher.AES, KEY_OUT), []
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        for _ in range(POLLS):
            aead.seal_each(3, headers, plaintexts, outs)
        samples.append((time.process_time_ns() - start) / count / POLLS / 1000)
    return samples


def main() -> None:
    """Measure all shapes, or those whose names contain the first argument."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print(f"{'shape':24}{'packets':>8}{'us':>8}{'best us':>9}{'AEAD':>8}{'best':>8}{'rest':>8}{'best':>8}")
    for name, shape in SHAPES.items():
        if wanted not in name:
            continue
        count, samples = polls(shape())
        alone = calls(int(name.rsplit(maxsplit=1)[1]), count)
        median, best = statistics.median(samples), min(samples)
        call, call_best = statistics.median(alone), min(alone)
        print(
            f"{name:24}{count:8}{median:8.2f}{best:9.2f}{call:8.2f}{call_best:8.2f}"
            f"{median - call:8.2f}{best - call_best:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
