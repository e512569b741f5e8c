import contextlib
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from nebula_mp.shm import PAGE_BYTES, LockFile, Mapping, RecordLock, load_word
from nebula_mp.shm_ring import (
    DATA,
    HEAD,
    LEASE,
    PROGRESS,
    STATE,
    TAIL,
    Bell,
    Consumer,
    DrainLease,
    Geometry,
    Producer,
    Recovery,
    RingMemory,
    holder_word,
)
from tests.support.processes import Forked, Keep, eventually
from tests.support.rings import (
    READER,
    SMALL,
    WRITER,
    check_delivered,
    entries_of,
    number_of,
    packet_of,
    produce,
    publish,
    small_ring,
)


@pytest.fixture
def keep() -> Iterator[Keep]:
    with Keep() as keeper:
        yield keeper


@pytest.fixture
def memory(keep: Keep) -> RingMemory:
    return keep(small_ring())


@pytest.fixture
def locks(keep: Keep) -> LockFile:
    return keep(LockFile.create())


@pytest.fixture
def bell(keep: Keep) -> Bell:
    return keep(Bell.create())


class DeathError(BaseException):
    """The process ends here."""


@dataclass
class Fate:
    """What a process did, and after how many more steps it dies; below 0: never."""

    steps_left: int = -1
    log: list[str] = field(default_factory=list)

    def step(self, what: str) -> None:
        if self.steps_left == 0:
            raise DeathError
        self.steps_left -= 1
        self.log.append(what)


class WatchedWords:
    """The words of a mapping, each access a step."""

    NAMES = {
        ("data", 2): "generation",
        ("data", HEAD): "head",
        ("state", TAIL): "tail",
        ("state", LEASE): "lease",
        ("state", PROGRESS): "progress",
    }
    IN_AREA = ("count", "number")

    def __init__(self, words: memoryview, region: str, fate: Fate) -> None:
        self.words, self.region, self.fate = words, region, fate

    def name(self, index: int) -> str:
        found = self.NAMES.get((self.region, index))
        return found or self.IN_AREA[(8 * index - PAGE_BYTES) % SMALL.area_bytes // 8]

    def __getitem__(self, index: int) -> int:
        self.fate.step(f"load {self.name(index)}")
        value: int = self.words[index]
        return value

    def __setitem__(self, index: int, value: int) -> None:
        self.fate.step(f"store {self.name(index)}")
        self.words[index] = value


class WatchedLock(RecordLock):
    """Taking it is a step. Dropping it is none: death drops it too."""

    fate: Fate

    def try_take(self) -> bool:
        self.fate.step("take lock")
        return super().try_take()

    def drop(self) -> None:
        self.fate.log.append("drop lock")
        super().drop()


class SystemCall:
    """Gives a packet to the kernel. Death may come before the kernel did it, or before the call returns."""

    def __init__(self, fate: Fate, delivered: list[int]) -> None:
        self.fate, self.delivered = fate, delivered

    def __call__(self, packet: bytes) -> None:
        self.fate.step("system call")
        self.delivered.append(number_of(packet))
        self.fate.step("return")


class Party:
    """A reader or a writer, with both ring sides as it maps them, in the loops that the ring asks for."""

    def __init__(
        self, memory: RingMemory, locks: LockFile, bell: Bell, holder: int, recovery: Recovery
    ) -> None:
        self.memory, self.bell, self.holder = memory, bell, holder
        self.fate = Fate()
        data = Mapping(memory.data.descriptor, DATA, writable=True)
        state = Mapping(memory.state.descriptor, STATE, writable=True)
        for mapping, name in ((data, "data"), (state, "state")):
            mapping.words = WatchedWords(mapping.words, name, self.fate)  # type: ignore[assignment]
        lock = WatchedLock(locks.descriptor, 1)
        lock.fate = self.fate
        self.producer = Producer(data, state)
        self.consumer = Consumer(data, state, lease=DrainLease(state, lock, holder), recovery=recovery)

    def drain(self, system_call: Callable[[bytes], None]) -> None:
        while self.consumer.pending():
            for _, data in self.consumer.entries():
                system_call(bytes(data))
            self.consumer.release()

    def reader_pass(self, system_call: Callable[[bytes], None], areas: int, *, drains: bool = True) -> None:
        if drains and self.consumer.try_take():
            self.drain(system_call)
            self.fill(areas)
            self.drain(system_call)
            if self.consumer.drop():
                self.bell.ring()
        else:
            self.fill(areas)
            if self.producer.waiting():
                self.bell.ring()

    def fill(self, areas: int) -> None:
        for _ in range(areas):
            number = load_word(self.memory.data.descriptor, HEAD)
            if not publish(self.producer, *(packet_of(number, entry) for entry in range(entries_of(number)))):
                return

    def writer_pass(self, system_call: Callable[[bytes], None]) -> None:
        while self.consumer.try_take():
            self.drain(system_call)
            if not self.consumer.drop():
                return


@pytest.mark.parametrize("recovery", Recovery)
@pytest.mark.parametrize(
    ("role", "drains", "steps_min"), [("reader", True, 90), ("reader", False, 8), ("writer", True, 40)]
)
def test_a_death_before_any_access_or_around_any_system_call_loses_and_repeats_no_more_than_allowed(
    role: str, recovery: Recovery, locks: LockFile, bell: Bell, *, drains: bool, steps_min: int
) -> None:
    """What is left is drained by a writer that only the bell wakes, so a lost wake-up shows as well."""
    for steps_left in range(1000):
        delivered: list[int] = []
        died = False
        with contextlib.closing(small_ring()) as memory:
            reader = Party(memory, locks, bell, READER, recovery)
            writer = Party(memory, locks, bell, WRITER, recovery)
            reader.fill(3)
            victim = reader if role == "reader" else writer
            victim.fate.steps_left = steps_left
            try:
                if role == "reader":
                    victim.reader_pass(SystemCall(victim.fate, delivered), 3, drains=drains)
                else:
                    victim.writer_pass(SystemCall(victim.fate, delivered))
            except DeathError:
                died = True
                memory.clear_dead(victim.holder)
                bell.ring()
                successor = Party(memory, locks, bell, holder_word(1003, 3), recovery)
                writer = successor if role == "writer" else writer
            while bell.wait(0):
                writer.writer_pass(SystemCall(writer.fate, delivered))

            check_delivered(delivered, load_word(memory.data.descriptor, HEAD), recovery, died)
            assert (memory.fill(), memory.holder()) == (0, None)
        if not died:
            break
    assert steps_left >= steps_min


def test_the_classes_make_the_loads_and_stores_of_the_model_in_its_order(
    memory: RingMemory, locks: LockFile, keep: Keep
) -> None:
    """The model in test_ring_model.py is about these steps; change both or neither."""
    party = Party(memory, locks, keep(Bell.create()), READER, Recovery.GO_ON_BEHIND)

    def accesses(call: Callable[[], object]) -> list[str]:
        party.fate.log.clear()
        call()
        return list(party.fate.log)

    producer, consumer = party.producer, party.consumer
    assert accesses(consumer.try_take) == [
        "load lease",
        "take lock",
        "load lease",
        "store lease",
        "drop lock",
        "load tail",
    ]
    assert accesses(producer.try_begin) == ["load generation", "load tail"]
    assert accesses(lambda: producer.try_add(b"a", 1) and producer.try_add(b"b", 1)) == []
    assert accesses(producer.publish) == ["store count", "store number", "store head"]
    assert accesses(producer.waiting) == ["load tail"]
    assert accesses(consumer.pending) == ["load generation", "load head"]
    entries = consumer.entries()
    assert accesses(lambda: next(entries)) == ["load number", "load count", "load progress", "store progress"]
    assert accesses(lambda: next(entries)) == ["store progress"]
    assert accesses(lambda: next(entries, None)) == []
    assert accesses(consumer.release) == ["load lease", "load number", "store tail"]
    assert accesses(consumer.drop) == ["load generation", "load head", "load lease", "store lease"]


# Real processes, killed and stopped.


class Sink:
    """Where packets go: a socket that keeps their borders, full when nobody reads it, as a device may be."""

    def __init__(self) -> None:
        self.inside, self.outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        self.outside.setblocking(False)
        self.delivered: list[int] = []

    def send(self, packet: memoryview) -> None:
        assert self.inside.send(packet) == len(packet)

    def receive(self, limit_s: float) -> int:
        """Take what comes within the time; how much there is in all."""
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            if select.select([self.outside], [], [], left)[0]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self.delivered.append(number_of(self.outside.recv(65_536)))
        return len(self.delivered)

    def close(self) -> None:
        self.inside.close()
        self.outside.close()


@dataclass
class Pair:
    """A reader and a writer as processes, and the test in the supervisor's place."""

    memory: RingMemory
    locks: LockFile
    bell: Bell
    sink: Sink
    recovery: Recovery
    generation: int = 0
    children: dict[str, tuple[Forked, int]] = field(default_factory=dict)

    def start(self, role: str) -> None:
        self.generation += 1
        generation = self.generation

        def main() -> None:
            # As in the program: a child has only the descriptors it is entitled to, then it attaches.
            if role == "writer":
                os.close(self.memory.data.descriptor)
            holder = holder_word(os.getpid(), generation)
            (self.read if role == "reader" else self.write)(holder, random.Random(generation))

        child = Forked(main)
        self.children[role] = child, holder_word(child.pid, generation)

    def attach(self, holder: int, *, writable: bool) -> tuple[Mapping, Mapping, Consumer]:
        region = self.memory.data
        data = Mapping(region.descriptor if writable else region.read_only, DATA, writable=writable)
        state = Mapping(self.memory.state.descriptor, STATE, writable=True)
        lease = DrainLease(state, self.locks.lock(0), holder)
        return data, state, Consumer(data, state, lease=lease, recovery=self.recovery)

    def drain(self, consumer: Consumer, budget: int) -> None:
        for _ in range(min(consumer.pending(), budget)):
            for _, packet in consumer.entries():
                self.sink.send(packet)
            consumer.release()

    def read(self, holder: int, dice: random.Random) -> None:
        data, state, consumer = self.attach(holder, writable=True)
        producer = Producer(data, state, poison=True)
        while True:
            takes = dice.random() < 0.5 and consumer.try_take()
            if takes:
                self.drain(consumer, 8)
            for _ in range(dice.randrange(4)):
                area = load_word(self.memory.data.descriptor, HEAD)
                publish(producer, *(packet_of(area, entry) for entry in range(entries_of(area))))
            if takes:
                self.drain(consumer, dice.randrange(8))
            if consumer.drop() if takes else producer.waiting():
                self.bell.ring()

    def write(self, holder: int, dice: random.Random) -> None:
        _, _, consumer = self.attach(holder, writable=False)
        while True:
            while consumer.try_take():
                self.drain(consumer, dice.randrange(1, 9))
                if not consumer.drop():
                    break
            self.bell.wait(1000)

    def bury(self, role: str, status: int) -> None:
        """What the supervisor does after a death."""
        child, holder = self.children[role]
        assert child.kill() == status
        self.memory.clear_dead(holder)
        self.bell.ring()

    def close(self) -> None:
        for child, _ in self.children.values():
            child.kill()


@pytest.fixture
def pair(request: pytest.FixtureRequest, locks: LockFile, bell: Bell, keep: Keep) -> Pair:
    memory = keep(small_ring(Geometry(areas=8, area_bytes=1024, entries_max=8)))
    return keep(Pair(memory, locks, bell, keep(Sink()), request.param))


@pytest.mark.parametrize("pair", Recovery, indirect=True)
def test_kill_9_and_sigstop_at_random_moments_alter_nothing_and_lose_and_repeat_no_more_than_allowed(
    pair: Pair,
) -> None:
    dice = random.Random(4)
    pair.start("reader")
    pair.start("writer")
    deaths = stops = 0
    while deaths < 120:
        pair.sink.receive(dice.random() * 0.012)
        role = dice.choice(["reader", "writer"])
        if dice.random() < 0.3:
            stops += 1
            pair.children[role][0].stop()
            pair.sink.receive(dice.random() * 0.012)
            if dice.random() < 0.5:
                pair.children[role][0].go_on()
                continue
        pair.bury(role, -signal.SIGKILL)
        deaths += 1
        pair.start(role)

    assert stops > 20
    pair.bury("reader", -signal.SIGKILL)
    deaths += 1
    assert eventually(lambda: pair.sink.receive(0.02) >= 0 and pair.memory.fill() == 0)
    pair.bury("writer", -signal.SIGKILL)
    pair.sink.receive(0.02)
    areas = load_word(pair.memory.data.descriptor, HEAD)
    assert areas > 500
    check_delivered(pair.sink.delivered, areas, pair.recovery, deaths)


@pytest.mark.parametrize("pair", Recovery, indirect=True)
@pytest.mark.parametrize("end", ["go on", "kill"])
def test_an_area_is_not_used_again_while_a_stopped_writer_is_inside_the_system_call_on_it(
    pair: Pair, end: str
) -> None:
    """The sink is full, so the call copies the packet only when it is let go on: late use would show."""
    producer = produce(pair.memory, poison=True)
    pair.start("writer")

    def fill() -> None:
        while True:
            area = load_word(pair.memory.data.descriptor, HEAD)
            if not publish(producer, *(packet_of(area, entry) for entry in range(entries_of(area)))):
                return
            pair.bell.ring()

    def stuck() -> bool:
        fill()
        before = load_word(pair.memory.state.descriptor, TAIL)
        time.sleep(0.02)
        return before == load_word(pair.memory.state.descriptor, TAIL) and pair.memory.fill() == 8

    assert eventually(stuck)
    pair.children["writer"][0].stop()
    borrowed = os.pread(pair.memory.data.descriptor, pair.memory.data.size_bytes, 0)

    for _ in range(100):
        assert not producer.try_begin()
    assert os.pread(pair.memory.data.descriptor, len(borrowed), 0) == borrowed
    deaths = 0
    if end == "kill":
        pair.bury("writer", -signal.SIGKILL)
        deaths = 1
        assert not producer.try_begin()
        pair.start("writer")
    else:
        pair.children["writer"][0].go_on()
    pair.bell.ring()

    assert eventually(lambda: pair.sink.receive(0.02) >= 0 and pair.memory.fill() == 0)
    pair.bury("writer", -signal.SIGKILL)
    pair.sink.receive(0.02)
    areas = load_word(pair.memory.data.descriptor, HEAD)
    check_delivered(pair.sink.delivered, areas, pair.recovery, deaths)
