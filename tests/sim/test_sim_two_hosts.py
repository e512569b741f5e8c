"""Two hosts and one thing that goes wrong at a time."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from nebula_mp.newtypes import Seconds, UdpAddr
from tests.sim.network import CALM, STRANGER, Message, Weather
from tests.sim.world import CONFIG, Host, World

FAST = Weather(latency_s=(0.01, 0.01))
SEEDS = pytest.mark.parametrize("seed", range(20))


def sent(world: World, source: Host, *, after: float = 0.0) -> list[Message]:
    return [
        row
        for row in world.network.trace
        if isinstance(row, Message) and row.sender == source.name and row.sent >= after
    ]


def test_the_first_packet_arrives_after_one_handshake() -> None:
    world = World(1, weather=FAST)
    a, b = world.hosts

    letter = world.send(a, b)
    world.run(0.5)

    assert letter.arrived == pytest.approx(0.03)  # stage 1, stage 2, the packet
    assert [message.data[0] for message in sent(world, a)][:2] == [0x10, 0x11]
    assert world.is_one_tunnel(a, b)
    world.check_delivery([(a, b)], within=0.02)
    world.check_tables()


def test_all_packets_that_wait_for_the_handshake_arrive_once_and_in_order() -> None:
    world = World(1, weather=FAST)
    a, b = world.hosts

    letters = [world.send(a, b, size) for size in range(100)]
    world.run(0.5)

    assert all(letter.arrived is not None for letter in letters)
    assert letters[0].arrived == letters[-1].arrived


def test_packets_pass_at_any_size_up_to_the_mtu() -> None:
    world = World(1)
    a, b = world.hosts

    letters = [world.send(*way, size) for size in (0, 1, 500, 1264) for way in ((a, b), (b, a))]
    world.run(1)

    assert all(letter.arrived is not None for letter in letters)


def test_over_an_ipv6_underlay() -> None:
    world = World(1)
    a, b = world.hosts
    for host in world.hosts:
        world.move(host, world.fresh_addr(version=6), noticed=False)
    world.run(6)  # names are looked up again

    world.check_delivery([(a, b)], within=1)
    world.check_agreement([(a, b)])


@SEEDS
def test_both_begin_at_the_same_time_and_end_on_one_tunnel(seed: int) -> None:
    world = World(seed)
    a, b = world.hosts

    letters = [world.send(a, b), world.send(b, a)]
    world.run(0.5)
    assert all(letter.arrived is not None for letter in letters)

    world.talk(a, b, every=0.5, until=30)
    world.run(19.5)

    world.check_agreement([(a, b)])
    world.check_one_tunnel([(a, b)], within=0.1)
    world.check_tables()
    assert all(letter.arrived is not None for letter in world.letters if letter.sent < world.now - 0.1)


@SEEDS
def test_no_packet_is_delivered_twice_when_every_datagram_is_duplicated_and_overtaken(seed: int) -> None:
    world = World(
        seed, weather=replace(CALM, latency_s=(0.001, 0.2), duplicate=1.0, straggle=0.3, straggle_s=1.0)
    )
    a, b = world.hosts
    world.talk(a, b, every=0.05, until=10)

    world.run(13)

    # Duplicates that were delivered would have failed the run at that moment.
    assert all(letter.arrived is not None for letter in world.letters)
    assert sum(host.controller.stats["drop.replay"] for host in world.hosts if host.controller) > 300


@SEEDS
def test_copies_from_a_stranger_and_damaged_datagrams_do_no_lasting_harm(seed: int) -> None:
    world = World(seed, weather=replace(CALM, corrupt=0.2, copy=0.5, copy_s=3.0))
    a, b = world.hosts
    world.talk(a, b, every=0.1, until=30)

    world.run(17)
    assert any(message.source == STRANGER and message.arrived for message in sent(world, a))
    assert sum(host.controller.stats["drop.auth"] for host in world.hosts if host.controller) > 20
    assert sum(host.controller.stats["drop.replay"] for host in world.hosts if host.controller) > 20
    assert sum(letter.arrived is not None for letter in world.letters) > 20

    # Whoever keeps a datagram back and sends it on from elsewhere moves the tunnel there, as Nebula
    # has it; that is no worse than keeping all of them back, and ends when he ends.
    world.network.weather = CALM
    world.run(12)
    world.check_agreement([(a, b)])
    world.check_one_tunnel([(a, b)], within=0.1)
    world.check_delivery([(a, b)], within=0.1)


@SEEDS
def test_half_of_all_datagrams_may_be_lost_during_the_handshake(seed: int) -> None:
    world = World(seed, weather=replace(CALM, loss=0.5))
    a, b = world.hosts

    world.talk(a, b, every=1.0, until=60)
    world.run_until(lambda: world.is_one_tunnel(a, b), within=30)

    world.network.weather = CALM
    world.check_delivery([(a, b)], within=1)


@pytest.mark.parametrize("ending", ["crash", "stop"])
@SEEDS
def test_a_host_that_restarted_is_back_as_soon_as_either_side_sends(seed: int, ending: str) -> None:
    world = World(seed)
    a, b = world.hosts
    world.talk(a, b, every=1.0, until=60)
    world.run(7)
    world.check_delivery([(a, b)], within=0.1)

    (world.crash if ending == "crash" else world.stop)(a)
    world.run(3)
    assert ending == "crash" or world.status(b, a) is None
    world.start(a)

    world.run(3)
    world.check_delivery([(a, b)], within=0.1)
    world.check_agreement([(a, b)])
    world.run(20)
    world.check_agreement([(a, b)])
    world.check_one_tunnel([(a, b)], within=0.1)
    world.check_tables()


@SEEDS
def test_a_host_whose_clock_went_back_in_a_restart_is_back_at_once(seed: int) -> None:
    world = World(seed)
    a, b = world.hosts
    world.talk(a, b, every=1.0, until=60)
    world.run(7)

    world.crash(a)
    a.clock_ahead_s -= 3600
    world.start(a)
    world.run(5)

    world.check_delivery([(a, b)], within=0.1)


@pytest.mark.parametrize("noticed", [True, False])
@SEEDS
def test_a_host_that_gets_another_address_is_followed(seed: int, noticed: bool) -> None:
    world = World(seed)
    a, b = world.hosts
    world.talk(a, b, every=0.5, until=60)
    world.run(7)

    world.move(a, world.fresh_addr(), noticed=noticed)
    world.run(1)

    world.check_agreement([(a, b)])
    world.check_delivery([(a, b)], within=0.1)


@SEEDS
def test_two_hosts_that_both_moved_unnoticed_find_each_other_through_their_names(seed: int) -> None:
    world = World(seed)
    a, b = world.hosts
    world.talk(a, b, every=0.5, until=60)
    world.run(7)

    for host in (a, b):
        world.move(host, world.fresh_addr(), noticed=False)
    world.run(10)

    world.check_agreement([(a, b)])
    world.check_delivery([(a, b)], within=0.1)


@SEEDS
def test_a_host_at_the_address_of_another_is_not_mistaken_for_it(seed: int) -> None:
    world = World(seed, 3)
    a, b, c = world.hosts
    for one, other in ((a, b), (a, c)):
        world.talk(one, other, every=0.5, until=60)
    world.run(7)

    old_b, old_c = b.at, c.at
    world.move(b, world.fresh_addr(), noticed=False)
    world.move(c, old_b, noticed=False)
    world.move(b, old_c, noticed=False)
    world.run(10)

    world.check_agreement([(a, b), (a, c)])
    world.check_delivery([(a, b), (a, c)], within=0.1)


def test_a_silent_peer_is_given_up_after_the_configured_time() -> None:
    timers = replace(
        CONFIG.timers, connection_alive_interval=Seconds(2), pending_deletion_interval=Seconds(4)
    )
    world = World(1, config=replace(CONFIG, timers=timers))
    a, b = world.hosts
    world.talk(a, b, every=0.5, until=60)
    world.run(5)

    world.crash(b)
    took = world.run_until(lambda: world.status(a, b) is None, within=2 + 2 + 4.1)

    assert took > 2 + 4 - 0.5  # a packet of b may have come up to 0.5 s before, or just before a check
    world.check_tables()


def test_an_idle_tunnel_is_kept_and_nothing_is_sent_through_it() -> None:
    world = World(1)
    a, b = world.hosts
    world.send(a, b)
    world.send(b, a)
    world.run(30)
    before = len(world.network.trace)

    world.run(3600)

    assert len(world.network.trace) == before
    world.check_delivery([(a, b)], within=0.1)


def test_nobody_answers_at_an_address_where_nobody_is() -> None:
    world = World(1)
    a, b = world.hosts
    world.crash(b)

    world.send(a, b)
    world.run(10)

    stage1 = sent(world, a)
    assert len({message.data for message in stage1}) == 1
    assert [round(message.sent, 1) for message in stage1] == [0, 0.1, 0.3, 0.6, 1, 1.5, 2.1, 2.8, 3.6, 4.5]
    world.check_tables()
    assert a.controller is not None
    assert not a.controller._handshakes._open


def test_underlay_addresses_are_whatever_the_network_says() -> None:
    world = World(1)
    a, b = world.hosts
    at = UdpAddr(ip_address("192.0.2.7"), 1)
    world.move(a, at, noticed=False)

    world.check_delivery([(a, b)], within=1)

    status = world.status(b, a)
    assert status is not None
    assert status.remote == at
