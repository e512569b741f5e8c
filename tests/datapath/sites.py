"""Sites: the shared memory of one host with its control, readers and drains in one process, and two of them.

Data flow: tests/datapath -> [datapath.sites] -> the kernel that the running test is for
A socket pair stands in for the TUN device, UDP sockets of the loopback interface are real. Time is a number.
"""

import os
import socket
from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, ip_address

from nebula_mp import shm_stats
from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.crypto.aead import Aead
from nebula_mp.datapath.api import (
    CONTROL,
    STRANGER_AREAS,
    UPCALL_AREA_BYTES,
    UPCALL_ENTRIES,
    Drop,
    Kernel,
    Reader,
    ReaderMemory,
    RingEnd,
    RingFds,
    Upcall,
    UpcallLimits,
    take_upcalls,
)
from nebula_mp.datapath.python import PythonReader
from nebula_mp.newtypes import Cipher, Counter, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import Region
from nebula_mp.shm_flows import FlowTable
from nebula_mp.shm_peers import PeerTable
from nebula_mp.shm_ring import Bell, Consumer, Entry, Recovery, RingMemory
from nebula_mp.shm_stats import StatsPage
from nebula_mp.shm_table import FLOWS, PEERS, ROWS_AT, SEEN, SEND_ROW, PeerRef
from nebula_mp.shm_tunnels import TunnelFields, TunnelState
from nebula_mp.wire.header import MESSAGE_RELAY, Header, MessageType
from nebula_mp.wire.ip import parse_flow
from nebula_mp.workers.memory import own_writable
from tests.support import native, rings, tables
from tests.support.packets import UDP, ip, udp

OVERLAY = (IPv4Network("10.9.0.0/16"),)
UNLIMITED = UpcallLimits(
    per_tunnel=(10**6, 10**6),
    plain=(10**6, 10**6),
    datagrams=(10**6, 10**6),
    unknown=(10**6, 10**6),
    relayed=(10**6, 10**6),
)
DROPS = {drop.value for drop in Drop}
ROWS = 64
TIMEOUT_MS = 60_000


class Site:
    """One host. `inside` is the local stack's end of the TUN device; `udp` are the readers' sockets."""

    def __init__(
        self,
        *,
        workers: int = 1,
        areas: int = 8,
        area_bytes: int = 72 * 1024,
        entries_max: int = 128,
        limits: UpcallLimits = UNLIMITED,
        offloads: Offloads = NO_OFFLOADS,
        upcall_areas: int = 8,
        kernel: Kernel | None = None,
    ) -> None:
        self.kernel = kernel or native.current()
        self.now = Seconds(1000.0)
        self.limits = limits
        self.offloads = offloads
        self.tables = tables.small(workers, rows=ROWS, buckets=1024)
        shape = {"areas": areas, "area_bytes": area_bytes, "entries_max": entries_max}
        small = {"area_bytes": UPCALL_AREA_BYTES, "entries_max": UPCALL_ENTRIES}
        pairs = [(one, two) for one in (*range(workers), CONTROL) for two in range(workers) if one != two]
        self.seal = [RingMemory.create(f"seal/{each}", **shape) for each in range(workers)]
        self.opened = [RingMemory.create(f"open/{each}", **shape) for each in range(workers)]
        self.upcall = [
            RingMemory.create(f"upcall/{each}", areas=upcall_areas, **small) for each in range(workers)
        ]
        self.stranger = {
            pair: RingMemory.create(f"stranger/{pair}", areas=STRANGER_AREAS, **small) for pair in pairs
        }
        self.pages = [shm_stats.create_page(f"reader/{each}") for each in range(workers)]
        self.pages += [shm_stats.create_page(f"writer/{each}") for each in range(workers)]
        self.control_bell = Bell.create()
        self.bells = [Bell.create() for _ in range(workers)]
        self.tunnels = tables.tunnel_table(self.tables)
        self.peers = PeerTable(tables.writable(self.tables.peers, PEERS))
        self.flows = FlowTable(
            tables.writable(self.tables.flows[-1], FLOWS), tables.writable(self.tables.seen[-1], SEEN)
        )
        self.flows.set_rules_generation(1)
        self.tun, self.inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.tun_fd = self.tun.fileno()  # another one where a test has a real device
        self.udp = [loopback() for _ in range(workers)]
        self._workers = workers
        self._upcalls = [rings.consume(memory, segments=False) for memory in self.upcall]
        self.peer = PeerRef(0)
        self.generation = 0
        self.fields = tables.fields()
        self.far = loopback()  # plays the far host, where a test has no site for it

    def close(self) -> None:
        regions: list[Region] = [*self.pages]
        for memory in (*self.seal, *self.opened, *self.upcall, *self.stranger.values()):
            regions += [memory.data, memory.state]
        for region in regions:
            region.close()
        for bell in (self.control_bell, *self.bells):
            bell.close()
        for each in (self.tun, self.inside, self.far, *self.udp):
            each.close()
        self.tables.close()

    def clock(self) -> Seconds:
        return self.now

    def address(self, worker: int = 0) -> UdpAddr:
        return address_of(self.udp[worker])

    def memory(self, worker: int = 0) -> ReaderMemory:
        made = self.tables
        return ReaderMemory(
            worker=worker,
            stats=self.pages[worker].descriptor,
            tunnels=made.tunnels.read_only,
            keys=made.keys.read_only,
            peers=made.peers.read_only,
            relays=made.relays.read_only,
            flows=own_writable(made.flows, worker),
            seen=tuple(each.descriptor for each in made.seen),
            send=made.send.descriptor,
            windows=made.windows.descriptor,
            spans=own_writable(made.spans, worker),
            traffic=made.traffic[worker].descriptor,
            locks=made.locks.descriptor,
            seal_ring=_filled(self.seal[worker]),
            open_ring=_filled(self.opened[worker]),
            upcall_ring=_filled(self.upcall[worker]),
            seal_states=tuple(memory.state.read_only for memory in self.seal),
            strangers_in={
                one: RingFds(memory.data.read_only, memory.state.descriptor)
                for (one, two), memory in self.stranger.items()
                if two == worker
            },
            strangers_out={
                two: _filled(memory) for (one, two), memory in self.stranger.items() if one == worker
            },
            control_bell=self.control_bell.descriptor,
            stranger_bells={each: bell.descriptor for each, bell in enumerate(self.bells) if each != worker},
        )

    def reader(self, worker: int = 0, *, poison: bool = True) -> Reader:
        """Attach, as a reader or its successor."""
        return self.kernel.reader(
            self.tun_fd,
            self.udp[worker].fileno(),
            self.memory(worker),
            overlay=OVERLAY,
            clock=self.clock,
            limits=self.limits,
            offloads=self.offloads,
            poison=poison,
        )

    def python_reader(self, worker: int = 0, *, poison: bool = True) -> PythonReader:
        """As `reader`, where the kernel is the one in Python, for a test that looks into it."""
        made = self.reader(worker, poison=poison)
        assert isinstance(made, PythonReader)
        return made

    def seal_ring(self, worker: int = 0) -> Consumer:
        return rings.consume(self.seal[worker], rows=ROWS)

    def open_ring(self, worker: int = 0) -> Consumer:
        return rings.consume(self.opened[worker], Recovery.GO_ON_BEHIND, rows=ROWS)

    def seal_end(self, worker: int = 0) -> RingEnd:
        return _drained(self.seal[worker], f"seal/{worker}")

    def open_end(self, worker: int = 0) -> RingEnd:
        return _drained(self.opened[worker], f"open/{worker}")

    def sealed(self, worker: int = 0) -> list[tuple[Entry, list[bytes]]]:
        """What waits in the seal ring, which is empty then: each entry and its datagrams."""
        ring, found = self.seal_ring(worker), []
        while ring.pending():
            for entry, data in ring.entries():
                assert 0 < entry.segment <= entry.length
                steps = range(0, entry.length, entry.segment)
                found.append((entry, [bytes(data[at : at + entry.segment]) for at in steps]))
            ring.release()
        return found

    def send(self, worker: int = 0) -> int:
        """Drain the seal ring to UDP; gives the number of areas."""
        drain = self.kernel.drain_udp(
            self.seal_end(worker),
            self.udp[worker].fileno(),
            tunnels=self.tables.tunnels.read_only,
            stats=self.pages[self._workers + worker].descriptor,
            offloads=self.offloads,
        )
        return drain.drain(100)

    def write(self, worker: int = 0) -> int:
        """Drain the open ring to the TUN device; gives the number of areas."""
        drain = self.kernel.drain_tun(
            self.open_end(worker),
            self.tun_fd,
            stats=self.pages[self._workers + worker].descriptor,
            offloads=self.offloads,
        )
        return drain.drain(100)

    def upcalls(self, worker: int = 0) -> list[Upcall]:
        return list(take_upcalls(self._upcalls[worker], 1000))

    def received(self) -> list[bytes]:
        """What reached the local stack."""
        return _everything(self.inside)

    def stats(self) -> Tally[str]:
        """All counters of all processes that are not 0."""
        found = shm_stats.totals(
            [StatsPage(page.read_only, writable=False, name=page.layout.name) for page in self.pages]
        )
        return Tally({name: value for name, value in found.items() if value})

    def drops(self) -> dict[str, int]:
        return {name: value for name, value in self.stats().items() if name in DROPS}

    def check_ledger(self) -> None:
        """Everything that came in went out, up, or under one reason; the rings are empty."""
        stats = self.stats()
        came = stats["mp.tun.rx.packets"] + stats["mp.udp.rx.packets"]
        went = stats["mp.tun.tx.packets"] + stats["mp.udp.tx.packets"] + stats["mp.upcalls"]
        assert came == went + sum(self.drops().values()) + stats["mp.ring.resumed"], stats

    def allow(self, *packets: bytes, inbound: bool = False) -> None:
        """Let control admit the flows of these packets, of this site's one peer."""
        for packet in packets:
            displaced = self.flows.allow(
                parse_flow(packet, inbound=inbound), self.peer, TIMEOUT_MS, int(self.now * 1000)
            )
            assert displaced is None

    def update(self, **changes: object) -> None:
        """Let control change the row of the tunnel."""
        self.fields = replace(self.fields, **changes)  # type: ignore[arg-type]  # checked by dataclasses
        self.tunnels.update(self.fields)


def _drained(memory: RingMemory, name: str) -> RingEnd:
    """For a drain that has the ring for itself."""
    fds = RingFds(memory.data.read_only, memory.state.descriptor)
    return RingEnd(fds, name, locks=-1, lock=0, holder=None, rows=ROWS)


def _filled(memory: RingMemory) -> RingFds:
    return RingFds(memory.data.descriptor, memory.state.read_only)


def address_of(bound: socket.socket) -> UdpAddr:
    """Where a socket is reached."""
    host, port = bound.getsockname()
    return UdpAddr(ip_address(host), port)


def loopback() -> socket.socket:
    """A UDP socket of the loopback interface."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.bind(("127.0.0.1", 0))
    return made


def _everything(source: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(source.recv(65_536))
        except BlockingIOError:
            return found


def drained(sockets: Iterable[socket.socket]) -> list[bytes]:
    """All datagrams that wait."""
    return [datagram for each in sockets for datagram in _everything(each)]


NEAR = ip_address("10.9.0.1")
FAR = ip_address("10.9.0.2")
NEAR_V6 = ip_address("fd00::1")
FAR_V6 = ip_address("fd00::2")
KEY_OUT = tables.SEND_KEY
KEY_IN = tables.RECEIVE_KEY
INDEX_NEAR = TunnelIndex(0xBEEF_0003)
INDEX_FAR = TunnelIndex(0xCAFE_0005)


def connect(
    near: Site,
    far: UdpAddr | None = None,
    *,
    cipher: Cipher = Cipher.AES,
    mirrored: bool = False,
    owner: int = 0,
    state: TunnelState = TunnelState.PROVEN,
) -> None:
    """Let control open the tunnel to `far`, or to `near.far`; `mirrored` as the other end of the same."""
    peer = near.peers.add()
    assert peer is not None
    near.peer = peer
    local, remote = (INDEX_FAR, INDEX_NEAR) if mirrored else (INDEX_NEAR, INDEX_FAR)
    others = {NEAR.packed, NEAR_V6.packed} if mirrored else {FAR.packed, FAR_V6.packed}
    near.fields = TunnelFields(
        local, remote, state, cipher, owner, peer, far or address_of(near.far), frozenset(others), None
    )
    keys = (KEY_IN, KEY_OUT) if mirrored else (KEY_OUT, KEY_IN)
    near.generation = near.tunnels.open(near.fields, *keys)
    near.peers.set(peer, local)


def store_counter(site: Site, row: int, counter: int) -> None:
    """Let so many counters of a tunnel be used."""
    at = ROWS_AT + row * SEND_ROW.size + SEND_ROW.fields["counter"].offset
    os.pwrite(site.tables.send.descriptor, counter.to_bytes(8, "little"), at)


def packet(number: int, size: int = 40, *, port: int = 5000, back: bool = False) -> bytes:
    """One packet of a UDP flow; `back`: from the far host to the near one."""
    data = number.to_bytes(4, "big").ljust(size, b"\xa5")
    source, destination = (FAR, NEAR) if back else (NEAR, FAR)
    ports = (53, port) if back else (port, 53)
    return ip(source, destination, UDP, udp(source, destination, *ports, data))


def message(
    counter: int,
    plaintext: bytes,
    *,
    kind: MessageType = MessageType.MESSAGE,
    subtype: int = 0,
    index: TunnelIndex = INDEX_NEAR,
    cipher: Cipher = Cipher.AES,
    key: bytes = KEY_IN,
) -> bytes:
    """What the far host sends to the near one, sealed by the library alone."""
    header = Header(kind, subtype, index, Counter(counter)).encode()
    return header + Aead(cipher, key).seal(counter, header, plaintext)


def frame(counter: int, content: bytes, path: int, key: bytes = KEY_IN, cipher: Cipher = Cipher.AES) -> bytes:
    """What the relay sends, sealed by the library alone."""
    head = Header(MessageType.MESSAGE, MESSAGE_RELAY, TunnelIndex(path), Counter(counter)).encode() + content
    return head + Aead(cipher, key).seal(counter, head, b"")


def deliver(site: Site, *datagrams: bytes, worker: int = 0, sender: socket.socket | None = None) -> None:
    """Put datagrams into a reader's socket, from `sender` or from the far host."""
    for datagram in datagrams:
        (sender or site.far).sendto(datagram, site.udp[worker].getsockname())
