"""The six steps of `nebula-mp demo`, from certificates to throughput, and the way back.

Data flow: cli.demo -> [demo.story] -> demo.credentials, demo.netns, demo.site, demo.measure -> cli.demo
Knows no terminal: each finished step is handed to the caller's `report`.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nebula_mp.demo import measure
from nebula_mp.demo.credentials import write_credentials
from nebula_mp.demo.netns import Lab, require_root_and_iproute
from nebula_mp.demo.site import UDP_PORT, Node, config_text
from nebula_mp.errors import SystemCallError

STEPS = 6
PINGS = 20
NAMES = ("a", "b")
UNDERLAY = {"a": "192.0.2.1", "b": "192.0.2.2"}  # RFC 5737: addresses for documentation
OVERLAY = {"a": "10.42.0.1", "b": "10.42.0.2"}
_PACKAGES = {"ping": "iputils-ping", "iperf3": "iperf3"}


@dataclass(frozen=True, slots=True)
class Step:
    """One finished step. `took_s` is None where a duration would say nothing."""

    number: int
    title: str
    text: str
    took_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured. `first_reply_ms` is the first ping: handshake and one round trip."""

    first_reply_ms: float
    pings_sent: int
    pings_received: int
    ping_median_ms: float
    a_to_b_bits_per_second: float
    b_to_a_bits_per_second: float
    busiest_node: str
    busiest_cpu_percent: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What `--keep` leaves behind: the commands that enter it and that remove it."""

    enter: tuple[str, ...]
    remove: tuple[str, ...]


def check_host() -> None:
    """Raise SystemCallError, naming the next step, when something the demonstration needs is not there."""
    require_root_and_iproute()
    missing = [package for command, package in _PACKAGES.items() if shutil.which(command) is None]
    if missing:
        raise SystemCallError(f"missing: {', '.join(missing)}. Next: apt-get install {' '.join(missing)}")


class Story:
    """Call `play`, then `close` whatever happened; `keep` before it leaves everything running."""

    def __init__(self, report: Callable[[Step], None]) -> None:
        self._report = report
        self._lab = Lab(f"nmp-{os.getpid()}")
        self._folder: Path | None = None
        self._nodes: dict[str, Node] = {}

    def play(self, *, seconds: int) -> Result:
        """Do the six steps; iperf3 takes `seconds` each way. SystemCallError when one of them fails."""
        self._make_credentials()
        self._make_namespaces()
        self._start_nodes()
        first_reply_ms = self._shake_hands()
        pings = self._ping()
        speeds, busiest, cpu_percent = self._load(seconds)
        return Result(
            first_reply_ms=first_reply_ms,
            pings_sent=pings.sent,
            pings_received=len(pings.times_ms),
            ping_median_ms=pings.median_ms,
            a_to_b_bits_per_second=speeds[0],
            b_to_a_bits_per_second=speeds[1],
            busiest_node=busiest,
            busiest_cpu_percent=cpu_percent,
        )

    def keep(self) -> Kept:
        """Leave nodes, namespaces and files as they are; `close` does nothing afterwards."""
        spaces = [node.space.name for node in self._nodes.values()]
        pids = [str(node.pid) for node in self._nodes.values()]
        enter = (
            f"ip netns exec {spaces[0]} ping {OVERLAY['b']}",
            f"ip netns exec {spaces[1]} bash",
            f"tail -f {' '.join(str(node.log) for node in self._nodes.values())}",
        )
        remove = (
            f"sh -c 'kill {' '.join(pids)}'",  # as a program of its own, kill may not be installed
            *(f"ip netns del {space}" for space in spaces),
            f"rm -r {self._folder}",
        )
        self._lab = Lab()
        self._folder = None
        self._nodes.clear()
        return Kept(enter, remove)

    def close(self) -> None:
        """End the nodes, remove namespaces and files; may be called again."""
        try:
            self._lab.close()
        finally:
            for node in self._nodes.values():
                node.reap()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _make_credentials(self) -> None:
        began = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix=f"nebula-mp-demo-{os.getpid()}-"))
        write_credentials(self._folder, {name: f"{OVERLAY[name]}/24" for name in NAMES})
        self._report(Step(1, "certificates", 'CA "demo", nodes a and b', time.monotonic() - began))

    def _make_namespaces(self) -> None:
        assert self._folder is not None
        for name in NAMES:
            self._nodes[name] = Node(name, self._lab.namespace(name), self._folder)
        a, b = (self._nodes[name].space for name in NAMES)
        self._lab.join(a, b, [f"{UNDERLAY['a']}/24"], [f"{UNDERLAY['b']}/24"])
        self._report(Step(2, "namespaces", f"{a.name} <-veth-> {b.name}"))

    def _start_nodes(self) -> None:
        assert self._folder is not None
        began = time.monotonic()
        for name, node in self._nodes.items():
            peers = {OVERLAY[other]: UNDERLAY[other] for other in NAMES if other != name}
            node.config.write_text(config_text(self._folder, name, peers))
            node.start()
        kernels = {node.wait_ready(): None for node in self._nodes.values()}
        what = f"{len(NAMES)} nodes, kernel {', '.join(kernels)}"
        self._report(Step(3, "start", what, time.monotonic() - began))

    def _shake_hands(self) -> float:
        """The first packet waits for the handshake that it starts, so its reply measures both."""
        milliseconds = self._ping_peer(count=1).median_ms
        self._report(Step(4, "handshake", f"a -> b direct {UNDERLAY['b']}:{UDP_PORT}", milliseconds / 1000))
        return milliseconds

    def _ping(self) -> measure.Pings:
        pings = self._ping_peer(count=PINGS)
        replies = len(pings.times_ms)
        self._report(Step(5, "ping", f"{replies}/{pings.sent}, median {1000 * pings.median_ms:.0f} us"))
        if replies < pings.sent:
            raise SystemCallError(
                f"ping through the tunnel: {pings.loss_percent:.0f} % of {pings.sent} were lost"
            )
        return pings

    def _ping_peer(self, *, count: int) -> measure.Pings:
        try:
            return measure.ping(self._nodes["a"].space, OVERLAY["b"], count=count)
        except SystemCallError:
            for node in self._nodes.values():
                node.check_running()  # a node that ended is the better explanation
            raise

    def _load(self, seconds: int) -> tuple[tuple[float, float], str, float]:
        """Bits per second a -> b and b -> a; the node that used most processor time, in percent of a core."""
        a, b = (self._nodes[name].space for name in NAMES)
        began = time.monotonic()
        before = {name: node.cpu_seconds() for name, node in self._nodes.items()}
        speeds = (
            measure.throughput(a, b, OVERLAY["b"], seconds=seconds),
            measure.throughput(a, b, OVERLAY["b"], seconds=seconds, reverse=True),
        )
        elapsed = time.monotonic() - began
        used = {
            name: 100 * (node.cpu_seconds() - before[name]) / elapsed for name, node in self._nodes.items()
        }
        busiest = max(used, key=used.__getitem__)
        text = (
            f"a -> b {speeds[0] / 1e9:.2f}, b -> a {speeds[1] / 1e9:.2f} Gbit/s; "
            f"busiest process: {busiest} at {used[busiest]:.0f} %"
        )
        self._report(Step(6, "throughput", text))
        return speeds, busiest, used[busiest]
