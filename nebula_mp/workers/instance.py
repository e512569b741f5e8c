"""One running gateway per name: its lock and its control socket in the run directory.

Data flow: start -> [workers.instance] -> <run_dir>/<name>.lock and .sock -> stop, reload, status
The kernel drops the lock when its holder dies, however it dies, so what a dead instance left behind is
taken over. Knows nothing of what is said over the socket.
Source: flock(2), unix(7).
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from nebula_mp.config.model import Config
from nebula_mp.errors import InstanceError, SystemCallError

_SOCKET_PATH_BYTES_MAX = 107
_BACKLOG = 8


def instance_name(config: Config) -> str | None:
    """Give the name an instance is found by: its device, else its port; None if the kernel chooses both."""
    return config.tun.dev or (str(config.listen.port) if config.listen.port else None)


def socket_path(run_dir: str, name: str) -> Path:
    """Give the path of an instance's control socket."""
    return Path(run_dir) / f"{name}.sock"


class Instance:
    """The right to run under a name: `claim`, `listen`, and `release` at the end."""

    def __init__(self, run_dir: str, name: str, lock: int) -> None:
        self.name = name
        self.socket_path = socket_path(run_dir, name)
        self._lock_path = Path(run_dir) / f"{name}.lock"
        self._lock = lock
        self._listening = False

    @classmethod
    def claim(cls, run_dir: str, name: str) -> "Instance":
        """Take the lock, and remove what a dead instance left.

        Raises InstanceError that names the process which has it, SystemCallError if `run_dir` cannot be
        used (exit code 4 for want of rights).
        """
        path = Path(run_dir) / f"{name}.lock"
        if len(os.fsencode(socket_path(run_dir, name))) > _SOCKET_PATH_BYTES_MAX:
            raise SystemCallError(
                f"{socket_path(run_dir, name)}: longer than the {_SOCKET_PATH_BYTES_MAX} bytes a socket path"
                " may have: choose a shorter mp.run_dir"
            )
        try:
            Path(run_dir).mkdir(mode=0o755, parents=True, exist_ok=True)
            instance = cls(run_dir, name, _lock(path, name))
        except OSError as error:
            raise _run_dir_error(run_dir, error) from None
        try:
            instance._remove_stale_socket()
        except BaseException:
            instance.release()
            raise
        return instance

    def _remove_stale_socket(self) -> None:
        try:
            if not stat.S_ISSOCK(self.socket_path.lstat().st_mode):
                raise SystemCallError(f"{self.socket_path}: exists and is not a socket: remove it")
            self.socket_path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _run_dir_error(str(self.socket_path.parent), error) from None

    def listen(self) -> socket.socket:
        """Open the control socket, mode 0600; the caller closes it."""
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        # The mode is there from the first moment: a chmod afterwards would leave a gap.
        umask = os.umask(0o177)
        try:
            listener.bind(str(self.socket_path))
            self._listening = True
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise _run_dir_error(str(self.socket_path.parent), error) from None
        finally:
            os.umask(umask)
        return listener

    def release(self) -> None:
        """Remove socket and lock; may be called again."""
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            if self._listening:
                self.socket_path.unlink()
        # Removed while the lock is held, so that a successor never deletes somebody else's file.
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        os.close(self._lock)
        self._lock = -1


def _lock(path: Path, name: str) -> int:
    """Open and lock `path`, which its former holder may be removing at this moment."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(lock).st_ino:
                    os.ftruncate(lock, 0)
                    os.write(lock, f"{os.getpid()}\n".encode())
                    return lock
        except BlockingIOError:
            pid = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise InstanceError(
                f"{name}: is running already as pid {pid}: stop it with `nebula-mp stop`, or choose another"
                " tun.dev, listen.port or mp.run_dir"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _run_dir_error(run_dir: str, error: OSError) -> SystemCallError:
    name = errno.errorcode.get(error.errno or 0, str(error))
    if isinstance(error, PermissionError):
        return SystemCallError(
            f"mp.run_dir {run_dir}: no right to write there ({name}): run as root, let the service manager"
            " make it (RuntimeDirectory=nebula-mp), or set mp.run_dir to a directory of yours",
            exit_code=4,
        )
    return SystemCallError(f"mp.run_dir {run_dir}: {error.strerror or error} ({name}): set mp.run_dir")
