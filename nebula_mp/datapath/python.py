"""The Python kernel: always there, and the specification of any other one.

Data flow: workers -> [PythonKernel] -> sealing | opening | drains, over the shared regions it attaches to
Knows which part gets which region; knows nothing of processes.

Superpackets of the TUN device are cut by `runs` and `segment`, and made by `batches`, `delivery` and
`coalesce`. What it does not do yet: a datagram too large for the path is counted, but the sender inside the
tunnel is not told.
"""

import fcntl
import os
from collections.abc import Callable, Sequence

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import Ciphers
from nebula_mp.datapath.api import HOLDING, CounterFds, Drain, ReaderMemory, RingEnd, RingFds, UpcallLimits
from nebula_mp.datapath.drains import TunDrain, UdpDrain
from nebula_mp.datapath.filling import Drops, Filler, Strangers, Upcalls
from nebula_mp.datapath.opening import PythonOpener
from nebula_mp.datapath.passes import Half, Sources
from nebula_mp.datapath.relaying import Relaying
from nebula_mp.datapath.sealing import PythonSealer
from nebula_mp.newtypes import Buffer, IPNetwork, Seconds
from nebula_mp.shm import Layout, LockFile, Mapping
from nebula_mp.shm_admission import Admission
from nebula_mp.shm_counters import ReceiveWindows, SendCounters, Traffic
from nebula_mp.shm_flows import FlowTable, FlowView
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_relays import RelayView
from nebula_mp.shm_ring import DATA, HEAD, STATE, Bell, Consumer, DrainLease, Producer, Recovery
from nebula_mp.shm_stats import StatsPage
from nebula_mp.shm_table import FLOWS, KEYS, PEERS, RELAYS, SEEN, TRAFFIC, TUNNELS, WINDOWS
from nebula_mp.shm_tunnels import TunnelView, UnderlayView
from nebula_mp.wire.ip import internet_checksum


class PythonReader:
    """A `datapath.api.Reader`."""

    def __init__(
        self,
        tun_fd: int,
        udp_fd: int,
        memory: ReaderMemory,
        *,
        overlay: tuple[IPNetwork, ...],
        clock: Callable[[], Seconds],
        limits: UpcallLimits,
        offloads: Offloads,
        poison: bool,
    ) -> None:
        self._stats = stats = StatsPage(memory.stats, writable=True)
        drops = Drops(stats)
        keys = _attach(memory.keys, KEYS)
        keys.protect()
        self._tunnels = TunnelView(_attach(memory.tunnels, TUNNELS), keys, Ciphers.build, clock)
        peers = PeerView(_attach(memory.peers, PEERS))
        flows = _admission(memory, peers, stats)
        traffic = Traffic(_attach(memory.traffic, TRAFFIC))
        seal_data = _attach(memory.seal_ring.data, DATA, "seal")
        seal_words = seal_data.words
        seal = Producer(seal_data, _attach(memory.seal_ring.state, STATE, "seal"), poison=poison)
        counters = SendCounters.attach(
            memory.send,
            memory.spans,
            memory.seal_states,
            memory.locks,
            worker=memory.worker,
            published=seal_words[HEAD],
        )
        upcalls = Upcalls(
            _produce(memory.upcall_ring, "upcall", poison=poison),
            Bell(memory.control_bell),
            stats,
            drops,
            limits,
        )
        sealed = Filler(seal)
        relays = RelayView(_attach(memory.relays, RELAYS))
        relaying = Relaying(
            filler=sealed,
            area=lambda: seal_words[HEAD],
            tunnels=self._tunnels,
            relays=relays,
            counters=counters,
            traffic=traffic,
            stats=stats,
            drops=drops,
        )
        self.sealer = PythonSealer(
            tun_fd,
            filler=sealed,
            area=lambda: seal_words[HEAD],
            tunnels=self._tunnels,
            peers=peers,
            flows=flows,
            counters=counters,
            traffic=traffic,
            relaying=relaying,
            upcalls=upcalls,
            stats=stats,
            clock=clock,
            entries_max=seal.geometry.entries_max,
            offloads=offloads,
        )
        self.opener = PythonOpener(
            udp_fd,
            worker=memory.worker,
            filler=Filler(_produce(memory.open_ring, "open", poison=poison)),
            tunnels=self._tunnels,
            relays=relays,
            relaying=relaying,
            flows=flows,
            windows=ReceiveWindows(_attach(memory.windows, WINDOWS)),
            traffic=traffic,
            upcalls=upcalls,
            strangers=Strangers(
                {
                    owner: _produce(ring, f"to {owner}", poison=poison)
                    for owner, ring in memory.strangers_out.items()
                },
                {owner: Bell(bell) for owner, bell in memory.stranger_bells.items()},
                stats,
                drops,
            ),
            strangers_in=[
                Consumer(
                    _attach(ring.data, DATA, f"from {reader}"),
                    _attach(ring.state, STATE, f"from {reader}"),
                    segments=False,
                )
                for reader, ring in memory.strangers_in.items()
            ],
            overlay=overlay,
            stats=stats,
            clock=clock,
            offloads=offloads,
        )

    def outbound(self, drain: Drain, writer: Bell) -> Half:
        """As `Reader.outbound`."""
        sealer = self.sealer
        return Half(
            sealer.poll,
            sealer.waiting,
            lambda: HOLDING if sealer.is_holding else 0,
            drain=drain,
            writer=writer,
            stats=self._stats,
        )

    def inbound(self, drain: Drain, writer: Bell) -> Half:
        """As `Reader.inbound`."""
        opener = self.opener
        return Half(
            opener.poll, opener.waiting, opener.take_flags, drain=drain, writer=writer, stats=self._stats
        )

    def sweep(self) -> int:
        """As `Reader.sweep`."""
        return self._tunnels.sweep()


class PythonKernel:
    """A `datapath.api.Kernel`."""

    name = "python"

    def reader(
        self,
        tun_fd: int,
        udp_fd: int,
        memory: ReaderMemory,
        *,
        overlay: tuple[IPNetwork, ...],
        clock: Callable[[], Seconds],
        limits: UpcallLimits,
        offloads: Offloads,
        poison: bool = False,
    ) -> PythonReader:
        """As `Kernel.reader`."""
        return PythonReader(
            tun_fd,
            udp_fd,
            memory,
            overlay=overlay,
            clock=clock,
            limits=limits,
            offloads=offloads,
            poison=poison,
        )

    def drain_udp(
        self, end: RingEnd, udp_fd: int, *, tunnels: int, stats: int, offloads: Offloads
    ) -> UdpDrain:
        """As `Kernel.drain_udp`."""
        ring = _consume(end, Recovery.SEND_AGAIN)
        view = UnderlayView(_attach(tunnels, TUNNELS))
        return UdpDrain(ring, udp_fd, view, StatsPage(stats, writable=True), offloads)

    def drain_tun(self, end: RingEnd, tun_fd: int, *, stats: int, offloads: Offloads) -> TunDrain:
        """As `Kernel.drain_tun`."""
        ring = _consume(end, Recovery.GO_ON_BEHIND)
        return TunDrain(ring, tun_fd, StatsPage(stats, writable=True), offloads)

    def send_counters(self, memory: CounterFds) -> SendCounters:
        """As `Kernel.send_counters`."""
        return SendCounters.attach(*memory)

    def sources(self, descriptors: Sequence[int]) -> Sources:
        """As `Kernel.sources`."""
        return Sources(descriptors)

    def checksum(self, data: Buffer) -> int:
        """As `Kernel.checksum`."""
        return internet_checksum(data)


def _attach(descriptor: int, layout: Layout, name: str = "") -> Mapping:
    """Map with the rights that the descriptor gives; what needs more than that refuses it."""
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return Mapping(descriptor, layout, writable=access == os.O_RDWR, name=name)


def _admission(memory: ReaderMemory, peers: PeerView, stats: StatsPage) -> Admission:
    own, control = memory.worker, len(memory.flows) - 1
    flows = [_attach(each, FLOWS, str(number)) for number, each in enumerate(memory.flows)]
    seen = [_attach(each, SEEN, str(number)) for number, each in enumerate(memory.seen)]
    rules = flows[control]
    order = (own, control, *(each for each in range(control) if each != own))
    return Admission(
        FlowTable(flows[own], seen[own], rules=rules),
        [FlowView(flows[each], seen[each], rules=rules) for each in order],
        peers,
        stats,
    )


def _consume(end: RingEnd, recovery: Recovery) -> Consumer:
    data, state = _attach(end.fds.data, DATA, end.name), _attach(end.fds.state, STATE, end.name)
    lease = None
    if end.holder is not None:
        lease = DrainLease(state, LockFile(end.locks).lock(end.lock), end.holder)
    return Consumer(data, state, lease=lease, recovery=recovery, rows=end.rows)


def _produce(ring: RingFds, name: str, *, poison: bool) -> Producer:
    return Producer(_attach(ring.data, DATA, name), _attach(ring.state, STATE, name), poison=poison)
