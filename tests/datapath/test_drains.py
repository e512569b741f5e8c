"""Rings to TUN and UDP: every fault of every call, and that an area is released only behind its last call."""

import errno
import os
import socket
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Any, cast

import pytest

from nebula_mp.config.model import Offloads
from nebula_mp.datapath.api import Drain, Drop, RingEnd
from nebula_mp.datapath.drains import TunDrain, UdpDrain
from nebula_mp.newtypes import UdpAddr
from nebula_mp.shm import LockFile, Mapping
from nebula_mp.shm_ring import DATA, HEAD, STATE, TAIL
from tests.datapath.sites import INDEX_NEAR, Site, address_of, drained, loopback
from tests.datapath.superpackets import TIMESTAMPS, Plan
from tests.support import native, native_calls, rings
from tests.support.packets import TCP, UDP
from tests.support.watched import KilledError

pytestmark = pytest.mark.usefixtures("kernel")

ROW = INDEX_NEAR & 0xFFFF
CONTENTS = [bytes([number]) * (30 + number) for number in range(9)]


def publish(site: Site, memory: Any, *areas: list[bytes], segment: int = 0) -> None:
    segment = segment or int(memory in site.opened)  # there, a number of packets
    producer = rings.produce(memory, poison=True)
    for contents in areas:
        assert producer.try_begin()
        for each in contents:
            assert producer.try_add(each, segment, ROW)
        producer.publish()


def udp_drain(site: Site, end: RingEnd | None = None) -> Drain:
    return site.kernel.drain_udp(
        end or site.seal_end(),
        site.udp[0].fileno(),
        tunnels=site.tables.tunnels.read_only,
        stats=site.pages[1].descriptor,
        offloads=site.offloads,
    )


def tun_drain(site: Site, end: RingEnd | None = None) -> Drain:
    return site.kernel.drain_tun(
        end or site.open_end(),
        site.tun.fileno(),
        stats=site.pages[1].descriptor,
        offloads=site.offloads,
    )


def tail(site: Site, *, seal: bool) -> int:
    memory = (site.seal if seal else site.opened)[0]
    return Mapping(memory.state.read_only, STATE, writable=False).words[TAIL]


class Calls:
    """Stands for a system call: before call number `at` (from 0) `fault` happens, each time or once."""

    def __init__(
        self, real: Callable[..., int | None], fault: Callable[[], None], at: int, *, times: int = 1
    ) -> None:
        self.count = 0
        self._real = real
        self._fault = fault
        self._at = at
        self._times = times

    def __call__(self, *arguments: Any) -> int | None:
        number = self.count
        self.count += 1
        if self._at <= number < self._at + self._times:
            self._fault()
        return self._real(*arguments)


def refuse(number: int) -> Callable[[], None]:
    def fault() -> None:
        raise OSError(number, "injected")

    return fault


class _Socket:
    """A socket with another `sendto`."""

    def __init__(self, sendto: Callable[..., int | None]) -> None:
        self.sendto = sendto


def watch_udp(
    drain: Drain, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], at: int, *, times: int = 1
) -> Calls:
    if not isinstance(drain, UdpDrain):
        return watch_native(monkeypatch, "sendto", fault, at, times)
    calls = Calls(drain._socket.sendto, fault, at, times=times)
    drain._socket = cast("socket.socket", _Socket(calls))
    return calls


def watch_tun(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], at: int, *, times: int = 1
) -> Calls:
    if native.is_native():
        return watch_native(monkeypatch, "write", fault, at, times)
    calls = Calls(os.write, fault, at, times=times)
    monkeypatch.setattr("nebula_mp.datapath.drains.os.write", calls)
    return calls


def watch_native(
    monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[], None], at: int, times: int
) -> Calls:
    calls = Calls(_go_on, fault, at, times=times)
    native_calls.hook(monkeypatch, **{name: calls})
    return calls


def _go_on(*_: object) -> None:
    """Let the native kernel make the call."""


def replace_write(monkeypatch: pytest.MonkeyPatch, write: Callable[[int, memoryview], int | None]) -> None:
    """Let this be called in place of `os.write`; None: go on with that."""
    if native.is_native():
        native_calls.hook(monkeypatch, write=write)
        return
    real = os.write

    def replaced(descriptor: int, data: memoryview) -> int:
        found = write(descriptor, data)
        return real(descriptor, data) if found is None else found

    monkeypatch.setattr("nebula_mp.datapath.drains.os.write", replaced)


def dies(run: Callable[[], object]) -> None:
    """Run this, in which a call raises KilledError."""
    if native.is_native():
        native_calls.dies(run)
        return
    with pytest.raises(KilledError):
        run()


def test_each_entry_is_one_datagram_to_the_address_that_the_tunnel_has_now(site: Site) -> None:
    publish(site, site.seal[0], CONTENTS[:2], CONTENTS[2:4])
    drain = udp_drain(site)

    assert drain.drain(1) == 1
    assert drained([site.far]) == CONTENTS[:2]
    with loopback() as elsewhere:
        site.update(underlay=address_of(elsewhere))
        assert drain.drain(10) == 1
        assert drained([elsewhere]) == CONTENTS[2:4]

    assert drain.drain(10) == 0
    assert site.stats()["mp.udp.tx.packets"] == 4
    assert site.stats()["mp.udp.tx.bytes"] == sum(map(len, CONTENTS[:4]))


def test_an_entry_of_several_datagrams_is_cut_at_its_segment(site: Site) -> None:
    publish(site, site.seal[0], [bytes(range(70))], segment=30)

    udp_drain(site).drain(1)

    assert drained([site.far]) == [bytes(range(30)), bytes(range(30, 60)), bytes(range(60, 70))]
    assert site.stats()["mp.udp.tx.packets"] == 3


def test_each_entry_of_the_open_ring_is_one_packet_of_the_device(site: Site) -> None:
    publish(site, site.opened[0], CONTENTS[:3], CONTENTS[3:])
    drain = tun_drain(site)

    assert drain.drain(1) == 1
    assert site.received() == CONTENTS[:3]
    assert drain.drain(10) == 1

    assert site.received() == CONTENTS[3:]
    assert site.stats()["mp.tun.tx.packets"] == 9


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOBUFS, Drop.UDP_FULL),
        (errno.ENOMEM, Drop.UDP_FULL),
        (errno.ENETUNREACH, Drop.UDP_UNREACHABLE),
        (errno.EHOSTUNREACH, Drop.UDP_UNREACHABLE),
        (errno.ENETDOWN, Drop.UDP_UNREACHABLE),
        (errno.EMSGSIZE, Drop.UDP_TOO_BIG),
        (errno.EPERM, Drop.UDP_REFUSED_LOCALLY),
        (errno.EIO, Drop.UDP_OTHER),
        (errno.EINVAL, Drop.UDP_OTHER),
    ],
)
def test_a_datagram_refused_at_any_call_is_counted_and_all_others_go(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int, reason: Drop
) -> None:
    for at in range(9):
        publish(site, site.seal[0], CONTENTS[:5], CONTENTS[5:])
        drain = udp_drain(site)
        watch_udp(drain, monkeypatch, refuse(number), at)

        assert drain.drain(10) == 2

        assert drained([site.far]) == CONTENTS[:at] + CONTENTS[at + 1 :]
    assert site.drops() == {reason: 9}
    assert site.stats()["mp.udp.tx.packets"] == 72


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.EPROTO, errno.EHOSTDOWN])
def test_the_answer_to_an_earlier_datagram_costs_none(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for at in range(9):
        publish(site, site.seal[0], CONTENTS)
        drain = udp_drain(site)
        watch_udp(drain, monkeypatch, refuse(number), at)
        drain.drain(10)
        assert drained([site.far]) == CONTENTS

    assert site.stats()["mp.rx.icmp"] == 9
    assert site.drops() == {}


def test_a_socket_that_is_full_for_a_moment_loses_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(9):
        publish(site, site.seal[0], CONTENTS)
        drain = udp_drain(site)
        watch_udp(drain, monkeypatch, refuse(errno.EAGAIN), at)
        drain.drain(10)
        assert drained([site.far]) == CONTENTS

    assert site.drops() == {}


def test_a_socket_that_stays_full_is_waited_for_once_in_a_call(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(site, site.seal[0], CONTENTS)
    drain = udp_drain(site)
    watch_udp(drain, monkeypatch, refuse(errno.EAGAIN), 0, times=100)
    waits = _never_ready(drain, monkeypatch)

    assert drain.drain(10) == 1

    assert waits == [1]
    publish(site, site.seal[0], CONTENTS)
    drain.drain(10)
    assert waits == [1, 1]
    assert site.drops() == {Drop.UDP_FULL: 18}


def _never_ready(drain: Drain, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let no wait for room succeed; gives the limits of the waits, in milliseconds."""
    waits: list[int] = []

    class Poll:
        def poll(self, limit_ms: int) -> list[object]:
            waits.append(limit_ms)
            return []

    if isinstance(drain, UdpDrain | TunDrain):
        monkeypatch.setattr(drain._room, "_poll", Poll())
    else:
        native_calls.hook(monkeypatch, poll=lambda _, __, limit_ms: len(Poll().poll(limit_ms)))
    return waits


def _none(site: Site) -> None:
    site.update(underlay=None)


def _other_family(site: Site) -> None:
    site.update(underlay=UdpAddr(IPv6Address("2001:db8::1"), 4242))


@pytest.mark.parametrize("change", [_none, _other_family])
def test_a_tunnel_without_an_address_this_socket_can_send_to_is_unreachable(
    site: Site, change: Callable[[Site], None]
) -> None:
    change(site)
    publish(site, site.seal[0], CONTENTS)

    assert udp_drain(site).drain(10) == 1

    assert site.drops() == {Drop.UDP_UNREACHABLE: 9}


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOBUFS, Drop.TUN_NO_MEMORY),
        (errno.ENOMEM, Drop.TUN_NO_MEMORY),
        (errno.EINVAL, Drop.TUN_REFUSED),
        (errno.EIO, Drop.TUN_REFUSED),
        (errno.ENETDOWN, Drop.TUN_REFUSED),
    ],
)
def test_a_packet_refused_at_any_call_is_counted_and_all_others_are_written(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int, reason: Drop
) -> None:
    for at in range(9):
        publish(site, site.opened[0], CONTENTS[:5], CONTENTS[5:])
        with monkeypatch.context() as injecting:
            watch_tun(injecting, refuse(number), at)
            assert tun_drain(site).drain(10) == 2
        assert site.received() == CONTENTS[:at] + CONTENTS[at + 1 :]

    assert site.drops() == {reason: 9}
    assert site.stats()["mp.tun.tx.packets"] == 72


VIRTIO = Offloads(udp_segment=False, udp_gro=False)


def frame(plan: Plan) -> bytes:
    return plan.virtio() + plan.packet()


def test_a_superpacket_is_written_whole_and_counts_as_what_its_packets_would_have_been(site: Site) -> None:
    site.offloads = VIRTIO
    plans = [
        Plan(4, TCP, bytes(range(250)) * 40, 1248, options=TIMESTAMPS),
        Plan(6, UDP, bytes(range(250)) * 20, 600),
    ]
    publish(site, site.opened[0], [bytes(10) + CONTENTS[3]])
    for plan in plans:
        publish(site, site.opened[0], [frame(plan)], segment=plan.count)

    assert tun_drain(site).drain(10) == 3

    assert site.received() == [bytes(10) + CONTENTS[3], *map(frame, plans)]
    packets = [CONTENTS[3], *(packet for plan in plans for packet in plan.packets())]
    assert site.stats()["mp.tun.tx.packets"] == len(packets) == 1 + 9 + 9
    assert site.stats()["mp.tun.tx.bytes"] == sum(map(len, packets))


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOBUFS, Drop.TUN_NO_MEMORY),
        (errno.ENOMEM, Drop.TUN_NO_MEMORY),
        (errno.EAGAIN, Drop.TUN_FULL),
    ],
)
def test_the_packets_of_a_superpacket_there_is_no_room_for_are_all_counted(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int, reason: Drop
) -> None:
    site.offloads = VIRTIO
    plan = Plan(4, TCP, bytes(10_000), 1248)
    publish(site, site.opened[0], [frame(plan)], segment=plan.count)
    publish(site, site.opened[0], [bytes(10) + CONTENTS[0]])
    drain = tun_drain(site)
    _never_ready(drain, monkeypatch)
    watch_tun(monkeypatch, refuse(number), 0)

    assert drain.drain(10) == 2

    assert site.received() == [bytes(10) + CONTENTS[0]]
    assert site.drops() == {reason: plan.count}
    assert site.stats()["mp.tun.tx.packets"] == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_a_superpacket_that_is_refused_is_written_packet_by_packet(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    site.offloads = VIRTIO
    plan = Plan(4, TCP, bytes(10_000), 1248)
    publish(site, site.opened[0], [frame(plan)], segment=plan.count)
    watch_tun(monkeypatch, refuse(number), 0)

    assert tun_drain(site).drain(10) == 1

    assert site.received() == [bytes(10) + packet for packet in plan.packets()]
    assert site.drops() == {}
    stats = site.stats()
    assert (stats["mp.tun.tx.packets"], stats["mp.tun.split"]) == (plan.count, 1)
    assert stats["mp.tun.tx.bytes"] == sum(map(len, plan.packets()))


def test_after_three_refusals_in_a_row_no_superpacket_is_tried_any_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.offloads = VIRTIO
    plan = Plan(4, TCP, bytes(10_000), 1248)
    publish(site, site.opened[0], [frame(plan)] * 5, segment=plan.count)
    tried = _refuse_superpackets(monkeypatch, plan.count)

    drain = tun_drain(site)

    drain.drain(10)

    assert site.received() == [bytes(10) + packet for packet in plan.packets()] * 5
    assert len(tried) == 3
    assert drain.given_up == "tso and uso towards the local stack"
    assert site.stats()["mp.tun.split"] == 5


def test_a_device_that_takes_nothing_at_all_is_still_offered_superpackets_later(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.offloads = VIRTIO
    plan = Plan(4, TCP, bytes(10_000), 1248)
    drain = tun_drain(site)
    publish(site, site.opened[0], [frame(plan)] * 5, segment=plan.count)
    with monkeypatch.context() as down:
        calls = watch_tun(down, refuse(errno.EIO), 0, times=1000)
        drain.drain(10)
    assert site.drops() == {Drop.TUN_REFUSED: 5 * plan.count}
    assert calls.count == 5 + 5 * plan.count  # each as a whole first
    publish(site, site.opened[0], [frame(plan)], segment=plan.count)

    drain.drain(10)

    assert site.received() == [frame(plan)]
    assert site.stats()["mp.tun.split"] == 0


def _refuse_superpackets(monkeypatch: pytest.MonkeyPatch, packets: int) -> list[int]:
    """Let every write of more than one packet fail; gives their sizes as they happen."""
    tried: list[int] = []

    def refuse_large(_: int, data: memoryview) -> None:
        if len(data) > 10_000 // packets * 2:
            tried.append(len(data))
            raise OSError(errno.EINVAL, "injected")

    replace_write(monkeypatch, refuse_large)
    return tried


def test_the_packets_of_a_superpacket_in_progress_are_all_counted_as_passed_over(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.offloads = VIRTIO
    plan = Plan(4, TCP, bytes(10_000), 1248)
    publish(site, site.opened[0], [frame(plan)] * 3, segment=plan.count)
    with monkeypatch.context() as injecting:
        watch_tun(injecting, _die, 1)
        dies(lambda: tun_drain(site).drain(10))

    tun_drain(site).drain(10)

    assert site.received() == [frame(plan)] * 2
    assert site.stats()["mp.ring.resumed"] == plan.count
    assert site.stats()["mp.tun.tx.packets"] == 2 * plan.count


def test_a_partial_write_counts_as_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, site.opened[0], CONTENTS)
    replace_write(monkeypatch, lambda _, data: len(data) - 1)

    tun_drain(site).drain(10)

    assert site.drops() == {Drop.TUN_REFUSED: 9}


def test_a_device_that_is_full_for_a_moment_loses_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(9):
        publish(site, site.opened[0], CONTENTS)
        with monkeypatch.context() as injecting:
            watch_tun(injecting, refuse(errno.EAGAIN), at)
            tun_drain(site).drain(10)
        assert site.received() == CONTENTS

    assert site.stats()["mp.tun.again"] == 9
    assert site.drops() == {}


def test_a_device_that_stays_full_is_waited_for_once_in_a_call(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(site, site.opened[0], CONTENTS)
    drain = tun_drain(site)
    watch_tun(monkeypatch, refuse(errno.EAGAIN), 0, times=100)
    waits = _never_ready(drain, monkeypatch)

    assert drain.drain(10) == 1

    assert waits == [10]
    publish(site, site.opened[0], CONTENTS)
    drain.drain(10)
    assert waits == [10, 10]
    assert site.drops() == {Drop.TUN_FULL: 18}


@pytest.mark.parametrize("number", [errno.EBADF, errno.EBADFD, errno.EFAULT])
def test_a_lost_device_raises_and_a_successor_passes_over_what_was_in_progress(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    publish(site, site.opened[0], CONTENTS)
    with monkeypatch.context() as injecting:
        watch_tun(injecting, refuse(number), 4)
        with pytest.raises(OSError) as lost:
            tun_drain(site).drain(10)
        assert lost.value.errno == number
    assert tail(site, seal=False) == 0

    tun_drain(site).drain(10)

    assert site.received() == CONTENTS[:4] + CONTENTS[5:]
    assert site.stats()["mp.ring.resumed"] == 1


@pytest.mark.parametrize("after", [False, True], ids=["before the write", "after the write"])
def test_whoever_dies_in_a_write_costs_one_packet_at_most_and_none_comes_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    for at in range(9):
        publish(site, site.opened[0], CONTENTS)
        real = os.write

        def die(at: int = at, real: Callable[..., int] = real) -> None:
            if after:
                real(site.tun.fileno(), CONTENTS[at])
            raise KilledError

        with monkeypatch.context() as injecting:
            watch_tun(injecting, die, at)
            dies(lambda: tun_drain(site).drain(10))

        tun_drain(site).drain(10)

        assert site.received() == (CONTENTS if after else CONTENTS[:at] + CONTENTS[at + 1 :])
    assert site.stats()["mp.ring.resumed"] == 9


def test_whoever_dies_in_a_send_has_the_whole_area_sent_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(9):
        publish(site, site.seal[0], CONTENTS)
        drain = udp_drain(site)
        with monkeypatch.context() as injecting:
            watch_udp(drain, injecting, _die, at)
            dies(lambda: drain.drain(10))  # noqa: B023 - at once

        udp_drain(site).drain(10)

        assert drained([site.far]) == CONTENTS[:at] + CONTENTS


def _die() -> None:
    raise KilledError


@pytest.mark.parametrize("seal", [True, False], ids=["seal ring", "open ring"])
def test_an_area_is_neither_released_nor_touched_while_a_call_on_it_has_not_returned(
    site: Site, monkeypatch: pytest.MonkeyPatch, *, seal: bool
) -> None:
    memory = (site.seal if seal else site.opened)[0]
    areas = [CONTENTS[:4], CONTENTS[4:], CONTENTS[2:7]]
    publish(site, memory, *areas)
    drain = udp_drain(site) if seal else tun_drain(site)
    producer = rings.produce(memory, poison=True)
    seen: list[int] = []

    def inside(data: memoryview) -> None:
        before = bytes(data)
        while producer.try_begin():  # somebody fills all there is, while the call is running
            producer.try_add(b"\xee" * 50, 1)
            producer.publish()
        assert bytes(data) == before
        seen.append(tail(site, seal=seal))

    if isinstance(drain, UdpDrain):
        send = drain._socket.sendto

        def sendto(data: memoryview, *others: Any) -> int:
            inside(data)
            return send(data, *others)

        drain._socket = cast("socket.socket", _Socket(sendto))
    elif seal:
        native_calls.hook(monkeypatch, sendto=lambda _, data, __: inside(data))
    else:
        replace_write(monkeypatch, lambda _, data: inside(data))

    assert drain.drain(3) == 3

    assert seen == [0] * 4 + [1] * 5 + [2] * 5
    assert producer.waiting() == Mapping(memory.data.read_only, DATA, writable=False).words[HEAD] - 3


def test_a_parts_end_leaves_the_descriptor_open(site: Site) -> None:
    publish(site, site.seal[0], CONTENTS)
    descriptor = site.udp[0].fileno()
    drain = udp_drain(site)

    drain.drain(1)
    del drain

    os.fstat(descriptor)
    assert drained([site.far]) == CONTENTS


@pytest.mark.parametrize("seal", [True, False], ids=["seal ring", "open ring"])
def test_of_two_drains_of_one_ring_one_has_the_lease(site: Site, *, seal: bool) -> None:
    locks = LockFile.create()
    end = (site.seal_end() if seal else site.open_end())._replace(locks=locks.descriptor)
    memory = (site.seal if seal else site.opened)[0]

    def attach(holder: int) -> Drain:
        return (udp_drain if seal else tun_drain)(site, end._replace(holder=holder))

    one, other = attach(rings.READER), attach(rings.WRITER)

    assert one.areas == memory.geometry.areas
    assert one.try_take()
    assert memory.holder() == (1001, 1)
    assert not other.try_take()
    publish(site, memory, CONTENTS[:1], CONTENTS[1:2])
    assert one.pending() == 2
    assert one.drain(1) == 1
    assert one.drop()
    assert memory.holder() is None
    assert other.try_take()
    assert other.drain(9) == 1
    assert not other.drop()
    locks.close()
