"""TUN queue -> flow, peer, tunnel -> sealed into the seal ring, packet by packet or a superpacket at a time.

Data flow: TUN -> virtio -> [PythonSealer] -> runs -> seal ring -> drains.UdpDrain
                                           -> upcall ring -> control
Knows which packets may share a batch of counters; decides nothing: what the tables do not answer goes up.
Source: docs/architecture.md, "The life of a packet".

Packets for one peer that follow each other form a run, and so do the packets of a superpacket. Its counters
are reserved at once, before the first of it is sealed, and only when there is an area for all of it: so who
dies here leaves a gap, never a counter that another one would take again. A superpacket that does not fit an
area becomes several runs.
"""

import os
import select
from collections import deque
from collections.abc import Callable
from typing import Final

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import Ciphers
from nebula_mp.datapath.api import Drop, UpcallReason
from nebula_mp.datapath.filling import Drops, Filler, Upcalls
from nebula_mp.datapath.relaying import Relaying, Tunnel
from nebula_mp.datapath.runs import OVERHEAD_BYTES, Places, PlainRun, Run, Superpacket, SuperRun, Target
from nebula_mp.datapath.segment import complete
from nebula_mp.datapath.virtio import HEADER_BYTES as VIRTIO_BYTES
from nebula_mp.datapath.virtio import PACKET_BYTES_MAX, PLAIN, GsoType, OffloadError, VirtioHeader
from nebula_mp.errors import WireError
from nebula_mp.newtypes import Buffer, Seconds
from nebula_mp.shm_admission import Admission
from nebula_mp.shm_counters import Refusal, SendCounters, Traffic
from nebula_mp.shm_flows import REFUSED
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import PeerRef
from nebula_mp.shm_tunnels import TunnelState, TunnelView
from nebula_mp.wire.ip import IPV6_HEADER_BYTES, parse_flow

HOLD: Final = Seconds(0.001)
"""So long a run is held back for another worker to send."""

LOCK_HOLD: Final = Seconds(0.05)
"""So long a run is held back for another process to give up the counter's lock. It lost its core while it had
it, and has it back a few time slices later: with 15 tasks on 2 cores a millisecond cost 10 to 20 packets of
4,000. Who was stopped for good costs every run this much, until the supervisor kills it."""

_PACKET_BYTES_MAX: Final = PACKET_BYTES_MAX + IPV6_HEADER_BYTES
_ARENA_BYTES: Final = 4 * _PACKET_BYTES_MAX
_new_tuple = tuple.__new__
_TWICE: Final = range(2)
_NO_GSO: Final = GsoType.NONE  # of an enum, a member takes two look-ups
_PROVEN: Final = TunnelState.PROVEN
_PACKETS: Final = SLOTS["mp.tun.rx.packets"]
_BEYOND: Final = SLOTS["mp.counter.span"]
_BUSY: Final = SLOTS["mp.counter.busy"]


class PythonSealer:
    """A `datapath.api.Sealer`."""

    def __init__(
        self,
        tun_fd: int,
        *,
        filler: Filler,
        area: Callable[[], int],
        tunnels: TunnelView[Ciphers],
        peers: PeerView,
        flows: Admission,
        counters: SendCounters,
        traffic: Traffic,
        relaying: Relaying,
        upcalls: Upcalls,
        stats: StatsPage,
        clock: Callable[[], Seconds],
        entries_max: int,
        offloads: Offloads,
    ) -> None:
        """`area` gives the number of the area being filled."""
        self._descriptor = tun_fd
        self._queue = select.poll()
        self._queue.register(tun_fd, select.POLLIN)
        self._filler = filler
        self._room_bytes = filler.room_bytes
        self._area = area
        self._places = Places(filler, area)
        self._tunnels = tunnels
        self._peers = peers
        self._flows = flows
        self._counters = counters
        self._traffic = traffic
        self._relaying = relaying
        self._upcalls = upcalls
        self._stats = stats
        self._drops = Drops(stats)
        self._clock = clock
        self._entries_max = entries_max
        self._header = bytearray(VIRTIO_BYTES if offloads.tun_header else 0)  # of the packet read last
        # Packets that were read lie here one behind the other until their run was sealed.
        self._arena = memoryview(bytearray(_ARENA_BYTES))
        self._at = 0
        self._first_room = self._arena[:_PACKET_BYTES_MAX]
        self._first_buffers = self._buffers(self._first_room)
        self._runs: deque[Run] = deque()
        self._growing: PlainRun | None = None  # the last run, if packets may still be added
        self._held_since: Seconds | None = None

    @property
    def is_holding(self) -> bool:
        """As `Sealer.is_holding`."""
        return self._held_since is not None

    def waiting(self) -> int:
        """As `Sealer.waiting`."""
        return self._filler.waiting()

    def poll(self, budget: int) -> int:
        """As `Sealer.poll`."""
        now = self._clock()
        now_ms = int(now * 1000)
        taken = size_bytes = 0
        lost = None
        if self._runs:
            self._seal_runs(now)
        asked = False
        while taken < budget and self._held_since is None:
            if taken and not asked:
                # Mostly nothing else waits: to ask costs a quarter of a read in vain, which raises.
                asked = True
                if not self._queue.poll(0):
                    break
            if self._at + _PACKET_BYTES_MAX > _ARENA_BYTES:
                self._seal_runs(now)
                continue
            try:
                read = self._read()
            except BlockingIOError:
                break
            except OSError as error:
                lost = error
                break
            packets, inner_bytes = self._take(read, now_ms)
            taken += packets
            size_bytes += inner_bytes
            # A run that may still grow stays; the others go.
            leave = self._growing is not None
            if len(self._runs) > leave:
                self._seal_runs(now, leave=leave)
        if self._runs and self._held_since is None:
            self._seal_runs(now)
        self._filler.flush()
        self._relaying.end_pass()
        self._upcalls.flush()
        if taken:
            self._stats.add_traffic(_PACKETS, taken, size_bytes)
        if lost is not None:
            raise lost
        return taken

    def _read(self) -> memoryview | None:
        """Read a packet or superpacket into the arena, its header apart; None if it ends in the header."""
        if self._at == 0:  # mostly: made once
            room, buffers = self._first_room, self._first_buffers
        else:
            room = self._arena[self._at : self._at + _PACKET_BYTES_MAX]
            buffers = self._buffers(room)
        size = os.readv(self._descriptor, buffers) - len(self._header)
        return room[:size] if size >= 0 else None

    def _buffers(self, room: memoryview) -> list[Buffer]:
        return [self._header, room] if self._header else [room]

    def _take(self, packet: memoryview | None, now_ms: int) -> tuple[int, int]:
        """Add what was read to the run it belongs to, or see to it that it goes elsewhere.

        Gives the number of packets it stands for, and their bytes.
        """
        if packet is None:
            self._drops.count(Drop.TUN_OFFLOAD)
            return 1, 0
        header = PLAIN
        if self._header:
            try:
                header = VirtioHeader.parse(self._header, packet)
            except OffloadError:
                self._drops.count(Drop.TUN_OFFLOAD)
                return 1, len(packet)
        if header.gso is _NO_GSO:
            self._take_packet(header, packet, now_ms)
            return 1, len(packet)
        superpacket = Superpacket(header, packet)
        self._take_superpacket(superpacket, now_ms)
        cut = superpacket.cut
        return cut.count, len(packet) + (cut.count - 1) * cut.header_bytes

    def _take_packet(self, header: VirtioHeader, packet: memoryview, now_ms: int) -> None:
        peer = self._find(packet, 1, now_ms)
        if peer == REFUSED:
            return
        if header.needs_checksum:
            complete(header, packet)
        size_bytes, room_bytes = len(packet) + OVERHEAD_BYTES, self._room_bytes
        if peer is None:
            self._upcalls.plain(UpcallReason.NEW_FLOW_OUT, packet, now_ms)
        elif size_bytes > room_bytes:
            self._drops.count(Drop.OVERSIZE)
        else:
            run = self._growing
            if (
                run is None
                or run.peer != peer
                or run.size_bytes + size_bytes > room_bytes
                or run.count == self._entries_max
            ):
                self._growing = run = PlainRun(peer, packet)
                self._runs.append(run)
            else:
                run.append(packet)
            self._at += len(packet)

    def _take_superpacket(self, superpacket: Superpacket, now_ms: int) -> None:
        packet, count = superpacket.packet, superpacket.cut.count
        peer = self._find(packet, count, now_ms)
        if peer == REFUSED:
            return
        room_bytes = self._filler.room_bytes
        if peer is None:
            for each in superpacket.packets():
                self._upcalls.plain(UpcallReason.NEW_FLOW_OUT, each, now_ms)
        elif superpacket.stride > room_bytes:
            self._drops.count(Drop.OVERSIZE, count)
        else:
            self._runs.extend(SuperRun.divide(peer, superpacket, room_bytes))
            self._growing = None
            self._at += len(packet)

    def _find(self, packet: memoryview, count: int, now_ms: int) -> PeerRef | None:
        """Whom a superpacket of `count`, or a packet, goes to; None: ask control. REFUSED: it was counted."""
        try:
            flow = parse_flow(packet, inbound=False)
        except WireError:
            self._drops.count(Drop.TUN_INNER_IP, count)
            return REFUSED
        peer = self._flows.outbound(flow, now_ms)
        if peer == REFUSED:
            self._drops.count(Drop.REFUSED_OUT, count)
        return peer

    def _seal_runs(self, now: Seconds, *, leave: int = 0) -> None:
        """Seal the oldest runs until one must be held, or so many are left."""
        runs = self._runs
        while len(runs) > leave:
            if not self._try_seal(runs[0], now):
                return
            self._held_since = None
            runs.popleft()
        if not runs:
            self._growing = None
            self._at = 0

    def _try_seal(self, run: Run, now: Seconds) -> bool:
        """Seal a run, or see to it that it goes elsewhere; False when it is to be held back."""
        count, filler, counters = run.count, self._filler, self._counters
        held = 0.0 if self._held_since is None else now - self._held_since
        # Again when the tunnel ended in between: its successor may be there already.
        for _ in _TWICE:
            tunnel = self._tunnel(run.peer)
            if tunnel is None:
                break
            if tunnel.underlay is None:
                return self._relay(tunnel, run, int(now * 1000))
            if not filler.try_room(run.size_bytes, run.entries, run.align):
                self._drops.count(Drop.SEAL_RING_FULL, count)
                return True
            row, generation = tunnel.local_index & 0xFFFF, tunnel.generation
            beyond = counters.beyond_span
            first = counters.reserve(row, generation, count, self._area(), regardless=held >= HOLD)
            if counters.beyond_span != beyond:
                self._stats.add(_BEYOND, counters.beyond_span - beyond)
            if not isinstance(first, Refusal):
                target = _new_tuple(Target, (tunnel.ciphers.send, tunnel.remote_index, row))  # as in wire.ip
                run.seal(filler, self._places, target, first)
                self._traffic.sent(row, generation, count, run.size_bytes, int(now * 1000))
                return True
            if first is Refusal.BUSY:
                self._stats.add(_BUSY)
            if first is Refusal.EXHAUSTED or (first is Refusal.BUSY and held >= LOCK_HOLD):
                self._drops.count(Drop.EXHAUSTED, count)
                return True
            if first is not Refusal.GONE:
                if self._held_since is None:
                    self._held_since = now
                return False
        for packet in run.packets():
            self._upcalls.plain(UpcallReason.NO_TUNNEL, packet, int(now * 1000))
        return True

    def _relay(self, tunnel: Tunnel, run: Run, now_ms: int) -> bool:
        """Seal the packets of a run for a peer behind a relay, or see to it that they go elsewhere; True."""
        assert tunnel.relay is not None  # it can send
        relaying = self._relaying
        hop = relaying.hop(tunnel.relay)
        for packet in run.packets():
            if hop is None or not relaying.try_seal(tunnel, hop, packet, now_ms):
                self._upcalls.plain(UpcallReason.NO_TUNNEL, packet, now_ms)
        return True

    def _tunnel(self, peer: PeerRef) -> Tunnel | None:
        """The tunnel of a peer, if it can send: to its address, or else through a relay."""
        index = self._peers.tunnel(peer)
        tunnel = None if index is None else self._tunnels.get(index)
        if tunnel is None or tunnel.state is not _PROVEN:
            return None
        return None if tunnel.underlay is None and tunnel.relay is None else tunnel
