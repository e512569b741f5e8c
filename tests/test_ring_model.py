"""The ring's protocol as an explicit-state model: every reachable state of two processes that may die at any step.

Four areas of two entries. The reader fills and may drain, the writer drains, the supervisor clears and restarts;
each has its own store buffer, as on x86-64: its stores become visible to the other in order, but later, and only
a system call that takes a lock in the kernel empties it. The time limit of the bell is left out: it is a belt.
Area numbers are kept relative to tail, so that the states of an endless run are finite.

`test_shm_ring.py` holds the steps below against the loads and stores that the real classes make.
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import pytest

from nebula_mp.shm_ring import Recovery

AREAS = 4
ENTRIES = 2
BUFFERED_MAX = 2

NOBODY, READER, WRITER, DEAD_READER, DEAD_WRITER = range(5)
OLD = -2  # the number of any area that was released before the last one
NO_AREA = -1_000_000


class Without(Enum):
    """The protocol with one of its checks or orders removed."""

    NOTHING = "nothing"
    FULL_CHECK = "the check that an area is free before it is filled"
    LAST_AREA_KEPT = "the equals sign in that check"
    DATA_BEFORE_HEAD = "the order of data and head"
    RETURN_BEFORE_TAIL = "waiting for the system call before tail is stored"
    PROGRESS_BEFORE_CALL = "the order of progress and system call"
    PROGRESS_NUMBER = "the area's number in progress"
    PROGRESS = "looking at progress"
    LEASE_TEST = "the comparison in compare and swap"
    LEASE_LOCK = "the record lock around compare and swap"
    LOCK_IS_BARRIER = "that dropping the lock makes the store before it visible"
    LOCK_ENDS_WITH_HOLDER = "that the lock ends with its holder (flock, OFD locks)"
    TAIL_AFTER_LEASE = "loading tail only after the lease was taken"
    LEASE_AFTER_TAIL = "the order of tail and dropping the lease"
    WHOLE_AREAS = "dropping the lease between areas only"
    LEASE_CLEARED = "clearing a dead holder's lease"
    CLEARED_IF_DEAD = "waiting for the holder's death before clearing its lease"
    CLEARED_IF_HOLDER = "comparing before clearing"
    RING_AFTER_PUBLISH = "ringing after a publish without the lease"
    RING_WHEN_REFUSED = "ringing after a pass without the lease that published nothing, with areas waiting"
    RING_AFTER_DROP = "ringing after a drop that leaves areas"
    RING_AFTER_DEATH = "ringing after a death"
    COMING_BACK = "the writer's coming back for what it left"
    EMPTY_BEFORE_LOOK = "emptying the bell before looking"
    CALL_TO_RING = "the system call: a word says who sleeps, and no fence orders it"


class Cpu(NamedTuple):
    """One process: what it does next, what it keeps to itself, and its stores that nobody else sees yet."""

    step: str
    drains: bool = False
    area: int = NO_AREA  # private tail, while it drains
    entry: int = 0
    stores: tuple[tuple[str, int, int], ...] = ()
    empties_late: bool = False


class State(NamedTuple):
    """Shared memory, lock and bell as everybody sees them, the two processes, and what a witness expects."""

    head: int
    tail: int
    progress: tuple[int, int]
    lease: int
    lock: int
    rung: bool
    asleep: bool
    slots: tuple[int, ...]  # which area's bytes are there
    due: int  # witness: the number of the entry that has to come out next
    cpus: tuple[Cpu, Cpu]


class BrokenError(Exception):
    pass


START = State(
    head=0,
    tail=0,
    progress=(0, 0),
    lease=NOBODY,
    lock=NOBODY,
    rung=False,
    asleep=False,
    slots=(OLD,) * AREAS,
    due=0,
    cpus=(Cpu("idle"), Cpu("")),
)


class Model:
    """`next_states(state)` are all that can follow; BrokenError when one of them must not be."""

    def __init__(
        self, recovery: Recovery, without: Without = Without.NOTHING, *, fenced: bool = False
    ) -> None:
        self.goes_on = recovery is Recovery.GO_ON_BEHIND
        self.without = without
        self.fenced = fenced
        self.rest = "doze" if without is Without.CALL_TO_RING else "asleep"

    # What a process sees: its own stores first.

    def head(self, state: State, cpu: Cpu) -> int:
        return next((value for name, value, _ in reversed(cpu.stores) if name == "head"), state.head)

    def tail(self, state: State, cpu: Cpu) -> int:
        return next((value for name, value, _ in reversed(cpu.stores) if name == "tail"), state.tail)

    def lease(self, state: State, cpu: Cpu) -> int:
        return next((value for name, value, _ in reversed(cpu.stores) if name == "lease"), state.lease)

    def progress(self, state: State, cpu: Cpu) -> tuple[int, int]:
        stored = (store[1:] for store in reversed(cpu.stores) if store[0] == "progress")
        return next(stored, state.progress)

    def content(self, state: State, cpu: Cpu, area: int) -> int:
        own = any(name == "data" and value == area for name, value, _ in cpu.stores)
        return area if own else state.slots[area % AREAS]

    # How stores become visible.

    def apply(self, state: State, store: tuple[str, int, int]) -> State:
        name, value, more = store
        match name:
            case "head":
                return state._replace(head=value)
            case "tail":
                return state._replace(tail=value)
            case "lease":
                return state._replace(lease=value)
            case "progress":
                return state._replace(progress=(value, more))
            case "asleep":
                return state._replace(asleep=bool(value))
        slots = list(state.slots)
        slots[value % AREAS] = value
        return state._replace(slots=tuple(slots))

    def flushed(self, state: State, who: int) -> State:
        for store in state.cpus[who].stores:
            state = self.apply(state, store)
        return with_cpu(state, who, state.cpus[who]._replace(stores=()))

    # Every step.

    def next_states(self, state: State) -> Iterator[tuple[str, State]]:
        for who, name in enumerate(("reader", "writer")):
            cpu = state.cpus[who]
            if cpu.stores:
                first = with_cpu(self.apply(state, cpu.stores[0]), who, cpu._replace(stores=cpu.stores[1:]))
                yield f"{name}: {cpu.stores[0]} becomes visible", first
            if self.without is Without.CLEARED_IF_DEAD and state.lease != NOBODY:
                yield "supervisor: has waited long enough", state._replace(lease=NOBODY)
            if cpu.step in ("dead", "cleared", "rung"):
                yield from self.supervisor(state, who, f"supervisor, {name}")
                continue
            for text, after in self.program(state, who):
                if len(after.cpus[who].stores) <= BUFFERED_MAX:
                    yield f"{name}: {text}", after
            yield from self.death(state, who, name)

    def program(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        cpu = state.cpus[who]
        me = (READER, WRITER)[who]
        without = self.without

        def then(step: str, *stores: tuple[str, int, int], on: State = state, **changes: object) -> State:
            changed = on.cpus[who]._replace(step=step, **changes)  # type: ignore[arg-type]
            return with_cpu(on, who, changed._replace(stores=(*changed.stores, *stores)))

        match cpu.step:
            # The reader at rest. In mode `reader` it takes the lease before it polls, in mode `writer` never.
            case "idle":
                yield "mode reader", then("glance")
                yield "mode writer", then("poll")

            # The lease.
            case "glance" if without is Without.TAIL_AFTER_LEASE and cpu.area == NO_AREA:
                yield "loads tail too early", then("glance", area=self.tail(state, cpu))
            case "glance":
                yield "glances at the lease", then("lock" if self.lease(state, cpu) == NOBODY else "refused")
            case "lock" if without is Without.LEASE_LOCK:
                yield "goes on without the lock", then("test")
            case "lock" if state.lock == NOBODY:
                yield "takes the lock", then("test", on=self.flushed(state, who)._replace(lock=me))
            case "lock":
                yield "finds the lock taken", then("refused")
            case "test":
                is_free = self.lease(state, cpu) == NOBODY or without is Without.LEASE_TEST
                yield "compares the lease", then("mark" if is_free else "unlock", drains=is_free)
            case "mark":
                yield "stores the lease", then("unlock", ("lease", me, 0))
            case "unlock":
                # Dropping the lock is a system call; the store of the lease is visible after it.
                dropped = state if without is Without.LOCK_IS_BARRIER else self.flushed(state, who)
                if without is not Without.LEASE_LOCK:
                    dropped = dropped._replace(lock=NOBODY)
                yield "drops the lock", then("took" if cpu.drains else "refused", on=dropped)
            case "took":
                early = without is Without.TAIL_AFTER_LEASE
                yield "loads tail", then("hub", area=cpu.area if early else self.tail(state, cpu))
            case "refused":
                yield "is not the consumer", then("poll" if who == 0 else self.rest, area=NO_AREA)

            # A pass of the reader without the lease. It rings when areas wait, though it published none.
            case "poll":
                yield "input came", then("fill")
                yield "no input", then("idle" if without is Without.RING_WHEN_REFUSED else "settle")
            case "settle":
                waiting = self.head(state, cpu) > self.tail(state, cpu)
                yield "looks whether areas wait", then("ring" if waiting else "idle")

            # With the lease in hand: fill, drain an area, or drop it, in any order.
            case "hub":
                pending = self.head(state, cpu) > cpu.area
                if who == 0:
                    yield "input came", then("fill")
                if pending:
                    yield "copies the entries", then("begin", entry=self.first_entry(state, cpu))
                yield "drops the lease", self.dropped(state, who, left=pending)

            # Producing.
            case "fill":
                taken = self.head(state, cpu) - self.tail(state, cpu)
                room = {Without.FULL_CHECK: taken + 1, Without.LAST_AREA_KEPT: AREAS + 1}.get(without, AREAS)
                full = "hub" if cpu.drains else "idle" if without is Without.RING_WHEN_REFUSED else "settle"
                yield "looks for a free area", then("data" if taken < room else full)
            case "data":
                number = self.head(state, cpu)
                if without is Without.DATA_BEFORE_HEAD:
                    yield "publishes too early", then("late data", ("head", number + 1, 0))
                else:
                    yield "stores entries and bytes", then("publish", ("data", number, 0))
            case "late data":
                number = self.head(state, cpu) - 1
                yield "stores entries and bytes", then("hub" if cpu.drains else "ring", ("data", number, 0))
            case "publish":
                rings = not cpu.drains and without is not Without.RING_AFTER_PUBLISH
                after = "ring" if rings else "hub" if cpu.drains else "idle"
                yield "publishes", then(after, ("head", self.head(state, cpu) + 1, 0))
            case "ring" if without is Without.CALL_TO_RING:
                on = self.flushed(state, who) if self.fenced else state
                yield "looks who sleeps", then("idle", on=on._replace(rung=on.rung or on.asleep))
            case "ring":
                yield "rings", then("idle", on=self.flushed(state, who)._replace(rung=True))

            # Draining: for each entry progress (open ring), the system call, its return; then tail.
            case "begin" if cpu.entry == 1 and without is Without.WHOLE_AREAS:
                yield "drops the lease", self.dropped(state, who, left=True)
            case "begin" if cpu.entry == ENTRIES:
                yield "all entries were begun before", then("release")
            case "begin" if self.goes_on and without is not Without.PROGRESS_BEFORE_CALL:
                yield "stores progress", then("call", ("progress", cpu.area, cpu.entry + 1))
            case "begin":
                yield "goes on", then("call")
            case "call":
                self.look(state, cpu)
                early = without is Without.RETURN_BEFORE_TAIL and cpu.entry == ENTRIES - 1
                stores = [("tail", cpu.area + 1, 0)] if early else []
                yield "is inside the system call", then("inside", *stores)
            case "inside":
                self.look(state, cpu)
                delivered = self.delivered(state, cpu)
                if self.goes_on and without is Without.PROGRESS_BEFORE_CALL:
                    yield "returns", then("late progress", on=delivered)
                else:
                    yield "returns", self.next_entry(delivered, who)
            case "late progress":
                stored = with_cpu(
                    state, who, cpu._replace(stores=(*cpu.stores, ("progress", cpu.area, cpu.entry + 1)))
                )
                yield "stores progress", self.next_entry(stored, who)
            case "release":
                if without is Without.LEASE_AFTER_TAIL:
                    yield "drops the lease too early", then("late tail", ("lease", NOBODY, 0))
                else:
                    yield "releases", then("hub", ("tail", cpu.area + 1, 0), area=cpu.area + 1, entry=0)
            case "late tail":
                yield "releases", self.dropped(then("", ("tail", cpu.area + 1, 0)), who, left=True)

            # The writer at rest.
            case "asleep" if cpu.empties_late:
                emptied = state._replace(rung=False)
                yield "empties the bell too late", then("asleep", on=emptied, empties_late=False)
            case "asleep" if state.rung:
                late = without is Without.EMPTY_BEFORE_LOOK
                woken = state._replace(rung=late, asleep=False)
                yield "wakes", then("glance", on=woken, empties_late=late)
            case "doze":
                yield "says that it will sleep", then("look again", ("asleep", 1, 0))
            case "look again":
                on = self.flushed(state, who) if self.fenced else state
                pending = self.head(on, cpu) > self.tail(on, cpu)
                yield "looks again", then("glance" if pending else "asleep", on=on)

    def dropped(self, state: State, who: int, *, left: bool) -> State:
        """The reader leaves areas to the writer and rings; the writer comes back for them."""
        if who == 0:
            step = "ring" if left and self.without is not Without.RING_AFTER_DROP else "idle"
        else:
            step = "glance" if left and self.without is not Without.COMING_BACK else self.rest
        stores = (*state.cpus[who].stores, ("lease", NOBODY, 0))
        return with_cpu(state, who, Cpu(step, stores=stores, empties_late=state.cpus[who].empties_late))

    def first_entry(self, state: State, cpu: Cpu) -> int:
        if not self.goes_on or self.without is Without.PROGRESS:
            return 0
        area, begun = self.progress(state, cpu)
        return begun if area == cpu.area or self.without is Without.PROGRESS_NUMBER else 0

    def next_entry(self, state: State, who: int) -> State:
        cpu = state.cpus[who]
        entry = cpu.entry + 1
        return with_cpu(state, who, cpu._replace(step="begin" if entry < ENTRIES else "release", entry=entry))

    def death(self, state: State, who: int, name: str) -> Iterator[tuple[str, State]]:
        """It can come at every step; inside the system call, before or after the kernel did what was asked."""
        outcomes = [state]
        if state.cpus[who].step == "inside":
            self.look(state, state.cpus[who])
            outcomes.append(self.delivered(state, state.cpus[who]))
        for outcome in outcomes:
            was = outcome.cpus[who]
            # A store buffer outlives its process; the kernel ends the process's locks.
            dead = with_cpu(self.flushed(outcome, who), who, Cpu("dead"))
            if dead.lease == (READER, WRITER)[who]:
                dead = dead._replace(lease=(DEAD_READER, DEAD_WRITER)[who])
            if dead.lock == (READER, WRITER)[who] and self.without is not Without.LOCK_ENDS_WITH_HOLDER:
                dead = dead._replace(lock=NOBODY)
            if was.drains and not self.goes_on:
                dead = dead._replace(due=dead.tail * ENTRIES)  # all of the area comes again
            elif was.drains and was.step in ("call", "inside"):
                begun = was.area * ENTRIES + was.entry + 1
                dead = dead._replace(due=max(dead.due, begun))  # the one that may be lost
            yield f"{name}: dies", dead

    def supervisor(self, state: State, who: int, name: str) -> Iterator[tuple[str, State]]:
        cpu = state.cpus[who]
        match cpu.step:
            case "dead":
                holders = {(DEAD_READER, DEAD_WRITER)[who]}
                if self.without is Without.CLEARED_IF_HOLDER:
                    holders = {READER, WRITER, DEAD_READER, DEAD_WRITER}
                if self.without is Without.LEASE_CLEARED:
                    holders = set()
                cleared = state._replace(lease=NOBODY) if state.lease in holders else state
                yield f"{name}: clears the lease", with_cpu(cleared, who, Cpu("cleared"))
            case "cleared":
                rung = state if self.without is Without.RING_AFTER_DEATH else state._replace(rung=True)
                yield f"{name}: rings", with_cpu(rung, who, Cpu("rung"))
            case "rung":
                yield f"{name}: starts a successor", with_cpu(state, who, Cpu(("idle", self.rest)[who]))

    # What must hold.

    def look(self, state: State, cpu: Cpu) -> None:
        """What the kernel sees while it has the borrowed area."""
        found = self.content(state, cpu, cpu.area)
        if found != cpu.area:
            raise BrokenError(f"area {cpu.area} holds area {found} during a system call on it")

    def delivered(self, state: State, cpu: Cpu) -> State:
        number = cpu.area * ENTRIES + cpu.entry
        if number != state.due:
            raise BrokenError(f"entry {number} came out, {state.due} was due")
        return state._replace(due=number + 1)

    def check(self, state: State) -> None:
        if state.tail * ENTRIES > state.due:
            raise BrokenError("an area was released before all of it came out")
        reader, writer = state.cpus
        rest = reader.step == "idle" and writer.step == "asleep" and not reader.stores and not writer.stores
        if rest and not state.rung and not writer.empties_late and state.head > state.tail:
            raise BrokenError("lost wake-up: areas are ready and everybody sleeps")


def with_cpu(state: State, who: int, cpu: Cpu) -> State:
    return state._replace(cpus=(cpu, state.cpus[1]) if who == 0 else (state.cpus[0], cpu))


def relative(state: State) -> State:
    """The same state counted from tail, so that an endless run comes back to states it was in."""
    base = state.tail
    if base == 0:
        return state
    slots = tuple(max(state.slots[(base + n) % AREAS] - base, OLD) for n in range(AREAS))
    return state._replace(
        head=state.head - base,
        tail=0,
        progress=(max(state.progress[0] - base, OLD), state.progress[1]),
        slots=slots,
        due=state.due - base * ENTRIES,
        cpus=tuple(relative_cpu(cpu, base) for cpu in state.cpus),  # type: ignore[arg-type]
    )


NUMBERS = ("head", "tail", "progress", "data")


def relative_cpu(cpu: Cpu, base: int) -> Cpu:
    stores = tuple(
        (name, value - base if name in NUMBERS else value, more) for name, value, more in cpu.stores
    )
    return cpu._replace(area=cpu.area if cpu.area == NO_AREA else cpu.area - base, stores=stores)


def explore(model: Model) -> int:
    """Number of states reached from START, breadth first. BrokenError tells the shortest way to a bad one."""
    start = with_cpu(START, 1, Cpu(model.rest))
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    wave = [start]
    while wave:
        following = []
        for state in wave:
            try:
                for text, after in model.next_states(state):
                    model.check(after)
                    seen = relative(after)
                    if seen not in came_from:
                        came_from[seen] = (state, text)
                        following.append(seen)
            except BrokenError as error:
                story = []
                step = came_from[state]
                while step is not None:
                    story.append(step[1])
                    step = came_from[step[0]]
                raise BrokenError("\n".join([*reversed(story), str(error)])) from None
        wave = following
    return len(came_from)


@pytest.mark.parametrize(
    ("recovery", "states"), [(Recovery.SEND_AGAIN, 50_891), (Recovery.GO_ON_BEHIND, 53_623)]
)
def test_with_deaths_at_every_step_nothing_is_lost_twice_or_overwritten_and_no_wake_up_is_lost(
    recovery: Recovery, states: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explore(Model(recovery))

    with capsys.disabled():
        print(f"\nring model, {recovery.value}: {found:,} states")
    # All of them: another number means that the model explores something else than it used to.
    assert found == states


ONLY = {
    Without.PROGRESS: Recovery.GO_ON_BEHIND,
    Without.PROGRESS_NUMBER: Recovery.GO_ON_BEHIND,
    Without.PROGRESS_BEFORE_CALL: Recovery.GO_ON_BEHIND,
    Without.WHOLE_AREAS: Recovery.SEND_AGAIN,
}
"""Rules that matter to one kind of ring."""


@pytest.mark.parametrize(
    ("recovery", "without"),
    [
        pytest.param(recovery, without, id=f"{recovery.name}-{without.name}")
        for without in Without
        for recovery in Recovery
        if without is not Without.NOTHING and ONLY.get(without, recovery) is recovery
    ],
)
def test_each_check_and_each_order_is_needed(recovery: Recovery, without: Without) -> None:
    with pytest.raises(BrokenError):
        explore(Model(recovery, without))


def test_a_word_that_says_who_sleeps_would_do_if_python_had_a_fence() -> None:
    explore(Model(Recovery.SEND_AGAIN, Without.CALL_TO_RING, fenced=True))
