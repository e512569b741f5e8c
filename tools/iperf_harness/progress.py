"""How far a run is: a bar on a terminal, a line for each round elsewhere.

Data flow: runner -> [iperf_harness.progress] -> stderr
Knows no measurements: only how many steps there are and what each is called.
"""

import shutil
import time
from collections.abc import Callable
from typing import TextIO

_BAR = 24


class Progress:
    """Call `begin` before each of the `total` steps, `round_done` after each round, `close` at the end."""

    def __init__(self, stream: TextIO, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._total = total
        self._done = -1
        self._clock = clock
        self._began = clock()
        self._is_terminal = stream.isatty()

    def begin(self, text: str) -> None:
        """A step begins, and the one before it has ended."""
        self._done += 1
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{self.line(text)[:width]}")
            self._stream.flush()

    def round_done(self, text: str) -> None:
        """Say so where there is no bar."""
        if not self._is_terminal:
            self._stream.write(f"{text} after {duration(self._clock() - self._began)}\n")
            self._stream.flush()

    def close(self) -> None:
        """Remove the bar; may be called again."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def line(self, text: str) -> str:
        """Bar, count, what is going on, and how long the rest will take if it goes on like this."""
        full = _BAR * self._done // max(1, self._total)
        bar = "#" * full + "." * (_BAR - full)
        return f"[{bar}] {self._done}/{self._total} {text}{self._left()}"

    def _left(self) -> str:
        if self._done < 3:
            return ""  # the first steps say little
        per_step = (self._clock() - self._began) / self._done
        return f", {duration(per_step * (self._total - self._done))} left"


def duration(seconds: float) -> str:
    """Like `1 m 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02} s" if minutes else f"{rest} s"
