"""The programs that make traffic: iperf3, ping and our own connections, and what their reports say.

Data flow: cases -> [iperf_harness.traffic] -> iperf3, ping, connections in namespaces -> figures -> cases
Knows only addresses in a namespace, nothing of tunnels.
Source: iperf3(1) with --json (3.12), ping(8) of iputils.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nebula_mp.demo.measure import IPERF_PORT, iperf_server, parse_ping
from nebula_mp.demo.netns import Namespace
from nebula_mp.demo.site import is_listening
from nebula_mp.errors import SystemCallError
from tools.iperf_harness.connections import percentile

PACKAGES = {
    "ip": "iproute2",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
    "ethtool": "ethtool",
    "setpriv": "util-linux",
}
PING_INTERVAL_S = 0.002
UDP_BUFFER_BYTES = 8 << 20
"""iperf3's socket buffers for UDP. Its usual one holds 277 small packets, no more than one or two batches."""
_CONNECTIONS = str(Path(__file__).with_name("connections.py"))
_CONNECT_PORT = 5202
_LISTEN_WITHIN_S = 10.0
_SPARE_S = 40.0
"""How long a generator may take beyond its own time before it counts as stuck."""

Figures = dict[str, float]


def check_tools() -> None:
    """Raise SystemCallError naming the packages of what is missing."""
    if missing := [package for command, package in PACKAGES.items() if shutil.which(command) is None]:
        raise SystemCallError(f"missing: {', '.join(missing)}. Next: apt-get install {' '.join(missing)}")


def iperf(
    client: Namespace, server: Namespace, address: str, *options: str, seconds: float
) -> dict[str, Any]:
    """What iperf3 reports of one run from `client` to `address`; SystemCallError with its own words."""
    argv = ["iperf3", "--client", address, "--port", str(IPERF_PORT), "--json", "--connect-timeout", "5000"]
    argv += ["--time", f"{seconds:g}", *options]
    with iperf_server(server, address):
        try:
            text = client.run(*argv, timeout_s=seconds + _SPARE_S)
        except SystemCallError as error:
            said = re.search(r'"error":\s*"([^"]*)"', str(error))
            raise SystemCallError(f"iperf3: {said[1]}" if said else str(error)) from error
    return _report(text)


def udp_buffer_bytes() -> int:
    """What to ask for iperf3: `UDP_BUFFER_BYTES`, or what Linux gives. Raises SystemCallError.

    Linux doubles what it is asked for, up to twice its limits; iperf3 ends if it sees less than it wanted.
    """
    paths = [Path("/proc/sys/net/core", name) for name in ("rmem_max", "wmem_max")]
    try:
        return min(UDP_BUFFER_BYTES, *(2 * int(path.read_text()) for path in paths))
    except OSError as error:
        raise SystemCallError(f"{error.filename}: {error.strerror}") from error


def tcp_figures(report: Mapping[str, Any]) -> Figures:
    """Gbit/s at the receivers, GB and retransmissions of a TCP report, both directions together."""
    ends = [end for key, end in report["end"].items() if key.startswith("sum_received")]
    sent = [end for key, end in report["end"].items() if key.startswith("sum_sent")]
    figures = {
        "gbit_per_s": sum(end["bits_per_second"] for end in ends) / 1e9,
        "gigabytes": sum(end["bytes"] for end in ends) / 1e9,
        "retransmits": float(sum(end.get("retransmits", 0) for end in sent)),
    }
    if figures["gigabytes"] <= 0:
        raise SystemCallError("iperf3: nothing arrived")
    return figures


def udp_figures(report: Mapping[str, Any], length: int) -> Figures:
    """Packets per second that arrived, and the share of those sent that did not."""
    sent, received = report["end"]["sum_sent"], report["end"]["sum_received"]
    arrived = received["bytes"] / length
    if arrived <= 0 or sent["packets"] <= 0:
        raise SystemCallError("iperf3: no packet arrived")
    return {
        "packets_per_s": arrived / received["seconds"],
        "packets": arrived,
        "sent": float(sent["packets"]),
        "loss_percent": max(0.0, 100 * (1 - arrived / sent["packets"])),
    }


def congestion_control(report: Mapping[str, Any]) -> str:
    """The sender's TCP congestion control, which decides how a loss shows."""
    return str(report["end"].get("sender_tcp_congestion", ""))


def ping_train(client: Namespace, address: str, *, count: int) -> Figures:
    """Round trips of `count` requests 2 ms apart, in microseconds."""
    argv = ["ping", "-n", "-c", str(count), "-i", f"{PING_INTERVAL_S:g}", "-W", "5", address]
    text = client.run(*argv, timeout_s=count * PING_INTERVAL_S + _SPARE_S)
    return ping_figures(text, count)


def ping_figures(text: str, count: int) -> Figures:
    """Median and 99th percentile of ping's output; SystemCallError without any reply."""
    times_ns = sorted(int(time_ms * 1e6) for time_ms in parse_ping(text))
    if not times_ns:
        raise SystemCallError("ping: no reply")
    return {
        "rtt_us": statistics.median(times_ns) / 1e3,
        "rtt_p99_us": percentile(times_ns, 99) / 1e3,
        "packets": 2.0 * len(times_ns),
        "lost": float(count - len(times_ns)),
    }


def connect(client: Namespace, server: Namespace, address: str, *, at_once: int, seconds: float) -> Figures:
    """New TCP connections per second, `at_once` at a time, and what one takes, in microseconds."""
    with _connection_server(server, address, at_once):
        words = ("load", address, str(_CONNECT_PORT), str(at_once), f"{seconds:g}")
        text = client.run(sys.executable, "-IS", _CONNECTIONS, *words, timeout_s=seconds + _SPARE_S)
    return connect_figures(_report(text))


def connect_figures(report: Mapping[str, float]) -> Figures:
    """Rate and latencies of what `connections` reports; SystemCallError without any connection."""
    if not report["connections"]:
        raise SystemCallError(f"no connection came through, {report['failures']:.0f} failed")
    return {
        "connections_per_s": report["connections"] / report["seconds"],
        "connections": report["connections"],
        "p50_us": report["p50_us"],
        "p99_us": report["p99_us"],
        "failures": report["failures"],
    }


@contextlib.contextmanager
def _connection_server(space: Namespace, address: str, workers: int) -> Iterator[None]:
    argv = [sys.executable, "-IS", _CONNECTIONS, "serve", address, str(_CONNECT_PORT), str(workers)]
    server = space.start(*argv, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _LISTEN_WITHIN_S
        while not is_listening(server.pid, "tcp", _CONNECT_PORT):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemCallError(f"the connection server does not listen on {address}:{_CONNECT_PORT}")
            time.sleep(0.01)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # a session of its own: its workers are in the group
        server.wait()


def _report(text: str) -> dict[str, Any]:
    try:
        report = json.loads(text)
    except ValueError as error:
        raise SystemCallError(f"no report but {text.strip()[:200]!r}") from error
    if not isinstance(report, dict):
        raise SystemCallError(f"no report but {text.strip()[:200]!r}")
    if "error" in report:
        raise SystemCallError(f"iperf3: {report['error']}")
    return report
