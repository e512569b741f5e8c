"""What control notes of each proven tunnel, so that its successor goes on without a handshake.

Data flow: workers.tables -> [workers.journal] -> memory -> the same two modules in control's successor
Knows what a handshake agreed on beside the keys, and how it is kept whole; holds no secret: the keys lie in a
region of their own. Offsets and rights: shm_table. Source: docs/architecture.md, "Shared memory".

One slot for each row of the tunnel table; control is the only writer and its successor the only reader:

    +0    u64 generation   of the tunnel in that row; 0: nothing is noted; a record counts only for this one
    +8    u64 length       of the record
    +16   u64 checksum     CRC-32 of generation and record
    +24   u64 moves        the underlay address in force is number `moves % 2`
    +32   remote[2]        { 16 bytes IP, IPv4 padded with zeros; u32 scope; u16 port; u8 family; u8 spare }
    +96   record           msgpack; never changes

| change | stores, one after the other                     | killed inside: the successor finds              |
|--------|-------------------------------------------------|-------------------------------------------------|
| save   | generation 0, all else, generation              | nothing, and closes the tunnel: the call that   |
|        |                                                 | proves it has not returned, so nobody uses it   |
| move   | the other remote, moves                         | the address before, or the new one; never half  |
| drop   | generation 0                                    | as before or as after                           |

Not allowed, though tempting: to change a record in place (the checksum would not fit, and a good tunnel would
end); to clear slots of rows that are free (each would become a page of memory).
"""

import struct
import zlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, Self

import msgpack

from nebula_mp.cert import codec
from nebula_mp.cert.model import Certificate
from nebula_mp.handshake.machine import Completed
from nebula_mp.newtypes import CertVersion, Cipher, Curve, IPAddress, TunnelIndex, UdpAddr
from nebula_mp.shm import Mapping
from nebula_mp.shm_table import JOURNAL_ROW, ROWS_AT, ROWS_MAX, row_count

RECORD_BYTES_MAX: Final = JOURNAL_ROW.fields["record"].size

_GENERATION: Final = JOURNAL_ROW.word("generation")
_LENGTH: Final = JOURNAL_ROW.word("length")
_CHECKSUM: Final = JOURNAL_ROW.word("checksum")
_MOVES: Final = JOURNAL_ROW.word("moves")
_REMOTES_AT: Final = (JOURNAL_ROW.fields["remote_0"].offset, JOURNAL_ROW.fields["remote_1"].offset)
_RECORD_AT: Final = JOURNAL_ROW.fields["record"].offset
_REMOTE: Final = struct.Struct("<16sIHBx")  # IP, scope, port, family

assert _REMOTE.size == JOURNAL_ROW.fields["remote_0"].size


@dataclass(frozen=True, slots=True)
class SavedCertificate:
    """A certificate as a handshake carries it: the encoding leaves out the public key."""

    version: int
    encoded: bytes
    public_key: bytes

    @classmethod
    def of(cls, certificate: Certificate) -> Self:
        """Encode."""
        encoded = codec.encode_for_handshake(certificate)
        return cls(int(certificate.version), encoded, certificate.public_key)

    def parse(self, curve: Curve) -> Certificate:
        """Decode; `curve` is our own, which a certificate of ours cannot change. Raises CertError."""
        return codec.parse_from_handshake(self.version, self.encoded, self.public_key, curve)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All of a `Completed` but its keys."""

    order: int  # grows from tunnel to tunnel, in the order in which they were proven
    local_index: TunnelIndex
    remote_index: TunnelIndex
    cipher: Cipher
    is_initiator: bool
    peer_time_ns: int
    peer: SavedCertificate
    own: SavedCertificate
    stage1: bytes
    stage2: bytes

    @classmethod
    def of(cls, session: Completed, order: int) -> Self:
        """Note a session."""
        return cls(
            order=order,
            local_index=session.local_index,
            remote_index=session.remote_index,
            cipher=session.send.cipher,
            is_initiator=session.is_initiator,
            peer_time_ns=session.peer_time_ns,
            peer=SavedCertificate.of(session.peer.certificate),
            own=SavedCertificate.of(session.own_certificate),
            stage1=session.stage1,
            stage2=session.stage2,
        )

    def encode(self) -> bytes:
        """Spell it in msgpack."""
        packed: bytes = msgpack.packb(
            (
                self.order,
                self.local_index,
                self.remote_index,
                str(self.cipher),
                self.is_initiator,
                self.peer_time_ns,
                (self.peer.version, self.peer.encoded, self.peer.public_key),
                (self.own.version, self.own.encoded, self.own.public_key),
                self.stage1,
                self.stage2,
            )
        )
        return packed

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises ValueError for anything that `encode` does not give."""
        match msgpack.unpackb(data):
            case (
                int(order),
                int(local_index),
                int(remote_index),
                str(cipher),
                bool(is_initiator),
                int(peer_time_ns),
                peer,
                own,
                bytes(stage1),
                bytes(stage2),
            ):
                return cls(
                    order=order,
                    local_index=TunnelIndex(local_index),
                    remote_index=TunnelIndex(remote_index),
                    cipher=Cipher(cipher),
                    is_initiator=is_initiator,
                    peer_time_ns=peer_time_ns,
                    peer=_certificate(peer),
                    own=_certificate(own),
                    stage1=stage1,
                    stage2=stage2,
                )
        raise ValueError("not a record of a tunnel")


class Journal:
    """The slots, for control and its successors. Attaching changes nothing."""

    def __init__(self, journal: Mapping) -> None:
        assert journal.writable
        self._rows = row_count(journal, JOURNAL_ROW, ROWS_MAX)
        self._data = journal.data
        self._words = journal.words

    def save(self, row: int, generation: int, record: Record, remote: UdpAddr) -> bool:
        """Note the tunnel in `row`, whatever the slot held; False, and nothing noted, if that is too long."""
        at, word = self._place(row)
        data = record.encode()
        self._words[word + _GENERATION] = 0
        if len(data) > RECORD_BYTES_MAX:
            return False
        self._words[word + _LENGTH] = len(data)
        self._words[word + _CHECKSUM] = _checksum(generation, data)
        self._words[word + _MOVES] = 0
        self._store_remote(at, 0, remote)
        self._data[at + _RECORD_AT : at + _RECORD_AT + len(data)] = data
        self._words[word + _GENERATION] = generation
        return True

    def move(self, row: int, generation: int, remote: UdpAddr) -> None:
        """Note another underlay address of a tunnel; nothing happens if the slot does not hold it."""
        at, word = self._place(row)
        if self._words[word + _GENERATION] == generation:
            moves = self._words[word + _MOVES] + 1
            self._store_remote(at, moves, remote)
            self._words[word + _MOVES] = moves

    def drop(self, row: int) -> None:
        """Forget what the slot holds."""
        _, word = self._place(row)
        self._words[word + _GENERATION] = 0

    def load(self, row: int, generation: int) -> tuple[Record, UdpAddr] | None:
        """What was noted of this tunnel, and its latest underlay address; None without a good record."""
        at, word = self._place(row)
        if self._words[word + _GENERATION] != generation:
            return None
        length = self._words[word + _LENGTH]
        if length > RECORD_BYTES_MAX:
            return None
        data = bytes(self._data[at + _RECORD_AT : at + _RECORD_AT + length])
        if _checksum(generation, data) != self._words[word + _CHECKSUM]:
            return None
        try:
            return Record.parse(data), self._load_remote(at, self._words[word + _MOVES])
        except ValueError:
            return None

    def _place(self, row: int) -> tuple[int, int]:
        """Where the slot of a row begins, in bytes and in words."""
        assert 0 <= row < self._rows
        at = ROWS_AT + row * JOURNAL_ROW.size
        return at, at // 8

    def _store_remote(self, at: int, moves: int, remote: UdpAddr) -> None:
        ip = remote.ip
        scope = ip.scope_id if isinstance(ip, IPv6Address) else None
        number = int(scope) if scope is not None and scope.isdecimal() else 0
        at += _REMOTES_AT[moves % 2]
        self._data[at : at + _REMOTE.size] = _REMOTE.pack(ip.packed, number, remote.port, ip.version)

    def _load_remote(self, at: int, moves: int) -> UdpAddr:
        at += _REMOTES_AT[moves % 2]
        packed, scope, port, family = _REMOTE.unpack(self._data[at : at + _REMOTE.size])
        ip: IPAddress
        match family:
            case 4:
                ip = IPv4Address(packed[:4])
            case 6:
                ip = IPv6Address(packed)
                if scope:
                    ip = IPv6Address(f"{ip}%{scope}")
            case _:
                raise ValueError(f"{family} is no address family")
        return UdpAddr(ip, port)


def _checksum(generation: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(generation.to_bytes(8, "little")))


def _certificate(packed: Any) -> SavedCertificate:
    match packed:
        case (int(version), bytes(encoded), bytes(public_key)):
            return SavedCertificate(CertVersion(version), encoded, public_key)
    raise ValueError("not a certificate")
