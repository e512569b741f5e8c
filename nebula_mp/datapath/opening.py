"""UDP socket -> tunnel, window, key -> opened into the open ring, whole batches where all is as usual.

Data flow: UDP | another reader's strangers -> [PythonOpener] -> delivery -> open ring -> drains.TunDrain
                                                             -> relaying -> seal ring -> drains.UdpDrain
                                                             -> upcall ring -> control
                                                             -> stranger ring -> the owner of the tunnel
Knows the order of the checks, of which the first that fails gives a datagram its one reason; decides nothing.
Source: docs/wire-format.md, "Packet header" and "Replay window"; docs/architecture.md, "Steering".

Nothing that is not authentic changes anything: the window moves after the tag was found right, and what was
forged is opened into bytes that nobody else reads and that are zeros afterwards. An authentic packet from
another address than the tunnel's is delivered as any other, and control is told of the address: so no packet
overtakes another, or is lost, while a peer moves.

`_handle` is what is to happen to a datagram. `_take_run` does the same to many: data messages of one tunnel
whose counters follow each other are checked together, and opened where the payloads of a superpacket belong.
Whatever is not as usual it leaves to `_handle`, having changed nothing. `_handle_relayed` is what is to
happen to the datagram in a relay frame whose path ends here.
"""

import select
import struct
from collections.abc import Callable, Sequence
from typing import Final

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import TAG_BYTES, Ciphers
from nebula_mp.crypto.replay import WIDTH, ReplayWindow
from nebula_mp.datapath.api import (
    DATAGRAM_BYTES_MAX,
    FORWARDED,
    Arrival,
    Drop,
    UpcallReason,
    parse_record,
)
from nebula_mp.datapath.batches import Batch
from nebula_mp.datapath.delivery import Delivery
from nebula_mp.datapath.drains import LOST, borrow_socket
from nebula_mp.datapath.filling import Drops, Filler, Strangers, Upcalls
from nebula_mp.datapath.relaying import Relaying
from nebula_mp.datapath.runs import OVERHEAD_BYTES
from nebula_mp.datapath.sockaddr import Sources
from nebula_mp.errors import AuthError, ReplayError
from nebula_mp.newtypes import IPNetwork, Seconds, UdpAddr
from nebula_mp.shm_admission import Admission
from nebula_mp.shm_counters import ReceiveWindows, Traffic
from nebula_mp.shm_relays import RelayKind, RelayView
from nebula_mp.shm_ring import Consumer
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_tunnels import TunnelRow, TunnelState, TunnelView
from nebula_mp.wire.header import (
    HEADER_BYTES,
    MESSAGE_IP,
    MESSAGE_RELAY,
    SUBTYPES,
    VERSION,
    MessageType,
)

_new_tuple = tuple.__new__
_MESSAGE: Final = MessageType.MESSAGE  # of an enum, a member takes two look-ups
_PROVEN: Final = TunnelState.PROVEN
_PUNCH_BYTES_MAX: Final = 1
_KINDS: Final = {
    (VERSION << 4 | kind, subtype): kind for kind, subtypes in SUBTYPES.items() for subtype in subtypes
}
_INDEX_AND_COUNTER: Final = struct.Struct("!4xIQ")
_DATA: Final = bytes((VERSION << 4 | MessageType.MESSAGE, MESSAGE_IP))
_COUNTERS: Final = 2**64
_NOT_OURS: Final = (MessageType.HANDSHAKE, MessageType.RECV_ERROR)
_PACKETS: Final = SLOTS["mp.udp.rx.packets"]
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
        relays: RelayView,
        relaying: Relaying,
        flows: Admission,
        windows: ReceiveWindows,
        traffic: Traffic,
        upcalls: Upcalls,
        strangers: Strangers,
        strangers_in: Sequence[Consumer],
        overlay: Sequence[IPNetwork],
        stats: StatsPage,
        clock: Callable[[], Seconds],
        offloads: Offloads,
    ) -> None:
        self._socket = borrow_socket(self, udp_fd)
        self._queue = select.poll()
        self._queue.register(udp_fd, select.POLLIN)
        self._worker = worker
        self._filler = filler
        self._tunnels = tunnels
        self._relays = relays
        self._relaying = relaying
        self._windows = windows
        self._traffic = traffic
        self._upcalls = upcalls
        self._strangers = strangers
        self._strangers_in = tuple(strangers_in)
        self._sources = Sources(overlay)
        self._stats = stats
        self._drops = Drops(stats)
        self._delivery = Delivery(filler, flows=flows, upcalls=upcalls, drops=self._drops, offloads=offloads)
        self._clock = clock
        self._batch = Batch(joined=offloads.udp_gro, room_bytes=DATAGRAM_BYTES_MAX + 1)
        # By row: the source and the tunnel's address that were found to be equal.
        self._at_home: dict[int, tuple[UdpAddr, UdpAddr]] = {}
        self._message = memoryview(bytearray(DATAGRAM_BYTES_MAX))

    def take_flags(self) -> int:
        """FORWARDED, if anything was forwarded since this was asked last."""
        return FORWARDED if self._relaying.take_forwarded() else 0

    def waiting(self) -> int:
        """As `Opener.waiting`."""
        return self._filler.waiting()

    def poll(self, budget: int) -> int:
        """As `Opener.poll`."""
        now_ms = int(self._clock() * 1000)
        taken = self._poll_strangers(budget, now_ms) if self._strangers_in else 0
        packets = size_bytes = 0
        batch = self._batch
        lost = None
        asked = False
        while taken < budget:
            if packets and not asked:
                # Mostly nothing else waits: to ask costs a quarter of a call in vain, which raises.
                asked = True
                if not self._queue.poll(0):
                    break
            try:
                source = batch.receive(self._socket)
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
            taken += batch.count
            packets += batch.count
            size_bytes += batch.size_bytes
            self._take(batch, self._sources.get(source), now_ms)
        self._delivery.settle()
        self._filler.flush()
        self._relaying.end_pass()
        self._upcalls.flush()
        self._strangers.flush()
        if packets:
            self._stats.add_traffic(_PACKETS, packets, size_bytes)
        if lost is not None:
            raise lost
        return taken

    def _poll_strangers(self, budget: int, now_ms: int) -> int:
        """Take what other readers handed to us, whole areas at a time."""
        taken = 0
        for ring in self._strangers_in:
            while taken < budget and ring.pending():
                for _, data in ring.entries():
                    _, path, source, _, _, datagram = parse_record(bytes(data))
                    if path:
                        self._handle_relayed(path, memoryview(datagram), now_ms)
                    else:
                        self._handle(memoryview(datagram), source, now_ms)
                    taken += 1
                ring.release()
        return taken

    def _take(self, batch: Batch, source: UdpAddr | None, now_ms: int) -> None:
        """See to it that each datagram is opened, handed over or counted; `source` is as for `_handle`."""
        if batch.is_cut:  # by a kernel that joins more than it says
            self._drops.count(Drop.OVERSIZE, batch.count)
            return
        count = batch.count
        if count == 1:
            self._handle(batch.datagram(0), source, now_ms)
            return
        if source is None or batch.stride > DATAGRAM_BYTES_MAX or not self._delivery.kinds:
            for number in range(count):
                self._handle(batch.datagram(number), source, now_ms)
            return
        at = 0
        for first, end in batch.runs():
            at = first
            while end - at > 1:
                taken = self._take_run(batch, at, end, source, now_ms)
                if not taken:
                    break
                at += taken
            for number in range(at, end):
                self._handle(batch.datagram(number), source, now_ms)
            at = end
        for number in range(at, count):
            self._handle(batch.datagram(number), source, now_ms)

    def _take_run(self, batch: Batch, first: int, end: int, source: UdpAddr, now_ms: int) -> int:
        """Open datagrams that differ in nothing but consecutive counters; gives how many, from the first on.

        0 when they must be looked at one by one; then nothing has changed.
        """
        header = batch.datagram(first)[:HEADER_BYTES].tobytes()
        if header[:2] != _DATA:
            return 0
        tunnel = self._tunnels.get(int.from_bytes(header[4:8], "big"))
        if tunnel is None or tunnel.owner != self._worker or tunnel.state is not TunnelState.PROVEN:
            return 0
        window = self._windows.get(tunnel.local_index & 0xFFFF, tunnel.generation)
        size = batch.stride - OVERHEAD_BYTES
        if window is None or size < 0:
            return 0
        if batch.bytes_of(end - 1) < OVERHEAD_BYTES:
            end -= 1
        count = min(end - first, self._delivery.run_max(size))
        counter = int.from_bytes(header[8:], "big")
        if count < 2 or counter + count > _COUNTERS:
            return 0
        try:
            window.check_range(counter, count)
        except ReplayError:
            return 0
        if not self._delivery.try_room(size, count):
            self._drops.count(Drop.OPEN_RING_FULL, count)
            return count
        arrival = Arrival(source, MessageType.MESSAGE, MESSAGE_IP, now_ms)
        return self._open_run(tunnel, window, arrival, batch, range(first, first + count))

    def _open_run(
        self,
        tunnel: TunnelRow[Ciphers],
        window: ReplayWindow,
        arrival: Arrival,
        batch: Batch,
        numbers: range,
    ) -> int:
        """Open what may become a superpacket; gives how many, 0 if nothing may or one is not authentic."""
        delivery, aead = self._delivery, tunnel.ciphers.receive
        size = batch.stride - OVERHEAD_BYTES
        out = delivery.try_place(tunnel, arrival, size)
        assert out is not None  # there is room for the whole run
        datagram = batch.datagram(numbers.start)
        counter = int.from_bytes(datagram[8:HEADER_BYTES], "big")
        try:
            aead.open_into(counter, datagram[:HEADER_BYTES], datagram[HEADER_BYTES:], out)
            joint = delivery.open_run(aead, batch, numbers, counter, out)
        except AuthError:
            return 0
        if joint is None:
            return 0
        window.update_range(counter, joint.packets)
        row = tunnel.local_index & 0xFFFF
        size_bytes = (joint.packets - 1) * batch.stride + joint.last + OVERHEAD_BYTES
        self._traffic.received(row, tunnel.generation, joint.packets, size_bytes, arrival.at_ms)
        if self._has_moved(tunnel, arrival.source):
            self._upcalls.moved(arrival, tunnel.local_index)
        delivery.publish_run(tunnel, arrival, joint)
        return joint.packets

    def _handle(self, datagram: memoryview, source: UdpAddr | None, now_ms: int) -> None:
        """See to it that a datagram is opened, handed over or counted; `source` is None if it has looped."""
        size = len(datagram)
        if size > DATAGRAM_BYTES_MAX:
            self._drops.count(Drop.OVERSIZE)
            return
        if size < HEADER_BYTES and size > _PUNCH_BYTES_MAX:
            self._drops.count(Drop.SHORT)
            return
        kind, subtype = None, 0
        if size > _PUNCH_BYTES_MAX:
            subtype = datagram[1]
            kind = _KINDS.get((datagram[0], subtype))
            if kind is None:
                self._drops.count(Drop.TYPE if datagram[0] >> 4 == VERSION else Drop.VERSION)
                return
        if source is None:
            self._drops.count(Drop.LOOPED)
            return
        if kind is None:
            self._hand_up(UpcallReason.DATAGRAM, Arrival(source, 0, 0, now_ms), datagram)
            return
        arrival = _new_tuple(Arrival, (source, kind, subtype, now_ms))  # as in wire.ip
        if kind in _NOT_OURS:
            self._hand_up(UpcallReason.DATAGRAM, arrival, datagram)
            return
        index, counter = _INDEX_AND_COUNTER.unpack_from(datagram)
        if subtype == MESSAGE_RELAY and kind is _MESSAGE:
            self._take_frame(arrival, index, counter, datagram)
            return
        tunnel = self._tunnels.get(index)
        if tunnel is None:
            self._hand_up(UpcallReason.UNKNOWN_INDEX, arrival, datagram)
        elif tunnel.owner != self._worker:
            self._strangers.push(tunnel.owner, arrival, datagram)
        elif size < OVERHEAD_BYTES:
            self._drops.count(Drop.TRUNCATED)
        else:
            self._open(tunnel, arrival, counter, datagram)

    def _take_frame(self, arrival: Arrival, index: int, counter: int, datagram: memoryview) -> None:
        """See to it that a relay frame is handed over or counted, or what it holds goes where it leads."""
        path = self._relays.get(index)
        tunnel = None if path is None else self._tunnels.get(path.carrier)
        if path is None or tunnel is None:
            self._hand_up(UpcallReason.DATAGRAM, arrival, datagram)
            return
        if tunnel.owner != self._worker:
            self._strangers.push(tunnel.owner, arrival, datagram)
            return
        if len(datagram) < OVERHEAD_BYTES:
            self._drops.count(Drop.TRUNCATED)
            return
        window = self._find_window(tunnel, counter)
        if window is None:
            return
        tag_at = len(datagram) - TAG_BYTES
        try:
            tunnel.ciphers.receive.open(counter, datagram[:tag_at], datagram[tag_at:])
        except AuthError:
            self._drops.count(Drop.AUTH)
            return
        window.update(counter)
        row = tunnel.local_index & 0xFFFF
        self._traffic.received(row, tunnel.generation, 1, len(datagram), arrival.at_ms)
        content = datagram[HEADER_BYTES:tag_at]
        if tunnel.state is not _PROVEN:
            self._delivery.settle()  # what came earlier goes up earlier
            self._upcalls.opened(UpcallReason.FIRST, arrival, tunnel.local_index, content)
            return
        if self._has_moved(tunnel, arrival.source):
            self._upcalls.moved(arrival, tunnel.local_index)
        if path.kind is RelayKind.FORWARDING:
            self._relaying.forward(path, content, arrival.at_ms)
        else:
            self._handle_relayed(index, content, arrival.at_ms)

    def _handle_relayed(self, path: int, datagram: memoryview, now_ms: int) -> None:
        """See to it that what came in a frame of this path is opened, handed over or counted."""
        if len(datagram) > DATAGRAM_BYTES_MAX:  # from another reader: no frame has room for it
            self._drops.count(Drop.OVERSIZE)
            return
        if len(datagram) < HEADER_BYTES:
            self._drops.count(Drop.SHORT)
            return
        subtype = datagram[1]
        kind = _KINDS.get((datagram[0], subtype))
        if kind is None:
            self._drops.count(Drop.TYPE if datagram[0] >> 4 == VERSION else Drop.VERSION)
            return
        if subtype == MESSAGE_RELAY and kind is _MESSAGE:
            self._drops.count(Drop.RELAY_INDEX)
            return
        arrival = Arrival(None, kind, subtype, now_ms)
        index, counter = _INDEX_AND_COUNTER.unpack_from(datagram)
        tunnel = None if kind in _NOT_OURS else self._tunnels.get(index)
        if tunnel is None:
            self._hand_up_relayed(path, arrival, datagram)
        elif tunnel.owner != self._worker:
            self._strangers.push(tunnel.owner, arrival, datagram, path)
        elif len(datagram) < OVERHEAD_BYTES:
            self._drops.count(Drop.TRUNCATED)
        else:
            self._open(tunnel, arrival, counter, datagram)

    def _hand_up_relayed(self, index: int, arrival: Arrival, datagram: memoryview) -> None:
        """Let control see what came in a frame of this path, if that is still there."""
        path = self._relays.get(index)
        if path is None:
            self._drops.count(Drop.RELAY_INDEX)
            return
        self._delivery.settle()  # as above
        self._upcalls.relayed(arrival, path, datagram)

    def _find_window(self, tunnel: TunnelRow[Ciphers], counter: int) -> ReplayWindow | None:
        """The window of a tunnel that is ours, if it takes this counter; else it was counted why not."""
        window = self._windows.get(tunnel.local_index & 0xFFFF, tunnel.generation)
        if window is None:  # the row has a later tunnel, and this one ended
            self._drops.count(Drop.UNKNOWN_INDEX)
            return None
        try:
            window.check(counter)
        except ReplayError:
            self._drops.count(Drop.OLD if counter + WIDTH <= window.current else Drop.REPLAY)
            return None
        return window

    def _open(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, counter: int, datagram: memoryview) -> None:
        """Open a message of a tunnel that is ours."""
        window = self._find_window(tunnel, counter)
        if window is None:
            return
        size_bytes = len(datagram)
        size = size_bytes - OVERHEAD_BYTES
        is_packet = arrival.type is _MESSAGE
        delivery = self._delivery
        out: memoryview | None
        if is_packet:
            if not delivery.fits(size):
                self._drops.count(Drop.OVERSIZE)
                return
            out = delivery.try_place(tunnel, arrival, size)
        else:
            out = self._message[:size]
        if out is None:
            self._drops.count(Drop.OPEN_RING_FULL)
            return
        try:
            tunnel.ciphers.receive.open_into(counter, datagram[:HEADER_BYTES], datagram[HEADER_BYTES:], out)
        except AuthError:
            self._drops.count(Drop.AUTH)
            return
        window.update(counter)
        row = tunnel.local_index & 0xFFFF
        self._traffic.received(row, tunnel.generation, 1, size_bytes, arrival.at_ms)
        if is_packet and tunnel.state is _PROVEN:
            if self._has_moved(tunnel, arrival.source):
                self._upcalls.moved(arrival, tunnel.local_index)
            delivery.take(tunnel, arrival, size)
        else:
            delivery.settle()  # what came earlier goes up earlier
            reason = UpcallReason.MESSAGE if tunnel.state is TunnelState.PROVEN else UpcallReason.FIRST
            self._upcalls.opened(reason, arrival, tunnel.local_index, out)

    def _has_moved(self, tunnel: TunnelRow[Ciphers], source: UdpAddr | None) -> bool:
        """Whether a datagram came from another address than the tunnel's; never, if from none.

        Both objects stay the same while neither changes: to compare two addresses takes two calls in Python.
        """
        row = tunnel.local_index & 0xFFFF
        known = self._at_home.get(row)
        if known is not None and known[0] is source and known[1] is tunnel.underlay:
            return False
        if source is None:
            return False
        if tunnel.underlay is None or source != tunnel.underlay:
            return True
        self._at_home[row] = source, tunnel.underlay
        return False

    def _hand_up(self, reason: UpcallReason, arrival: Arrival, datagram: memoryview) -> None:
        """Let control see a datagram as it came, behind what came earlier."""
        self._delivery.settle()
        self._upcalls.raw(reason, arrival, datagram)
