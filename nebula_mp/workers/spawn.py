"""Forks a child, and what each one does before its role begins.

Data flow: supervisor -> [workers.spawn] -> fork -> lock_down_child -> workers.<role>.main -> os._exit
           the child's death -> pidfd -> supervisor -> [workers.spawn] -> how it ended
Knows the order of things at the start of a process; knows nothing of what a role does, and decides nothing.
Source: fork(2), pidfd_open(2), wait(2), signal(7); docs/architecture.md, "Processes".

The signals that a terminal or a service manager sends to everybody are the supervisor's alone. They are
blocked while it forks: one that came between the fork and the child's ignoring it would otherwise be reported
by the child, over the pipe of the supervisor's wake-ups, as a second one. SIGUSR2, which tells a worker to
finish, stays blocked in the child until its role has a handler for it: else it would be a crash.
"""

import contextlib
import dataclasses
import errno
import faulthandler
import gc
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import psutil
import setproctitle

from nebula_mp.config.model import LogLevel
from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.newtypes import Seconds
from nebula_mp.privileges import Account, lock_down_child
from nebula_mp.workers import logs
from nebula_mp.workers.parts import Parts, ReaderParts, Role, descriptors

FINISHED: Final = 0
CRASHED: Final = 1
DESCRIPTOR_LOST: Final = 3
RING_CONTRADICTION: Final = 4

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What only the supervisor listens to."""

FINISH: Final = signal.SIGUSR2
"""What tells a reader or writer to finish; its main unblocks it."""

Main = Callable[[Any], int]
"""A role's main: takes the role's Parts, gives the exit code."""

_SCHEDSTAT: Final = "/proc/self/schedstat"

P = TypeVar("P", bound=Parts)


class Ended(NamedTuple):
    """How a process ended: by a signal, or with an exit code."""

    signal: int | None
    code: int | None

    def fields(self) -> dict[str, object]:
        """For a log record."""
        if self.signal is None:
            return {"code": self.code}
        try:
            return {"signal": signal.Signals(self.signal).name}
        except ValueError:  # a real-time signal
            return {"signal": self.signal}


@dataclass(slots=True)
class Child:
    """A process that was forked. Once `fileno()` is readable, or after `kill`: `reap`, then `close`."""

    role: Role
    number: int
    name: str
    start: int  # number of this start, as in its parts
    pid: int
    started: Seconds
    _pidfd: int

    def fileno(self) -> int:
        """Readable from the process's death on."""
        return self._pidfd

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it is dead, or after `close`."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def reap(self) -> Ended:
        """Wait for its end, and say how it ended. Once."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(-code, None) if code < 0 else Ended(None, code)

    def close(self) -> None:
        """Let go of it, after `reap`: its number may be another process's."""
        os.close(self._pidfd)
        self._pidfd = -1


def thread_count() -> int:
    """How many threads this process has. A fork takes one along, and the locks of all the others."""
    return len(list(Path("/proc/self/task").iterdir()))


def spawn(
    parts: Parts, main: Main, *, account: Account | None, cpu: int | None, log: logs.Logs, now: Seconds
) -> Child:
    """Fork the child that runs `main(parts)`; in it, this call does not return.

    `account` as for `lock_down_child`. `cpu`: where to run, None for anywhere. `log` is the supervisor's,
    which writes into `parts.log`. To be called by the main thread, the only one. Raises SystemCallError.
    """
    assert thread_count() == 1
    parent = os.getpid()
    gc.freeze()  # a collection in a child would copy every page that holds an object
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, FINISH))
    try:
        pid = os.fork()
        if pid == 0:
            _child(parts, main, account=account, cpu=cpu, log=log, parent=parent)
        pidfd = _open_pidfd(pid)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error))
        raise SystemCallError(
            f"{parts.name}: no process for it ({name}): raise TasksMax, LimitNPROC or LimitNOFILE"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Child(parts.role, parts.number, parts.name, parts.start, pid, now, pidfd)


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _child(
    parts: Parts, main: Main, *, account: Account | None, cpu: int | None, log: logs.Logs, parent: int
) -> NoReturn:
    """Be the child. Nothing of the supervisor's may run in here, least of all its way out."""
    code = CRASHED
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        setproctitle.setproctitle(f"nebula-mp: {parts.name} {parts.device}")
        faulthandler.enable(parts.log)  # a stuck or broken process tells where it was
        if cpu is not None:
            _pin(cpu)
        parts = _with_schedstat(parts)
        keep = {descriptor for descriptor in descriptors(parts) if descriptor >= 0}
        lock_down_child(account=account, keep=keep, parent=parent)
        log.close()
        code = main(parts)
    except RingError as error:
        code = RING_CONTRADICTION
        fields = {"role": parts.name, "field": error.field, "value": error.value, "error": error}
        _report(parts, "ring contradiction", fields)
    except SystemCallError as error:
        _report(parts, "worker cannot start", {"role": parts.name, "error": error})
    except BaseException:  # noqa: BLE001 - said, and then this process ends, whatever it was
        _report(parts, "unexpected error", {"role": parts.name}, with_stack=True)
    finally:
        os._exit(code)


def _pin(cpu: int) -> None:
    with contextlib.suppress(psutil.Error, OSError, ValueError):  # costs speed only
        psutil.Process().cpu_affinity([cpu])


def _with_schedstat(parts: P) -> P:
    """Open what a reader measures itself by, while it may still open files."""
    if not isinstance(parts, ReaderParts):
        return parts
    try:
        schedstat = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a kernel without it
        return parts
    return dataclasses.replace(parts, schedstat=schedstat)


def _report(parts: Parts, message: str, fields: dict[str, object], *, with_stack: bool = False) -> None:
    """Write an ERROR record on the way out, whether or not the role has its own log by now."""
    with contextlib.suppress(Exception):
        if not any(isinstance(handler, logs.LogHandler) for handler in logs.LOGGER.handlers):
            logs.Logs(parts.logging, parts.log)
        if with_stack:
            logs.LOGGER.exception(message, extra={"fields": fields})
        else:
            logs.write(LogLevel.ERROR, message, fields)
