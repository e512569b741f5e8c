"""Relay frames: what they hold arrives here, goes on, or is counted; and packets leave in them. On both kernels."""

import functools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from nebula_mp.crypto.aead import Aead
from nebula_mp.datapath.api import (
    DATAGRAM_BYTES_MAX,
    FORWARDED,
    HOLDING,
    Arrival,
    Drop,
    Half,
    Kernel,
    UpcallReason,
    encode_record,
)
from nebula_mp.newtypes import Cipher, Counter, RelayIndex, TunnelIndex, UdpAddr
from nebula_mp.shm_counters import SPAN_MAX, Refusal, SendCounters
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayTable
from nebula_mp.shm_ring import Bell
from nebula_mp.shm_table import RELAYS, PeerRef
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import COUNTER_LIMIT, MESSAGE_RELAY, Header, MessageType
from nebula_mp.wire.ip import parse_flow
from tests.datapath import sites
from tests.datapath.batches import ALL
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import (
    INDEX_NEAR,
    KEY_IN,
    KEY_OUT,
    TIMEOUT_MS,
    UNLIMITED,
    Site,
    address_of,
    connect,
    deliver,
    drained,
    loopback,
    message,
    packet,
    store_counter,
)
from tests.datapath.superpackets import TIMESTAMPS, Plan
from tests.support import rings
from tests.support.native import PYTHON, RUST, named, python_only
from tests.support.packets import TCP
from tests.support.tables import control_counters, writable

pytestmark = pytest.mark.usefixtures("kernel")

ENDS: Final = RelayIndex(0x7A7A_0003)  # of the near host: what comes in its frames is for it
PASSES: Final = RelayIndex(0x7B7B_0004)  # of the near host: its frames go on
BEYOND: Final = RelayIndex(0x7C7C_0011)  # of whoever is next on either path
BEHIND: Final = TunnelIndex(0x0B0B_0009)  # the near host's tunnel to the peer behind the relay
BEHIND_REMOTE: Final = TunnelIndex(0x0C0C_000A)
KEY_BEHIND_OUT, KEY_BEHIND_IN = KEY_OUT[::-1], KEY_IN[::-1]
NEXT: Final = TunnelIndex(0x0D0D_000C)  # the near host's tunnel to another peer, where it is the relay
NEXT_REMOTE: Final = TunnelIndex(0x0E0E_000D)
KEY_NEXT: Final = bytes(range(7, 39))
TERMINAL: Final = RelayRow(ENDS, INDEX_NEAR, RelayKind.TERMINAL, None, BEYOND)
FORWARDING: Final = RelayRow(PASSES, INDEX_NEAR, RelayKind.FORWARDING, NEXT, BEYOND)


frame = functools.partial(sites.frame, path=ENDS)


class Frame(NamedTuple):
    """A frame that was made, taken apart by the library alone."""

    header: Header
    content: bytes


def opened(datagram: bytes, key: bytes, cipher: Cipher = Cipher.AES) -> Frame:
    """Take a frame apart. Raises AuthError."""
    header = Header.parse(datagram)
    assert (header.type, header.subtype) == (MessageType.MESSAGE, MESSAGE_RELAY)
    assert Aead(cipher, key).open(header.counter, datagram[:-16], datagram[-16:]) == b""
    return Frame(header, datagram[16:-16])


def paths_of(site: Site) -> RelayTable:
    return RelayTable(writable(site.tables.relays, RELAYS))


def add_peer(site: Site, index: TunnelIndex, keys: tuple[bytes, bytes], **changes: Any) -> PeerRef:
    """Let control open a tunnel to a further peer, as the one to the relay but for the changes."""
    peer = site.peers.add()
    assert peer is not None
    site.tunnels.open(replace(site.fields, local_index=index, peer=peer, **changes), *keys)
    site.peers.set(peer, index)
    return peer


def inner(counter: int, content: bytes, **how: Any) -> bytes:
    """What the peer behind the relay sends."""
    return message(counter, content, index=BEHIND, key=KEY_BEHIND_IN, **how)


@pytest.fixture
def end(site: Site) -> Site:
    """One end of a path: its first tunnel leads to the relay, `site.far`, and `site.peer` is behind that."""
    paths_of(site).set(TERMINAL)
    site.peer = add_peer(
        site, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), remote_index=BEHIND_REMOTE, underlay=None, relay=ENDS
    )
    return site


class Middle(NamedTuple):
    site: Site
    other: socket.socket


@pytest.fixture
def middle(site: Site) -> Iterator[Middle]:
    """The relay of a path: frames come from `site.far`, and go on to `other`."""
    with closing(loopback()) as other:
        paths_of(site).set(FORWARDING)
        there = address_of(other)
        add_peer(site, NEXT, (KEY_NEXT, KEY_NEXT[::-1]), remote_index=NEXT_REMOTE, underlay=there)
        yield Middle(site, other)


def traffic(site: Site, index: TunnelIndex) -> bytes:
    row = index & 0xFFFF
    with open(f"/proc/self/fd/{site.tables.traffic[0].read_only}", "rb") as memory:  # noqa: PTH123
        memory.seek(4096 + 64 * row)
        return memory.read(64)


def packets_and_bytes(site: Site, index: TunnelIndex) -> tuple[int, int, int, int]:
    """In and out."""
    words = memoryview(traffic(site, index)).cast("Q")
    return words[1], words[2], words[4], words[5]


# ---- a path that ends here ----


@pytest.mark.parametrize("cipher", Cipher)
def test_a_packet_in_a_frame_arrives_and_both_tunnels_have_received_it(
    make_site: MakeSite, cipher: Cipher
) -> None:
    site = make_site()
    connect(site, cipher=cipher)
    paths_of(site).set(TERMINAL)
    site.peer = add_peer(site, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), underlay=None, relay=ENDS)
    site.allow(packet(0, back=True), inbound=True)
    sent = [packet(each, back=True) for each in range(3)]
    for number, each in enumerate(sent):
        deliver(site, frame(3 + number, inner(7 + number, each, cipher=cipher), cipher=cipher))

    assert site.reader().opener.poll(100) == 3
    site.write()

    assert site.received() == sent
    size = len(sent[0])
    assert packets_and_bytes(site, INDEX_NEAR) == (3, 3 * (size + 64), 0, 0)
    assert packets_and_bytes(site, BEHIND) == (3, 3 * (size + 32), 0, 0)
    assert site.upcalls() == [], "it moved nobody"
    assert site.drops() == {}
    site.check_ledger()


def test_neither_tunnel_takes_a_counter_twice(end: Site) -> None:
    end.allow(packet(0, back=True), inbound=True)
    reader = end.reader()
    once = frame(5, inner(9, packet(0, back=True)))
    again_inside = frame(6, inner(9, packet(0, back=True)))
    deliver(end, once, once, again_inside, frame(6, inner(10, packet(1, back=True))))

    reader.opener.poll(100)
    end.write()

    assert end.received() == [packet(0, back=True)]
    assert end.drops() == {Drop.REPLAY: 3}
    end.check_ledger()


def changed(datagram: bytes, at: int) -> bytes:
    made = bytearray(datagram)
    made[at] ^= 1
    return bytes(made)


def test_a_frame_that_anything_was_changed_in_is_refused_and_changes_nothing(end: Site) -> None:
    end.allow(packet(0, back=True), inbound=True)
    reader = end.reader()
    whole = frame(5, inner(9, packet(0, back=True)))
    # The reserved bytes, the counter, the datagram's header, its packet and tag, and the frame's.
    places = [2, 15, 16, 20, 31, 40, len(whole) - 17, len(whole) - 1]
    for at in places:
        deliver(end, changed(whole, at))
    deliver(end, whole[:-1])
    reader.opener.poll(100)
    assert end.drops() == {Drop.AUTH: len(places) + 1}

    deliver(end, whole)
    reader.opener.poll(100)
    end.write()

    assert end.received() == [packet(0, back=True)], "no window had moved"
    end.check_ledger()


def test_the_relay_itself_cannot_forge_what_it_carries(end: Site) -> None:
    end.allow(packet(0, back=True), inbound=True)
    whole = inner(9, packet(0, back=True))
    deliver(end, frame(5, changed(whole, 40)), frame(6, whole))

    end.reader().opener.poll(100)
    end.write()

    assert end.drops() == {Drop.AUTH: 1}
    assert end.received() == [packet(0, back=True)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Drop.SHORT),
        (bytes(1), Drop.SHORT),  # no punch comes through a relay
        (bytes(15), Drop.SHORT),
        (b"\x21" + bytes(40), Drop.VERSION),
        (b"\x1f" + bytes(40), Drop.TYPE),
        (frame(9, inner(9, b"")), Drop.RELAY_INDEX),
        (inner(9, b"")[:31], Drop.TRUNCATED),
    ],
    ids=str,
)
def test_what_cannot_be_a_message_has_the_reason_that_it_would_have_outside(
    end: Site, content: bytes, reason: Drop
) -> None:
    deliver(end, frame(5, content))
    end.reader().opener.poll(100)
    assert end.drops() == {reason: 1}
    assert end.upcalls() == []
    end.check_ledger()


def test_the_reasons_of_a_frame_are_those_of_any_message(end: Site) -> None:
    reader = end.reader()
    deliver(end, frame(20_000, inner(9, b"")), frame(3, inner(10, b"")), frame(20_001, b"")[:31])
    reader.opener.poll(100)
    assert end.drops() == {Drop.OLD: 1, Drop.TRUNCATED: 1, Drop.INNER_IP: 1}
    end.check_ledger()


@pytest.mark.parametrize(
    "content",
    [
        Header(MessageType.HANDSHAKE, 0, TunnelIndex(0), Counter(1)).encode() + bytes(80),
        Header(MessageType.RECV_ERROR, 0, BEHIND, Counter(0)).encode(),
        message(9, b"early", index=TunnelIndex(0x7777_0001)),
    ],
    ids=["handshake", "recv_error", "unknown index"],
)
def test_what_only_control_can_judge_goes_up_with_the_path_and_without_an_address(
    end: Site, content: bytes
) -> None:
    deliver(end, frame(5, content))
    end.reader().opener.poll(100)

    (upcall,) = end.upcalls()
    kind = content[0] & 15
    assert upcall[0] is UpcallReason.RELAYED
    assert upcall[2:] == (ENDS, None, kind, 0, content)
    end.check_ledger()


def test_messages_and_new_flows_go_up_opened_and_without_an_address(end: Site) -> None:
    reader = end.reader()
    deliver(
        end,
        frame(5, inner(9, b"are you there", kind=MessageType.TEST)),
        frame(6, inner(10, packet(0, back=True))),
    )
    reader.opener.poll(100)

    found = [(each.reason, each.local_index, each.source, each.packet) for each in end.upcalls()]
    assert found == [
        (UpcallReason.MESSAGE, BEHIND, None, b"are you there"),
        (UpcallReason.NEW_FLOW_IN, BEHIND, None, packet(0, back=True)),
    ]
    end.check_ledger()


def test_upcalls_are_limited_by_the_tunnel_to_the_relay(make_site: MakeSite) -> None:
    site = make_site(limits=replace(UNLIMITED, relayed=(1000, 2)))
    connect(site)
    table = paths_of(site)
    table.set(TERMINAL)
    table.set(replace(TERMINAL, local_index=RelayIndex(ENDS + 1)))
    table.set(replace(TERMINAL, local_index=RelayIndex(ENDS + 2), carrier=NEXT))
    add_peer(site, NEXT, (KEY_NEXT, KEY_NEXT))
    hello = Header(MessageType.HANDSHAKE, 0, TunnelIndex(0), Counter(1)).encode()
    deliver(site, frame(3, hello), frame(4, hello, path=ENDS + 1), frame(5, hello), frame(6, hello))
    deliver(site, frame(3, hello, path=ENDS + 2, key=KEY_NEXT))

    site.reader().opener.poll(100)

    assert [each.local_index for each in site.upcalls()] == [ENDS, ENDS + 1, ENDS + 2]
    assert site.drops() == {Drop.UPCALL_LIMITED: 2}


def test_a_frame_of_a_path_that_is_not_there_goes_up_whole(end: Site) -> None:
    unknown = frame(5, inner(9, packet(0, back=True)), path=0x7A7A_0030)
    other_of_the_row = frame(6, b"", path=ENDS ^ 0x0001_0000)
    deliver(end, unknown, other_of_the_row)
    end.reader().opener.poll(100)
    found = [(each.reason, each.source, each.packet) for each in end.upcalls()]
    source = address_of(end.far)
    assert found == [(UpcallReason.DATAGRAM, source, each) for each in (unknown, other_of_the_row)]

    end.tunnels.close(INDEX_NEAR)
    carried_by_nothing = frame(7, b"")
    deliver(end, carried_by_nothing)
    end.reader().opener.poll(100)
    assert [each.packet for each in end.upcalls()] == [carried_by_nothing]


def test_the_relay_that_sends_from_elsewhere_has_moved_and_the_peer_has_not(end: Site) -> None:
    end.allow(packet(0, back=True), inbound=True)
    with closing(loopback()) as elsewhere:
        deliver(end, frame(5, inner(9, packet(0, back=True))), sender=elsewhere)
        end.reader().opener.poll(100)
        end.write()

        (moved,) = end.upcalls()
        assert (moved.reason, moved.local_index) == (UpcallReason.MOVED, INDEX_NEAR)
        assert moved.source == address_of(elsewhere)
    assert end.received() == [packet(0, back=True)]


def test_a_peer_with_an_address_whose_packet_comes_in_a_frame_has_not_moved(end: Site) -> None:
    end.allow(packet(0, back=True), inbound=True)
    fields = end.tunnels.fields(BEHIND)
    assert fields is not None
    end.tunnels.update(replace(fields, underlay=UdpAddr(ip_address("192.0.2.77"), 4242)))
    deliver(end, frame(5, inner(9, packet(0, back=True))))
    end.reader().opener.poll(100)
    end.write()
    assert end.received() == [packet(0, back=True)]
    assert end.upcalls() == []


def test_the_first_message_of_a_relay_on_a_candidate_goes_up(end: Site) -> None:
    end.update(state=TunnelState.CANDIDATE)
    deliver(end, frame(5, b"what it holds"))
    end.reader().opener.poll(100)
    (first,) = end.upcalls()
    assert (first.reason, first.local_index, first.subtype) == (UpcallReason.FIRST, INDEX_NEAR, MESSAGE_RELAY)
    assert first.packet == b"what it holds"


def test_a_stream_in_frames_is_joined_to_superpackets(make_site: MakeSite) -> None:
    site = make_site(offloads=replace(ALL, udp_gro=False))
    connect(site)
    paths_of(site).set(TERMINAL)
    site.peer = add_peer(
        site, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), underlay=None, relay=ENDS, sources=None
    )
    plan = Plan(4, TCP, bytes(range(256)) * 40, 1248, options=TIMESTAMPS)
    site.allow(plan.one(0), inbound=True)
    for number, each in enumerate(plan.packets()):
        deliver(site, frame(3 + number, inner(3 + number, each)))

    site.reader().opener.poll(100)
    site.write()

    (whole,) = site.received()
    assert whole[10:][-len(plan.payload) :] == plan.payload


# ---- a path that goes on ----


def test_a_frame_goes_on_in_one_of_the_next_tunnel(middle: Middle) -> None:
    site, other = middle
    reader = site.reader()
    contents = [message(9, b"for somebody else", index=TunnelIndex(0x1234_5678)), b"anything at all", b""]
    for number, content in enumerate(contents):
        deliver(site, frame(5 + number, content, path=PASSES))

    assert reader.opener.poll(100) == 3
    assert site.send() == 1

    found = [opened(each, KEY_NEXT) for each in drained([other])]
    assert [each.content for each in found] == contents
    assert [(int(each.header.remote_index), int(each.header.counter)) for each in found] == [
        (int(BEYOND), 3),
        (int(BEYOND), 4),
        (int(BEYOND), 5),
    ]
    size = sum(len(each) + 32 for each in contents)
    assert packets_and_bytes(site, INDEX_NEAR) == (3, size, 0, 0)
    assert packets_and_bytes(site, NEXT) == (0, 0, 3, size)
    assert site.stats()["mp.relay.forwarded"] == 3
    assert site.upcalls() == []
    site.check_ledger()


def test_a_relay_takes_no_frame_twice(middle: Middle) -> None:
    site, other = middle
    once = frame(5, b"content", path=PASSES)
    deliver(site, once, once, changed(frame(6, b"content", path=PASSES), 20))
    site.reader().opener.poll(100)
    site.send()
    assert len(drained([other])) == 1
    assert site.drops() == {Drop.REPLAY: 1, Drop.AUTH: 1}
    site.check_ledger()


@pytest.mark.parametrize(
    "change",
    [{"state": TunnelState.CANDIDATE}, {"underlay": None}, {"underlay": None, "relay": ENDS}, None],
    ids=["not proven", "no address", "behind a relay itself", "gone"],
)
def test_a_frame_whose_next_tunnel_cannot_send_is_counted(
    middle: Middle, change: dict[str, Any] | None
) -> None:
    site, _ = middle
    if change is None:
        site.tunnels.close(NEXT)
    else:
        fields = site.tunnels.fields(NEXT)
        assert fields is not None
        site.tunnels.update(replace(fields, **change))
    deliver(site, frame(5, b"content", path=PASSES))

    site.reader().opener.poll(100)

    assert site.drops() == {Drop.RELAY_INDEX: 1}
    assert site.sealed() == []
    site.check_ledger()


def test_what_finds_no_room_or_no_counter_is_counted(make_site: MakeSite) -> None:
    site = make_site(areas=2, area_bytes=4096, entries_max=8)
    connect(site)
    paths_of(site).set(FORWARDING)
    with closing(loopback()) as other:
        add_peer(site, NEXT, (KEY_NEXT, KEY_NEXT), remote_index=NEXT_REMOTE, underlay=address_of(other))
        reader = site.reader()
        for number in range(5):
            deliver(site, frame(5 + number, bytes(1500), path=PASSES))
        deliver(site, frame(50, bytes(4500), path=PASSES))
        reader.opener.poll(100)
        assert site.drops() == {Drop.SEAL_RING_FULL: 1, Drop.OVERSIZE: 1}

        site.send()
        assert len(drained([other])) == 4
        store_counter(site, NEXT & 0xFFFF, COUNTER_LIMIT - 2)
        deliver(site, frame(60, b"the last", path=PASSES), frame(61, b"one too many", path=PASSES))
        reader.opener.poll(100)
        site.send()

        (last,) = drained([other])
        assert opened(last, KEY_NEXT).header.counter == COUNTER_LIMIT - 1
        assert site.drops()[Drop.EXHAUSTED] == 1
        site.check_ledger()


def test_frames_and_packets_of_ours_share_a_tunnel_and_no_counter(middle: Middle) -> None:
    site, other = middle
    peer = site.peers.add()
    assert peer is not None
    site.peers.set(peer, NEXT)
    site.flows.allow(parse_flow(packet(0), inbound=False), peer, TIMEOUT_MS, int(site.now * 1000))
    reader = site.reader()
    for number in range(4):
        site.inside.send(packet(number))
        reader.sealer.poll(100)
        deliver(site, frame(5 + number, b"on", path=PASSES))
        reader.opener.poll(100)
    site.send()

    counters = [Header.parse(each).counter for each in drained([other])]
    assert counters == list(range(3, 11))
    site.check_ledger()


def halves(site: Site, bell: Bell) -> tuple[Half, Half]:
    """Outbound and inbound of one reader, each with its drain."""
    reader = site.reader()
    udp, stats = site.udp[0].fileno(), site.pages[1].descriptor
    tunnels = site.tables.tunnels.read_only
    seal = site.kernel.drain_udp(site.seal_end(), udp, tunnels=tunnels, stats=stats, offloads=site.offloads)
    drain = site.kernel.drain_tun(site.open_end(), site.tun_fd, stats=stats, offloads=site.offloads)
    return reader.outbound(seal, bell), reader.inbound(drain, bell)


@pytest.mark.parametrize("drains", [True, False])
def test_a_pass_says_that_it_forwarded_and_the_other_half_sees_to_it(middle: Middle, drains: bool) -> None:
    site, other = middle
    with ExitStack() as closing_bell:
        bell = Bell.create()
        closing_bell.callback(bell.close)
        out, into = halves(site, bell)
        assert into.work(64, drains) == 0
        deliver(site, frame(5, b"on", path=PASSES))

        assert into.work(64, drains) == FORWARDED
        assert into.work(64, drains) == 0, "said once"
        assert not out.work(0, drains) & HOLDING

        if not drains:
            assert bell.wait(0), "for the writer"
            assert site.send() == 1
    assert len(drained([other])) == 1


def test_a_successor_forwards_with_counters_of_its_own(middle: Middle) -> None:
    site, other = middle
    deliver(site, frame(5, b"one", path=PASSES))
    site.reader().opener.poll(100)
    deliver(site, frame(5, b"one", path=PASSES), frame(6, b"two", path=PASSES))
    site.reader().opener.poll(100)
    site.send()
    found = [opened(each, KEY_NEXT) for each in drained([other])]
    assert [(each.header.counter, each.content) for each in found] == [(3, b"one"), (4, b"two")]
    assert site.drops() == {Drop.REPLAY: 1}


# ---- to a peer behind a relay ----


def unwrapped(datagrams: list[bytes]) -> list[tuple[Header, Header, bytes]]:
    """Both headers and the packet of each frame to the peer behind the relay."""
    found = []
    aead = Aead(Cipher.AES, KEY_BEHIND_OUT)
    for each in datagrams:
        outside, content = opened(each, KEY_OUT)
        inside = Header.parse(content)
        found.append((outside, inside, aead.open(inside.counter, content[:16], content[16:])))
    return found


def test_a_packet_for_a_peer_behind_a_relay_leaves_in_a_frame_to_the_relay(end: Site) -> None:
    end.allow(packet(0))
    store_counter(end, BEHIND & 0xFFFF, 499)
    sent = [packet(0), packet(1), packet(2, 30)]
    for each in sent:
        end.inside.send(each)

    assert end.reader().sealer.poll(100) == 3
    end.send()

    found = unwrapped(drained([end.far]))
    assert [each for _, _, each in found] == sent
    for number, (outside, inside, _) in enumerate(found):
        assert outside == Header(MessageType.MESSAGE, 1, TunnelIndex(BEYOND), Counter(3 + number))
        assert inside == Header(MessageType.MESSAGE, 0, BEHIND_REMOTE, Counter(500 + number))
    size = sum(map(len, sent))
    assert packets_and_bytes(end, BEHIND) == (0, 0, 3, size + 3 * 32)
    assert packets_and_bytes(end, INDEX_NEAR) == (0, 0, 3, size + 3 * 64)
    assert end.drops() == {}
    end.check_ledger()


def test_superpackets_are_cut_and_each_packet_has_a_frame(make_site: MakeSite) -> None:
    site = make_site(offloads=ALL)
    connect(site)
    site.far.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
    paths_of(site).set(TERMINAL)
    site.peer = add_peer(site, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), underlay=None, relay=ENDS)
    plan = Plan(4, TCP, bytes(range(256)) * 150 + b"short", 1248, options=TIMESTAMPS)
    site.allow(plan.one(0))
    reader = site.reader()
    for _ in range(3):  # the second and third are read to where they were expected
        site.inside.send(plan.virtio() + plan.packet())
        assert reader.sealer.poll(100) == plan.count
        site.send()
        assert [each for _, _, each in unwrapped(drained([site.far]))] == plan.packets()
    assert site.drops() == {}
    site.check_ledger()


def test_a_superpacket_behind_packets_for_a_relay_stays_whole(make_site: MakeSite) -> None:
    """Frames need more room than the packets were read for, where the superpacket may lie already."""
    site = make_site(offloads=ALL)
    connect(site)
    site.far.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
    plan = Plan(4, TCP, bytes(range(256)) * 150 + b"short", 1248, options=TIMESTAMPS)
    site.allow(plan.one(0))
    paths_of(site).set(TERMINAL)
    site.peer = add_peer(site, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), underlay=None, relay=ENDS)
    site.allow(packet(0))
    reader, direct = site.reader(), Aead(Cipher.AES, KEY_OUT)
    for _ in range(3):
        for number in range(3):
            site.inside.send(bytes(10) + packet(number, 900))
        site.inside.send(plan.virtio() + plan.packet())
        assert reader.sealer.poll(100) == 3 + plan.count
        site.send()
        found = drained([site.far])
        assert [each for _, _, each in unwrapped(found[:3])] == [packet(each, 900) for each in range(3)]
        opened_ones = [direct.open(Header.parse(each).counter, each[:16], each[16:]) for each in found[3:]]
        assert opened_ones == plan.packets()


def test_an_address_is_preferred_to_a_relay(end: Site) -> None:
    end.allow(packet(0))
    fields = end.tunnels.fields(BEHIND)
    assert fields is not None
    with closing(loopback()) as direct:
        end.tunnels.update(replace(fields, underlay=address_of(direct)))
        end.inside.send(packet(0))
        end.reader().sealer.poll(100)
        end.send()
        (found,) = drained([direct])
    assert Header.parse(found).remote_index == BEHIND_REMOTE


@pytest.mark.parametrize(
    "broken",
    [
        lambda site: paths_of(site).clear(ENDS),
        lambda site: paths_of(site).set(replace(FORWARDING, local_index=ENDS)),
        lambda site: site.tunnels.close(INDEX_NEAR),
        lambda site: site.update(state=TunnelState.CANDIDATE),
        lambda site: site.update(underlay=None),
    ],
    ids=["no path", "it leads on", "the relay is gone", "not proven", "no address"],
)
def test_where_the_path_cannot_be_gone_control_gets_the_packets(
    end: Site, broken: Callable[[Site], object]
) -> None:
    end.allow(packet(0))
    broken(end)
    end.inside.send(packet(0))
    end.inside.send(packet(1))
    end.reader().sealer.poll(100)

    assert [(each.reason, each.packet) for each in end.upcalls()] == [
        (UpcallReason.NO_TUNNEL, packet(0)),
        (UpcallReason.NO_TUNNEL, packet(1)),
    ]
    assert end.sealed() == []
    end.check_ledger()


@pytest.mark.parametrize("index", [INDEX_NEAR, BEHIND])
def test_without_a_counter_of_either_tunnel_it_is_counted(end: Site, index: TunnelIndex) -> None:
    end.allow(packet(0))
    store_counter(end, index & 0xFFFF, COUNTER_LIMIT)
    end.inside.send(packet(0))
    end.reader().sealer.poll(100)
    assert end.drops() == {Drop.EXHAUSTED: 1}
    assert end.sealed() == []
    end.check_ledger()


@pytest.mark.parametrize("index", [INDEX_NEAR, BEHIND])
def test_a_tunnel_whose_counters_another_one_has_already_is_gone(end: Site, index: TunnelIndex) -> None:
    """Control closes the counters before the row, so that a reader that still has the row gets none."""
    end.allow(packet(0))
    reader = end.reader()
    end.inside.send(packet(0))
    assert reader.sealer.poll(100) == 1
    assert len(end.sealed()) == 1
    control_counters(end.tables).close(index & 0xFFFF)

    end.inside.send(packet(1))
    reader.sealer.poll(100)

    assert [(each.reason, each.packet) for each in end.upcalls()] == [(UpcallReason.NO_TUNNEL, packet(1))]
    assert end.sealed() == []
    assert end.drops() == {}


def test_so_is_the_next_tunnel_of_a_frame(middle: Middle) -> None:
    site, _ = middle
    reader = site.reader()
    deliver(site, frame(5, b"one", path=PASSES))
    reader.opener.poll(100)
    control_counters(site.tables).close(NEXT & 0xFFFF)
    deliver(site, frame(6, b"two", path=PASSES))
    reader.opener.poll(100)
    assert site.drops() == {Drop.RELAY_INDEX: 1}
    assert len(site.sealed()) == 1


# ---- several readers ----


@pytest.fixture
def shared(make_site: MakeSite) -> Site:
    """An end of a path with two readers: the relay's tunnel is reader 0's, the peer's reader 1's."""
    site = make_site(workers=2)
    connect(site)
    paths_of(site).set(TERMINAL)
    site.peer = add_peer(site, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), underlay=None, relay=ENDS, owner=1)
    site.allow(packet(0, back=True), inbound=True)
    return site


def test_a_frame_goes_to_the_owner_of_its_tunnel_and_what_it_holds_to_that_of_its_own(shared: Site) -> None:
    readers = [shared.reader(each) for each in range(2)]
    hello = Header(MessageType.HANDSHAKE, 0, TunnelIndex(0), Counter(1)).encode()
    deliver(shared, frame(5, inner(9, packet(0, back=True))), frame(6, hello), worker=1)

    assert readers[1].opener.poll(100) == 2
    assert shared.drops() == {}
    assert readers[0].opener.poll(100) == 2
    assert readers[1].opener.poll(100) == 1
    shared.write(1)

    assert shared.received() == [packet(0, back=True)]
    assert [each.packet for each in shared.upcalls(0)] == [hello]
    assert shared.upcalls(1) == []
    assert shared.stats()["mp.strangers"] == 3
    # A frame counts as one packet, whoever handed it to whom.
    shared.check_ledger()


def test_what_was_handed_over_and_has_no_tunnel_any_more_goes_up_with_its_path(shared: Site) -> None:
    readers = [shared.reader(each) for each in range(2)]
    content = inner(9, packet(0, back=True))
    deliver(shared, frame(5, content))
    readers[0].opener.poll(100)
    shared.tunnels.close(BEHIND)

    readers[1].opener.poll(100)

    (upcall,) = shared.upcalls(1)
    assert (upcall.reason, upcall.local_index, upcall.source) == (UpcallReason.RELAYED, ENDS, None)
    assert upcall.packet == content


def test_what_was_handed_over_by_a_path_that_is_gone_leads_nowhere(shared: Site) -> None:
    readers = [shared.reader(each) for each in range(2)]
    deliver(shared, frame(5, inner(9, packet(0, back=True))))
    readers[0].opener.poll(100)
    shared.tunnels.close(BEHIND)
    paths_of(shared).clear(ENDS)

    readers[1].opener.poll(100)

    assert shared.upcalls(1) == []
    assert shared.drops() == {Drop.RELAY_INDEX: 1}


@pytest.mark.parametrize("kind", [MessageType.MESSAGE, MessageType.TEST])
def test_what_a_reader_gone_mad_hands_over_is_not_too_large(shared: Site, kind: MessageType) -> None:
    content = inner(9, bytes(DATAGRAM_BYTES_MAX), kind=kind)
    producer = rings.produce(shared.stranger[0, 1])
    assert producer.try_begin()
    assert producer.try_add(encode_record(Arrival(None, kind, 0, 5), ENDS) + content, 0)
    producer.publish()

    shared.reader(1).opener.poll(100)

    assert shared.drops() == {Drop.OVERSIZE: 1}


def test_frames_do_not_wait_for_another_worker_and_it_is_counted(shared: Site) -> None:
    """Neither those that go on nor those of our own, of whichever of the two tunnels it is."""
    shared.allow(packet(0))
    paths_of(shared).set(FORWARDING)
    add_peer(shared, NEXT, (KEY_NEXT, KEY_NEXT))
    slow, fast = shared.reader(0), shared.reader(1)
    shared.inside.send(packet(0))
    deliver(shared, frame(5, b"on", path=PASSES))
    slow.sealer.poll(10)
    slow.opener.poll(10)
    for index in (INDEX_NEAR, BEHIND, NEXT):
        store_counter(shared, index & 0xFFFF, 3 + SPAN_MAX)
    fields = shared.tunnels.fields(INDEX_NEAR)
    assert fields is not None
    shared.tunnels.update(replace(fields, owner=1))

    shared.inside.send(packet(1))
    fast.sealer.poll(10)
    assert not fast.sealer.is_holding
    deliver(shared, frame(6, b"on", path=PASSES), worker=1)
    fast.opener.poll(10)

    assert [len(shared.sealed(each)) for each in (0, 1)] == [2, 2]
    assert shared.stats()["mp.counter.span"] == 3
    assert shared.drops() == {}


def test_a_packet_that_is_not_sealed_leaves_no_counter_in_flight(shared: Site) -> None:
    """Or other readers would wait for it."""
    shared.allow(packet(0))
    store_counter(shared, INDEX_NEAR & 0xFFFF, COUNTER_LIMIT)
    first, second = shared.reader(0).sealer, shared.reader(1).sealer
    shared.inside.send(packet(0))
    first.poll(10)
    assert shared.drops() == {Drop.EXHAUSTED: 1}
    fields = shared.tunnels.fields(BEHIND)
    assert fields is not None
    shared.tunnels.update(replace(fields, underlay=address_of(shared.far)))
    store_counter(shared, BEHIND & 0xFFFF, 700)

    shared.inside.send(packet(1))
    second.poll(10)

    assert not second.is_holding
    assert len(shared.sealed(1)) == 1


@python_only
def test_a_lock_that_another_process_keeps_costs_a_pass_a_millisecond_and_no_more(
    middle: Middle, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, other = middle
    reader = site.python_reader()
    calls: list[object] = []

    def busy(*_: object, **__: object) -> Refusal:
        calls.append(None)
        return Refusal.BUSY

    with monkeypatch.context() as patched:
        patched.setattr(SendCounters, "reserve", busy)
        for number in range(10):
            deliver(site, frame(5 + number, b"on", path=PASSES))
        reader.opener.poll(100)
        assert len(calls) == 20 + 9
        deliver(site, frame(20, b"on", path=PASSES))
        reader.opener.poll(100)
        assert len(calls) == 20 + 9 + 20, "patient again"
    assert site.drops() == {Drop.EXHAUSTED: 11}
    assert site.stats()["mp.counter.busy"] == 11

    deliver(site, frame(30, b"on", path=PASSES))
    reader.opener.poll(100)
    site.send()
    assert len(drained([other])) == 1


# ---- against others ----

VECTORS: Final = json.loads((Path(__file__).parents[1] / "vectors" / "handshake.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_frames_are_those_that_nebula_makes(make_site: MakeSite, vector: dict[str, Any]) -> None:
    """A frame that Nebula made is opened, and what we make of its content, with the same key, is the same."""
    made = vector["relay_frame"]
    assert made["direction"] == "i2r"
    key = bytes.fromhex(vector["key_i2r"])
    cipher = Cipher.AES if vector["cipher_config"] == "aes" else Cipher.CHACHAPOLY
    whole, content = bytes.fromhex(made["packet"]), bytes.fromhex(made["inner_packet"])
    index = RelayIndex(made["relay_remote_index"])
    site = make_site()
    connect(site, cipher=cipher)
    with closing(loopback()) as other:
        site.tunnels.close(INDEX_NEAR)
        site.tunnels.open(site.fields, key, key)
        add_peer(site, NEXT, (key, key), remote_index=NEXT_REMOTE, underlay=address_of(other))
        paths_of(site).set(RelayRow(index, INDEX_NEAR, RelayKind.FORWARDING, NEXT, index))
        store_counter(site, NEXT & 0xFFFF, int(made["counter"]) - 1)
        deliver(site, whole)
        site.reader().opener.poll(100)
        site.send()

        assert drained([other]) == [whole]
    assert content == whole[16:-16]


KERNELS: Final = [PYTHON, pytest.param(RUST, marks=pytest.mark.native)]


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("last", KERNELS)
@pytest.mark.parametrize("between", KERNELS)
@pytest.mark.parametrize("first", KERNELS)
def test_a_stream_goes_from_end_to_end_through_a_relay_whatever_kernels_they_have(
    first: str, between: str, last: str, cipher: Cipher
) -> None:
    offloads = replace(ALL, udp_gro=False)
    with ExitStack() as closing_all:
        near, relay, far = (
            closing_all.enter_context(closing(Site(offloads=offloads, kernel=named(name))))
            for name in (first, between, last)
        )
        to_near, to_far = TunnelIndex(0x0101_0005), TunnelIndex(0x0202_0006)
        path_near, path_far = RelayIndex(0x0303_0007), RelayIndex(0x0404_0008)
        legs = {"near": (KEY_OUT, KEY_IN), "far": (KEY_NEXT, KEY_NEXT[::-1])}
        # The relay's tunnels to both, and theirs to it.
        connect(relay, near.address(), cipher=cipher)
        add_peer(relay, to_near, legs["near"], remote_index=INDEX_NEAR, underlay=near.address())
        add_peer(relay, to_far, legs["far"], remote_index=INDEX_NEAR, underlay=far.address())
        for site, name, index, path in ((near, "near", to_near, path_near), (far, "far", to_far, path_far)):
            connect(site, relay.address(), cipher=cipher)
            site.tunnels.close(INDEX_NEAR)
            site.fields = replace(site.fields, remote_index=index)
            site.tunnels.open(site.fields, *reversed(legs[name]))
            paths_of(site).set(replace(TERMINAL, next_index=path))
        paths = paths_of(relay)
        paths.set(RelayRow(path_near, to_near, RelayKind.FORWARDING, to_far, ENDS))
        paths.set(RelayRow(path_far, to_far, RelayKind.FORWARDING, to_near, ENDS))
        # Their tunnel with each other, of which the relay knows nothing.
        behind = {"underlay": None, "relay": ENDS, "remote_index": BEHIND, "sources": None}
        near.peer = add_peer(near, BEHIND, (KEY_BEHIND_OUT, KEY_BEHIND_IN), **behind)
        far.peer = add_peer(far, BEHIND, (KEY_BEHIND_IN, KEY_BEHIND_OUT), **behind)
        plan = Plan(4, TCP, bytes(range(256)) * 140, 1248, options=TIMESTAMPS)
        near.allow(plan.one(0))
        far.allow(plan.one(0), inbound=True)
        for site in (near, relay, far):
            for each in site.udp:
                each.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
        sealer, forwarder, opener = near.reader().sealer, relay.reader().opener, far.reader().opener
        for _ in range(2):
            near.inside.send(plan.virtio() + plan.packet())
            assert sealer.poll(100) == plan.count
            near.send()
            assert forwarder.poll(100) == plan.count
            relay.send()
            assert opener.poll(100) == plan.count
            far.write()
            (whole,) = far.received()
            assert whole[10:] == plan.packet() or whole[-len(plan.payload) :] == plan.payload

        assert [site.drops() for site in (near, relay, far)] == [{}, {}, {}]
        for site in (near, relay, far):
            site.check_ledger()
