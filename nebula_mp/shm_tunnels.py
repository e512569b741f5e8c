"""Tunnels in shared memory: control publishes their rows, readers and writers look them up.

Data flow: workers.control -> [TunnelTable] -> memory -> [TunnelView] -> datapath
                                                      -> [UnderlayView] -> writers
Knows which part of a row to trust when; knows nothing of packets, and of keys only where they lie.
Offsets and rights: shm_table. Source: docs/architecture.md, "Shared memory".

A tunnel's row is read under its sequence number: even, copy, the same number again. Control is the only
writer and stores in this order, so that a successor sees from the row alone what one that died was doing:

| change | stores, one after the other                              | killed inside: the successor      |
|--------|----------------------------------------------------------|-----------------------------------|
| open   | sequence odd, state FREE, all else, keys, state,         | sees FREE: empties the row        |
|        | sequence even                                            |                                   |
| update | sequence odd, all but generation and keys, sequence even | sees a state: the keys are whole, |
|        |                                                          | the rest must be written again    |
| close  | sequence odd, state FREE, keys zero, all else zero but   | sees FREE: empties the row        |
|        | the generation, sequence even                            |                                   |

Not allowed, though tempting: to make an odd row even without rewriting it (it may be half of each); to reuse
a row without a new generation (a reader may still hold its old key and would take counters of the new one);
to change keys under a generation (readers keep the ciphers they made for it).

A row that stays odd is a miss to whoever has no older snapshot of it; whoever has one goes on with that.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Generic, TypeVar

from nebula_mp.newtypes import Buffer, Cipher, IPAddress, RelayIndex, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import Mapping
from nebula_mp.shm_counters import SendCounters
from nebula_mp.shm_table import (
    KEY_ROW,
    ROWS_AT,
    ROWS_AT_WORD,
    ROWS_MAX,
    TUNNEL_ROW,
    PeerRef,
    row_count,
)

SOURCES_MAX: Final = 3
"""Source addresses a row has room for; a peer with more, or with networks behind it, is left to control."""
RETRY: Final = Seconds(0.001)
"""For so long a reader tries again to read a row that is being written."""

_T = TypeVar("_T")

_ASK: Final = 255
_WORDS: Final = TUNNEL_ROW.size // 8
_GENERATION: Final = TUNNEL_ROW.word("generation")
_PEER: Final = TUNNEL_ROW.word("peer")
_UNDERLAY: Final = TUNNEL_ROW.fields["ipv4"].offset // 8
_STATE: Final = TUNNEL_ROW.fields["state"].offset
_KEY_BYTES: Final = KEY_ROW.fields["send"].size

_IPV4: Final = 4
_TRIES: Final = 100  # to read an IPv6 address that is being written, about 50 us

_INDEXES = struct.Struct("<II")  # local, remote
_UNDERLAY_WORD = struct.Struct("<4sHBx")  # IPv4, port, family
# IPv6, state, cipher, owner, number of sources, families, sources, relay
_REST = struct.Struct("<16sBBHBB2x48sI12x")
_U64 = struct.Struct("<Q")
_INDEXES_AT: Final = TUNNEL_ROW.fields["local_index"].offset
_INDEX_HALF: Final = _INDEXES_AT // 4
_REST_AT: Final = TUNNEL_ROW.fields["ipv6"].offset

assert _INDEXES_AT + _INDEXES.size == TUNNEL_ROW.fields["generation"].offset
assert _REST_AT + _REST.size == TUNNEL_ROW.size


class TunnelState(IntEnum):
    """What a row holds."""

    FREE = 0
    CANDIDATE = 1  # we answered a stage 1: receive, send nothing, tell control of the first packet
    PROVEN = 2


_CIPHERS: Final = {1: Cipher.AES, 2: Cipher.CHACHAPOLY}
_CIPHER_CODES: Final = {cipher: code for code, cipher in _CIPHERS.items()}
_STATES: Final = {int(state): state for state in TunnelState}


@dataclass(frozen=True, slots=True)
class TunnelFields:
    """What control states of a tunnel, keys apart."""

    local_index: TunnelIndex
    remote_index: TunnelIndex
    state: TunnelState
    cipher: Cipher
    owner: int  # number of the reader that has the replay window
    peer: PeerRef
    underlay: UdpAddr | None  # None: not to be sent to directly
    sources: frozenset[bytes] | None
    """The inner addresses (4 or 16 bytes) a packet of this peer may come from; None: only control knows."""
    relay: RelayIndex | None
    """The way while `underlay` is None: a terminal row of `shm_relays`."""


@dataclass(frozen=True, slots=True)
class TunnelRow(TunnelFields, Generic[_T]):
    """A snapshot of a tunnel's row, and the ciphers made from its keys."""

    generation: int
    sequence: int
    ciphers: _T


class TunnelTable:
    """Control's side. Attaching changes nothing; a successor calls `recover` before anything else."""

    def __init__(self, tunnels: Mapping, keys: Mapping, counters: SendCounters) -> None:
        assert tunnels.writable
        assert keys.writable
        self._rows = row_count(tunnels, TUNNEL_ROW, ROWS_MAX)
        if row_count(keys, KEY_ROW, ROWS_MAX) != self._rows:
            raise keys.contradiction("number of rows", keys.parameters[0], str(self._rows))
        self._tunnels = tunnels
        self._data = tunnels.data
        self._words = tunnels.words
        self._keys = keys.data
        self._counters = counters

    def open(self, fields: TunnelFields, send_key: Buffer, receive_key: Buffer) -> int:
        """Publish a tunnel in the row of its local index, which is free; gives its generation.

        The keys are 32 bytes each and are copied. Sending starts behind the counters of the handshake.
        """
        row, at, word = self._place(fields.local_index)
        assert self._data[at + _STATE] == TunnelState.FREE
        assert len(send_key) == len(receive_key) == _KEY_BYTES
        sequence = self._begin(word)
        generation = self._words[word + _GENERATION] + 1
        self._words[word + _GENERATION] = generation
        self._store(at, fields, TunnelState.FREE)
        # Before anybody can see the row: whoever still has its former tunnel gets no counter any more.
        self._counters.open(row, generation)
        keys = ROWS_AT + row * KEY_ROW.size
        self._keys[keys : keys + _KEY_BYTES] = send_key
        self._keys[keys + _KEY_BYTES : keys + KEY_ROW.size] = receive_key
        self._data[at + _STATE] = fields.state
        self._words[word] = sequence + 1
        return generation

    def update(self, fields: TunnelFields) -> None:
        """Replace all that the row of this tunnel says, keys apart."""
        _, at, word = self._find(fields.local_index)
        sequence = self._begin(word)
        self._store(at, fields, fields.state)
        self._words[word] = sequence + 1

    def close(self, index: TunnelIndex) -> None:
        """Free the row of a tunnel that is there, and wipe its keys."""
        row, at, word = self._find(index)
        self._empty(row, at, word)

    def fields(self, index: TunnelIndex) -> TunnelFields | None:
        """What the row says of this tunnel; None if it is not there."""
        _, at, _ = self._place(index)
        values = _unpack(self._tunnels, bytes(self._data[at : at + TUNNEL_ROW.size]))
        return None if values is None or values[0] != index else TunnelFields(*values)

    def generation(self, index: TunnelIndex) -> int:
        """That of the row of a tunnel that is there."""
        _, _, word = self._find(index)
        return self._words[word + _GENERATION]

    def keys(self, index: TunnelIndex) -> tuple[memoryview, memoryview]:
        """Send and receive key of a tunnel that is there: the memory itself, borrowed until it is closed."""
        row, _, _ = self._find(index)
        keys = ROWS_AT + row * KEY_ROW.size
        return self._keys[keys : keys + _KEY_BYTES], self._keys[keys + _KEY_BYTES : keys + KEY_ROW.size]

    def __iter__(self) -> Iterator[TunnelIndex]:
        """The tunnels that are there."""
        for row in range(self._rows):
            at = ROWS_AT + row * TUNNEL_ROW.size
            if self._data[at + _STATE] != TunnelState.FREE:
                yield self._index(at)

    def recover(self) -> tuple[TunnelIndex, ...]:
        """Empty the rows that a predecessor left half opened or half closed.

        Gives the tunnels it left half updated: their keys are whole, and they must be updated or closed now.
        """
        torn = []
        for row in range(self._rows):
            word = ROWS_AT_WORD + row * _WORDS
            if self._words[word] & 1:
                at = word * 8
                if self._data[at + _STATE] == TunnelState.FREE:
                    self._empty(row, at, word)
                else:
                    torn.append(self._index(at))
        return tuple(torn)

    def _begin(self, word: int) -> int:
        """Make the row unreadable; gives its sequence number. One that a predecessor left odd stays so."""
        sequence = self._words[word] | 1
        self._words[word] = sequence
        return sequence

    def _store(self, at: int, fields: TunnelFields, state: TunnelState) -> None:
        assert fields.state is not TunnelState.FREE
        underlay = fields.underlay
        if underlay is None:
            family, port, packed = 0, 0, b""
        else:
            family, port, packed = underlay.ip.version, underlay.port, underlay.ip.packed
        ipv4, ipv6 = (packed, b"") if family == 4 else (b"", packed)
        if fields.sources is None or len(fields.sources) > SOURCES_MAX:
            count, families, sources = _ASK, 0, b""
        else:
            listed = sorted(fields.sources)
            count = len(listed)
            families = sum((len(source) == 16) << number for number, source in enumerate(listed))
            sources = b"".join(source.ljust(16, b"\0") for source in listed)
        cipher = _CIPHER_CODES[fields.cipher]
        word = at // 8
        indexes = _INDEXES.pack(fields.local_index, fields.remote_index)
        self._data[at + _INDEXES_AT : at + _INDEXES_AT + _INDEXES.size] = indexes
        self._words[word + _PEER] = fields.peer
        # One store: writers read an IPv4 address without the sequence number.
        self._words[word + _UNDERLAY] = int.from_bytes(_UNDERLAY_WORD.pack(ipv4, port, family), "little")
        self._data[at + _REST_AT : at + TUNNEL_ROW.size] = _REST.pack(
            ipv6, state, cipher, fields.owner, count, families, sources, fields.relay or 0
        )

    def _empty(self, row: int, at: int, word: int) -> None:
        sequence = self._begin(word)
        self._data[at + _STATE] = TunnelState.FREE
        self._counters.close(row)
        keys = ROWS_AT + row * KEY_ROW.size
        self._keys[keys : keys + KEY_ROW.size] = bytes(KEY_ROW.size)
        self._data[at + _INDEXES_AT : at + _INDEXES_AT + _INDEXES.size] = bytes(_INDEXES.size)
        self._words[word + _PEER] = 0
        self._words[word + _UNDERLAY] = 0
        self._data[at + _REST_AT : at + TUNNEL_ROW.size] = bytes(_REST.size)
        self._words[word] = sequence + 1

    def _place(self, index: TunnelIndex) -> tuple[int, int, int]:
        """Row of an index, where it begins in bytes, and in words."""
        row = index & 0xFFFF
        assert row < self._rows  # who hands out indexes knows how many rows there are
        at = ROWS_AT + row * TUNNEL_ROW.size
        return row, at, at // 8

    def _find(self, index: TunnelIndex) -> tuple[int, int, int]:
        row, at, word = self._place(index)
        assert self._data[at + _STATE] != TunnelState.FREE
        assert self._index(at) == index
        return row, at, word

    def _index(self, at: int) -> TunnelIndex:
        return TunnelIndex(int.from_bytes(self._data[at + _INDEXES_AT : at + _INDEXES_AT + 4], "little"))


class TunnelView(Generic[_T]):
    """A reader's side: rows by local index, with the ciphers `build` made of their keys.

    A row is read once and then recognised by its sequence number, so that a packet costs one load. Keys are
    never copied: `build(cipher, send_key, receive_key)` gets views of the shared memory, borrowed for the
    call, in which it must expand both keys. Should the row have changed meanwhile, what it made is thrown
    away. The ciphers stay the same for one generation of a row.

    While a row is being written `get` tries again for 1 ms by `clock`, then goes on with what it had.
    """

    def __init__(
        self,
        tunnels: Mapping,
        keys: Mapping,
        build: Callable[[Cipher, memoryview, memoryview], _T],
        clock: Callable[[], Seconds],
    ) -> None:
        self._rows = row_count(tunnels, TUNNEL_ROW, ROWS_MAX)
        if row_count(keys, KEY_ROW, ROWS_MAX) != self._rows:
            raise keys.contradiction("number of rows", keys.parameters[0], str(self._rows))
        self._tunnels = tunnels
        self._data = tunnels.data
        self._words = tunnels.words
        self._indexes = tunnels.data.cast("I")
        self._keys = keys.data
        self._build = build
        self._clock = clock
        self._snapshots: dict[int, TunnelRow[_T]] = {}
        self._given_up: dict[int, int] = {}  # by row: the sequence number it was waited for in vain

    def get(self, index: int) -> TunnelRow[_T] | None:
        """The tunnel with this local index, any u32; None if there is none."""
        row = index & 0xFFFF
        if row >= self._rows:
            return None
        word = ROWS_AT_WORD + row * _WORDS
        snapshot = self._snapshots.get(row)
        if snapshot is None and self._indexes[word * 2 + _INDEX_HALF] != index:
            return None  # a flood of made-up indexes costs no more than this
        sequence = self._words[word]
        if snapshot is None or snapshot.sequence != sequence:
            snapshot = self._refresh(row, snapshot, sequence)
            if snapshot is None:
                return None
        return snapshot if snapshot.local_index == index else None

    def sweep(self) -> int:
        """Drop the snapshots, and with them the keys, of rows that have changed; gives how many.

        To be called about once a second: a tunnel that ended is not asked for any more.
        """
        words = self._words
        gone = [
            row
            for row, snapshot in self._snapshots.items()
            if snapshot.sequence != (now := words[ROWS_AT_WORD + row * _WORDS]) and not now & 1
        ]
        for row in gone:
            del self._snapshots[row]
        return len(gone)

    def _refresh(self, row: int, old: TunnelRow[_T] | None, sequence: int) -> TunnelRow[_T] | None:
        """Read a row that has changed since `old`; with None if it is free."""
        if self._given_up.get(row) == sequence:
            return old
        word = ROWS_AT_WORD + row * _WORDS
        deadline = None
        while True:
            sequence = self._words[word]
            if not sequence & 1:
                snapshot = self._read(row, old, sequence)
                if self._words[word] == sequence:
                    break
            now = self._clock()
            if deadline is None:
                deadline = now + RETRY
            elif now >= deadline:
                self._given_up[row] = sequence
                return old
        if snapshot is None:
            self._snapshots.pop(row, None)
        else:
            self._snapshots[row] = snapshot
        return snapshot

    def _read(self, row: int, old: TunnelRow[_T] | None, sequence: int) -> TunnelRow[_T] | None:
        """Read a row that had this even number; worth something only if it has it still."""
        at = ROWS_AT + row * TUNNEL_ROW.size
        data = bytes(self._data[at : at + TUNNEL_ROW.size])
        if self._words[at // 8] != sequence:
            return None
        values = _unpack(self._tunnels, data)
        if values is None:
            return None
        (generation,) = _U64.unpack_from(data, _GENERATION * 8)
        if old is not None and old.generation == generation:
            ciphers = old.ciphers
        else:
            keys = ROWS_AT + row * KEY_ROW.size
            ciphers = self._build(
                values[3],
                self._keys[keys : keys + _KEY_BYTES],
                self._keys[keys + _KEY_BYTES : keys + KEY_ROW.size],
            )
        return TunnelRow(*values, generation, sequence, ciphers)


class UnderlayView:
    """A writer's side: where to send a batch; it holds no key.

    The address is taken when the batch is sent, so that a peer that moved meanwhile gets it.
    """

    def __init__(self, tunnels: Mapping) -> None:
        self._rows = row_count(tunnels, TUNNEL_ROW, ROWS_MAX)
        self._tunnels = tunnels
        self._data = tunnels.data
        self._words = tunnels.words
        # By row: the underlay word, for IPv6 the sequence number as well, and the address they stand for.
        self._known: dict[int, tuple[int, int, UdpAddr]] = {}

    def get(self, row: int) -> UdpAddr | None:
        """Underlay address of the tunnel in `row`; None if it has none.

        While control is writing an IPv6 address it is the one before; None if that was never asked for.
        """
        if not 0 <= row < self._rows:
            raise self._tunnels.contradiction("tunnel row of a batch", row, f"0..{self._rows - 1}")
        words = self._words
        word = ROWS_AT_WORD + row * _WORDS
        known = self._known.get(row)
        where = words[word + _UNDERLAY]
        if where >> 48 == _IPV4:  # one word, which needs no sequence number
            if known is not None and known[0] == where:
                return known[2]
            return self._remember(row, where, 0, b"")
        if known is not None and known[0] == where and known[1] == words[word]:
            return known[2]
        for _ in range(_TRIES):
            sequence = words[word]
            where = words[word + _UNDERLAY]
            ipv6 = bytes(self._data[word * 8 + _REST_AT : word * 8 + _REST_AT + 16])
            if not sequence & 1 and words[word] == sequence:
                return self._remember(row, where, sequence, ipv6)
        return None if known is None else known[2]

    def _remember(self, row: int, where: int, sequence: int, ipv6: bytes) -> UdpAddr | None:
        ipv4, port, family = _UNDERLAY_WORD.unpack(where.to_bytes(8, "little"))
        address = _underlay(self._tunnels, ipv4, port, family, ipv6)
        if address is None:
            self._known.pop(row, None)
        else:
            self._known[row] = where, sequence, address
        return address


_Values = tuple[
    TunnelIndex,
    TunnelIndex,
    TunnelState,
    Cipher,
    int,
    PeerRef,
    UdpAddr | None,
    frozenset[bytes] | None,
    RelayIndex | None,
]


def _unpack(tunnels: Mapping, data: bytes) -> _Values | None:
    """Fields of a whole row, in the order of TunnelFields; None for a free one. RingError if it is none."""
    where, port, family = _UNDERLAY_WORD.unpack_from(data, _UNDERLAY * 8)
    ipv6, state, cipher, owner, count, families, listed, relay = _REST.unpack_from(data, _REST_AT)
    if state not in _STATES:
        raise tunnels.contradiction("tunnel state", state, "0..2")
    if state == TunnelState.FREE:
        return None
    if cipher not in _CIPHERS:
        raise tunnels.contradiction("cipher", cipher, "1 or 2")
    local_index, remote_index = _INDEXES.unpack_from(data, _INDEXES_AT)
    sources = None
    if count != _ASK:
        if count > SOURCES_MAX:
            raise tunnels.contradiction("number of sources", count, f"0..{SOURCES_MAX}")
        sources = frozenset(
            listed[16 * each : 16 * each + (16 if families >> each & 1 else 4)] for each in range(count)
        )
    return (
        TunnelIndex(local_index),
        TunnelIndex(remote_index),
        _STATES[state],
        _CIPHERS[cipher],
        owner,
        PeerRef(_U64.unpack_from(data, _PEER * 8)[0]),
        _underlay(tunnels, where, port, family, ipv6),
        sources,
        RelayIndex(relay) if relay else None,
    )


def _underlay(tunnels: Mapping, ipv4: bytes, port: int, family: int, ipv6: bytes) -> UdpAddr | None:
    ip: IPAddress
    match family:
        case 0:
            return None
        case 4:
            ip = IPv4Address(ipv4)
        case 6:
            ip = IPv6Address(ipv6)
        case _:
            raise tunnels.contradiction("address family", family, "0, 4 or 6")
    return UdpAddr(ip, port)
