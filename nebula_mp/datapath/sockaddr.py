"""Underlay addresses as the kernel spells them, and as we do.

Data flow: recvfrom -> [sockaddr] -> datapath -> [sockaddr] -> sendto
Knows both spellings and remembers a bounded number of them; knows nothing of sockets or tunnels.
Source: ipv6(7), RFC 4291 section 2.5.5.2 (4-in-6), RFC 4007 (scopes).
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from nebula_mp.newtypes import IPNetwork, UdpAddr

SockAddr = tuple[str, int] | tuple[str, int, int, int]

_REMEMBERED_MAX: Final = 4096


class Sources:
    """Where datagrams came from. Strangers choose the keys of this memory, so it is emptied when full."""

    def __init__(self, overlay: Sequence[IPNetwork]) -> None:
        self._overlay = tuple(overlay)
        self._known: dict[SockAddr, UdpAddr | None] = {}

    def get(self, source: SockAddr) -> UdpAddr | None:
        """Spell the address in our way; None if it lies inside the overlay: then the datagram has looped."""
        try:
            return self._known[source]
        except KeyError:
            pass
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        address = from_sockaddr(source)
        looped = any(address.ip in network for network in self._overlay)
        self._known[source] = found = None if looped else address
        return found


class Targets:
    """Where datagrams go, for one socket; `dual` says that it is an IPv6 one that sends IPv4 as well."""

    def __init__(self, *, dual: bool) -> None:
        self._dual = dual
        self._known: dict[UdpAddr, SockAddr | None] = {}

    def get(self, to: UdpAddr) -> SockAddr | None:
        """Spell an address in the kernel's way; None if the socket cannot send to it."""
        try:
            return self._known[to]
        except KeyError:
            pass
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        self._known[to] = found = to_sockaddr(to, dual=self._dual)
        return found


def from_sockaddr(source: SockAddr) -> UdpAddr:
    """Spell an address in our way: 4-in-6 becomes IPv4, a link-local one keeps its scope as a number."""
    ip = ip_address(source[0].partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return UdpAddr(ip.ipv4_mapped, source[1])
        if ip.is_link_local and len(source) == 4 and source[3]:
            return UdpAddr(IPv6Address(f"{ip}%{source[3]}"), source[1])
    return UdpAddr(ip, source[1])


def to_sockaddr(to: UdpAddr, *, dual: bool) -> SockAddr | None:
    """Spell an address in the kernel's way, for a dual-stack or an IPv4 socket; None if that cannot send."""
    if isinstance(to.ip, IPv4Address):
        return (f"::ffff:{to.ip}", to.port, 0, 0) if dual else (str(to.ip), to.port)
    if not dual:
        return None
    text, _, scope = str(to.ip).partition("%")
    return text, to.port, 0, int(scope) if scope.isdecimal() else 0
