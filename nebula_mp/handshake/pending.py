"""One handshake we started and the peer has not answered yet.

Data flow:  control.handshakes -> [handshake.pending] -> Attempt | GaveUp -> control.handshakes
Knows when to send stage 1 again, when to give up and which packets wait; knows nothing of Noise,
of addresses or of sockets.
Source: docs/wire-format.md, "Handshake timing"; Nebula's handshake manager.
"""

from collections import deque
from dataclasses import dataclass

from nebula_mp.newtypes import Seconds

QUEUE_PACKETS = 100
"""Packets that wait for one handshake; Nebula's limit."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Send stage 1 to every address that is known by now; `number` counts from 1."""

    number: int


@dataclass(frozen=True, slots=True)
class GaveUp:
    """All attempts were made and the last wait is over: forget this handshake and its queue."""

    attempts: int
    waited: Seconds


class Pending:
    """Call `handle_timeout(now)` at or after `next_timeout()`; times never go backwards.

    The first attempt is due at once. After `GaveUp` the object is spent.
    """

    __slots__ = ("_attempts", "_attempts_max", "_due", "_interval", "_queue", "started")

    def __init__(self, *, now: Seconds, interval: Seconds, attempts_max: int) -> None:
        self.started = now
        self._due = now
        self._interval = interval
        self._attempts = 0
        self._attempts_max = attempts_max
        self._queue: deque[bytes] = deque()

    def next_timeout(self) -> Seconds:
        """When `handle_timeout` has something to do."""
        return self._due

    def handle_timeout(self, now: Seconds) -> Attempt | GaveUp | None:
        """Linear back-off as in Nebula: after attempt n, wait n * interval."""
        if now < self._due:
            return None
        if self._attempts >= self._attempts_max:
            return GaveUp(self._attempts, Seconds(now - self.started))
        self._attempts += 1
        self._due = Seconds(now + self._attempts * self._interval)
        return Attempt(self._attempts)

    def trigger(self, now: Seconds) -> None:
        """Make the next attempt due at once, because a new address of the peer became known."""
        if self._attempts < self._attempts_max:
            self._due = min(self._due, now)

    def try_queue(self, packet: bytes) -> bool:
        """Keep an inner IP packet until the tunnel is up; False, and nothing changed, when full."""
        if len(self._queue) >= QUEUE_PACKETS:
            return False
        self._queue.append(packet)
        return True

    def take_queue(self) -> list[bytes]:
        """Give the waiting packets away, oldest first; the queue is empty afterwards."""
        packets = list(self._queue)
        self._queue.clear()
        return packets
