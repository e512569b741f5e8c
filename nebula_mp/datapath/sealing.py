"""TUN queue -> flow, peer, tunnel -> sealed into the seal ring, packet by packet.

Data flow: TUN -> [PythonSealer] -> seal ring -> drains.UdpDrain
                                 -> upcall ring -> control
Knows which packets may share a batch of counters; decides nothing: what the tables do not answer goes up.
Source: docs/architecture.md, "The life of a packet"; docs/wire-format.md for the header.

Packets for one peer that follow each other form a run. Its counters are reserved at once, before the first
of it is sealed, and only when there is an area for all of it: so who dies here leaves a gap, never a counter
that another one would take again.
"""

import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from nebula_mp.crypto.aead import TAG_BYTES, Aead
from nebula_mp.datapath.api import Drop, UpcallReason
from nebula_mp.datapath.filling import Drops, Filler, Upcalls
from nebula_mp.errors import WireError
from nebula_mp.newtypes import Buffer, Cipher, Seconds
from nebula_mp.shm_counters import Refusal, SendCounters, Traffic
from nebula_mp.shm_flows import REFUSED, FlowView
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import PeerRef
from nebula_mp.shm_tunnels import TunnelRow, TunnelState, TunnelView
from nebula_mp.wire.header import HEADER_BYTES, MESSAGE_IP, VERSION, MessageType
from nebula_mp.wire.ip import parse_flow

OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES
HOLD: Final = Seconds(0.001)
"""So long a run is held back for another worker to send."""

LOCK_HOLD: Final = Seconds(0.05)
"""So long a run is held back for another process to give up the counter's lock. It lost its core while it had
it, and has it back a few time slices later: with 15 tasks on 2 cores a millisecond cost 10 to 20 packets of
4,000. Who was stopped for good costs every run this much, until the supervisor kills it."""

_PACKET_BYTES_MAX: Final = 65_535
_ARENA_BYTES: Final = 4 * _PACKET_BYTES_MAX
_HEADER = struct.Struct("!BBHIQ")
_PACKETS: Final = SLOTS["mp.tun.rx.packets"]
_BYTES: Final = SLOTS["mp.tun.rx.bytes"]
_BEYOND: Final = SLOTS["mp.counter.span"]
_BUSY: Final = SLOTS["mp.counter.busy"]


class Ciphers(NamedTuple):
    """What is made of a tunnel's keys, once for each generation of its row."""

    send: Aead
    receive: Aead

    @classmethod
    def build(cls, cipher: Cipher, send_key: memoryview, receive_key: memoryview) -> "Ciphers":
        """Expand both keys, which are borrowed for the call."""
        return cls(Aead(cipher, send_key), Aead(cipher, receive_key))


def seal_message(
    aead: Aead,
    first_bytes: tuple[int, int],
    remote_index: int,
    counter: int,
    plaintext: Buffer,
    *,
    out: memoryview,
) -> None:
    """Write header, ciphertext and tag to `out`, which is OVERHEAD_BYTES longer than `plaintext`.

    `first_bytes` are version and type, and subtype. `counter` was reserved for this message.
    """
    header = _HEADER.pack(*first_bytes, 0, remote_index, counter)
    out[:HEADER_BYTES] = header
    aead.seal_into(counter, header, plaintext, out[HEADER_BYTES:])


_DATA: Final = (VERSION << 4 | MessageType.MESSAGE, MESSAGE_IP)


class _Run:
    """Packets for one peer, in the order in which they came; `size_bytes` once they are sealed."""

    __slots__ = ("packets", "peer", "size_bytes")

    def __init__(self, peer: PeerRef) -> None:
        self.peer = peer
        self.packets: list[memoryview] = []
        self.size_bytes = 0


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
        flows: FlowView,
        counters: SendCounters,
        traffic: Traffic,
        upcalls: Upcalls,
        stats: StatsPage,
        clock: Callable[[], Seconds],
        entries_max: int,
    ) -> None:
        """`area` gives the number of the area being filled."""
        self._descriptor = tun_fd
        self._filler = filler
        self._area = area
        self._tunnels = tunnels
        self._peers = peers
        self._flows = flows
        self._counters = counters
        self._traffic = traffic
        self._upcalls = upcalls
        self._stats = stats
        self._drops = Drops(stats)
        self._clock = clock
        self._entries_max = entries_max
        # Packets that were read lie here one behind the other until their run was sealed.
        self._arena = memoryview(bytearray(_ARENA_BYTES))
        self._at = 0
        self._runs: deque[_Run] = deque()
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
        self._seal_runs(now, leave=0)
        while taken < budget and not self.is_holding:
            if self._at + _PACKET_BYTES_MAX > _ARENA_BYTES:
                self._seal_runs(now, leave=0)
                continue
            room = self._arena[self._at : self._at + _PACKET_BYTES_MAX]
            try:
                size = os.readv(self._descriptor, [room])
            except BlockingIOError:
                break
            except OSError as error:
                lost = error
                break
            taken += 1
            size_bytes += size
            self._take(room[:size], now_ms)
            # A run that may still grow stays; the others go.
            self._seal_runs(now, leave=1)
        if not self.is_holding:
            self._seal_runs(now, leave=0)
        self._filler.flush()
        self._upcalls.flush()
        if taken:
            self._stats.add(_PACKETS, taken)
            self._stats.add(_BYTES, size_bytes)
        if lost is not None:
            raise lost
        return taken

    def _take(self, packet: memoryview, now_ms: int) -> None:
        """Add a packet that was read to the run it belongs to, or see to it that it goes elsewhere."""
        try:
            flow = parse_flow(packet, inbound=False)
        except WireError:
            self._drops.count(Drop.TUN_INNER_IP)
            return
        peer = self._flows.outbound(flow, now_ms)
        size_bytes = len(packet) + OVERHEAD_BYTES
        if peer is None:
            self._upcalls.plain(UpcallReason.NEW_FLOW_OUT, packet, now_ms)
        elif peer == REFUSED:
            self._drops.count(Drop.REFUSED_OUT)
        elif size_bytes > self._filler.room_bytes:
            self._drops.count(Drop.OVERSIZE)
        else:
            run = self._runs[-1] if self._runs else None
            if (
                run is None
                or run.peer != peer
                or run.size_bytes + size_bytes > self._filler.room_bytes
                or len(run.packets) == self._entries_max
            ):
                run = _Run(peer)
                self._runs.append(run)
            run.packets.append(packet)
            run.size_bytes += size_bytes
            self._at += len(packet)

    def _seal_runs(self, now: Seconds, *, leave: int) -> None:
        """Seal the oldest runs until one must be held, or so many are left."""
        while len(self._runs) > leave:
            if not self._try_seal(self._runs[0], now):
                return
            self._held_since = None
            self._runs.popleft()
        if not self._runs:
            self._at = 0

    def _try_seal(self, run: _Run, now: Seconds) -> bool:
        """Seal a run, or see to it that it goes elsewhere; False when it is to be held back."""
        count = len(run.packets)
        held = Seconds(0) if self._held_since is None else Seconds(now - self._held_since)
        # Again when the tunnel ended in between: its successor may be there already.
        for _ in range(2):
            tunnel = self._tunnel(run.peer)
            if tunnel is None:
                break
            if not self._filler.try_room(run.size_bytes, count):
                self._drops.count(Drop.SEAL_RING_FULL, count)
                return True
            row, generation = tunnel.local_index & 0xFFFF, tunnel.generation
            beyond = self._counters.beyond_span
            first = self._counters.reserve(row, generation, count, self._area(), regardless=held >= HOLD)
            self._stats.add(_BEYOND, self._counters.beyond_span - beyond)
            if not isinstance(first, Refusal):
                self._seal(run, tunnel, first)
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
        for packet in run.packets:
            self._upcalls.plain(UpcallReason.NO_TUNNEL, packet, int(now * 1000))
        return True

    def _tunnel(self, peer: PeerRef) -> TunnelRow[Ciphers] | None:
        """The tunnel of a peer, if it can send."""
        index = self._peers.tunnel(peer)
        tunnel = None if index is None else self._tunnels.get(index)
        if tunnel is None or tunnel.state is not TunnelState.PROVEN or tunnel.underlay is None:
            return None
        return tunnel

    def _seal(self, run: _Run, tunnel: TunnelRow[Ciphers], first: int) -> None:
        filler, aead, index = self._filler, tunnel.ciphers.send, tunnel.remote_index
        row = tunnel.local_index & 0xFFFF
        for counter, packet in enumerate(run.packets, first):
            size = len(packet) + OVERHEAD_BYTES
            out = filler.data[filler.at : filler.at + size]
            seal_message(aead, _DATA, index, counter, packet, out=out)
            filler.describe(size, size, row)
