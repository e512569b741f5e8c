"""One host whose readers and writers are processes; the test is its supervisor, its local stack and its peer.

Data flow: tests/workers -> [workers.rig] -> fork -> nebula_mp.workers.reader | writer
The shared memory, the tables and the UDP sockets are those of a `datapath.sites.Site`; a pair of sockets that
keeps the borders of packets stands in for each TUN queue. A child closes everything but its parts, as in the
program, and the belt of its sleeps can be taken away, so that a lost wake-up is for ever.
"""

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import pytest

from nebula_mp import clock
from nebula_mp.config.model import DrainMode, LoggingConfig
from nebula_mp.datapath.api import RingFds
from nebula_mp.newtypes import IPNetwork
from nebula_mp.privileges import close_all_but
from nebula_mp.shm import LockFile
from nebula_mp.shm_ring import Bell, RingMemory, holder_word
from nebula_mp.shm_stats import StatsPage
from nebula_mp.workers import reader, writer
from nebula_mp.workers.parts import ReaderParts, Role, WriterParts, descriptors
from tests.datapath.sites import OVERLAY, Site, packet
from tests.support.processes import Forked, eventually

PATIENCE_S = 30.0
FOR_EVER_MS = 3_600_000

Prepare = Callable[[], object]


class Rig:
    """`start` what the test needs, `bury` what it kills; a context manager."""

    def __init__(
        self,
        *,
        workers: int = 1,
        drain: DrainMode = DrainMode.READER,
        cpus: int = 2,
        poison: bool = True,
        queue_bytes: int = 1 << 20,
        **site: Any,
    ) -> None:
        """`queue_bytes`: what the stand-in of a TUN queue holds; the rest goes to `Site`."""
        self._closing = ExitStack()
        self.site = Site(workers=workers, **site)
        self._closing.callback(self.site.close)
        self.site.now = clock.monotonic()
        self.drain = drain
        self.cpus = cpus
        self.poison = poison
        self.overlay: tuple[IPNetwork, ...] = OVERLAY
        self.ring_locks = LockFile.create()
        self._closing.callback(self.ring_locks.close)
        self.writer_bells = [Bell.create() for _ in range(workers)]
        self.log, self._log_sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing.callback(os.close, self.log)
        self._closing.callback(os.close, self._log_sink)
        self.queues, self.stacks = zip(*(_queue(queue_bytes) for _ in range(workers)), strict=True)
        for each in (*self.writer_bells, *self.queues, *self.stacks):
            self._closing.callback(each.close)
        self.tun_fds = [queue.fileno() for queue in self.queues]
        self.udp_fds = [each.fileno() for each in self.site.udp]
        self._start = 0
        self.children: dict[tuple[Role, int], tuple[Forked, int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for child, _, _ in self.children.values():
            child.kill()
        self._closing.close()

    def child(self, role: Role, worker: int = 0) -> Forked:
        return self.children[role, worker][0]

    @property
    def workers(self) -> int:
        return len(self.queues)

    def pages(self, role: Role, worker: int = 0) -> StatsPage:
        """A process's counters, to be read."""
        page = self.site.pages[worker + (self.workers if role is Role.WRITER else 0)]
        return StatsPage(page.read_only, writable=False)

    def count(self, name: str, role: Role = Role.READER, worker: int = 0) -> int:
        """One of a process's counters."""
        return self.pages(role, worker).snapshot()[name]

    def reader_parts(self, worker: int = 0) -> ReaderParts:
        site = self.site
        return ReaderParts(
            role=Role.READER,
            number=worker,
            start=self._start,
            device="nmp-rig",
            kernel=self.site.kernel.name,
            stats=site.pages[worker].descriptor,
            log=self._log_sink,
            logging=LoggingConfig(),
            tun=self.tun_fds[worker],
            udp=self.udp_fds[worker],
            offloads=site.offloads,
            memory=site.memory(worker),
            seal_ring=_drained(site.seal[worker]),
            open_ring=_drained(site.opened[worker]),
            ring_locks=self.ring_locks.descriptor,
            bell=site.bells[worker].descriptor,
            writer_bell=self.writer_bells[worker].descriptor,
            writer_stats=site.pages[self.workers + worker].read_only,
            schedstat=-1,
            drain=self.drain,
            cpus=self.cpus,
            overlay=self.overlay,
            limits=site.limits,
            poison=self.poison,
        )

    def writer_parts(self, worker: int = 0) -> WriterParts:
        site = self.site
        return WriterParts(
            role=Role.WRITER,
            number=worker,
            start=self._start,
            device="nmp-rig",
            kernel=self.site.kernel.name,
            stats=site.pages[self.workers + worker].descriptor,
            log=self._log_sink,
            logging=LoggingConfig(),
            tun=self.tun_fds[worker],
            udp=self.udp_fds[worker],
            offloads=site.offloads,
            tunnels=site.tables.tunnels.read_only,
            seal_ring=_drained(site.seal[worker]),
            open_ring=_drained(site.opened[worker]),
            ring_locks=self.ring_locks.descriptor,
            bell=self.writer_bells[worker].descriptor,
        )

    def start(self, role: Role, worker: int = 0, *, prepare: Prepare = lambda: None) -> Forked:
        """Fork a reader or a writer, or its successor; `prepare` runs in it first."""
        self._start += 1
        passes = self.count("mp.passes", role, worker)
        parts = self.reader_parts(worker) if role is Role.READER else self.writer_parts(worker)

        def main() -> None:
            gc.freeze()  # what the test left to be collected would close descriptors by number
            prepare()
            os._exit(_run(parts))

        child = Forked(main)
        self.children[role, worker] = child, holder_word(child.pid, parts.start), passes
        return child

    def start_all(self, *, prepare: Prepare = lambda: None) -> None:
        for worker in range(self.workers):
            for role in (Role.READER, Role.WRITER):
                self.start(role, worker, prepare=prepare)

    def tell(self, role: Role, worker: int = 0) -> int:
        """Tell a process to finish, once it works; gives its exit status."""
        child, _, passes = self.children.pop((role, worker))
        try:
            assert soon(lambda: self.count("mp.passes", role, worker) > passes), self.log_text()
        except BaseException:
            child.kill()
            raise
        return child.kill(signal.SIGUSR2)

    def bury(self, role: Role, worker: int = 0) -> int:
        """Kill, wait, and do what the supervisor does then; gives the exit status."""
        child, holder, _ = self.children.pop((role, worker))
        status = child.kill()
        for memory in (self.site.seal[worker], self.site.opened[worker]):
            memory.clear_dead(holder)
        self.writer_bells[worker].ring()
        self.site.bells[worker].ring()
        return status

    def finish(self) -> None:
        """End all readers, then all writers, as the supervisor does."""
        for wanted in (Role.READER, Role.WRITER):
            for role, worker in [each for each in self.children if each[0] is wanted]:
                assert self.tell(role, worker) == 0

    def passes_in(self, span_s: float, role: Role = Role.READER, worker: int = 0) -> int:
        """How many passes a process makes in so much time at least."""
        before = self.count("mp.passes", role, worker)
        time.sleep(span_s)
        return self.count("mp.passes", role, worker) - before

    def log_text(self) -> str:
        """What children logged since the last call."""
        try:
            return os.read(self.log, 1 << 16).decode()
        except BlockingIOError:
            return ""

    def give(self, number: int, *, worker: int = 0, port: int = 5000) -> None:
        """Let the local stack send one packet."""
        self.stacks[worker].send(packet(number, port=port))

    def allow(self, ports: Iterable[int] = (5000,)) -> None:
        """Let control admit the flows of `packet`, both ways."""
        self.site.now = clock.monotonic()
        for port in ports:
            self.site.allow(packet(0, port=port))
            self.site.allow(packet(0, port=port, back=True), inbound=True)

    def is_empty(self) -> bool:
        """Whether nothing waits in a ring that leads out of this host, nor between readers."""
        site = self.site
        return not any(memory.fill() for memory in (*site.seal, *site.opened, *site.stranger.values()))


def _run(parts: ReaderParts | WriterParts) -> int:
    if isinstance(parts, ReaderParts):
        parts = replace(parts, schedstat=os.open("/proc/self/schedstat", os.O_RDONLY))
    close_all_but({0, 1, 2, *descriptors(parts)})
    return reader.main(parts) if isinstance(parts, ReaderParts) else writer.main(parts)


def _drained(memory: RingMemory) -> RingFds:
    return RingFds(memory.data.read_only, memory.state.descriptor)


def _queue(size_bytes: int) -> tuple[socket.socket, socket.socket]:
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
    ends = socket.socketpair(socket.AF_UNIX, kind)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)
    return ends


def without_belt() -> None:
    """For `prepare`: sleep until somebody wakes us, however long it takes."""
    for module in (reader, writer):
        pytest.MonkeyPatch().setattr(module, "BELT_MS", FOR_EVER_MS)


def receive(source: socket.socket, limit_s: float = PATIENCE_S) -> bytes:
    """One datagram or packet; waits for it."""
    assert select.select([source], [], [], limit_s)[0], "nothing came"
    return source.recv(65_536)


def is_silent(source: socket.socket) -> bool:
    """Whether nothing waits."""
    return not select.select([source], [], [], 0)[0]


def soon(condition: Callable[[], bool]) -> bool:
    """Whether a condition becomes true, however slow the machine is."""
    return eventually(condition, PATIENCE_S)
