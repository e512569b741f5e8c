"""What a reader and a writer have in common: how they are told to finish, how they end, their ends of rings.

Data flow: workers.parts -> [workers.worker_loop] -> workers.reader | workers.writer -> exit code
Knows which lock and which rights belong to which ring of a worker; knows nothing of packets.
Source: docs/architecture.md, "Who drains"; signal(7).
"""

import os
import signal
from collections.abc import Callable, Iterable
from typing import Final

from nebula_mp import clock
from nebula_mp.config.model import LogLevel
from nebula_mp.datapath import kernels
from nebula_mp.datapath.api import Drain, RingEnd
from nebula_mp.errors import RingError
from nebula_mp.newtypes import Seconds
from nebula_mp.shm import Mapping
from nebula_mp.shm_ring import holder_word
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import ROWS_MAX, TUNNEL_ROW, TUNNELS, row_count
from nebula_mp.workers import logs
from nebula_mp.workers.parts import Fd, Parts, ReaderParts, WriterParts, open_lock, seal_lock
from nebula_mp.workers.spawn import DESCRIPTOR_LOST, FINISHED, RING_CONTRADICTION

BELT_MS: Final = 500
"""The longest sleep: so a worker shows that it lives, and a wake-up that got lost costs no more."""

BOOKS_EVERY: Final = Seconds(0.020)
"""How often a worker that never sleeps states what it has used."""

_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the supervisor decides
_CPU: Final = SLOTS["mp.cpu.us"]


class FinishSignal:
    """SIGUSR2: `told`, from then on; `fileno` becomes readable with it, so that no sleep goes on.

    One for each process, which ends with it: it is not undone.
    """

    def __init__(self) -> None:
        self.told = False
        self._source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR2, self._handle)
        # Whoever blocked it while forking: from here on it is heard.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])

    def fileno(self) -> int:
        """Readable once we are told, and for ever after."""
        return self._source

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        self.told = True


def run_worker(parts: Parts, work: Callable[[FinishSignal], None]) -> int:
    """Let `work` go on until we are told to finish; gives the exit code.

    What else it raises, SystemCallError among it, is a crash and goes on to the caller.
    """
    logs.Logs(parts.logging, parts.log)
    try:
        work(FinishSignal())
    except OSError as error:
        logs.write(
            LogLevel.ERROR,
            "descriptor lost",
            {"role": parts.name, "device": parts.device, "error": error},
        )
        return DESCRIPTOR_LOST
    except RingError as error:
        logs.write(
            LogLevel.ERROR,
            "ring contradiction",
            {"role": parts.name, "field": error.field, "value": error.value, "error": error},
        )
        return RING_CONTRADICTION
    return FINISHED


def attach_drains(parts: ReaderParts | WriterParts, tunnels: Fd) -> tuple[Drain, Drain]:
    """The consumer's ends of the worker's rings, out and in, each shared with the other process by its lease.

    Raises RingError, SystemCallError.
    """
    rows = row_count(Mapping(tunnels, TUNNELS, writable=False), TUNNEL_ROW, ROWS_MAX)
    number, locks = parts.number, parts.ring_locks
    holder = holder_word(os.getpid(), parts.start)
    seal = RingEnd(parts.seal_ring, f"seal/{number}", locks, seal_lock(number), holder, rows)
    opened = RingEnd(parts.open_ring, f"open/{number}", locks, open_lock(number), holder, rows)
    kernel = kernels.get(parts.kernel)
    return (
        kernel.drain_udp(seal, parts.udp, tunnels=tunnels, stats=parts.stats, offloads=parts.offloads),
        kernel.drain_tun(opened, parts.tun, stats=parts.stats, offloads=parts.offloads),
    )


class GivenUp:
    """Says once of each drain what it has to do without, since the kernel refused it in use."""

    def __init__(self, name: str, drains: Iterable[Drain]) -> None:
        """`name` is the process's."""
        self._name = name
        self._drains = tuple(drains)

    def say(self) -> None:
        """Look at the drains; to be called from time to time."""
        for drain in self._drains:
            if drain.given_up is not None:
                fields = {"role": self._name, "offload": drain.given_up}
                logs.write(LogLevel.WARN, "offload disabled", fields)
                self._drains = tuple(each for each in self._drains if each is not drain)


class CpuMeter:
    """States how much of a core this process has used, for the other one of its pair and for status."""

    def __init__(self, stats: StatsPage) -> None:
        self._stats = stats
        self._stored_us = 0

    def store(self) -> int:
        """Add what was used since the last call; gives the whole in microseconds."""
        used_us = clock.process_cpu_us()
        self._stats.add(_CPU, used_us - self._stored_us)
        self._stored_us = used_us
        return used_us
