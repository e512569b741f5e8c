"""Peers that send on a new tunnel from their answer on, as released ones do: nothing of it is lost."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from nebula_mp.control.actions import Action, HandOver, SendDatagram
from nebula_mp.newtypes import UdpAddr
from nebula_mp.wire.header import MESSAGE_IP, STAGE_2_COUNTER, Header, MessageType
from tests.sim.network import CALM, Weather
from tests.sim.world import Host, Letter, World

SEEDS = pytest.mark.parametrize("seed", range(20))
_AT_ONCE = 20


class HastyWorld(World):
    """Behind each answer to a stage 1 go some packets on the tunnel that it makes."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.hasty: list[Letter] = []
        self.handed_over = 0
        super().__init__(seed, weather=weather)

    def _perform(self, host: Host, actions: Iterable[Action]) -> None:
        actions = list(actions)
        super()._perform(host, actions)
        for action in actions:
            match action:
                case SendDatagram(data, to):
                    header = Header.parse(data)
                    if header.type is MessageType.HANDSHAKE and header.counter == STAGE_2_COUNTER:
                        self._go_on(host, header, to)
                case HandOver():
                    self.handed_over += 1

    def _go_on(self, host: Host, header: Header, to: UdpAddr) -> None:
        assert host.controller is not None
        assert host.plane is not None
        (other,) = (each for each in self.hosts if each is not host)
        tunnel = host.controller._core.hostmap.by_remote_index(header.remote_index)[-1]
        for _ in range(_AT_ONCE):
            letter = self.write(host, other)
            self.hasty.append(letter)
            sealed = host.plane.seal(tunnel, MessageType.MESSAGE, MESSAGE_IP, letter.packet)
            self.network.send(host.name, host.at, to, sealed)


@SEEDS
def test_nothing_that_overtakes_the_answer_is_lost_or_comes_twice(seed: int) -> None:
    world = HastyWorld(seed, replace(CALM, latency_s=(0.001, 0.08), duplicate=0.3))
    a, b = world.hosts
    world.talk(a, b, every=0.2, until=20)
    world.run(3)
    for host in (a, b):
        world.renew(host)
        world.run(8)
    world.run(3)

    assert len(world.hasty) >= 3 * _AT_ONCE, "the first handshake, and a renewal by each"
    assert world.handed_over >= _AT_ONCE
    assert [letter for letter in world.hasty if letter.arrived is None] == []
    for host in world.hosts:
        assert host.controller is not None
        assert host.controller.stats["drop.early"] == 0
        assert len(host.controller._handshakes._early) == 0
    world.check_tables()
