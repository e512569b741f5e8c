"""When a process that ended is started again, and when that is no use any more.

Data flow: supervisor: a death -> [workers.restarts] -> Again | GiveUp | Lost -> supervisor
Pure policy: knows names and times; knows nothing of processes, of signals or of how a worker is given up.
Source: docs/architecture.md, "What happens when something fails".

A death is answered by a start at once, which costs the tunnels a few milliseconds. Who dies five times in ten
seconds keeps failing: a worker is given up while another one can have its share; whoever cannot be replaced
is started after pauses that double. A run of ten seconds ends it: what follows is judged afresh.

| deaths within 10 s | another worker is left | the last worker, control           | services             |
|--------------------|------------------------|------------------------------------|----------------------|
| 1 to 4             | at once                | at once                            | at once              |
| the fifth          | given up               | after 100 ms, 200 ms, ... 5 s      | as those to the left |
| 30 s of that       | -                      | lost: a gateway without it is none | goes on: they carry  |
|                    |                        |                                    | no packet            |
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from nebula_mp.newtypes import Seconds

DEATHS_MAX: Final = 5
WINDOW: Final = Seconds(10)
PAUSE_FIRST: Final = Seconds(0.1)
PAUSE_MAX: Final = Seconds(5)
LOST_AFTER: Final = Seconds(30)


@dataclass(frozen=True, slots=True)
class Again:
    """Start it after `pause`, 0 for at once. `keeps_failing`: this is the first pause of a series."""

    pause: Seconds = Seconds(0)
    keeps_failing: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Let another worker have its share."""


@dataclass(frozen=True, slots=True)
class Lost:
    """It has failed for too long, and nothing can stand in for it: end the program."""


Decision = Again | GiveUp | Lost


@dataclass(slots=True)
class _History:
    started: Seconds
    deaths: deque[Seconds] = field(default_factory=lambda: deque(maxlen=DEATHS_MAX))
    pause: Seconds = Seconds(0)
    failing_since: Seconds = Seconds(0)


class Restarts:
    """Tell it of every start with `started` and of every death with `ended`; times never go backwards."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def started(self, name: str, now: Seconds) -> None:
        """Note that the process `name` runs from `now` on."""
        history = self._histories.get(name)
        if history is None:
            self._histories[name] = _History(now)
        else:
            history.started = now

    def ended(self, name: str, now: Seconds, *, can_be_spared: bool, is_vital: bool) -> Decision:
        """Decide what follows the death of `name`, which had been started.

        `can_be_spared`: it belongs to a worker, and another one is left. `is_vital`: without it no packet
        passes. Deaths that the supervisor wanted are not for here.
        """
        history = self._histories[name]
        if now - history.started >= WINDOW:
            history.deaths.clear()
            history.pause = Seconds(0)
        history.deaths.append(now)
        recent = sum(now - death < WINDOW for death in history.deaths)
        if not history.pause and recent < DEATHS_MAX:
            return Again()
        if can_be_spared:
            return GiveUp()
        if not history.pause:
            history.failing_since = now
            history.pause = PAUSE_FIRST
            return Again(PAUSE_FIRST, keeps_failing=True)
        if is_vital and now - history.failing_since >= LOST_AFTER:
            return Lost()
        history.pause = min(Seconds(2 * history.pause), PAUSE_MAX)
        return Again(history.pause)
