"""The same traffic through both kernels: the same packets, upcalls, counters, drops and windows.

NEBULA_MP_TEST_DATAGRAMS says how many datagrams the scripts made by chance have in all; `nox -s differential_long`
takes a million. A script that fails is said by its seed, and by what happened in it.
"""

import os
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import Aead
from nebula_mp.datapath.api import Drop, UpcallReason
from nebula_mp.datapath.segment import segment
from nebula_mp.datapath.virtio import HEADER_BYTES, VirtioHeader
from nebula_mp.newtypes import Cipher
from nebula_mp.wire.header import Header
from nebula_mp.wire.ip import parse_flow
from tests.datapath.batches import ALL, Batch, feed, packets_of, sealed, site_of, take
from tests.datapath.conftest import MakeSite
from tests.datapath.scripts import (
    INDEX_BEHIND,
    NEAR_PORTS,
    OFFLOADS,
    PATHS,
    Came,
    Dice,
    Done,
    Given,
    Host,
    Outcome,
    Script,
    play,
    without_meaningless_ids,
)
from tests.datapath.sites import KEY_OUT, Site, connect, drained
from tests.datapath.superpackets import TIMESTAMPS, Plan, plans
from tests.datapath.test_opening_equality import received
from tests.support import recording
from tests.support.native import PYTHON, RUST, named
from tests.support.packets import TCP, UDP

pytestmark = pytest.mark.native

DATAGRAMS: Final = int(float(os.environ.get("NEBULA_MP_TEST_DATAGRAMS", "50e3")))
PARTS: Final = 4
SCRIPT_DATAGRAMS: Final = 400


def check_agreement(script: Script, title: str) -> Outcome:
    """Lead both kernels through a script."""
    expected, found = play(script, named(PYTHON)), play(script, named(RUST))
    fields = zip(Outcome._fields, expected, found, strict=True)
    differences = [f"{name}: {difference(one, other)}" for name, one, other in fields if one != other]
    if differences:
        pytest.fail("\n".join([title, *differences, story(script)]), pytrace=False)
    return expected


def difference(expected: object, found: object) -> str:
    """Say where two things begin to differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = sorted({name for name, _ in expected.items() ^ found.items()})
        return "; ".join(f"{name} {expected.get(name, 0)} != {found.get(name, 0)}" for name in names)
    if isinstance(expected, set) and isinstance(found, set):
        return f"missing {expected - found}, too many {found - expected}"
    if isinstance(expected, bytes | list) and isinstance(found, bytes | list):
        pairs = enumerate(zip(expected, found, strict=False))
        at = next((at for at, (one, two) in pairs if one != two), min(len(expected), len(found)))
        one, two = expected[at : at + 1], found[at : at + 1]
        return f"{len(expected)} and {len(found)} long; from {at} on: {repr(one)[:300]} != {repr(two)[:300]}"
    return f"{expected} != {found}"


def story(script: Script) -> str:
    """Tell what happened."""
    lines = [f"{script.offloads}, {script.cipher}, {script.limits}"]
    for step in script.steps:
        match step:
            case Given(frames, budget):
                lines.append(f"given {[len(each) for each in frames]}, budget {budget}")
            case Came(batches, worker, _):
                sizes = [(len(each.datagrams), len(each.datagrams[0]), each.source) for each in batches]
                lines.append(f"came to {worker}: {sizes}")
            case Done(_, name):
                lines.append(name)
    return "\n".join(lines)


@pytest.mark.parametrize("part", range(PARTS))
def test_traffic_of_all_kinds_leaves_the_same_behind(part: int) -> None:
    datagrams, seed = 0, part
    reached: Tally[str] = Tally()
    while datagrams < DATAGRAMS / PARTS:
        script = Dice(seed).script(SCRIPT_DATAGRAMS)
        outcome = check_agreement(script, f"seed {seed}")
        reached.update(outcome.stats)
        reached["framed"] += sum(
            each[4:8] == PATHS[0].next_index.to_bytes(4, "big") for _, each in outcome.sealed
        )
        reached["unframed"] += sum(row == INDEX_BEHIND & 0xFFFF for _, row, _ in outcome.opened)
        reached["relayed"] += sum(upcall.reason is UpcallReason.RELAYED for _, upcall in outcome.upcalls)
        datagrams += script.datagrams
        seed += PARTS

    # It is no agreement on nothing: readers admitted flows, relay frames went all ways, and every reason was
    # there, but for full rings.
    assert reached["mp.flows.admitted"] > 0
    assert min(reached[name] for name in ("mp.relay.forwarded", "framed", "unframed", "relayed")) > 10, (
        reached
    )
    elsewhere = {
        each.value for each in Drop if each.value.startswith(("mp.udp.", "mp.tun.drop", "mp.ring.", "udp."))
    }
    elsewhere -= {Drop.TUN_OFFLOAD.value}
    assert {each.value for each in Drop} - elsewhere <= reached.keys()


@pytest.mark.parametrize("offloads", list(dict.fromkeys(OFFLOADS)), ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_recorded_connections_leave_the_same_behind_and_arrive(side: int, offloads: Offloads) -> None:
    out: list[bytes] = []
    into: list[bytes] = []
    steps: list[Given | Came | Done] = []
    for frame in recording.load():
        packet = frame.data[HEADER_BYTES:]
        packets = segment(VirtioHeader.parse(frame.data[:HEADER_BYTES], packet), packet)
        if frame.side == side:
            whole = [frame.data] if offloads.tun_header else packets
            steps += [Given(tuple(whole[at : at + 10])) for at in range(0, len(whole), 10)]
            out += packets
        else:
            steps.append(Came((Batch(sealed(packets, 3 + len(into))),)))
            into += packets
    admit = Done(lambda host: allow_all(host.site, out, into), "all flows are allowed")
    script = Script((admit, *steps), offloads=offloads)

    outcome = check_agreement(script, f"recorded by side {side}")

    aead = Aead(Cipher.AES, KEY_OUT)
    plain = [aead.open(3 + at, each[:16], each[16:]) for at, (_, each) in enumerate(outcome.sealed)]
    assert plain == out
    assert [each for _, _, each in outcome.opened] == [without_meaningless_ids(each) for each in into]
    assert not any(name.startswith("drop.") for name in outcome.stats)


def allow_all(site: Site, out: Iterable[bytes], into: Iterable[bytes]) -> None:
    """Let control admit each flow once."""
    flows = {parse_flow(each, inbound=False) for each in out} | {
        parse_flow(each, inbound=True) for each in into
    }
    for flow in flows:
        site.flows.allow(flow, site.peer, 60_000, int(site.now * 1000))


@st.composite
def given_by_the_stack(draw: st.DrawFn) -> Given:
    """A few superpackets."""
    found = [replace(each, ports=NEAR_PORTS) for each in draw(st.lists(plans(), min_size=1, max_size=2))]
    return Given(tuple(each.virtio() + each.packet() for each in found))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(given_by_the_stack() | received().map(lambda came: Came(tuple(came))), min_size=1, max_size=4),
    st.sampled_from([each for each in OFFLOADS if each.tun_header]),
    st.sampled_from(Cipher),
)
def test_what_hypothesis_thinks_of_leaves_the_same_behind(
    steps: list[Given | Came], offloads: Offloads, cipher: Cipher
) -> None:
    check_agreement(Script(tuple(steps), offloads=offloads, cipher=cipher), "hypothesis")


@pytest.mark.parametrize("seed", range(20))
def test_with_small_rings_that_nobody_empties_in_time_nothing_is_unaccounted_for_by_either(seed: int) -> None:
    """What finds a ring full depends on how packets were grouped; the sums do not."""
    script = Dice(1000 + seed).script(300)
    tight = replace(script, areas=2, area_bytes=16 * 1024, entries_max=8)
    for name in (PYTHON, RUST):
        host = Host(tight, named(name))
        with closing(host.site) as site:
            went = 0
            for number, step in enumerate(tight.steps):
                host.perform(step)
                if number % 3 == 0:
                    went += taken_out(site)
            while host.readers[0].sealer.poll(1000) or site.seal_ring().pending():
                went += taken_out(site)
            went += taken_out(site)
            stats = site.stats()
            came = stats["mp.tun.rx.packets"] + stats["mp.udp.rx.packets"]
            assert came == went + stats["mp.upcalls"] + sum(site.drops().values()), (name, stats)


def taken_out(site: Site) -> int:
    """Empty all rings; gives how many packets were in those of sealed and of opened ones."""
    sealed_ones = sum(len(cut) for worker in range(2) for _, cut in site.sealed(worker))
    opened = sum(len(packets_of(take(site, site.offloads, worker))) for worker in range(2))
    for worker in range(2):
        site.upcalls(worker)
    return sealed_ones + opened


def one_of_each() -> Iterator[Plan]:
    for version in (4, 6):
        yield Plan(version, TCP, bytes(range(256)) * 150, 1248, options=TIMESTAMPS)
        yield Plan(version, UDP, bytes(range(256)) * 60, 1000)


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize(("sealer", "opener"), [(PYTHON, RUST), (RUST, PYTHON), (RUST, RUST)])
def test_what_one_kernel_seals_and_sends_the_other_opens_and_writes(
    make_site: MakeSite, sealer: str, opener: str, cipher: Cipher
) -> None:
    offloads = replace(ALL, udp_gro=False)
    near, far = (Site(offloads=offloads, kernel=named(name)) for name in (sealer, opener))
    with closing(near), closing(far):
        connect(near, far.address(), cipher=cipher)
        connect(far, near.address(), cipher=cipher, mirrored=True)
        far.update(sources=None)
        out, into = near.reader().sealer, far.reader().opener
        given, arrived = [], []
        for plan in one_of_each():
            near.allow(plan.one(0))
            far.allow(plan.one(0), inbound=True)
            near.inside.send(plan.virtio() + plan.packet())
            given += plan.packets()
            out.poll(100)
            near.send()
            into.poll(100)
            far.write()
            for frame in far.received():
                arrived += segment(VirtioHeader.parse(frame[:10], frame[10:]), frame[10:])

        assert arrived == given
        assert near.drops() == far.drops() == {}
        near.check_ledger()
        far.check_ledger()


@pytest.mark.parametrize(("first", "second"), [(PYTHON, RUST), (RUST, PYTHON)])
def test_each_kernel_goes_on_with_the_memory_that_the_other_one_left(first: str, second: str) -> None:
    """As a producer, a consumer, and in windows, counters and tables: every word means the same to both."""
    plan = Plan(4, TCP, bytes(range(256)) * 140, 1248, options=TIMESTAMPS)
    with closing(site_of(ALL, plan)) as site:
        site.allow(plan.one(0))
        datagrams = sealed(plan.packets())
        drain_by = {first: second, second: first}
        counters: list[int] = []
        for number, name in enumerate((first, second) * 4):
            site.kernel = named(name)
            reader = site.reader()
            site.inside.send(plan.virtio() + plan.packet())
            assert reader.sealer.poll(100) == plan.count
            for first_of in range(0, 3 * number + 3, 3):
                assert feed(reader, Batch(datagrams[first_of : first_of + 3])) == 3
            # The other one's drain empties what this one's reader has published.
            site.kernel = named(drain_by[name])
            site.far.setsockopt(1, 33, 1 << 22)  # SO_RCVBUFFORCE
            assert site.send() == 1
            counters += [Header.parse(each).counter for each in drained([site.far])]
            assert site.write() == 1
            (frame,) = site.received()
            found = segment(VirtioHeader.parse(frame[:10], frame[10:]), frame[10:])
            assert found == plan.packets()[3 * number : 3 * number + 3]

        assert counters == list(range(3, 3 + len(counters)))
        assert site.drops() == {Drop.REPLAY: sum(range(0, 24, 3))}
        site.check_ledger()
