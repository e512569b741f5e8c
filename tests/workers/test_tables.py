import fcntl
import time
from collections import Counter as Tally
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import ConntrackConfig
from nebula_mp.control.hostmap import Tunnel
from nebula_mp.control.plane import DataPlane, Grant, Passed
from nebula_mp.datapath.sealing import LOCK_HOLD
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.newtypes import Cipher, Counter, Seconds, TunnelIndex
from nebula_mp.shm_counters import SendCounters, Traffic
from nebula_mp.shm_flows import FlowTable, Pair
from nebula_mp.shm_table import (
    FLOWS,
    JOURNAL,
    KEYS,
    ROWS_AT_WORD,
    RULES_GENERATION,
    SEEN,
    SEND,
    SEND_ROW,
    SPAN,
    TIMEOUTS,
    TRAFFIC,
    PeerRef,
)
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import COUNTER_LIMIT, STAGE_2_COUNTER
from nebula_mp.wire.ip import ICMP, TCP, UDP, FlowKey
from nebula_mp.workers.journal import Journal
from nebula_mp.workers.tables import COUNTER_WAIT, PAIR_LIFE_MS, ShmPlane
from tests.support.forked import children, shared_words
from tests.support.plane_walk import Driver, Model, Reader, Walk, recovered_as
from tests.support.processes import eventually
from tests.support.sessions import (
    HERE,
    ONE,
    PKI,
    POOL,
    THERE,
    TWO,
    US,
    Clock,
    Memory,
    at,
    flows_of,
    granted,
    opened,
    peers_of,
    ref_of,
    shake,
    tunnel_of,
    view_of,
)
from tests.support.tables import read_only, writable
from tests.support.watched import Countdown, KilledError, nothing, watch

PLENTY_S = 30


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def flow(port: int = 22) -> FlowKey:
    return FlowKey(bytes([10, 42, 0, 1]), bytes([10, 42, 0, 11]), 5000, port, TCP, fragment=False)


# Tunnels.


def test_the_controller_may_be_given_the_tables_for_its_data_path(memory: Memory) -> None:
    plane: DataPlane = memory.fresh()

    assert plane.workers == 2


@pytest.mark.parametrize("cipher", Cipher)
def test_readers_see_a_tunnel_that_was_opened_and_control_has_its_keys_no_more(
    memory: Memory, cipher: Cipher
) -> None:
    plane = memory.fresh(1, 0)
    session, _ = shake(TWO, 0x7_0005, cipher=cipher)
    keys = bytes(session.keys.send), bytes(session.keys.receive)

    plane.opened(tunnel_of(session, THERE, proven=False))

    row = view_of(memory).get(0x7_0005)
    assert row is not None
    assert row.ciphers == keys
    assert (row.remote_index, row.state, row.cipher, row.owner, row.underlay) == (
        session.remote_index,
        TunnelState.CANDIDATE,
        cipher,
        0,  # the owner of share 1
        THERE,
    )
    assert row.sources == frozenset(address.packed for address in TWO.newest.addresses)
    assert (bytes(session.keys.send), bytes(session.keys.receive)) == (b"", b"")


@pytest.mark.parametrize(
    ("networks", "unsafe", "known"),
    [
        pytest.param(("10.42.0.3/16", "fd42::3/64", "fd42::4/64"), (), True, id="three addresses"),
        pytest.param(("10.42.0.3/16", *(f"fd42::{each}/64" for each in "345")), (), False, id="four"),
        pytest.param(("10.42.0.3/16",), ("172.16.0.0/12",), False, id="networks behind it"),
    ],
)
def test_where_the_packets_of_a_peer_may_come_from_is_left_to_control_if_a_row_cannot_say_it(
    memory: Memory, networks: tuple[str, ...], unsafe: tuple[str, ...], known: bool
) -> None:
    peer = PKI.identity("peer", *networks, unsafe=unsafe)

    opened(memory.fresh(), peer=peer)

    row = view_of(memory).get(0x1_0003)
    assert row is not None
    assert row.sources == (frozenset(each.packed for each in peer.newest.addresses) if known else None)


def test_a_tunnel_that_is_proven_or_moves_is_the_same_tunnel_with_another_row(memory: Memory) -> None:
    plane, view = memory.fresh(), view_of(memory)
    tunnel = opened(plane, proven=False)
    seen = []

    for proven, remote in ((False, HERE), (True, HERE), (True, THERE)):
        tunnel.proven, tunnel.remote = proven, remote
        plane.changed(tunnel)
        row = view.get(0x1_0003)
        assert row is not None
        seen.append((row.state, row.underlay, row.generation, row.ciphers == row.ciphers))

    assert seen == [
        (TunnelState.CANDIDATE, HERE, 1, True),
        (TunnelState.PROVEN, HERE, 1, True),
        (TunnelState.PROVEN, THERE, 1, True),
    ]


def test_a_change_that_changes_nothing_leaves_the_row_alone(memory: Memory) -> None:
    plane, view = memory.fresh(), view_of(memory)
    tunnel = opened(plane)
    before = view.get(0x1_0003)

    plane.changed(tunnel)

    after = view.get(0x1_0003)
    assert before is not None
    assert after is before


def test_of_a_closed_tunnel_nothing_is_left_and_its_peer_is_sent_nowhere(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    ref = ref_of(memory, tunnel)
    assert peers_of(memory).tunnel(ref) == 0x1_0003
    assert Journal(writable(memory.tables.journal, JOURNAL)).load(3, 1) is not None

    plane.closed(tunnel)

    assert view_of(memory).get(0x1_0003) is None
    assert peers_of(memory).tunnel(ref) is None
    assert bytes(read_only(memory.tables.keys, KEYS).data[4096:]) == bytes(64 * memory.rows)
    assert Journal(writable(memory.tables.journal, JOURNAL)).load(3, 1) is None
    assert plane.try_reserve(tunnel, 100) is None
    assert plane.last_counter(tunnel) == STAGE_2_COUNTER
    assert plane.passed(tunnel) == Passed(0, Seconds(float("-inf")), 0)


def test_a_tunnel_that_is_closed_while_its_peer_is_sent_through_it_is_not_asked_for_any_more(
    memory: Memory,
) -> None:
    plane = memory.fresh()
    other, used = opened(plane, 1), opened(plane, 2)
    ref = ref_of(memory, other)
    assert peers_of(memory).tunnel(ref) == 2

    plane.closed(used)

    assert peers_of(memory).tunnel(ref) is None


def test_all_tunnels_of_a_peer_share_its_row_which_is_freed_with_the_last_of_them(memory: Memory) -> None:
    plane = memory.fresh()
    first, second, other = opened(plane, 1), opened(plane, 2), opened(plane, 3, peer=TWO)
    ref = ref_of(memory, first)
    assert ref == ref_of(memory, second) != ref_of(memory, other)

    plane.closed(first)
    again = opened(plane, 4)
    assert ref_of(memory, again) == ref
    plane.closed(second)
    plane.closed(again)
    anew = opened(plane, 5)

    assert ref_of(memory, anew) != ref
    assert peers_of(memory).tunnel(ref) is None
    assert peers_of(memory).tunnel(ref_of(memory, other)) == 3


def test_a_peer_whose_certificate_has_other_addresses_is_another_row_and_only_one_is_in_use(
    memory: Memory,
) -> None:
    plane, peers = memory.fresh(), peers_of(memory)
    renewed = PKI.identity("one", "10.42.0.11/16", "fd42::11/64", key_of=ONE)
    old = opened(plane, 1)
    new = opened(plane, 2, peer=renewed)
    refs = ref_of(memory, old), ref_of(memory, new)
    routes = [[peers.tunnel(ref) for ref in refs]]

    for tunnel in (old, new, None):
        plane.route(old.addresses[0], tunnel)
        routes.append([peers.tunnel(ref) for ref in refs])

    assert routes == [[None, 2], [1, None], [None, 2], [None, None]]


walks = st.integers(0, 2**32 - 1)


@settings(max_examples=30)
@given(walks)
def test_any_walk_of_calls_leaves_the_tables_as_a_plain_model_says_and_so_does_its_recovery(
    seed: int,
) -> None:
    memory, clock = Memory(rows=16), Clock()
    driver = Driver(memory.fresh(clock=clock), clock, [])
    model = Model(rows=16, workers=2)
    walk, reader = Walk(model, seed), Reader(memory.tables)

    for _ in range(60):
        call = walk.next()
        counter = driver.make(call)
        model.apply(call)
        if call.name == "reserve":
            assert counter == model.tunnels[call.local].counter
    reader.check(model)
    for index, known in model.tunnels.items():
        assert driver.plane.last_counter(driver.tunnels[TunnelIndex(index)]) == known.counter

    recovered_as(memory, clock, model)
    memory.close()


# Shares.


def test_tunnels_of_one_underlay_ip_fall_into_one_share_whatever_their_ports(memory: Memory) -> None:
    plane = memory.fresh()

    share = plane.share_for(at("192.0.2.9", 1))

    assert share == plane.share_for(at("192.0.2.9", 2)), "two handshakes are open at once"
    tunnel = tunnel_of(shake(ONE, 0x1_0002 + share)[0], at("192.0.2.9", 1))
    plane.opened(tunnel)
    opened(plane, 0x1_0004 + share, peer=TWO)
    opened(plane, 0x1_0006 + share, peer=TWO)
    assert plane.share_for(at("192.0.2.9", 3)) == share, "though the other has less"
    plane.closed(tunnel)
    assert plane.share_for(at("192.0.2.9", 3)) != share


def test_a_tunnel_that_moves_takes_its_place_in_its_share_with_it(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = tunnel_of(shake(ONE, 0x1_0003)[0], at("192.0.2.9"))
    plane.opened(tunnel)
    others = [opened(plane, 0x1_0010 + 2 * each, peer=TWO) for each in range(2)]  # in share 0

    tunnel.remote = at("192.0.2.10")
    plane.changed(tunnel)

    assert plane.share_for(at("192.0.2.10")) == 1
    plane.closed(others[0])
    plane.closed(others[1])
    assert plane.share_for(at("192.0.2.9")) == 0


def test_new_addresses_take_turns_among_the_shares_with_the_fewest_tunnels() -> None:
    memory = Memory(workers=4)
    plane = memory.fresh()

    turns = [plane.share_for(at(f"192.0.2.{each}")) for each in range(8)]
    opened(plane, 0x1_0000 + 1)
    opened(plane, 0x1_0000 + 2, peer=TWO)
    fewest = [plane.share_for(at(f"192.0.3.{each}")) for each in range(4)]

    assert turns == [0, 1, 2, 3, 0, 1, 2, 3]
    assert fewest == [0, 3, 0, 3]
    memory.close()


def test_a_share_whose_reader_was_given_up_gets_no_new_tunnels_until_another_reader_has_it() -> None:
    memory = Memory(workers=3)
    plane = memory.fresh()
    memory.tables.set_live(1, live=False)

    without = [plane.share_for(at(f"192.0.2.{each}")) for each in range(4)]
    plane.set_owners([0, 2, 2])
    handed_over = [plane.share_for(at(f"192.0.3.{each}")) for each in range(3)]
    for worker in (0, 2):
        memory.tables.set_live(worker, live=False)
    nobody = {plane.share_for(at(f"192.0.4.{each}")) for each in range(3)}

    assert without == [0, 2, 0, 2]
    assert handed_over == [0, 1, 2]
    assert nobody == {0, 1, 2}
    memory.close()


def test_when_shares_change_hands_exactly_their_rows_do(memory: Memory) -> None:
    plane, view = memory.fresh(), view_of(memory)
    tunnels = [opened(plane, 0x1_0000 + each, peer=(ONE, TWO)[each % 2]) for each in range(4)]
    before = [view.get(each.local_index) for each in tunnels]

    plane.set_owners([0, 0])

    after = [view.get(each.local_index) for each in tunnels]
    assert [row and row.owner for row in before] == [0, 1, 0, 1]
    assert [row and row.owner for row in after] == [0, 0, 0, 0]
    assert [one is other for one, other in zip(before, after, strict=True)] == [True, False, True, False]
    assert [plane.queue_for(each) for each in tunnels] == [0, 0, 0, 0]
    opened(plane, 0x1_0005, peer=TWO)
    row = view.get(0x1_0005)
    assert row is not None
    assert row.owner == 0


# Counters.


def test_control_takes_counters_one_by_one_and_counts_what_it_sends(memory: Memory) -> None:
    plane = memory.fresh(clock=Clock(50.25))
    tunnel = opened(plane)

    taken = [plane.try_reserve(tunnel, 100 + each) for each in range(3)]

    assert taken == [3, 4, 5]
    assert plane.last_counter(tunnel) == 5
    assert plane.passed(tunnel) == Passed(0, Seconds(float("-inf")), 3)
    own = read_only(memory.tables.traffic[-1], TRAFFIC).words
    assert list(own[ROWS_AT_WORD + 24 : ROWS_AT_WORD + 32]) == [1, 0, 0, 0, 3, 303, 50_250, 0]


def test_what_passed_is_summed_over_readers_and_control_for_this_tunnel_only(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    for worker, at_ms in enumerate((7_500, 7_250)):
        traffic = Traffic(writable(memory.tables.traffic[worker], TRAFFIC))
        traffic.received(3, 1, 10, 1000, at_ms)
        traffic.sent(3, 1, 5, 500, at_ms)
        traffic.received(4, 1, 100, 1000, 9_000)
    plane.try_reserve(tunnel, 100)

    assert plane.passed(tunnel) == Passed(20, Seconds(7.5), 11)
    plane.closed(tunnel)
    assert plane.passed(opened(plane, 0x2_0003)) == Passed(0, Seconds(float("-inf")), 0)


def test_a_counter_at_its_end_is_not_given(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    words = writable(memory.tables.send, SEND).words
    words[ROWS_AT_WORD + 3 * SEND_ROW.size // 8] = COUNTER_LIMIT - 2

    taken = [plane.try_reserve(tunnel, 100) for _ in range(2)]

    assert taken == [COUNTER_LIMIT - 1, None]
    assert plane.last_counter(tunnel) == COUNTER_LIMIT - 1
    assert plane.stats == Tally()


def test_while_another_process_keeps_the_lock_of_a_counter_there_is_none_and_nobody_waits_for_long(
    memory: Memory,
) -> None:
    clock = Clock(step=0.002)
    plane = memory.fresh(clock=clock)
    tunnel = opened(plane)
    held = shared_words(1)

    def hold() -> None:
        fcntl.lockf(memory.tables.locks.descriptor, fcntl.LOCK_EX, 1, 3)
        held[0] = 1
        time.sleep(PLENTY_S)

    with children(hold):
        assert eventually(lambda: held[0] == 1, PLENTY_S)
        before = clock.now
        taken = plane.try_reserve(tunnel, 100)
        waited = clock.now - before
        stands_still = memory.plane(clock=Clock())
        stands_still.recover(US, POOL)
        assert stands_still.try_reserve(tunnel, 100) is None

    assert taken is None
    assert COUNTER_WAIT <= waited < COUNTER_WAIT + 0.01
    assert plane.stats == stands_still.stats - Tally({"mp.tunnels.kept": 1}) == {"mp.counter.busy": 1}
    assert plane.try_reserve(tunnel, 100) == 3
    assert plane.passed(tunnel).sent == 1


def test_control_waits_as_long_for_a_lock_as_a_sealer_and_once_for_who_was_stopped_with_it(
    memory: Memory,
) -> None:
    assert COUNTER_WAIT == LOCK_HOLD
    clock = Clock(step=0.002)
    plane = memory.fresh(clock=clock)
    tunnel, other = opened(plane), opened(plane, 0x1_0004)
    held = shared_words(2)

    def hold() -> None:
        fcntl.lockf(memory.tables.locks.descriptor, fcntl.LOCK_EX, 1, 3)
        held[0] = 1
        assert eventually(lambda: held[1] == 1, PLENTY_S)
        fcntl.lockf(memory.tables.locks.descriptor, fcntl.LOCK_UN, 1, 3)
        held[0] = 2
        time.sleep(PLENTY_S)

    def waited(tunnel: Tunnel) -> float:
        before = clock.now
        plane.try_reserve(tunnel, 100)
        return clock.now - before

    with children(hold):
        assert eventually(lambda: held[0] == 1, PLENTY_S)
        first, second, of_another = waited(tunnel), waited(tunnel), waited(other)
        clock.now += 3
        again = waited(tunnel)
        held[1] = 1
        assert eventually(lambda: held[0] == 2, PLENTY_S)
        assert plane.try_reserve(tunnel, 100) == 3

    assert first >= COUNTER_WAIT
    assert again >= COUNTER_WAIT
    assert second < 0.01
    assert of_another < 0.01
    assert plane.stats == {"mp.counter.busy": 3}


def test_control_does_not_wait_for_a_worker_that_has_not_sent_what_it_sealed(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    spans = [writable(memory.tables.spans[0], SPAN), read_only(memory.tables.spans[1], SPAN)]
    counters = SendCounters(writable(memory.tables.send, SEND), memory.tables.locks, spans, 0, lambda _: 0)
    assert counters.reserve(3, 1, 513, area=0) == 3

    assert plane.try_reserve(tunnel, 100) == Counter(516)
    assert plane.stats == {"mp.counter.span": 1}


# Flows.


def test_a_verdict_is_published_when_the_packet_that_asked_for_it_was_sent(memory: Memory) -> None:
    plane, view = memory.fresh(), flows_of(memory)
    tunnel = opened(plane)
    ref = ref_of(memory, tunnel)

    plane.allow(flow(1), tunnel, granted(2.0005), Seconds(10))
    plane.refuse(flow(2), tunnel, Direction.INBOUND, Seconds(10))
    plane.refuse(flow(3), tunnel, Direction.OUTBOUND, Seconds(10))
    plane.refuse(flow(4), None, Direction.OUTBOUND, Seconds(10))
    before = [view.outbound(flow(port), 10_000) for port in (1, 2, 3, 4)]
    assert plane.settle(Seconds(10)) == []

    assert before == [None] * 4
    assert [view.outbound(flow(port), 10_000) for port in (1, 2, 3, 4)] == [ref, None, 0, 0]
    assert [view.inbound(flow(port), ref, 10_000) for port in (1, 2, 3, 4)] == [True, False, None, None]
    assert [view.outbound(flow(1), at_ms) for at_ms in (12_000, 12_001)] == [ref, ref]
    assert plane.settle(Seconds(10)) == []


def test_a_flow_rests_for_no_longer_than_its_timeout_rounded_up(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)

    plane.allow(flow(), tunnel, granted(2.0005), Seconds(10))
    plane.settle(Seconds(10))

    rested = [flows_of(memory).outbound(flow(), 10_000 + each) is not None for each in (2_001, 2_000)]
    assert rested == [False, True]


def test_when_a_flow_last_had_a_packet_is_what_readers_noted(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    assert plane.last_seen(flow()) is None

    plane.allow(flow(), tunnel, granted(60), Seconds(9))
    assert plane.last_seen(flow()) is None
    plane.settle(Seconds(10))
    inserted = plane.last_seen(flow())
    assert flows_of(memory).outbound(flow(), 25_500) is not None

    assert (inserted, plane.last_seen(flow())) == (10.0, 25.5)


def test_who_had_to_make_room_is_told_when_it_happens(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    told = []

    for port in range(1, 2000):
        plane.allow(flow(port), tunnel, granted(3600), Seconds(port))
        told += plane.settle(Seconds(port))

    gone = [key for key, _ in told]
    assert len(gone) == len(set(gone)) > 1000
    assert all(seen == float(key.remote_port) for key, seen in told)
    assert all((plane.last_seen(flow(port)) is None) is (flow(port) in gone) for port in range(1, 2000))


def test_a_verdict_by_rules_that_are_gone_is_never_published(memory: Memory) -> None:
    plane, view = memory.fresh(), flows_of(memory)
    tunnel = opened(plane)
    plane.allow(flow(1), tunnel, granted(60), Seconds(10))
    plane.settle(Seconds(10))
    plane.allow(flow(2), tunnel, granted(60), Seconds(10))

    plane.forget_flows()
    plane.settle(Seconds(10))

    assert [view.outbound(flow(port), 10_000) for port in (1, 2)] == [None, None]


def test_nothing_is_published_for_a_tunnel_that_has_ended(memory: Memory) -> None:
    plane, view = memory.fresh(), flows_of(memory)
    tunnel = opened(plane)
    plane.closed(tunnel)

    plane.allow(flow(1), tunnel, granted(60), Seconds(10))
    plane.refuse(flow(2), tunnel, Direction.INBOUND, Seconds(10))
    plane.settle(Seconds(10))

    assert [view.outbound(flow(port), 10_000) for port in (1, 2)] == [None, None]
    assert plane.last_seen(flow(1)) is plane.last_seen(flow(2)) is None


def test_a_flow_of_a_tunnel_that_ends_before_it_is_settled_leads_nowhere(memory: Memory) -> None:
    plane, view, peers = memory.fresh(), flows_of(memory), peers_of(memory)
    tunnel = opened(plane)
    plane.allow(flow(1), tunnel, granted(60), Seconds(10))

    plane.closed(tunnel)
    plane.settle(Seconds(10))
    opened(plane, 0x2_0003, peer=TWO)

    ref = view.outbound(flow(1), 10_000)
    assert ref is not None
    assert peers.tunnel(ref) is None


def test_each_control_process_goes_on_with_the_generation_of_rules_it_finds(memory: Memory) -> None:
    words = read_only(memory.tables.flows[-1], FLOWS).words
    seen = [words[RULES_GENERATION]]

    for _ in range(2):
        plane = memory.plane()
        plane.recover(US, POOL)
        seen.append(words[RULES_GENERATION])
        plane.forget_flows()
        seen.append(words[RULES_GENERATION])

    assert seen == [0, 1, 2, 2, 3]


# Pairs of addresses.

OUTBOUND, INBOUND = Direction.OUTBOUND, Direction.INBOUND


def resting(tcp_s: float, udp_s: float, other_s: float) -> ConntrackConfig:
    return ConntrackConfig(
        tcp_timeout=Seconds(tcp_s), udp_timeout=Seconds(udp_s), default_timeout=Seconds(other_s)
    )


TIMES, OTHER_TIMES = resting(720, 180.0005, 600), resting(7, 8, 9)


def pair_of(memory: Memory, at_ms: int, key: FlowKey | None = None) -> Pair | None:
    key = key or flow()
    return flows_of(memory).pair(key.local, key.remote, at_ms)


def until_ms(memory: Memory, key: FlowKey | None = None) -> int:
    """When readers will not rely on what they were told any more."""
    key = key or flow()
    view, low, high = flows_of(memory), 0, 1 << 40
    while low < high:
        middle = (low + high) // 2
        if view.pair(key.local, key.remote, middle) is None:
            high = middle
        else:
            low = middle + 1
    return low


def timeouts_ms(memory: Memory) -> list[int]:
    return list(read_only(memory.tables.flows[-1], FLOWS).words[TIMEOUTS : TIMEOUTS + 3])


def settle(
    plane: ShmPlane,
    tunnel: Tunnel,
    at: float,
    *between: Direction,
    key: FlowKey | None = None,
    timeouts: ConntrackConfig = TIMES,
) -> list[FlowKey]:
    """Allow one flow and what else may begin; gives those that made room."""
    grant = Grant(OUTBOUND, frozenset(between), timeouts)
    plane.allow(key or flow(), tunnel, grant, Seconds(at))
    return [gone for gone, _ in plane.settle(Seconds(at))]


@pytest.mark.parametrize("between", [(OUTBOUND,), (INBOUND,), (OUTBOUND, INBOUND)])
def test_readers_are_told_what_else_may_begin_between_the_two_addresses(
    memory: Memory, between: tuple[Direction, ...]
) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    plane.allow(flow(), tunnel, Grant(OUTBOUND, frozenset(between), TIMES), Seconds(10))
    assert pair_of(memory, 10_000) is None

    plane.settle(Seconds(10))

    told = Pair(ref_of(memory, tunnel), OUTBOUND in between, INBOUND in between, rules_generation=1)
    assert pair_of(memory, 10_000) == told
    assert until_ms(memory) == 10_000 + PAIR_LIFE_MS
    assert timeouts_ms(memory) == [720_000, 180_001, 600_000]
    assert flows_of(memory).outbound(flow(), 10_000) == told.peer
    assert flows_of(memory).outbound(flow(23), 10_000) is None


def test_where_nothing_else_may_begin_nothing_is_said(memory: Memory) -> None:
    plane = memory.fresh()

    settle(plane, opened(plane), 10)

    assert pair_of(memory, 10_000) is None
    assert timeouts_ms(memory) == [0, 0, 0]
    assert flows_of(memory).outbound(flow(), 10_000) is not None


def test_a_refusal_says_nothing_of_other_flows(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)

    plane.refuse(flow(), tunnel, INBOUND, Seconds(10))
    plane.settle(Seconds(10))

    assert pair_of(memory, 10_000) is None


def test_readers_are_told_once_and_not_again_before_half_of_the_time_has_passed(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    half = PAIR_LIFE_MS / 2000

    holds = []
    for number, at_s in enumerate((10, 11, 10 + half - 0.001, 10 + half, 11 + half, 10 + 2 * half)):
        settle(plane, tunnel, at_s, OUTBOUND, key=flow(number))
        holds.append(until_ms(memory) - PAIR_LIFE_MS)

    second, third = 10_000 + PAIR_LIFE_MS // 2, 10_000 + PAIR_LIFE_MS
    assert holds == [10_000, 10_000, 10_000, second, second, third]


def test_readers_are_told_at_once_that_it_is_something_else(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    ref = ref_of(memory, tunnel)

    settle(plane, tunnel, 10, OUTBOUND)
    settle(plane, tunnel, 10.5, OUTBOUND, INBOUND)
    both = pair_of(memory, 10_500)
    settle(plane, tunnel, 11, INBOUND)

    assert both == Pair(ref, outbound=True, inbound=True, rules_generation=1)
    assert pair_of(memory, 11_000) == Pair(ref, outbound=False, inbound=True, rules_generation=1)


def test_pairs_are_told_of_one_by_one(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel, other = opened(plane), opened(plane, 0x1_0004, peer=TWO)
    keys = [
        flow(),
        flow()._replace(local=bytes([10, 42, 0, 2])),
        flow()._replace(remote=bytes([10, 42, 0, 12])),
    ]

    for number, (key, through) in enumerate(zip(keys, (tunnel, tunnel, other), strict=True)):
        settle(plane, through, 10 + number, OUTBOUND, key=key)

    assert [until_ms(memory, key) - PAIR_LIFE_MS for key in keys] == [10_000, 11_000, 12_000]
    told = [pair_of(memory, 12_000, key) for key in keys]
    refs = [ref_of(memory, tunnel), ref_of(memory, tunnel), ref_of(memory, other)]
    assert [each and each.peer for each in told] == refs


def test_new_rules_end_what_was_said_and_it_is_said_anew(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    settle(plane, tunnel, 10, OUTBOUND, INBOUND)

    plane.forget_flows()
    assert pair_of(memory, 10_000) is None
    settle(plane, tunnel, 11, OUTBOUND, INBOUND, timeouts=OTHER_TIMES)

    ref = ref_of(memory, tunnel)
    assert pair_of(memory, 11_000) == Pair(ref, outbound=True, inbound=True, rules_generation=2)
    assert until_ms(memory) == 11_000 + PAIR_LIFE_MS
    assert timeouts_ms(memory) == [7_000, 8_000, 9_000]


def test_whenever_there_is_a_pair_its_timeouts_are_there_already() -> None:
    expected = {1: [720_000, 180_001, 600_000], 2: [7_000, 8_000, 9_000]}
    found, at, killed = set(), 0, True
    while killed:
        memory = Memory()
        plane = memory.fresh()
        tunnel = opened(plane)
        watch(plane._flows._memory, "data halves seen rules", load=nothing, store=Countdown(at))
        try:
            settle(plane, tunnel, 10, OUTBOUND)
            plane.forget_flows()
            settle(plane, tunnel, 11, OUTBOUND, timeouts=OTHER_TIMES)
            killed = False
        except KilledError:
            pass
        pair = pair_of(memory, 11_000)
        if pair is not None:
            assert timeouts_ms(memory) == expected[pair.rules_generation]
            found.add(pair.rules_generation)
        memory.close()
        at += 1
    assert found == {1, 2}


def test_a_successor_says_everything_once_more(memory: Memory) -> None:
    plane = memory.fresh()
    settle(plane, opened(plane), 10, OUTBOUND)
    successor = memory.plane()
    successor.recover(US, POOL)
    assert until_ms(memory) == 10_000 + PAIR_LIFE_MS

    settle(successor, opened(successor, 0x1_0004), 11, OUTBOUND, timeouts=OTHER_TIMES)

    assert until_ms(memory) == 11_000 + PAIR_LIFE_MS
    assert timeouts_ms(memory) == [7_000, 8_000, 9_000]


def test_a_further_tunnel_of_a_peer_ends_its_pairs_and_no_other_ones(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel, other = opened(plane), opened(plane, 0x1_0004, peer=TWO)
    of_other = flow()._replace(remote=bytes([10, 42, 0, 12]))
    settle(plane, tunnel, 10, OUTBOUND)
    settle(plane, other, 10, OUTBOUND, key=of_other)

    further = opened(plane, 0x1_0005)

    assert pair_of(memory, 10_000) is None
    assert pair_of(memory, 10_000, of_other) is not None
    assert flows_of(memory).outbound(flow(), 10_000) == ref_of(memory, tunnel)
    settle(plane, further, 11, OUTBOUND)
    assert until_ms(memory) == 11_000 + PAIR_LIFE_MS, "though half of the time has not passed"


def test_a_candidate_ends_no_pairs_before_it_is_proven(memory: Memory) -> None:
    plane = memory.fresh()
    settle(plane, opened(plane), 10, OUTBOUND)

    candidate = opened(plane, 0x1_0005, proven=False)
    of_a_candidate = pair_of(memory, 10_000)
    candidate.proven = True
    plane.changed(candidate)

    assert of_a_candidate is not None, "anybody can send a copy of a first message"
    assert pair_of(memory, 10_000) is None


def test_the_pairs_of_a_peer_end_with_its_last_tunnel(memory: Memory) -> None:
    plane = memory.fresh()
    first, second = opened(plane, 0x1_0003), opened(plane, 0x1_0004)
    keys = [flow(), flow()._replace(local=bytes([10, 42, 0, 2]))]
    for key in keys:
        settle(plane, second, 10, OUTBOUND, key=key)

    plane.closed(first)
    with_one = [pair_of(memory, 10_000, key) for key in keys]
    plane.closed(second)

    assert None not in with_one
    assert [pair_of(memory, 10_000, key) for key in keys] == [None, None]


def test_a_pair_that_has_gone_over_to_another_peer_does_not_end_with_the_former_one(memory: Memory) -> None:
    plane = memory.fresh()
    former = opened(plane, 0x1_0003)
    settle(plane, former, 10, OUTBOUND)
    renewed = PKI.identity("one", "10.42.0.11/16", "fd42::11/64", key_of=ONE)
    tunnel = opened(plane, 0x1_0004, peer=renewed)
    settle(plane, tunnel, 11, OUTBOUND)

    plane.closed(former)

    told = Pair(ref_of(memory, tunnel), outbound=True, inbound=False, rules_generation=1)
    assert pair_of(memory, 11_000) == told


def test_of_more_pairs_than_are_remembered_each_one_holds(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nebula_mp.workers.tables._PAIRS_MAX", 4)
    plane = memory.fresh()
    tunnel = opened(plane)
    keys = [flow()._replace(local=bytes([10, 42, 1, number])) for number in range(6)]

    for key in keys:
        settle(plane, tunnel, 10, OUTBOUND, key=key)

    assert None not in [pair_of(memory, 10_000, key) for key in keys]
    settle(plane, tunnel, 11, OUTBOUND, key=keys[0])
    settle(plane, tunnel, 11, OUTBOUND, key=keys[5])
    assert [until_ms(memory, keys[number]) - PAIR_LIFE_MS for number in (0, 5)] == [11_000, 10_000]


def test_a_flow_that_made_room_for_a_pair_is_told_too(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    keys = [flow()._replace(remote=bytes([10, 43, number >> 8, number & 255])) for number in range(420)]
    for key in keys:
        settle(plane, tunnel, 10, key=key)
    known = [key for key in keys if plane.last_seen(key) is not None]

    gone = []
    for key in known:
        if plane.last_seen(key) is not None:  # so it stays in its row
            gone += settle(plane, tunnel, 11, OUTBOUND, key=key)

    assert len(gone) == len(set(gone)) > 5
    assert [key for key in known if plane.last_seen(key) is None] == [key for key in known if key in gone]


# Which way flows began.


def admitted_by(memory: Memory, worker: int) -> FlowTable:
    """A reader's own table."""
    tables = memory.tables
    rules = read_only(tables.flows[-1], FLOWS)
    return FlowTable(writable(tables.flows[worker], FLOWS), writable(tables.seen[worker], SEEN), rules=rules)


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("direction", Direction)
def test_the_origin_of_a_flow_is_what_the_reader_noted_that_admitted_it(
    memory: Memory, worker: int, direction: Direction
) -> None:
    plane = memory.fresh()
    assert plane.origin(flow(), Seconds(10)) is None

    admitted_by(memory, worker).allow(flow(), PeerRef(1), 2000, 10_000, inbound=direction is INBOUND)

    assert plane.origin(flow(), Seconds(11.999)) is direction
    plane.forget_flows()
    assert plane.origin(flow(), Seconds(11.999)) is direction
    assert plane.origin(flow(), Seconds(12)) is None
    assert plane.origin(flow(23), Seconds(10)) is None


def test_a_flow_with_packets_keeps_its_origin(memory: Memory) -> None:
    plane, table = memory.fresh(), admitted_by(memory, 1)
    table.allow(flow(), PeerRef(1), 2000, 10_000, inbound=True)
    table._memory.seen[ROWS_AT_WORD + seen_slot(table)] = 11_500

    assert plane.origin(flow(), Seconds(13.499)) is INBOUND
    assert plane.origin(flow(), Seconds(13.5)) is None


def seen_slot(table: FlowTable) -> int:
    """Where readers note the packets of the flow that is alone in this table."""
    return next(slot for slot, seen in enumerate(table._memory.seen[ROWS_AT_WORD:]) if seen)


def test_the_origin_is_that_of_any_reader_which_has_the_flow_and_says_it(memory: Memory) -> None:
    plane = memory.fresh()
    admitted_by(memory, 0).allow(flow(), PeerRef(1), 2000, 10_000)
    admitted_by(memory, 1).allow(flow(), PeerRef(1), 2000, 10_000, inbound=True)

    assert plane.origin(flow(), Seconds(10)) is INBOUND


def test_what_no_reader_admitted_has_no_origin(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    settle(plane, tunnel, 10, OUTBOUND)
    admitted_by(memory, 0).refuse(flow(23), ref_of(memory, tunnel), 10_000, inbound=True)

    assert plane.origin(flow(), Seconds(10)) is None
    assert plane.origin(flow(23), Seconds(10)) is None


@pytest.mark.parametrize("direction", Direction)
def test_readers_see_which_way_a_flow_began_that_control_allowed(
    memory: Memory, direction: Direction
) -> None:
    plane = memory.fresh()

    plane.allow(flow(), opened(plane), Grant(direction, frozenset(), TIMES), Seconds(10))
    plane.settle(Seconds(10))

    assert flows_of(memory).origin(flow(), 10_000) is (direction is INBOUND)


@pytest.mark.parametrize(("protocol", "rests_ms"), [(TCP, 720_000), (UDP, 180_001), (ICMP, 600_000)])
def test_a_flow_that_control_allows_rests_for_what_its_protocol_may(
    memory: Memory, protocol: int, rests_ms: int
) -> None:
    plane = memory.fresh()
    key = flow()._replace(protocol=protocol)

    settle(plane, opened(plane), 10, key=key)

    rested = [flows_of(memory).outbound(key, 10_000 + each) is not None for each in (rests_ms, rests_ms - 1)]
    assert rested == [False, True]
