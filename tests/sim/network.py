"""An underlay without sockets, and a clock that jumps to the next event.

Data flow: sim.world (datagrams of controllers) -> [sim.network] -> sim.world (the same, later, or not)
Knows addresses, delays and losses; knows nothing of Nebula. Every random choice comes from one generator,
so that a seed replays a run exactly. Nothing sleeps.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address
from random import Random

from nebula_mp.newtypes import UdpAddr

Receiver = Callable[[bytes, UdpAddr], None]

TRACE_LENGTH = 200_000
STRANGER = UdpAddr(IPv4Address("203.0.113.66"), 6666)
"""Where copies come from that somebody on the path made. Answers to it reach nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What happens to a datagram: probabilities from 0 to 1, times in seconds."""

    latency_s: tuple[float, float] = (0.005, 0.03)  # different for each datagram: near ones overtake
    loss: float = 0.0
    duplicate: float = 0.0
    straggle: float = 0.0  # arrives up to straggle_s later
    straggle_s: float = 0.0
    corrupt: float = 0.0  # one bit flips
    copy: float = 0.0  # arrives, and once more up to copy_s later from STRANGER
    copy_s: float = 0.0


CALM = Weather()


class Fate(Enum):
    """What became of a datagram, or what it is if not simply the one that was sent."""

    ON_THE_WAY = "on the way"
    DELIVERED = ""
    LOST = "lost"
    NOBODY = "nobody there"
    DUPLICATE = "duplicate"
    CORRUPT = "bit flipped"
    COPY = "copy by a stranger"


@dataclass(slots=True)
class Message:
    """One datagram as the diagram shows it; `arrived` is None until it does."""

    sent: float
    source: UdpAddr
    to: UdpAddr
    sender: str
    data: bytes
    fate: Fate
    arrived: float | None = None
    receiver: str = "?"


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened to one host: a restart, a new address, a line of its log."""

    sent: float
    host: str
    text: str


class Network:
    """Events in the order of their time, and of their making if the times are equal."""

    def __init__(self, seed: int, weather: Weather = CALM) -> None:
        self.now = 0.0  # seconds since the run began
        self.random = Random(seed)
        self.weather = weather
        self.trace: deque[Message | Note] = deque(maxlen=TRACE_LENGTH)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._hosts: dict[UdpAddr, tuple[str, Receiver]] = {}

    def call_at(self, when: float, call: Callable[[], None]) -> None:
        """Run `call` at `when`, which is not in the past."""
        assert when >= self.now
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, call))

    def run_until(self, end: float) -> None:
        """Run every event up to and including `end`, which then is the time."""
        while self._events and self._events[0][0] <= end:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = end

    def attach(self, at: UdpAddr, name: str, receive: Receiver) -> None:
        """Let datagrams for `at` arrive at `receive`."""
        assert at not in self._hosts
        self._hosts[at] = (name, receive)

    def detach(self, at: UdpAddr) -> None:
        """Make `at` an address where nobody is."""
        del self._hosts[at]

    def is_attached(self, at: UdpAddr) -> bool:
        """Tell whether somebody is there."""
        return at in self._hosts

    def note(self, host: str, text: str) -> None:
        """Put a remark into the trace."""
        self.trace.append(Note(self.now, host, text))

    def send(self, sender: str, source: UdpAddr, to: UdpAddr, data: bytes) -> None:
        """Put a datagram on its way, in the weather there is."""
        weather, random = self.weather, self.random
        if random.random() < weather.loss:
            self.trace.append(Message(self.now, source, to, sender, data, Fate.LOST))
            return
        fate = Fate.ON_THE_WAY
        if random.random() < weather.corrupt:
            fate = Fate.CORRUPT
            damaged = bytearray(data)
            damaged[random.randrange(len(data))] ^= 1 << random.randrange(8)
            data = bytes(damaged)
        self._carry(Message(self.now, source, to, sender, data, fate), self._delay())
        if random.random() < weather.duplicate:
            self._carry(Message(self.now, source, to, sender, data, Fate.DUPLICATE), self._delay())
        if random.random() < weather.copy:
            copy = Message(self.now, STRANGER, to, sender, data, Fate.COPY)
            self._carry(copy, self._delay() + random.uniform(0, weather.copy_s))

    def _delay(self) -> float:
        delay = self.random.uniform(*self.weather.latency_s)
        if self.random.random() < self.weather.straggle:
            delay += self.random.uniform(0, self.weather.straggle_s)
        return delay

    def _carry(self, message: Message, delay: float) -> None:
        self.trace.append(message)
        self.call_at(self.now + delay, lambda: self._deliver(message))

    def _deliver(self, message: Message) -> None:
        found = self._hosts.get(message.to)
        if found is None:
            message.fate = Fate.NOBODY
            return
        message.receiver, receive = found
        message.arrived = self.now
        if message.fate is Fate.ON_THE_WAY:
            message.fate = Fate.DELIVERED
        receive(message.data, message.source)
