"""Paths through relays: what a reader sees of them while they are changed, and after a death."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from nebula_mp.errors import RingError
from nebula_mp.newtypes import RelayIndex, TunnelIndex
from nebula_mp.shm import Mapping
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayTable, RelayView
from nebula_mp.shm_table import RELAY_ROW, RELAYS, ROWS_AT, Tables
from tests.support.tables import ROWS, read_only, small, writable
from tests.support.watched import Countdown, KilledError, nothing, watch

TERMINAL = RelayRow(
    RelayIndex(0xAAAA_0003), TunnelIndex(0xBEEF_0001), RelayKind.TERMINAL, None, RelayIndex(0x5555_0009)
)
FORWARDING = RelayRow(
    RelayIndex(0xBBBB_0003),
    TunnelIndex(0xBEEF_0002),
    RelayKind.FORWARDING,
    TunnelIndex(0xBEEF_0004),
    RelayIndex(0x6666_0009),
)


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = small()
    yield tables
    tables.close()


def table_of(tables: Tables) -> RelayTable:
    return RelayTable(writable(tables.relays, RELAYS))


def view_of(tables: Tables) -> RelayView:
    return RelayView(read_only(tables.relays, RELAYS))


def store_kind(tables: Tables, row: int, kind: int) -> None:
    at = ROWS_AT + row * RELAY_ROW.size + RELAY_ROW.fields["kind"].offset
    mapping: Mapping = writable(tables.relays, RELAYS)
    mapping.data[at : at + 4] = kind.to_bytes(4, "little")


@pytest.mark.parametrize("path", [TERMINAL, FORWARDING], ids=lambda path: path.kind.name)
def test_a_path_is_found_by_its_whole_index_alone(tables: Tables, path: RelayRow) -> None:
    table, view = table_of(tables), view_of(tables)
    assert view.get(path.local_index) is None
    table.set(path)

    assert view.get(path.local_index) == path
    assert view.get(path.local_index ^ 0x0001_0000) is None
    assert view.get(path.local_index ^ 1) is None
    assert view.get(0) is None
    assert view.get(path.local_index & 0xFFFF_0000 | ROWS) is None


def test_a_path_changes_in_its_place_and_a_row_is_used_again(tables: Tables) -> None:
    table, view = table_of(tables), view_of(tables)
    table.set(TERMINAL)
    assert view.get(TERMINAL.local_index) == TERMINAL
    moved = replace(TERMINAL, carrier=TunnelIndex(0xBEEF_0007))

    table.set(moved)
    assert view.get(TERMINAL.local_index) == moved
    table.set(FORWARDING)
    assert (view.get(TERMINAL.local_index), view.get(FORWARDING.local_index)) == (None, FORWARDING)
    table.clear(FORWARDING.local_index)
    assert view.get(FORWARDING.local_index) is None


def test_a_view_of_before_the_row_was_written_finds_it(tables: Tables) -> None:
    view = view_of(tables)
    for _ in range(3):
        assert view.get(TERMINAL.local_index) is None
    table_of(tables).set(TERMINAL)
    assert view.get(TERMINAL.local_index) == TERMINAL


def killed_after(tables: Tables, stores: int, path: RelayRow) -> bool:
    """Let a writer set a path and die after so many stores; False if it got through."""
    table = table_of(tables)
    countdown = Countdown(stores)
    watch(table, "_words", load=nothing, store=countdown)
    watch(table, "_data", load=nothing, store=countdown)
    try:
        table.set(path)
    except KilledError:
        return True
    return False


@pytest.mark.parametrize("before", [None, TERMINAL], ids=["new", "changed"])
def test_whoever_dies_while_writing_leaves_the_path_of_before_and_a_row_that_its_successor_frees(
    before: RelayRow | None,
) -> None:
    stores = 0
    while True:
        tables = small()
        view = view_of(tables)
        if before is not None:
            table_of(tables).set(before)
            assert view.get(before.local_index) == before
        after = replace(FORWARDING, local_index=TERMINAL.local_index)
        was_killed = killed_after(tables, stores, after)

        found, fresh = view.get(TERMINAL.local_index), view_of(tables).get(TERMINAL.local_index)
        torn = table_of(tables).recover()
        recovered = view.get(TERMINAL.local_index)
        tables.close()

        if not was_killed:
            assert (found, torn, recovered) == (after, 0, after)
            break
        assert found == before
        assert fresh == (before if stores == 0 else None), "whoever sees it half written has seen nothing"
        assert recovered == (before if torn == 0 else None)
        stores += 1
    assert stores >= 2, "at least before the first store, and behind it"


def test_a_row_that_changes_while_it_is_read_is_read_again_the_next_time(tables: Tables) -> None:
    table, view = table_of(tables), view_of(tables)
    table.set(TERMINAL)
    moved = replace(TERMINAL, next_index=RelayIndex(0x5555_0010))
    # The first load is that of the sequence number; between it and the second the fields are copied.
    watch(view, "_words", load=Countdown(1, then=lambda: table.set(moved)), store=nothing)

    assert view.get(TERMINAL.local_index) is None
    assert view.get(TERMINAL.local_index) == moved


def test_a_kind_that_nobody_writes_is_a_contradiction(tables: Tables) -> None:
    table_of(tables).set(TERMINAL)
    store_kind(tables, 3, 7)
    with pytest.raises(RingError, match="kind of a path is 7, expected 0, 1 or 2"):
        view_of(tables).get(TERMINAL.local_index)
