"""Peers, their tunnels, and which index belongs to which.

Data flow: control.handshakes -> [control.hostmap] <-> control.controller
Knows nothing of timers, of sending or of why a tunnel ends.

A tunnel is in one of two states:

| from      | event                                     | to        |
|-----------|-------------------------------------------|-----------|
| -         | we answered a stage 1                     | candidate |
| -         | our own handshake was answered            | proven    |
| candidate | its first datagram that authenticates     | proven    |
| candidate | 5 s, or a newer candidate needs its place | gone      |
| proven    | see control.liveness                      | gone      |

Stage 1 carries its certificate in clear, so anyone who saw one can send it again: answering it proves
nothing about who asked. A candidate therefore is never used for sending packets, and neither the
peer's address nor its handshake time is taken from it.
Source: docs/wire-format.md; Nebula's hostmap for the limit of tunnels and the meaning of primary.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nebula_mp.cert.model import Certificate
from nebula_mp.control.liveness import Traffic
from nebula_mp.control.plane import DataPlane
from nebula_mp.firewall.rules import PeerNetworks
from nebula_mp.handshake.machine import Completed
from nebula_mp.newtypes import (
    Buffer,
    Counter,
    Entropy,
    IPAddress,
    IPInterface,
    Seconds,
    TunnelIndex,
    UdpAddr,
)
from nebula_mp.wire.header import MessageType, encode_header

TUNNELS_PER_ADDRESS = 5
CANDIDATES_PER_HOST = 5
CANDIDATES = 4096
CANDIDATE_LIFE = Seconds(5.0)
ROWS = 65_536
"""The low 16 bits of a local index are its row, so this is the most an index can express."""

REHANDSHAKE_COUNTER = 2**34
"""A primary tunnel that has sent this many messages is replaced."""


class IndexAllocator:
    """Local indexes: a dense row in the low half, fresh random bits in the high half.

    The row addresses a tunnel table; the random half makes a stale datagram for an earlier tunnel
    of the same row miss instead of reaching its successor. `index % shares` is the index's share, which
    decides who gets the datagrams of its tunnel.
    """

    __slots__ = ("_entropy", "_free", "_in_use", "_next", "_rows", "_shares", "_taken")

    def __init__(self, entropy: Entropy, rows: int = ROWS, shares: int = 1) -> None:
        self._entropy = entropy
        self._rows = rows
        self._shares = shares
        # By `row % shares`: rows that were released, and the lowest one that was never used.
        self._free: list[list[int]] = [[] for _ in range(shares)]
        self._next = list(range(shares))
        self._taken: set[int] = set()  # rows beyond `_next` that `take` took
        self._in_use = 0

    def __len__(self) -> int:
        """How many indexes are in use."""
        return self._in_use

    def try_allocate(self, share: int = 0) -> TunnelIndex | None:
        """Give an unused index, never 0, of this share if there is one, else of another one.

        None, and nothing changed, when every row is taken.
        """
        high = 0
        while high == 0:
            high = int.from_bytes(self._entropy(2), "big")
        for number in range(self._shares):
            row = self._try_row((share + number - (high << 16)) % self._shares)
            if row is not None:
                self._in_use += 1
                return TunnelIndex(high << 16 | row)
        return None

    def take(self, index: TunnelIndex) -> None:
        """Mark an index as used that a predecessor gave out; before any was allocated here."""
        self._taken.add(index & 0xFFFF)
        self._in_use += 1

    def release(self, index: TunnelIndex) -> None:
        """Take back an index that is in use."""
        row = index & 0xFFFF
        self._in_use -= 1
        heapq.heappush(self._free[row % self._shares], row)

    def _try_row(self, remainder: int) -> int | None:
        free = self._free[remainder]
        while self._next[remainder] in self._taken:
            self._taken.discard(self._next[remainder])
            self._next[remainder] += self._shares
        if free:
            return heapq.heappop(free)
        row = self._next[remainder]
        if row >= self._rows:
            return None
        self._next[remainder] = row + self._shares
        return row


@dataclass(slots=True, eq=False)
class Tunnel:
    """One completed handshake: keys, counters and what we know about the other end."""

    session: Completed
    networks: PeerNetworks
    remote: UdpAddr
    traffic: Traffic
    proven: bool
    asked: UdpAddr | None = None  # where else the peer seems to be, and we asked for a reply
    asked_at: Seconds = Seconds(float("-inf"))
    roamed_from: UdpAddr | None = None
    roamed_at: Seconds = Seconds(float("-inf"))
    # when a hint of either kind, which nobody authenticates, last made us react
    probed_at: Seconds = Seconds(float("-inf"))  # an old stage 1
    suspected_at: Seconds = Seconds(float("-inf"))  # a recv_error
    addresses: tuple[IPAddress, ...] = field(init=False)
    """The peer's overlay addresses in certificate order, each once; the first is its identity."""

    def __post_init__(self) -> None:
        self.addresses = tuple(dict.fromkeys(self.session.peer.certificate.addresses))

    @property
    def local_index(self) -> TunnelIndex:
        """The index the peer writes into its headers."""
        return self.session.local_index

    @property
    def remote_index(self) -> TunnelIndex:
        """The index we write into ours."""
        return self.session.remote_index

    @property
    def certificate(self) -> Certificate:
        """The peer's certificate."""
        return self.session.peer.certificate

    def seal(self, counter: Counter, kind: MessageType, subtype: int, plaintext: Buffer) -> bytes:
        """Seal one message with a counter that nobody used before under this key."""
        header = encode_header(kind, subtype, self.session.remote_index, counter)
        return header + self.session.send.seal(counter, header, plaintext)


class HostMap:
    """All tunnels: proven ones under every address of the peer's certificate, candidates apart.

    The data path is told of each change.
    """

    def __init__(self, entropy: Entropy, plane: DataPlane, rows: int = ROWS) -> None:
        self.indexes = IndexAllocator(entropy, rows, plane.workers)
        self._plane = plane
        self._by_index: dict[TunnelIndex, Tunnel] = {}
        self._by_remote_index: dict[TunnelIndex, list[Tunnel]] = {}
        self._by_stage1: dict[bytes, Tunnel] = {}
        self._by_address: dict[IPAddress, list[Tunnel]] = {}  # primary first, then by age, newest first
        self._primary_packed: dict[bytes, Tunnel] = {}
        self._candidates: dict[TunnelIndex, Tunnel] = {}  # in the order they came
        self._candidates_of: dict[IPAddress, list[Tunnel]] = {}  # by identity, in the order they came

    def __len__(self) -> int:
        return len(self._by_index)

    def __iter__(self) -> Iterator[Tunnel]:
        return iter(list(self._by_index.values()))

    def by_index(self, index: int) -> Tunnel | None:
        """Find the tunnel, candidate or proven, to which we gave this local index."""
        return self._by_index.get(TunnelIndex(index))

    def by_remote_index(self, index: int) -> tuple[Tunnel, ...]:
        """Find the tunnels to whose peers we write this index; peers choose theirs independently."""
        return tuple(self._by_remote_index.get(TunnelIndex(index), ()))

    def by_stage1(self, stage1: bytes) -> Tunnel | None:
        """Find the tunnel that came from this very stage 1 (bytes behind the header)."""
        return self._by_stage1.get(stage1)

    def primary(self, address: IPAddress) -> Tunnel | None:
        """Find the proven tunnel that packets for `address` are sent through."""
        return self._primary_packed.get(address.packed)

    def primary_packed(self, address: bytes) -> Tunnel | None:
        """Do as `primary`, for the 4 or 16 bytes of an address."""
        return self._primary_packed.get(address)

    def is_primary(self, tunnel: Tunnel) -> bool:
        """Tell whether any address of the peer is reached through this tunnel."""
        return any(self._primary_packed.get(address.packed) is tunnel for address in tunnel.addresses)

    def is_first(self, tunnel: Tunnel) -> bool:
        """Tell whether the peer's identity, its first address, is reached through this tunnel."""
        return self.primary(tunnel.addresses[0]) is tunnel

    def tunnels(self, address: IPAddress) -> tuple[Tunnel, ...]:
        """List the proven tunnels of `address`, primary first."""
        return tuple(self._by_address.get(address, ()))

    def candidates(self) -> tuple[Tunnel, ...]:
        """List the tunnels that are not proven, oldest first."""
        return tuple(self._candidates.values())

    def add_candidate(self, tunnel: Tunnel) -> list[Tunnel]:
        """Take in an unproven tunnel; gives the candidates that had to go for it, oldest first.

        When its host has no place left, one from the same underlay address goes first: so a stranger who
        sends from one place cannot push out candidates that came from elsewhere.
        """
        of_host = self._candidates_of.get(tunnel.addresses[0], [])
        evicted: list[Tunnel] = []
        if len(of_host) >= CANDIDATES_PER_HOST:
            evicted = [next((other for other in of_host if other.remote == tunnel.remote), of_host[0])]
        elif len(self._candidates) >= CANDIDATES:
            evicted = [next(iter(self._candidates.values()))]
        for other in evicted:
            self.remove(other)
        self._index(tunnel)
        self._candidates[tunnel.local_index] = tunnel
        self._candidates_of.setdefault(tunnel.addresses[0], []).append(tunnel)
        return evicted

    def prove(self, tunnel: Tunnel) -> list[Tunnel]:
        """Turn a candidate into the primary tunnel; gives the surplus tunnels that were removed."""
        self._drop_candidate(tunnel)
        tunnel.proven = True
        self._plane.changed(tunnel)
        return self._install(tunnel)

    def add(self, tunnel: Tunnel) -> list[Tunnel]:
        """Take in a proven tunnel as primary; gives the surplus tunnels that were removed."""
        self._index(tunnel)
        return self._install(tunnel)

    def adopt(self, tunnel: Tunnel) -> None:
        """Take in, as primary, a proven tunnel that the data path knows from a predecessor of ours."""
        self.indexes.take(tunnel.local_index)
        self._enter(tunnel)
        for address in tunnel.addresses:
            self._by_address.setdefault(address, []).insert(0, tunnel)
            self._primary_packed[address.packed] = tunnel

    def make_primary(self, tunnel: Tunnel) -> None:
        """Send through this proven tunnel from now on, for every address of the peer."""
        for address in tunnel.addresses:
            tunnels = self._by_address[address]
            tunnels.remove(tunnel)
            tunnels.insert(0, tunnel)
            self._primary_packed[address.packed] = tunnel
        self._plane.route(tunnel.addresses[0], tunnel)

    def remove(self, tunnel: Tunnel) -> None:
        """Forget a tunnel; the next one of each address becomes primary, and its index is free."""
        del self._by_index[tunnel.local_index]
        if not tunnel.proven:
            self._drop_candidate(tunnel)
        same_index = self._by_remote_index[tunnel.remote_index]
        same_index.remove(tunnel)
        if not same_index:
            del self._by_remote_index[tunnel.remote_index]
        if self._by_stage1.get(tunnel.session.stage1) is tunnel:
            del self._by_stage1[tunnel.session.stage1]
        if tunnel.proven:
            was_first = self.is_first(tunnel)
            for address in tunnel.addresses:
                self._remove_address(address, tunnel)
            if was_first:
                self._plane.route(tunnel.addresses[0], self.primary(tunnel.addresses[0]))
        self._plane.closed(tunnel)
        self.indexes.release(tunnel.local_index)

    def _index(self, tunnel: Tunnel) -> None:
        self._plane.opened(tunnel)
        self._enter(tunnel)

    def _enter(self, tunnel: Tunnel) -> None:
        self._by_index[tunnel.local_index] = tunnel
        self._by_remote_index.setdefault(tunnel.remote_index, []).append(tunnel)
        if not tunnel.session.is_initiator:
            self._by_stage1[tunnel.session.stage1] = tunnel

    def _drop_candidate(self, tunnel: Tunnel) -> None:
        del self._candidates[tunnel.local_index]
        of_host = self._candidates_of[tunnel.addresses[0]]
        of_host.remove(tunnel)
        if not of_host:
            del self._candidates_of[tunnel.addresses[0]]

    def _install(self, tunnel: Tunnel) -> list[Tunnel]:
        surplus: list[Tunnel] = []
        for address in tunnel.addresses:
            tunnels = self._by_address.setdefault(address, [])
            tunnels.insert(0, tunnel)
            self._primary_packed[address.packed] = tunnel
            surplus += [old for old in tunnels[TUNNELS_PER_ADDRESS:] if old not in surplus]
        self._plane.route(tunnel.addresses[0], tunnel)
        for old in surplus:
            self.remove(old)
        return surplus

    def _remove_address(self, address: IPAddress, tunnel: Tunnel) -> None:
        tunnels = self._by_address[address]
        tunnels.remove(tunnel)
        if tunnels:
            self._primary_packed[address.packed] = tunnels[0]
        else:
            del self._by_address[address]
            del self._primary_packed[address.packed]


def packed_addresses(interfaces: Iterable[IPInterface]) -> frozenset[bytes]:
    """Give the addresses of certificate networks as the 4 or 16 bytes that packets carry."""
    return frozenset(interface.ip.packed for interface in interfaces)
