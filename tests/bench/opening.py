"""How fast batches are opened: `python -m tests.bench.opening`, on one core.

Prints for each shape microseconds of CPU for a batch of 49 datagrams, the median of many and the
best one, which a busy machine disturbs least: from the buffer that the batch was received into to the
published area, which is released at once. No system call is made. Expected for a superpacket at MTU 1300: 49
times 0.7 us to open, 6 us to add up the payload, 15 us to compare headers, 40 us for all else. `single`
gets the same datagrams one by one and joins them, `plain` has no offloads, and `cipher` only opens: what a
busy machine makes of 49 times 0.7 us.
"""

import statistics
import time
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, cast

from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.crypto.aead import Aead
from nebula_mp.newtypes import Cipher, UdpAddr
from tests.datapath.batches import ALL, SOURCE, sealed, site_of
from tests.datapath.sites import KEY_IN, Site
from tests.datapath.superpackets import TIMESTAMPS, Plan
from tests.support.packets import TCP, UDP

PACKETS, ROUNDS, CALLS = 49, 60, 20
SHAPES = {
    "tcp4 1300": Plan(4, TCP, b"", 1248, options=TIMESTAMPS),
    "tcp6 1300": Plan(6, TCP, b"", 1228, options=TIMESTAMPS),
    "udp4 1300": Plan(4, UDP, b"", 1272),
    "tcp4 588": Plan(4, TCP, b"", 536, options=TIMESTAMPS),
}
MODES = {"batch": ALL, "single": replace(ALL, udp_gro=False), "plain": NO_OFFLOADS}


class Inlet:
    """In place of a socket: batches, or their datagrams one by one, copied as by the kernel."""

    def __init__(self, datagrams: list[bytes], *, joined: bool) -> None:
        self._stride = len(datagrams[0])
        self._waiting = [b"".join(datagrams)] if joined else datagrams[::-1]

    def recvmsg_into(self, buffers: list[memoryview], *_: int) -> tuple[int, Any, int, Any]:
        data = self._next()
        buffers[0][: len(data)] = data
        return len(data), [(17, 104, self._stride.to_bytes(4, "little"))], 0, SOURCE

    def recvfrom_into(self, into: memoryview, *_: int) -> tuple[int, Any]:
        data = self._next()
        into[: len(data)] = data
        return len(data), SOURCE

    def poll(self, _: int) -> list[bytes]:
        return self._waiting

    def _next(self) -> bytes:
        if not self._waiting:
            raise BlockingIOError
        return self._waiting.pop()


def rounds(site: Site, plan: Plan, offloads: Offloads) -> list[float]:
    """Microseconds for each batch; the counters go on."""
    opener = site.python_reader(poison=False).opener
    ring = site.open_ring()
    packets = plan.packets()
    counter = 3
    samples = []
    for _ in range(ROUNDS):
        inlets = []
        for _ in range(CALLS):
            inlets.append(Inlet(sealed(packets, counter), joined=offloads.udp_gro))
            counter += PACKETS
        for inlet in inlets:
            opener._socket = opener._queue = cast("Any", inlet)
            begun = time.process_time_ns()
            opener.poll(PACKETS + 1)
            samples.append((time.process_time_ns() - begun) / 1000)
            while ring.pending():
                for _ in ring.entries():
                    pass
                ring.release()
    return samples


def cipher_alone(plan: Plan) -> list[float]:
    """Microseconds for each batch, only to open it."""
    aead = Aead(Cipher.AES, KEY_IN)
    views = [memoryview(each) for each in sealed(plan.packets())]
    pieces = [(3 + number, each[:16], each[16:]) for number, each in enumerate(views)]
    out = memoryview(bytearray(len(views[0]) - 32))
    samples = []
    for _ in range(ROUNDS * CALLS):
        begun = time.process_time_ns()
        for counter, header, rest in pieces:
            aead.open_into(counter, header, rest, out)
        samples.append((time.process_time_ns() - begun) / 1000)
    return samples


def report(name: str, mode: str, samples: list[float]) -> None:
    median, best = statistics.median(samples), min(samples)
    print(
        f"{name:12}{mode:8}{median:8.1f}{best:9.1f}{median / PACKETS:11.2f}{best / PACKETS:7.2f}", flush=True
    )


def main() -> None:
    print(f"{'shape':12}{'mode':8}{'us':>8}{'best us':>9}{'us/packet':>11}{'best':>7}")
    for name, shape in SHAPES.items():
        plan = replace(shape, payload=bytes(range(256)) * (PACKETS * shape.size // 256 + 1))
        plan = replace(plan, payload=plan.payload[: PACKETS * plan.size])
        for mode, offloads in MODES.items():
            with closing(site_of(offloads, plan)) as site:
                site.update(underlay=UdpAddr(ip_address(SOURCE[0]), SOURCE[1]))
                report(name, mode, rounds(site, plan, offloads))
        report(name, "cipher", cipher_alone(plan))


if __name__ == "__main__":
    main()
