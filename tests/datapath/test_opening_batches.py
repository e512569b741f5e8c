"""Batches of datagrams: opened together, joined, and one by one where something is unusual."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.datapath.api import DATAGRAM_BYTES_MAX, Drop, UpcallReason
from nebula_mp.datapath.virtio import HEADER_BYTES, VirtioHeader
from nebula_mp.newtypes import Cipher, TunnelIndex
from nebula_mp.shm_ring import POISON
from nebula_mp.wire.header import MessageType
from tests.datapath.batches import ALL, GRO, SOL_UDP, SOURCE, Batch, feed, packets_of, sealed, site_of, take
from tests.datapath.sites import INDEX_NEAR, KEY_IN, KEY_OUT, UNLIMITED, Site, message
from tests.datapath.superpackets import TIMESTAMPS, Plan
from tests.support import native
from tests.support.native import python_only
from tests.support.packets import ACK, ECE, PSH, TCP, UDP, checksum

pytestmark = pytest.mark.usefixtures("kernel")

SEGMENT = 103
FLOW = Plan(4, TCP, bytes(range(256)) * 200, 1248, options=TIMESTAMPS)  # 41 packets, the last shorter
FULL = replace(FLOW, payload=FLOW.payload[: 10 * 1248])
PACKETS = FULL.packets()


@pytest.fixture
def site() -> Iterator[Site]:
    with closing(site_of(ALL, FLOW)) as made:
        yield made


def check_conservation(site: Site, delivered: int) -> None:
    """Everything that came in was delivered, went up, or was counted under one reason."""
    stats = site.stats()
    assert stats["mp.udp.rx.packets"] == delivered + stats["mp.upcalls"] + sum(site.drops().values())


def changed(datagram: bytes, at: int = -1) -> bytes:
    forged = bytearray(datagram)
    forged[at] ^= 1
    return bytes(forged)


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(FLOW, id="TCP over IPv4"),
        pytest.param(replace(FLOW, flags=ACK | ECE | PSH), id="with ECE and PSH"),
        pytest.param(replace(FLOW, version=6), id="TCP over IPv6"),
        pytest.param(replace(FLOW, options=b"", size=36, payload=FLOW.payload[:2000]), id="MSS 36"),
        pytest.param(replace(FLOW, size=1, payload=b"0123456789"), id="MSS 1"),
        pytest.param(replace(FLOW, options=TIMESTAMPS * 3 + bytes(4), size=88), id="MSS 88, 60 of header"),
        pytest.param(replace(FLOW, size=1249), id="odd size"),
        pytest.param(replace(FLOW, payload=FLOW.payload[: 49 * 1248]), id="all full"),
        pytest.param(replace(FLOW, flags_and_offset=0, identification=65_530), id="ids go around"),
        pytest.param(replace(FLOW, sequence=2**32 - 5000), id="sequence goes around"),
        pytest.param(Plan(4, UDP, FLOW.payload, 1272), id="UDP over IPv4"),
        pytest.param(Plan(6, UDP, FLOW.payload, 1252), id="UDP over IPv6"),
    ],
)
def test_a_batch_of_one_flow_becomes_the_superpacket_that_it_was(plan: Plan, cipher: Cipher) -> None:
    plan = replace(plan, payload=plan.payload[: 100 * plan.size])
    with closing(site_of(ALL, plan)) as site:
        site.update(cipher=cipher)
        count = feed(site.reader(), Batch(sealed(plan.packets(), cipher=cipher)))
        ring = site.open_ring()
        ring.pending()
        ((entry, data),) = ring.entries()

        assert count == plan.count == entry.segment
        assert entry.row == INDEX_NEAR & 0xFFFF
        assert bytes(data) == plan.virtio(plan.header_bytes) + plan.packet()
        check_conservation(site, plan.count)


def test_the_kernels_own_batches_are_taken(site: Site) -> None:
    site.udp[0].setsockopt(SOL_UDP, GRO, 1)
    datagrams = sealed(FLOW.packets())
    whole = b"".join(datagrams)
    control = [(SOL_UDP, SEGMENT, len(datagrams[0]).to_bytes(2, "little"))]
    site.far.sendmsg([whole], control, 0, site.udp[0].getsockname())
    site.far.sendto(message(100, FLOW.one(0)), site.udp[0].getsockname())

    assert site.reader().opener.poll(1000) == FLOW.count + 1

    written = take(site, ALL)
    assert [len(each.packets) for each in written] == [FLOW.count, 1]
    assert packets_of(written) == [*FLOW.packets(), FLOW.one(0)]
    stats = site.stats()
    assert stats["mp.udp.rx.packets"] == FLOW.count + 1
    assert stats["mp.udp.rx.bytes"] == len(whole) + len(datagrams[0])


def test_a_budget_counts_datagrams_and_is_exceeded_by_no_more_than_a_batch(site: Site) -> None:
    batches = [Batch(sealed(PACKETS, 3 + 10 * number)) for number in range(5)]

    assert feed(site.reader(), *batches, budget=11) == 20


@pytest.mark.parametrize("forged", [0, 1, 4, 8, 9])
@pytest.mark.parametrize("where", [pytest.param(-1, id="tag"), pytest.param(40, id="ciphertext")])
def test_one_forged_datagram_is_counted_and_all_others_are_delivered(
    site: Site, forged: int, where: int
) -> None:
    datagrams = sealed(PACKETS)
    good = datagrams[forged]
    datagrams[forged] = changed(good, where)
    reader = site.reader()
    feed(reader, Batch(datagrams))

    assert packets_of(take(site, ALL)) == PACKETS[:forged] + PACKETS[forged + 1 :]
    assert site.drops() == {Drop.AUTH: 1}

    # Exactly the others are marked: all of them are refused, and the good one is taken.
    feed(reader, Batch(sealed(PACKETS)))

    assert packets_of(take(site, ALL)) == [PACKETS[forged]]
    assert site.drops() == {Drop.AUTH: 1, Drop.REPLAY: 9}
    check_conservation(site, 10)


def test_a_batch_of_nothing_but_forged_datagrams_moves_nothing(site: Site) -> None:
    reader = site.reader()
    feed(reader, Batch([changed(each) for each in sealed(PACKETS)]))
    assert site.drops() == {Drop.AUTH: 10}

    feed(reader, Batch(sealed(PACKETS)))

    assert packets_of(take(site, ALL)) == PACKETS
    check_conservation(site, 10)


def test_nothing_forged_in_a_batch_can_be_read_from_the_ring(site: Site) -> None:
    secret = b"only the forged one has this payload"
    packets = replace(FULL, payload=bytes(9 * 1248) + secret.ljust(1248)).packets()
    datagrams = sealed(packets)
    datagrams[-1] = changed(datagrams[-1])

    feed(site.reader(), Batch(datagrams))

    with open(f"/proc/self/fd/{site.opened[0].data.read_only}", "rb") as ring:  # noqa: PTH123 - a descriptor
        assert secret not in ring.read()
    assert packets_of(take(site, ALL)) == packets[:-1]


def test_a_copy_inside_a_batch_is_a_replay(site: Site) -> None:
    datagrams = sealed(PACKETS)
    feed(site.reader(), Batch([*datagrams[:5], datagrams[3], *datagrams[5:]]))

    written = take(site, ALL)
    # The native kernel goes packet by packet, so what is left out does not end the superpacket.
    assert [len(each.packets) for each in written] == ([10] if native.is_native() else [5, 5])
    assert packets_of(written) == PACKETS
    assert site.drops() == {Drop.REPLAY: 1}
    check_conservation(site, 10)


def test_a_batch_that_was_overtaken_is_still_opened_together(site: Site) -> None:
    first, second = Batch(sealed(PACKETS, 3)), Batch(sealed(PACKETS, 13))
    reader = site.reader()
    feed(reader, second, first, second, first)

    assert [len(each.packets) for each in take(site, ALL)] == [10, 10]
    assert site.drops() == {Drop.REPLAY: 20}
    check_conservation(site, 20)


def test_a_batch_in_which_one_counter_was_seen_gives_the_others(site: Site) -> None:
    reader = site.reader()
    feed(reader, Batch([message(7, FLOW.one(30))]))
    feed(reader, Batch(sealed(PACKETS)))

    assert packets_of(take(site, ALL)) == [FLOW.one(30), *PACKETS[:4], *PACKETS[5:]]
    assert site.drops() == {Drop.REPLAY: 1}


def test_a_batch_that_did_not_fit_is_counted_datagram_by_datagram(site: Site) -> None:
    feed(site.reader(), Batch(sealed(PACKETS), cut=True))

    assert site.drops() == {Drop.OVERSIZE: 10}
    assert take(site, ALL) == []
    check_conservation(site, 0)


def test_datagrams_that_are_too_large_are_counted_and_a_smaller_last_one_is_delivered(site: Site) -> None:
    large = bytes(DATAGRAM_BYTES_MAX + 1)
    feed(site.reader(), Batch([large, large, message(3, PACKETS[0])]))

    assert site.drops() == {Drop.OVERSIZE: 2}
    assert packets_of(take(site, ALL)) == [PACKETS[0]]
    check_conservation(site, 1)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        pytest.param(bytes((0x11, 0)), Drop.SHORT, id="2 bytes"),
        pytest.param(sealed(PACKETS)[9][:15], Drop.SHORT, id="15 bytes"),
        pytest.param(sealed(PACKETS)[9][:16], Drop.TRUNCATED, id="a header alone"),
        pytest.param(sealed(PACKETS)[9][:31], Drop.TRUNCATED, id="tag cut short"),
        pytest.param(sealed(PACKETS)[9][:32], Drop.AUTH, id="a wrong tag of nothing"),
        pytest.param(sealed([b""], 12)[0], Drop.INNER_IP, id="empty"),
        pytest.param(sealed([PACKETS[9][:30]], 12)[0], None, id="a part of a header"),
        pytest.param(sealed([PACKETS[9][:52]], 12)[0], None, id="a header"),
    ],
)
def test_a_last_datagram_of_any_length_has_its_own_fate(site: Site, last: bytes, reason: Drop | None) -> None:
    feed(site.reader(), Batch([*sealed(PACKETS)[:9], last]))

    found = packets_of(take(site, ALL))
    assert found[:9] == PACKETS[:9]
    assert site.drops() == ({} if reason is None else {reason: 1})
    check_conservation(site, 9 if reason else 10)


def test_several_flows_in_a_batch_are_joined_each_and_keep_their_order() -> None:
    flows = [replace(FULL, ports=(1000 + number, 80)) for number in range(3)]
    runs = [flows[0].packets(), flows[1].packets()[:4], flows[2].packets()[:1], flows[1].packets()[4:]]
    everything = [packet for run in runs for packet in run]
    with closing(site_of(ALL, *flows)) as site:
        feed(site.reader(), Batch(sealed(everything)))

        written = take(site, ALL)
        assert [each.packets for each in written] == runs
        check_conservation(site, len(everything))


def test_packets_of_two_flows_in_turn_are_delivered_in_turn() -> None:
    other = replace(FULL, ports=(1000, 80))
    mixed = [packet for pair in zip(PACKETS, other.packets(), strict=True) for packet in pair]
    with closing(site_of(ALL, FULL, other)) as site:
        feed(site.reader(), Batch(sealed(mixed)))

        assert packets_of(take(site, ALL)) == mixed
        check_conservation(site, 20)


def test_a_flow_that_only_control_knows_goes_up_as_single_packets_in_order() -> None:
    other = replace(FULL, ports=(1000, 80))
    mixed = [*PACKETS, *other.packets(), *PACKETS]
    with closing(site_of(ALL, FULL)) as site:
        feed(site.reader(), Batch(sealed(mixed)))

        ups = [each for each in site.upcalls() if each.reason is not UpcallReason.MOVED]
        assert {each.reason for each in ups} == {UpcallReason.NEW_FLOW_IN}
        assert [each.packet for each in ups] == other.packets()
        assert packets_of(take(site, ALL)) == PACKETS * 2
        check_conservation(site, 20)


def test_a_refused_flow_and_a_foreign_source_are_counted_packet_by_packet(site: Site) -> None:
    site.update(sources=frozenset())
    feed(site.reader(), Batch(sealed(PACKETS)))

    assert site.drops() == {Drop.SOURCE_ADDR: 10}
    check_conservation(site, 0)


@python_only
def test_one_look_up_answers_for_a_superpacket(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = site.python_reader()
    asked = []
    inbound = reader.opener._delivery._flows.inbound

    def counted(*arguments: Any) -> bool | None:
        asked.append(arguments)
        return inbound(*arguments)

    monkeypatch.setattr(reader.opener._delivery._flows, "inbound", counted)

    feed(reader, Batch(sealed(FLOW.packets())))

    assert len(asked) == 1


def test_control_is_told_once_for_each_batch_that_comes_from_elsewhere() -> None:
    limits = replace(UNLIMITED, moved=(10**6, 10**6))
    with closing(site_of(ALL, FLOW, limits=limits)) as site:
        feed(site.reader(), Batch(sealed(PACKETS, 3)), Batch(sealed(PACKETS, 13)))

        ups = site.upcalls()
        assert [each.reason for each in ups] == [UpcallReason.MOVED] * 2
        assert {(str(each.source.ip), each.source.port) for each in ups if each.source} == {SOURCE}


@pytest.mark.parametrize(
    ("offloads", "plan", "expected"),
    [
        pytest.param(replace(ALL, tso=False), FULL, [1] * 10, id="TCP without TSO"),
        pytest.param(replace(ALL, uso=False), FULL, [10], id="TCP without USO"),
        pytest.param(replace(ALL, uso=False), Plan(4, UDP, bytes(5000), 500), [1] * 10, id="UDP without USO"),
        pytest.param(replace(ALL, tso=False), Plan(4, UDP, bytes(5000), 500), [10], id="UDP without TSO"),
        pytest.param(replace(ALL, tso=False, uso=False), FULL, [1] * 10, id="only UDP_GRO"),
        pytest.param(replace(ALL, udp_gro=False), FULL, [10], id="all but UDP_GRO"),
        pytest.param(NO_OFFLOADS, FULL, [1] * 10, id="none"),
    ],
)
def test_only_superpackets_that_the_device_takes_are_made(
    offloads: Offloads, plan: Plan, expected: list[int]
) -> None:
    with closing(site_of(offloads, plan)) as site:
        feed(site.reader(), Batch(sealed(plan.packets())))

        written = take(site, offloads)
        assert [len(each.packets) for each in written] == expected
        assert packets_of(written) == plan.packets()


def test_a_single_packet_has_an_empty_header_in_front_and_is_published_in_its_pass(site: Site) -> None:
    feed(site.reader(), Batch(sealed(PACKETS[:1])))

    ring = site.open_ring()
    assert ring.pending() == 1
    ((entry, data),) = ring.entries()
    assert bytes(data) == bytes(HEADER_BYTES) + PACKETS[0]
    assert entry.segment == 1


def test_datagrams_that_came_one_by_one_in_a_pass_are_joined(site: Site) -> None:
    singles = [Batch([each]) for each in sealed(FLOW.packets())]
    feed(site.reader(), *singles)

    written = take(site, ALL)
    assert [len(each.packets) for each in written] == [FLOW.count]
    assert packets_of(written) == FLOW.packets()
    check_conservation(site, FLOW.count)


def test_datagrams_from_different_addresses_are_not_joined(site: Site) -> None:
    elsewhere = ("10.77.0.9", 4243)
    sources = [SOURCE, SOURCE, elsewhere, elsewhere, SOURCE]
    feed(
        site.reader(),
        *[Batch([each], source) for each, source in zip(sealed(PACKETS[:5]), sources, strict=True)],
    )

    assert [len(each.packets) for each in take(site, ALL)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("kind", "subtype", "reason"),
    [
        (MessageType.TEST, 0, UpcallReason.MESSAGE),
        (MessageType.LIGHTHOUSE, 0, UpcallReason.MESSAGE),
        (MessageType.MESSAGE, 1, UpcallReason.DATAGRAM),
        (MessageType.HANDSHAKE, 0, UpcallReason.DATAGRAM),
    ],
)
def test_a_batch_of_anything_but_packets_goes_up_one_by_one(
    site: Site, kind: MessageType, subtype: int, reason: UpcallReason
) -> None:
    datagrams = sealed(PACKETS, kind=kind, subtype=subtype)
    feed(site.reader(), Batch(datagrams))

    ups = site.upcalls()
    assert {each.reason for each in ups} == {reason}
    assert [each.packet for each in ups] == (PACKETS if reason is UpcallReason.MESSAGE else datagrams)
    assert take(site, ALL) == []


def test_what_goes_up_keeps_its_order_whatever_it_is() -> None:
    with closing(site_of(ALL, upcall_areas=64)) as site:  # which knows no flow
        packets = [*PACKETS[:2], b"ask", *PACKETS[2:4]]
        datagrams = sealed(packets)
        datagrams[2] = message(5, b"ask", kind=MessageType.TEST)
        feed(site.reader(), *[Batch([each]) for each in [*datagrams, b"!", message(9, PACKETS[4])]])

        ups = [each.packet for each in site.upcalls() if each.reason is not UpcallReason.MOVED]
        assert ups == [*packets, b"!", PACKETS[4]]


def test_the_counter_ends_where_it_ends() -> None:
    with closing(site_of(ALL, FULL)) as site:
        top = [message(2**64 - 2 + number, each) for number, each in enumerate(PACKETS[:2])]
        feed(site.reader(), Batch([*top, message(0, PACKETS[2]), message(1, PACKETS[3])]))

        assert packets_of(take(site, ALL)) == PACKETS[:2]
        assert sum(site.drops().values()) == 2
        check_conservation(site, 2)


def test_a_last_packet_without_payload_stays_a_packet(site: Site) -> None:
    empty = replace(FLOW, payload=b"", sequence=1000 + 9 * 1248, identification=16).one(0)
    feed(site.reader(), Batch(sealed([*PACKETS[:9], empty])))

    assert [each.packets for each in take(site, ALL)] == [PACKETS[:9], [empty]]


def test_each_psh_ends_a_superpacket(site: Site) -> None:
    plan = replace(FULL, flags=ACK | PSH)
    packets = [plan._packet(plan.payload[:1248], ACK | PSH, number) for number in range(5)]
    feed(site.reader(), Batch(sealed(packets)))

    assert [each.packets for each in take(site, ALL)] == [[each] for each in packets]


def with_length(packet: bytes, at: int, change: int) -> bytes:
    """Another length field, and a right checksum of the IPv4 header."""
    made = bytearray(packet)
    made[at : at + 2] = (int.from_bytes(made[at : at + 2], "big") + change).to_bytes(2, "big")
    if made[0] == 0x45:
        made[10:12] = bytes(2)
        made[10:12] = checksum(bytes(made[:20])).to_bytes(2, "big")
    return bytes(made)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    ("plan", "at"),
    [
        pytest.param(FULL, 2, id="IPv4"),
        pytest.param(replace(FULL, version=6), 4, id="IPv6"),
        pytest.param(Plan(4, UDP, FULL.payload, 1248), 2, id="UDP over IPv4"),
    ],
)
def test_packets_that_are_all_wrong_about_their_length_are_left_so(plan: Plan, at: int, change: int) -> None:
    packets = [with_length(each, at, change) for each in plan.packets()]
    with closing(site_of(ALL, plan)) as site:
        feed(site.reader(), Batch(sealed(packets)))

        assert [each.packets for each in take(site, ALL)] == [[each] for each in packets]


def test_udp_packets_of_which_one_has_no_checksum_are_not_joined() -> None:
    plan = Plan(4, UDP, bytes(3000), 1000)
    packets = plan.packets()
    # A payload for which the field would be 0xFFFF, so that 0 adds up as well.
    rest = int.from_bytes(packets[1][26:28], "big")
    packets[1] = packets[1][:26] + bytes(2) + rest.to_bytes(2, "big") + packets[1][30:]
    with closing(site_of(ALL, plan)) as site:
        feed(site.reader(), Batch(sealed(packets)))

        assert [each.packets for each in take(site, ALL)] == [[each] for each in packets]


def test_other_messages_between_packets_go_up_and_lose_nothing(site: Site) -> None:
    datagrams = [
        message(3, PACKETS[0]),
        message(4, PACKETS[1]),
        message(5, PACKETS[2], index=TunnelIndex(0x1111_0003)),
        message(6, PACKETS[3]),
    ]
    feed(site.reader(), Batch(datagrams))

    assert packets_of(take(site, ALL)) == [PACKETS[0], PACKETS[1], PACKETS[3]]
    unknown = [each for each in site.upcalls() if each.reason is UpcallReason.UNKNOWN_INDEX]
    assert [each.packet for each in unknown] == [datagrams[2]]


@pytest.mark.parametrize("grouped", [True, False])
def test_what_finds_the_ring_full_is_counted_and_may_come_again(*, grouped: bool) -> None:
    with closing(site_of(ALL, FLOW, areas=1, area_bytes=16 * 1024, entries_max=16)) as site:
        reader = site.reader()
        datagrams = sealed(FULL.packets()[:10]) + sealed(FULL.packets()[:10], 13)
        batches = (
            [Batch(datagrams[:10]), Batch(datagrams[10:])]
            if grouped
            else [Batch([each]) for each in datagrams]
        )
        feed(reader, *batches)
        written = take(site, ALL)
        delivered = len(packets_of(written))
        assert 10 <= delivered < 20
        assert site.drops() == {Drop.OPEN_RING_FULL: 20 - delivered}

        # The window has not moved for these, and only for these.
        while (left := 20 - delivered) > 0:
            feed(reader, *batches)
            delivered += len(again := packets_of(take(site, ALL)))
            assert again
            assert 20 - delivered < left

        feed(reader, *batches)
        assert take(site, ALL) == []
        check_conservation(site, 20)


@pytest.mark.parametrize("size", [36, 536, 1248])
def test_a_batch_larger_than_an_area_is_opened_in_parts(size: int) -> None:
    plan = replace(FLOW, size=size, payload=FLOW.payload[: size * 40])
    with closing(site_of(ALL, plan, areas=64, area_bytes=4096, entries_max=8)) as site:
        feed(site.reader(), Batch(sealed(plan.packets())))

        written = take(site, ALL)
        assert packets_of(written) == plan.packets()
        assert any(len(each.packets) > 1 for each in written)
        check_conservation(site, plan.count)


def test_packets_of_two_tunnels_of_one_address_are_not_joined(site: Site) -> None:
    other = TunnelIndex(0xBEEF_0004)
    site.tunnels.open(replace(site.fields, local_index=other), KEY_OUT, KEY_IN)
    indexes = [INDEX_NEAR, INDEX_NEAR, other, other, INDEX_NEAR]
    datagrams = [
        message(3 + number, packet, index=index)
        for number, (packet, index) in enumerate(zip(PACKETS[:5], indexes, strict=True))
    ]
    reader = site.reader()
    feed(reader, *[Batch([each]) for each in datagrams])
    feed(reader, Batch([message(counter, PACKETS[counter - 20], index=other) for counter in (20, 21)]))

    written = take(site, ALL)
    assert [(len(each.packets), each.row) for each in written] == [(2, 3), (2, 4), (1, 3), (2, 4)]
    assert packets_of(written) == [*PACKETS[:5], *PACKETS[:2]]


def test_small_packets_behind_a_large_one_take_no_more_room_than_they_have() -> None:
    small = replace(FLOW, size=1, payload=b"x", ports=(1000, 80))
    with closing(site_of(ALL, FLOW, small)) as site:
        packets = [PACKETS[0], *[small.one(0)] * 100]
        feed(site.reader(), *[Batch([each]) for each in sealed(packets)])

        assert site.open_ring().pending() == 1
        assert packets_of(take(site, ALL)) == packets


def test_a_packet_that_fits_no_area_is_counted(site: Site) -> None:
    with closing(site_of(ALL, FLOW, areas=4, area_bytes=1408, entries_max=4)) as small:
        feed(small.reader(), Batch(sealed(PACKETS)))

        assert small.drops() == {Drop.OVERSIZE: 10}
        check_conservation(small, 0)


def test_released_areas_hold_nothing_and_are_filled_again(site: Site) -> None:
    """The site poisons what came back: nothing of it is ever part of what is written."""
    reader = site.reader()
    for number in range(40):
        count = 1 + number % 7
        feed(reader, Batch(sealed(PACKETS[:count], 3 + 10 * number)))
        written = packets_of(take(site, ALL))
        assert written == PACKETS[:count]
        assert all(bytes([POISON]) * 20 not in each for each in written)


@python_only
def test_a_reader_that_dies_after_the_window_moved_loses_the_batch_but_delivers_nothing_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    reader = site.reader()
    with monkeypatch.context() as dying:
        dying.setattr("nebula_mp.datapath.delivery.joinable", killed)
        with pytest.raises(KeyboardInterrupt):
            feed(reader, Batch(sealed(PACKETS)))

    feed(site.reader(), Batch(sealed([*PACKETS, *PACKETS])))

    assert packets_of(take(site, ALL)) == PACKETS
    assert site.drops() == {Drop.REPLAY: 10}


def test_a_successor_goes_on_in_the_middle_of_a_flow(site: Site) -> None:
    feed(site.reader(), Batch(sealed(FLOW.packets()[:20])))
    feed(site.reader(), Batch(sealed(FLOW.packets()[10:], 13)))

    assert packets_of(take(site, ALL)) == FLOW.packets()
    assert site.drops() == {Drop.REPLAY: 10}


def test_the_header_of_a_superpacket_fits_its_packet(site: Site) -> None:
    feed(site.reader(), Batch(sealed(FLOW.packets())))
    ring = site.open_ring()
    ring.pending()
    ((_, data),) = ring.entries()

    header = VirtioHeader.parse(bytes(data[:HEADER_BYTES]), bytes(data[HEADER_BYTES:]))

    assert header.segment_bytes == 1248
    assert header.needs_checksum


def test_datagrams_of_a_batch_reach_the_owner_of_their_tunnel() -> None:
    with closing(site_of(ALL, FULL, workers=2)) as site:
        site.update(owner=1)
        wrong, owner = site.reader(0), site.reader(1)
        feed(wrong, Batch(sealed(PACKETS)))
        feed(owner)

        assert take(site, ALL, 0) == []
        written = take(site, ALL, 1)
        assert packets_of(written) == PACKETS
        assert site.stats()["mp.strangers"] == 10
