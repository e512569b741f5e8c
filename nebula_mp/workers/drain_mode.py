"""Who drains a worker's rings: the reader itself, or its writer on another core; found out by trial.

Data flow: workers.reader: clocks and counters -> [drain_mode.AutoDrain] -> DrainMode -> workers.reader
Knows shares of time and rates, and when a trial has paid; knows nothing of rings, leases or system calls.
Source: docs/architecture.md, "Who drains"; measured on two cores, see the constants.

One process does everything with no switch between packets; two are a pipeline, worth up to half as much again
on one stream while a second core has nothing else to do, and a tenth less otherwise. Nothing that one process
can see tells the two apart beforehand: so the pipeline is tried when the reader is the bottleneck and has its
core for itself, and kept if it moved more bytes. What is looked at ends a window:

| phase         | drains | after a window in which                            | phase then    | hold      |
|---------------|--------|----------------------------------------------------|---------------|-----------|
| READER        | reader | the reader was the bottleneck, alone on its core,  | TRYING_WRITER |           |
|               |        | for the third time running, and no hold is in force|               |           |
| TRYING_WRITER | writer | the trial ended and moved 5 % more                 | WRITER        |           |
|               |        | the trial ended and did not                        | READER        | back-off  |
| WRITER        | writer | both had little to do, for the third time running  | READER        | 250 ms    |
|               |        | 2 s are over, and the reader waited for its core   | TRYING_READER |           |
| TRYING_READER | reader | the trial ended and moved no more than 3 % less    | READER        | 1 s       |
|               |        | the trial ended and moved less than that           | WRITER        |           |
| any but READER|        | it was a pause: the load has gone                  | READER        | 250 ms,   |
|               |        |                                                    |               | back-off  |

The back-off is for trials that failed or were broken off: 250 ms, doubled up to 8 s, 250 ms again when one
has succeeded.

Tempting, but no: to go back because the reader waits for its core (it does so while the pipeline wins by
half: that only asks for a trial); to judge by the delay of the writer's wake-up (the same in both worlds).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from nebula_mp.config.model import DrainMode
from nebula_mp.newtypes import Seconds

WINDOW: Final = Seconds(0.020)
PAUSE: Final = Seconds(0.100)
"""No pass for so long: there was nothing to do, or the machine stood still."""
CPUS_MIN: Final = 4
"""Below this many usable CPUs something else always wants the second core."""

_BOTTLENECK_SHARE: Final = 0.95
_DELAY_SHARE_MAX: Final = 0.05
_LIGHT_SHARE: Final = 0.85  # of one core, by reader and writer together
_DELAYED_SHARE: Final = 0.10
_STREAK: Final = 3
_TRIAL_WRITER: Final = 6  # windows; the first is not counted
_TRIAL_READER: Final = 3
_WRITER_PAYS: Final = 1.05
_READER_PAYS: Final = 0.97
_BACK_OFF_MIN: Final = Seconds(0.25)
_BACK_OFF_MAX: Final = Seconds(8)
_HOLD_LIGHT: Final = Seconds(0.25)
_HOLD_BACK: Final = Seconds(1)
_LOOK_BACK: Final = Seconds(2)


def is_tried(mode: DrainMode, *, cpus: int, has_delay: bool) -> bool:
    """Whether `mode` asks for trials here. `has_delay`: the kernel tells how long a process waits for a core.

    Else AUTO means READER.
    """
    return mode is DrainMode.AUTO and cpus >= CPUS_MIN and has_delay


class Phase(Enum):
    """Who drains, and whether for good."""

    READER = "reader"
    TRYING_WRITER = "trying writer"
    WRITER = "writer"
    TRYING_READER = "trying reader"


class Finding(Enum):
    """What a window has shown."""

    NOTHING = "nothing"
    PAUSE = "pause"
    BOTTLENECK = "bottleneck"
    LIGHT = "light"
    DELAYED = "delayed"
    WON = "won"
    LOST = "lost"


NEXT: Final[Mapping[tuple[Phase, Finding], Phase]] = {
    (Phase.READER, Finding.BOTTLENECK): Phase.TRYING_WRITER,
    (Phase.TRYING_WRITER, Finding.WON): Phase.WRITER,
    (Phase.TRYING_WRITER, Finding.LOST): Phase.READER,
    (Phase.TRYING_WRITER, Finding.PAUSE): Phase.READER,
    (Phase.WRITER, Finding.LIGHT): Phase.READER,
    (Phase.WRITER, Finding.PAUSE): Phase.READER,
    (Phase.WRITER, Finding.DELAYED): Phase.TRYING_READER,
    (Phase.TRYING_READER, Finding.WON): Phase.READER,
    (Phase.TRYING_READER, Finding.LOST): Phase.WRITER,
    (Phase.TRYING_READER, Finding.PAUSE): Phase.READER,
}
"""Every change of phase there is; any other pair stays."""


class Senses(NamedTuple):
    """What a reader can tell at a moment; all but the time only grow."""

    at: Seconds  # monotonic clock
    own_cpu: Seconds
    own_delay: Seconds  # ready to run, but without a core
    writer_cpu: Seconds
    moved_bytes: int  # to TUN and UDP, by whichever of the two


@dataclass(slots=True)
class _Sum:
    """What windows add up to."""

    time: float = 0.0
    delay: float = 0.0
    moved_bytes: int = 0

    def add(self, before: Senses, after: Senses) -> None:
        self.time += after.at - before.at
        self.delay += after.own_delay - before.own_delay
        self.moved_bytes += after.moved_bytes - before.moved_bytes

    @property
    def rate(self) -> float:
        return self.moved_bytes / self.time if self.time > 0 else 0.0


class AutoDrain:
    """After each pass: if `due(now)`, `mode = handle_window(senses)`. Times never go backwards."""

    def __init__(self, first: Senses) -> None:
        self.phase = Phase.READER
        self._last = first
        self._hold_until = first.at
        self._back_off = _BACK_OFF_MIN
        self._base_rate = 0.0
        self._begin()

    @property
    def mode(self) -> DrainMode:
        """READER or WRITER: who is to drain from now on."""
        by_writer = self.phase in (Phase.WRITER, Phase.TRYING_WRITER)
        return DrainMode.WRITER if by_writer else DrainMode.READER

    def due(self, now: Seconds) -> bool:
        """Whether a window is over."""
        return now - self._last.at >= WINDOW

    def handle_window(self, senses: Senses) -> DrainMode:
        """Judge the window that `senses` ends; gives `mode`."""
        before, self._last = self._last, senses
        finding = self._find(before, senses)
        phase = NEXT.get((self.phase, finding))
        if phase is None:
            return self.mode
        self._settle(phase, finding, senses.at)
        self.phase = phase
        self._begin()
        return self.mode

    def _begin(self) -> None:
        """Start counting windows of a phase."""
        self._windows = 0
        self._streak = 0
        self._sum = _Sum()

    def _find(self, before: Senses, after: Senses) -> Finding:
        time = after.at - before.at
        if time >= PAUSE:
            self._begin()
            return Finding.PAUSE
        self._windows += 1
        match self.phase:
            case Phase.READER:
                return self._find_bottleneck(before, after)
            case Phase.WRITER:
                return self._find_light(before, after)
            case Phase.TRYING_WRITER:
                return self._find_trial(before, after, _TRIAL_WRITER, _WRITER_PAYS)
            case Phase.TRYING_READER:
                return self._find_trial(before, after, _TRIAL_READER, _READER_PAYS)

    def _find_bottleneck(self, before: Senses, after: Senses) -> Finding:
        time = after.at - before.at
        busy = after.own_cpu - before.own_cpu > _BOTTLENECK_SHARE * time
        alone = after.own_delay - before.own_delay < _DELAY_SHARE_MAX * time
        if not (busy and alone):
            self._streak = 0
            self._sum = _Sum()
            return Finding.NOTHING
        if self._streak == _STREAK:  # held back: what counts is how it went just before the trial
            self._streak = 0
            self._sum = _Sum()
        self._streak += 1
        self._sum.add(before, after)
        if self._streak < _STREAK or after.at <= self._hold_until:
            return Finding.NOTHING
        return Finding.BOTTLENECK

    def _find_light(self, before: Senses, after: Senses) -> Finding:
        time = after.at - before.at
        used = after.own_cpu - before.own_cpu + after.writer_cpu - before.writer_cpu
        self._streak = self._streak + 1 if used < _LIGHT_SHARE * time else 0
        if self._streak == _STREAK:
            return Finding.LIGHT
        self._sum.add(before, after)
        if self._sum.time < _LOOK_BACK:
            return Finding.NOTHING
        if self._sum.delay > _DELAYED_SHARE * self._sum.time:
            return Finding.DELAYED
        self._sum = _Sum()
        return Finding.NOTHING

    def _find_trial(self, before: Senses, after: Senses, windows: int, pays: float) -> Finding:
        if self._windows > 1:
            self._sum.add(before, after)
        if self._windows < windows:
            return Finding.NOTHING
        rate, least = self._sum.rate, pays * self._base_rate
        # In doubt the reader: a flood of junk, of which nothing is moved, is no reason for a pipeline.
        in_doubt = self.phase is Phase.TRYING_READER
        return Finding.WON if rate > least or (rate == least and in_doubt) else Finding.LOST

    def _settle(self, phase: Phase, finding: Finding, now: Seconds) -> None:
        """Remember what the change of phase means for later trials."""
        if phase in (Phase.TRYING_WRITER, Phase.TRYING_READER):
            self._base_rate = self._sum.rate
        if phase is Phase.WRITER:
            self._back_off = _BACK_OFF_MIN
        elif phase is Phase.READER:
            self._hold_until = Seconds(now + self._hold(finding))

    def _hold(self, finding: Finding) -> Seconds:
        if self.phase is Phase.TRYING_WRITER:
            hold = self._back_off
            self._back_off = min(Seconds(2 * hold), _BACK_OFF_MAX)
            return hold
        return _HOLD_BACK if finding is Finding.WON else _HOLD_LIGHT
