"""What holds whatever dies or stops: real readers and writers, killed, stopped, and with calls that fail.

1. A ring area is not used again before the system call that used it has returned.
2. A counter is used once for each key.
3. No flow is reordered, and each packet goes out or is counted under exactly one reason.
4. No wake-up is lost.
"""

import errno
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from nebula_mp import clock
from nebula_mp.config.model import NO_OFFLOADS, DrainMode
from nebula_mp.crypto.aead import Aead
from nebula_mp.datapath import drains
from nebula_mp.datapath.api import Drop
from nebula_mp.errors import AuthError
from nebula_mp.newtypes import Cipher, TunnelIndex
from nebula_mp.shm import load_word
from nebula_mp.shm_flows import REFUSED
from nebula_mp.shm_ring import HEAD, TAIL, Recovery, RingMemory
from nebula_mp.shm_table import PeerRef
from nebula_mp.wire.header import HEADER_BYTES
from nebula_mp.wire.ip import parse_flow
from nebula_mp.workers import reader, writer
from nebula_mp.workers.drain_mode import AutoDrain, Senses
from nebula_mp.workers.parts import Parts, Role
from tests.datapath.sites import INDEX_FAR, INDEX_NEAR, KEY_OUT, connect, drained, message, packet
from tests.support import native, native_calls, rings, stepping
from tests.support.native import native_only, python_only
from tests.workers.rig import Prepare, Rig, receive, soon, without_belt

pytestmark = pytest.mark.usefixtures("kernel")

ROW = INDEX_NEAR & 0xFFFF
AEAD = Aead(Cipher.AES, KEY_OUT)
BELL_BYTES = 8
TRAINS = replace(NO_OFFLOADS, udp_segment=True)
HOW: dict[str, dict[str, Any]] = {
    "reader": {"drain": DrainMode.READER},
    "writer": {"drain": DrainMode.WRITER},
    "changing": {"drain": DrainMode.AUTO, "cpus": 64},
}
every_mode = pytest.mark.parametrize("mode", HOW)


class Fickle(AutoDrain):
    """Trials whose results are as quick as they are unfounded."""

    _dice = random.Random(7)

    def due(self, now: float) -> bool:
        return True

    def handle_window(self, senses: Senses) -> DrainMode:
        return self._dice.choice((DrainMode.READER, DrainMode.WRITER))


def change_all_the_time() -> None:
    """For `prepare`: AUTO changes at every pass, as likely as not."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reader, "AutoDrain", Fickle)
    patch.setattr(reader, "BOOKS_EVERY", 0.0)


def all_of(*prepare: Prepare) -> Prepare:
    return lambda: [each() for each in prepare]


@contextmanager
def connected(mode: str = "reader", ports: range = range(5000, 5001), **how: Any) -> Iterator[Rig]:
    with Rig(**HOW[mode], **how) as rig:
        connect(rig.site)
        rig.allow(ports)
        yield rig


def port_of(plain: bytes) -> int:
    """Of our end of the flow: its source on the way out, its destination on the way in."""
    ports = (int.from_bytes(plain[20:22], "big"), int.from_bytes(plain[22:24], "big"))
    return max(ports)


def number_of(plain: bytes) -> int:
    return int.from_bytes(plain[28:32], "big")


def opened(wire: list[bytes]) -> list[bytes]:
    """What the peer gets out of these datagrams, of which copies are allowed and nothing else."""
    seen: dict[int, bytes] = {}
    plain = []
    for datagram in wire:
        header, counter = datagram[:HEADER_BYTES], int.from_bytes(datagram[8:HEADER_BYTES], "big")
        assert int.from_bytes(header[4:8], "big") == INDEX_FAR
        if counter in seen:
            assert seen[counter] == datagram, f"counter {counter} was used twice"
            continue
        seen[counter] = datagram
        try:
            plain.append(AEAD.open(counter, header, datagram[HEADER_BYTES:]))
        except AuthError:
            pytest.fail(f"counter {counter}: not authentic: {datagram.hex()}")
    return plain


def check_flows(plain: list[bytes], given: set[bytes]) -> None:
    """Each packet is one that was given, comes once, and in its flow behind those before it."""
    assert set(plain) <= given, "altered"
    last: dict[int, int] = {}
    for each in plain:
        port, number = port_of(each), number_of(each)
        assert number > last.get(port, -1), "twice, or out of order"
        last[port] = number


# 1. Areas.


STEP = 64
"""Bytes of each datagram of a train; the bytes of `rings.packet_of` are fewer."""


def publish(memory: RingMemory, areas: int, contents: str) -> None:
    """Fill the next areas with packets that can be told apart, as a reader and then its successor."""
    producer = rings.produce(memory, poison=True)
    for _ in range(areas):
        number = load_word(memory.data.descriptor, HEAD)
        assert producer.try_begin()
        packets = [rings.packet_of(number, entry) for entry in range(rings.entries_of(number))]
        if contents == "trains":
            datagrams = [packet.ljust(STEP, b"\0") for packet in packets]
            assert producer.try_add(b"".join(datagrams[:2]), STEP, ROW)
            packets = datagrams[2:]
        for each in packets:
            assert producer.try_add(each, int(contents == "packets"), ROW)
        producer.publish()


def number_on_the_way(found: bytes, contents: str) -> int:
    if contents != "trains":
        return rings.number_of(found)
    number = int.from_bytes(found[:8], "little")
    assert found == rings.packet_of(number // 8, number % 8).ljust(STEP, b"\0")
    return number


class Told:
    """A finish signal that came before the writer began."""

    told = True

    def fileno(self) -> int:
        return os.pipe()[0]


def die_at(step: int) -> Prepare:
    """Be killed at byte code instruction `step` from the first system call on; end after the first turn."""
    traced = ("shm_ring.py", "drains.py", "writer.py")
    calls = ("_call", "_try_write")
    left = step
    begun = False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, begun
        if event == "call":
            begun |= frame.f_code.co_name in calls
            if not frame.f_code.co_filename.endswith(traced):
                return None
            frame.f_trace_opcodes = True
        elif event == "opcode" and begun:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    def prepare() -> None:
        end_after_the_first_turn()
        sys.settrace(trace)

    return prepare


def end_after_the_first_turn() -> None:
    """For `prepare`: be told to finish before it begins."""

    def run_worker(_: Parts, work: Callable[[Told], None]) -> int:
        work(Told())
        return 0

    pytest.MonkeyPatch().setattr(writer, "run_worker", run_worker)


def be_led() -> None:
    """For `prepare`: as `kill_after` wants it, and end after the first turn."""
    end_after_the_first_turn()
    native_calls.undo()
    stepping.let_be_led()


def kill_at(rig: Rig, step: int) -> int:
    """Have a writer killed at machine instruction `step` from its first system call on; its exit status."""
    child = rig.start(Role.WRITER, prepare=be_led)

    def is_due(call: stepping.Call) -> bool:
        writes = call.number == stepping.WRITE and call.first == rig.tun_fds[0]
        return writes or call.number in {stepping.SENDTO, stepping.SENDMSG}

    stepping.kill_after(child, step, is_due)
    return child.wait()


@python_only
@pytest.mark.parametrize("contents", ["datagrams", "trains", "packets"])
def test_a_writer_killed_at_any_instruction_between_call_and_release_alters_nothing(contents: str) -> None:
    """Its reader goes on filling with what it may, and poisons what came back, before anybody drains."""
    kill_everywhere(
        contents,
        lambda rig, step: rig.start(Role.WRITER, prepare=die_at(step)).wait(),
        stride=1,
        deaths_min=300,
    )


@native_only
@pytest.mark.parametrize("contents", ["datagrams", "trains", "packets"])
def test_a_native_writer_killed_at_any_machine_instruction_alters_nothing(contents: str) -> None:
    """At every third, which are others for each number of entries."""
    kill_everywhere(contents, kill_at, stride=3, deaths_min=80)


def kill_everywhere(contents: str, kill: Callable[[Rig, int], int], *, stride: int, deaths_min: int) -> None:
    """Kill writers, each later than the one before, until they survive their turn."""
    is_seal = contents != "packets"
    recovery = Recovery.SEND_AGAIN if is_seal else Recovery.GO_ON_BEHIND
    offloads = TRAINS if contents == "trains" else NO_OFFLOADS
    with connected(area_bytes=4096, entries_max=8, offloads=offloads) as rig:
        memory = (rig.site.seal if is_seal else rig.site.opened)[0]
        delivered: list[int] = []
        steps = deaths = survived = 0
        while survived < 2:  # running, since areas differ
            publish(memory, 1, contents)
            tail = load_word(memory.state.descriptor, TAIL)
            status = kill(rig, steps)
            assert status in {0, -signal.SIGKILL}
            released = load_word(memory.state.descriptor, TAIL) > tail
            survived = survived + 1 if status == 0 or (released and stride > 1) else 0
            deaths += status != 0
            rig.bury(Role.WRITER)
            publish(memory, 1, contents)
            (rig.site.send if is_seal else lambda: write_out(rig))()
            arrived = drained([rig.site.far if is_seal else rig.stacks[0]])
            delivered += [number_on_the_way(each, contents) for each in arrived]
            steps += stride

        rings.check_delivered(delivered, load_word(memory.data.descriptor, HEAD), recovery, deaths)
        assert deaths > deaths_min


def write_out(rig: Rig) -> None:
    """Drain the open ring as a successor would."""
    stats = rig.site.pages[1].descriptor
    drain = rig.site.kernel.drain_tun(
        rig.site.open_end(), rig.tun_fds[0], stats=stats, offloads=rig.site.offloads
    )
    drain.drain(100)


class Inbound:
    """The far host: it sends numbered packets and knows how many have been read."""

    def __init__(self, rig: Rig, size: int = 40) -> None:
        self._rig = rig
        self._size = size
        self._counter = 2
        self.given: list[bytes] = []

    def send(self, worker: int = 0, *, port: int = 5000) -> None:
        self._counter += 1
        inner = packet(self._counter, self._size, port=port, back=True)
        self.given.append(inner)
        self._rig.site.far.sendto(message(self._counter, inner), self._rig.site.udp[worker].getsockname())

    def send_until(self, done: Callable[[], bool]) -> None:
        """One by one, so that no socket overflows."""

        def sent_and_done() -> bool:
            self.send()
            assert soon(lambda: self._rig.count("mp.udp.rx.packets") == len(self.given))
            return done()

        assert soon(sent_and_done)


@pytest.mark.parametrize("end", ["go on", "kill"])
def test_no_area_is_used_again_while_a_writer_is_stopped_inside_a_call_on_it(end: str) -> None:
    """The queue is full, so the writer waits for room with the packet in its hands; then it is stopped."""
    with connected("writer", queue_bytes=8192) as rig:
        rig.start_all()
        inbound = Inbound(rig, 900)
        memory = rig.site.opened[0]
        child = rig.child(Role.WRITER)
        inbound.send_until(lambda: rig.count(Drop.TUN_FULL, Role.WRITER) > 0)

        def stopped_inside() -> bool:
            child.stop()
            holder = memory.holder()
            if holder is not None and holder[0] == child.pid and memory.fill() > 0:
                return True
            child.go_on()
            return False

        inbound.send_until(stopped_inside)
        tail = load_word(memory.state.descriptor, TAIL)
        arrived = drained(rig.stacks[:1])
        full = rig.count(Drop.OPEN_RING_FULL)
        inbound.send_until(lambda: rig.count(Drop.OPEN_RING_FULL) >= full + 20)
        assert load_word(memory.state.descriptor, TAIL) == tail
        assert memory.fill() == memory.geometry.areas

        if end == "go on":
            child.go_on()
        else:
            rig.bury(Role.WRITER)
            rig.start(Role.WRITER)

        def all_out() -> bool:
            arrived.extend(drained(rig.stacks[:1]))
            return memory.fill() == 0

        assert soon(all_out)
        rig.finish()
        all_out()
        check_flows(arrived, set(inbound.given))
        assert len(arrived) > memory.geometry.areas
        if end == "go on":
            rig.site.check_ledger()


FAULTS = (
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.ENETUNREACH,
    errno.EPERM,
    errno.EMSGSIZE,
    errno.ECONNREFUSED,
    errno.EIO,
    errno.EINVAL,
)


def calls_fail() -> None:
    """For `prepare`: one call in ten that sends or writes fails, or takes a part, which no device does."""
    dice = random.Random(os.getpid())
    real_write = os.write

    def throw() -> bool:
        """Whether the call is to take less than it was given; or it fails."""
        fate = dice.random()
        if fate < 0.08:
            raise OSError(dice.choice(FAULTS), "injected")
        return fate < 0.1

    if native.is_native():

        def send(*_: object) -> None:
            throw()

        def write_some(_: int, data: memoryview) -> int | None:
            return len(data) - 1 if len(data) != BELL_BYTES and throw() else None

        native_calls.hook(pytest.MonkeyPatch(), sendto=send, sendmsg=send, write=write_some)
        return

    class Socket(socket.socket):
        def sendto(self, *arguments: Any) -> int:
            throw()
            return super().sendto(*arguments)

        def sendmsg(self, *arguments: Any) -> int:
            throw()
            return super().sendmsg(*arguments)

    def write(descriptor: int, data: memoryview) -> int:
        return len(data) - 1 if throw() else real_write(descriptor, data)

    def borrow_socket(owner: object, descriptor: int) -> socket.socket:
        return Socket(fileno=descriptor)

    patch = pytest.MonkeyPatch()
    patch.setattr(drains, "borrow_socket", borrow_socket)
    patch.setattr(os, "write", write)


# 1 and 2, under load.


class Load:
    """Two workers that both seal for one tunnel, of which the first owns the way in."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._inbound = Inbound(rig)
        self._number = 0
        self.given: set[bytes] = set()
        self.wire: list[bytes] = []
        self.inside: list[bytes] = []

    @property
    def came_back(self) -> set[bytes]:
        return set(self._inbound.given)

    def run(self, span_s: float) -> None:
        """Send and receive for so long."""
        end = time.monotonic() + span_s
        while True:
            self._number += 1
            for worker, stack in enumerate(self._rig.stacks):
                inner = packet(self._number, self._number % 1200, port=5000 + worker)
                with suppress(BlockingIOError):  # its reader is dead or stopped, and the queue is full
                    stack.send(inner)
                    self.given.add(inner)
            self._inbound.send(port=5000)
            self._inbound.send(1, port=5001)
            self.collect()
            if time.monotonic() >= end:
                return

    def collect(self) -> None:
        self.wire += drained([self._rig.site.far])
        self.inside += drained(self._rig.stacks)


@every_mode
@pytest.mark.parametrize("failing", [False, True], ids=["", "with calls that fail"])
def test_kill_9_and_sigstop_at_random_alter_nothing_repeat_nothing_and_use_no_counter_twice(
    mode: str, *, failing: bool
) -> None:
    """Two readers seal for one tunnel; all datagrams on the wire are looked at."""
    dice = random.Random(mode)
    prepare = all_of(change_all_the_time, *([calls_fail] if failing else []))
    with connected(mode, range(5000, 5002), workers=2, offloads=TRAINS) as rig:
        rig.start_all(prepare=prepare)
        load = Load(rig)
        deaths = {Role.READER: 0, Role.WRITER: 0}
        while min(deaths.values()) < 20 or len(load.wire) < 500 or len(load.inside) < 200:
            load.run(dice.random() * 0.02)
            role, worker = dice.choice((Role.READER, Role.WRITER)), dice.randrange(2)
            if dice.random() < 0.3:
                rig.child(role, worker).stop()
                load.run(dice.random() * 0.02)
                if dice.random() < 0.5:
                    rig.child(role, worker).go_on()
                    continue
            assert rig.bury(role, worker) == -signal.SIGKILL, rig.log_text()
            deaths[role] += 1
            rig.start(role, worker, prepare=prepare)

        def all_out() -> bool:
            load.collect()
            return rig.is_empty()

        assert soon(all_out)
        rig.finish()
        all_out()
        said = rig.log_text().splitlines()
        # A call that fails with EIO may say that trains do not work here, and then it is done without them.
        assert [line for line in said if not (failing and 'msg="offload disabled"' in line)] == []
    # Not in order: an area that is sent again may fill gaps that a full socket or a failed call has left.
    plain = opened(load.wire)
    assert set(plain) <= load.given, "altered"
    assert len(set(plain)) == len(plain), "sealed twice"
    check_flows(load.inside, load.came_back)


# 3. Order and the ledger.

OUT_REFUSED, IN_REFUSED, UNKNOWN = 6000, 6001, 7000
FLOWS = range(5000, 5006)


def refuse(rig: Rig) -> None:
    """As control does, for one second."""
    now_ms = int(clock.monotonic() * 1000)
    out = parse_flow(packet(0, port=OUT_REFUSED), inbound=False)
    rig.site.flows.refuse(out, PeerRef(REFUSED), now_ms, inbound=False)
    into = parse_flow(packet(0, port=IN_REFUSED, back=True), inbound=True)
    rig.site.flows.refuse(into, rig.site.peer, now_ms, inbound=True)


def junk(dice: random.Random, counter: int) -> Iterator[bytes]:
    """What nobody sends who means well."""
    good = message(counter, packet(counter, port=5000, back=True))
    yield good[: dice.randrange(2, HEADER_BYTES)]
    yield bytes([0x21]) + good[1:]
    yield bytes([0x19]) + good[1:]
    yield good[:HEADER_BYTES]
    yield good[:-1] + bytes([good[-1] ^ 1])
    yield message(counter, b"of nobody", index=TunnelIndex(0xDEAD_0009))
    yield message(counter + 1, b"not an IP packet")


@every_mode
@pytest.mark.parametrize("failing", [False, True], ids=["", "with calls that fail"])
def test_no_flow_is_reordered_and_every_packet_goes_out_or_is_counted_once(
    mode: str, *, failing: bool
) -> None:
    """Odd flows come in at the reader that does not own the tunnel, which hands them over."""
    dice = random.Random(mode)
    prepare = all_of(change_all_the_time, *([calls_fail] if failing else []))
    with connected(mode, FLOWS, workers=2, offloads=TRAINS) as rig:
        rig.start_all(prepare=prepare)
        rig.site.now = clock.monotonic()
        counter = 3
        given, came_back = set(), set()
        wire: list[bytes] = []
        inside: list[bytes] = []
        plain = datagrams = 0
        seen_before = b""
        for number in range(1, 61):
            refuse(rig)
            for port in (*FLOWS, OUT_REFUSED, UNKNOWN + number):
                for part in range(dice.randrange(1, 6)):
                    inner = packet(10 * number + part, dice.randrange(4, 1200), port=port)
                    given.add(inner)
                    rig.stacks[port % 2].send(inner)
                    plain += 1
            rig.stacks[0].send(b"no packet at all")
            plain += 1
            for port in (*FLOWS, IN_REFUSED, UNKNOWN + number):
                for part in range(dice.randrange(1, 6)):
                    counter += 1
                    inner = packet(10 * number + part, dice.randrange(4, 1200), port=port, back=True)
                    came_back.add(inner)
                    rig.site.far.sendto(message(counter, inner), rig.site.udp[port % 2].getsockname())
                    datagrams += 1
                    seen_before = seen_before or message(counter, inner)
            for each in junk(dice, counter + 1):
                rig.site.far.sendto(each, rig.site.udp[dice.randrange(2)].getsockname())
                datagrams += 1
            counter += 2
            if number > 1:
                rig.site.far.sendto(seen_before, rig.site.udp[dice.randrange(2)].getsockname())
                datagrams += 1

            def taken(packets: int = plain, messages: int = datagrams) -> bool:
                wire.extend(drained([rig.site.far]))
                inside.extend(drained(rig.stacks))
                for worker in range(2):
                    rig.site.upcalls(worker)
                stats = rig.site.stats()
                came = (stats["mp.tun.rx.packets"], stats["mp.udp.rx.packets"])
                return came == (packets, messages) and rig.is_empty()

            assert soon(taken)
        rig.finish()
        taken()
        stats, drops = rig.site.stats(), rig.site.drops()
        rig.site.check_ledger()

    check_flows(opened(wire), given)
    check_flows(inside, came_back)
    assert len(opened(wire)) == len(wire) == stats["mp.udp.tx.packets"]
    assert len(inside) == stats["mp.tun.tx.packets"] > 0
    assert stats["mp.strangers"] > 60
    assert stats["mp.upcalls"] > 60
    assert {
        Drop.SHORT,
        Drop.VERSION,
        Drop.TYPE,
        Drop.TRUNCATED,
        Drop.REPLAY,
        Drop.AUTH,
        Drop.INNER_IP,
        Drop.TUN_INNER_IP,
        Drop.REFUSED_IN,
        Drop.REFUSED_OUT,
    } <= drops.keys()


# 4. Wake-ups.


@every_mode
def test_for_each_of_thousands_of_lone_packets_somebody_is_woken(mode: str) -> None:
    """Nobody has a belt: one wake-up lost, and its packet would never come."""
    with connected(mode, workers=2) as rig:
        rig.start_all(prepare=all_of(without_belt, change_all_the_time))
        inbound = Inbound(rig)
        for number in range(800):
            rig.give(number)
            assert opened([receive(rig.site.far)]) == [packet(number)]
            for worker in range(2):  # the second is not the tunnel's owner, and hands it to the first
                inbound.send(worker)
                assert receive(rig.stacks[0]) == inbound.given[-1]
        rig.finish()
        rig.site.check_ledger()
        switches = rig.count("mp.drain.switches")
        assert (switches > 100) == (mode == "changing")
