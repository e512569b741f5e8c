"""Authentic packets of a tunnel are judged by the tables, joined if they are one flow's, and published.

Data flow: datapath.opening -> [Delivery] -> open ring -> drains.TunDrain
                                          -> upcall ring -> control
Knows where in the open ring a packet is to be opened, and what an entry looks like; knows nothing of
datagrams, keys and windows. Everything it is given was authentic and is marked in the window.
Source: docs/architecture.md, "The life of a packet".

Two ways lead here, and both keep the order of packets:

- One by one: `try_place` says where the next packet is to be opened, and `take` takes it over. What lies
  there at equal steps, of one tunnel and one sender, is held until something else comes, or `settle` at the
  end of a pass; only then it is judged and joined, for which it has to be copied.
- A whole run: `try_room` for the worst case, that nothing is joined; then each is opened where the payloads
  of a superpacket belong, see `Joint`, and nothing is copied but headers.

Room is found before a packet is opened, since who has no room must not move the window. So nothing that was
taken over is lost for want of room.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import TAG_BYTES, Aead, Ciphers
from nebula_mp.datapath.api import Arrival, Drop, UpcallReason
from nebula_mp.datapath.batches import Batch
from nebula_mp.datapath.checksums import Rows
from nebula_mp.datapath.coalesce import Joined, Shape, coalesce, joinable, shape_of, superpacket_head
from nebula_mp.datapath.filling import Drops, Filler, Upcalls
from nebula_mp.datapath.virtio import HEADER_BYTES as VIRTIO_BYTES
from nebula_mp.datapath.virtio import PLAIN, GsoType
from nebula_mp.errors import WireError
from nebula_mp.shm_admission import Admission
from nebula_mp.shm_tunnels import TunnelRow
from nebula_mp.wire.header import HEADER_BYTES
from nebula_mp.wire.ip import parse_flow

_PLACES_MAX: Final = 128
_TCP: Final = frozenset({GsoType.TCP4, GsoType.TCP6})
_UDP: Final = frozenset({GsoType.UDP})


def _kinds(offloads: Offloads) -> frozenset[GsoType]:
    """Which superpackets the TUN device takes."""
    return (_TCP if offloads.tso else frozenset()) | (_UDP if offloads.uso else frozenset())


class Joint(NamedTuple):
    """Packets that were opened so that their payloads follow each other behind the header of the first.

    `at` is where in the area the first one begins. Packet i was opened `size - header_bytes` bytes behind
    packet i - 1, whose payload overwrote its header: so the headers are apart.
    """

    at: int
    packets: int
    size: int  # bytes of each packet
    last: int  # of the last one, more than its headers
    shape: Shape  # of the first
    headers: bytes  # of all, one behind the other

    @property
    def piece(self) -> int:
        """Bytes of payload of each packet, perhaps without the last."""
        return self.size - self.shape.header_bytes

    @property
    def header_rows(self) -> Rows:
        """The headers."""
        return Rows(self.headers, 0, self.shape.header_bytes, self.packets)

    def payload_rows(self, memory: memoryview) -> Rows:
        """Show the payloads, in the area."""
        return Rows(memory, self.at + self.shape.header_bytes, self.piece, self.packets)


class _Places:
    """Views of an area where the packets of a run are opened, made once for each geometry."""

    __slots__ = ("_area", "_at", "_header_bytes", "_size", "heads", "outs")

    def __init__(self, area: memoryview, at: int, size: int, header_bytes: int) -> None:
        self._area = area
        self._at = at
        self._size = size
        self._header_bytes = header_bytes
        self.outs: list[memoryview] = []
        self.heads: list[memoryview] = []

    def extend(self, count: int) -> None:
        """Have places for so many packets."""
        area, size, header_bytes = self._area, self._size, self._header_bytes
        for number in range(len(self.outs), count):
            at = self._at + number * (size - header_bytes)
            self.outs.append(area[at : at + size])
            self.heads.append(area[at : at + header_bytes])


class Delivery:
    """The inbound half behind the seal: a filler of the open ring, and what the tables say."""

    def __init__(
        self, filler: Filler, *, flows: Admission, upcalls: Upcalls, drops: Drops, offloads: Offloads
    ) -> None:
        self.kinds: Final = _kinds(offloads)
        """Superpackets that may be made."""
        self.head_bytes: Final = VIRTIO_BYTES if offloads.tun_header else 0
        """What stands in front of every packet."""
        self._head = PLAIN.encode()[: self.head_bytes]
        self._filler = filler
        self._flows = flows
        self._upcalls = upcalls
        self._drops = drops
        self._copies = memoryview(bytearray(filler.room_bytes if self.kinds else 0))
        self._places: dict[tuple[int, int, int, int], _Places] = {}
        # What was taken over one by one and not yet judged lies from `_filler.at` on, every `_step` bytes.
        self._held: list[int] = []  # their sizes, equal but for a shorter last one
        self._step = 0
        self._tunnel: TunnelRow[Ciphers] | None = None
        self._arrival: Arrival | None = None

    def fits(self, size: int) -> bool:
        """Whether a packet of so many bytes fits an area at all."""
        return size + self.head_bytes <= self._filler.room_bytes

    # One by one.

    def try_place(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, size: int) -> memoryview | None:
        """Where to open a packet that `fits`; None with a full ring. Raises RingError."""
        filler, held = self._filler, self._held
        needed = size + self.head_bytes
        at = filler.at
        if held:
            at += len(held) * self._step
            if (
                tunnel is not self._tunnel
                or arrival != self._arrival
                or held[-1] + self.head_bytes != self._step
                or needed > self._step
                or not filler.fits(at - filler.at + needed, len(held) + 1)
            ):
                self.settle()
        if not held:
            if not filler.try_room(needed):
                return None
            at = filler.at
        at += self.head_bytes
        return filler.data[at : at + size]

    def take(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, size: int) -> None:
        """Take over the packet that was opened in the last place given."""
        if not self._held:
            self._tunnel, self._arrival, self._step = tunnel, arrival, size + self.head_bytes
        self._held.append(size)
        if not self.kinds:
            self.settle()

    def settle(self) -> None:
        """Judge and describe what is held; before the filler is used or flushed."""
        held = self._held
        if not held:
            return
        tunnel, arrival = self._tunnel, self._arrival
        assert tunnel is not None
        assert arrival is not None
        filler, step = self._filler, self._step
        at, count = filler.at, len(held)
        if count == 1:  # without a copy of the list
            self._publish_at(tunnel, arrival, at, held.pop())
            return
        sizes = held.copy()
        held.clear()
        extent = self.head_bytes + (count - 1) * step + sizes[-1]
        lying = filler.data[at + self.head_bytes : at + extent]
        parts = coalesce(lying, step, sizes, self.kinds)
        if len(parts) < count:
            self._copies[: len(lying)] = lying
            self._publish(tunnel, arrival, parts, step, sizes)
            return
        for number, size in enumerate(sizes):
            self._publish_at(tunnel, arrival, at + number * step, size)

    def _publish_at(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, at: int, size: int) -> None:
        """Describe a packet that lies where it is to stay, if it may pass."""
        filler = self._filler
        data, begin = filler.data, at + self.head_bytes
        end = begin + size
        packet = data[begin:end]
        why = self._judge(tunnel, packet, arrival.at_ms)
        if why is not None:
            self._refuse(why, tunnel, arrival, packet)
            return
        data[at:begin] = self._head
        filler.at = at
        filler.describe(end - at, 1, tunnel.local_index & 0xFFFF)

    # A whole run.

    def run_max(self, size: int) -> int:
        """How many packets of so many bytes fit an area, if none is joined."""
        return min(self._filler.room_bytes // (size + self.head_bytes), self._filler.entries_max)

    def try_room(self, size: int, count: int) -> bool:
        """Have room for `count` packets of `size` bytes, up to `run_max`; False with a full ring."""
        self.settle()
        return self._filler.try_room((size + self.head_bytes) * count, count)

    def open_run(
        self, aead: Aead, batch: Batch, numbers: range, counter: int, packet: memoryview
    ) -> Joint | None:
        """Open the datagrams of these numbers for one superpacket; for `try_room` had room.

        `packet`, the first of them, has been opened in the first place; `counter` is its counter. None, and
        nothing was done, if it cannot be the first of a superpacket, or no other can be its second. Raises
        AuthError if one of the others is not authentic; then all must be opened again.
        """
        shape = shape_of(packet)
        if shape is None or shape.gso not in self.kinds:
            return None
        first, count, size, header_bytes = numbers.start, len(numbers), len(packet), shape.header_bytes
        last = batch.bytes_of(numbers[-1]) - HEADER_BYTES - TAG_BYTES
        if last <= header_bytes:
            count, last = count - 1, size
        if count < 2:
            return None
        begin = self._filler.at + self.head_bytes
        places = self._find_places(begin, size, header_bytes, count)
        views = batch.views(first + count)
        # From the last one to the second, each of which overwrites the header of the one behind it.
        end = first + count - 1
        headers, sealed = views.headers[end:first:-1], views.sealed[end:first:-1]
        outs, heads = places.outs[count - 1 : 0 : -1], places.heads[count - 1 : 0 : -1]
        if last != size:
            sealed[0] = sealed[0][: last + TAG_BYTES]
            outs[0] = outs[0][:last]
        # The header of the second one lies in the payload of the first.
        tail = packet[-header_bytes:].tobytes()
        kept = aead.open_each_into(range(counter + count - 1, counter, -1), headers, sealed, outs, heads)
        packet[-header_bytes:] = tail
        kept.append(places.heads[0].tobytes())
        kept.reverse()
        return Joint(begin, count, size, last, shape, b"".join(kept))

    def _find_places(self, begin: int, size: int, header_bytes: int, count: int) -> _Places:
        area = self._filler.data
        key = (id(area), begin, size, header_bytes)
        # An area has one view for as long as the ring lives. Only its beginning is met again and again.
        places = self._places.get(key)
        if places is None:
            places = _Places(area, begin, size, header_bytes)
            if begin == self.head_bytes:
                if len(self._places) >= _PLACES_MAX:
                    self._places.clear()
                self._places[key] = places
        if len(places.outs) < count:
            places.extend(count)
        return places

    def publish_run(self, tunnel: TunnelRow[Ciphers], arrival: Arrival, joint: Joint) -> None:
        """Judge and publish what `open_run` opened: in its place as far as it can be joined."""
        filler, shape, size = self._filler, joint.shape, joint.size
        data, header_bytes = filler.data, shape.header_bytes
        joined = 0
        if self._judge(tunnel, data[joint.at : joint.at + size], arrival.at_ms) is None:
            joined = joinable(shape, joint.header_rows, joint.payload_rows(data), size, joint.last)
        if joined < joint.packets:
            # First of all, since what is published below may lie where these do.
            sizes = self._copy_rest(joint, joined)
        if joined:
            last = joint.last if joined == joint.packets else size
            payload_bytes = (joined - 1) * joint.piece + last - header_bytes
            head = self._head + joint.headers[:header_bytes]
            if joined > 1:
                head = superpacket_head(
                    shape,
                    joint.headers[:header_bytes],
                    joint.headers[(joined - 1) * header_bytes : joined * header_bytes],
                    segment_bytes=joint.piece,
                    payload_bytes=payload_bytes,
                )
            data[filler.at : filler.at + len(head)] = head
            filler.describe(len(head) + payload_bytes, joined, tunnel.local_index & 0xFFFF)
        if joined < joint.packets:
            parts = coalesce(self._copies, size, sizes, self.kinds)
            self._publish(tunnel, arrival, parts, size, sizes)

    def _copy_rest(self, joint: Joint, joined: int) -> list[int]:
        """Copy the packets that were not joined, as whole ones; gives their sizes."""
        size, header_bytes = joint.size, joint.shape.header_bytes
        memory = self._filler.data
        count = joint.packets - joined
        whole = count if joint.last == size else count - 1
        headers = joint.header_rows.block(0, header_bytes)[joined:]
        Rows(self._copies, 0, size, count).block(0, header_bytes)[...] = headers
        if whole:
            payload = joint.payload_rows(memory).top(joined + whole).block(0, joint.piece)[joined:]
            Rows(self._copies, header_bytes, size, whole).block(0, joint.piece)[...] = payload
        sizes = [size] * whole
        if whole < count:
            sizes.append(joint.last)
            at = joint.at + header_bytes + (joint.packets - 1) * joint.piece
            to = whole * size + header_bytes
            left = joint.last - header_bytes
            self._copies[to : to + left] = memory[at : at + left]
        return sizes

    # Both.

    def _publish(
        self,
        tunnel: TunnelRow[Ciphers],
        arrival: Arrival,
        parts: Sequence[Joined],
        step: int,
        sizes: Sequence[int],
    ) -> None:
        """Judge and publish packets that were copied, every `step` bytes; one look-up for each part."""
        copies, filler = self._copies, self._filler
        for part in parts:
            at = part.first * step
            why = self._judge(tunnel, copies[at : at + sizes[part.first]], arrival.at_ms)
            if why is None:
                length = part.write(copies, filler.data[filler.at :])
                filler.describe(length, part.packets, tunnel.local_index & 0xFFFF)
                continue
            for number in range(part.first, part.first + part.packets):
                at = number * step
                self._refuse(why, tunnel, arrival, copies[at : at + sizes[number]])

    def _judge(
        self, tunnel: TunnelRow[Ciphers], packet: memoryview, at_ms: int
    ) -> Drop | UpcallReason | None:
        """Why an authentic packet does not pass, or None if it does."""
        try:
            flow = parse_flow(packet, inbound=True)
        except WireError:
            return Drop.INNER_IP
        sources = tunnel.sources
        if sources is not None and flow.remote not in sources:
            return Drop.SOURCE_ADDR
        allowed = self._flows.inbound(flow, tunnel.peer, at_ms)
        if allowed:
            return None
        return UpcallReason.NEW_FLOW_IN if allowed is None else Drop.REFUSED_IN

    def _refuse(
        self, why: Drop | UpcallReason, tunnel: TunnelRow[Ciphers], arrival: Arrival, packet: memoryview
    ) -> None:
        if isinstance(why, Drop):
            self._drops.count(why)
        else:
            self._upcalls.opened(why, arrival, tunnel.local_index, packet)
