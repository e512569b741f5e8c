import dataclasses
import functools
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.errors import RingError
from nebula_mp.shm import PAGE_BYTES, Region
from nebula_mp.shm_flows import (
    IDLE_AFTER_MS,
    REFUSAL_MS,
    REFUSED,
    SEEN_STEP_MS,
    Displaced,
    FlowTable,
    FlowView,
    flow_hash,
    pack_key,
    unpack_key,
)
from nebula_mp.shm_table import FLOWS, SEEN, PeerRef, Tables
from nebula_mp.wire.ip import ICMP, TCP, UDP, FlowKey
from tests.support.forked import children, shared_words, until
from tests.support.tables import read_only, seeds, small, writable
from tests.support.watched import Countdown, KilledError, nothing, watch

PEER, OTHER = PeerRef(7 << 32 | 3), PeerRef(9 << 32 | 3)
MINUTE = 60_000
START = 1_000_000


def flow(port: int = 1, protocol: int = TCP) -> FlowKey:
    return FlowKey(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), port, 50_000, protocol, fragment=False)


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = small()
    yield tables
    tables.close()


def table_of(tables: Tables) -> FlowTable:
    return FlowTable(writable(tables.flows[-1], FLOWS), writable(tables.seen[-1], SEEN))


def view_of(tables: Tables, remembered_max: int = 16_384) -> FlowView:
    return FlowView(read_only(tables.flows[-1], FLOWS), writable(tables.seen[-1], SEEN), remembered_max)


def sides(tables: Tables) -> tuple[FlowTable, FlowView]:
    table = table_of(tables)
    table.set_rules_generation(1)
    return table, view_of(tables)


# ---- verdicts


def test_a_flow_nobody_decided_on_is_for_control(tables: Tables) -> None:
    _, view = sides(tables)

    assert view.outbound(flow(), START) is None
    assert view.inbound(flow(), PEER, START) is None


def test_an_allowed_flow_is_allowed_both_ways_and_names_its_peer(tables: Tables) -> None:
    table, view = sides(tables)

    table.allow(flow(), PEER, MINUTE, START)

    assert view.outbound(flow(), START) == PEER
    assert view.inbound(flow(), PEER, START) is True


def test_another_peers_packet_of_a_known_flow_is_for_control(tables: Tables) -> None:
    table, view = sides(tables)

    table.allow(flow(), PEER, MINUTE, START)
    table.refuse(flow(2), PEER, START, inbound=True)

    assert view.inbound(flow(), OTHER, START) is None
    assert view.inbound(flow(2), OTHER, START) is None


@pytest.mark.parametrize("inbound", [False, True])
def test_a_refusal_holds_for_its_direction_only_and_for_a_second(tables: Tables, inbound: bool) -> None:
    table, view = sides(tables)

    table.refuse(flow(), PEER, START, inbound=inbound)

    for now in (START, START + 500, START + REFUSAL_MS - 1):
        assert view.outbound(flow(), now) == (None if inbound else REFUSED)
        assert view.inbound(flow(), PEER, now) is (False if inbound else None)
    assert view.outbound(flow(), START + REFUSAL_MS) is None
    assert view.inbound(flow(), PEER, START + REFUSAL_MS) is None


def test_a_flow_refused_inbound_may_be_opened_outbound_and_is_then_allowed_both_ways(tables: Tables) -> None:
    table, view = sides(tables)
    table.refuse(flow(), PEER, START, inbound=True)

    table.allow(flow(), PEER, MINUTE, START + 10)

    assert view.outbound(flow(), START + 20) == PEER
    assert view.inbound(flow(), PEER, START + 20) is True


def test_both_directions_of_a_flow_may_be_refused_at_once(tables: Tables) -> None:
    table, view = sides(tables)

    table.refuse(flow(), PEER, START, inbound=True)
    table.refuse(flow(), PEER, START + 10, inbound=False)

    assert view.outbound(flow(), START + 20) == REFUSED
    assert view.inbound(flow(), PEER, START + 20) is False


def test_a_refusal_does_not_inherit_that_of_another_peer_or_one_that_has_expired(tables: Tables) -> None:
    table, view = sides(tables)
    table.refuse(flow(1), OTHER, START, inbound=False)
    table.refuse(flow(1), PEER, START, inbound=True)
    table.refuse(flow(2), PEER, START, inbound=False)
    table.refuse(flow(2), PEER, START + REFUSAL_MS, inbound=True)

    assert view.outbound(flow(1), START + REFUSAL_MS) is None
    assert view.outbound(flow(1), START) is None
    assert view.outbound(flow(2), START + REFUSAL_MS) is None


@pytest.mark.parametrize("peer", [PEER, OTHER])
def test_a_refusal_never_takes_the_place_of_a_flow_that_is_allowed(tables: Tables, peer: PeerRef) -> None:
    table, view = sides(tables)
    table.allow(flow(), PEER, MINUTE, START)

    table.refuse(flow(), peer, START + 5, inbound=True)

    assert view.inbound(flow(), PEER, START + 10) is True
    assert table.seen_ms(flow()) == START


def test_a_refusal_takes_the_place_of_a_flow_that_was_allowed_until_it_expired(tables: Tables) -> None:
    table, view = sides(tables)
    table.allow(flow(), PEER, MINUTE, START)

    table.refuse(flow(), PEER, START + MINUTE, inbound=True)

    assert view.inbound(flow(), PEER, START + MINUTE) is False


def test_new_rules_end_every_verdict_at_once(tables: Tables) -> None:
    table, view = sides(tables)
    table.allow(flow(1), PEER, MINUTE, START)
    table.refuse(flow(2), PEER, START, inbound=True)
    assert view.outbound(flow(1), START) == PEER

    table.set_rules_generation(2)

    assert view.outbound(flow(1), START) is None
    assert view.inbound(flow(2), PEER, START) is None
    table.allow(flow(1), OTHER, MINUTE, START)
    assert view.outbound(flow(1), START) == OTHER
    assert table.rules_generation == 2


def test_a_removed_flow_is_for_control_again(tables: Tables) -> None:
    table, view = sides(tables)
    table.allow(flow(), PEER, MINUTE, START)
    assert view.outbound(flow(), START) == PEER

    assert table.remove(flow())

    assert view.outbound(flow(), START) is None
    assert table.seen_ms(flow()) is None
    assert not table.remove(flow())


# ---- time


def test_a_flow_expires_when_it_had_no_packet_for_its_timeout(tables: Tables) -> None:
    table, view = sides(tables)
    table.allow(flow(), PEER, MINUTE, START)

    assert view.outbound(flow(), START + MINUTE - 1) == PEER
    assert view.outbound(flow(), START + 2 * MINUTE - 2) == PEER
    assert view.inbound(flow(), PEER, START + 3 * MINUTE - 3) is True
    assert view.outbound(flow(), START + 4 * MINUTE - 3) is None


def test_flows_that_are_not_there_are_found_once_they_are_however_many_were_asked_for(tables: Tables) -> None:
    table, view = sides(tables)
    asked = [flow(port) for port in range(3000)]
    assert [view.outbound(each, START) for each in asked] == [None] * 3000

    for each in asked[::1000]:
        table.allow(each, PEER, MINUTE, START)

    assert [view.outbound(each, START) for each in asked[::1000]] == [PEER] * 3
    assert view.outbound(asked[1], START) is None


def test_packets_are_noted_once_in_a_step_so_that_a_busy_flow_costs_no_stores(tables: Tables) -> None:
    table, view = sides(tables)
    table.allow(flow(), PEER, MINUTE, START)
    stores = Countdown(1000)
    watch(view, "_seen", load=nothing, store=stores)

    for now in range(START, START + 10 * SEEN_STEP_MS, 10):
        view.outbound(flow(), now)

    assert stores.calls == 9
    assert table.seen_ms(flow()) == START + 9 * SEEN_STEP_MS


def test_a_flow_with_a_short_timeout_is_noted_more_often(tables: Tables) -> None:
    table, view = sides(tables)
    table.allow(flow(), PEER, 800, START)

    for now in range(START, START + 5000, 50):
        assert view.inbound(flow(), PEER, now) is True


def test_refusals_are_not_kept_alive_by_the_packets_they_refuse(tables: Tables) -> None:
    table, view = sides(tables)
    table.refuse(flow(), PEER, START, inbound=True)

    answers = [view.inbound(flow(), PEER, now) for now in range(START, START + 1200, 100)]

    assert answers == [False] * 10 + [None] * 2


def test_a_timeout_longer_than_a_row_can_say_is_the_longest_it_can(tables: Tables) -> None:
    table, view = sides(tables)

    table.allow(flow(), PEER, 2**40, START)

    assert view.outbound(flow(), START + 2**32 - 2) == PEER


def test_another_readers_later_clock_does_no_harm(tables: Tables) -> None:
    table, view = sides(tables)
    other = view_of(tables)
    table.allow(flow(), PEER, MINUTE, START)
    other.outbound(flow(), START + 5000)

    assert view.outbound(flow(), START + 1) == PEER
    assert table.seen_ms(flow()) == START + 5000


# ---- keys


addresses = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)


@st.composite
def keys(draw: st.DrawFn) -> FlowKey:
    size = draw(st.sampled_from([4, 16]))
    local, remote = (draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    ports = st.integers(0, 65_535)
    return FlowKey(local, remote, draw(ports), draw(ports), draw(st.integers(0, 255)), draw(st.booleans()))


@given(keys())
def test_a_key_survives_its_forty_bytes(key: FlowKey) -> None:
    assert len(pack_key(key)) == 40
    assert unpack_key(pack_key(key)) == key


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(flow()._replace(local=bytes([10, 0, 0, 3])), id="local"),
        pytest.param(flow()._replace(remote=bytes([10, 0, 0, 3])), id="remote"),
        pytest.param(flow()._replace(local_port=2), id="local port"),
        pytest.param(flow()._replace(remote_port=2), id="remote port"),
        pytest.param(flow()._replace(protocol=UDP), id="protocol"),
        pytest.param(flow()._replace(fragment=True), id="fragment"),
        pytest.param(
            flow()._replace(
                local=bytes([10, 0, 0, 1]).ljust(16, b"\0"), remote=bytes([10, 0, 0, 2]).ljust(16, b"\0")
            ),
            id="the same bytes as IPv6",
        ),
        pytest.param(
            flow()._replace(
                local=bytes([10, 0, 0, 2]), remote=bytes([10, 0, 0, 1]), local_port=50_000, remote_port=1
            ),
            id="the other way round",
        ),
    ],
)
def test_every_part_of_the_key_tells_flows_apart(other: FlowKey) -> None:
    tables = small(buckets=1)  # so that only the key can
    table, view = sides(tables)
    table.allow(flow(), PEER, MINUTE, START)

    assert view.outbound(other, START) is None
    table.allow(other, OTHER, MINUTE, START)
    assert (view.outbound(flow(), START), view.outbound(other, START)) == (PEER, OTHER)
    tables.close()


def test_flows_with_one_hash_are_told_apart_by_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nebula_mp.shm_flows.flow_hash", lambda _seeds, _key: 5)
    tables = small()
    table, view = sides(tables)
    peers = [PeerRef(1 << 32 | port) for port in range(7)]

    for port, peer in enumerate(peers):
        table.allow(flow(port), peer, MINUTE, START + port)

    assert [view.outbound(flow(port), START) for port in range(8)] == [*peers, None]
    assert [table.seen_ms(flow(port)) for port in range(7)] == [START + port for port in range(7)]
    assert table.remove(flow(3))
    assert not table.remove(flow(7))
    assert [view.outbound(flow(port), START) for port in (2, 3, 4)] == [peers[2], None, peers[4]]
    tables.close()


def fold(a: int, b: int) -> int:
    product = a * b
    return (product & 2**64 - 1) ^ (product >> 64)


@given(keys(), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_the_hash_is_three_multiply_folds(key: FlowKey, secret: list[int]) -> None:
    packed = pack_key(key)
    word = [int.from_bytes(packed[at : at + 8], "little") for at in range(0, 40, 8)]

    local = fold(word[0] ^ secret[0], word[1] ^ secret[1])
    remote = fold(word[2] ^ secret[2], word[3] ^ secret[3])

    assert flow_hash(tuple(secret), packed) == fold(local ^ word[4] ^ secret[4], remote ^ secret[5])


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (flow(), 0x870E687DAF9EC2B6),
        (flow()._replace(local_port=2), 0xC6932D06DE4423B3),
        (FlowKey(bytes(range(16)), bytes(range(16, 32)), 0, 7, ICMP, fragment=True), 0xA1C9C5A67900ADFB),
    ],
)
def test_the_hash_is_the_frozen_one(key: FlowKey, hashed: int) -> None:
    assert flow_hash(struct.unpack("<6Q", seeds(48)), pack_key(key)) == hashed


@pytest.mark.parametrize("vary", ["ports", "remote", "local v6"])
def test_flows_that_differ_little_spread_over_the_buckets_like_random_ones(vary: str) -> None:
    secret = struct.unpack("<6Q", random.Random(3).randbytes(48))
    load: Counter[int] = Counter()
    tags = set()
    for number in range(8192):
        if vary == "ports":
            key = flow()._replace(local_port=number & 0x3F, remote_port=number >> 6)
        elif vary == "remote":
            key = flow()._replace(remote=bytes([10, 0, number >> 8, number & 255]))
        else:
            key = flow()._replace(local=bytes(14) + struct.pack(">H", number), remote=bytes(16))
        hashed = flow_hash(secret, pack_key(key))
        load[hashed >> 40 & 2047] += 1
        tags.add(hashed & 0xFFFF_FFFF | 1)

    # 4 on average: more than 16 in any of 2,048 buckets has a probability of 1 in 1,000.
    assert max(load.values()) <= 16
    assert 2048 - len(load) < 80  # 38 are expected to be empty
    assert len(tags) > 8180


def test_who_does_not_know_the_seeds_cannot_tell_which_flows_share_a_bucket() -> None:
    one, other = (struct.unpack("<6Q", random.Random(seed).randbytes(48)) for seed in (1, 2))
    flows = [pack_key(flow(port)) for port in range(8192)]
    together = [key for key in flows if flow_hash(one, key) >> 40 & 255 == 7]

    assert len(together) > 16
    assert len({flow_hash(other, key) >> 40 & 255 for key in together}) > len(together) // 2


# ---- making room


def full_bucket(verdicts: list[tuple[str, int, int]]) -> tuple[Tables, FlowTable]:
    """One bucket whose 7 rows were filled so: (what, protocol, how long ago)."""
    tables = small(buckets=1)
    table = table_of(tables)
    for port, (what, protocol, ago) in enumerate(verdicts):
        table.set_rules_generation(1 if what == "old" else 2)
        key = flow(port, protocol)
        if what == "refused":
            table.refuse(key, PEER, START - ago, inbound=True)
        else:
            timeout = 100 if what == "expired" else 10 * MINUTE
            table.allow(key, PEER, timeout, START - ago)
    table.set_rules_generation(2)
    return tables, table


IDLE, BUSY = IDLE_AFTER_MS + 500, 500


@pytest.mark.parametrize(
    ("verdicts", "victim", "evicted"),
    [
        pytest.param([("ok", TCP, 9000)] * 6 + [("old", TCP, 0)], 6, 0, id="of older rules"),
        pytest.param([("ok", UDP, 9000)] * 6 + [("expired", TCP, 200)], 6, 0, id="expired"),
        pytest.param([("ok", UDP, 9000)] * 6 + [("refused", TCP, 10)], 6, 0, id="a refusal before a flow"),
        pytest.param(
            [("refused", TCP, 10), ("refused", TCP, 30)] + [("ok", UDP, 9000)] * 5,
            1,
            0,
            id="the oldest refusal",
        ),
        pytest.param([("ok", TCP, 9000)] * 6 + [("ok", UDP, IDLE)], 6, 1, id="idle UDP before idle TCP"),
        pytest.param([("ok", TCP, BUSY)] * 6 + [("ok", ICMP, IDLE)], 6, 1, id="idle ICMP before TCP"),
        pytest.param([("ok", UDP, BUSY)] * 6 + [("ok", TCP, IDLE)], 6, 1, id="idle TCP before a busy flow"),
        pytest.param(
            [("ok", UDP, IDLE), ("ok", UDP, IDLE + 1)] + [("ok", UDP, IDLE)] * 5, 1, 1, id="the longest idle"
        ),
        pytest.param(
            [("ok", UDP, 10)] * 3 + [("ok", TCP, BUSY)] + [("ok", UDP, 10)] * 3,
            3,
            1,
            id="none idle: the oldest",
        ),
    ],
)
def test_a_full_bucket_makes_room_in_this_order(
    verdicts: list[tuple[str, int, int]], victim: int, evicted: int
) -> None:
    tables, table = full_bucket(verdicts)

    displaced = table.allow(flow(99), OTHER, MINUTE, START)

    view = view_of(tables)
    assert view.outbound(flow(99), START) == OTHER
    assert table.evicted == evicted
    for port, (what, protocol, ago) in enumerate(verdicts):
        assert (table.seen_ms(flow(port, protocol)) is None) is (port == victim)
        if port == victim:
            expected = None if what == "refused" else Displaced(flow(port, protocol), START - ago)
            assert displaced == expected
    tables.close()


def test_a_row_never_used_or_removed_is_taken_before_any_other(tables: Tables) -> None:
    tables, table = full_bucket([("ok", TCP, 0)] * 3 + [("expired", TCP, 200)] * 4)
    table.remove(flow(1))

    assert table.allow(flow(99), OTHER, MINUTE, START) is None

    assert sum(table.seen_ms(flow(port)) is not None for port in range(7)) == 6
    tables.close()


def test_a_flow_that_is_known_gets_its_own_row_again_however_full_the_bucket() -> None:
    tables, table = full_bucket([("expired", TCP, 200)] + [("ok", TCP, 9000)] * 6)

    assert table.allow(flow(5), OTHER, MINUTE, START) is None

    assert all(table.seen_ms(flow(port)) is not None for port in range(7))
    assert view_of(tables).outbound(flow(5), START) == OTHER
    tables.close()


def test_a_quarter_full_table_evicts_hardly_any_flow() -> None:
    tables = small(buckets=256)
    table = table_of(tables)
    table.set_rules_generation(1)

    for number in range(256 * 7 * 28 // 100):
        table.allow(flow()._replace(local_port=number), PEER, MINUTE, START)

    assert table.evicted < 256 * 7 * 28 // 100 * 0.02
    tables.close()


# ---- any walk


@dataclasses.dataclass
class ModelRow:
    peer: PeerRef
    generation: int
    timeout: int
    seen: int
    outbound: str | None = None
    inbound: str | None = None

    def holds(self, generation: int, now: int) -> bool:
        return self.generation == generation and now - self.seen < self.timeout


class Model:
    """The table as a dictionary that is never full."""

    def __init__(self) -> None:
        self.rows: dict[FlowKey, ModelRow] = {}
        self.generation = 1

    def allow(self, key: FlowKey, peer: PeerRef, timeout: int, now: int) -> None:
        self.rows[key] = ModelRow(peer, self.generation, timeout, now, "allow", "allow")

    def refuse(self, key: FlowKey, peer: PeerRef, now: int, inbound: bool) -> None:
        row = self.rows.get(key)
        fresh = ModelRow(peer, self.generation, REFUSAL_MS, now)
        if row is not None and row.holds(self.generation, now):
            if row.outbound == "allow":
                return
            if row.peer == peer:
                fresh.outbound, fresh.inbound = row.outbound, row.inbound
        if inbound:
            fresh.inbound = "refuse"
        else:
            fresh.outbound = "refuse"
        self.rows[key] = fresh

    def verdict(self, key: FlowKey, now: int, *, inbound: bool, peer: PeerRef | None) -> str | None:
        row = self.rows.get(key)
        if row is None or not row.holds(self.generation, now) or peer not in (None, row.peer):
            return None
        verdict = row.inbound if inbound else row.outbound
        if verdict == "allow" and now - row.seen >= min(row.timeout // 8, SEEN_STEP_MS):
            row.seen = now
        return verdict


actions = st.tuples(
    st.sampled_from(
        ["allow", "refuse in", "refuse out", "remove", "rules", "outbound", "inbound", "inbound"]
    ),
    st.integers(0, 4),  # flow
    st.sampled_from([PEER, OTHER]),
    st.sampled_from([100, 1000, 3000, MINUTE]),  # timeout
    st.sampled_from([0, 0, 1, 50, 400, 1000, 2999, 30_000]),  # time that passes
    st.integers(0, 1),  # which reader
)


@settings(max_examples=300)
@given(st.lists(actions, max_size=60))
def test_any_walk_is_answered_as_by_a_dictionary(
    walk: list[tuple[str, int, PeerRef, int, int, int]],
) -> None:
    tables, model, now = small(buckets=1), Model(), START
    table, _ = sides(tables)
    views = [view_of(tables), view_of(tables, remembered_max=2)]
    for action, number, peer, timeout, passes, reader in walk:
        now += passes
        key, view = flow(number, (TCP, UDP, ICMP)[number % 3]), views[reader]
        match action:
            case "allow":
                assert table.allow(key, peer, timeout, now) is None
                model.allow(key, peer, timeout, now)
            case "refuse in" | "refuse out":
                inbound = action == "refuse in"
                assert table.refuse(key, peer, now, inbound=inbound) is None
                model.refuse(key, peer, now, inbound)
            case "remove":
                assert table.remove(key) is (model.rows.pop(key, None) is not None)
            case "rules":
                model.generation += 1
                table.set_rules_generation(model.generation)
            case "outbound":
                expected = model.verdict(key, now, inbound=False, peer=None)
                owner = model.rows[key].peer if expected == "allow" else REFUSED if expected else None
                assert view.outbound(key, now) == owner
            case "inbound":
                expected = model.verdict(key, now, inbound=True, peer=peer)
                assert view.inbound(key, peer, now) is {"allow": True, "refuse": False, None: None}[expected]
        row = model.rows.get(key)
        assert table.seen_ms(key) == (None if row is None else row.seen)
        assert len(views[1]._remembered) <= 2
    assert table.evicted == 0
    tables.close()


# ---- at any moment


def allow_new(table: FlowTable) -> None:
    table.allow(flow(50, UDP), OTHER, MINUTE, START)


def allow_same(table: FlowTable) -> None:
    table.allow(flow(0), OTHER, 2 * MINUTE, START)


def refuse_new(table: FlowTable) -> None:
    table.refuse(flow(50, UDP), OTHER, START, inbound=False)


def remove_one(table: FlowTable) -> None:
    table.remove(flow(0))


def allow_refused(table: FlowTable) -> None:
    table.allow(flow(6), OTHER, MINUTE, START)


CHANGES = [allow_new, allow_same, refuse_new, remove_one, allow_refused]
Seen = tuple[PeerRef | None, PeerRef | None, bool | None]
BEFORE: Seen = (PEER, None, None)
ALLOWED: dict[Callable[[FlowTable], None], set[Seen]] = {
    allow_new: {BEFORE, (None, None, None), (None, OTHER, None)},
    allow_same: {BEFORE, (None, None, None), (OTHER, None, None)},
    refuse_new: {BEFORE, (None, None, None), (None, REFUSED, None)},
    remove_one: {BEFORE, (None, None, None)},
    allow_refused: {BEFORE, (PEER, None, True)},
}


def looks(view: FlowView) -> Seen:
    new = view.outbound(flow(50, UDP), START)
    return view.outbound(flow(0), START), new, view.inbound(flow(6), OTHER, START)


def bucket_before(change: Callable[[FlowTable], None]) -> tuple[Tables, FlowTable]:
    """Full bucket in which flow 0 makes room, or in which flow 6 was refused to PEER."""
    last = "refused" if change is allow_refused else "ok"
    return full_bucket([("ok", TCP, 5 * MINUTE)] + [("ok", TCP, 10)] * 5 + [(last, TCP, 10)])


@pytest.mark.parametrize("change", CHANGES)
def test_between_any_two_stores_of_control_a_reader_sees_the_old_row_the_new_one_or_a_miss(
    change: Callable[[FlowTable], None],
) -> None:
    at, reached = 0, True
    while reached:
        tables, table = bucket_before(change)
        fresh, remembering = view_of(tables), view_of(tables)
        assert looks(remembering) == BEFORE
        table.allow(flow(0), PEER, 10 * MINUTE, START - 5 * MINUTE)  # looking was a packet

        def look(fresh: FlowView = fresh, remembering: FlowView = remembering) -> None:
            assert looks(fresh) in ALLOWED[change]
            assert looks(remembering) in ALLOWED[change]

        moment = Countdown(at, look)
        watch(table._memory, "data words halves seen", load=nothing, store=moment)
        change(table)
        reached = moment.reached
        assert looks(fresh) == looks(remembering)
        assert looks(fresh) != BEFORE
        tables.close()
        at += 1
    assert at > 3


@pytest.mark.parametrize("change", CHANGES)
def test_between_any_two_loads_of_a_reader_control_may_change_the_row(
    change: Callable[[FlowTable], None],
) -> None:
    looks_one_by_one: list[Callable[[FlowView], object]] = [
        lambda view: view.outbound(flow(0), START),
        lambda view: view.outbound(flow(50, UDP), START),
        lambda view: view.inbound(flow(6), OTHER, START),
    ]
    for number, look in enumerate(looks_one_by_one):
        at, reached = 0, True
        while reached:
            tables, table = bucket_before(change)
            view = view_of(tables)
            moment = Countdown(at, functools.partial(change, table))
            watch(view._memory, "data halves", load=moment, store=nothing)
            watch(view, "_halves", load=moment, store=nothing)

            seen = look(view)

            reached = moment.reached
            assert seen in {each[number] for each in ALLOWED[change]}, at
            tables.close()
            at += 1
        assert at > 1


@pytest.mark.parametrize("change", CHANGES)
def test_control_killed_at_any_store_leaves_a_miss_that_its_successor_writes_over(
    change: Callable[[FlowTable], None],
) -> None:
    at, killed = 0, True
    while killed:
        tables, table = bucket_before(change)
        watch(table._memory, "data words halves seen", load=nothing, store=Countdown(at))
        try:
            change(table)
            killed = False
        except KilledError:
            pass
        view = view_of(tables)
        assert looks(view) in ALLOWED[change]

        successor = table_of(tables)
        successor.allow(flow(50, UDP), OTHER, MINUTE, START)
        successor.refuse(flow(0), PEER, START, inbound=False)
        successor.allow(flow(0), PEER, MINUTE, START)

        assert looks(view)[:2] == looks(view_of(tables))[:2] == (PEER, OTHER)
        assert successor.evicted <= 2
        halves = read_only(tables.flows[-1], FLOWS).data.cast("I")
        assert [halves[(4096 + 64 + 64 * row) // 4] % 2 for row in range(7)] == [0] * 7
        tables.close()
        at += 1
    assert at > 3


def test_what_follows_from_nothing_but_its_key_is_never_seen_wrong_while_control_writes_and_is_killed() -> (
    None
):
    tables = small(buckets=2)
    words = shared_words(4)  # hits of two readers, then insertions
    keys = [flow(port, TCP if port % 2 else UDP) for port in range(40)]

    def peer_of(key: FlowKey) -> PeerRef:
        return PeerRef(key.local_port * 0x1_0001_0001 + 5)

    def control() -> None:
        table, choose = table_of(tables), random.Random(words[2])
        while True:
            key = choose.choice(keys)
            if choose.random() < 0.1:
                table.remove(key)
            elif key.local_port % 4 == 0:
                table.refuse(key, peer_of(key), START, inbound=True)
            else:
                table.allow(key, peer_of(key), MINUTE, START)
            words[2] += 1

    def reader(number: int) -> None:
        view, choose = view_of(tables, 16), random.Random(number)
        while True:
            key = choose.choice(keys)
            peer, passes = view.outbound(key, START), view.inbound(key, peer_of(key), START)
            if key.local_port % 4 == 0:
                assert peer is None
                assert passes in (None, False)
            else:
                assert peer in (None, peer_of(key))
                assert passes in (None, True)
            assert view.inbound(key, PEER, START) is None
            words[number] += peer is not None

    table_of(tables).set_rules_generation(1)
    kills = 0
    with children(control, lambda: reader(0), lambda: reader(1)) as running:
        for _ in until(2.5):
            time.sleep(0.02)
            running[0].kill()
            running[0] = running[0].next()
            kills += 1
    tables.close()

    assert kills > 10
    assert min(words[0], words[1]) > 2000
    assert words[2] > 2000


def test_a_table_whose_number_of_buckets_is_no_power_of_two_is_a_contradiction() -> None:
    tables, other = small(), small(buckets=32)
    try:
        with pytest.raises(RingError, match="number of rows is 224, expected 448"):
            FlowView(read_only(tables.flows[-1], FLOWS), writable(other.seen[-1], SEEN))
        tables.flows[-1].store_word(4, 63)
        with pytest.raises(RingError, match="number of rows is 63"):
            table_of(tables)
    finally:
        tables.close()
        other.close()


def memory_bytes(region: Region) -> int:
    """What a region takes of memory; reading takes some too where nothing was."""
    return 512 * os.fstat(region.descriptor).st_blocks


def test_a_look_up_takes_no_memory_where_nothing_was_ever_written(tables: Tables) -> None:
    table, view = sides(tables)
    flows = tables.flows[-1]
    before = memory_bytes(flows)
    for port in range(1, 2000):
        assert view.outbound(flow(port), START) is None
        assert view.pair(b"%04d" % port, b"peer", START) is None
        assert table.peer(flow(port)) is None
    assert memory_bytes(flows) == before

    table.allow(flow(), PEER, MINUTE, START)
    assert view.outbound(flow(), START) == PEER
    assert before < memory_bytes(flows) <= before + 2 * PAGE_BYTES


@pytest.mark.parametrize("buckets", [1, 8, 1024, 16_384, 32_768, 65_536, 1 << 17])
def test_every_bucket_has_a_bit_whatever_the_size_of_the_table(
    buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tables.create(1, os.urandom, rows=4, buckets=buckets)
    table, view = sides(made)
    bits = 0
    for port, bucket in enumerate(sorted({0, buckets // 3, buckets // 2, buckets - 1})):
        monkeypatch.setattr("nebula_mp.shm_flows.flow_hash", lambda _seeds, _key, at=bucket: at << 40 | 1)
        assert view.outbound(flow(port), START) is None
        table.allow(flow(port), PEER, MINUTE, START)
        assert view.outbound(flow(port), START) == PEER
        bits |= 1 << bucket * min(buckets, 16_384) // buckets
        assert used_bits(made.flows[-1]) == bits
    made.close()


def used_bits(region: Region) -> int:
    """Which groups of buckets were written to, in the second half of the first page."""
    return int.from_bytes(os.pread(region.read_only, PAGE_BYTES // 2, PAGE_BYTES // 2), "little")


def test_a_writer_killed_at_any_store_has_said_where_it_wrote() -> None:
    at, killed = 0, True
    while killed:
        tables = small(buckets=1)
        table = table_of(tables)
        table.set_rules_generation(1)
        watch(table._memory, "data words halves seen", load=nothing, store=Countdown(at))
        try:
            table.allow(flow(), PEER, MINUTE, START)
            killed = False
        except KilledError:
            pass
        bucket = os.pread(tables.flows[-1].read_only, 512, PAGE_BYTES)
        assert used_bits(tables.flows[-1]) == 1 or not any(bucket)
        tables.close()
        at += 1
    assert at > 3
