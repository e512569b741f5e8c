"""Real forks: what a locked-down child and a reduced supervisor are, may not do, and how they end."""

import ctypes
import errno
import fcntl
import json
import os
import pwd
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from nebula_mp import privileges
from nebula_mp.errors import SystemCallError
from nebula_mp.privileges import (
    SUPERVISOR_AS_ROOT,
    Account,
    Capability,
    Descriptor,
    bounding_set,
    capability_names,
    clear_environment,
    close_all_but,
    current_capabilities,
    find_account,
    inspect_process,
    lock_down_child,
    reduce_supervisor,
)

NOBODY = Account(65534, 65534, "nobody")
WAIT_S = 10.0
NOTHING: frozenset[int] = frozenset()
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT_RAISE = 2
PTRACE_SEIZE = 0x4206
TUNSETIFF = 0x400454CA


class Ends(NamedTuple):
    """What a child needs of its pipes: where it reports, and where it waits for its end."""

    report: int
    hold: int


class Child:
    """A forked process: it does its work, reports, and then waits for `release`."""

    def __init__(self, work: Callable[[Ends], object]) -> None:
        self._report, report = os.pipe()
        hold, self._hold = os.pipe()
        self.ends = Ends(report, hold)  # their numbers in the child
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._report)
            os.close(self._hold)
            _run(work, self.ends)
        os.close(report)
        os.close(hold)

    def result(self) -> Any:
        """What `work` returned; its exception as an AssertionError."""
        raw = b""
        while not raw.endswith(b"\n"):
            assert select.select([self._report], [], [], WAIT_S)[0], "the child does not report"
            more = os.read(self._report, 65536)
            assert more, "the child has ended without a report"
            raw += more
        told = json.loads(raw)
        if "error" in told:
            raise SystemCallError(told["error"], exit_code=told["exit_code"])
        return told["value"]

    def release(self) -> None:
        os.close(self._hold)
        os.close(self._report)
        _, status = os.waitpid(self.pid, 0)
        assert status in (0, signal.SIGKILL)


def _run(work: Callable[[Ends], object], ends: Ends) -> None:
    try:
        told: dict[str, object] = {"value": work(ends)}
    except SystemCallError as error:
        told = {"error": str(error), "exit_code": error.exit_code}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test has to hear of it
        told = {"error": f"{type(error).__name__}: {error}", "exit_code": -1}
    os.write(ends.report, json.dumps(told).encode() + b"\n")
    os.read(ends.hold, 1)
    os._exit(0)


@contextmanager
def child(work: Callable[[Ends], object]) -> Iterator[Child]:
    forked = Child(work)
    try:
        yield forked
    finally:
        forked.release()


def in_child(work: Callable[[Ends], object]) -> Any:
    """The result of `work` in a process of its own."""
    with child(work) as forked:
        return forked.result()


def locked_down(then: Callable[[], object], *, account: Account | None = NOBODY, parent: int = 0) -> Any:
    """The result of `then` in a child that is locked down."""
    parent = parent or os.getpid()

    def work(ends: Ends) -> object:
        lock_down_child(account=account, keep=ends, parent=parent)
        return then()

    return in_child(work)


def become_nobody_with_net_admin() -> None:
    """What a service manager does that starts a program unprivileged with one ambient capability."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    bit = 1 << Capability.NET_ADMIN
    header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", bit, bit, bit, 0, 0, 0)
    assert libc.capset(header, data) == 0
    assert libc.prctl(47, PR_CAP_AMBIENT_RAISE, int(Capability.NET_ADMIN), 0, 0) == 0
    assert libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0  # as after an exec


def error_of(call: Callable[[], object]) -> str | None:
    """The name of the errno that a call is refused with; None when it is not."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ValueError as error:  # resource.setrlimit hides its EPERM
        return str(error)
    return None


# Accounts


def test_the_children_run_as_nobody_where_there_is_no_user_of_our_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_users(monkeypatch, nobody=(65534, 65534))

    assert find_account(None) == NOBODY


def test_the_children_run_as_our_own_user_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_users(monkeypatch, nobody=(65534, 65534), **{"nebula-mp": (990, 991)})

    assert find_account(None) == Account(990, 991, "nebula-mp")


def test_a_machine_without_user_names_has_the_kernels_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with_users(monkeypatch)

    assert find_account(None) == NOBODY


def test_a_named_user_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with_users(monkeypatch, vpn=(200, 201), nobody=(65534, 65534))

    assert find_account("vpn") == Account(200, 201, "vpn")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(
            "vpn", r"mp\.user 'vpn': no such user .*useradd --system --no-create-home vpn", id="unknown"
        ),
        pytest.param("root", r"mp\.user 'root': means the user root, .*name an unprivileged user", id="root"),
        pytest.param("operator", r"mp\.user 'operator': means the group root", id="group root"),
    ],
)
def test_a_user_that_cannot_serve_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    with_users(monkeypatch, root=(0, 0), operator=(11, 0), nobody=(65534, 65534))

    with pytest.raises(SystemCallError, match=message):
        find_account(name)


def with_users(monkeypatch: pytest.MonkeyPatch, **users: tuple[int, int]) -> None:
    def getpwnam(name: str) -> SimpleNamespace:
        uid, gid = users[name]
        return SimpleNamespace(pw_uid=uid, pw_gid=gid)

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)


# Descriptors and environment


@pytest.mark.parametrize("has_close_range", [True, False], ids=["close_range", "kernel without close_range"])
def test_only_listed_descriptors_stay_open_and_the_standard_ones_lead_nowhere(
    monkeypatch: pytest.MonkeyPatch, has_close_range: bool
) -> None:
    if not has_close_range:
        monkeypatch.setattr(privileges, "_libc", SimpleNamespace(syscall=lambda *_: -1))

    def work(ends: Ends) -> object:
        far = fcntl.fcntl(ends.report, fcntl.F_DUPFD, 700)
        fcntl.fcntl(ends.report, fcntl.F_DUPFD, 800)
        close_all_but([*ends, far])
        return far

    with child(work) as forked:
        far = forked.result()
        descriptors = inspect_process(forked.pid).descriptors

    assert [each.number for each in descriptors] == sorted([0, 1, 2, *forked.ends, far])
    assert descriptors[:3] == tuple(Descriptor(number, "/dev/null", "rw") for number in range(3))


def test_a_listed_standard_descriptor_stays_what_it_was() -> None:
    def work(ends: Ends) -> object:
        os.dup2(ends.report, 2)
        os.close(0)
        close_all_but([*ends, 2])
        return os.fstat(2).st_ino == os.fstat(ends.report).st_ino, str(Path("/proc/self/fd/0").readlink())

    assert in_child(work) == [True, "/dev/null"]


def test_a_listed_descriptor_that_is_not_open_is_an_error() -> None:
    with pytest.raises(SystemCallError, match="descriptor 4000: is to be kept, but is not open"):
        in_child(lambda ends: close_all_but([*ends, 4000]))


TITLED = """
import sys, setproctitle
from nebula_mp.privileges import clear_environment
if sys.argv[1] == "titled":
    setproctitle.setproctitle("nebula-mp: " + "long " * 40)
clear_environment()
import ctypes, os, pathlib
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
print(len(os.environ), libc.getenv(b"TOKEN"))
print(b"hush" in pathlib.Path("/proc/self/environ").read_bytes())
if sys.argv[1] == "titled":
    print(pathlib.Path("/proc/self/cmdline").read_bytes().count(b"long"))
    setproctitle.setproctitle("nebula-mp: reader/0")
    print(pathlib.Path("/proc/self/cmdline").read_bytes().strip(b"\\0").decode())
"""


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        pytest.param("untitled", ["0 None", "False"], id="fresh process"),
        pytest.param("titled", ["0 None", "False", "40", "nebula-mp: reader/0"], id="process with a title"),
    ],
)
def test_the_environment_is_forgotten_and_a_title_is_not(when: str, expected: list[str]) -> None:
    environment = {**os.environ, "TOKEN": "hush"}
    argv = [sys.executable, "-c", TITLED, when]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == expected


def test_no_program_inherits_the_environment_that_was_cleared() -> None:
    def work(_: Ends) -> object:
        clear_environment()
        return subprocess.run(["/usr/bin/env"], capture_output=True, text=True, check=True).stdout

    assert in_child(work) == ""


# A child


@pytest.mark.e2e
def test_a_child_of_root_is_nobody_and_holds_nothing() -> None:
    def work(ends: Ends) -> object:
        os.setgroups([0, 4, 27])
        lock_down_child(account=NOBODY, keep=ends, parent=os.getppid())
        return None

    with socket.socket(), child(work) as forked:
        forked.result()
        facts = inspect_process(forked.pid)

    assert (facts.uids, facts.gids, facts.groups) == ((65534,) * 4, (65534,) * 4, ())
    assert_holds_nothing(forked, facts)
    assert facts.bounding == NOTHING


@pytest.mark.e2e
def test_a_child_of_an_unprivileged_supervisor_keeps_its_uid_and_holds_nothing() -> None:
    def work(ends: Ends) -> object:
        become_nobody_with_net_admin()
        lock_down_child(account=None, keep=ends, parent=os.getppid())
        return None

    with child(work) as forked:
        forked.result()
        facts = inspect_process(forked.pid)

    assert facts.uids == (65534,) * 4
    assert_holds_nothing(forked, facts)


def assert_holds_nothing(forked: Child, facts: privileges.ProcessFacts) -> None:
    sets = (facts.effective, facts.permitted, facts.inheritable, facts.ambient)
    assert sets == (NOTHING,) * 4
    assert (facts.pid, facts.parent, facts.threads) == (forked.pid, os.getpid(), 1)
    assert facts.no_new_privs
    assert facts.dumpable is False
    assert facts.core_limit_bytes == 0
    assert facts.umask == 0o077
    assert facts.environment == ()
    assert {each.number for each in facts.descriptors} == {0, 1, 2, *forked.ends}


def attach_to(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    if libc.ptrace(PTRACE_SEIZE, pid, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def raise_net_admin() -> None:
    privileges._libc.prctl(47, PR_CAP_AMBIENT_RAISE, Capability.NET_ADMIN, 0, 0)
    try:
        privileges._set_capabilities({Capability.NET_ADMIN})
    except SystemCallError as error:
        raise OSError(errno.EPERM if "EPERM" in str(error) else errno.EINVAL, str(error)) from error


def create_tun() -> None:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("=16sH22x", b"nmpforbidden", 0x1001))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("forbidden", "refusals"),
    [
        pytest.param(create_tun, {"EACCES", "EPERM"}, id="create a TUN device"),
        pytest.param(raise_net_admin, {"EPERM"}, id="take a capability"),
        pytest.param(lambda: os.setuid(0), {"EPERM"}, id="become root"),
        pytest.param(lambda: os.setgid(0), {"EPERM"}, id="take the group root"),
        pytest.param(lambda: os.setgroups([0]), {"EPERM"}, id="take a further group"),
        pytest.param(lambda: attach_to(os.getppid()), {"EPERM"}, id="trace the supervisor"),
        pytest.param(lambda: os.kill(os.getppid(), signal.SIGTERM), {"EPERM"}, id="signal the supervisor"),
        pytest.param(
            lambda: Path(f"/proc/{os.getppid()}/mem").read_bytes(), {"EACCES"}, id="read its memory"
        ),
        pytest.param(lambda: Path("/etc/shadow").read_bytes(), {"EACCES"}, id="read a file of root"),
        pytest.param(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW), {"EPERM"}, id="listen to all packets"
        ),
        pytest.param(
            lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
            {"not allowed to raise maximum limit"},
            id="write a core file",
        ),
    ],
)
def test_a_locked_down_child_is_refused_what_root_may(
    forbidden: Callable[[], object], refusals: set[str]
) -> None:
    assert locked_down(lambda: error_of(forbidden)) in refusals


@pytest.mark.e2e
def test_a_locked_down_child_cannot_trace_or_read_its_sibling_of_the_same_uid() -> None:
    with child(lambda ends: lock_down_child(account=NOBODY, keep=ends, parent=os.getppid())) as sibling:
        sibling.result()

        def attack() -> list[str | None]:
            memory = Path(f"/proc/{sibling.pid}/mem")
            return [error_of(lambda: attach_to(sibling.pid)), error_of(memory.read_bytes)]

        assert locked_down(attack) == ["EPERM", "EACCES"]


@pytest.mark.e2e
def test_no_program_started_by_a_locked_down_child_gains_anything() -> None:
    def then() -> str:
        return subprocess.run(
            ["/bin/cat", "/proc/self/status"], capture_output=True, text=True, check=True
        ).stdout

    status = dict(line.split(":\t", 1) for line in locked_down(then).splitlines() if ":\t" in line)

    assert (status["CapPrm"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert status["Uid"] == "65534\t65534\t65534\t65534"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("_change_user", r"privileges: the uids: found \(0, 0, 0\), expected \(65534, 65534, 65534\)"),
        ("_set_no_new_privs", "privileges: no_new_privs: found 0, expected 1"),
        ("die_with_parent", "privileges: the signal at the parent's death: found 0, expected 9"),
    ],
)
def test_a_step_that_did_nothing_is_noticed(
    monkeypatch: pytest.MonkeyPatch, step: str, complaint: str
) -> None:
    monkeypatch.setattr(privileges, step, lambda *_: None)

    with pytest.raises(SystemCallError, match=complaint):
        locked_down(lambda: None)


@pytest.mark.e2e
def test_capabilities_that_stay_without_a_change_of_user_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "_set_capabilities", lambda *_: None)

    def work(ends: Ends) -> object:
        become_nobody_with_net_admin()
        lock_down_child(account=None, keep=ends, parent=os.getppid())
        return None

    with pytest.raises(SystemCallError, match=r"privileges: the capabilities: found .*12"):
        in_child(work)


@pytest.mark.e2e
def test_root_cannot_forget_to_name_a_user() -> None:
    with pytest.raises(SystemCallError, match="the children need a user to change to"):
        locked_down(lambda: None, account=None)


@pytest.mark.e2e
def test_only_root_can_name_a_user() -> None:
    def work(ends: Ends) -> object:
        become_nobody_with_net_admin()
        lock_down_child(account=NOBODY, keep=ends, parent=os.getppid())
        return None

    with pytest.raises(SystemCallError, match="only root can change to the user 'nobody'"):
        in_child(work)


@pytest.mark.e2e
def test_root_without_setuid_is_told_what_is_missing() -> None:
    def work(ends: Ends) -> object:
        privileges._set_capabilities({Capability.SETGID})
        lock_down_child(account=NOBODY, keep=ends, parent=os.getppid())
        return None

    with pytest.raises(
        SystemCallError, match=r"user 'nobody' \(uid 65534, gid 65534\) refused \(EPERM\): CAP_SETUID"
    ) as caught:
        in_child(work)

    assert caught.value.exit_code == 4


# The end of the parent


@pytest.mark.e2e
@pytest.mark.parametrize("as_root", [True, False], ids=["other uid", "same uid"])
def test_a_child_dies_with_a_supervisor_that_is_killed(as_root: bool) -> None:
    def supervise(_: Ends) -> int:
        if not as_root:
            become_nobody_with_net_admin()
        reduce_supervisor()
        supervisor = os.getpid()

        def work(ends: Ends) -> object:
            lock_down_child(account=NOBODY if as_root else None, keep=ends, parent=supervisor)
            return None

        worker = Child(work)
        worker.result()
        return worker.pid

    with child(supervise) as supervisor:
        worker = os.pidfd_open(supervisor.result())
        alive = not ended(worker, within_s=0)
        os.kill(supervisor.pid, signal.SIGKILL)
        try:
            assert alive
            assert ended(worker, within_s=1)
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.close(worker)


def ended(pidfd: int, *, within_s: float) -> bool:
    return bool(select.select([pidfd], [], [], within_s)[0])


@pytest.mark.e2e
def test_a_child_whose_parent_has_gone_meanwhile_does_not_start() -> None:
    with pytest.raises(SystemCallError, match="the parent process 1073741824 has ended") as caught:
        locked_down(lambda: None, parent=2**30)

    assert caught.value.exit_code == 5


# The supervisor


@pytest.mark.e2e
def test_a_supervisor_started_as_root_keeps_four_capabilities_and_its_uid() -> None:
    with child(lambda _: reduce_supervisor()) as supervisor:
        warnings = supervisor.result()
        facts = inspect_process(supervisor.pid)

    four = frozenset[int]({Capability.KILL, Capability.SETGID, Capability.SETUID, Capability.NET_ADMIN})
    assert warnings == []
    assert facts.uids == (0,) * 4
    assert (facts.effective, facts.permitted) == (four, four)
    assert (facts.inheritable, facts.ambient, facts.bounding) == (NOTHING,) * 3
    assert facts.no_new_privs


@pytest.mark.e2e
def test_a_supervisor_not_started_as_root_keeps_net_admin_alone() -> None:
    def work(_: Ends) -> object:
        become_nobody_with_net_admin()
        return reduce_supervisor()

    with child(work) as supervisor:
        warnings = supervisor.result()
        facts = inspect_process(supervisor.pid)

    assert warnings == []
    assert facts.uids == (65534,) * 4
    assert (facts.effective, facts.permitted) == (frozenset[int]({Capability.NET_ADMIN}),) * 2
    assert (facts.inheritable, facts.ambient) == (NOTHING, NOTHING)
    assert facts.no_new_privs


@pytest.mark.e2e
def test_a_child_of_a_reduced_supervisor_has_an_empty_bounding_set() -> None:
    def supervise(_: Ends) -> object:
        reduce_supervisor()
        return locked_down(lambda: [len(bounding_set()), os.getresuid()])

    assert in_child(supervise) == [0, [65534] * 3]


@pytest.mark.e2e
def test_a_supervisor_that_lacks_a_capability_is_told_which() -> None:
    def work(_: Ends) -> object:
        privileges._set_capabilities(SUPERVISOR_AS_ROOT - {Capability.KILL, Capability.SETUID})
        return reduce_supervisor()

    with pytest.raises(
        SystemCallError, match=r"CAP_KILL, CAP_SETUID missing: grant them, or start as an unprivileged user"
    ) as caught:
        in_child(work)

    assert caught.value.exit_code == 4


@pytest.mark.e2e
def test_an_unprivileged_supervisor_without_net_admin_is_told_so() -> None:
    def work(_: Ends) -> object:
        become_nobody_with_net_admin()
        privileges._set_capabilities([])
        return reduce_supervisor()

    with pytest.raises(SystemCallError, match="CAP_NET_ADMIN missing: grant it, or start as root"):
        in_child(work)


@pytest.mark.e2e
def test_a_bounding_set_that_cannot_be_emptied_is_warned_of() -> None:
    def work(_: Ends) -> object:
        privileges._set_capabilities(SUPERVISOR_AS_ROOT)
        return reduce_supervisor()

    (warning,) = in_child(work)

    assert "CAP_SETPCAP is missing" in warning
    assert "CAP_NET_ADMIN" in warning


@pytest.mark.e2e
def test_a_supervisor_with_threads_is_refused_because_they_would_keep_everything() -> None:
    def work(_: Ends) -> object:
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait, daemon=True)
        thread.start()
        try:
            return reduce_supervisor()
        finally:
            stop.set()
            thread.join()

    with pytest.raises(SystemCallError, match="2 threads are running"):
        in_child(work)


# Facts


def test_the_facts_of_a_process_are_those_it_knows_of_itself() -> None:
    facts = inspect_process(os.getpid())
    own = current_capabilities()

    assert (facts.pid, facts.parent) == (os.getpid(), os.getppid())
    assert (facts.uids[:3], facts.gids[:3]) == (os.getresuid(), os.getresgid())
    assert set(facts.groups) == set(os.getgroups())
    assert (facts.effective, facts.permitted, facts.inheritable) == own
    assert facts.bounding == bounding_set()
    assert any(mapping.path.startswith(sys.prefix) for mapping in facts.mappings)


def test_the_environment_of_a_process_is_told_by_names_without_values() -> None:
    # `cat` echoes only when it runs: before that the kernel may still be building its environment.
    pipe = subprocess.PIPE
    with subprocess.Popen(["/bin/cat"], env={"TOKEN": "hush", "EMPTY": ""}, stdin=pipe, stdout=pipe) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        cat.stdin.write(b"!")
        cat.stdin.flush()
        assert cat.stdout.read(1) == b"!"
        facts = inspect_process(cat.pid)
        cat.kill()

    assert facts.environment == ("TOKEN", "EMPTY")


def test_descriptors_are_named_with_what_they_allow() -> None:
    memory = os.memfd_create("table", os.MFD_CLOEXEC)
    reader, writer = os.pipe()
    by_number = {each.number: each for each in inspect_process(os.getpid()).descriptors}
    for descriptor in (memory, reader, writer):
        os.close(descriptor)

    assert by_number[memory] == Descriptor(memory, "/memfd:table (deleted)", "rw")
    assert (by_number[reader].access, by_number[writer].access) == ("r", "w")
    assert by_number[reader].target.startswith("pipe:[")


@pytest.mark.parametrize(("permissions", "answer"), [("rwxp", True), ("rw-s", False), ("r-xp", False)])
def test_memory_that_is_writable_and_executable_is_pointed_out(permissions: str, answer: bool) -> None:
    assert privileges.MemoryMapping(0, 4096, permissions, "").is_writable_and_executable is answer


def test_a_process_that_does_not_exist_has_no_facts() -> None:
    with pytest.raises(SystemCallError, match="process 1073741824: there is none of this number"):
        inspect_process(2**30)


@pytest.mark.e2e
def test_a_process_that_we_may_not_see_is_said_to_need_root() -> None:
    def then() -> None:
        inspect_process(os.getppid())

    with pytest.raises(SystemCallError, match=r"the kernel does not show it to us: run as root") as caught:
        locked_down(then)

    assert caught.value.exit_code == 4


def test_capabilities_are_spelled_in_the_order_of_their_numbers() -> None:
    assert capability_names([12, 5, 38]) == ["CAP_KILL", "CAP_NET_ADMIN", "CAP_38"]
