"""Recorded messages sent as fast as the kernel takes them: many with one call, prepared once.

Data flow: tests.bench.alone -> [replay] -> sendmmsg(2)
Knows how the kernel wants many messages described, and how many are on the way; makes none and reads nothing.
Source: sendmmsg(2), udp(7) on UDP_SEGMENT, packet(7).
"""

import bisect
import ctypes
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

AT_ONCE: Final = 64
"""Messages of one call, at most."""

STALLED_S: Final = 1.0
"""So long without anything arriving: what is on the way is lost."""

_SOL_UDP, _UDP_SEGMENT = 17, 103
_DONTWAIT: Final = 0x40
_REST_S: Final = 20e-6
_MESSAGE: Final = np.dtype(
    {
        "names": ["name", "name_bytes", "parts", "part_count", "control", "control_bytes"],
        "formats": ["u8", "u4", "u8", "u8", "u8", "u8"],
        "offsets": [0, 8, 16, 24, 32, 40],
        "itemsize": 64,  # of mmsghdr
    }
)
_PART: Final = np.dtype([("base", "u8"), ("bytes", "u8")])
_CONTROL: Final = np.dtype(
    [("bytes", "u8"), ("level", "i4"), ("kind", "i4"), ("step", "u2"), ("padding", "V6")]
)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


class Message(NamedTuple):
    """What one message of a `sendmmsg` carries."""

    data: bytes
    packets: int
    step: int = 0  # the kernel cuts it every so many bytes; 0: not at all


class Recording:
    """Messages in the memory they are sent from, all to one address."""

    def __init__(self, messages: Sequence[Message], name: bytes = b"") -> None:
        """`name` is the address as the kernel spells it; none for a connected socket."""
        count = len(messages)
        self._data = np.frombuffer(bytearray(b"".join(each.data for each in messages)), np.uint8)
        self._name = np.frombuffer(name or b"\0", np.uint8)
        sizes = np.array([len(each.data) for each in messages], np.uint64)
        steps = np.array([each.step for each in messages], np.uint16)
        self._parts = np.zeros(count, _PART)
        self._parts["base"] = self._data.ctypes.data + np.cumsum(sizes) - sizes
        self._parts["bytes"] = sizes
        self._control = np.zeros(count, _CONTROL)
        self._control["bytes"] = 18  # CMSG_LEN(2)
        self._control["level"], self._control["kind"] = _SOL_UDP, _UDP_SEGMENT
        self._control["step"] = steps
        self._messages = np.zeros(count, _MESSAGE)
        numbers = np.arange(count, dtype=np.uint64)
        if name:
            self._messages["name"], self._messages["name_bytes"] = self._name.ctypes.data, len(name)
        self._messages["parts"] = self._parts.ctypes.data + numbers * np.uint64(_PART.itemsize)
        self._messages["part_count"] = 1
        at = self._control.ctypes.data + numbers * np.uint64(_CONTROL.itemsize)
        self._messages["control"] = np.where(steps > 0, at, 0)
        self._messages["control_bytes"] = np.where(steps > 0, _CONTROL.itemsize, 0)
        self.packets = np.cumsum([0, *(each.packets for each in messages)]).tolist()
        """How many packets come before each message, and in all."""

    def __len__(self) -> int:
        return len(self._messages)

    def send(self, descriptor: int, first: int, count: int) -> int:
        """Send messages from number `first` on; gives how many the kernel took. Raises OSError."""
        at = self._messages.ctypes.data + first * _MESSAGE.itemsize
        sent = _libc.sendmmsg(descriptor, at, count, _DONTWAIT)
        if sent >= 0:
            return int(sent)
        number = ctypes.get_errno()
        if number in _FULL:
            return 0
        raise OSError(number, os.strerror(number))


_FULL: Final = frozenset({11, 105})  # EAGAIN, ENOBUFS


class Replay:
    """Sends a recording again and again, never with more packets on the way than `window`."""

    def __init__(
        self,
        recording: Recording,
        descriptor: int,
        arrived: Callable[[], int],
        window: int,
        *,
        again: Callable[[], None] | None = None,
    ) -> None:
        """`arrived` gives how many packets came out at the other end, ever. `again` is called before the
        recording is begun anew, with nothing on the way; without it that is not waited for.
        """
        self._recording = recording
        self._descriptor = descriptor
        self._arrived = arrived
        self._window = window
        self._again = again
        self._at = 0
        self._sent = arrived()
        self.lost = 0

    def run(self, span_s: float) -> None:
        """Send for so long."""
        end = time.monotonic() + span_s
        while time.monotonic() < end:
            self._step()

    def settle(self) -> None:
        """Wait until nothing is on the way, or what is left is lost."""
        self._await(0)

    def _step(self) -> None:
        recording = self._recording
        if self._at == len(recording):
            self._at = 0
            if self._again is not None:
                self.settle()
                self._again()
        # Half of it at a time, so that a call carries many.
        on_the_way = self._await(self._window // 2)
        first, before = self._at, recording.packets
        most = bisect.bisect_right(before, before[first] + self._window - on_the_way) - 1
        count = max(1, min(AT_ONCE, most - first))
        taken = recording.send(self._descriptor, first, count)
        self._at += taken
        self._sent += before[self._at] - before[first]
        if taken < count:
            time.sleep(_REST_S)

    def _await(self, most: int) -> int:
        """Wait until at most so many packets are on the way; gives how many are."""
        seen, since = -1, time.monotonic()
        while (there := self._arrived()) + most < self._sent:
            now = time.monotonic()
            if there != seen:
                seen, since = there, now
            elif now - since > STALLED_S:
                self.lost += self._sent - there
                self._sent = there
            else:
                time.sleep(_REST_S)
        return self._sent - there


def trains(datagrams: Iterable[bytes], *, most: int, limit_bytes: int) -> list[Message]:
    """Join datagrams as a sealer does: equal sizes, a shorter one ends the train."""
    made: list[Message] = []
    train: list[bytes] = []
    used = 0

    def close() -> None:
        nonlocal train, used
        if train:
            step = len(train[0]) if len(train) > 1 else 0
            made.append(Message(b"".join(train), len(train), step))
        train, used = [], 0

    for datagram in datagrams:
        size = len(datagram)
        if train and (size > len(train[0]) or len(train) == most or used + size > limit_bytes):
            close()
        train.append(datagram)
        used += size
        if size < len(train[0]):
            close()
    close()
    return made
