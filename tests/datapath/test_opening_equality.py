"""Whole batches and single datagrams: the same packets, windows, counters, upcalls and drops."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.crypto.replay import WIDTH
from nebula_mp.datapath.api import UpcallReason
from nebula_mp.newtypes import TunnelIndex
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import MessageType
from nebula_mp.wire.ip import parse_flow
from tests.datapath.batches import ALL, SOURCE, Batch, feed, packets_of, site_of, take
from tests.datapath.sites import INDEX_NEAR, UNLIMITED, message
from tests.datapath.superpackets import A4, A6, TIMESTAMPS, Plan
from tests.support.packets import ACK, ECE, FIN, PSH, TCP, UDP, checksum

pytestmark = pytest.mark.usefixtures("kernel")

ADMITTED, REFUSED, UNKNOWN = (40000, 50000), (40001, 50000), (40002, 50000)
BASES = (
    Plan(4, TCP, b"", 1, options=TIMESTAMPS),
    Plan(4, TCP, b"", 1),
    Plan(6, TCP, b"", 1, options=TIMESTAMPS),
    Plan(4, UDP, b"", 1),
    Plan(6, UDP, b"", 1),
)
ELSEWHERE = ("10.77.0.9", 4243)
LOOPED = ("10.9.0.9", 4242)
CHANGES = ["forge", "copy", "swap", "message", "stranger", "ahead", "empty", "foreign"]


class Spec(NamedTuple):
    """One datagram before it is sealed."""

    packet: bytes
    counter: int
    kind: MessageType = MessageType.MESSAGE
    to: TunnelIndex = INDEX_NEAR
    forged_bit: int | None = None

    def encode(self) -> bytes:
        datagram = bytearray(message(self.counter, self.packet, kind=self.kind, index=self.to))
        if self.forged_bit is not None:
            bit = self.forged_bit % (8 * len(datagram))
            datagram[bit // 8] ^= 1 << bit % 8
        return bytes(datagram)


class Tables(NamedTuple):
    """What the opener finds in them."""

    state: TunnelState
    owner: int
    lists_sources: bool


@st.composite
def packets(draw: st.DrawFn) -> list[bytes]:
    """Packets of equal size, of a few flows one behind the other; the last may be shorter."""
    total = draw(st.sampled_from([73, 90, 91, 576, 1300]))
    found: list[bytes] = []
    for _ in range(draw(st.integers(1, 3))):
        base = draw(st.sampled_from(BASES))
        size = total - base.header_bytes
        count = draw(st.integers(1, 16))
        seed = draw(st.integers(0, 255))
        plan = replace(
            base,
            size=size,
            payload=bytes((seed + each) % 256 for each in range(size * count)),
            ports=draw(st.sampled_from([ADMITTED, ADMITTED, ADMITTED, REFUSED, UNKNOWN])),
            flags=draw(st.sampled_from([ACK, ACK, ACK | PSH, ACK | ECE, ACK | FIN])),
            flags_and_offset=draw(st.sampled_from([0, 0x4000])),
            sequence=draw(st.sampled_from([1000, 2**32 - 100])),
            identification=draw(st.sampled_from([7, 2**16 - 3])),
        )
        if draw(st.booleans()):
            plan = replace(plan, payload=plan.payload[: -draw(st.integers(1, size))] or b"\0")
        found += [each for each in plan.packets() if len(each) == total]
        last = plan.one(plan.count - 1)
    if draw(st.booleans()) and len(last) < total:
        found.append(last)
    if draw(st.integers(0, 4)) == 0:  # a damaged one, which is authentic all the same
        at = draw(st.integers(0, len(found) - 1)) if found else 0
        if found:
            damaged = bytearray(found[at])
            damaged[draw(st.integers(0, len(damaged) - 1))] ^= draw(st.integers(1, 255))
            found[at] = bytes(damaged)
    return found or [last]


def change(draw: st.DrawFn, specs: list[Spec]) -> None:
    """Let something unusual happen to a datagram, without changing its size."""
    last = len(specs) - 1
    at, other = draw(st.integers(0, last)), draw(st.integers(0, last))
    one = specs[at]
    match draw(st.sampled_from(CHANGES)):
        case "forge":
            specs[at] = one._replace(forged_bit=draw(st.integers(0, 150) | st.integers(0, 12_000)))
        case "copy" if len(specs[other].packet) == len(one.packet):
            specs[at] = specs[other]
        case "swap" if len(specs[other].packet) == len(one.packet):
            specs[at], specs[other] = specs[other], one
        case "message":
            specs[at] = one._replace(kind=MessageType.TEST)
        case "stranger":
            specs[at] = one._replace(to=TunnelIndex(0x1111_0003))
        case "ahead":
            ahead = draw(st.sampled_from([1, 3, WIDTH, 3 * WIDTH]))
            specs[at] = one._replace(counter=min(one.counter + ahead, 2**64 - 1))
        case "empty" if at == last:
            specs[at] = one._replace(packet=b"")
        case "foreign":
            specs[at] = one._replace(packet=one.packet[:15] + b"\x63" + one.packet[16:])
        case _:
            pass


@st.composite
def received(draw: st.DrawFn) -> list[Batch]:
    """A few batches, whose counters mostly go on."""
    found = []
    counter = draw(st.sampled_from([3, 3, 16_370, 16_384, 2**63, 2**64 - 20]))
    for _ in range(draw(st.integers(1, 3))):
        specs = [
            Spec(packet, min(number, 2**64 - 1)) for number, packet in enumerate(draw(packets()), counter)
        ]
        steps = [0, 0, 0, 1, -1, -len(specs), -5, WIDTH - 3, WIDTH + 3, 5 * WIDTH]
        counter = max(3, specs[-1].counter + 1 + draw(st.sampled_from(steps)))
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            change(draw, specs)
        source = draw(st.sampled_from([SOURCE, SOURCE, SOURCE, ELSEWHERE, LOOPED]))
        found.append(Batch([each.encode() for each in specs], source))
    return found


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    return Tables(
        draw(st.sampled_from([TunnelState.PROVEN] * 5 + [TunnelState.CANDIDATE])),
        draw(st.sampled_from([0] * 5 + [1])),
        draw(st.booleans()),
    )


class Outcome(NamedTuple):
    """Everything that an opener leaves behind."""

    packets: list[bytes]
    rows: set[int]
    upcalls: list[Any]
    moved: set[Any]
    stats: dict[str, int]
    windows: bytes
    traffic: bytes
    superpackets: int


def without_meaningless_ids(packet: bytes) -> bytes:
    """Ids of packets that may not be fragmented are not kept by a superpacket."""
    if len(packet) < 20 or packet[0] != 0x45 or not packet[6] & 0x40:
        return packet
    plain = bytearray(packet)
    plain[4:6] = plain[10:12] = bytes(2)
    # Whether the checksum was right is kept.
    return bytes(plain) + checksum(packet[:20]).to_bytes(2, "big")


def run(came: Iterable[Batch], found: Tables, offloads: Offloads, budget: int) -> Outcome:
    """Let two readers take what came to the first, and look at all they have written."""
    limits = replace(UNLIMITED, moved=(10**6, 10**6))
    with closing(site_of(offloads, workers=2, limits=limits, upcall_areas=64)) as site:
        sources = frozenset({A4.packed, A6.packed}) if found.lists_sources else None
        site.update(state=found.state, owner=found.owner, sources=sources)
        for base in BASES:
            plan = replace(base, payload=b"xx")
            site.allow(replace(plan, ports=ADMITTED).one(0), inbound=True)
            refused = parse_flow(replace(plan, ports=REFUSED).one(0), inbound=True)
            site.flows.refuse(refused, site.peer, int(site.now * 1000), inbound=True)
        readers = [site.reader(worker) for worker in range(2)]
        feed(readers[0], *came, budget=budget)
        feed(readers[1])
        written = [each for worker in range(2) for each in take(site, offloads, worker)]
        ups = [each for worker in range(2) for each in site.upcalls(worker)]
        memory = site.tables
        with (
            open(f"/proc/self/fd/{memory.windows.read_only}", "rb") as windows,  # noqa: PTH123 - descriptors
            open(f"/proc/self/fd/{memory.traffic[found.owner].read_only}", "rb") as traffic,  # noqa: PTH123
        ):
            return Outcome(
                [without_meaningless_ids(each) for each in packets_of(written)],
                {each.row for each in written},
                [each for each in ups if each.reason is not UpcallReason.MOVED],
                {each for each in ups if each.reason is UpcallReason.MOVED},
                dict(site.stats()),
                windows.read()[4096:],
                traffic.read()[4096:],
                sum(len(each.packets) > 1 for each in written),
            )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    received(),
    tables(),
    st.sampled_from(
        [ALL, ALL, replace(ALL, uso=False), replace(ALL, tso=False), replace(ALL, udp_gro=False)]
    ),
)
def test_a_batch_does_what_its_datagrams_would_do_one_by_one(
    came: list[Batch], found: Tables, offloads: Offloads
) -> None:
    expected = run(came, found, NO_OFFLOADS, 10_000)
    result = run(came, found, offloads, 10_000)

    assert result._replace(superpackets=0) == expected
    event(f"superpackets: {min(result.superpackets, 3)}")
