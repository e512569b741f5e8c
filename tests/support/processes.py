"""Forked processes, and what they share, for tests of shared memory: all ends with the test."""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Closes(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closes)


class Keep(contextlib.ExitStack):
    """`keep(region)` gives it back and closes it when the test ends."""

    def __call__(self, thing: T) -> T:
        self.callback(thing.close)
        return thing


class Forked:
    """A child that runs `main` and ends; `status` is its exit status once it has been waited for."""

    def __init__(self, main: Callable[[], object]) -> None:
        self.status: int | None = None
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                main()
                code = 0
        except BaseException:  # noqa: BLE001  a test's child must never come back into pytest
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal that ends it, and wait; its exit status."""
        if self.status is None:
            os.kill(self.pid, number)
        return self.wait()

    def stop(self) -> None:
        """Stop it, and wait until it is stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> int:
        """Its exit status: negative is the signal that ended it."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status


@contextlib.contextmanager
def forked(main: Callable[[], object]) -> Iterator[Forked]:
    """A child for the length of the block; killed at its end unless it was waited for."""
    child = Forked(main)
    try:
        yield child
    finally:
        child.kill()


def eventually(condition: Callable[[], bool], limit_s: float = 10) -> bool:
    """Whether `condition` becomes true in time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def vm_flags(name: str) -> list[set[str]]:
    """Flags of this process's mappings of a region, as smaps has them."""
    parts = Path("/proc/self/smaps").read_text().split(f"nebula-mp:{name} (deleted)")[1:]
    return [
        set(next(line for line in part.splitlines() if line.startswith("VmFlags:")).split()[1:])
        for part in parts
    ]
