"""A gateway under test in a site: ours or a real Nebula, with generated configuration and kept logs.

Data flow: tests/e2e -> [support.nodes] -> one process per node in a support.netns.Site
Knows how each program is started, stopped and seen to be ready; knows nothing of traffic.
Source: examples/config.yml of slackhq/nebula, docs of `nebula-mp start`.
"""

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nebula_mp.cli.client import Client
from nebula_mp.errors import InstanceError, SystemCallError
from nebula_mp.newtypes import IPAddress, UdpAddr
from nebula_mp.workers.instance import socket_path
from tests.support.netns import Site, Wire, wait_until
from tests.support.peers import OURS, STAND_IN, CertTool, binary, our_command

PORT = 4242
DEVICE = "nebula1"
MTU_BYTES = 1300
START_WITHIN_S = 10.0
ANY = ({"port": "any", "proto": "any", "host": "any"},)
_FIELD = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|(\S*))')


@dataclass(frozen=True)
class Host:
    """What a node is in the overlay: addresses as the certificate states them, and its files."""

    name: str
    networks: tuple[str, ...]
    certificate: Path
    key: Path
    authority: Path

    def address(self, family: int) -> IPAddress:
        """The overlay address of that IP version."""
        return next(
            interface.ip for text in self.networks if (interface := ip_interface(text)).version == family
        )

    @property
    def families(self) -> tuple[int, ...]:
        """IP versions this host has an overlay address of."""
        return tuple(dict.fromkeys(ip_interface(text).version for text in self.networks))


def workers_of_this_run() -> int | None:
    """How many workers our program has where a test does not say; None: as many as it wants."""
    text = os.environ.get("NEBULA_MP_TEST_WORKERS", "")
    return int(text) if text else None


def drain_of_this_run() -> str | None:
    """Who drains the rings where a test does not say; None: our program's own choice."""
    return os.environ.get("NEBULA_MP_TEST_DRAIN") or None


@dataclass(frozen=True)
class Process:
    """One process of our program, as `nebula-mp workers --json` shows it."""

    role: str
    worker: int | None
    pid: int | None  # None, as some others, while there is no process
    core: int | None
    cpu_s: float | None
    state: str
    restarts: int
    uptime_s: int | None
    packets_in: int
    packets_out: int
    ring_fill: int | None

    @property
    def name(self) -> str:
        """As the log names it: `reader/0`, `control`."""
        return f"{self.role}/{self.worker}" if self.role in {"reader", "writer"} else self.role

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> "Process":
        """Take the fields that are known here; a missing one fails the test."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal), and how long that took."""

    code: int
    seconds: float


@dataclass
class Node:
    """One gateway. `start` may be called again after `stop`, `kill` or `wait_for_end`.

    `static` maps overlay addresses to underlay addresses: whoever has an entry can start a handshake.
    `names` are what /etc/hosts holds for this process. `workers`, `drain` and `kernel` go into the file,
    `flags` onto the command line; all of them are for our own program only. Without `kernel` it is what
    NEBULA_MP_KERNEL says.
    """

    program: str
    site: Site
    host: Host
    home: Path
    static: Mapping[IPAddress, Sequence[UdpAddr | str]] = field(default_factory=dict)
    cipher: str = "aes"
    listen: str = "0.0.0.0"
    inbound: Sequence[Mapping[str, Any]] = ANY
    extra: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, IPAddress] = field(default_factory=dict)
    workers: int | None = field(default_factory=workers_of_this_run)
    drain: str | None = field(default_factory=drain_of_this_run)
    kernel: str | None = None
    flags: Sequence[str] = ()
    process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)

    @property
    def is_ours(self) -> bool:
        """Whether our program runs here (and not a real Nebula in its place)."""
        return self.program == OURS and not STAND_IN

    @property
    def effective(self) -> str:
        """The program that really runs here: `ours` or a release."""
        return STAND_IN if self.program == OURS and STAND_IN else self.program

    @property
    def config_path(self) -> Path:
        """Where `start` writes the configuration."""
        return self.home / "config.yml"

    @property
    def run_dir(self) -> Path:
        """Where our program makes its control socket."""
        return self.home / "run"

    @property
    def log_path(self) -> Path:
        """stdout and stderr of every start, one after the other."""
        return self.home / "log"

    @property
    def log(self) -> str:
        """All it has said so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """Process id; only while it runs."""
        assert self.process is not None
        return self.process.pid

    def config(self) -> dict[str, Any]:
        """The configuration file's content."""
        config: dict[str, Any] = {
            "pki": {
                "ca": str(self.host.authority),
                "cert": str(self.host.certificate),
                "key": str(self.host.key),
            },
            "cipher": self.cipher,
            "static_host_map": {
                str(peer): [str(to) for to in remotes] for peer, remotes in self.static.items()
            },
            "listen": {"host": self.listen, "port": PORT},
            "tun": {"dev": DEVICE, "mtu": MTU_BYTES},
            "firewall": {"outbound": list(ANY), "inbound": list(self.inbound)},
            "logging": {"level": "debug"},
        }
        if self.is_ours:
            config["mp"] = {"run_dir": str(self.run_dir)}
            config["mp"] |= {} if self.workers is None else {"workers": self.workers}
            config["mp"] |= {} if self.drain is None else {"drain": self.drain}
            config["mp"] |= {} if self.kernel is None else {"kernel": self.kernel}
        for key, value in self.extra.items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
        return config

    def command(self) -> list[str]:
        """The argv of the program with this configuration, without the namespace."""
        if self.effective == OURS:
            # What a ring area held is overwritten when it is released: nothing may still be sent from there.
            poison = ["env", "NEBULA_MP_POISON=1"]
            return [*poison, *our_command("start", "-c", str(self.config_path), *self.flags)]
        return [str(binary(self.effective)), "-config", str(self.config_path)]

    def write_config(self) -> None:
        """Write the configuration anew; a running program takes it at a reload."""
        self.config_path.write_text(yaml.safe_dump(self.config()))

    def launch(self) -> None:
        """Start the process and return at once."""
        assert self.process is None or self.process.poll() is not None, "still running"
        self.write_config()
        # The death signal outlives exec: not even a killed test run leaves a gateway behind.
        argv = ["setpriv", "--pdeathsig", "KILL", *self.command()]
        if self.names:
            hosts = self.home / "hosts"
            hosts.write_text("".join(f"{address} {name}\n" for name, address in self.names.items()))
            # `ip netns exec` gives each process mounts of its own: the machine's /etc/hosts stays as it is.
            argv = ["sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh", *argv]
        with self.log_path.open("ab") as log:
            self.process = self.site.space.start(*argv, stdout=log)

    def start(self) -> None:
        """Start it and wait until device and socket are there; AssertionError with its log otherwise."""
        self.launch()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the device has its addresses and the UDP port is bound."""
        deadline = time.monotonic() + START_WITHIN_S
        while not self.is_ready():
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"{self.label} ended with {self.process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.label} is not ready after {START_WITHIN_S:g} s:\n{self.log}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        """Whether the overlay device carries every address and the underlay port is bound."""
        if not self.site.has_device(DEVICE):
            return False
        addresses = self.site.ip("-o", "address", "show", "dev", DEVICE, "up")
        return all(f" {text} " in addresses for text in self.host.networks) and self._is_bound()

    def _is_bound(self) -> bool:
        wanted = f":{PORT:04X} "
        tables = (Path(f"/proc/{self.pid}/net/{name}") for name in ("udp", "udp6"))
        try:
            return any(wanted in table.read_text() for table in tables)
        except OSError:
            return False

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait_for_end(self, *, within_s: float) -> Ended:
        """Wait for the process to end by itself; AssertionError if it does not."""
        assert self.process is not None
        started = time.monotonic()
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.label} runs on after {within_s:g} s:\n{self.log[-4000:]}") from None
        return Ended(code, time.monotonic() - started)

    def stop(self, *, within_s: float = 5.0) -> Ended:
        """SIGTERM, and wait."""
        self.send_signal(signal.SIGTERM)
        return self.wait_for_end(within_s=within_s)

    def kill(self) -> Ended:
        """SIGKILL, and wait."""
        self.send_signal(signal.SIGKILL)
        return self.wait_for_end(within_s=5.0)

    def call(self, command: str, *, within_s: float = 15.0) -> dict[str, Any]:
        """Ask our program over its control socket; patient while the process that answers is being replaced."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                with Client(socket_path(str(self.run_dir), DEVICE), timeout_s=2) as client:
                    return client.call(command)
            except (InstanceError, SystemCallError) as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{self.label}: no answer to {command!r}: {error}") from error
                time.sleep(0.02)

    def processes(self) -> dict[str, Process]:
        """The processes of our program by name, as `nebula-mp workers` knows them."""
        rows = [Process.parse(row) for row in self.call("workers")["processes"]]
        return {row.name: row for row in rows}

    def stats(self) -> dict[str, int]:
        """The counters of `nebula-mp status --json`."""
        stats: dict[str, int] = self.call("status")["stats"]
        return stats

    def replaced(self, old: Process, *, within_s: float = 20.0) -> Process:
        """Wait until another process does that one's work, and give it."""

        def successor() -> Process | None:
            new = self.processes()[old.name]
            return None if new.pid in {old.pid, None} else new

        return wait_until(successor, f"{self.label}: a successor of {old.name}", within_s=within_s)

    def log_lines(self, message: str) -> list[dict[str, str]]:
        """The fields of every whole log line with that `msg`."""
        found = (
            {key: quoted or plain for key, quoted, plain in _FIELD.findall(line)} for line in self._lines()
        )
        return [fields for fields in found if fields.get("msg") == message]

    def _lines(self) -> list[str]:
        return self.log.split("\n")[:-1]

    @property
    def label(self) -> str:
        """Program and site, for messages."""
        return f"{self.program} at {self.site.name}"

    def report(self, *, lines: int = 60) -> str:
        """The end of its log, its counters and how the process is, for the report of a failed test."""
        code = None if self.process is None else self.process.poll()
        state = "not started" if self.process is None else "running" if code is None else f"ended with {code}"
        tail = "\n".join(self.log.splitlines()[-lines:])
        counters = self._counters() if self.is_ours and state == "running" else ""
        return f"{self.label} ({self.effective}): {state}\n{tail}\n{counters}"

    def _counters(self) -> str:
        try:
            return " ".join(
                f"{name}={amount}" for name, amount in self.call("status", within_s=0)["stats"].items()
            )
        except AssertionError as error:
            return str(error)


@dataclass(frozen=True)
class Variant:
    """One way in which two nodes can be set up. Certificate versions are those of site a and of site b."""

    name: str
    curve: str = "25519"
    versions: tuple[tuple[int, ...], tuple[int, ...]] = ((1,), (1,))
    overlay: tuple[int, ...] = (4,)
    underlay: int = 4
    listen: str = ""  # where both listen; empty: on every address of the underlay's family
    cipher: str = "aes"
    maker: str | None = None  # who makes the certificates; None: nebula-cert of the peer's release

    @property
    def families(self) -> tuple[int, ...]:
        """IP versions both hosts have: a version 1 certificate can only hold IPv4."""
        common = set(self.overlay)
        for versions in self.versions:
            if 2 not in versions:
                common &= {4}
        return tuple(sorted(common))


class Pair:
    """Two nodes with certificates of one CA: `a` runs the first program, `b` the second.

    Neither knows the other's underlay address until `introduce`; so a test decides who starts.
    """

    def __init__(
        self,
        wire: Wire,
        home: Path,
        programs: tuple[str, str],
        variant: Variant,
        *,
        a_is_higher: bool = False,
    ) -> None:
        self.wire = wire
        self.variant = variant
        self.tool = CertTool(variant.maker or programs[1], home)
        self.authorities = {
            version: self.tool.authority(f"ca-v{version}", version=version, curve=variant.curve)
            for version in sorted({version for side in variant.versions for version in side})
        }
        bundle = home / "ca.crt"
        bundle.write_text("".join(ca.certificate.read_text() for ca in self.authorities.values()))
        numbers = (2, 1) if a_is_higher else (1, 2)
        nodes = []
        for position, (site, program) in enumerate(zip((wire.a, wire.b), programs, strict=True)):
            networks = {4: f"10.42.0.{numbers[position]}/24", 6: f"fd42::{numbers[position]}/64"}
            host = self._issue(site.name, variant.versions[position], networks, bundle)
            listen = variant.listen or ("0.0.0.0" if variant.underlay == 4 else "::")
            nodes.append(Node(program, site, host, home / site.name, cipher=variant.cipher, listen=listen))
        self.a, self.b = nodes

    @property
    def nodes(self) -> tuple[Node, Node]:
        """Both, `a` first."""
        return self.a, self.b

    def _issue(self, name: str, versions: tuple[int, ...], networks: Mapping[int, str], bundle: Path) -> Host:
        private, _ = self.tool.keygen(f"host-{name}", curve=self.variant.curve)
        own = tuple(networks[family] for family in self.variant.overlay if family == 4 or 2 in versions)
        host = Host(f"host-{name}", own, private.with_suffix(".crt"), private, bundle)
        self.certify(host, versions)
        return host

    def certify(
        self,
        host: Host,
        versions: tuple[int, ...],
        *,
        groups: Sequence[str] = (),
        networks: Sequence[str] = (),
        fresh_key: bool = False,
    ) -> None:
        """Write a fresh certificate file, one block for each version; for a new key if `fresh_key`."""
        public = host.key.with_suffix(".pub")
        if fresh_key:
            new_private, new_public = self.tool.keygen(f"{host.name}-next", curve=self.variant.curve)
            os.replace(new_private, host.key)  # noqa: PTH105
            os.replace(new_public, public)  # noqa: PTH105
        blocks = []
        for version in versions:
            own = [text for text in networks or host.networks if version == 2 or ":" not in text]
            blocks.append(self.tool.sign(self.authorities[version], host.name, public, own, groups=groups))
        fresh = host.certificate.with_suffix(".new")
        fresh.write_text("".join(blocks))
        os.replace(fresh, host.certificate)  # noqa: PTH105 - atomic, as a renewal should be

    def other(self, node: Node) -> Node:
        """The node at the other site."""
        return self.b if node is self.a else self.a

    def introduce(self, *nodes: Node) -> None:
        """Give each of `nodes` the other's underlay address in its configuration; before its start."""
        for node in nodes:
            peer = self.other(node)
            remote = UdpAddr(peer.site.addresses[self.variant.underlay], PORT)
            node.static = {peer.host.address(family): [remote] for family in self.variant.families}

    def start(self) -> None:
        """Start both, at the same time."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()

    def stop(self) -> None:
        """Stop whatever still runs, without mercy; the verdict on a graceful end is a test of its own."""
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.kill()

    def report(self) -> str:
        """Logs of both nodes and the addresses and routes of both sites."""
        return "\n\n".join(
            [node.report() for node in self.nodes] + [node.site.state() for node in self.nodes]
        )


def with_cipher(variant: Variant, cipher: str) -> Variant:
    """The same variant under the other cipher."""
    return dataclasses.replace(variant, name=f"{variant.name}-{cipher}", cipher=cipher)


def log_has(node: Node, text: str, *, since: int = 0, within_s: float = 5.0) -> str:
    """Wait until the node's log holds `text` at or after character `since`; returns the log from there."""
    wait_until(lambda: text in node.log[since:], f"{node.label} says {text!r}", within_s=within_s)
    return node.log[since:]
