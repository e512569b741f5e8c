"""UDP to open ring: each datagram is delivered, handed over, or counted under one reason."""

import errno
import os
import socket
from typing import Any

import pytest

from nebula_mp.crypto.replay import WIDTH
from nebula_mp.datapath.api import DATAGRAM_BYTES_MAX, Drop, Opener, UpcallLimits, UpcallReason
from nebula_mp.datapath.opening import PythonOpener
from nebula_mp.newtypes import Cipher, TunnelIndex
from nebula_mp.shm_table import ROWS_AT
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import Header, MessageType
from nebula_mp.wire.ip import parse_flow
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import (
    FAR,
    INDEX_NEAR,
    NEAR,
    Site,
    address_of,
    connect,
    deliver,
    loopback,
    message,
    packet,
)
from tests.support import native_calls
from tests.support.native import python_only
from tests.support.packets import UDP, ip, udp

pytestmark = pytest.mark.usefixtures("kernel")

BACK = packet(1, back=True)


def admit(site: Site, *packets: bytes) -> None:
    site.allow(*packets, inbound=True)


@pytest.mark.parametrize("cipher", Cipher)
def test_packets_of_an_allowed_flow_are_delivered_byte_for_byte_in_order(
    make_site: MakeSite, cipher: Cipher
) -> None:
    site = make_site()
    connect(site, cipher=cipher)
    packets = [packet(number, 10 + 100 * number, back=True) for number in range(10)]
    admit(site, *packets)
    deliver(site, *[message(3 + number, each, cipher=cipher) for number, each in enumerate(packets)])

    assert site.reader().opener.poll(100) == 10
    assert site.write() == 1

    assert site.received() == packets
    assert site.upcalls() == []
    site.check_ledger()


def test_a_poll_takes_no_more_than_its_budget(site: Site) -> None:
    admit(site, BACK)
    deliver(site, *[message(3 + number, BACK) for number in range(10)])
    opener = site.reader().opener

    assert [opener.poll(4), opener.poll(4), opener.poll(4), opener.poll(4)] == [4, 4, 2, 0]
    assert opener.waiting() == 3


def header(kind: int = 0x11, subtype: int = 0, index: int = INDEX_NEAR, counter: int = 3) -> bytes:
    return bytes((kind, subtype, 0, 0)) + index.to_bytes(4, "big") + counter.to_bytes(8, "big")


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        pytest.param(bytes(DATAGRAM_BYTES_MAX + 1), Drop.OVERSIZE, id="oversize"),
        pytest.param(bytes(60_000), Drop.OVERSIZE, id="far too large"),
        pytest.param(bytes(2), Drop.SHORT, id="2 bytes"),
        pytest.param(header()[:15], Drop.SHORT, id="15 bytes"),
        pytest.param(header(0x21), Drop.VERSION, id="version 2"),
        pytest.param(header(0x17), Drop.TYPE, id="type 7"),
        pytest.param(header(0x11, 2), Drop.TYPE, id="subtype 2 of a message"),
        pytest.param(header(), Drop.TRUNCATED, id="a header alone"),
        pytest.param(header() + bytes(15), Drop.TRUNCATED, id="tag cut short"),
        pytest.param(header() + bytes(16), Drop.AUTH, id="a tag that does not fit"),
        pytest.param(header(counter=2) + bytes(16), Drop.REPLAY, id="the counter of stage 2"),
        pytest.param(header(counter=0) + bytes(16), Drop.REPLAY, id="counter 0"),
        pytest.param(message(3, b""), Drop.INNER_IP, id="an empty message"),
        pytest.param(message(3, BACK[:19]), Drop.INNER_IP, id="inner header cut short"),
    ],
)
def test_each_bad_datagram_has_its_reason_and_the_next_good_one_is_delivered(
    site: Site, datagram: bytes, reason: Drop
) -> None:
    admit(site, BACK)
    deliver(site, datagram, message(4, BACK))

    assert site.reader().opener.poll(10) == 2
    site.write()

    assert site.drops() == {reason: 1}
    assert site.received() == [BACK]
    site.check_ledger()


def test_every_changed_bit_of_a_datagram_is_noticed_and_moves_nothing(site: Site) -> None:
    admit(site, BACK)
    good = message(3, BACK)
    opener = site.reader().opener
    for bit in range(8 * len(good)):
        forged = bytearray(good)
        forged[bit // 8] ^= 1 << bit % 8
        deliver(site, bytes(forged))
        assert opener.poll(10) == 1
    assert site.write() == 0
    site.upcalls()  # other indexes and types

    deliver(site, good)
    opener.poll(10)
    site.write()

    assert site.received() == [BACK]
    assert site.stats()[Drop.AUTH] > 8 * (len(good) - 16)
    site.check_ledger()


def test_nothing_forged_can_be_read_from_the_ring(site: Site) -> None:
    admit(site, BACK)
    forged = bytearray(message(3, BACK))
    forged[-1] ^= 1
    deliver(site, bytes(forged))

    site.reader().opener.poll(10)

    memory = site.opened[0]
    with open(f"/proc/self/fd/{memory.data.read_only}", "rb") as ring:  # noqa: PTH123 - a descriptor
        assert BACK[20:] not in ring.read()


def test_a_copy_from_any_port_at_any_time_is_a_replay(site: Site) -> None:
    admit(site, BACK)
    datagrams = [message(counter, BACK) for counter in (3, 4, 9, 5)]
    opener = site.reader().opener
    deliver(site, *datagrams)
    opener.poll(100)
    for _ in range(8):
        with loopback() as elsewhere:
            deliver(site, *datagrams, sender=elsewhere)
            opener.poll(100)
    site.write()

    assert len(site.received()) == 4
    assert site.drops() == {Drop.REPLAY: 32}
    site.check_ledger()


def test_what_lies_behind_the_window_is_old(site: Site) -> None:
    admit(site, BACK)
    deliver(site, *[message(counter, BACK) for counter in (WIDTH + 10, 10, 11)])

    site.reader().opener.poll(10)
    site.write()

    assert site.drops() == {Drop.OLD: 1}
    assert len(site.received()) == 2


def test_a_successor_remembers_every_counter(site: Site) -> None:
    admit(site, BACK)
    deliver(site, message(3, BACK))
    site.reader().opener.poll(10)
    deliver(site, message(3, BACK), message(4, BACK))

    site.reader().opener.poll(10)
    site.write()

    assert site.drops() == {Drop.REPLAY: 1}
    assert len(site.received()) == 2


@python_only
def test_a_reader_that_dies_between_window_and_ring_loses_the_packet_but_never_delivers_it_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit(site, BACK)
    deliver(site, message(3, BACK))
    reader = site.reader()
    with monkeypatch.context() as dying:
        dying.setattr("nebula_mp.datapath.delivery.parse_flow", _killed)
        with pytest.raises(KeyboardInterrupt):
            reader.opener.poll(10)
    deliver(site, message(3, BACK), message(4, BACK))

    site.reader().opener.poll(10)
    site.write()

    assert site.drops() == {Drop.REPLAY: 1}
    assert len(site.received()) == 1


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_unknown_index_goes_up_raw_and_beyond_the_limit_is_counted(make_site: MakeSite) -> None:
    site = make_site(limits=UpcallLimits(unknown=(1, 2)))
    connect(site)
    stranger = message(3, BACK, index=TunnelIndex(0x1111_0003))  # the row is ours, the tunnel is not
    deliver(site, stranger, stranger, stranger)

    site.reader().opener.poll(10)

    assert site.drops() == {Drop.UNKNOWN_INDEX: 1}
    ups = site.upcalls()
    assert [(each.reason, each.packet) for each in ups] == [(UpcallReason.UNKNOWN_INDEX, stranger)] * 2
    assert ups[0].source == address_of(site.far)
    assert ups[0].local_index == 0
    site.check_ledger()


@pytest.mark.parametrize(
    "datagram",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\1", id="punch"),
        pytest.param(header(0x10, 0, 0, 1) + bytes(100), id="handshake"),
        pytest.param(header(0x12), id="recv_error"),
        pytest.param(header(0x11, 1) + bytes(40), id="relay frame"),
    ],
)
def test_what_is_not_for_readers_goes_up_raw(site: Site, datagram: bytes) -> None:
    deliver(site, datagram)

    site.reader().opener.poll(10)

    (upcall,) = site.upcalls()
    assert (upcall.reason, upcall.packet) == (UpcallReason.DATAGRAM, datagram)
    assert upcall.source == address_of(site.far)
    site.check_ledger()


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        (MessageType.TEST, 0),
        (MessageType.TEST, 1),
        (MessageType.LIGHTHOUSE, 0),
        (MessageType.CONTROL, 0),
        (MessageType.CLOSE_TUNNEL, 0),
    ],
)
def test_other_messages_go_up_opened_even_when_the_open_ring_is_full(
    make_site: MakeSite, kind: MessageType, subtype: int
) -> None:
    site = make_site(areas=1)
    connect(site)
    admit(site, BACK)
    opener = site.reader().opener
    deliver(site, message(3, BACK))
    opener.poll(10)
    deliver(site, message(4, BACK), message(5, b"ask", kind=kind, subtype=subtype))

    opener.poll(10)

    (upcall,) = site.upcalls()
    assert upcall == (
        UpcallReason.MESSAGE,
        1_000_000,
        INDEX_NEAR,
        address_of(site.far),
        kind,
        subtype,
        b"ask",
    )
    assert site.drops() == {Drop.OPEN_RING_FULL: 1}
    site.write()
    site.check_ledger()


def test_what_found_the_ring_full_may_come_again(make_site: MakeSite) -> None:
    site = make_site(areas=1)
    connect(site)
    admit(site, BACK)
    opener = site.reader().opener
    for counter in (3, 4):
        deliver(site, message(counter, BACK))
        opener.poll(10)
    site.write()
    deliver(site, message(4, BACK))
    opener.poll(10)
    site.write()

    assert site.drops() == {Drop.OPEN_RING_FULL: 1}
    assert len(site.received()) == 2


def test_the_first_message_on_a_candidate_goes_up_whatever_it_is(make_site: MakeSite) -> None:
    site = make_site()
    connect(site, state=TunnelState.CANDIDATE)
    admit(site, BACK)
    opener = site.reader().opener
    deliver(site, message(3, BACK))
    opener.poll(10)
    site.update(state=TunnelState.PROVEN)
    deliver(site, message(3, BACK), message(4, BACK))
    opener.poll(10)
    site.write()

    (upcall,) = site.upcalls()
    assert (upcall.reason, upcall.packet) == (UpcallReason.FIRST, BACK)
    assert site.drops() == {Drop.REPLAY: 1}
    assert site.received() == [BACK]
    site.check_ledger()


def test_a_flow_that_is_not_known_goes_up_opened(site: Site) -> None:
    deliver(site, message(3, BACK))

    site.reader().opener.poll(10)

    (upcall,) = site.upcalls()
    assert upcall.reason is UpcallReason.NEW_FLOW_IN
    assert (upcall.local_index, upcall.source, upcall.packet) == (INDEX_NEAR, address_of(site.far), BACK)
    assert site.control_bell.wait(0)
    site.check_ledger()


def test_a_flow_of_another_peer_is_not_known(site: Site) -> None:
    other = site.peers.add()
    assert other is not None
    site.flows.allow(parse_flow(BACK, inbound=True), other, 60_000, 1_000_000)
    deliver(site, message(3, BACK))

    site.reader().opener.poll(10)

    assert [each.reason for each in site.upcalls()] == [UpcallReason.NEW_FLOW_IN]
    assert site.write() == 0


def test_a_source_that_is_not_the_peers_is_counted_though_the_flow_is_allowed(site: Site) -> None:
    foreign = ip(NEAR, NEAR, UDP, udp(NEAR, NEAR, 1, 2, b"x"))
    admit(site, foreign)
    deliver(site, message(3, foreign))

    site.reader().opener.poll(10)

    assert site.drops() == {Drop.SOURCE_ADDR: 1}
    assert site.write() == 0
    site.check_ledger()


def test_where_only_control_knows_a_peers_sources_the_flow_table_decides(site: Site) -> None:
    site.update(sources=None)
    admit(site, BACK)
    unknown = ip(FAR, NEAR, UDP, udp(FAR, NEAR, 9, 9, b"x"))
    deliver(site, message(3, BACK), message(4, unknown))

    site.reader().opener.poll(10)
    site.write()

    assert site.received() == [BACK]
    assert [each.packet for each in site.upcalls()] == [unknown]


def test_a_refused_flow_is_counted_without_asking_again(site: Site) -> None:
    site.flows.refuse(parse_flow(BACK, inbound=True), site.peer, 1_000_000, inbound=True)
    deliver(site, message(3, BACK), message(4, BACK))

    site.reader().opener.poll(10)

    assert site.drops() == {Drop.REFUSED_IN: 2}
    assert site.upcalls() == []
    site.check_ledger()


def test_a_packet_from_another_address_is_delivered_and_control_told_a_few_times(site: Site) -> None:
    admit(site, BACK)
    opener = site.reader().opener
    with loopback() as elsewhere:
        deliver(site, *[message(counter, BACK) for counter in range(3, 23)], sender=elsewhere)
        opener.poll(100)
        source = address_of(elsewhere)
    site.write()

    assert len(site.received()) == 20
    ups = site.upcalls()
    assert [(each.reason, each.local_index, each.source, each.packet) for each in ups] == [
        (UpcallReason.MOVED, INDEX_NEAR, source, b"")
    ] * 5
    assert site.control_bell.wait(0)
    site.check_ledger()


def test_a_forged_or_replayed_datagram_from_another_address_tells_nobody(site: Site) -> None:
    admit(site, BACK)
    opener = site.reader().opener
    deliver(site, message(3, BACK))
    opener.poll(10)
    forged = bytearray(message(4, BACK))
    forged[20] ^= 1
    with loopback() as elsewhere:
        deliver(site, message(3, BACK), bytes(forged), sender=elsewhere)
        opener.poll(10)

    assert site.upcalls() == []
    assert site.drops() == {Drop.REPLAY: 1, Drop.AUTH: 1}


def test_control_moving_the_tunnel_ends_the_notices(site: Site) -> None:
    admit(site, BACK)
    opener = site.reader().opener
    with loopback() as elsewhere:
        deliver(site, message(3, BACK), sender=elsewhere)
        opener.poll(10)
        site.update(underlay=address_of(elsewhere))
        deliver(site, message(4, BACK), sender=elsewhere)
        opener.poll(10)

    assert len(site.upcalls()) == 1


def test_a_datagram_from_inside_the_overlay_has_looped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = site.reader().opener
    make_faulty(site, opener, monkeypatch, source=("10.9.3.4", 4242))
    deliver(site, message(3, BACK))

    opener.poll(10)

    assert site.drops() == {Drop.LOOPED: 1}
    site.check_ledger()


def test_upcalls_of_one_tunnel_are_limited(make_site: MakeSite) -> None:
    site = make_site(limits=UpcallLimits(per_tunnel=(1, 3)))
    connect(site)
    deliver(site, *[message(counter, BACK) for counter in range(3, 10)])

    site.reader().opener.poll(10)

    assert len(site.upcalls()) == 3
    assert site.drops() == {Drop.UPCALL_LIMITED: 4}
    site.check_ledger()


def test_the_largest_datagram_goes_up_whole(site: Site) -> None:
    largest = message(3, bytes(DATAGRAM_BYTES_MAX - 32), kind=MessageType.CONTROL)
    unknown = message(3, bytes(DATAGRAM_BYTES_MAX - 32), index=TunnelIndex(0x0101_0101))
    deliver(site, largest, unknown)

    site.reader().opener.poll(10)

    assert [len(each.packet) for each in site.upcalls()] == [DATAGRAM_BYTES_MAX - 32, DATAGRAM_BYTES_MAX]


def test_a_stranger_is_opened_by_the_reader_that_owns_its_tunnel(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site, owner=1)
    admit(site, BACK)
    wrong, owner = site.reader(0), site.reader(1)
    deliver(site, message(3, BACK), message(4, BACK), worker=0)

    assert wrong.opener.poll(10) == 2
    assert wrong.opener.waiting() == 0
    assert site.bells[1].wait(0)
    assert owner.opener.poll(10) == 2
    site.write(1)

    assert site.received() == [BACK, BACK]
    assert site.stats()["mp.strangers"] == 2
    site.check_ledger()


def test_copies_sent_to_every_reader_meet_one_window(make_site: MakeSite) -> None:
    site = make_site(workers=4)
    connect(site, owner=2)
    admit(site, BACK)
    readers = [site.reader(worker) for worker in range(4)]
    datagrams = [message(counter, BACK) for counter in range(3, 13)]
    for worker in range(4):
        deliver(site, *datagrams, worker=worker)

    for _ in range(2):
        for reader in readers:
            reader.opener.poll(100)
    for worker in range(4):
        site.write(worker)

    assert len(site.received()) == 10
    assert site.drops() == {Drop.REPLAY: 30}
    site.check_ledger()


def test_a_moved_stranger_is_told_with_its_own_address(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site, owner=1)
    admit(site, BACK)
    wrong, owner = site.reader(0), site.reader(1)
    with loopback() as elsewhere:
        deliver(site, message(3, BACK), sender=elsewhere)
        source = address_of(elsewhere)
    wrong.opener.poll(10)
    owner.opener.poll(10)

    assert [(each.reason, each.source) for each in site.upcalls(1)] == [(UpcallReason.MOVED, source)]


def test_strangers_beyond_the_ring_and_for_nobody_are_counted(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site, owner=1)
    opener = site.reader(0).opener
    for number in range(10):  # an area for each poll, 8 areas
        deliver(site, message(3 + number, BACK))
        opener.poll(10)
    site.update(owner=7)
    deliver(site, message(20, BACK))
    opener.poll(10)

    assert site.drops() == {Drop.STRANGER_RING_FULL: 3}
    assert site.stats()["mp.strangers"] == 8


def test_another_owner_goes_on_with_the_same_window(make_site: MakeSite) -> None:
    site = make_site(workers=2)
    connect(site, owner=0)
    admit(site, BACK)
    first, second = site.reader(0), site.reader(1)
    deliver(site, message(3, BACK))
    first.opener.poll(10)
    site.update(owner=1)  # reader 0 was given up
    deliver(site, message(3, BACK), message(4, BACK), worker=1)
    second.opener.poll(10)

    assert site.write(0) == site.write(1) == 1
    assert len(site.received()) == 2
    assert site.drops() == {Drop.REPLAY: 1}


class _Faulty:
    """A socket whose calls number 0, 1, ... fail with these errors (0: none), then none; see `make_faulty`."""

    def __init__(self, real: socket.socket, faults: list[int], source: Any) -> None:
        self._real = real
        self._faults = faults
        self._source = source

    def recvfrom_into(self, *arguments: Any) -> tuple[int, object]:
        self._fail()
        size, source = self._real.recvfrom_into(*arguments)
        return size, self._source or source

    def receive(self, _: int, message: native_calls.Message) -> int:
        self._fail()
        data, source = self._real.recvfrom(message.room_bytes)
        return message.fill(data, self._source or source, step=None, is_cut=False)

    def _fail(self) -> None:
        number = self._faults.pop(0) if self._faults else 0
        if number:
            raise OSError(number, "injected")


def make_faulty(
    site: Site,
    opener: Opener,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[int] | None = None,
    source: object = None,
) -> None:
    """Let a reader's socket fail, or its datagrams seem to come from `source`."""
    if isinstance(opener, PythonOpener):
        faulty = _Faulty(opener._socket, faults or [], source)
        monkeypatch.setattr(opener, "_socket", faulty)
    else:
        native_calls.hook(monkeypatch, recvmsg=_Faulty(site.udp[0], faults or [], source).receive)


@pytest.mark.parametrize(
    "number", [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPROTO, errno.ENOBUFS]
)
def test_errors_of_earlier_datagrams_are_counted_and_the_next_datagram_is_taken(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    admit(site, BACK)
    opener = site.reader().opener
    make_faulty(site, opener, monkeypatch, [number, number])
    deliver(site, message(3, BACK))

    assert opener.poll(10) == 3
    site.write()

    assert site.stats()["mp.rx.icmp"] == 2
    assert site.received() == [BACK]
    site.check_ledger()


def test_a_flood_of_errors_does_not_hold_the_loop(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = site.reader().opener
    make_faulty(site, opener, monkeypatch, [errno.ECONNREFUSED] * 1000)

    assert opener.poll(10) == 10


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOTSOCK, errno.EFAULT])
def test_a_lost_socket_raises_after_what_was_taken_is_published(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    admit(site, BACK)
    opener = site.reader().opener
    deliver(site, message(3, BACK), message(4, BACK))
    make_faulty(site, opener, monkeypatch, [0, number])

    with pytest.raises(OSError) as lost:
        opener.poll(10)
    assert lost.value.errno == number

    assert site.write() == 1
    assert site.received() == [BACK]
    site.check_ledger()


def test_a_header_as_parsed_on_the_cold_path_is_read_the_same_here(site: Site) -> None:
    for counter in (3, 2**32, 2**63, 2**64 - 1):
        datagram = message(counter, b"x", kind=MessageType.TEST)
        deliver(site, datagram)
        site.reader().opener.poll(10)
        (upcall,) = site.upcalls()
        parsed = Header.parse(datagram)
        assert (upcall.type, upcall.subtype) == (parsed.type, parsed.subtype)
        assert upcall.local_index == parsed.remote_index
    assert site.drops() == {}


def test_what_is_too_short_to_be_opened_begins_no_window(site: Site) -> None:
    """Both kernels leave the same memory behind."""
    deliver(site, message(3, b"")[:31])
    site.reader().opener.poll(10)

    assert site.drops() == {Drop.TRUNCATED: 1}
    windows = os.pread(site.tables.windows.read_only, 1 << 20, ROWS_AT)
    assert not any(windows)
