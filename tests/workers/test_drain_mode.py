"""The rule of `mp.drain: auto`: its table, its numbers, and what it does on machines that are simulated."""

import random
from dataclasses import dataclass, field
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.config.model import DrainMode
from nebula_mp.newtypes import Seconds
from nebula_mp.workers.drain_mode import (
    NEXT,
    PAUSE,
    WINDOW,
    AutoDrain,
    Finding,
    Phase,
    Senses,
    is_tried,
)

START = Senses(Seconds(1000), Seconds(5), Seconds(1), Seconds(2), 10**9)
TRYING = (Phase.TRYING_WRITER, Phase.TRYING_READER)
GB = 10**9


class Machine:
    """An AutoDrain and the senses that it is given, window by window; what it did is in `phases`."""

    def __init__(self) -> None:
        self.auto = AutoDrain(START)
        self.senses = START
        self.phases: list[tuple[float, Phase]] = [(0.0, self.auto.phase)]

    @property
    def now(self) -> float:
        return self.senses.at - START.at

    def window(
        self,
        *,
        own: float = 0.5,
        delay: float = 0.0,
        writer: float = 0.0,
        rate: float = GB,
        span: float = WINDOW,
    ) -> Phase:
        """One window with these shares of its time and this rate in bytes a second."""
        at, own_cpu, own_delay, writer_cpu, moved = self.senses
        self.senses = Senses(
            Seconds(at + span),
            Seconds(own_cpu + own * span),
            Seconds(own_delay + delay * span),
            Seconds(writer_cpu + writer * span),
            moved + round(rate * span),
        )
        mode = self.auto.handle_window(self.senses)
        assert mode is self.auto.mode
        if self.auto.phase is not self.phases[-1][1]:
            self.phases.append((self.now, self.auto.phase))
        return self.auto.phase

    def windows(self, count: int, **shares: float) -> Phase:
        for _ in range(count):
            self.window(**shares)
        return self.auto.phase

    def to(self, phase: Phase) -> "Machine":
        """Bring it there."""
        path = {
            Phase.READER: (),
            Phase.TRYING_WRITER: (Phase.TRYING_WRITER,),
            Phase.WRITER: (Phase.TRYING_WRITER, Phase.WRITER),
            Phase.TRYING_READER: (Phase.TRYING_WRITER, Phase.WRITER, Phase.TRYING_READER),
        }[phase]
        for step in path:
            match step:
                case Phase.TRYING_WRITER:
                    self.windows(3, own=1.0)
                case Phase.WRITER:
                    self.windows(6, own=1.0, writer=0.8, rate=1.5 * GB)
                case _:
                    self.windows(101, own=1.0, writer=0.8, delay=0.2, rate=1.5 * GB)
            assert self.auto.phase is step
        return self


def test_the_mode_of_each_phase_says_who_drains_in_it() -> None:
    modes = {phase: Machine().to(phase).auto.mode for phase in Phase}

    assert modes == {
        Phase.READER: DrainMode.READER,
        Phase.TRYING_WRITER: DrainMode.WRITER,
        Phase.WRITER: DrainMode.WRITER,
        Phase.TRYING_READER: DrainMode.READER,
    }


BUSY = {"own": 1.0, "writer": 0.8}
WHAT_SHOWS: dict[tuple[Phase, Finding], list[dict[str, float]]] = {
    (Phase.READER, Finding.BOTTLENECK): [BUSY] * 3,
    (Phase.READER, Finding.LIGHT): [{"own": 0.1}] * 10,
    (Phase.READER, Finding.DELAYED): [{"own": 0.5, "delay": 0.4}] * 110,
    (Phase.READER, Finding.PAUSE): [{"own": 1.0, "span": PAUSE}] * 9,
    (Phase.READER, Finding.NOTHING): [BUSY] * 2,
    (Phase.TRYING_WRITER, Finding.WON): [BUSY | {"rate": 1.06 * GB}] * 6,
    (Phase.TRYING_WRITER, Finding.LOST): [BUSY | {"rate": 1.04 * GB}] * 6,
    (Phase.TRYING_WRITER, Finding.PAUSE): [{"span": PAUSE}],
    (Phase.TRYING_WRITER, Finding.NOTHING): [BUSY | {"rate": 9 * GB}] * 5,
    (Phase.TRYING_WRITER, Finding.BOTTLENECK): [BUSY] * 5,
    (Phase.TRYING_WRITER, Finding.LIGHT): [{"own": 0.1, "rate": GB}] * 5,
    (Phase.TRYING_WRITER, Finding.DELAYED): [{"own": 0.5, "delay": 0.5}] * 5,
    (Phase.WRITER, Finding.LIGHT): [{"own": 0.5, "writer": 0.34}] * 3,
    (Phase.WRITER, Finding.DELAYED): [BUSY | {"delay": 0.11}] * 101,
    (Phase.WRITER, Finding.PAUSE): [{"own": 1.0, "span": PAUSE}],
    (Phase.WRITER, Finding.NOTHING): [BUSY | {"delay": 0.09}] * 500,
    (Phase.WRITER, Finding.BOTTLENECK): [BUSY] * 99,
    (Phase.TRYING_READER, Finding.WON): [BUSY | {"rate": 1.46 * GB}] * 3,
    (Phase.TRYING_READER, Finding.LOST): [BUSY | {"rate": 1.45 * GB}] * 3,
    (Phase.TRYING_READER, Finding.PAUSE): [{"span": PAUSE}],
    (Phase.TRYING_READER, Finding.NOTHING): [BUSY] * 2,
    (Phase.TRYING_READER, Finding.BOTTLENECK): [{"own": 1.0}] * 2,
    (Phase.TRYING_READER, Finding.LIGHT): [{"own": 0.1}] * 2,
    (Phase.TRYING_READER, Finding.DELAYED): [{"own": 0.5, "delay": 0.5}] * 2,
}
IMPOSSIBLE = {
    (Phase.READER, Finding.WON),
    (Phase.READER, Finding.LOST),
    (Phase.WRITER, Finding.WON),
    (Phase.WRITER, Finding.LOST),
}
"""A trial ends in a trial only."""


def test_every_pair_of_phase_and_finding_is_walked_here() -> None:
    assert WHAT_SHOWS.keys() | IMPOSSIBLE == set(product(Phase, Finding))
    assert NEXT.keys() <= WHAT_SHOWS.keys()


@pytest.mark.parametrize(("phase", "finding"), WHAT_SHOWS)
def test_a_phase_follows_another_exactly_as_the_table_says(phase: Phase, finding: Finding) -> None:
    machine = Machine().to(phase)
    shown = WHAT_SHOWS[phase, finding]

    before_last = [machine.window(**window) for window in shown[:-1]]
    after = machine.window(**shown[-1])

    assert set(before_last) <= {phase}, "too early"
    assert after is NEXT.get((phase, finding), phase)


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param({"own": 0.94}, id="not quite the bottleneck"),
        pytest.param({"own": 1.0, "delay": 0.06}, id="not alone on its core"),
        pytest.param({"own": 1.0, "span": PAUSE}, id="a pause"),
    ],
)
def test_a_trial_needs_three_good_windows_running(spoiled: dict[str, float]) -> None:
    machine = Machine()
    for _ in range(5):
        machine.windows(2, own=1.0)
        assert machine.window(**spoiled) is Phase.READER

    assert machine.windows(2, own=1.0) is Phase.READER
    assert machine.window(own=1.0) is Phase.TRYING_WRITER


def test_the_first_window_of_a_trial_is_not_counted() -> None:
    machine = Machine().to(Phase.TRYING_WRITER)
    machine.window(**BUSY, rate=100 * GB)

    assert machine.windows(5, **BUSY, rate=GB) is Phase.READER


def test_a_trial_is_compared_with_the_three_windows_before_it() -> None:
    machine = Machine()
    machine.windows(50, own=0.9, rate=9 * GB)
    machine.windows(3, own=1.0, rate=GB)

    assert machine.windows(6, **BUSY, rate=1.1 * GB) is Phase.WRITER


def test_good_windows_that_did_not_run_up_to_a_trial_do_not_count_for_it() -> None:
    machine = Machine()
    machine.windows(2, own=1.0, rate=9 * GB)
    machine.window(own=0.5)
    machine.windows(3, own=1.0, rate=GB)

    assert machine.windows(6, **BUSY, rate=1.1 * GB) is Phase.WRITER


def test_whether_the_reader_waits_for_its_core_is_asked_of_the_last_two_seconds() -> None:
    machine = Machine().to(Phase.WRITER)
    machine.windows(101, **BUSY, delay=0.0)

    assert machine.windows(101, **BUSY, delay=0.15) is Phase.TRYING_READER


def test_what_is_in_force_when_a_hold_ends_is_how_it_went_lately() -> None:
    """The load doubled while the last trial's hold was in force."""
    machine = Machine().to(Phase.TRYING_WRITER)
    machine.windows(6, **BUSY)
    machine.windows(9, own=1.0, rate=GB)
    while machine.window(own=1.0, rate=2 * GB) is Phase.READER:
        pass

    assert machine.windows(6, **BUSY, rate=1.9 * GB) is Phase.READER


def test_light_load_must_last_for_three_windows_to_end_the_pipeline() -> None:
    machine = Machine().to(Phase.WRITER)
    for _ in range(5):
        machine.windows(2, own=0.3, writer=0.3)
        assert machine.window(own=0.5, writer=0.36) is Phase.WRITER

    assert machine.windows(3, own=0.3, writer=0.3) is Phase.READER


def test_waiting_for_a_core_never_ends_the_pipeline_without_a_trial() -> None:
    machine = Machine().to(Phase.WRITER)

    for _ in range(1000):
        if machine.window(own=0.75, writer=0.75, delay=0.25, rate=1.5 * GB) is Phase.TRYING_READER:
            machine.windows(3, own=0.6, delay=0.4, rate=GB)

    assert Phase.READER not in [phase for _, phase in machine.phases[1:]]
    trials = [at for at, phase in machine.phases if phase is Phase.TRYING_READER]
    assert len(trials) > 5
    assert min(after - before for before, after in pairwise(trials)) >= 2


def test_failed_trials_come_at_longer_and_longer_intervals_up_to_eight_seconds() -> None:
    machine = Machine()
    while machine.now < 60:
        machine.window(own=1.0)

    starts = [at for at, phase in machine.phases if phase is Phase.TRYING_WRITER]
    holds = [round(after - before, 1) for before, after in pairwise(starts)]
    # Trial of 120 ms, hold, and up to three windows until the last three are fresh.
    expected = [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    assert len(holds) >= 8
    for hold, least in zip(holds, expected, strict=False):
        assert least + 0.1 <= hold <= least + 0.3


def test_a_won_trial_shortens_the_interval_again() -> None:
    machine = Machine()
    while machine.now < 30:
        machine.window(own=1.0)
    while machine.auto.phase is not Phase.TRYING_WRITER:
        machine.window(own=1.0)
    machine.windows(6, **BUSY, rate=2 * GB)
    assert machine.windows(3, own=0.2) is Phase.READER

    for _ in range(2):  # the second one shows how long a trial that failed holds the next one back
        left = machine.now
        while machine.window(own=1.0) is Phase.READER:
            pass
        assert machine.now - left < 0.5
        machine.windows(6, **BUSY)


def test_a_trial_that_a_pause_broke_off_counts_as_failed() -> None:
    machine = Machine()
    for _ in range(6):
        while machine.auto.phase is Phase.READER:
            machine.window(own=1.0)
        machine.window(span=PAUSE)

    starts = [at for at, phase in machine.phases if phase is Phase.TRYING_WRITER]
    assert starts[-1] - starts[-2] > 4


def test_after_the_reader_has_won_the_next_trial_is_a_second_away() -> None:
    machine = Machine().to(Phase.TRYING_READER)
    assert machine.windows(3, own=1.0, rate=1.5 * GB) is Phase.READER
    left = machine.now

    while machine.window(own=1.0) is Phase.READER:
        pass

    assert 1.0 < machine.now - left < 1.2


def test_a_window_is_due_twenty_milliseconds_after_the_last_one() -> None:
    auto = AutoDrain(START)

    assert not auto.due(Seconds(START.at + 0.019))
    assert auto.due(Seconds(START.at + 0.021))
    auto.handle_window(START._replace(at=Seconds(START.at + 0.021)))
    assert not auto.due(Seconds(START.at + 0.040))


@pytest.mark.parametrize(
    ("mode", "cpus", "has_delay", "expected"),
    [
        (DrainMode.AUTO, 4, True, True),
        (DrainMode.AUTO, 64, True, True),
        (DrainMode.AUTO, 3, True, False),
        (DrainMode.AUTO, 1, True, False),
        (DrainMode.AUTO, 64, False, False),
        (DrainMode.READER, 64, True, False),
        (DrainMode.WRITER, 64, True, False),
    ],
)
def test_trials_are_for_auto_on_four_cpus_and_more(
    mode: DrainMode, cpus: int, *, has_delay: bool, expected: bool
) -> None:
    assert is_tried(mode, cpus=cpus, has_delay=has_delay) is expected


share = st.floats(0, 1)
window = st.fixed_dictionaries(
    {
        "own": share | st.just(1.0),
        "delay": share | st.just(0.0),
        "writer": share,
        "rate": st.floats(0, 5 * GB),
        "span": st.just(WINDOW) | st.floats(WINDOW, 1),
    }
)
runs = st.lists(st.tuples(window, st.integers(1, 12)), max_size=80)


@given(runs)
def test_whatever_it_sees_the_pipeline_is_kept_only_after_a_trial_that_was_finished(
    seen: list[tuple[dict[str, float], int]],
) -> None:
    machine = Machine()
    in_trial = 0
    for shares, count in seen:
        for _ in range(count):
            before = machine.auto.phase
            after = machine.window(**shares)
            if before in TRYING:
                in_trial += 1
            if before is after:
                assert in_trial < 6, "a trial without an end"
                continue
            assert after in {end for (start, _), end in NEXT.items() if start is before}
            if after is Phase.WRITER:
                assert in_trial == (6 if before is Phase.TRYING_WRITER else 3)
            if after in TRYING:
                assert before not in TRYING
            in_trial = 0


@dataclass
class Host:
    """A machine whose cores, costs and load say how much is moved; the scheduler shares a core fairly.

    Sealing a byte takes `seal`, draining it `drain`; the pipeline costs both `switch` more for each byte.
    """

    cores: float = 8.0
    offered: float = 4 * GB
    seal: float = 0.6 / GB
    drain: float = 0.4 / GB
    switch: float = 0.06 / GB
    noise: float = 0.01
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def shares(self, mode: DrainMode) -> dict[str, float]:
        """What a window shows when `mode` is in force."""
        if mode is DrainMode.READER:
            own_want, writer_want = min(1.0, self.offered * (self.seal + self.drain)), 0.0
            capacity = 1 / (self.seal + self.drain)
        else:
            slower = max(self.seal, self.drain) + self.switch
            rate = min(self.offered, 1 / slower)
            own_want, writer_want = rate * (self.seal + self.switch), rate * (self.drain + self.switch)
            capacity = 1 / slower
        wanted = own_want + writer_want
        got = min(1.0, self.cores / wanted) if wanted else 1.0
        rate = min(self.offered, capacity) * got * self.dice.gauss(1, self.noise)
        return {
            "own": own_want * got,
            "delay": own_want * (1 - got),
            "writer": writer_want * got,
            "rate": rate,
        }


def run(machine: Machine, host: Host, until: float) -> None:
    while machine.now < until:
        machine.window(**host.shares(machine.auto.mode))


def test_on_a_full_machine_no_trial_is_ever_started() -> None:
    machine = Machine()

    run(machine, Host(cores=0.8), 60)

    assert machine.phases == [(0.0, Phase.READER)]


def test_below_its_capacity_no_trial_is_ever_started() -> None:
    machine = Machine()

    run(machine, Host(offered=0.8 * GB), 60)

    assert machine.phases == [(0.0, Phase.READER)]


@pytest.mark.parametrize("seed", range(20))
def test_with_a_spare_core_the_pipeline_is_found_within_a_second_and_kept(seed: int) -> None:
    machine = Machine()

    run(machine, Host(dice=random.Random(seed)), 60)

    assert [phase for _, phase in machine.phases] == [Phase.READER, Phase.TRYING_WRITER, Phase.WRITER]
    assert machine.phases[-1][0] < 1


def test_a_pipeline_that_moves_no_more_is_tried_now_and_then_and_never_kept() -> None:
    """Nearly all of the work is sealing, so that a second core has nothing to do."""
    machine = Machine()

    run(machine, Host(seal=0.97 / GB, drain=0.03 / GB), 120)

    assert Phase.WRITER not in [phase for _, phase in machine.phases]
    trials = [at for at, phase in machine.phases if phase is Phase.TRYING_WRITER]
    assert 5 <= len([at for at in trials if at <= 16]) <= 8
    assert len(trials) <= 8 + 104 / 8


def test_a_flood_of_which_nothing_is_moved_is_no_reason_for_a_pipeline() -> None:
    machine = Machine()

    while machine.now < 30:
        machine.window(own=1.0, rate=0)

    assert {phase for _, phase in machine.phases} == {Phase.READER, Phase.TRYING_WRITER}


def test_a_pipeline_through_which_nothing_comes_ends_when_it_is_looked_at() -> None:
    machine = Machine().to(Phase.WRITER)
    machine.windows(102, own=1.0, delay=0.2, rate=0)

    assert machine.windows(3, own=1.0, rate=0) is Phase.READER


def test_when_the_spare_core_goes_the_reader_drains_again_and_when_it_comes_back_the_writer() -> None:
    machine, host = Machine(), Host()
    run(machine, host, 5)
    assert machine.auto.phase is Phase.WRITER

    host.cores = 0.9
    run(machine, host, 20)
    assert machine.phases[-1][1] is Phase.READER
    host.cores = 8
    run(machine, host, 30)

    assert machine.auto.phase is Phase.WRITER
    assert len(machine.phases) < 12


def test_when_the_load_goes_the_reader_drains_again_at_once() -> None:
    machine, host = Machine(), Host()
    run(machine, host, 5)

    host.offered = 0.3 * GB
    run(machine, host, 5.1)

    assert machine.auto.phase is Phase.READER


def test_when_everything_stops_the_first_packet_afterwards_finds_the_reader_draining() -> None:
    machine, host = Machine(), Host()
    run(machine, host, 5)

    assert machine.window(own=0.001, rate=0, span=3600) is Phase.READER
