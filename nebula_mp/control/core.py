"""What the parts of the controller share: the tables, the keys, the outbox; and sealing into a tunnel.

Data flow: control.controller, control.handshakes <-> [control.core] -> control.outbox
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import CaPool
from nebula_mp.config.model import Config
from nebula_mp.control.hostmap import HostMap, Tunnel, packed_addresses
from nebula_mp.control.outbox import Outbox
from nebula_mp.control.plane import DataPlane
from nebula_mp.control.remotes import Remotes
from nebula_mp.control.timers import Timers
from nebula_mp.crypto.aead import TAG_BYTES
from nebula_mp.firewall.rules import Firewall
from nebula_mp.newtypes import Buffer, Entropy, IPAddress, IPInterface, Seconds, TunnelIndex, UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, TEST_REQUEST, MessageType

HINT_INTERVAL = Seconds(1.0)
"""One reaction per tunnel, kind and second to datagrams that are not authenticated."""


class TimerKind(Enum):
    """What a deadline is for."""

    CHECK = auto()  # liveness of a proven tunnel
    CANDIDATE = auto()  # end of a tunnel nobody proved
    HANDSHAKE = auto()  # next attempt of a handshake of ours


TimerKey = tuple[TimerKind, TunnelIndex | IPAddress]


@dataclass(slots=True)
class Core:
    """State with one owner, the controller; replaced parts are assigned whole."""

    config: Config
    identity: Identity
    pool: CaPool
    entropy: Entropy
    firewall: Firewall
    plane: DataPlane
    hostmap: HostMap
    remotes: Remotes
    outbox: Outbox = field(default_factory=Outbox)
    timers: Timers[TimerKey] = field(default_factory=Timers)
    own_packed: frozenset[bytes] = field(init=False)  # our overlay addresses, as packets carry them
    broadcasts: frozenset[bytes] = field(init=False)  # directed broadcast of each of our IPv4 networks

    def __post_init__(self) -> None:
        self.set_identity(self.identity)

    def set_identity(self, identity: Identity) -> None:
        """Use these certificates and this key, and all that follows from our addresses."""
        self.identity = identity
        self.own_packed = packed_addresses(identity.networks)
        self.broadcasts = frozenset(
            interface.network.broadcast_address.packed
            for interface in identity.networks
            if interface.version == 4 and interface.network.prefixlen < 31
        )
        self.remotes.set_own_networks(identity.networks)

    @property
    def own_networks(self) -> tuple[IPInterface, ...]:
        """Our overlay addresses with their networks, those of the newest certificate."""
        return self.identity.networks

    def send(
        self,
        tunnel: Tunnel,
        kind: MessageType,
        subtype: int,
        plaintext: Buffer,
        to: UdpAddr | None = None,
    ) -> bool:
        """Seal one message and send it to the tunnel's address, or `to`; False and counted when exhausted."""
        counter = self.plane.try_reserve(tunnel, HEADER_BYTES + len(plaintext) + TAG_BYTES)
        if counter is None:
            self.outbox.stats["messages.tx.exhausted"] += 1
            return False
        self.outbox.datagram(tunnel.seal(counter, kind, subtype, plaintext), to or tunnel.remote)
        return True

    def send_test(self, tunnel: Tunnel, to: UdpAddr | None = None) -> None:
        """Ask the peer for a sign of life on this tunnel, at its address or at another it may have."""
        self.send(tunnel, MessageType.TEST, TEST_REQUEST, b"", to)

    def search(self, tunnel: Tunnel) -> None:
        """Ask for a sign of life wherever the peer may be; its answer moves the tunnel there."""
        self.send_test(tunnel)
        for remote in self.remotes.known(tunnel.addresses[0]):
            if remote != tunnel.remote:
                self.send_test(tunnel, remote)

    def close(self, tunnel: Tunnel) -> None:
        """Say goodbye on a tunnel and forget it."""
        self.send(tunnel, MessageType.CLOSE_TUNNEL, 0, b"")
        self.forget(tunnel)

    def forget(self, tunnel: Tunnel) -> None:
        """Remove a tunnel and its timers without a word."""
        self.hostmap.remove(tunnel)
        self.cancel_timers(tunnel)

    def cancel_timers(self, tunnel: Tunnel) -> None:
        """Drop the deadlines of a tunnel that is no longer in the hostmap."""
        self.timers.cancel((TimerKind.CHECK, tunnel.local_index))
        self.timers.cancel((TimerKind.CANDIDATE, tunnel.local_index))
