"""Rules, certificates and one packet's flow -> allow it, or why not.

Data flow: wire.ip (FlowKey) -> [firewall.rules] -> control.controller
Knows which addresses a peer and we may use, the rule tables, and (through firewall.conntrack) which flows
were allowed before; knows nothing of tunnels, bytes or what happens to a packet that is dropped.
Source: docs/wire-format.md, "Firewall"; slackhq/nebula, firewall.go.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final, Self

from nebula_mp.cert.model import Certificate
from nebula_mp.config.model import FirewallConfig, FirewallRule
from nebula_mp.firewall.conntrack import CAPACITY, Conntrack, Direction
from nebula_mp.newtypes import IPInterface, IPNetwork, Seconds
from nebula_mp.wire.ip import FlowKey

__all__ = ["Direction", "Firewall", "PeerNetworks", "Verdict"]

_RULES_VERSIONS: Final = 1 << 16


class Verdict(Enum):
    """What becomes of a packet; every DROP has one reason, which is also its counter's name."""

    ALLOW = "allow"
    DROP_REMOTE_ADDRESS = "remote_address"  # not one the peer's certificate lets it use towards us
    DROP_LOCAL_ADDRESS = "local_address"  # neither ours nor in a network that our certificate routes
    DROP_NO_RULE = "no_rule"


class _Networks:
    """Networks against which the 4 or 16 bytes of an address are tested; few, so tried one by one."""

    def __init__(self, networks: Iterable[IPNetwork | IPInterface]) -> None:
        # (address bytes, bits behind the prefix, prefix value)
        rows = set()
        for network in map(_network, networks):
            behind = network.max_prefixlen - network.prefixlen
            rows.add((network.max_prefixlen // 8, behind, int(network.network_address) >> behind))
        self._rows = tuple(rows)

    def __contains__(self, address: bytes) -> bool:
        size = len(address)
        value = int.from_bytes(address, "big")
        for width, behind, prefix in self._rows:  # noqa: SIM110 - a generator adds 0.3 us to 0.2 us
            if size == width and value >> behind == prefix:
                return True
        return False


class PeerNetworks:
    """Which overlay addresses a peer may send from and be sent to; made once for a tunnel."""

    def __init__(self, own_addresses: frozenset[bytes], foreign: frozenset[bytes], unsafe: _Networks) -> None:
        self._addresses = own_addresses
        self._foreign = foreign
        self._unsafe = unsafe

    @classmethod
    def of(cls, certificate: Certificate, own_networks: Iterable[IPNetwork | IPInterface]) -> Self:
        """Take the peer's certificate and the networks of our own one.

        The peer's own addresses count only inside `own_networks`, and never through an unsafe network that
        is wider than the address itself; its unsafe networks count as they are.
        """
        ours = _Networks(own_networks)
        single = {
            network.network_address.packed
            for network in map(_network, certificate.unsafe_networks)
            if network.prefixlen == network.max_prefixlen
        }
        addresses = {address.packed for address in certificate.addresses}
        usable = frozenset(address for address in addresses if address in ours or address in single)
        return cls(usable, frozenset(addresses - usable), _Networks(certificate.unsafe_networks))

    def allows(self, remote: bytes) -> bool:
        """Whether `remote`, 4 or 16 bytes, is an address of this peer that we deal with."""
        return remote in self._addresses or (remote not in self._foreign and remote in self._unsafe)


class _Rules:
    """The rules of one direction: the local addresses they admit."""

    def __init__(self, rules: Iterable[FirewallRule], own: Certificate, *, absent_is_any: bool) -> None:
        networks: list[IPNetwork | IPInterface] = []
        self._any = False
        for rule in rules:
            match rule.local_cidr:
                case "any":
                    self._any = True
                case None if absent_is_any:
                    self._any = True
                case None:
                    networks.extend(own.networks)
                case network:
                    networks.append(network)
        self._networks = _Networks(networks)

    def match(self, flow: FlowKey) -> bool:
        return self._any or flow.local in self._networks


class Firewall:
    """Deny by default in each direction; a flow that a rule allowed is allowed both ways until it expires.

    `own` is our newest certificate. `now` of all calls together must never go backwards.
    """

    def __init__(
        self,
        config: FirewallConfig,
        own: Certificate,
        *,
        capacity: int = CAPACITY,
        last_seen: Callable[[FlowKey], Seconds | None] = lambda _: None,
        origin: Callable[[FlowKey, Seconds], Direction | None] = lambda _flow, _now: None,
    ) -> None:
        """`last_seen`: as for Conntrack.

        `origin` gives the direction in which a flow began that passed by what `between` said, and that has
        not expired; None if there is none.
        """
        self._origin = origin
        self.conntrack = Conntrack(config.conntrack, capacity, last_seen)
        self.rules_version = 0
        """u16, changes with the rules: a flow that older rules allowed is asked again."""
        self._load(config, own)

    def replace(self, config: FirewallConfig, own: Certificate, now: Seconds) -> bool:
        """Use another configuration or certificate from now on; False if nothing of them differs.

        Known flows stay, but each has to pass the new rules of its own direction at its next packet.
        """
        if config == self._config and _scope(own) == self._scope:
            return False
        self._load(config, own)
        self.conntrack.set_timeouts(config.conntrack, now)
        self.rules_version = (self.rules_version + 1) % _RULES_VERSIONS
        if self.rules_version == 0:  # a flow of 65536 versions ago would pass for a new one
            self.conntrack.clear()
        return True

    def check(self, direction: Direction, flow: FlowKey, peer: PeerNetworks, now: Seconds) -> Verdict:
        """Decide about one packet of `peer`, and remember its flow if it may pass."""
        if not peer.allows(flow.remote):
            return Verdict.DROP_REMOTE_ADDRESS
        if flow.local not in self._addresses and flow.local not in self._unsafe:
            return Verdict.DROP_LOCAL_ADDRESS
        known = self.conntrack.get(flow, now)
        if known is not None:
            if known.rules_version == self.rules_version:
                return Verdict.ALLOW
            if self._rules[known.direction].match(flow):
                known.rules_version = self.rules_version
                return Verdict.ALLOW
            self.conntrack.remove(flow)
        elif (began := self._origin(flow, now)) is not None and self._rules[began].match(flow):
            direction = began
        if not self._rules[direction].match(flow):
            return Verdict.DROP_NO_RULE
        self.conntrack.add(flow, direction, self.rules_version, now)
        return Verdict.ALLOW

    def between(self, flow: FlowKey) -> frozenset[Direction]:
        """The directions in which any flow between the two addresses of an allowed one may begin.

        No rule looks at more than the local address so far, so that all are alike.
        """
        return frozenset(direction for direction, rules in self._rules.items() if rules.match(flow))

    def direction(self, flow: FlowKey) -> Direction:
        """Which way the packet went that a rule allowed, of a flow that `check` has just allowed."""
        return self.conntrack.direction(flow)

    def _load(self, config: FirewallConfig, own: Certificate) -> None:
        self._config = config
        self._scope = _scope(own)
        self._addresses = frozenset(address.packed for address in own.addresses)
        self._unsafe = _Networks(own.unsafe_networks)
        absent_is_any = config.default_local_cidr_any or not own.unsafe_networks
        self._rules = {
            Direction.INBOUND: _Rules(config.inbound, own, absent_is_any=absent_is_any),
            Direction.OUTBOUND: _Rules(config.outbound, own, absent_is_any=absent_is_any),
        }


def _network(network: IPNetwork | IPInterface) -> IPNetwork:
    return network.network if isinstance(network, IPInterface) else network


def _scope(own: Certificate) -> tuple[object, ...]:
    """Give what of our certificate the rules look at."""
    return own.networks, own.unsafe_networks
