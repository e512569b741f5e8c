"""Where a peer may be reached: configured addresses, minus those that turned out to be wrong.

Data flow: config, workers.resolver -> [control.remotes] -> control.handshakes
Knows nothing of tunnels; the addresses that live tunnels use are passed in.
"""

from collections.abc import Iterable, Mapping, Sequence

from nebula_mp.newtypes import IPAddress, IPInterface, UdpAddr

_PORT_MAX = 65535


def sort_key(remote: UdpAddr) -> tuple[int, bool, int, int]:
    """Order attempts as Nebula does: IPv6, public IPv4, private IPv4; then by number and port."""
    if remote.ip.version == 6:
        return (0, False, int(remote.ip), remote.port)
    return (1, remote.ip.is_private, int(remote.ip), remote.port)


class Remotes:
    """Underlay addresses by overlay address."""

    __slots__ = ("_blocked", "_own_networks", "_static")

    def __init__(self, own_networks: Sequence[IPInterface]) -> None:
        self.set_own_networks(own_networks)
        self._static: dict[IPAddress, tuple[UdpAddr, ...]] = {}
        self._blocked: dict[IPAddress, set[UdpAddr]] = {}

    def set_own_networks(self, own_networks: Sequence[IPInterface]) -> None:
        """Take our overlay networks, which no underlay address may lie in."""
        self._own_networks = tuple(interface.network for interface in own_networks)

    def replace_static(self, remotes: Mapping[IPAddress, Sequence[UdpAddr]]) -> list[IPAddress]:
        """Take over a whole `static_host_map` with its names resolved; gives the hosts that changed."""
        before = self._static
        self._static = {
            address: tuple(remote for remote in found if self.usable(remote))
            for address, found in remotes.items()
        }
        return [address for address, found in self._static.items() if before.get(address) != found]

    def usable(self, remote: UdpAddr) -> bool:
        """Tell whether `remote` is an underlay address at all: packets to the overlay would loop."""
        return (
            0 < remote.port <= _PORT_MAX
            and not remote.ip.is_unspecified
            and not remote.ip.is_multicast
            and not self.inside_overlay(remote.ip)
        )

    def inside_overlay(self, ip: IPAddress) -> bool:
        """Tell whether `ip` lies in one of our own overlay networks."""
        return any(ip in network for network in self._own_networks)

    def known(self, target: IPAddress, learned: Iterable[UdpAddr] = ()) -> list[UdpAddr]:
        """List where to try `target`, best first, each address once; `learned`: used by live tunnels."""
        blocked = self._blocked.get(target, set())
        found = {*self._static.get(target, ()), *learned} - blocked
        return sorted(found, key=sort_key)

    def block(self, target: IPAddress, remote: UdpAddr) -> None:
        """Stop trying `remote` for `target`: another host answered there."""
        self._blocked.setdefault(target, set()).add(remote)

    def unblock(self, addresses: Iterable[IPAddress]) -> None:
        """Forget what was blocked for a peer, after a handshake with it succeeded."""
        for address in addresses:
            self._blocked.pop(address, None)
