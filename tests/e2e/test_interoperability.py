"""Our gateway and each released Nebula, and our gateway and itself, exchange every kind of traffic.

Each case is a pair of fresh nodes of which one starts the handshake; then TCP, UDP, fragmented pings and
raw packets cross in both directions and must come out as they went in.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from nebula_mp.wire.header import Header, MessageType
from tests.e2e.conftest import BESIDE_THE_NATIVE, MakePair
from tests.support.netns import Recorder
from tests.support.nodes import DEVICE, Node, Pair, Variant, with_cipher
from tests.support.packets import raw_packets
from tests.support.peers import OURS, STAND_IN
from tests.support.traffic import (
    RAW_PACKETS,
    Endpoint,
    check_large_pings,
    check_raw_packets,
    check_tcp,
    check_udp_echo,
    collect,
    ping,
    silence_local_stacks,
)

pytestmark = pytest.mark.e2e

RAW_SEED = 20260901

BASIC = Variant("v1-25519")
P256 = Variant("v1-p256", curve="P256")
V2 = replace(BASIC, name="v2-25519", versions=((2,), (2,)))
V2_P256 = replace(V2, name="v2-p256", curve="P256")
OURS_SIGNED = replace(BASIC, name="certificates-made-by-us", maker=OURS)
RECENT = [
    replace(V2, name="ipv6-only", overlay=(6,), cipher="chachapoly"),
    replace(V2, name="dual-stack", overlay=(4, 6)),
    replace(BASIC, name="both-v1-and-v2", versions=((1, 2), (1, 2)), overlay=(4, 6)),
    replace(BASIC, name="v1-and-v2-to-v1", versions=((1, 2), (1,)), cipher="chachapoly"),
    replace(BASIC, name="v1-and-v2-to-v2", versions=((1, 2), (2,)), overlay=(4, 6)),
    replace(BASIC, name="v1-to-v1-and-v2", versions=((1,), (1, 2))),
    replace(BASIC, name="v2-to-v1-and-v2", versions=((2,), (1, 2)), overlay=(4, 6), curve="P256"),
    replace(BASIC, name="ipv6-underlay", underlay=6),
    replace(BASIC, name="ipv4-underlay-seen-through-an-ipv6-socket", listen="::"),
    replace(V2, name="ipv6-underlay-and-overlay", underlay=6, overlay=(6,), curve="P256"),
    replace(V2_P256, name="v2-certificates-made-by-us", maker=OURS, overlay=(4, 6)),
]


def _cases() -> Iterator[object]:
    both_ciphers = {
        "1.6.1": [BASIC],
        "1.9.3": [BASIC, P256],
        "1.11.0": [BASIC, P256, V2, V2_P256],
        OURS: [BASIC, P256, V2, V2_P256],
    }
    for peer, variants in both_ciphers.items():
        chosen = [with_cipher(*each) for each in itertools.product(variants, ("aes", "chachapoly"))]
        if peer != OURS:
            chosen.append(OURS_SIGNED)
        if peer in {"1.11.0", OURS}:
            chosen += RECENT
        for variant, starter in itertools.product(chosen, ("ours", "theirs")):
            yield pytest.param("", peer, variant, starter, id=f"{peer}-{variant.name}-{starter}-starts")
        if peer == "1.11.0":
            for kernel, variant in itertools.product(BESIDE_THE_NATIVE, chosen[:8]):
                yield pytest.param(kernel, peer, variant, "ours", id=f"{peer}-{variant.name}-on-{kernel}")


@pytest.mark.parametrize(("kernel", "peer", "variant", "starter"), list(_cases()), indirect=["kernel"])
@pytest.mark.usefixtures("kernel")
def test_what_goes_in_on_one_side_comes_out_on_the_other(
    make_pair: MakePair, peer: str, variant: Variant, starter: str
) -> None:
    pair = make_pair(peer, variant)
    initiator = pair.a if starter == "ours" else pair.b
    pair.introduce(initiator)
    for node in pair.nodes:
        # A tunnel begun with version 1 carries IPv6 once this check has found a higher version on both sides.
        node.extra = {"timers": {"connection_alive_interval": 1}}
    pair.start()

    with pair.wire.record() as recorder:
        for family in variant.families:
            ping(*_ends(pair, initiator, family))
    checks = [
        partial(check, *_ends(pair, initiator, family))
        for family in variant.families
        for check in (check_udp_echo, check_large_pings, check_tcp)
    ]
    checks += [partial(_check_raw, pair, peer, family) for family in variant.families]

    collect([partial(_assert_started_by, recorder, initiator), *checks], "exchange of traffic")


def _ends(pair: Pair, source: Node, family: int) -> tuple[Endpoint, Endpoint]:
    destination = pair.other(source)
    return (
        Endpoint(source.site, source.host.address(family)),
        Endpoint(destination.site, destination.host.address(family)),
    )


def _assert_started_by(recorder: Recorder, initiator: Node) -> None:
    first = recorder.datagrams[0]
    header = Header.parse(first.payload)
    assert first.source.ip in initiator.site.addresses.values()
    assert (header.type, header.remote_index, header.counter) == (MessageType.HANDSHAKE, 0, 1)


def _check_raw(pair: Pair, peer: str, family: int) -> None:
    silence_local_stacks(*_ends(pair, pair.a, family))
    for sender in pair.nodes:
        source, destination = _ends(pair, sender, family)
        # Released versions do not classify every IPv6 protocol; ours does.
        packets = raw_packets(
            source.address,
            destination.address,
            RAW_SEED,
            RAW_PACKETS,
            unclassified=peer == OURS and not STAND_IN,
        )
        check_raw_packets(source, destination, DEVICE, packets)
