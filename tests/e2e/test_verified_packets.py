"""Every packet that comes out of a tunnel is verified: by the receiver's kernel, and by arithmetic of our own.

A kernel trusts what comes with a TUN device's offloads. So the receiver has none here: it writes packet by
packet, and its kernel verifies each header and checksum and counts. What we write where there are offloads is
verified by a process of the tests that reads it all from the device. `nox -s verify_packets`: 10 million.
"""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from tests.e2e.conftest import MakePair
from tests.support.counters import KernelCounters
from tests.support.floods import UdpFlood
from tests.support.inspector import Inspector
from tests.support.nodes import DEVICE, MTU_BYTES, Node, Pair, Variant
from tests.support.packet_tap import tells_udp_superpackets
from tests.support.peers import OURS
from tests.support.traffic import Endpoint, ping
from tests.support.transfers import Transfer
from tests.support.udp_batches import can_send_segmented

pytestmark = pytest.mark.e2e

DUAL_STACK = Variant("v2-25519", versions=((2,), (2,)), overlay=(4, 6))
PACKETS = int(float(os.environ.get("NEBULA_MP_TEST_PACKETS", "200_000")))
INSPECTED = PACKETS // 4
_PATIENT = {"listen": {"read_buffer": 16 << 20, "write_buffer": 16 << 20}}
_NO_TUN_OFFLOADS = {"mp": {"offload": {"tso": False, "uso": False}}}
_SEGMENT_BYTES = MTU_BYTES - 40  # no segment carries more
_WITHIN_S = 30.0
_PACKETS_S_AT_LEAST = 2_000


class Kind(NamedTuple):
    """Packets of one kind: `size` bounds a TCP segment (0: as large as fits) or is that of a datagram."""

    name: str
    family: int
    size: int
    share: float
    together: bool = False  # datagrams: many with one call


KINDS = [
    *(Kind("tcp", family, 0, 0.17) for family in (4, 6)),
    *(Kind("tcp", family, size, 0.03) for family in (4, 6) for size in (88, 536, 1001)),
    *(Kind("udp", family, size, 0.05, together=True) for family in (4, 6) for size in (9, 777, 1200, 1252)),
    *(Kind("udp", family, size, 0.02) for family in (4, 6) for size in (64, 1199)),
]


@pytest.mark.parametrize("receiver", ["1.11.0", OURS])
def test_the_receivers_kernel_finds_no_packet_wrong(make_pair: MakePair, receiver: str) -> None:
    pair = _pair(make_pair, receiver, _NO_TUN_OFFLOADS)
    before = KernelCounters.of(pair.b.site)

    verified = {kind: _flood(pair, kind, int(PACKETS * kind.share) + 1) for kind in KINDS}

    grown = KernelCounters.of(pair.b.site).since(before)
    total = sum(verified.values())
    print(f"\n{receiver} as receiver: {total} packets verified by its kernel, wrong: {grown.wrong() or 0}")
    print(_table(verified))
    assert not _has_offloads(pair.b), "then its kernel would trust what it is given"
    assert grown.wrong() == {}
    assert total >= PACKETS


@pytest.mark.parametrize("offloads", [False, True], ids=["packet-by-packet", "with-superpackets"])
def test_our_own_arithmetic_finds_no_packet_wrong(make_pair: MakePair, offloads: bool) -> None:
    pair = _pair(make_pair, OURS, {} if offloads else _NO_TUN_OFFLOADS)

    with Inspector(pair.b.site, DEVICE) as inspector:
        verified = {kind: _flood(pair, kind, int(INSPECTED * kind.share) + 1) for kind in KINDS}
        found = inspector.finish()

    print(f"\n{found.verified} packets verified, wrong: {found.wrong_count}, not seen: {found.missed}")
    print(f"{dict(found.packets)}, of them in superpackets: {dict(found.superpackets)}\n{_table(verified)}")
    assert found.wrong == []
    assert found.verified + found.missed >= INSPECTED
    assert found.verified > INSPECTED / 2, "the machine is too slow for the inspector to see much"
    assert _has_offloads(pair.b) is offloads
    kinds = {"tcp4", "tcp6", *(("udp4", "udp6") if tells_udp_superpackets() else ())} if offloads else set()
    assert set(found.superpackets) == kinds


def _pair(make_pair: MakePair, receiver: str, extra: Mapping[str, object]) -> Pair:
    pair = make_pair(receiver, DUAL_STACK)
    pair.a.extra = _PATIENT
    pair.b.extra = {**_PATIENT, **(extra if receiver == OURS else {})}
    for node in pair.nodes:
        node.workers = node.workers or 1
    pair.introduce(pair.a)
    pair.start()
    for family in (4, 6):
        ping(*_ends(pair, family))
    return pair


def _ends(pair: Pair, family: int) -> tuple[Endpoint, Endpoint]:
    left, right = (Endpoint(node.site, node.host.address(family)) for node in pair.nodes)
    return left, right


def _has_offloads(node: Node) -> bool:
    """Whether there is a virtio header in front of the packets of its device."""
    (link,) = json.loads(node.site.ip("-d", "-j", "link", "show", "dev", DEVICE))
    has: bool = link["linkinfo"]["info_data"]["vnet_hdr"]
    return has


def _flood(pair: Pair, kind: Kind, amount: int) -> int:
    """Have so many of them or more arrive at b; how many its kernel has taken for right.

    It counts a superpacket of TCP as one.
    """
    ends = _ends(pair, kind.family)
    if kind.name == "udp":
        together = kind.together and can_send_segmented()
        with UdpFlood(*ends, size=kind.size, together=together) as flood:
            flood.run(amount)
        assert flood.wrong == 0, f"{kind}: {flood.wrong} of {flood.received} arrived altered"
        return flood.received
    before = KernelCounters.of(pair.b.site).tcp_segments
    transfer = Transfer(*ends, size_bytes=amount * (kind.size or _SEGMENT_BYTES), segment_bytes=kind.size)
    try:
        transfer.finish(within_s=_WITHIN_S + amount / _PACKETS_S_AT_LEAST)
    finally:
        transfer.abandon()
    return KernelCounters.of(pair.b.site).tcp_segments - before


def _table(verified: Mapping[Kind, int]) -> str:
    return "\n".join(
        f"  {kind.name}{kind.family} {kind.size or 'full':>5} {'together' if kind.together else '':8} {amount:>9}"
        for kind, amount in verified.items()
    )
