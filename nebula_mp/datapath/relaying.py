"""What leaves in relay frames: datagrams of others that go on, and packets for peers behind a relay.

Data flow: datapath.opening (a frame that goes on) | datapath.sealing (a packet) -> [Relaying] -> seal ring
Knows what a frame looks like, and which tunnel a path leads to; decides nothing: what finds no way is counted
or left to its caller. Source: docs/wire-format.md, "Relay frame".

    frame    | header, type 1.1 | datagram                     | tag |   key and counter of the hop's tunnel
    datagram                    | header | sealed packet | tag |         key and counter of the peer's tunnel

The tag of a frame is over its header and the datagram, which is not encrypted once more. Counters are taken
when there is room and before anything is sealed with them, as in `sealing`; but one by one, and regardless of
the span: what waited here would wait together with everything that came behind it. For the same reason a
counter whose lock another process has is tried for during a millisecond once in a pass, and then only once.

A counter that was taken and not used seems to be in flight to other workers until the area is sent. So the
hop's tunnel is looked at before the peer's counter is taken; if it ends in between they wait a millisecond.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from nebula_mp.crypto.aead import TAG_BYTES, Ciphers
from nebula_mp.datapath.api import Drop
from nebula_mp.datapath.filling import Drops, Filler
from nebula_mp.datapath.runs import OVERHEAD_BYTES
from nebula_mp.newtypes import Buffer, RelayIndex, TunnelIndex
from nebula_mp.shm_counters import Refusal, SendCounters, Traffic
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayView
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_tunnels import TunnelRow, TunnelState, TunnelView
from nebula_mp.wire.header import (
    COUNTER_LIMIT,
    HEADER_BYTES,
    MESSAGE_IP,
    MESSAGE_RELAY,
    MessageType,
    encode_header,
)

_TRIES: Final = 20  # for the lock of a counter, each for about 50 us
_MESSAGE: Final = MessageType.MESSAGE
_FORWARDED: Final = SLOTS["mp.relay.forwarded"]
_BEYOND: Final = SLOTS["mp.counter.span"]
_BUSY: Final = SLOTS["mp.counter.busy"]

Tunnel = TunnelRow[Ciphers]


class Hop(NamedTuple):
    """Where frames go next."""

    tunnel: Tunnel
    path: RelayIndex  # as the host at its end calls it


class Relaying:
    """Fills the seal ring, as the sealer does, in turns with it."""

    def __init__(
        self,
        *,
        filler: Filler,
        area: Callable[[], int],
        tunnels: TunnelView[Ciphers],
        relays: RelayView,
        counters: SendCounters,
        traffic: Traffic,
        stats: StatsPage,
        drops: Drops,
    ) -> None:
        """`area` gives the number of the area being filled."""
        self._filler = filler
        self._area = area
        self._tunnels = tunnels
        self._relays = relays
        self._counters = counters
        self._traffic = traffic
        self._stats = stats
        self._drops = drops
        self._has_forwarded = False
        self._tries = _TRIES

    def take_forwarded(self) -> bool:
        """Whether anything was forwarded since this was asked last."""
        forwarded, self._has_forwarded = self._has_forwarded, False
        return forwarded

    def end_pass(self) -> None:
        """Publish what was forwarded, and be patient again."""
        self._tries = _TRIES
        if self._has_forwarded:
            self._filler.flush()

    def forward(self, path: RelayRow, datagram: Buffer, now_ms: int) -> None:
        """Send the content of a frame of this path on, or count why not."""
        assert path.next_tunnel is not None
        tunnel = self._usable(path.next_tunnel)
        if tunnel is None:
            self._drops.count(Drop.RELAY_INDEX)
            return
        if not self._has_room(len(datagram) + OVERHEAD_BYTES):
            return
        counter = self._reserve(tunnel)
        if isinstance(counter, Refusal):
            if not self._refuse(counter):
                self._drops.count(Drop.RELAY_INDEX)
            return
        begin = self._filler.at + HEADER_BYTES
        self._filler.data[begin : begin + len(datagram)] = datagram
        self._wrap(Hop(tunnel, path.next_index), counter, len(datagram), now_ms)
        self._stats.add(_FORWARDED)
        self._has_forwarded = True

    def hop(self, index: RelayIndex) -> Hop | None:
        """The first hop of a path that ends here; None if it cannot be gone."""
        path = self._relays.get(index)
        if path is None or path.kind is not RelayKind.TERMINAL:
            return None
        tunnel = self._usable(path.carrier)
        return None if tunnel is None else Hop(tunnel, path.next_index)

    def try_seal(self, tunnel: Tunnel, hop: Hop, packet: Buffer, now_ms: int) -> bool:
        """Seal a packet for a peer behind a relay, or count why not; False if one of the tunnels ended."""
        inner_bytes = len(packet) + OVERHEAD_BYTES
        if not self._has_room(inner_bytes + OVERHEAD_BYTES):
            return True
        refusal = self._foresee(hop.tunnel)
        if refusal is not None:
            return self._refuse(refusal)
        first = self._reserve(tunnel)
        if isinstance(first, Refusal):
            return self._refuse(first)
        begin = self._filler.at + HEADER_BYTES
        middle, end = begin + HEADER_BYTES, begin + inner_bytes
        header = encode_header(_MESSAGE, MESSAGE_IP, tunnel.remote_index, first)
        data = self._filler.data
        data[begin:middle] = header
        tunnel.ciphers.send.seal_into(first, header, packet, data[middle:end])
        counter = self._reserve(hop.tunnel)
        if isinstance(counter, Refusal):
            return self._refuse(counter)
        self._traffic.sent(tunnel.local_index & 0xFFFF, tunnel.generation, 1, inner_bytes, now_ms)
        self._wrap(hop, counter, inner_bytes, now_ms)
        return True

    def _usable(self, index: TunnelIndex) -> Tunnel | None:
        """The tunnel to a hop, if it can send: directly, since no path leads through two relays."""
        tunnel = self._tunnels.get(index)
        if tunnel is None or tunnel.state is not TunnelState.PROVEN or tunnel.underlay is None:
            return None
        return tunnel

    def _has_room(self, size_bytes: int) -> bool:
        """Have room for a frame, or count why there is none."""
        if size_bytes > self._filler.room_bytes:
            self._drops.count(Drop.OVERSIZE)
        elif not self._filler.try_room(size_bytes):
            self._drops.count(Drop.SEAL_RING_FULL)
        else:
            return True
        return False

    def _foresee(self, tunnel: Tunnel) -> Refusal | None:
        """Why there would be no counter, as far as can be seen without taking one."""
        last = self._counters.last(tunnel.local_index & 0xFFFF, tunnel.generation)
        if last is None:
            return Refusal.GONE
        return Refusal.EXHAUSTED if last + 1 >= COUNTER_LIMIT else None

    def _refuse(self, refusal: Refusal) -> bool:
        """Count a packet without a counter; False, and it is not, if the tunnel ended."""
        if refusal is Refusal.GONE:
            return False
        self._drops.count(Drop.EXHAUSTED)
        return True

    def _reserve(self, tunnel: Tunnel) -> int | Refusal:
        counters, row = self._counters, tunnel.local_index & 0xFFFF
        beyond = counters.beyond_span
        for _ in range(self._tries):
            counter = counters.reserve(row, tunnel.generation, 1, self._area(), regardless=True)
            if counter is not Refusal.BUSY:
                break
        else:
            self._stats.add(_BUSY)
            self._tries = 1
        if counters.beyond_span != beyond:
            self._stats.add(_BEYOND, counters.beyond_span - beyond)
        return counter

    def _wrap(self, hop: Hop, counter: int, inner_bytes: int, now_ms: int) -> None:
        """Make a frame of the datagram that lies behind room for the header."""
        tunnel, filler = hop.tunnel, self._filler
        data, at = filler.data, filler.at
        row, size_bytes = tunnel.local_index & 0xFFFF, inner_bytes + OVERHEAD_BYTES
        end = at + size_bytes
        tag_at = end - TAG_BYTES
        data[at : at + HEADER_BYTES] = encode_header(_MESSAGE, MESSAGE_RELAY, hop.path, counter)
        tunnel.ciphers.send.seal_into(counter, data[at:tag_at], b"", data[tag_at:end])
        filler.describe(size_bytes, size_bytes, row)
        self._traffic.sent(row, tunnel.generation, 1, size_bytes, now_ms)
