"""What a gateway holds of the machine, with real devices and sockets in a network of the test's own."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_interface
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from nebula_mp import netlink, steering
from nebula_mp.config.model import NO_OFFLOADS, Config, ListenConfig, MpConfig, Offloads, PkiConfig, TunConfig
from nebula_mp.errors import InstanceError, SystemCallError
from nebula_mp.tun_queues import TunQueues
from nebula_mp.udp_socket import UdpSocket
from nebula_mp.workers.checked import Checked, PkiSources
from nebula_mp.workers.host import Host, superpacket_segments, worker_count
from tests.support.private_net import devices, private_network

NETWORKS = (ip_interface("10.42.0.1/24"),)
OTHER_NETWORKS = (ip_interface("10.42.0.1/24"), ip_interface("10.43.0.1/16"))
CONFIG = Config(pki=PkiConfig(ca="", cert="", key=""))


@pytest.mark.parametrize(
    ("workers", "routines", "cpus", "expected"),
    [
        (None, None, 1, 1),
        (None, None, 2, 1),
        (None, None, 3, 1),
        (None, None, 4, 2),
        (None, None, 16, 8),
        (None, None, 1000, 64),
        (None, 1, 8, 1),
        (None, 3, 8, 3),
        (None, 3, 1, 3),
        (5, 3, 8, 5),
        (1, None, 8, 1),
    ],
)
def test_workers_are_those_configured_or_one_for_two_cpus(
    workers: int | None, routines: int | None, cpus: int, expected: int
) -> None:
    config = replace(CONFIG, mp=MpConfig(workers=workers), routines=routines)

    assert worker_count(config, cpus) == expected


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with private_network(), ExitStack() as stack:
        yield stack


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    config = replace(
        CONFIG,
        tun=TunConfig(dev="nmp-host", mtu=1280),
        listen=ListenConfig(host="127.0.0.1"),
        mp=MpConfig(run_dir=str(tmp_path / "run"), workers=2),
    )
    return Checked(
        config=config,
        pki_sources=PkiSources(cert="", key="", ca=""),
        warnings=(),
        sources=(),
        networks=NETWORKS,
        name="host",
        at=0,
        key=-1,
    )


def addresses(device: str) -> set[str]:
    with IPRoute() as ipr:
        (index,) = ipr.link_lookup(ifname=device)
        found = ipr.get_addr(index=index)
        return {f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}" for message in found}


def mtu(device: str) -> int:
    with IPRoute() as ipr:
        (link,) = ipr.get_links(ifname=device)
        size: int = link.get_attr("IFLA_MTU")
        return size


def delete(device: str) -> None:
    with IPRoute() as ipr:
        ipr.link("del", ifname=device)


@pytest.mark.e2e
def test_all_is_there_after_open_and_gone_with_the_stack(checked: Checked, tmp_path: Path) -> None:
    with private_network():
        with ExitStack() as undo:
            host, warnings = Host.open(checked, undo)

            assert warnings == ()
            assert (host.device, host.workers, len(host.tuns)) == ("nmp-host", 2, 2)
            assert host.steering.is_steered
            assert host.steering.owners == (0, 1)
            assert addresses("nmp-host") == {"10.42.0.1/24"}
            assert mtu("nmp-host") == 1280
            assert str(host.udp.ip) == "127.0.0.1"
            assert (tmp_path / "run" / "nmp-host.sock").exists()

        assert "nmp-host" not in devices()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.e2e
def test_a_second_one_of_the_name_is_refused_before_anything_is_touched(
    checked: Checked, undo: ExitStack
) -> None:
    Host.open(checked, undo)

    with ExitStack() as attempt, pytest.raises(InstanceError, match="is running already"):
        Host.open(checked, attempt)

    assert addresses("nmp-host") == {"10.42.0.1/24"}


@pytest.mark.e2e
def test_a_name_that_the_kernel_chooses_is_that_of_the_instance(
    checked: Checked, undo: ExitStack, tmp_path: Path
) -> None:
    config = replace(checked.config, tun=replace(checked.config.tun, dev=None))

    host, _ = Host.open(replace(checked, config=config), undo)

    assert host.device in devices()
    assert (tmp_path / "run" / f"{host.device}.sock").exists()


@pytest.mark.e2e
def test_where_the_kernel_does_not_steer_there_is_one_worker_and_a_warning(
    checked: Checked, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "probe_steering", lambda: "ENOPROTOOPT")

    host, warnings = Host.open(checked, undo)

    assert (host.workers, len(host.tuns), host.steering.is_steered) == (1, 1, False)
    assert [warning for warning in warnings if "does not steer datagrams by tunnel (ENOPROTOOPT)" in warning]
    assert addresses("nmp-host") == {"10.42.0.1/24"}


@pytest.mark.e2e
def test_an_address_that_is_refused_leaves_nothing(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise SystemCallError("tun 'nmp-host': address refused")

    monkeypatch.setattr(netlink, "configure", refuse)

    with private_network():
        with ExitStack() as undo, pytest.raises(SystemCallError, match="address refused"):
            Host.open(checked, undo)
        assert "nmp-host" not in devices()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.e2e
def test_buffers_and_mark_are_set_on_every_socket(checked: Checked, undo: ExitStack) -> None:
    config = replace(checked.config, listen=replace(checked.config.listen, read_buffer=100_000, so_mark=5))

    host, _ = Host.open(replace(checked, config=config), undo)

    assert len(host.steering.members) == 3
    assert {options(host)} == {(200_000, 5)}


def options(host: Host) -> tuple[int, int]:
    """Receive buffer and mark, the same on every socket."""
    found = set()
    for member in host.steering.members:
        with socket.socket(fileno=socket.dup(member.fileno())) as view:
            size = view.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            found.add((size, view.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)))
    (one,) = found
    return one


# ---- a reload ----


@pytest.mark.e2e
def test_what_was_prepared_stays_when_nothing_is_undone(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(checked, undo)
    config = replace(checked.config, tun=replace(checked.config.tun, mtu=1400))
    config = replace(config, listen=replace(config.listen, so_mark=7))

    with ExitStack() as attempt:
        host.prepare(config, OTHER_NETWORKS, attempt)
        attempt.pop_all()

    assert addresses("nmp-host") == {"10.42.0.1/24", "10.43.0.1/16"}
    assert (mtu("nmp-host"), options(host)[1]) == (1400, 7)


@pytest.mark.e2e
def test_what_was_prepared_is_taken_back(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(checked, undo)
    config = replace(checked.config, tun=replace(checked.config.tun, mtu=1400))
    config = replace(config, listen=replace(config.listen, so_mark=7))

    with ExitStack() as attempt:
        host.prepare(config, OTHER_NETWORKS, attempt)

    assert addresses("nmp-host") == {"10.42.0.1/24"}
    assert (mtu("nmp-host"), options(host)[1]) == (1280, 0)


@pytest.mark.e2e
def test_a_failure_on_the_way_takes_back_what_came_before(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(checked, undo)
    config = replace(checked.config, tun=replace(checked.config.tun, mtu=10))
    config = replace(config, listen=replace(config.listen, so_mark=7))

    with ExitStack() as attempt, pytest.raises(SystemCallError, match="MTU 10 refused"):
        host.prepare(config, NETWORKS, attempt)

    assert (mtu("nmp-host"), options(host)[1]) == (1280, 0)


# ---- the device is lost ----


@pytest.mark.e2e
def test_a_device_that_was_deleted_is_noticed_without_a_packet(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(checked, undo)
    assert host.device_error() is None

    delete("nmp-host")

    assert host.device_error() == "tun 'nmp-host': the device was deleted"


@pytest.mark.e2e
def test_it_is_made_again_with_its_addresses_and_as_many_queues(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(checked, undo)
    delete("nmp-host")
    there = [host.has_device]

    host.close_device()
    there.append(host.has_device)
    host.reopen_device()
    there.append(host.has_device)

    assert there == [True, False, True]
    assert host.device_error() is None
    assert len(host.tuns) == 2
    assert addresses("nmp-host") == {"10.42.0.1/24"}
    assert mtu("nmp-host") == 1280
    assert host.watcher.poll_changed() == ()


@pytest.mark.e2e
def test_one_made_during_a_reload_is_as_the_reload_wants_it_and_can_be_taken_back(
    checked: Checked, undo: ExitStack
) -> None:
    host, _ = Host.open(checked, undo)
    config = replace(checked.config, tun=replace(checked.config.tun, mtu=1400))

    with ExitStack() as attempt:
        host.prepare(config, OTHER_NETWORKS, attempt)
        host.close_device()
        host.reopen_device()
        assert (mtu("nmp-host"), len(addresses("nmp-host"))) == (1400, 2)

    assert (mtu("nmp-host"), len(addresses("nmp-host"))) == (1280, 1)


@pytest.mark.e2e
def test_a_name_that_is_taken_meanwhile_is_an_error_that_may_be_tried_again(
    checked: Checked, undo: ExitStack
) -> None:
    host, _ = Host.open(checked, undo)
    host.close_device()
    thief, _ = TunQueues.open(TunConfig(dev="nmp-host"), 1, NO_OFFLOADS)
    with pytest.raises(SystemCallError, match="the name is"):
        host.reopen_device()
    thief.close()

    host.reopen_device()

    assert host.device_error() is None


# ---- offloads ----


@pytest.mark.parametrize(
    ("mtu_bytes", "underlay", "expected"),
    [
        (1300, 4, 49),  # 49 * 1332 = 65268, and one more would be 66600
        (1300, 6, 49),
        (1248, 4, 51),
        (1419, 4, 45),
        (9000, 4, 7),
        (68, 4, 655),
        (65_475, 4, 1),
        (65_475, 6, 1),
        (9323, 4, 7),  # 7 * 9355 = 65485
        (9326, 4, 7),  # 7 * 9358 = 65506
        (9326, 6, 6),
    ],
)
def test_a_superpacket_has_as_many_packets_as_fit_one_send_when_sealed(
    mtu_bytes: int, underlay: int, expected: int
) -> None:
    assert superpacket_segments(mtu_bytes, underlay) == expected


@pytest.fixture
def unforwarding(undo: ExitStack) -> None:
    """A network that passes no packets on."""
    forward(0)


def forward(switch: int) -> None:
    """Let the network of this thread pass packets on, or not."""
    for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path(f"/proc/sys/net/{key}").write_text(str(switch))


def gso_max_segs(device: str) -> int:
    with IPRoute() as ipr:
        (link,) = ipr.get_links(ifname=device)
        count: int = link.get_attr("IFLA_GSO_MAX_SEGS")
        return count


def with_offloads(checked: Checked, offloads: Offloads) -> Checked:
    return replace(checked, config=replace(checked.config, mp=replace(checked.config.mp, offload=offloads)))


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
@pytest.mark.parametrize(
    "off", [(), ("tso",), ("uso",), ("udp_segment",), ("udp_gro",), ("tso", "uso"), ("udp_gro", "tso")]
)
def test_what_is_wanted_is_granted_and_nothing_else(
    checked: Checked, undo: ExitStack, off: tuple[str, ...]
) -> None:
    wanted = replace(Offloads(), **dict.fromkeys(off, False))

    host, warnings = Host.open(with_offloads(checked, wanted), undo)

    assert (host.offloads, warnings) == (wanted, ())
    assert host.steering.coalesces is wanted.udp_gro
    assert host.segments == (49 if wanted.tun_header else None)
    assert gso_max_segs("nmp-host") == (49 if wanted.tun_header else 65_535)


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
def test_without_several_queues_there_is_one_worker_and_no_warning(checked: Checked, undo: ExitStack) -> None:
    host, warnings = Host.open(with_offloads(checked, Offloads(multiqueue=False)), undo)

    assert (host.workers, len(host.tuns), len(host.steering.members)) == (1, 1, 2)
    assert (host.offloads, warnings) == (Offloads(multiqueue=False), ())


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
def test_a_kernel_that_cannot_cut_datagrams_is_named_with_the_cost(
    checked: Checked, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UdpSocket, "segmentation_error", lambda _: "ENOPROTOOPT")

    host, warnings = Host.open(checked, undo)

    assert host.offloads == Offloads(udp_segment=False)
    (warning,) = warnings
    assert warning == (
        "udp: the kernel does not cut datagrams (ENOPROTOOPT): each costs a call of its own, and TCP several"
        " times the CPU; UDP_SEGMENT needs Linux 4.18"
    )


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
def test_the_size_of_superpackets_follows_the_mtu_and_comes_back_with_it(
    checked: Checked, undo: ExitStack
) -> None:
    host, _ = Host.open(checked, undo)
    config = replace(checked.config, tun=replace(checked.config.tun, mtu=9000))
    found = [(host.segments, gso_max_segs("nmp-host"))]

    with ExitStack() as attempt:
        host.prepare(config, NETWORKS, attempt)
        found.append((host.segments, gso_max_segs("nmp-host")))
    found.append((host.segments, gso_max_segs("nmp-host")))

    assert found == [(49, 49), (7, 7), (49, 49)]


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
def test_a_machine_that_forwards_has_no_limit_since_larger_ones_would_be_cut_up(
    checked: Checked, undo: ExitStack
) -> None:
    forward(1)
    host, _ = Host.open(checked, undo)
    found = [host.segments]

    for switch in (0, 1):
        forward(switch)
        host.prepare(checked.config, NETWORKS, undo)
        found.append(gso_max_segs("nmp-host"))

    assert found == [65_535, 49, 65_535]


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
def test_a_device_that_is_made_again_has_the_same_offloads(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(with_offloads(checked, Offloads(uso=False)), undo)
    host.close_device()

    host.reopen_device()

    assert host._tun.offloads == host.offloads == Offloads(uso=False)
    assert gso_max_segs("nmp-host") == 49


@pytest.mark.e2e
@pytest.mark.usefixtures("unforwarding")
def test_a_kernel_that_does_not_limit_superpackets_costs_nothing_but_speed(
    checked: Checked, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netlink, "limit_segments", lambda *_: False)

    host, warnings = Host.open(checked, undo)

    assert (host.segments, warnings) == (None, ())
    assert host.offloads == Offloads()


# ---- a worker is given up ----


@pytest.mark.e2e
def test_the_share_of_a_worker_goes_to_another_and_its_queue_gets_no_packets(
    checked: Checked, undo: ExitStack
) -> None:
    host, _ = Host.open(checked, undo)

    assert host.hand_over(0, 1) == ()

    assert host.steering.owners == (1, 1)
    assert host._tun.attached == {1}
    assert host.device_error() is None


@pytest.mark.e2e
def test_it_stays_given_up_on_a_device_that_is_made_again(checked: Checked, undo: ExitStack) -> None:
    host, _ = Host.open(checked, undo)
    host.hand_over(0, 1)
    host.close_device()

    host.reopen_device()

    assert host._tun.attached == {1}


@pytest.mark.e2e
def test_what_the_kernel_refuses_is_told_and_the_rest_is_done(
    checked: Checked, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = Host.open(checked, undo)

    def refuse(*_: object) -> None:
        raise SystemCallError("another steering was refused")

    monkeypatch.setattr(host.steering, "hand_over", refuse)

    assert host.hand_over(0, 1) == ("another steering was refused",)
    assert host._tun.attached == {1}
