"""Hosts of one overlay in one process: real controllers, real certificates, an invented network.

Data flow: tests/sim -> [sim.world] -> control.controller -> control.actions -> [sim.world] -> sim.network
Does for a controller what the shell does: hands it datagrams, packets and time, performs its actions and
wakes it when it asks. Keeps account of every inner packet: each arrives unaltered, at the host it was
sent to, and once at most, or the run fails at that moment.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from ipaddress import ip_address
from random import Random
from typing import NoReturn

from nebula_mp.cert.identity import Identity
from nebula_mp.config.model import Config, FirewallConfig, FirewallRule, LogLevel, PkiConfig
from nebula_mp.control.actions import Action, HandOver, LogEvent, SendDatagram, WriteTun
from nebula_mp.control.controller import Controller, HostStatus
from nebula_mp.control.core import TimerKey, TimerKind
from nebula_mp.control.hostmap import CANDIDATES, CANDIDATES_PER_HOST, TUNNELS_PER_ADDRESS
from nebula_mp.newtypes import CertVersion, Instant, IPAddress, Seconds, UdpAddr
from tests.sim.diagram import draw
from tests.sim.network import CALM, Network, Weather
from tests.support import packets
from tests.support.pki import ANY_TIME, Pki
from tests.support.plane import LocalPlane

ANY = FirewallConfig(inbound=(FirewallRule(),), outbound=(FirewallRule(),))
CONFIG = Config(pki=PkiConfig(ca="", cert="", key=""), firewall=ANY)
RESOLVE_EVERY_S = 5.0
"""How often each host looks its static_host_map up; its entries are names that follow their hosts."""
_WAKE_LATE_S = 0.002  # a shell is never woken earlier than asked, and a little later now and then
_MESSAGES_KEPT = 60
_VERSIONS = ((CertVersion.V1,), (CertVersion.V2,), (CertVersion.V1, CertVersion.V2))


@cache
def _pki() -> Pki:
    return Pki(seed=50)


@cache
def identity(number: int) -> Identity:
    """Give the certificates of host `number`: v1, v2 or both in turn; made once per process."""
    if number > 1:
        identity(number - 1)  # keys come from one seeded sequence, whoever asks first
    return _pki().identity(
        f"host-{number}", f"10.42.0.{number}/16", versions=_VERSIONS[number % len(_VERSIONS)]
    )


@cache
def renewed(number: int) -> Identity:
    """Give host `number` other certificates for the same key."""
    return _pki().identity(
        f"host-{number}",
        f"10.42.0.{number}/16",
        versions=_VERSIONS[number % len(_VERSIONS)],
        groups=("renewed",),
        key_of=identity(number),
    )


@dataclass(eq=False, slots=True)
class Letter:
    """One inner packet on its way."""

    packet: bytes
    source: "Host"
    to: "Host"
    sent: float
    arrived: float | None = None


@dataclass(eq=False, slots=True)
class Host:
    """One machine. Its controller is replaced when it restarts; None while it is down."""

    number: int
    at: UdpAddr
    clock_ahead_s: float  # of its wall clock
    boot_s: float  # what its monotonic clock said when the run began
    controller: Controller | None = None
    plane: LocalPlane | None = None
    online: bool = True
    starts: int = 0
    wake_at: float | None = None

    @property
    def name(self) -> str:
        return f"host-{self.number}"

    @property
    def address(self) -> IPAddress:
        return ip_address(f"10.42.0.{self.number}")


class World:
    """`count` hosts, numbered from 1, that all know each other by static_host_map."""

    def __init__(
        self, seed: int, count: int = 2, *, weather: Weather = CALM, config: Config = CONFIG
    ) -> None:
        self.seed = seed
        self.network = Network(seed, weather)
        self.random = self.network.random
        self.letters: list[Letter] = []
        self._by_packet: dict[bytes, Letter] = {}
        self._homes: dict[UdpAddr, str] = {}
        self._config = config
        self.hosts = [
            Host(number, self.fresh_addr(), self.random.uniform(-60, 60), self.random.uniform(0, 1e6))
            for number in range(1, count + 1)
        ]
        for host in self.hosts:
            self.start(host)
            self.network.call_at(self.random.uniform(0, RESOLVE_EVERY_S), partial(self._resolve_again, host))

    # ---- time ----

    @property
    def now(self) -> float:
        return self.network.now

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.network.run_until(self.now + seconds)

    def run_until(self, condition: Callable[[], bool], *, within: float, step: float = 0.01) -> float:
        """Let time pass until `condition` holds; gives how long it took, fails after `within` seconds."""
        began = self.now
        while not condition():
            if self.now - began >= within:
                self.fail(f"not within {within} s", *self.hosts[:3])
            self.run(step)
        return self.now - began

    def instant(self, host: Host) -> Instant:
        """What the clocks of `host` say."""
        wall_s = ANY_TIME + self.now + host.clock_ahead_s
        return Instant(Seconds(host.boot_s + self.now), round(wall_s * 1e9))

    # ---- hosts ----

    def fresh_addr(self, *, version: int = 4) -> UdpAddr:
        """Give an underlay address that nobody has had."""
        while True:
            tail = self.random.randrange(1, 1 << 16)
            ip = ip_address(f"198.18.{tail >> 8}.{tail & 255}" if version == 4 else f"2001:db8::{tail:x}")
            addr = UdpAddr(ip, self.random.randrange(1024, 65536))
            if addr not in self._homes:
                return addr

    def start(self, host: Host) -> None:
        """Start the program on `host`, without any memory of an earlier run."""
        assert host.controller is None
        host.starts += 1
        entropy = Random(f"{self.seed} {host.number} {host.starts}").randbytes
        host.plane = LocalPlane(lambda: self.instant(host).mono)
        host.controller = Controller(
            self._config,
            identity(host.number),
            _pki().pool(),
            entropy,
            plane=host.plane,
            now=self.instant(host),
        )
        host.wake_at = None
        self.network.note(host.name, f"starts at {host.at}")
        self._plug(host)
        self._resolve(host)

    def crash(self, host: Host) -> None:
        """End the program without a word."""
        assert host.controller is not None
        host.controller = None
        self._unplug(host)
        self.network.note(host.name, "is gone")

    def stop(self, host: Host) -> None:
        """End the program as SIGTERM does."""
        self._perform(host, _running(host).handle_stop(self.instant(host)))
        assert _running(host).hosts() == []
        self.crash(host)

    def renew(self, host: Host) -> None:
        """Give the program on `host` new certificates, as a reload does."""
        new = renewed(host.number)
        self._perform(
            host, _running(host).handle_reload(self._config, new, _pki().pool(), self.instant(host))
        )

    def move(self, host: Host, at: UdpAddr, *, noticed: bool) -> None:
        """Give `host` another underlay address; `noticed`: its own, not only that of a NAT before it."""
        self._unplug(host)
        host.at = at
        self.network.note(host.name, f"moves to {at}{'' if noticed else ' without noticing'}")
        self._plug(host)
        if noticed and host.controller is not None:
            self._perform(host, host.controller.handle_underlay_change(self.instant(host)))

    def set_online(self, host: Host, *, online: bool) -> None:
        """Pull or plug the cable of `host`."""
        self._unplug(host)
        host.online = online
        self.network.note(host.name, "is online" if online else "is offline")
        self._plug(host)

    def _plug(self, host: Host) -> None:
        self._homes[host.at] = host.name
        if host.online and host.controller is not None:
            self.network.attach(host.at, host.name, partial(self._receive, host))

    def _unplug(self, host: Host) -> None:
        if self.network.is_attached(host.at):
            self.network.detach(host.at)

    def _resolve(self, host: Host) -> None:
        if host.controller is not None:
            remotes = {other.address: [other.at] for other in self.hosts if other is not host}
            self._perform(host, host.controller.handle_resolved(remotes, self.instant(host)))

    def _resolve_again(self, host: Host) -> None:
        self._resolve(host)
        self.network.call_at(self.now + RESOLVE_EVERY_S, partial(self._resolve_again, host))

    # ---- the shell ----

    def _receive(self, host: Host, data: bytes, source: UdpAddr) -> None:
        assert host.plane is not None
        self._perform(host, host.plane.receive(_running(host), data, source, self.instant(host)))

    def _perform(self, host: Host, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case SendDatagram(data, to):
                    if host.online:
                        self.network.send(host.name, host.at, to, data)
                case WriteTun(packet):
                    self._arrive(host, packet)
                case HandOver(_, datagram, source):
                    self._receive(host, datagram, source)
                case LogEvent(level, message, fields):
                    if level not in (LogLevel.TRACE, LogLevel.DEBUG):
                        index = f" {fields['localIndex']:08x}" if "localIndex" in fields else ""
                        self.network.note(host.name, f"{message}{index}")
        self._arm(host)

    def _arm(self, host: Host) -> None:
        timeout = _running(host).next_timeout()
        if timeout is None:
            return
        when = max(self.now, timeout - host.boot_s) + 1e-6
        if host.wake_at is not None and host.wake_at <= when + _WAKE_LATE_S:
            return
        host.wake_at = when = when + self.random.uniform(0, _WAKE_LATE_S)
        self.network.call_at(when, partial(self._wake, host, when))

    def _wake(self, host: Host, when: float) -> None:
        if host.wake_at != when or host.controller is None:
            return  # it was asked to be woken earlier, or has restarted
        host.wake_at = None
        timeout = host.controller.next_timeout()
        now = self.instant(host)
        if timeout is not None and timeout <= now.mono:
            self._perform(host, host.controller.handle_timeout(now))
            later = host.controller.next_timeout()
            if later is not None and later <= now.mono:
                self.fail(f"{host.name} has not done all that was due", host)
        else:
            self._arm(host)

    # ---- inner packets ----

    def write(self, source: Host, to: Host, size: int = 0) -> Letter:
        """Make a UDP packet, like no other, with `size` bytes of filling; it is not sent."""
        payload = len(self.letters).to_bytes(8, "big") + bytes(size)
        datagram = packets.udp(source.address, to.address, 5000, 5000, payload)
        letter = Letter(packets.ipv4(source.address, to.address, packets.UDP, datagram), source, to, self.now)
        self.letters.append(letter)
        self._by_packet[letter.packet] = letter
        return letter

    def send(self, source: Host, to: Host, size: int = 0) -> Letter:
        """Let the machine behind `source` send a packet of `write`."""
        letter = self.write(source, to, size)
        if source.controller is not None:
            self._perform(source, source.controller.handle_tun_packet(letter.packet, self.instant(source)))
        return letter

    def talk(self, a: Host, b: Host, *, every: float, until: float) -> None:
        """Let both send to the other about once in `every` seconds."""
        for source, to in ((a, b), (b, a)):
            self.network.call_at(
                self.now + self.random.uniform(0, every), partial(self._talk, source, to, every, until)
            )

    def _talk(self, source: Host, to: Host, every: float, until: float) -> None:
        if self.now < until:
            self.send(source, to)
            self.network.call_at(
                self.now + every * self.random.uniform(0.5, 1.5),
                partial(self._talk, source, to, every, until),
            )

    def _arrive(self, host: Host, packet: bytes) -> None:
        letter = self._by_packet.get(packet)
        if letter is None:
            self.fail(f"{host.name} received a packet that nobody sent: {packet.hex()}", host)
        if letter.to is not host:
            self.fail(f"{host.name} received a packet for {letter.to.name}", letter.source, host)
        if letter.arrived is not None:
            self.fail(f"{host.name} received a packet twice", letter.source, host)
        letter.arrived = self.now

    # ---- what must hold ----

    def status(self, host: Host, peer: Host) -> HostStatus | None:
        """Give the tunnel that `host` sends through to `peer`."""
        if host.controller is None:
            return None
        found = [one for one in host.controller.hosts() if peer.address in one.addresses and one.primary]
        assert len(found) <= 1
        return found[0] if found else None

    def check_delivery(self, pairs: Iterable[tuple[Host, Host]], *, within: float) -> None:
        """Send one packet each way between the hosts of each pair and fail unless all arrive in time."""
        letters = [self.send(*way) for a, b in pairs for way in ((a, b), (b, a))]
        self.run(within)
        for letter in letters:
            if letter.arrived is None:
                self.fail(
                    f"a packet from {letter.source.name} to {letter.to.name} did not arrive within {within} s",
                    letter.source,
                    letter.to,
                )

    def check_agreement(self, pairs: Iterable[tuple[Host, Host]]) -> None:
        """Fail unless each host sends through a tunnel that its peer has, to where that peer is."""
        for pair in pairs:
            for a, b in (pair, pair[::-1]):
                ours = self.status(a, b)
                if ours is None:
                    self.fail(f"{a.name} has no tunnel", a, b)
                # It may be a candidate as yet: what proves it is on the way.
                theirs = _running(b)._core.hostmap.by_index(ours.remote_index)
                if theirs is None or theirs.remote_index != ours.local_index:
                    self.fail(f"{a.name} sends through a tunnel that {b.name} does not have", a, b)
                if ours.remote != b.at:
                    self.fail(f"{a.name} sends to {ours.remote}, but {b.name} is at {b.at}", a, b)

    def check_one_tunnel(self, pairs: Iterable[tuple[Host, Host]], *, within: float) -> None:
        """Let time pass until both hosts of each pair send through the same tunnel; fail if it takes longer."""
        end = self.now + within
        for a, b in pairs:
            while not self.is_one_tunnel(a, b):
                if self.now >= end:
                    self.fail(f"{a.name} and {b.name} use different tunnels", a, b)
                self.run(0.1)

    def is_one_tunnel(self, a: Host, b: Host) -> bool:
        """Tell whether what each sends through is the same tunnel."""
        ours, theirs = self.status(a, b), self.status(b, a)
        return (
            ours is not None
            and theirs is not None
            and (ours.local_index, ours.remote_index) == (theirs.remote_index, theirs.local_index)
        )

    def check_tables(self) -> None:
        """Fail if a table of any host is over its limit, or holds what nothing refers to."""
        for host in self.hosts:
            if host.controller is not None:
                problem = _table_problem(host.controller)
                if problem:
                    self.fail(f"{host.name}: {problem}", host)

    def fail(self, text: str, *hosts: Host) -> NoReturn:
        """Raise AssertionError with the seed and a diagram of the last messages among `hosts`."""
        names = [host.name for host in hosts]
        if len(names) == 1:
            names = self._company(names[0])
        diagram = draw(self.network.trace, names, self._homes, _MESSAGES_KEPT)
        raise AssertionError(f"{text}\nseed {self.seed}, after {self.now:.4f} simulated seconds\n\n{diagram}")

    def _company(self, name: str) -> list[str]:
        """Add the host whose datagram arrived here last."""
        for row in reversed(self.network.trace):
            if getattr(row, "receiver", None) == name and getattr(row, "sender", name) != name:
                return [name, str(getattr(row, "sender", ""))]
        return [name]


def pairs_of(world: World, friends: int) -> list[tuple[Host, Host]]:
    """Let each host pick `friends` others; gives every pair once."""
    chosen: dict[tuple[int, int], tuple[Host, Host]] = {}
    for host in world.hosts:
        others: Sequence[Host] = [other for other in world.hosts if other is not host]
        for other in world.random.sample(others, friends):
            low, high = sorted((host, other), key=lambda one: one.number)
            chosen[low.number, high.number] = low, high
    return list(chosen.values())


def _running(host: Host) -> Controller:
    assert host.controller is not None
    return host.controller


def _table_problem(controller: Controller) -> str | None:
    """Look behind the API: sizes, and that timers and indexes belong to something."""
    core, handshakes = controller._core, controller._handshakes
    hostmap, timers = core.hostmap, core.timers
    expected: set[TimerKey] = {(TimerKind.HANDSHAKE, target) for target in handshakes._open}
    expected |= {
        (TimerKind.CHECK if tunnel.proven else TimerKind.CANDIDATE, tunnel.local_index) for tunnel in hostmap
    }
    if set(timers._deadlines) != expected:
        return f"timers {set(timers._deadlines) ^ expected} belong to nothing, or are missing"
    if len(timers._heap) > 65 + 4 * len(expected):
        return f"{len(timers._heap)} heap entries for {len(expected)} timers"
    indexes = len(hostmap.indexes)
    if indexes != len(hostmap) + len(handshakes._open_by_index):
        return f"{indexes} indexes are in use, of {len(hostmap)} tunnels and {len(handshakes)} handshakes"
    if any(len(tunnels) > TUNNELS_PER_ADDRESS for tunnels in hostmap._by_address.values()):
        return "too many tunnels of one peer"
    if any(len(found) > CANDIDATES_PER_HOST for found in hostmap._candidates_of.values()):
        return "too many candidates of one host"
    if len(hostmap.candidates()) > CANDIDATES:
        return "too many candidates"
    proven = {tunnel.local_index for tunnel in hostmap if tunnel.proven}
    by_address = {tunnel.local_index for found in hostmap._by_address.values() for tunnel in found}
    if proven != by_address:
        return f"tunnels {proven ^ by_address} are known by index or by address only"
    if core.outbox._actions:
        return "actions were left behind"
    return None
