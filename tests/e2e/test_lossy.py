"""Datagrams are lost, repeated and reordered on the way; what TCP carries through the tunnel arrives unaltered.

A process on the wire decides each datagram's fate by seeded dice and counts, so both nodes' counters can be
held against what they were sent. `nox -s lossy_long` moves 1 GB each way in each case.
"""

import os
from collections.abc import Iterator
from ipaddress import ip_interface

import pytest

from tests.e2e.conftest import MakePair
from tests.support.counters import KernelCounters
from tests.support.lossy import Faults, LossyWire, Passed
from tests.support.netns import wait_until
from tests.support.nodes import PORT, Node, Pair, Variant
from tests.support.peers import OURS
from tests.support.traffic import Endpoint, ping
from tests.support.transfers import BothWays

pytestmark = pytest.mark.e2e

DUAL_STACK = Variant("v2-25519", versions=((2,), (2,)), overlay=(4, 6))
SEED = 5
BYTES = int(float(os.environ.get("NEBULA_MP_TEST_LOSSY_BYTES", "0")))  # each way; 0: what suits the loss
_BYTES_BY_LOSS = {0.0: 20_000_000, 0.01: 20_000_000, 0.05: 5_000_000}
_TWICE, _LATE = 0.01, 0.02
_EXTRA = {
    "listen": {"read_buffer": 32 << 20, "write_buffer": 32 << 20},
    "timers": {"connection_alive_interval": 600},  # nothing is sent that nobody asked for
}
_BYTES_S_AT_LEAST = 200_000
_WITHIN_S = 30.0
_REFUSED = ("drop.replay", "drop.old")


def _cases() -> Iterator[object]:
    for peer in ("1.11.0", OURS):
        for loss in _BYTES_BY_LOSS:
            yield pytest.param(peer, loss, 4, id=f"{peer}-{loss:.0%}-lost")
    yield pytest.param(OURS, 0.01, 6, id="over-ipv6")


@pytest.mark.parametrize(("peer", "loss", "underlay"), list(_cases()))
def test_what_is_lost_repeated_and_reordered_on_the_way_alters_nothing(
    make_pair: MakePair, peer: str, loss: float, underlay: int
) -> None:
    pair = make_pair(peer, DUAL_STACK if underlay == 4 else _over_ipv6())
    size = BYTES or _BYTES_BY_LOSS[loss]

    with LossyWire(pair.wire, family=underlay, port=PORT, seed=SEED) as lossy:
        _start(pair, lossy)
        before = [_counted(node) for node in pair.nodes]
        kernels = [KernelCounters.of(node.site) for node in pair.nodes]
        lossy.begin(Faults(lost=loss, twice=_TWICE, late=_LATE))
        moved = [_move(pair, family, size) for family in (4, 6)]
        _wait_until_all_is_quiet(pair)
        from_a, from_b = lossy.finish()
        _wait_until_all_is_quiet(pair)

    after = [
        KernelCounters.of(node.site).since(kernel) for node, kernel in zip(pair.nodes, kernels, strict=True)
    ]
    print(f"\n{'; '.join(moved)}; from a: {from_a}, from b: {from_b}")
    assert [counters.wrong() for counters in after] == [{}, {}]
    assert min(way.twice for way in (from_a, from_b)) > 0, "the dice did nothing"
    assert min(way.lost for way in (from_a, from_b)) > 0 or not loss, "the dice did nothing"
    for node, counted, passed in zip(pair.nodes, before, (from_b, from_a), strict=True):
        if node.is_ours:
            _assert_explained(node, counted, passed)


def _over_ipv6() -> Variant:
    return Variant("v2-over-ipv6", versions=((2,), (2,)), overlay=(4, 6), underlay=6)


def _start(pair: Pair, lossy: LossyWire) -> None:
    for node in pair.nodes:
        peer = pair.other(node)
        addresses = [ip_interface(text).ip for text in peer.host.networks]
        node.static = {address: [lossy.behind(node.site)] for address in addresses}
        node.extra = _EXTRA
    pair.start()
    for family in (4, 6):
        ping(*_ends(pair, family))


def _ends(pair: Pair, family: int) -> tuple[Endpoint, Endpoint]:
    left, right = (Endpoint(node.site, node.host.address(family)) for node in pair.nodes)
    return left, right


def _move(pair: Pair, family: int, size: int) -> str:
    with BothWays(*_ends(pair, family), pace_bytes_s=1e12, size_bytes=size) as transfers:
        return transfers.finish(within_s=_WITHIN_S + size / _BYTES_S_AT_LEAST)


def _counted(node: Node) -> dict[str, int]:
    return node.stats() if node.is_ours else {}


def _wait_until_all_is_quiet(pair: Pair) -> None:
    """What is still under way when a connection has ended has arrived."""
    last: list[str] = []

    def unchanged() -> bool:
        now = [
            node.site.space.run(
                "sh", "-c", "cat /proc/net/dev | grep -v 'lo:'; grep '^Tcp\\|^Udp' /proc/net/snmp"
            )
            for node in pair.nodes
        ]
        is_quiet = now == last
        last[:] = now
        return is_quiet

    wait_until(unchanged, "nothing is under way any more", within_s=_WITHIN_S, every_s=0.3)


def _assert_explained(node: Node, before: dict[str, int], passed: Passed) -> None:
    """Every datagram that went on was read, and as many refused as were sent twice; but for the socket's own drops."""
    grown = {name: amount - before.get(name, 0) for name, amount in node.stats().items()}
    no_room = sum(
        amount for name, amount in grown.items() if name.startswith("udp.") and name.endswith(".drops")
    )
    refused = sum(grown.get(name, 0) for name in _REFUSED)
    changed = {name: amount for name, amount in grown.items() if amount}
    assert grown["mp.udp.rx.packets"] + no_room == passed.went_on, (changed, passed)
    assert passed.twice - no_room <= refused <= passed.twice, (changed, passed)
    drops = {name for name, amount in changed.items() if name.startswith("drop.")}
    assert drops <= {*_REFUSED}, changed
