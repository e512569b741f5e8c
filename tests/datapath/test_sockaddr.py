from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

import pytest

from nebula_mp.datapath.sockaddr import SockAddr, Sources, Targets
from nebula_mp.newtypes import UdpAddr

ADDRESSES = [
    pytest.param(("192.0.2.1", 4242), "192.0.2.1", False, id="IPv4"),
    pytest.param(("::ffff:192.0.2.1", 4242, 0, 0), "192.0.2.1", True, id="4-in-6"),
    pytest.param(("2001:db8::1", 4242, 0, 0), "2001:db8::1", True, id="IPv6"),
    pytest.param(("fe80::1", 4242, 0, 7), "fe80::1%7", True, id="link-local"),
]


@pytest.mark.parametrize(("kernels", "ours", "dual"), ADDRESSES)
def test_an_address_is_the_same_there_and_back(kernels: SockAddr, ours: str, *, dual: bool) -> None:
    sources, targets = Sources(()), Targets(dual=dual)
    for _ in range(2):  # the second time from memory
        address = sources.get(kernels)
        assert address == UdpAddr(ip_address(ours), 4242)
        assert targets.get(address) == kernels


def test_the_name_of_a_scope_is_left_to_its_number() -> None:
    address = Sources(()).get(("fe80::1%eth0", 4242, 0, 3))

    assert address == UdpAddr(IPv6Address("fe80::1%3"), 4242)


def test_an_ipv4_socket_cannot_send_to_ipv6() -> None:
    assert Targets(dual=False).get(UdpAddr(IPv6Address("2001:db8::1"), 4242)) is None


@pytest.mark.parametrize("address", ["10.9.255.1", "::ffff:10.9.0.1", "fd00::7"])
def test_an_address_inside_the_overlay_is_none(address: str) -> None:
    sources = Sources((IPv4Network("10.9.0.0/16"), IPv6Network("fd00::/64")))

    assert sources.get((address, 4242)) is None
    assert sources.get(("10.10.0.1", 4242)) is not None


def test_strangers_do_not_fill_the_memory() -> None:
    sources = Sources(())
    for number in range(20_000):
        sources.get((f"192.0.2.{number % 250}", number))

    assert len(sources._known) <= 4096
