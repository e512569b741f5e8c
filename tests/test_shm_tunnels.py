import dataclasses
import functools
import random
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.crypto.aead import Aead
from nebula_mp.errors import RingError
from nebula_mp.newtypes import Cipher, RelayIndex, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm_counters import Refusal
from nebula_mp.shm_table import KEYS, TUNNELS, PeerRef, Tables
from nebula_mp.shm_tunnels import TunnelFields, TunnelRow, TunnelState, TunnelTable, TunnelView, UnderlayView
from tests.support.forked import children, shared_words, until
from tests.support.tables import (
    RECEIVE_KEY,
    ROWS,
    SEND_KEY,
    control_counters,
    fields,
    read_only,
    small,
    tunnel_table,
    writable,
)
from tests.support.watched import Countdown, KilledError, nothing, watch

Keys = tuple[bytes, bytes]
OTHER_SEND, OTHER_RECEIVE = bytes(range(51, 83)), bytes(range(151, 183))
PAGE = 4096


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = small()
    yield tables
    tables.close()


def copy_keys(cipher: Cipher, send_key: memoryview, receive_key: memoryview) -> Keys:
    return bytes(send_key), bytes(receive_key)


class Clock:
    """Goes on by `step` with each look at it."""

    def __init__(self, step: float = 0.0004) -> None:
        self.step, self.looks = step, 0

    def __call__(self) -> Seconds:
        self.looks += 1
        return Seconds(self.looks * self.step)


def view_of(tables: Tables, clock: Clock | None = None) -> TunnelView[Keys]:
    return TunnelView(
        read_only(tables.tunnels, TUNNELS), read_only(tables.keys, KEYS), copy_keys, clock or Clock()
    )


def stated(row: TunnelRow[Keys] | None) -> TunnelFields | None:
    """What a snapshot says, without what the reader added."""
    if row is None:
        return None
    return TunnelFields(*(getattr(row, each.name) for each in dataclasses.fields(TunnelFields)))


def key_memory(tables: Tables) -> bytes:
    return bytes(read_only(tables.keys, KEYS).data[PAGE:])


def all_memory(tables: Tables) -> bytes:
    return b"".join(
        bytes(read_only(region, region.layout).data)
        for region in tables.regions()
        if region not in tables.flows
    )


def holds_a_part_of(memory: bytes, *keys: bytes) -> bool:
    return any(key[at : at + 8] in memory for key in keys for at in range(0, 32, 8))


addresses = st.builds(UdpAddr, st.ip_addresses(), st.integers(0, 65_535))
sources = st.frozensets(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), max_size=3)


def any_fields(row: int) -> st.SearchStrategy[TunnelFields]:
    return st.builds(
        TunnelFields,
        st.integers(0, 65_535).map(lambda high: TunnelIndex(high << 16 | row)),
        st.integers(0, 2**32 - 1).map(TunnelIndex),
        st.sampled_from([TunnelState.CANDIDATE, TunnelState.PROVEN]),
        st.sampled_from(Cipher),
        st.integers(0, 65_535),
        st.integers(0, 2**64 - 1).map(PeerRef),
        st.none() | addresses,
        st.none() | sources,
        st.none() | st.integers(1, 2**32 - 1).map(RelayIndex),
    )


@given(any_fields(5), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_reader_sees_each_tunnel_as_control_stated_it(
    tunnel: TunnelFields, send: bytes, receive: bytes
) -> None:
    tables = small()
    table = tunnel_table(tables)

    generation = table.open(tunnel, send, receive)

    seen = view_of(tables).get(tunnel.local_index)
    assert seen is not None
    assert stated(seen) == tunnel == table.fields(tunnel.local_index)
    assert seen.ciphers == (send, receive)
    assert seen.generation == generation == 1
    assert UnderlayView(read_only(tables.tunnels, TUNNELS)).get(5) == tunnel.underlay
    tables.close()


def test_more_sources_than_a_row_has_room_for_are_left_to_control(tables: Tables) -> None:
    tunnel = fields(sources=frozenset(bytes([10, 0, 0, each]) for each in range(4)))

    tunnel_table(tables).open(tunnel, SEND_KEY, RECEIVE_KEY)

    seen = view_of(tables).get(tunnel.local_index)
    assert seen is not None
    assert seen.sources is None


operations = st.lists(
    st.tuples(
        st.integers(0, 3),  # row
        st.sampled_from(["open", "update", "close", "look", "sweep"]),
        st.integers(0, 2),  # which of a few indexes and values
    ),
    max_size=40,
)


@given(operations)
def test_any_walk_of_opens_updates_and_closes_is_seen_as_by_a_dictionary(
    walk: list[tuple[int, str, int]],
) -> None:
    tables = small()
    table, eager, lazy = tunnel_table(tables), view_of(tables), view_of(tables)
    model: dict[int, tuple[TunnelFields, Keys, int]] = {}
    generations = dict.fromkeys(range(4), 0)
    for row, operation, variant in walk:
        tunnel = fields(row, high=variant, owner=variant, port=4000 + len(model), sources=None)
        match operation:
            case "open" if row not in model:
                keys = (bytes([row, variant] * 16), bytes([variant, row] * 16))
                generations[row] += 1
                model[row] = tunnel, keys, generations[row]
                assert table.open(tunnel, *keys) == generations[row]
            case "update" if row in model:
                old, keys, generation = model[row]
                tunnel = dataclasses.replace(tunnel, local_index=old.local_index)
                model[row] = tunnel, keys, generation
                table.update(tunnel)
            case "close" if row in model:
                table.close(model.pop(row)[0].local_index)
            case "look":
                expect(lazy, model, TunnelIndex(variant << 16 | row))
            case "sweep":
                lazy.sweep()
        for high in range(3):
            expect(eager, model, TunnelIndex(high << 16 | row))
        assert set(table) == {tunnel.local_index for tunnel, _, _ in model.values()}
        assert table.recover() == ()
    tables.close()


def expect(
    view: TunnelView[Keys], model: dict[int, tuple[TunnelFields, Keys, int]], index: TunnelIndex
) -> None:
    tunnel, keys, generation = model.get(index & 0xFFFF, (None, None, None))
    seen = view.get(index)
    if tunnel is None or tunnel.local_index != index:
        assert seen is None
    else:
        assert seen is not None
        assert (stated(seen), seen.ciphers, seen.generation) == (tunnel, keys, generation)


@pytest.mark.parametrize("index", [0, 3, 0xBEEF_0002, 0xBEEE_0003, 0xBEEF_0008, 0xBEEF_FFFF, 0xFFFF_FFFF])
def test_any_other_index_is_no_tunnel(tables: Tables, index: int) -> None:
    tunnel_table(tables).open(fields(3), SEND_KEY, RECEIVE_KEY)

    assert view_of(tables).get(index) is None


def test_a_made_up_index_costs_one_load_and_never_waits(tables: Tables) -> None:
    tunnel_table(tables).open(fields(3), SEND_KEY, RECEIVE_KEY)
    clock, loads = Clock(), Countdown(1000)
    view = view_of(tables, clock)
    watch(view, "_data _words _keys _indexes", load=loads, store=nothing)

    assert view.get(0xABCD_0003) is None

    assert (loads.calls, clock.looks) == (1, 0)


def test_a_row_that_did_not_change_is_recognised_by_one_load(tables: Tables) -> None:
    tunnel = fields(3)
    tunnel_table(tables).open(tunnel, SEND_KEY, RECEIVE_KEY)
    view, loads = view_of(tables), Countdown(1000)
    first = view.get(tunnel.local_index)
    watch(view, "_data _words _keys _indexes", load=loads, store=nothing)

    assert view.get(tunnel.local_index) is first

    assert loads.calls == 1


def test_ciphers_stay_the_same_through_updates_and_are_made_anew_for_the_next_tunnel(tables: Tables) -> None:
    table, tunnel, made = tunnel_table(tables), fields(3), []

    def build(cipher: Cipher, send_key: memoryview, receive_key: memoryview) -> Keys:
        made.append(bytes(send_key))
        return copy_keys(cipher, send_key, receive_key)

    view = TunnelView(read_only(tables.tunnels, TUNNELS), read_only(tables.keys, KEYS), build, Clock())
    table.open(tunnel, SEND_KEY, RECEIVE_KEY)
    view.get(tunnel.local_index)
    table.update(dataclasses.replace(tunnel, owner=0, underlay=None))
    view.get(tunnel.local_index)
    table.close(tunnel.local_index)
    table.open(tunnel, OTHER_SEND, OTHER_RECEIVE)
    view.get(tunnel.local_index)

    assert made == [SEND_KEY, OTHER_SEND]


@pytest.mark.parametrize("cipher", Cipher)
def test_ciphers_made_of_a_rows_keys_keep_them_when_the_row_is_wiped(tables: Tables, cipher: Cipher) -> None:
    # The reader gives the cryptography library a view of shared memory. Were the key schedule only made at
    # first use, packets would be sealed with whatever lies there then.
    table, tunnel = tunnel_table(tables), fields(3, cipher=cipher)
    table.open(tunnel, SEND_KEY, RECEIVE_KEY)
    view = TunnelView(
        read_only(tables.tunnels, TUNNELS),
        read_only(tables.keys, KEYS),
        lambda cipher, send, receive: (Aead(cipher, send), Aead(cipher, receive)),
        Clock(),
    )
    seen = view.get(tunnel.local_index)
    assert seen is not None

    table.close(tunnel.local_index)

    assert seen.ciphers[0].seal(3, b"ad", b"text") == Aead(cipher, SEND_KEY).seal(3, b"ad", b"text")
    assert seen.ciphers[1].seal(3, b"ad", b"text") == Aead(cipher, RECEIVE_KEY).seal(3, b"ad", b"text")


def test_after_a_close_no_part_of_the_keys_is_left_in_any_region(tables: Tables) -> None:
    table = tunnel_table(tables)
    table.open(fields(3), SEND_KEY, RECEIVE_KEY)
    table.open(fields(4), OTHER_SEND, OTHER_RECEIVE)
    assert holds_a_part_of(all_memory(tables), SEND_KEY)
    assert holds_a_part_of(all_memory(tables), RECEIVE_KEY)

    table.close(fields(3).local_index)

    assert not holds_a_part_of(all_memory(tables), SEND_KEY, RECEIVE_KEY)
    assert key_memory(tables) == bytes(4 * 64) + OTHER_SEND + OTHER_RECEIVE + bytes((ROWS - 5) * 64)


def test_what_writers_map_holds_no_key(tables: Tables) -> None:
    tunnel_table(tables).open(fields(3), SEND_KEY, RECEIVE_KEY)

    rows = bytes(read_only(tables.tunnels, TUNNELS).data)

    assert not holds_a_part_of(rows, SEND_KEY, RECEIVE_KEY)


def test_a_sweep_drops_the_ciphers_of_tunnels_that_ended_and_keeps_the_others(tables: Tables) -> None:
    table, view = tunnel_table(tables), view_of(tables)
    for row in (1, 2, 3):
        table.open(fields(row), SEND_KEY, RECEIVE_KEY)
        assert view.get(fields(row).local_index) is not None

    table.close(fields(2).local_index)

    assert view.sweep() == 1
    assert set(view._snapshots) == {1, 3}
    assert view.sweep() == 0


def test_the_ciphers_of_a_tunnel_that_is_found_gone_are_dropped_at_once(tables: Tables) -> None:
    table, view = tunnel_table(tables), view_of(tables)
    table.open(fields(3), SEND_KEY, RECEIVE_KEY)
    view.get(fields(3).local_index)
    table.close(fields(3).local_index)

    assert view.get(fields(3).local_index) is None

    assert not view._snapshots


def test_nothing_is_sealed_for_a_tunnel_that_was_closed_or_replaced(tables: Tables) -> None:
    table, counters = tunnel_table(tables), control_counters(tables)
    first = table.open(fields(3), SEND_KEY, RECEIVE_KEY)
    assert counters.reserve(3, first, 4) == 3

    table.close(fields(3).local_index)
    closed = counters.reserve(3, first, 1)
    second = table.open(fields(3), OTHER_SEND, OTHER_RECEIVE)

    assert closed is Refusal.GONE
    assert counters.reserve(3, first, 1) is Refusal.GONE
    assert counters.reserve(3, second, 1) == 3


# What control may be doing to row 3, which holds OLD (or nothing), and what the row says afterwards.
OLD = fields(3, high=1, owner=1, underlay="2001:db8::1", port=1, sources=frozenset({b"old!"}))
NEW = fields(3, high=2, owner=2, underlay="2001:db8::2", port=2, sources=frozenset({b"new!"}))
UPDATED = dataclasses.replace(NEW, local_index=OLD.local_index)


def reopen(table: TunnelTable) -> None:
    table.close(OLD.local_index)
    table.open(NEW, OTHER_SEND, OTHER_RECEIVE)


CHANGES: dict[str, Callable[[TunnelTable], None]] = {
    "update": lambda table: table.update(UPDATED),
    "close": lambda table: table.close(OLD.local_index),
    "close and open": reopen,
}
ALLOWED = {
    (OLD, (SEND_KEY, RECEIVE_KEY)),
    (UPDATED, (SEND_KEY, RECEIVE_KEY)),
    (NEW, (OTHER_SEND, OTHER_RECEIVE)),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


def looks(view: TunnelView[Keys]) -> list[tuple[TunnelFields | None, Keys]]:
    return [
        (stated(seen), seen.ciphers)
        for index in (OLD.local_index, NEW.local_index)
        if (seen := view.get(index)) is not None
    ]


def stores_of(change: Callable[[TunnelTable], None]) -> int:
    """How many stores a change makes."""
    tables, count = small(), Countdown(10_000)
    table = tunnel_table(tables)
    table.open(OLD, SEND_KEY, RECEIVE_KEY)
    watch(table, "_data _words _keys", load=nothing, store=count)
    change(table)
    tables.close()
    return count.calls


@changes
def test_between_any_two_stores_of_control_a_reader_sees_the_row_before_the_row_after_or_none(
    change: Callable[[TunnelTable], None],
) -> None:
    for at in range(stores_of(change)):
        tables = small()
        table, fresh, old = tunnel_table(tables), view_of(tables), view_of(tables)
        table.open(OLD, SEND_KEY, RECEIVE_KEY)
        assert looks(old) == [(OLD, (SEND_KEY, RECEIVE_KEY))]

        def look(fresh: TunnelView[Keys] = fresh, old: TunnelView[Keys] = old) -> None:
            assert set(looks(fresh)) <= ALLOWED
            assert set(looks(old)) <= ALLOWED
            assert looks(old) or change is not CHANGES["update"]  # an older snapshot goes on being used

        look_once = Countdown(at, look)
        watch(table, "_data _words _keys", load=nothing, store=look_once)
        change(table)
        assert look_once.reached
        assert set(looks(fresh)) == set(looks(old)) <= ALLOWED - {(OLD, (SEND_KEY, RECEIVE_KEY))}
        tables.close()


@changes
@pytest.mark.parametrize("has_snapshot", [False, True])
def test_between_any_two_loads_of_a_reader_control_may_change_the_row(
    change: Callable[[TunnelTable], None], has_snapshot: bool
) -> None:
    at, reached = 0, True
    while reached:
        tables = small()
        table = tunnel_table(tables)
        table.open(dataclasses.replace(OLD, owner=9), SEND_KEY, RECEIVE_KEY)
        between = [nothing]

        def build(
            cipher: Cipher,
            send_key: memoryview,
            receive_key: memoryview,
            between: list[Callable[[], None]] = between,
        ) -> Keys:
            first = bytes(send_key)
            between[0]()
            return first, bytes(receive_key)

        view = TunnelView(read_only(tables.tunnels, TUNNELS), read_only(tables.keys, KEYS), build, Clock())
        if has_snapshot:
            assert view.get(OLD.local_index) is not None
        table.update(OLD)
        between[0] = do_change = Countdown(at, functools.partial(change, table))
        watch(view, "_data _words _keys _indexes", load=do_change, store=nothing)

        seen = looks(view)

        reached = do_change.reached
        assert set(seen) <= ALLOWED, at
        tables.close()
        at += 1
    assert at > 6


@pytest.mark.parametrize("change", ["open", *CHANGES])
def test_control_killed_at_any_store_leaves_rows_that_its_successor_sets_right(change: str) -> None:
    killed, at = True, 0
    while killed:
        tables = small()
        table, fresh = tunnel_table(tables), view_of(tables)
        if change != "open":
            table.open(OLD, SEND_KEY, RECEIVE_KEY)
        death = Countdown(at)
        watch(table, "_data _words _keys", load=nothing, store=death)
        watch(table._counters, "_words", load=nothing, store=death)
        try:
            (CHANGES.get(change) or (lambda table: table.open(OLD, SEND_KEY, RECEIVE_KEY)))(table)
            killed = False
        except KilledError:
            pass
        assert set(looks(view_of(tables))) <= ALLOWED

        successor = tunnel_table(tables)
        torn = successor.recover()
        assert set(torn) <= {OLD.local_index, NEW.local_index}
        for index in torn:
            assert successor.fields(index) is not None
            successor.update(UPDATED if index == OLD.local_index else NEW)

        assert successor.recover() == ()
        assert read_only(tables.tunnels, TUNNELS).words[512 + 3 * 16] % 2 == 0
        seen = looks(fresh)
        assert set(seen) <= ALLOWED
        assert list(successor) == [tunnel.local_index for tunnel, _ in seen if tunnel is not None]
        if change == "update":
            assert len(seen) == 1  # the tunnel and its keys survive
        kept = {key for _, keys in seen for key in keys}
        wiped = {SEND_KEY, RECEIVE_KEY, OTHER_SEND, OTHER_RECEIVE} - kept
        assert not holds_a_part_of(all_memory(tables), *wiped)
        # Whatever died: the next tunnel of the row has a generation and counters of its own.
        used = read_only(tables.tunnels, TUNNELS).words[512 + 3 * 16 + 2]
        for tunnel, _ in seen:
            assert tunnel is not None
            successor.close(tunnel.local_index)
        generation = successor.open(NEW, OTHER_SEND, OTHER_RECEIVE)
        assert generation == used + 1
        assert control_counters(tables).reserve(3, generation, 1) == 3
        tables.close()
        at += 1
    assert at > 5


def leave_odd(tables: Tables, row: int = 3) -> None:
    """What control leaves when it is killed inside an update."""
    mapping = writable(tables.tunnels, TUNNELS)
    mapping.words[512 + row * 16] |= 1


def test_a_row_left_half_written_is_a_miss_after_a_millisecond(tables: Tables) -> None:
    tunnel_table(tables).open(OLD, SEND_KEY, RECEIVE_KEY)
    leave_odd(tables)
    clock = Clock(step=0.0004)
    view = view_of(tables, clock)

    assert view.get(OLD.local_index) is None

    assert clock.looks == 4  # at 0.4 ms, so that the time is up at 1.4


def test_a_row_left_half_written_is_used_as_it_was_by_who_knew_it_and_waited_for_only_once(
    tables: Tables,
) -> None:
    table = tunnel_table(tables)
    table.open(OLD, SEND_KEY, RECEIVE_KEY)
    clock = Clock()
    view = view_of(tables, clock)
    known = view.get(OLD.local_index)
    leave_odd(tables)

    assert view.get(OLD.local_index) is known
    waited = clock.looks
    assert waited > 1
    assert view.sweep() == 0
    assert view.get(OLD.local_index) is known
    assert clock.looks == waited

    tunnel_table(tables).update(UPDATED)

    assert stated(view.get(OLD.local_index)) == UPDATED


def test_a_row_that_never_rests_is_used_as_it_was_after_a_millisecond(tables: Tables) -> None:
    table = tunnel_table(tables)
    table.open(OLD, SEND_KEY, RECEIVE_KEY)
    clock = Clock()
    view = view_of(tables, clock)
    known = view.get(OLD.local_index)
    tables_at_rest = view._data
    watch(view, "_data", load=lambda: table.update(UPDATED), store=nothing)
    table.update(UPDATED)

    assert view.get(OLD.local_index) is known

    assert clock.looks == 4
    view._data = tables_at_rest
    assert stated(view.get(OLD.local_index)) == UPDATED


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        pytest.param(56, 3, "tunnel state is 3", id="state"),
        pytest.param(57, 0, "cipher is 0", id="cipher"),
        pytest.param(38, 5, "address family is 5", id="family"),
        pytest.param(60, 4, "number of sources is 4", id="sources"),
    ],
)
def test_a_whole_row_that_cannot_be_is_a_contradiction(
    tables: Tables, offset: int, value: int, text: str
) -> None:
    tunnel_table(tables).open(OLD, SEND_KEY, RECEIVE_KEY)
    writable(tables.tunnels, TUNNELS).data[PAGE + 3 * 128 + offset] = value

    with pytest.raises(RingError, match=text):
        view_of(tables).get(OLD.local_index)


def test_a_writer_takes_the_address_a_peer_has_when_the_batch_is_sent(tables: Tables) -> None:
    table = tunnel_table(tables)
    underlays = UnderlayView(read_only(tables.tunnels, TUNNELS))
    table.open(OLD, SEND_KEY, RECEIVE_KEY)
    seen = [underlays.get(3)]

    for address in ("2001:db8::1", "192.0.2.1", "192.0.2.2", None, "2001:db8::2", "2001:db8::3"):
        table.update(dataclasses.replace(OLD, underlay=fields(underlay=address).underlay))
        seen += [underlays.get(3), underlays.get(3)]
    table.close(OLD.local_index)
    seen += [underlays.get(3), underlays.get(0)]

    assert [str(address) for address in seen] == [
        "[2001:db8::1]:1",
        *["[2001:db8::1]:4242"] * 2,
        *["192.0.2.1:4242"] * 2,
        *["192.0.2.2:4242"] * 2,
        *["None"] * 2,
        *["[2001:db8::2]:4242"] * 2,
        *["[2001:db8::3]:4242"] * 2,
        *["None"] * 2,
    ]


@pytest.mark.parametrize("before", ["192.0.2.1", "2001:db8::1"])
@pytest.mark.parametrize("after", ["192.0.2.2", "2001:db8::2"])
def test_between_any_two_stores_of_control_a_writer_sees_one_address_or_the_other(
    before: str, after: str
) -> None:
    old, new = (dataclasses.replace(OLD, underlay=fields(underlay=each).underlay) for each in (before, after))
    for at in range(stores_of(CHANGES["update"])):
        tables = small()
        table, underlays = tunnel_table(tables), UnderlayView(read_only(tables.tunnels, TUNNELS))
        table.open(old, SEND_KEY, RECEIVE_KEY)
        assert underlays.get(3) == old.underlay

        def look(underlays: UnderlayView = underlays) -> None:
            assert underlays.get(3) in (old.underlay, new.underlay)

        watch(table, "_data _words _keys", load=nothing, store=Countdown(at, look))
        table.update(new)
        assert underlays.get(3) == new.underlay
        tables.close()


def test_an_ipv6_address_left_half_written_is_used_as_it_was_and_unknown_to_who_did_not_know_it(
    tables: Tables,
) -> None:
    tunnel_table(tables).open(OLD, SEND_KEY, RECEIVE_KEY)
    known, unknown = (UnderlayView(read_only(tables.tunnels, TUNNELS)) for _ in range(2))
    assert known.get(3) == OLD.underlay
    leave_odd(tables)

    assert known.get(3) == OLD.underlay
    assert unknown.get(3) is None


def test_an_ipv4_address_is_one_word_and_read_even_while_the_rest_is_written(tables: Tables) -> None:
    tunnel_table(tables).open(fields(3), SEND_KEY, RECEIVE_KEY)
    leave_odd(tables)

    assert str(UnderlayView(read_only(tables.tunnels, TUNNELS)).get(3)) == "192.0.2.7:4242"


def test_an_address_a_peer_had_before_it_had_none_is_not_used_again(tables: Tables) -> None:
    table, underlays = tunnel_table(tables), UnderlayView(read_only(tables.tunnels, TUNNELS))
    table.open(OLD, SEND_KEY, RECEIVE_KEY)
    assert underlays.get(3) == OLD.underlay
    table.update(dataclasses.replace(OLD, underlay=None))
    assert underlays.get(3) is None

    leave_odd(tables)

    assert underlays.get(3) is None


@pytest.mark.parametrize("after", ["192.0.2.2", "2001:db8::2"])
@pytest.mark.parametrize("before", ["192.0.2.1", "2001:db8::1"])
def test_between_any_two_loads_of_a_writer_process_control_may_change_the_address(
    before: str, after: str
) -> None:
    old, new = (dataclasses.replace(OLD, underlay=fields(underlay=each).underlay) for each in (before, after))
    at, reached = 0, True
    while reached:
        tables = small()
        table, underlays = tunnel_table(tables), UnderlayView(read_only(tables.tunnels, TUNNELS))
        table.open(old, SEND_KEY, RECEIVE_KEY)
        moment = Countdown(at, functools.partial(table.update, new))
        watch(underlays, "_data _words", load=moment, store=nothing)

        assert underlays.get(3) in (old.underlay, new.underlay), at

        reached = moment.reached
        tables.close()
        at += 1
    assert at > 1


@pytest.mark.parametrize("row", [-1, ROWS, 65_535])
def test_a_batch_for_a_row_that_does_not_exist_is_a_contradiction(tables: Tables, row: int) -> None:
    with pytest.raises(RingError, match=f"tunnel row of a batch is {row}"):
        UnderlayView(read_only(tables.tunnels, TUNNELS)).get(row)


def numbered(n: int, index: int) -> TunnelFields:
    """A row all parts of which follow from n, its index and keys apart."""
    return TunnelFields(
        TunnelIndex(index),
        TunnelIndex(n & 0xFFFF_FFFF),
        TunnelState.PROVEN,
        Cipher.AES,
        n & 0xFFFF,
        PeerRef(n),
        UdpAddr(IPv6Address(n << 64 | n) if n % 3 else IPv4Address(n & 0xFFFF_FFFF), n & 0xFFFF),
        frozenset({struct.pack(">QQ", n, n)}),
        RelayIndex(n & 0xFFFF_FFFF) if n % 5 else None,
    )


def key_of(index: int, side: int) -> bytes:
    return struct.pack("<II", index, side) * 4


def test_no_reader_ever_sees_a_torn_row_while_control_writes_and_is_killed() -> None:
    tables = small()
    words = shared_words(8)  # 0: n, 1 and 2: rows seen by each reader, 3: changes by control

    def control() -> None:
        table, choose = tunnel_table(tables), random.Random(words[0])
        for index in table.recover():
            table.update(numbered(words[0], index))
        open_now = {index & 0xFFFF: index for index in table}
        while True:
            n = words[0] = words[0] + 1
            row = choose.randrange(2)
            if row not in open_now:
                index = open_now[row] = TunnelIndex((n % 65_535 + 1) << 16 | row)
                table.open(numbered(n, index), key_of(index, 0), key_of(index, 1))
            elif choose.random() < 0.3:
                table.close(open_now.pop(row))
            else:
                index = open_now[row]
                table.update(numbered(n, index))
            words[3] += 1
            if n % 8 == 0:
                time.sleep(0)

    def reader(number: int) -> None:
        view = TunnelView(
            read_only(tables.tunnels, TUNNELS),
            read_only(tables.keys, KEYS),
            copy_keys,
            lambda: Seconds(time.monotonic()),
        )
        indexes = read_only(tables.tunnels, TUNNELS).data.cast("I")
        while True:
            for row in range(2):
                index = indexes[(PAGE + row * 128 + 8) // 4]
                seen = view.get(index)
                if seen is not None:
                    assert stated(seen) == numbered(seen.peer, index)
                    assert seen.ciphers == (key_of(index, 0), key_of(index, 1))
                    words[number] += 1

    kills = 0
    with children(control, lambda: reader(1), lambda: reader(2)) as running:
        for _ in until(2.5):
            time.sleep(0.02)
            running[0].kill()
            running[0] = running[0].next()
            kills += 1
    tables.close()

    assert kills > 20
    assert min(words[1], words[2]) > 2000
    assert words[3] > 2000
