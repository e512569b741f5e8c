"""What a gateway does with datagrams, packets and time; two or three controllers joined by hand."""

import copy
import dataclasses
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import (
    FirewallConfig,
    FirewallRule,
    ListenConfig,
    LogLevel,
    PkiConfig,
    RecvErrorPolicy,
    TunConfig,
    TunnelsConfig,
)
from nebula_mp.control.actions import SendDatagram
from nebula_mp.newtypes import CertVersion, Counter, Instant, TunnelIndex, UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, Header, MessageType
from tests.control.pair import CONFIG, Datagram, Node, Wire, udp, with_config
from tests.control.state import state_of

STRANGER = UdpAddr(ip_address("203.0.113.66"), 6666)


def kinds(datagrams: list[Datagram]) -> list[str]:
    names = []
    for datagram in datagrams:
        header = Header.parse(datagram.data)
        stage = f"_{header.counter}" if header.type is MessageType.HANDSHAKE else ""
        names.append(f"{header.type.name.lower()}{stage}")
    return names


def sealed(kind: MessageType, index: int, counter: int = 9) -> bytes:
    return Header(kind, 0, TunnelIndex(index), Counter(counter)).encode() + bytes(16)


# ---- two gateways talk ----


def test_the_first_packet_starts_a_handshake_and_arrives_with_it() -> None:
    wire = Wire()
    a, b = wire.nodes

    packet = wire.send(a, b)
    seen = wire.settle()

    # Stage 1, its answer with a test on the candidate; the packet proves it, the test is answered.
    assert kinds(seen) == ["handshake_1", "handshake_2", "test", "message", "test"]
    assert b.delivered == [packet]
    assert Header.parse(seen[3].data).counter == 3


def test_packets_pass_both_ways_and_each_side_knows_the_other() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)

    [at_a], [at_b] = a.controller.hosts(), b.controller.hosts()

    assert [len(a.delivered), len(b.delivered)] == [1, 1]
    assert (at_a.name, at_a.remote, at_a.initiator) == ("host-2", b.at, True)
    assert (at_b.name, at_b.remote, at_b.initiator) == ("host-1", a.at, False)
    assert (at_a.local_index, at_a.remote_index) == (at_b.remote_index, at_b.local_index)


def test_a_host_that_is_not_in_the_static_map_is_answered_at_the_address_it_came_from() -> None:
    wire = Wire(static=False)
    a, b = wire.nodes
    wire.perform(a, a.controller.handle_resolved({b.address: [b.at]}, wire.now))

    wire.connect(a, b)

    assert [len(a.delivered), len(b.delivered)] == [1, 1]


def test_up_to_a_hundred_packets_wait_for_the_handshake_and_keep_their_order() -> None:
    wire = Wire()
    a, b = wire.nodes

    packets = [wire.send(a, b, bytes([number])) for number in range(120)]
    wire.settle()

    assert b.delivered == packets[:100]
    assert a.controller.stats["hostinfo.cached_packets.dropped"] == 20


def test_stage_1_is_repeated_to_the_byte_until_nobody_is_left_to_ask() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)

    seen = wire.advance(6, keep=lambda _: False)

    assert len(seen) == 10
    assert len({datagram.data for datagram in seen}) == 1
    assert "Handshake timed out" in a.log_lines()
    assert a.controller.next_timeout() is None


def test_a_repeated_stage_1_gets_the_stored_answer() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    stage1 = wire.queue[0]
    wire.settle()

    wire.inject(b, stage1.data, a.at)
    first = wire.queue.pop()
    wire.inject(b, stage1.data, a.at)
    second = wire.queue.pop()

    assert Header.parse(first.data).counter == 2
    assert first.data == second.data


def test_a_lost_stage_2_is_made_good_by_the_next_attempt() -> None:
    wire = Wire()
    a, b = wire.nodes
    packet = wire.send(a, b)
    wire.deliver_one()
    wire.queue.clear()

    wire.advance(0.2)

    assert b.delivered == [packet]


def test_an_ipv6_packet_is_not_routed_without_an_ipv6_overlay() -> None:
    wire = Wire()
    a, _ = wire.nodes

    wire.perform(
        a, a.controller.handle_tun_packet(udp(ip_address("fd00::1"), ip_address("fd00::2")), wire.now)
    )

    assert not wire.queue
    assert a.controller.stats["drop.tun.no_route"] == 1


# ---- both at once, and old tunnels ----


def test_simultaneous_handshakes_converge_to_one_tunnel() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    wire.send(b, a)
    wire.settle()

    for _ in range(30):
        wire.send(a, b)
        wire.send(b, a)
        wire.advance(1)

    primary_a = [host for host in a.controller.hosts() if host.primary]
    primary_b = [host for host in b.controller.hosts() if host.primary]
    assert [host.local_index for host in primary_a] == [host.remote_index for host in primary_b]
    assert len(a.controller.hosts()) == len(b.controller.hosts()) == 1
    assert len(a.delivered) == len(b.delivered) == 31


def test_a_restarted_peer_that_starts_talking_is_back_at_once() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)

    b = wire.join(2)
    wire.everybody_knows_everybody()
    wire.send(b, a)
    wire.settle()
    packet = wire.send(a, b)
    wire.settle()

    assert b.delivered == [packet]


def test_a_restarted_peer_that_is_talked_to_answers_with_recv_error_and_is_back_at_once() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    b = wire.join(2)
    wire.everybody_knows_everybody()

    wire.send(a, b, b"lost")
    seen = kinds(wire.settle())
    packet = wire.send(a, b, b"arrives")
    wire.settle()

    assert seen[:2] == ["message", "recv_error"]
    assert b.delivered == [packet]


def test_a_tunnel_that_a_restart_made_useless_does_not_become_primary_again() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    wire.advance(1)
    b = wire.join(2)
    wire.everybody_knows_everybody()
    wire.send(a, b, b"lost")
    wire.settle()

    packets = []
    for _ in range(30):
        packets.append(wire.send(a, b))
        wire.advance(0.5)

    assert b.delivered == packets
    assert b.controller.stats["drop.unknown_index"] == 2  # the lost packet, and the test that asked why


def test_a_peer_that_vanished_is_tested_then_forgotten() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    wire.advance(5)
    wire.send(a, b)

    seen = wire.advance(14.9, keep=lambda _: False)
    still_there = len(a.controller.hosts())
    wire.advance(0.2, keep=lambda _: False)

    assert "test" in kinds(seen)
    assert still_there == 1
    assert a.controller.hosts() == []
    assert ("Tunnel status", "dead") in [
        (event.message, event.fields.get("tunnelCheck", {}).get("state"))  # type: ignore[attr-defined]  # a dict
        for event in a.logs
    ]


def test_an_idle_tunnel_is_left_alone() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    wire.advance(11)

    seen = wire.advance(3600)

    assert seen == []
    assert len(a.controller.hosts()) == 1


def test_an_idle_tunnel_is_closed_at_both_ends_if_asked_for() -> None:
    wire = Wire(config=with_config(tunnels=TunnelsConfig(drop_inactive=True)))
    a, b = wire.nodes
    wire.connect(a, b)

    seen = wire.advance(620)

    assert "close_tunnel" in kinds(seen)
    assert a.controller.hosts() == b.controller.hosts() == []


def test_a_test_request_is_answered_with_its_payload() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None
    request = tunnel.try_seal(MessageType.TEST, 0, b"0123456789")
    assert request is not None

    wire.inject(b, request, a.at)
    reply = wire.queue.pop()

    header = Header.parse(reply.data)
    assert (header.type, header.subtype) == (MessageType.TEST, 1)
    opened = tunnel.session.receive.open(header.counter, reply.data[:16], reply.data[16:])
    assert opened == b"0123456789"


def test_stop_says_goodbye_and_the_peer_forgets_the_tunnel() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)

    wire.perform(a, a.controller.handle_stop(wire.now))
    seen = kinds(wire.settle())

    assert seen == ["close_tunnel"]
    assert b.controller.hosts() == []
    assert a.controller.next_timeout() is None


def test_at_most_five_tunnels_are_kept_for_an_address() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)

    for _ in range(8):
        a.controller._handshakes.start(b.address, wire.now)
        wire.perform(a, a.controller._core.outbox.drain())
        wire.settle()

    assert len(a.controller.hosts()) == len(b.controller.hosts()) == 5
    packet = wire.send(b, a, b"still works")
    wire.settle()
    assert a.delivered[-1] == packet


# ---- roaming ----


def test_a_peer_is_followed_to_its_new_address() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    new = UdpAddr(ip_address("198.51.100.9"), 999)

    wire.move(b, new)
    wire.send(b, a)
    wire.settle()
    packet = wire.send(a, b)
    wire.settle()

    assert a.controller.hosts()[0].remote == new
    assert b.delivered[-1] == packet


def test_copied_datagrams_do_not_move_a_tunnel_even_if_they_arrive_before_their_originals() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)

    for _ in range(20):
        wire.send(b, a)
        wire.inject(a, wire.queue[-1].data, STRANGER)
        wire.settle()
        wire.advance(0.3)

    assert a.controller.hosts()[0].remote == b.at
    assert len(a.delivered) == 21


def test_a_stage_2_that_came_as_a_copy_from_elsewhere_leads_to_the_peer_all_the_same() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    wire.deliver_one()

    wire.inject(a, wire.queue[0].data, STRANGER)
    wire.settle()
    packet = wire.send(a, b)
    wire.settle()

    assert a.controller.hosts()[0].remote == b.at
    assert b.delivered[-1] == packet


def test_a_lost_question_at_the_new_address_is_asked_again() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    new = UdpAddr(ip_address("198.51.100.9"), 999)
    wire.move(b, new)
    wire.send(b, a)
    wire.settle(keep=lambda datagram: datagram.to != new)

    for _ in range(3):
        wire.advance(0.1)
        wire.send(b, a)
        wire.settle()

    assert a.controller.hosts()[0].remote == new


def test_a_peer_that_moved_is_followed_on_every_tunnel() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    wire.send(b, a)
    wire.settle()  # each side uses the tunnel of the other's handshake
    new = UdpAddr(ip_address("198.51.100.9"), 999)

    wire.move(b, new)
    wire.send(b, a)
    wire.settle()

    assert [host.remote for host in a.controller.hosts()] == [new, new]


def test_a_tunnel_does_not_move_back_within_two_seconds() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    old, new = b.at, UdpAddr(ip_address("198.51.100.9"), 999)
    wire.send(b, a, b"on its way from the old address")
    late = wire.queue.pop()
    wire.move(b, new)
    wire.send(b, a)
    wire.settle()

    wire.inject(a, late.data, old)
    wire.settle()
    right_after = a.controller.hosts()[0].remote
    wire.advance(2)
    wire.move(b, old)
    wire.send(b, a)
    wire.settle()

    assert right_after == new
    assert a.controller.hosts()[0].remote == old


def test_a_change_of_our_own_address_is_announced_to_every_peer() -> None:
    wire = Wire(3)
    a, b, c = wire.nodes
    wire.connect(a, b)
    wire.connect(a, c)
    wire.move(a, UdpAddr(ip_address("198.51.100.9"), 999))

    wire.perform(a, a.controller.handle_underlay_change(wire.now))
    wire.settle()

    assert b.controller.hosts()[0].remote == c.controller.hosts()[0].remote == a.at


def test_two_peers_that_both_moved_find_each_other_when_one_name_is_looked_up_again() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    wire.move(a, UdpAddr(ip_address("198.51.100.1"), 11))
    wire.move(b, UdpAddr(ip_address("198.51.100.2"), 22))

    wire.perform(a, a.controller.handle_resolved({b.address: [b.at]}, wire.now))
    wire.settle()

    assert a.controller.hosts()[0].remote == b.at
    assert b.controller.hosts()[0].remote == a.at


def test_a_silent_peer_is_looked_for_at_every_address_it_may_have() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    wire.move(b, UdpAddr(ip_address("198.51.100.2"), 22))
    wire.perform(
        a, a.controller.handle_resolved({b.address: [UdpAddr(ip_address("192.0.2.2"), 4242), b.at]}, wire.now)
    )
    wire.advance(5)
    wire.send(a, b, b"lost")

    wire.advance(5)
    packet = wire.send(a, b)
    wire.settle()

    assert b.delivered[-1] == packet


def test_an_old_stage_1_does_not_use_up_the_reaction_to_the_recv_error_that_follows() -> None:
    """The peer restarted with a clock that went back: its stage 1 is refused, the test finds out why."""
    wire = Wire()
    a, b = wire.nodes
    wire.send(b, a)
    wire.settle()
    b = wire.join(2)
    wire.everybody_knows_everybody()
    wire.now = Instant(wire.now.mono, wire.now.wall_ns - 3600 * 10**9)

    wire.send(b, a)
    wire.settle()
    packet = wire.send(a, b)
    wire.settle()

    assert b.delivered[-1] == packet
    assert len(a.delivered) == 2


# ---- certificates ----


def test_a_renewed_certificate_reaches_the_peer_without_losing_the_tunnel() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    renewed = wire.pki.identity("host-1", "10.42.0.1/16", groups=("new",), key_of=a.identity)

    wire.perform(a, a.controller.handle_reload(CONFIG, renewed, wire.pki.pool(), wire.now))
    for _ in range(8):
        wire.connect(a, b)
        wire.advance(1)

    primary = next(host for host in b.controller.hosts() if host.primary)
    assert primary.groups == ("new",)
    assert len(b.delivered) == len(a.delivered) == 9


def test_an_address_that_a_reload_adds_is_ours_from_then_on() -> None:
    wire = Wire()
    a, _ = wire.nodes
    more = wire.pki.identity("host-1", "10.42.0.1/16", "fd00::1/64", key_of=a.identity)
    packets = [udp(ip_address("fd00::1"), ip_address(to)) for to in ("fd00::1", "fd00::2")]

    wire.perform(a, a.controller.handle_reload(CONFIG, more, wire.pki.pool(), wire.now))
    for packet in packets:
        wire.perform(a, a.controller.handle_tun_packet(packet, wire.now))

    assert a.controller.stats["drop.tun.own_address"] == 1
    assert a.controller.stats["handshake_manager.initiated"] == 1


def test_a_blocklisted_peer_is_cut_off_within_one_check() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    pool = wire.pki.pool(blocklist=[b.identity.newest.fingerprint])

    wire.perform(a, a.controller.handle_reload(CONFIG, a.identity, pool, wire.now))
    wire.advance(5)

    assert a.controller.hosts() == b.controller.hosts() == []


@pytest.mark.parametrize("disconnect", [True, False])
def test_an_expired_peer_is_cut_off_if_disconnect_invalid_is_on(disconnect: bool) -> None:
    config = with_config(pki=PkiConfig(ca="", cert="", key="", disconnect_invalid=disconnect))
    wire = Wire(config=config)
    a, b = wire.nodes
    wire.connect(a, b)
    expired = b.identity.newest.not_after + 1

    wire.now = Instant(wire.now.mono, expired * 10**9)
    wire.advance(5)

    assert (a.controller.hosts() == []) is disconnect


def test_a_peer_of_another_ca_is_refused_and_named_in_one_line_a_second() -> None:
    wire = Wire()
    a, b = wire.nodes
    foreign = wire.pki.other_ca().identity("host-2", "10.42.0.2/16")
    b = wire.join(2, identity=foreign)
    wire.everybody_knows_everybody()

    for _ in range(5):
        wire.send(b, a)
        wire.settle()
        wire.advance(0.15)

    refused = [
        event
        for event in a.logs
        if event.level is LogLevel.INFO and event.fields.get("reason") == "handshake_cert"
    ]
    assert len(refused) == 1
    assert "could not find ca" in str(refused[0].fields["error"])
    assert a.controller.hosts() == []


def test_when_another_host_answers_its_address_is_not_asked_again_and_it_hears_goodbye() -> None:
    wire = Wire(3)
    a, b, c = wire.nodes
    # a believes that c lives where b lives, and at c's own address
    wire.perform(a, a.controller.handle_resolved({c.address: [b.at]}, wire.now))

    wire.send(a, c)
    seen = kinds(wire.settle())
    wire.perform(a, a.controller.handle_resolved({c.address: [b.at, c.at]}, wire.now))
    wire.settle()

    assert "close_tunnel" in seen
    assert b.delivered == []
    assert len(c.delivered) == 1
    assert [host.name for host in a.controller.hosts()] == ["host-3"]


@pytest.mark.parametrize(
    ("a_versions", "b_versions", "used"),
    [
        pytest.param((1,), (1,), (1, 1), id="v1 both"),
        pytest.param((2,), (2,), (2, 2), id="v2 both"),
        pytest.param((1, 2), (1, 2), (1, 1), id="both own both: v1 first"),
        pytest.param((1, 2), (2,), (2, 2), id="peer owns only v2: we follow"),
        pytest.param((2,), (1, 2), (2, 2), id="initiator owns only v2"),
        pytest.param((1,), (2,), (1, 2), id="mixed"),
    ],
)
def test_hosts_meet_whatever_certificate_versions_they_own(
    a_versions: tuple[int, ...], b_versions: tuple[int, ...], used: tuple[int, int]
) -> None:
    wire = Wire()
    for number, versions in ((1, a_versions), (2, b_versions)):
        identity = wire.pki.identity(
            f"host-{number}", f"10.42.0.{number}/16", versions=tuple(CertVersion(each) for each in versions)
        )
        wire.join(number, identity=identity)
    wire.everybody_knows_everybody()
    a, b = wire.nodes

    for _ in range(8):
        wire.connect(a, b)
        wire.advance(1)

    [tunnel] = [
        t for t in a.controller._core.hostmap.tunnels(b.address) if a.controller._core.hostmap.is_primary(t)
    ]
    assert (tunnel.session.own_certificate.version, tunnel.certificate.version) == used
    assert len(a.delivered) == len(b.delivered) == 8


# ---- the firewall and the device ----


def test_without_an_inbound_rule_only_replies_come_in() -> None:
    closed = FirewallConfig(outbound=(FirewallRule(),))
    wire = Wire(config=with_config(firewall=closed))
    a, b = wire.nodes
    b = wire.join(2)
    wire.everybody_knows_everybody()
    wire.connect(a, b)

    reply = udp(b.address, a.address, b"hello")
    other = udp(b.address, a.address)
    unasked = bytearray(other)
    unasked[21] ^= 1  # another source port
    before = len(a.delivered)
    for packet in (reply, bytes(unasked)):
        wire.perform(b, b.controller.handle_tun_packet(packet, wire.now))
        wire.settle()

    assert a.delivered[before:] == [reply]
    assert a.controller.stats["drop.firewall.incoming.no_rule"] == 1


def test_a_peer_may_not_use_an_address_outside_its_certificate() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    tunnel = b.controller._core.hostmap.primary(a.address)
    assert tunnel is not None
    forged = tunnel.try_seal(MessageType.MESSAGE, 0, udp(ip_address("10.42.0.99"), a.address))
    assert forged is not None
    before = len(a.delivered)

    wire.inject(a, forged, b.at)

    assert len(a.delivered) == before
    assert a.controller.stats["drop.firewall.incoming.remote_address"] == 1


@pytest.mark.parametrize(
    ("to", "tun", "reason"),
    [
        pytest.param("10.42.0.1", TunConfig(), "own_address", id="ourselves"),
        pytest.param("8.8.8.8", TunConfig(), "no_route", id="outside the overlay"),
        pytest.param("10.42.255.255", TunConfig(drop_local_broadcast=True), "broadcast", id="broadcast"),
        pytest.param("224.0.0.251", TunConfig(drop_multicast=True), "multicast", id="multicast"),
    ],
)
def test_packets_that_go_nowhere_are_counted_under_their_reason(to: str, tun: TunConfig, reason: str) -> None:
    wire = Wire(config=with_config(tun=tun))
    a, _ = wire.nodes

    wire.perform(a, a.controller.handle_tun_packet(udp(a.address, ip_address(to)), wire.now))

    assert a.controller.stats[f"drop.tun.{reason}"] == 1
    assert not wire.queue


# ---- nothing unauthenticated changes anything ----


def connected() -> tuple[Wire, Node, Node, list[Datagram]]:
    """Two nodes with a live tunnel that b started, and everything that was on the wire."""
    wire = Wire()
    a, b = wire.nodes
    wire.send(b, a)
    seen = wire.settle()
    for _ in range(3):
        wire.send(a, b)
        wire.send(b, a)
        seen += wire.settle()
    return wire, a, b, seen


def test_no_copied_forged_or_random_datagram_changes_the_state() -> None:
    wire, a, b, seen = connected()
    to_a = [datagram.data for datagram in seen if datagram.to == a.at]
    index = a.controller.hosts()[0].local_index
    before = state_of(a.controller)

    attempts = list(to_a)  # replays
    for data in to_a:
        for at in range(0, len(data), 7):
            attempts.append(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
            attempts.append(data[:at])
    attempts += [
        sealed(kind, index, counter) for kind in MessageType for counter in (0, 1, 2, 5, 99, 2**64 - 1)
    ]
    for source in (b.at, STRANGER):
        for data in attempts:
            a.controller.handle_datagram(data, source, wire.now)

    assert state_of(a.controller) == before
    assert a.controller.hosts()[0].remote == b.at


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(list(MessageType)), st.integers(0, 2**64 - 1))
def test_random_bytes_change_nothing(noise: bytes, kind: MessageType, counter: int) -> None:
    wire, a, b, _ = CONNECTED
    index = a.controller.hosts()[0].local_index
    before = state_of(a.controller)

    for data in (noise, Header(kind, 0, index, Counter(counter)).encode() + noise):
        a.controller.handle_datagram(data, b.at, wire.now)

    assert state_of(a.controller) == before


CONNECTED = connected()


def stage_1_copies(wire: Wire, victim: Node, count: int) -> list[bytes]:
    """Stage 1 messages that carry `victim`'s genuine certificate, each with a fresh ephemeral key and time."""
    from random import Random  # noqa: PLC0415

    from nebula_mp.handshake.machine import Initiator  # noqa: PLC0415

    dice = Random(5)
    return [
        Initiator(
            victim.identity,
            CONFIG.cipher,
            CertVersion.V1 if CertVersion.V1 in victim.identity.certificates else CertVersion.V2,
            dice.randbytes,
            local_index=TunnelIndex(dice.randrange(1, 2**32)),
            time_ns=wire.now.wall_ns + (number + 1) * 1_000_000,
        ).stage1
        for number in range(count)
    ]


def test_ten_thousand_copied_replayed_and_random_stage_1_leave_a_live_tunnel_undisturbed() -> None:
    wire, a, b, seen = connected()
    replayed = next(datagram.data for datagram in seen if Header.parse(datagram.data).counter == 1)
    copies = stage_1_copies(wire, b, 500) * 20
    noise = [replayed[:40] + bytes([n & 255, n >> 8]) + replayed[42:] for n in range(10_000)]
    before = state_of(a.controller)
    largest = 0

    for copied, random in zip(copies, noise, strict=True):
        for data in (copied, replayed, random):
            a.controller.handle_datagram(data, STRANGER, wire.now)
        largest = max(largest, len(a.controller._core.hostmap.candidates()))

    assert state_of(a.controller) == before
    assert largest <= 5
    assert a.controller.hosts()[0].remote == b.at
    packet = wire.send(a, b, b"undisturbed")
    wire.settle()
    assert b.delivered[-1] == packet
    wire.advance(6)
    assert a.controller._core.hostmap.candidates() == ()


def test_a_copied_stage_1_from_the_right_address_does_not_move_traffic_either() -> None:
    wire, a, b, _ = connected()
    [copied] = stage_1_copies(wire, b, 1)

    actions = a.controller.handle_datagram(copied, b.at, wire.now)
    packet = wire.send(a, b)
    [datagram] = wire.queue

    assert sum(isinstance(action, SendDatagram) for action in actions) == 2  # the answer and a test
    tunnel = b.controller._core.hostmap.by_index(Header.parse(datagram.data).remote_index)
    assert tunnel is not None
    assert tunnel.proven
    wire.settle()
    assert b.delivered[-1] == packet


def test_candidates_from_one_address_do_not_push_out_those_from_elsewhere() -> None:
    wire, a, b, _ = connected()
    honest, *others = stage_1_copies(wire, b, 40)
    a.controller.handle_datagram(honest, b.at, wire.now)

    for data in others:
        a.controller.handle_datagram(data, STRANGER, wire.now)

    candidates = a.controller._core.hostmap.candidates()
    assert [candidate.remote for candidate in candidates] == [b.at] + 4 * [STRANGER]


def test_what_overtakes_the_stage_2_is_not_answered_with_recv_error() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    wire.deliver_one()
    stage2, test = wire.queue
    wire.queue.clear()

    wire.inject(a, test.data, b.at)
    after_the_test = len(wire.queue)
    wire.inject(a, stage2.data, b.at)
    wire.settle()

    assert after_the_test == 0
    assert a.controller.stats["drop.early"] == 1
    assert len(b.delivered) == 1


def test_an_old_stage_1_is_not_answered_and_costs_one_test_a_second() -> None:
    wire, a, b, _ = connected()
    wire.now = Instant(wire.now.mono, wire.now.wall_ns - 10**12)
    old = stage_1_copies(wire, b, 50)

    sent = [action for data in old for action in a.controller.handle_datagram(data, STRANGER, wire.now)]

    datagrams = [action for action in sent if isinstance(action, SendDatagram)]
    assert [Header.parse(action.data).type for action in datagrams] == [MessageType.TEST]
    assert datagrams[0].to == b.at
    assert a.controller._core.hostmap.candidates() == ()


def test_a_stage_2_with_an_untrusted_certificate_does_not_end_our_handshake() -> None:
    """Whoever sees our stage 1 can answer it with a key of his own; the genuine answer must still count."""
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    stage1 = wire.queue[0]
    forger = Wire()
    mallory = forger.join(2, identity=wire.pki.other_ca().identity("host-2", "10.42.0.2/16"))
    mallory.controller._core.pool = wire.pki.pool()
    forger.inject(mallory, stage1.data, a.at)
    forged = forger.queue[0]

    wire.inject(a, forged.data, b.at)
    wire.settle()

    assert a.controller.stats["drop.handshake_cert"] == 1
    assert len(b.delivered) == 1


# ---- recv_error ----


def test_a_recv_error_from_the_peers_address_starts_one_handshake_and_keeps_the_tunnel() -> None:
    wire, a, b, _ = connected()
    index = a.controller.hosts()[0].remote_index
    error = Header(MessageType.RECV_ERROR, 0, index, Counter(0)).encode()

    for _ in range(100):
        wire.inject(a, error, b.at)

    assert kinds(list(wire.queue)) == ["test", "handshake_1"]
    assert len(a.controller.hosts()) == 1


@pytest.mark.parametrize(
    ("policy", "source", "reacts"),
    [
        pytest.param(RecvErrorPolicy.ALWAYS, "peer", True, id="always, from the peer"),
        pytest.param(RecvErrorPolicy.ALWAYS, "stranger", False, id="always, from a stranger"),
        pytest.param(RecvErrorPolicy.NEVER, "peer", False, id="never"),
        pytest.param(RecvErrorPolicy.PRIVATE, "peer", False, id="private, from a public address"),
    ],
)
def test_recv_error_is_believed_only_from_the_peers_address_and_as_configured(
    policy: RecvErrorPolicy, source: str, reacts: bool
) -> None:
    wire = Wire(config=with_config(listen=ListenConfig(accept_recv_error=policy)))
    a, b = wire.nodes
    wire.connect(a, b)
    index = a.controller.hosts()[0].remote_index

    wire.inject(
        a, sealed(MessageType.RECV_ERROR, index)[:HEADER_BYTES], b.at if source == "peer" else STRANGER
    )

    assert bool(wire.queue) is reacts


def test_at_most_a_hundred_recv_errors_are_sent_a_second_and_none_is_larger_than_its_cause() -> None:
    wire = Wire()
    a, _ = wire.nodes

    for number in range(1000):
        wire.inject(a, sealed(MessageType.MESSAGE, 0x10000 + number)[: 16 + number % 20], STRANGER)
    first_second = len(wire.queue)
    wire.set_time(wire.now.mono + 1)
    wire.inject(a, sealed(MessageType.MESSAGE, 7), STRANGER)

    assert first_second == 100
    assert len(wire.queue) == 101
    assert {len(datagram.data) for datagram in wire.queue} == {16}
    assert Header.parse(wire.queue[-1].data).remote_index == 7


def test_recv_error_is_not_sent_if_the_operator_says_never() -> None:
    wire = Wire(config=with_config(listen=ListenConfig(send_recv_error=RecvErrorPolicy.NEVER)))
    a, _ = wire.nodes

    wire.inject(a, sealed(MessageType.MESSAGE, 7), STRANGER)

    assert not wire.queue


# ---- reasons ----


@pytest.mark.parametrize(
    ("data", "source", "counter"),
    [
        pytest.param(b"", STRANGER, "messages.rx.punchy", id="empty punch"),
        pytest.param(b"\x01", STRANGER, "messages.rx.punchy", id="one-byte punch"),
        pytest.param(bytes(15), STRANGER, "drop.short", id="short"),
        pytest.param(b"\x21" + bytes(31), STRANGER, "drop.version", id="version 2"),
        pytest.param(b"\x17" + bytes(31), STRANGER, "drop.type", id="type 7"),
        pytest.param(b"\x11\x09" + bytes(30), STRANGER, "drop.type", id="subtype 9"),
        pytest.param(
            sealed(MessageType.TEST, 1), UdpAddr(ip_address("10.42.9.9"), 1), "drop.looped", id="looped"
        ),
        pytest.param(sealed(MessageType.TEST, 1), STRANGER, "drop.unknown_index", id="unknown index"),
        pytest.param(b"\x11\x01" + bytes(30), STRANGER, "drop.relay_index", id="relay frame"),
        pytest.param(
            sealed(MessageType.HANDSHAKE, 9, 1), STRANGER, "drop.handshake_header", id="stage 1 with an index"
        ),
        pytest.param(
            sealed(MessageType.HANDSHAKE, 9, 2), STRANGER, "drop.handshake_unknown", id="stage 2 for nobody"
        ),
        pytest.param(sealed(MessageType.HANDSHAKE, 0, 1), STRANGER, "drop.handshake", id="stage 1 of zeros"),
    ],
)
def test_each_bad_datagram_counts_under_exactly_one_reason(
    data: bytes, source: UdpAddr, counter: str
) -> None:
    wire = Wire()
    a, _ = wire.nodes
    before = copy.copy(a.controller.stats)

    a.controller.handle_datagram(data, source, wire.now)

    a.controller.stats.subtract(before)
    changed = {name: count for name, count in a.controller.stats.items() if count}
    changed.pop("messages.tx.recv_error", None)
    assert changed == {counter: 1}


@pytest.mark.parametrize("cut", [0, 1, 15])
def test_a_sealed_datagram_without_room_for_a_tag_is_truncated(cut: int) -> None:
    wire, a, b, _ = connected()
    index = a.controller.hosts()[0].local_index

    a.controller.handle_datagram(sealed(MessageType.MESSAGE, index)[: HEADER_BYTES + cut], b.at, wire.now)

    assert a.controller.stats["drop.truncated"] == 1


def test_replayed_and_forged_datagrams_are_told_apart() -> None:
    wire, a, b, seen = connected()
    last = [datagram.data for datagram in seen if datagram.to == a.at][-1]

    a.controller.handle_datagram(last, b.at, wire.now)
    a.controller.handle_datagram(
        sealed(MessageType.MESSAGE, a.controller.hosts()[0].local_index, 999), b.at, wire.now
    )

    assert a.controller.stats["drop.replay"] == 1
    assert a.controller.stats["drop.auth"] == 1


def test_an_exhausted_tunnel_sends_nothing_and_goes_at_its_next_check() -> None:
    wire, a, b, _ = connected()
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None
    tunnel.counter = Counter(2**64 - 1 - 2**40)

    wire.send(a, b)
    sent = len(wire.queue)
    wire.advance(5)

    assert sent == 0
    assert a.controller.stats["messages.tx.exhausted"] >= 1
    assert a.controller.hosts() == []


def test_a_tunnel_near_its_counter_threshold_is_replaced() -> None:
    wire, a, b, _ = connected()
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None
    tunnel.counter = Counter(2**34)

    for _ in range(8):
        wire.send(a, b)
        wire.send(b, a)
        wire.advance(1)

    assert a.controller._core.hostmap.primary(b.address) is not tunnel
    assert "message counter threshold" in [event.fields.get("reason") for event in a.logs]


def test_the_state_used_above_sees_every_field_that_matters() -> None:
    """Guard against a comparison that compares nothing."""
    wire, a, b, _ = connected()
    before = state_of(a.controller)
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None

    changes = 0
    for change in (
        lambda: tunnel.window.update(5000),
        lambda: setattr(tunnel, "remote", STRANGER),
        lambda: setattr(tunnel.traffic, "saw_in", not tunnel.traffic.saw_in),
        lambda: setattr(tunnel, "roamed_from", STRANGER),
        lambda: a.controller._core.remotes.block(b.address, STRANGER),
        lambda: a.controller.handle_tun_packet(udp(a.address, ip_address("10.42.7.7")), wire.now),
        lambda: setattr(tunnel, "session", dataclasses.replace(tunnel.session, peer_time_ns=1)),
    ):
        change()
        after = state_of(a.controller)
        changes += after != before
        before = after
    assert changes == 7
    assert replace(CONFIG) == CONFIG
