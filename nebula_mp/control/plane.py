"""What the controller asks of the data path, which carries the packets of established flows by itself.

Data flow: control.controller, control.hostmap -> [control.plane] -> workers.tables (shared memory) -> readers
                                                                  -> the simulator's own data path
Knows which facts the data path goes by; knows nothing of how they are shared. Nothing here waits, and nothing
fails: what the data path has no room for comes back to the controller, packet by packet.
Source: docs/architecture.md, "Shared memory".
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nebula_mp.config.model import ConntrackConfig
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.handshake.machine import Completed
from nebula_mp.newtypes import Counter, IPAddress, Seconds, UdpAddr
from nebula_mp.wire.header import MessageType
from nebula_mp.wire.ip import FlowKey

if TYPE_CHECKING:
    from nebula_mp.control.hostmap import Tunnel


class Opened(NamedTuple):
    """An authentic and fresh message, whoever opened it, and where it came from."""

    kind: MessageType
    subtype: int
    plaintext: bytes
    source: UdpAddr


class Passed(NamedTuple):
    """What went through a tunnel so far, in the hands of all processes together."""

    received: int  # authentic messages
    last_in: Seconds  # when the latest of them came; -inf for none
    sent: int  # messages sealed


@dataclass(frozen=True, slots=True)
class Grant:
    """What the firewall says of a flow that it allows."""

    direction: Direction  # of the packet that a rule allowed
    between: frozenset[Direction]
    """Any flow between the same two addresses that begins in one of these directions is allowed as well."""
    timeouts: ConntrackConfig  # for the flow, and for those others


@dataclass(frozen=True, slots=True)
class Saved:
    """A proven tunnel that outlived the control process that made it."""

    session: Completed
    remote: UdpAddr
    primary: bool  # for the peer's first address


class DataPlane(Protocol):
    """Told of every tunnel that begins, changes or ends, and asked for what only the data path knows."""

    workers: int
    """How many shares the local indexes fall into: an index belongs to share `index % workers`."""

    def share_for(self, remote: UdpAddr) -> int:
        """The share that a new tunnel to this underlay address should fall into."""

    def opened(self, tunnel: "Tunnel") -> None:
        """A tunnel, candidate or proven, from now on takes messages; its send counter begins."""

    def changed(self, tunnel: "Tunnel") -> None:
        """Its underlay address, its state or what its peer may send from is another now."""

    def closed(self, tunnel: "Tunnel") -> None:
        """It takes and sends nothing more; its keys are wiped."""

    def route(self, peer: IPAddress, tunnel: "Tunnel | None") -> None:
        """Send through this tunnel from now on what is for the host whose first address is `peer`."""

    def try_reserve(self, tunnel: "Tunnel", size_bytes: int) -> Counter | None:
        """Take the next send counter, for a message of this size, for good; None if there is none now."""

    def last_counter(self, tunnel: "Tunnel") -> Counter:
        """The last send counter that anybody took."""

    def passed(self, tunnel: "Tunnel") -> Passed:
        """What went through the tunnel; all zero for one that is not open."""

    def queue_for(self, tunnel: "Tunnel") -> int:
        """The TUN queue that packets from this tunnel are written to."""

    def allow(self, flow: FlowKey, tunnel: "Tunnel", grant: Grant, now: Seconds) -> None:
        """Let a flow pass both ways without asking again, until it rests for its timeout.

        And let the data path admit what else is granted, for a while: then it asks again. It takes effect
        when the packet in hand has been performed, so that no later one overtakes it.
        """

    def refuse(self, flow: FlowKey, tunnel: "Tunnel | None", direction: Direction, now: Seconds) -> None:
        """Drop this flow's packets of one direction for a second without asking."""

    def origin(self, flow: FlowKey, now: Seconds) -> Direction | None:
        """The direction in which a flow began that the data path admitted itself, and that has not expired.

        By whatever rules: those of today may not allow it. None if it did not admit such a flow.
        """

    def last_seen(self, flow: FlowKey) -> Seconds | None:
        """When the data path last passed a packet of this flow; None if it does not know it."""

    def forget_flows(self) -> None:
        """Ask again about every flow: the rules, or what they look at, changed."""
