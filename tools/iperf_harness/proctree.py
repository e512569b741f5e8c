"""Processor time and memory of a process and everything below it, and of the whole machine.

Data flow: /proc -> [iperf_harness.proctree] -> runner
Times only grow, children that ended included: when a parent waits for one, its time moves into the parent's.
What left the tree (a daemon whose parent ended) is not seen, nor a child whose parent ignores SIGCHLD once it
ended. The kernel rounds each process down to a tick (10 ms).
Source: proc_pid_stat(5), proc_pid_smaps(5), proc_stat(5).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PPID, _UTIME, _CSTIME, _START = 1, 11, 14, 19  # positions behind the name, which may hold anything
_BUSY = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq; guests are counted in user
_IDLE, _IOWAIT, _STOLEN = 3, 4, 7


class Process(NamedTuple):
    """One line of /proc/PID/stat; `cpu_s` with the children that were waited for."""

    pid: int
    parent: int
    started: int  # ticks since boot; with the pid it names a process for good
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Tree:
    """What a process and its descendants are, and have used so far."""

    members: frozenset[tuple[int, int]]  # pid and start, so that a pid used again is another one
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds of all processors so far."""

    busy_s: float
    stolen_s: float  # given to other guests of the same host
    all_s: float

    def since(self, earlier: "Machine") -> "Machine":
        """The difference."""
        return Machine(
            self.busy_s - earlier.busy_s, self.stolen_s - earlier.stolen_s, self.all_s - earlier.all_s
        )


def trees(roots: Sequence[int]) -> list[Tree]:
    """The tree below each of `roots` and its time, all of one look; both empty once a root is gone."""
    return [
        Tree(
            members=frozenset((process.pid, process.started) for process in found),
            cpu_s=sum(process.cpu_s for process in found),
        )
        for found in _descendants(roots)
    ]


def pss_bytes(roots: Sequence[int]) -> int:
    """Proportional set size of the trees: a page that n processes share counts 1/n for each of them."""
    return sum(_pss_bytes(process.pid) for found in _descendants(roots) for process in found)


def machine() -> Machine:
    """What all processors have done since boot."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy, stolen = sum(ticks[at] for at in _BUSY), ticks[_STOLEN]
    total = busy + stolen + ticks[_IDLE] + ticks[_IOWAIT]
    return Machine(busy / _TICKS_PER_S, stolen / _TICKS_PER_S, total / _TICKS_PER_S)


def _descendants(roots: Sequence[int]) -> list[list[Process]]:
    everyone = {process.pid: process for process in _processes()}
    children: dict[int, list[Process]] = {}
    for process in everyone.values():
        children.setdefault(process.parent, []).append(process)
    families = [[everyone[root]] if root in everyone else [] for root in roots]
    for family in families:
        for process in family:  # grows while it is walked
            family.extend(children.get(process.pid, []))
    return families


def _processes() -> Iterator[Process]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - a third of the time, and it is within the measurement
        if name.isdigit() and (process := _process(int(name))) is not None:
            yield process


def _process(pid: int) -> Process | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None  # it has just ended
    ticks = sum(int(field) for field in fields[_UTIME : _CSTIME + 1])
    return Process(pid, int(fields[_PPID]), int(fields[_START]), ticks / _TICKS_PER_S)


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
