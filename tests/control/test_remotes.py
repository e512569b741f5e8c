"""Where a peer may be reached, and in which order it is tried."""

from ipaddress import ip_address, ip_interface

import pytest

from nebula_mp.control.remotes import Remotes
from nebula_mp.newtypes import UdpAddr

PEER = ip_address("10.42.0.2")
OTHER = ip_address("10.42.0.3")


def at(ip: str, port: int = 4242) -> UdpAddr:
    return UdpAddr(ip_address(ip), port)


@pytest.fixture
def remotes() -> Remotes:
    return Remotes([ip_interface("10.42.0.1/16"), ip_interface("fd00::1/64")])


def test_ipv6_comes_first_then_public_then_private_ipv4_then_numbers(remotes: Remotes) -> None:
    wanted = [
        at("2001:4860::1"),
        at("2001:4860::2"),
        at("8.8.4.4"),
        at("8.8.8.8", 1),
        at("8.8.8.8", 2),
        at("10.0.0.1"),
        at("192.168.1.1"),
    ]
    remotes.replace_static({PEER: wanted[::-1]})

    assert remotes.known(PEER) == wanted


def test_learned_addresses_join_the_configured_ones_and_none_is_listed_twice(remotes: Remotes) -> None:
    remotes.replace_static({PEER: [at("8.8.8.8")]})

    assert remotes.known(PEER, [at("8.8.8.8"), at("8.8.4.4")]) == [at("8.8.4.4"), at("8.8.8.8")]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(at("10.42.7.7"), id="our own overlay network"),
        pytest.param(at("fd00::7"), id="our own IPv6 overlay network"),
        pytest.param(at("8.8.8.8", 0), id="port 0"),
        pytest.param(at("0.0.0.0"), id="unspecified"),
        pytest.param(at("224.0.0.1"), id="multicast"),
    ],
)
def test_what_cannot_be_an_underlay_address_is_never_tried(remotes: Remotes, bad: UdpAddr) -> None:
    remotes.replace_static({PEER: [bad, at("8.8.8.8")]})

    assert remotes.known(PEER) == [at("8.8.8.8")]


def test_a_blocked_address_is_left_out_for_that_peer_only_and_until_it_is_unblocked(remotes: Remotes) -> None:
    remotes.replace_static({PEER: [at("8.8.8.8")], OTHER: [at("8.8.8.8")]})

    remotes.block(PEER, at("8.8.8.8"))

    assert remotes.known(PEER, [at("8.8.8.8")]) == []
    assert remotes.known(OTHER) == [at("8.8.8.8")]
    remotes.unblock([PEER])
    assert remotes.known(PEER) == [at("8.8.8.8")]
