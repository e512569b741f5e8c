"""The control socket: one command in, one answer out.

Data flow: cli.client -> <run_dir>/<name>.sock -> [workers.local_api] -> workers.services -> back
A message is its length in 4 bytes, big endian, and a msgpack map. Requests and answers carry the schema;
fields are only ever added to one. Access is the file's mode and the caller's uid.
Knows nothing of what a command does.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import msgpack

from nebula_mp.errors import NebulaError

SCHEMA = 1
REQUEST_BYTES_MAX = 64 * 1024
ANSWER_BYTES_MAX = 64 * 1024 * 1024
LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid
_CLIENTS_MAX = 16
_IDLE_S = 10
_PAUSE_S = 1.0

Command = Callable[[], Awaitable[Mapping[str, object]]]


def encode(message: Mapping[str, object]) -> bytes:
    """Frame one message."""
    body = msgpack.packb(dict(message))
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    """Read the body of one frame. Raises ValueError for anything but a map of our schema."""
    try:
        message = msgpack.unpackb(body)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"not msgpack: {error}") from None
    if not isinstance(message, dict) or message.get("schema") != SCHEMA:
        raise ValueError(f"not a message of schema {SCHEMA}: client and gateway are of different versions")
    return message


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Tell process id and user id at the other end; pid 0 if it lives in another namespace."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


class LocalApi:
    """`start` inside the loop with the listening socket, which it then owns; `close` ends it.

    `uids` are the users who may ask. A command that raises NebulaError is answered with its text; anything
    else it raises goes to the loop's exception handler, and the client sees the connection close.
    """

    def __init__(self, commands: Mapping[str, Command], uids: Collection[int]) -> None:
        self._commands = commands
        self._uids = frozenset(uids)
        self._listener: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._greetings: set[asyncio.Task[object]] = set()
        self._clients: set[asyncio.StreamWriter] = set()

    def start(self, listener: socket.socket) -> None:
        """Begin to accept clients."""
        # asyncio's own server would call listen(2) again, and clients would then take us, instead of the
        # process that opened the socket, for the one whose end they have to wait for.
        self._listener = listener
        listener.settimeout(0)
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept nobody any more and hang up on those who are there; may be called again."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self._pause is not None:
            self._pause.cancel()
        for greeting in self._greetings:
            greeting.cancel()
        for writer in self._clients:
            writer.close()
        self._clients.clear()

    def _accept(self) -> None:
        """Take one client in; there may be more, and the loop then calls again."""
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it is gone again
            return
        except OSError:  # no descriptors left: it would be tried again at once, for ever
            loop.remove_reader(self._listener.fileno())
            self._pause = loop.call_later(_PAUSE_S, self.start, self._listener)
            return
        count = len(self._clients) + len(self._greetings)
        if count >= _CLIENTS_MAX or peer_credentials(connection)[1] not in self._uids:
            connection.close()
            return
        connection.settimeout(0)
        stream = asyncio.StreamReader(limit=REQUEST_BYTES_MAX + LENGTH.size)
        protocol = asyncio.StreamReaderProtocol(stream, self._serve)
        greeting = loop.create_task(loop.connect_accepted_socket(lambda: protocol, connection))
        self._greetings.add(greeting)
        greeting.add_done_callback(self._greetings.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            # Slow, silent or gone clients cost nobody anything: they are hung up on.
            with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
                await self._converse(reader, writer)
        except Exception as error:  # noqa: BLE001 - handed on
            asyncio.get_running_loop().call_exception_handler(
                {"message": "control socket", "exception": error}
            )
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(_IDLE_S):
                body = await _read(reader)
            answer = _refusal(f"longer than {REQUEST_BYTES_MAX} bytes")
            if body is not None:
                answer = await self._answer(body)
            writer.write(encode(answer))
            async with asyncio.timeout(_IDLE_S):
                await writer.drain()
            if body is None:
                return

    async def _answer(self, body: bytes) -> Mapping[str, object]:
        try:
            name = decode(body).get("command")
        except ValueError as error:
            return _refusal(str(error))
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            return _refusal(f"unknown command; known are {', '.join(sorted(self._commands))}")
        try:
            return {"schema": SCHEMA, "ok": True, "result": dict(await command())}
        except NebulaError as error:
            return _refusal(str(error))


def _refusal(error: str) -> Mapping[str, object]:
    return {"schema": SCHEMA, "ok": False, "error": error}


async def _read(reader: asyncio.StreamReader) -> bytes | None:
    """Read one frame's body; None if it is too long, and the stream is then of no use any more."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(length) if length <= REQUEST_BYTES_MAX else None
