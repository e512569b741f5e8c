"""Every offload can be missing, and nothing but the speed depends on it: each switched off in turn, then all.

All off is what a gateway on Linux 4.19 without them has. Here with one worker, and one case with two;
`nox -s offload_matrix` runs the same with 1, 2 and 4 workers under each drain mode.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from nebula_mp.config.model import Offloads
from tests.e2e.conftest import BESIDE_THE_NATIVE, MakePair
from tests.support.nodes import Node, Pair, Variant, workers_of_this_run
from tests.support.peers import OURS
from tests.support.traffic import (
    Endpoint,
    check_large_pings,
    check_tcp,
    check_udp_echo,
    check_udp_segmented,
    collect,
    ping,
)
from tests.support.udp_batches import can_send_segmented

pytestmark = pytest.mark.e2e

DUAL_STACK = Variant("v2-25519", versions=((2,), (2,)), overlay=(4, 6))
ALL = tuple(field.name for field in dataclasses.fields(Offloads))
BYTES = 20_000_000
_PING_SIZES = (4000,)
_PATIENT = {"listen": {"read_buffer": 16 << 20, "write_buffer": 16 << 20}}
_SINCE = {"tso": (2, 6), "uso": (6, 2), "udp_segment": (4, 18), "udp_gro": (5, 0)}
_SAID_AS = {"tso": "tso", "uso": "uso", "udp_segment": "udpSegment", "udp_gro": "udpGro"}
# Not a full ring or receive buffer: that is how TCP learns that it is too fast.
_DROPS = (
    "drop.",
    "mp.tun.drop.",
    "mp.udp.drop.",
    "mp.ring.full.upcall",
    "mp.ring.full.stranger",
    "udp.tx.dropped",
)


def _cases() -> Iterator[object]:
    workers = workers_of_this_run() or 1
    for peer in ("1.11.0", OURS):
        for off in [(), *((name,) for name in ALL), ALL]:
            words = "none" if not off else "all" if off == ALL else off[0]
            yield pytest.param("", peer, off, workers, id=f"{peer}-{words}-off")
    for kernel in BESIDE_THE_NATIVE:
        for off in ((), ALL):
            words = "all" if off else "none"
            yield pytest.param(kernel, "1.11.0", off, workers, id=f"1.11.0-{words}-off-on-{kernel}")
    if workers == 1:
        yield pytest.param("", OURS, ("tso", "udp_segment"), 2, id="two-workers-and-half-of-them-off")


@pytest.mark.parametrize(("kernel", "peer", "off", "workers"), list(_cases()), indirect=["kernel"])
@pytest.mark.usefixtures("kernel")
def test_whatever_the_kernel_cannot_do_traffic_passes_unaltered_and_nothing_is_dropped(
    make_pair: MakePair, peer: str, off: tuple[str, ...], workers: int
) -> None:
    pair = make_pair(peer, DUAL_STACK)
    pair.a.extra = {**_PATIENT, "mp": {"offload": dict.fromkeys(off, False)}}
    pair.b.extra = _PATIENT
    for node in pair.nodes:
        node.workers = workers
    pair.introduce(pair.a)
    pair.start()
    for family in (4, 6):
        ping(*_ends(pair, pair.a, family))
    before = {node.site.name: node.stats() for node in pair.nodes if node.is_ours}

    collect([*_checks(pair), partial(_assert_stated, pair.a, off, workers)], f"with {off} off")

    for node in filter(lambda node: node.is_ours, pair.nodes):
        dropped = _dropped(before[node.site.name], node.stats())
        assert dropped == {}, f"{node.label} with {off} off"


def _ends(pair: Pair, source: Node, family: int) -> tuple[Endpoint, Endpoint]:
    there = pair.other(source)
    return Endpoint(source.site, source.host.address(family)), Endpoint(
        there.site, there.host.address(family)
    )


def _checks(pair: Pair) -> Iterator[Callable[[], object]]:
    for family in (4, 6):
        for source in pair.nodes:
            ends = _ends(pair, source, family)
            yield partial(check_udp_echo, *ends)
            if can_send_segmented():
                yield partial(check_udp_segmented, *ends)
                yield partial(check_udp_segmented, *ends, joined=True)
        yield partial(check_tcp, *_ends(pair, pair.a, family), BYTES)
    yield partial(_check_large_pings, pair)


def _check_large_pings(pair: Pair) -> None:
    """Both families at once: pings take their time."""
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(check_large_pings, *_ends(pair, pair.a, family), _PING_SIZES) for family in (4, 6)
        ]
    for each in both:
        each.result()


def _assert_stated(node: Node, off: tuple[str, ...], workers: int) -> None:
    (said,) = node.log_lines("offloads")
    stated = {name: said[word] for name, word in _SAID_AS.items()}
    expected = {name: name not in off and _linux() >= since for name, since in _SINCE.items()}
    assert stated == {name: "true" if on else "false" for name, on in expected.items()}
    assert said["queues"] == str(1 if "multiqueue" in off else workers)


def _linux() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return int(found[1]), int(found[2])


def _dropped(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {
        name: amount - before.get(name, 0)
        for name, amount in after.items()
        if name.startswith(_DROPS) and amount != before.get(name, 0)
    }
