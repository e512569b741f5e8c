"""A process in the middle of the wire that loses, repeats and reorders what two nodes send each other.

Data flow: node a <-> router's address on that side <-> [support.lossy] <-> router's other address <-> node b
Each node takes the router for its peer, as behind a NAT. Every datagram's fate is decided by seeded dice; what
goes on in one batch leaves in as few calls, so that batches stay batches on the way. Until `begin` and after
`finish` everything passes. Knows nothing of Nebula.
Source: udp(7), RFC 4787.
"""

import contextlib
import json
import random
import select
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nebula_mp.newtypes import UdpAddr
from tests.support.companion import Companion
from tests.support.netns import Site, Wire
from tests.support.udp_batches import receive, receive_batches, send_in_batches

_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_BUFFER_BYTES = 64 << 20
_HELD_FOR = 8  # datagrams that may overtake one that is held back
_HELD_S = 0.005  # and how long, if there are not so many
_END_WITHIN_S = 30.0
_CALLS_AT_ONCE = 32


@dataclass(frozen=True)
class Faults:
    """How likely each fate is for a datagram, from 0 to 1; the rest passes in its place."""

    lost: float = 0.0
    twice: float = 0.0
    late: float = 0.0


@dataclass
class Passed:
    """What came from one side since `begin`, and what became of it: `came - lost + twice` went on."""

    came: int = 0
    lost: int = 0
    twice: int = 0
    late: int = 0
    batches: int = 0  # calls that received it

    @property
    def went_on(self) -> int:
        """Datagrams that the other side was sent."""
        return self.came - self.lost + self.twice


@dataclass
class Way:
    """One direction: `handle` takes datagrams, and gives what goes on, in its order. No sockets, no clock."""

    dice: random.Random
    faults: Faults = field(default_factory=Faults)
    passed: Passed = field(default_factory=Passed)
    _held: list[tuple[int, float, memoryview]] = field(default_factory=list)  # due at datagram, or at time

    def handle(self, datagrams: Sequence[memoryview], now: float) -> list[memoryview]:
        """What is held back is copied; the rest is the caller's memory. Call with none to ask what is due."""
        faults, passed, dice = self.faults, self.passed, self.dice.random
        onward: list[memoryview] = []
        for datagram in datagrams:
            passed.came += 1
            fate = dice()
            if fate < faults.lost:
                passed.lost += 1
            elif fate < faults.lost + faults.twice:
                passed.twice += 1
                onward.append(datagram)
                self._hold(datagram, now)
            elif fate < faults.lost + faults.twice + faults.late:
                passed.late += 1
                self._hold(datagram, now)
            else:
                onward.append(datagram)
            if self._held:
                onward += self._due(now)
        return onward or self._due(now)

    @property
    def next_s(self) -> float | None:
        """When to call at the latest."""
        return min((at for _, at, _ in self._held), default=None)

    def _hold(self, datagram: memoryview, now: float) -> None:
        number = self.passed.came + self.dice.randrange(_HELD_FOR)
        self._held.append((number, now + _HELD_S, memoryview(bytes(datagram))))

    def _due(self, now: float) -> list[memoryview]:
        found = [each for number, at, each in self._held if number < self.passed.came or at <= now]
        if found:
            self._held = [held for held in self._held if held[0] >= self.passed.came and held[1] > now]
        return found


class LossyWire(Companion):
    """The process on the wire; `behind` is where a node finds its peer."""

    def __init__(self, wire: Wire, *, family: int, port: int, seed: int) -> None:
        self._family, self._port = family, port
        plan = {
            "family": family,
            "seed": seed,
            "sides": [
                [[str(site.gateway(family)), port], [str(site.addresses[family]), port]]
                for site in (wire.a, wire.b)
            ],
        }
        super().__init__(wire.router, __name__, json.dumps(plan), answers_within_s=_END_WITHIN_S)

    def behind(self, site: Site) -> UdpAddr:
        """Where a node at `site` has to send what is for its peer."""
        return UdpAddr(site.gateway(self._family), self._port)

    def begin(self, faults: Faults) -> None:
        """Spoil what comes from now on, and count it."""
        self._say(json.dumps(asdict(faults)))
        assert self._line() == "begun\n"

    def finish(self) -> tuple[Passed, Passed]:
        """Let everything pass again; what came since `begin` from site a, and from site b."""
        self._say("{}")
        there, back = json.loads(self._line())
        return Passed(**there), Passed(**back)


class _Middle:
    """Both ways of the process; serves until its stdin is closed."""

    def __init__(self, plan: dict[str, Any]) -> None:
        family = socket.AF_INET if plan["family"] == 4 else socket.AF_INET6
        self._ends = [_end(family, *side) for side in plan["sides"]]
        self._ways = [Way(random.Random(plan["seed"] + number)) for number in range(2)]
        self._memory = memoryview(bytearray(1 << 16))

    def serve(self) -> None:
        """Pass on what comes, and do what stdin says."""
        with select.epoll() as epoll:
            for end in (*self._ends, sys.stdin):
                epoll.register(end.fileno(), select.EPOLLIN)
            while True:
                due = min((at for way in self._ways if (at := way.next_s) is not None), default=None)
                ready = dict(epoll.poll(None if due is None else max(0.0, due - time.monotonic())))
                for number in range(2):
                    self._pass_on(number, came=self._ends[number].fileno() in ready)
                if sys.stdin.fileno() in ready and not self._obey():
                    return

    def _pass_on(self, number: int, *, came: bool) -> None:
        way, source, target = self._ways[number], self._ends[number], self._ends[1 - number]
        self._send(target, way.handle([], time.monotonic()))
        for _ in range(_CALLS_AT_ONCE if came else 0):
            try:
                datagrams = receive(source, self._memory)
            except BlockingIOError:
                return
            except ConnectionRefusedError:  # told of something sent before: that node has not started yet
                continue
            way.passed.batches += 1
            self._send(target, way.handle(datagrams, time.monotonic()))

    def _send(self, target: socket.socket, datagrams: Sequence[memoryview]) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            send_in_batches(target, datagrams)

    def _obey(self) -> bool:
        if not (line := sys.stdin.readline()):
            return False
        if words := json.loads(line):
            for way in self._ways:
                way.faults, way.passed = Faults(**words), Passed()
            print("begun", flush=True)
        else:
            print(json.dumps([asdict(way.passed) for way in self._ways]), flush=True)
            for way in self._ways:
                way.faults = Faults()
        return True


def _end(family: socket.AddressFamily, own: Sequence[Any], peer: Sequence[Any]) -> socket.socket:
    end = socket.socket(family, socket.SOCK_DGRAM)
    for option in (_SO_RCVBUFFORCE, _SO_SNDBUFFORCE):
        end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    end.bind(tuple(own))
    end.connect(tuple(peer))
    receive_batches(end)
    end.setblocking(False)
    return end


if __name__ == "__main__":
    middle = _Middle(json.loads(sys.argv[1]))
    print("ready", flush=True)
    middle.serve()
