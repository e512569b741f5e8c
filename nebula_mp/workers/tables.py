"""The shared tables as the controller sees them: every tunnel, peer and verdict it decides on is published.

Data flow: control.controller -> [workers.tables] -> shm_tunnels, shm_peers, shm_flows -> readers
           control.controller -> [workers.tables] -> workers.journal -> [its successor's `recover`] -> Saved
Knows which call changes which table, and in which order, so that a kill between any two stores leaves what a
successor can go on with; decides nothing, and knows nothing of packets.
Source: docs/architecture.md, "Shared memory".

| call    | stores, one after the other                 | killed between them: the successor finds           |
|---------|---------------------------------------------|----------------------------------------------------|
| opened  | a peer's row if it has none, the tunnel's   | a row without a record, and closes it; the call    |
|         | row with its keys, its record if proven     | has not returned, so nobody was told of the tunnel |
| changed | the record or its remote, the tunnel's row  | the new record, and makes the row say the same     |
| closed  | the peer's word, the tunnel's row, the      | the tunnel as before, or a free row                |
|         | record, the peer's row                      |                                                    |
| route   | the words of other peers of that address,   | no tunnel for that address, and takes the one      |
|         | then the word of the one given              | that was proven last                               |
| settle  | see shm_flows                               | a flow that is asked for once more                 |

Not allowed, though tempting: to store the word of the new peer before those of the others (a successor would
not know which one counts); to free a peer's row before its last tunnel's (its flows would go elsewhere).
"""

import collections
import functools
import math
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pool import CaPool, VerifiedCertificate
from nebula_mp.config.model import ConntrackConfig
from nebula_mp.control.hostmap import Tunnel
from nebula_mp.control.plane import Grant, Passed, Saved
from nebula_mp.crypto.aead import Aead
from nebula_mp.errors import CertError
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.handshake.machine import Completed, SessionKeys
from nebula_mp.newtypes import Counter, Curve, Fingerprint, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import Mapping
from nebula_mp.shm_counters import Refusal, SendCounters, Traffic, TrafficTotals
from nebula_mp.shm_flows import REFUSED, Displaced, FlowTable, FlowView, Pair, which_timeout
from nebula_mp.shm_peers import PeerTable, PeerView
from nebula_mp.shm_table import (
    FLOWS,
    JOURNAL,
    KEYS,
    LIVE,
    PEERS,
    SEEN,
    SPAN,
    TRAFFIC,
    TUNNELS,
    PeerRef,
)
from nebula_mp.shm_tunnels import SOURCES_MAX, TunnelFields, TunnelState, TunnelTable
from nebula_mp.wire.header import STAGE_2_COUNTER
from nebula_mp.wire.ip import FlowKey
from nebula_mp.workers.journal import Journal, Record, SavedCertificate
from nebula_mp.workers.parts import TableFds
from nebula_mp.workers.shares import Shares

COUNTER_WAIT: Final = Seconds(0.05)
"""For so long control waits for a counter whose lock another process has, as a sealer does (its LOCK_HOLD):
that process lost its core while it had it. Who was stopped for good costs control this once for the tunnel,
not with every message: the next ones have one try."""
_STOPPED: Final = Seconds(3)  # by then the supervisor has killed it
_NAP: Final = 0.0005  # s; it may need our core
_COUNTER_TRIES: Final = 100  # with a nap after each

PAIR_LIFE_MS: Final = 30_000
"""For so long readers rely on what control said of a pair of addresses; then the next new flow asks again."""
_PAIRS_MAX: Final = 4096  # of one peer, to remember when readers were told

_NEVER: Final = Seconds(float("-inf"))
_NOTHING_PASSED: Final = Passed(0, _NEVER, 0)

Addresses = tuple[IPAddress, ...]
AddressPair = tuple[bytes, bytes]
"""Local and remote address, 4 or 16 bytes each."""


@dataclass(slots=True, eq=False)
class _Peer:
    """A row of the peer table, for as long as any tunnel names it."""

    addresses: Addresses
    ref: PeerRef
    tunnels: int = 0


@dataclass(slots=True, eq=False)
class _Open:
    """What the tables say of one tunnel."""

    peer: _Peer
    fields: TunnelFields
    generation: int
    remote: UdpAddr
    is_noted: bool  # in the journal, or too long for it
    busy_at: Seconds = _NEVER  # when a wait for its counter was last in vain


@dataclass(frozen=True, slots=True)
class _Told:
    """What readers know of a pair of addresses."""

    between: frozenset[Direction]
    again_ms: int  # when they are told again, if a flow comes up


@dataclass(frozen=True, slots=True)
class _Found:
    """A tunnel of a predecessor that can go on."""

    record: Record
    fields: TunnelFields
    remote: UdpAddr
    peer: VerifiedCertificate
    own: Certificate


class ShmPlane:
    """A control.plane.DataPlane over the shared tables; the only process that has one is control.

    Call `recover` first, whether or not there was a predecessor. `settle` after the actions of each call to
    the controller were performed.
    """

    def __init__(
        self,
        tables: TableFds,
        owners: Sequence[int],
        *,
        counters: SendCounters,
        clock: Callable[[], Seconds],
    ) -> None:
        """Attach; `owners` names the reader of each share of the local indexes.

        `counters` are those of the kernel that the readers have, `clock` is the monotonic one they use. The
        descriptors are borrowed, but `tables.locks` must stay open (see `shm.LockFile`). Raises RingError,
        SystemCallError.
        """
        self.workers: int = len(owners)
        self.stats: collections.Counter[str] = collections.Counter()
        """`mp.counter.busy`: no counter, its lock was held; `mp.counter.span`: one was taken beyond the span;
        `mp.journal.too_long`: a tunnel will not outlive us; `mp.tunnels.kept` and `.lost`: by `recover`."""
        self._clock = clock
        self._owners = tuple(owners)
        keys = Mapping(tables.keys, KEYS, writable=True)
        keys.protect()
        self._peers_memory = Mapping(tables.peers, PEERS, writable=True)
        self._spans = [
            Mapping(each, SPAN, writable=False, name=str(n)) for n, each in enumerate(tables.spans)
        ]
        last = len(tables.traffic) - 1
        traffic = [
            Mapping(each, TRAFFIC, writable=n == last, name=str(n)) for n, each in enumerate(tables.traffic)
        ]
        self._counters = counters
        self._tunnels = TunnelTable(Mapping(tables.tunnels, TUNNELS, writable=True), keys, self._counters)
        flows = [Mapping(each, FLOWS, writable=n == last, name=str(n)) for n, each in enumerate(tables.flows)]
        seen = [Mapping(each, SEEN, writable=True, name=str(n)) for n, each in enumerate(tables.seen)]
        self._flows = FlowTable(flows[last], seen[last])
        self._admitted = [FlowView(flows[n], seen[n], rules=flows[last]) for n in range(last)]
        self._journal = Journal(Mapping(tables.journal, JOURNAL, writable=True))
        self._routes = PeerView(self._peers_memory)
        self._sent = Traffic(traffic[last])
        self._totals = TrafficTotals(traffic)

        self._peer_table: PeerTable | None = None
        self._shares = Shares(self.workers)
        self._open: dict[TunnelIndex, _Open] = {}
        self._peers: dict[Addresses, _Peer] = {}
        self._peers_by_first: dict[IPAddress, list[_Peer]] = {}
        self._order = 0
        # Flow, peer, and what is granted; or which direction is refused.
        self._unsettled: list[tuple[FlowKey, PeerRef, Grant | Direction]] = []
        # What readers were told of pairs of addresses, by peer: until when it holds.
        self._pairs: dict[PeerRef, dict[AddressPair, _Told]] = {}
        self._timeouts: ConntrackConfig | None = None  # that readers were told

    # ---- shares ----

    def share_for(self, remote: UdpAddr) -> int:
        """As `DataPlane.share_for`: the one of this underlay IP, or else one with few tunnels, in turn."""
        live = [share for share, owner in enumerate(self._owners) if self._spans[owner].words[LIVE]]
        return self._shares.choose(remote.ip, live or range(self.workers))

    def set_owners(self, owners: Sequence[int]) -> None:
        """Give the tunnels of each share to another reader; there are as many shares as ever."""
        assert len(owners) == self.workers
        self._owners = tuple(owners)
        for index, known in self._open.items():
            self._publish(known, replace(known.fields, owner=self.owner(index)))

    def owner(self, index: TunnelIndex) -> int:
        """The reader that opens what comes for a tunnel of this local index, as things are."""
        return self._owners[index % self.workers]

    def queue_for(self, tunnel: Tunnel) -> int:
        """As `DataPlane.queue_for`: that of the reader that owns the tunnel."""
        return self.owner(tunnel.local_index)

    # ---- tunnels ----

    def opened(self, tunnel: Tunnel) -> None:
        """As `DataPlane.opened`; the keys go into the table and are wiped here."""
        index = tunnel.local_index
        assert index not in self._open
        peer = self._join(tunnel.addresses)
        fields = self._fields(tunnel.session, tunnel.remote, peer.ref, proven=tunnel.proven)
        keys = tunnel.session.keys
        generation = self._tunnels.open(fields, keys.send, keys.receive)
        keys.wipe()
        known = self._open[index] = _Open(peer, fields, generation, tunnel.remote, is_noted=False)
        self._shares.add(tunnel.remote.ip, index % self.workers)
        self._note(tunnel, known)

    def changed(self, tunnel: Tunnel) -> None:
        """As `DataPlane.changed`."""
        index = tunnel.local_index
        known = self._open[index]
        self._note(tunnel, known)
        fields = self._fields(tunnel.session, tunnel.remote, known.peer.ref, proven=tunnel.proven)
        self._publish(known, fields)
        if tunnel.remote.ip != known.remote.ip:
            self._shares.remove(known.remote.ip, index % self.workers)
            self._shares.add(tunnel.remote.ip, index % self.workers)
        known.remote = tunnel.remote

    def closed(self, tunnel: Tunnel) -> None:
        """As `DataPlane.closed`."""
        index = tunnel.local_index
        known = self._open.pop(index)
        if self._routes.tunnel(known.peer.ref) == index:
            self._table.set(known.peer.ref, None)
        self._tunnels.close(index)
        self._journal.drop(_row(index))
        self._leave(known.peer)
        self._shares.remove(known.remote.ip, index % self.workers)

    def route(self, peer: IPAddress, tunnel: Tunnel | None) -> None:
        """As `DataPlane.route`."""
        chosen = None if tunnel is None else self._open[tunnel.local_index].peer
        assert chosen is None or chosen.addresses[0] == peer
        for each in self._peers_by_first.get(peer, ()):
            if each is not chosen and self._routes.tunnel(each.ref) is not None:
                self._table.set(each.ref, None)
        if tunnel is not None and chosen is not None:
            self._table.set(chosen.ref, tunnel.local_index)

    # ---- counters ----

    def try_reserve(self, tunnel: Tunnel, size_bytes: int) -> Counter | None:
        """As `DataPlane.try_reserve`; waits 50 ms at most, and sends whatever another worker still holds."""
        known = self._open.get(tunnel.local_index)
        if known is None:
            return None
        row = _row(tunnel.local_index)
        start = self._clock()
        taken = self._counters.reserve(row, known.generation, 1)
        if isinstance(taken, Refusal):
            counter = self._reserve_patiently(known, row, taken, start)
            if counter is None:
                return None
        else:
            counter = taken
            known.busy_at = _NEVER
        self._sent.sent(row, known.generation, 1, size_bytes, _ms(start))
        return counter

    def _reserve_patiently(self, known: _Open, row: int, refusal: Refusal, start: Seconds) -> Counter | None:
        """Take a counter after it was refused once, at `start`."""
        regardless = False
        patience = COUNTER_WAIT if start - known.busy_at >= _STOPPED else Seconds(0)
        for _ in range(_COUNTER_TRIES):
            match refusal:
                case Refusal.BUSY if self._clock() - start < patience:
                    select.select([], [], [], _NAP)
                case Refusal.SPAN:
                    # One message of ours in a while; whoever lags behind may lose it to the peer's window.
                    self.stats["mp.counter.span"] += 1
                    regardless = True
                case _:
                    break
            counter = self._counters.reserve(row, known.generation, 1, regardless=regardless)
            if not isinstance(counter, Refusal):
                known.busy_at = _NEVER
                return counter
            refusal = counter
        if refusal is Refusal.BUSY:
            if patience:
                known.busy_at = start
            self.stats["mp.counter.busy"] += 1
        return None

    def last_counter(self, tunnel: Tunnel) -> Counter:
        """As `DataPlane.last_counter`; that of the handshake for a tunnel that is not open."""
        known = self._open.get(tunnel.local_index)
        if known is None:
            return STAGE_2_COUNTER
        last = self._counters.last(_row(tunnel.local_index), known.generation)
        return STAGE_2_COUNTER if last is None else last

    def passed(self, tunnel: Tunnel) -> Passed:
        """As `DataPlane.passed`."""
        known = self._open.get(tunnel.local_index)
        if known is None:
            return _NOTHING_PASSED
        total = self._totals.get(_row(tunnel.local_index), known.generation)
        last_in = Seconds(total.last_in_ms / 1000) if total.packets_in else _NOTHING_PASSED.last_in
        return Passed(total.packets_in, last_in, total.packets_out)

    # ---- flows ----

    def allow(self, flow: FlowKey, tunnel: Tunnel, grant: Grant, now: Seconds) -> None:  # noqa: ARG002
        """As `DataPlane.allow`, but for `settle`: until then the flow's packets go to control."""
        known = self._open.get(tunnel.local_index)
        if known is not None:
            self._unsettled.append((flow, known.peer.ref, grant))

    def refuse(
        self,
        flow: FlowKey,
        tunnel: Tunnel | None,
        direction: Direction,
        now: Seconds,  # noqa: ARG002
    ) -> None:
        """As `DataPlane.refuse`, but for `settle`. Inbound it needs a tunnel."""
        known = None if tunnel is None else self._open.get(tunnel.local_index)
        if known is None and direction is Direction.INBOUND:
            return
        self._unsettled.append((flow, REFUSED if known is None else known.peer.ref, direction))

    def settle(self, now: Seconds) -> list[tuple[FlowKey, Seconds]]:
        """Publish the verdicts since the last call, once the packets that asked for them have been sent.

        Else a later packet of such a flow could overtake them. Gives the allowed flows that had to make room,
        and when each of them had its latest packet.
        """
        unsettled, self._unsettled = self._unsettled, []
        now_ms = _ms(now)
        displaced = []
        for flow, ref, verdict in unsettled:
            if isinstance(verdict, Direction):
                inbound = verdict is Direction.INBOUND
                gone = [self._flows.refuse(flow, ref, now_ms, inbound=inbound)]
            else:
                inbound = verdict.direction is Direction.INBOUND
                timeout_ms = _timeouts_ms(verdict.timeouts)[which_timeout(flow.protocol)]
                gone = [
                    self._flows.allow(flow, ref, timeout_ms, now_ms, inbound=inbound),
                    self._tell_of_pair((flow.local, flow.remote), ref, verdict, now_ms),
                ]
            displaced += [(each.key, Seconds(each.seen_ms / 1000)) for each in gone if each is not None]
        return displaced

    def _tell_of_pair(self, pair: AddressPair, ref: PeerRef, grant: Grant, now_ms: int) -> Displaced | None:
        """Let readers admit what else is granted, unless they were told so just now."""
        if not grant.between:
            return None
        told = self._pairs.setdefault(ref, {})
        last = told.get(pair)
        if last is not None and last.between == grant.between and now_ms < last.again_ms:
            return None
        if len(told) >= _PAIRS_MAX:
            told.clear()  # they go on holding, and are told once more
        told[pair] = _Told(grant.between, now_ms + PAIR_LIFE_MS // 2)
        if grant.timeouts != self._timeouts:
            self._flows.set_timeouts(*_timeouts_ms(grant.timeouts))
            self._timeouts = grant.timeouts
        granted = Pair(
            ref,
            outbound=Direction.OUTBOUND in grant.between,
            inbound=Direction.INBOUND in grant.between,
            rules_generation=self._flows.rules_generation,
        )
        return self._flows.allow_pair(*pair, granted, PAIR_LIFE_MS, now_ms)

    def _forget_pairs(self, ref: PeerRef) -> None:
        """Have readers ask again about new flows of a peer; those that they admitted go on."""
        for pair in self._pairs.pop(ref, ()):
            self._flows.remove_pair(*pair, ref)

    def origin(self, flow: FlowKey, now: Seconds) -> Direction | None:
        """As `DataPlane.origin`."""
        for view in self._admitted:
            inbound = view.origin(flow, _ms(now))
            if inbound is not None:
                return Direction.INBOUND if inbound else Direction.OUTBOUND
        return None

    def last_seen(self, flow: FlowKey) -> Seconds | None:
        """As `DataPlane.last_seen`, of the flows that control itself allowed."""
        seen_ms = self._flows.seen_ms(flow)
        return None if seen_ms is None else Seconds(seen_ms / 1000)

    def forget_flows(self) -> None:
        """As `DataPlane.forget_flows`; what was not settled yet is forgotten too."""
        self._unsettled.clear()
        self._pairs.clear()
        self._flows.set_rules_generation(self._flows.rules_generation + 1)

    # ---- after a predecessor ----

    def recover(
        self, identity: Identity, pool: CaPool, *, alive: Callable[[], None] = lambda: None
    ) -> list[Saved]:
        """Take over the tunnels that are proven and noted, close all others; gives those taken, oldest first.

        Their keys stay where they are. A tunnel is closed if its peer's issuer is not in the pool any more,
        or the peer is blocklisted; whether a certificate is still valid in time is left to the next check of
        the tunnel. Killed inside, the next successor calls it again.

        A tunnel takes about 100 us, so thousands take long: `alive` is called after each.
        """
        assert self._peer_table is None
        if self._flows.rules_generation == 0:  # we are the first; a look at each row would cost its page
            self._peer_table = PeerTable(self._peers_memory)
            self._flows.set_rules_generation(1)
            return []
        torn = frozenset(self._tunnels.recover())
        certificates = _Certificates(identity.curve, pool)
        kept = []
        for index in list(self._tunnels):
            alive()
            found = self._find(index, certificates)
            if found is None:
                self._tunnels.close(index)
                self._journal.drop(_row(index))
                self.stats["mp.tunnels.lost"] += 1
            else:
                kept.append(found)
        kept.sort(key=lambda found: found.record.order)
        self._order = kept[-1].record.order + 1 if kept else 0
        self.stats["mp.tunnels.kept"] += len(kept)
        self._peer_table = PeerTable(self._peers_memory, {found.fields.peer for found in kept})
        sessions = []
        for found in kept:
            alive()
            sessions.append(self._adopt(found, is_torn=found.record.local_index in torn))
        primaries = self._reroute()
        return [
            Saved(session, found.remote, session.local_index in primaries)
            for session, found in zip(sessions, kept, strict=True)
        ]

    def _find(self, index: TunnelIndex, certificates: "_Certificates") -> _Found | None:
        """Put together what is known of a tunnel in the table; None if that is not enough."""
        fields = self._tunnels.fields(index)
        noted = self._journal.load(_row(index), self._tunnels.generation(index))
        if fields is None or noted is None:
            return None
        record, remote = noted
        if (record.local_index, record.remote_index) != (index, fields.remote_index):
            return None
        try:
            peer, own = certificates.peer(record.peer), certificates.parse(record.own)
        except CertError:
            return None
        return _Found(record, fields, remote, peer, own)

    def _adopt(self, found: _Found, *, is_torn: bool) -> Completed:
        """Know the tunnel as if it had been opened here, and make its row say what the journal says."""
        record = found.record
        index = record.local_index
        peer = self._join(_addresses(found.peer.certificate), found.fields.peer)
        send, receive = self._tunnels.keys(index)
        session = Completed(
            local_index=index,
            remote_index=record.remote_index,
            peer=found.peer,
            own_certificate=found.own,
            peer_time_ns=record.peer_time_ns,
            is_initiator=record.is_initiator,
            send=Aead(record.cipher, send),
            receive=Aead(record.cipher, receive),
            keys=SessionKeys(bytearray(), bytearray()),
            stage1=record.stage1,
            stage2=record.stage2,
        )
        known = self._open[index] = _Open(
            peer, found.fields, self._tunnels.generation(index), found.remote, is_noted=True
        )
        fields = self._fields(session, found.remote, peer.ref, proven=True)
        if is_torn:
            self._tunnels.update(fields)
            known.fields = fields
        self._publish(known, fields)
        self._shares.add(found.remote.ip, index % self.workers)
        return session

    def _reroute(self) -> set[TunnelIndex]:
        """See to it that each peer has exactly one tunnel in use, and one of its own; gives them all."""
        chosen: dict[IPAddress, TunnelIndex] = {}
        for index, known in self._open.items():  # the oldest first
            chosen[known.peer.addresses[0]] = index
        for peers in self._peers_by_first.values():
            for peer in peers:
                used = self._routes.tunnel(peer.ref)
                if used is not None and used in self._open and self._open[used].peer is peer:
                    chosen[peer.addresses[0]] = used
        for first, index in chosen.items():
            used_by = self._open[index].peer
            for peer in self._peers_by_first[first]:
                tunnel = index if peer is used_by else None
                if self._routes.tunnel(peer.ref) != tunnel:
                    self._table.set(peer.ref, tunnel)
        return set(chosen.values())

    # ---- parts of these ----

    @property
    def _table(self) -> PeerTable:
        assert self._peer_table is not None  # `recover` was called
        return self._peer_table

    def _fields(self, session: Completed, remote: UdpAddr, ref: PeerRef, *, proven: bool) -> TunnelFields:
        certificate = session.peer.certificate
        sources = frozenset(address.packed for address in certificate.addresses)
        is_simple = not certificate.unsafe_networks and len(sources) <= SOURCES_MAX
        return TunnelFields(
            local_index=session.local_index,
            remote_index=session.remote_index,
            state=TunnelState.PROVEN if proven else TunnelState.CANDIDATE,
            cipher=session.send.cipher,
            owner=self.owner(session.local_index),
            peer=ref,
            underlay=remote,
            sources=sources if is_simple else None,
            relay=None,  # every tunnel of ours is direct
        )

    def _publish(self, known: _Open, fields: TunnelFields) -> None:
        if fields != known.fields:
            self._tunnels.update(fields)
            known.fields = fields

    def _note(self, tunnel: Tunnel, known: _Open) -> None:
        """Bring the journal up to date; of candidates nothing is noted."""
        if not tunnel.proven:
            return
        if not known.is_noted:
            self._forget_pairs(known.peer.ref)  # its certificate may be another one, with other networks
        row = _row(tunnel.local_index)
        if known.is_noted:
            if tunnel.remote != known.remote:
                self._journal.move(row, known.generation, tunnel.remote)
            return
        record = Record.of(tunnel.session, self._order)
        self._order += 1
        known.is_noted = True
        if not self._journal.save(row, known.generation, record, tunnel.remote):
            self.stats["mp.journal.too_long"] += 1

    def _join(self, addresses: Addresses, ref: PeerRef | None = None) -> _Peer:
        """Name the peer once more; one that is not known gets `ref`, or else a row of its own."""
        peer = self._peers.get(addresses)
        if peer is None:
            if ref is None:
                ref = self._table.add()
            assert ref is not None  # there are as many rows as for tunnels
            peer = self._peers[addresses] = _Peer(addresses, ref)
            self._peers_by_first.setdefault(addresses[0], []).append(peer)
        peer.tunnels += 1
        return peer

    def _leave(self, peer: _Peer) -> None:
        peer.tunnels -= 1
        if peer.tunnels:
            return
        self._forget_pairs(peer.ref)
        self._table.remove(peer.ref)
        del self._peers[peer.addresses]
        of_first = self._peers_by_first[peer.addresses[0]]
        of_first.remove(peer)
        if not of_first:
            del self._peers_by_first[peer.addresses[0]]


class _Certificates:
    """Certificates of the journal, each of them parsed and looked up once."""

    def __init__(self, curve: Curve, pool: CaPool) -> None:
        self._curve = curve
        self._pool = pool
        self._issuers = {issuer.fingerprint: issuer for issuer in pool.authorities}
        self._parsed: dict[SavedCertificate, Certificate] = {}
        self._trusted: dict[SavedCertificate, VerifiedCertificate] = {}

    def parse(self, saved: SavedCertificate) -> Certificate:
        """Raises CertError."""
        certificate = self._parsed.get(saved)
        if certificate is None:
            certificate = self._parsed[saved] = saved.parse(self._curve)
        return certificate

    def peer(self, saved: SavedCertificate) -> VerifiedCertificate:
        """Raises CertError too when the pool would not trust it at any time."""
        peer = self._trusted.get(saved)
        if peer is None:
            certificate = self.parse(saved)
            issuer = self._issuers.get(Fingerprint(certificate.issuer))
            if issuer is None:
                raise CertError("could not find ca for the certificate")
            peer = VerifiedCertificate(certificate, issuer)
            # As at a time when it was certainly valid. Its signature was checked before it was noted.
            self._pool.recheck(peer, certificate.not_before)
            self._trusted[saved] = peer
        return peer


@functools.lru_cache(maxsize=8)
def _timeouts_ms(timeouts: ConntrackConfig) -> tuple[int, int, int]:
    tcp, udp, other = timeouts.tcp_timeout, timeouts.udp_timeout, timeouts.default_timeout
    return math.ceil(tcp * 1000), math.ceil(udp * 1000), math.ceil(other * 1000)


def _row(index: TunnelIndex) -> int:
    return index & 0xFFFF


def _ms(at: Seconds) -> int:
    return int(at * 1000)


def _addresses(certificate: Certificate) -> Addresses:
    """As `control.hostmap.Tunnel.addresses`."""
    return tuple(dict.fromkeys(certificate.addresses))
