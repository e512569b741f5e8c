"""Names in `static_host_map`, looked up again and again; literals need no looking up.

Data flow: Config.static_host_map -> [workers.resolver] <-> getaddrinfo -> workers.services -> workers.control
A name that cannot be resolved keeps its last addresses: an outage of DNS must not cut tunnels off.
Knows nothing of peers beyond their overlay addresses.
Source: Nebula's `static_host_map` and `static_map` keys.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from types import MappingProxyType

from nebula_mp.config.model import HostPort, LogLevel, StaticMapConfig
from nebula_mp.newtypes import IPAddress, UdpAddr
from nebula_mp.udp_socket import from_sockaddr
from nebula_mp.workers.logs import write
from nebula_mp.workers.threads import in_thread

StaticHostMap = Mapping[IPAddress, Sequence[HostPort]]
Remotes = Mapping[IPAddress, Sequence[UdpAddr]]
_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6, "ip": socket.AF_UNSPEC}


def literal(entry: HostPort) -> UdpAddr | None:
    """Give the address of an entry that names one itself, or None for a name."""
    try:
        return from_sockaddr((str(ip_address(entry.host.strip("[]"))), entry.port))
    except ValueError:
        return None


def known_remotes(static_host_map: StaticHostMap, found: Mapping[str, Sequence[IPAddress]]) -> Remotes:
    """Give the whole map as far as it is known, each address once, in the order of the config.

    `found` is what names resolved to; literals need none.
    """

    def addresses(entries: Sequence[HostPort]) -> tuple[UdpAddr, ...]:
        known: dict[UdpAddr, None] = {}
        for entry in entries:
            itself = literal(entry)
            if itself is not None:
                known[itself] = None
            else:
                known |= dict.fromkeys(UdpAddr(ip, entry.port) for ip in found.get(entry.host, ()))
        return tuple(known)

    return MappingProxyType({overlay: addresses(entries) for overlay, entries in static_host_map.items()})


class Resolver:
    """`start` inside the loop, `close` at the end; `report` is called with the whole map after each change.

    `remotes` can be asked before `start`: it then holds the literals, and for names what is `known` from
    the resolver before a reload.
    """

    def __init__(
        self,
        static_host_map: StaticHostMap,
        config: StaticMapConfig,
        report: Callable[[Remotes], None],
        known: Mapping[str, tuple[IPAddress, ...]] = MappingProxyType({}),
    ) -> None:
        self._map = static_host_map
        self._config = config
        self._report = report
        self._found = dict(known)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Look every name up, now and then each `cadence`, all at the same time."""
        names = {entry.host for entries in self._map.values() for entry in entries if literal(entry) is None}
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._watch(name)) for name in sorted(names)]

    def close(self) -> None:
        """Stop looking names up; may be called again."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    @property
    def found(self) -> Mapping[str, tuple[IPAddress, ...]]:
        """What each name resolved to when it last did."""
        return MappingProxyType(self._found)

    def remotes(self) -> Remotes:
        """Give the whole map as far as it is known, each address once, in the order of the config."""
        return known_remotes(self._map, self._found)

    async def _watch(self, name: str) -> None:
        while True:
            await self._look_up(name)
            await asyncio.sleep(self._config.cadence)

    async def _look_up(self, name: str) -> None:
        """One look-up. After the timeout it is reported as failed; an answer that comes later still counts.

        A look-up cannot be called back from the thread it runs in, so at most one per name is under way.
        """
        family = _FAMILIES[self._config.network]
        query = asyncio.ensure_future(
            in_thread(lambda: socket.getaddrinfo(name, None, family=family, type=socket.SOCK_DGRAM))
        )
        try:
            done, _ = await asyncio.wait({query}, timeout=self._config.lookup_timeout)
            if not done:
                self._failed(name, f"no answer within {self._config.lookup_timeout:g} s")
            try:
                answer = await query
            except (OSError, UnicodeError) as error:
                if done:
                    self._failed(name, str(error))
                return
        finally:
            query.cancel()
        found = tuple(dict.fromkeys(from_sockaddr((str(entry[4][0]), 0)).ip for entry in answer))
        before = self._found.get(name, ())
        if set(found) != set(before):
            self._found[name] = found
            write(
                LogLevel.INFO,
                "DNS results changed for host list",
                {"hostname": name, "origSet": before, "newSet": found},
            )
            self._report(self.remotes())

    def _failed(self, name: str, error: str) -> None:
        write(
            LogLevel.ERROR,
            "DNS resolution failed for static_map host",
            {
                "hostname": name,
                "network": self._config.network,
                "error": error,
                "kept": self._found.get(name, ()),
            },
        )
