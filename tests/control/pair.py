"""Controllers joined by hand: a wire that holds datagrams until a test delivers, loses or copies them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from random import Random

from nebula_mp.cert.identity import Identity
from nebula_mp.config.model import Config, FirewallConfig, FirewallRule, PkiConfig
from nebula_mp.control.actions import Action, HandOver, LogEvent, SendDatagram, WriteTun
from nebula_mp.control.controller import Controller
from nebula_mp.newtypes import Counter, Instant, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.wire.header import Header, MessageType
from tests.support import packets
from tests.support.pki import ANY_TIME, Pki
from tests.support.plane import LocalPlane

ANY = FirewallConfig(inbound=(FirewallRule(),), outbound=(FirewallRule(),))
CONFIG = Config(pki=PkiConfig(ca="", cert="", key=""), firewall=ANY)
WALL_NS = ANY_TIME * 1_000_000_000


@dataclass
class Node:
    """One controller at one underlay address, and what came out of it."""

    controller: Controller
    address: IPAddress
    at: UdpAddr
    identity: Identity
    plane: LocalPlane
    delivered: list[bytes] = field(default_factory=list)
    logs: list[LogEvent] = field(default_factory=list)

    def log_lines(self) -> list[str]:
        return [event.message for event in self.logs]


@dataclass
class Datagram:
    data: bytes
    source: UdpAddr
    to: UdpAddr


class Wire:
    """A few nodes with certificates of one CA, a clock that stands still, and a queue of datagrams."""

    def __init__(self, count: int = 2, *, config: Config = CONFIG, static: bool = True) -> None:
        self.pki = Pki.shared()
        self.now = Instant(Seconds(1000.0), WALL_NS)
        self.queue: deque[Datagram] = deque()
        self.nodes: list[Node] = []
        self._by_addr: dict[UdpAddr, Node] = {}
        for number in range(1, count + 1):
            self.join(number, config=config)
        if static:
            self.everybody_knows_everybody()

    def join(self, number: int, *, config: Config = CONFIG, identity: Identity | None = None) -> Node:
        """Start (or restart, with empty memory) the node of this number."""
        identity = identity or self.pki.identity(f"host-{number}", f"10.42.0.{number}/16")
        plane = LocalPlane(lambda: self.now.mono)
        entropy = Random(number + len(self.nodes) * 100).randbytes
        controller = Controller(config, identity, self.pki.pool(), entropy, plane=plane, now=self.now)
        node = Node(
            controller,
            ip_address(f"10.42.0.{number}"),
            UdpAddr(ip_address(f"192.0.2.{number}"), 4242),
            identity,
            plane,
        )
        if number <= len(self.nodes):
            self.nodes[number - 1] = node
        else:
            self.nodes.append(node)
        self._by_addr[node.at] = node
        return node

    def everybody_knows_everybody(self) -> None:
        remotes = {node.address: [node.at] for node in self.nodes}
        for node in self.nodes:
            self.perform(node, node.controller.handle_resolved(remotes, self.now))

    def move(self, node: Node, at: UdpAddr) -> None:
        """Give a node another underlay address."""
        del self._by_addr[node.at]
        node.at = at
        self._by_addr[at] = node

    def perform(self, node: Node, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendDatagram(data, to):
                    self.queue.append(Datagram(data, node.at, to))
                case WriteTun(packet):
                    node.delivered.append(packet)
                case HandOver(_, datagram, source):
                    self.inject(node, datagram, source)
                case LogEvent():
                    node.logs.append(action)

    def inject(self, node: Node, data: bytes, source: UdpAddr) -> None:
        """Let a datagram arrive that no node sent."""
        self.perform(node, node.plane.receive(node.controller, data, source, self.now))

    def deliver_one(self) -> Datagram:
        """Deliver the oldest datagram."""
        datagram = self.queue.popleft()
        receiver = self._by_addr.get(datagram.to)
        if receiver is not None:
            self.inject(receiver, datagram.data, datagram.source)
        return datagram

    def settle(self, keep: Callable[[Datagram], bool] = lambda _: True) -> list[Datagram]:
        """Deliver until nothing is on the way; `keep` says what is not lost. Gives all that was sent."""
        seen: list[Datagram] = []
        while self.queue:
            assert len(seen) < 10_000, "the nodes never stop talking"
            if keep(self.queue[0]):
                seen.append(self.deliver_one())
            else:
                seen.append(self.queue.popleft())
        return seen

    def advance(self, seconds: float, keep: Callable[[Datagram], bool] = lambda _: True) -> list[Datagram]:
        """Let time pass, with every timer at its time and every datagram delivered at once."""
        end = self.now.mono + seconds
        seen = self.settle(keep)
        while True:
            due = [
                timeout
                for node in self.nodes
                if (timeout := node.controller.next_timeout()) is not None and timeout <= end
            ]
            if not due:
                break
            self.set_time(max(self.now.mono, min(due)))
            for node in self.nodes:
                timeout = node.controller.next_timeout()
                if timeout is not None and timeout <= self.now.mono:
                    self.perform(node, node.controller.handle_timeout(self.now))
            seen += self.settle(keep)
        self.set_time(end)
        return seen

    def set_time(self, mono: float) -> None:
        self.now = Instant(Seconds(mono), self.now.wall_ns + round((mono - self.now.mono) * 1e9))

    def send(self, source: Node, to: Node, payload: bytes = b"hello") -> bytes:
        """Let the host behind `source` send a UDP packet; gives the packet."""
        packet = udp(source.address, to.address, payload)
        self.perform(source, source.controller.handle_tun_packet(packet, self.now))
        return packet

    def connect(self, a: Node, b: Node) -> None:
        """Make both ends use one proven tunnel."""
        self.send(a, b)
        self.settle()
        self.send(b, a)
        self.settle()


def udp(source: IPAddress, to: IPAddress, payload: bytes = b"hello") -> bytes:
    return packets.ip(source, to, packets.UDP, packets.udp(source, to, 5000, 5000, payload))


def with_config(**changes: object) -> Config:
    return replace(CONFIG, **changes)  # type: ignore[arg-type]  # replace() cannot be typed


STRANGER = UdpAddr(ip_address("203.0.113.66"), 6666)


def kinds(datagrams: list[Datagram]) -> list[str]:
    names = []
    for datagram in datagrams:
        header = Header.parse(datagram.data)
        stage = f"_{header.counter}" if header.type is MessageType.HANDSHAKE else ""
        names.append(f"{header.type.name.lower()}{stage}")
    return names


def sealed(kind: MessageType, index: int, counter: int = 9) -> bytes:
    return Header(kind, 0, TunnelIndex(index), Counter(counter)).encode() + bytes(16)
