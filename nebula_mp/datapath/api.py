"""What every kernel does: batches between a descriptor, the shared tables and a ring.

Data flow: workers.reader: TUN -> [Sealer] -> seal ring -> [Drain] -> UDP
           workers.reader: UDP -> [Opener] -> open ring -> [Drain] -> TUN
           [Sealer] | [Opener] -> upcall ring -> `take_upcalls` -> workers.control
Knows how the parts are called, what they count and what goes up to control; decides no policy: whatever the
tables do not answer is an upcall. `datapath.python` is the reference, always there, and the specification.
Source: docs/architecture.md, "The kernel" and "The life of a packet".

Who may call what:

| part    | process that may use it                 | it alone                                             |
|---------|-----------------------------------------|------------------------------------------------------|
| Sealer  | reader i                                | reads TUN queue i, fills seal ring i                 |
| Opener  | reader i                                | reads UDP member 1 + i, fills open ring i, moves the |
|         |                                         | windows of the tunnels it owns; forwards relay       |
|         |                                         | frames into seal ring i                              |
| Upcalls | reader i; shared by its two parts       | fills upcall ring i                                  |
| Drain   | whoever has the ring's lease: reader i  | makes the system calls of that ring's areas          |
|         | or writer i                             |                                                      |
| Half    | reader i                                | uses its Sealer or Opener, and takes and drops the   |
|         |                                         | lease of its Drain                                   |
| Sources | reader i                                |                                                      |

Buffers. What is read from a descriptor stays in memory of the reader's own until it was sealed or opened into
the area being filled; an area is the producer's until it is published, and the consumer's until every system
call on it has returned. Nobody outside a kernel gets a view of either. An `Upcall` is a copy.

Waiting. No part blocks but Sources, which sleeps for as long as it is told. A Drain waits at most 1 ms (UDP)
or 10 ms (TUN) for room for a call, and after one wait in vain no more in the same call.

Errors. What a peer, a stranger or the local stack sends never raises. OSError: the descriptor is lost, which
no network can cause. RingError: shared memory contradicts us. After either the part may not be used again,
and the process ends, or makes a new one.

Relay frames. A path of the relay table says what becomes of a frame: what it holds is for us, or it goes on
through another tunnel, in a frame of its own. What is for a peer without an underlay address goes through the
path that its tunnel's row names. Each packet takes its counters by itself, one for each tunnel that it is
sealed for, and waits for no other worker. What was in a frame came from no address: it moves no peer, and
nobody is told that its index is unknown. A frame in a frame leads nowhere.

Counting. Every packet that was read is sealed or opened into a ring, handed over (upcall, another reader), or
counted under exactly one `Drop`. So over all processes, with empty rings and no process killed on the way:

    mp.tun.rx.packets + mp.udp.rx.packets
        = mp.udp.tx.packets + mp.tun.tx.packets + mp.upcalls + drops (with mp.ring.resumed)

Packets are those of hosts, whatever offloads carry them: a superpacket counts as the packets it is cut into
or was joined from, a batch of datagrams as its datagrams; bytes are theirs, without the headers of
`datapath.virtio`. What goes up or to another reader is always single and complete.

What one reader hands to another (`mp.strangers`) was counted when it came in, and is counted by its owner
when it leaves. What control hands back (`mp.strangers` of its page) had gone up, since it came before its
tunnel was known; it comes in once more, and is added on the left. What a Drain was doing when its process
died it sends again (UDP) or passes over (TUN).
"""

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple, Protocol

from nebula_mp.config.model import Offloads
from nebula_mp.errors import RingError
from nebula_mp.newtypes import Buffer, IPNetwork, Seconds, UdpAddr
from nebula_mp.shm_counters import SendCounters
from nebula_mp.shm_ring import Bell, Consumer
from nebula_mp.shm_table import WORKERS_MAX

DATAGRAM_BYTES_MAX: Final = 9001
"""The largest datagram a Nebula node reads."""

_SOURCES_REMEMBERED: Final = 1024
UPCALL_AREA_BYTES: Final = 16 * 1024
UPCALL_ENTRIES: Final = 32
"""For rings of upcalls and of strangers: any datagram fits into an area behind its record."""
UPCALL_AREAS: Final = 128
"""A pass publishes an area for as little as one packet, and so many passes may go by while control is busy:
with 32 areas, 8 of the first 40 datagrams of a new flow were lost."""
STRANGER_AREAS: Final = 8
HANDOVER_AREAS: Final = 64
"""For the ring that control fills for a reader: it must take at once what was kept for a handshake."""
CONTROL: Final = WORKERS_MAX
"""Control's number among those that fill stranger rings."""


class Drop(StrEnum):
    """Why a packet went no further; the value is the name of its counter in `shm_stats`."""

    # Datagrams, in the order in which they are checked.
    OVERSIZE = "drop.oversize"  # more than DATAGRAM_BYTES_MAX, or than fits an area
    SHORT = "drop.short"
    VERSION = "drop.version"
    TYPE = "drop.type"
    LOOPED = "drop.looped"  # came from an address inside the overlay
    UNKNOWN_INDEX = "drop.unknown_index"
    STRANGER_RING_FULL = "mp.ring.full.stranger"
    TRUNCATED = "drop.truncated"
    REPLAY = "drop.replay"
    OLD = "drop.old"  # behind the replay window
    OPEN_RING_FULL = "mp.ring.full.open"  # before it was opened: the window has not moved
    AUTH = "drop.auth"
    RELAY_INDEX = "drop.relay_index"  # an authentic relay frame, which leads nowhere
    INNER_IP = "drop.inner_ip"
    SOURCE_ADDR = "drop.source_addr"
    REFUSED_IN = "drop.firewall.incoming.no_rule"  # a refusal in the flow table, which keeps no reason
    # Packets from the TUN device.
    TUN_INNER_IP = "drop.tun.inner_ip"
    TUN_OFFLOAD = "mp.tun.drop.offload"  # the header in front of it contradicts it
    REFUSED_OUT = "drop.firewall.outgoing.no_rule"  # as above
    SEAL_RING_FULL = "mp.ring.full.seal"
    EXHAUSTED = "drop.exhausted"  # no counter: at its end, or its lock was held too long
    # Both ways to control.
    UPCALL_LIMITED = "mp.upcalls.limited"
    UPCALL_RING_FULL = "mp.ring.full.upcall"
    # Drains.
    TUN_NO_MEMORY = "mp.tun.drop.nobufs"
    TUN_REFUSED = "mp.tun.drop.refused"
    TUN_FULL = "mp.tun.drop.again"
    UDP_FULL = "udp.tx.dropped"
    UDP_UNREACHABLE = "mp.udp.drop.unreachable"
    UDP_TOO_BIG = "mp.udp.drop.toobig"
    UDP_REFUSED_LOCALLY = "mp.udp.drop.eperm"
    UDP_OTHER = "mp.udp.drop.other"


class UpcallReason(IntEnum):
    """Why control is asked, and so what the packet of an `Upcall` is.

    plain: an IP packet from the TUN device. opened: the content of an authentic message whose counter is
    marked in the window. raw: a whole datagram, of which nothing was checked but its length and type.
    """

    NEW_FLOW_OUT = 1  # plain; the flow table does not say where to
    NO_TUNNEL = 2  # plain; the flow's peer has no tunnel that could send
    NEW_FLOW_IN = 3  # opened, an IP packet; the flow table does not know it as a flow of this peer
    MESSAGE = 4  # opened; anything but an IP packet: test, lighthouse, close, control
    FIRST = 5  # opened; the first authentic message on a candidate, of any type
    MOVED = 6  # empty: an IP packet or a frame came from another address than the tunnel's, and was taken
    DATAGRAM = 7  # raw; a handshake, recv_error or punch, or a relay frame without a path or its tunnel
    UNKNOWN_INDEX = 8  # raw; there is no tunnel of this index
    RELAYED = 9  # raw, but out of an authentic relay frame; what would be one of the two above


class Arrival(NamedTuple):
    """How a datagram came."""

    source: UdpAddr | None  # None: in a relay frame
    type: int  # of the message
    subtype: int
    at_ms: int  # monotonic clock


class Upcall(NamedTuple):
    """One thing control has to decide; a copy."""

    reason: UpcallReason
    at_ms: int  # monotonic clock
    local_index: int  # the tunnel's; of RELAYED the path's, a RelayIndex; 0 for plain and other raw ones
    source: UdpAddr | None  # None for plain ones, and for what came in a relay frame
    type: int  # of the message; 0 for plain ones
    subtype: int
    packet: bytes


# A look-up takes 0.05 us, to call the enum 0.25 us.
_REASONS: Final = {int(reason): reason for reason in UpcallReason}
_RECORD = struct.Struct("<QIHBBBBxxI16s")  # time, index, port, family, reserved, type, subtype, scope, IP
RECORD_BYTES: Final = _RECORD.size
"""What a record has in front of its packet."""

assert RECORD_BYTES == 40
assert RECORD_BYTES + DATAGRAM_BYTES_MAX <= UPCALL_AREA_BYTES - 64 - 16 * UPCALL_ENTRIES


def encode_record(arrival: Arrival, local_index: int) -> bytes:
    """Spell what stands in front of a packet that came in a datagram."""
    source, kind, subtype, at_ms = arrival
    if source is None:
        return _RECORD.pack(at_ms, local_index, 0, 0, 0, kind, subtype, 0, b"")
    scope = 0
    if isinstance(source.ip, IPv6Address) and source.ip.scope_id is not None:
        scope = int(source.ip.scope_id)  # always a number: see datapath.sockaddr
    version, packed = source.ip.version, source.ip.packed
    return _RECORD.pack(at_ms, local_index, source.port, version, 0, kind, subtype, scope, packed)


def encode_plain_record(at_ms: int) -> bytes:
    """Spell what stands in front of a packet of the local stack's."""
    return _RECORD.pack(at_ms, 0, 0, 0, 0, 0, 0, 0, b"")


def parse_record(record: bytes) -> tuple[int, int, UdpAddr | None, int, int, bytes]:
    """Give time, index, source, type, subtype and packet. Raises RingError for what no reader writes."""
    if len(record) < RECORD_BYTES:
        raise RingError("upcall ring", "length of a record", len(record), f"{RECORD_BYTES} or more")
    at_ms, index, port, family, _, kind, subtype, scope, packed = _RECORD.unpack_from(record)
    source = _source(family, packed, port, scope) if family else None
    return at_ms, index, source, kind, subtype, record[RECORD_BYTES:]


@functools.lru_cache(maxsize=_SOURCES_REMEMBERED)
def _source(family: int, packed: bytes, port: int, scope: int) -> UdpAddr:
    """Where a datagram came from: the same object again for the same peer, which makes comparing faster."""
    match family:
        case 4:
            return UdpAddr(IPv4Address(packed[:4]), port)
        case 6:
            ip = IPv6Address(packed)
            return UdpAddr(IPv6Address(f"{ip}%{scope}") if scope else ip, port)
        case _:
            raise RingError("upcall ring", "address family", family, "0, 4 or 6")


def take_upcalls(ring: Consumer, budget: int) -> Iterator[Upcall]:
    """At most `budget` areas of upcalls, in order; each area is released when its last one was taken.

    `ring` was made with `segments=False`. Control only. Raises RingError for what no reader writes: drop the
    ring and have the supervisor replace reader and ring; control itself lives on.
    """
    for _ in range(min(ring.pending(), budget)):
        for entry, data in ring.entries():
            reason = _REASONS.get(entry.segment)
            if reason is None:
                raise RingError("upcall ring", "reason", entry.segment, "one of UpcallReason")
            yield Upcall(reason, *parse_record(bytes(data)))
        ring.release()


class RingFds(NamedTuple):
    """A ring's regions as this process inherited them: read-only where it may only read."""

    data: int
    state: int


class RingEnd(NamedTuple):
    """The consumer's end of a ring of a worker, as a reader or a writer is given it."""

    fds: RingFds  # state writable
    name: str  # for messages, as in `seal/0`
    locks: int  # file of the record locks; who has atomic instructions leaves it alone
    lock: int  # the lease's number in there
    holder: int | None  # this process's `shm_ring.holder_word`; None: it alone drains, and needs no lease
    rows: int  # of the tunnel table


class CounterFds(NamedTuple):
    """What control is given of the send counters, as descriptors; borrowed as in `ReaderMemory`."""

    send: int  # writable
    spans: tuple[int, ...]  # of all workers, read-only
    seal_states: tuple[int, ...]  # of all workers' seal rings, read-only
    locks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderMemory:
    """Everything of the shared memory that reader `worker` is given, as descriptors.

    Borrowed for the call that gets them: what is mapped stays mapped. Only `locks` must stay open until the
    process ends, and no other descriptor of that file may ever be closed in it (see `shm.LockFile`).
    """

    worker: int
    stats: int  # its own page, writable
    tunnels: int  # read-only
    keys: int  # read-only
    peers: int  # read-only
    relays: int  # read-only
    flows: tuple[int, ...]  # of all workers, and control's; only its own is writable
    seen: tuple[int, ...]  # as flows; writable
    send: int  # writable
    windows: int  # writable
    spans: tuple[int, ...]  # of all workers; only its own is writable
    traffic: int  # its own, writable
    locks: int
    seal_ring: RingFds  # data writable
    open_ring: RingFds  # data writable
    upcall_ring: RingFds  # data writable
    seal_states: tuple[int, ...]  # of all workers' seal rings, read-only: how far each has been sent
    strangers_in: dict[int, RingFds]  # by the reader that fills it, or CONTROL; state writable
    strangers_out: dict[int, RingFds]  # by the owner that drains it; data writable
    control_bell: int
    stranger_bells: dict[int, int]  # by the owner that they wake


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcallLimits:
    """How many upcalls a second, and at once, a reader sends; the rest is dropped and counted.

    They bound what one peer, or any number of strangers, can take of control's time.
    """

    per_tunnel: tuple[int, int] = (10_000, 1_000)
    plain: tuple[int, int] = (10_000, 1_000)  # from the local stack
    datagrams: tuple[int, int] = (5_000, 500)  # where the kernel does not steer, all handshakes are these
    # The rate bounds a flood: control answers 100 a second at most. The burst is what a peer may send on a
    # new tunnel before control has read its answer, 5 ms of 100,000 a second; a flood has it once.
    unknown: tuple[int, int] = (200, 512)
    # As unknown, but per tunnel to a relay: behind it may be a peer who makes a new tunnel as well.
    relayed: tuple[int, int] = (200, 512)
    moved: tuple[int, int] = (20, 5)  # per tunnel; only a notice, so nothing is lost


class Sealer(Protocol):
    """TUN queue -> seal ring."""

    def poll(self, budget: int) -> int:
        """Read about `budget` packets, until the queue is empty; gives how many. Publishes what it sealed.

        A superpacket is never left in part, so the last one may exceed the budget. Raises OSError, RingError.
        """

    @property
    def is_holding(self) -> bool:
        """Whether packets are held back, since another worker is too far behind or has the counter's lock.

        Then nothing more is read: poll again within a millisecond. They go after that, or are dropped if the
        lock is not given up for 50 ms.
        """

    def waiting(self) -> int:
        """Areas of the seal ring that wait: above 0 after a pass without the lease, ring the writer."""


class Opener(Protocol):
    """UDP socket and strangers of other readers -> open ring."""

    def poll(self, budget: int) -> int:
        """Take at most `budget` datagrams, until all is empty; gives how many. Publishes what it opened.

        What the kernel has joined is taken whole, so the last batch may exceed the budget. Raises OSError,
        RingError.
        """

    def waiting(self) -> int:
        """Areas of the open ring that wait: as for the Sealer."""


MORE: Final = 1
"""A pass ended with its budget: perhaps it left something that wakes nobody."""

HOLDING: Final = 2
"""The sealer holds packets back."""

FORWARDED: Final = 4
"""The opener has put relay frames into the seal ring: the other half is to see to it that they go."""

SOURCES_MAX: Final = 64


class Half(Protocol):
    """One direction of a reader: what fills a ring, and the end from which the same process may empty it."""

    def work(self, budget: int, drains: bool) -> int:  # noqa: FBT001 - called for each packet that comes alone
        """One pass; gives `MORE`, `HOLDING` and `FORWARDED`, or-ed. Raises OSError, RingError.

        `drains`: the ring is emptied too, before and after it is filled, unless the writer has the lease,
        which is counted. Without it a quarter is, of a ring that is three quarters full before. Rings the
        writer if areas are left for it. The reader's clock is read in it, before or after what was left in
        the ring is drained.
        """


class Sources(Protocol):
    """What a process sleeps on: descriptors, each a bit by its place, from 0."""

    def wait(self, limit_ms: int, heeded: int) -> int:
        """Sleep until one of `heeded` is readable, at most `limit_ms`; gives which are.

        One that has failed is among them, heeded or not. 0 after that time, or perhaps when a signal has
        come. Other threads of the process may have to wait meanwhile. Raises OSError.
        """


class Reader(Protocol):
    """A Sealer and an Opener over one set of tables."""

    @property
    def sealer(self) -> Sealer:
        """What fills the seal ring."""

    @property
    def opener(self) -> Opener:
        """What fills the open ring."""

    def outbound(self, drain: "Drain", writer: Bell) -> Half:
        """The Sealer with the consumer's end of its ring, a drain of the same kernel."""

    def inbound(self, drain: "Drain", writer: Bell) -> Half:
        """The Opener with the consumer's end of its ring, a drain of the same kernel."""

    def sweep(self) -> int:
        """Forget the keys of tunnels that changed or ended; gives how many. Call it once a second."""


class Drain(Protocol):
    """Ring -> TUN queue or UDP socket.

    One system call for each packet, or for as many of an entry as the granted offloads let one carry. An area
    is released when the last call on it has returned.
    """

    @property
    def given_up(self) -> str | None:
        """What was granted and then refused in use, and is done without from then on; None if nothing was."""

    @property
    def areas(self) -> int:
        """How many the ring has."""

    def try_take(self) -> bool:
        """Become the ring's consumer; False when the other process is. Never waits."""

    def pending(self) -> int:
        """Areas that are ready; only while we are the consumer. Raises RingError."""

    def drain(self, budget: int) -> int:
        """Empty at most `budget` areas; gives how many. As `pending`. Raises OSError, RingError."""

    def drop(self) -> bool:
        """Let the other process drain; True when areas are left: then ring its bell. Raises RingError."""


class Kernel(Protocol):
    """The whole of it. Descriptors are borrowed: they are non-blocking and stay open while a part lives."""

    name: str

    def reader(
        self,
        tun_fd: int,
        udp_fd: int,
        memory: ReaderMemory,
        *,
        overlay: tuple[IPNetwork, ...],
        clock: Callable[[], Seconds],
        limits: UpcallLimits,
        offloads: Offloads,
        poison: bool = False,
    ) -> Reader:
        """Attach as reader, or as its successor. `overlay`: datagrams from these networks have looped.

        `offloads` are those that were granted: with `offloads.tun_header` every packet of the TUN queue has a
        header of `datapath.virtio` in front; the socket has UDP_GRO on if `offloads.udp_gro`, and only then.
        `poison` overwrites released areas, for tests. Raises RingError, SystemCallError.
        """

    def drain_udp(self, end: RingEnd, udp_fd: int, *, tunnels: int, stats: int, offloads: Offloads) -> Drain:
        """Send a seal ring; `tunnels` and `stats` are the regions, read-only and writable.

        What a predecessor was sending is sent again: the receiver recognises copies. Raises RingError.
        """

    def drain_tun(self, end: RingEnd, tun_fd: int, *, stats: int, offloads: Offloads) -> Drain:
        """Write an open ring, which goes on behind the entry in progress. Raises RingError."""

    def send_counters(self, memory: CounterFds) -> SendCounters:
        """The send counters as control takes them, in the way in which readers of this kernel do.

        Raises RingError.
        """

    def sources(self, descriptors: Sequence[int]) -> Sources:
        """To sleep on; at most `SOURCES_MAX` of them, none twice."""

    def checksum(self, data: Buffer) -> int:
        """RFC 1071."""
