"""Real multiqueue devices in a namespace: who gets packets while queues are detached and attached again."""

import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import pytun

from nebula_mp.config.model import NO_OFFLOADS, Offloads, TunConfig
from nebula_mp.datapath.virtio import HEADER_BYTES
from nebula_mp.demo.netns import Lab, Namespace
from nebula_mp.errors import SystemCallError
from nebula_mp.ioctl_tun import TunDevice
from nebula_mp.privileges import Account, lock_down_child
from nebula_mp.tun_queues import TunQueues, set_attached
from nebula_mp.udp_socket import UDP_SEGMENT
from tests.support.netns import PREFIX, entered
from tests.test_privileges import Ends, in_child

pytestmark = pytest.mark.e2e
DEVICE = TunConfig(dev="nmpq", mtu=1280, tx_queue=700)
SEVERAL = replace(NO_OFFLOADS, multiqueue=True)
FLOWS = 64
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
NOBODY = Account(65534, 65534, "nobody")


@pytest.fixture(scope="module")
def space() -> Iterator[Namespace]:
    with Lab(f"{PREFIX}-{os.getpid()}") as lab:
        yield lab.namespace("q")


@contextmanager
def device(
    space: Namespace, count: int, config: TunConfig = DEVICE, wanted: Offloads = SEVERAL
) -> Iterator[TunQueues]:
    with entered(space):
        opened, warnings = TunQueues.open(config, count, wanted)
    try:
        assert warnings == ()
        space.run("sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{opened.name}/disable_ipv6")
        space.run("ip", "address", "add", "198.51.100.1/24", "dev", opened.name)
        space.run("ip", "link", "set", opened.name, "up")
        yield opened
    finally:
        opened.close()


def send_flows(space: Namespace, count: int = FLOWS) -> None:
    """One datagram of each of `count` flows to a host behind the device."""
    with entered(space), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("198.51.100.1", 40_000))
        for number in range(count):
            sender.sendto(b"x", ("198.51.100.2", 5000 + number))


def flows(queue: TunDevice) -> set[int]:
    """The destination ports of the packets that wait in a queue."""
    found = set()
    with suppress(BlockingIOError):
        while packet := os.read(queue.fileno(), 2000):
            found.add(struct.unpack_from("!H", packet, 22)[0])
    return found


def flows_by_queue(space: Namespace, queues: TunQueues) -> list[set[int]]:
    send_flows(space)
    return [flows(queue) for queue in queues.queues]


def has_device(space: Namespace, name: str) -> bool:
    return f" {name}: " in space.run("ip", "-o", "link", "show")


def test_queues_are_closed_on_exec_and_do_not_block(space: Namespace) -> None:
    with device(space, 2) as queues:
        for queue in queues.queues:
            assert not os.get_inheritable(queue.fileno())
            assert not os.get_blocking(queue.fileno())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_queue_has_a_share_of_the_flows_and_each_packet_comes_once(
    space: Namespace, count: int
) -> None:
    with device(space, count) as queues:
        shares = flows_by_queue(space, queues)

    assert len(queues.queues) == count
    assert sum(len(share) for share in shares) == FLOWS
    assert set.union(*shares) == set(range(5000, 5000 + FLOWS))
    assert all(shares)


def test_the_device_has_the_mtu_and_queue_length_asked_for(space: Namespace) -> None:
    with device(space, 2) as queues:
        line = space.run("ip", "-o", "link", "show", queues.name)

    assert "mtu 1280 " in line
    assert "qlen 700" in line


def test_the_kernel_chooses_a_name_and_all_queues_belong_to_it(space: Namespace) -> None:
    with device(space, 3, TunConfig(dev=None)) as queues:
        assert {queue.name for queue in queues.queues} == {queues.name}
        assert set(space.run("ls", f"/sys/class/net/{queues.name}/queues").split()) == {
            f"{way}-{number}" for way in ("rx", "tx") for number in range(3)
        }


def test_the_device_goes_with_its_last_queue(space: Namespace) -> None:
    with device(space, 2) as queues:
        kept = fcntl.fcntl(queues.queues[1].fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        queues.close()
        with_one_left = has_device(space, DEVICE.dev or "")
        os.close(kept)

        assert (with_one_left, has_device(space, DEVICE.dev or "")) == (True, False)


def test_a_detached_queues_share_goes_to_the_others_until_it_is_attached_again(space: Namespace) -> None:
    with device(space, 4) as queues:
        before = flows_by_queue(space, queues)
        queues.detach(1)
        queues.detach(1)  # a second time changes nothing
        attached = queues.attached
        during = flows_by_queue(space, queues)
        queues.attach(1)
        queues.attach(1)
        after = flows_by_queue(space, queues)

    assert before[1]
    assert attached == {0, 2, 3}
    assert during[1] == set()
    assert set.union(*during) == set.union(*before)
    assert after[1]
    assert set.union(*after) == set.union(*before)


def test_all_but_one_queue_may_be_detached(space: Namespace) -> None:
    with device(space, 3) as queues:
        queues.detach(0)
        queues.detach(2)

        assert [len(share) for share in flows_by_queue(space, queues)] == [0, FLOWS, 0]
        with pytest.raises(AssertionError):
            queues.detach(1)


def test_what_waits_in_a_queue_is_lost_when_it_is_detached(space: Namespace) -> None:
    with device(space, 2) as queues:
        shares = flows_by_queue(space, queues)
        send_flows(space)
        queues.detach(0)
        queues.attach(0)

        assert [flows(queue) for queue in queues.queues] == [set(), shares[1]]


def test_a_detached_queue_still_takes_packets_for_the_local_stack(space: Namespace) -> None:
    with (
        device(space, 2) as queues,
        entered(space),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
    ):
        receiver.bind(("198.51.100.1", 7000))
        receiver.settimeout(2)
        queues.detach(1)

        assert queues.queues[1].write(udp_packet(7000, b"through the detached queue")) is None
        assert receiver.recv(100) == b"through the detached queue"


def udp_packet(port: int, payload: bytes) -> bytes:
    """From 198.51.100.2 to 198.51.100.1, without a UDP checksum."""
    addresses = bytes([198, 51, 100, 2, 198, 51, 100, 1])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 0, 0, 64, socket.IPPROTO_UDP, 0)
    total = sum(struct.unpack("!10H", head + addresses))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", total ^ 0xFFFF)
    return head + addresses + struct.pack("!HHHH", 5000, port, 8 + len(payload), 0) + payload


def test_a_process_without_any_right_can_detach_and_attach_but_not_open_a_queue(space: Namespace) -> None:
    with device(space, 2) as queues, entered(space):
        supervisor = os.getpid()
        name = struct.pack("=16sH22x", queues.name.encode(), 0x1101)  # IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE

        def detach(ends: Ends) -> object:
            node = os.open("/dev/net/tun", os.O_RDWR)  # as root; on most machines anybody may
            keep = [*ends, node, queues.queues[1].fileno()]
            lock_down_child(account=NOBODY, keep=keep, parent=supervisor)
            set_attached(queues.queues[1], attached=False)
            try:
                fcntl.ioctl(node, TUNSETIFF, name)
            except OSError as error:
                return errno.errorcode[error.errno or 0]
            return None

        def attach(ends: Ends) -> object:
            lock_down_child(account=NOBODY, keep=[*ends, queues.queues[1].fileno()], parent=supervisor)
            set_attached(queues.queues[1], attached=True)
            return None

        opened = in_child(detach)
        detached = flows_by_queue(space, queues)
        in_child(attach)
        attached = flows_by_queue(space, queues)

    assert opened == "EPERM"
    assert [len(share) for share in detached] == [FLOWS, 0]
    assert all(attached)


FOREIGN = """
import sys
import pytun
from nebula_mp import tun_queues
from nebula_mp.config.model import TunConfig, Offloads
from nebula_mp.errors import SystemCallError

SEVERAL = Offloads(tso=False, uso=False)

def stranger():
    flags = pytun.IFF_TUN | pytun.IFF_NO_PI | pytun.IFF_MULTI_QUEUE
    return pytun.TunTapDevice(name="nmpq", flags=flags, dev="/dev/net/tun")

opened, _ = tun_queues.TunQueues.open(TunConfig(dev="nmpq"), 3, SEVERAL)
opened.detach(2)
print(opened.foreign_queues())
late = stranger()  # we are root
print(opened.foreign_queues())
late.close()
opened.close()

set_owner = tun_queues._set_owner
def too_late(descriptor):
    global quick
    quick = stranger()
    set_owner(descriptor)
tun_queues._set_owner = too_late
try:
    tun_queues.TunQueues.open(TunConfig(dev="nmpq"), 3, SEVERAL)
except SystemCallError as error:
    print(error)
"""


def test_a_queue_that_a_stranger_added_is_noticed(space: Namespace) -> None:
    said = space.run(sys.executable, "-c", FOREIGN).splitlines()  # sees the namespace's own /sys

    assert said[:2] == ["0", "1"]
    assert said[2].startswith(
        "tun 'nmpq': while the device was created, another process added a queue to it: find"
    )
    assert not has_device(space, "nmpq")


def test_strangers_are_not_counted_where_sys_shows_another_namespace(space: Namespace) -> None:
    with device(space, 2) as queues, entered(space):
        assert queues.foreign_queues() == 0


def test_the_kernels_refusal_to_change_a_queue_is_explained(space: Namespace) -> None:
    with device(space, 2) as queues:
        with pytest.raises(SystemCallError, match=r"tun 'nmpq': a queue could not be attached \(EINVAL\)"):
            set_attached(queues.queues[1], attached=True)
        queues.detach(1)
        with pytest.raises(SystemCallError, match=r"tun 'nmpq': a queue could not be detached \(EINVAL\)"):
            set_attached(queues.queues[1], attached=False)


def test_one_queue_is_opened_with_a_warning_where_the_kernel_refuses_several(
    space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pytun.TunTapDevice

    def without_multiqueue(**arguments: Any) -> pytun.TunTapDevice:
        if arguments["flags"] & pytun.IFF_MULTI_QUEUE:
            raise pytun.Error(errno.EINVAL, "Invalid argument")
        return plain(**arguments)

    monkeypatch.setattr(pytun, "TunTapDevice", without_multiqueue)
    with entered(space):
        queues, warnings = TunQueues.open(DEVICE, 4, SEVERAL)
    queues.close()

    assert len(queues.queues) == 1
    assert not queues.offloads.multiqueue
    assert warnings == ("tun 'nmpq': the kernel refused 4 queues (EINVAL): one reader serves all",)


def test_more_queues_than_the_kernel_has_leave_nothing_but_the_one(space: Namespace) -> None:
    with entered(space):
        queues, warnings = TunQueues.open(DEVICE, 257, SEVERAL)
        shown = space.run("ls", f"/sys/class/net/{queues.name}/queues").split()
    queues.close()

    assert len(queues.queues) == 1
    assert sorted(shown) == ["rx-0", "tx-0"]
    assert warnings == ("tun 'nmpq': the kernel refused 257 queues (E2BIG): one reader serves all",)


def test_the_device_of_another_program_is_not_joined(space: Namespace) -> None:
    with device(space, 2), entered(space), pytest.raises(SystemCallError, match="tun 'nmpq': the name is"):
        TunQueues.open(DEVICE, 2, SEVERAL)


def test_a_name_that_is_none_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(SystemCallError, match="not a device name"):
        TunQueues.open(TunConfig(dev="a/b"), 2, SEVERAL)


def test_a_refused_mtu_removes_the_device(space: Namespace) -> None:
    with entered(space), pytest.raises(SystemCallError, match="MTU 70000 refused"):
        TunQueues.open(TunConfig(dev="nmpq", mtu=70_000), 2, SEVERAL)

    assert not has_device(space, "nmpq")


# ---- offloads ----

EVERYTHING = Offloads()


def send_superpackets(space: Namespace, flows: int) -> None:
    """Four datagrams of 100 bytes with one call, for each of some flows."""
    note = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 100))
    with entered(space), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("198.51.100.1", 40_000))
        for number in range(flows):
            sender.sendmsg([bytes(400)], [note], 0, ("198.51.100.2", 5000 + number))


def frames(queue: TunDevice) -> list[bytes]:
    """All that waits in a queue."""
    found = []
    with suppress(BlockingIOError):
        while frame := os.read(queue.fileno(), 1 << 17):
            found.append(frame)
    return found


def test_every_queue_has_the_offloads_of_the_device(space: Namespace) -> None:
    with device(space, 4, wanted=EVERYTHING) as queues:
        send_superpackets(space, FLOWS)
        got = [frames(queue) for queue in queues.queues]

    assert (queues.offloads.tso, queues.offloads.uso, queues.offloads.multiqueue) == (True, True, True)
    assert {queue.offloads for queue in queues.queues} == {queues.offloads}
    assert all(got)
    assert {len(frame) for each in got for frame in each} == {HEADER_BYTES + 28 + 400}
    assert sum(map(len, got)) == FLOWS


def test_one_queue_is_opened_without_a_word_where_several_are_not_wanted(space: Namespace) -> None:
    with device(space, 4, wanted=Offloads(multiqueue=False)) as queues:
        send_superpackets(space, 1)
        (frame,) = frames(queues.queues[0])

    assert len(queues.queues) == 1
    assert queues.offloads == Offloads(multiqueue=False)
    assert len(frame) == HEADER_BYTES + 28 + 400


def test_all_queues_are_made_anew_without_a_header_where_the_kernel_refuses_all_offloads(
    space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fcntl.ioctl

    def refuse(target: Any, request: int, *arguments: Any) -> Any:
        if request == TUNSETOFFLOAD:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(target, request, *arguments)

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with entered(space):
        queues, warnings = TunQueues.open(DEVICE, 3, EVERYTHING)
        monkeypatch.undo()
        flags = [
            struct.unpack_from("H", fcntl.ioctl(queue.fileno(), TUNGETIFF, bytes(40)), 16)[0]
            for queue in queues.queues
        ]
    queues.close()

    assert len(queues.queues) == 3
    assert queues.offloads == Offloads(tso=False, uso=False)
    assert [flag & pytun.IFF_VNET_HDR for flag in flags] == [0, 0, 0]
    assert len(warnings) == 1
    assert warnings[0].startswith("tun 'nmpq': the kernel refused all offloads (EINVAL): each packet costs")
    assert not has_device(space, "nmpq")
