"""Addresses and routes of the overlay device, and news about the underlay's addresses.

Data flow: workers.control -> [netlink] -> kernel; kernel -> [netlink] AddressWatcher -> workers.control
`configure` uses pyroute2's synchronous IPRoute, which must not run inside an event loop: call it before
the loop starts, or in a thread. The watcher is a raw AF_NETLINK socket for `loop.add_reader`.
Knows nothing of certificates or peers.
Source: rtnetlink(7); Linux Documentation/networking/ip-sysctl.rst; Nebula's order and route attributes for
its own networks.
"""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import IPInterface

_ADDR_GEN_MODE_NONE = 1
_IFA_F_NODAD = 2
_IFA_F_TENTATIVE = 0x40
_IFF_RUNNING = 0x40
_IP6_CONNECTED_METRIC = 256
_RT_SCOPE_LINK = 253
_RTPROT_KERNEL = 2
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_RECEIVE_BYTES = 65536
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def configure(device: str, networks: Sequence[IPInterface], mtu_bytes: int) -> None:
    """Give `device` exactly these addresses, bring it up and put the MTU on the connected routes.

    May be repeated, with other networks or another MTU. Raises SystemCallError that names device and
    address; what was done up to there ends with the device.
    """
    with IPRoute() as ipr:
        index = _index(ipr, device)
        _no_link_local(ipr, index)
        for interface in networks:
            _add_address(ipr, index, device, interface)
        _remove_other_addresses(ipr, index, networks)
        _bring_up(ipr, index, device)
        for interface in networks:
            _set_route(ipr, index, device, interface, mtu_bytes)


def limit_segments(device: str, segments: int) -> bool:
    """Let the kernel join at most so many packets, 1 to 65535, into one for `device`; False if it refuses.

    Raises SystemCallError if there is no such device.
    """
    with IPRoute() as ipr:
        try:
            ipr.link("set", index=_index(ipr, device), IFLA_GSO_MAX_SEGS=segments)
        except NetlinkError:
            return False
        return True


def forwards() -> bool:
    """Whether this machine passes packets on, from any device, of either version of IP; False if unknown."""
    with contextlib.suppress(OSError):
        for setting in Path("/proc/sys/net").glob("ipv[46]/conf/*/forwarding"):
            if setting.read_text().strip() not in ("", "0"):
                return True
    return False


def _index(ipr: IPRoute, device: str) -> int:
    found = ipr.link_lookup(ifname=device)
    if not found:
        raise SystemCallError(f"tun {device!r}: the device was deleted")
    return found[0]


def _no_link_local(ipr: IPRoute, index: int) -> None:
    """Keep the kernel from inventing an IPv6 address nobody certified. Without IPv6 there is none."""
    mode = {"attrs": [["AF_INET6", {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_MODE_NONE]]}]]}
    try:
        ipr.link("set", index=index, IFLA_AF_SPEC=mode)
    except NetlinkError as error:
        if error.code not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _add_address(ipr: IPRoute, index: int, device: str, interface: IPInterface) -> None:
    keys: dict[str, Any] = {"family": _FAMILIES[interface.version]}
    if interface.version == 6:
        # No duplicate detection: there is nobody to ask on a TUN device, and a tentative address
        # cannot be used for a second.
        keys["flags"] = _IFA_F_NODAD
    try:
        ipr.addr(
            "replace",
            index=index,
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **keys,
        )
    except NetlinkError as error:
        raise SystemCallError(
            f"tun {device!r}: address {interface} refused ({_name(error)}):"
            f" {_hint(error, interface, device)}",
            exit_code=4 if error.code == errno.EPERM else 1,
        ) from None


def _bring_up(ipr: IPRoute, index: int, device: str) -> None:
    try:
        ipr.link("set", index=index, state="up")
    except NetlinkError as error:
        raise SystemCallError(f"tun {device!r}: cannot be brought up ({_name(error)})") from None


def _hint(error: NetlinkError, interface: IPInterface, device: str) -> str:
    if error.code == errno.EPERM:
        return "run as root or grant CAP_NET_ADMIN"
    if interface.version == 6 and error.code in (errno.EACCES, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
        return (
            "IPv6 is switched off for new devices: sysctl net.ipv6.conf.default.disable_ipv6=0,"
            " or use a certificate without IPv6 networks"
        )
    return f"look at `ip address show dev {device}` and the networks of the certificate"


def _remove_other_addresses(ipr: IPRoute, index: int, networks: Sequence[IPInterface]) -> None:
    wanted = {(str(interface.ip), interface.network.prefixlen) for interface in networks}
    for message in list(ipr.get_addr(index=index)):
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if (address, message["prefixlen"]) not in wanted:
            ipr.addr("del", index=index, address=address, prefixlen=message["prefixlen"])


def _set_route(ipr: IPRoute, index: int, device: str, interface: IPInterface, mtu_bytes: int) -> None:
    """Replace the connected route in place: the same metric and protocol as the kernel's own."""
    if interface.network.num_addresses == 1:
        return  # a single address has no connected route
    keys: dict[str, Any] = {"priority": _IP6_CONNECTED_METRIC} if interface.version == 6 else {}
    try:
        ipr.route(
            "replace",
            family=_FAMILIES[interface.version],
            dst=str(interface.network),
            oif=index,
            scope=_RT_SCOPE_LINK,
            proto=_RTPROT_KERNEL,
            prefsrc=str(interface.ip),
            metrics={"mtu": mtu_bytes},
            **keys,
        )
    except NetlinkError as error:
        raise SystemCallError(
            f"tun {device!r}: route {interface.network} with MTU {mtu_bytes} refused ({_name(error)}):"
            " another route may hold this network; see `ip route show`",
            exit_code=4 if error.code == errno.EPERM else 1,
        ) from None


def _name(error: NetlinkError) -> str:
    return errno.errorcode.get(error.code, str(error.code))


Address = tuple[int, str]
"""Interface index and address."""


class AddressWatcher:
    """Tells when an address of another device came or went, or its link came up.

    Add `fileno()` to the event loop as a reader and call `poll_changed()` when it is readable. The
    kernel repeats itself (every router advertisement renews an address), so known facts are no news.
    """

    def __init__(self, own_index: int) -> None:
        """Subscribe first, then list what is there, so that nothing falls between. Needs no event loop."""
        self._own = own_index
        self._marshal = MarshalRtnl()
        self._addresses: set[Address] = set()
        self._running: set[int] = set()
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        try:
            self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
            with IPRoute() as ipr:
                for message in (*ipr.get_links(), *ipr.get_addr()):
                    self._learn(message)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Give the descriptor, which this object owns."""
        return self._socket.fileno()

    def close(self) -> None:
        """Unsubscribe; may be called again."""
        self._socket.close()

    def set_own_index(self, index: int) -> None:
        """Ignore the device with this index from here on: ours was opened again."""
        self._own = index

    def poll_changed(self) -> tuple[str, ...]:
        """Read all messages that are waiting; say what changed, in words, for the log."""
        changes: list[str] = []
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return tuple(changes)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                changes.append("more news than the kernel could hold")
                continue
            changes += filter(None, map(self._learn, self._marshal.parse(data)))

    def _learn(self, message: Any) -> str | None:
        index = message["index"]
        if index == self._own:
            return None
        match message["event"]:
            case "RTM_NEWLINK":
                return self._learn_link(index, message, up=bool(message["flags"] & _IFF_RUNNING))
            case "RTM_DELLINK":
                self._running.discard(index)
                return None
            case "RTM_NEWADDR" | "RTM_DELADDR" as event:
                address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
                return self._learn_address(index, address, message, gone=event == "RTM_DELADDR")
            case _:
                return None

    def _learn_link(self, index: int, message: Any, *, up: bool) -> str | None:
        if not up:
            self._running.discard(index)
            return None
        was_up = index in self._running
        self._running.add(index)
        # A link without an address carries nothing of ours: a container's pair of devices, for instance.
        if was_up or not any(known == index for known, _ in self._addresses):
            return None
        return f"{message.get_attr('IFLA_IFNAME')} up"

    def _learn_address(self, index: int, address: str, message: Any, *, gone: bool) -> str | None:
        if ipaddress.ip_address(address).is_loopback:
            return None
        key = (index, address)
        if gone:
            if key not in self._addresses:
                return None
            self._addresses.discard(key)
            return f"-{address}"
        flags = message.get_attr("IFA_FLAGS") or message["flags"]
        if key in self._addresses or flags & _IFA_F_TENTATIVE:
            return None
        self._addresses.add(key)
        return f"+{address}"
