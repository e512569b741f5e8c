"""What a process may still do: a child gives up everything, the supervisor all but four capabilities.

Data flow: supervisor -> [privileges.reduce_supervisor] -> fork -> [privileges.lock_down_child] -> child
The only module that calls prctl, capset and close_range. Knows nothing of roles, configuration or the data
path; landlock and seccomp come after it, which is why `no_new_privs` is on when it returns.
Source: capabilities(7), prctl(2), close_range(2), credentials(7), proc(5).

Order in a child, and why:

    1  environment, umask, core limit, descriptors    need no right; /proc/self is still ours to read
    2  bounding set                                   needs CAP_SETPCAP, which goes with uid 0
    3  groups, gid, uid                               the uid last: the other two need uid 0's capabilities
    4  capabilities, ambient set                      the kernel empties them with uid 0; without root we do
    5  no_new_privs                                   no program started later can give anything back
    6  not dumpable                                   the change of uid resets it
    7  signal at the parent's death                   the change of uid clears it; then we ask for the parent
    8  everything is read back                        a call that did nothing must not go unnoticed

A parent's death is signalled with the rights of the dying one: where the uids differ it needs CAP_KILL.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pwd
import resource
import signal
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from nebula_mp.errors import SystemCallError

SYSTEM_USER = "nebula-mp"
"""Who the children are when `mp.user` is absent and this user exists; else `nobody`."""

_FALLBACK_USER = "nobody"
_FALLBACK_ID = 65534
_STANDARD_DESCRIPTORS = (0, 1, 2)
_UMASK = 0o077
_CAPABILITY_COUNT_MAX = 64
_SYS_CLOSE_RANGE = 436  # the same number on every architecture
_DESCRIPTOR_MAX = 0xFFFFFFFF

_PR_SET_PDEATHSIG = 1
_PR_GET_PDEATHSIG = 2
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_IS_SET = 1

_CAPABILITY_VERSION = 0x20080522  # version 3: 64 bits in two halves
_CAPABILITY_HEADER = struct.Struct("=Ii")  # version, pid (0: this thread)
_CAPABILITY_DATA = struct.Struct("=6I")  # effective, permitted, inheritable: low halves, then high halves

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.syscall.argtypes = [ctypes.c_long, *[ctypes.c_ulong] * 3]
_libc.syscall.restype = ctypes.c_long


class Capability(IntEnum):
    """The capabilities this program has to do with, by the kernel's numbers."""

    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    NET_ADMIN = 12


SUPERVISOR_AS_ROOT = frozenset({Capability.NET_ADMIN, Capability.SETUID, Capability.SETGID, Capability.KILL})
"""What the supervisor keeps: device and routes; children of another uid; signals to them."""

SUPERVISOR_NOT_ROOT = frozenset({Capability.NET_ADMIN})


class Account(NamedTuple):
    """Whom the children run as; never root."""

    uid: int
    gid: int
    name: str


class CapabilitySets(NamedTuple):
    """The three sets of a thread that capset(2) changes, as numbers of capabilities."""

    effective: frozenset[int]
    permitted: frozenset[int]
    inheritable: frozenset[int]


def find_account(name: str | None) -> Account:
    """Look up `mp.user`; None takes the user `nebula-mp`, or else `nobody`.

    Reads the user database, so it is for the supervisor, before any fork. A user of our own is better than
    `nobody`, with whom other services may share signals. Raises SystemCallError when the name is unknown or
    means root.
    """
    for candidate in (name,) if name is not None else (SYSTEM_USER, _FALLBACK_USER):
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid == 0 or entry.pw_gid == 0:
            what = "user root" if entry.pw_uid == 0 else "group root"
            raise SystemCallError(
                f"mp.user {candidate!r}: means the {what}, which would leave the workers the rights to its"
                " files: name an unprivileged user"
            )
        return Account(entry.pw_uid, entry.pw_gid, candidate)
    if name is not None:
        raise SystemCallError(
            f"mp.user {name!r}: no such user on this machine: create it with"
            f" `useradd --system --no-create-home {name}`, or correct the key"
        )
    return Account(_FALLBACK_ID, _FALLBACK_ID, _FALLBACK_USER)


def reduce_supervisor() -> tuple[str, ...]:
    """Keep what the supervisor needs after start and give up the rest, for good. Returns warnings.

    As root: NET_ADMIN, SETUID, SETGID and KILL; else NET_ADMIN alone. The uid stays, so that the supervisor
    can read its files again at a reload. The bounding set is emptied here because the children, which
    inherit it, have no right to. To be called once, before the first fork and while there is one thread:
    capabilities belong to threads. Raises SystemCallError, exit code 4, when one of those is missing.
    """
    try:
        threads = len(list(Path("/proc/self/task").iterdir()))
    except OSError as error:
        raise _refused("counting the threads in /proc/self/task", error.errno, "mount /proc") from None
    if threads != 1:
        raise SystemCallError(
            f"privileges: {threads} threads are running, and only this one would be reduced"
        )
    as_root = os.geteuid() == 0
    wanted = SUPERVISOR_AS_ROOT if as_root else SUPERVISOR_NOT_ROOT
    held = current_capabilities().permitted
    if missing := wanted - held:
        raise SystemCallError(
            f"privileges: {', '.join(capability_names(missing))} missing: grant"
            f" {'them' if len(missing) > 1 else 'it'}{_instead(missing, as_root=as_root)}",
            exit_code=4,
        )
    _empty_bounding_set()
    _set_capabilities(wanted)
    _set_no_new_privs()
    _expect("the capabilities", current_capabilities(), CapabilitySets(wanted, wanted, frozenset()))
    _expect("the ambient set", ambient_set(), frozenset())
    left = bounding_set()
    if left and as_root:
        names = ", ".join(capability_names(left))
        why = "no_new_privs keeps them out of reach"
        return (f"privileges: CAP_SETPCAP is missing: {names} stay in the bounding set; {why}",)
    return ()


def _instead(missing: frozenset[Capability], *, as_root: bool) -> str:
    if as_root and Capability.NET_ADMIN not in missing:
        return ", or start as an unprivileged user with CAP_NET_ADMIN"
    return "" if as_root else ", or start as root"


def lock_down_child(*, account: Account | None, keep: Collection[int], parent: int) -> None:
    """Make this process, just forked, one that can only use what it holds. Cannot be undone.

    `account` is given exactly when we are root. `keep` lists the descriptors to keep; of the standard three
    an unlisted one becomes /dev/null, so that no later descriptor takes its number. Every other is closed:
    Python objects that own one must stay referenced or be detached, or their collection closes whatever has
    the number by then. `parent` is the supervisor's process id, taken before the fork, which its main
    thread must have made: the death of the forking *thread* is what counts.

    The first call of setproctitle in the program's life must come before this; later ones may follow. So must
    imports: the new user may have no right to read the files, codecs of rare encodings among them.
    Raises SystemCallError, after which the process must end: it may be half locked down.
    """
    if (account is None) == (os.geteuid() == 0):
        raise SystemCallError(
            "privileges: started as root, the children need a user to change to"
            if account is None
            else f"privileges: only root can change to the user {account.name!r}"
        )
    clear_environment()
    os.umask(_UMASK)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    close_all_but(keep)

    _empty_bounding_set()
    if account is not None:
        _change_user(account)
    _set_capabilities(frozenset())
    _set_no_new_privs()
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)
    die_with_parent(parent)
    _read_back(account)


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies. A change of uid or gid undoes it.

    Raises SystemCallError, exit code 5, when `parent` is gone already.
    """
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemCallError(f"privileges: the parent process {parent} has ended", exit_code=5)


def clear_environment() -> None:
    """Forget the environment: for getenv, and in the block that /proc/<pid>/environ shows.

    Copies that the interpreter made of it may linger in its memory until that is used again.
    """
    os.environ.clear()
    _libc.clearenv()  # also what os.environ cannot name, such as entries without a key
    # Bytes: text of another encoding than UTF-8 needs a codec, whose file may be out of our reach.
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    argument_end, start, end = (int(fields[number - 3]) for number in (49, 50, 51))  # proc(5) counts from 1
    if not 0 < argument_end <= start < end:
        return  # hidden from us, or not where programs have it
    if ctypes.string_at(argument_end - 1, 1) != b"\0":  # a process title that runs on into the environment
        start += len(ctypes.string_at(start, end - start).split(b"\0", maxsplit=1)[0])
    ctypes.memset(start, 0, end - start)


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor not in `keep`; 0, 1 and 2 are replaced by /dev/null instead.

    Raises SystemCallError when one that is to be kept is not open.
    """
    for descriptor in keep:
        try:
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
        except (OSError, ValueError):
            raise SystemCallError(f"descriptor {descriptor}: is to be kept, but is not open") from None
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(f"opening {os.devnull}", error.errno) from None
    for descriptor in _STANDARD_DESCRIPTORS:
        if descriptor not in keep and descriptor != null:
            os.dup2(null, descriptor, inheritable=False)
    first = 0
    for descriptor in sorted({*keep, *_STANDARD_DESCRIPTORS}):
        _close_range(first, descriptor - 1)
        first = descriptor + 1
    _close_range(first, _DESCRIPTOR_MAX)


def _close_range(first: int, last: int) -> None:
    """Close the descriptors `first`..`last`, both included; none if the range is empty."""
    if first > last or _libc.syscall(_SYS_CLOSE_RANGE, first, last, 0) == 0:
        return
    # Before Linux 5.9, or in a container whose filter does not know the call.
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if first <= descriptor <= last:
            with contextlib.suppress(OSError):  # the one that listed the directory
                os.close(descriptor)


def _change_user(account: Account) -> None:
    try:
        os.setgroups([])
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    except OSError as error:
        raise _refused(
            f"changing to the user {account.name!r} (uid {account.uid}, gid {account.gid})",
            error.errno,
            "CAP_SETUID and CAP_SETGID are needed, and in a user namespace a mapping of these ids",
        ) from None


def _empty_bounding_set() -> None:
    """Where we may; who may not has no_new_privs, with which no program can gain from that set."""
    if Capability.SETPCAP in current_capabilities().effective:
        for capability in bounding_set():
            _prctl("PR_CAPBSET_DROP", _PR_CAPBSET_DROP, capability)


def _set_capabilities(capabilities: Collection[int]) -> None:
    """Make these permitted and effective, and none inheritable, with which the ambient ones go too."""
    mask = sum(1 << capability for capability in capabilities)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = _CAPABILITY_DATA.pack(low, low, 0, high, high, 0)
    if _libc.capset(_CAPABILITY_HEADER.pack(_CAPABILITY_VERSION, 0), data) != 0:
        raise _refused("capset", ctypes.get_errno())


def _set_no_new_privs() -> None:
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def _read_back(account: Account | None) -> None:
    nothing: frozenset[int] = frozenset()
    uid, gid = (account.uid, account.gid) if account else (os.geteuid(), os.getegid())
    _expect("the uids", os.getresuid(), (uid, uid, uid))
    _expect("the gids", os.getresgid(), (gid, gid, gid))
    if account:
        _expect("the groups", os.getgroups(), [])
    _expect("the capabilities", current_capabilities(), CapabilitySets(nothing, nothing, nothing))
    _expect("the ambient set", ambient_set(), nothing)
    _expect("no_new_privs", _prctl("PR_GET_NO_NEW_PRIVS", _PR_GET_NO_NEW_PRIVS), 1)
    _expect("dumpable", _prctl("PR_GET_DUMPABLE", _PR_GET_DUMPABLE), 0)
    death_signal = ctypes.c_int()
    _prctl("PR_GET_PDEATHSIG", _PR_GET_PDEATHSIG, ctypes.addressof(death_signal))
    _expect("the signal at the parent's death", death_signal.value, signal.SIGKILL.value)
    _expect("the core limit", resource.getrlimit(resource.RLIMIT_CORE), (0, 0))


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise SystemCallError(f"privileges: {what}: found {found}, expected {expected}")


def current_capabilities() -> CapabilitySets:
    """Give the capabilities of the calling thread."""
    data = ctypes.create_string_buffer(_CAPABILITY_DATA.size)
    if _libc.capget(_CAPABILITY_HEADER.pack(_CAPABILITY_VERSION, 0), data) != 0:
        raise _refused("capget", ctypes.get_errno())
    low_and_high = _CAPABILITY_DATA.unpack(data.raw)
    return CapabilitySets(*(_numbers(low_and_high[i] | low_and_high[i + 3] << 32) for i in range(3)))


def bounding_set() -> frozenset[int]:
    """Give the capabilities that a program started by this thread could still gain."""
    return _those_with(_PR_CAPBSET_READ)


def ambient_set() -> frozenset[int]:
    """Give the capabilities that a program started by this thread would keep."""
    return _those_with(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_IS_SET)


def _those_with(*query: int) -> frozenset[int]:
    """Ask about one capability after the other; the kernel refuses numbers it has no capability for."""
    found = set()
    for capability in range(_CAPABILITY_COUNT_MAX):
        arguments = [*query, capability, 0, 0, 0, 0][:5]
        answer = _libc.prctl(*arguments)
        if answer < 0:
            break
        if answer:
            found.add(capability)
    return frozenset(found)


def capability_names(capabilities: Iterable[int]) -> list[str]:
    """Spell capabilities as `CAP_NET_ADMIN`, in the order of their numbers; others as `CAP_21`."""
    known = {member.value: member.name for member in Capability}
    return [f"CAP_{known.get(number, number)}" for number in sorted(capabilities)]


def _numbers(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)


def _prctl(name: str, *arguments: int) -> int:
    answer = int(_libc.prctl(*[*arguments, 0, 0, 0, 0][:5]))
    if answer < 0:
        raise _refused(f"prctl({name})", ctypes.get_errno())
    return answer


def _refused(what: str, number: int | None, advice: str = "") -> SystemCallError:
    name = errno.errorcode.get(number or 0, str(number))
    return SystemCallError(
        f"privileges: {what} refused ({name}){': ' + advice if advice else ''}",
        exit_code=4 if number == errno.EPERM else 1,
    )


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One open descriptor of a process."""

    number: int
    target: str  # as /proc names it: a path, `socket:[123]`, `anon_inode:[eventfd]`, `/memfd:name (deleted)`
    access: str  # r, w or rw


@dataclass(frozen=True, slots=True)
class MemoryMapping:
    """One range of a process's addresses; the end is not included."""

    start: int
    end: int
    permissions: str  # like rw-s: read, write, execute, shared or private
    path: str  # empty for anonymous memory

    @property
    def is_writable_and_executable(self) -> bool:
        """Whether code could be written there and run."""
        return "w" in self.permissions and "x" in self.permissions


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """What the kernel says that a process is, may and holds. Sets of capabilities hold their numbers."""

    pid: int
    name: str
    parent: int
    threads: int
    uids: tuple[int, ...]  # real, effective, saved, file system
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    inheritable: frozenset[int]
    permitted: frozenset[int]
    effective: frozenset[int]
    bounding: frozenset[int]
    ambient: frozenset[int]
    no_new_privs: bool
    seccomp: int  # 0 none, 1 strict, 2 filter
    umask: int
    core_limit_bytes: int | None  # None: no limit
    dumpable: bool | None  # None: uid 0, of which /proc does not show it
    environment: tuple[str, ...]  # names only: a value may be a secret
    descriptors: tuple[Descriptor, ...]
    mappings: tuple[MemoryMapping, ...]


def inspect_process(pid: int) -> ProcessFacts:
    """Read /proc/<pid>; the process is not disturbed, so it may change meanwhile.

    Needs root, or the uid of a dumpable process. Raises SystemCallError.
    """
    directory = Path("/proc", str(pid))
    try:
        lines = (directory / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        uids = _integers(status["Uid"])
        shown_uid = (directory / "status").stat().st_uid  # root's when the process is not dumpable
        return ProcessFacts(
            pid=pid,
            name=status["Name"],
            parent=int(status["PPid"]),
            threads=int(status["Threads"]),
            uids=uids,
            gids=_integers(status["Gid"]),
            groups=_integers(status["Groups"]),
            inheritable=_numbers(int(status["CapInh"], 16)),
            permitted=_numbers(int(status["CapPrm"], 16)),
            effective=_numbers(int(status["CapEff"], 16)),
            bounding=_numbers(int(status["CapBnd"], 16)),
            ambient=_numbers(int(status["CapAmb"], 16)),
            no_new_privs=status["NoNewPrivs"] == "1",
            seccomp=int(status["Seccomp"]),
            umask=int(status["Umask"], 8),
            core_limit_bytes=_core_limit(directory),
            dumpable=None if uids[1] == 0 else shown_uid == uids[1],
            environment=_environment(directory),
            descriptors=_descriptors(directory),
            mappings=_mappings(directory),
        )
    except (FileNotFoundError, ProcessLookupError):
        raise SystemCallError(f"process {pid}: there is none of this number") from None
    except PermissionError:
        raise SystemCallError(
            f"process {pid}: the kernel does not show it to us: run as root (CAP_SYS_PTRACE)", exit_code=4
        ) from None


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def _core_limit(directory: Path) -> int | None:
    for line in (directory / "limits").read_text(encoding="utf-8").splitlines():
        if line.startswith("Max core file size"):
            soft = line.removeprefix("Max core file size").split()[0]
            return None if soft == "unlimited" else int(soft)
    raise AssertionError("proc(5): every process has a core limit")


def _environment(directory: Path) -> tuple[str, ...]:
    entries = (directory / "environ").read_bytes().split(b"\0")
    return tuple(entry.partition(b"=")[0].decode(errors="replace") for entry in entries if b"=" in entry)


def _descriptors(directory: Path) -> tuple[Descriptor, ...]:
    found = []
    for number in sorted(int(entry.name) for entry in (directory / "fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = str((directory / "fd" / str(number)).readlink())
            info = (directory / "fdinfo" / str(number)).read_text(encoding="utf-8", errors="replace")
            flags = int(info.partition("flags:")[2].split()[0], 8)
            access = {os.O_RDONLY: "r", os.O_WRONLY: "w"}.get(flags & os.O_ACCMODE, "rw")
            found.append(Descriptor(number, target, access))
    return tuple(found)


def _mappings(directory: Path) -> tuple[MemoryMapping, ...]:
    found = []
    for line in (directory / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        start, _, end = addresses.partition("-")
        found.append(MemoryMapping(int(start, 16), int(end, 16), permissions, "".join(path)))
    return tuple(found)
