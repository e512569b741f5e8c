"""As many UDP datagrams as go through, each known by its number: for counting packets by the million.

Data flow: tests/e2e -> [support.floods] -> sockets inside the sites -> overlay devices -> nodes
What arrives is compared with what must have been sent. Only so many are under way at once that queues of
ordinary length hold them; some may be lost all the same, and that is not judged. Knows nothing of Nebula.
Source: udp(7).
"""

import contextlib
import random
import select
import socket
import struct
import time
from types import TracebackType
from typing import Self

from tests.support.traffic import Endpoint
from tests.support.udp_batches import send_segmented

NUMBER_BYTES = 8
_NUMBER = struct.Struct("!Q")
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 << 20
_PERIOD = 100_003  # a prime: no datagram's size divides it
_STEP = 7_919
_UNDER_WAY_MAX = 256
_BATCH_MAX = 63
_BATCH_BYTES_MAX = 60_000
_GIVEN_UP_S = 0.5
_STALL_LIMIT_S = 30.0

_once = random.Random(42).randbytes(_PERIOD)
_PATTERN = _once + _once[:2048]


def _content(number: int, size: int) -> bytes:
    start = number * _STEP % _PERIOD
    return _NUMBER.pack(number) + _PATTERN[start : start + size - NUMBER_BYTES]


class UdpFlood:
    """One flow of datagrams of one size; a context manager.

    `together`: as many as fit leave with one call (UDP_SEGMENT), and the last of those is shorter by a byte.
    """

    def __init__(self, source: Endpoint, destination: Endpoint, *, size: int, together: bool) -> None:
        assert size > NUMBER_BYTES
        self.sent = self.received = self.wrong = 0
        self._size = size
        self._batch = min(_BATCH_MAX, _BATCH_BYTES_MAX // size) if together else 1
        self._source, self._target = (end.socket(socket.SOCK_DGRAM) for end in (source, destination))
        self._target.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._target.bind((str(destination.address), 0))
        self._source.connect(self._target.getsockname()[:2])
        self._lost = 0  # given up

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()
        self._target.close()

    def run(self, amount: int) -> None:
        """Send until so many more have arrived; AssertionError if none does for half a minute."""
        wanted = self.received + amount
        progress = time.monotonic()
        while self.received < wanted:
            while self.sent - self.received - self._lost < _UNDER_WAY_MAX:
                self._send()
            if select.select([self._target], [], [], _GIVEN_UP_S)[0]:
                self._receive()
                progress = time.monotonic()
                continue
            self._lost = self.sent - self.received
            assert time.monotonic() < progress + _STALL_LIMIT_S, (
                f"{self.received} of {wanted}: no more arrives"
            )

    def _send(self) -> None:
        sizes = [self._size] * (self._batch - 1) + [self._size - (self._batch > 1)]
        content = b"".join(_content(self.sent + n, size) for n, size in enumerate(sizes))
        # A full queue: nothing of it was sent, and there is something to receive.
        with contextlib.suppress(BlockingIOError):
            if self._batch > 1:
                send_segmented(self._source, content, self._size)
            else:
                self._source.send(content)
        self.sent += self._batch

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                datagram = self._target.recv(2048)
                self.received += 1
                number = _NUMBER.unpack_from(datagram)[0] if len(datagram) >= NUMBER_BYTES else 0
                if len(datagram) not in (self._size, self._size - 1) or datagram != _content(
                    number, len(datagram)
                ):
                    self.wrong += 1
