import fcntl
import time
from collections import Counter as Tally
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.control.hostmap import Tunnel
from nebula_mp.control.plane import DataPlane, Passed
from nebula_mp.datapath.sealing import LOCK_HOLD
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.newtypes import Cipher, Counter, Seconds, TunnelIndex
from nebula_mp.shm_counters import SendCounters, Traffic
from nebula_mp.shm_table import (
    FLOWS,
    JOURNAL,
    KEYS,
    ROWS_AT_WORD,
    RULES_GENERATION,
    SEND,
    SEND_ROW,
    SPAN,
    TRAFFIC,
)
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import COUNTER_LIMIT, STAGE_2_COUNTER
from nebula_mp.wire.ip import TCP, FlowKey
from nebula_mp.workers.journal import Journal
from nebula_mp.workers.tables import COUNTER_WAIT
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
    opened,
    peers_of,
    ref_of,
    shake,
    tunnel_of,
    view_of,
)
from tests.support.tables import read_only, writable

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

    plane.allow(flow(1), tunnel, Seconds(2.0005), Seconds(10))
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

    plane.allow(flow(), tunnel, Seconds(2.0005), Seconds(10))
    plane.settle(Seconds(10))

    rested = [flows_of(memory).outbound(flow(), 10_000 + each) is not None for each in (2_001, 2_000)]
    assert rested == [False, True]


def test_when_a_flow_last_had_a_packet_is_what_readers_noted(memory: Memory) -> None:
    plane = memory.fresh()
    tunnel = opened(plane)
    assert plane.last_seen(flow()) is None

    plane.allow(flow(), tunnel, Seconds(60), Seconds(9))
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
        plane.allow(flow(port), tunnel, Seconds(3600), Seconds(port))
        told += plane.settle(Seconds(port))

    gone = [key for key, _ in told]
    assert len(gone) == len(set(gone)) > 1000
    assert all(seen == float(key.remote_port) for key, seen in told)
    assert all((plane.last_seen(flow(port)) is None) is (flow(port) in gone) for port in range(1, 2000))


def test_a_verdict_by_rules_that_are_gone_is_never_published(memory: Memory) -> None:
    plane, view = memory.fresh(), flows_of(memory)
    tunnel = opened(plane)
    plane.allow(flow(1), tunnel, Seconds(60), Seconds(10))
    plane.settle(Seconds(10))
    plane.allow(flow(2), tunnel, Seconds(60), Seconds(10))

    plane.forget_flows()
    plane.settle(Seconds(10))

    assert [view.outbound(flow(port), 10_000) for port in (1, 2)] == [None, None]


def test_nothing_is_published_for_a_tunnel_that_has_ended(memory: Memory) -> None:
    plane, view = memory.fresh(), flows_of(memory)
    tunnel = opened(plane)
    plane.closed(tunnel)

    plane.allow(flow(1), tunnel, Seconds(60), Seconds(10))
    plane.refuse(flow(2), tunnel, Direction.INBOUND, Seconds(10))
    plane.settle(Seconds(10))

    assert [view.outbound(flow(port), 10_000) for port in (1, 2)] == [None, None]
    assert plane.last_seen(flow(1)) is plane.last_seen(flow(2)) is None


def test_a_flow_of_a_tunnel_that_ends_before_it_is_settled_leads_nowhere(memory: Memory) -> None:
    plane, view, peers = memory.fresh(), flows_of(memory), peers_of(memory)
    tunnel = opened(plane)
    plane.allow(flow(1), tunnel, Seconds(60), Seconds(10))

    plane.closed(tunnel)
    plane.settle(Seconds(10))
    opened(plane, 0x2_0003, peer=TWO)

    ref = view.outbound(flow(1), 10_000)
    assert ref is not None
    assert peers.tunnel(ref) is None


def test_each_control_process_goes_on_with_the_generation_of_rules_it_finds(memory: Memory) -> None:
    words = read_only(memory.tables.flows, FLOWS).words
    seen = [words[RULES_GENERATION]]

    for _ in range(2):
        plane = memory.plane()
        plane.recover(US, POOL)
        seen.append(words[RULES_GENERATION])
        plane.forget_flows()
        seen.append(words[RULES_GENERATION])

    assert seen == [0, 1, 2, 2, 3]
