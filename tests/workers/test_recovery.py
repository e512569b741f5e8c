import gc
import os
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from random import Random

import pytest

from nebula_mp.cert.pool import CaPool
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve, TunnelIndex
from nebula_mp.shm_table import KEYS, ROWS_MAX, TUNNELS
from nebula_mp.shm_tunnels import TunnelTable
from nebula_mp.workers.journal import RECORD_BYTES_MAX
from nebula_mp.workers.tables import ShmPlane
from tests.support.forked import Child, shared_words
from tests.support.pki import Pki
from tests.support.plane_walk import Call, Driver, Model, Reader, Walk, first_of, recovered_as
from tests.support.processes import vm_flags
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
    digest,
    opened,
    peers_of,
    ref_of,
    shake,
    tunnel_of,
    view_of,
)
from tests.support.tables import writable
from tests.support.watched import Countdown, KilledError, nothing, watch

PLENTY_S = 30


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def after(model: Model, call: Call) -> list[Model]:
    """What a successor may find when control was killed inside this call."""
    done, none_routed = deepcopy(model), deepcopy(model)
    done.apply(call)
    if call.name == "route":
        none_routed.routes.pop(first_of(call.peer), None)
    return [model, done, none_routed]


@pytest.mark.parametrize("curve", Curve)
@pytest.mark.parametrize("version", CertVersion)
@pytest.mark.parametrize("we_start", [True, False])
def test_a_successor_talks_on_with_the_peer_without_a_handshake(
    memory: Memory, curve: Curve, version: CertVersion, we_start: bool
) -> None:
    pki = Pki(seed=9, curve=curve)
    us, one = (
        pki.identity(name, f"10.42.0.{number}/16", groups=("a",), versions=(version,))
        for number, name in enumerate(("us", "one"), 1)
    )
    session, peer = shake(one, 0x9_0003, us=us, pool=pki.pool(), we_start=we_start)
    plane = memory.plane()
    assert plane.recover(us, pki.pool()) == []
    tunnel = tunnel_of(session, THERE)
    plane.opened(tunnel)
    assert plane.try_reserve(tunnel, 100) == 3

    successor = memory.plane()
    [saved] = successor.recover(us, pki.pool())

    assert digest(saved.session) == digest(session)
    assert (saved.remote, saved.primary) == (THERE, True)
    sealed = saved.session.send.seal(4, b"header", b"still here")
    assert peer.receive.open(4, b"header", sealed) == b"still here"
    assert saved.session.receive.open(9, b"", peer.send.seal(9, b"", b"welcome back")) == b"welcome back"
    again = tunnel_of(saved.session, saved.remote)
    assert successor.last_counter(again) == 3
    assert successor.try_reserve(again, 100) == 4
    assert successor.passed(again).sent == 2
    assert successor.stats == {"mp.tunnels.kept": 1}


def test_a_successor_gets_proven_tunnels_oldest_first_where_each_of_them_is_now(memory: Memory) -> None:
    plane = memory.fresh()
    late = opened(plane, 1, proven=False)
    first, second = opened(plane, 9), opened(plane, 3, peer=TWO)
    opened(plane, 5, peer=TWO, proven=False)
    late.proven = True
    plane.changed(late)
    second.remote = THERE
    plane.changed(second)
    plane.route(first.addresses[0], first)

    successor = memory.plane()
    saved = successor.recover(US, POOL)

    assert [(each.session.local_index, each.remote, each.primary) for each in saved] == [
        (9, HERE, True),
        (3, THERE, True),
        (1, HERE, False),
    ]
    assert successor.stats == {"mp.tunnels.kept": 3, "mp.tunnels.lost": 1}
    assert view_of(memory).get(5) is None


def test_what_a_successor_opens_is_younger_than_all_it_found(memory: Memory) -> None:
    plane = memory.fresh()
    for index in (1, 2, 3):
        opened(plane, index)

    for index in (11, 10):
        successor = memory.plane()
        saved = successor.recover(US, POOL)
        opened(successor, index)

    assert [each.session.local_index for each in saved] == [1, 2, 3, 11]
    last = memory.plane().recover(US, POOL)
    assert [each.session.local_index for each in last] == [1, 2, 3, 11, 10]
    assert [each.primary for each in last] == [False, False, False, False, True]


def test_while_many_tunnels_are_taken_over_it_is_seen_that_this_goes_on(memory: Memory) -> None:
    plane = memory.fresh()
    for index in range(1, 8):
        opened(plane, index, peer=(ONE, TWO)[index % 2], proven=index != 4)
    signs: list[int] = []

    memory.plane().recover(US, POOL, alive=lambda: signs.append(len(signs)))

    assert len(signs) == 7 + 6  # each is looked at, and all that are proven are taken


def test_a_successor_knows_tunnels_as_if_it_had_opened_them_itself(memory: Memory) -> None:
    plane = memory.fresh()
    opened(plane, 0x1_0002)
    opened(plane, 0x1_0004)

    successor = memory.plane(1, 0)
    tunnels = [tunnel_of(each.session, each.remote) for each in successor.recover(US, POOL)]

    assert successor.share_for(at(str(HERE.ip), 9)) == 0
    assert successor.share_for(at("192.0.2.77")) == 1
    rows = [view_of(memory).get(each.local_index) for each in tunnels]
    assert [row and row.owner for row in rows] == [1, 1], "the owners are those of now"
    ref = ref_of(memory, opened(successor, 0x1_0006))
    assert {row and row.peer for row in rows} == {ref}
    for tunnel in tunnels:
        successor.closed(tunnel)
    assert peers_of(memory).tunnel(ref) == 0x1_0006
    assert [each.session.local_index for each in memory.plane().recover(US, POOL)] == [0x1_0006]


@pytest.mark.parametrize(
    ("pool", "kept"),
    [
        pytest.param(PKI.pool(), True, id="the same"),
        pytest.param(CaPool([Pki.other_ca().ca, PKI.ca]), True, id="one more CA"),
        pytest.param(Pki.other_ca().pool(), False, id="the issuer is gone"),
        pytest.param(PKI.pool([ONE.newest.fingerprint]), False, id="blocklisted"),
        pytest.param(PKI.pool([TWO.newest.fingerprint]), True, id="another is blocklisted"),
    ],
)
def test_a_tunnel_goes_on_only_with_a_peer_whose_issuer_is_trusted(
    memory: Memory, pool: CaPool, kept: bool
) -> None:
    opened(memory.fresh(), 3)

    saved = memory.plane().recover(US, pool)

    assert [each.session.local_index for each in saved] == ([3] if kept else [])
    assert (view_of(memory).get(3) is not None) is kept
    assert memory.plane().recover(US, PKI.pool()) == [] or kept


def test_whether_a_certificate_has_expired_is_left_to_the_check_of_its_tunnel(memory: Memory) -> None:
    opened(memory.fresh(), 3)

    [saved] = memory.plane().recover(US, POOL)

    POOL.recheck(saved.session.peer, ONE.newest.not_after)
    with pytest.raises(CertError, match="expired"):
        POOL.recheck(saved.session.peer, ONE.newest.not_after + 1)


def test_a_tunnel_that_was_too_long_to_note_ends_with_the_process_that_made_it(memory: Memory) -> None:
    plane = memory.fresh()
    session, _ = shake(ONE, 3)
    large = tunnel_of(replace(session, stage2=bytes(RECORD_BYTES_MAX)))
    plane.opened(large)
    large.remote = THERE
    plane.changed(large)
    opened(plane, 4, peer=TWO)
    assert plane.stats == {"mp.journal.too_long": 1}

    successor = memory.plane()

    assert [each.session.local_index for each in successor.recover(US, POOL)] == [4]
    assert successor.stats == {"mp.tunnels.kept": 1, "mp.tunnels.lost": 1}


def test_a_record_of_another_tunnel_is_not_taken_for_the_rows(memory: Memory) -> None:
    plane = memory.fresh()
    opened(plane, 0x1_0003)
    table = TunnelTable(
        writable(memory.tables.tunnels, TUNNELS), writable(memory.tables.keys, KEYS), plane._counters
    )
    fields = table.fields(TunnelIndex(0x1_0003))
    assert fields is not None
    table.update(replace(fields, remote_index=TunnelIndex(1)))

    assert memory.plane().recover(US, POOL) == []


def test_the_first_control_process_takes_no_memory_for_rows_and_later_ones_little() -> None:
    def used() -> int:
        return sum(os.fstat(each.descriptor).st_blocks * 512 for each in large.tables.regions())

    large = Memory(rows=ROWS_MAX)
    before = used()
    plane = large.fresh()
    for row in (0, 1, 2):
        opened(plane, 0x1_0000 | row)
    first = used() - before
    large.plane().recover(US, POOL)
    later = used() - before
    large.close()

    # 512 KiB are the words of all peers. All rows together would be 2.8 GiB. (Huge pages: 2 MiB each.)
    assert first < 2**20 or first % 2**21 == 0
    assert later < 12 * 2**20 or later % 2**21 == 0
    assert later < 64 * 2**20


def test_control_keeps_the_keys_out_of_core_dumps_and_children(memory: Memory) -> None:
    def protected() -> int:
        gc.collect()
        return sum({"dd", "dc"} <= flags for flags in vm_flags("tunnel keys"))

    before = protected()
    plane = memory.fresh()

    assert protected() == before + 1
    assert plane.workers == 2


# Death at any moment.

A, B, C, D, E = 0x1_0001, 0x2_0002, 0x3_0003, 0x4_0004, 0x5_0005
FLOW = Call("allow", A, 1, number=3)
BASE = [
    Call("opened", A, 1, at("192.0.2.1"), proven=True),
    Call("route", A, 1),
    Call("opened", B, 2, at("192.0.2.2"), proven=True),
    Call("route", B, 2),
    Call("opened", C, 3, at("2001:db8::1"), proven=True),  # its first address is that of B's peer
    Call("opened", D, 0, at("192.0.2.3")),
    Call("reserve", A),
    FLOW,
    Call("settle"),
]
KILLED = {
    "a candidate is opened": Call("opened", E, 4, at("192.0.2.3")),
    "a tunnel is opened": Call("opened", E, 4, at("2001:db8::1"), proven=True),
    "a candidate is proven": Call("changed", D, 0, at("192.0.2.3"), proven=True),
    "a tunnel moves": Call("changed", A, 1, at("fe80::1%7"), proven=True),
    "a tunnel is closed": Call("closed", A, 1),
    "the only tunnel of a peer is closed": Call("closed", D, 0),
    "another row of the peer is used": Call("route", C, 3),
    "a peer is sent nowhere": Call("route", 0, 1),
    "a counter is taken": Call("reserve", A),
    "shares change hands": Call("owners", number=0b01),
    "a flow is published": Call("settle"),
    "all flows are forgotten": Call("forget"),
}


def based(memory: Memory, clock: Clock) -> tuple[Driver, Model]:
    driver, model = Driver(memory.fresh(clock=clock), clock, []), Model(rows=memory.rows, workers=2)
    for call in BASE:
        driver.make(call)
        model.apply(call)
    return driver, model


def watch_all(plane: ShmPlane, store: Callable[[], None]) -> None:
    watch(plane._tunnels, "_data _words _keys", load=nothing, store=store)
    watch(plane._counters, "_words", load=nothing, store=store)
    watch(plane._sent, "_words", load=nothing, store=store)
    watch(plane._journal, "_data _words", load=nothing, store=store)
    watch(plane._flows._memory, "data rules halves seen", load=nothing, store=store)
    watch(plane._peers_memory, "words", load=nothing, store=store)
    if plane._peer_table is not None:
        watch(plane._peer_table, "_words", load=nothing, store=store)


def killed(driver: Driver, call: Call, store: int) -> bool:
    """Make a call in a process that dies at this store; False if there are not so many."""
    watch_all(driver.plane, Countdown(store))
    try:
        driver.make(call)
    except KilledError:
        return True
    return False


@pytest.mark.parametrize("call", KILLED.values(), ids=KILLED.keys())
def test_killed_at_any_store_of_any_call_control_leaves_what_its_successor_goes_on_with(call: Call) -> None:
    store, goes_on = 0, True
    while goes_on:
        memory, clock = Memory(rows=8), Clock()
        driver, model = based(memory, clock)
        if call.name == "settle":
            driver.make(FLOW._replace(number=7))
            driver.make(FLOW)

        goes_on = killed(driver, call, store)

        driver, found = recovered_as(memory, clock, *after(model, call))
        for index, known in found.tunnels.items():
            tunnel = driver.tunnels[TunnelIndex(index)]
            assert driver.plane.last_counter(tunnel) - known.counter in (0, call.name == "reserve")
        # It can do all that its predecessor could, with the rows that were in its hands too.
        rest = [E, D, A] if A in found.tunnels else [E, D]
        for index in rest:
            if index in found.tunnels:
                driver.make(Call("closed", index))
                found.apply(Call("closed", index))
        found.routes = {first: index for first, index in found.routes.items() if index in found.tunnels}
        for number, row in enumerate((1, 4, 5)):
            anew = Call("opened", 0x99_0000 | row, number, at("192.0.2.2"), proven=True)
            for each in (anew, anew._replace(name="route")):
                driver.make(each)
                found.apply(each)
        Reader(memory.tables).check(found)
        memory.close()
        store += 1
    assert store > {"closed": 10, "opened": 30, "changed": 10, "settle": 10}.get(call.name, 0)


@pytest.mark.parametrize(
    ("call", "store"),
    [
        pytest.param(KILLED["a tunnel is opened"], 20, id="in the row of a new tunnel"),
        pytest.param(KILLED["a tunnel is opened"], 45, id="in the record of a new tunnel"),
        pytest.param(KILLED["a tunnel moves"], 8, id="in the row of a tunnel that moves"),
        pytest.param(KILLED["a tunnel is closed"], 8, id="in the row of a tunnel that ends"),
        pytest.param(KILLED["another row of the peer is used"], 1, id="between two peers' words"),
    ],
)
def test_a_successor_killed_while_it_recovers_leaves_the_same_to_the_next(call: Call, store: int) -> None:
    death, goes_on = 0, True
    while goes_on:
        memory, clock = Memory(rows=8), Clock()
        driver, model = based(memory, clock)
        assert killed(driver, call, store)
        first = memory.plane(clock=clock)
        watch_all(first, Countdown(death))
        try:
            first.recover(US, POOL)
            goes_on = False
        except KilledError:
            death += 1

        recovered_as(memory, clock, *after(model, call))
        memory.close()
    assert death > 5


def live(memory: Memory, model: Model, seed: str, done: memoryview) -> None:
    """Be a control process, until it is killed."""
    clock = Clock()
    driver, model = recovered_as(memory, clock, model)
    walk = Walk(model, seed)
    while True:
        call = walk.next()
        counter = driver.make(call)
        assert call.name != "reserve" or counter is not None
        model.apply(call)
        done[0] += 1


def test_control_killed_200_times_at_random_loses_no_tunnel_and_repeats_no_counter() -> None:
    seed = 4_711
    print(f"seed {seed}")
    dice = Random(seed)
    memory, clock, done = Memory(rows=24), Clock(), shared_words(1)
    memory.fresh(clock=clock)
    model = Model(rows=24, workers=2)
    calls, outlived, met = 0, 0, Tally[str]()

    for life in range(200):
        done[0] = 0
        name = f"{seed}/{life}"
        child = Child(partial(live, memory, deepcopy(model), name, done))
        reader = Reader(memory.tables)
        target = dice.choice([0, *range(60)])
        end = time.monotonic() + PLENTY_S
        while done[0] < target:
            assert time.monotonic() < end, "control does nothing"
            reader.look(dice)
        for _ in range(dice.randrange(30)):
            reader.look(dice)
        child.kill()

        walk = Walk(model, name)
        for _ in range(done[0]):
            model.apply(walk.next())
        call = walk.next()
        met[call.name] += 1
        calls += done[0]
        driver, model = recovered_as(memory, clock, *after(model, call))
        outlived += len(model.tunnels)
        for index, known in model.tunnels.items():
            counter = driver.plane.try_reserve(driver.tunnels[TunnelIndex(index)], 100)
            assert counter is not None
            taken_inside = call.name == "reserve" and call.local == index
            assert counter - known.counter in (1, 1 + taken_inside), name
            known.counter = counter

    assert calls > 2000
    assert outlived > 1000
    assert len(met) > 5
    memory.close()
