"""One writer as a process; the test fills its rings."""

import os
import signal
import time

import pytest

from nebula_mp.shm_ring import TAIL, RingMemory, holder_word
from nebula_mp.workers.parts import Role, descriptors, open_lock, seal_lock
from tests.datapath.sites import INDEX_NEAR
from tests.support import rings
from tests.support.native import python_only
from tests.workers.conftest import MakeRig
from tests.workers.rig import Rig, is_silent, receive, soon, without_belt

pytestmark = pytest.mark.usefixtures("kernel")

ROW = INDEX_NEAR & 0xFFFF


def publish(memory: RingMemory, *areas: list[bytes], packets: int = 0) -> None:
    """As the reader of this ring; `packets` that an entry of the open ring says it has."""
    producer = rings.produce(memory, poison=True)
    for contents in areas:
        assert producer.try_begin()
        assert all(producer.try_add(each, packets, ROW) for each in contents)
        producer.publish()


def started(rig: Rig) -> Rig:
    """Start the writer and wait until it sleeps for the first time, with nothing but its bell to wake it."""
    rig.start(Role.WRITER, prepare=without_belt)
    assert soon(lambda: rig.count("mp.cpu.us", Role.WRITER) > 0)
    return rig


def test_a_stroke_of_the_bell_empties_both_rings(make_rig: MakeRig) -> None:
    """There are more areas than are taken in one turn."""
    rig = started(make_rig(areas=32))
    areas = [[b"%d.%d" % (area, entry) for entry in range(3)] for area in range(32)]
    publish(rig.site.seal[0], *areas)
    publish(rig.site.opened[0], *areas, packets=1)

    rig.writer_bells[0].ring()

    flat = [each for area in areas for each in area]
    assert [receive(rig.site.far) for _ in flat] == flat
    assert [receive(rig.stacks[0]) for _ in flat] == flat
    assert soon(rig.is_empty)
    assert rig.count("mp.udp.tx.packets", Role.WRITER) == rig.count("mp.tun.tx.packets", Role.WRITER) == 96


def test_a_bell_that_was_rung_before_the_writer_was_there_is_heard(make_rig: MakeRig) -> None:
    rig = make_rig()
    publish(rig.site.seal[0], [b"early"])
    rig.writer_bells[0].ring()

    rig.start(Role.WRITER, prepare=without_belt)

    assert receive(rig.site.far) == b"early"


def test_a_writer_looks_at_its_rings_before_it_first_sleeps(make_rig: MakeRig) -> None:
    rig = make_rig()
    publish(rig.site.opened[0], [b"of its predecessor"], packets=1)

    rig.start(Role.WRITER, prepare=without_belt)

    assert receive(rig.stacks[0]) == b"of its predecessor"


def test_without_a_bell_the_belt_finds_what_waits(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.start(Role.WRITER)
    assert soon(lambda: rig.count("mp.passes", Role.WRITER) >= 2)

    publish(rig.site.seal[0], [b"late"])

    assert receive(rig.site.far) == b"late"


def test_an_idle_writer_shows_that_it_lives_and_sleeps(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.start(Role.WRITER)

    assert soon(lambda: rig.count("mp.passes", Role.WRITER) >= 4)
    assert rig.passes_in(0.6, Role.WRITER) <= 30


def test_a_writer_states_what_it_has_used_of_a_core_once(make_rig: MakeRig) -> None:
    start = time.monotonic()
    rig = started(make_rig())

    def often_awake() -> bool:
        rig.writer_bells[0].ring()
        return rig.count("mp.passes", Role.WRITER) >= 400

    assert soon(often_awake)
    assert 0 < rig.count("mp.cpu.us", Role.WRITER) <= 1e6 * (time.monotonic() - start)


def test_a_ring_that_the_reader_drains_is_left_to_it_and_costs_no_turns(make_rig: MakeRig) -> None:
    """The reader was stopped with the lease; its successor's supervisor clears it and rings."""
    rig = make_rig()
    holder = holder_word(os.getpid(), 9)
    stopped = rings.consume(rig.site.seal[0], lock=rig.ring_locks.lock(seal_lock(0)), holder=holder)
    assert stopped.try_take()
    publish(rig.site.seal[0], [b"out"])
    publish(rig.site.opened[0], [b"in"], packets=1)
    rig.start(Role.WRITER)

    rig.writer_bells[0].ring()
    assert receive(rig.stacks[0]) == b"in"
    assert rig.passes_in(0.6, Role.WRITER) <= 30
    assert is_silent(rig.site.far)
    assert rig.count("mp.lease.refused", Role.WRITER) > 0

    assert rig.site.seal[0].clear_dead(holder)
    rig.writer_bells[0].ring()
    assert receive(rig.site.far) == b"out"


@python_only
def test_each_ring_has_a_lock_of_its_own(make_rig: MakeRig) -> None:
    rig = make_rig(workers=2)
    assert rig.ring_locks.lock(open_lock(1)).try_take()
    for worker in range(2):
        publish(rig.site.seal[worker], [b"out"])
        publish(rig.site.opened[worker], [b"in"], packets=1)
        rig.start(Role.WRITER, worker, prepare=without_belt)

    assert [receive(rig.site.far) for _ in range(2)] == [b"out", b"out"]
    assert receive(rig.stacks[0]) == b"in"
    assert rig.tell(Role.WRITER, 1) == 0
    assert is_silent(rig.stacks[1])
    assert rig.count("mp.lease.refused", Role.WRITER, 1) > 0


def test_told_to_finish_it_sends_what_waits_and_ends(make_rig: MakeRig) -> None:
    rig = started(make_rig())
    publish(rig.site.seal[0], *([b"%d" % area] for area in range(8)))
    publish(rig.site.opened[0], *([b"%d" % area] for area in range(8)), packets=1)

    assert rig.child(Role.WRITER).kill(signal.SIGUSR2) == 0

    assert [receive(rig.site.far) for _ in range(8)] == [b"%d" % area for area in range(8)]
    assert [receive(rig.stacks[0]) for _ in range(8)] == [b"%d" % area for area in range(8)]
    assert rig.is_empty()
    assert rig.site.seal[0].holder() is rig.site.opened[0].holder() is None


def test_told_to_finish_it_does_not_wait_for_a_lease(make_rig: MakeRig) -> None:
    rig = make_rig()
    stopped = rings.consume(rig.site.seal[0], lock=rig.ring_locks.lock(seal_lock(0)))
    assert stopped.try_take()
    started(rig)
    publish(rig.site.seal[0], [b"out"])

    assert rig.child(Role.WRITER).kill(signal.SIGUSR2) == 0

    assert is_silent(rig.site.far)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_for_everybody_are_none_of_a_writers_business(make_rig: MakeRig, number: int) -> None:
    rig = started(make_rig())

    os.kill(rig.child(Role.WRITER).pid, number)
    publish(rig.site.seal[0], [b"still here"])
    rig.writer_bells[0].ring()

    assert receive(rig.site.far) == b"still here"
    rig.finish()
    assert rig.log_text() == ""


def test_a_lost_tun_queue_ends_the_writer_with_its_exit_code_and_one_line(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.tun_fds[0] = rig.log  # cannot be written to
    publish(rig.site.opened[0], [b"in"], packets=1)

    assert rig.start(Role.WRITER).wait() == 3

    (line,) = rig.log_text().splitlines()
    assert 'level=ERROR msg="descriptor lost" role=writer/0 device=nmp-rig error="[Errno 9]' in line


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("head", 99, "head"),
        ("count", 1000, '"area 0: entries"'),
        ("offset", 1 << 20, '"area 0: offset"'),
        ("row", 64, '"area 0: row"'),
    ],
)
def test_a_contradiction_in_a_ring_ends_the_writer_with_its_own_code_and_one_line(
    make_rig: MakeRig, name: str, value: int, field: str
) -> None:
    """Row 64 is the first that the table of tunnels does not have."""
    rig = make_rig()
    publish(rig.site.seal[0], [b"out"])
    rings.patch(rig.site.seal[0], name, value)

    assert rig.start(Role.WRITER).wait() == 4

    (line,) = rig.log_text().splitlines()
    assert f'level=ERROR msg="ring contradiction" role=writer/0 field={field} value={value}' in line
    assert is_silent(rig.site.far)


def test_what_is_being_sent_when_a_writer_dies_goes_on_as_each_ring_wants_it(make_rig: MakeRig) -> None:
    """Its successor sends a datagram again, which the peer drops, and passes over a packet for the stack."""
    rig = make_rig()
    areas = [b"0", b"1", b"2"]
    for memory, packets in ((rig.site.seal[0], 0), (rig.site.opened[0], 1)):
        publish(memory, areas, packets=packets)
        rings.patch(memory, "progress", 0 << 12 | 2)

    rig.start(Role.WRITER)

    assert [receive(rig.site.far) for _ in range(3)] == areas
    assert receive(rig.stacks[0]) == b"2"
    assert soon(lambda: rig.count("mp.ring.resumed", Role.WRITER) == 1)
    assert soon(rig.is_empty)
    assert os.pread(rig.site.opened[0].state.descriptor, 1, 8 * TAIL) == b"\x01"
    assert is_silent(rig.stacks[0])


def test_no_key_and_no_counter_is_within_a_writers_reach(make_rig: MakeRig) -> None:
    rig = make_rig(workers=2)
    made = rig.site.tables
    forbidden = {made.keys, made.send, made.windows, *made.flows, *made.seen, *made.spans, *made.traffic}

    held = set(descriptors(rig.writer_parts()))

    assert held.isdisjoint({each.descriptor for each in forbidden} | {each.read_only for each in forbidden})
    assert made.tunnels.descriptor not in held
    assert rig.site.seal[0].data.descriptor not in held
