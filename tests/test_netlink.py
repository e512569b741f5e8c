"""Addresses and routes of the overlay device, and news about the underlay."""

import socket
from collections.abc import Iterator
from ipaddress import ip_interface
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from nebula_mp import netlink
from nebula_mp.config.model import TunConfig
from nebula_mp.errors import SystemCallError
from nebula_mp.ioctl_tun import TunDevice
from nebula_mp.netlink import AddressWatcher
from tests.support.private_net import private_network

pytestmark = pytest.mark.e2e
NAME = "nmptest0"
NETWORKS = tuple(map(ip_interface, ("10.42.0.7/24", "fd00:42::7/64")))


@pytest.fixture
def tun() -> Iterator[TunDevice]:
    with private_network():
        device, _ = TunDevice.open(TunConfig(dev=NAME))
        yield device
        device.close()


def addresses() -> set[str]:
    """`address/prefix` of every address in the network of this thread, loopback's aside."""
    with IPRoute() as ipr:
        found = {f"{entry.get_attr('IFA_ADDRESS')}/{entry['prefixlen']}" for entry in ipr.get_addr()}
    return found - {"127.0.0.1/8", "::1/128"}


def routes() -> dict[str, tuple[int | None, int | None]]:
    """Destination -> (MTU, metric) of every route of the main table."""
    with IPRoute() as ipr:
        found = {}
        for entry in (*ipr.get_routes(table=254, family=2), *ipr.get_routes(table=254, family=10)):
            metrics = entry.get_attr("RTA_METRICS")
            mtu = metrics.get_attr("RTAX_MTU") if metrics else None
            found[f"{entry.get_attr('RTA_DST')}/{entry['dst_len']}"] = (mtu, entry.get_attr("RTA_PRIORITY"))
        return found


def test_the_device_gets_its_addresses_and_the_mtu_is_on_the_connected_routes(tun: TunDevice) -> None:
    netlink.configure(NAME, NETWORKS, 1280)

    assert addresses() == {"10.42.0.7/24", "fd00:42::7/64"}
    assert routes() == {"10.42.0.0/24": (1280, None), "fd00:42::/64": (1280, 256)}


def test_no_address_is_there_that_the_certificate_does_not_have(tun: TunDevice) -> None:
    netlink.configure(NAME, NETWORKS, 1280)

    assert not any(address.startswith("fe80") for address in addresses())


def test_an_ipv6_address_can_be_used_at_once(tun: TunDevice) -> None:
    netlink.configure(NAME, NETWORKS, 1280)

    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("fd00:42::7", 0))


def test_configuring_again_replaces_addresses_and_mtu(tun: TunDevice) -> None:
    netlink.configure(NAME, (*NETWORKS, ip_interface("10.43.0.1/16")), 1280)
    netlink.configure(NAME, NETWORKS[:1], 1200)

    assert addresses() == {"10.42.0.7/24"}
    assert routes() == {"10.42.0.0/24": (1200, None)}


def test_a_single_address_has_no_connected_route(tun: TunDevice) -> None:
    netlink.configure(NAME, [ip_interface("10.42.0.7/32")], 1280)

    assert addresses() == {"10.42.0.7/32"}
    assert routes() == {}


def test_closing_the_device_takes_addresses_and_routes_away(tun: TunDevice) -> None:
    netlink.configure(NAME, NETWORKS, 1280)

    tun.close()

    assert (addresses(), routes()) == (set(), {})


def test_ipv6_that_is_switched_off_is_named_with_the_remedy(tun: TunDevice) -> None:
    Path(f"/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6").write_text("1")

    with pytest.raises(SystemCallError, match=r"fd00:42::7/64 refused .*disable_ipv6=0") as caught:
        netlink.configure(NAME, NETWORKS, 1280)
    assert caught.value.exit_code == 1


def test_a_device_that_is_gone_is_an_error_that_says_so(tun: TunDevice) -> None:
    tun.close()

    with pytest.raises(SystemCallError, match=r"nmptest0.*deleted"):
        netlink.configure(NAME, NETWORKS, 1280)


def gso_max_segs() -> int:
    with IPRoute() as ipr:
        (link,) = ipr.get_links(ifname=NAME)
        count: int = link.get_attr("IFLA_GSO_MAX_SEGS")
        return count


@pytest.mark.parametrize("segments", [1, 49, 65535])
def test_the_number_of_packets_in_a_superpacket_is_limited(tun: TunDevice, segments: int) -> None:
    assert netlink.limit_segments(NAME, segments)

    assert gso_max_segs() == segments


def test_a_limit_that_the_kernel_refuses_changes_nothing(tun: TunDevice) -> None:
    netlink.limit_segments(NAME, 49)

    assert not netlink.limit_segments(NAME, 65536)

    assert gso_max_segs() == 49


def test_a_limit_for_a_device_that_is_gone_is_an_error_that_says_so(tun: TunDevice) -> None:
    tun.close()

    with pytest.raises(SystemCallError, match=r"nmptest0.*deleted"):
        netlink.limit_segments(NAME, 49)


@pytest.mark.parametrize(
    "key", ["ipv4/ip_forward", "ipv6/conf/all/forwarding", f"ipv4/conf/{NAME}/forwarding"]
)
def test_a_machine_that_forwards_from_any_device_is_known(tun: TunDevice, key: str) -> None:
    for other in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path(f"/proc/sys/net/{other}").write_text("0")
    before = netlink.forwards()

    Path(f"/proc/sys/net/{key}").write_text("1")

    assert (before, netlink.forwards()) == (False, True)


# ---- the watcher; its news come from a second device, as an underlay's would ----


@pytest.fixture
def underlay(tun: TunDevice) -> Iterator[int]:
    device, _ = TunDevice.open(TunConfig(dev="under0"))
    Path("/proc/sys/net/ipv6/conf/under0/addr_gen_mode").write_text("1")  # no address of its own
    yield device.index
    device.close()


@pytest.fixture
def watcher(tun: TunDevice, underlay: int) -> Iterator[AddressWatcher]:
    watching = AddressWatcher(tun.index)
    yield watching
    watching.close()


def change(command: str, index: int, address: str) -> None:
    interface = ip_interface(address)
    with IPRoute() as ipr:
        ipr.addr(command, index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen)


def test_an_address_that_comes_and_goes_is_news_each_time(watcher: AddressWatcher, underlay: int) -> None:
    change("add", underlay, "192.0.2.1/24")
    came = watcher.poll_changed()
    change("del", underlay, "192.0.2.1/24")
    went = watcher.poll_changed()

    assert (came, went) == (("+192.0.2.1",), ("-192.0.2.1",))
    assert watcher.poll_changed() == ()


def test_an_address_that_was_there_before_is_no_news_when_the_kernel_repeats_it(
    tun: TunDevice, underlay: int
) -> None:
    change("add", underlay, "192.0.2.1/24")
    watching = AddressWatcher(tun.index)
    change("replace", underlay, "192.0.2.1/24")

    assert watching.poll_changed() == ()
    watching.close()


def test_the_overlay_device_itself_is_never_news(watcher: AddressWatcher, tun: TunDevice) -> None:
    netlink.configure(NAME, NETWORKS, 1300)

    assert watcher.poll_changed() == ()


def test_a_link_that_comes_up_is_news_if_it_has_an_address(watcher: AddressWatcher, underlay: int) -> None:
    def set_state(state: str) -> tuple[str, ...]:
        with IPRoute() as ipr:
            ipr.link("set", index=underlay, state=state)
        return watcher.poll_changed()

    without_address = set_state("up")
    set_state("down")
    change("add", underlay, "192.0.2.1/24")
    watcher.poll_changed()

    assert without_address == ()
    assert "under0 up" in set_state("up")


def test_the_watcher_is_non_blocking_and_closed_on_exec(watcher: AddressWatcher) -> None:
    assert watcher.poll_changed() == ()
    with socket.socket(fileno=watcher.fileno()) as same:
        assert same.get_inheritable() is False
        same.detach()
