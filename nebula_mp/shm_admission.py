"""What a reader goes by when a flow's packet comes: the flow tables of all, and what it may admit by itself.

Data flow: shm_flows, shm_peers -> [shm_admission] -> datapath
           datapath -> [shm_admission] -> the reader's own flow table -> all readers, workers.control
Knows in which order tables are asked and what a pair of addresses allows; knows nothing of rules or packets.
Source: docs/adr/0011-readers-admit-flows.md.

Control decides, and says of pairs of addresses what holds for any flow between them. A reader writes flows
that follow from that into a table of its own: so each table has one writer, and nothing is ever locked. The
tables are asked in the order own, control's, those of the other readers.

- An ALLOW that holds, in whatever table, wins over a REFUSE: tables know nothing of each other.
- A row whose peer has no tunnel gives way to a pair whose peer has: so a flow that was admitted here follows
  an address to another peer, as control would have it.
- What neither says anything of goes to control.

Killed in the middle, a reader leaves a half-written row in its own table, which shm_flows deals with.
"""

from collections.abc import Sequence
from typing import Final

from nebula_mp.shm_flows import REFUSED, FlowTable, FlowView, Pair
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import PeerRef
from nebula_mp.wire.ip import FlowKey

_NOT_OWN_MAX: Final = 16_384
_ADMITTED: Final = SLOTS["mp.flows.admitted"]
_EVICTED: Final = SLOTS["mp.flows.evicted"]


class Admission:
    """A reader's side of all flow tables."""

    def __init__(
        self,
        own: FlowTable,
        views: Sequence[FlowView],
        peers: PeerView,
        stats: StatsPage,
    ) -> None:
        """`views`: of the own table, of control's, of the other readers'."""
        self._own = own
        self._views = tuple(views)
        self._control = views[1]
        self._peers = peers
        self._stats = stats
        # Flows that the own table does not have: nobody else writes there, so it need not be asked.
        self._not_own: set[FlowKey] = set()

    def outbound(self, key: FlowKey, now_ms: int) -> PeerRef | None:
        """Whom a packet from the local stack goes to; REFUSED: drop it; None: only control knows."""
        stale = None
        is_refused = False
        for view in self._asked(key):
            peer = view.outbound(key, now_ms)
            if peer is None:
                continue
            if peer == REFUSED:
                is_refused = True
            elif self._peers.tunnel(peer) is not None:
                return peer
            elif stale is None:
                stale = peer
        if is_refused:
            return REFUSED
        pair = self._control.pair(key.local, key.remote, now_ms)
        if pair is not None and pair.outbound and self._peers.tunnel(pair.peer) is not None:
            self._admit(key, pair, now_ms, inbound=False)
            return pair.peer
        return stale

    def inbound(self, key: FlowKey, peer: PeerRef, now_ms: int) -> bool | None:
        """Whether a packet that came through a tunnel of `peer` may pass; None: only control knows."""
        is_refused = False
        for view in self._asked(key):
            verdict = view.inbound(key, peer, now_ms)
            if verdict:
                if key not in self._not_own:
                    self._settle(key, peer, view, now_ms)
                return True
            is_refused = is_refused or verdict is False
        if is_refused:
            return False
        pair = self._control.pair(key.local, key.remote, now_ms)
        if pair is not None and pair.inbound and pair.peer == peer:
            self._admit(key, pair, now_ms, inbound=True)
            return True
        return None

    def _asked(self, key: FlowKey) -> Sequence[FlowView]:
        return self._views[1:] if key in self._not_own else self._views

    def _settle(self, key: FlowKey, peer: PeerRef, found: FlowView, now_ms: int) -> None:
        """See to it that the own table, which is asked first, names no other peer than `found` did."""
        if found is self._views[0]:
            return
        named = self._own.peer(key)
        if named is None:
            if len(self._not_own) >= _NOT_OWN_MAX:
                self._not_own.clear()
            self._not_own.add(key)
        elif named != peer:
            inbound = found.origin(key, now_ms) is not False  # also where it is not said
            self._write(key, peer, self._own.rules_generation, now_ms, inbound=inbound)

    def _admit(self, key: FlowKey, pair: Pair, now_ms: int, *, inbound: bool) -> None:
        """Write down that this flow is allowed, and its origin: the one of old, if that is still allowed."""
        for view in self._views:
            began_inbound = view.origin(key, now_ms)
            if began_inbound is not None:
                if pair.inbound if began_inbound else pair.outbound:
                    inbound = began_inbound
                break
        self._write(key, pair.peer, pair.rules_generation, now_ms, inbound=inbound)

    def _write(self, key: FlowKey, peer: PeerRef, generation: int, now_ms: int, *, inbound: bool) -> None:
        timeout_ms = self._control.timeout_ms(key.protocol)
        evicted = self._own.evicted
        self._own.allow(key, peer, timeout_ms, now_ms, inbound=inbound, rules_generation=generation)
        self._not_own.discard(key)
        self._stats.add(_ADMITTED)
        if self._own.evicted != evicted:
            self._stats.add(_EVICTED)
