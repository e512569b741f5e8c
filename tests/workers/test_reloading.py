"""The course of a reload, step by step, with a host, a check and a control of the test's own."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from nebula_mp import clock
from nebula_mp.config.model import Config, MpConfig, PkiConfig, TunConfig
from nebula_mp.errors import ConfigError, NebulaError, SystemCallError
from nebula_mp.newtypes import IPInterface, Seconds
from nebula_mp.workers.checked import Check, Checked, PkiSources, decode
from nebula_mp.workers.events import Events
from nebula_mp.workers.host import Host
from nebula_mp.workers.reloading import Reloading

PATIENCE = Seconds(30)
CONFIG = Config(pki=PkiConfig(ca="", cert="", key=""), tun=TunConfig(dev="nebula1"))


def checked(config: Config = CONFIG, *warnings: str) -> Checked:
    return Checked(
        config=config,
        pki_sources=PkiSources(cert="", key="", ca=""),
        warnings=warnings,
        sources=("config.yml",),
        networks=(),
        name="host",
        at=0,
        key=os.memfd_create("key", os.MFD_CLOEXEC),
    )


class StandInCheck:
    """Ends when the test says so, with what the test found good or wrong."""

    def __init__(self) -> None:
        self.source, self._sink = os.pipe()
        self.outcome: Checked | NebulaError = NebulaError("closed")

    def fileno(self) -> int:
        return self.source

    def end(self, outcome: Checked | NebulaError) -> None:
        self.outcome = outcome
        os.write(self._sink, b".")

    def finish(self) -> Checked:
        self.close()
        if isinstance(self.outcome, NebulaError):
            raise self.outcome
        return self.outcome

    def close(self) -> None:
        for descriptor in (self.source, self._sink):
            os.close(descriptor)


@dataclass
class StandInHost:
    device: str = "nebula1"
    refuses: bool = False
    mtu: int = 1300
    steps: list[str] = field(default_factory=list)

    def prepare(self, config: Config, networks: tuple[IPInterface, ...], undo: ExitStack) -> tuple[str, ...]:
        del networks
        undo.callback(setattr, self, "mtu", self.mtu)
        self.mtu = config.tun.mtu
        if self.refuses:
            raise SystemCallError("tun: refused")
        return ("buffer too small",)


@dataclass
class StandInHands:
    """What the supervisor is asked to do."""

    control_runs: bool = True
    asked: list[dict[str, object]] = field(default_factory=list)
    answers: list[tuple[int, Mapping[str, object] | None, str | None]] = field(default_factory=list)
    commits: list[tuple[Checked, bool]] = field(default_factory=list)

    def tell_control(self, kind: str, body: Mapping[str, object], *descriptors: int) -> bool:
        assert kind == "reload"
        assert len(descriptors) == 1
        if self.control_runs:
            self.asked.append(dict(body))
        return self.control_runs

    def committed(self, checked: Checked, *, has_new_networks: bool) -> None:
        self.commits.append((checked, has_new_networks))

    def answer(self, request: int, result: Mapping[str, object] | None, error: str | None) -> None:
        self.answers.append((request, result, error))


class Course:
    """A reload under test. `check` is the latest that was begun."""

    def __init__(self, closing: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events = Events(clock.monotonic)
        self.host = StandInHost()
        self.hands = StandInHands()
        self.checks: list[StandInCheck] = []
        self.has_room = True
        self.running = checked()
        self.reloading = Reloading(
            cast("Host", self.host), self.events, lambda: pytest.fail("loads"), self.hands, self.running
        )
        monkeypatch.setattr(Check, "begin", self._begin)
        closing.callback(self.events.close)
        closing.callback(self.reloading.close)

    def _begin(self, _: object, *, replaces: Checked) -> StandInCheck:
        assert replaces == self.reloading.running
        if not self.has_room:
            raise SystemCallError("configuration: no process to check it in (EAGAIN)")
        self.checks.append(StandInCheck())
        return self.checks[-1]

    def end_check(self, outcome: Checked | NebulaError) -> None:
        check = self.checks[-1]
        done = len(self.hands.asked) + len(self.hands.answers)
        check.end(outcome)
        self.events.run_until(
            lambda: len(self.hands.asked) + len(self.hands.answers) > done or not self.is_checking, PATIENCE
        )

    @property
    def is_checking(self) -> bool:
        return self.reloading._check is not None

    def reply(self, error: str | None = None, *warnings: str) -> None:
        body = {"id": self.hands.asked[-1]["id"], "error": error, "warnings": list(warnings)}
        self.reloading.handle_reloaded(body)


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Iterator[Course]:
    with ExitStack() as closing:
        yield Course(closing, monkeypatch)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def new(mtu: int = 1400, **mp: object) -> Checked:
    made = replace(CONFIG, tun=TunConfig(dev="nebula1", mtu=mtu), mp=MpConfig(**mp))  # type: ignore[arg-type]
    return checked(made, "one warning")


def test_control_gets_the_merged_configuration_without_the_key_in_it(course: Course) -> None:
    course.reloading.request(7)
    course.end_check(new(workers=3))

    (asked,) = course.hands.asked
    sent = asked["checked"]
    assert isinstance(sent, bytes)
    assert decode(sent).config.tun.mtu == 1400
    assert decode(sent).config.mp.workers is None
    assert decode(sent).key == -1
    assert course.hands.commits == []


def test_what_control_took_over_is_in_force_and_answered(course: Course) -> None:
    old, taken = course.running, new(workers=3)
    course.reloading.request(7)
    course.end_check(taken)
    course.reply(None, "one warning", "another")

    assert course.reloading.running.config.tun.mtu == 1400
    assert course.reloading.running.key == taken.key
    assert is_open(taken.key)
    assert not is_open(old.key)
    assert [new_networks for _, new_networks in course.hands.commits] == [False]
    warnings = ["one warning", "changed, but needs a restart: mp.workers", "buffer too small", "another"]
    assert course.hands.answers == [(7, {"device": "nebula1", "warnings": warnings}, None)]


@pytest.mark.parametrize("how", ["wrong", "refused by the host", "no control", "refused by control", "dies"])
def test_a_failure_at_any_step_leaves_everything_as_it_was(course: Course, how: str) -> None:
    taken = new()
    course.host.refuses = how == "refused by the host"
    course.hands.control_runs = how != "no control"

    course.reloading.request(7)
    course.end_check(ConfigError("config.yml: wrong") if how == "wrong" else taken)
    if how == "refused by control":
        course.reply("not today")
    elif how == "dies":
        course.reloading.handle_control_ended()

    expected = {
        "wrong": "config.yml: wrong",
        "refused by the host": "tun: refused",
        "no control": "control is not running at the moment: try again",
        "refused by control": "not today",
        "dies": "reload abandoned: control ended before it answered; try again",
    }
    assert course.hands.answers == [(7, None, expected[how])]
    assert course.reloading.running is course.running
    assert course.host.mtu == 1300
    assert course.hands.commits == []
    assert not course.reloading.is_under_way
    assert is_open(course.running.key)
    assert is_open(taken.key) == (how == "wrong")  # where it never got to us
    if how == "wrong":
        os.close(taken.key)


def test_a_refusal_is_logged_with_the_warnings_found_on_the_way(
    course: Course, caplog: pytest.LogCaptureFixture
) -> None:
    course.reloading.request(7)
    course.end_check(ConfigError("c.yml:1:1: pki.ca: bad", "c.yml:2:1: pki.key: bad", warnings=("odd",)))

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "odd"),
        ("ERROR", "reload failed, nothing was changed"),
    ]
    assert course.hands.answers == [(7, None, "c.yml:1:1: pki.ca: bad\nc.yml:2:1: pki.key: bad")]


def test_a_machine_without_room_for_a_check_is_told(course: Course) -> None:
    course.has_room = False

    course.reloading.request(7)

    assert course.hands.answers == [(7, None, "configuration: no process to check it in (EAGAIN)")]
    assert not course.reloading.is_under_way


def test_who_asks_meanwhile_is_answered_by_the_next_one_all_together(course: Course) -> None:
    course.reloading.request(1)
    for command in (2, None, None, 3):
        course.reloading.request(command)
    assert len(course.checks) == 1

    course.end_check(new())
    course.reply()
    assert [number for number, _, _ in course.hands.answers] == [1]
    assert len(course.checks) == 2
    course.end_check(new(1500))
    course.reply()

    assert [number for number, _, _ in course.hands.answers] == [1, 2, 3]
    assert course.reloading.running.config.tun.mtu == 1500
    assert len(course.checks) == 2


def test_an_answer_to_one_that_was_given_up_changes_nothing(course: Course) -> None:
    course.reloading.request(1)
    course.end_check(new())
    stale = course.hands.asked[-1]["id"]
    course.reloading.handle_control_ended()
    course.reloading.request(2)
    course.end_check(new())

    course.reloading.handle_reloaded({"id": stale, "error": None, "warnings": []})
    assert course.hands.commits == []
    course.reply()

    assert len(course.hands.commits) == 1


def test_a_death_of_control_while_the_check_goes_on_stops_nothing(course: Course) -> None:
    course.reloading.request(1)

    course.reloading.handle_control_ended()
    course.end_check(new())
    course.reply()

    assert [error for _, _, error in course.hands.answers] == [None]


@pytest.mark.parametrize("step", ["checking", "asking", "none"])
def test_the_end_gives_up_what_is_under_way(course: Course, step: str) -> None:
    taken = new()
    if step != "none":
        course.reloading.request(1)
    if step == "asking":
        course.end_check(taken)
        assert course.host.mtu == 1400

    course.reloading.close()
    course.reloading.close()

    assert course.host.mtu == 1300
    assert course.hands.answers == []
    assert not is_open(course.running.key)
    if step == "asking":
        assert not is_open(taken.key)
    else:
        os.close(taken.key)
