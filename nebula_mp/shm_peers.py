"""Peers in shared memory: one word each says which tunnel a peer is sent through.

Data flow: workers.control -> [PeerTable] -> memory -> [PeerView] -> datapath
Knows rows, generations and local indexes; knows nothing of who a peer is. Flows name a peer, not a tunnel, so
that a new handshake moves all flows of the peer with one store. Offsets and rights: shm_table.
Source: docs/architecture.md, "Shared memory".

A row's word is changed by control alone, and by one store:

| change | generation | tunnel | seen by readers                                         |
|--------|------------|--------|---------------------------------------------------------|
| add    | next       | none   | flows of the row's former peers still miss              |
| set    | same       | given  | all flows of the peer take this tunnel from now on      |
| remove | next       | none   | its flows miss                                          |

Not allowed, though tempting: to keep the generation when a row is given to another peer (flows of the former
one, still in the flow table, would go to the new one).
"""

from collections.abc import Iterable
from typing import Final

from nebula_mp.newtypes import TunnelIndex
from nebula_mp.shm import Mapping
from nebula_mp.shm_table import PEER_ROW, ROWS_AT_WORD, ROWS_MAX, PeerRef, row_count

_U32: Final = 2**32 - 1


class PeerTable:
    """Control's side: gives out rows, and says which tunnel each peer is sent through."""

    def __init__(self, peers: Mapping, in_use: Iterable[PeerRef] = ()) -> None:
        """`in_use`: what a predecessor had added and control still knows; all other rows become free."""
        assert peers.writable
        self._words = peers.words
        taken = {ref & _U32 for ref in in_use}
        rows = range(row_count(peers, PEER_ROW, ROWS_MAX) - 1, -1, -1)  # the lowest is given out first
        self._free = [row for row in rows if row not in taken]
        for row in self._free:
            if self._words[ROWS_AT_WORD + row] & _U32:
                self._advance(row)

    def add(self) -> PeerRef | None:
        """Give a peer a row, with no tunnel yet; None when all are taken."""
        return self._advance(self._free.pop()) if self._free else None

    def set(self, peer: PeerRef, tunnel: TunnelIndex | None) -> None:
        """Send through this tunnel from now on, or through none."""
        word = ROWS_AT_WORD + (peer & _U32)
        assert self._words[word] >> 32 == peer >> 32
        self._words[word] = peer >> 32 << 32 | (tunnel or 0)

    def remove(self, peer: PeerRef) -> None:
        """Take a peer's row back."""
        row = peer & _U32
        assert self._words[ROWS_AT_WORD + row] >> 32 == peer >> 32
        self._advance(row)
        self._free.append(row)

    def _advance(self, row: int) -> PeerRef:
        generation = (self._words[ROWS_AT_WORD + row] >> 32) + 1 & _U32 or 1
        self._words[ROWS_AT_WORD + row] = generation << 32
        return PeerRef(generation << 32 | row)


class PeerView:
    """A reader's side."""

    def __init__(self, peers: Mapping) -> None:
        self._rows = row_count(peers, PEER_ROW, ROWS_MAX)
        self._words = peers.words

    def tunnel(self, peer: PeerRef) -> TunnelIndex | None:
        """Local index of the tunnel this peer is sent through; None without one, or if the peer is gone."""
        row = peer & _U32
        if row >= self._rows:
            return None
        word = self._words[ROWS_AT_WORD + row]
        if word >> 32 != peer >> 32:
            return None
        index: TunnelIndex = word & _U32  # type: ignore[assignment]  # to call the NewType costs as much again
        return index or None
