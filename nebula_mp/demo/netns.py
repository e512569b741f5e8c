"""Network namespaces on this machine, joined by veth pairs, and the processes inside them.

Data flow: demo | end-to-end tests -> [demo.netns] -> `ip` (iproute2) -> kernel
Knows nothing of Nebula. Needs root. Whatever a `Lab` made is gone after `close`, processes included.
Source: ip-netns(8), veth(4).
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Self

from nebula_mp.errors import SystemCallError

_COMMAND_TIMEOUT_S = 30.0
_TERM_GRACE_S = 3.0
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def require_root_and_iproute() -> None:
    """Raise SystemCallError, exit code 4 without root and 1 without `ip`, before anything is touched."""
    if os.geteuid() != 0:
        message = "network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN): run it again through sudo"
        raise SystemCallError(message, exit_code=4)
    if shutil.which("ip") is None:
        raise SystemCallError("the command 'ip' is missing: install the package iproute2")


def run(argv: Sequence[str], *, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
    """Run a command to its end and return its stdout; SystemCallError carries what it wrote to stderr."""
    try:
        # A session of its own: Ctrl-C then reaches the caller only, and no step is done by half.
        done = subprocess.run(  # noqa: S603 - argv is ours
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, start_new_session=True
        )
    except FileNotFoundError as error:
        raise SystemCallError(f"the command {argv[0]!r} is missing: install it") from error
    except subprocess.TimeoutExpired as error:
        raise SystemCallError(f"'{' '.join(argv)}' did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").replace("\n", "; ")
        raise SystemCallError(f"'{' '.join(argv)}' ended with {done.returncode} and said: {said}")
    return done.stdout


class Namespace:
    """One network namespace by its name in /run/netns."""

    def __init__(self, name: str) -> None:
        self.name = name

    def command(self, *argv: str) -> list[str]:
        """Return the argv that runs `argv` inside."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
        """Run a command inside to its end; stdout, or SystemCallError."""
        return run(self.command(*argv), timeout_s=timeout_s)

    def start(
        self, *argv: str, stdout: IO[bytes] | int, stderr: IO[bytes] | int = subprocess.STDOUT
    ) -> "subprocess.Popen[bytes]":
        """Start a command inside, in a session of its own so that Ctrl-C reaches only the caller."""
        return subprocess.Popen(  # noqa: S603 - argv is ours
            self.command(*argv),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        """Every process whose network namespace this is."""
        return [int(pid) for pid in run(["ip", "netns", "pids", self.name]).split()]


class Lab:
    """Namespaces and the links between them, under one unique prefix; a context manager.

    Call `namespace` for each site, then `join`; `close` (or the end of the `with`) ends every process
    inside, TERM first, KILL after 3 s, and deletes the namespaces. Devices and routes go with them.
    """

    def __init__(self, prefix: str = "nmp") -> None:
        self.prefix = f"{prefix}-{secrets.token_hex(3)}"
        self.namespaces: list[Namespace] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def namespace(self, suffix: str) -> Namespace:
        """Create `<prefix>-<suffix>` with its loopback up."""
        space = Namespace(f"{self.prefix}-{suffix}")
        self.namespaces.append(space)
        # Not interrupted: the command could be under way, and make what `close` has looked for in vain.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
        try:
            run(["ip", "netns", "add", space.name])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # An IPv6 address that is still being checked for duplicates cannot be used, for up to 2 s.
        space.run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")
        space.run("ip", "link", "set", "lo", "up")
        return space

    def join(
        self,
        left: Namespace,
        right: Namespace,
        left_addresses: Sequence[str],
        right_addresses: Sequence[str],
        *,
        device: str = "eth0",
        mtu_bytes: int = 1500,
    ) -> None:
        """Lay a veth pair between two sites; addresses as `192.0.2.1/24` or `2001:db8::1/64`."""
        ends = (f"{device} netns {end.name} mtu {mtu_bytes}".split() for end in (left, right))
        run(["ip", "link", "add", *next(ends), "type", "veth", "peer", "name", *next(ends)])
        for space, addresses in ((left, left_addresses), (right, right_addresses)):
            for address in addresses:
                space.run("ip", "address", "add", address, "dev", device)
            space.run("ip", "link", "set", device, "up")
        # The kernel brings a carrier up to 1 s late: what is sent before is lost, and IPv6 neighbours that
        # were asked before wait longer.
        for space in (left, right):
            space.run("sh", "-c", f"until ip link show {device} | grep -q 'state UP'; do sleep 0.05; done")

    def close(self) -> None:
        """End what runs inside and remove the namespaces; may be called again."""
        alive = [space for space in self.namespaces if _exists(space)]
        _signal_all(alive, signal.SIGTERM)
        deadline = time.monotonic() + _TERM_GRACE_S
        while any(_running(space) for space in alive) and time.monotonic() < deadline:
            time.sleep(0.02)
        _signal_all(alive, signal.SIGKILL)
        self.namespaces.clear()
        errors = [error for space in alive if (error := _delete(space)) is not None]
        if errors:
            raise errors[0]


def _delete(space: Namespace) -> SystemCallError | None:
    """The error instead of raising it, so that one namespace that stays does not keep the others."""
    try:
        run(["ip", "netns", "del", space.name])
    except SystemCallError as error:
        return error
    return None


def _exists(space: Namespace) -> bool:
    return os.path.lexists(f"/run/netns/{space.name}")


def _running(space: Namespace) -> bool:
    """Whether a process inside still executes; one that ended but was not waited for yet does not count."""
    return any(_state(pid) not in {"Z", "X", ""} for pid in space.pids())


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _signal_all(spaces: Sequence[Namespace], number: signal.Signals) -> None:
    for space in spaces:
        for pid in space.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
