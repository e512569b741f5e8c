"""The decision at a tunnel's periodic check, for every state and input."""

import itertools

import pytest

from nebula_mp.config.model import TimersConfig, TunnelsConfig
from nebula_mp.control.liveness import Decision, Traffic, check
from nebula_mp.newtypes import Seconds

KEEP_IDLE = TunnelsConfig(drop_inactive=False)
DROP_IDLE = TunnelsConfig(drop_inactive=True, inactivity_timeout=Seconds(60))
TIMERS = TimersConfig()  # 5 s and 10 s

NOW = Seconds(1000)
LATER, COME = Seconds(1003), Seconds(1000)

# saw_in, delete_at, primary, saw_out -> decision, delete_at afterwards, next check; ... stands for any value
TABLE = [
    ((True, ..., ..., ...), Decision.ALIVE, None, 1005),
    ((False, COME, ..., ...), Decision.DEAD, COME, 1005),
    ((False, LATER, True, ...), Decision.TEST, LATER, 1002.5),
    ((False, LATER, False, ...), Decision.WAIT, LATER, 1003),
    ((False, None, True, False), Decision.IDLE, None, 1005),
    ((False, None, True, True), Decision.TEST, 1010, 1002.5),
    ((False, None, False, ...), Decision.WAIT, 1010, 1010),
]


@pytest.mark.parametrize(
    "state", list(itertools.product([False, True], [None, LATER, COME], [False, True], [False, True]))
)
def test_every_state_has_exactly_one_row_and_the_check_follows_it(
    state: tuple[bool, Seconds | None, bool, bool],
) -> None:
    saw_in, delete_at, primary, saw_out = state
    rows = [
        (decision, delete, again)
        for pattern, decision, delete, again in TABLE
        if all(want is ... or want == have for want, have in zip(pattern, state, strict=True))
    ]
    traffic = Traffic(Seconds(0), saw_in=saw_in, saw_out=saw_out, delete_at=delete_at)

    decision, again = check(traffic, primary=primary, now=NOW, tunnels=KEEP_IDLE, timers=TIMERS)

    assert rows == [(decision, traffic.delete_at, again)]
    assert not traffic.saw_in
    assert not traffic.saw_out
    # What we send while we test does not count as use.
    used = saw_in or (saw_out and delete_at is None)
    assert traffic.last_used == (NOW if used else Seconds(0))


@pytest.mark.parametrize(
    ("idle", "config", "decision"),
    [
        pytest.param(59, DROP_IDLE, Decision.IDLE, id="before the limit"),
        pytest.param(60, DROP_IDLE, Decision.INACTIVE, id="at the limit"),
        pytest.param(6000, KEEP_IDLE, Decision.IDLE, id="without the option"),
    ],
)
def test_an_idle_tunnel_is_given_up_only_if_asked_for_and_only_at_the_limit(
    idle: float, config: TunnelsConfig, decision: Decision
) -> None:
    traffic = Traffic(last_used=Seconds(100))

    assert check(traffic, primary=True, now=Seconds(100 + idle), tunnels=config, timers=TIMERS)[0] is decision


def test_four_tests_are_sent_before_a_silent_tunnel_is_dead() -> None:
    traffic = Traffic(Seconds(0), saw_out=True)
    now = Seconds(5)
    decisions = []

    while (step := check(traffic, primary=True, now=now, tunnels=KEEP_IDLE, timers=TIMERS))[
        0
    ] is not Decision.DEAD:
        decisions.append(step[0])
        now = step[1]

    assert decisions == 4 * [Decision.TEST]
    assert now == Seconds(15)


def test_an_answer_to_a_test_ends_the_pending_deletion() -> None:
    traffic = Traffic(Seconds(0), saw_out=True)
    first, again = check(traffic, primary=True, now=Seconds(5), tunnels=KEEP_IDLE, timers=TIMERS)
    traffic.saw_in = True

    second, _ = check(traffic, primary=True, now=again, tunnels=KEEP_IDLE, timers=TIMERS)

    assert (first, second) == (Decision.TEST, Decision.ALIVE)
    assert traffic.delete_at is None
