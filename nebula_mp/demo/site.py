"""One node of the demonstration: its configuration, its process, and whether it is up.

Data flow: demo.story -> [demo.site] -> `nebula-mp start` in a namespace; /proc -> [demo.site] -> demo.story
Looks at the process only from outside. Nothing here depends on which program plays the node.
Source: proc_pid_net(5).
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from nebula_mp.demo.netns import Namespace
from nebula_mp.errors import SystemCallError

UDP_PORT = 4242
DEVICE = "nmpdemo"
_READY_TIMEOUT_S = 15.0
_LOG_LINES = 8
_KERNEL = re.compile(r" kernel=(\w+)\b")  # in the line that says that it is up


def config_text(folder: Path, name: str, peers: dict[str, str]) -> str:
    """A node's whole configuration; `peers` maps overlay addresses to underlay addresses."""
    settings = {
        "pki": {"ca": f"{folder}/ca.crt", "cert": f"{folder}/{name}.crt", "key": f"{folder}/{name}.key"},
        "static_host_map": {overlay: [f"{underlay}:{UDP_PORT}"] for overlay, underlay in peers.items()},
        "listen": {"host": "0.0.0.0", "port": UDP_PORT},  # noqa: S104 - inside its own namespace
        "tun": {"dev": DEVICE},
        "firewall": {
            direction: [{"port": "any", "proto": "any", "host": "any"}]
            for direction in ("inbound", "outbound")
        },
        "mp": {"run_dir": f"{folder}/run-{name}"},
    }
    # A YAML mapping whose values are JSON, which is YAML as well.
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())


class Node:
    """A running node. Call `start`, then `wait_ready`; ending it is up to the namespace, then `reap`."""

    def __init__(self, name: str, space: Namespace, folder: Path) -> None:
        self.name = name
        self.space = space
        self.config = folder / f"{name}.yml"
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; `start` comes first."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the program in its namespace; what it prints goes to its log file."""
        argv = [sys.executable, "-m", "nebula_mp", "start", "-config", str(self.config)]
        with self.log.open("wb") as log:
            self._process = self.space.start(*argv, stdout=log)

    def wait_ready(self) -> str:
        """Return when the overlay has its route and the underlay its socket; SystemCallError if never.

        Gives the kernel that the node says it has.
        """
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not (self._is_ready() and (kernel := _KERNEL.search(self.log.read_text(errors="replace")))):
            self.check_running()
            if time.monotonic() > deadline:
                raise SystemCallError(
                    f"node {self.name} was not ready within {_READY_TIMEOUT_S:g} s\n{self._last_words()}"
                )
            time.sleep(0.01)
        return kernel[1]

    def check_running(self) -> None:
        """Raise SystemCallError, with the node's own exit code and last words, when it has ended."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            message = f"node {self.name} ended with {code}\n{self._last_words()}"
            raise SystemCallError(message, exit_code=code if code in {1, 4, 5} else 1)

    def cpu_seconds(self) -> float:
        """Processor time of the node so far, user and system, with its children."""
        processes = [parent := psutil.Process(self.pid), *parent.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def reap(self) -> None:
        """Wait for the process, which something else has ended."""
        if self._process is not None:
            self._process.wait()

    def _is_ready(self) -> bool:
        return _has_route(self.pid, DEVICE) and is_listening(self.pid, "udp", UDP_PORT)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(f"  {self.name}: {line}" for line in lines) or f"  {self.name}: (it said nothing)"


def _proc_net(pid: int, table: str) -> list[list[str]]:
    """Rows of a table in /proc/PID/net, which shows the namespace of that process; empty if it is gone."""
    try:
        return [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    except OSError:
        return []


def _has_route(pid: int, device: str) -> bool:
    return any(row[0] == device for row in _proc_net(pid, "route"))


def is_listening(pid: int, protocol: str, port: int) -> bool:
    """Whether a socket of `protocol` ("udp", "tcp") is bound to `port` in the namespace of that process."""
    rows = [*_proc_net(pid, protocol), *_proc_net(pid, f"{protocol}6")]
    unconnected = {"udp": "07", "tcp": "0A"}[protocol]
    return any(int(row[1].rpartition(":")[2], 16) == port and row[3] == unconnected for row in rows)
