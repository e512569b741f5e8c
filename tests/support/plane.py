"""A data path inside one process, for controllers that are tested without readers and rings.

It does at once what the shared tables and the readers do together: it keeps send counters and replay windows,
opens messages, and counts what passes. Flows are never let through without asking.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from nebula_mp.control.actions import Action
from nebula_mp.control.controller import Controller
from nebula_mp.control.hostmap import Tunnel
from nebula_mp.control.plane import Grant, Opened, Passed
from nebula_mp.crypto.aead import TAG_BYTES
from nebula_mp.crypto.replay import ReplayWindow
from nebula_mp.errors import AuthError, ReplayError, WireError
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.newtypes import Counter, Instant, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.wire.header import (
    COUNTER_LIMIT,
    HEADER_BYTES,
    MESSAGE_RELAY,
    STAGE_2_COUNTER,
    Header,
    MessageType,
)
from nebula_mp.wire.ip import FlowKey

NEVER = Seconds(float("-inf"))


@dataclass
class OpenTunnel:
    """What is known of one tunnel beside what the controller knows."""

    tunnel: Tunnel
    window: ReplayWindow = field(default_factory=ReplayWindow.after_handshake)
    counter: Counter = STAGE_2_COUNTER  # the last one used
    received: int = 0
    sent: int = 0
    last_in: Seconds = NEVER


class LocalPlane:
    """A control.plane.DataPlane; `clock` says when a message was opened."""

    def __init__(self, clock: Callable[[], Seconds], workers: int = 1) -> None:
        self.workers = workers
        self.tunnels: dict[TunnelIndex, OpenTunnel] = {}
        self.routes: dict[IPAddress, TunnelIndex] = {}
        self.allowed: list[FlowKey] = []
        self.refused: list[tuple[FlowKey, Direction]] = []
        self.forgotten = 0
        self._clock = clock

    def share_for(self, remote: UdpAddr) -> int:
        return int(remote.ip) % self.workers

    def opened(self, tunnel: Tunnel) -> None:
        assert tunnel.local_index not in self.tunnels
        tunnel.session.keys.wipe()
        self.tunnels[tunnel.local_index] = OpenTunnel(tunnel)

    def changed(self, tunnel: Tunnel) -> None:
        assert tunnel.local_index in self.tunnels

    def closed(self, tunnel: Tunnel) -> None:
        del self.tunnels[tunnel.local_index]
        assert tunnel.local_index not in self.routes.values()

    def route(self, peer: IPAddress, tunnel: Tunnel | None) -> None:
        if tunnel is None:
            del self.routes[peer]
        else:
            assert tunnel.proven
            assert tunnel.local_index in self.tunnels
            self.routes[peer] = tunnel.local_index

    def try_reserve(self, tunnel: Tunnel, size_bytes: int) -> Counter | None:
        assert size_bytes >= HEADER_BYTES
        known = self.tunnels.get(tunnel.local_index)
        if known is None or known.counter + 1 >= COUNTER_LIMIT:
            return None
        known.counter = Counter(known.counter + 1)
        known.sent += 1
        return known.counter

    def last_counter(self, tunnel: Tunnel) -> Counter:
        return self.tunnels[tunnel.local_index].counter

    def receive(self, controller: Controller, datagram: bytes, source: UdpAddr, now: Instant) -> list[Action]:
        """Do what readers do with a datagram, and hand to the controller what they would."""
        try:
            header = Header.parse(datagram)
        except WireError:
            return controller.handle_datagram(datagram, source, now)
        known = self.tunnels.get(header.remote_index)
        is_relay = header.type is MessageType.MESSAGE and header.subtype == MESSAGE_RELAY
        if known is None or is_relay or header.type in {MessageType.HANDSHAKE, MessageType.RECV_ERROR}:
            return controller.handle_datagram(datagram, source, now)
        if len(datagram) < HEADER_BYTES + TAG_BYTES:
            controller.stats["drop.truncated"] += 1
            return []
        try:
            known.window.check(header.counter)
            plaintext = known.tunnel.session.receive.open(
                header.counter, datagram[:HEADER_BYTES], datagram[HEADER_BYTES:]
            )
        except (ReplayError, AuthError) as error:
            controller.stats["drop.replay" if isinstance(error, ReplayError) else "drop.auth"] += 1
            return []
        known.window.update(header.counter)
        known.received += 1
        known.last_in = self._clock()
        message = Opened(header.type, header.subtype, plaintext, source)
        return controller.handle_opened(header.remote_index, message, now)

    def passed(self, tunnel: Tunnel) -> Passed:
        known = self.tunnels.get(tunnel.local_index)
        return Passed(0, NEVER, 0) if known is None else Passed(known.received, known.last_in, known.sent)

    def queue_for(self, tunnel: Tunnel) -> int:
        return tunnel.local_index % self.workers

    def allow(self, flow: FlowKey, tunnel: Tunnel, grant: Grant, now: Seconds) -> None:
        assert tunnel.local_index in self.tunnels
        assert grant.direction in grant.between
        assert now == self._clock()
        self.allowed.append(flow)

    def refuse(self, flow: FlowKey, tunnel: Tunnel | None, direction: Direction, now: Seconds) -> None:
        assert tunnel is None or tunnel.local_index in self.tunnels
        assert now == self._clock()
        self.refused.append((flow, direction))

    def origin(self, flow: FlowKey, now: Seconds) -> Direction | None:
        """It admits nothing by itself."""
        assert flow.local
        assert now == self._clock()
        return None

    def last_seen(self, flow: FlowKey) -> Seconds | None:
        assert flow.local
        return None

    def forget_flows(self) -> None:
        self.forgotten += 1

    def seal(self, tunnel: Tunnel, kind: MessageType, subtype: int, plaintext: bytes) -> bytes:
        """Seal a message as this host would, without its controller."""
        counter = self.try_reserve(tunnel, HEADER_BYTES)
        assert counter is not None
        return tunnel.seal(counter, kind, subtype, plaintext)
