"""Flows are remembered, expire, and make room."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import ConntrackConfig
from nebula_mp.firewall.conntrack import CAPACITY, IDLE_AFTER, Conntrack, Direction
from nebula_mp.newtypes import Seconds
from nebula_mp.wire.ip import FlowKey

TCP, UDP, ICMP, ESP = 6, 17, 1, 50
TIMEOUTS = ConntrackConfig()  # 720, 180 and 600 seconds
T0 = Seconds(1000)


def flow(number: int, protocol: int = UDP) -> FlowKey:
    return FlowKey(b"\x0a\x01\x00\x01", b"\x0a\x01\x00\x02", 53, number, protocol, fragment=False)


def add(table: Conntrack, key: FlowKey, at: float) -> None:
    table.add(key, Direction.INBOUND, 0, Seconds(at))


def is_known(table: Conntrack, key: FlowKey, at: float) -> bool:
    return table.get(key, Seconds(at)) is not None


@pytest.mark.parametrize(("protocol", "timeout"), [(TCP, 720), (UDP, 180), (ICMP, 600), (ESP, 600)])
def test_a_flow_expires_when_it_rests_for_its_protocols_timeout(protocol: int, timeout: int) -> None:
    for rest, known in ((timeout - 0.001, True), (timeout, False)):
        table = Conntrack(TIMEOUTS)
        add(table, flow(1, protocol), T0)

        assert is_known(table, flow(1, protocol), T0 + rest) is known
        assert len(table) == known


def test_every_packet_refreshes_its_flow() -> None:
    table = Conntrack(TIMEOUTS)
    add(table, flow(1), T0)

    assert all(is_known(table, flow(1), T0 + minute * 60) for minute in range(60))
    assert not is_known(table, flow(1), T0 + 59 * 60 + 180)


def test_each_field_of_the_key_counts() -> None:
    key = FlowKey(b"\x0a\x01\x00\x01", b"\x0a\x01\x00\x02", 53, 9, UDP, fragment=False)
    table = Conntrack(TIMEOUTS)
    add(table, key, T0)

    others = [
        key._replace(local=b"\x0a\x01\x00\x03"),
        key._replace(remote=b"\x0a\x01\x00\x03"),
        key._replace(local_port=54),
        key._replace(remote_port=10),
        key._replace(protocol=TCP),
        key._replace(protocol=ESP),
        key._replace(fragment=True),
    ]

    assert is_known(table, key, T0)
    assert not any(is_known(table, other, T0) for other in others)


def test_a_flow_remembers_who_allowed_it() -> None:
    table = Conntrack(TIMEOUTS)
    table.add(flow(1), Direction.OUTBOUND, 7, T0)

    found = table.get(flow(1), T0)

    assert found is not None
    assert (found.direction, found.rules_version) == (Direction.OUTBOUND, 7)


def test_adding_a_flow_again_replaces_it() -> None:
    table = Conntrack(TIMEOUTS, capacity=1)
    table.add(flow(1), Direction.OUTBOUND, 7, T0)
    table.add(flow(1), Direction.INBOUND, 8, T0)

    found = table.get(flow(1), T0)

    assert found is not None
    assert (found.direction, found.rules_version, len(table), table.evicted) == (Direction.INBOUND, 8, 1, 0)


def test_flows_can_be_removed_singly_and_all_at_once() -> None:
    table = Conntrack(TIMEOUTS)
    keys = [flow(number, protocol) for number in range(3) for protocol in (TCP, UDP, ICMP)]
    for key in keys:
        add(table, key, T0)

    table.remove(keys[0])
    assert [is_known(table, key, T0) for key in keys] == [False] + [True] * 8

    table.clear()
    assert len(table) == 0
    assert not any(is_known(table, key, T0) for key in keys)


def test_new_timeouts_hold_for_flows_that_are_there_already() -> None:
    table = Conntrack(TIMEOUTS)
    add(table, flow(1), T0)
    add(table, flow(2), T0)

    table.set_timeouts(ConntrackConfig(udp_timeout=Seconds(10)), T0)
    assert not is_known(table, flow(1), T0 + 10)

    table.set_timeouts(ConntrackConfig(udp_timeout=Seconds(1000)), Seconds(T0 + 5))
    assert is_known(table, flow(2), T0 + 999)


def test_a_longer_timeout_does_not_bring_an_expired_flow_back() -> None:
    table = Conntrack(TIMEOUTS)
    for number in range(5):
        add(table, flow(number), T0)

    table.set_timeouts(ConntrackConfig(udp_timeout=Seconds(100_000)), Seconds(T0 + 180))

    assert not any(is_known(table, flow(number), T0 + 180) for number in range(5))


def test_the_table_holds_131072_flows_at_most() -> None:
    table = Conntrack(TIMEOUTS)
    for number in range(CAPACITY + 1000):
        add(table, flow(number), T0)

    assert CAPACITY == 131072
    assert len(table) == CAPACITY
    assert table.evicted == 1000


def test_expired_flows_go_one_by_one_and_before_any_other() -> None:
    table = Conntrack(TIMEOUTS, capacity=4)
    for at, key in enumerate([flow(1), flow(2), flow(3), flow(4, TCP)]):
        add(table, key, T0 + at)

    add(table, flow(5), T0 + 182.5)  # all three of UDP have expired

    assert table.evicted == 0
    assert len(table) == 4
    assert is_known(table, flow(4, TCP), T0 + 182.5)
    for number in range(6, 9):
        add(table, flow(number), T0 + 183)
    assert table.evicted == 1  # 1, 2 and 3 were free, then 5 went


def test_the_flow_that_is_idle_for_longest_makes_room() -> None:
    table = Conntrack(TIMEOUTS, capacity=3)
    add(table, flow(1, UDP), T0)
    add(table, flow(2, ESP), T0 + 1)
    add(table, flow(3, UDP), T0 + 2)
    assert is_known(table, flow(1, UDP), T0 + 3)  # so 2 is the oldest

    add(table, flow(4), T0 + 10)

    assert not is_known(table, flow(2, ESP), T0 + 10)
    assert is_known(table, flow(1), T0 + 10)
    assert is_known(table, flow(3), T0 + 10)
    assert table.evicted == 1


@pytest.mark.parametrize("again", ["get", "add"])
def test_a_flow_that_was_used_again_is_no_longer_the_oldest(again: str) -> None:
    table = Conntrack(TIMEOUTS, capacity=2)
    add(table, flow(1), T0)
    add(table, flow(2), T0 + 1)
    if again == "get":
        assert is_known(table, flow(1), T0 + 2)
    else:
        add(table, flow(1), T0 + 2)

    add(table, flow(3), T0 + 10)

    assert is_known(table, flow(1), T0 + 10)
    assert not is_known(table, flow(2), T0 + 10)


def test_tcp_stays_while_anything_else_is_idle() -> None:
    table = Conntrack(TIMEOUTS, capacity=3)
    add(table, flow(1, TCP), T0)
    add(table, flow(2, UDP), T0 + 500)
    add(table, flow(3, ICMP), T0 + 500)

    add(table, flow(4, TCP), T0 + 500 + IDLE_AFTER)
    add(table, flow(5, TCP), T0 + 500 + IDLE_AFTER)

    for number in (1, 4, 5):
        assert is_known(table, flow(number, TCP), T0 + 500 + IDLE_AFTER)
    assert table.evicted == 2


def test_a_flood_of_tcp_does_not_push_out_busy_flows_of_others() -> None:
    table = Conntrack(TIMEOUTS, capacity=10)
    add(table, flow(1, UDP), T0)

    for number in range(1000):
        at = T0 + number / 100
        add(table, flow(number, TCP), at)
        if number % 5 == 0:
            assert is_known(table, flow(1, UDP), at)

    assert is_known(table, flow(1, UDP), T0 + 10)


def test_without_idle_flows_the_one_with_the_oldest_packet_goes() -> None:
    table = Conntrack(TIMEOUTS, capacity=3)
    add(table, flow(1, UDP), T0 + 0.1)
    add(table, flow(2, TCP), T0)
    add(table, flow(3, UDP), T0 + 0.2)

    add(table, flow(4, TCP), T0 + 0.3)
    assert not is_known(table, flow(2, TCP), T0 + 0.3)

    add(table, flow(5, TCP), T0 + 0.4)
    assert not is_known(table, flow(1, UDP), T0 + 0.4)


def test_a_table_of_tcp_alone_gives_up_its_oldest() -> None:
    table = Conntrack(TIMEOUTS, capacity=2)
    add(table, flow(1, TCP), T0)
    add(table, flow(2, TCP), T0 + 1)

    add(table, flow(3, TCP), T0 + 1)

    assert not is_known(table, flow(1, TCP), T0 + 1)
    assert is_known(table, flow(2, TCP), T0 + 1)


@dataclass
class Oracle:
    """The same table as one dict that is searched from end to end each time."""

    capacity: int
    seen: dict[FlowKey, float] = field(default_factory=dict)

    @staticmethod
    def timeout(key: FlowKey) -> float:
        return {TCP: 720.0, UDP: 180.0}.get(key.protocol, 600.0)

    def forget_expired(self, now: float) -> None:
        self.seen = {key: at for key, at in self.seen.items() if now - at < self.timeout(key)}

    def get(self, key: FlowKey, now: float) -> bool:
        self.forget_expired(now)
        if key in self.seen:
            self.seen[key] = now
        return key in self.seen

    def victims(self, now: float) -> set[FlowKey]:
        """Whoever may go; several if their packets came at one time."""
        others = {key: at for key, at in self.seen.items() if key.protocol != TCP}
        idle = {key: at for key, at in others.items() if now - at >= IDLE_AFTER}
        candidates = idle or self.seen
        return {key for key, at in candidates.items() if at == min(candidates.values())}

    def add(self, key: FlowKey, now: float) -> set[FlowKey]:
        self.forget_expired(now)
        victims = self.victims(now) if len(self.seen) >= self.capacity and key not in self.seen else set()
        self.seen[key] = now
        return victims


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["get", "add"]),
        st.integers(0, 2),
        st.sampled_from([TCP, UDP, ICMP, ESP]),
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 30.0, 90.0, 180.0, 600.0, 720.0]),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(STEPS, st.integers(1, 8))
def test_the_table_agrees_with_a_dict(steps: list[tuple[str, int, int, float]], capacity: int) -> None:
    table, oracle = Conntrack(TIMEOUTS, capacity), Oracle(capacity)
    now, evicted = 0.0, 0
    for verb, number, protocol, wait in steps:
        now += wait
        key = flow(number, protocol)
        if verb == "get":
            assert is_known(table, key, now) is oracle.get(key, now)
        else:
            victims = oracle.add(key, now)
            add(table, key, now)
            assert len(table) <= capacity
            evicted += bool(victims)
            gone = {key for key in oracle.seen if key not in _keys(table)}
            assert gone <= victims
            assert len(gone) == bool(victims)
            for key in gone:
                del oracle.seen[key]
        assert table.evicted == evicted


def _keys(table: Conntrack) -> set[FlowKey]:
    return {*table._tcp, *table._udp, *table._other}


# Flows whose packets pass elsewhere


def test_a_flow_lives_on_packets_that_passed_elsewhere_and_ends_with_them() -> None:
    seen = {flow(1): Seconds(T0 + 100)}
    table = Conntrack(TIMEOUTS, last_seen=seen.get)
    add(table, flow(1), T0)
    add(table, flow(2), T0)

    assert is_known(table, flow(1), T0 + 200)
    assert not is_known(table, flow(2), T0 + 200)
    seen[flow(1)] = Seconds(T0 + 300)
    assert not is_known(table, flow(1), T0 + 480)


def test_new_flows_do_not_push_out_one_that_only_looks_expired() -> None:
    seen = {flow(1): Seconds(T0 + 150)}
    table = Conntrack(TIMEOUTS, last_seen=seen.get)
    add(table, flow(1), T0)
    add(table, flow(2), T0)

    for number in range(10, 20):
        add(table, flow(number), T0 + 200)

    assert len(table) == 11
    assert is_known(table, flow(1), T0 + 200)


def test_of_a_full_table_the_flow_that_is_idle_everywhere_makes_room() -> None:
    seen = {flow(1): Seconds(T0 + 10), flow(2): Seconds(T0 + 5)}
    table = Conntrack(TIMEOUTS, capacity=3, last_seen=seen.get)
    for number in (1, 2, 3):
        add(table, flow(number), T0 + number)

    add(table, flow(4), T0 + 11)

    assert [number for number in (1, 2, 3, 4) if is_known(table, flow(number), T0 + 11)] == [1, 2, 4]


def test_changed_timeouts_keep_flows_that_live_elsewhere_and_bring_none_back() -> None:
    seen = {flow(1): Seconds(T0 + 100)}
    table = Conntrack(TIMEOUTS, last_seen=seen.get)
    add(table, flow(1), T0)
    add(table, flow(2), T0)

    table.set_timeouts(ConntrackConfig(udp_timeout=Seconds(1000)), Seconds(T0 + 200))

    assert is_known(table, flow(1), T0 + 200)
    assert not is_known(table, flow(2), T0 + 200)


def test_a_flow_that_was_displaced_keeps_the_time_of_its_latest_packet() -> None:
    table = Conntrack(TIMEOUTS)
    add(table, flow(1), T0)

    table.touch(flow(1), Seconds(T0 + 100))
    table.touch(flow(1), Seconds(T0 + 50))
    table.touch(flow(9), Seconds(T0 + 50))

    assert is_known(table, flow(1), T0 + 250)
    assert not is_known(table, flow(9), T0 + 60)
