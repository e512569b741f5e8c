"""Messages between the supervisor, control and services, with descriptors if need be.

Data flow: supervisor <-> [workers.channel] <-> control <-> [workers.channel] <-> services <-> supervisor
Each pair of processes has a socket pair, whose both ends the supervisor keeps: a successor goes on with the
end of its predecessor, emptied. Nothing here waits. What comes from another process is looked at before it is
used, since control reads what strangers send and may be in their hands one day.
Knows kinds and bodies as names and maps; knows nothing of what they mean.
Source: unix(7) on SOCK_SEQPACKET and SCM_RIGHTS; memfd_create(2); the msgpack specification.

A message is one datagram: a msgpack map of `schema`, `kind` and `body`. A body above 60 KiB is the content of
a sealed memfd, whose descriptor comes first; the map then has `size` in its place.
"""

import array
import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from nebula_mp.errors import NebulaError, SystemCallError

SCHEMA = 1
BODY_BYTES_MAX = 64 * 1024 * 1024
INLINE_BYTES_MAX = 60 * 1024
_DATAGRAM_BYTES_MAX = 64 * 1024
_DESCRIPTORS_MAX = 253  # SCM_MAX_FD
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_NOT_NOW = frozenset({
    errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS,
    errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN,
})  # fmt: skip


class ChannelError(NebulaError):
    """The other end is gone, or what it sent is no message: whoever holds it must be replaced."""


@dataclass(frozen=True, slots=True)
class Message:
    """What the other end said. The descriptors belong to whoever received it, and are closed on exec."""

    kind: str
    body: dict[str, Any]
    descriptors: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the descriptors, if nobody wants them."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def channel_pair() -> tuple[int, int]:
    """Make both ends; the caller owns the descriptors. Raises SystemCallError."""
    try:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error))
        raise SystemCallError(f"channel between our processes: refused ({name})") from None
    one, other = (end.detach() for end in ends)
    return one, other


class Channel:
    """One end, in the process that uses it. The descriptor is borrowed and never closed here."""

    def __init__(self, descriptor: int, peer: str) -> None:
        """`peer` is for messages: who holds the other end."""
        self._descriptor = descriptor
        self._peer = peer
        self._error: ChannelError | None = None

    def fileno(self) -> int:
        """The descriptor; readable when `receive` has something to give or to say."""
        return self._descriptor

    def send(
        self, kind: str, body: Mapping[str, object] | None = None, *, descriptors: Sequence[int] = ()
    ) -> bool:
        """Send a message with duplicates of `descriptors`; never waits.

        False, and nothing was sent, when the other end has too much to read already, is gone, or the machine
        has no room.
        """
        packed = msgpack.packb(dict(body or {}))
        assert len(packed) <= BODY_BYTES_MAX
        assert len(descriptors) < _DESCRIPTORS_MAX
        with contextlib.ExitStack() as done:
            try:
                if len(packed) <= INLINE_BYTES_MAX:
                    head: dict[str, object] = {"schema": SCHEMA, "kind": kind, "body": packed}
                else:
                    descriptors = (_sealed(packed, done), *descriptors)
                    head = {"schema": SCHEMA, "kind": kind, "size": len(packed)}
                _send(self._descriptor, msgpack.packb(head), descriptors)
            except OSError as error:
                if error.errno in _NOT_NOW:
                    return False
                raise
        return True

    def receive(self, limit: int = 16) -> list[Message]:
        """Give what waits, `limit` messages at most; never waits.

        Raises ChannelError when the other end is gone or sent what is no message; the messages before it are
        given first, and the channel is of no use afterwards.
        """
        messages: list[Message] = []
        while len(messages) < limit and self._error is None:
            try:
                datagram = _receive(self._descriptor)
                if datagram is None:
                    break
                messages.append(_parse(*datagram))
            except ChannelError as error:
                self._error = ChannelError(f"channel to {self._peer}: {error}")
        if self._error is not None and not messages:
            raise self._error
        return messages


def discard(descriptor: int) -> None:
    """Throw away what waits on an end whose process died, before a successor gets it."""
    while True:
        try:
            datagram = _receive(descriptor)
        except ChannelError as error:
            if isinstance(error, _GoneError):
                return
            continue
        if datagram is None:
            return
        _close(datagram[1])


class _GoneError(ChannelError):
    """End of file."""


def _send(descriptor: int, data: bytes, descriptors: Sequence[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    end = _borrowed(descriptor)
    try:
        end.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    finally:
        end.detach()


def _receive(descriptor: int) -> tuple[bytes, tuple[int, ...]] | None:
    """One datagram and its descriptors; None when there is none. Raises ChannelError and closes all then."""
    end = _borrowed(descriptor)
    try:
        data, ancillary, flags, _ = end.recvmsg(
            _DATAGRAM_BYTES_MAX,
            socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4),
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )
    except BlockingIOError:
        return None
    except OSError as error:
        raise _GoneError(error.strerror or str(error)) from None
    finally:
        end.detach()
    received = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    descriptors = tuple(received)
    if not data:
        _close(descriptors)
        raise _GoneError("the other end is gone")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        _close(descriptors)
        raise ChannelError("a message was longer than messages are, or its descriptors found no room")
    return data, descriptors


def _borrowed(descriptor: int) -> socket.socket:
    """A socket object for one call; it must be detached, so that it never closes what others own."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)


def _parse(data: bytes, descriptors: tuple[int, ...]) -> Message:
    """Raises ChannelError, with the descriptors closed."""
    try:
        return _message(data, descriptors)
    except ChannelError:
        _close(descriptors)
        raise


def _message(data: bytes, descriptors: tuple[int, ...]) -> Message:
    head = _unpack(data)
    kind = head.get("kind")
    if head.get("schema") != SCHEMA or not isinstance(kind, str):
        raise ChannelError(f"a message is not of schema {SCHEMA}")
    if "size" not in head:
        return Message(kind, _body(head.get("body")), descriptors)
    if not descriptors:
        raise ChannelError(f"{kind}: the body is missing")
    body = _body(_content(descriptors[0], head["size"]))
    os.close(descriptors[0])
    return Message(kind, body, descriptors[1:])


def _body(packed: object) -> dict[str, Any]:
    if not isinstance(packed, bytes):
        raise ChannelError("the body of a message is missing")
    return _unpack(packed)


def _unpack(data: bytes) -> dict[str, Any]:
    try:
        content = msgpack.unpackb(data)
    except Exception as error:  # noqa: BLE001 - it raises half a dozen kinds, among them ValueError
        raise ChannelError(f"not msgpack: {type(error).__name__}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ChannelError("not a map")
    return content


def _sealed(data: bytes, done: contextlib.ExitStack) -> int:
    """A memfd that can never change; closed by `done`."""
    descriptor = os.memfd_create("nebula-mp:message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    done.callback(os.close, descriptor)
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], written)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    return descriptor


def _content(descriptor: int, size: object) -> bytes:
    """Read a sealed memfd of that size: anything else could block, change or never end."""
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ChannelError("the body of a message is not sealed")
    except OSError:
        raise ChannelError("the body of a message is no memory") from None
    found = os.fstat(descriptor).st_size
    if found != size or found > BODY_BYTES_MAX:
        raise ChannelError(f"the body of a message has {found} bytes instead of {size}")
    return os.pread(descriptor, found, 0)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
