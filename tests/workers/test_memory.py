"""What the processes share: who is given what with which access, and what is put in order after a death."""

import fcntl
import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nebula_mp.config.model import NO_OFFLOADS, Config, DrainMode, LoggingConfig, MpConfig, PkiConfig
from nebula_mp.datapath.api import CONTROL, ReaderMemory, RingFds
from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import Cipher
from nebula_mp.shm import GENERATION, load_word
from nebula_mp.shm_ring import AREAS, LEASE, Bell, holder_word
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import LIVE, TUNNEL_ROW
from nebula_mp.workers import memory as memories
from nebula_mp.workers.channel import Channel
from nebula_mp.workers.checked import Checked, PkiSources
from nebula_mp.workers.host import Host
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.parts import (
    ControlParts,
    Parts,
    ReaderParts,
    Role,
    ServicesParts,
    TableFds,
    WriterParts,
    descriptors,
)
from tests.support import tables

WORKERS = 2


class Shared:
    """The memory of two workers, on a host of which only the descriptors are real."""

    def __init__(self, closing: ExitStack) -> None:
        self.memory = Memory(WORKERS, kernel="python", poison=True)
        closing.callback(self.memory.close)
        self.sockets = [closing.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(6)]
        steering = SimpleNamespace(
            control=self.sockets[0],
            reader=lambda number: self.sockets[1 + number],
            is_steered=True,
            owners=(0, 1),
        )
        self.host = cast(
            "Host",
            SimpleNamespace(
                device="nebula1",
                tuns=tuple(each.fileno() for each in self.sockets[3:5]),
                steering=steering,
                listener=self.sockets[5],
                cpus=(0, 1, 2),
                offloads=NO_OFFLOADS,
            ),
        )
        self.key = os.memfd_create("key")
        closing.callback(os.close, self.key)
        config = Config(
            pki=PkiConfig(ca="", cert="", key=""),
            cipher=Cipher.AES,
            mp=MpConfig(drain=DrainMode.WRITER),
            logging=LoggingConfig(format="json"),
        )
        self.checked = Checked(
            config=config,
            pki_sources=PkiSources(cert="", key="", ca=""),
            warnings=(),
            sources=(),
            networks=(),
            name="host",
            at=0,
            key=self.key,
        )

    def parts(self, role: Role, number: int = 0) -> Any:
        return self.memory.parts(role, number, 7, self.host, self.checked)

    def every(self) -> list[Parts]:
        return [
            self.parts(Role.CONTROL),
            self.parts(Role.SERVICES),
            *(self.parts(role, number) for role in (Role.READER, Role.WRITER) for number in range(WORKERS)),
        ]


@pytest.fixture
def shared() -> Iterator[Shared]:
    with ExitStack() as closing:
        yield Shared(closing)


def is_writable(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def target(descriptor: int) -> str:
    """Which region it is, as /proc names it."""
    text = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return text.removeprefix("/memfd:nebula-mp:").removesuffix(" (deleted)")


def open_now() -> set[str]:
    """Our descriptors."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def regions(parts: Parts) -> dict[str, bool]:
    """Each region among the descriptors, and whether it is writable through any of them."""
    found: dict[str, bool] = {}
    for descriptor in descriptors(parts):
        if descriptor >= 0 and "memfd:nebula-mp" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            name = target(descriptor)
            found[name] = found.get(name, False) or is_writable(descriptor)
    return found


# ---- what each is given ----


def test_readers_write_only_what_is_theirs(shared: Shared) -> None:
    writable = {name for name, is_theirs in regions(shared.parts(Role.READER, 0)).items() if is_theirs}

    assert writable == {
        "stats reader/0",
        "flows 0",
        "flows last seen 0",
        "flows last seen 1",
        "flows last seen 2",
        "send counters",
        "replay windows",
        "span 0",
        "traffic 0",
        "locks",
        "ring data seal/0",
        "ring state seal/0",
        "ring data open/0",
        "ring state open/0",
        "ring data upcall/0",
        "ring data stranger/0/1",
        "ring state stranger/1/0",
        "ring state stranger/control/0",
    }


def test_readers_read_what_others_say(shared: Shared) -> None:
    read = {name for name, is_theirs in regions(shared.parts(Role.READER, 0)).items() if not is_theirs}

    assert read == {
        "tunnels",
        "tunnel keys",
        "peers",
        "relays",
        "flows 1",
        "flows 2",
        "span 1",
        "stats writer/0",
        "ring state upcall/0",
        "ring state seal/1",
        "ring state stranger/0/1",
        "ring data stranger/1/0",
        "ring data stranger/control/0",
    }


def test_writers_see_no_key_and_fill_nothing(shared: Shared) -> None:
    assert regions(shared.parts(Role.WRITER, 1)) == {
        "stats writer/1": True,
        "tunnels": False,
        "ring data seal/1": False,
        "ring state seal/1": True,
        "ring data open/1": False,
        "ring state open/1": True,
        "locks": True,
    }


def test_control_writes_the_tables_and_reads_the_counters(shared: Shared) -> None:
    found = regions(shared.parts(Role.CONTROL))

    assert {name for name, is_theirs in found.items() if is_theirs} == {
        "stats control",
        "tunnels",
        "tunnel keys",
        "peers",
        "flows 2",
        "flows last seen 0",
        "flows last seen 1",
        "flows last seen 2",
        "send counters",
        "traffic 2",
        "journal",
        "locks",
        "ring state upcall/0",
        "ring state upcall/1",
        "ring data stranger/control/0",
        "ring data stranger/control/1",
    }
    assert {name for name, is_theirs in found.items() if not is_theirs} == {
        "flows 0",
        "flows 1",
        "span 0",
        "span 1",
        "traffic 0",
        "traffic 1",
        "ring data upcall/0",
        "ring data upcall/1",
        "ring state stranger/control/0",
        "ring state stranger/control/1",
        "ring state seal/0",
        "ring state seal/1",
        "stats services",
        "stats reader/0",
        "stats writer/0",
        "stats reader/1",
        "stats writer/1",
    }


def test_services_get_no_memory_and_no_key(shared: Shared) -> None:
    parts: ServicesParts = shared.parts(Role.SERVICES)

    assert regions(parts) == {"stats services": True}
    assert parts.checked.key == -1
    assert parts.uids == tuple({0, os.geteuid()})


def test_only_control_gets_the_key(shared: Shared) -> None:
    holders = [parts.name for parts in shared.every() if shared.key in set(descriptors(parts))]

    assert holders == ["control"]


def test_reader_and_writer_of_a_worker_have_the_same_socket_and_queue(shared: Shared) -> None:
    for number in range(WORKERS):
        reader: ReaderParts = shared.parts(Role.READER, number)
        writer: WriterParts = shared.parts(Role.WRITER, number)

        assert (reader.tun, reader.udp, reader.writer_bell) == (writer.tun, writer.udp, writer.bell)
        assert reader.seal_ring == writer.seal_ring
        assert reader.open_ring == writer.open_ring
        assert reader.ring_locks == writer.ring_locks


def test_bells_wake_those_they_are_meant_for(shared: Shared) -> None:
    one, other = (shared.parts(Role.READER, number) for number in range(WORKERS))
    control: ControlParts = shared.parts(Role.CONTROL)

    assert one.memory.stranger_bells == {1: other.bell}
    assert other.memory.stranger_bells == {0: one.bell}
    assert control.stranger_bells == (one.bell, other.bell)
    assert one.memory.control_bell == other.memory.control_bell == control.bell
    bells = {control.bell, one.bell, other.bell, one.writer_bell, other.writer_bell}
    assert len(bells) == 5


def test_stranger_rings_join_each_pair_of_readers_both_ways(shared: Shared) -> None:
    one, other = (shared.parts(Role.READER, number).memory for number in range(WORKERS))

    for filler, drainer, source, owner in ((one, other, 0, 1), (other, one, 1, 0)):
        filled: RingFds = filler.strangers_out[owner]
        drained: RingFds = drainer.strangers_in[source]
        assert target(filled.data) == target(drained.data) == f"ring data stranger/{source}/{owner}"
        assert target(filled.state) == target(drained.state)


def test_control_has_a_stranger_ring_to_every_reader(shared: Shared) -> None:
    control: ControlParts = shared.parts(Role.CONTROL)

    for owner, filled in enumerate(control.strangers_out):
        drained = shared.parts(Role.READER, owner).memory.strangers_in[CONTROL]
        assert target(filled.data) == target(drained.data) == f"ring data stranger/control/{owner}"
        assert (is_writable(filled.data), is_writable(filled.state)) == (True, False)
        assert (is_writable(drained.data), is_writable(drained.state)) == (False, True)


def test_every_descriptor_is_closed_on_exec_and_none_after_close() -> None:
    before = open_now()
    with ExitStack() as closing:
        shared = Shared(closing)
        for parts in shared.every():
            for descriptor in descriptors(parts):
                if descriptor > 2:
                    assert not os.get_inheritable(descriptor) or descriptor == shared.key

    assert open_now() == before


def test_parts_say_which_start_they_are_for(shared: Shared) -> None:
    for parts in shared.every():
        assert parts.start == 7
        assert parts.device == "nebula1"
        assert parts.logging == LoggingConfig(format="json")


def test_what_a_reader_is_told_beside_descriptors(shared: Shared) -> None:
    parts: ReaderParts = shared.parts(Role.READER, 1)

    assert (parts.drain, parts.cpus, parts.poison, parts.memory.worker) == (DrainMode.WRITER, 3, True, 1)


def test_all_workers_are_live_at_first(shared: Shared) -> None:
    assert [load_word(span.descriptor, LIVE) for span in shared.memory.tables.spans] == [1, 1]


# ---- after a death ----


def rung(descriptor: int) -> bool:
    return Bell(descriptor).wait(0)


def test_the_leases_of_a_dead_worker_are_cleared_and_everybody_is_woken(shared: Shared) -> None:
    reader: ReaderParts = shared.parts(Role.READER, 1)
    other: ReaderParts = shared.parts(Role.READER, 0)
    rings = (reader.seal_ring, reader.open_ring, other.seal_ring)
    for ring in rings:
        os.pwrite(ring.state, holder_word(4711, 3).to_bytes(8, "little"), 8 * LEASE)

    assert shared.memory.clear_dead(Role.READER, 1, 4711, 3)

    assert [load_word(ring.state, LEASE) for ring in rings] == [0, 0, holder_word(4711, 3)]
    control: ControlParts = shared.parts(Role.CONTROL)
    bells = (control.bell, reader.bell, other.bell, reader.writer_bell, other.writer_bell)
    assert all(rung(bell) for bell in bells)


@pytest.mark.parametrize(("pid", "start"), [(4711, 4), (4712, 3)])
def test_the_lease_of_somebody_else_is_left_alone(shared: Shared, pid: int, start: int) -> None:
    writer: WriterParts = shared.parts(Role.WRITER, 0)
    os.pwrite(writer.open_ring.state, holder_word(pid, start).to_bytes(8, "little"), 8 * LEASE)

    assert not shared.memory.clear_dead(Role.WRITER, 0, 4711, 3)

    assert load_word(writer.open_ring.state, LEASE) == holder_word(pid, start)


def test_what_waits_for_a_dead_control_is_thrown_away(shared: Shared) -> None:
    control: ControlParts = shared.parts(Role.CONTROL)
    services: ServicesParts = shared.parts(Role.SERVICES)
    assert Channel(shared.memory.to_control, "control").send("underlay")
    assert Channel(services.control, "control").send("status", {"id": 1})

    shared.memory.clear_dead(Role.CONTROL, 0, 4711, 3)

    assert Channel(control.supervisor, "supervisor").receive() == []
    assert Channel(control.services, "services").receive() == []


def test_what_waits_for_dead_services_is_thrown_away(shared: Shared) -> None:
    control: ControlParts = shared.parts(Role.CONTROL)
    services: ServicesParts = shared.parts(Role.SERVICES)
    assert Channel(shared.memory.to_services, "services").send("answer")
    assert Channel(control.services, "services").send("answer")

    shared.memory.clear_dead(Role.SERVICES, 0, 4711, 3)

    assert Channel(services.supervisor, "supervisor").receive() == []
    assert Channel(services.control, "control").receive() == []


def test_the_rings_of_one_worker_are_emptied_and_no_others(shared: Shared) -> None:
    shared.memory.empty_rings(1)

    found = [generations(shared.parts(Role.READER, number).memory) for number in range(WORKERS)]
    assert found == [(1, 1, 1, 1, 1), (2, 2, 2, 2, 1)]


def test_the_rings_between_readers_are_emptied_together(shared: Shared) -> None:
    shared.memory.empty_stranger_rings()

    found = [generations(shared.parts(Role.READER, number).memory) for number in range(WORKERS)]
    assert found == [(1, 1, 1, 1, 2), (1, 1, 1, 1, 2)]


def generations(of: ReaderMemory) -> tuple[int, ...]:
    strangers = of.strangers_out.values()
    rings = (of.seal_ring, of.open_ring, of.upcall_ring, of.strangers_in[CONTROL], *strangers)
    return tuple(load_word(ring.data, GENERATION) for ring in rings)


# ---- for status output ----


def test_counters_are_read_without_a_mapping(shared: Shared) -> None:
    page = StatsPage(shared.parts(Role.WRITER, 1).stats, writable=True)
    page.add(SLOTS["mp.passes"], 3)
    page.add(SLOTS["mp.udp.tx.packets"], 5)

    assert shared.memory.passes("writer/1") == 3
    assert shared.memory.passes("writer/0") == 0
    assert shared.memory.counters("writer/1") == page.snapshot()


def test_the_fuller_of_two_rings_is_shown(shared: Shared) -> None:
    reader: ReaderMemory = shared.parts(Role.READER, 0).memory
    os.pwrite(reader.open_ring.data, (9).to_bytes(8, "little"), 64)
    os.pwrite(reader.seal_ring.data, (4).to_bytes(8, "little"), 64)

    assert shared.memory.ring_fill(0) == 9
    assert shared.memory.ring_fill(1) == 0


def test_nonsense_in_a_ring_is_shown_as_full(shared: Shared) -> None:
    reader: ReaderMemory = shared.parts(Role.READER, 0).memory
    os.pwrite(reader.open_ring.data, b"\xff" * 8, 64)

    assert shared.memory.ring_fill(0) == AREAS


def test_tunnels_are_counted_wherever_they_are_in_the_table(shared: Shared) -> None:
    parts: TableFds = shared.parts(Role.CONTROL).tables
    assert shared.memory.tunnels() == 0
    table = tables.tunnel_table(shared.memory.tables)

    rows = (0, 1, 31, 32, 33, 9_000, 40_000, 65_535)
    for row in rows:
        table.open(tables.fields(row), tables.SEND_KEY, tables.RECEIVE_KEY)
    assert shared.memory.tunnels() == len(rows)

    table.close(tables.fields(9_000).local_index)
    assert shared.memory.tunnels() == len(rows) - 1
    assert os.fstat(parts.tunnels).st_blocks * 512 < 65_536 * TUNNEL_ROW.size  # only what was written


# ---- the log ----


@contextmanager
def stdout_to(path: Path) -> Iterator[None]:
    kept = os.dup(1)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_what_nobody_took_from_the_log_is_written_at_the_end(shared: Shared, tmp_path: Path) -> None:
    os.write(shared.memory.log_sink, b"one\ntwo\n")
    with stdout_to(tmp_path / "log"):
        shared.memory.write_out_log()

    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_lines_wait_for_services_and_nobody_waits_for_them(shared: Shared) -> None:
    line = b"x" * 1000 + b"\n"
    poll = select.poll()
    poll.register(shared.memory.log_sink, select.POLLOUT)
    written = 0
    while poll.poll(0):
        written += os.write(shared.memory.log_sink, line)

    with pytest.raises(BlockingIOError):
        os.write(shared.memory.log_sink, 8 * line)
    assert written > 60_000


# ---- limits ----


def test_more_workers_than_descriptors_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))

    with pytest.raises(SystemCallError, match=r"16 workers need .* 1024 are allowed: raise LimitNOFILE"):
        memories._allow_descriptors(16)


def test_the_limit_of_descriptors_is_raised_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1 << 20))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))

    memories._allow_descriptors(1)
    assert asked == []

    memories._allow_descriptors(8)
    soft, hard = asked.pop()
    assert hard == 1 << 20
    with ExitStack() as closing:
        before = len(open_now())
        closing.callback(Memory(8, kernel="python").close)
        assert len(open_now()) - before + 64 <= soft


def test_a_failure_half_way_closes_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> tuple[int, int]:
        raise SystemCallError("channel between our processes: refused (EMFILE)")

    before = open_now()
    monkeypatch.setattr(memories, "channel_pair", refused)

    with pytest.raises(SystemCallError):
        Memory(1, kernel="python")

    assert open_now() == before
