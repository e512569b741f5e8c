"""One reader as a process, with a writer that works, is stopped, or does not exist."""

import errno
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Network

import pytest
from pyroute2 import IPRoute

from nebula_mp.config.model import DrainMode, TunConfig
from nebula_mp.datapath.api import CONTROL, Arrival, Drop, UpcallLimits, encode_record
from nebula_mp.ioctl_tun import TunDevice
from nebula_mp.newtypes import RelayIndex, TunnelIndex
from nebula_mp.shm import PAGE_BYTES
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayTable
from nebula_mp.shm_ring import POISON
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import RELAYS
from nebula_mp.wire.header import HEADER_BYTES, MessageType
from nebula_mp.workers import drain_mode, reader
from nebula_mp.workers.drain_mode import AutoDrain, Senses
from nebula_mp.workers.parts import Role, stranger_lock
from tests.datapath.sites import INDEX_NEAR, KEY_IN, KEY_OUT, address_of, frame, loopback, message, packet
from tests.support import native, rings
from tests.support.forked import shared_words
from tests.support.native import python_only
from tests.support.private_net import private_network
from tests.support.tables import writable
from tests.workers.conftest import MakeRig
from tests.workers.rig import Rig, is_silent, receive, soon, without_belt

pytestmark = pytest.mark.usefixtures("kernel")

BACK = packet(1, back=True)


def come_back(rig: Rig, counter: int, inner: bytes = BACK, *, worker: int = 0) -> None:
    """Let the far host send one packet."""
    rig.site.far.sendto(message(counter, inner), rig.site.udp[worker].getsockname())


def counter_of(datagram: bytes) -> int:
    return int.from_bytes(datagram[8:HEADER_BYTES], "big")


# Who drains.


@pytest.mark.parametrize(
    ("drain", "cpus"), [(DrainMode.READER, 64), (DrainMode.AUTO, drain_mode.CPUS_MIN - 1)]
)
def test_a_reader_that_drains_needs_no_writer(make_rig: MakeRig, drain: DrainMode, cpus: int) -> None:
    rig = make_rig(drain=drain, cpus=cpus)
    rig.start(Role.READER)

    for counter in range(3, 50):
        rig.give(counter)
        assert counter_of(receive(rig.site.far)) == counter
        come_back(rig, counter)
        assert receive(rig.stacks[0]) == BACK

    assert rig.tell(Role.READER) == 0
    assert rig.is_empty()
    assert not rig.writer_bells[0].wait(0), "a writer would have been woken for nothing"
    assert rig.count("mp.drain.switches") == rig.count("mp.lease.refused") == 0
    rig.site.check_ledger()


def test_a_full_ring_is_drained_before_it_is_filled(make_rig: MakeRig) -> None:
    """Its writer left it so, and died."""
    rig = make_rig()
    producer = rings.produce(rig.site.seal[0])
    for number in range(8):
        assert producer.try_begin()
        assert producer.try_add(b"%d" % number, 0, INDEX_NEAR & 0xFFFF)
        producer.publish()
    rig.give(1)

    rig.start(Role.READER)

    assert [receive(rig.site.far) for _ in range(8)] == [b"%d" % number for number in range(8)]
    assert counter_of(receive(rig.site.far)) == 3
    assert rig.count(Drop.SEAL_RING_FULL) == 0


def test_a_reader_in_mode_writer_leaves_the_rings_to_its_writer_and_rings_the_bell(make_rig: MakeRig) -> None:
    rig = make_rig(drain=DrainMode.WRITER)
    rig.start(Role.READER)
    rig.give(1)
    come_back(rig, 3)
    assert soon(lambda: (rig.site.seal[0].fill(), rig.site.opened[0].fill()) == (1, 1))
    assert rig.writer_bells[0].wait(10_000)
    rig.writer_bells[0].ring()

    rig.start(Role.WRITER)

    assert counter_of(receive(rig.site.far)) == 3
    assert receive(rig.stacks[0]) == BACK
    rig.finish()
    assert rig.count("mp.udp.tx.packets") == rig.count("mp.tun.tx.packets") == 0
    assert rig.count("mp.udp.tx.packets", Role.WRITER) == rig.count("mp.tun.tx.packets", Role.WRITER) == 1


@pytest.mark.parametrize("drain", [DrainMode.READER, DrainMode.WRITER])
def test_a_frame_that_is_forwarded_leaves_at_once_whoever_drains(make_rig: MakeRig, drain: DrainMode) -> None:
    """Although nothing came from the device, so that nothing but the other half of the pass sees to it."""
    rig = make_rig(drain=drain)
    site = rig.site
    with closing(loopback()) as other:
        peer = site.peers.add()
        assert peer is not None
        beyond = TunnelIndex(0x0D0D_000C)
        fields = replace(site.fields, local_index=beyond, peer=peer, underlay=address_of(other))
        site.tunnels.open(fields, KEY_OUT, KEY_IN)
        path = RelayRow(
            RelayIndex(0x7B7B_0004), INDEX_NEAR, RelayKind.FORWARDING, beyond, RelayIndex(0x7C7C_0011)
        )
        RelayTable(writable(site.tables.relays, RELAYS)).set(path)
        rig.start_all(prepare=without_belt)

        for counter in range(3, 30):
            content = b"%d" % counter
            site.far.sendto(frame(counter, content, path.local_index), site.udp[0].getsockname())
            found = receive(other)
            assert (counter_of(found), found[16:-16]) == (counter, content)

        rig.finish()
        assert rig.is_empty()
        site.check_ledger()


class AlwaysWriter(AutoDrain):
    """A trial that was won at the first window."""

    def handle_window(self, senses: Senses) -> DrainMode:
        super().handle_window(senses)
        return DrainMode.WRITER


def test_auto_asks_its_trials_every_window_and_does_what_they_say(make_rig: MakeRig) -> None:
    rig = make_rig(drain=DrainMode.AUTO, cpus=drain_mode.CPUS_MIN)
    rig.start(Role.READER, prepare=lambda: setattr(reader, "AutoDrain", AlwaysWriter))
    rig.start(Role.WRITER)

    def by_writer() -> bool:
        rig.give(1)
        receive(rig.site.far)
        return rig.count("mp.udp.tx.packets", Role.WRITER) >= 5

    assert soon(by_writer)
    assert rig.count("mp.drain.switches") == 1
    rig.finish()


def test_the_senses_of_auto_are_those_of_both_processes(make_rig: MakeRig) -> None:
    rig = make_rig(drain=DrainMode.AUTO, cpus=drain_mode.CPUS_MIN)
    seen = shared_words(4)

    class Spy(AutoDrain):
        def handle_window(self, senses: Senses) -> DrainMode:
            used = (senses.own_cpu, senses.own_delay, senses.writer_cpu)
            seen[0], seen[1], seen[2] = (int(each * 1e6) for each in used)
            seen[3] = senses.moved_bytes
            return super().handle_window(senses)

    writers = StatsPage(rig.site.pages[1].descriptor, writable=True)
    writers.add(SLOTS["mp.cpu.us"], 123_000)
    writers.add(SLOTS["mp.udp.tx.bytes"], 1_000_000)
    writers.add(SLOTS["mp.tun.tx.bytes"], 20_000_000)
    rig.start(Role.READER, prepare=lambda: setattr(reader, "AutoDrain", Spy))

    def look() -> bool:
        rig.give(1)
        come_back(rig, 3)
        receive(rig.site.far)
        return seen[3] > 21_000_000 and seen[0] > 0

    assert soon(look)
    assert seen[2] == 123_000
    assert seen[0] <= rig.count("mp.cpu.us") < 60_000_000
    assert seen[1] < 600_000_000


# Awake and asleep.


def test_a_reader_shows_that_it_lives_although_nothing_comes(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.start(Role.READER)

    assert soon(lambda: rig.count("mp.passes") >= 4)


def test_a_full_ring_neither_blocks_the_reader_nor_keeps_it_awake(make_rig: MakeRig) -> None:
    """Its writer was stopped with the lease. What the ring does not take is dropped and counted."""
    rig = make_rig(drain=DrainMode.WRITER)
    stopped = rings.consume(rig.site.seal[0], lock=rig.ring_locks.lock(0))
    assert stopped.try_take()
    rig.start(Role.READER)
    assert soon(lambda: rig.count("mp.passes") > 0)

    given = 0

    def overflow() -> bool:
        nonlocal given
        rig.give(given)
        given += 1
        assert soon(lambda: rig.count("mp.tun.rx.packets") == given)
        return rig.count(Drop.SEAL_RING_FULL) >= 3

    assert soon(overflow)
    come_back(rig, 3)
    assert soon(lambda: rig.site.opened[0].fill() == 1), "the other direction stands still"
    time.sleep(0.1)
    assert rig.passes_in(0.6) <= 30
    assert given == rig.count(Drop.SEAL_RING_FULL) + rig.site.seal[0].geometry.areas


def test_a_burst_that_comes_before_its_writer_has_a_processor_is_not_lost(make_rig: MakeRig) -> None:
    """An area for each packet: three times as many as the ring has."""
    rig = make_rig(drain=DrainMode.WRITER)
    rig.start(Role.READER)
    areas = rig.site.seal[0].geometry.areas
    for number in range(3 * areas):
        rig.give(number)
        come_back(rig, 3 + number)
        assert soon(lambda: rig.count("mp.passes") > 0)
    assert soon(lambda: rig.count("mp.tun.rx.packets") == rig.count("mp.udp.rx.packets") == 3 * areas)
    rig.start(Role.WRITER)

    counters = [counter_of(receive(rig.site.far)) for _ in range(3 * areas)]
    assert counters == list(range(3, 3 + 3 * areas)), "in order, whoever sent them"
    assert [receive(rig.stacks[0]) for _ in counters] == [BACK] * len(counters)
    rig.finish()
    assert rig.site.drops() == {}
    rig.site.check_ledger()


def test_a_reader_whose_writer_was_stopped_with_the_lease_goes_on_and_never_waits(make_rig: MakeRig) -> None:
    rig = make_rig()
    stopped = rings.consume(rig.site.seal[0], lock=rig.ring_locks.lock(0))
    assert stopped.try_take()
    rig.start(Role.READER)

    for number in range(100):
        rig.give(number)
        come_back(rig, 3 + number)
        assert receive(rig.stacks[0]) == BACK

    assert soon(lambda: rig.count("mp.tun.rx.packets") == 100)
    assert is_silent(rig.site.far)
    assert rig.count("mp.lease.refused") > 0
    assert rig.count(Drop.SEAL_RING_FULL) > 0
    assert rig.passes_in(0.6) <= 30
    assert rig.writer_bells[0].wait(0), "a writer that comes back must be told"


# Packets held back for a counter.


@python_only
def test_packets_held_back_are_dropped_50_milliseconds_later_and_the_next_ones_go(make_rig: MakeRig) -> None:
    """Another process keeps the lock of the tunnel's counter, as one that was stopped would."""
    rig = make_rig()
    lock = rig.site.tables.locks.lock(INDEX_NEAR & 0xFFFF)
    assert lock.try_take()
    rig.start(Role.READER, prepare=without_belt)
    for number in range(20):
        rig.give(number)

    assert soon(lambda: rig.count(Drop.EXHAUSTED) == 20)
    come_back(rig, 3)
    assert receive(rig.stacks[0]) == BACK
    assert rig.count("mp.counter.busy") > 0

    lock.drop()
    rig.give(20)
    assert counter_of(receive(rig.site.far)) == 3
    assert rig.tell(Role.READER) == 0
    rig.site.check_ledger()


@python_only
def test_a_reader_does_not_spin_while_it_holds_packets_back_and_more_wait(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nebula_mp.datapath.sealing.LOCK_HOLD", 3600.0)
    rig = make_rig()
    lock = rig.site.tables.locks.lock(INDEX_NEAR & 0xFFFF)
    assert lock.try_take()
    rig.start(Role.READER)
    for number in range(200):
        rig.give(number)
    assert soon(lambda: rig.count("mp.counter.busy") > 0)

    start = time.monotonic()
    passes = rig.passes_in(0.5)

    assert passes <= 1000 * (time.monotonic() - start) + 30, "more than one in a millisecond"
    lock.drop()
    for _ in range(200):
        receive(rig.site.far)


@python_only
def test_a_reader_that_is_told_to_finish_sees_to_the_packets_that_it_holds_back(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nebula_mp.datapath.sealing.LOCK_HOLD", 1.0)
    rig = make_rig()
    lock = rig.site.tables.locks.lock(INDEX_NEAR & 0xFFFF)
    assert lock.try_take()
    rig.start(Role.READER)
    rig.give(1)
    assert soon(lambda: rig.count("mp.tun.rx.packets") == 1)

    assert rig.tell(Role.READER) == 0

    assert rig.count(Drop.EXHAUSTED) == 1
    rig.site.check_ledger()


# Strangers.


def fill_stranger_ring(rig: Rig, areas: int, each: int, source: int = 1) -> None:
    """As reader 1, or control, hands datagrams to reader 0; the bell is rung once."""
    producer = rings.produce(rig.site.stranger[source, 0])
    number = 0
    for _ in range(areas):
        assert producer.try_begin()
        for _ in range(each):
            arrival = Arrival(address_of(rig.site.far), MessageType.MESSAGE, 0, 1)
            datagram = message(3 + number, packet(number, back=True))
            assert producer.try_add(encode_record(arrival, 0) + datagram)
            number += 1
        producer.publish()
    rig.site.bells[0].ring()


def test_all_strangers_are_taken_at_one_stroke_of_the_bell(make_rig: MakeRig) -> None:
    """They are more than one pass takes, and without another stroke nothing says that some are left."""
    rig = make_rig(workers=2)
    rig.start(Role.READER, prepare=without_belt)
    come_back(rig, 1000)
    assert receive(rig.stacks[0]) == BACK

    fill_stranger_ring(rig, 6, 30)

    assert [receive(rig.stacks[0]) for _ in range(180)] == [packet(each, back=True) for each in range(180)]
    assert rig.passes_in(0.2) <= 30, "it still hears the stroke"


def test_strangers_that_waited_before_the_reader_was_there_need_no_bell(make_rig: MakeRig) -> None:
    rig = make_rig(workers=2)
    fill_stranger_ring(rig, 1, 1)
    rig.site.bells[0].empty()

    rig.start(Role.READER, prepare=without_belt)

    assert receive(rig.stacks[0]) == packet(0, back=True)


def test_a_reader_takes_what_control_hands_over_even_where_it_is_the_only_one(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.start(Role.READER, prepare=without_belt)
    come_back(rig, 1000)
    assert receive(rig.stacks[0]) == BACK

    fill_stranger_ring(rig, 2, 30, CONTROL)
    fill_stranger_ring(rig, 1, 30, CONTROL)  # the same again: there is one window for all

    assert [receive(rig.stacks[0]) for _ in range(60)] == [packet(each, back=True) for each in range(60)]
    assert soon(lambda: rig.count("drop.replay") == 30)


def test_a_reader_has_the_locks_of_its_stranger_rings_until_it_dies(make_rig: MakeRig) -> None:
    rig = make_rig(workers=3)
    rig.start(Role.READER, 1)
    assert soon(lambda: rig.count("mp.passes", worker=1) > 0)
    locks = [rig.ring_locks.lock(stranger_lock(source, 1)) for source in (0, 2, CONTROL)]

    assert not any(lock.try_take() for lock in locks)
    rig.bury(Role.READER, 1)
    assert all(lock.try_take() for lock in locks)


def test_a_second_consumer_of_strangers_ends_with_a_contradiction(make_rig: MakeRig) -> None:
    rig = make_rig(workers=2)
    assert rig.ring_locks.lock(stranger_lock(1, 0)).try_take()

    assert rig.start(Role.READER).wait() == 4

    log = rig.log_text()
    assert 'level=ERROR msg="ring contradiction" role=reader/0 field=consumer' in log
    assert "stranger ring from 1 to 0" in log


# Once a second.


def test_keys_of_tunnels_that_ended_are_swept_again_and_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    calls = shared_words(1)

    def sweep(_: object) -> int:
        calls[0] += 1
        return 0

    kept = "accelerated.NativeReader" if native.is_native() else "python.PythonReader"
    rig.start(
        Role.READER,
        prepare=lambda: pytest.MonkeyPatch().setattr(f"nebula_mp.datapath.{kept}.sweep", sweep),
    )

    assert soon(lambda: calls[0] >= 3)
    assert calls[0] <= rig.count("mp.passes") + 1


# The end.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_for_everybody_are_none_of_a_readers_business(make_rig: MakeRig, number: int) -> None:
    rig = make_rig()
    child = rig.start(Role.READER)
    assert soon(lambda: rig.count("mp.passes") > 0)

    os.kill(child.pid, number)
    rig.give(1)

    assert counter_of(receive(rig.site.far)) == 3
    assert rig.tell(Role.READER) == 0
    assert rig.log_text() == ""


def test_a_reader_ends_although_packets_never_end(make_rig: MakeRig) -> None:
    rig = make_rig()
    child = rig.start(Role.READER)
    assert soon(lambda: rig.count("mp.passes") > 0)
    child.stop()
    for number in range(300):
        rig.give(number)
    os.kill(child.pid, signal.SIGUSR2)
    child.go_on()

    assert child.wait() == 0
    assert rig.is_empty()
    rig.site.check_ledger()


def test_a_lost_tun_queue_ends_the_reader_with_its_exit_code_and_one_line(make_rig: MakeRig) -> None:
    rig = make_rig()
    directory = os.open("/", os.O_RDONLY)  # polls as readable; reading it is an error
    rig.tun_fds[0] = directory

    assert rig.start(Role.READER).wait() == 3

    os.close(directory)
    (line,) = rig.log_text().splitlines()
    assert 'level=ERROR msg="descriptor lost" role=reader/0 device=nmp-rig error="[Errno 21]' in line


@pytest.mark.e2e
def test_a_reader_asleep_notices_that_its_device_is_deleted(make_rig: MakeRig) -> None:
    rig = make_rig()
    with private_network():
        device, _ = TunDevice.open(TunConfig(dev="nmprd0"))
        try:
            rig.tun_fds[0] = device.fileno()
            child = rig.start(Role.READER, prepare=without_belt)
            assert soon(lambda: rig.count("mp.passes") > 0)
            with IPRoute() as routes:
                (index,) = routes.link_lookup(ifname="nmprd0")
                routes.link("del", index=index)
            assert child.wait() == 3
        finally:
            device.close()

    assert any(f"[Errno {number}]" in rig.log_text() for number in (errno.EBADFD, errno.EFAULT))


def test_a_lost_udp_socket_ends_the_reader_with_the_same_code(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.udp_fds[0] = rig.log  # no socket

    assert rig.start(Role.READER).wait() == 3
    assert 'msg="descriptor lost" role=reader/0 device=nmp-rig error="[Errno 88]' in rig.log_text()


@pytest.mark.parametrize("ring", ["seal", "open"])
@pytest.mark.parametrize("drain", [DrainMode.READER, DrainMode.WRITER])
def test_an_impossible_tail_ends_the_reader_with_its_own_code_and_one_line(
    make_rig: MakeRig, ring: str, drain: DrainMode
) -> None:
    rig = make_rig(drain=drain)
    child = rig.start(Role.READER, prepare=without_belt)
    assert soon(lambda: rig.count("mp.cpu.us") > 0), "its first pass"

    rings.patch((rig.site.seal if ring == "seal" else rig.site.opened)[0], "tail", 7)
    rig.give(1)
    come_back(rig, 3)

    assert child.wait() == 4
    (line,) = rig.log_text().splitlines()
    field = "tail" if drain is DrainMode.WRITER else "head"
    assert f'level=ERROR msg="ring contradiction" role=reader/0 field={field} value=' in line


def test_a_ring_emptied_behind_our_back_is_a_contradiction(make_rig: MakeRig) -> None:
    rig = make_rig()
    child = rig.start(Role.READER, prepare=without_belt)
    assert soon(lambda: rig.count("mp.cpu.us") > 0), "its first pass"

    rig.site.seal[0].reset()
    rig.give(1)

    assert child.wait() == 4
    assert "field=generation value=2" in rig.log_text()


# A successor.


def test_a_successor_goes_on_with_the_rings_the_counters_and_the_statistics(make_rig: MakeRig) -> None:
    rig = make_rig(drain=DrainMode.WRITER)
    rig.start(Role.READER)
    rig.give(1)
    come_back(rig, 3)
    assert soon(lambda: rig.site.seal[0].fill() == rig.site.opened[0].fill() == 1)
    assert soon(lambda: rig.count("mp.udp.rx.packets") == 1)
    rig.bury(Role.READER)
    rig.drain = DrainMode.READER

    rig.start(Role.READER, prepare=without_belt)

    assert counter_of(receive(rig.site.far)) == 3
    assert receive(rig.stacks[0]) == BACK
    rig.give(2)
    assert counter_of(receive(rig.site.far)) == 4
    come_back(rig, 3)
    assert soon(lambda: rig.count(Drop.REPLAY) == 1)
    assert rig.count("mp.udp.rx.packets") == 2


# What it is told.


def test_overlay_limits_and_poison_reach_the_data_path(make_rig: MakeRig) -> None:
    rig = make_rig(drain=DrainMode.WRITER, limits=UpcallLimits(plain=(1, 1)))
    rig.overlay = (IPv4Network("127.0.0.0/8"),)
    rig.start(Role.READER)

    come_back(rig, 3)
    for port in range(100, 110):
        rig.give(1, port=port)

    assert soon(lambda: rig.count(Drop.LOOPED) == 1)
    assert soon(lambda: rig.count(Drop.UPCALL_LIMITED) > 0)
    unused_area = os.pread(rig.site.seal[0].data.descriptor, 1000, PAGE_BYTES)
    assert unused_area == bytes([POISON]) * 1000
