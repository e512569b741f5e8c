"""Superpackets from TUN to seal ring: cut, sealed in place, counted packet by packet, or sent up one by one."""

import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import Offloads
from nebula_mp.crypto.aead import Aead
from nebula_mp.datapath import runs
from nebula_mp.datapath.api import Drop, Sealer, UpcallLimits, UpcallReason
from nebula_mp.datapath.segment import segment
from nebula_mp.datapath.virtio import VirtioHeader
from nebula_mp.newtypes import Buffer, Cipher, Counter, Seconds
from nebula_mp.shm_counters import SPAN_MAX, Refusal, SendCounters
from nebula_mp.shm_flows import REFUSED
from nebula_mp.wire.header import COUNTER_LIMIT, Header, MessageType
from nebula_mp.wire.ip import parse_flow
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import INDEX_FAR, INDEX_NEAR, KEY_OUT, Site, connect, drained, packet, store_counter
from tests.datapath.superpackets import TIMESTAMPS, Plan, plans
from tests.support import native, tables
from tests.support.native import python_only
from tests.support.offload_tun import EVERYTHING, PATIENCE_S, OffloadTun, is_noise, offload_tun
from tests.support.packets import ACK, CWR, FIN, PSH, TCP, UDP, checksum
from tests.support.private_net import private_network
from tests.support.watched import KilledError

pytestmark = pytest.mark.usefixtures("kernel")

SUPER = Offloads()
FIRST_COUNTER = 3
NO_HEADER = bytes(10)
ROW = INDEX_NEAR & 0xFFFF
UDP_SEGMENT = 103  # of setsockopt


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    """One worker whose device gives superpackets, and a tunnel to the socket `site.far`."""
    made = make_site(offloads=SUPER)
    connect(made)
    return made


def whole(size: int, *, version: int = 4, protocol: int = TCP, length: int = 65_535, **how: Any) -> Plan:
    """A superpacket of `length` bytes, headers included."""
    plan = Plan(version, protocol, b"", size, **how)
    return replace(plan, payload=(bytes(range(251)) * 262)[: length - plan.header_bytes])


def give(site: Site, *each: Plan | bytes) -> None:
    """Let the local stack send superpackets, and packets that are complete."""
    for one in each:
        site.inside.send(one.virtio() + one.packet() if isinstance(one, Plan) else NO_HEADER + one)


def allow(site: Site, *each: Plan | bytes) -> None:
    site.allow(*[one.packet() if isinstance(one, Plan) else one for one in each])


def meaning(*each: Plan | bytes) -> list[bytes]:
    """The packets that were given, one by one."""
    return [one for given in each for one in (given.packets() if isinstance(given, Plan) else [given])]


def wire(site: Site, worker: int = 0) -> list[bytes]:
    """The datagrams that wait in the seal ring, which is empty then."""
    return [each for _, datagrams in site.sealed(worker) for each in datagrams]


def opened(datagrams: list[bytes], first: int = FIRST_COUNTER, cipher: Cipher = Cipher.AES) -> list[bytes]:
    """What the peer gets; counters are consecutive from `first` on."""
    aead, found = Aead(cipher, KEY_OUT), []
    for counter, each in enumerate(datagrams, first):
        assert Header.parse(each) == Header(MessageType.MESSAGE, 0, INDEX_FAR, Counter(counter))
        found.append(aead.open(counter, each[:16], each[16:]))
    return found


def taken(site: Site) -> int:
    return site.stats()["mp.tun.rx.packets"]


@pytest.mark.parametrize("size", [36, 88, 536, 1248, 8948])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"version": 4, "protocol": TCP, "options": TIMESTAMPS}, id="tcp4"),
        pytest.param({"version": 6, "protocol": TCP, "length": 65_575}, id="tcp6"),
        pytest.param({"version": 4, "protocol": UDP}, id="udp4"),
        pytest.param({"version": 6, "protocol": UDP, "length": 65_575}, id="udp6"),
    ],
)
def test_the_largest_superpackets_arrive_packet_by_packet_in_as_many_areas_as_they_need(
    site: Site, size: int, kind: dict[str, Any]
) -> None:
    plan = whole(size, **kind)
    allow(site, plan)
    give(site, plan)

    assert site.reader().sealer.poll(1) == plan.count

    found = site.sealed()
    if not native.is_native():  # which lets several runs share an entry
        assert all(len(datagrams) <= runs.PACKETS_MAX for _, datagrams in found)
    assert opened([each for _, datagrams in found for each in datagrams]) == plan.packets()
    assert taken(site) == plan.count
    assert site.stats()["mp.tun.rx.bytes"] == sum(map(len, plan.packets()))
    assert site.drops() == {}


def test_a_superpacket_that_fits_an_area_is_one_entry_and_shares_the_area_with_others(site: Site) -> None:
    first, second, small = whole(1248, length=20_000), whole(1248, length=9_000), packet(1)
    allow(site, first, second, small)
    give(site, first, small, second)

    site.reader().sealer.poll(100)

    assert site.seal_ring().pending() == 1
    found = site.sealed()
    assert [(entry.segment, len(datagrams)) for entry, datagrams in found] == [
        (1248 + 40 + 32, first.count),
        (len(small) + 32, 1),
        (1248 + 40 + 32, second.count),
    ]
    assert opened([each for _, datagrams in found for each in datagrams]) == meaning(first, small, second)


@pytest.mark.parametrize("cipher", Cipher)
def test_ids_flags_and_sequence_numbers_are_right_where_a_superpacket_is_divided(
    make_site: MakeSite, cipher: Cipher
) -> None:
    site = make_site(area_bytes=4096, offloads=SUPER)
    connect(site, cipher=cipher)
    flags = ACK | PSH | FIN | CWR
    plan = whole(300, length=2501, flags=flags, sequence=2**32 - 700, identification=2**16 - 3)
    allow(site, plan)
    give(site, plan)

    site.reader().sealer.poll(100)

    assert site.seal_ring().pending() == 2
    assert opened(wire(site), cipher=cipher) == plan.packets()


items = st.lists(
    plans() | st.builds(packet, st.integers(0, 99), st.integers(4, 1300)), min_size=1, max_size=6
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items, st.sampled_from(Cipher), st.sampled_from([4096, 9216, 72 * 1024]), st.integers(1, 3))
def test_whatever_goes_in_the_peer_opens_exactly_the_packets_it_means_in_order(
    given_items: list[Plan | bytes], cipher: Cipher, area_bytes: int, polls: int
) -> None:
    with closing(
        Site(area_bytes=area_bytes, areas=512 if area_bytes < 10_000 else 32, offloads=SUPER)
    ) as site:
        connect(site, cipher=cipher)
        allow(site, *given_items)
        sealer = site.reader().sealer
        datagrams: list[bytes] = []
        for start in range(0, len(given_items), polls):
            give(site, *given_items[start : start + polls])
            while sealer.poll(40):
                pass
            datagrams += wire(site)

        expected = meaning(*given_items)
        assert opened(datagrams, cipher=cipher) == expected
        assert expected == [
            each
            for one in given_items
            for each in (
                segment(VirtioHeader.parse(one.virtio(), one.packet()), one.packet())
                if isinstance(one, Plan)
                else [one]
            )
        ]
        assert taken(site) == len(expected)
        assert site.drops() == {}


def test_a_poll_exceeds_its_budget_by_one_superpacket_at_most(site: Site) -> None:
    plan, small = whole(1000, length=10_040), packet(1)
    allow(site, plan, small)
    give(site, small, plan, plan, small)
    sealer = site.reader().sealer

    assert [sealer.poll(1), sealer.poll(5), sealer.poll(12), sealer.poll(12)] == [1, 10, 11, 0]


def test_a_full_ring_drops_the_rest_of_a_superpacket_without_taking_counters(make_site: MakeSite) -> None:
    site = make_site(areas=2, offloads=SUPER)
    connect(site)
    plan, small = whole(36), packet(1)
    allow(site, plan, small)
    give(site, plan, small)
    sealer = site.reader().sealer

    sealer.poll(10_000)
    sent = wire(site)

    assert opened(sent) == plan.packets()[: len(sent)]
    assert 500 < len(sent) < plan.count
    assert site.drops() == {Drop.SEAL_RING_FULL: plan.count - len(sent) + 1}
    assert taken(site) == plan.count + 1
    give(site, small)
    sealer.poll(1)
    assert opened(wire(site), FIRST_COUNTER + len(sent)) == [small]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(9), id="shorter than the header"),
        pytest.param(b"\x04" + bytes(9) + packet(1), id="unknown flag"),
        pytest.param(struct.pack("=BBHHHH", 1, 1, 40, 0, 20, 16) + packet(1), id="segments of 0 bytes"),
        pytest.param(struct.pack("=BBHHHH", 1, 4, 40, 9, 20, 16) + packet(1), id="version 6 before 4"),
        pytest.param(struct.pack("=BBHHHH", 1, 0, 0, 0, 60, 16) + packet(1), id="checksum behind the end"),
    ],
)
def test_a_header_that_is_none_or_contradicts_its_packet_is_counted(site: Site, bad: bytes) -> None:
    site.allow(packet(1))
    site.inside.send(bad)
    give(site, packet(2))

    site.reader().sealer.poll(10)

    assert opened(wire(site)) == [packet(2)]
    assert site.drops() == {Drop.TUN_OFFLOAD: 1}
    assert taken(site) == 2


def test_what_is_no_ip_packet_behind_its_header_is_counted_as_such(site: Site) -> None:
    give(site, b"", b"\x45" + bytes(10), b"\xf5" + bytes(60))

    site.reader().sealer.poll(10)

    assert site.drops() == {Drop.TUN_INNER_IP: 3}
    site.check_ledger()


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_checksum_that_was_left_to_us_is_completed(
    site: Site, version: int, protocol: int, *, is_allowed: bool
) -> None:
    plan = whole(1400, version=version, protocol=protocol, length=901)
    assert plan.count == 1
    if is_allowed:
        allow(site, plan)
    header = struct.pack("=BBHHHH", 1, 0, 0, 0, plan.transport, 6 if protocol == UDP else 16)
    site.inside.send(header + plan.packet())

    site.reader().sealer.poll(10)

    found = opened(wire(site)) if is_allowed else [each.packet for each in site.upcalls()]
    assert found == plan.packets()


def no_peer(site: Site) -> None:
    site.peers.set(site.peer, None)


def gone(site: Site) -> None:
    site.tunnels.close(INDEX_NEAR)


@pytest.mark.parametrize(
    ("reason", "change"),
    [(UpcallReason.NEW_FLOW_OUT, None), (UpcallReason.NO_TUNNEL, no_peer), (UpcallReason.NO_TUNNEL, gone)],
)
@pytest.mark.parametrize("size", [300, 1248])
def test_a_superpacket_goes_up_packet_by_packet(
    site: Site, size: int, reason: UpcallReason, change: Callable[[Site], None] | None
) -> None:
    plan = whole(size, length=40_000)
    if change is not None:
        allow(site, plan)
        change(site)
    give(site, plan)

    assert site.reader().sealer.poll(1) == plan.count

    assert [(each.reason, each.packet) for each in site.upcalls()] == [
        (reason, each) for each in plan.packets()
    ]
    site.check_ledger()


def test_upcalls_of_a_superpacket_are_limited_packet_by_packet(make_site: MakeSite) -> None:
    site = make_site(limits=UpcallLimits(plain=(10, 4)), offloads=SUPER)
    plan = whole(1000, length=10_040)
    give(site, plan)

    site.reader().sealer.poll(100)

    assert [each.packet for each in site.upcalls()] == plan.packets()[:4]
    assert site.drops() == {Drop.UPCALL_LIMITED: 6}
    site.check_ledger()


def test_each_packet_of_a_refused_superpacket_is_counted(site: Site) -> None:
    plan = whole(1000, length=10_040)
    site.flows.refuse(parse_flow(plan.packet(), inbound=False), REFUSED, 1_000_000, inbound=False)
    give(site, plan)

    site.reader().sealer.poll(100)

    assert site.drops() == {Drop.REFUSED_OUT: 10}
    site.check_ledger()


def test_each_packet_of_a_superpacket_whose_packets_fit_no_area_is_counted(make_site: MakeSite) -> None:
    site = make_site(area_bytes=4096, offloads=SUPER)
    connect(site)
    plan, fits = whole(1950, length=10_000), whole(1900, length=1_940)
    allow(site, plan)
    give(site, plan, fits)

    site.reader().sealer.poll(100)

    assert site.drops() == {Drop.OVERSIZE: plan.count}
    assert opened(wire(site)) == fits.packets()
    assert taken(site) == plan.count + 1


def test_superpackets_of_two_tunnels_have_entries_of_their_own(site: Site) -> None:
    first, second = whole(1000, length=5_040), whole(1000, length=5_040, ports=(1, 2))
    allow(site, first)
    other = site.peers.add()
    assert other is not None
    later = tables.fields(9, remote_index=0x0707_0001)
    site.tunnels.open(later, bytes(32), bytes(32))
    site.peers.set(other, later.local_index)
    site.flows.allow(parse_flow(second.packet(), inbound=False), other, 60_000, 1_000_000)
    give(site, first, second, first)

    site.reader().sealer.poll(100)

    found = site.sealed()
    assert [entry.row for entry, _ in found] == [3, 9, 3]
    assert opened(found[0][1] + found[2][1]) == meaning(first, first)
    assert [
        Aead(Cipher.AES, bytes(32)).open(counter, each[:16], each[16:])
        for counter, each in enumerate(found[1][1], FIRST_COUNTER)
    ] == second.packets()


@python_only
def test_a_tunnel_that_ends_before_the_counters_are_taken_gives_way_to_its_successor(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = whole(1000, length=5_040)
    allow(site, plan)
    give(site, plan)
    later = tables.fields(9, remote_index=INDEX_FAR)
    site.tunnels.open(later, KEY_OUT, bytes(32))
    reserve = SendCounters.reserve

    def late(
        counters: SendCounters, row: int, generation: int, count: int, area: int, *, regardless: bool
    ) -> Counter | Refusal:
        if row == ROW:
            site.peers.set(site.peer, later.local_index)
            site.tunnels.close(INDEX_NEAR)
        return reserve(counters, row, generation, count, area, regardless=regardless)

    monkeypatch.setattr(SendCounters, "reserve", late)
    site.reader().sealer.poll(10)

    ((entry, datagrams),) = site.sealed()
    assert entry.row == 9
    assert opened(datagrams) == plan.packets()
    assert site.upcalls() == []


def test_a_superpacket_needs_counters_for_all_its_packets(site: Site) -> None:
    plan = whole(1000, length=10_040)
    allow(site, plan)
    store_counter(site, ROW, COUNTER_LIMIT - 12)
    give(site, plan, plan)

    site.reader().sealer.poll(100)

    assert opened(wire(site), COUNTER_LIMIT - 11) == plan.packets()
    assert site.drops() == {Drop.EXHAUSTED: 10}


def test_a_superpacket_that_is_held_back_keeps_its_bytes_and_what_comes_behind_it_waits(
    make_site: MakeSite,
) -> None:
    site = make_site(workers=2, offloads=SUPER)
    connect(site)
    small = packet(1)
    divided, last = whole(88, length=50_000, ports=(1, 2)), whole(1000, length=5_040)
    allow(site, small, divided, last)
    slow, fast = site.reader(0).sealer, site.reader(1).sealer
    give(site, small)
    slow.poll(10)
    give(site, divided)
    counter = FIRST_COUNTER
    store_counter(site, ROW, counter + SPAN_MAX - runs.PACKETS_MAX)

    assert fast.poll(10) == divided.count
    assert holds(fast)
    give(site, last)
    assert fast.poll(10) == 0  # nothing is read meanwhile
    site.now = Seconds(1000.002)
    assert fast.poll(10) == 0  # the second run goes; the third waits a millisecond of its own
    assert holds(fast)
    site.send(0)
    assert fast.poll(10) == last.count

    assert not holds(fast)
    first = counter + SPAN_MAX - runs.PACKETS_MAX + 1
    assert opened(wire(site, 1), first) == meaning(divided, last)
    assert site.stats()["mp.counter.span"] == 1


def holds(sealer: Sealer) -> bool:
    return sealer.is_holding


@python_only
def test_packets_of_a_superpacket_whose_counters_stay_locked_are_counted_after_50_milliseconds(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = whole(1000, length=10_040)
    allow(site, plan)
    give(site, plan)
    sealer = site.reader().sealer
    monkeypatch.setattr("nebula_mp.shm_counters.SendCounters.reserve", lambda *_, **__: Refusal.BUSY)

    sealer.poll(10)
    assert holds(sealer)
    site.now = Seconds(1000.051)
    sealer.poll(10)

    assert not holds(sealer)
    assert site.drops() == {Drop.EXHAUSTED: 10}
    site.check_ledger()


class Sealed:
    """Notes what was sealed in place with which counter, and kills the sealer at packet number `fatal`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_counter: dict[int, set[bytes]] = {}
        self.packets = 0
        self.fatal = -1

        def watched(
            aead: Aead, first: int, headers: list[Buffer], plaintexts: list[Buffer], outs: list[memoryview]
        ) -> None:
            for counter, (header, plaintext, out) in enumerate(
                zip(headers, plaintexts, outs, strict=True), first
            ):
                self.packets += 1
                if self.packets == self.fatal:
                    raise KilledError
                self.by_counter.setdefault(counter, set()).add(bytes(plaintext))
                aead.seal_into(counter, header, plaintext, out)

        monkeypatch.setattr(Aead, "seal_each", watched)


@python_only
def test_no_counter_is_used_twice_wherever_in_a_superpacket_a_sealer_dies(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = Sealed(monkeypatch)
    site = make_site(area_bytes=4096, offloads=SUPER)
    connect(site)
    plan = whole(600, length=3_040)  # 5 packets in 3 areas
    allow(site, plan)
    reader = site.reader()
    deaths, datagrams = 0, []
    for number in range(30):
        give(site, Plan(4, TCP, bytes([number]) * 3000, 600))
        sealed.fatal = sealed.packets + number % 6  # any of the five, or none
        try:
            reader.sealer.poll(10)
        except KilledError:
            deaths += 1
            reader = site.reader()
        datagrams += wire(site)

    assert deaths == 25
    assert all(len(contents) == 1 for contents in sealed.by_counter.values())
    counters = [Header.parse(each).counter for each in datagrams]
    assert counters == sorted(set(counters))
    assert len(counters) == 5 * 5 + 5 * (0 + 0 + 2 + 2 + 4)  # whole ones, and areas that were published


@python_only
def test_who_dies_before_anything_is_written_leaves_a_gap_of_exactly_the_counters_of_its_superpacket(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = whole(1000, length=10_040)
    allow(site, plan)
    give(site, plan, plan)

    def dies(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("nebula_mp.datapath.segment.Cut.place", dies)
        with pytest.raises(KilledError):
            site.reader().sealer.poll(100)
    site.reader().sealer.poll(100)

    assert opened(wire(site), FIRST_COUNTER + 10) == plan.packets()


@python_only
def test_places_are_kept_within_a_bound_and_those_made_again_are_right(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PLACES_MAX", 100)
    kinds = [whole(size, length=30_000) for size in (500, 700, 900, 1100)]
    allow(site, kinds[0])
    sealer = site.python_reader().sealer
    datagrams, expected = [], []
    for number in range(40):
        plan = kinds[number * 7 % 4]
        give(site, plan)
        sealer.poll(1)
        datagrams += wire(site)
        expected += plan.packets()
        kept = [len(grid.headers) for grid in sealer._places._grids.values()]
        assert 0 < sum(kept) <= 100

    assert opened(datagrams) == expected


@python_only
def test_views_of_places_are_made_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = whole(1248)
    allow(site, plan)
    sealer = site.reader().sealer
    made: list[int] = []
    extend = runs._Grid.extend

    def watched(grid: runs._Grid, count: int) -> None:
        made.append(count)
        extend(grid, count)

    monkeypatch.setattr(runs._Grid, "extend", watched)

    for _ in range(3 * 8):  # areas
        give(site, plan)
        sealer.poll(1)
        wire(site)

    assert made == [plan.count] * 8


def test_a_superpacket_on_its_way_through_both_rings_and_sockets_arrives(site: Site) -> None:
    plan = whole(1248, length=30_000)
    allow(site, plan)
    give(site, plan, packet(1))
    site.allow(packet(1))

    site.reader().sealer.poll(100)
    site.send()

    assert opened(drained([site.far])) == [*plan.packets(), packet(1)]
    site.check_ledger()


@pytest.mark.parametrize(("missing", "entries"), [(0, [4]), (1, [4]), (-1, [3, 1])])
def test_a_superpacket_fits_an_area_up_to_the_last_byte(
    make_site: MakeSite, missing: int, entries: list[int]
) -> None:
    site = make_site(area_bytes=4096, offloads=SUPER)  # 1984 bytes for data
    connect(site)
    plan = whole(500, length=1984 - 4 * 32 - 3 * 40 - missing)
    assert plan.count == 4
    allow(site, plan)
    give(site, plan)

    site.reader().sealer.poll(1)

    found = site.sealed()
    assert [len(datagrams) for _, datagrams in found] == entries
    assert opened([each for _, datagrams in found for each in datagrams]) == plan.packets()


@python_only
def test_packets_and_superpackets_of_one_flow_keep_their_order_and_share_a_reservation_only_with_their_kind(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = whole(1000, length=5_040)
    alone = [replace(plan, payload=plan.payload[:size], sequence=size) for size in (10, 10, 20, 20)]
    before, after = meaning(*alone[:2]), meaning(*alone[2:])
    allow(site, plan)
    reserved: list[int] = []
    reserve = SendCounters.reserve

    def watched(
        counters: SendCounters, row: int, generation: int, count: int, area: int, *, regardless: bool
    ) -> Counter | Refusal:
        reserved.append(count)
        return reserve(counters, row, generation, count, area, regardless=regardless)

    monkeypatch.setattr(SendCounters, "reserve", watched)
    give(site, *before, plan, *after, plan, plan)

    site.reader().sealer.poll(100)

    assert reserved == [2, plan.count, 2, plan.count, plan.count]
    assert opened(wire(site)) == meaning(*before, plan, *after, plan, plan)


@pytest.mark.e2e
def test_what_a_real_device_gives_is_sealed_whole_or_goes_up_packet_by_packet(make_site: MakeSite) -> None:
    site = make_site(offloads=SUPER)
    connect(site)
    data = bytes(range(251)) * 200
    with (
        private_network(),
        offload_tun("nmpseal0", ["10.50.1.2/24"], 1300, EVERYTHING) as tun,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
        site.tun_fd = tun.fileno()
        sealer = site.reader().sealer

        sender.sendto(data, ("10.50.1.9", 4000))
        poll_until(sealer, tun, lambda: site.stats()["mp.upcalls"] >= 42)
        up = [each.packet for each in site.upcalls() if not is_noise(each.packet)]
        site.allow(up[0])
        sender.sendto(data, ("10.50.1.9", 4000))
        poll_until(sealer, tun, lambda: sealer.waiting() > 0)

    ((entry, datagrams),) = site.sealed()
    assert entry.segment == 1228 + 32
    for found in (up, opened(datagrams)):
        assert b"".join(each[28:] for each in found) == data
        for each in found:
            pseudo = each[12:20] + b"\0\x11" + (len(each) - 20).to_bytes(2, "big")
            assert checksum(each[:20]) == checksum(pseudo + each[20:]) == 0
    assert site.drops() == {}


def poll_until(sealer: Sealer, tun: OffloadTun, done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end
        select.select([tun], [], [], 1.0)
        sealer.poll(100)
