"""Packets of one flow keep their order, and every packet is accounted for.

The counts are checked twice: against each other, and against what the kernel counted at a device and what a
packet socket saw on the wire, neither of which our program has a hand in. At a device with superpackets the
kernel counts those; there its count at the peer's device, which has none, stands for what we were given.
"""

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from nebula_mp.datapath.api import Drop
from nebula_mp.newtypes import Counter, TunnelIndex, UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, Header, MessageType
from tests.e2e.conftest import MakePair
from tests.support.datagrams import Flows
from tests.support.netns import wait_until
from tests.support.nodes import DEVICE, PORT, Node, Pair, Variant
from tests.support.peers import OURS
from tests.support.traffic import Endpoint, check_tcp, ping
from tests.support.wiretap import Wiretap

pytestmark = pytest.mark.e2e

BASIC = Variant("v1-25519")
DUAL_STACK = Variant("v2-25519", versions=((2,), (2,)), overlay=(4, 6))
SETTLED_S = 0.1
FLOWS = 8
SECONDS = 3
_PATIENT = {"listen": {"read_buffer": 8 << 20, "write_buffer": 8 << 20}}
_NO_TUN_OFFLOADS = {"mp": {"offload": {"tso": False, "uso": False}}}
_NO_TESTS = {"timers": {"connection_alive_interval": 600}}
_IPV4_ONLY = ({"port": "any", "proto": "any", "host": "any", "local_cidr": "10.42.0.0/24"},)
_WITHIN_S = 20.0
_REFUSED = 50
_JUNK = 50
_SEED = 11
_MOVED = frozenset(f"mp.{where}.{way}.packets" for where in ("tun", "udp") for way in ("rx", "tx"))
_OTHER_DROPS = frozenset({*Drop, "mp.ring.resumed", "hostinfo.cached_packets.dropped"})


def _ends(pair: Pair, source: Node, family: int = 4) -> tuple[Endpoint, Endpoint]:
    there = pair.other(source)
    return Endpoint(source.site, source.host.address(family)), Endpoint(
        there.site, there.host.address(family)
    )


@pytest.mark.parametrize("drain", ["writer", "reader"])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("peer", ["1.11.0", OURS])
def test_datagrams_of_one_flow_arrive_in_order_after_its_first_tenth_of_a_second(
    make_pair: MakePair, peer: str, workers: int, drain: str
) -> None:
    pair = make_pair(peer, BASIC)
    for node in pair.nodes:
        node.workers, node.drain = workers, drain
        node.extra = _PATIENT
    pair.introduce(pair.a)
    pair.start()
    ping(*_ends(pair, pair.a))

    with Flows(*_ends(pair, pair.a), count=FLOWS, burst=6, interval_s=0.05) as flows:
        enough = 2 * FLOWS * 6 * 20 * SECONDS
        wait_until(lambda: flows.sent >= enough, "the flows have run for a while", within_s=3 * _WITHIN_S)

    late = {sequence.label: sequence.late(after_s=SETTLED_S) for sequence in flows.sequences}
    assert {label: numbers for label, numbers in late.items() if numbers} == {}
    assert not any(sequence.twice for sequence in flows.sequences)
    lost = sum(len(sequence.lost) for sequence in flows.sequences)
    print(f"\n{flows.sent} datagrams in {2 * FLOWS} directions, {lost} lost, none late after {SETTLED_S} s")
    assert flows.arrived > flows.sent / 2


@pytest.mark.parametrize("superpackets", [False, True], ids=["packet-by-packet", "superpackets"])
@pytest.mark.parametrize("workers", [1, 4])
def test_every_packet_in_is_a_packet_out_or_counted_under_one_reason(
    make_pair: MakePair, workers: int, superpackets: bool
) -> None:
    pair = make_pair("1.11.0", DUAL_STACK)
    pair.a.workers = workers
    pair.a.inbound = _IPV4_ONLY
    pair.a.extra = {**_PATIENT, **_NO_TESTS, "firewall": {"outbound": list(_IPV4_ONLY)}}
    pair.a.extra |= {} if superpackets else _NO_TUN_OFFLOADS
    pair.b.extra = {**_PATIENT, **_NO_TESTS}
    pair.introduce(pair.a)
    with Wiretap(pair.wire) as tap, pair.wire.record() as recorder:
        pair.start()
        ping(*_ends(pair, pair.a))
        check_tcp(*_ends(pair, pair.a), 1_000_000)
        refused_out = _send_refused(_ends(pair, pair.a, 6))
        refused_in = _send_refused(_ends(pair, pair.b, 6))
        sealed = next(sent.payload for sent in recorder.sent_by(pair.b.site) if _is_data(sent.payload))
        junk = _junk(sealed)
        _send_junk(pair, junk)
        stats = _settled(pair.a)
        seen = tap.finish()
    print("\n" + json.dumps({name: amount for name, amount in stats.items() if amount}))

    for reason, datagrams in junk.items():
        assert stats[reason] == len(datagrams), reason
    assert stats["drop.firewall.outgoing.no_rule"] == refused_out
    assert stats["drop.firewall.incoming.no_rule"] == refused_in
    (given, taken), (_, delivered) = (_device_counts(node) for node in pair.nodes)
    ours, theirs = (seen.datagrams[str(node.site.addresses[4])] for node in pair.nodes)
    assert ours["MESSAGE"] == delivered, "each datagram of ours was a packet"
    if superpackets:
        assert given < delivered, "there were none"
        given, taken = delivered + refused_out, theirs["MESSAGE"] - refused_in
    data_in = theirs["MESSAGE"] + sum(map(len, junk.values()))
    drops = {name: amount for name, amount in stats.items() if _is_drop(name) and amount}
    assert given + data_in == taken + ours["MESSAGE"] + sum(drops.values()), (drops, seen.datagrams)
    found = {name: stats.get(name, 0) for name in sorted(_MOVED)}
    assert (found["mp.tun.rx.packets"], found["mp.tun.tx.packets"]) == (given, taken), "what the kernel says"
    assert found["mp.udp.tx.packets"] == sum(ours.values()), "what was on the wire"
    assert seen.missed == 0


def _device_counts(node: Node) -> tuple[int, int]:
    """Packets that the kernel gave to the node, and took from it."""
    counts = json.loads(node.site.ip("-s", "-j", "link", "show", "dev", DEVICE))[0]["stats64"]
    return counts["tx"]["packets"], counts["rx"]["packets"]


def _is_drop(name: str) -> bool:
    return name.startswith("drop.") or name in _OTHER_DROPS


def _is_data(payload: bytes) -> bool:
    return len(payload) >= HEADER_BYTES + 20 and Header.parse(payload).type is MessageType.MESSAGE


def _send_refused(ends: tuple[Endpoint, Endpoint]) -> int:
    """IPv6, which our rules do not let pass; how much of it was sent."""
    with Flows(*ends, count=4, interval_s=0.005, both_ways=False) as flows:
        wait_until(lambda: flows.sent >= 4 * _REFUSED, "the flows have run for a while", within_s=_WITHIN_S)
        flows.stop(grace_s=0)
    assert flows.arrived == 0
    return flows.sent


def _junk(sealed: bytes) -> dict[str, list[bytes]]:
    """Datagrams by the reason for which they must be dropped; `sealed` was opened by us before."""
    dice = random.Random(_SEED)
    header = Header.parse(sealed)
    index = header.remote_index
    later = [replace(header, counter=Counter(header.counter + 500_000 + n)) for n in range(_JUNK)]
    unknown = replace(header, remote_index=TunnelIndex(index ^ 0x5A5A0000))
    return {
        "drop.short": [dice.randbytes(dice.randrange(2, HEADER_BYTES)) for _ in range(_JUNK)],
        "drop.version": [bytes([0x21]) + sealed[1:] for _ in range(_JUNK)],
        "drop.type": [bytes([0x19]) + sealed[1:] for _ in range(_JUNK)],
        "drop.unknown_index": [unknown.encode() + dice.randbytes(100) for _ in range(_JUNK)],
        "drop.truncated": [sealed[: HEADER_BYTES + dice.randrange(16)] for _ in range(_JUNK)],
        "drop.auth": [each.encode() + dice.randbytes(100) for each in later],
        "drop.replay": [sealed] * _JUNK,
    }


def _send_junk(pair: Pair, junk: Mapping[str, Sequence[bytes]]) -> None:
    """From the peer's address and from a stranger's, a little at a time: what the kernel drops is not ours."""
    forger = pair.wire.forger()
    target = UdpAddr(pair.a.site.addresses[4], PORT)
    sources = [UdpAddr(pair.b.site.addresses[4], PORT), UdpAddr(pair.wire.a.gateway(4), 5555)]
    everything = [datagram for datagrams in junk.values() for datagram in datagrams]
    random.Random(_SEED).shuffle(everything)
    for number, datagram in enumerate(everything):
        forger.send(datagram, sources[number % 2], target)
        if number % 20 == 19:
            time.sleep(0.01)
    forger.close()


def _settled(node: Node) -> dict[str, int]:
    """The counters once nothing moves any more."""
    before: dict[str, int] = {}

    def unchanged() -> dict[str, int] | None:
        nonlocal before
        last, before = (
            before,
            {name: amount for name, amount in node.stats().items() if _is_drop(name) or name in _MOVED},
        )
        return before if before == last else None

    wait_until(unchanged, "no counter grows any more", within_s=_WITHIN_S, every_s=0.3)
    return node.stats()
