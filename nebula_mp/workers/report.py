"""What each process of a gateway is doing, for `nebula-mp status`.

Data flow: /proc, stats pages, rings -> [workers.report] -> supervisor -> services -> cli.status
Reads and changes nothing. Source: proc(5), by way of psutil.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from nebula_mp.newtypes import Seconds
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.parts import Role
from nebula_mp.workers.spawn import Child

_IN = ("mp.tun.rx.packets", "mp.udp.rx.packets")
_OUT = ("mp.tun.tx.packets", "mp.udp.tx.packets")


@dataclass(slots=True)
class Slot:
    """The place of one process: who is in it now, and what became of those before."""

    role: Role
    number: int
    name: str  # as in the parts
    child: Child | None = None
    restarts: int = 0
    starts_at: Seconds | None = None  # after a pause, unless it runs
    given_up: bool = False

    @property
    def is_worker(self) -> bool:
        """Whether it carries packets."""
        return self.role in (Role.READER, Role.WRITER)


def describe(slots: Iterable[Slot], memory: Memory, now: Seconds) -> list[dict[str, object]]:
    """One map for each process, as msgpack takes it. What is not known of it is None."""
    return [_describe(slot, memory, now) for slot in slots]


def _describe(slot: Slot, memory: Memory, now: Seconds) -> dict[str, object]:
    child = slot.child
    counters = memory.counters(slot.name)
    core, cpu_s = _use_of(child.pid) if child is not None else (None, None)
    state = "given up" if slot.given_up else "backing off" if child is None else "running"
    return {
        "role": str(slot.role),
        "worker": slot.number if slot.is_worker else None,
        "pid": child.pid if child is not None else None,
        "core": core,
        "cpu_s": cpu_s,
        "state": state,
        "restarts": slot.restarts,
        "uptime_s": int(now - child.started) if child is not None else None,
        "packets_in": sum(counters[name] for name in _IN),
        "packets_out": sum(counters[name] for name in _OUT),
        "ring_fill": memory.ring_fill(slot.number) if slot.is_worker else None,
    }


def _use_of(pid: int) -> tuple[int | None, float | None]:
    """The CPU it ran on last, and the seconds it has used."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return process.cpu_num(), round(times.user + times.system, 3)
    except (psutil.Error, OSError):  # it has just died, or /proc is hidden
        return None, None
