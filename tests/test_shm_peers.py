from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.newtypes import TunnelIndex
from nebula_mp.shm_peers import PeerTable, PeerView
from nebula_mp.shm_table import PEERS, PeerRef, Tables
from tests.support.tables import ROWS, read_only, small, writable

ONE, TWO = TunnelIndex(0x1_0001), TunnelIndex(0xFFFF_0002)


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = small()
    yield tables
    tables.close()


def sides(tables: Tables) -> tuple[PeerTable, PeerView]:
    return PeerTable(writable(tables.peers, PEERS)), PeerView(read_only(tables.peers, PEERS))


def added(table: PeerTable) -> PeerRef:
    peer = table.add()
    assert peer is not None
    return peer


def test_a_peer_has_no_tunnel_until_one_is_set_and_then_the_one_set_last(tables: Tables) -> None:
    table, view = sides(tables)
    peer = added(table)
    seen = [view.tunnel(peer)]

    for tunnel in (ONE, TWO, None, ONE):
        table.set(peer, tunnel)
        seen.append(view.tunnel(peer))

    assert seen == [None, ONE, TWO, None, ONE]


def test_what_was_known_of_a_rows_former_peer_does_not_lead_to_the_tunnel_of_the_next(tables: Tables) -> None:
    table, view = sides(tables)
    former = added(table)
    table.set(former, ONE)

    table.remove(former)
    gone = view.tunnel(former)
    successor = added(table)
    table.set(successor, TWO)

    assert former & 0xFFFF_FFFF == successor & 0xFFFF_FFFF
    assert (gone, view.tunnel(former), view.tunnel(successor)) == (None, None, TWO)


def test_a_full_table_gives_out_no_row_until_one_comes_back(tables: Tables) -> None:
    table, _ = sides(tables)
    peers = [added(table) for _ in range(ROWS)]

    assert table.add() is None
    table.remove(peers[3])

    assert added(table) & 0xFFFF_FFFF == 3
    assert table.add() is None


def test_a_successor_keeps_the_peers_it_still_knows_and_frees_all_others(tables: Tables) -> None:
    table, view = sides(tables)
    kept, lost, idle = added(table), added(table), added(table)
    table.set(kept, ONE)
    table.set(lost, TWO)

    successor = PeerTable(writable(tables.peers, PEERS), in_use=[kept, idle])
    assert view.tunnel(kept) == ONE
    assert view.tunnel(lost) is None
    rest = [added(successor) for _ in range(ROWS - 2)]

    assert successor.add() is None
    assert len({kept, lost, idle, *rest}) == ROWS + 1
    successor.set(idle, TWO)
    assert view.tunnel(idle) == TWO


def test_a_rows_generation_goes_from_the_last_to_the_first_so_that_no_reference_is_ever_0(
    tables: Tables,
) -> None:
    writable(tables.peers, PEERS).words[512] = 0xFFFF_FFFF << 32
    table, view = sides(tables)

    peer = added(table)
    table.set(peer, ONE)

    assert peer == 1 << 32
    assert view.tunnel(peer) == ONE


@pytest.mark.parametrize("reference", [0, 5, ROWS, 1 << 32 | ROWS, 0xFFFF_FFFF, 2**64 - 1])
def test_a_reference_that_was_never_given_out_leads_nowhere(tables: Tables, reference: int) -> None:
    _, view = sides(tables)

    assert view.tunnel(PeerRef(reference)) is None


@given(
    st.lists(st.tuples(st.sampled_from(["add", "set", "remove", "restart"]), st.integers(0, 9)), max_size=60)
)
def test_any_walk_of_changes_is_seen_as_by_a_dictionary(walk: list[tuple[str, int]]) -> None:
    tables = small(rows=4)
    table, view = sides(tables)
    model: dict[PeerRef, TunnelIndex | None] = {}
    former: set[PeerRef] = set()
    for operation, number in walk:
        chosen = sorted(model)[number % len(model)] if model else None
        if operation == "add":
            peer = table.add()
            assert (peer is None) is (len(model) == 4)
            if peer is not None:
                assert peer not in model
                assert peer not in former
                model[peer] = None
        elif operation == "restart":
            table = PeerTable(writable(tables.peers, PEERS), in_use=model)
        elif chosen is not None and operation == "set":
            model[chosen] = TunnelIndex(number) or None
            table.set(chosen, model[chosen])
        elif chosen is not None:
            table.remove(chosen)
            del model[chosen]
            former.add(chosen)
        assert {peer: view.tunnel(peer) for peer in model} == model
        assert {view.tunnel(peer) for peer in former} <= {None}
    tables.close()
