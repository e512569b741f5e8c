"""Tunnels from real handshakes, and shared tables as control is given them.

Data flow: handshake.machine, nebula_mp.shm_table -> [support.sessions] -> tests of workers.tables, workers.journal
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from random import Random

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import CaPool
from nebula_mp.config.model import ConntrackConfig
from nebula_mp.control.hostmap import Tunnel
from nebula_mp.control.liveness import Traffic
from nebula_mp.control.plane import Grant
from nebula_mp.datapath.api import CounterFds
from nebula_mp.datapath.python import PythonKernel
from nebula_mp.firewall.rules import Direction, PeerNetworks
from nebula_mp.handshake.machine import Completed, Initiator, Responder
from nebula_mp.newtypes import Cipher, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm_flows import FlowView
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_table import FLOWS, KEYS, PEERS, SEEN, TUNNELS, PeerRef, Tables
from nebula_mp.shm_tunnels import TunnelView
from nebula_mp.workers.memory import own_writable
from nebula_mp.workers.parts import TableFds
from nebula_mp.workers.tables import ShmPlane
from tests.support.pki import ANY_TIME, Pki
from tests.support.rings import small_ring
from tests.support.tables import read_only, small, writable

PKI = Pki.shared()
US = PKI.identity("us", "10.42.0.1/16", "fd42::1/64")
POOL = PKI.pool()
TIME_NS = ANY_TIME * 1_000_000_000


def at(text: str, port: int = 4242) -> UdpAddr:
    return UdpAddr(ip_address(text), port)


HERE, THERE = at("192.0.2.1"), at("2001:db8::2", 4343)


def shake(
    peer: Identity,
    index: int,
    *,
    us: Identity = US,
    pool: CaPool = POOL,
    cipher: Cipher = Cipher.AES,
    we_start: bool = True,
    time_ns: int = TIME_NS,
) -> tuple[Completed, Completed]:
    """Make both ends of a tunnel: ours, which gets this index, and the peer's."""
    entropy = Random(index).randbytes
    theirs = TunnelIndex(index ^ 0x5555_5555)
    starter, answerer = (us, peer) if we_start else (peer, us)
    first, second = (index, theirs) if we_start else (theirs, index)
    initiator = Initiator(
        starter,
        cipher,
        starter.initiating_version,
        entropy,
        local_index=TunnelIndex(first),
        time_ns=time_ns,
    )
    responder = Responder(answerer, cipher, entropy)
    responder.read_stage1(initiator.stage1, pool, ANY_TIME)
    answered = responder.write_stage2(TunnelIndex(second), time_ns + 1)
    started = initiator.read_stage2(answered.stage2, pool, ANY_TIME)
    return (started, answered) if we_start else (answered, started)


def tunnel_of(session: Completed, remote: UdpAddr = HERE, *, proven: bool = True) -> Tunnel:
    networks = PeerNetworks.of(session.peer.certificate, US.networks)
    return Tunnel(session, networks, remote, Traffic(last_used=Seconds(0)), proven)


def digest(session: Completed) -> tuple[object, ...]:
    """Give all that two equal sessions have in common, and what each of their keys makes of one message."""
    counter = 2**63 + session.local_index  # nobody gets there
    return (
        session.local_index,
        session.remote_index,
        session.peer,
        session.own_certificate,
        session.peer_time_ns,
        session.is_initiator,
        session.send.cipher,
        sha256(session.send.seal(counter, b"", b"sent")).digest(),
        sha256(session.receive.seal(counter, b"", b"received")).digest(),
        session.stage1,
        session.stage2,
    )


@dataclass
class Clock:
    """Stands still, or goes on by `step` with each look at it."""

    now: float = 1000.0
    step: float = 0.0

    def __call__(self) -> Seconds:
        self.now += self.step
        return Seconds(self.now)


@dataclass
class Memory:
    """The tables of a program with a few workers, and control's way to them."""

    workers: int = 2
    rows: int = 32
    tables: Tables = field(init=False)

    def __post_init__(self) -> None:
        self.tables = small(self.workers, rows=self.rows)
        self.rings = [small_ring() for _ in range(self.workers)]

    def fds(self) -> TableFds:
        tables = self.tables
        return TableFds(
            tunnels=tables.tunnels.descriptor,
            keys=tables.keys.descriptor,
            peers=tables.peers.descriptor,
            flows=own_writable(tables.flows, self.workers),
            seen=tuple(each.descriptor for each in tables.seen),
            send=tables.send.descriptor,
            spans=tuple(span.read_only for span in tables.spans),
            traffic=own_writable(tables.traffic, self.workers),
            journal=tables.journal.descriptor,
            locks=tables.locks.descriptor,
            seal_states=tuple(ring.state.read_only for ring in self.rings),
        )

    def plane(self, *owners: int, clock: Callable[[], Seconds] | None = None) -> ShmPlane:
        """Attach as a control process, without `recover`."""
        fds = self.fds()
        counters = PythonKernel().send_counters(CounterFds(fds.send, fds.spans, fds.seal_states, fds.locks))
        return ShmPlane(fds, owners or range(self.workers), counters=counters, clock=clock or Clock())

    def fresh(self, *owners: int, clock: Callable[[], Seconds] | None = None) -> ShmPlane:
        """Attach as the first control process."""
        plane = self.plane(*owners, clock=clock)
        assert plane.recover(US, POOL) == []
        return plane

    def close(self) -> None:
        self.tables.close()
        for ring in self.rings:
            ring.close()


ONE = PKI.identity("one", "10.42.0.11/16")
TWO = PKI.identity("two", "10.42.0.12/16", "fd42::12/64")


def opened(plane: ShmPlane, index: int = 0x1_0003, *, peer: Identity = ONE, proven: bool = True) -> Tunnel:
    """Open a tunnel of a real handshake, as the hostmap does; a proven one is the primary."""
    tunnel = tunnel_of(shake(peer, index)[0], proven=proven)
    plane.opened(tunnel)
    if proven:
        plane.route(tunnel.addresses[0], tunnel)
    return tunnel


def view_of(memory: Memory) -> TunnelView[tuple[bytes, bytes]]:
    tables = memory.tables
    return TunnelView(
        read_only(tables.tunnels, TUNNELS),
        read_only(tables.keys, KEYS),
        lambda _, send, receive: (bytes(send), bytes(receive)),
        lambda: Seconds(time.monotonic()),
    )


def peers_of(memory: Memory) -> PeerView:
    return PeerView(read_only(memory.tables.peers, PEERS))


def flows_of(memory: Memory) -> FlowView:
    return FlowView(read_only(memory.tables.flows[-1], FLOWS), writable(memory.tables.seen[-1], SEEN))


def ref_of(memory: Memory, tunnel: Tunnel) -> PeerRef:
    row = view_of(memory).get(tunnel.local_index)
    assert row is not None
    return row.peer


def granted(timeout_s: float, *between: Direction) -> Grant:
    """A grant for a flow that began outbound."""
    timeout = Seconds(timeout_s)
    timeouts = ConntrackConfig(tcp_timeout=timeout, udp_timeout=timeout, default_timeout=timeout)
    return Grant(Direction.OUTBOUND, frozenset(between), timeouts)
