"""Datagrams that came on a tunnel of ours before the peer's answer did: kept until somebody can open them.

Data flow: control.controller -> [control.early] -> control.handshakes -> HandOver -> the data path
A released peer sends on a new tunnel from the moment it has answered, and what it sends takes another way to
us than its answer. Knows only local indexes: what is kept was checked by nobody, and is handed over under the
index it was addressed to, or not at all. Knows nothing of keys and of who sent it.

Anybody may send to an index, once he has seen it on the wire. So what is kept is bounded for each handshake
and in all, and the first are kept: what comes later cannot push out what was there, nor change its order.
Source: docs/architecture.md, "What comes before its tunnel".
"""

from dataclasses import dataclass, field
from typing import Final

from nebula_mp.newtypes import TunnelIndex, UdpAddr

DATAGRAMS_EACH: Final = 512
"""For one handshake: 5 ms of 100,000 a second; a reader sends up as many at once."""
BYTES_EACH: Final = 500_000
"""For one handshake, OVERHEAD_BYTES of each datagram included: they fit the ring to a reader at once."""
BYTES_ALL: Final = 4 << 20
"""For all handshakes together."""
OVERHEAD_BYTES: Final = 256
"""What a datagram costs beside its bytes, about."""


@dataclass(slots=True)
class _Kept:
    datagrams: list[tuple[bytes, UdpAddr]] = field(default_factory=list)
    size_bytes: int = 0


class EarlyDatagrams:
    """`try_keep` while a handshake waits for its answer, `take` when it ends in whatever way."""

    def __init__(self) -> None:
        self._kept: dict[TunnelIndex, _Kept] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return sum(len(kept.datagrams) for kept in self._kept.values())

    def try_keep(self, local_index: TunnelIndex, datagram: bytes, source: UdpAddr) -> bool:
        """Keep a datagram and where it came from; False, and nothing changed, when there is no room."""
        cost = len(datagram) + OVERHEAD_BYTES
        kept = self._kept.get(local_index) or _Kept()
        if (
            len(kept.datagrams) >= DATAGRAMS_EACH
            or kept.size_bytes + cost > BYTES_EACH
            or self._size_bytes + cost > BYTES_ALL
        ):
            return False
        self._kept[local_index] = kept
        kept.datagrams.append((datagram, source))
        kept.size_bytes += cost
        self._size_bytes += cost
        return True

    def take(self, local_index: TunnelIndex) -> list[tuple[bytes, UdpAddr]]:
        """Give away what was kept for an index, in the order in which it came."""
        kept = self._kept.pop(local_index, None)
        if kept is None:
            return []
        self._size_bytes -= kept.size_bytes
        return kept.datagrams
