"""What each child process is given: descriptors and values, by role.

Data flow: supervisor -> [workers.parts] -> fork -> workers.{control,services,reader,writer}.main
All descriptors are borrowed from the supervisor, which keeps them open: a child's death closes nothing.
Whatever is not in a child's parts is closed in it before it begins. Knows nothing of what they are used for.
Source: docs/architecture.md, "Processes" and "Shared memory".
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Final

from nebula_mp.config.model import DrainMode, LoggingConfig, Offloads
from nebula_mp.datapath.api import ReaderMemory, RingFds, UpcallLimits
from nebula_mp.newtypes import IPNetwork
from nebula_mp.shm_table import WORKERS_MAX
from nebula_mp.workers.checked import Checked

Fd = int


class Role(StrEnum):
    """What a process is for."""

    CONTROL = "control"
    SERVICES = "services"
    READER = "reader"
    WRITER = "writer"


# Numbers of the locks in `ring_locks`: the drain lease of a worker's two rings, and who consumes the others.
_KINDS: Final = 4


def seal_lock(worker: int) -> int:
    """Lock of the lease of a worker's seal ring."""
    return _KINDS * worker


def open_lock(worker: int) -> int:
    """Lock of the lease of a worker's open ring."""
    return _KINDS * worker + 1


def upcall_lock(worker: int) -> int:
    """Lock that control has as the consumer of a worker's upcall ring."""
    return _KINDS * worker + 2


def stranger_lock(reader: int, owner: int) -> int:
    """Lock that `owner` has as the consumer of the ring that `reader`, or CONTROL, fills for it."""
    return _KINDS * WORKERS_MAX + reader * WORKERS_MAX + owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What every child has."""

    role: Role
    number: int  # of the worker; 0 for control and services
    start: int  # number of this start, 1 and up, never used twice: the generation in a lease
    device: str
    kernel: str  # for `datapath.kernels.get`; the same for all of them
    stats: Fd  # its own page, writable
    log: Fd  # write end of the log's pipe, non-blocking
    logging: LoggingConfig

    @property
    def name(self) -> str:
        """As in `reader/0` and `control`."""
        worker = self.role in (Role.READER, Role.WRITER)
        return f"{self.role}/{self.number}" if worker else str(self.role)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderParts(Parts):
    """Reader i."""

    tun: Fd
    udp: Fd
    memory: ReaderMemory
    seal_ring: RingFds  # data read-only, state writable: for the drain lease
    open_ring: RingFds  # the same
    ring_locks: Fd
    bell: Fd  # its own: strangers wait
    writer_bell: Fd
    writer_stats: Fd  # read-only
    offloads: Offloads  # granted
    schedstat: Fd  # /proc/self/schedstat, opened in the child before it is locked down; -1 if there is none
    drain: DrainMode
    cpus: int  # how many this program may use
    overlay: tuple[IPNetwork, ...]
    limits: UpcallLimits
    poison: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterParts(Parts):
    """Writer i; no key is in reach."""

    tun: Fd
    udp: Fd
    offloads: Offloads  # granted
    tunnels: Fd  # read-only
    seal_ring: RingFds  # data read-only, state writable
    open_ring: RingFds  # the same
    ring_locks: Fd
    bell: Fd


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFds:
    """The tables as control maps them: everything writable but the workers' own regions."""

    tunnels: Fd
    keys: Fd
    peers: Fd
    flows: tuple[Fd, ...]  # read-only but for the last, control's own
    seen: tuple[Fd, ...]
    send: Fd
    spans: tuple[Fd, ...]  # read-only
    traffic: tuple[Fd, ...]  # read-only but for the last, control's own
    journal: Fd
    locks: Fd
    seal_states: tuple[Fd, ...]  # read-only


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlParts(Parts):
    """Control."""

    checked: Checked  # with the sealed memfd of the private key
    udp: Fd
    reads_udp: bool  # False where the kernel does not steer: the one socket is the reader's
    tuns: tuple[Fd, ...]  # for writing
    offloads: Offloads  # granted
    tables: TableFds
    owners: tuple[int, ...]  # the reader that owns each share of the local indexes
    upcall_rings: tuple[RingFds, ...]  # data read-only, state writable
    strangers_out: tuple[RingFds, ...]  # by the reader that drains it; data writable, state read-only
    stranger_bells: tuple[Fd, ...]  # by the reader that they wake
    ring_locks: Fd
    bell: Fd
    pages: tuple[tuple[str, Fd], ...]  # stats of every other process, read-only
    supervisor: Fd  # channel
    services: Fd  # channel


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicesParts(Parts):
    """Services."""

    checked: Checked  # without the key: its descriptor is -1
    listener: Fd  # the control socket
    uids: tuple[int, ...]  # who may use it
    log_source: Fd  # read end of the log's pipe
    output: Fd  # where lines go: the supervisor's stdout
    supervisor: Fd  # channel
    control: Fd  # channel


def descriptors(parts: object) -> Iterator[int]:
    """Every descriptor in the parts of a child, for `privileges.lock_down_child`."""
    assert is_dataclass(parts)
    assert not isinstance(parts, type)
    for field in fields(parts):
        value = getattr(parts, field.name)
        if isinstance(value, TableFds | ReaderMemory):
            yield from descriptors(value)
        elif isinstance(value, Checked):
            yield from _found(value.key)
        elif field.name in _NUMBERS:
            continue
        else:
            yield from _found(value)


_NUMBERS: Final = frozenset({"number", "start", "worker", "cpus", "owners", "uids", "limits", "offloads"})


def _found(value: object) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if value >= 0:
            yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _found(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _found(each)
