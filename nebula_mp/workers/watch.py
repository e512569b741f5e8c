"""Finds processes that are alive and do nothing: their counter of passes stands still.

Data flow: stats pages: mp.passes -> supervisor -> [workers.watch] -> who is stuck -> supervisor: SIGABRT
Pure: knows numbers and times; knows nothing of processes and pages.
Source: docs/architecture.md, "What happens when something fails".

Every process counts a pass at least twice a second. It is stuck when the count has stood still for two
seconds as the supervisor lived them: a look that comes late proves nothing, since whatever held up the
supervisor (a suspended machine, a debugger, one CPU for all) held up the others as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nebula_mp.newtypes import Seconds

INTERVAL: Final = Seconds(0.25)
LOOKS: Final = 8
"""For so many looks on time the count may stand still."""
LOOKS_AT_START: Final = 40
"""Before the first pass: a successor of control rebuilds its tunnels."""


@dataclass(slots=True)
class _Seen:
    passes: int
    still: int = 0
    has_moved: bool = False


class Watch:
    """`handle_start` for each who is started; `look` every INTERVAL, with everybody who is running."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._looked: Seconds | None = None

    def handle_start(self, start: int, passes: int) -> None:
        """Note the count before start number `start`: its page was its predecessor's."""
        self._seen[start] = _Seen(passes)

    def look(self, now: Seconds, passes: Mapping[int, int]) -> tuple[int, ...]:
        """Give those who are stuck, each once. `passes`: the count of each, by the number of its start."""
        is_on_time = self._looked is not None and now - self._looked <= 2 * INTERVAL
        self._looked = now
        before, self._seen = self._seen, {}
        stuck = []
        for start, count in passes.items():
            seen = before[start]
            if seen.passes != count:
                seen = _Seen(count, has_moved=True)
            elif is_on_time:
                seen.still += 1  # goes on: one that takes its time to die is not reported again
            self._seen[start] = seen
            if seen.still == 1 + (LOOKS if seen.has_moved else LOOKS_AT_START):
                stuck.append(start)
        return tuple(stuck)
