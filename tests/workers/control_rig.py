"""A control process in the test's own event loop; the test is its supervisor, services, readers and peer.

Data flow: tests/workers -> [workers.control_rig] -> nebula_mp.workers.control.Control over workers.memory.Memory
Everything it is given is real but the TUN queues, which are pairs of sockets that keep the borders of packets.
A `Hand` does step by step what a reader does by itself; the peer is a Controller over a data path of its own.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any, TypeVar, cast

from nebula_mp import clock
from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.identity import Identity
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.config.model import (
    NO_OFFLOADS,
    Config,
    FirewallConfig,
    FirewallRule,
    HandshakesConfig,
    HostPort,
    ListenConfig,
    LoggingConfig,
    LogLevel,
    Offloads,
    PkiConfig,
    TimersConfig,
)
from nebula_mp.control.actions import Action, HandOver, SendDatagram, WriteTun
from nebula_mp.control.controller import Controller
from nebula_mp.crypto.aead import Ciphers
from nebula_mp.datapath.api import CONTROL, Arrival, UpcallLimits, UpcallReason, parse_record
from nebula_mp.datapath.filling import Drops, Upcalls
from nebula_mp.newtypes import Instant, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import LockFile, Mapping
from nebula_mp.shm_counters import SendCounters, Traffic
from nebula_mp.shm_flows import FlowView
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_ring import DATA, STATE, TAIL, Bell, Consumer, Producer
from nebula_mp.shm_stats import StatsPage
from nebula_mp.shm_table import FLOWS, KEYS, PEERS, SEEN, SEND, SPAN, TRAFFIC, TUNNELS, PeerRef
from nebula_mp.shm_tunnels import TunnelRow, TunnelState, TunnelView
from nebula_mp.steering import SteeringGroup
from nebula_mp.udp_socket import UdpSocket, from_sockaddr
from nebula_mp.wire.header import (
    HEADER_BYTES,
    MESSAGE_IP,
    TEST_REPLY,
    TEST_REQUEST,
    Header,
    MessageType,
)
from nebula_mp.wire.ip import parse_flow
from nebula_mp.workers.channel import Channel, Message
from nebula_mp.workers.checked import Checked, PkiSources, encode, read_pki
from nebula_mp.workers.control import Control
from nebula_mp.workers.host import Host
from nebula_mp.workers.logs import Logs
from nebula_mp.workers.loop import run
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.parts import ControlParts, ReaderParts, Role, ServicesParts
from tests.support import packets
from tests.support.pki import ANY_TIME, Pki
from tests.support.plane import LocalPlane

LIMIT_S = 30.0
WORKERS = 2
US, THEM = ip_address("10.42.0.1"), ip_address("10.42.0.2")
ANYTHING = FirewallConfig(inbound=(FirewallRule(),), outbound=(FirewallRule(),))
# So long that nothing happens but what a test causes, however slow the machine is.
NO_CHECKS = TimersConfig(connection_alive_interval=Seconds(3600))
NO_RETRIES = HandshakesConfig(try_interval=Seconds(3600))
OUR_IDENTITY = Pki.shared().identity("us", f"{US}/24")
THEIR_IDENTITY = Pki.shared().identity("them", f"{THEM}/24")

T = TypeVar("T")
Story = Callable[[], Awaitable[None]]
Row = TunnelRow[Ciphers]


def config(**changes: Any) -> Config:
    """A configuration whose firewall lets everything pass, and that knows no peer."""
    base = Config(
        pki=PkiConfig(ca="", cert="", key=""),
        firewall=ANYTHING,
        timers=NO_CHECKS,
        handshakes=NO_RETRIES,
        logging=LoggingConfig(level=LogLevel.DEBUG, format="json"),
    )
    return replace(base, **changes)


def key_memory(text: str) -> int:
    """A memfd as the supervisor keeps it for control."""
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    os.write(descriptor, text.encode())
    return descriptor


def checked(key: int, settings: Config, identity: Identity = OUR_IDENTITY, pki: Pki | None = None) -> Checked:
    """As workers.checked finds it; `key` is the descriptor."""
    certificates = "".join(map(encode_pem, identity.certificates.values()))
    ca = encode_pem((pki or Pki.shared()).ca)
    return Checked(
        config=replace(settings, pki=replace(settings.pki, ca=ca, cert=certificates)),
        pki_sources=PkiSources(cert="pki.cert c", key="pki.key k", ca="pki.ca a"),
        warnings=(),
        sources=("/etc/nebula/config.yml",),
        networks=identity.networks,
        name=identity.newest.name,
        at=ANY_TIME,
        key=key,
    )


def udp_packet(source: IPAddress, to: IPAddress, payload: bytes = b"hello", *, port: int = 5000) -> bytes:
    return packets.ip(source, to, packets.UDP, packets.udp(source, to, port, port, payload))


def outbound(payload: bytes = b"there", *, port: int = 5000) -> bytes:
    return udp_packet(US, THEM, payload, port=port)


def inbound(payload: bytes = b"back", *, port: int = 5000) -> bytes:
    return udp_packet(THEM, US, payload, port=port)


def address_of(bound: socket.socket) -> UdpAddr:
    return from_sockaddr(bound.getsockname())


def loopback(host: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    bound.bind((host, 0))
    return bound


def queue_pair() -> tuple[socket.socket, socket.socket]:
    """What stands in for a TUN queue, and the local stack behind it."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait for something to become true; TimeoutError if it does not."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - many kinds of conditions
            await asyncio.sleep(0.002)


async def collect(wanted: T, source: Callable[[], Iterable[T]]) -> list[T]:
    """Take from `source` until what is wanted has come; everything that came."""
    found: list[T] = []

    def came() -> bool:
        found.extend(source())
        return wanted in found

    await until(came)
    return found


class Peer:
    """A host with one process, at a socket of the loopback interface."""

    def __init__(self, identity: Identity = THEIR_IDENTITY, host: str = "127.0.0.1") -> None:
        self.socket = loopback(host)
        self.at = address_of(self.socket)
        self._now = clock.now()
        self.plane = LocalPlane(lambda: self._now.mono)
        self.controller = Controller(
            config(), identity, Pki.shared().pool(), clock.entropy, plane=self.plane, now=self._now
        )
        self.answers = True  # or only listens
        self.received: list[bytes] = []  # every datagram, as it came
        self.delivered: list[bytes] = []  # to its local stack

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take part in what goes on in this loop."""
        loop.add_reader(self.socket, self._on_udp)
        self._tick(loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        due = self.controller.next_timeout()
        now = self._look()
        if due is not None and due <= now.mono:
            self._perform(self.controller.handle_timeout(now))
        loop.call_later(0.02, self._tick, loop)

    def _look(self) -> Instant:
        self._now = clock.now()
        return self._now

    def _on_udp(self) -> None:
        datagram, source = self.socket.recvfrom(10_000)
        self.received.append(datagram)
        if self.answers:
            self._perform(self.plane.receive(self.controller, datagram, from_sockaddr(source), self._look()))

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case SendDatagram(data, to):
                    self.socket.sendto(data, (str(to.ip), to.port))
                case WriteTun(packet):
                    self.delivered.append(packet)
                case HandOver(_, datagram, source):
                    self._perform(self.plane.receive(self.controller, datagram, source, self._now))

    def send(self, packet: bytes) -> None:
        """Let its local stack send a packet."""
        self._perform(self.controller.handle_tun_packet(packet, self._look()))

    def learn(self, overlay: IPAddress, at: UdpAddr) -> None:
        self._perform(self.controller.handle_resolved({overlay: [at]}, self._look()))

    def ask(self, to: UdpAddr) -> None:
        """Ask for a sign of life on its one tunnel."""
        (known,) = self.plane.tunnels.values()
        request = self.plane.seal(known.tunnel, MessageType.TEST, TEST_REQUEST, b"?")
        self.socket.sendto(request, (str(to.ip), to.port))

    @property
    def headers(self) -> list[Header]:
        """Of all datagrams it received."""
        return [Header.parse(datagram) for datagram in self.received]

    def count(self, kind: MessageType, subtype: int | None = None) -> int:
        """How many datagrams of this kind it received."""
        return sum(each.type is kind and subtype in (None, each.subtype) for each in self.headers)

    @property
    def handshakes(self) -> int:
        return self.count(MessageType.HANDSHAKE)


class Hand:
    """What one reader has of the shared memory; it does what it is told."""

    def __init__(self, parts: ReaderParts, udp: UdpSocket) -> None:
        self.number = parts.number
        self.memory = memory = parts.memory
        self.udp = udp
        self.page = StatsPage(memory.stats, writable=True)
        self._bell = Bell(memory.control_bell)
        self.tunnels = TunnelView(
            Mapping(memory.tunnels, TUNNELS, writable=False),
            Mapping(memory.keys, KEYS, writable=False),
            Ciphers.build,
            clock.monotonic,
        )
        self.peers = PeerView(Mapping(memory.peers, PEERS, writable=False))
        self.flows = FlowView(
            Mapping(memory.flows[-1], FLOWS, writable=False), Mapping(memory.seen[-1], SEEN, writable=True)
        )
        self._traffic = Traffic(Mapping(memory.traffic, TRAFFIC, writable=True))
        self.attach()

    def attach(self) -> None:
        """Become the producer of the ring of upcalls, and the consumer of control's, as each successor does."""
        ring = self.memory.upcall_ring
        self.producer = Producer(
            Mapping(ring.data, DATA, writable=True), Mapping(ring.state, STATE, writable=False)
        )
        ring = self.memory.strangers_in[CONTROL]
        self._handed = Consumer(
            Mapping(ring.data, DATA, writable=False),
            Mapping(ring.state, STATE, writable=True),
            segments=False,
        )
        self.upcalls = Upcalls(self.producer, self._bell, self.page, Drops(self.page), UpcallLimits())

    def counters(self) -> SendCounters:
        """Its send counters; made where they are used, since locks belong to a process."""
        memory = self.memory
        spans = [
            Mapping(span, SPAN, writable=number == self.number) for number, span in enumerate(memory.spans)
        ]
        states = [Mapping(state, STATE, writable=False) for state in memory.seal_states]
        send = Mapping(memory.send, SEND, writable=True)
        locks = LockFile(memory.locks)
        return SendCounters(send, locks, spans, self.number, lambda worker: states[worker].words[TAIL])

    # ---- outbound ----

    def ask(self, *packets: bytes, reason: UpcallReason = UpcallReason.NEW_FLOW_OUT) -> None:
        """Hand up packets of the local stack's."""
        for packet in packets:
            self.upcalls.plain(reason, packet, now_ms())
        self.upcalls.flush()

    def goes_to(self, packet: bytes, at_ms: int | None = None) -> PeerRef | None:
        """What the flow table says of a packet of the local stack's: a peer, REFUSED, or None: ask.

        With `at_ms` as of that time: refusals hold for a second only.
        """
        flow = parse_flow(packet, inbound=False)
        return self.flows.outbound(flow, now_ms() if at_ms is None else at_ms)

    def send(self, packet: bytes) -> None:
        """Seal and send a packet of a flow that is allowed."""
        peer = self.goes_to(packet)
        assert peer
        index = self.peers.tunnel(peer)
        assert index is not None
        row = self.row(index)
        counter = self.counters().reserve(index & 0xFFFF, row.generation, 1)
        assert isinstance(counter, int)
        header = Header(MessageType.MESSAGE, MESSAGE_IP, TunnelIndex(row.remote_index), counter).encode()
        assert row.underlay is not None
        assert self.udp.send(header + row.ciphers.send.seal(counter, header, packet), row.underlay) is None

    # ---- inbound ----

    def row(self, index: int) -> Row:
        """The row of a tunnel that is there."""
        row = self.tunnels.get(index)
        assert row is not None
        return row

    def open(self, datagram: bytes) -> tuple[Row, Header, bytes]:
        """Open what the peer sealed."""
        header = Header.parse(datagram)
        row = self.row(header.remote_index)
        assert row.owner == self.number
        text = row.ciphers.receive.open(header.counter, datagram[:HEADER_BYTES], datagram[HEADER_BYTES:])
        self._traffic.received(row.local_index & 0xFFFF, row.generation, 1, len(datagram), now_ms())
        return row, header, text

    def comes_from(self, packet: bytes, row: Row, at_ms: int | None = None) -> bool | None:
        """What the flow table says of a packet that came through a tunnel; `at_ms` as for `goes_to`."""
        flow = parse_flow(packet, inbound=True)
        return self.flows.inbound(flow, row.peer, now_ms() if at_ms is None else at_ms)

    def take(self) -> list[bytes]:
        """Open all that came; what the flow table does not know goes up. Gives the packets that it knows."""
        known = []
        for datagram, source in (*self.handed(), *self.udp.receive(64)):
            if self.tunnels.get(Header.parse(datagram).remote_index) is None:
                self.raw(UpcallReason.UNKNOWN_INDEX, datagram, source)
                continue
            row, header, text = self.open(datagram)
            is_packet = header.type is MessageType.MESSAGE
            if row.state is not TunnelState.PROVEN:
                reason = UpcallReason.FIRST
            elif not is_packet:
                reason = UpcallReason.MESSAGE
            else:
                verdict = self.comes_from(text, row)
                if verdict:
                    known.append(text)
                if verdict is not None:
                    continue
                reason = UpcallReason.NEW_FLOW_IN
            arrival = Arrival(source, header.type, header.subtype, now_ms())
            self.upcalls.opened(reason, arrival, row.local_index, text)
        self.upcalls.flush()
        return known

    def handed(self) -> list[tuple[bytes, UdpAddr]]:
        """What control handed over since the last call, and where it came from."""
        found = []
        while self._handed.pending():
            for _, data in self._handed.entries():
                _, _, source, _, _, datagram = parse_record(bytes(data))
                assert source is not None
                found.append((datagram, source))
            self._handed.release()
        return found

    def hand_up(
        self,
        reason: UpcallReason,
        index: int,
        text: bytes,
        source: UdpAddr,
        kind: MessageType = MessageType.MESSAGE,
    ) -> None:
        """Hand up the content of a message as if it had come."""
        self.upcalls.opened(reason, Arrival(source, kind, 0, now_ms()), index, text)
        self.upcalls.flush()

    def raw(self, reason: UpcallReason, datagram: bytes, source: UdpAddr, *more: bytes) -> None:
        """Hand up datagrams as they came."""
        for each in (datagram, *more):
            self.upcalls.raw(reason, Arrival(source, 0, 0, now_ms()), each)
        self.upcalls.flush()

    def moved(self, index: TunnelIndex, source: UdpAddr) -> None:
        """Say that a packet came from elsewhere."""
        self.upcalls.moved(Arrival(source, MessageType.MESSAGE, 0, now_ms()), index)
        self.upcalls.flush()


def now_ms() -> int:
    """On the clock of the tables."""
    return int(clock.monotonic() * 1000)


class _Host:
    """The part of workers.host.Host that workers.memory looks at."""

    device = "nebula1"
    cpus = (0, 1)
    offloads = NO_OFFLOADS

    def __init__(
        self, steering: SteeringGroup, tuns: tuple[int, ...], listener: socket.socket, offloads: Offloads
    ) -> None:
        self.offloads = offloads
        self.steering = steering
        self.tuns = tuns
        self.listener = listener


class Rig:
    """What a gateway of two workers shares; `play` a story with a control process in the loop."""

    def __init__(
        self,
        undo: ExitStack,
        *,
        host: str = "127.0.0.1",
        offloads: Offloads = NO_OFFLOADS,
        **settings: Any,
    ) -> None:
        """`settings` are changes of `config`; the static host map knows the peer if they do not say it."""
        self._undo = undo
        self.peer = Peer(host=host)
        undo.callback(self.peer.socket.close)
        self.memory = Memory(WORKERS, kernel="python")
        undo.callback(self.memory.close)
        self.steering, _ = SteeringGroup.open(ListenConfig(host=host), WORKERS, coalesce=offloads.udp_gro)
        undo.callback(self.steering.close)
        assert self.steering.is_steered
        self.at = self.steering.control.local
        known = (HostPort(host=host, port=self.peer.at.port),)
        self.config = config(**{"static_host_map": MappingProxyType({THEM: known}), **settings})
        self.queues, self.stacks = self.new_queues()
        fds = tuple(queue.fileno() for queue in self.queues)
        self._host = cast("Host", _Host(self.steering, fds, self.stacks[0], offloads))
        self.key = key_memory(encode_private_key(OUR_IDENTITY.private_key))
        undo.callback(os.close, self.key)
        self.checked = checked(self.key, self.config)
        self.hands = [self._hand(number) for number in range(WORKERS)]
        services = cast("ServicesParts", self._parts(Role.SERVICES))
        self._channels = {
            "supervisor": Channel(self.memory.to_control, "control"),
            "services": Channel(services.control, "control"),
        }
        self.heard: list[tuple[str, Message]] = []  # what control said, and to whom
        self.reads_udp = True  # False as where the kernel does not steer
        self._starts = 0
        self._log_source = services.log_source
        self._text = b""
        self.control: Control
        self._task: asyncio.Task[int] | None = None

    def new_queues(self) -> tuple[list[socket.socket], list[socket.socket]]:
        """Queues and the stacks behind them."""
        pairs = [queue_pair() for _ in range(WORKERS)]
        for end in (end for pair in pairs for end in pair):
            self._undo.callback(end.close)
        return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]

    def _hand(self, number: int) -> Hand:
        parts = cast("ReaderParts", self._parts(Role.READER, number))
        return Hand(parts, self.steering.reader(number))

    def _parts(self, role: Role, number: int = 0, start: int = 1) -> object:
        return self.memory.parts(role, number, start, self._host, self.checked)

    def parts(self) -> ControlParts:
        """As the supervisor gives them, for the next start."""
        self._starts += 1
        return cast("ControlParts", self._parts(Role.CONTROL, 0, self._starts))

    # ---- in the loop ----

    def play(self, story: Story, *, ready: bool = True) -> int | None:
        """Start a control process, tell the story, and give its exit code; None if it was left alone.

        What is left alone does nothing any more, as if it had been killed, and a later call makes a successor
        over the same memory. With `ready`, the story begins when control has said that it is.
        """
        code: list[int] = []

        async def main() -> int:
            self.peer.attach(asyncio.get_running_loop())
            self._task = task = asyncio.ensure_future(self.control.run())
            try:
                if ready:
                    await self.wait_for("ready")
                await story()
            finally:
                if task.done():
                    code.append(task.result())
                else:
                    task.cancel()
            return 0

        with ExitStack() as undo:
            self._start(undo)
            undo.callback(setattr, self, "_task", None)
            run(main)
        return code[0] if code else None

    def wait(self, story: Story) -> None:
        """Tell a story without a control process in this loop: there is one elsewhere."""

        async def main() -> int:
            self.peer.attach(asyncio.get_running_loop())
            await story()
            return 0

        run(main)

    def _start(self, undo: ExitStack) -> None:
        """Make one; in its own process it would have descriptors of its own."""
        parts = self.parts()
        udp, tuns = os.dup(parts.udp), tuple(map(os.dup, parts.tuns))
        log = Logs(parts.logging, parts.log)
        undo.callback(log.close)
        self.control = Control(
            replace(parts, udp=udp, tuns=tuns, reads_udp=self.reads_udp), read_pki(parts.checked), log
        )
        undo.callback(self._close)

    def _close(self) -> None:
        self.control._udp.close()
        for tun in self.control._tuns:
            tun.close()

    async def ended(self) -> int:
        """Wait for control's end; its exit code."""
        assert self._task is not None
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.shield(self._task)

    def _listen(self) -> None:
        for who, channel in self._channels.items():
            self.heard += [(who, message) for message in channel.receive()]

    def tell(self, kind: str, body: dict[str, object] | None = None, *descriptors: int) -> None:
        """Say something as the supervisor."""
        assert self._channels["supervisor"].send(kind, body, descriptors=descriptors)

    def say(self, kind: str, body: dict[str, object] | None = None) -> None:
        """Say something as services."""
        assert self._channels["services"].send(kind, body)

    async def wait_for(self, kind: str) -> dict[str, Any]:
        """Wait for a message of control's, and take it; what it says."""

        def came() -> bool:
            self._listen()
            return kind in self.kinds() or (self._task is not None and self._task.done())

        await until(came)
        if kind not in self.kinds():
            code = None if self._task is None else self._task.result()
            raise AssertionError(f"control ended with {code} before {kind}: {self.log()}")
        (number, *_) = [number for number, (_, each) in enumerate(self.heard) if each.kind == kind]
        return self.heard.pop(number)[1].body

    def kinds(self) -> list[str]:
        """What kinds of messages control said that nobody has taken."""
        return [message.kind for _, message in self.heard]

    async def status(self) -> dict[str, Any]:
        """Ask for it as services do."""
        self.say("status", {"id": 7})
        answer = await self.wait_for("answer")
        assert (answer["id"], answer["error"]) == (7, None)
        result: dict[str, Any] = answer["result"]
        return result

    async def stat(self, name: str) -> int:
        """One of the counters."""
        return int((await self.status())["stats"].get(name, 0))

    async def reload(self, new: Checked, *keys: int) -> dict[str, Any]:
        """Have it take over another configuration; its answer."""
        self.tell("reload", {"id": 3, "checked": encode(new)}, *keys)
        answer = await self.wait_for("reloaded")
        assert answer["id"] == 3
        return answer

    def take(self) -> list[bytes]:
        """Let all readers open what came; the packets whose flow was known."""
        return [packet for hand in self.hands for packet in hand.take()]

    async def connect(self) -> Row:
        """Make a tunnel, from our side, and answer the peer's question for a sign of life; its row."""
        self.hands[0].ask(outbound(b"first", port=1))
        await until(lambda: outbound(b"first", port=1) in self.peer.delivered)
        await until(lambda: self.take() or self.peer.count(MessageType.TEST, TEST_REPLY))
        return self.tunnel()

    def tunnel(self) -> Row:
        """The row of the peer's one tunnel."""
        (known,) = self.peer.plane.tunnels.values()
        return self.hands[0].row(known.tunnel.remote_index)

    def owner(self) -> Hand:
        """The reader that owns the peer's one tunnel."""
        return self.hands[self.tunnel().owner]

    async def pass_both_ways(self, note: bytes, *, port: int) -> None:
        """Let a packet of one flow pass in each direction, by way of control if need be."""
        there, back = outbound(note, port=port), inbound(note, port=port)
        for hand in self.hands:
            if hand.goes_to(there):
                hand.send(there)
                break
        else:
            self.hands[0].ask(there)
        await until(lambda: there in self.peer.delivered)
        self.peer.send(back)
        await collect(back, lambda: self.take() + self.stack(0) + self.stack(1))

    def stack(self, which: int | socket.socket) -> list[bytes]:
        """What was written to a TUN queue since the last call."""
        source = self.stacks[which] if isinstance(which, int) else which
        found = []
        while True:
            try:
                found.append(source.recv(65_536))
            except BlockingIOError:
                return found

    # ---- the log ----

    def log(self) -> list[dict[str, Any]]:
        """All records so far."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._log_source, 65_536):
                self._text += piece
        return [json.loads(line) for line in self._text.splitlines()]

    def records(self, message: str) -> list[dict[str, Any]]:
        """All records with this message."""
        return [record for record in self.log() if record["msg"] == message]
