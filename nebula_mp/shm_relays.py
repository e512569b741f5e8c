"""Paths through relays in shared memory: what a reader is to do with a relay frame, by its index.

Data flow: whoever agrees on paths with other hosts -> [RelayTable] -> memory -> [RelayView] -> datapath
Knows rows, and when to trust one; knows nothing of frames, and of how two hosts agree on a path.
Offsets and rights: shm_table. Source: docs/architecture.md, "Relay frames".

Relay indexes are names of their own, apart from those of tunnels. A row is the low half of the index, as with
tunnels, and belongs to the same share as the tunnel that carries its frames: their reader owns that tunnel's
replay window. A row is read under its sequence number: even, copy, the same number again. It holds no key, so
whoever goes on with an old copy does no harm: the tunnels it leads to are looked up anew for each frame.

| change | stores, one after the other                    | killed inside: the successor    |
|--------|------------------------------------------------|---------------------------------|
| set    | sequence odd, all else, sequence even          | `recover` empties the row: such |
| clear  | sequence odd, zeros, sequence even             | a path is agreed on once more   |
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nebula_mp.newtypes import RelayIndex, TunnelIndex
from nebula_mp.shm import Mapping
from nebula_mp.shm_table import RELAY_ROW, ROWS_AT_WORD, ROWS_MAX, row_count

_WORDS: Final = RELAY_ROW.size // 8
_FIELDS = struct.Struct("<IIIII4x")  # local index, carrier, kind, next tunnel, next index
_FIELDS_AT: Final = RELAY_ROW.fields["local_index"].offset
_EMPTY: Final = bytes(_FIELDS.size)

assert _FIELDS_AT + _FIELDS.size == RELAY_ROW.size


class RelayKind(IntEnum):
    """Where the frames of a path go."""

    TERMINAL = 1  # here: what they hold is for us
    FORWARDING = 2  # on, to the other end of the path


_KINDS: Final = {int(kind): kind for kind in RelayKind}


@dataclass(frozen=True, slots=True)
class RelayRow:
    """A path, as one host on it sees it."""

    local_index: RelayIndex  # what frames that come to us are addressed to
    carrier: TunnelIndex  # the tunnel through which they come; terminal: those we send leave through it, too
    kind: RelayKind
    next_tunnel: TunnelIndex | None  # forwarding: the tunnel through which they go on; else None
    next_index: RelayIndex  # what frames that we send are addressed to


class RelayTable:
    """The writer's side. Attaching changes nothing; a successor calls `recover` before anything else."""

    def __init__(self, relays: Mapping) -> None:
        assert relays.writable
        self._rows = row_count(relays, RELAY_ROW, ROWS_MAX)
        self._data = relays.data
        self._words = relays.words

    def set(self, path: RelayRow) -> None:
        """Put a path into the row of its local index, in place of whatever is there."""
        assert path.local_index
        assert (path.next_tunnel is not None) == (path.kind is RelayKind.FORWARDING)
        fields = (path.local_index, path.carrier, path.kind, path.next_tunnel or 0, path.next_index)
        self._store(path.local_index & 0xFFFF, _FIELDS.pack(*fields))

    def clear(self, index: RelayIndex) -> None:
        """Free the row of this index."""
        self._store(index & 0xFFFF, _EMPTY)

    def recover(self) -> int:
        """Free the rows that a predecessor left half written; gives how many."""
        torn = [row for row in range(self._rows) if self._words[ROWS_AT_WORD + row * _WORDS] & 1]
        for row in torn:
            self._store(row, _EMPTY)
        return len(torn)

    def _store(self, row: int, fields: bytes) -> None:
        assert row < self._rows
        word = ROWS_AT_WORD + row * _WORDS
        sequence = self._words[word] | 1  # one that a predecessor left odd stays so
        self._words[word] = sequence
        at = word * 8 + _FIELDS_AT
        self._data[at : at + _FIELDS.size] = fields
        self._words[word] = sequence + 1


class RelayView:
    """A reader's side."""

    def __init__(self, relays: Mapping) -> None:
        self._rows = row_count(relays, RELAY_ROW, ROWS_MAX)
        self._relays = relays
        self._data = relays.data
        self._words = relays.words
        self._known: dict[int, tuple[int, RelayRow | None]] = {}  # by row: sequence number, and what it said

    def get(self, index: int) -> RelayRow | None:
        """The path with this local index, any u32; None if there is none.

        While its row is being written it is what the row said before.
        """
        row = index & 0xFFFF
        if row >= self._rows:
            return None
        word = ROWS_AT_WORD + row * _WORDS
        sequence = self._words[word]
        known = self._known.get(row)
        if known is None:
            if not sequence:
                return None  # never written: a flood of made-up indexes leaves nothing behind
            known = (1, None)  # read by nobody: no even row is this
        if known[0] != sequence and not sequence & 1:
            fields = _FIELDS.unpack_from(self._data, word * 8 + _FIELDS_AT)
            if self._words[word] == sequence:
                known = self._known[row] = (sequence, self._path(*fields))
        path = known[1]
        return path if path is not None and path.local_index == index else None

    def _path(
        self, local_index: int, carrier: int, kind: int, next_tunnel: int, next_index: int
    ) -> RelayRow | None:
        if not kind:
            return None
        if kind not in _KINDS:
            raise self._relays.contradiction("kind of a path", kind, "0, 1 or 2")
        return RelayRow(
            RelayIndex(local_index),
            TunnelIndex(carrier),
            _KINDS[kind],
            TunnelIndex(next_tunnel) if kind == RelayKind.FORWARDING else None,
            RelayIndex(next_index),
        )
