"""The controller and the data path: what is let through without asking, what comes up, who goes on after a death."""

from ipaddress import ip_address

import pytest

from nebula_mp.config.model import FirewallConfig, FirewallRule
from nebula_mp.control.actions import HandOver, WriteTun
from nebula_mp.control.controller import Controller
from nebula_mp.control.plane import Opened, Saved
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.newtypes import Seconds, TunnelIndex, UdpAddr
from nebula_mp.wire.header import MESSAGE_IP, TEST_REPLY, TEST_REQUEST, Header, MessageType
from nebula_mp.wire.ip import parse_flow
from tests.control.pair import ANY, STRANGER, Node, Wire, udp, with_config
from tests.support.plane import LocalPlane

ELSEWHERE = UdpAddr(ip_address("192.0.2.77"), 4242)


def connected() -> tuple[Wire, Node, Node]:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    return wire, a, b


def index_of(node: Node) -> TunnelIndex:
    (host,) = node.controller.hosts()
    return host.local_index


def test_an_allowed_flow_is_let_through_by_both_ends_after_its_first_packet() -> None:
    wire, a, b = connected()
    del a.plane.allowed[:], b.plane.allowed[:]

    packet = wire.send(a, b)
    wire.settle()

    assert a.plane.allowed == [parse_flow(packet, inbound=False)]
    assert b.plane.allowed == [parse_flow(packet, inbound=True)]


@pytest.mark.parametrize("outbound", [True, False])
def test_a_refused_flow_is_refused_in_its_direction_only(outbound: bool) -> None:
    none = FirewallConfig(inbound=ANY.inbound if outbound else (), outbound=() if outbound else ANY.outbound)
    wire = Wire(config=with_config(firewall=none))
    a, b = wire.nodes
    wire.send(a, b)
    wire.settle()

    refused = [direction for _, direction in (*a.plane.refused, *b.plane.refused)]

    assert set(refused) == {Direction.OUTBOUND if outbound else Direction.INBOUND}
    assert a.delivered == b.delivered == []


def test_packets_to_nowhere_are_refused_without_a_tunnel() -> None:
    wire = Wire()
    a, _ = wire.nodes
    packet = udp(a.address, ip_address("8.8.8.8"))

    wire.perform(a, a.controller.handle_tun_packet(packet, wire.now))

    assert a.plane.refused == [(parse_flow(packet, inbound=False), Direction.OUTBOUND)]


def test_a_packet_that_the_data_path_opened_is_delivered_through_the_owners_queue() -> None:
    wire, a, b = connected()
    packet = udp(b.address, a.address, b"opened elsewhere")
    a.plane.workers = 3

    actions = a.controller.handle_opened(
        index_of(a), Opened(MessageType.MESSAGE, MESSAGE_IP, packet, b.at), wire.now
    )

    assert actions == [WriteTun(packet, index_of(a) % 3)]


def test_a_message_of_a_tunnel_that_was_closed_meanwhile_is_dropped_without_a_word() -> None:
    wire, a, b = connected()
    message = Opened(MessageType.MESSAGE, MESSAGE_IP, udp(b.address, a.address), b.at)

    actions = a.controller.handle_opened(TunnelIndex(index_of(a) ^ 1 << 20), message, wire.now)

    assert not [action for action in actions if isinstance(action, WriteTun)]
    assert a.controller.stats["drop.unknown_index"] == 1


def test_a_peer_that_moved_is_asked_there_and_followed_when_it_answers() -> None:
    wire, a, b = connected()

    wire.perform(a, a.controller.handle_moved(index_of(a), ELSEWHERE, wire.now))
    (question,) = wire.queue
    wire.queue.clear()
    before = a.controller.hosts()[0].remote
    reply = Opened(MessageType.TEST, TEST_REPLY, b"", ELSEWHERE)
    wire.perform(a, a.controller.handle_opened(index_of(a), reply, wire.now))

    header = Header.parse(question.data)
    assert (question.to, header.type, header.subtype) == (ELSEWHERE, MessageType.TEST, TEST_REQUEST)
    assert before == b.at
    assert a.controller.hosts()[0].remote == ELSEWHERE


def test_a_datagram_of_a_known_tunnel_is_never_judged_by_the_controller() -> None:
    wire, a, b = connected()
    tunnel = b.controller._core.hostmap.primary(a.address)
    assert tunnel is not None
    honest = b.plane.seal(tunnel, MessageType.MESSAGE, MESSAGE_IP, udp(b.address, a.address))

    actions = a.controller.handle_datagram(honest, STRANGER, wire.now)

    assert actions == [HandOver(index_of(a), honest, STRANGER)]
    assert not a.controller.stats["drop.early"]


def test_new_rules_make_the_data_path_ask_again_and_the_same_ones_do_not() -> None:
    wire, a, _ = connected()
    core = a.controller._core
    other = with_config(firewall=FirewallConfig(inbound=(FirewallRule(),)))

    a.controller.handle_reload(core.config, core.identity, core.pool, wire.now)
    same = a.plane.forgotten
    a.controller.handle_reload(other, core.identity, core.pool, wire.now)

    assert (same, a.plane.forgotten) == (0, 1)


def test_a_flow_that_lives_in_the_data_path_alone_is_not_forgotten() -> None:
    wire = Wire(config=with_config(firewall=FirewallConfig(outbound=(FirewallRule(),))))
    a, b = wire.nodes
    wire.join(2, config=with_config(firewall=ANY))
    b = wire.nodes[1]
    wire.everybody_knows_everybody()
    wire.send(a, b)
    wire.settle()
    flow = parse_flow(udp(a.address, b.address), inbound=False)
    reply = Opened(MessageType.MESSAGE, MESSAGE_IP, udp(b.address, a.address, b"reply"), b.at)

    wire.set_time(wire.now.mono + 179)
    a.controller.handle_displaced([(flow, wire.now.mono)])
    wire.set_time(wire.now.mono + 179)
    alive = a.controller.handle_opened(index_of(a), reply, wire.now)
    wire.set_time(wire.now.mono + 181)
    rested = a.controller.handle_opened(index_of(a), reply, wire.now)

    assert [action for action in alive if isinstance(action, WriteTun)]
    assert not [action for action in rested if isinstance(action, WriteTun)]


def saved_by(node: Node) -> list[Saved]:
    hostmap = node.controller._core.hostmap
    return [Saved(tunnel.session, tunnel.remote, hostmap.is_first(tunnel)) for tunnel in hostmap]


def test_a_successor_goes_on_with_the_tunnels_and_nobody_shakes_hands() -> None:
    wire, a, b = connected()
    before = a.controller.hosts()
    core = a.controller._core
    saved = saved_by(a)

    a.controller = Controller(
        core.config, core.identity, core.pool, core.entropy, plane=a.plane, now=wire.now
    )
    wire.perform(a, a.controller.restore(saved, wire.now))
    after = a.controller.hosts()
    wire.everybody_knows_everybody()
    wire.send(a, b, b"after")
    wire.send(b, a, b"after")
    seen = wire.advance(60)

    assert after == before
    assert a.delivered[-1] == udp(b.address, a.address, b"after")
    assert b.delivered[-1] == udp(a.address, b.address, b"after")
    assert not [each for each in seen if Header.parse(each.data).type is MessageType.HANDSHAKE]


def test_of_several_tunnels_a_successor_uses_the_one_that_was_used() -> None:
    wire, a, b = connected()
    core = a.controller._core
    a.controller._handshakes.start(b.address, wire.now)
    wire.perform(a, core.outbox.drain())
    wire.settle()
    first, second = saved_by(a)
    old, new = first.session.local_index, second.session.local_index
    first, second = (
        Saved(each.session, each.remote, primary=each.session.local_index == old) for each in (first, second)
    )

    successor = Controller(core.config, core.identity, core.pool, core.entropy, plane=a.plane, now=wire.now)
    successor.restore([first, second], wire.now)

    assert [(host.local_index, host.primary) for host in successor.hosts()] == [(old, True), (new, False)]
    assert isinstance(core.plane, LocalPlane)
    assert core.plane.routes[b.address] == old
    fresh = successor._core.hostmap.indexes.try_allocate()
    assert fresh is not None
    assert fresh & 0xFFFF not in {old & 0xFFFF, new & 0xFFFF}
    assert Seconds(0) < (successor.next_timeout() or Seconds(0)) - wire.now.mono <= 5
