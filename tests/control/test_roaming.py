"""Peers, and we ourselves, that get another underlay address."""

from ipaddress import ip_address

from nebula_mp.newtypes import Instant, UdpAddr
from tests.control.pair import STRANGER, Wire


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
