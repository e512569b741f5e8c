"""What a new flow costs control: `python -m tests.bench.flows`, in one process, without a network.

Prints microseconds of CPU for each upcall of a real Control over real shared memory and a loopback socket, the
median of many wake-ups and the best one, by how many upcalls one wake-up finds. Counted is all that control
does from its bell to the last row that readers see; the queue of the device is a pair of sockets.
What is expected: sealing 2 us, sendto 3 us or write 2 us, the rest is Python.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from nebula_mp.datapath.api import Arrival, UpcallReason
from nebula_mp.wire.header import MessageType
from tests.workers.control_rig import Rig, inbound, now_ms, outbound

WAKES = 300
AT_ONCE = (1, 16)
UPCALLS_PER_S = 8_000  # readers limit them

Ask = Callable[[Sequence[int]], None]


def main() -> None:
    """Measure upcalls of both directions."""
    with ExitStack() as undo:
        rig = Rig(undo)

        async def story() -> None:
            await rig.connect()
            ports = itertools.cycle(range(1024, 65_536))
            print(f"{'us of CPU for an upcall':28}{'at once':>8}{'median':>9}{'best':>9}")
            for name, ask, empty in _directions(rig):
                for at_once in AT_ONCE:
                    costs = sorted(_measure(rig, ask, empty, ports, at_once))
                    print(f"{name:28}{at_once:>8}{statistics.median(costs):>9.1f}{costs[0]:>9.1f}")

        rig.play(story)


def _directions(rig: Rig) -> Iterator[tuple[str, Ask, Callable[[], object]]]:
    hand, tunnel = rig.owner(), rig.tunnel()

    def out(ports: Sequence[int]) -> None:
        hand.ask(*(outbound(port=port) for port in ports))

    def into(ports: Sequence[int]) -> None:
        arrival = Arrival(rig.peer.at, MessageType.MESSAGE, 0, now_ms())
        for port in ports:
            hand.upcalls.opened(UpcallReason.NEW_FLOW_IN, arrival, tunnel.local_index, inbound(port=port))
        hand.upcalls.flush()

    def sent() -> None:
        while True:
            try:
                rig.peer.socket.recv(2048)
            except BlockingIOError:
                return

    yield "new flow out", out, sent
    yield "new flow in", into, lambda: (rig.stack(0), rig.stack(1))


def _measure(
    rig: Rig, ask: Ask, empty: Callable[[], object], ports: Iterator[int], at_once: int
) -> Iterator[float]:
    for _ in range(WAKES):
        time.sleep(at_once / UPCALLS_PER_S)
        ask([next(ports) for _ in range(at_once)])
        before = time.process_time_ns()
        rig.control._on_bell()
        yield (time.process_time_ns() - before) / 1000 / at_once
        empty()


if __name__ == "__main__":
    main()
