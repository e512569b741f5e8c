"""All that the processes of a gateway share, made before the first of them, and which of it each is given.

Data flow: supervisor -> [workers.memory] -> shm_table, shm_ring, shm_stats, channel -> parts -> workers.spawn
The supervisor's alone: it maps nothing, keeps every descriptor, and hands each child those of its role, with
the access that is due to it. Knows who shares what with whom; knows nothing of what is in it, but for what a
death leaves behind: leases, and messages that were not read.
Source: docs/architecture.md, "Shared memory".
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from nebula_mp import clock, shm_stats
from nebula_mp.datapath.api import (
    CONTROL,
    HANDOVER_AREAS,
    STRANGER_AREAS,
    UPCALL_AREA_BYTES,
    UPCALL_AREAS,
    UPCALL_ENTRIES,
    ReaderMemory,
    RingFds,
    UpcallLimits,
)
from nebula_mp.errors import SystemCallError
from nebula_mp.shm import HEADER_BYTES, LockFile, Region, load_word
from nebula_mp.shm_ring import AREAS, Bell, RingMemory, holder_word
from nebula_mp.shm_stats import NAMES, SLOTS
from nebula_mp.shm_table import ROWS_AT, TUNNEL_ROW, Tables
from nebula_mp.workers import logs
from nebula_mp.workers.channel import channel_pair, discard
from nebula_mp.workers.checked import Checked
from nebula_mp.workers.host import Host
from nebula_mp.workers.parts import (
    ControlParts,
    Parts,
    ReaderParts,
    Role,
    ServicesParts,
    TableFds,
    WriterParts,
)

OUTPUT: Final = 1
"""Where log lines go in the end: stdout."""

_PIPE_BYTES: Final = 1024 * 1024  # lines that wait while there is no services process
_PASSES_WORD: Final = HEADER_BYTES // 8 + SLOTS["mp.passes"]
_STATE_AT: Final = TUNNEL_ROW.fields["state"].offset
_ROWS_PER_READ: Final = 8192


class Memory:
    """Make it before the first fork; `close` when no child is left."""

    def __init__(self, workers: int, *, kernel: str, poison: bool = False) -> None:
        """`kernel` is the one of all children. `poison` overwrites released areas, for tests.

        Raises SystemCallError.
        """
        self.workers = workers
        self._kernel = kernel
        self._poison = poison
        self._closing = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.close)
            _allow_descriptors(workers)
            self._make_rings()
            self._make_ends()
            self.tables = Tables.create(workers, clock.entropy)
            self._closing.callback(self.tables.close)
            undo.pop_all()

    def _make_rings(self) -> None:
        small = {"area_bytes": UPCALL_AREA_BYTES, "entries_max": UPCALL_ENTRIES}
        every = range(self.workers)
        self._seal = [self._keep(RingMemory.create(f"seal/{each}")) for each in every]
        self._open = [self._keep(RingMemory.create(f"open/{each}")) for each in every]
        self._upcall = [
            self._keep(RingMemory.create(f"upcall/{each}", areas=UPCALL_AREAS, **small)) for each in every
        ]
        self._stranger = {
            (reader, owner): self._keep(
                RingMemory.create(f"stranger/{reader}/{owner}", areas=STRANGER_AREAS, **small)
            )
            for reader in every
            for owner in every
            if reader != owner
        }
        self._handover = [
            self._keep(RingMemory.create(f"stranger/control/{owner}", areas=HANDOVER_AREAS, **small))
            for owner in every
        ]
        self._locks = LockFile.create()
        self._closing.callback(self._locks.close)

    def _make_ends(self) -> None:
        """Make bells, stats pages, the pipe of the log, and channels."""
        every = range(self.workers)
        self._control_bell = self._bell()
        self._reader_bells = [self._bell() for _ in every]
        self._writer_bells = [self._bell() for _ in every]
        names = (
            "control",
            "services",
            *(f"{role}/{each}" for each in every for role in ("reader", "writer")),
        )
        self._pages: dict[str, Region] = {}
        for name in names:
            self._pages[name] = shm_stats.create_page(name)
            self._closing.callback(self._pages[name].close)
        self._log_source, self.log_sink = self._descriptors(os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        with contextlib.suppress(OSError):  # above the limit of fs.pipe-max-size
            fcntl.fcntl(self.log_sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.to_control, self._control_end = self._descriptors(channel_pair())
        self.to_services, self._services_end = self._descriptors(channel_pair())
        self._control_talk, self._services_talk = self._descriptors(channel_pair())

    def _keep(self, ring: RingMemory) -> RingMemory:
        self._closing.callback(ring.close)
        return ring

    def _bell(self) -> Bell:
        bell = Bell.create()
        self._closing.callback(bell.close)
        return bell

    def _descriptors(self, pair: tuple[int, int]) -> tuple[int, int]:
        for descriptor in pair:
            self._closing.callback(os.close, descriptor)
        return pair

    def close(self) -> None:
        """Close every descriptor; may be called again."""
        self._closing.close()

    # ---- what each process is given ----

    def parts(self, role: Role, number: int, start: int, host: Host, checked: Checked) -> Parts:
        """Everything for start number `start` of a process, as things are at this moment."""
        match role:
            case Role.CONTROL:
                return self._control_parts(start, host, checked)
            case Role.SERVICES:
                return self._services_parts(start, host, checked)
            case Role.READER:
                return self._reader_parts(number, start, host, checked)
            case Role.WRITER:
                return self._writer_parts(number, start, host, checked)

    def _control_parts(self, start: int, host: Host, checked: Checked) -> ControlParts:
        return ControlParts(
            role=Role.CONTROL,
            number=0,
            start=start,
            device=host.device,
            kernel=self._kernel,
            stats=self._pages["control"].descriptor,
            log=self.log_sink,
            logging=checked.config.logging,
            checked=checked,
            udp=host.steering.control.fileno(),
            reads_udp=host.steering.is_steered,
            tuns=host.tuns,
            offloads=host.offloads,
            tables=self._table_descriptors(),
            owners=host.steering.owners,
            upcall_rings=tuple(map(_to_drain, self._upcall)),
            strangers_out=tuple(map(_to_fill, self._handover)),
            stranger_bells=tuple(bell.descriptor for bell in self._reader_bells),
            ring_locks=self._locks.descriptor,
            bell=self._control_bell.descriptor,
            pages=tuple((name, page.read_only) for name, page in self._pages.items() if name != "control"),
            supervisor=self._control_end,
            services=self._control_talk,
        )

    def _table_descriptors(self) -> TableFds:
        tables = self.tables
        return TableFds(
            tunnels=tables.tunnels.descriptor,
            keys=tables.keys.descriptor,
            peers=tables.peers.descriptor,
            flows=own_writable(tables.flows, len(tables.flows) - 1),
            seen=tuple(each.descriptor for each in tables.seen),
            send=tables.send.descriptor,
            spans=tuple(span.read_only for span in tables.spans),
            traffic=own_writable(tables.traffic, len(tables.traffic) - 1),
            journal=tables.journal.descriptor,
            locks=tables.locks.descriptor,
            seal_states=self._seal_states(),
        )

    def _services_parts(self, start: int, host: Host, checked: Checked) -> ServicesParts:
        return ServicesParts(
            role=Role.SERVICES,
            number=0,
            start=start,
            device=host.device,
            kernel=self._kernel,
            stats=self._pages["services"].descriptor,
            log=self.log_sink,
            logging=checked.config.logging,
            checked=dataclasses.replace(checked, key=-1),
            listener=host.listener.fileno(),
            uids=tuple({0, os.geteuid()}),
            log_source=self._log_source,
            output=OUTPUT,
            supervisor=self._services_end,
            control=self._services_talk,
        )

    def _reader_parts(self, number: int, start: int, host: Host, checked: Checked) -> ReaderParts:
        return ReaderParts(
            role=Role.READER,
            number=number,
            start=start,
            device=host.device,
            kernel=self._kernel,
            stats=self._pages[f"reader/{number}"].descriptor,
            log=self.log_sink,
            logging=checked.config.logging,
            tun=host.tuns[number],
            udp=host.steering.reader(number).fileno(),
            offloads=host.offloads,
            memory=self._reader_memory(number),
            seal_ring=_to_drain(self._seal[number]),
            open_ring=_to_drain(self._open[number]),
            ring_locks=self._locks.descriptor,
            bell=self._reader_bells[number].descriptor,
            writer_bell=self._writer_bells[number].descriptor,
            writer_stats=self._pages[f"writer/{number}"].read_only,
            schedstat=-1,  # opened in the child, since it is its own
            drain=checked.config.mp.drain,
            cpus=len(host.cpus),
            overlay=tuple(interface.network for interface in checked.networks),
            limits=UpcallLimits(),
            poison=self._poison,
        )

    def _reader_memory(self, number: int) -> ReaderMemory:
        tables = self.tables
        return ReaderMemory(
            worker=number,
            stats=self._pages[f"reader/{number}"].descriptor,
            tunnels=tables.tunnels.read_only,
            keys=tables.keys.read_only,
            peers=tables.peers.read_only,
            relays=tables.relays.read_only,
            flows=own_writable(tables.flows, number),
            seen=tuple(each.descriptor for each in tables.seen),
            send=tables.send.descriptor,
            windows=tables.windows.descriptor,
            spans=own_writable(tables.spans, number),
            traffic=tables.traffic[number].descriptor,
            locks=tables.locks.descriptor,
            seal_ring=_to_fill(self._seal[number]),
            open_ring=_to_fill(self._open[number]),
            upcall_ring=_to_fill(self._upcall[number]),
            seal_states=self._seal_states(),
            strangers_in={
                CONTROL: _to_drain(self._handover[number]),
                **{
                    reader: _to_drain(ring)
                    for (reader, owner), ring in self._stranger.items()
                    if owner == number
                },
            },
            strangers_out={
                owner: _to_fill(ring) for (reader, owner), ring in self._stranger.items() if reader == number
            },
            control_bell=self._control_bell.descriptor,
            stranger_bells={
                each: bell.descriptor for each, bell in enumerate(self._reader_bells) if each != number
            },
        )

    def _seal_states(self) -> tuple[int, ...]:
        return tuple(ring.state.read_only for ring in self._seal)

    def _writer_parts(self, number: int, start: int, host: Host, checked: Checked) -> WriterParts:
        return WriterParts(
            role=Role.WRITER,
            number=number,
            start=start,
            device=host.device,
            kernel=self._kernel,
            stats=self._pages[f"writer/{number}"].descriptor,
            log=self.log_sink,
            logging=checked.config.logging,
            tun=host.tuns[number],
            udp=host.steering.reader(number).fileno(),
            offloads=host.offloads,
            tunnels=self.tables.tunnels.read_only,
            seal_ring=_to_drain(self._seal[number]),
            open_ring=_to_drain(self._open[number]),
            ring_locks=self._locks.descriptor,
            bell=self._writer_bells[number].descriptor,
        )

    # ---- after a death ----

    def clear_dead(self, role: Role, number: int, pid: int, start: int) -> bool:
        """Free what a process held that has been waited for, and wake who may go on; True if it drained."""
        held = False
        match role:
            case Role.READER | Role.WRITER:
                word = holder_word(pid, start)
                rings = (self._seal[number], self._open[number])
                held = sum(ring.clear_dead(word) for ring in rings) > 0  # it may have held both
                # It may have died between a store and the ring that belongs to it.
                for bell in (self._control_bell, *self._reader_bells, *self._writer_bells):
                    bell.ring()
            case Role.CONTROL:
                discard(self._control_end)
                discard(self._control_talk)
            case Role.SERVICES:
                discard(self._services_end)
                discard(self._services_talk)
        return held

    def empty_rings(self, worker: int) -> None:
        """Empty the rings of a worker both of whose processes have ended.

        Control, which lives on, must be told to attach anew to the ring of upcalls, and to the one it fills.
        """
        for ring in (self._seal[worker], self._open[worker], self._upcall[worker], self._handover[worker]):
            ring.reset()

    def empty_stranger_rings(self) -> None:
        """Empty the rings between readers, none of whom is running."""
        for ring in self._stranger.values():
            ring.reset()

    # ---- for status output ----

    def passes(self, name: str) -> int:
        """How many passes the process called `name`, and its predecessors, have made."""
        return load_word(self._pages[name].read_only, _PASSES_WORD)

    def counters(self, name: str) -> dict[str, int]:
        """All counters of a process. Read and not mapped, so that no child inherits a mapping."""
        raw = os.pread(self._pages[name].read_only, 8 * len(NAMES), HEADER_BYTES)
        return dict(zip(NAMES, memoryview(raw).cast("Q").tolist(), strict=True))

    def ring_fill(self, worker: int) -> int:
        """Areas in use of the fuller of a worker's two rings, 0 to 32."""
        fill = max(self._seal[worker].fill(), self._open[worker].fill())
        assert 0 <= fill <= AREAS
        return fill

    def tunnels(self) -> int:
        """How many tunnels are there, keys apart; reads only what was ever written of the table."""
        rows = 0
        for data in _written(self.tables.tunnels.read_only, ROWS_AT, TUNNEL_ROW.size * _ROWS_PER_READ):
            states = data[_STATE_AT :: TUNNEL_ROW.size]
            rows += len(states) - states.count(0)
        return rows

    def write_out_log(self) -> None:
        """Write what services has left in the log's pipe, as far as stdout takes it without waiting."""
        left = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._log_source, _PIPE_BYTES):
                left += piece
        output = logs.Output(OUTPUT)
        for line in left.splitlines(keepends=True):
            output.write(line, clock.monotonic())


def own_writable(regions: Sequence[Region], own: int) -> tuple[int, ...]:
    """Descriptors of regions of which the process writes only its own; the others read-only."""
    return tuple(
        region.descriptor if number == own else region.read_only for number, region in enumerate(regions)
    )


def _to_fill(ring: RingMemory) -> RingFds:
    return RingFds(ring.data.descriptor, ring.state.read_only)


def _to_drain(ring: RingMemory) -> RingFds:
    return RingFds(ring.data.read_only, ring.state.descriptor)


def _written(descriptor: int, start: int, step: int) -> Iterator[bytes]:
    """The parts of a sparse file that were ever written, page by page from `start` on, `step` at most."""
    size = os.fstat(descriptor).st_size
    at = start
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        while at < end:
            data = os.pread(descriptor, min(step, end - at), at)
            yield data
            at += len(data)


def _allow_descriptors(workers: int) -> None:
    """Raise our own limit to what the rings need, which grows with the square of the workers."""
    needed = 4 * workers * (workers + 4) + 16 * workers + 128
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise SystemCallError(
                f"{workers} workers need {needed} descriptors, and {hard} are allowed: raise LimitNOFILE"
                " (ulimit -n), or lower mp.workers"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
