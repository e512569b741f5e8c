"""The control process: handshakes, liveness and flows that readers may not admit, around control.controller.

Data flow: its UDP socket | upcall rings | timer | supervisor | services -> [workers.control] -> Controller
           Controller's actions -> [workers.control] -> UDP socket | TUN queues | log
           Controller -> workers.tables -> shared memory -> readers
           datagrams that came before their tunnel -> workers.handover -> the readers that own them
It waits, takes a batch, calls the controller and performs what that returns; what a packet means, and what
happens next, is decided there. It opens nothing after its start: all descriptors come from the supervisor.
Should it die, its successor goes on from the shared tables and the journal; docs/architecture.md says how.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from ipaddress import ip_address
from typing import Any

import nebula_mp
from nebula_mp import clock
from nebula_mp.config.model import Config, LogLevel
from nebula_mp.control.actions import Action, HandOver, LogEvent, SendDatagram, WriteTun
from nebula_mp.control.controller import Controller, HostStatus
from nebula_mp.control.plane import Opened
from nebula_mp.datapath import kernels
from nebula_mp.datapath.api import CounterFds, Upcall, UpcallReason, take_upcalls
from nebula_mp.errors import NebulaError, RingError, SystemCallError
from nebula_mp.ioctl_tun import TunDevice, TunLostError, WriteFault
from nebula_mp.newtypes import Instant, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import LockFile
from nebula_mp.shm import Mapping as Memory
from nebula_mp.shm_ring import DATA, STATE, Bell, Consumer
from nebula_mp.shm_stats import SLOTS, StatsPage, totals
from nebula_mp.udp_socket import SendFault, UdpSocket
from nebula_mp.wire.header import MessageType
from nebula_mp.workers import checked as checks
from nebula_mp.workers import logs
from nebula_mp.workers.channel import Channel, Message
from nebula_mp.workers.checked import Checked, read_pki
from nebula_mp.workers.expiry import ExpiryWatch
from nebula_mp.workers.handover import Handover
from nebula_mp.workers.loop import BATCH, Alarm, end_on_error, run
from nebula_mp.workers.parts import ControlParts, upcall_lock
from nebula_mp.workers.pki import Pki
from nebula_mp.workers.resolver import known_remotes
from nebula_mp.workers.spawn import CRASHED
from nebula_mp.workers.tables import ShmPlane

_AREAS_PER_TURN = 4  # of each upcall ring, so that handshakes and timers have their turn in a flood
_BEAT_S = 0.25  # the supervisor takes a process for stuck that does nothing for 2 s
_HOUSEKEEPING = Seconds(1)
_MINUTE = Seconds(60)
_PASSES = SLOTS["mp.passes"]
_UDP_RX = SLOTS["mp.udp.rx.packets"], SLOTS["mp.udp.rx.bytes"]
_UDP_TX = SLOTS["mp.udp.tx.packets"], SLOTS["mp.udp.tx.bytes"]
_TUN_TX = SLOTS["mp.tun.tx.packets"], SLOTS["mp.tun.tx.bytes"]
_AGAIN = SLOTS["mp.tun.again"]
_ICMP = SLOTS["mp.rx.icmp"]
_TYPES = {int(each): each for each in MessageType}


def main(parts: ControlParts) -> int:
    """Serve until the supervisor says stop; the exit code."""
    log = logs.Logs(parts.logging, parts.log)
    return run(lambda: Control(parts, read_pki(parts.checked), log).run())


class Control:
    """`run` serves inside an event loop and returns the exit code."""

    def __init__(self, parts: ControlParts, pki: Pki, log: logs.Logs) -> None:
        self._parts = parts
        self._checked = parts.checked
        self._pki = pki
        self._log = log
        self._udp = UdpSocket(socket.socket(fileno=parts.udp), coalesces=parts.offloads.udp_gro)
        self._tuns = _queues(parts.tuns, parts)
        fds = parts.tables
        kernel = kernels.get(parts.kernel)
        counters = kernel.send_counters(CounterFds(fds.send, fds.spans, fds.seal_states, fds.locks))
        self._plane = ShmPlane(fds, parts.owners, counters=counters, clock=clock.monotonic)
        self._controller = Controller(
            self._config, pki.identity, pki.pool, clock.entropy, plane=self._plane, now=clock.now()
        )
        self._page = StatsPage(parts.stats, writable=True)
        self._pages = [StatsPage(page, writable=False, name=name) for name, page in parts.pages]
        self._bell = Bell(parts.bell)
        self._locks = LockFile(parts.ring_locks)
        self._upcalls: dict[int, Consumer] = {}
        self._handover = Handover(parts.strangers_out, parts.stranger_bells, self._page)
        self._supervisor = Channel(parts.supervisor, "the supervisor")
        self._services = Channel(parts.services, "services")
        self._stats: Counter[str] = Counter()
        self._limit = logs.RateLimit(_MINUTE)
        self._started = clock.monotonic()
        self._housekept = self._started
        self._jumps = clock.JumpWatch(clock.now())
        self._expiry = self._expiry_watches()
        self._kernel_drops = self._udp.kernel_drops()
        self._exit_code = 0

    @property
    def _config(self) -> Config:
        return self._checked.config

    # ---- life ----

    async def run(self) -> int:
        """Take over what a predecessor left, then serve; the exit code."""
        self._loop = asyncio.get_running_loop()
        end_on_error(self._loop, "control", lambda: self._end(CRASHED))
        self._stopped = asyncio.Event()
        self._alarm = Alarm(self._on_alarm)
        now = clock.now()
        saved = self._plane.recover(self._pki.identity, self._pki.pool, alive=self._show_life)
        self._perform(self._controller.restore(saved, now))
        literals = known_remotes(self._config.static_host_map, found={})  # services say the rest
        self._perform(self._controller.handle_resolved(literals, now))
        for worker in range(len(self._parts.upcall_rings)):
            self._attach(worker)
        self._listen()
        self._services.send("resolve")
        if saved:
            logs.write(LogLevel.INFO, "control goes on", {"tunnels": len(saved)})
        self._supervisor.send("ready")
        await self._stopped.wait()
        return self._exit_code

    def _listen(self) -> None:
        if self._parts.reads_udp:
            self._loop.add_reader(self._udp.fileno(), self._on_udp)
        self._loop.add_reader(self._bell.fileno(), self._on_bell)
        self._loop.add_reader(self._supervisor.fileno(), self._on_supervisor)
        self._loop.add_reader(self._services.fileno(), self._on_services)
        self._beat()
        self._rearm()
        self._on_bell()  # what readers handed up while nobody was there

    def _end(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._stopped.set()

    def _beat(self) -> None:
        """Show everybody what we counted, and the supervisor that we are not stuck."""
        self._show_life()
        self._publish_counts()
        self._loop.call_later(_BEAT_S, self._beat)

    def _show_life(self) -> None:
        self._page.add(_PASSES)

    # ---- packets and time ----

    def _on_udp(self) -> None:
        handle = self._controller.handle_datagram
        for datagram, source in self._udp.receive(BATCH):
            self._count(_UDP_RX, datagram)
            self._perform(handle(datagram, source, clock.now()))
        self._settle()

    def _on_bell(self) -> None:
        """Take what readers could not decide: first all packets go where they belong, then their flows."""
        self._bell.empty()
        now = clock.now()
        for worker in list(self._upcalls):
            for upcall in self._take(worker):
                self._perform(self._decide(upcall, now))
        self._settle()

    def _take(self, worker: int) -> Iterator[Upcall]:
        """Give a few areas of a reader's upcalls; what contradicts itself in there is not ours to end for."""
        try:
            ring = self._upcalls[worker]
            for upcall in take_upcalls(ring, _AREAS_PER_TURN):
                _check(upcall)
                yield upcall
            if ring.pending():
                self._bell.ring()
        except RingError as error:
            self._give_back(worker, error, f"upcall/{worker}")

    def _give_back(self, worker: int, error: RingError, ring: str) -> None:
        """Use the rings of a worker no more until the supervisor has emptied them."""
        self._upcalls.pop(worker, None)
        self._handover.detach(worker)
        fields = {"ring": ring, "field": error.field, "value": error.value}
        logs.write(LogLevel.ERROR, "ring contradiction", fields)
        self._supervisor.send("bad_ring", {"worker": worker})

    def _decide(self, upcall: Upcall, now: Instant) -> list[Action]:
        match upcall.reason:
            case UpcallReason.NEW_FLOW_OUT | UpcallReason.NO_TUNNEL:
                return self._controller.handle_tun_packet(upcall.packet, now)
        assert upcall.source is not None  # `_check` saw to it
        index = TunnelIndex(upcall.local_index)
        match upcall.reason:
            case UpcallReason.DATAGRAM | UpcallReason.UNKNOWN_INDEX:
                return self._controller.handle_datagram(upcall.packet, upcall.source, now)
            case UpcallReason.MOVED:
                return self._controller.handle_moved(index, upcall.source, now)
            case _:
                message = Opened(_TYPES[upcall.type], upcall.subtype, upcall.packet, upcall.source)
                return self._controller.handle_opened(index, message, now)

    def _settle(self) -> None:
        """Let the readers know what was decided, now that the packets it was decided for are on their way."""
        self._controller.handle_displaced(self._plane.settle(clock.monotonic()))
        self._handover.flush()
        self._rearm()

    def _on_alarm(self) -> None:
        now = clock.now()
        due = self._controller.next_timeout()
        if due is not None and due <= now.mono:
            self._perform(self._controller.handle_timeout(now))
        if now.mono - self._housekept >= _HOUSEKEEPING:
            self._housekept = now.mono
            self._keep_house(now)
        self._settle()

    def _rearm(self) -> None:
        if not self._stopped.is_set():
            self._alarm.arm(self._controller.next_timeout())

    def _perform(self, actions: Sequence[Action]) -> None:
        """Carry out what the controller decided, in its order."""
        for action in actions:
            match action:
                case SendDatagram(data, to):
                    fault = self._udp.send(data, to)
                    if fault is not None:
                        self._on_send_fault(fault, to)
                    else:
                        self._count(_UDP_TX, data)
                case WriteTun(packet, queue):
                    self._write_tun(packet, self._tuns[queue])
                case HandOver(index, datagram, source):
                    self._hand_over(index, datagram, source)
                case LogEvent():
                    logs.log(action)

    def _hand_over(self, index: TunnelIndex, datagram: bytes, source: UdpAddr) -> None:
        """Let the reader that owns the tunnel now, which was published before, open the datagram."""
        owner = self._plane.owner(index)
        try:
            self._handover.push(owner, datagram, source, clock.monotonic())
        except RingError as error:
            self._give_back(owner, error, f"stranger/control/{owner}")

    def _count(self, slots: tuple[int, int], packet: bytes) -> None:
        packets, size_bytes = slots
        self._page.add(packets)
        self._page.add(size_bytes, len(packet))

    def _write_tun(self, packet: bytes, tun: TunDevice) -> None:
        try:
            fault = tun.write(packet)
        except TunLostError:  # its reader says so to the supervisor, who opens it again or gives up
            self._stats["mp.tun.drop.lost"] += 1
            return
        if fault is None:
            self._count(_TUN_TX, packet)
            return
        self._stats[fault] += 1
        if fault is not WriteFault.FULL:
            self._limit.write(LogLevel.WARN, "packet for the tun device dropped", fault, {"reason": fault})

    def _on_send_fault(self, fault: SendFault, to: UdpAddr) -> None:
        self._stats[fault] += 1
        match fault:
            case SendFault.UNREACHABLE:
                self._limit.write(LogLevel.INFO, "peer address unreachable", (fault, to), {"udpAddr": to})
            case SendFault.TOO_BIG:
                self._limit.write(LogLevel.INFO, "path mtu", (fault, to), {"udpAddr": to})
            case SendFault.REFUSED_LOCALLY:
                self._limit.write(
                    LogLevel.WARN, "a local firewall refuses our datagrams", fault, {"udpAddr": to}
                )
            case SendFault.OTHER:
                self._limit.write(LogLevel.WARN, "datagram not sent", fault, {"udpAddr": to})
            case SendFault.DROPPED:
                pass  # counted: the network is slower than we are

    def _keep_house(self, now: Instant) -> None:
        jump = self._jumps.poll(now)
        if jump is not None:
            self._stats["mp.clock.jumps"] += 1
            logs.write(LogLevel.WARN, "clock jumped", {"seconds": round(jump, 3)})
        for watch in self._expiry:
            notice = watch.poll(now.wall_s)
            if notice is not None:
                logs.log(notice)
        drops = self._udp.kernel_drops()
        if drops > self._kernel_drops:
            fields = {"drops": drops, "new": drops - self._kernel_drops}
            self._limit.write(LogLevel.WARN, "udp receive buffer overflowed", "udp.0.drops", fields)
            self._kernel_drops = drops

    def _expiry_watches(self) -> list[ExpiryWatch]:
        own = self._pki.identity.certificates.values()
        return [ExpiryWatch(certificate.name, certificate.not_after) for certificate in own]

    # ---- the supervisor ----

    def _on_supervisor(self) -> None:
        handlers: Mapping[str, Callable[[Message], None]] = {
            "reload": self._on_reload,
            "underlay": self._on_underlay,
            "owners": self._on_owners,
            "upcalls": self._on_upcalls,
            "tuns": self._on_tuns,
            "stop": self._on_stop,
        }
        for message in self._supervisor.receive():
            handlers[message.kind](message)
        self._settle()

    def _on_reload(self, message: Message) -> None:
        """Take over a configuration, certificates and a key that were found good, or nothing."""
        warnings: tuple[str, ...] = ()
        error = None
        try:
            new = _checked(message)
            pki = read_pki(new)
            pki.identity.check_replaces(self._pki.identity)
        except NebulaError as refusal:
            error = str(refusal)
        else:
            self._use(new, pki)
            warnings = pki.warnings
        finally:
            message.close()
        body = {"id": message.body["id"], "error": error, "warnings": list(warnings)}
        self._supervisor.send("reloaded", body)

    def _use(self, new: Checked, pki: Pki) -> None:
        self._checked, self._pki = new, pki
        self._expiry = self._expiry_watches()
        self._log.configure(new.config.logging)
        self._perform(self._controller.handle_reload(new.config, pki.identity, pki.pool, clock.now()))

    def _on_underlay(self, _: Message) -> None:
        self._perform(self._controller.handle_underlay_change(clock.now()))

    def _on_owners(self, message: Message) -> None:
        self._plane.set_owners([int(owner) for owner in message.body["owners"]])

    def _on_upcalls(self, message: Message) -> None:
        self._attach(int(message.body["worker"]))
        self._on_bell()

    def _on_tuns(self, message: Message) -> None:
        """The device was made anew; its old queues are of no use to anybody."""
        self._publish_counts()
        for tun in self._tuns:
            tun.close()
        self._tuns = _queues(message.descriptors, self._parts)

    def _on_stop(self, _: Message) -> None:
        self._perform(self._controller.handle_stop(clock.now()))
        self._supervisor.send("stopped")
        self._end(0)

    def _attach(self, worker: int) -> None:
        """Become the consumer of a reader's upcalls, and fill its ring of ours. Raises SystemCallError."""
        self._upcalls.pop(worker, None)
        if not self._locks.lock(upcall_lock(worker)).try_take():
            raise SystemCallError(f"upcall ring {worker}: another process reads it")
        ring, name = self._parts.upcall_rings[worker], f"upcall/{worker}"
        try:
            data = Memory(ring.data, DATA, writable=False, name=name)
            state = Memory(ring.state, STATE, writable=True, name=name)
            self._upcalls[worker] = Consumer(data, state, segments=False)
            name = f"stranger/control/{worker}"
            self._handover.attach(worker)
        except RingError as error:
            self._give_back(worker, error, name)

    # ---- services ----

    def _on_services(self) -> None:
        for message in self._services.receive():
            if message.kind == "resolved":
                self._perform(self._controller.handle_resolved(_remotes(message.body), clock.now()))
            elif message.kind == "status":
                answer = {"id": message.body["id"], "result": self._status(), "error": None}
                self._services.send("answer", answer)
            message.close()
        self._settle()

    def _status(self) -> Mapping[str, object]:
        newest = self._pki.identity.newest
        return {
            "version": nebula_mp.__version__,
            "device": self._parts.device,
            "listen": str(self._udp.local),
            "kernel": self._parts.kernel,
            "offloads": asdict(self._parts.offloads),
            "mtu_bytes": self._config.tun.mtu,
            "sources": list(self._checked.sources),
            "networks": [str(network) for network in self._pki.identity.networks],
            "certificate": {
                "name": newest.name,
                "groups": list(newest.groups),
                "fingerprint": newest.fingerprint,
                "not_after": newest.not_after,
                "expires_in_s": newest.not_after - clock.wall_s(),
            },
            "hosts": [_host(host) for host in self._controller.hosts()],
            "stats": self._all_stats(),
        }

    def _publish_counts(self) -> None:
        """Move to our page what has a place there: a successor goes on with it, so that no sum ever falls."""
        for stats in (self._controller.stats, self._plane.stats, self._stats):
            for name in SLOTS.keys() & stats.keys():
                self._page.add(SLOTS[name], stats.pop(name))
        for tun in self._tuns:
            self._page.add(_AGAIN, tun.again)
            tun.again = 0
        self._page.add(_ICMP, self._udp.icmp)
        self._udp.icmp = 0

    def _all_stats(self) -> dict[str, int]:
        self._publish_counts()
        own = {
            "drop.oversize": self._udp.oversize,
            "mp.log.lost": self._log.output.lost,
            "udp.0.drops": self._udp.kernel_drops(),
        }
        merged = Counter(self._controller.stats) + self._stats + Counter(own) + Counter(self._plane.stats)
        merged += Counter(totals([self._page, *self._pages]))
        return dict(sorted(merged.items()))


def _check(upcall: Upcall) -> None:
    """Raise RingError for what no reader writes: control does not end because one of them went mad.

    So is what came in a relay frame, without an address: we agree on paths with nobody, so no reader has one.
    """
    if upcall.source is None and upcall.reason not in (UpcallReason.NEW_FLOW_OUT, UpcallReason.NO_TUNNEL):
        raise RingError("upcall ring", "source", None, f"an address with {upcall.reason.name}")
    if upcall.type not in _TYPES:
        raise RingError("upcall ring", "type", upcall.type, "one of MessageType")


def _checked(message: Message) -> Checked:
    """Read what the supervisor had checked. Raises NebulaError."""
    if not message.descriptors:
        raise NebulaError("the private key did not come with the configuration")
    return checks.decode(message.body["checked"], key=message.descriptors[0])


def _queues(descriptors: Sequence[int], parts: ControlParts) -> tuple[TunDevice, ...]:
    return tuple(TunDevice(descriptor, parts.device, parts.offloads) for descriptor in descriptors)


def _remotes(body: Mapping[str, Any]) -> Mapping[IPAddress, Sequence[UdpAddr]]:
    """Read a whole static_host_map as services found it."""
    return {
        ip_address(overlay): tuple(map(UdpAddr.parse, addresses))
        for overlay, addresses in body["remotes"].items()
    }


def _host(host: HostStatus) -> dict[str, object]:
    return {
        "name": host.name,
        "addresses": [str(address) for address in host.addresses],
        "groups": list(host.groups),
        "fingerprint": host.fingerprint,
        "remote": str(host.remote),
        "local_index": host.local_index,
        "remote_index": host.remote_index,
        "primary": host.primary,
        "initiator": host.initiator,
        "sent": host.sent,
        "received": host.received,
    }
