"""The overlay device: creation and its refusals, offloads, writing, and losing it."""

import array
import contextlib
import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest
import pytun
from pyroute2 import IPRoute

from nebula_mp import ioctl_tun, netlink
from nebula_mp.config.model import NO_OFFLOADS, Offloads, TunConfig
from nebula_mp.datapath.virtio import HEADER_BYTES, GsoType
from nebula_mp.errors import SystemCallError
from nebula_mp.ioctl_tun import TunDevice, TunLostError, WriteFault, check_name, device_holder
from nebula_mp.udp_socket import UDP_SEGMENT
from tests.support import packets
from tests.support.private_net import devices, private_network

NAME = "nmptest0"
_SIOCGIFMTU = 0x8921
_SIOCGIFTXQLEN = 0x8942
_SIOCETHTOOL = 0x8946
_ETHTOOL_GTSO = 0x1E
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNGETVNETHDRSZ = 0x800454D7


HERE, THERE = ip_address("10.42.0.1"), ip_address("10.42.0.2")


def packet(payload: bytes = b"") -> bytes:
    """An IPv4 packet that the peer sends to us, port 6000 to 5000."""
    return packets.ip(THERE, HERE, 17, packets.udp(THERE, HERE, 6000, 5000, payload))


@pytest.fixture
def network() -> Iterator[None]:
    with private_network():
        yield


@pytest.fixture
def tun(network: None) -> Iterator[TunDevice]:
    device, warnings = TunDevice.open(TunConfig(dev=NAME, mtu=1300, tx_queue=321))
    assert warnings == ()
    yield device
    device.close()


# ---- without root ----


@pytest.mark.parametrize("name", ["sixteen-bytes-00", "a/b", "a b", "a:b", "tun%d", ".", "..", "ö" * 8])
def test_a_name_no_device_can_have_is_refused_before_the_kernel_is_asked(name: str) -> None:
    with pytest.raises(SystemCallError, match=r"not a device name.*correct tun.dev"):
        check_name(name)


@pytest.mark.parametrize("name", [None, "", "tun0", "fifteen-bytes-0", "nebula1.x"])
def test_other_names_and_none_are_good(name: str | None) -> None:
    check_name(name)


def test_without_a_device_node_the_remedies_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ioctl_tun, "DEVICE_NODE", str(tmp_path / "tun"))

    with pytest.raises(SystemCallError) as caught:
        TunDevice.open(TunConfig(dev=NAME))

    assert caught.value.exit_code == 1
    assert "tun 'nmptest0'" in str(caught.value)
    assert "modprobe tun" in str(caught.value)
    assert "--device" in str(caught.value)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_a_refusal_for_want_of_rights_names_the_capability_and_ends_with_4(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise pytun.Error(number, os.strerror(number))

    monkeypatch.setattr(pytun, "TunTapDevice", refuse)

    with pytest.raises(SystemCallError) as caught:
        TunDevice.open(TunConfig(dev=NAME))

    assert caught.value.exit_code == 4
    for word in (errno.errorcode[number], "CAP_NET_ADMIN", "systemd", "--cap-add", "setcap"):
        assert word in str(caught.value)


@pytest.mark.parametrize(("effective", "refused"), [("0", True), ("1000", False), ("ffffffffffffefff", True)])
def test_a_missing_capability_is_noticed_before_anything_is_touched(
    effective: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"Name:\tx\nCapEff:\t{effective}\n")

    if refused:
        with pytest.raises(SystemCallError, match="CAP_NET_ADMIN is missing") as caught:
            ioctl_tun.require_net_admin(NAME)
        assert caught.value.exit_code == 4
    else:
        ioctl_tun.require_net_admin(NAME)


@pytest.fixture
def queue() -> Iterator[tuple[TunDevice, socket.socket]]:
    """A device whose other end is a socket: the same calls, packet by packet, without root."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    device = TunDevice(ours.detach(), "pair")
    with theirs:
        yield device, theirs
    device.close()


def test_a_packet_for_which_there_is_no_room_is_dropped_after_a_short_wait(
    queue: tuple[TunDevice, socket.socket],
) -> None:
    device, _ = queue
    faults: list[WriteFault | None] = []
    while not faults or faults[-1] is None:
        faults.append(device.write(bytes(60_000)))

    assert faults[-1] is WriteFault.FULL
    assert device.again >= 1


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.ENOBUFS, WriteFault.NO_MEMORY),
        (errno.ENOMEM, WriteFault.NO_MEMORY),
        (errno.EINVAL, WriteFault.REFUSED),
        (errno.EIO, WriteFault.REFUSED),
    ],
)
def test_a_write_the_kernel_refuses_costs_that_packet_only(
    number: int,
    fault: WriteFault,
    queue: tuple[TunDevice, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    device, stack = queue
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        refused = device.write(b"first")

    assert refused is fault
    assert device.write(b"second") is None
    assert stack.recv(100) == b"second"


# ---- with a real device ----


@pytest.mark.e2e
def test_the_device_has_the_name_mtu_and_queue_length_asked_for(tun: TunDevice) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        mtu = fcntl.ioctl(control, _SIOCGIFMTU, NAME.encode().ljust(40, b"\0"))
        length = fcntl.ioctl(control, _SIOCGIFTXQLEN, NAME.encode().ljust(40, b"\0"))
    assert int.from_bytes(mtu[16:20], "little") == 1300
    assert int.from_bytes(length[16:20], "little") == 321
    assert tun.name == NAME
    assert os.get_blocking(tun.fileno()) is False
    assert os.get_inheritable(tun.fileno()) is False


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_the_kernel_chooses_a_name_when_none_is_given() -> None:
    device, _ = TunDevice.open(TunConfig())

    assert device.name in devices()
    device.close()
    assert devices() == {"lo"}


@pytest.mark.e2e
def test_a_device_in_use_is_not_shared_and_its_holder_is_named(tun: TunDevice) -> None:
    with pytest.raises(SystemCallError) as caught:
        TunDevice.open(TunConfig(dev=NAME))

    assert caught.value.exit_code == 1
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert device_holder(NAME) is not None


HOLD = """
import sys
from nebula_mp.config.model import TunConfig
from nebula_mp.ioctl_tun import TunDevice
device, _ = TunDevice.open(TunConfig(dev=sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_only_a_process_of_this_network_is_named_as_the_holder() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        here = device_holder(NAME)
        with private_network():
            elsewhere = device_holder(NAME)
        holder.communicate("")

    assert f"(pid {holder.pid})" in str(here)
    assert elsewhere is None


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_a_name_some_other_interface_has_is_refused() -> None:
    with pytest.raises(SystemCallError, match="taken by an existing interface"):
        TunDevice.open(TunConfig(dev="lo"))


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_an_mtu_the_kernel_refuses_leaves_no_device() -> None:
    with pytest.raises(SystemCallError, match=r"MTU 70000 refused \(EINVAL\): correct tun\.mtu"):
        TunDevice.open(TunConfig(dev=NAME, mtu=70_000))

    assert devices() == {"lo"}


@pytest.mark.e2e
def test_packets_pass_between_the_local_stack_and_the_queue(tun: TunDevice) -> None:
    netlink.configure(NAME, [ip_interface("10.42.0.1/24")], 1300)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stack:
        stack.bind(("10.42.0.1", 5000))
        stack.settimeout(5)
        stack.sendto(b"out", ("10.42.0.2", 6000))
        sent = os.read(tun.fileno(), 2000)
        written = tun.write(packet(b"in"))
        received = stack.recvfrom(100)

    assert sent[-3:] == b"out"
    assert written is None
    assert received == (b"in", ("10.42.0.2", 6000))


@pytest.mark.e2e
def test_what_is_no_ip_packet_is_refused_and_a_device_that_is_down_takes_nothing(tun: TunDevice) -> None:
    assert tun.write(b"xx") is WriteFault.REFUSED
    assert tun.write(packet()) is WriteFault.REFUSED


@pytest.mark.e2e
def test_a_device_somebody_deleted_is_lost(tun: TunDevice) -> None:
    with IPRoute() as ipr:
        ipr.link("del", index=tun.index)

    with pytest.raises(TunLostError, match=r"nmptest0.*deleted") as caught:
        tun.write(packet())
    assert caught.value.exit_code == 5


# ---- offloads ----

EVERYTHING = Offloads()
CSUM, TSO, USO = 0x01, 0x0E, 0x60
COMBINATIONS = [
    Offloads(tso=tso, uso=uso, udp_gro=False) for tso, uso in ((True, True), (True, False), (False, True))
]


def has_header(device: TunDevice) -> bool:
    """Whether the kernel puts one in front of the packets of this queue."""
    answer = fcntl.ioctl(device.fileno(), _TUNGETIFF, bytes(40))
    return bool(struct.unpack_from("H", answer, 16)[0] & pytun.IFF_VNET_HDR)


def joins_tcp(name: str) -> bool:
    """Whether the local stack may give the device TCP superpackets."""
    answer = array.array("I", [_ETHTOOL_GTSO, 0])
    request = struct.pack("16sP16x", name.encode(), answer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, request)
    return bool(answer[1])


def udp_frames(device: TunDevice) -> list[bytes]:
    """What the device gives for four datagrams of 100 bytes that are sent in one call."""
    netlink.configure(NAME, [ip_interface("10.42.0.1/24")], 1300)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stack:
        size = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 100))]
        stack.sendmsg([bytes(400)], size, 0, ("10.42.0.2", 6000))
    frames = []
    with contextlib.suppress(BlockingIOError):
        while frame := os.read(device.fileno(), 1 << 17):
            frames.append(frame)
    return frames


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("wanted", COMBINATIONS, ids=["tso and uso", "tso", "uso"])
def test_the_device_has_the_offloads_that_are_wanted_and_no_others(wanted: Offloads) -> None:
    device, warnings = TunDevice.open(TunConfig(dev=NAME), wanted)
    size = struct.unpack("i", fcntl.ioctl(device.fileno(), _TUNGETVNETHDRSZ, bytes(4)))[0]
    frames = udp_frames(device)
    tcp = joins_tcp(NAME)
    device.close()

    assert (device.offloads, warnings) == (wanted, ())
    assert size == HEADER_BYTES
    assert tcp is wanted.tso
    assert [len(frame) - 10 - 28 for frame in frames] == ([400] if wanted.uso else [100, 100, 100, 100])
    assert frames[0][1] == (GsoType.UDP if wanted.uso else GsoType.NONE)


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_without_any_the_packets_have_no_header() -> None:
    device, _ = TunDevice.open(TunConfig(dev=NAME), NO_OFFLOADS)
    frames = udp_frames(device)
    device.close()

    assert [len(frame) for frame in frames] == 4 * [28 + 100]
    assert {frame[0] for frame in frames} == {0x45}


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("wanted", [*COMBINATIONS, NO_OFFLOADS])
def test_a_packet_that_is_written_reaches_the_local_stack_with_and_without_a_header(wanted: Offloads) -> None:
    device, _ = TunDevice.open(TunConfig(dev=NAME), wanted)
    netlink.configure(NAME, [ip_interface("10.42.0.1/24")], 1300)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stack:
        stack.bind(("10.42.0.1", 5000))
        stack.settimeout(5)
        written = device.write(packet(b"in"))
        received = stack.recvfrom(100)
    device.close()

    assert written is None
    assert received == (b"in", ("10.42.0.2", 6000))


def refuse_offloads(monkeypatch: pytest.MonkeyPatch, refused: int) -> list[int]:
    """Let the kernel refuse every set of offloads that has one of these; gives what it is asked for."""
    asked: list[int] = []
    plain = fcntl.ioctl

    def ioctl(target: Any, request: int, *arguments: Any) -> Any:
        if request == _TUNSETOFFLOAD:
            asked.append(arguments[0])
            if arguments[0] & refused:
                raise OSError(errno.EINVAL, "Invalid argument")
        return plain(target, request, *arguments)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


NO_USO = (
    f"tun '{NAME}': the kernel does not join UDP packets (EINVAL): each costs a call of its own; USO needs"
    " Linux 6.2"
)
NOTHING = (
    f"tun '{NAME}': the kernel refused all offloads (EINVAL): each packet costs a call of its own, and TCP about"
    " three times the CPU"
)


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("wanted", "refused", "granted", "asked", "warnings"),
    [
        pytest.param((True, True), 0, (True, True), [CSUM | TSO | USO], (), id="all"),
        pytest.param(
            (True, True), USO, (True, False), [CSUM | TSO | USO, CSUM | TSO], (NO_USO,), id="before Linux 6.2"
        ),
        pytest.param(
            (True, True), TSO | USO, (False, False), [CSUM | TSO | USO, CSUM | TSO], (NOTHING,), id="none"
        ),
        pytest.param((True, False), 0, (True, False), [CSUM | TSO], (), id="tso only"),
        pytest.param((True, False), CSUM, (False, False), [CSUM | TSO], (NOTHING,), id="tso only, refused"),
        pytest.param((False, True), 0, (False, True), [CSUM | USO], (), id="uso only"),
        pytest.param((False, True), USO, (False, False), [CSUM | USO], (NO_USO,), id="uso only, refused"),
        pytest.param((False, False), CSUM, (False, False), [], (), id="none wanted"),
    ],
)
def test_what_the_kernel_refuses_is_done_without_and_the_cost_is_told(
    monkeypatch: pytest.MonkeyPatch,
    *,
    wanted: tuple[bool, bool],
    refused: int,
    granted: tuple[bool, bool],
    asked: list[int],
    warnings: tuple[str, ...],
) -> None:
    seen = refuse_offloads(monkeypatch, refused)

    device, told = TunDevice.open(TunConfig(dev=NAME, mtu=1250), Offloads(tso=wanted[0], uso=wanted[1]))

    assert (device.offloads.tso, device.offloads.uso) == granted
    assert (seen, told) == (asked, warnings)
    assert has_header(device) is any(granted)
    device.close()
    assert devices() == {"lo"}
