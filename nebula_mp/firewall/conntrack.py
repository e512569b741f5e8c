"""Flows already allowed, and when they expire.

Data flow: firewall.rules -> [firewall.conntrack] -> firewall.rules
Knows how long a flow may rest and which one makes room when the table is full; knows nothing of rules,
peers or packets. There is no TCP state: a flow lives from its packets alone, as in Nebula.
Source: docs/wire-format.md, "Firewall"; slackhq/nebula, firewall.go.
"""

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Final

from nebula_mp.config.model import ConntrackConfig
from nebula_mp.newtypes import Seconds
from nebula_mp.wire.ip import TCP, UDP, FlowKey

CAPACITY: Final = 131072
"""Flows held at most: about 50 MB when full."""

IDLE_AFTER: Final = Seconds(1)
"""A flow without a packet for this long may make room for another one."""

_LOOKS: Final = 8  # flows of each table that are looked at for one that makes room


class Direction(Enum):
    """Which way a packet goes, and so whose rules apply: INBOUND is from the tunnel to the local stack."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


class Flow:
    """One allowed flow. Mutable for speed: a packet of a known flow writes `seen` and nothing else."""

    __slots__ = ("direction", "rules_version", "seen")

    def __init__(self, direction: Direction, rules_version: int, seen: Seconds) -> None:
        self.direction = direction  # of the packet that a rule allowed
        self.rules_version = rules_version  # of the rules that allowed it
        self.seen = seen  # when its latest packet passed


class Conntrack:
    """Allowed flows by key, at most `capacity`; `now` must never go backwards.

    When full, `add` first drops flows that have expired. Otherwise the one that has been idle for longest
    goes, and TCP only if nothing else is idle; if no flow is idle at all, the one whose latest packet is
    oldest goes.

    `last_seen` gives the latest packet of a flow whose packets pass elsewhere, None if it knows nothing of
    the flow. It is asked before a flow is dropped.
    """

    def __init__(
        self,
        timeouts: ConntrackConfig,
        capacity: int = CAPACITY,
        last_seen: Callable[[FlowKey], Seconds | None] = lambda _: None,
    ) -> None:
        assert capacity > 0
        self._last_seen = last_seen
        self.evicted = 0
        """Flows that made room before they expired; only grows."""
        self._capacity = capacity
        # One table for each timeout, ordered by the latest packet: the first of a table expires first.
        self._tcp: OrderedDict[FlowKey, Flow] = OrderedDict()
        self._udp: OrderedDict[FlowKey, Flow] = OrderedDict()
        self._other: OrderedDict[FlowKey, Flow] = OrderedDict()
        self._load(timeouts)

    def __len__(self) -> int:
        """Flows held, those included that have expired and were not met again since."""
        return len(self._tcp) + len(self._udp) + len(self._other)

    def set_timeouts(self, timeouts: ConntrackConfig, now: Seconds) -> None:
        """Give every flow that is still alive these timeouts, counted from its latest packet."""
        for table, timeout in self._tables():  # by the old timeouts: a longer one must not bring a flow back
            rested = [(key, flow) for key, flow in table.items() if now - flow.seen >= timeout]
            for key, flow in rested:
                if now - self._refreshed(key, flow) >= timeout:
                    del table[key]
        self._load(timeouts)

    def get(self, key: FlowKey, now: Seconds) -> Flow | None:
        """Look a flow up for a packet that arrived `now`, which keeps it alive; None if it is not allowed."""
        protocol = key.protocol
        if protocol == TCP:
            table, timeout = self._tcp, self._tcp_timeout
        elif protocol == UDP:
            table, timeout = self._udp, self._udp_timeout
        else:
            table, timeout = self._other, self._default_timeout
        flow = table.get(key)
        if flow is None:
            return None
        if now - flow.seen >= timeout and now - self._refreshed(key, flow) >= timeout:
            del table[key]
            return None
        flow.seen = now
        table.move_to_end(key)
        return flow

    def add(self, key: FlowKey, direction: Direction, rules_version: int, now: Seconds) -> None:
        """Remember an allowed flow; replaces one with the same key. Makes room if the table is full."""
        self._drop_expired(now)
        table = self._table(key)
        if key in table:
            del table[key]
        elif len(self) >= self._capacity:
            self._evict(now)
        table[key] = Flow(direction, rules_version, now)

    def touch(self, key: FlowKey, seen: Seconds) -> None:
        """Say that a flow, if it is known, had a packet at that time."""
        flow = self._table(key).get(key)
        if flow is not None:
            flow.seen = max(flow.seen, seen)

    def direction(self, key: FlowKey) -> Direction:
        """Which way the packet went that a rule allowed, of a flow that is there."""
        return self._table(key)[key].direction

    def remove(self, key: FlowKey) -> None:
        """Forget a flow that is there."""
        del self._table(key)[key]

    def clear(self) -> None:
        """Forget every flow."""
        for table in (self._tcp, self._udp, self._other):
            table.clear()

    def _load(self, timeouts: ConntrackConfig) -> None:
        self._tcp_timeout = timeouts.tcp_timeout
        self._udp_timeout = timeouts.udp_timeout
        self._default_timeout = timeouts.default_timeout

    def _table(self, key: FlowKey) -> OrderedDict[FlowKey, Flow]:
        return self._tcp if key.protocol == TCP else self._udp if key.protocol == UDP else self._other

    def _tables(self) -> tuple[tuple[OrderedDict[FlowKey, Flow], Seconds], ...]:
        return (
            (self._tcp, self._tcp_timeout),
            (self._udp, self._udp_timeout),
            (self._other, self._default_timeout),
        )

    def _drop_expired(self, now: Seconds) -> None:
        """Drop at most one flow of each table, so that no packet pays for many."""
        for table, timeout in self._tables():
            if not table:
                continue
            key = next(iter(table))
            flow = table[key]
            if now - flow.seen < timeout:
                continue
            if now - self._refreshed(key, flow) >= timeout:
                del table[key]
            else:  # its place by age is only nearly the last, which costs another look at worst
                table.move_to_end(key)

    def _evict(self, now: Seconds) -> None:
        """Drop one flow of a table without expired ones."""
        others = [table for table in (self._udp, self._other) if table]
        for table in (self._tcp, *others):
            self._bring_idle_forward(table)
        victim = min(others, key=lambda table: _oldest(table).seen, default=self._tcp)
        seen = _oldest(victim).seen
        if now - seen < IDLE_AFTER and self._tcp and _oldest(self._tcp).seen < seen:
            victim = self._tcp
        victim.popitem(last=False)
        self.evicted += 1

    def _bring_idle_forward(self, table: OrderedDict[FlowKey, Flow]) -> None:
        """Move a few flows that only look idle behind the others."""
        for _ in range(min(len(table), _LOOKS)):
            key, flow = next(iter(table.items()))
            known = flow.seen
            if self._refreshed(key, flow) == known:
                return
            table.move_to_end(key)

    def _refreshed(self, key: FlowKey, flow: Flow) -> Seconds:
        """Give the time of a flow's latest packet, wherever that passed."""
        seen = self._last_seen(key)
        if seen is not None and seen > flow.seen:
            flow.seen = seen
        return flow.seen


def _oldest(table: OrderedDict[FlowKey, Flow]) -> Flow:
    return next(iter(table.values()))
