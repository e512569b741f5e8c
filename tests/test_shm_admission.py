import itertools
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from nebula_mp.newtypes import TunnelIndex
from nebula_mp.shm import Region
from nebula_mp.shm_admission import Admission
from nebula_mp.shm_flows import REFUSED, FlowTable, FlowView, Pair, pack_key, pack_pair
from nebula_mp.shm_peers import PeerTable, PeerView
from nebula_mp.shm_stats import StatsPage, create_page
from nebula_mp.shm_table import (
    BUCKET_ROWS,
    FLOWS,
    PEERS,
    ROWS_AT,
    RULES_GENERATION,
    SEEN,
    TIMEOUTS,
    USED,
    PeerRef,
)
from nebula_mp.wire.ip import ICMP, TCP, UDP, FlowKey
from tests.support.forked import children, shared_words, until
from tests.support.tables import read_only, small, writable
from tests.support.watched import Countdown, KilledError, nothing, watch

NEIGHBOUR, OURS, CONTROL = range(3)
ORDER = (OURS, CONTROL, NEIGHBOUR)
"""In which our reader asks the tables."""

ONE, TWO, GONE = (PeerRef(1 << 32 | row) for row in range(3))
"""Two peers with a tunnel, and one without."""

ALLOW_OUT, REFUSE_OUT, ALLOW_IN, REFUSE_IN, FROM_OUT, FROM_IN = 1, 2, 4, 8, 16, 32
BOTH, REFUSE_BOTH = ALLOW_OUT | ALLOW_IN, REFUSE_OUT | REFUSE_IN
NOW = 1_000_000
RULES = 5
TCP_MS, UDP_MS, OTHER_MS = 720_000, 180_000, 600_000
LIFE_MS = 30_000
LOCAL, REMOTE = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
REST = struct.Struct("<QII")


def flow(port: int = 1, protocol: int = TCP) -> FlowKey:
    return FlowKey(LOCAL, REMOTE, port, 443, protocol, fragment=False)


class Row(NamedTuple):
    """What stands in a table, but for its key."""

    rules: int = RULES
    peer: int = ONE
    timeout_ms: int = 16_000
    verdicts: int = BOTH
    seen_ms: int = NOW


ROW = Row()
ADMITTED = Row(timeout_ms=TCP_MS, verdicts=BOTH | FROM_OUT)

Answers = tuple[PeerRef | None, bool | None]
UNKNOWN: Answers = (None, None)
ALLOWED: Answers = (ONE, True)
REFUSES: Answers = (REFUSED, False)


class Site:
    """The tables of two readers and of control, as each of them maps them; the second reader asks."""

    def __init__(self, buckets: int = 64) -> None:
        self.tables = small(2, buckets=buckets)
        self.pages = [create_page(str(number)) for number in range(2)]
        self.peers = PeerTable(writable(self.tables.peers, PEERS))
        assert [self.peers.add() for _ in range(3)] == [ONE, TWO, GONE]
        self.peers.set(ONE, TunnelIndex(0x1_0001))
        self.peers.set(TWO, TunnelIndex(0x1_0002))
        self.rules = writable(self.tables.flows[CONTROL], FLOWS)
        self.writers = [
            FlowTable(writable(flows, FLOWS), writable(seen, SEEN), rules=self.rules)
            for flows, seen in zip(self.tables.flows, self.tables.seen, strict=True)
        ]
        self.control = self.writers[CONTROL]
        self.control.set_rules_generation(RULES)
        self.control.set_timeouts(TCP_MS, UDP_MS, OTHER_MS)
        self.reader = self.attach(OURS)

    def attach(self, own: int) -> Admission:
        """Map as a reader does: its own table and all last-seen words may be written, no more."""
        flows = [
            (writable if number == own else read_only)(each, FLOWS)
            for number, each in enumerate(self.tables.flows)
        ]
        seen = [writable(each, SEEN) for each in self.tables.seen]
        rules = flows[CONTROL]
        return Admission(
            FlowTable(flows[own], seen[own], rules=rules),
            [FlowView(flows[each], seen[each], rules=rules) for each in (own, CONTROL, 1 - own)],
            PeerView(read_only(self.tables.peers, PEERS)),
            StatsPage(self.pages[own].descriptor, writable=True),
        )

    def put(self, table: int, key: FlowKey, row: Row = ROW) -> None:
        """Have the writer of that table write this."""
        self._put(table, pack_key(key), row)

    def put_pair(self, row: Row = ROW, *, table: int = CONTROL) -> None:
        self._put(table, pack_pair(LOCAL, REMOTE), row)

    def _put(self, table: int, key: bytes, row: Row) -> None:
        rest = REST.pack(row.peer, row.timeout_ms, row.verdicts)
        self.writers[table]._store(key, rest, row.seen_ms, row.rules)

    def allow_pair(self, peer: PeerRef = ONE) -> None:
        """As control says it."""
        pair = Pair(peer, outbound=True, inbound=True, rules_generation=RULES)
        self.control.allow_pair(LOCAL, REMOTE, pair, LIFE_MS, NOW)

    def tear(self, table: int, key: bytes) -> None:
        """Have the writer of that table begin to write this key's row, and end no more."""
        memory = self.writers[table]._memory
        bucket, tag = memory.place(key)
        found = memory.find(bucket, memory.tags(bucket), tag, key)
        assert found is not None
        number, _ = found
        memory.halves[(ROWS_AT + 512 * bucket + 64 + 64 * number) // 4] |= 1

    def row(self, table: int, key: FlowKey) -> Row | None:
        found = self.writers[table]._memory.row(pack_key(key))
        return None if found is None else Row(*found[1:])

    def ask(self, key: FlowKey, now_ms: int = NOW) -> Answers:
        """What our reader says of a packet to the peer, and then of one of the first peer's."""
        return self.reader.outbound(key, now_ms), self.reader.inbound(key, ONE, now_ms)

    @property
    def counts(self) -> tuple[int, int]:
        """How many flows our reader admitted, and how many made room for them."""
        counted = StatsPage(self.pages[OURS].read_only, writable=False).snapshot()
        return counted["mp.flows.admitted"], counted["mp.flows.evicted"]

    def everything(self) -> list[bytes]:
        return [contents(each) for each in self.tables.regions()]

    def untouchable(self) -> list[bytes]:
        """All that our reader must never write: everything but its table and last-seen words."""
        kept = [contents(self.tables.flows[OURS])[: 8 * USED]]
        kept += [contents(each)[:ROWS_AT] for each in self.tables.seen]
        touched = {self.tables.flows[OURS].descriptor, *(each.descriptor for each in self.tables.seen)}
        kept += [contents(each) for each in self.tables.regions() if each.descriptor not in touched]
        return [*kept, contents(self.pages[NEIGHBOUR])]

    def close(self) -> None:
        self.tables.close()
        for page in self.pages:
            page.close()


def contents(region: Region) -> bytes:
    return os.pread(region.read_only, os.fstat(region.read_only).st_size, 0)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


# ---- what the pair allows


def test_a_flow_that_no_table_knows_is_for_control(site: Site) -> None:
    before = site.everything()

    assert site.ask(flow()) == UNKNOWN
    assert site.everything() == before
    assert site.counts == (0, 0)


@pytest.mark.parametrize("inbound", [False, True])
def test_a_flow_that_the_pair_allows_is_admitted_and_says_which_way_it_began(
    site: Site, inbound: bool
) -> None:
    site.allow_pair()
    untouchable = site.untouchable()

    if inbound:
        assert site.reader.inbound(flow(), ONE, NOW + 7) is True
    else:
        assert site.reader.outbound(flow(), NOW + 7) == ONE

    verdicts = BOTH | (FROM_IN if inbound else FROM_OUT)
    assert site.row(OURS, flow()) == Row(RULES, ONE, TCP_MS, verdicts, NOW + 7)
    assert site.counts == (1, 0)
    assert site.untouchable() == untouchable


def test_what_was_admitted_is_known_both_ways_without_the_pair(site: Site) -> None:
    site.allow_pair()
    site.reader.outbound(flow(), NOW)
    assert site.control.remove_pair(LOCAL, REMOTE, ONE)

    assert site.ask(flow(), NOW + TCP_MS - 1) == ALLOWED
    assert site.ask(flow(2)) == UNKNOWN
    assert site.ask(flow(), NOW + 2 * TCP_MS - 1) == UNKNOWN
    assert site.counts == (1, 0)


def test_what_one_reader_admitted_the_other_one_finds(site: Site) -> None:
    site.allow_pair()
    site.reader.outbound(flow(), NOW)
    neighbour = site.attach(NEIGHBOUR)

    assert neighbour.inbound(flow(), ONE, NOW) is True
    assert neighbour.outbound(flow(), NOW) == ONE

    assert site.row(NEIGHBOUR, flow()) is None
    assert site.counts == (1, 0)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (ALLOW_OUT, (ONE, None)),
        (ALLOW_IN, (None, True)),
        (ALLOW_OUT | REFUSE_IN, (ONE, None)),
        (REFUSE_BOTH, UNKNOWN),
        (3 | 3 << 2, UNKNOWN),
        (FROM_OUT | FROM_IN, UNKNOWN),
    ],
)
def test_a_pair_allows_flows_begun_in_the_direction_that_it_names(
    site: Site, verdicts: int, expected: Answers
) -> None:
    site.put_pair(ROW._replace(verdicts=verdicts))

    assert (site.reader.outbound(flow(1), NOW), site.reader.inbound(flow(2), ONE, NOW)) == expected
    assert site.counts == (int(expected != UNKNOWN), 0)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(ROW._replace(seen_ms=NOW - 16_000), id="expired"),
        pytest.param(ROW._replace(rules=RULES - 1), id="of older rules"),
        pytest.param(ROW._replace(rules=RULES + 1), id="of rules to come"),
        pytest.param(None, id="half written"),
    ],
)
def test_a_pair_that_does_not_hold_admits_nothing(site: Site, pair: Row | None) -> None:
    site.put_pair(pair or ROW)
    if pair is None:
        site.tear(CONTROL, pack_pair(LOCAL, REMOTE))
    before = site.everything()

    assert site.ask(flow()) == UNKNOWN
    assert site.everything() == before

    site.put_pair()
    assert site.ask(flow()) == ALLOWED


def test_a_pair_is_not_refreshed_by_what_it_admits(site: Site) -> None:
    site.allow_pair()
    last = NOW + LIFE_MS - 1

    assert [site.ask(flow(1), at) for at in (NOW + 2000, last)] == [ALLOWED, ALLOWED]
    assert site.ask(flow(2), last) == ALLOWED
    assert site.ask(flow(3), last + 1) == UNKNOWN
    assert site.ask(flow(2), last + 1) == ALLOWED


@pytest.mark.parametrize("table", [OURS, NEIGHBOUR])
def test_only_control_speaks_of_pairs(site: Site, table: int) -> None:
    site.put_pair(table=table)

    assert site.ask(flow()) == UNKNOWN


def test_a_pair_is_of_all_packets_between_its_two_addresses_and_of_no_others(site: Site) -> None:
    site.allow_pair()
    within = [
        flow(65_535, UDP),
        flow(0, ICMP)._replace(remote_port=0),
        flow(0, UDP)._replace(remote_port=0, fragment=True),
    ]
    beyond = [
        flow()._replace(local=bytes([10, 0, 0, 3])),
        flow()._replace(remote=bytes([10, 0, 0, 3])),
        flow()._replace(local=REMOTE, remote=LOCAL),
        flow()._replace(local=LOCAL.ljust(16, b"\0"), remote=REMOTE.ljust(16, b"\0")),
    ]

    assert [site.ask(each) for each in within] == [ALLOWED] * 3
    assert [site.ask(each) for each in beyond] == [UNKNOWN] * 4


def test_a_pair_of_ipv6_addresses_allows_what_is_between_them(site: Site) -> None:
    local, remote = bytes([0xFD, *range(1, 16)]), bytes([0xFD, *range(2, 17)])
    pair = Pair(TWO, outbound=True, inbound=False, rules_generation=RULES)
    site.control.allow_pair(local, remote, pair, LIFE_MS, NOW)
    key = flow()._replace(local=local, remote=remote)

    assert site.reader.outbound(key, NOW) == TWO
    assert site.reader.outbound(key._replace(local=local[:4], remote=remote[:4]), NOW) is None


def test_a_pair_of_another_peer_admits_nothing_inbound(site: Site) -> None:
    site.allow_pair(TWO)
    before = site.everything()

    assert site.reader.inbound(flow(), ONE, NOW) is None
    assert site.everything() == before
    assert site.reader.outbound(flow(), NOW) == TWO


def test_a_pair_whose_peer_has_no_tunnel_admits_nothing_outbound(site: Site) -> None:
    site.allow_pair(GONE)
    before = site.everything()

    assert site.reader.outbound(flow(), NOW) is None
    assert site.everything() == before
    # What comes through a tunnel came through one.
    assert site.reader.inbound(flow(), GONE, NOW) is True


def test_a_pair_is_removed_only_as_that_of_its_peer(site: Site) -> None:
    site.allow_pair()

    assert not site.control.remove_pair(LOCAL, REMOTE, TWO)
    assert not site.control.remove_pair(REMOTE, LOCAL, ONE)
    assert site.ask(flow(1)) == ALLOWED
    assert site.control.remove_pair(LOCAL, REMOTE, ONE)
    assert not site.control.remove_pair(LOCAL, REMOTE, ONE)
    assert site.ask(flow(2)) == UNKNOWN


# ---- several tables


@pytest.mark.parametrize(("refusing", "allowing"), [*itertools.permutations(range(3), 2)])
def test_a_refusal_loses_against_an_allowance_of_any_table(site: Site, refusing: int, allowing: int) -> None:
    site.put(refusing, flow(), ROW._replace(verdicts=REFUSE_BOTH))
    assert site.ask(flow()) == REFUSES

    site.put(allowing, flow())

    assert site.ask(flow()) == ALLOWED
    assert site.counts == (0, 0)


@pytest.mark.parametrize("table", range(3))
def test_a_refusal_wins_over_the_pair_while_it_holds(site: Site, table: int) -> None:
    site.allow_pair()
    site.put(table, flow(), ROW._replace(verdicts=REFUSE_BOTH, timeout_ms=1000))

    assert site.ask(flow(), NOW + 999) == REFUSES
    assert site.counts == (0, 0)
    assert site.ask(flow(), NOW + 1000) == ALLOWED
    assert site.counts == (1, 0)


def test_a_refusal_of_one_direction_says_nothing_of_the_other(site: Site) -> None:
    site.allow_pair()
    site.control.refuse(flow(1), ONE, NOW, inbound=True)
    site.control.refuse(flow(2), ONE, NOW, inbound=False)

    assert [site.reader.inbound(flow(1), ONE, NOW), site.reader.outbound(flow(2), NOW)] == [False, REFUSED]
    assert [site.reader.outbound(flow(1), NOW), site.reader.inbound(flow(2), ONE, NOW)] == [ONE, True]


def test_another_peers_refusal_is_not_of_this_packet(site: Site) -> None:
    site.allow_pair()
    site.control.refuse(flow(), TWO, NOW, inbound=True)

    assert site.reader.inbound(flow(), ONE, NOW) is True
    assert site.counts == (1, 0)


@pytest.mark.parametrize("first", range(3))
def test_the_first_table_that_allows_a_flow_says_whose_it_is(site: Site, first: int) -> None:
    for table in ORDER[first:]:
        site.put(table, flow(), ROW._replace(peer=ONE if table == ORDER[first] else TWO))

    assert site.reader.outbound(flow(), NOW) == ONE


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("inbound", [False, True])
def test_a_packet_is_noted_in_the_table_that_allowed_it(site: Site, first: int, inbound: bool) -> None:
    old = ROW._replace(seen_ms=NOW - 1000)
    for table in ORDER[first:]:
        site.put(table, flow(), old)
    untouchable = site.untouchable()

    if inbound:
        site.reader.inbound(flow(), ONE, NOW)
    else:
        site.reader.outbound(flow(), NOW)

    rows = [site.row(table, flow()) for table in ORDER]
    assert rows == [None] * first + [ROW] + [old] * (2 - first)
    assert site.untouchable() == untouchable


@pytest.mark.parametrize("table", range(3))
@pytest.mark.parametrize("row", [ROW._replace(rules=RULES - 1), ROW._replace(seen_ms=NOW - 16_000)])
def test_a_row_that_does_not_hold_says_nothing(site: Site, table: int, row: Row) -> None:
    site.put(table, flow(), row)

    assert site.ask(flow()) == UNKNOWN


@pytest.mark.parametrize("table", range(3))
def test_another_peers_packet_of_a_known_flow_is_for_control(site: Site, table: int) -> None:
    site.put(table, flow(), ROW._replace(peer=TWO))

    assert site.reader.inbound(flow(), ONE, NOW) is None
    assert site.counts == (0, 0)


# ---- peers that come and go


def test_a_flow_whose_peer_has_no_tunnel_any_more_is_healed_by_the_pair(site: Site) -> None:
    site.put(OURS, flow(), ROW._replace(peer=GONE))
    site.allow_pair()

    assert site.reader.outbound(flow(), NOW) == ONE

    assert site.row(OURS, flow()) == ADMITTED
    assert site.counts == (1, 0)


@pytest.mark.parametrize("table", [CONTROL, NEIGHBOUR])
def test_a_stale_flow_of_another_table_is_healed_in_the_own_one(site: Site, table: int) -> None:
    stale = ROW._replace(peer=GONE)
    site.put(table, flow(), stale)
    assert site.reader.inbound(flow(), GONE, NOW) is True  # so it is known not to be in the own table
    site.allow_pair()

    assert site.ask(flow()) == ALLOWED

    assert (site.row(OURS, flow()), site.row(table, flow())) == (ADMITTED, stale)
    assert site.counts == (1, 0)


def test_a_stale_flow_goes_to_control_with_its_peer_if_nobody_knows_better(site: Site) -> None:
    site.put(OURS, flow(), ROW._replace(peer=GONE))
    site.put(NEIGHBOUR, flow(), ROW._replace(peer=PeerRef(2 << 32)))
    assert site.reader.outbound(flow(), NOW) == GONE
    site.allow_pair(GONE)
    assert site.reader.outbound(flow(), NOW) == GONE
    assert site.counts == (0, 0)

    site.put(CONTROL, flow(), ROW._replace(verdicts=REFUSE_OUT))
    assert site.reader.outbound(flow(), NOW) == REFUSED
    site.put(NEIGHBOUR, flow(), ROW._replace(peer=TWO))
    assert site.reader.outbound(flow(), NOW) == TWO
    assert site.counts == (0, 0)


def test_a_flow_that_was_admitted_follows_its_address_to_the_peer_that_has_it_now(site: Site) -> None:
    site.allow_pair()
    assert site.reader.outbound(flow(), NOW) == ONE

    site.peers.remove(ONE)
    site.allow_pair(TWO)

    assert site.reader.outbound(flow(), NOW) == TWO
    assert site.reader.inbound(flow(), TWO, NOW) is True
    assert site.reader.inbound(flow(), ONE, NOW) is None
    assert site.counts == (2, 0)


def test_a_packet_of_another_peer_takes_the_flow_over_if_the_pair_is_of_that_peer(site: Site) -> None:
    site.put(OURS, flow(), ROW._replace(peer=TWO))
    assert site.reader.inbound(flow(), ONE, NOW) is None
    site.allow_pair()

    assert site.reader.inbound(flow(), ONE, NOW) is True

    assert site.row(OURS, flow()) == ADMITTED._replace(verdicts=BOTH | FROM_IN)
    assert site.reader.outbound(flow(), NOW) == ONE


@pytest.mark.parametrize("table", [CONTROL, NEIGHBOUR])
@pytest.mark.parametrize(
    ("said", "origin"),
    [(FROM_OUT, FROM_OUT), (FROM_IN, FROM_IN), (0, FROM_IN), (FROM_OUT | FROM_IN, FROM_IN)],
)
@pytest.mark.parametrize(
    "own",
    [
        pytest.param(Row(peer=TWO, verdicts=BOTH | FROM_OUT), id="holds"),
        pytest.param(Row(rules=RULES - 1, peer=TWO, verdicts=0, seen_ms=0), id="is whole and no more"),
    ],
)
def test_an_own_row_that_contradicts_the_table_that_allows_a_packet_is_replaced(
    site: Site, table: int, said: int, origin: int, own: Row
) -> None:
    site.put(OURS, flow(), own)
    site.put(table, flow(), ROW._replace(verdicts=BOTH | said))
    untouchable = site.untouchable()

    assert site.reader.inbound(flow(), ONE, NOW) is True

    assert site.row(OURS, flow()) == ADMITTED._replace(verdicts=BOTH | origin)
    assert site.reader.outbound(flow(), NOW) == ONE
    assert site.counts == (1, 0)
    assert site.untouchable() == untouchable


@pytest.mark.parametrize(
    ("own", "is_torn"),
    [
        pytest.param(None, False, id="none"),
        pytest.param(ROW._replace(rules=RULES - 1), False, id="of the same peer"),
        pytest.param(ROW._replace(peer=TWO), True, id="half written"),
    ],
)
def test_a_flow_of_another_table_is_not_copied_for_want_of_an_own_row(
    site: Site, own: Row | None, is_torn: bool
) -> None:
    if own is not None:
        site.put(OURS, flow(), own)
    if is_torn:
        site.tear(OURS, pack_key(flow()))
    site.put(NEIGHBOUR, flow())
    before = site.everything()

    assert [site.ask(flow()) for _ in range(3)] == [ALLOWED] * 3
    assert site.everything() == before


def test_an_own_row_of_the_same_peer_goes_on_being_asked(site: Site) -> None:
    site.put(OURS, flow(), ROW._replace(verdicts=ALLOW_OUT))
    site.put(NEIGHBOUR, flow(), ROW._replace(verdicts=ALLOW_IN))

    assert [site.ask(flow()) for _ in range(3)] == [ALLOWED] * 3
    assert site.counts == (0, 0)


def test_a_flow_that_only_another_table_had_is_found_in_the_own_one_once_it_is_there(site: Site) -> None:
    site.put(NEIGHBOUR, flow())
    assert site.ask(flow()) == ALLOWED
    site.writers[NEIGHBOUR].remove(flow())
    assert site.ask(flow()) == UNKNOWN
    site.allow_pair()
    assert site.ask(flow()) == ALLOWED

    site.control.remove_pair(LOCAL, REMOTE, ONE)

    assert site.ask(flow()) == ALLOWED
    assert site.counts == (1, 0)


def test_however_many_flows_only_another_table_has_all_are_found_and_their_change_too(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nebula_mp.shm_admission._NOT_OWN_MAX", 8)
    flows = [flow(port) for port in range(20)]
    for each in flows:
        site.put(NEIGHBOUR, each)
    assert [site.ask(each) for each in flows * 2] == [ALLOWED] * 40
    assert len(site.reader._not_own) <= 8

    site.peers.remove(ONE)
    site.allow_pair(TWO)

    assert [site.reader.outbound(each, NOW) for each in flows * 2] == [TWO] * 40
    assert site.counts == (20, 0)


# ---- which way a flow began


@pytest.mark.parametrize("table", range(3))
@pytest.mark.parametrize(
    ("verdicts", "pair", "origin"),
    [
        pytest.param(BOTH | FROM_IN, BOTH, (False, FROM_IN), id="began inbound"),
        pytest.param(BOTH | FROM_OUT, BOTH, (True, FROM_OUT), id="began outbound"),
        pytest.param(ALLOW_OUT | FROM_IN, BOTH, (False, FROM_IN), id="allowed outbound only"),
        pytest.param(ALLOW_IN | FROM_IN, BOTH, (False, FROM_IN), id="allowed inbound only"),
        pytest.param(BOTH | FROM_IN, ALLOW_OUT, (False, FROM_OUT), id="may not begin inbound any more"),
        pytest.param(BOTH | FROM_OUT, ALLOW_IN, (True, FROM_IN), id="may not begin outbound any more"),
        pytest.param(BOTH, BOTH, (False, FROM_OUT), id="not said"),
        pytest.param(BOTH | FROM_OUT | FROM_IN, BOTH, (True, FROM_IN), id="nonsense"),
        pytest.param(FROM_IN, BOTH, (False, FROM_OUT), id="no verdict"),
        pytest.param(REFUSE_BOTH | FROM_IN, BOTH, (False, FROM_OUT), id="refused"),
    ],
)
def test_a_flow_stays_whose_it_was_over_a_change_of_rules_that_allow_it(
    site: Site, table: int, verdicts: int, pair: int, origin: tuple[bool, int]
) -> None:
    site.put(table, flow(), Row(rules=RULES - 1, verdicts=verdicts, seen_ms=NOW - 15_999))
    site.put_pair(ROW._replace(verdicts=pair))
    inbound, began = origin

    answer = site.reader.inbound(flow(), ONE, NOW) if inbound else site.reader.outbound(flow(), NOW)

    assert answer == (True if inbound else ONE)
    assert site.row(OURS, flow()) == ADMITTED._replace(verdicts=BOTH | began)
    assert site.counts == (1, 0)


@pytest.mark.parametrize("is_torn", [False, True])
@pytest.mark.parametrize("table", range(3))
def test_a_flow_that_had_expired_or_was_never_written_whole_has_no_origin(
    site: Site, table: int, is_torn: bool
) -> None:
    seen_ms = NOW - 15_999 if is_torn else NOW - 16_000
    site.put(table, flow(), Row(rules=RULES - 1, verdicts=BOTH | FROM_IN, seen_ms=seen_ms))
    if is_torn:
        site.tear(table, pack_key(flow()))
    site.allow_pair()

    assert site.reader.outbound(flow(), NOW) == ONE
    assert site.row(OURS, flow()) == ADMITTED


@pytest.mark.parametrize("first", range(3))
def test_the_origin_is_that_of_the_first_table_that_says_one(site: Site, first: int) -> None:
    for number, table in enumerate(ORDER):
        origin = 0 if number < first else FROM_IN if number == first else FROM_OUT
        site.put(table, flow(), Row(rules=RULES - 1, verdicts=BOTH | origin))
    site.allow_pair()

    assert site.reader.outbound(flow(), NOW) == ONE
    assert site.row(OURS, flow()) == ADMITTED._replace(verdicts=BOTH | FROM_IN)


def test_what_is_admitted_is_of_the_rules_that_the_pair_is_of(site: Site) -> None:
    site.allow_pair()
    assert site.reader.inbound(flow(), ONE, NOW) is True

    site.control.set_rules_generation(RULES + 1)
    assert site.ask(flow()) == UNKNOWN
    site.allow_pair()
    assert site.ask(flow()) == ALLOWED

    assert site.row(OURS, flow()) == Row(RULES + 1, ONE, TCP_MS, BOTH | FROM_IN, NOW)
    assert site.counts == (2, 0)


# ---- how long, and for whom there is room


@pytest.mark.parametrize(
    ("protocol", "timeout_ms"),
    [(TCP, TCP_MS), (UDP, UDP_MS), (ICMP, OTHER_MS), (58, OTHER_MS), (0, OTHER_MS), (255, OTHER_MS)],
)
def test_how_long_an_admitted_flow_may_rest_is_a_matter_of_its_protocol(
    site: Site, protocol: int, timeout_ms: int
) -> None:
    site.allow_pair()
    key = flow(7, protocol)
    assert site.ask(key) == ALLOWED
    site.control.remove_pair(LOCAL, REMOTE, ONE)

    assert site.row(OURS, key) == ADMITTED._replace(timeout_ms=timeout_ms)
    assert site.reader.outbound(key, NOW + timeout_ms) is None
    assert site.reader.outbound(key, NOW + timeout_ms - 1) == ONE


def test_a_timeout_longer_than_a_row_can_say_is_the_longest_it_can(site: Site) -> None:
    site.allow_pair()
    site.control.set_timeouts(2**32 + 5, UDP_MS, OTHER_MS)
    assert site.ask(flow(1)) == ALLOWED
    site.rules.words[TIMEOUTS] = 1 << 32
    assert site.ask(flow(2)) == ALLOWED

    rows = [site.row(OURS, flow(port)) for port in (1, 2)]
    assert rows == [ADMITTED._replace(timeout_ms=2**32 - 1)] * 2


BUSY, IDLE = ROW, ROW._replace(seen_ms=NOW - 3000)


@pytest.mark.parametrize(
    ("protocol", "row", "evicted"),
    [
        pytest.param(TCP, BUSY._replace(rules=RULES - 1), 0, id="of older rules"),
        pytest.param(TCP, BUSY._replace(seen_ms=NOW - 16_000), 0, id="expired"),
        pytest.param(TCP, BUSY._replace(verdicts=REFUSE_IN), 0, id="a refusal"),
        pytest.param(UDP, IDLE, 1, id="idle"),
        pytest.param(TCP, IDLE, 1, id="idle TCP"),
        pytest.param(UDP, BUSY._replace(seen_ms=NOW - 1), 1, id="the longest without a packet"),
    ],
)
def test_a_flow_that_made_room_before_it_expired_is_counted(protocol: int, row: Row, evicted: int) -> None:
    site = Site(buckets=1)
    site.allow_pair()
    for port in range(BUCKET_ROWS):
        victim = port == 4
        site.put(OURS, flow(port, protocol if victim else TCP), row if victim else BUSY)

    assert site.reader.outbound(flow(99), NOW) == ONE

    assert site.row(OURS, flow(99)) == ADMITTED
    assert site.row(OURS, flow(4, protocol)) is None
    assert all(site.row(OURS, flow(port)) == BUSY for port in range(BUCKET_ROWS) if port != 4)
    assert site.counts == (1, evicted)
    site.close()


def test_a_pair_that_lies_in_the_own_table_makes_room_like_a_refusal() -> None:
    site = Site(buckets=1)
    site.allow_pair()
    site.put_pair(table=OURS)
    for port in range(6):
        site.put(OURS, flow(port, UDP), IDLE)

    assert site.reader.outbound(flow(99), NOW) == ONE

    assert all(site.row(OURS, flow(port, UDP)) == IDLE for port in range(6))
    assert site.counts == (1, 0)
    site.close()


def test_flows_that_are_admitted_again_and_again_are_counted_each_time(site: Site) -> None:
    site.allow_pair()

    for number in range(5):
        site.reader.outbound(flow(number), NOW)
        site.reader.inbound(flow(number), ONE, NOW)
    for number in range(3):
        site.control.set_rules_generation(RULES + 1 + number)
        site.allow_pair()
        site.reader.outbound(flow(0), NOW)

    assert site.counts == (8, 0)


# ---- what others may have written


@pytest.mark.parametrize("table", [CONTROL, NEIGHBOUR])
@pytest.mark.parametrize("has_pair", [False, True])
def test_a_half_written_row_of_another_table_is_a_miss(site: Site, table: int, has_pair: bool) -> None:
    if has_pair:
        site.allow_pair()
    site.put(table, flow(), ROW._replace(peer=TWO))
    assert site.reader.outbound(flow(), NOW) == TWO

    site.tear(table, pack_key(flow()))

    assert site.ask(flow()) == (ALLOWED if has_pair else UNKNOWN)
    assert site.counts == (int(has_pair), 0)


def noise(choose: random.Random) -> Row:
    return Row(
        rules=choose.choice([RULES, RULES, RULES, RULES - 1, 0, 2**32 - 1]),
        peer=choose.choice([ONE, TWO, GONE, 0, 2**64 - 1, 1 << 32 | 8, 2**32 - 1]),
        timeout_ms=choose.choice([0, 1, 16_000, 2**32 - 1]),
        verdicts=choose.getrandbits(32),
        seen_ms=choose.choice([0, NOW - 1, NOW, NOW + 1, 1 << 63, 2**64 - 1]),
    )


def test_whatever_others_write_a_reader_answers_and_writes_nothing_but_its_own() -> None:
    choose = random.Random(7)
    site, admitted = Site(buckets=2), 0
    for _ in range(300):
        for table in range(3):
            for _ in range(6):
                number = choose.randrange(4)
                if number:
                    site.put(table, flow(number), noise(choose))
                else:
                    site.put_pair(noise(choose), table=table)
                if choose.random() < 0.2:
                    site.tear(table, pack_key(flow(number)) if number else pack_pair(LOCAL, REMOTE))
        if choose.random() < 0.5:
            site.put_pair()
        site.rules.words[RULES_GENERATION] = choose.choice([RULES, RULES, RULES, 0, 2**64 - 1])
        for each in range(3):
            site.rules.words[TIMEOUTS + each] = choose.choice([0, 16_000, 2**64 - 1])
        untouchable = site.untouchable()
        reader = choose.choice([site.reader, site.attach(OURS)])

        for _ in range(8):
            key, now_ms = flow(choose.randrange(6)), choose.choice([NOW, NOW, 0, 1 << 62])
            peer = PeerRef(choose.choice([ONE, TWO, 0, 2**64 - 1]))
            outbound = reader.outbound(key, now_ms)
            inbound = reader.inbound(key, peer, now_ms)
            assert outbound is None or 0 <= outbound < 2**64
            assert inbound in (None, False, True)

        assert site.untouchable() == untouchable
        admitted = site.counts[0]
    assert admitted > 100
    site.close()


# ---- a reader that is killed


def new(site: Site) -> Site:
    """A flow for which there is a row that was never used."""
    site.allow_pair()
    return site


def crowded(site: Site) -> Site:
    """A flow that another one makes room for."""
    site.allow_pair()
    for port in range(2, 2 + BUCKET_ROWS):
        site.put(OURS, flow(port, UDP), IDLE)
    return site


def healed(site: Site) -> Site:
    """A flow that had another peer."""
    site.allow_pair()
    site.put(OURS, flow(1), ROW._replace(peer=GONE))
    return site


def settled(site: Site) -> Site:
    """A flow that another table has with another peer."""
    site.put(OURS, flow(1), ROW._replace(peer=GONE))
    site.put(NEIGHBOUR, flow(1))
    return site


def sequences(site: Site) -> list[int]:
    halves = memoryview(contents(site.tables.flows[OURS])).cast("I")
    return [halves[(ROWS_AT + 64 + 64 * row) // 4] for row in range(BUCKET_ROWS)]


@pytest.mark.parametrize(
    ("state", "inbound"),
    [*itertools.product([new, crowded, healed], [False, True]), (settled, True)],
)
def test_a_reader_killed_at_any_store_leaves_a_table_that_all_others_and_its_successor_can_use(
    state: Callable[[Site], Site], inbound: bool
) -> None:
    at, killed = 0, True
    while killed:
        site = state(Site(buckets=1))
        untouchable = site.untouchable()
        reader, moment = site.reader, Countdown(at)
        watch(reader._own._memory, "data words halves seen", load=nothing, store=moment)
        watch(reader._stats, "_words", load=nothing, store=moment)
        try:
            if inbound:
                reader.inbound(flow(1), ONE, NOW)
            else:
                reader.outbound(flow(1), NOW)
            killed = False
        except KilledError:
            pass

        assert site.untouchable() == untouchable
        assert sum(each & 1 for each in sequences(site)) <= 1
        found = site.row(OURS, flow(1))
        was = {None} if state in (new, crowded) else {None, ROW._replace(peer=GONE)}
        origin = FROM_IN if inbound else FROM_OUT
        assert found in {*was, ADMITTED._replace(verdicts=BOTH | origin)}
        site.allow_pair()
        neighbour = site.attach(NEIGHBOUR)
        assert neighbour.outbound(flow(1), NOW) == ONE
        assert neighbour.inbound(flow(1), ONE, NOW) is True

        site.reader = site.attach(OURS)
        for port in (1, *range(20, 20 + BUCKET_ROWS)):
            assert site.ask(flow(port)) == ALLOWED
        assert [each % 2 for each in sequences(site)] == [0] * BUCKET_ROWS
        assert all(site.row(OURS, flow(port)) == ADMITTED for port in range(20, 20 + BUCKET_ROWS))
        site.close()
        at += 1
    assert at > 8


def test_what_readers_admit_is_never_seen_wrong_while_they_are_killed() -> None:
    site = Site(buckets=2)
    words = shared_words(3)  # packets of two readers that passed, and their starts
    remotes = [bytes([10, 0, 1, number]) for number in range(2)]
    for remote, peer in zip(remotes, (ONE, TWO), strict=True):
        pair = Pair(peer, outbound=True, inbound=True, rules_generation=RULES)
        site.control.allow_pair(LOCAL, remote, pair, LIFE_MS, NOW)
    keys = [
        FlowKey(LOCAL, remotes[port % 2], port, 443, (TCP, UDP)[port % 3 == 0], fragment=False)
        for port in range(60)
    ]

    def read(number: int) -> None:
        reader = site.attach(number)
        words[2] += 1
        choose = random.Random(words[2])
        while True:
            key = choose.choice(keys)
            peer, other = (ONE, TWO) if key.local_port % 2 == 0 else (TWO, ONE)
            assert reader.inbound(key, other, NOW) is None
            if choose.random() < 0.5:
                assert reader.outbound(key, NOW) == peer
            else:
                assert reader.inbound(key, peer, NOW) is True
            words[number] += 1

    kills = 0
    with children(lambda: read(0), lambda: read(1)) as running:
        for _ in until(2):
            time.sleep(0.03)
            victim = kills % 2
            running[victim].kill()
            running[victim] = running[victim].next()
            kills += 1
    assert kills > 10
    assert min(words[0], words[1]) > 1000
    assert [each for each in keys if site.reader.outbound(each, NOW) not in (ONE, TWO)] == []
    site.close()
