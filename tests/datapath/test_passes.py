"""A pass over one direction, and what a reader sleeps on; on both kernels."""

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType

import pytest

from nebula_mp.datapath.api import HOLDING, MORE, Half
from nebula_mp.newtypes import Seconds
from nebula_mp.shm_counters import SPAN_MAX
from nebula_mp.shm_ring import Bell
from nebula_mp.wire.header import Header
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import (
    INDEX_NEAR,
    Site,
    connect,
    deliver,
    drained,
    message,
    packet,
    store_counter,
)
from tests.support.native import current

pytestmark = pytest.mark.usefixtures("kernel")

LIMIT_MS = 10_000


@pytest.fixture
def bell() -> Iterator[Bell]:
    made = Bell.create()
    yield made
    made.close()


def outbound(site: Site, bell: Bell, worker: int = 0) -> Half:
    udp, tunnels, stats = site.udp[worker].fileno(), site.tables.tunnels.read_only, site.pages[-1].descriptor
    end = site.seal_end(worker)
    drain = site.kernel.drain_udp(end, udp, tunnels=tunnels, stats=stats, offloads=site.offloads)
    return site.reader(worker).outbound(drain, bell)


def inbound(site: Site, bell: Bell) -> Half:
    stats = site.pages[1].descriptor
    drain = site.kernel.drain_tun(site.open_end(), site.tun_fd, stats=stats, offloads=site.offloads)
    return site.reader().inbound(drain, bell)


def test_a_pass_that_drains_sends_what_it_reads_and_wakes_nobody(site: Site, bell: Bell) -> None:
    half = outbound(site, bell)
    site.allow(packet(0))
    site.inside.send(packet(0))

    assert half.work(64, True) == 0

    assert site.far.recv(2000)
    assert not bell.wait(0)
    site.check_ledger()


def test_a_pass_that_does_not_drain_leaves_the_ring_to_the_writer_and_wakes_it(
    site: Site, bell: Bell
) -> None:
    half = outbound(site, bell)
    assert half.work(64, False) == 0
    assert not bell.wait(0), "for an empty ring"
    site.allow(packet(0))
    site.inside.send(packet(0))

    for _ in range(2):  # the second publishes nothing, but the area waits still
        assert half.work(64, False) == 0
        assert bell.wait(0)

    assert site.send() == 1
    assert site.stats()["mp.lease.refused"] == 0, "it was not wanted"


def test_a_ring_that_is_nearly_full_is_emptied_by_who_fills_it_a_quarter_at_a_time(
    site: Site, bell: Bell
) -> None:
    """Its writer has not got a processor yet. The site's rings have 8 areas."""
    half = outbound(site, bell)
    site.allow(packet(0))
    fill = []
    for number in range(20):
        site.inside.send(packet(number))
        assert half.work(64, False) == 0
        assert bell.wait(0)
        fill.append(site.seal[0].fill())

    assert fill[:8] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert max(fill) == 6
    assert site.drops() == {}
    arrived = [Header.parse(each).counter for each in drained([site.far])]
    assert arrived == list(range(3, 3 + 20 - fill[-1]))
    site.send()
    site.check_ledger()


def test_what_came_in_is_written_by_the_pass_that_opened_it(site: Site, bell: Bell) -> None:
    half = inbound(site, bell)
    site.allow(packet(0, back=True), inbound=True)
    deliver(site, message(3, packet(0, back=True)))

    assert half.work(64, True) == 0

    assert site.received() == [packet(0, back=True)]
    assert not bell.wait(0)


def test_a_pass_says_that_it_ended_with_its_budget(site: Site, bell: Bell) -> None:
    half = outbound(site, bell)
    site.allow(packet(0))
    for _ in range(5):
        site.inside.send(packet(0))

    assert [half.work(2, True) & MORE for _ in range(4)] == [MORE, MORE, 0, 0]
    assert site.stats()["mp.tun.rx.packets"] == 5


def test_a_pass_asks_the_clock_that_the_reader_was_given(site: Site, bell: Bell) -> None:
    """A flow that was admitted ends by that clock."""
    half = outbound(site, bell)
    site.allow(packet(0))
    site.now = Seconds(site.now + 3600)

    site.inside.send(packet(0))
    half.work(64, True)

    assert [each.reason.name for each in site.upcalls()] == ["NEW_FLOW_OUT"]


def test_a_pass_says_that_packets_are_held_back_and_when_no_more(make_site: MakeSite, bell: Bell) -> None:
    """Another worker has an older packet of the tunnel unsent: a peer would take ours for one from the past."""
    site = make_site(workers=2)
    connect(site)
    site.allow(packet(0))
    slow, half = site.reader(0).sealer, outbound(site, bell, worker=1)
    site.inside.send(packet(0))
    assert slow.poll(1) == 1
    store_counter(site, INDEX_NEAR & 0xFFFF, 3 + SPAN_MAX)
    site.inside.send(packet(0))

    assert half.work(64, True) == HOLDING
    assert half.work(64, True) == HOLDING
    assert inbound(site, bell).work(64, True) == 0, "which has nothing to do with it"
    site.send(0)
    assert half.work(64, True) == 0
    assert site.stats()["mp.udp.tx.packets"] == 2


# What a reader sleeps on.


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    with ExitStack() as closing:
        made = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
        for each in made:
            closing.enter_context(each[0])
            closing.enter_context(each[1])
        yield made


Pairs = list[tuple[socket.socket, socket.socket]]


def test_each_source_has_the_bit_of_its_place(pairs: Pairs) -> None:
    sources = current().sources([near.fileno() for near, _ in pairs])
    assert sources.wait(0, 0b111) == 0

    for place in (2, 0):
        pairs[place][1].send(b"x")
        found = sources.wait(LIMIT_MS, 0b111)
        assert found >> place & 1

    assert sources.wait(LIMIT_MS, 0b111) == 0b101


def test_what_is_not_heeded_wakes_nobody_until_it_is(pairs: Pairs) -> None:
    sources = current().sources([near.fileno() for near, _ in pairs])
    pairs[1][1].send(b"x")

    begun = time.monotonic()
    assert sources.wait(50, 0b101) == 0
    assert time.monotonic() - begun >= 0.045
    assert sources.wait(LIMIT_MS, 0b010) == 0b010
    assert sources.wait(0, 0b001) == 0


def test_there_are_at_most_64_sources_and_none_twice(pairs: Pairs) -> None:
    descriptor = pairs[0][0].fileno()
    with pytest.raises(AssertionError):
        current().sources(range(65))
    with pytest.raises(AssertionError):
        current().sources([descriptor, descriptor])


def test_a_source_that_failed_shows_although_it_is_not_heeded() -> None:
    source, sink = os.pipe()
    sources = current().sources([source])
    os.close(sink)

    assert sources.wait(LIMIT_MS, 0) == 1
    os.close(source)


def test_a_signal_is_handled_although_nothing_has_come(pairs: Pairs) -> None:
    """Its handler runs while the process would sleep, as that which tells a reader to finish."""
    source, sink = os.pipe2(os.O_NONBLOCK)
    told = []

    def handle(number: int, frame: FrameType | None) -> None:
        told.append((number, frame))

    before = signal.signal(signal.SIGALRM, handle)
    woken = signal.set_wakeup_fd(sink)
    try:
        sources = current().sources([pairs[0][0].fileno(), source])
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        begun = time.monotonic()
        while not told:
            sources.wait(LIMIT_MS, 0b11)
            assert time.monotonic() - begun < LIMIT_MS / 1000
        assert select.select([source], [], [], 0)[0]
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGALRM, before)
        os.close(source)
        os.close(sink)
