"""TUN to seal ring: what is sealed, what goes up, what is counted, and that no counter is used twice."""

import errno
import os
from collections.abc import Callable, Sequence

import pytest

from nebula_mp.crypto.aead import Aead
from nebula_mp.datapath.api import Drop, Sealer, UpcallLimits, UpcallReason
from nebula_mp.newtypes import Buffer, Cipher, Counter, Seconds, TunnelIndex
from nebula_mp.shm_counters import SPAN_MAX, Refusal, SendCounters
from nebula_mp.shm_flows import REFUSED
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import COUNTER_LIMIT, Header, MessageType
from nebula_mp.wire.ip import parse_flow
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import INDEX_FAR, INDEX_NEAR, KEY_OUT, Site, connect, drained, packet, store_counter
from tests.support import native, native_calls, tables
from tests.support.native import python_only
from tests.support.watched import KilledError

pytestmark = pytest.mark.usefixtures("kernel")


def give(site: Site, *packets: bytes) -> None:
    """Let the local stack send these."""
    for each in packets:
        site.inside.send(each)


@pytest.mark.parametrize("cipher", Cipher)
def test_datagrams_have_the_headers_counters_and_bytes_that_a_message_sealed_alone_has(
    make_site: MakeSite, cipher: Cipher
) -> None:
    site = make_site()
    connect(site, cipher=cipher)
    packets = [packet(number, 40 * number) for number in range(1, 6)]
    site.allow(*packets)
    give(site, *packets)

    assert site.reader().sealer.poll(100) == 5
    assert site.send() == 1

    expected = []
    for counter, each in enumerate(packets, 3):  # 1 and 2 were the handshake's
        header = Header(MessageType.MESSAGE, 0, INDEX_FAR, counter).encode()  # type: ignore[arg-type]
        expected.append(header + Aead(cipher, KEY_OUT).seal(counter, header, each))
    assert drained([site.far]) == expected
    assert site.upcalls() == []
    site.check_ledger()


def test_a_poll_reads_no_more_than_its_budget_and_leaves_the_rest_in_the_queue(site: Site) -> None:
    packets = [packet(number) for number in range(10)]
    site.allow(*packets)
    give(site, *packets)
    sealer = site.reader().sealer

    assert [sealer.poll(4), sealer.poll(4), sealer.poll(4), sealer.poll(4)] == [4, 4, 2, 0]
    assert sealer.waiting() == 3


def test_more_than_an_area_takes_goes_into_several_in_order(site: Site) -> None:
    packets = [packet(number, 1250 - number) for number in range(120)]
    site.allow(*packets)
    reader = site.reader()
    counters = []
    for first in range(0, 120, 10):  # what a socket pair holds
        give(site, *packets[first : first + 10])
        reader.sealer.poll(100)
        site.send()
        counters += [Header.parse(datagram).counter for datagram in drained([site.far])]

    assert counters == list(range(3, 123))
    site.check_ledger()


def test_a_run_longer_than_an_area_is_cut_where_the_area_ends(make_site: MakeSite) -> None:
    site = make_site(area_bytes=4096)  # 1984 bytes for data
    connect(site)
    packets = [packet(number, 700) for number in range(7)]  # 2 of 760 bytes for each area
    site.allow(*packets)
    give(site, *packets)

    assert site.reader().sealer.poll(100) == 7
    assert site.send() == 4

    assert [Header.parse(each).counter for each in drained([site.far])] == list(range(3, 10))


def test_a_run_of_more_packets_than_an_area_has_entries_is_cut(make_site: MakeSite) -> None:
    site = make_site(entries_max=4)
    connect(site)
    packets = [packet(number, 40 + number) for number in range(10)]  # an entry each
    site.allow(*packets)
    give(site, *packets)

    assert site.reader().sealer.poll(100) == 10
    assert site.send() == 3

    assert [Header.parse(each).counter for each in drained([site.far])] == list(range(3, 13))


@pytest.mark.parametrize(
    ("sizes", "entries"),
    [
        pytest.param([500, 500, 500], [[500, 500, 500]], id="equal"),
        pytest.param([500, 500, 499, 499], [[500, 500, 499], [499]], id="a shorter one ends an entry"),
        pytest.param([500, 501, 501, 40], [[500], [501, 501, 40]], id="a longer one begins the next"),
        pytest.param([40, 500], [[40], [500]], id="a lone one"),
    ],
)
def test_packets_of_equal_size_and_a_shorter_one_behind_them_become_one_entry(
    site: Site, sizes: list[int], entries: list[list[int]]
) -> None:
    packets = [packet(number, size) for number, size in enumerate(sizes)]
    site.allow(*packets)
    give(site, *packets)

    site.reader().sealer.poll(10)

    found = site.sealed()
    assert [[len(each) - 28 - 32 for each in datagrams] for _, datagrams in found] == entries
    assert [entry.segment for entry, _ in found] == [sizes[0] + 60 for sizes in entries]
    wire = [each for _, datagrams in found for each in datagrams]
    assert [Aead(Cipher.AES, KEY_OUT).open(3 + at, each[:16], each[16:]) for at, each in enumerate(wire)] == (
        packets
    )


def test_packets_of_two_peers_are_sealed_each_for_its_own(site: Site) -> None:
    first, second = packet(1), packet(2, port=6000)
    site.allow(first)
    other = site.peers.add()
    assert other is not None
    later = tables.fields(9, remote_index=0x0707_0001)
    site.tunnels.open(later, bytes(32), bytes(32))
    site.peers.set(other, later.local_index)
    site.flows.allow(parse_flow(second, inbound=False), other, 60_000, 1_000_000)
    give(site, first, first, second, first, second)

    site.reader().sealer.poll(10)

    assert site.seal_ring().pending() == 1
    found = [(entry.row, each) for entry, datagrams in site.sealed() for each in datagrams]
    assert [(row, Header.parse(data).remote_index, Header.parse(data).counter) for row, data in found] == [
        (3, INDEX_FAR, 3),
        (3, INDEX_FAR, 4),
        (9, 0x0707_0001, 3),
        (3, INDEX_FAR, 5),
        (9, 0x0707_0001, 4),
    ]
    keys = {3: KEY_OUT, 9: bytes(32)}
    opened = [
        Aead(Cipher.AES, keys[row]).open(Header.parse(data).counter, data[:16], data[16:])
        for row, data in found
    ]
    assert opened == [first, first, second, first, second]


@python_only
def test_a_tunnel_that_ends_between_look_up_and_counters_gives_way_to_its_successor(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = packet(1)
    site.allow(each)
    give(site, each)
    later = tables.fields(9, remote_index=0x0707_0001)
    site.tunnels.open(later, bytes(32), bytes(32))
    reserve = SendCounters.reserve

    def late(
        counters: SendCounters, row: int, generation: int, count: int, area: int, *, regardless: bool
    ) -> Counter | Refusal:
        if row == INDEX_NEAR & 0xFFFF:
            site.peers.set(site.peer, later.local_index)
            site.tunnels.close(INDEX_NEAR)
        return reserve(counters, row, generation, count, area, regardless=regardless)

    monkeypatch.setattr(SendCounters, "reserve", late)
    site.reader().sealer.poll(10)

    ring = site.seal_ring()
    assert ring.pending() == 1
    ((entry, data),) = list(ring.entries())
    assert entry.row == 9
    assert Aead(Cipher.AES, bytes(32)).open(3, data[:16], data[16:]) == each
    assert site.upcalls() == []


def test_what_a_dead_sealer_did_not_publish_holds_nobody_back(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site)
    packets = [packet(number) for number in range(3)]
    site.allow(*packets)
    assert reserve(site) == 3  # and no more: it was killed before it sealed
    store_counter(site, INDEX_NEAR & 0xFFFF, 3 + SPAN_MAX)
    site.reader(0)  # its successor
    fast = site.reader(1).sealer
    give(site, packets[0])

    fast.poll(10)

    assert not holds(fast)
    assert fast.waiting() == 1
    assert site.stats()["mp.counter.span"] == 0


def reserve(site: Site) -> object:
    """Take a counter as reader 0 does."""
    row = INDEX_NEAR & 0xFFFF
    if not native.is_native():
        return site.python_reader(0).sealer._counters.reserve(row, site.generation, 1, 0)
    from nebula_mp import _accel  # noqa: PLC0415 - not everywhere

    memory = site.memory(0)
    counters = _accel.SendCounters(memory.send, memory.spans, memory.seal_states, worker=0)
    return counters.reserve(row, site.generation, 1, 0)


def test_what_a_dead_sealer_published_holds_others_back_until_it_is_sent(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site)
    packets = [packet(number) for number in range(2)]
    site.allow(*packets)
    give(site, packets[0])
    site.reader(0).sealer.poll(10)
    site.reader(0)  # its successor
    store_counter(site, INDEX_NEAR & 0xFFFF, 3 + SPAN_MAX)
    fast = site.reader(1).sealer
    give(site, packets[1])

    fast.poll(10)
    assert holds(fast)
    site.send(0)
    fast.poll(10)

    assert not holds(fast)


def test_memory_for_what_was_read_is_used_again(site: Site) -> None:
    packets = [packet(number, 1200) for number in range(300)]
    site.allow(*packets)
    sealer = site.reader().sealer
    for each in packets:
        give(site, each)
        assert sealer.poll(1) == 1
        site.send()
        assert len(drained([site.far])) == 1


def test_a_packet_too_large_for_an_upcall_is_counted(site: Site) -> None:
    give(site, packet(1, 16_000), packet(2, 15_000))

    site.reader().sealer.poll(10)

    assert site.drops() == {Drop.OVERSIZE: 1}
    assert [len(each.packet) for each in site.upcalls()] == [15_028]
    site.check_ledger()


def test_control_is_woken_when_the_last_area_of_its_ring_was_filled_in_the_middle_of_a_pass(
    make_site: MakeSite,
) -> None:
    site = make_site(upcall_areas=1)
    large = [packet(number, 9_000) for number in range(2)]
    give(site, *large)

    site.reader().sealer.poll(10)

    assert site.control_bell.wait(0)
    assert site.drops() == {Drop.UPCALL_RING_FULL: 1}


def test_a_quiet_time_saves_up_no_more_than_the_burst(make_site: MakeSite) -> None:
    site = make_site(limits=UpcallLimits(plain=(10, 4)))
    sealer = site.reader().sealer
    give(site, packet(1))
    sealer.poll(10)
    site.now = Seconds(2000.0)
    give(site, *[packet(number) for number in range(6)])
    sealer.poll(10)

    assert site.drops() == {Drop.UPCALL_LIMITED: 2}


def test_a_packet_no_table_knows_goes_up_as_it_came(site: Site) -> None:
    unknown = packet(1)
    give(site, unknown)

    site.reader().sealer.poll(10)

    (upcall,) = site.upcalls()
    assert upcall == (UpcallReason.NEW_FLOW_OUT, 1_000_000, 0, None, 0, 0, unknown)
    assert site.control_bell.wait(0)
    site.check_ledger()


def _no_peer(site: Site) -> None:
    site.peers.set(site.peer, None)


def _gone(site: Site) -> None:
    site.tunnels.close(INDEX_NEAR)


def _candidate(site: Site) -> None:
    site.update(state=TunnelState.CANDIDATE)


def _no_underlay(site: Site) -> None:
    site.update(underlay=None)


@pytest.mark.parametrize("change", [_no_peer, _gone, _candidate, _no_underlay])
def test_packets_of_a_known_flow_whose_peer_cannot_be_sent_to_go_up_in_order(
    site: Site, change: Callable[[Site], None]
) -> None:
    packets = [packet(number) for number in range(3)]
    site.allow(*packets)
    change(site)
    give(site, *packets)

    site.reader().sealer.poll(10)

    assert [(each.reason, each.packet) for each in site.upcalls()] == [
        (UpcallReason.NO_TUNNEL, each) for each in packets
    ]
    site.check_ledger()


def test_a_new_tunnel_of_the_peer_takes_over_with_one_store(site: Site) -> None:
    packets = [packet(number) for number in range(4)]
    site.allow(*packets)
    sealer = site.reader().sealer
    give(site, *packets[:2])
    sealer.poll(10)
    later = tables.fields(9, remote_index=0x0707_0001)
    site.tunnels.open(later, bytes(32), bytes(32))
    site.peers.set(site.peer, later.local_index)

    site.update()  # the old one stays; its row changes, its keys do not
    give(site, *packets[2:])
    sealer.poll(10)

    headers = [Header.parse(each) for _, datagrams in site.sealed() for each in datagrams]
    assert [(each.remote_index, each.counter) for each in headers] == [
        (INDEX_FAR, 3),
        (INDEX_FAR, 4),
        (0x0707_0001, 3),
        (0x0707_0001, 4),
    ]


def test_keys_of_a_tunnel_that_ended_are_forgotten_by_a_sweep(site: Site) -> None:
    each = packet(1)
    site.allow(each)
    give(site, each)
    reader = site.reader()
    reader.sealer.poll(10)

    assert reader.sweep() == 0
    site.tunnels.close(INDEX_NEAR)
    assert reader.sweep() == 1


def test_a_refused_flow_is_dropped_without_a_counter_until_the_refusal_ends(site: Site) -> None:
    each = packet(1)
    site.flows.refuse(parse_flow(each, inbound=False), REFUSED, 1_000_000, inbound=False)
    sealer = site.reader().sealer
    give(site, each, each)
    sealer.poll(10)
    site.now = Seconds(1001.5)
    give(site, each)
    sealer.poll(10)

    assert site.drops() == {Drop.REFUSED_OUT: 2}
    assert [upcall.reason for upcall in site.upcalls()] == [UpcallReason.NEW_FLOW_OUT]
    assert sealer.waiting() == 0
    site.check_ledger()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(b"", Drop.TUN_INNER_IP, id="empty"),
        pytest.param(b"\x45" + bytes(10), Drop.TUN_INNER_IP, id="header cut short"),
        pytest.param(b"\xf5" + bytes(60), Drop.TUN_INNER_IP, id="version 15"),
    ],
)
def test_what_is_no_ip_packet_is_counted(site: Site, bad: bytes, reason: Drop) -> None:
    give(site, bad)

    assert site.reader().sealer.poll(10) == 1

    assert site.drops() == {reason: 1}
    site.check_ledger()


def test_a_packet_larger_than_an_area_is_counted_and_the_next_one_goes(make_site: MakeSite) -> None:
    site = make_site(area_bytes=4096)
    connect(site)
    large, small = packet(1, 1950), packet(2, 100)
    site.allow(large)
    give(site, large, small)

    site.reader().sealer.poll(10)
    site.send()

    assert site.drops() == {Drop.OVERSIZE: 1}
    assert len(drained([site.far])) == 1
    site.check_ledger()


def test_a_full_ring_drops_the_newest_without_taking_counters(make_site: MakeSite) -> None:
    site = make_site(areas=2)
    connect(site)
    packets = [packet(number) for number in range(4)]
    site.allow(*packets)
    sealer = site.reader().sealer
    for each in packets[:3]:
        give(site, each)
        sealer.poll(10)
    site.send()
    give(site, packets[3])
    sealer.poll(10)
    site.send()

    assert site.drops() == {Drop.SEAL_RING_FULL: 1}
    assert [Header.parse(each).counter for each in drained([site.far])] == [3, 4, 5]
    site.check_ledger()


def test_upcalls_beyond_the_limit_and_beyond_the_ring_are_counted(make_site: MakeSite) -> None:
    limits = UpcallLimits(plain=(10, 4))
    site = make_site(limits=limits, upcall_areas=2)
    sealer = site.reader().sealer

    give(site, *[packet(number) for number in range(6)])
    sealer.poll(10)  # one area
    assert site.drops() == {Drop.UPCALL_LIMITED: 2}
    site.now = Seconds(1000.25)  # 2 tokens more
    give(site, packet(7))
    sealer.poll(10)
    give(site, packet(8))
    sealer.poll(10)

    assert site.drops() == {Drop.UPCALL_LIMITED: 2, Drop.UPCALL_RING_FULL: 1}
    assert len(site.upcalls()) == 5
    site.check_ledger()


def test_nothing_is_sealed_at_the_end_of_the_counter(site: Site) -> None:
    packets = [packet(number) for number in range(3)]
    site.allow(*packets)
    store_counter(site, INDEX_NEAR & 0xFFFF, COUNTER_LIMIT - 3)
    give(site, *packets)

    sealer = site.reader().sealer
    assert sealer.poll(2) == 2
    assert sealer.poll(2) == 1

    assert site.send() == 1
    assert site.drops() == {Drop.EXHAUSTED: 1}
    counters = [Header.parse(each).counter for each in drained([site.far])]
    assert counters == [COUNTER_LIMIT - 2, COUNTER_LIMIT - 1]
    site.check_ledger()


def test_a_worker_does_not_overtake_another_one_by_more_than_the_span_for_a_millisecond(
    make_site: MakeSite,
) -> None:
    site = make_site(workers=2)
    connect(site)
    packets = [packet(number) for number in range(3)]
    site.allow(*packets)
    slow, fast = site.reader(0).sealer, site.reader(1).sealer
    give(site, packets[0])
    slow.poll(10)  # published, not sent
    store_counter(site, INDEX_NEAR & 0xFFFF, 3 + SPAN_MAX)  # as if others had sealed meanwhile

    give(site, packets[1], packets[2])
    assert fast.poll(10) == 2
    assert holds(fast)
    assert fast.waiting() == 0
    assert fast.poll(10) == 0
    site.now = Seconds(1000.0015)
    assert fast.poll(10) == 0

    assert not holds(fast)
    assert site.stats()["mp.counter.span"] == 1
    assert site.send(0) == site.send(1) == 1
    assert [Header.parse(each).counter for each in drained([site.far])] == [3, 516, 517]
    site.check_ledger()


def test_a_run_held_for_the_span_goes_as_soon_as_the_other_worker_has_sent(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site)
    packets = [packet(number) for number in range(4)]
    site.allow(*packets)
    slow, fast = site.reader(0).sealer, site.reader(1).sealer
    give(site, packets[0])
    slow.poll(10)
    store_counter(site, INDEX_NEAR & 0xFFFF, 3 + SPAN_MAX)
    give(site, packets[1])
    fast.poll(10)
    give(site, packets[2])  # must wait in the queue behind the one that is held

    site.send(0)
    assert fast.poll(10) == 1

    assert not holds(fast)
    assert site.stats()["mp.counter.span"] == 0
    site.send(1)
    assert [Header.parse(each).counter for each in drained([site.far])] == [3, 516, 517]
    site.check_ledger()


@python_only
def test_packets_whose_counter_stays_locked_are_counted_after_50_milliseconds(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    packets = [packet(number) for number in range(2)]
    site.allow(*packets)
    give(site, *packets)
    sealer = site.reader().sealer
    monkeypatch.setattr("nebula_mp.shm_counters.SendCounters.reserve", lambda *_, **__: Refusal.BUSY)

    for now in (1000.0, 1000.0015, 1000.049):
        site.now = Seconds(now)
        sealer.poll(10)
        assert holds(sealer)
    assert site.drops() == {}
    site.now = Seconds(1000.051)
    sealer.poll(10)

    assert not holds(sealer)
    assert site.drops() == {Drop.EXHAUSTED: 2}
    site.check_ledger()


def holds(sealer: Sealer) -> bool:
    return sealer.is_holding


class Sealed:
    """Notes what was sealed with which counter, and kills the sealer at call number `fatal`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_counter: dict[int, set[bytes]] = {}
        self.calls = 0
        self.fatal = -1
        self.dies_after = False
        seal_into = Aead.seal_into

        def watched(
            aead: Aead, counter: int, associated_data: Buffer, plaintext: Buffer, out: memoryview
        ) -> None:
            self.calls += 1
            if self.calls == self.fatal and not self.dies_after:
                raise KilledError
            seal_into(aead, counter, associated_data, plaintext, out)
            self.by_counter.setdefault(counter, set()).add(bytes(plaintext))
            if self.calls == self.fatal:
                raise KilledError

        monkeypatch.setattr(Aead, "seal_into", watched)


@python_only
@pytest.mark.parametrize("dies_after", [False, True], ids=["before the seal", "after the seal"])
def test_no_counter_is_used_twice_wherever_a_sealer_dies(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, *, dies_after: bool
) -> None:
    sealed = Sealed(monkeypatch)
    sealed.dies_after = dies_after
    site = make_site()
    connect(site)
    site.allow(packet(0))
    reader = site.reader()
    deaths = 0
    for number in range(60):
        give(site, packet(number), packet(number + 1000))
        sealed.fatal = sealed.calls + number % 3  # the first, the second, or none of the two
        try:
            reader.sealer.poll(10)
        except KilledError:
            deaths += 1
            reader = site.reader()
        site.send()

    assert deaths == 40
    assert all(len(contents) == 1 for contents in sealed.by_counter.values())
    on_the_wire = [Header.parse(each).counter for each in drained([site.far])]
    assert on_the_wire == sorted(set(on_the_wire))
    assert len(on_the_wire) == 40


def test_a_reader_attached_to_a_tunnel_that_was_replaced_seals_only_with_the_new_key(site: Site) -> None:
    each = packet(1)
    site.allow(each)
    sealer = site.reader().sealer
    give(site, each)
    sealer.poll(10)
    site.tunnels.close(INDEX_NEAR)
    new = tables.fields(3, high=0x1234, remote_index=0x0000_0099)
    site.tunnels.open(new, bytes(32), bytes(32))
    site.peers.set(site.peer, TunnelIndex(new.local_index))
    give(site, each)
    sealer.poll(10)

    datagrams = [each for _, found in site.sealed() for each in found]
    assert Aead(Cipher.AES, KEY_OUT).open(3, datagrams[0][:16], datagrams[0][16:]) == each
    assert Aead(Cipher.AES, bytes(32)).open(3, datagrams[1][:16], datagrams[1][16:]) == each


@pytest.mark.parametrize("number", [errno.EBADFD, errno.EFAULT, errno.EIO])
def test_a_lost_device_raises_after_what_was_read_is_published(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    each = packet(1)
    site.allow(each)
    give(site, each, each)
    sealer = site.reader().sealer
    real = os.readv
    calls = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(number, "injected")

    def failing(descriptor: int, buffers: Sequence[memoryview]) -> int:
        fail(descriptor)
        return real(descriptor, buffers)

    if native.is_native():
        native_calls.hook(monkeypatch, read=fail, readv=fail)
    else:
        monkeypatch.setattr(os, "readv", failing)
    with pytest.raises(OSError) as lost:
        sealer.poll(10)
    assert lost.value.errno == number

    assert site.send() == 1
    assert len(drained([site.far])) == 1
    site.check_ledger()
