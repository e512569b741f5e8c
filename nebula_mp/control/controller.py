"""The brain of a gateway, sans-IO: datagrams, packets, commands and time in; actions out.

Data flow: workers.control | tests.sim -> [control.controller] -> control.actions -> the same shell
It owns the tunnels, the handshakes, the firewall and every timer. It knows no socket, no device and no
clock: whoever drives it says when it is, and performs what it returns.
Source: docs/wire-format.md; Nebula for the order of checks and the connection manager.
"""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import CaPool
from nebula_mp.config.model import Config, LogLevel, RecvErrorPolicy
from nebula_mp.control.actions import Action
from nebula_mp.control.core import HINT_INTERVAL, Core, TimerKind
from nebula_mp.control.handshakes import Established, Handshakes
from nebula_mp.control.hostmap import HostMap, Tunnel
from nebula_mp.control.liveness import Traffic
from nebula_mp.control.plane import DataPlane, Grant, Opened, Saved
from nebula_mp.control.remotes import Remotes
from nebula_mp.control.upkeep import Upkeep, order, who
from nebula_mp.errors import TruncatedError, WireError
from nebula_mp.firewall.rules import Direction, Firewall, PeerNetworks, Verdict
from nebula_mp.newtypes import (
    Counter,
    Entropy,
    Instant,
    IPAddress,
    Seconds,
    TunnelIndex,
    UdpAddr,
)
from nebula_mp.wire.header import (
    HANDSHAKE_IX,
    MESSAGE_IP,
    MESSAGE_RELAY,
    STAGE_1_COUNTER,
    TEST_REPLY,
    TEST_REQUEST,
    Header,
    MessageType,
)
from nebula_mp.wire.ip import FlowKey, parse_flow

_PUNCH_BYTES_MAX = 1
_ROAM_BACK_GUARD = Seconds(2.0)
"""A tunnel that moved does not move back within this time: datagrams in flight would make it flap."""
_ASK_AGAIN = Seconds(0.2)
"""How often a peer is asked for a reply at an address it seems to have moved to."""
_RECV_ERRORS_PER_SECOND = 100
_NO_COUNTER = Counter(0)
_PRIVATE_NETWORKS = (
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv6Network("fc00::/7"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """One proven tunnel, as status output and tests see it."""

    name: str
    addresses: tuple[IPAddress, ...]
    groups: tuple[str, ...]
    fingerprint: str
    remote: UdpAddr
    local_index: TunnelIndex
    remote_index: TunnelIndex
    primary: bool
    initiator: bool
    sent: int  # messages sealed, handshake included
    received: int  # authentic messages opened


class Controller:
    """Feed it with `handle_*`; each call returns what is to be done, in order.

    Call `handle_timeout` at or after `next_timeout`. Times never go backwards. No input that a peer or a
    stranger sends raises: it is counted in `stats` under one reason and dropped.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        pool: CaPool,
        entropy: Entropy,
        *,
        plane: DataPlane,
        now: Instant,
    ) -> None:
        """`plane` is told of all tunnels and allowed flows; `restore` takes over what it knows already."""
        self._core = Core(
            config=config,
            identity=identity,
            pool=pool,
            entropy=entropy,
            firewall=Firewall(
                config.firewall, identity.newest, last_seen=plane.last_seen, origin=plane.origin
            ),
            plane=plane,
            hostmap=HostMap(entropy, plane),
            remotes=Remotes(identity.networks),
        )
        self._handshakes = Handshakes(self._core)
        self._upkeep = Upkeep(self._core, self._handshakes)
        self._recv_error_window = now.mono  # start of the second that is being counted
        self._recv_errors_sent = 0

    @property
    def stats(self) -> Tally[str]:
        """What happened so far: `drop.<reason>` per dropped packet, and events."""
        return self._core.outbox.stats

    def next_timeout(self) -> Seconds | None:
        """When `handle_timeout` has something to do; None: never, unless something else happens first."""
        return self._core.timers.next()

    def hosts(self) -> list[HostStatus]:
        """List the proven tunnels, sorted by the peer's first address, primary first."""
        hostmap, plane = self._core.hostmap, self._core.plane
        tunnels = [tunnel for tunnel in hostmap if tunnel.proven]
        tunnels.sort(key=lambda tunnel: (order(tunnel.addresses[0]), not hostmap.is_primary(tunnel)))
        return [
            HostStatus(
                name=tunnel.certificate.name,
                addresses=tunnel.addresses,
                groups=tunnel.certificate.groups,
                fingerprint=tunnel.certificate.fingerprint,
                remote=tunnel.remote,
                local_index=tunnel.local_index,
                remote_index=tunnel.remote_index,
                primary=hostmap.is_primary(tunnel),
                initiator=tunnel.session.is_initiator,
                sent=plane.last_counter(tunnel),
                received=plane.passed(tunnel).received,
            )
            for tunnel in tunnels
        ]

    # ---- underlay ----

    def handle_datagram(self, datagram: bytes, source: UdpAddr, now: Instant) -> list[Action]:
        """Take a datagram that the data path does not open: a handshake, a hint, one of an unknown tunnel."""
        self._handle_datagram(datagram, source, now)
        return self._core.outbox.drain()

    def _handle_datagram(self, datagram: bytes, source: UdpAddr, now: Instant) -> None:
        core = self._core
        if len(datagram) <= _PUNCH_BYTES_MAX:
            core.outbox.stats["messages.rx.punchy"] += 1
            return
        try:
            header = Header.parse(datagram)
        except TruncatedError:
            core.outbox.drop("short", source, now)
            return
        except WireError as error:
            core.outbox.drop("version" if datagram[0] >> 4 != 1 else "type", source, now, error)
            return
        if core.remotes.inside_overlay(source.ip):
            core.outbox.drop("looped", source, now)
            return
        if header.type is MessageType.HANDSHAKE:
            self._handle_handshake(header, datagram, source, now)
        elif header.type is MessageType.RECV_ERROR:
            self._handle_recv_error(header, source, now)
        else:
            self._handle_sealed(header, datagram, source, now)

    def _handle_handshake(self, header: Header, datagram: bytes, source: UdpAddr, now: Instant) -> None:
        assert header.subtype == HANDSHAKE_IX  # Header.parse knows no other
        if header.counter == STAGE_1_COUNTER:
            self._handshakes.handle_stage1(header, datagram, source, now)
            return
        established = self._handshakes.handle_stage2(header, datagram, source, now)
        if established is not None:
            self._flush(established, now)

    def _handle_sealed(self, header: Header, datagram: bytes, source: UdpAddr, now: Instant) -> None:
        """Take a message of a tunnel that the data path did not know when it came: we never open one."""
        core = self._core
        if header.type is MessageType.MESSAGE and header.subtype != MESSAGE_IP:
            # Relay frames have indexes of their own, and we have given out none.
            core.outbox.drop("relay_index", source, now)
            self._send_recv_error(header, source, now)
            return
        index = header.remote_index
        if core.hostmap.by_index(index) is not None:
            core.outbox.hand_over(index, datagram, source)  # by now it does
            return
        if self._handshakes.is_waiting(index):
            self._handshakes.handle_early(index, datagram, source, now)
            return
        core.outbox.drop("unknown_index", source, now)
        self._send_recv_error(header, source, now)

    def handle_opened(self, local_index: TunnelIndex, message: Opened, now: Instant) -> list[Action]:
        """Take the content of a message that the data path found authentic and fresh."""
        tunnel = self._core.hostmap.by_index(local_index)
        if tunnel is None:  # it was closed while the message was on its way to us
            self._core.outbox.drop("unknown_index", message.source, now)
        else:
            self._accept(tunnel, message, now)
        return self._core.outbox.drain()

    def handle_moved(self, local_index: TunnelIndex, source: UdpAddr, now: Instant) -> list[Action]:
        """Learn that an authentic packet, already delivered, came from another address than the tunnel's."""
        tunnel = self._core.hostmap.by_index(local_index)
        if tunnel is not None and tunnel.proven and source != tunnel.remote:
            self._follow(tunnel, source, now, is_reply=False)
        return self._core.outbox.drain()

    def _accept(self, tunnel: Tunnel, message: Opened, now: Instant) -> None:
        """React to an authentic message: to where it came from, then to what it says."""
        core = self._core
        kind, subtype, plaintext, source = message
        if not tunnel.proven:
            self._flush(self._handshakes.prove(tunnel, source, now), now)
        elif source != tunnel.remote:
            is_reply = kind is MessageType.TEST and subtype == TEST_REPLY
            self._follow(tunnel, source, now, is_reply=is_reply)
        match kind:
            case MessageType.MESSAGE if subtype == MESSAGE_RELAY:
                core.outbox.drop("relay_index", source, now)  # on a candidate: no path leads through one
            case MessageType.MESSAGE:
                self._handle_inner(tunnel, plaintext, source, now)
            case MessageType.TEST if subtype == TEST_REQUEST:
                # To where it came from: whoever asks wants to know whether that address works.
                core.send(tunnel, MessageType.TEST, TEST_REPLY, plaintext, source)
            case MessageType.TEST:
                pass  # its value was to arrive
            case MessageType.CLOSE_TUNNEL:
                core.outbox.log(LogLevel.INFO, "Close tunnel received, tearing down.", **who(tunnel))
                core.forget(tunnel)
            case _:
                # Lighthouse and control messages are for roles that this host does not have.
                core.outbox.stats[f"messages.rx.ignored.{kind.name.lower()}"] += 1

    def _handle_inner(self, tunnel: Tunnel, packet: bytes, source: UdpAddr, now: Instant) -> None:
        core = self._core
        try:
            flow = parse_flow(packet, inbound=True)
        except WireError as error:
            core.outbox.drop("inner_ip", source, now, error)
            return
        verdict = core.firewall.check(Direction.INBOUND, flow, tunnel.networks, now.mono)
        if verdict is Verdict.ALLOW:
            core.outbox.tun(packet, core.plane.queue_for(tunnel))
            core.plane.allow(flow, tunnel, self._grant(flow), now.mono)
        else:
            core.outbox.drop(f"firewall.incoming.{verdict.value}", source, now)
            core.plane.refuse(flow, tunnel, Direction.INBOUND, now.mono)

    def _follow(self, tunnel: Tunnel, source: UdpAddr, now: Instant, *, is_reply: bool) -> None:
        """React to an authentic datagram from another address than the tunnel's.

        Somebody on the path can send a copy of it from anywhere, before the original arrives. So the
        peer is asked there for a reply first, and the tunnel moves when one comes.
        """
        if source == tunnel.roamed_from and now.mono - tunnel.roamed_at < _ROAM_BACK_GUARD:
            self._core.outbox.stats["roam.suppressed"] += 1
            return
        if is_reply and source == tunnel.asked:
            self._roam(tunnel, source, now)
        elif source != tunnel.asked or now.mono - tunnel.asked_at >= _ASK_AGAIN:
            tunnel.asked, tunnel.asked_at = source, now.mono
            self._core.send_test(tunnel, source)

    def _roam(self, tunnel: Tunnel, source: UdpAddr, now: Instant) -> None:
        """Use a peer's new address from now on."""
        self._core.outbox.log(
            LogLevel.INFO,
            "Host roamed to new udp ip/port.",
            **who(tunnel),
            newAddr=source,
        )
        left = tunnel.remote
        # The two ends may send on different tunnels for a while: all that lead to the old place move.
        for each in self._core.hostmap.tunnels(tunnel.addresses[0]):
            if each.remote == left:
                each.roamed_from, each.roamed_at = left, now.mono
                each.remote = source
                each.asked = None
                self._core.plane.changed(each)

    # ---- hints that nobody authenticates ----

    def _send_recv_error(self, header: Header, source: UdpAddr, now: Instant) -> None:
        """Tell a sender that we do not know its tunnel; bounded in number, never larger than its datagram."""
        core = self._core
        if not _policy_allows(core.config.listen.send_recv_error, source.ip):
            return
        if now.mono - self._recv_error_window >= 1:
            self._recv_error_window, self._recv_errors_sent = now.mono, 0
        if self._recv_errors_sent >= _RECV_ERRORS_PER_SECOND:
            core.outbox.stats["messages.tx.recv_error.suppressed"] += 1
            return
        self._recv_errors_sent += 1
        core.outbox.stats["messages.tx.recv_error"] += 1
        reply = Header(MessageType.RECV_ERROR, 0, header.remote_index, _NO_COUNTER)
        core.outbox.datagram(reply.encode(), source)

    def _handle_recv_error(self, header: Header, source: UdpAddr, now: Instant) -> None:
        """Somebody says that the peer forgot a tunnel of ours: find out, and prepare a new one.

        The old tunnel stays until a new one is proven or the liveness check gives it up.
        """
        core = self._core
        core.outbox.stats["messages.rx.recv_error"] += 1
        if not _policy_allows(core.config.listen.accept_recv_error, source.ip):
            core.outbox.drop("recv_error_policy", source, now)
            return
        tunnels = [
            tunnel
            for tunnel in core.hostmap.by_remote_index(header.remote_index)
            if tunnel.proven
            and (tunnel.remote == source or source in core.remotes.known(tunnel.addresses[0]))
        ]
        if not tunnels:
            core.outbox.drop("recv_error_unknown", source, now)
            return
        for tunnel in tunnels:
            if now.mono - tunnel.suspected_at >= HINT_INTERVAL:
                tunnel.suspected_at = now.mono
                core.send_test(tunnel)
                if core.hostmap.is_primary(tunnel):
                    self._handshakes.start(tunnel.addresses[0], now)

    # ---- overlay ----

    def handle_tun_packet(self, packet: bytes, now: Instant) -> list[Action]:
        """Take an IP packet that the local stack sends into the overlay."""
        self._handle_tun_packet(packet, now)
        return self._core.outbox.drain()

    def _handle_tun_packet(self, packet: bytes, now: Instant) -> None:
        core = self._core
        try:
            flow = parse_flow(packet, inbound=False)
        except WireError as error:
            core.outbox.drop("tun.inner_ip", None, now, error)
            return
        reason = None
        if core.config.tun.drop_local_broadcast and flow.remote in core.broadcasts:
            reason = "tun.broadcast"
        elif core.config.tun.drop_multicast and _is_multicast(flow.remote):
            reason = "tun.multicast"
        elif (tunnel := core.hostmap.primary_packed(flow.remote)) is not None:
            self._send_inner(tunnel, packet, flow, now)
        elif flow.remote in core.own_packed:
            reason = "tun.own_address"
        elif core.remotes.inside_overlay(target := ip_address(flow.remote)):
            self._handshakes.start(target, now, packet=packet)
        else:
            reason = "tun.no_route"
        if reason is not None:
            core.outbox.drop(reason, None, now)
            core.plane.refuse(flow, None, Direction.OUTBOUND, now.mono)

    def _send_inner(self, tunnel: Tunnel, packet: bytes, flow: FlowKey, now: Instant) -> bool:
        core = self._core
        verdict = core.firewall.check(Direction.OUTBOUND, flow, tunnel.networks, now.mono)
        if verdict is Verdict.ALLOW:
            core.plane.allow(flow, tunnel, self._grant(flow), now.mono)
            return core.send(tunnel, MessageType.MESSAGE, MESSAGE_IP, packet)
        core.outbox.drop(f"firewall.outgoing.{verdict.value}", None, now)
        core.plane.refuse(flow, tunnel, Direction.OUTBOUND, now.mono)
        return False

    def _grant(self, flow: FlowKey) -> Grant:
        firewall = self._core.firewall
        return Grant(firewall.direction(flow), firewall.between(flow), self._core.config.firewall.conntrack)

    def _flush(self, established: Established, now: Instant) -> None:
        """Send what waited for a tunnel; each packet was parsed when it was queued."""
        for packet in established.queue:
            flow = parse_flow(packet, inbound=False)
            if self._send_inner(established.tunnel, packet, flow, now):
                self._core.outbox.stats["hostinfo.cached_packets.sent"] += 1

    # ---- time ----

    def handle_timeout(self, now: Instant) -> list[Action]:
        """Do all that is due."""
        core = self._core
        for kind, key in core.timers.pop_due(now.mono):
            match kind, key:
                case TimerKind.HANDSHAKE, target if not isinstance(target, int):
                    self._handshakes.handle_timeout(target, now)
                case TimerKind.CANDIDATE, int(index):
                    self._expire_candidate(index)
                case TimerKind.CHECK, int(index):
                    tunnel = core.hostmap.by_index(index)
                    if tunnel is not None:
                        self._upkeep.check(tunnel, now)
        return core.outbox.drain()

    def _expire_candidate(self, index: int) -> None:
        tunnel = self._core.hostmap.by_index(index)
        if tunnel is not None and not tunnel.proven:
            self._core.outbox.stats["candidates.expired"] += 1
            self._core.forget(tunnel)

    # ---- commands ----

    def restore(self, saved: Sequence[Saved], now: Instant) -> list[Action]:
        """Go on with the tunnels of a control process that died, oldest first; before anything else."""
        core = self._core
        tunnels = []
        for each in saved:
            networks = PeerNetworks.of(each.session.peer.certificate, core.own_networks)
            traffic = Traffic(last_used=now.mono, saw_out=True)
            tunnel = Tunnel(each.session, networks, remote=each.remote, traffic=traffic, proven=True)
            traffic.look(core.plane.passed(tunnel))
            core.hostmap.adopt(tunnel)
            interval = core.config.timers.connection_alive_interval
            core.timers.arm((TimerKind.CHECK, tunnel.local_index), Seconds(now.mono + interval))
            tunnels.append(tunnel)
        for tunnel, each in zip(tunnels, saved, strict=True):
            if each.primary:
                core.hostmap.make_primary(tunnel)
        return core.outbox.drain()

    def handle_displaced(self, flows: Iterable[tuple[FlowKey, Seconds]]) -> None:
        """Learn which flows the data path forgot to make room, and when each last had a packet."""
        for flow, seen in flows:
            self._core.firewall.conntrack.touch(flow, seen)

    def handle_resolved(self, remotes: Mapping[IPAddress, Sequence[UdpAddr]], now: Instant) -> list[Action]:
        """Take a whole `static_host_map`, its names resolved; it replaces the one before."""
        core = self._core
        changed = core.remotes.replace_static(remotes)
        self._handshakes.handle_new_remotes(now)
        for address in changed:
            tunnel = core.hostmap.primary(address)
            if tunnel is not None and tunnel.remote not in core.remotes.known(address):
                core.search(tunnel)  # a name has another address: the peer may have moved there
        return core.outbox.drain()

    def handle_reload(self, config: Config, identity: Identity, pool: CaPool, now: Instant) -> list[Action]:
        """Use a new configuration and new keys, already checked; tunnels stay.

        Peers learn a changed certificate from a re-handshake at the next check of their tunnel.
        """
        core = self._core
        core.config, core.pool = config, pool
        core.set_identity(identity)
        for tunnel in core.hostmap:
            tunnel.networks = PeerNetworks.of(tunnel.certificate, core.own_networks)
        if core.firewall.replace(config.firewall, identity.newest, now.mono):
            core.plane.forget_flows()
        return core.outbox.drain()

    def handle_underlay_change(self, now: Instant) -> list[Action]:
        """Our own underlay address changed: let every peer hear from us at once, so that it follows."""
        core = self._core
        self._handshakes.handle_new_remotes(now)
        for tunnel in core.hostmap:
            if tunnel.proven and core.hostmap.is_primary(tunnel):
                core.send_test(tunnel)
        return core.outbox.drain()

    def handle_stop(self, now: Instant) -> list[Action]:  # noqa: ARG002 - every input comes with its time
        """Say goodbye on every tunnel; nothing is left afterwards."""
        core = self._core
        self._handshakes.handle_stop()
        core.outbox.log(LogLevel.INFO, "Sending close tunnel to all peers", count=len(core.hostmap))
        for tunnel in core.hostmap:
            core.close(tunnel)
        return core.outbox.drain()


def _is_multicast(address: bytes) -> bool:
    return address[0] == 0xFF if len(address) == 16 else address[0] >> 4 == 0xE


def _policy_allows(policy: RecvErrorPolicy, ip: IPAddress) -> bool:
    match policy:
        case RecvErrorPolicy.ALWAYS:
            return True
        case RecvErrorPolicy.NEVER:
            return False
        case RecvErrorPolicy.PRIVATE:
            return any(ip in network for network in _PRIVATE_NETWORKS)
