"""tools/iperf_harness: what the reports of the generators say, and our own generator of connections."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nebula_mp.errors import SystemCallError
from tools.iperf_harness import connections, traffic
from tools.iperf_harness.bench import Bench
from tools.iperf_harness.cases import CASES

CONNECTIONS = connections.__file__
WITHIN_S = 30.0


def end_of(**sums: dict[str, float]) -> dict[str, Any]:
    return {"end": {**sums, "sender_tcp_congestion": "cubic"}}


def test_both_directions_of_tcp_are_summed_up() -> None:
    report = end_of(
        sum_sent={"retransmits": 3},
        sum_received={"bytes": 1e9, "bits_per_second": 2e9},
        sum_sent_bidir_reverse={"retransmits": 4},
        sum_received_bidir_reverse={"bytes": 5e8, "bits_per_second": 1e9},
    )

    assert traffic.tcp_figures(report) == {"gbit_per_s": 3.0, "gigabytes": 1.5, "retransmits": 7.0}
    assert traffic.congestion_control(report) == "cubic"


def test_packets_are_those_that_arrived_and_the_share_lost_is_of_those_sent() -> None:
    report = end_of(sum_sent={"packets": 1000}, sum_received={"bytes": 64 * 750, "seconds": 0.5})

    figures = traffic.udp_figures(report, 64)

    assert figures == {"packets_per_s": 1500.0, "packets": 750.0, "sent": 1000.0, "loss_percent": 25.0}


def test_round_trips_are_summed_up_in_microseconds_with_what_was_lost() -> None:
    text = "".join(
        f"64 bytes from 10.42.0.2: icmp_seq={at} ttl=64 time={at / 1000} ms\n" for at in range(1, 100)
    )

    assert traffic.ping_figures(text, 100) == {
        "rtt_us": 50.0,
        "rtt_p99_us": 99.0,
        "packets": 198.0,
        "lost": 1.0,
    }


def test_a_generator_through_which_nothing_came_is_an_error() -> None:
    nothing = end_of(
        sum_sent={"packets": 0, "retransmits": 0},
        sum_received={"bytes": 0, "bits_per_second": 0, "seconds": 1},
    )

    with pytest.raises(SystemCallError, match="nothing arrived"):
        traffic.tcp_figures(nothing)
    with pytest.raises(SystemCallError, match="no packet arrived"):
        traffic.udp_figures(nothing, 64)
    with pytest.raises(SystemCallError, match="no reply"):
        traffic.ping_figures("", 10)
    with pytest.raises(SystemCallError, match="3 failed"):
        traffic.connect_figures({"connections": 0, "failures": 3, "seconds": 1})


@pytest.mark.parametrize(
    ("values_", "percent", "expected"),
    [
        ([7], 50, 7),
        ([7], 99, 7),
        ([1, 2], 50, 1),
        ([1, 2, 3], 50, 2),
        (list(range(1, 101)), 99, 99),
        ([1, 2], 100, 2),
    ],
)
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(
    values_: list[int], percent: int, expected: int
) -> None:
    assert connections.percentile(values_, percent) == expected


@contextmanager
def connection_server(address: str, port: int) -> Iterator[None]:
    argv = [sys.executable, "-IS", CONNECTIONS, "serve", address, str(port), "2"]
    with subprocess.Popen(argv, start_new_session=True) as server:
        try:
            deadline = time.monotonic() + WITHIN_S
            while not answers(address, port):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def family(address: str) -> socket.AddressFamily:
    return {4: socket.AF_INET, 6: socket.AF_INET6}[ip_address(address).version]


def answers(address: str, port: int) -> bool:
    with socket.socket(family(address)) as client:
        return client.connect_ex((address, port)) == 0


def load(address: str, port: int) -> dict[str, float]:
    argv = [sys.executable, "-IS", CONNECTIONS, "load", address, str(port), "2", "0.3"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S, check=True)
    figures = json.loads(done.stdout)
    assert isinstance(figures, dict)
    return figures


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_connections_are_made_counted_and_timed_and_those_refused_are_failures(address: str) -> None:
    with socket.create_server((address, 0), family=family(address)) as free:
        port = free.getsockname()[1]

    refused = load(address, port)
    with connection_server(address, port):
        served = load(address, port)

    assert refused["connections"] == 0
    assert refused["failures"] > 0
    assert served["connections"] > 0
    assert served["failures"] == 0
    assert 0 < served["p50_us"] <= served["p99_us"]


@pytest.mark.parametrize("option", [socket.SO_RCVBUF, socket.SO_SNDBUF])
def test_linux_gives_the_buffers_of_udp_that_iperf3_insists_on(option: int) -> None:
    size = traffic.udp_buffer_bytes()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.setsockopt(socket.SOL_SOCKET, option, size)
        assert made.getsockopt(socket.SOL_SOCKET, option) >= size
    assert 0 < size <= traffic.UDP_BUFFER_BYTES


@pytest.mark.parametrize("case", ["udp-64", "udp-1200", "udp-paced"])
def test_iperf3_is_asked_for_these_buffers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def iperf(*arguments: object, seconds: float) -> dict[str, Any]:
        asked.extend(str(each) for each in arguments[3:])
        return end_of(sum_sent={"packets": 1}, sum_received={"bytes": 1200, "seconds": seconds})

    monkeypatch.setattr(traffic, "iperf", iperf)
    bench = cast(Bench, SimpleNamespace(client=None, server=None, target="10.0.0.2"))
    CASES[case].send(bench, 1.0)

    assert asked[asked.index("--window") + 1] == str(traffic.udp_buffer_bytes())
