"""What is looked at, and when it is said; on a clock of the test's own."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nebula_mp import clock
from nebula_mp.config.model import LogLevel
from nebula_mp.newtypes import Seconds
from nebula_mp.workers import logs
from nebula_mp.workers.events import Events
from nebula_mp.workers.host import Host
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.upkeep import Upkeep


class Kept:
    """An upkeep whose host is the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = Seconds(100)
        self.drops = [0, 0]
        self.queues = 0
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.news: list[tuple[str, ...]] = []
        self.settled = 0
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)
        monkeypatch.setattr(logs, "write", self._write)
        readers = [SimpleNamespace(kernel_drops=lambda each=each: self.drops[each]) for each in range(2)]
        self.steering = SimpleNamespace(is_steered=True, readers=2, reader=lambda number: readers[number])
        host = SimpleNamespace(
            steering=self.steering,
            foreign_queues=lambda: self.queues,
            watcher=SimpleNamespace(poll_changed=lambda: self.news.pop(0)),
        )
        self.events = Events(lambda: self.now)
        memory = cast("Memory", None)  # nobody is running
        self.upkeep = Upkeep(cast("Host", host), memory, self.events, self._on_settled)

    def _write(self, level: LogLevel, message: str, fields: dict[str, Any]) -> None:
        del level
        self.said.append((message, fields))

    def _on_settled(self) -> None:
        self.settled += 1

    def look(self, seconds: float = 1) -> list[dict[str, Any]]:
        """What is said at a look so much later."""
        self.now = Seconds(self.now + seconds)
        self.said.clear()
        self.upkeep.look([])
        return [fields for _, fields in self.said]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


def test_datagrams_that_found_no_room_are_told_once_a_minute_with_their_number(kept: Kept) -> None:
    assert kept.look() == []
    kept.drops = [3, 4]
    assert kept.look() == [{"drops": 7, "new": 7, "count": 1}]
    kept.drops = [5, 4]
    assert kept.look() == []
    kept.drops = [6, 4]
    assert kept.look(60) == [{"drops": 10, "new": 1, "count": 2}]
    assert kept.look(60) == []


def test_the_one_socket_of_a_kernel_that_does_not_steer_is_left_to_control(kept: Kept) -> None:
    kept.steering.is_steered = False
    kept.drops = [3, 4]

    assert kept.look() == []


def test_queues_of_somebody_else_are_told(kept: Kept) -> None:
    kept.queues = 1

    assert kept.look(1) == []
    assert kept.look(10) == [{"queues": 1, "count": 1}]
    assert kept.look(10) == []


def test_news_of_the_underlay_are_passed_on_once_they_have_settled(kept: Kept) -> None:
    kept.news = [("+192.0.2.1",), (), ("-192.0.2.1", "eth0 up")]
    for _ in range(3):
        kept.upkeep.handle_netlink()
    assert kept.settled == 0
    assert [fields for _, fields in kept.said] == [
        {"changes": ("+192.0.2.1",)},
        {"changes": ("-192.0.2.1", "eth0 up")},
    ]

    kept.now = Seconds(kept.now + 1)
    kept.events.run_until(lambda: kept.settled > 0, Seconds(0.5))
    assert kept.settled == 1

    kept.news = [("+192.0.2.2",)]
    kept.upkeep.handle_netlink()
    kept.now = Seconds(kept.now + 1)
    kept.events.run_until(lambda: kept.settled > 1, Seconds(0.5))
    assert kept.settled == 2
