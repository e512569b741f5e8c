"""Which packets pass: certificates first, then known flows, then rules."""

from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert.model import Certificate
from nebula_mp.config.model import ConntrackConfig, FirewallConfig, FirewallRule
from nebula_mp.firewall.rules import Direction, Firewall, PeerNetworks, Verdict
from nebula_mp.newtypes import CertVersion, Curve, Seconds
from nebula_mp.wire.ip import FlowKey

INBOUND, OUTBOUND = Direction.INBOUND, Direction.OUTBOUND
ANY = (FirewallRule(),)
OPEN = FirewallConfig(inbound=ANY, outbound=ANY)
T0 = Seconds(1000)


def certificate(*networks: str, unsafe: tuple[str, ...] = ()) -> Certificate:
    return Certificate(
        version=CertVersion.V2,
        curve=Curve.CURVE25519,
        name="host",
        networks=tuple(map(ip_interface, networks)),
        unsafe_networks=tuple(map(ip_interface, unsafe)),
        groups=(),
        is_ca=False,
        not_before=0,
        not_after=1,
        issuer="",
        public_key=bytes(32),
        signature=b"",
    )


OWN = certificate("10.1.0.1/16", "fd01::1/64")
ROUTER = certificate("10.1.0.1/16", unsafe=("192.168.0.0/16",))
PEER = PeerNetworks.of(certificate("10.1.0.2/16", "fd01::2/64"), OWN.networks)


def packed(address: str) -> bytes:
    return ip_address(address).packed


def flow(local: str = "10.1.0.1", remote: str = "10.1.0.2", port: int = 80, protocol: int = 17) -> FlowKey:
    return FlowKey(packed(local), packed(remote), port, 4000, protocol, fragment=False)


def check(
    firewall: Firewall, direction: Direction, key: FlowKey, *, peer: PeerNetworks = PEER, at: float = T0
) -> Verdict:
    return firewall.check(direction, key, peer, Seconds(at))


@pytest.mark.parametrize(
    ("networks", "unsafe", "remote", "allowed"),
    [
        pytest.param(("10.1.0.2/16",), (), "10.1.0.2", True, id="its own address"),
        pytest.param(("10.1.0.2/16",), (), "10.1.0.3", False, id="not its whole network"),
        pytest.param(("10.1.0.2/16",), (), "10.1.0.0", False, id="nor the network's address"),
        pytest.param(("10.1.0.2/16", "fd01::2/64"), (), "fd01::2", True, id="its other address"),
        pytest.param(("10.2.0.2/16",), (), "10.2.0.2", False, id="an address outside our networks"),
        pytest.param(("10.1.0.2/32",), (), "10.1.0.2", True, id="in our network, whatever its own"),
        pytest.param(("10.1.0.2/16",), ("172.16.0.0/12",), "172.31.255.255", True, id="its unsafe network"),
        pytest.param(
            ("10.1.0.2/16",), ("172.16.0.0/12",), "172.32.0.0", False, id="beyond its unsafe network"
        ),
        pytest.param(("10.1.0.2/16",), ("172.16.3.4/12",), "172.31.0.1", True, id="unsafe with host bits"),
        pytest.param(("10.1.0.2/16",), ("0.0.0.0/0",), "8.8.8.8", True, id="an exit node"),
        pytest.param(("10.1.0.2/16",), ("0.0.0.0/0",), "2001:db8::1", False, id="but of one family only"),
        pytest.param(("10.1.0.2/16",), ("::/0",), "8.8.8.8", False, id="and the other one"),
        pytest.param(("10.1.0.2/16",), ("::/0",), "2001:db8::1", True, id="an exit node for ipv6"),
        pytest.param(
            ("10.2.0.2/16",), ("10.0.0.0/8",), "10.2.0.2", False, id="foreign address, the longer prefix"
        ),
        pytest.param(("10.2.0.2/16",), ("10.0.0.0/8",), "10.2.0.3", True, id="beside the foreign address"),
        pytest.param(
            ("10.2.0.2/16",), ("10.2.0.2/32",), "10.2.0.2", True, id="foreign, routed by exactly one address"
        ),
        pytest.param(("10.1.0.2/16",), (), "::ffff:10.1.0.2", False, id="ipv4 mapped into ipv6"),
    ],
)
def test_a_peer_may_use_these_addresses(
    networks: tuple[str, ...], unsafe: tuple[str, ...], remote: str, allowed: bool
) -> None:
    peer = PeerNetworks.of(certificate(*networks, unsafe=unsafe), OWN.networks)

    assert peer.allows(packed(remote)) is allowed


@given(
    st.lists(st.sampled_from(["10.1.0.2/16", "10.2.0.2/16", "10.1.3.3/24", "10.9.0.1/32"]), unique=True),
    st.lists(
        st.sampled_from(["10.0.0.0/8", "10.2.0.0/24", "10.2.0.2/32", "0.0.0.0/0", "10.1.0.0/30"]), unique=True
    ),
    st.sampled_from(["10.1.0.2", "10.2.0.2", "10.1.3.3", "10.9.0.1", "10.2.0.3", "10.1.0.1", "11.0.0.1"]),
)
def test_the_longest_prefix_decides_about_a_peers_address(
    networks: list[str], unsafe: list[str], remote: str
) -> None:
    peer_certificate = certificate(*networks, unsafe=tuple(unsafe))
    rows = [
        (32, ip_network(own.ip), own.ip in ip_network("10.1.0.0/16")) for own in peer_certificate.networks
    ]
    rows += [(own.network.prefixlen, own.network, True) for own in peer_certificate.unsafe_networks]
    matches = [row for row in rows if ip_address(remote) in row[1]]
    longest = max((length for length, _, _ in matches), default=None)

    allowed = PeerNetworks.of(peer_certificate, OWN.networks).allows(packed(remote))

    assert allowed is any(usable for length, _, usable in matches if length == longest)


@pytest.mark.parametrize("direction", Direction)
def test_the_peers_address_is_looked_at_first_then_ours_then_the_rules(direction: Direction) -> None:
    closed = Firewall(FirewallConfig(), OWN)

    verdicts = [
        check(closed, direction, flow(local="10.1.0.9", remote="10.1.0.9")),
        check(closed, direction, flow(local="10.1.0.9")),
        check(closed, direction, flow()),
    ]

    assert verdicts == [Verdict.DROP_REMOTE_ADDRESS, Verdict.DROP_LOCAL_ADDRESS, Verdict.DROP_NO_RULE]


@pytest.mark.parametrize("direction", Direction)
def test_without_rules_a_direction_is_closed(direction: Direction) -> None:
    config = FirewallConfig(outbound=ANY) if direction is INBOUND else FirewallConfig(inbound=ANY)
    firewall = Firewall(config, OWN)
    other = OUTBOUND if direction is INBOUND else INBOUND

    assert check(firewall, direction, flow()) is Verdict.DROP_NO_RULE
    assert check(firewall, other, flow(port=81)) is Verdict.ALLOW


@pytest.mark.parametrize("protocol", [1, 6, 17, 50, 58, 132, 255])
def test_an_any_rule_admits_every_protocol(protocol: int) -> None:
    assert check(Firewall(OPEN, OWN), INBOUND, flow(protocol=protocol)) is Verdict.ALLOW


def test_the_answer_to_an_allowed_packet_passes_without_a_rule() -> None:
    firewall = Firewall(FirewallConfig(outbound=ANY), OWN)

    assert check(firewall, OUTBOUND, flow()) is Verdict.ALLOW
    assert check(firewall, INBOUND, flow()) is Verdict.ALLOW
    assert check(firewall, INBOUND, flow(port=81)) is Verdict.DROP_NO_RULE


def test_the_answer_passes_until_the_flow_expires() -> None:
    firewall = Firewall(FirewallConfig(outbound=ANY, conntrack=ConntrackConfig(udp_timeout=Seconds(30))), OWN)
    check(firewall, OUTBOUND, flow())

    assert check(firewall, INBOUND, flow(), at=T0 + 29) is Verdict.ALLOW
    assert check(firewall, INBOUND, flow(), at=T0 + 58) is Verdict.ALLOW
    assert check(firewall, INBOUND, flow(), at=T0 + 88) is Verdict.DROP_NO_RULE


def test_a_known_flow_does_not_excuse_the_addresses_of_another_peer() -> None:
    firewall = Firewall(OPEN, OWN)
    check(firewall, OUTBOUND, flow())
    other = PeerNetworks.of(certificate("10.1.0.3/16"), OWN.networks)

    assert check(firewall, INBOUND, flow(), peer=other) is Verdict.DROP_REMOTE_ADDRESS


def test_dropped_packets_leave_no_flow() -> None:
    firewall = Firewall(FirewallConfig(outbound=ANY), OWN)

    check(firewall, INBOUND, flow())
    check(firewall, OUTBOUND, flow(local="10.1.0.9"))
    check(firewall, OUTBOUND, flow(remote="10.1.0.9"))

    assert len(firewall.conntrack) == 0


@pytest.mark.parametrize(
    ("local", "allowed"),
    [("10.1.0.1", True), ("fd01::1", True), ("10.1.0.2", False), ("10.1.0.0", False), ("192.168.0.1", False)],
)
def test_the_local_address_is_exactly_one_of_ours(local: str, allowed: bool) -> None:
    remote = "10.1.0.2" if "." in local else "fd01::2"

    verdict = check(Firewall(OPEN, OWN), INBOUND, flow(local=local, remote=remote))

    assert verdict is (Verdict.ALLOW if allowed else Verdict.DROP_LOCAL_ADDRESS)


ROUTED, OURS, ELSEWHERE = "192.168.7.7", "10.1.0.1", "172.16.0.1"


@pytest.mark.parametrize(
    ("rules", "default_any", "verdicts"),
    [
        pytest.param((FirewallRule(),), False, "an-", id="absent: our overlay networks only"),
        pytest.param((FirewallRule(),), True, "aa-", id="absent, with default_local_cidr_any: all"),
        pytest.param((FirewallRule(local_cidr="any"),), False, "aa-", id="any: all"),
        pytest.param((FirewallRule(local_cidr=ip_network("192.168.7.0/24")),), False, "na-", id="a network"),
        pytest.param((FirewallRule(local_cidr=ip_network("192.168.8.0/24")),), True, "nn-", id="another one"),
        pytest.param((FirewallRule(local_cidr=ip_network("0.0.0.0/0")),), False, "aa-", id="all of ipv4"),
        pytest.param((FirewallRule(local_cidr=ip_network("::/0")),), False, "nn-", id="all of ipv6"),
        pytest.param(
            (FirewallRule(), FirewallRule(local_cidr=ip_network("192.168.7.7/32"))),
            False,
            "aa-",
            id="two rules",
        ),
        pytest.param((), True, "nn-", id="no rule"),
    ],
)
def test_local_cidr_narrows_a_rule_of_a_router(
    rules: tuple[FirewallRule, ...], default_any: bool, verdicts: str
) -> None:
    names = {"a": Verdict.ALLOW, "n": Verdict.DROP_NO_RULE, "-": Verdict.DROP_LOCAL_ADDRESS}
    firewall = Firewall(FirewallConfig(inbound=rules, default_local_cidr_any=default_any), ROUTER)

    found = [check(firewall, INBOUND, flow(local=local)) for local in (OURS, ROUTED, ELSEWHERE)]

    assert found == [names[letter] for letter in verdicts]


def test_a_replacement_that_changes_nothing_keeps_the_rules_version() -> None:
    firewall = Firewall(OPEN, ROUTER)

    assert not firewall.replace(FirewallConfig(inbound=ANY, outbound=ANY), ROUTER, T0)
    assert firewall.rules_version == 0


@pytest.mark.parametrize(
    ("config", "own"),
    [
        pytest.param(FirewallConfig(inbound=ANY), ROUTER, id="rules"),
        pytest.param(OPEN, OWN, id="our unsafe networks"),
    ],
)
def test_a_replacement_that_changes_something_counts_up_and_keeps_the_flows(
    config: FirewallConfig, own: Certificate
) -> None:
    firewall = Firewall(OPEN, ROUTER)
    check(firewall, INBOUND, flow())

    assert firewall.replace(config, own, T0)
    assert firewall.rules_version == 1
    assert len(firewall.conntrack) == 1


def test_a_known_flow_has_to_pass_the_new_rules_of_its_own_direction() -> None:
    firewall = Firewall(OPEN, OWN)
    check(firewall, INBOUND, flow(port=1))
    check(firewall, OUTBOUND, flow(port=2))

    firewall.replace(FirewallConfig(inbound=ANY), OWN, T0)

    assert check(firewall, INBOUND, flow(port=1)) is Verdict.ALLOW
    assert check(firewall, OUTBOUND, flow(port=1)) is Verdict.ALLOW
    assert check(firewall, OUTBOUND, flow(port=2)) is Verdict.DROP_NO_RULE
    assert len(firewall.conntrack) == 1


def test_a_flow_that_its_own_direction_denies_may_be_allowed_anew_by_the_other_one() -> None:
    firewall = Firewall(OPEN, OWN)
    check(firewall, OUTBOUND, flow())

    firewall.replace(FirewallConfig(inbound=ANY), OWN, T0)

    assert check(firewall, INBOUND, flow()) is Verdict.ALLOW
    found = firewall.conntrack.get(flow(), T0)
    assert found is not None
    assert (found.direction, found.rules_version) == (INBOUND, 1)


def test_a_known_flow_is_asked_once_for_each_version_of_the_rules() -> None:
    firewall = Firewall(OPEN, ROUTER)
    check(firewall, INBOUND, flow())
    firewall.replace(FirewallConfig(inbound=ANY), ROUTER, T0)

    check(firewall, OUTBOUND, flow())

    found = firewall.conntrack.get(flow(), T0)
    assert found is not None
    assert (found.direction, found.rules_version) == (INBOUND, 1)


def test_a_replacement_brings_new_timeouts() -> None:
    firewall = Firewall(OPEN, OWN)
    check(firewall, INBOUND, flow())

    short = FirewallConfig(outbound=ANY, inbound=ANY, conntrack=ConntrackConfig(udp_timeout=Seconds(1)))
    firewall.replace(short, OWN, T0)

    assert firewall.conntrack.get(flow(), Seconds(T0 + 1)) is None


def test_when_the_rules_version_wraps_to_zero_every_flow_is_forgotten() -> None:
    firewall = Firewall(OPEN, OWN)
    check(firewall, INBOUND, flow())
    configs = [OPEN, FirewallConfig(inbound=ANY)]

    for version in range(1, 65536):
        firewall.replace(configs[version % 2], OWN, T0)
    assert (firewall.rules_version, len(firewall.conntrack)) == (65535, 1)

    firewall.replace(configs[0], OWN, T0)

    assert (firewall.rules_version, len(firewall.conntrack)) == (0, 0)


def test_the_capacity_is_that_of_the_table() -> None:
    firewall = Firewall(OPEN, OWN, capacity=3)

    for port in range(10):
        check(firewall, INBOUND, flow(port=port))

    assert (len(firewall.conntrack), firewall.conntrack.evicted) == (3, 7)


# What the data path admits by itself.


def test_between_two_addresses_flows_may_begin_in_each_direction_that_has_a_rule() -> None:
    configs = [
        FirewallConfig(),
        FirewallConfig(inbound=ANY),
        FirewallConfig(outbound=ANY),
        OPEN,
    ]

    between = [Firewall(config, OWN).between(flow()) for config in configs]

    assert between == [frozenset(), {INBOUND}, {OUTBOUND}, {INBOUND, OUTBOUND}]


def test_between_depends_on_the_local_address_and_on_nothing_else_of_the_flow() -> None:
    routed = (FirewallRule(local_cidr=ip_network("192.168.7.0/24")),)
    firewall = Firewall(FirewallConfig(inbound=routed, outbound=ANY), ROUTER)

    assert firewall.between(flow(local=ROUTED)) == {INBOUND}
    assert firewall.between(flow(local=OURS)) == {OUTBOUND}
    others = [flow(port=81), flow(protocol=1), flow(remote="10.1.0.3"), flow()._replace(fragment=True)]
    assert [firewall.between(other) for other in others] == [{OUTBOUND}] * 4


def test_between_goes_by_the_newest_rules() -> None:
    firewall = Firewall(OPEN, OWN)
    check(firewall, INBOUND, flow())

    firewall.replace(FirewallConfig(outbound=ANY), OWN, T0)

    assert firewall.between(flow()) == {OUTBOUND}


@given(
    st.sampled_from([(), ANY, (FirewallRule(local_cidr=ip_network("192.168.7.0/24")),)]),
    st.sampled_from([(), ANY, (FirewallRule(local_cidr="any"),)]),
    st.sampled_from(Direction),
    st.sampled_from(["192.168.7.7", "192.168.8.8", "10.1.0.1"]),
    st.tuples(st.integers(0, 65_535), st.integers(0, 255), st.booleans()),
)
def test_what_between_says_is_what_each_flow_between_the_two_would_be_told(
    inbound: tuple[FirewallRule, ...],
    outbound: tuple[FirewallRule, ...],
    direction: Direction,
    local: str,
    other: tuple[int, int, bool],
) -> None:
    firewall = Firewall(FirewallConfig(inbound=inbound, outbound=outbound), ROUTER)
    port, protocol, fragment = other
    key = flow(local=local, port=port, protocol=protocol)._replace(fragment=fragment)

    between = firewall.between(flow(local=local))

    assert (check(firewall, direction, key) is Verdict.ALLOW) is (direction in between)


class Admitted:
    """Flows that the data path admitted, and about which it was asked."""

    def __init__(self, flows: dict[FlowKey, Direction]) -> None:
        self.flows = flows
        self.asked: list[tuple[FlowKey, Seconds]] = []

    def origin(self, key: FlowKey, now: Seconds) -> Direction | None:
        self.asked.append((key, now))
        return self.flows.get(key)


ONE_WAY = {INBOUND: FirewallConfig(inbound=ANY), OUTBOUND: FirewallConfig(outbound=ANY)}


@pytest.mark.parametrize("began", Direction)
def test_a_flow_that_the_data_path_admitted_passes_both_ways_while_a_rule_allows_how_it_began(
    began: Direction,
) -> None:
    for direction in Direction:
        firewall = Firewall(OPEN, OWN, origin=Admitted({flow(): began}).origin)
        firewall.replace(ONE_WAY[began], OWN, T0)

        assert check(firewall, direction, flow()) is Verdict.ALLOW
        assert firewall.direction(flow()) is began


@pytest.mark.parametrize("began", Direction)
def test_a_flow_that_the_data_path_admitted_ends_with_the_rules_of_its_own_direction(
    began: Direction,
) -> None:
    other = OUTBOUND if began is INBOUND else INBOUND
    firewall = Firewall(OPEN, OWN, origin=Admitted({flow(): began}).origin)
    firewall.replace(ONE_WAY[other], OWN, T0)

    assert check(firewall, began, flow()) is Verdict.DROP_NO_RULE
    assert len(firewall.conntrack) == 0
    assert check(firewall, other, flow()) is Verdict.ALLOW
    assert firewall.direction(flow()) is other


def test_a_flow_admitted_outbound_passes_inbound_without_inbound_rules_and_no_other_flow_does() -> None:
    admitted = Admitted({flow(port=1): OUTBOUND, flow(port=2): INBOUND})
    firewall = Firewall(FirewallConfig(outbound=ANY), OWN, origin=admitted.origin)

    verdicts = [check(firewall, INBOUND, flow(port=port)) for port in (1, 2, 3)]

    assert verdicts == [Verdict.ALLOW, Verdict.DROP_NO_RULE, Verdict.DROP_NO_RULE]


def test_an_admitted_flow_does_not_excuse_the_addresses_of_another_peer_or_those_that_are_not_ours() -> None:
    foreign = flow(local="10.1.0.9")
    admitted = Admitted({flow(): OUTBOUND, foreign: OUTBOUND})
    firewall = Firewall(OPEN, OWN, origin=admitted.origin)
    other = PeerNetworks.of(certificate("10.1.0.3/16"), OWN.networks)

    assert check(firewall, INBOUND, flow(), peer=other) is Verdict.DROP_REMOTE_ADDRESS
    assert check(firewall, INBOUND, foreign) is Verdict.DROP_LOCAL_ADDRESS
    assert admitted.asked == []


def test_the_data_path_is_asked_only_about_flows_that_are_not_known() -> None:
    admitted = Admitted({})
    config = FirewallConfig(inbound=ANY, outbound=ANY, conntrack=ConntrackConfig(udp_timeout=Seconds(30)))
    firewall = Firewall(config, OWN, origin=admitted.origin)

    check(firewall, OUTBOUND, flow())
    check(firewall, OUTBOUND, flow(), at=T0 + 1)
    check(firewall, INBOUND, flow(), at=T0 + 2)
    once = list(admitted.asked)
    check(firewall, INBOUND, flow(), at=T0 + 32)
    check(firewall, INBOUND, flow(port=81), at=T0 + 33)

    assert once == [(flow(), T0)]
    assert admitted.asked[1:] == [(flow(), T0 + 32), (flow(port=81), T0 + 33)]


def test_what_new_rules_end_of_the_known_flows_is_not_asked_about_again() -> None:
    admitted = Admitted({flow(): OUTBOUND})
    firewall = Firewall(OPEN, OWN, origin=admitted.origin)
    check(firewall, INBOUND, flow())
    admitted.asked.clear()

    firewall.replace(FirewallConfig(inbound=ANY), OWN, T0)
    verdicts = [check(firewall, OUTBOUND, flow()), check(firewall, INBOUND, flow(port=81))]

    assert verdicts == [Verdict.DROP_NO_RULE, Verdict.ALLOW]
    assert admitted.asked == [(flow(port=81), T0)]
