"""Processes of a test that share its memory and are killed at random moments.

Data flow: tests -> [support.forked] -> fork
"""

import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Child:
    """A forked process that runs `run` and ends with 0, or with 1 and a traceback."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                run()
                status = 0
            except BaseException:  # noqa: BLE001 - nothing of the parent's may run in the child
                traceback.print_exc()
            finally:
                os._exit(status)

    def kill(self) -> None:
        """Kill with SIGKILL and wait; AssertionError if it had ended with an error of its own before."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed, see above"

    def wait(self) -> None:
        """Wait for its end; AssertionError if it failed."""
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the child failed, see above"

    def next(self) -> "Child":
        """Start a successor that does the same."""
        return Child(self._run)


@contextmanager
def children(*runs: Callable[[], object]) -> Iterator[list[Child]]:
    """Start one process for each of `runs`; all that are in the list at the end are killed."""
    started = [Child(run) for run in runs]
    try:
        yield started
    finally:
        for child in started:
            child.kill()


def shared_words(count: int) -> memoryview:
    """Make u64 that this process and its children share."""
    return memoryview(mmap.mmap(-1, 8 * count)).cast("Q")


def until(seconds: float) -> Iterator[None]:
    """Repeat for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
