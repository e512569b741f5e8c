"""One system between two ends: the namespaces, what joins them, and the nodes that run there.

Data flow: runner -> [iperf_harness.bench] -> demo.netns, processes; cases <- [iperf_harness.bench] addresses
Topologies: `direct` is one veth pair, over which the kernel hands superpackets whole. `routed` puts a router
in between that cuts them to packets of the wire's size, so that the receiver's GRO has to put them together.
Source: veth(4), ethtool(8), ip-sysctl of the kernel's documentation.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from nebula_mp.demo.credentials import write_credentials
from nebula_mp.demo.netns import Lab, Namespace, run
from nebula_mp.errors import SystemCallError
from tools.iperf_harness.systems import DEFAULT_TUNNEL, IPV4, IPV6, MTU_BYTES, System, Tunnel, Values

PREFIX = "nmph"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those that end a run, by way of its cleaning up."""
DIRECT, ROUTED = "direct", "routed"
TOPOLOGIES = (DIRECT, ROUTED)
NAMES = ("a", "b")
OVERLAY = {
    IPV4: {"a": "10.42.0.1", "b": "10.42.0.2"},
    IPV6: {"a": "fd42::1", "b": "fd42::2"},
}
UNDERLAY = {  # RFC 5737 and RFC 3849: addresses for documentation
    IPV4: {"a": "192.0.2.1", "b": "198.51.100.2"},
    IPV6: {"a": "2001:db8:1::1", "b": "2001:db8:2::2"},
}
_DIRECT_UNDERLAY = {
    IPV4: {"a": "192.0.2.1", "b": "192.0.2.2"},
    IPV6: {"a": "2001:db8:1::1", "b": "2001:db8:1::2"},
}
_GATEWAY = {
    IPV4: {"a": "192.0.2.254", "b": "198.51.100.254"},
    IPV6: {"a": "2001:db8:1::fe", "b": "2001:db8:2::fe"},
}
_PREFIX_BITS = {IPV4: 24, IPV6: 64}
_FORWARDING = {IPV4: "ipv4/ip_forward", IPV6: "ipv6/conf/all/forwarding"}
_WIRE_MTU_BYTES = 1500
_PORT = 4242
_DEVICE = "bench0"
_READY_WITHIN_S = 20.0
_LOG_LINES = 8


@dataclass
class Node:
    """One end's process; `process` is None where nothing runs."""

    name: str
    space: Namespace
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    def check_running(self) -> None:
        """Raise SystemCallError, with its last words, when it has ended."""
        if self.process is not None and (code := self.process.poll()) is not None:
            raise SystemCallError(f"node {self.name} ended with {code}{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log, indented, each line with a line break before it."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "".join(f"\n    {self.name}: {line}" for line in lines[-_LOG_LINES:])


@dataclass
class Bench:
    """Two ends with one system between them; a context manager that leaves nothing behind.

    `start` comes first; then `client`, `server` and `target` are what to measure with. After a
    SystemCallError it can only be closed.
    """

    system: System
    topology: str
    workers: int
    congestion: str | None = None  # TCP's; None: the machine's
    tunnel: Tunnel = DEFAULT_TUNNEL
    lab: Lab = field(default_factory=lambda: Lab(f"{PREFIX}-{os.getpid()}"))
    nodes: list[Node] = field(default_factory=list)
    folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def client(self) -> Namespace:
        """Where connections start."""
        return self.nodes[0].space

    @property
    def server(self) -> Namespace:
        """Where they are answered."""
        return self.nodes[1].space

    @property
    def target(self) -> str:
        """Address of the server as the client reaches it."""
        return OVERLAY[self.tunnel.overlay]["b"] if self.system.is_tunnel else self._underlay("b")

    @property
    def roots(self) -> list[int]:
        """The first process of each node; empty without a tunnel."""
        return [node.process.pid for node in self.nodes if node.process is not None]

    def start(self) -> None:
        """Make the namespaces, start the nodes, and wait until the server answers the client."""
        self.folder = Path(tempfile.mkdtemp(prefix=f"iperf-harness-{os.getpid()}-"))
        self.nodes = [Node(name, self.lab.namespace(name), self.folder / f"{name}.log") for name in NAMES]
        self._join()
        if self.system.is_tunnel:
            overlay, bits = OVERLAY[self.tunnel.overlay], _PREFIX_BITS[self.tunnel.overlay]
            write_credentials(self.folder, {name: f"{overlay[name]}/{bits}" for name in NAMES})
            for node in self.nodes:
                self._launch(node)
        # Few ports repeat flows, and a table of flows looks better than it is.
        self.client.run("sh", "-c", "echo 1024 65535 > /proc/sys/net/ipv4/ip_local_port_range")
        self._wait_ready()

    def check_running(self) -> None:
        """Raise SystemCallError when a node has ended."""
        for node in self.nodes:
            node.check_running()

    def close(self) -> None:
        """End the nodes, remove namespaces and files; may be called again. Ctrl-C waits until it is done."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.lab.close()
        finally:
            for node in self.nodes:
                if node.process is not None:
                    node.process.wait()
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _join(self) -> None:
        # Without a tunnel the wire itself has the tunnel's MTU, so that everyone moves packets of one size.
        mtu = _WIRE_MTU_BYTES if self.system.is_tunnel else MTU_BYTES
        a, b = (node.space for node in self.nodes)
        bits, gateway = _PREFIX_BITS[self._wire], _GATEWAY[self._wire]
        here, there = (f"{self._underlay(name)}/{bits}" for name in NAMES)
        if self.topology == DIRECT:
            self.lab.join(a, b, [here], [there], mtu_bytes=mtu)
            return
        router = self.lab.namespace("r")
        for space, name, address in ((a, "a", here), (b, "b", there)):
            device = f"eth{name}"
            self.lab.join(space, router, [address], [f"{gateway[name]}/{bits}"], device=device, mtu_bytes=mtu)
            space.run("ip", "route", "add", "default", "via", gateway[name])
            router.run("ethtool", "-K", device, "tso", "off", "tx-udp-segmentation", "off")
            space.run("ethtool", "-K", device, "gro", "on")
        router.run("sh", "-c", f"echo 1 > /proc/sys/net/{_FORWARDING[self._wire]}")

    def _launch(self, node: Node) -> None:
        values = self._values(node.name)
        values.config.write_text(self.system.config_text(values))
        if check := self.system.check_argv(values):
            run(check)
        # The death signal outlives exec: not even a harness that is killed leaves a node behind.
        argv = ["setpriv", "--pdeathsig", "KILL", *self.system.argv(values)]
        with node.log.open("wb") as log:
            node.process = node.space.start(*argv, stdout=log)

    def _values(self, name: str) -> Values:
        assert self.folder is not None
        other = next(each for each in NAMES if each != name)
        return Values(
            name=name,
            folder=self.folder,
            overlay=OVERLAY[self.tunnel.overlay][name],
            peer_overlay=OVERLAY[self.tunnel.overlay][other],
            underlay=self._underlay(name),
            peer_underlay=self._underlay(other),
            port=_PORT,
            device=_DEVICE,
            workers=self.workers,
            cipher=self.tunnel.cipher,
        )

    @property
    def _wire(self) -> str:
        """The wire's IP version: without a tunnel the overlay's, so that everyone moves the same."""
        return self.tunnel.underlay if self.system.is_tunnel else self.tunnel.overlay

    def _underlay(self, name: str) -> str:
        return (_DIRECT_UNDERLAY if self.topology == DIRECT else UNDERLAY)[self._wire][name]

    def _wait_ready(self) -> None:
        """An answer through the tunnel shows everything that has to work, whatever the program is."""
        deadline = time.monotonic() + _READY_WITHIN_S
        while not _succeeds(lambda: self.client.run("ping", "-n", "-c", "1", "-W", "1", self.target)):
            self.check_running()
            if time.monotonic() > deadline:
                words = "".join(node.last_words() for node in self.nodes)
                raise SystemCallError(f"no answer from {self.target} within {_READY_WITHIN_S:g} s{words}")
            time.sleep(0.05)


def _succeeds(call: Callable[[], object]) -> bool:
    with contextlib.suppress(SystemCallError):
        call()
        return True
    return False


def other_harnesses() -> list[int]:
    """Process ids of runs of the harness on this machine that are going on now, ours excluded."""
    return sorted({pid for pid, _ in _spaces() if pid != os.getpid() and Path(f"/proc/{pid}").exists()})


def sweep_stale() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    for pid, name in _spaces():
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(SystemCallError):  # another run may be removing it too
                run(["ip", "netns", "del", name])


def _spaces() -> list[tuple[int, str]]:
    names = [path.name for path in Path("/run/netns").glob(f"{PREFIX}-*")]
    return [(int(pid), name) for name in names if (pid := name.split("-")[1]).isdigit()]
