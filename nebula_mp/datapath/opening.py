"""UDP socket -> tunnel, window, key -> opened into the open ring, datagram by datagram.

Data flow: UDP | another reader's strangers -> [PythonOpener] -> open ring -> drains.TunDrain
                                                             -> upcall ring -> control
                                                             -> stranger ring -> the owner of the tunnel
Knows the order of the checks, of which the first that fails gives a datagram its one reason; decides nothing.
Source: docs/wire-format.md, "Packet header" and "Replay window"; docs/architecture.md, "Steering".

Nothing that is not authentic changes anything: the window moves after the tag was found right, and what was
forged is opened into bytes that nobody else reads and that are zeros afterwards. An authentic packet from
another address than the tunnel's is delivered as any other, and control is told of the address: so no packet
overtakes another, or is lost, while a peer moves.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Final

from nebula_mp.crypto.replay import WIDTH
from nebula_mp.datapath.api import DATAGRAM_BYTES_MAX, Arrival, Drop, UpcallReason, parse_record
from nebula_mp.datapath.drains import LOST, borrow_socket
from nebula_mp.datapath.filling import Drops, Filler, Strangers, Upcalls
from nebula_mp.datapath.runs import OVERHEAD_BYTES
from nebula_mp.datapath.sealing import Ciphers
from nebula_mp.datapath.sockaddr import Sources
from nebula_mp.errors import AuthError, ReplayError, WireError
from nebula_mp.newtypes import IPNetwork, Seconds, UdpAddr
from nebula_mp.shm_counters import ReceiveWindows, Traffic
from nebula_mp.shm_flows import FlowView
from nebula_mp.shm_ring import Consumer
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_tunnels import TunnelRow, TunnelState, TunnelView
from nebula_mp.wire.header import HEADER_BYTES, MESSAGE_RELAY, SUBTYPES, VERSION, MessageType
from nebula_mp.wire.ip import parse_flow

_PUNCH_BYTES_MAX: Final = 1
_KINDS: Final = {
    (VERSION << 4 | kind, subtype): kind for kind, subtypes in SUBTYPES.items() for subtype in subtypes
}
_NOT_OURS: Final = (MessageType.HANDSHAKE, MessageType.RECV_ERROR)
_PACKETS: Final = SLOTS["mp.udp.rx.packets"]
_BYTES: Final = SLOTS["mp.udp.rx.bytes"]
_ICMP_SEEN: Final = SLOTS["mp.rx.icmp"]


class PythonOpener:
    """A `datapath.api.Opener`."""

    def __init__(
        self,
        udp_fd: int,
        *,
        worker: int,
        filler: Filler,
        tunnels: TunnelView[Ciphers],
        flows: FlowView,
        windows: ReceiveWindows,
        traffic: Traffic,
        upcalls: Upcalls,
        strangers: Strangers,
        strangers_in: Sequence[Consumer],
        overlay: Sequence[IPNetwork],
        stats: StatsPage,
        clock: Callable[[], Seconds],
    ) -> None:
        self._socket = borrow_socket(self, udp_fd)
        self._worker = worker
        self._filler = filler
        self._tunnels = tunnels
        self._flows = flows
        self._windows = windows
        self._traffic = traffic
        self._upcalls = upcalls
        self._strangers = strangers
        self._strangers_in = tuple(strangers_in)
        self._sources = Sources(overlay)
        self._stats = stats
        self._drops = Drops(stats)
        self._clock = clock
        self._datagram = memoryview(bytearray(DATAGRAM_BYTES_MAX + 1))
        self._message = memoryview(bytearray(DATAGRAM_BYTES_MAX))

    def waiting(self) -> int:
        """As `Opener.waiting`."""
        return self._filler.waiting()

    def poll(self, budget: int) -> int:
        """As `Opener.poll`."""
        now_ms = int(self._clock() * 1000)
        taken = self._poll_strangers(budget, now_ms)
        packets = size_bytes = 0
        lost = None
        while taken < budget:
            try:
                size, source = self._socket.recvfrom_into(self._datagram, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in LOST:
                    lost = error
                    break
                # Counts as one, so that a flood of them cannot hold the loop.
                self._stats.add(_ICMP_SEEN)
                taken += 1
                continue
            taken += 1
            packets += 1
            size_bytes += size
            if size > DATAGRAM_BYTES_MAX:
                self._drops.count(Drop.OVERSIZE)
            else:
                self._handle(self._datagram[:size], self._sources.get(source), now_ms)
        self._filler.flush()
        self._upcalls.flush()
        self._strangers.flush()
        if packets:
            self._stats.add(_PACKETS, packets)
            self._stats.add(_BYTES, size_bytes)
        if lost is not None:
            raise lost
        return taken

    def _poll_strangers(self, budget: int, now_ms: int) -> int:
        """Take what other readers handed to us, whole areas at a time."""
        taken = 0
        for ring in self._strangers_in:
            while taken < budget and ring.pending():
                for _, data in ring.entries():
                    _, _, source, _, _, datagram = parse_record(bytes(data))
                    self._handle(memoryview(datagram), source, now_ms)
                    taken += 1
                ring.release()
        return taken

    def _handle(self, datagram: memoryview, source: UdpAddr | None, now_ms: int) -> None:
        """See to it that a datagram is opened, handed over or counted; `source` is None if it has looped."""
        size = len(datagram)
        if size < HEADER_BYTES and size > _PUNCH_BYTES_MAX:
            self._drops.count(Drop.SHORT)
            return
        kind = None
        if size > _PUNCH_BYTES_MAX:
            kind = _KINDS.get((datagram[0], datagram[1]))
            if kind is None:
                self._drops.count(Drop.TYPE if datagram[0] >> 4 == VERSION else Drop.VERSION)
                return
        if source is None:
            self._drops.count(Drop.LOOPED)
            return
        if kind is None:
            self._upcalls.raw(UpcallReason.DATAGRAM, Arrival(source, 0, 0, now_ms), datagram)
            return
        arrival = Arrival(source, kind, datagram[1], now_ms)
        if kind in _NOT_OURS or (kind == MessageType.MESSAGE and datagram[1] == MESSAGE_RELAY):
            self._upcalls.raw(UpcallReason.DATAGRAM, arrival, datagram)
            return
        index = int.from_bytes(datagram[4:8], "big")
        tunnel = self._tunnels.get(index)
        if tunnel is None:
            self._upcalls.raw(UpcallReason.UNKNOWN_INDEX, arrival, datagram)
        elif tunnel.owner != self._worker:
            self._strangers.push(tunnel.owner, arrival, datagram)
        elif size < OVERHEAD_BYTES:
            self._drops.count(Drop.TRUNCATED)
        else:
            self._open(tunnel, arrival, datagram)

    def _open(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, datagram: memoryview) -> None:
        """Open a message of a tunnel that is ours."""
        row = tunnel.local_index & 0xFFFF
        window = self._windows.get(row, tunnel.generation)
        if window is None:  # the row has a later tunnel, and this one ended
            self._drops.count(Drop.UNKNOWN_INDEX)
            return
        counter = int.from_bytes(datagram[8:HEADER_BYTES], "big")
        try:
            window.check(counter)
        except ReplayError:
            self._drops.count(Drop.OLD if counter + WIDTH <= window.current else Drop.REPLAY)
            return
        size = len(datagram) - OVERHEAD_BYTES
        is_packet = arrival.type == MessageType.MESSAGE
        if not is_packet:
            out = self._message[:size]
        elif size > self._filler.room_bytes:
            self._drops.count(Drop.OVERSIZE)
            return
        elif not self._filler.try_room(size):
            self._drops.count(Drop.OPEN_RING_FULL)
            return
        else:
            out = self._filler.data[self._filler.at : self._filler.at + size]
        try:
            tunnel.ciphers.receive.open_into(counter, datagram[:HEADER_BYTES], datagram[HEADER_BYTES:], out)
        except AuthError:
            self._drops.count(Drop.AUTH)
            return
        window.update(counter)
        self._traffic.received(row, tunnel.generation, 1, len(datagram), arrival.at_ms)
        if tunnel.state is not TunnelState.PROVEN:
            self._upcalls.opened(UpcallReason.FIRST, arrival, tunnel.local_index, out)
        elif not is_packet:
            self._upcalls.opened(UpcallReason.MESSAGE, arrival, tunnel.local_index, out)
        else:
            self._admit(tunnel, arrival, out)

    def _admit(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, packet: memoryview) -> None:
        """Publish an authentic IP packet, which lies in the open ring, if the tables let it pass."""
        if arrival.source != tunnel.underlay:
            self._upcalls.moved(arrival, tunnel.local_index)
        try:
            flow = parse_flow(packet, inbound=True)
        except WireError:
            self._drops.count(Drop.INNER_IP)
            return
        if tunnel.sources is not None and flow.remote not in tunnel.sources:
            self._drops.count(Drop.SOURCE_ADDR)
            return
        allowed = self._flows.inbound(flow, tunnel.peer, arrival.at_ms)
        if allowed:
            self._filler.describe(len(packet), 0, tunnel.local_index & 0xFFFF)
        elif allowed is None:
            self._upcalls.opened(UpcallReason.NEW_FLOW_IN, arrival, tunnel.local_index, packet)
        else:
            self._drops.count(Drop.REFUSED_IN)
