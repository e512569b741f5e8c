"""Deadlines by key."""

from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.control.timers import Timers
from nebula_mp.newtypes import Seconds


def test_due_keys_come_in_the_order_of_their_deadlines() -> None:
    timers = Timers[str]()
    timers.arm("late", Seconds(3))
    timers.arm("early", Seconds(1))
    timers.arm("never", Seconds(9))

    due = list(timers.pop_due(Seconds(3)))

    assert due == ["early", "late"]
    assert timers.next() == Seconds(9)


def test_arming_again_moves_the_deadline_and_cancelling_removes_it() -> None:
    timers = Timers[str]()
    timers.arm("moved", Seconds(1))
    timers.arm("moved", Seconds(5))
    timers.arm("gone", Seconds(1))
    timers.cancel("gone")
    timers.cancel("was never there")

    assert list(timers.pop_due(Seconds(4))) == []
    assert list(timers.pop_due(Seconds(5))) == ["moved"]
    assert timers.next() is None


def test_a_key_armed_while_others_are_handed_out_waits_for_its_own_time() -> None:
    timers = Timers[str]()
    timers.arm("periodic", Seconds(1))

    for key in timers.pop_due(Seconds(1)):
        timers.arm(key, Seconds(2))

    assert timers.next() == Seconds(2)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("arm"), st.integers(0, 9), st.integers(0, 50)),
            st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("pop"), st.just(0), st.integers(0, 50)),
        ),
        max_size=400,
    )
)
def test_it_agrees_with_a_plain_dictionary(steps: list[tuple[str, int, int]]) -> None:
    timers = Timers[int]()
    model: dict[int, int] = {}

    for step, key, at in steps:
        if step == "arm":
            timers.arm(key, Seconds(at))
            model[key] = at
        elif step == "cancel":
            timers.cancel(key)
            model.pop(key, None)
        else:
            popped = list(timers.pop_due(Seconds(at)))
            due = sorted(time for time in model.values() if time <= at)
            assert [model.pop(key) for key in popped] == due
        assert timers.next() == (Seconds(min(model.values())) if model else None)
        assert len(timers) == len(model)
