"""Verdicts on flows in shared memory: whoever writes a table decides once, everybody looks up.

Data flow: workers.control, shm_admission -> [FlowTable] -> memory -> [FlowView] -> shm_admission -> datapath
           datapath -> [FlowView] -> last-seen words -> [FlowTable] -> workers.control
Knows keys, verdicts and how long they hold; knows nothing of rules, of packets, or of who the peer is.
Control and each reader write a table of their own; which of them counts when is shm_admission's.
Offsets and rights: shm_table. Source: docs/architecture.md, "Shared memory".

A table of 2^k buckets of 512 bytes: a line of tags, then 7 rows of a cache line each, so a hit touches two
lines and a miss one. The bucket is given by bits 40 and up of the key's hash, the tag by its low 32 bits with
bit 0 set; tag 0 was never used. The hash is keyed at random, so that no peer can aim at one bucket. A bit in
the first page says of a group of buckets, 2 KiB at the usual size, whether any was ever written to: so who
looks into the tables of others touches nothing where there is nothing, which would take memory.

| word              | writer                      | killed there                                            |
|-------------------|-----------------------------|---------------------------------------------------------|
| used              | its writer, before the tag  | no matter: a group is looked at that has no row         |
| tag, row          | its writer, sequence odd    | the row stays odd and is a miss; the successor uses it  |
|                   |                             | for another flow, which ends with an even number        |
| sequence          | its writer, first and last  | as above                                                |
| last seen         | any reader while allowed,   | no matter                                               |
|                   | the writer before the row   |                                                         |
| lock              | nobody; for several writers | -                                                       |
| rules generation  | control, in its own table   | either all rows of before hold, or none                 |
| timeouts          | control, in its own table,  | the successor stores them before it says anything of a  |
|                   | before pairs that need them | pair                                                    |

A row holds while it has the current rules generation and its last packet (for a refusal: its insertion) is
not older than its timeout. ALLOW holds in both directions and is refreshed by packets of both. REFUSE holds
for one direction only, so that a peer's refused packet does not block the flow that we then open, and is not
refreshed. For an inbound packet the row's peer must be the tunnel's: that is the check of the source address
for flows already known. A bit of the key tells IPv4 from IPv6, since an IPv6 address may end in zeros.

Where the rules do not look at ports control adds a row for a *pair* of addresses, without ports: its verdicts
say in which directions any flow between the two may begin. It is never refreshed, so control is asked now and
then. A row that allows says its *origin* too: which way the packet went that a rule allowed. When the rules
change, a flow stays if the new ones allow it in that direction.

Not allowed, though tempting: to let REFUSE take the place of a row that allows the same key and holds, even
another peer's (whoever forges an address would cut the flow of its owner); to let a reader clear a row.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from nebula_mp.shm import Mapping
from nebula_mp.shm_table import (
    BUCKET,
    BUCKET_ROWS,
    FLOW_ROW,
    ROWS_AT,
    ROWS_AT_WORD,
    RULES_GENERATION,
    SEED_COUNT,
    SEEDS,
    SEEN_ROW,
    TIMEOUT_COUNT,
    TIMEOUTS,
    USED,
    USED_COUNT,
    PeerRef,
    row_count,
)
from nebula_mp.wire.ip import TCP, UDP, FlowKey

BUCKETS_MAX: Final = 1 << 24
REFUSAL_MS: Final = 1000
"""For so long a refusal holds."""
SEEN_STEP_MS: Final = 1000
"""Readers note a packet when the last one noted is this old, or an eighth of the timeout if that is less."""
IDLE_AFTER_MS: Final = 2000
"""A flow without a packet for this long may make room for another one; twice the precision of last-seen."""

REFUSED: Final = PeerRef(0)
"""What `FlowView.outbound` gives instead of a peer."""

_ALLOW: Final = 1
_REFUSE: Final = 2
_VERDICT: Final = 3
_INBOUND_SHIFT: Final = 2
_ALLOW_BOTH: Final = _ALLOW | _ALLOW << _INBOUND_SHIFT
_ORIGIN_SHIFT: Final = 4
_FROM_OUTBOUND: Final = 1
_FROM_INBOUND: Final = 2

_KEY = struct.Struct("<16s16sHHBB2x")
_KEY_WORDS = struct.Struct("<5Q")
_REST = struct.Struct("<QII")  # peer, timeout, verdicts
_ROW_BYTES: Final = FLOW_ROW.size
_BUCKET_BYTES: Final = BUCKET.size
_KEY_AT: Final = FLOW_ROW.fields["local"].offset
_REST_AT: Final = FLOW_ROW.fields["peer"].offset
_TAGS_AT: Final = BUCKET.fields["tags"].offset
_ROWS_IN_BUCKET_AT: Final = BUCKET.fields["rows"].offset
_FRAGMENT: Final = 1
_IPV6: Final = 2
_PAIR: Final = 4
_PROTOCOL: Final = FLOW_ROW.fields["protocol"].offset - _KEY_AT
_KIND: Final = FLOW_ROW.fields["kind"].offset - _KEY_AT

# Which row makes room for a new flow: the lowest of these, then the longest without a packet.
_DEAD, _REFUSAL, _IDLE, _IDLE_TCP, _NOT_IDLE, _NONE = range(6)
_TRIES: Final = 3  # to read a row that is being written; a miss only costs an upcall

_MISSED_MAX: Final = 1024
_NO_TAGS: Final = (0,) * BUCKET_ROWS
_GROUPS_BITS: Final = (64 * USED_COUNT).bit_length() - 1

_U32: Final = 2**32 - 1
_U64: Final = 2**64 - 1

assert _KEY_AT + _KEY.size == _REST_AT
assert _REST_AT + _REST.size == FLOW_ROW.size


class Displaced(NamedTuple):
    """A flow that was allowed and had to make room; control may go on knowing it."""

    key: FlowKey
    seen_ms: int


class Pair(NamedTuple):
    """What control says of any flow between two addresses."""

    peer: PeerRef
    outbound: bool  # flows may begin in this direction
    inbound: bool
    rules_generation: int


class _Row(NamedTuple):
    """A row as it is read back."""

    key: bytes
    rules_generation: int
    peer: int
    timeout_ms: int
    verdicts: int
    seen_ms: int

    def holds(self, rules_generation: int, now_ms: int) -> bool:
        return self.rules_generation == rules_generation and now_ms - self.seen_ms < self.timeout_ms

    @property
    def is_allowed_flow(self) -> bool:
        """Whether it is about packets that somebody may send, and not about a pair."""
        return bool(self.verdicts & _ALLOW_BOTH) and not self.key[_KIND] & _PAIR


class _Memory:
    """What both sides need: where a key's bucket is and what lies there."""

    def __init__(self, flows: Mapping, seen: Mapping, rules: Mapping | None) -> None:
        buckets = row_count(flows, BUCKET, BUCKETS_MAX)
        if buckets & (buckets - 1):
            raise flows.contradiction("number of buckets", buckets, "a power of two")
        if row_count(seen, SEEN_ROW, BUCKETS_MAX * BUCKET_ROWS) != buckets * BUCKET_ROWS:
            raise seen.contradiction("number of rows", seen.parameters[0], str(buckets * BUCKET_ROWS))
        self.mask = buckets - 1
        self.group_shift = max(0, self.mask.bit_length() - _GROUPS_BITS)
        self.words = flows.words
        self.data = flows.data
        self.rules = (rules or flows).words  # of control's table
        self.halves = flows.data.cast("I")
        self.seen = seen.words
        self.seeds = tuple(flows.words[SEEDS : SEEDS + SEED_COUNT])

    def place(self, key: bytes) -> tuple[int, int]:
        """Number of the bucket of a packed key, and its tag."""
        hashed = flow_hash(self.seeds, key)
        return hashed >> 40 & self.mask, hashed & _U32 | 1

    def used(self, bucket: int) -> tuple[int, int]:
        """Index of the word, and which of its bits, that say whether a bucket's group was ever written to."""
        group = bucket >> self.group_shift
        return USED + (group >> 6), 1 << (group & 63)

    def tags(self, bucket: int) -> Sequence[int]:
        """Tags of a bucket's rows; 0: never used."""
        word, bit = self.used(bucket)
        if not self.words[word] & bit:
            return _NO_TAGS
        at = ROWS_AT + bucket * _BUCKET_BYTES + _TAGS_AT >> 2
        return self.halves[at : at + BUCKET_ROWS].tolist()

    def find(self, bucket: int, tags: Sequence[int], tag: int, key: bytes) -> tuple[int, _Row] | None:
        """Number and content of the row of the bucket that has this packed key and is whole."""
        if tag not in tags:  # nearly every new flow
            return None
        for number, each in enumerate(tags):
            if each == tag:
                row = self.read(bucket, number)
                if row is not None and row.key == key:
                    return number, row
        return None

    def read(self, bucket: int, number: int) -> _Row | None:
        """Row of a bucket; None if it is half written."""
        at = _row_at(bucket, number)
        data = bytes(self.data[at : at + FLOW_ROW.size])
        if data[0] & 1 or self.halves[at >> 2] != int.from_bytes(data[:4], "little"):
            return None
        rules_generation = int.from_bytes(data[4:8], "little")
        peer, timeout_ms, verdicts = _REST.unpack_from(data, _REST_AT)
        seen_ms = self.seen[_seen_at(bucket, number)]
        return _Row(data[_KEY_AT:_REST_AT], rules_generation, peer, timeout_ms, verdicts, seen_ms)

    def row(self, key: bytes) -> _Row | None:
        """The whole row of a packed key."""
        bucket, tag = self.place(key)
        found = self.find(bucket, self.tags(bucket), tag, key)
        return None if found is None else found[1]


class FlowTable:
    """Its only writer's side. Attaching changes nothing and a successor just goes on."""

    def __init__(self, flows: Mapping, seen: Mapping, *, rules: Mapping | None = None) -> None:
        """`rules` is control's table, where this is not it."""
        assert flows.writable
        assert seen.writable
        self.evicted = 0
        """Flows that were allowed and made room before they expired; only grows."""
        self._memory = _Memory(flows, seen, rules)

    @property
    def rules_generation(self) -> int:
        """Rows of another generation do not hold. 0 until `set_rules_generation`."""
        return self._memory.rules[RULES_GENERATION]

    def set_rules_generation(self, generation: int) -> None:
        """End all rows at once: u32, never one that was in use before. Control only."""
        assert 0 < generation <= _U32
        self._memory.rules[RULES_GENERATION] = generation

    def set_timeouts(self, tcp_ms: int, udp_ms: int, other_ms: int) -> None:
        """For so long readers let the flows rest that pairs allow; before the first pair. Control only."""
        for word, timeout_ms in enumerate((tcp_ms, udp_ms, other_ms), TIMEOUTS):
            self._memory.rules[word] = min(timeout_ms, _U32)

    def allow(
        self,
        key: FlowKey,
        peer: PeerRef,
        timeout_ms: int,
        now_ms: int,
        *,
        inbound: bool | None = None,
        rules_generation: int | None = None,
    ) -> Displaced | None:
        """Allow a flow both ways, from its insertion or latest packet for `timeout_ms`.

        `peer` is whose packets these are: outbound ones go to it, inbound ones must come from it. `inbound`:
        the origin. `rules_generation`: the one that allows it, by default the one there is. Gives the allowed
        flow that had to make room, if any.
        """
        origin = 0 if inbound is None else _FROM_INBOUND if inbound else _FROM_OUTBOUND
        rest = _REST.pack(peer, min(timeout_ms, _U32), _ALLOW_BOTH | origin << _ORIGIN_SHIFT)
        return self._store(pack_key(key), rest, now_ms, rules_generation)

    def allow_pair(
        self, local: bytes, remote: bytes, pair: Pair, life_ms: int, now_ms: int
    ) -> Displaced | None:
        """Let readers allow flows between two addresses for `life_ms`, by the rules there are.

        Gives the allowed flow that had to make room, if any.
        """
        verdicts = _ALLOW * pair.outbound | (_ALLOW * pair.inbound) << _INBOUND_SHIFT
        return self._store(pack_pair(local, remote), _REST.pack(pair.peer, life_ms, verdicts), now_ms)

    def remove_pair(self, local: bytes, remote: bytes, peer: PeerRef) -> bool:
        """Forget a pair; False if it is not there, or another peer's by now."""
        packed = pack_pair(local, remote)
        row = self._memory.row(packed)
        return row is not None and row.peer == peer and self._remove(packed)

    def peer(self, key: FlowKey) -> PeerRef | None:
        """Whose packets a flow's are, whether or not its row holds; None if it is not there."""
        row = self._memory.row(pack_key(key))
        return None if row is None else PeerRef(row.peer)

    def refuse(self, key: FlowKey, peer: PeerRef, now_ms: int, *, inbound: bool) -> Displaced | None:
        """Refuse a flow in one direction for a second, unless a row that holds allows it.

        `peer` as in `allow`; REFUSED, which is no peer, for outbound packets that nobody would take. Gives
        the allowed flow that had to make room, if any.
        """
        packed = pack_key(key)
        verdicts = _REFUSE << _INBOUND_SHIFT if inbound else _REFUSE
        row = self._memory.row(packed)
        if row is not None and row.holds(self.rules_generation, now_ms):
            if row.verdicts & _ALLOW_BOTH:
                return None
            if row.peer == peer:
                verdicts |= row.verdicts
        return self._store(packed, _REST.pack(peer, REFUSAL_MS, verdicts), now_ms)

    def remove(self, key: FlowKey) -> bool:
        """Forget a flow; False if it is not there."""
        return self._remove(pack_key(key))

    def _remove(self, packed: bytes) -> bool:
        bucket, tag = self._memory.place(packed)
        found = self._memory.find(bucket, self._memory.tags(bucket), tag, packed)
        if found is None:
            return False
        number, _ = found
        half = _row_at(bucket, number) // 4
        sequence = self._memory.halves[half] | 1
        self._memory.halves[half] = sequence
        self._memory.halves[_tag_at(bucket, number)] = 0
        self._memory.halves[half] = sequence + 1 & _U32
        return True

    def seen_ms(self, key: FlowKey) -> int | None:
        """When this flow last had a packet or was inserted; None if it is not there. Up to a step late."""
        row = self._memory.row(pack_key(key))
        return None if row is None else row.seen_ms

    def _store(
        self, key: bytes, rest: bytes, now_ms: int, rules_generation: int | None = None
    ) -> Displaced | None:
        memory = self._memory
        bucket, tag = memory.place(key)
        tags = memory.tags(bucket)
        found = memory.find(bucket, tags, tag, key)
        number, displaced = self._make_room(bucket, tags, now_ms) if found is None else (found[0], None)
        word, bit = memory.used(bucket)
        memory.words[word] |= bit
        at = _row_at(bucket, number)
        half = at >> 2
        # `| 1` takes over a row that a predecessor left half written.
        sequence = memory.halves[half] | 1
        memory.halves[half] = sequence
        memory.halves[_tag_at(bucket, number)] = tag
        memory.seen[_seen_at(bucket, number)] = now_ms
        if rules_generation is None:
            rules_generation = memory.rules[RULES_GENERATION]
        memory.halves[half + 1] = rules_generation & _U32
        memory.data[at + _KEY_AT : at + _ROW_BYTES] = key + rest
        memory.halves[half] = sequence + 1 & _U32
        return displaced

    def _make_room(self, bucket: int, tags: Sequence[int], now_ms: int) -> tuple[int, Displaced | None]:
        """Choose a row: a free one, or one that does not hold, a refusal or pair, the longest idle, TCP last.

        If no flow is idle the one goes whose latest packet is oldest.
        """
        if 0 in tags:
            return tags.index(0), None
        generation = self.rules_generation
        best, best_rank, best_row = 0, (_NONE, 0), None
        for number in range(BUCKET_ROWS):
            row = self._memory.read(bucket, number)
            if row is None:
                return number, None
            age = now_ms - row.seen_ms
            if not row.holds(generation, now_ms):
                rank = _DEAD
            elif not row.is_allowed_flow:
                rank = _REFUSAL
            elif age < IDLE_AFTER_MS:
                rank = _NOT_IDLE
            else:
                rank = _IDLE_TCP if row.key[_PROTOCOL] == TCP else _IDLE
            if (rank, -age) < best_rank:
                best, best_rank, best_row = number, (rank, -age), row
        assert best_row is not None
        if not best_row.is_allowed_flow:
            return best, None
        if best_rank[0] != _DEAD:
            self.evicted += 1
        return best, Displaced(unpack_key(best_row.key), best_row.seen_ms)


class FlowView:
    """Anybody's side. Rows it found are remembered and recognised by their sequence number.

    A hit on a remembered row costs about 0.4 us, the first one of a flow and a miss about 2.5 us.
    """

    def __init__(
        self, flows: Mapping, seen: Mapping, remembered_max: int = 16_384, *, rules: Mapping | None = None
    ) -> None:
        """`rules` is control's table, where this is not it."""
        assert seen.writable
        self._memory = _Memory(flows, seen, rules)
        self._words = self._memory.rules
        self._halves = self._memory.halves
        self._seen = seen.words
        self._remembered: dict[FlowKey, _Remembered] = {}
        self._remembered_max = remembered_max
        # Where a flow that was not there will be: its next packet mostly finds it, and need not hash again.
        self._missed: dict[FlowKey, tuple[bytes, int, int]] = {}

    def outbound(self, key: FlowKey, now_ms: int) -> PeerRef | None:
        """Whom a packet from the local stack goes to; REFUSED: drop it; None: only control knows."""
        found = self._remembered.get(key)
        if found is None or self._halves[found[0]] != found[1]:
            found = self._find(key)
            if found is None:
                return None
        _, _, seen, rules_generation, timeout_ms, step_ms, verdicts, peer = found
        age = now_ms - self._seen[seen]
        if rules_generation != self._words[RULES_GENERATION] or age >= timeout_ms:
            return None
        verdict = verdicts & _VERDICT
        if verdict == _ALLOW:
            if age >= step_ms:
                self._seen[seen] = now_ms
            return peer
        return REFUSED if verdict == _REFUSE else None

    def inbound(self, key: FlowKey, peer: PeerRef, now_ms: int) -> bool | None:
        """Whether a packet that came through a tunnel of `peer` may pass; None: only control knows."""
        found = self._remembered.get(key)
        if found is None or self._halves[found[0]] != found[1]:
            found = self._find(key)
            if found is None:
                return None
        _, _, seen, rules_generation, timeout_ms, step_ms, verdicts, owner = found
        age = now_ms - self._seen[seen]
        if rules_generation != self._words[RULES_GENERATION] or age >= timeout_ms or owner != peer:
            return None
        verdict = verdicts >> _INBOUND_SHIFT & _VERDICT
        if verdict == _ALLOW:
            if age >= step_ms:
                self._seen[seen] = now_ms
            return True
        return False if verdict == _REFUSE else None

    def pair(self, local: bytes, remote: bytes, now_ms: int) -> Pair | None:
        """What control says of flows between these two; None: nothing that holds."""
        row = self._memory.row(pack_pair(local, remote))
        if row is None or not row.holds(self._words[RULES_GENERATION], now_ms):
            return None
        outbound = row.verdicts & _VERDICT == _ALLOW
        inbound = row.verdicts >> _INBOUND_SHIFT & _VERDICT == _ALLOW
        return Pair(PeerRef(row.peer), outbound, inbound, row.rules_generation)

    def origin(self, key: FlowKey, now_ms: int) -> bool | None:
        """Whether a flow began inbound that rules of any generation allowed; None: not known here."""
        row = self._memory.row(pack_key(key))
        if row is None or not row.is_allowed_flow or now_ms - row.seen_ms >= row.timeout_ms:
            return None
        origin = row.verdicts >> _ORIGIN_SHIFT & 3
        return None if origin not in (_FROM_INBOUND, _FROM_OUTBOUND) else origin == _FROM_INBOUND

    def timeout_ms(self, protocol: int) -> int:
        """For so long a flow of this protocol may rest that a pair allows. Of control's table only."""
        return min(self._words[TIMEOUTS + which_timeout(protocol)], _U32)

    def _find(self, key: FlowKey) -> "_Remembered | None":
        """Look the key up in the table and remember its row."""
        memory = self._memory
        place = self._missed.pop(key, None)
        if place is None:
            packed = pack_key(key)
            place = packed, *memory.place(packed)
        packed, bucket, tag = place
        tags = memory.tags(bucket)
        for number in range(BUCKET_ROWS) if tag in tags else ():
            if tags[number] != tag:
                continue
            at = _row_at(bucket, number)
            half = at // 4
            for _ in range(_TRIES):
                sequence = memory.halves[half]
                if sequence & 1:
                    break
                data = bytes(memory.data[at : at + FLOW_ROW.size])
                rules_generation = memory.halves[half + 1]
                if memory.halves[half] != sequence:
                    continue
                if data[_KEY_AT:_REST_AT] != packed:
                    break
                peer, timeout_ms, verdicts = _REST.unpack_from(data, _REST_AT)
                if len(self._remembered) >= self._remembered_max:
                    self._remembered.clear()
                self._remembered[key] = found = (
                    half,
                    sequence,
                    _seen_at(bucket, number),
                    rules_generation,
                    timeout_ms,
                    min(timeout_ms >> 3, SEEN_STEP_MS),
                    verdicts,
                    PeerRef(peer),
                )
                return found
        if len(self._missed) >= _MISSED_MAX:
            self._missed.clear()
        self._missed[key] = place
        return None


# sequence number's index among the 4-byte words, the number, last-seen's index among the words, rules
# generation, timeout, step of last-seen, verdicts, peer
_Remembered = tuple[int, int, int, int, int, int, int, PeerRef]


def which_timeout(protocol: int) -> int:
    """Give the number of the timeout of flows of this protocol among `TIMEOUTS`."""
    return 0 if protocol == TCP else 1 if protocol == UDP else TIMEOUT_COUNT - 1


def pack_key(key: FlowKey) -> bytes:
    """Give the 40 bytes that stand for a flow in the table."""
    local, remote, local_port, remote_port, protocol, fragment = key
    kind = fragment | (len(local) == 16) << 1
    return _KEY.pack(local, remote, local_port, remote_port, protocol, kind)


def pack_pair(local: bytes, remote: bytes) -> bytes:
    """Give the 40 bytes that stand for all flows between two addresses."""
    return _KEY.pack(local, remote, 0, 0, 0, _PAIR | (len(local) == 16) << 1)


def unpack_key(packed: bytes) -> FlowKey:
    """Give the flow that 40 bytes of the table stand for."""
    local, remote, local_port, remote_port, protocol, kind = _KEY.unpack(packed)
    if not kind & _IPV6:
        local, remote = local[:4], remote[:4]
    return FlowKey(local, remote, local_port, remote_port, protocol, bool(kind & _FRAGMENT))


def flow_hash(seeds: tuple[int, ...], key: bytes) -> int:
    """Hash the 40 bytes of a key, five little-endian u64, with six secret u64: three multiply-folds."""
    a, b, c, d, e = _KEY_WORDS.unpack(key)
    p, q, r, s, t, u = seeds
    # A fold is the low half of the 128-bit product xor its high half.
    local: int = (a ^ p) * (b ^ q)
    remote: int = (c ^ r) * (d ^ s)
    hashed: int = ((local ^ local >> 64 ^ e ^ t) & _U64) * ((remote ^ remote >> 64 ^ u) & _U64)
    return (hashed ^ hashed >> 64) & _U64


def _row_at(bucket: int, number: int) -> int:
    return ROWS_AT + bucket * _BUCKET_BYTES + _ROWS_IN_BUCKET_AT + number * _ROW_BYTES


def _tag_at(bucket: int, number: int) -> int:
    """Index among the 4-byte words."""
    return (ROWS_AT + bucket * _BUCKET_BYTES + _TAGS_AT >> 2) + number


def _seen_at(bucket: int, number: int) -> int:
    """Index among the words of the last-seen region."""
    return ROWS_AT_WORD + bucket * BUCKET_ROWS + number
