"""What a gateway does with packets, peers and time; two or three controllers joined by hand."""

from ipaddress import ip_address

import pytest

from nebula_mp.config.model import (
    FirewallConfig,
    FirewallRule,
    TunConfig,
    TunnelsConfig,
)
from nebula_mp.wire.header import Header, MessageType
from tests.control.pair import Wire, kinds, udp, with_config

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
    request = a.plane.seal(tunnel, MessageType.TEST, 0, b"0123456789")

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
    forged = b.plane.seal(tunnel, MessageType.MESSAGE, 0, udp(ip_address("10.42.0.99"), a.address))
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
