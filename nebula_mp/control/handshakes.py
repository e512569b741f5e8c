"""Handshakes in both roles: who is asked, who is answered, and when a tunnel may be used.

Data flow: control.controller -> [control.handshakes] -> handshake.machine, handshake.pending
                              -> control.hostmap (candidates and proven tunnels), control.outbox
Knows nothing of what travels inside a tunnel; waiting packets are handed back when one is up.
Source: docs/wire-format.md, "Handshake"; Nebula's handshake manager for retries and duplicates.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from nebula_mp.config.model import LogLevel
from nebula_mp.control.core import HINT_INTERVAL, Core, TimerKind
from nebula_mp.control.early import EarlyDatagrams
from nebula_mp.control.hostmap import CANDIDATE_LIFE, Tunnel
from nebula_mp.control.liveness import Traffic
from nebula_mp.errors import CertError, WireError
from nebula_mp.firewall.rules import PeerNetworks
from nebula_mp.handshake.machine import Completed, Initiator, Responder
from nebula_mp.handshake.pending import Attempt, GaveUp, Pending
from nebula_mp.newtypes import CertVersion, Counter, Instant, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, STAGE_1_COUNTER, STAGE_2_COUNTER, Header, MessageType

PENDING = 4096
"""Handshakes of ours that may be open at once; packets for further hosts are dropped and counted."""


@dataclass(slots=True)
class _Open:
    """A handshake we started: its schedule, its queue, and the Noise state once stage 1 is built."""

    target: IPAddress
    pending: Pending
    version: CertVersion | None  # forced by a re-handshake
    initiator: Initiator | None = None
    local_index: TunnelIndex | None = None
    sent: bool = False  # stage 1 left at least once


@dataclass(frozen=True, slots=True)
class Established:
    """A tunnel that may be used from now on, and the packets that waited for it."""

    tunnel: Tunnel
    queue: list[bytes] = field(default_factory=list)


class Handshakes:
    """All open handshakes. Stage 1 in, stage 2 in, time in; datagrams go to the outbox."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open: dict[IPAddress, _Open] = {}
        self._open_by_index: dict[TunnelIndex, _Open] = {}
        self._early = EarlyDatagrams()
        self._last_time_ns = 0

    def __len__(self) -> int:
        return len(self._open)

    def is_open(self, addresses: Iterable[IPAddress]) -> bool:
        """Tell whether a handshake of ours with any of a peer's addresses is under way."""
        return any(address in self._open for address in addresses)

    def is_waiting(self, index: TunnelIndex) -> bool:
        """Tell whether a handshake of ours has this local index and no answer yet."""
        return index in self._open_by_index

    def handle_early(self, index: TunnelIndex, datagram: bytes, source: UdpAddr, now: Instant) -> None:
        """Keep a datagram of the tunnel that a waiting handshake may become, or count why not."""
        assert index in self._open_by_index
        if not self._early.try_keep(index, datagram, source):
            self._core.outbox.drop("early", source, now)

    def start(
        self,
        target: IPAddress,
        now: Instant,
        *,
        packet: bytes | None = None,
        version: CertVersion | None = None,
    ) -> None:
        """Begin a handshake unless one is under way; `packet` waits for it.

        `version` forces the certificate version; it only matters for a handshake that begins here.
        """
        handshake = self._open.get(target)
        if handshake is None:
            if len(self._open) >= PENDING:
                self._core.outbox.drop("pending_full", None, now)
                return
            config = self._core.config.handshakes
            pending = Pending(now=now.mono, interval=config.try_interval, attempts_max=config.retries)
            handshake = self._open[target] = _Open(target, pending, version)
            self._core.outbox.stats["handshake_manager.initiated"] += 1
            self._queue(handshake, packet)
            self._advance(handshake, now)
            return
        self._queue(handshake, packet)

    def handle_timeout(self, target: IPAddress, now: Instant) -> None:
        """Make the attempt that is due for `target`."""
        handshake = self._open.get(target)
        if handshake is not None:
            self._advance(handshake, now)

    def handle_new_remotes(self, now: Instant) -> None:
        """Try at once where nothing could be sent so far: an address may have become known."""
        for handshake in list(self._open.values()):
            if not handshake.sent and self._remotes(handshake.target):
                handshake.pending.trigger(now.mono)
                self._advance(handshake, now)

    def handle_stage1(self, header: Header, datagram: bytes, source: UdpAddr, now: Instant) -> None:
        """Answer somebody's first message; what comes of it is a candidate, see control.hostmap."""
        core = self._core
        if header.remote_index != 0 or header.counter != STAGE_1_COUNTER:
            core.outbox.drop("handshake_header", source, now)
            return
        known = core.hostmap.by_stage1(datagram[HEADER_BYTES:])
        if known is not None:
            # A repeated question gets the stored answer, byte for byte, and changes no proven tunnel.
            core.outbox.stats["handshake.duplicate"] += 1
            core.outbox.datagram(known.session.stage2, source)
            if not known.proven:
                core.send_test(known)
            return
        responder = Responder(core.identity, core.config.cipher, core.entropy)
        try:
            stage1 = responder.read_stage1(datagram, core.pool, now.wall_s)
        except CertError as error:
            core.outbox.drop("handshake_cert", source, now, error, LogLevel.INFO)
            return
        except WireError as error:
            core.outbox.drop("handshake", source, now, error)
            return
        addresses = stage1.peer.certificate.addresses
        primary = core.hostmap.primary(addresses[0])
        if (
            primary is not None
            and not primary.session.is_initiator
            and primary.session.peer_time_ns >= stage1.time_ns
        ):
            # Either an old copy, or a peer whose clock went back: a test on the tunnel tells which,
            # since a peer that lost the tunnel answers with recv_error.
            core.outbox.drop("handshake_old", source, now)
            if now.mono - primary.probed_at >= HINT_INTERVAL:
                primary.probed_at = now.mono
                core.send_test(primary)
            return
        self._answer(responder, source, now)

    def handle_stage2(
        self, header: Header, datagram: bytes, source: UdpAddr, now: Instant
    ) -> Established | None:
        """Complete a handshake of ours; the tunnel is proven, since only the peer could answer."""
        core = self._core
        handshake = self._open_by_index.get(header.remote_index)
        if handshake is None or handshake.initiator is None:
            core.outbox.drop("handshake_unknown", source, now)
            return None
        try:
            session = handshake.initiator.read_stage2(datagram, core.pool, now.wall_s)
        except CertError as error:
            # Anyone on the path can build a stage 2 with a key of his own; only a certificate that we
            # trust makes it the answer of a host. So this one is dropped like any forgery, and we wait on.
            core.outbox.drop("handshake_cert", source, now, error, LogLevel.INFO)
            return None
        except WireError as error:
            core.outbox.drop("handshake", source, now, error)
            return None
        addresses = session.peer.certificate.addresses
        if handshake.target not in addresses:
            self._handle_wrong_host(handshake, session, source, now)
            return None
        asked = self._remotes(handshake.target)
        # The index passes from the handshake to the tunnel.
        self._forget(handshake)
        tunnel = self._tunnel(session, source, now, proven=True)
        surplus = core.hostmap.add(tunnel)
        # First of all: what the data path opens by itself from here on came later than these.
        for early, origin in self._early.take(tunnel.local_index):
            core.outbox.hand_over(tunnel.local_index, early, origin)
        established = self._establish(tunnel, surplus, now, handshake.pending.take_queue())
        duration_ns = int((now.mono - handshake.pending.started) * 1e9)
        self._log_established(tunnel, stage=2, durationNs=duration_ns)
        if source not in asked:
            # Either the peer has several addresses, or somebody on the path sent a copy of its answer.
            core.search(tunnel)
        elif not established.queue:
            # The responder may not send on the tunnel before it has heard from us.
            core.send_test(tunnel)
        return established

    def prove(self, tunnel: Tunnel, source: UdpAddr, now: Instant) -> Established:
        """Turn a candidate into the peer's primary tunnel: a datagram on it was authentic."""
        core = self._core
        tunnel.remote = source
        surplus = core.hostmap.prove(tunnel)
        core.cancel_timers(tunnel)
        queue: list[bytes] = []
        for address in tunnel.addresses:
            handshake = self._open.get(address)
            if handshake is not None:
                queue += handshake.pending.take_queue()
                if not handshake.sent:
                    self._abandon(handshake)
        established = self._establish(tunnel, surplus, now, queue)
        self._log_established(tunnel, stage=1)
        return established

    def handle_stop(self) -> None:
        """Forget every open handshake."""
        for handshake in list(self._open.values()):
            self._abandon(handshake)

    def _queue(self, handshake: _Open, packet: bytes | None) -> None:
        if packet is not None and not handshake.pending.try_queue(packet):
            self._core.outbox.stats["hostinfo.cached_packets.dropped"] += 1

    def _remotes(self, target: IPAddress) -> list[UdpAddr]:
        learned = [tunnel.remote for tunnel in self._core.hostmap.tunnels(target)]
        return self._core.remotes.known(target, learned)

    def _advance(self, handshake: _Open, now: Instant) -> None:
        core = self._core
        match handshake.pending.handle_timeout(now.mono):
            case GaveUp(attempts, waited):
                core.outbox.stats["handshake_manager.timed_out"] += 1
                # A re-handshake that fails leaves a working tunnel behind: no reason to raise an alarm.
                level = LogLevel.INFO if core.hostmap.primary(handshake.target) is None else LogLevel.DEBUG
                core.outbox.log(
                    level,
                    "Handshake timed out",
                    vpnAddr=handshake.target,
                    udpAddrs=self._remotes(handshake.target),
                    attempts=attempts,
                    durationNs=int(waited * 1e9),
                )
                # An address that another host answered from may be right again at the next try.
                core.remotes.unblock([handshake.target])
                self._abandon(handshake)
                return
            case Attempt():
                self._attempt(handshake, now)
            case None:
                pass
        core.timers.arm((TimerKind.HANDSHAKE, handshake.target), handshake.pending.next_timeout())

    def _attempt(self, handshake: _Open, now: Instant) -> None:
        core = self._core
        if handshake.initiator is None:
            handshake.initiator = self._build(handshake, now)
            if handshake.initiator is None:
                return
        for remote in self._remotes(handshake.target):
            core.outbox.datagram(handshake.initiator.stage1, remote)
            handshake.sent = True

    def _build(self, handshake: _Open, now: Instant) -> Initiator | None:
        core = self._core
        version = handshake.version or core.identity.initiating_version
        if version is CertVersion.V1 and handshake.target.version == 6:
            version = CertVersion.V2
        if version not in core.identity.certificates:
            core.outbox.log(
                LogLevel.INFO,
                "Unable to handshake with host because no certificate of the version is available",
                vpnAddr=handshake.target,
                certVersion=int(version),
            )
            return None
        remotes = self._remotes(handshake.target)
        index = core.hostmap.indexes.try_allocate(core.plane.share_for(remotes[0]) if remotes else 0)
        if index is None:
            core.outbox.drop("tunnels_full", None, now)
            return None
        handshake.local_index = index
        self._open_by_index[index] = handshake
        return Initiator(
            core.identity,
            core.config.cipher,
            version,
            core.entropy,
            local_index=index,
            time_ns=self._time_ns(now),
        )

    def _time_ns(self, now: Instant) -> int:
        """Give a handshake time; peers refuse one that is not larger than the last they accepted."""
        self._last_time_ns = max(now.wall_ns, self._last_time_ns + 1)
        return self._last_time_ns

    def _answer(self, responder: Responder, source: UdpAddr, now: Instant) -> None:
        core = self._core
        index = core.hostmap.indexes.try_allocate(core.plane.share_for(source))
        if index is None:
            core.outbox.drop("tunnels_full", source, now)
            return
        try:
            session = responder.write_stage2(index, max(now.wall_ns, self._last_time_ns))
        except WireError as error:
            core.hostmap.indexes.release(index)
            core.outbox.drop("handshake", source, now, error)
            return
        tunnel = self._tunnel(session, source, now, proven=False)
        for evicted in core.hostmap.add_candidate(tunnel):
            core.cancel_timers(evicted)
            core.outbox.stats["candidates.evicted"] += 1
        core.timers.arm((TimerKind.CANDIDATE, index), Seconds(now.mono + CANDIDATE_LIFE))
        core.outbox.datagram(session.stage2, source)
        core.send_test(tunnel)

    def _tunnel(self, session: Completed, source: UdpAddr, now: Instant, *, proven: bool) -> Tunnel:
        return Tunnel(
            session,
            PeerNetworks.of(session.peer.certificate, self._core.own_networks),
            remote=source,
            traffic=Traffic(last_used=now.mono, saw_out=True),
            proven=proven,
        )

    def _handle_wrong_host(self, handshake: _Open, session: Completed, source: UdpAddr, now: Instant) -> None:
        core = self._core
        core.outbox.log(
            LogLevel.INFO,
            "Incorrect host responded to handshake",
            vpnAddr=handshake.target,
            haveVpnAddrs=session.peer.certificate.addresses,
            certName=session.peer.certificate.name,
            udpAddr=source,
        )
        # The data path never hears of this tunnel, so its first counter is free.
        session.keys.wipe()
        goodbye = self._tunnel(session, source, now, proven=True)
        first = Counter(STAGE_2_COUNTER + 1)
        core.outbox.datagram(goodbye.seal(first, MessageType.CLOSE_TUNNEL, 0, b""), source)
        core.remotes.block(handshake.target, source)
        queue = handshake.pending.take_queue()
        self._abandon(handshake)
        self.start(handshake.target, now, version=handshake.version)
        for packet in queue:
            self.start(handshake.target, now, packet=packet)

    def _establish(
        self, tunnel: Tunnel, surplus: list[Tunnel], now: Instant, queue: list[bytes]
    ) -> Established:
        core = self._core
        for old in surplus:
            core.cancel_timers(old)
        tunnel.traffic.last_in = now.mono
        core.remotes.unblock(tunnel.addresses)
        interval = core.config.timers.connection_alive_interval
        core.timers.arm((TimerKind.CHECK, tunnel.local_index), Seconds(now.mono + interval))
        return Established(tunnel, queue)

    def _log_established(self, tunnel: Tunnel, stage: int, **more: object) -> None:
        session = tunnel.session
        ours, theirs = tunnel.local_index, tunnel.remote_index
        self._core.outbox.log(
            LogLevel.INFO,
            "Handshake message received",
            vpnAddrs=tunnel.addresses,
            udpAddr=tunnel.remote,
            certName=tunnel.certificate.name,
            certVersion=int(tunnel.certificate.version),
            fingerprint=tunnel.certificate.fingerprint,
            issuer=tunnel.certificate.issuer,
            initiatorIndex=ours if session.is_initiator else theirs,
            responderIndex=theirs if session.is_initiator else ours,
            handshake={"stage": stage, "style": "ix_psk0"},
            **more,
        )

    def _abandon(self, handshake: _Open) -> None:
        """Forget a handshake together with its index, and what came for it."""
        self._forget(handshake)
        if handshake.local_index is not None:
            self._core.outbox.stats["drop.early"] += len(self._early.take(handshake.local_index))
            self._core.hostmap.indexes.release(handshake.local_index)

    def _forget(self, handshake: _Open) -> None:
        del self._open[handshake.target]
        if handshake.local_index is not None:
            del self._open_by_index[handshake.local_index]
        self._core.timers.cancel((TimerKind.HANDSHAKE, handshake.target))
