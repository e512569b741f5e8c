"""The brain of a gateway, sans-IO: datagrams, packets, commands and time in; actions out.

Data flow: workers.control | tests.sim -> [control.controller] -> control.actions -> the same shell
It owns the tunnels, the handshakes, the firewall and every timer. It knows no socket, no device and no
clock: whoever drives it says when it is, and performs what it returns.
Source: docs/wire-format.md; Nebula for the order of checks and the connection manager.
"""

from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import BlocklistedError, CaPool
from nebula_mp.config.model import Config, LogLevel, RecvErrorPolicy
from nebula_mp.control import liveness
from nebula_mp.control.actions import Action
from nebula_mp.control.core import HINT_INTERVAL, Core, TimerKind
from nebula_mp.control.handshakes import Established, Handshakes
from nebula_mp.control.hostmap import REHANDSHAKE_COUNTER, HostMap, Tunnel
from nebula_mp.control.liveness import Decision
from nebula_mp.control.remotes import Remotes
from nebula_mp.crypto.aead import TAG_BYTES
from nebula_mp.errors import AuthError, CertError, ReplayError, TruncatedError, WireError
from nebula_mp.firewall.rules import Direction, Firewall, PeerNetworks, Verdict
from nebula_mp.newtypes import (
    CertVersion,
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
    HEADER_BYTES,
    MESSAGE_IP,
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
    received: int  # highest counter received


class Controller:
    """Feed it with `handle_*`; each call returns what is to be done, in order.

    Call `handle_timeout` at or after `next_timeout`. Times never go backwards. No input that a peer or a
    stranger sends raises: it is counted in `stats` under one reason and dropped.
    """

    def __init__(
        self, config: Config, identity: Identity, pool: CaPool, entropy: Entropy, now: Instant
    ) -> None:
        self._core = Core(
            config=config,
            identity=identity,
            pool=pool,
            entropy=entropy,
            firewall=Firewall(config.firewall, identity.newest),
            hostmap=HostMap(entropy),
            remotes=Remotes(identity.networks),
        )
        self._handshakes = Handshakes(self._core)
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
        hostmap = self._core.hostmap
        tunnels = [tunnel for tunnel in hostmap if tunnel.proven]
        tunnels.sort(key=lambda tunnel: (_order(tunnel.addresses[0]), not hostmap.is_primary(tunnel)))
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
                sent=tunnel.counter,
                received=tunnel.window.current,
            )
            for tunnel in tunnels
        ]

    # ---- underlay ----

    def handle_datagram(self, datagram: bytes, source: UdpAddr, now: Instant) -> list[Action]:
        """Take what arrived on the underlay socket, borrowed for the call."""
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
        core = self._core
        if header.type is MessageType.MESSAGE and header.subtype != MESSAGE_IP:
            # Relay frames have indexes of their own, and we have given out none.
            core.outbox.drop("relay_index", source, now)
            self._send_recv_error(header, source, now)
            return
        tunnel = core.hostmap.by_index(header.remote_index)
        if tunnel is None and self._handshakes.is_waiting(header.remote_index):
            core.outbox.drop("early", source, now)  # it overtook the stage 2 that makes it readable
            return
        if tunnel is None:
            core.outbox.drop("unknown_index", source, now)
            self._send_recv_error(header, source, now)
            return
        if len(datagram) < HEADER_BYTES + TAG_BYTES:
            core.outbox.drop("truncated", source, now)
            return
        try:
            tunnel.window.check(header.counter)
            plaintext = tunnel.session.receive.open(
                header.counter, datagram[:HEADER_BYTES], datagram[HEADER_BYTES:]
            )
            tunnel.window.update(header.counter)
        except ReplayError:
            core.outbox.drop("replay", source, now)
            return
        except AuthError:
            core.outbox.drop("auth", source, now)
            return
        if not tunnel.proven:
            self._flush(self._handshakes.prove(tunnel, source, now), now)
        elif source != tunnel.remote:
            self._follow(header, tunnel, source, now)
        tunnel.traffic.saw_in = True
        tunnel.traffic.last_in = now.mono
        self._dispatch(header, tunnel, plaintext, source, now)

    def _dispatch(
        self, header: Header, tunnel: Tunnel, plaintext: bytes, source: UdpAddr, now: Instant
    ) -> None:
        core = self._core
        match header.type:
            case MessageType.MESSAGE:
                self._handle_inner(tunnel, plaintext, source, now)
            case MessageType.TEST if header.subtype == TEST_REQUEST:
                # To where it came from: whoever asks wants to know whether that address works.
                core.send(tunnel, MessageType.TEST, TEST_REPLY, plaintext, source)
            case MessageType.TEST:
                pass  # its value was to arrive
            case MessageType.CLOSE_TUNNEL:
                core.outbox.log(LogLevel.INFO, "Close tunnel received, tearing down.", **_who(tunnel))
                core.forget(tunnel)
            case _:
                # Lighthouse and control messages are for roles that this host does not have.
                core.outbox.stats[f"messages.rx.ignored.{header.type.name.lower()}"] += 1

    def _handle_inner(self, tunnel: Tunnel, packet: bytes, source: UdpAddr, now: Instant) -> None:
        core = self._core
        try:
            flow = parse_flow(packet, inbound=True)
        except WireError as error:
            core.outbox.drop("inner_ip", source, now, error)
            return
        verdict = core.firewall.check(Direction.INBOUND, flow, tunnel.networks, now.mono)
        if verdict is Verdict.ALLOW:
            core.outbox.tun(packet)
        else:
            core.outbox.drop(f"firewall.incoming.{verdict.value}", source, now)

    def _follow(self, header: Header, tunnel: Tunnel, source: UdpAddr, now: Instant) -> None:
        """React to an authentic datagram from another address than the tunnel's.

        Somebody on the path can send a copy of it from anywhere, before the original arrives. So the
        peer is asked there for a reply first, and the tunnel moves when one comes.
        """
        if source == tunnel.roamed_from and now.mono - tunnel.roamed_at < _ROAM_BACK_GUARD:
            self._core.outbox.stats["roam.suppressed"] += 1
            return
        is_reply = header.type is MessageType.TEST and header.subtype == TEST_REPLY
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
            **_who(tunnel),
            newAddr=source,
        )
        left = tunnel.remote
        # The two ends may send on different tunnels for a while: all that lead to the old place move.
        for each in self._core.hostmap.tunnels(tunnel.addresses[0]):
            if each.remote == left:
                each.roamed_from, each.roamed_at = left, now.mono
                each.remote = source
                each.asked = None

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
        if core.config.tun.drop_local_broadcast and flow.remote in core.broadcasts:
            core.outbox.drop("tun.broadcast", None, now)
            return
        if core.config.tun.drop_multicast and _is_multicast(flow.remote):
            core.outbox.drop("tun.multicast", None, now)
            return
        tunnel = core.hostmap.primary_packed(flow.remote)
        if tunnel is not None:
            self._send_inner(tunnel, packet, flow, now)
        elif flow.remote in core.own_packed:
            core.outbox.drop("tun.own_address", None, now)
        else:
            target = ip_address(flow.remote)
            if core.remotes.inside_overlay(target):
                self._handshakes.start(target, now, packet=packet)
            else:
                core.outbox.drop("tun.no_route", None, now)

    def _send_inner(self, tunnel: Tunnel, packet: bytes, flow: FlowKey, now: Instant) -> bool:
        core = self._core
        verdict = core.firewall.check(Direction.OUTBOUND, flow, tunnel.networks, now.mono)
        if verdict is Verdict.ALLOW:
            return core.send(tunnel, MessageType.MESSAGE, MESSAGE_IP, packet)
        core.outbox.drop(f"firewall.outgoing.{verdict.value}", None, now)
        return False

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
                        self._check(tunnel, now)
        return core.outbox.drain()

    def _expire_candidate(self, index: int) -> None:
        tunnel = self._core.hostmap.by_index(index)
        if tunnel is not None and not tunnel.proven:
            self._core.outbox.stats["candidates.expired"] += 1
            self._core.forget(tunnel)

    def _check(self, tunnel: Tunnel, now: Instant) -> None:
        """Look after one proven tunnel, at most one alive interval after the last time."""
        core = self._core
        if not self._still_trusted(tunnel, now):
            core.close(tunnel)
            return
        if tunnel.exhausted:
            core.outbox.log(LogLevel.WARN, "Tunnel used up its message counter", **_who(tunnel))
            core.forget(tunnel)
            return
        config = core.config
        primary = core.hostmap.is_primary(tunnel)
        decision, again = liveness.check(
            tunnel.traffic, primary=primary, now=now.mono, tunnels=config.tunnels, timers=config.timers
        )
        match decision:
            case Decision.ALIVE if core.hostmap.is_first(tunnel):
                self._renew(tunnel, now)
            case Decision.ALIVE:
                self._swap_primary(tunnel)
            case Decision.IDLE | Decision.WAIT:
                pass
            case Decision.TEST:
                core.search(tunnel)
            case Decision.INACTIVE:
                core.outbox.log(LogLevel.INFO, "Dropping tunnel due to inactivity", **_who(tunnel))
                core.close(tunnel)
                return
            case Decision.DEAD:
                core.outbox.log(
                    LogLevel.INFO,
                    "Tunnel status",
                    tunnelCheck={"state": "dead", "method": "active"},
                    **_who(tunnel),
                )
                # If the peer lives after all, it shall not go on sending on what we forgot.
                core.close(tunnel)
                return
        core.timers.arm((TimerKind.CHECK, tunnel.local_index), again)

    def _still_trusted(self, tunnel: Tunnel, now: Instant) -> bool:
        """Tell whether the peer's certificate would be accepted today."""
        core = self._core
        try:
            core.pool.recheck(tunnel.session.peer, now.wall_s)
        except BlocklistedError as error:
            reason: CertError = error
        except CertError as error:
            if not core.config.pki.disconnect_invalid:
                return True
            reason = error
        else:
            return True
        core.outbox.log(
            LogLevel.INFO,
            "Remote certificate is no longer valid, tearing down the tunnel",
            **_who(tunnel),
            fingerprint=tunnel.certificate.fingerprint,
            error=reason,
        )
        return False

    def _swap_primary(self, tunnel: Tunnel) -> None:
        """Move to the tunnel the peer uses. Only the host with the lower address does, so both end on one."""
        core = self._core
        used = core.hostmap.primary(tunnel.addresses[0])
        if used is not None and used.traffic.last_in >= tunnel.traffic.last_in:
            return  # what came through this one came before the peer took to the other, or restarted
        mine = core.own_networks[0].ip
        if _order(tunnel.addresses[0]) < _order(mine) or tunnel.counter >= REHANDSHAKE_COUNTER:
            return
        current = core.identity.certificates.get(tunnel.session.own_certificate.version)
        if current is not None and current.signature != tunnel.session.own_certificate.signature:
            return
        core.hostmap.make_primary(tunnel)

    def _renew(self, tunnel: Tunnel, now: Instant) -> None:
        """Start a handshake if this tunnel should be replaced; it stays in use until the new one is up."""
        identity = self._core.identity
        used = tunnel.session.own_certificate
        peer_version = tunnel.certificate.version
        version: CertVersion | None = None
        if used.version not in identity.certificates:
            reason = "local cert removed"
        elif peer_version > used.version and peer_version in identity.certificates:
            reason, version = "local cert version lower than peer", peer_version
        elif identity.certificates[used.version].signature != used.signature:
            reason = "local cert is not current"
        elif used.version < identity.initiating_version:
            reason = "current cert version < pki.initiating_version"
        elif tunnel.counter >= REHANDSHAKE_COUNTER:
            reason = "message counter threshold"
        else:
            return
        if self._handshakes.is_open(tunnel.addresses):
            return
        self._core.outbox.log(LogLevel.INFO, "Re-handshaking with remote", **_who(tunnel), reason=reason)
        self._handshakes.start(tunnel.addresses[0], now, version=version)

    # ---- commands ----

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
        core.firewall.replace(config.firewall, identity.newest, now.mono)
        for tunnel in core.hostmap:
            tunnel.networks = PeerNetworks.of(tunnel.certificate, core.own_networks)
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


def _who(tunnel: Tunnel) -> dict[str, object]:
    """Give the fields that tell in a log line which tunnel it is about."""
    return {
        "vpnAddrs": tunnel.addresses,
        "certName": tunnel.certificate.name,
        "udpAddr": tunnel.remote,
        "localIndex": tunnel.local_index,
        "remoteIndex": tunnel.remote_index,
    }


def _order(address: IPAddress) -> tuple[int, int]:
    """Sort IPv4 before IPv6, then by number: the order in which identities are compared."""
    return address.version, int(address)


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
