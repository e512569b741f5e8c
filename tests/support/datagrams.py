"""Numbered UDP datagrams in many flows both ways, and what became of each: lost, late or twice.

Data flow: tests/e2e -> [support.datagrams] -> sockets inside the sites -> overlay devices -> nodes
Knows nothing of Nebula.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.support.traffic import Endpoint

_NUMBER = struct.Struct("!Q")
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 16 << 20


@dataclass
class Sequence:
    """One direction of one flow: when each number was sent, and the numbers in the order they came."""

    label: str
    sent_at: list[float] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)

    def late(self, *, after_s: float) -> list[int]:
        """Numbers that came after a higher one, of those sent more than `after_s` after the first."""
        settled = self.sent_at[0] + after_s if self.sent_at else 0.0
        found, highest = [], -1
        for number in self.arrived:
            if self.sent_at[number] <= settled:
                continue
            if number < highest:
                found.append(number)
            highest = max(highest, number)
        return found

    @property
    def twice(self) -> list[int]:
        """Numbers that came more than once."""
        return list((Counter(self.arrived) - Counter(set(self.arrived))).elements())

    @property
    def lost(self) -> list[int]:
        """Numbers that never came."""
        return sorted(set(range(len(self.sent_at))) - set(self.arrived))


class Flows:
    """`count` UDP flows between two ends, each sending bursts both ways or only outward; a context manager.

    Every flow has a socket at each end, connected to the other's. Sending ends with `stop`, or with the
    block; the sequences may be judged from then on.
    """

    def __init__(
        self,
        left: Endpoint,
        right: Endpoint,
        *,
        count: int,
        burst: int = 1,
        interval_s: float = 0.02,
        size_bytes: int = 64,
        both_ways: bool = True,
    ) -> None:
        assert size_bytes >= _NUMBER.size
        self._every = 1 if both_ways else 2
        self._burst, self._interval_s = burst, interval_s
        self._padding = bytes(size_bytes - _NUMBER.size)
        self._ends: list[tuple[socket.socket, Sequence, Sequence]] = []  # what it sends, what it receives
        for _ in range(count):
            self._add_flow(left, right)
        self._ending, self._closing = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name="flows", daemon=True) for work in (self._send, self._receive)
        ]
        for thread in reversed(self._threads):
            thread.start()

    def _add_flow(self, left: Endpoint, right: Endpoint) -> None:
        ends = [each.socket(socket.SOCK_DGRAM) for each in (left, right)]
        for end, own in zip(ends, (left, right), strict=True):
            end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            end.bind((str(own.address), 0))
        names = [end.getsockname()[:2] for end in ends]
        ends[0].connect(names[1])
        ends[1].connect(names[0])
        labels = [f"{one[0]}:{one[1]} -> {two[0]}:{two[1]}" for one, two in (names, names[::-1])]
        outward, inward = (Sequence(label) for label in labels)
        self._ends += [(ends[0], outward, inward), (ends[1], inward, outward)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def sequences(self) -> list[Sequence]:
        """Each direction in which something is sent, of every flow."""
        return [sends for _, sends, _ in self._ends[:: self._every]]

    @property
    def sent(self) -> int:
        """Datagrams sent so far."""
        return sum(len(sequence.sent_at) for sequence in self.sequences)

    @property
    def arrived(self) -> int:
        """Datagrams that arrived so far."""
        return sum(len(sequence.arrived) for sequence in self.sequences)

    def stop(self, *, grace_s: float = 2.0) -> None:
        """Send no more, and wait up to `grace_s` for what is under way. May be called again."""
        if self._closing.is_set():
            return
        self._ending.set()
        self._threads[0].join()
        deadline = time.monotonic() + grace_s
        while self.arrived < self.sent and time.monotonic() < deadline:
            time.sleep(0.01)
        self._closing.set()
        self._threads[1].join()
        for end, _, _ in self._ends:
            end.close()

    def _send(self) -> None:
        due = time.monotonic()
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            for end, sends, _ in self._ends[:: self._every]:
                for _ in range(self._burst):
                    # A full queue, or no device for a moment: that number was not sent.
                    with contextlib.suppress(OSError):
                        at = time.monotonic()
                        end.send(_NUMBER.pack(len(sends.sent_at)) + self._padding)
                        sends.sent_at.append(at)
            due = max(due + self._interval_s, time.monotonic() - self._interval_s)

    def _receive(self) -> None:
        with selectors.DefaultSelector() as selector:
            for end, _, receives in self._ends:
                selector.register(end, selectors.EVENT_READ, (end, receives))
            while not self._closing.is_set():
                for key, _ in selector.select(0.1):
                    end, receives = key.data
                    with contextlib.suppress(OSError):  # empty, or an ICMP error of the local stack's
                        while True:
                            receives.arrived.append(_NUMBER.unpack_from(end.recv(2048))[0])
