"""TCP connections through the overlay that are busy for as long as a test lasts, every byte hash-checked.

Data flow: tests/e2e -> [support.transfers] -> sockets inside the sites -> overlay devices -> nodes
Where `traffic.check_tcp` moves a given number of bytes, this goes on while something is done to the nodes.
Knows nothing of Nebula.
"""

import contextlib
import hashlib
import math
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.support.traffic import Endpoint

_CHUNK_BYTES = 32 * 1024
_STALL_LIMIT_S = 60.0
_CONNECT_WITHIN_S = 10.0


class Transfer:
    """One connection from `source` to `destination` that carries random bytes until `finish`.

    `pace_bytes_s` bounds how fast. With `size_bytes` it carries that much, and `finish` waits for the last of it.
    `segment_bytes` bounds what the stack may put into one packet (TCP_MAXSEG); 0: whatever fits. What goes wrong in the threads is kept and raised by `finish`.
    """

    def __init__(
        self,
        source: Endpoint,
        destination: Endpoint,
        *,
        pace_bytes_s: float = math.inf,
        size_bytes: float = math.inf,
        segment_bytes: int = 0,
        seed: int = 1,
    ) -> None:
        self.label = f"TCP {source.address} -> {destination.address}"
        self.sent = self.received = 0
        self._pace, self._size = pace_bytes_s, size_bytes
        self._dice = random.Random(seed)
        self._sender, self._receiver = _connect(source, destination, self.label, segment_bytes)
        self._ending = threading.Event()
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=self.label, daemon=True)
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def finish(self, *, within_s: float = 30.0) -> None:
        """Send no more, and wait for the rest; AssertionError unless all arrived, unaltered and in order."""
        if self._size == math.inf:
            self._ending.set()
        deadline = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        state = f"{self.sent} bytes sent, {self.received} received"
        if self._failures:
            raise AssertionError(f"{self.label}: {self._failures[0]!r}; {state}") from self._failures[0]
        assert not any(thread.is_alive() for thread in self._threads), (
            f"{self.label}: not done {within_s:g} s after its end: {state}"
        )
        sent, received = (each.digest() for each in self._hashes)
        assert (self.sent, sent) == (self.received, received), f"{self.label}: arrived altered: {state}"

    def abandon(self) -> None:
        """End it at once, whatever is under way; nothing is judged. May be called after `finish`."""
        self._ending.set()
        for end in (self._sender, self._receiver):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised by `finish`
            self._failures.append(error)

    def _send(self) -> None:
        began = time.monotonic()
        while self.sent < self._size and not self._ending.is_set():
            chunk = self._dice.randbytes(int(min(_CHUNK_BYTES, self._size - self.sent)))
            self._hashes[0].update(chunk)
            self._sender.sendall(chunk)
            self.sent += len(chunk)
            due = began + self.sent / self._pace
            if due < (now := time.monotonic()):
                began += now - due  # what was stalled is not made up for
            elif due > now:
                self._ending.wait(due - now)
        self._sender.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while data := self._receiver.recv(_CHUNK_BYTES):
            self._hashes[1].update(data)
            self.received += len(data)


def _connect(
    source: Endpoint, destination: Endpoint, label: str, segment_bytes: int
) -> tuple[socket.socket, socket.socket]:
    sender = source.socket(socket.SOCK_STREAM)
    with destination.socket(socket.SOCK_STREAM) as listener:
        for end in (sender, listener) if segment_bytes else ():
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment_bytes)
        listener.bind((str(destination.address), 0))
        listener.listen(1)
        with contextlib.suppress(BlockingIOError):
            sender.connect(listener.getsockname()[:2])
        if not select.select([listener], [], [], _CONNECT_WITHIN_S)[0]:
            sender.close()
            raise AssertionError(f"{label}: no connection after {_CONNECT_WITHIN_S:g} s")
        receiver, _ = listener.accept()
    for end in (sender, receiver):
        end.settimeout(_STALL_LIMIT_S)
    return sender, receiver


class BothWays:
    """A transfer in each direction at once; a context manager that leaves no thread behind. See Transfer."""

    def __init__(
        self,
        left: Endpoint,
        right: Endpoint,
        *,
        pace_bytes_s: float = 4_000_000,
        size_bytes: float = math.inf,
    ) -> None:
        self.transfers: list[Transfer] = []
        try:
            for number, (source, destination) in enumerate(((left, right), (right, left))):
                transfer = Transfer(
                    source, destination, pace_bytes_s=pace_bytes_s, size_bytes=size_bytes, seed=number
                )
                self.transfers.append(transfer)
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def wait_for_more(self, *, within_s: float) -> None:
        """Wait until bytes have arrived in both directions that had not when this was called."""
        for transfer in self.transfers:
            had = transfer.received
            deadline = time.monotonic() + within_s
            while transfer.received == had:
                assert time.monotonic() < deadline, f"{transfer.label}: nothing arrives for {within_s:g} s"
                time.sleep(0.01)

    def finish(self, *, within_s: float = 30.0) -> str:
        """See Transfer; a line on what was moved."""
        for transfer in self.transfers:
            transfer.finish(within_s=within_s)
        return ", ".join(f"{each.label}: {each.received / 1e6:.1f} MB" for each in self.transfers)

    def abandon(self) -> None:
        """See Transfer."""
        for transfer in self.transfers:
            transfer.abandon()
