"""Which counters of a tunnel were already received.

Data flow: control.controller -> [crypto.replay]: check, then open the packet, then update
           datapath -> [crypto.replay]: the same, also for a range of counters that follow each other
           shm_counters -> [crypto.replay]: the same over shared memory
Knows numbers only; knows nothing of packets. An unauthenticated counter may be checked, never updated with.
Source: RFC 6479; docs/wire-format.md, "Replay window".

The state is one buffer, so that a window can lie in memory that outlives its process:

    +0   u64 current   the highest counter accepted, 0 before the first
    +8   ring of 2 * width bits; counter n is bit n mod 8 of byte n div 8 mod (2 * width div 8)
"""

from typing import Self

from nebula_mp.errors import ReplayError

WIDTH = 8192
"""Counters a window accepts behind the highest one; a power of two of at least 8."""


def state_bytes(width: int = WIDTH) -> int:
    """Size of the buffer that holds a window's state."""
    return 8 + 2 * width // 8


class ReplayWindow:
    """Accepts each u64 counter at most once, and none that lies `width` or more behind the highest seen.

    The bits live in a ring twice as large as the window, so moving forward clears whole bytes and never has
    to mask: a cleared byte holds counters ahead of the window, a stale one counters behind it. With the
    default width that is 2 KiB for each tunnel.

    One process at a time may update a window; others may read `current`. A process that dies inside `update`
    leaves a window that refuses all it refused before, and perhaps counters that `update` had not yet
    cleared; it never accepts one again.
    """

    __slots__ = ("_bits", "_current", "_mask", "_width")

    def __init__(self, width: int = WIDTH) -> None:
        """`width` is a power of two of at least 8. Counter 0 is marked: it is never valid."""
        self._attach(memoryview(bytearray(state_bytes(width))), width)
        self._bits[0] = 1

    @classmethod
    def over(cls, state: memoryview, width: int = WIDTH) -> Self:
        """Go on with the window in `state`: writable, `state_bytes(width)` long, aligned to 8 bytes.

        The buffer is borrowed for as long as the window is used. Call `restart` before the first use of a
        buffer that held no window.
        """
        window = cls.__new__(cls)
        window._attach(state, width)  # noqa: SLF001 - a constructor
        return window

    def _attach(self, state: memoryview, width: int) -> None:
        assert width >= 8
        assert width & (width - 1) == 0
        assert len(state) == state_bytes(width)
        self._width = width
        # cast("Q"): an aligned store of 8 bytes, which another process sees whole or not at all.
        self._current = state[:8].cast("Q")
        self._bits = state[8:]
        self._mask = len(self._bits) - 1

    @classmethod
    def after_handshake(cls, width: int = WIDTH) -> Self:
        """Make a window in which 1 and 2, the counters of the two handshake messages, are marked too."""
        window = cls(width)
        window.restart()
        return window

    def restart(self) -> None:
        """Forget everything; become a window in which 0, 1 and 2 are marked, as after a handshake."""
        self._bits[:] = bytes(len(self._bits))
        self._bits[0] = 0b111
        self._current[0] = 2

    @property
    def current(self) -> int:
        """The highest counter accepted, 0 before the first."""
        return self._current[0]

    def check(self, counter: int) -> None:
        """Raise ReplayError for a counter that was seen or is too old; nothing changes."""
        current = self._current[0]
        if counter > current:
            return
        if counter <= current - self._width:
            raise ReplayError(f"counter {counter} is behind the window, which ends at {current}")
        if self._bits[counter >> 3 & self._mask] >> (counter & 7) & 1:
            raise ReplayError(f"counter {counter} was received before")

    def update(self, counter: int) -> None:
        """Mark the counter of an authenticated packet; ReplayError, and nothing changes, as from `check`."""
        current = self._current[0]
        bits, mask = self._bits, self._mask
        byte = counter >> 3
        if counter <= current:
            self.check(counter)
        else:
            # Move first, clear after: a jump beyond the width clears bits of the window it leaves, and a
            # process that died between the two must not leave those counters acceptable.
            self._current[0] = counter
            fresh = byte - (current >> 3)
            if fresh == 1:
                bits[byte & mask] = 0
            elif fresh > mask:
                bits[:] = bytes(mask + 1)
            elif fresh:
                first, last = (current >> 3) + 1 & mask, byte & mask
                if first <= last:
                    bits[first : last + 1] = bytes(last + 1 - first)
                else:
                    bits[first:] = bytes(mask + 1 - first)
                    bits[: last + 1] = bytes(last + 1)
        bits[byte & mask] |= 1 << (counter & 7)

    def check_range(self, first: int, count: int) -> None:
        """Do as `check` for `count` counters from `first` on; ReplayError if any of them would be refused.

        They are at most `width`. 0.2 us when all are new.
        """
        assert 0 < count <= self._width
        current = self._current[0]
        if first > current:
            return
        if first <= current - self._width:
            raise ReplayError(f"counter {first} is behind the window, which ends at {current}")
        # A range that reaches beyond `current` contains it; what is marked behind it makes no difference.
        seen = False
        for at, bits in self._pieces(first, count):
            size = (at + bits + 7 >> 3) - (at >> 3)
            found = int.from_bytes(self._bits[at >> 3 : (at >> 3) + size], "little")
            seen = seen or bool(found >> (at & 7) & (1 << bits) - 1)
        if seen:
            raise ReplayError(f"one of {count} counters from {first} on was received before")

    def update_range(self, first: int, count: int) -> None:
        """Do as `update` for a range of at most `width`; ReplayError, and nothing changes, if any would fail.

        A process that dies inside leaves what one that dies in `update` leaves.
        """
        self.check_range(first, count)
        last = first + count - 1
        if last > self._current[0]:
            self.update(last)
        for at, bits in self._pieces(first, count):
            low, size = at >> 3, (at + bits + 7 >> 3) - (at >> 3)
            marked = int.from_bytes(self._bits[low : low + size], "little") | (1 << bits) - 1 << (at & 7)
            self._bits[low : low + size] = marked.to_bytes(size, "little")

    def _pieces(self, first: int, count: int) -> tuple[tuple[int, int], ...]:
        """Where the bits of a range are, and how many: two pieces when it goes around the end of the ring."""
        at = first & 2 * self._width - 1
        until_end = 2 * self._width - at
        if count <= until_end:
            return ((at, count),)
        return (at, until_end), (0, count - until_end)
