"""What the demonstration measures, with the tools an operator would use: ping and iperf3.

Data flow: demo.story -> [demo.measure] -> ping, iperf3 -> [demo.measure] -> numbers
Knows nothing of Nebula: only addresses in a namespace.
Source: ping(8) of iputils, iperf3(1) with --json.
"""

import json
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nebula_mp.demo.netns import Namespace
from nebula_mp.demo.site import is_listening
from nebula_mp.errors import SystemCallError

IPERF_PORT = 5201
_REPLY_TIME = re.compile(r"\btime=([0-9.]+) ms")
_LISTEN_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Pings:
    """Round trips in milliseconds, one for each reply."""

    sent: int
    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Raises StatisticsError without any reply."""
        return statistics.median(self.times_ms)

    @property
    def loss_percent(self) -> float:
        """Share of requests that got no reply."""
        return 100 * (self.sent - len(self.times_ms)) / self.sent


def ping(space: Namespace, address: str, *, count: int, interval_s: float = 0.01) -> Pings:
    """Send `count` echo requests; each waits up to 5 s for its reply. SystemCallError if none came."""
    argv = ["ping", "-n", "-c", str(count), "-i", f"{interval_s:g}", "-W", "5", address]
    times = parse_ping(space.run(*argv))
    return Pings(count, times)


def parse_ping(text: str) -> tuple[float, ...]:
    """The round-trip times in ping's output, without replies it calls duplicates."""
    found = (_REPLY_TIME.search(line) for line in text.splitlines() if not line.endswith("(DUP!)"))
    return tuple(float(match[1]) for match in found if match)


@contextmanager
def iperf_server(space: Namespace, address: str) -> Iterator[None]:
    """An iperf3 server inside, listening when the block begins and gone when it ends."""
    argv = ["iperf3", "--server", "--bind", address, "--port", str(IPERF_PORT)]
    server = space.start(*argv, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _LISTEN_TIMEOUT_S
        while not is_listening(server.pid, "tcp", IPERF_PORT):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemCallError(f"the iperf3 server does not listen on {address}:{IPERF_PORT}")
            time.sleep(0.01)
        yield
    finally:
        server.terminate()
        try:
            server.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # asked in the middle of a goodbye it waits for its client for ever
            server.kill()
            server.wait()


def throughput(
    space: Namespace, server: Namespace, address: str, *, seconds: int, reverse: bool = False
) -> float:
    """Bits per second that one TCP stream from `space` to `server` at `address` delivered; `reverse`: back.

    Each measurement has a server of its own: one that still ends the last test turns the next client away.
    """
    argv = ["iperf3", "--client", address, "--port", str(IPERF_PORT), "--time", str(seconds), "--json"]
    argv += ["--connect-timeout", "5000", *(["--reverse"] if reverse else [])]
    with iperf_server(server, address):
        return parse_iperf(space.run(*argv, timeout_s=seconds + 30))


def parse_iperf(text: str) -> float:
    """Bits per second at the receiver; SystemCallError when there are none."""
    try:
        bits_per_second = float(json.loads(text)["end"]["sum_received"]["bits_per_second"])
    except (ValueError, KeyError, TypeError) as error:
        raise SystemCallError(f"iperf3 gave no result: {text.strip()[:200]!r}") from error
    if bits_per_second <= 0:
        raise SystemCallError("iperf3 got nothing through the tunnel")
    return bits_per_second
