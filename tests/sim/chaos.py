"""A minute of faults: what may go wrong with hosts and with the network between them.

Data flow: tests/sim -> [sim.chaos] -> sim.world
Every fault ends by itself; `calm_down` ends those that have not.
"""

from collections.abc import Callable
from functools import partial

from tests.sim.network import CALM, Weather
from tests.sim.world import Host, World

WEATHER_CHANGES_EVERY_S = 5.0
_CLOCK_STEP_S = 3600.0


class Chaos:
    """Troubles the hosts of a world until time `until`; `every_s` is the mean time between incidents."""

    def __init__(self, world: World, *, until: float, every_s: float) -> None:
        self._world = world
        self._until = until
        self._every_s = every_s
        self._incidents: list[Callable[[Host], None]] = [
            self._crash,
            self._stop,
            self._go_offline,
            partial(self._move, noticed=True),
            partial(self._move, noticed=False),
            self._swap,
        ]
        self._next_incident()
        self._change_weather()
        world.network.call_at(until, self._calm_down)

    def _next_incident(self) -> None:
        world = self._world
        when = world.now + world.random.expovariate(1 / self._every_s)
        if when < self._until:
            world.network.call_at(when, self._strike)

    def _strike(self) -> None:
        random = self._world.random
        host = random.choice(self._world.hosts)
        random.choice(self._incidents)(host)
        self._next_incident()

    def _change_weather(self) -> None:
        """From fair to foul; a fifth of the time half of all datagrams are lost, or nearly so."""
        world, random = self._world, self._world.random
        if world.now >= self._until:
            return
        # What is held back comes out before the end: a fault lasts as long as its last datagram is on the way.
        delays = world.now + WEATHER_CHANGES_EVERY_S < self._until
        world.network.weather = Weather(
            latency_s=(0.002, random.choice((0.01, 0.1, 0.4))),
            loss=random.choice((0.0, 0.02, 0.1, 0.3, 0.5)),
            duplicate=random.choice((0.0, 0.1)),
            straggle=random.choice((0.0, 0.05)) * delays,
            straggle_s=3.0,
            corrupt=random.choice((0.0, 0.02)),
            copy=random.choice((0.0, 0.05)) * delays,
            copy_s=2.0,
        )
        world.network.call_at(world.now + WEATHER_CHANGES_EVERY_S, self._change_weather)

    def _calm_down(self) -> None:
        world = self._world
        world.network.weather = CALM
        for host in world.hosts:
            if not host.online:
                world.set_online(host, online=True)
            if host.controller is None:
                world.start(host)

    # ---- incidents ----

    def _crash(self, host: Host) -> None:
        if host.controller is not None:
            self._world.crash(host)
            self._start_later(host)

    def _stop(self, host: Host) -> None:
        if host.controller is not None:
            self._world.stop(host)
            self._start_later(host)

    def _start_later(self, host: Host) -> None:
        """Start again within three seconds, a fifth of the time with a clock that was set meanwhile."""
        random = self._world.random
        if random.random() < 0.2:
            host.clock_ahead_s += random.uniform(-_CLOCK_STEP_S, _CLOCK_STEP_S)
        self._later(random.uniform(0, 3), partial(self._start, host))

    def _start(self, host: Host) -> None:
        if host.controller is None:
            self._world.start(host)

    def _go_offline(self, host: Host) -> None:
        """For any time up to 20 s: long enough that peers give the tunnel up now and then."""
        if host.online:
            self._world.set_online(host, online=False)
            self._later(self._world.random.uniform(0.5, 20), partial(self._go_online, host))

    def _go_online(self, host: Host) -> None:
        if not host.online:
            self._world.set_online(host, online=True)

    def _move(self, host: Host, *, noticed: bool) -> None:
        self._world.move(host, self._world.fresh_addr(), noticed=noticed)

    def _swap(self, host: Host) -> None:
        """Two hosts exchange their addresses, so that each answers to what is meant for the other."""
        world = self._world
        other = world.random.choice([one for one in world.hosts if one is not host])
        old = host.at
        world.move(host, world.fresh_addr(), noticed=True)
        free = other.at
        world.move(other, old, noticed=True)
        world.move(host, free, noticed=True)

    def _later(self, delay: float, call: Callable[[], None]) -> None:
        when = self._world.now + delay
        if when < self._until:
            self._world.network.call_at(when, call)
