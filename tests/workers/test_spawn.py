"""Real forks: what a child is before its role begins, how it ends, and what the supervisor keeps of it."""

import faulthandler
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from nebula_mp import clock
from nebula_mp.config.model import LoggingConfig
from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.privileges import Account, inspect_process
from nebula_mp.shm_stats import create_page
from nebula_mp.workers import logs, spawn
from nebula_mp.workers.parts import Parts, ReaderParts, Role
from nebula_mp.workers.spawn import CRASHED, FINISH, RING_CONTRADICTION, Child, Ended
from tests.support.processes import eventually, forked
from tests.workers.rig import Rig

PATIENCE_S = 30.0
ACCOUNT = Account(65534, 65534, "nobody") if os.geteuid() == 0 else None


class Nursery:
    """Parts with a log and a page of their own, and the children that got them."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo
        self.log_source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, self.log_source)
        undo.callback(os.close, sink)
        page = create_page("control")
        undo.callback(page.close)
        self.log = logs.Logs(LoggingConfig(disable_timestamp=True), sink)
        undo.callback(self.log.close)
        self.parts = Parts(
            role=Role.CONTROL,
            number=0,
            start=1,
            device="nebula1",
            kernel="python",
            stats=page.descriptor,
            log=sink,
            logging=LoggingConfig(disable_timestamp=True),
        )

    def child(
        self, main: Callable[[Parts], int], parts: Parts | None = None, cpu: int | None = None
    ) -> Child:
        made = spawn.spawn(
            parts or self.parts, main, account=ACCOUNT, cpu=cpu, log=self.log, now=clock.monotonic()
        )
        self._undo.callback(end, made)
        return made

    def logged(self) -> str:
        """What the child has written, once it has ended."""
        return os.read(self.log_source, 65536).decode()


def end(child: Child) -> None:
    if child.fileno() >= 0:
        child.signal(signal.SIGKILL)
        child.reap()
        child.close()


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setattr(spawn, "thread_count", lambda: 1)  # pytest-xdist has threads of its own
    with ExitStack() as undo:
        yield Nursery(undo)


def ended(child: Child) -> Ended:
    assert select.select([child], [], [], PATIENCE_S)[0]
    how = child.reap()
    child.close()
    return how


def wait_for_ever(_: Parts) -> int:
    while True:
        signal.pause()


@pytest.mark.parametrize("code", [0, 3, 7])
def test_what_main_returns_is_the_exit_code(nursery: Nursery, code: int) -> None:
    assert ended(nursery.child(lambda _: code)) == Ended(None, code)
    assert Ended(None, code).fields() == {"code": code}


def test_a_signal_that_ended_it_is_named(nursery: Nursery) -> None:
    child = nursery.child(wait_for_ever)
    child.signal(signal.SIGKILL)

    assert ended(child).fields() == {"signal": "SIGKILL"}


def test_signals_to_one_who_is_gone_reach_nobody(nursery: Nursery) -> None:
    child = nursery.child(lambda _: 0)
    assert select.select([child], [], [], PATIENCE_S)[0]

    child.signal(signal.SIGKILL)
    assert child.reap() == Ended(None, 0)
    child.close()
    child.signal(signal.SIGKILL)


def test_a_child_is_locked_down_and_has_its_title(nursery: Nursery) -> None:
    child = nursery.child(wait_for_ever)
    line = Path(f"/proc/{child.pid}/cmdline")
    assert eventually(lambda: line.read_text().startswith("nebula-mp: control nebula1"), PATIENCE_S)
    assert eventually(lambda: inspect_process(child.pid).no_new_privs, PATIENCE_S)

    facts = inspect_process(child.pid)

    assert facts.permitted == facts.effective == facts.inheritable == frozenset()
    assert not facts.environment
    assert facts.threads == 1
    kept = {nursery.parts.log, nursery.parts.stats}
    assert eventually(
        lambda: {each.number for each in inspect_process(child.pid).descriptors} == kept | {0, 1, 2},
        PATIENCE_S,
    )


def test_what_a_terminal_sends_to_all_is_ignored(nursery: Nursery) -> None:
    blocked: list[int] = []

    def main(_: Parts) -> int:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        blocked.extend(mask & set(spawn.SIGNALS))
        for number in spawn.SIGNALS:
            os.kill(os.getpid(), number)
        return len(blocked)

    assert ended(nursery.child(main)) == Ended(None, 0)


def test_being_told_to_finish_waits_for_the_role_to_listen(nursery: Nursery) -> None:
    def main(_: Parts) -> int:
        told = []
        os.kill(os.getpid(), FINISH)
        signal.signal(FINISH, lambda *_: told.append(True))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (FINISH,))
        return 20 + len(told)

    assert ended(nursery.child(main)) == Ended(None, 21)


def test_the_forking_process_blocks_nothing_afterwards(nursery: Nursery) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    ended(nursery.child(lambda _: 0))

    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_an_unexpected_error_is_logged_with_its_stack_and_is_a_crash(nursery: Nursery) -> None:
    def main(_: Parts) -> int:
        raise KeyError("lost")

    assert ended(nursery.child(main)) == Ended(None, CRASHED)
    line = nursery.logged()
    assert 'level=ERROR msg="unexpected error" role=control' in line
    assert "KeyError" in line
    assert "test_spawn.py" in line


def test_an_error_of_a_role_that_logs_by_itself_is_logged_once(nursery: Nursery) -> None:
    def main(parts: Parts) -> int:
        logs.Logs(parts.logging, parts.log)
        raise KeyError("lost")

    ended(nursery.child(main))

    assert nursery.logged().count("\n") == 1


def test_a_contradiction_in_shared_memory_has_its_own_exit_code(nursery: Nursery) -> None:
    def main(_: Parts) -> int:
        raise RingError("seal/0", "head", 7, "0..3")

    assert ended(nursery.child(main)) == Ended(None, RING_CONTRADICTION)
    assert 'level=ERROR msg="ring contradiction" role=control field=head value=7' in nursery.logged()


def test_a_child_that_cannot_be_locked_down_says_why_and_never_begins(nursery: Nursery) -> None:
    parts = replace(nursery.parts, stats=987)

    assert ended(nursery.child(lambda _: 0, parts)) == Ended(None, CRASHED)
    assert "descriptor 987: is to be kept, but is not open" in nursery.logged()


def test_an_abort_leaves_the_stack_in_the_log(nursery: Nursery) -> None:
    def wait_where_it_shows(_: Parts) -> int:
        assert faulthandler.is_enabled()
        os.kill(os.getpid(), signal.SIGABRT)
        return 0

    assert ended(nursery.child(wait_where_it_shows)).fields() == {"signal": "SIGABRT"}
    said = nursery.logged()
    assert "Fatal Python error: Aborted" in said
    assert "wait_where_it_shows" in said


def test_a_reader_gets_its_own_measure_of_waiting(nursery: Nursery) -> None:
    with Rig() as rig:
        parts = replace(rig.reader_parts(0), log=nursery.parts.log, schedstat=-1)

        def main(given: ReaderParts) -> int:
            return len(os.pread(given.schedstat, 100, 0).split())

        assert Path("/proc/self/schedstat").exists()
        assert ended(nursery.child(main, parts)) == Ended(None, 3)  # type: ignore[arg-type]  # a reader's parts


def test_a_child_runs_on_the_cpu_it_is_given(nursery: Nursery) -> None:
    cpu = max(os.sched_getaffinity(0))

    def main(_: Parts) -> int:
        return 40 + (os.sched_getaffinity(0) == {cpu})

    assert ended(nursery.child(main, cpu=cpu)) == Ended(None, 41)
    assert cpu in os.sched_getaffinity(0)


def test_a_machine_without_room_for_a_process_is_an_error_with_advice(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)

    with pytest.raises(SystemCallError, match="control: no process for it \\(EAGAIN\\): raise TasksMax"):
        nursery.child(lambda _: 0)


def test_a_child_nobody_could_watch_is_not_left_behind(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = []

    def pidfd_open(pid: int) -> int:
        pids.append(pid)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)

    with pytest.raises(SystemCallError, match="EMFILE"):
        nursery.child(wait_for_ever)

    assert not Path(f"/proc/{pids[0]}").exists()


def test_threads_are_counted() -> None:
    def main() -> None:
        release = threading.Event()
        assert spawn.thread_count() == 1
        thread = threading.Thread(target=release.wait)
        thread.start()
        assert spawn.thread_count() == 2
        release.set()
        thread.join()

    with forked(main) as child:
        assert child.wait() == 0


def test_a_fork_beside_a_thread_is_refused(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "thread_count", lambda: 2)

    with pytest.raises(AssertionError):
        nursery.child(lambda _: 0)
