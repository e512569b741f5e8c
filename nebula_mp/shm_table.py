"""Where every word of the shared tables lies, and who writes it.

Data flow: supervisor: [shm_table.Tables] -> descriptors -> fork -> shm_tunnels, shm_counters, shm_flows
Knows offsets, sizes and rights, not what the values mean. The accessors are in the three modules named, one
for each way of sharing: rows under a sequence number, numbers that only grow, and a hash table; together they
would be one long module with nothing in common but these layouts.
Any change here needs a new version in the region's Layout; a kernel in another language has the same offsets.
Source: docs/architecture.md, "Shared memory"; the sequence lock is that of Linux's seqlock.h.

Which process maps which region (w: also writes; the supervisor makes them all and maps none):

| region     | control | reader i              | writer i | content                                        |
|------------|---------|-----------------------|----------|------------------------------------------------|
| tunnels    | w       | reads                 | reads    | a row for each tunnel: all but its keys        |
| keys       | w       | reads                 | -        | the keys of that row                           |
| peers      | w       | reads                 | -        | current tunnel of a peer                       |
| relays     | w       | reads                 | -        | a row for each path through a relay            |
| flows[i]   | reads   | w: its own; reads all | -        | verdicts by inner addresses and ports          |
| seen[i]    | w       | w                     | -        | when each flow of flows[i] last had a packet   |
| send       | w       | w                     | -        | send counter of each tunnel                    |
| windows    | -       | w: tunnels it owns    | -        | replay window of each tunnel                   |
| spans[i]   | reads   | w: its own; reads all | -        | what worker i sealed that is not yet sent      |
| traffic[i] | reads   | w: its own            | -        | packets and bytes of each tunnel by sealer     |
| journal    | w       | -                     | -        | what control's successor must know of a tunnel |

The keys have a region of their own so that a writer, which takes the underlay address of a batch from the
tunnel's row when it sends, can map the rows and still hold no key. `traffic`, `flows` and `seen` have one
more region than there are workers: the last is control's, which seals its own messages and decides on flows.

Every region is the header of `shm`, further words of the whole table up to the end of the first page, and
then its rows. All numbers are little-endian, addresses in network order. Only pages in use cost memory.
Words of 4 bytes are stored through a view cast to "I", which is one move instruction like that of 8.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType

from nebula_mp import shm
from nebula_mp.newtypes import Entropy
from nebula_mp.shm import HEADER_WORDS, PAGE_BYTES, Layout, LockFile, Region

PeerRef = NewType("PeerRef", int)
"""u64: a peer's row, and its generation in the high half, which tells it from earlier peers of that row.

Never 0."""

ROWS_MAX: Final = 65_536
"""Tunnels, peers and relays: a row is the low half of a local index."""
WORKERS_MAX: Final = 64
BUCKETS: Final = 65_536
"""Default size of the flow table: at 131,072 flows a bucket of 7 has 2 on average and 1.5 % find it full."""
BUCKET_ROWS: Final = 7

ROWS_AT: Final = PAGE_BYTES
"""Offset of the first row in every region."""
ROWS_AT_WORD: Final = PAGE_BYTES // 8

TUNNELS: Final = Layout("tunnels", b"nmp:tunl", 2)
KEYS: Final = Layout("tunnel keys", b"nmp:keys", 1)
PEERS: Final = Layout("peers", b"nmp:peer", 1)
RELAYS: Final = Layout("relays", b"nmp:rela", 1)
FLOWS: Final = Layout("flows", b"nmp:flow", 3)
SEEN: Final = Layout("flows last seen", b"nmp:seen", 1)
SEND: Final = Layout("send counters", b"nmp:send", 1)
WINDOWS: Final = Layout("replay windows", b"nmp:wind", 1)
SPAN: Final = Layout("span", b"nmp:span", 1)
TRAFFIC: Final = Layout("traffic", b"nmp:traf", 1)
JOURNAL: Final = Layout("journal", b"nmp:jrnl", 1)


class Field(NamedTuple):
    """Part of a row, in bytes."""

    offset: int
    size: int


class Row(NamedTuple):
    """Size and parts of the rows of one region."""

    size: int
    fields: Mapping[str, Field]

    def word(self, name: str) -> int:
        """Index of a field among the row's u64."""
        offset, size = self.fields[name]
        assert offset % 8 == 0
        assert size == 8
        return offset // 8


def row_count(mapping: shm.Mapping, row: Row, most: int) -> int:
    """How many rows a region holds; RingError when it is not what its maker made it."""
    count = mapping.parameters[0]
    if not 1 <= count <= most or mapping.size_bytes != ROWS_AT + count * row.size:
        raise mapping.contradiction("number of rows", count, f"what fits {mapping.size_bytes} bytes")
    return count


def _row(size: int, *parts: tuple[str, int]) -> Row:
    fields, offset = {}, 0
    for name, length in parts:
        fields[name] = Field(offset, length)
        offset += length
    assert offset == size
    return Row(size, fields)


# Two cache lines; what a reader needs for each packet is in the first.
TUNNEL_ROW: Final = _row(
    128,
    ("sequence", 8),  # odd while control writes
    ("local_index", 4),  # the whole of it, 0 in a free row
    ("remote_index", 4),
    ("generation", 8),  # counts the tunnels this row has had; kept when it is freed
    ("peer", 8),  # PeerRef
    ("ipv4", 4),  # of the underlay address; this, port and family are one word, which a single store changes
    ("port", 2),
    ("family", 1),  # of the underlay address: 4, 6, or 0 for none
    ("spare_a", 1),
    ("ipv6", 16),
    ("state", 1),
    ("cipher", 1),
    ("owner", 2),  # the reader that has the replay window
    ("source_count", 1),  # 0..3, or 255: ask control
    ("source_families", 1),  # bit n: source n is IPv6
    ("spare_b", 2),
    ("sources", 48),  # three inner addresses the peer may send from, IPv4 padded with zeros
    ("relay", 4),  # of a terminal row of `relays`: the way while there is no underlay address; or 0
    ("spare_c", 12),
)
KEY_ROW: Final = _row(64, ("send", 32), ("receive", 32))
PEER_ROW: Final = _row(8, ("tunnel", 8))  # local index of the current tunnel or 0 | generation << 32
RELAY_ROW: Final = _row(
    32,
    ("sequence", 8),  # odd while control writes
    ("local_index", 4),  # the whole of it, 0 in a free row
    ("carrier", 4),  # local index of the tunnel through which its frames come
    ("kind", 4),  # 0 free, 1 terminal, 2 forwarding
    ("next_tunnel", 4),  # forwarding: local index of the tunnel that the frames leave through
    ("next_index", 4),  # what frames that we send are addressed to: the index that the next hop chose
    ("spare", 4),
)
SEND_ROW: Final = _row(
    64,
    ("counter", 8),  # the last one reserved
    ("generation", 8),
    ("sealers", 8),  # bit n: worker n has sealed for this tunnel
    ("spare", 40),
)
WINDOW_ROW: Final = _row(
    2112,
    ("generation", 8),
    ("spare", 48),
    ("current", 8),  # from here on the state of a crypto.replay window
    ("bits", 2048),
)
SPAN_ROW: Final = _row(
    32,
    ("generation", 8),
    ("first", 8),  # counter, or lower
    ("until", 8),  # not all sent until this many areas were released; 0 for none
    ("spare", 8),
)
TRAFFIC_ROW: Final = _row(
    64,
    ("generation", 8),
    ("packets_in", 8),
    ("bytes_in", 8),
    ("last_in_ms", 8),
    ("packets_out", 8),
    ("bytes_out", 8),
    ("last_out_ms", 8),
    ("spare", 8),
)
# Ten pages: room for two certificates and both messages of any handshake that datagrams can carry. A usual
# record has less than 1 KB, and only the first page is ever touched. See workers.journal.
JOURNAL_ROW: Final = _row(
    10 * PAGE_BYTES,
    ("generation", 8),  # of the tunnel whose record this is; 0 for none; stored last
    ("length", 8),  # of the record
    ("checksum", 8),
    ("moves", 8),  # how often the underlay address changed; its lowest bit says which one counts
    ("remote_0", 24),
    ("remote_1", 24),
    ("spare", 16),
    ("record", 10 * PAGE_BYTES - 96),
)
BUCKET: Final = _row(512, ("lock", 8), ("tags", 28), ("spare", 28), ("rows", BUCKET_ROWS * 64))
FLOW_ROW: Final = _row(
    64,
    ("sequence", 4),  # odd while control writes
    ("rules_generation", 4),
    ("local", 16),  # IPv4 padded with zeros
    ("remote", 16),
    ("local_port", 2),
    ("remote_port", 2),
    ("protocol", 1),
    ("kind", 1),  # bit 0: a fragment other than the first; bit 1: IPv6; bit 2: a pair, without ports
    ("spare", 2),
    ("peer", 8),  # PeerRef, or 0
    ("timeout_ms", 4),
    # Bits 0-1 outbound, 2-3 inbound: 0 not known, 1 allow, 2 refuse. Bits 4-5: which way the packet went
    # that a rule allowed, 0 not said, 1 outbound, 2 inbound.
    ("verdicts", 4),
)
SEEN_ROW: Final = _row(8, ("seen_ms", 8))  # slot = bucket * 7 + row; monotonic clock

# Words of whole tables, by their index among the region's u64.
RULES_GENERATION: Final = HEADER_WORDS  # control's flows; control stores it
SEEDS: Final = HEADER_WORDS + 1  # all flows, the same; 6 words, the supervisor stores them once
SEED_COUNT: Final = 6
TIMEOUTS: Final = SEEDS + SEED_COUNT  # control's flows; ms: TCP, UDP, all else; control stores them
TIMEOUT_COUNT: Final = 3
USED: Final = PAGE_BYTES // 2 // 8  # all flows; bits, by groups of buckets: its writer has put a row there
USED_COUNT: Final = PAGE_BYTES // 2 // 8
LIVE: Final = HEADER_WORDS  # span; the supervisor stores 1 when it starts the worker, 0 when it gives it up
TOUCHED: Final = HEADER_WORDS + 1  # span; its worker: no row from this one on was ever written


@dataclass(frozen=True, slots=True)
class Tables:
    """All regions of the tables, as their maker holds them, and the locks of the send counters."""

    tunnels: Region
    keys: Region
    peers: Region
    relays: Region
    flows: tuple[Region, ...]  # one for each worker, and control's
    seen: tuple[Region, ...]  # as flows
    send: Region
    windows: Region
    spans: tuple[Region, ...]  # one for each worker
    traffic: tuple[Region, ...]  # one for each worker, and control's
    journal: Region
    locks: LockFile  # lock n guards row n of `send` and of all spans

    @classmethod
    def create(
        cls, workers: int, entropy: Entropy, *, rows: int = ROWS_MAX, buckets: int = BUCKETS
    ) -> "Tables":
        """Make all regions, empty, every worker marked as live. Raises SystemCallError."""
        assert 1 <= workers <= WORKERS_MAX
        assert 1 <= rows <= ROWS_MAX
        assert buckets & (buckets - 1) == 0
        assert 1 <= buckets <= 1 << 24  # what is left of a hash beside its tag
        made: list[Region] = []

        def region(layout: Layout, row_bytes: int, count: int, name: str = "") -> Region:
            size_bytes = ROWS_AT + row_bytes * count
            made.append(Region.create(layout, size_bytes, (count,), name=name, reserve=False))
            return made[-1]

        try:
            tables = cls(
                tunnels=region(TUNNELS, TUNNEL_ROW.size, rows),
                keys=region(KEYS, KEY_ROW.size, rows),
                peers=region(PEERS, PEER_ROW.size, rows),
                relays=region(RELAYS, RELAY_ROW.size, rows),
                flows=tuple(region(FLOWS, BUCKET.size, buckets, str(each)) for each in range(workers + 1)),
                seen=tuple(
                    region(SEEN, SEEN_ROW.size, buckets * BUCKET_ROWS, str(each))
                    for each in range(workers + 1)
                ),
                send=region(SEND, SEND_ROW.size, rows),
                windows=region(WINDOWS, WINDOW_ROW.size, rows),
                spans=tuple(region(SPAN, SPAN_ROW.size, rows, str(each)) for each in range(workers)),
                traffic=tuple(
                    region(TRAFFIC, TRAFFIC_ROW.size, rows, str(each)) for each in range(workers + 1)
                ),
                journal=region(JOURNAL, JOURNAL_ROW.size, rows),
                locks=LockFile.create(),
            )
        except BaseException:
            for each in made:
                each.close()
            raise
        seeds = entropy(8 * SEED_COUNT)
        for number in range(SEED_COUNT):
            seed = int.from_bytes(seeds[8 * number : 8 * number + 8], "little")
            for flows in tables.flows:
                flows.store_word(SEEDS + number, seed)
        for worker in range(workers):
            tables.set_live(worker, live=True)
        return tables

    def set_live(self, worker: int, *, live: bool) -> None:
        """Whether what this worker sealed will still be sent: False once it was given up."""
        self.spans[worker].store_word(LIVE, int(live))

    def regions(self) -> Iterator[Region]:
        """Every region there is."""
        yield from (self.tunnels, self.keys, self.peers, self.relays, self.send, self.windows)
        yield from self.flows
        yield from self.seen
        yield from self.spans
        yield from self.traffic
        yield self.journal

    def close(self) -> None:
        """Close all descriptors."""
        for region in self.regions():
            region.close()
        if self.locks.descriptor >= 0:
            os.close(self.locks.descriptor)
            self.locks.descriptor = -1
