"""What is said of a process that runs, that waits for its start, and that was given up."""

import os
from typing import Any, cast

import pytest

from nebula_mp.newtypes import Seconds
from nebula_mp.shm_stats import NAMES
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.parts import Role
from nebula_mp.workers.report import Slot, describe
from nebula_mp.workers.spawn import Child
from tests.support.processes import forked


class StandInMemory:
    """Counters that are their own number in the list of names."""

    def counters(self, name: str) -> dict[str, int]:
        del name
        return {name: number for number, name in enumerate(NAMES)}

    def ring_fill(self, worker: int) -> int:
        return 10 + worker


def described(slot: Slot) -> dict[str, Any]:
    (found,) = describe([slot], cast("Memory", StandInMemory()), Seconds(107.9))
    return found


def child(pid: int) -> Child:
    return Child(Role.READER, 1, "reader/1", 3, pid, Seconds(100), -1)


def test_a_running_worker() -> None:
    found = described(Slot(Role.READER, 1, "reader/1", child=child(os.getpid()), restarts=2))

    place = {name: number for number, name in enumerate(NAMES)}
    assert found.pop("core") in range(os.cpu_count() or 1)
    assert found.pop("cpu_s") > 0
    assert found == {
        "role": "reader",
        "worker": 1,
        "pid": os.getpid(),
        "state": "running",
        "restarts": 2,
        "uptime_s": 7,
        "packets_in": place["mp.tun.rx.packets"] + place["mp.udp.rx.packets"],
        "packets_out": place["mp.tun.tx.packets"] + place["mp.udp.tx.packets"],
        "ring_fill": 11,
    }


def test_one_that_has_just_died_has_no_core() -> None:
    with forked(lambda: None) as dead:
        dead.wait()

        found = described(Slot(Role.READER, 1, "reader/1", child=child(dead.pid)))

    assert (found["core"], found["cpu_s"], found["pid"]) == (None, None, dead.pid)


@pytest.mark.parametrize(("given_up", "state"), [(False, "backing off"), (True, "given up")])
def test_one_that_is_not_there_has_no_pid(given_up: bool, state: str) -> None:
    found = described(Slot(Role.WRITER, 0, "writer/0", given_up=given_up, restarts=5))

    assert (found["state"], found["restarts"]) == (state, 5)
    assert (found["pid"], found["core"], found["cpu_s"], found["uptime_s"]) == (None, None, None, None)


def test_control_belongs_to_no_worker_and_has_no_ring() -> None:
    found = described(Slot(Role.CONTROL, 0, "control"))

    assert (found["worker"], found["ring_fill"]) == (None, None)
