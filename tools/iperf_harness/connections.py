"""New TCP connections as fast as they go: connect, one byte there, one byte back, closed by the server.

Data flow: cases -> [iperf_harness.connections] serve, load, one process each -> JSON on stdout -> cases
A program of its own on the standard library alone. Each connection at once is a process that blocks, which
costs less in Python than a loop over events. The client lets the server close first: its ports need not wait.
Source: RFC 9293 section 3.6.1 (TIME-WAIT is where the first close was).
"""

import json
import os
import select
import signal
import socket
import struct
import sys
import time
from array import array

_BACKLOG = 512
_GRACE_S = 5.0
"""How long after its time a connection may still take; the first two repetitions of a lost SYN are within."""


def serve(address: str, port: int, workers: int) -> None:
    """Answer until killed."""
    with socket.create_server((address, port), family=_family(address), backlog=_BACKLOG) as listener:
        for _ in range(workers - 1):
            if os.fork() == 0:
                break
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.send(connection.recv(1))
                except OSError:
                    continue  # the client has given up


def load(address: str, port: int, at_once: int, seconds: float) -> dict[str, float]:
    """What `at_once` clients got in `seconds`: connections and failures, seconds taken, latencies in us."""
    begin = time.monotonic()
    clients = [_start_client(address, port, begin + seconds) for _ in range(at_once)]
    latencies = array("q")
    failures = 0
    for pid, pipe in clients:
        answer = _read_until(pipe, begin + seconds + _GRACE_S)
        os.kill(pid, signal.SIGKILL)  # a client that has answered has nothing left to do
        os.waitpid(pid, 0)
        if not answer:
            failures += 1  # it hangs in a connection, or broke
            continue
        failures += struct.unpack_from("!I", answer)[0]
        latencies.frombytes(answer[4:])
    return summary(latencies, failures, seconds)


def summary(latencies_ns: "array[int]", failures: int, seconds: float) -> dict[str, float]:
    """The figures of all clients together; without any connection the latencies are missing."""
    ordered = sorted(latencies_ns)
    figures = {"connections": float(len(ordered)), "failures": float(failures), "seconds": seconds}
    if ordered:
        figures |= {"p50_us": percentile(ordered, 50) / 1e3, "p99_us": percentile(ordered, 99) / 1e3}
    return figures


def percentile(ordered: list[int], percent: int) -> int:
    """The smallest value that `percent` of the values do not exceed; `ordered` is ascending, not empty."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def _start_client(address: str, port: int, deadline: float) -> tuple[int, int]:
    """Process and the pipe it answers on: failures as u32, then the latencies as i64 of this machine."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) != 0:
        os.close(theirs)
        return pid, ours
    try:
        latencies, failures = _connect_until(address, port, deadline)
        with open(theirs, "wb") as pipe:  # noqa: PTH123 - a descriptor
            pipe.write(struct.pack("!I", failures) + latencies.tobytes())
    finally:
        os._exit(0)


def _connect_until(address: str, port: int, deadline: float) -> tuple["array[int]", int]:
    latencies = array("q")
    failures = 0
    clock = time.perf_counter_ns
    family = _family(address)
    end = clock() + int((deadline - time.monotonic()) * 1e9)
    while (began := clock()) < end:
        try:
            with socket.socket(family) as client:
                client.connect((address, port))
                client.send(b"x")
                answered = client.recv(1) == b"x" and not client.recv(1)
        except OSError:
            answered = False
        if answered:
            latencies.append(clock() - began)
        else:
            failures += 1
            time.sleep(0.01)  # a server that refuses is not to be flooded
    return latencies, failures


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _read_until(pipe: int, deadline: float) -> bytes | None:
    """All that is written until the other end closes; None if it has not by `deadline`."""
    parts: list[bytes] = []
    try:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (part := os.read(pipe, 1 << 20)):
                return b"".join(parts)
            parts.append(part)
        return None
    finally:
        os.close(pipe)


def main(argv: list[str]) -> None:
    """`serve ADDRESS PORT WORKERS` or `load ADDRESS PORT AT_ONCE SECONDS`."""
    match argv:
        case ["serve", address, port, workers]:
            serve(address, int(port), int(workers))
        case ["load", address, port, at_once, seconds]:
            print(json.dumps(load(address, int(port), int(at_once), float(seconds))))
        case _:
            sys.exit(main.__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
