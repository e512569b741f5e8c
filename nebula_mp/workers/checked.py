"""A configuration that was found good, without the private key in it; made by a process of its own.

Data flow: configuration and pki files -> a short-lived child: config.load, workers.pki -> [workers.checked]
           -> Checked -> supervisor -> control (with the key's memfd), services (without)
The process that forks everything must never have had the private key in its memory, not even the text of a
YAML file that the key stands in. So a child reads and judges, and ends; what comes back is the model without
the key, and the key itself in a sealed memfd that only control reads.
Knows nothing of what a configuration means; errors arrive as they were raised over there.
Source: memfd_create(2), fcntl(2) on seals.
"""

import contextlib
import copyreg
import errno
import fcntl
import io
import os
import pickle  # noqa: TID251 - between our own processes, and what it may make is listed below
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, NoReturn, Self, cast

import msgpack

from nebula_mp import clock
from nebula_mp.config.load import LoadedConfig
from nebula_mp.config.model import Config
from nebula_mp.errors import CertError, ConfigError, InstanceError, NebulaError, SystemCallError
from nebula_mp.newtypes import IPInterface
from nebula_mp.privileges import die_with_parent
from nebula_mp.workers.pki import PemText, Pki, PkiTexts, check_pki, load_pki

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_GOOD, _REFUSED = b"+", b"-"
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to everyone; the parent decides
_SIGNALS = (*_IGNORED_SIGNALS, signal.SIGTERM)

Load = Callable[[], LoadedConfig]


@dataclass(frozen=True, slots=True, kw_only=True)
class PkiSources:
    """What messages call the three parts of `pki`: a path with its key, or `pki.cert (inline)`."""

    cert: str
    key: str
    ca: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration and certificates that were good together at `at`."""

    config: Config  # pki.key is empty; pki.cert and pki.ca are PEM text
    pki_sources: PkiSources
    warnings: tuple[str, ...]
    sources: tuple[str, ...]  # the files, in the order they were merged
    networks: tuple[IPInterface, ...]  # of the newest certificate
    name: str  # of the newest certificate
    at: int  # unix time of the check
    key: int  # sealed memfd with the private key's PEM, owned by the supervisor; -1: not here


def encode(checked: Checked) -> bytes:
    """Give bytes for another process of ours. The key's descriptor does not travel in them."""
    data = io.BytesIO()
    _Pickler(data).dump(replace(checked, key=-1))
    return data.getvalue()


def decode(data: bytes, *, key: int = -1) -> Checked:
    """Read what `encode` gave; `key` is the descriptor that came beside it. Raises ConfigError."""
    try:
        checked = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # noqa: BLE001 - unpickling raises anything at all
        raise ConfigError(f"checked configuration: cannot be read: {type(error).__name__}") from None
    if not isinstance(checked, Checked):
        raise ConfigError("checked configuration: is something else")
    return replace(checked, key=key)


_VALUES_OF = ("nebula_mp.config.model", "nebula_mp.newtypes", "nebula_mp.workers.checked", "ipaddress")
"""Modules whose classes a pickled Checked consists of; those only hold values."""


class _Pickler(pickle.Pickler):
    """Spells enumerations by class and value: Python 3.11.0 to 3.11.3 would have them fetched by getattr."""

    def reducer_override(self, value: Any) -> Any:
        return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the values of a Checked."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in _VALUES_OF and "." not in name else None
        if found is not _proxy and not (isinstance(found, type) and found.__module__ == module):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a configuration")
        return found


def _proxy(content: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(content)


def _reduce_proxy(proxy: MappingProxyType[Any, Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _proxy, (dict(proxy),)


# So that whoever pickles a Config elsewhere gets the same.
copyreg.pickle(MappingProxyType, _reduce_proxy)


def read_pki(checked: Checked, at: int | None = None) -> Pki:
    """Read the private key from its memfd and make everything that control needs. For control only.

    As of unix time `at`, by default that of the check: a successor of control has to start although a
    certificate expired since. The warnings were in `checked` already. Raises CertError.
    """
    text = _read(checked.key).decode()
    pki, sources = checked.config.pki, checked.pki_sources
    texts = PkiTexts(
        certificate=PemText(pki.cert, sources.cert),
        key=PemText(text, sources.key),
        ca=PemText(pki.ca, sources.ca),
    )
    return check_pki(texts, pki, checked.at if at is None else at)


class Check:
    """One check in a child: `begin`, wait until `fileno()` is readable, `finish`; or `close` at any time."""

    def __init__(self, pid: int, ended: int, answer: int, key: int) -> None:
        """Internal: use `begin`."""
        self._pid = pid
        self._ended = ended  # its other end is in the child: end of file when that is gone
        self._answer = answer
        self._key = key

    @classmethod
    def begin(cls, load: Load, *, replaces: Checked | None = None) -> Self:
        """Fork the child, which runs `load`, reads the files under `pki` and judges them all.

        With `replaces`, which is in force, certificates that may not follow its own are refused as well, so
        that nothing is touched for their sake. Forks this process as it is, so it is for one without threads.
        Raises SystemCallError.
        """
        with contextlib.ExitStack() as undo:
            try:
                answer = _memfd("check", undo)
                key = _memfd("private key", undo)
                ended, alive = os.pipe2(os.O_CLOEXEC)
                undo.callback(os.close, ended)
                pid = _fork(lambda parent: _child(load, replaces, answer, key, parent), alive)
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, str(error))
                raise SystemCallError(f"configuration: no process to check it in ({name})") from None
            undo.pop_all()
        return cls(pid, ended, answer, key)

    def fileno(self) -> int:
        """Readable, or hung up, from the end of the child on; -1 when this is finished or closed."""
        return self._ended

    def refused(self) -> bool:
        """Whether the child has ended by now and found something wrong: `finish` then raises. Never waits."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        return bool(poll.poll(0)) and os.pread(self._answer, 1, 0) != _GOOD

    def finish(self) -> Checked:
        """Wait for the child's end and give what it found good; the caller owns the key's descriptor.

        Raises what `load` and workers.pki raised over there, a ConfigError. NebulaError when the child failed
        for another reason. May be called once.
        """
        try:
            end = self._reap()
            verdict = _read(self._answer)
            if verdict[:1] == _REFUSED:
                raise _error(verdict[1:])
            if verdict[:1] != _GOOD:
                raise NebulaError(f"configuration: the process that checked it ended {end}")
            checked = decode(verdict[1:], key=self._key)
            self._key = -1
        finally:
            self.close()
        return checked

    def close(self) -> None:
        """Give up: the child is killed. Does nothing after `finish`; may be called again."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._reap()
        for descriptor in (self._ended, self._answer, self._key):
            if descriptor >= 0:
                os.close(descriptor)
        self._ended = self._answer = self._key = -1

    def _reap(self) -> str:
        """Wait for the child; how it ended, for a message."""
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:  # somebody who waits for any child was faster
            self._pid = 0
            return "unseen"
        self._pid = 0
        code = os.waitstatus_to_exitcode(status)
        return f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def _memfd(name: str, undo: contextlib.ExitStack) -> int:
    descriptor = os.memfd_create(f"nebula-mp:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    undo.callback(os.close, descriptor)
    os.fchmod(descriptor, 0o400)
    return descriptor


def _fork(child: Callable[[int], NoReturn], alive: int) -> int:
    """Fork; the child has `alive` for itself. No handler of the parent's runs in the child, ever."""
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            child(parent)
    finally:
        os.close(alive)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _child(load: Load, replaces: Checked | None, answer: int, key: int, parent: int) -> NoReturn:
    """Be the child: everything of the parent's is there, and nothing of it may be undone or run on."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the key
        die_with_parent(parent)
        try:
            verdict = _GOOD + encode(_check(load, replaces, key))
        except NebulaError as error:
            verdict = _REFUSED + _refusal(error)
        _write(answer, verdict)
        code = 0
    except BaseException as error:  # noqa: BLE001 - the parent's code above must never run in here
        # Nothing of the exception but its class: its text and its arguments may quote what was read.
        with contextlib.suppress(BaseException):
            if os.environ.get("NEBULA_MP_TRACEBACK"):
                traceback.print_exc()
                sys.stderr.flush()
            name = type(error).__name__
            text = f"unexpected {name} in the check of the configuration (NEBULA_MP_TRACEBACK=1 shows where)"
            _write(answer, _REFUSED + _refusal(NebulaError(text)))
    finally:
        os._exit(code)


def _check(load: Load, replaces: Checked | None, key: int) -> Checked:
    loaded = load()
    at = clock.wall_s()
    config = loaded.config
    texts, pki = load_pki(loaded, at)
    if replaces is not None:
        before = read_pki(replaces).identity
        try:
            pki.identity.check_replaces(before)
        except CertError as error:
            loaded.refuse([("pki.cert", f"{texts.certificate.source}: {error}")], pki.warnings)
    _write(key, texts.key.text.encode())
    fcntl.fcntl(key, fcntl.F_ADD_SEALS, _SEALS)
    return Checked(
        config=replace(
            config, pki=replace(config.pki, key="", cert=texts.certificate.text, ca=texts.ca.text)
        ),
        pki_sources=PkiSources(cert=texts.certificate.source, key=texts.key.source, ca=texts.ca.source),
        warnings=(*loaded.warnings, *pki.warnings),
        sources=tuple(map(str, loaded.sources)),
        networks=pki.identity.networks,
        name=pki.identity.newest.name,
        at=at,
        key=-1,
    )


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _write(descriptor: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], done)


_ERRORS: dict[str, type[NebulaError]] = {
    kind.__name__: kind for kind in (ConfigError, CertError, SystemCallError, InstanceError, NebulaError)
}


def _refusal(error: NebulaError) -> bytes:
    """Encode an error by its text and what else the command line looks at."""
    body: dict[str, object] = {
        "kind": next(name for name, kind in _ERRORS.items() if isinstance(error, kind)),
        "text": str(error),
    }
    if isinstance(error, ConfigError):
        body |= {"problems": error.problems, "warnings": error.warnings}
    elif isinstance(error, SystemCallError | InstanceError):
        body["exit_code"] = error.exit_code
    return msgpack.packb(body)


def _error(data: bytes) -> NebulaError:
    body = cast("dict[str, Any]", msgpack.unpackb(data))
    kind = _ERRORS[body["kind"]]
    if issubclass(kind, ConfigError):
        return kind(*body["problems"], warnings=tuple(body["warnings"]))
    if issubclass(kind, SystemCallError | InstanceError):
        return kind(body["text"], exit_code=body["exit_code"])
    return kind(body["text"])
